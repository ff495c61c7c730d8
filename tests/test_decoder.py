"""The overlapped decoder against closed forms and schedules worked by hand, to the nanosecond.

d: the dense part of a layer, p: the copy of an expert, x: an expert's kernel.
"""

from typing import Any

import pytest
from tiny import tiny_model, tiny_profile, tiny_run, tiny_scenario, tiny_trace

from prestage.engine.measure.metrics import metrics
from prestage.engine.measure.recording import FATES, OUTCOMES, Recording
from prestage.engine.measure.time_split import time_split
from prestage.resources.timeline import KINDS

TIMES = [(3, 20, 7), (30, 20, 7), (3, 5, 40), (10, 17, 7), (1, 1, 1), (1000, 999, 998)]


def one_token(layers: int) -> Any:
    """One token that meets each layer once: nothing can have been cached."""
    return tiny_trace([[[layer % 4] for layer in range(layers)]])


def spans_of(recording: Recording, kind: str) -> list[tuple[int, int]]:
    """The intervals of one kind, in order of start."""
    spans = recording.spans[recording.spans["kind"] == KINDS.index(kind)]
    return sorted((int(span["start_ns"]), int(span["end_ns"])) for span in spans)


def outcomes_of(recording: Recording) -> list[str]:
    return [OUTCOMES[outcome] for outcome in recording.outcomes]


@pytest.mark.parametrize(("d", "p", "x"), TIMES)
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_without_prefetch_every_layer_takes_its_dense_part_its_copy_and_its_kernel(
    layers: int, d: int, p: int, x: int
) -> None:
    model = tiny_model(layers, dense_ns=d, copy_ns=p)
    recording = tiny_run(model, tiny_profile(expert_ns=x), one_token(layers), tiny_scenario())
    assert recording.makespan_ns == layers * (d + p + x)


@pytest.mark.parametrize(("d", "p", "x"), TIMES)
@pytest.mark.parametrize("layers", [1, 2, 5, 9])
def test_a_perfect_predictor_one_layer_ahead_hides_the_shorter_of_copy_and_compute(
    layers: int, d: int, p: int, x: int
) -> None:
    # The first layer fetches on demand. From then on layer l + 1 is fetched while layer l computes: its kernel starts
    # the longer of p and x + d after that of layer l.
    model = tiny_model(layers, dense_ns=d, copy_ns=p)
    scenario = tiny_scenario(prefetch={"lookahead": 1}, memory={"gpu_budget": "16experts"})
    recording = tiny_run(model, tiny_profile(expert_ns=x), one_token(layers), scenario)
    assert recording.makespan_ns == d + p + (layers - 1) * max(p, d + x) + x


def test_with_the_readback_off_the_host_runs_ahead_and_copies_follow_each_other() -> None:
    # The host knows all choices at 0 and enqueues all copies at once: copy l ends at 20 (l + 1). Kernels wait for
    # them: 20-27, dense to 30, 40-47, dense to 50, 60-67. Dense of layer 0 ran at 0-3, before any copy had ended.
    scenario = tiny_scenario(dispatch={"router_readback": False})
    recording = tiny_run(tiny_model(3), tiny_profile(), one_token(3), scenario)
    assert spans_of(recording, "demand") == [(0, 20), (20, 40), (40, 60)]
    assert spans_of(recording, "dense") == [(0, 3), (27, 30), (47, 50)]
    assert spans_of(recording, "expert") == [(20, 27), (40, 47), (60, 67)]


def test_a_copy_into_a_reused_slot_waits_for_the_last_kernel_that_reads_the_old_expert() -> None:
    # One slot only, and a host that runs ahead: the copy of layer 1 is enqueued at 0 but may not overwrite the expert
    # of layer 0 before its kernel has ended at 27; so 27-47, kernel 47-54; then 54-74 and 74-81.
    scenario = tiny_scenario(dispatch={"router_readback": False}, memory={"gpu_budget": "1experts"})
    recording = tiny_run(tiny_model(3), tiny_profile(), one_token(3), scenario)
    assert spans_of(recording, "demand") == [(0, 20), (27, 47), (54, 74)]
    assert spans_of(recording, "expert") == [(20, 27), (47, 54), (74, 81)]


