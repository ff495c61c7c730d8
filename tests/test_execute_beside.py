"""Executions with threads beside the host's, and on kernels of other kinds: all but the CUDA calls, as in test_execute.

The CPU computes experts, a real file is read, compressed experts are decompressed, experts of unequal sizes have slots,
a predictor runs; what each leaves behind is compared with what the host's memory holds.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_device import CpuDevice
from test_execute import EXPERT_BYTES, EXPERTS, FF, HIDDEN, LAYERS, _Spans, small_inputs, small_model
from tiny import ASSUMED, tiny_pipeline, tiny_profile, tiny_scenario

from prestage.calibration.device.cuda import CudaError, expert_matrices
from prestage.calibration.executor.entries import ExecutionError
from prestage.calibration.executor.execute import Execution, execute
from prestage.calibration.executor.measured import load_measured
from prestage.calibration.executor.plan import make_plan
from prestage.calibration.executor.shared import Shared
from prestage.calibration.executor.unpack import packed_bytes
from prestage.engine.costs.costs import part_costs
from prestage.engine.run import prepared, run_all
from prestage.engine.scenario.inputs import Inputs
from prestage.resources.profile import NvmeCosts
from prestage.resources.profile_costs import CpuExpertPoint, TransferCost
from prestage.resources.timeline import CPU_EXPERT, DECOMPRESS, EXPERT, GUESSES, KINDS, PREDICT, READ

CPU = {"policy": "cpu", "cpu_threads": 2}
HALF = {"where": "host", "ratio": 0.51, "decompress_gb_per_s": 100}
DRIVE = {"host_budget": "10experts", "io_lanes": 2}
PREDICTOR = {"recall": 0.7, "latency_us": 20.0}

VARIANTS: dict[str, dict[str, Any]] = {
    "CPU": {"miss": CPU, "prefetch": {"lookahead": 0}},
    "CPU and prefetches": {"miss": CPU},
    "CPU in graphs, no read-back": {"miss": CPU, "dispatch": {"mode": "graph", "router_readback": False}},
    "CPU, whichever is shorter": {"miss": {**CPU, "policy": "cost"}},
    "CPU, balanced": {"miss": {**CPU, "policy": "balanced"}, "workload": {"batch": 3, "trace": "none"}},
    "CPU, layers preloaded": {"miss": CPU, "memory": {"gpu_budget": "12experts", "preload": "layers", "cpu_layers": 1}},
    "drive": {"tiers": DRIVE},
    "drive, in pieces": {"tiers": {**DRIVE, "chunk_bytes": 4096, "io_lanes": 3}},
    "drive, prefetch to host memory": {"tiers": {**DRIVE, "prefetch": "host"}},
    "drive, no prefetch": {"tiers": {**DRIVE, "io_lanes": 1}, "prefetch": {"lookahead": 0}},
    "drive and CPU": {"tiers": DRIVE, "miss": CPU},
    "compressed in host memory": {"compression": {**HALF, "lane": "compute"}},
    "compressed in host memory, aside": {"compression": HALF},
    "compressed on the GPU": {"compression": {**HALF, "where": "gpu", "lane": "compute"}},
    "compressed on the GPU, aside": {"compression": {**HALF, "where": "gpu"}},
    "grouped": {"dispatch": {"mode": "graph", "expert_kernel": "grouped"}, "workload": {"batch": 3, "trace": "none"}},
    "predictor": {"predictor": PREDICTOR},
    "predictor in graphs": {"predictor": PREDICTOR, "dispatch": {"mode": "graph"}},
    "predictor on the compute stream": {"predictor": {**PREDICTOR, "lane": "compute"}},
    "preloaded": {"memory": {"gpu_budget": "9experts", "preload": "popular"}},
}


def model_of(variant: str) -> Any:
    """The small model, in bfloat16 where experts are compressed."""
    model = small_model()
    if "compressed" in variant:
        model = replace(model, name="small16", expert_dtype="bfloat16", expert_bytes=(EXPERT_BYTES // 2,) * LAYERS)
    return model


def inputs_of(variant: str) -> Inputs:
    """Inputs on a machine that has a drive, and a CPU that was measured."""
    point = CpuExpertPoint(
        hidden=HIDDEN, expert_ff=FF, dtype="float32", tokens=1, threads=2, ns=50, beside_copy_ns=50, **ASSUMED
    )
    profile = tiny_profile()
    read = TransferCost(latency_ns=10, bytes_per_second=10**9, **ASSUMED)
    profile = profile.model_copy(
        update={
            "nvme": NvmeCosts(read=read, lanes=2),
            "compute": profile.compute.model_copy(update={"cpu_experts": (point,)}),
        }
    )
    sections = VARIANTS[variant]
    inputs: Inputs = replace(small_inputs(model_of(variant), **sections), profile=profile)
    return inputs


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    drive = tmp_path_factory.mktemp("drive") / "experts"
    pool = Shared(CpuDevice(), LAYERS * EXPERTS * 8192, drive=drive)
    yield pool
    pool.close()
    assert not drive.exists()


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_execution_makes_the_spans_that_its_simulation_makes(variant: str, shared: Shared, tmp_path: Path) -> None:
    inputs = inputs_of(variant)
    measured = execute([CpuDevice()], inputs, variant, shared, repeats=2)
    (simulated,) = run_all(inputs, prepared(inputs, part_costs(inputs)))
    (timeline,) = measured.timelines()
    wanted, made = (
        Counter((KINDS[span["kind"]], span["visit"], span["expert"], span["copy"]) for span in spans.tolist_named())
        for spans in (_Spans(simulated.spans), _Spans(timeline.spans()))
    )
    assert made == wanted
    (gpu,) = measured.gpus
    assert gpu.counts["evict"] == simulated.manager.evicted
    assert gpu.counts.get("cpu", 0) == made_of(wanted, "cpu_expert")
    measured.save(tmp_path / "run.json.gz")
    (again,) = load_measured(tmp_path / "run.json.gz").timelines()
    np.testing.assert_array_equal(again.spans(), timeline.spans())


def made_of(spans: Counter[Any], kind: str) -> int:
    return sum(count for span, count in spans.items() if span[0] == kind)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_expert_computes_with_its_own_weights_wherever_it_lies(variant: str, shared: Shared) -> None:
    inputs = inputs_of(variant)
    execution = Execution([CpuDevice()], inputs, shared)
    (part,) = execution.parts
    model = inputs.model
    host = shared.buffers([size for size in model.expert_bytes for _ in range(model.experts)])
    seen = []

    def wanted(expert: int, x: torch.Tensor) -> torch.Tensor:
        weights = host[expert]
        if "compressed" in variant:
            count = len(weights) // 2
            values = weights[:count].view(torch.int8).float().view(-1, 128)
            scales = weights[count : packed_bytes(len(weights))].view(torch.bfloat16).float()
            weights = (values * scales.view(-1, 1)).bfloat16().view(-1).view(torch.uint8)
        first, second, last = expert_matrices(model, weights)
        made: torch.Tensor = ((x @ first.t()).relu() * (x @ second.t())) @ last.t()
        return made

    def check(entry: Any) -> None:
        if entry.members:
            assert part.grouped is not None
            for member, (slot, tokens) in enumerate(entry.members):
                (expert,) = (one for one in range(len(host)) if same_bytes(part.slots[slot], host[one]))
                found = part.grouped.outputs[member, :tokens]
                torch.testing.assert_close(found, wanted(expert, part.workload.inputs[:tokens]))
            seen.append(entry.expert)
            return
        found = part.workload.output[: entry.tokens]
        torch.testing.assert_close(found, wanted(entry.expert, part.workload.inputs[: entry.tokens]))
        seen.append(entry.expert)

    def check_cpu(experts: list[int], tokens: list[int]) -> None:
        x = part.beside.tokens.view(torch.float32)
        sums = torch.zeros(max(tokens), HIDDEN)
        for expert, count in zip(experts, tokens, strict=True):
            sums[:count] += wanted(expert, x[:count])
        torch.testing.assert_close(part.beside.results.view(torch.float32)[: max(tokens)], sums, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(part._results[: max(tokens)], sums, rtol=1e-4, atol=1e-4)
        seen.extend(experts)

    cpu: list[Any] = []
    for entry, step in zip(part.plan.entries, part._stamp_of, strict=True):
        if entry.kind == EXPERT:
            part.program[step] += ((check, (entry,)),)
        elif entry.kind == CPU_EXPERT:
            cpu.append(entry)
        elif entry.lane == "back":
            part.program[step] += ((check_cpu, ([one.expert for one in cpu], [one.tokens for one in cpu])),)
            cpu = []
    execution.run()
    assert Counter(seen) == Counter(entry.expert for entry in part.plan.entries if entry.kind in (EXPERT, CPU_EXPERT))
    assert all(part.holds_right_bytes(expert, slot) for expert, slot in part.plan.resident.items())


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one[: len(other)] == other).all())


@pytest.mark.parametrize("discipline", ["fifo", "two_streams"])
def test_experts_of_unequal_sizes_have_slots_of_the_largest_and_come_whole(discipline: str, shared: Shared) -> None:
    sizes = (EXPERT_BYTES, EXPERT_BYTES + 1000, EXPERT_BYTES + 1500)
    model = replace(small_model(), name="unequal", expert_bytes=sizes)
    inputs = small_inputs(model, memory={"gpu_budget": f"{7 * EXPERT_BYTES}B"}, copy={"discipline": discipline})
    execution = Execution([CpuDevice()], inputs, shared)
    (part,) = execution.parts
    assert part.slots.shape[1] == max(sizes)
    execution.run()
    assert all(part.holds_right_bytes(expert, slot) for expert, slot in part.plan.resident.items())
    (simulated,) = run_all(inputs, prepared(inputs, part_costs(inputs)))
    assert len(part.plan.entries) == len(_Spans(simulated.spans).spans)
    copies = [entry for entry in part.plan.entries if entry.copy >= 0 and entry.kind in (3, 4)]
    assert len(copies) > part.plan.slots  # slots are used again


def test_a_budget_that_the_kv_cache_shrinks_is_kept(shared: Shared) -> None:
    model = replace(small_model(), kv_bytes_per_token=EXPERT_BYTES // 2)
    memory = {"gpu_budget": "100%", "total_bytes": f"{14 * EXPERT_BYTES + sum(model.dense_bytes) + model.head_bytes}B"}
    small = small_inputs(model)
    scenario = tiny_scenario(memory=memory, predictor={"recall": 0.7}, dispatch={"mode": "eager"})
    inputs = tiny_pipeline(model, small.profile, small.trace, scenario)
    assert inputs.budgets is not None and len(set(inputs.budgets)) > 1
    measured = execute([CpuDevice()], inputs, "total", shared, repeats=1)
    (simulated,) = run_all(inputs, prepared(inputs, part_costs(inputs)))
    assert measured.gpus[0].counts["evict"] == simulated.manager.evicted
    assert make_plan(inputs).slots <= -(-max(inputs.budgets) // EXPERT_BYTES)


def test_the_threads_that_fail_to_read_end_the_run_with_a_line(shared: Shared) -> None:
    execution = Execution([CpuDevice()], inputs_of("drive"), shared)
    (part,) = execution.parts
    part.beside._requests[3, 0] = 1 << 40  # behind the file's end
    with pytest.raises(CudaError, match="a read from the drive failed"):
        execution.run()


def test_a_drive_without_a_file_is_named() -> None:
    pool = Shared(CpuDevice(), LAYERS * EXPERTS * 8192)
    with pytest.raises(CudaError, match=r"tiers\.host_budget.*--drive FILE"):
        Execution([CpuDevice()], inputs_of("drive"), pool)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"dispatch": {"mode": "eager", "expert_kernel": "grouped"}}, "only as a graph"),
        ({"miss": CPU, "copy": {"discipline": "two_streams"}}, "copies from the host in one stream"),
        ({"miss": {"policy": "skip"}}, "miss.policy = 'skip': choose fetch, cpu, cost, balanced"),
        ({"predictor": {"latency_us": 3.0, "lane": "host"}}, "predictor.lane = 'host'"),
        ({"compression": {**HALF, "ratio": 0.5}}, "compression.ratio = 0.5"),
    ],
)
def test_what_none_of_these_can_do_is_refused_by_its_key(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(ExecutionError, match=says):
        make_plan(replace(inputs_of("predictor"), scenario=small_inputs(**sections).scenario))


def test_a_thread_beside_waits_for_a_signal_of_every_stream_that_it_depends_on() -> None:
    entries = make_plan(inputs_of("drive and CPU")).entries
    reads = [entry for entry in entries if entry.kind == READ]
    assert any(entry.waits for entry in reads)
    for entry in entries:
        if entry.kind in (READ, CPU_EXPERT):
            for other in entry.waits:
                assert entries[other].signals or entries[other].kind in (READ, CPU_EXPERT)


def test_guesses_are_read_back_behind_the_predictor_and_waited_for() -> None:
    entries = make_plan(inputs_of("predictor")).entries
    for number, entry in enumerate(entries):
        if entry.kind == GUESSES:
            assert entries[number - 1].kind == PREDICT and entry.host_waits == ((0, number),)
    assert sum(entry.kind == GUESSES for entry in entries) > 0
    aside = {
        entry.lane for entry in make_plan(inputs_of("compressed on the GPU, aside")).entries if entry.kind == DECOMPRESS
    }
    assert aside == {"aside0", "aside1", "aside2", "aside3"}
