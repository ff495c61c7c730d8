"""From a scenario to a result: what the numbers add up to, the baselines, warnings, and the same bytes every time."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from tiny import tiny_inputs, tiny_model, tiny_profile, tiny_run, tiny_scenario, tiny_trace

from prestage.engine.load import load_inputs
from prestage.engine.measure.metrics import link_utilization
from prestage.engine.policies.copy_order import COPY_ORDERS
from prestage.engine.policies.eviction import EVICTION
from prestage.engine.policies.prefetch import PREFETCH
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.scenario import load_scenario, make_scenario
from prestage.engine.scenario.sections import DISPATCH_MODES, EXPERT_KERNELS, EXPERT_ORDERS, PREDICTOR_LANES
from prestage.engine.simulate import Result, simulate, simulate_inputs
from prestage.output.run_folder import write_result
from prestage.workloads.batches import PREFILL_MODES
from prestage.workloads.predictors import PREDICTORS

#: The default scenario, small: 6 layers of 32 experts, 3 sequences of 2 prompt tokens, 24 decode tokens.
SMALL = (
    "model.layers=6",
    "workload.tokens=24",
    "workload.synthetic.tokens=30",
    "workload.synthetic.sequences=3",
    "workload.synthetic.prefill_tokens=2",
)
#: One run of each way in which a run can differ.
WAYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "no prefetch": ("prefetch.lookahead=0",),
    "three ahead": ("prefetch.lookahead=3", "prefetch.k=8"),
    "little room": ("memory.gpu_budget=8experts",),
    "all fits": ("memory.gpu_budget=100%",),
    "per layer": ("memory.scope=per-layer",),
    "stale dropped": ("copy.discipline=priority", "copy.chunk_bytes=4194304", "copy.drop_stale=true"),
    "pageable": ("copy.host_memory=pageable",),
    "uncoupled": ("copy.contention=false",),
    "runs ahead": ("dispatch.router_readback=false", "dispatch.launch_queue_depth=20"),
    "predictor in the way": ("predictor.lane=compute", "predictor.latency_us=50"),
    "batch": ("workload.batch=3",),
    "chunks": ("workload.prefill=chunked", "workload.chunk_tokens=1"),
    "other machine": ("machine.profile=rtx3090",),
    **{f"discipline {name}": (f"copy.discipline={name}",) for name in COPY_ORDERS},
    **{f"dispatch {name}": (f"dispatch.mode={name}",) for name in DISPATCH_MODES},
    **{f"order {name}": (f"dispatch.expert_order={name}",) for name in EXPERT_ORDERS},
    **{f"kernel {name}": (f"dispatch.expert_kernel={name}",) for name in EXPERT_KERNELS},
    **{f"lane {name}": (f"predictor.lane={name}", "predictor.latency_us=20") for name in PREDICTOR_LANES},
    **{f"prefill {name}": (f"workload.prefill={name}",) for name in PREFILL_MODES},
    **{f"eviction {name}": (f"memory.eviction={name}",) for name in EVICTION},
    # The recorded predictor needs a trace that holds predictions: it has a test of its own.
    **{f"predictor {name}": (f"predictor.name={name}",) for name in PREDICTORS if name not in ("recorded", "learned")},
    **{f"policy {name}": ("predictor.name=transition", f"prefetch.policy={name}") for name in PREFETCH},
}


@cache
def result_of(*settings: str) -> Result:
    """The result of the small scenario with these settings; runs are shared between tests, and never changed."""
    return simulate(load_scenario("synthetic", [*SMALL, *settings]))


def data_of(*settings: str) -> dict[str, Any]:
    return result_of(*settings).data


def written(result: Result, folder: Path) -> dict[str, bytes]:
    write_result(result, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What adds up, in every way of running.


@pytest.mark.parametrize("way", WAYS)
def test_outcomes_add_up_to_accesses_fates_to_prefetches_and_causes_to_misses(way: str) -> None:
    data = data_of(*WAYS[way])
    counts, fates = data["counts"], data["prefetch"]
    outcomes = [counts[name] for name in ("prefetch_hit", "cache_hit", "late", "miss")]
    assert sum(outcomes) == data["accesses"] > 0
    assert sum(fates.values()) == counts["prefetch"]
    assert fates["useful"] == counts["prefetch_hit"]
    assert sum(data["misses"].values()) == counts["miss"]
    assert data["hit_rate"] == (counts["prefetch_hit"] + counts["cache_hit"]) / data["accesses"]
    assert data["late_rate"] == counts["late"] / data["accesses"]
    for name in ("prefetch_hit", "cache_hit", "late", "miss"):
        assert sum(layer[name] for layer in data["by_layer"]) == counts[name]
    for name, number in fates.items():
        assert sum(layer[f"prefetch_{name}"] for layer in data["by_layer"]) == number


@pytest.mark.parametrize("way", WAYS)
def test_the_parts_of_time_add_up_to_the_makespan_to_the_nanosecond(way: str) -> None:
    data = data_of(*WAYS[way])
    parts_ns = [round(ms * 1e6) for ms in data["time"].values()]
    assert all(ns >= 0 for ns in parts_ns)
    assert sum(parts_ns) == round(data["makespan_ms"] * 1e6)
    assert data["stall_ms"] == data["time"]["stall_ms"]


@pytest.mark.parametrize("way", WAYS)
def test_every_number_is_plain_and_every_rate_a_fraction(way: str) -> None:
    data = data_of(*WAYS[way])
    assert orjson.loads(orjson.dumps(data)) == data
    for name in ("hit_rate", "late_rate", "overlap", "memory_utilization"):
        assert data[name] is None or 0 <= data[name] <= 1, name
    percentiles = data["decode_step_ms"]
    assert 0 < percentiles["p50"] <= percentiles["p95"] <= percentiles["p99"]
    assert 0 < data["resident_ms"] <= data["makespan_ms"]
    assert data["speedup"] == data["baseline_ms"] / data["makespan_ms"]
    assert data["efficiency"] == data["speedup"] / data["memory_utilization"]


@pytest.mark.parametrize("way", WAYS)
def test_a_run_serves_the_tokens_that_were_asked_for(way: str) -> None:
    result = result_of(*WAYS[way])
    data, workload = result.data, result.data["scenario"]["workload"]
    assert data["decode_tokens"] == 24
    assert data["prefill_tokens"] == (0 if workload["prefill"] == "skip" else 6)
    assert data["layer_visits"] == len(result.recording.steps) * 6
    last_ns = result.timeline.spans()["end_ns"].max()
    assert round(data["makespan_ms"] * 1e6) <= last_ns


@pytest.mark.parametrize("way", WAYS)
def test_bytes_are_those_of_the_copies_that_were_made(way: str) -> None:
    data = data_of(*WAYS[way])
    size = 13_236_480  # of one gpt-oss-20b expert
    assert data["bytes"]["demand"] == data["counts"]["miss"] * size
    assert data["bytes"]["prefetch"] == (data["counts"]["prefetch"] - data["prefetch"]["cancelled"]) * size
    assert data["bytes"]["prefetch_not_used"] == (data["prefetch"]["wasted"] + data["prefetch"]["unused"]) * size
    assert data["expert_bytes_total"] == 6 * 32 * size
    assert data["budget_bytes"] <= data["expert_bytes_total"]


def test_a_result_names_what_it_is_of() -> None:
    data = data_of("seed=7")
    assert data["seed"] == data["scenario"]["seed"] == 7
    assert data["model"] == {"name": "gpt-oss-20b", "layers": 6, "experts": 32, "top_k": 4}
    assert set(data["versions"]) == {"prestage", "python", "simpy", "numpy"}
    assert len(data["predictions_sha256"]) == 64
    assert set(result_of("seed=7").json_data()) == {*data, "engine", "engine_why", "range", "unsure", "wall_s"}


# Baselines.


def test_both_baselines_by_hand() -> None:
    # Dense 3, copy 20, expert 7 ns; two layers, three tokens, always the same expert. Without a cache each of the six
    # visits takes 3 + 20 + 7 = 30; all resident, 10. With room for both experts the first two visits take 30 each, the
    # other four 10: 100.
    trace = tiny_trace([[[0], [1]]] * 3)
    scenario = tiny_scenario()
    data = simulate_inputs(tiny_inputs(tiny_model(2), tiny_profile(), trace, scenario)).data
    times_ms = [data[name] for name in ("baseline_ms", "resident_ms", "makespan_ms")]
    assert times_ms == [180e-6, 60e-6, 100e-6]
    assert data["speedup"] == pytest.approx(1.8)
    # One of eight places is given out while the first layer runs, two from the second layer's dispatch on. Layer 1's
    # choice is known when its dense part has run, at 33: (33 - 3) x 1/8 + (100 - 33) x 2/8, over 100.
    assert data["memory_utilization"] == pytest.approx((30 * 1 / 8 + 67 * 2 / 8) / 100)


def test_the_baseline_has_the_scope_of_the_scenario() -> None:
    # Two layers, two experts at each: with room for two in all, both of a visit are copied one after the other, and the
    # first computes meanwhile: 3 + 20 + 20 + 7 = 50. With one place a layer a visit is served in two waves, and the
    # second copy waits for the first kernel: 3 + 20 + 7 + 20 + 7 = 57.
    for scope, visit_ns in (("global", 50), ("per-layer", 57), ("benefit", 57), ("shared", 50)):
        memory = {"gpu_budget": "2experts", "scope": scope, "caching": False}
        inputs = tiny_inputs(tiny_model(2, top_k=2), tiny_profile(), TWO_AT_EACH, tiny_scenario(memory=memory))
        data = simulate_inputs(inputs).data
        assert data["baseline_ms"] == data["makespan_ms"] == 3 * 2 * visit_ns / 1e6, scope
        assert data["resident_ms"] == 3 * 2 * (3 + 7 + 7) / 1e6


#: Three tokens of two layers, each of which chooses two experts.
TWO_AT_EACH = tiny_trace([[[0, 1], [2, 3]]] * 3)


@pytest.mark.parametrize("scope", ["global", "per-layer"])
def test_the_baseline_runs_where_whole_experts_have_less_room_than_one_takes(scope: str) -> None:
    # Compressed to a half, experts of 20 bytes fit 15 bytes, or 15 a layer; without compression none does.
    sections = {
        "memory": {"gpu_budget": "15B" if scope == "global" else "30B", "scope": scope},
        "compression": {"where": "gpu", "ratio": 0.5, "decompress_gb_per_s": 1.0},
    }
    inputs = tiny_inputs(tiny_model(2), tiny_profile(), tiny_trace([[[0], [1]]]), tiny_scenario(**sections))
    assert simulate_inputs(inputs).data["baseline_ms"] == 2 * 30 / 1e6


def test_baselines_do_not_depend_on_prefetch_or_cache() -> None:
    first, *others = (data_of(*WAYS[way]) for way in ("default", "no prefetch", "three ahead"))
    for other in others:
        assert (other["baseline_ms"], other["resident_ms"]) == (first["baseline_ms"], first["resident_ms"])


def test_a_run_without_prefetch_or_caching_is_its_own_baseline() -> None:
    data = simulate(load_scenario("synthetic", settings=[*SMALL, "memory.caching=false", "prefetch.lookahead=0"])).data
    assert data["makespan_ms"] == data["baseline_ms"]
    assert data["counts"]["miss"] == data["accesses"]


def test_the_same_cache_without_prefetch_is_what_such_a_scenario_runs() -> None:
    checked = simulate(load_scenario("synthetic", settings=SMALL), baselines=False, check_prefetch=True).data
    without = simulate(load_scenario("synthetic", settings=[*SMALL, "prefetch.lookahead=0"]), check_prefetch=True).data
    assert checked["no_prefetch_ms"] == without["makespan_ms"] == without["no_prefetch_ms"]
    assert checked["prefetch_speedup"] == without["makespan_ms"] / checked["makespan_ms"]
    assert checked["hit_rate_without_prefetch"] == without["hit_rate"]


def test_the_link_is_busy_while_a_copy_is_on_it() -> None:
    # Two tokens, one layer, each another expert: dense 3, copy 20, expert 7, twice; 40 of 60 ns have a copy.
    recording = tiny_run(tiny_model(1), tiny_profile(), tiny_trace([[[0]], [[1]]]), tiny_scenario())
    assert link_utilization(recording) == 40 / 60


def test_without_baselines_everything_else_is_the_same() -> None:
    bare = simulate(load_scenario("synthetic", SMALL), baselines=False).data
    given = ("baseline_ms", "resident_ms", "speedup", "efficiency")
    assert bare == {key: value for key, value in data_of().items() if key not in given}


def test_looking_nowhere_ahead_is_no_prefetch() -> None:
    left_out = ("scenario",)
    nowhere, none = (
        {key: value for key, value in data_of(setting).items() if key not in left_out}
        for setting in ("prefetch.lookahead=0", "prefetch.policy=none")
    )
    assert nowhere == none
    assert nowhere["counts"]["prefetch"] == nowhere["pollution"] == 0
    assert nowhere["predictions_sha256"] is None


# Warnings.


def warnings_about(word: str, *settings: str) -> list[str]:
    return [warning for warning in data_of(*settings)["warnings"] if warning.startswith(word)]


def test_a_global_lru_too_small_for_one_round_never_hits_and_says_why() -> None:
    # (6 - 1) x 4 = 20 experts of other layers between two visits of a layer; one more is needed to keep any.
    small = ("memory.gpu_budget=20experts", "prefetch.lookahead=0")
    (warning,) = warnings_about("cliff", *small)
    assert " 20 experts of other layers" in warning and "scope = per-layer" in warning
    assert f"at least {21 * 13_236_480 / 2**20:,.2f} MiB" in warning
    assert not warnings_about("cliff", "memory.gpu_budget=21experts", "prefetch.lookahead=0")
    assert not warnings_about("cliff", "memory.scope=per-layer")


def test_below_the_cliff_decoding_alone_hits_exactly_nothing() -> None:
    data = data_of("memory.gpu_budget=20experts", "prefetch.lookahead=0", "workload.prefill=skip")
    assert data["hit_rate"] == 0.0
    assert data["counts"]["miss"] == data["accesses"] == 24 * 6 * 4


def test_estimates_and_a_free_prediction_are_said_and_only_where_they_are() -> None:
    assert warnings_about("estimated cost in use: dense part, expert, head")
    assert list(data_of()["estimates"]) == ["dense part", "expert", "head"]
    assert warnings_about("prediction is free")
    assert not warnings_about("prediction is free", "predictor.latency_us=1")
    assert not warnings_about("prediction is free", "prefetch.lookahead=0")
    # Nothing is estimated where every cost is a measured point or without weight.
    inputs = tiny_inputs(tiny_model(2, dense_ns=0), tiny_profile(), tiny_trace([[[0], [1]]]), tiny_scenario())
    assert "expert" not in simulate_inputs(inputs, baselines=False).data["estimates"]


# The same scenario, the same bytes.


def test_what_a_result_echoes_makes_it_again_to_the_byte(tmp_path: Path) -> None:
    first = result_of("prefetch.lookahead=2", "copy.discipline=priority")
    again = simulate(make_scenario(orjson.loads(orjson.dumps(first.data["scenario"]))))
    assert written(again, tmp_path / "again") == written(first, tmp_path / "first")


@pytest.mark.process
def test_two_processes_that_hash_differently_write_the_same_bytes(tmp_path: Path) -> None:
    settings = [part for setting in (*SMALL, *WAYS["stale dropped"]) for part in ("--set", setting)]
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "MPLBACKEND": "Agg"}
        command = [sys.executable, "-m", "prestage", "run", "synthetic", *settings, "--out", str(tmp_path / seed)]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / seed).iterdir()} for seed in ("1", "2"))
    assert first == second
    assert sorted(first) == ["memory.png", "result.json", "run.safetensors", "timeline.json.gz", "timeline.png"]
    assert first == written(result_of(*WAYS["stale dropped"]), tmp_path / "here")


def test_another_seed_draws_another_trace_and_other_guesses() -> None:
    assert data_of("seed=1")["predictions_sha256"] != data_of()["predictions_sha256"]
    assert data_of("seed=1")["makespan_ms"] != data_of()["makespan_ms"]


def test_policies_meet_the_same_guesses() -> None:
    hashes = {data_of(*WAYS[way])["predictions_sha256"] for way in ("default", "little room", "stale dropped")}
    assert len(hashes) == 1


# Progress, and what cannot run.


def test_progress_tells_every_run_and_ends_at_its_end() -> None:
    told: list[tuple[str, int, int]] = []
    simulate(load_scenario("synthetic", SMALL), progress=lambda *what: told.append(what))
    runs = list(dict.fromkeys(what for what, _, _ in told))
    assert runs == ["simulate", "all resident", "no prefetch, no cache"]
    for run in runs:
        done = [number for what, number, _ in told if what == run]
        assert done == sorted(set(done))
        assert done[-1] == data_of()["layer_visits"] == next(total for what, _, total in told if what == run)


def test_recorded_predictions_run_from_the_trace(tmp_path: Path) -> None:
    # Every guess for the next layer right, none across the token boundary, and no confidences.
    trace = load_inputs(load_scenario("synthetic", SMALL)).trace
    ahead = np.concatenate([trace.experts[:, 1:].astype(np.int16), np.full((30, 1, 4), -1, dtype=np.int16)], axis=1)
    recorded = replace(trace, predictions=ahead[:, :, None, :])
    recorded.save(tmp_path / "t.npz")
    settings = [*SMALL[:2], f"workload.trace={tmp_path / 't.npz'}", "memory.gpu_budget=100%", "predictor.name=recorded"]
    data = simulate(load_scenario("synthetic", settings), baselines=False).data
    # With room for all, whatever was fetched is used, and the first layer alone ever misses.
    assert data["prefetch"]["wasted"] == data["prefetch"]["unused"] == 0 < data["counts"]["prefetch"]
    missed = [layer["miss"] for layer in data["by_layer"]]
    assert missed[0] > 0 and missed[1:] == [0] * 5
    with pytest.raises(ScenarioError, match=r"'threshold' needs confidences, and predictor\.name = 'recorded' gives"):
        load_inputs(load_scenario("synthetic", [*settings, "prefetch.policy=threshold"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["predictor.name=recorded"], "predictions"),
        (["workload.prefill=skip", "workload.synthetic.prefill_tokens=10"], "workload.trace: no token is left to run"),
        (["prefetch.k=33"], "prefetch.k = 33: a layer has 32 experts"),
        (["memory.gpu_budget=1B"], "the expert budget is 1 byte: it must hold one expert, 12.62 MiB"),
    ],
)
def test_what_cannot_run_is_refused_before_it_runs(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_inputs(load_scenario("synthetic", [*SMALL, *settings]))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("key", "wanted"), [("layers", 5), ("experts", 16), ("top_k", 2)])
def test_a_trace_of_another_model_is_refused_naming_the_key(tmp_path: Path, key: str, wanted: int) -> None:
    load_inputs(load_scenario("synthetic", SMALL)).trace.save(tmp_path / "t.npz")
    settings = ["model.layers=6", f"workload.trace={tmp_path / 't.npz'}", f"model.{key}={wanted}"]
    with pytest.raises(ScenarioError, match=rf"model\.{key} = {wanted} \(gpt-oss-20b\), but the trace has "):
        load_inputs(load_scenario("synthetic", settings))
