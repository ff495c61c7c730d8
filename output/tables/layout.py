"""What tables are made of: the terminal, rows under a title, columns, numbers in words."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text


def plain_console() -> Console:
    """Returns the terminal, which takes words as they are: a name such as `[red]` or `:key:` is no markup."""
    return Console(markup=False, emoji=False)


def columns_of(*columns: str) -> Table:
    """Returns an empty table whose first column is of words, the others of numbers."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=not number)
    return table


def print_rows(console: Console, title: str, rows: Iterable[tuple[str, ...]]) -> None:
    """Print rows of a name, a number and a note, under a title."""
    console.print(Text(f"\n{title}", style="bold"))
    table = Table(show_header=False, box=None, padding=(0, 2))
    for justify in ("left", "right", "left"):
        table.add_column(justify=justify)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def number_of(value: float | None, digits: int) -> str:
    """Returns a number with so many decimals, `-` for None."""
    return "-" if value is None else f"{value:,.{digits}f}"


def share_of(part: float | None, whole: float, digits: int = 1) -> str:
    """Returns a part of a whole in percent, `-` where undefined."""
    return "-" if part is None or not whole else f"{part / whole:.{digits}%}"
