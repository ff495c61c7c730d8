"""Statistics of a routing trace: how skewed, how repetitive, and what an LRU cache could make of it.

All of them are exact and take the whole trace; nothing is sampled. Rows that `present` leaves out count nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from . import stacks
from .batches import DECODE, PREFILL
from .trace import RoutingTrace, by_sequence

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Scope = Literal["global", "per-layer"]

#: One LRU over the experts of all layers, or one of the same size for each layer.
SCOPES: tuple[Scope, ...] = ("global", "per-layer")
#: The shares of all experts for which `summary` gives an LRU hit rate.
SUMMARY_SHARES = (0.05, 0.10, 0.25, 0.50, 0.75)


def popularity(trace: RoutingTrace) -> IntArray:
    """Returns how often each expert was chosen, (layers, num_experts)."""
    return np.stack(
        [np.bincount(_chosen(trace, layer), minlength=trace.num_experts) for layer in range(trace.layers)]
    ).astype(np.int64)


def _chosen(trace: RoutingTrace, layer: int) -> npt.NDArray[Any]:
    """Returns the choices made at one layer, one after the other."""
    chosen = trace.experts[:, layer]
    return chosen.reshape(-1) if trace.made is None else chosen[trace.made[:, layer]]


def tokens_by_sequence(trace: RoutingTrace) -> list[int]:
    """Returns how many tokens each sequence has, in order of their numbers."""
    lengths: list[int] = np.unique(trace.sequence, return_counts=True)[1].tolist()
    return lengths


def gini(counts: npt.ArrayLike) -> FloatArray:
    """Returns the Gini coefficient along the last axis: 0 all equal, (n - 1) / n all in one; nan where all are 0.

    With the counts ascending and i = 1..n: sum((2i - n - 1) x_i) / (n sum(x)). Gini, "Variabilità e
    mutabilità" (1912), in the form of Sen, "On Economic Inequality" (1973).
    """
    ordered = np.sort(np.asarray(counts, dtype=np.float64), axis=-1)
    n = ordered.shape[-1]
    rank = 2.0 * np.arange(1, n + 1) - n - 1
    return _divide((ordered * rank).sum(axis=-1), n * ordered.sum(axis=-1))


def top_share(counts: npt.ArrayLike, share: float = 0.1) -> FloatArray:
    """Returns what part of all choices falls on the most popular `share` of experts, along the last axis.

    A share that is no whole number of experts takes part of the next one (the Lorenz curve, interpolated), so that
    uniform counts give exactly `share` for any number of experts. nan where all counts are 0.
    """
    if not 0 < share <= 1:
        raise InputError(f"share = {share!r}: must be a fraction above 0, at most 1")
    ordered = -np.sort(-np.asarray(counts, dtype=np.float64), axis=-1)
    taken = np.clip(share * ordered.shape[-1] - np.arange(ordered.shape[-1]), 0, 1)
    return _divide((ordered * taken).sum(axis=-1), ordered.sum(axis=-1))


def normalized_entropy(counts: npt.ArrayLike) -> FloatArray:
    """Returns the entropy of the counts over that of equal ones, along the last axis: 1 uniform, 0 all in one.

    Shannon, "A Mathematical Theory of Communication" (1948). nan where all counts are 0, or there is one expert.
    """
    counts = np.asarray(counts, dtype=np.float64)
    p = _divide(counts, counts.sum(axis=-1, keepdims=True))
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)
    return _divide(entropy, np.full_like(entropy, math.log(counts.shape[-1])))


def reuse(trace: RoutingTrace, lag: int = 1) -> FloatArray:
    """Return, by layer, the mean of |experts(t) & experts(t - lag)| / k; (layers,), nan where no token counts.

    Where tokens choose fewer than k, k is what t chooses, and the mean is over choices.

    Pairs are rows of one sequence whose positions differ by `lag`, routed at that layer both times.
    Choices drawn uniformly and independently give k / num_experts. Raises ValueError if `lag` is below 1.
    """
    if lag < 1:
        raise InputError(f"lag = {lag}: must be at least 1")
    order = by_sequence(trace.sequence)
    # Sequence and position as one number: ascending in this order, so that "lag before" is found by bisection.
    key = (trace.sequence[order].astype(np.int64) << 32) | trace.position[order]
    found = np.searchsorted(key, key - lag)
    there = key[found] == key - lag
    now, before = order[there], order[found[there]]
    chosen, earlier = trace.experts[now], trace.experts[before]
    made = trace.made
    if made is not None:  # what was not chosen gets numbers of its own, which nothing shares
        none, slots = trace.num_experts, np.arange(trace.k)
        chosen, earlier = (
            np.where(made[now], chosen, none + slots),
            np.where(made[before], earlier, none + trace.k + slots),
        )
    # Both are distinct each, so that what they share stands side by side once they are sorted together.
    together = np.sort(np.concatenate([chosen, earlier], axis=-1), axis=-1)
    shared = (together[..., 1:] == together[..., :-1]).sum(axis=-1, dtype=np.uint16)
    if made is None or trace.routed is None:
        counted = np.full(trace.layers, trace.k * len(now), dtype=np.int64)
    else:
        both = trace.routed[now] & trace.routed[before]
        shared[~both] = 0
        counted = (made[now].sum(axis=-1) * both).sum(axis=0)
    return _divide(shared.sum(axis=0, dtype=np.int64), counted)


def lru_depths(trace: RoutingTrace, scope: Scope = "global") -> IntArray:
    """Returns each access's depth in the LRU stack when its layer visit begins, -1 for a first access.

    The depth is how many other experts (of the same layer, if `scope` is "per-layer") were used since the expert
    was, not counting those that the visit itself asks for. The order is that of batch 1: tokens in file order,
    layers in order, the router's order within; one access per routed (token, layer, slot), layer by layer for
    "per-layer". Shape (accesses,).

    Stack distances, as in stacks.py.
    """
    if scope not in SCOPES:
        raise InputError(f"scope = {scope!r}: choose one of {', '.join(SCOPES)}")
    layer = np.arange(trace.layers, dtype=np.int64)[:, None] * trace.num_experts
    # Layers never share an expert, so one after the other their streams do not disturb each other.
    visits = trace.experts + layer
    made = trace.made
    if scope == "per-layer":
        visits = visits.swapaxes(0, 1)
        made = None if made is None else made.swapaxes(0, 1)
    items = (visits if made is None else visits[made]).reshape(-1).astype(np.int32)
    starts = np.arange(0, len(items) + 1, trace.k)
    if made is not None:
        counts = made.sum(axis=-1).reshape(-1)
        starts = np.concatenate([[0], np.cumsum(counts[counts > 0])])
    return stacks.lru_depths(items, items, starts, trace.layers * trace.num_experts).astype(np.int64)


def capacity_in_experts(trace: RoutingTrace, capacity: float, scope: Scope = "global") -> int:
    """Returns a capacity as a number of experts: an int is one, a float is a share of all (rounded down).

    "All" are the experts of one layer if `scope` is "per-layer". Raises ValueError if it is negative or the share is
    above 1.
    """
    everything = int(trace.experts_by_layer.sum()) if scope == "global" else trace.num_experts
    if isinstance(capacity, (int, np.integer)) and not isinstance(capacity, bool) and capacity >= 0:
        return int(capacity)
    if isinstance(capacity, (float, np.floating)) and 0 <= capacity <= 1:
        # 0.1 * 30 is a little less than 3.
        return math.floor(capacity * everything + 1e-9)
    raise InputError(f"capacity = {capacity!r}: must be a share 0.0..1.0 of all experts, or an int of experts")


def lru_hit_rates(trace: RoutingTrace, capacities: Sequence[float], scope: Scope = "global") -> FloatArray:
    """Returns the hit rate of a demand-filled LRU at batch 1, experts of equal size, for each capacity.

    Capacities are ints (experts; of each layer, if `scope` is "per-layer") or shares, as `capacity_in_experts` reads
    them. The rule is the memory manager's: a layer visit looks all its k experts up first, then admits the misses
    while all k are pinned, and leaves them most recent in the router's order. From k experts on, what is then
    in memory is the top of the LRU stack, so that one pass gives all capacities, exactly. Below k a visit does
    not fit and is served in waves, to which no stack belongs: nan.
    """
    depths = lru_depths(trace, scope)
    at_depth = np.bincount(depths[depths >= 0])
    hits_below = np.concatenate([[0], np.cumsum(at_depth)])
    experts = np.array([capacity_in_experts(trace, each, scope) for each in capacities], dtype=np.int64)
    hits = hits_below[np.minimum(experts, len(hits_below) - 1)]
    rates = _divide(hits, np.full(len(experts), len(depths)))
    return np.where(experts < trace.k, np.nan, rates)


def summary(trace: RoutingTrace) -> dict[str, Any]:
    """Returns the trace in numbers, ready for JSON; a rate that is not defined is None.

    `lru_hit_rate[scope]["25%"]` is the LRU hit rate with a quarter of the experts, None where that is
    less than one visit's k. `reuse.by_chance` is k / num_experts.
    """
    counts = popularity(trace)
    skew = {
        "gini": gini(counts),
        "top_10_percent_share": top_share(counts, 0.1),
        "normalized_entropy": normalized_entropy(counts),
    }
    return {
        "model": trace.meta.get("model"),
        "tokens": trace.tokens,
        "layers": trace.layers,
        "k": trace.k,
        "num_experts": trace.num_experts,
        "sequences": len(np.unique(trace.sequence)),
        "prefill_tokens": int((trace.phase == PREFILL).sum()),
        "decode_tokens": int((trace.phase == DECODE).sum()),
        "accesses": int(counts.sum()),
        "skew": {name: _mean_and_layers(values) for name, values in skew.items()},
        "reuse": {"lag": 1, "by_chance": trace.k / trace.num_experts, **_mean_and_layers(reuse(trace))},
        "lru_hit_rate": {
            scope: {
                f"{share:.0%}": _or_none(rate)
                for share, rate in zip(SUMMARY_SHARES, lru_hit_rates(trace, SUMMARY_SHARES, scope), strict=True)
            }
            for scope in SCOPES
        },
    }


def _mean_and_layers(values: FloatArray) -> dict[str, Any]:
    known = values[~np.isnan(values)]
    return {
        "mean": float(known.mean()) if len(known) else None,
        "per_layer": [_or_none(value) for value in values],
    }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _divide(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> FloatArray:
    """Divide; nan where there is nothing to divide by."""
    shape = np.broadcast_shapes(part.shape, whole.shape)
    out: FloatArray = np.full(shape, np.nan)
    np.divide(part, whole, out=out, where=whole != 0)
    return out
