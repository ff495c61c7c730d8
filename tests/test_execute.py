"""An execution, all but the CUDA calls: on a device that does on the CPU what a GPU would do, with real products.

Slots, order, waits, the priority queue and the timeline are those of a GPU's run; a wait for an event that is not
recorded yet fails here, where CUDA would go on without a word.
"""

import gzip
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from cpu_device import CpuDevice
from tiny import tiny_inputs, tiny_profile, tiny_scenario

from prestage import cli
from prestage.calibration.device.cuda import CudaError, Gpu, Workload, expert_matrices
from prestage.calibration.device.host import Cores
from prestage.calibration.executor import planner as calibration_planner
from prestage.calibration.executor.entries import ExecutionError
from prestage.calibration.executor.execute import (
    Execution,
    check_room,
    chosen_scenarios,
    execute,
    execute_all,
    load_executable,
    undisturbed,
)
from prestage.calibration.executor.measured import MeasuredError, load_measured, makespan_ns
from prestage.calibration.executor.plan import decision_counts, make_plan, make_planners
from prestage.calibration.executor.scenario_sets import scenarios
from prestage.calibration.executor.shared import Shared
from prestage.engine.costs.costs import Costs, part_costs
from prestage.engine.decide.commands import OUTPUT, Command, Op
from prestage.engine.decide.dispatch import Visit
from prestage.engine.decide.program import Rows, Stage
from prestage.engine.loading.deciders import make_manager, make_prefetch
from prestage.engine.run import prepared, run, run_all
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.timing import runs
from prestage.resources.profile_costs import ProfileError
from prestage.resources.timeline import DEMAND, DENSE, EXPERT, HEAD, KINDS, PREFETCH, READBACK
from prestage.workloads.model import Model
from prestage.workloads.synthetic import synthesize
from prestage.workloads.trace import RoutingTrace

LAYERS, EXPERTS, TOP_K, HIDDEN, FF = 3, 6, 2, 16, 32
EXPERT_BYTES = 3 * HIDDEN * FF * 4


def small_model() -> Model:
    return Model(
        name="small", layers=LAYERS, experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, expert_ff=FF, expert_matrices=3,
        expert_dtype="float32", dense_dtype="float32", expert_bytes=(EXPERT_BYTES,) * LAYERS,
        dense_bytes=(4 * HIDDEN * 32 * 4,) * LAYERS, head_bytes=HIDDEN * 64 * 4, dense_kernels=7, expert_kernels=5,
    )  # fmt: skip


def small_inputs(model: Model | None = None, tokens: int = 12, **sections: Any) -> Inputs:
    """A run of a few tokens over half the experts, mispredicted often enough to evict and to miss."""
    trace = synthesize(tokens, LAYERS, EXPERTS, TOP_K, skew=0.3, working_set=EXPERTS, reuse=0.3, sequences=3, seed=4)
    chosen = {
        "memory": {"gpu_budget": "9experts"},
        "predictor": {"recall": 0.7},
        "prefetch": {"lookahead": 1},
        "dispatch": {"mode": "eager"},
    } | sections
    inputs: Inputs = tiny_inputs(model or small_model(), tiny_profile(), trace, tiny_scenario(**chosen))
    return inputs


