"""What tables are made of: the terminal, rows under a title, columns, numbers in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from ...units import binary_unit


def plain_console() -> Console:
    """Returns the terminal, which takes words as they are: a name such as `[red]` or `:key:` is no markup."""
    return Console(markup=False, emoji=False)


def columns_of(*columns: str) -> Table:
    """Returns an empty table whose first column is of words, the others of numbers."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=not number)
    return table


def print_rows(
    console: Console,
    title: str,
    rows: Iterable[tuple[str, ...]],
    justify: Sequence[JustifyMethod] = ("left", "right", "left"),
) -> None:
    """Print rows of a name, a number and a note, under a title."""
    console.print(Text(f"\n{title}", style="bold"))
    table = Table(show_header=False, box=None, padding=(0, 2))
    for number, each in enumerate(justify):
        table.add_column(justify=each, no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def number_of(value: float | None, digits: int) -> str:
    """Returns a number with so many decimals, `-` for None."""
    return "-" if value is None else f"{value:,.{digits}f}"


def share_of(part: float | None, whole: float, digits: int = 1) -> str:
    """Returns a part of a whole in percent, `-` where undefined."""
    return "-" if part is None or not whole else f"{part / whole:.{digits}%}"


def known_of(value: float | None, digits: int) -> str:
    """Returns a number with so many significant digits, as `26.8` or `1,360`; `-` for None."""
    if value is None:
        return "-"
    if not value or not math.isfinite(value):
        return f"{value:,.0f}"
    rounded = float(f"{value:.{digits}g}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}"


def time_of(ms: float | None, digits: int = 4) -> str:
    """Returns a time in the unit that people would use for it: `669 us`, `37.4 ms`, `8.03 s`, `21.5 min`."""
    if ms is None:
        return "-"
    for unit_ms, unit, from_ms in ((60e3, "min", 600e3), (1e3, "s", 10e3), (1.0, "ms", 1.0), (1e-3, "us", 0.0)):
        if abs(ms) >= from_ms:
            return f"{known_of(ms / unit_ms, digits)} {unit}"
    raise ValueError(f"time {ms}: not a number")


def size_of(size_bytes: float, digits: int = 3) -> str:
    """Returns a number of bytes for a table, in few digits: `24 KiB`, `13.3 MiB`, `56.2 GiB`."""
    unit_bytes, unit = binary_unit(size_bytes)
    return f"{known_of(size_bytes / unit_bytes, digits)} {unit}" if unit_bytes > 1 else f"{size_bytes:,.0f} B"


def print_warnings(console: Console, warnings: Iterable[str], verbose: bool = False) -> None:
    """Print warnings, the gravest first: a line of each with what would help, or with `verbose` all of it."""
    warnings = list(warnings)
    for number, warning in enumerate(warnings):
        name, _, rest = warning.partition(": ")
        said = warning if verbose else f"{name}: {rest.rpartition('; ')[2]}"
        line = Text(f"{'' if number else chr(10)}warning: {said}", style="yellow")
        console.print(line, no_wrap=not verbose, overflow="fold" if verbose else "ellipsis", crop=False)
    if warnings and not verbose:
        console.print(Text("with -v, why"), style="dim")
