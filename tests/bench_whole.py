"""What a whole run takes, from a scenario's name to its result: loading, the run, baselines and metrics; no pictures.

    python tests/bench_whole.py

Prints a table in Markdown: processor time in a warmed process, the least of three, for others may be at work on the
machine.
"""

from __future__ import annotations

import time

from prestage.engine.loading.loading import load_inputs
from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.simulate import simulate_inputs

SCENARIOS = ("default", "gpt-oss-20b", "pipeline-2", "cpu-experts", "nvme", "placement-8", "speed")
ROUNDS = 3


def taken_s(name: str) -> tuple[float, float, float]:
    """Returns the processor time of loading a scenario, of its run alone with metrics, and with baselines too, in s."""
    began = time.process_time()
    inputs = load_inputs(load_scenario(name))
    loaded = time.process_time()
    simulate_inputs(inputs, baselines=False)
    alone = time.process_time()
    simulate_inputs(inputs)
    return loaded - began, alone - loaded, time.process_time() - alone


def table() -> str:
    """Returns the table of all scenarios, in Markdown."""
    lines = ["| scenario | layer visits | loading, s | run, metrics, s | with baselines, s |", "|---|---|---|---|---|"]
    for name in SCENARIOS:
        visits = load_inputs(load_scenario(name)).layer_visits
        taken_s(name)  # compile
        least = map(min, zip(*(taken_s(name) for _ in range(ROUNDS)), strict=True))
        lines.append(f"| {name} | {visits:,} | {' | '.join(f'{each:.3f}' for each in least)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
