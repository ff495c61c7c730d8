"""Requests under load, from a scenario to a result: the same by either engine, and latencies on the run's own clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prestage.engine.load import load_inputs
from prestage.engine.measure import parts
from prestage.engine.policies.scheduler import SCHEDULERS
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.scenario import Scenario, make_scenario
from prestage.engine.simulate import Result, simulate
from prestage.output.about import about_run
from prestage.output.export import export_timeline
from prestage.output.profiler_trace import load_timeline
from prestage.resources.timeline import DENSE, HEAD, SWAP
from prestage.workloads.requests.request import RepeatedStep, RequestStep


def scenario(**sections: Any) -> Scenario:
    """Returns a few short requests to a model of which a quarter of the experts has room."""
    data: dict[str, Any] = {
        "model": {"preset": "gpt-oss-20b"},
        "machine": {"profile": "h200-pcie5"},
        "workload": {"synthetic": {"tokens": 64, "sequences": 4, "prefill_tokens": 8}},
        "memory": {"gpu_budget": "25%"},
        "prefetch": {"lookahead": 1},
        "requests": {"rate": 4.0, "count": 5, "prompt_tokens": 12, "output_tokens": 3},
    }
    for name, keys in sections.items():
        data[name] = {**data.get(name, {}), **keys}
    return make_scenario(data)


def served(chosen: Scenario, engine: str) -> Result:
    return simulate(chosen, baselines=False, engine=engine)


@pytest.mark.parametrize("scheduler", ["chunked", "static"])
def test_requests_run_the_same_by_either_engine(scheduler: str) -> None:
    chosen = scenario(requests={"scheduler": {"name": scheduler, "max_num_batched_tokens": 16, "step_us": 20.0}})
    one, other = (served(chosen, engine) for engine in ("simpy", "compiled"))
    assert one.recording.spans.tolist() == other.recording.spans.tolist()
    assert one.data == other.data
    steps = one.recording.steps
    assert sum(len(step.rows) for step in steps) == 5 * (12 + 3 - 1)  # each position once, the last token not run


def test_a_scheduler_learns_how_busy_the_link_was() -> None:
    """Both engines say the same of it; who may admit nobody while the link is busy admits later."""
    sections: dict[str, Any] = {"memory": {"gpu_budget": "10%"}, "copy": {"discipline": "two_streams"}}
    asked = {"rate": 40.0, "scheduler": {"name": "expert-aware", "most_link_busy": 0.5}}
    chosen = scenario(requests=asked, **sections)
    one, other = (served(chosen, engine) for engine in ("simpy", "compiled"))
    assert one.recording.spans.tolist() == other.recording.spans.tolist()
    patient = served(scenario(requests={**asked, "scheduler": {"name": "expert-aware"}}, **sections), "compiled")
    assert one.data["requests"]["running"] < patient.data["requests"]["running"]


@pytest.mark.parametrize("discipline", ["fifo", "two_streams", "priority"])
def test_swapped_blocks_go_over_the_link_of_the_experts(discipline: str) -> None:
    """Who is preempted goes to host memory and comes back: each block out is a block in, and the next kernel waits."""
    asked: dict[str, Any] = {
        "rate": 400.0, "count": 6, "prompt_tokens": 14, "output_tokens": 12, "warmup": "0%", "cooldown": "0%",
        "kv": {"budget": "6blocks", "block_tokens": 8, "swap_budget": "1GiB"},
    }  # fmt: skip
    chosen = scenario(model={"layers": 2}, requests=asked, copy={"discipline": discipline})
    one, other = (served(chosen, engine) for engine in ("simpy", "compiled"))
    assert one.recording.spans.tolist() == other.recording.spans.tolist() and one.data == other.data
    steps = [step for step in one.recording.steps if isinstance(step, RequestStep)]
    out, back = (sum(getattr(step, f"swap_{way}_bytes") for step in steps) for way in ("out", "in"))
    assert out == back > 0
    swaps = one.recording.spans[one.recording.spans["kind"] == SWAP]
    copies = sum(bool(step.swap_out_bytes) + bool(step.swap_in_bytes) for step in steps)
    assert len(swaps) == copies
    dense = one.recording.compute_spans[one.recording.compute_spans["kind"] == DENSE]
    for swap in swaps:
        waits = dense[dense["visit"] == swap["visit"] + 1]
        assert (waits["start_ns"] >= swap["end_ns"]).all() and len(waits) == 1
    # Two layers of 2 KiB a position, at 55 GB/s and some 10 us a copy; beside a prefetch, twice as long.
    took_ns = int((swaps["end_ns"] - swaps["start_ns"]).sum())
    alone_ns = (out + back) / 55 + 10_000 * copies
    assert 0.75 * alone_ns < took_ns < (2 if discipline == "two_streams" else 1.25) * alone_ns


def test_a_streamed_run_is_measured_in_parts_to_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spans in files are looked at a few at a time: what waits for what may lie in two parts."""
    asked = {
        "rate": 400.0, "count": 6, "prompt_tokens": 14, "output_tokens": 12, "slo": {"ttft_ms": 100.0},
        "kv": {"block_tokens": 4, "budget": "16blocks", "swap_budget": "1MiB"},
    }  # fmt: skip
    chosen = scenario(model={"layers": 2}, requests=asked)
    whole = simulate(chosen, baselines=False).data
    monkeypatch.setattr(parts, "AT_ONCE", 7)
    streamed = simulate(chosen, baselines=False, stream=tmp_path)
    assert isinstance(streamed.recording.compute_spans, np.memmap) and streamed.data == whole
    assert {path.suffix for path in (tmp_path / "gpu0").iterdir()} == {".npy"}  # nothing else is left there


