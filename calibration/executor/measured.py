"""A measured run: when everything that an execution did started and ended, with what it was, as one small file.

The file describes itself, so that it can be compared with a simulation anywhere and at any time later: every span's
kind, visit, expert and copy stand beside its times. Times are kept of the repeat whose makespan is the median, or of
all; the makespans of all repeats are always kept. A run on several GPUs has spans and times of each, whose visits,
experts and copies are its own, from 0.
"""

from __future__ import annotations

import gzip
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median_low
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...bounded import read_json
from ...engine.scenario.scenario import Scenario, make_scenario
from ...engine.timing.machine import add_lanes
from ...errors import InputError
from ...files import replacing
from ...resources.timeline import (
    ACTIVATION,
    CPU_EXPERT,
    DEMAND,
    DENSE,
    EXPERT,
    HEAD,
    KINDS,
    LAUNCH,
    PREFETCH,
    READ,
    READBACK,
    Timeline,
)
from ...words import problems, shown

FORMAT = "prestage measured run 1"

#: What is kept of every span, in the order in which the host asked for them.
SPAN_COLUMNS = ("kind", "visit", "expert", "copy", "slot", "tokens")
#: What is kept besides where a run has other lanes than these: the place in LANES of each span's.
LANE = "lane"
_LANES = {
    DENSE: "compute", EXPERT: "compute", HEAD: "compute", DEMAND: "h2d", PREFETCH: "h2d", READBACK: "d2h",
    ACTIVATION: "peer",
}  # fmt: skip
#: The lanes of entries that the kinds of spans tell apart.
ALWAYS = ("compute", "h2d", "prefetch", "d2h", "peer")
#: Lanes of entries, and the role and title of those that not every run has; decompression aside is one lane.
LANES = (
    *ALWAYS,
    *("to_cpu", "back", "cpu", "drive", "side", "guesses", "aside"),
    *("all-to-all", "fetch", "store"),
)
_MORE_LANES = {
    "to_cpu": ("d2h", "copy engine D2H, tokens for the CPU"),
    "back": ("h2d", "copy engine H2D, results of the CPU"),
    "cpu": ("cpu", "CPU experts"),
    "drive": ("nvme", "reads from the drive"),
    "aside": ("side", "decompression (side stream)"),
    "all-to-all": ("peer", "all-to-all"),
    "fetch": ("peer", "copies from another GPU"),
    "store": ("peer", "copies to another GPU"),
}

_KERNELS = (DENSE, EXPERT, HEAD)
_OF_SPAN = ("expert", "visit", "copy", "kind")
_BESIDE = (CPU_EXPERT, READ)
#: A hundred days: more than any run takes, and so few that sums of times fit.
MOST_NS = 10**16

Numbers = npt.NDArray[np.int64]


