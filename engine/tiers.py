"""Tiers: host memory as a cache under the GPU's, and a drive below it that holds every expert.

`HostMemory` decides, without a clock, what each copy to the GPU finds in host memory, in the order in which the copies
are ordered; so the replay and the engine count the same. `Drive` is its time: reads on I/O lanes, a copy to the GPU
behind the read that it needs, and a read behind the last copy out of the room that it takes.

Host memory keeps what it has handed to the GPU (inclusive): experts are read-only, so nobody writes one back, and to
keep only what the GPU lacks would cost a copy back over the link for each expert that leaves the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import simpy

from ..resources.lane import Completion, CoupledLane, FifoLane, Pending, after_all, later
from ..resources.network import Crowd
from ..resources.timeline import READ, Timeline
from .costs.costs import ReadCosts
from .decide.host_memory import HostMemory
from .decide.memory_manager import Admission


class Drive:
    """The I/O lanes of a drive, and when the rooms of host memory are filled and free.

    A request goes to the lane with the least to do, which is the one that is free first. Only what is in flight shares
    the drive: where its speed depends on how much that is, the lanes run in SimPy's time (`coupled`). `give_up` is
    called for copies to the GPU that are not made after all; only a priority queue has such (`cancels`).
    """

    def __init__(
        self, env: simpy.Environment, timeline: Timeline, host: HostMemory, costs: ReadCosts, *, cancels: bool
    ) -> None:
        self._env = env
        times = costs.times_as_long
        numbers = [timeline.add_lane("nvme0", "nvme", f"I/O lane {number}") for number in range(len(times))]
        self.coupled = costs.shared
        self._lanes: Sequence[FifoLane | CoupledLane]
        if self.coupled:
            lanes, crowd = [CoupledLane(env, timeline, number) for number in numbers], Crowd(times)
            for lane in lanes:
                lane.join(crowd.share())
            self._lanes = lanes
        else:
            self._lanes = [FifoLane(timeline, number) for number in numbers]
        self._costs = costs.by_layer
        self._experts = host.manager.experts
        self._host = host
        self._cancels = cancels
        self._filled: dict[int, Completion] = {}  # read -> when its bytes are in host memory
        self._left: dict[int, Completion] = {}  # read -> when the last copy to the GPU has left its room
        self._leaving: dict[int, Pending] = {}  # copies to the GPU that may yet be given up

    def bring(self, copy: int, now_ns: int, visit: int, after: Completion) -> tuple[int, Completion]:
        """Order what brings a copy's bytes to host memory, behind `after`; return the host's time and when they come.

        `copied` follows.
        """
        read, admission = self._host.decided[copy]
        if admission is None:
            return now_ns, later(after, self._filled[read])
        return self._read(admission, now_ns, visit, after)

    def stage(self, now_ns: int, visit: int, after: Completion) -> int:
        """Order the reads of a visit that no copy asked for, behind `after`; return the host's time."""
        for admission in self._host.staged:
            now_ns, _ = self._read(admission, now_ns, visit, after)
        return now_ns

    def copied(self, copy: int, end: Completion) -> None:
        """Take note that a copy to the GPU reads its room in host memory until `end`."""
        read, _ = self._host.decided.pop(copy)
        if self._cancels and isinstance(end, Pending):
            end = self._until_given_up(copy, end)
        self._left[read] = later(self._left.get(read, 0), end)

    def give_up(self, copy: int) -> None:
        """Take note that a copy to the GPU is not made, or not further."""
        left = self._leaving.pop(copy, None)
        if left is not None:
            left.resolve(int(self._env.now))

    def _read(self, admission: Admission, now_ns: int, visit: int, after: Completion) -> tuple[int, Completion]:
        """Order a read's requests, behind what leaves its room."""
        expert, read = admission.expert, admission.copy
        cost = self._costs[expert // self._experts]
        now_ns += cost.host_ns
        for other in admission.former:
            after = later(after, self._free(other, again=other == admission.partly))
        ends = [self._request(cost.request_ns, now_ns, after, expert, visit, read) for _ in range(cost.requests)]
        filled = self._filled[read] = after_all(ends)
        return now_ns, filled

    def _request(self, ns: int, now_ns: int, after: Completion, expert: int, visit: int, read: int) -> Completion:
        lane = min(self._lanes, key=lambda lane: lane.backlog_ns(now_ns))
        return lane.submit(ns, ns, now_ns, after, READ, expert, visit, read)

    def _free(self, read: int, *, again: bool) -> Completion:
        """Return when the room of a read may be written, and forget the read unless some of that is asked `again`."""
        take = dict.get if again else dict.pop
        return later(take(self._filled, read, 0), take(self._left, read, 0))

    def _until_given_up(self, copy: int, end: Pending) -> Pending:
        left = self._leaving[copy] = Pending()

        def ended() -> None:
            assert end.end_ns is not None
            if self._leaving.pop(copy, None) is not None:
                left.resolve(end.end_ns)

        end.then(ended)
        return left
