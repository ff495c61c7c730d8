"""Experts in fewer bytes: compressed on the way or for good, and mixed precision. Schedules by hand, and properties.

A copy of b bytes takes b ns here; decompressing an expert of 20 bytes takes 4 + 20 / 2 = 14 ns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cases import Case, cases, decide
from tiny import ASSUMED, run_alike, tiny_inputs, tiny_model, tiny_profile, tiny_run, tiny_scenario, tiny_trace

from prestage.engine.costs.costs import part_costs
from prestage.engine.load import load_inputs
from prestage.engine.loading.deciders import make_manager
from prestage.engine.measure.metrics import metrics
from prestage.engine.measure.misses import decompress_ms, precision_mass
from prestage.engine.measure.recording import Recording
from prestage.engine.replay.replay import count_visits
from prestage.engine.run import prepared, run_all
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.scenario import Scenario, load_scenario
from prestage.engine.scenario.sections_memory import COMPRESSED, DECOMPRESS_LANES, shrunk
from prestage.engine.simulate import simulate, simulate_inputs
from prestage.resources.profile import Factor, Profile
from prestage.resources.profile_costs import Duration
from prestage.resources.timeline import DECOMPRESS, DEMAND, EXPERT
from prestage.workloads.guesses import Guesses

TAKES = {"ratio": 0.5, "decompress_us": 0.004, "decompress_gb_per_s": 2.0}
EXAMPLES = 30


def compressed(where: str, lane: str = "side", **sections: Any) -> Scenario:
    scenario: Scenario = tiny_scenario(compression={"where": where, "lane": lane, **TAKES}, **sections)
    return scenario


def spans_of(recording: Recording, kind: int) -> list[tuple[int, int]]:
    """(start, end) of the spans of a kind, in the order in which they were recorded."""
    spans = recording.spans[recording.spans["kind"] == kind]
    return list(zip(spans["start_ns"].tolist(), spans["end_ns"].tolist(), strict=True))


def stall_ns(recording: Recording) -> int:
    ns: int = round(metrics(recording)["stall_ms"] * 1e6)
    return ns


# By hand.


def test_a_copy_moves_the_compressed_bytes_and_its_kernel_waits_for_the_decompression() -> None:
    # dense 3, copy 20 / 2 = 10, decompress 14, kernel 7; what is in memory is whole, and used again as it is.
    recording = tiny_run(tiny_model(1), tiny_profile(), tiny_trace([[[0]], [[0]]]), compressed("host"))
    assert spans_of(recording, DEMAND) == [(3, 13)]
    assert spans_of(recording, DECOMPRESS) == [(13, 27)]
    assert spans_of(recording, EXPERT) == [(27, 34), (37, 44)]
    assert stall_ns(recording) == 24
    assert metrics(recording)["bytes"]["demand"] == 10
    assert decompress_ms(recording) == pytest.approx(14e-6)
    assert recording.decoded.visits["assigned_bytes"].tolist() == [20, 20]


def test_the_side_stream_decompresses_beside_kernels_and_the_compute_stream_in_their_way() -> None:
    # Copies until 13 and 23. Aside: decompressed until 27 and 41; kernels 27-34 and 41-48. On the compute stream:
    # decompressed 13-27, kernel 27-34, decompressed 34-48, kernel 48-55.
    for lane, decompressed, kernels, waiting in (
        ("side", [(13, 27), (27, 41)], [(27, 34), (41, 48)], 24 + 7),
        ("compute", [(13, 27), (34, 48)], [(27, 34), (48, 55)], 10),
    ):
        trace = tiny_trace([[[0, 1]]])
        recording = tiny_run(tiny_model(1, top_k=2), tiny_profile(), trace, compressed("host", lane))
        assert spans_of(recording, DEMAND) == [(3, 13), (13, 23)]
        assert spans_of(recording, DECOMPRESS) == decompressed, lane
        assert spans_of(recording, EXPERT) == kernels, lane
        assert stall_ns(recording) == waiting, lane


def sharing(factors: dict[str, Any]) -> Profile:
    """The machine, with what its profile says of kernels beside decompression."""
    profile = tiny_profile()
    measured = {
        name: Duration(ns=value, **ASSUMED) if name == "unpacking_leaves" else Factor(factor=value, **ASSUMED)
        for name, value in factors.items()
    }
    shared: Profile = profile.model_copy(update={"contention": profile.contention.model_copy(update=measured)})
    return shared


@pytest.mark.parametrize(
    ("factors", "decompressed", "kernels"),
    [
        # From 27 on one of 14 ns and a kernel of 7: the kernel has done 1 when the other ends, at 41, and has 6 left.
        ({"unpacking_leaves": 1}, [(13, 27), (27, 41)], [(27, 47), (47, 54)]),
        # The other takes twice as long beside it, until 55: 2 are done, 5 left.
        (
            {"unpacking_leaves": 1, "unpacking_beside_kernels": 2.0},
            [(13, 27), (27, 55)], [(27, 60), (60, 67)],
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("engine", ["simpy", "compiled"])
def test_kernels_of_two_streams_share_the_gpu_where_the_profile_says_how(
    factors: dict[str, Any], decompressed: list[Any], kernels: list[Any], engine: str
) -> None:
    inputs = tiny_inputs(tiny_model(1, top_k=2), sharing(factors), tiny_trace([[[0, 1]]]), compressed("host"))
    (recording,) = run_all(inputs, prepared(inputs, part_costs(inputs)), engine=engine)
    assert spans_of(recording, DECOMPRESS) == decompressed
    assert spans_of(recording, EXPERT) == kernels


def test_kernels_of_two_streams_run_as_if_alone_without_contention() -> None:
    profile = sharing({"unpacking_leaves": 1, "unpacking_beside_kernels": 2.0})
    alone = compressed("host", copy={"contention": False})
    recording = tiny_run(tiny_model(1, top_k=2), profile, tiny_trace([[[0, 1]]]), alone)
    assert spans_of(recording, DECOMPRESS) == [(13, 27), (27, 41)]
    assert spans_of(recording, EXPERT) == [(27, 34), (41, 48)]


def test_the_side_stream_decompresses_what_is_there_first_whatever_was_ordered_first() -> None:
    # Layer 1's experts take 40 to copy and 4 + 80 / 2 = 44 to decompress. Two wrong guesses for it are ordered behind
    # layer 0's copy of 3-13; the first is copied 13-53. At 37 layer 1 demands another: copied 53-93, before the second
    # guess, 93-133, and decompressed before it: after the first (53-97) until 141.
    trace = tiny_trace([[[0], [1]]])
    scenario = compressed("host", prefetch={"lookahead": 1, "k": 2}, copy={"discipline": "priority"})
    wrong = Guesses(np.zeros(1, dtype=np.int64), np.array([[[[2, 3]], [[-1, -1]]]], dtype=np.int16))
    plain = tiny_inputs(tiny_model(2, copy_ns=[20, 80]), tiny_profile(), trace, scenario)
    (recording,) = run_alike(replace(plain, guesses=wrong))
    assert spans_of(recording, DECOMPRESS) == [(13, 27), (53, 97), (97, 141), (141, 185)]
    assert spans_of(recording, EXPERT) == [(27, 34), (141, 148)]


def test_who_decompresses_nothing_has_no_stream_for_it() -> None:
    recording = tiny_run(tiny_model(1), tiny_profile(), tiny_trace([[[0]]]), tiny_scenario())
    assert [lane.title for lane in recording.decoded.timeline.lanes] == [
        "host thread", "predictor (side stream)", "copy engine D2H", "copy engine H2D", "compute stream",
    ]  # fmt: skip


@pytest.mark.parametrize("lane", DECOMPRESS_LANES)
def test_what_is_kept_compressed_takes_half_the_room_and_is_decompressed_at_every_use(lane: str) -> None:
    # Room for one whole expert holds two at half: experts 0 and 1 stay. dense 3, copy 10, decompress 14, kernel 7.
    scenario = compressed("gpu", lane, memory={"gpu_budget": "1experts"})
    recording = tiny_run(tiny_model(1), tiny_profile(), tiny_trace([[[0]], [[1]], [[0]]]), scenario)
    assert spans_of(recording, EXPERT) == [(27, 34), (61, 68), (85, 92)]
    assert spans_of(recording, DECOMPRESS) == [(13, 27), (47, 61), (71, 85)]
    counts = metrics(recording)["counts"]
    assert (counts["cache_hit"], counts["miss"], counts["evict"]) == (1, 2, 0)
    assert recording.decoded.visits["assigned_bytes"].tolist() == [10, 20, 20]


def test_the_popular_experts_of_a_layer_are_kept_whole_and_the_others_are_smaller() -> None:
    # Of 4 experts the most popular, 2, is whole: a copy of 20, a kernel of 7. The others have 5 of its 20 bytes: a copy
    # of 5, and a kernel that reads a quarter, 1.75: 2 ns.
    trace = tiny_trace([[[2]], [[0]]], extra={"popularity": np.array([[1.0, 2.0, 3.0, 0.0]])})
    scenario = tiny_scenario(compression={"mixed": [[0.25, 1.0], [0.75, 0.25]]}, memory={"gpu_budget": "25B"})
    inputs = tiny_inputs(tiny_model(1), tiny_profile(), trace, scenario)
    assert list(make_manager(inputs).size_of) == [5, 5, 20, 5]
    recording = tiny_run(tiny_model(1), tiny_profile(), trace, scenario)
    assert spans_of(recording, DEMAND) == [(3, 23), (33, 38)]
    assert spans_of(recording, EXPERT) == [(23, 30), (38, 40)]
    assert metrics(recording)["bytes"]["demand"] == 25
    assert recording.decoded.visits["assigned_bytes"].tolist() == [20, 25]  # both fit


def test_shares_of_popularity_are_of_every_layer() -> None:
    popularity = np.array([[9.0, 8.0, 7.0, 6.0], [0.0, 1.0, 2.0, 3.0]])
    trace = tiny_trace([[[0], [0]]], extra={"popularity": popularity})
    scenario = tiny_scenario(compression={"mixed": [[0.5, 1.0], [0.25, 0.5], [0.25, 0.2]]})
    manager = make_manager(tiny_inputs(tiny_model(2), tiny_profile(), trace, scenario))
    assert list(manager.size_of) == [20, 20, 10, 4, 4, 10, 20, 20]


def test_the_gate_weight_that_each_precision_computed_is_told() -> None:
    # Of the weights 0.75 + 0.25 + 0.5 + 0.5 the whole expert 2 has 0.75, the others 1.25.
    weights = np.array([[[0.75, 0.25]], [[0.5, 0.5]]], dtype=np.float16)
    trace = tiny_trace([[[2, 0]], [[1, 3]]], weights=weights, extra={"popularity": np.array([[1.0, 2.0, 3.0, 0.0]])})
    scenario = tiny_scenario(compression={"mixed": [[0.25, 1.0], [0.75, 0.25]]})
    model = tiny_model(1, top_k=2)
    recording = tiny_run(model, tiny_profile(), trace, scenario)
    assert precision_mass([recording], [model], [[0.25, 1.0], [0.75, 0.25]]) == {"1": 0.375, "0.25": 0.625}


def test_bytes_are_rounded_up_from_the_decimal_ratio() -> None:
    assert [shrunk(30, 0.1), shrunk(31, 0.1), shrunk(7, 1.0), shrunk(10, 0.35)] == [3, 4, 7, 4]


# What is refused.


@pytest.mark.parametrize(
    ("compression", "other", "said"),
    [
        ({"where": "host"}, {}, "say what decompressing takes, decompress_gb_per_s"),
        ({"where": "disk"}, {}, "choose one of none, host, gpu"),
        ({"where": "host", **TAKES, "mixed": [[1.0, 0.5]]}, {}, "give one of the two"),
        ({"mixed": [[0.5, 0.5]]}, {}, "pairs whose shares come to 1"),
        ({"mixed": [[1.0, 2.0]]}, {}, "pairs whose shares come to 1"),
        ({"mixed": [[1.0, 0.5]]}, {"memory": {"scope": "per-layer"}}, "choose memory.scope = 'global'"),
        ({"where": "gpu", **TAKES}, {"dispatch": {"expert_kernel": "grouped"}}, "choose dispatch.expert_kernel"),
        ({"where": "gpu", **TAKES}, {"memory": {"scope": "shared"}}, "memory.scope = 'shared'"),
        ({"where": "gpu", **TAKES}, {"miss": {"policy": "low_precision"}}, "with compression.where = 'gpu'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    compression: dict[str, Any], other: dict[str, Any], said: str
) -> None:
    with pytest.raises(ScenarioError) as error:
        tiny_scenario(compression=compression, **other)
    assert said in str(error.value) and "\n" not in str(error.value)


# Whatever the run.


def random_case(data: st.DataObject) -> Case:
    """A random run with experts in fewer bytes, in one of the ways."""
    where = data.draw(st.sampled_from(COMPRESSED))
    fixed: dict[str, dict[str, Any]] = {
        "dispatch": {"expert_kernel": "separate"},
        "memory": {"scope": "global"},
        "tiers": {"host_budget": "all", "prefetch": "gpu"},
        "compression": {"where": where, "lane": data.draw(st.sampled_from(DECOMPRESS_LANES)), **TAKES},
    }
    if where == "none":
        fixed["compression"] = {"mixed": [[0.25, 1.0], [0.5, 0.5], [0.25, 0.2]]}
    if data.draw(st.booleans()):
        fixed["copy"] = {"discipline": "priority", "drop_stale": data.draw(st.booleans())}
    case: Case = data.draw(cases(**fixed))
    return case


@pytest.mark.slow
@settings(max_examples=3 * EXAMPLES)
@given(data=st.data())
def test_bytes_are_conserved_and_every_kernel_has_its_expert_decompressed(data: st.DataObject) -> None:
    case = random_case(data)
    inputs = case.inputs()
    result = simulate_inputs(inputs, baselines=False)
    recording, compression = result.recording, case.scenario.compression
    assert result.data["layer_visits"] == inputs.layer_visits  # it came to its end
    if not case.scenario.copy_.drop_stale:  # which decides by the clock
        counts = count_visits(*decide(inputs))
        found = sum(result.data["counts"][outcome] for outcome in ("prefetch_hit", "cache_hit", "late"))
        assert (found, result.data["counts"]["miss"]) == (counts.found, counts.miss)
    assert sum(round(ms * 1e6) for ms in result.data["time"].values()) == recording.makespan_ns
    # Memory never holds more than the budget; the sum of what is there is what is assigned.
    manager = recording.manager
    assert sum(manager.size_of[expert] for expert in manager.assigned) == manager.assigned_bytes
    assert (recording.decoded.visits["assigned_bytes"] <= recording.decoded.visits["budget_bytes"]).all()
    # Every copy that was used moved the bytes that its expert has on the link.
    used = recording.first_access >= 0
    for expert, moved in zip(np.array(manager.copy_expert)[used], recording.copied_bytes[used], strict=True):
        whole = case.model.expert_bytes[expert // case.model.experts]
        assert moved == (manager.size_of[expert] if compression.mixed else compression.copied_bytes(whole))
    check_decompressed(recording, compression.where)


def check_decompressed(recording: Recording, where: str) -> None:
    """Kept compressed, each use has a decompression of its own before it; on the way only, each copy that is used."""
    spans = recording.spans
    kernels, unpacked = spans[spans["kind"] == EXPERT], spans[spans["kind"] == DECOMPRESS]
    if where == "none":
        assert not len(unpacked)
        return
    if where == "gpu":
        assert len(unpacked) == len(kernels)
    first_end: dict[int, int] = {}
    for span in unpacked:
        first_end.setdefault(int(span["copy"]), int(span["end_ns"]))
        assert span["start_ns"] >= recording.copy_end_ns[span["copy"]]
    for kernel in kernels:
        assert first_end[int(kernel["copy"])] <= kernel["start_ns"]


def test_half_the_bytes_and_free_decompression_are_a_link_twice_as_fast() -> None:
    # On a real trace, with all else as it is.
    settings = ["workload.tokens=20", "compression.where=host", "compression.ratio=0.5"]
    settings += ["compression.decompress_gb_per_s=1e6", "compression.decompress_us=0"]
    packed, plain = simulate(load_scenario("guide", settings)), simulate(load_scenario("guide", settings[:1]))
    assert packed.data["counts"]["miss"] == plain.data["counts"]["miss"]
    assert 2 * packed.data["bytes"]["demand"] == plain.data["bytes"]["demand"]
    assert packed.data["makespan_ms"] < plain.data["makespan_ms"]
    # What it is compared with is the plain run, however the experts are kept.
    assert packed.data["resident_ms"] == plain.data["resident_ms"]
    assert packed.data["baseline_ms"] == plain.data["baseline_ms"]


def test_the_constant_of_decompression_is_the_rules_where_it_is_not_given() -> None:
    settings = ["workload.tokens=2", "compression.where=host", "compression.decompress_gb_per_s=500"]
    data = simulate(load_scenario("guide", settings), baselines=False).data
    rule = load_inputs(load_scenario("guide", settings)).profile.compute.rule
    assert data["estimates"]["decompression"].startswith(f"{rule.constant_ns} ns, the profile's rule")
    assert data["decompress_ms"] > 0
