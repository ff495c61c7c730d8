"""Executions on several GPUs, all but the CUDA calls: devices on the CPU stand for the GPUs, as in test_execute.

Order, waits and what passes between the GPUs are those of a run on real ones; a wait for an event that is not recorded
yet fails here, where CUDA would go on without a word.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_device import CpuDevice, CpuEvent, CpuStream
from test_execute import EXPERT_BYTES, EXPERTS, LAYERS, small_inputs, small_model
from tiny import tiny_pipeline, tiny_profile, tiny_scenario

from prestage.calibration.device.clocks import Clocks
from prestage.calibration.device.cuda import CudaError, expert_matrices
from prestage.calibration.executor.entries import ExecutionError
from prestage.calibration.executor.execute import Execution, execute, gpus_needed
from prestage.calibration.executor.measured import load_measured
from prestage.calibration.executor.plan import make_plans
from prestage.calibration.executor.shared import Shared
from prestage.engine.costs.costs import part_costs
from prestage.engine.costs.uncertainty import linked, replicate_costs
from prestage.engine.loading.stages import with_profile
from prestage.engine.run import prepared, run_all
from prestage.engine.scenario.inputs import Inputs
from prestage.resources.profile_costs import TransferCost
from prestage.resources.timeline import ACTIVATION, DENSE, EXPERT, HEAD, KINDS, LAUNCH
from prestage.workloads.synthetic import synthesize

TOKENS = 24


def staged(**sections: Any) -> Inputs:
    """A pipeline of two stages, of two layers and of one, over four sequences in two micro-batches."""
    trace = synthesize(TOKENS, LAYERS, EXPERTS, 2, skew=0.3, working_set=EXPERTS, reuse=0.3, sequences=4, seed=4)
    chosen = {
        "workload": {"batch": 4, "trace": "none"},
        "memory": {"gpu_budget": "5experts"},
        "predictor": {"recall": 0.7},
        "dispatch": {"mode": "graph"},
    } | {name: keys for name, keys in sections.items() if name != "parallel"}
    parallel = {"stages": 2, "split": [2, 1], "micro_batches": 2, "dispatch_threads": "one"}
    scenario = tiny_scenario(**chosen, parallel=parallel | sections.get("parallel", {}))
    inputs: Inputs = tiny_pipeline(small_model(), tiny_profile(gpus=2, peer_latency_ns=5), trace, scenario)
    return inputs


VARIANTS: dict[str, dict[str, Any]] = {
    "two micro-batches": {},
    "one micro-batch": {"parallel": {"micro_batches": 1}},
    "four micro-batches": {"parallel": {"micro_batches": 4}},
    "no read-back": {"dispatch": {"mode": "graph", "router_readback": False}},
    "eager": {"dispatch": {"mode": "eager"}},
    "prefetch": {"prefetch": {"lookahead": 1}},
    "a thread each": {"parallel": {"dispatch_threads": "per-gpu"}},
    "waves": {"memory": {"gpu_budget": "2experts"}},
}


@pytest.fixture(scope="module")
def shared() -> Shared:
    return Shared(CpuDevice(), LAYERS * EXPERTS * EXPERT_BYTES)


def gpus() -> list[CpuDevice]:
    return [CpuDevice(0), CpuDevice(1)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_stage_makes_the_spans_that_its_simulation_makes(variant: str, shared: Shared) -> None:
    inputs = staged(**VARIANTS[variant])
    measured = execute(gpus(), inputs, variant, shared, repeats=2)
    simulated = run_all(inputs, prepared(inputs, part_costs(inputs)))
    for timeline, gpu, recording in zip(measured.timelines(), measured.gpus, simulated, strict=True):
        wanted, made = (
            Counter((KINDS[span["kind"]], int(span["visit"]), int(span["expert"]), int(span["copy"])) for span in spans)
            for spans in (without_host(recording.spans), without_host(timeline.spans()))
        )
        assert made == wanted
        assert gpu.counts["evict"] == recording.manager.evicted


def without_host(spans: Any) -> Any:
    return spans[spans["kind"] != LAUNCH]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_expert_of_every_stage_computes_with_its_own_weights(variant: str, shared: Shared) -> None:
    inputs = staged(**VARIANTS[variant])
    execution = Execution(gpus(), inputs, shared)
    seen: list[list[int]] = []
    for part, stage in zip(execution.parts, inputs.stages, strict=True):
        host = shared.buffers([EXPERT_BYTES] * stage.model.total_experts)
        here: list[int] = []
        seen.append(here)

        def check(expert: int, tokens: int, part: Any = part, host: Any = host, here: Any = here) -> None:
            first, second, last = expert_matrices(small_model(), host[expert])
            x = part.workload._expert_x[:tokens]
            wanted = ((x @ first.t()).relu() * (x @ second.t())) @ last.t()
            torch.testing.assert_close(part.workload.output[:tokens], wanted)
            here.append(expert)

        for entry, step in zip(part.plan.entries, part._stamp_of, strict=True):
            if entry.kind == EXPERT:
                part.program[step] += ((check, (entry.expert, entry.tokens)),)
    execution.run()
    for part, here in zip(execution.parts, seen, strict=True):
        assert here == [entry.expert for entry in part.plan.entries if entry.kind == EXPERT]
        assert all(part.holds_right_bytes(expert, slot) for expert, slot in part.plan.resident.items())


def test_every_stage_waits_for_what_the_stage_before_has_sent_for_that_step() -> None:
    first, second = make_plans(staged())
    assert [entry.receives for entry in second.entries if entry.kind == DENSE] == list(range(len(second.turns)))
    # Two micro-batches: each goes on from the tokens that it sampled two steps before.
    received = [entry.receives for entry in first.entries if entry.kind == DENSE and entry.layer == 0]
    assert received == [-1, -1, *range(len(received) - 2)]
    for plan, has_head in ((first, False), (second, True)):
        kernels = [number for number, entry in enumerate(plan.entries) if entry.lane == "compute"]
        for number, entry in enumerate(plan.entries):
            if entry.kind == ACTIVATION:
                assert entry.waits == (max(kernel for kernel in kernels if kernel < number),)
        assert any(entry.kind == HEAD for entry in plan.entries) == has_head
    sent = [entry.size_bytes for entry in first.entries if entry.kind == ACTIVATION]
    assert sent == [2 * 16 * 4] * len(first.turns)  # two tokens of 16 numbers in float32


@pytest.mark.parametrize(("threads", "turns"), [("one", ([0, 2, 4], [1, 3, 5])), ("per-gpu", ([0, 1, 2], [0, 1, 2]))])
def test_one_thread_turns_from_stage_to_stage_and_two_stay_each_at_its_own(
    threads: str, turns: tuple[list[int], list[int]]
) -> None:
    plans = make_plans(staged(parallel={"dispatch_threads": threads}))
    for plan, numbers in zip(plans, turns, strict=True):
        assert [turn for turn, _ in plan.turns[:3]] == numbers
        assert plan.turns[-1][1] == len(plan.entries)


def test_experts_may_lie_in_another_gpus_memory() -> None:
    inputs = replace(small_inputs(copy={"source": "peer"}), profile=tiny_profile(gpus=2, peer_latency_ns=5))
    assert gpus_needed(inputs) == 2
    first, second = gpus()
    pool = Shared(first, LAYERS * EXPERTS * EXPERT_BYTES, peer=second)
    measured = execute([first, second], inputs, "peer", pool, repeats=2)
    (timeline,), (gpu,) = measured.timelines(), measured.gpus
    assert measured.gpus_used == 2 and gpu.verified > 0
    (simulated,) = run_all(inputs, prepared(inputs, part_costs(inputs)))
    assert len(without_host(timeline.spans())) == len(without_host(simulated.spans))


def test_a_run_of_two_gpus_comes_back_from_its_file(shared: Shared, tmp_path: Path) -> None:
    measured = execute(gpus(), staged(), "again", shared, repeats=3, keep_all=True)
    measured.save(tmp_path / "run.json.gz")
    again = load_measured(tmp_path / "run.json.gz")
    assert again.makespans_ns == measured.makespans_ns and again.scenario == measured.scenario
    assert again.clocks_within_ns == measured.clocks_within_ns
    for one, other in zip(measured.timelines(), again.timelines(), strict=True):
        np.testing.assert_array_equal(one.spans(), other.spans())


def test_one_thread_is_at_one_gpu_at_a_time_and_its_work_is_on_that_gpus_timeline(shared: Shared) -> None:
    timelines = execute(gpus(), staged(), "host", shared, repeats=1).timelines()
    spans = [timeline.spans()[timeline.spans()["kind"] == LAUNCH] for timeline in timelines]
    assert all(len(mine) for mine in spans)
    together = np.sort(np.concatenate(spans), order="start_ns")
    assert (together["start_ns"][1:] >= together["end_ns"][:-1]).all()


def test_a_thread_that_fails_stops_the_run_and_says_why(shared: Shared) -> None:
    execution = Execution(gpus(), staged(parallel={"dispatch_threads": "per-gpu"}), shared)

    def fail() -> None:
        raise CudaError("the second GPU is gone")

    execution.parts[1].program[0] = ((fail, ()),)
    with pytest.raises(CudaError, match="the second GPU is gone"):
        execution.run()


def test_a_queue_on_the_host_is_refused_in_a_pipeline() -> None:
    with pytest.raises(ExecutionError, match=r"copy\.discipline = 'priority' and parallel\.stages"):
        make_plans(staged(copy={"discipline": "priority"}))


class DriftingDevice(CpuDevice):  # type: ignore[misc]
    """A device whose clock is off against the host's."""

    def __init__(self, index: int, off_ns: int) -> None:
        super().__init__(index)
        self._off_ns = off_ns

    def event(self) -> CpuEvent:
        return _OffEvent(self._off_ns)


