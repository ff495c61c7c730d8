"""Published tables, run again: ours beside theirs, row by row, with a verdict that says by how much and why.

Nothing is tuned to a row: a table's rows share one workload, stated in their scenarios. To add a table: write a
function that returns its rows, name it in TABLES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .scenario import load_scenario
from .simulate import Inputs, load_inputs, simulate_inputs
from .virtual_memory import VirtualMemoryManager, guesses_for_targets

_MIB = 2**20


@dataclass(frozen=True)
class Published:
    """One row of the guide's table: ranges in the units of our metrics; 2.8 ms is what rounds to it."""

    hit_rate: tuple[float, float]
    memory_utilization: tuple[float, float]
    avg_latency_ms: tuple[float, float]


#: "Memory Management Simulation Guide", Virtual Memory Performance, by the scenario that repeats the row.
VIRTUAL_MEMORY = {
    "guide-k5-1gb": Published((0.35, 0.40), (0.60, 0.70), (2.75, 2.85)),
    "guide-k10-2gb": Published((0.45, 0.50), (0.70, 0.80), (2.35, 2.45)),
    "guide-k20-4gb": Published((0.55, 0.60), (0.80, 0.90), (2.05, 2.15)),
}


def virtual_memory() -> list[dict[str, Any]]:
    """Return the guide's three configurations: in its own accounting, with copies charged, and overlapped.

    Experts belong to their layer; beside it stands what the guide's accounting gives if layers shared them. The
    overlapped engine makes the same decisions as the virtual memory manager, and hides of the copies what fits beside
    computation; its time per access is that of the whole run.
    """
    return [_configuration(name, published) for name, published in VIRTUAL_MEMORY.items()]


def _configuration(name: str, published: Published) -> dict[str, Any]:
    inputs = load_inputs(load_scenario(name))
    manager, metrics = _in_guides_accounting(inputs)
    _, shared = _in_guides_accounting(inputs, share_across_layers=True)
    reasons = _reasons(inputs, manager, metrics, published)
    bounds = vars(published)
    return {
        "scenario": name,
        "prefetch_k": manager.prefetch_k,
        "gpu_memory_limit_mb": inputs.budget_bytes / _MIB,
        "published": {key: list(ends) for key, ends in bounds.items()},
        "guide_accounting": metrics,
        "shared_across_layers": shared,
        "overlapped": _overlapped(inputs),
        "verdicts": {key: {**_verdict(metrics[key], *ends), "why": reasons[key]} for key, ends in bounds.items()},
    }


def _in_guides_accounting(
    inputs: Inputs, *, share_across_layers: bool = False
) -> tuple[VirtualMemoryManager, dict[str, Any]]:
    """Run a scenario of one sequence, batch 1 and experts of one size through the virtual memory manager."""
    scenario, model = inputs.scenario, inputs.model
    manager = VirtualMemoryManager(
        model.experts,
        model.expert_bytes[0] / _MIB,
        inputs.budget_bytes / _MIB,
        scenario.prefetch.k or model.top_k,
        num_layers=model.layers,
        share_across_layers=share_across_layers,
        eviction=scenario.memory.eviction,
        seed=scenario.seed,
        profile=scenario.machine.profile,
    )
    predictions = guesses_for_targets(inputs.guesses) if inputs.guesses is not None else ()
    return manager, manager.simulate_inference(inputs.trace, *predictions)


def _overlapped(inputs: Inputs) -> dict[str, Any]:
    """Run a scenario through the overlapped engine; memory is of the limit, as in the guide, not of whole experts."""
    data = simulate_inputs(inputs, baselines=False).data
    return {
        "hit_rate": data["hit_rate"],
        "late_rate": data["late_rate"],
        "time_per_access_ms": data["makespan_ms"] / data["accesses"],
        "memory_utilization": data["memory_utilization"] * data["budget_bytes"] / inputs.budget_bytes,
        "makespan_ms": data["makespan_ms"],
        "counts": data["counts"],
    }


def _verdict(ours: float, low: float, high: float) -> dict[str, Any]:
    """Say whether a figure lies inside its published range, and else how far from the nearer end."""
    off = min(0.0, ours - low) + max(0.0, ours - high)
    return {"ours": ours, "inside": not off, "off_by": off}


def _reasons(
    inputs: Inputs, manager: VirtualMemoryManager, metrics: dict[str, Any], published: Published
) -> dict[str, str]:
    """Explain each figure by what the run counted."""
    counts, accesses, layers = metrics["event_counts"], metrics["accesses"], inputs.model.layers
    slots = inputs.budget_bytes // inputs.model.expert_bytes[0]
    brought = (counts["prefetch"] + counts["miss"]) / accesses
    low_rate, high_rate = published.hit_rate
    formula_ms = manager.miss_ms - (manager.miss_ms - manager.hit_ms) * (low_rate + high_rate) / 2
    more_ms = sum(published.avg_latency_ms) / 2 - formula_ms
    return {
        "hit_rate": (
            f"{metrics['prefetch_hit_rate']:.1%} by prefetching, for the predictor is right with probability "
            f"{inputs.scenario.predictor.recall:.2%} at any k; {metrics['cache_hit_rate']:.1%} by caching, for "
            f"{brought:.1f} experts come in an access, so {slots} slots remember {slots / brought:.1f} accesses, and a "
            f"layer's next use is {layers} accesses away. More hits need a recall that grows with k, or a cache that "
            "prefetches cannot flush"
        ),
        "memory_utilization": (
            f"experts come at {brought:.1f} an access and leave only for others: once full "
            f"({slots} slots, {slots / brought:.1f} of {accesses:,} accesses), it stays full"
        ),
        "avg_latency_ms": (
            f"{manager.miss_ms:.2f} ms x miss rate + {manager.hit_ms:.2f} ms x hit rate. The published hit rate gives "
            f"{formula_ms:.2f} ms by this formula; the published latency has {more_ms:.2f} ms more, which nothing "
            "published explains"
        ),
    }


TABLES: dict[str, Callable[[], list[dict[str, Any]]]] = {"virtual-memory": virtual_memory}
