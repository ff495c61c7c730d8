"""Loading: from a scenario to inputs that can be run, checked as a whole before anything runs.

A trace, guesses and budgets are the same for every run of a scenario; of a pipeline each stage has its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..kept import KEPT, digest_of, file_state, frozen
from ..resources.profile import Profile, load_profile
from ..resources.runtime import load_runtime
from ..units import bytes_words
from ..workloads.batches import PlannedSteps, Step, every_row, plan_steps, warmup_steps
from ..workloads.by_layer import fitted_to, of_model
from ..workloads.fitted import FittedRouting, fit_file
from ..workloads.guesses import Guesses
from ..workloads.importers import open_trace, trace_file
from ..workloads.model import Model, load_model
from ..workloads.popularity import popular_trace
from ..workloads.synthetic import synthesize
from ..workloads.trace import RoutingTrace
from ..workloads.trace_limits import TraceError
from .costs.costs import Costs, part_costs
from .costs.runtime_costs import pieces_of
from .decide.partition import divider
from .decide.pools import BudgetError
from .loading.capacity import cached_bytes, check, fixed_parts
from .loading.deciders import make_host_memory, make_manager, make_prefetch
from .loading.drafting import with_draft_layers
from .loading.duration import check_duration
from .loading.expert_parallel import place
from .loading.links import links_of
from .loading.offloading import cached_budgets, kept_bytes, low_precision, make_miss
from .loading.requests import load_requests
from .loading.rerouting import rerouted
from .loading.stages import OF_WHOLE_MODEL, SAMPLE_STEPS, stage_inputs, stage_layers
from .measure.merge import makespan_ns as run_ns
from .policies.eviction import EVICTION
from .run import prepared, run_all
from .scenario.amounts import ScenarioError, parse_bytes
from .scenario.inputs import Inputs, Pulls
from .scenario.predicting import FREE, guesses_of, predictor_cost
from .scenario.scenario import Scenario
from .scenario.sections import DRAWN_BY

#: What a step that is kept takes beside its rows.
_STEP_BYTES = 256
#: In so many pieces an expert is copied at most: 4 KiB each of a quarter of a GiB.
MOST_PIECES = 1 << 16


def load_inputs(scenario: Scenario, trace: RoutingTrace | None = None, profile: Profile | None = None) -> Inputs:
    """Load the model, profile and trace of a scenario and compute its predictions.

    A `trace` or `profile` that is given is used instead of the one that it names.

    Raises ValueError (ScenarioError, ModelError, ProfileError, TraceError) if something is missing or does not fit.
    """
    model = load_model(scenario.model.preset, **scenario.model.overrides())
    profile = profile or load_profile(scenario.machine.profile)
    memory = scenario.memory.of_gpu(profile.capacity("gpu", "gpu0")[0] or profile.gpu_memory_bytes)
    scenario = scenario.model_copy(update={"memory": memory})
    trace = _load_trace(scenario, model) if trace is None else trace
    trace = _fitted(trace, model)
    if scenario.model.sizes == "trace":
        model = _sized(model, trace)
    _check_pieces(scenario, model)
    _check_alike(scenario, model)
    runtime = load_runtime(scenario.runtime.name)
    if scenario.requests is not None:
        if scenario.requests.draft_layers:
            model, trace = with_draft_layers(model, trace, scenario.requests.draft_layers)
        return with_requests(Inputs(scenario, model, profile, trace, [], 0, guesses=None, runtime=runtime))
    steps = steps_of(scenario, trace)
    if not steps:
        prefill = scenario.workload.prefill
        raise ScenarioError(
            f"workload.trace: no token is left to run: {trace.tokens} tokens, workload.prefill = {prefill!r}"
        )
    try:
        warmup_steps(steps, scenario.workload.warmup)
    except InputError as error:
        raise ScenarioError(f"workload.{error}") from None
    bare = Inputs(scenario, model, profile, trace, steps, budget_bytes=0, guesses=None, runtime=runtime)
    inputs = completed(bare)
    check_duration(inputs)
    return inputs


def steps_of(scenario: Scenario, trace: RoutingTrace) -> list[Step]:
    """Returns the steps that a scenario makes of a trace."""
    workload = scenario.workload
    asked = {
        "batch": workload.batch, "prefill": workload.prefill, "chunk_tokens": workload.chunk_tokens,
        "tokens": workload.tokens, "micro_batches": scenario.parallel.micro_batches,
    }  # fmt: skip
    key = (plan_steps, digest_of([trace.sequence, trace.phase]), *asked.values())
    return PlannedSteps(KEPT.get(key, lambda: plan_steps(trace.sequence, trace.phase, **asked), _bytes_of))  # type: ignore[arg-type]


def _bytes_of(steps: list[Step]) -> int:
    return frozen(step.rows for step in steps) + _STEP_BYTES * len(steps)


def completed(bare: Inputs) -> Inputs:
    """Returns inputs with the guesses and budgets that the scenario wants, and its stages; ValueError if it cannot run.

    `bare` inputs have neither; guesses that they do have are kept.
    """
    parallel = bare.scenario.parallel
    if parallel.gpus > 1:
        guesses = bare.guesses or _guesses(bare)
        predictor = predictor_cost(bare.scenario.predictor) if guesses is not None else FREE
        inputs = place(replace(bare, guesses=guesses, predictor=predictor), make_manager)
        inputs = _with_budgets(inputs)
    else:
        inputs = _in_stages(bare) if max(parallel.stages, parallel.micro_batches) > 1 else _on_one_gpu(bare)
    make_host_memory(inputs)  # refuses one without room for an expert
    check(inputs)
    return inputs


def _on_one_gpu(bare: Inputs) -> Inputs:
    """Returns the inputs of a whole model, or of one stage."""
    scenario, model = bare.scenario, bare.model
    guesses = bare.guesses or _guesses(bare)
    budget_bytes = scenario.memory.budget_bytes(model.expert_bytes, model.experts_by_layer)
    predictor = predictor_cost(scenario.predictor) if guesses is not None else FREE
    inputs = rerouted(_of_total(replace(bare, budget_bytes=budget_bytes, guesses=guesses, predictor=predictor)))
    # Before anything runs, these refuse a budget that is too small and what the profile or the trace lacks.
    make_manager(inputs)
    make_miss(inputs)
    Costs(inputs)
    return inputs


def with_requests(bare: Inputs) -> Inputs:
    """Returns inputs of one GPU whose steps a scheduler makes of requests; ScenarioError if they cannot be served."""
    scenario, model, trace, memory = bare.scenario, bare.model, bare.trace, bare.scenario.memory
    assert scenario.requests is not None
    for key, name in (("memory.eviction", memory.eviction), ("tiers.host_policy", scenario.tiers.host_policy)):
        if getattr(EVICTION[name], "needs_future", False):
            raise ScenarioError(
                f"{key} = {name!r}: it must know all steps beforehand, and [requests] makes them as it goes"
            )
    if scenario.requests.kv.boundary == "moving" and scenario.miss.policy == "low_precision":
        raise ScenarioError("requests.kv.boundary = 'moving': with miss.policy = 'low_precision', choose 'fixed'")
    guesses = bare.guesses or _guesses(replace(bare, steps=every_row(trace.sequence, trace.phase)))
    predictor = predictor_cost(scenario.predictor) if guesses is not None else FREE
    total = memory.total_bytes
    held_bytes = bare.profile.capacity("gpu", bare.device)[0] if total is None else parse_bytes(total)
    rest_bytes = sum(fixed_parts(scenario, model, predictor.gpu_memory_bytes).values())
    room_bytes = None if held_bytes is None else held_bytes - rest_bytes
    load = load_requests(scenario.requests, model, trace, scenario.seed, room_bytes, total=total is not None)
    most_bytes = memory.budget_bytes(model.expert_bytes, model.experts_by_layer)
    budget_bytes = load.expert_bytes(most_bytes)
    least_bytes = budget_bytes if load.room_bytes is None else min(most_bytes, load.room_bytes - load.room.kv_bytes)
    try:
        divider(memory.scope, model.expert_bytes, trace)(least_bytes)
    except BudgetError as error:
        raise ScenarioError(f"requests.kv.budget = {scenario.requests.kv.budget!r}: with it, {error}") from None
    pulls = Pulls(
        load.server, load.most_tokens, load.schedule_ns, load.room.kv_bytes, load.budget_of(most_bytes), least_bytes,
        load.failed, load.servers if scenario.requests.replicas > 1 else None,
    )  # fmt: skip
    inputs = replace(bare, budget_bytes=budget_bytes, guesses=guesses, predictor=predictor, pulls=pulls)
    make_manager(inputs)
    make_host_memory(inputs)
    make_miss(inputs)
    Costs(inputs)
    check(inputs)
    return inputs


def _of_total(part: Inputs) -> Inputs:
    """Returns one GPU's inputs with its budget before each step, where experts have what is left of a total."""
    budgets = expert_budgets(part)
    if budgets is None:
        return part
    part = replace(part, budgets=budgets, budget_bytes=max(budgets))
    _check_least(part)
    return part


