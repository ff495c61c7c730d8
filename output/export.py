"""The timeline as PyTorch's profiler (Kineto) writes one: Perfetto and HolisticTraceAnalysis read it like a real run's.

A GPU is a process, a stream a thread of it, and every kernel and copy is tied by its correlation id, and by an `ac2g`
arrow, to the call on the host's thread that launched it. More arrows, "bytes there", run from a copy to the kernel
that waited for it. Events are made and written in chunks, so the file may be far larger than memory; the same timeline
gives the same bytes. Format: "Trace Event Format", the Chromium project's document of it; conventions: libkineto's
output_json.cpp.

A timeline holds the host's work as long spans, and of each launch only when it was issued. So the slice of a call ends
at that instant, and begins where the call before it ended, or where the host's work began if that is later: what the
host spent on it. Outside the host's work (a launch's latency may carry it there) it has no length. Calls thus nest in
the host's spans and never overlap.
"""

from __future__ import annotations

import gzip
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import orjson

from ..errors import InputError
from ..files import replacing
from ..resources.timeline import (
    ACTIVATION,
    DEMAND,
    DENSE,
    EXPERT,
    HEAD,
    KINDS,
    PREFETCH,
    READBACK,
    SWAP,
    Timeline,
)  # fmt: skip
from .request_tracks import REQUESTS_PID, request_events
from .span_names import CATEGORIES, layer_of_each, layers_of, span_name, track_order

Array = npt.NDArray[Any]

#: Spans written unless more are asked for: what Perfetto opens without a wait.
SPAN_LIMIT = 200_000

#: The kinds that one CUDA graph launches as a whole, where the host launches graphs.
GRAPHED = (DENSE, EXPERT, HEAD)
#: Activations between a GPU and its host, for experts that the CPU computes, and KV blocks are called as other copies
#: of their lanes.
_ACTIVATIONS = {"d2h": READBACK, "h2d": DEMAND}

_CATEGORIES = [CATEGORIES[kind] for kind in KINDS]
_CHUNK = 1024
_OFF_GPU = ("host", "cpu", "nvme")
# As in a profiler's trace, a GPU's process is numbered as the GPU, and streams from 7; the host's main thread has its
# process's number. Unlike there, no two GPUs share a stream's number: readers of one rank tell streams by it alone.
_HOST_PID, _FIRST_STREAM = 1000, 7
#: Counters of requests under load: what each shows, by the column of the steps.
LOAD_COUNTERS = {"requests": {"running": "running", "waiting": "waiting"}, "KV blocks": {"in use": "kv_blocks"}}
# Stands for the lane of a host thread that was not recorded.
_NO_LANE = 2**16


@dataclass(frozen=True)
class About:
    """What a timeline does not say of itself; only `experts_per_layer` is needed.

    `layers` turns the visit of a dense part into its layer; without it, that is read off the spans (see `layers_of`).
    `metadata` is plain data for "otherData"; `gpus` is what "deviceProperties" says of every GPU; `graphs`: the host
    launches CUDA graphs; `pinned`: copies leave pinned host memory.
    Of all spans, in the timeline's order: `span_bytes` (spans,) are moved, 0 if not known, and `span_outcomes` (spans,)
    are numbers in `outcome_names`, 0 being nothing.
    `span_names` is (number (spans,), names) of spans that have names of their own, in place of NAMES.
    `memory` is, by GPU, (time_ns, resident_bytes, arriving_bytes), all (samples,), in order of time: bytes that are
    there, and bytes that copies under way will bring into room that is given out.
    """

    experts_per_layer: int
    layers: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    gpus: Mapping[str, Any] = field(default_factory=dict)
    graphs: bool = False
    pinned: bool = True
    span_bytes: Array | None = None
    span_outcomes: Array | None = None
    outcome_names: Sequence[str] = ("",)
    span_names: tuple[Array, Sequence[str]] | None = None
    memory: Mapping[str, tuple[Array, Array, Array]] = field(default_factory=dict)
    #: The columns of requests under load, each of which has a track (see `request_tracks`).
    requests: Mapping[str, Array] = field(default_factory=dict)
    #: The columns of their steps, of which counters say who runs and waits, and how many KV blocks are in use.
    steps: Mapping[str, Array] = field(default_factory=dict)


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


