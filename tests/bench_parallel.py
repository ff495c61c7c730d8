"""Speed and memory of eight GPUs that share the experts of every layer, in the shape of DeepSeek-V3.

    python tests/bench_parallel.py [--steps 1000] [--layers 61] [--contention] [--stream DIR] [--metrics]

Prints, as JSON: layer visits and accesses (all GPUs' together), CPU seconds on one core by phase, microseconds an
access and milliseconds a layer visit of the run itself, and the most memory of the process by its end. Every
figure is of this process alone: run it once for each length that is to be compared.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from prestage.engine.costs.costs import part_costs
from prestage.engine.load import completed
from prestage.engine.run import prepared, run_all
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import Scenario, load_scenario
from prestage.engine.simulate import simulate_inputs
from prestage.resources.profile import load_profile
from prestage.workloads.batches import plan_steps
from prestage.workloads.model import Model, load_model
from prestage.workloads.synthetic import synthesize


def inputs_of(steps: int, layers: int, experts: int, settings: list[str]) -> Inputs:
    """Returns what runs: the shipped scenario placement-8, with a model of as many layers and experts as asked."""
    scenario = load_scenario("placement-8", settings)
    base = load_model(scenario.model.preset)
    expert_bytes, dense_bytes = base.expert_bytes[:1] * layers, base.dense_bytes[1:2] * layers
    bare = replace(base, caches=(), by_layer=(), attention=())
    model = replace(bare, layers=layers, experts=experts, expert_bytes=expert_bytes, dense_bytes=dense_bytes)
    return synthetic(scenario, model, steps, scenario.workload.batch)


def synthetic(scenario: Scenario, model: Model, steps: int, batch: int) -> Inputs:
    """Returns what a scenario runs with this model and so many decode steps of a batch of synthetic sequences."""
    shape = (model.layers, model.experts, model.top_k)
    trace = synthesize(steps * batch, *shape, sequences=batch, skew=0.5, reuse=0.3)
    planned = plan_steps(trace.sequence, trace.phase, batch=batch)
    bare = Inputs(scenario, model, load_profile(scenario.machine.profile), trace, planned, budget_bytes=0, guesses=None)
    return completed(bare)


def measure(inputs: Inputs, with_metrics: bool, stream: Path | None) -> dict[str, Any]:
    """Run it, with its metrics or without, and return what that took."""
    began_s = time.process_time()
    if with_metrics:
        accesses = simulate_inputs(inputs, baselines=False, stream=stream).data["accesses"]
    else:
        recordings = run_all(inputs, prepared(inputs, part_costs(inputs), stream))
        accesses = sum(len(recording.decoded.accesses) for recording in recordings)
    cpu_s = time.process_time() - began_s
    return {
        "steps": len(inputs.steps),
        "layer_visits": inputs.layer_visits,
        "accesses": accesses,
        "with_metrics": with_metrics,
        "cpu_s": round(cpu_s, 2),
        "us_per_access": round(cpu_s / accesses * 1e6, 2),
        "ms_per_visit": round(cpu_s / inputs.layer_visits * 1e3, 4),
        "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--contention", action="store_true", help="copies share links and slow kernels down")
    parser.add_argument("--stream", type=Path, help="keep records in files there")
    parser.add_argument("--metrics", action="store_true", help="compute all metrics too")
    parser.add_argument("--set", action="append", default=[], help="section.key=value over placement-8")
    given = parser.parse_args()
    began_s = time.process_time()
    settings = [f"copy.contention={str(given.contention).lower()}", *given.set]
    inputs = inputs_of(given.steps, given.layers, given.experts, settings)
    loaded_s = time.process_time() - began_s
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    report = {
        "load_cpu_s": round(loaded_s, 2),
        "loaded_peak_MiB": before,
        **measure(inputs, given.metrics, given.stream),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
