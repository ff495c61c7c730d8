"""The memory manager: who has room, decided by hand; and against a naive manager over random orders of dispatch.

Experts are `layer * experts + index`; in most cases one layer of ten experts of one byte, so that bytes are slots.
"""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import NaiveManager
from tiny import tiny_trace

from prestage.engine.decide.memory_manager import (
    DEMANDED,
    PREFETCHED,
    PRELOADED,
    Admission,
    MemoryManager,
    Wave,
)
from prestage.engine.decide.pools import BudgetError, pool_budgets
from prestage.engine.policies.eviction import EVICTION, Lru
from prestage.engine.policies.eviction_base import Setting
from prestage.workloads.batches import plan_steps


def slots(budget: int, protect: str = "until_target", drop_after_visit: bool = False) -> MemoryManager:
    return MemoryManager([1], 10, budget, Lru, protect=protect, drop_after_visit=drop_after_visit)


def visit(manager: MemoryManager, number: int, *experts: int, recency: Sequence[int] = ()) -> list[Wave]:
    layer = experts[0] // manager.experts
    return manager.visit(number, layer, experts, recency or experts, [1.0] * len(experts))


def use(manager: MemoryManager, number: int, *experts: int) -> None:
    visit(manager, number, *experts)
    manager.unpin()


def test_a_smaller_budget_also_takes_the_room_that_nobody_had() -> None:
    manager = slots(4)
    use(manager, 0, 1)
    manager.resize(2)
    for number, expert in enumerate((2, 3), 1):
        use(manager, number, expert)
    assert list(manager.assigned) == [2, 3]
    manager.resize(4)
    for number, expert in enumerate((4, 5, 6), 3):
        use(manager, number, expert)
    assert list(manager.assigned) == [3, 4, 5, 6]


def admitted(waves: list[Wave]) -> list[list[int]]:
    return [[admission.expert for admission in wave.admitted] for wave in waves]


def evicted(manager: MemoryManager) -> list[int]:
    return [manager.copy_expert[copy] for copy in manager.evicted_copies]


# What is found, what is not, and who leaves.


def test_a_visit_finds_what_is_there_and_gives_room_to_the_rest_in_access_order() -> None:
    manager = slots(4)
    (wave,) = visit(manager, 0, 7, 2)
    assert wave == Wave({}, [Admission(7, 0, ()), Admission(2, 1, ())])
    manager.unpin()
    (wave,) = visit(manager, 1, 5, 2, 1)
    assert wave == Wave({2: 1}, [Admission(5, 2, ()), Admission(1, 3, ())])
    assert manager.assigned == {7: 0, 2: 1, 5: 2, 1: 3}
    assert (manager.assigned_bytes, manager.evicted) == (4, 0)


def test_recency_within_a_batch_is_that_of_the_last_appearance() -> None:
    # Tokens (1, 2), (3, 1): accesses 1 2 3, last appearances 2 3 1. So 2 is the first to go, though 1 came first.
    manager = slots(3)
    visit(manager, 0, 1, 2, 3, recency=[2, 3, 1])
    manager.unpin()
    use(manager, 1, 4)
    use(manager, 2, 5)
    use(manager, 3, 6)
    assert evicted(manager) == [2, 3, 1]
    # The same for experts that were found: now 4 5 6 are there, last appearances 6 4 5.
    visit(manager, 4, 4, 5, 6, recency=[6, 4, 5])
    manager.unpin()
    use(manager, 5, 7)
    use(manager, 6, 8)
    assert evicted(manager)[3:] == [6, 4]


def test_what_a_visit_found_is_not_evicted_for_what_it_misses() -> None:
    # 1 is the oldest, but this visit uses it: 2 goes for 4.
    manager = slots(3)
    use(manager, 0, 1, 2, 3)
    (wave,) = visit(manager, 1, 4, 1)
    assert list(wave.found) == [1]
    assert evicted(manager) == [2]


def test_a_prefetch_of_an_assigned_expert_does_nothing_not_even_renew_its_recency() -> None:
    manager = slots(2)
    use(manager, 0, 1)
    use(manager, 1, 2)
    assert manager.prefetch(1, 5) is None
    assert manager.dropped == 0
    use(manager, 2, 3)
    assert evicted(manager) == [1]


