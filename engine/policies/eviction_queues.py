"""Eviction policies that separate experts used once from those used again, in queues with ghosts of evicted ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain, islice

from .eviction_base import NO_SETTING as NO_SETTING
from .eviction_base import Chain, Ranking
from .eviction_base import Eviction as Eviction
from .eviction_base import Setting as Setting


class S3Fifo(Eviction):
    """Evict from a small queue of newcomers unless they were used twice; the others stay in a main queue like Clock's.

    Yang et al., "FIFO queues are all you need for cache eviction" (SOSP 2023): the small queue takes 10 % of the
    capacity; a demand miss of one of the last (90 % of the capacity) evicted newcomers goes straight to the main queue.
    As in the authors' libCacheSim, so do those that find the small queue full before anybody was evicted.
    """

    SMALL_TENTHS, GHOST_TENTHS = 1, 9
    USES_TO_STAY, MOST_MARKS = 2, 3

    def __init__(self, setting: Setting = NO_SETTING) -> None:
        super().__init__(setting)
        capacity = setting.capacity
        self._most_small = -(-capacity * self.SMALL_TENTHS // 10)
        self._most_main = capacity - self._most_small
        self._most_ghosts = capacity * self.GHOST_TENTHS // 10
        self._small, self._main = Chain(), Chain()
        self._uses: dict[int, int] = {}
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._returning: set[int] = set()
        self._has_evicted = False

    def miss(self, expert: int, demanded: bool) -> None:
        """Recognize a newcomer that was evicted too early; a prefetch says nothing of that."""
        if demanded and expert in self._ghosts:
            del self._ghosts[expert]
            self._returning.add(expert)

    def admit(self, expert: int, demanded: bool) -> None:
        """Put it last in the queue where it belongs, with no uses."""
        self._uses[expert] = 0
        is_full = not self._has_evicted and len(self._small) >= self._most_small
        if expert in self._returning or is_full:
            self._returning.discard(expert)
            self._main.append(expert)
        else:
            self._ghosts.pop(expert, None)
            self._small.append(expert)

    def use(self, expert: int, weight: float) -> None:
        """Count it."""
        self._uses[expert] += 1

    def evict(self, expert: int) -> None:
        """Take it out of its queue; remember a newcomer."""
        self._has_evicted = True
        del self._uses[expert]
        if expert in self._main:
            self._main.remove(expert)
            return
        self._small.remove(expert)
        self._ghosts[expert] = None
        if len(self._ghosts) > self._most_ghosts:
            self._ghosts.popitem(last=False)

    def victims(self) -> Iterator[int]:
        """Walk the main queue while it has more than its part, else the small one; who earned it moves and stays."""
        small, main = self._small, self._main
        passed_small, passed_main = small.END, main.END  # the last in each queue that was walked over
        while True:
            is_main_left = main.after(passed_main) != main.END
            if is_main_left and (len(main) > self._most_main or small.after(passed_small) == small.END):
                expert = passed_main = self._unmarked(passed_main)
            else:
                expert = self._unproven(passed_small)
                if expert != small.END:
                    passed_small = expert
                elif main.after(passed_main) != main.END:
                    continue
                else:
                    return
            yield expert

    def _unmarked(self, passed: int) -> int:
        """Returns the next of the main queue that has no uses left; who has some pays one to go to its end."""
        main, uses = self._main, self._uses
        while uses[expert := main.after(passed)]:
            uses[expert] = min(uses[expert], self.MOST_MARKS) - 1
            main.remove(expert)
            main.append(expert)
        return expert

    def _unproven(self, passed: int) -> int:
        """Returns the next of the small queue that has not earned its stay (END: none); who has goes to the main."""
        small, main, uses = self._small, self._main, self._uses
        while (expert := small.after(passed)) != small.END and uses[expert] >= self.USES_TO_STAY:
            uses[expert] = 0
            small.remove(expert)
            main.append(expert)
        return expert


class TwoQ(Eviction):
    """Evict from a queue of newcomers; who is demanded again after that goes to a main LRU.

    Johnson & Shasha, "2Q: a low overhead high performance buffer management replacement algorithm" (VLDB 1994), the
    full version: newcomers (A1in) hold a quarter of the capacity, and half as many experts as the capacity are
    remembered after they left it (A1out).
    """

    NEWCOMERS_IN, REMEMBERED_IN = 4, 2

    def __init__(self, setting: Setting = NO_SETTING) -> None:
        super().__init__(setting)
        self._most_newcomers = setting.capacity // self.NEWCOMERS_IN
        self._most_ghosts = setting.capacity // self.REMEMBERED_IN
        self._newcomers: OrderedDict[int, None] = OrderedDict()
        self._main: OrderedDict[int, None] = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._returning: set[int] = set()

    def miss(self, expert: int, demanded: bool) -> None:
        """Recognize one that has left the newcomers; a prefetch does not prove that it is used."""
        if demanded and expert in self._ghosts:
            del self._ghosts[expert]
            self._returning.add(expert)

    def admit(self, expert: int, demanded: bool) -> None:
        """Put who returns into the main LRU, others among the newcomers."""
        if expert in self._returning:
            self._returning.remove(expert)
            self._main[expert] = None
        else:
            self._ghosts.pop(expert, None)
            self._newcomers[expert] = None

    def use(self, expert: int, weight: float) -> None:
        """Renew its recency in the main LRU; among newcomers it counts for nothing (correlated references)."""
        if expert in self._main:
            self._main.move_to_end(expert)

    def evict(self, expert: int) -> None:
        """Take it out; remember a newcomer."""
        if expert in self._main:
            del self._main[expert]
            return
        del self._newcomers[expert]
        self._ghosts[expert] = None
        if len(self._ghosts) > self._most_ghosts:
            self._ghosts.popitem(last=False)

    def victims(self) -> Iterator[int]:
        """Walk the newcomers beyond their part, then the main LRU, then the other newcomers."""
        excess = max(0, len(self._newcomers) - self._most_newcomers)
        return chain(islice(self._newcomers, excess), self._main, islice(self._newcomers, excess, None))


class Arc(Eviction):
    """Balance an LRU of experts used once against one of those used more, by which of them forgot too early.

    Megiddo & Modha, "ARC: a self-tuning, low overhead replacement cache" (FAST 2003); the target for the first is a
    real number, as in libCacheSim. A prefetch is no use: it changes no target, and the first use after it is the one.
    """

    def __init__(self, setting: Setting = NO_SETTING) -> None:
        super().__init__(setting)
        self._capacity = setting.capacity
        self._once: OrderedDict[int, None] = OrderedDict()  # T1
        self._more: OrderedDict[int, None] = OrderedDict()  # T2
        self._once_ghosts: OrderedDict[int, None] = OrderedDict()  # B1
        self._more_ghosts: OrderedDict[int, None] = OrderedDict()  # B2
        self._target = 0.0  # p, for T1
        self._unused: set[int] = set()  # prefetched, in T1
        self._returning: dict[int, bool] = {}  # expert -> whether it was in B2
        self._is_new, self._favors_more = True, False  # what is known of the one that wants room

    def miss(self, expert: int, demanded: bool) -> None:
        """Move the target towards the LRU that has forgotten this expert."""
        once, more = len(self._once_ghosts), len(self._more_ghosts)
        if demanded and expert in self._once_ghosts:
            self._target = min(self._target + max(more / once, 1.0), self._capacity)
            del self._once_ghosts[expert]
            self._returning[expert] = False
        elif demanded and expert in self._more_ghosts:
            self._target = max(self._target - max(once / more, 1.0), 0.0)
            del self._more_ghosts[expert]
            self._returning[expert] = True
        self._is_new = expert not in self._returning
        self._favors_more = self._returning.get(expert, False)

    def admit(self, expert: int, demanded: bool) -> None:
        """Put who returns into the second LRU, others into the first."""
        if expert in self._returning:
            del self._returning[expert]
            self._more[expert] = None
            return
        self._once[expert] = None
        if not demanded:
            self._unused.add(expert)
            self._once_ghosts.pop(expert, None)
            self._more_ghosts.pop(expert, None)
        # A batch evicts for all its misses before it admits any, so the lists may have outgrown their bounds.
        self._trim(0)

    def use(self, expert: int, weight: float) -> None:
        """Put it last in the second LRU; at the first use of a prefetched one, in the first."""
        if expert in self._more:
            self._more.move_to_end(expert)
        elif expert in self._unused:
            self._unused.remove(expert)
            self._once.move_to_end(expert)
        else:
            del self._once[expert]
            self._more[expert] = None

    def evict(self, expert: int) -> None:
        """Take it out and remember it, unless nobody has used it or the first LRU takes up all the capacity."""
        is_full = len(self._once) >= self._capacity
        if self._is_new:
            self._trim(1)
        if expert in self._more:
            del self._more[expert]
            self._more_ghosts[expert] = None
            return
        del self._once[expert]
        if expert in self._unused:
            self._unused.remove(expert)
        elif not (self._is_new and is_full):
            self._once_ghosts[expert] = None

    def _trim(self, coming: int) -> None:
        """Forget the oldest so that T1 + B1 hold the capacity and all four twice it, with so many more to come."""
        once = len(self._once) + len(self._once_ghosts) + coming
        if once > self._capacity:
            if self._once_ghosts:
                self._once_ghosts.popitem(last=False)
        elif self._more_ghosts and once + len(self._more) + len(self._more_ghosts) > 2 * self._capacity:
            self._more_ghosts.popitem(last=False)

    def victims(self) -> Iterator[int]:
        """Walk the first LRU while it exceeds its target, else the second; then what is left (REPLACE)."""
        left = len(self._once)
        more = iter(self._more)
        for expert in self._once:
            while left < self._target or (left == self._target and not self._favors_more):
                other = next(more, None)
                if other is None:
                    break
                yield other
            left -= 1
            yield expert
        yield from more


class Lfru(Eviction):
    """Half of the room is privileged, an LRU of what was used again; the other half evicts who was used least often.

    Bilal & Kang, "A cache management scheme for efficient content eviction and replication in cache networks" (IEEE
    Access, 2017): who is pushed out of the privileged half falls back to the other one, with its count. Counts are of
    the time in memory.
    """

    def __init__(self, setting: Setting = NO_SETTING) -> None:
        super().__init__(setting)
        self._room = max(1, setting.capacity // 2)
        self._privileged: OrderedDict[int, None] = OrderedDict()
        self._others = Ranking()
        self._uses: dict[int, int] = {}

    def admit(self, expert: int, demanded: bool) -> None:
        """Put it among the others; a demand counts as a use."""
        self._uses[expert] = int(demanded)
        self._others.put(expert, int(demanded))

    def use(self, expert: int, weight: float) -> None:
        """Count it, and give it privilege."""
        self._uses[expert] += 1
        if expert in self._others:
            self._others.remove(expert)
            self._privileged[expert] = None
            if len(self._privileged) > self._room:
                fallen, _ = self._privileged.popitem(last=False)
                self._others.put(fallen, self._uses[fallen])
        else:
            self._privileged.move_to_end(expert)

    def evict(self, expert: int) -> None:
        """Forget it."""
        del self._uses[expert]
        if expert in self._others:
            self._others.remove(expert)
        else:
            del self._privileged[expert]

    def victims(self) -> Iterator[int]:
        """Walk the others from the fewest uses to the most, then the privileged from the one used longest ago."""
        yield from self._others
        yield from self._privileged
