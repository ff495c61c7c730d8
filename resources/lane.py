"""Lanes: things that do one piece of work at a time, in order: a copy engine, a compute stream, a predictor.

A `FifoLane` that nothing else can slow down knows when its work will end as soon as it is submitted, so it
answers at once with an integer and costs no event. A `CoupledLane` runs its work in SimPy's time, because another
lane may start in the middle and slow it down; it answers with a `Pending`, which turns into an instant when the
work is done. Whoever waits for either kind of answer handles both: see `Completion`.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import simpy
from simpy.events import NORMAL, URGENT, Event, EventPriority

from .network import CrowdShare, Share, Transfer
from .timeline import Timeline, pack_span

#: Before any work: an instant that no submission can precede, however long the lags.
NEVER = -(10**18)


@dataclass(frozen=True, slots=True)
class Lags:
    """What passes on a lane between two pieces of work, and between the cause of one and its start, in ns.

    `gap_ns`: from the end of one to the start of the next. `after_other_ns`: from the end of what work waits for. All
    are so much longer, as is the time from the instant at which work is issued, where a lane that disturbs this one was
    busy meanwhile: at some instant between the last cause and the start that the work would have without.
    """

    gap_ns: int = 0
    gap_longer_ns: int = 0
    after_other_ns: int = 0
    after_other_longer_ns: int = 0
    after_issue_longer_ns: int = 0

    @property
    def gap_disturbed_ns(self) -> int:
        """The gap beside a disturber."""
        return self.gap_ns + self.gap_longer_ns

    @property
    def after_other_disturbed_ns(self) -> int:
        """What passes behind what work waits for, beside a disturber."""
        return self.after_other_ns + self.after_other_longer_ns

    @property
    def longer(self) -> bool:
        """Whether any is longer beside a disturber."""
        return bool(self.gap_longer_ns or self.after_other_longer_ns or self.after_issue_longer_ns)


_NO_LAGS = Lags()


class Pending:
    """The end of a piece of work, not known yet; `end_ns` is None until it is."""

    __slots__ = ("_waiting", "end_ns")

    def __init__(self) -> None:
        self.end_ns: int | None = None
        self._waiting: list[Callable[[], None]] = []

    def then(self, call: Callable[[], None]) -> None:
        """Call `call` once, as soon as the end is known (now, if it is)."""
        if self.end_ns is None:
            self._waiting.append(call)
        else:
            call()

    def resolve(self, end_ns: int) -> None:
        """Say when the work ended, and tell everyone who asked, in the order in which they asked."""
        self.end_ns = end_ns
        for call in self._waiting:
            call()
        self._waiting.clear()


#: When something ends: an instant in ns, perhaps ahead, or a promise of one.
Completion = int | Pending


def wait_for(env: simpy.Environment, pending: Pending) -> Generator[Event, Any, int]:
    """Let a SimPy process wait until the end of some work is known, and return it."""
    if pending.end_ns is None:
        known = env.event()

        def tell() -> None:
            known.succeed()

        pending.then(tell)
        yield known
    assert pending.end_ns is not None
    return pending.end_ns


def later(one: Completion, other: Completion) -> Completion:
    """Return the later of two completions: `after_all` of them, quickly where both are known."""
    if isinstance(one, int) and isinstance(other, int):
        return one if one > other else other
    return after_all([one, other])


def after_all(completions: Sequence[Completion]) -> Completion:
    """Return the completion of the last of several; 0 of none."""
    last_ns = 0
    unknown: list[Pending] = []
    for completion in completions:
        end_ns = completion if isinstance(completion, int) else completion.end_ns
        if end_ns is None:
            assert isinstance(completion, Pending)
            unknown.append(completion)
        elif end_ns > last_ns:
            last_ns = end_ns
    if not unknown:
        return last_ns
    if len(unknown) == 1 and not last_ns:
        return unknown[0]
    together = Pending()

    def one_more() -> None:
        if all(pending.end_ns is not None for pending in unknown):
            together.resolve(max(last_ns, *(pending.end_ns or 0 for pending in unknown)))

    for pending in unknown:
        pending.then(one_more)
    return together


@dataclass(slots=True)
class Work:
    """One piece of work and everything that its span will say.

    `ns` is its duration right behind other work, `alone_ns` on a lane that was idle; both without disturbance,
    which stretches them by `slowdown`. It may start at `issued_ns`, and once `after` has ended. `transfer` is what it
    moves over the links of a network, if its lane has a share of one.
    """

    ns: int
    alone_ns: int
    issued_ns: int
    after: Completion
    kind: int
    expert: int
    visit: int
    copy: int
    slowdown: float = 1.0
    transfer: Transfer | None = None
    #: Priority lanes only: smaller goes first, then in the order of numbers; the pieces still to do, which other work
    #: may come between; and whether it enters the queue only once it could start, lest it hold up what it waits for.
    rank: tuple[int, int] = (0, 0)
    number: int = 0
    pieces: int = 1
    held_back: bool = False
    done: Pending = field(default_factory=Pending)
    started: bool = False
    cancelled: bool = False

    def ready_ns(self, after_other_ns: int, after_issue_ns: int = 0) -> int | None:
        """Return when it may start at the earliest, so long behind its cause; None while that is not known."""
        end_ns = self.after if isinstance(self.after, int) else self.after.end_ns
        if end_ns is None:
            return None
        issued_ns = self.issued_ns + after_issue_ns
        # 0 stands for nothing to wait for.
        return max(issued_ns, end_ns + after_other_ns) if end_ns else issued_ns

    def enters_ns(self) -> int | None:
        """Return when it enters a priority queue; None while that is not known."""
        return self.ready_ns(0) if self.held_back else self.issued_ns

    def when_ready_known(self, call: Callable[[], None]) -> None:
        """Call `call` as soon as `ready_ns` has an answer."""
        if isinstance(self.after, int):
            call()
        else:
            self.after.then(call)


class FifoLane:
    """First in, first out, disturbed by nobody."""

    def __init__(self, timeline: Timeline, number: int, lags: Lags = _NO_LAGS) -> None:
        self._timeline = timeline
        self._extend = timeline.extend
        self.number = number
        self._gap_ns, self._after_other_ns = lags.gap_ns, lags.after_other_ns
        self._next_ns = NEVER  # the earliest start of the next piece of work
        self._queue: deque[Work] = deque()  # only what waits for something not known yet

    def submit(
        self,
        ns: int,
        alone_ns: int,
        issued_ns: int,
        after: Completion,
        kind: int,
        expert: int = -1,
        visit: int = -1,
        copy: int = -1,
        slowdown: float = 1.0,
        transfer: Transfer | None = None,
    ) -> Completion:
        """Queue work (fields as in Work; `after` is one prerequisite, 0 for none) and return its end.

        Nothing disturbs this lane, so `slowdown` and `transfer` have no effect.
        """
        if not isinstance(after, int) or self._queue:
            return self._defer(Work(ns, alone_ns, issued_ns, after, kind, expert, visit, copy))
        start_ns = self._next_ns
        ready_ns = issued_ns
        if after and after + self._after_other_ns > ready_ns:
            ready_ns = after + self._after_other_ns
        if ready_ns > start_ns:
            start_ns = ready_ns
            ns = alone_ns
        end_ns = start_ns + ns
        self._next_ns = end_ns + self._gap_ns
        self._extend(pack_span(start_ns, end_ns, issued_ns, expert, visit, copy, self.number, kind))
        return end_ns

    def hold(self, until_ns: int) -> None:
        """Start nothing that is submitted from now on before something else has ended, at `until_ns`."""
        self._next_ns = max(self._next_ns, until_ns + self._after_other_ns)

    def backlog_ns(self, now_ns: int) -> int:
        """Return the work that is queued or running at an instant, in ns; what waits for a promise counts whole."""
        return max(0, self._next_ns - now_ns) + sum(work.ns for work in self._queue)

    def _defer(self, work: Work) -> Pending:
        """Queue work until the end of what it waits for, or of what is queued before it, is known."""
        self._queue.append(work)
        if len(self._queue) == 1:
            self._drain()
        return work.done

    def _drain(self) -> None:
        """Finish what has become known at the head of the queue."""
        queue = self._queue
        while queue:
            work = queue[0]
            ready_ns = work.ready_ns(self._after_other_ns)
            if ready_ns is None:
                work.when_ready_known(self._drain)
                return
            start_ns, ns = self._next_ns, work.ns
            if ready_ns > start_ns:
                start_ns, ns = ready_ns, work.alone_ns
            end_ns = start_ns + ns
            self._next_ns = end_ns + self._gap_ns
            self._timeline.record(
                start_ns, end_ns, work.issued_ns, work.expert, work.visit, work.copy, self.number, work.kind
            )
            queue.popleft()
            work.done.resolve(end_ns)


class _Call(Event):
    """A call at an instant: an event that has triggered when it is made, for it is made millions of times.

    It does what SimPy's events and `Environment.schedule` do, by their private fields, for its number may be older.
    """

    def __init__(self, env: simpy.Environment, call: Callable[[Event], None]) -> None:
        self.env = env
        self.callbacks = [call]
        self._ok = True
        self._value = None

    def at(self, at_ns: int, priority: EventPriority, number: int) -> None:
        """Schedule it: of one instant and priority, events come in the order of their numbers (`Environment._eid`)."""
        heapq.heappush(self.env._queue, (at_ns, priority, number, self))


#: What lanes are asked for most of all, at the speed of C.
_active_work = attrgetter("_active")


class CoupledLane:
    """First in, first out, but slowed down while other lanes are busy.

    While n of the lanes in `sharing` are busy too, work takes n + 1 times as long, and `sharing_factor` times that (one
    link, several streams). While any lane in `disturbers` is, it takes `Work.slowdown` times as long (kernels
    beside a copy), and for each busy one in `slowed_by` the factor beside it (copies beside experts on the CPU, which
    read the same memory).
    With a `share` of a network, a transfer takes as many times as long as the links that it passes are shared; with one
    of a crowd, all work as many times as long as so many who are busy take.
    Work keeps what remains of it and is retimed whenever a neighbor starts or ends. Work does not start while one of
    the lanes in `turns` is busy (one engine, several streams), and the engine stays with a lane as long as that has
    ready work: so it was seen on an H200, without exception, whichever stream had asked first.
    """

    def __init__(self, env: simpy.Environment, timeline: Timeline, number: int, lags: Lags = _NO_LAGS) -> None:
        self._env = env
        self._timeline = timeline
        self.number = number
        self._lags = lags
        self._lags_vary = lags.longer
        self._free_ns = NEVER  # the end of the last work
        self._queue: deque[Work] = deque()
        self.sharing: list[CoupledLane] = []
        self.sharing_factor = 1.0
        self.turns: list[CoupledLane] = []
        self.disturbers: list[CoupledLane] = []
        self._share: Share | CrowdShare | None = None
        self.slowed_by: list[tuple[CoupledLane, float]] = []
        self._neighbors: list[CoupledLane] = []
        self._active: Work | None = None
        self._goes_on = False  # between two pieces of work that the engine does not leave this lane for
        self._wake_ns = NEVER
        self._start_ns = self._since_ns = 0
        self._left_ns = 0.0  # what remains of the active work, in undisturbed ns
        self._stretch = 1.0
        # When the active work ends as things are, and the number of that end among SimPy's events.
        self._end_ns = self._end_number = -1
        # The event that looks whether it has ended, no number being none: early if work was put off, but never late.
        self._look_ns = self._look_number = -1

    def submit(
        self,
        ns: int,
        alone_ns: int,
        issued_ns: int,
        after: Completion,
        kind: int,
        expert: int = -1,
        visit: int = -1,
        copy: int = -1,
        slowdown: float = 1.0,
        transfer: Transfer | None = None,
    ) -> Completion:
        """Queue work, as `FifoLane.submit` does; the end is not known before it has come."""
        return self.submit_work(Work(ns, alone_ns, issued_ns, after, kind, expert, visit, copy, slowdown, transfer))

    def join(self, share: Share | CrowdShare) -> None:
        """Let this lane's work take its part of a network, or of what a crowd shares."""
        self._share = share
        share.changed = self._retime

    def submit_work(self, work: Work) -> Completion:
        """Queue work and return the promise of its end."""
        self._queue.append(work)
        if self._active is None and len(self._queue) == 1:
            self._start_next()
        return work.done

    def backlog_ns(self, now_ns: int) -> int:
        """Return the undisturbed work that is queued or running now, in ns."""
        done_ns = (int(self._env.now) - self._since_ns) / self._stretch
        running_ns = max(0, round(self._left_ns - done_ns)) if self._active is not None else 0
        return running_ns + sum(work.ns * work.pieces for work in self._waiting())

    def _waiting(self) -> Iterable[Work]:
        return self._queue

    @property
    def busy(self) -> bool:
        """Whether work is running now."""
        return self._active is not None

    def _head(self) -> Work | None:
        """Return the work whose turn it is, without removing it."""
        return self._queue[0] if self._queue else None

    def _take(self, work: Work) -> None:
        self._queue.popleft()

    def _start_next(self) -> None:
        if self._active is not None:
            return
        work = self._head()
        if work is None:
            return
        if self.turns and any(lane._active is not None or lane._goes_on for lane in self.turns):
            return
        lags = self._lags
        ready_ns = work.ready_ns(lags.after_other_ns)
        if ready_ns is None:
            work.when_ready_known(self._start_next)
            return
        now_ns, next_ns = int(self._env.now), self._free_ns + lags.gap_ns
        start_ns = max(ready_ns, next_ns)
        if self._lags_vary and self.disturbers and self._was_disturbed(work, now_ns):
            ready_ns = work.ready_ns(lags.after_other_disturbed_ns, lags.after_issue_longer_ns) or 0
            next_ns = self._free_ns + lags.gap_disturbed_ns
            start_ns = max(start_ns, ready_ns, next_ns)
        if start_ns > now_ns:
            if start_ns != self._wake_ns:
                self._wake_ns = start_ns
                self._at(start_ns, NORMAL, lambda _: self._start_next())
            return
        self._take(work)
        self._active, self._goes_on = work, False
        self._start_ns = self._since_ns = now_ns
        ns = work.alone_ns if ready_ns > next_ns else work.ns
        self._left_ns = float(ns)
        if self._share is not None:
            self._share.begin(work.transfer, ns)
        self._schedule_end()
        for lane in self._neighbors:
            lane._retime()

    def _heeds(self) -> list[CoupledLane]:
        """Return the lanes that change how this one's work goes."""
        return [*self.sharing, *self.turns, *self.disturbers, *(lane for lane, _ in self.slowed_by)]

    @property
    def disturbed(self) -> bool:
        """Whether one of the disturbers is busy now."""
        return any(map(_active_work, self.disturbers))

    def _was_disturbed(self, work: Work, now_ns: int) -> bool:
        """Whether a disturber was busy between the last cause of the next work and now.

        It is asked at the latest when the work would start undisturbed, so the answer is the same whenever the work was
        submitted.
        """
        caused_ns = max(work.ready_ns(0) or 0, self._free_ns)
        return caused_ns <= now_ns and any(
            lane._free_ns > caused_ns or (lane._active is not None and lane._end_ns > caused_ns)
            for lane in self.disturbers
        )

    def _schedule_end(self) -> None:
        work = self._active
        assert work is not None
        stretch = 1.0
        for lane in self.sharing:
            stretch += lane._active is not None
        if stretch != 1.0:
            stretch *= self.sharing_factor
        if self._share is not None:
            stretch *= self._share.stretch
        if work.slowdown != 1.0 and self.disturbed:
            stretch *= work.slowdown
        for lane, factor in self.slowed_by:
            if lane._active is not None:
                stretch *= factor
        self._stretch = stretch
        self._end_ns = self._since_ns + round(self._left_ns * stretch)
        self._end_number = next(self._env._eid)
        if self._look_number < 0 or self._end_ns < self._look_ns:
            self._look_for_end()

    def _look_for_end(self) -> None:
        """Look when the work ends as things are, by the number that this end was given: so ends keep their order."""
        self._look_ns = self._end_ns
        number = self._look_number = self._end_number
        _Call(self._env, lambda _: self._end(number)).at(self._end_ns, URGENT, number)

    def _retime(self) -> None:
        """Account for what was done at the old speed and schedule the rest at the new one."""
        if self._active is None:
            if self.turns:
                self._start_next()
            return
        now_ns = int(self._env.now)
        self._left_ns = max(0.0, self._left_ns - (now_ns - self._since_ns) / self._stretch)
        self._since_ns = now_ns
        self._schedule_end()

    def _end(self, number: int) -> None:
        """End the active work, unless the event of this number has been overtaken or comes too early."""
        if number != self._look_number:
            return
        if number != self._end_number:
            self._look_for_end()
            return
        self._look_number = -1
        work = self._active
        assert work is not None
        now_ns = int(self._env.now)
        self._active = None
        if self._share is not None:
            self._share.end()
        for lane in (self, *self.turns):
            lane._free_ns = now_ns
        self._goes_on = bool(self.turns) and self._is_ready(now_ns)
        self._timeline.record(
            self._start_ns, now_ns, work.issued_ns, work.expert, work.visit, work.copy, self.number, work.kind
        )
        self._finish(work, now_ns)
        for lane in self._neighbors:
            lane._retime()
        self._start_next()

    def _finish(self, work: Work, now_ns: int) -> None:
        work.done.resolve(now_ns)

    def _is_ready(self, now_ns: int) -> bool:
        """Whether the next work may start as soon as the lane's gap has passed."""
        work = self._head()
        ready_ns = work.ready_ns(self._lags.after_other_ns) if work is not None else None
        return ready_ns is not None and ready_ns <= now_ns + self._lags.gap_ns

    def _at(self, at_ns: int, priority: EventPriority, call: Callable[[Event], None]) -> None:
        """Run `call` at an instant; at equal instants URGENT (ends) comes before NORMAL (starts)."""
        _Call(self._env, call).at(at_ns, priority, next(self._env._eid))


