"""A profiler's trace as a Timeline: our own export span for span, the CPU's, made here, and an H100's, recorded."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_export import EXPERTS, made_run  # type: ignore[import-not-found]

from prestage.output.export import About, export_timeline
from prestage.output.profiler_trace import Imported, TraceFileError, load_timeline, write_imported
from prestage.output.summary import kernel_costs, timeline_summary
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


@pytest.mark.slow
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
    from prestage.engine.measure.metrics import span_bytes
    from prestage.output.about import about_run

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
    from prestage.resources.facts import Samples

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
        (b"not json", "not JSON: Expecting value at character 0 of 8"),
        (b"", "not JSON"),
        (b'{"traceEvents": 3}', "no list of events"),
        (b"\x1f\x8bnot gzip", "a broken .gz file"),
        (b'{"events": []}', 'no list of events: a profiler\'s trace holds one as "traceEvents"'),
        (b'{"traceEvents": []}', "none of its 0 events is a kernel, a copy, a CUDA call or an operator"),
        (b'{"traceEvents": [3]}', r"that can be read \(1 that are no objects\)"),
        (b"[" * 100_000, "none of its 0 events"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON: .*digits.* at character 6 of "),
        (b'{"traceEvents": [' + b"9" * 5000 + b"]}", r"\(not readable further: .*digits.* at character 17 of"),
        ([{**work("k", 0, 1), "dur": None}], r"none of its 1 events .* \(1 without duration\)"),
        ([{**work("k", 0, 1), "cat": "tpu_op"}], r"none of its 1 events .* \(1 of category tpu_op\)"),
    ],
)
def test_a_file_without_work_is_named_with_why(tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps({"traceEvents": content}).encode())
    with pytest.raises(TraceFileError, match=words) as error:
        load_timeline(path)
    assert str(error.value).startswith(f"{path}: ")


# What is odd is read as far as it can be, and told.

#: Two kernels, from 1000 us to 1010 and from 1020 to 1050.
TWO = [work("a", 1000, 10), work("b", 1020, 30)]
BOTH = [(0, 10_000), (20_000, 50_000)]


def told(imported: Imported) -> dict[str, dict[str, int]]:
    """What was repaired and left out, by reason: how many."""
    reading = imported.reading.plain()
    return {key: {reason: said["events"] for reason, said in reading[key].items()} for key in ("repaired", "left_out")}


def kernels(imported: Imported) -> list[tuple[int, int]]:
    return sorted(times for (_, role, _), here in lanes_of(imported).items() if role == "compute" for times in here)


def begun(event: dict[str, Any], begin: str = "B", **more: Any) -> list[dict[str, Any]]:
    """The same work as a beginning and an end."""
    end = {key: event[key] for key in ("pid", "tid")}
    first = {key: value for key, value in event.items() if key != "dur"}
    return [
        {**first, "ph": begin, **more},
        {**end, **more, "ph": {"B": "E", "b": "e", "S": "F"}[begin], "ts": event["ts"] + event["dur"]},
    ]


@pytest.mark.parametrize(
    ("begin", "more"),
    [("B", {}), ("b", {"cat": "kernel", "id": "0x1"}), ("S", {"cat": "kernel", "id": 4, "name": "a"})],
)
def test_what_begins_and_ends_is_a_span(tmp_path: Path, begin: str, more: dict[str, Any]) -> None:
    imported = loaded(tmp_path, [*begun(TWO[0], begin, **more), TWO[1]])
    assert kernels(imported) == BOTH
    assert imported.reading.whole
    assert {lane.device for lane in imported.timeline.lanes} == {"gpu0"}


def test_beginnings_and_ends_nest_and_those_without_the_other_are_counted(tmp_path: Path) -> None:
    outer, inner = work("outer", 0, 100), work("inner", 10, 20)
    (first, last), (second, third) = begun(outer), begun(inner)
    alone = [{**third, "ts": -5}, {**first, "tid": 9}]
    imported = loaded(tmp_path, [first, second, third, last, *alone])
    assert kernels(imported) == [(0, 100_000), (10_000, 30_000)]
    assert told(imported)["left_out"] == {"that end and never began": 1, "that begin and never end": 1}


def test_work_of_categories_that_are_not_known_is_counted_by_category(tmp_path: Path) -> None:
    others = [{**work("x", 5, 5), "cat": category} for category in ("hpu_op", "hpu_op", "python_function", "")]
    imported = loaded(tmp_path, [*TWO, *others, {"ph": "i", "cat": "mark", "ts": 3}, {"name": "no phase"}])
    marks = "of category python_function, which marks work and is none"
    wanted = {"of category hpu_op": 2, marks: 1, "without a category": 1, "without a phase": 1}
    assert told(imported)["left_out"] == wanted
    assert imported.reading.plain()["left_out"]["of category hpu_op"]["first"] == "traceEvents[2] 'x'"


def test_names_of_earlier_versions_and_calls_of_other_accelerators_are_known(tmp_path: Path) -> None:
    events = [
        {**work("a", 1000, 10), "cat": "Kernel"},
        {**work("Memcpy HtoD", 1020, 30), "cat": "Memcpy"},
        call("cudaLaunchKernel", 990, 5, "Runtime"),
        call("aten::mm", 980, 30, "Operator"),
        call("urEnqueueKernelLaunch", 1100, 5, "xpu_runtime"),
    ]
    imported = loaded(tmp_path, events)
    assert [span["kind"] for span in imported.timeline.spans()] == [KERNEL, COPY, LAUNCH, LAUNCH]
    assert told(imported) == {"repaired": {"categories by the names of earlier versions": 4}, "left_out": {}}


def test_an_event_without_a_time_is_left_out_and_named(tmp_path: Path) -> None:
    late = {**work("late", 0, 0), "ts": 0.0}
    epoch = [{**event, "ts": event["ts"] + 1.7e15} for event in TWO]
    imported = loaded(tmp_path, [*epoch, late])
    assert kernels(imported) == BOTH
    said = imported.reading.plain()["left_out"]
    assert said == {"at time 0, far before all others": {"events": 1, "first": "traceEvents[2] 'late'"}}
    # In a trace whose times count from its own beginning, 0 is a time like others.
    assert kernels(loaded(tmp_path, [*TWO, late])) == [(0, 0), (1_000_000, 1_010_000), (1_020_000, 1_050_000)]


@pytest.mark.parametrize(
    ("change", "repaired"),
    [
        ({"ts": "1000"}, "times given as text"),
        ({"dur": "1e1"}, "times given as text"),
        ({"name": "a\x01\x1b[31m"}, "names with characters that cannot be shown"),
        ({"name": "a\ud800"}, "names with characters that cannot be shown"),
        ({"args": {**TWO[0]["args"], "bytes": "many"}}, "args 'bytes' that are no whole numbers, read as none"),
        ({"args": {**TWO[0]["args"], "bytes": -5}}, "args 'bytes' out of range, read as none"),
        (
            {"args": {**TWO[0]["args"], "correlation": [1]}},
            "args 'correlation' that are no whole numbers, read as none",
        ),
        ({"args": [1], "pid": 0}, "args that are no object, read as none"),
        ({"tid": [7]}, "processes and threads that are neither numbers nor names"),
    ],
)
def test_one_odd_value_is_repaired_and_told(tmp_path: Path, change: dict[str, Any], repaired: str) -> None:
    imported = loaded(tmp_path, [{**TWO[0], **change}, TWO[1]])
    assert kernels(imported) == BOTH
    assert told(imported) == {"repaired": {repaired: 1}, "left_out": {}}
    write_imported(imported, tmp_path / "again.json.gz")
    assert kernels(load_timeline(tmp_path / "again.json.gz")) == BOTH


@pytest.mark.parametrize(
    ("change", "left_out"),
    [
        ({"ts": None}, "without time"),
        ({"ts": "soon"}, "without time"),
        ({"ts": "nan"}, "without time"),
        ({"ts": True}, "without time"),
        ({"ts": float("nan")}, "without time"),
        ({"ts": float("inf")}, "with an impossible time"),
        ({"ts": 10**400}, "with an impossible time"),
        ({"ts": -(2**50)}, "with an impossible time"),
        ({"dur": float("inf")}, "with an impossible duration"),
        ({"dur": 2e12}, "longer than 11 days"),
    ],
)
def test_what_has_no_time_is_left_out_and_told(tmp_path: Path, change: dict[str, Any], left_out: str) -> None:
    imported = loaded(tmp_path, [*TWO, {**work("c", 1005, 1), **change}])
    assert kernels(imported) == BOTH
    assert told(imported) == {"repaired": {}, "left_out": {left_out: 1}}


def test_a_negative_duration_is_none(tmp_path: Path) -> None:
    imported = loaded(tmp_path, [*TWO, work("c", 1030, -1.5)])
    assert kernels(imported) == [BOTH[0], BOTH[1], (30_000, 30_000)]
    assert told(imported)["repaired"] == {"negative durations, read as 0": 1}


@pytest.mark.parametrize("odd", ["inf", "-inf", "nan", "-nan(ind)", "Infinity", "NaN", "1.#INF", "-1.#IND"])
def test_numbers_that_json_has_not_are_read_as_none(tmp_path: Path, odd: str) -> None:
    first = json.dumps({**TWO[0], "name": 'inf, "nan" \\'})
    path = tmp_path / "t.json"
    text = json.dumps({"traceEvents": [{"ph": "C", "args": {"x": 5e-324}}, "FIRST", TWO[1]]}).replace("5e-324", odd)
    path.write_text(text.replace('"FIRST"', first))
    imported = load_timeline(path)
    assert kernels(imported) == BOTH
    assert imported.names == ('inf, "nan" \\', "b")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_any_encoding_of_json_is_read(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(json.dumps(TWO).encode(encoding))
    assert kernels(load_timeline(path)) == BOTH


def test_bytes_and_control_characters_within_names_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(json.dumps({"traceEvents": TWO}).encode().replace(b'"a"', b'"a\x01\xff"'))
    imported = load_timeline(path)
    assert kernels(imported) == BOTH
    assert imported.names == ("a \ufffd", "b")
    assert told(imported)["repaired"] == {
        "bytes that are not utf-8": 1,
        "names with characters that cannot be shown": 1,
    }


# Files that break off.


@pytest.mark.parametrize("ending", ["]}", "]", ",]}", ",", "", ', {"ph": "X", "cat": "ker', ', {"a": [1, 2'])
def test_a_text_that_breaks_off_is_read_up_to_there(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "t.json"
    path.write_text('{"traceEvents": [' + ", ".join(map(json.dumps, TWO)) + ending)
    imported = load_timeline(path)
    assert kernels(imported) == BOTH
    assert (imported.reading.breaks_off is None) == ending.endswith("]}")


@pytest.mark.slow
@pytest.mark.parametrize("spans", [20, 20_000])
def test_a_packed_file_that_is_cut_or_broken_is_read_up_to_there(tmp_path: Path, spans: int) -> None:
    events = [work("k", 10 * number, 1 + number % 9) for number in range(spans)]
    packed = gzip.compress(json.dumps({"traceEvents": events}).encode())
    path = tmp_path / "t.json.gz"
    path.write_bytes(packed)
    whole = load_timeline(path)
    assert whole.reading.whole
    broken = bytearray(packed)
    broken[-20:-16] = b"\0\0\0\0"
    for content in (packed[:-9], packed[: len(packed) * 3 // 4], bytes(broken)):
        path.write_bytes(content)
        part = load_timeline(path)
        assert 0.3 * spans < len(part.timeline) <= spans
        assert kernels(part) == kernels(whole)[: len(part.timeline)]
        assert part.reading.breaks_off is not None and "a broken .gz file" in part.reading.breaks_off
    path.write_bytes(gzip.compress(b'{"traceEvents": [') + gzip.compress(json.dumps(TWO)[1:].encode() + b"}"))
    assert kernels(load_timeline(path)) == BOTH  # of two members


def test_a_timeline_of_ours_that_is_cut_keeps_its_lanes(default_run: Any, tmp_path: Path) -> None:
    from prestage.output.about import about_run

    export_timeline(default_run.timeline, tmp_path / "t.json", about_run(default_run))
    text = (tmp_path / "t.json").read_bytes()
    (tmp_path / "cut.json").write_bytes(text[: len(text) // 2])
    imported = load_timeline(tmp_path / "cut.json")
    assert imported.timeline.lanes == default_run.timeline.lanes
    assert 0 < len(imported.timeline) < len(default_run.timeline)
    assert imported.reading.breaks_off is not None and not imported.reading.left_out.events


def test_a_small_file_that_unpacks_to_very_much_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b" " * (80 * 2**20)))
    with pytest.raises(TraceFileError, match=r"unpacks to more than 64\.00 MiB, .* times its size"):
        load_timeline(path)


# How long it takes.


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["overlapping", "devices", "threads", "names", "begun"])
def test_reading_takes_a_time_in_proportion_to_the_events(tmp_path: Path, kind: str) -> None:
    def seconds(count: int) -> float:
        makers: dict[str, Callable[[int], list[dict[str, Any]]]] = {
            "overlapping": lambda n: [work("k", n, 10 * count)],
            "devices": lambda n: [{**work("Memcpy HtoD" if n % 2 else "k", n, 9, device=n)}],
            "threads": lambda n: [{**call("c", n, 9), "tid": n}],
            "names": lambda n: [work(f"k{n}", n, 9)],
            "begun": lambda n: begun(work("k", n, 10 * count)),
        }
        make = makers[kind]
        path = tmp_path / "t.json"
        path.write_text(json.dumps([event for number in range(count) for event in make(number)]))
        started = process_time()
        imported = load_timeline(path)
        assert len(imported.timeline) == count
        assert timeline_summary(imported.timeline)["spans"] == count
        assert sum(row["n"] for row in kernel_costs(imported)) == count
        return process_time() - started

    few, many = seconds(6_000), seconds(60_000)
    assert many < 30 * max(few, 0.1)  # of ten times as many; it was a hundred times and more
    assert many < 30


def test_what_needs_more_lanes_than_a_timeline_has_is_left_out_and_told(tmp_path: Path) -> None:
    imported = loaded(tmp_path, [work("k", number, 10**6) for number in range(2**16 + 5)])
    assert len(imported.timeline) == 2**16
    assert list(told(imported)["left_out"].values()) == [5]


def test_shares_of_one_stream_have_one_denominator(tmp_path: Path) -> None:
    # The host works from 0 us on, the GPU from 1000 to 1050, for 40 of them.
    summary = timeline_summary(loaded(tmp_path, [*TWO, call("cudaLaunchKernel", 0, 100)]).timeline)
    gpu, stream, host = summary["gpus"]["gpu0"], summary["roles"]["gpu0 compute"], summary["roles"]["host host"]
    assert gpu["compute_ms"] / gpu["span_ms"] == stream["busy_share"] == pytest.approx(0.8)
    assert (stream["of_ms"], host["of_ms"]) == (0.05, 1.05)
    assert host["busy_share"] == pytest.approx(0.1 / 1.05)


def test_operators_that_overlap_without_nesting_are_busy_as_long_as_either(tmp_path: Path) -> None:
    imported = loaded(tmp_path, [call("a", 0, 10), call("b", 5, 10), call("c", 12, 1)])
    assert lanes_of(imported) == {("host", "host", "thread 78"): [(0, 10_000), (10_000, 15_000)]}


@pytest.mark.parametrize("change", [{"lanes": 3}, {"layers": "4"}, {"experts_per_layer": 0}, {"lanes": [{"pid": []}]}])
def test_a_file_that_declares_no_lanes_of_a_run_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "bad.json"
    other = {"lanes": [], "experts_per_layer": 8, "layers": 4, **change}
    path.write_text(json.dumps({"otherData": other, "traceEvents": TWO}))
    with pytest.raises(TraceFileError, match="otherData: "):
        load_timeline(path)


def test_lanes_that_a_file_declares_wrongly_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    lanes = [{"device": "gpu0", "role": "cook", "title": "t", "pid": 0, "tid": 7}]
    other = {"lanes": lanes, "experts_per_layer": 8, "layers": 4}
    path.write_text(json.dumps({"otherData": other, "traceEvents": [work("k", 0, 1)]}))
    with pytest.raises(TraceFileError, match="otherData: role = 'cook': choose one of compute"):
        load_timeline(path)
