"""Exclusive tiers: host memory keeps what the GPU lacks. Worked by hand, against a naive count, and what no run may do.

On the tiny machine a byte takes a ns to read and a ns to copy; a read costs a latency on top, and a copy back what
the read-back of a choice takes on top.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cases import Case, cases, play, played
from test_decisions import COMPILED_HOST, compare
from tiny import tiny_inputs, tiny_model, tiny_profile, tiny_run, tiny_scenario, tiny_trace

from prestage.engine.decide.dispatch import Visit
from prestage.engine.loading.deciders import dispatched, make_host_memory, make_manager, make_prefetch
from prestage.engine.measure.metrics import tiers
from prestage.engine.measure.recording import Recording
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.simulate import simulate_inputs
from prestage.resources.timeline import DEMAND, DEMOTION, EXPERT

D, P, X, B = 3, 20, 7, 11  # dense part, copy, expert, read-back
BACK = B + P
LATENCY = 30
R = LATENCY + P  # read

#: Six experts in turn, twice: more than the GPU's three, and more than host memory's five.
CYCLE = [[[expert]] for expert in (0, 1, 2, 3, 4, 5) * 2]


def tiered(inclusion: str, tokens: list[list[list[int]]], host: int = 5, gpu: int = 3, **sections: Any) -> Inputs:
    scenario = tiny_scenario(
        memory={"gpu_budget": f"{gpu}experts"}, tiers={"host_budget": f"{host}experts", "inclusion": inclusion},
        **sections,
    )  # fmt: skip
    model = tiny_model(1, 6, dense_ns=D, copy_ns=P)
    profile = tiny_profile(expert_ns=X, io_lanes=1, read_latency_ns=LATENCY, readback_ns=B)
    inputs: Inputs = tiny_inputs(model, profile, tiny_trace(tokens, 6), scenario)
    return inputs


def spans(recording: Recording, kind: int) -> list[tuple[int, int, int]]:
    """(expert, start, end) of the spans of a kind, in order of recording."""
    return [(int(s["expert"]), int(s["start_ns"]), int(s["end_ns"])) for s in recording.spans if s["kind"] == kind]


@pytest.mark.parametrize("engine", ["simpy", "compiled"])
def test_both_tiers_together_hold_a_cycle_that_neither_holds(engine: str) -> None:
    """Of host memory's five rooms two are kept free for what passes through: three and three hold the six.

    A token is its dense part, the read-back, a read, a copy and the expert: 91 ns, in which what leaves the GPU comes
    back beside the read. From the second round on there is no read, and the copy waits for what it takes the room of.
    """
    first, again = D + B + R + P + X, D + B + BACK + P + X
    data = simulate_inputs(tiered("exclusive", CYCLE), baselines=False, engine=engine)
    (recording,) = data.recordings
    assert data.data["makespan_ms"] * 1e6 == pytest.approx(6 * first + 6 * again)
    found = tiers([recording])
    assert found is not None
    assert (found["host_hits"], found["host_misses"], found["demoted"]) == (6, 6, 9)
    assert found["demoted_bytes"] == 9 * P
    # Tokens 3 to 11 evict 0, 1, ... in turn, as soon as their choice is known.
    known = [91 * token + D + B for token in range(3, 6)] + [6 * first + again * token + D + B for token in range(6)]
    turns = [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert spans(recording, DEMOTION) == [(expert, at, at + BACK) for expert, at in zip(turns, known, strict=True)]
    assert spans(recording, DEMAND)[6] == (0, known[3] + BACK, known[3] + BACK + P)


def test_inclusive_host_memory_of_as_much_reads_the_same_cycle_again() -> None:
    recording = tiny_run_of(tiered("inclusive", CYCLE))
    assert recording.makespan_ns == 12 * (D + B + R + P + X)
    assert not spans(recording, DEMOTION)


def test_with_room_for_all_in_host_memory_exclusive_tiers_are_slower_by_what_comes_back() -> None:
    # All six are in host memory from the second round on, or on the GPU; what passes through has two rooms besides.
    inclusive, exclusive = (tiny_run_of(tiered(rule, CYCLE, host=6)) for rule in ("inclusive", "exclusive"))
    assert exclusive.makespan_ns - inclusive.makespan_ns == 6 * BACK


def test_what_comes_back_waits_for_the_last_kernel_that_reads_it_and_for_its_room() -> None:
    # One room on the GPU; host memory has two, one of which is kept free. Token 1 evicts 0, which takes the other one;
    # token 2 evicts 1, for which 0 goes, so that token 3 reads it again.
    recording = tiny_run_of(tiered("exclusive", [[[0]], [[1]], [[2]], [[0]]], host=2, gpu=1))
    found = tiers([recording])
    assert found is not None and (found["host_hits"], found["host_misses"], found["demoted"]) == (0, 4, 3)
    assert recording.makespan_ns == 4 * (D + B + R + P + X)


def test_one_room_of_host_memory_takes_nothing_back() -> None:
    found = tiers([tiny_run_of(tiered("exclusive", CYCLE, host=1))])
    assert found is not None and (found["host_hits"], found["host_misses"], found["demoted"]) == (0, 12, 0)


def test_the_uncached_baseline_keeps_host_memory_inclusive() -> None:
    # Nothing leaves the GPU for another there: were what is copied to leave host memory, all would be read anew.
    scenarios = [tiered(rule, CYCLE, host=6) for rule in ("inclusive", "exclusive")]
    inclusive, exclusive = (simulate_inputs(inputs).data["baseline_ms"] for inputs in scenarios)
    assert inclusive == exclusive


def tiny_run_of(inputs: Inputs) -> Recording:
    recording: Recording = tiny_run(inputs.model, inputs.profile, inputs.trace, inputs.scenario)
    return recording


# Decisions.


def decided(inputs: Inputs) -> Iterator[tuple[Visit, set[int], set[int]]]:
    """Each visit, and who is on the GPU and in host memory behind it."""
    manager, host = make_manager(inputs), make_host_memory(inputs)
    assert host is not None
    for visit in dispatched(inputs, manager, make_prefetch(inputs.scenario, inputs.model), None, host):
        yield visit, set(manager.assigned), set(host.manager.assigned)


_EXCLUSIVE = {"inclusion": "exclusive", "prefetch": "gpu"}


@settings(max_examples=100)
@given(case=cases(tiers={"host_budget": "3experts", **_EXCLUSIVE}))
def test_no_expert_is_in_both_tiers(case: Case) -> None:
    for _, on_gpu, in_host in decided(case.inputs()):
        assert not on_gpu & in_host


@settings(max_examples=100)
@given(data=st.data())
def test_a_victim_cache_by_lru_finds_what_a_naive_one_finds(data: st.DataObject) -> None:
    room = data.draw(st.integers(1, 6))
    fixed = {"host_budget": f"{room}experts", "host_policy": "lru", **_EXCLUSIVE}
    inputs = data.draw(cases(tiers=fixed)).inputs()
    sizes, experts = inputs.model.expert_bytes, inputs.model.experts
    budget, held, hits, misses = room * max(sizes), OrderedDict[int, int](), 0, 0
    kept_free = min(2 * inputs.model.top_k * max(sizes), budget // 2)

    def make_room(size: int, keep: int) -> bool:
        leaving = [one for one in held if one != keep]
        while leaving and sum(held.values()) + size > budget:
            del held[leaving.pop(0)]
        return bool(sum(held.values()) + size <= budget)

    for visit, _, in_host in decided(inputs):
        for admission in visit.admissions():
            hits, misses = hits + (admission.expert in held), misses + (admission.expert not in held)
            if admission.expert not in held:
                make_room(sizes[admission.expert // experts], -1)
            held[admission.expert] = sizes[admission.expert // experts]
            for victim, _ in admission.evicted:
                before = OrderedDict(held)
                if make_room(sizes[victim // experts], admission.expert):
                    held[victim] = sizes[victim // experts]
                else:
                    held = before  # nobody leaves in vain
            del held[admission.expert]
            while held and sum(held.values()) + kept_free > budget:
                held.popitem(last=False)
        assert set(held) == in_host
    host = play(inputs).host_memory
    assert host is not None and (host.hits, host.misses) == (hits, misses)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED_HOST)
@settings(max_examples=30)
@given(data=st.data())
def test_every_compiled_policy_takes_back_as_its_class(name: str, data: st.DataObject) -> None:
    budget = f"{data.draw(st.integers(30, 90))}B"
    tiers = {"host_policy": name, "host_budget": budget, "inclusion": "exclusive"}
    assert compare(data.draw(cases(tiers=tiers)).inputs()) is None


# What no run may do.


@settings(max_examples=100)
@given(case=cases(tiers={"host_budget": "3experts", **_EXCLUSIVE}))
def test_what_comes_back_has_come_is_read_no_more_and_is_away_before_its_room_is_written(case: Case) -> None:
    inputs = case.inputs()
    recording = play(inputs)
    back = iter(spans(recording, DEMOTION))
    kernels = recording.spans[recording.spans["kind"] == EXPERT]
    copies = recording.copy_spans
    for visit, _, _ in decided(inputs):
        assert visit.reads is not None
        former = {admission.copy: admission.former for admission in visit.admissions()}
        for copy, demoted in visit.reads.demoted.items():
            for expert, old, _ in demoted:
                name, start_ns, end_ns = next(back)
                assert name == expert
                arrived = copies["end_ns"][copies["copy"] == old]
                read = kernels["end_ns"][kernels["copy"] == old]
                assert start_ns >= max([0, *arrived.tolist(), *read.tolist()])
                if old in former[copy]:
                    assert (copies["start_ns"][copies["copy"] == copy] >= end_ns).all()
    assert next(back, None) is None


@pytest.mark.slow
@settings(max_examples=100)
@given(case=cases(tiers={"host_budget": "3experts", "inclusion": "exclusive"}))
def test_both_engines_take_back_at_the_same_ns(case: Case) -> None:
    inputs = case.inputs()
    assert played(inputs, "compiled") == played(inputs, "simpy")


# What is refused.


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        (["tiers.host_budget=all"], "inclusion = 'exclusive': host memory has every expert; give a host_budget"),
        (["parallel.stages=2"], "tiers.inclusion = 'exclusive' with parallel.stages = 2: only what one GPU evicts"),
        (
            ["machine.gpu=2x rtx3090", "machine.drive=2TB 7GB/s"],
            "with parallel.stages = 2 (as many as the machine's parts count GPUs: parallel.stages = 1 lets one of them",
        ),
        (["memory.eviction=spent"], "tiers.inclusion = 'exclusive' with memory.eviction = 'spent'"),
        (
            ["copy.discipline=priority", "copy.drop_stale=true"],
            "tiers.inclusion = 'exclusive' with copy.drop_stale = true",
        ),
        (
            ["compression.where=host", "compression.decompress_gb_per_s=9"],
            "tiers.inclusion = 'exclusive' with compression.where = 'host'",
        ),
    ],
)
def test_what_does_not_go_with_exclusive_tiers_is_named(setting: list[str], says: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        load_scenario("nvme", ["tiers.inclusion=exclusive", *setting])
    assert says in str(caught.value)
