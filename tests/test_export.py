"""The exported timeline, read back as a viewer reads it: exact times, tracks in order, arrows where a kernel waited."""

import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterator
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prestage.output.export import About, ExportSummary, export_timeline
from prestage.output.span_names import CATEGORIES, NAMES, layers_of, track_order
from prestage.resources.timeline import (
    DEMAND,
    DENSE,
    EXPERT,
    HEAD,
    KINDS,
    LAUNCH,
    PREDICT,
    PREFETCH,
    READBACK,
    ROLES,
    Timeline,
)

EXPERTS = 8
PROCESS = ("process_name", "process_labels", "process_sort_index")
Event = dict[str, Any]


def made_run(seed: int, steps: int, layers: int = 4, top_k: int = 2, *, prefill_steps: int = 0) -> Timeline:
    """A decoding run in outline: every lane in order, kernels behind their copies, some copies in two pieces.

    Durations are drawn from `seed` and may be 0, but for copies; experts found already name a copy that was never
    made. The first `prefill_steps` take 20 times as long.
    """
    random = Random(seed)
    timeline = Timeline()
    host = timeline.add_lane("host", "host", "host thread")
    predictor = timeline.add_lane("gpu0", "predictor", "predictor")
    d2h = timeline.add_lane("gpu0", "d2h", "copy engine D2H")
    h2d = timeline.add_lane("gpu0", "h2d", "copy engine H2D")
    compute = timeline.add_lane("gpu0", "compute", "compute stream")
    free_ns = [0] * 5
    copies = 0

    def run(
        lane: int, kind: int, most_ns: int, issued_ns: int, after_ns: int = 0, expert: int = -1, copy: int = -1
    ) -> int:
        start_ns = max(free_ns[lane], issued_ns, after_ns)
        least_ns = int(kind in (DEMAND, PREFETCH))
        end_ns = free_ns[lane] = start_ns + random.randint(least_ns, most_ns * slower)
        timeline.record(start_ns, end_ns, issued_ns, expert, visit, copy, lane, kind)
        return end_ns

    def copy_in(kind: int, expert: int, issued_ns: int, after_ns: int = 0) -> tuple[int, int]:
        nonlocal copies
        copies += 1
        for _ in range(random.randint(1, 2)):
            end_ns = run(h2d, kind, 4000, issued_ns, after_ns, expert, copies)
        return copies, end_ns

    for step in range(steps):
        slower = 20 if step < prefill_steps else 1
        for layer in range(layers):
            visit = step * layers + layer
            launched_ns = run(host, LAUNCH, 300, free_ns[host])
            chosen_ns = run(d2h, READBACK, 50, launched_ns, run(compute, DENSE, 800, launched_ns))
            known_ns = run(host, LAUNCH, 100, chosen_ns)
            for index in random.sample(range(EXPERTS), top_k):
                expert = layer * EXPERTS + index
                copy, there_ns = copy_in(DEMAND, expert, known_ns) if random.random() < 0.4 else (0, 0)
                run(compute, EXPERT, 600, known_ns, there_ns, expert, copy)
            predicted_ns = run(predictor, PREDICT, 200, known_ns, chosen_ns)
            target = (layer + 1) % layers * EXPERTS + random.randrange(EXPERTS)
            if random.random() < 0.7:
                copy_in(PREFETCH, target, known_ns, predicted_ns)
        run(compute, HEAD, 500, known_ns)
    return timeline


def export(timeline: Timeline, path: Path, *, limit: int | None = 200_000, **about: Any) -> ExportSummary:
    return export_timeline(timeline, path, About(**{"experts_per_layer": EXPERTS, **about}), limit=limit)


def read(path: Path) -> dict[str, Any]:
    """Parse an export with numbers as they were written."""
    packed = path.read_bytes()
    content = gzip.decompress(packed) if path.suffix == ".gz" else packed
    document: dict[str, Any] = json.loads(content, parse_float=Decimal)
    return document


def events_of(timeline: Timeline, folder: Path, **options: Any) -> list[Event]:
    export(timeline, folder / "timeline.json", **options)
    events: list[Event] = read(folder / "timeline.json")["traceEvents"]
    return events


def slices_of(events: list[Event]) -> list[Event]:
    """The slices of spans; those of calls are left out."""
    return [event for event in events if event["ph"] == "X" and event["cat"] != "cuda_runtime"]


