"""Traces of models whose layers differ in the number of their experts, or of those that a token takes.

Such a trace is as wide as the widest layer: a layer with fewer choices leaves the last ones unmade (`present`), one
with fewer experts never names the others (`layer_experts`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .model import Model
from .trace import RoutingTrace
from .trace_checks import LAYER_EXPERTS, POPULARITY
from .trace_limits import TraceError


def of_model(model: Model, draw: Callable[[int, int], RoutingTrace]) -> RoutingTrace:
    """Returns a trace of a model; `draw` makes one of all its layers with so many experts and choices in each.

    Where layers differ, each is taken from the one that is drawn with its own numbers; all are drawn by the same luck.
    """
    if not model.by_layer:
        return draw(model.experts, model.top_k)
    shapes = [model.routed(layer)[:2] for layer in range(model.layers)]
    drawn = {shape: draw(*shape) for shape in dict.fromkeys(shapes)}
    first = drawn[shapes[0]]
    size = (first.tokens, model.layers, model.top_k)
    experts, present = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.bool_)
    weights = None if first.weights is None else np.zeros(size, dtype=np.float16)
    for layer, (count, top_k) in enumerate(shapes):
        here = drawn[count, top_k]
        made = True if here.made is None else here.made[:, layer]
        experts[:, layer, :top_k] = here.experts[:, layer]
        present[:, layer, :top_k] = made
        if weights is not None and here.weights is not None:
            weights[:, layer, :top_k] = here.weights[:, layer]
    extra = {LAYER_EXPERTS: np.array(model.experts_by_layer)}
    if POPULARITY in first.extra:
        wide = np.zeros((model.layers, model.experts))
        for layer, shape in enumerate(shapes):
            wide[layer, : shape[0]] = drawn[shape].extra[POPULARITY][layer]
        extra[POPULARITY] = wide
    trace = RoutingTrace(
        experts,
        model.experts,
        weights=weights,
        sequence=first.sequence,
        position=first.position,
        phase=first.phase,
        present=present,
        meta={**first.meta, "num_experts": model.experts},
        extra=extra,
    )
    trace.check("trace")
    return trace


def fitted_to(model: Model, trace: RoutingTrace) -> RoutingTrace:
    """Returns a trace that says how many experts each layer of its model has.

    Raises TraceError where a layer of the trace has more choices than the model's, or an expert that it lacks.
    """
    for layer in range(model.layers if model.by_layer else 0):
        count, top_k, _ = model.routed(layer)
        chosen = trace.experts[:, layer]
        made = np.ones(chosen.shape, dtype=np.bool_) if trace.made is None else trace.made[:, layer]
        if made[:, top_k:].any():
            raise TraceError(f"layer {layer} has tokens with {made.sum(axis=1).max()} choices: {top_k} at most")
        if (chosen[made] >= count).any():
            raise TraceError(f"layer {layer} names expert {chosen[made].max()}: it has {count}, 0 to {count - 1}")
    if not model.by_layer or LAYER_EXPERTS in trace.extra:
        return trace
    return trace.with_extra({LAYER_EXPERTS: np.array(model.experts_by_layer)})
