"""Meta's HolisticTraceAnalysis reads a simulated run as it reads a profiled one, and comes to our own figures.

It runs where that is installed, with --no-deps (it asks for Jupyter and more), beside the `timeline-test` extra.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prestage.engine.simulate import Result
from prestage.output.about import about_run
from prestage.output.export import export_timeline
from prestage.output.summary import timeline_summary

pytestmark = [
    pytest.mark.slow,
    # Third parties': what it imports and how it builds tables is its own affair.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def analysis(default_run: Result, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("hta") / "timeline.json.gz"
    export_timeline(default_run.timeline, path, about_run(default_run))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HTA_DISABLE_NS_ROUNDING", "1")
        yield analysis_of(path)


def analysis_of(path: Path) -> Any:
    trace_analysis = pytest.importorskip(
        "hta.trace_analysis", reason="needs HolisticTraceAnalysis (pip install --no-deps HolisticTraceAnalysis)"
    )
    return trace_analysis.TraceAnalysis(trace_dir=str(path.parent))


def test_its_temporal_breakdown_of_the_default_run_is_ours(analysis: Any, default_run: Result) -> None:
    (row,) = analysis.get_temporal_breakdown(visualize=False).to_dict("records")
    summary = timeline_summary(default_run.timeline)
    gpu = summary["gpus"]["gpu0"]
    ours_ms = [gpu["compute_ms"], gpu["not_compute_ms"], gpu["idle_ms"], gpu["span_ms"]]
    theirs_us = [row[f"{name}_time(us)"] for name in ("compute", "non_compute", "idle", "kernel")]
    assert np.array(theirs_us) / 1000 == pytest.approx(ours_ms, rel=1e-3)
    # And the summary is of what the metrics say: kernels on the compute stream and, beside them, the predictor's.
    data = default_run.data
    assert summary["roles"]["gpu0 compute"]["busy_ms"] == pytest.approx(data["time"]["compute_ms"], rel=1e-9)
    first_ms = float(default_run.recording.compute_spans["start_ns"][0]) / 1e6
    assert gpu["span_ms"] + first_ms == pytest.approx(data["makespan_ms"], rel=1e-3)
    predicting_alone_ms = row["compute_time(us)"] / 1000 - data["time"]["compute_ms"]
    # The predictor's time is not on the compute stream here: it is the host's, waiting for guesses.
    waiting_ms = sum(data["time"][f"{part}_ms"] for part in ("stall", "host", "predictor")) - first_ms
    assert predicting_alone_ms + gpu["not_compute_ms"] + gpu["idle_ms"] == pytest.approx(waiting_ms, rel=1e-3)


def test_it_ties_every_kernel_and_copy_to_the_call_that_launched_it(analysis: Any, default_run: Result) -> None:
    frame, symbols = analysis.t.get_trace(0), analysis.t.symbol_table.get_sym_table()
    on_gpu = frame[frame["stream"].ne(-1)]
    spans = default_run.timeline.spans()
    lanes = [number for number, lane in enumerate(default_run.timeline.lanes) if lane.device == "gpu0"]
    assert len(on_gpu) == np.isin(spans["lane"], lanes).sum()
    calls = frame.loc[on_gpu["index_correlation"]]
    assert {symbols[name] for name in calls["name"]} == {"cudaGraphLaunch", "cudaLaunchKernel", "cudaMemcpyAsync"}
    assert (calls["ts"].to_numpy() + calls["dur"].to_numpy() <= on_gpu["ts"].to_numpy() + 1e-3).all()


def test_it_reads_the_bandwidth_of_our_copies(analysis: Any, default_run: Result) -> None:
    found = analysis.get_memory_bw_summary().loc[(0, "Memcpy HtoD"), "memory_bw_gbps"]
    copies = default_run.recording.copy_spans
    gb_per_s = default_run.recording.expert_bytes[0] / (copies["end_ns"] - copies["start_ns"])
    assert found["count"] == len(copies)
    assert [found["mean"], found["min"], found["max"]] == pytest.approx(
        [gb_per_s.mean(), gb_per_s.min(), gb_per_s.max()], rel=1e-4
    )
