"""Lanes by themselves, without a host or a program, for tests of what they do."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import simpy

from prestage.engine.policies.copy_order import Priority, QueuedCopy
from prestage.engine.timing.lanes import Instant, Lane, QueueLane, Work, couple
from prestage.resources.lags import Lags
from prestage.resources.timeline import DEMAND, Timeline


class Lanes:
    """SimPy's clock, a timeline, and lanes on it."""

    def __init__(self) -> None:
        self.env, self.timeline = simpy.Environment(), Timeline()
        self.instant = Instant(self.env)

    def lane(self, role: str = "h2d", lags: Lags | None = None) -> Lane:
        """Returns one more lane."""
        return Lane(self.env, self.instant, self.timeline, self.timeline.add_lane("gpu0", role, role), lags or Lags())

    def queue(self) -> QueueLane:
        """Returns a lane with a queue by priority."""
        lane = QueueLane(self.env, self.instant, self.timeline, self.timeline.add_lane("gpu0", "h2d", "h2d"))
        lane.rank = Priority().rank
        couple([lane])
        return lane

    def submit(
        self,
        lane: Lane,
        ns: int,
        *,
        alone_ns: int | None = None,
        issued_ns: int = 0,
        after: tuple[Work, ...] = (),
        kind: int = DEMAND,
        **more: Any,
    ) -> Work:
        """Submit work to a lane now."""
        alone_ns = ns if alone_ns is None else alone_ns
        return lane.submit(Work(self.env.event(), ns, alone_ns, issued_ns, after, kind, 0, **more))

    def enqueue(
        self, lane: QueueLane, demanded: bool, visit: int, *, ns: int = 10, issued_ns: int = 0, **more: Any
    ) -> Work:
        """Submit a copy to a queue by priority: it is demanded or prefetched for a visit."""
        return self.submit(lane, ns, issued_ns=issued_ns, wanted=QueuedCopy(demanded, visit, 0), **more)

    def later(self, at_ns: int, call: Any) -> None:
        """Call at an instant."""

        def wait() -> Generator[simpy.Event, Any, None]:
            yield self.env.timeout(at_ns)
            call()

        self.env.process(wait())

    def intervals(self) -> list[tuple[int, int]]:
        """Run to the end; return (start, end) of every span, in the order of their ends."""
        self.env.run()
        self.timeline.settle()
        return [(int(span["start_ns"]), int(span["end_ns"])) for span in self.timeline.spans()]


def ends(lanes: Lanes, *works: Work) -> list[int | None]:
    """Run to the end; return when each of some works has ended."""
    lanes.env.run()
    return [work.end_ns for work in works]