def calls_of(events: list[Event]) -> list[Event]:
    """The calls on the host's thread, in the order of the file."""
    return [event for event in events if event.get("cat") == "cuda_runtime"]


def ns(microseconds: Decimal) -> int:
    """The written number as integer ns; it must have exactly three decimals."""
    assert microseconds.as_tuple().exponent == -3
    return int(microseconds * 1000)


def interval(event: Event) -> tuple[int, int]:
    return ns(event["ts"]), ns(event["ts"]) + ns(event["dur"])


def tracks_of(events: list[Event]) -> dict[tuple[int, int], list[Event]]:
    """The slices of each track, in the order of the file."""
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append(event)
    return tracks


def arrows_of(events: list[Event], name: str) -> Iterator[tuple[Event, Event]]:
    """Each arrow of a name as (slice it leaves, slice it reaches), as a viewer finds them: on the track, at the time.

    Of several slices there it is the one that was opened last, before the arrow's end in the file.
    """

    def at(end: Event) -> Event:
        here = [event for event in tracks[end["pid"], end["tid"]] if place[id(event)] < place[id(end)]]
        low, high = interval(here[-1])
        assert low <= ns(end["ts"]) < max(high, low + 1)
        return here[-1]

    tracks, place = tracks_of(events), {id(event): number for number, event in enumerate(events)}
    starts = {event["id"]: event for event in events if event["ph"] == "s" and event["name"] == name}
    finishes = {event["id"]: event for event in events if event["ph"] == "f" and event["name"] == name}
    assert len(starts) + len(finishes) == sum(event["ph"] in "stf" and event["name"] == name for event in events)
    assert starts.keys() == finishes.keys()
    for arrow, start in starts.items():
        finish = finishes[arrow]
        assert finish["bp"] == "e"  # bound to the slice that encloses it, not to the next one
        assert (start["cat"], start["name"]) == (finish["cat"], finish["name"])
        yield at(start), at(finish)


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, 6), st.booleans())
def test_on_every_track_slices_are_in_order_and_never_overlap_and_times_are_exact(
    seed: int, steps: int, packed: bool
) -> None:
    timeline = made_run(seed, steps)
    with TemporaryDirectory() as folder:
        path = Path(folder) / ("t.json.gz" if packed else "t.json")
        export(timeline, path)
        events = read(path)["traceEvents"]
    spans = timeline.spans()
    written = sorted(interval(event) for event in slices_of(events))
    assert written == sorted(zip(spans["start_ns"].tolist(), spans["end_ns"].tolist(), strict=True))
    for of_one_level in (slices_of(events), calls_of(events)):
        for track in tracks_of(of_one_level).values():
            for (start_ns, end_ns), (next_ns, _) in pairwise(map(interval, track)):
                assert start_ns <= end_ns <= next_ns
    assert len(tracks_of(events)) == len(set(spans["lane"].tolist()))


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(0, 100) | st.none())
def test_every_kernel_and_copy_is_tied_to_a_call_that_ends_as_it_was_issued(
    seed: int, steps: int, limit: int | None
) -> None:
    timeline = made_run(seed, steps)
    with TemporaryDirectory() as folder:
        events = events_of(timeline, Path(folder), limit=limit)
    spans = timeline.spans()
    spans = spans[np.lexsort((spans["end_ns"], spans["start_ns"]))][:limit]
    on_gpu = [event for event in slices_of(events) if event["cat"] != "cpu_op"]
    calls = {event["args"]["correlation"]: event for event in calls_of(events)}
    assert sorted(calls) == sorted(event["args"]["correlation"] for event in on_gpu)
    ends = sorted(interval(calls[event["args"]["correlation"]])[1] for event in on_gpu)
    host = timeline.lanes_with("host")[0]
    assert ends == sorted(spans["issued_ns"][spans["lane"] != host].tolist())
    assert [call["args"]["correlation"] for call in calls.values()] == list(range(1, len(calls) + 1))
    for event in on_gpu:
        copies = event["name"].startswith("Memcpy")
        assert event["cat"] == ("gpu_memcpy" if copies else "kernel")
        name = "cudaMemcpyAsync" if copies else "cudaLaunchKernel"
        assert calls[event["args"]["correlation"]]["name"] == name
    work = [interval(event) for event in slices_of(events) if event["cat"] == "cpu_op"]
    for call in calls.values():  # nested in the host's work, or of no length
        start_ns, end_ns = interval(call)
        assert start_ns == end_ns or any(low <= start_ns and end_ns <= high for low, high in work)
    for call, event in arrows_of(events, "ac2g"):
        assert call["args"]["correlation"] == event["args"]["correlation"]
    assert len(list(arrows_of(events, "ac2g"))) == len(on_gpu)


