"""Pictures of a run: a window of its timeline with a row for each lane, its expert memory over time, and latencies.

Every function returns a matplotlib Figure of its own, with no global state behind it; `pictures.save` writes one to a
file. matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..resources.timeline import DEMAND, DENSE, EXPERT, HEAD, KINDS, PREFETCH, Timeline
from .palette import COLORS
from .pictures import (
    INK,
    WIDTH_INCHES,
    at_changes,
    bytes_unit,
    few_digits,
    row_names,
    set_title,
    step_ends_ns,
    style_axes,
    used_lanes,
)
from .span_names import layer_of_each, layers_of, track_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Array = npt.NDArray[Any]

#: Of curves, in the order in which they are drawn; once the colors are used up, the next dashes.
_CURVE_COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#f0a830", "#333333", "#56b4e9", "#8c8c8c")
_DASHES = ("-", "--", ":", "-.")
#: Units of time by the length of what is shown: the first that is no longer.
_TIME_UNITS = ((10 * 10**9, 10**9, "s"), (10**6, 10**6, "ms"), (0, 10**3, "µs"))
#: Rows that a timeline's picture has room for.
_MOST_ROWS = 200

_COLOR_SPREAD, _COLOR_BOUND = "#f6d99a", "#b0b0b0"
_LABEL_POINTS = 7
#: Pieces of the window below which a gap cannot be seen; the pieces on either side are drawn as one.
_FINEST = 20_000
#: Up to this many spans in a window each is drawn by itself, a pixel wide at least, so that none vanishes; of more, the
#: density counts, so they keep their true width.
_FEW = 2000
#: The pixels across a window, about, and how many of them a bar must have for an edge that parts it from the next.
_PIXELS, _EDGED = 1500, 4


def default_window(timeline: Timeline) -> tuple[int, int]:
    """Returns (start_ns, end_ns) of what shows most: two ordinary steps near the middle of the run.

    A step ends with its head; steps that take much longer than the median (prefill) are passed over. A run of a
    step or two is shown whole, and so is one without heads; an empty one gives (0, 0).
    """
    spans = timeline.spans()
    last_ns = int(spans["end_ns"].max(initial=0))
    ends_ns = np.unique(spans["end_ns"][spans["kind"] == HEAD])
    if len(ends_ns) < 3:
        return int(spans["start_ns"].min(initial=last_ns)), last_ns
    starts_ns = np.concatenate([[0], ends_ns[:-2]])
    took_ns = ends_ns[1:] - starts_ns
    ordinary = np.flatnonzero(took_ns <= 1.25 * np.median(took_ns))
    chosen = ordinary[np.argmin(np.abs(ordinary - len(took_ns) // 2))]
    return int(starts_ns[chosen]), int(ends_ns[chosen + 1])


class Look(NamedTuple):
    """What of a timeline is drawn: from `start_ns` to `end_ns` of the run, under a title, if it has one."""

    timeline: Timeline
    start_ns: int
    end_ns: int
    experts_per_layer: int
    title: str | None = None


def plot_timeline(
    timeline: Timeline,
    *,
    start_ns: int = 0,
    end_ns: int | None = None,
    experts_per_layer: int,
    title: str | None = None,
) -> Figure:
    """Draw what each lane did from `start_ns` to `end_ns` (None: the end), a row for each lane that is ever used.

    Spans wide enough say their layer, or layer and expert. Of more than 200 lanes the first are drawn, and the picture
    says so. Raises ValueError if the window ends before it starts.
    """
    if end_ns is None:
        end_ns = max(start_ns, int(timeline.spans()["end_ns"].max(initial=0)))
    if end_ns < start_ns:
        raise InputError(f"end_ns = {end_ns}: the window starts at {start_ns}, so it must end there or later")
    return plot_timelines([Look(timeline, start_ns, end_ns, experts_per_layer, title)])


def plot_timelines(looks: Sequence[Look]) -> Figure:
    """Draw timelines one above the other, as `plot_timeline` does, to one scale: each from its own start."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    length_ns = max(look.end_ns - look.start_ns for look in looks)
    heights = [0.8 + 0.5 * max(1, min(_MOST_ROWS, len(_lanes(look.timeline)))) for look in looks]
    figure = Figure(figsize=(WIDTH_INCHES, 0.7 + sum(heights)), layout="constrained")
    rows = figure.subplots(len(looks), 1, squeeze=False, height_ratios=heights)[:, 0]
    drawn: set[str] = set()
    for axes, look in zip(rows, looks, strict=True):
        drawn |= _draw_look(axes, look._replace(end_ns=look.start_ns + length_ns))
    handles = [Patch(facecolor=color, label=label) for kind, (color, label) in COLORS.items() if kind in drawn]
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, handlelength=1.2, fontsize=9
        )
    return figure


