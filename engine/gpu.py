"""One GPU as its host thread sees it: its lanes, and the calls that launch, copy, wait and serve a layer visit.

Every call takes the host's time, on `now_ns`, the clock of the thread that makes it. The lanes answer each
submission with the instant at which it will end, or with a promise of it. Decisions come from `dispatch`, in order;
nothing here changes them, except where a policy declares that it looks at the clock (`uses_clock`), or stale
prefetches are dropped.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import simpy

from ..resources.lane import (
    Completion,
    CoupledLane,
    FifoLane,
    Pending,
    PriorityLane,
    Work,
    after_all,
    couple,
    later,
    wait_for,
)
from ..resources.timeline import (
    DEMAND,
    DENSE,
    EXPERT,
    GUESSES,
    HEAD,
    LAUNCH,
    PREDICT,
    PREFETCH,
    READBACK,
    SPAN,
    Timeline,
)
from ..workloads.batches import DECODE, PREFILL, Step
from .costs.costs import Costs, KernelCost
from .decide.dispatch import Visit, launch_order
from .decide.host_memory import HostMemory
from .decide.memory_manager import Admission, MemoryManager
from .links import HostLink
from .policies.copy_order import COPY_ORDERS
from .policies.prefetch import Gauge
from .scenario.scenario import Scenario
from .scenario.sections import ON_GPU
from .tiers import Drive

#: One access: the visit, the copy that held the expert's bytes, and how many of the batch's tokens chose it.
ACCESS = np.dtype([("visit", "<i4"), ("copy", "<i4"), ("tokens", "<i4")])
#: One access, or some tokens of it, that needed no copy: its way, a number of `policies.miss.WAYS`; how many tokens of
#: what gate weight; whether these were all of its tokens.
RESOLVED = np.dtype(
    [("visit", "<i4"), ("expert", "<i4"), ("way", "<i4"), ("tokens", "<i4"), ("gate", "<f8"), ("whole", "?")]
)
#: One layer visit: when the host knew the choice; the expert bytes assigned once all was decided, and the budget.
VISIT = np.dtype([("choice_known_ns", "<i8"), ("assigned_bytes", "<i8"), ("budget_bytes", "<i8")])
#: When what another GPU sent had come, and what waited for it: the first kernel of a kind in a visit.
ARRIVAL = np.dtype([("visit", "<i4"), ("kind", "<i4"), ("arrived_ns", "<i8")])

_RECORDS = {"accesses": ACCESS, "visits": VISIT, "arrivals": ARRIVAL}
#: Pack the fields of one record, in the order of ACCESS, of VISIT, of ARRIVAL and of RESOLVED.
pack_access = struct.Struct("<iii").pack
pack_visit = struct.Struct("<qqq").pack
pack_arrival = struct.Struct("<iiq").pack
pack_resolved = struct.Struct("<iiiid?").pack

#: A lane of either kind.
Lane = FifoLane | CoupledLane


@dataclass(frozen=True)
class Decoded:
    """What a run recorded: the timeline, and arrays of dtype ACCESS, VISIT and ARRIVAL in order of dispatch.

    `resolved` is what a miss policy found another way for, an array of dtype RESOLVED, if there is one.
    """

    timeline: Timeline
    accesses: npt.NDArray[Any]
    visits: npt.NDArray[Any]
    arrivals: npt.NDArray[Any] = field(default_factory=lambda: np.empty(0, dtype=ARRIVAL))
    resolved: npt.NDArray[Any] | None = None
    #: Of GPUs that share experts: the tokens sent to each of them (exchanges, GPUs), in order.
    sent: npt.NDArray[Any] = field(default_factory=lambda: np.empty((0, 0), dtype=np.int32))


def contended(costs: Costs, scenario: Scenario) -> bool:
    """Whether copies and kernels slow each other down in a run."""
    return scenario.copy_.contention and (costs.slowed_beside_copies or costs.copy_slowdown > 1)


def add_lanes(timeline: Timeline, discipline: str, device: str = "gpu0", host: str = "host") -> dict[str, int]:
    """Add the lanes of one GPU and its host thread under a copy discipline and return their numbers by name."""
    number = {
        "host": timeline.add_lane(host, "host", "host thread"),
        "predictor": timeline.add_lane(device, "predictor", "predictor (side stream)"),
        "d2h": timeline.add_lane(device, "d2h", "copy engine D2H"),
        "h2d": timeline.add_lane(device, "h2d", "copy engine H2D"),
    }
    if COPY_ORDERS[discipline].prefetch_stream:
        number["prefetch"] = timeline.add_lane(device, "h2d", "copy engine H2D, prefetch stream")
    number["compute"] = timeline.add_lane(device, "compute", "compute stream")
    return number


class Gpu:
    """The lanes of one GPU, and the calls that a host thread makes on them; `now_ns` is the clock of that thread.

    A host loop (see `decoder`) drives it: `forward` dispatches the layer visits of a step, `head` what ends it, and
    `recorded` is asked for at the end. A loop that has to come between uses the calls that `forward` is made of.
    """

    # Python keeps thirty attributes of an object at hand; there are more, and the loop reads them all the time.
    __slots__ = (
        "_accesses",
        "_arrived",
        "_arriving",
        "_busy_since_ns",
        "_columns",
        "_compute",
        "_copies_hold_host",
        "_copy_costs",
        "_copy_slowdown",
        "_d2h",
        "_decided",
        "_depth",
        "_drive",
        "_expert_costs",
        "_experts",
        "_gpu_issues",
        "_grouped",
        "_h2d",
        "_host",
        "_interrupted_ns",
        "_launched",
        "_launched_count",
        "_manager",
        "_phase",
        "_predicting",
        "_prefetch_first",
        "_prefetch_lane",
        "_priority",
        "_promised",
        "_queued",
        "_read",
        "_resident_first",
        "_scenario",
        "_side",
        "_submit_kernel",
        "_tables",
        "_transfers",
        "_wait_ns",
        "awaits_guesses",
        "costs",
        "coupled",
        "dense_costs",
        "env",
        "now_ns",
        "reads_back",
        "spool",
        "timeline",
        "visit",
        "watch_queue",
    )  # fmt: skip

    def __init__(
        self,
        env: simpy.Environment,
        manager: MemoryManager,
        costs: Costs,
        scenario: Scenario,
        *,
        prefetching: bool,
        most_tokens: int,
        device: str = "gpu0",
        host: str = "host",
        link: HostLink | None = None,
        host_memory: HostMemory | None = None,
    ) -> None:
        """Make the lanes of `device`, driven by a thread of `host`.

        `prefetching`: the predictor runs too. `most_tokens`: of the largest step, which says whether the launch queue
        can ever be full. `link`: the way of its copies, where other GPUs' copies share it. `host_memory` decides the
        tiers below the GPU; without it, every expert is in host memory.
        """
        self.env = env
        self._manager = manager
        self.costs = costs
        self._tables = {phase: costs.by_layer(phase) for phase in (DECODE, PREFILL)}
        self.begin_step(DECODE)
        self._scenario = scenario
        #: Keeps what is recorded; a host loop flushes it now and then.
        self.spool = spool = manager.spool
        self.timeline = Timeline(spool.column("spans", SPAN))
        self._columns = [spool.column(name, dtype) for name, dtype in _RECORDS.items()]
        self._accesses, self._decided, self._arrived = (column.buffer for column in self._columns)
        self.now_ns = 0
        self._launched: deque[tuple[Completion, int]] = deque()
        self._launched_count = 0
        # The end of each copy, until a kernel reads it; then that of its last reader.
        self._arriving: dict[int, Completion] = {}
        self._promised: deque[tuple[int, int, Pending]] = deque()  # arrivals that are not known yet
        self._read: dict[int, Completion] = {}
        self._queued: dict[int, Work] = {}  # priority discipline only: copies by number
        self.visit = -1  # the number of the visit being dispatched
        self._busy_since_ns = 0
        self._experts = manager.experts
        self._depth = scenario.dispatch.launch_queue_depth
        self._resident_first = scenario.dispatch.expert_order == "resident_first"
        self._prefetch_first = scenario.prefetch.issue == "before_launch"
        self.reads_back = scenario.dispatch.router_readback
        # With a read-back at every visit the queue holds one visit's launches at most.
        self.watch_queue = not self.reads_back or costs.most_launches(most_tokens) > self._depth
        self._grouped = scenario.dispatch.expert_kernel == "grouped"
        self._predicting = prefetching and costs.predict_ns > 0 and scenario.predictor.lane != "free"
        self._gpu_issues = scenario.prefetch.issued_by == "gpu"
        #: Whether the host thread waits for what is predicted on the GPU, at every visit.
        self.awaits_guesses = self._predicting and scenario.predictor.lane in ON_GPU and not self._gpu_issues
        self._interrupted_ns = 0  # when other work last took the compute stream
        self._wait_ns = costs.wait_ns
        self._copy_costs = costs.copies
        self._copies_hold_host = costs.copies_hold_host
        self._priority: PriorityLane | None = None
        self._transfers = None if link is None else link.transfers
        self._make_lanes(add_lanes(self.timeline, scenario.copy_.discipline, device, host), link)
        self._submit_kernel = self._compute.submit
        self._drive: Drive | None = None
        if costs.reads is not None:
            assert host_memory is not None  # whoever makes a GPU of such a scenario decides for its tiers
            cancels = self._priority is not None
            self._drive = Drive(env, self.timeline, host_memory, costs.reads, cancels=cancels)
        self.coupled = not (isinstance(self._h2d, FifoLane) and isinstance(self._compute, FifoLane))
        self.coupled = self.coupled or (self._drive is not None and self._drive.coupled)

    def _make_lanes(self, number: dict[str, int], link: HostLink | None) -> None:
        """Make one lane for each thing that is busy by itself, coupled where one slows another down."""
        env, timeline, costs, copy = self.env, self.timeline, self.costs, self._scenario.copy_
        kernels, copies = costs.kernel_lags, costs.copy_lags
        self._host = number["host"]
        self._side = FifoLane(timeline, number["predictor"])
        self._d2h: Lane = FifoLane(timeline, number["d2h"])
        self._compute: Lane
        self._h2d: Lane
        self._prefetch_lane: Lane
        self._copy_slowdown = costs.copy_slowdown if copy.contention else 1.0
        disturbed = contended(costs, self._scenario)
        if copy.discipline == "fifo" and not (disturbed or link is not None or self._couples_copies()):
            self._h2d = self._prefetch_lane = FifoLane(timeline, number["h2d"], copies)
            self._compute = FifoLane(timeline, number["compute"], kernels)
            return
        if copy.discipline == "priority":
            queue = PriorityLane(env, timeline, number["h2d"], copies)
            queue.is_stale = self._is_stale
            self._priority = queue
            copy_lanes: list[CoupledLane] = [queue]
        else:
            names = ["h2d", "prefetch"] if copy.discipline == "two_streams" else ["h2d"]
            copy_lanes = [CoupledLane(env, timeline, number[name], copies) for name in names]
        for lane in copy_lanes:
            others = [other for other in copy_lanes if other is not lane]
            lane.turns, lane.sharing = (others, []) if costs.copies_take_turns else ([], others)
            lane.sharing_factor = costs.copies_sharing
            if link is not None:
                lane.join(link.network.share())
                lane.sharing = []  # the network shares the link out
        self._h2d, self._prefetch_lane = copy_lanes[0], copy_lanes[-1]
        if disturbed:
            compute = CoupledLane(env, timeline, number["compute"], kernels)
            compute.disturbers = copy_lanes
            for lane in copy_lanes:
                lane.disturbers = [compute]
            readbacks = CoupledLane(env, timeline, number["d2h"])
            readbacks.disturbers = copy_lanes
            self._d2h = readbacks
            couple([*copy_lanes, compute, readbacks])
            self._compute = compute
        else:
            couple(copy_lanes)
            self._compute = FifoLane(timeline, number["compute"], kernels)

    def _interruption_ns(self) -> int:
        """Return how long other work takes the compute stream, before a forward pass that begins now."""
        interruptions = self.costs.interruptions
        if interruptions is None:
            return 0
        due = (self.now_ns - self._interrupted_ns) // interruptions.every_ns
        self._interrupted_ns += due * interruptions.every_ns
        return due * interruptions.ns

    def _couples_copies(self) -> bool:
        """Whether copies run in SimPy's time even where no kernel slows them down."""
        return False

    def notice(self, chosen_ns: int) -> None:
        """Go on once the router's choice, in host memory at `chosen_ns`, has been noticed."""
        self._wake(chosen_ns)
        if self.watch_queue:
            self._launched.clear()
            self._launched_count = 0

    def _wake(self, there_ns: int) -> None:
        """Let the host, idle since it asked, notice what is in its memory at `there_ns`."""
        known_ns = there_ns if there_ns > self.now_ns else self.now_ns
        self.now_ns = self._busy_since_ns = known_ns + (
            self._synchronize_ns() if self.coupled else self.costs.synchronize_ns
        )

    def begin(self, visit: Visit) -> None:
        """Note when the choice was known, and what was decided by it."""
        self._decided += pack_visit(self.now_ns, visit.assigned_bytes, visit.budget_bytes)
        if self.reads_back:
            self.now_ns += self.costs.copy_resume_ns if visit.waves[0].admitted else self.costs.resume_ns

    def take_over(self, now_ns: int) -> None:
        """Let a host thread that has worked elsewhere until `now_ns` go on here."""
        self.now_ns = self._busy_since_ns = now_ns

    def expect(self, kind: int, arrival: Completion) -> None:
        """Make a stream wait for what another GPU sends; the visit's first kernel of this kind is behind it."""
        self.now_ns += self._wait_ns
        if isinstance(arrival, int):
            self._arrived += pack_arrival(self.visit, kind, arrival)
        else:
            self._promised.append((self.visit, kind, arrival))
            self._record_arrivals()

    def _record_arrivals(self) -> None:
        """Record promised arrivals up to the first that is still to come: a long run must not keep them all."""
        promised = self._promised
        while promised and (arrived_ns := promised[0][2].end_ns) is not None:
            visit, kind, _ = promised.popleft()
            self._arrived += pack_arrival(visit, kind, arrived_ns)

    def recorded(self) -> Decoded:
        """Return what was recorded, once SimPy has run out of events."""
        self._record_arrivals()
        assert not self._promised, "whatever a kernel waits for has come once SimPy has run out of events"
        return Decoded(self.timeline, *(column.array() for column in self._columns))

    @property
    def disturbing(self) -> list[CoupledLane]:
        """The lanes of copies from the host that slow others down, if they do."""
        lanes = dict.fromkeys((self._h2d, self._prefetch_lane))
        return [lane for lane in lanes if isinstance(lane, CoupledLane)]

    def show(self, gauge: Gauge) -> None:
        """Let policies read this GPU's clock and link off a gauge."""
        gauge.now_ns, gauge.backlog_ns = lambda: self.now_ns, self.backlog_ns

    def backlog_ns(self) -> int:
        """Return the copy time that is queued on the link now, in ns."""
        lanes = dict.fromkeys((self._h2d, self._prefetch_lane))
        return sum(lane.backlog_ns(self.now_ns) for lane in lanes)

    # The host thread's calls, each of which takes its time.

    def launch(
        self, cost: KernelCost, kind: int, after: Completion = 0, expert: int = -1, copy: int = -1
    ) -> Completion:
        """Launch a group of kernels, which counts as one piece of work, and return its end."""
        issued_ns = self.now_ns + cost.issue_ns
        self.now_ns += cost.host_ns
        end = self._submit_kernel(cost.ns, cost.ns, issued_ns, after, kind, expert, self.visit, copy, cost.slowdown)
        if self.watch_queue:
            self._launched.append((end, cost.launches))
            self._launched_count += cost.launches
        return end

    def wait_for_queue(self, launches: int) -> Generator[simpy.Event, Any, None]:
        """Block while the launch queue has no place for `launches` more, as the CUDA driver does."""
        while self._launched and self._launched_count + launches > self._depth:
            end, count = self._launched.popleft()
            self._launched_count -= count
            end_ns = end if isinstance(end, int) else (yield from wait_for(self.env, end))
            self.now_ns = max(self.now_ns, end_ns)

    def read_back(self, after: Completion, kind: int = READBACK) -> Completion:
        """Enqueue the copy of the router's choice, or of guesses, to the host, which is idle until it has come."""
        costs = self.costs
        self.now_ns += costs.readback_enqueue_ns
        self.end_busy()
        ns, issued_ns = costs.readback_ns, self.now_ns + costs.readback_latency_ns
        return self._d2h.submit(ns, ns, issued_ns, after, kind, -1, self.visit, slowdown=costs.readback_slowdown)

    def _synchronize_ns(self) -> int:
        """Return how long the host takes to notice that the choice has come, which just has."""
        if isinstance(self._d2h, CoupledLane) and self._d2h.disturbed:
            return self.costs.synchronize_beside_copy_ns
        return self.costs.synchronize_ns

    def end_busy(self) -> None:
        """Record the host thread's work since it last began as one span."""
        since_ns, now_ns = self._busy_since_ns, self.now_ns
        if now_ns > since_ns:
            self.timeline.record(since_ns, now_ns, since_ns, -1, self.visit, -1, self._host, LAUNCH)
            self._busy_since_ns = now_ns

    def head(self, step: Step) -> Generator[simpy.Event, Any, Completion]:
        """End a step: launch the head behind its layers, for the positions that need it, and return its end."""
        head = self.costs.head(step.sampled)
        yield from self.wait_for_queue(head.launches)
        return self.launch(head, HEAD)

    def catch_up(self) -> Generator[simpy.Event, Any, None]:
        """Let SimPy's clock come up to the host's."""
        if self.now_ns > self.env.now:
            yield self.env.timeout(self.now_ns - self.env.now)

    # One step through the layers.

    def begin_step(self, phase: int) -> None:
        """Take what kernels cost in steps of a phase."""
        self._phase = phase
        self.dense_costs, self._expert_costs = self._tables[phase]

    def forward(
        self, step: Step, visits: Iterator[Visit], after: Completion = 0
    ) -> Generator[simpy.Event, Any, Completion]:
        """Dispatch the layer visits of one step, each decided as its choice is known.

        The first dense part waits for `after`, which comes from another GPU. Return the end of the last kernel that
        serves the step.
        """
        self.begin_step(step.phase)
        tokens = len(step.rows)
        end: Completion = 0
        held_ns = self._interruption_ns()
        for dense_costs in self.dense_costs:
            self.visit += 1
            dense = dense_costs[tokens]
            if held_ns:  # other work comes first
                dense, held_ns = replace(dense, ns=dense.ns + held_ns), 0
            if self.watch_queue:
                yield from self.wait_for_queue(dense.launches)
            if after:
                self.expect(DENSE, after)
            end = chosen = self.launch(dense, DENSE, after)
            after = 0
            if self.reads_back:
                chosen = self.read_back(chosen)
                chosen_ns = chosen if isinstance(chosen, int) else (yield from wait_for(self.env, chosen))
                self.notice(chosen_ns)
            # Where a lane runs in SimPy's time, the two clocks meet before every decision.
            if self.coupled:
                yield from self.catch_up()
            visit = next(visits)
            self.begin(visit)
            end = (yield from self.serve(visit, chosen)) or end
        return end

    def serve(self, visit: Visit, chosen: Completion) -> Generator[simpy.Event, Any, Completion]:
        """Enqueue the demand copies of each wave, launch its experts behind them, and prefetch.

        Return the end of the last expert; 0 if no token is routed at this layer.
        """
        arriving, read, costs = self._arriving, self._read, self._expert_costs[visit.layer]
        end: Completion = 0
        for wave in visit.waves:
            if self._priority is not None:
                self._promote(self._priority, wave.found, visit.number)
            for admission in wave.admitted:
                there = self._copy(self._h2d, admission, DEMAND, 0, visit.number)
                if self._copies_hold_host:
                    yield from self._hold(there)
            if self._prefetch_first and wave is visit.waves[-1]:
                yield from self._prefetch(visit, chosen)
            served = launch_order(visit, wave, self._resident_first)
            if self._grouped:
                end = (yield from self._launch_grouped(visit.layer, list(served))) or end
                continue
            for expert, tokens, copy in served:
                cost = costs[tokens]
                if self.watch_queue:
                    yield from self.wait_for_queue(cost.launches)
                bytes_there = self._wait_for_bytes(copy) if copy in arriving else 0
                read[copy] = end = self.launch(cost, EXPERT, bytes_there, expert, copy)
                self._accesses += pack_access(self.visit, copy, tokens)
        if not self._prefetch_first and (visit.prefetches or visit.staged or self._predicting):
            yield from self._prefetch(visit, chosen)
        return end

    def _wait_for_bytes(self, copy: int) -> Completion:
        """Let the compute stream wait for a copy where its bytes are first read; later readers follow in order."""
        self.now_ns += self._wait_ns
        return self._arriving.pop(copy)

    def _launch_grouped(
        self, layer: int, served: list[tuple[int, int, int]]
    ) -> Generator[simpy.Event, Any, Completion]:
        """Launch one kernel for all experts of a wave, (expert, tokens, copy), behind a wait for the bytes of all.

        Return its end; 0 if there are none.
        """
        if not served:  # no token is routed at this layer
            return 0
        cost = self.costs.grouped(layer, [tokens for _, tokens, _ in served], self._phase)
        if self.watch_queue:
            yield from self.wait_for_queue(cost.launches)
        bytes_there = after_all([self._wait_for_bytes(copy) for _, _, copy in served if copy in self._arriving])
        end = self.launch(cost, EXPERT, bytes_there, -1, served[-1][2])
        for _, tokens, copy in served:
            self._read[copy] = end
            self._accesses += pack_access(self.visit, copy, tokens)
        return end

    def _prefetch(self, visit: Visit, chosen: Completion) -> Generator[simpy.Event, Any, None]:
        """Predict, then enqueue the prefetches, once whoever issues them has the guesses."""
        predicted: Completion = chosen if self._gpu_issues else 0
        if self._predicting:
            if self.watch_queue and self._scenario.predictor.lane == "compute":
                yield from self.wait_for_queue(self.costs.predict.launches)
            predicted = self._predict(chosen)
        if self.awaits_guesses:
            there = self.read_back(predicted, GUESSES)
            self.learn(visit, there if isinstance(there, int) else (yield from wait_for(self.env, there)))
            predicted = 0
        for admission, target in visit.prefetches:
            end = self._copy(self._prefetch_lane, admission, PREFETCH, predicted, target)
            if self._copies_hold_host:
                yield from self._hold(end)
        if visit.staged and self._drive is not None:
            self.now_ns = self._drive.stage(self.now_ns, self.visit, predicted)

    def learn(self, visit: Visit, there_ns: int) -> None:
        """Go on once the guesses, in host memory at `there_ns`, have been noticed."""
        self._wake(there_ns)
        self.now_ns += self.costs.copy_resume_ns if visit.prefetches else self.costs.resume_ns

    def _predict(self, chosen: Completion) -> Completion:
        """Run the predictor on its lane and return when its guesses are there."""
        cost, lane = self.costs.predict, self._scenario.predictor.lane
        ns = cost.ns
        if lane == "compute":
            return self.launch(cost, PREDICT)
        if lane == "gpu":
            if not self.reads_back:  # else the choice is there already
                self.now_ns += self._wait_ns
            issued_ns = self.now_ns + cost.issue_ns
            self.now_ns += cost.host_ns
            return self._side.submit(ns, ns, issued_ns, chosen, PREDICT, -1, self.visit)
        self.end_busy()
        start_ns = self.now_ns
        self.now_ns = self._busy_since_ns = start_ns + ns
        self.timeline.record(start_ns, self.now_ns, start_ns, -1, self.visit, -1, self._host, PREDICT)
        return 0

    def _copy(self, lane: Lane, admission: Admission, kind: int, predicted: Completion, target: int) -> Completion:
        """Enqueue a copy: behind the prediction that asked for it, its read, and the last reader of its room."""
        expert, copy = admission.expert, admission.copy
        layer, slowdown = expert // self._experts, self._copy_slowdown
        cost = self._copy_costs[layer]
        transfer = None if self._transfers is None else self._transfers[layer]
        read: Completion = 0
        if self._drive is not None:
            self.now_ns, read = self._drive.bring(copy, self.now_ns, self.visit, predicted)
        if not (self._gpu_issues and kind == PREFETCH):
            self.now_ns += cost.host_ns
            if admission.former:
                self.now_ns += self._wait_ns
        issued_ns = self.now_ns + self.costs.copy_latency_ns
        after = self._after_former(admission, predicted if self._drive is None else read)
        if self._priority is None:
            end = lane.submit(
                cost.queued_ns, cost.alone_ns, issued_ns, after, kind, expert, self.visit, copy, slowdown, transfer
            )
        else:
            work = Work(
                cost.piece_queued_ns, cost.piece_alone_ns, issued_ns, after, kind, expert, self.visit, copy,
                slowdown, transfer, rank=(int(kind == PREFETCH), target), pieces=cost.pieces,
                held_back=self._drive is not None,
            )  # fmt: skip
            self._queued[copy] = work
            end = self._priority.submit_work(work)
        self._arriving[copy] = end
        if self._drive is not None:
            self._drive.copied(copy, end)
        return end

    def _after_former(self, admission: Admission, after: Completion) -> Completion:
        """Return when a room is free, by the copies whose room it was, and something else has ended too."""
        for copy in admission.former:
            free = self._last_use(copy)
            if self._priority is not None:
                free = self._give_up(self._priority, copy, free)
            if copy == admission.partly:  # asked for again with the rest of its room, whoever freed it
                self._read[copy] = free
            after = later(after, free)
        return after

    def _last_use(self, copy: int) -> Completion:
        """Forget a copy that was evicted; return the end of its last reader or, if nobody has read it, its own."""
        return (self._read if copy in self._read else self._arriving).pop(copy, 0)

    def _hold(self, end: Completion) -> Generator[simpy.Event, Any, None]:
        """Keep the host thread busy until a pageable copy has ended."""
        end_ns = end if isinstance(end, int) else (yield from wait_for(self.env, end))
        self.now_ns = max(self.now_ns, end_ns)

    # The priority discipline's queue.

    def _promote(self, queue: PriorityLane, found: dict[int, int], visit: int) -> None:
        """Give queued prefetches that are demanded now a demand's rank."""
        for copy in found.values():
            work = self._queued.get(copy)
            if work is not None and work.done.end_ns is None:
                queue.promote(work, (0, visit))

    def _give_up(self, queue: PriorityLane, copy: int, touched: Completion) -> Completion:
        """Copy no more of an expert that was evicted, if nobody reads it; return when its room may be written."""
        work = self._queued.pop(copy, None)
        if work is None or touched is not work.done:
            return touched  # a kernel that is launched already waits for the copy
        free = queue.give_up(work)
        if self._drive is not None and work.cancelled:
            self._drive.give_up(copy)
        return free

    def _is_stale(self, work: Work) -> bool:
        """Drop a queued prefetch whose target visit has been dispatched without it, if the scenario says so."""
        is_demanded, target = work.rank[0] == 0, work.rank[1]
        if not self._scenario.copy_.drop_stale or is_demanded or work.started or target >= self.visit:
            return False
        if self._manager.assigned.get(work.expert) == work.copy:
            self._manager.cancel(work.expert)
        work.cancelled = True
        if self._drive is not None:
            self._drive.give_up(work.copy)
        return True
