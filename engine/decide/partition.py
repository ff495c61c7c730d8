"""How a budget is divided over the layers' pools where it brings the most hits, measured on the trace itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ...workloads.statistics import lru_depths
from ...workloads.trace import RoutingTrace
from .pools import check_sizes, pool_budgets


def divider(scope: str, expert_bytes: Sequence[int], trace: RoutingTrace) -> Callable[[int], list[int]]:
    """Returns what turns a budget in bytes into the bytes of each pool: one for all layers, or one a layer.

    That raises ValueError if the scope does not suit the sizes, BudgetError if a pool cannot hold one expert.
    """
    if scope != "benefit":
        return partial(pool_budgets, expert_bytes, scope=scope)
    check_sizes(expert_bytes, scope)
    hits, size_bytes = hits_by_slots(trace), expert_bytes[0]

    def divide(budget_bytes: int) -> list[int]:
        pool_budgets(expert_bytes, budget_bytes, "per-layer")  # refuses a budget under one expert a layer
        return [slots * size_bytes for slots in most_hits(hits, budget_bytes // size_bytes)]

    return divide


def hits_by_slots(trace: RoutingTrace) -> npt.NDArray[np.int64]:
    """Returns the LRU hits of each layer for 0 to all experts in memory (layers, experts + 1), at batch 1.

    By stack distance, exact from top-k slots on; with fewer a visit is served in waves, and no hits are counted.
    """
    experts = trace.num_experts
    depths = lru_depths(trace, "per-layer")
    chosen: npt.NDArray[Any] = (
        np.full((trace.tokens, trace.layers), trace.k) if trace.made is None else trace.made.sum(axis=2)
    )
    hits = np.zeros((trace.layers, experts + 1), dtype=np.int64)
    for layer, found in enumerate(np.split(depths, np.cumsum(chosen.sum(axis=0))[:-1])):
        needed = np.maximum(found[found >= 0] + 1, chosen[:, layer].max())
        hits[layer] = np.cumsum(np.bincount(needed, minlength=experts + 1))
    return hits


def most_hits(hits: npt.NDArray[np.int64], slots: int) -> list[int]:
    """Returns how many slots each layer gets, at least one, so that all layers' hits together are the most.

    `hits` (layers, experts + 1) are those with 0, 1, … slots. The dynamic program of AdapMoE (Zhong et al. 2024,
    arXiv:2408.10284, section 4.3): best(l, t) = max over c of best(l - 1, t - c) + hits(l, c). Ties go to fewer slots.
    """
    layers, most = hits.shape[0], hits.shape[1] - 1
    slots = min(slots, layers * most)
    best = np.full(slots + 1, np.iinfo(np.int64).min // 2)
    best[0] = 0
    choice = np.zeros((layers, slots + 1), dtype=np.int64)
    for layer in range(layers):
        reached = np.full_like(best, np.iinfo(np.int64).min // 2)
        for count in range(1, min(most, slots) + 1):
            value = best[: slots + 1 - count] + hits[layer, count]
            better = value > reached[count:]
            reached[count:][better] = value[better]
            choice[layer, count:][better] = count
        best = reached
    left = int(np.argmax(best))
    chosen = []
    for layer in range(layers - 1, -1, -1):
        chosen.append(int(choice[layer, left]))
        left -= chosen[-1]
    return chosen[::-1]
