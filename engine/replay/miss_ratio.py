"""Miss-ratio curves: what share of the look-ups misses, for many capacities and several policies.

LRU and Belady's rule are stack algorithms: one pass gives every capacity, exactly, where a pool's experts are of one
size and its largest visit fits. Everything else is replayed, capacity by capacity: in machine code, or by the memory
manager where that has no such policy, some hundred times slower. All ways count what `replay.replay_trace` counts with
the same budget, to the last access.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...words import unknown_name
from ...workloads.batches import Step, plan_steps
from ...workloads.stacks import belady_depths, lru_depths
from ...workloads.trace import RoutingTrace
from ..decide.dispatch import LOOKUPS
from ..decide.lookups import Lookups, list_lookups
from ..decide.memory_manager import MemoryManager
from ..decide.partition import divider
from ..policies.eviction import EVICTION, Setting
from ..scenario.amounts import parse_budget
from .compiled import PoolPolicy, is_compiled, pool_policy, replay_pool
from .guessing import Guessing, goes_by_guesses
from .replay import FOUND, expert_sizes, replay, setting_of

#: The policies that one pass serves, with the depths it finds.
STACKS: dict[str, Callable[[Lookups, int], npt.NDArray[np.int32]]] = {
    "lru": lambda lookups, experts: lru_depths(lookups.experts, lookups.recency, lookups.starts, experts),
    "belady": lambda lookups, experts: belady_depths(lookups.experts, lookups.starts, experts),
}
#: The policies that do on demand alone what another does: nothing is preloaded, or spared from a prefetch.
AS_ON_DEMAND = {"preloaded": "fifo", "payback": "heat"}
#: More points than this no curve shows.
MOST_POINTS = 10_000
#: What is drawn where nothing else is asked for.
DEFAULT_POLICIES = ("fifo", "lru", "lfu", "clock", "s3fifo", "belady")

Progress = Callable[[str, int, int], None]


def miss_ratio_curves(
    trace: RoutingTrace,
    *,
    capacities: Sequence[str] = (),
    points: int = 50,
    policies: Sequence[str] = DEFAULT_POLICIES,
    scope: str = "global",
    lookup: str = "batch",
    batch: int = 1,
    model: str | None = None,
    expert_bytes: int | None = None,
    predictor: str = "transition",
    lookahead: int | None = None,
    weights: str | None = None,
    recall: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Returns the curves as plain data for JSON: `capacities`, and each policy's `hits` and `miss_ratio` beside them.

    `capacities` are budgets such as '25%', '4GiB' or '512experts'; without any, `points` evenly spaced ones up to all
    experts. `predictor`, `lookahead`, `weights` and `recall` are of `Guessing`, for policies that go by guesses; the
    `predictor` of the data is None where no policy does. Raises ValueError on bad input.
    """
    policies = list(dict.fromkeys(policies))
    for policy in policies:
        if policy not in EVICTION:
            raise InputError(unknown_name("policy", policy, EVICTION))
    if lookup not in LOOKUPS:
        raise InputError(unknown_name("lookup", lookup, LOOKUPS))
    guessing = Guessing(predictor, lookahead, weights, recall)
    sizes = expert_sizes(trace, model, expert_bytes, capacities)
    steps = plan_steps(trace.sequence, trace.phase, batch=batch)
    cache = _Cache(trace, steps, sizes or [1] * trace.layers, scope, lookup, guessing)
    budgets = _budgets(trace, capacities, points, cache.sizes, scope)
    hits, accesses = _hits(cache, budgets, policies, progress)
    total_bytes = parse_budget("100%", cache.sizes, trace.num_experts, scope)
    return {
        "model": trace.meta.get("model"),
        "accesses": accesses,
        "scope": scope,
        "lookup": lookup,
        "batch": batch,
        "predictor": predictor if any(goes_by_guesses(policy) for policy in policies) else None,
        "capacities": _described(list(budgets), cache.sizes, total_bytes, exact=bool(sizes)),
        "policies": {
            policy: {
                "hits": found.tolist(),
                "miss_ratio": [1 - count / accesses if accesses else None for count in found.tolist()],
            }
            for policy, found in hits.items()
        },
    }


@dataclass(frozen=True)
class _Cache:
    """What is replayed, with the bytes of an expert of each layer (layers,), and how."""

    trace: RoutingTrace
    steps: Sequence[Step]
    sizes: Sequence[int]
    scope: str
    lookup: str
    guessing: Guessing

    def setting(self, policy: str) -> Setting:
        """Returns what a policy may know beforehand."""
        return setting_of(self.trace, self.steps, policy, self.lookup, self.guessing)


