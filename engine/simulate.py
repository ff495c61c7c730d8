"""From a scenario to a result: load what it names, check that it fits together, run it, measure it.

`simulate` runs the scenario and, for comparison, baselines of it: everything resident, no prefetch with every expert
dropped after its visit, and, when asked, the same cache without prefetch.
"""

from __future__ import annotations

import hashlib
import itertools
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..resources.network import Carried
from ..resources.profile import load_profile
from ..resources.spool import Spool
from ..resources.timeline import Timeline
from ..workloads.batches import Step, continued_steps, plan_steps
from ..workloads.fitted import FittedRouting
from ..workloads.guesses import Guesses
from ..workloads.importers import open_trace
from ..workloads.model import Model, load_model
from ..workloads.synthetic import synthesize
from ..workloads.trace import RoutingTrace
from .costs import Costs
from .decoder import decode
from .dispatch import Visit, visits
from .expert_parallel import held, place, run_placed, sent_tokens_and_experts, shadow_misses, sharing_metrics
from .gpu import Decoded
from .inputs import Inputs
from .links import Links
from .memory_manager import BudgetError, MemoryManager
from .offloading import kept_bytes, low_precision, make_miss, plain, preload
from .output import metrics as measure
from .output.merge import link_usage, merged_timeline, run_metrics, step_metrics
from .output.merge import makespan_ns as run_ns
from .output.misses import offloading_metrics
from .partition import divider
from .pipeline import StageRun, decode_stages, flow_of, pipeline_routes, sent
from .policies.eviction import EVICTION, Setting
from .policies.prefetch import PREFETCH, Gauge, NoPrefetch, Options, Prefetch
from .policies.prefetch_share import PREFETCH_SHARE
from .predicting import FREE, predictor_cost, scenario_predictor, with_latency
from .replicates import replicate_costs, summary, without_uncertainty
from .scenario import (
    MemorySection,
    PredictorSection,
    PrefetchSection,
    Scenario,
    ScenarioError,
    TiersSection,
    parse_budget,
    parse_bytes,
)
from .stages import OF_WHOLE_MODEL, SAMPLE_STEPS, stage_inputs, stage_layers
from .tiers import HostMemory
from .warnings import warnings_of

#: Called with what is running, and how many of how many layer visits are done.
Progress = Callable[[str, int, int], None]
#: Passes visits on, perhaps counting them.
Watch = Callable[[Iterator[Visit]], Iterator[Visit]]
#: What a run is compared with, and what progress calls it.
BASELINES = {
    "resident": "all resident",
    "baseline": "no prefetch, no cache",
    "no_prefetch": "same cache, no prefetch",
}


@dataclass(frozen=True)
class Result:
    """A finished run: `data` is plain data for JSON (without `wall_s`), `recordings` all that each GPU recorded.

    `previous` is what `merge.step_metrics` takes.
    """

    data: dict[str, Any]
    recordings: list[measure.Recording]
    wall_s: float
    previous: Sequence[int] | None = None

    @property
    def recording(self) -> measure.Recording:
        """The recording of a run on one GPU; ValueError if there are several."""
        (only,) = self.recordings
        return only

    @cached_property
    def timeline(self) -> Timeline:
        """The timeline of the run, all GPUs on it."""
        return merged_timeline(self.recordings)

    def json_data(self) -> dict[str, Any]:
        """Return `data` with `wall_s`, the one number that differs between runs of one scenario."""
        return {**self.data, "wall_s": self.wall_s}