def _with_budgets(whole: Inputs) -> Inputs:
    """Returns the inputs of GPUs that share the experts with what each has of a total; raise if one cannot run."""
    gpus = tuple(map(_of_total, whole.gpus))
    for part in gpus:
        make_miss(part)
    return replace(whole, gpus=gpus, budget_bytes=sum(part.budget_bytes for part in gpus))


def _check_least(inputs: Inputs) -> None:
    """Refuse a total of which too little is left for experts when the KV cache is largest."""
    budgets, scenario, model = cached_budgets(inputs), inputs.scenario, inputs.model
    if budgets is None:
        return
    sizes, size_of = kept_bytes(inputs)
    try:
        divider(scenario.memory.scope, size_of or sizes, inputs.trace)(min(budgets))
    except BudgetError as error:
        given = f"memory.total_bytes = {scenario.memory.total_bytes!r}"
        rest = fixed_parts(scenario, model, inputs.predictor.gpu_memory_bytes)
        rest["KV cache"] = int(cached_bytes(inputs).max())
        rest["low-precision copies"] = low_precision(inputs)[1]
        parts = " + ".join(f"{name} {bytes_words(size_bytes)}" for name, size_bytes in rest.items() if size_bytes)
        raise ScenarioError(f"{given}: less {parts}, too little is left: {error}") from None


