"""The figures of a run by name: what each one shows, as numbers.

`figures_static` draws them with matplotlib for print, `figures_html` with Bokeh for a page.
A figure's data is one of a few forms (`figure_forms`); whoever draws knows these, not the figures: so both draw the
same numbers. To add a figure, write its data function and name it in FIGURES.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.measure.comparison import PARTS, waterfall
from ..engine.measure.recording import FATES, LATE, MISS, OUTCOMES
from ..engine.measure.time_split import busy_before
from ..resources.timeline import KINDS, Timeline
from ..words import unknown_name
from .figure_forms import Bars, Curve, Curves, Data, Fall, FigureError, Grid, Memory, Part, RowBars, Rows, Spans
from .palette import COLORS, FATE_COLORS, IDLE_COLOR, OUTCOME_COLORS, PART_COLORS, REQUEST_COLORS
from .pictures import at_changes, bytes_unit, few_digits, row_names, used_lanes
from .plots import default_window
from .saved import Run

Array = npt.NDArray[Any]

#: Points of a curve: more cannot be told apart.
_POINTS = 500
#: Spans of one timeline that a page holds unless more are asked for: 27 bytes each.
SPAN_LIMIT = 250_000
#: The least share of the longest row that a part of a bar must have to carry its own share in numbers.
LABELED = 0.06
#: Samples of memory over time.
_SAMPLES = 4000
#: Requests of one picture, each on a row.
_REQUEST_ROWS = 150
#: Intervals over which busy time, and what stood by, are averaged.
_INTERVALS = 200
#: What one curve stands for that is no kind of its own: everything.
_ALL_COLOR = "#7a7a7a"


def time_parts(run: Run) -> Bars:
    """Returns the parts of the makespan, a bar for each GPU."""
    gpus = run.data["gpus"]
    parts = [
        Part(label, color, np.array([gpu["time"].get(f"{part}_ms", 0.0) for gpu in gpus]))
        for part in PARTS
        for color, label in (PART_COLORS[part],)
    ]
    return Bars([gpu["device"] for gpu in gpus], _seen(parts), "time on the compute stream (ms)", "ms")


def lane_time(run: Run) -> Bars:
    """Returns how long each lane was busy with what, and idle."""
    spans, rows = run.timeline.spans(), used_lanes(run.timeline)
    took_ms = np.zeros((len(run.timeline.lanes), len(KINDS)))
    np.add.at(took_ms, (spans["lane"], spans["kind"]), (spans["end_ns"] - spans["start_ns"]) / 1e6)
    parts = [Part(label, color, took_ms[rows, KINDS.index(kind)]) for kind, (color, label) in COLORS.items()]
    whole_ms = int(spans["end_ns"].max(initial=0)) / 1e6
    parts.append(Part("idle", IDLE_COLOR, np.maximum(0.0, whole_ms - took_ms[rows].sum(axis=1)), alpha=0.25))
    return Bars(row_names(run.timeline, rows), _seen(parts), "time of the lane (ms)", "ms")


def paired(bars: Sequence[Bars], names: Sequence[str]) -> Bars:
    """Returns the bars of several runs on one axis: of each row those of every run, in the order of the runs.

    A row that a run lacks, and a part that it has nothing of, are 0 there.
    """
    rows = list(dict.fromkeys(row for each in bars for row in each.rows))
    first = {part.label: part for each in bars for part in each.parts}
    values = {label: np.zeros((len(rows), len(bars))) for label in first}
    for number, each in enumerate(bars):
        places = [rows.index(row) for row in each.rows]
        for part in each.parts:
            values[part.label][places, number] = part.values
    idle_last = sorted(first.items(), key=lambda entry: entry[1].alpha < 1)
    parts = [replace(part, values=values[label].ravel()) for label, part in idle_last]
    return replace(bars[0], rows=[f"{row}: {name}" for row in rows for name in names], parts=parts)


def outcomes_by_layer(run: Run) -> Grid:
    """Returns the share of each layer's accesses that came out each way."""
    layers = run.data["by_layer"]
    counts = np.array([[layer[outcome] for layer in layers] for outcome in OUTCOMES], dtype=np.int64)
    total = counts.sum(axis=0)
    shares = np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)
    names = [OUTCOME_COLORS[outcome][1] for outcome in OUTCOMES]
    return Grid(names, [str(layer["layer"]) for layer in layers], shares, counts, "layer", "share of its accesses")


