"""Rates and waits of accesses, and why they missed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..decide.dispatch import Visit
from .parts import filled, parts_of
from .recording import CACHE_HIT, LATE, MISS, Array, Recording, ratio

#: Why an access missed: its expert was never used before; it would have been found without prefetching; neither.
MISS_CAUSES = ("compulsory", "pollution", "capacity")


@dataclass(frozen=True)
class AccessSums:
    """What rates of accesses are made of: how many there were, hit and came late, and what all and late ones waited.

    `missed_alone` is what the same cache without prefetch misses; None where nothing is prefetched.
    """

    accesses: int
    hits: int
    late: int
    waited_ns: int
    late_ns: int
    missed_alone: int | None


def accesses_from(recording: Recording, shadow_misses: Array | None, first_step: int = 0) -> AccessSums:
    """Returns the sums over one GPU's accesses from a step on; `shadow_misses` as `gpu_metrics` takes them."""
    layers = len(recording.expert_bytes)
    missed = None
    if shadow_misses is not None:
        first_key = first_step * layers * recording.manager.experts * layers
        missed = sum(int(np.count_nonzero(shadow_misses[part] >= first_key)) for part in parts_of(len(shadow_misses)))
    sums = np.zeros(5, dtype=np.int64)
    for part in parts_of(len(recording.outcomes)):
        outcomes, waits_ns = recording.outcomes[part], recording.wait_ns[part]
        if first_step:
            there = recording.access_visit[part] >= first_step * layers
            outcomes, waits_ns = outcomes[there], waits_ns[there]
        behind = outcomes == LATE
        found = np.count_nonzero(outcomes <= CACHE_HIT)
        sums += [len(outcomes), found, np.count_nonzero(behind), waits_ns.sum(), waits_ns[behind].sum()]
    accesses, hits, late, waited_ns, late_ns = sums.tolist()
    return AccessSums(accesses, hits, late, waited_ns, late_ns, missed)


#: The names of what `access_rates` returns.
ACCESS_RATES = ("hit_rate", "hit_rate_without_prefetch", "late_rate", "late_wait_ms", "access_latency_ms")


def access_rates(each: Sequence[AccessSums]) -> dict[str, float | None]:
    """Returns the rates and mean waits of all GPUs' accesses together, by ACCESS_RATES."""
    accesses, late = sum(gpu.accesses for gpu in each), sum(gpu.late for gpu in each)
    alone = [gpu.missed_alone for gpu in each if gpu.missed_alone is not None]
    values = (
        ratio(sum(gpu.hits for gpu in each), accesses),
        ratio(accesses - sum(alone), accesses) if alone else None,
        ratio(late, accesses),
        ratio(sum(gpu.late_ns for gpu in each) / 1e6, late),
        ratio(sum(gpu.waited_ns for gpu in each) / 1e6, accesses),
    )
    return dict(zip(ACCESS_RATES, values, strict=True))


def miss_causes(recording: Recording, shadow_misses: Array | None) -> Array:
    """Returns why each access missed (accesses,): an index into MISS_CAUSES; -1 for one that did not.

    Compulsory and capacity as in Hill & Smith (1989), "Evaluating associativity in CPU caches"; pollution is the
    prefetcher's doing: the same cache without it, in a shadow run, had the expert.
    """
    total = recording.manager.experts * len(recording.expert_bytes)
    visits, experts, outcomes = recording.access_visit, recording.access_expert, recording.outcomes
    first = _first_accesses(recording, total)
    ordered = None if shadow_misses is None else np.append(np.sort(shadow_misses), np.iinfo(np.int64).max)

    def of(part: slice) -> Array:
        missed = np.flatnonzero(outcomes[part] == MISS)
        used = experts[part][missed]
        cause = np.full(part.stop - part.start, -1, dtype=np.int8)
        cause[missed] = 2
        if ordered is not None:  # keys that are nearly in order are found sooner than by sorting them
            keys = visits[part][missed].astype(np.int64) * total + used
            cause[missed[ordered[np.searchsorted(ordered, keys)] != keys]] = 1
        cause[missed[first[used] == missed + part.start]] = 0
        return cause

    return filled(recording.spans, len(outcomes), np.int8, of)


def _first_accesses(recording: Recording, total: int) -> Array:
    """Returns the number of the first access of each of `total` experts (experts,), in order of visits; -1 for none.

    Accesses that have a copy stand in this order, and so do, behind them, those that needed none.
    """
    visits, experts = recording.access_visit, recording.access_expert
    copied, never = len(recording.decoded.accesses), np.iinfo(np.int64).max
    first, visit = np.full(total, -1, dtype=np.int64), np.full(total, never)
    for start, stop in ((0, copied), (copied, len(visits))):
        for part in parts_of(stop - start):
            used = experts[start + part.start : start + part.stop]
            of_part, places = np.unique(used, return_index=True)
            numbers = places + start + part.start
            earlier = visits[numbers] < visit[of_part]
            first[of_part[earlier]], visit[of_part[earlier]] = numbers[earlier], visits[numbers[earlier]]
    return first


def miss_keys(visits: Iterable[Visit], total_experts: int) -> Array:
    """Returns one integer per miss of dispatched visits: visit * experts of the model + expert."""
    return np.array(
        [visit.number * total_experts + expert for visit in visits for expert in visit.missed()],
        dtype=np.int64,
    )
