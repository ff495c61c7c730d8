"""What was seen of one cost in executed schedules, how far it can be off, and when lanes were busy meanwhile."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import hypot
from typing import Any

import numpy as np

from ..executor.entries import Entry, Plan
from ..executor.measured import Times
from .evidence import Row, uncertainty

#: A span is beside a copy from this share of its time on.
BESIDE = 0.95

#: When something was busy: starts and ends, in ns, in order.
Busy = tuple[Any, Any]


@dataclass(frozen=True)
class Seen:
    """One cost as it was observed: how often, its median, mean and quartiles' distance, in ns; the median of each run.

    `repeats_apart`: how far the repeats of the runs in which it was seen lie apart, the standard deviation of makespans
    over their mean.
    """

    n: int
    median_ns: float
    mean_ns: float
    iqr_ns: float
    run_medians_ns: tuple[float, ...] = ()
    repeats_apart: float = 0.0

    @property
    def shown(self) -> dict[str, Any]:
        """What a profile keeps of the samples."""
        return {"n": self.n, "median_ns": round(self.median_ns, 1), "iqr_ns": round(self.iqr_ns, 1)}


def unsure(seen: Collection[Seen], *, decides: bool = False) -> dict[str, float]:
    """Returns how far a cost can be off, by how far its runs lie apart.

    A cost that `decides` how long a run takes differs between a run's repeats as these do, too; of one that no two runs
    had no more is known than that.
    """
    rows = [
        Row("", {}, one.n, one.median_ns, one.mean_ns, one.iqr_ns, one.run_medians_ns, one.run_medians_ns)
        for one in seen
    ]
    several = [row for row in rows if len(row.run_medians_ns) > 1]
    found = uncertainty(several or rows)
    if decides or not several:
        repeats = float(np.sqrt(np.mean([one.repeats_apart**2 for one in seen])))
        found["run_spread"] = round(hypot(found["run_spread"], repeats), 5)
    return found


def intervals(plan: Plan, times: Times, kinds: Sequence[int]) -> Busy:
    """Returns starts and ends of the entries of some kinds, in order."""
    return busy_with((entry for entry in plan.entries if entry.kind in kinds), times)


def busy_with(entries: Iterable[Entry], times: Times) -> Busy:
    """Returns starts and ends of entries, in order."""
    marks = [entry.mark for entry in entries]
    starts_ns, ends_ns = times.start_ns[marks], times.end_ns[marks]
    order = np.argsort(starts_ns, kind="stable")
    return starts_ns[order], ends_ns[order]


def share_of(busy: Busy, start_ns: int, end_ns: int) -> float:
    """Returns for which share of an interval something was busy."""
    starts_ns, ends_ns = busy
    if not len(starts_ns) or end_ns <= start_ns:
        return 0.0
    overlap = np.minimum(ends_ns, end_ns) - np.maximum(starts_ns, start_ns)
    return float(overlap[overlap > 0].sum()) / (end_ns - start_ns)
