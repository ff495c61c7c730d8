"""Links that copies share: max-min fair rates, what they mean for copies in progress, and what each link carried.

A copy by itself takes what the profile says. The network only stretches it, while other copies want more of a link
that it passes than that carries: so nothing moves on a machine with one GPU. The bytes of each link are read off the
timeline afterwards, as everything else is.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .timeline import covered_ns
from .topology import Route, Topology

Key = TypeVar("Key")

#: How many sets of transfers' rates are kept; a run has few sizes of copies, and meets the same sets again and again.
_KEPT = 1 << 16


def max_min(
    flows: Sequence[Sequence[str]],
    capacities: Mapping[str, int | Fraction],
    demands: Sequence[int | Fraction | None] | None = None,
) -> list[Fraction]:
    """Returns the max-min fair rate of each flow, exactly: none can have more unless one with no more gets less.

    Each flow takes its rate of every link that it names, as often as it names it; `capacities` and rates have one
    unit. A flow never gets more than its demand (None: all it can). Progressive filling: all rates rise together
    until a link is full or a demand met, which settles the flows concerned (Bertsekas and Gallager, Data Networks,
    2nd edition, 1992, section 6.5.2). Raises ValueError for a flow that nothing bounds.
    """
    uses = [Counter(flow) for flow in flows]
    wanted = {flow: want for flow, want in enumerate(demands or ()) if want is not None}
    # Whole numbers of one unit, which becomes smaller where a link is shared out: sums of fractions take longer.
    unit = math.lcm(*(bound.denominator for bound in [*capacities.values(), *wanted.values()]))
    left = _in_units(capacities, unit)
    wants = _in_units(wanted, unit)
    rates = dict.fromkeys(range(len(flows)), 0)
    rising = [*rates]
    while rising:
        weight: Counter[str] = Counter()
        for flow in rising:
            weight.update(uses[flow])
        level, parts = _lowest(rising, left, weight, wants)
        if parts > 1:
            unit *= parts
            left, wants, rates = _in_units(left, parts), _in_units(wants, parts), _in_units(rates, parts)
        full = {link for link, times in weight.items() if left[link] == times * level}
        settled = {flow for flow in rising if wants.get(flow) == level or not full.isdisjoint(uses[flow])}
        for flow in settled:
            rates[flow] = level
            for link, times in uses[flow].items():
                left[link] -= times * level
        rising = [flow for flow in rising if flow not in settled]
    return [Fraction(rate, unit) for rate in rates.values()]


def _in_units(values: Mapping[Key, int | Fraction], unit: int) -> dict[Key, int]:
    """Returns values as whole numbers of units, so many of which are one."""
    return {key: int(value * unit) for key, value in values.items()}


def _lowest(
    rising: Sequence[int], left: Mapping[str, int], weight: Mapping[str, int], wants: Mapping[int, int]
) -> tuple[int, int]:
    """Returns the lowest rate that a link or a demand allows all flows that rise: so much, divided into so many parts.

    Raises ValueError if nothing bounds them.
    """
    levels = [(left[link], times) for link, times in weight.items()]
    levels += [(wants[flow], 1) for flow in rising if flow in wants]
    if not levels:
        raise InputError(f"flow {rising[0]} passes no link and has no demand: nothing bounds its rate")
    level, parts = levels[0]
    for bound, times in levels:
        if bound * parts < level * times:
            level, parts = bound, times
    return level, parts


@dataclass(frozen=True, eq=False, slots=True)
class Transfer:
    """So many bytes over a route. Make one for each size and route, and submit it as often as it is copied."""

    route: Route
    size_bytes: int

    def asks(self, ns: int) -> dict[str, Fraction]:
        """Returns what it asks of each link where it takes so long by itself, in bytes a second; of none if it is 0."""
        rate = Fraction(self.size_bytes * 10**9, ns) if ns else Fraction(0)
        return {link: rate * times for link, times in Counter(self.route.links).items()}


class Share:
    """One lane's part of a network: one transfer at a time, and how many times as long it takes now.

    `changed` is called when that changes for a transfer in progress.
    """

    __slots__ = ("_network", "changed", "slot", "stretch")

    def __init__(self, network: Network, slot: int) -> None:
        self._network = network
        self.slot = slot
        self.stretch = 1.0
        self.changed: Callable[[], None] = _nobody

    def begin(self, transfer: Transfer | None, ns: int) -> None:
        """Take part with a transfer, if there is one, that would take `ns` by itself; `stretch` is then right."""
        self._network._occupy(self.slot, None if transfer is None else (transfer, ns))

    def end(self) -> None:
        """Take no part any more."""
        self._network._occupy(self.slot, None)


class Network:
    """The links of a machine while copies run: whenever one begins or ends, all others get their new fair rate.

    A transfer of n bytes that takes t by itself asks for n / t of each link on its route and gets its max-min fair
    rate; it takes as many times as long as it asks for more than it gets.
    """

    def __init__(self, topology: Topology) -> None:
        self._capacities = topology.capacities()
        self._shares: list[Share] = []
        self._running: list[tuple[Transfer, int] | None] = []
        self._known: dict[tuple[tuple[Transfer, int] | None, ...], list[float]] = {}

    def share(self) -> Share:
        """Returns the part of one more lane (see `Lane.join`)."""
        share = Share(self, len(self._shares))
        self._shares.append(share)
        self._running.append(None)
        return share

    def scarce(self, asked: Iterable[Mapping[str, Fraction]]) -> set[str]:
        """Returns the links that cannot carry all that lanes ask of them at most (by link, a mapping for each lane).

        No other link slows a transfer down: it carries what all that may pass it at once ask for together.
        """
        total: defaultdict[str, Fraction] = defaultdict(Fraction)
        for of_lane in asked:
            for link, rate in of_lane.items():
                total[link] += rate
        return {link for link, rate in total.items() if rate > self._capacities[link]}

    def _occupy(self, slot: int, running: tuple[Transfer, int] | None) -> None:
        """Note what runs on a lane, and tell those others whose rate this changes."""
        self._running[slot] = running
        key = tuple(self._running)
        stretches = self._known.get(key)
        if stretches is None:
            if len(self._known) >= _KEPT:
                self._known.clear()
            stretches = self._known[key] = self.stretches(self._running)
        self._shares[slot].stretch = stretches[slot]
        for share, stretch in zip(self._shares, stretches, strict=True):
            if share.stretch != stretch:
                share.stretch = stretch
                share.changed()

    def stretches(self, running: Sequence[tuple[Transfer, int] | None]) -> list[float]:
        """Returns how many times as long each lane's transfer takes; 1 where there is none, or it moves nothing.

        `running` (lanes,) are the transfers and what each takes by itself, in ns.
        """
        stretches = [1.0] * len(running)
        moving = [(slot, *one) for slot, one in enumerate(running) if one is not None]
        moving = [(slot, transfer, ns) for slot, transfer, ns in moving if transfer.size_bytes and ns]
        asked = [Fraction(transfer.size_bytes * 10**9, ns) for _, transfer, ns in moving]
        rates = max_min([transfer.route.links for _, transfer, _ in moving], self._capacities, asked)
        for (slot, _, _), want, rate in zip(moving, asked, rates, strict=True):
            stretches[slot] = 1.0 if rate == want else float(want / rate)
        return stretches


class CrowdShare:
    """One lane's part of what a crowd shares, as `Share` is of a network."""

    __slots__ = ("changed", "crowd")

    def __init__(self, crowd: Crowd) -> None:
        self.crowd = crowd
        self.changed: Callable[[], None] = _nobody

    @property
    def stretch(self) -> float:
        """How many times as long it takes now."""
        return self.crowd.stretch

    def begin(self, transfer: Transfer | None, ns: int) -> None:
        """Take part with any work; `stretch` is right when this returns."""
        self.crowd._count(self, 1)

    def end(self) -> None:
        """Take no part any more."""
        self.crowd._count(self, -1)