VARIANTS: dict[str, dict[str, Any]] = {
    "eager": {},
    "graph": {"dispatch": {"mode": "graph"}},
    "no prefetch": {"prefetch": {"lookahead": 0}},
    "no read-back": {"dispatch": {"mode": "graph", "router_readback": False}},
    "far ahead": {"prefetch": {"lookahead": 3}},
    "before launch": {"prefetch": {"lookahead": 1, "issue": "before_launch"}},
    "resident first": {"dispatch": {"mode": "eager", "expert_order": "resident_first"}},
    "batch": {"workload": {"batch": 3, "trace": "none"}},
    "batch in graphs": {"workload": {"batch": 3, "trace": "none"}, "dispatch": {"mode": "graph"}},
    "waves": {"memory": {"gpu_budget": "2experts"}, "workload": {"batch": 3, "trace": "none"}},
    "two streams": {"copy": {"discipline": "two_streams"}, "prefetch": {"lookahead": 3}},
    "chunks": {"copy": {"chunk_bytes": 1000}},
    "priority": {"copy": {"discipline": "priority"}, "prefetch": {"lookahead": 3}},
    "priority in chunks": {"copy": {"discipline": "priority", "chunk_bytes": 1000}, "prefetch": {"lookahead": 3}},
    "priority, no read-back": {
        "copy": {"discipline": "priority"},
        "dispatch": {"router_readback": False, "mode": "graph"},
    },
}


