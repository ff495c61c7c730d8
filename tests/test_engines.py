"""The engines that carry out commands: SimPy's, the reference, and the compiled one, end at the same nanoseconds.

Spans are compared in an order of their own, for engines record them in different orders: by start, end, lane and so on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from random_cases import Case, books, cases, played
from random_scenarios import accepted
from tiny import tiny_inputs, tiny_model, tiny_profile, tiny_scenario

from prestage.engine.costs.costs import Costs
from prestage.engine.decide.commands import Command, Op
from prestage.engine.decide.program import Gpu, Stage, stages_program
from prestage.engine.decide.registers import Registers
from prestage.engine.decide.tables import Rooms
from prestage.engine.loading.deciders import dispatched, make_manager, make_prefetch
from prestage.engine.loading.loading import load_inputs
from prestage.engine.run import Prepared, check_engine, run_all
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import ScenarioError, load_scenario, scenario_names
from prestage.engine.simulate import simulate
from prestage.engine.timing.simulation import settings_of
from prestage.resources.timeline import DENSE, EXPERT, HEAD
from prestage.workloads.trace import RoutingTrace


@pytest.mark.parametrize("name", sorted(set(scenario_names()) - {"placement-8"}))
def test_a_shipped_scenario_ends_alike_by_lanes_by_simpy_and_compiled(name: str) -> None:
    inputs = load_inputs(load_scenario(name, ["workload.tokens=12"]))
    by_lanes = played(inputs, "lanes")
    assert played(inputs, "simpy") == by_lanes
    assert played(inputs, "compiled") == by_lanes


# Where GPUs lend each other experts, equal ones start and end at the same instants, and links are shared.
@pytest.mark.parametrize("remote", ["tokens", "peer", "cost"])
@pytest.mark.parametrize("threads", ["one", "per-gpu"])
def test_gpus_that_share_experts_end_alike_by_simpy_and_compiled(remote: str, threads: str) -> None:
    # The predictor on each GPU takes its time, and hosts wait for its guesses: each for its own, if they are several.
    chosen = ["workload.tokens=16", f"parallel.remote={remote}", f"parallel.dispatch_threads={threads}"]
    chosen += ["predictor.latency_us=30", "predictor.lane=gpu"]
    inputs = load_inputs(load_scenario("placement-8", chosen))
    assert played(inputs, "compiled") == played(inputs, "simpy")


@settings(max_examples=250)
@given(case=cases())
def test_random_runs_of_one_gpu_end_alike(case: Case) -> None:
    inputs = case.inputs()

    def play(engine: str) -> list[tuple[bytes, ...]]:
        costs = Costs(inputs)
        prefetch = make_prefetch(inputs.scenario, inputs.model, costs.copies[0].queued_ns)
        recorded: list[tuple[bytes, ...]] = books(
            run_all(inputs, [Prepared(inputs, costs, make_manager(inputs), prefetch)], engine=engine)
        )
        return recorded

    by_simpy = play("simpy")
    assert play("compiled") == by_simpy
    # Round costs: things happen at equal instants all the time, when a queue by rank looks at all that has come; and
    # what an I/O lane has to do depends on when it is asked.
    if inputs.scenario.copy_.discipline != "priority" and inputs.scenario.tiers.host_budget == "all":
        assert play("lanes") == by_simpy


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_random_scenarios_of_all_sections_end_alike(first: int, tmp_path: Path) -> None:
    compared = 0
    for seed in range(first, first + 20):
        inputs = accepted(seed, tmp_path)
        if inputs is None:
            continue
        assert played(inputs, "compiled") == played(inputs, "simpy"), f"seed {seed}"
        compared += 1
    assert compared >= 5


def commands(inputs: Inputs) -> list[tuple[Any, ...]]:
    """The commands of a run on one GPU, each with what says most about it."""
    manager, registers = make_manager(inputs), Registers(7)
    prefetch = make_prefetch(inputs.scenario, inputs.model)
    gpu = Gpu(settings_of(inputs.scenario, Costs(inputs), False), Rooms(registers), registers)
    visits = dispatched(inputs, manager, prefetch)
    stage = Stage(gpu, visits, inputs.trace.layers, inputs.steps, lambda visit: None)
    rows = [row for step in stages_program([stage]) for portion in step for row in portion.tolist()]
    named = [Command._make(row) for row in rows]
    told = {Op.LAUNCH: "kind", Op.COPY: "expert", Op.WAIT: "register", Op.RECLAIM: "register"}
    return [(Op(one.op).name, getattr(one, told[Op(one.op)]) if one.op in told else -1) for one in named]


def test_a_visit_comes_to_these_commands() -> None:
    # One layer of two experts, room for one. Token 0 chooses expert 0, token 1 expert 1: copied into its room (register
    # 7, the first after the seven of the GPU), once the kernel that read expert 0 there has ended.
    trace = RoutingTrace(np.array([[[0]], [[1]]], dtype=np.uint8), 2)
    scenario = tiny_scenario(memory={"gpu_budget": "1experts"}, prefetch={"lookahead": 0})
    inputs = tiny_inputs(tiny_model(1, 2, 1), tiny_profile(), trace, scenario)
    output, room = 1, 7
    dense = [
        ("TURN", -1), ("VISIT", -1), ("LAUNCH", DENSE), ("TOUCH", -1), ("WAIT", output), ("READBACK", -1),
        ("NOTICE", -1), ("CATCH_UP", -1), ("DECIDE", -1),
    ]  # fmt: skip
    head = [("CATCH_UP", -1), ("LAUNCH", HEAD)]
    assert commands(inputs) == [
        *dense, ("COPY", 0), ("WAIT", room), ("LAUNCH", EXPERT), *head,
        *dense, ("RECLAIM", room), ("COPY", 1), ("WAIT", room), ("LAUNCH", EXPERT), *head,
    ]  # fmt: skip


def test_an_engine_that_is_none_is_refused() -> None:
    with pytest.raises(ScenarioError, match=r"engine = 'simpie': choose one of lanes, simpy, compiled \(did you mean"):
        check_engine(load_inputs(load_scenario("speed", ["workload.tokens=2"])), "simpie")


def test_the_result_says_which_engine_ran() -> None:
    scenario = load_scenario("speed", ["workload.tokens=4"])
    by_lanes, compiled = (simulate(scenario, baselines=False, engine=name).data for name in ("lanes", "compiled"))
    assert (by_lanes.pop("engine"), compiled.pop("engine")) == ("lanes", "compiled")
    assert by_lanes == compiled
