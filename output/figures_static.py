"""The figures of a run, printed: `draw` makes one by name with matplotlib, for papers.

Every form of data has one function here; what it draws, and in which colors, is `figures`' to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .charts import plot_waterfall
from .figure_forms import Bars, Curves, Data, Fall, Grid, Memory, Rows, Spans
from .figures import LABELED, figure_data, timeline
from .palette import ink_on
from .pictures import INK, WIDTH_INCHES, set_title, style_axes
from .plots import Look, draw_memory, plot_timelines
from .saved import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(name: str, runs: Sequence[Run]) -> Figure:
    """Draw a figure of FIGURES by name. Raises FigureError for an unknown name and the wrong number of runs.

    Timelines of two runs lie one above the other, to one scale.
    """
    if name == "timeline" and len(runs) == 2:
        return plot_timelines([_look(timeline(run), f"{run.name}: {run.title}") for run in runs])
    data = figure_data(name, runs)
    return DRAW[type(data)](data, " and ".join(dict.fromkeys(run.title for run in runs)))


def _bars(data: Bars, title: str) -> Figure:
    picture, axes = _axes(1.5 + 0.4 * len(data.rows) if data.across else 3.6)
    places, stacked = np.arange(len(data.rows)), np.zeros(len(data.rows))
    total = np.sum([part.values for part in data.parts], axis=0) if data.parts else stacked
    for part in data.parts:
        if data.across:
            bars = axes.barh(
                places, part.values, 0.66, left=stacked, color=part.color, alpha=part.alpha, label=part.label
            )
            shares = part.values / np.maximum(total, 1e-300)
            wide = (part.values > LABELED * total.max(initial=0)) & (part.alpha == 1)
            says = [f"{share:.1%}" if shown else "" for share, shown in zip(shares, wide, strict=True)]
            axes.bar_label(bars, says, label_type="center", fontsize=8, color=ink_on(part.color))
        else:
            axes.bar(places, part.values, 0.8, bottom=stacked, color=part.color, label=part.label)
        stacked = stacked + part.values
    if data.across:
        axes.set_yticks(places, data.rows)
        axes.set_ylim(len(data.rows) - 0.4, -0.6)
        axes.set_xlabel(data.axis)
        axes.tick_params(axis="y", length=0)
    else:
        _number_columns(axes, data.rows)
        axes.set_xlabel("layer")
        axes.set_ylabel(data.axis)
    axes.grid(axis="x" if data.across else "y", color="#dddddd", linewidth=0.6)
    if data.parts:
        picture.legend(loc="outside lower center", ncols=min(4, len(data.parts)), frameon=False, fontsize=9)
    else:
        axes.text(0.5, 0.5, "nothing to show", transform=axes.transAxes, ha="center", va="center", color=INK)
    set_title(axes, title)
    return picture


def _grid(data: Grid, title: str) -> Figure:
    from matplotlib.ticker import PercentFormatter

    picture, axes = _axes(1.4 + 0.4 * len(data.rows))
    image = axes.imshow(data.shades, aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    picture.colorbar(image, ax=axes, label="of the row's most", format=PercentFormatter(1))
    axes.set_yticks(range(len(data.rows)), data.scales)
    _number_columns(axes, data.columns)
    axes.set_xlabel(data.across)
    axes.tick_params(length=0)
    set_title(axes, title)
    return picture


def _memory(data: Memory, title: str) -> Figure:
    from matplotlib.figure import Figure

    picture = Figure(figsize=(WIDTH_INCHES * 2 / 3, 3.4 * len(data.gpus)), layout="constrained")
    for row, (name, series) in enumerate(data.gpus.items(), 1):
        axes = picture.add_subplot(len(data.gpus), 1, row)
        draw_memory(axes, *series)
        set_title(axes, title if len(data.gpus) == 1 else f"{name}: {title}")
    return picture


def _curves(data: Curves, title: str) -> Figure:
    from matplotlib.ticker import PercentFormatter

    picture, axes = _axes(3.6)
    for curve in data.curves:
        axes.plot(curve.x, curve.y, color=curve.color, linewidth=1.5, drawstyle="steps-post", label=curve.label)
    for at in data.marks.values():
        axes.axvline(at, color="#999999", linewidth=0.8, linestyle=(0, (5, 3)))
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel(data.x_words)
    axes.set_ylabel(data.y_axis)
    axes.grid(color="#dddddd", linewidth=0.6)
    if len(data.curves) > 1:
        picture.legend(loc="outside lower center", ncols=len(data.curves), frameon=False, fontsize=9)
    set_title(axes, title)
    return picture


def _rows(data: Rows, title: str) -> Figure:
    picture, axes = _axes(min(9.0, 1.5 + 0.1 * len(data.names)))
    for part in data.parts:
        axes.barh(part.row, part.to_ms - part.from_ms, 0.8, left=part.from_ms, color=part.color, label=part.label)
    every = max(1, -(-len(data.names) // 16))
    axes.set_yticks(range(0, len(data.names), every), data.names[::every])
    axes.set_ylim(len(data.names) - 0.5, -0.5)
    axes.set_xlabel("time since the start (ms)")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    picture.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    set_title(axes, title)
    return picture


def _spans(data: Spans, title: str) -> Figure:
    return plot_timelines([_look(data, title)])


def _look(data: Spans, title: str) -> Look:
    return Look(data.timeline, data.start_ns, data.end_ns, data.experts_per_layer, title)


def _fall(data: Fall, title: str) -> Figure:
    picture = plot_waterfall({data.second: data.steps}, data.first)
    (axes,) = picture.axes
    axes.set_ylim(bottom=data.lowest_ms)
    if data.lowest_ms:
        axes.set_ylabel("makespan (ms), not from 0")
    return picture


#: What draws each form.
DRAW: dict[type[Data], Callable[[Any, str], Figure]] = {
    Bars: _bars,
    Grid: _grid,
    Memory: _memory,
    Curves: _curves,
    Rows: _rows,
    Spans: _spans,
    Fall: _fall,
}


def _axes(height_inches: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    picture = Figure(figsize=(WIDTH_INCHES * 2 / 3, height_inches), layout="constrained")
    axes = picture.add_subplot()
    style_axes(axes)
    return picture, axes


def _number_columns(axes: Axes, names: Sequence[str]) -> None:
    """Name about a dozen columns evenly, so that names do not overlap."""
    every = -(-len(names) // 16)
    axes.set_xticks(range(0, len(names), every), names[::every])
