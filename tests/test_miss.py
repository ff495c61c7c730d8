"""Misses that are not fetched: on the CPU, in low precision, skipped. Schedules by hand, to the ns, and properties.

Activations here are 8 wide and of 2 bytes: a token's are 16 bytes, which take 16 ns each way.
"""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_cases import Case, cases, decide
from tiny import ASSUMED, tiny_costs, tiny_inputs, tiny_model, tiny_profile, tiny_run, tiny_scenario, tiny_trace

from prestage.engine.costs.costs import Costs
from prestage.engine.costs.offload_costs import CpuCosts
from prestage.engine.load import load_inputs
from prestage.engine.loading.offloading import make_miss
from prestage.engine.measure.metrics import metrics
from prestage.engine.measure.misses import miss_metrics
from prestage.engine.measure.recording import OUTCOMES, Recording
from prestage.engine.policies.miss import CPU, DEFERRED, MISS, SKIPPED, Absent, Resolved, Terms
from prestage.engine.replay.replay import count_visits
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.scenario import Scenario, load_scenario, make_scenario
from prestage.engine.simulate import simulate_inputs
from prestage.output.run_folder import write_result
from prestage.output.saved import load_result
from prestage.resources.profile import load_profile, make_profile
from prestage.resources.profile_costs import ProfileError
from prestage.resources.timeline import ACTIVATION, CPU_EXPERT, EXPERT, KINDS
from prestage.workloads.model import load_model

#: Host memory with every expert.
ALL = {"host_budget": "all", "prefetch": "gpu"}
#: Random runs of each kind.
EXAMPLES = 25


def spans_of(recording: Recording, kind: int) -> list[tuple[int, int]]:
    """(start, end) of the spans of a kind, in the order in which they were recorded."""
    spans = recording.spans[recording.spans["kind"] == kind]
    return list(zip(spans["start_ns"].tolist(), spans["end_ns"].tolist(), strict=True))


def popular(*ranks: list[float], **arrays: Any) -> dict[str, Any]:
    """Arrays of a trace that states how popular the experts of each layer are."""
    return {"extra": {"popularity": np.array(ranks)}, **arrays}


# On the CPU, by hand.


def test_experts_on_the_cpu_follow_each_other_between_the_activations_and_the_result() -> None:
    # dense 3, activations 16, two experts of 30, the result 16, head 5: one chain.
    trace = tiny_trace([[[0, 1]]])
    scenario = tiny_scenario(miss={"policy": "cpu"})
    recording = tiny_run(tiny_model(1, top_k=2, head_ns=5), tiny_profile(), trace, scenario)
    assert spans_of(recording, ACTIVATION) == [(3, 19), (79, 95)]
    assert spans_of(recording, CPU_EXPERT) == [(19, 49), (49, 79)]
    assert recording.makespan_ns == 3 + 16 + 2 * 30 + 16 + 5
    data = metrics(recording)
    # The GPU waits for the CPU all the time but for its dense part and head.
    assert data["time"]["compute_ms"] == pytest.approx(8e-6) and data["stall_ms"] == pytest.approx(92e-6)
    assert data["bytes"] == {"demand": 0, "prefetch": 0, "prefetch_not_used": 0}


@pytest.mark.parametrize(("expert_ns", "ends"), [(7, 3 + 16 + 30 + 16), (100, 3 + 100)])
def test_the_gpu_computes_its_experts_of_the_visit_meanwhile(expert_ns: int, ends: int) -> None:
    # Expert 0 lies on the GPU: the visit takes the longer of its kernel and of the CPU's chain for expert 1.
    trace = tiny_trace([[[0, 1]]], **popular([1.0, 0.0, 0.0, 0.0]))
    scenario = tiny_scenario(miss={"policy": "cpu"}, memory={"gpu_budget": "1experts", "preload": "popular"})
    recording = tiny_run(tiny_model(1, top_k=2, head_ns=5), tiny_profile(expert_ns=expert_ns), trace, scenario)
    assert spans_of(recording, EXPERT) == [(3, 3 + expert_ns)]
    assert spans_of(recording, CPU_EXPERT) == [(19, 49)]
    assert recording.makespan_ns == ends + 5
    assert metrics(recording)["counts"] == {
        "prefetch_hit": 0, "cache_hit": 1, "late": 0, "miss": 1, "prefetch": 0, "dropped": 0, "evict": 0,
    }  # fmt: skip


def test_the_next_layer_waits_for_the_result_of_this_one() -> None:
    # Each layer: dense 3, activations 16, expert 30, result 16.
    recording = tiny_run(tiny_model(2), tiny_profile(), tiny_trace([[[0], [1]]]), tiny_scenario(miss={"policy": "cpu"}))
    assert spans_of(recording, CPU_EXPERT) == [(19, 49), (65 + 19, 65 + 49)]
    assert recording.makespan_ns == 2 * 65