def test_with_two_slots_only_every_other_copy_waits_and_holds_up_the_lane() -> None:
    # Two slots: copies 0 and 1 go to 0-20 and 20-40. Copy 2 takes the slot of expert 0, whose kernel ended at 27: it
    # is next in line at 40 anyway. Copy 3 takes the slot of expert 1, read until 47: it follows at 60.
    scenario = tiny_scenario(dispatch={"router_readback": False}, memory={"gpu_budget": "2experts"})
    recording = tiny_run(tiny_model(4), tiny_profile(), one_token(4), scenario)
    assert spans_of(recording, "demand") == [(0, 20), (20, 40), (40, 60), (60, 80)]
    # With slow kernels (50 ns) the copies wait: copy 2 for kernel 0 (20-70), copy 3 for kernel 1 (73-123).
    recording = tiny_run(tiny_model(4), tiny_profile(expert_ns=50), one_token(4), scenario)
    assert spans_of(recording, "expert") == [(20, 70), (73, 123), (126, 176), (179, 229)]
    assert spans_of(recording, "demand") == [(0, 20), (20, 40), (70, 90), (123, 143)]


def test_lookahead_across_the_token_boundary_fetches_for_the_next_token() -> None:
    # Two tokens, one layer, different experts. Token 0: dense 0-3, demand 3-23, kernel 23-30. Its guess for token 1 is
    # copied at 23-43. Token 1: dense 30-33, its choice is known at 33, its bytes are there at 43: late; kernel 43-50.
    trace = tiny_trace([[[0]], [[1]]])
    recording = tiny_run(tiny_model(1), tiny_profile(), trace, tiny_scenario(prefetch={"lookahead": 1}))
    assert spans_of(recording, "prefetch") == [(23, 43)]
    assert spans_of(recording, "expert") == [(23, 30), (43, 50)]
    assert outcomes_of(recording) == ["miss", "late"]
    assert recording.wait_ns.tolist() == [20, 10]
    assert [FATES[fate] for fate in recording.copy_fates if fate >= 0] == ["late"]


def test_host_costs_delay_what_they_dispatch() -> None:
    # Launch 2, enqueue 1, D2H copy 4, synchronize 5. Dense launched 0-2, runs 2-5. The host enqueues the read-back
    # (3), which copies 5-9; the choice is known at 14. Copy enqueued at 15, runs 15-35; kernel launched by 17, 35-42.
    profile = tiny_profile(launch_ns=2, enqueue_ns=1, readback_ns=4, synchronize_ns=5)
    recording = tiny_run(tiny_model(1), profile, one_token(1), tiny_scenario(dispatch={"mode": "graph"}))
    assert spans_of(recording, "dense") == [(2, 5)]
    assert spans_of(recording, "readback") == [(5, 9)]
    assert recording.decoded.visits["choice_known_ns"].tolist() == [14]
    assert spans_of(recording, "demand") == [(15, 35)]
    assert spans_of(recording, "expert") == [(35, 42)]
    assert spans_of(recording, "launch") == [(0, 3), (14, 19)]  # the second with the head's launch


def test_an_eager_dense_part_ends_no_sooner_than_its_last_kernel_allows() -> None:
    # Three kernels of 1 ns each, launched at 10, 20 and 30: the last starts at 30, so the group is shown at 28-31.
    model = tiny_model(1, dense_ns=3, dense_kernels=3)
    recording = tiny_run(model, tiny_profile(launch_ns=10), one_token(1), tiny_scenario(dispatch={"mode": "eager"}))
    assert spans_of(recording, "dense") == [(28, 31)]


def test_the_launch_queue_blocks_a_host_that_runs_ahead() -> None:
    # A queue of two: the host has launched dense and expert of layer 0 when it wants to launch the dense part of
    # layer 1; it blocks until the first of them has ended (3), and so on. So it cannot enqueue copy 1 before 3.
    scenario = tiny_scenario(dispatch={"router_readback": False, "launch_queue_depth": 2})
    recording = tiny_run(tiny_model(2), tiny_profile(alone_latency_ns=1), one_token(2), scenario)
    known = recording.decoded.visits["choice_known_ns"].tolist()
    assert known == [0, 3]


def test_a_pageable_copy_holds_the_host_thread() -> None:
    # Prefetches cannot overlap: the host makes each copy itself. Layer 0: demand 3-23. The prefetch for layer 1 is
    # made at 23-43, after the launch of kernel 0 (23-30). Only then is the dense part of layer 1 launched: 43-46.
    profile = tiny_profile(memory="pageable")
    recording = tiny_run(tiny_model(2), profile, one_token(2), tiny_scenario(prefetch={"lookahead": 1}))
    assert spans_of(recording, "prefetch") == [(23, 43)]
    assert spans_of(recording, "dense") == [(0, 3), (43, 46)]
    assert outcomes_of(recording) == ["miss", "prefetch_hit"]


