"""Published runs: the table reads, every row can be run or says why not, and what the table comes to, by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from published_pairs import WHY, pairs, verdict
from published_tables import FIRST, NOW, published_figures, published_rows, rows_of

from prestage.calibration.published.rows import (
    Predicted,
    Row,
    found_share,
    interval_score,
    load_source,
    neighbors,
    predicted,
    predictions,
    source_names,
    summary,
    tuned,
    weighted_median,
)
from prestage.engine.load import load_inputs
from prestage.engine.prediction import Range
from prestage.engine.scenario.scenario import load_scenario
from prestage.errors import InputError
from prestage.output.published import told
from prestage.output.published_plot import check_picture, write_picture


def said(name: str, measured: float, ours: float | None, **row: Any) -> Predicted:
    """A row of source `name` of which we predict `ours`, from half to twice of it."""
    known = Row(id=row.pop("id", name), what="a run", measured=measured, **row)
    if ours is None:
        return Predicted(known, name, reason="nothing here does that")
    return Predicted(known, name, ours, Range(ours / 2, ours, ours * 2))


@pytest.mark.parametrize("name", source_names())
def test_a_source_says_where_it_is_from_and_what_was_assumed(name: str) -> None:
    source = load_source(name)
    assert source.source and source.notes
    assert len({row.id for row in source.rows}) == len(source.rows)


def test_the_committed_table_has_every_row_and_comes_to_what_the_page_says() -> None:
    rows = rows_of(NOW)
    assert [row.row.id for row in rows] == [row.id for name in source_names() for row in load_source(name).rows]
    found = summary(rows)
    assert len(found["not_run"]) == 1 and found["ordered"] / found["ordered_of"] >= 0.9
    assert found["interval_score"] < summary(rows_of(FIRST))["interval_score"]
    page = (Path(__file__).parent.parent / "docs" / "runtimes.md").read_text(encoding="utf-8")
    assert published_figures() in page and published_rows() in page


def test_no_two_rows_of_the_table_have_one_id() -> None:
    ids = [row.id for name in source_names() for row in load_source(name).rows]
    assert len(ids) == len(set(ids)) and len(ids) > 70


def test_a_row_of_components_is_predicted_with_its_range() -> None:
    rows = {row.row.id: row for row in predictions(["colibri"])}
    both = rows["R27-both"]
    assert both.scenario is not None and both.scenario["machine"] and "seed" not in both.scenario
    # 70 and 56 GB/s want 126 of what two cores' memory gives together.
    assert both.value is not None and both.range is not None
    assert both.range.p5 < both.value <= 126 and both.range.p5 < both.range.p95


def test_of_a_request_the_prompt_takes_time_too() -> None:
    source = load_source("llmfit")
    (row,) = (each for each in source.rows if each.id == "R2")
    whole = predicted(row, source, draws=3)
    decoding = predicted(row.model_copy(update={"unit": "tokens/s", "answer": 48}), source, draws=3)
    prompt = predicted(row.model_copy(update={"unit": "prompt tokens/s", "answer": None}), source, draws=3)
    assert whole.value is not None and decoding.value is not None and prompt.value is not None
    first_s = 22 / prompt.value
    assert whole.value == pytest.approx(300 / (first_s + 299 / decoding.value), rel=1e-3)
    assert whole.range is not None and whole.range.p5 < whole.range.p50 < whole.range.p95
    # Of a longer answer the prompt is a smaller part.
    longer = predicted(row.model_copy(update={"answer": 3000}), source, draws=3).value
    assert longer is not None and whole.value < longer < decoding.value


@pytest.mark.parametrize("left_out", ["prompt", "answer"])
def test_a_whole_request_has_a_prompt_and_an_answer(left_out: str) -> None:
    row = {"id": "x", "what": "x", "measured": 1, "unit": "tokens/s of a request", "prompt": 22, "answer": 300}
    del row[left_out]
    with pytest.raises(ValueError, match="give the tokens of its prompt and of its answer"):
        Row.model_validate(row)


def test_what_cannot_be_run_says_why() -> None:
    source = load_source("ktransformers")
    (row,) = [row for row in source.rows if row.id == "R16b"]
    assert "tensor parallelism" in (predicted(row, source).reason or "")
    unknown = row.model_copy(update={"missing": None, "settings": ("model.preset=nobody",)})
    assert "model" in (predicted(unknown, source).reason or "")


def test_routing_is_tuned_to_a_stated_share_found() -> None:
    settings = [
        "workload.tokens=60",
        "memory.gpu_budget=25%",
        "prefetch.lookahead=0",
        "model.preset=olmoe-1b-7b",
        "model.layers=2",
    ]
    inputs = load_inputs(
        load_scenario("synthetic", [*settings, "workload.synthetic.tokens=60", "workload.synthetic.prefill_tokens=0"])
    )
    for share in (0.8, 0.9):
        assert found_share(tuned(inputs, share)) == pytest.approx(share, abs=0.03)
    least = found_share(tuned(inputs, 0.1))  # without any reuse
    assert 0.1 < least < 0.8


def test_over_a_drive_what_is_read_from_no_drive_is_found() -> None:
    settings = ["workload.tokens=20", "model.preset=olmoe-1b-7b", "model.layers=2", "memory.gpu_budget=8experts"]
    settings += ["workload.synthetic.tokens=20", "workload.synthetic.prefill_tokens=0", "prefetch.lookahead=0"]
    drive = ["machine.profile=gpu=none, cpu=16 cores, ram=64GB DDR5-5600, drive=7GB/s"]
    little, much = (
        found_share(load_inputs(load_scenario("synthetic", [*settings, *drive, f"tiers.host_budget={share}"])))
        for share in ("15%", "100%")
    )
    assert little < 0.7 < 0.85 < much, "in a cache of all experts only the first look-ups miss"


# What the table comes to.


def test_every_source_weighs_the_same() -> None:
    # One source with an error of 10 %, the other with ten of 50 %: the lesser half of the weight is the first's.
    rows = [said("a", 100, 110)] + [said("b", 100, 150, id=f"b{n}") for n in range(10)]
    assert summary(rows)["median_error"] == pytest.approx(0.1)
    assert summary(rows)["within_p5_p95"] == pytest.approx(1.0)


def test_what_was_not_run_is_outside_its_range() -> None:
    found = summary([said("a", 100, 100), said("b", 100, None)])
    assert (found["within_p5_p95"], found["not_run"]) == (0.5, ["b"])
    assert "1 of them not run" in told(found)


def test_the_weighted_median_is_where_half_the_weight_is_reached() -> None:
    assert weighted_median([(1.0, 0.2), (3.0, 0.5), (2.0, 0.3)]) == 2.0
    assert weighted_median([]) is None


def test_an_interval_is_scored_by_its_width_and_by_twenty_times_what_it_misses() -> None:
    assert interval_score(50, 200, 100) == pytest.approx(math.log(4))
    assert interval_score(50, 200, 400) == pytest.approx(math.log(4) + 20 * math.log(2))


def test_neighbors_are_ordered_as_measured_or_not() -> None:
    figures = {"one": (10, 9), "two": (20, 8), "three": (20.5, 30)}
    rows = [said("a", *pair, id=name, group="g") for name, pair in figures.items()]
    # 20 and 20.5 differ by less than 5 %.
    assert list(neighbors(rows)) == [("one", "two", False)]


# Output.


def test_the_picture_is_drawn_and_a_path_that_is_none_refused(tmp_path: Path) -> None:
    rows = [said("a", 10, 12).plain(), said("b", 0.5, 0.4, unit="s/token").plain()]
    write_picture(rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5_000
    for path in (tmp_path / "p.txt", tmp_path / "none" / "p.png"):
        with pytest.raises(InputError, match="--out"):
            check_picture(path)


def test_a_row_is_printed_as_data_with_its_share_found() -> None:
    row = said("a", 10, 12).plain()
    assert row["error"] == pytest.approx(0.2) and row["within"] and row["p5"] == 6 and row["p95"] == 24


def test_what_we_say_is_faster_won_in_nine_of_ten_published_pairs_and_each_other_one_is_explained() -> None:
    said = {frozenset((won.row.id, lost.row.id)): verdict((won, lost)) for won, lost in pairs()}
    wrong = {pair for pair, found in said.items() if found != "agrees"}
    assert len(said) >= 40 and len(wrong) <= len(said) / 10
    assert wrong <= WHY.keys()
