"""The clocks of several GPUs and the host, set against each other: events of two GPUs cannot be compared.

Two GPUs are made to wait for each other in turn, there and back. What one GPU does lies between two events of the
other, so that half of the shortest way there and back bounds how far their clocks may be off against each other. The
host takes its time right behind the event that all others count from, on an idle GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter_ns
from typing import Any

from .timing import elapsed_ns

#: How often two GPUs wait for each other; the shortest way counts.
_TURNS = 20


class Clocks:
    """Zeros of several GPUs, recorded once a run; times count from that of the first."""

    def __init__(self, gpus: Sequence[Any]) -> None:
        self._gpus = list(gpus)
        self._streams = [gpu.stream() for gpu in gpus]
        self._zeros = [gpu.event() for gpu in gpus]
        first = gpus[0]
        self._turns = [[(first.event(), gpu.event(), first.event()) for _ in range(_TURNS)] for gpu in gpus[1:]]
        self._offsets_ns: list[int] | None = None
        self.host_zero_ns = 0
        #: How far two clocks may be off against each other.
        self.within_ns = 0

    def set(self) -> None:
        """Record all zeros while the GPUs are idle, the first one's last."""
        here = self._streams[0]
        for other, turns in zip(self._streams[1:], self._turns, strict=True):
            for there, turned, back in turns:
                there.record(here)
                there.wait(other)
                turned.record(other)
                turned.wait(here)
                back.record(here)
        for gpu in self._gpus:
            gpu.synchronize()
        self._offsets_ns = None
        for zero, stream in reversed(list(zip(self._zeros, self._streams, strict=True))):
            zero.record(stream)
        self.host_zero_ns = perf_counter_ns()

    def at_ns(self, clock: int, event: Any) -> int:
        """Returns when an event of one GPU was, by the first one's clock; all must have ended."""
        if self._offsets_ns is None:
            self._offsets_ns = [0, *(self._offset_ns(clock) for clock in range(1, len(self._zeros)))]
        return elapsed_ns(self._zeros[clock], event) + self._offsets_ns[clock]

    def _offset_ns(self, clock: int) -> int:
        """Returns when another GPU's zero was by the first one's clock."""
        first, zero = self._zeros[0], self._zeros[clock]
        ways = [(elapsed_ns(there, back), there, turned) for there, turned, back in self._turns[clock - 1]]
        way_ns, there, turned = min(ways, key=lambda way: way[0])
        self.within_ns = max(self.within_ns, -(-way_ns // 2))
        return elapsed_ns(first, there) + way_ns // 2 - elapsed_ns(zero, turned)
