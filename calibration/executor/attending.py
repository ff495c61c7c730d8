"""Attention over a context, in an execution: at how many keys each step's rows look in each layer.

A decode step attends once for each attention of a layer, all sequences in one kernel as far behind as one another. So
its rows must stand at one position, and its heads be those that the kernels have: plain ones of 16 bits.
"""

from __future__ import annotations

import numpy as np

from ...engine.scenario.inputs import Inputs
from ...workloads.batches import DECODE
from ...workloads.model import Attending, Model
from ..device.attention import Attended

#: The element types that attention is made in.
_DTYPES = ("bfloat16", "float16")


class Attends:
    """What each visit of a run attends to; nothing without a `workload.context`."""

    def __init__(self, inputs: Inputs) -> None:
        start = inputs.scenario.workload.context
        self._model = inputs.model
        self._steps: list[tuple[int, int]] = []
        if start is not None:
            positions = inputs.trace.position
            self._steps = [(len(step.rows), int(positions[step.rows[0]]) + start + 1) for step in inputs.steps]
        self._most_keys = max((position for _, position in self._steps), default=0)

    def of(self, visit: int) -> tuple[Attended, ...]:
        """Returns the attentions of a visit, one behind the other."""
        if not self._steps:
            return ()
        step, layer = divmod(visit, self._model.layers)
        sequences, position = self._steps[step]
        return tuple(
            Attended(
                number, each.heads, each.kv_heads, each.head_dim, sequences,
                max(1, int(each.keys(np.array([float(position)]))[0])), self._most_keys,
            )
            for number, each in enumerate(self._model.attention_of(layer))
        )  # fmt: skip


def without_attention(inputs: Inputs) -> list[str]:
    """Returns what of a scenario's attention has no kernels, in words; nothing if all has, or none is asked for."""
    workload, parallel, model = inputs.scenario.workload, inputs.scenario.parallel, inputs.model
    if workload.context is None:
        return []
    several = parallel.stages > 1 or parallel.gpus > 1
    decoding = all(step.phase == DECODE for step in inputs.steps)
    positions, sequences = inputs.trace.position, inputs.trace.sequence
    apart = any(
        len(np.unique(positions[step.rows])) > 1 or len(np.unique(sequences[step.rows])) < len(step.rows)
        for step in inputs.steps
    )
    return [
        text
        for wrong, text in (
            (several, "workload.context on several GPUs: attention is executed on one: leave [parallel] out"),
            (not decoding, "workload.context: only decoding attends here: set workload.prefill = 'skip'"),
            (
                decoding and apart,
                "workload.context: sequences of one step stand at different positions: give as many sequences of one "
                "length as workload.batch",
            ),
        )
        if wrong
    ] + _of_heads(model)


def _of_heads(model: Model) -> list[str]:
    """Returns what is wrong with a model's heads."""
    if model.dense_dtype not in _DTYPES:
        return [f"model {model.name}: dense_dtype = {model.dense_dtype!r}: attention is made in {' or '.join(_DTYPES)}"]
    kinds = {each for layer in range(model.layers) for each in model.attention_of(layer)}
    odd = sum(not _is_plain(each) for each in kinds)
    text = f"model {model.name}: {odd} of its kinds of attention have no kernels: only plain heads of 16 bits"
    return [text] if odd else []


def _is_plain(each: Attending) -> bool:
    """Whether heads share keys in equal parts, look at each, and cache keys and values of their width in 16 bits."""
    divides = each.heads > 0 and each.heads % each.kv_heads == 0
    return divides and each.ratio == 1 and not each.latent_dim and each.key_bytes == 4 * each.kv_heads * each.head_dim