def prefetched_bytes(run: Run) -> Bars:
    """Returns the bytes that prefetches moved, a column for each layer, by what became of them."""
    layers, copies = run.data["model"]["layers"], run.copies
    moved = [
        np.bincount(copies["layer"][chosen], weights=copies["bytes"][chosen], minlength=layers)
        for chosen in (copies["fate"] == fate for fate in range(len(FATES)))
    ]
    scale, unit = bytes_unit(int(np.sum(moved, axis=0).max(initial=0)))
    parts = [
        Part(label, color, values / scale)
        for values, (color, label) in zip(moved, (FATE_COLORS[fate] for fate in FATES), strict=True)
    ]
    names = [str(layer) for layer in range(layers)]
    return Bars(names, _seen(parts), f"prefetched ({unit})", unit, across=False)


def memory_over_time(run: Run) -> Memory:
    """Returns the expert memory given out on each GPU from visit to visit, up to the end, at its changes alone."""
    gpus = {}
    for number, name in enumerate(run.gpu_names):
        here = run.memory[run.memory["gpu"] == number]
        if not len(here):
            continue
        ends = here[-1:].copy()
        ends["time_ns"] = run.makespan_ns
        here = np.concatenate([here, ends])
        gpus[name] = _thinned(*at_changes(here["time_ns"], here["assigned_bytes"], here["budget_bytes"]))
    return Memory(gpus)


def access_latency(run: Run) -> Curves:
    """Returns how the waits of accesses are spread: the share of each outcome's that waited no longer than x."""
    waits_ms, outcome = run.accesses["wait_ns"] / 1e6, run.accesses["outcome"]
    curves = [
        Curve(label, color, *_cumulative(waits_ms[outcome == number]))
        for number in (LATE, MISS)
        for color, label in (OUTCOME_COLORS[OUTCOMES[number]],)
    ]
    curves.append(Curve("all accesses", _ALL_COLOR, *_cumulative(waits_ms)))
    curves = [curve for curve in curves if len(curve.x)]
    axis = "wait for the bytes (ms); hits wait 0"
    return Curves(curves, axis, "share that waits no longer", "ms", {})


def token_latency(run: Run) -> Curves:
    """Returns how gaps between a sequence's tokens are spread, with their percentiles, and what the steps took.

    A warmup's tokens are left out, as they are of the percentiles.
    """
    tokens = run.tokens[run.data["warmup"]["decode_tokens"] :]
    spread = {
        ("inter-token latency", "dense"): tokens["gap_ns"][tokens["gap_ns"] >= 0],
        ("decode step", "expert"): tokens["took_ns"],
    }
    curves = [Curve(label, COLORS[kind][0], *_cumulative(ns / 1e6)) for (label, kind), ns in spread.items() if len(ns)]
    latency = run.data["inter_token_latency_ms"]
    marks = {name: latency[name] for name in ("p50", "p95", "p99") if latency[name] is not None}
    return Curves(curves, "time of a decode token (ms)", "share that takes no longer", "ms", marks)


def busy_over_time(run: Run) -> Curves:
    """Returns the share of each interval of the run in which compute streams, and host-to-device copies, were busy."""
    edges_ns = np.linspace(0, run.makespan_ns, _INTERVALS + 1)
    curves = []
    for role, kind, label in (("compute", "dense", "compute stream busy"), ("h2d", "demand", "copy engine busy")):
        lanes = [lane for lane in used_lanes(run.timeline) if run.timeline.lanes[lane].role == role]
        busy = [np.diff(busy_before(_lane_spans(run.timeline, lane))(edges_ns)) for lane in lanes]
        if busy and run.makespan_ns:
            share = np.mean(busy, axis=0) / np.diff(edges_ns)
            curves.append(Curve(label, COLORS[kind][0], edges_ns / 1e6, np.append(share, share[-1])))
    return Curves(curves, "time since the start (ms)", "share of time busy", "ms", {})


def timeline(run: Run) -> Spans:
    """Returns the timeline, to be looked at from two ordinary steps near its middle."""
    model = run.data["model"]
    return Spans(run.timeline, model["layers"], model["experts"], *default_window(run.timeline))


def fall(first: Run, second: Run) -> Fall:
    """Returns where the time between two runs arises, part by part, but for those that are the same."""
    before, *parts, after = waterfall(first.data, second.data)
    changed = [part for part in parts if part.start_ns != part.end_ns]
    return Fall(first.name, second.name, [before, *changed, after])


def first_token(run: Run) -> Curves:
    """Returns how waits for the first token, and in the queue before it, are spread over requests under load."""
    return _request_waits(run, {"queueing": ("started_ns", "launch"), "first token": ("first_token_ns", "demand")})


def end_to_end(run: Run) -> Curves:
    """Returns how the times from arrival to last token are spread over requests under load."""
    return _request_waits(run, {"end to end": ("finished_ns", "dense")})


