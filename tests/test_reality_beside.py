"""What is committed of the proof of what works beside the GPU's stream, and on two H200s: runs, and how well they are
simulated. It needs no GPU, as `test_reality`, which it follows.
"""

import json
from typing import Any

import pytest
from test_reality import FOLDER, flat

from prestage.calibration.executor.measured import load_all, load_measured
from prestage.calibration.executor.scenario_sets import scenarios
from prestage.calibration.validate.validate import compare, summary
from prestage.resources.profile import load_profile

#: By report: the profile, and the set.
REPORTS = {
    "h200-offload": ("h200-offload", "beside"),
    "h200-pair-shared": ("h200-pair", "shared"),
    "h200-pair": ("h200-pair", "two-gpus"),
    "h200-x2-shared": ("h200-x2", "shared"),
}
#: Lines that came into a set when a machine had executed its others.
LATER = {
    "h200-offload": {"beside-qwen-graph-ahead1-recall80-packed-gpu-aside", "beside-qwen-graph-ahead0-packed-aside"},
    "h200-pair": {"shared-qwen-graph-ahead0-tokens-prompts", "shared-deepseek-graph-ahead0-tokens-prompts"},
}
ROWS: dict[str, list[dict[str, Any]]] = {
    name: json.loads((FOLDER / f"{name}.json").read_text())["rows"] for name in REPORTS
}


@pytest.mark.parametrize("name", REPORTS)
def test_every_scenario_of_a_set_was_executed_as_it_is_with_equal_counts(name: str) -> None:
    profile, chosen = REPORTS[name]
    runs = load_all([FOLDER / profile / chosen])
    wanted = {name: one for name, one in scenarios(chosen).items() if name not in LATER.get(profile, ())}
    assert {run.name: run.scenario for run in runs} == wanted
    assert {row["scenario"] for row in ROWS[name]} == {run.name for run in runs}
    assert all(len(run.makespans_ns) >= 5 for run in runs)
    assert all(row["counts_equal"] for row in ROWS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", REPORTS)
def test_the_report_is_what_the_simulation_makes_of_the_measured_runs(name: str) -> None:
    profile, chosen = REPORTS[name]
    for kept in ROWS[name]:
        row = compare(load_measured(FOLDER / profile / chosen / f"{kept['scenario']}.json.gz"), load_profile(profile))
        known = dict(flat(kept))
        for key, value in flat(row):
            assert known[key] == (pytest.approx(value, abs=1e-9) if isinstance(value, float) else value), key


def test_decompression_aside_is_as_far_off_as_everything_else_on_the_machine_that_executed_it_again() -> None:
    errors = {
        row["scenario"]: row["makespan_error"] for row in json.loads((FOLDER / "h200-aside.json").read_text())["rows"]
    }
    assert set(errors) == {run.name for run in load_all([FOLDER / "h200-x2" / "aside"])}
    assert all(-0.11 < error < 0 for error in errors.values())
    first = {row["scenario"]: row["makespan_error"] for row in ROWS["h200-offload"]}
    assert max(abs(error) for name, error in first.items() if "packed" in name) < 0.03


@pytest.mark.parametrize(("name", "median", "p90"), [("h200-pair-shared", 0.02, 0.05), ("h200-pair", 0.02, 0.04)])
def test_two_h200s_are_simulated_as_well_as_promised(name: str, median: float, p90: float) -> None:
    sizes = summary(ROWS[name])["all"]
    assert sizes["median"] <= median and sizes["p90"] <= p90
