"""One run: what each GPU of it needs, and what is recorded there.

`run` and `run_all` take inputs that are loaded and checked; `simulate` makes results of what they record, and `loading`
tries a split of a pipeline by them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..resources.spool import Spool
from ..words import unknown_name
from .costs.costs import Costs
from .decide.dispatch import Visit
from .decide.host_memory import HostMemory
from .decide.memory_manager import MemoryManager
from .decoder import decode
from .expert_parallel import decided, run_placed
from .gpu import Decoded
from .loading.deciders import dispatched, make_host_memory, make_manager, make_prefetch
from .loading.offloading import make_miss
from .measure import metrics as measure
from .pipeline import StageRun, decode_stages, flow_of
from .policies.copy_order import COPY_ORDERS, Fifo, Priority, TwoStreams
from .policies.prefetch import Gauge, Prefetch
from .scenario.inputs import Inputs
from .scenario.scenario import ScenarioError

if TYPE_CHECKING:
    from .decide.sources import Source

#: Called with what is running, and how many of how many layer visits are done.
Progress = Callable[[str, int, int], None]
#: Passes visits on, perhaps counting them.
Watch = Callable[[Iterator[Any]], Iterator[Any]]


def watched(progress: Progress | None, what: str, total: int) -> Watch:
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


@dataclass(frozen=True)
class Prepared:
    """What one GPU runs, ready to run: its inputs, costs, memory manager and prefetch policy."""

    inputs: Inputs
    costs: Costs
    manager: MemoryManager
    prefetch: Prefetch


def prepared(inputs: Inputs, costs: Sequence[Costs], stream: Path | None = None) -> list[Prepared]:
    """Return what each GPU of a run needs, as the scenario wants it; `stream` is a folder for what is recorded."""
    ready = []
    for part, own in zip(inputs.parts, costs, strict=True):
        manager = make_manager(part, Spool(None if stream is None else stream / part.device))
        prefetch = make_prefetch(part.scenario, part.model, own.copies[0].queued_ns)
        ready.append(Prepared(part, own, manager, prefetch))
    return ready


#: What runs a scenario: lanes in SimPy's time, which is what a user gets; or the commands that its visits come to,
#: carried out by SimPy processes, the reference, or by compiled code.
ENGINES = ("lanes", "simpy", "compiled")
#: The copy orders that every engine knows; others run by SimPy processes.
_KNOWN_ORDERS = (Fifo, TwoStreams, Priority)


def run_all(
    inputs: Inputs, ready: Sequence[Prepared], watch: Watch = iter, engine: str = "lanes"
) -> list[measure.Recording]:
    """Simulate one run by one of ENGINES and return what was recorded on each GPU."""
    engine = engine_for(inputs, engine)
    if engine != "lanes":
        return _run_commands(inputs, ready, watch, engine)
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


def _run_commands(inputs: Inputs, ready: Sequence[Prepared], watch: Watch, engine: str) -> list[measure.Recording]:
    """Simulate one run by the commands that its visits come to."""
    from .timing.runs import run_shared, run_stages  # which compile at their first use

    gauges = [Gauge() for _ in ready]
    hosts: list[HostMemory | None] = [None for _ in ready]
    one_thread = inputs.scenario.parallel.dispatch_threads == "one"
    if inputs.placed is not None and inputs.links is not None:
        managers, prefetches = [gpu.manager for gpu in ready], [gpu.prefetch for gpu in ready]
        visits = watch(decided(inputs, managers, prefetches, gauges))
        decoded = run_shared(inputs, ready, gauges, visits, one_thread=one_thread, engine=engine)
        ready = [replace(gpu, inputs=replace(gpu.inputs, steps=inputs.steps)) for gpu in ready]
    else:
        hosts = [make_host_memory(gpu.inputs, gpu.manager.spool) for gpu in ready]
        runs = [
            StageRun(
                watch(dispatched(gpu.inputs, gpu.manager, gpu.prefetch, gauge, host)),
                gpu.manager,
                gpu.costs,
                gpu.inputs.scenario,
                gpu.prefetch.guesses > 0,
                gauge,
                host,
            )
            for gpu, gauge, host in zip(ready, gauges, hosts, strict=True)
        ]
        flow = flow_of(inputs.model, inputs.trace, inputs.steps)
        decoded = run_stages(
            runs, flow, inputs.links, one_thread=one_thread, engine=engine, sources=_sources(ready, engine),
            ticks=watch(iter(range(inputs.layer_visits))),
        )  # fmt: skip
    return [_recording(gpu, found, host) for gpu, found, host in zip(ready, decoded, hosts, strict=True)]


def _sources(ready: Sequence[Prepared], engine: str) -> list[Source]:
    """Return what each GPU decides by, where compiled code decides on all of them."""
    if engine != "compiled":
        return []
    from .decide.sources import decided_in_python

    sources = [
        source_of(gpu.inputs, gpu.manager, gpu.prefetch, host_memory=gpu.inputs.scenario.tiers.host_budget != "all")
        for gpu in ready
    ]
    return [] if any(map(decided_in_python, sources)) else sources


def source_of(inputs: Inputs, manager: MemoryManager, prefetch: Prefetch, *, host_memory: bool = False) -> Source:
    """Return what one GPU decides by; `host_memory`: there is less of it than all experts take."""
    from .decide.sources import Source

    return Source(
        inputs.trace, inputs.steps, manager, prefetch, inputs.guesses, inputs.scenario.prefetch.issue, inputs.budgets,
        make_miss(inputs), host_memory,
    )  # fmt: skip


def engine_for(inputs: Inputs, engine: str) -> str:
    """Return which engine runs if one is asked for, `simpy` where `lanes` does not know the copy order.

    Raises ScenarioError as `check_engine` does.
    """
    if engine == "lanes" and inputs.scenario.copy_.order not in _KNOWN_ORDERS:
        engine = "simpy"
    check_engine(inputs, engine)
    return engine


def check_engine(inputs: Inputs, engine: str) -> None:
    """Raise ScenarioError if there is no such engine, or a run does not go by the commands that it carries out yet."""
    scenario = inputs.scenario
    if engine not in ENGINES:
        raise ScenarioError(unknown_name("engine", engine, ENGINES))
    if engine != "simpy" and scenario.copy_.order not in _KNOWN_ORDERS:
        known = ", ".join(name for name, order in COPY_ORDERS.items() if order in _KNOWN_ORDERS)
        raise ScenarioError(
            f"copy.discipline = {scenario.copy_.discipline!r}: engine {engine!r} knows {known} alone: choose 'simpy'"
        )


def run(
    inputs: Inputs, costs: Costs, manager: MemoryManager, prefetch: Prefetch, watch: Watch = iter
) -> measure.Recording:
    """Simulate a run on one GPU with the given manager and prefetch policy, and return what was recorded."""
    gauge = Gauge()
    host_memory = make_host_memory(inputs, manager.spool)
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
        inputs.device, inputs.first_layer, host_memory, costs.copies_hold_host, moved,
    )  # fmt: skip
