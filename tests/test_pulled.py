"""Steps pulled from a scheduler that looks at what has finished: by hand, and the same by either engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from tiny import tiny_inputs, tiny_model, tiny_profile, tiny_scenario, tiny_trace

from prestage.engine.costs.costs import part_costs
from prestage.engine.decide.guessed import later_steps
from prestage.engine.measure.recording import Recording
from prestage.engine.measure.time_split import time_split
from prestage.engine.run import prepared, run_all
from prestage.engine.scenario.inputs import Inputs, Pulls
from prestage.errors import InputError
from prestage.resources.timeline import DEMAND, DENSE, EXPERT, KINDS, PREFETCH, SWAP
from prestage.workloads.batches import DECODE, PulledSteps, Step, every_row
from prestage.workloads.guesses import Guesses
from prestage.workloads.predictors import make_predictor
from prestage.workloads.requests.request import Part, RequestStep, Wait


@dataclass
class FirstCome:
    """Serves requests (arrival in ns, rows to decode) as they come, a row of each in every step.

    `told` has what it was asked and told, in order.
    """

    requests: list[tuple[int, list[int]]]
    told: list[tuple[str, int]] = field(default_factory=list)
    busy_ns: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._waiting = deque(self.requests)
        self._live: list[list[int]] = []

    def next_step(self, now_ns: int) -> Step | Wait | None:
        self.told.append(("next", now_ns))
        while self._waiting and self._waiting[0][0] <= now_ns:
            self._live.append(list(self._waiting.popleft()[1]))
        if not self._live:
            return Wait(self._waiting[0][0]) if self._waiting else None
        return Step(DECODE, np.array([rows.pop(0) for rows in self._live], dtype=np.int64))

    def ended(self, end_ns: int, link_busy_ns: int = 0) -> None:
        self.told.append(("ended", end_ns))
        self.busy_ns.append(link_busy_ns)
        self._live = [rows for rows in self._live if rows]


def served(
    inputs: Inputs, source: Callable[[], Any], engine: str, schedule_ns: int = 0, most_tokens: int = 8
) -> Recording:
    """Returns what a run records whose steps are pulled."""
    pulled = replace(inputs, steps=[], pulls=Pulls(source, most_tokens, schedule_ns))
    (recording,) = run_all(pulled, prepared(pulled, part_costs(pulled)), engine=engine)
    return recording


def test_steps_that_are_pulled_are_taken_to_go_on_with_the_same_sequences() -> None:
    later = later_steps(tiny_trace([[[0]]]), PulledSteps(), 2)
    assert [list(later[step]) for step in (0, 7)] == [[0, 1, 2], [7, 8, 9]]


class Listed:
    """Gives these steps, one after the other."""

    def __init__(self, steps: list[RequestStep]) -> None:
        self._steps = iter(steps)

    def next_step(self, now_ns: int) -> Step | None:
        return next(self._steps, None)

    def ended(self, end_ns: int, link_busy_ns: int = 0) -> None:
        pass


def stall(engine: str, swap_in_bytes: int) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """When the dense parts run of two steps, of which the second has so many bytes of KV blocks come back before."""
    steps = [
        RequestStep(DECODE, np.array([row]), parts=(Part(0, row, 1, 1),), swap_in_bytes=row * swap_in_bytes)
        for row in range(2)
    ]

    recording = served(by_hand(7), lambda: Listed(steps), engine)
    dense = recording.spans[recording.spans["kind"] == DENSE]
    split = {name: round(ms * 1e6) for name, ms in time_split(recording).items()}
    return list(zip(dense["start_ns"].tolist(), dense["end_ns"].tolist(), strict=True)), split


@pytest.mark.parametrize("engine", ["simpy", "compiled"])
def test_a_dense_part_stalls_for_kv_blocks_that_come_back_before_it(engine: str) -> None:
    # Dense 0-3, copy 3-23, expert 23-30, and so again. 50 bytes take 50 ns, which are stall as the experts' 20 are.
    alone, behind = stall(engine, 0), stall(engine, 50)
    assert (alone[0], alone[1]["stall_ms"]) == ([(0, 3), (30, 33)], 40)
    assert (behind[0], behind[1]["stall_ms"], behind[1]["host_ms"]) == ([(0, 3), (80, 83)], 90, 0)


@pytest.mark.parametrize("engine", ["simpy", "compiled"])
def test_kv_blocks_that_come_back_go_before_prefetches_that_are_queued(engine: str) -> None:
    # Dense 0-3, expert 0's copy 3-23, then those of experts 1 and 2, which are guessed for row 1: 23-43 is made, but
    # at 30 the second step's blocks are asked for, and take 50 ns before the other: 43-93 and 93-113.
    plain = by_hand(7, prefetch={"lookahead": 1, "k": 2}, copy={"discipline": "priority"})
    guessed = np.array([[[[1, 2]]], [[[-1, -1]]]], dtype=np.int16)
    inputs = replace(plain, guesses=Guesses(np.arange(2), guessed))
    steps = [
        RequestStep(DECODE, np.array([row]), parts=(Part(0, row, 1, 1),), swap_in_bytes=row * 50) for row in range(2)
    ]
    spans = served(inputs, lambda: Listed(steps), engine).spans
    found = {
        kind: list(zip(spans["start_ns"][which].tolist(), spans["end_ns"][which].tolist(), strict=True))
        for kind in (DEMAND, SWAP, PREFETCH, DENSE)
        for which in [spans["kind"] == kind]
    }
    assert found == {
        DEMAND: [(3, 23)], SWAP: [(43, 93)], PREFETCH: [(23, 43), (93, 113)], DENSE: [(0, 3), (93, 96)],
    }  # fmt: skip


def by_hand(expert_ns: int, **sections: Any) -> Inputs:
    """Returns four tokens of one layer, whose dense part takes 3 ns and the copy of an expert 20."""
    trace = tiny_trace([[[0]], [[1]], [[0]], [[2]]], sequence=np.array([0, 1, 0, 2]), position=np.array([0, 0, 1, 0]))
    inputs: Inputs = tiny_inputs(tiny_model(1), tiny_profile(expert_ns=expert_ns), trace, tiny_scenario(**sections))
    return inputs


ENGINES = ("simpy", "compiled")
#: One whose decisions are compiled, and one that decides in Python under either engine.
EVICTIONS = ("lru", "arc")
REQUESTS = [(0, [0, 2]), (40, [1]), (200, [3])]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_a_step_is_made_of_what_is_there_when_the_one_before_has_ended(engine: str, eviction: str) -> None:
    # 0: dense to 3, copy to 23, expert 0 to 30. Row 2 hits: dense to 33, expert to 40, just when the second request
    # comes: dense to 43, copy to 63, expert 1 to 70. Nothing to do until 200; dense to 203, copy to 223, expert to 230.
    source = FirstCome(REQUESTS)
    found = served(by_hand(7, memory={"eviction": eviction}), lambda: source, engine)
    assert source.told == [
        ("next", 0), ("ended", 30), ("next", 30), ("ended", 40), ("next", 40), ("ended", 70), ("next", 70),
        ("next", 200), ("ended", 230), ("next", 230),
    ]  # fmt: skip
    assert [step.rows.tolist() for step in found.steps] == [[0], [2], [1], [3]]
    assert list(found.idle) == [(70, 200)]
    assert source.busy_ns == [20, 0, 20, 20], "one copy a step, but for the hit"
    # Four times 3 + 7 ns of kernels, three waits of 20 ns for bytes, and nothing to run for 130 ns.
    assert time_split(found) == {
        "compute_ms": 40e-6, "stall_ms": 60e-6, "host_ms": 0, "predictor_ms": 0, "bubble_ms": 0, "drain_ms": 0,
        "idle_ms": 130e-6,
    }  # fmt: skip
    kernels = found.compute_spans[np.isin(found.compute_spans["kind"], (DENSE, EXPERT))]
    assert [(KINDS[span["kind"]], int(span["start_ns"]), int(span["end_ns"])) for span in kernels] == [
        ("dense", 0, 3), ("expert", 23, 30), ("dense", 30, 33), ("expert", 33, 40),
        ("dense", 40, 43), ("expert", 63, 70), ("dense", 200, 203), ("expert", 223, 230),
    ]  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_quicker_kernels_make_other_steps(engine: str, eviction: str) -> None:
    # Experts take 5 ns: the first two steps end at 28 and 36, and nothing is there until 40.
    source = FirstCome(REQUESTS)
    found = served(by_hand(5, memory={"eviction": eviction}), lambda: source, engine)
    assert list(found.idle) == [(36, 40), (68, 200)]
    # They take 9 ns: the first step ends at 32. Who has come by then shares the second one, who comes later does not.
    found = served(by_hand(9, memory={"eviction": eviction}), lambda: FirstCome([(0, [0, 2]), (33, [1])]), engine)
    assert [step.rows.tolist() for step in found.steps] == [[0], [2], [1]]
    found = served(by_hand(9, memory={"eviction": eviction}), lambda: FirstCome([(0, [0, 2]), (32, [1])]), engine)
    assert [step.rows.tolist() for step in found.steps] == [[0], [2, 1]]


@pytest.mark.parametrize("engine", ENGINES)
def test_what_scheduling_takes_is_the_hosts_before_each_step(engine: str) -> None:
    source = FirstCome([(0, [0, 2])])
    served(by_hand(7), lambda: source, engine, schedule_ns=100)
    assert source.told == [("next", 0), ("ended", 130), ("next", 130), ("ended", 240), ("next", 240)]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_may_run_in_several_steps_and_twice_in_one(engine: str) -> None:
    found = served(by_hand(7), lambda: FirstCome([(0, [0, 2]), (0, [0, 2, 0])]), engine)
    assert [step.rows.tolist() for step in found.steps] == [[0, 0], [2, 2], [0]]
    assert found.decoded.accesses["tokens"].tolist() == [2, 2, 1]


def rich(eviction: str, policy: str) -> Inputs:
    """Returns inputs in which all costs are there: prefetches by guesses, a link that is busy, too little memory."""
    rng = np.random.default_rng(7)
    experts = np.array([[rng.permutation(8)[:2] for _ in range(3)] for _ in range(40)], dtype=np.uint8)
    trace = tiny_trace(experts.tolist(), 8, sequence=np.repeat(np.arange(5), 8), position=np.tile(np.arange(8), 5))
    scenario = tiny_scenario(
        memory={"gpu_budget": "9experts", "eviction": eviction},
        prefetch={"policy": policy, "lookahead": 4, "k": 2},
        dispatch={"mode": "eager"},
        predictor={"recall": 0.8, "latency_us": 0.004},
    )
    profile = tiny_profile(launch_ns=2, enqueue_ns=1, synchronize_ns=3, readback_ns=2, copy_gap_ns=1, kernel_gap_ns=1)
    inputs: Inputs = tiny_inputs(tiny_model(3, experts=8, top_k=2, head_ns=4), profile, trace, scenario)
    if inputs.guesses is None:
        return inputs
    rows = every_row(trace.sequence, trace.phase)
    return replace(inputs, guesses=make_predictor("oracle", seed=0, recall=0.8).guess(trace, rows, 4, 2))


def load() -> FirstCome:
    rng = np.random.default_rng(3)
    arrivals = np.cumsum(rng.integers(0, 900, 24)).tolist()
    return FirstCome(
        [
            (at, list(range(first, first + int(rng.integers(1, 8)))))
            for at, first in zip(arrivals, [0, 8, 16, 24] * 6, strict=True)
        ]
    )


def _kept(sources: list[FirstCome]) -> FirstCome:
    sources.append(load())
    return sources[-1]


@pytest.mark.parametrize("eviction", ["lru", "s3fifo", "arc", "predictive"])
@pytest.mark.parametrize("policy", ["top-k", "cost-aware", "next-layer"])
def test_both_engines_tell_the_scheduler_the_same_and_record_the_same(eviction: str, policy: str) -> None:
    told, spans, steps = [], [], []
    for engine in ENGINES:
        sources: list[FirstCome] = []
        found = served(rich(eviction, policy), partial(_kept, sources), engine, schedule_ns=5)
        told.append(sources[0].told)
        spans.append(found.spans.tolist())
        steps.append([step.rows.tolist() for step in found.steps])
    assert told[0] == told[1]
    assert steps[0] == steps[1]
    assert spans[0] == spans[1]
    assert len(set(map(len, steps[0]))) > 2  # batches of several sizes


def test_a_wrong_scheduler_is_named() -> None:
    class Past(FirstCome):
        def next_step(self, now_ns: int) -> Step | Wait | None:
            return Wait(now_ns)

    with pytest.raises(InputError, match="waits for 0 ns at 0 ns"):
        served(by_hand(7), lambda: Past([]), "simpy")
    with pytest.raises(InputError, match="has 2 tokens: must have 1 to 1"):
        served(by_hand(7), lambda: FirstCome([(0, [0]), (0, [1])]), "simpy", most_tokens=1)
