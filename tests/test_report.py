"""The report: a page that needs nothing from elsewhere, says what the runs say, and works in a real browser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import safetensors.numpy
from browser import Browsing, browsing
from test_figures import made_run  # type: ignore[import-not-found]

from prestage import output
from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.simulate import Result, simulate
from prestage.errors import InputError
from prestage.output.figures import FIGURES
from prestage.output.page import PageError, Section, html_picture, html_table, html_tiles, write_page
from prestage.output.report import write_report
from prestage.output.run_folder import write_result
from prestage.output.saved import RUN_FILE, Run, SavedRunError, load_result, load_results, run_of
from prestage.resources.timeline import DENSE, EXPERT, HEAD, Timeline


@pytest.fixture(scope="module")
def result() -> Result:
    return simulate(load_scenario("guide", ["workload.tokens=60"]))


@pytest.fixture(scope="module")
def folder(result: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prestage run --out` writes of the default run's first tokens."""
    out = tmp_path_factory.mktemp("runs") / "first"
    write_result(result, out)
    return out


@pytest.fixture(scope="module")
def two(folder: Path) -> list[Run]:
    """That run, and the same without prefetch."""
    settings = ["workload.tokens=60", "prefetch.lookahead=0"]
    return [load_result(folder), run_of(simulate(load_scenario("guide", settings)), "second")]


