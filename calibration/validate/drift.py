"""Drift: which costs of a profile have moved since it was fitted, told by schedules that were executed today.

Every cost that a schedule shows by itself is set beside what the profile says of the same. One has moved if it is off
by more than it varied between the runs that it was fitted to. The host's calls are told together, for each way of
dispatch: what all entries take beside what the profile says of their calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...resources.facts import Cost
from ...resources.profile import Profile
from ..executor.measured import Measured
from ..fit.evidence import Row
from ..fit.host import calls_of
from ..fit.in_schedule import samples

#: Costs vary by so much without having moved, as a share, besides so many times what they vary between runs.
STEADY, SIGMAS = 0.01, 2.0
#: Fewer samples say nothing.
_LEAST_SAMPLES = 5


@dataclass(frozen=True)
class Drift:
    """One cost: what it is, its samples, what the profile says and what was measured, and how far that may be off."""

    name: str
    n: int
    profile_ns: int
    measured_ns: float
    within: float

    @property
    def change(self) -> float:
        """measured / profile - 1."""
        return self.measured_ns / self.profile_ns - 1

    @property
    def moved(self) -> bool:
        """Whether it is off by more than it varies."""
        return abs(self.change) > self.within


def drifts(runs: Iterable[Measured], profile: Profile) -> list[Drift]:
    """Returns the costs that runs show and a profile has, those that moved most first."""
    rows = [Row(**row) for row in samples(runs)]
    found = []
    for row in rows:
        for name, ns, cost in _said(row, profile):
            if ns and row.n >= _LEAST_SAMPLES:
                spread = 0.0 if cost.uncertainty is None else cost.uncertainty.run_spread
                found.append(Drift(name, row.n, ns, row.typical_ns, STEADY + SIGMAS * spread))
    return sorted([*found, *_host_calls(rows, profile)], key=lambda one: -abs(one.change) / one.within)


def _host_calls(rows: Sequence[Row], profile: Profile) -> Iterator[Drift]:
    """Yields what the host's calls take in each way of dispatch, an entry in the mean."""
    for dispatch in ("eager", "graph"):
        seen = [row for row in rows if row.cost.startswith("host:") and row.key.get("dispatch") == dispatch]
        told = [(row, *cost) for row in seen if (cost := _calls_cost(row, profile)) is not None and cost[0]]
        n = sum(row.n for row, *_ in told)
        if n < _LEAST_SAMPLES:
            continue
        said_ns = sum(row.n * ns for row, ns, _ in told)
        sure_ns = sum(row.n * ns * spread for row, ns, spread in told)
        measured_ns = sum(row.n * row.typical_ns for row, *_ in told)
        within = STEADY + SIGMAS * sure_ns / said_ns
        yield Drift(f"calls of the host, {dispatch}", n, round(said_ns / n), measured_ns / n, within)


def _calls_cost(row: Row, profile: Profile) -> tuple[float, float] | None:
    """Returns what a profile says of an entry's calls, in ns, and how much that varied; None if it lacks one."""
    ns, vary_ns = 0.0, 0.0
    tables = () if profile.compute.surface is None else profile.compute.surface.launches
    for name, count in calls_of(row, tables).items():
        call, _, dtype = name.partition(":")
        cost = profile.host.product_launches.get(dtype) if dtype else getattr(profile.host, call, None)
        if cost is None:
            return None
        ns += count * cost.ns
        vary_ns += count * cost.ns * (0.0 if cost.uncertainty is None else cost.uncertainty.run_spread)
    return ns, vary_ns / ns if ns else 0.0


def _said(row: Row, profile: Profile) -> Iterator[tuple[str, int, Cost]]:
    """Yields what a profile says of a row: the cost's name in words, its ns, and the cost itself."""
    key, compute = row.key, profile.compute
    beside = ", beside a copy" if key.get("beside_copy") else ""
    tables: dict[str, Sequence[Any]] = {"dense": compute.dense, "expert": compute.experts, "head": compute.heads}
    if row.cost in tables:
        shape = {name: value for name, value in key.items() if name not in ("beside_copy", "kernels")}
        for point in tables[row.cost]:
            if all(getattr(point, name) == value for name, value in shape.items()) and not getattr(point, "context", 0):
                size = f"{key['hidden']} x {key.get('expert_ff', key.get('weight_bytes'))}"
                name = f"{row.cost} {size}, {key['tokens']} tokens, {key['dispatch']}{beside}"
                yield name, point.beside_copy_ns if beside else point.ns, point
    pinned = profile.h2d.get("pinned")
    if row.cost in ("copy_queued", "copy_alone") and pinned is not None:
        cost = pinned.queued if row.cost == "copy_queued" else pinned.alone
        yield f"{row.cost.replace('_', ' ')}, {key['bytes']} bytes", cost.ns(key["bytes"]), cost
    gaps = {
        ("kernel_gap", "graph"): ("gap between graphs", compute.graph_gap),
        ("kernel_gap", "eager"): ("gap between kernels", compute.eager_gap),
    }
    if not key.get("wait") and (row.cost, key.get("dispatch")) in gaps:
        name, gap = gaps[row.cost, key["dispatch"]]
        yield f"{name}{beside}", gap.disturbed_ns if beside else gap.ns, gap
    more = {
        "event_wait_gap": compute.event_wait_gap, "readback": profile.host.readback,
        "readback_late": profile.host.readback_late, "synchronize": profile.host.synchronize,
    }  # fmt: skip
    known = more.get(row.cost)
    ns = None if known is None else getattr(known, "beside_copy_ns", None) if beside else known.ns
    if known is not None and ns is not None:
        yield f"{row.cost.replace('_', ' ')}{beside}", ns, known


def drift_rows(found: Iterable[Drift]) -> list[dict[str, Any]]:
    """Returns drifts as plain data."""
    return [
        {
            "cost": one.name, "n": one.n, "profile_ns": one.profile_ns, "measured_ns": round(one.measured_ns),
            "change": one.change, "within": one.within, "moved": one.moved,
        }
        for one in found
    ]  # fmt: skip