def _in_stages(whole: Inputs) -> Inputs:
    """Returns inputs with those of each stage of a pipeline; raise if a stage cannot run, or a link is not there."""
    scenario, stages = whole.scenario, whole.scenario.parallel.stages
    if stages > 1:
        links = links_of(whole, stages, "parallel.stages")
        links.to_next()  # refuses GPUs that no copy can go between
        whole = replace(whole, links=links)
    # Host memory sees the layers of all stages; a predictor of the whole model is asked once for all.
    of_host = getattr(EVICTION[scenario.tiers.host_policy], "needs_guesses", False)
    guesses = _guesses(whole) if of_host or scenario.predictor.name in OF_WHOLE_MODEL else None
    host_guesses = guesses if of_host else None
    if scenario.predictor.name in OF_WHOLE_MODEL:
        whole = replace(whole, guesses=guesses)

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
            whole, steps=steps, stages=tuple(parts), budget_bytes=budget_bytes, guesses=host_guesses,
            predictor=parts[0].predictor,
        )  # fmt: skip

    def makespan_ns(counts: Sequence[int]) -> int | None:
        try:
            first = cut(counts, whole.steps[:SAMPLE_STEPS])
            if scenario.memory.total_bytes is None:  # a total is kept, whatever the split
                check(replace(first, stages=tuple(replace(stage, steps=whole.steps) for stage in first.stages)))
        except ScenarioError:
            return None
        return run_ns(run_all(first, prepared(first, part_costs(first))))

    return cut(stage_layers(whole, makespan_ns), whole.steps)


def _guesses(bare: Inputs) -> Guesses | None:
    """Returns what the scenario's predictor guesses; None if neither prefetch nor eviction goes by guesses."""
    scenario = bare.scenario
    policy = make_prefetch(scenario, bare.model)
    horizons, ranks = (policy.horizons, policy.guesses) if policy.guesses else (0, 0)
    if not ranks and _evicts_by_guesses(scenario):
        horizons, ranks = max(1, scenario.prefetch.lookahead), scenario.prefetch.k or bare.model.top_k
    if not ranks:
        return None
    guesses = guesses_of(scenario, bare.first_layer, bare.trace, bare.steps, horizons, ranks)
    if policy.needs_confidences and guesses.confidences is None:
        raise ScenarioError(
            f"prefetch.policy = {scenario.prefetch.policy!r} needs confidences, and predictor.name = "
            f"{scenario.predictor.name!r} gives none: choose another of the two"
        )
    return guesses


def _evicts_by_guesses(scenario: Scenario) -> bool:
    policies = (EVICTION[name] for name in (scenario.memory.eviction, scenario.tiers.host_policy))
    return any(getattr(policy, "needs_guesses", False) for policy in policies)


def expert_budgets(part: Inputs) -> list[int] | None:
    """Returns the expert budget of one GPU before each step, at most what it is given without a total.

    It is what the KV cache and all else (`fixed_parts`) leave of the total; None without a total.
    """
    total = part.scenario.memory.total_bytes
    if total is None:
        return None
    fixed_bytes = sum(fixed_parts(part.scenario, part.model, part.predictor.gpu_memory_bytes).values())
    left_bytes = parse_bytes(total) - fixed_bytes
    return [min(part.budget_bytes, left_bytes - size_bytes) for size_bytes in cached_bytes(part).tolist()]


def _check_pieces(scenario: Scenario, model: Model) -> None:
    """Refuse chunks so small that one expert's copy or read would be made in pieces without end."""
    largest_bytes = max(model.expert_bytes)
    for key, chunk_bytes in (
        ("copy.chunk_bytes", scenario.copy_.chunk_bytes),
        ("tiers.chunk_bytes", scenario.tiers.chunk_bytes),
    ):
        pieces = pieces_of(largest_bytes, chunk_bytes)
        if pieces > MOST_PIECES:
            raise ScenarioError(
                f"{key} = {chunk_bytes}: an expert of {bytes_words(largest_bytes)} would go in {pieces:,} pieces: must "
                f"be at least {-(-largest_bytes // MOST_PIECES):,}, for {MOST_PIECES:,} pieces, or 0 for one"
            )


