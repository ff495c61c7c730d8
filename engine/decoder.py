"""The overlapped decoder: one host thread dispatches layer visits to the lanes of one GPU, in SimPy's time.

The host thread is the story: it launches the dense part, learns the router's choice, enqueues copies and launches
experts behind them, then prefetches. What each of these calls takes, and when its work is done, `gpu` knows.
"""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import simpy

from ..workloads.batches import Step
from .costs.costs import Costs
from .decide.dispatch import Visit
from .decide.host_memory import HostMemory
from .decide.memory_manager import MemoryManager
from .gpu import Decoded, Gpu
from .offloaded import OffloadedGpu
from .policies.prefetch import Gauge
from .scenario.scenario import Scenario
from .undisturbed import UndisturbedGpu, undisturbed


def decode(
    visits: Iterator[Visit],
    steps: Sequence[Step],
    manager: MemoryManager,
    costs: Costs,
    scenario: Scenario,
    *,
    prefetching: bool,
    gauge: Gauge | None = None,
    host_memory: HostMemory | None = None,
) -> Decoded:
    """Run the visits on one GPU's lanes and return what was recorded.

    `prefetching`: the predictor runs too. `gauge` is what policies read the clock and the link from.
    `host_memory` is what decided the tiers below the GPU for these visits, where there are any.
    """
    env = simpy.Environment()
    most_tokens = max((len(step.rows) for step in steps), default=0)
    gpu = gpu_class(manager, costs, scenario, most_tokens, gauge)(
        env, manager, costs, scenario, prefetching=prefetching, most_tokens=most_tokens, host_memory=host_memory
    )
    if gauge is not None:
        gpu.show(gauge)
    env.process(host(gpu, visits, steps))
    with collector_off():
        env.run()
    return gpu.recorded()


def gpu_class(
    manager: MemoryManager, costs: Costs, scenario: Scenario, most_tokens: int, gauge: Gauge | None
) -> type[Gpu]:
    """Return the quickest kind of `Gpu` that does all that a run wants of it."""
    if not scenario.only_fetches:
        return OffloadedGpu
    return UndisturbedGpu if gauge is None and undisturbed(manager, costs, scenario, most_tokens) else Gpu


@contextmanager
def collector_off() -> Iterator[None]:
    """Switch the garbage collector off: a run makes no cycles, and walking its many small objects costs a third."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def host(gpu: Gpu, visits: Iterator[Visit], steps: Sequence[Step]) -> Generator[simpy.Event, Any, None]:
    """Dispatch every step: the dense part, the choice, copies and experts of each layer, then the head."""
    for step in steps:
        yield from gpu.forward(step, visits)
        yield from gpu.catch_up()  # once a step at least, also where no lane runs in SimPy's time
        yield from gpu.head(step)
        gpu.spool.flush()
    gpu.end_busy()
