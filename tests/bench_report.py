"""How heavy a report is: seconds to write it, its size, seconds until a browser shows it, and how long a zoom takes.

    python tests/bench_report.py [--spans N ...] [--pictures docs | --look FOLDER]

Prints, as JSON, for the N spans around the middle of the shipped scenario gpt-oss-20b: the file's MB, the seconds that
writing and opening took, and the ms from a change of the timeline's axis to the paint: median and longest of a zoom
from everything to 1/16384 of it. In headless Chromium, which draws without a graphics card. `--pictures` draws the
pictures of docs/report.md instead (PICTURES). `--look` takes every page whole, at 1280 and 420 pixels, light and dark,
to be looked at: one run, two, requests under load, and a suite of sweeps.
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
from prestage.experiments.suite import load_suite, run_suite
from prestage.experiments.suite_report import write_suite
from prestage.output.page import write_page
from prestage.output.report import run_sections, write_report
from prestage.output.saved import Run, run_of

#: A suite that is small enough to be run for its pictures.
SUITE = """
title = "gpt-oss-20b on an RTX 4060: memory, prefetching, eviction"
transfers = []
published = ["transfers"]
quick_published = []
[bounds]
"memory.eviction" = ["belady"]
[[metrics]]
name = "throughput (tokens/s)"
figure = "tokens_per_second"
best = "most"
[[metrics]]
name = "latency of a token, p99 (ms)"
figure = "inter_token_latency_ms.p99"
best = "least"
[[studies]]
name = "card"
title = "gpt-oss-20b on an RTX 4060, one user"
scenario = "default"
set = { "workload.tokens" = 40 }
[[studies.sweeps]]
name = "memory"
question = "How much memory, and how many layers ahead"
grid = { "prefetch.lookahead" = [0, 1, 2], "memory.total_bytes" = ["75%", "85%", "95%"] }
charts = [{ kind = "lines", x = "prefetch.lookahead", by = "memory.total_bytes" }]
[[studies.sweeps]]
name = "eviction"
question = "Which expert to evict"
grid = { "memory.eviction" = ["lru", "s3fifo", "belady"], "memory.total_bytes" = ["75%", "85%", "95%"] }
charts = [{ kind = "heatmap", x = "memory.total_bytes", by = "memory.eviction" }]
"""
#: Requests under load, as settings of the default scenario.
REQUESTS = ("requests.count=40", "requests.rate=0.4", "requests.prompt_tokens=32", "requests.output_tokens=24")
#: The pictures in docs: the page, the id of the section that is the last in it, the width and the colors.
PICTURES = {
    "report.png": ("one.html", "timeline", 1180, "light"),
    "report-two-narrow.png": ("two.html", "lanes", 420, "dark"),
    "report-requests.png": ("requests.html", "concurrency", 1280, "light"),
    "report-requests-narrow.png": ("requests.html", "concurrency", 420, "dark"),
    "report-suite.png": ("suite.html", "part-4", 1280, "dark"),
}
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


def write_pages(folder: Path) -> list[str]:
    """Write the pages that pictures are taken of: one run, two, requests under load, and a suite; returns names."""
    runs = [simulate(load_scenario("default", [f"prefetch.lookahead={ahead}"])) for ahead in (1, 0)]
    write_report([run_of(runs[0], ranges=True)], folder / "one.html")
    named = zip(("prefetching", "on demand"), runs, strict=True)
    write_report([run_of(run, name, ranges=True) for name, run in named], folder / "two.html")
    served = simulate(load_scenario("default", list(REQUESTS)), baselines=False)
    write_report([run_of(served)], folder / "requests.html")
    (folder / "suite.toml").write_text(SUITE, encoding="utf-8")
    finished = run_suite(load_suite(folder / "suite.toml"), folder / "suite")
    write_suite(finished, folder / "suite")
    (folder / "suite" / "report.html").rename(folder / "suite.html")
    return ["one.html", "two.html", "requests.html", "suite.html"]


def picture(path: Path, folder: Path, page: str, last: str | None, **looked: Any) -> None:
    """Take a picture of a page, whole or from its top to the end of a section, by its id."""
    with browsing(folder, **looked) as at:
        at.page.goto(f"{at.url}/{page}")
        at.page.wait_for_function(READY)
        at.page.evaluate(PAINTED)
        top = None
        if last is not None:
            end = at.page.locator(f"#{last}").bounding_box()
            top = {"x": 0, "y": 0, "width": looked["width"], "height": end["y"] + end["height"] + 16}
        at.page.screenshot(path=path, full_page=True, clip=top)
        assert not at.console_errors, at.console_errors


def look(places: Path, folder: Path) -> None:
    """Take all pages whole, at both widths, light and dark."""
    places.mkdir(parents=True, exist_ok=True)
    for page in write_pages(folder):
        for width in (1280, 420):
            for colors in ("light", "dark"):
                path = places / f"{page.removesuffix('.html')}-{width}-{colors}.png"
                picture(path, folder, page, None, width=width, color_scheme=colors)


def main() -> None:
    """Measure, or draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spans", type=int, nargs="+", default=[100_000, 200_000, 400_000])
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--pictures", type=Path)
    instead.add_argument("--look", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.look is not None:
            look(arguments.look, Path(folder))
            return
        if arguments.pictures is not None:
            write_pages(Path(folder))
            for name, (page, last, width, colors) in PICTURES.items():
                picture(arguments.pictures / name, Path(folder), page, last, width=width, color_scheme=colors)
            return
        run = run_of(simulate(load_scenario("gpt-oss-20b"), baselines=False))
        print(json.dumps([measure(run, spans, Path(folder)) for spans in arguments.spans], indent=2))


if __name__ == "__main__":
    main()
