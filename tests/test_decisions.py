"""Compiled decisions against the memory manager's, command by command, on scenarios drawn from all sections together.

python tests/test_decisions.py --first 0 --count 3000 plays many.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cases import Case, cases
from random_scenarios import accepted

from prestage.engine.costs.costs import Costs
from prestage.engine.decide.compiled_decisions import Decisions, Part
from prestage.engine.decide.memory_manager import MemoryManager
from prestage.engine.decide.program import Gpu, Stage, stages_program
from prestage.engine.decide.registers import Registers
from prestage.engine.decide.sources import EVICTIONS, PREFETCHES, Source, decided_in_python
from prestage.engine.decide.tables import Rooms
from prestage.engine.loading.deciders import dispatched, make_manager, make_prefetch
from prestage.engine.loading.offloading import make_miss
from prestage.engine.policies.eviction import EVICTION
from prestage.engine.policies.prefetch import PREFETCH, Gauge
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.timing.simulation import settings_of

COUNTS = ("dropped", "guessed", "unique_guesses", "saved_copies", "assigned", "assigned_bytes", "budget_bytes")


class Played:
    """One GPU's decisions, by either maker, with a clock that runs as it is told to."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.manager = inputs, make_manager(inputs)
        costs = Costs(inputs)
        self.prefetch = make_prefetch(inputs.scenario, inputs.model, costs.copies[0].queued_ns)
        registers = Registers(7)
        predicts = self.prefetch.guesses > 0
        rooms = Rooms(registers, self.manager.assigned.values())
        self.gpu = Gpu(settings_of(inputs.scenario, costs, predicts), rooms, registers)
        self.random = Random(0)
        self.now_ns = self.backlog_ns = 0
        self.resolved: list[tuple[Any, ...]] = []

    def tick(self) -> None:
        self.now_ns += self.random.choice((0, 10, 1000, 100000))
        self.backlog_ns = self.random.choice((0, 0, 7, 5000, 10**6))

    def in_python(self) -> list[Any]:
        gauge = Gauge()
        gauge.now_ns, gauge.backlog_ns = lambda: self.now_ns, lambda: self.backlog_ns
        visits = dispatched(self.inputs, self.manager, self.prefetch, gauge)

        def decided(visit: Any) -> None:
            for one in visit.resolution.accesses:
                self.resolved.append((visit.number, one.expert, one.way, one.tokens, one.gate, one.whole))

        stage = Stage(self.gpu, visits, self.inputs.trace.layers, self.inputs.steps, decided)
        portions = []
        self.tick()
        for step in stages_program([stage]):
            for portion in step:
                portions.append(portion.tolist())
                self.tick()
        return portions

    def compiled(self) -> list[Any]:
        def resolved(records: Any) -> None:
            gates = records[:, 4].copy().view(np.float64)
            self.resolved += [
                (*row[:4], gate, True) for row, gate in zip(records.tolist(), gates.tolist(), strict=True)
            ]

        decisions = Decisions([Part(self.source(), self.gpu, resolved)], [[0]])
        portions = []
        self.tick()
        while (portion := decisions.portion(0, self.now_ns, self.backlog_ns)) is not None:
            portions.append(portion.tolist())
            self.tick()
        decisions.finish()
        return portions

    def source(self) -> Source:
        inputs, scenario = self.inputs, self.inputs.scenario
        return Source(
            inputs.trace, inputs.steps, self.manager, self.prefetch, inputs.guesses, scenario.prefetch.issue,
            inputs.budgets, make_miss(inputs), scenario.tiers.host_budget != "all",
        )  # fmt: skip


def records(manager: MemoryManager) -> list[Any]:
    return [
        manager.copy_expert.tolist(), manager.copy_reason.tolist(), manager.evicted_copies.tolist(),
        *(getattr(manager, name) for name in COUNTS),
    ]  # fmt: skip


def compare(inputs: Inputs) -> str | None:
    """Assert that both makers decide alike; return why only one of them can, or None."""
    ours, theirs = Played(inputs), Played(inputs)
    why = decided_in_python(ours.source())
    if why is not None:
        return why
    expected, made = theirs.in_python(), ours.compiled()
    assert len(made) == len(expected)
    for number, (mine, reference) in enumerate(zip(made, expected, strict=True)):
        assert mine == reference, f"portion {number}"
    assert records(ours.manager) == records(theirs.manager)
    assert ours.resolved == theirs.resolved
    return None


FREE = {"tiers": {"host_budget": "all"}}


@settings(max_examples=100)
@given(case=cases(**FREE))
def test_random_runs_are_decided_alike(case: Case) -> None:
    assert compare(case.inputs()) is None


@pytest.mark.parametrize("name", [name for name, policy in EVICTION.items() if policy in EVICTIONS])
@settings(max_examples=40)
@given(data=st.data())
def test_every_compiled_eviction_policy_decides_as_its_class(name: str, data: st.DataObject) -> None:
    fixed: dict[str, Any] = {"memory": {"eviction": name}}
    if data.draw(st.booleans()):
        fixed["memory"]["caching"] = False
        fixed["prefetch"] = {"protect": "until_target", "issue": "after_launch"}
    case = data.draw(cases(predictor={"name": "frequency"}, **fixed, **FREE))
    assert compare(case.inputs()) is None


@pytest.mark.parametrize("name", [name for name, policy in PREFETCH.items() if policy in PREFETCHES])
@settings(max_examples=40)
@given(data=st.data())
def test_every_compiled_prefetch_policy_decides_as_its_class(name: str, data: st.DataObject) -> None:
    # The frequency predictor gives confidences, which some policies need.
    case = data.draw(cases(prefetch={"policy": name}, predictor={"name": "frequency"}, **FREE))
    assert compare(case.inputs()) is None


def play(seed: int, folder: Path) -> str:
    """Draw a scenario and compare the decisions of each of its GPUs, but for those that share experts."""
    inputs = accepted(seed, folder)
    if inputs is None:
        return "refused"
    if inputs.expert_parallel is not None:
        return "parallel.gpus"
    return next((why for part in inputs.parts if (why := compare(part)) is not None), "alike")


@pytest.mark.parametrize("first", range(0, 120, 40))
def test_random_scenarios_of_all_sections_are_decided_alike(first: int, tmp_path: Path) -> None:
    outcomes = Counter(play(seed, tmp_path) for seed in range(first, first + 40))
    assert outcomes["alike"] >= 5


def main() -> None:
    """Compare many and print what became of them."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--count", type=int, default=3000)
    asked = options.parse_args()
    outcomes: Counter[str] = Counter()
    for seed in range(asked.first, asked.first + asked.count):
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcomes[play(seed, Path(folder))] += 1
            except AssertionError as fault:
                outcomes["FAULT"] += 1
                print(f"seed {seed}: {str(fault)[:300]}", flush=True)
    print(outcomes)


if __name__ == "__main__":
    main()
