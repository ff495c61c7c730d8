"""Routing that knows the cache: worked by hand, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from prestage.engine.loading.rerouting import rerouted
from prestage.engine.measure.misses import routing_metrics
from prestage.engine.policies.routing import ROUTING, Leeway
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import Scenario
from prestage.engine.simulate import simulate_inputs
from prestage.engine.timing.ready import is_ready
from prestage.testing import record, tiny_inputs, tiny_model, tiny_profile, tiny_scenario, tiny_trace
from prestage.workloads.synthetic import synthesize
from prestage.workloads.trace import RoutingTrace
from prestage.workloads.trace_limits import TraceError

ENGINES = ["simpy", pytest.param("compiled", marks=pytest.mark.skipif(not is_ready(), reason="not compiled yet"))]


@pytest.mark.parametrize(
    ("gates", "resident", "margin", "keep", "used"),
    [
        ([0.4, 0.3, 0.25, 0.05], [0, 0, 1, 1], 0.1, 0, [0, 2]),  # .25 + .1 beats .3; not .4; .05 + .1 beats none
        ([0.4, 0.3, 0.25, 0.05], [0, 0, 1, 1], 0.2, 0, [0, 2]),  # .25 + .2 is first, and .4 beats .05 + .2
        ([0.4, 0.3, 0.25, 0.05], [0, 0, 1, 1], 0.4, 0, [2, 3]),  # both beat .4
        ([0.4, 0.3, 0.25, 0.05], [0, 0, 1, 1], 0.4, 1, [0, 2]),  # the best stays in any case
        ([0.4, 0.3, 0.25, 0.05], [0, 1, 1, 1], 0.4, 0, [1, 2]),  # who is resident keeps its order
        ([0.5, 0.25, 0.25, 0.0], [0, 0, 1, 0], 0.0, 0, [0, 1]),  # a tie is the router's
    ],
)
def test_a_resident_expert_wins_within_the_margin(
    gates: list[float], resident: list[int], margin: float, keep: int, used: list[int]
) -> None:
    known = np.array(resident, dtype=np.bool_)
    assert ROUTING["cache-aware"](np.array(gates), known, Leeway(2, margin, keep)).tolist() == used


@pytest.mark.parametrize("name", ROUTING)
def test_without_a_margin_every_way_is_the_router(name: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        gates = np.sort(rng.random(6))[::-1].copy()
        assert ROUTING[name](gates, rng.random(6) < 0.5, Leeway(3)).tolist() == [0, 1, 2]


def three_tokens(**settings: Any) -> Inputs:
    """One layer, room for one expert; tokens choose 0, 1 and 2 at .6, and 0 is the runner-up at .5, .1 for token 2."""
    settings = {"policy": "cache-aware", "margin": 0.2, "keep": 0, **settings}
    extra = {
        "runners_up": np.array([[[3]], [[0]], [[0]]], dtype=np.uint8),
        "runners_up_weights": np.array([[[0.5]], [[0.5]], [[0.125]]], dtype=np.float16),
    }
    weights = np.full((3, 1, 1), 0.625, dtype=np.float16)
    trace = tiny_trace([[[0]], [[1]], [[2]]], weights=weights, extra=extra)
    scenario = tiny_scenario(memory={"gpu_budget": "1experts"}, routing=settings)
    return tiny_inputs(tiny_model(1), tiny_profile(), trace, scenario)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_miss_that_a_runner_up_saves_takes_no_copy(engine: str) -> None:
    # Token 0 fetches 0. Token 1 chose 1, but 0 is there and within .2: used. Token 2 chose 2; 0 is .5 behind: fetched.
    inputs = rerouted(three_tokens())
    assert inputs.trace.experts.ravel().tolist() == [0, 0, 2]
    # dense 3, copy 20, expert 7 | 3 + 7 | 3, copy 20 into the room that the kernel has left, 7
    recording = record(inputs, engine=engine)
    assert int(recording.spans["end_ns"].max()) == 30 + 10 + 30
    # One choice of three changed; of 3 x .625 gate weight, .125 less was used.
    said = routing_metrics(inputs)
    assert said == {"policy": "cache-aware", "changed": 1 / 3, "gate_mass": 1.75 / 1.875}


def test_the_run_decides_as_the_choices_were_made() -> None:
    trace = synthesize(60, 3, 8, 4, skew=0.5, seed=7)
    narrow = trace.narrowed(2)
    scenario = tiny_scenario(memory={"gpu_budget": "9experts"}, routing={"policy": "cache-aware", "margin": 0.3})
    plain = tiny_inputs(tiny_model(3, experts=8, top_k=2), tiny_profile(), narrow, scenario)
    inputs = rerouted(plain)
    assert inputs.rerouted is not None and 0 < inputs.rerouted.changed < inputs.rerouted.choices
    before, after = (simulate_inputs(each, baselines=False).data for each in (plain, inputs))
    assert after["counts"]["miss"] < before["counts"]["miss"] and "routing" not in before
    # Who was taken instead was there: of the choices that changed none missed.
    again = rerouted(inputs_of(inputs, narrow))
    assert np.array_equal(again.trace.experts, inputs.trace.experts)


def inputs_of(inputs: Inputs, trace: RoutingTrace) -> Inputs:
    return tiny_inputs(inputs.model, inputs.profile, trace, inputs.scenario)


def test_a_trace_without_gates_is_refused_by_name() -> None:
    bare = tiny_trace([[[0]], [[1]]])
    scenario = tiny_scenario(memory={"gpu_budget": "1experts"}, routing={"policy": "cache-aware"})
    with pytest.raises(ScenarioError, match="no runners_up and no runners_up_weights and no weights"):
        rerouted(tiny_inputs(tiny_model(1), tiny_profile(), bare, scenario))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"memory": {"gpu_budget": "1experts", "eviction": "belady"}}, "memory.eviction = 'belady'"),
        ({"prefetch": {"policy": "adaptive-link", "lookahead": 1}}, "looks at the clock"),
        ({"routing": {"policy": "cache-aware", "keep": 2}}, "routing.keep = 2"),
    ],
)
def test_what_cannot_be_decided_beforehand_is_refused(sections: dict[str, Any], words: str) -> None:
    inputs = three_tokens()
    known = {"memory": {"gpu_budget": "1experts"}, "routing": {"policy": "cache-aware"}, **sections}
    scenario: Scenario = tiny_scenario(**known)
    with pytest.raises(ScenarioError, match=words):
        rerouted(tiny_inputs(inputs.model, inputs.profile, inputs.trace, scenario))


def test_runners_up_must_be_others() -> None:
    with pytest.raises(TraceError, match=r"runners_up at row 0, layer 0: \[0\] behind \[0\]"):
        tiny_trace([[[0]]], extra={"runners_up": np.zeros((1, 1, 1), dtype=np.uint8)})
