"""Pipeline parallelism against closed forms and schedules worked by hand, to the nanosecond.

A stage of two layers takes t = 20 ns over any batch: twice a dense part (3) and one expert's kernel (7). Nothing else
takes time unless the test says so: experts are in memory, the host is free, and so are copies between GPUs.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_cases import Case, cases, decide, play, played
from tiny import (
    check_books,
    peers,
    run_alike,
    run_resident,
    tiny_model,
    tiny_pipeline,
    tiny_profile,
    tiny_scenario,
    tiny_topology,
    tiny_trace,
)

from prestage.engine.costs.costs import part_costs
from prestage.engine.measure.merge import makespan_ns, run_metrics, served
from prestage.engine.measure.recording import Recording
from prestage.engine.measure.speed import Serving
from prestage.engine.measure.time_split import time_split
from prestage.engine.run import ENGINES, prepared, run_all
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import make_scenario
from prestage.engine.scenario.sections import DISPATCH_THREADS
from prestage.engine.simulate import serving_of, simulate_inputs
from prestage.resources.profile import make_profile
from prestage.resources.timeline import ACTIVATION, DENSE, EXPERT, KINDS
from prestage.workloads.batches import Step, continued_steps
from prestage.workloads.trace import RoutingTrace

T_NS = 20


def sequences(count: int, tokens: int, layers: int, expert: int = 0) -> RoutingTrace:
    """So many sequences of so many decode tokens that all use one expert."""
    experts = [[[expert]] * layers] * (count * tokens)
    trace: RoutingTrace = tiny_trace(experts, sequence=np.repeat(np.arange(count, dtype=np.int32), tokens))
    return trace


def staged(stages: int, micro_batches: int, batch: int, **sections: Any) -> Any:
    parallel = {"stages": stages, "micro_batches": micro_batches, **sections.pop("parallel", {})}
    return tiny_scenario(workload={"batch": batch}, parallel=parallel, **sections)


def spans_of(recording: Recording, *kinds: str) -> list[tuple[int, int]]:
    spans = recording.spans[np.isin(recording.spans["kind"], [KINDS.index(kind) for kind in kinds])]
    return sorted((int(span["start_ns"]), int(span["end_ns"])) for span in spans)


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("micro_batches", [1, 2, 4, 5])
def test_one_pass_of_m_micro_batches_over_s_stages_takes_m_plus_s_less_1_times_t(
    stages: int, micro_batches: int
) -> None:
    layers, batch = 2 * stages, 2 * micro_batches
    scenario = staged(stages, micro_batches, batch)
    inputs = tiny_pipeline(tiny_model(layers), tiny_profile(gpus=stages), sequences(batch, 1, layers), scenario)
    assert makespan_ns(run_resident(inputs)) == (micro_batches + stages - 1) * T_NS


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 6])
def test_decode_takes_its_steps_times_the_larger_of_m_and_s_and_the_smaller_to_fill(
    stages: int, micro_batches: int
) -> None:
    # With M < S a micro-batch comes back before the next step can begin; with M > S it waits for its turn.
    steps, layers = 5, 2 * stages
    scenario = staged(stages, micro_batches, micro_batches)
    trace = sequences(micro_batches, steps, layers)
    inputs = tiny_pipeline(tiny_model(layers), tiny_profile(gpus=stages), trace, scenario)
    recordings = run_resident(inputs)
    most, least = max(micro_batches, stages), min(micro_batches, stages)
    assert makespan_ns(recordings) == (steps * most + least - 1) * T_NS
    data = run_metrics(recordings, [None] * stages, serving_of(inputs))
    assert [gpu["layers"] for gpu in data["gpus"]] == [f"{2 * stage}-{2 * stage + 1}" for stage in range(stages)]
    # Every token but the first comes one round after the last.
    assert data["inter_token_latency_ms"]["p50"] == most * T_NS / 1e6


def test_activations_and_tokens_take_their_way_between_the_stages() -> None:
    # One sequence of two tokens on two stages. A hidden state is 8 numbers of 2 bytes, 16 ns after 5 of latency; a
    # token's id 8 bytes. Step 0: stage 0 at 0-20, activations 20-41, stage 1 at 41-61, the id goes back at 61-74.
    # Step 1: 74-94, activations 94-115, stage 1 at 115-135. Nobody needs the last id.
    inputs = tiny_pipeline(tiny_model(4), tiny_profile(gpus=2, peer_latency_ns=5), sequences(1, 2, 4), staged(2, 1, 1))
    first, second = run_resident(inputs)
    assert spans_of(first, "activation") == [(20, 41), (94, 115)]
    assert spans_of(second, "activation") == [(61, 74)]
    assert spans_of(first, "dense", "expert")[-1] == (87, 94)
    assert spans_of(second, "dense", "expert")[0] == (41, 44)
    assert spans_of(second, "dense", "expert")[-1] == (128, 135)
    # The first stage waits from 20 to 74 for the id, and is done at 94; the second waits till 41 and from 61 to 115.
    parts = {"compute_ms": 40e-6, "stall_ms": 0, "host_ms": 0, "predictor_ms": 0}
    assert time_split(first, 135) == {**parts, "bubble_ms": 54e-6, "drain_ms": 41e-6}
    assert time_split(second, 135) == {**parts, "bubble_ms": 95e-6, "drain_ms": 0}


def test_a_step_takes_as_long_as_its_sequences_wait_since_their_last_token() -> None:
    # Three micro-batches on two stages: a step ends every 20 ns from 40 on. The first of a sequence takes from its
    # start at stage 0 to its end, the next from the end of the one before, three steps ago.
    inputs = tiny_pipeline(tiny_model(4), tiny_profile(gpus=2), sequences(3, 2, 4), staged(2, 3, 3))
    recordings = run_resident(inputs)
    found = served(recordings, serving_of(inputs))
    assert found.end_ns.tolist() == [40, 60, 80, 100, 120, 140]
    assert found.took_ns.tolist() == [40, 40, 40, 60, 60, 60]
    # Where no step is told to continue another, each continues the one before.
    assert served(recordings, Serving()).took_ns.tolist() == [40, 20, 20, 20, 20, 20]


@pytest.mark.parametrize("engine", ENGINES)
def test_each_stage_sends_to_the_next_and_the_last_to_the_first(engine: str) -> None:
    # As above, with three stages of one layer: 10 ns, and 20 more where its expert is copied first. Step 0: stage 0 at
    # 0-30, stage 1 at 51-81, stage 2 at 102-132; its id is at stage 0 at 145. Step 1: 145-155, 176-186, and 207.
    trace = sequences(1, 2, 3)
    inputs = tiny_pipeline(tiny_model(3), tiny_profile(gpus=3, peer_latency_ns=5), trace, staged(3, 1, 1))
    recordings = run_all(inputs, prepared(inputs, part_costs(inputs)), engine=engine)
    each = run_metrics(recordings, [None] * 3, serving_of(inputs))["gpus"]
    assert [of_gpu["layers"] for of_gpu in each] == ["0", "1", "2"]
    assert [spans_of(recording, "activation") for recording in recordings] == [
        [(30, 51), (155, 176)], [(81, 102), (186, 207)], [(132, 145)],
    ]  # fmt: skip
    titles = [[lane.title for lane in recording.decoded.timeline.lanes] for recording in recordings]
    assert [[title for title in of_gpu if "to gpu" in title] for of_gpu in titles] == [
        ["copy engine to gpu1"], ["copy engine to gpu2"], ["copy engine to gpu0"],
    ]  # fmt: skip


def test_an_offloaded_stage_fetches_while_the_other_computes() -> None:
    # Two stages of one layer, room for one expert each, two micro-batches of one token; copies take 20 ns.
    # Stage 0: dense 0-3, copy 3-23, expert 23-30. Micro-batch 1 wants another expert: dense 30-33, its copy may
    # overwrite the first one's room: 33-53, expert 53-60. Stage 1: dense 30-33, copy 33-53, expert 53-60 meanwhile;
    # micro-batch 1: dense 60-63, copy 63-83, expert 83-90.
    trace = tiny_trace([[[0], [1]], [[2], [3]]], sequence=[0, 1])
    scenario = staged(2, 2, 2, memory={"gpu_budget": "1experts"})
    inputs = tiny_pipeline(tiny_model(2), tiny_profile(gpus=2), trace, scenario)
    first, second = run_alike(inputs)
    assert spans_of(first, "demand") == [(3, 23), (33, 53)]
    assert spans_of(first, "expert") == [(23, 30), (53, 60)]
    assert spans_of(second, "demand") == [(33, 53), (63, 83)]
    assert spans_of(second, "expert") == [(53, 60), (83, 90)]
    data = run_metrics([first, second], [None, None], serving_of(inputs))
    assert data["bytes"]["demand"] == 4 * 20
    assert [gpu["bytes"]["demand"] for gpu in data["gpus"]] == [40, 40]


def test_stages_that_load_at_once_share_the_hosts_link() -> None:
    # As above, but the host gives one byte a ns to both GPUs together. The copies that both want at 33 take twice as
    # long, to 73, experts 73-80; the last one has the link for itself: dense 80-83, copy 83-103, expert 103-110.
    trace = tiny_trace([[[0], [1]], [[2], [3]]], sequence=[0, 1])
    machine = {**tiny_profile(gpus=2).model_dump(), "topology": tiny_topology(2, host_bytes_per_second=10**9)}
    profile = make_profile(machine, "one link")
    for contention, second_copy, makespan in ((True, (33, 73), 110), (False, (33, 53), 90)):
        scenario = staged(2, 2, 2, memory={"gpu_budget": "1experts"}, copy={"contention": contention})
        inputs = tiny_pipeline(tiny_model(2), profile, trace, scenario)
        recordings = run_alike(inputs)
        assert spans_of(recordings[0], "demand") == [(3, 23), second_copy]
        assert spans_of(recordings[1], "demand")[0] == second_copy
        assert makespan_ns(recordings) == makespan


def test_prefill_chunks_follow_each_other_without_waiting_for_the_head() -> None:
    # A prompt of two chunks, then a token. The chunks pass the stages one behind the other; the token waits for the
    # second chunk to leave the head.
    trace = tiny_trace([[[0]] * 4] * 5, phase=[0, 0, 0, 0, 1])
    scenario = tiny_scenario(
        workload={"prefill": "chunked", "chunk_tokens": 2}, parallel={"stages": 2, "split": [2, 2]}
    )
    inputs = tiny_pipeline(tiny_model(4), tiny_profile(gpus=2), trace, scenario)
    recordings = run_resident(inputs)
    assert spans_of(recordings[0], "dense")[::2] == [(0, 3), (20, 23), (60, 63)]
    assert makespan_ns(recordings) == 100
    data = run_metrics(recordings, [None, None], serving_of(inputs))
    assert data["time_to_first_token_ms"]["mean"] == 60e-6
    assert data["tokens_per_second"] == 1e9 / 40


def test_one_thread_serves_a_step_at_every_stage_before_the_next() -> None:
    # With the choice read back, the thread waits at each layer. It is done with micro-batch 0 when it knows its last
    # choice, at 33, and only then begins micro-batch 1, beside one expert of micro-batch 0: 33-53 and 53-73.
    inputs = tiny_pipeline(
        tiny_model(4), tiny_profile(gpus=2), sequences(2, 1, 4), staged(2, 2, 2, parallel={"dispatch_threads": "one"})
    )
    recordings = run_resident(inputs)
    assert spans_of(recordings[0], "dense") == [(0, 3), (10, 13), (33, 36), (43, 46)]
    assert makespan_ns(recordings) == 73
    # A host that knows the choices runs ahead, and the stages overlap as with a thread each.
    ahead = {"parallel": {"dispatch_threads": "one"}, "dispatch": {"router_readback": False}}
    inputs = tiny_pipeline(tiny_model(4), tiny_profile(gpus=2), sequences(2, 1, 4), staged(2, 2, 2, **ahead))
    assert makespan_ns(run_resident(inputs)) == 3 * T_NS


def test_hosts_that_run_ahead_by_thousands_of_steps_do_not_call_each_other_ever_deeper() -> None:
    steps = 2000
    scenario = staged(2, 2, 2, dispatch={"router_readback": False, "launch_queue_depth": 10**6})
    inputs = tiny_pipeline(tiny_model(2), tiny_profile(gpus=2), sequences(2, steps, 2), scenario)
    assert makespan_ns(run_resident(inputs)) == (2 * steps + 1) * T_NS / 2


@pytest.mark.slow
@given(case=cases(tiers={"host_budget": "all"}))
def test_a_pipeline_of_one_stage_is_a_run_on_one_gpu_to_the_byte_of_its_timeline(case: Case) -> None:
    inputs = case.inputs()
    as_stage = replace(inputs, stages=(inputs,))
    (stage,) = run_all(as_stage, prepared(as_stage, part_costs(as_stage)))
    alone = play(inputs)
    assert stage.decoded.timeline.lanes == alone.decoded.timeline.lanes
    assert stage.spans.tobytes() == alone.spans.tobytes()


@st.composite
def pipelines(draw: st.DrawFn) -> Inputs:
    """Draw a run whose layers are divided among GPUs, the links to which may be too narrow for all at once."""
    case = draw(cases(tiers={"host_budget": "all"}))
    stages = draw(st.integers(1, case.model.layers))
    parallel = {
        "stages": stages,
        "micro_batches": draw(st.integers(1, case.scenario.workload.batch)),
        "split": draw(st.sampled_from(["equal", "compute", "memory"])),
        "dispatch_threads": draw(st.sampled_from(DISPATCH_THREADS)),
    }
    host_bytes_per_second = draw(st.sampled_from([10**9, 3 * 10**9, 10**15]))
    peer = draw(st.sampled_from([None, *(peers(latency_ns) for latency_ns in (None, 0, 7))]))
    machine = {"topology": tiny_topology(stages, host_bytes_per_second), "peer": peer}
    profile = make_profile({**case.profile.model_dump(), **machine}, "a machine of several GPUs")
    scenario = make_scenario({**case.scenario.plain(), "parallel": parallel})
    inputs: Inputs = tiny_pipeline(case.model, profile, case.trace, scenario)
    return inputs


@pytest.mark.slow
@given(inputs=pipelines())
def test_every_stage_decides_what_a_run_of_its_layers_alone_decides(inputs: Inputs) -> None:
    recordings = run_alike(inputs)
    for part, recording in zip(inputs.parts, recordings, strict=True):
        visits, manager = decide(part)
        assert len(recording.decoded.visits) == len(visits) == part.layer_visits
        if inputs.scenario.copy_.drop_stale:
            continue
        assert bytes(recording.manager.copy_reason) == bytes(manager.copy_reason)
        assert recording.manager.copy_expert.tolist() == manager.copy_expert.tolist()
        assert recording.manager.evicted_copies.tolist() == manager.evicted_copies.tolist()
        assert recording.manager.dropped == manager.dropped


@pytest.mark.slow
@given(inputs=pipelines())
def test_both_engines_end_at_the_same_nanoseconds(inputs: Inputs) -> None:
    assert played(inputs, "compiled") == played(inputs, "simpy")


@pytest.mark.slow
@given(inputs=pipelines())
def test_nothing_happens_before_its_cause_and_the_parts_of_time_come_to_the_makespan(inputs: Inputs) -> None:
    recordings = run_alike(inputs)
    check_books(recordings)
    if len(recordings) == 1:
        return
    for sender, receiver in pairwise(recordings):
        sent = sender.spans[sender.spans["kind"] == ACTIVATION]
        own, others = len(sender.expert_bytes), len(receiver.expert_bytes)
        for step, copy in enumerate(np.sort(sent, order="start_ns")):
            kernels = sender.compute_spans[np.isin(sender.compute_spans["kind"], (DENSE, EXPERT))]
            assert copy["start_ns"] >= kernels["end_ns"][kernels["visit"] // own == step].max()
            first = receiver.compute_spans[receiver.compute_spans["visit"] == step * others]
            assert first["start_ns"].min() >= copy["end_ns"]
    # A decode step begins once the tokens that it goes on from have left the last stage's head.
    kernels = recordings[0].compute_spans
    first = (kernels["kind"] == DENSE) & (kernels["visit"] % len(recordings[0].expert_bytes) == 0)
    start_ns = kernels["start_ns"][first]
    continued = continued_steps(inputs.steps, inputs.trace.sequence)
    for starts_ns, before in zip(start_ns, continued, strict=True):
        assert (starts_ns >= recordings[-1].step_end_ns[list(before)]).all()


@pytest.mark.slow
@given(inputs=pipelines())
def test_bytes_are_the_same_on_the_gpus_in_the_totals_and_on_the_links(inputs: Inputs) -> None:
    data = simulate_inputs(inputs, baselines=False).data
    total = data["bytes"]["demand"] + data["bytes"]["prefetch"]
    assert total == sum(gpu["bytes"]["demand"] + gpu["bytes"]["prefetch"] for gpu in data["gpus"])
    assert total == sum(row["demand_bytes"] + row["prefetch_bytes"] for row in data["by_layer"])
    assert [row["layer"] for row in data["by_layer"]] == list(range(inputs.model.layers))
    assert data["layer_visits"] == inputs.layer_visits
    if inputs.links is not None:
        loads = {load["link"]: load["bytes"] for load in data["links"]}
        assert loads["host0->cpu0"] == total
        steps = inputs.steps
        sent = sum(16 * len(step.rows) for step in steps) * (len(inputs.stages) - 1)
        back = sum(8 * len(set(inputs.trace.sequence[step.rows].tolist())) for step in needed(inputs))
        between = [size for link, size in loads.items() if link.startswith("gpu") and "cpu" not in link]
        assert sum(between) == sent + back


def needed(inputs: Inputs) -> list[Step]:
    """The steps whose tokens a later one goes on from."""
    continued = continued_steps(inputs.steps, inputs.trace.sequence)
    return [inputs.steps[step] for step in sorted({step for before in continued for step in before})]
