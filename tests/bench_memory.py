"""Memory of a long run over an NVMe drive with experts of three sizes, whose rooms split.

    python tests/bench_memory.py [--steps 500] [--stream DIR]

Prints, as JSON, what `bench_parallel.py` prints. Every figure is of this process alone: run it once for each length.
"""

from __future__ import annotations

import argparse
import json
import resource
from dataclasses import replace
from pathlib import Path

from bench_parallel import measure, synthetic

from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import load_scenario
from prestage.workloads.model import load_model

BATCH = 8
#: How large the experts of three layers in a row are, over those of the model.
SIZES = (1.0, 1.5, 2.0)


def inputs_of(steps: int) -> Inputs:
    """Returns what runs: the shipped scenario nvme, with experts of other sizes in a batch of synthetic sequences."""
    scenario = load_scenario("nvme")
    model = load_model(scenario.model.preset)
    sized = tuple(int(size * SIZES[layer % len(SIZES)]) for layer, size in enumerate(model.expert_bytes))
    inputs: Inputs = synthetic(scenario, replace(model, expert_bytes=sized), steps, BATCH)
    return inputs


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--stream", type=Path, help="keep records in files there")
    given = parser.parse_args()
    inputs = inputs_of(given.steps)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(json.dumps({"loaded_peak_MiB": before, **measure(inputs, False, given.stream)}, indent=2))


if __name__ == "__main__":
    main()