def test_what_waits_for_a_copy_that_holds_the_host_is_stall() -> None:
    # As above. The GPU waits 3-23 for bytes, and 30-43 for a launch that the prefetch of layer 1 holds up.
    profile, ahead = tiny_profile(memory="pageable"), tiny_scenario(prefetch={"lookahead": 1})
    data = metrics(tiny_run(tiny_model(2), profile, one_token(2), ahead))
    assert {part: round(ms * 1e6) for part, ms in data["time"].items() if ms} == {"compute_ms": 20, "stall_ms": 33}
    eager = tiny_scenario(dispatch={"mode": "eager"})
    # Launches of 1 ns come after the copy that held the host: dense launched 0-1, runs 1-4; copy 4-24; the expert's
    # launch is 24-25. All of 4-24 is stall, though the kernel waits for its launch last; 0-1 and 24-25 are host.
    data = metrics(tiny_run(tiny_model(1), tiny_profile(memory="pageable", launch_ns=1), one_token(1), eager))
    assert {part: round(ms * 1e6) for part, ms in data["time"].items() if ms} == {
        "compute_ms": 10, "stall_ms": 20, "host_ms": 2,
    }  # fmt: skip
    assert data["host_held_ms"] == 20 / 1e6
    pinned = metrics(tiny_run(tiny_model(1), tiny_profile(launch_ns=1), one_token(1), eager))
    assert (pinned["stall_ms"], pinned["host_held_ms"]) == (20 / 1e6, 0)


def test_resident_first_computes_what_is_there_while_the_rest_is_copied() -> None:
    # Token 0 brings experts 0 and 1; token 1 wants 2 (absent) and 0 (there). In router order kernel 2 waits for its
    # copy and holds up kernel 0; resident first runs kernel 0 meanwhile.
    trace = tiny_trace([[[0, 1]], [[2, 0]]])
    ends = {}
    for order in ("router", "resident_first"):
        scenario = tiny_scenario(dispatch={"expert_order": order})
        ends[order] = tiny_run(tiny_model(1, top_k=2), tiny_profile(), trace, scenario).makespan_ns
    # Token 0: 3, copies to 23 and 43, kernels 23-30, 43-50. Token 1: dense 50-53, copy 53-73.
    # Router order: kernels 73-80, 80-87. Resident first: kernel 0 at 53-60, kernel 2 at 73-80.
    assert ends == {"router": 87, "resident_first": 80}


def test_a_predictor_on_the_host_holds_its_thread_and_is_of_no_expert_and_no_copy() -> None:
    # The choice is known at 3 and its kernel launched; then the host predicts for 5 ns, before it orders the prefetch
    # (8) and launches the dense part of layer 1. That runs at 30-33, and the host predicts again.
    scenario = tiny_scenario(prefetch={"lookahead": 1}, predictor={"latency_us": 0.005, "lane": "host"})
    recording = tiny_run(tiny_model(2), tiny_profile(), one_token(2), scenario)
    spans = recording.spans
    predicted = spans[spans["kind"] == KINDS.index("predict")]
    names = ["start_ns", "end_ns", "issued_ns", "expert", "visit", "copy"]
    assert predicted[names].tolist() == [(3, 8, 3, -1, 0, -1), (33, 38, 33, -1, 1, -1)]
    assert spans["issued_ns"][spans["kind"] == KINDS.index("prefetch")].tolist() == [8]
    assert spans["issued_ns"][spans["kind"] == KINDS.index("dense")].tolist() == [0, 8]


def test_a_grouped_kernel_waits_for_all_bytes() -> None:
    trace = tiny_trace([[[0, 1]]])
    scenario = tiny_scenario(dispatch={"expert_kernel": "grouped"})
    recording = tiny_run(tiny_model(1, top_k=2), tiny_profile(), trace, scenario)
    # Copies 3-23 and 23-43; one kernel of 7 + 7 ns (the rule's constant is 0) from 43.
    assert spans_of(recording, "expert") == [(43, 57)]
    assert time_split(recording)["stall_ms"] == pytest.approx(40e-6)