def test_a_call_begins_where_the_one_before_it_ended_or_where_the_hosts_work_began(tmp_path: Path) -> None:
    timeline = Timeline()
    host = timeline.add_lane("host", "host", "host thread")
    compute = timeline.add_lane("gpu0", "compute", "kernels")
    for start_ns, end_ns in ((0, 100), (150, 300)):
        timeline.record(start_ns, end_ns, start_ns, -1, 0, -1, host, LAUNCH)
    for issued_ns in (40, 40, 90, 120, 150, 200, 340):
        timeline.record(1000 + issued_ns, 1000 + issued_ns, issued_ns, -1, 0, -1, compute, DENSE)
    calls = calls_of(events_of(timeline, tmp_path))
    # 120 and 340 lie outside the host's work (its latency carries a launch there), 150 at its very beginning.
    assert [interval(call) for call in calls] == [
        (0, 40), (40, 40), (40, 90), (120, 120), (150, 150), (150, 200), (340, 340)
    ]  # fmt: skip
    assert {(call["pid"], call["tid"]) for call in calls} == {(1000, 1000)}


def test_each_host_thread_makes_the_calls_of_its_own_gpu(tmp_path: Path) -> None:
    timeline = Timeline()
    for number in (0, 1):
        host = timeline.add_lane(f"host{number}", "host", "host thread")
        compute = timeline.add_lane(f"gpu{number}", "compute", "kernels")
        timeline.record(0, 100 + number, 0, -1, 0, -1, host, LAUNCH)
        timeline.record(200, 210, 50 + number, -1, 0, -1, compute, DENSE)
    events = events_of(timeline, tmp_path)
    assert [(call["pid"], interval(call)) for call in calls_of(events)] == [(1000, (0, 50)), (2000, (0, 51))]
    assert [(call["pid"], kernel["pid"]) for call, kernel in arrows_of(events, "ac2g")] == [(1000, 0), (2000, 1)]


def test_graphs_launch_kernels_as_graphs_and_the_rest_as_before(tmp_path: Path) -> None:
    timeline = made_run(5, 1)
    events = events_of(timeline, tmp_path, graphs=True, pinned=False)
    call_of = {call["args"]["correlation"]: call["name"] for call in calls_of(events)}
    names = {event["args"]["kind"]: call_of.get(event["args"].get("correlation")) for event in slices_of(events)}
    assert names == {
        "dense": "cudaGraphLaunch",
        "expert": "cudaGraphLaunch",
        "head": "cudaGraphLaunch",
        "predict": "cudaLaunchKernel",
        "readback": "cudaMemcpyAsync",
        "demand": "cudaMemcpyAsync",
        "prefetch": "cudaMemcpyAsync",
        "launch": None,
    }
    copies = {event["name"] for event in slices_of(events) if event["cat"] == "gpu_memcpy"}
    assert copies == {"Memcpy HtoD (Pageable -> Device)", "Memcpy DtoH (Device -> Pinned)"}


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(0, 200) | st.none())
def test_every_arrow_of_bytes_joins_a_copy_to_the_kernel_of_its_expert_that_waited_for_it_last(
    seed: int, steps: int, limit: int | None
) -> None:
    with TemporaryDirectory() as folder:
        events = events_of(made_run(seed, steps), Path(folder), limit=limit)
    arrows = list(arrows_of(events, "bytes there"))
    for source, kernel in arrows:
        assert source["args"]["kind"] in ("demand", "prefetch")
        assert kernel["args"]["kind"] == "expert"
        assert source["args"]["copy"] == kernel["args"]["copy"]
        assert interval(source)[1] <= interval(kernel)[0]
    # And none is missing: recount them from what was written.
    end_ns: dict[int, int] = {}
    for event in slices_of(events):
        if event["args"]["kind"] in ("demand", "prefetch"):
            copy = event["args"]["copy"]
            end_ns[copy] = max(end_ns.get(copy, 0), interval(event)[1])
    issued_ns = {call["args"]["correlation"]: interval(call)[1] for call in calls_of(events)}
    waited = 0
    for track in tracks_of(slices_of(events)).values():
        free_ns = 0
        for event in track:
            there_ns = end_ns.get(event["args"].get("copy"), -1)
            if event["args"]["kind"] == "expert" and there_ns <= interval(event)[0]:
                waited += there_ns >= max(free_ns, issued_ns[event["args"]["correlation"]])
            free_ns = interval(event)[1]
    assert len(arrows) == waited


