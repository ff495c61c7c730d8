"""Eviction policies: each is an ordering of the experts in memory, first to go first.

The memory manager walks that order and evicts the first expert it may, so a policy never learns about pins, sizes or
time. Here are those that know only what has been used; eviction_informed.py has those that know more. To add one:
write a class with the methods of `Eviction`, name it in EVICTION; docs/add-a-policy.md shows it.

A demand miss is admitted and not used: policies that count uses count that admission as one, and never a prefetch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from .eviction_base import NO_SETTING, Chain, Ranking
from .eviction_base import Eviction as Eviction
from .eviction_base import Setting as Setting
from .eviction_informed import Belady


class Fifo(Eviction):
    """Evict the expert that came first."""

    def __init__(self, setting: Setting = NO_SETTING) -> None:
        super().__init__(setting)
        self._order: OrderedDict[int, None] = OrderedDict()

    def admit(self, expert: int, demanded: bool) -> None:
        """Put it last."""
        self._order[expert] = None

    def use(self, expert: int, weight: float) -> None:
        """Leave it where it is."""

    def evict(self, expert: int) -> None:
        """Take it out of the order."""
        del self._order[expert]

    def victims(self) -> Iterator[int]:
        """Walk in order."""
        return iter(self._order)


class Lru(Fifo):
    """Evict the expert used longest ago (least recently used); a prefetch comes as the latest."""

    def use(self, expert: int, weight: float) -> None:
        """Put it last again."""
        self._order.move_to_end(expert)


class Lfu(Eviction):
    """Evict the expert used least often so far, ties to the one used longest ago; counts outlive an eviction.

    "Perfect LFU" in Breslau et al., "Web caching and Zipf-like distributions" (INFOCOM 1999).
    """

    def __init__(self, setting: Setting = NO_SETTING) -> None:
        super().__init__(setting)
        self._uses: dict[int, int] = {}
        self._order = Ranking()

    def admit(self, expert: int, demanded: bool) -> None:
        """Count a demand as a use."""
        uses = self._uses[expert] = self._uses.get(expert, 0) + demanded
        self._order.put(expert, uses)

    def use(self, expert: int, weight: float) -> None:
        """Count it."""
        uses = self._uses[expert] = self._uses[expert] + 1
        self._order.put(expert, uses)

    def evict(self, expert: int) -> None:
        """Take it out of the order, not of the counts."""
        self._order.remove(expert)

    def victims(self) -> Iterator[int]:
        """Walk from the fewest uses to the most."""
        return iter(self._order)


class LfuIncache(Lfu):
    """Evict the expert used least often since it came, ties to the one used longest ago.

    "In-cache LFU" in Breslau et al. (INFOCOM 1999).
    """

    def evict(self, expert: int) -> None:
        """Forget its count too."""
        super().evict(expert)
        del self._uses[expert]


class Clock(Eviction):
    """Evict in order of arrival, but let an expert used since the hand last passed stay for another round.

    Corbató, "A paging experiment with the Multics system" (1968), with one bit.
    """

    def __init__(self, setting: Setting = NO_SETTING) -> None:
        super().__init__(setting)
        self._ring = Chain()
        self._used: set[int] = set()

    def admit(self, expert: int, demanded: bool) -> None:
        """Put it behind the hand, unmarked."""
        self._ring.append(expert)

    def use(self, expert: int, weight: float) -> None:
        """Mark it."""
        self._used.add(expert)

    def evict(self, expert: int) -> None:
        """Take it out of the ring."""
        self._ring.remove(expert)
        self._used.discard(expert)

    def victims(self) -> Iterator[int]:
        """Walk the ring from the hand; who is marked loses the mark and is put behind the hand."""
        ring, used = self._ring, self._used
        expert = ring.after(ring.END)
        while expert != ring.END:
            following = ring.after(expert)
            if expert in used:
                used.remove(expert)
                ring.remove(expert)
                ring.append(expert)
                if following == ring.END:
                    following = expert
            else:
                yield expert
            expert = following


class Sieve(Clock):
    """Evict the next expert that the hand finds unused since it last passed; who stays keeps its place in the queue.

    Zhang et al., "SIEVE is simpler than LRU" (NSDI 2024). The hand walks from the oldest to the newest.
    """

    def __init__(self, setting: Setting = NO_SETTING) -> None:
        super().__init__(setting)
        self._hand = Chain.END  # whom it looks at next; END: the oldest

    def evict(self, expert: int) -> None:
        """Take it out of the queue; the hand moves on."""
        if expert == self._hand:
            self._hand = self._ring.after(expert)
        super().evict(expert)

    def victims(self) -> Iterator[int]:
        """Walk from the hand to the newest, then from the oldest; who is marked loses the mark and comes last."""
        ring, used = self._ring, self._used
        spared = []
        expert = start = ring.after(ring.END) if self._hand == ring.END else self._hand
        for _ in range(len(ring)):
            if expert in used:
                used.remove(expert)
                spared.append(expert)
            else:
                self._hand = expert
                yield expert
            following = ring.after(expert)
            expert = ring.after(ring.END) if following == ring.END else following
        for expert in spared:
            self._hand = expert
            yield expert
        self._hand = start


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
        """Return the next of the main queue that has no uses left; who has some pays one to go to its end."""
        main, uses = self._main, self._uses
        while uses[expert := main.after(passed)]:
            uses[expert] = min(uses[expert], self.MOST_MARKS) - 1
            main.remove(expert)
            main.append(expert)
        return expert

    def _unproven(self, passed: int) -> int:
        """Return the next of the small queue that has not earned its stay (END: none); who has goes to the main one."""
        small, main, uses = self._small, self._main, self._uses
        while (expert := small.after(passed)) != small.END and uses[expert] >= self.USES_TO_STAY:
            uses[expert] = 0
            small.remove(expert)
            main.append(expert)
        return expert


#: All of them, by name.
EVICTION: dict[str, Callable[[Setting], Eviction]] = {
    "fifo": Fifo,
    "lru": Lru,
    "lfu": Lfu,
    "lfu-incache": LfuIncache,
    "clock": Clock,
    "sieve": Sieve,
    "s3fifo": S3Fifo,
    "belady": Belady,
}