def test_a_batch_that_does_not_fit_is_served_in_waves() -> None:
    # Room for two, three experts wanted: copies 0 and 1, their kernels; then expert 2 takes the room of expert 0,
    # whose kernel ended at 30. Copies 3-23, 23-43, 43-63; kernels 23-30, 43-50, 63-70.
    trace = tiny_trace([[[0, 1, 2]]])
    recording = tiny_run(
        tiny_model(1, top_k=3), tiny_profile(), trace, tiny_scenario(memory={"gpu_budget": "2experts"})
    )
    assert spans_of(recording, "demand") == [(3, 23), (23, 43), (43, 63)]
    assert spans_of(recording, "expert") == [(23, 30), (43, 50), (63, 70)]


def test_prefetch_before_launch_queues_ahead_of_nothing_but_takes_host_time_first() -> None:
    # Enqueueing takes 5 ns. Choice at 8 (dense 0-3, read-back enqueued by 5... the copy of the choice is free): the
    # demand copy is enqueued 5 ns later, and the prefetch 5 ns after that; before_launch launches the kernel only then.
    launches = {}
    for issue in ("after_launch", "before_launch"):
        scenario = tiny_scenario(prefetch={"lookahead": 1, "issue": issue}, dispatch={"mode": "graph"})
        recording = tiny_run(tiny_model(2), tiny_profile(enqueue_ns=5), one_token(2), scenario)
        spans = recording.compute_spans
        launches[issue] = spans["issued_ns"][spans["kind"] == KINDS.index("expert")].tolist()[0]
    assert launches["before_launch"] - launches["after_launch"] == 5


def test_the_predictor_delays_prefetches_on_its_own_lane_and_the_host_on_the_hosts() -> None:
    # One token, two layers, prediction 4 ns. Choice known at 3, demand copy 3-23, kernel 23-30.
    # gpu: predicted 3-7, the prefetch follows the demand copy anyway: 23-43. Dense 30-33, kernel 43-50.
    # compute: the prediction runs on the compute stream behind kernel 0, 30-34, and the prefetch waits for it: 34-54.
    # host: the host predicts 3-7 and enqueues then: 23-43; dense 1 is launched meanwhile: nothing is lost.
    ends = {}
    for lane in ("gpu", "compute", "host", "free"):
        scenario = tiny_scenario(prefetch={"lookahead": 1}, predictor={"latency_us": 0.004, "lane": lane})
        recording = tiny_run(tiny_model(2), tiny_profile(), one_token(2), scenario)
        ends[lane] = (spans_of(recording, "prefetch"), recording.makespan_ns)
    assert ends["gpu"] == ([(23, 43)], 50)
    assert ends["compute"] == ([(34, 54)], 61 + 4)  # the last layer predicts too, though nobody needs it
    assert ends["host"] == ([(23, 43)], 50)
    assert ends["free"] == ([(23, 43)], 50)


@pytest.mark.parametrize(
    ("lane", "issued_by", "predicted", "guesses", "prefetch"),
    [
        # Beside the copy that was demanded the prediction runs 21-31. It is asked for at 26, is on the host at 35, and
        # known at 36; the copy is enqueued until 41.
        ("gpu", "host", (21, 31), (31, 35), (41, 61)),
        # Behind expert 0's kernel: 44-54, on the host at 58.
        ("compute", "host", (44, 54), (54, 58), (64, 84)),
        # Where the GPU issues the copy, it begins behind the one before it.
        ("gpu", "gpu", (21, 31), None, (37, 57)),
        ("compute", "gpu", (44, 54), None, (54, 74)),
    ],
)
def test_guesses_of_the_gpu_reach_the_host_before_it_enqueues_copies_or_the_gpu_issues_them(
    lane: str, issued_by: str, predicted: tuple[int, int], guesses: tuple[int, int] | None, prefetch: tuple[int, int]
) -> None:
    # A launch takes the host 2 ns, an enqueue 5, a synchronization 1; a read-back 4. Dense 0 is launched at 2 and ends
    # at 5; its choice is enqueued at 7, there at 11, known at 12. The demand copy is enqueued until 17, 17-37; kernel
    # 0 is launched at 19, 37-44, and the prediction of 10 ns at 21.
    scenario = tiny_scenario(
        prefetch={"lookahead": 1, "issued_by": issued_by}, predictor={"latency_us": 0.01, "lane": lane},
        dispatch={"mode": "graph"},
    )  # fmt: skip
    profile = tiny_profile(launch_ns=2, enqueue_ns=5, synchronize_ns=1, readback_ns=4)
    recording = tiny_run(tiny_model(2), profile, one_token(2), scenario)
    assert spans_of(recording, "demand") == [(17, 37)]
    assert spans_of(recording, "predict")[0] == predicted
    assert spans_of(recording, "guesses")[:1] == ([] if guesses is None else [guesses])
    assert spans_of(recording, "prefetch") == [prefetch]


