"""Ways to divide layers into stages: each gives every stage a layer; the balanced one is the best there is."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prestage.engine.policies.split import SPLITS, Layers, SplitError, balanced, divide

WEIGHTS = st.lists(st.integers(0, 50), min_size=1, max_size=8)


def layers(stages: int, compute_ns: list[int], **known: object) -> Layers:
    """Layers with these weights, whose makespan is that of their heaviest stage."""

    def makespan_ns(counts: tuple[int, ...]) -> int:
        return max(sums(compute_ns, counts))

    options = {"expert_bytes": compute_ns, "compute_ns": lambda: compute_ns, "makespan_ns": makespan_ns, **known}
    return Layers(stages=stages, **options)  # type: ignore[arg-type]


def sums(weights: list[int], counts: tuple[int, ...]) -> list[int]:
    ends = [sum(counts[:stage]) for stage in range(len(counts) + 1)]
    return [sum(weights[start:end]) for start, end in pairwise(ends)]


@pytest.mark.parametrize("name", SPLITS)
@given(weights=WEIGHTS, data=st.data())
def test_every_split_gives_each_stage_a_layer_and_takes_them_all(
    name: str, weights: list[int], data: st.DataObject
) -> None:
    stages = data.draw(st.integers(1, len(weights)))
    counts = divide(name, layers(stages, weights))
    assert len(counts) == stages and min(counts) > 0 and sum(counts) == len(weights)


@given(weights=WEIGHTS, data=st.data())
def test_no_division_has_a_lighter_heaviest_stage_than_the_balanced_one(
    weights: list[int], data: st.DataObject
) -> None:
    stages = data.draw(st.integers(1, len(weights)))
    heaviest = max(sums(weights, balanced(weights, stages)))
    for borders in combinations(range(1, len(weights)), stages - 1):
        counts = tuple(end - start for start, end in pairwise((0, *borders, len(weights))))
        assert max(sums(weights, counts)) >= heaviest


def test_equal_counts_layers_and_compute_and_memory_weigh_them() -> None:
    # Five layers on two stages: the first takes the odd one. The last layer holds the head: 1 + 1 + 1 + 1 | 4. The
    # first two have the large experts: 9 | 9 + 1 + 1 + 1.
    known = layers(2, [1, 1, 1, 1, 4], expert_bytes=[9, 9, 1, 1, 1])
    assert divide("equal", known) == (3, 2)
    assert divide("compute", known) == (4, 1)
    assert divide("memory", known) == (1, 4)
    assert divide([2, 3], known) == (2, 3)


def test_of_equally_heavy_divisions_the_most_even_is_taken() -> None:
    # The 9 is alone at best; the rest is 1 + 1 | 1 + 1, and not 1 | 1 + 1 + 1.
    assert balanced([9, 1, 1, 1, 1], 3) == (1, 2, 2)
    # 5 + 2 | 9 | 8 | 1 has the squares 49 + 81 + 64 + 1 = 195 and 5 | 2 | 9 | 8 + 1 has 25 + 4 + 81 + 81 = 191; their
    # cubes are 1,585 and 1,591.
    assert balanced([5, 2, 9, 8, 1], 4) == (1, 1, 1, 2)


def test_a_search_moves_layers_as_long_as_the_simulated_run_gets_shorter() -> None:
    # By compute the layers divide 2 | 2; simulated, each layer more on the first stage saves time.
    tried = []

    def makespan_ns(counts: tuple[int, ...]) -> int | None:
        tried.append(counts)
        return 100 - 10 * counts[0]

    assert divide("searched", layers(2, [1, 1, 1, 1], makespan_ns=makespan_ns)) == (3, 1)
    assert tried == [(2, 2), (1, 3), (3, 1)]


def test_a_search_leaves_stages_that_cannot_run() -> None:
    # With two layers the first stage does not fit; with one it does.
    found = divide("searched", layers(2, [1, 1, 1, 1], makespan_ns=lambda counts: None if counts[0] > 1 else 7))
    assert found == (1, 3)


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(SplitError, match=r"parallel\.stages = 3: choose at most 2, the layers of"):
        divide("equal", layers(3, [1, 1]))
    with pytest.raises(SplitError, match=r"parallel\.split = \[1, 2\]: these are 3 layers, the model has 2"):
        divide([1, 2], layers(2, [1, 1]))
