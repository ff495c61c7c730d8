"""Markdown, as the reports write it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BAR = "\\|"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns a Markdown table; what would end a cell or its row is written so that it does not."""
    lines = [_row(columns), "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(_row(row) for row in rows)])


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(' '.join(str(cell).split()).replace('|', _BAR) for cell in cells)} |"
