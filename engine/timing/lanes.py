"""Lanes as SimPy processes: a copy engine's direction, a compute stream, the predictor's stream, the CPU, a queue.

A lane takes one piece of work at a time from its queue, waits until it may start, and runs it. Whatever slows it down
meanwhile interrupts it: it works out what is left and goes on at the new speed. At one instant ends come first, then
the host threads, then starts, in the order of the lanes' numbers, so that no result depends on the order in which SimPy
happens to run processes. Read `Work`, then `Lane`, then `QueueLane`; `host.py` submits the work.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import simpy
from simpy.events import ProcessGenerator

from ...resources.lags import NEVER, Lags
from ...resources.network import CrowdShare, Share, Transfer
from ...resources.timeline import DECOMPRESS, Timeline
from ..policies.copy_order import QueuedCopy, Rank

#: The order of what happens at one instant, after all that ends there: lanes keep or release a copy engine, host
#: threads go on, lanes start work; of each kind in the order of their numbers.
KEEPS, HOSTS, STARTS = range(3)


class Instant:
    """Orders what happens at one instant: a process that yields its `turn` goes on after all that SimPy had for then.

    Turns come one by one, by kind and then by number, and what one causes at this instant comes before the next.
    """

    def __init__(self, env: simpy.Environment) -> None:
        self.env = env
        self._waiting: list[tuple[int, int, int, simpy.Event]] = []
        self._count = 0
        self._runs = False
        #: All lanes, in order of creation.
        self.lanes: list[Lane] = []

    def put_last(self, lane: Lane) -> None:
        """Let a lane start last of all lanes that exist now, where several could start at one instant."""
        self.lanes.remove(lane)
        self.lanes.append(lane)
        for order, one in enumerate(self.lanes):
            one.order = order

    def turn(self, kind: int, number: int) -> simpy.Event:
        """Returns an event that comes at this instant, when it is the turn of this kind and number."""
        event = self.env.event()
        self._count += 1
        heapq.heappush(self._waiting, (kind, number, self._count, event))
        if not self._runs:
            self._runs = True
            self.env.process(self._serve())
        return event

    def _serve(self) -> ProcessGenerator:
        env = self.env
        while self._waiting:
            while env.peek() <= env.now:
                yield env.timeout(0)
            heapq.heappop(self._waiting)[3].succeed()
            yield env.timeout(0)
        self._runs = False


@dataclass(eq=False, slots=True)
class Work:
    """One piece of work: what it takes, what it waits for, and what its span will say.

    `ns` is its duration right behind other work, `alone_ns` on a lane that was idle; both without disturbance, which
    stretches them by `slowdown`. It may start at `issued_ns`, and once all of `after` have ended.
    """

    done: simpy.Event
    ns: int
    alone_ns: int
    issued_ns: int
    after: tuple[Work, ...]
    kind: int
    visit: int
    expert: int = -1
    copy: int = -1
    slowdown: float = 1.0
    transfer: Transfer | None = None
    #: In a `QueueLane`: what the copy is for, from which its rank follows. The smallest rank goes first, of equal ranks
    #: the smallest number.
    wanted: QueuedCopy | None = None
    rank: Rank = (0, 0)
    number: int = 0
    #: In how many pieces it is still to be done.
    pieces: int = 1
    #: In a `QueueLane`: whether it enters the queue only once all of `after` have ended, so that it cannot block them.
    held_back: bool = False
    entered: bool = False
    started: bool = False
    cancelled: bool = False
    end_ns: int | None = None
    lane: Lane | None = None
    #: The timeline of the GPU that it is for, where several share the lane.
    timeline: Timeline | None = None
    #: Of a copy out of a room of host memory: stands for the room's release, when the copy ends or is cancelled.
    leaves: Work | None = None

    def ready_ns(self, after_other_ns: int, after_issue_ns: int = 0) -> int:
        """Returns when it may start at the earliest: so long after its issue, and after the last end of `after`.

        All of `after` have ended.
        """
        last_ns = max((work.end_ns or 0 for work in self.after), default=0)
        issued_ns = self.issued_ns + after_issue_ns
        return max(issued_ns, last_ns + after_other_ns) if last_ns else issued_ns

    def end(self, now_ns: int) -> None:
        """Note that it ended now, and wake all that wait for it."""
        self.end_ns = now_ns
        self.done.succeed()
        if self.leaves is not None and self.leaves.end_ns is None:
            self.leaves.end(now_ns)

    def cancel(self, now_ns: int) -> None:
        """Do no more of it."""
        self.cancelled = True
        if self.leaves is not None and self.leaves.end_ns is None:
            self.leaves.end(now_ns)


def until_ended(works: Iterable[Work]) -> ProcessGenerator:
    """Wait until all of these have ended."""
    for work in works:
        if work.end_ns is None:
            yield work.done


@dataclass(eq=False)
class Lane:
    """First in, first out, slowed down while other lanes are busy.

    While n of the lanes in `sharing` are busy too, work takes n + 1 times as long, and `sharing_factor` times that (one
    link, several streams). While any lane in `disturbers` is, it takes `Work.slowdown` times as long (kernels beside a
    copy), and for each busy one in `slowed_by` the factor beside it (copies beside experts on the CPU, which read the
    same memory).
    With a `share` of a network, a transfer takes as many times as long as the links that it passes are shared. Work
    does not start while one of the lanes in `turns` is busy (several streams on one copy engine), and a lane keeps the
    engine as long as its next work is ready: measured on an H200, without exception, whichever stream had asked first.
    """

    env: simpy.Environment
    instant: Instant
    timeline: Timeline
    number: int
    lags: Lags = field(default_factory=Lags)
    sharing: list[Lane] = field(default_factory=list)
    sharing_factor: float = 1.0
    turns: list[Lane] = field(default_factory=list)
    disturbers: list[Lane] = field(default_factory=list)
    slowed_by: list[tuple[Lane, float]] = field(default_factory=list)
    share: Share | CrowdShare | None = None
    #: Whether GPUs share it: each span is then recorded on the timeline of the GPU that the work is for.
    serves_all: bool = False

    def __post_init__(self) -> None:
        self.order = len(self.instant.lanes)
        self.instant.lanes.append(self)
        self.queue = simpy.Store(self.env)
        self.waiting: dict[Work, None] = {}  # in the queue, or taken from it and not started
        self.active: Work | None = None
        self.neighbors: list[Lane] = []  # those to retime when work starts or ends here (`couple`)
        # Of the active work: its start, when its speed last changed, what was left then at full speed, how many times
        # as long that takes now, and when it ends if nothing changes.
        self._start_ns, self._since_ns, self._left_ns, self._stretch, self._end_ns = 0, 0, 0.0, 1.0, NEVER
        self._busy_ns = 0
        self._idle_since_ns = NEVER
        # Among `turns`: whether it keeps the engine between two pieces of work, and what it waits for while it has not.
        self._keeps_engine = False
        self._engine_released: simpy.Event | None = None
        self._process = self.env.process(self._serve())

    def join(self, share: Share | CrowdShare) -> None:
        """Let its transfers share a network's links, or its work what a crowd of lanes shares."""
        self.share = share
        share.changed = self.retime

    def submit(self, work: Work) -> Work:
        """Queue work."""
        work.lane = self
        self._put(work)
        return work

    def _put(self, work: Work) -> None:
        self.waiting[work] = None
        self.queue.put(work)

    @property
    def now_ns(self) -> int:
        """SimPy's clock, which counts whole ns."""
        return int(self.env.now)

    @property
    def disturbed(self) -> bool:
        """Whether one of the disturbers is busy now."""
        return any(lane.active is not None for lane in self.disturbers)

    def busy_ns(self) -> int:
        """Returns how long it has been busy until now."""
        return self._busy_ns + (self.now_ns - self._start_ns if self.active is not None else 0)

    def backlog_ns(self) -> int:
        """Returns the undisturbed work that is queued or running now, in ns."""
        running_ns = 0
        if self.active is not None:
            done_ns = (self.now_ns - self._since_ns) / self._stretch
            running_ns = max(0, round(self._left_ns - done_ns))
        return running_ns + sum(work.ns * work.pieces for work in self._queued())

    def _queued(self) -> Iterable[Work]:
        return self.waiting

    def _serve(self) -> ProcessGenerator:
        while True:
            work = yield from self._take()
            ns = yield from self._may_start(work)
            yield from self._run(work, ns)

    def _take(self) -> ProcessGenerator:
        work = yield self.queue.get()
        return work

    def _may_start(self, work: Work) -> ProcessGenerator:
        """Wait until work may start; return its duration: right behind other work, or on an idle lane."""
        yield from until_ended(work.after)
        lags = self.lags
        while True:
            yield self.instant.turn(STARTS, self.order)
            if any(lane.active is not None or lane._keeps_engine for lane in self.turns):
                self._engine_released = self.env.event()
                yield self._engine_released
                continue
            ready_ns, next_ns = work.ready_ns(lags.after_other_ns), self._idle_since_ns + lags.gap_ns
            start_ns = max(ready_ns, next_ns)
            if start_ns <= self.now_ns and lags.longer and self._was_disturbed(work):
                ready_ns = work.ready_ns(lags.after_other_disturbed_ns, lags.after_issue_longer_ns)
                next_ns = self._idle_since_ns + lags.gap_disturbed_ns
                start_ns = max(start_ns, ready_ns, next_ns)
            if start_ns <= self.now_ns:
                return work.alone_ns if ready_ns > next_ns else work.ns
            yield self.env.timeout(start_ns - self.now_ns)

    def _was_disturbed(self, work: Work) -> bool:
        """Whether a disturber was busy at any time from when the work could start to now."""
        caused_ns = max(work.ready_ns(0), self._idle_since_ns)
        return any(
            lane._idle_since_ns > caused_ns or (lane.active is not None and lane._end_ns > caused_ns)
            for lane in self.disturbers
        )

    def _run(self, work: Work, ns: int) -> ProcessGenerator:
        """Do work at the speed that its neighbors leave, and retime them when it starts and when it ends."""
        env = self.env
        self._keeps_engine, self.active, work.started = False, work, True
        self.waiting.pop(work, None)
        start_ns, self._left_ns = self.now_ns, float(ns)
        self._start_ns = start_ns
        if self.share is not None:
            self.share.begin(work.transfer, ns)
        self._retime_neighbors()
        while True:
            self._since_ns, self._stretch = self.now_ns, self._stretch_of(work)
            left_ns = round(self._left_ns * self._stretch)
            self._end_ns = self.now_ns + left_ns
            try:
                yield env.timeout(left_ns)
                break
            except simpy.Interrupt:
                done_ns = (self.now_ns - self._since_ns) / self._stretch
                self._left_ns = max(0.0, self._left_ns - done_ns)
        self.active = None
        self._busy_ns += self.now_ns - start_ns
        if self.share is not None:
            self.share.end()
        for lane in (self, *self.turns):
            lane._idle_since_ns = self.now_ns
        timeline = work.timeline if self.serves_all and work.timeline is not None else self.timeline
        timeline.record(
            start_ns, self.now_ns, work.issued_ns, work.expert, work.visit, work.copy, self.number, work.kind
        )
        self._finish(work)
        self._retime_neighbors()
        if self.turns:
            self._keeps_engine = True
            yield self.instant.turn(KEEPS, self.order)
            self._keeps_engine = self._next_is_ready()
            if not self._keeps_engine:
                self._release_engine()

    def _release_engine(self) -> None:
        for lane in self.turns:
            if lane._engine_released is not None and not lane._engine_released.triggered:
                lane._engine_released.succeed()

    def _finish(self, work: Work) -> None:
        work.end(self.now_ns)

    def _next_is_ready(self) -> bool:
        """Whether the next work may start as soon as the lane's gap has passed."""
        work: Work | None = self.queue.items[0] if self.queue.items else None
        if work is None or any(other.end_ns is None for other in work.after):
            return False
        return work.ready_ns(self.lags.after_other_ns) <= self.now_ns + self.lags.gap_ns

    def _stretch_of(self, work: Work) -> float:
        stretch = 1.0
        for lane in self.sharing:
            stretch += lane.active is not None
        if stretch != 1.0:
            stretch *= self.sharing_factor
        if self.share is not None:
            stretch *= self.share.stretch
        if work.slowdown != 1.0 and self.disturbed:
            stretch *= work.slowdown
        for lane, factor in self.slowed_by:
            if lane.active is not None:
                stretch *= factor
        return stretch

    def _retime_neighbors(self) -> None:
        for lane in self.neighbors:
            lane.retime()

    def retime(self) -> None:
        """Let work in progress go on at another speed, unless it ends at this instant."""
        if self.active is not None and self._end_ns > self.now_ns and self._process is not self.env.active_process:
            self._process.interrupt()