class Crowd:
    """Something that lanes share alike, each of which takes as many times as long as is known of so many at once.

    `times_as_long`: of 1, 2, … lanes that are busy together.
    """

    def __init__(self, times_as_long: Sequence[float]) -> None:
        self.times_as_long = times_as_long
        self._busy: dict[CrowdShare, None] = {}  # in the order in which they began
        self.stretch = 1.0

    def share(self) -> CrowdShare:
        """Returns the part of one more lane (see `Lane.join`)."""
        return CrowdShare(self)

    def _count(self, share: CrowdShare, more: int) -> None:
        """Count one in or out, and tell the others if that changes what they get."""
        before = self.stretch
        if more > 0:
            self._busy[share] = None
        else:
            del self._busy[share]
        if self._busy:
            self.stretch = self.times_as_long[len(self._busy) - 1]
        if self.stretch != before:
            for other in self._busy:
                if other is not share:
                    other.changed()


def _nobody() -> None:
    """Nobody has joined yet, so there is nobody to tell."""


def contended(asked: Iterable[tuple[Route, int]], topology: Topology) -> bool:
    """Whether copies over these routes, each asking for so many bytes a second, can slow one another down.

    Where they cannot, lanes need no share of a network, and may be of the quicker kind that nothing disturbs.
    """
    total: Counter[str] = Counter()
    for route, bytes_per_second in asked:
        for link in route.links:
            total[link] += bytes_per_second
    capacities = topology.capacities()
    return any(rate > capacities[link] for link, rate in total.items())


