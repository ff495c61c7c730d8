"""The host thread's core: on a machine shared with others, a core whose sibling is busy makes every call slower.

Such a machine has two speeds, a factor of up to two apart, that change every few seconds. So a run that is to be timed
first moves to the core that is fastest just then, and afterwards asks whether the core still is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter_ns

#: A core that is slower than the fastest ever seen by so much is disturbed.
DISTURBED = 1.15
_LOOPS = 10_000


class Cores:
    """The cores that this process may use, and the shortest time that any has taken for the same work."""

    def __init__(self) -> None:
        # Other systems than Linux cannot pin a thread: there the one "core" is wherever it runs.
        self.can_pin = hasattr(os, "sched_setaffinity")
        self.numbers = sorted(os.sched_getaffinity(0)) if self.can_pin else [0]
        self.fastest_ns = min(self._probe(number) for number in self.numbers)

    @contextmanager
    def quietest(self, count: int = 1) -> Iterator[None]:
        """Stay on the core that is fastest now, or on so many; threads that are started meanwhile stay there too."""
        times = {number: self._probe(number) for number in self.numbers}
        best = sorted(times, key=times.__getitem__)[:count]
        self.fastest_ns = min(self.fastest_ns, times[best[0]])
        self._pin(best)
        try:
            yield
        finally:
            self._pin(self.numbers)

    def slowdown(self) -> float:
        """Returns how much slower the present core is than the fastest was: about 1 where nobody disturbs it."""
        return _work_ns() / self.fastest_ns

    def _probe(self, number: int) -> int:
        self._pin([number])
        try:
            return _work_ns()
        finally:
            self._pin(self.numbers)

    def _pin(self, numbers: list[int]) -> None:
        if self.can_pin:
            os.sched_setaffinity(0, numbers)


def _work_ns() -> int:
    """Returns the time that a fixed piece of Python takes, the shortest of three."""
    return min(_loop_ns() for _ in range(3))


def _loop_ns() -> int:
    began_ns = perf_counter_ns()
    for _ in range(_LOOPS):
        pass
    return perf_counter_ns() - began_ns
