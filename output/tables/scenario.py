"""A scenario before it runs, as lines: what runs on what, what each memory keeps, where each value comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from .layout import plain_console, print_rows, print_warnings
from .runs import capacity_rows, head_lines


def print_scenario(data: Mapping[str, Any], all_keys: bool = False) -> None:
    """Print what would run: three lines, memories' sums, keys that differ from the defaults, what to beware of."""
    console = plain_console()
    for line in head_lines(data):
        console.print(Text(line))
    print_rows(console, "What each memory keeps, at its fullest", capacity_rows(data))
    keys = [key for key in data["keys"] if all_keys or differs(key)]
    title = "Every key" if all_keys else "Keys that differ from the defaults"
    rows = [(key["key"], _value(key["value"]), f"{key['origin']}{_instead(key)}") for key in keys]
    print_rows(console, title, rows, justify=("left", "left", "left"))
    unsure = data["runtime"]["not_measured"]
    known = "" if not unsure else f"; not measured of it: {', '.join(unsure)}"
    console.print(Text(f"\nRuntime {data['runtime']['name']}{known}"))
    print_warnings(console, data["warnings"], verbose=True)


def differs(key: Mapping[str, Any]) -> bool:
    """Whether a key has another value than it would have if nobody had said anything."""
    return bool(key["value"] != key["default"])


def _instead(key: Mapping[str, Any]) -> str:
    """Returns what the default would be, where there is one and the value is another."""
    return f" (not {_value(key['default'])})" if differs(key) and key["default"] is not None else ""


def _value(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(str, value))}]"
    return str(value)
