"""A profiler's trace as a Timeline: what PyTorch's profiler (Kineto) recorded, or what `export_timeline` wrote.

Each stream of a GPU becomes a lane for each thing that is busy by itself: its kernels, its copies to the GPU, and those
from it. A host thread's lane holds its outermost operators and CUDA calls as one span each, less the time it waits in a
call that synchronizes. Work was issued when the call with its correlation id returned; one that has none, as it starts.
Times are rebased to the earliest, except in files that `export_timeline` wrote: those come back span for span. What was
odd in the file is read as `trace_events` says, and told in `reading`.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..resources.timeline import COLLECTIVE, COPY, KERNEL, KINDS, LAUNCH, Timeline
from .export import About, export_timeline
from .trace_events import CALLS, GPU_WORK, HOST_WORK, Reading, Slice, TraceEvents
from .trace_events import TraceFileError as TraceFileError

Array = npt.NDArray[Any]

#: How a picture's file may end.
PICTURES = (".png", ".pdf", ".svg")
#: Calls in which the host waits for the GPU.
_WAITS = re.compile(r"(cuda|cu|hip)\w*Synchronize")
#: What a copy's name says of its direction, and the role of the lane that it is busy on; others run as kernels do.
_DIRECTIONS = {"HtoD": "h2d", "DtoH": "d2h", "PtoP": "peer"}
#: What the lane of a role is called beside its stream.
_COPIES = {"h2d": ", copies to the GPU", "d2h": ", copies to the host", "peer": ", copies between GPUs"}
#: Lanes that a timeline can tell apart.
_MOST_LANES = 2**16


@dataclass(frozen=True)
class Imported:
    """A profiled timeline and what its spans cannot hold: of span i the name, `names[name_of[i]]`, and the bytes moved.

    `name_of` and `span_bytes`, 0 where none are known, are (spans,). Only files of ours know of experts and layers.
    `reading` says what of the file was repaired and what left out.
    """

    timeline: Timeline
    names: Sequence[str]
    name_of: Array
    span_bytes: Array
    experts_per_layer: int = 1
    layers: int | None = None
    reading: Reading = field(default_factory=Reading)


def load_timeline(path: str | Path) -> Imported:
    """Read a trace (.json, .json.gz) as far as it can be read; `reading` of the result says how far that was.

    Of a folder that `prestage run --out` wrote, it is its timeline.
    Raises TraceFileError if it is none, and OSError if it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "timeline.json.gz"
    events = TraceEvents(path)
    other = events.beside.get("otherData")
    declared = other if isinstance(other, dict) and "lanes" in other else None
    work = events.slices if declared is not None else events.timed()
    if not work:
        raise TraceFileError(
            f"{path}: none of its {events.reading.events:,} events is a kernel, a copy, a CUDA call or an operator "
            f"(categories {', '.join((*GPU_WORK, *HOST_WORK))}) that can be read{_why(events.reading)}: is it a "
            "profiler's trace?"
        )
    returned_ns = {
        event.args["correlation"]: event.end_ns
        for event in work
        if event.category in CALLS and event.args.get("correlation") is not None
    }
    builder = _Builder(path, events.reading, 0 if declared is not None else min(event.start_ns for event in work))
    if declared is not None:
        return _declared(builder, declared, work, returned_ns)
    _add_streams(builder, [event for event in work if event.category in GPU_WORK], returned_ns)
    _add_threads(builder, [event for event in work if event.category in HOST_WORK], events.thread_names)
    return builder.imported()


def _why(reading: Reading) -> str:
    """Return, in words, why events were left out; nothing if none were."""
    reasons = [f"{told['events']:,} {reason}" for reason, told in list(reading.left_out.plain().items())[:3]]
    reasons += [reading.breaks_off] if reading.breaks_off else []
    return f" ({'; '.join(reasons)})" if reasons else ""


def write_imported(imported: Imported, path: Path, *, title: str | None = None) -> None:
    """Write a profiled timeline in our conventions (.json, .json.gz), which keeps its names, or draw it (.png, …).

    Raises ValueError for another ending, OSError if the file cannot be written.
    """
    if not path.name.endswith((".json", ".json.gz", *PICTURES)):
        raise InputError(f"{path}: must end in .json.gz or .json (a timeline), or {', '.join(PICTURES)} (a picture)")
    if path.suffix in PICTURES:
        from .pictures import save
        from .plots import plot_timeline

        save(plot_timeline(imported.timeline, experts_per_layer=imported.experts_per_layer, title=title), path)
        return
    about = About(
        experts_per_layer=imported.experts_per_layer,
        layers=imported.layers,
        span_bytes=imported.span_bytes,
        span_names=(imported.name_of, imported.names),
        metadata={} if imported.reading.whole else {"reading": imported.reading.plain()},
    )
    export_timeline(imported.timeline, path, about, limit=None)