def test_accesses_without_a_copy_are_measured_in_parts_to_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the CPU computes stands behind all accesses that have a copy: an expert's first may be of either."""
    chosen = scenario(model={"layers": 2}, miss={"policy": "cpu", "cpu_gb_per_s": 50, "cpu_max_tokens": 1})
    whole = simulate(chosen, baselines=False).data
    assert whole["miss"]["ways"]["cpu"] > 7 < whole["miss"]["ways"]["fetched"]
    monkeypatch.setattr(parts, "AT_ONCE", 7)
    assert simulate(chosen, baselines=False).data == whole


def test_decoding_takes_longer_the_longer_the_request() -> None:
    steps_ms = []
    for prompt_tokens in (12, 20_000):
        asked = {"rate": 0.01, "count": 2, "prompt_tokens": prompt_tokens, "output_tokens": 8, "warmup": "0%"}
        sections: dict[str, Any] = {"memory": {"gpu_budget": "100%"}, "dispatch": {"mode": "free"}}
        found = served(scenario(requests={**asked, "cooldown": "0%"}, **sections), "compiled")
        assert "attention over the context" in found.data["estimates"]
        steps_ms.append(found.data["requests"]["itl_ms"]["p50"])
    # gpt-oss-20b reads 2 KiB a position in each of 12 layers without a window, 492 MB: 0.1 ms at the 4.8 TB/s of an
    # H200's memory.
    assert 0.05 < steps_ms[1] - steps_ms[0] < 0.2


def test_latencies_are_those_of_the_run() -> None:
    found = served(scenario(), "simpy")
    log = found.serving.log
    assert log is not None
    requests, steps = log.requests, log.steps
    heads = found.recording.spans[found.recording.spans["kind"] == HEAD]
    # The host has the tokens once they are read back, behind the head; nothing starts before it is asked for.
    assert (steps["end_ns"] > np.sort(heads["end_ns"])).all()
    assert (steps["start_ns"][1:] >= steps["end_ns"][:-1]).all()
    first_ms = (requests["first_token_ns"] - requests["arrival_ns"]) / 1e6
    assert found.data["time_to_first_token_ms"]["mean"] == pytest.approx(first_ms.mean())
    assert (requests["started_ns"] >= requests["arrival_ns"]).all()
    # Whoever waited for nobody found the host idle until it came.
    waited_for = {until for _, until in found.recording.idle}
    assert waited_for
    assert waited_for <= set(requests["arrival_ns"].tolist())


def test_what_needs_the_future_is_refused() -> None:
    with pytest.raises(ScenarioError, match=r"memory.eviction = 'belady': it must know all steps beforehand"):
        load_inputs(scenario(memory={"eviction": "belady"}))


def test_a_kv_cache_takes_its_room_from_the_experts() -> None:
    fixed = load_inputs(scenario(memory={"gpu_budget": "100%", "total_bytes": "10GiB"}))
    assert fixed.pulls is not None
    assert fixed.budget_bytes + fixed.pulls.kv_bytes < 10 * 2**30
    moving = scenario(
        memory={"gpu_budget": "100%", "total_bytes": "10GiB"},
        requests={
            "kv": {"boundary": "moving", "budget": "2GiB"},
            "rate": 400.0,
            "prompt_tokens": 600,
        },  # more than an expert
    )
    found = served(moving, "simpy")
    budgets = found.recording.decoded.visits["budget_bytes"]
    assert len(set(budgets.tolist())) > 1


