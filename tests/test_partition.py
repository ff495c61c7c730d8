"""Scopes: budgets divided by the hits they bring, and layers that share the experts of the same index."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cases import Case, cases, decide
from random_cases import traces as random_traces
from tiny import tiny_trace

from prestage.engine.decide.dispatch import Accesses
from prestage.engine.decide.memory_manager import MemoryManager
from prestage.engine.decide.partition import divider, hits_by_slots, most_hits
from prestage.engine.decide.pools import SCOPES, BudgetError
from prestage.engine.policies.eviction import EVICTION, Lru, Setting
from prestage.engine.replay.replay import FOUND, count_visits, replay, replay_trace
from prestage.engine.simulate import simulate_inputs
from prestage.workloads.batches import plan_steps
from prestage.workloads.importers import open_trace
from prestage.workloads.trace import RoutingTrace

# Benefit.


@settings(max_examples=60)
@given(
    st.integers(1, 4).flatmap(
        lambda layers: st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=layers, max_size=layers)
    ),
    st.integers(0, 20),
)
def test_the_dynamic_program_finds_what_trying_every_division_finds(gains: list[list[int]], spare: int) -> None:
    hits = np.cumsum(np.pad(np.array(gains), ((0, 0), (1, 0))), axis=1)  # more slots, never fewer hits
    slots = len(gains) + spare
    every = [counts for counts in product(range(1, 5), repeat=len(gains)) if sum(counts) <= slots]
    chosen = most_hits(hits, slots)
    assert tuple(chosen) in every

    def value(counts: tuple[int, ...]) -> int:
        return int(sum(hits[layer, count] for layer, count in enumerate(counts)))

    assert value(tuple(chosen)) == max(map(value, every))


@settings(max_examples=40)
@given(trace=random_traces(2, 5, 2), slots=st.integers(2, 5))
def test_hits_by_slots_are_those_of_a_replay_with_so_many_slots_a_layer(trace: RoutingTrace, slots: int) -> None:
    trace.phase[:] = 1
    trace.sequence[:] = 0
    steps = plan_steps(trace.sequence, trace.phase)
    outcome = replay(trace, steps, MemoryManager([1, 1], 5, 2 * slots, Lru, scope="per-layer")).outcome
    assert (outcome == FOUND).sum(axis=(0, 2)).tolist() == hits_by_slots(trace)[:, slots].tolist()


def test_of_equal_divisions_the_last_layer_gets_the_fewer_slots() -> None:
    # Three slots hit 11 times as 1 + 2 and as 2 + 1.
    assert most_hits(np.array([[0, 5, 6], [0, 5, 6]]), 3) == [2, 1]


def test_by_hand_the_layer_that_repeats_itself_gets_one_slot_and_the_one_that_wanders_the_rest() -> None:
    # Layer 0 always takes expert 0; layer 1 goes round 0 1 2. Of four slots an equal division gives two each, and the
    # round of three never hits; one and three hit every time after the first round: 5 and 3 of six tokens.
    trace = tiny_trace([[[0], [token % 3]] for token in range(6)])
    assert divider("benefit", [10, 10], trace)(45) == [10, 30]
    assert divider("per-layer", [10, 10], trace)(45) == [20, 20]
    assert replay_trace(trace, "45B", scope="benefit", expert_bytes=10)["hits"] == 5 + 3
    assert replay_trace(trace, "45B", scope="per-layer", expert_bytes=10)["hits"] == 5


def test_a_resized_memory_is_divided_again_by_the_same_rule() -> None:
    trace = tiny_trace([[[0], [token % 3]] for token in range(6)])
    divide = divider("benefit", [1, 1], trace)
    manager = MemoryManager([1, 1], 4, 4, Lru, scope="benefit", divide=divide)
    for number, expert in enumerate([0, 4, 5, 6]):
        manager.visit(number, expert // 4, [expert], [expert], [1.0])
        manager.unpin()
    assert sorted(manager.assigned) == [0, 4, 5, 6]
    manager.resize(2)  # one each
    assert sorted(manager.assigned) == [0, 6]


@pytest.mark.parametrize("name", ["olmoe-1b-7b.npz", "qwen3-30b-a3b_k6.npz"])
def test_on_real_traces_benefit_never_hits_less_than_equal_pools(traces: Path, name: str) -> None:
    trace = open_trace(traces / name)
    for budget in ("30%", "60%"):
        rates = [replay_trace(trace, budget, scope=scope)["hit_rate"] for scope in ("per-layer", "benefit")]
        assert rates[1] >= rates[0]


# Shared.


def test_by_hand_layers_that_share_find_each_others_experts() -> None:
    # Layer 0 brings 0 and 1, layer 1 finds 1 and misses 2, and so on: one expert is new at each visit.
    trace = tiny_trace([[[0, 1], [1, 2]], [[2, 3], [3, 0]]])
    data = replay_trace(trace, "4experts", scope="shared", expert_bytes=1)
    assert (data["accesses"], data["hits"], data["evict"]) == (8, 4, 0)
    assert data["budget_bytes"] == 4
    assert replay_trace(trace, "100%", scope="shared", expert_bytes=1)["budget_bytes"] == 4  # of one layer's experts
    assert replay_trace(trace, "8experts", scope="global", expert_bytes=1)["hits"] == 0


def test_sharing_takes_experts_by_their_index() -> None:
    accesses = Accesses([9, 4, 6], [1, 2, 1], [4, 6, 9], [0.1, 0.2, 0.3])
    assert accesses.by_index(4) == Accesses([1, 0, 2], [1, 2, 1], [0, 2, 1], [0.1, 0.2, 0.3])


@settings(max_examples=40)
@given(trace=random_traces(3, 5, 2), slots=st.integers(1, 5), lookup=st.sampled_from(["batch", "single"]))
def test_shared_layers_are_one_layer_visited_more_often(trace: RoutingTrace, slots: int, lookup: str) -> None:
    trace.phase[:] = 1
    trace.sequence[:] = 0
    steps = plan_steps(trace.sequence, trace.phase)
    shared = replay(trace, steps, MemoryManager([1] * 3, 5, slots, Lru, scope="shared"), lookup=lookup)
    present = None if trace.present is None else trace.present.reshape(-1, 1, *trace.present.shape[2:])
    flat = RoutingTrace(trace.experts.reshape(-1, 1, trace.k), 5, present=present)
    steps = plan_steps(flat.sequence, flat.phase)
    alone = replay(flat, steps, MemoryManager([1], 5, slots, Lru), lookup=lookup)
    assert np.array_equal(shared.outcome.reshape(alone.outcome.shape), alone.outcome)
    assert shared.evict == alone.evict


# Both.


@pytest.mark.parametrize("scope", ["benefit", "shared"])
@pytest.mark.parametrize("name", EVICTION)
@settings(max_examples=6)
@given(data=st.data())
def test_the_engine_counts_what_the_replay_counts_in_every_scope(name: str, scope: str, data: st.DataObject) -> None:
    case: Case = data.draw(cases(memory={"eviction": name}, copy={"discipline": "fifo"}))
    if not case.model.uniform:
        return
    memory = case.scenario.memory.model_copy(update={"scope": scope, "gpu_budget": f"{case.model.layers + 2}experts"})
    case = Case(case.model, case.profile, case.trace, case.scenario.model_copy(update={"memory": memory}))
    counts = count_visits(*decide(case.inputs()))
    result = simulate_inputs(case.inputs(), baselines=False).data
    assert (result["counts"]["miss"], result["counts"]["evict"]) == (counts.miss, counts.evict)
    assert (result["accesses"], result["counts"]["prefetch"]) == (counts.accesses, counts.prefetch)


@pytest.mark.parametrize("scope", SCOPES)
def test_belady_knows_the_future_in_every_scope(scope: str) -> None:
    random = np.random.default_rng(5)
    trace = RoutingTrace(np.argsort(random.random((60, 3, 8)), axis=2)[..., :2].astype(np.uint8), 8)
    hits = {name: replay_trace(trace, "7experts", eviction=name, scope=scope)["hits"] for name in EVICTION}
    assert hits["belady"] == max(hits.values())


@pytest.mark.parametrize(
    ("sizes", "budget", "scope", "error", "message"),
    [
        ([2, 3], 100, "benefit", ValueError, "scope = 'benefit' needs experts of one size in all layers"),
        ([2, 3], 100, "shared", ValueError, "scope = 'shared' needs experts of one size in all layers"),
        ([2, 2], 3, "benefit", BudgetError, "a layer's share (1/2) of the expert budget is 1 byte"),
        ([2, 2], 1, "shared", BudgetError, "the expert budget is 1 byte: it must hold one expert, 2 bytes"),
        ([2, 2], 9, "world", ValueError, "scope = 'world': choose one of global, per-layer, benefit, shared"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    sizes: list[int], budget: int, scope: str, error: type[ValueError], message: str
) -> None:
    trace = tiny_trace([[[0], [1]]])
    with pytest.raises(error) as refused:
        divider(scope, sizes, trace)(budget)
    assert message in str(refused.value)


def test_a_manager_without_a_rule_refuses_to_divide_by_benefit() -> None:
    with pytest.raises(ValueError, match="scope = 'benefit' needs a trace to measure it on"):
        MemoryManager([1, 1], 4, 4, Lru, setting=Setting(), scope="benefit")
