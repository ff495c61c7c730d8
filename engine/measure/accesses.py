"""Rates and waits of accesses, and why they missed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..decide.dispatch import Visit
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
    outcomes, waits_ns = recording.outcomes, recording.wait_ns
    if first_step:
        there = recording.access_visit >= first_step * layers
        outcomes, waits_ns = outcomes[there], waits_ns[there]
    missed = None
    if shadow_misses is not None:
        first_key = first_step * layers * recording.manager.experts * layers
        missed = int(np.count_nonzero(shadow_misses >= first_key))
    late = outcomes == LATE
    return AccessSums(
        len(outcomes),
        int(np.count_nonzero(outcomes <= CACHE_HIT)),
        int(np.count_nonzero(late)),
        int(waits_ns.sum()),
        int(waits_ns[late].sum()),
        missed,
    )


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
    missed = np.flatnonzero(recording.outcomes == MISS)
    first = np.full(recording.manager.experts * len(recording.expert_bytes), -1, dtype=np.int64)
    backwards = np.argsort(recording.access_visit, kind="stable")[::-1]
    first[recording.access_expert[backwards]] = backwards  # the one that is written last stays
    cause = np.full(len(recording.outcomes), -1, dtype=np.int64)
    cause[missed] = 2
    if shadow_misses is not None:
        cause[missed[~_among(_access_keys(recording)[missed], shadow_misses)]] = 1
    cause[missed[first[recording.access_expert[missed]] == missed]] = 0
    return cause


def _among(keys: Array, known: Array) -> Array:
    """Returns which keys are known; keys that are nearly in order are found sooner than by sorting them."""
    ordered = np.append(np.sort(known), np.iinfo(np.int64).max)
    found: Array = ordered[np.searchsorted(ordered, keys)] == keys
    return found


def miss_keys(visits: Iterable[Visit], total_experts: int) -> Array:
    """Returns one integer per miss of dispatched visits: visit * experts of the model + expert."""
    return np.array(
        [visit.number * total_experts + expert for visit in visits for expert in visit.missed()],
        dtype=np.int64,
    )


def _access_keys(recording: Recording) -> Array:
    total = recording.manager.experts * len(recording.expert_bytes)
    keys: Array = recording.access_visit.astype(np.int64) * total + recording.access_expert
    return keys
