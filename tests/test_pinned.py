"""Pinned experts beside a cache, layers that stream through two buffers, guesses as good as they are far: by hand."""

from __future__ import annotations

import numpy as np
import pytest

from prestage.engine.policies.eviction import EVICTION, Lru, Setting
from prestage.engine.policies.pinned import Pinned
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.timing.ready import is_ready
from prestage.resources.timeline import EXPERT
from prestage.testing import record, tiny_inputs, tiny_model, tiny_profile, tiny_scenario, tiny_trace
from prestage.workloads.batches import plan_steps
from prestage.workloads.predictors import Oracle
from prestage.workloads.synthetic import synthesize

ENGINES = ["simpy", pytest.param("compiled", marks=pytest.mark.skipif(not is_ready(), reason="not compiled yet"))]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("pinned", "missed"), [("1experts", [1, 2, 1]), ("0%", [1, 2, 0])])
def test_a_pinned_expert_stays_whatever_the_policy_says(engine: str, pinned: str, missed: list[int]) -> None:
    # Room for two, the most popular before the run: 0 and 3. Pinned, 0 stays, and 1, 2 and 1 take turns in the other
    # place. Else 1 takes the place of 3, 2 that of 0, which was used longest ago; 1 is still there, and 0 misses.
    popularity = np.array([[9, 1, 2, 5]])
    trace = tiny_trace([[[0]], [[1]], [[2]], [[1]], [[0]]], extra={"popularity": popularity})
    memory = {"gpu_budget": "2experts", "preload": "popular", "pinned": pinned}
    recording = record(tiny_inputs(tiny_model(1), tiny_profile(), trace, tiny_scenario(memory=memory)), engine=engine)
    demanded = recording.manager.copy_expert[recording.manager.copy_reason == 0].tolist()
    assert demanded == missed
    # Each of five visits computes for 3 + 7; a copy of 20 before the kernel for each miss.
    assert int(recording.spans["end_ns"].max()) == 5 * 10 + 20 * len(missed)


def test_what_is_spent_leaves_beside_pinned_experts_too() -> None:
    # Room for two, 0 and 3 before the run, 0 pinned. 1 is copied in place of 3 and leaves after its visit: the second 1
    # is copied again, into a room that is free by then.
    popularity = np.array([[9, 1, 2, 5]])
    trace = tiny_trace([[[1]], [[1]], [[0]]], extra={"popularity": popularity})
    memory = {"gpu_budget": "2experts", "preload": "popular", "pinned": "1experts", "eviction": "spent"}
    manager = record(tiny_inputs(tiny_model(1), tiny_profile(), trace, tiny_scenario(memory=memory))).manager
    assert manager.copy_expert[manager.copy_reason == 0].tolist() == [1, 1]
    assert list(manager.assigned) == [0]


@pytest.mark.parametrize("name", EVICTION)
def test_no_policy_is_asked_about_a_pinned_expert(name: str) -> None:
    trace = synthesize(20, 2, 6, 2, seed=1)
    steps = plan_steps(trace.sequence, trace.phase)
    setting = Setting(capacity=4, layers=(0, 1), experts=6, trace=trace, steps=steps)
    policy = Pinned(EVICTION[name], frozenset({0, 7}), setting)
    policy.begin(0, 0, [0, 1, 7], [1.0, 1.0, 1.0])
    for expert in (0, 7, 1, 2):
        policy.admit(expert, True)
        policy.use(expert, 1.0)
    assert sorted(policy.victims()) == [1, 2]
    policy.evict(1)
    assert list(policy.victims()) == [2]


def test_the_rest_has_the_room_that_pinned_experts_leave() -> None:
    assert Pinned(Lru, {0, 1}, Setting(capacity=5, layers=(0,), experts=4))._rest.setting.capacity == 3


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ({"gpu_budget": "2experts", "pinned": "1experts"}, "needs a preload"),
        ({"gpu_budget": "2experts", "pinned": "1", "preload": "popular"}, "write it as '10%'"),
        ({"gpu_budget": "2experts", "pinned": "2experts", "preload": "popular"}, "room for one more expert"),
    ],
)
def test_what_cannot_be_pinned_is_refused(memory: dict[str, str], words: str) -> None:
    with pytest.raises(ScenarioError, match=words):
        record(tiny_inputs(tiny_model(1), tiny_profile(), tiny_trace([[[0]]]), tiny_scenario(memory=memory)))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("policy", "ends"), [("stream-prefill", [90, 170, 250]), ("none", [90, 180, 270])])
def test_layers_stream_through_two_buffers(engine: str, policy: str, ends: list[int]) -> None:
    # Four tokens use all four experts of three layers; room for two layers. A layer: dense 3, copies 4 x 20, and the
    # last kernel, of 7, behind its copy: 90. Streamed, the next layer's copies queue behind these and go on from 83:
    # 83 + 80 + 7 = 170, then 250: the link never waits. On demand each layer's wait for its dense part: 90 more each.
    trace = tiny_trace([[[token]] * 3 for token in range(4)], phase=np.zeros(4, dtype=np.uint8))
    prefetch = {"policy": policy, "lookahead": 1, "stream_tokens": 4}
    scenario = tiny_scenario(
        memory={"gpu_budget": "8experts"}, prefetch=prefetch, workload={"trace": "tiny", "prefill": "whole"}
    )
    recording = record(tiny_inputs(tiny_model(3), tiny_profile(), trace, scenario), engine=engine)
    kernels = np.sort(recording.spans[recording.spans["kind"] == EXPERT]["end_ns"])
    assert kernels[3::4].tolist() == ends


def test_a_guess_is_as_good_as_it_is_far_and_none_is_made_of_a_token_that_nobody_has() -> None:
    trace = synthesize(30, 4, 8, 2, seed=5)
    steps = plan_steps(trace.sequence, trace.phase)
    guesses = Oracle(by_horizon=[1.0, 0.0], seed=3).guess(trace, steps, 3, 2).experts
    for layer in range(4):
        for ahead in range(3):
            made = guesses[:-1, layer, ahead]
            if layer + ahead + 1 >= 4:
                assert (made == -1).all()  # the next token's
            else:
                truth = trace.experts[:-1, layer + ahead + 1]
                assert (made == truth).all() if ahead == 0 else not (made == truth).any()


def test_a_draft_lets_the_next_token_be_guessed() -> None:
    trace = synthesize(30, 4, 8, 2, seed=5)
    steps = plan_steps(trace.sequence, trace.phase)
    guesses = Oracle(by_horizon=[0.0], draft_recall=1.0, seed=3).guess(trace, steps, 2, 2)
    assert np.array_equal(guesses.experts[:-1, 3, 0], trace.experts[1:, 0])
    assert np.array_equal(guesses.experts[:-1, 2, 1], trace.experts[1:, 0])
    assert not (guesses.experts[:-1, 2, 0] == trace.experts[:-1, 3]).any()
    assert guesses.confidences is not None and guesses.confidences[0, 3, 0].tolist() == [1.0, 1.0]