def _request_waits(run: Run, until: dict[str, tuple[str, str]]) -> Curves:
    """Returns how long after their arrival requests came to instants, with percentiles of the last of these.

    Those at the ends that the run's percentiles leave out are in the curves.
    """
    requests = _requests_of(run)
    waits_ms = {label: (requests[name] - requests["arrival_ns"]) / 1e6 for label, (name, _) in until.items()}
    curves = [Curve(label, COLORS[kind][0], *_cumulative(waits_ms[label])) for label, (_, kind) in until.items()]
    last = list(waits_ms.values())[-1]
    marks = {f"p{percent}": float(np.percentile(last, percent)) for percent in (50, 95, 99)}
    return Curves(curves, "time since arrival (ms)", "share that waits no longer", "ms", marks)


def requests_over_time(run: Run) -> Rows:
    """Returns what each request under load went through, in order of arrival; of many, those in the middle."""
    requests = _requests_of(run)
    requests = requests[np.argsort(requests["arrival_ns"], kind="stable")]
    first = max(0, (len(requests) - _REQUEST_ROWS) // 2)
    requests = requests[first : first + _REQUEST_ROWS]
    instants_ms = [requests[name] / 1e6 for name in ("arrival_ns", "started_ns", "first_token_ns", "finished_ns")]
    rows = np.arange(len(requests))
    parts = [
        RowBars(label, color, rows[to > at], at[to > at], to[to > at])
        for (color, label), at, to in zip(REQUEST_COLORS.values(), instants_ms[:-1], instants_ms[1:], strict=True)
    ]
    names = [f"request {number}" for number in requests["number"].tolist()]
    return Rows(names, [part for part in parts if len(part.row)])


def concurrency(run: Run) -> Curves:
    """Returns how many requests ran and waited, and KV blocks were in use, as shares of the most that there were.

    Each is averaged over intervals of the time from 0 to the last step's end; of replicas it is their sum.
    """
    steps = _steps_of(run)
    edges_ns = np.linspace(0, max(1, int(steps["end_ns"].max())), _INTERVALS + 1)
    curves = []
    for name, kind, label in (
        ("running", "dense", "running requests"),
        ("waiting", "launch", "waiting requests"),
        ("kv_blocks", "demand", "KV blocks"),
    ):
        mean = _means(steps["start_ns"], steps["end_ns"], steps[name], edges_ns)
        most = float(mean.max(initial=0.0))
        share = mean / most if most else mean
        curves.append(
            Curve(f"{label}, up to {few_digits(most)}", COLORS[kind][0], edges_ns / 1e6, np.append(share, share[-1]))
        )
    return Curves(curves, "time since the start (ms)", "share of the most", "ms", {})


def _means(start_ns: Array, end_ns: Array, values: Array, edges_ns: Array) -> Array:
    """Returns the mean of each interval (edges - 1,) of what is added up: `values` (steps,), from start to end each."""
    time_ns = np.concatenate([start_ns, end_ns])
    order = np.argsort(time_ns, kind="stable")
    time_ns, level = time_ns[order], np.cumsum(np.concatenate([values, -values])[order])
    area = np.concatenate([[0.0], np.cumsum(level[:-1] * np.diff(time_ns))])
    means: Array = np.diff(np.interp(edges_ns, time_ns, area)) / np.diff(edges_ns)
    return means


def _steps_of(run: Run) -> Array:
    _requests_of(run)
    if run.steps is None or not len(run.steps):
        raise FigureError(f"{run.name}: does not say what each step held: an earlier version saved it; run it again")
    return run.steps


def _requests_of(run: Run) -> Array:
    if run.requests is None:
        raise FigureError(f"{run.name}: has no requests under load: give a run of a scenario with [requests]")
    return run.requests


@dataclass(frozen=True)
class Figure:
    """A figure by name: its title, how to read it, its data function and how many runs that takes."""

    title: str
    reading: str
    data: Callable[..., Data]
    runs: int = 1
    #: Whether bars of two runs are drawn on one axis too, each row of the one above that row of the other.
    pairs: bool = False


#: The figures of a run, by name, in the order of a page.
FIGURES = {
    "time": Figure(
        "Where the time went",
        "The makespan on each GPU. An idle gap before a kernel belongs to the last thing that the kernel waited for.",
        time_parts,
        pairs=True,
    ),
    "lanes": Figure("What each lane did", "Busy time by kind of work, and the rest of the run.", lane_time, pairs=True),
    "timeline": Figure(
        "Timeline",
        "What ran when on every lane: copies, kernels, and the host that ordered them. Dotted lines end steps.",
        timeline,
    ),
    "busy": Figure(
        "How busy over time", "Compute streams and copy engines, averaged over short intervals.", busy_over_time
    ),
    "outcomes": Figure(
        "Hit, late and miss by layer",
        "Of each layer's accesses: found in time, still on the way, or absent. Each row has a scale of its own.",
        outcomes_by_layer,
    ),
    "wasted": Figure(
        "What became of prefetched bytes",
        "Bytes that prefetches moved for each layer. What was evicted unused, or never used until the end, was wasted.",
        prefetched_bytes,
    ),
    "memory": Figure(
        "Expert memory over time",
        "How much of the room for experts was in use. The dashed line is all of it.",
        memory_over_time,
    ),
    "latency": Figure(
        "Access latency",
        "How long after the router's choice the bytes were there. Hits wait 0: the gray line starts at their rate.",
        access_latency,
    ),
    "tokens": Figure(
        "Time between tokens",
        "From one token of a sequence to its next, with the 50th, 95th and 99th percentile, and what the steps took: "
        "where the first is longer, a sequence waited for another one's prompt.",
        token_latency,
    ),
    "waterfall": Figure(
        "Where the difference arises",
        "From the makespan of the first run to that of the second: what makes it longer in orange, shorter in green.",
        fall,
        runs=2,
    ),
}

#: Those of a run of requests under load alone.
REQUEST_FIGURES = {
    "concurrency": Figure(
        "Requests and KV blocks over time",
        "Requests that run and that wait, and KV blocks in use, each as a share of its most, averaged over short "
        "intervals.",
        concurrency,
    ),
    "requests": Figure(
        "Requests over time",
        "Each request on a row: how long it waited, until its first token was there, and until it had all.",
        requests_over_time,
    ),
    "first-token": Figure(
        "Time to first token",
        "From a request's arrival to the first step with a part of it, and to its first token, with the percentiles of "
        "that. All requests, those at the ends too.",
        first_token,
    ),
    "end-to-end": Figure(
        "End to end",
        "From a request's arrival to its last token, with percentiles. All requests, those at the ends too.",
        end_to_end,
    ),
}
ALL_FIGURES = FIGURES | REQUEST_FIGURES


def figure_data(name: str, runs: Sequence[Run]) -> Data:
    """Returns the data of a figure by name. Raises FigureError for an unknown one, and the wrong number of runs."""
    if name not in ALL_FIGURES:
        raise FigureError(unknown_name("KIND", name, ALL_FIGURES))
    figure = ALL_FIGURES[name]
    if figure.pairs and len(runs) == 2:
        bars = [data for run in runs if isinstance(data := figure.data(run), Bars)]
        return paired(bars, [run.name for run in runs])
    if len(runs) != figure.runs:
        wanted = "two results" if figure.runs == 2 else "one result, or two" if figure.pairs else "one result"
        raise FigureError(f"{name} is drawn from {wanted}, not from {len(runs)}")
    return figure.data(*runs)


def _seen(parts: Sequence[Part]) -> list[Part]:
    """Returns the parts that have anything to show."""
    return [part for part in parts if part.values.any()]


def _thinned(time_ns: Array, sizes: Array, limits: Array) -> tuple[Array, Array, Array]:
    """Returns of each of many stretches of samples the one with the most bytes, and the last of all."""
    stretch = -(-len(time_ns) // _SAMPLES)
    firsts = np.arange(0, len(time_ns), stretch)
    kept = [first + int(sizes[first : first + stretch].argmax()) for first in firsts.tolist()]
    kept = [*kept[: -1 if kept[-1] == len(time_ns) - 1 else None], len(time_ns) - 1]
    return time_ns[kept], sizes[kept], limits[kept]


def _lane_spans(timeline: Timeline, lane: int) -> Array:
    """Returns the spans of a lane in order of start."""
    spans = timeline.spans()
    spans = spans[spans["lane"] == lane]
    ordered: Array = spans[np.argsort(spans["start_ns"], kind="stable")]
    return ordered


def _cumulative(values: Array) -> tuple[Array, Array]:
    """Returns the empirical distribution: values in order, and the share of all that are no greater, thinned evenly.

    It starts from a share of 0 at the least value, so that equal values are a line too.
    """
    ordered = np.sort(values)
    at = np.linspace(0, len(ordered) - 1, min(_POINTS, len(ordered))).astype(np.int64)
    kept = np.unique(ordered[at])
    shares = np.searchsorted(ordered, kept, side="right") / max(1, len(ordered))
    return np.append(kept[:1], kept), np.append(np.zeros(len(kept[:1])), shares)
