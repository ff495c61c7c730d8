"""The figures of requests under load: their data by hand, drawn by both, and on a page beside what they come to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from prestage.engine.scenario.scenario import make_scenario
from prestage.engine.simulate import simulate
from prestage.output.capacity_plot import plot_capacity
from prestage.output.figure_forms import FigureError
from prestage.output.figures import REQUEST_FIGURES, concurrency, figure_data, first_token, requests_over_time
from prestage.output.figures_html import draw_html, legend
from prestage.output.figures_static import draw
from prestage.output.pictures import save
from prestage.output.report import run_sections
from prestage.output.saved import REQUEST_ROW, STEP_ROW, Run, run_of

MS = 10**6


def made(*requests: tuple[int, int, int, int]) -> Run:
    """A run of requests of (arrival, start, first token, end) in ms."""
    table = np.zeros(len(requests), dtype=REQUEST_ROW)
    table["number"] = np.arange(len(requests))
    for place, field in enumerate(("arrival_ns", "started_ns", "first_token_ns", "finished_ns")):
        table[field] = [request[place] * MS for request in requests]
    return cast(Run, SimpleNamespace(name="made", title="made", requests=table))


def test_requests_stand_in_order_of_arrival_with_what_they_went_through() -> None:
    found = requests_over_time(made((5, 5, 9, 9), (0, 2, 3, 20)))
    assert found.names == ["request 1", "request 0"]
    bars = {
        part.label: list(zip(part.row.tolist(), part.from_ms.tolist(), part.to_ms.tolist(), strict=True))
        for part in found.parts
    }
    # Request 0 did not wait, and its first token was its last.
    assert bars == {"waits": [(0, 0, 2)], "until its first token": [(0, 2, 3), (1, 5, 9)], "tokens": [(0, 3, 20)]}
    assert [label for label, _ in legend(found)] == list(bars)


def test_of_many_requests_those_in_the_middle_are_drawn() -> None:
    found = requests_over_time(made(*((at, at, at + 1, at + 2) for at in range(250))))
    assert (found.names[0], found.names[-1], len(found.names)) == ("request 50", "request 199", 150)


def test_waits_for_the_first_token_and_in_the_queue_are_spread_by_request() -> None:
    data = first_token(made((0, 0, 10, 30), (0, 20, 40, 50)))
    queueing, first = data.curves
    assert queueing.x.tolist() == [0, 0, 20] and queueing.y.tolist() == [0, 0.5, 1]
    assert first.x.tolist() == [10, 10, 40] and first.y.tolist() == [0, 0.5, 1]
    assert data.marks == {"p50": 25.0, "p95": pytest.approx(38.5), "p99": pytest.approx(39.7)}


def test_who_runs_and_waits_is_averaged_over_time_and_added_up_over_replicas() -> None:
    # Steps from 0 to 100 ms and from 150 to 200, and beside the latter another replica's: 50 ms without one between.
    steps = np.zeros(3, dtype=STEP_ROW)
    steps["start_ns"], steps["end_ns"] = [0, 150 * MS, 150 * MS], [100 * MS, 200 * MS, 200 * MS]
    steps["running"], steps["waiting"], steps["kv_blocks"] = [2, 1, 3], [0, 0, 0], [10, 20, 20]
    run = cast(Run, SimpleNamespace(name="made", requests=np.zeros(1, dtype=REQUEST_ROW), steps=steps))
    running, waiting, blocks = concurrency(run).curves
    assert running.label == "running requests, up to 4" and blocks.label == "KV blocks, up to 40"
    for at_ms, share, held in ((50.5, 0.5, 0.25), (120.5, 0.0, 0.0), (160.5, 1.0, 1.0)):
        place = np.searchsorted(running.x, at_ms, side="right") - 1
        assert (running.y[place], blocks.y[place], waiting.y[place]) == (share, held, 0.0)


def test_a_run_of_an_earlier_version_has_no_steps_to_draw(run: Run) -> None:
    earlier = replace(run, steps=None)
    with pytest.raises(FigureError, match="run: does not say what each step held: an earlier version saved it"):
        concurrency(earlier)
    assert "concurrency" not in [section.name for section in run_sections(earlier)]


@pytest.fixture(scope="module")
def run() -> Run:
    asked = {"rate": 60.0, "count": 12, "prompt_tokens": 12, "output_tokens": 4}
    data: dict[str, Any] = {
        "model": {"preset": "gpt-oss-20b", "layers": 2},
        "machine": {"profile": "h200-pcie5"},
        "workload": {"synthetic": {"tokens": 32, "sequences": 2, "prefill_tokens": 8}},
        "memory": {"gpu_budget": "25%"},
        "requests": asked,
    }
    return run_of(simulate(make_scenario(data), baselines=False))


@pytest.mark.parametrize("name", REQUEST_FIGURES)
def test_every_figure_is_printed_and_drawn_on_a_page(name: str, run: Run, tmp_path: Path) -> None:
    save(draw(name, [run]), tmp_path / "figure.pdf")
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
    plot = draw_html(figure_data(name, [run]))
    assert plot.sizing_mode == "stretch_width"
    assert any(len(column) for drawn in plot.renderers for column in drawn.data_source.data.values())
    assert REQUEST_FIGURES[name].reading.endswith(".")


def test_a_page_of_a_run_under_load_says_its_latencies_and_has_these_figures(run: Run) -> None:
    sections = run_sections(run)
    names = [section.name for section in sections]
    assert names[: 2 + len(REQUEST_FIGURES)] == ["summary", "load", *REQUEST_FIGURES]
    assert "first token (TTFT)" in sections[1].html and "running, waiting (mean)" in sections[1].html


def test_a_run_without_requests_is_refused() -> None:
    with pytest.raises(FigureError, match=r"made: has no requests under load: give a run of a scenario with \[req"):
        first_token(cast(Run, SimpleNamespace(name="made", requests=None)))


def test_capacity_is_drawn_over_its_rates_with_what_is_promised() -> None:
    waits = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
    nothing = dict.fromkeys(waits)
    curve = [{"rate": rate, "ttft_ms": waits, "itl_ms": nothing, "e2e_ms": waits} for rate in (1.0, 2.0, 4.0)]
    first, between, _ = plot_capacity({"curve": curve, "rate": 2.0, "slo": {"ttft_ms": 2.5, "share": 0.9}}).axes
    drawn = [[np.asarray(data).tolist() for data in line.get_data()] for line in first.lines]
    assert drawn[:3] == [[[1.0, 2.0, 4.0], [ms] * 3] for ms in (1.0, 2.0, 3.0)]
    assert drawn[3][0] == [2.0, 2.0] and drawn[4][1] == [2.5, 2.5]
    # No request has a gap: nothing is drawn but the rate.
    assert [np.asarray(line.get_xdata()).size for line in between.lines] == [0, 0, 0, 2]
