"""Whole runs by their commands: one GPU, the stages of a pipeline, and GPUs that share the experts of every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...resources.links import Links
from ...workloads.batches import Step
from ...workloads.trace import RoutingTrace
from ..costs.all_to_all import AllToAll
from ..decide.decision_layout import Shared, Together
from ..decide.dispatch import step_accesses
from ..decide.expert_parallel import ParallelVisit, served_by, traffic
from ..decide.host_memory import HostRooms
from ..decide.pipeline import Flow, flow_of, received_steps, sent_bytes
from ..decide.program import Program, SharedLayers, Stage, pulled_program, stages_program
from ..decide.pulled import Pulled
from ..policies.prefetch import Gauge
from ..scenario.inputs import Inputs
from .host_state import Arrivals, Exchanges, Sending
from .lanes import Lane
from .machine import Place
from .records import COPIES_FROM, Decoded
from .simulation import GpuRun, OneGpu, Simulation

if TYPE_CHECKING:
    from ..decide.compiled_decisions import Decisions
    from ..decide.decision_layout import Shared
    from ..decide.sources import Source

#: Compiled code makes its commands, too; a stage that inherits from it may order anything.
_COMPILED_STAGE = Stage


@dataclass(frozen=True)
class CarriedOutBy:
    """What carries a run out: one of `simulation.ENGINES`; with `sources`, compiled code decides.

    That draws from `ticks` once for every visit.
    """

    engine: str
    sources: Sequence[Source] = ()
    ticks: Iterator[Any] = field(default_factory=lambda: iter(()))


def run_stages(inputs: Inputs, runs: Sequence[GpuRun], by: CarriedOutBy) -> list[Decoded]:
    """Run one GPU, or the stages of a pipeline, each on a GPU of its own, and return what was recorded on each.

    One host thread serves all stages of a step before the next, or each GPU has a thread of its own.
    """
    links, one_thread = inputs.links, inputs.scenario.parallel.dispatch_threads == "one" or len(runs) == 1
    simulation = Simulation(len(runs), by.engine)
    flow = None
    if links is not None:
        links.to_next()  # what is sent over them counts on the network
        simulation.network = links.network([run.costs for run in runs])
        flow = flow_of(inputs.model, inputs.trace, inputs.steps)
    tier = simulation.host_rooms(runs[0].manager.experts, [run.costs for run in runs])
    gpus = _gpus(simulation, inputs, runs, tier, one_thread=one_thread)
    if links is not None and flow is not None:
        _connect(simulation, gpus, flow, links)
    alone = tier is not None and len(runs) > 1 and not one_thread
    stages = _stages(inputs, gpus, runs, flow, alone=alone)
    threads = [[*range(len(gpus))]] if one_thread else [[number] for number in range(len(gpus))]
    for served in threads:
        program = _program(inputs, [stages[number] for number in served], runs[served[0]].gauge)
        simulation.thread(program, [gpus[number] for number in served])
    if by.sources and all(type(stage) is _COMPILED_STAGE for stage in stages):
        simulation.decided_by(_decisions(inputs, by.sources, gpus, stages, threads), by.ticks)
    simulation.run()
    return [one.recorded() for one in gpus]


def _stages(
    inputs: Inputs, gpus: Sequence[OneGpu], runs: Sequence[GpuRun], flow: Flow | None, *, alone: bool
) -> list[Stage]:
    """Returns what each GPU is to do with the steps; `alone` as of `Stage`."""
    return [
        Stage(
            one.gpu, run.visits, len(run.costs.model.expert_bytes), inputs.steps, one.note,
            has_head=run is runs[-1], awaits_tokens=inputs.pulled is not None,
            receives=None if flow is None else received_steps(flow, number),
            sends=None if flow is None else sent_bytes(flow, number, len(runs)),
            alone=alone,
        )
        for number, (one, run) in enumerate(zip(gpus, runs, strict=True))
    ]  # fmt: skip


def _gpus(
    simulation: Simulation, inputs: Inputs, runs: Sequence[GpuRun], tier: HostRooms | None, *, one_thread: bool
) -> list[OneGpu]:
    """Returns the GPUs of a run, in order; each has a host thread of its own, or all have one."""
    links, network = inputs.links, simulation.network
    lends = inputs.expert_parallel is not None and inputs.scenario.parallel.lends
    return [
        OneGpu(
            simulation,
            run,
            Place(
                number,
                "host" if one_thread else f"host{number}",
                None if links is None else links.host_link(number, run.costs, network),
                lends,
                inputs.most_tokens,
                simulation.host_lanes,
            ),
            tier,
        )
        for number, run in enumerate(runs)
    ]


def _program(inputs: Inputs, stages: Sequence[Stage], gauge: Gauge) -> Program:
    """Returns the program of a thread: of steps that are known, or of those that it pulls from a scheduler."""
    if inputs.pulled is None:
        return stages_program(stages)
    (stage,) = stages
    return pulled_program(stage, inputs.pulled, gauge)


def _decisions(
    inputs: Inputs, sources: Sequence[Source], gpus: Sequence[OneGpu], stages: Sequence[Stage],
    threads: Sequence[Sequence[int]],
) -> Decisions:  # fmt: skip
    """Returns the compiled decisions of all stages."""
    from ..decide.compiled_decisions import Decisions  # which compiles at its first import
    from ..decide.decision_layout import Part

    parts = [
        Part(one, stage.gpu, gpu.note_resolved, stage.has_head, stage.receives, stage.sends)
        for one, gpu, stage in zip(sources, gpus, stages, strict=True)
    ]
    return Decisions(parts, threads, pulls=_pulls(inputs, gpus))


def _pulls(inputs: Inputs, gpus: Sequence[OneGpu]) -> tuple[Pulled, Gauge] | None:
    """Returns the scheduler of a run and the clock that it goes by, if there is one."""
    return None if inputs.pulled is None else (inputs.pulled, gpus[0].gauge)


def _connect(engine: Simulation, gpus: Sequence[OneGpu], flow: Flow, links: Links) -> None:
    """Let each stage send its activations to the next, and the last one its tokens to the first."""
    for number, (one, costs) in enumerate(zip(gpus, links.to_next(), strict=True)):
        to = (number + 1) % len(gpus)
        arrivals = gpus[to].state.receives = Arrivals(engine.env, costs.arrival_ns)
        disturbers = one.lanes.streams if costs.slowed else []
        lane = engine.lane(
            one.lanes.timeline, f"gpu{number}", f"copy engine to gpu{to}", costs.lags, engine.network, disturbers
        )
        one.state.sends = Sending(lane, costs, sent_bytes(flow, number, len(gpus)), arrivals)


def _servers(
    trace: RoutingTrace, step: Step, owners: Sequence[Sequence[int]], only: npt.NDArray[Any], gpus: int
) -> npt.NDArray[np.int64]:
    """Returns the GPU that serves each expert in a step (layers, experts); of those that nobody chose, any."""
    table = only.copy()
    for accesses in step_accesses(trace, step):
        for expert, gpu in served_by(owners, accesses, gpus).items():
            table.flat[expert] = gpu
    return table


class SharingGpus:
    """GPUs that share the experts of every layer: the lanes between them, and the tokens that they exchange."""

    def __init__(self, engine: Simulation, gpus: Sequence[OneGpu], inputs: Inputs, links: Links) -> None:
        self._engine, self._gpus, self._links = engine, gpus, links
        token_bytes, measured = inputs.model.activation_bytes(1), inputs.profile.exchange
        self._all_to_all = AllToAll(links.routes(), links.topology, token_bytes, measured)
        estimate = self._all_to_all.how
        if inputs.expert_parallel is not None and inputs.expert_parallel.moves_tokens and estimate is not None:
            links.estimates["all-to-all"] = estimate
        self._traffic: npt.NDArray[Any] | None = None
        self._lanes: dict[tuple[int, int], Lane] = {}
        self._moved = [one.spool.column("sent", np.int32) for one in gpus]
        lanes = {
            number: engine.lane(one.lanes.timeline, f"gpu{number}", "all-to-all") for number, one in enumerate(gpus)
        }
        if inputs.scenario.parallel.lends:
            self._lanes = {pair: self._make_lane(*pair) for pair in permutations(range(len(gpus)), 2)}
            engine.peers = {
                pair: (links.peer(*pair), partial(self._lane_from, *pair), lane) for pair, lane in self._lanes.items()
            }
        self.exchanges = Exchanges(lanes, self._ns, links.peer, self._lane_from, inputs.model.expert_bytes)

    def moves(self, traffic: npt.NDArray[Any]) -> bool:
        """Whether an exchange of so many tokens takes any time."""
        return self._all_to_all.ns(traffic) > 0

    def note(self, visit: ParallelVisit) -> None:
        """Note what was decided."""
        self._traffic = visit.traffic
        for one, own in zip(self._gpus, visit.visits, strict=True):
            one.note(own)
        if visit.traffic is not None and self.moves(visit.traffic):
            for column, tokens in zip(self._moved, visit.traffic, strict=True):
                column.buffer.frombytes(tokens.astype(np.int32).tobytes())

    def shared(self, inputs: Inputs, *, one_thread: bool) -> Shared:
        """Returns how compiled decisions share the experts, where who serves what is known before the run."""
        from ..decide.decision_layout import Shared

        layout, trace = inputs.expert_parallel, inputs.trace
        assert layout is not None
        owners = [gpus for of_layer in layout.owners for gpus in of_layer]
        only = layout.first_owners.reshape(trace.layers, -1)
        replicated = layout.moves_tokens and layout.replicated

        def laid_out(first: int, end: int) -> Together:
            laid, servers = [], []
            for step, home in zip(inputs.steps[first:end], layout.homes[first:end], strict=True):
                if not layout.moves_tokens:
                    laid.append(self._own(trace, step, home))
                    continue
                servers.append(_servers(trace, step, owners, only, layout.gpus) if replicated else only)
                laid.append(self._laid_out(trace, step, home, servers[-1]))
            lives, serves, exchanges = (np.array(values, dtype=np.int64) for values in zip(*laid, strict=True))
            return Together(lives, serves, exchanges, np.array(servers) if replicated else None)

        return Shared(layout.owned, one_thread, layout.moves_tokens, layout.remote == "peer", inputs.steps, laid_out)

    def _own(self, trace: RoutingTrace, step: Step, home: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], ...]:
        """Returns what `_laid_out` does where each GPU serves its own tokens."""
        count = len(self._gpus)
        here = np.ones((len(step.rows), trace.layers), bool) if trace.routed is None else trace.routed[step.rows]
        serves = np.stack([here[home == gpu].any(axis=0) for gpu in range(count)], axis=1)
        return np.bincount(home, minlength=count), serves, np.zeros(trace.layers, dtype=np.int64)

    def _laid_out(
        self, trace: RoutingTrace, step: Step, home: npt.NDArray[Any], server: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[Any], ...]:
        """Returns the tokens of each GPU in a step, who serves any (layers, GPUs), and what exchanges take (layers,).

        `server` (layers, experts) serves each expert. The tokens that these send are noted.
        """
        gpus, layers = len(self._gpus), np.arange(trace.layers)
        servers = server[layers[:, None], trace.experts[step.rows]]
        made = None if trace.made is None else trace.made[step.rows]
        moved = traffic(servers, home, made, gpus)
        serves = np.zeros((trace.layers, gpus), dtype=np.int64)
        here = slice(None) if made is None else made
        serves[np.broadcast_to(layers[None, :, None], servers.shape)[here], servers[here]] = 1
        ns = self._all_to_all.all_ns(moved)
        for gpu, column in enumerate(self._moved):
            column.add(moved[ns > 0, gpu].astype(np.int32).tobytes())
        return np.bincount(home, minlength=gpus), serves, ns

    def recorded(self) -> list[Decoded]:
        """Returns what was recorded on each GPU, tokens sent included."""
        count = len(self._gpus)
        return [
            replace(one.recorded(), sent=column.array().reshape(-1, count))
            for one, column in zip(self._gpus, self._moved, strict=True)
        ]

    def _ns(self) -> int:
        assert self._traffic is not None
        return self._all_to_all.ns(self._traffic)

    def _make_lane(self, source: int, target: int) -> Lane:
        """Make the lane of copies from one GPU to another; its place in the timeline is given at its first use."""
        timeline, costs = self._gpus[target].lanes.timeline, self._links.peer(source, target)
        lane = Lane(self._engine.env, self._engine.instant, timeline, -1, costs.lags)
        if self._engine.network is not None:
            lane.join(self._engine.network.share())
        return lane

    def _lane_from(self, source: int, target: int) -> Lane:
        """Returns the lane of copies from one GPU to another."""
        lane = self._lanes[source, target]
        if lane.number < 0:
            title = COPIES_FROM.format(f"gpu{source}")
            lane.number = lane.timeline.add_lane(f"gpu{target}", "peer", title)
        return lane


def run_shared(
    inputs: Inputs, runs: Sequence[GpuRun], visits: Iterator[ParallelVisit], by: CarriedOutBy
) -> list[Decoded]:
    """Run GPUs that go through every layer together and return what was recorded on each.

    `visits` are those of all, decided as they are asked for.
    """
    links, layout, model = inputs.links, inputs.expert_parallel, inputs.model
    assert links is not None and layout is not None
    one_thread = inputs.scenario.parallel.dispatch_threads == "one"
    simulation = Simulation(len(runs), by.engine)
    simulation.network = links.network([run.costs for run in runs])
    tier = simulation.host_rooms(model.experts, [runs[0].costs])
    gpus = _gpus(simulation, inputs, runs, tier, one_thread=one_thread)
    sharing = SharingGpus(simulation, gpus, inputs, links)
    turns = one_thread and len(gpus) > 1
    layers = SharedLayers([one.gpu for one in gpus], visits, model.layers, turns, sharing.moves, sharing.note)
    simulation.thread(layers.program(inputs.steps, layout.homes), gpus, sharing.exchanges)
    if by.sources and not layers.apart:
        from ..decide.compiled_decisions import Decisions  # which compiles at its first import
        from ..decide.decision_layout import Part

        parts = [Part(source, one.gpu, one.note_resolved) for source, one in zip(by.sources, gpus, strict=True)]
        shared = sharing.shared(inputs, one_thread=turns)
        simulation.decided_by(Decisions(parts, [range(len(gpus))], shared), by.ticks)
    simulation.run()
    return sharing.recorded()