WEIGHED = np.array([[[0.7, 0.3], [0.2, 0.8]]], dtype=np.float16)


@pytest.mark.parametrize(
    ("deferred", "on_cpu", "back", "makespan_ns"),
    [
        # Layer 0: dense 3, activations 16, expert 0 in 30, its result in 16, from 49 on. Expert 1, the lesser, follows
        # on the CPU while the GPU runs layer 1's dense part (65 to 68) and its activations come (84): 30 ns hidden.
        # The last layer defers nothing: 84 + 60 + 16.
        (1, [(19, 49), (49, 79), (84, 114), (114, 144)], [(49, 65), (144, 160)], 160),
        # Both wait for nothing: layer 1's dense part runs at once, its activations behind those of layer 0 (35), and
        # the CPU has layer 0's two before its own.
        (2, [(19, 49), (49, 79), (79, 109), (109, 139)], [(139, 155)], 155),
    ],
)
def test_what_is_deferred_is_computed_while_the_gpu_goes_on_and_comes_with_the_next_layers_results(
    deferred: int, on_cpu: list[tuple[int, int]], back: list[tuple[int, int]], makespan_ns: int
) -> None:
    trace = tiny_trace([[[0, 1], [0, 1]]], weights=WEIGHED)
    scenario = tiny_scenario(miss={"policy": "cpu", "deferred_experts": deferred})
    recording = tiny_run(tiny_model(2, top_k=2), tiny_profile(), trace, scenario)
    assert spans_of(recording, CPU_EXPERT) == on_cpu
    assert [span for span in spans_of(recording, ACTIVATION) if span in back] == back
    assert recording.makespan_ns == makespan_ns
    data = metrics(recording)
    assert sum(data["time"].values()) == pytest.approx(makespan_ns / 1e6)
    assert data["counts"]["miss"] == 4


def test_deferred_results_are_waited_for_also_by_a_layer_whose_experts_all_lie_on_the_gpu() -> None:
    # Expert 0 in layer 0 is at once, expert 1 until 79; layer 1's experts run from 68 to 82, then its head needs the
    # result, 79 + 16.
    trace = tiny_trace([[[0, 1], [0, 1]]], **popular([0.0] * 4, [1.0, 0.9, 0.0, 0.0]), weights=WEIGHED)
    memory = {"gpu_budget": "2experts", "preload": "popular", "eviction": "static"}
    scenario = tiny_scenario(miss={"policy": "cpu", "deferred_experts": 1}, memory=memory)
    recording = tiny_run(tiny_model(2, top_k=2, head_ns=5), tiny_profile(), trace, scenario)
    assert spans_of(recording, CPU_EXPERT) == [(19, 49), (49, 79)]
    assert spans_of(recording, EXPERT) == [(68, 75), (75, 82)]
    assert recording.makespan_ns == 79 + 16 + 5


def test_an_expert_that_one_token_has_among_its_best_is_not_deferred_for_another() -> None:
    # Token 0: 0 before 1; token 1: 1 before 2. Expert 2 alone is nobody's best; without weights the order says so.
    weights = np.array([[[0.7, 0.3], [0.7, 0.3]], [[0.6, 0.4], [0.6, 0.4]]], dtype=np.float16)
    for more in ({"weights": weights}, {}):
        trace = tiny_trace([[[0, 1], [0, 1]], [[1, 2], [1, 2]]], sequence=np.array([0, 1]), **more)
        scenario = tiny_scenario(miss={"policy": "cpu", "deferred_experts": 1}, workload={"batch": 2})
        resolved = tiny_run(tiny_model(2, top_k=2), tiny_profile(), trace, scenario).resolved
        ways = [(int(row["visit"]), int(row["expert"]) % 4) for row in resolved if row["way"] == DEFERRED]
        assert ways == [(0, 2)]