def _hits(
    cache: _Cache, budgets: Mapping[tuple[int, ...], int], policies: Sequence[str], progress: Progress | None
) -> tuple[dict[str, npt.NDArray[np.int64]], int]:
    """Returns how many look-ups each policy finds with each budget, and how many look-ups there are."""
    trace, sizes, shared = cache.trace, cache.sizes, cache.scope == "shared"
    pools = list(budgets)
    layers = [None] if cache.scope in ("global", "shared") else range(trace.layers)
    asked, policies = policies, list(dict.fromkeys(AS_ON_DEMAND.get(policy, policy) for policy in policies))
    hits = {policy: np.zeros(len(pools), dtype=np.int64) for policy in policies}
    in_code = [policy for policy in policies if is_compiled(policy, cache.steps, cache.lookup)]
    in_python = [policy for policy in policies if policy not in in_code]
    settings = {policy: cache.setting(policy) for policy in in_code}
    total = len(layers) * len(in_code) + len(pools) * len(in_python)
    accesses = 0
    for number, layer in enumerate(layers):
        lookups = list_lookups(trace, cache.steps, cache.lookup, layer, shared=shared)
        accesses += len(lookups.experts)
        pool_sizes = sizes[:1] if shared else sizes if layer is None else [sizes[layer]] * trace.layers
        room_bytes = [pool_bytes[number] for pool_bytes in pools]
        for done, policy in enumerate(in_code):
            if progress is not None:
                progress("curves", number * len(in_code) + done, total)
            here = pool_policy(policy, lookups, settings[policy], layer, shared=shared)
            hits[policy] += pool_hits(here, lookups, room_bytes, pool_sizes, trace.num_experts)
    for done, policy in enumerate(in_python):
        if progress is not None:
            progress("curves", len(layers) * len(in_code) + done * len(pools), total)
        hits[policy] += _managed_hits(policy, cache, list(budgets.values()))
    return {policy: hits[AS_ON_DEMAND.get(policy, policy)] for policy in asked}, accesses


def _managed_hits(policy: str, cache: _Cache, budgets: Sequence[int]) -> npt.NDArray[np.int64]:
    """Returns how many look-ups are found with each of these budgets in bytes, by the memory manager."""
    trace, sizes, scope = cache.trace, cache.sizes, cache.scope
    setting, divide = cache.setting(policy), divider(scope, sizes, trace)
    managers = (
        MemoryManager(sizes, trace.num_experts, budget, EVICTION[policy], setting=setting, scope=scope, divide=divide)
        for budget in budgets
    )
    return np.array([replay(trace, cache.steps, each, lookup=cache.lookup).count(FOUND) for each in managers])


def _described(
    pools: Sequence[Sequence[int]], sizes: Sequence[int], total_bytes: int, *, exact: bool
) -> list[dict[str, float | int | None]]:
    """Returns each capacity as a share of all experts, in experts of one size, and in bytes where these are known."""
    return [
        {
            "share": sum(pool_bytes) / total_bytes,
            "experts": sum(pool_bytes) // sizes[0] if min(sizes) == max(sizes) else None,
            "bytes": sum(pool_bytes) if exact else None,
        }
        for pool_bytes in pools
    ]


def pool_hits(
    policy: PoolPolicy, lookups: Lookups, room_bytes: Sequence[int], expert_bytes: Sequence[int], num_experts: int
) -> npt.NDArray[np.int64]:
    """Returns how many of a pool's look-ups are found with each of these budgets; `expert_bytes` (layers,)."""
    hits = np.zeros(len(room_bytes), dtype=np.int64)
    replayed = list(range(len(room_bytes)))
    if policy.eviction in STACKS and min(expert_bytes) == max(expert_bytes):
        slots = np.array(room_bytes, dtype=np.int64) // expert_bytes[0]
        depths = STACKS[policy.eviction](lookups, len(expert_bytes) * num_experts)
        hits_below = np.concatenate([[0], np.cumsum(np.bincount(depths[depths >= 0]))])
        hits[:] = hits_below[np.minimum(slots, len(hits_below) - 1)]
        replayed = np.flatnonzero(slots < lookups.largest_visit).tolist()
    found = np.empty(len(lookups.experts), dtype=np.uint8)
    for at in replayed:
        replay_pool(policy, lookups, room_bytes[at], expert_bytes, num_experts, found)
        hits[at] = np.count_nonzero(found)
    return hits


def _budgets(
    trace: RoutingTrace, capacities: Sequence[str], points: int, expert_bytes: Sequence[int], scope: str
) -> dict[tuple[int, ...], int]:
    """Returns the budget of each capacity by the bytes of each of its pools, ascending, each once."""
    divide = divider(scope, expert_bytes, trace)
    if capacities:
        if len(capacities) > MOST_POINTS:
            raise InputError(f"capacities: {len(capacities):,} are given: must be at most {MOST_POINTS:,}")
        budgets = [parse_budget(capacity, expert_bytes, trace.num_experts, scope) for capacity in capacities]
    else:
        if not 1 <= points <= MOST_POINTS:
            raise InputError(f"points = {points}: must be at least 1, and at most {MOST_POINTS:,}")
        total_bytes = parse_budget("100%", expert_bytes, trace.num_experts, scope)
        least_bytes = max(expert_bytes) * (1 if scope in ("global", "shared") else trace.layers)
        budgets = [max(least_bytes, total_bytes * point // points) for point in range(1, points + 1)]
    found = {tuple(divide(budget)): budget for budget in budgets}
    return {pools: found[pools] for pools in sorted(found, key=sum)}
