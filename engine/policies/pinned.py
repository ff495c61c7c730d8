"""Pinned experts beside a cache: some stay for the whole run, the rest of the room is any eviction policy's.

As engines do that place layers or hot experts by hand and cache the others (thecodacus/llama.cpp PR 5; llama.cpp's
`--n-cpu-moe` with a cache of experts behind it).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

from .eviction_base import NO_SETTING, Eviction, Setting


class Pinned(Eviction):
    """An eviction policy that never learns of the pinned experts: they are in nobody's order, so nobody evicts them."""

    def __init__(self, policy: Callable[[Setting], Eviction], pinned: Collection[int], setting: Setting = NO_SETTING):
        super().__init__(setting)
        here = sum(expert // max(1, setting.experts) in setting.layers for expert in pinned)
        self._rest = policy(replace(setting, capacity=max(1, setting.capacity - here)))
        self._pinned = pinned
        self.may_spare = self._rest.may_spare

    def admit(self, expert: int, demanded: bool) -> None:
        """Let the policy know, unless it is pinned."""
        if expert not in self._pinned:
            self._rest.admit(expert, demanded)

    def use(self, expert: int, weight: float) -> None:
        """Let the policy know, unless it is pinned."""
        if expert not in self._pinned:
            self._rest.use(expert, weight)

    def evict(self, expert: int) -> None:
        """Let the policy know: it named this expert."""
        self._rest.evict(expert)

    def victims(self) -> Iterator[int]:
        """Walk as the policy does."""
        return self._rest.victims()

    def begin(self, visit: int, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """Let the policy know of the visit, pinned experts with it."""
        self._rest.begin(visit, layer, experts, weights)

    def miss(self, expert: int, demanded: bool) -> None:
        """Let the policy know: who misses is not pinned."""
        self._rest.miss(expert, demanded)

    def spent(self, expert: int) -> bool:
        """Whether the policy lets it go, which is not asked about a pinned one."""
        return expert not in self._pinned and self._rest.spent(expert)