@pytest.fixture(scope="module")
def shared() -> Shared:
    return Shared(CpuDevice(), LAYERS * EXPERTS * EXPERT_BYTES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_execution_makes_the_spans_that_the_simulation_makes(variant: str, shared: Shared) -> None:
    expect_the_simulations_spans(CpuDevice(), variant, shared)


def expect_the_simulations_spans(device: Any, variant: str, shared: Shared) -> None:
    """Execute a variant on a device, and assert that it makes the copies and kernels that its simulation makes."""
    inputs = small_inputs(**VARIANTS[variant])
    measured = execute([device], inputs, variant, shared, repeats=3)
    (gpu,), (timeline,) = measured.gpus, measured.timelines()
    costs = Costs(inputs)
    simulated = run(inputs, costs, make_manager(inputs), make_prefetch(inputs.scenario, inputs.model))
    assert gpu.counts["miss"] + gpu.counts["prefetch"] == len(simulated.copy_reason)
    assert gpu.counts["evict"] == simulated.manager.evicted
    wanted, made = (
        Counter((KINDS[span["kind"]], span["visit"], span["expert"], span["copy"]) for span in spans.tolist_named())
        for spans in (_Spans(simulated.spans), _Spans(timeline.spans()))
    )
    if inputs.scenario.copy_.discipline == "priority":  # which prefetches are cancelled is a matter of time
        for spans in (wanted, made):
            for span in [span for span in spans if span[0] == "prefetch"]:
                del spans[span]
    assert made == wanted


class _Spans:
    def __init__(self, spans: Any) -> None:
        self.spans = spans[spans["kind"] != KINDS.index("launch")]

    def tolist_named(self) -> list[dict[str, Any]]:
        return [dict(zip(self.spans.dtype.names, row, strict=True)) for row in self.spans.tolist()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_expert_computes_with_its_own_weights(variant: str, shared: Shared) -> None:
    # The group of each expert is wrapped: right behind it, its output must be that of the host's weights.
    inputs = small_inputs(**VARIANTS[variant])
    execution = Execution([CpuDevice()], inputs, shared)
    (part,) = execution.parts
    host = shared.buffers([EXPERT_BYTES] * LAYERS * EXPERTS)
    seen = []

    def check(expert: int, tokens: int) -> None:
        first, second, last = expert_matrices(inputs.model, host[expert])
        x = part.workload._expert_x[:tokens]
        wanted = ((x @ first.t()).relu() * (x @ second.t())) @ last.t()
        torch.testing.assert_close(part.workload.output[:tokens], wanted)
        seen.append(expert)

    for entry, step in zip(part.plan.entries, part._stamp_of, strict=True):
        if entry.kind == EXPERT:
            part.program[step] += ((check, (entry.expert, entry.tokens)),)
    execution.run()
    assert seen == [entry.expert for entry in part.plan.entries if entry.kind == EXPERT]
    assert all(part.holds_right_bytes(expert, slot) for expert, slot in part.plan.resident.items())


def test_one_more_run_is_made_under_the_profiler_which_sees_its_calls(shared: Shared, tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    measured = execute([CpuDevice()], small_inputs(), "profiled", shared, repeats=2, profile=path)
    assert len(measured.makespans_ns) == 2
    trace = json.loads(gzip.decompress(path.read_bytes()))
    made = Counter(event["name"] for event in trace["traceEvents"] if event.get("cat") == "cpu_op")
    kinds = measured.gpus[0].spans["kind"]
    # An expert's group has three products, a dense part's four, the head one: see small_model.
    assert made["aten::mm"] == 3 * sum(kinds == EXPERT) + 4 * sum(kinds == DENSE) + sum(kinds == HEAD)
    assert "traceName" not in trace  # a path on this machine


def test_a_slot_with_other_bytes_is_noticed(shared: Shared) -> None:
    execution = Execution([CpuDevice()], small_inputs(), shared)
    execution.run()
    (part,) = execution.parts
    expert, slot = next(iter(part.plan.resident.items()))
    part.slots[slot][-1] ^= 1
    assert not part.holds_right_bytes(expert, slot)


def test_slots_never_exceed_the_budget_and_no_two_residents_share_one() -> None:
    for sections in VARIANTS.values():
        inputs = small_inputs(**sections)
        plan = make_plan(inputs)
        assert plan.slots <= inputs.budget_bytes // EXPERT_BYTES
        assert len(set(plan.resident.values())) == len(plan.resident)


def test_a_copy_into_a_used_slot_waits_for_its_last_reader_and_a_first_use_for_its_copy() -> None:
    plan = make_plan(small_inputs())
    in_slot: dict[int, int] = {}  # slot -> the entry of its last reader
    used: set[int] = set()
    for number, entry in enumerate(plan.entries):
        if entry.kind in (DEMAND, PREFETCH):
            reader = in_slot.pop(entry.slot, -1)
            assert entry.waits == (() if reader < 0 else (reader,))
        elif entry.kind == EXPERT:
            assert bool(entry.waits) == (entry.copy not in used)
            used.add(entry.copy)
            in_slot[entry.slot] = number


def test_a_plan_pads_decode_steps_in_graphs_and_computes_the_head_for_one_position_of_a_prompt() -> None:
    # Five tokens of a prompt, then one; another sequence alike beside it. All choose both experts.
    phase, sequence = np.array([0, 0, 0, 0, 0, 1] * 3, np.uint8), np.repeat(np.arange(3, dtype=np.int32), 6)
    trace = RoutingTrace(np.tile(np.array([0, 1], np.uint8), (18, LAYERS, 1)), EXPERTS, phase=phase, sequence=sequence)
    scenario = tiny_scenario(workload={"batch": 3, "prefill": "whole"}, dispatch={"mode": "graph"})
    plan = make_plan(tiny_inputs(small_model(), tiny_profile(), trace, scenario))
    tokens = {kind: [entry.tokens for entry in plan.entries if entry.kind == kind] for kind in (DENSE, EXPERT, HEAD)}
    assert tokens[DENSE] == [5] * 3 * LAYERS + [4] * LAYERS
    assert tokens[EXPERT] == [5] * 3 * 2 * LAYERS + [4] * 2 * LAYERS
    assert tokens[HEAD] == [1, 1, 1, 4]


class Synchronous(Stage):
    """The host waits for the kernels of every layer."""

    def serve(self, rows: Rows, visit: Visit, phase: int) -> None:
        super().serve(rows, visit, phase)
        rows.add(Op.OUTPUT, self.gpu.number, register=self.gpu.register(OUTPUT))
        rows.add(Op.HOLD, self.gpu.number, register=self.gpu.register(OUTPUT))


@pytest.mark.parametrize("discipline", ["fifo", "priority"])
def test_a_dispatch_pattern_is_executed_as_its_commands_say(discipline: str, shared: Shared) -> None:
    # The host waits for the last kernel of each layer, behind the prefetches that it has ordered meanwhile.
    with patch.object(calibration_planner, "Stage", Synchronous), patch.object(runs, "Stage", Synchronous):
        inputs = small_inputs(copy={"discipline": discipline}, dispatch={"mode": "eager", "router_readback": False})
        entries = make_plan(inputs).entries
        waits = [(number, other) for number, entry in enumerate(entries) for _, other in entry.host_waits]
        assert len(waits) == LAYERS * 12
        assert all(entries[other].kind == EXPERT and entries[other].visit == entries[at].visit for at, other in waits)
        (timeline,) = execute([CpuDevice()], inputs, "synchronous", shared, repeats=1).timelines()
        (simulated,) = run_all(inputs, prepared(inputs, part_costs(inputs)), engine="simpy")
    kernels = [
        [(span["kind"], span["visit"], span["expert"]) for span in spans if span["kind"] in (DENSE, EXPERT, HEAD)]
        for spans in (np.sort(timeline.spans(), order="start_ns"), np.sort(simulated.spans, order="start_ns"))
    ]
    assert kernels[0] == kernels[1]


def test_a_command_that_no_cuda_call_stands_for_is_refused_by_its_name() -> None:
    (planner,) = make_planners(small_inputs())
    with pytest.raises(ExecutionError, match=r"command IDLE: no CUDA call is made for it \(execution on a GPU\)"):
        planner.carry_out(Command(Op.IDLE, *([-1] * 10)))


def test_counts_are_those_of_the_manager() -> None:
    plan = make_plan(small_inputs())
    counts = decision_counts(plan.visits, plan.manager)
    kinds = Counter(entry.kind for entry in plan.entries)
    assert (kinds[DEMAND], kinds[PREFETCH]) == (counts["miss"], counts["prefetch"])
    assert counts["found"] + counts["miss"] == kinds[EXPERT]


def test_graphs_run_at_the_next_power_of_two_of_tokens() -> None:
    batch = {"batch": 3, "trace": "none"}
    eager = make_plan(small_inputs(workload=batch))
    graph = make_plan(small_inputs(workload=batch, dispatch={"mode": "graph"}))
    for exact, bucket in zip(eager.entries, graph.entries, strict=True):
        assert bucket.tokens in (0, 1, 2, 4) and bucket.tokens // 2 < exact.tokens + (not exact.tokens) <= 4
        assert exact.tokens <= bucket.tokens


def test_a_measured_file_gives_the_run_back(tmp_path: Path, shared: Shared) -> None:
    measured = execute([CpuDevice()], small_inputs(), "again", shared, repeats=3, keep_all=True)
    for name in ("run.json", "run.json.gz"):
        measured.save(tmp_path / name)
        again = load_measured(tmp_path / name)
        assert again.makespans_ns == measured.makespans_ns and again.scenario == measured.scenario
        (gpu,) = again.gpus
        assert len(gpu.repeats) == 3 and again.makespan_ns == sorted(measured.makespans_ns)[1]
        assert [makespan_ns([gpu.spans], [times]) for times in gpu.repeats] == list(measured.makespans_ns)
        np.testing.assert_array_equal(again.timelines()[0].spans(), measured.timelines()[0].spans())


@pytest.mark.parametrize(
    ("content", "says"), [("{}", "format = None: must be"), ('{"format": "x"}', "format"), ("[", "JSON")]
)
def test_a_file_that_is_no_measured_run_is_refused(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(MeasuredError, match=rf"bad\.json.*{says}"):
        load_measured(tmp_path / "bad.json")


def test_the_timeline_has_its_causes_before_its_effects(shared: Shared) -> None:
    (timeline,) = execute([CpuDevice()], small_inputs(), "causes", shared, repeats=1).timelines()
    spans = timeline.spans()
    copy_end = {int(span["copy"]): int(span["end_ns"]) for span in spans if span["kind"] in (DEMAND, PREFETCH)}
    assert (spans["end_ns"] >= spans["start_ns"]).all()
    assert all(copy_end[int(span["copy"])] <= span["start_ns"] for span in spans if span["kind"] == EXPERT)
    assert (spans["kind"] == READBACK).sum() == 12 * LAYERS


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"dispatch": {"mode": "free"}}, "eager or graph"),
        ({"copy": {"discipline": "priority", "drop_stale": True}}, "drop_stale"),
        ({"prefetch": {"issued_by": "gpu"}}, "issued_by"),
        ({"miss": {"policy": "low_precision"}}, "miss.policy"),
        ({"compression": {"mixed": [[1.0, 0.5]]}}, r"\[compression\]"),
        ({"parallel": {"gpus": 3, "dispatch_threads": "one"}}, "parallel.gpus = 3"),
        ({"parallel": {"gpus": 2}}, "parallel.dispatch_threads = 'per-gpu'"),
        ({"prefetch": {"policy": "adaptive-link", "lookahead": 1}}, "prefetch.policy = 'adaptive-link' decides by"),
    ],
)
def test_what_cannot_be_executed_is_refused_by_its_key(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(ExecutionError, match=says):
        make_plan(small_inputs(**sections))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"expert_dtype": "mxfp4"},
            "model small: expert_dtype = 'mxfp4': only float32, bfloat16, float16 can be executed",
        ),
        ({"dense_dtype": "int8"}, "model small: dense_dtype = 'int8': only"),
        ({"expert_bytes": (100,) * LAYERS}, "model small: 100 bytes an expert do not hold its matrices"),
    ],
)
def test_a_model_whose_products_cannot_be_made_is_refused_before_anything_runs(
    change: dict[str, Any], says: str
) -> None:
    with pytest.raises(ExecutionError, match=says):
        make_plan(small_inputs(replace(small_model(), **change)))