def test_an_arrow_leaves_the_last_piece_of_the_copy_that_a_kernel_waited_for_and_no_other(tmp_path: Path) -> None:
    timeline = Timeline()
    h2d = timeline.add_lane("gpu0", "h2d", "copies")
    compute = timeline.add_lane("gpu0", "compute", "kernels")
    # Copy 0 in two pieces, 0-10 and 30-40, with copy 1 in between; copy 7 was made before the run.
    for start_ns, end_ns, expert, copy, kind in (
        (0, 10, 3, 0, DEMAND),
        (10, 30, 4, 1, PREFETCH),
        (30, 40, 3, 0, DEMAND),
        (41, 51, 6, 2, DEMAND),
    ):
        timeline.record(start_ns, end_ns, 0, expert, 0, copy, h2d, kind)
    for start_ns, end_ns, expert, copy, kind in (
        (5, 10, 5, 7, EXPERT),  # resident
        (10, 12, -1, -1, DENSE),
        (30, 35, 4, 1, EXPERT),  # starts as copy 1 ends: it waited for the prefetch
        (40, 45, 3, 0, EXPERT),  # starts as the second piece of copy 0 ends
        (45, 50, 4, 1, EXPERT),  # its bytes had come long before
        (53, 60, 6, 2, EXPERT),  # starts 2 after copy 2 has ended, which it waited for
    ):
        timeline.record(start_ns, end_ns, 0, expert, 0, copy, compute, kind)
    summary = export(timeline, tmp_path / "t.json")
    events = read(tmp_path / "t.json")["traceEvents"]
    arrows = [(interval(source), interval(kernel)) for source, kernel in arrows_of(events, "bytes there")]
    assert arrows == [((10, 30), (30, 35)), ((30, 40), (40, 45)), ((41, 51), (53, 60))]
    assert summary == ExportSummary(spans_written=10, spans_total=10, arrows=3)
    ends = [(event["ph"], ns(event["ts"])) for event in events if event.get("name") == "bytes there"]
    assert sorted(ends) == [("f", 30), ("f", 40), ("f", 53), ("s", 29), ("s", 39), ("s", 50)]


def test_slices_say_what_they_are(tmp_path: Path) -> None:
    timeline = Timeline()
    lane = timeline.add_lane("gpu0", "compute", "everything")
    expert = 3 * EXPERTS + 5
    visit = 4 * 6 + 3  # the seventh step of four layers
    of_an_expert = ((EXPERT, expert), (DEMAND, expert), (PREFETCH, expert))
    of_none = ((DENSE, -1), (EXPERT, -1), (HEAD, -1), (READBACK, -1), (PREDICT, -1))
    for start_ns, (kind, number) in enumerate(of_an_expert + of_none):
        timeline.record(start_ns * 1000, start_ns * 1000 + 999, 1, number, visit, -1 if number < 0 else 2, lane, kind)
    sizes = np.array([0, 49950, 0, 0, 0, 0, 0, 0])
    outcomes = np.array([2, 0, 1, 0, 0, 0, 0, 0])
    options = {"layers": 4, "span_bytes": sizes, "span_outcomes": outcomes, "outcome_names": ("", "late", "miss")}
    slices = slices_of(events_of(timeline, tmp_path, **options))
    assert [event["name"] for event in slices] == [
        "expert L3/E5",
        "Memcpy HtoD (Pinned -> Device)",
        "Memcpy HtoD (Pinned -> Device)",
        "dense L3",
        "experts L3",
        "head",
        "Memcpy DtoH (Device -> Pinned)",
        "predict L3",
    ]
    ours = {"visit": visit, "layer": 3, "expert": 5, "expert_id": expert, "copy": 2}
    theirs = {"device": 0, "context": 1, "stream": slices[0]["tid"]}
    assert slices[0]["args"] == {**theirs, "correlation": 1, "kind": "expert", **ours, "outcome": "miss"}
    bandwidth = {"bytes": 49950, "memory bandwidth (GB/s)": Decimal("50.0")}
    assert slices[1]["args"] == {**theirs, "correlation": 2, **bandwidth, "kind": "demand", **ours}
    assert slices[2]["args"]["outcome"] == "late"
    assert slices[3]["args"] == {**theirs, "correlation": 4, "kind": "dense", "visit": visit, "layer": 3}