def test_the_cpu_and_a_copy_slow_each_other_down() -> None:
    # Two tokens want expert 1, which is fetched; one wants expert 0, which the CPU computes from 3 + 16 = 19 on. By
    # then 16 of the copy's 20 ns are done; beside the CPU the other 4 take twice as long, until 27. Until then the CPU
    # does 8 / 1.5 = 5 1/3 of its 30 ns, then the rest, 24 2/3, until 52 (51.67). Its result is back at 68.
    profile = tiny_profile(cpu_ns=30, cpu_beside_copy_ns=45, copy_beside_cpu=2.0)
    trace = tiny_trace([[[0]], [[1]], [[1]]], sequence=np.arange(3, dtype=np.int32))
    miss = {"policy": "cpu", "cpu_max_tokens": 1}
    recording = tiny_run(tiny_model(1), profile, trace, tiny_scenario(miss=miss, workload={"batch": 3}))
    assert spans_of(recording, KINDS.index("demand")) == [(3, 27)]
    assert spans_of(recording, CPU_EXPERT) == [(19, 52)]
    assert spans_of(recording, EXPERT) == [(27, 34)]
    assert recording.makespan_ns == 52 + 16
    alone = tiny_scenario(miss=miss, workload={"batch": 3}, copy={"contention": False})
    recording = tiny_run(tiny_model(1), profile, trace, alone)
    assert spans_of(recording, CPU_EXPERT) == [(19, 49)] and spans_of(recording, EXPERT) == [(23, 30)]


@pytest.mark.parametrize(
    ("take_turns", "discipline", "back"),
    [
        # Four copies of 20 keep the link busy until 83; the CPU is done at 49. The result's 16 ns share the link ...
        (False, "fifo", (49, 81)),
        # ... or wait until the engine leaves the stream of the copies, which has work that is ready till the end ...
        (True, "fifo", (83, 99)),
        # ... or come after the copy that is running, because the host enqueues copies one by one.
        (True, "priority", (63, 79)),
    ],
)
def test_the_result_comes_back_on_a_stream_of_its_own(take_turns: bool, discipline: str, back: tuple[int, int]) -> None:
    trace = tiny_trace([[[e]] for e in (0, 1, 2, 3, 4, 1, 2, 3, 4)], 5, sequence=np.arange(9, dtype=np.int32))
    profile = tiny_profile()
    assert profile.contention is not None
    contention = profile.contention.model_copy(update={"copies_take_turns": take_turns})
    scenario = tiny_scenario(
        miss={"policy": "cpu", "cpu_max_tokens": 1}, workload={"batch": 9}, copy={"discipline": discipline}
    )
    recording = tiny_run(tiny_model(1, 5), profile.model_copy(update={"contention": contention}), trace, scenario)
    assert spans_of(recording, ACTIVATION) == [(3, 19), back]


def test_activations_are_of_the_tokens_that_need_them() -> None:
    # Tokens 0 and 1 chose experts 0 and 1, absent: two tokens go there and back, for two experts.
    trace = tiny_trace([[[0, 1]], [[1, 0]], [[2, 3]]], sequence=np.arange(3, dtype=np.int32), **popular([0, 0, 1, 1]))
    memory = {"gpu_budget": "2experts", "preload": "popular"}
    scenario = tiny_scenario(miss={"policy": "cpu"}, memory=memory, workload={"batch": 3})
    recording = tiny_run(tiny_model(1, top_k=2), tiny_profile(), trace, scenario)
    assert spans_of(recording, ACTIVATION) == [(3, 35), (95, 127)]


# Who decides.


def terms(**changes: Any) -> Terms:
    """The CPU takes 30 ns a token and 10 there and back; a copy takes 100 and the GPU 20."""
    return replace(
        Terms(
            cpu_ns=lambda layer, tokens: 30 * tokens,
            there_and_back_ns=lambda layer, tokens: 10,
            copy_ns=lambda layer, tokens: 100,
            kernel_ns=lambda layer, tokens: 20,
        ),
        **changes,
    )


def to_cpu(expert: int, tokens: int) -> Resolved:
    return Resolved(expert, CPU, tokens, float(tokens))


def absent(*tokens: int) -> list[Absent]:
    """Experts 0, 1, … with so many tokens of gate weight 1."""
    return [Absent(expert, [1.0] * count) for expert, count in enumerate(tokens)]


def test_cost_takes_the_cpu_as_long_as_its_tokens_make_it_shorter() -> None:
    # 3 tokens: 100 < 120; 4 tokens: 130 > 120.
    assert MISS["cost"](terms()).resolve(0, absent(1, 3, 4)) == [to_cpu(0, 1), to_cpu(1, 3)]
    # At a tie the copy, which leaves the expert behind.
    assert MISS["cost"](terms(there_and_back_ns=lambda layer, tokens: 30)).resolve(0, absent(3)) == []


def test_balanced_deals_out_what_each_would_be_done_with_first() -> None:
    # One token each. CPU at 40, 70, 100; then 130 there against 120 for a copy: the link gets one; then 130 against
    # 220, the CPU again.
    assert MISS["balanced"](terms()).resolve(0, absent(1, 1, 1, 1, 1)) == [to_cpu(e, 1) for e in (0, 1, 2, 4)]
    # At a tie, of 120 both ways, the copy.
    assert MISS["balanced"](terms(there_and_back_ns=lambda layer, tokens: 90)).resolve(0, absent(1)) == []


