"""A run's machine and programs, and the engine that carries them out: SimPy processes, or compiled code.

Both engines are given the same lanes, costs and commands, and come to the same nanosecond.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import simpy

from ...collector import collector_off
from ...errors import InputError
from ...resources.network import Network
from ...resources.timeline import SPAN, Timeline
from ...words import unknown_name
from ..costs.costs import Costs
from ..decide.commands import COMPUTE, FIXED_REGISTERS, HOST, PREFETCH_LANE, SIDE
from ..decide.dispatch import Visit
from ..decide.host_memory import HostRooms
from ..decide.memory_manager import MemoryManager
from ..decide.program import Gpu, Program
from ..decide.registers import Registers
from ..decide.tables import Rooms
from ..decide.visit_commands import (
    AWAITS_GUESSES,
    CPU_BLOCKS,
    FROM_HOST,
    FROM_HOST_ASIDE,
    GATHERS,
    ON_GPU,
    ON_GPU_ASIDE,
    WAITS,
    settings_array,
)
from ..policies.prefetch import Gauge
from ..scenario.scenario import Scenario
from ..scenario.sections import ON_GPU as ON_GPU_LANES
from .host import Thread
from .host_state import Exchanges, Gate, GpuState
from .lanes import Instant, Lane, QueueLane, Work
from .machine import GpuLanes, HostLanes, Place
from .ready import note_ready
from .records import RECORDS, RESOLVED, Decoded, pack_resolved

if TYPE_CHECKING:
    from ..decide.compiled_decisions import Decisions  # which compiles at its first import

#: What may carry out the commands of a run.
ENGINES = ("simpy", "compiled")


@dataclass(frozen=True)
class GpuRun:
    """What one GPU of a run decides with and is charged by; `prefetching`: its predictor runs too.

    `visits` are those of a GPU by itself, as they are decided.
    """

    manager: MemoryManager
    costs: Costs
    scenario: Scenario
    prefetching: bool
    gauge: Gauge = field(default_factory=Gauge)
    visits: Iterator[Visit] = field(default_factory=lambda: iter(()))


class OneGpu:
    """One GPU of a run: its lanes and books, what its commands are made of, and what is recorded."""

    def __init__(self, engine: Simulation, run: GpuRun, place: Place, tier: HostRooms | None = None) -> None:
        manager, costs, scenario, gauge, lends = run.manager, run.costs, run.scenario, run.gauge, place.lends
        self.manager, self._scenario, self.most_tokens = manager, scenario, place.most_tokens
        self.drops_stale = scenario.copy_.drop_stale
        spool = self.spool = manager.spool
        timeline = Timeline(spool.column("spans", SPAN))
        self.lanes = GpuLanes(engine.instant, timeline, costs, scenario, place, manager.size_of)
        for lane in self.lanes.streams:
            if isinstance(lane, QueueLane):
                lane.is_stale = self._is_stale
        dispatch = scenario.dispatch
        watches = not dispatch.router_readback or costs.most_launches(self.most_tokens) > dispatch.launch_queue_depth
        #: What is recorded besides spans: accesses, visits, arrivals.
        self.columns = [spool.column(name, dtype) for name, dtype in RECORDS.items()]
        accesses, decided, arrived = (column.buffer for column in self.columns)
        self.state = GpuState(
            self.lanes, dispatch.launch_queue_depth, watches, accesses=accesses, decided=decided, arrived=arrived
        )
        self._resolved = bytearray()
        self.gauge = gauge
        gauge.now_ns, gauge.backlog_ns = lambda: self.state.now_ns, self.lanes.backlog_ns
        gauge.link_busy_ns = self.lanes.link_busy_ns
        engine.gpus.append(self)
        registers = engine.registers.own()
        rooms = Rooms(registers, manager.assigned.values(), lends=lends)
        settings = settings_of(scenario, costs, run.prefetching, place.number, lends)
        may_wait = watches or costs.copies_hold_host or bool(settings[[AWAITS_GUESSES, CPU_BLOCKS, WAITS]].any())
        self.gpu = Gpu(settings, rooms, registers, tier, may_wait)

    def note_resolved(self, accesses: npt.NDArray[np.int64]) -> None:
        """Note whole accesses that need no copy: (visit, expert, way, tokens, gate as the bits of a float) each."""
        resolved = np.empty(len(accesses), dtype=RESOLVED)
        for place, name in enumerate(("visit", "expert", "way", "tokens")):
            resolved[name] = accesses[:, place]
        resolved["gate"], resolved["whole"] = accesses[:, 4].copy().view(np.float64), True
        self._resolved += resolved.tobytes()

    def note(self, visit: Visit) -> None:
        """Note what was decided."""
        self.state.assigned = visit.assigned_bytes, visit.budget_bytes
        for access in visit.resolution.accesses:
            self._resolved += pack_resolved(
                visit.number, access.expert, access.way, access.tokens, access.gate, access.whole
            )

    def flush(self, now_ns: int) -> None:
        """Move what has grown large to files, if there are any; all that ended before `now_ns` has been recorded."""
        if self.spool.is_due:
            self.lanes.timeline.settle(now_ns)
            self.spool.flush()

    def recorded(self) -> Decoded:
        """Returns what was recorded, once SimPy has run out of events."""
        self.state.record_arrivals()
        self.lanes.timeline.settle()
        arrays = [column.array() for column in self.columns]
        resolved = np.frombuffer(memoryview(self._resolved).toreadonly(), dtype=RESOLVED)
        accesses, visits, arrivals = arrays
        return Decoded(
            self.lanes.timeline, accesses, visits, arrivals, None if self._scenario.only_fetches else resolved
        )

    def _is_stale(self, work: Work) -> bool:
        """Drop a queued prefetch whose target visit has been dispatched without it, if the scenario says so."""
        wanted = work.wanted
        if not self._scenario.copy_.drop_stale or wanted is None or wanted.demanded or work.started:
            return False
        if wanted.visit >= self.state.visit:
            return False
        if self.manager.assigned.get(work.expert) == work.copy:
            self.manager.cancel(work.expert)
        work.cancel(self.lanes.compute.now_ns)
        return True


class Simulation:
    """One simulation: SimPy's clock, the order of what comes at one instant, and the registers of all commands."""

    def __init__(self, gpus: int, engine: str) -> None:
        if engine not in ENGINES:
            raise InputError(unknown_name("engine", engine, ENGINES))
        self._compiled = engine == "compiled"
        self.env = simpy.Environment()
        self._now_ns: Callable[[], int] = lambda: int(self.env.now)
        self.instant = Instant(self.env)
        self.registers = Registers(gpus * FIXED_REGISTERS + 1)
        self._values: dict[int, tuple[Work, ...]] = {}
        self.network: Network | None = None
        self.host_lanes = HostLanes(several=gpus > 1)
        self._gate = Gate()
        self.gpus: list[OneGpu] = []
        self._threads: list[Any] = []
        self.peers: dict[Any, Any] = {}
        self.exchanges: Exchanges | None = None
        self._decisions: Decisions | None = None
        self._ticks: Iterator[Any] = iter(())

    def host_rooms(self, experts: int, costs: Sequence[Costs]) -> HostRooms | None:
        """Returns the rooms of host memory, given the costs of GPUs with other layers each; None where it is no cache.

        All that wait for them are in one order, whichever thread orders it; so they have registers of their own.
        """
        reads = [read for own in costs if own.reads is not None for read in own.reads.by_layer]
        requests, back_ns = [read.requests for read in reads], [read.back_ns for read in reads]
        return HostRooms(experts, self.registers.own(), requests, back_ns) if reads else None

    def thread(self, program: Program, gpus: Sequence[OneGpu], exchanges: Exchanges | None = None) -> None:
        """Let a host thread dispatch to some GPUs."""
        states = {one.gpu.number: one.state for one in gpus}

        def flush() -> None:
            for one in gpus:
                one.flush(self._now_ns())

        self._threads.append((program, states, exchanges, flush))

    def lane(
        self, timeline: Timeline, device: str, title: str, lags: Any = None, network: Network | None = None,
        disturbers: Sequence[Lane] = (),
    ) -> Lane:  # fmt: skip
        """Add a lane for what one GPU sends to others, in order; `disturbers` slow it down."""
        number = timeline.add_lane(device, "peer", title)
        lane = Lane(self.env, self.instant, timeline, number, *([] if lags is None else [lags]))
        if network is not None:
            lane.join(network.share())
        lane.disturbers = list(disturbers)
        for other in disturbers:
            other.neighbors.append(lane)
        return lane

    def run(self) -> None:
        """Run until nothing is left to do."""
        if self._compiled:
            self._run_compiled()
            return
        for program, states, exchanges, flush in self._threads:
            thread = Thread(self.env, self.instant, states, self._values, exchanges, self._gate)
            self.env.process(thread.run(program, flush))
        with collector_off():
            self.env.run()

    def decided_by(self, decisions: Decisions, ticks: Iterator[Any]) -> None:
        """Let compiled code decide, which draws from `ticks` once for every visit."""
        self._decisions, self._ticks = decisions, ticks

    def _run_compiled(self) -> None:
        from .compiled_engine import CompiledEngine  # compiles at first use
        from .compiled_layout import Driven, Machine
        from .deciding import DecidingEngine

        note_ready()

        exchanges = next((one for _, _, one, _ in self._threads if one is not None), None)
        machine = Machine(
            self.gpus, self.instant.lanes, self.network,
            [] if exchanges is None else [exchanges.lanes[number] for number in range(len(self.gpus))],
            None if exchanges is None else exchanges.ns, self.peers,
        )  # fmt: skip
        threads = [Driven(program, sorted(states), flush) for program, states, _, flush in self._threads]
        engine = CompiledEngine(machine, threads)
        self._now_ns = engine.clock_ns
        for number, one in enumerate(self.gpus):
            if one.gauge is not None:
                one.gauge.now_ns, one.gauge.backlog_ns = (
                    partial(engine.now_ns, number),
                    partial(engine.backlog_ns, number),
                )
                one.gauge.link_busy_ns = partial(engine.link_busy_ns, number)
        ended = [flush for _, _, _, flush in self._threads]
        # Marks of transfers wrap, which NumPy's own arithmetic would warn of where nothing is compiled.
        with collector_off(), np.errstate(over="ignore"):
            if self._decisions is None:
                engine.run()
                return
            DecidingEngine(engine, self._decisions, ended, self._ticks).run()