def load_inputs(scenario: Scenario, trace: RoutingTrace | None = None) -> Inputs:
    """Load the model, profile and trace of a scenario and compute its predictions; a `trace` given is used instead.

    Raises ValueError (ScenarioError, ModelError, ProfileError, TraceError) if something is missing or does not fit.
    """
    model = load_model(scenario.model.preset, **scenario.model.overrides())
    profile = load_profile(scenario.machine.profile)
    trace = _load_trace(scenario, model) if trace is None else trace
    _check_fit(trace, model)
    if scenario.model.sizes == "trace":
        model = _sized(model, trace)
    workload = scenario.workload
    steps = plan_steps(
        trace.sequence,
        trace.phase,
        batch=workload.batch,
        prefill=workload.prefill,
        chunk_tokens=workload.chunk_tokens,
        tokens=workload.tokens,
        micro_batches=scenario.parallel.micro_batches,
    )
    if not steps:
        raise ScenarioError(
            f"workload.trace: no token is left to run: {trace.tokens} tokens, workload.prefill = {workload.prefill!r}"
        )
    return completed(Inputs(scenario, model, profile, trace, steps, budget_bytes=0, guesses=None))


def completed(bare: Inputs) -> Inputs:
    """Return inputs with the guesses and budgets that the scenario wants, and its stages; ValueError if it cannot run.

    `bare` inputs have neither; guesses that they do have are kept.
    """
    parallel = bare.scenario.parallel
    if parallel.gpus > 1:
        guesses = bare.guesses or _guesses(bare.scenario, bare.model, bare.trace, bare.steps)
        predictor = predictor_cost(bare.scenario.predictor) if guesses is not None else FREE
        return place(replace(bare, guesses=guesses, predictor=predictor), make_manager)
    return _in_stages(bare) if max(parallel.stages, parallel.micro_batches) > 1 else _on_one_gpu(bare)


def _on_one_gpu(bare: Inputs) -> Inputs:
    """Return the inputs of a whole model, or of one stage."""
    scenario, model, trace, steps = bare.scenario, bare.model, bare.trace, bare.steps
    guesses = bare.guesses or _guesses(scenario, model, trace, steps)
    budget_bytes = scenario.memory.budget_bytes(model.expert_bytes, model.experts)
    predictor = predictor_cost(scenario.predictor) if guesses is not None else FREE
    budgets = expert_budgets(scenario, model, trace, steps, budget_bytes, predictor.gpu_memory_bytes)
    if budgets is not None:
        budget_bytes = max(budgets)
        try:
            divider(scenario.memory.scope, model.expert_bytes, trace)(min(budgets))
        except BudgetError as error:
            given = f"memory.total_bytes = {scenario.memory.total_bytes!r}"
            raise ScenarioError(f"{given}: less dense weights, KV cache, workspace and predictor, {error}") from None
    inputs = replace(bare, budget_bytes=budget_bytes, guesses=guesses, budgets=budgets, predictor=predictor)
    # Before anything runs, these refuse a budget that is too small and what the profile or the trace lacks.
    make_manager(inputs)
    make_host_memory(inputs)
    make_miss(inputs)
    Costs(model, bare.profile, scenario)
    return inputs


def _in_stages(whole: Inputs) -> Inputs:
    """Return inputs with those of each stage of a pipeline; raise if a stage cannot run, or a link is not there."""
    scenario, stages = whole.scenario, whole.scenario.parallel.stages
    if stages > 1:
        links = Links(whole.profile, scenario, stages, "parallel.stages")
        pipeline_routes(links)  # refuses GPUs that no copy can go between
        whole = replace(whole, links=links)
    if scenario.predictor.name in OF_WHOLE_MODEL:
        whole = replace(whole, guesses=_guesses(scenario, whole.model, whole.trace, whole.steps))

    def cut(counts: Sequence[int], steps: list[Step]) -> Inputs:
        parts = []
        for bare in stage_inputs(replace(whole, steps=steps), counts):
            try:
                parts.append(_on_one_gpu(bare))
            except (BudgetError, ScenarioError) as error:
                layers = f"{bare.first_layer}-{bare.first_layer + bare.model.layers - 1}"
                raise ScenarioError(f"the stage on {bare.device}, layers {layers}: {error}") from None
        budget_bytes = sum(part.budget_bytes for part in parts)
        return replace(
            whole, steps=steps, stages=tuple(parts), budget_bytes=budget_bytes, guesses=None,
            predictor=parts[0].predictor,
        )  # fmt: skip

    def makespan_ns(counts: Sequence[int]) -> int | None:
        try:
            first = cut(counts, whole.steps[:SAMPLE_STEPS])
        except ScenarioError:
            return None
        return run_ns(run_all(first, prepared(first, part_costs(first))))

    return cut(stage_layers(whole, makespan_ns), whole.steps)


