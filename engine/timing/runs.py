"""Whole runs by their commands: one GPU, the stages of a pipeline, and GPUs that share the experts of every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...resources.links import Links
from ...resources.network import Network
from ...workloads.batches import Step
from ...workloads.trace import RoutingTrace
from ..costs.all_to_all import AllToAll
from ..costs.costs import Costs
from ..decide.decision_layout import Shared, Together
from ..decide.dispatch import Visit, step_accesses
from ..decide.expert_parallel import ParallelVisit, served_by, traffic
from ..decide.memory_manager import MemoryManager
from ..decide.pipeline import Flow, received_steps, sent_bytes
from ..decide.program import SharedLayers, Stage, stages_program
from ..policies.prefetch import Gauge
from ..scenario.inputs import Inputs
from ..scenario.scenario import Scenario
from .host import Arrivals, Exchanges, Sending
from .lanes import Lane
from .records import COPIES_FROM, Decoded
from .simulation import OneGpu, Simulation

if TYPE_CHECKING:
    from ..decide.compiled_decisions import Decisions
    from ..decide.decision_layout import Shared
    from ..decide.sources import Source

#: Compiled code makes its commands, too; a stage that inherits from it may order anything.
_COMPILED_STAGE = Stage


@dataclass(frozen=True)
class StageRun:
    """What one stage runs: its visits, as they are decided; `prefetching`: its predictor runs too."""

    visits: Iterator[Visit]
    manager: MemoryManager
    costs: Costs
    scenario: Scenario
    prefetching: bool
    gauge: Gauge


def run_stages(
    runs: Sequence[StageRun], steps: Sequence[Step], flow: Flow | None, links: Links | None, *, one_thread: bool,
    engine: str, sources: Sequence[Source] = (), ticks: Iterator[Any] | None = None,
) -> list[Decoded]:  # fmt: skip
    """Run the stages of a pipeline, each on a GPU of its own, and return what was recorded on each.

    `links` are those between the GPUs, and `flow` what passes; None for one stage. `one_thread` serves all stages of a
    step before the next; otherwise each GPU has a thread of its own. With `sources`, compiled code decides, which draws
    from `ticks` once for every visit.
    """
    network = None
    if links is not None:
        links.to_next()  # what is sent over them counts on the network
        network = links.network([run.costs for run in runs])
    most_tokens = max((len(step.rows) for step in steps), default=0)
    simulation = Simulation(len(runs), engine)
    simulation.network = network
    tier = simulation.host_rooms(runs[0].manager.experts, [run.costs for run in runs])
    gpus = [
        OneGpu(
            simulation, number, run.manager, run.costs, run.scenario,
            prefetching=run.prefetching, most_tokens=most_tokens,
            host="host" if one_thread or len(runs) == 1 else f"host{number}", gauge=run.gauge,
            link=None if links is None else links.host_link(number, run.costs, network), tier=tier,
        )
        for number, run in enumerate(runs)
    ]  # fmt: skip
    if links is not None and flow is not None:
        _connect(simulation, gpus, flow, links, network)
    stages = [
        Stage(
            one.gpu, run.visits, len(run.costs.model.expert_bytes), steps, one.note,
            has_head=run is runs[-1],
            receives=None if flow is None else received_steps(flow, number),
            sends=None if flow is None else sent_bytes(flow, number, len(runs)),
            alone=tier is not None and len(runs) > 1 and not one_thread,
        )
        for number, (one, run) in enumerate(zip(gpus, runs, strict=True))
    ]  # fmt: skip
    threads = [[*range(len(gpus))]] if one_thread else [[number] for number in range(len(gpus))]
    for served in threads:
        simulation.thread(stages_program([stages[number] for number in served]), [gpus[number] for number in served])
    if sources and all(type(stage) is _COMPILED_STAGE for stage in stages):
        simulation.decided_by(_decisions(sources, gpus, stages, threads), ticks or iter(()))
    simulation.run()
    return [one.recorded() for one in gpus]


def _decisions(
    sources: Sequence[Source], gpus: Sequence[OneGpu], stages: Sequence[Stage], threads: Sequence[Sequence[int]]
) -> Decisions:
    """Returns the compiled decisions of all stages."""
    from ..decide.compiled_decisions import Decisions  # which compiles at its first import
    from ..decide.decision_layout import Part

    parts = [
        Part(one, stage.gpu, gpu.note_resolved, stage.has_head, stage.receives, stage.sends)
        for one, gpu, stage in zip(sources, gpus, stages, strict=True)
    ]
    return Decisions(parts, threads)


def _connect(engine: Simulation, gpus: Sequence[OneGpu], flow: Flow, links: Links, network: Network | None) -> None:
    """Let each stage send its activations to the next, and the last one its tokens to the first."""
    for number, (one, costs) in enumerate(zip(gpus, links.to_next(), strict=True)):
        to = (number + 1) % len(gpus)
        arrivals = gpus[to].state.receives = Arrivals(engine.env, costs.arrival_ns)
        disturbers = one.lanes.streams if costs.slowed else []
        lane = engine.lane(
            one.lanes.timeline, f"gpu{number}", f"copy engine to gpu{to}", costs.lags, network, disturbers
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

    def __init__(
        self, engine: Simulation, gpus: Sequence[OneGpu], links: Links, network: Network | None, exchange: AllToAll,
        expert_bytes: Sequence[int], *, lends: bool,
    ) -> None:  # fmt: skip
        self._engine, self._gpus, self._links, self._network, self._all_to_all = engine, gpus, links, network, exchange
        self._traffic: npt.NDArray[Any] | None = None
        self._lanes: dict[tuple[int, int], Lane] = {}
        self._moved = [one.spool.column("sent", np.int32) for one in gpus]
        lanes = {
            number: engine.lane(one.lanes.timeline, f"gpu{number}", "all-to-all") for number, one in enumerate(gpus)
        }
        if lends:
            self._lanes = {pair: self._make_lane(*pair) for pair in permutations(range(len(gpus)), 2)}
            engine.peers = {
                pair: (links.peer(*pair), partial(self._lane_from, *pair), lane) for pair, lane in self._lanes.items()
            }
        self.exchanges = Exchanges(lanes, self._ns, links.peer, self._lane_from, expert_bytes)

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
        owned = np.zeros((layout.gpus, len(owners)), dtype=bool)
        for expert, gpus in enumerate(owners):
            owned[list(gpus), expert] = True
        only = np.array([gpus[0] for gpus in owners], dtype=np.int64).reshape(trace.layers, -1)
        replicated = layout.moves_tokens and any(len(gpus) > 1 for gpus in owners)

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

        return Shared(owned, one_thread, layout.moves_tokens, layout.remote == "peer", inputs.steps, laid_out)

    def _own(self, trace: RoutingTrace, step: Step, home: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], ...]:
        """Returns what `_laid_out` does where each GPU serves its own tokens."""
        count = len(self._gpus)
        here = np.ones((len(step.rows), trace.layers), bool) if trace.present is None else trace.present[step.rows]
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
        present = None if trace.present is None else trace.present[step.rows]
        moved = traffic(servers, home, present, gpus)
        serves = np.zeros((trace.layers, gpus), dtype=np.int64)
        here = np.ones(servers.shape[:2], dtype=bool) if present is None else present
        serves[np.broadcast_to(layers[None, :, None], servers.shape)[here], servers[here]] = 1
        ns = self._all_to_all.all_ns(moved)
        for gpu, column in enumerate(self._moved):
            column.buffer.frombytes(moved[ns > 0, gpu].astype(np.int32).tobytes())
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
        if self._network is not None:
            lane.join(self._network.share())
        return lane

    def _lane_from(self, source: int, target: int) -> Lane:
        """Returns the lane of copies from one GPU to another."""
        lane = self._lanes[source, target]
        if lane.number < 0:
            title = COPIES_FROM.format(f"gpu{source}")
            lane.number = lane.timeline.add_lane(f"gpu{target}", "peer", title)
        return lane


def run_shared(
    inputs: Inputs,
    ready: Sequence[Any],
    gauges: Sequence[Gauge],
    visits: Iterator[ParallelVisit],
    *,
    one_thread: bool,
    engine: str,
    sources: Sequence[Source] = (),
    ticks: Iterator[Any] | None = None,
) -> list[Decoded]:
    """Run GPUs that go through every layer together and return what was recorded on each.

    `ready` has each GPU's manager, costs and prefetch policy; `visits` are those of all, decided as they are asked for.
    With `sources`, compiled code decides instead, as in `run_stages`.
    """
    links, layout, scenario, model = inputs.links, inputs.expert_parallel, inputs.scenario, inputs.model
    assert links is not None and layout is not None
    costs = [gpu.costs for gpu in ready]
    simulation, network = Simulation(len(ready), engine), links.network(costs)
    simulation.network = network
    most_tokens = max((len(step.rows) for step in inputs.steps), default=0)
    tier = simulation.host_rooms(model.experts, costs[:1])
    gpus = [
        OneGpu(
            simulation, number, gpu.manager, gpu.costs, scenario, prefetching=gpu.prefetch.guesses > 0,
            most_tokens=most_tokens, host="host" if one_thread else f"host{number}",
            link=links.host_link(number, gpu.costs, network), gauge=gauge, lends=scenario.parallel.lends, tier=tier,
        )
        for number, (gpu, gauge) in enumerate(zip(ready, gauges, strict=True))
    ]  # fmt: skip
    exchange = AllToAll(links.routes(), links.topology, model.activation_bytes(1))
    if layout.moves_tokens:
        links.estimates["all-to-all"] = exchange.rule
    sharing = SharingGpus(simulation, gpus, links, network, exchange, model.expert_bytes, lends=scenario.parallel.lends)
    layers = SharedLayers(
        [one.gpu for one in gpus], visits, model.layers, one_thread and len(gpus) > 1, sharing.moves, sharing.note
    )
    simulation.thread(layers.program(inputs.steps, layout.homes), gpus, sharing.exchanges)
    if sources and not layers.apart:
        from ..decide.compiled_decisions import Decisions  # which compiles at its first import
        from ..decide.decision_layout import Part

        parts = [Part(source, one.gpu, one.note_resolved) for source, one in zip(sources, gpus, strict=True)]
        shared = sharing.shared(inputs, one_thread=one_thread and len(gpus) > 1)
        simulation.decided_by(Decisions(parts, [range(len(gpus))], shared), ticks or iter(()))
    simulation.run()
    return sharing.recorded()