def test_a_prefetched_expert_counts_as_the_latest_when_it_comes() -> None:
    manager = slots(2)
    use(manager, 0, 1)
    assert manager.prefetch(2, 1) == Admission(2, 1, ())
    use(manager, 1, 3)
    assert evicted(manager) == [1]
    assert bytes(manager.copy_reason) == bytes([DEMANDED, PREFETCHED, DEMANDED])


def test_a_manager_of_a_budget_and_a_policy_alone_is_one_pool_that_keeps_and_protects() -> None:
    # Two layers share the room: nobody leaves with its visit, and what is prefetched makes no room for another.
    manager = MemoryManager([1, 1], 10, 2, Lru)
    use(manager, 0, 1)
    use(manager, 1, 12)
    assert list(manager.assigned) == [1, 12]
    assert manager.prefetch(3, 9) is not None
    assert manager.prefetch(14, 9) is not None
    assert manager.prefetch(5, 9) is None
    assert list(manager.assigned) == [3, 14]
    assert manager.unused_bytes == 0  # nobody asked to have it watched


def test_who_is_looked_up_gets_room_also_where_the_policy_spares_others_from_prefetches() -> None:
    # Host memory holds one: 0, which was used. A prefetch of 1, which nobody has used, passes through it all the same.
    trace = tiny_trace([[[0]], [[1]]])
    setting = Setting(trace=trace, steps=plan_steps(trace.sequence, trace.phase))
    manager = MemoryManager([1], 4, 1, EVICTION["payback"], setting=setting)
    manager.begin(0, 0, [0], [1.0])
    assert manager.look_up(0, 1.0) == Admission(0, 0, ())
    assert manager.look_up(1, None) == Admission(1, 1, (0,), evicted=((0, 0),))


# Pins and protection.


def test_nothing_pinned_is_evicted_and_a_prefetch_without_room_is_dropped() -> None:
    manager = slots(2)
    visit(manager, 0, 1, 2)
    assert manager.prefetch(3, 1) is None
    assert (manager.dropped, evicted(manager)) == (1, [])
    manager.unpin()
    assert manager.prefetch(3, 1) == Admission(3, 2, (0,), evicted=((1, 0),))
    assert (manager.dropped, evicted(manager)) == (1, [1])


def test_until_its_target_a_prefetched_expert_is_safe_from_other_prefetches() -> None:
    manager = slots(2)
    use(manager, 0, 1)
    manager.prefetch(2, 2)
    manager.prefetch(3, 3)  # evicts 1
    assert manager.prefetch(4, 3) is None  # 2 is protected until visit 2, and 3 until visit 3
    assert (manager.dropped, evicted(manager)) == (1, [1])
    # Visit 1 does not touch them (layer visits without experts are possible); they are still protected.
    manager.visit(1, 0, [], [], [])
    manager.unpin()
    assert manager.prefetch(4, 3) is None
    # From visit 2 on, 2 may go; 3 may not.
    manager.visit(2, 0, [], [], [])
    manager.unpin()
    assert manager.prefetch(4, 3) == Admission(4, 3, (1,), evicted=((2, 1),))
    assert manager.prefetch(5, 3) is None
    assert (manager.dropped, evicted(manager)) == (3, [1, 2])


def test_demand_may_evict_a_protected_expert() -> None:
    manager = slots(1)
    manager.prefetch(2, 9)
    use(manager, 0, 3)
    assert evicted(manager) == [2]


def test_protection_ends_with_the_stay() -> None:
    # 2 is prefetched for visit 9, evicted by demand and demanded again: it was not prefetched this time.
    manager = slots(1)
    manager.prefetch(2, 9)
    use(manager, 0, 3)
    use(manager, 1, 2)
    assert manager.prefetch(4, 3) is not None


def test_without_protection_prefetches_evict_each_other() -> None:
    manager = slots(1, protect="none")
    for expert in (2, 3, 4):
        assert manager.prefetch(expert, 9) is not None
    assert (manager.dropped, evicted(manager)) == (0, [2, 3])


# Waves.


def test_a_batch_that_does_not_fit_is_served_in_waves_found_first_then_misses_in_order() -> None:
    # Three slots hold 1 2 3. The visit finds 3 and 1, and misses 4 5 6 7. First wave: 3 and 1 stay, 4 takes the room
    # of 2. Then nothing unpinned is left: it computes and unpins. Second: 5 6 7 take the rooms of 1 3 4 in order of
    # recency, which the first wave set: 3 1 4 by last appearance, so 3 1 4.
    manager = slots(3)
    use(manager, 0, 1, 2, 3)
    waves = visit(manager, 1, 4, 3, 5, 1, 6, 7, recency=[3, 1, 4, 5, 6, 7])
    assert [list(wave.found) for wave in waves] == [[3, 1], []]
    assert admitted(waves) == [[4], [5, 6, 7]]
    assert evicted(manager) == [2, 3, 1, 4]
    # Only the last wave is pinned.
    assert manager.prefetch(9, 5) is None
    manager.unpin()
    assert manager.prefetch(9, 5) is not None
    assert evicted(manager) == [2, 3, 1, 4, 5]


