"""What is committed of the proof against two GPUs: runs measured on two H100s, and how well they are simulated.

It needs no GPU, as `test_reality`, which it follows.
"""

import json
from typing import Any

import pytest
from test_reality import FOLDER, flat

from prestage.calibration.executor.measured import load_all, load_measured
from prestage.calibration.executor.scenario_sets import scenarios
from prestage.calibration.fit.evidence import load_schedule, rows_of
from prestage.calibration.fit.fit import fit
from prestage.calibration.fit.in_schedule import samples
from prestage.calibration.measure.samples import load_samples
from prestage.calibration.validate.validate import compare, summary
from prestage.resources.profile import load_profile

NAME = "h100-x2"
REPORT = json.loads((FOLDER / f"{NAME}.json").read_text())
ROWS: dict[str, dict[str, Any]] = {row["scenario"]: row for row in REPORT["rows"]}
SAMPLES = FOLDER.parent / "samples"
#: Executed before the guesses of a batch were merged: one of them brought an expert back that another had evicted.
OTHER_DECISIONS = ["two-qwen-graph-ahead1-recall80-blind-m1"]


@pytest.mark.parametrize("name", ["fit-two-gpus", "two-gpus"])
def test_every_scenario_of_a_set_was_executed_as_it_is(name: str) -> None:
    chosen = scenarios(name)
    runs = load_all([FOLDER / NAME / name])
    assert {run.name: run.scenario for run in runs} == chosen
    for run in runs:
        assert len(run.makespans_ns) >= 5
        assert all(gpu.verified > 0 for gpu in run.gpus)
        assert run.gpus_used == 2 and run.clocks_within_ns < 60_000


def test_the_set_covers_what_it_should() -> None:
    assert set(ROWS) == set(scenarios("two-gpus")) and len(ROWS) >= 10
    chosen = [one for one in scenarios("two-gpus").values() if one.parallel.stages == 2]
    for readback in (True, False):
        batches = {one.parallel.micro_batches for one in chosen if one.dispatch.router_readback == readback}
        assert batches == {1, 2, 4, 8}
    assert {one.parallel.dispatch_threads for one in chosen} == {"one", "per-gpu"}
    assert sum(one.copy_.source == "peer" for one in scenarios("two-gpus").values()) >= 4
    # Both GPUs load at once, nearly all the time.
    busy = [(row["busy_ms"].get("gpu0 h2d"), row["measured_ms"]) for row in ROWS.values()]
    assert sum(h2d is not None and h2d["measured"] > 0.85 * whole_ms for h2d, whole_ms in busy) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ROWS)
def test_the_report_is_what_the_simulation_makes_of_the_measured_run(scenario: str) -> None:
    row = compare(load_measured(FOLDER / NAME / "two-gpus" / f"{scenario}.json.gz"), load_profile(NAME))
    kept = dict(flat(ROWS[scenario]))
    for key, value in flat(row):
        assert kept[key] == (pytest.approx(value, abs=1e-9) if isinstance(value, float) else value), key


def test_two_gpus_are_simulated_as_well_as_promised() -> None:
    sizes = summary(REPORT["rows"])["all"]
    assert sizes["median"] <= 0.02 and sizes["p90"] <= 0.06
    assert [row["scenario"] for row in REPORT["rows"] if not row["counts_equal"]] == OTHER_DECISIONS


def test_the_profile_is_what_the_committed_samples_and_runs_give() -> None:
    graph = load_profile("h200-x2").topology
    rows = load_schedule([SAMPLES / f"{NAME}.rows.json"])
    fitted = fit(load_samples(SAMPLES / f"{NAME}.json"), NAME, rows, topology=graph)
    assert fitted.profile == load_profile(NAME)


@pytest.mark.slow
def test_the_fits_rows_are_what_was_seen_in_the_fit_set() -> None:
    seen = rows_of(samples(load_all([FOLDER / NAME / "fit-two-gpus"])), "fit")
    kept = load_schedule([SAMPLES / f"{NAME}.rows.json"])
    by_key = {(row.cost, repr(sorted(row.key.items()))): row for row in seen}
    assert len(kept) == len(by_key)
    for row in kept:
        other = by_key[row.cost, repr(sorted(row.key.items()))]
        assert row.n == other.n
        assert row.median_ns == pytest.approx(other.median_ns)
