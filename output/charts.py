"""Pictures of many runs: what a sweep says, where two runs differ, and from which recall on prefetching pays.

Every function returns a matplotlib Figure of its own; `pictures.save` writes it. To add a picture of a sweep: write the
function, name it in CHARTS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..engine.measure.comparison import Step
from ..engine.measure.insights import (
    InsightError,
    check_few,
    check_key,
    effects,
    finished,
    front,
    table,
    values_of,
    varying,
)
from ..words import unknown_name
from .palette import COLORS
from .pictures import INK, WIDTH_INCHES, set_title, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colors of lines, of Okabe and Ito; after them they come again with another mark.
_LINES = [color for color, _ in COLORS.values()]
_MARKS = "os^Dv"
#: What a heat map writes into its cells, and a front beside its points: no more than so many.
_MOST_LABELS = 200
#: What the memory of a run is, for the front of speed against memory.
MEMORY = "budget_bytes"


def plot_sweep(
    kind: str, rows: Iterable[dict[str, Any]], *, x: str | None = None, by: str | None = None, figure: str
) -> Figure:
    """Draw one of CHARTS from the rows of a sweep.

    `figure` is what is drawn, by its dotted name in a row; `x` and `by` are keys of the grid (without them, those with
    most values); over all other keys the median counts. Raises InsightError.
    """
    if kind not in CHARTS:
        raise InsightError(unknown_name("KIND", kind, CHARTS))
    kept = finished(rows, *dict.fromkeys((figure, MEMORY) if kind == "pareto" else (figure,)))
    for key in filter(None, (x, by)):
        check_key(kept, key)
    free = [key for key in varying(kept) if key not in (x, by)]
    x = x or (free.pop(0) if free else next(iter(kept[0]["settings"])))
    by = by or (free.pop(0) if free else None)
    return CHARTS[kind](kept, x, by, figure)


#: What keys and figures are called on an axis, where their own names say too little.
_LABELS = {
    "tokens_per_second": "tokens per second",
    "hit_rate": "hit rate (share of accesses)",
    "late_rate": "late (share of accesses)",
    "memory_utilization": "expert memory in use (share)",
    "speedup": "speed-up over no prefetch and no cache",
    "prefetch_speedup": "speed-up over the same cache without prefetch",
    "memory.gpu_budget": "expert budget",
    "prefetch.k": "experts guessed a layer (k)",
    "prefetch.lookahead": "lookahead (layers)",
    "predictor.recall": "recall of the predictor",
    "copy.chunk_bytes": "chunk (bytes)",
    "workload.batch": "batch (sequences)",
}
#: Units at the ends of names, in words.
_UNITS = {"_ms": "ms", "_us": "us", "_bytes": "bytes", "_ns": "ns", "_gb_per_s": "GB/s"}


def label_of(name: str) -> str:
    """Returns what a key of a scenario or a figure of a row is called on an axis, with its unit."""
    if name in _LABELS:
        return _LABELS[name]
    of, _, percentile = name.partition(".")
    for ending, unit in _UNITS.items():
        for stem, more in ((name, ""), (of, f", {percentile}")):
            if stem.endswith(ending):
                return f"{stem.removesuffix(ending).replace('_', ' ')}{more} ({unit})"
    return name.replace("_", " ")


def plot_lines(rows: Sequence[dict[str, Any]], x: str, by: str | None, figure: str) -> Figure:
    """Draw a figure over the values of `x`, a line for each value of `by`."""
    picture, axes = _axes(4.2)
    across = values_of(rows, x)
    place = _places(across)
    for number, (name, line) in enumerate(table(rows, x, by, figure).items()):
        axes.plot(
            [place[value] for value in line],
            list(line.values()),
            color=_LINES[number % len(_LINES)],
            marker=_MARKS[number // len(_LINES) % len(_MARKS)],
            label=f"{label_of(by or '')} = {name}",
        )
    _name_places(axes, across, place)
    axes.set_xlabel(label_of(x))
    axes.set_ylabel(label_of(figure))
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    if by is not None:
        picture.legend(loc="outside right upper", frameon=False, fontsize=9)
    set_title(axes, _medians(rows, x, by))
    return picture


def plot_heat_map(rows: Sequence[dict[str, Any]], x: str, by: str | None, figure: str) -> Figure:
    """Draw a figure as the color of a cell for each value of `x` and of `by`, with the number in it."""
    if by is None:
        raise InsightError("a heat map needs two keys of the grid with more than one value")
    cells = table(rows, x, by, figure)
    across, down = values_of(rows, x), list(cells)
    check_few(x, across)
    picture, axes = _axes(1.6 + 0.45 * len(down))
    grid = [[cells[name].get(value, float("nan")) for value in across] for name in down]
    image = axes.imshow(grid, aspect="auto", cmap="cividis")
    picture.colorbar(image, ax=axes, label=label_of(figure))
    axes.set_xticks(range(len(across)), [str(value) for value in across])
    axes.set_yticks(range(len(down)), [str(name) for name in down])
    axes.set_xlabel(label_of(x))
    axes.set_ylabel(label_of(by))
    dark = sum(image.get_clim()) / 2
    if len(across) * len(down) <= _MOST_LABELS:
        for row, numbers in enumerate(grid):
            for column, number in enumerate(numbers):
                color = "white" if number < dark else INK
                if number == number:  # a cell without a row stays empty
                    axes.text(column, row, f"{number:.4g}", ha="center", va="center", color=color, fontsize=9)
    set_title(axes, _medians(rows, x, by))
    return picture


def plot_pareto(rows: Sequence[dict[str, Any]], x: str, by: str | None, figure: str) -> Figure:
    """Draw every row as expert budget against a figure of speed, and the front of those that no other beats."""
    picture, axes = _axes(5.0)
    scale = 2**30
    axes.scatter(
        [row[MEMORY] / scale for row in rows], [row[figure] for row in rows], s=14, color="#8c8c8c", label="all rows"
    )
    best = front(rows, figure, MEMORY)
    memory, speed = [spot.memory / scale for spot in best], [spot.speed for spot in best]
    axes.step(
        memory, speed, where="post", marker="o", color=COLORS["dense"][0], label="front: none is faster with less"
    )
    keys = varying(rows)
    for spot in best[:_MOST_LABELS]:
        said = "\n".join(f"{key.rpartition('.')[2]}={spot.settings[key]}" for key in keys if key in spot.settings)
        axes.annotate(
            said,
            (spot.memory / scale, spot.speed),
            xytext=(-5, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=7,
            color=INK,
        )
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel("expert budget (GiB)")
    axes.set_ylabel(label_of(figure))
    axes.grid(color="#dddddd", linewidth=0.6)
    picture.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return picture


def plot_tornado(rows: Sequence[dict[str, Any]], x: str, by: str | None, figure: str) -> Figure:
    """Draw how far each setting moves a figure, its median over all others, the strongest on top."""
    found = effects(rows, figure)
    if not found:
        raise InsightError("no key of the grid has more than one value: there is nothing to compare")
    picture, axes = _axes(1.2 + 0.5 * len(found))
    for row, effect in enumerate(found):
        axes.barh(row, effect.high - effect.low, 0.6, left=effect.low, color=COLORS["expert"][0])
        for at, value, side, shift in (
            (effect.low, effect.low_at, "right", -4),
            (effect.high, effect.high_at, "left", 4),
        ):
            axes.annotate(
                str(value), (at, row), xytext=(shift, 0), textcoords="offset points", ha=side, va="center", fontsize=9
            )
    # Where no setting matters, any room will do to show that.
    room = max(effect.high - effect.low for effect in found) * 0.15 or max(abs(found[0].high), 1.0) * 0.15
    axes.set_xlim(min(effect.low for effect in found) - room, max(effect.high for effect in found) + room)
    axes.set_yticks(range(len(found)), [effect.key for effect in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel(f"{label_of(figure)}, median over all other settings")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    return picture


#: Pictures of a sweep, by name.
CHARTS: dict[str, Callable[[Sequence[dict[str, Any]], str, str | None, str], Figure]] = {
    "lines": plot_lines,
    "heatmap": plot_heat_map,
    "pareto": plot_pareto,
    "tornado": plot_tornado,
}


def plot_waterfall(falls: Mapping[str, Sequence[Step]], first: str) -> Figure:
    """Draw, for every other run by name, the bars that lead from the first run's makespan to its own."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(WIDTH_INCHES, 0.6 + 2.6 * len(falls)), layout="constrained")
    for row, (name, steps) in enumerate(falls.items(), start=1):
        axes = picture.add_subplot(len(falls), 1, row)
        style_axes(axes)
        for place, step in enumerate(steps):
            whole = step.start_ns == 0 and place in (0, len(steps) - 1)
            longer = step.end_ns > step.start_ns
            color = COLORS["dense"][0] if whole else COLORS["demand" if longer else "head"][0]
            axes.bar(place, (step.end_ns - step.start_ns) / 1e6, 0.7, bottom=step.start_ns / 1e6, color=color)
            said = f"{(step.end_ns - step.start_ns) / 1e6:{'' if whole else '+'},.3f}"
            top = max(step.start_ns, step.end_ns) / 1e6
            axes.annotate(
                said, (place, top), xytext=(0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=8
            )
            if place + 1 < len(steps):
                axes.hlines(step.end_ns / 1e6, place + 0.35, place + 0.65, color=INK, linewidth=0.8)
        names = [first, *(step.name for step in steps[1:-1]), name]
        axes.set_xticks(range(len(steps)), [name.replace(",", "\n") for name in names])
        axes.margins(y=0.12)
        axes.set_ylabel("makespan (ms)")
    return picture


def plot_break_even(data: Mapping[str, Any]) -> Figure:
    """Draw the least recall that pays over budgets, a line for each lookahead; a cross where no recall pays."""
    picture, axes = _axes(4.2)
    budgets = list(dict.fromkeys(cell["budget"] for cell in data["cells"]))
    for number, ahead in enumerate(dict.fromkeys(cell["lookahead"] for cell in data["cells"])):
        cells = [cell for cell in data["cells"] if cell["lookahead"] == ahead]
        color = _LINES[number % len(_LINES)]
        places = [budgets.index(cell["budget"]) for cell in cells]
        recalls = [float("nan") if cell["recall"] is None else cell["recall"] for cell in cells]
        axes.plot(places, recalls, color=color, marker=_MARKS[number % len(_MARKS)], label=f"lookahead {ahead}")
        never = [place for place, cell in zip(places, cells, strict=True) if cell["recall"] is None]
        axes.plot([at + 0.04 * number for at in never], [1.05] * len(never), "x", color=color, markersize=8)
    axes.axhline(1.0, color="#999999", linewidth=0.8)
    axes.set_ylim(-0.03, 1.1)
    axes.set_xticks(range(len(budgets)), budgets)
    axes.set_xlabel("expert budget")
    axes.set_ylabel("least recall that pays (x: none does)")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    picture.legend(loc="outside right upper", frameon=False, fontsize=9)
    return picture


def _axes(height_inches: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    picture = Figure(figsize=(WIDTH_INCHES * 3 / 4, height_inches), layout="constrained")
    axes = picture.add_subplot()
    style_axes(axes)
    return picture, axes


def _places(values: Sequence[Any]) -> dict[Any, float]:
    """Returns where each value stands on an axis: numbers at themselves, others side by side."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return {value: float(value) for value in values}
    return {value: float(place) for place, value in enumerate(values)}


def _name_places(axes: Axes, values: Sequence[Any], place: Mapping[Any, float]) -> None:
    axes.set_xticks([place[value] for value in values], [str(value) for value in values])


def _medians(rows: Sequence[dict[str, Any]], x: str, by: str | None) -> str | None:
    """Returns what the title says of the keys that are not drawn."""
    others = [key for key in varying(rows) if key not in (x, by)]
    return f"median over {', '.join(others)}" if others else None