def _guesses(scenario: Scenario, model: Model, trace: RoutingTrace, steps: list[Step]) -> Guesses | None:
    """Return what the scenario's predictor guesses; None if neither prefetch nor eviction goes by guesses."""
    policy = make_prefetch(scenario, model)
    horizons, ranks = (policy.horizons, policy.guesses) if policy.guesses else (0, 0)
    if not ranks and _evicts_by_guesses(scenario):
        horizons, ranks = max(1, scenario.prefetch.lookahead), scenario.prefetch.k or model.top_k
    if not ranks:
        return None
    guesses = scenario_predictor(scenario).guess(trace, steps, horizons, ranks)
    if policy.needs_confidences and guesses.confidences is None:
        raise ScenarioError(
            f"prefetch.policy = {scenario.prefetch.policy!r} needs confidences, and predictor.name = "
            f"{scenario.predictor.name!r} gives none: choose another of the two"
        )
    return guesses


def _evicts_by_guesses(scenario: Scenario) -> bool:
    policies = (EVICTION[name] for name in (scenario.memory.eviction, scenario.tiers.host_policy))
    return any(getattr(policy, "needs_guesses", False) for policy in policies)


def expert_budgets(
    scenario: Scenario, model: Model, trace: RoutingTrace, steps: list[Step], most_bytes: int, predictor_bytes: int = 0
) -> list[int] | None:
    """Return the expert budget before each step, `most_bytes` at most.

    It is what dense weights, KV cache, workspace and `predictor_bytes` leave of the total; None without a total.
    The KV cache holds every position of the sequences that run; a sequence leaves it with its last step.
    """
    memory = scenario.memory
    if memory.total_bytes is None:
        return None
    left_bytes = parse_bytes(memory.total_bytes) - parse_bytes(memory.workspace_bytes)
    left_bytes -= sum(model.dense_bytes) + model.head_bytes + predictor_bytes
    last_step = {int(name): index for index, step in enumerate(steps) for name in trace.sequence[step.rows]}
    context: dict[int, int] = {}
    budgets = []
    for index, step in enumerate(steps):
        for row in step.rows.tolist():
            context[int(trace.sequence[row])] = int(trace.position[row]) + 1
        kv_bytes = sum(context.values()) * model.kv_bytes_per_token
        budgets.append(min(most_bytes, left_bytes - kv_bytes))
        context = {name: tokens for name, tokens in context.items() if last_step[name] > index}
    return budgets


def simulate(
    scenario: Scenario,
    *,
    baselines: bool | Mapping[str, float] = True,
    check_prefetch: bool = False,
    replicates: int = 0,
    progress: Progress | None = None,
    stream: Path | None = None,
) -> Result:
    """Run a scenario; `baselines=False` leaves out the two runs that speedup and resident_ms need.

    `baselines` may also be makespans in ms that are known, by their names in BASELINES. `check_prefetch` also runs the
    same cache without prefetch. `replicates` more runs, with costs drawn from their uncertainty, give percentiles of
    makespan and tokens/s. `progress` is called with (what, done, total) layer visits. With a folder to
    `stream` to, the timeline and all else that grows with the run is kept in files there, a folder for each GPU, and
    not in memory. Raises ValueError if the scenario cannot run.
    """
    return simulate_inputs(
        load_inputs(scenario),
        baselines=baselines,
        check_prefetch=check_prefetch,
        replicates=replicates,
        progress=progress,
        stream=stream,
    )


