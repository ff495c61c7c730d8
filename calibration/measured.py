"""A measured run: when everything that an execution did started and ended, with what it was, as one small file.

The file describes itself, so that it can be compared with a simulation anywhere and at any time later: every span's
kind, visit, expert and copy stand beside its times. Times are kept of the repeat whose makespan is the median, or of
all; the makespans of all repeats are always kept.
"""

from __future__ import annotations

import gzip
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from ..engine.gpu import add_lanes
from ..engine.output.export import replacing
from ..engine.scenario import Scenario, make_scenario
from ..resources.timeline import DEMAND, DENSE, EXPERT, HEAD, LAUNCH, PREFETCH, READBACK, Timeline

FORMAT = "prestage measured run 1"

#: What is kept of every span, in the order in which the host asked for them.
SPAN_COLUMNS = ("kind", "visit", "expert", "copy", "slot", "tokens")
_LANES = {DENSE: "compute", EXPERT: "compute", HEAD: "compute", DEMAND: "h2d", PREFETCH: "h2d", READBACK: "d2h"}

Numbers = npt.NDArray[np.int64]


class MeasuredError(ValueError):
    """A file that is no measured run."""


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
class Measured:
    """One execution of a scenario: its name, the machine, the makespans of all repeats, the spans and their times.

    `spans` maps SPAN_COLUMNS to arrays (spans,). `repeats` are the times of those that are kept, one at least.
    `counts` are those of the memory manager; `verified` is how many slots held the right bytes at the end: all.
    `disturbed` repeats do not count: others on the machine slowed the host down meanwhile.
    """

    name: str
    scenario: Scenario
    machine: Mapping[str, Any]
    makespans_ns: tuple[int, ...]
    spans: Mapping[str, Numbers]
    repeats: tuple[Times, ...]
    counts: Mapping[str, int]
    verified: int
    disturbed: int

    @property
    def makespan_ns(self) -> int:
        """The median makespan (the lower of two middle ones)."""
        return median_low(self.makespans_ns)

    @property
    def spread(self) -> float:
        """How far the repeats lie apart: (largest - smallest) / median."""
        return (max(self.makespans_ns) - min(self.makespans_ns)) / self.makespan_ns

    @property
    def times(self) -> Times:
        """The times of the repeat with the median makespan."""
        return next(times for times in self.repeats if makespan_ns(self.spans, times) == self.makespan_ns)

    def timeline(self) -> Timeline:
        """Return the median repeat as the simulator records a run, the host's work between two waits as one span.

        On an idle stream the event before some work comes before the host has even asked for the work: then that is
        when it starts. Not so for a group of several launches, which starts with its first.
        """
        times, timeline = self.times, Timeline()
        asked_ns = np.minimum(times.issued_ns, times.end_ns)
        several = (self.scenario.dispatch.mode == "eager") & np.isin(self.spans["kind"], (DENSE, EXPERT))
        starts_ns = np.where(several, times.start_ns, np.maximum(times.start_ns, asked_ns))
        lanes = add_lanes(timeline, self.scenario.copy_.discipline)
        what = (self.spans[name].tolist() for name in ("kind", "visit", "expert", "copy"))
        when = (column.tolist() for column in (starts_ns, times.end_ns, times.issued_ns))
        for kind, visit, expert, copy, start_ns, end_ns, issued_ns in zip(*what, *when, strict=True):
            if start_ns >= 0:
                lane = "prefetch" if kind == PREFETCH and "prefetch" in lanes else _LANES[kind]
                timeline.record(start_ns, end_ns, issued_ns, expert, visit, copy, lanes[lane], kind)
        began_ns = 0
        waits = zip(times.waits_from_ns.tolist(), times.choice_known_ns.tolist(), strict=True)
        for visit, (from_ns, to_ns) in enumerate(waits):
            if from_ns >= 0:
                timeline.record(began_ns, from_ns, began_ns, -1, visit, -1, lanes["host"], LAUNCH)
                began_ns = to_ns
        last = len(times.choice_known_ns) - 1
        timeline.record(began_ns, times.host_end_ns.item(), began_ns, -1, last, -1, lanes["host"], LAUNCH)
        return timeline

    def save(self, path: Path) -> None:
        """Write the run as JSON, compressed if the name ends in .gz; the same run gives the same bytes."""
        data = {
            "format": FORMAT,
            "name": self.name,
            "scenario": self.scenario.plain(),
            "machine": dict(self.machine),
            "makespans_ns": list(self.makespans_ns),
            "counts": dict(self.counts),
            "verified": self.verified,
            "disturbed": self.disturbed,
            "spans": {name: self.spans[name].tolist() for name in SPAN_COLUMNS},
            "repeats": [
                {field.name: _packed(getattr(times, field.name)) for field in fields(Times)} for times in self.repeats
            ],
        }
        text = orjson.dumps(data)
        with replacing(path) as file:
            file.write(gzip.compress(text, mtime=0) if path.name.endswith(".gz") else text)


def load_measured(path: Path) -> Measured:
    """Read a file that `Measured.save` wrote; MeasuredError if it is none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MeasuredError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        data = orjson.loads(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
        if data["format"] != FORMAT:
            raise MeasuredError(f"{path}: format = {data['format']!r}: must be {FORMAT!r}")
        return Measured(
            name=data["name"],
            scenario=make_scenario(data["scenario"], f"{path}: scenario"),
            machine=data["machine"],
            makespans_ns=tuple(data["makespans_ns"]),
            spans={name: np.array(data["spans"][name], dtype=np.int64) for name in SPAN_COLUMNS},
            repeats=tuple(
                Times(**{field.name: _unpacked(times[field.name]) for field in fields(Times)})
                for times in data["repeats"]
            ),
            counts=data["counts"],
            verified=data["verified"],
            disturbed=data["disturbed"],
        )
    except (KeyError, TypeError, IndexError, orjson.JSONDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise MeasuredError(f"{path}: not a measured run ({type(error).__name__}: {error})") from None


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


def makespan_ns(spans: Mapping[str, Numbers], times: Times) -> int:
    """Return the end of the last kernel of one repeat."""
    return int(times.end_ns[np.isin(spans["kind"], (DENSE, EXPERT, HEAD))].max())


def _packed(values: Numbers) -> list[int]:
    """Return times as differences from one to the next: they compress to a third."""
    differences: list[int] = np.diff(np.atleast_1d(values), prepend=0).tolist()
    return differences


def _unpacked(differences: list[int]) -> Numbers:
    return np.cumsum(np.array(differences, dtype=np.int64))
