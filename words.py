"""Messages about names that do not exist: what was given, what there is, and which of it was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(key: str, given: object, known: Iterable[str]) -> str:
    """Return `key = 'given': choose one of …`, with the nearest known name if there is one."""
    known = list(known)
    near = difflib.get_close_matches(str(given), known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{key} = {given!r}: choose one of {', '.join(known)}{hint}"


def no_such_key(given: str, known: Iterable[str]) -> str:
    """Return `no such key; did you mean …?`, or which keys there are where none is near."""
    known = list(known)
    near = difflib.get_close_matches(given, known, 1)
    return "no such key; " + (f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}")
