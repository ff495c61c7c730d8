"""Costs of a runtime that are fitted to what was served: those that made the steps come out, and the link's share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prestage.calibration.decode.served import compare_served, read_served
from prestage.calibration.decode.serving import FORMAT
from prestage.calibration.observe.fit import Predictor, fit, runtime_file
from prestage.calibration.observe.logs import ObserveError, load_logs
from prestage.calibration.observe.served_steps import link_share, steps_by_rows
from prestage.engine.costs.costs import part_costs
from prestage.engine.load import load_inputs
from prestage.engine.measure.request_metrics import run_requests
from prestage.engine.scenario.scenario import make_scenario
from prestage.engine.simulate import simulate
from prestage.workloads.requests.request import Part, RequestStep

TRUE = {"step": 3_000_000, "layer": 250_000, "expert": 90_000}
RUNTIME = 'extends = "transformers"\n' + "".join(
    f'[costs.{name}]\nns = {ns}\nsource = "measured"\n' for name, ns in TRUE.items()
)


def scenario(runtime: str) -> dict[str, Any]:
    return {
        "model": {"preset": "qwen3-30b-a3b", "layers": 3},
        "machine": {"profile": "h200"},
        "runtime": {"name": runtime},
        "workload": {"synthetic": {"tokens": 90, "sequences": 3, "prefill_tokens": 10}},
        "memory": {"gpu_budget": "50%"},
        "prefetch": {"policy": "none"},
        "requests": {"rate": 6.0, "count": 12, "prompt_tokens": 16, "output_tokens": 10, "warmup": "0%"},
    }


@pytest.fixture
def served(tmp_path: Path) -> dict[str, Any]:
    """A simulation with other costs than the runtime's, as if it had been served."""
    (tmp_path / "true.toml").write_text(RUNTIME)
    found = simulate(make_scenario(scenario(str(tmp_path / "true.toml"))), baselines=False)
    log, section = found.serving.log, found.said.scenario.requests
    assert log is not None and section is not None
    steps = [step for step in found.recording.steps if isinstance(step, RequestStep)]
    repeat = {
        "requests": run_requests(log, section),
        "admitted": list(range(12)),
        "idle": list(found.recording.idle),
        "steps": [
            {"from_ns": int(begin), "until_ns": int(end), "parts": [list(part) for part in step.parts],
             "rows": step.rows.tolist()}
            for step, begin, end in zip(steps, log.steps["start_ns"], log.steps["end_ns"], strict=True)
        ],
    }  # fmt: skip
    plain = make_scenario(scenario("transformers")).plain()
    return {"format": FORMAT, "model": {"name": "qwen3-30b-a3b"}, "scenario": plain, "repeats": [repeat]}


def test_costs_that_made_the_steps_are_found_again(served: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "served.json").write_text(json.dumps(served))
    observations = load_logs([tmp_path / "served.json"])
    assert sum(each.samples for each in observations) >= len(served["repeats"][0]["steps"]) - 4
    predictor = Predictor(observations, "transformers")
    found = fit(predictor, observations, list(TRUE))
    # Three layers and a step: their sum counts.
    together = found.values["step"] + 3 * found.values["layer"]
    assert together == pytest.approx(TRUE["step"] + 3 * TRUE["layer"], rel=0.05)
    assert found.values["expert"] == pytest.approx(TRUE["expert"], rel=0.05)
    (tmp_path / "found.toml").write_text(runtime_file(found, predictor, "transformers", ("found", "")))
    before = compare_served(read_served(tmp_path))
    after = compare_served(read_served(tmp_path), {"runtime": {"name": str(tmp_path / "found.toml")}})
    assert before["steps"]["median_error"] < -0.15 and abs(after["steps"]["median_error"]) < 0.02
    assert all(abs(wait["error"]) < 0.03 for wait in after["waits"].values())


def test_steps_of_about_as_many_rows_are_one_setting_and_those_with_a_prompt_another() -> None:
    def step(decoding: int, prompt: int) -> dict[str, Any]:
        parts = [Part(request=number, first=9, tokens=1, sampled=1) for number in range(decoding)]
        parts += [Part(request=99, first=0, tokens=prompt, sampled=0)] if prompt else []
        return {"rows": [0] * (decoding + prompt), "parts": [list(part) for part in parts]}

    rows = [1, 1, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 12, 16]
    repeat = {"steps": [*(step(count, 0) for count in rows), step(0, 3), step(1, 2), step(2, 64)]}
    found = {name: steps.numbers for name, steps in steps_by_rows(repeat).items()}
    assert found == {
        "1rows": (0, 1, 2), "3-4rows": (4, 5, 6), "5-8rows": (7, 8, 9, 10), "9-16rows": (11, 12, 13),
        "prompts": (14, 15, 16),
    }  # fmt: skip


def test_the_links_share_is_what_copies_reached(served: dict[str, Any]) -> None:
    """Copies of 11/10 of the profile's time behind the latency reach 10/11 of its rate; quicker ones all of it."""
    inputs = load_inputs(make_scenario(served["scenario"]))
    h2d, size_bytes = part_costs(inputs)[0].h2d, inputs.model.expert_bytes[0]
    start_ns = h2d.queued.ns(0)
    copy_ns = h2d.queued.ns(size_bytes) - start_ns
    share = link_share([({"copy_ns": [start_ns + h2d.gap.ns + copy_ns * 11 // 10]}, inputs)])
    assert share is not None and share.share == pytest.approx(10 / 11, rel=1e-3) and share.source == "measured"
    assert link_share([({"copy_ns": [start_ns + h2d.gap.ns + copy_ns * 9 // 10]}, inputs)]) is None
    assert link_share([({}, inputs)]) is None


def test_half_a_file_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "served.json").write_text(json.dumps({"format": FORMAT, "repeats": []}))
    with pytest.raises(ObserveError, match="is not a whole prestage-served-1: KeyError: 'scenario'"):
        load_logs([tmp_path / "served.json"])
