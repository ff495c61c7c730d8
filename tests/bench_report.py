"""How heavy a report is: seconds to write it, its size, seconds until a browser shows it, and how long a zoom takes.

    python tests/bench_report.py [--spans N ...] [--picture docs/report.png]

Prints, as JSON, for the N spans around the middle of the shipped scenario gpt-oss-20b: the file's MB, the seconds that
writing and opening took, and the ms from a change of the timeline's axis to the paint: median and longest of a zoom
from everything to 1/16384 of it. In headless Chromium, which draws without a graphics card. `--picture` draws the
pictures of docs/report.md instead: the top of the default run's report, and of two runs' on a narrow, dark screen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from browser import browsing

from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.simulate import simulate
from prestage.output.page import write_page
from prestage.output.report import run_sections, write_report
from prestage.output.saved import Run, run_of

READY = "document.documentElement.dataset.ready === 'true'"
PAINTED = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
#: Shows everything, then the half in its middle, and so on; returns the ms that each step took.
ZOOM = """async () => {
    const range = [...Bokeh.documents[0].all_models].find((model) => (model.tags || []).includes("timeline"));
    const [low, high] = range.bounds;
    const took = [];
    for (let half = (high - low) / 2, step = 0; step < 15; step++, half /= 2) {
        const began = performance.now();
        range.setv({start: (low + high) / 2 - half, end: (low + high) / 2 + half});
        await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
        took.push(performance.now() - began);
    }
    return took;
}"""


def measure(run: Run, spans: int, folder: Path) -> dict[str, Any]:
    """Returns what the report of a run costs with so many of its spans."""
    path = folder / f"{spans}.html"
    began = time.perf_counter()
    write_page(path, title=run.title, sections=run_sections(run, limit=spans))
    wrote_s = time.perf_counter() - began
    with browsing(folder) as at:
        began = time.perf_counter()
        at.page.goto(f"{at.url}/{path.name}")
        at.page.wait_for_function(READY)
        at.page.evaluate(PAINTED)
        opened_s = time.perf_counter() - began
        took_ms = at.page.evaluate(ZOOM)
        assert not at.console_errors, at.console_errors
    return {
        "spans": min(spans, len(run.timeline)),
        "mb": round(path.stat().st_size / 1e6, 2),
        "write_s": round(wrote_s, 2),
        "open_s": round(opened_s, 2),
        "zoom_ms": {"median": round(statistics.median(took_ms)), "longest": round(max(took_ms))},
    }


def draw(path: Path, folder: Path) -> None:
    """Take the pictures of docs/report.md: one run, wide and light, and two side by side, on a phone, dark."""
    runs = [simulate(load_scenario("default", [f"prefetch.lookahead={ahead}"])) for ahead in (1, 0)]
    write_report([run_of(runs[0], ranges=True)], folder / "report.html")
    named = zip(("prefetching", "on demand"), runs, strict=True)
    write_report([run_of(run, name, ranges=True) for name, run in named], folder / "two.html")
    _picture(path, folder, "report.html", "timeline", width=1180)
    _picture(path.with_stem(f"{path.stem}-two-narrow"), folder, "two.html", "lanes", width=420, color_scheme="dark")


def _picture(path: Path, folder: Path, page: str, last: str, **looked: Any) -> None:
    """Take a picture of a page from its top to the end of a section, by its id."""
    with browsing(folder, **looked) as at:
        at.page.goto(f"{at.url}/{page}")
        at.page.wait_for_function(READY)
        at.page.evaluate(PAINTED)
        end = at.page.locator(f"#{last}").bounding_box()
        top = {"x": 0, "y": 0, "width": looked["width"], "height": end["y"] + end["height"] + 16}
        at.page.screenshot(path=path, full_page=True, clip=top)
        assert not at.console_errors, at.console_errors


def main() -> None:
    """Measure, or draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spans", type=int, nargs="+", default=[100_000, 200_000, 400_000])
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.picture is not None:
            draw(arguments.picture, Path(folder))
            return
        run = run_of(simulate(load_scenario("gpt-oss-20b"), baselines=False))
        print(json.dumps([measure(run, spans, Path(folder)) for spans in arguments.spans], indent=2))


if __name__ == "__main__":
    main()
