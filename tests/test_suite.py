"""The benchmark suite: a killed one goes on, what is best is best, and the report shows what the rows say."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from browser import browsing

from prestage import cli
from prestage.calibration.fit.transfer import from_profile
from prestage.engine.measure.insights import best
from prestage.engine.scenario.rows import read_rows
from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.simulate import simulate
from prestage.experiments.suite import BASE, Finished, SuiteError, load_suite, run_suite, suite_names
from prestage.experiments.suite_report import _in_short, _subtitle, write_suite
from prestage.resources.profile import load_profile

#: Two sweeps of one small study: eight runs of some hundredths of a second, and its scenario.
DEFINITION = """
title = "A small suite"
transfers = ["rtx3090"]
published = ["transfers", "contradictions"]
quick_published = ["transfers"]

[bounds]
"memory.eviction" = ["belady"]

[[metrics]]
name = "throughput"
figure = "tokens_per_second"
best = "most"

[[metrics]]
name = "tail"
figure = "inter_token_latency_ms.p99"
best = "least"

[[studies]]
name = "small"
title = "A small study"
scenario = "synthetic"
quick = { "workload.tokens" = 6 }

[studies.set]
"seed" = 3
"model.layers" = 3
"workload.tokens" = 12
"workload.synthetic.tokens" = 14
"workload.synthetic.prefill_tokens" = 2

[[studies.sweeps]]
name = "budget"
question = "How much memory"
grid = { "memory.gpu_budget" = ["20%", "40%", "80%"], "prefetch.lookahead" = [0, 1] }
charts = [{ kind = "lines", x = "prefetch.lookahead", by = "memory.gpu_budget" }]

