"""Stack algorithms: by hand, and against lists that are searched and sorted anew at every look-up."""

from itertools import pairwise

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from prestage.workloads.stacks import belady_depths, lru_depths, next_visits

EXPERTS = 7

#: Visits, each of some experts in access order and the same in the order that they leave.
visits = st.lists(
    st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=4, unique=True).flatmap(
        lambda visit: st.tuples(st.just(visit), st.permutations(visit))
    ),
    max_size=60,
)


def flat(visits: list[tuple[list[int], list[int]]]) -> list[npt.NDArray[np.int64]]:
    """The arrays experts, recency and starts."""
    experts = [expert for visit, _ in visits for expert in visit]
    recency = [expert for _, visit in visits for expert in visit]
    starts = np.cumsum([0, *(len(visit) for visit, _ in visits)])
    return [np.array(experts, dtype=np.int32), np.array(recency, dtype=np.int32), starts]


def test_lru_depths_by_hand() -> None:
    # Stack after each visit, most recent first: 0 | 10 | 2 10 (both from below) ...
    experts, recency, starts = flat([([0], [0]), ([1], [1]), ([2], [2]), ([0, 1], [0, 1]), ([2, 0], [0, 2])])
    # 0 lies under 2 and 1 when the fourth visit begins, 1 under 2; after it 1 0 2: 2 is third and 0 second.
    assert lru_depths(experts, recency, starts, 3).tolist() == [-1, -1, -1, 2, 1, 2, 1]


def test_next_visits_by_hand() -> None:
    experts, _, starts = flat([([0, 1], [0, 1]), ([1], [1]), ([0], [0])])
    assert next_visits(experts, starts, 2).tolist() == [2, 1, 3, 3]


def test_belady_depths_by_hand() -> None:
    # 0 1 2 0 1, one by one. With two places, 2 takes the place of 1, which is used later than 0: 0 hits, 1 misses.
    experts, _, starts = flat([([expert], [expert]) for expert in (0, 1, 2, 0, 1)])
    depths = belady_depths(experts, starts, 3)
    assert depths.tolist() == [-1, -1, -1, 1, 2]


@given(visits)
def test_an_lru_depth_is_the_place_in_a_list_that_moves_to_the_front(
    visits: list[tuple[list[int], list[int]]],
) -> None:
    stack: list[int] = []
    depths = []
    for visit, recency in visits:
        depths += [stack.index(expert) if expert in stack else -1 for expert in visit]
        stack = recency[::-1] + [expert for expert in stack if expert not in visit]
    experts, recency_of_all, starts = flat(visits)
    assert lru_depths(experts, recency_of_all, starts, EXPERTS).tolist() == depths


@given(visits, st.integers(4, EXPERTS))
def test_below_the_capacity_in_belady_s_stack_is_what_evicting_the_farthest_finds(
    visits: list[tuple[list[int], list[int]]], capacity: int
) -> None:
    held: set[int] = set()
    hits = []
    for now, (visit, _) in enumerate(visits):
        hits.append(len(held & set(visit)))
        held |= set(visit)

        def coming(expert: int, now: int = now) -> int:
            later = [number for number in range(now + 1, len(visits)) if expert in visits[number][0]]
            return later[0] if later else len(visits)

        for expert in sorted(held - set(visit), key=coming)[capacity - len(visit) :]:
            held.remove(expert)
    experts, _, starts = flat(visits)
    depths = belady_depths(experts, starts, EXPERTS)
    found = (depths >= 0) & (depths < capacity)
    # Who is used in one visit is the same to Belady, so how many of a visit are found counts, not who.
    assert [int(found[first:end].sum()) for first, end in pairwise(starts.tolist())] == hits
