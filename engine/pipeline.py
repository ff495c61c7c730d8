"""Pipeline parallelism: several GPUs, each with a stage of the layers, that steps pass one after the other.

Every stage serves all steps in the same order. Its first kernel of a step waits, in stream order, for the activations
that the stage before sends; on the first stage, a decode step waits for the tokens that the last one sampled for the
same sequences. What is decided at a stage depends on that stage's order alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..resources.network import Carried
from ..resources.timeline import ACTIVATION
from ..workloads.batches import Step, continued_steps
from ..workloads.model import Model
from ..workloads.trace import RoutingTrace
from .costs.costs import Costs, activation_bytes
from .decide.dispatch import Visit
from .decide.memory_manager import MemoryManager
from .links import Links, PeerCosts
from .measure.recording import Recording
from .policies.prefetch import Gauge
from .scenario.scenario import Scenario


@dataclass(frozen=True)
class StageRun:
    """What one stage runs: its visits, as they are decided; `prefetching`: its predictor runs too."""

    visits: Iterator[Visit]
    manager: MemoryManager
    costs: Costs
    scenario: Scenario
    prefetching: bool
    gauge: Gauge


@dataclass(frozen=True)
class Flow:
    """The steps that pass the stages, and what passes between them.

    `continued` (steps,) are the steps whose sampled tokens each one goes on from (see `batches.continued_steps`);
    `activation_bytes` (steps,) go from a stage to the next, `token_bytes` (steps,) from the last to the first, 0 where
    no later step needs them.
    """

    steps: Sequence[Step]
    continued: Sequence[tuple[int, ...]]
    activation_bytes: Sequence[int]
    token_bytes: Sequence[int]


#: A sampled token's id, an int64 as torch makes it.
_TOKEN_BYTES = 8


def flow_of(model: Model, trace: RoutingTrace, steps: Sequence[Step]) -> Flow:
    """Returns what passes between the stages of a model: a hidden state for each token, an id for each sequence."""
    continued = continued_steps(steps, trace.sequence)
    needed = {step for before in continued for step in before}
    token_bytes = [
        _TOKEN_BYTES * len(np.unique(trace.sequence[step.rows])) if number in needed else 0
        for number, step in enumerate(steps)
    ]
    return Flow(steps, continued, [activation_bytes(model, len(step.rows)) for step in steps], token_bytes)


def received_steps(flow: Flow, stage: int) -> list[int]:
    """Returns the step whose data from the stage before each step waits for at a stage (steps,); -1 for none."""
    if stage:
        return list(range(len(flow.steps)))
    return [before[-1] if before else -1 for before in flow.continued]


def sent_bytes(flow: Flow, stage: int, stages: int) -> Sequence[int]:
    """Returns what a stage sends to the next one at each step, or the last one to the first (steps,)."""
    return flow.activation_bytes if stage < stages - 1 else flow.token_bytes


def pipeline_routes(links: Links) -> list[PeerCosts]:
    """Returns what copies from each stage to the next take, and from the last to the first; raise if a route lacks."""
    gpus = len(links.gpus)
    return [links.peer(number, (number + 1) % gpus) for number in range(gpus)]


def sent(recordings: Sequence[Recording], flow: Flow, links: Links) -> list[Carried]:
    """Returns what each stage of a finished run has sent to the next, and the last one to the first."""
    carried = []
    for number, (recording, costs) in enumerate(zip(recordings, pipeline_routes(links), strict=True)):
        copies = recording.spans[recording.spans["kind"] == ACTIVATION]
        size_bytes = np.array(sent_bytes(flow, number, len(recordings)), dtype=np.int64)
        step = copies["visit"] // len(recording.expert_bytes)
        carried.append(Carried(costs.route, size_bytes[step], copies["start_ns"], copies["end_ns"]))
    return carried
