"""What a host thread knows of the GPUs that it dispatches to, and of what passes between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import simpy

from ...resources.links import PeerCosts
from ...resources.timeline import ACTIVATION, LAUNCH
from .lanes import Lane, Story, Work, until_ended
from .machine import GpuLanes
from .records import pack_arrival


class Arrivals:
    """When what one stage sends for each step is at another, so much later than its copy ends."""

    def __init__(self, env: simpy.Environment, lag_ns: int) -> None:
        self._env, self._lag_ns = env, lag_ns
        self._of: dict[int, Work] = {}

    def of(self, step: int) -> Work:
        """Returns work that ends when it is there."""
        if step not in self._of:
            self._of[step] = Work(self._env.event(), 0, 0, 0, (), ACTIVATION, -1)
        return self._of[step]

    def follow(self, step: int, sent: Work) -> Story:
        """Let it be there when a copy has ended: known at that end, though it takes the lag."""
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
    """What one thread at a time is behind; those that wait for it to come out look again whenever one has."""

    taken: bool = False
    waiting: list[simpy.Event] = field(default_factory=list)


@dataclass(eq=False)
class GpuState:
    """One GPU as the host thread that dispatches to it sees it: its lanes, and its place in the program.

    `now_ns` is the thread's clock while it is at this GPU.
    """

    lanes: GpuLanes
    queue_depth: int
    watches_queue: bool
    now_ns: int = 0
    busy_since_ns: int = 0
    visit: int = -1
    last: Work | None = None  # the last work submitted, and the last kernel that serves the step
    last_kernel: Work | None = None
    after: list[Work] = field(default_factory=list)  # what the next work waits for, and by how many calls
    calls: int = 0
    kernel_after: list[Work] = field(default_factory=list)  # what the next kernel waits for besides
    members: list[int] = field(default_factory=list)  # the tokens of the experts of a grouped kernel
    launched: deque[tuple[Work, int]] = field(default_factory=deque)
    launched_count: int = 0
    interrupted_ns: int = 0  # when other work last took the compute stream, and how long it holds up the next kernel
    held_ns: int = 0
    assigned: tuple[int, int] = (0, 0)  # the bytes assigned of the budget, as the visit was decided
    sends: Sending | None = None
    receives: Arrivals | None = None
    promised: deque[tuple[int, int, Work]] = field(default_factory=deque)  # arrivals that are not known yet
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
