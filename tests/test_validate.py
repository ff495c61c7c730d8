"""Validation and in-schedule samples, on runs whose truth is known: simulations written down as if measured."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prestage.calibration.executor.entries import Plan
from prestage.calibration.executor.measured import SPAN_COLUMNS, Measured, MeasuredGpu, Times
from prestage.calibration.executor.plan import decision_counts, make_plans
from prestage.calibration.executor.scenario_sets import SETS, scenarios
from prestage.calibration.fit.in_schedule import samples
from prestage.calibration.validate.report import markdown, write_report
from prestage.calibration.validate.validate import (
    ABLATIONS,
    compare,
    dispatch_pairs,
    failures,
    simulate_measured,
    summary,
    validate,
)
from prestage.engine.costs.costs import Costs, part_costs
from prestage.engine.load import load_inputs
from prestage.engine.loading.stages import with_profile
from prestage.engine.measure.merge import makespan_ns
from prestage.engine.measure.recording import Recording
from prestage.engine.run import prepared, run_all
from prestage.engine.scenario.scenario import Scenario, make_scenario
from prestage.resources.profile import Profile, load_profile
from prestage.resources.timeline import LAUNCH, READBACK


def small(**sections: Any) -> Scenario:
    data: dict[str, Any] = {
        "model": {"preset": "qwen3-30b-a3b", "layers": 3},
        "workload": {"synthetic": {"tokens": 6, "working_set": 24, "reuse": 0.5}},
        "memory": {"gpu_budget": "40experts"},
        "prefetch": {"lookahead": 1, "k": 3},
        "dispatch": {"mode": "graph"},
    }
    for name, keys in sections.items():
        data[name] = {**data.get(name, {}), **keys}
    return make_scenario(data)


def as_if_measured(scenario: Scenario, profile: Profile, name: str = "small-graph-x", stretch: float = 1.0) -> Measured:
    """Write a simulation down as a measured run, all its times `stretch` times as long."""
    inputs = with_profile(load_inputs(scenario), profile, timed=True)
    recordings = run_all(inputs, prepared(inputs, part_costs(inputs, timed=True)))
    return Measured(
        name=name,
        scenario=scenario,
        machine={"device": "a simulation", "driver": "none", "date": "never", "versions": {"torch": "none"}},
        makespans_ns=tuple(round(makespan_ns(recordings) * stretch) for _ in range(3)),
        gpus=tuple(
            MeasuredGpu(
                spans={column: np.array([getattr(entry, column) for entry in plan.entries]) for column in SPAN_COLUMNS},
                repeats=(stretched_times(plan, recording, scenario, stretch),),
                counts=decision_counts(plan.visits, plan.manager),
                verified=len(plan.resident),
            )
            for plan, recording in zip(make_plans(inputs), recordings, strict=True)
        ),
        disturbed=0,
    )


def stretched_times(plan: Plan, recording: Recording, scenario: Scenario, stretch: float) -> Times:
    found: dict[Any, Iterator[Any]] = {}
    spans = recording.spans[recording.spans["kind"] != LAUNCH]
    keys = spans[["kind", "visit", "expert", "copy"]].tolist()
    for key in set(keys):
        found[key] = iter(spans[[other == key for other in keys]])
    rows = [next(found[entry.kind, entry.visit, entry.expert, entry.copy]) for entry in plan.entries]

    def times(column: Any) -> Any:
        return np.round(np.array(column, dtype=float) * stretch).astype(np.int64)

    known_ns = recording.decoded.visits["choice_known_ns"]
    host = recording.spans[recording.spans["kind"] == LAUNCH]
    waits_ns = np.full(len(known_ns), -1)
    if scenario.dispatch.router_readback:
        waits_ns = times([row["issued_ns"] for row in rows if row["kind"] == READBACK])
    return Times(
        start_ns=times([row["start_ns"] for row in rows]),
        end_ns=times([row["end_ns"] for row in rows]),
        issued_ns=times([row["issued_ns"] for row in rows]),
        waits_from_ns=waits_ns,
        choice_known_ns=times(known_ns),
        host_end_ns=times(host["end_ns"][-1:]),
    )


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load_profile("h200-pcie5")


CASES: dict[str, dict[str, Any]] = {
    "graph": {},
    "eager": {"dispatch": {"mode": "eager"}},
    "blind": {"dispatch": {"router_readback": False}},
    "two streams": {"copy": {"discipline": "two_streams"}},
    "batch": {"workload": {"batch": 2, "synthetic": {"tokens": 8, "sequences": 2}}},
    "prompt": {"workload": {"synthetic": {"tokens": 12, "sequences": 2, "prefill_tokens": 4}}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_its_simulation_has_no_error(case: str, profile: Profile) -> None:
    row = compare(as_if_measured(small(**CASES[case]), profile), profile)
    assert row["makespan_error"] == 0 and row["spread"] == 0
    assert row["counts_equal"]
    assert row["start_error_us"] == {"p50": 0, "p90": 0}
    assert row["late"]["measured"] == row["late"]["simulated"]
    for role in ("compute", "h2d"):
        assert row["busy_ms"][role]["error"] == pytest.approx(0, abs=1e-9)
    assert row["stall_ms"]["measured"] == pytest.approx(row["stall_ms"]["simulated"])


def staged(**sections: Any) -> Scenario:
    """Two stages, of two layers and one, over two sequences in micro-batches of one."""
    parallel = {"stages": 2, "split": [2, 1], "micro_batches": 2, "dispatch_threads": "one"}
    workload = {"batch": 2, "synthetic": {"tokens": 12, "sequences": 2}}
    return small(machine={"profile": "h100-x2"}, parallel=parallel, workload=workload, **sections)


@pytest.mark.parametrize("readback", [True, False])
def test_a_pipeline_that_is_its_simulation_has_no_error(readback: bool) -> None:
    profile = load_profile("h100-x2")
    row = compare(as_if_measured(staged(dispatch={"router_readback": readback}), profile), profile)
    assert row["makespan_error"] == 0 and row["counts_equal"]
    assert row["start_error_us"] == {"p50": 0, "p90": 0}
    for lane in ("gpu0 compute", "gpu1 compute", "gpu0 h2d", "gpu1 h2d"):
        assert row["busy_ms"][lane]["error"] == pytest.approx(0, abs=1e-9)
    assert row["stall_ms"]["measured"] == pytest.approx(row["stall_ms"]["simulated"])


def test_samples_of_a_simulated_pipeline_are_the_costs_between_its_gpus() -> None:
    profile = load_profile("h100-x2")
    scenario = staged(dispatch={"router_readback": False}, copy={"contention": False}, memory={"gpu_budget": "100%"})
    rows = {(row["cost"], row["key"].get("bytes")): row for row in samples([as_if_measured(scenario, profile)])}
    peer, compute = profile.peer, profile.compute
    assert peer is not None and compute.peer_wait_gap is not None
    activation_bytes = 2 * 2048  # one token's hidden state in bfloat16
    assert rows["send", activation_bytes]["median_ns"] == peer.alone.ns(activation_bytes)
    assert rows["send_wait_gap", None]["median_ns"] == peer.event_wait_gap.ns
    assert rows["arrival_gap", None]["median_ns"] == compute.peer_wait_gap.ns


def test_a_run_twice_as_slow_is_simulated_at_half_its_makespan(profile: Profile) -> None:
    row = compare(as_if_measured(small(), profile, stretch=2.0), profile)
    assert row["makespan_error"] == pytest.approx(-0.5, abs=1e-6)
    assert row["busy_ms"]["h2d"]["error"] == pytest.approx(-0.5, abs=1e-6)
    assert row["bound_error"] < -0.5
    assert failures([row], tolerance=0.4) == ["small-graph-x: off by -50.00%, spread 0.00%"]
    assert failures([row], tolerance=0.51) == []


def test_a_run_of_other_decisions_does_not_count_as_equal(profile: Profile) -> None:
    measured = as_if_measured(small(), profile)
    (gpu,) = measured.gpus
    other = replace(gpu, counts={**gpu.counts, "miss": gpu.counts["miss"] + 1})
    moved = gpu.spans["expert"].copy()
    moved[moved >= 0] += 1
    more = gpu.spans["copy"] * 2  # numbers of copies that today's decisions do not make
    for wrong in (other, *(replace(gpu, spans={**gpu.spans, **what}) for what in ({"expert": moved}, {"copy": more}))):
        row = compare(replace(measured, gpus=(wrong,)), profile)
        assert not row["counts_equal"]
        assert row["makespan_error"] == 0  # of the spans alone; what needs the books of both is not told
        assert (row["stall_ms"], row["late"], row["start_error_us"]) == (None, None, None)
        assert "counts differ" in failures([row], tolerance=1.0)[-1]


def test_leaving_a_cost_out_makes_the_simulation_faster(profile: Profile) -> None:
    measured = as_if_measured(small(dispatch={"mode": "eager"}), profile)
    made_ns = {name: makespan_ns(simulate_measured(measured, profile, change)) for name, change in ABLATIONS.items()}
    assert made_ns["no host costs"] < 0.8 * measured.makespan_ns  # eager dispatch is bound by the host
    assert made_ns["no table for small copies"] <= measured.makespan_ns


def test_samples_of_a_simulated_run_are_the_costs_that_it_was_simulated_with(profile: Profile) -> None:
    scenario = small(copy={"contention": False})
    inputs = replace(load_inputs(scenario), profile=profile)
    costs = Costs(inputs, timed=True)
    rows = {}
    for row in samples([as_if_measured(scenario, profile)]):
        rows[row["cost"], row["key"].get("beside_copy")] = row
    for cost, ns in (("expert", costs.expert(0, 1).ns), ("dense", costs.dense(0, 1).ns), ("head", costs.head(1).ns)):
        assert rows[cost, False]["median_ns"] == ns
    assert rows["kernel_gap", False]["median_ns"] == costs.kernel_lags.gap_ns
    assert rows["copy_queued", None]["median_ns"] == costs.copies[0].queued_ns
    assert rows["copy_gap", None]["median_ns"] == profile.h2d["pinned"].gap.ns
    assert rows["host:expert_again", None]["median_ns"] == costs.expert(0, 1).host_ns
    assert rows["host:dense", None]["median_ns"] == costs.dense(0, 1).host_ns


def test_sizes_of_errors_are_told_by_mode_and_by_whether_a_bound_would_do() -> None:
    def row(name: str, dispatch: str, error: float, bound_error: float) -> dict[str, Any]:
        return {
            "scenario": name, "dispatch": dispatch, "makespan_error": error, "bound_error": bound_error, "spread": 0.01,
            "busiest_share": 0.7, "counts_equal": True, "measured_ms": 10.0, "simulated_ms": 10.0 * (1 + error),
        }  # fmt: skip

    rows = [
        row("a-graph-1", "graph", -0.02, -0.3),
        row("b-graph-1", "graph", 0.004, 0.01),
        row("a-eager-1", "eager", 0.1, 0),
    ]
    sizes = summary(rows)
    assert sizes["graph"]["median"] == pytest.approx(0.012) and sizes["graph"]["n"] == 2
    assert sizes["graph, bound off by 5 %"]["n"] == 1
    assert sizes["all"]["within_spread"] == 1 and sizes["all"]["worst"] == pytest.approx(0.1)
    (pair,) = dispatch_pairs(rows)
    assert pair["scenario"] == "a-graph-1" and pair["simulated"] / pair["measured"] == pytest.approx(1.1 / 0.98)


def test_a_report_is_written_whole_and_the_same_twice(tmp_path: Path, profile: Profile) -> None:
    runs = [
        as_if_measured(small(), profile),
        as_if_measured(small(dispatch={"mode": "eager"}), profile, "small-eager-x"),
    ]
    report = validate(runs, profile, ablate=True, replicates=3)
    written = [path.read_bytes() for path in write_report(report, tmp_path)]
    assert [path.read_bytes() for path in write_report(report, tmp_path)] == written
    assert [row["scenario"] for row in json.loads(written[0])["rows"]] == ["small-graph-x", "small-eager-x"]
    text = markdown(report, every_row=True)
    assert "2 of 2 measured makespans" in text  # this profile does not say how unsure it is
    assert "eager over graphs" in text and "no contention" in text and "small-eager-x" in text


def test_no_scenario_is_fitted_and_validated_on() -> None:
    sets = {name: scenarios(name) for name in SETS}
    assert len(sets["validation"]) >= 24 and len(sets["two-gpus"]) >= 10
    for one, other in combinations(sets.values(), 2):
        assert not [scenario for scenario in one.values() if scenario in other.values()]
        assert {scenario.seed for scenario in one.values()}.isdisjoint(scenario.seed for scenario in other.values())


def test_the_validation_set_covers_what_it_should() -> None:
    chosen = scenarios("validation").values()
    assert {one.model.preset for one in chosen} == {
        "mixtral-8x7b",
        "qwen3-30b-a3b",
        "switch-base-128",
        "deepseek-v2-lite",
    }
    assert {one.prefetch.lookahead for one in chosen} >= {0, 1, 3}
    assert {one.predictor.recall for one in chosen} >= {0.6, 0.8, 1.0}
    assert {one.dispatch.router_readback for one in chosen} == {True, False}
    assert {one.dispatch.mode for one in chosen} == {"graph", "eager"}
    assert {one.copy_.discipline for one in chosen} == {"fifo", "two_streams", "priority"}
    assert max(one.workload.batch for one in chosen) > 1
