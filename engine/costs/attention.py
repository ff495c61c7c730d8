"""What attention adds to a layer's dense part with what is cached, where a scenario says where its sequences start.

A row of a step attends to what its sequence has cached, within each cache's window. What that adds is taken at the mean
over all rows of a phase: a run's sum is right where it grows with every position, and its steps are alike. Where it was
measured for the dense part's shape, decoding goes by these points, and beyond them as between the last two; else by the
bytes that are read and the operations that are made, and the run names the estimate.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ...resources.profile import Profile
from ...resources.profile_costs import KernelPoint
from ...workloads.batches import DECODE, PREFILL

if TYPE_CHECKING:
    from ..scenario.inputs import Inputs

#: Rows of a prompt that read the cache together, a tile of FlashAttention's kernels (Dao 2023, arXiv:2307.08691).
TILE_ROWS = 128

Numbers = npt.NDArray[np.float64]


class Attention:
    """What attention adds on one GPU, by layer, tokens and phase; nothing where a scenario names no context."""

    def __init__(self, inputs: Inputs, profile: Profile, dispatch: str) -> None:
        self._model, self._rule = inputs.model, profile.compute.rule
        self._contexts: dict[int, Numbers] = {}
        start = inputs.scenario.workload.context
        if start is None:
            return
        self._contexts = {phase: _contexts(inputs, phase, start) for phase in (PREFILL, DECODE)}
        known = (self._model.hidden, self._model.dense_dtype, dispatch, self._model.dense_kernels)
        points = [point for point in profile.compute.dense if _shape(point) == known]
        if self._rule.device is None:  # a rule of this machine's own goes before another machine's points
            points = [point for point in points if point.device is None]
        sizes = {point.weight_bytes for point in points}
        growths = {size: _growth(point for point in points if point.weight_bytes == size) for size in sizes}
        self._growth = {size: growth for size, growth in growths.items() if growth is not None}

    def ns(self, layer: int, tokens: int, phase: int) -> tuple[float, str]:
        """Returns what it adds to a layer's dense part over so many tokens, in ns, and how that is estimated.

        The words are empty where it was measured.
        """
        contexts = self._contexts.get(phase)
        if contexts is None or not len(contexts):
            return 0.0, ""
        growth = self._growth.get(self._model.dense_bytes[layer])
        if phase == DECODE and growth is not None:
            return tokens * _along(contexts, *growth), ""
        rule, passes = self._rule, tokens if phase == DECODE else -(-tokens // TILE_ROWS)
        read_ns = passes * self._read_bytes(layer, contexts) * 1e9 / rule.bytes_per_second
        positions = float(self._within(layer, contexts).mean())
        flops_ns = 4 * tokens * self._model.hidden * positions * 1e9 / rule.flops_per_second
        words = (
            f"bytes of the cache / {rule.bytes_per_second} B/s, read once for {TILE_ROWS} rows of a prompt, or "
            f"4 x hidden x positions x tokens / {rule.flops_per_second} FLOP/s if that is more ({rule.provenance})"
        )
        return max(read_ns, flops_ns), words

    def _read_bytes(self, layer: int, contexts: Numbers) -> float:
        """Returns the mean of what one row reads of a layer's caches."""
        model = self._model
        if not model.caches:
            return model.kv_bytes_per_token / model.layers * float(contexts.mean())
        return sum(
            cache.bytes_per_token * float(np.minimum(contexts, cache.window or np.inf).mean())
            for cache in model.caches[layer]
        )

    def _within(self, layer: int, contexts: Numbers) -> Numbers:
        """Returns how many positions each row attends to, within the widest window of a layer's caches."""
        if not self._model.caches:
            return contexts
        widest = [cache.window or np.inf for cache in self._model.caches[layer] if cache.bytes_per_token]
        return np.minimum(contexts, max(widest, default=0.0))


def _contexts(inputs: Inputs, phase: int, start: int) -> Numbers:
    """Returns the positions that each row of a phase attends to, itself included."""
    rows = [step.rows for step in inputs.steps if step.phase == phase]
    if not rows:
        return np.zeros(0)
    return inputs.trace.position[np.concatenate(rows)].astype(np.float64) + start + 1


def _shape(point: KernelPoint) -> tuple[int, str, str, int]:
    return point.hidden, point.dtype, point.dispatch, point.kernels


def _growth(points: Iterable[KernelPoint]) -> tuple[Numbers, Numbers] | None:
    """Returns the contexts that one token was measured with, and what each added to none; None if it was not."""
    single = {point.context: point.ns for point in points if point.tokens == 1}
    if len(single) < 2 or 0 not in single:
        return None
    contexts = sorted(single)
    added = np.maximum.accumulate([max(0.0, float(single[context] - single[0])) for context in contexts])
    return np.array(contexts, dtype=np.float64), added


def _along(at: Numbers, contexts: Numbers, added: Numbers) -> float:
    """Returns the mean of a line through measured points, which goes on beyond the last as between the last two."""
    slope = (added[-1] - added[-2]) / (contexts[-1] - contexts[-2])
    beyond = np.maximum(0.0, at - contexts[-1]) * slope
    return float((np.interp(at, contexts, added) + beyond).mean())
