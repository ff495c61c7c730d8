"""Draft layers: more layers of the model, whose experts are copied as all others are, and whose routing is stated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from prestage.engine.load import load_inputs
from prestage.engine.loading.drafting import with_draft_layers
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.scenario import Scenario, make_scenario
from prestage.engine.simulate import Result, simulate
from prestage.resources.timeline import DEMAND, DENSE, EXPERT, HEAD
from prestage.testing import tiny_model, tiny_trace
from prestage.workloads.model import load_model
from prestage.workloads.trace import RoutingTrace


def scenario(*, drafts: int = 1, layers: bool = True, **sections: Any) -> Scenario:
    speculation = {"drafts": drafts, "acceptance": 0.5, "draft_layers": layers}
    data: dict[str, Any] = {
        "model": {"preset": "qwen3-30b-a3b", "layers": 3},
        "machine": {"profile": "h200"},
        "workload": {"synthetic": {"tokens": 90, "sequences": 3, "prefill_tokens": 10}},
        "memory": {"gpu_budget": "100experts"},
        "prefetch": {"policy": "none"},
        "requests": {"rate": 50.0, "count": 4, "prompt_tokens": 9, "output_tokens": 6, "speculation": speculation},
    }
    data["requests"] |= sections.pop("asked", {})
    for name, keys in sections.items():
        data[name] = {**data.get(name, {}), **keys}
    return make_scenario(data)


def run(chosen: Scenario, engine: str = "compiled") -> Result:
    return simulate(chosen, baselines=False, engine=engine)


def test_a_draft_layer_does_with_a_row_what_the_last_layer_does_with_the_row_whose_token_it_sees() -> None:
    """Rows 0, 1, 3 are of sequence 0, rows 2 and 4 of sequence 1; the last of each has nothing behind it."""
    trace = RoutingTrace(
        np.array([[[0], [1]], [[0], [2]], [[0], [3]], [[0], [4]], [[0], [5]]], dtype=np.uint8),
        8,
        sequence=np.array([0, 0, 1, 0, 1]),
    )
    model, longer = with_draft_layers(tiny_model(2, experts=8), trace, 2)
    assert model.layers == longer.layers == 4
    assert longer.experts[:, 1, 0].tolist() == [1, 2, 3, 4, 5]
    assert longer.experts[:, 2, 0].tolist() == [2, 4, 5, 4, 5]
    assert longer.experts[:, 3, 0].tolist() == [4, 4, 5, 4, 5]
    longer.check()


def test_guesses_of_what_came_behind_the_last_layer_are_none() -> None:
    """Two layers ahead of layer 0, and one of layer 1, was the next token's layer 0; there is a draft layer now."""
    trace = tiny_trace([[[0], [1]], [[2], [3]]])
    guesses = np.arange(8, dtype=np.int16).reshape(2, 2, 2, 1)
    trace = RoutingTrace(trace.experts, trace.num_experts, predictions=guesses)
    _, longer = with_draft_layers(tiny_model(2), trace, 1)
    assert longer.predictions is not None
    assert longer.predictions[..., 0].tolist() == [[[0, -1], [-1, -1], [-1, -1]], [[4, -1], [-1, -1], [-1, -1]]]


def test_arrays_by_layer_go_on_and_arrays_of_another_meaning_stay_whatever_their_length() -> None:
    """Two rows of two layers: an array by row, and one that nobody knows, are as long as one by layer."""
    runners = np.array([[[2], [3]], [[3], [2]]])
    extra = {"expert_bytes": np.array([7, 9]), "runners_up": runners, "domain": np.array([4, 5])}
    trace = RoutingTrace(np.array([[[0], [1]], [[1], [0]]], dtype=np.uint8), 4, extra=extra)
    _, longer = with_draft_layers(tiny_model(2), trace, 1)
    assert longer.extra["expert_bytes"].tolist() == [7, 9, 9]
    assert longer.extra["runners_up"][..., 0].tolist() == [[2, 3, 2], [3, 2, 2]]
    assert longer.extra["domain"].tolist() == [4, 5]
    longer.check()


@pytest.mark.parametrize("preset", ["qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v2-lite"])
def test_a_draft_layer_takes_what_a_layer_takes(preset: str) -> None:
    model = load_model(preset)
    trace = RoutingTrace(np.zeros((1, model.layers, 1), dtype=np.uint8), model.experts)
    longer, _ = with_draft_layers(model, trace, 2)
    layer_bytes = model.experts_by_layer[-1] * model.expert_bytes[-1]
    assert longer.total_expert_bytes - model.total_expert_bytes == 2 * layer_bytes
    joined = 2 * model.hidden**2 * model.dtype_bits("dense") / 8
    assert sum(longer.dense_bytes) - sum(model.dense_bytes) == pytest.approx(
        2 * (model.dense_bytes[-1] + joined), abs=2
    )
    assert longer.head_bytes == model.head_bytes
    tokens = np.array([1000])
    per_layer = (longer.cached_bytes(tokens) - model.cached_bytes(tokens)) / 2
    assert 0 < per_layer < 2.1 * model.cached_bytes(tokens) / model.layers


def test_draft_layers_run_behind_the_models_and_the_head_once_for_each() -> None:
    one_user = {"arrivals": "closed", "users": 1, "rate": 1.0}
    with_layers, without = (run(scenario(drafts=2, layers=layers, asked=one_user)) for layers in (True, False))
    steps = with_layers.recording.steps
    assert [step.rows.tolist() for step in steps] == [step.rows.tolist() for step in without.recording.steps]
    dense = [int((found.recording.spans["kind"] == DENSE).sum()) for found in (with_layers, without)]
    assert dense == [5 * len(steps), 3 * len(steps)]
    heads = [found.recording.spans[found.recording.spans["kind"] == HEAD] for found in (with_layers, without)]
    took = [int((each["end_ns"] - each["start_ns"]).sum()) for each in heads]
    assert took[0] == pytest.approx(3 * took[1], rel=0.05)
    assert "draft layers" in with_layers.data["estimates"]


def test_the_experts_of_a_draft_layer_are_copied_and_evicted_like_others() -> None:
    """Three layers and a draft layer of 128; 100 have room: those of layer 3 come over the link, in time."""
    found, without = run(scenario()), run(scenario(layers=False))
    spans = found.recording.spans
    drafted = {int(expert) for expert in spans[spans["kind"] == EXPERT]["expert"] if expert >= 3 * 128}
    copied = [int(expert) for expert in spans[spans["kind"] == DEMAND]["expert"] if expert >= 3 * 128]
    assert drafted == set(copied) and len(copied) > len(drafted), "evicted, and copied again"
    assert found.data["makespan_ms"] > without.data["makespan_ms"]


@pytest.mark.parametrize("prefetch", ["none", "top-k"])
def test_draft_layers_run_the_same_by_either_engine(prefetch: str) -> None:
    chosen = scenario(drafts=2, prefetch={"policy": prefetch, "lookahead": 2})
    one, other = run(chosen, "simpy"), run(chosen)
    assert one.recording.spans.tolist() == other.recording.spans.tolist()
    assert one.data == other.data


def test_what_makes_drafts_is_there_once() -> None:
    with pytest.raises(ScenarioError, match="drafter_bytes = '1GiB': with draft_layers, what makes drafts is part of"):
        make_scenario({"requests": {"speculation": {"draft_layers": True, "drafter_bytes": "1GiB"}}})
    assert load_inputs(scenario(drafts=3)).model.layers == 6
