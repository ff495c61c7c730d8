"""Eviction policies: what all of them owe the memory manager, and the order of each, worked by hand."""

from collections.abc import Iterator, Sequence
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cases import Case, cases, decide

from prestage.engine.memory_manager import MemoryManager
from prestage.engine.policies.eviction import EVICTION, Eviction, Lru
from prestage.engine.simulate import dispatched, make_manager, make_prefetch

EVERY = pytest.mark.parametrize("name", EVICTION)


class Watched(Eviction):
    """A policy under watch: it is asked and told the right things, and answers with whom it holds."""

    def __init__(self, policy: Eviction, everyone: "list[Watched]") -> None:
        self.policy = policy
        self.inside: set[int] = set()
        everyone.append(self)

    def admit(self, expert: int, demanded: bool) -> None:
        assert expert not in self.inside
        self.inside.add(expert)
        self.policy.admit(expert, demanded)

    def use(self, expert: int, weight: float) -> None:
        assert expert in self.inside
        self.policy.use(expert, weight)

    def evict(self, expert: int) -> None:
        self.inside.remove(expert)
        self.policy.evict(expert)

    def victims(self) -> Iterator[int]:
        walked = set()
        for expert in self.policy.victims():
            assert expert in self.inside and expert not in walked
            walked.add(expert)
            yield expert  # whoever asks may stop here
        assert walked == self.inside

    def begin(self, visit: int, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        self.policy.begin(visit, layer, experts, weights)

    def miss(self, expert: int, demanded: bool) -> None:
        assert expert not in self.inside
        self.policy.miss(expert, demanded)

    def check(self) -> None:
        for _ in range(2):  # a walk may clear marks, but loses nobody
            assert sorted(self.victims()) == sorted(self.inside)


@EVERY
@settings(max_examples=40)
@given(data=st.data(), look=st.booleans())
def test_victims_walks_exactly_the_experts_in_memory_once(name: str, data: st.DataObject, look: bool) -> None:
    case = data.draw(cases(memory={"eviction": name}))
    inputs = case.inputs()
    pools: list[Watched] = []
    original = EVICTION[name]
    with patch.dict(EVICTION, {name: lambda *setting: Watched(original(*setting), pools)}):
        manager = make_manager(inputs)
    assert pools and all(not list(pool.victims()) for pool in pools)
    for _ in dispatched(inputs, manager, make_prefetch(inputs.scenario, inputs.model)):
        assert sorted(expert for pool in pools for expert in pool.inside) == sorted(manager.assigned)
        if look:  # nobody minds an additional walk
            for pool in pools:
                pool.check()
    for pool in pools:
        pool.check()
    for expert in list(manager.assigned):  # any expert may leave, not only the first victim
        manager.cancel(expert)
        for pool in pools:
            assert expert not in pool.victims()
    assert not manager.assigned and manager.assigned_bytes == 0


@EVERY
@settings(max_examples=30)
@given(data=st.data())
def test_the_same_run_meets_the_same_evictions(name: str, data: st.DataObject) -> None:
    case: Case = data.draw(cases(memory={"eviction": name}))
    first, second = decide(case.inputs()), decide(case.inputs())
    assert first[0] == second[0]
    assert first[1].evicted_copies == second[1].evicted_copies


@EVERY
@settings(max_examples=30)
@given(data=st.data())
def test_nobody_is_evicted_while_there_is_room(name: str, data: st.DataObject) -> None:
    case: Case = data.draw(cases(memory={"eviction": name, "scope": "global"}))
    inputs = case.inputs()
    manager = make_manager(inputs)
    largest = max(inputs.model.expert_bytes)
    evicted = 0
    for _ in dispatched(inputs, manager, make_prefetch(inputs.scenario, inputs.model)):
        if manager.evicted > evicted:
            # Before the last one left there was too little room for whoever came; so less is free now than it left.
            assert manager.budget_bytes - manager.assigned_bytes < largest
        evicted = manager.evicted


# The members, one by one.


def test_lru_evicts_the_expert_used_longest_ago() -> None:
    lru = Lru()
    for expert in (1, 2, 3):
        lru.admit(expert, True)
    assert list(lru.victims()) == [1, 2, 3]
    lru.use(1, 0.5)  # 1 becomes the latest
    assert list(lru.victims()) == [2, 3, 1]
    lru.use(2, 0.0)  # a use is a use, whatever its weight
    assert list(lru.victims()) == [3, 1, 2]
    lru.evict(3)
    lru.admit(4, False)  # a prefetch comes as the latest
    assert list(lru.victims()) == [1, 2, 4]


def test_lru_by_hand_through_the_memory_manager() -> None:
    # Three slots, one expert a visit. 1 2 3 fill them; 1 is found and becomes the latest; 4 evicts 2, the oldest use;
    # 2 evicts 3; 1 is still there.
    manager = MemoryManager([1], 8, 3, Lru)
    found = []
    for number, expert in enumerate([1, 2, 3, 1, 4, 2, 1, 3]):
        (wave,) = manager.visit(number, 0, [expert], [expert], [1.0])
        found.append(expert in wave.found)
        manager.unpin()
    assert found == [False, False, False, True, False, False, True, False]
    assert [manager.copy_expert[copy] for copy in manager.evicted_copies] == [2, 3, 4]
    assert sorted(manager.assigned) == [1, 2, 3]
