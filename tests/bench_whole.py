"""What a whole run takes, from a scenario's name to its result: loading, the run, baselines and metrics; no pictures.

    python tests/bench_whole.py

Prints a table in Markdown: processor time in a warmed process, the least of three, for others may be at work on the
machine. Loading is measured with nothing kept of the scenario, and again, as for a row of a sweep.
"""

from __future__ import annotations

import time

from prestage.engine.load import load_inputs
from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.simulate import simulate_inputs
from prestage.engine.timing.ready import make_ready
from prestage.kept import KEPT

SCENARIOS = ("guide", "gpt-oss-20b", "pipeline-2", "cpu-experts", "nvme", "placement-8", "speed")
ROUNDS = 3
COLUMNS = ("scenario", "layer visits", "loading, s", "again, s", "run, metrics, s", "with baselines, s")


def taken_s(name: str) -> tuple[float, float, float, float]:
    """Returns the processor time of loading a scenario, and again; of its run with metrics, and baselines too, in s."""
    KEPT.clear()
    began = time.process_time()
    load_inputs(load_scenario(name))
    loaded = time.process_time()
    inputs = load_inputs(load_scenario(name))
    again = time.process_time()
    simulate_inputs(inputs, baselines=False)
    alone = time.process_time()
    simulate_inputs(inputs)
    return loaded - began, again - loaded, alone - again, time.process_time() - alone


def table() -> str:
    """Returns the table of all scenarios, in Markdown."""
    make_ready()
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name in SCENARIOS:
        visits = load_inputs(load_scenario(name)).layer_visits
        taken_s(name)  # what is imported at its first use
        least = map(min, zip(*(taken_s(name) for _ in range(ROUNDS)), strict=True))
        lines.append(f"| {name} | {visits:,} | {' | '.join(f'{each:.3f}' for each in least)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