@pytest.mark.slow
@pytest.mark.parametrize("arrivals", ["poisson", "closed"])
@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_steps_that_are_known_ahead_are_those_that_would_be_asked_for(scheduler: str, arrivals: str) -> None:
    """The compiled engine takes many at once; SimPy processes ask for each. Requests come while others decode."""
    asked = {
        "arrivals": arrivals, "rate": 30.0, "users": 3, "count": 12, "prompt_tokens": 12,
        "output_tokens": {"mean": 20, "distribution": "uniform", "cv": 0.5},
        "warmup": "0%", "cooldown": "0%", "kv": {"budget": "14blocks", "block_tokens": 8},
        "scheduler": {"name": scheduler, "max_num_batched_tokens": 16, "max_num_seqs": 4},
    }  # fmt: skip
    chosen = scenario(model={"layers": 2}, requests=asked)
    one, other = (served(chosen, engine) for engine in ("simpy", "compiled"))
    assert other.inputs is not None
    known = [step for step in other.recording.steps if isinstance(step, RepeatedStep)]
    assert len(known) > 20, "few were known ahead"
    parts = [[step.parts for step in run.recording.steps if isinstance(step, RequestStep)] for run in (one, other)]
    assert parts[0] == parts[1]
    assert one.recording.spans.tolist() == other.recording.spans.tolist()
    assert one.data == other.data
    logs = one.serving.log, other.serving.log
    assert logs[0] is not None and logs[1] is not None
    for name in logs[0].steps:
        assert logs[0].steps[name].tolist() == logs[1].steps[name].tolist(), name
    assert [each.tolist() for each in logs[0].token_times()] == [each.tolist() for each in logs[1].token_times()]


def test_a_million_tokens_cost_what_the_machine_draws_and_costs() -> None:
    cost = {"watts": 700.0, "idle_watts": 100.0, "price_per_hour": 3.6}
    found = served(scenario(model={"layers": 2}, requests={"cost": cost}), "compiled").data
    seconds = found["makespan_ms"] / 1e3
    busy_s = (found["time"]["compute_ms"] + found["time"]["predictor_ms"]) / 1e3
    tokens = 5 * 3
    costs = found["requests"]["cost"]
    assert costs["price_per_million_tokens"] == pytest.approx(3.6 / 3600 * seconds / tokens * 1e6)
    joules = 700 * busy_s + 100 * (seconds - busy_s)
    assert costs["energy_kwh_per_million_tokens"] == pytest.approx(joules / 3.6e6 / tokens * 1e6)
    assert "cost" not in served(scenario(model={"layers": 2}), "compiled").data["requests"]
    with pytest.raises(ScenarioError, match="idle_watts: give watts"):
        scenario(requests={"cost": {"idle_watts": 5.0}})


def test_a_timeline_file_has_a_track_a_request(tmp_path: Path) -> None:
    """From arrival to last token, with what it waited for inside; and the file reads back as the run's spans."""
    found = served(scenario(model={"layers": 2}), "compiled")
    export_timeline(found.timeline, tmp_path / "t.json", about_run(found))
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    mine = [event for event in events if event.get("cat") == "request"]
    assert {event["id"] for event in mine} == set(range(5))
    assert found.serving.log is not None
    requests = found.serving.log.requests
    for number in range(5):
        own = [(event["ph"], event["name"], round(event["ts"] * 1000)) for event in mine if event["id"] == number]
        assert own[0] == ("b", f"request {number}", int(requests["arrival_ns"][number]))
        assert own[-1] == ("e", f"request {number}", int(requests["finished_ns"][number]))
        assert ("b", "tokens", int(requests["first_token_ns"][number])) in own
        opened = [phase for phase, _, _ in own]
        assert opened.count("b") == opened.count("e")
        assert [at for _, _, at in own] == sorted(at for _, _, at in own), "in order of time"
    # What each step held stands in counters, from its start to its end.
    held = {"requests": {}, "KV blocks": {}}  # type: dict[str, dict[int, dict[str, int]]]
    for event in events:
        if event["ph"] == "C" and event["name"] in held:
            held[event["name"]][round(event["ts"] * 1000)] = event["args"]
    steps = found.serving.log.steps
    for name, series in {"requests": ("running", "waiting"), "KV blocks": ("kv_blocks",)}.items():
        at = np.array(sorted(held[name]))
        for place, start_ns in enumerate(steps["start_ns"].tolist()):
            last = int(at[np.searchsorted(at, start_ns, side="right") - 1])
            assert list(held[name][last].values()) == [steps[column][place] for column in series]
        assert set(held[name][int(at[-1])].values()) == {0} and at[-1] == steps["end_ns"][-1]
    back = load_timeline(tmp_path / "t.json")
    assert len(back.timeline) == len(found.timeline) and not back.reading.left_out.events
