"""A profiler's trace as a Timeline: what PyTorch's profiler (Kineto) recorded, or what `export_timeline` wrote.

Each stream of a GPU becomes a lane for each thing that is busy by itself: its kernels, its copies to the GPU, and those
from it. A host thread's lane holds its outermost operators and CUDA calls as one span each, less the time it waits in a
call that synchronizes. Work was issued when the call with its correlation id returned; one that has none, as it starts.
Times are rebased to the earliest, except in files that `export_timeline` wrote: those come back span for span.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from ...bounded import read_json
from ...errors import InputError
from ...resources.timeline import COLLECTIVE, COPY, KERNEL, KINDS, LAUNCH, Timeline
from .export import About, export_timeline

Array = npt.NDArray[Any]

_GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_CALLS = ("cuda_runtime", "cuda_driver")
_HOST_WORK = ("cpu_op", *_CALLS)
#: How a picture's file may end.
PICTURES = (".png", ".pdf", ".svg")
#: Calls in which the host waits for the GPU.
_WAITS = re.compile(r"(cuda|cu|hip)\w*Synchronize")
#: What a copy's name says of its direction, and the role of the lane that it is busy on; others run as kernels do.
_DIRECTIONS = {"HtoD": "h2d", "DtoH": "d2h", "PtoP": "peer"}
#: Expert, visit and copy of what is not known to be any.
_NO_EXPERT = (-1, -1, -1)


class TraceFileError(InputError):
    """A file that is no profiler's trace; the message names the file, the event and what would be right."""


@dataclass(frozen=True)
class Imported:
    """A profiled timeline and what its spans cannot hold: of span i the name, `names[name_of[i]]`, and the bytes moved.

    `name_of` and `span_bytes`, 0 where none are known, are (spans,). Only files of ours know of experts and layers.
    """

    timeline: Timeline
    names: Sequence[str]
    name_of: Array
    span_bytes: Array
    experts_per_layer: int = 1
    layers: int | None = None


class _Slice(NamedTuple):
    """One event that took time; `number` is its place in the file."""

    start_ns: int
    end_ns: int
    number: int
    name: str
    category: str
    pid: int | str
    tid: int | str
    args: dict[str, Any]


def load_timeline(path: str | Path) -> Imported:
    """Read a trace (.json, .json.gz), all of it into memory.

    Raises TraceFileError if it is none, and OSError if it cannot be read.
    """
    path = Path(path)
    data = _read(path)
    events = data.get("traceEvents") if isinstance(data, dict) else data
    if not isinstance(events, list):
        raise TraceFileError(f'{path}: no list of events: a profiler\'s trace holds one as "traceEvents"')
    slices = list(_slices(path, events))
    work = [event for event in slices if event.category in (*_GPU_WORK, *_HOST_WORK)]
    if not work:
        raise TraceFileError(
            f"{path}: none of its {len(events):,} events is a kernel, a copy, a CUDA call or an operator (categories "
            f"{', '.join((*_GPU_WORK, *_HOST_WORK))}): is it a profiler's trace?"
        )
    returned_ns = {
        event.args["correlation"]: event.end_ns
        for event in work
        if event.category in _CALLS and isinstance(event.args.get("correlation"), int)
    }
    other = data.get("otherData") if isinstance(data, dict) else None
    if isinstance(other, dict) and "lanes" in other:
        return _declared(_Builder(path), other, work, returned_ns)
    builder = _Builder(path, min(event.start_ns for event in work))
    _add_streams(builder, [event for event in work if event.category in _GPU_WORK], returned_ns)
    _add_threads(builder, [event for event in work if event.category in _HOST_WORK], _thread_names(events))
    return builder.imported()


def write_imported(imported: Imported, path: Path, *, title: str | None = None) -> None:
    """Write a profiled timeline in our conventions (.json, .json.gz), which keeps its names, or draw it (.png, …).

    Raises ValueError for another ending, OSError if the file cannot be written.
    """
    if not path.name.endswith((".json", ".json.gz", *PICTURES)):
        raise InputError(f"{path}: must end in .json.gz or .json (a timeline), or {', '.join(PICTURES)} (a picture)")
    if path.suffix in PICTURES:
        from .plots import plot_timeline, save

        save(plot_timeline(imported.timeline, experts_per_layer=imported.experts_per_layer, title=title), path)
        return
    about = About(
        experts_per_layer=imported.experts_per_layer,
        layers=imported.layers,
        span_bytes=imported.span_bytes,
        span_names=(imported.name_of, imported.names),
    )
    export_timeline(imported.timeline, path, about, limit=None)


