"""`prestage.testing`: what ships conforms, what does not keep to it is found, and the machine's times are by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from prestage.engine.policies.copy_order import COPY_ORDERS, ByRank, QueuedCopy, TwoStreams
from prestage.engine.policies.eviction import EVICTION, Lru
from prestage.engine.policies.placement import PLACEMENT, Owners, Request
from prestage.engine.policies.prefetch import PREFETCH, TopK
from prestage.errors import InputError
from prestage.resources.timeline import DEMAND, DENSE, EXPERT
from prestage.testing import (
    CONFORMANCE,
    check,
    random_inputs,
    tiny_model,
    tiny_profile,
    tiny_run,
    tiny_scenario,
    tiny_trace,
)
from prestage.workloads.guesses import Guesses, Run
from prestage.workloads.predictors import PREDICTORS

#: Those that the tests of predictors ask, with weights made for it.
APART = {("predictor", "learned")}
SHIPPED = [(family, name) for family, asked in CONFORMANCE.items() for name in asked.names]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), [one for one in SHIPPED if one not in APART])
def test_what_ships_conforms(family: str, name: str) -> None:
    check(family, name, runs=5)


def test_who_is_asked_for_must_be_there() -> None:
    with pytest.raises(InputError, match="family = 'evictions': choose one of eviction, prefetch, copy_order, predict"):
        check("evictions", "lru")
    with pytest.raises(InputError, match=r"eviction = 'lro': choose one of .* \(did you mean 'lru'"):
        check("eviction", "lro")


class Forgetful(Lru):
    """Leaves out whom it was told of last."""

    def victims(self) -> Iterator[int]:
        return iter(list(super().victims())[:-1])


class Stubborn(Lru):
    """Keeps naming who has left."""

    def __init__(self, *setting: Any) -> None:
        super().__init__(*setting)
        self._all: list[int] = []

    def admit(self, expert: int, demanded: bool) -> None:
        super().admit(expert, demanded)
        self._all.append(expert)

    def victims(self) -> Iterator[int]:
        return iter(dict.fromkeys([*super().victims(), *self._all]))


class Moody(Lru):
    """Walks its experts in another order each time a run is made."""

    made = 0

    def __init__(self, *setting: Any) -> None:
        super().__init__(*setting)
        Moody.made += 1
        self._backwards = bool(Moody.made % 2)

    def victims(self) -> Iterator[int]:
        inside = sorted(super().victims())
        return iter(inside[::-1] if self._backwards else inside)


class NextDoor(TopK):
    """Fetches for the next layer what was guessed for another."""

    def choose(self, ranked: Sequence[Sequence[int]], moment: Any) -> Sequence[Sequence[int]]:
        return [[expert + 5 for expert in experts] for experts in ranked]


class Greedy(TopK):
    """Takes guesses away from those who come after it."""

    def choose(self, ranked: Any, moment: Any) -> Sequence[Sequence[int]]:
        chosen = [list(experts) for experts in ranked]
        for experts in ranked:
            experts.clear()
        return chosen


class Backwards(ByRank):
    """A demand goes to the end of the queue."""

    def rank(self, copy: QueuedCopy) -> tuple[int, int]:
        return int(copy.demanded), copy.visit


class Count(ByRank):
    """No pair."""

    def rank(self, copy: QueuedCopy) -> Any:
        return copy.visit


class TwoQueues(ByRank):
    """A queue cannot have them."""

    prefetch_stream = TwoStreams.prefetch_stream

    def rank(self, copy: QueuedCopy) -> tuple[int, int]:
        return copy.visit, 0


class Clairvoyant:
    """Guesses what will be chosen."""

    def guess(self, trace: Any, steps: Any, horizons: int, n: int) -> Guesses:
        run = Run.of(trace, steps, horizons, n)
        experts = run.no_guesses(n)
        for ahead, (token, layer) in enumerate(run.targets()):
            experts[:, :, ahead, : run.k] = np.where(token[..., None] >= 0, run.chosen[token, layer], -1)
        return run.guesses(experts)


class Stammering:
    """Guesses expert 0 at every rank."""

    def guess(self, trace: Any, steps: Any, horizons: int, n: int) -> Guesses:
        run = Run.of(trace, steps, horizons, n)
        return run.guesses(np.zeros_like(run.no_guesses(n)))


def on_first(request: Request) -> Owners:
    """The first GPU has them all."""
    return [[(0,)] * request.trace.num_experts for _ in range(request.trace.layers)]


def on_nobody(request: Request) -> Owners:
    """Expert 0 of each layer has no owner."""
    return [[(), *owners[1:]] for owners in PLACEMENT["linear"](request)]


def beside(request: Request) -> Owners:
    """One GPU on, the last of which is not there."""
    return [[(gpu + 1,) for (gpu,) in owners] for owners in PLACEMENT["linear"](request)]


@pytest.mark.parametrize(
    ("family", "table", "wrong", "says"),
    [
        ("eviction", EVICTION, Forgetful, "leaves out experts"),
        ("eviction", EVICTION, Stubborn, "which is not in memory"),
        ("eviction", EVICTION, Moody, "decided otherwise when it is made again"),
        ("prefetch", PREFETCH, NextDoor, "is not of layer"),
        ("prefetch", PREFETCH, Greedy, "they were written to"),
        ("copy_order", COPY_ORDERS, Backwards, r"goes back from \(0, 0\) to \(1, 0\) when it is demanded"),
        ("copy_order", COPY_ORDERS, Count, "must be a pair of ints"),
        ("copy_order", COPY_ORDERS, TwoQueues, "one stream"),
        ("predictor", PREDICTORS, Clairvoyant, "a guess knows a later"),
        ("predictor", PREDICTORS, Stammering, "guesses an expert twice"),
        ("placement", PLACEMENT, on_first, "experts of a layer: at most"),
        ("placement", PLACEMENT, on_nobody, r"owners \(\): must be some GPUs"),
        ("placement", PLACEMENT, beside, "the GPUs are 0 to"),
    ],
)
def test_who_does_not_keep_to_it_is_found(family: str, table: dict[str, Any], wrong: Any, says: str) -> None:
    with patch.dict(table, wrong=wrong), pytest.raises(AssertionError, match=says):
        check(family, "wrong")


def test_the_same_number_draws_the_same_run() -> None:
    first, again, other = (random_inputs(seed) for seed in (3, 3, 4))
    assert (first.model, first.scenario) == (again.model, again.scenario)
    assert first.trace.experts.tolist() == again.trace.experts.tolist()
    assert (first.model, first.scenario) != (other.model, other.scenario)
    assert random_inputs(3, memory={"eviction": "fifo"}).scenario.memory.eviction == "fifo"


def test_a_schedule_by_hand() -> None:
    # Two layers. Dense 3, then the choice is known; its expert comes in 20 and runs in 7: 30 a layer.
    trace = tiny_trace([[[0], [1]]])
    recording = tiny_run(tiny_model(2), tiny_profile(), trace, tiny_scenario())
    times = {
        kind: [(int(span["start_ns"]), int(span["end_ns"])) for span in recording.spans if span["kind"] == kind]
        for kind in (DENSE, DEMAND, EXPERT)
    }
    assert times == {
        DENSE: [(0, 3), (30, 33)],
        DEMAND: [(3, 23), (33, 53)],
        EXPERT: [(23, 30), (53, 60)],
    }
