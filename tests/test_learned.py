"""The trained predictor: what its network can see, its training, its file, and its part in a simulation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from tiny import tiny_scenario

from prestage.engine.load import load_inputs
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.predicting import FREE, PredictorCost, predictor_cost, scenario_predictor
from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.scenario.sections import PredictorSection
from prestage.engine.simulate import simulate
from prestage.experiments.breakeven import break_even
from prestage.workloads.batches import plan_steps
from prestage.workloads.guesses import Guesses
from prestage.workloads.learned import (
    WEIGHTS_FILE,
    Learned,
    Weights,
    WeightsError,
    latency_file,
    load_weights,
    measured,
    shipped_weights,
)
from prestage.workloads.network import Shape, initial_weights, logits
from prestage.workloads.predictor_training import Settings, train
from prestage.workloads.predictors import make_predictor, recall_at
from prestage.workloads.synthetic import synthesize
from prestage.workloads.trace import RoutingTrace
from prestage.workloads.trace_limits import TraceError

pytestmark = pytest.mark.slow

SMALL = Settings(epochs=2, width=16, heads=2, blocks=1, context=2, horizons=2)


def cycling(sequences: int = 6, tokens: int = 40, layers: int = 2, experts: int = 8) -> RoutingTrace:
    """Top-1: a token uses expert e at layer 0 and e + 3 at layer 1, the next one e + 1: only the start is luck."""
    start = np.random.default_rng(0).integers(experts, size=sequences)
    e = (start[:, None, None] + np.arange(tokens)[:, None] + 3 * np.arange(layers)) % experts
    sequence = np.repeat(np.arange(sequences), tokens)
    return RoutingTrace(e.reshape(-1, layers, 1), experts, sequence=sequence, meta={"model": "cycling"})


def guesses_of(weights: Weights, trace: RoutingTrace, horizons: int = 2, n: int = 2) -> Guesses:
    return Learned(weights).guess(trace, plan_steps(trace.sequence, trace.phase), horizons, n)


@pytest.fixture(scope="module")
def trained() -> Weights:
    return train(cycling(), replace(SMALL, epochs=16))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks as small as these are slower with several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The network


@pytest.mark.parametrize("context", [1, 2, 3])
def test_a_visit_sees_as_many_visits_back_as_its_context_and_no_others(context: int) -> None:
    # Five tokens of three layers, the last guessing: another choice at visit v (0 the oldest of 15) changes the logits
    # of layer l, which stands at visit 12 + l, exactly if v is among the 3 x context last ones up to it.
    shape = Shape(layers=3, experts=5, top_k=1, horizons=2, context=context, width=8, heads=2, blocks=2)
    weights = {name: torch.from_numpy(array).double() for name, array in initial_weights(shape, 0).items()}
    rows = torch.arange(4, -1, -1)[None, : context + 1]
    chosen = torch.from_numpy(np.random.default_rng(1).integers(5, size=(5, 3, 1)))
    before = logits(weights, shape, chosen, rows)
    for visit in range(15):
        changed = chosen.clone()
        changed[visit // 3, visit % 3] = (changed[visit // 3, visit % 3] + 1) % 5
        moved = (logits(weights, shape, changed, rows) - before).abs().amax(dim=(0, 2, 3)) > 1e-9
        assert moved.tolist() == [0 <= 12 + layer - visit < 3 * context for layer in range(3)]


def test_one_layer_alone_has_the_logits_it_has_among_all() -> None:
    shape = Shape(layers=4, experts=5, top_k=2, width=8, heads=2)
    weights = {name: torch.from_numpy(array).double() for name, array in initial_weights(shape, 0).items()}
    chosen = torch.from_numpy(np.random.default_rng(2).integers(5, size=(6, 4, 2)))
    rows = torch.tensor([[3, 2, 1, 0], [5, 4, -1, -1]])
    every = logits(weights, shape, chosen, rows)
    for layer in range(4):
        one = logits(weights, shape, chosen, rows, layers=slice(layer, layer + 1))
        assert torch.allclose(one[:, 0], every[:, layer], atol=1e-12)


def test_a_shape_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="context = 0: must be an integer, at least 1"):
        Shape(layers=2, experts=4, top_k=1, context=0)
    with pytest.raises(ValueError, match="width = 10: must be a multiple of heads = 4"):
        Shape(layers=2, experts=4, top_k=1, width=10)


# Training


def test_training_learns_what_there_is_to_learn(trained: Weights) -> None:
    trace = cycling()
    steps = plan_steps(trace.sequence, trace.phase)
    assert (recall_at(guesses_of(trained, trace, n=1), trace, steps) > 0.95).all()
    losses = trained.made["held_out_loss_nats"]
    assert losses[-1] < 0.5 < losses[0] <= 1.1 * np.log(8)


def test_top_k_training_learns_sets() -> None:
    one = cycling()
    pairs = np.concatenate([one.experts, (one.experts + 4) % 8], axis=-1)
    trace = replace(one, experts=pairs)
    weights = train(trace, replace(SMALL, epochs=16))
    steps = plan_steps(trace.sequence, trace.phase)
    guesses = guesses_of(weights, trace)
    assert (recall_at(guesses, trace, steps) > 0.95).all()
    # It knows that it knows: two experts are used, each almost surely.
    assert guesses.confidences is not None
    assert guesses.confidences[guesses.experts >= 0].mean() > 0.8


def test_the_seed_decides_the_weights() -> None:
    trace = cycling(sequences=3, tokens=20)
    one, same, other = (train(trace, replace(SMALL, epochs=1, seed=seed)) for seed in (4, 4, 5))
    assert all(np.array_equal(one.arrays[name], same.arrays[name]) for name in one.arrays)
    assert not all(np.array_equal(one.arrays[name], other.arrays[name]) for name in one.arrays)


def test_training_stops_when_the_held_out_sequences_gain_nothing() -> None:
    # Uniform luck: after the first epochs more training only learns the lessons by heart.
    random = np.random.default_rng(3)
    trace = RoutingTrace(
        random.integers(8, size=(160, 2, 1)).astype(np.uint8), 8, sequence=np.repeat(np.arange(4), 40).astype(np.int32)
    )
    weights = train(trace, replace(SMALL, epochs=60, patience=1))
    losses = weights.made["held_out_loss_nats"]
    assert len(losses) < 60
    assert losses[-1] > min(losses[:-1])


def test_progress_tells_every_step() -> None:
    seen: list[tuple[str, int, int]] = []
    train(cycling(sequences=2, tokens=40), SMALL, lambda *at: seen.append(at))
    assert seen[0] == ("epoch 1", 1, 2)
    assert seen[-1][0] == "epoch 2"
    assert seen[-1][1] == seen[-1][2]


def test_a_single_sequence_is_stopped_by_its_last_tokens() -> None:
    made = train(cycling(sequences=1), replace(SMALL, epochs=1, held_out=0.25)).made
    assert (made["tokens"], made["held_out_tokens"]) == (30, 10)
    with pytest.raises(TraceError, match="has 1 token: training needs one to learn from and one more"):
        train(cycling(sequences=1, tokens=1), SMALL)


@pytest.mark.parametrize(("key", "value"), [("epochs", 0), ("patience", 0), ("held_out", 0.0), ("held_out", 1.0)])
def test_impossible_settings_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key} = {value}: must be"):
        Settings(**{key: value})


# Guesses


def test_confidences_of_all_experts_sum_to_one_for_top_1(trained: Weights) -> None:
    confidences = guesses_of(trained, cycling(), n=8).confidences
    assert confidences is not None
    sums = confidences.sum(axis=-1)
    assert sums[sums > 0] == pytest.approx(1, abs=1e-5)
    assert (np.diff(confidences, axis=-1) <= 0).all()


def test_a_prompt_is_guessed_from_finished_steps_alone(trained: Weights) -> None:
    # The same tokens, as a prompt in one step: its tokens know nothing of each other, but guess all the same.
    trace = cycling(sequences=1)
    prompt = replace(trace, phase=np.array([0] * 30 + [1] * 10, dtype=np.uint8))
    alone = guesses_of(trained, trace.select(slice(0, 1)), horizons=1)
    together = guesses_of(trained, prompt, horizons=1)
    # Expert e at layer 0 for the first token and for any later one of the same e, 8 tokens on.
    assert np.array_equal(together.experts[0, 0], together.experts[8, 0])
    assert np.array_equal(alone.experts[0, 0], together.experts[0, 0])
    # From the second decode token on, a token's context is that of a plain decode.
    assert np.array_equal(together.experts[31:], guesses_of(trained, trace, horizons=1).experts[31:])


# The file


def test_saved_weights_come_back_and_guess_the_same(trained: Weights, tmp_path: Path) -> None:
    file = trained.save(tmp_path / "new" / "folder")
    for source in (file, file.parent):
        loaded = load_weights(source)
        assert loaded.shape == trained.shape
        assert loaded.made == trained.made
        assert guesses_of(loaded, cycling()).digest == guesses_of(trained, cycling()).digest
    assert file.read_bytes() == load_weights(file).save(tmp_path / "again").read_bytes()
    assert trained.memory_bytes == sum(array.nbytes for array in safetensors.numpy.load_file(file).values())


def test_training_again_gives_the_same_file_whatever_a_guess_took(tmp_path: Path) -> None:
    first, again = (train(cycling(), replace(SMALL, epochs=1)) for _ in range(2))
    files = [weights.save(tmp_path / name) for weights, name in ((first, "a"), (again, "b"))]
    assert first.latency_us["cpu"] > 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_latency_is_of_the_weights_that_it_was_measured_with(trained: Weights, tmp_path: Path) -> None:
    file = replace(trained, latency_us={"cpu": 300.0}).save(tmp_path)
    assert load_weights(tmp_path).latency_us == {"cpu": 300.0}
    others = replace(trained, made={"seed": 99}, latency_us={"cpu": 7.0}).save(tmp_path / "others")
    file.write_bytes(others.read_bytes())
    assert load_weights(tmp_path).latency_us == {}
    replace(trained, latency_us={}).save(tmp_path)
    assert not latency_file(file).exists()
    for broken in ("{", "[]", '{"latency_us": {"cpu": -1}, "weights_sha256": ""}', '{"latency_us": {"cpu": "x"}}'):
        latency_file(file).write_text(broken)
        with pytest.raises(WeightsError, match=r"predictor\.latency\.json: "):
            load_weights(tmp_path)


def test_what_a_guess_takes_is_measured_and_noted(trained: Weights, tmp_path: Path) -> None:
    file = replace(trained, made={"seed": 3}, latency_us={"another device": 5.0}).save(tmp_path / "w.safetensors")
    again = load_weights(measured(load_weights(file)).save(file))
    assert again.made["seed"] == 3
    assert again.latency_us["another device"] == 5.0
    assert again.latency_us["cpu"] > 0


@pytest.mark.parametrize(
    ("change", "given"),
    [
        ({"num_experts": 16}, "2 layers of 16 experts, top-1"),
        ({"experts": np.zeros((240, 3, 1), dtype=np.uint8)}, "3 layers of 8 experts, top-1"),
        ({"experts": np.tile([0, 1], (240, 2, 1)).astype(np.uint8)}, "2 layers of 8 experts, top-2"),
    ],
)
def test_weights_of_another_model_are_refused_naming_both(
    trained: Weights, tmp_path: Path, change: dict[str, Any], given: str
) -> None:
    trained.save(tmp_path)
    trace = replace(cycling(), **change, meta={"model": "other"})
    with pytest.raises(
        WeightsError, match=f"trained for 2 layers of 8 experts, top-1, but the trace other has {given}"
    ):
        guesses_of(load_weights(tmp_path), trace)


def test_weights_do_not_guess_farther_than_they_were_trained_for(trained: Weights) -> None:
    with pytest.raises(WeightsError, match="trained to guess 2 layers ahead, not 3: train with --horizons 3"):
        guesses_of(trained, cycling(), horizons=3)


def test_a_missing_file_is_refused_naming_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"predictor.safetensors: no such file: give a folder"):
        load_weights(tmp_path)


def test_damaged_weights_are_refused(trained: Weights, tmp_path: Path) -> None:
    file = trained.save(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="damaged, or no weights"):
        load_weights(file)
    file.write_bytes(b"\x80\x04}\x94.")  # a pickle
    with pytest.raises(WeightsError, match="damaged, or no weights"):
        load_weights(file)


def test_weights_with_wrong_metadata_or_arrays_are_refused(trained: Weights, tmp_path: Path) -> None:
    arrays = {name: array.astype(np.float16) for name, array in trained.arrays.items()}
    meta = {"format": "prestage-predictor-1", "shape": vars(trained.shape), "made": {}}
    file = tmp_path / WEIGHTS_FILE

    def refused(arrays: dict[str, Any], meta: str, why: str) -> None:
        safetensors.numpy.save_file(arrays, file, metadata={"meta": meta})
        with pytest.raises(WeightsError, match=why):
            load_weights(file)

    refused(arrays, "no JSON", "its metadata is not that of a predictor")
    refused(arrays, json.dumps({**meta, "format": "other"}), "format 'other'")
    refused(arrays, json.dumps({**meta, "shape": {"layers": 2}}), "its metadata is not that of a predictor")
    lacking = {name: array for name, array in arrays.items() if name != "expert"}
    refused(lacking, json.dumps(meta), "array expert is missing: must be float16")
    refused(
        {**arrays, "expert": arrays["expert"] * np.nan}, json.dumps(meta), "array expert holds numbers that are not"
    )


def test_a_trained_predictor_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="predictor 'learned': missing a required argument: 'weights'"):
        make_predictor("learned")


# In a scenario


def test_weights_go_with_the_learned_predictor_alone() -> None:
    with pytest.raises(ScenarioError, match=r"weights \(a folder of `prestage predictor train`\) go with name"):
        load_scenario("synthetic", settings=["predictor.name=learned"])
    with pytest.raises(ScenarioError, match="name = 'oracle' and weights = 'w'"):
        load_scenario("synthetic", settings=["predictor.weights=w"])


def test_weights_named_in_a_file_lie_beside_it(trained: Weights, tmp_path: Path) -> None:
    trained.save(tmp_path / "weights")
    file = tmp_path / "scenario.toml"
    file.write_text('[workload]\ntrace = "t"\n[predictor]\nname = "learned"\nweights = "weights"\n', encoding="utf-8")
    scenario = load_scenario(file)
    assert scenario.predictor.weights == str(tmp_path / "weights")
    predictor = scenario_predictor(scenario)
    assert isinstance(predictor, Learned)
    assert predictor.weights.shape == trained.shape
    for name in shipped_weights():
        file.write_text(file.read_text("utf-8").replace('"weights"', f'"{name}"'), encoding="utf-8")
        assert load_scenario(file).predictor.weights == name


def test_the_measured_latency_and_memory_are_charged_where_the_lane_is(trained: Weights, tmp_path: Path) -> None:
    file = replace(trained, latency_us={"cpu": 300.0, "cuda": 40.0}).save(tmp_path)

    def cost(**keys: Any) -> PredictorCost:
        return predictor_cost(PredictorSection(name="learned", weights=str(file), **keys))

    size = trained.memory_bytes
    assert cost(lane="gpu") == PredictorCost(40.0, "measured on cuda", size, size)
    assert cost(lane="host") == PredictorCost(300.0, "measured on cpu", size, 0)
    assert cost(lane="compute", latency_us=7.0) == PredictorCost(7.0, "scenario", size, size)
    replace(trained, latency_us={"cpu": 300.0}).save(tmp_path)
    assert cost(lane="gpu") == PredictorCost(300.0, "measured on cpu", size, size)
    assert cost(lane="free") == PredictorCost(0.0, "scenario", size, 0)
    assert predictor_cost(PredictorSection()) == FREE
    replace(trained, latency_us={}).save(tmp_path)
    with pytest.raises(ScenarioError, match=r"no latency was measured for lane 'gpu': set predictor\.latency_us"):
        cost(lane="gpu")


def test_a_run_with_trained_weights_pays_for_them(tmp_path: Path) -> None:
    # gpt-oss-20b's shape with 4 experts: small enough to train here, and a whole scenario.
    trace = synthesize(48, 24, 4, 2, skew=0.5, working_set=4, reuse=0.5, sequences=3, prefill_tokens=0, seed=0)
    trace.save(tmp_path / "trace.safetensors")
    weights = train(trace, replace(SMALL, epochs=1))
    replace(weights, latency_us={"cuda": 9000.0}).save(tmp_path)
    settings = [
        f"workload.trace={tmp_path / 'trace.safetensors'}",
        "workload.tokens=12",
        "model.experts=4",
        "model.top_k=2",
        "memory.gpu_budget=50%",
        "predictor.name=learned",
        f"predictor.weights={tmp_path}",
    ]
    data = simulate(load_scenario("synthetic", settings=settings), baselines=False).data
    assert data["predictor"]["latency_source"] == "measured on cuda"
    assert data["predictor"]["latency_us"] == 9000.0
    assert data["scenario"]["predictor"]["latency_us"] is None  # as given, so that it is the same run again
    assert (
        data["predictions_sha256"]
        == simulate(load_scenario("synthetic", settings=settings), baselines=False).data["predictions_sha256"]
    )
    free = simulate(load_scenario("synthetic", settings=[*settings, "predictor.lane=free"]), baselines=False).data
    assert [free["counts"][key] for key in ("miss", "prefetch")] == [
        data["counts"][key] for key in ("miss", "prefetch")
    ]
    assert free["makespan_ms"] < data["makespan_ms"]
    with pytest.raises(WeightsError, match="trained to guess 2 layers ahead, not 3"):
        load_inputs(load_scenario("synthetic", settings=[*settings, "prefetch.lookahead=3"]))


def test_break_even_prices_every_recall_with_the_latency_that_was_measured_for_the_weights(tmp_path: Path) -> None:
    # The search puts an oracle in the predictor's place, which takes what the weights take: 9 ms a visit.
    trace = synthesize(12, 24, 4, 2, skew=0.5, working_set=4, reuse=0.5, sequences=3, prefill_tokens=0, seed=0)
    trace.save(tmp_path / "trace.safetensors")
    shape = Shape(24, 4, 2, horizons=1, context=1, width=8, heads=1, blocks=1)
    arrays = {name: array.astype(np.float16) for name, array in initial_weights(shape, 0).items()}
    Weights(shape, arrays, {"latency_us": {"cuda": 9000.0}}).save(tmp_path)
    settings = [
        f"workload.trace={tmp_path / 'trace.safetensors'}",
        "workload.tokens=3",
        "model.experts=4",
        "model.top_k=2",
        "memory.gpu_budget=50%",
    ]
    learned = load_scenario(
        "synthetic", settings=[*settings, "predictor.name=learned", f"predictor.weights={tmp_path}"]
    )
    oracle = [*settings, "predictor.name=oracle", "predictor.recall=1"]
    charged, free = (
        simulate(load_scenario("synthetic", settings=[*oracle, f"predictor.latency_us={us}"]), baselines=False).data
        for us in (9000, 0)
    )
    (cell,) = break_even(learned)["cells"]
    assert cell["with_recall_1_ms"] == charged["makespan_ms"] > free["makespan_ms"]


def test_weights_on_the_gpu_leave_less_of_a_total_to_experts(tmp_path: Path) -> None:
    trace = synthesize(8, 24, 32, 4, skew=0.5, working_set=32, reuse=0.5, sequences=2, prefill_tokens=0, seed=0)
    trace.save(tmp_path / "trace.safetensors")
    shape = Shape(24, 32, 4, horizons=1, context=1, width=8, heads=1, blocks=1)
    arrays = {name: array.astype(np.float16) for name, array in initial_weights(shape, 0).items()}
    weights = Weights(shape, arrays, {}, latency_us={"cpu": 1.0})
    weights.save(tmp_path)
    settings = [
        f"workload.trace={tmp_path / 'trace.safetensors'}",
        "memory.gpu_budget=100%",
        "memory.total_bytes=8GiB",
        "predictor.name=learned",
        f"predictor.weights={tmp_path}",
    ]
    on_gpu, on_host = (
        load_inputs(load_scenario("synthetic", settings=[*settings, f"predictor.lane={lane}"])).budgets
        for lane in ("gpu", "host")
    )
    assert on_gpu is not None
    assert on_host is not None
    assert np.subtract(on_host, on_gpu).tolist() == [weights.memory_bytes] * len(on_host)


def test_a_latency_left_out_is_nothing_without_weights() -> None:
    assert tiny_scenario().predictor.latency_us is None
    data = simulate(load_scenario("synthetic", settings=["workload.tokens=4"]), baselines=False).data
    assert data["predictor"] == {
        "latency_us": 0.0,
        "latency_source": "assumed",
        "memory_bytes": 0,
        "gpu_memory_bytes": 0,
    }
