"""Draft layers: each makes a draft, behind the model's own layers, with experts that are kept as all others are.

This is how multi-token prediction works (DeepSeek-V3, arXiv:2412.19437, section 2.2): the module that predicts k tokens
ahead is a block of the model's own kind, whose input is made of the hidden state and the embedding of the token k on,
and whose output goes through the shared head. It sees every row of a step, for its own KV cache has to be filled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ...dtypes import bits_of
from ...workloads.model import Model
from ...workloads.trace import RoutingTrace
from ...workloads.trace_checks import KNOWN_EXTRA, POPULARITY

#: The axes of the extra arrays that have one of layers.
_AXES = {name: layout.axes for name, layout in KNOWN_EXTRA.items()} | {POPULARITY: ("layer", "expert")}


def with_draft_layers(model: Model, trace: RoutingTrace, count: int) -> tuple[Model, RoutingTrace]:
    """Returns a model and its trace with so many draft layers behind the last layer, each like that one.

    The dense part of a draft layer also makes one input of two (2 hidden x hidden). What no trace says is where its
    router sends a token: the k-th is taken to do with a row as the last layer does with the row k on in its sequence,
    whose token it sees; with the last rows as with the very last. Guesses that named a layer behind the last are none.
    """
    last, joined = model.layers - 1, 2 * model.hidden**2 * bits_of(model.dense_dtype) / 8
    caches, kv_bytes = model.caches, model.kv_bytes_per_token * (model.layers + count) // model.layers
    if caches:
        caches = (*caches[:-1], *(caches[last],) * count, caches[-1])
        kv_bytes = model.kv_bytes_per_token + count * sum(each.bytes_per_token for each in caches[last])
    longer = replace(
        model,
        layers=model.layers + count,
        expert_bytes=model.expert_bytes + model.expert_bytes[-1:] * count,
        dense_bytes=model.dense_bytes + (model.dense_bytes[-1] + round(joined),) * count,
        kv_bytes_per_token=kv_bytes,
        caches=caches,
        attention=model.attention + model.attention[-1:] * count,
        by_layer=model.by_layer + model.by_layer[-1:] * count,
        parameters=None,
        active_parameters=None,
    )
    return longer, _routed(trace, count)


def _routed(trace: RoutingTrace, count: int) -> RoutingTrace:
    """Returns a trace with what so many draft layers choose."""
    ahead = [_rows_ahead(trace, number) for number in range(1, count + 1)]

    def longer(array: Any) -> Any:
        """Returns (tokens, layers, ...) with the last layer's choices of the rows ahead behind it."""
        return None if array is None else np.concatenate([array, *(array[rows, -1:] for rows in ahead)], axis=1)

    def blank(array: Any, nothing: float) -> Any:
        """Returns guesses (tokens, layers, horizons, n) without those that reach behind the last layer."""
        if array is None:
            return None
        longest = np.full((trace.tokens, trace.layers + count, *array.shape[2:]), nothing, dtype=array.dtype)
        longest[:, : trace.layers] = array
        for horizon in range(1, array.shape[2] + 1):
            longest[:, max(0, trace.layers - horizon) :, horizon - 1] = nothing
        return longest

    extra = dict(trace.extra)
    for name, value in trace.extra.items():
        axes = _AXES.get(name, ())
        if axes[:2] == ("row", "layer"):
            extra[name] = longer(value)
        elif axes[:1] == ("layer",):
            extra[name] = np.concatenate([value, np.repeat(value[-1:], count, axis=0)])
    return replace(
        trace,
        experts=longer(trace.experts),
        weights=longer(trace.weights),
        present=longer(trace.present),
        predictions=blank(trace.predictions, -1),
        confidences=blank(trace.confidences, 0),
        extra=extra,
    )


def _rows_ahead(trace: RoutingTrace, count: int) -> npt.NDArray[np.int64]:
    """Returns for each row the one `count` on in its sequence; for the last rows of one, its last."""
    order = np.argsort(trace.sequence, kind="stable")
    sequence = trace.sequence[order]
    ends = np.searchsorted(sequence, sequence, side="right") - 1
    rows = np.empty(trace.tokens, dtype=np.int64)
    rows[order] = order[np.minimum(np.arange(trace.tokens) + count, ends)]
    return rows
