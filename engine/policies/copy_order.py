"""Copy orders: on which streams experts are copied to a GPU, and which of the copies that wait goes next.

Streams are first in, first out, as CUDA's are. An order by rank keeps copies in a queue of the host's instead, which
hands one at a time, or one piece of it, to the copy engine. To add one: write a class, name it in COPY_ORDERS.
"""

from __future__ import annotations

from typing import NamedTuple

#: Smaller goes first; of equal ranks, what was queued first.
Rank = tuple[int, int]


class QueuedCopy(NamedTuple):
    """A copy that waits in a queue: whether a visit demands the expert now, the visit that it is for, and the expert.

    A prefetch becomes demanded when its expert is looked up before the copy has been made.
    """

    demanded: bool
    visit: int
    expert: int


class CopyOrder:
    """Streams: copies are made as they are ordered, those of demand and of prefetches together unless told apart."""

    #: Whether prefetches are copied on a stream of their own, which shares the link with that of demand.
    prefetch_stream = False


class ByRank(CopyOrder):
    """A queue before one stream: the copy of the smallest rank goes next, however late it came."""

    def rank(self, copy: QueuedCopy) -> Rank:
        """Returns the rank of a copy; it is asked for when the copy is queued, and again when it is demanded."""
        raise NotImplementedError


class Fifo(CopyOrder):
    """One stream for all copies."""


class TwoStreams(CopyOrder):
    """One stream for demand, one for prefetches."""

    prefetch_stream = True


class Priority(ByRank):
    """Demand before prefetches, then what is for the nearer visit."""

    def rank(self, copy: QueuedCopy) -> Rank:
        """Returns (0 for demand or 1 for a prefetch, visit)."""
        return int(not copy.demanded), copy.visit


#: By the names that a scenario uses.
COPY_ORDERS: dict[str, type[CopyOrder]] = {"fifo": Fifo, "two_streams": TwoStreams, "priority": Priority}


def orders_by_rank() -> list[str]:
    """Returns the names of the orders that keep a queue of the host's."""
    return [name for name, order in COPY_ORDERS.items() if issubclass(order, ByRank)]
