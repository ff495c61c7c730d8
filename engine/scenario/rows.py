"""The rows of a sweep: each a finished scenario as plain data, a line of JSON in the sweep's journal."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from ...errors import InputError

#: A row of a sweep: a finished scenario as plain data.
Row = dict[str, Any]


class JournalError(InputError):
    """A journal that cannot be read or written; the message names the file, the line and what would be right."""


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yields the rows of a sweep's journal, in the order in which they finished. Raises JournalError and OSError."""
    return (row for row in parsed(Path(path)) if row is not None)


def find_row(path: str | Path, key: str) -> Row:
    """Returns the row whose key begins with `key`. Raises JournalError if there is none, or several."""
    found = [row for row in read_rows(path) if row["key"].startswith(key)]
    if len(found) != 1:
        raise JournalError(f"{path}: {len(found)} rows have a key that begins with {key!r}: give more, or another")
    return found[0]


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a row as one level: nested keys joined by dots, lists as JSON; the settings by their own keys."""
    flattened: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flattened.update(flat(value, "" if name == "settings" else f"{prefix}{name}."))
        else:
            flattened[prefix + name] = orjson.dumps(value).decode() if isinstance(value, list) else value
    return flattened


def parsed(path: Path) -> Iterator[Row | None]:
    """Yields each line's row, None for a last line not whole. Raises JournalError for a line of another kind."""
    with path.open("rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise JournalError(f"{path}: no regular file: give a sweep's journal")
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                yield None
                return
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                row = None
            if not _is_row(row):
                raise JournalError(f"{path}: line {number} is no row of a sweep; give another file, or move it away")
            yield row


#: What a row holds of what is read again, by key: what it must be, and whether it must be there.
_KINDS: dict[str, tuple[type | tuple[type, ...], bool]] = {
    "key": (str, True),
    "error": ((str, type(None)), True),
    "scenario": (dict, True),
    "settings": (dict, False),
    "sha256": (dict, False),
    "versions": (dict, False),
    "plugins": (list, False),
}


def _is_row(row: Any) -> bool:
    """Whether what a line holds is a row of a sweep."""
    if not isinstance(row, dict):
        return False
    if any(not isinstance(row[key], kind) if key in row else needed for key, (kind, needed) in _KINDS.items()):
        return False
    if not all(isinstance(digest, str | None) for digest in row.get("sha256", {}).values()):
        return False
    return re.fullmatch(r"([0-9a-f]{2})+", row["key"]) is not None