def test_all_reasons_of_a_scenario_are_named_at_once() -> None:
    with pytest.raises(ExecutionError, match=r"drop_stale.*miss\.policy.*dense_dtype = 'int8'"):
        make_plan(
            small_inputs(
                replace(small_model(), dense_dtype="int8"),
                copy={"discipline": "priority", "drop_stale": True},
                miss={"policy": "skip"},
            )
        )


def test_of_a_set_all_that_cannot_be_executed_are_named_before_the_first_runs() -> None:
    few = ["workload.synthetic.tokens=2", "workload.synthetic.sequences=1", "workload.synthetic.prefill_tokens=0"]
    few += ["model.layers=1", "memory.gpu_budget=50%"]
    chosen = {
        "fine": load_scenario("synthetic", [*few, "model.preset=olmoe-1b-7b"]),
        "four-bits": load_scenario("synthetic", [*few, "model.preset=gpt-oss-20b"]),
        "clocked": load_scenario("synthetic", [*few, "model.preset=olmoe-1b-7b", "prefetch.policy=cost-aware"]),
        "nowhere": load_scenario("synthetic", [*few, "model.preset=olmoe-1b-7b", "machine.profile=nowhere"]),
    }
    with pytest.raises(ExecutionError) as caught:
        execute_all(chosen)  # no run is asked for
    says = str(caught.value)
    assert says.startswith("3 of 4 scenarios cannot be executed, and none was: four-bits: model gpt-oss-20b: ")
    assert "; clocked: prefetch.policy = 'cost-aware' decides by the clock" in says
    assert "; nowhere: machine.profile = 'nowhere'" in says
    assert "fine" not in says
    assert list(load_executable({"fine": chosen["fine"]})) == ["fine"]
    with pytest.raises(ProfileError, match="nowhere"):
        load_executable({"nowhere": chosen["nowhere"]})


