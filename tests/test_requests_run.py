"""Requests under load from a scenario to its result: conservation, luck, schedulers, capacity, the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prestage.engine.measure.request_metrics import ServiceLevel
from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.simulate import Result, simulate
from prestage.experiments.serving_capacity import serving_capacity
from prestage.output.run_folder import write_result
from prestage.output.saved import load_result
from prestage.output.tables.requests import capacity_line
from prestage.output.tables.runs import print_result

SMALL = ["model.layers=2", "workload.synthetic.tokens=60", "workload.synthetic.prefill_tokens=10",
         "requests.count=12", "requests.rate=40", "requests.prompt_tokens=20", "requests.output_tokens=5",
         "requests.warmup=1requests", "requests.cooldown=1requests"]  # fmt: skip


def run(*settings: str) -> Result:
    return simulate(load_scenario("synthetic", [*SMALL, *settings]), baselines=False, engine="simpy")


def test_a_scenario_with_requests_runs_to_its_result() -> None:
    result = run("requests.slo.ttft_ms=100000")
    data = result.data["requests"]
    assert (data["requests"], data["counted"]) == (12, 10)
    assert data["little"]["in_system"] == pytest.approx(data["little"]["rate_times_latency"])
    assert data["goodput"]["share"] == 1
    assert 0 < data["ttft_ms"]["p50"] <= data["e2e_ms"]["p50"]
    # Every position but each request's last token ran once: no preemption, no prefix.
    assert data["preemptions"] == 0
    assert sum(len(step.rows) for step in result.recording.steps) == 12 * 24
    # The last tokens are known when they have been read back, behind the last kernel.
    log = result.serving.log
    assert log is not None
    assert 0 < log.steps["end_ns"][-1] / 1e6 - result.data["makespan_ms"] < 0.1
    assert result.data["scenario"]["requests"]["count"] == 12


def test_the_same_scenario_gives_the_same_bytes_and_another_seed_other_arrivals() -> None:
    assert json.dumps(run().data) == json.dumps(run().data)
    assert run("seed=1").data["requests"]["window_s"] != run().data["requests"]["window_s"]


@pytest.mark.parametrize("name", ["static", "orca", "prefill-first", "chunked", "sarathi", "expert-aware"])
def test_every_scheduler_runs_on_an_engine(name: str) -> None:
    data = run(f"requests.scheduler.name={name}", "requests.scheduler.max_num_seqs=3").data["requests"]
    assert data["requests"] == 12
    assert data["running"] <= 3


def test_requests_wait_longer_the_faster_they_come() -> None:
    slow, fast = (run(f"requests.rate={rate}").data["requests"]["e2e_ms"]["mean"] for rate in (1, 400))
    assert fast > slow


def test_drafts_that_are_right_save_steps() -> None:
    without = run().data["requests"]
    drafted = run("requests.speculation.drafts=2", "requests.speculation.acceptance=1.0").data["requests"]
    assert drafted["steps"] < without["steps"]
    assert drafted["draft_acceptance"] == 1


def test_few_kv_blocks_preempt_and_all_are_served() -> None:
    # 24 positions are two blocks of 16: three blocks let one in and preempt the next that grows beyond its first.
    data = run("requests.kv.budget=4blocks", "requests.kv.block_tokens=8", "requests.rate=400").data["requests"]
    assert data["requests"] == 12
    assert data["kv_blocks"] <= 4


def test_capacity_of_a_scenario_lies_between_a_rate_that_is_met_and_one_that_is_missed() -> None:
    scenario = load_scenario("synthetic", [*SMALL, "requests.count=40", "requests.scheduler.max_num_seqs=1"])
    alone = run("requests.rate=0.5", "requests.count=12").data["requests"]["e2e_ms"]["p99"]
    found = serving_capacity(scenario, ServiceLevel(e2e_ms=3 * alone, share=0.9), replicates=1, precision=0.5)
    assert found["rate"] is not None
    assert found["rate"] < found["missed_rate"] <= 1.5 * found["rate"]
    # One at a time, no more are served than one takes by itself allows.
    assert found["rate"] < 2 * 1000 / alone
    assert "requests/s are met" in capacity_line(found)


def test_replicates_serve_the_requests_anew() -> None:
    drawn = simulate(load_scenario("synthetic", [*SMALL, "machine.profile=h200"]), baselines=False, replicates=2)
    assert drawn.data["replicates"]["makespan_ms"]["p50"] > 0


def test_a_saved_run_has_its_requests(tmp_path: Path) -> None:
    result = run()
    write_result(result, tmp_path / "out")
    found = load_result(tmp_path / "out")
    loaded, steps = found.requests, found.steps
    assert loaded is not None and steps is not None
    assert len(steps) == result.data["requests"]["steps"]
    assert result.serving.log is not None
    assert all((steps[name] == column).all() for name, column in result.serving.log.steps.items())
    assert loaded["number"].tolist() == list(range(12))
    ttft_ms = np.sort((loaded["first_token_ns"] - loaded["arrival_ns"])[1:11]).mean() / 1e6
    assert ttft_ms == pytest.approx(result.data["requests"]["ttft_ms"]["mean"])
    assert loaded["output_tokens"].tolist() == [5] * 12


def test_the_terminal_shows_latencies_and_load(capsys: pytest.CaptureFixture[str]) -> None:
    result = run("requests.slo.ttft_ms=0.001")
    data: dict[str, Any] = result.json_data()
    print_result(data)
    said = " ".join(capsys.readouterr().out.split())
    assert "12 requests by scheduler chunked" in said
    assert not any("prefill dominates" in warning for warning in data["warnings"])  # prompts are what was asked for
    assert "Latency of 10 of 12 requests, ms" in said
    assert "0.0%: missed" in said
