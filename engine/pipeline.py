"""Pipeline parallelism: several GPUs, each with a stage of the layers, that steps pass one after the other.

Every stage serves all steps in the same order, as `decoder` serves them on one GPU. Its first kernel of a step waits,
in stream order, for the activations that the stage before sends; on the first stage, a decode step waits for the tokens
that the last one sampled for the same sequences. What is decided at a stage depends on that stage's order alone.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from ..resources.lane import Completion, CoupledLane, FifoLane, Pending
from ..resources.network import Carried, Network
from ..resources.timeline import ACTIVATION
from ..workloads.batches import Step, continued_steps
from ..workloads.model import Model
from ..workloads.trace import RoutingTrace
from .costs.costs import Costs, activation_bytes
from .decide.dispatch import Visit
from .decide.host_memory import HostMemory
from .decide.memory_manager import MemoryManager
from .decoder import collector_off
from .gpu import Decoded, Gpu
from .links import Links, PeerCosts, peer_lane
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
    host_memory: HostMemory | None = None


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
    """Return what passes between the stages of a model: a hidden state for each token, an id for each sequence."""
    continued = continued_steps(steps, trace.sequence)
    needed = {step for before in continued for step in before}
    token_bytes = [
        _TOKEN_BYTES * len(np.unique(trace.sequence[step.rows])) if number in needed else 0
        for number, step in enumerate(steps)
    ]
    return Flow(steps, continued, [activation_bytes(model, len(step.rows)) for step in steps], token_bytes)


class _Arrivals:
    """When what one stage sends for each step is at another: promised before it is known, if it is asked for."""

    def __init__(self, env: simpy.Environment, steps: int, lag_ns: int) -> None:
        """Let what waits for it begin so much later than what waits for a copy from the host."""
        self._env, self._lag_ns = env, lag_ns
        self._of: list[Completion | None] = [None] * steps

    def of(self, step: int) -> Completion:
        """Return when it is there, or a promise of it."""
        found = self._of[step]
        if found is None:
            found = self._of[step] = Pending()
        return found if isinstance(found, int) or found.end_ns is None else found.end_ns

    def set(self, step: int, end: Completion) -> None:
        """Say when it is there."""
        if isinstance(end, int) and self._of[step] is None:
            self._of[step] = end + self._lag_ns
            return
        promised = self.of(step)
        assert isinstance(promised, Pending)  # nobody else has kept it

        def keep() -> None:
            # In an event of its own: stages wait for each other, and would call each other ever deeper.
            event = self._env.event()
            end_ns = end if isinstance(end, int) else end.end_ns or 0
            event.callbacks.append(lambda _: promised.resolve(end_ns + self._lag_ns))
            event.succeed()

        if isinstance(end, int):
            keep()
        else:
            end.then(keep)


@dataclass(frozen=True)
class _Way:
    """What goes from one stage to another: by which lane, what it costs, its bytes at each step, and its arrivals."""

    lane: FifoLane | CoupledLane
    costs: PeerCosts
    size_bytes: Sequence[int]
    arrivals: _Arrivals

    def send(self, gpu: Gpu, step: int, end: Completion) -> None:
        """Let the host thread of a GPU enqueue the copy of what a kernel leaves that ends at `end`."""
        costs, size_bytes = self.costs, self.size_bytes[step]
        if not size_bytes:
            return
        gpu.now_ns += gpu.costs.wait_ns + costs.host_ns
        arrived = self.lane.submit(
            costs.queued_ns(size_bytes),
            costs.alone_ns(size_bytes),
            gpu.now_ns + costs.latency_ns,
            end,
            ACTIVATION,
            visit=gpu.visit,
            slowdown=costs.slowdown(size_bytes),
            transfer=costs.transfer(size_bytes),
        )
        self.arrivals.set(step, arrived)


@dataclass
class _Stage:
    """One stage at work: its GPU, its visits, and the steps that it serves.

    `receives` are the arrivals that its steps wait for, `waits_for` (steps,) which of them, -1 for none.
    """

    gpu: Gpu
    visits: Iterator[Visit]
    steps: Sequence[Step]
    has_head: bool
    receives: _Arrivals | None = None
    waits_for: Sequence[int] = ()
    sends: _Way | None = None

    def serve(self, step: int) -> Generator[simpy.Event, Any, None]:
        """Dispatch one step: its layers here, as `decoder.host` does, then the head, or what the next stage needs."""
        gpu, served = self.gpu, self.steps[step]
        last = yield from gpu.forward(served, self.visits, self._arrival(step))
        yield from gpu.catch_up()  # once a step at least, also where no lane runs in SimPy's time
        if self.has_head:
            last = yield from gpu.head(served)
        if self.sends is not None:
            self.sends.send(gpu, step, last)
        gpu.spool.flush()

    def _arrival(self, step: int) -> Completion:
        """Return when what this step waits for comes from another GPU; 0 if it waits for nothing."""
        if self.receives is None or self.waits_for[step] < 0:
            return 0
        return self.receives.of(self.waits_for[step])


def decode_stages(stages: Sequence[StageRun], flow: Flow, links: Links | None, *, one_thread: bool) -> list[Decoded]:
    """Run the stages of a pipeline, each on a GPU of its own, and return what was recorded on each.

    `links` are those between the GPUs; None for one stage. `one_thread` serves all stages of a step before the next;
    otherwise each GPU has a thread of its own.
    """
    env = simpy.Environment()
    network = None
    if links is not None:
        pipeline_routes(links)  # what is sent over them counts on the network
        network = links.network([stage.costs for stage in stages])
    most_tokens = max(len(step.rows) for step in flow.steps)
    working = []
    for number, run in enumerate(stages):
        gpu = Gpu(
            env, run.manager, run.costs, run.scenario, prefetching=run.prefetching, most_tokens=most_tokens,
            device=f"gpu{number}", host="host" if one_thread or len(stages) == 1 else f"host{number}",
            link=None if links is None else links.host_link(number, run.costs, network),
        )  # fmt: skip
        gpu.show(run.gauge)
        working.append(_Stage(gpu, run.visits, flow.steps, has_head=run is stages[-1]))
    if links is not None:
        _connect(env, working, flow, links, network)
    groups = [working] if one_thread else [[stage] for stage in working]
    for served in groups:
        env.process(_thread(served, len(flow.steps)))
    with collector_off():
        env.run()
    return [stage.gpu.recorded() for stage in working]


def received_steps(flow: Flow, stage: int) -> list[int]:
    """Return the step whose data from the stage before each step waits for at a stage (steps,); -1 for none."""
    if stage:
        return list(range(len(flow.steps)))
    return [before[-1] if before else -1 for before in flow.continued]


def sent_bytes(flow: Flow, stage: int, stages: int) -> Sequence[int]:
    """Return what a stage sends to the next one at each step, or the last one to the first (steps,)."""
    return flow.activation_bytes if stage < stages - 1 else flow.token_bytes


def pipeline_routes(links: Links) -> list[PeerCosts]:
    """Return what copies from each stage to the next take, and from the last to the first; raise if a route lacks."""
    gpus = len(links.gpus)
    return [links.peer(number, (number + 1) % gpus) for number in range(gpus)]


def sent(recordings: Sequence[Recording], flow: Flow, links: Links) -> list[Carried]:
    """Return what each stage of a finished run has sent to the next, and the last one to the first."""
    carried = []
    for number, (recording, costs) in enumerate(zip(recordings, pipeline_routes(links), strict=True)):
        copies = recording.spans[recording.spans["kind"] == ACTIVATION]
        size_bytes = np.array(sent_bytes(flow, number, len(recordings)), dtype=np.int64)
        step = copies["visit"] // len(recording.expert_bytes)
        carried.append(Carried(costs.route, size_bytes[step], copies["start_ns"], copies["end_ns"]))
    return carried


def _connect(
    env: simpy.Environment, stages: Sequence[_Stage], flow: Flow, links: Links, network: Network | None
) -> None:
    """Let each stage send its activations to the next, and the last one its tokens to the first."""
    steps = len(flow.steps)
    for number, (stage, costs) in enumerate(zip(stages, pipeline_routes(links), strict=True)):
        to = (number + 1) % len(stages)
        arrivals = _Arrivals(env, steps, costs.arrival_ns)
        gpu = stage.gpu
        disturbers = gpu.disturbing if costs.slowed else []
        title = f"copy engine to gpu{to}"
        lane = peer_lane(env, gpu.timeline, f"gpu{number}", title, costs.lags, network, disturbers)
        stage.sends = _Way(lane, costs, sent_bytes(flow, number, len(stages)), arrivals)
        stages[to].receives = arrivals
        stages[to].waits_for = received_steps(flow, to)


def _thread(stages: Sequence[_Stage], steps: int) -> Generator[simpy.Event, Any, None]:
    """Serve every step at these stages, one after the other, with one host thread."""
    gpu = stages[0].gpu
    for step in range(steps):
        for stage in stages:
            if stage.gpu is not gpu:
                gpu.end_busy()
                stage.gpu.take_over(gpu.now_ns)
                gpu = stage.gpu
                gpu.now_ns += gpu.costs.turn_ns
            yield from stage.serve(step)
    gpu.end_busy()