class ArrivalLane(Lane):
    """First ready, first out: work joins the queue once all that it waits for has ended."""

    def submit(self, work: Work) -> Work:
        """Queue work as soon as it is ready."""
        work.lane = self
        self.env.process(self._enter(work))
        return work

    def _enter(self, work: Work) -> ProcessGenerator:
        yield from until_ended(work.after)
        self._put(work)


class QueueLane(Lane):
    """A host-side queue before a copy engine: the smallest `Work.rank` goes next, however late it came.

    Started work is not preempted, but work in several pieces lets other work in between two of them; of equal ranks,
    what came first goes on first. Cancelled work is marked, and skipped when its turn comes.
    """

    def __post_init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], int, Work]] = []
        self._count = 0
        self._filled: simpy.Event | None = None  # what the lane waits for while its heap is empty
        #: The rank of a copy, given by the copy order.
        self.rank: Callable[[QueuedCopy], Rank]
        self._next: Work | None = None  # taken from the heap, and not started
        #: Asked when work's turn comes; True drops it (a stale prefetch).
        self.is_stale: Callable[[Work], bool] = lambda work: False
        super().__post_init__()

    def submit(self, work: Work) -> Work:
        """Queue work by its rank, from the instant at which it is issued or, if held back, at which it is ready."""
        work.lane = self
        if work.wanted is not None:
            work.rank = self.rank(work.wanted)
        if self.serves_all:
            self.waiting[work] = None
        self._renumber(work)
        self.env.process(self._enter(work))
        return work

    def promote(self, work: Work, visit: int) -> None:
        """Let a visit demand a queued copy, or the copy that this work decompresses: all pieces not started yet.

        Its rank can only become smaller.
        """
        work = self._copy_of(work) or work
        if work.lane is not self or work.wanted is None or work.end_ns is not None:
            return
        work.wanted = QueuedCopy(True, visit, work.wanted.expert)
        rank = self.rank(work.wanted)
        if rank < work.rank:
            work.rank = rank
            self._renumber(work)
            if work.entered and work is not self.active and work is not self._next:
                self._insert(work)

    def give_up(self, last: Work) -> tuple[Work, ...]:
        """Begin no further piece of a copy into a room that is reused unread; return what the next copy there awaits.

        `last` is the last work in the room: if it is a kernel, or a copy that the lane is at, the next copy awaits it.
        """
        work = self._copy_of(last)
        if work is None:
            return (last,)
        if work.cancelled or (work.end_ns is None and work is not self.active and work is not self._next):
            work.cancel(self.now_ns)
            return () if work.started else work.after
        work.pieces = 1
        return (last,)

    def _copy_of(self, work: Work) -> Work | None:
        """Returns the work if it is a copy of this queue, or the copy that it decompresses."""
        if work.lane is self:
            return work
        behind = work.after[0] if work.kind == DECOMPRESS and work.after else None
        return behind if behind is not None and behind.lane is self else None

    def _renumber(self, work: Work) -> None:
        self._count += 1
        work.number = self._count

    def _enter(self, work: Work) -> ProcessGenerator:
        if work.held_back:
            yield from until_ended(work.after)
        if work.issued_ns > self.now_ns:
            yield self.env.timeout(work.issued_ns - self.now_ns)
        work.entered = True
        self._insert(work)

    def _insert(self, work: Work) -> None:
        heapq.heappush(self._heap, (work.rank, work.number, work))
        if self._filled is not None and not self._filled.triggered:
            self._filled.succeed()

    def _queued(self) -> Iterable[Work]:
        if self.serves_all:  # all that is ordered, whether or not it has entered
            return self.waiting
        queued = {id(work): work for rank, number, work in self._heap if number == work.number and not work.cancelled}
        if self._next is not None:
            queued[id(self._next)] = self._next
        return [work for work in queued.values() if work.end_ns is None]

    def backlog_ns(self) -> int:
        """Returns the undisturbed work that is queued or running now, in ns; all pieces that are still to be made."""
        active = self.active
        return super().backlog_ns() + (active.ns * (active.pieces - 1) if active is not None else 0)

    def _take(self) -> ProcessGenerator:
        while True:
            if not self._heap:
                self._filled = self.env.event()
                yield self._filled
            yield self.instant.turn(STARTS, self.order)
            while self._heap:
                _, number, work = heapq.heappop(self._heap)
                overtaken = number != work.number or work.end_ns is not None
                if not (overtaken or work.cancelled or self.is_stale(work)):
                    self._next = work
                    return work

    def _run(self, work: Work, ns: int) -> ProcessGenerator:
        self._next = None
        yield from super()._run(work, ns)

    def _next_is_ready(self) -> bool:
        # The host enqueues one copy at a time: between two, the engine is free for others.
        return False

    def _finish(self, work: Work) -> None:
        if work.pieces > 1:
            work.pieces -= 1
            heapq.heappush(self._heap, (work.rank, work.number, work))
        else:
            super()._finish(work)


def couple(lanes: Iterable[Lane]) -> None:
    """Make neighbors: each lane retimes those that it shares something with, or disturbs, when it starts and ends."""
    lanes = list(lanes)
    for lane in lanes:
        lane.neighbors += [
            other
            for other in lanes
            if lane in (*other.sharing, *other.turns, *other.disturbers, *(one for one, _ in other.slowed_by))
        ]
