"""Published runs beside what we predict of them, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from .tables.layout import plain_console, print_rows


def print_published(data: Mapping[str, Any]) -> None:
    """Print the rows, source by source, and what the table comes to."""
    console = plain_console()
    rows = data["rows"]
    for source in dict.fromkeys(row["source"] for row in rows):
        own = [row for row in rows if row["source"] == source]
        print_rows(console, f"{source}: measured, predicted (p5 to p95)", [_row(row) for row in own])
    console.print(Text(told(data["summary"])))


def told(summary: Mapping[str, Any]) -> str:
    """Returns in words what the table comes to."""
    scores = (_times(summary["interval_score"]), _times(summary["interval_score_half_to_twice"]))
    return (
        f"{summary['rows']} rows, {len(summary['not_run'])} of them not run; every source weighs the same. "
        f"Median error {_share(summary['median_error'])}; {summary['within_p5_p95']:.0%} within p5 to p95, whose "
        f"median width is {_times(summary['median_width'])}. Interval score {scores[0]}, of 'half to twice' "
        f"{scores[1]}. "
        f"{summary['ordered']} of {summary['ordered_of']} neighbors ordered as measured."
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _row(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Returns a row of the table: its id and what it is, both figures, and what is off."""
    measured = f"{row['measured']:,.4g} {row['unit']}"
    name = f"{row['id']} {row['what']}"
    if row["predicted"] is None:
        return name, measured, "-", str(row["reason"])
    ours = f"{row['predicted']:,.3g} ({row['p5']:,.3g} to {row['p95']:,.3g})"
    found = "" if row["stated_found"] is None else f", {row['found']:.1%} found of {row['stated_found']:.1%} stated"
    return name, measured, ours, f"{row['error']:+.0%}{'' if row['within'] else ', outside'}{found}"
