"""Measured costs of what works beside the host's thread: by hand on a machine of round numbers, in both engines."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from test_execute_beside import inputs_of
from test_execute_shared_layers import shared_layers
from tiny import ASSUMED, run_alike

from prestage.engine.costs.costs import Costs, part_costs
from prestage.engine.loading.stages import with_profile
from prestage.engine.measure.merge import makespan_ns
from prestage.engine.run import prepared, run_all
from prestage.engine.scenario.inputs import Inputs
from prestage.resources.profile import Factor
from prestage.resources.profile_costs import Duration, StreamedKernel, TransferCost
from prestage.resources.timeline import ACTIVATION, COMBINE, CPU_EXPERT, DISPATCH, EXPERT


def on(
    inputs: Inputs, *, host: dict[str, int] | None = None, grouped: bool = False, exchange: bool = False,
    factors: dict[str, float] | None = None,
) -> Inputs:  # fmt: skip
    """The inputs on their machine with more costs measured."""
    profile = inputs.profile
    costs = {name: Duration(ns=ns, **ASSUMED) for name, ns in (host or {}).items()}
    updates: dict[str, Any] = {"host": profile.host.model_copy(update=costs)}
    if grouped:
        kernel = StreamedKernel(constant_ns=1000, bytes_per_second=10**9, beside_copy_factor=1.5, **ASSUMED)
        updates["compute"] = profile.compute.model_copy(update={"grouped": kernel})
    if exchange:
        updates["exchange"] = TransferCost(latency_ns=700, bytes_per_second=10**9, **ASSUMED)
    if factors and profile.contention is not None:
        measured: dict[str, Any] = {name: Factor(factor=factor, **ASSUMED) for name, factor in factors.items()}
        measured["unpacking_leaves"] = Duration(ns=11, **ASSUMED)
        updates["contention"] = profile.contention.model_copy(update=measured)
    return with_profile(inputs, profile.model_copy(update=updates))


def spans_of(inputs: Inputs, engine: str) -> list[Any]:
    recordings = run_all(inputs, prepared(inputs, part_costs(inputs)), engine=engine)
    return [sorted(recording.spans.tolist()) for recording in recordings]


CPU_COSTS = {"cpu_hand_over": 70, "cpu_take_back": 50, "cpu_notice": 400, "cpu_results": 90}
SLOW = {
    "unpacking_beside_kernels": 1.3, "kernels_beside_predictor": 1.6,
    "predictor_beside_kernels": 2.2,
}  # fmt: skip
CASES: dict[str, tuple[Callable[[], Inputs], dict[str, Any]]] = {
    "CPU": (lambda: inputs_of("CPU"), {"host": CPU_COSTS}),
    "CPU and prefetches": (lambda: inputs_of("CPU and prefetches"), {"host": CPU_COSTS}),
    "grouped": (lambda: inputs_of("grouped"), {"grouped": True}),
    "decompression aside": (lambda: inputs_of("compressed in host memory, aside"), {"factors": SLOW}),
    "decompression on the GPU, aside": (lambda: inputs_of("compressed on the GPU, aside"), {"factors": SLOW}),
    "predictor aside": (lambda: inputs_of("predictor in graphs"), {"factors": SLOW}),
    "exchanges": (shared_layers, {"host": {"exchange_call": 130}, "exchange": True}),
    "moves": (lambda: shared_layers(parallel={"remote": "peer"}), {"host": {"expert_move": 210}}),
}


@pytest.mark.parametrize("case", CASES)
def test_both_engines_take_them_to_the_same_nanosecond_and_they_count(case: str) -> None:
    make, costs = CASES[case]
    before, inputs = make(), on(make(), **costs)
    assert spans_of(inputs, "simpy") == spans_of(inputs, "compiled")
    assert spans_of(inputs, "compiled") != spans_of(before, "compiled")


def test_the_way_to_the_cpu_and_back_is_what_was_measured() -> None:
    inputs = on(inputs_of("CPU"), host=CPU_COSTS)
    (recording,) = run_alike(inputs)
    for visit in set(recording.spans["visit"][recording.spans["kind"] == CPU_EXPERT].tolist()):
        here = recording.spans[recording.spans["visit"] == visit]
        there, back = sorted(here[here["kind"] == ACTIVATION], key=lambda span: int(span["start_ns"]))
        cpu = here[here["kind"] == CPU_EXPERT]
        assert cpu["start_ns"].min() - there["end_ns"] == 400
        assert back["start_ns"] - cpu["end_ns"].max() == 90


def test_a_grouped_kernel_takes_its_constant_once_and_the_bytes_of_all() -> None:
    inputs = on(inputs_of("grouped"), grouped=True)
    costs = Costs(inputs)
    size = inputs.model.expert_bytes[0]
    assert costs.grouped(0, [1]).ns == 1000 + size
    assert costs.grouped(0, [1, 2, 1]).ns == 1000 + 3 * size
    assert "grouped expert kernel" not in costs.estimates
    (recording,) = run_all(inputs, prepared(inputs, [costs]))
    took = {int(span["end_ns"] - span["start_ns"]) for span in recording.spans if span["kind"] == EXPERT}
    assert min(took) >= 1000 + size


def test_an_exchange_takes_what_was_measured_of_the_bytes_that_go_one_way() -> None:
    inputs = on(shared_layers(), exchange=True)
    recordings = run_alike(inputs)
    token = inputs.model.activation_bytes(1)
    took = {
        int(span["end_ns"] - span["start_ns"])
        for recording in recordings
        for span in recording.spans
        if span["kind"] in (DISPATCH, COMBINE)
    }
    assert took <= {700 + tokens * token for tokens in range(1, 5)} and len(took) > 1
    links = inputs.links
    assert links is not None and "all-to-all" not in links.estimates


def test_nothing_of_this_counts_where_dispatch_is_free() -> None:
    inputs = inputs_of("CPU")
    free = inputs.scenario.model_copy(update={"dispatch": inputs.scenario.dispatch.model_copy(update={"mode": "free"})})
    given = on(replace(inputs, scenario=free), host=CPU_COSTS)
    none = replace(inputs, scenario=free)
    runs = [run_all(one, prepared(one, part_costs(one))) for one in (given, none)]
    assert makespan_ns(runs[0]) == makespan_ns(runs[1])
