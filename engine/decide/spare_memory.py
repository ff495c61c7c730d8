"""Spare memory of GPUs that share experts: what another GPU has evicted lies there until that fetches it back."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ..policies.placement import Owners
from .dispatch import Visit
from .memory_manager import MemoryManager


@dataclass(frozen=True, slots=True)
class Store:
    """Spare room for an evicted expert: on which GPU, its number there, and what lay there before (-1: nothing)."""

    expert: int
    gpu: int
    number: int
    former: int


class SpareMemory:
    """The GPUs' spare memory: experts that another GPU has evicted, until that GPU fetches them back.

    A victim cache: Jouppi, "Improving direct-mapped cache performance by the addition of a small fully-associative
    cache and prefetch buffers" (ISCA 1990). What lies there longest makes room.
    """

    def __init__(self, owners: Owners, room_for: int, managers: Sequence[MemoryManager]) -> None:
        """Keep experts in the memory of GPUs with these managers, each with room for so many of them."""
        self._owners = [gpus for layer in owners for gpus in layer]
        self._expert_of = [{copy: expert for expert, copy in manager.assigned.items()} for manager in managers]
        # By GPU: what is stored, oldest first (expert -> number), and free rooms (what lay there; -1: nothing).
        self._stored: list[dict[int, int]] = [{} for _ in managers]
        self._free: list[deque[int]] = [deque([-1] * room_for) for _ in managers]
        self._where: dict[int, int] = {}
        self._count = 0

    def moves(self, gpu: int, visit: Visit) -> tuple[dict[int, tuple[int, int]], dict[int, Store]]:
        """Returns the visit's copies that come out of spare memory, and where its evicted experts are stored.

        An expert is stored before the one that takes its room is fetched, so that neither waits for the other.
        """
        fetched: dict[int, tuple[int, int]] = {}
        stored: dict[int, Store] = {}
        expert_of = self._expert_of[gpu]
        for admission in visit.admissions():
            expert_of[admission.copy] = admission.expert
            for copy in admission.former:
                store = self._store(expert_of.pop(copy), admission.expert)
                if store is not None:
                    stored[copy] = store
            other = self._where.pop(admission.expert, None)
            if other is not None:
                number = self._stored[other].pop(admission.expert)
                self._free[other].append(number)
                fetched[admission.copy] = (other, number)
        return fetched, stored

    def _store(self, expert: int, keep: int) -> Store | None:
        """Find room for an expert on a GPU that does not own it, the freest first; `keep` must stay where it is."""
        others = [gpu for gpu in range(len(self._free)) if gpu not in self._owners[expert]]
        if expert in self._where or not others:
            return None
        other = max(others, key=lambda gpu: len(self._free[gpu]))
        if not self._free[other]:
            oldest = {gpu: next((old for old in self._stored[gpu] if old != keep), None) for gpu in others}
            ages = {gpu: self._stored[gpu][old] for gpu, old in oldest.items() if old is not None}
            if not ages:
                return None
            other = min(ages, key=ages.__getitem__)
            leaver = oldest[other]
            assert leaver is not None
            del self._where[leaver]
            self._free[other].append(self._stored[other].pop(leaver))
        former = self._free[other].popleft()
        number = self._stored[other][expert] = self._count
        self._count += 1
        self._where[expert] = other
        return Store(expert, other, number, former)
