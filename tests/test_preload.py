"""What lies in memory before a run: whose, how much of it, and that static placement keeps it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny import tiny_inputs, tiny_model, tiny_profile, tiny_run, tiny_scenario, tiny_trace

from prestage.engine.loading.deciders import make_manager
from prestage.engine.measure.metrics import metrics
from prestage.engine.measure.recording import Recording
from prestage.engine.policies.eviction_base import Setting
from prestage.engine.policies.preload import PRELOAD
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.simulate import simulate

#: Two layers of four experts, each of 20 bytes; the most popular are 3 and 1 of the first layer, then 0 of the second.
POPULARITY = np.array([[1.0, 8.0, 0.0, 9.0], [7.0, 2.0, 3.0, 4.0]])


def inputs(**memory: object) -> Inputs:
    trace = tiny_trace([[[0], [0]]], extra={"popularity": POPULARITY})
    loaded: Inputs = tiny_inputs(tiny_model(2), tiny_profile(), trace, tiny_scenario(memory=memory))
    return loaded


@pytest.mark.parametrize(
    ("memory", "there"),
    [
        ({"preload": "none", "gpu_budget": "3experts"}, []),
        ({"preload": "popular", "gpu_budget": "3experts"}, [3, 1, 4]),
        # A share of two experts for each layer.
        ({"preload": "popular", "gpu_budget": "4experts", "scope": "per-layer"}, [3, 1, 4, 7]),
        # Whole layers, from the last one back, as far as there is room.
        ({"preload": "layers", "gpu_budget": "6experts"}, [4, 5, 6, 7, 0, 1]),
        ({"preload": "layers", "gpu_budget": "6experts", "cpu_layers": 1}, [4, 5, 6, 7]),
        ({"preload": "layers", "gpu_budget": "1experts", "cpu_layers": 2}, []),
        # Whole layers from the first on; as many of each layer, by index.
        ({"preload": "front", "gpu_budget": "6experts"}, [0, 1, 2, 3, 4, 5]),
        ({"preload": "even", "gpu_budget": "6experts"}, [0, 4, 1, 5, 2, 6]),
    ],
)
def test_what_is_wanted_most_is_there_as_far_as_there_is_room(memory: dict[str, object], there: list[int]) -> None:
    manager = make_manager(inputs(**memory))
    assert list(manager.assigned) == there
    assert manager.assigned_bytes == 20 * len(there) <= manager.budget_bytes


def test_whole_layers_begin_with_the_first_that_may_be_taken() -> None:
    setting = Setting(experts=4, trace=tiny_trace([[[0], [0], [0]]]))
    assert list(PRELOAD["front"](setting, 1)) == [4, 5, 6, 7, 8, 9, 10, 11]
    assert list(PRELOAD["layers"](setting, 1)) == [8, 9, 10, 11, 4, 5, 6, 7]
    assert list(PRELOAD["even"](setting, 1)) == [4, 8, 5, 9, 6, 10, 7, 11]


def test_every_way_to_preload_is_told_apart_here() -> None:
    assert list(PRELOAD) == ["none", "popular", "layers", "front", "even"]


def test_without_a_stated_popularity_the_first_tenth_of_the_steps_says_it() -> None:
    # 20 steps: the first two use expert 2, the rest 0.
    trace = tiny_trace([[[2]], [[2]], *[[[0]]] * 18])
    scenario = tiny_scenario(memory={"preload": "popular", "gpu_budget": "1experts"})
    assert list(make_manager(tiny_inputs(tiny_model(1), tiny_profile(), trace, scenario)).assigned) == [2]


def test_layers_that_do_not_fit_are_refused_with_what_they_take() -> None:
    with pytest.raises(ScenarioError) as error:
        make_manager(inputs(preload="layers", gpu_budget="3experts", cpu_layers=1))
    assert str(error.value) == (
        "memory.cpu_layers = 1: the experts of the other layers take 80 bytes, and memory.gpu_budget = '3experts' is "
        "60 bytes: leave more layers to the CPU, or give more budget"
    )


def test_what_is_preloaded_is_found_at_once_and_was_never_copied() -> None:
    # dense 3, kernel 7, twice.
    trace = tiny_trace([[[3], [0]]], extra={"popularity": POPULARITY})
    scenario = tiny_scenario(memory={"preload": "popular", "gpu_budget": "3experts"})
    recording: Recording = tiny_run(tiny_model(2), tiny_profile(), trace, scenario)
    assert recording.makespan_ns == 20
    assert metrics(recording)["counts"]["cache_hit"] == 2 and metrics(recording)["bytes"]["demand"] == 0


def test_static_placement_by_layers_moves_nothing_and_leaves_the_first_layers_to_the_cpu() -> None:
    scenario = load_scenario("llama-cpp-n-cpu-moe", ["workload.tokens=3"])
    data = simulate(scenario, baselines=False).data
    on_cpu, k = scenario.memory.cpu_layers, data["model"]["top_k"]
    assert on_cpu is not None and data["counts"]["evict"] == data["counts"]["prefetch"] == 0
    assert data["bytes"] == {"demand": 0, "prefetch": 0, "prefetch_not_used": 0}
    for row in data["by_layer"]:
        # Three tokens of one sequence: k experts each.
        assert (row["miss"], row["cache_hit"]) == ((3 * k, 0) if row["layer"] < on_cpu else (0, 3 * k))
    assert data["miss"]["ways"]["cpu"] == 3 * k * on_cpu
    assert data["memory_utilization"] > 0.999  # full from the first visit on
    json.dumps(data)


def test_static_placement_by_popularity_keeps_its_experts_whatever_misses() -> None:
    scenario = load_scenario("cpu-experts", ["workload.tokens=20"])
    result = simulate(scenario, baselines=False)
    manager = result.recording.manager
    assert not len(manager.evicted_copies) and len(manager.assigned) == len(manager.copy_expert)
    assert result.data["miss"]["ways"]["cpu"] == result.data["counts"]["miss"] > 0
