"""What is committed of the proof against a GPU: runs measured on an H200, and how well they are simulated.

It needs no GPU. What one commits is what the commands make of it today: a change of the engine that moves a simulated
makespan shows here, and is either worth a new report or a mistake.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prestage.calibration.executor.measured import load_all, load_measured
from prestage.calibration.executor.scenario_sets import scenarios
from prestage.calibration.fit.evidence import load_schedule, rows_of
from prestage.calibration.fit.in_schedule import samples
from prestage.calibration.validate.validate import compare, dispatch_pairs, summary
from prestage.resources.profile import load_profile

FOLDER = Path(__file__).parent.parent / "calibration" / "validation"
REPORT = json.loads((FOLDER / "h200.json").read_text())
ROWS: dict[str, dict[str, Any]] = {row["scenario"]: row for row in REPORT["rows"]}


def flat(data: dict[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from flat(value, f"{within}{key}.")
        else:
            yield f"{within}{key}", value


def files(name: str) -> dict[str, Path]:
    return {file.name.removesuffix(".json.gz"): file for file in (FOLDER / "h200" / name).glob("*.json.gz")}


def test_every_scenario_of_the_validation_set_was_executed_and_is_reported() -> None:
    assert set(files("validation")) == set(ROWS) == set(scenarios("validation"))
    assert set(files("fit")) <= set(scenarios("fit"))


@pytest.mark.parametrize("name", ["fit", "validation"])
def test_what_was_executed_are_the_scenarios_of_the_set(name: str) -> None:
    chosen = scenarios(name)
    for run in load_all([FOLDER / "h200" / name]):
        assert run.scenario == chosen[run.name]
        assert len(run.makespans_ns) >= 5
        assert all(gpu.verified > 0 for gpu in run.gpus)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ROWS)
def test_the_report_is_what_the_simulation_makes_of_the_measured_run(scenario: str) -> None:
    row = compare(load_measured(files("validation")[scenario]), load_profile("h200"))
    kept = dict(flat(ROWS[scenario]))
    for key, value in flat(row):
        assert kept[key] == (pytest.approx(value, abs=1e-9) if isinstance(value, float) else value), key


@pytest.mark.slow
def test_the_fits_rows_are_what_was_seen_in_the_fit_set() -> None:
    seen = rows_of(samples(load_all([FOLDER / "h200" / "fit"])), "fit")
    kept = load_schedule([FOLDER.parent / "samples" / "h200.rows.json"])
    by_key = {(row.cost, repr(sorted(row.key.items()))): row for row in seen}
    assert len(kept) == len(by_key)
    for row in kept:
        other = by_key[row.cost, repr(sorted(row.key.items()))]
        assert row.n == other.n
        assert row.median_ns == pytest.approx(other.median_ns)


def test_graphs_are_simulated_as_well_as_promised() -> None:
    sizes = summary(REPORT["rows"])
    assert sizes["graph"]["median"] <= 0.005 and sizes["graph"]["p90"] <= 0.02
    unbound = sizes["graph, bound off by 5 %"]
    assert unbound["n"] >= 12 and unbound["median"] <= 0.01 and unbound["p90"] <= 0.03


def test_eager_dispatch_is_simulated_as_well_as_promised() -> None:
    sizes = summary(REPORT["rows"])["eager"]
    assert sizes["median"] <= 0.015 and sizes["p90"] <= 0.06


def test_the_factor_between_eager_dispatch_and_graphs_is_the_gpus_within_5_percent() -> None:
    pairs = dispatch_pairs(REPORT["rows"])
    assert any(pair["scenario"].startswith("qwen") and pair["measured"] > 1.5 for pair in pairs)
    assert max(abs(pair["error"]) for pair in pairs) <= 0.05


def test_counts_are_equal_in_all_and_no_lane_decides_in_half() -> None:
    rows = REPORT["rows"]
    assert len(rows) >= 24 and all(row["counts_equal"] for row in rows)
    assert sum(row["busiest_share"] <= 0.8 for row in rows) >= len(rows) / 2


def test_most_measured_makespans_lie_where_the_profiles_uncertainty_says() -> None:
    inside = [row["inside"] for row in REPORT["rows"]]
    assert sum(inside) >= len(inside) * 19 / 24


@pytest.mark.slow
def test_each_term_earns_its_place() -> None:
    ablation = REPORT["ablation"]
    assert all(
        sizes["median"] > 2 * ablation["everything"]["median"]
        for name, sizes in ablation.items()
        if name != "everything"
    )
    assert np.median([abs(row["bound_error"]) for row in REPORT["rows"]]) > 0.1