def test_the_head_of_the_file_tells_readers_the_gpus_and_the_rank(tmp_path: Path) -> None:
    timeline = Timeline()
    for device in ("gpu0", "gpu1"):
        timeline.add_lane(device, "compute", "kernels")
    export(timeline, tmp_path / "t.json", gpus={"name": "NVIDIA H200 (simulated)"})
    content = (tmp_path / "t.json").read_text()
    document = json.loads(content)
    assert [(gpu["id"], gpu["name"]) for gpu in document["deviceProperties"]] == [
        (0, "NVIDIA H200 (simulated)"),
        (1, "NVIDIA H200 (simulated)"),
    ]
    assert '"rank": 0,' in content  # with the space: HolisticTraceAnalysis looks for it so
    assert document["distributedInfo"]["rank"] == 0


def test_every_kind_has_a_name_and_a_category_and_every_role_a_place() -> None:
    assert list(NAMES) == list(CATEGORIES) == list(KINDS)
    assert set(CATEGORIES.values()) == {"kernel", "gpu_memcpy", "cpu_op"}  # what readers of profilers' traces know
    for kind, category in CATEGORIES.items():
        assert NAMES[kind].startswith("Memcpy") == (category == "gpu_memcpy"), kind
    timeline = Timeline()
    for role in ROLES:
        timeline.add_lane("gpu0", role, role)
    assert sorted(track_order(timeline)) == list(range(len(ROLES)))


def test_a_device_is_a_process_and_a_lane_a_thread_host_first_compute_last(tmp_path: Path) -> None:
    timeline = Timeline()
    for device, role in (("gpu1", "compute"), ("gpu0", "compute"), ("gpu0", "d2h"), ("gpu0", "h2d"), ("host", "host")):
        timeline.add_lane(device, role, f"{device} {role}")
    for lane, kind in enumerate((DENSE, DENSE, READBACK, DEMAND, LAUNCH)):
        timeline.record(lane, lane + 1, 0, -1, 0, -1, lane, kind)
    events = events_of(timeline, tmp_path)
    names = {(event["name"], event["pid"], event["tid"]): event["args"] for event in events if event["ph"] == "M"}
    processes = {pid: args["name"] for (what, pid, _), args in names.items() if what == "process_name"}
    threads = {(pid, tid): args["name"] for (what, pid, tid), args in names.items() if what == "thread_name"}
    assert list(processes.values()) == ["host", "gpu1", "gpu0"]
    by_index = sorted(
        (args["sort_index"], pid, tid) for (what, pid, tid), args in names.items() if what == "thread_sort_index"
    )
    titles = ["host host", "gpu1 compute", "gpu0 h2d", "gpu0 d2h", "gpu0 compute"]
    shown = {key: name.split(": ")[-1] for key, name in threads.items()}
    assert [shown[pid, tid] for _, pid, tid in by_index] == titles
    on_gpus = sorted((key for key in shown if key[0] != 1000), key=lambda key: key[1])
    assert [shown[key] for key in on_gpus] == titles[1:]  # for viewers that go by number
    in_time = sorted(slices_of(events), key=lambda event: ns(event["ts"]))
    for event, title in zip(in_time, (lane.title for lane in timeline.lanes), strict=True):
        assert shown[event["pid"], event["tid"]] == title
        assert title.startswith(processes[event["pid"]])
        if event["pid"] != 1000:  # a GPU's process has the GPU's number, and a thread its stream's
            assert event["args"]["device"] == event["pid"] == int(title[3])
            assert event["args"]["stream"] == event["tid"] > 0
            assert threads[event["pid"], event["tid"]].startswith(f"stream {event['tid']}: ")


def test_a_cut_timeline_holds_the_spans_that_start_first_and_says_so(tmp_path: Path) -> None:
    timeline = made_run(3, 6)
    spans = timeline.spans()
    starts_ns = np.sort(spans["start_ns"])
    summary = export(timeline, tmp_path / "t.json", limit=50, metadata={"seed": 3})
    assert (summary.spans_written, summary.spans_total, summary.truncated) == (50, len(spans), True)
    document = read(tmp_path / "t.json")
    other = {key: document["otherData"][key] for key in ("seed", "spans_written", "spans_total")}
    assert other == {"seed": 3, "spans_written": 50, "spans_total": len(spans)}
    slices = slices_of(document["traceEvents"])
    assert sorted(ns(event["ts"]) for event in slices) == starts_ns[:50].tolist()
    for limit in (len(spans), len(spans) + 1, None):
        whole = export(timeline, tmp_path / "t.json", limit=limit)
        assert (whole.spans_written, whole.truncated) == (len(spans), False)
    assert export(timeline, tmp_path / "t.json", limit=0).spans_written == 0


