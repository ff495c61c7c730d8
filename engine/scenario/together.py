"""What cannot go together yet, and why: one table, from which scenarios are refused and which the docs print.

A row says which keys clash, by a function that returns those at fault in a scenario (none: it is fine), why, and what
to do instead. What one key needs of another of its own section is said by the section.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ...resources.parts.section import gpus_of
from ..policies.copy_order import COPY_ORDERS, orders_by_rank
from ..policies.eviction import EVICTION
from ..policies.eviction_base import Eviction
from .amounts import parse_bytes
from .sections import ON_GPU

if TYPE_CHECKING:
    from .scenario import Scenario

Keys = tuple[str, ...]


class Apart(NamedTuple):
    """What does not go together: in words, why, what to do instead, and the keys that are at fault in a scenario."""

    what: str
    why: str
    instead: str
    at_fault: Callable[[Scenario], Keys]


def _chosen(**keys: bool) -> Keys:
    """Returns the keys that are chosen, written `section__key`."""
    return tuple(name.replace("__", ".") for name, chosen in keys.items() if chosen)


def _with(key: str, chosen: bool, others: Keys) -> Keys:
    """Returns a key and the first of those that it does not go with, if there is any."""
    return (key, others[0]) if chosen and others else ()


def _in_fewer_bytes(scenario: Scenario) -> Keys:
    compression = scenario.compression
    return _chosen(compression__where=compression.where != "none", compression__mixed=compression.mixed is not None)


def _low(scenario: Scenario) -> bool:
    return scenario.miss.policy == "low_precision"


def _shared_layers(scenario: Scenario) -> Keys:
    others = _chosen(miss__policy=scenario.miss.policy != "fetch", memory__preload=scenario.memory.preload != "none")
    return _with("memory.scope", scenario.memory.scope == "shared", (*others, *_in_fewer_bytes(scenario)))


def _shared_on_several_gpus(scenario: Scenario) -> Keys:
    known = scenario.memory.scope in ("global", "per-layer")
    return _with("memory.scope", not known, _chosen(parallel__gpus=scenario.parallel.gpus > 1))


def _sizes_in_a_layer(scenario: Scenario) -> Keys:
    others = _chosen(
        memory__scope=scenario.memory.scope != "global",
        tiers__host_budget=_reads(scenario),
        parallel__stages=scenario.parallel.stages > 1,
        parallel__gpus=scenario.parallel.gpus > 1,
    )
    return _with("compression.mixed", scenario.compression.mixed is not None, others)


def _in_fewer_bytes_elsewhere(scenario: Scenario) -> Keys:
    fewer, lent = _in_fewer_bytes(scenario), _lent(scenario)
    return (fewer[0], lent[0]) if fewer and lent else ()


def _dealt_out_twice(scenario: Scenario) -> Keys:
    cost = scenario.parallel.gpus > 1 and scenario.parallel.remote == "cost"
    return _with("miss.policy", scenario.miss.policy != "fetch", _chosen(parallel__remote=cost))


def _lent(scenario: Scenario) -> Keys:
    parallel = scenario.parallel
    if parallel.gpus == 1:
        return ()
    return _chosen(
        parallel__remote=parallel.remote in ("peer", "cost"),
        parallel__spare_bytes=parse_bytes(parallel.spare_bytes) > 0,
    )


def _reads(scenario: Scenario) -> bool:
    return scenario.tiers.host_budget != "all"


def _low_and_compressed(scenario: Scenario) -> Keys:
    return _with("miss.policy", _low(scenario), _in_fewer_bytes(scenario))


def _grouped(scenario: Scenario) -> Keys:
    others = (*_chosen(miss__policy=_low(scenario)), *_in_fewer_bytes(scenario))
    return _with("dispatch.expert_kernel", scenario.dispatch.expert_kernel == "grouped", others)


def _nothing_kept(scenario: Scenario) -> Keys:
    prefetch = scenario.prefetch
    others = _chosen(
        prefetch__protect=prefetch.protect != "until_target",
        prefetch__issue=prefetch.issue != "after_launch",
        miss__fetch_behind=_low(scenario) and scenario.miss.fetch_behind,
        parallel__spare_bytes=scenario.parallel.gpus > 1 and parse_bytes(scenario.parallel.spare_bytes) > 0,
    )
    return _with("memory.caching", not scenario.memory.caching, others)


def _ahead_of_the_choice(scenario: Scenario) -> Keys:
    others = _chosen(
        parallel__gpus=scenario.parallel.gpus > 1, tiers__host_budget=_reads(scenario) and _threads(scenario)
    )
    return _with("dispatch.router_readback", not scenario.dispatch.router_readback, others)


def _threads(scenario: Scenario) -> bool:
    """Whether threads of their own serve the stages of a pipeline, in whatever order they come."""
    return scenario.parallel.stages > 1 and scenario.parallel.dispatch_threads == "per-gpu"


def _in_order(scenario: Scenario) -> Keys:
    informed = getattr(EVICTION[scenario.tiers.host_policy], "begin", None) is not Eviction.begin
    others = _chosen(parallel__stages=_threads(scenario))
    return _with("tiers.host_policy", _reads(scenario) and informed, others)


def _comes_back(scenario: Scenario) -> Keys:
    others = _chosen(
        parallel__stages=scenario.parallel.stages > 1,
        parallel__gpus=scenario.parallel.gpus > 1,
        memory__caching=not scenario.memory.caching,
        memory__eviction=scenario.memory.eviction == "spent",
        copy__drop_stale=scenario.copy_.drop_stale,
        compression__where=scenario.compression.where == "host",
    )
    return _with("tiers.inclusion", scenario.tiers.inclusion == "exclusive", others)


def _put_off(scenario: Scenario) -> Keys:
    return _with("copy.discipline", scenario.copy_.by_rank, _lent(scenario))


def _ordered_by_the_host(scenario: Scenario) -> Keys:
    others = _chosen(
        predictor__lane=scenario.predictor.lane not in ON_GPU,
        copy__discipline=scenario.copy_.by_rank,
        copy__host_memory=scenario.copy_.host_memory == "pageable",
        tiers__host_budget=_reads(scenario),
        miss__policy=scenario.miss.policy != "fetch",
    )
    kinds = (*others, *_in_fewer_bytes(scenario), *_lent(scenario))
    return _with("prefetch.issued_by", scenario.prefetch.issued_by == "gpu", kinds)


def _deferred(scenario: Scenario) -> Keys:
    several = _chosen(parallel__gpus=scenario.parallel.gpus > 1)
    return _with("miss.deferred_experts", scenario.miss.deferred_experts > 0, several)


def _held_by_a_peer(scenario: Scenario) -> Keys:
    others = _chosen(
        parallel__stages=scenario.parallel.stages > 1,
        parallel__gpus=scenario.parallel.gpus > 1,
        tiers__host_budget=_reads(scenario),
        miss__policy=scenario.uses_cpu,
    )
    return _with("copy.source", scenario.copy_.source == "peer", (*others, *_in_fewer_bytes(scenario)))


def _routed_again(scenario: Scenario) -> Keys:
    if scenario.routing.policy == "router" or scenario.requests is not None:
        return _chosen(routing__policy=scenario.routing.policy != "router")
    others = _chosen(
        parallel__stages=scenario.parallel.stages > 1,
        parallel__micro_batches=scenario.parallel.micro_batches > 1,
        parallel__gpus=scenario.parallel.gpus > 1,
        memory__scope=scenario.memory.scope == "shared",
    )
    return _with("routing.policy", True, others)


def _steps_of_its_own(scenario: Scenario) -> Keys:
    """Returns the first key at fault beside [requests], which is at fault by being there."""
    workload, parallel = scenario.workload, scenario.parallel
    keys = _chosen(
        workload__batch=workload.batch != 1,
        workload__tokens=workload.tokens is not None,
        workload__context=workload.context is not None,
        parallel__stages=parallel.stages > 1,
        parallel__micro_batches=parallel.micro_batches > 1,
        parallel__gpus=parallel.gpus > 1,
    )
    return keys[:1] if scenario.requests is not None else ()


_STREAMS = " or ".join(name for name in COPY_ORDERS if name not in orders_by_rank())
#: What cannot go together.
APART: tuple[Apart, ...] = (
    Apart(
        "`memory.scope = shared` with a miss policy, compression or `memory.preload`",
        "these go by an expert's layer, and an expert that layers share has none of its own",
        "choose another scope, or leave them out",
        _shared_layers,
    ),
    Apart(
        "`memory.scope = shared` or `benefit` with `parallel.gpus`",
        "these divide memory by whole layers, and each GPU has only some experts of every layer",
        "choose global or per-layer",
        _shared_on_several_gpus,
    ),
    Apart(
        "`compression.mixed` with another `memory.scope` than global, `tiers.host_budget` or several GPUs",
        "in mixed precision the experts of a layer differ in size, which the others do not know yet",
        "choose memory.scope = 'global', tiers.host_budget = 'all' and one GPU",
        _sizes_in_a_layer,
    ),
    Apart(
        "`miss.policy = low_precision` with compression",
        "there is no cost for an expert that is compressed and has a copy in low precision",
        "give one of the two",
        _low_and_compressed,
    ),
    Apart(
        "`dispatch.expert_kernel = grouped` with `miss.policy = low_precision` or compression",
        "there is no cost for one kernel over experts stored in several forms",
        "choose dispatch.expert_kernel = 'separate'",
        _grouped,
    ),
    Apart(
        "`memory.caching = false` with `prefetch.protect = none`, `prefetch.issue = before_launch`, "
        "`miss.fetch_behind` or `parallel.spare_bytes`",
        "without caching, an expert is dropped after the visit that it was copied for",
        "set memory.caching = true, or leave them out",
        _nothing_kept,
    ),
    Apart(
        "`dispatch.router_readback = false` with `parallel.gpus`, or with `tiers.host_budget` and stages on threads of "
        "their own",
        "GPUs that share experts meet at every choice of the router; and a thread that runs ahead of it could wait for "
        "room in host memory that another one frees only behind its own work, a deadlock",
        "set dispatch.router_readback = true, or for stages parallel.dispatch_threads = 'one'",
        _ahead_of_the_choice,
    ),
    Apart(
        "`tiers.host_policy` that goes by the order of visits with stages on threads of their own",
        "such a policy needs visits step by step, and threads of their own come in any order",
        "choose another tiers.host_policy, or parallel.dispatch_threads = 'one'",
        _in_order,
    ),
    Apart(
        "`tiers.inclusion = exclusive` with several GPUs, `memory.caching = false`, `memory.eviction = spent`, "
        "`copy.drop_stale` or `compression.where = host`",
        "only what one GPU evicts to make room for another expert is copied back, in the form that it has there",
        "set tiers.inclusion = 'inclusive', or leave them out",
        _comes_back,
    ),
    Apart(
        "`copy.discipline` by rank with copies between GPUs: `parallel.remote = peer` or `cost`, or "
        "`parallel.spare_bytes`",
        "a GPU could wait for a copy that another GPU's queue puts off",
        f"choose {_STREAMS}",
        _put_off,
    ),
    Apart(
        "compression with copies between GPUs",
        "the other GPU may have decompressed the expert already, so what is copied is not known",
        "choose parallel.remote = 'tokens' or 'host' and parallel.spare_bytes = '0B'",
        _in_fewer_bytes_elsewhere,
    ),
    Apart(
        "a miss policy with `parallel.remote = cost`",
        "both choose by cost where a miss is served, each without knowing what the other chooses",
        "choose another parallel.remote",
        _dealt_out_twice,
    ),
    Apart(
        "`miss.deferred_experts` with `parallel.gpus`",
        "GPUs that share a layer's experts combine its results before the next layer, so none can come later",
        "leave one of the two out",
        _deferred,
    ),
    Apart(
        "`prefetch.issued_by = gpu` with guesses or copies of the host's: `predictor.lane = host` or `free`, "
        "`copy.discipline` by rank, `copy.host_memory = pageable`, `tiers.host_budget`, a miss policy, compression, "
        "copies between GPUs",
        "these are made by the host, and the GPU issues plain copies behind its own guesses alone",
        "leave them out, or set prefetch.issued_by = 'host'",
        _ordered_by_the_host,
    ),
    Apart(
        "`copy.source = peer` with several GPUs at work, `tiers.host_budget`, misses on the CPU or compression",
        "the GPU that holds all experts does nothing else, and host memory holds none",
        "choose copy.source = 'host', or leave them out",
        _held_by_a_peer,
    ),
    Apart(
        "a cache-aware `routing.policy` with several GPUs, `memory.scope = shared` or `[requests]`",
        "its choices are computed before the run, from the cache of one GPU and steps that are known",
        "set routing.policy = 'router'",
        _routed_again,
    ),
    Apart(
        "`[requests]` with `workload.batch`, `workload.tokens`, `workload.context` or several GPUs",
        "with [requests] a scheduler makes the steps, on one GPU",
        "leave it out",
        _steps_of_its_own,
    ),
)


def clashes(scenario: Scenario) -> Iterator[str]:
    """Yields what does not go together in a scenario, each with its keys, their values, why, and what to do instead."""
    for row in APART:
        keys = row.at_fault(scenario)
        if keys:
            given = " with ".join(f"{key} = {_value(scenario, key)}" for key in keys)
            yield f"{given}: {row.why}: {row.instead}"


def _value(scenario: Scenario, key: str) -> str:
    """Returns the value of a key, as it is written in TOML."""
    section, name = key.split(".")
    value: Any = getattr(getattr(scenario, "copy_" if section == "copy" else section), name)
    if key == "parallel.stages" and value == gpus_of(scenario.machine.model_dump()):
        return f"{value} (as many as the machine's parts count GPUs: parallel.stages = 1 lets one of them work)"
    return str(value).lower() if isinstance(value, bool) else repr(value)