def settings_of(
    scenario: Scenario, costs: Costs, prefetching: bool, gpu: int = 0, lends: bool = False
) -> npt.NDArray[np.int64]:
    """Returns what a scenario says of every visit of a GPU."""
    predicts = prefetching and costs.predict_ns > 0 and scenario.predictor.lane != "free"
    settings = visit_settings(scenario, predicts=predicts, holds=costs.copies_hold_host, gpu=gpu, lends=lends)
    own = costs.runtime
    settings[[GATHERS, CPU_BLOCKS, WAITS]] = own.copies.mover == "kernel", own.cpu_blocks, own.waits
    return settings


def visit_settings(
    scenario: Scenario, *, predicts: bool = False, holds: bool = False, gpu: int = 0, lends: bool = False
) -> npt.NDArray[np.int64]:
    """Returns the settings of every visit of a GPU, as an array named by SETTINGS.

    `predicts`: a predictor takes time on its lane; `holds`: the host waits for the end of every copy.
    """
    compression, lane = scenario.compression, scenario.predictor.lane
    packing = {"none": (0, 0), "gpu": (ON_GPU, ON_GPU_ASIDE), "host": (FROM_HOST, FROM_HOST_ASIDE)}[compression.where]
    return settings_array(
        gpu=gpu,
        first_register=gpu * FIXED_REGISTERS,
        reads_back=scenario.dispatch.router_readback,
        by_priority=scenario.copy_.by_rank,
        prefetch_first=scenario.prefetch.issue == "before_launch",
        resident_first=scenario.dispatch.expert_order == "resident_first",
        grouped=scenario.dispatch.expert_kernel == "grouped",
        holds=holds,
        predictor_lane={"gpu": SIDE, "compute": COMPUTE, "host": HOST}[lane] if predicts else -1,
        prefetch_lane=PREFETCH_LANE,
        packing=packing[compression.lane == "side"],
        lends=lends,
        awaits_guesses=predicts and lane in ON_GPU_LANES and scenario.prefetch.issued_by == "host",
        gpu_issues=scenario.prefetch.issued_by == "gpu",
        tiers=scenario.tiers.host_budget != "all",
    )
