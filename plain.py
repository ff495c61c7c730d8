"""Checks of plain data, as JSON and TOML hold it: values that no reader could use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: The largest integer that results, in JSON, and arrays can hold.
MOST_INTEGER = 2**63 - 1


def beyond_64_bits(data: object) -> str | None:
    """Returns which integer of plain data does not fit into 64 bits, and that it must; None if all do."""
    waiting: list[tuple[str, Any]] = [("", data)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(f"{key}.{name}" if key else str(name), inner) for name, inner in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(f"{key}.{number}" if key else str(number), inner) for number, inner in enumerate(value)]
        elif isinstance(value, int) and not -MOST_INTEGER <= value <= MOST_INTEGER:
            digits = str(value) if value.bit_length() < 400 else f"an integer of {value.bit_length():,} bits"
            return f"{key} = {digits}: must fit into 64 bits: at most {MOST_INTEGER}"
    return None