def test_what_the_host_waits_for_guesses_is_the_predictors_time() -> None:
    # As above on the compute stream. The host has the guesses at 58 and launches dense 1 at 66, until 69; its choice is
    # known at 76; kernel 1 waits for its bytes, 84-91; the second prediction runs 91-101 and is on the host at 105; the
    # head is launched at 108. Idle: 0-2, 54-66 and 101-108 for the host, of which the guesses take 54-58 and 101-105;
    # 5-37 and 69-84 for bytes.
    scenario = tiny_scenario(
        prefetch={"lookahead": 1}, predictor={"latency_us": 0.01, "lane": "compute"}, dispatch={"mode": "graph"}
    )
    profile = tiny_profile(launch_ns=2, enqueue_ns=5, synchronize_ns=1, readback_ns=4)
    parts = time_split(tiny_run(tiny_model(2), profile, one_token(2), scenario))
    parts_ns = [round(parts[f"{name}_ms"] * 1e6) for name in ("compute", "stall", "host", "predictor")]
    assert parts_ns == [3 + 7 + 3 + 7, 32 + 15, 2 + 8 + 3, 10 + 4 + 10 + 4]


def test_a_prefetch_in_a_second_stream_shares_the_link_with_demand() -> None:
    # Choice at 3: the demand copy and the prefetch for layer 1 start together in two streams and share the link: both
    # end at 43. (In one stream the demand copy would have ended at 23.) Kernel 0 43-50, dense 50-53, kernel 1 53-60.
    scenario = tiny_scenario(prefetch={"lookahead": 1}, copy={"discipline": "two_streams"})
    recording = tiny_run(tiny_model(2), tiny_profile(), one_token(2), scenario)
    assert spans_of(recording, "demand") == [(3, 43)]
    assert spans_of(recording, "prefetch") == [(3, 43)]
    assert spans_of(recording, "expert") == [(43, 50), (53, 60)]


def test_the_priority_queue_puts_a_demand_before_queued_prefetches() -> None:
    # Lookahead 3 over four layers, a perfect predictor except that the trace's own first guess is missing: layer 0
    # orders prefetches for layers 1, 2, 3 at 3. Demand 3-23, then 1, 2, 3 in turn.
    trace = one_token(4)
    scenario = tiny_scenario(prefetch={"lookahead": 3}, copy={"discipline": "priority"})
    recording = tiny_run(tiny_model(4), tiny_profile(), trace, scenario)
    spans = recording.copy_spans
    assert (spans["expert"] // 4).tolist() == [0, 1, 2, 3]
    assert spans["start_ns"].tolist() == [3, 23, 43, 63]


def test_kernels_beside_copies_are_slowed_and_the_copies_are_not() -> None:
    # A kernel takes 10 ns alone, 20 beside a copy. Layer 0: dense 0-3, demand 3-23, kernel from 23. The prefetch for
    # layer 1 runs 23-43, all beside it: the kernel takes 20 ns, to 43.
    profile = tiny_profile(expert_ns=10, beside_copy_ns=20)
    scenario = tiny_scenario(prefetch={"lookahead": 1})
    recording = tiny_run(tiny_model(2), profile, one_token(2), scenario)
    assert spans_of(recording, "expert")[0] == (23, 43)
    assert spans_of(recording, "prefetch") == [(23, 43)]
    alone = tiny_run(
        tiny_model(2), profile, one_token(2), tiny_scenario(prefetch={"lookahead": 1}, copy={"contention": False})
    )
    assert spans_of(alone, "expert")[0] == (23, 33)


@pytest.mark.parametrize("discipline", ["fifo", "two_streams", "priority"])
def test_everything_resident_takes_compute_alone(discipline: str) -> None:
    trace = tiny_trace([[[0], [1]], [[0], [1]], [[0], [1]]])
    recording = tiny_run(tiny_model(2), tiny_profile(), trace, tiny_scenario(copy={"discipline": discipline}))
    # The first token fetches (2 x 30), the other two find everything: 2 x 2 x (3 + 7).
    assert recording.makespan_ns == 60 + 40
    assert metrics(recording)["counts"]["cache_hit"] == 4