def export_timeline(
    timeline: Timeline, path: str | Path, about: About, *, limit: int | None = SPAN_LIMIT
) -> ExportSummary:
    """Write a timeline to `path`, `.json.gz` or plain `.json`, whole or not at all; say how much of it that was.

    Beyond `limit` spans, in order of start, it is cut (None: never), and "otherData" says so.
    Raises ValueError for another ending, a limit below 0, no experts, and a span that starts before 0 or ends before
    it starts.
    """
    path = Path(path)
    if not path.name.endswith((".json", ".json.gz")):
        raise InputError(f"{path}: a timeline file must end in .json.gz or .json")
    if limit is not None and limit < 0:
        raise InputError(f"limit = {limit}: give the number of spans to write, or None for all")
    if about.experts_per_layer < 1:
        raise InputError(f"experts_per_layer = {about.experts_per_layer}: a layer has 1 or more")
    spans = timeline.spans()
    _check(spans)
    chosen = np.lexsort((spans["end_ns"], spans["start_ns"]))[:limit]
    events = _Events(timeline, chosen, about)
    summary = ExportSummary(len(chosen), len(spans), events.arrows)
    with replacing(path) as raw, packing(raw, path) as stream:
        _write(stream, events.header(), events.all())
    return summary


@contextmanager
def packing(stream: BinaryIO, path: Path) -> Iterator[BinaryIO]:
    """Yields what writes to `stream`, compressed if `path` ends in .gz; the same content gives the same bytes."""
    if path.suffix != ".gz":
        yield stream
        return
    # No name and no time in the header: they would differ where the content does not.
    with gzip.GzipFile("", "wb", 6, stream, mtime=0) as packed:
        yield cast(BinaryIO, packed)


def _check(spans: Array) -> None:
    """Refuse times that no viewer can show."""
    wrong = np.flatnonzero((spans["start_ns"] < 0) | (spans["end_ns"] < spans["start_ns"]))
    if len(wrong):
        span = spans[wrong[0]]
        raise InputError(
            f"span {wrong[0]} ({KINDS[span['kind']]}) is from {span['start_ns']} to {span['end_ns']} ns: "
            "a span starts at 0 or later and ends no earlier than that"
        )


def _arrows(spans: Array) -> tuple[Array, Array]:
    """Returns (copies, kernels), both (arrows,): positions of each copy's last span and of a kernel that waited for it.

    A kernel waited for its copy if the last of the copy's bytes came no earlier than the kernel's launch and the end of
    what its lane did before.
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
    there_ns = spans["end_ns"][sources]
    free_ns = np.maximum(spans["issued_ns"], _lane_free(spans))[kernels]
    waited = numbers[found] == spans["copy"][kernels]
    waited &= (free_ns <= there_ns) & (there_ns <= spans["start_ns"][kernels])
    return sources[waited], kernels[waited]


def _lane_free(spans: Array) -> Array:
    """Returns when each span's lane had ended what it did (spans,), given spans in order of start; 0 at first."""
    order = np.argsort(spans["lane"], kind="stable")
    lanes, ends_ns = spans["lane"][order], spans["end_ns"][order]
    free_ns = np.zeros(len(spans), dtype=np.int64)
    free_ns[order[1:]] = np.where(lanes[1:] == lanes[:-1], ends_ns[:-1], 0)
    return free_ns


