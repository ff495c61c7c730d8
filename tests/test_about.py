"""What a run's timeline file says beyond its spans: by hand on small runs, and held together on the default one."""

from __future__ import annotations

from typing import Any

import numpy as np
from tiny import tiny_model, tiny_profile, tiny_run, tiny_scenario, tiny_trace

from prestage.engine.measure.metrics import span_bytes
from prestage.engine.measure.recording import Recording
from prestage.output.about import SPAN_OUTCOMES, about_run, resident_steps, span_outcomes
from prestage.resources.timeline import DEMAND, EXPERT, PREFETCH, READBACK


def run(experts: list[list[list[int]]], layers: int, *, copy_ns: Any = 20, **sections: Any) -> Recording:
    trace = tiny_trace(experts)
    recording: Recording = tiny_run(
        tiny_model(layers, copy_ns=copy_ns), tiny_profile(), trace, tiny_scenario(**sections)
    )
    return recording


def outcomes_of(recording: Recording, kind: int) -> list[str]:
    numbers = span_outcomes(recording)[recording.spans["kind"] == kind]
    return [SPAN_OUTCOMES[number] for number in numbers.tolist()]


def test_each_piece_of_a_copy_has_its_bytes_and_the_last_one_the_rest() -> None:
    # Experts of 20 bytes in pieces of 8: 7, 7 and 6, as even as they come.
    recording = run([[[0]], [[1]]], 1, copy={"discipline": "priority", "chunk_bytes": 8})
    pieces = span_bytes(recording)[recording.spans["kind"] == DEMAND]
    assert pieces.tolist() == [7, 7, 6, 7, 7, 6]
    whole = run([[[0], [1]]], 2, copy_ns=[20, 30])
    assert span_bytes(whole)[whole.spans["kind"] == DEMAND].tolist() == [20, 30]


def test_the_choices_copy_to_the_host_is_of_a_number_for_each_token_and_choice() -> None:
    recording = run([[[0]], [[1]], [[2]]], 1, workload={"batch": 3}, dispatch={"router_readback": True})
    moved = span_bytes(recording)[recording.spans["kind"] == READBACK]
    steps = [len(step.rows) for step in recording.steps]
    assert moved.tolist() == [4 * tokens for tokens in steps]
    two = tiny_run(tiny_model(1, top_k=2), tiny_profile(), tiny_trace([[[0, 1]]] * 3), tiny_scenario())
    assert span_bytes(two)[two.spans["kind"] == READBACK].tolist() == [4 * 2] * 3


def test_kernels_say_what_their_access_was_and_prefetches_how_they_ended() -> None:
    # Room for two experts: 0 and 1 miss, 0 is found, 2 misses and evicts 1, which then misses again.
    recording = run([[[0]], [[1]], [[0]], [[2]], [[1]]], 1, memory={"gpu_budget": "2experts"})
    assert outcomes_of(recording, EXPERT) == ["miss", "miss", "cache_hit", "miss", "miss"]
    assert outcomes_of(recording, DEMAND) == [""] * 4
    # The oracle names layer 1's expert while layer 0's is copied: bytes not there when its choice is known.
    ahead = run([[[0], [1]]], 2, prefetch={"lookahead": 1})
    assert outcomes_of(ahead, EXPERT) == ["miss", "late"]
    assert outcomes_of(ahead, PREFETCH) == ["late"]


def test_bytes_arrive_and_then_are_resident() -> None:
    # Dense 3 ns, then expert 0 is ordered at 3 and there at 23; its kernel ends at 30, the next dense at 33.
    recording = run([[[0]], [[1]]], 1)
    time_ns, resident, arriving = resident_steps(recording)
    assert list(zip(time_ns.tolist(), resident.tolist(), arriving.tolist(), strict=True)) == [
        (3, 0, 20), (23, 20, 0), (33, 20, 20), (53, 40, 0)
    ]  # fmt: skip


def test_all_of_it_fits_the_default_run(default_run: Any) -> None:
    about, data, spans = about_run(default_run), default_run.data, default_run.timeline.spans()
    assert (about.layers, about.experts_per_layer, about.graphs, about.pinned) == (12, 128, True, True)
    assert about.gpus == {"name": "NVIDIA H200 (simulated)", "totalGlobalMem": 150109880320}
    assert about.span_bytes is not None and about.span_outcomes is not None
    for kind, name in ((DEMAND, "demand"), (PREFETCH, "prefetch")):
        assert about.span_bytes[spans["kind"] == kind].sum() == data["bytes"][name]
    numbers, counts = np.unique(about.span_outcomes[spans["kind"] == EXPERT], return_counts=True)
    assert {SPAN_OUTCOMES[number]: count for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)} == {
        name: data["counts"][name] for name in ("prefetch_hit", "cache_hit", "late", "miss") if data["counts"][name]
    }
    _, resident, arriving = about.memory["gpu0"]
    assert resident.min() >= 0 and arriving.min() >= 0
    assert (resident + arriving).max() <= data["budget_bytes"]
    assert arriving[-1] == 0 and resident[-1] == default_run.recording.decoded.visits["assigned_bytes"][-1]
