"""A profiler's trace as a Timeline: our own export span for span, the CPU's, made here, and an H100's, recorded."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_export import EXPERTS, made_run  # type: ignore[import-not-found]

from prestage.engine.output.export import About, export_timeline
from prestage.engine.output.profiler_trace import Imported, TraceFileError, load_timeline, write_imported
from prestage.engine.output.summary import kernel_costs, timeline_summary
from prestage.resources.timeline import COLLECTIVE, COPY, KERNEL, LAUNCH, SPAN, Timeline, union

H100 = {mode: Path(__file__).with_name(f"profiled-h100-{mode}.json.gz") for mode in ("eager", "graph")}


def call(name: str, start_us: float, took_us: float, category: str = "cuda_runtime", **args: Any) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": 77,
        "tid": 78,
        "ts": start_us,
        "dur": took_us,
        "args": args,
    }


def work(name: str, start_us: float, took_us: float, stream: int = 7, device: int = 0, **args: Any) -> dict[str, Any]:
    category = "gpu_memcpy" if name.startswith("Memcpy") else "kernel"
    args = {"device": device, "stream": stream, **args}
    return {
        "ph": "X", "cat": category, "name": name, "pid": device, "tid": stream, "ts": start_us, "dur": took_us,
        "args": args,
    }  # fmt: skip


def loaded(folder: Path, events: Any) -> Imported:
    path = folder / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    return load_timeline(path)


def lanes_of(imported: Imported) -> dict[tuple[str, str, str], list[tuple[int, int]]]:
    """(device, role, title) -> intervals in ns; lanes of one title together."""
    lanes: dict[tuple[str, str, str], list[tuple[int, int]]] = {}
    for span in imported.timeline.spans():
        lane = imported.timeline.lanes[span["lane"]]
        lanes.setdefault((lane.device, lane.role, lane.title), []).append((int(span["start_ns"]), int(span["end_ns"])))
    return lanes


# Our own files.


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, 6), st.booleans())
def test_an_export_comes_back_span_for_span(seed: int, steps: int, packed: bool) -> None:
    timeline = made_run(seed, steps)
    with TemporaryDirectory() as folder:
        path = Path(folder) / ("t.json.gz" if packed else "t.json")
        export_timeline(timeline, path, About(EXPERTS, layers=4), limit=None)
        imported = load_timeline(path)
        again = Path(folder) / "again.json"
        write_imported(imported, again)
        twice = load_timeline(again)
    assert imported.timeline.lanes == timeline.lanes
    assert (imported.experts_per_layer, imported.layers) == (EXPERTS, 4)
    names = SPAN.names or ()
    wanted = np.sort(timeline.spans(), order=names)
    assert np.array_equal(np.sort(imported.timeline.spans(), order=names), wanted)
    assert np.array_equal(np.sort(twice.timeline.spans(), order=names), wanted)
    assert [twice.names[name] for name in twice.name_of] == [imported.names[name] for name in imported.name_of]


def test_a_run_and_its_file_have_one_summary_and_its_bytes(default_run: Any, tmp_path: Path) -> None:
    from prestage.engine.output.about import about_run
    from prestage.engine.output.metrics import span_bytes

    export_timeline(default_run.timeline, tmp_path / "t.json.gz", about_run(default_run))
    imported = load_timeline(tmp_path / "t.json.gz")
    assert timeline_summary(imported.timeline) == timeline_summary(default_run.timeline)
    assert imported.span_bytes.sum() == span_bytes(default_run.recording).sum() > 0


# PyTorch's profiler on the CPU.


def test_torchs_profiler_on_the_cpu_becomes_the_threads_outermost_operators(tmp_path: Path) -> None:
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        for _ in range(5):
            torch.nn.functional.linear(a, b)  # aten::linear, with aten::t and aten::matmul within
            torch.relu(a)
    path = tmp_path / "trace.json"
    seen.export_chrome_trace(str(path))
    imported = load_timeline(path)
    (lane,) = imported.timeline.lanes
    assert (lane.device, lane.role) == ("host", "host")
    rows = {row["name"]: row for row in kernel_costs(imported)}
    assert {name: row["n"] for name, row in rows.items()} == {"aten::linear": 5, "aten::relu": 5}
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "aten::linear"]
    took_ns = sorted(round(event["dur"] * 1000) for event in events)
    assert rows["aten::linear"]["samples"]["median_ns"] == took_ns[2]
    spans = imported.timeline.spans()
    assert spans["start_ns"].min() == 0
    assert (spans["kind"] == LAUNCH).all()
    summary = timeline_summary(imported.timeline)
    assert summary["gpus"] == {}
    assert 0 < summary["roles"]["host host"]["busy_share"] <= 1


# A GPU's: see profiled.toml for how these were made.


@pytest.mark.parametrize("mode", H100)
def test_an_h100s_streams_become_lanes_that_never_overlap_themselves(mode: str) -> None:
    imported = load_timeline(H100[mode])
    spans, lanes = imported.timeline.spans(), imported.timeline.lanes
    for number in range(len(lanes)):
        here = np.sort(spans[spans["lane"] == number], order=["start_ns", "end_ns"])
        assert (here["start_ns"][1:] >= here["end_ns"][:-1]).all(), lanes[number]
    events = json.loads(gzip.decompress(H100[mode].read_bytes()))["traceEvents"]
    for category, kind in (("kernel", KERNEL), ("gpu_memcpy", COPY)):
        there = [event for event in events if event.get("cat") == category]
        found = spans[spans["kind"] == kind]
        assert len(found) == len(there)
        took_us = sum(event["dur"] for event in there)
        assert (found["end_ns"] - found["start_ns"]).sum() == pytest.approx(took_us * 1000, abs=1)
    roles = {(lane.device, lane.role, lane.title.split(",")[0]) for lane in lanes if lane.device != "host"}
    # Copies on one stream, kernels and the choice's copies to the host on the other.
    assert {role: stream for _, role, stream in roles} == {
        "h2d": "stream 21",
        "d2h": "stream 17",
        "compute": "stream 17",
    }


@pytest.mark.parametrize("mode", H100)
def test_an_h100s_work_was_issued_before_it_ran(mode: str) -> None:
    spans = load_timeline(H100[mode]).timeline.spans()
    on_gpu = spans[np.isin(spans["kind"], (KERNEL, COPY))]
    # A call may return after its work has begun, but not long after; each graph's kernels share one call.
    assert (on_gpu["issued_ns"] - on_gpu["start_ns"]).max() < 100_000
    if mode == "graph":
        kernels = on_gpu[on_gpu["kind"] == KERNEL]
        assert len(np.unique(kernels["issued_ns"])) == 42
    assert np.median(on_gpu["start_ns"] - on_gpu["issued_ns"]) > 0


def test_an_h100s_kernel_costs_tell_what_a_copy_beside_them_costs() -> None:
    rows = kernel_costs(load_timeline(H100["graph"]))
    copy = rows[0]
    assert (copy["name"], copy["n"]) == ("Memcpy HtoD (Pinned -> Device)", 14)
    assert copy["bytes"] == 3 * 4096 * 14336 * 2  # one of mixtral's experts
    assert copy["bytes"] / copy["samples"]["median_ns"] == pytest.approx(55, rel=0.01)  # GB/s
    product = next(row for row in rows if row["name"].startswith("nvjet"))
    assert product["n"] == product["quiet"]["n"] + product["beside_copy"]["n"] == 48
    assert product["beside_copy"]["median_ns"] > product["quiet"]["median_ns"]
    from prestage.resources.profile import Samples

    assert Samples.model_validate(product["samples"]).n == 48  # as a profile's costs carry them


def test_the_same_summary_serves_simulated_and_profiled_runs() -> None:
    eager, graph = (timeline_summary(load_timeline(H100[mode]).timeline) for mode in ("eager", "graph"))
    for summary in (eager, graph):
        gpu = summary["gpus"]["gpu0"]
        assert gpu["compute_ms"] + gpu["not_compute_ms"] + gpu["idle_ms"] == pytest.approx(gpu["span_ms"])
        assert gpu["overlap"] == pytest.approx(0.0255, abs=0.0005)
    # What graphs are for: the same kernels for a quarter of the host's time.
    assert graph["gpus"]["gpu0"]["compute_ms"] == pytest.approx(eager["gpus"]["gpu0"]["compute_ms"], rel=0.01)
    assert graph["roles"]["host host"]["busy_ms"] < eager["roles"]["host host"]["busy_ms"] / 3


# By hand.


def test_streams_threads_and_waits_become_lanes(tmp_path: Path) -> None:
    imported = loaded(
        tmp_path,
        [
            call("aten::mm", 1000, 50, "cpu_op"),
            call("cudaLaunchKernel", 1010, 20, correlation=5),  # within it
            call("cudaMemcpyAsync", 1060, 10, correlation=6),
            call("aten::item", 1100, 100, "cpu_op"),
            call("cudaStreamSynchronize", 1120, 60),  # the host waits from 1120 to 1180
            call("cudaDeviceSynchronize", 1300, 500),
            work("gemm", 1040, 25, correlation=5),
            work("Memcpy HtoD (Pinned -> Device)", 1080, 30, 9, correlation=6, bytes=3000),
            work("Memcpy DtoH (Device -> Pinned)", 1115, 5, 7),  # no call of it was seen
            work("ncclDevKernel_SendRecv", 1130, 5, 11, device=1),
            {"ph": "M", "name": "thread_name", "pid": 77, "tid": 78, "args": {"name": "main"}},
            {"ph": "i", "name": "marker", "ts": 0},
        ],
    )
    assert lanes_of(imported) == {
        ("gpu0", "compute", "stream 7"): [(40_000, 65_000)],
        ("gpu0", "h2d", "stream 9, copies to the GPU"): [(80_000, 110_000)],
        ("gpu0", "d2h", "stream 7, copies to the host"): [(115_000, 120_000)],
        ("gpu1", "compute", "stream 11"): [(130_000, 135_000)],
        ("host", "host", "main"): [(0, 50_000), (60_000, 70_000), (100_000, 120_000), (180_000, 200_000)],
    }
    spans = imported.timeline.spans()
    assert spans["issued_ns"][:4].tolist() == [30_000, 70_000, 115_000, 130_000]
    assert spans["kind"][:4].tolist() == [KERNEL, COPY, COPY, COLLECTIVE]
    assert imported.span_bytes.tolist()[:3] == [0, 3000, 0]
    gpu = timeline_summary(imported.timeline)["gpus"]["gpu0"]
    assert (gpu["span_ms"], gpu["compute_ms"], gpu["not_compute_ms"]) == (0.08, 0.025, 0.035)
    assert (gpu["idle_ms"], gpu["copy_ms"], gpu["overlap"]) == (pytest.approx(0.02), 0.035, 0)


def test_kernels_that_overlap_on_a_stream_take_lanes_beside_each_other(tmp_path: Path) -> None:
    times = [(10, 10), (15, 10), (18, 10), (20, 10), (30, 5)]
    imported = loaded(tmp_path, [work("k", start_us, took_us) for start_us, took_us in times])
    assert imported.timeline.spans()["lane"].tolist() == [0, 1, 2, 0, 0]
    assert {lane.title for lane in imported.timeline.lanes} == {"stream 7"}
    (row,) = kernel_costs(imported)  # one stream, whatever its lanes
    assert row["n"] == 5
    assert timeline_summary(imported.timeline)["roles"]["gpu0 compute"]["busy_ms"] == 0.025


def test_costs_are_medians_of_what_ran_quietly_and_beside_a_copy(tmp_path: Path) -> None:
    copy = work("Memcpy HtoD (Pinned -> Device)", 100, 100, 9, bytes=10**6)
    events = [work("k", 10, 4), work("k", 20, 6), work("k", 30, 8), work("k", 150, 20), work("k", 195, 10), copy]
    kernels, copies = sorted(kernel_costs(loaded(tmp_path, events)), key=lambda row: str(row["name"] != "k"))
    assert kernels["samples"] == {"n": 5, "median_ns": 8000, "iqr_ns": 4000}
    assert kernels["quiet"] == {"n": 3, "median_ns": 6000, "iqr_ns": 2000}
    assert kernels["beside_copy"] == {"n": 2, "median_ns": 15_000, "iqr_ns": 5000}
    assert (copies["bytes"], copies["total_ms"], copies["beside_copy"]) == (10**6, 0.1, None)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 10)), max_size=12))
def test_a_union_covers_what_any_of_its_intervals_covers(intervals: list[tuple[int, int]]) -> None:
    timeline = Timeline()
    lane = timeline.add_lane("gpu0", "compute", "kernels")
    for start_ns, took_ns in intervals:
        timeline.record(start_ns, start_ns + took_ns, 0, -1, 0, -1, lane, KERNEL)
    spans = timeline.spans()
    starts_ns, ends_ns = union(spans["start_ns"], spans["end_ns"])
    covered = {at for start_ns, took_ns in intervals for at in range(start_ns, start_ns + took_ns)}
    pieces = list(zip(starts_ns.tolist(), ends_ns.tolist(), strict=True))
    assert {at for low, high in pieces for at in range(low, high)} == covered
    assert all(high < low for (_, high), (low, _) in pairwise(pieces))


def test_a_list_of_events_and_numbers_that_json_has_not_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('[{"ph":"X","cat":"kernel","name":"k","pid":0,"tid":7,"ts":5,"dur":1,"args":{"occupancy":NaN}}]')
    assert len(load_timeline(path).timeline) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not json", "not JSON"),
        (b"\x1f\x8bnot gzip", "a broken .gz file"),
        (gzip.compress(b'{"traceEvents": []}')[:-9], "a broken .gz file"),
        (b'{"events": []}', 'no list of events: a profiler\'s trace holds one as "traceEvents"'),
        (b'{"traceEvents": []}', "none of its 0 events is a kernel, a copy, a CUDA call or an operator"),
        (b'{"traceEvents": [3]}', r"traceEvents\[0\] is int: must be an object"),
        ([{**work("k", 0, 1), "dur": None}], r"traceEvents\[0\] \('k'\): dur = None: must be a number of microseconds"),
        ([{**work("k", 0, 1), "ts": "5"}], r"traceEvents\[0\] \('k'\): ts = '5': must be a number of microseconds"),
        ([work("k", 0, -1)], r"traceEvents\[0\] \('k'\): dur = -1: must be 0 or more"),
        ([work("Memcpy HtoD", 0, 1, bytes=-5)], r"args\['bytes'\] = -5: must be a whole number, 0 or more"),
        (
            [{**work("k", 0, 1), "tid": [7]}],
            r"traceEvents\[0\] \('k'\): pid = 0, tid = \[7\]: must be numbers or names",
        ),
        ([{**work("k", 0, 1), "args": [1]}], r"traceEvents\[0\] \('k'\): args must be an object"),
    ],
)
def test_a_bad_file_is_named_with_what_would_be_right(tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps({"traceEvents": content}).encode())
    with pytest.raises(TraceFileError, match=words) as error:
        load_timeline(path)
    assert str(error.value).startswith(f"{path}: ")


def test_lanes_that_a_file_declares_wrongly_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    lanes = [{"device": "gpu0", "role": "cook", "title": "t", "pid": 0, "tid": 7}]
    other = {"lanes": lanes, "experts_per_layer": 8, "layers": 4}
    path.write_text(json.dumps({"otherData": other, "traceEvents": [work("k", 0, 1)]}))
    with pytest.raises(TraceFileError, match="otherData: ValueError: role = 'cook': choose one of compute"):
        load_timeline(path)
