"""Who serves what, and where bytes come from, over several GPUs: small cases by hand, and what holds in all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cases import Case, cases, decide
from tiny import tiny_trace

from prestage.engine.decide.dispatch import step_accesses
from prestage.engine.decide.expert_parallel import (
    REMOTE,
    ExpertParallel,
    ParallelVisit,
    Prices,
    Worker,
    homes,
    own_guesses,
    own_steps,
    parallel_visits,
)
from prestage.engine.decide.memory_manager import MemoryManager
from prestage.engine.decide.spare_memory import Store
from prestage.engine.loading.deciders import make_manager, make_prefetch
from prestage.engine.policies.eviction import EVICTION
from prestage.engine.policies.placement import PLACEMENT, Owners, Request
from prestage.engine.policies.prefetch import NextLayer, NoPrefetch, Options, Prefetch, StreamPrefill
from prestage.engine.scenario.inputs import Inputs
from prestage.workloads.batches import DECODE, Step
from prestage.workloads.guesses import Guesses
from prestage.workloads.trace import RoutingTrace


def steps_of(*rows: Sequence[int]) -> list[Step]:
    return [Step(DECODE, np.array(row, dtype=np.int64)) for row in rows]


def on_demand(layout: ExpertParallel, trace: RoutingTrace, steps: list[Step], slots: int) -> list[ParallelVisit]:
    """Decide a run without prefetch, every GPU having room for so many experts of one byte."""
    workers = [
        Worker(
            MemoryManager([1] * trace.layers, trace.num_experts, slots, EVICTION["lru"]),
            NoPrefetch(),
            steps if layout.moves_tokens else own_steps(steps, layout.homes, gpu),
        )
        for gpu in range(layout.gpus)
    ]
    return list(parallel_visits(layout, trace, workers))


def served(visit: ParallelVisit) -> list[dict[int, int]]:
    """What each GPU serves: tokens by expert."""
    return [dict(zip(v.accesses.experts, v.accesses.tokens, strict=True)) for v in visit.visits]


def misses(visit: ParallelVisit) -> list[list[int]]:
    return [[admission.expert for admission in own.admissions()] for own in visit.visits]


def test_a_sequence_lives_where_the_fewest_others_do_and_stays_there() -> None:
    # Sequences 0, 1 and 2 come first: GPU 0, 1, 0. Sequence 0 ends with step 1, so 3 finds one sequence on each: GPU 0.
    trace = tiny_trace([[[0]]] * 8, sequence=np.array([0, 1, 2, 0, 1, 2, 3, 1], dtype=np.int32))
    found = homes(trace, steps_of([0, 1, 2], [3, 4, 5], [6, 7]), 2)
    assert [home.tolist() for home in found] == [[0, 1, 0], [0, 1, 0], [0, 1]]


#: Experts 0 and 2 on GPU 0, 1 and 3 on GPU 1.
EVEN_ODD: Owners = [[(0,), (1,), (0,), (1,)]]


def test_tokens_go_to_the_owners_of_their_experts_once_each() -> None:
    # Token 0 lives on GPU 0, token 1 on GPU 1. Token 0 has both its experts at home, token 1 both on GPU 0; of the
    # second step, token 2 has one on each GPU and token 3 both on GPU 1.
    trace = tiny_trace([[[0, 2]], [[2, 0]], [[0, 1]], [[1, 3]]], sequence=np.array([0, 1, 0, 1], dtype=np.int32))
    steps = steps_of([0, 1], [2, 3])
    first, second = on_demand(ExpertParallel(2, EVEN_ODD, homes(trace, steps, 2)), trace, steps, 4)
    assert served(first) == [{0: 2, 2: 2}, {}]
    assert first.visits[0].accesses.recency == [2, 0]
    assert first.traffic is not None and first.traffic.tolist() == [[0, 0], [1, 0]]  # one way for two experts
    assert misses(first) == [[0, 2], []]
    assert served(second) == [{0: 1}, {1: 2, 3: 1}]
    assert second.traffic is not None and second.traffic.tolist() == [[0, 1], [0, 0]]
    assert misses(second) == [[], [1, 3]]


def test_of_several_owners_the_one_with_the_fewest_tokens_in_the_visit_serves() -> None:
    # Experts 0 and 1 are on both GPUs, 2 on GPU 0 alone. Expert 2 has two tokens, so expert 0 goes to GPU 1 (0 < 2);
    # expert 1 then finds 2 tokens against 1: GPU 1 too.
    owners: Owners = [[(0, 1), (0, 1), (0,)]]
    trace = tiny_trace([[[0, 2]], [[1, 2]]], 3, sequence=np.array([0, 1], dtype=np.int32))
    steps = steps_of([0, 1])
    (visit,) = on_demand(ExpertParallel(2, owners, homes(trace, steps, 2)), trace, steps, 3)
    assert served(visit) == [{2: 2}, {0: 1, 1: 1}]
    assert visit.traffic is not None and visit.traffic.tolist() == [[0, 1], [1, 0]]


def test_bytes_come_from_another_gpu_that_has_them_an_owner_before_others() -> None:
    # Each GPU serves its own token. GPU 0 brings expert 1 from the host; GPU 1 then copies it from GPU 0, though it
    # owns it. GPU 2 gets it from GPU 1, the owner. In the second step everybody has it.
    trace = tiny_trace([[[1]]] * 6, sequence=np.array([0, 1, 2] * 2, dtype=np.int32))
    steps = steps_of([0, 1, 2], [3, 4, 5])
    first, second = on_demand(ExpertParallel(3, EVEN_ODD, homes(trace, steps, 3), "peer"), trace, steps, 1)
    assert misses(first) == [[1], [1], [1]]
    assert first.sources == [{}, {0: (0, 0)}, {0: (1, 0)}]
    assert first.traffic is None
    assert (misses(second), second.sources) == ([[], [], []], [{}, {}, {}])


def test_from_the_host_alone_no_gpu_knows_of_another() -> None:
    trace = tiny_trace([[[1]], [[1]]], sequence=np.array([0, 1], dtype=np.int32))
    steps = steps_of([0, 1])
    (visit,) = on_demand(ExpertParallel(2, EVEN_ODD, homes(trace, steps, 2), "host"), trace, steps, 1)
    assert (misses(visit), visit.sources) == ([[1], [1]], [{}, {}])


@pytest.mark.parametrize(
    ("token_ns", "peer_ns", "host_ns", "expected", "sources"),
    [
        (4.0, 10, 100, [{1: 3}, {}], [{}, {}]),  # 4 ns to move GPU 1's token: cheaper than any copy
        (20.0, 10, 100, [{1: 2}, {1: 1}], [{}, {0: (0, 0)}]),  # a copy from GPU 0 is
        (20.0, 10, 7, [{1: 2}, {1: 1}], [{}, {}]),  # the host's is cheaper still
        (7.0, 10, 7, [{1: 3}, {}], [{}, {}]),  # a tie: tokens
    ],
)
def test_what_costs_least_decides(
    token_ns: float, peer_ns: int, host_ns: int, expected: list[dict[int, int]], sources: list[dict[int, Any]]
) -> None:
    # Tokens 0 and 2 live on GPU 0, which brings expert 1 from the host, as nobody has it. Then it is GPU 1's turn.
    trace = tiny_trace([[[1]], [[1]], [[1]]], sequence=np.array([0, 1, 2], dtype=np.int32))
    steps = steps_of([0, 1, 2])
    layout = ExpertParallel(2, EVEN_ODD, homes(trace, steps, 2), "cost", Prices(token_ns, [host_ns], [peer_ns]))
    (visit,) = on_demand(layout, trace, steps, 1)
    assert served(visit) == expected
    assert visit.sources == sources
    assert visit.traffic is not None and int(visit.traffic.sum()) == (1 if expected[1] == {} else 0)


def test_what_is_evicted_goes_to_another_gpus_spare_memory_and_is_fetched_back_from_there() -> None:
    # GPU 0 owns 0 and 2 and has room for one; GPU 1 has spare room for one. One token: 0, 2, 0, 2.
    #   0: from the host. 2: takes the room of 0 (copy 0), which is stored as number 0 in room never used.
    #   0 again: takes the room of 2 (copy 1). Both must pass each other, and 0 is still in the only spare room: 2 is
    #   not stored, 0 (copy 2) comes from GPU 1. 2 again: from the host, and 0 (copy 2) is stored as number 1, where
    #   number 0 lay.
    trace = tiny_trace([[[0]], [[2]], [[0]], [[2]]])
    steps = steps_of([0], [1], [2], [3])
    layout = ExpertParallel(2, EVEN_ODD, homes(trace, steps, 2), spare_experts=1)
    found = on_demand(layout, trace, steps, 1)
    assert [visit.sources[0] for visit in found] == [{}, {}, {2: (1, 0)}, {}]
    assert [visit.stores[0] for visit in found] == [{}, {0: Store(0, 1, 0, -1)}, {}, {2: Store(0, 1, 1, 0)}]


def test_spare_memory_keeps_what_came_last_and_room_for_two_lets_them_pass() -> None:
    # Room for two: 2 is stored beside 0 before 0 is fetched; then 0 goes where it lay, once 2 has been fetched... 2 is
    # stored as number 1 (room never used), 0 as number 2 where 0 lay before.
    trace = tiny_trace([[[0]], [[2]], [[0]], [[2]]])
    steps = steps_of([0], [1], [2], [3])
    layout = ExpertParallel(2, EVEN_ODD, homes(trace, steps, 2), spare_experts=2)
    found = on_demand(layout, trace, steps, 1)
    assert [visit.sources[0] for visit in found] == [{}, {}, {2: (1, 0)}, {3: (1, 1)}]
    assert [visit.stores[0] for visit in found] == [
        {},
        {0: Store(0, 1, 0, -1)},
        {1: Store(2, 1, 1, -1)},
        {2: Store(0, 1, 2, 0)},
    ]


def test_what_is_evicted_goes_to_the_gpu_with_most_spare_room() -> None:
    # Of three GPUs with spare room for one each, GPU 0 owns 0, 1 and 2 and has room for one: 0 goes to GPU 1, and 1 to
    # GPU 2, which is freer by then.
    trace, steps = tiny_trace([[[0]], [[1]], [[2]]]), steps_of([0], [1], [2])
    layout = ExpertParallel(3, [[(0,), (0,), (0,), (1,)]], homes(trace, steps, 3), spare_experts=1)
    stores = [visit.stores[0] for visit in on_demand(layout, trace, steps, 1)]
    assert stores == [{}, {0: Store(0, 1, 0, -1)}, {1: Store(1, 2, 1, -1)}]


def test_where_spare_memory_is_full_what_came_first_leaves() -> None:
    # As above with four experts of GPU 0: 2 finds both spare rooms full, and 0 has been stored for longest.
    trace, steps = tiny_trace([[[0]], [[1]], [[2]], [[3]]]), steps_of([0], [1], [2], [3])
    layout = ExpertParallel(3, [[(0,)] * 4], homes(trace, steps, 3), spare_experts=1)
    stores = [visit.stores[0] for visit in on_demand(layout, trace, steps, 1)]
    assert stores == [{}, {0: Store(0, 1, 0, -1)}, {1: Store(1, 2, 1, -1)}, {2: Store(2, 1, 2, 0)}]


@pytest.mark.parametrize("policy", [NextLayer, StreamPrefill])
def test_a_gpu_fetches_ahead_what_it_serves_also_where_a_policy_wants_whole_layers(policy: type[Prefetch]) -> None:
    # A token lives on each GPU, GPU 0 owns the even experts. Of the next layer's four each fetches its own two; a
    # policy that goes by guesses in other steps (of 7 and 6 here) wants the whole layer in one of many tokens.
    trace = tiny_trace([[[0], [1]], [[1], [2]]], sequence=np.array([0, 1], dtype=np.int32))
    steps, options = steps_of([0, 1]), Options(k=1, lookahead=1, layers=2, experts=4, stream_pairs=1)
    layout = ExpertParallel(2, EVEN_ODD * 2, homes(trace, steps, 2))
    guesses = Guesses(np.array([0, 1]), np.array([[[[3]], [[-1]]], [[[2]], [[-1]]]], dtype=np.int16))
    workers = [Worker(MemoryManager([1, 1], 4, 8, EVICTION["lru"]), policy(options), steps, guesses) for _ in range(2)]
    first, last = parallel_visits(layout, trace, workers)
    assert [[admission.expert for admission, _ in own.prefetches] for own in first.visits] == [[4, 6], [5, 7]]
    assert [own.prefetches for own in last.visits] == [[], []]


# What holds in all cases.

#: Host memory holds every expert.
WHOLE = {"host_budget": "all", "prefetch": "gpu"}


def over(inputs: Inputs, gpus: int, remote: str, placement: str = "round-robin", **options: Any) -> list[ParallelVisit]:
    """Decide a random run over several GPUs, each with the whole budget."""
    sizes = inputs.model.expert_bytes
    owners = PLACEMENT[placement](Request(gpus, inputs.trace, sizes, replicas=2, replica_bytes=4 * max(sizes)))
    lives = homes(inputs.trace, inputs.steps, gpus)
    prices = Prices(5.0, sizes, [size // 2 for size in sizes]) if remote == "cost" else None
    workers = []
    for gpu in range(gpus):
        part = inputs
        if remote in ("peer", "host"):
            own = own_guesses(inputs.guesses, lives, gpu)
            part = replace(inputs, steps=own_steps(inputs.steps, lives, gpu), guesses=own)
        prefetch = make_prefetch(inputs.scenario, inputs.model)
        workers.append(Worker(make_manager(part), prefetch, part.steps, part.guesses))
    layout = ExpertParallel(gpus, owners, lives, remote, prices, **options)
    return list(parallel_visits(layout, inputs.trace, workers, issue=inputs.scenario.prefetch.issue))


@settings(max_examples=40)
@given(case=cases(tiers=WHOLE), gpus=st.integers(1, 3), placement=st.sampled_from(list(PLACEMENT)))
@pytest.mark.parametrize("remote", REMOTE)
def test_every_choice_is_served_once_and_where_it_may_be(remote: str, case: Case, gpus: int, placement: str) -> None:
    inputs = case.inputs()
    found = over(inputs, gpus, remote, placement)
    owners = PLACEMENT[placement](
        Request(
            gpus, inputs.trace, inputs.model.expert_bytes, replicas=2, replica_bytes=4 * max(inputs.model.expert_bytes)
        )
    )
    lives = homes(inputs.trace, inputs.steps, gpus)
    assert len(found) == len(inputs.steps) * inputs.model.layers
    for index, step in enumerate(inputs.steps):
        for layer, accesses in enumerate(step_accesses(inputs.trace, step)):
            visit = found[index * inputs.model.layers + layer]
            assert (visit.step, visit.layer) == (index, layer)
            together: Counter[int] = Counter()
            for own in served(visit):
                together.update(own)
            assert together == dict(zip(accesses.experts, accesses.tokens, strict=True))
            for gpu, own in enumerate(served(visit)):
                if remote == "tokens":
                    assert all(gpu in owners[layer][expert % inputs.model.experts] for expert in own)
                if remote in ("peer", "host"):
                    mine = Step(step.phase, step.rows[lives[index] == gpu])
                    assert list(own) == list(step_accesses(inputs.trace, mine))[layer].experts
            if visit.traffic is not None:
                routed = [row for row in step.rows if inputs.trace.chosen(row, layer)]
                assert visit.traffic.diagonal().tolist() == [0] * gpus
                assert visit.traffic.sum() <= len(routed) * min(inputs.model.top_k, gpus)
            for gpu, sources in enumerate(visit.sources):
                assert remote in ("peer", "cost") or not sources
                assert all(other != gpu for other, _ in sources.values())


@settings(max_examples=40)
@given(case=cases(tiers=WHOLE))
@pytest.mark.parametrize("remote", REMOTE)
def test_on_one_gpu_everything_is_as_without_the_others(remote: str, case: Case) -> None:
    inputs = case.inputs()
    alone, _ = decide(inputs)
    found = over(inputs, 1, remote)
    assert [visit.visits[0] for visit in found] == alone
    assert not any(visit.sources[0] for visit in found)
    assert not any(visit.traffic is not None and visit.traffic.any() for visit in found)


@settings(max_examples=40)
@given(case=cases(tiers=WHOLE, memory={"scope": "global"}), gpus=st.integers(2, 3), spare=st.integers(1, 3))
def test_spare_memory_changes_where_bytes_come_from_and_nothing_else(case: Case, gpus: int, spare: int) -> None:
    inputs = case.inputs()
    size = inputs.model.expert_bytes[0]
    inputs = replace(
        inputs,
        model=replace(inputs.model, expert_bytes=(size,) * inputs.model.layers),
        budget_bytes=size * max(1, inputs.budget_bytes // size // 4),
    )
    plain, found = over(inputs, gpus, "tokens"), over(inputs, gpus, "tokens", spare_experts=spare)
    assert [visit.visits for visit in found] == [visit.visits for visit in plain]
    lying: dict[int, tuple[int, int]] = {}  # by expert: GPU and number
    for visit in found:
        for gpu, own in enumerate(visit.visits):
            gone = {store.expert: store for store in visit.stores[gpu].values()}
            for admission in own.admissions():
                for copy in admission.former:
                    store = visit.stores[gpu].get(copy)
                    if store is not None:
                        lying = {e: at for e, at in lying.items() if at != (store.gpu, store.former)}
                        lying[store.expert] = (store.gpu, store.number)
                source = visit.sources[gpu].get(admission.copy)
                if source is not None:
                    assert lying.pop(admission.expert) == source
            assert all(store.gpu != gpu for store in gone.values())
        assert all([at for at, _ in lying.values()].count(gpu) <= spare for gpu in range(gpus))