class _Builder:
    """Lanes by what they stand for, names by number, and the spans that are recorded."""

    def __init__(self, path: Path, zero_ns: int = 0) -> None:
        self.path, self._zero_ns = path, zero_ns
        self.timeline = Timeline()
        self._lanes: dict[tuple[str, str, str, int], int] = {}
        self._names: dict[str, int] = {}
        self._name_of: list[int] = []
        self._bytes: list[int] = []

    def lane(self, device: str, role: str, title: str, branch: int = 0) -> int:
        """Return the number of a lane, made at its first use; a title may have several branches, which look alike."""
        key = (device, role, title, branch)
        if key not in self._lanes:
            self._lanes[key] = self.timeline.add_lane(device, role, title)
        return self._lanes[key]

    def add(
        self,
        event: _Slice,
        span: tuple[int, int, int],
        lane: int,
        kind: int,
        about: tuple[int, int, int] = (-1, -1, -1),
    ) -> None:
        """Record a span, (start_ns, end_ns, issued_ns), of an event; `about` is its expert, visit and copy."""
        start_ns, end_ns, issued_ns = (at_ns - self._zero_ns for at_ns in span)
        self.timeline.record(start_ns, end_ns, issued_ns, *about, lane, kind)
        self._name_of.append(self._names.setdefault(event.name, len(self._names)))
        self._bytes.append(self.number(event, "bytes", 0, 2**63))

    def number(self, event: _Slice, key: str, least: int, below: int) -> int:
        """Return a whole number among an event's args; `least` if it has none."""
        value = event.args.get(key, least)
        if not isinstance(value, int) or not least <= value < below:
            where = f"{self.path}: traceEvents[{event.number}] ({event.name!r})"
            raise TraceFileError(f"{where}: args[{key!r}] = {value!r}: must be a whole number, {least} or more")
        return value

    def imported(self, experts_per_layer: int = 1, layers: int | None = None) -> Imported:
        name_of, span_bytes = (np.array(column, dtype=np.int64) for column in (self._name_of, self._bytes))
        return Imported(self.timeline, tuple(self._names), name_of, span_bytes, experts_per_layer, layers)


def _read(path: Path) -> Any:
    content = read_json(path, TraceFileError)
    try:
        try:
            return orjson.loads(content)
        except orjson.JSONDecodeError:
            return json.loads(content)  # profilers write NaN and Infinity, which JSON has not
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TraceFileError(f"{path}: not JSON: {error}") from None


def _slices(path: Path, events: Sequence[Any]) -> Iterator[_Slice]:
    """Yield every event that took time."""
    for number, event in enumerate(events):
        if not isinstance(event, dict):
            raise TraceFileError(f"{path}: traceEvents[{number}] is {type(event).__name__}: must be an object")
        if event.get("ph") != "X":
            continue
        name, args = str(event.get("name", "")), event.get("args") or {}
        where = f"{path}: traceEvents[{number}] ({name!r})"
        if not isinstance(args, dict):
            raise TraceFileError(f"{where}: args must be an object")
        times = [event.get(key) for key in ("ts", "dur")]
        for key, value in zip(("ts", "dur"), times, strict=True):
            if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 2**52:
                raise TraceFileError(f"{where}: {key} = {value!r}: must be a number of microseconds")
        start_ns, took_ns = (round(value * 1000) for value in times)  # type: ignore[operator]
        if took_ns < 0:
            raise TraceFileError(f"{where}: dur = {times[1]}: must be 0 or more")
        pid, tid = (event.get(key, 0) for key in ("pid", "tid"))
        if not isinstance(pid, int | str) or not isinstance(tid, int | str):
            raise TraceFileError(f"{where}: pid = {pid!r}, tid = {tid!r}: must be numbers or names")
        yield _Slice(start_ns, start_ns + took_ns, number, name, str(event.get("cat", "")), pid, tid, args)


def _issued_ns(event: _Slice, returned_ns: dict[int, int]) -> int:
    """Return when the call that launched some work had returned; when the work began, if no such call was seen."""
    correlation = event.args.get("correlation")
    return returned_ns.get(correlation, event.start_ns) if isinstance(correlation, int) else event.start_ns