def test_a_first_wave_may_be_of_found_experts_only() -> None:
    manager = slots(2)
    use(manager, 0, 1, 2)
    waves = visit(manager, 1, 2, 3, 1)
    assert [(list(wave.found), [a.expert for a in wave.admitted]) for wave in waves] == [([2, 1], []), ([], [3])]
    assert evicted(manager) == [2]  # 2 was the earlier of the two in this visit


def test_with_one_slot_every_expert_is_a_wave_of_its_own() -> None:
    manager = slots(1)
    assert admitted(visit(manager, 0, 4, 5, 6)) == [[4], [5], [6]]
    assert evicted(manager) == [4, 5]


def test_a_visit_without_experts_is_one_empty_wave() -> None:
    assert slots(1).visit(0, 0, [], [], []) == [Wave({}, [])]


# Room: sizes, pools, and whose it was.


def test_freed_room_is_taken_again_in_the_order_in_which_it_was_freed() -> None:
    manager = slots(2)
    use(manager, 0, 1, 2)  # copies 0 and 1
    (wave,) = visit(manager, 1, 3, 4)  # 1 leaves first
    assert wave.admitted == [
        Admission(3, 2, (0,), evicted=((1, 0),)), Admission(4, 3, (1,), evicted=((2, 1),))
    ]  # fmt: skip
    manager.unpin()
    manager.cancel(4)
    manager.cancel(3)
    assert manager.assigned_bytes == 0
    (wave,) = visit(manager, 2, 5, 6)  # 4 freed its room before 3 did
    assert wave.admitted == [Admission(5, 4, (3,)), Admission(6, 5, (2,))]


def test_experts_of_unequal_sizes_take_and_leave_rooms_in_parts() -> None:
    # Two layers of ten: experts 0-9 have 2 bytes, 10-19 have 3. Budget 6.
    manager = MemoryManager([2, 3], 10, 6, Lru)
    use(manager, 0, 0)  # copy 0 in bytes never used; 4 are left
    use(manager, 1, 10)  # copy 1; 1 is left
    assert manager.assigned_bytes == 5
    # Expert 1 needs 2 bytes and 1 is free: the oldest (expert 0) leaves its 2. It takes the byte never used and one
    # that copy 0 has left.
    (wave,) = visit(manager, 2, 1)
    assert wave.admitted == [Admission(1, 2, (0,), partly=0, evicted=((0, 0),))]
    manager.unpin()
    # Expert 11 needs 3; 1 (of copy 0) is free: expert 10 leaves 3. It takes the byte of copy 0 and two of copy 1.
    (wave,) = visit(manager, 3, 11)
    assert wave.admitted == [Admission(11, 3, (0, 1), partly=1, evicted=((10, 1),))]
    manager.unpin()
    # Expert 12 needs 3; 1 (of copy 1) is free, expert 1 leaves 2: the byte of copy 1, then the two of copy 2.
    (wave,) = visit(manager, 4, 12)
    assert wave.admitted == [Admission(12, 4, (1, 2), evicted=((1, 2),))]
    assert evicted(manager) == [0, 10, 1]
    assert manager.assigned_bytes == 6


def test_a_large_expert_evicts_as_many_small_ones_as_it_needs_or_none() -> None:
    manager = MemoryManager([1, 3], 10, 3, Lru)
    use(manager, 0, 0, 1, 2)
    assert manager.prefetch(10, 1) == Admission(10, 3, (0, 1, 2), evicted=((0, 0), (1, 1), (2, 2)))
    assert evicted(manager) == [0, 1, 2]
    # With one small expert pinned it does not fit, and then nobody is evicted for it.
    manager = MemoryManager([1, 3], 10, 3, Lru)
    use(manager, 0, 0, 1)
    visit(manager, 1, 2)
    assert manager.prefetch(10, 2) is None
    assert (manager.dropped, evicted(manager)) == (1, [])