def simulate_inputs(
    inputs: Inputs,
    *,
    baselines: bool | Mapping[str, float] = True,
    check_prefetch: bool = False,
    replicates: int = 0,
    progress: Progress | None = None,
    stream: Path | None = None,
) -> Result:
    """Run what `load_inputs` loaded, as `simulate` does."""
    scenario, model = inputs.scenario, inputs.model
    costs = part_costs(inputs)
    began = time.perf_counter()
    ready = prepared(inputs, costs, stream)
    recordings = run_all(inputs, ready, _watched(progress, "simulate", inputs.layer_visits))
    wall_s = time.perf_counter() - began
    previous = previous_steps(inputs)
    data = run_metrics(recordings, _shadow_misses(inputs, ready, stream), previous)
    data["deduplication"] = _deduplication(inputs)
    if inputs.links is not None:
        data["links"] = link_usage(recordings, inputs.links, _sent(inputs, recordings, inputs.links))
    if inputs.placed is not None:
        data["sharing"] = sharing_metrics(inputs, recordings)
    known = dict(baselines) if isinstance(baselines, Mapping) else {}
    wanted = ["resident", "baseline"] if baselines is True else []
    if check_prefetch:
        wanted.append("no_prefetch")
        if not any(gpu.prefetch.horizons for gpu in ready):
            known["no_prefetch"] = data["makespan_ms"]
    known.update((name, run_baseline(name, inputs, costs, progress, stream)) for name in wanted if name not in known)
    data.update(_compared(known, data))
    if replicates:
        data["replicates"] = summary(_replicates(inputs, replicates, progress))
    low_bytes = low_precision(inputs)[1]
    if not inputs.stages:
        data.update(offloading_metrics(recordings[0], costs[0], scenario, low_bytes))
    estimates = [own.estimates for own in costs] + ([inputs.links.estimates] if inputs.links is not None else [])
    data["estimates"] = dict(sorted((what, rule) for known in estimates for what, rule in known.items()))
    data["seed"] = scenario.seed
    data["predictor"] = asdict(inputs.predictor)
    data["warnings"] = warnings_of(inputs, data)
    if replicates and (missing := without_uncertainty(inputs.profile)):
        data["warnings"].append(
            f"the percentiles are too narrow: profile {inputs.profile.name} does not say how far {', '.join(missing)} "
            f"can be off; calibrate this machine"
        )
    data["predictions_sha256"] = _digest(inputs)
    data["model"] = {"name": model.name, "layers": model.layers, "experts": model.experts, "top_k": model.top_k}
    data["budget_bytes"] = sum(gpu["budget_bytes"] for gpu in data["gpus"]) + low_bytes
    data["expert_bytes_total"] = model.total_expert_bytes
    data["scenario"] = scenario.plain()
    data["versions"] = versions()
    return Result(data, recordings, wall_s, previous)


def versions() -> dict[str, str]:
    """Return the versions of what makes a result."""
    return {
        "prestage": version("prestage"),
        "python": platform.python_version(),
        "simpy": version("simpy"),
        "numpy": version("numpy"),
    }


def make_prefetch(scenario: Scenario, model: Model, copy_ns: int = 0) -> Prefetch:
    """Return the scenario's prefetch policy; `k` left out means the model's top-k, lookahead 0 no prefetch.

    `copy_ns` is what the copy of one expert takes, for policies that weigh it.
    """
    settings = scenario.prefetch
    if settings.lookahead == 0:
        return NoPrefetch()
    k = model.top_k if settings.k is None else settings.k
    if k > model.experts:
        raise ScenarioError(f"prefetch.k = {k}: a layer has {model.experts} experts")
    return PREFETCH[settings.policy](
        Options(
            k,
            settings.lookahead,
            threshold=settings.threshold,
            decay=settings.decay,
            layers=model.layers,
            experts=model.experts,
            copy_ns=copy_ns,
        )
    )


