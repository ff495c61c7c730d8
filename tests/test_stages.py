"""Stages: what each has of a model, its trace and its guesses adds up to the whole; what cannot run is refused."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from tiny import tiny_model, tiny_pipeline, tiny_profile, tiny_scenario, tiny_topology, tiny_trace

from prestage.engine.costs.costs import part_costs
from prestage.engine.load import load_inputs
from prestage.engine.loading.deciders import dispatched, make_manager
from prestage.engine.loading.stages import stage_guesses, stage_model, stage_trace
from prestage.engine.measure.comparison import compare
from prestage.engine.measure.merge import makespan_ns
from prestage.engine.policies.prefetch import NoPrefetch
from prestage.engine.run import prepared, run_all
from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.simulate import simulate
from prestage.experiments.compare import load_run
from prestage.output.run_folder import write_result
from prestage.output.tables.runs import print_result
from prestage.resources.profile import load_profile, make_profile
from prestage.resources.runtime import runtime_names
from prestage.workloads.guesses import Guesses
from prestage.workloads.model import load_model, preset_names

SMALL = ["workload.tokens=6", "workload.synthetic.tokens=12", "workload.synthetic.sequences=2", "workload.batch=2"]
SMALL += ["workload.synthetic.prefill_tokens=2", "machine.profile=h200-x2", "parallel.stages=2"]


def refused(profile: Any = None, layers: int = 4, **sections: Any) -> str:
    """What a pipeline of two stages, or of other sections, is refused with."""
    parallel = {"stages": 2, **sections.pop("parallel", {})}
    trace = tiny_trace([[[0]] * layers] * 4)
    with pytest.raises(ValueError) as error:
        tiny_pipeline(
            tiny_model(layers), profile or tiny_profile(gpus=2), trace, tiny_scenario(parallel=parallel, **sections)
        )
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("preset", preset_names())
def test_the_models_of_the_stages_add_up_to_the_model(preset: str) -> None:
    model = load_model(preset)
    cuts = [(0, 1), (1, model.layers // 2), (1 + model.layers // 2, model.layers - 1 - model.layers // 2)]
    stages = [stage_model(model, first, count) for first, count in cuts]
    assert sum(stage.total_expert_bytes for stage in stages) == model.total_expert_bytes
    assert sum(sum(stage.dense_bytes) for stage in stages) == sum(model.dense_bytes)
    assert [stage.head_bytes for stage in stages] == [0, 0, model.head_bytes]
    assert sum(stage.kv_bytes_per_token for stage in stages) == model.kv_bytes_per_token


def test_a_stage_has_the_choices_of_its_layers() -> None:
    choices = np.arange(2 * 3 * 1).reshape(2, 3, 1)
    trace = tiny_trace(choices.tolist(), num_experts=6, weights=choices / 8, present=choices[..., 0] != 4)
    part = stage_trace(trace, 1, 2)
    part.check("a stage")
    assert part.experts[..., 0].tolist() == [[1, 2], [4, 5]]
    assert part.weights is not None and part.weights[..., 0].tolist() == [[1 / 8, 2 / 8], [4 / 8, 5 / 8]]
    assert part.present is not None and part.present.tolist() == [[True, True], [False, True]]


def test_of_a_whole_models_guesses_a_stage_keeps_those_for_its_own_layers() -> None:
    # Layers 1 and 2 of 4: of the guesses one layer ahead, that at layer 1 is for layer 2; all others are for others'.
    experts = np.arange(8, dtype=np.int16).reshape(1, 4, 2, 1)
    guesses = stage_guesses(Guesses(np.array([0]), experts, experts.astype(np.float32)), 1, 2)
    assert guesses.experts[0, :, :, 0].tolist() == [[2, -1], [-1, -1]]
    assert guesses.confidences is not None and guesses.confidences[0, :, :, 0].tolist() == [[2, 0], [0, 0]]
    # A stage of all layers goes on with the next token, as the model does.
    assert stage_guesses(Guesses(np.array([0]), experts), 0, 4).experts.tolist() == experts.tolist()


def test_a_budget_is_each_gpus_own() -> None:
    model = load_model("gpt-oss-20b")
    half = model.total_expert_bytes // 2
    for budget, each in (("25%", half // 4), ("1GiB", 2**30), ("100experts", 100 * model.expert_bytes[0])):
        inputs = load_inputs(load_scenario("synthetic", [*SMALL, f"memory.gpu_budget={budget}"]))
        assert [stage.budget_bytes for stage in inputs.stages] == [each, each]
        assert inputs.budget_bytes == 2 * each


def test_the_memory_of_a_gpu_holds_its_layers_their_cache_and_the_head_where_it_is() -> None:
    settings = [*SMALL, "memory.gpu_budget=100%", "memory.total_bytes=8GiB", "prefetch.lookahead=0"]
    inputs = load_inputs(load_scenario("synthetic", settings))
    for stage in inputs.stages:
        context = sum(len(step.rows) for step in inputs.steps[:1])  # the first prompt's
        kv_bytes = context * stage.model.kv_bytes_per_token
        rest = 8 * 2**30 - sum(stage.model.dense_bytes) - stage.model.head_bytes - kv_bytes
        assert stage.budgets is not None
        assert stage.budgets[0] == min(rest, stage.model.total_expert_bytes)


@pytest.mark.parametrize("split", [[12, 12], [5, 19]])
def test_an_oracle_is_wrong_in_a_stage_where_it_is_wrong_in_the_whole_model(split: list[int]) -> None:
    settings = [*SMALL, "predictor.recall=0.5", "prefetch.lookahead=2"]
    stages = load_inputs(load_scenario("synthetic", [*settings, f"parallel.split={split}"])).stages
    whole = load_inputs(load_scenario("synthetic", [*settings, "parallel.stages=1"])).guesses
    assert whole is not None
    for stage, layers in zip(stages, split, strict=True):
        assert stage.guesses is not None
        own = stage_guesses(whole, stage.first_layer, layers)
        within = own.experts != -1  # at its last layers a stage guesses for its own first ones instead
        assert within[:, : layers - 2].all()
        assert (stage.guesses.experts[within] == own.experts[within]).all()


def test_equal_stages_evict_by_luck_of_their_own() -> None:
    trace = tiny_trace([[[token % 7]] * 4 for token in range(60)], num_experts=7)
    scenario = tiny_scenario(parallel={"stages": 2}, memory={"gpu_budget": "8experts", "eviction": "random"})
    evicted = []
    for stage in tiny_pipeline(tiny_model(4, 7), tiny_profile(gpus=2), trace, scenario).stages:
        manager = make_manager(stage)
        for _ in dispatched(stage, manager, NoPrefetch()):
            pass
        evicted.append(manager.evicted_copies.tolist())
    assert len(evicted[0]) > 20 and evicted[0] != evicted[1]


# What cannot run.


def test_a_stage_that_cannot_hold_one_expert_is_refused_by_name() -> None:
    said = refused(memory={"gpu_budget": "10%"}, parallel={"split": [1, 3]})
    assert said == ("the stage on gpu0, layers 0-0: the expert budget is 8 bytes: it must hold one expert, 20 bytes")


def test_more_stages_than_layers_or_gpus_are_refused() -> None:
    assert refused(layers=1) == "parallel.stages = 2: choose at most 1, the layers of the model"
    assert refused(tiny_profile()) == (
        "parallel.stages = 2: profile tiny has no topology, so 1 GPU: choose a machine.profile with 2"
    )
    said = refused(tiny_profile(gpus=2), parallel={"stages": 3})
    assert said == "parallel.stages = 3: profile tiny has 2 GPUs: choose a machine.profile with 3"


def test_gpus_that_no_copy_can_go_between_are_refused() -> None:
    topology = tiny_topology(2)
    topology["nodes"] += [{**node, "name": f"{node['kind']}1"} for node in topology["nodes"][:2]]
    links = {tuple(link["ends"]): link for link in topology["links"]}
    # Each GPU has a host of its own, and nothing joins the two.
    topology["links"] = [
        links["host0", "cpu0"],
        links["cpu0", "gpu0"],
        {**links["host0", "cpu0"], "ends": ["host1", "cpu1"]},
        {**links["cpu0", "gpu1"], "ends": ["cpu1", "gpu1"]},
    ]
    profile = make_profile({**tiny_profile(gpus=2).model_dump(), "topology": topology}, "two machines")
    assert refused(profile) == "topology: there is no route from gpu0 to gpu1: link them, or name others"


def test_a_split_that_is_not_of_this_model_is_refused() -> None:
    assert refused(parallel={"split": [3, 2]}) == "parallel.split = [3, 2]: these are 5 layers, the model has 4"


# Whole runs.


def test_a_search_gives_the_stage_that_waits_for_large_experts_fewer_layers() -> None:
    # All layers compute for 10 ns, so that by compute each stage takes two. But the first one's experts take 90 ns to
    # copy, the others' 5: a token takes 115 and 30 ns in stages of 2 | 2 layers, 100 and 45 in those of 1 | 3.
    trace = tiny_trace([[[expert]] * 4 for expert in range(4)], sequence=range(4))
    model = tiny_model(4, copy_ns=[90, 5, 5, 5])
    took_ns = {}
    for split in ("compute", "searched"):
        parallel = {"stages": 2, "split": split, "micro_batches": 4}
        scenario = tiny_scenario(parallel=parallel, workload={"batch": 4}, memory={"gpu_budget": "360B"})
        inputs = tiny_pipeline(model, tiny_profile(gpus=2), trace, scenario)
        counts = tuple(stage.model.layers for stage in inputs.stages)
        took_ns[counts] = makespan_ns(run_all(inputs, prepared(inputs, part_costs(inputs))))
    assert took_ns == {(2, 2): 4 * 115 + 30, (1, 3): 4 * 100 + 45}


def test_copies_between_gpus_that_nobody_measured_are_named_as_estimates() -> None:
    assert load_profile("h200-x2").peer is not None
    measured = simulate(load_scenario("synthetic", SMALL), baselines=False).data
    assert "copies between GPUs" not in measured["estimates"]
    staged = [*SMALL, "machine.profile=rtx3090-x2", "dispatch.router_readback=false"]
    estimated = simulate(load_scenario("synthetic", staged), baselines=False).data
    assert "narrowest link" in estimated["estimates"]["copies between GPUs"]


@pytest.mark.slow
def test_the_files_of_a_pipeline_show_both_gpus(tmp_path: Path) -> None:
    result = simulate(load_scenario("synthetic", SMALL), baselines=False)
    write_result(result, tmp_path)
    data = orjson.loads((tmp_path / "result.json").read_bytes())
    assert [(gpu["device"], gpu["layers"]) for gpu in data["gpus"]] == [("gpu0", "0-11"), ("gpu1", "12-23")]
    assert data["budget_bytes"] == sum(gpu["budget_bytes"] for gpu in data["gpus"])
    events = orjson.loads(gzip.decompress((tmp_path / "timeline.json.gz").read_bytes()))["traceEvents"]
    for name, phase in (("expert memory (MiB)", "C"), ("Memcpy PtoP (Device -> Device)", "X")):
        assert {event["pid"] for event in events if (event["name"], event["ph"]) == (name, phase)} == {0, 1}
    assert (tmp_path / "timeline.png").stat().st_size and (tmp_path / "memory.png").stat().st_size
    spans = result.timeline.spans()
    assert int(spans["expert"].max()) // 32 == 23 and int(spans["visit"].max()) == result.data["layer_visits"] - 1
    assert {lane.device for lane in result.timeline.lanes} == {"gpu0", "gpu1", "host0", "host1"}
    copies = spans["copy"][spans["copy"] >= 0]
    assert len(np.unique(copies)) == sum(len(recording.manager.copy_expert) for recording in result.recordings)


def test_the_same_pipeline_gives_the_same_bytes() -> None:
    results = [simulate(load_scenario("synthetic", [*SMALL, "parallel.micro_batches=2"])) for _ in range(2)]
    first, second = (orjson.dumps(result.data) for result in results)
    assert first == second
    assert results[0].timeline.spans().tobytes() == results[1].timeline.spans().tobytes()


def test_replicates_of_a_pipeline_draw_the_costs_of_all_gpus() -> None:
    inputs = load_scenario("synthetic", SMALL)
    makespan_ms = simulate(inputs, baselines=False, replicates=3).data["replicates"]["makespan_ms"]
    assert makespan_ms["p5"] < makespan_ms["p50"] < makespan_ms["p95"]


@pytest.mark.slow
def test_the_table_of_a_pipeline_shows_each_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(simulate(load_scenario("synthetic", SMALL), baselines=False).json_data())
    shown = capsys.readouterr().out
    assert "mean of 2 compute streams" in shown
    rows = [line.split() for line in shown[shown.index("Each GPU") :].splitlines()]
    assert rows[1][:6] == ["layers", "compute", "stall", "host", "bubble", "drain"]
    assert [row[:2] for row in rows[2:4]] == [["gpu0", "0-11"], ["gpu1", "12-23"]]


def test_pipelines_are_compared_gpu_by_gpu() -> None:
    runs = {name: load_run(f"synthetic,{name}", SMALL) for name in ("parallel.micro_batches=1", "prefetch.lookahead=0")}
    where = compare(runs)["where"]["prefetch.lookahead=0"]
    difference_ns = [round(run["makespan_ms"] * 1e6) for run in runs.values()]
    for gpu in ("gpu0", "gpu1"):
        in_ns = [round(part["difference_ms"] * 1e6) for part in where[gpu].values()]
        assert sum(in_ns) == difference_ns[1] - difference_ns[0]


@pytest.mark.parametrize("runtime", runtime_names())
def test_one_sequence_is_no_faster_where_its_layers_are_on_several_gpus(runtime: str) -> None:
    # All experts are resident, so that each layer takes what it takes on one GPU, and passes follow each other. The
    # time of the host's for a pass is taken once, not once a GPU.
    speeds = [
        simulate(
            load_scenario(
                "one-gpu",
                ["model.preset=olmoe-1b-7b", "model.bits_per_weight=4.85", "workload.tokens=6", "workload.prefill=skip",
                 f"machine.gpu={gpus}x rtx3090", "machine.ram=64GB DDR5-5600", f"runtime.name={runtime}"],
            ),
            baselines=False,
        ).data["tokens_per_second"]
        for gpus in (1, 2, 4)
    ]  # fmt: skip
    own = runtime in ("prestage", "freetoken")  # threads of its own for each GPU, which are ready when their turn comes
    assert speeds[0] * 0.93 < speeds[2] and speeds[0] * 0.93 < speeds[1] < speeds[0] * (1.35 if own else 1.0)


def test_layers_whose_experts_stay_in_host_memory_weigh_nothing_where_memory_divides_them() -> None:
    settings = ["model.preset=gpt-oss-120b", "machine.gpu=2x rtx3090", "machine.ram=128GB DDR5-5600"]
    settings += ["runtime.name=llama.cpp", "memory.cpu_layers=14", "workload.tokens=4"]
    # 14 of 36 layers stay, 22 are divided; of as heavy divisions that with most layers at the front.
    inputs = load_inputs(load_scenario("one-gpu", [*settings, "parallel.split=memory"]))
    assert [stage.model.layers for stage in inputs.stages] == [25, 11]
    with pytest.raises(
        ValueError, match=r"the stage on gpu1, layers 18-35: .*or this stage fewer layers \(parallel\.split"
    ):
        load_inputs(load_scenario("one-gpu", settings))