class _Tracks:
    """The process and thread number of every lane, in the order in which they are shown."""

    def __init__(self, timeline: Timeline) -> None:
        self.lanes = timeline.lanes
        order = track_order(timeline)
        devices = list(dict.fromkeys(timeline.lanes[number].device for number in order))
        numbers = [re.fullmatch(r"gpu(\d{1,9})", device) for device in devices]
        #: GPUs by number; the others are processes of the host.
        self.gpus = {device: int(found[1]) for device, found in zip(devices, numbers, strict=True) if found}
        others = [device for device in devices if device not in self.gpus] or ["host"]
        self.processes = {device: _HOST_PID + 1000 * place for place, device in enumerate(others)} | self.gpus
        self.pid = [self.processes[lane.device] for lane in self.lanes]
        self.on_gpu = [lane.device in self.gpus and lane.role not in _OFF_GPU for lane in self.lanes]
        self.tid = [0] * len(self.lanes)
        threads = dict.fromkeys(self.processes.values(), 0)
        for place, number in enumerate(order):
            pid = self.pid[number]
            self.tid[number] = _FIRST_STREAM + place if self.on_gpu[number] else pid + threads[pid]
            threads[pid] += 1
        #: The host thread that launches each lane's work, its GPU's own or the first; -1 where no GPU does the work.
        hosts = {timeline.lanes[number].device: number for number in reversed(timeline.lanes_with("host"))}
        first = min(hosts.values(), default=_NO_LANE)
        self.caller = [
            hosts.get(lane.device.replace("gpu", "host"), first) if on_gpu else -1
            for lane, on_gpu in zip(self.lanes, self.on_gpu, strict=True)
        ]
        self._order = order

    def track(self, lane: int) -> dict[str, int]:
        """Returns the process and thread of a lane, or of a host thread that is none."""
        if lane == _NO_LANE:
            return {"pid": _HOST_PID, "tid": _HOST_PID}
        return {"pid": self.pid[lane], "tid": self.tid[lane]}

    def names(self) -> Iterator[dict[str, Any]]:
        """Yields what tells a viewer the names of processes and threads, and their order."""
        for place, (device, pid) in enumerate(self.processes.items()):
            yield _named("process_name", pid, 0, name=device)
            yield _named("process_labels", pid, 0, labels=f"GPU {pid}" if device in self.gpus else "CPU")
            yield _named("process_sort_index", pid, 0, sort_index=place)
        for place, number in enumerate(self._order):
            pid, tid, title = self.pid[number], self.tid[number], self.lanes[number].title
            yield _named("thread_name", pid, tid, name=f"stream {tid}: {title}" if self.on_gpu[number] else title)
            yield _named("thread_sort_index", pid, tid, sort_index=place)


def _named(what: str, pid: int, tid: int, **args: str | int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args}