@pytest.mark.parametrize("name", ["cpu", "cost", "balanced"])
def test_an_expert_of_many_tokens_may_be_kept_from_the_cpu(name: str) -> None:
    assert MISS[name](terms(cpu_max_tokens=2)).resolve(0, absent(1, 3)) == [to_cpu(0, 1)]
    assert MISS[name](terms(cpu_max_tokens=0)).resolve(0, absent(1, 3)) == []


def test_skip_goes_token_by_token() -> None:
    skip = MISS["skip"](Terms(threshold=0.25))
    accesses = [Absent(4, [0.5, 0.125]), Absent(5, [0.125, 0.0625]), Absent(6, [0.25])]
    assert skip.resolve(0, accesses) == [
        Resolved(4, SKIPPED, 1, 0.125, whole=False),
        Resolved(5, SKIPPED, 2, 0.1875),
    ]


# Low precision and skipping, by hand.


def test_low_precision_uses_no_link_and_reads_fewer_bytes() -> None:
    # Room for 4 experts, half of it for low-precision copies: 8 of 5 bytes, so all 4 have one. The kernel reads a
    # quarter of the bytes: 7 / 4 = 1.75, 2 ns.
    scenario = tiny_scenario(miss={"policy": "low_precision", "fetch_behind": False}, memory={"gpu_budget": "4experts"})
    recording = tiny_run(tiny_model(1, top_k=2), tiny_profile(), tiny_trace([[[0, 1]]]), scenario)
    assert spans_of(recording, EXPERT) == [(3, 5), (5, 7)]
    assert len(recording.link_spans) == 0
    # The low-precision copies take 4 x 5 bytes of the 80, and whole experts what they can of the rest.
    assert recording.manager.budget_bytes == 60


def test_what_was_used_in_low_precision_is_fetched_behind() -> None:
    # Token 0 uses expert 0 in low precision until 5 while it is copied until 23; token 1 finds it: late, from 23.
    scenario = tiny_scenario(miss={"policy": "low_precision"}, memory={"gpu_budget": "4experts"})
    recording = tiny_run(tiny_model(1), tiny_profile(), tiny_trace([[[0]], [[0]]]), scenario)
    assert spans_of(recording, KINDS.index("prefetch")) == [(3, 23)]
    assert spans_of(recording, EXPERT) == [(3, 5), (23, 30)]
    counts = metrics(recording)["counts"]
    assert (counts["miss"], counts["late"], counts["prefetch"]) == (1, 1, 1)


def test_what_found_no_room_as_a_guess_is_not_asked_for_again_behind() -> None:
    # Two tokens at once use experts 0 and 1 in low precision, and will again. Of the 40 bytes 20 are for low-precision
    # copies: the guess of 0 takes the room that is left, 1 is dropped, once, though it was also used.
    trace = tiny_trace([[[0]], [[0]], [[1]], [[1]]], sequence=np.array([0, 0, 1, 1]))
    scenario = tiny_scenario(
        miss={"policy": "low_precision"}, memory={"gpu_budget": "2experts"}, workload={"batch": 2},
        prefetch={"lookahead": 1},
    )  # fmt: skip
    counts = metrics(tiny_run(tiny_model(1), tiny_profile(), trace, scenario))["counts"]
    assert (counts["prefetch"], counts["dropped"]) == (1, 1)


def test_in_the_last_step_nothing_is_fetched_behind() -> None:
    scenario = tiny_scenario(miss={"policy": "low_precision"}, memory={"gpu_budget": "4experts"})
    recording = tiny_run(tiny_model(1), tiny_profile(), tiny_trace([[[0]]]), scenario)
    assert spans_of(recording, KINDS.index("prefetch")) == []


def test_popular_experts_have_their_low_precision_copy_first() -> None:
    # Half of 2 experts' room is 20 bytes: 4 copies of 5, for the four most popular of eight.
    trace = tiny_trace([[[0]]], 8, **popular([0, 5, 4, 3, 2, 1, 0, 0]))
    scenario = tiny_scenario(miss={"policy": "low_precision"}, memory={"gpu_budget": "2experts"})
    policy = make_miss(tiny_inputs(tiny_model(1, 8), tiny_profile(), trace, scenario))
    assert policy is not None and sorted(policy.terms.low) == [1, 2, 3, 4]


WEIGHTS = np.array([[[0.75, 0.25]], [[0.5, 0.5]]], dtype=np.float16)