def _load_trace(scenario: Scenario, model: Model) -> RoutingTrace:
    """Returns the trace that a scenario names, read-only; the same one where it is kept."""
    key = _trace_key(scenario, model)
    if key is None:
        return _make_trace(scenario, model)
    return KEPT.get(key, lambda: _make_trace(scenario, model), lambda trace: frozen(_arrays(trace)))


def _trace_key(scenario: Scenario, model: Model) -> Hashable:
    """Returns all that a scenario's trace is made of; None if it is of a log, which is imported each time."""
    synthetic = scenario.workload.synthetic
    if scenario.workload.trace is not None:
        with trace_file(scenario.workload.trace) as path:
            state = None if path is None else file_state(path)
    elif synthetic is not None and synthetic.fit is not None:
        with fit_file(synthetic.fit) as path:
            state = file_state(path)
    elif synthetic is not None and synthetic.popularity is not None:
        state = (file_state(synthetic.popularity), model.layers, model.experts, model.top_k)
    else:
        state = (model.layers, model.experts, model.top_k)
    made = (synthetic and synthetic.model_dump_json(), scenario.seed if synthetic else None)
    return None if state is None else ("trace", state, made)


def _arrays(trace: RoutingTrace) -> list[npt.NDArray[Any] | None]:
    """Returns the arrays of a trace."""
    named = (value for value in vars(trace).values() if isinstance(value, np.ndarray))
    return [*named, *trace.extra.values()]


def _make_trace(scenario: Scenario, model: Model) -> RoutingTrace:
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
    if synthetic.popularity is not None:
        shape = (synthetic.tokens, synthetic.sequences, synthetic.prefill_tokens)
        return popular_trace(Path(synthetic.popularity), model, *shape, scenario.seed)
    options = synthetic.model_dump(exclude={*DRAWN_BY, "tokens", "working_set"})
    try:
        return of_model(
            model,
            lambda experts, top_k: synthesize(
                synthetic.tokens,
                model.layers,
                experts,
                top_k,
                working_set=_favored(synthetic.working_set, experts, model),
                seed=scenario.seed,
                **options,
            ),
        )
    except InputError as error:
        raise ScenarioError(f"workload.synthetic.{error}") from None


def _check_alike(scenario: Scenario, model: Model) -> None:
    """Refuse what needs as many experts in every layer."""
    if len(set(model.experts_by_layer)) > 1:
        for wrong, key in (
            (scenario.parallel.gpus > 1, f"parallel.gpus = {scenario.parallel.gpus}"),
            (scenario.memory.scope == "shared", "memory.scope = 'shared'"),
        ):
            if wrong:
                raise ScenarioError(
                    f"{key}: needs as many experts in every layer, and layers of {model.name} have "
                    f"{min(model.experts_by_layer)} to {model.experts}: leave it out"
                )


def _favored(working_set: int | None, experts: int, model: Model) -> int:
    """Returns the working set of layers with so many experts: all of theirs, where others have more than that."""
    favored = working_set or experts
    return min(favored, experts) if favored <= model.experts else favored


def _sized(model: Model, trace: RoutingTrace) -> Model:
    """Returns the model with the bytes of experts, and of dense parts where known, that a trace's log gives."""
    if "expert_bytes" not in trace.extra:
        raise ScenarioError("model.sizes = 'trace': the trace does not say how large its experts are: choose 'preset'")
    expert_bytes = tuple(trace.extra["expert_bytes"].tolist())
    dense_bytes = tuple(trace.extra["dense_bytes"].tolist()) if "dense_bytes" in trace.extra else model.dense_bytes
    return replace(model, expert_bytes=expert_bytes, dense_bytes=dense_bytes)


def _fitted(trace: RoutingTrace, model: Model) -> RoutingTrace:
    """Returns a trace of this model; ScenarioError if it is not of it."""
    for key, given, wanted in (
        ("model.layers", trace.layers, model.layers),
        ("model.experts", trace.num_experts, model.experts),
        ("model.top_k", trace.k, model.top_k),
    ):
        if given != wanted:
            raise ScenarioError(
                f"{key} = {wanted} ({model.name}), but the trace has {given}: choose its model, or set {key} = {given} "
                f"(or map the trace to this model: prestage trace map)"
            )
    try:
        return fitted_to(model, trace)
    except TraceError as error:
        raise ScenarioError(f"workload.trace: {error}, by model {model.name} (prestage trace map)") from None