class _OffEvent(CpuEvent):  # type: ignore[misc]
    def __init__(self, off_ns: int) -> None:
        super().__init__()
        self._off_ns = off_ns

    def record(self, stream: CpuStream) -> None:
        super().record(stream)
        self.at_ns += self._off_ns


def test_clocks_are_set_against_each_other_within_half_the_way_there_and_back() -> None:
    here, there = DriftingDevice(0, 0), DriftingDevice(1, 7_000_000_000)
    clocks = Clocks([here, there])
    clocks.set()
    events = [here.event(), there.event()]
    for device, event in zip((here, there), events, strict=True):
        event.record(device.stream())
    one_ns, other_ns = (clocks.at_ns(number, event) for number, event in enumerate(events))
    assert 0 < clocks.within_ns < 10**7
    apart_ns = events[1].at_ns - 7_000_000_000 - events[0].at_ns
    assert abs(other_ns - one_ns - apart_ns) <= clocks.within_ns + 1


def test_a_replicate_draws_what_copies_and_exchanges_between_the_gpus_take() -> None:
    inputs = staged()
    peer = inputs.profile.peer
    assert peer is not None and inputs.links is not None
    unsure = {"run_spread": 0.3, "scatter": 0.0, "held_back_error": 0.0}
    queued = TransferCost.model_validate({**peer.queued.model_dump(exclude_none=True), "uncertainty": unsure})
    changed = {"peer": peer.model_copy(update={"queued": queued}), "exchange": queued}
    inputs = with_profile(inputs, inputs.profile.model_copy(update=changed))
    assert inputs.links is not None
    each = zip(*(replicate_costs(part, 3) for part in inputs.parts), strict=True)
    drawn = [linked(inputs, costs, timed=False) for costs in each]
    took = {one.links.peer(0, 1).queued_ns(10**9) for one in drawn if one.links is not None}
    assert len(took) == 3 and inputs.links.peer(0, 1).queued_ns(10**9) not in took
    took = {one.profile.exchange.ns(10**9) for one in drawn if one.profile.exchange is not None}
    assert len(took) == 3 and queued.ns(10**9) not in took
