"""The machine of `prestage.testing`, and what only tests of the package itself need besides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from prestage.engine.costs.costs import Costs, part_costs
from prestage.engine.decide.memory_manager import MemoryManager
from prestage.engine.load import completed, steps_of
from prestage.engine.measure.merge import makespan_ns, merged_timeline
from prestage.engine.measure.recording import Recording
from prestage.engine.measure.time_split import time_split
from prestage.engine.policies.eviction import EVICTION
from prestage.engine.policies.prefetch import NoPrefetch
from prestage.engine.run import Prepared, prepared, run_all
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import Scenario
from prestage.resources.profile import Profile
from prestage.testing.machine import (
    ASSUMED,
    EXPERT_FF,
    HIDDEN,
    peers,
    tiny_inputs,
    tiny_model,
    tiny_profile,
    tiny_scenario,
    tiny_topology,
    tiny_trace,
)
from prestage.workloads.model import Model
from prestage.workloads.trace import RoutingTrace

__all__ = [
    "ASSUMED", "EXPERT_FF", "HIDDEN", "books", "check_books", "peers", "run_alike", "run_resident", "tiny_costs",
    "tiny_inputs", "tiny_model", "tiny_pipeline", "tiny_profile", "tiny_run", "tiny_scenario", "tiny_topology",
    "tiny_trace",
]  # fmt: skip


def tiny_pipeline(model: Model, profile: Profile, trace: RoutingTrace, scenario: Scenario) -> Inputs:
    """Returns what a scenario of several stages or micro-batches would have loaded from files."""
    steps = steps_of(scenario, trace)
    return completed(Inputs(scenario, model, profile, trace, steps, budget_bytes=0, guesses=None))


def books(recordings: list[Recording]) -> list[tuple[bytes, ...]]:
    """What each GPU recorded."""
    return [
        (
            one.spans.tobytes(),
            one.decoded.accesses.tobytes(),
            one.decoded.visits.tobytes(),
            one.decoded.arrivals.tobytes(),
            one.decoded.sent.tobytes(),
            b"" if one.decoded.resolved is None else one.decoded.resolved.tobytes(),
            str(one.decoded.timeline.lanes).encode(),
        )
        for one in recordings
    ]


def run_alike(inputs: Inputs, ready: Callable[[Inputs], Sequence[Prepared]] | None = None) -> list[Recording]:
    """Run inputs by the engine that a user gets, and return what it recorded, which SimPy's must have recorded, too.

    What is worked by hand is so held against either; `ready` makes what a run begins with, anew for each.
    """
    make = ready or (lambda inputs: prepared(inputs, part_costs(inputs)))
    found = run_all(inputs, make(inputs))
    assert books(found) == books(run_all(inputs, make(inputs), engine="simpy"))
    return found


def tiny_run(model: Model, profile: Profile, trace: RoutingTrace, scenario: Scenario) -> Recording:
    """Simulate hand-made inputs on one GPU, as `run_alike` does."""
    (recording,) = run_alike(tiny_inputs(model, profile, trace, scenario))
    return recording


def run_resident(inputs: Inputs) -> list[Recording]:
    """Run inputs with every expert in memory from the start, on all GPUs, as `run_alike` does."""

    def ready(inputs: Inputs) -> list[Prepared]:
        made = []
        for part, costs in zip(inputs.parts, part_costs(inputs), strict=True):
            model = part.model
            manager = MemoryManager(model.expert_bytes, model.experts, model.total_expert_bytes, EVICTION["lru"])
            manager.preload(range(model.total_experts))
            made.append(Prepared(part, costs, manager, NoPrefetch()))
        return made

    return run_alike(inputs, ready)


def tiny_costs(model: Model, profile: Profile, scenario: Scenario, *, timed: bool = False) -> Costs:
    """Returns what a scenario's costs are where nothing is run."""
    nothing = RoutingTrace(np.zeros((0, model.layers, model.top_k), dtype=np.uint8), model.experts)
    return Costs(Inputs(scenario, model, profile, nothing, [], budget_bytes=0, guesses=None), timed=timed)


def check_books(recordings: list[Recording]) -> npt.NDArray[Any]:
    """Check that every GPU's time comes to the makespan, that a visit's kernels of one kind wait for another GPU once,
    and that no lane overlaps itself; return all spans, merged.
    """
    run_ns = makespan_ns(recordings)
    for recording in recordings:
        assert sum(round(ms * 1e6) for ms in time_split(recording, run_ns).values()) == run_ns
        arrivals = recording.decoded.arrivals[["visit", "kind"]]
        assert len(np.unique(arrivals)) == len(arrivals)  # `time_split` looks for one each
    timeline = merged_timeline(recordings)
    spans = timeline.spans()
    assert len(spans) == sum(len(recording.spans) for recording in recordings)
    for lane in range(len(timeline.lanes)):
        busy = np.sort(spans[spans["lane"] == lane], order=["start_ns", "end_ns"])
        assert (busy["start_ns"][1:] >= busy["end_ns"][:-1]).all(), timeline.lanes[lane]
    return spans
