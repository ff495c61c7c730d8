"""What the rows of a sweep say together, checked by hand, and that the pictures show just that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prestage.engine.measure.insights import (
    Effect,
    InsightError,
    best,
    effects,
    finished,
    front,
    table,
    values_of,
    varying,
)
from prestage.experiments.grid import make_grid, sweep_names
from prestage.output.charts import CHARTS, label_of, plot_sweep
from prestage.output.pictures import save


def row(k: int, budget: str, speed: float | None, memory: int = 2**30, **more: Any) -> dict[str, Any]:
    settings = {"prefetch.k": k, "memory.gpu_budget": budget, "seed": 0}
    figures = {"tokens_per_second": speed, "budget_bytes": memory, "counts": {"miss": 10 * k}}
    return {"settings": settings, "error": None, "scenario": {}, **figures, **more}


#: Speed by k and budget: k matters by 1 at the median, the budget by 10.
ROWS = [
    row(2, "25%", 10.0),
    row(1, "25%", 11.0),
    row(2, "50%", 20.0, 2**31),
    row(1, "50%", 21.0, 2**31),
    {"settings": {"prefetch.k": 99, "memory.gpu_budget": "25%", "seed": 0}, "error": "no", "scenario": {}},
]


def test_rows_with_an_error_or_without_the_figure_are_left_out() -> None:
    kept = finished([*ROWS, row(3, "25%", None)], "tokens_per_second", "counts.miss")
    assert [(one["tokens_per_second"], one["counts.miss"]) for one in kept] == [(10, 20), (11, 10), (20, 20), (21, 10)]


@pytest.mark.parametrize(
    ("rows", "figure", "message"),
    [
        (ROWS, "tokens_per_secnd", "did you mean 'tokens_per_second'"),
        (ROWS[-1:], "tokens_per_second", "no row of this sweep has tokens_per_second"),
        ([row(1, "25%", None)], "tokens_per_second", "no row of this sweep has tokens_per_second"),
    ],
)
def test_a_figure_that_no_row_has_is_refused(rows: list[dict[str, Any]], figure: str, message: str) -> None:
    with pytest.raises(InsightError, match=message):
        finished(rows, figure)


def test_the_median_over_all_other_settings_is_what_a_table_shows() -> None:
    rows = finished(ROWS, "tokens_per_second")
    assert set(varying(rows)) == {"prefetch.k", "memory.gpu_budget"}
    assert table(rows, "prefetch.k", "memory.gpu_budget", "tokens_per_second") == {
        "25%": {1: 11.0, 2: 10.0},
        "50%": {1: 21.0, 2: 20.0},
    }
    assert list(table(rows, "prefetch.k", None, "tokens_per_second")[None].items()) == [(1, 16.0), (2, 15.0)]


def test_values_stand_in_order_if_all_are_numbers_and_else_as_the_rows_have_them() -> None:
    assert values_of([row(k, "25%", 1.0) for k in (4, 1, 4, 2)], "prefetch.k") == [1, 2, 4]
    mixed = [{"settings": {"prefetch.k": value}} for value in (4, "auto", 1)]
    assert values_of(mixed, "prefetch.k") == [4, "auto", 1]


def test_the_strongest_setting_comes_first_with_the_values_at_its_ends() -> None:
    assert effects(finished(ROWS, "tokens_per_second"), "tokens_per_second") == [
        Effect("memory.gpu_budget", "25%", 10.5, "50%", 20.5),
        Effect("prefetch.k", 2, 15.0, 1, 16.0),
    ]


def test_the_front_is_what_no_other_row_beats() -> None:
    memory_and_speed = [(3, 30.0), (1, 10.0), (1, 9.0), (2, 10.0), (3, 31.0), (4, 20.0)]
    rows = finished(
        [row(1, "", speed, memory) for memory, speed in memory_and_speed], "tokens_per_second", "budget_bytes"
    )
    spots = front(rows, "tokens_per_second", "budget_bytes")
    assert [(spot.memory, spot.speed) for spot in spots] == [(1, 10.0), (3, 31.0)]


def test_the_best_row_has_most_or_least_and_of_equals_the_least_memory() -> None:
    memory_and_speed = [(3, 30.0), (1, 30.0), (4, 9.0), (2, 9.0)]
    rows = finished(
        [row(1, "", speed, memory) for memory, speed in memory_and_speed], "tokens_per_second", "budget_bytes"
    )
    found = [best(rows, "tokens_per_second", "budget_bytes", most=most) for most in (True, False)]
    assert [(each["tokens_per_second"], each["budget_bytes"]) for each in found] == [(30.0, 1), (9.0, 2)]


@pytest.mark.parametrize("kind", CHARTS)
def test_every_picture_is_drawn_and_nothing_in_it_is_clipped(kind: str, tmp_path: Path) -> None:
    picture = plot_sweep(kind, ROWS, figure="tokens_per_second")
    save(picture, tmp_path / "sweep.svg")
    assert (tmp_path / "sweep.svg").stat().st_size > 5000
    assert picture.get_axes()[0].has_data()


def test_lines_and_cells_hold_the_figures() -> None:
    (axes,) = plot_sweep("lines", ROWS, x="prefetch.k", by="memory.gpu_budget", figure="tokens_per_second").axes
    lines: list[Any] = list(axes.lines)
    assert [list(line.get_ydata()) for line in lines] == [[11.0, 10.0], [21.0, 20.0]]
    cells = plot_sweep("heatmap", ROWS, x="prefetch.k", by="memory.gpu_budget", figure="tokens_per_second").axes[0]
    assert [text.get_text() for text in cells.texts] == ["11", "10", "21", "20"]


def test_a_picture_that_the_rows_cannot_give_is_refused() -> None:
    with pytest.raises(InsightError, match="KIND = 'pie': choose one of lines"):
        plot_sweep("pie", ROWS, figure="tokens_per_second")
    with pytest.raises(
        InsightError, match=r"key of the grid = 'prefetch.kk': choose one of .*did you mean 'prefetch.k'"
    ):
        plot_sweep("lines", ROWS, x="prefetch.kk", figure="tokens_per_second")
    with pytest.raises(InsightError, match="needs two keys"):
        plot_sweep("heatmap", ROWS[:2], figure="tokens_per_second")
    with pytest.raises(InsightError, match="there is nothing to compare"):
        plot_sweep("tornado", ROWS[:1], figure="tokens_per_second")


@pytest.mark.parametrize("name", sweep_names())
def test_every_shipped_sweep_is_a_grid_whose_scenarios_are_sound(name: str) -> None:
    grid = make_grid(name)
    assert len([grid.scenario(point) for point in grid.points()]) == len(grid) > 1


def test_a_sweep_of_ones_own_is_a_file_that_options_change(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text("[workload.synthetic]\ntokens = 20\n")
    path = tmp_path / "mine.toml"
    path.write_text('scenario = "base.toml"\n[set]\n"workload.tokens" = 9\n[grid]\n"prefetch.k" = [1, 2]\nseed = 3\n')
    grid = make_grid(path, {"prefetch.k": [4]}, settings=["prefetch.lookahead=2"])
    (only,) = [grid.scenario(point) for point in grid.points()]
    assert (only.workload.tokens, only.prefetch.k, only.prefetch.lookahead, only.seed) == (9, 4, 2, 3)
    path.write_text('scenari = "gpt-oss-20b"\n[grid]\n"prefetch.k" = [1, 2]\n')
    with pytest.raises(ValueError, match="scenari: no such key; known keys: scenario, set, grid"):
        make_grid(path)
    with pytest.raises(ValueError, match=r"'guide-insigths': choose one of .*did you mean 'guide-insights'"):
        make_grid("guide-insigths")


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("tokens_per_second", "tokens per second"),
        ("inter_token_latency_ms.p50", "inter token latency, p50 (ms)"),
        ("stall_ms", "stall (ms)"),
        ("memory.gpu_budget", "expert budget"),
        ("memory.eviction", "memory.eviction"),
        ("predictor.latency_us", "predictor.latency (us)"),
    ],
)
def test_an_axis_says_what_it_is_with_its_unit(name: str, label: str) -> None:
    assert label_of(name) == label
