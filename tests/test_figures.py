"""The figures of a run: their numbers worked by hand, and that both backends draw every one of them from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from prestage.engine.measure.recording import FATES, LATE, MISS
from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.simulate import simulate
from prestage.output.figure_forms import Bars, Curves, Data, Fall, FigureError, Grid, Memory, Part, Spans
from prestage.output.figures import (
    FIGURES,
    access_latency,
    busy_over_time,
    fall,
    figure_data,
    lane_time,
    memory_over_time,
    outcomes_by_layer,
    paired,
    prefetched_bytes,
    time_parts,
    timeline,
    token_latency,
)
from prestage.output.figures_html import draw_html, figure_html, legend, link
from prestage.output.figures_static import draw
from prestage.output.palette import COLORS, FATE_COLORS, OUTCOME_COLORS, PART_COLORS
from prestage.output.pictures import save
from prestage.output.saved import TABLES, Run, run_of
from prestage.resources.timeline import DEMAND, DENSE, EXPERT, HEAD, PREFETCH, Timeline

MS = 10**6
MIB = 2**20
#: As every outcome and every fate of a layer's: none.
NONE = dict.fromkeys(("prefetch_hit", "cache_hit", "late", "miss"), 0)


def rows(table: str, *values: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.array(list(values), dtype=TABLES[table])


def made_timeline(gpus: int = 1) -> Timeline:
    """20 ms on each GPU: dense 0-3, an expert 10-17 and head 17-20 behind copies at 3-10 and 10-14."""
    made = Timeline()
    made.add_lane("host", "host", "host thread")  # never used
    for gpu in range(gpus):
        h2d = made.add_lane(f"gpu{gpu}", "h2d", "copy engine H2D")
        compute = made.add_lane(f"gpu{gpu}", "compute", "compute stream")
        for start, end, expert, visit, copy, lane, kind in (
            (0, 3, -1, 0, -1, compute, DENSE),
            (3, 10, 5, 0, 0, h2d, DEMAND),
            (10, 14, 9, 0, 1, h2d, PREFETCH),
            (10, 17, 5, 0, 0, compute, EXPERT),
            (17, 20, -1, 1, -1, compute, HEAD),
        ):
            made.record(start * MS, end * MS, 0, expert, visit, copy, lane, kind)
    return made


def made_run(**changes: Any) -> Run:
    """A run of two layers of eight experts with the timeline above; its counts are made up to tell columns apart."""
    split = {
        "compute_ms": 13.0,
        "stall_ms": 7.0,
        "host_ms": 0.0,
        "predictor_ms": 0.0,
        "bubble_ms": 0.0,
        "drain_ms": 0.0,
    }
    data = {
        "makespan_ms": 20.0,
        "time": split,
        "gpus": [{"device": "gpu0", "time": split}],
        "by_layer": [{"layer": 0, **NONE, "cache_hit": 3, "miss": 1}, {"layer": 1, **NONE}],
        "inter_token_latency_ms": {"mean": 20.0, "p50": 20.0, "p95": 20.0, "p99": None},
        "warmup": {"steps": 0, "decode_tokens": 0, "ms": 0.0},
        "model": {"name": "made", "layers": 2, "experts": 8, "top_k": 1},
        "scenario": {"machine": {"profile": "nowhere"}},
    }
    run = Run(
        "made",
        data,
        made_timeline(),
        rows("access", (0, 0, 5, MISS, 7 * MS), (0, 0, 6, 1, 0), (1, 1, 9, LATE, 2 * MS), (1, 1, 9, 1, 0)),
        rows("copy", (0, 0, -1, 5 * MIB), (1, 1, FATES.index("useful"), 3 * MIB), (1, 1, FATES.index("wasted"), MIB)),
        rows("memory", (3 * MS, MIB, 8 * MIB, 0), (10 * MS, MIB, 8 * MIB, 0), (12 * MS, 4 * MIB, 8 * MIB, 0)),
        rows("token", (20 * MS, -1), (30 * MS, 40 * MS)),
    )
    return replace(run, **changes)


@pytest.fixture(scope="module")
def default_runs() -> list[Run]:
    """The first tokens of scenario guide, and the same without prefetch."""
    settings = ["workload.tokens=60"], ["workload.tokens=60", "prefetch.lookahead=0"]
    results = [simulate(load_scenario("guide", each)) for each in settings]
    return [run_of(result, name) for result, name in zip(results, ("guide", "no prefetch"), strict=True)]


def values(bars: Bars) -> dict[str, list[float]]:
    return {part.label: part.values.tolist() for part in bars.parts}


# Worked by hand.


def test_time_is_split_as_the_result_says_a_row_for_each_gpu_and_empty_parts_left_out() -> None:
    bars = time_parts(made_run())
    assert (bars.rows, values(bars)) == (["gpu0"], {"compute": [13.0], PART_COLORS["stall"][1]: [7.0]})
    run = made_run()
    idle = {**run.data["time"], "stall_ms": 0.0, "bubble_ms": 7.0}
    gpus = [{"device": "gpu0", "time": run.data["time"]}, {"device": "gpu1", "time": idle}]
    bars = time_parts(replace(run, data={**run.data, "gpus": gpus}))
    assert bars.rows == ["gpu0", "gpu1"]
    bubble = PART_COLORS["bubble"][1]
    assert values(bars) == {"compute": [13.0, 13.0], PART_COLORS["stall"][1]: [7.0, 0.0], bubble: [0.0, 7.0]}


def test_a_lane_is_busy_with_kinds_of_work_and_else_idle() -> None:
    bars = lane_time(made_run())
    assert bars.rows == ["copy engine H2D", "compute stream"]
    assert values(bars) == {
        COLORS["demand"][1]: [7, 0],
        COLORS["prefetch"][1]: [4, 0],
        COLORS["dense"][1]: [0, 3],
        COLORS["expert"][1]: [0, 7],
        COLORS["head"][1]: [0, 3],
        "idle": [9, 7],  # of 20 ms
    }


def test_lanes_of_several_gpus_carry_their_device() -> None:
    bars = lane_time(made_run(timeline=made_timeline(gpus=2)))
    lanes = ("copy engine H2D", "compute stream")
    assert bars.rows == [f"{gpu}: {lane}" for gpu in ("gpu0", "gpu1") for lane in lanes]


def test_a_layer_without_accesses_has_no_shares() -> None:
    grid = outcomes_by_layer(made_run())
    assert grid.columns == ["0", "1"] and grid.rows == [label for _, label in OUTCOME_COLORS.values()]
    np.testing.assert_array_equal(grid.shares, [[0, np.nan], [0.75, np.nan], [0, np.nan], [0.25, np.nan]])
    np.testing.assert_array_equal(grid.counts, [[0, 0], [3, 0], [0, 0], [1, 0]])


def test_prefetched_bytes_stand_by_layer_and_fate_and_a_copy_on_demand_is_none_of_them() -> None:
    bars = prefetched_bytes(made_run())
    assert bars.unit == "MiB"
    assert values(bars) == {FATE_COLORS["useful"][1]: [0, 3], FATE_COLORS["wasted"][1]: [0, 1]}
    assert prefetched_bytes(made_run(copies=rows("copy", (0, 0, -1, 5 * MIB)))).parts == []


def test_memory_has_a_point_where_it_changes_and_one_at_the_end_of_the_run() -> None:
    (gpu,) = memory_over_time(made_run()).gpus.values()
    time_ns, sizes, limits = (each.tolist() for each in gpu)
    assert time_ns == [3 * MS, 12 * MS, 20 * MS]
    assert sizes == [MIB, 4 * MIB, 4 * MIB] and limits == [8 * MIB] * 3


def test_memory_of_several_gpus_is_told_apart() -> None:
    memory = rows("memory", (1 * MS, 1, 9, 0), (2 * MS, 5, 7, 1), (3 * MS, 2, 9, 0))
    gpus = memory_over_time(made_run(timeline=made_timeline(gpus=2), memory=memory)).gpus
    assert {name: series[1].tolist() for name, series in gpus.items()} == {"gpu0": [1, 2, 2], "gpu1": [5, 5]}


def test_a_long_memory_is_thinned_to_the_most_of_each_stretch() -> None:
    # Every other sample is 1, but for one peak: of 100,000 changes a few thousand points are left, the peak among them.
    count = 100_000
    memory = np.zeros(count, dtype=TABLES["memory"])
    memory["time_ns"], memory["assigned_bytes"], memory["budget_bytes"] = np.arange(count), np.arange(count) % 2, 100
    memory["assigned_bytes"][77_777] = 50
    (gpu,) = memory_over_time(made_run(memory=memory)).gpus.values()
    assert len(gpu[0]) < 5000
    assert (int(gpu[1].max()), int(gpu[0][gpu[1].argmax()]), int(gpu[0][-1])) == (50, 77_777, 20 * MS)


def test_latency_is_the_share_that_waits_no_longer_of_late_ones_of_misses_and_of_all() -> None:
    late, miss, everything = access_latency(made_run()).curves
    assert (late.x.tolist(), late.y.tolist()) == ([2.0, 2.0], [0.0, 1.0])
    assert (miss.x.tolist(), miss.y.tolist()) == ([7.0, 7.0], [0.0, 1.0])
    assert (everything.x.tolist(), everything.y.tolist()) == ([0.0, 0.0, 2.0, 7.0], [0.0, 0.5, 0.75, 1.0])


def test_a_distribution_of_many_keeps_its_ends_and_its_shares() -> None:
    accesses = np.zeros(10_001, dtype=TABLES["access"])
    accesses["outcome"], accesses["wait_ns"] = MISS, np.arange(10_001)[::-1]
    miss, _ = access_latency(made_run(accesses=accesses)).curves
    assert len(miss.x) <= 501
    np.testing.assert_allclose(miss.y[1:], (miss.x[1:] * 1e6 + 1) / 10_001)
    assert (miss.x[0], miss.x[-1]) == (0, 0.01)


def test_time_between_tokens_has_its_percentiles_where_there_are_some_and_the_steps_beside() -> None:
    curves = token_latency(made_run())
    gaps, steps = curves.curves
    assert (gaps.x.tolist(), gaps.y.tolist()) == ([40, 40], [0, 1])  # a first token follows none
    assert (steps.x.tolist(), steps.y.tolist()) == ([20, 20, 30], [0, 0.5, 1])
    assert curves.marks == {"p50": 20.0, "p95": 20.0}
    assert token_latency(made_run(tokens=rows("token"))).curves == []


def test_busy_time_is_averaged_over_intervals_and_over_lanes_of_a_role() -> None:
    compute, copies = busy_over_time(made_run()).curves
    # 200 intervals of 0.1 ms: the compute stream runs from 0 to 3 and from 10 to 20, copies from 3 to 14.
    at = {0.05: (1, 0), 2.95: (1, 0), 3.05: (0, 1), 9.95: (0, 1), 10.05: (1, 1), 14.05: (1, 0), 19.95: (1, 0)}
    for ms, expected in at.items():
        found = [curve.y[np.searchsorted(curve.x, ms) - 1] for curve in (compute, copies)]
        assert found == pytest.approx(expected), ms
    again = busy_over_time(made_run(timeline=made_timeline(gpus=2))).curves
    np.testing.assert_allclose(again[0].y, compute.y)  # both GPUs do the same, so the mean is that of one


def test_a_timeline_is_looked_at_where_the_static_picture_looks() -> None:
    shown = timeline(made_run())
    assert (shown.start_ns, shown.end_ns, shown.layers, shown.experts_per_layer) == (0, 20 * MS, 2, 8)


def test_a_fall_leads_from_one_makespan_to_the_other_over_the_parts_that_differ() -> None:
    first, second = made_run(), made_run(name="other")
    second.data["gpus"][0]["time"] = {**second.data["time"], "stall_ms": 4.0, "host_ms": 1.0}
    second.data["makespan_ms"] = 18.0
    steps = [(step.name, step.start_ns / MS, step.end_ns / MS) for step in fall(first, second).steps]
    assert steps == [("first", 0, 20), ("stall", 20, 17), ("host", 17, 18), ("second", 0, 18)]


def test_a_wrong_name_or_number_of_runs_is_refused_with_what_would_be_right() -> None:
    with pytest.raises(FigureError, match=r"KIND = 'memroy': choose one of time, .*did you mean 'memory'"):
        figure_data("memroy", [made_run()])
    with pytest.raises(FigureError, match="memory is drawn from one result, not from 2"):
        figure_data("memory", [made_run(), made_run()])
    with pytest.raises(FigureError, match="waterfall is drawn from two results, not from 1"):
        figure_data("waterfall", [made_run()])


def test_timelines_of_two_runs_lie_one_above_the_other_to_one_scale_each_from_its_own_start() -> None:
    first, second = made_run(), made_run(name="other")
    upper, lower = draw("timeline", [first, second]).axes
    assert [axes.get_title(loc="left") for axes in (upper, lower)] == [
        "made: made on nowhere",
        "other: made on nowhere",
    ]
    width_ms = [right - left for left, right in (upper.get_xlim(), lower.get_xlim())]
    assert width_ms == [20.0, 20.0] and upper.get_xlim()[0] == timeline(first).start_ns / MS


def test_percentiles_are_named_under_the_axis_where_no_curve_crosses_them() -> None:
    curves = figure_data("tokens", [made_run()])
    assert isinstance(curves, Curves)
    assert curves.x_words == "time of a decode token (ms)\np50 20, p95 20"
    (axes,) = draw("tokens", [made_run()]).axes
    assert axes.get_xlabel() == curves.x_words and not axes.texts
    first, second = draw_html(curves), draw_html(replace(curves, marks={"p50": 3.0}))
    link(first, second)
    assert first.x_range is second.x_range


def test_bars_of_two_runs_stand_on_one_axis_row_by_row() -> None:
    first, second = made_run(), made_run(name="other")
    second.data["gpus"][0]["time"] = {**second.data["time"], "stall_ms": 4.0}
    both, alone = figure_data("time", [first, second]), figure_data("time", [first])
    assert isinstance(both, Bars) and isinstance(alone, Bars)
    assert both.rows == [f"{row}: {name}" for row in alone.rows for name in ("made", "other")]
    values = {part.label: part.values.tolist() for part in both.parts}
    assert {label: held[0] for label, held in values.items()} == {part.label: part.values[0] for part in alone.parts}
    assert values["stall: an expert missing"][1] == 4.0 and both.axis == alone.axis


def test_a_row_that_one_of_two_runs_lacks_is_0_there() -> None:
    one = Bars(["a", "b"], [Part("x", "#000", np.array([1.0, 2.0]))], "ms", "ms")
    other = Bars(["b", "c"], [Part("y", "#111", np.array([3.0, 4.0]))], "ms", "ms")
    both = paired([one, other], ["1", "2"])
    assert both.rows == ["a: 1", "a: 2", "b: 1", "b: 2", "c: 1", "c: 2"]
    assert {part.label: part.values.tolist() for part in both.parts} == {
        "x": [1, 0, 2, 0, 0, 0],
        "y": [0, 0, 0, 3, 0, 4],
    }


# Conformance: every figure, also tomorrow's.


def of_figure(name: str, runs: list[Run]) -> list[Run]:
    return runs[: FIGURES[name].runs]


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_of_the_default_run_is_printed(name: str, default_runs: list[Run], tmp_path: Path) -> None:
    save(draw(name, of_figure(name, default_runs)), tmp_path / "figure.pdf")
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("name", FIGURES)
def test_names_are_no_formulas(name: str, tmp_path: Path) -> None:
    # Balanced, and no formula that matplotlib knows: the words of a name, which are drawn as they are.
    made = made_run(name="$\\frac{$ run")
    made = replace(made, data={**made.data, "model": {**made.data["model"], "name": "$\\nosuch$"}})
    runs = [made, replace(made, name="$_$")]
    save(draw(name, of_figure(name, runs)), tmp_path / "f.svg")


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_of_the_default_run_is_a_plot_of_its_data(name: str, default_runs: list[Run]) -> None:
    plot = figure_html(name, of_figure(name, default_runs))
    assert plot.sizing_mode == "stretch_width"
    assert any(len(column) for drawn in plot.renderers for column in drawn.data_source.data.values())


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_says_what_it_is_and_how_to_read_it(name: str) -> None:
    assert FIGURES[name].title and FIGURES[name].reading.endswith(".")


@pytest.mark.parametrize("name", ["time", "lanes", "wasted"])
def test_print_and_page_draw_the_same_bars_in_the_same_colors(name: str, default_runs: list[Run]) -> None:
    across = name != "wasted"
    printed = {
        (to_hex(bars[0].get_facecolor()), at): (bar.get_width() if across else bar.get_height())
        for bars in draw(name, default_runs[:1]).axes[0].containers
        for at, bar in enumerate(bars)
    }
    plot = figure_html(name, default_runs[:1])
    shown = {
        (drawn.glyph.fill_color, at): end - start
        for drawn in plot.renderers
        if hasattr(drawn.glyph, "fill_color")
        for at, (start, end) in enumerate(
            zip(drawn.data_source.data["from"], drawn.data_source.data["to"], strict=True)
        )
    }
    assert shown.keys() == printed.keys()
    for key, value in printed.items():
        assert shown[key] == pytest.approx(value, abs=1e-9)


def test_several_gpus_need_no_other_code(tmp_path: Path) -> None:
    run = made_run(
        timeline=made_timeline(gpus=2),
        memory=rows("memory", (1 * MS, 1, 9, 0), (2 * MS, 5, 7, 1)),
    )
    run.data["gpus"] = [{"device": f"gpu{gpu}", "time": run.data["time"]} for gpu in range(2)]
    for name in ("time", "lanes", "timeline", "busy", "memory"):
        save(draw(name, [run]), tmp_path / f"{name}.png")
        assert figure_html(name, [run]).renderers


# On a page.


def shown_spans(plot: Any) -> list[tuple[str, float, float, int]]:
    """The spans that a timeline draws before it has moved: label, from, to and row."""
    return [
        (drawn.name, *values)
        for drawn in plot.renderers
        if "span" in drawn.tags
        for values in zip(*(drawn.data_source.data[column] for column in ("from", "to", "row")), strict=True)
    ]


def test_a_timeline_draws_at_first_what_is_seen_at_first() -> None:
    plot = draw_html(Spans(made_timeline(), 2, 8, 4 * MS, 15 * MS))
    assert sorted(shown_spans(plot)) == [
        (COLORS["demand"][1], 3, 10, 0),
        (COLORS["expert"][1], 10, 17, 1),
        (COLORS["prefetch"][1], 10, 14, 0),
    ]
    assert (plot.x_range.start, plot.x_range.end, plot.x_range.bounds) == (4, 15, (0, 20))


def test_a_long_timeline_is_cut_around_what_is_seen_at_first() -> None:
    # 100 spans of 1 ms; of ten around 50 to 52 ms, none starts before 45 or ends after 57.
    long = Timeline()
    lane = long.add_lane("gpu0", "compute", "compute stream")
    for at in range(100):
        long.record(at * MS, (at + 1) * MS, 0, -1, at, -1, lane, DENSE)
    plot = draw_html(Spans(long, 2, 8, 50 * MS, 52 * MS), limit=10)
    low, high = plot.x_range.bounds
    assert high - low == 10 and low <= 50 and high >= 52
    assert draw_html(Spans(long, 2, 8, 50 * MS, 52 * MS), limit=None).x_range.bounds == (0, 100)


def test_a_time_late_in_a_long_run_keeps_its_nanoseconds() -> None:
    long = Timeline()
    lane = long.add_lane("gpu0", "compute", "compute stream")
    hour_ns = 3600 * 10**9
    long.record(hour_ns + 1, hour_ns + 4, 0, -1, 0, -1, lane, DENSE)
    ((_, start, end, _),) = shown_spans(draw_html(Spans(long, 2, 8, hour_ns, hour_ns + 10)))
    assert end - start == pytest.approx(3e-6, abs=1e-9)  # of 3.6 million ms


def test_a_legend_names_only_what_is_there() -> None:
    assert legend(timeline(made_run())) == [
        (label, color)
        for kind, (color, label) in COLORS.items()
        if kind in ("demand", "prefetch", "dense", "expert", "head")
    ]
    assert legend(memory_over_time(made_run())) == []
    memory = rows("memory", (1 * MS, 1, 9, 0), (2 * MS, 5, 7, 1))
    several = memory_over_time(made_run(timeline=made_timeline(gpus=2), memory=memory))
    assert [label for label, _ in legend(several)] == ["gpu0", "gpu1"]


def test_two_plots_of_one_kind_share_their_axes_unless_their_units_differ() -> None:
    first, second = (
        draw_html(token_latency(made_run())),
        draw_html(token_latency(made_run(tokens=rows("token", (60 * MS, -1))))),
    )
    link(first, second)
    assert first.x_range is second.x_range and first.x_range.end == pytest.approx(61.2)
    small = made_run(copies=rows("copy", (1, 1, 0, 3)))
    bars = [draw_html(prefetched_bytes(run)) for run in (made_run(), small)]
    link(*bars)
    assert bars[0].y_range is not bars[1].y_range  # MiB and bytes


@pytest.mark.parametrize("form", [Bars, Grid, Memory, Curves, Spans, Fall])
def test_every_form_of_data_is_that_of_some_figure(form: type[Data], default_runs: list[Run]) -> None:
    assert form in {type(figure_data(name, of_figure(name, default_runs))) for name in FIGURES}
