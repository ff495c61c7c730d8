"""Misses of LRU in one walk: as the memory manager decides them, and by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tiny import tiny_trace

from prestage.engine.decide.compiled_lru import is_lru_alone, missed_by_lru
from prestage.engine.decide.compiled_misses import missed
from prestage.engine.decide.memory_manager import MemoryManager
from prestage.engine.decide.sources import Source
from prestage.engine.policies.eviction import EVICTION
from prestage.engine.policies.prefetch import NoPrefetch
from prestage.workloads.batches import Step, plan_steps
from prestage.workloads.trace import RoutingTrace

EXPERTS, LAYERS, TOP_K = 8, 3, 2


def source(trace: RoutingTrace, steps: Sequence[Step], slots: int, scope: str, eviction: str = "lru") -> Source:
    sizes = [10] * trace.layers
    manager = MemoryManager(sizes, trace.num_experts, 10 * slots, EVICTION[eviction], scope=scope)
    return Source(trace, steps, manager, NoPrefetch(), None)


def drawn(seed: int, tokens: int = 60) -> RoutingTrace:
    """Returns three sequences of random choices, ranked at random."""
    luck = np.random.default_rng(seed)
    chosen = luck.random((tokens, LAYERS, EXPERTS)).argsort(axis=-1)[..., :TOP_K]
    sequence = (np.arange(tokens) * 3 // tokens).tolist()
    trace: RoutingTrace = tiny_trace(chosen.tolist(), num_experts=EXPERTS, sequence=sequence)
    return trace


def steps_of(trace: RoutingTrace, batch: int) -> list[Step]:
    return plan_steps(trace.sequence, trace.phase, batch=batch)


def keys(found: npt.NDArray[Any]) -> list[int]:
    return sorted(found.tolist())


def test_who_was_used_longest_ago_leaves_and_what_a_visit_finds_stays() -> None:
    # One layer, room for two. Tokens use {0, 1}, then {1, 2}: 2 takes the room of 0. {2, 0}: 0 takes that of 1, which
    # was used longer ago. {0, 1}: 1 takes that of 2. Each visit has one to fetch, the first one two.
    trace = tiny_trace([[[0, 1]], [[1, 2]], [[2, 0]], [[0, 1]]], num_experts=3)
    (found,) = missed_by_lru([source(trace, steps_of(trace, 1), 2, "global")], np.zeros(3, dtype=np.int64))
    assert keys(found) == [0 * 3 + 0, 0 * 3 + 1, 1 * 3 + 2, 2 * 3 + 0, 3 * 3 + 1]


@pytest.mark.parametrize("scope", ["global", "per-layer"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_one_walk_misses_what_the_memory_manager_does(seed: int, batch: int, scope: str) -> None:
    trace = drawn(seed)
    steps = steps_of(trace, batch)
    for slots in (6 * LAYERS, 7 * LAYERS):
        one = source(trace, steps, slots, scope)
        assert is_lru_alone(one)
        (found,) = missed_by_lru([one], np.zeros(LAYERS * EXPERTS, dtype=np.int64))
        assert keys(found) == keys(missed(source(trace, steps, slots, scope), LAYERS * EXPERTS))
        assert len(found) > LAYERS * EXPERTS  # some came a second time


def test_each_gpu_misses_of_its_own_experts() -> None:
    trace = drawn(7)
    steps, owner = steps_of(trace, 3), np.arange(LAYERS * EXPERTS) % 2
    found = missed_by_lru([source(trace, steps, 8, "global") for _ in range(2)], owner)
    for gpu in range(2):
        # A token's choices that another GPU serves are none here.
        own = owner.reshape(LAYERS, EXPERTS)[np.arange(LAYERS)[:, None], trace.experts] == gpu
        manager = MemoryManager([10] * LAYERS, EXPERTS, 80, EVICTION["lru"])
        expected = []
        for number, (step, layer) in enumerate((step, layer) for step in steps for layer in range(LAYERS)):
            served = [
                layer * EXPERTS + int(expert)
                for row in step.rows.tolist()
                for expert in trace.experts[row, layer][own[row, layer]]
            ]
            last = list(dict.fromkeys(reversed(served)))[::-1]
            unique = list(dict.fromkeys(served))
            for wave in manager.visit(number, layer, unique, last, [1.0] * len(last)):
                expected += [number * LAYERS * EXPERTS + one.expert for one in wave.admitted]
            manager.unpin()
        assert keys(found[gpu]) == sorted(expected)


def test_what_more_than_lru_decides_is_not_walked() -> None:
    trace = drawn(1)
    steps = steps_of(trace, 3)
    assert not is_lru_alone(source(trace, steps, 5, "global"))  # three tokens of two experts may not fit
    assert not is_lru_alone(source(trace, steps, 9, "global", "lfu"))
    preloaded = source(trace, steps, 9, "global")
    preloaded.manager.preload([0])
    assert not is_lru_alone(preloaded)
