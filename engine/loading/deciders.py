"""What decides in a run, made from its scenario: memory managers, prefetch policies, and the visits they decide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ...resources.spool import Spool
from ...workloads.model import Model
from ..decide.dispatch import Part, Visit, visits
from ..decide.expert_parallel import ParallelVisit, Worker, parallel_visits
from ..decide.host_memory import HostMemory
from ..decide.memory_manager import MemoryManager
from ..decide.partition import divider
from ..decide.pools import BudgetError
from ..policies.eviction import EVICTION, Setting
from ..policies.pinned import Pinned
from ..policies.prefetch import PREFETCH, Gauge, NoPrefetch, Options, Prefetch
from ..policies.prefetch_share import PREFETCH_SHARE
from ..scenario.amounts import ScenarioError, parse_budget
from ..scenario.inputs import Inputs
from ..scenario.scenario import Scenario
from .offloading import cached_budgets, kept_bytes, low_precision, make_miss, pinned_experts, preload

if TYPE_CHECKING:
    from ..decide.sources import Source


def make_prefetch(scenario: Scenario, model: Model, copy_ns: int = 0) -> Prefetch:
    """Returns the scenario's prefetch policy; `k` left out means the model's top-k, lookahead 0 no prefetch.

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
            by_layer=model.experts_by_layer if model.by_layer else (),
            copy_ns=copy_ns,
            stream_pairs=settings.stream_tokens * model.top_k,
        )
    )


def make_manager(inputs: Inputs, spool: Spool | None = None) -> MemoryManager:
    """Returns a fresh memory manager as the scenario wants it; `spool` keeps its records, and its GPU's."""
    memory, model = inputs.scenario.memory, inputs.model
    sizes, size_of = kept_bytes(inputs)
    share = None
    if memory.prefetch_limit != "none":
        share = PREFETCH_SHARE[memory.prefetch_limit](memory.prefetch_share, inputs.budget_bytes // max(sizes))
    setting, eviction, pinned = _setting(inputs), EVICTION[memory.eviction], pinned_experts(inputs)
    manager = MemoryManager(
        sizes,
        model.experts,
        inputs.budget_bytes - low_precision(inputs)[1],
        partial(Pinned, eviction, pinned) if pinned else eviction,
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


def _setting(inputs: Inputs) -> Setting:
    """Returns what eviction policies may know of a run; the memory manager adds the rest."""
    return Setting(
        seed=inputs.scenario.seed,
        first_layer=inputs.first_layer,
        trace=inputs.trace,
        steps=inputs.steps,
        guesses=inputs.guesses,
    )


def make_host_memory(inputs: Inputs, spool: Spool | None = None) -> HostMemory | None:
    """Returns a fresh, empty cache in host memory as the scenario wants it; None if host memory holds every expert.

    `spool` is of the GPU's records; its own are kept within.
    """
    model, tiers = inputs.model, inputs.scenario.tiers
    if tiers.host_budget == "all":
        return None
    sizes = [inputs.scenario.compression.copied_bytes(size_bytes) for size_bytes in model.expert_bytes]
    scope = "shared" if inputs.scenario.memory.scope == "shared" else "global"
    budget_bytes = parse_budget(tiers.host_budget, sizes, model.experts_by_layer, scope)
    setting = _setting(inputs)
    try:
        manager = MemoryManager(
            sizes,
            model.experts,
            budget_bytes,
            EVICTION[tiers.host_policy],
            setting=setting,
            scope=scope,
            spool=None if spool is None else spool.within("host"),
        )
    except BudgetError as error:
        raise ScenarioError(f"tiers.host_budget = {tiers.host_budget!r}: {error}") from None
    # For what a token's visit reads, and for what comes back for it.
    free_bytes = min(2 * model.top_k * max(sizes), budget_bytes // 2)
    return HostMemory(manager, sizes, exclusive=tiers.inclusion == "exclusive", free_bytes=free_bytes)


def dispatched(
    inputs: Inputs,
    manager: MemoryManager,
    prefetch: Prefetch,
    gauge: Gauge | None = None,
    host_memory: HostMemory | None = None,
    part: Part | None = None,
) -> Iterator[Visit]:
    """Returns the visits of a run, decided one by one as they are asked for, those of host memory with them.

    `part` is what is looked up, where that is not all of the trace.
    """
    decided = visits(
        inputs.trace,
        inputs.steps,
        manager,
        prefetch,
        inputs.guesses,
        issue=inputs.scenario.prefetch.issue,
        gauge=gauge,
        budgets=cached_budgets(inputs),
        to_host=inputs.scenario.tiers.prefetch == "host",
        miss=make_miss(inputs),
        part=part,
    )
    return decided if host_memory is None else host_memory.through(decided, inputs.first_layer)


def dispatched_together(
    inputs: Inputs,
    managers: Sequence[MemoryManager],
    prefetches: Sequence[Prefetch],
    gauges: Sequence[Gauge] = (),
    host: HostMemory | None = None,
) -> Iterator[ParallelVisit]:
    """Returns the visits of a run over several GPUs, decided one by one as they are asked for, with host memory's."""
    assert inputs.expert_parallel is not None
    workers = [
        Worker(
            manager, prefetch, part.steps, part.guesses, gauges[number] if gauges else None, cached_budgets(part),
            make_miss(part),
        )
        for number, (part, manager, prefetch) in enumerate(zip(inputs.gpus, managers, prefetches, strict=True))
    ]  # fmt: skip
    return parallel_visits(
        inputs.expert_parallel, inputs.trace, workers, issue=inputs.scenario.prefetch.issue, host=host,
        to_host=inputs.scenario.tiers.prefetch == "host",
    )  # fmt: skip


def source_of(
    inputs: Inputs, manager: MemoryManager, prefetch: Prefetch, host_memory: HostMemory | None = None
) -> Source:
    """Returns what one GPU decides by; `host_memory` is what host memory holds, where that is not every expert."""
    from ..decide.sources import Source

    return Source(
        inputs.trace, inputs.steps, manager, prefetch, inputs.guesses, inputs.scenario.prefetch.issue,
        cached_budgets(inputs), make_miss(inputs), host_memory, inputs.scenario.tiers.prefetch == "host",
    )  # fmt: skip