class PriorityLane(CoupledLane):
    """A host-side queue before a copy engine: the smallest `Work.rank` goes next, however late it came.

    Started work is not interrupted, but work in several pieces lets another in between them; of equal ranks, what
    came first goes on first. Cancelled work is marked and skipped when its turn comes.
    """

    def __init__(self, env: simpy.Environment, timeline: Timeline, number: int, lags: Lags = _NO_LAGS) -> None:
        super().__init__(env, timeline, number, lags)
        self._heap: list[tuple[tuple[int, int], int, Work]] = []
        self._held: Work | None = None  # chosen, but waiting for a prerequisite: it holds up the lane
        self._count = 0
        #: Asked when work's turn comes; True drops it (a stale prefetch).
        self.is_stale: Callable[[Work], bool] = lambda work: False

    def submit_work(self, work: Work) -> Completion:
        """Queue work by its rank, from the instant at which it is issued or, if held back, at which it is ready."""
        self._number(work)
        if work.held_back:
            work.when_ready_known(lambda: self._enter(work))
        else:
            self._enter(work)
        return work.done

    def promote(self, work: Work, rank: tuple[int, int]) -> None:
        """Give queued work a smaller rank, for all pieces that have not started yet."""
        if rank < work.rank:
            work.rank = rank
            self._number(work)
            entered_ns = work.enters_ns()
            entered = (
                entered_ns is not None and entered_ns <= self._env.now
            )  # else it is, by its new rank, when it does
            if entered and work.done.end_ns is None and work is not self._active and work is not self._held:
                self._insert(work)

    def give_up(self, work: Work) -> Completion:
        """Begin no further piece of work, unless the lane is at it already; return when the lane is done with it."""
        if work.cancelled or (work.done.end_ns is None and work is not self._active and work is not self._held):
            work.cancelled = True
            return int(self._env.now) if work.started else work.after
        work.pieces = 1
        return work.done

    def _number(self, work: Work) -> None:
        self._count += 1
        work.number = self._count

    def _enter(self, work: Work) -> None:
        """Insert work when it may enter the queue, which is known now."""
        entered_ns = work.enters_ns()
        assert entered_ns is not None
        if entered_ns > self._env.now:
            self._at(entered_ns, NORMAL, lambda _: self._insert(work))
        else:
            self._insert(work)

    def _insert(self, work: Work) -> None:
        heapq.heappush(self._heap, (work.rank, work.number, work))
        self._start_next()

    def backlog_ns(self, now_ns: int) -> int:
        """Return the undisturbed work that is queued or running now, in ns; all pieces that are still to be made."""
        active = self._active
        return super().backlog_ns(now_ns) + (active.ns * (active.pieces - 1) if active is not None else 0)

    def _waiting(self) -> Iterable[Work]:
        queued = {id(work): work for rank, _, work in self._heap if rank == work.rank and not work.cancelled}
        if self._held is not None:
            queued[id(self._held)] = self._held
        return [work for work in queued.values() if work.done.end_ns is None]

    def _head(self) -> Work | None:
        if self._held is not None:
            return self._held
        while self._heap:
            rank, _, work = heapq.heappop(self._heap)
            overtaken = rank != work.rank or work.done.end_ns is not None
            if overtaken or work.cancelled or self.is_stale(work):
                continue
            self._held = work
            return work
        return None

    def _is_ready(self, now_ns: int) -> bool:
        # The host enqueues one copy at a time: between two, the engine is free for others.
        return False

    def _take(self, work: Work) -> None:
        self._held = None
        work.started = True

    def _finish(self, work: Work, now_ns: int) -> None:
        if work.pieces > 1:
            work.pieces -= 1
            heapq.heappush(self._heap, (work.rank, work.number, work))
        else:
            work.done.resolve(now_ns)


def couple(lanes: Iterable[CoupledLane]) -> None:
    """Tell each lane whom to retime when it starts or ends: those that it shares or takes turns with, or disturbs."""
    lanes = list(lanes)
    for lane in lanes:
        lane._neighbors = [other for other in lanes if lane in other._heeds()]


def disturb(lane: CoupledLane, by: Sequence[CoupledLane]) -> None:
    """Let a lane be slowed by others that are coupled already, and do nothing to them."""
    lane.disturbers = list(by)
    for other in by:
        other._neighbors.append(lane)
