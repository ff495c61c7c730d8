"""What a run takes by each engine: processor time of the run alone, SimPy against compiled, in turns, medians of three.

python tests/bench_engines.py
"""

from __future__ import annotations

import statistics
import time

from prestage.engine.costs.costs import part_costs
from prestage.engine.loading.loading import load_inputs
from prestage.engine.run import prepared, run_all
from prestage.engine.scenario.scenario import load_scenario

#: Scenarios, and for how many decode tokens.
RUNS = {"default": 500, "gpt-oss-20b": 200, "speed": 500, "pipeline-2": 60, "cpu-experts": 200, "placement-8": 200}
ENGINES = ("simpy", "compiled")
ROUNDS = 3


def taken_s(name: str, tokens: int) -> tuple[int, dict[str, float]]:
    """Return the layer visits of a scenario, and the median processor time of its run by each engine, in s."""
    inputs = load_inputs(load_scenario(name, [f"workload.tokens={tokens}"]))
    samples: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    for _ in range(ROUNDS):
        for engine in ENGINES:
            ready = prepared(inputs, part_costs(inputs))
            began = time.process_time()
            run_all(inputs, ready, engine=engine)
            samples[engine].append(time.process_time() - began)
    return inputs.layer_visits, {engine: statistics.median(times) for engine, times in samples.items()}


def table() -> str:
    """Return the table of all runs, in Markdown."""
    taken_s("speed", 2)  # compile
    lines = ["| scenario | layer visits | simpy, s | compiled, s | simpy / compiled |", "|---|---|---|---|---|"]
    for name, tokens in RUNS.items():
        visits, seconds = taken_s(name, tokens)
        ratio = seconds["simpy"] / seconds["compiled"]
        lines.append(f"| {name} | {visits:,} | {seconds['simpy']:.2f} | {seconds['compiled']:.2f} | {ratio:.2f} |")
    return "\n".join(lines)