class MeasuredError(InputError):
    """A file that is no measured run."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


_Number = Annotated[int, Field(ge=-(2**53), le=2**53)]
_Count = Annotated[int, Field(ge=0, le=2**53)]
_Column = Annotated[list[_Number], Field(min_length=1)]


class _Spans(_Part):
    """The columns of the spans, as a file has them."""

    kind: _Column
    visit: Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(min_length=1)]
    expert: _Column
    copy_: _Column = Field(alias="copy")
    slot: _Column
    lane: Annotated[list[Annotated[int, Field(ge=0, lt=len(LANES))]], Field(min_length=1)] | None = None
    tokens: Annotated[list[_Count], Field(min_length=1)]


class _Times(_Part):
    """The times of a repeat, as a file has them: differences from one to the next."""

    start_ns: list[_Number]
    end_ns: list[_Number]
    issued_ns: list[_Number]
    waits_from_ns: list[_Number]
    choice_known_ns: list[_Number]
    host_end_ns: list[_Number]


class _Gpu(_Part):
    spans: _Spans
    repeats: list[_Times] = Field(min_length=1)
    counts: dict[str, _Count]
    verified: _Count


class _Versions(_Part):
    torch: str


class _Machine(_Part):
    device: str
    driver: str
    date: str
    versions: _Versions


class _File(_Part):
    """What all files of measured runs have."""

    name: str
    scenario: dict[str, Any]
    machine: _Machine
    makespans_ns: tuple[Annotated[int, Field(gt=0, le=2**53)], ...] = Field(min_length=1, strict=False)
    disturbed: _Count
    clocks_within_ns: _Count = 0


class _FileOfOne(_File, _Gpu):
    """A run on one GPU."""


class _FileOfSeveral(_File):
    """A run on several GPUs."""

    gpus: list[_Gpu] = Field(min_length=1)


@dataclass(frozen=True)
class Times:
    """One repeat, in ns from its start: of each span (spans,) its start, its end, and when the host had asked for it
    (all -1: a copy that was cancelled); of each visit when the host began to wait for the choice (-1: it did not), and
    when it knew it; and (1,) when the host had asked for all.
    """

    start_ns: Numbers
    end_ns: Numbers
    issued_ns: Numbers
    waits_from_ns: Numbers
    choice_known_ns: Numbers
    host_end_ns: Numbers


@dataclass(frozen=True)
class MeasuredGpu:
    """What one GPU did: its spans, SPAN_COLUMNS to arrays (spans,), and their times in the repeats that are kept.

    `counts` are those of its memory manager; `verified` is how many slots held the right bytes at the end: all.
    """

    spans: Mapping[str, Numbers]
    repeats: tuple[Times, ...]
    counts: Mapping[str, int]
    verified: int

    def work(self, repeat: int, mode: str) -> Iterator[tuple[int, int, int, int, int, int, int, int]]:
        """Yields (start, end, asked for, expert, visit, copy, kind, lane) of every span that was made.

        The lane is its place in LANES, or -1 where the kind says it.

        On an idle stream the event before some work comes before the host has even asked for the work: then that is
        when it starts. Not so for a group of several launches (`mode` eager), which starts with its first.
        """
        times = self.repeats[repeat]
        asked_ns = np.minimum(times.issued_ns, times.end_ns)
        several = (mode == "eager") & np.isin(self.spans["kind"], (DENSE, EXPERT))
        several |= np.isin(self.spans["kind"], _BESIDE)  # their own threads take the time
        starts_ns = np.where(several, times.start_ns, np.maximum(times.start_ns, asked_ns))
        when = (column.tolist() for column in (starts_ns, times.end_ns, times.issued_ns))
        lanes = self.spans.get(LANE, np.full(len(times.start_ns), -1))
        what = (column.tolist() for column in (*(self.spans[name] for name in _OF_SPAN), lanes))
        for span in zip(*when, *what, times.start_ns.tolist(), strict=True):
            if span[-1] >= 0:
                yield span[:-1]


@dataclass(frozen=True)
class Measured:
    """One execution of a scenario: its name, the machine, the makespans of all repeats, and what each GPU did.

    `disturbed` repeats do not count: others on the machine slowed the host down meanwhile. `clocks_within_ns`: how far
    the clocks of several GPUs may be off against each other.
    """

    name: str
    scenario: Scenario
    machine: Mapping[str, Any]
    makespans_ns: tuple[int, ...]
    gpus: tuple[MeasuredGpu, ...]
    disturbed: int
    clocks_within_ns: int = 0

    @property
    def makespan_ns(self) -> int:
        """The median makespan (the lower of two middle ones)."""
        return median_low(self.makespans_ns)

    @property
    def spread(self) -> float:
        """How far the repeats lie apart: (largest - smallest) / median."""
        return (max(self.makespans_ns) - min(self.makespans_ns)) / self.makespan_ns

    @property
    def median(self) -> int:
        """Which of the repeats that are kept has the median makespan."""
        spans = [gpu.spans for gpu in self.gpus]
        kept = zip(*(gpu.repeats for gpu in self.gpus), strict=True)
        return next(number for number, times in enumerate(kept) if makespan_ns(spans, times) == self.makespan_ns)

    @property
    def times(self) -> list[Times]:
        """The times of each GPU in the repeat with the median makespan."""
        return [gpu.repeats[self.median] for gpu in self.gpus]

    def timelines(self) -> list[Timeline]:
        """Returns the median repeat as the simulator records a run, the host's work between two waits as one span."""
        timelines, lanes = [], []
        median, mode, discipline = self.median, self.scenario.dispatch.mode, self.scenario.copy_.discipline
        for number, gpu in enumerate(self.gpus):
            timeline = Timeline()
            host = "host" if self.threads == 1 else f"host{number}"
            lanes.append(add_lanes(timeline, discipline, f"gpu{number}", host))
            if len(self.gpus) > 1:
                to = (number + 1) % len(self.gpus)
                lanes[-1]["peer"] = timeline.add_lane(f"gpu{number}", "peer", f"copy engine to gpu{to}")
            for name in sorted({LANES[place] for place in gpu.spans[LANE].tolist()} if LANE in gpu.spans else ()):
                if name in _MORE_LANES and name not in lanes[-1]:
                    role, title = _MORE_LANES[name]
                    device = {"cpu": "host", "nvme": "nvme0"}.get(role, f"gpu{number}")
                    lanes[-1][name] = timeline.add_lane(device, role, title)
            for start_ns, end_ns, issued_ns, expert, visit, copied, kind, place in gpu.work(median, mode):
                name = "prefetch" if kind == PREFETCH and "prefetch" in lanes[-1] else _LANES.get(kind, "compute")
                lane = lanes[-1][name if place < 0 else _track(LANES[place], lanes[-1])]
                timeline.record(start_ns, end_ns, issued_ns, expert, visit, copied, lane, kind)
            timelines.append(timeline)
        numbers = list(range(len(timelines)))
        for served in [numbers] if self.threads == 1 else [[number] for number in numbers]:
            for number, visit, began_ns, end_ns in _host_work({each: self.gpus[each] for each in served}, median):
                timelines[number].record(began_ns, end_ns, began_ns, -1, visit, -1, lanes[number]["host"], LAUNCH)
        return timelines

    @property
    def gpus_used(self) -> int:
        """How many GPUs it took, with one that only holds experts."""
        return len(self.gpus) + (self.scenario.copy_.source == "peer")

    @property
    def threads(self) -> int:
        """How many threads dispatched."""
        return 1 if self.scenario.parallel.dispatch_threads == "one" else len(self.gpus)

    def save(self, path: Path) -> None:
        """Write the run as JSON, compressed if the name ends in .gz; the same run gives the same bytes."""
        data = {
            "format": FORMAT,
            "name": self.name,
            "scenario": self.scenario.plain(),
            "machine": dict(self.machine),
            "makespans_ns": list(self.makespans_ns),
            "disturbed": self.disturbed,
        }
        if self.clocks_within_ns:
            data["clocks_within_ns"] = self.clocks_within_ns
        if len(self.gpus) > 1:
            data["gpus"] = [_plain(gpu) for gpu in self.gpus]
        else:
            data |= _plain(self.gpus[0])
        text = orjson.dumps(data)
        with replacing(path) as file:
            file.write(gzip.compress(text, mtime=0) if path.name.endswith(".gz") else text)


