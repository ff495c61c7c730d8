"""What a host thread keeps of each GPU that it dispatches to, and what passes between GPUs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import simpy
from simpy.events import ProcessGenerator

from ...resources.links import PeerCosts
from ...resources.timeline import ACTIVATION, LAUNCH
from .lanes import Lane, Work, until_ended
from .machine import GpuLanes
from .records import pack_arrival


class Arrivals:
    """What one stage of a pipeline sends to the next: for each step, work that ends `lag_ns` after the copy does."""

    def __init__(self, env: simpy.Environment, lag_ns: int) -> None:
        self._env, self._lag_ns = env, lag_ns
        self._of: dict[int, Work] = {}

    def of(self, step: int) -> Work:
        """Returns work that ends when what is sent for a step has arrived."""
        if step not in self._of:
            self._of[step] = Work(self._env.event(), 0, 0, 0, (), ACTIVATION, -1)
        return self._of[step]

    def follow(self, step: int, sent: Work) -> ProcessGenerator:
        """End a step's arrival with its copy: its time, a lag later, is known as soon as the copy ends."""
        yield from until_ended([sent])
        arrival = self.of(step)
        arrival.end_ns = (sent.end_ns or 0) + self._lag_ns
        arrival.done.succeed()


@dataclass(frozen=True)
class Sending:
    """What goes from one stage to the next: its lane, costs, the bytes of each step, and where it arrives."""

    lane: Lane
    costs: PeerCosts
    size_bytes: Sequence[int]
    arrivals: Arrivals


@dataclass(frozen=True)
class Exchanges:
    """What GPUs that share layers have in common: what an exchange takes, the way between any two, and their lanes.

    `ns` is asked of the traffic of the visit that was decided last.
    """

    lanes: Mapping[int, Lane]
    ns: Callable[[], int]
    peer: Callable[[int, int], PeerCosts]
    lane_from: Callable[[int, int], Lane]
    size_bytes: Sequence[int]


@dataclass(eq=False)
class Gate:
    """A mutual exclusion of host threads: one is inside at a time, and all that wait look again when it comes out."""

    taken: bool = False
    waiting: list[simpy.Event] = field(default_factory=list)


@dataclass(eq=False)
class GpuState:
    """One GPU as the host thread that dispatches to it sees it: its lanes, and how far the program has come there."""

    lanes: GpuLanes
    queue_depth: int
    watches_queue: bool
    # The thread's clock while it is at this GPU, and since when it has been busy.
    now_ns: int = 0
    busy_since_ns: int = 0
    visit: int = -1
    # The last work submitted, and the last kernel of the step's own (none that decompresses).
    last: Work | None = None
    last_kernel: Work | None = None
    # What the next work waits for, and the host's calls for these waits, not paid yet.
    after: list[Work] = field(default_factory=list)
    calls: int = 0
    # What the next kernel waits for besides.
    kernel_after: list[Work] = field(default_factory=list)
    # The tokens of each expert of the grouped kernel that is launched next.
    members: list[int] = field(default_factory=list)
    # The launch queue, if it is watched: work and its number of launches, and the sum of these.
    launched: deque[tuple[Work, int]] = field(default_factory=deque)
    launched_count: int = 0
    # When other work last took the compute stream, and how long it holds up the next kernel.
    interrupted_ns: int = 0
    held_ns: int = 0
    # The bytes assigned, and the budget, once the visit was decided.
    assigned: tuple[int, int] = (0, 0)
    # In a pipeline: to the next stage, and from the one before.
    sends: Sending | None = None
    receives: Arrivals | None = None
    # Arrivals whose time is not known yet: (visit, kind of the kernel behind it, arrival).
    promised: deque[tuple[int, int, Work]] = field(default_factory=deque)
    # Records, packed as in `records`: accesses, visits, arrivals.
    accesses: Any = field(default_factory=bytearray)
    decided: Any = field(default_factory=bytearray)
    arrived: Any = field(default_factory=bytearray)

    def end_busy(self) -> None:
        """Record the host thread's work since it last began as one span."""
        if self.now_ns > self.busy_since_ns:
            lanes, since_ns = self.lanes, self.busy_since_ns
            lanes.timeline.record(since_ns, self.now_ns, since_ns, -1, self.visit, -1, lanes.host, LAUNCH)
            self.busy_since_ns = self.now_ns

    def record_arrivals(self) -> None:
        """Record promised arrivals up to the first that is still to come."""
        while self.promised and (arrived_ns := self.promised[0][2].end_ns) is not None:
            visit, kind, _ = self.promised.popleft()
            self.arrived += pack_arrival(visit, kind, arrived_ns)
