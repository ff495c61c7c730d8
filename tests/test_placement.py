"""Placements: which GPUs own which experts. Small ones are worked by hand; what holds for all is asked of all."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cases import traces
from tiny import tiny_trace

from prestage.engine.policies.placement import OBJECTIVES, PLACEMENT, Owners, Request, _load_after
from prestage.testing.conformance import check_owners
from prestage.workloads.trace import RoutingTrace


def singles(*choices: int, experts: int) -> RoutingTrace:
    """One layer, one choice a token."""
    trace: RoutingTrace = tiny_trace([[[choice]] for choice in choices], experts)
    return trace


def owned(owners: Owners, gpu: int) -> list[tuple[int, int]]:
    return [(layer, e) for layer, experts in enumerate(owners) for e, gpus in enumerate(experts) if gpu in gpus]


@settings(max_examples=40)
@given(data=st.data(), gpus=st.integers(1, 5), batch=st.integers(1, 4))
@pytest.mark.parametrize("name", PLACEMENT)
def test_every_expert_is_owned_and_no_gpu_has_more_to_hold_than_another(
    name: str, data: st.DataObject, gpus: int, batch: int
) -> None:
    layers, experts = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 9))
    trace = data.draw(traces(layers, experts, data.draw(st.integers(1, 2))))
    request = Request(gpus, trace, [10] * layers, batch=batch, replicas=3, replica_bytes=data.draw(st.integers(0, 60)))
    check_owners(name, request)
    owners = PLACEMENT[name](request)
    extra = request.replica_bytes // 10 if name == "replicated" else 0
    for layer in range(layers):
        assert name == "replicated" or max(map(len, owners[layer])) == 1
        held = [sum(gpu in gpus_of for gpus_of in owners[layer]) for gpu in range(gpus)]
        assert max(held) <= -(-experts // gpus) + extra
        assert name == "replicated" or min(held) >= experts // gpus
    assert sum(len(owned(owners, gpu)) for gpu in range(gpus)) <= layers * experts + gpus * extra


def test_round_robin_goes_on_from_layer_to_layer() -> None:
    trace = tiny_trace([[[0], [0]]], 3)
    assert PLACEMENT["round-robin"](Request(2, trace, [1, 1])) == [[(0,), (1,), (0,)], [(1,), (0,), (1,)]]


def test_linear_gives_blocks_of_neighbors() -> None:
    trace = tiny_trace([[[0]]], 5)
    assert PLACEMENT["linear"](Request(2, trace, [1])) == [[(0,), (0,), (0,), (1,), (1,)]]


def test_balanced_gives_the_most_popular_to_the_least_loaded_that_has_a_place() -> None:
    # Chosen 7, 4, 3, 2, 1 and 1 times. By time alone: GPU 0 gets 7 and 2, GPU 1 gets 4, 3, 1, 1. With three places
    # each: 7 -> 0, 4 -> 1, 3 -> 1 (7 against 4), 2 -> 0 or 1 (both at 7: 0), 1 -> 1, and the last place is GPU 0's.
    trace = singles(*[0] * 7, *[1] * 4, *[2] * 3, *[3] * 2, 4, 5, experts=6)
    assert PLACEMENT["balanced"](Request(2, trace, [1])) == [[(0,), (1,), (1,), (0,), (1,), (0,)]]


def test_balanced_is_within_grahams_bound_of_the_best() -> None:
    # Two GPUs, four experts, two places each: all 24 orders tried. LPT is at most 4/3 - 1/(3 m) = 7/6 of the best.
    generator = np.random.default_rng(5)
    for _ in range(20):
        counts = generator.integers(1, 20, 4)
        trace = singles(*np.repeat(np.arange(4), counts).tolist(), experts=4)
        owners = PLACEMENT["balanced"](Request(2, trace, [1]))[0]
        load = [sum(int(counts[e]) for e, gpus in enumerate(owners) if gpu in gpus) for gpu in range(2)]
        best = min(max(a + b, c + d) for a, b, c, d in permutations(counts.tolist()))
        assert max(load) <= best * 7 / 6


def test_hot_experts_get_replicas_on_the_least_loaded_gpus_until_the_allowance_is_used_up() -> None:
    # Chosen 8, 3, 2 and 1 times: balanced gives 8 and 1 to GPU 0, 3 and 2 to GPU 1. The hottest is replicated on GPU 1,
    # which leaves 4 + 1 and 4 + 5 tokens; the next one's replica goes to GPU 0. One each is all the room there is.
    trace = singles(*[0] * 8, *[1] * 3, *[2] * 2, 3, experts=4)
    for allowance in (10, 19):
        assert PLACEMENT["replicated"](Request(2, trace, [10], replicas=2, replica_bytes=allowance)) == [
            [(0, 1), (0, 1), (1,), (0,)]
        ]
    assert PLACEMENT["replicated"](Request(2, trace, [10], replicas=2, replica_bytes=9)) == [[(0,), (1,), (1,), (0,)]]


def test_replicas_are_at_most_so_many_and_never_of_what_nobody_chose() -> None:
    trace = singles(*[0] * 9, 1, experts=4)
    owners = PLACEMENT["replicated"](Request(3, trace, [1], replicas=2, replica_bytes=100))[0]
    assert [len(gpus) for gpus in owners] == [2, 2, 1, 1]


def test_experts_chosen_together_are_owned_together() -> None:
    # Tokens choose 0 with 3, or 1 with 2, and expert 0 a little more often alone with 1.
    trace = tiny_trace([[[0, 3]]] * 5 + [[[1, 2]]] * 5 + [[[0, 1]]], 4)
    assert PLACEMENT["co-activated"](Request(2, trace, [1])) == [[(0,), (1,), (1,), (0,)]]


def test_who_joins_two_experts_is_who_is_chosen_with_either() -> None:
    # 0 is chosen most, and most with 1. With these, 2 is chosen 3 + 1 times and 3 is 0 + 2.
    pairs = [[0, 1]] * 6 + [[0, 2]] * 3 + [[1, 2]] + [[1, 3]] * 2 + [[3, 4], [4, 5], [3, 5]] * 2
    owners = PLACEMENT["co-activated"](Request(2, tiny_trace([[pair] for pair in pairs], 6), [1]))
    assert owners == [[(0,), (0,), (0,), (1,), (1,), (1,)]]


def visits(owners: Owners, trace: RoutingTrace) -> int:
    """The pairs of a token and a GPU that has any of its experts."""
    return sum(len({owners[0][e][0] for e in token}) for token in trace.experts[:, 0].tolist())


def busiest(owners: Owners, trace: RoutingTrace, batch: int) -> int:
    """The tokens of the busiest GPU, over batches."""
    rows = trace.experts[:, 0].tolist()
    return sum(
        max(Counter(owners[0][e][0] for token in rows[first : first + batch] for e in token).values())
        for first in range(0, len(rows), batch)
    )


@pytest.mark.parametrize("gpus", [2, 3, 4, 5])
def test_what_a_swap_makes_of_the_busiest_gpu_is_what_counting_anew_says(gpus: int) -> None:
    random = np.random.default_rng(gpus)
    chosen = random.integers(0, 9, (6, 10))  # tokens of each of ten experts in six batches
    owner = np.arange(10) % gpus

    def on_gpu(owner: np.ndarray) -> np.ndarray:
        return np.stack([chosen[:, owner == gpu].sum(axis=1) for gpu in range(gpus)], axis=1)

    for expert in range(10):
        counted = []
        for other in range(10):
            swapped = owner.copy()
            swapped[[expert, other]] = owner[[other, expert]]
            counted.append(on_gpu(swapped).max(axis=1).sum())
        assert _load_after(chosen, owner, on_gpu(owner), expert).tolist() == counted


@settings(max_examples=30)
@given(data=st.data(), gpus=st.integers(2, 4), batch=st.integers(1, 3))
def test_a_search_never_makes_its_objective_worse_and_ends_where_no_swap_helps(
    data: st.DataObject, gpus: int, batch: int
) -> None:
    experts = data.draw(st.integers(gpus, 7))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    chosen = np.argsort(random.random((4 * batch, experts)), axis=1)[:, None, :2]
    trace = tiny_trace(chosen.tolist(), experts)
    start = PLACEMENT["balanced"](Request(gpus, trace, [1]))
    for objective in OBJECTIVES:
        found = PLACEMENT["searched"](Request(gpus, trace, [1], batch=batch, objective=objective))

        def value(owners: Owners, objective: str = objective) -> int:
            return busiest(owners, trace, batch) if objective == "load" else visits(owners, trace)

        assert value(found) <= value(start)
        owner = [gpus_of[0] for gpus_of in found[0]]
        for a in range(experts):
            for b in range(a):
                swapped = [owner[{a: b, b: a}.get(e, e)] for e in range(experts)]
                # Four rounds over all experts are enough for so few.
                assert value([[(gpu,) for gpu in swapped]]) >= value(found)


def test_a_search_for_bytes_finds_the_pairs_that_go_together() -> None:
    # Balanced by popularity, equal ones are dealt out one by one: every pair is split. Together, no token visits two.
    trace = tiny_trace([[[2 * pair, 2 * pair + 1]] for pair in (0, 1, 2, 3)] * 3, 8)
    start = PLACEMENT["balanced"](Request(2, trace, [1]))
    found = PLACEMENT["searched"](Request(2, trace, [1], objective="bytes"))
    assert (visits(start, trace), visits(found, trace)) == (24, 12)