def make_manager(inputs: Inputs, spool: Spool | None = None) -> MemoryManager:
    """Return a fresh memory manager as the scenario wants it; `spool` keeps its records, and its GPU's."""
    memory, model = inputs.scenario.memory, inputs.model
    sizes, size_of = kept_bytes(inputs)
    share = None
    if memory.prefetch_limit != "none":
        share = PREFETCH_SHARE[memory.prefetch_limit](memory.prefetch_share, inputs.budget_bytes // max(sizes))
    setting = Setting(seed=inputs.scenario.seed, trace=inputs.trace, steps=inputs.steps, guesses=inputs.guesses)
    manager = MemoryManager(
        sizes,
        model.experts,
        inputs.budget_bytes - low_precision(inputs)[1],
        EVICTION[memory.eviction],
        setting=setting,
        scope=memory.scope,
        divide=divider(memory.scope, size_of or sizes, inputs.trace),
        protect=inputs.scenario.prefetch.protect,
        drop_after_visit=not memory.caching,
        prefetch_share=share,
        watch_unused=inputs.scenario.prefetch.policy == "adaptive-memory",
        size_of=size_of,
        spool=spool,
    )
    preload(manager, inputs)
    return manager


def make_host_memory(inputs: Inputs) -> HostMemory | None:
    """Return a fresh, empty cache in host memory as the scenario wants it; None if host memory holds every expert."""
    model, tiers, scope = inputs.model, inputs.scenario.tiers, inputs.scenario.memory.scope
    if tiers.host_budget == "all":
        return None
    scope = "shared" if scope == "shared" else "global"
    budget_bytes = parse_budget(tiers.host_budget, model.expert_bytes, model.experts, scope)
    topology = inputs.profile.topology
    if topology is not None:
        there_bytes = sum(node.capacity_bytes or 0 for node in topology.nodes if node.kind == "host")
        if budget_bytes > there_bytes:
            raise ScenarioError(
                f"tiers.host_budget = {tiers.host_budget!r}: {budget_bytes / 2**30:.1f} GiB, but profile "
                f"{inputs.profile.name} has {there_bytes / 2**30:.1f} GiB of host memory"
            )
    setting = Setting(seed=inputs.scenario.seed, trace=inputs.trace, steps=inputs.steps, guesses=inputs.guesses)
    try:
        manager = MemoryManager(
            model.expert_bytes, model.experts, budget_bytes, EVICTION[tiers.host_policy], setting=setting, scope=scope
        )
    except BudgetError as error:
        raise ScenarioError(f"tiers.host_budget = {tiers.host_budget!r}: {error}") from None
    return HostMemory(manager, model.expert_bytes)


def dispatched(
    inputs: Inputs,
    manager: MemoryManager,
    prefetch: Prefetch,
    gauge: Gauge | None = None,
    host_memory: HostMemory | None = None,
) -> Iterator[Visit]:
    """Return the visits of a run, decided one by one as they are asked for, those of host memory with them."""
    decided = visits(
        inputs.trace,
        inputs.steps,
        manager,
        prefetch,
        inputs.guesses,
        issue=inputs.scenario.prefetch.issue,
        gauge=gauge,
        budgets=inputs.budgets,
        to_host=inputs.scenario.tiers.prefetch == "host",
        miss=make_miss(inputs),
    )
    return decided if host_memory is None else host_memory.through(decided)


@dataclass(frozen=True)
class Prepared:
    """What one GPU runs, ready to run: its inputs, costs, memory manager and prefetch policy."""

    inputs: Inputs
    costs: Costs
    manager: MemoryManager
    prefetch: Prefetch


def part_costs(inputs: Inputs) -> list[Costs]:
    """Return the costs of each GPU of a run."""
    return [Costs(part.model, part.profile, with_latency(part.scenario, part.predictor)) for part in inputs.parts]


def prepared(inputs: Inputs, costs: Sequence[Costs], stream: Path | None = None) -> list[Prepared]:
    """Return what each GPU of a run needs, as the scenario wants it; `stream` is a folder for what is recorded."""
    ready = []
    for part, own in zip(inputs.parts, costs, strict=True):
        manager = make_manager(part, Spool(None if stream is None else stream / part.device))
        prefetch = make_prefetch(part.scenario, part.model, own.copies[0].queued_ns)
        ready.append(Prepared(part, own, manager, prefetch))
    return ready


def run_all(inputs: Inputs, ready: Sequence[Prepared], watch: Watch = iter) -> list[measure.Recording]:
    """Simulate one run and return what was recorded on each GPU."""
    if inputs.placed is not None:
        each = [(gpu.costs, gpu.manager, gpu.prefetch) for gpu in ready]
        all_steps = [replace(gpu, inputs=replace(gpu.inputs, steps=inputs.steps)) for gpu in ready]
        return [_recording(gpu, found) for gpu, found in zip(all_steps, run_placed(inputs, each, watch), strict=True)]
    if not inputs.stages:
        (gpu,) = ready
        return [run(gpu.inputs, gpu.costs, gpu.manager, gpu.prefetch, watch)]
    runs = []
    for gpu in ready:
        gauge, prefetching = Gauge(), gpu.prefetch.guesses > 0
        visits = watch(dispatched(gpu.inputs, gpu.manager, gpu.prefetch, gauge))
        runs.append(StageRun(visits, gpu.manager, gpu.costs, gpu.inputs.scenario, prefetching, gauge))
    decoded = decode_stages(
        runs,
        flow_of(inputs.model, inputs.trace, inputs.steps),
        inputs.links,
        one_thread=inputs.scenario.parallel.dispatch_threads == "one",
    )
    return [_recording(gpu, found) for gpu, found in zip(ready, decoded, strict=True)]


def run(
    inputs: Inputs, costs: Costs, manager: MemoryManager, prefetch: Prefetch, watch: Watch = iter
) -> measure.Recording:
    """Simulate a run on one GPU with the given manager and prefetch policy, and return what was recorded."""
    gauge = Gauge()
    host_memory = make_host_memory(inputs)
    decoded: Decoded = decode(
        watch(dispatched(inputs, manager, prefetch, gauge, host_memory)),
        inputs.steps,
        manager,
        costs,
        inputs.scenario,
        prefetching=prefetch.guesses > 0,
        gauge=gauge if prefetch.uses_clock else None,
        host_memory=host_memory,
    )
    return _recording(Prepared(inputs, costs, manager, prefetch), decoded, host_memory)


def _recording(gpu: Prepared, decoded: Decoded, host_memory: HostMemory | None = None) -> measure.Recording:
    """Return what one GPU recorded, with what its metrics need."""
    inputs, costs, sizes = gpu.inputs, gpu.costs, gpu.manager.size_of
    pieces = [cost.pieces if costs.by_priority else 1 for cost in costs.copies]
    moved = None
    if inputs.scenario.compression.mixed is not None:
        moved = (sizes, [costs.copy(size_bytes).pieces if costs.by_priority else 1 for size_bytes in sizes])
    return measure.Recording(
        decoded, gpu.manager, inputs.trace, inputs.steps, costs.expert_bytes, pieces, costs.kernel_lags,
        inputs.device, inputs.first_layer, host_memory, moved,
    )  # fmt: skip


def previous_steps(inputs: Inputs) -> list[int] | None:
    """Return the step that each step of a pipeline goes on from, as `merge.step_metrics` takes them."""
    if not inputs.stages:
        return None
    return [max(before, default=-1) for before in continued_steps(inputs.steps, inputs.trace.sequence)]


def _watched(progress: Progress | None, what: str, total: int) -> Watch:
    """Return what tells `progress` of every hundredth part of the visits."""
    if progress is None:
        return iter
    every = max(1, total // 100)
    counter = itertools.count(1)  # over all GPUs

    def watch(visits: Iterator[Visit]) -> Iterator[Visit]:
        for visit in visits:
            done = next(counter)
            if done % every == 0 or done == total:
                progress(what, done, total)
            yield visit

    return watch


def run_baseline(
    name: str, inputs: Inputs, costs: Sequence[Costs], progress: Progress | None = None, stream: Path | None = None
) -> float:
    """Return the makespan in ms of one of BASELINES, given the costs of each GPU; `stream` as `simulate` takes it."""
    if name != "no_prefetch" and not inputs.scenario.only_fetches:
        inputs = replace(inputs, scenario=plain(inputs.scenario))
        costs = part_costs(inputs)
    if name == "resident":
        inputs = replace(inputs, budgets=None, stages=tuple(replace(stage, budgets=None) for stage in inputs.stages))
    if name != "no_prefetch" and inputs.placed is not None:
        inputs = replace(inputs, placed=replace(inputs.placed, spare_experts=0))
    ready = [
        Prepared(part, own, _baseline_manager(name, part, Spool(stream, keep=False)), NoPrefetch())
        for part, own in zip(inputs.parts, costs, strict=True)
    ]
    makespan_ns = run_ns(run_all(inputs, ready, _watched(progress, BASELINES[name], inputs.layer_visits)))
    for gpu in ready:
        gpu.manager.spool.remove()
    return makespan_ns / 1e6


def _baseline_manager(name: str, inputs: Inputs, spool: Spool) -> MemoryManager:
    """Return the memory manager of one of BASELINES on one GPU."""
    if name == "no_prefetch":
        return make_manager(inputs, spool)
    model, resident = inputs.model, name == "resident"
    manager = MemoryManager(
        model.expert_bytes,
        model.experts,
        model.total_expert_bytes if resident else inputs.budget_bytes,
        EVICTION["lru"],
        drop_after_visit=not resident,
        spool=spool,
    )
    if resident:
        manager.preload(range(model.total_experts) if inputs.placed is None else held(inputs.placed, inputs.device))
    return manager


def baseline_scenario(name: str, scenario: Scenario) -> Scenario:
    """Return the scenario with all that one of BASELINES does not depend on at its default: equal ones share it."""
    changes: dict[str, Any] = {"prefetch": PrefetchSection(lookahead=0)}
    if name == "resident":
        changes["memory"], changes["tiers"] = MemorySection(gpu_budget="100%"), TiersSection()
    elif name == "baseline":
        kept = {"gpu_budget", "scope", "total_bytes", "workspace_bytes"}  # the scope says what a share is of
        changes["memory"] = MemorySection(**scenario.memory.model_dump(include=kept))
    if name != "no_prefetch":
        scenario = plain(scenario)
    if name != "no_prefetch" or not getattr(EVICTION[scenario.memory.eviction], "needs_guesses", False):
        changes["predictor"] = PredictorSection()
    return scenario.model_copy(update=changes)


def _compared(known: Mapping[str, float], data: dict[str, Any]) -> dict[str, float | None]:
    """Return the makespans of the baselines that are known and what compares the run with them."""
    compared: dict[str, float | None] = {f"{name}_ms": known[name] for name in sorted(known)}
    if "baseline" in known:
        compared["speedup"] = speedup = known["baseline"] / data["makespan_ms"]
        used = data["memory_utilization"]
        compared["efficiency"] = speedup / used if used else None
    if "no_prefetch" in known:
        compared["prefetch_speedup"] = known["no_prefetch"] / data["makespan_ms"]
    return compared


def _replicates(inputs: Inputs, count: int, progress: Progress | None) -> list[dict[str, Any]]:
    """Return makespan and tokens/s of each replicate."""
    results = []
    scenario, profile = with_latency(inputs.scenario, inputs.predictor), inputs.profile
    # The same seed for all GPUs: what is drawn is how far the profile is off, and they share it.
    drawn = zip(*(replicate_costs(part.model, profile, scenario, count) for part in inputs.parts), strict=True)
    for number, costs in enumerate(drawn, 1):
        recordings = run_all(inputs, prepared(inputs, costs))
        speed = step_metrics(recordings, previous_steps(inputs))
        results.append({"makespan_ms": run_ns(recordings) / 1e6, "tokens_per_second": speed["tokens_per_second"]})
        if progress is not None:
            progress("replicates", number, count)
    return results


def _shadow_misses(
    inputs: Inputs, ready: Sequence[Prepared], stream: Path | None
) -> list[npt.NDArray[np.int64] | None]:
    """Return what the same caches without prefetch miss, as `measure.miss_keys`; None if nothing is prefetched."""
    if not any(gpu.prefetch.horizons for gpu in ready):
        return [None] * len(ready)
    managers = [make_manager(part, Spool(stream, keep=False)) for part in inputs.parts]
    if inputs.placed is not None:
        missed = shadow_misses(inputs, managers)
    else:
        shadows = [dispatched(part, own, NoPrefetch()) for part, own in zip(inputs.parts, managers, strict=True)]
        missed = [
            measure.miss_keys(own, part.model.total_experts) for own, part in zip(shadows, inputs.parts, strict=True)
        ]
    for manager in managers:  # what is mapped stays readable
        manager.spool.remove()
    return list(missed)


def _sent(inputs: Inputs, recordings: Sequence[measure.Recording], links: Links) -> list[Carried]:
    """Return what GPUs have sent each other."""
    if inputs.placed is not None:
        return sent_tokens_and_experts(inputs, recordings, links)
    return sent(recordings, flow_of(inputs.model, inputs.trace, inputs.steps), links)


def _digest(inputs: Inputs) -> str | None:
    """Return what identifies the guesses of a run, those of all GPUs together; None if there are none."""
    digests = [part.guesses.digest for part in inputs.guessers if part.guesses is not None]
    if len(digests) < 2:
        return digests[0] if digests else None
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _deduplication(inputs: Inputs) -> dict[str, int] | None:
    """Return how many guesses there are, how many differ, and the bytes of experts that tokens of a batch guess again.

    Asking once for each saves at most these bytes: a copy of what is assigned already would not be made anyway. None
    where nobody guesses.
    """
    counted = [_guess_counts(part, part.guesses) for part in inputs.guessers if part.guesses is not None]
    return {name: sum(counts[name] for counts in counted) for name in counted[0]} if counted else None


def _guess_counts(inputs: Inputs, guesses: Guesses) -> dict[str, int]:
    """Return what `_deduplication` tells of one GPU."""
    guessed = unique = shared_bytes = first = 0
    sizes = np.array(inputs.model.expert_bytes, dtype=np.int64)
    layers, horizons = guesses.experts.shape[1:3]
    target = (np.arange(layers)[:, None] + np.arange(1, horizons + 1)) % layers
    for step in inputs.steps:
        last = first + len(step.rows)
        # (layer, horizon, every guess of the step's tokens), sorted: equal guesses lie side by side.
        together = np.moveaxis(guesses.experts[first:last], 0, -1).reshape(layers, horizons, -1)
        together = np.sort(together, axis=-1)
        valid = together >= 0
        again = np.zeros_like(valid)
        again[..., 1:] = (together[..., 1:] == together[..., :-1]) & valid[..., 1:]
        guessed += int(valid.sum())
        unique += int((valid & ~again).sum())
        shared_bytes += int((again.sum(axis=-1) * sizes[target]).sum())
        first = last
    return {"guessed": guessed, "unique": unique, "shared_bytes": shared_bytes}


def _load_trace(scenario: Scenario, model: Model) -> RoutingTrace:
    workload = scenario.workload
    if workload.trace is not None:
        return open_trace(workload.trace)
    assert workload.synthetic is not None
    synthetic = workload.synthetic
    if synthetic.fit is not None:
        return FittedRouting.load(synthetic.fit).synthesize(
            synthetic.tokens,
            sequences=synthetic.sequences,
            prefill_tokens=synthetic.prefill_tokens,
            seed=scenario.seed,
        )
    options = synthetic.model_dump(exclude={"fit", "tokens", "working_set"})
    return synthesize(
        synthetic.tokens,
        model.layers,
        model.experts,
        model.top_k,
        working_set=synthetic.working_set or model.experts,
        seed=scenario.seed,
        **options,
    )


def _sized(model: Model, trace: RoutingTrace) -> Model:
    """Return the model with the bytes of experts, and of dense parts where they are known, that a trace's log gives."""
    if "expert_bytes" not in trace.extra:
        raise ScenarioError("model.sizes = 'trace': the trace does not say how large its experts are: choose 'preset'")
    expert_bytes = tuple(trace.extra["expert_bytes"].tolist())
    dense_bytes = tuple(trace.extra["dense_bytes"].tolist()) if "dense_bytes" in trace.extra else model.dense_bytes
    return replace(model, expert_bytes=expert_bytes, dense_bytes=dense_bytes)


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
