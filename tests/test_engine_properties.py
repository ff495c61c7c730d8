"""What holds of every simulated run: lanes, causes, bytes, books. On random small runs, whatever their settings.

Rooms, waves and reasons are taken from decisions made once more without a clock, never from the run that is checked.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cases import Case, cases, decide, play

from prestage.engine.costs.costs import Costs
from prestage.engine.decide.dispatch import Visit
from prestage.engine.decide.memory_manager import DEMANDED, PREFETCHED, MemoryManager
from prestage.engine.loading.deciders import make_prefetch
from prestage.engine.measure.metrics import metrics, overlap
from prestage.engine.measure.recording import FATES, OUTCOMES, Recording
from prestage.engine.measure.time_split import time_split
from prestage.engine.policies.eviction import Lru
from prestage.engine.run import run
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import Scenario
from prestage.engine.scenario.sections import ON_GPU
from prestage.engine.simulate import simulate_inputs
from prestage.resources.timeline import (
    DEMAND,
    DEMOTION,
    DENSE,
    EXPERT,
    GUESSES,
    HEAD,
    KINDS,
    LAUNCH,
    PREDICT,
    PREFETCH,
    READ,
    READBACK,
)

pytestmark = pytest.mark.slow

every_run = settings(max_examples=120)
few_runs = settings(max_examples=60)


#: Runs whose GPU issues its prefetches itself, among others.
any_issuer = cases() | st.sampled_from(ON_GPU).flatmap(
    lambda lane: cases(
        predictor={"lane": lane}, prefetch={"issued_by": "gpu"}, copy={"discipline": "fifo"},
        tiers={"host_budget": "all", "prefetch": "gpu"},
    )
)  # fmt: skip


def spans_of(recording: Recording, *kinds: int) -> Any:
    """The spans of these kinds, in order of start (ties in order of recording)."""
    spans = recording.spans[np.isin(recording.spans["kind"], kinds)]
    return spans[np.argsort(spans["start_ns"], kind="stable")]


def admissions(visits: list[Visit]) -> Iterator[tuple[int, int, Any]]:
    """(visit, reason, admission) of every admission, in order of dispatch."""
    for visit in visits:
        for wave in visit.waves:
            yield from ((visit.number, DEMANDED, admission) for admission in wave.admitted)
        yield from ((visit.number, PREFETCHED, admission) for admission, _ in visit.prefetches)


# Lanes.


@every_run
@given(case=cases())
def test_a_lane_never_overlaps_itself(case: Case) -> None:
    recording = play(case.inputs())
    for lane in range(len(recording.decoded.timeline.lanes)):
        spans = recording.spans[recording.spans["lane"] == lane]
        spans = spans[np.lexsort((spans["end_ns"], spans["start_ns"]))]
        assert (spans["start_ns"] <= spans["end_ns"]).all()
        assert (spans["start_ns"][1:] >= spans["end_ns"][:-1]).all()


@every_run
@given(case=cases())
def test_each_kind_of_work_runs_on_its_lane(case: Case) -> None:
    recording = play(case.inputs())
    lanes = recording.decoded.timeline.lanes
    roles = {
        DENSE: {"compute"},
        EXPERT: {"compute"},
        HEAD: {"compute"},
        DEMAND: {"h2d"},
        PREFETCH: {"h2d"},
        READBACK: {"d2h"},
        DEMOTION: {"d2h"},
        GUESSES: {"d2h"},
        LAUNCH: {"host"},
        READ: {"nvme"},
        PREDICT: {{"gpu": "predictor"}.get(lane := case.scenario.predictor.lane, lane)},
    }
    for span in recording.spans:
        assert lanes[span["lane"]].role in roles[int(span["kind"])], KINDS[span["kind"]]


@every_run
@given(case=cases(copy={"contention": False}))
def test_undisturbed_work_takes_what_it_costs(case: Case) -> None:
    inputs = case.inputs()
    recording = play(inputs)
    costs = Costs(inputs)
    tokens = [len(step.rows) for step in inputs.steps]
    layers = inputs.model.layers
    for span in spans_of(recording, DENSE):
        step, layer = divmod(int(span["visit"]), layers)
        assert span["end_ns"] - span["start_ns"] == costs.dense(layer, tokens[step], inputs.steps[step].phase).ns
    for step, span in zip(inputs.steps, spans_of(recording, HEAD), strict=True):
        assert span["end_ns"] - span["start_ns"] == costs.head(step.sampled).ns
    if inputs.scenario.copy_.discipline != "two_streams":
        for span in spans_of(recording, DEMAND, PREFETCH):
            cost = costs.copies[int(span["expert"]) // inputs.model.experts]
            pieces = inputs.scenario.copy_.discipline == "priority"
            took = (cost.piece_queued_ns, cost.piece_alone_ns) if pieces else (cost.queued_ns, cost.alone_ns)
            assert span["end_ns"] - span["start_ns"] in took
    if inputs.scenario.dispatch.expert_kernel == "separate":
        tokens_of = {(int(a["visit"]), int(a["copy"])): int(a["tokens"]) for a in recording.decoded.accesses}
        for span in spans_of(recording, EXPERT):
            visit = int(span["visit"])
            phase = inputs.steps[visit // layers].phase
            cost_ns = costs.expert(visit % layers, tokens_of[visit, int(span["copy"])], phase).ns
            assert span["end_ns"] - span["start_ns"] == cost_ns


@every_run
@given(case=cases(copy={"discipline": "two_streams", "contention": False}))
def test_two_streams_share_one_link_and_make_it_no_faster(case: Case) -> None:
    inputs = case.inputs()
    recording = play(inputs)
    costs = Costs(inputs)
    copies = spans_of(recording, DEMAND, PREFETCH)
    least = [costs.copies[int(span["expert"]) // inputs.model.experts].queued_ns for span in copies]
    assert (copies["end_ns"] - copies["start_ns"] >= least).all()
    # While any copy runs the link does one copy's work in its time: the busy time covers all of it. Each copy's end is
    # rounded to a whole ns whenever it is retimed, which happens at most as often as there are starts and ends.
    busy_ns, until_ns = 0, 0
    for span in copies:
        start_ns = max(until_ns, int(span["start_ns"]))
        until_ns = max(until_ns, int(span["end_ns"]))
        busy_ns += max(0, until_ns - start_ns)
    assert busy_ns >= sum(least) - len(copies)


# Causes.


@every_run
@given(case=any_issuer)
def test_nothing_starts_before_the_host_has_asked_for_it(case: Case) -> None:
    recording = play(case.inputs())
    spans = recording.spans
    assert (spans["start_ns"] >= spans["issued_ns"]).all()
    assert (spans["issued_ns"] >= 0).all()
    # On the compute stream, in the order of asking: layer by layer, first the dense part, last (per step) the head.
    compute = spans_of(recording, DENSE, EXPERT, HEAD)
    assert (np.diff(compute["issued_ns"]) >= 0).all()
    assert (np.diff(compute["visit"]) >= 0).all()
    for before, after in pairwise(compute):
        if before["visit"] == after["visit"]:
            assert (int(before["kind"]), int(after["kind"])) in {
                (DENSE, EXPERT), (DENSE, HEAD), (EXPERT, EXPERT), (EXPERT, HEAD)
            }  # fmt: skip
        else:
            assert after["kind"] == DENSE


@every_run
@given(case=cases())
def test_with_the_readback_on_nothing_of_a_visit_is_asked_for_before_its_choice_is_known(case: Case) -> None:
    inputs = case.inputs()
    recording = play(inputs)
    known_ns = recording.decoded.visits["choice_known_ns"]
    assert (np.diff(known_ns) >= 0).all()
    chosen = spans_of(recording, EXPERT, DEMAND, PREFETCH, HEAD)
    dense, readback = spans_of(recording, DENSE), spans_of(recording, READBACK)
    assert dense["visit"].tolist() == list(range(inputs.layer_visits))
    if inputs.scenario.dispatch.router_readback:
        assert readback["visit"].tolist() == list(range(inputs.layer_visits))
        assert (readback["start_ns"] >= dense["end_ns"]).all()
        assert (known_ns >= readback["end_ns"]).all()
        # Asked for by an eager group's last launch at the latest, which may fall before its first kernel's start.
        assert (chosen["issued_ns"] >= known_ns[chosen["visit"]]).all()
        assert (dense["issued_ns"][1:] >= known_ns[:-1]).all()
    else:
        assert len(readback) == 0


@every_run
@given(case=any_issuer)
def test_prefetches_wait_for_the_prediction_that_asks_for_them(case: Case) -> None:
    inputs = case.inputs()
    recording = play(inputs)
    predictions = spans_of(recording, PREDICT)
    predictor = inputs.scenario.predictor
    predicts = make_prefetch(inputs.scenario, inputs.model).horizons > 0 and predictor.latency_us > 0
    if predicts and predictor.lane != "free":
        assert predictions["visit"].tolist() == list(range(inputs.layer_visits))
        end_ns = predictions["end_ns"]
        prefetches = spans_of(recording, PREFETCH)
        assert (prefetches["start_ns"] >= end_ns[prefetches["visit"]]).all()
    else:
        assert len(predictions) == 0
    guesses = spans_of(recording, GUESSES)
    if len(predictions) and predictor.lane in ON_GPU and inputs.scenario.prefetch.issued_by == "host":
        # The host has what was predicted on the GPU before it asks for a copy, and before it goes on.
        assert guesses["visit"].tolist() == list(range(inputs.layer_visits))
        assert (guesses["start_ns"] >= end_ns).all()
        assert (prefetches["issued_ns"] >= guesses["end_ns"][prefetches["visit"]]).all()
        assert (spans_of(recording, DENSE)["issued_ns"][1:] >= guesses["end_ns"][:-1]).all()
    else:
        assert len(guesses) == 0


@every_run
@given(case=cases())
def test_a_kernel_starts_once_the_bytes_of_all_that_it_reads_are_there(case: Case) -> None:
    inputs = case.inputs()
    recording = play(inputs)
    visits, _ = decide(inputs)
    kernels = iter(spans_of(recording, EXPERT))
    read = Counter[tuple[int, int]]()
    for visit in visits:
        for wave in visit.waves:
            copies = [*wave.found.values(), *(admission.copy for admission in wave.admitted)]
            grouped = inputs.scenario.dispatch.expert_kernel == "grouped"
            for _ in range(bool(copies) if grouped else len(copies)):
                kernel = next(kernels)
                assert kernel["visit"] == visit.number
                reads = copies if grouped else [int(kernel["copy"])]
                assert set(reads) <= set(copies)
                for copy in reads:  # every accessed expert's copy was made, and had ended
                    assert 0 < recording.copy_end_ns[copy] <= kernel["start_ns"]
                    read[visit.number, copy] += 1
    assert next(kernels, None) is None
    # Every access was one expert in one kernel.
    accesses = recording.decoded.accesses
    assert read == Counter((int(access["visit"]), int(access["copy"])) for access in accesses)
    assert set(read.values()) <= {1}
    asked = [expert for visit in visits for expert in visit.accesses.experts]
    held = recording.manager.copy_expert
    assert sorted(held[copy] for _, copy in read) == sorted(asked)


@every_run
@given(case=cases())
def test_a_copy_starts_after_the_last_that_used_the_room_it_takes(case: Case) -> None:
    inputs = case.inputs()
    recording = play(inputs)
    visits, manager = decide(inputs)
    grouped = inputs.scenario.dispatch.expert_kernel == "grouped"
    kernels = spans_of(recording, EXPERT)
    last_read_ns: dict[int, int] = {}
    at = 0
    for visit in visits:
        for wave in visit.waves:
            copies = [*wave.found.values(), *(admission.copy for admission in wave.admitted)]
            for _ in range(bool(copies) if grouped else len(copies)):
                kernel = kernels[at]
                at += 1
                for copy in copies if grouped else [int(kernel["copy"])]:
                    last_read_ns[copy] = int(kernel["end_ns"])
    former = {admission.copy: admission.former for _, _, admission in admissions(visits)}
    start_ns = dict(zip(*first_starts(recording), strict=True))

    def free_ns(copy: int) -> int:
        """When the room of a copy may be written again."""
        if copy not in start_ns:  # cancelled before it started: whoever was there before it counts
            return max((free_ns(before) for before in former[copy]), default=0)
        return max(int(recording.copy_end_ns[copy]), last_read_ns.get(copy, 0))

    assert set(start_ns) <= set(former)
    for copy, started_ns in start_ns.items():
        assert started_ns >= max((free_ns(before) for before in former[copy]), default=0)
    assert len(former) == len(manager.copy_expert)


def first_starts(recording: Recording) -> tuple[list[int], list[int]]:
    """The copies that were made, and when each one's first piece started."""
    copies, first = np.unique(recording.copy_spans["copy"], return_index=True)
    return copies.tolist(), recording.copy_spans["start_ns"][first].tolist()