[[studies.sweeps]]
name = "eviction"
question = "Which expert to evict"
set = { "memory.gpu_budget" = "40%" }
grid = { "memory.eviction" = ["lru", "belady"] }
"""
TRANSFERS = {"rtx3090": from_profile(load_profile("rtx3090"))}
STUDY, SWEEPS = "small", (BASE, "budget", "eviction")


@pytest.fixture(scope="module")
def definition(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "small.toml"
    path.write_text(DEFINITION, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def finished(definition: Path, out: Path) -> Finished:
    return run_suite(load_suite(definition), out, transfers=TRANSFERS, workers=1)


def rows_of(finished: Finished) -> dict[str, list[dict[str, Any]]]:
    """The rows by sweep, without how long they took."""
    return {
        name: [{key: value for key, value in row.items() if key != "wall_s"} for row in finished.rows[STUDY, name]]
        for name in SWEEPS
    }


# What is run.


def test_every_sweep_has_the_rows_of_its_grid_and_a_study_its_scenario_alone(finished: Finished) -> None:
    rows = rows_of(finished)
    assert {name: len(rows[name]) for name in SWEEPS} == {BASE: 1, "budget": 6, "eviction": 2}
    assert all(row["error"] is None for name in SWEEPS for row in rows[name])
    assert rows[BASE][0]["scenario"]["seed"] == 3
    assert rows["eviction"][0]["budget_bytes"] == rows["budget"][2]["budget_bytes"]


def test_quick_lays_its_settings_over_a_study_and_runs_its_tables(definition: Path, tmp_path: Path) -> None:
    quick = run_suite(load_suite(definition), tmp_path, quick=True, workers=1)
    assert {row["decode_tokens"] for name in SWEEPS for row in quick.rows[STUDY, name]} == {6}
    assert list(quick.data["published"]) == ["transfers"]
    assert quick.data["quick"]


def test_progress_counts_the_scenarios_of_all_sweeps(definition: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    run_suite(load_suite(definition), tmp_path, quick=True, workers=1, progress=lambda *one: told.append(one))
    scenarios = [(done, total) for what, done, total in told if what == "scenarios"]
    assert scenarios == sorted(scenarios)
    assert scenarios[-1] == (9, 9)


def test_what_is_finished_is_not_run_again(
    definition: Path, finished: Finished, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("this was done")

    monkeypatch.setattr("prestage.experiments.sweep.run_task", never)
    monkeypatch.setattr("prestage.experiments.suite.published_table", never)
    again = run_suite(load_suite(definition), out, transfers=TRANSFERS, workers=1)
    assert again.data == finished.data
    assert rows_of(again) == rows_of(finished)


@pytest.mark.process
def test_a_killed_suite_goes_on_to_the_same_rows(definition: Path, finished: Finished, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "prestage", "suite", str(definition), "-o", str(tmp_path), "--workers", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        journal = tmp_path / "rows" / "small-budget.jsonl"
        while running.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
            time.sleep(0.002)
        os.kill(running.pid, signal.SIGKILL)
    assert running.returncode == -signal.SIGKILL, "it was killed in the middle"
    kept = journal.read_bytes().splitlines(keepends=True)[:2]
    resumed = run_suite(load_suite(definition), tmp_path, transfers=TRANSFERS, workers=1)
    assert rows_of(resumed) == rows_of(finished)
    assert resumed.data == finished.data
    assert journal.read_bytes().splitlines(keepends=True)[:2] == kept, "finished rows stay as they were"


def test_what_a_gpu_measures_is_measured_once(definition: Path, tmp_path: Path) -> None:
    calls = []

    def measure() -> dict[str, Any]:
        calls.append(1)
        return TRANSFERS["rtx3090"]

    for _ in range(2):
        again = run_suite(load_suite(definition), tmp_path, quick=True, measured={"gpu0": measure}, workers=1)
        assert again.data["transfers"] == {"gpu0": TRANSFERS["rtx3090"]}
    assert len(calls) == 1


def test_a_scenarios_file_is_looked_for_beside_the_suites(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[workload.synthetic]\ntokens = 14\n")
    (tmp_path / "suite.toml").write_text(DEFINITION.replace('scenario = "synthetic"', 'scenario = "mine.toml"'))
    finished = run_suite(load_suite(tmp_path / "suite.toml"), tmp_path / "out", quick=True, workers=1)
    assert finished.data["studies"][0]["scenario"]["workload"]["synthetic"]["tokens"] == 14


def test_parts_of_another_version_are_made_again(definition: Path, tmp_path: Path) -> None:
    run_suite(load_suite(definition), tmp_path, quick=True, workers=1)
    kept = json.loads((tmp_path / "parts.json").read_text())
    kept["versions"]["prestage"] = "0.0.0"
    kept["parts"]["published transfers"] = "of old"
    (tmp_path / "parts.json").write_text(json.dumps(kept))
    again = run_suite(load_suite(definition), tmp_path, quick=True, workers=1)
    assert again.data["published"]["transfers"] != "of old"


# What it comes to.


def test_the_best_by_a_metric_is_the_best_row_that_does_not_know_the_future(finished: Finished) -> None:
    (study,) = finished.data["studies"]
    rows = rows_of(finished)
    distinct = {row["key"]: row for name in SWEEPS for row in rows[name]}.values()
    honest = [row for row in distinct if row["scenario"]["memory"]["eviction"] != "belady"]
    assert len(honest) == study["choices"] < len(distinct)
    throughput, tail = study["best"]
    assert throughput["value"] == max(row["tokens_per_second"] for row in honest)
    assert tail["value"] == min(row["inter_token_latency_ms"]["p99"] for row in honest)
    assert throughput["start"] == rows[BASE][0]["tokens_per_second"]


def test_what_is_said_to_have_changed_leads_from_the_study_to_the_row(finished: Finished) -> None:
    (study,) = finished.data["studies"]
    for found in study["best"]:
        for key, value in found["settings"].items():
            section, name = key.split(".")
            assert study["scenario"][section][name] != value


def test_the_best_row_can_be_run_again_by_its_name(finished: Finished, out: Path) -> None:
    (study,) = finished.data["studies"]
    throughput = study["best"][0]
    again = simulate(load_scenario(out / throughput["row"]), baselines=False)
    assert again.data["tokens_per_second"] == throughput["value"]


def test_of_equals_the_best_is_the_one_with_the_least_memory() -> None:
    rows = [{"speed": speed, "memory": memory} for speed, memory in ((2.0, 9), (2.0, 3), (1.0, 1), (2.0, 3))]
    assert best(rows, "speed", "memory", most=True) is rows[1]
    assert best(rows, "speed", "memory", most=False) is rows[2]


def test_the_front_falls_to_nobody(finished: Finished) -> None:
    (study,) = finished.data["studies"]
    rows = finished.of_study(finished.suite.studies[0])
    for spot in study["front"]:
        assert not [
            row for row in rows if row["budget_bytes"] <= spot["memory"] and row["tokens_per_second"] > spot["speed"]
        ]
    assert study["front"][-1]["speed"] == max(row["tokens_per_second"] for row in rows)


def test_a_run_that_fails_is_named_in_the_report_and_the_others_stay(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text(DEFINITION.replace('"prefetch.lookahead" = [0, 1]', '"prefetch.k" = [1, 500]'))
    suite = load_suite(broken)
    finished = run_suite(suite, tmp_path / "out", quick=True, workers=1)
    (study,) = finished.data["studies"]
    assert {error["settings"]["prefetch.k"] for error in study["errors"]} == {500}
    assert len(study["errors"]) == 3
    assert study["choices"] > 1


# The report.


def test_the_report_shows_every_table_and_figure(finished: Finished, out: Path) -> None:
    paths = write_suite(finished, out)
    assert {path.name for path in paths} >= {"suite.json", "suite.md", "report.html"}
    assert all(path.stat().st_size for path in paths)
    assert json.loads((out / "suite.json").read_text()) == json.loads(json.dumps(finished.data))
    text, page = (out / "suite.md").read_text(), (out / "report.html").read_text()
    for name in ("transfer-rtx3090", "small-front", "small-budget"):
        assert (out / "figures" / f"{name}.svg").is_file()
        assert f"](figures/{name}.svg)" in text
    assert page.count("<img") == text.count("](figures/")
    for row in finished.rows[STUDY, "budget"]:
        assert f"{row['tokens_per_second']:,.2f}" in text
        assert f"{row['tokens_per_second']:,.2f}" in page
    assert "34.16" in text, "ten pageable copies, on the lane"


@pytest.mark.browser
def test_the_page_loads_in_a_browser_without_a_network(finished: Finished, out: Path) -> None:
    write_suite(finished, out)
    with browsing(out) as opened:
        opened.page.goto(f"{opened.url}/report.html")
        widths = opened.page.evaluate("[...document.images].map(image => image.naturalWidth)")
        assert opened.page.locator("h2").count() > 3
    assert len(widths) == 3 and all(widths)
    assert not opened.console_errors
    assert not opened.refused


@pytest.mark.browser
def test_the_best_configurations_are_whole_on_a_narrow_screen(finished: Finished, out: Path) -> None:
    write_suite(finished, out)
    with browsing(out) as opened:
        opened.page.set_viewport_size({"width": 420, "height": 900})
        opened.page.goto(f"{opened.url}/report.html")
        table = opened.page.locator("table", has_text="where it starts")
        assert re.search(r"[a-z]+\.[a-z_]+ = ", table.inner_text())  # keys, which may be broken behind their dots alone
        assert table.evaluate("table => table.parentElement.scrollWidth <= table.parentElement.clientWidth")
        cut = (
            "table => [...table.querySelectorAll('td, th')].filter(cell => cell.scrollWidth > cell.clientWidth).length"
        )
        assert table.evaluate(cut) == 0


@pytest.mark.slow
def test_the_command_prints_the_best_and_writes_the_folder(
    definition: Path, out: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ((), ("--json",)):
        monkeypatch.setattr(sys, "argv", ["prestage", "suite", str(definition), "-o", str(out), *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        shown = capsys.readouterr().out
        if arguments:
            assert json.loads(shown) == json.loads(json.dumps(finished.data))
        else:
            assert "throughput" in shown and str(out / "report.html") in shown


# Definitions.


@pytest.mark.parametrize("name", suite_names())
def test_a_shipped_suite_can_run_in_full_and_quick(name: str) -> None:
    from prestage.experiments.suite import _jobs

    for quick in (False, True):
        assert len(_jobs(load_suite(name), quick)) > 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "budget"', 'nmae = "budget"', "studies.0.sweeps.0.nmae: no such key"),
        ('kind = "lines"', 'kind = "line"', "did you mean 'lines'"),
        ('["transfers", "contradictions"]', '["transfer"]', "did you mean 'transfers'"),
        ('best = "most"', 'best = "biggest"', "metrics.0.best = 'biggest': must be 'most' or 'least'"),
        ('name = "eviction"', 'name = "budget"', "two sweeps are named 'small-budget'"),
        ('"prefetch.lookahead" = [0, 1]', '"prefetch.lookahed" = [0, 1]', "did you mean 'lookahead'"),
        ('scenario = "synthetic"', 'scenario = "sythetic"', "did you mean 'synthetic'"),
        ('name = "eviction"', 'name = "BUDGET"', "two sweeps are named 'small-BUDGET'"),
        ('name = "eviction"', 'name = "base"', "two sweeps are named 'small-base'"),
        ('name = "budget"', 'name = "front"', "two charts are named 'small-front'"),
        ('name = "eviction"', 'name = "../../evil"', r"studies.0.sweeps.1.name = '../../evil': names a file"),
        (f'name = "{STUDY}"', 'name = "../evil"', r"studies.0.name = '../evil': names a file"),
        ('transfers = ["', 'transfers = ["../rtx3090.json", "', "transfers: '.*rtx3090.*': given twice"),
        ("title =", "title", "not TOML"),
        ("[[metrics]]", "[[metric]]", "metric: no such key"),
    ],
)
def test_a_bad_definition_is_refused_before_anything_runs(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(DEFINITION.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        run_suite(load_suite(path), tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_a_suite_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(SuiteError, match="default"):
        load_suite("defualt")


def test_rows_are_those_of_a_sweep_that_can_be_run_again(out: Path, finished: Finished) -> None:
    rows = list(read_rows(out / "rows" / "small-budget.jsonl"))
    assert [row["key"] for row in finished.rows[STUDY, "budget"]] == [row["key"] for row in rows]


def test_a_study_whose_start_is_the_fastest_says_so() -> None:
    best = {"figure": "tokens_per_second", "value": 24.46, "start": 24.46, "settings": {}}
    assert _in_short({"title": "A card", "best": [best]}) == (
        "A card. Nothing that was tried is faster than what it starts with, 24.5 tokens/s."
    )
    faster = {**best, "value": 48.92, "settings": {"prefetch.k": 2}}
    assert _in_short({"title": "A card", "best": [faster]}) == (
        "A card. Fastest with prefetch.k = 2: 48.9 tokens/s, 2.00 times what it starts with."
    )


def test_the_subtitle_counts_what_is_there() -> None:
    data = {"transfers": {}, "published": {"transfers": []}, "studies": [{"choices": 12}], "versions": {"simpy": "4"}}
    assert _subtitle({**data, "quick": False}) == "1 published table, 12 runs; simpy 4."