def counted(events: list[Event], name: str) -> list[tuple[int, dict[str, float]]]:
    """The values of a counter of GPU 0, (time in ns, values by series)."""
    counters = [event for event in events if event["ph"] == "C" and (event["name"], event["pid"]) == (name, 0)]
    return [(ns(event["ts"]), {key: float(value) for key, value in event["args"].items()}) for event in counters]


def test_memory_becomes_a_counter_that_speaks_when_it_changes_and_ends_with_the_spans(tmp_path: Path) -> None:
    timeline = Timeline()
    lane = timeline.add_lane("gpu0", "compute", "kernels")
    for start_ns in (0, 100, 200):
        timeline.record(start_ns, start_ns + 50, 0, -1, 0, -1, lane, DENSE)
    mib = 2**20
    memory = (np.array([0, 100, 120, 200]), np.array([mib, mib, 3 * mib // 2, 2 * mib]), np.array([0, 0, mib, 0]))
    wanted = [
        (0, {"resident": 1.0, "arriving": 0.0}),
        (120, {"resident": 1.5, "arriving": 1.0}),
        (200, {"resident": 2.0, "arriving": 0.0}),
    ]
    for limit, samples in ((None, 3), (2, 2)):  # the second span ends at 150
        events = events_of(timeline, tmp_path, memory={"gpu0": memory}, limit=limit)
        assert counted(events, "expert memory (MiB)") == wanted[:samples]


def test_the_queues_hold_what_is_launched_and_has_not_started(tmp_path: Path) -> None:
    timeline = Timeline()
    compute, h2d = timeline.add_lane("gpu0", "compute", "kernels"), timeline.add_lane("gpu0", "h2d", "copies")
    other = timeline.add_lane("gpu1", "compute", "kernels")
    # Two kernels launched at 10 and 20, of which the second waits for the first; one that starts as it is launched.
    for issued_ns, start_ns, end_ns in ((10, 10, 100), (20, 100, 150), (150, 150, 160)):
        timeline.record(start_ns, end_ns, issued_ns, -1, 0, -1, compute, DENSE)
    timeline.record(30, 90, 5, 1, 0, 0, h2d, DEMAND)
    timeline.record(40, 50, 45, -1, 0, -1, other, DENSE)  # seen to start before its launch had returned
    assert counted(events_of(timeline, tmp_path), "queue depth") == [
        (5, {"kernels": 0, "copies": 1}),
        (20, {"kernels": 1, "copies": 1}),
        (30, {"kernels": 1, "copies": 0}),
        (100, {"kernels": 0, "copies": 0}),
    ]


@pytest.mark.process
def test_the_same_run_gives_the_same_bytes_in_any_process_and_place(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, numpy, test_export as t\n"
        "memory = (numpy.arange(9) * 1000, numpy.arange(9) * 12345, numpy.arange(9) * 54321)\n"
        "t.export(t.made_run(7, 20), pathlib.Path(sys.argv[1]), metadata={'b': 1, 'a': [2]}, memory={'gpu0': memory})\n"
    )
    contents = set()
    for seed in ("0", "1"):
        path = tmp_path / f"run{seed}.json.gz"
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent)}
        subprocess.run([sys.executable, "-c", program, path], env=environment, check=True)
        contents.add(path.read_bytes())
    (content,) = contents
    # RFC 1952: byte 3 holds flags (8: a file name follows), bytes 4 to 7 the time.
    assert content[3] == 0
    assert content[4:8] == bytes(4)


@pytest.mark.slow
def test_it_takes_far_less_memory_than_its_events(tmp_path: Path) -> None:
    small, large = made_run(1, 50), made_run(1, 1000)

    def peak_bytes(call: Callable[[], object]) -> int:
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    export(small, tmp_path / "small.json")
    event_bytes = peak_bytes(lambda: json.loads((tmp_path / "small.json").read_bytes())) / len(small)
    peak = peak_bytes(lambda: export(large, tmp_path / "large.json.gz"))
    assert len(large) > 30_000
    assert peak < event_bytes * len(large) / 5
    # A few chunks of events, and some numbers a span (40 bytes, in order beside a copy); nothing else grows with it.
    assert peak < event_bytes * 4096 + 6 * 40 * len(large)


def test_a_run_without_spans_or_with_one_is_still_a_file(tmp_path: Path) -> None:
    nothing = Timeline()
    assert export(nothing, tmp_path / "t.json.gz") == ExportSummary(0, 0, 0)
    assert {event["name"] for event in read(tmp_path / "t.json.gz")["traceEvents"]} == set(PROCESS)
    nothing.add_lane("gpu0", "compute", "kernels")
    assert slices_of(events_of(nothing, tmp_path, memory={"gpu0": (np.zeros(0, int),) * 3})) == []
    nothing.record(5, 5, 0, -1, -1, -1, 0, DENSE)
    (event,) = slices_of(events_of(nothing, tmp_path))
    assert (event["name"], interval(event)) == ("dense", (5, 5))  # no head and no expert: the layer cannot be known


def test_a_span_of_no_length_goes_before_the_one_that_starts_at_its_instant(tmp_path: Path) -> None:
    timeline = Timeline()
    lane = timeline.add_lane("gpu0", "compute", "kernels")
    for start_ns, end_ns in ((10, 20), (10, 10), (0, 10)):
        timeline.record(start_ns, end_ns, 0, -1, 0, -1, lane, DENSE)
    assert [interval(event) for event in slices_of(events_of(timeline, tmp_path))] == [(0, 10), (10, 10), (10, 20)]


def test_times_of_many_days_keep_their_nanoseconds(tmp_path: Path) -> None:
    timeline = Timeline()
    lane = timeline.add_lane("gpu0", "compute", "kernels")
    start_ns = 10**17 + 1  # three years: no float of microseconds tells this from its neighbors
    timeline.record(start_ns, start_ns + 3, start_ns - 1, -1, 0, -1, lane, DENSE)
    events = events_of(timeline, tmp_path)
    assert [interval(event) for event in slices_of(events)] == [(start_ns, start_ns + 3)]
    assert [interval(call) for call in calls_of(events)] == [(start_ns - 1, start_ns - 1)]


def test_what_was_asked_for_before_the_run_is_launched_as_it_starts(tmp_path: Path) -> None:
    timeline = Timeline()
    timeline.record(5, 6, -7, -1, 0, -1, timeline.add_lane("gpu0", "compute", "kernels"), DENSE)
    assert [interval(call) for call in calls_of(events_of(timeline, tmp_path))] == [(0, 0)]


def test_the_layers_are_read_off_the_first_head_or_else_off_the_experts() -> None:
    timeline = Timeline()
    lane = timeline.add_lane("gpu0", "compute", "kernels")
    assert layers_of(timeline.spans(), EXPERTS) is None
    timeline.record(0, 1, 0, 2 * EXPERTS + 1, 2, 0, lane, EXPERT)
    assert layers_of(timeline.spans(), EXPERTS) == 3  # an expert of the third layer
    timeline.record(2, 3, 0, -1, 7, -1, lane, HEAD)
    timeline.record(1, 2, 0, -1, 3, -1, lane, HEAD)
    assert layers_of(timeline.spans(), EXPERTS) == 4  # visits 0 to 3 came before the first head


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("t.html", {}, "must end in .json.gz or .json"),
        ("t.gz", {}, "must end in .json.gz or .json"),
        ("t.json", {"limit": -1}, "limit = -1"),
        ("t.json", {"experts_per_layer": 0}, "experts_per_layer = 0"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(tmp_path: Path, name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        export(made_run(1, 1), tmp_path / name, **options)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("start_ns", "end_ns"), [(-1, 5), (7, 6)])
def test_a_span_that_no_viewer_can_show_is_refused(tmp_path: Path, start_ns: int, end_ns: int) -> None:
    timeline = made_run(1, 1)
    number = len(timeline)
    timeline.record(start_ns, end_ns, 0, -1, 0, -1, 4, DENSE)
    with pytest.raises(ValueError, match=rf"span {number} \(dense\) is from {start_ns} to {end_ns} ns"):
        export(timeline, tmp_path / "t.json")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "t.json.gz"
    export(made_run(1, 1), path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        export(made_run(2, 1), path, metadata={"not": object()})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
