"""The engines that carry out commands: SimPy's, the reference, and the compiled one, end at the same nanoseconds.

python tests/test_engines.py --first 0 --count 3000 plays many scenarios drawn from all sections together, or with
--composed of several GPUs and what goes with them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from random_cases import Case, cases, played
from random_scenarios import accepted, accepted_of, composed, draw
from tiny import books, tiny_inputs, tiny_model, tiny_profile, tiny_scenario

from prestage.engine.costs.costs import Costs
from prestage.engine.decide.commands import Command, Op
from prestage.engine.decide.compiled_decisions import Decisions
from prestage.engine.decide.program import Gpu, Rows, Stage, stages_program
from prestage.engine.decide.registers import Registers
from prestage.engine.decide.tables import Rooms
from prestage.engine.load import load_inputs
from prestage.engine.loading.deciders import dispatched, make_manager, make_prefetch
from prestage.engine.run import LONG_VISITS, Prepared, engine_for, run_all
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import load_scenario, scenario_names
from prestage.engine.simulate import simulate
from prestage.engine.timing.simulation import settings_of
from prestage.resources.timeline import DENSE, EXPERT, HEAD
from prestage.workloads.trace import RoutingTrace


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(scenario_names()) - {"placement-8"}))
def test_a_shipped_scenario_ends_alike_by_simpy_and_compiled(name: str) -> None:
    inputs = load_inputs(load_scenario(name, ["workload.tokens=12"]))
    assert played(inputs, "compiled") == played(inputs, "simpy")


def test_a_buffer_of_commands_has_room_for_what_was_asked_and_keeps_what_is_in_it() -> None:
    rows = Rows()
    buffer = rows.room_for(1)
    whole = len(buffer)
    rows.add(Op.TURN, 7)
    assert rows.room_for(whole - 2) is buffer  # the first row counts the others
    for more in (whole - 1, 3 * whole):
        assert len(rows.room_for(more)) >= 2 + more
    assert [(row[0], row[1]) for row in rows.portion().tolist()] == [(Op.TURN, 7)]


def test_a_visit_of_more_commands_than_a_thread_has_room_for_at_first_ends_alike() -> None:
    # Each of 256 tokens has an expert of its own: a copy, a wait and a launch for each, where there is room for 512.
    experts = np.arange(256, dtype=np.uint8).reshape(256, 1, 1)
    trace = RoutingTrace(experts, 256, sequence=np.arange(256, dtype=np.int32))
    scenario = tiny_scenario(workload={"batch": 256}, memory={"gpu_budget": "256experts"})
    inputs = tiny_inputs(tiny_model(1, 256), tiny_profile(), trace, scenario)
    assert played(inputs, "compiled") == played(inputs, "simpy")


def test_spare_memory_of_less_than_an_expert_is_none_by_either_engine() -> None:
    inputs = load_inputs(load_scenario("placement-8", ["workload.tokens=8", "parallel.spare_bytes=1B"]))
    assert played(inputs, "compiled") == played(inputs, "simpy")


# Where GPUs lend each other experts, equal ones start and end at the same instants, and links are shared.
@pytest.mark.slow
@pytest.mark.parametrize("remote", ["tokens", "peer", "cost"])
@pytest.mark.parametrize("threads", ["one", "per-gpu"])
def test_gpus_that_share_experts_end_alike_by_simpy_and_compiled(remote: str, threads: str) -> None:
    # The predictor on each GPU takes its time, and hosts wait for its guesses: each for its own, if they are several.
    chosen = ["workload.tokens=16", f"parallel.remote={remote}", f"parallel.dispatch_threads={threads}"]
    chosen += ["predictor.latency_us=30", "predictor.lane=gpu"]
    inputs = load_inputs(load_scenario("placement-8", chosen))
    assert played(inputs, "compiled") == played(inputs, "simpy")


@pytest.mark.slow
@pytest.mark.parametrize("remote", ["tokens", "host", "peer"])
@pytest.mark.parametrize("placement", ["round-robin", "replicated"])
def test_gpus_that_share_experts_by_compiled_decisions_end_alike(remote: str, placement: str) -> None:
    # A replica of an expert is served where the fewest tokens are; where no token moves, each GPU has its own steps.
    chosen = ["workload.tokens=16", f"parallel.remote={remote}", f"parallel.placement={placement}"]
    chosen += ["parallel.replica_bytes=8GiB"] if placement == "replicated" else []
    inputs = load_inputs(load_scenario("placement-8", chosen))
    with patch.object(Decisions, "finish", autospec=True, side_effect=Decisions.finish) as finished:
        compiled = played(inputs, "compiled")
    assert finished.call_count == 1
    assert compiled == played(inputs, "simpy")


@pytest.mark.slow
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

    assert play("compiled") == play("simpy")


@pytest.mark.slow
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
    inputs = load_inputs(load_scenario("speed", ["workload.tokens=2"]))
    with pytest.raises(ScenarioError, match=r"engine = 'simpie': choose one of compiled, simpy \(did you mean 'simpy'"):
        engine_for(inputs, "simpie")


def test_a_short_run_does_not_wait_for_compiling_and_says_so() -> None:
    inputs = load_inputs(load_scenario("speed", ["workload.tokens=2"]))
    with patch("prestage.engine.run.is_ready", return_value=False):
        assert engine_for(inputs) == ("simpy", "the compiled engine is not compiled yet, and the run is short")
        with patch("prestage.engine.run.LONG_VISITS", inputs.layer_visits):
            assert engine_for(inputs) == ("compiled", "")
    assert inputs.layer_visits < LONG_VISITS
    with patch("prestage.engine.run.is_ready", return_value=True):
        assert engine_for(inputs) == ("compiled", "")


def test_the_result_says_which_engine_ran_and_is_the_same_by_either() -> None:
    scenario = load_scenario("speed", ["workload.tokens=4"])
    compiled, by_simpy = (simulate(scenario, baselines=False, engine=name) for name in ("compiled", "simpy"))
    assert [result.json_data()["engine"] for result in (compiled, by_simpy)] == ["compiled", "simpy"]
    assert by_simpy.json_data()["engine_why"] == "asked for"
    assert compiled.data == by_simpy.data
    assert compiled.timeline.spans().tobytes() == by_simpy.timeline.spans().tobytes()


def main() -> None:
    """Play many random scenarios by both engines, and print where they differ."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--count", type=int, default=1000)
    options.add_argument("--composed", action="store_true")
    asked = options.parse_args()
    counts: Counter[str] = Counter()
    for seed in range(asked.first, asked.first + asked.count):
        with tempfile.TemporaryDirectory() as folder:
            data = (composed if asked.composed else draw)(seed, Path(folder))
            inputs = accepted_of(data, seed)
            if inputs is None:
                counts["refused"] += 1
                continue
            alike = played(inputs, "compiled") == played(inputs, "simpy")
        counts["alike" if alike else "differ"] += 1
        if not alike:
            print(f"--- seed {seed} differs", flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()