class _Builder:
    """Lanes by what they stand for, names by number, and the spans that are recorded."""

    def __init__(self, path: Path, reading: Reading, zero_ns: int) -> None:
        self.path, self.reading, self._zero_ns = path, reading, zero_ns
        self.timeline = Timeline()
        self._names: dict[str, int] = {}
        self._name_of: list[int] = []
        self._bytes: list[int] = []

    def lane(self, device: str, role: str, title: str) -> int | None:
        """Returns the number of a new lane; None if there are too many."""
        if len(self.timeline.lanes) >= _MOST_LANES:
            return None
        return self.timeline.add_lane(device, role, title)

    def add(
        self,
        event: Slice,
        span: tuple[int, int, int],
        lane: int | None,
        kind: int,
        about: tuple[int, int, int] = (-1, -1, -1),
    ) -> None:
        """Record a span, (start_ns, end_ns, issued_ns), of an event; `about` is its expert, visit and copy."""
        if lane is None:
            what = f"beyond {_MOST_LANES:,} lanes: so many overlap, or are of threads of their own"
            self.reading.left_out.add(what, f"traceEvents[{event.number}] {event.name!r}")
            return
        start_ns, end_ns, issued_ns = (at_ns - self._zero_ns for at_ns in span)
        self.timeline.record(start_ns, end_ns, issued_ns, *about, lane, kind)
        self._name_of.append(self._names.setdefault(event.name, len(self._names)))
        self._bytes.append(self.number(event, "bytes", 0, 2**63))

    def number(self, event: Slice, key: str, least: int, below: int) -> int:
        """Returns a whole number among an event's args; `least` if it has none."""
        value = event.args.get(key)
        if value is None:
            return least
        if not least <= value < below:
            what = f"args {key!r} out of range, read as none"
            self.reading.repaired.add(what, f"traceEvents[{event.number}] {event.name!r}")
            return least
        return int(value)

    def imported(self, experts_per_layer: int = 1, layers: int | None = None) -> Imported:
        name_of, span_bytes = (np.array(column, dtype=np.int64) for column in (self._name_of, self._bytes))
        names = tuple(self._names)
        return Imported(self.timeline, names, name_of, span_bytes, experts_per_layer, layers, self.reading)


def _issued_ns(event: Slice, returned_ns: dict[int, int]) -> int:
    """Returns when the call that launched some work had returned; when the work began, if no such call was seen."""
    correlation = event.args.get("correlation")
    return event.start_ns if correlation is None else returned_ns.get(correlation, event.start_ns)


# Files that export_timeline wrote.


def _declared(builder: _Builder, other: dict[str, Any], work: Sequence[Slice], returned_ns: dict[int, int]) -> Imported:
    """Returns the timeline whose lanes, with their tracks, the file itself declares."""
    per_layer, layers = other.get("experts_per_layer"), other.get("layers")
    try:
        lanes = {(lane["pid"], lane["tid"]): _declared_lane(builder, lane) for lane in other["lanes"]}
        if type(per_layer) is not int or per_layer < 1 or not (layers is None or (type(layers) is int and layers > 0)):
            raise ValueError(f"experts_per_layer = {per_layer!r}, layers = {layers!r}")
    except (TypeError, KeyError, ValueError) as error:
        said = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        raise TraceFileError(
            f"{builder.path}: otherData: {said}{error}: lanes must have device, role, title, pid and "
            "tid, and experts_per_layer and layers must be numbers"
        ) from None
    for event in work:
        kind, lane = event.args.get("kind"), lanes.get((event.pid, event.tid))
        if kind in KINDS and lane is not None:
            expert, visit, copy = (builder.number(event, key, -1, 2**31) for key in ("expert_id", "visit", "copy"))
            span = (event.start_ns, event.end_ns, _issued_ns(event, returned_ns))
            builder.add(event, span, lane, KINDS.index(kind), (expert, visit, copy))
        elif event.category not in CALLS:  # a call is told by what it launched
            what = "on no lane that the file declares" if kind in KINDS else "of no kind that a run has"
            builder.reading.left_out.add(what, f"traceEvents[{event.number}] {event.name!r}")
    return builder.imported(per_layer, layers)