def test_each_layer_has_its_own_pool_where_the_scope_is_per_layer() -> None:
    # Two layers, two slots each. Layer 1 is idle: layer 0 may not use its room.
    manager = MemoryManager([1, 1], 10, 4, Lru, scope="per-layer")
    use(manager, 0, 1)
    use(manager, 1, 10)
    use(manager, 2, 2)
    use(manager, 3, 3)
    assert evicted(manager) == [1]
    assert manager.prefetch(11, 5) is not None  # there is room in layer 1
    assert evicted(manager) == [1]
    # Globally, the same four experts fit.
    together = MemoryManager([1, 1], 10, 4, Lru)
    for number, expert in enumerate((1, 10, 2, 3)):
        use(together, number, expert)
    assert evicted(together) == []


def test_a_pool_of_one_layer_holds_as_many_experts_as_their_own_size_allows() -> None:
    made: list[Setting] = []

    def eviction(setting: Setting) -> Lru:
        made.append(setting)
        return Lru(setting)

    MemoryManager([2, 4, 8], 10, 48, eviction, scope="per-layer")  # 16 bytes for each layer
    assert [(setting.layers, setting.capacity) for setting in made] == [((0,), 8), ((1,), 4), ((2,), 2)]
    made.clear()
    MemoryManager([2, 4, 8], 10, 48, eviction)
    assert [(setting.layers, setting.capacity) for setting in made] == [((0, 1, 2), 6)]  # whatever they are


def test_the_budget_is_divided_and_rounded_down_to_what_experts_can_use() -> None:
    assert pool_budgets([4, 4], 23, "global") == [20]
    assert pool_budgets([4, 4], 23, "per-layer") == [8, 8]  # half of 23 is 11
    assert pool_budgets([4, 5], 23, "global") == [23]  # of two sizes: any byte may be used
    assert pool_budgets([4, 5], 23, "per-layer") == [8, 10]
    assert MemoryManager([4, 4], 3, 23, Lru).budget_bytes == 20


@pytest.mark.parametrize(
    ("sizes", "budget", "scope", "message"),
    [
        ([5], 4, "global", "the expert budget is 4 bytes: it must hold one expert, 5 bytes"),
        ([2, 5], 4, "global", "the expert budget is 4 bytes: it must hold one expert, 5 bytes"),
        ([5], 0, "global", "the expert budget is 0 bytes: it must hold one expert, 5 bytes"),
        ([2, 5], 9, "per-layer", "a layer's share (1/2) of the expert budget is 4 bytes: it must hold one expert, 5 b"),
    ],
)
def test_a_budget_under_one_expert_is_refused(sizes: list[int], budget: int, scope: str, message: str) -> None:
    with pytest.raises(BudgetError) as error:
        MemoryManager(sizes, 10, budget, Lru, scope=scope)
    assert str(error.value).startswith(message)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scope = 'local': choose one of global, per-layer"):
        MemoryManager([1], 10, 5, Lru, scope="local")
    with pytest.raises(ValueError, match=r"protect = 'always': choose one of until_target, none"):
        MemoryManager([1], 10, 5, Lru, protect="always")


# Special ways in and out.


def test_dropping_after_every_visit_leaves_nothing_to_find() -> None:
    manager = slots(3, drop_after_visit=True)
    for number in range(3):
        waves = visit(manager, number, 1, 2)
        assert admitted(waves) == [[1, 2]]
        assert manager.assigned_bytes == 2
        manager.unpin()
        assert (manager.assigned_bytes, manager.assigned) == (0, {})
    assert evicted(manager) == [1, 2] * 3
    # In waves, too: 2 slots' worth at a time.
    manager = slots(2, drop_after_visit=True)
    assert admitted(visit(manager, 0, 1, 2, 3)) == [[1, 2], [3]]
    assert evicted(manager) == [1, 2]


def test_preloaded_experts_are_there_without_a_copy_and_leave_like_others() -> None:
    manager = slots(2)
    manager.preload([4, 5])
    assert bytes(manager.copy_reason) == bytes([PRELOADED, PRELOADED])
    (wave,) = visit(manager, 0, 5)
    assert wave == Wave({5: 1}, [])
    manager.unpin()
    (wave,) = visit(manager, 1, 6)
    assert wave.admitted == [Admission(6, 2, (0,), evicted=((4, 0),))]
    with pytest.raises(BudgetError, match=r"expert 3: takes 1 byte to preload, and 0 bytes are free: preload fewer"):
        manager.preload([3])