@every_run
@given(case=cases(copy={"discipline": "fifo"}))
def test_a_fifo_link_copies_in_the_order_of_dispatch(case: Case) -> None:
    inputs = case.inputs()
    recording = play(inputs)
    visits, _ = decide(inputs)
    before = inputs.scenario.prefetch.issue == "before_launch"
    spans = recording.copy_spans
    assert spans["copy"].tolist() == list(range(len(recording.manager.copy_expert))), before
    reasons = {DEMANDED: DEMAND, PREFETCHED: PREFETCH}
    assert [(int(span["visit"]), int(span["kind"]), int(span["expert"])) for span in spans] == [
        (visit, reasons[reason], admission.expert) for visit, reason, admission in admissions(visits)
    ]


@every_run
@given(case=cases(copy={"discipline": "priority", "drop_stale": True}))
def test_dropping_stale_prefetches_loses_nothing_that_is_used(case: Case) -> None:
    # It looks at the clock, so its counts are its own; but the run ends, and whatever is read was copied before.
    inputs = case.inputs()
    recording = play(inputs)
    assert len(recording.decoded.visits) == inputs.layer_visits
    assert len(recording.step_end_ns) == len(inputs.steps)
    assert (recording.copy_end_ns[recording.decoded.accesses["copy"]] > 0).all()
    if inputs.scenario.dispatch.expert_kernel == "separate":
        kernels = spans_of(recording, EXPERT)
        assert (kernels["start_ns"] >= recording.copy_end_ns[kernels["copy"]]).all()
    assert ((recording.copy_fates >= 0) == (recording.copy_reason == PREFETCHED)).all()
    assert (recording.decoded.visits["assigned_bytes"] <= recording.manager.budget_bytes).all()


