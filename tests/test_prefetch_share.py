"""The share of memory that unused prefetches may hold: fixed, or following the workload; worked by hand."""

import pytest

from prestage.engine.decide.memory_manager import MemoryManager
from prestage.engine.policies.eviction import Lru
from prestage.engine.policies.prefetch_share import PREFETCH_SHARE, AdaptiveShare, FixedShare


def manager_of(budget: int, share: FixedShare) -> MemoryManager:
    return MemoryManager([1], 10, budget, Lru, protect="none", prefetch_share=share)


def use(manager: MemoryManager, *experts: int) -> None:
    for expert in experts:
        manager.visit(0, 0, [expert], [expert], [1.0])
        manager.unpin()


@pytest.mark.parametrize("name", PREFETCH_SHARE)
def test_every_share_stays_a_share(name: str) -> None:
    share = PREFETCH_SHARE[name](0.5, 2)
    for expert in range(6):
        share.evicted(expert, expert % 2 == 0)
    for expert in (0, 2, 4, 1, 3, 5, 4, 5, 9):
        share.missed(expert)
        assert 0.0 <= share.share <= 1.0


def test_at_its_share_a_prefetch_only_takes_the_room_of_another_unused_one() -> None:
    # Four slots, half of them for unused prefetches. Experts 0 to 3 are cached; prefetching 4 and 5 evicts 0 and 1, the
    # least recent; prefetching 6 finds the share full and evicts 4, the older unused one, not the cached 2.
    manager = manager_of(4, FixedShare(0.5, 4))
    use(manager, 0, 1, 2, 3)
    for expert in (4, 5, 6):
        assert manager.prefetch(expert, 9) is not None
    assert sorted(manager.assigned) == [2, 3, 5, 6]
    assert manager.unused_bytes == 2
    # Once used, a prefetched expert is a cached one like others, and another prefetch has room: 2 is the oldest now.
    use(manager, 5)
    assert manager.unused_bytes == 1
    assert manager.prefetch(7, 9) is not None
    assert sorted(manager.assigned) == [3, 5, 6, 7]


def test_where_sizes_differ_what_is_demanded_takes_any_room_and_a_prefetch_beyond_its_share_none() -> None:
    # Four bytes, one of them for unused prefetches; three hold experts of layer 0. One of layer 1 has two bytes.
    manager = MemoryManager([1, 2], 10, 4, Lru, protect="none", prefetch_share=FixedShare(0.25, 4))
    use(manager, 0, 1, 2)
    assert manager.prefetch(10, 9) is None
    manager.visit(0, 1, [10], [10], [1.0])
    assert sorted(manager.assigned) == [1, 2, 10]


def test_without_any_share_nothing_is_prefetched_into_a_full_cache() -> None:
    manager = manager_of(2, FixedShare(0.0, 2))
    use(manager, 0, 1)
    assert manager.prefetch(2, 9) is None
    assert manager.dropped == 1
    assert sorted(manager.assigned) == [0, 1]


def test_a_missed_former_prefetch_widens_the_share_and_a_missed_former_cached_expert_narrows_it() -> None:
    share = AdaptiveShare(0.5, 4)
    share.evicted(1, True)
    share.evicted(2, False)
    share.missed(1)  # lists of one each: one step of 1/4
    assert share.share == 0.75
    share.missed(1)  # forgotten: it was taken as one sign only
    assert share.share == 0.75
    share.missed(2)
    assert share.share == 0.5


def test_the_rarer_sign_weighs_more() -> None:
    # Three cached experts and one unused prefetch are remembered: a miss of the one moves by 3/1 steps of 1/8.
    share = AdaptiveShare(0.5, 8)
    share.evicted(1, True)
    for expert in (2, 3, 4):
        share.evicted(expert, False)
    share.missed(1)
    assert share.share == 0.875


def test_it_remembers_as_many_of_each_as_memory_holds() -> None:
    share = AdaptiveShare(0.5, 2)
    for expert in (1, 2, 3):
        share.evicted(expert, False)
    share.missed(1)
    assert share.share == 0.5
    share.missed(3)
    assert share.share == 0.0


def test_the_manager_tells_an_adaptive_share_what_it_evicts_and_misses() -> None:
    # Two slots. Cached 0 and 1; prefetch 2 evicts cached 0; the demand for 0 evicts 1 and says so: too little room for
    # cached experts. Then the unused 2 goes for 3, and a demand for 2 says the opposite.
    share = AdaptiveShare(0.5, 2)
    manager = manager_of(2, share)
    use(manager, 0, 1)
    manager.prefetch(2, 9)
    use(manager, 0)
    assert share.share == 0.0
    use(manager, 3)
    use(manager, 2)
    assert share.share > 0.0
