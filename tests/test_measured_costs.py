"""What a measured profile says beyond the simplest one: tables over tokens, host calls, lags, and how sure all is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from lone_lanes import Lanes
from tiny import (
    ASSUMED,
    EXPERT_FF,
    HIDDEN,
    run_alike,
    tiny_costs,
    tiny_inputs,
    tiny_model,
    tiny_pipeline,
    tiny_profile,
    tiny_run,
    tiny_scenario,
    tiny_trace,
)

from prestage.engine.costs.runtime_costs import token_bucket
from prestage.engine.costs.scatter import SCATTERED, Scatter, Scattering, box_muller
from prestage.engine.costs.uncertainty import replicate_costs
from prestage.engine.costs.values import CopyCost, KernelCost
from prestage.engine.load import load_inputs
from prestage.engine.measure.recording import Recording
from prestage.engine.run import prepared, run_all
from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.simulate import simulate_inputs
from prestage.engine.timing.lanes import couple
from prestage.resources.lags import Lags
from prestage.resources.profile import Profile, make_profile
from prestage.resources.timeline import DEMAND, DENSE, EXPERT, HEAD, PREDICT, PREFETCH
from prestage.workloads.batches import plan_steps

ONE_TOKEN = tiny_trace([[[0], [1]]])


def changed(profile: Profile, **sections: dict[str, Any]) -> Profile:
    """Returns a profile with keys of its sections replaced."""
    data = profile.model_dump()
    for section, keys in sections.items():
        data[section].update(keys)
    return make_profile(data, "changed")


def fixed(ns: int, beside_copy_ns: int | None = None) -> dict[str, Any]:
    return {"ns": ns, **({} if beside_copy_ns is None else {"beside_copy_ns": beside_copy_ns}), **ASSUMED}


def expert_point(tokens: int, ns: int, dispatch: str = "eager", **more: Any) -> dict[str, Any]:
    shape = {"hidden": HIDDEN, "expert_ff": EXPERT_FF, "dtype": "int8", "dispatch": dispatch}
    return {**shape, "tokens": tokens, "ns": ns, "beside_copy_ns": ns, **more, **ASSUMED}


def dense_point(weight_bytes: int, ns: int, dispatch: str = "eager", **more: Any) -> dict[str, Any]:
    shape = {"hidden": HIDDEN, "weight_bytes": weight_bytes, "dtype": "int8", "kernels": 1, "tokens": 1}
    return {**shape, "dispatch": dispatch, "ns": ns, "beside_copy_ns": ns, **more, **ASSUMED}


# Tables over tokens.


def test_between_measured_tokens_a_cost_runs_straight_and_beyond_them_the_rule_adds() -> None:
    # The tiny rule: 1 ns a weight byte and nothing for the arithmetic, so more tokens add nothing but the flag.
    points = [expert_point(2, 100), expert_point(4, 200)]
    profile = changed(tiny_profile(), compute={"experts": points})
    costs = tiny_costs(tiny_model(1), profile, tiny_scenario(dispatch={"mode": "eager"}))
    assert [costs.expert(0, tokens).ns for tokens in (1, 2, 3, 4)] == [100, 100, 150, 200]
    assert costs.estimates == {}
    assert costs.expert(0, 9).ns == 200
    assert list(costs.estimates) == ["expert"]


def test_a_graph_serves_the_next_power_of_two_of_tokens_and_eager_kernels_their_own() -> None:
    assert [token_bucket(tokens) for tokens in (1, 2, 3, 4, 5, 4096)] == [1, 2, 4, 4, 8, 4096]
    points = [expert_point(tokens, 10 * tokens, mode) for tokens in (2, 4) for mode in ("eager", "graph")]
    profile = changed(tiny_profile(), compute={"experts": points})
    for mode, ns in (("eager", 30), ("graph", 40)):
        assert tiny_costs(tiny_model(1), profile, tiny_scenario(dispatch={"mode": mode})).expert(0, 3).ns == ns


#: Three prompts of five tokens, then a token each: all of them choose expert 0.
PROMPTS = tiny_trace(
    [[[0]]] * 18, phase=np.array([0] * 5 + [1] + [0] * 5 + [1] + [0] * 5 + [1], np.uint8),
    sequence=np.repeat(np.arange(3, dtype=np.int32), 6),
)  # fmt: skip


def took(recordings: list[Recording], kind: int) -> list[int]:
    """How long the kernels of a kind took on all GPUs, the longest last."""
    spans = np.concatenate([recording.spans[recording.spans["kind"] == kind] for recording in recordings])
    return sorted(int(ns) for ns in spans["end_ns"] - spans["start_ns"])


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"copy": {"discipline": "two_streams"}},
        {"dispatch": {"expert_kernel": "grouped"}},
        {"dispatch": {"router_readback": False}},
        {"miss": {"policy": "cpu", "cpu_max_tokens": 1}},
        {"compression": {"mixed": [[1.0, 0.5]]}},
        {"parallel": {"micro_batches": 1, "stages": 2}},
        {"parallel": {"gpus": 2}},
    ],
)
def test_only_decode_steps_are_padded_and_a_prompt_has_its_head_computed_for_one_position(
    sections: dict[str, Any], mode: str
) -> None:
    # 2 ns for each byte of weights and token: a dense part of 3 bytes takes 6 a token, an expert 40, the head 10. The
    # three prompts run over their 5 tokens, graph or not; then 3 tokens are decoded, in a graph of 4 (where GPUs share
    # them: 2 and 1).
    rule = {**tiny_profile().compute.rule.model_dump(), "flops_per_second": 10**9}
    profile = changed(tiny_profile(gpus=2), compute={"experts": [], "rule": rule})
    layers = 2 if "stages" in sections.get("parallel", {}) else 1
    dispatch = {"mode": mode, **sections.get("dispatch", {})}
    scenario = tiny_scenario(**{**sections, "dispatch": dispatch, "workload": {"batch": 3, "prefill": "whole"}})
    experts = np.repeat(PROMPTS.experts, layers, axis=1)
    trace = replace(PROMPTS, experts=experts)
    inputs = tiny_pipeline(tiny_model(layers, head_ns=5), profile, trace, scenario)
    recordings = run_alike(inputs)
    decoded = [2, 1] if "gpus" in sections.get("parallel", {}) else [4 if mode == "graph" else 3]
    assert took(recordings, DENSE) == sorted([6 * tokens for tokens in decoded + [5] * 3] * layers)
    assert took(recordings, HEAD) == sorted([10 * tokens for tokens in decoded + [1] * 3])
    assert took(recordings, EXPERT) == sorted(
        [40 * tokens for tokens in [4 if mode == "graph" else 3] + [5] * 3] * layers
    )


def test_a_prompt_in_chunks_has_its_head_computed_for_one_position_of_each() -> None:
    steps = plan_steps(PROMPTS.sequence, PROMPTS.phase, prefill="chunked", chunk_tokens=2)
    assert [(len(step.rows), step.sampled) for step in steps[:4]] == [(2, 1), (2, 1), (1, 1), (1, 1)]


def test_a_dense_part_is_known_by_its_weights_and_everything_measured_needs_no_estimate() -> None:
    profile = changed(
        tiny_profile(), compute={"dense": [dense_point(3, 50)], "heads": [dense_point(5, 60)], "experts": []}
    )
    costs = tiny_costs(tiny_model(1, dense_ns=3, head_ns=5), profile, tiny_scenario(dispatch={"mode": "eager"}))
    assert (costs.dense(0, 1).ns, costs.head(1).ns, costs.estimates) == (50, 60, {})
    other = tiny_costs(tiny_model(1, dense_ns=4, head_ns=5), profile, tiny_scenario(dispatch={"mode": "eager"}))
    assert other.dense(0, 1).ns == 4  # by the rule
    assert list(other.estimates) == ["dense part"]


# The host's calls.


def test_the_host_pays_for_products_small_kernels_events_and_waits() -> None:
    # Eager. A dense part of 6 kernels: 4 products of 10 and 2 of 3, and an event of 1: 47, so it ends at 48 at the
    # earliest: its last kernel takes 6 / 6 = 1 ns. Copy: enqueue 5 and an event: 53, its bytes at 73. An expert waits
    # for them (2), has 3 products and 2 small ones (36) and an event: the last call returns at 92, and so its 10 ns in
    # 5 kernels end at 94.
    host = {
        "launch": fixed(3),
        "product_launches": {"int8": fixed(10)},
        "copy_enqueue": fixed(5),
        "event_record": fixed(1),
        "event_wait": fixed(2),
    }
    profile = changed(tiny_profile(expert_ns=10), host=host)
    model = tiny_model(1, dense_ns=6, dense_kernels=6, expert_kernels=5)
    scenario = tiny_scenario(dispatch={"mode": "eager", "router_readback": False})
    recording = tiny_run(model, profile, tiny_trace([[[0]]]), scenario)
    spans = {int(span["kind"]): span for span in recording.spans}
    assert spans[DEMAND]["start_ns"] == 47 + 5 + 1
    assert spans[EXPERT]["end_ns"] == 47 + 6 + 2 + 3 * 10 + 2 * 3 + 1 + 10 // 5
    costs = tiny_costs(model, profile, scenario)
    timed = tiny_costs(model, profile, scenario, timed=True)
    assert timed.dense(0, 1).host_ns - costs.dense(0, 1).host_ns == 1  # an event before it as well
    # A graph is launched at once, and has its event.
    graph = tiny_costs(
        model, changed(profile, host={"graph_launch": fixed(7)}), tiny_scenario(dispatch={"mode": "graph"})
    )
    assert (graph.dense(0, 1).host_ns, graph.dense(0, 1).launches) == (7 + 1, 1)


def test_a_read_back_that_is_asked_for_late_takes_less_and_the_host_resumes_slowly() -> None:
    # Graphs. Dense part: launched at 7, takes 3, ends at 10. Read-back: asked for at 7 + 8 = 15, so the choice is there
    # at 15 + 2 = 17, and not at 10 + 6; known 5 later at 22. Resuming takes 9, enqueuing the copy 1.
    host = {
        "graph_launch": fixed(7),
        "readback_enqueue": fixed(8),
        "readback": fixed(6),
        "readback_late": fixed(2),
        "synchronize": fixed(5),
        "copy_resume": fixed(9),
        "copy_enqueue": fixed(1),
    }
    profile = changed(tiny_profile(), host=host)
    recording = tiny_run(tiny_model(1), profile, tiny_trace([[[0]]]), tiny_scenario(dispatch={"mode": "graph"}))
    assert recording.decoded.visits["choice_known_ns"].tolist() == [22]
    assert recording.copy_spans["issued_ns"].tolist() == [22 + 9 + 1]
    # Without a measured one, a late one takes what any takes.
    del host["readback_late"]
    profile = changed(tiny_profile(), host=host)
    costs = tiny_costs(tiny_model(1), profile, tiny_scenario(dispatch={"mode": "graph"}))
    assert (costs.readback_ns, costs.readback_latency_ns, costs.readback_slowdown) == (6, 0, 1.0)
    # Without any, it is a copy of no bytes, which nothing slows down.
    plain = tiny_costs(tiny_model(1), tiny_profile(readback_ns=4), tiny_scenario(dispatch={"mode": "graph"}))
    assert (plain.readback_ns, plain.readback_latency_ns, plain.readback_slowdown) == (4, 0, 1.0)


@pytest.mark.parametrize(("mode", "start_ns"), [("graph", 8), ("free", 3)])
def test_a_copy_starts_so_long_after_it_is_enqueued_where_dispatch_takes_time(mode: str, start_ns: int) -> None:
    # The choice is known at 3.
    data = tiny_profile().model_dump()
    data["h2d"]["pinned"]["launch_latency"] = fixed(5)
    profile = make_profile(data, "copies that start late")
    recording = tiny_run(tiny_model(1), profile, tiny_trace([[[0]]]), tiny_scenario(dispatch={"mode": mode}))
    assert recording.copy_spans["start_ns"].tolist() == [start_ns]


def test_a_launch_may_begin_before_its_last_call_returns() -> None:
    points = {"experts": [expert_point(1, 7, "graph")], "dense": [dense_point(3, 30, "graph", launch_latency_ns=-4)]}
    profile = changed(tiny_profile(launch_ns=10), compute=points)
    recording = tiny_run(tiny_model(1), profile, tiny_trace([[[0]]]), tiny_scenario(dispatch={"mode": "graph"}))
    assert recording.compute_spans["start_ns"][0] == 10 - 4


def test_the_host_enqueues_a_copy_by_priority_when_it_knows_that_the_one_before_has_ended() -> None:
    profile = changed(tiny_profile(), host={"synchronize": fixed(5), "copy_enqueue": fixed(1)})
    scenario = tiny_scenario(dispatch={"mode": "graph"}, copy={"discipline": "priority"})
    assert tiny_costs(tiny_model(1), profile, scenario).copy_lags.gap_ns == 5 + 1


# Lags of lanes.


def test_a_lane_starts_so_long_after_what_it_waits_for() -> None:
    lanes = Lanes()
    lane = lanes.lane("compute", Lags(gap_ns=2, after_other_ns=5))
    until_20 = lanes.submit(lanes.lane(), 20)
    lanes.submit(lane, 10, after=(until_20,), kind=EXPERT)  # 5 behind the end at 20
    lanes.submit(lane, 10, after=(until_20,), kind=EXPERT)  # 2 behind the one before: what it waited for is long over
    lanes.submit(lane, 10, issued_ns=60, kind=EXPERT)  # waits for nothing: no lag
    assert lanes.intervals()[1:] == [(25, 35), (37, 47), (60, 70)]


@pytest.mark.parametrize(("copy_ns", "starts"), [(0, [0, 12]), (100, [3, 28])])
def test_beside_a_disturber_gaps_and_launches_take_longer(copy_ns: int, starts: list[int]) -> None:
    # Alone: 0-10, a gap of 2, 12-22. Beside a copy all along: issued at 0 but starting 3 later, twice as long, 3-23,
    # then a gap of 5.
    lanes = Lanes()
    h2d, compute = lanes.lane(), lanes.lane("compute", Lags(2, 3, 1, 3, 3))
    compute.disturbers = [h2d]
    couple([compute, h2d])
    if copy_ns:
        lanes.submit(h2d, copy_ns)
    for _ in range(2):
        lanes.submit(compute, 10, kind=EXPERT, slowdown=2.0)
    lanes.env.run()
    spans = lanes.timeline.spans()
    assert spans["start_ns"][spans["kind"] == EXPERT].tolist() == starts


@pytest.mark.parametrize(
    ("sharing", "takes_turns", "contention", "copies"),
    [
        (1.25, False, True, [(3, 53), (3, 53)]),  # 20 each, at half the speed and a quarter longer
        (1.0, False, True, [(3, 43), (3, 43)]),
        (None, False, True, [(3, 43), (3, 43)]),  # not measured: the link is divided and loses nothing
        (1.25, False, False, [(3, 43), (3, 43)]),
        (1.25, True, True, [(3, 23), (23, 43)]),  # never both at once
    ],
)
def test_copies_of_two_streams_take_together_what_the_profile_says(
    sharing: float | None, takes_turns: bool, contention: bool, copies: list[tuple[int, int]]
) -> None:
    # Layer 0's expert is copied on demand and layer 1's ahead, both from 3 on.
    factor = None if sharing is None else {"factor": sharing, **ASSUMED}
    profile = changed(tiny_profile(), contention={"copies_sharing": factor, "copies_take_turns": takes_turns})
    scenario = tiny_scenario(
        copy={"discipline": "two_streams", "contention": contention}, prefetch={"lookahead": 1, "k": 1}
    )
    recording = tiny_run(tiny_model(2), profile, ONE_TOKEN, scenario)
    spans = recording.spans[np.isin(recording.spans["kind"], [DEMAND, PREFETCH])]
    assert sorted(zip(spans["start_ns"].tolist(), spans["end_ns"].tolist(), strict=True))[:2] == copies


def test_a_profile_need_not_say_what_no_run_reads() -> None:
    data = tiny_profile().model_dump()
    data["contention"] = {"copy_beside_compute": {"factor": 1.0, **ASSUMED}}
    contention = make_profile(data, "small").contention
    assert contention is not None and contention.copies_sharing is contention.copy_beside_d2h is None


# Uncertainty.


def unsure(run_spread: float, scatter: float) -> dict[str, float]:
    return {"run_spread": run_spread, "scatter": scatter, "held_back_error": 0.0}


def copying(uncertainty: dict[str, float] | None) -> Profile:
    line = {"latency_ns": 0, "bytes_per_second": 10**9, "uncertainty": uncertainty, **ASSUMED}
    return changed(tiny_profile(), h2d={"pinned": {"alone": line, "queued": line, "gap": fixed(0)}})


def replicated(profile: Profile, count: int = 200, seed: int = 0) -> dict[str, Any]:
    # One visit: a dense part of 3 ns, a copy of 10 us, a kernel of 7 ns.
    scenario = tiny_scenario().model_copy(update={"seed": seed})
    inputs = tiny_inputs(tiny_model(1, copy_ns=10_000), profile, tiny_trace([[[0]]]), scenario)
    return simulate_inputs(inputs, baselines=False, replicates=count).data


@pytest.mark.slow
def test_replicates_spread_as_their_costs_do() -> None:
    # The copy is nearly all of the makespan: with a factor of exp(0.1 z), 90 % of the runs lie within 10.01 us times
    # exp(-0.1645) to exp(0.1645).
    makespan = replicated(copying(unsure(0.1, 0.0)), 400)["replicates"]["makespan_ms"]
    assert makespan["p50"] == pytest.approx(0.01001, rel=0.02)
    assert makespan["p5"] == pytest.approx(0.01001 * 0.8483, rel=0.03)
    assert makespan["p95"] == pytest.approx(0.01001 * 1.1788, rel=0.03)


def test_the_scatter_of_single_events_averages_out() -> None:
    # A hundred copies that scatter by 10 % each scatter by 1 % together.
    tokens = [[[token % 4]] for token in range(100)]
    scenario = tiny_scenario(memory={"gpu_budget": "1experts"})
    profile = copying(unsure(0.0, 0.1))
    inputs = tiny_inputs(tiny_model(1, copy_ns=10_000), profile, tiny_trace(tokens), scenario)
    makespan = simulate_inputs(inputs, baselines=False, replicates=200).data["replicates"]["makespan_ms"]
    assert (makespan["p95"] - makespan["p5"]) / makespan["p50"] == pytest.approx(2 * 1.645 * 0.01, rel=0.25)


@pytest.mark.parametrize(("mode", "scatter"), [("eager", 0.1), ("graph", 0.3)])
def test_launches_scatter_as_those_of_their_dispatch(mode: str, scatter: float) -> None:
    host = {
        name: {**fixed(100), "uncertainty": unsure(0.0, share)}
        for name, share in (("launch", 0.1), ("graph_launch", 0.3))
    }
    inputs = tiny_inputs(
        tiny_model(1), changed(copying(None), host=host), tiny_trace([[[0]]]), tiny_scenario(dispatch={"mode": mode})
    )
    (costs,) = replicate_costs(inputs, 1)
    assert costs.scatter is not None
    assert costs.scatter.of["host"] == scatter


def test_every_event_takes_the_next_factor_of_its_kind_in_all_that_it_takes() -> None:
    scatter = Scatter(7, 1, dict.fromkeys(SCATTERED, 0.2))
    events = Scattering(scatter)
    for factor in scatter.factors("copy", 0, 3).tolist():
        queued_ns, alone_ns, piece_queued_ns, piece_alone_ns = (round(ns * factor) for ns in (1000, 2000, 300, 400))
        taken = CopyCost(queued_ns, alone_ns, piece_queued_ns, piece_alone_ns, 4, 50)
        assert events.copy(CopyCost(1000, 2000, 300, 400, 4, 50)) == taken
    calls = iter(scatter.factors("host", 0, 2).tolist())  # of launches of any kind
    for kind, part in ((DENSE, "dense"), (EXPERT, "expert")):
        (factor,), call = scatter.factors(part, 0, 1).tolist(), next(calls)
        found = events.kernel(kind, KernelCost(5000, 1.5, 2, 700))
        assert found == KernelCost(round(5000 * factor), 1.5, 2, round(700 * call))
    predicting = KernelCost(5000, 1.0, 1, 700)
    assert events.kernel(PREDICT, predicting) is predicting  # whose scatter nobody has measured


def test_normal_numbers_are_those_of_box_and_muller() -> None:
    # A radius of 1, along the circle: its cosine.
    angles = np.array([0.0, 0.125, 0.25, 0.5, 0.75])
    drawn = box_muller(np.full(5, 1 - np.exp(-0.5)), angles)
    assert drawn == pytest.approx([1, 0.5**0.5, 0, -1, 0], abs=1e-12)


def test_every_kernel_scatters_by_itself() -> None:
    # A hundred dense parts of 10 us, and nothing else that takes time: 1 % together if each is drawn anew, 10 % if not.
    points = [dense_point(3, 10_000, mode, uncertainty=unsure(0.0, 0.1)) for mode in ("eager", "graph")]
    profile = changed(copying(None), compute={"dense": points})
    tokens = [[[0]] for _ in range(100)]
    inputs = tiny_inputs(tiny_model(1), profile, tiny_trace(tokens), tiny_scenario())
    makespan = simulate_inputs(inputs, baselines=False, replicates=200).data["replicates"]["makespan_ms"]
    assert (makespan["p95"] - makespan["p5"]) / makespan["p50"] == pytest.approx(2 * 1.645 * 0.01, rel=0.25)


def test_the_same_seed_draws_the_same_and_another_draws_other_numbers() -> None:
    profile = copying(unsure(0.1, 0.1))
    first, second, other = (replicated(profile, 20, seed)["replicates"] for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_a_profile_that_is_silent_about_uncertainty_has_no_spread_and_a_warning_says_why() -> None:
    data = replicated(copying(None), 5)
    makespan = data["replicates"]["makespan_ms"]
    assert makespan["p5"] == makespan["p50"] == makespan["p95"] == data["makespan_ms"]
    assert any("percentiles are too narrow" in warning for warning in data["warnings"])


@pytest.mark.parametrize(
    "settings",
    [
        ("guide",),
        ("guide", "dispatch.mode=eager", "dispatch.router_readback=false", "dispatch.launch_queue_depth=12"),
        ("guide", "copy.discipline=priority", "copy.chunk_bytes=1000000", "prefetch.policy=cost-aware"),
        ("guide", "dispatch.expert_kernel=grouped", "workload.batch=4", "copy.discipline=two_streams"),
        ("pipeline-2", "copy.contention=false", "workload.tokens=20", "workload.prefill=skip"),
        ("speed", "machine.profile=h200", "workload.tokens=50"),  # more events than are drawn at once
    ],
)
def test_events_scatter_alike_by_either_engine(settings: tuple[str, ...]) -> None:
    name, *changes = settings
    changes = changes if "tokens" in " ".join(changes) else [*changes, "workload.tokens=30"]
    inputs = load_inputs(load_scenario(name, changes))
    plain = [recording.spans.tolist() for recording in run_alike(inputs)]
    drawn = zip(*(replicate_costs(part, 2) for part in inputs.parts), strict=True)
    found = []
    for costs in drawn:
        each = [
            [recording.spans.tolist() for recording in run_all(inputs, prepared(inputs, costs), engine=engine)]
            for engine in ("simpy", "compiled")
        ]
        assert each[0] == each[1]
        found.append(each[0])
    assert found[0] != found[1] != plain