@dataclass(frozen=True)
class Carried:
    """Copies over one route, from a timeline: arrays of equal length (bytes may be one number for all)."""

    route: Route
    size_bytes: npt.NDArray[Any] | int
    start_ns: npt.NDArray[Any]
    end_ns: npt.NDArray[Any]


def link_loads(carried: Iterable[Carried], topology: Topology, makespan_ns: int) -> list[dict[str, Any]]:
    """Returns what each link of a machine carried, in the order of the links.

    `bytes`: of all copies that passed it (twice, if it was passed twice); `busy_ms`: while there was one at least;
    `utilization`: the bytes within the makespan (of a copy that ends after it, in proportion to time) /
    (bytes_per_second x makespan), None for a run that took no time. A half-duplex link is one entry for both
    directions.
    """
    by_link: dict[str, list[Carried]] = {}
    for copies in carried:
        for link in copies.route.links:
            by_link.setdefault(link, []).append(copies)
    loads = []
    for link, bytes_per_second in topology.capacities().items():
        passing = by_link.get(link, [])
        moved = sum(int(np.sum(np.broadcast_to(c.size_bytes, c.start_ns.shape), dtype=np.int64)) for c in passing)
        in_time = sum(_bytes_until(copies, makespan_ns) for copies in passing)
        most = bytes_per_second * makespan_ns / 1e9
        loads.append(
            {
                "link": link,
                "bytes": moved,
                "busy_ms": _busy_ns(passing) / 1e6,
                "utilization": in_time / most if most else None,
            }
        )
    return loads


def _bytes_until(copies: Carried, end_ns: int) -> float:
    """Returns the bytes that copies have moved at an instant: all, or so much of each as of its time has passed."""
    took_ns = np.maximum(copies.end_ns - copies.start_ns, 1)
    left_ns = np.clip(copies.end_ns - end_ns, 0, took_ns)
    sizes = np.broadcast_to(copies.size_bytes, copies.start_ns.shape)
    return float(sizes.sum(dtype=np.int64)) - float((sizes * (left_ns / took_ns)).sum())


def _busy_ns(passing: Sequence[Carried]) -> int:
    """Returns for how long at least one of the copies ran."""
    if not passing:
        return 0
    starts_ns, ends_ns = ([getattr(copies, name) for copies in passing] for name in ("start_ns", "end_ns"))
    return covered_ns(np.concatenate(starts_ns), np.concatenate(ends_ns))
