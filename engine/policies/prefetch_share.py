"""How much of the memory prefetched experts may take before their first use; the rest is for cached ones.

Once memory is full, a prefetch at this limit may only take the room of another unused prefetch. To add one: write a
class with these methods and name it in PREFETCH_SHARE.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable


class FixedShare:
    """A share that stays what it was set to."""

    def __init__(self, share: float, capacity: int) -> None:
        self.share = share

    def evicted(self, expert: int, unused: bool) -> None:
        """Take note of an eviction: of a prefetched expert that nobody had used, or of a cached one."""

    def missed(self, expert: int) -> None:
        """Take note of a demand miss."""


class AdaptiveShare(FixedShare):
    """A share that follows the workload as ARC's target does (Megiddo & Modha, FAST '03).

    Two ghost lists remember as many evicted experts as memory holds: prefetches evicted unused, and cached experts. A
    miss of a remembered prefetch says that prefetches had too little room, one of a remembered cached expert that they
    had too much; each moves the share by 1/capacity, more if its list is the shorter.
    """

    def __init__(self, share: float, capacity: int) -> None:
        super().__init__(share, capacity)
        self._capacity = max(1, capacity)
        self._unused: OrderedDict[int, None] = OrderedDict()
        self._cached: OrderedDict[int, None] = OrderedDict()

    def evicted(self, expert: int, unused: bool) -> None:
        """Remember it in its list, and forget the oldest beyond the capacity."""
        mine, other = (self._unused, self._cached) if unused else (self._cached, self._unused)
        other.pop(expert, None)
        mine[expert] = None
        mine.move_to_end(expert)
        if len(mine) > self._capacity:
            mine.popitem(last=False)

    def missed(self, expert: int) -> None:
        """Move the share towards the side that would have kept this expert."""
        unused, cached = len(self._unused), len(self._cached)
        if expert in self._unused:
            del self._unused[expert]
            self.share = min(1.0, self.share + max(1.0, cached / unused) / self._capacity)
        elif expert in self._cached:
            del self._cached[expert]
            self.share = max(0.0, self.share - max(1.0, unused / cached) / self._capacity)


PREFETCH_SHARE: dict[str, Callable[[float, int], FixedShare]] = {"fixed": FixedShare, "adaptive": AdaptiveShare}