def _lanes(timeline: Timeline) -> list[int]:
    return used_lanes(timeline) or track_order(timeline)


def _draw_look(axes: Axes, look: Look) -> set[str]:
    """Draw a timeline's window, a row for each lane; returns the kinds of work that are in it."""
    timeline, start_ns, end_ns, experts_per_layer, title = look
    spans, lanes = timeline.spans(), _lanes(timeline)
    rows, left_out = lanes[:_MOST_ROWS], max(0, len(lanes) - _MOST_ROWS)
    layers = layers_of(spans, experts_per_layer)
    spans = spans[(spans["start_ns"] < end_ns) & (spans["end_ns"] > start_ns)]
    spans = spans[np.isin(spans["lane"], rows)] if left_out else spans
    span_ns = end_ns - start_ns or 1000
    scale_ns, unit = _time_unit(span_ns)
    window = _Window(start_ns, end_ns, scale_ns)
    for row, lane in enumerate(rows):
        _draw_lane(axes, spans[spans["lane"] == lane], row, window, apart=len(spans) <= _FEW)
    layer_of = layer_of_each(spans, experts_per_layer, layers)
    _label_bars(axes, spans, rows, window, experts_per_layer, layer_of)

    for end in step_ends_ns(timeline).tolist():
        if start_ns < end < end_ns:
            axes.axvline(end / scale_ns, color="#777777", linewidth=0.8, linestyle=(0, (1, 2)), zorder=3)
    axes.set_xlim(start_ns / scale_ns, (start_ns + span_ns) / scale_ns)
    axes.set_ylim(max(1, len(rows)) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), row_names(timeline, rows))
    more = f"; {left_out:,} more lanes are not drawn" if left_out else ""
    axes.set_xlabel(f"time since the start of the run ({unit}){more}")
    style_axes(axes)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    if not len(spans):
        axes.text(0.5, 0.5, "nothing ran in this window", transform=axes.transAxes, ha="center", va="center", color=INK)
    set_title(axes, title)
    return {kind for kind in COLORS if (spans["kind"] == KINDS.index(kind)).any()}


class _Window(NamedTuple):
    """What of a timeline is shown, and the ns of a unit of its axis."""

    start_ns: int
    end_ns: int
    scale_ns: int


def _draw_lane(axes: Axes, spans: Array, row: int, window: _Window, *, apart: bool) -> None:
    """Draw one lane's spans as bars in its row, kind after kind."""
    span_ns = window.end_ns - window.start_ns or 1000
    for kind, (color, _) in COLORS.items():
        bars = _bars(spans[spans["kind"] == KINDS.index(kind)], window.start_ns, window.end_ns, apart=apart)
        if len(bars):
            edges = np.where(bars[:, 1] * _PIXELS > span_ns * _EDGED, 0.4, 0.0)
            axes.broken_barh(
                (bars / window.scale_ns).tolist(),
                (row - 0.38, 0.76),
                facecolors=color,
                edgecolors="white",
                linewidths=edges.tolist(),
                snap=False,  # snapped to pixels, thin bars would vanish
            )


def plot_memory(
    time_ns: Array, assigned_bytes: Array, budget_bytes: Array | int, *, title: str | None = None
) -> Figure:
    """Draw the expert memory given out over time, with the budget as a line.

    `time_ns`, `assigned_bytes` and `budget_bytes`, unless it is one number, are (samples,), in order of time; a value
    holds until the next. Raises ValueError if their lengths differ.
    """
    from matplotlib.figure import Figure

    times_ns, sizes, limits = np.asarray(time_ns), np.asarray(assigned_bytes), np.asarray(budget_bytes)
    for name, values in (("assigned_bytes", sizes), ("budget_bytes", limits)):
        if values.shape != times_ns.shape and values.ndim:
            raise InputError(f"{name} has {values.shape} values, time_ns {times_ns.shape}: give as many of each")
    figure = Figure(figsize=(WIDTH_INCHES * 2 / 3, 3.4), layout="constrained")
    axes = figure.add_subplot()
    draw_memory(axes, *at_changes(times_ns, sizes, np.broadcast_to(limits, (max(1, len(times_ns)),))))
    set_title(axes, title)
    return figure


