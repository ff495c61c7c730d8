"""Eviction policies: each is an ordering of the experts in memory, first to go first.

The memory manager walks that order and evicts the first expert it may, so a
policy never learns about pins, sizes or time. To add one: write a class with
these four methods, name it in EVICTION, describe it in tests/test_eviction.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ...workloads.batches import Step
from ...workloads.predictors import Guesses
from ...workloads.trace import RoutingTrace


@dataclass(frozen=True)
class Setting:
    """What a policy may know before the run; most need none of it.

    `capacity` is how many experts of the largest size its pool holds, `layers` the layers that the pool serves,
    `experts` the experts of one layer. `trace`, `steps` and `single` (every (token, expert) pair is a visit of its
    own) say what will be asked of it, for bounds and for what is learned beforehand; `guesses` are the predictor's.
    """

    capacity: int = 0
    layers: tuple[int, ...] = ()
    experts: int = 0
    seed: int = 0
    trace: RoutingTrace | None = None
    steps: Sequence[Step] = ()
    single: bool = False
    guesses: Guesses | None = None


#: For policies that need to know nothing.
NO_SETTING = Setting()


class Eviction:
    """What the memory manager asks of an eviction policy; experts are ints, `layer * experts + index`.

    The first four are every policy's; `begin` and `miss` are for those that keep more than the experts in memory.
    """

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
        """Walk the experts in memory, first to go first; may clear marks as it walks."""
        raise NotImplementedError

    def begin(self, visit: int, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """Take note of a visit before its look-ups: its experts in order of last appearance, with gate weights."""

    def miss(self, expert: int, demanded: bool) -> None:
        """Take note, before any victim is asked for, of an absent expert that wants room."""


class Lru(Eviction):
    """Evict the expert used longest ago."""

    def __init__(self, setting: Setting = NO_SETTING) -> None:
        super().__init__(setting)
        self._order: OrderedDict[int, None] = OrderedDict()

    def admit(self, expert: int, demanded: bool) -> None:
        """Put it last."""
        self._order[expert] = None

    def use(self, expert: int, weight: float) -> None:
        """Put it last again."""
        self._order.move_to_end(expert)

    def evict(self, expert: int) -> None:
        """Take it out of the order."""
        del self._order[expert]

    def victims(self) -> Iterator[int]:
        """Walk from the least to the most recently used."""
        return iter(self._order)


EVICTION: dict[str, Callable[[Setting], Eviction]] = {"lru": Lru}
