"""Published runs beside what we predict of them: a table, and a picture of predicted by measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from ..errors import InputError
from .tables.layout import plain_console, print_rows

_PICTURES = (".png", ".pdf", ".svg")


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


def check_picture(path: Path) -> None:
    """Refuse a path that is none of a picture's, before anything runs."""
    if path.suffix not in _PICTURES:
        raise InputError(f"--out = {str(path)!r}: write a {', '.join(_PICTURES)}")
    if not path.parent.is_dir():
        raise InputError(f"--out = {str(path)!r}: no such folder")


def write_picture(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw predicted against measured, each with its range, as a speed: what is a time is turned over."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot()
    known = [row for row in rows if row["predicted"] is not None and row["unit"] in ("tokens/s", "s/token")]
    for number, source in enumerate(dict.fromkeys(row["source"] for row in known)):
        points = [_speeds(row) for row in known if row["source"] == source]
        measured, ours, low, high = (list(column) for column in zip(*points, strict=True))
        below = [value - end for value, end in zip(ours, low, strict=True)]
        above = [end - value for value, end in zip(ours, high, strict=True)]
        marker = "osD^v<>PX*hp"[number % 12]
        bars = [[max(0.0, gap) for gap in below], [max(0.0, gap) for gap in above]]
        axes.errorbar(measured, ours, yerr=bars, fmt=marker, markersize=4, linewidth=0.8, label=source)
    ends = [min(_speeds(row)[0] for row in known) / 2, max(_speeds(row)[0] for row in known) * 2]
    axes.plot(ends, ends, color="0.4", linewidth=0.8)
    axes.fill_between(ends, [end / 2 for end in ends], [end * 2 for end in ends], color="0.9", zorder=0)
    axes.set(
        xscale="log", yscale="log", xlim=ends, xlabel="measured (tokens/s)", ylabel="predicted, p5 to p95 (tokens/s)"
    )
    axes.set_title("Published runs, predicted blind; shaded: half to twice", fontsize=10)
    axes.legend(fontsize=6, loc="upper left")
    figure.savefig(path, dpi=150)


def _speeds(row: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """Returns measured, predicted, p5 and p95 as tokens/s."""
    values = (row["measured"], row["predicted"], row["p5"], row["p95"])
    if row["unit"] != "s/token":
        return values
    measured, ours, low, high = (1 / value for value in values)
    return measured, ours, high, low