def draw_memory(axes: Axes, times_ns: Array, sizes: Array, limits: Array) -> None:
    """Draw bytes over time and their limit, each (samples,) in order of time."""
    last_ns = (int(times_ns[-1]) if len(times_ns) else 0) or 1000
    scale_ns, unit = _time_unit(last_ns)
    most = max(int(limits.max()), int(sizes.max(initial=0)), 1)
    scale_bytes, unit_of_bytes = bytes_unit(most)

    color = COLORS["dense"][0]
    axes.fill_between(times_ns / scale_ns, sizes / scale_bytes, step="post", color=color, alpha=0.2, linewidth=0)
    axes.step(times_ns / scale_ns, sizes / scale_bytes, where="post", color=color, linewidth=1.4)
    limit = limits[-1] / scale_bytes
    line: dict[str, Any] = {"color": COLORS["demand"][0], "linewidth": 1.4, "linestyle": (0, (5, 3))}
    if (limits == limits[0]).all():
        axes.axhline(limit, **line)
    else:
        axes.step(times_ns / scale_ns, limits / scale_bytes, where="post", **line)
    axes.annotate(
        f"limit {few_digits(limit)} {unit_of_bytes}",
        (1, limit),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=COLORS["demand"][0],
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
    )
    axes.set_xlim(0, last_ns / scale_ns)
    axes.set_ylim(0, 1.15 * most / scale_bytes)
    axes.set_xlabel(f"time since the start of the run ({unit})")
    axes.set_ylabel(f"expert memory given out ({unit_of_bytes})")
    style_axes(axes)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)


def plot_latency(latencies_ms: Mapping[str, Sequence[float]], *, title: str | None = None) -> Figure:
    """Draw a row for each kind of event: the median, half of the events in the box, 90 % between the whiskers.

    `latencies_ms` are each kind's latencies in ms; a kind without any keeps an empty row.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES * 2 / 3, 1.2 + 0.5 * max(1, len(latencies_ms))), layout="constrained")
    axes = figure.add_subplot()
    rows = [row for row, values in enumerate(latencies_ms.values()) if len(values)]
    if rows:
        spread = [np.percentile(values, (5, 25, 50, 75, 95)) for values in latencies_ms.values() if len(values)]
        low, first, median, third, high = np.array(spread).T
        axes.hlines(rows, low, high, color=COLORS["dense"][0], linewidth=1.4)
        axes.barh(rows, third - first, 0.5, left=first, color=COLORS["expert"][0])
        axes.vlines(median, np.array(rows) - 0.25, np.array(rows) + 0.25, color=COLORS["demand"][0], linewidth=2)
    names = [
        f"{name.replace('_', ' ')}\n{f'{len(values):,} x {np.mean(values):.3g} ms' if len(values) else 'none'}"
        for name, values in latencies_ms.items()
    ]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("latency (ms)")
    style_axes(axes)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    set_title(axes, title)
    return figure


def plot_transfer(report: Mapping[str, Any]) -> Figure:
    """Draw the throughput of one copy over its size, a line for each way; the guide's beside them.

    `report` is what the transfer benchmark returns.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES * 2 / 3, 4.6), layout="constrained")
    axes = figure.add_subplot()
    curves = {name: curve for name, curve in report["curves_bytes_gb_per_s"].items() if curve}
    for color, (name, curve) in zip(_CURVE_COLORS, curves.items(), strict=False):
        axes.plot(*zip(*curve, strict=True), marker=".", color=color, label=name)
    guide = report["guide"]
    for entry in (entry for entry in guide["rows"] if "->" in entry["what"]):
        speed = guide["bytes"] / entry["single_ms"] / 1e6
        axes.plot(guide["bytes"], speed, "x", color=INK)
        axes.annotate(
            f"{entry['what']}, {guide['machine']}", (guide["bytes"], speed), xytext=(0, -10),
            textcoords="offset points", ha="center", fontsize=_LABEL_POINTS, color=INK,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="size of the copy", ylabel="GB/s, one copy on an idle engine")
    axes.set_xticks(
        [2 ** (12 + 4 * step) for step in range(5)], labels=["4 KiB", "64 KiB", "1 MiB", "16 MiB", "256 MiB"]
    )
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=9)
    style_axes(axes)
    set_title(axes, report["machine"])
    return figure


