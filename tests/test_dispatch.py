"""The order of dispatch, worked by hand: look-ups of a batch, what is fetched ahead, and for which visit.

Traces are written experts[token][layer][rank]; with four experts a layer, layer 1 has experts 4 to 7.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny import tiny_inputs, tiny_model, tiny_profile, tiny_scenario, tiny_trace

from prestage.engine.decide.dispatch import Visit, launch_order, single_accesses, step_accesses, visits
from prestage.engine.decide.memory_manager import MemoryManager
from prestage.engine.loading.deciders import dispatched, make_manager, make_prefetch
from prestage.engine.policies.prefetch import Moment, NextLayer, Options
from prestage.workloads.batches import DECODE, PREFILL, Step, plan_steps
from prestage.workloads.guesses import Guesses
from prestage.workloads.trace import RoutingTrace


def step(*rows: int, phase: int = DECODE) -> Step:
    return Step(phase, np.array(rows, dtype=np.int64))


def play(
    trace: RoutingTrace, slots: int, told: list[list[list[list[int]]]] | None = None, batch: int = 1, **prefetch: Any
) -> tuple[list[Visit], MemoryManager]:
    """Dispatch a whole trace with `slots` global slots, and fetch every guess.

    `told` are the guesses as told[token][layer][horizon - 1][rank], tokens in the order of the steps.
    """
    guesses = None
    prefetch["lookahead"] = 0
    if told is not None:
        steps = plan_steps(trace.sequence, trace.phase, batch=batch)
        rows = np.concatenate([step.rows for step in steps])
        guesses = Guesses(rows, np.array(told, dtype=np.int16))
        prefetch.update(lookahead=guesses.experts.shape[2], k=guesses.experts.shape[3])
    scenario = tiny_scenario(memory={"gpu_budget": f"{slots}experts"}, prefetch=prefetch, workload={"batch": batch})
    model = tiny_model(trace.layers, trace.num_experts, trace.k, copy_ns=1)
    inputs = replace(tiny_inputs(model, tiny_profile(), trace, scenario), guesses=guesses)
    manager = make_manager(inputs)
    return list(dispatched(inputs, manager, make_prefetch(scenario, model))), manager


def prefetched(visit: Visit) -> list[tuple[int, int]]:
    """(expert, target visit) of each prefetch of a visit."""
    return [(admission.expert, target) for admission, target in visit.prefetches]


def test_experts_are_launched_in_the_order_of_access_or_those_that_were_found_first() -> None:
    # Room for three: 3 and 1 come at the first visit; of 0, 1, 2, 3 the second finds 1 and 3, and 0 has room in the
    # first wave, 2 in the place of one of these in another.
    batch, _ = play(tiny_trace([[[3, 1]], [[3, 1]], [[0, 1]], [[2, 3]]], sequence=np.array([0, 1, 0, 1])), 3, batch=2)
    first, second = batch
    assert [visit.accesses.experts for visit in batch] == [[3, 1], [0, 1, 2, 3]]
    assert list(launch_order(first, first.waves[0], False)) == [(3, 2, 0), (1, 2, 1)]
    wave, last = second.waves
    assert (list(wave.found), [admission.expert for admission in wave.admitted]) == ([1, 3], [0])
    assert list(launch_order(second, wave, False)) == [(0, 1, 2), (1, 1, 1), (3, 1, 0)]
    assert list(launch_order(second, wave, True)) == [(1, 1, 1), (3, 1, 0), (0, 1, 2)]
    for resident_first in (False, True):
        assert list(launch_order(second, last, resident_first)) == [(2, 1, 3)]


def test_a_policy_learns_of_misses_also_of_what_the_cpu_computes() -> None:
    seen: list[tuple[int, float]] = []

    class Watching(NextLayer):
        def choose(self, ranked: Sequence[Sequence[int]], moment: Moment) -> Sequence[Sequence[int]]:
            seen.append((moment.visit, moment.misses_per_visit))
            return ()

    # Nothing ever comes to the GPU: each of the two visits misses two experts, which the CPU computes.
    scenario = tiny_scenario(miss={"policy": "cpu"}, workload={"batch": 2})
    trace = tiny_trace([[[0]], [[0]], [[1]], [[1]]], sequence=np.array([0, 0, 1, 1]))
    inputs = tiny_inputs(tiny_model(1), tiny_profile(), trace, scenario)
    decided = list(dispatched(inputs, make_manager(inputs), Watching(Options(k=1, lookahead=1, experts=4))))
    assert [len(visit.resolution.accesses) for visit in decided] == [2, 2]
    assert seen == [(0, 2.0), (1, 2.0)]


# Look-ups.


def test_the_accesses_of_one_token_are_its_experts_in_the_routers_order() -> None:
    trace = tiny_trace([[[2, 0], [1, 3]]], weights=np.array([[[0.75, 0.25], [0.5, 0.5]]]))
    first, second = step_accesses(trace, step(0))
    assert (first.experts, first.tokens, first.recency, first.weights) == ([2, 0], [1, 1], [2, 0], [0.75, 0.25])
    assert (second.experts, second.tokens, second.recency, second.weights) == ([5, 7], [1, 1], [5, 7], [0.5, 0.5])


def test_a_batch_looks_every_expert_up_once_at_its_first_appearance() -> None:
    # Pairs in order: 2 0, 0 1, 2 3. First appearances 2 0 1 3; last ones 0 1 2 3; 2 and 0 by two tokens each.
    weights = np.array([[[0.5, 0.5]], [[0.75, 0.25]], [[0.25, 0.75]]])
    trace = tiny_trace([[[2, 0]], [[0, 1]], [[2, 3]]], weights=weights)
    (accesses,) = step_accesses(trace, step(0, 1, 2))
    assert accesses.experts == [2, 0, 1, 3]
    assert accesses.tokens == [2, 2, 1, 1]
    assert accesses.recency == [0, 1, 2, 3]
    # In the order of last appearance: 0 has 0.5 + 0.75, 1 has 0.25, 2 has 0.5 + 0.25, 3 has 0.75.
    assert accesses.weights == [1.25, 0.25, 0.75, 0.75]
    # The rows of a step may stand in any order: the places' order counts.
    (accesses,) = step_accesses(trace, step(2, 0, 1))
    assert (accesses.experts, accesses.recency) == ([2, 3, 0, 1], [3, 2, 0, 1])


def test_without_gate_weights_every_token_weighs_one() -> None:
    (accesses,) = step_accesses(tiny_trace([[[2, 0]], [[0, 1]]]), step(0, 1))
    assert (accesses.recency, accesses.weights) == ([2, 0, 1], [1.0, 2.0, 1.0])
    (accesses,) = step_accesses(tiny_trace([[[2, 0]]]), step(0))
    assert accesses.weights == [1.0, 1.0]


def test_a_token_that_is_not_routed_at_a_layer_looks_nothing_up_there() -> None:
    present = np.array([[True, False], [True, True]])
    trace = tiny_trace([[[1], [0]], [[2], [3]]], present=present)
    assert [accesses.experts for accesses in step_accesses(trace, step(0, 1))] == [[1, 2], [7]]
    assert [accesses.experts for accesses in step_accesses(trace, step(0))] == [[1], []]
    assert [(layer, a.experts) for layer, a in single_accesses(trace, step(0, 1))] == [(0, [1]), (0, [2]), (1, [7])]


def test_single_look_ups_take_every_pair_by_itself() -> None:
    trace = tiny_trace([[[2, 0], [1, 3]], [[0, 1], [1, 2]]], weights=np.full((2, 2, 2), 0.5))
    pairs = list(single_accesses(trace, step(0, 1)))
    assert [(layer, a.experts) for layer, a in pairs] == [
        (0, [2]), (0, [0]), (0, [0]), (0, [1]), (1, [5]), (1, [7]), (1, [5]), (1, [6]),
    ]  # fmt: skip
    assert all(a.recency == a.experts and a.tokens == [1] and a.weights == [0.5] for _, a in pairs)


# Visits.


def test_visits_are_numbered_step_by_step_and_layer_by_layer() -> None:
    trace = tiny_trace([[[0], [1]], [[2], [3]]], phase=np.array([PREFILL, DECODE]))
    run, manager = play(trace, 4)
    assert [(visit.number, visit.step, visit.layer) for visit in run] == [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1)]
    assert [visit.accesses.experts for visit in run] == [[0], [5], [2], [7]]
    assert [visit.assigned_bytes for visit in run] == [1, 2, 3, 4]
    assert all(visit.prefetches == [] for visit in run)
    assert manager.evicted == 0


def test_decisions_are_made_when_they_are_asked_for() -> None:
    model, scenario = tiny_model(2), tiny_scenario()
    inputs = tiny_inputs(model, tiny_profile(), tiny_trace([[[0], [1]]]), scenario)
    manager = make_manager(inputs)
    run = dispatched(inputs, manager, make_prefetch(scenario, model))
    assert not manager.assigned
    next(run)
    assert list(manager.assigned) == [0]


# Prefetches.


def test_prefetches_go_nearest_layer_first_then_rank_by_rank_over_the_tokens() -> None:
    # Two tokens in one step, three layers, guesses made at layer 0 for layers 1 and 2, two ranks each.
    trace = tiny_trace([[[0], [0], [0]], [[0], [0], [0]]], sequence=np.array([0, 1]))
    nothing = [[-1, -1], [-1, -1]]
    told = [[[[1, 2], [3, -1]], nothing, nothing], [[[0, 1], [2, 0]], nothing, nothing]]
    run, _ = play(trace, 12, told, batch=2)
    # Layer 1 (experts 4-7): first ranks 1 and 0, second ranks 2 and 1 (there already); layer 2 (8-11): 3, 2, then 0.
    assert prefetched(run[0]) == [(5, 1), (4, 1), (6, 1), (11, 2), (10, 2), (8, 2)]
    assert prefetched(run[1]) == []


def test_a_guess_across_the_token_boundary_is_for_the_sequences_next_step() -> None:
    # One sequence, two layers, two tokens: at layer 1 of token 0, one layer ahead is layer 0 of token 1 (visit 2);
    # three layers ahead of layer 0 is layer 1 of token 1 (visit 3).
    trace = tiny_trace([[[0], [0]], [[1], [1]]])
    none = [[-1], [-1], [-1]]
    run, _ = play(trace, 8, [[[[-1], [-1], [3]], [[2], [-1], [-1]]], [none, none]])
    assert prefetched(run[0]) == [(7, 3)]
    assert prefetched(run[1]) == [(2, 2)]


def test_the_next_step_of_a_sequence_may_be_several_steps_away() -> None:
    # Sequence 0 has rows 0 and 1; sequence 1 has row 2, a prompt, and row 3. Two places: step 0 runs the prompt, step 1
    # rows 0 and 3, step 2 row 1. The prompt's guess is for step 1, row 0's for step 2, and row 3 has no next step.
    trace = tiny_trace([[[0]], [[1]], [[2]], [[3]]], sequence=np.array([0, 0, 1, 1]), phase=np.array([1, 1, 0, 1]))
    # One layer, so that every guess crosses the boundary. Guesses stand in the order in which rows run: 2, 0, 3, 1.
    told = [[[[0]]], [[[1]]], [[[-1]]], [[[-1]]]]
    run, _ = play(trace, 4, told, batch=2)
    assert [visit.accesses.experts for visit in run] == [[2], [0, 3], [1]]
    assert [prefetched(visit) for visit in run] == [[(0, 1)], [(1, 2)], []]
    # Sequence 1 ends with step 0, sequence 0 goes on: the target is in sequence 0's next step.
    trace = tiny_trace([[[0]], [[1]], [[2]]], sequence=np.array([0, 1, 0]))
    run, _ = play(trace, 4, [[[[2]]], [[[-1]]], [[[-1]]]], batch=2)
    assert [visit.accesses.experts for visit in run] == [[0, 1], [2]]
    assert [prefetched(visit) for visit in run] == [[(2, 1)], []]


def test_a_prefetch_of_an_assigned_expert_orders_nothing_and_renews_nothing() -> None:
    # Two slots. Visits: 0, then 5 (layer 1), then 1 (evicts the least recent), each guessing expert 0 at layer 1.
    trace = tiny_trace([[[0], [1]], [[1], [1]]])
    told = [[[[-1]], [[0]]], [[[-1]], [[-1]]]]
    run, manager = play(trace, 2, told)
    assert [prefetched(visit) for visit in run] == [[], [], [], []]
    assert manager.dropped == 0
    assert [manager.copy_expert[copy] for copy in manager.evicted_copies] == [0]  # as without the guess


def test_after_the_launch_prefetches_may_evict_what_the_visit_used_and_before_it_they_may_not() -> None:
    # One slot: visit 0 uses expert 0 and guesses expert 1 of layer 1.
    trace = tiny_trace([[[0], [1]]])
    told = [[[[1]], [[-1]]]]
    run, manager = play(trace, 1, told, issue="after_launch")
    assert prefetched(run[0]) == [(5, 1)]
    assert run[0].prefetches[0][0].former == (0,)
    assert list(run[1].waves[0].found) == [5]
    assert (manager.dropped, manager.evicted) == (0, 1)
    run, manager = play(trace, 1, told, issue="before_launch")
    assert prefetched(run[0]) == []
    assert (manager.dropped, manager.evicted) == (1, 1)  # the demand of layer 1 evicts expert 0


def test_before_the_launch_only_the_last_wave_is_pinned() -> None:
    # Two slots, three experts wanted: waves [0, 1] and [2]. A prefetch before the launch may take the room of 1 (0's
    # went to 2), but not that of 2.
    trace = tiny_trace([[[0, 1, 2], [0, 1, 2]]])
    run, manager = play(trace, 2, [[[[0, 1, 3]], [[-1, -1, -1]]]], issue="before_launch")
    assert [[a.expert for a in wave.admitted] for wave in run[0].waves] == [[0, 1], [2]]
    assert prefetched(run[0]) == [(4, 1)]
    assert manager.dropped == 2


def test_without_protection_a_later_prefetch_takes_the_room_of_an_earlier_one() -> None:
    trace = tiny_trace([[[0], [1]]])
    told = [[[[1, 2, 3]], [[-1, -1, -1]]]]
    run, manager = play(trace, 1, told)
    assert prefetched(run[0]) == [(5, 1)]  # protected until visit 1
    assert (manager.dropped, manager.evicted) == (2, 1)
    run, manager = play(trace, 1, told, protect="none")
    assert prefetched(run[0]) == [(5, 1), (6, 1), (7, 1)]
    assert (manager.dropped, manager.evicted) == (0, 4)  # 0, 5 and 6, then 7 for the demand of 5


def test_the_guesses_of_a_visit_are_merged_before_any_asks_for_room() -> None:
    # Three tokens in one step of two layers, one slot. First ranks name 1, 2 and 1, second ranks 3, 1 and 2: the
    # candidates for layer 1 are 1, 2 and 3 (experts 5, 6 and 7), named three times, twice and once.
    trace = tiny_trace([[[0], [0]]] * 3, sequence=np.array([0, 1, 2]))
    nothing = [[-1, -1]]
    told = [[[[1, 3]], nothing], [[[2, 1]], nothing], [[[1, 2]], nothing]]
    run, manager = play(trace, 1, told, batch=3)
    assert prefetched(run[0]) == [(5, 1)]  # protected: 6 and 7 find no room, and each is dropped once
    assert (manager.dropped, manager.guessed, manager.unique_guesses) == (2, 6, 3)
    assert manager.saved_copies == {5: 2}  # 6 was named twice, but not copied
    # Without protection each takes the room of the one before, and none comes back.
    run, manager = play(trace, 1, told, batch=3, protect="none")
    assert prefetched(run[0]) == [(5, 1), (6, 1), (7, 1)]
    assert (manager.dropped, manager.saved_copies) == (0, {5: 2, 6: 1})


def test_an_expert_that_is_wanted_for_several_visits_is_a_candidate_for_the_first() -> None:
    # One layer, three tokens: at visit 0 expert 1 is guessed for visits 1 and 2, behind expert 2 for visit 1.
    trace = tiny_trace([[[0]], [[2]], [[1]]])
    nothing = [[[-1, -1], [-1, -1]]]
    run, manager = play(trace, 3, [[[[2, 1], [1, -1]]], nothing, nothing])
    assert prefetched(run[0]) == [(2, 1), (1, 1)]
    assert (manager.guessed, manager.unique_guesses, manager.saved_copies) == (3, 2, {1: 1})
    run, manager = play(trace, 1, [[[[2, 1], [1, -1]]], nothing, nothing])
    assert (prefetched(run[0]), manager.dropped) == ([(2, 1)], 1)


def test_where_layers_share_experts_one_index_is_one_candidate() -> None:
    # Layers 1 and 2 are both guessed to take index 1, which is one expert: one candidate, for layer 1.
    trace = tiny_trace([[[0], [1], [1]]])
    told = np.array([[[[1], [1]], [[-1], [-1]], [[-1], [-1]]]], dtype=np.int16)
    scenario = tiny_scenario(memory={"gpu_budget": "2experts", "scope": "shared"}, prefetch={"lookahead": 2, "k": 1})
    inputs = tiny_inputs(tiny_model(3), tiny_profile(), trace, scenario)
    inputs = replace(inputs, guesses=Guesses(np.zeros(1, dtype=np.int64), told))
    manager = make_manager(inputs)
    run = list(dispatched(inputs, manager, make_prefetch(scenario, inputs.model)))
    assert prefetched(run[0]) == [(1, 1)]
    assert (manager.guessed, manager.unique_guesses, manager.dropped) == (2, 1, 0)


def test_an_unknown_time_of_issue_is_refused() -> None:
    model, scenario = tiny_model(1), tiny_scenario()
    inputs = tiny_inputs(model, tiny_profile(), tiny_trace([[[0]]]), scenario)
    run = visits(inputs.trace, inputs.steps, make_manager(inputs), make_prefetch(scenario, model), None, issue="late")
    with pytest.raises(ValueError, match=r"issue = 'late': choose one of after_launch, before_launch"):
        next(run)