def test_what_is_skipped_takes_nothing() -> None:
    # Token 0 skips expert 1; token 1 wants 2 and 3 at 0.5 each, which are fetched.
    trace = tiny_trace([[[0, 1]], [[2, 3]]], weights=WEIGHTS)
    scenario = tiny_scenario(miss={"policy": "skip", "threshold": 0.5})
    model = tiny_model(1, top_k=2)
    recording = tiny_run(model, tiny_profile(), trace, scenario)
    # dense 3, copy 20, expert 7; then dense 3, copies 20 and 20, of which the second is followed by its expert's 7.
    assert recording.makespan_ns == 30 + 3 + 40 + 7
    assert metrics(recording)["bytes"]["demand"] == 3 * 20
    data = miss_metrics([recording], [tiny_costs(model, tiny_profile(), scenario)], scenario)
    assert data["ways"] == {"fetched": 3, "cpu": 0, "low_precision": 0, "skipped": 1, "deferred": 0}
    assert data["gate_mass"]["skipped"] == 0.25 / 2
    assert data["by_layer"] == [
        {
            "layer": 0, "cpu": 0, "low_precision": 0, "skipped": 1, "deferred": 0,
            "cpu_gate_mass": 0.0, "low_precision_gate_mass": 0.0, "skipped_gate_mass": 0.125,
            "deferred_gate_mass": 0.0,
        }
    ]  # fmt: skip


def test_only_the_tokens_under_the_threshold_are_skipped() -> None:
    # Expert 0 is wanted at 0.75 and 0.25: it is fetched for one token.
    trace = tiny_trace(
        [[[0]], [[0]]], weights=np.array([[[0.75]], [[0.25]]], dtype=np.float16), sequence=np.arange(2, dtype=np.int32)
    )
    scenario = tiny_scenario(miss={"policy": "skip", "threshold": 0.5}, workload={"batch": 2})
    recording = tiny_run(tiny_model(1), tiny_profile(), trace, scenario)
    assert recording.decoded.accesses["tokens"].tolist() == [1]
    assert recording.resolved["whole"].tolist() == [False] and metrics(recording)["counts"]["miss"] == 1


# What the CPU takes.


def cpu_costs(model: str, **miss: Any) -> tuple[CpuCosts, Costs]:
    scenario = make_scenario({"workload": {"trace": "none"}, "miss": {"policy": "cpu", **miss}})
    costs = tiny_costs(load_model(model), load_profile("h200"), scenario)
    return CpuCosts(costs, scenario), costs


def test_a_measured_shape_takes_what_was_measured() -> None:
    points = [
        point
        for point in load_profile("h200").compute.cpu_experts
        if (point.hidden, point.expert_ff, point.threads) == (4096, 14336, 8)
    ]
    by_tokens = {point.tokens: point for point in points}
    cpu, costs = cpu_costs("mixtral-8x7b", cpu_threads=8)
    for tokens, point in by_tokens.items():
        assert cpu.expert(0, tokens).ns == point.ns
        assert cpu.expert(0, tokens).slowdown == pytest.approx(point.beside_copy_ns / point.ns)
    assert costs.estimates == {}
    most = max(by_tokens)
    assert cpu.expert(0, 3 * most).ns == 3 * by_tokens[most].ns  # and this one is named
    assert "in proportion" in costs.estimates["expert on the CPU"]


def test_a_shape_that_was_not_measured_is_estimated_by_its_bytes_and_named() -> None:
    cpu, costs = cpu_costs("gpt-oss-20b")
    size_bytes = costs.model.expert_bytes[0]
    single = [p for p in load_profile("h200").compute.cpu_experts if (p.threads, p.tokens) == (16, 1)]
    line = np.polyfit(
        [3 * p.hidden * p.expert_ff * (4 if p.dtype == "float32" else 2) for p in single], [p.ns for p in single], 1
    )
    assert cpu.expert(0, 1).ns == round(float(np.polyval(line, size_bytes)))
    assert "GB/s" in costs.estimates["expert on the CPU"]


def test_one_measured_shape_says_nothing_of_another() -> None:
    profile, scenario = tiny_profile(), tiny_scenario(miss={"policy": "cpu"})
    model = replace(tiny_model(1), expert_ff=16)
    with pytest.raises(ProfileError, match=r"no compute.cpu_experts of one token that say how model tiny's"):
        CpuCosts(tiny_costs(model, profile, scenario), scenario).expert(0, 1)


