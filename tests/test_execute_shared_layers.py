"""Executions on two GPUs that share the experts of every layer, all but the CUDA calls, as in test_two_gpus."""

from collections import Counter
from typing import Any

import pytest
import torch
from cpu_device import CpuDevice
from test_execute import EXPERT_BYTES, EXPERTS, LAYERS, small_model
from test_two_gpus import gpus, without_host
from tiny import tiny_pipeline, tiny_profile, tiny_scenario

from prestage.calibration.device.cuda import expert_matrices
from prestage.calibration.executor.execute import Execution, execute
from prestage.calibration.executor.plan import make_plans
from prestage.calibration.executor.shared import Shared
from prestage.engine.costs.costs import part_costs
from prestage.engine.run import prepared, run_all
from prestage.engine.scenario.inputs import Inputs
from prestage.resources.timeline import COMBINE, DISPATCH, EXPERT, KINDS, PEER
from prestage.workloads.synthetic import synthesize

SPARE = {"spare_bytes": f"{2 * EXPERT_BYTES}B"}

VARIANTS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "tokens, eager": {"dispatch": {"mode": "eager"}},
    "tokens, prefetch": {"prefetch": {"lookahead": 1}, "memory": {"gpu_budget": "6experts"}},
    "tokens, one sequence": {"workload": {"batch": 1, "trace": "none"}},
    "peer": {"parallel": {"remote": "peer"}},
    "peer, prefetch": {"parallel": {"remote": "peer"}, "prefetch": {"lookahead": 1}},
    "host": {"parallel": {"remote": "host"}},
    "cost": {"parallel": {"remote": "cost"}},
    "spare memory": {"parallel": SPARE, "memory": {"gpu_budget": "3experts"}},
    "waves": {"memory": {"gpu_budget": "1experts"}},
}


def shared_layers(**sections: Any) -> Inputs:
    """Two GPUs, over four sequences."""
    trace = synthesize(24, LAYERS, EXPERTS, 2, skew=0.3, working_set=EXPERTS, reuse=0.3, sequences=4, seed=4)
    chosen = {
        "workload": {"batch": 4, "trace": "none"},
        "memory": {"gpu_budget": "5experts"},
        "predictor": {"recall": 0.7},
        "prefetch": {"lookahead": 0},
        "dispatch": {"mode": "graph"},
    } | {name: keys for name, keys in sections.items() if name != "parallel"}
    parallel = {"gpus": 2, "dispatch_threads": "one"} | sections.get("parallel", {})
    scenario = tiny_scenario(**chosen, parallel=parallel)
    inputs: Inputs = tiny_pipeline(small_model(), tiny_profile(gpus=2, peer_latency_ns=5), trace, scenario)
    return inputs


@pytest.fixture(scope="module")
def shared() -> Shared:
    return Shared(CpuDevice(), LAYERS * EXPERTS * 8192)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_gpu_makes_the_spans_that_its_simulation_makes(variant: str, shared: Shared) -> None:
    expect_the_spans_of_both(gpus(), variant, shared)


def expect_the_spans_of_both(devices: list[Any], variant: str, shared: Shared) -> None:
    """Execute a variant on two devices, and assert that they make the copies and kernels that its simulation makes."""
    inputs = shared_layers(**VARIANTS[variant])
    measured = execute(devices, inputs, variant, shared, repeats=2)
    simulated = run_all(inputs, prepared(inputs, part_costs(inputs)))
    wanted: Counter[Any] = Counter()
    made: Counter[Any] = Counter()
    for timeline, gpu, recording in zip(measured.timelines(), measured.gpus, simulated, strict=True):
        for spans, into in ((recording.spans, wanted), (timeline.spans(), made)):
            into.update(
                (KINDS[span["kind"]], int(span["visit"]), int(span["expert"]), int(span["copy"]))
                for span in without_host(spans)
            )
        assert gpu.counts["evict"] == recording.manager.evicted
    assert made == wanted  # what one GPU stores in another's memory is on the timeline of either


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_expert_of_both_gpus_computes_with_its_own_weights(variant: str, shared: Shared) -> None:
    execution = Execution(gpus(), shared_layers(**VARIANTS[variant]), shared)
    host = shared.buffers([EXPERT_BYTES] * LAYERS * EXPERTS)
    seen = 0
    for part in execution.parts:

        def check(expert: int, tokens: int, part: Any = part) -> None:
            nonlocal seen
            first, second, last = expert_matrices(small_model(), host[expert])
            x = part.workload.inputs[:tokens]
            wanted = ((x @ first.t()).relu() * (x @ second.t())) @ last.t()
            torch.testing.assert_close(part.workload.output[:tokens], wanted)
            seen += 1

        for entry, step in zip(part.plan.entries, part._stamp_of, strict=True):
            if entry.kind == EXPERT:
                part.program[step] += ((check, (entry.expert, entry.tokens)),)
    execution.run()
    assert seen == sum(entry.kind == EXPERT for part in execution.parts for entry in part.plan.entries) > 0
    for part in execution.parts:
        assert all(part.holds_right_bytes(expert, slot) for expert, slot in part.plan.resident.items())


def test_an_exchange_begins_when_the_last_of_both_gpus_has_ended_and_is_called_for_on_both_at_once() -> None:
    plans = make_plans(shared_layers())
    exchanges = [[entry for entry in plan.entries if entry.kind in (DISPATCH, COMBINE)] for plan in plans]
    assert len(exchanges[0]) == len(exchanges[1]) > 0
    for one, other in zip(*exchanges, strict=True):
        assert (one.kind, one.visit) == (other.kind, other.visit)
        assert [(0, wait) for wait in one.waits] + [*one.others] == [*other.others] + [
            (1, wait) for wait in other.waits
        ]
    # A token that went there comes back: as many bytes as went the other way.
    for number, of_gpu in enumerate(exchanges):
        sent = {entry.visit: entry.size_bytes for entry in exchanges[1 - number] if entry.kind == DISPATCH}
        assert all(entry.size_bytes == sent[entry.visit] for entry in of_gpu if entry.kind == COMBINE)


@pytest.mark.parametrize("variant", ["peer", "spare memory"])
def test_experts_go_from_one_gpu_to_the_other(variant: str) -> None:
    plans = make_plans(shared_layers(**VARIANTS[variant]))
    lanes = Counter(entry.lane for plan in plans for entry in plan.entries if entry.kind == PEER)
    assert set(lanes) == ({"fetch"} if variant == "peer" else {"fetch", "store"})
