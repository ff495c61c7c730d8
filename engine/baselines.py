"""Baselines: the runs that a run is compared with, in a table.

To add one, write an entry of BASELINES: the scenario that it is, the inputs and memory managers that it runs with, and
what comes of its makespan. Its makespan itself is the result's `NAME_ms`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..resources.spool import Spool
from .costs.costs import Costs, part_costs
from .decide.memory_manager import MemoryManager
from .decide.partition import divider
from .decide.pools import BudgetError
from .loading.deciders import make_manager
from .loading.offloading import plain, served_experts
from .measure.merge import makespan_ns
from .policies.eviction import EVICTION
from .policies.prefetch import NoPrefetch
from .run import Prepared, Progress, begun_parts, run_all, watched
from .scenario.inputs import Inputs
from .scenario.scenario import Scenario
from .scenario.sections import PredictorSection, PrefetchSection, WorkloadSection
from .scenario.sections_memory import MemorySection, TiersSection

#: Figures of a run, as its result has them, by name.
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Baseline:
    """One thing that a run is compared with."""

    #: What progress calls it.
    label: str
    #: The scenario, with all at its default that the baseline does not depend on.
    scenario: Callable[[Scenario], Scenario]
    #: What it runs, made of the run's inputs.
    inputs: Callable[[Inputs], Inputs]
    #: A fresh memory manager for one GPU, whose records the spool keeps.
    manager: Callable[[Inputs, Spool], MemoryManager]
    #: What the result says of its makespan in ms, beside the run's figures.
    compared: Callable[[float, Figures], dict[str, float | None]]


def run_baseline(
    name: str, inputs: Inputs, costs: Sequence[Costs], progress: Progress | None = None, stream: Path | None = None
) -> float:
    """Returns the makespan in ms of one of BASELINES, given the costs of each GPU; `stream` as `simulate` takes it."""
    baseline = BASELINES[name]
    changed = baseline.inputs(inputs)
    if changed.scenario is not inputs.scenario:
        costs = part_costs(changed)
    ready = [
        Prepared(part, own, baseline.manager(part, Spool(stream, keep=False)), NoPrefetch())
        for part, own in begun_parts(changed, costs)
    ]
    ended_ns = makespan_ns(run_all(changed, ready, watched(progress, baseline.label, changed.layer_visits)))
    for gpu in ready:
        gpu.manager.spool.remove()
    return ended_ns / 1e6


def baseline_scenario(name: str, scenario: Scenario) -> Scenario:
    """Returns the scenario with all that one of BASELINES does not depend on at its default: equal ones share it."""
    return BASELINES[name].scenario(scenario)


def compared(known: Mapping[str, float], figures: Figures) -> dict[str, float | None]:
    """Returns the makespans in ms of the baselines that are known, by `NAME_ms`, and what compares a run with them."""
    said: dict[str, float | None] = {f"{name}_ms": known[name] for name in sorted(known)}
    for name in sorted(known):
        said |= BASELINES[name].compared(known[name], figures)
    return said


# Everything resident.


def _resident_scenario(scenario: Scenario) -> Scenario:
    everything = MemorySection(gpu_budget="100%", capacity="ignore")
    return _without_predictor(
        plain(_demand_only(scenario)).model_copy(update={"memory": everything, "tiers": TiersSection()})
    )


def _resident_inputs(inputs: Inputs) -> Inputs:
    fetching = _only_fetching(inputs)
    if fetching.pulls is not None:
        fetching = replace(fetching, pulls=replace(fetching.pulls, budget_of=None))
    return replace(fetching, budgets=None, stages=tuple(replace(stage, budgets=None) for stage in fetching.stages))


def _resident_manager(inputs: Inputs, spool: Spool) -> MemoryManager:
    model = inputs.model
    manager = MemoryManager(model.expert_bytes, model.experts, model.total_expert_bytes, EVICTION["lru"], spool=spool)
    manager.preload(served_experts(inputs))
    return manager


def _nothing_more(baseline_ms: float, figures: Figures) -> dict[str, float | None]:
    return {}


# No prefetch, and every expert dropped after its visit.


def _uncached_scenario(scenario: Scenario) -> Scenario:
    kept = {"gpu_budget", "scope", "total_bytes", "workspace_bytes"}  # the scope says what a share is of
    memory = MemorySection(**scenario.memory.model_dump(include=kept), capacity="ignore")
    changed = _inclusive(plain(_demand_only(scenario)))
    return _without_predictor(changed.model_copy(update={"memory": memory}))


def _uncached_inputs(inputs: Inputs) -> Inputs:
    fetching = _only_fetching(inputs)
    exclusive = fetching.scenario.tiers.inclusion == "exclusive"
    return replace(fetching, scenario=_inclusive(fetching.scenario)) if exclusive else fetching


def _inclusive(scenario: Scenario) -> Scenario:
    """Returns the scenario with host memory that keeps what it hands out: what is dropped comes back to no memory."""
    return scenario.model_copy(update={"tiers": scenario.tiers.model_copy(update={"inclusion": "inclusive"})})


def _uncached_manager(inputs: Inputs, spool: Spool) -> MemoryManager:
    model, scope = inputs.model, inputs.scenario.memory.scope
    sizes = model.expert_bytes
    divide = _with_room_for_one(divider(scope, sizes, inputs.trace), sizes)
    return MemoryManager(
        sizes, model.experts, inputs.budget_bytes, EVICTION["lru"], scope=scope, divide=divide,
        drop_after_visit=True, spool=spool,
    )  # fmt: skip


def _with_room_for_one(divide: Callable[[int], list[int]], sizes: Sequence[int]) -> Callable[[int], list[int]]:
    """Returns `divide` for experts that are not compressed any more: where a pool cannot hold one, all can."""

    def divided(budget_bytes: int) -> list[int]:
        try:
            return divide(budget_bytes)
        except BudgetError:
            return divide(len(sizes) * max(sizes))

    return divided


def _speedup(baseline_ms: float, figures: Figures) -> dict[str, float | None]:
    speedup, used = baseline_ms / figures["makespan_ms"], figures["memory_utilization"]
    return {"speedup": speedup, "efficiency": speedup / used if used else None}


# The same cache, no prefetch.


def _unprefetched_scenario(scenario: Scenario) -> Scenario:
    changed = _demand_only(scenario)
    by_guesses = getattr(EVICTION[scenario.memory.eviction], "needs_guesses", False)
    return changed if by_guesses else _without_predictor(changed)


def _same_inputs(inputs: Inputs) -> Inputs:
    return inputs


def _prefetch_speedup(baseline_ms: float, figures: Figures) -> dict[str, float | None]:
    return {"prefetch_speedup": baseline_ms / figures["makespan_ms"]}


# What several of them change.


def _demand_only(scenario: Scenario) -> Scenario:
    """Returns the scenario without prefetch, and with the default warmup, which changes no makespan."""
    warmup = WorkloadSection.model_fields["warmup"].default
    workload = scenario.workload.model_copy(update={"warmup": warmup})
    return scenario.model_copy(update={"prefetch": PrefetchSection(lookahead=0), "workload": workload})


def _without_predictor(scenario: Scenario) -> Scenario:
    return scenario.model_copy(update={"predictor": PredictorSection()})


def _only_fetching(inputs: Inputs) -> Inputs:
    """Returns the inputs with every miss fetched whole, and nothing lent between GPUs."""
    if not inputs.scenario.only_fetches:
        inputs = replace(inputs, scenario=plain(inputs.scenario))
    if inputs.expert_parallel is not None and inputs.expert_parallel.spare_experts:
        inputs = replace(inputs, expert_parallel=replace(inputs.expert_parallel, spare_experts=0))
    return inputs


BASELINES = {
    "resident": Baseline("all resident", _resident_scenario, _resident_inputs, _resident_manager, _nothing_more),
    "baseline": Baseline("no prefetch, no cache", _uncached_scenario, _uncached_inputs, _uncached_manager, _speedup),
    "no_prefetch": Baseline(
        "same cache, no prefetch", _unprefetched_scenario, _same_inputs, make_manager, _prefetch_speedup
    ),
}
