"""What newer policies come to on real routing, as tables of the docs: made by `python tests/readme_tables.py NAME`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prestage.engine.load import load_inputs
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


#: What is compared in the table of pinned experts, as settings.
RESIDENCY = {
    "cache, `lru`": [],
    "cache, `heat`": ["memory.eviction=heat"],
    "a tenth of the budget pinned, `lru`": ["memory.preload=popular", "memory.pinned=2.5%"],
    "two fifths pinned, `lru`": ["memory.preload=popular", "memory.pinned=10%"],
    "four fifths pinned, `lru`": ["memory.preload=popular", "memory.pinned=20%"],
    "whole layers, two fifths pinned, `lru`": ["memory.preload=layers", "memory.pinned=10%"],
    "all pinned (`static`)": ["memory.preload=popular", "memory.eviction=static"],
}


def residency() -> str:
    """Pinned experts beside a cache: found, and tokens/s on three machines, on gpt-oss-20b's real routing."""
    return _by_machine(RESIDENCY, lambda data: f"{data['hit_rate']:.1%}", "found", "kept")


#: Guesses as routers of later layers make them: this good one, two and three layers ahead.
NEXT_GATE = "predictor.recall_by_horizon=[0.85,0.75,0.65]"
GUESSES = {
    "none": [],
    "1 layer ahead": ["prefetch.lookahead=1", NEXT_GATE],
    "3 layers ahead": ["prefetch.lookahead=3", NEXT_GATE],
    "3 layers ahead, drafts at .6": ["prefetch.lookahead=3", NEXT_GATE, "predictor.draft_recall=0.6"],
    "3 layers ahead, by rank": ["prefetch.lookahead=3", NEXT_GATE, "copy.discipline=priority", "copy.drop_stale=true"],
}


def next_gate() -> str:
    """Guesses of later layers' routers by how far they look: found, and tokens/s on three machines."""
    return _by_machine(
        GUESSES, lambda data: f"{data['hit_rate']:.1%} + {data['late_rate']:.1%}", "found + late", "guesses"
    )


def _by_machine(rows: dict[str, list[str]], said: Callable[[dict[str, Any]], str], column: str, what: str) -> str:
    """Returns a table of variants of BASE on the real routing: what is said of the first machine, tokens/s of each."""
    trace, cells = real_routing(), []
    for name, changed in rows.items():
        row = [name]
        for number, machine in enumerate(MACHINES.values()):
            scenario = load_scenario("synthetic", [*BASE, *machine, *changed, "workload.warmup=0tokens"])
            data = simulate_inputs(load_inputs(scenario, trace=trace), baselines=False).data
            row += [said(data)] * (not number) + [f"{data['tokens_per_second']:.1f}"]
        cells.append(row)
    return table([what, column, *MACHINES], cells)


#: How a prompt of 1,024 tokens is computed with room for two layers of 24.
STREAMS = {
    "on demand": ["prefetch.lookahead=0"],
    "the router's guesses, 1 layer ahead": ["prefetch.lookahead=1", NEXT_GATE],
    "`next-layer`": ["prefetch.policy=next-layer", "prefetch.lookahead=1"],
    "`stream-prefill`": ["prefetch.policy=stream-prefill", "prefetch.lookahead=1", NEXT_GATE],
}


def streams() -> str:
    """Layers that stream through two buffers: ms to the first token, and tokens/s of 32 decoded behind it."""
    drawn = [
        "workload.synthetic.tokens=1056",
        "workload.synthetic.prefill_tokens=1024",
        "workload.synthetic.sequences=1",
        "memory.gpu_budget=8.34%",
    ]
    rows = []
    for name, changed in STREAMS.items():
        row = [name]
        for machine in MACHINES.values():
            scenario = load_scenario("synthetic", [*BASE, *machine, *drawn, *changed, "workload.warmup=0tokens"])
            data = simulate_inputs(load_inputs(scenario), baselines=False).data
            row.append(f"{data['time_to_first_token_ms']['p50']:,.0f} / {data['tokens_per_second']:.1f}")
        rows.append(row)
    return table(["a prompt's experts", *(f"{name}: ms, tokens/s" for name in MACHINES)], rows)


#: Real routing, by model, and the shares of the experts that the GPU and host memory have room for.
ROUTED = {"gpt-oss-20b": "gpt-oss-20b", "qwen3-30b-a3b": "qwen3-30b-a3b_k6", "olmoe-1b-7b": "olmoe-1b-7b"}
ROOMS = (("25%", "25%"), ("25%", "50%"), ("35%", "50%"), ("25%", "75%"))
#: Two machines with a drive, and the rules of what host memory keeps.
WITH_DRIVE = {
    "RTX 4090, PCIe 4": ["machine.gpu=rtx4090", "machine.cpu=7950x", "machine.drive=990pro"],
    "RTX 3090, PCIe 4": ["machine.profile=rtx3090-nvme"],
}
INCLUSIONS = ("inclusive", "exclusive")


def inclusion() -> str:
    """What host memory over a drive has of the copies to the GPU, and tokens/s, by which of them it keeps."""
    columns = ["routing", "GPU", "host memory", *(f"found there, {rule}" for rule in INCLUSIONS)]
    columns += [f"{machine}: tokens/s, {rule}" for machine in WITH_DRIVE for rule in INCLUSIONS]
    rows = []
    for model, name in ROUTED.items():
        trace = open_trace(Path(os.environ["PRESTAGE_TRACES"]) / f"{name}.npz")
        trace = trace.select(slice(0, min(TOKENS, trace.tokens)))
        base = [f"model.preset={model}", f"model.top_k={trace.k}", "prefetch.lookahead=0", "dispatch.mode=graph"]
        for gpu, host in ROOMS:
            found, speeds = [], []
            for number, machine in enumerate(WITH_DRIVE.values()):
                for rule in INCLUSIONS:
                    room = [f"memory.gpu_budget={gpu}", f"tiers.host_budget={host}", f"tiers.inclusion={rule}"]
                    scenario = load_scenario("synthetic", [*base, *machine, *room, "workload.warmup=0tokens"])
                    data = simulate_inputs(load_inputs(scenario, trace=trace), baselines=False).data
                    found += [] if number else [f"{data['tiers']['host_hit_rate']:.0%}"]
                    speeds.append(f"{data['tokens_per_second']:.1f}")
            rows.append([model, gpu, host, *found, *speeds])
    return table(columns, rows)