class _Events:
    """All events of a file: names, the calling thread, everything else that took time, then the counters.

    Viewers sort by time, keep the order of equal times and tie an arrow's end to the slice that they opened last:
    hence the order within a thread.
    """

    def __init__(self, timeline: Timeline, chosen: Array, about: About) -> None:
        spans = timeline.spans()
        self._total = len(spans)
        self._tracks = _Tracks(timeline)
        self._about = about
        self._layers = layers_of(spans, about.experts_per_layer) if about.layers is None else about.layers
        self._spans = spans = spans[chosen]
        self._own_names: Sequence[str] = ()
        name_of = None
        if about.span_names is not None:
            name_of, self._own_names = about.span_names
        self._bytes, self._outcomes, self._name_of = (
            np.zeros(len(spans), dtype=np.int8) if column is None else np.asarray(column)[chosen]
            for column in (about.span_bytes, about.span_outcomes, name_of)
        )
        self._sources, self._waiting = _arrows(spans)
        self.arrows = len(self._sources)
        callers = np.array(self._tracks.caller, dtype=np.int64)
        self._callers = np.unique(callers[callers >= 0]).tolist()
        # Of each span the thread that launched it, and its call's number, from 1; and the spans in the order of calls.
        self._caller_of = callers[spans["lane"]]
        launched = np.flatnonzero(self._caller_of >= 0)
        self._launched = launched[np.argsort(spans["issued_ns"][launched], kind="stable")]
        self._correlation = np.zeros(len(spans), dtype=np.int64)
        self._correlation[self._launched] = np.arange(1, len(launched) + 1)

    def header(self) -> bytes:
        """Returns the beginning of the file, up to the events."""
        tracks, about = self._tracks, self._about
        lanes = [
            {"device": lane.device, "role": lane.role, "title": lane.title, "pid": pid, "tid": tid}
            for lane, pid, tid in zip(tracks.lanes, tracks.pid, tracks.tid, strict=True)
        ]
        other = {
            **about.metadata, "spans_written": len(self._spans), "spans_total": self._total,
            "experts_per_layer": about.experts_per_layer, "layers": self._layers, "lanes": lanes,
        }  # fmt: skip
        gpus = [{"id": number, **about.gpus} for number in tracks.gpus.values()]
        # HolisticTraceAnalysis looks for the rank with a regular expression that wants the space.
        return (
            b'{"schemaVersion":1,"deviceProperties":' + orjson.dumps(gpus) + b","
            b'"distributedInfo":{"rank": 0, "world_size": 1},'
            b'"displayTimeUnit":"ns","otherData":' + orjson.dumps(other)
        )

    def all(self) -> Iterator[dict[str, Any]]:
        """Yields every event."""
        yield from self._tracks.names()
        for caller in self._callers:
            yield from self._calling_thread(caller)
        yield from self._other_threads()
        until_ns = int(self._spans["end_ns"].max(initial=0)) if len(self._spans) < self._total else None
        for event in request_events(self._about.requests, until_ns):
            yield event | {"ts": _us(event["ts"])} if "ts" in event else event
        for name, series in LOAD_COUNTERS.items() if self._about.steps else ():
            yield from _counter(name, tuple(series), _held(self._about.steps, series), REQUESTS_PID, until_ns)
        launched = self._launched_by_device()
        for device, pid in self._tracks.gpus.items():
            spans = self._spans[launched[device]]
            yield from _counter("queue depth", ("kernels", "copies"), _queued(spans), pid)
            if device in self._about.memory:
                time_ns, *sizes = self._about.memory[device]
                mib = np.round(np.stack(sizes, axis=1) / 2**20, 3)
                yield from _counter("expert memory (MiB)", ("resident", "arriving"), (time_ns, mib), pid, until_ns)

    def _calling_thread(self, caller: int) -> Iterator[dict[str, Any]]:
        """Yields a host thread's work and, nested in it, the call behind each launch with the start of its arrow."""
        spans = self._spans
        launched = self._launched[self._caller_of[self._launched] == caller]
        host = np.flatnonzero(spans["lane"] == caller)
        end_ns = np.maximum(0, spans["issued_ns"][launched])
        start_ns = _call_starts(end_ns, spans["start_ns"][host], spans["end_ns"][host])
        starts_ns = np.concatenate([spans["start_ns"][host], start_ns])
        is_call = np.arange(len(starts_ns)) >= len(host)
        order = np.lexsort((is_call, starts_ns))  # stable: calls keep their order
        track = self._tracks.track(caller)
        for first in range(0, len(order), _CHUNK):
            part = order[first : first + _CHUNK]
            calls = part[is_call[part]] - len(host)
            work = self._slices(host[part[~is_call[part]]])
            at = launched[calls]
            times = [start_ns[calls].tolist(), end_ns[calls].tolist()]
            made = zip(*times, spans["kind"][at].tolist(), self._correlation[at].tolist(), strict=True)
            for called in is_call[part].tolist():
                if not called:
                    yield next(work)
                    continue
                began_ns, ended_ns, kind, correlation = next(made)
                yield {
                    "ph": "X", "cat": "cuda_runtime", "name": self._call_name(kind), **track,
                    "ts": _us(began_ns), "dur": _us(ended_ns - began_ns), "args": {"correlation": correlation},
                }  # fmt: skip
                yield _arrow_end("s", "ac2g", "ac2g", correlation, track, began_ns)

    def _call_name(self, kind: int) -> str:
        if _CATEGORIES[kind] == "gpu_memcpy":
            return "cudaMemcpyAsync"
        return "cudaGraphLaunch" if self._about.graphs and kind in GRAPHED else "cudaLaunchKernel"

    def _other_threads(self) -> Iterator[dict[str, Any]]:
        """Yields a slice for each span of the other threads, and behind it the arrows that reach and leave it."""
        spans = self._spans
        by_source = np.argsort(self._sources, kind="stable")
        for first in range(0, len(spans), _CHUNK):
            leave, reach = defaultdict(list), {}
            low, high = np.searchsorted(self._sources, (first, first + _CHUNK), sorter=by_source)
            for arrow in by_source[low:high].tolist():
                leave[int(self._sources[arrow])].append(arrow)
            low, high = np.searchsorted(self._waiting, (first, first + _CHUNK))
            for arrow in range(low, high):
                reach[int(self._waiting[arrow])] = arrow
            here = first + np.flatnonzero(~np.isin(spans["lane"][first : first + _CHUNK], self._callers))
            times = (spans[name][here].tolist() for name in ("start_ns", "end_ns"))
            for at, start_ns, end_ns, event in zip(here.tolist(), *times, self._slices(here), strict=True):
                yield event
                track = {"pid": event["pid"], "tid": event["tid"]}
                if correlation := event["args"].get("correlation"):
                    yield _arrow_end("f", "ac2g", "ac2g", correlation, track, start_ns)
                if at in reach:
                    yield _arrow_end("f", "wait", "bytes there", reach[at] + 1, track, start_ns)
                for arrow in leave.get(at, ()):
                    # One ns before the end: at the end itself the slice is over.
                    yield _arrow_end("s", "wait", "bytes there", arrow + 1, track, max(start_ns, end_ns - 1))

    def _slices(self, positions: Array) -> Iterator[dict[str, Any]]:
        """Yields a slice for each of the spans at these positions."""
        tracks, per_layer = self._tracks, self._about.experts_per_layer
        part = self._spans[positions]
        fields = [part[name].tolist() for name in ("start_ns", "end_ns", "expert", "visit", "copy", "lane", "kind")]
        more = (self._bytes, self._outcomes, self._correlation, self._name_of)
        layer_of = layer_of_each(part, per_layer, self._layers).tolist()
        rows = zip(*fields, layer_of, *(column[positions].tolist() for column in more), strict=True)
        for start_ns, end_ns, expert, visit, copy, lane, kind, layer, size_bytes, outcome, correlation, name in rows:
            index = expert % per_layer if expert >= 0 else -1
            own = self._own_names[name] if self._own_names else None
            called = _ACTIVATIONS.get(tracks.lanes[lane].role, kind) if kind in (ACTIVATION, SWAP) else kind
            args: dict[str, Any] = {}
            if correlation:
                args = {"device": tracks.pid[lane], "context": 1, "stream": tracks.tid[lane]}
                args["correlation"] = correlation
            if size_bytes:
                args["bytes"] = size_bytes
                if end_ns > start_ns:
                    args["memory bandwidth (GB/s)"] = round(size_bytes / (end_ns - start_ns), 6)
            args["kind"] = KINDS[kind]
            about = {"visit": visit, "layer": layer, "expert": index, "expert_id": expert, "copy": copy}
            args |= {key: value for key, value in about.items() if value >= 0}
            if outcome:
                args["outcome"] = self._about.outcome_names[outcome]
            yield {
                "ph": "X",
                "cat": _CATEGORIES[kind] if tracks.on_gpu[lane] else "cpu_op",
                "name": own or span_name(called, layer, index, pinned=self._about.pinned),
                "pid": tracks.pid[lane],
                "tid": tracks.tid[lane],
                "ts": _us(start_ns),
                "dur": _us(end_ns - start_ns),
                "args": args,
            }

    def _launched_by_device(self) -> dict[str, Array]:
        """Returns the positions of the spans of each device that the host launched."""
        devices = {device: number for number, device in enumerate(self._tracks.processes)}
        device_of = np.array([devices[lane.device] for lane in self._tracks.lanes], dtype=np.int64)
        at = np.flatnonzero(self._correlation > 0)
        device = device_of[self._spans["lane"][at]]
        order = np.argsort(device, kind="stable")
        ends = np.cumsum(np.bincount(device, minlength=len(devices)))
        return dict(zip(devices, np.split(at[order], ends[:-1]), strict=True))