def _declared_lane(builder: _Builder, lane: dict[str, Any]) -> int | None:
    device, role, title = (lane[name] for name in ("device", "role", "title"))
    if not isinstance(device, str) or not isinstance(title, str):
        raise TypeError(f"device = {device!r}, title = {title!r}")
    return builder.lane(device, role, title)


# A profiler's own.


class _Stream:
    """The lanes of one stream: a span takes the first that is free when it begins, or a new one."""

    def __init__(self) -> None:
        self._busy: list[tuple[int, int]] = []
        self._free: list[int] = []
        self._lanes: list[int | None] = []

    def lane(self, start_ns: int, end_ns: int, new: Callable[[], int | None]) -> int | None:
        """Returns the lane of a span, given in order of start; `new` makes one."""
        while self._busy and self._busy[0][0] <= start_ns:
            heapq.heappush(self._free, heapq.heappop(self._busy)[1])
        if not self._free:
            self._free.append(len(self._lanes))
            self._lanes.append(new())
        branch = heapq.heappop(self._free)
        heapq.heappush(self._busy, (end_ns, branch))
        return self._lanes[branch]


def _add_streams(builder: _Builder, work: Sequence[Slice], returned_ns: dict[int, int]) -> None:
    """Add each GPU's work; a kernel that begins before the last one of its stream has ended takes a lane beside it.

    Kernels do so in branches of a graph, and where one is launched ahead of the end of what it depends on.
    """
    streams: dict[tuple[str, str, str], _Stream] = {}
    for event in sorted(work, key=lambda event: (event.start_ns, event.end_ns)):
        role, kind = _role_and_kind(event)
        stream = event.args.get("stream", event.tid)
        key = (f"gpu{event.args.get('device', event.pid)}", role, f"stream {stream}{_COPIES.get(role, '')}")
        lanes = streams.setdefault(key, _Stream())
        lane = lanes.lane(event.start_ns, event.end_ns, partial(builder.lane, *key))
        builder.add(event, (event.start_ns, event.end_ns, _issued_ns(event, returned_ns)), lane, kind)


def _role_and_kind(event: Slice) -> tuple[str, int]:
    if event.category == "kernel":
        return "compute", COLLECTIVE if event.name.lower().startswith("nccl") else KERNEL
    return next((role for word, role in _DIRECTIONS.items() if word in event.name), "compute"), COPY


def _add_threads(builder: _Builder, work: Sequence[Slice], titles: dict[tuple[Any, Any], str]) -> None:
    """Add each thread's outermost slices, less what it waits in calls within them."""
    threads: dict[tuple[Any, Any], list[Slice]] = {}
    for event in work:
        threads.setdefault((event.pid, event.tid), []).append(event)
    for thread, events in threads.items():
        lane = builder.lane("host", "host", titles.get(thread) or f"thread {thread[1]}")
        free_ns = -(2**62)
        outermost: list[Slice] = []
        waits: list[Slice] = []
        for event in sorted(events, key=lambda event: (event.start_ns, -event.end_ns)):
            if event.start_ns >= free_ns or event.end_ns > free_ns:  # what lasts on, on it goes from there
                outermost.append(event._replace(start_ns=max(event.start_ns, free_ns)))
                free_ns = event.end_ns
            if _WAITS.fullmatch(event.name):
                waits.append(event)
        for event, start_ns, end_ns in _without(outermost, waits):
            builder.add(event, (start_ns, end_ns, start_ns), lane, LAUNCH)


def _without(slices: Sequence[Slice], waits: Sequence[Slice]) -> Iterator[tuple[Slice, int, int]]:
    """Yields (slice, start_ns, end_ns) of the pieces of slices, in order, that lie outside the waits, in order."""
    at = 0
    for event in slices:
        start_ns = event.start_ns
        while at < len(waits) and waits[at].start_ns < event.end_ns:
            if waits[at].start_ns > start_ns:
                yield event, start_ns, waits[at].start_ns
            start_ns = max(start_ns, waits[at].end_ns)
            at += 1
        if event.end_ns > start_ns:
            yield event, start_ns, event.end_ns
