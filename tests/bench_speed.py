"""The simulator's own speed, as ratios within one run, because machines are shared and noisy.

    python tests/bench_speed.py [--repeats N]

Prints, as JSON: bare SimPy timeouts per second over layer visits per second in the shipped scenario `speed` (median
of pairs taken in turn), the same with contention, bytes of memory per recorded span, and sequential LRU replay in
accesses per second on one core.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import tracemalloc
from collections.abc import Generator
from typing import Any

import simpy

from prestage.engine.costs.costs import Costs
from prestage.engine.decide.memory_manager import MemoryManager
from prestage.engine.decide.pools import pool_budgets
from prestage.engine.load import load_inputs
from prestage.engine.loading.deciders import make_manager, make_prefetch
from prestage.engine.policies.eviction import Lru
from prestage.engine.replay.compiled import COMPILED
from prestage.engine.replay.replay import replay
from prestage.engine.run import run
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import load_scenario


def timeouts_per_second(count: int = 300_000) -> float:
    """Returns how many bare timeouts one SimPy process gets through in a second."""
    env = simpy.Environment()

    def process() -> Generator[simpy.Event, Any, None]:
        for _ in range(count):
            yield env.timeout(1)

    env.process(process())
    began = time.process_time()
    env.run()
    return count / (time.process_time() - began)


def visits_per_second(inputs: Inputs) -> float:
    """Returns how many layer visits the overlapped decoder gets through in a second, timeline recorded."""
    costs = Costs(inputs)
    manager, prefetch = make_manager(inputs), make_prefetch(inputs.scenario, inputs.model)
    began = time.process_time()
    run(inputs, costs, manager, prefetch)
    return inputs.layer_visits / (time.process_time() - began)


def timeouts_per_visit(inputs: Inputs, repeats: int) -> dict[str, float]:
    """Returns the ratio of the two speeds, measured in turn."""
    pairs = [(timeouts_per_second(), visits_per_second(inputs)) for _ in range(repeats)]
    ratios = sorted(timeouts / visits for timeouts, visits in pairs)
    return {
        "median": round(statistics.median(ratios), 2),
        "min": round(ratios[0], 2),
        "max": round(ratios[-1], 2),
        "layer_visits_per_second": round(statistics.median(visits for _, visits in pairs)),
    }


def bytes_per_span(inputs: Inputs) -> float:
    """Returns the memory that a run keeps for its timeline, per span."""
    costs = Costs(inputs)
    tracemalloc.start()
    recording = run(inputs, costs, make_manager(inputs), make_prefetch(inputs.scenario, inputs.model))
    gc.collect()  # the engine's own memory, which nobody asks for any more
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return kept / len(recording.decoded.timeline)


def replayed_per_second(inputs: Inputs, share: float, compiled: bool) -> float:
    """Returns LRU replay speed with room for a share of all experts, in accesses per second."""
    sizes, experts = inputs.model.expert_bytes, inputs.model.experts
    budget_bytes = int(inputs.model.total_expert_bytes * share)
    began = time.process_time()
    if compiled:
        COMPILED["lru"](inputs.trace, inputs.steps, pool_budgets(sizes, budget_bytes, "global"), sizes, "batch")
    else:
        replay(inputs.trace, inputs.steps, MemoryManager(sizes, experts, budget_bytes, Lru))
    return inputs.trace.experts.size / (time.process_time() - began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    inputs = load_inputs(load_scenario("speed"))
    contended = load_inputs(load_scenario("speed", ["copy.contention=true"]))
    replayed_per_second(inputs, 0.5, compiled=True)  # compiles, or loads what was compiled
    replays = {
        name: {
            f"{share:.0%}": round(
                statistics.median(replayed_per_second(inputs, share, name == "lru") for _ in range(5))
            )
            for share in (0.25, 0.5, 0.75)
        }
        for name in ("lru", "reference")
    }
    report = {
        "timeouts_per_visit": timeouts_per_visit(inputs, repeats),
        "timeouts_per_visit_contended": timeouts_per_visit(contended, max(1, repeats // 2)),
        "bytes_per_span": round(bytes_per_span(inputs), 1),
        "replay_accesses_per_second": replays,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