def test_a_rule_for_the_cpu_takes_bytes_or_operations_and_copies_slow_it_down() -> None:
    # 20 bytes of int8 at 1 GB/s take 20 ns; over 10 tokens their 400 operations take 40 at 10 GFLOP/s. Beside a copy
    # all but the constant 10 ns is half as long again.
    rule = {"constant_ns": 10, "bytes_per_second": 10**9, "flops_per_second": 10**10, "beside_copy_factor": 1.5}
    plain = tiny_profile().model_dump()
    plain["compute"].update(cpu_experts=[], cpu_rule={**rule, **ASSUMED})
    scenario = tiny_scenario(miss={"policy": "cpu"})
    costs = tiny_costs(tiny_model(1), make_profile(plain, "by rule"), scenario)
    one, ten = (CpuCosts(costs, scenario).expert(0, tokens) for tokens in (1, 10))
    assert one.ns == 30 and one.slowdown == pytest.approx(40 / 30)
    assert ten.ns == 50 and ten.slowdown == pytest.approx(70 / 50)
    assert "weight bytes / 1.0 GB/s, 2 x weights x tokens / 10 GFLOP/s" in costs.estimates["expert on the CPU"]


def test_a_bandwidth_takes_the_place_of_the_profile() -> None:
    cpu, costs = cpu_costs("gpt-oss-20b", cpu_gb_per_s=50.0)
    size_bytes = costs.model.expert_bytes[0]
    # It is what STREAM reads, of which experts reach the middle of .25 and .94: 24.2 GB/s.
    ns = size_bytes / (50 * math.sqrt(0.25 * 0.94))
    assert cpu.expert(0, 1).ns == cpu.expert(0, 16).ns == round(ns)
    assert cpu.expert(0, 32).ns == round(2 * ns)
    assert costs.estimates["expert on the CPU"].startswith("weight bytes / 24.2 GB/s: 0.48 of 50 GB/s")


def test_beside_a_bandwidth_many_tokens_take_the_operations_of_the_rule() -> None:
    # 48.5 % of 2 GB/s read 2,000 bytes; 100 tokens of int8 are 400,000 operations, 8 bits a weight.
    plain = tiny_profile().model_dump()
    rule = {"constant_ns": 10, "bytes_per_second": 10**9, "flops_per_second": 10**10, "beside_copy_factor": 1.0}
    plain["compute"].update(cpu_experts=[], cpu_rule={**rule, **ASSUMED})
    scenario = tiny_scenario(miss={"policy": "cpu", "cpu_gb_per_s": 2.0})
    costs = tiny_costs(tiny_model(1, copy_ns=2000), make_profile(plain, "by rule"), scenario)
    one, many = (CpuCosts(costs, scenario).expert(0, tokens).ns for tokens in (1, 100))
    assert one == round(2000 / (2 * math.sqrt(0.25 * 0.94)))
    assert many == 2 * 100 * 2000 / 10
    assert "or 2 x weights x tokens / 10 GFLOP/s if that is longer" in costs.estimates["expert on the CPU"]


def test_what_the_cpu_did_is_told_with_its_time() -> None:
    # Two tokens, one after the other, each 3 + 16 + 2 x 30 + 16 + 5: the CPU computes for 60 of each 100 ns.
    trace, scenario = tiny_trace([[[0, 1]], [[0, 1]]]), tiny_scenario(miss={"policy": "cpu"})
    inputs = tiny_inputs(tiny_model(1, top_k=2, head_ns=5), tiny_profile(), trace, scenario)
    told = simulate_inputs(inputs, baselines=False).data["miss"]["cpu"]
    assert told["busy_ms"] == pytest.approx(120e-6) and told["cpu_ms"] == pytest.approx(4 * (16 + 30 + 16) / 1e6)


# What is refused.


def refused(**sections: Any) -> str:
    with pytest.raises(ScenarioError) as error:
        tiny_scenario(**sections)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_does_not_go_together_is_refused_in_one_line() -> None:
    low = {"policy": "low_precision"}
    assert "scope = 'shared'" in refused(miss={"policy": "cpu"}, memory={"scope": "shared"})
    assert "expert_kernel = 'separate'" in refused(miss=low, dispatch={"expert_kernel": "grouped"})
    assert "caching = true" in refused(miss=low, memory={"caching": False})
    assert "caching = true" in refused(memory={"caching": False, "preload": "popular"})
    assert "preload = 'layers'" in refused(memory={"cpu_layers": 2})
    assert "choose one of" in refused(miss={"policy": "hope"})


def test_a_trace_without_gate_weights_cannot_say_what_to_skip() -> None:
    inputs = tiny_inputs(tiny_model(1), tiny_profile(), tiny_trace([[[0]]]), tiny_scenario(miss={"policy": "skip"}))
    with pytest.raises(ScenarioError, match=r"miss.policy = 'skip' goes by gate weights, and the trace has none"):
        make_miss(inputs)


