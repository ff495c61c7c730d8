"""What an eviction policy is, what it may know, and the two orders that most of them keep experts in.

The policies themselves, and how to add one, are in eviction.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any

from ...errors import InputError
from ...workloads.batches import Step
from ...workloads.guesses import Guesses
from ...workloads.trace import RoutingTrace


@dataclass(frozen=True)
class Setting:
    """What a policy may know before the run; most need none of it.

    `capacity` is how many experts of the largest size its pool holds, `layers` the layers that the pool serves,
    `first_layer` the model's layer that is layer 0 here, `experts` the experts of one layer. `shared` says that layers
    share the experts of the same index: all experts are then those of layer 0. `trace`, `steps` and `single` (every
    (token, expert) pair is a visit of its own) say what will be asked of it, for bounds and for what is learned
    beforehand; `guesses` are the predictor's.
    """

    capacity: int = 0
    layers: tuple[int, ...] = ()
    experts: int = 0
    seed: int = 0
    first_layer: int = 0
    shared: bool = False
    trace: RoutingTrace | None = None
    steps: Sequence[Step] = ()
    single: bool = False
    guesses: Guesses | None = None

    def known_trace(self) -> RoutingTrace:
        """Returns the trace; ValueError if there is none, for policies that cannot do without."""
        if self.trace is None:
            raise InputError("this eviction policy needs to know the trace and the steps: give them in its Setting")
        return self.trace


#: For policies that need to know nothing.
NO_SETTING = Setting()


class Eviction:
    """What the memory manager asks of an eviction policy; experts are ints, `layer * experts + index`.

    The first four are every policy's; `begin` and `miss` are for those that keep more than the experts in memory,
    `spent` for those that keep less than would fit. One that `needs_guesses` makes the run ask the predictor even where
    no prefetch policy does.
    """

    needs_guesses = False
    #: Whether it must know all steps of a run before it begins.
    needs_future = False
    #: Whether `victims` may leave experts out while room is made for a prefetch, of which `miss` has told.
    may_spare = False

    def __init__(self, setting: Setting = NO_SETTING) -> None:
        self.setting = setting

    def admit(self, expert: int, demanded: bool) -> None:
        """Take note of an expert that was given room, on demand (which counts as its use) or by a prefetch."""
        raise NotImplementedError

    def use(self, expert: int, weight: float) -> None:
        """Take note of the use of an expert in memory, with the gate weight of its tokens."""
        raise NotImplementedError

    def evict(self, expert: int) -> None:
        """Forget an expert that lost its room."""
        raise NotImplementedError

    def victims(self) -> Iterator[int]:
        """Walk the experts in memory, first to go first; may clear marks as it walks.

        The walker may stop anywhere, and evicts nobody before it has stopped; it need not evict whom it stopped at.
        """
        raise NotImplementedError

    def begin(self, visit: int, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """Take note of a visit before its look-ups: its experts in order of last appearance, with gate weights."""

    def spent(self, expert: int) -> bool:
        """Whether an expert that a visit used leaves as soon as that is over, though nobody wants its room."""
        return False

    def miss(self, expert: int, demanded: bool) -> None:
        """Take note, before any victim is asked for, of an absent expert that wants room; it may not get it."""


class Chain:
    """A queue of ints from which any may be taken, and that may be walked while the one just walked over moves.

    A doubly linked list; END stands before the first and after the last.
    """

    END = -1

    def __init__(self) -> None:
        self._after = {self.END: self.END}
        self._before = {self.END: self.END}

    def __len__(self) -> int:
        return len(self._after) - 1

    def __contains__(self, item: int) -> bool:
        return item in self._after

    def after(self, item: int) -> int:
        """Returns the next in the queue; after END comes the first, after the last comes END."""
        return self._after[item]

    def append(self, item: int) -> None:
        """Put an int that is not there at the end."""
        last = self._before[self.END]
        self._after[last] = item
        self._before[item] = last
        self._after[item] = self.END
        self._before[self.END] = item

    def remove(self, item: int) -> None:
        """Take an int out."""
        before, after = self._before.pop(item), self._after.pop(item)
        self._after[before] = after
        self._before[after] = before


class Ranking:
    """Experts by a priority, lowest first, ties in the order in which they were put there.

    A heap whose outdated entries are passed over and, once they are the most, thrown out: putting takes O(log n),
    removing O(1), and walking to the i-th O(i log i) without changing the order.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, int]] = []  # (priority, stamp, expert)
        self._stamp_of: dict[int, int] = {}
        self._stamp = 0

    def __contains__(self, expert: int) -> bool:
        return expert in self._stamp_of

    def put(self, expert: int, priority: Any) -> None:
        """Put an expert in, or at another priority; priorities must be comparable."""
        self._stamp += 1
        self._stamp_of[expert] = self._stamp
        heappush(self._heap, (priority, self._stamp, expert))
        if len(self._heap) > 2 * len(self._stamp_of) + 64:
            self._heap = [entry for entry in self._heap if self._stamp_of.get(entry[2]) == entry[1]]
            heapify(self._heap)

    def remove(self, expert: int) -> None:
        """Take an expert out."""
        del self._stamp_of[expert]

    def __iter__(self) -> Iterator[int]:
        heap, stamp_of = self._heap, self._stamp_of
        while heap and stamp_of.get(heap[0][2]) != heap[0][1]:
            heappop(heap)
        if not heap:
            return
        yield heap[0][2]  # nearly always the last that is asked for
        frontier = sorted((heap[place], place) for place in (1, 2) if place < len(heap))
        while frontier:
            (_, stamp, expert), place = heappop(frontier)
            for child in (2 * place + 1, 2 * place + 2):
                if child < len(heap):
                    heappush(frontier, (heap[child], child))
            if stamp_of.get(expert) == stamp:
                yield expert


def add_decayed(value: float, now: float, amount: float) -> float:
    """Returns a sum of exponentially decaying amounts with one more, in logarithms, so that time changes no order.

    `value` is log2 of the sum, grown instead of decayed since time 0 (-inf: nothing yet); `now` is in half-lives.
    """
    total = amount + 2.0 ** (value - now)
    return math.log2(total) + now if total > 0 else -math.inf
