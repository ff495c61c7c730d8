"""Experts that are not simply fetched: pinned, on the CPU, in low precision; decided before the clock starts.

Their sizes, what lies in memory before the run, and the miss policy with what it goes by.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from itertools import accumulate

from ...units import bytes_words
from ...workloads.batches import DECODE, PREFILL
from ..costs.costs import Costs
from ..costs.offload_costs import CpuCosts
from ..decide.memory_manager import MemoryManager
from ..policies.eviction import Setting
from ..policies.eviction_informed import popularity
from ..policies.miss import MISS, Miss, Terms
from ..policies.preload import PRELOAD
from ..scenario.amounts import ScenarioError, parse_budget
from ..scenario.inputs import Inputs
from ..scenario.scenario import Scenario
from ..scenario.sections_memory import WHOLE_LAYERS, shrunk


def kept_bytes(inputs: Inputs) -> tuple[list[int], list[int] | None]:
    """Returns the room of an expert: the most by layer (layers,), and by expert where they differ within a layer."""
    compression, model = inputs.scenario.compression, inputs.model
    if compression.mixed is None:
        return [compression.kept_bytes(size_bytes) for size_bytes in model.expert_bytes], None
    popular = popularity(whole_setting(inputs))
    sizes = [size_bytes for size_bytes in model.expert_bytes for _ in range(model.experts)]
    for layer, size_bytes in enumerate(model.expert_bytes):
        experts = model.ids_of(layer)
        ratios = _ratios(compression.mixed, len(experts))
        for ratio, expert in zip(ratios, sorted(experts, key=lambda expert: -popular[expert]), strict=True):
            sizes[expert] = shrunk(size_bytes, ratio)
        sizes[experts.stop : (layer + 1) * model.experts] = [sizes[experts[-1]]] * (model.experts - len(experts))
    most = [max(sizes[layer * model.experts : (layer + 1) * model.experts]) for layer in range(model.layers)]
    return most, sizes


def _ratios(mixed: list[list[float]], experts: int) -> list[float]:
    """Returns the ratio of each rank of popularity in a layer, given (share of the experts, ratio) pairs."""
    ends = [round(share * experts) for share in accumulate(share for share, _ in mixed)]
    ratios: list[float] = []
    for end, (_, ratio) in zip(ends, mixed, strict=True):
        ratios += [ratio] * (end - len(ratios))
    return ratios


def low_precision(inputs: Inputs) -> tuple[Collection[int], int]:
    """Returns the experts with a copy in low precision in GPU memory, the most popular first and the bytes of these.

    They stay for the whole run: where the budget changes with the KV cache, they have their share of the smallest.
    """
    miss, model = inputs.scenario.miss, inputs.model
    if miss.policy != "low_precision":
        return (), 0
    most_bytes = (inputs.budget_bytes if inputs.budgets is None else min(inputs.budgets)) * miss.low_share
    popular = popularity(whole_setting(inputs))
    chosen: list[int] = []
    total_bytes = 0
    for expert in sorted(served_experts(inputs), key=lambda expert: -popular[expert]):
        size_bytes = shrunk(model.expert_bytes[expert // model.experts], miss.low_ratio)
        if total_bytes + size_bytes <= most_bytes:
            chosen.append(expert)
            total_bytes += size_bytes
    return frozenset(chosen), total_bytes


def served_experts(inputs: Inputs) -> Collection[int]:
    """Returns the experts that a GPU may serve: all of its layers, or those that it owns of GPUs that share them."""
    if inputs.expert_parallel is None or not inputs.expert_parallel.moves_tokens:
        return dict.fromkeys(inputs.model.ids) if inputs.model.by_layer else inputs.model.ids
    return dict.fromkeys(inputs.expert_parallel.served(inputs.gpu_number))


def cached_budgets(inputs: Inputs) -> list[int] | None:
    """Returns what whole experts have of the budget before each step; None where it is constant."""
    if inputs.budgets is None or inputs.pulled is not None:  # which grow as the run goes, with no low precision
        return inputs.budgets
    low_bytes = low_precision(inputs)[1]
    return [budget_bytes - low_bytes for budget_bytes in inputs.budgets]


def _wanted(inputs: Inputs) -> list[int]:
    """Returns the experts that the scenario wants in memory before the run, the most wanted first."""
    memory = inputs.scenario.memory
    first_layer = max(0, (memory.cpu_layers or 0) - inputs.first_layer)
    served = served_experts(inputs)
    return [expert for expert in PRELOAD[memory.preload](whole_setting(inputs), first_layer) if expert in served]


def pinned_experts(inputs: Inputs) -> Collection[int]:
    """Returns the experts that stay in GPU memory for the whole run; ScenarioError if they leave none for others."""
    memory, model = inputs.scenario.memory, inputs.model
    if not memory.pins:
        return ()
    sizes, size_of = kept_bytes(inputs)
    least_bytes = min(cached_budgets(inputs) or [inputs.budget_bytes - low_precision(inputs)[1]])
    if memory.pinned == WHOLE_LAYERS:
        return _whole_layers(inputs, least_bytes)
    left_bytes = parse_budget(memory.pinned, sizes, model.experts_by_layer)
    if left_bytes + max(sizes) > least_bytes:
        raise ScenarioError(
            f"memory.pinned = {memory.pinned!r}: {bytes_words(left_bytes)} stay, the budget is "
            f"{bytes_words(least_bytes)}: there must be room for one more expert, {bytes_words(max(sizes))}"
        )
    pinned = []
    for expert in _wanted(inputs):
        left_bytes -= sizes[expert // model.experts] if size_of is None else size_of[expert]
        if left_bytes < 0:
            break
        pinned.append(expert)
    return frozenset(pinned)


def _whole_layers(inputs: Inputs, budget_bytes: int) -> Collection[int]:
    """Returns the experts of all layers, the most wanted first, that leave room in a budget for two of the largest."""
    sizes, size_of = kept_bytes(inputs)
    experts = inputs.model.experts
    layers: dict[int, list[int]] = {}
    for expert in _wanted(inputs):
        layers.setdefault(expert // experts, []).append(expert)
    taken = {
        layer: sum(sizes[layer] if size_of is None else size_of[expert] for expert in group)
        for layer, group in layers.items()
    }
    left_bytes = budget_bytes - 2 * max(taken.values(), default=0)
    pinned: list[int] = []
    for layer, group in layers.items():
        left_bytes -= taken[layer]
        if left_bytes < 0:
            break
        pinned += group
    return frozenset(pinned)


def preload(manager: MemoryManager, inputs: Inputs) -> None:
    """Put into an empty memory what the scenario wants there before the run, as far as there is room.

    ScenarioError if layers that are named do not fit, or not all of a runtime that keeps every expert there.
    """
    _refuse_less_than_all(manager, inputs)
    memory, wanted = inputs.scenario.memory, _wanted(inputs)
    fitting = manager.fitting(wanted)
    if memory.cpu_layers is not None and len(fitting) < len(wanted):
        needed_bytes = sum(manager.size_of[expert] for expert in wanted)
        raise ScenarioError(
            f"memory.cpu_layers = {memory.cpu_layers}: the experts of the other layers take "
            f"{bytes_words(needed_bytes)}, and memory.gpu_budget = {memory.gpu_budget!r} is "
            f"{bytes_words(manager.budget_bytes)}: leave more layers to the CPU, or give more budget"
            + ("" if inputs.scenario.parallel.stages == 1 else ", or this stage fewer layers (parallel.split)")
        )
    manager.preload(fitting)


def _refuse_less_than_all(manager: MemoryManager, inputs: Inputs) -> None:
    """Raise ScenarioError where the runtime has one budget only, all experts, and other memory leaves less."""
    only = inputs.runtime.only.get("memory.gpu_budget")
    if only is None:
        return
    needed_bytes = sum(manager.size_of[expert] for expert in served_experts(inputs))
    if needed_bytes > manager.budget_bytes:
        title = inputs.runtime.title or inputs.runtime.name
        raise ScenarioError(
            f"runtime.name = {inputs.runtime.name!r}: {title} {only.why}: they take {bytes_words(needed_bytes)}, and "
            f"there is room for {bytes_words(manager.budget_bytes)}: give more memory, a smaller model.dtype, or "
            f"another runtime.name"
        )


def make_miss(inputs: Inputs) -> Miss | None:
    """Returns the scenario's miss policy; None where all misses are fetched.

    ScenarioError if it needs gate weights and the trace has none, ProfileError if the profile knows nothing of the CPU.
    """
    scenario, name = inputs.scenario, inputs.scenario.miss.policy
    if name == "fetch":
        return None
    if getattr(MISS[name], "needs_gates", False) and inputs.trace.weights is None:
        raise ScenarioError(
            f"miss.policy = {name!r} goes by gate weights, and the trace has none: choose another policy, or a trace "
            f"with `weights`"
        )
    settings = scenario.miss
    terms = Terms(
        cpu_max_tokens=settings.cpu_max_tokens,
        fetch_from=settings.fetch_tokens(inputs.model.experts, inputs.model.top_k),
        low=low_precision(inputs)[0],
        fetch_behind=settings.fetch_behind and name == "low_precision",
        threshold=settings.threshold,
        deferred=settings.deferred_experts,
        upload_after=settings.upload_after,
        upload_most=settings.upload_most,
        upload_share=settings.upload_share,
        upload_horizon=settings.upload_horizon,
    )
    if scenario.uses_cpu:
        terms = _with_costs(terms, inputs.decides_by or inputs)
    return MISS[name](terms)


def _with_costs(terms: Terms, inputs: Inputs) -> Terms:
    """Add what the profile says of the CPU, the link and the GPU; the same whatever a replicate draws."""
    costs = Costs(inputs)
    cpu = CpuCosts(costs, inputs.scenario)
    cpu.expert(0, 1)  # refuses a shape that cannot be estimated before anything runs
    batch = inputs.scenario.workload.batch

    def kernel_ns(layer: int, tokens: int) -> int:
        return costs.expert(layer, tokens, DECODE if tokens <= batch else PREFILL).ns

    return replace(
        terms,
        cpu_ns=lambda layer, tokens: cpu.expert(layer, tokens).ns,
        there_and_back_ns=lambda layer, tokens: cpu.there_and_back_ns(tokens),
        copy_ns=lambda layer, tokens: costs.copies[layer].queued_ns,
        kernel_ns=kernel_ns,
    )


def whole_setting(inputs: Inputs) -> Setting:
    """Returns what is known of the run before it starts, as for one pool of all layers."""
    model = inputs.model
    layers = tuple(range(model.layers))
    return Setting(layers=layers, experts=model.experts, trace=inputs.trace, steps=inputs.steps)


def plain(scenario: Scenario) -> Scenario:
    """Returns the scenario with every miss fetched and no expert in fewer bytes."""
    fields = type(scenario).model_fields
    return scenario.model_copy(update={"miss": fields["miss"].default, "compression": fields["compression"].default})
