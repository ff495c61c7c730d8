"""The timeline as a Chrome trace-event file: open it in ui.perfetto.dev, or in whatever else reads that format.

A device is a process, a lane a thread of it, a span a slice, and an arrow runs from a copy to the kernel that waited
for its bytes. Events are made and written in chunks, so the file may be far larger than memory; the same timeline
gives the same bytes. Format: "Trace Event Format", the Chromium project's document of it.
"""

from __future__ import annotations

import gzip
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import orjson

from ...resources.timeline import DEMAND, EXPERT, HEAD, KINDS, PREFETCH, Timeline

Array = npt.NDArray[Any]

#: Spans written unless more are asked for: what Perfetto opens without a wait.
SPAN_LIMIT = 200_000

#: What a slice of each kind is called; {at} becomes " L3", or " L3/E17" where one expert is meant.
NAMES = {
    "dense": "dense{at}",
    "expert": "expert{at}",
    "head": "head",
    "demand": "copy{at} (demand)",
    "prefetch": "copy{at} (prefetch)",
    "readback": "choice to host",
    "predict": "predict{at}",
    "launch": "launch",
    "activation": "activations{at}",
    "dispatch": "all-to-all{at} (dispatch)",
    "combine": "all-to-all{at} (combine)",
    "peer": "copy{at} (from a peer)",
    "cpu_expert": "expert{at} (CPU)",
    "decompress": "decompress{at}",
    "read": "read{at} (NVMe)",
}
#: The category of each kind, by which viewers filter and color.
CATEGORIES = {
    "dense": "compute",
    "expert": "compute",
    "head": "compute",
    "demand": "copy,demand",
    "prefetch": "copy,prefetch",
    "readback": "copy,readback",
    "predict": "predictor",
    "launch": "host",
    "activation": "copy,activation",
    "dispatch": "copy,all-to-all",
    "combine": "copy,all-to-all",
    "peer": "copy,peer",
    "cpu_expert": "compute,cpu",
    "decompress": "compute,decompress",
    "read": "copy,read",
}
#: Roles in the order in which tracks are shown, from the top: the way that a decision takes.
TRACK_ORDER = ("host", "cpu", "nvme", "predictor", "h2d", "d2h", "peer", "compute")

_NAMES = [NAMES[kind] for kind in KINDS]
_CATEGORIES = [CATEGORIES[kind] for kind in KINDS]
_CHUNK = 1024
# Thread numbers start here: 0 is the idle task to Perfetto, and a thread numbered as its process is its main thread.
_FIRST_THREAD = 1001


@dataclass(frozen=True)
class ExportSummary:
    """How much of a timeline a file holds: spans written, spans there are, and arrows from copies to kernels."""

    spans_written: int
    spans_total: int
    arrows: int

    @property
    def truncated(self) -> bool:
        """Whether spans were left out."""
        return self.spans_written < self.spans_total