@pytest.fixture(scope="module")
def pages(folder: Path, two: list[Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one.html and two.html."""
    where = tmp_path_factory.mktemp("pages")
    write_report([load_result(folder)], where / "one.html")
    write_report(two, where / "two.html")
    return where


# A run, saved and loaded.


def test_a_loaded_run_is_the_run_that_was_written(result: Result, folder: Path) -> None:
    loaded, kept = load_result(folder), run_of(result, "first")
    assert (loaded.name, loaded.data) == (kept.name, orjson.loads(orjson.dumps(result.with_range())))
    assert loaded.timeline.lanes == kept.timeline.lanes
    np.testing.assert_array_equal(loaded.timeline.spans(), kept.timeline.spans())
    for table in ("accesses", "copies", "memory", "tokens"):
        np.testing.assert_array_equal(getattr(loaded, table), getattr(kept, table))
    assert load_result(folder / "result.json", "mine").name == "mine"


def test_a_run_for_a_report_has_ranges_if_it_is_asked() -> None:
    result = simulate(load_scenario("default", ["workload.tokens=4"]), baselines=False)
    assert run_of(result).data.get("range") is None
    band = run_of(result, ranges=True).data["range"]["tokens_per_second"]
    assert band["p5"] < band["p95"]


def test_what_is_saved_of_a_run_gives_its_counts_again(folder: Path) -> None:
    run = load_result(folder)
    counts = run.data["counts"]
    outcomes = np.bincount(run.accesses["outcome"], minlength=4).tolist()
    assert outcomes == [counts[name] for name in ("prefetch_hit", "cache_hit", "late", "miss")]
    assert np.bincount(run.copies["fate"][run.copies["fate"] >= 0], minlength=5).tolist() == [
        *run.data["prefetch"].values()
    ]
    assert int(run.copies["bytes"].sum()) == run.data["bytes"]["demand"] + run.data["bytes"]["prefetch"]
    assert len(run.tokens) == run.data["decode_tokens"]


@pytest.mark.slow
def test_what_two_gpus_did_is_saved_with_the_numbers_of_the_whole_model(tmp_path: Path) -> None:
    result = simulate(load_scenario("pipeline-2", ["workload.tokens=8"]), baselines=False)
    write_result(result, tmp_path)
    run = load_result(tmp_path)
    assert run.gpu_names == ["gpu0", "gpu1"] and set(run.memory["gpu"].tolist()) == {0, 1}
    layers = run.data["model"]["layers"]
    np.testing.assert_array_equal(run.accesses["visit"] % layers, run.accesses["layer"])
    np.testing.assert_array_equal(run.accesses["expert"] // run.data["model"]["experts"], run.accesses["layer"])
    misses = np.bincount(run.accesses["layer"][run.accesses["outcome"] == 3], minlength=layers)
    assert misses.tolist() == [layer["miss"] for layer in run.data["by_layer"]]
    for column, figure in (("took_ns", "decode_step_ms"), ("gap_ns", "inter_token_latency_ms")):
        known = run.tokens[column][run.tokens[column] >= 0] / 1e6
        percentiles = [known.mean(), *np.percentile(known, (50, 95, 99))]
        assert percentiles == pytest.approx([*run.data[figure].values()])
    write_report([run], tmp_path / "report.html")


def test_a_folder_without_a_whole_result_is_refused_with_the_file_and_what_to_do(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SavedRunError, match=r"nowhere: there is no such folder; `prestage run --out .*nowhere` writes"):
        load_result(tmp_path / "nowhere")
    (tmp_path / "result.json").write_bytes((folder / "result.json").read_bytes())
    with pytest.raises(
        SavedRunError, match=r"run\.safetensors: is not there; `prestage run --out .*` writes it beside"
    ):
        load_result(tmp_path)
    whole = (folder / RUN_FILE).read_bytes()
    arrays = safetensors.numpy.load(whole)
    meta = {"meta": orjson.dumps({"lanes": [], "makespan_ns": 1}).decode()}
    short = {name: array[:1] if name == "access.layer" else array for name, array in arrays.items()}
    for content in (b"", whole[:-1], safetensors.numpy.save(arrays), safetensors.numpy.save(short, metadata=meta)):
        (tmp_path / RUN_FILE).write_bytes(content)
        with pytest.raises(SavedRunError, match=r"run\.safetensors: is not what `prestage run --out` writes: "):
            load_result(tmp_path)
    (tmp_path / RUN_FILE).write_bytes(safetensors.numpy.save(arrays, metadata=meta))
    with pytest.raises(SavedRunError, match=r"run\.safetensors: is of another run than the result\.json beside it"):
        load_result(tmp_path)


def test_folders_of_one_name_are_told_apart_by_their_paths(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / folder.name
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    assert [run.name for run in load_results([folder])] == ["first"]
    assert [run.name for run in load_results([folder, other])] == [str(folder), str(other)]


# The page, as written.


class Elements(HTMLParser):
    """All elements of a page, and its text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one.html", "two.html"])
def test_a_report_names_nothing_outside_itself(pages: Path, name: str) -> None:
    page = (pages / name).read_text(encoding="utf-8")
    found = Elements(page).found
    named = [attributes.get(key) for _, attributes in found for key in ("src", "href", "srcset", "data", "action")]
    assert [address for address in named if address and not address.startswith("data:")] == []
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style


@pytest.mark.parametrize("name", ["one.html", "two.html"])
def test_a_report_has_a_section_for_each_figure(pages: Path, name: str) -> None:
    text = Elements((pages / name).read_text(encoding="utf-8")).text
    for figure in FIGURES.values():
        if figure.title != FIGURES["busy"].title and (figure.runs == 1 or name == "two.html"):
            assert figure.title in text


def test_a_report_says_first_what_the_terminal_says(pages: Path, folder: Path) -> None:
    text = Elements((pages / "one.html").read_text(encoding="utf-8")).text
    data = load_result(folder).data
    for said in (
        f"{data['tokens_per_second']:.4g}",
        f"{data['inter_token_latency_ms']['p50']:.4g} ms",
        f"{data['hit_rate']:.1%}",
        f"{data['speedup']:.2f}x",
        f"{data['stall_ms'] / data['makespan_ms']:.1%}",
        f"miss {data['counts']['miss']:,}",
    ):
        assert said in text, said


@pytest.mark.slow
def test_warnings_and_estimates_are_on_the_page_and_names_are_text_not_markup(two: list[Run], tmp_path: Path) -> None:
    notes = {"warnings": ["cliff: it <falls>; climb"], "estimates": {"head": "by the rule"}}
    runs = [replace(run, name=f"<b>{run.name}</script>&", data={**run.data, **notes}) for run in two]
    write_report(runs, tmp_path / "two.html")
    found = Elements((tmp_path / "two.html").read_text(encoding="utf-8"))
    assert found.text.count("cliff: it <falls>; climb") == found.text.count("estimated: head: by the rule") == 1
    assert "<b>first</script>& and <b>second</script>&" in found.text  # what is known about both is said once
    assert "<b>first</script>& against <b>second</script>&" in found.text
    assert [tag for tag, _ in found.found].count("script") == 4  # of the theme, Bokeh's, the figures, ours
    write_report(runs[:1], tmp_path / "one.html")
    text = Elements((tmp_path / "one.html").read_text(encoding="utf-8")).text
    assert text.count("cliff: it <falls>; climb") == text.count("estimated: head: by the rule") == 1


def test_a_comparison_says_which_is_better_and_what_differs(pages: Path, two: list[Run]) -> None:
    page = (pages / "two.html").read_text(encoding="utf-8")
    text = Elements(page).text
    assert "prefetch.lookahead10" in re.sub(r"\s", "", text)
    first, second = (run.data["tokens_per_second"] for run in two)
    judged = re.search(r"tokens per second</td>.*?(better|worse)</td>", page)
    assert judged is not None and judged[1] == ("better" if second > first else "worse")


@pytest.mark.process
def test_the_same_run_gives_the_same_page(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from prestage.output.saved import load_result; "
        "from prestage.output.report import write_report; "
        "write_report([load_result(Path(sys.argv[1]))], Path(sys.argv[2]))"
    )
    pages = [tmp_path / "a.html", tmp_path / "b.html"]
    writers = [subprocess.Popen([sys.executable, "-c", code, str(folder), str(page)]) for page in pages]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert pages[0].read_bytes() == pages[1].read_bytes()


@pytest.mark.parametrize(
    ("runs", "path", "said"),
    [
        ([0], "report.htm", r"report\.htm: a report's file must end in \.html"),
        ([0], "no/report.html", r"report\.html: there is no folder .*no$"),
        ([], "report.html", "a report is of one result, or compares two; 0 are given"),
        ([0, 1, 0], "report.html", "a report is of one result, or compares two; 3 are given"),
        ([0, 0], "report.html", "both results are called first: give two different ones"),
    ],
)
def test_what_cannot_be_written_is_refused(
    runs: list[int], path: str, said: str, two: list[Run], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        write_report([two[number] for number in runs], tmp_path / path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_in_a_figure_opens_a_tag(two: list[Run], tmp_path: Path) -> None:
    # `<!--<script>` would make a browser look for two ends of the script that holds the figures, and show none.
    timeline = Timeline()
    for lane in two[0].timeline.lanes:
        timeline.add_lane(lane.device, lane.role, f"<!--<script>{lane.title}")
    timeline.extend(two[0].timeline.spans().tobytes())
    write_report([replace(two[0], timeline=timeline)], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    figures = page.partition('<script type="application/json" id="figures">')[2].partition("</script>")[0]
    assert "<" not in figures
    assert "<!--<script>" in json.dumps(json.loads(figures))


def test_a_report_that_fails_halfway_leaves_the_old_one(two: list[Run], tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    broken = replace(two[0], data={**two[0].data, "by_layer": None})
    with pytest.raises(TypeError):
        write_report([broken], tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


def test_without_bokeh_it_says_how_to_get_it(two: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "prestage.output.figures_html", raising=False)
    monkeypatch.delattr(output, "figures_html", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "bokeh"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PageError, match=r"a report needs Bokeh, which is not installed: pip install 'bokeh>=3\.9'"):
        write_report(two[:1], tmp_path / "report.html")


# The page, in a browser.

#: In a page: the ranges of its timelines, and the numbers of spans that the bars drawn stand for.
RANGES = """() => [...Bokeh.documents[0].all_models].filter((model) => (model.tags || []).includes("timeline"))
    .map((range) => [range.start, range.end])"""
COUNTS = """() => [...Bokeh.documents[0].all_models].filter((model) => (model.tags || []).includes("span"))
    .flatMap((renderer) => Array.from(renderer.data_source.data.count))"""
#: Moves a timeline, and waits until what has changed is painted.
LOOK = """([start, end]) => {
    [...Bokeh.documents[0].all_models].find((model) => (model.tags || []).includes("timeline")).setv({start, end});
    return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
}"""


@pytest.fixture(scope="module")
def browser(pages: Path) -> Iterator[Browsing]:
    """One browser for all pages, which lie in the folder `pages`."""
    with browsing(pages, height=1000) as at:
        yield at


@contextmanager
def open_page(at: Browsing, name: str, color_scheme: str = "light") -> Iterator[Any]:
    """A page with its figures drawn; at the end, nothing may have gone wrong, and nothing been asked of elsewhere."""
    at.console_errors.clear()
    at.page.emulate_media(color_scheme=color_scheme)
    at.page.goto(f"{at.url}/{name}")
    at.page.wait_for_function("document.documentElement.dataset.ready === 'true'")
    yield at.page
    assert (at.console_errors, at.refused) == ([], [])


def point_at(page: Any, selector: str, right: float, down: float) -> None:
    """Move the pointer to so many pixels within an element."""
    box = page.locator(selector).first
    box.scroll_into_view_if_needed()
    place = box.bounding_box()
    page.mouse.move(place["x"] + right, place["y"] + down)


@pytest.mark.browser
def test_a_report_loads_and_its_timeline_zooms_moves_and_hides(browser: Browsing) -> None:
    with open_page(browser, "one.html") as page:
        assert page.evaluate("document.querySelectorAll('.plot > *').length") == len(FIGURES) - 2
        ((first, last),) = page.evaluate(RANGES)
        point_at(page, "#timeline .plot", 700, 200)
        page.mouse.wheel(0, -400)
        page.wait_for_function(f"({RANGES})()[0][1] - ({RANGES})()[0][0] < {(last - first) * 0.8}")
        ((closer_first, closer_last),) = page.evaluate(RANGES)
        assert first < closer_first < closer_last < last
        page.keyboard.press("d")
        ((moved_first, moved_last),) = page.evaluate(RANGES)
        assert moved_first > closer_first and moved_last - moved_first == pytest.approx(closer_last - closer_first)
        page.click("button[data-action=whole]")
        ((whole_first, whole_last),) = page.evaluate(RANGES)
        assert whole_first == 0 and whole_last > last
        page.click("button[data-action=first]")
        assert page.evaluate(RANGES) == [[first, last]]
        page.click("button[data-kind=expert]")
        assert page.get_attribute("button[data-kind=expert]", "aria-pressed") == "false"
        experts = "[...Bokeh.documents[0].all_models].filter((m) => m.name === 'expert' && m.tags.includes('span'))"
        assert page.evaluate(f"{experts}.map((renderer) => renderer.visible)") == [False]


@pytest.mark.browser
def test_a_page_of_ones_own_holds_html_pictures_and_figures(browser: Browsing, pages: Path) -> None:
    from prestage.output.figures_html import figure_html
    from prestage.output.figures_static import draw

    sections = [
        Section("Tiles", html_tiles([("speed", "3 <", "fast")])),
        Section("Table", html_table(["", "a"], [["b", ("4", "good")]])),
        Section("Picture", html_picture(draw("time", [made_run()]), "time")),
    ]
    write_page(pages / "plain.html", title="Mine", subtitle="& yours", sections=sections)
    plain = (pages / "plain.html").read_text(encoding="utf-8")
    assert "3 &lt;" in plain and '<td class="good">4</td>' in plain and "& yours" in Elements(plain).text
    assert "data:image/png;base64," in plain
    assert len(plain) < 200_000  # no figure, so no Bokeh
    layouts = {"left": figure_html("time", [made_run()]), "right": figure_html("memory", [made_run()])}
    write_page(pages / "figures.html", title="Mine", sections=[*sections, Section("Figures", layout=layouts)])
    assert Elements((pages / "figures.html").read_text(encoding="utf-8")).text.count("right") == 1
    for name, count in (("plain.html", 0), ("figures.html", 2)):
        with open_page(browser, name) as page:
            assert page.evaluate("document.querySelectorAll('.plot > *').length") == count


@pytest.mark.browser
def test_a_report_is_dark_or_light_as_the_system_or_its_switch_says(browser: Browsing) -> None:
    def is_now(theme: str) -> bool:
        page.wait_for_function(f"document.documentElement.dataset.theme === '{theme}'")
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        red, *_ = map(int, re.findall(r"\d+", color))
        return red < 60 if theme == "dark" else red > 200

    with open_page(browser, "one.html", color_scheme="dark") as page:
        assert is_now("dark")
        page.emulate_media(color_scheme="light")
        assert is_now("light")
        page.click("#theme")  # from auto to light
        page.emulate_media(color_scheme="dark")
        assert is_now("light")
        page.click("#theme")
        assert is_now("dark") and "dark" in page.text_content("#theme")
        page.emulate_media(color_scheme="light")
    with open_page(browser, "one.html") as page:  # it remembers
        assert is_now("dark")
        page.click("#theme")
        assert is_now("light") and "auto" in page.text_content("#theme")


@pytest.mark.browser
def test_two_timelines_share_one_axis_in_the_dark(browser: Browsing) -> None:
    with open_page(browser, "two.html", color_scheme="dark") as page:
        ((first, last),) = page.evaluate(RANGES)
        before = page.evaluate(COUNTS)
        page.evaluate(LOOK, [first - (last - first), last])
        assert sum(page.evaluate(COUNTS)) > sum(before)


def page_of_timeline(browser_folder: Path, name: str, run: Run) -> None:
    from prestage.output.figures_html import figure_html

    layout = figure_html("timeline", [run])
    write_page(browser_folder / name, title=name, sections=[Section("", layout=layout, name="timeline")])


@pytest.mark.browser
def test_under_the_pointer_a_span_says_what_it_is_and_when(browser: Browsing, pages: Path) -> None:
    page_of_timeline(pages, "made.html", made_run())
    with open_page(browser, "made.html") as page:
        # 20 ms stand across the plot but for 200 pixels at its left and 14 at its right, so 6.5 ms, in the middle of
        # the copy on demand from 3 to 10 ms, near a third of the rest; its row is the first of two.
        wide = page.locator(".plot").bounding_box()["width"]
        point_at(page, ".plot", 200 + (wide - 214) * 6.5 / 20, 30)
        page.wait_for_selector(".bk-Tooltip")
        said = page.locator(".bk-Tooltip .bk-tooltip-content").inner_text()
        assert said.split("\n") == ["copy on demand layer 0, expert 5", "7.000 ms from 3.000000 ms"]


def long_run(count: int) -> Run:
    """A run of `count` kernels, all but the last of a microsecond, with as much between."""
    made = Timeline()
    lane = made.add_lane("gpu0", "compute", "compute stream")
    for at in range(count - 1):
        made.record(2000 * at, 2000 * at + 1000, 0, at % 8, at % 2, -1, lane, EXPERT if at % 2 else DENSE)
    made.record(2000 * count, 2000 * count + 1, 0, -1, 1, -1, lane, HEAD)
    run: Run = made_run(timeline=made)
    return run


@pytest.mark.browser
def test_of_a_hundred_thousand_spans_those_are_drawn_that_can_be_told_apart(browser: Browsing, pages: Path) -> None:
    page_of_timeline(pages, "long.html", long_run(100_000))
    with open_page(browser, "long.html") as page:
        page.evaluate(LOOK, [0, 200.001])
        counts = page.evaluate(COUNTS)
        assert sum(counts) == 100_000  # each bar stands for some, and none is left out
        assert 500 < len(counts) < 5000
        page.evaluate(LOOK, [100, 100.02])
        assert page.evaluate(COUNTS) == [1] * 10  # 20 µs from 100 ms on: kernels at 0, 2, … 18 µs