def test_a_profile_that_knows_nothing_of_the_cpu_is_refused_unless_a_bandwidth_is_given() -> None:
    settings = ["machine.profile=rtx3090", "miss.policy=cpu", "workload.tokens=2"]
    with pytest.raises(ProfileError, match=r"profile rtx3090 has no compute.cpu_experts: set miss.cpu_gb_per_s"):
        load_inputs(load_scenario("synthetic", settings))
    assert load_inputs(load_scenario("synthetic", [*settings, "miss.cpu_gb_per_s=40"]))
    with pytest.raises(ProfileError, match=r"miss.cpu_threads = 3: profile h200 has 1, 8, 16"):
        load_inputs(load_scenario("synthetic", ["machine.profile=h200", "miss.policy=cpu", "miss.cpu_threads=3"]))


# Whatever the run.


def random_case(data: st.DataObject, name: str, deferred: tuple[int, ...] = (0,)) -> Case:
    """A random run under a miss policy, with as much of a preloaded memory as there is room for."""
    scope = data.draw(st.sampled_from(["global", "per-layer"]))
    kernel = "separate" if name == "low_precision" else data.draw(st.sampled_from(["separate", "grouped"]))
    fixed = {
        "miss": {
            "policy": name,
            "threshold": data.draw(st.sampled_from([0.1, 0.5, 1.5])),
            "low_share": data.draw(st.sampled_from([0.1, 0.4])),
            "cpu_max_tokens": data.draw(st.sampled_from([None, 1, 2])),
            "deferred_experts": data.draw(st.sampled_from(deferred)) if getattr(MISS[name], "uses_cpu", False) else 0,
            "fetch_behind": data.draw(st.booleans()),
        },
        "dispatch": {"expert_kernel": kernel},
        "tiers": ALL,
        "memory": {
            "preload": data.draw(st.sampled_from(["none", "popular", "layers"])),
            "gpu_budget": "60%",
            "scope": scope,
        },
    }
    case: Case = data.draw(cases(**fixed))
    assume(name != "skip" or case.trace.weights is not None)
    assume(case.model.total_expert_bytes * 0.36 >= max(case.model.expert_bytes) * case.model.layers)
    return case


@pytest.mark.slow
@pytest.mark.parametrize("name", MISS)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_the_engine_counts_what_the_replay_counts_and_no_token_is_lost(name: str, data: st.DataObject) -> None:
    inputs = random_case(data, name, deferred=(0, 1, 2)).inputs()
    visits, manager = decide(inputs)
    counts = count_visits(visits, manager)
    result = simulate_inputs(inputs, baselines=False)
    found = sum(result.data["counts"][outcome] for outcome in ("prefetch_hit", "cache_hit", "late"))
    assert (found, result.data["counts"]["miss"]) == (counts.found, counts.miss)
    assert (result.data["counts"]["prefetch"], result.data["counts"]["evict"]) == (counts.prefetch, counts.evict)
    assert result.data["accesses"] == found + counts.miss
    # Every (token, expert) pair is served once: by an expert on the GPU, or as it was resolved.
    recording = result.recording
    rows = np.concatenate([step.rows for step in inputs.steps])
    made = inputs.trace.made
    choices = len(rows) * inputs.trace.layers * inputs.trace.k if made is None else made[rows].sum()
    served = recording.decoded.accesses["tokens"].sum() + recording.resolved["tokens"].sum()
    assert served == choices
    decided = [(v.number, r.expert, r.way, r.tokens) for v in visits for r in v.resolution.accesses]
    assert decided == [tuple(row)[:4] for row in recording.resolved.tolist()]
    if name != "fetch":
        check_miss_metrics(inputs.scenario, result.data, recording)


