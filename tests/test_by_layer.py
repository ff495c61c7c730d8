"""Models whose layers differ in experts, top-k, widths and shared experts: from their files to both engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import facts, write

from prestage.engine.decide.dispatch import step_accesses
from prestage.engine.load import load_inputs
from prestage.engine.loading.deciders import make_manager
from prestage.engine.replay.replay import MISSED, NOT_LOOKED_UP, replay
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.scenario import Scenario, make_scenario
from prestage.engine.simulate import simulate, simulate_inputs
from prestage.workloads.by_layer import fitted_to, of_model
from prestage.workloads.model import Model, ModelError, Routed, load_model
from prestage.workloads.predictors import Oracle
from prestage.workloads.statistics import lru_hit_rates
from prestage.workloads.synthetic import synthesize
from prestage.workloads.trace import RoutingTrace
from prestage.workloads.trace_limits import TraceError

#: Four layers: 8 experts of width 64, of which 4 are taken; 6 of which 2; 8 of width 32, of which 1; as the first.
SHAPES = """
name = "differs"
source = "by hand"
hidden = 128
vocabulary = 1000
[dtypes]
expert = "bfloat16"
dense = "bfloat16"
[[stacks]]
blocks = 4
[attention]
kind = "gqa"
heads = 2
kv_heads = 1
head_dim = 64
[moe]
experts = 8
top_k = 4
expert_ff = 64
shared_experts = 1
[[moe.by_layer]]
layers = [1]
experts = 6
top_k = 2
[[moe.by_layer]]
layers = [2]
top_k = 1
expert_ff = 32
shared_experts = 2
[kernels]
dense = 60
expert = 5
"""
ROUTED = (Routed(8, 4, 64), Routed(6, 2, 64), Routed(8, 1, 32), Routed(8, 4, 64))
EXPERT = 3 * 128 * 64 * 2  # bytes of one of width 64


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "differs.toml"
    file.write_text(SHAPES)
    return str(file)


def scenario(path: str, **changes: dict[str, Any]) -> Scenario:
    usual: dict[str, Any] = {
        "machine": {"profile": "h200"},
        "model": {"preset": path},
        "workload": {"synthetic": {"tokens": 40, "sequences": 3, "reuse": 0.4}, "batch": 2},
        "memory": {"gpu_budget": "12experts"},
        "prefetch": {"lookahead": 1},
        "predictor": {"recall": 0.7},
    }
    return make_scenario({key: usual.get(key, {}) | changes.get(key, {}) for key in {**usual, **changes}})


def test_every_layer_has_its_own_numbers_and_bytes(path: str) -> None:
    model = load_model(path)
    assert model.by_layer == ROUTED
    assert (model.experts, model.top_k, model.expert_ff) == (8, 4, 64)
    assert model.expert_bytes == (EXPERT, EXPERT, EXPERT // 2, EXPERT)
    assert model.total_expert_bytes == (8 + 6 + 4 + 8) * EXPERT
    assert model.chosen_bytes == (4 + 2 + 0.5 + 4) * EXPERT
    # Router and shared experts: 6 rows of 128 instead of 8; two shared experts of half the width are as large as one.
    first, second, third, _ = model.dense_bytes
    assert (first - second, first - third) == (2 * 128 * 2, 0)
    assert list(model.ids_of(1)) == [8, 9, 10, 11, 12, 13]
    assert len(model.ids) == 30


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    def refused(old: str, new: str, message: str) -> None:
        file = tmp_path / "wrong.toml"
        file.write_text(SHAPES.replace(old, new))
        with pytest.raises(ModelError, match=message) as caught:
            load_model(file)
        assert "\n" not in str(caught.value)

    refused("layers = [2]", "layers = [4]", r"moe\.by_layer: layer 4: must be 0 to 3, the MoE layers")
    refused("layers = [2]", "layers = [1]", r"moe: by_layer: names layer 1 twice: name each once")
    refused("experts = 6\ntop_k = 2", "experts = 6\ntop_k = 7", r"layer 1: top_k = 7: must be 1 to experts = 6")
    refused("layers = [2]\ntop_k", "layers = [2]\ntop_q", r"moe\.by_layer\.1\.top_q: no such key; did you mean 'top_k'")


def test_one_number_for_all_layers_takes_the_place_of_each(path: str) -> None:
    model = load_model(path, top_k=2, layers=2)
    assert [each[:2] for each in model.by_layer] == [(8, 2), (6, 2)]
    assert load_model(path, experts=4, top_k=1).by_layer == tuple(each._replace(experts=4, top_k=1) for each in ROUTED)
    with pytest.raises(ModelError, match=r"model\.top_k = 7: differs would take 7 of 6 experts"):
        load_model(path, top_k=7)


def test_a_drawn_trace_takes_what_each_layer_has(path: str) -> None:
    model = load_model(path)
    trace = of_model(
        model, lambda experts, top_k: synthesize(300, model.layers, experts, top_k, reuse=0.3, sequences=2)
    )
    assert [len(trace.chosen(7, layer)) for layer in range(4)] == [4, 2, 1, 4]
    assert trace.experts_by_layer.tolist() == [8, 6, 8, 8]
    assert [set(trace.experts[:, layer][trace.made[:, layer]].tolist()) for layer in range(4)] == [  # type: ignore[index]
        set(range(8)), set(range(6)), set(range(8)), set(range(8))
    ]  # fmt: skip
    assert trace.weights is not None
    np.testing.assert_allclose(trace.weights.sum(axis=2, dtype=float), 1, atol=2e-3)


def test_traces_of_other_shapes_are_refused(path: str) -> None:
    model = load_model(path)
    trace = of_model(model, lambda experts, top_k: synthesize(5, model.layers, experts, top_k))
    assert fitted_to(model, trace) is trace
    whole = RoutingTrace(np.tile(np.arange(4), (3, 4, 1)), 8)
    with pytest.raises(TraceError, match=r"layer 1 has tokens with 4 choices: 2 at most"):
        fitted_to(model, whole)
    high = 7 - whole.experts
    present = np.arange(4) < np.array([[4], [2], [1], [4]])
    with pytest.raises(TraceError, match=r"layer 1 names expert 7: it has 6, 0 to 5"):
        fitted_to(model, RoutingTrace(high, 8, present=np.tile(present, (3, 1, 1))))
    given = {"layer_experts": np.array([8, 6, 8, 8])}
    with pytest.raises(TraceError, match=r"row 0, layer 1, slot 0: 7: must be 0\.\.5, as layer_experts says"):
        RoutingTrace(high, 8, extra=given).check()
    with pytest.raises(
        TraceError, match=r"present at row 0, layer 0: \[False, True, True, True\]: must be true of the"
    ):
        RoutingTrace(whole.experts, 8, present=np.broadcast_to(np.arange(4) > 0, (3, 4, 4))).check()


def test_choices_that_are_not_made_survive_a_file(path: str, tmp_path: Path) -> None:
    model = load_model(path)
    trace = of_model(model, lambda experts, top_k: synthesize(9, model.layers, experts, top_k))
    for name in ("t.npz", "t.safetensors"):
        trace.save(tmp_path / name)
        again = RoutingTrace.load(tmp_path / name)
        assert again.present is not None and np.array_equal(again.present, trace.present)  # type: ignore[arg-type]
        assert again.experts_by_layer.tolist() == [8, 6, 8, 8]


def test_an_oracle_is_wrong_among_the_layers_own_experts(path: str) -> None:
    inputs = load_inputs(scenario(path))
    guesses = Oracle(recall=0.0, seed=3).guess(inputs.trace, inputs.steps, 1, 6).experts[:, :, 0]
    for layer, target in enumerate((1, 2, 3, 0)):
        named = guesses[:, layer]
        assert named.max() < ROUTED[target].experts
        # As many ranks as the layer has choices are wrong ones; behind the fourth, whoever else is left.
        assert (named[named[:, 0] >= 0][:, ROUTED[target].top_k : 4] == -1).all()


RUNS: list[dict[str, dict[str, Any]]] = [
    {},
    {"dispatch": {"mode": "eager"}, "memory": {"scope": "per-layer", "gpu_budget": "16experts"}},
    {"memory": {"eviction": "belady"}, "prefetch": {"lookahead": 0}},
    {"memory": {"eviction": "predictive"}},
    {"prefetch": {"policy": "next-layer", "lookahead": 1}, "memory": {"gpu_budget": "20experts"}},
    {"prefetch": {"policy": "popularity", "lookahead": 2}},
    {"memory": {"preload": "popular", "eviction": "static"}, "miss": {"policy": "cpu"}, "prefetch": {"lookahead": 0}},
    {"parallel": {"stages": 2}, "machine": {"profile": "h200-x2"}},
    {"compression": {"mixed": [[0.5, 1.0], [0.5, 0.5]]}},
]


@pytest.mark.parametrize("changes", RUNS)
def test_both_engines_end_at_the_same_nanosecond(path: str, changes: dict[str, dict[str, Any]]) -> None:
    inputs = load_inputs(scenario(path, **changes))
    simpy, compiled = (simulate_inputs(inputs, engine=engine).data for engine in ("simpy", "compiled"))
    assert (simpy["makespan_ms"], simpy["counts"]) == (compiled["makespan_ms"], compiled["counts"])
    assert simpy["resident_ms"] == compiled["resident_ms"]
    accesses = sum(len(each.experts) for step in inputs.steps for each in step_accesses(inputs.trace, step))
    assert simpy["accesses"] == accesses


def test_all_resident_is_all_that_there_are(path: str) -> None:
    whole = scenario(path, memory={"gpu_budget": "100%"}, prefetch={"lookahead": 0})
    result = simulate(whole)
    assert result.data["budget_bytes"] == 26 * EXPERT
    trace = load_inputs(whole).trace
    used = {(layer, expert) for row in range(40) for layer in range(4) for expert in trace.chosen(row, layer)}
    assert result.data["counts"]["miss"] == len(used)


def test_the_replay_counts_a_layers_own_choices(path: str) -> None:
    inputs = load_inputs(scenario(path, prefetch={"lookahead": 0}))
    replayed = replay(inputs.trace, inputs.steps, make_manager(inputs))
    trace, looked_up = inputs.trace, replayed.outcome != NOT_LOOKED_UP
    assert trace.made is not None and not looked_up[~trace.made].any()
    assert replayed.count(MISSED) == simulate_inputs(inputs, baselines=False).data["counts"]["miss"]


def test_hit_rates_know_how_many_experts_there_are(path: str) -> None:
    trace = load_inputs(scenario(path)).trace
    (everything,) = lru_hit_rates(trace, [1.0])
    assert everything == lru_hit_rates(trace, [30])[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": {"scope": "shared"}}, r"memory\.scope = 'shared': needs as many experts in every layer.* 6 to 8"),
        ({"parallel": {"gpus": 2}, "machine": {"profile": "h200-x2"}}, r"parallel\.gpus = 2: needs as many"),
    ],
)
def test_what_needs_layers_alike_is_refused(path: str, changes: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        load_inputs(scenario(path, **changes))


# From a config.json and a GGUF file.


def config(tmp_path: Path, **changes: Any) -> Model:
    fields: dict[str, Any] = {
        "model_type": "mixtral",
        "hidden_size": 64,
        "vocab_size": 100,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields | changes))
    return load_model(path)


def test_a_config_lists_what_its_layers_differ_in(tmp_path: Path) -> None:
    model = config(tmp_path, num_local_experts=[8, 4, 8], num_experts_per_tok=[2, 1, 2])
    assert [each[:2] for each in model.by_layer] == [(8, 2), (4, 1), (8, 2)]
    hunyuan = {"model_type": "hunyuan_v1_moe", "num_local_experts": None, "num_experts": 8, "head_dim": 32}
    lists = {"moe_topk": [2, 2, 1], "num_shared_expert": [1, 1, 2], "moe_intermediate_size": [32, 32, 16]}
    model = config(tmp_path, **hunyuan, **lists, num_experts_per_tok=None)
    assert model.by_layer[2] == Routed(8, 1, 16)
    assert model.dense_bytes[2] == model.dense_bytes[1]  # two shared experts of half the width
    with pytest.raises(ModelError, match=r"num_local_experts = \[8, 4\]: must be one number; of experts, .* a layer"):
        config(tmp_path, num_local_experts=[8, 4])


def test_puzzles_blocks_say_what_each_has(tmp_path: Path) -> None:
    # As NVIDIA's gpt-oss-puzzle and Nemotron-H-Puzzle write it.
    blocks = [
        {"num_local_experts": count, "sliding_window": window} for count, window in ((8, 128), (4, 256), (6, None))
    ]
    model = config(tmp_path, model_type="gpt_oss_puzzle", num_local_experts=None, block_configs=blocks)
    assert model.experts_by_layer == (8, 4, 6)
    assert [cache.window for layer in model.caches for cache in layer] == [128, 256, 0]
    kinds = [
        {"block_type": "mamba"},
        {"block_type": "moe", "moe_intermediate_size": 48, "num_experts_per_tok": 3},
        {"block_type": "attention"},
        {"block_type": "moe", "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    ]
    space = {"mamba_num_heads": 2, "mamba_head_dim": 32, "n_groups": 1, "ssm_state_size": 16, "conv_kernel": 4}
    model = config(
        tmp_path, model_type="nemotron_h_puzzle", num_experts_per_tok=None, block_configs=kinds, head_dim=32, **space
    )
    assert model.by_layer == (Routed(8, 3, 48), Routed(8, 2, 32))
    with pytest.raises(ModelError, match=r"block_configs = None: must be a list of objects, one a layer"):
        config(tmp_path, model_type="gpt_oss_puzzle")


def test_a_gguf_file_has_the_experts_of_its_tensors(tmp_path: Path) -> None:
    def block(number: int, experts: int, width: int) -> list[tuple[str, tuple[int, ...], int]]:
        at = f"blk.{number}"
        matrices = [(f"{at}.ffn_{name}_exps.weight", (32, width, experts), 1) for name in ("gate", "up")]
        return [
            *matrices,
            (f"{at}.ffn_down_exps.weight", (width, 32, experts), 1),
            (f"{at}.attn_k.weight", (32, 16), 1),
        ]

    path = tmp_path / "tiny.gguf"
    outside = [("token_embd.weight", (32, 100), 1), ("output_norm.weight", (32,), 0)]
    write(path, facts("tiny", expert_used_count=[2, 1]), [*outside, *block(0, 4, 16), *block(1, 3, 8)])
    model = load_model(path)
    assert model.by_layer == (Routed(4, 2, 16), Routed(3, 1, 8))
    assert model.expert_bytes == (3 * 32 * 16 * 2, 3 * 32 * 8 * 2)
    assert model.total_expert_bytes == 4 * model.expert_bytes[0] + 3 * model.expert_bytes[1]
    assert [each.top_k for each in load_model(path, top_k=3).by_layer] == [3, 3]
