"""Eviction policies: each is an ordering of the experts in memory, first to go first.

The memory manager walks that order and evicts the first expert it may, so a
policy never learns about pins, sizes or time. To add one: write a class with
these four methods, name it in EVICTION, describe it in tests/test_eviction.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Protocol


class Eviction(Protocol):
    """What the memory manager asks of an eviction policy; experts are ints, `layer * experts + index`."""

    def admit(self, expert: int, demanded: bool) -> None:
        """Take note of an expert that was given room, on demand (which counts as its use) or by a prefetch."""

    def use(self, expert: int, weight: float) -> None:
        """Take note of the use of an expert in memory, with the gate weight of its tokens."""

    def evict(self, expert: int) -> None:
        """Forget an expert that lost its room."""

    def victims(self) -> Iterator[int]:
        """Walk the experts in memory, first to go first."""


class Lru:
    """Evict the expert used longest ago."""

    def __init__(self) -> None:
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


EVICTION: dict[str, Callable[[], Eviction]] = {"lru": Lru}