def check_miss_metrics(scenario: Scenario, data: dict[str, Any], recording: Recording) -> None:
    """The ways split the misses; gate mass is conserved; low precision, the CPU and skipping move no expert."""
    miss = data["miss"]
    assert sum(miss["ways"].values()) == data["counts"]["miss"]
    assert sum(row["skipped"] for row in miss["by_layer"]) == miss["tokens"]["skipped"]
    if miss["gate_mass"] is not None and recording.trace.weights is not None:
        trace, steps = recording.trace, recording.steps
        rows = np.concatenate([step.rows for step in steps])
        weights = recording.trace.weights[rows].astype(float)
        if trace.made is not None:
            weights[~trace.made[rows]] = 0
        assert sum(miss["gate_mass"].values()) == pytest.approx(recording.resolved["gate"].sum() / weights.sum())
        assert sum(miss["gate_mass"].values()) <= 1 + 1e-9
    demanded = recording.copy_reason[recording.decoded.accesses["copy"]] == 0
    assert miss["ways"]["fetched"] >= len(np.unique(recording.decoded.accesses["copy"][demanded]))
    if scenario.miss.policy == "skip":
        assert all(gate < scenario.miss.threshold * tokens for _, _, _, tokens, gate, _ in recording.resolved.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MISS if getattr(MISS[name], "uses_cpu", False)])
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_the_cpu_does_one_thing_at_a_time_between_the_activations_and_the_result(
    name: str, data: st.DataObject
) -> None:
    recording = simulate_inputs(random_case(data, name).inputs(), baselines=False).recording
    spans = recording.spans
    on_cpu = spans[spans["kind"] == CPU_EXPERT]
    assert (on_cpu["start_ns"][1:] >= on_cpu["end_ns"][:-1]).all()
    moved = spans[spans["kind"] == ACTIVATION]
    h2d = np.isin(moved["lane"], recording.decoded.timeline.lanes_with("h2d"))
    there, back = moved[~h2d], moved[h2d]
    visits = np.unique(on_cpu["visit"])
    assert sorted(there["visit"]) == sorted(back["visit"]) == visits.tolist()
    for visit in visits.tolist():
        work = on_cpu[on_cpu["visit"] == visit]
        assert there["end_ns"][there["visit"] == visit] <= work["start_ns"].min()
        (ends_ns,) = back["end_ns"][back["visit"] == visit]
        assert back["start_ns"][back["visit"] == visit] >= work["end_ns"].max()
        after = recording.compute_spans[recording.compute_spans["visit"] > visit]
        assert not len(after) or after["start_ns"].min() >= ends_ns


def recorded(recording: Recording) -> list[tuple[int, ...]]:
    """All spans without their order of recording."""
    return sorted(tuple(span) for span in recording.spans.tolist())


@pytest.mark.parametrize(
    "sections",
    [
        {"miss": {"policy": "skip", "threshold": 0.0}},
        {"miss": {"policy": "cpu", "cpu_max_tokens": 0}},
        {"compression": {"mixed": [[1.0, 1.0]]}},
    ],
)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_what_never_applies_changes_nothing(sections: dict[str, Any], data: st.DataObject) -> None:
    kernel = "separate" if "compression" in sections else data.draw(st.sampled_from(["separate", "grouped"]))
    case = data.draw(cases(memory={"scope": "global"}, dispatch={"expert_kernel": kernel}, tiers=ALL))
    assume("threshold" not in sections.get("miss", {}) or case.trace.weights is not None)
    plainly = simulate_inputs(case.inputs(), baselines=False).recording
    offloaded = replace(case, scenario=make_scenario({**case.scenario.plain(), **sections}))
    assert not offloaded.scenario.only_fetches
    recording = simulate_inputs(offloaded.inputs(), baselines=False).recording
    assert recorded(recording) == recorded(plainly)
    assert (recording.outcomes == plainly.outcomes).all()


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_the_parts_of_time_come_to_the_makespan_also_when_the_gpu_waits_for_the_cpu(data: st.DataObject) -> None:
    result = simulate_inputs(random_case(data, "cpu").inputs(), baselines=False)
    parts_ns = {name: round(ms * 1e6) for name, ms in result.data["time"].items()}
    assert sum(parts_ns.values()) == result.recording.makespan_ns
    if "cpu" in result.data["miss"]:
        assert 0 <= round(result.data["miss"]["cpu"]["stall_ms"] * 1e6) <= parts_ns["stall_ms"]


# In the files of a run.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["low-precision", "skip", "compressed-host", "mixed-precision"])
def test_a_run_is_written_and_read_with_all_its_accesses(name: str, tmp_path: Path) -> None:
    result = simulate_inputs(load_inputs(load_scenario(name, ["workload.tokens=2"])), baselines=False)
    write_result(result, tmp_path)
    outcomes = np.bincount(load_result(tmp_path).accesses["outcome"], minlength=len(OUTCOMES))
    counts = result.data["counts"]
    assert outcomes.tolist() == [counts[outcome] for outcome in OUTCOMES]


def test_a_timelines_file_calls_the_ways_to_the_cpu_and_back_copies(tmp_path: Path) -> None:
    scenario = load_scenario("cpu-experts", ["workload.tokens=2"])
    write_result(simulate_inputs(load_inputs(scenario), baselines=False), tmp_path)
    with gzip.open(tmp_path / "timeline.json.gz") as file:
        events = [event for event in json.load(file)["traceEvents"] if event["ph"] == "X"]
    moved = {event["name"] for event in events if event["args"].get("kind") == "activation"}
    assert moved == {"Memcpy DtoH (Device -> Pinned)", "Memcpy HtoD (Pinned -> Device)"}
    assert any(event["name"].endswith("(CPU)") and event["cat"] == "cpu_op" for event in events)
