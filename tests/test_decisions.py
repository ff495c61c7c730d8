"""Compiled decisions against the memory manager's, command by command, on scenarios drawn from all sections together.

python tests/test_decisions.py --first 0 --count 3000 plays many.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cases import cases
from random_scenarios import accepted

from prestage.engine import simulate
from prestage.engine.costs.costs import Costs
from prestage.engine.decide.compiled_decisions import Decisions
from prestage.engine.decide.decision_layout import Part
from prestage.engine.decide.host_memory import HostRooms
from prestage.engine.decide.memory_manager import MemoryManager
from prestage.engine.decide.program import Gpu, Stage, stages_program
from prestage.engine.decide.registers import Registers
from prestage.engine.decide.sources import EVICTIONS, PREFETCHES, Source, decided_in_python, stages_in_python
from prestage.engine.decide.tables import Rooms
from prestage.engine.load import load_inputs
from prestage.engine.loading.deciders import dispatched, make_host_memory, make_manager, make_prefetch, source_of
from prestage.engine.policies.eviction import EVICTION
from prestage.engine.policies.prefetch import PREFETCH, Gauge
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.timing.simulation import settings_of

READS = ("hits", "misses", "staged_reads", "read_bytes")
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
        self.host = make_host_memory(inputs)
        tier = None
        if self.host is not None and costs.reads is not None:
            requests, back_ns = zip(*((read.requests, read.back_ns) for read in costs.reads.by_layer), strict=True)
            tier = HostRooms(inputs.model.experts, registers.own(), requests, back_ns)
        self.gpu = Gpu(settings_of(inputs.scenario, costs, predicts), rooms, registers, tier)
        self.random = Random(0)
        self.now_ns = self.backlog_ns = 0
        self.resolved: list[tuple[Any, ...]] = []

    def tick(self) -> None:
        self.now_ns += self.random.choice((0, 10, 1000, 100000))
        self.backlog_ns = self.random.choice((0, 0, 7, 5000, 10**6))

    def in_python(self) -> list[Any]:
        gauge = Gauge()
        gauge.now_ns, gauge.backlog_ns = lambda: self.now_ns, lambda: self.backlog_ns
        visits = dispatched(self.inputs, self.manager, self.prefetch, gauge, self.host)

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
        return source_of(self.inputs, self.manager, self.prefetch, self.host)


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
    if ours.host is not None and theirs.host is not None:
        assert records(ours.host.manager) == records(theirs.host.manager)
        assert [getattr(ours.host, name) for name in READS] == [getattr(theirs.host, name) for name in READS]
    assert ours.resolved == theirs.resolved
    return None


#: Host memory keeps experts by a policy of any kind; one that is not compiled decides in Python.
COMPILED_HOST = sorted(name for name, policy in EVICTION.items() if policy in EVICTIONS)


@pytest.mark.slow
@settings(max_examples=100)
@given(data=st.data())
def test_random_runs_are_decided_alike(data: st.DataObject) -> None:
    tiers = {"host_policy": data.draw(st.sampled_from(COMPILED_HOST))}
    assert compare(data.draw(cases(tiers=tiers)).inputs()) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED_HOST)
@settings(max_examples=30)
@given(data=st.data())
def test_host_memory_decides_by_every_compiled_policy_as_its_class(name: str, data: st.DataObject) -> None:
    # Room for two or three experts of the sizes that are drawn: reads that make others leave, in rooms left over.
    tiers = {"host_policy": name, "host_budget": f"{data.draw(st.integers(30, 90))}B"}
    assert compare(data.draw(cases(tiers=tiers)).inputs()) is None


def test_guesses_of_more_layers_than_are_fetched_ahead_are_decided_by_in_python() -> None:
    inputs = load_inputs(load_scenario("guide", ["workload.tokens=2", "prefetch.lookahead=1"]))
    source = Played(inputs).source()
    assert source.guesses is not None and decided_in_python(source) is None
    further = replace(source.guesses, experts=np.repeat(source.guesses.experts, 2, axis=2))
    assert decided_in_python(replace(source, guesses=further)) == "prefetch.lookahead"
    assert decided_in_python(replace(source, guesses=None)) == "prefetch.lookahead"


def test_stages_are_decided_in_python_if_one_of_them_is_or_they_share_what_host_memory_holds() -> None:
    plain = Played(load_inputs(load_scenario("guide", ["workload.tokens=2"]))).source()
    tiered = Played(load_inputs(load_scenario("nvme", ["workload.tokens=2"]))).source()
    assert stages_in_python([plain]) is stages_in_python([plain, plain]) is stages_in_python([tiered]) is None
    assert stages_in_python([plain, tiered]) == "tiers.host_budget"
    assert stages_in_python([plain, replace(plain, guesses=None), tiered]) == "prefetch.lookahead"


def test_host_memory_by_a_policy_that_is_not_compiled_is_decided_in_python() -> None:
    scenario = load_scenario("nvme", ["workload.tokens=2", "tiers.host_policy=predictive"])
    inputs = load_inputs(scenario)
    assert compare(inputs) == "tiers.host_policy"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, policy in EVICTION.items() if policy in EVICTIONS])
@settings(max_examples=40)
@given(data=st.data())
def test_every_compiled_eviction_policy_decides_as_its_class(name: str, data: st.DataObject) -> None:
    fixed: dict[str, Any] = {"memory": {"eviction": name}}
    if data.draw(st.booleans()):
        fixed["memory"]["caching"] = False
        fixed["prefetch"] = {"protect": "until_target", "issue": "after_launch"}
    fixed["tiers"] = {"host_policy": "lru"}
    case = data.draw(cases(predictor={"name": "frequency"}, **fixed))
    assert compare(case.inputs()) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, policy in PREFETCH.items() if policy in PREFETCHES])
@settings(max_examples=40)
@given(data=st.data())
def test_every_compiled_prefetch_policy_decides_as_its_class(name: str, data: st.DataObject) -> None:
    # The frequency predictor gives confidences, which some policies need.
    chosen = {"policy": name}
    case = data.draw(cases(prefetch=chosen, predictor={"name": "frequency"}, tiers={"host_policy": "fifo"}))
    assert compare(case.inputs()) is None


@pytest.mark.parametrize("settings", [[], ["memory.eviction=lfu"], ["workload.batch=5", "memory.eviction=sieve"]])
def test_gpus_that_serve_what_they_own_miss_alike_by_compiled_code(settings: list[str]) -> None:
    inputs = load_inputs(load_scenario("placement-8", ["workload.tokens=32", *settings]))
    apart = simulate._misses_apart(inputs, [make_manager(part) for part in inputs.parts])
    together = simulate._misses_together(inputs, [make_manager(part) for part in inputs.parts])
    assert apart is not None
    assert [keys.tolist() for keys in apart] == [keys.tolist() for keys in together]


def play(seed: int, folder: Path) -> str:
    """Draw a scenario and compare the decisions of each of its GPUs, but for those that share experts."""
    inputs = accepted(seed, folder)
    if inputs is None:
        return "refused"
    if inputs.expert_parallel is not None:
        return "parallel.gpus"
    return next((why for part in inputs.parts if (why := compare(part)) is not None), "alike")


@pytest.mark.slow
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