def _queued(spans: Array) -> tuple[Array, Array]:
    """Returns (time_ns, (samples, 2)) of some spans: how many kernels and copies are launched and have not started."""
    start_ns = spans["start_ns"]
    issued_ns = np.clip(spans["issued_ns"], 0, start_ns)
    is_copy = np.array([category == "gpu_memcpy" for category in _CATEGORIES])[spans["kind"]]
    one = np.stack([~is_copy, is_copy], axis=1).astype(np.int8)
    return _running(np.concatenate([issued_ns, start_ns]), np.concatenate([one, -one]))


def _held(steps: Mapping[str, Array], series: Mapping[str, str]) -> tuple[Array, Array]:
    """Returns (time_ns, (samples, series)) of some columns of steps: what those under way hold, all replicas' added."""
    values = np.stack([steps[column] for column in series.values()], axis=1)
    return _running(np.concatenate([steps["start_ns"], steps["end_ns"]]), np.concatenate([values, -values]))


def _call_starts(end_ns: Array, work_start_ns: Array, work_end_ns: Array) -> Array:
    """Returns when each call began (calls,), given when it ended, in order, and the host's spans of work, in order."""
    before_ns = np.concatenate([[0], end_ns[:-1]]) if len(end_ns) else end_ns
    within = np.searchsorted(work_start_ns, end_ns, side="left") - 1
    if not len(work_start_ns):
        return end_ns
    inside = (within >= 0) & (end_ns <= work_end_ns[within])
    starts_ns: Array = np.where(inside, np.maximum(before_ns, work_start_ns[within]), end_ns)
    return starts_ns


