"""The pictures: what they show is read back from the figure, as drawn."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from test_export import EXPERTS, made_run  # type: ignore[import-not-found]

from prestage.calibration.fit.transfer import from_profile
from prestage.output.charts import CHARTS, plot_sweep
from prestage.output.machine import describe, machine_of
from prestage.output.machine_plot import plot_machine
from prestage.output.palette import COLORS
from prestage.output.pictures import render, save
from prestage.output.plots import default_window, plot_latency, plot_memory, plot_timeline, plot_transfer
from prestage.resources.profile import load_profile
from prestage.resources.timeline import DEMAND, DENSE, EXPERT, HEAD, KINDS, LAUNCH, PREFETCH, Timeline

GIB = 2**30


def picture(timeline: Timeline, **options: Any) -> Figure:
    return plot_timeline(timeline, **{"experts_per_layer": EXPERTS, **options})


def bars_of(figure: Figure) -> list[tuple[int, str, float, float]]:
    """Each bar as (row, color, left, right), in the unit of the axis."""
    bars = []
    for collection in figure.axes[0].collections:
        (color,) = {to_hex(tuple(color)) for color in np.asarray(collection.get_facecolor()).tolist()}
        for path in collection.get_paths():
            corners = np.asarray(path.vertices)
            (left, low), (right, high) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
            bars.append((round((low + high) / 2), color, left, right))
    return bars


def rows_of(figure: Figure) -> list[str]:
    """The names of the rows, from the top."""
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    assert low > high, "row 0 is at the top"
    return [label.get_text() for label in axes.get_yticklabels()]


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def heads(*ends_ns: int) -> Timeline:
    """A run of steps that end at these instants, busy throughout."""
    timeline = Timeline()
    lane = timeline.add_lane("gpu0", "compute", "compute stream")
    start_ns = 0
    for visit, end_ns in enumerate(ends_ns):
        timeline.record(start_ns, end_ns - 1, 0, -1, visit, -1, lane, DENSE)
        timeline.record(end_ns - 1, end_ns, 0, -1, visit, -1, lane, HEAD)
        start_ns = end_ns
    return timeline


def test_the_default_window_is_two_steps_in_the_middle() -> None:
    # Seven steps of 10 ns: the pair that starts at index 3 of the six pairs 0-20, 10-30, ..., 50-70.
    assert default_window(heads(*range(10, 80, 10))) == (30, 50)


def test_the_default_window_passes_over_prefill() -> None:
    # The seven pairs of steps last 20, 20, 110, 200, 110, 20 and 20 ns, so the median is 20: the middle three, which
    # hold a step of 100, are out. Of the rest, the second and the sixth are nearest to the middle: the earlier one.
    assert default_window(heads(10, 20, 30, 130, 230, 240, 250, 260)) == (10, 30)


def test_a_short_run_and_one_without_heads_are_shown_whole_and_an_empty_one_as_nothing() -> None:
    assert default_window(heads(10, 30)) == (0, 30)
    timeline = Timeline()
    lane = timeline.add_lane("gpu0", "compute", "compute stream")
    assert default_window(timeline) == (0, 0)
    timeline.record(5, 9, 0, -1, 0, -1, lane, DENSE)
    assert default_window(timeline) == (5, 9)


def test_the_default_window_of_a_made_run_holds_two_heads() -> None:
    timeline = made_run(5, 31, prefill_steps=3)
    start_ns, end_ns = default_window(timeline)
    spans = timeline.spans()
    ends_ns = spans["end_ns"][spans["kind"] == HEAD]
    assert ((ends_ns > start_ns) & (ends_ns <= end_ns)).sum() == 2
    assert 0.3 < start_ns / ends_ns.max() < 0.9  # prefill takes the first half of the time


def test_bars_are_the_spans_cut_to_the_window_on_the_row_of_their_lane() -> None:
    timeline = Timeline()
    compute = timeline.add_lane("gpu0", "compute", "compute stream")
    h2d = timeline.add_lane("gpu0", "h2d", "copy engine H2D")
    host = timeline.add_lane("host", "host", "host thread")
    for start_us, end_us, lane, kind in (
        (0, 20, host, LAUNCH),  # cut on the left
        (5, 10, h2d, DEMAND),  # ends as the window starts: outside
        (30, 50, h2d, PREFETCH),
        (90, 130, compute, EXPERT),  # cut on the right
        (110, 120, compute, DENSE),  # starts as the window ends: outside
    ):
        timeline.record(start_us * 1000, end_us * 1000, 0, -1, 0, -1, lane, kind)
    figure = picture(timeline, start_ns=10_000, end_ns=110_000)
    assert rows_of(figure) == ["host thread", "copy engine H2D", "compute stream"]
    assert bars_of(figure) == [
        (0, COLORS["launch"][0], 10, 20),
        (1, COLORS["prefetch"][0], 30, 50),
        (2, COLORS["expert"][0], 90, 110),
    ]
    assert legend_of(figure) == [COLORS[kind][1] for kind in ("launch", "prefetch", "expert")]
    assert figure.axes[0].get_xlim() == (10, 110)
    assert "(µs)" in figure.axes[0].get_xlabel()


@pytest.mark.parametrize(("end_ns", "unit"), [(999_999, "µs"), (1_000_000, "ms"), (9 * 10**9, "ms"), (10**10, "s")])
def test_the_unit_of_time_fits_the_window(end_ns: int, unit: str) -> None:
    figure = picture(heads(10), end_ns=end_ns)
    assert f"({unit})" in figure.axes[0].get_xlabel()
    right = figure.axes[0].get_xlim()[1]
    assert right == pytest.approx(end_ns / {"µs": 1e3, "ms": 1e6, "s": 1e9}[unit])


def test_lanes_that_are_never_used_have_no_row_and_several_gpus_name_themselves() -> None:
    timeline = Timeline()
    for device in ("gpu0", "gpu1"):
        for role in ("compute", "d2h", "h2d"):
            timeline.add_lane(device, role, role)
    timeline.add_lane("host", "host", "host thread")
    for lane in (0, 2, 3, 6):
        timeline.record(0, 10, 0, -1, 0, -1, lane, DENSE)
    assert rows_of(picture(timeline)) == ["host thread", "gpu0: h2d", "gpu0: compute", "gpu1: compute"]


def test_wide_bars_say_their_expert_and_narrow_ones_nothing() -> None:
    timeline = Timeline()
    compute = timeline.add_lane("gpu0", "compute", "compute stream")
    expert = 2 * EXPERTS + 7
    for start_ns, end_ns, number, kind in (
        (0, 400, -1, DENSE),
        (400, 800, expert, EXPERT),
        (800, 801, expert, EXPERT),
        (801, 1000, -1, HEAD),
    ):
        timeline.record(start_ns, end_ns, 0, number, 2, 0, compute, kind)
    assert texts_of(picture(timeline)) == ["L2", "L2/E7"]


def test_few_spans_are_all_visible_and_many_keep_their_true_share() -> None:
    def sparse(count: int) -> tuple[Figure, int]:
        """Spans of 1 ns, a thousand apart."""
        timeline = Timeline()
        lane = timeline.add_lane("gpu0", "d2h", "copy engine D2H")
        for number in range(count):
            timeline.record(number * 1000, number * 1000 + 1, 0, -1, 0, -1, lane, DEMAND)
        return picture(timeline, end_ns=count * 1000), count * 1000

    few, span_ns = sparse(100)
    bars = bars_of(few)
    assert len(bars) == 100
    widths = [(right - left) * 1e3 / span_ns for _, _, left, right in bars]
    assert min(widths) * few.get_figwidth() * 150 >= 1  # a pixel of the saved picture, which is wider than the axes
    many, _ = sparse(5000)
    bars = bars_of(many)
    assert sum(right - left for _, _, left, right in bars) * 1e6 == pytest.approx(5000)  # the axis is in ms


def test_a_picture_of_very_many_spans_stays_small() -> None:
    timeline = Timeline()
    lane = timeline.add_lane("gpu0", "compute", "compute stream")
    for number in range(100_000):  # busy half of the time, in pieces that nobody can see
        timeline.record(number * 10, number * 10 + 5, 0, -1, 0, -1, lane, DENSE)
    bars = bars_of(picture(timeline))
    assert len(bars) < 25_000
    assert (bars[0][2], bars[-1][3]) == pytest.approx((0, 999.995))  # µs


def test_every_kind_has_a_color_and_a_name_of_its_own() -> None:
    assert COLORS.keys() == set(KINDS)
    assert len({color for color, _ in COLORS.values()}) == len({name for _, name in COLORS.values()}) == len(KINDS)


@pytest.mark.parametrize("lanes", [0, 1, 3])
def test_a_timeline_without_spans_is_a_picture_that_says_so(lanes: int, tmp_path: Path) -> None:
    timeline = Timeline()
    for number in range(lanes):
        timeline.add_lane("gpu0", "compute", f"stream {number}")
    figure = picture(timeline, title="nothing")
    save(figure, tmp_path / "t.png")
    assert texts_of(figure) == ["nothing ran in this window"]
    assert rows_of(figure) == [f"stream {number}" for number in range(lanes)]
    assert legend_of(figure) == []


def test_a_timeline_of_one_span_even_of_no_length_is_a_picture(tmp_path: Path) -> None:
    for end_ns in (0, 1, 10**9):
        timeline = Timeline()
        timeline.record(0, end_ns, 0, -1, 0, -1, timeline.add_lane("gpu0", "compute", "compute stream"), DENSE)
        start_ns, stop_ns = default_window(timeline)
        figure = picture(timeline, start_ns=start_ns, end_ns=stop_ns)
        save(figure, tmp_path / "t.png")
        assert rows_of(figure) == ["compute stream"]
        assert len(bars_of(figure)) == (end_ns > 0)


def test_a_window_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(ValueError, match="end_ns = 5: the window starts at 6"):
        picture(heads(10, 20), start_ns=6, end_ns=5)


@pytest.mark.parametrize("title", [None, "gpt-oss-20b on h200-pcie5"])
def test_nothing_is_clipped_and_the_legend_is_beside_the_data(title: str | None) -> None:
    figures = [
        picture(made_run(2, 3), title=title),
        plot_memory(np.arange(5) * 10**6, np.arange(5) * GIB, 6 * GIB, title=title),
    ]
    for figure in figures:
        figure.draw_without_rendering()
        axes = figure.axes[0]
        shown = [axes.xaxis.label, axes.yaxis.label, axes.title, *axes.texts, *figure.legends]
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            shown.extend(tick.label1 for tick in axis.get_major_ticks() if min(limits) <= tick.get_loc() <= max(limits))
        assert len(shown) > 8
        for artist in shown:
            extent = artist.get_window_extent()
            if extent.width:
                assert extent.x0 >= 0
                assert extent.y0 >= 0
                assert extent.x1 <= figure.bbox.x1
                assert extent.y1 <= figure.bbox.y1
        for legend in figure.legends:
            assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def lines_of(figure: Figure) -> list[Any]:
    """The points of each line as (all x, all y)."""
    return [
        (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist())
        for line in figure.axes[0].get_lines()
    ]


def test_memory_is_a_step_that_holds_until_the_next_change_under_its_limit() -> None:
    time_ns = np.array([0, 10, 20, 30, 40]) * 10**6
    figure = plot_memory(time_ns, np.array([1, 2, 2, 3, 3]) * GIB, 4 * GIB)
    used, limit = lines_of(figure)
    assert used == ([0, 10, 30, 40], [1, 2, 3, 3])
    assert limit[1] == [4, 4]
    assert figure.axes[0].get_lines()[0].get_drawstyle() == "steps-post"
    assert texts_of(figure) == ["limit 4 GiB"]
    assert "(ms)" in figure.axes[0].get_xlabel()
    assert "(GiB)" in figure.axes[0].get_ylabel()


@pytest.mark.parametrize(
    ("budget_bytes", "words"),
    [
        (1000, "limit 1,000 bytes"),
        (4000 * 2**20, "limit 3.906 GiB"),
        (GIB - 2**20, "limit 1,023 MiB"),
        (42 * GIB, "limit 42 GiB"),
    ],
)
def test_the_unit_of_memory_fits_the_limit(budget_bytes: int, words: str) -> None:
    figure = plot_memory(np.array([0, 5]), np.array([0, 10]), budget_bytes)
    assert texts_of(figure) == [words]
    assert figure.axes[0].get_ylim()[1] > lines_of(figure)[1][1][0]  # the limit is inside


@pytest.mark.parametrize("samples", [0, 1])
def test_memory_without_samples_or_with_one_is_a_picture(samples: int, tmp_path: Path) -> None:
    save(plot_memory(np.zeros(samples, int), np.full(samples, 7), 10), tmp_path / "m.png")


def test_memory_needs_as_many_times_as_values() -> None:
    with pytest.raises(ValueError, match=r"assigned_bytes has \(2,\) values, time_ns \(3,\)"):
        plot_memory(np.zeros(3), np.zeros(2), 10)


#: What matplotlib would take for a formula that ends too early, one that has no such command, and no formula.
NOT_FORMULAS = "$\\frac{$ $\\nosuch$ a$ _b"


@pytest.mark.parametrize("ending", [".png", ".pdf", ".svg"])
def test_names_are_no_formulas(ending: str, tmp_path: Path) -> None:
    timeline = Timeline()
    timeline.record(0, 9, 0, 3, 0, -1, timeline.add_lane("gpu0", "compute", NOT_FORMULAS), EXPERT)
    save(picture(timeline, title=NOT_FORMULAS), tmp_path / f"a{ending}")
    rows = [{"settings": {"x": name, "y": 1}, "error": None, "speed": 1.5} for name in (NOT_FORMULAS, "b")]
    rows += [{"settings": {"x": name, "y": 2}, "error": None, "speed": 2.5} for name in (NOT_FORMULAS, "b")]
    rows = [{**row, "budget_bytes": 1} for row in rows]
    for kind in CHARTS:
        save(plot_sweep(kind, rows, figure="speed"), tmp_path / f"{kind}{ending}")
    machine = {**describe(machine_of("h100-x2")), "device": NOT_FORMULAS}
    save(plot_machine(machine), tmp_path / f"machine{ending}")
    save(plot_latency({NOT_FORMULAS: [1.0, 2.0]}, title=NOT_FORMULAS), tmp_path / f"latency{ending}")


@pytest.mark.slow
def test_powers_of_ten_are_formulas_still() -> None:
    figure = plot_transfer(from_profile(load_profile("h200")))
    render(figure, io.BytesIO())
    labels = figure.axes[0].yaxis.get_majorticklabels()
    assert any(label.get_text().startswith("$") and label.get_parse_math() for label in labels)


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_the_same_picture_gives_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}{suffix}"
        save(picture(made_run(4, 2), title="a run"), path)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
    for word in (b"Matplotlib v", b"CreationDate", b"dc:date"):
        assert word not in contents[0]


def test_saving_refuses_other_endings_and_leaves_nothing_behind(tmp_path: Path) -> None:
    figure = picture(heads(10))
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.pdf, \.svg"):
        save(figure, tmp_path / "t.bmp")
    path = tmp_path / "t.png"
    path.write_bytes(b"old")

    def fail(*args: Any, **options: Any) -> None:
        args[0].write(b"half")
        raise RuntimeError("disk")

    figure.savefig = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="disk"):
        save(figure, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.process
def test_matplotlib_is_loaded_only_to_draw_and_its_global_state_never(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from prestage.output import pictures, plots\n"
        "from prestage.resources.timeline import Timeline\n"
        "assert 'matplotlib' not in sys.modules\n"
        "pictures.save(plots.plot_timeline(Timeline(), experts_per_layer=1), sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "t.png"], check=True)
    assert (tmp_path / "t.png").stat().st_size > 0


def test_a_timeline_of_very_many_lanes_is_drawn_in_part_and_says_so() -> None:
    timeline = Timeline()
    for number in range(203):
        timeline.record(0, 10, 0, -1, 0, -1, timeline.add_lane("gpu0", "compute", f"stream {number}"), EXPERT)
    (axes,) = plot_timeline(timeline, experts_per_layer=1).axes
    assert len(axes.get_yticks()) == 200
    assert axes.get_xlabel().endswith("; 3 more lanes are not drawn")
