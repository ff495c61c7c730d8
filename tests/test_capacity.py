"""Capacity: what every memory keeps is added up by hand, and what does not fit is refused before anything runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import ASSUMED, tiny_inputs, tiny_model, tiny_pipeline, tiny_profile, tiny_scenario, tiny_trace
from typer.testing import CliRunner

from prestage.calibration.executor.entries import ExecutionError
from prestage.calibration.executor.execute import execute_all
from prestage.cli import app
from prestage.engine.load import load_inputs
from prestage.engine.loading.capacity import CapacityError, described, host_parts, kv_cache_bytes, memories
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import load_scenario, make_scenario, scenario_names
from prestage.engine.simulate import simulate, simulate_inputs
from prestage.experiments.breakeven import break_even
from prestage.experiments.compare import load_run
from prestage.experiments.sweep import sweep
from prestage.output.tables.runs import capacity_rows, headline, speed_rows
from prestage.resources.profile import Profile, load_profile, make_profile
from prestage.resources.profile_costs import ProfileError
from prestage.workloads.batches import plan_steps
from prestage.workloads.model import Model, load_model, preset_names
from prestage.workloads.trace import RoutingTrace

SMALL = ["workload.tokens=4", "workload.synthetic.tokens=4", "workload.synthetic.sequences=1"]
SMALL += ["workload.synthetic.prefill_tokens=0"]
MIXTRAL = ["model.preset=mixtral-8x7b", "workload.synthetic.working_set=8"]
SMALL_8 = ["workload.tokens=8", "workload.synthetic.tokens=8", "workload.synthetic.sequences=8", "workload.batch=8"]


def kept(inputs: Inputs) -> dict[str, dict[str, int]]:
    """What each memory keeps, by name."""
    return {memory.name: memory.parts for memory in memories(inputs)}


def tiny(model: Model | None = None, profile: Profile | None = None, **sections: Any) -> Inputs:
    """Inputs of two layers of four experts of 20 bytes over three tokens, loaded and checked."""
    model = model or MODEL
    trace = tiny_trace([[[0]] * model.layers] * 3)
    inputs: Inputs = tiny_pipeline(model, profile or tiny_profile(), trace, tiny_scenario(**sections))
    return inputs


#: Dense parts of 3 bytes in each layer, a head of 7, an input embedding of 5, 10 bytes of KV cache a token.
MODEL = replace(tiny_model(2, head_ns=7), kv_bytes_per_token=10, embedding_bytes=5)


def holding(gpu_bytes: int, **changes: Any) -> Profile:
    """The tiny machine with a GPU that holds so many bytes."""
    return make_profile({**tiny_profile().model_dump(), "gpu_memory_bytes": gpu_bytes, **changes}, "tiny")


# The sum, by hand.


def test_a_gpu_keeps_weights_embedding_head_kv_cache_workspace_and_the_budget() -> None:
    assert kept(tiny(memory={"gpu_budget": "4experts", "workspace_bytes": "11B"})) == {
        # Three tokens of one sequence at the end: 30 bytes of KV cache.
        "gpu0": {
            "dense weights": 6,
            "head": 7,
            "input embedding": 5,
            "workspace": 11,
            "KV cache": 30,
            "experts": 80,
        },
        "host": {"experts": 160},
    }


def test_a_tied_embedding_is_kept_once_and_again_where_a_stage_lacks_the_head() -> None:
    tied = replace(MODEL, tied_embeddings=True)
    assert "input embedding" not in kept(tiny(tied))["gpu0"]
    staged = kept(tiny(tied, tiny_profile(gpus=2), parallel={"stages": 2}))
    # The first stage embeds; the last has the head, whose matrix is the same.
    assert staged["gpu0"]["input embedding"] == 5 and "head" not in staged["gpu0"]
    assert staged["gpu1"]["head"] == 7 and "input embedding" not in staged["gpu1"]


def test_the_input_embedding_of_a_preset_is_its_vocabulary_times_its_width() -> None:
    # 201088 x 2880 and 129280 x 7168 in 16 bits: 1.08 and 1.73 GiB; Switch's decoder reads its head's matrix.
    assert load_model("gpt-oss-120b").embedding_beside_head_bytes == 201088 * 2880 * 2
    assert load_model("deepseek-v3").embedding_beside_head_bytes == 129280 * 7168 * 2
    switch = load_model("switch-base-128")
    assert (switch.embedding_bytes, switch.embedding_beside_head_bytes) == (32128 * 768 * 4, 0)


@pytest.mark.parametrize("preset", preset_names())
def test_what_the_sum_has_of_a_model_is_all_its_weights(preset: str) -> None:
    model = load_model(preset)
    weights = model.total_expert_bytes + sum(model.dense_bytes) + model.head_bytes + model.embedding_beside_head_bytes
    assert model.parameters is not None
    bits = sorted(model.dtype_bits(part) for part in ("expert", "dense"))  # norms and tables may have 32
    assert model.parameters * bits[0] / 8 * 0.99 <= weights <= model.parameters * max(bits[1], 32) / 8


def test_the_kv_cache_counts_at_its_largest_and_not_at_the_end() -> None:
    # Two places; sequence 0 has 3 tokens, 1 has one and 2 has one. Step 0 holds 1 + 1, step 1 (2 and sequence 2's 1)
    # 3, step 2 only sequence 0's 3.
    trace = tiny_trace([[[0], [0]]] * 5, sequence=np.array([0, 0, 0, 1, 2]))
    steps = plan_steps(trace.sequence, trace.phase, batch=2)
    assert kv_cache_bytes(MODEL, trace, steps).tolist() == [20, 30, 30]
    assert described(with_trace(trace, batch=2))["memories"][0]["parts"]["KV cache"] == 30


def with_trace(trace: RoutingTrace, **workload: Any) -> Inputs:
    inputs: Inputs = tiny_inputs(MODEL, tiny_profile(), trace, tiny_scenario(workload=workload))
    return inputs


@given(data=st.data())
def test_the_kv_cache_of_every_step_is_what_counting_sequence_by_sequence_gives(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    phase = np.concatenate([(np.arange(length) >= data.draw(st.integers(0, length))) * 1 for length in lengths])
    trace = tiny_trace([[[0], [0]]] * len(sequence), sequence=sequence, phase=phase.astype(np.uint8))
    prefill = data.draw(st.sampled_from(["skip", "whole", "chunked"]))
    steps = plan_steps(trace.sequence, trace.phase, batch=data.draw(st.integers(1, 3)), prefill=prefill, chunk_tokens=2)
    if not steps:
        return
    last = {name: number for number, step in enumerate(steps) for name in trace.sequence[step.rows].tolist()}
    held: dict[int, int] = {}
    counted = []
    for number, step in enumerate(steps):
        for row in step.rows.tolist():
            held[int(trace.sequence[row])] = int(trace.position[row]) + 1
        counted.append(10 * sum(held.values()))
        held = {name: tokens for name, tokens in held.items() if last[name] > number}
    assert kv_cache_bytes(MODEL, trace, steps).tolist() == counted


def test_low_precision_copies_are_told_from_the_experts_whose_room_they_take() -> None:
    # A budget of 80: half of it at most for copies of 5 bytes, which all eight experts have then.
    inputs = tiny(memory={"gpu_budget": "4experts"}, miss={"policy": "low_precision"})
    parts = kept(inputs)["gpu0"]
    assert (parts["experts"], parts["low-precision copies"]) == (40, 40)


@pytest.mark.parametrize(
    ("compression", "parts"),
    [
        ({"where": "host", "ratio": 0.5, "decompress_gb_per_s": 1.0}, {"compressed experts": 80}),
        ({"where": "gpu", "ratio": 0.5, "decompress_gb_per_s": 1.0}, {"compressed experts": 80}),
        # In each layer one expert of 20 bytes, one of 10 and two of 5.
        ({"mixed": [[0.25, 1.0], [0.25, 0.5], [0.5, 0.25]]}, {"experts": 2 * (20 + 10 + 5 + 5)}),
    ],
)
def test_host_memory_keeps_experts_as_they_are_stored_there(compression: dict[str, Any], parts: dict[str, int]) -> None:
    assert kept(tiny(compression=compression))["host"] == parts


def test_what_the_gpu_keeps_throughout_need_not_lie_in_host_memory() -> None:
    on_cpu: dict[str, Any] = {"miss": {"policy": "cpu"}, "prefetch": {"policy": "none"}}
    last_layer = {"gpu_budget": "4experts", "preload": "layers", "cpu_layers": 1}
    assert kept(tiny(memory=last_layer, **on_cpu))["host"] == {"experts": 80}
    # What may be copied is evicted again, so that host memory keeps all; with room for all it keeps none.
    assert kept(tiny(memory={"gpu_budget": "4experts", "preload": "popular"}))["host"] == {"experts": 160}
    assert "host" not in kept(tiny(memory={"gpu_budget": "100%", "preload": "popular"}))


def test_a_peer_keeps_all_experts_and_the_host_none() -> None:
    profile = tiny_profile(gpus=2)
    peer = kept(tiny(profile=profile, copy={"source": "peer"}))
    assert peer["gpu1"] == {"experts": 160} and "host" not in peer


def test_host_memory_as_a_cache_keeps_its_budget_and_the_drive_all_experts() -> None:
    tiers = kept(tiny(tiers={"host_budget": "3experts"}))
    assert (tiers["host"], tiers["drive"]) == ({"experts": 60}, {"experts": 160})


def test_layers_that_share_experts_have_those_of_one_layer() -> None:
    assert kept(tiny(memory={"scope": "shared", "gpu_budget": "2experts"}))["host"] == {"experts": 80}


def test_gpus_that_share_experts_keep_the_kv_cache_of_their_own_sequences_and_spare_room() -> None:
    # Sequence 0, of three tokens, lives on GPU 0; 1, of one token, on GPU 1.
    trace = tiny_trace([[[0], [1]]] * 4, sequence=np.array([0, 0, 0, 1]))
    scenario = tiny_scenario(
        workload={"batch": 2}, memory={"gpu_budget": "50%"}, parallel={"gpus": 2, "spare_bytes": "45B"}
    )
    parts = kept(tiny_pipeline(MODEL, tiny_profile(gpus=2), trace, scenario))
    assert [parts[gpu]["KV cache"] for gpu in ("gpu0", "gpu1")] == [30, 10]
    # Each owns two experts a layer: half of 80 bytes; in 45 there is room for two more. All experts lie in host memory.
    assert [parts[gpu]["experts"] for gpu in ("gpu0", "gpu1")] == [40, 40]
    assert [parts[gpu]["spare room for other GPUs' experts"] for gpu in ("gpu0", "gpu1")] == [40, 40]
    assert parts["host"] == {"experts": 160}


def test_one_memory_for_gpu_and_host_keeps_what_both_have() -> None:
    inputs = tiny(profile=holding(1000, unified_memory=True), memory={"gpu_budget": "4experts"})
    (memory,) = memories(inputs)
    assert (memory.name, memory.capacity_bytes) == ("gpu0 and host", 1000)
    assert (memory.parts["experts"], memory.parts["experts of the host"]) == (80, 160)


def test_a_phone_has_one_memory() -> None:
    names = [memory.name for memory in memories(load_inputs(load_scenario("phone", ["workload.tokens=2"])))]
    assert names == ["gpu0 and host", "drive"]


# What a machine states is enforced.


def test_a_memory_that_is_full_to_the_byte_fits_and_one_byte_less_does_not() -> None:
    # 6 + 7 + 5 + 30 + 80, as above.
    assert memories(tiny(profile=holding(128), memory={"gpu_budget": "4experts"}))[0].fits is True
    with pytest.raises(CapacityError) as error:
        tiny(profile=holding(127), memory={"gpu_budget": "4experts"})
    assert str(error.value).startswith(
        "memory.gpu_budget = '4experts': gpu0 would keep 128 bytes, 1 byte more than the 127 bytes"
    )


BEYOND = {
    "57 GiB of experts on 24 GB": (
        ["model.preset=gpt-oss-120b", "machine.profile=rtx3090", "memory.gpu_budget=100%"],
        "memory.gpu_budget = '100%' of the experts: gpu0 would keep 60.77 GiB, 36.77 GiB more than the "
        "24.00 GiB that it holds (profile rtx3090, gpu_memory_bytes): experts 56.80 GiB + dense weights 1.81 GiB + "
        "head 1.08 GiB + input embedding 1.08 GiB + "
        "KV cache 288.00 KiB; there is room for 20.04 GiB of them; or set memory.capacity = 'ignore'",
    ),
    "a budget of 500 GiB": (
        ["memory.gpu_budget=500GiB"],
        "memory.gpu_budget = '500GiB': gpu0 would keep 503.35 GiB, 372.03 GiB more",
    ),
    "a total of 80 GiB on 24": (
        ["machine.profile=rtx3090", "memory.total_bytes=80GiB"],
        "memory.total_bytes = '80GiB': gpu0 would keep 80.00 GiB, 56.00 GiB more than the 24.00 GiB",
    ),
    "the rest alone": (
        ["machine.profile=rtx3090", "memory.workspace_bytes=25GiB"],
        "model.preset = 'gpt-oss-20b': gpu0 would keep",
    ),
    "609 GiB in one GPU": (
        ["model.preset=deepseek-v3", "memory.gpu_budget=100%"],
        "memory.gpu_budget = '100%' of the experts: gpu0 would keep 626.77 GiB, 495.45 GiB more",
    ),
    "609 GiB in a peer": (
        ["model.preset=deepseek-v3", "machine.profile=h200-x2", "copy.source=peer", "memory.gpu_budget=10%"],
        "copy.source = 'peer': gpu1 would keep 609.00 GiB, 469.20 GiB more than the 139.80 GiB",
    ),
    "a host of 64 GiB": (
        [*MIXTRAL, "machine.profile=rtx3090-nvme", "memory.gpu_budget=10%"],
        "tiers.host_budget = 'all': host would keep 84.00 GiB, 20.00 GiB more than the 64.00 GiB",
    ),
    "256 GiB in a host of 64": (
        ["machine.profile=rtx3090-nvme", "tiers.host_budget=256GiB"],
        "tiers.host_budget = '256GiB': host would keep 256.00 GiB, 192.00 GiB more than the 64.00 GiB",
    ),
    "a stage": (
        ["model.preset=deepseek-v3", "machine.profile=h200-x2", "parallel.stages=2", "memory.gpu_budget=50%"],
        "memory.gpu_budget = '50%' of the experts: gpu0 (and 1 more) would keep 161.95 GiB, 22.15 GiB more",
    ),
    "spare memory": (
        ["machine.profile=h200-x2", "parallel.gpus=2", "parallel.spare_bytes=140GiB"],
        "spare room for other GPUs' experts ",
    ),
}


@pytest.mark.parametrize("name", BEYOND)
def test_more_than_a_memory_holds_is_refused_with_the_sum_in_words(name: str) -> None:
    settings, told = BEYOND[name]
    with pytest.raises(CapacityError) as error:
        load_inputs(load_scenario("synthetic", [*SMALL, *settings]))
    said = str(error.value)
    assert told in said and "\n" not in said
    assert said.startswith(told.partition(":")[0]) or name == "spare memory"


@pytest.mark.parametrize("name", BEYOND)
def test_a_scenario_that_does_not_care_runs_and_is_told_that_it_does_not_fit(name: str) -> None:
    scenario = load_scenario("synthetic", [*SMALL, *BEYOND[name][0], "memory.capacity=ignore"])
    told = described(load_inputs(scenario))
    assert told["rule"] == "ignore"
    assert any(memory["fits"] is False for memory in told["memories"])


def test_a_drive_that_cannot_hold_all_experts_is_refused() -> None:
    nvme = {**tiny_profile().model_dump()["nvme"], "drive": {"capacity_bytes": 159, **ASSUMED}}
    with pytest.raises(
        CapacityError, match=r"^model\.preset = 'mixtral-8x7b': drive would keep 160 bytes, 1 byte more"
    ):
        tiny(profile=holding(10**6, nvme=nvme), tiers={"host_budget": "3experts"})


def test_two_memories_that_do_not_hold_it_are_both_told() -> None:
    settings = ["model.preset=deepseek-v3", "machine.profile=rtx3090-nvme", "memory.gpu_budget=100%"]
    with pytest.raises(CapacityError, match=r"gpu0 would keep .* host would keep 609\.00 GiB"):
        load_inputs(load_scenario("synthetic", [*SMALL, *settings]))


@pytest.mark.parametrize("name", scenario_names())
def test_what_ships_fits_its_machine(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.memory.capacity == "check"
    load_inputs(scenario)


def test_a_search_for_a_split_leaves_out_what_does_not_fit() -> None:
    # Four layers, of which the last alone has experts worth telling: by kernels the split is equal, but a stage with
    # the last layer has room for that layer alone.
    model = replace(tiny_model(4, dense_ns=0, copy_ns=[1, 1, 1, 200]), dense_bytes=(50, 50, 50, 50))
    trace = tiny_trace([[[0]] * 4] * 3)
    plain = tiny_profile(gpus=2).model_dump()
    nodes = [{**node, "capacity_bytes": 860} if node["kind"] == "gpu" else node for node in plain["topology"]["nodes"]]
    small = make_profile({**plain, "topology": {**plain["topology"], "nodes": nodes}}, "small")
    scenario = tiny_scenario(memory={"gpu_budget": "100%"}, parallel={"stages": 2, "split": "searched"})
    inputs = tiny_pipeline(model, small, trace, scenario)
    # 50 + 800 bytes; with another layer's 50 + 4 it would be 904.
    assert [stage.model.layers for stage in inputs.stages] == [3, 1]


# What is not stated is said, and not checked.


def test_a_capacity_that_no_profile_states_is_told_as_such_and_not_checked() -> None:
    inputs = load_inputs(load_scenario("synthetic", [*SMALL, "model.preset=deepseek-v3", "memory.gpu_budget=10%"]))
    data = simulate_inputs(inputs, baselines=False).data
    host = data["capacity"]["memories"][1]
    assert (host["memory"], host["capacity_bytes"], host["fits"], host["share"]) == ("host", None, None, None)
    assert host["stated_by"] == "host_memory"
    assert capacity_rows(data)[1] == ("host", "609.00 GiB", "not checked, no capacity is stated: experts 609.00")


def test_a_profile_may_state_what_its_host_holds() -> None:
    host = {"host_memory": {"capacity_bytes": 159, **ASSUMED}}
    with pytest.raises(CapacityError, match=r"^tiers\.host_budget = 'all': host would .*tiny, host_memory \(assumed\)"):
        tiny(profile=holding(10**6, **host))


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        ("h200-x2", {"host_memory": {"capacity_bytes": 1, **ASSUMED}}, "host_memory: the topology's nodes say what"),
        ("h200-x2", {"unified_memory": True}, "unified_memory: the topology's nodes say what each memory holds"),
        (
            "oneplus15r-ufs4",
            {"host_memory": {"capacity_bytes": 1, **ASSUMED}},
            "host_memory: with unified_memory = true the host has none of its own",
        ),
        ("h200", {"host_memory": {"capacity_bytes": 0, **ASSUMED}}, "host_memory.capacity_bytes = 0: must be greater"),
    ],
)
def test_a_capacity_that_contradicts_another_is_refused(base: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError) as error:
        make_profile({**load_profile(base).model_dump(), **changes}, base)
    assert message in str(error.value)


# What is left of a total.


def test_a_total_without_a_budget_gives_experts_all_that_is_left() -> None:
    plain = {"model": {"preset": "gpt-oss-120b"}, "machine": {"profile": "rtx3090"}, "memory": {"total_bytes": "24GiB"}}
    scenario = make_scenario({**plain, "workload": {"synthetic": {"tokens": 4}}})
    inputs = load_inputs(scenario)
    model = inputs.model
    rest_bytes = sum(model.dense_bytes) + model.head_bytes + model.embedding_bytes
    assert inputs.budgets == [24 * 2**30 - rest_bytes - tokens * model.kv_bytes_per_token for tokens in (1, 2, 3, 4)]
    assert make_scenario(scenario.plain()) == scenario  # so that a row of a sweep runs again as it was
    assert memories(inputs)[0].sum_bytes == 24 * 2**30


def test_no_more_than_all_experts_and_the_rest_is_told() -> None:
    # Of 1000 bytes, 6 + 7 + 5 + 30 go elsewhere; all experts take 160.
    inputs = tiny(memory={"total_bytes": "1000B"} | {"gpu_budget": "100%"})
    parts = kept(inputs)["gpu0"]
    assert (parts["experts"], parts["left over of the total"]) == (160, 1000 - 48 - 160)
    assert memories(inputs)[0].sum_bytes == 1000


@pytest.mark.parametrize("given", [{"gpu_budget": "25%"}, {"gpu_budget": "1GiB"}])
def test_a_budget_beside_a_total_stays(given: dict[str, str]) -> None:
    plain = {"workload": {"synthetic": {}}, "memory": {"total_bytes": "24GiB", **given}}
    assert make_scenario(plain).memory.gpu_budget == given["gpu_budget"]
    assert make_scenario({"workload": {"synthetic": {}}}).memory.gpu_budget == "25%"


# What a result says.


def test_a_result_says_what_a_budget_in_percent_is_of_the_memory() -> None:
    data = simulate(load_scenario("synthetic", [*SMALL, "machine.profile=rtx3090"]), baselines=False).data
    gpu = data["capacity"]["memories"][0]
    assert gpu["experts_share"] == data["budget_bytes"] / (24 * 2**30)
    assert gpu["share"] == gpu["sum_bytes"] / gpu["capacity_bytes"] and gpu["fits"] is True
    assert sum(gpu["parts"].values()) == gpu["sum_bytes"]
    assert "room for 25.0% of the experts (2.37 GiB, 9.9% of the GPU's memory)" in headline(data)
    assert capacity_rows(data)[0][:2] == ("gpu0", "5.72 of 24.00 GiB (23.8%)")
    json.dumps(data["capacity"])


def test_of_several_gpus_the_fullest_is_shown() -> None:
    settings = [*SMALL_8, "machine.profile=h200-x2", "parallel.stages=2", "workload.synthetic.prefill_tokens=0"]
    data = simulate(load_scenario("synthetic", settings), baselines=False).data
    gpus = [memory["sum_bytes"] for memory in data["capacity"]["memories"] if memory["kind"] == "gpu"]
    fullest, host = capacity_rows(data)
    assert fullest[0] == f"gpu{gpus.index(max(gpus))}, the fullest of 2"
    assert host[0] == "host"
    assert "of the memory of 2 GPUs" in headline(data)


def test_everything_resident_is_compared_with_though_it_would_not_fit() -> None:
    settings = [*SMALL, *MIXTRAL, "machine.profile=rtx3090", "memory.gpu_budget=20GiB"]
    data = simulate(load_scenario("synthetic", settings)).data
    resident = data["capacity"]["resident"]
    # 84 GiB of experts, 2.99 of all else.
    assert (resident["fits"], round(resident["sum_bytes"] / 2**30, 2)) == (False, 86.99)
    rows = speed_rows(data)
    at = [row[0] for row in rows].index("all resident")
    assert rows[at + 1][0] == "" and rows[at + 1][2] == "it would not fit, 86.99 GiB in 24.00"
    fitting = simulate(load_scenario("synthetic", SMALL)).data
    assert fitting["capacity"]["resident"]["fits"] is True
    assert not any("would not fit" in row[2] for row in speed_rows(fitting))


# Whoever runs scenarios refuses them.

TOO_MUCH = [*SMALL, "machine.profile=rtx3090", "memory.gpu_budget=30GiB"]
TOLD = "memory.gpu_budget = '30GiB': gpu0 would keep"


def test_a_sweep_keeps_the_rows_that_fit_and_says_which_do_not(tmp_path: Path) -> None:
    grid = {"memory.gpu_budget": ["1GiB", "30GiB"]}
    # Experts of 9.5 GiB all resident do fit; with a smaller GPU, the baseline runs though it would not.
    rows = list(sweep("synthetic", grid, settings=TOO_MUCH[:-1], out=tmp_path / "rows.jsonl", workers=1))
    assert [row["error"] is None for row in rows] == [True, False]
    assert rows[1]["error"].startswith(TOLD)
    big = [*TOO_MUCH[:-1], *MIXTRAL]
    (row,) = sweep("synthetic", {"memory.gpu_budget": ["2GiB"]}, settings=big, out=tmp_path / "big.jsonl", workers=1)
    assert row["error"] is None and row["resident_ms"] > 0 and row["capacity"]["resident"]["fits"] is False


def test_comparisons_and_break_even_refuse_it() -> None:
    with pytest.raises(CapacityError, match=TOLD):
        load_run("synthetic", TOO_MUCH)
    with pytest.raises(ValueError, match=TOLD):
        break_even(load_scenario("synthetic", TOO_MUCH), workers=1)


def test_an_execution_refuses_it_before_the_first_scenario_runs() -> None:
    executable = [*SMALL, *MIXTRAL, "memory.gpu_budget=2GiB"]
    chosen = {"fits": load_scenario("synthetic", executable), "does not": load_scenario("synthetic", TOO_MUCH)}
    with pytest.raises(ExecutionError, match=f"^1 of 2 scenarios cannot be executed, .*: does not: {TOLD}"):
        execute_all(chosen)
    with pytest.raises(CapacityError, match=f"^{TOLD}"):
        execute_all({"does not": chosen["does not"]})


def test_the_command_refuses_it_in_one_line() -> None:
    settings = [part for setting in TOO_MUCH for part in ("--set", setting)]
    done = CliRunner().invoke(app, ["run", "synthetic", *settings])
    assert isinstance(done.exception, CapacityError)


def test_a_predictor_on_the_host_lies_in_host_memory() -> None:
    on_host = load_inputs(
        load_scenario("guide", ["predictor.lane=host", "workload.tokens=4", "predictor.latency_us=1"])
    )
    on_gpu = load_inputs(load_scenario("guide", ["predictor.lane=gpu", "workload.tokens=4"]))
    size_bytes = on_gpu.predictor.gpu_memory_bytes
    assert size_bytes > 0
    assert kept(on_gpu)["gpu0"]["predictor"] == size_bytes and "predictor" not in kept(on_gpu)["host"]
    assert host_parts(on_host)["predictor"] == size_bytes and "predictor" not in kept(on_host)["gpu0"]
