"""Comparisons and break-even: what differs adds up exactly, and the recall that pays does."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest

from prestage.engine.measure.comparison import PARTS, CompareError, compare, waterfall
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.scenario import Scenario, load_scenario
from prestage.engine.simulate import simulate
from prestage.experiments.breakeven import PROBES, STEPS, bracket, break_even
from prestage.experiments.compare import load_run, load_runs
from prestage.output.charts import plot_break_even, plot_waterfall
from prestage.output.tables.comparison import comparison_figure, print_comparison
from prestage.output.tables.sweeps import break_even_words
from prestage.resources.profile import load_profile

SMALL = ["model.layers=6", "workload.tokens=12", "workload.synthetic.tokens=12", "workload.synthetic.sequences=1"]
SMALL += ["workload.synthetic.prefill_tokens=0"]
#: A warning of every run.
ALL = ["estimated: all; calibrate it"]


@pytest.fixture(scope="module")
def runs() -> dict[str, dict[str, Any]]:
    """Three runs that differ in lookahead, the last also in what the predictor costs."""
    names = ["synthetic", "synthetic,prefetch.lookahead=0", "synthetic,predictor.latency_us=30,predictor.lane=compute"]
    return {name: load_run(name, SMALL) for name in names}


def test_the_parts_of_a_difference_add_up_to_it_to_the_nanosecond(runs: dict[str, dict[str, Any]]) -> None:
    first, *others = runs
    where = compare(runs)["where"]
    assert list(where) == others
    for name in others:
        parts = where[name]["gpu0"]
        assert list(parts) == [part for part in PARTS if part != "idle"]  # nobody waits for requests
        in_ns = [round(part["difference_ms"] * 1e6) for part in parts.values()]
        assert sum(in_ns) == round(runs[name]["makespan_ms"] * 1e6) - round(runs[first]["makespan_ms"] * 1e6)
        assert any(in_ns)


def test_a_waterfall_leads_from_one_makespan_to_the_other_without_a_gap(runs: dict[str, dict[str, Any]]) -> None:
    first, _, last = runs.values()
    steps = waterfall(first, last)
    assert (steps[0].start_ns, steps[0].end_ns) == (0, round(first["makespan_ms"] * 1e6))
    assert (steps[-1].start_ns, steps[-1].end_ns) == (0, round(last["makespan_ms"] * 1e6))
    for before, after in pairwise(steps[:-1]):
        assert after.start_ns == before.end_ns
    assert steps[-2].end_ns == steps[-1].end_ns
    predictor = next(step for step in steps if step.name == "predictor")
    assert predictor.end_ns > predictor.start_ns  # it now takes time on the compute stream


def test_the_waterfall_is_drawn_as_it_is(runs: dict[str, dict[str, Any]]) -> None:
    first, *others = runs
    falls = {name: waterfall(runs[first], runs[name]) for name in others}
    for axes, steps in zip(plot_waterfall(falls, first).axes, falls.values(), strict=True):
        bars: list[Any] = list(axes.patches)
        drawn = [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in bars]
        assert drawn == [pytest.approx((step.start_ns / 1e6, step.end_ns / 1e6)) for step in steps]


def test_settings_that_differ_and_ratios_to_the_first_are_told(runs: dict[str, dict[str, Any]]) -> None:
    data = compare(runs)
    assert data["settings"] == {
        "predictor.lane": ["gpu", "gpu", "compute"],
        "predictor.latency_us": [None, None, 30],
        "prefetch.lookahead": [1, 0, 1],
    }
    makespans = [run["makespan_ms"] for run in runs.values()]
    assert data["figures"]["makespan_ms"] == makespans
    assert data["ratios"]["makespan_ms"] == [1.0, makespans[1] / makespans[0], makespans[2] / makespans[0]]
    assert data["ratios"]["counts.prefetch"][1] == 0
    assert "speedup" not in data["figures"]  # none of them has one
    assert data["same_work"]


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("counts.miss", 1864, "1,864"),
        ("miss.ways.cpu", 1864, "1,864"),
        ("miss.gate_mass.skipped", 0.027, "2.7%"),
        ("bytes.demand", 3 * 2**29, "1.50 GiB"),
        ("inter_token_latency_ms.p50", 10.25, "10.25 ms"),
        ("tokens_per_second", 84.373, "84.37"),
        ("hit_rate", None, "-"),
    ],
)
def test_a_figure_is_shown_in_its_unit_and_a_count_whole(name: str, value: float | None, shown: str) -> None:
    assert comparison_figure(name, value) == shown


def test_a_result_on_disk_is_taken_as_it_is(tmp_path: Path, runs: dict[str, dict[str, Any]]) -> None:
    (tmp_path / "result.json").write_bytes(orjson.dumps(runs["synthetic"]))
    assert load_run(str(tmp_path)) == load_run(str(tmp_path / "result.json")) == runs["synthetic"]


def test_a_scenario_whose_last_setting_names_a_json_file_is_a_scenario(tmp_path: Path) -> None:
    profile = tmp_path / "mine.json"
    profile.write_text(load_profile("rtx3090").model_dump_json())
    data = load_run(f"synthetic,machine.profile={profile}", SMALL)
    assert data["scenario"]["machine"]["profile"] == str(profile)


def printed(data: dict[str, Any], capsys: pytest.CaptureFixture[str], verbose: bool = False) -> list[str]:
    """What `compare` prints on 80 columns."""
    print_comparison(data, verbose)
    return capsys.readouterr().out.splitlines()


def test_names_that_do_not_fit_beside_one_another_are_numbers_that_a_list_explains(
    runs: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    many = {f"synthetic,memory.eviction=lru,predictor.seed={seed}": runs["synthetic"] for seed in range(7)}
    lines = printed(compare(many), capsys)
    assert lines[:7] == [f"run {number}  {name}" for number, name in enumerate(many, 1)]
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines[:-6])
    figures = lines[lines.index("Figures, and their ratio to the first") : lines.index("Where run 2 differs (gpu0)")]
    heads = [re.findall(r"run (\d)", line) for line in figures if line.startswith(" ") and "run" in line]
    assert len(heads) > 1 and {first for first, *_ in heads} == {"1"}  # each table is beside the first
    assert [number for _, *others in heads for number in others] == list("234567")
    assert sum(line.startswith("makespan_ms") for line in figures) == len(heads)
    short = printed(compare({"one": runs["synthetic"], "two": runs["synthetic"]}), capsys)
    assert short[0] == "Settings that differ" and short[1].split() == ["one", "two"]


def test_warnings_are_told_once_with_the_runs_that_they_are_of(
    runs: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    short = {**runs["synthetic"], "warnings": ["short trace: 9 of 13; use a longer trace", *ALL]}
    data = compare({"a": {**runs["synthetic"], "warnings": ALL}, "b": short})
    said = [line for line in printed(data, capsys) if line.startswith("warning")]
    assert said == ["warning: short trace (b): use a longer trace", "warning: estimated: calibrate it"]
    said = [line for line in printed(data, capsys, verbose=True) if line.startswith("warning")]
    assert said == ["warning: short trace (b): 9 of 13; use a longer trace", "warning: estimated: all; calibrate it"]
    assert load_run("synthetic", [*SMALL, "workload.tokens=13"])["warnings"][0].startswith("short trace: ")


def test_a_run_that_is_refused_is_named_and_the_others_are_compared() -> None:
    names = ["synthetic", "synthetic,memory.eviction=nosuch", "synthetic,prefetch.lookahead=0", "nosuch.json"]
    told: list[tuple[str, int, int]] = []
    loaded, refused = load_runs(names, SMALL, progress=lambda *what: told.append(what))
    assert list(loaded) == [names[0], names[2]] and list(refused) == [names[1], names[3]]
    assert "memory.eviction = 'nosuch': choose one of" in refused[names[1]]
    assert [(done, total) for what, done, total in told if what == "runs"] == [(0, 4), (1, 4), (2, 4), (3, 4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("{}", "is no result of `prestage run --out`"),
        ("[]", "is no result of `prestage run --out`"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "result.json").write_text(text)
    with pytest.raises(CompareError, match=f"result.json: {message}"):
        load_run(str(tmp_path / "result.json"))


def test_one_run_and_parts_that_do_not_add_up_are_refused(runs: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(CompareError, match="at least two"):
        compare({"a": runs["synthetic"]})
    broken = {**runs["synthetic"], "makespan_ms": 1.0}
    with pytest.raises(CompareError, match="b: gpu0: the parts of time come to"):
        compare({"a": runs["synthetic"], "b": broken})


# Break-even.


@pytest.mark.parametrize("least", [0, 1, 2, 37, 63, 99, 100])
def test_where_recall_only_ever_helps_the_bracket_is_one_step(least: int) -> None:
    asked: list[int] = []

    def pays(step: int) -> bool:
        asked.append(step)
        return step >= least

    assert bracket(pays) == (least, least - 1 if least else None)
    assert len(asked) == len(set(asked)) <= 2 + 7 + 2 * len(PROBES)


def test_where_nothing_pays_there_is_no_recall_and_one_run_says_so() -> None:
    asked: list[int] = []

    def pays(step: int) -> bool:
        asked.append(step)
        return False

    assert bracket(pays) == (None, STEPS)
    assert asked == [STEPS]


def test_where_luck_decides_the_answer_is_the_interval() -> None:
    # From 60 on it pays, but not at 62; below 60 it does not, but at 57 it does. Bisection ends between 62 and 63; the
    # tests 2, 5 and 10 steps below find that 60 and 57 pay and 52 does not.
    assert bracket(lambda step: (step >= 60 and step != 62) or step == 57) == (63, 52)


@pytest.mark.parametrize(
    ("recall", "not_below", "words"),
    [
        (None, 1.0, "never"),
        (0.0, None, "0 (always)"),
        (0.37, 0.36, "0.37"),
        (0.63, 0.52, "0.63 (luck decides from 0.52)"),
        (0.05, None, "luck decides up to 0.05"),
    ],
)
def test_a_break_even_in_words(recall: float | None, not_below: float | None, words: str) -> None:
    assert break_even_words({"recall": recall, "not_below": not_below}) == words


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return load_scenario("synthetic", settings=[*SMALL, "memory.gpu_budget=50%"])


def test_the_recall_found_pays_against_the_same_cache_and_the_one_below_does_not(scenario: Scenario) -> None:
    def makespan_ms(**changes: Any) -> float:
        predictor = scenario.predictor.model_copy(update={"recall": changes.get("recall", 0.0)})
        prefetch = scenario.prefetch.model_copy(update={"lookahead": changes.get("lookahead", 1)})
        changed = scenario.model_copy(update={"predictor": predictor, "prefetch": prefetch})
        return float(simulate(changed, baselines=False).data["makespan_ms"])

    (cell,) = break_even(scenario)["cells"]
    assert 0 < cell["not_below"] < cell["recall"] <= 1
    assert cell["without_ms"] == makespan_ms(lookahead=0)
    assert makespan_ms(recall=cell["recall"]) < cell["without_ms"] <= makespan_ms(recall=cell["not_below"])
    assert cell["with_recall_1_ms"] == makespan_ms(recall=1.0)


def test_every_budget_and_lookahead_has_its_cell_whoever_searches_it(scenario: Scenario) -> None:
    alone = break_even(scenario, budgets=["25%", "50%"], lookaheads=[1, 2], workers=1)
    assert [(cell["budget"], cell["lookahead"]) for cell in alone["cells"]] == [
        (budget, ahead) for budget in ("25%", "50%") for ahead in (1, 2)
    ]
    assert alone == break_even(scenario, budgets=["25%", "50%"], lookaheads=[1, 2], workers=2)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (["prefetch.lookahead=0"], {}, "prefetch.lookahead = 0: nothing is prefetched"),
        ([], {"lookaheads": [0, 1]}, "lookahead 0: nothing is prefetched"),
        (["prefetch.policy=popularity"], {}, "prefetch.policy = 'popularity' asks no predictor"),
        ([], {"budgets": ["1B"]}, "budget 1B, lookahead 1: the expert budget is 1 byte"),
        ([], {"budgets": ["lots"]}, "gpu_budget = 'lots'"),
    ],
)
def test_what_has_no_break_even_is_refused(settings: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        break_even(load_scenario("synthetic", settings=[*SMALL, *settings]), **options)


def test_the_picture_has_a_line_for_each_lookahead_and_a_cross_where_no_recall_pays() -> None:
    def cell(budget: str, ahead: int, recall: float | None) -> dict[str, Any]:
        return {"budget": budget, "lookahead": ahead, "recall": recall}

    cells = [cell("25%", 1, 0.5), cell("25%", 2, None), cell("50%", 1, 0.4), cell("50%", 2, 0.9)]
    (axes,) = plot_break_even({"cells": cells}).axes
    lines: list[Any] = list(axes.lines)
    one, no_cross, two, cross, _ = (list(zip(*line.get_data(), strict=True)) for line in lines)
    assert one == [(0, 0.5), (1, 0.4)]
    assert no_cross == []
    assert two[1] == (1, 0.9)
    assert cross == [(0.04, 1.05)]
