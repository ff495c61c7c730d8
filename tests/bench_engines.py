"""What a layer visit takes by each engine, in bare SimPy timeouts: of the run alone, timeline recorded, in one process.

    python tests/bench_engines.py

Runs and timeouts are measured in turns, and the least time of each counts, for others may be at work on the machine.
`compiled` decides in compiled code where it can; beside it stands the same engine with decisions made in Python.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any
from unittest import mock

import simpy

from prestage.engine import run as runs
from prestage.engine.costs.costs import part_costs
from prestage.engine.load import load_inputs
from prestage.engine.run import prepared, run_all
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import load_scenario

#: Scenarios, for how many decode tokens by compiled code, and for how many by the slower ones.
RUNS = {
    "default": (200, 20),
    "speed": (1000, 40), "guide": (2000, 60), "gpt-oss-20b": (800, 40), "pipeline-2": (800, 20),
    "nvme": (100, 10), "cpu-experts": (500, 40), "placement-8": (256, 64),
}  # fmt: skip
ROUNDS = 5


def timeout_s(count: int = 100_000) -> float:
    """Returns the processor time that a bare timeout of one SimPy process takes."""
    env = simpy.Environment()

    def process() -> Generator[simpy.Event, Any, None]:
        for _ in range(count):
            yield env.timeout(1)

    env.process(process())
    began = time.process_time()
    env.run()
    return (time.process_time() - began) / count


def decided_in_python(inputs: Inputs, engine: str) -> float:
    """Returns the processor time of a run whose decisions are made in Python."""
    with mock.patch.object(runs, "_sources", lambda *_: []):
        return run_s(inputs, engine)


def run_s(inputs: Inputs, engine: str) -> float:
    """Returns the processor time of a run."""
    ready = prepared(inputs, part_costs(inputs))
    began = time.process_time()
    run_all(inputs, ready, engine=engine)
    return time.process_time() - began


def timeouts(inputs: Inputs, takes_s: Callable[[Inputs, str], float], engine: str) -> float:
    """Returns a layer visit's time in bare timeouts."""
    times = [(takes_s(inputs, engine), timeout_s()) for _ in range(ROUNDS)]
    least_s, bare_s = map(min, zip(*times, strict=True))
    each: float = least_s / inputs.layer_visits / bare_s
    return each


def row(name: str) -> tuple[int, float, float, float]:
    """Returns the layer visits of a scenario's run, and what one takes: compiled, decided in Python, by SimPy."""
    few, many = (load_inputs(load_scenario(name, [f"workload.tokens={tokens}"])) for tokens in sorted(RUNS[name]))
    run_s(few, "compiled")  # compile
    return (
        many.layer_visits,
        timeouts(many, run_s, "compiled"),
        timeouts(few, decided_in_python, "compiled"),
        timeouts(few, run_s, "simpy"),
    )


def table() -> str:
    """Returns the table of all runs, in Markdown."""
    lines = ["| scenario | layer visits | compiled | decided in Python | simpy |", "|---|---|---|---|---|"]
    for name in RUNS:
        visits, *taken = row(name)
        lines.append(f"| {name} | {visits:,} | {taken[0]:.1f} | {taken[1]:.0f} | {taken[2]:,.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