def export_chrome(
    timeline: Timeline,
    path: str | Path,
    *,
    experts_per_layer: int,
    metadata: Mapping[str, Any],
    layers: int | None = None,
    limit: int | None = SPAN_LIMIT,
    memory: tuple[Array, Array] | None = None,
) -> ExportSummary:
    """Write a timeline to `path`, `.json.gz` or plain `.json`, whole or not at all; say how much of it that was.

    Beyond `limit` spans, in order of start, it is cut (None: never). `layers` turns the visit of a dense part into its
    layer; without it, that is read off the spans (see `layers_of`). `metadata` is plain data for "otherData".
    `memory` is (time_ns, assigned_bytes), both (samples,), in order of time: it becomes a counter track in MiB.
    Raises ValueError for another ending, a limit below 0, no experts, and a span that starts before 0 or ends before
    it starts.
    """
    path = Path(path)
    if not path.name.endswith((".json", ".json.gz")):
        raise ValueError(f"{path}: a timeline file must end in .json.gz or .json")
    if limit is not None and limit < 0:
        raise ValueError(f"limit = {limit}: give the number of spans to write, or None for all")
    if experts_per_layer < 1:
        raise ValueError(f"experts_per_layer = {experts_per_layer}: a layer has 1 or more")
    spans = timeline.spans()
    _check(spans)
    total = len(spans)
    if layers is None:
        layers = layers_of(spans, experts_per_layer)
    order = np.lexsort((spans["end_ns"], spans["start_ns"]))[:limit]
    spans = spans[order]
    arrows = _arrows(spans)
    until_ns = int(spans["end_ns"].max(initial=0)) if len(spans) < total else None
    summary = ExportSummary(len(spans), total, len(arrows[0]))
    other = {**metadata, "spans_written": summary.spans_written, "spans_total": summary.spans_total}

    def events() -> Iterator[dict[str, Any]]:
        tracks = _Tracks(timeline)
        yield from tracks.names()
        yield from _slices(spans, arrows, tracks, experts_per_layer, layers)
        if memory is not None:
            yield from _counters(*memory, tracks.memory_pid, until_ns)

    with replacing(path) as raw, packing(raw, path) as stream:
        _write(stream, other, events())
    return summary


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` and move it there at the end; after an error, remove it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def packing(stream: BinaryIO, path: Path) -> Iterator[BinaryIO]:
    """Yield what writes to `stream`, compressed if `path` ends in .gz; the same content gives the same bytes."""
    if path.suffix != ".gz":
        yield stream
        return
    # No name and no time in the header: they would differ where the content does not.
    with gzip.GzipFile("", "wb", 6, stream, mtime=0) as packed:
        yield cast(BinaryIO, packed)


def track_order(timeline: Timeline) -> list[int]:
    """Return all lane numbers in the order in which they are shown: the host, then each device by TRACK_ORDER."""
    devices = list(dict.fromkeys(lane.device for lane in timeline.lanes))

    def place(number: int) -> tuple[bool, int, int, int]:
        lane = timeline.lanes[number]
        return lane.device != "host", devices.index(lane.device), TRACK_ORDER.index(lane.role), number

    return sorted(range(len(timeline.lanes)), key=place)


def layers_of(spans: Array, experts_per_layer: int) -> int | None:
    """Return how many layers a run had, or None if its spans (dtype SPAN) do not say.

    The first head follows the first visit of the last layer; without a head, the last layer with an expert counts.
    """
    heads = spans["visit"][spans["kind"] == HEAD]
    if len(heads) and heads.min() >= 0:
        return int(heads.min()) + 1
    experts = int(spans["expert"].max(initial=-1))
    return experts // experts_per_layer + 1 if experts >= 0 else None


def layer_of_each(spans: Array, experts_per_layer: int, layers: int | None) -> Array:
    """Return the layer of each span (spans,): a prefetch's is that of its expert, all others' that of their visit.

    Where layers share experts, a prefetch names none. -1 if neither tells.
    """
    of_expert = np.where(spans["expert"] >= 0, spans["expert"] // experts_per_layer, -1)
    if not layers:
        return of_expert
    of_visit = np.where(spans["visit"] >= 0, spans["visit"] % layers, -1)
    layer: Array = np.where((spans["kind"] == PREFETCH) | (of_visit < 0), of_expert, of_visit)
    return layer


def span_name(kind: int, layer: int, index: int) -> str:
    """Return what a span is called, such as "expert L3/E17"; `layer` and `index` (within the layer) may be -1."""
    if layer < 0:
        at = ""
    elif index < 0:
        at = f" L{layer}" if kind != EXPERT else f"s L{layer}"  # one kernel for all experts of the layer
    else:
        at = f" L{layer}/E{index}"
    return _NAMES[kind].format(at=at)


def _check(spans: Array) -> None:
    """Refuse times that no viewer can show."""
    wrong = np.flatnonzero((spans["start_ns"] < 0) | (spans["end_ns"] < spans["start_ns"]))
    if len(wrong):
        span = spans[wrong[0]]
        raise ValueError(
            f"span {wrong[0]} ({KINDS[span['kind']]}) is from {span['start_ns']} to {span['end_ns']} ns: "
            "a span starts at 0 or later and ends no earlier than that"
        )


def _arrows(spans: Array) -> tuple[Array, Array]:
    """Return (copies, kernels), both (arrows,): positions of each copy's last span and of a kernel that waited for it.

    A kernel waited for its copy if it started at the very instant at which the last of the copy's bytes came.
    """
    copies = np.flatnonzero(np.isin(spans["kind"], (DEMAND, PREFETCH)) & (spans["copy"] >= 0))
    copies = copies[np.lexsort((spans["end_ns"][copies], spans["copy"][copies]))]
    numbers = spans["copy"][copies]
    is_last = np.append(numbers[1:] != numbers[:-1], True) if len(copies) else np.zeros(0, dtype=bool)
    copies, numbers = copies[is_last], numbers[is_last]
    kernels = np.flatnonzero((spans["kind"] == EXPERT) & (spans["copy"] >= 0))
    if not len(copies):
        return copies, copies
    found = np.minimum(np.searchsorted(numbers, spans["copy"][kernels]), len(numbers) - 1)
    sources = copies[found]
    waited = numbers[found] == spans["copy"][kernels]
    waited &= spans["end_ns"][sources] == spans["start_ns"][kernels]
    return sources[waited], kernels[waited]


class _Tracks:
    """The process and thread number of every lane, in the order in which they are shown."""

    def __init__(self, timeline: Timeline) -> None:
        self._lanes = timeline.lanes
        self._order = track_order(timeline)
        devices = dict.fromkeys(timeline.lanes[number].device for number in self._order)
        self._processes = {device: pid for pid, device in enumerate(devices, 1)}
        self.pid = [self._processes[lane.device] for lane in timeline.lanes]
        # Some viewers order threads by number, whatever the sort index says.
        place = {number: place for place, number in enumerate(self._order)}
        self.tid = [_FIRST_THREAD + place[number] for number in range(len(timeline.lanes))]
        self.memory_pid = next((self.pid[number] for number in timeline.lanes_with("compute")), 1)

    def names(self) -> Iterator[dict[str, Any]]:
        """Yield what tells a viewer the names of processes and threads, and their order."""
        for device, pid in self._processes.items():
            yield _named("process_name", pid, 0, name=device)
            yield _named("process_sort_index", pid, 0, sort_index=pid)
        for place, number in enumerate(self._order):
            pid, tid = self.pid[number], self.tid[number]
            yield _named("thread_name", pid, tid, name=self._lanes[number].title)
            yield _named("thread_sort_index", pid, tid, sort_index=place)


def _named(what: str, pid: int, tid: int, **args: str | int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args}


def _slices(
    spans: Array, arrows: tuple[Array, Array], tracks: _Tracks, experts_per_layer: int, layers: int | None
) -> Iterator[dict[str, Any]]:
    """Yield a slice for each span, and behind it the ends of the arrows that leave and reach it.

    Viewers sort by time, keep the order of equal times and tie an arrow's end to the slice that they opened last:
    hence the order here.
    """
    sources, kernels = arrows
    by_source = np.argsort(sources, kind="stable")
    for first in range(0, len(spans), _CHUNK):
        part = spans[first : first + _CHUNK]
        leave, reach = defaultdict(list), {}
        low, high = np.searchsorted(sources, (first, first + _CHUNK), sorter=by_source)
        for arrow in by_source[low:high].tolist():
            leave[int(sources[arrow])].append(arrow)
        low, high = np.searchsorted(kernels, (first, first + _CHUNK))
        for arrow in range(low, high):
            reach[int(kernels[arrow])] = arrow
        fields = [*(part[name].tolist() for name in part.dtype.names or ())]
        layer_of = layer_of_each(part, experts_per_layer, layers).tolist()
        rows = zip(*fields, layer_of, strict=True)
        for at, (start_ns, end_ns, issued_ns, expert, visit, copy, lane, kind, layer) in enumerate(rows, first):
            index = expert % experts_per_layer if expert >= 0 else -1
            about = {"visit": visit, "layer": layer, "expert": index, "copy": copy}
            track = {"pid": tracks.pid[lane], "tid": tracks.tid[lane]}
            yield {
                "ph": "X",
                "name": span_name(kind, layer, index),
                "cat": _CATEGORIES[kind],
                **track,
                "ts": _us(start_ns),
                "dur": _us(end_ns - start_ns),
                "args": {
                    "kind": KINDS[kind],
                    **{key: value for key, value in about.items() if value >= 0},
                    "issued_us": _us(issued_ns),
                },
            }
            for arrow in leave.get(at, ()):
                # One ns before the end: at the end itself the slice is over.
                yield _arrow_end("s", arrow, track, max(start_ns, end_ns - 1))
            if at in reach:
                yield {**_arrow_end("f", reach[at], track, start_ns), "bp": "e"}


def _arrow_end(phase: str, arrow: int, track: Mapping[str, int], at_ns: int) -> dict[str, Any]:
    return {"ph": phase, "name": "bytes there", "cat": "wait", "id": arrow + 1, **track, "ts": _us(at_ns)}


def _counters(time_ns: Array, assigned_bytes: Array, pid: int, until_ns: int | None) -> Iterator[dict[str, Any]]:
    """Yield the expert memory whenever it changes, no later than `until_ns`."""
    last = None
    for first in range(0, len(time_ns), _CHUNK):
        part = slice(first, first + _CHUNK)
        for at_ns, size_bytes in zip(time_ns[part].tolist(), assigned_bytes[part].tolist(), strict=True):
            if until_ns is not None and at_ns > until_ns:
                return
            if size_bytes != last:
                last = size_bytes
                mib = round(size_bytes / 2**20, 3)
                yield {
                    "ph": "C",
                    "name": "expert memory (MiB)",
                    "pid": pid,
                    "tid": 0,
                    "ts": _us(at_ns),
                    "args": {"assigned": mib},
                }


def _us(ns: int) -> orjson.Fragment:
    """Return microseconds with three decimals: the format's unit, exact to the nanosecond at any size."""
    sign = b"-" if ns < 0 else b""
    return orjson.Fragment(b"%b%d.%03d" % (sign, *divmod(abs(ns), 1000)))


def _write(stream: BinaryIO, other: Mapping[str, Any], events: Iterator[dict[str, Any]]) -> None:
    """Write the whole object, an event a line, a chunk at a time."""
    stream.write(b'{"displayTimeUnit":"ns","otherData":' + orjson.dumps(other) + b',"traceEvents":[')
    between = b"\n"
    while chunk := _take(events):
        stream.write(between + b",\n".join(map(orjson.dumps, chunk)))
        between = b",\n"
    stream.write(b"\n]}\n")


def _take(events: Iterator[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    return list(islice(events, _CHUNK))
