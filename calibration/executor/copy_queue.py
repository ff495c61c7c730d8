"""The host-side queue of copies of an order by rank: one copy under way at a time.

The host thread itself looks (`poll`) whether the copy under way has ended, before each entry and while it waits.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from time import perf_counter_ns
from typing import Any

from ...engine.policies.copy_order import ByRank, QueuedCopy, Rank
from ...resources.timeline import PREFETCH
from ..device.cuda import Call, Calls, run
from .entries import Entry


class CopyQueue:
    """Copies that wait, by their rank; `ends` are the events of all spans."""

    def __init__(self, entries: Sequence[Entry], ends: Sequence[Any], order: ByRank) -> None:
        self._entries, self._ends, self._order = entries, ends, order
        self._pieces: dict[int, list[Calls]] = {}
        self._first_rank: dict[int, Rank] = {}
        self.clear()

    def prepare(self, number: int, pieces: list[Calls]) -> Calls:
        """Say what makes each piece of a copy, and return the call that queues it."""
        self._pieces[number], entry = pieces, self._entries[number]
        self._first_rank[number] = self._order.rank(QueuedCopy(entry.kind != PREFETCH, entry.target, entry.expert))
        return ((self.push, (number,)),)

    def demand(self, number: int, visit: int) -> Call:
        """Returns the call by which a visit demands a copy that may still be queued."""
        return self.promote, (number, self._order.rank(QueuedCopy(True, visit, self._entries[number].expert)))

    def clear(self) -> None:
        """Forget the last run."""
        #: Of each span, when its copy was enqueued (-1: it was not).
        self.issued_ns = array("q", [-1]) * len(self._ends)
        self._heap: list[tuple[Rank, int]] = []
        self._rank: dict[int, Rank] = {}  # what is queued
        self._next_piece: dict[int, int] = {}
        self._under_way: Any = None

    def push(self, number: int) -> None:
        """Queue a copy; one into the same room that nobody has used need not be made any more."""
        self._rank.pop(self._entries[number].overtakes, None)
        self._next_piece[number] = 0
        self._queue(number, self._first_rank[number])
        self.poll()

    def promote(self, number: int, rank: Rank) -> None:
        """Give a copy that is still queued, and is demanded now, its rank."""
        if number in self._rank:
            self._queue(number, rank)

    def poll(self) -> None:
        """Enqueue the next piece of the first copy, if none is under way."""
        if self._under_way is not None:
            if not self._under_way.query():
                return
            self._under_way = None
        while self._heap:
            rank, number = heapq.heappop(self._heap)
            if self._rank.get(number) == rank:
                self._enqueue(number, rank)
                return

    def wait_until_made(self, number: int) -> None:
        """Wait until a copy is enqueued whole: only then can a stream wait for its event."""
        while number in self._rank:
            self.poll()

    def wait_for(self, event: Any) -> None:
        """Wait for an event, and keep the copies going meanwhile."""
        while not event.query():
            self.poll()

    def drain(self) -> None:
        """Enqueue all that is queued."""
        while self._rank:
            self.poll()

    def _queue(self, number: int, rank: Rank) -> None:
        self._rank[number] = rank
        heapq.heappush(self._heap, (rank, number))

    def _enqueue(self, number: int, rank: Rank) -> None:
        pieces, piece = self._pieces[number], self._next_piece[number]
        run(pieces[piece])
        mark = self._entries[number].mark + piece
        self.issued_ns[mark] = perf_counter_ns()
        self._under_way = self._ends[mark]
        self._next_piece[number] = piece + 1
        if piece + 1 < len(pieces):
            heapq.heappush(self._heap, (rank, number))
        else:
            del self._rank[number]
