"""Stages of a pipeline: what each has of the model, its trace and its guesses.

A stage is a run of its own: a model of its layers only, numbered from 0, with the trace's choices there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

from ...resources.profile import Profile
from ...workloads.batches import Step
from ...workloads.guesses import Guesses
from ...workloads.model import Model
from ...workloads.trace import RoutingTrace
from ...workloads.trace_checks import LAYER_EXPERTS, POPULARITY
from ..costs.costs import Costs
from ..decide.dispatch import step_accesses
from ..policies.split import Layers, divide
from ..scenario.inputs import Inputs

#: Predictors that know the whole model's layers; all others guess from what a stage sees of the trace.
OF_WHOLE_MODEL = ("learned", "recorded")
#: The steps at the beginning of a run that layers are weighed by, and that a search for a split simulates.
SAMPLE_STEPS = 64


def stage_inputs(whole: Inputs, counts: Sequence[int]) -> list[Inputs]:
    """Returns the inputs of stages with so many layers each, from those of the whole model; without budgets.

    Guesses are those of the whole model cut out, where it has some.
    """
    stages = []
    for number, (first, count) in enumerate(zip(first_layers(counts), counts, strict=True)):
        stages.append(
            Inputs(
                whole.scenario,
                stage_model(whole.model, first, count),
                whole.profile,
                stage_trace(whole.trace, first, count),
                whole.steps,
                budget_bytes=0,
                guesses=None if whole.guesses is None else stage_guesses(whole.guesses, first, count),
                device=f"gpu{number}",
                first_layer=first,
                runtime=whole.runtime,
            )
        )
    return stages


def stage_layers(whole: Inputs, makespan_ns: Callable[[tuple[int, ...]], int | None]) -> tuple[int, ...]:
    """Returns how many layers each stage takes, as the scenario divides them; SplitError if that cannot be.

    `makespan_ns` as of `Layers`.
    """
    costs = Costs(whole)
    weights = partial(compute_ns, costs, whole.model, whole.trace, whole.steps[:SAMPLE_STEPS])
    parallel, aside = whole.scenario.parallel, whole.scenario.memory.cpu_layers or 0
    # Those of the first layers that the CPU computes lie on no GPU.
    kept = [0 if layer < aside else size for layer, size in enumerate(whole.model.expert_bytes)]
    return divide(parallel.split, Layers(parallel.stages, kept, weights, makespan_ns))


def with_profile(inputs: Inputs, profile: Profile, *, timed: bool = False) -> Inputs:
    """Returns inputs that run at the costs of another profile of the same machine, on all its GPUs.

    `timed`: the copies between them are timed, as `Costs` takes it.
    """
    links = inputs.links
    return replace(
        inputs,
        profile=profile,
        stages=tuple(replace(stage, profile=profile) for stage in inputs.stages),
        gpus=tuple(replace(gpu, profile=profile) for gpu in inputs.gpus),
        links=None if links is None else links.with_profile(profile, timed=timed),
    )


def compute_ns(costs: Costs, model: Model, trace: RoutingTrace, steps: Sequence[Step]) -> list[int]:
    """Returns the kernels' time of each layer over some steps, in ns (layers,); the head's is with the last layer."""
    total = [0] * model.layers
    for number, step in enumerate(steps):
        tokens = len(step.rows)
        for layer, accesses in enumerate(step_accesses(trace, step)):
            total[layer] += costs.attending(costs.dense(layer, tokens, step.phase), layer, number).ns
            total[layer] += sum(costs.expert(layer, count, step.phase).ns for count in accesses.tokens)
        total[-1] += costs.head(step.sampled).ns
    return total


def stage_model(model: Model, first: int, count: int) -> Model:
    """Returns the model of `count` layers from `first` on; the head, and what it reads, is with the last layer only.

    The input embedding is with the first one; a stage that has both shares a tied one.
    """
    last = first + count
    # An equal share of each layer, rounded so that the stages' add up to the model's; where layers differ, their own.
    cached = model.kv_bytes_per_token
    kept_bytes = cached * last // model.layers - cached * first // model.layers
    caches = model.caches[first:last]
    if caches:
        caches = (*caches, model.caches[-1] if last == model.layers else ())
        kept_bytes = sum(each.bytes_per_token for layer in caches for each in layer)
    return replace(
        model,
        layers=count,
        expert_bytes=model.expert_bytes[first:last],
        dense_bytes=model.dense_bytes[first:last],
        head_bytes=model.head_bytes if last == model.layers else 0,
        kv_bytes_per_token=kept_bytes,
        caches=caches,
        attention=model.attention[first:last],
        by_layer=model.by_layer[first:last],
        parameters=None,
        active_parameters=None,
        embedding_bytes=model.embedding_bytes if first == 0 else 0,
        tied_embeddings=model.tied_embeddings and count == model.layers,
    )


def stage_trace(trace: RoutingTrace, first: int, count: int) -> RoutingTrace:
    """Returns what the trace holds of `count` layers from `first` on; guesses are not kept, see `stage_guesses`."""
    here = slice(first, first + count)

    def of_layers(array: Any) -> Any:
        return None if array is None else array[:, here]

    extra = {name: value[:, here] for name, value in trace.extra.items() if name == "residency"}
    extra |= {name: value[here] for name, value in trace.extra.items() if name in (POPULARITY, LAYER_EXPERTS)}
    return replace(
        trace,
        experts=trace.experts[:, here],
        weights=of_layers(trace.weights),
        present=of_layers(trace.present),
        predictions=None,
        confidences=None,
        extra=extra,
    )


def stage_guesses(guesses: Guesses, first: int, count: int) -> Guesses:
    """Returns the guesses that the whole model's predictor makes in a stage for layers of that stage, and no others.

    All of them, if the stage is the whole model.
    """
    if count == guesses.experts.shape[1]:
        return guesses
    experts = guesses.experts[:, first : first + count].copy()
    confidences = None if guesses.confidences is None else guesses.confidences[:, first : first + count].copy()
    for ahead in range(1, guesses.horizons + 1):
        experts[:, max(0, count - ahead) :, ahead - 1] = -1
        if confidences is not None:
            confidences[:, max(0, count - ahead) :, ahead - 1] = 0
    return Guesses(guesses.rows, experts, confidences)


def first_layers(counts: Iterable[int]) -> list[int]:
    """Returns the first layer of each stage."""
    return [0, *accumulate(counts)][:-1]
