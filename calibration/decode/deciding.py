"""What is decided while a model runs: the simulator's own stream of visits, asked visit by visit.

The simulator knows a run's routing beforehand; here each layer's choice becomes known as the model makes it. Both go
through `engine/decide`, so a run that is simulated afterwards, with the routing that was met, decides the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ...engine.decide.dispatch import Accesses, Part, Visit, merge, visits
from ...engine.decide.memory_manager import MemoryManager
from ...engine.loading.deciders import make_manager, make_prefetch
from ...engine.policies.eviction import Lru
from ...engine.scenario.inputs import Inputs

#: Guesses as the dispatcher takes them: [horizon - 1][rank by token].
Ranked = Sequence[Sequence[int]]


class Deciding:
    """A run's decisions, each made when its choice is known. `inputs` hold its shape; their routing is not looked at.

    `choice` is [token][rank], expert numbers within the layer.
    """

    def __init__(self, inputs: Inputs) -> None:
        trace, self._experts = inputs.trace, inputs.model.experts
        self.manager, prefetch = make_manager(inputs), make_prefetch(inputs.scenario, inputs.model)
        self.horizons, self.guesses = prefetch.horizons, prefetch.guesses
        self._accesses: Accesses | None = None
        self._ranked = _Ranked()
        each_step: Any = iter([self._ranked] * len(inputs.steps))
        part = Part(
            (self._layers(trace.layers) for _ in inputs.steps),
            each_step if prefetch.guesses else None,
        )
        self._visits = visits(
            trace, inputs.steps, self.manager, prefetch, None, issue=inputs.scenario.prefetch.issue, part=part
        )

    def visit(self, layer: int, choice: Sequence[Sequence[int]], ranked: Ranked = ()) -> Visit:
        """Returns what is done at the next visit, which is of this layer, given its choice and guesses."""
        self._accesses = _accesses(layer * self._experts, choice)
        self._ranked.now = ranked
        return next(self._visits)

    def _layers(self, layers: int) -> Iterator[Accesses]:
        for _ in range(layers):
            assert self._accesses is not None
            yield self._accesses


class _Ranked:
    """The guesses of a step by layer, of which only the present layer's are known, and asked for."""

    now: Ranked = ()

    def __getitem__(self, layer: int) -> Ranked:
        return self.now


class Filling:
    """The decisions of prompts before a run: what was used last stays, as far as there is room; nothing is counted."""

    horizons = guesses = 0

    def __init__(self, layers: int, experts: int, expert_bytes: int, slots: int) -> None:
        self._experts, self._number = experts, 0
        self._manager = MemoryManager([expert_bytes] * layers, experts, slots * expert_bytes, Lru)

    def visit(self, layer: int, choice: Sequence[Sequence[int]], ranked: Ranked = ()) -> Visit:
        """Returns what is done at a visit of this layer."""
        accesses = _accesses(layer * self._experts, choice)
        waves = self._manager.visit(self._number, layer, accesses.experts, accesses.recency, accesses.weights)
        self._manager.unpin()
        self._number += 1
        return Visit(self._number, 0, layer, accesses, waves, [], 0, 0)


def _accesses(first: int, choice: Sequence[Sequence[int]]) -> Accesses:
    """Returns the look-ups of a choice, experts numbered from the layer's `first`."""
    if len(choice) == 1:
        experts = [first + expert for expert in choice[0]]
        ones = [1] * len(experts)
        return Accesses(experts, ones, experts, [1.0] * len(experts))
    pairs = [first + expert for token in choice for expert in token]
    return merge(pairs, [1.0] * len(pairs))
