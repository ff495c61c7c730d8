"""From a scenario to a result: load what it names, check that it fits together, run it, measure it.

`simulate` runs the scenario and, for comparison, two baselines of it: everything resident, and no prefetch with
every expert dropped after its visit.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

from ..resources.profile import Profile, load_profile
from ..resources.timeline import Timeline
from ..workloads.batches import Step, plan_steps
from ..workloads.importers import open_trace
from ..workloads.model import Model, load_model
from ..workloads.predictors import Guesses, make_predictor
from ..workloads.synthetic import synthesize
from ..workloads.trace import RoutingTrace
from .costs import Costs
from .decoder import Decoded, decode
from .dispatch import Visit, visits
from .memory_manager import MemoryManager
from .output import metrics as measure
from .policies.eviction import EVICTION, Setting
from .policies.prefetch import PREFETCH, NoPrefetch, Prefetch
from .scenario import Scenario, ScenarioError
from .warnings import warnings_of

#: Called with what is running, and how many of how many layer visits are done.
Progress = Callable[[str, int, int], None]
#: Passes visits on, perhaps counting them.
Watch = Callable[[Iterator[Visit]], Iterator[Visit]]


@dataclass(frozen=True)
class Inputs:
    """What a scenario names, loaded and checked: it can be run as it is, any number of times."""

    scenario: Scenario
    model: Model
    profile: Profile
    trace: RoutingTrace
    steps: list[Step]
    budget_bytes: int
    guesses: Guesses | None

    @property
    def layer_visits(self) -> int:
        """How many layer visits a run has."""
        return len(self.steps) * self.trace.layers


@dataclass(frozen=True)
class Result:
    """A finished run: `data` is plain data for JSON (without `wall_s`), `recording` all that was recorded."""

    data: dict[str, Any]
    recording: measure.Recording
    wall_s: float

    @property
    def timeline(self) -> Timeline:
        """The timeline of the run."""
        return self.recording.decoded.timeline

    def json_data(self) -> dict[str, Any]:
        """Return `data` with `wall_s`, the one number that differs between runs of one scenario."""
        return {**self.data, "wall_s": self.wall_s}


def load_inputs(scenario: Scenario) -> Inputs:
    """Load the model, profile and trace of a scenario and compute its predictions.

    Raises ValueError (ScenarioError, ModelError, ProfileError, TraceError) if something is missing or does not fit.
    """
    model = load_model(scenario.model.preset, **scenario.model.overrides())
    profile = load_profile(scenario.machine.profile)
    trace = _load_trace(scenario, model)
    _check_fit(trace, model)
    workload = scenario.workload
    steps = plan_steps(
        trace.sequence,
        trace.phase,
        batch=workload.batch,
        prefill=workload.prefill,
        chunk_tokens=workload.chunk_tokens,
        tokens=workload.tokens,
    )
    if not steps:
        raise ScenarioError(
            f"workload.trace: no token is left to run: {trace.tokens} tokens, workload.prefill = {workload.prefill!r}"
        )
    budget_bytes = scenario.memory.budget_bytes(model.expert_bytes, model.experts)
    policy = make_prefetch(scenario, model)
    guesses = None
    if policy.horizons:
        predictor = scenario.predictor
        options = {"recall": predictor.recall} if predictor.name == "oracle" else {}
        source = make_predictor(predictor.name, seed=scenario.seed, **options)
        guesses = source.guess(trace, steps, policy.horizons, policy.guesses)
    inputs = Inputs(scenario, model, profile, trace, steps, budget_bytes, guesses)
    make_manager(inputs)  # refuses a budget that is too small before anything runs
    return inputs


def simulate(scenario: Scenario, *, baselines: bool = True, progress: Progress | None = None) -> Result:
    """Run a scenario; `baselines=False` leaves out the two runs that speedup and resident_ms need.

    `progress` is called with (what, done, total) layer visits. Raises ValueError if the scenario cannot run.
    """
    return simulate_inputs(load_inputs(scenario), baselines=baselines, progress=progress)


def simulate_inputs(inputs: Inputs, *, baselines: bool = True, progress: Progress | None = None) -> Result:
    """Run what `load_inputs` loaded."""
    scenario, model = inputs.scenario, inputs.model
    costs = Costs(model, inputs.profile, scenario)
    began = time.perf_counter()
    prefetch = make_prefetch(scenario, model)
    recording = run(inputs, costs, make_manager(inputs), prefetch, _watched(progress, "simulate", inputs.layer_visits))
    data = measure.metrics(recording)
    wall_s = time.perf_counter() - began
    data["pollution"] = _pollution(inputs, recording) if inputs.guesses is not None else 0
    data.update(_baselines(inputs, costs, data, progress) if baselines else {})
    data["estimates"] = dict(sorted(costs.estimates.items()))
    data["warnings"] = warnings_of(inputs.trace, model, inputs.budget_bytes, scenario, data)
    data["seed"] = scenario.seed
    data["predictions_sha256"] = inputs.guesses.digest if inputs.guesses is not None else None
    data["model"] = {"name": model.name, "layers": model.layers, "experts": model.experts, "top_k": model.top_k}
    data["budget_bytes"] = recording.manager.budget_bytes
    data["expert_bytes_total"] = model.total_expert_bytes
    data["scenario"] = scenario.plain()
    data["versions"] = {
        "prestage": version("prestage"),
        "python": platform.python_version(),
        "simpy": version("simpy"),
        "numpy": version("numpy"),
    }
    return Result(data, recording, wall_s)


def make_prefetch(scenario: Scenario, model: Model) -> Prefetch:
    """Return the scenario's prefetch policy; `k` left out means the model's top-k, lookahead 0 no prefetch."""
    settings = scenario.prefetch
    if settings.lookahead == 0:
        return NoPrefetch(0, 0)
    k = model.top_k if settings.k is None else settings.k
    if k > model.experts:
        raise ScenarioError(f"prefetch.k = {k}: a layer has {model.experts} experts")
    return PREFETCH[settings.policy](k, settings.lookahead)


def make_manager(inputs: Inputs) -> MemoryManager:
    """Return a fresh memory manager as the scenario wants it."""
    memory = inputs.scenario.memory
    return MemoryManager(
        inputs.model.expert_bytes,
        inputs.model.experts,
        inputs.budget_bytes,
        EVICTION[memory.eviction],
        setting=Setting(seed=inputs.scenario.seed, trace=inputs.trace, steps=inputs.steps, guesses=inputs.guesses),
        scope=memory.scope,
        protect=inputs.scenario.prefetch.protect,
    )


def dispatched(inputs: Inputs, manager: MemoryManager, prefetch: Prefetch) -> Iterator[Visit]:
    """Return the visits of a run, decided one by one as they are asked for."""
    return visits(inputs.trace, inputs.steps, manager, prefetch, inputs.guesses, issue=inputs.scenario.prefetch.issue)


def run(
    inputs: Inputs, costs: Costs, manager: MemoryManager, prefetch: Prefetch, watch: Watch = iter
) -> measure.Recording:
    """Simulate one run with the given manager and prefetch policy, and return what was recorded."""
    decoded: Decoded = decode(
        watch(dispatched(inputs, manager, prefetch)),
        inputs.steps,
        inputs.trace.layers,
        manager,
        costs,
        inputs.scenario,
        prefetching=prefetch.horizons > 0,
    )
    return measure.Recording(
        decoded, manager, inputs.trace, inputs.steps, inputs.model.expert_bytes, costs.kernel_gap_ns
    )


def _watched(progress: Progress | None, what: str, total: int) -> Watch:
    """Return what tells `progress` of every hundredth part of the visits."""
    if progress is None:
        return iter
    every = max(1, total // 100)

    def watch(visits: Iterator[Visit]) -> Iterator[Visit]:
        for done, visit in enumerate(visits, 1):
            if done % every == 0 or done == total:
                progress(what, done, total)
            yield visit

    return watch


def _baselines(inputs: Inputs, costs: Costs, data: dict[str, Any], progress: Progress | None) -> dict[str, Any]:
    """Return the makespans of the two baselines and what compares the run with them."""
    model = inputs.model

    def manager(budget_bytes: int, drop: bool) -> MemoryManager:
        return MemoryManager(model.expert_bytes, model.experts, budget_bytes, EVICTION["lru"], drop_after_visit=drop)

    def makespan_ms(what: str, manager: MemoryManager) -> float:
        watch = _watched(progress, what, inputs.layer_visits)
        return run(inputs, costs, manager, NoPrefetch(0, 0), watch).makespan_ns / 1e6

    resident = manager(model.total_expert_bytes, False)
    resident.preload(range(model.total_experts))
    resident_ms = makespan_ms("all resident", resident)
    baseline_ms = makespan_ms("no prefetch, no cache", manager(inputs.budget_bytes, True))
    speedup = baseline_ms / data["makespan_ms"]
    used = data["memory_utilization"]
    return {
        "baseline_ms": baseline_ms,
        "resident_ms": resident_ms,
        "speedup": speedup,
        "efficiency": speedup / used if used else None,
    }


def _pollution(inputs: Inputs, recording: measure.Recording) -> int:
    """Return the misses that the same cache without prefetch would not have had."""
    total = inputs.model.total_experts
    shadow = [
        visit.number * total + admission.expert
        for visit in dispatched(inputs, make_manager(inputs), NoPrefetch(0, 0))
        for wave in visit.waves
        for admission in wave.admitted
    ]
    misses: npt.NDArray[np.int64] = np.array(shadow, dtype=np.int64)
    return measure.pollution(recording, misses)


def _load_trace(scenario: Scenario, model: Model) -> RoutingTrace:
    workload = scenario.workload
    if workload.trace is not None:
        return open_trace(workload.trace)
    assert workload.synthetic is not None
    synthetic = workload.synthetic
    options = synthetic.model_dump(exclude={"tokens", "working_set"})
    return synthesize(
        synthetic.tokens,
        model.layers,
        model.experts,
        model.top_k,
        working_set=synthetic.working_set or model.experts,
        seed=scenario.seed,
        **options,
    )


def _check_fit(trace: RoutingTrace, model: Model) -> None:
    """Refuse a trace that is not of this model."""
    for key, given, wanted in (
        ("model.layers", trace.layers, model.layers),
        ("model.experts", trace.num_experts, model.experts),
        ("model.top_k", trace.k, model.top_k),
    ):
        if given != wanted:
            raise ScenarioError(
                f"{key} = {wanted} ({model.name}), but the trace has {given}: choose its model, or set {key} = {given}"
            )