# Bytes and books.


@every_run
@given(case=cases())
def test_memory_never_exceeds_its_budget_and_what_came_is_there_or_has_left(case: Case) -> None:
    inputs = case.inputs()
    recording = play(inputs)
    manager, sizes = recording.manager, inputs.model.expert_bytes
    assigned = recording.decoded.visits["assigned_bytes"]
    assert (assigned <= manager.budget_bytes).all() and manager.budget_bytes <= inputs.budget_bytes
    assert assigned[-1] == manager.assigned_bytes
    came = [sizes[expert // inputs.model.experts] for expert in manager.copy_expert]
    left = [sizes[manager.copy_expert[copy] // inputs.model.experts] for copy in manager.evicted_copies]
    assert sum(came) - sum(left) == manager.assigned_bytes
    assert len(came) - len(left) == len(manager.assigned)
    utilization = metrics(recording)["memory_utilization"]
    assert utilization is None or 0 <= utilization <= 1


@every_run
@given(case=cases())
def test_bytes_are_conserved_each_copy_is_made_once_or_given_up_unused(case: Case) -> None:
    inputs = case.inputs()
    data = simulate_inputs(inputs, baselines=False)
    recording = data.recording
    costs = Costs(inputs)
    by_priority = inputs.scenario.copy_.discipline == "priority"
    made = Counter(recording.copy_spans["copy"].tolist())
    layer_of = [expert // inputs.model.experts for expert in recording.manager.copy_expert]
    copied = {DEMANDED: 0, PREFETCHED: 0}
    for copy, layer in enumerate(layer_of):
        whole = costs.copies[layer].pieces if by_priority else 1
        read = recording.first_access[copy] >= 0
        assert made[copy] == whole or (by_priority and not read and made[copy] < whole)
        size = inputs.model.expert_bytes[layer]
        copied[recording.manager.copy_reason[copy]] += min(size, made[copy] * -(-size // whole))
    cancelled = [copy for copy in range(len(layer_of)) if not made[copy]]
    assert len(cancelled) == data.data["prefetch"]["cancelled"]
    assert data.data["bytes"]["demand"] == copied[DEMANDED]
    assert data.data["bytes"]["prefetch"] == copied[PREFETCHED]
    assert 0 <= data.data["bytes"]["prefetch_not_used"] <= copied[PREFETCHED]


@every_run
@given(case=cases())
def test_outcomes_add_up_to_accesses_and_fates_to_prefetches(case: Case) -> None:
    inputs = case.inputs()
    data = simulate_inputs(inputs, baselines=False).data
    visits, _ = decide(inputs)
    counts = data["counts"]
    assert sum(counts[outcome] for outcome in OUTCOMES) == data["accesses"]
    assert data["accesses"] == sum(len(visit.accesses.experts) for visit in visits)
    assert sum(data["prefetch"][fate] for fate in FATES) == counts["prefetch"]
    assert counts["prefetch"] == sum(len(visit.prefetches) for visit in visits)
    # A prefetch that was used is one access: a prefetch hit, or late. Others may be late too (a copy under way).
    assert data["prefetch"]["useful"] == counts["prefetch_hit"]
    assert data["prefetch"]["late"] <= counts["late"]
    if data["accesses"]:
        assert data["hit_rate"] == (counts["prefetch_hit"] + counts["cache_hit"]) / data["accesses"]
        assert 0 <= data["hit_rate"] + data["late_rate"] <= 1
        assert (data["late_wait_ms"] is None) == (counts["late"] == 0)
    if inputs.scenario.copy_.discipline == "fifo":
        assert data["prefetch"]["cancelled"] == 0


# Time.


@every_run
@given(case=any_issuer)
def test_the_parts_of_time_add_up_to_the_makespan_to_the_nanosecond(case: Case) -> None:
    recording = play(case.inputs())
    parts_ns = {name: round(part * 1e6) for name, part in time_split(recording).items()}
    assert sum(parts_ns.values()) == recording.makespan_ns
    assert min(parts_ns.values()) >= 0
    compute = spans_of(recording, DENSE, EXPERT, HEAD)
    assert parts_ns["compute_ms"] == (compute["end_ns"] - compute["start_ns"]).sum()
    if not len(recording.copy_spans):
        assert parts_ns["stall_ms"] == 0


@every_run
@given(case=cases())
def test_no_lane_that_the_run_waits_for_is_busy_longer_than_it_takes(case: Case) -> None:
    # Kernels wait for every demand copy, the host for every read-back, and the last launch is the head's. Prefetches
    # and the last predictions nobody waits for.
    recording = play(case.inputs())
    for kinds in ((DENSE, EXPERT, HEAD), (READBACK,), (LAUNCH,)):
        spans = spans_of(recording, *kinds)
        assert (spans["end_ns"] - spans["start_ns"]).sum() <= recording.makespan_ns
        assert spans["end_ns"].max(initial=0) <= recording.makespan_ns
    demand = spans_of(recording, DEMAND)
    assert demand["end_ns"].max(initial=0) <= recording.makespan_ns
    assert (demand["end_ns"] - demand["start_ns"]).sum() <= recording.makespan_ns
    share = overlap(recording)
    assert share is None or 0 <= share <= 1


@every_run
@given(case=cases())
def test_steps_end_one_after_the_other_and_tokens_come_no_sooner(case: Case) -> None:
    inputs = case.inputs()
    data = simulate_inputs(inputs, baselines=False)
    end_ns = data.recording.step_end_ns
    assert len(end_ns) == len(inputs.steps)
    assert (np.diff(end_ns) >= 0).all()
    decode = [step for step in inputs.steps if step.phase == 1]
    assert data.data["decode_tokens"] == sum(len(step.rows) for step in decode)
    assert data.data["decode_tokens"] + data.data["prefill_tokens"] == sum(len(step.rows) for step in inputs.steps)
    if decode:
        _, *percentiles = data.data["decode_step_ms"].values()
        assert percentiles == sorted(percentiles)
        assert percentiles[-1] <= data.data["makespan_ms"]
    first_ms = data.data["time_to_first_token_ms"]["p99"]
    assert first_ms is None or first_ms <= data.data["makespan_ms"]


@few_runs
@given(case=cases())
def test_with_everything_resident_nothing_is_copied_and_nothing_stalls(case: Case) -> None:
    inputs = case.inputs()
    recording = resident(inputs)
    data = metrics(recording)
    assert data["counts"] == {
        **dict.fromkeys(data["counts"], 0),
        "cache_hit": data["accesses"],
    }
    assert len(recording.copy_spans) == 0
    assert (data["stall_ms"], data["overlap"]) == (0, None)
    assert data["bytes"] == {"demand": 0, "prefetch": 0, "prefetch_not_used": 0}


def resident(inputs: Inputs) -> Recording:
    """The run with every expert there from the start, and no prefetch."""
    scenario = with_sections(inputs.scenario, prefetch={"lookahead": 0})
    inputs = replace(inputs, scenario=scenario, guesses=None)
    model = inputs.model
    manager = MemoryManager(model.expert_bytes, model.experts, model.total_expert_bytes, Lru)
    manager.preload(range(model.total_experts))
    costs = Costs(inputs)
    return run(inputs, costs, manager, make_prefetch(scenario, model))


def with_sections(scenario: Scenario, **sections: dict[str, Any]) -> Scenario:
    """The scenario with some keys changed."""
    data = scenario.plain()
    for name, keys in sections.items():
        data[name] = {**data[name], **keys}
    return Scenario.model_validate(data)


@few_runs
@given(case=cases(dispatch={"expert_kernel": "separate"}))
def test_no_run_is_faster_than_with_everything_resident(case: Case) -> None:
    # Every expert's kernels take the same here, so that the order in which they run makes no difference, and a run
    # with copies does all that the resident one does, no sooner, and waits besides. (A tiny profile measures up to 8
    # tokens; beyond, the rule's rate is so high that more tokens cost nothing.)
    inputs = case.inputs()
    if max(len(step.rows) for step in inputs.steps) <= 8:
        assert play(inputs).makespan_ns >= resident(inputs).makespan_ns


# The same again.


@every_run
@given(case=cases())
def test_the_same_seed_gives_the_same_timeline(case: Case) -> None:
    first, second = play(case.inputs()), play(case.inputs())
    assert first.spans.tobytes() == second.spans.tobytes()
    assert first.decoded.timeline.lanes == second.decoded.timeline.lanes
    assert first.decoded.accesses.tobytes() == second.decoded.accesses.tobytes()
    assert first.decoded.visits.tobytes() == second.decoded.visits.tobytes()
    assert metrics(first) == metrics(second)


@every_run
@given(case=cases(predictor={"name": "oracle", "recall": 0.5}))
def test_a_policy_changes_the_run_but_not_the_predictors_luck(case: Case) -> None:
    inputs = case.inputs()
    elsewhere = with_sections(
        inputs.scenario,
        memory={"gpu_budget": f"{inputs.model.total_expert_bytes * inputs.model.layers}B"},
        copy={"discipline": "two_streams"},
        prefetch={"protect": "none", "issue": "before_launch"},
    )
    other = replace(case, scenario=elsewhere).inputs()
    if inputs.guesses is None:
        assert other.guesses is None
    else:
        assert other.guesses is not None and inputs.guesses.digest == other.guesses.digest


@few_runs
@given(case=cases())
def test_two_simulations_in_one_process_do_not_meet(case: Case) -> None:
    # One starts while the other is under way: its visits are drawn one by one.
    inputs = case.inputs()
    alone = play(inputs)
    costs = Costs(inputs)
    policy = make_prefetch(inputs.scenario, inputs.model)

    def disturbed(visits: Iterator[Visit]) -> Iterator[Visit]:
        for number, visit in enumerate(visits):
            if number == 1:
                assert play(inputs).spans.tobytes() == alone.spans.tobytes()
            yield visit

    from prestage.engine.loading.deciders import make_manager

    beside = run(inputs, costs, make_manager(inputs), policy, disturbed)
    assert beside.spans.tobytes() == alone.spans.tobytes()
