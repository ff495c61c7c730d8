"""Eviction policies: each is an ordering of the experts in memory, first to go first.

The memory manager walks that order and evicts the first expert it may, so a policy never learns about pins, sizes or
time. Here are those that know only what has been used; eviction_informed.py has those that know more. To add one:
write a class with the methods of `Eviction`, name it in EVICTION; docs/add-a-policy.md shows it.

A demand miss is admitted and not used: policies that count uses count that admission as one, and never a prefetch.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain

from .eviction_base import NO_SETTING as NO_SETTING
from .eviction_base import Chain, Ranking, add_decayed
from .eviction_base import Eviction as Eviction
from .eviction_base import Setting as Setting
from .eviction_informed import ActivationAware, Belady, GateWeight, Heat, LeastStale, PayBack, Predictive, Static
from .eviction_queues import Arc, Lfru, S3Fifo, TwoQ


class Fifo(Eviction):
    """Evict the expert that came first (Belady, "A study of replacement algorithms", IBM Systems Journal, 1966)."""

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


class Preloaded(Eviction):
    """Keep what was there before it was demanded: experts that were demanded take turns in what is left, first come."""

    def __init__(self, setting: Setting = NO_SETTING) -> None:
        super().__init__(setting)
        self._demanded: OrderedDict[int, None] = OrderedDict()
        self._kept: OrderedDict[int, None] = OrderedDict()

    def admit(self, expert: int, demanded: bool) -> None:
        """Put it behind its like."""
        (self._demanded if demanded else self._kept)[expert] = None

    def use(self, expert: int, weight: float) -> None:
        """Do nothing."""

    def evict(self, expert: int) -> None:
        """Take it out."""
        del (self._demanded if expert in self._demanded else self._kept)[expert]

    def victims(self) -> Iterator[int]:
        """Walk through those that were demanded, then all others."""
        return chain(self._demanded, self._kept)


class Spent(Preloaded):
    """Keep what was there before it was demanded: experts that were demanded leave once their visit is over.

    With preloaded layers, as llama.cpp: what it copies for a large batch is used once, and nothing of it is kept.
    """

    def spent(self, expert: int) -> bool:
        """Whether it was demanded."""
        return expert in self._demanded


class Lru(Fifo):
    """Evict the expert used longest ago; a prefetch comes as the latest.

    Mattson, Gecsei, Slutz & Traiger, "Evaluation techniques for storage hierarchies" (IBM Systems Journal, 1970).
    """

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


class Random(Eviction):
    """Evict any expert, all equally likely (Belady, 1966).

    Drawn from the seed and the model's layers, so that the same run meets the same evictions and each pool its own.
    """

    def __init__(self, setting: Setting = NO_SETTING) -> None:
        super().__init__(setting)
        self._experts: list[int] = []
        self._place: dict[int, int] = {}
        layers = tuple(setting.first_layer + layer for layer in setting.layers)
        self._random = random.Random(f"{setting.seed} {layers}")

    def admit(self, expert: int, demanded: bool) -> None:
        """Add it."""
        self._place[expert] = len(self._experts)
        self._experts.append(expert)

    def use(self, expert: int, weight: float) -> None:
        """Do nothing."""

    def evict(self, expert: int) -> None:
        """Put the last one in its place."""
        place, last = self._place.pop(expert), self._experts.pop()
        if last != expert:
            self._experts[place] = last
            self._place[last] = place

    def victims(self) -> Iterator[int]:
        """Shuffle as far as it is walked (Fisher & Yates)."""
        experts, place = self._experts, self._place
        for first in range(len(experts)):
            drawn = self._random.randrange(first, len(experts))
            experts[first], experts[drawn] = experts[drawn], experts[first]
            place[experts[first]], place[experts[drawn]] = first, drawn
            yield experts[first]


class Lrfu(Eviction):
    """Evict the expert with the least combined recency and frequency: every use counts (1/2) ** (lambda * its age).

    Lee et al., "LRFU: a spectrum of policies that subsumes the least recently used and least frequently used policies"
    (IEEE Transactions on Computers, 2001); age in uses of the pool, and what is evicted starts anew. Lambda is
    1 / capacity, between LFU (0) and LRU (1): a use counts half after as many others as the pool holds experts.
    """

    def __init__(self, setting: Setting = NO_SETTING) -> None:
        super().__init__(setting)
        self._lambda = 1.0 / max(1, setting.capacity)
        self._now = 0.0  # in half-lives
        self._value: dict[int, float] = {}
        self._order = Ranking()

    def admit(self, expert: int, demanded: bool) -> None:
        """Count a demand as a use; who was prefetched goes first until it is used."""
        self._value[expert] = float("-inf")
        if demanded:
            self.use(expert, 1.0)
        else:
            self._order.put(expert, self._value[expert])

    def use(self, expert: int, weight: float) -> None:
        """Count it."""
        self._now += self._lambda
        value = self._value[expert] = add_decayed(self._value[expert], self._now, 1.0)
        self._order.put(expert, value)

    def evict(self, expert: int) -> None:
        """Forget it."""
        self._order.remove(expert)
        del self._value[expert]

    def victims(self) -> Iterator[int]:
        """Walk from the least value to the greatest."""
        return iter(self._order)


#: All of them, by name.
EVICTION: dict[str, Callable[[Setting], Eviction]] = {
    "fifo": Fifo,
    "lru": Lru,
    "lfu": Lfu,
    "lfu-incache": LfuIncache,
    "lrfu": Lrfu,
    "lfru": Lfru,
    "clock": Clock,
    "sieve": Sieve,
    "s3fifo": S3Fifo,
    "arc": Arc,
    "2q": TwoQ,
    "random": Random,
    "least-stale": LeastStale,
    "static": Static,
    "preloaded": Preloaded,
    "spent": Spent,
    "activation-aware": ActivationAware,
    "gate-weight": GateWeight,
    "heat": Heat,
    "payback": PayBack,
    "predictive": Predictive,
    "belady": Belady,
}