def test_a_cancelled_prefetch_gives_its_room_back() -> None:
    manager = slots(3)
    use(manager, 0, 1)
    manager.prefetch(2, 5)
    manager.cancel(2)
    assert (manager.assigned, manager.assigned_bytes) == ({1: 0}, 1)
    assert manager.prefetch(3, 5) == Admission(3, 2, ())  # room never used comes first
    assert manager.prefetch(4, 5) == Admission(4, 3, (1,))  # then that of the cancelled copy
    assert evicted(manager) == [2]


# Against the naive manager.

EXPERTS, LAYERS = 4, 3
#: A visit of a layer (which experts, in which order, and their order of last appearance), or a prefetch, or a cancel.
EVENT = st.one_of(
    st.tuples(
        st.just("visit"),
        st.integers(0, LAYERS - 1),
        st.lists(st.integers(0, EXPERTS - 1), max_size=EXPERTS, unique=True),
        st.randoms(use_true_random=False),
        st.lists(st.tuples(st.integers(0, LAYERS * EXPERTS - 1), st.integers(1, 6)), max_size=4),
        st.booleans(),
    ),
    st.tuples(st.just("prefetch"), st.integers(0, LAYERS * EXPERTS - 1), st.integers(1, 6)),
    st.tuples(st.just("cancel"), st.integers(0, LAYERS * EXPERTS - 1)),
)


@settings(max_examples=300)
@given(
    sizes=st.integers(1, 5).map(lambda size: [size] * LAYERS) | st.lists(st.integers(1, 6), min_size=3, max_size=3),
    spare=st.integers(0, 30),
    scope=st.sampled_from(["global", "per-layer"]),
    protect=st.sampled_from(["until_target", "none"]),
    events=st.lists(EVENT, max_size=25),
)
def test_decisions_rooms_and_books_are_those_of_a_naive_manager(
    sizes: list[int], spare: int, scope: str, protect: str, events: list[Any]
) -> None:
    budget = max(sizes) * (LAYERS if scope == "per-layer" else 1) + spare
    manager = MemoryManager(sizes, EXPERTS, budget, Lru, scope=scope, protect=protect)
    naive = NaiveManager(sizes, EXPERTS, budget, scope, protect)
    log: list[tuple[object, ...]] = []
    now = -1

    def unpin() -> None:
        manager.unpin()
        naive.unpin()

    def same_prefetch(expert: int, ahead: int) -> None:
        admission = manager.prefetch(expert, now + ahead)
        assert naive.prefetch(expert, now, now + ahead) == (admission is not None)
        if admission is not None:
            log.append(("in", admission.expert, admission.copy, admission.former, admission.partly))

    for event in events:
        if event[0] == "visit":
            _, layer, indices, random, wanted, before = event
            now += 1
            experts = [layer * EXPERTS + index for index in indices]
            recency = random.sample(experts, len(experts))
            waves = manager.visit(now, layer, experts, recency, [1.0] * len(experts))
            assert [(list(wave.found), [a.expert for a in wave.admitted]) for wave in waves] == naive.visit(
                experts, recency
            )
            log += [("in", a.expert, a.copy, a.former, a.partly) for wave in waves for a in wave.admitted]
            if not before:
                unpin()
            held = set(manager.assigned)
            for expert, ahead in wanted:
                same_prefetch(expert, ahead)
            if before:  # issued before the launch: the last wave was still pinned
                last = waves[-1]
                assert {*last.found, *(a.expert for a in last.admitted)} <= held & set(manager.assigned)
            unpin()
        elif event[0] == "prefetch":
            same_prefetch(event[1], event[2])
        elif event[1] in manager.assigned:
            manager.cancel(event[1])
            naive.evict(event[1])
        assert manager.assigned == naive.copy
        assert manager.assigned_bytes == naive.used_bytes() <= manager.budget_bytes <= budget
    # Room for room: every admission took exactly the bytes, of the copies, that the byte-by-byte free list hands out.
    assert log == [entry for entry in naive.log if entry[0] == "in"]
    assert list(zip(evicted(manager), manager.evicted_copies, strict=True)) == [
        entry[1:] for entry in naive.log if entry[0] == "out"
    ]
    # The books balance.
    assert list(manager.copy_expert) == [entry[1] for entry in log]
    assert len(manager.copy_expert) - manager.evicted == len(manager.assigned)
    assert manager.dropped == naive.dropped
    assert len(set(manager.evicted_copies)) == manager.evicted