def plot_errors(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw by how much makespans are off, in percent: simulated ones, and what the busiest lane alone would take.

    Each row has a `scenario`, `makespan_error`, `bound_error` and the machine's own `spread`, which lies about 0.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, 1.2 + 0.24 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(rows))
    spread = np.array([100 * row["spread"] for row in rows])
    axes.barh(places, 2 * spread, left=-spread, height=0.7, color=_COLOR_SPREAD, label="the machine's own spread")
    for key, color, label in (
        ("bound_error", _COLOR_BOUND, "busiest lane alone"),
        ("makespan_error", COLORS["dense"][0], "simulated"),
    ):
        axes.scatter([100 * row[key] for row in rows], places, s=18, color=color, label=label, zorder=2)
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set_xlabel("error of the makespan in %: simulated / measured - 1, linear from -1 to 1")
    axes.set_yticks(places, [row["scenario"] for row in rows], fontsize=_LABEL_POINTS)
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    style_axes(axes)
    return figure


#: Panels of a figure side by side, at most.
_PANELS = 3


def plot_miss_ratios(*curves: dict[str, Any], title: str | None = None) -> Figure:
    """Draw curves of `miss_ratio.miss_ratio_curves`: the share of look-ups that miss over that of experts held.

    Several of them, of a trace each, have a panel each, named by their `trace` or model; a policy has one color in all.
    """
    from matplotlib.figure import Figure

    columns = min(len(curves), _PANELS)
    rows = -(-len(curves) // columns)
    width = WIDTH_INCHES * (2 / 3 if columns == 1 else 1)
    figure = Figure(figsize=(width, 4.6 if columns == 1 else 0.4 + 3.4 * rows), layout="constrained")
    policies = list(dict.fromkeys(policy for data in curves for policy in data["policies"]))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).reshape(-1)
    for axes, data in zip(panels, curves, strict=False):
        _draw_miss_ratios(axes, data, policies)
        set_title(axes, title if len(curves) == 1 else str(data.get("trace", data["model"])))
        axes.label_outer()
    for axes in panels[len(curves) :]:
        axes.set_visible(False)
    panels[0].legend(frameon=False, fontsize=9)
    if len(curves) > 1 and title is not None:
        figure.suptitle(title, fontsize=10)
    return figure


def _draw_miss_ratios(axes: Axes, data: dict[str, Any], policies: Sequence[str]) -> None:
    """Draw the curves of one trace; `policies` are all of the figure."""
    from matplotlib.ticker import PercentFormatter

    shares = [capacity["share"] for capacity in data["capacities"]]
    marker = "o" if len(shares) == 1 else None
    for policy, curve in data["policies"].items():
        number = policies.index(policy)
        color, dashes = _CURVE_COLORS[number % len(_CURVE_COLORS)], _DASHES[number // len(_CURVE_COLORS) % len(_DASHES)]
        axes.plot(
            shares, curve["miss_ratio"], color=color, linestyle=dashes, linewidth=1.6, marker=marker, label=policy
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("room, as a share of all experts")
    axes.set_ylabel("miss ratio")
    style_axes(axes)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(color="#dddddd", linewidth=0.6)


def plot_over_tokens(latencies_ms: Mapping[str, Array], *, title: str | None = None) -> Figure:
    """Draw what each token took, a line for each name, over the token's number.

    `latencies_ms` are (tokens,) in ms each; the scale is logarithmic where all are above 0.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(WIDTH_INCHES * 2 / 3, 3.4), layout="constrained")
    axes = figure.add_subplot()
    colors = [color for color, _ in (COLORS["expert"], COLORS["demand"], COLORS["dense"], COLORS["predict"])]
    for number, (name, values) in enumerate(latencies_ms.items()):
        mean = f"{np.mean(values):,.3g} ms on average" if len(values) else "none"
        axes.plot(values, color=colors[number % len(colors)], linewidth=1.0, label=f"{name}: {mean}")
    style_axes(axes)
    if all(np.min(values, initial=np.inf) > 0 for values in latencies_ms.values()):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.margins(x=0)
    axes.set_xlabel("token")
    axes.set_ylabel("latency (ms)")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=max(1, len(latencies_ms)), frameon=False, fontsize=8)
    set_title(axes, title)
    return figure


def plot_split(counts: Mapping[str, Mapping[str, int]], *, title: str | None = None) -> Figure:
    """Draw how many accesses came out how, a stacked bar of shares for each name; empty ones keep an empty row.

    `counts` are by name, then by outcome; all names have the same outcomes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES * 2 / 3, 1.6 + 0.5 * max(1, len(counts))), layout="constrained")
    axes = figure.add_subplot()
    outcomes = list(next(iter(counts.values()), {}))
    colors = [COLORS[kind][0] for kind in ("head", "expert", "prefetch", "demand", "predict")]
    left = np.zeros(len(counts))
    totals = [max(1, sum(split.values())) for split in counts.values()]
    for number, outcome in enumerate(outcomes):
        shares = np.array([split[outcome] for split in counts.values()]) / totals * 100
        label = outcome.replace("_", " ")
        axes.barh(range(len(counts)), shares, 0.6, left=left, color=colors[number % len(colors)], label=label)
        for row, share in enumerate(shares):
            if share >= 4:  # narrower bars have no room for a label
                axes.text(left[row] + share / 2, row, f"{share:.1f}%", ha="center", va="center", fontsize=8)
        left += shares
    axes.set_yticks(range(len(counts)), list(counts))
    axes.set_ylim(max(1, len(counts)) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of accesses (%)")
    style_axes(axes)
    axes.tick_params(axis="y", length=0)
    if outcomes:
        figure.legend(loc="outside lower center", ncols=len(outcomes), frameon=False, fontsize=9)
    set_title(axes, title)
    return figure


def _bars(spans: Array, start_ns: int, end_ns: int, *, apart: bool) -> Array:
    """Returns (start, length) in ns of spans cut to the window.

    `apart`: each by itself, no thinner than a pixel. Otherwise those with no visible gap between become one.
    """
    order = np.argsort(spans["start_ns"], kind="stable")
    starts_ns = np.maximum(spans["start_ns"][order], start_ns)
    ends_ns = np.minimum(spans["end_ns"][order], end_ns)
    if apart:
        ends_ns = np.maximum(ends_ns, starts_ns + (end_ns - start_ns) // _PIXELS)
    elif len(spans):
        finest_ns = (end_ns - start_ns) // _FINEST
        parted = starts_ns[1:] - np.maximum.accumulate(ends_ns)[:-1] > finest_ns
        first = np.flatnonzero(np.append(True, parted))
        starts_ns, ends_ns = starts_ns[first], np.maximum.reduceat(ends_ns, first)
    return np.column_stack([starts_ns, ends_ns - starts_ns])


def _label_bars(axes: Axes, spans: Array, rows: list[int], window: _Window, experts: int, layer_of: Array) -> None:
    """Write "L3/E17", or else "L3", into the kernels and copies that are wide enough for it."""
    start_ns, end_ns, scale_ns = window
    row_of = {lane: row for row, lane in enumerate(rows)}
    from_ns, to_ns = np.maximum(spans["start_ns"], start_ns), np.minimum(spans["end_ns"], end_ns)
    inches = (to_ns - from_ns) / max(1, end_ns - start_ns) * (WIDTH_INCHES - 2)
    named = np.isin(spans["kind"], (DENSE, EXPERT, DEMAND, PREFETCH)) & (layer_of >= 0)
    for at in np.flatnonzero(named & (inches > _label_inches("L0"))).tolist():
        expert, kind = int(spans["expert"][at]), int(spans["kind"][at])
        label = f"L{layer_of[at]}" + (f"/E{expert % experts}" if expert >= 0 else "")
        if _label_inches(label) > inches[at]:
            label = f"L{layer_of[at]}"
        if _label_inches(label) > inches[at]:
            continue
        axes.text(
            (int(from_ns[at]) + int(to_ns[at])) / 2 / scale_ns,
            row_of[int(spans["lane"][at])],
            label,
            ha="center",
            va="center",
            fontsize=_LABEL_POINTS,
            color="white" if kind in (DENSE, DEMAND) else INK,
            clip_on=True,
        )


def _label_inches(label: str) -> float:
    """Returns about how wide a label is, with a little room on either side."""
    return (0.62 * len(label) + 0.6) * _LABEL_POINTS / 72


def _time_unit(span_ns: int) -> tuple[int, str]:
    return next((scale_ns, name) for least_ns, scale_ns, name in _TIME_UNITS if span_ns >= least_ns)