def load_measured(path: Path) -> Measured:
    """Read a file that `Measured.save` wrote; MeasuredError if it is none."""
    try:
        content = read_json(path, MeasuredError)
    except OSError as error:
        raise MeasuredError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        data = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise MeasuredError(f"{path}: not a measured run: not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        given = data.get("format") if isinstance(data, dict) else data
        raise MeasuredError(f"{path}: format = {shown(given)}: must be {FORMAT!r}")
    kind = _FileOfSeveral if "gpus" in data else _FileOfOne
    try:
        file = kind.model_validate(data)
    except ValidationError as error:
        raise MeasuredError(f"{path}: not a measured run: {problems(error, kind, data)}") from None
    gpus = file.gpus if isinstance(file, _FileOfSeveral) else (file,)
    try:
        run = Measured(
            name=file.name,
            scenario=make_scenario(file.scenario, "scenario"),
            machine=data["machine"],
            makespans_ns=file.makespans_ns,
            gpus=tuple(map(_measured_gpu, gpus)),
            disturbed=file.disturbed,
            clocks_within_ns=file.clocks_within_ns,
        )
        _check_median(run)
    except InputError as error:
        raise MeasuredError(f"{path}: {error}") from None
    return run


def load_all(paths: Collection[Path], names: Collection[str] = ()) -> list[Measured]:
    """Read measured runs, those in folders by name; only those called one of `names`, if there are any.

    Raises MeasuredError if a file is none, or no run is left.
    """
    files = [file for path in paths for file in (sorted(path.glob("*.json*")) if path.is_dir() else [path])]
    runs = [run for run in map(load_measured, files) if not names or run.name in names]
    if not runs:
        raise MeasuredError(
            f"no measured run in {', '.join(map(str, paths))}" + (f" of {', '.join(names)}" if names else "")
        )
    return runs


def makespan_ns(spans: Sequence[Mapping[str, Numbers]], times: Sequence[Times]) -> int:
    """Returns the end of the last kernel of one repeat, given the spans and times of each GPU."""
    return max(int(its.end_ns[np.isin(what["kind"], _KERNELS)].max()) for what, its in zip(spans, times, strict=True))


def lane_column(entries: Sequence[tuple[int, str]]) -> list[int] | None:
    """Returns the LANE of each entry, given its kind and its lane; None if all kinds say theirs."""
    if all(kind in _LANES and lane in ALWAYS for kind, lane in entries):
        return None
    return [LANES.index(lane.rstrip("0123456789")) for _, lane in entries]


def _host_work(gpus: Mapping[int, MeasuredGpu], repeat: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields (gpu, visit, start, end) of what one host thread did for its GPUs, from one wait or GPU to the next."""
    moments = []  # (when, GPU, visit, when the host goes on)
    for number, gpu in gpus.items():
        times, visits = gpu.repeats[repeat], gpu.spans["visit"]
        made = np.flatnonzero(times.start_ns >= 0)
        moments += [(int(times.issued_ns[at]), number, int(visits[at]), -1) for at in made]
        waits = zip(times.waits_from_ns.tolist(), times.choice_known_ns.tolist(), strict=True)
        moments += [(from_ns, number, visit, to_ns) for visit, (from_ns, to_ns) in enumerate(waits) if from_ns >= 0]
        moments.append((times.host_end_ns.item(), number, len(times.choice_known_ns) - 1, -1))
    began_ns = last_ns = last_visit = 0
    here = next(iter(gpus))
    for at_ns, number, visit, goes_on_ns in sorted(moments):
        if number != here:
            yield here, last_visit, began_ns, last_ns
            here, began_ns = number, last_ns
        last_ns, last_visit = at_ns, visit
        if goes_on_ns >= 0:
            yield here, visit, began_ns, at_ns
            began_ns = last_ns = goes_on_ns
    yield here, last_visit, began_ns, last_ns


def _plain(gpu: MeasuredGpu) -> dict[str, Any]:
    """Returns what one GPU did as plain data."""
    return {
        "counts": dict(gpu.counts),
        "verified": gpu.verified,
        "spans": {name: gpu.spans[name].tolist() for name in (*SPAN_COLUMNS, LANE) if name in gpu.spans},
        "repeats": [
            {field.name: _packed(getattr(times, field.name)) for field in fields(Times)} for times in gpu.repeats
        ],
    }


def _measured_gpu(data: _Gpu) -> MeasuredGpu:
    """Returns what `_plain` made plain; MeasuredError if its columns do not belong together."""
    spans = {
        name: np.array(getattr(data.spans, "copy_" if name == "copy" else name), dtype=np.int64)
        for name in SPAN_COLUMNS
    }
    if data.spans.lane is not None:
        spans[LANE] = np.array(data.spans.lane, dtype=np.int64)
    repeats = tuple(
        Times(**{field.name: _unpacked(getattr(times, field.name)) for field in fields(Times)})
        for times in data.repeats
    )
    for name, column in spans.items():
        if len(column) != len(spans["kind"]):
            raise MeasuredError(f"spans.{name}: {len(column):,} values: must be {len(spans['kind']):,}, one a span")
    known = _LANES.keys() if LANE not in spans else range(len(KINDS))
    kinds = sorted(set(spans["kind"].tolist()) - set(known))
    if kinds:
        raise MeasuredError(f"spans.kind: {kinds[0]}: choose from {', '.join(map(str, sorted(known)))}")
    if not np.isin(spans["kind"], _KERNELS).any():
        raise MeasuredError("spans.kind: no kernel: must have one")
    if (spans["tokens"][np.isin(spans["kind"], _KERNELS)] < 1).any():
        raise MeasuredError("spans.tokens: 0 of a kernel: must be at least 1")
    for number, times in enumerate(repeats):
        _check_times(f"repeats.{number}", times, spans)
    return MeasuredGpu(spans, repeats, data.counts, data.verified)


def _check_times(where: str, times: Times, spans: Mapping[str, Numbers]) -> None:
    """Raise MeasuredError if the times of a repeat are not those of its spans and visits."""
    count, visits = len(spans["kind"]), int(spans["visit"].max()) + 1
    for name, must in (("start_ns", count), ("end_ns", count), ("issued_ns", count), ("host_end_ns", 1)):
        if len(getattr(times, name)) != must:
            raise MeasuredError(f"{where}.{name}: {len(getattr(times, name)):,} times: must be {must:,}")
    if not len(times.waits_from_ns) == len(times.choice_known_ns) >= visits:
        raise MeasuredError(f"{where}: waits_from_ns, choice_known_ns: must have a time for each of {visits:,} visits")
    if (times.end_ns < times.start_ns).any():
        at = int(np.flatnonzero(times.end_ns < times.start_ns)[0])
        raise MeasuredError(f"{where}.end_ns: span {at:,} ends before its start")
    for field in fields(Times):
        if not (abs(getattr(times, field.name)) <= MOST_NS).all():
            raise MeasuredError(f"{where}.{field.name}: times must be at most {MOST_NS:,} ns")


def _check_median(run: Measured) -> None:
    """Raise MeasuredError if no repeat is kept that has the median makespan, or the GPUs kept not equally many."""
    if len({len(gpu.repeats) for gpu in run.gpus}) > 1:
        raise MeasuredError("gpus: must have equally many repeats each")
    spans = [gpu.spans for gpu in run.gpus]
    kept = [makespan_ns(spans, times) for times in zip(*(gpu.repeats for gpu in run.gpus), strict=True)]
    if run.makespan_ns not in kept:
        raise MeasuredError(
            f"makespans_ns: the median is {run.makespan_ns:,}, and the repeats that are kept take "
            f"{', '.join(f'{ns:,}' for ns in kept[:9])} ns"
        )


def _track(lane: str, known: Mapping[str, int]) -> str:
    """Returns the name of a lane as a timeline has it, of those that it may have."""
    name = {"side": "predictor", "guesses": "d2h"}.get(lane, lane)
    return name if name in known else "h2d"


def _packed(values: Numbers) -> list[int]:
    """Returns times as differences from one to the next: they compress to a third."""
    differences: list[int] = np.diff(np.atleast_1d(values), prepend=0).tolist()
    return differences


def _unpacked(differences: Sequence[int]) -> Numbers:
    return np.cumsum(np.array(differences, dtype=np.int64))
