"""Published runs: a picture of what we predict by what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from . import pictures


def check_picture(path: Path) -> None:
    """Refuse a path that is none of a picture's, before anything runs."""
    try:
        pictures.check_picture(path)
    except InputError as error:
        raise InputError(f"--out {error}") from None


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
    pictures.save(figure, path)


def _speeds(row: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """Returns measured, predicted, p5 and p95 as tokens/s."""
    values = (row["measured"], row["predicted"], row["p5"], row["p95"])
    if row["unit"] != "s/token":
        return values
    measured, ours, low, high = (1 / value for value in values)
    return measured, ours, high, low