def _running(time_ns: Array, changes: Array) -> tuple[Array, Array]:
    """Returns (time_ns, sums (samples, …)) after all changes of each instant."""
    order = np.argsort(time_ns, kind="stable")
    time_ns, sums = time_ns[order], np.cumsum(changes[order], axis=0, dtype=np.int32)
    last = np.append(time_ns[1:] != time_ns[:-1], True) if len(time_ns) else np.zeros(0, dtype=bool)
    return time_ns[last], sums[last]


def _arrow_end(
    phase: str, category: str, name: str, number: int, track: Mapping[str, int], at_ns: int
) -> dict[str, Any]:
    end = {"ph": phase, "cat": category, "name": name, "id": number, **track, "ts": _us(at_ns)}
    return {**end, "bp": "e"} if phase == "f" else end


def _counter(
    name: str, series: tuple[str, ...], steps: tuple[Array, Array], pid: int, until_ns: int | None = None
) -> Iterator[dict[str, Any]]:
    """Yields a counter's values, (time_ns (samples,), values (samples, series)), at every change up to `until_ns`."""
    time_ns, values = steps
    last: list[Any] = []
    for first in range(0, len(time_ns), _CHUNK):
        part = slice(first, first + _CHUNK)
        for at_ns, row in zip(time_ns[part].tolist(), values[part].tolist(), strict=True):
            if until_ns is not None and at_ns > until_ns:
                return
            if row != last:
                last = row
                args = dict(zip(series, row, strict=True))
                yield {"ph": "C", "name": name, "pid": pid, "tid": 0, "ts": _us(at_ns), "args": args}


def _us(ns: int) -> orjson.Fragment:
    """Returns microseconds with three decimals: the format's unit, exact to the nanosecond at any size."""
    sign = b"-" if ns < 0 else b""
    return orjson.Fragment(b"%b%d.%03d" % (sign, *divmod(abs(ns), 1000)))


def _write(stream: BinaryIO, header: bytes, events: Iterator[dict[str, Any]]) -> None:
    """Write the whole object, an event a line, a chunk at a time."""
    stream.write(header + b',"traceEvents":[')
    between = b"\n"
    while chunk := list(islice(events, _CHUNK)):
        stream.write(between + b",\n".join(map(orjson.dumps, chunk)))
        between = b",\n"
    stream.write(b"\n]}\n")
