"""Mapping: a trace of one model made to drive another, by a rule that the new trace states.

Such a trace has the skew and the reuse of the old one, and nothing of the other model's own routing: use it where no
trace of that model can be had, and say so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .keyed_random import uniform
from .trace import RoutingTrace
from .trace_limits import TraceError

Array = npt.NDArray[Any]


def map_trace(
    trace: RoutingTrace, layers: int, experts: int, top_k: int, model: str = "", seed: int = 0
) -> RoutingTrace:
    """Returns the trace as one of a model with so many layers, experts and choices.

    Layer l takes the choices of layer l x old / new. An expert stands for its share of the new ones, and is one of them
    for a whole sequence, drawn by `seed`; where there are fewer new ones, several become one, and a token's second
    choice of it takes the next that is free. Of more choices than wanted the first stay; missing ones are drawn by the
    layer's popularity. Guesses, and weights where choices were added or joined, are left out.

    Raises TraceError if there are more choices than experts.
    """
    if not 1 <= top_k <= experts:
        raise TraceError(f"top_k = {top_k}: must be 1 to experts = {experts}")
    source_of = np.arange(layers) * trace.layers // layers
    chosen = trace.experts[:, source_of, : min(top_k, trace.k)].astype(np.int64)
    if experts != trace.num_experts:
        chosen = _resized(trace, chosen, experts, seed)
    kept = chosen.shape[2]
    if top_k > kept:
        chosen = _extended(trace, chosen, experts, top_k, seed)
    chosen = _distinct(chosen, experts)
    weights = trace.weights
    if weights is not None:
        weights = weights[:, source_of, :top_k] if top_k <= trace.k and experts >= trace.num_experts else None
    rule = (
        f"layers {trace.layers} to {layers} in proportion; experts {trace.num_experts} to {experts}, each for its "
        f"share; choices {trace.k} to {top_k}; seed {seed}"
    )
    # A layer that chose fewer than others still does, unless more are wanted of all.
    present = trace.routed if top_k > trace.k or trace.made is None else trace.made[:, :, :top_k]
    meta = {"model": model, "mapping": rule, "mapped_from": str(trace.meta.get("model", ""))}
    return RoutingTrace(
        experts=chosen,
        num_experts=experts,
        weights=weights,
        sequence=trace.sequence,
        position=trace.position,
        phase=trace.phase,
        present=None if present is None else present[:, source_of],
        meta=meta,
    )


def _resized(trace: RoutingTrace, chosen: Array, experts: int, seed: int) -> Array:
    """Returns choices (tokens, layers, k) of the old experts as choices of the new ones."""
    old = trace.num_experts
    low = chosen * experts // old
    share = np.maximum(1, (chosen + 1) * experts // old - low)
    if experts < old:
        return low
    keys = (trace.sequence[:, None, None], np.arange(chosen.shape[1])[None, :, None], chosen)
    which: Array = (uniform(seed, *keys) * share).astype(np.int64)
    return low + which


def _extended(trace: RoutingTrace, chosen: Array, experts: int, top_k: int, seed: int) -> Array:
    """Returns choices with more of them, drawn by the popularity of each layer's experts."""
    tokens, layers, kept = chosen.shape
    more = np.empty((tokens, layers, top_k - kept), dtype=np.int64)
    slots = np.arange(kept, top_k)
    for layer in range(layers):
        counts = np.bincount(chosen[:, layer].ravel(), minlength=experts) + 1  # none is impossible
        shares = np.cumsum(counts) / counts.sum()
        drawn = uniform(seed + 1, layer, np.arange(tokens)[:, None], slots[None, :])
        more[:, layer] = np.minimum(np.searchsorted(shares, drawn, side="right"), experts - 1)
    return np.concatenate([chosen, more], axis=2)


def _distinct(chosen: Array, experts: int) -> Array:
    """Returns choices without any twice: a later one takes the next expert that no earlier one has."""
    for slot in range(1, chosen.shape[2]):
        while True:
            same = (chosen[:, :, :slot] == chosen[:, :, slot : slot + 1]).any(axis=2)
            if not same.any():
                break
            chosen[:, :, slot] = np.where(same, (chosen[:, :, slot] + 1) % experts, chosen[:, :, slot])
    return chosen