def _thread_names(events: Sequence[dict[str, Any]]) -> dict[tuple[Any, Any], str]:
    return {
        (event.get("pid"), event.get("tid")): str((event.get("args") or {}).get("name", "")).strip()
        for event in events
        if event.get("ph") == "M" and event.get("name") == "thread_name"
    }


# Files that export_timeline wrote.


def _declared(
    builder: _Builder, other: dict[str, Any], work: Sequence[_Slice], returned_ns: dict[int, int]
) -> Imported:
    """Return the timeline whose lanes, with their tracks, the file itself declares."""
    try:
        lanes = {
            (lane["pid"], lane["tid"]): builder.timeline.add_lane(lane["device"], lane["role"], lane["title"])
            for lane in other["lanes"]
        }
        per_layer, layers = int(other["experts_per_layer"]), other["layers"]
    except (TypeError, KeyError, ValueError) as error:
        raise TraceFileError(
            f"{builder.path}: otherData: {type(error).__name__}: {error}: lanes must have device, role, title, pid and "
            "tid, and experts_per_layer and layers must be numbers"
        ) from None
    for event in work:
        kind, lane = event.args.get("kind"), lanes.get((event.pid, event.tid))
        if kind in KINDS and lane is not None:  # else a call
            expert, visit, copy = (builder.number(event, key, -1, 2**31) for key in ("expert_id", "visit", "copy"))
            span = (event.start_ns, event.end_ns, _issued_ns(event, returned_ns))
            builder.add(event, span, lane, KINDS.index(kind), (expert, visit, copy))
    return builder.imported(per_layer, layers)


# A profiler's own.


def _add_streams(builder: _Builder, work: Sequence[_Slice], returned_ns: dict[int, int]) -> None:
    """Add each GPU's work; a kernel that begins before the last one of its stream has ended takes a lane beside it.

    Kernels do so in branches of a graph, and where one is launched ahead of the end of what it depends on.
    """
    ends_ns: dict[int, int] = {}
    for event in sorted(work, key=lambda event: (event.start_ns, event.end_ns)):
        stream = event.args.get("stream", event.tid)
        role, kind = _role_and_kind(event)
        what = {"h2d": ", copies to the GPU", "d2h": ", copies to the host", "peer": ", copies between GPUs"}
        title = f"stream {stream}{what.get(role, '')}"
        device = f"gpu{event.args.get('device', event.pid)}"
        branches = (builder.lane(device, role, title, branch) for branch in count())
        lane = next(lane for lane in branches if ends_ns.get(lane, event.start_ns) <= event.start_ns)
        ends_ns[lane] = event.end_ns
        builder.add(event, (event.start_ns, event.end_ns, _issued_ns(event, returned_ns)), lane, kind)


def _role_and_kind(event: _Slice) -> tuple[str, int]:
    if event.category == "kernel":
        return "compute", COLLECTIVE if event.name.lower().startswith("nccl") else KERNEL
    return next((role for word, role in _DIRECTIONS.items() if word in event.name), "compute"), COPY


def _add_threads(builder: _Builder, work: Sequence[_Slice], titles: dict[tuple[Any, Any], str]) -> None:
    """Add each thread's outermost slices, less what it waits in calls within them."""
    threads: dict[tuple[Any, Any], list[_Slice]] = {}
    for event in work:
        threads.setdefault((event.pid, event.tid), []).append(event)
    for branch, (thread, events) in enumerate(threads.items()):
        lane = builder.lane("host", "host", titles.get(thread) or f"thread {thread[1]}", branch)
        free_ns = -(2**62)
        outermost: list[_Slice] = []
        waits: list[_Slice] = []
        for event in sorted(events, key=lambda event: (event.start_ns, -event.end_ns)):
            if event.start_ns >= free_ns:
                outermost.append(event)
                free_ns = event.end_ns
            if _WAITS.fullmatch(event.name):
                waits.append(event)
        for event, start_ns, end_ns in _without(outermost, waits):
            builder.add(event, (start_ns, end_ns, start_ns), lane, LAUNCH)


def _without(slices: Sequence[_Slice], waits: Sequence[_Slice]) -> Iterator[tuple[_Slice, int, int]]:
    """Yield (slice, start_ns, end_ns) of the pieces of slices, in order, that lie outside the waits, in order."""
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
