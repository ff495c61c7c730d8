"""One run: what each GPU of it needs, and what is recorded there.

`run` and `run_all` take inputs that are loaded and checked; `simulate` makes results of what they record, and `loading`
tries a split of a pipeline by them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..collector import collector_off
from ..resources.spool import Spool
from ..words import unknown_name
from .costs.costs import Costs
from .decide.dispatch import Visit
from .decide.host_memory import HostMemory
from .decide.memory_manager import MemoryManager
from .loading.deciders import dispatched, dispatched_together, make_host_memory, make_manager, make_prefetch, source_of
from .measure.recording import Recording
from .policies.copy_order import COPY_ORDERS, Fifo, Priority, TwoStreams
from .policies.prefetch import Gauge, Prefetch
from .scenario.amounts import ScenarioError
from .scenario.inputs import Inputs
from .timing.ready import is_ready
from .timing.records import Decoded

if TYPE_CHECKING:
    from .decide.sources import Source
    from .timing.simulation import GpuRun

#: Called with what is running, and how many of how many layer visits are done.
Progress = Callable[[str, int, int], None]
#: Passes visits on, perhaps counting them.
Watch = Callable[[Iterator[Any]], Iterator[Any]]


def watched(progress: Progress | None, what: str, total: int) -> Watch:
    """Returns what tells `progress` of every hundredth part of the visits."""
    if progress is None or not total:  # nobody knows how many steps a scheduler will make
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
    """Returns what each GPU of a run needs, as the scenario wants it; `stream` is a folder for what is recorded."""
    ready = []
    for part, own in begun_parts(inputs, costs):
        manager = make_manager(part, Spool(None if stream is None else stream / part.device))
        prefetch = make_prefetch(part.scenario, part.model, own.copies[0].queued_ns)
        ready.append(Prepared(part, own, manager, prefetch))
    return ready


def begun_parts(inputs: Inputs, costs: Sequence[Costs]) -> list[tuple[Inputs, Costs]]:
    """Returns the inputs and costs of each GPU of a run that begins; replicas have the same costs."""
    parts = inputs.begun().parts
    costs = costs if len(costs) == len(parts) else list(costs) * len(parts)
    return [(part, costs_of_steps(part, own)) for part, own in zip(parts, costs, strict=True)]


def costs_of_steps(begun: Inputs, costs: Costs) -> Costs:
    """Returns a GPU's costs for a run that has begun: where it pulls its steps, of these.

    What the costs estimate is noted together.
    """
    if begun.pulled is None:
        return costs
    begun.pulled.swap_ns = costs.profile.d2h.alone.ns, costs.h2d.alone.ns
    found = copy(costs)
    found.attention = costs.attention.of_steps(begun.steps)
    return found


#: What carries out a run's commands: compiled code, or SimPy processes, the reference.
ENGINES = ("compiled", "simpy")
#: With so many layer visits, over all GPUs, a run by SimPy takes longer than compiling.
LONG_VISITS = 20_000
#: Why such a run goes by SimPy.
NOT_COMPILED = "the compiled engine is not compiled yet, and the run is short"
#: The copy orders that every engine knows; others run by SimPy processes.
_KNOWN_ORDERS = (Fifo, TwoStreams, Priority)


@collector_off()
def run_all(
    inputs: Inputs, ready: Sequence[Prepared], watch: Watch = iter, engine: str | None = None
) -> list[Recording]:
    """Simulate one run, by one of ENGINES or as `engine_for` says, and return what was recorded on each GPU.

    Copies that scatter and share links with other GPUs' go by SimPy: compiled code knows how transfers of so many ns
    share them, not of any.
    """
    turns = ready[0].inputs.turns
    if turns is not None and len(ready) > 1:
        each = turns.run([partial(run_all, gpu.inputs, [gpu], watch, engine) for gpu in ready])
        return [_named(recording, gpu.inputs.device) for (recording,), gpu in zip(each, ready, strict=True)]
    scatters = any(gpu.costs.scatter is not None for gpu in ready)
    shares = inputs.links is not None and inputs.scenario.copy_.contention
    engine = "simpy" if scatters and shares else engine_for(inputs, engine).engine
    from .timing.runs import CarriedOutBy, run_shared, run_stages  # which compile at their first use

    if inputs.pulls is not None:
        inputs = ready[0].inputs  # which has the steps of this run, as they are pulled
    host, runs = make_host_memory(inputs, ready[0].manager.spool), [_gpu_run(gpu) for gpu in ready]
    by = CarriedOutBy(engine, _sources(inputs, ready, engine, host), watch(iter(range(inputs.layer_visits))))
    if inputs.expert_parallel is not None and inputs.links is not None:
        managers, prefetches = [gpu.manager for gpu in ready], [gpu.prefetch for gpu in ready]
        visits = watch(dispatched_together(inputs, managers, prefetches, [run.gauge for run in runs], host))
        decoded = run_shared(inputs, runs, visits, by)
        ready = [replace(gpu, inputs=replace(gpu.inputs, steps=inputs.steps)) for gpu in ready]
    else:
        visits_of = [
            watch(dispatched(gpu.inputs, gpu.manager, gpu.prefetch, run.gauge, host))
            for gpu, run in zip(ready, runs, strict=True)
        ]
        runs = [replace(run, visits=visits) for run, visits in zip(runs, visits_of, strict=True)]
        decoded = run_stages(inputs, runs, by)
    return [_recording(gpu, found, host) for gpu, found in zip(ready, decoded, strict=True)]


def _named(recording: Recording, device: str) -> Recording:
    """Returns what a replica recorded, with its lanes told apart from those of others."""
    lanes, number = recording.decoded.timeline.lanes, device.removeprefix("gpu")
    lanes[:] = [replace(lane, device=lane.device.rstrip("0123456789") + number) for lane in lanes]
    return recording


def _gpu_run(gpu: Prepared) -> GpuRun:
    """Returns what a GPU is run with."""
    from .timing.simulation import GpuRun

    return GpuRun(gpu.manager, gpu.costs, gpu.inputs.scenario, gpu.prefetch.guesses > 0, Gauge())


def _sources(inputs: Inputs, ready: Sequence[Prepared], engine: str, host: HostMemory | None) -> list[Source]:
    """Returns what each GPU decides by, where compiled code decides on all of them."""
    if engine != "compiled":
        return []
    from .decide.sources import shared_in_python, stages_in_python

    sources = [source_of(gpu.inputs, gpu.manager, gpu.prefetch, host) for gpu in ready]
    layout = inputs.expert_parallel
    if layout is None:
        return [] if stages_in_python(sources) else sources
    return [] if shared_in_python(sources, layout.remote, spares=layout.spare_experts > 0) else sources


class Chosen(NamedTuple):
    """The engine that runs, one of ENGINES, and why it is not the compiled one, if so."""

    engine: str
    why: str = ""


def engine_for(inputs: Inputs, engine: str | None = None) -> Chosen:
    """Returns which engine runs: the one asked for, or else the compiled one wherever it can.

    It cannot where it does not know the copy order. A short run does not wait for compiling, once after installation;
    it is the same by either engine. Raises ScenarioError if there is no such engine, or it does not know the order.
    """
    if engine is not None and engine not in ENGINES:
        raise ScenarioError(unknown_name("engine", engine, ENGINES))
    copy = inputs.scenario.copy_
    if engine == "simpy":
        return Chosen("simpy", "asked for")
    if copy.order not in _KNOWN_ORDERS:
        known = ", ".join(name for name, order in COPY_ORDERS.items() if order in _KNOWN_ORDERS)
        why = f"copy.discipline = {copy.discipline!r}: engine 'compiled' knows {known} alone"
        if engine is not None:
            raise ScenarioError(f"{why}: choose 'simpy'")
        return Chosen("simpy", why)
    if engine is None:
        visits = inputs.layer_visits * max(1, len(inputs.gpus))
        if inputs.pulls is None and visits < LONG_VISITS and not is_ready():
            return Chosen("simpy", NOT_COMPILED)
    return Chosen("compiled")


def run(inputs: Inputs, costs: Costs, manager: MemoryManager, prefetch: Prefetch, watch: Watch = iter) -> Recording:
    """Simulate a run on one GPU with the given manager and prefetch policy, and return what was recorded."""
    (recording,) = run_all(inputs, [Prepared(inputs, costs, manager, prefetch)], watch)
    return recording


def _recording(gpu: Prepared, decoded: Decoded, host_memory: HostMemory | None = None) -> Recording:
    """Returns what one GPU recorded, with what its metrics need."""
    inputs, costs, sizes = gpu.inputs, gpu.costs, gpu.manager.size_of
    pieces = [cost.pieces if costs.by_priority else 1 for cost in costs.copies]
    moved = None
    if inputs.scenario.compression.mixed is not None:
        moved = (sizes, [costs.copy(size_bytes).pieces if costs.by_priority else 1 for size_bytes in sizes])
    return Recording(
        decoded, gpu.manager, inputs.trace, inputs.steps, costs.expert_bytes, pieces, costs.kernel_lags,
        inputs.device, inputs.first_layer, host_memory, costs.copies_hold_host, moved,
        () if inputs.pulled is None else inputs.pulled.idle,
    )  # fmt: skip