def test_an_execution_that_is_refused_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs"
    words = ["calibrate", "execute", "guide", "speed", "-o", str(out), "--set", "dispatch.mode=free"]
    monkeypatch.setattr("sys.argv", ["prestage", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "2 of 2 scenarios cannot be executed, and none was: guide: dispatch.mode" in capsys.readouterr().err
    assert not out.exists()


def test_of_a_set_all_that_have_no_room_on_the_gpu_are_named() -> None:
    device = CpuDevice()
    device.free_bytes = lambda: 8 * EXPERT_BYTES
    nine, eight = small_inputs(), small_inputs(memory={"gpu_budget": "8experts"})
    # A budget for more experts than are ever used takes no more room than these.
    workload = {"trace": "none", "tokens": 1, "prefill": "skip"}
    one = small_inputs(memory={"gpu_budget": "12experts"}, prefetch={"lookahead": 0}, workload=workload)
    check_room([device], {"eight": eight, "one": one})
    with pytest.raises(CudaError, match=r"2 of 4 scenarios .*: nine: memory.*; again: memory"):
        check_room([device], {"nine": nine, "eight": eight, "one": one, "again": nine})


def test_two_scenarios_of_one_name_are_refused(tmp_path: Path) -> None:
    files = [tmp_path / folder / "mine.toml" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_text("seed = 1\n[workload.synthetic]\ntokens = 2\n", encoding="utf-8")
    with pytest.raises(ScenarioError, match=r"b/mine\.toml: another scenario is called 'mine', and their files"):
        chosen_scenarios([str(file) for file in files])


def test_a_group_has_as_many_kernels_as_the_model_says() -> None:
    model = small_model()
    workload = Workload(
        CpuDevice(), model, torch.zeros(2, EXPERT_BYTES, dtype=torch.uint8), most_tokens=4, graphs=False
    )
    assert (len(workload.dense(0, 2)), len(workload.expert(1, 2)), len(workload.head(2))) == (7, 5, 1)


def test_more_experts_than_the_gpu_holds_are_refused_by_the_budgets_key(shared: Shared) -> None:
    device = CpuDevice()
    device.free_bytes = lambda: 9 * EXPERT_BYTES - 1
    with pytest.raises(CudaError, match=r"memory\.gpu_budget = '9experts'"):
        Execution([device], small_inputs(), shared)


def test_without_a_gpu_one_line_names_the_shipped_profiles() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(CudaError, match=r"no CUDA GPU.*h200.*rtx3090"):
        Gpu()


def test_a_set_and_its_scenarios_have_names_and_are_not_changed() -> None:
    assert len(chosen_scenarios(["validation"])) == len(scenarios("validation"))
    assert list(chosen_scenarios(["qwen-graph-ahead0", "guide"])) == ["qwen-graph-ahead0", "guide"]
    with pytest.raises(ScenarioError, match="--set 'seed=1'"):
        chosen_scenarios(["qwen-graph-ahead0"], ["seed=1"])


def test_a_run_stays_on_one_core_and_leaves_it_again() -> None:
    cores = Cores()
    with cores.quietest():
        assert not cores.can_pin or len(os.sched_getaffinity(0)) == 1
        assert cores.slowdown() > 0
    assert not cores.can_pin or sorted(os.sched_getaffinity(0)) == cores.numbers


class Scripted(Cores):
    """Cores that are as slow as they are told."""

    def __init__(self, *slowdowns: float) -> None:
        super().__init__()
        self._slowdowns = iter(slowdowns)

    def slowdown(self) -> float:
        return next(self._slowdowns)


@pytest.mark.parametrize(
    ("slowdowns", "disturbed"),
    [((1.0, 1.0), 0), ((1.0, 1.5, 1.6, 1.1), 2), ((1.4, 1.3, 1.2, 1.0, 1.9, 1.8, 1.7, 1.6), 6)],
)
def test_repeats_on_a_disturbed_core_do_not_count_unless_there_are_no_others(
    slowdowns: tuple[float, ...], disturbed: int, shared: Shared
) -> None:
    execution = Execution([CpuDevice()], small_inputs(), shared)
    times, others = undisturbed(execution, 2, Scripted(*slowdowns))
    assert (len(times), others) == (2, disturbed)
