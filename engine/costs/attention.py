"""What attention adds to a layer's dense part with what is cached, where that is known: of requests, or by a context.

It is priced by step, for a step's rows say what is cached: a row attends to the positions of its request, or of its
sequence behind the scenario's context, up to its own, or to the last so many. Rows that are alone in their sequence
decode, together; several of one sequence are a prompt, or a chunk of one, and cost what a whole prompt of as many pairs
of positions costs, but at least one look at all keys. Linear attention and state spaces attend to nothing that grows.

Where it was measured for the dense part's shape, decoding goes by these points; else by the GPU's surface of single
kernels; where there is none, by the bytes that are read and the operations that are made. The first alone is no
estimate.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import replace
from math import sqrt
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from ...resources.profile import Profile
from ...resources.profile_costs import KernelPoint
from ...units import FLOPS, RATES, rate_words
from ...workloads.batches import Step
from ...workloads.model import Attending
from ...workloads.requests.request import Part, RepeatedStep, RequestStep
from .runtime_costs import OwnAttention
from .surface_costs import SurfaceCosts

if TYPE_CHECKING:
    from ..scenario.inputs import Inputs

#: Rows of a prompt that read the cache together, a tile of FlashAttention's kernels (Dao 2023, arXiv:2307.08691).
TILE_ROWS = 128
#: Steps whose prices are kept: more than any run has under way at once.
_KEPT = 256

Numbers = npt.NDArray[np.float64]


class Added(NamedTuple):
    """What attention adds to a kernel group, in ns: on a quiet GPU, and beside a copy to it."""

    ns: int
    beside_copy_ns: float


class _Rows(NamedTuple):
    """The positions that rows attend to, themselves included: of those that decode, and of each prompt (or chunk)."""

    decoding: Numbers
    prompts: tuple[Numbers, ...]


class Attention:
    """What attention adds on one GPU, by step and kind of layer; nothing for a fixed batch without a context.

    `kind_of` (layers,) numbers the layers that attend alike; `firsts` is a layer of each kind. `own` is what the
    runtime takes by itself: for each position that sparse attention has cached, and for what it moves of the cache.
    """

    def __init__(
        self, inputs: Inputs, profile: Profile, surface: SurfaceCosts | None, dispatch: str,
        own: OwnAttention,
    ) -> None:  # fmt: skip
        self._inputs, self._model, self._surface, self._rule = inputs, inputs.model, surface, profile.compute.rule
        self._start = inputs.scenario.workload.context
        self._indexed_ns, self._moves = own
        self._by_requests = inputs.scenario.requests is not None
        self._known: dict[int, tuple[Step, list[Added]]] = {}  # the last _KEPT steps
        model = self._model
        alike = [(model.attention_of(layer), model.dense_bytes[layer]) for layer in range(model.layers)]
        kinds = {each: kind for kind, each in enumerate(dict.fromkeys(alike))}
        self.kind_of = [kinds[each] for each in alike]
        self.firsts = [self.kind_of.index(kind) for kind in range(len(kinds))]
        known = (model.hidden, model.dense_dtype, dispatch, model.dense_kernels)
        points = [point for point in profile.compute.dense if _shape(point) == known]
        if self._rule.device is None:  # a rule of this machine's own goes before another machine's points
            points = [point for point in points if point.device is None]
        sizes = {point.weight_bytes for point in points}
        growths = {size: _growth(point for point in points if point.weight_bytes == size) for size in sizes}
        self._growth = {size: growth for size, growth in growths.items() if growth is not None}

    def of_steps(self, steps: list[Step]) -> Attention:
        """Returns the same for other steps: those that a run pulls."""
        other = copy(self)
        other._inputs, other._known = replace(self._inputs, steps=steps), {}
        return other

    @property
    def counts(self) -> bool:
        """Whether it adds anything in this run."""
        return self._start is not None or self._by_requests

    def by_kind(self, step: int) -> list[Added]:
        """Returns what it adds to the dense part of each kind of layer in a step."""
        known, at = self._known.get(step), self._inputs.steps[step]  # steps that were known may not be made
        found = None if known is None or known[0] is not at else known[1]
        if found is None:
            rows = self._rows(step)
            if len(self._known) == _KEPT:
                del self._known[next(iter(self._known))]
            found = [self._added(layer, rows) for layer in self.firsts]
            self._known[step] = at, found
        return found

    def heaviest_step(self) -> int:
        """Returns the step whose rows attend to most positions in all."""
        sums = [sum(float(part.sum()) for part in (rows.decoding, *rows.prompts)) for rows in self._each_step()]
        return int(np.argmax(sums)) if sums else 0

    def words(self, layer: int) -> str:
        """Returns how it is estimated in a layer; nothing where decoding was measured."""
        if self._model.dense_bytes[layer] in self._growth:
            return ""
        if self._surface is not None and self._surface.has_attention:
            return self._surface.attention_described()
        rule = self._rule
        reads, computes = rate_words(rule.bytes_per_second, RATES), rate_words(rule.flops_per_second, FLOPS)
        return (
            f"bytes of the cache / {reads}, read once for {TILE_ROWS} rows of a prompt, or "
            f"4 x heads x width x pairs of positions / {computes} if that is more ({rule.provenance})"
        )

    def _each_step(self) -> Iterable[_Rows]:
        return (self._rows(step) for step in range(len(self._inputs.steps)))

    def _rows(self, step: int) -> _Rows:
        """Returns what the rows of a step that live on this GPU attend to."""
        inputs, found = self._inputs, self._inputs.steps[step]
        if isinstance(found, RepeatedStep):
            return _Rows(found.cached.astype(np.float64) + 1, ())
        if isinstance(found, RequestStep):
            return _rows_of(found.parts)
        rows = found.rows
        layout = inputs.expert_parallel
        if layout is not None and layout.moves_tokens:
            rows = rows[layout.homes[step] == inputs.gpu_number]
        positions = inputs.trace.position[rows].astype(np.float64) + (self._start or 0) + 1
        _, places, counts = np.unique(inputs.trace.sequence[rows], return_inverse=True, return_counts=True)
        prompts = tuple(positions[places == number] for number in np.flatnonzero(counts > 1))
        return _Rows(positions[counts[places] == 1], prompts)

    def _added(self, layer: int, rows: _Rows) -> Added:
        attends, model = self._model.attention_of(layer), self._model
        growth = self._growth.get(model.dense_bytes[layer])
        decoding_ns = sum(self._decoding_ns(each, rows.decoding) for each in attends) if len(rows.decoding) else 0.0
        if growth is not None:
            decoding_ns = _along(rows.decoding, *growth)
        if self._indexed_ns and any(each.indexes for each in attends):
            decoding_ns += self._indexed_ns * float(rows.decoding.sum())
        decoding_ns += sum(self._moved_ns(each, rows.decoding) for each in attends)
        prompts_ns = sum(self._prompt_ns(each, prompt) for each in attends for prompt in rows.prompts)
        ns = decoding_ns + prompts_ns
        if self._surface is None:
            return Added(round(ns), ns * self._rule.beside_copy_factor)
        read = sum(
            each.key_bytes * float(keys)
            for each in attends
            for keys in (each.keys(rows.decoding).sum(), *(each.keys(prompt).max() for prompt in rows.prompts))
        )
        return Added(round(ns), ns + self._surface.longer_beside_copy_ns(read))

    def _decoding_ns(self, attends: Attending, positions: Numbers) -> float:
        """Returns what one attention of rows takes that are each alone in their sequence."""
        keys = attends.keys(positions)
        if self._surface is None or not self._surface.has_attention:
            return self._by_rule_ns(attends, float(keys.sum()), float(keys.sum()), attends.latent_dim)
        read_ns = self._surface.cached_ns(len(positions), attends.kv_heads, attends.key_bytes, float(keys.mean()))
        flops = 4 * attends.heads * (attends.latent_dim or attends.head_dim) * float(keys.sum())
        return max(read_ns, flops / self._surface.flops_per_ns)

    def _moved_ns(self, attends: Attending, positions: Numbers) -> float:
        """Returns what the runtime takes to move what rows that decode look at."""
        heads = attends.heads / attends.kv_heads if attends.heads else 1.0
        moved = sum((move.times + move.times_heads * heads) / move.share for move in self._moves)
        cached = attends.key_bytes * float(attends.keys(positions).sum())
        return moved * cached * 1e9 / self._rule.bytes_per_second

    def _prompt_ns(self, attends: Attending, positions: Numbers) -> float:
        """Returns what one attention of several rows of one sequence takes."""
        keys = attends.keys(positions)
        pairs, most = float(keys.sum()), float(keys.max())
        surface = self._surface
        if surface is None or not surface.has_attention:
            return self._by_rule_ns(attends, -(-len(positions) // TILE_ROWS) * float(keys.mean()), pairs, 0)
        read_ns = surface.cached_ns(1, attends.kv_heads, attends.key_bytes, most)
        if not attends.heads or not surface.has_prompts:
            return -(-len(positions) // TILE_ROWS) * read_ns
        # Of a whole prompt every row looks at half of its tokens in the mean.
        return max(read_ns, surface.prompt_ns(attends.heads, attends.head_dim, sqrt(2 * pairs)))

    def _by_rule_ns(self, attends: Attending, keys_read: float, pairs: float, width: int) -> float:
        read_ns = keys_read * attends.key_bytes * 1e9 / self._rule.bytes_per_second
        flops = 4 * attends.heads * (width or attends.head_dim) * pairs
        return max(read_ns, flops * 1e9 / self._rule.flops_per_second)


def _rows_of(parts: tuple[Part, ...]) -> _Rows:
    """Returns what the rows of requests attend to: all that their request has before them, and themselves."""
    prompts = (np.arange(part.first + 1.0, part.first + part.tokens + 1) for part in parts if part.tokens > 1)
    return _Rows(np.array([part.first + 1.0 for part in parts if part.tokens == 1]), tuple(prompts))


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
    """Returns the sum over rows of a line through measured points, which goes on beyond the last as before it."""
    slope = (added[-1] - added[-2]) / (contexts[-1] - contexts[-2])
    beyond = np.maximum(0.0, at - contexts[-1]) * slope
    return float((np.interp(at, contexts, added) + beyond).sum())
