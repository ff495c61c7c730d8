"""What newer policies come to on real routing, as tables of the docs: made by `python tests/readme_tables.py NAME`."""

from __future__ import annotations

import os
from pathlib import Path

from prestage.engine.loading.loading import load_inputs
from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.simulate import simulate_inputs
from prestage.output.markdown import table
from prestage.workloads.importers import open_trace
from prestage.workloads.trace import RoutingTrace

#: Three machines, as settings.
MACHINES = {
    "RTX 3060, PCIe 4": ["machine.gpu=rtx3060", "machine.cpu=5950x"],
    "RTX 4090, PCIe 4": ["machine.gpu=rtx4090", "machine.cpu=7950x"],
    "H200, PCIe 5": ["machine.profile=h200-pcie5"],
}
#: gpt-oss-20b with a quarter of its experts on the GPU and no prefetching.
BASE = ["model.preset=gpt-oss-20b", "memory.gpu_budget=25%", "prefetch.lookahead=0", "dispatch.mode=graph"]
MARGINS = (0.0, 0.02, 0.05, 0.1, 0.2)
TOKENS = 500


def real_routing() -> RoutingTrace:
    """The first rows of gpt-oss-20b's routing."""
    trace = open_trace(Path(os.environ["PRESTAGE_TRACES"]) / "gpt-oss-20b.npz")
    return trace.select(slice(0, TOKENS))


def routing() -> str:
    """Cache-aware routing by margin: a model that uses the first two of gpt-oss-20b's four choices, two runners-up."""
    trace = real_routing().narrowed(2)
    rows = []
    for margin in MARGINS:
        cells = [f"{margin:g}"]
        for number, machine in enumerate(MACHINES.values()):
            settings = [*BASE, *machine, "model.top_k=2", "routing.policy=cache-aware", f"routing.margin={margin}"]
            scenario = load_scenario("synthetic", [*settings, "workload.warmup=0tokens"])
            data = simulate_inputs(load_inputs(scenario, trace=trace), baselines=False).data
            if not number:
                said = data["routing"]
                cells += [f"{data['hit_rate']:.1%}", f"{said['changed']:.1%}", f"{1 - said['gate_mass']:.2%}"]
            cells.append(f"{data['tokens_per_second']:.1f}")
        rows.append(cells)
    return table(["margin", "found", "choices changed", "gate weight less", *MACHINES], rows)
