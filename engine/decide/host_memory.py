"""Host memory as a cache under the GPU's, above a drive that holds every expert.

`HostMemory` decides, without a clock, what each copy to a GPU finds there, and what each expert does that the CPU
computes, in the order in which these are ordered; so the replay and the engines count the same. All GPUs of a run share
it. `HostRooms` names its rooms by register.

Inclusive, host memory keeps what it has handed to the GPU: experts are read-only, so nobody writes one back.
Exclusive, it keeps what the GPU lacks: an expert that is copied to the GPU leaves it, and one that the GPU evicts for
another comes back, which is a copy over the link. It is then the victim cache of Jouppi, "Improving direct-mapped cache
performance by the addition of a small fully-associative cache and prefetch buffers" (ISCA 1990), and the copy back is
the DEMOTE of Wong & Wilkes, "My cache or yours? Making storage more exclusive" (USENIX ATC 2002). Some room is kept
free for what passes through, lest a read or a copy back wait for the room that the copy just before it leaves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy.typing as npt

from ..policies.miss import BY_CPU
from .dispatch import HostReads, Visit
from .memory_manager import DEMOTED, Admission, MemoryManager
from .registers import Registers


class HostMemory:
    """Which experts lie in host memory, decided by `manager`, whose copies are reads from the drive.

    Every copy to a GPU uses its expert here, and so does an expert that the CPU computes; it is read first where it is
    absent. A prefetch renews nothing, as on the GPU. `expert_bytes` (layers,) are the model's, as are the experts'
    numbers here. `exclusive`: it keeps what the GPU, which is one, lacks, and `free_bytes` free.
    """

    def __init__(
        self, manager: MemoryManager, expert_bytes: Sequence[int], *, exclusive: bool = False, free_bytes: int = 0
    ) -> None:
        self.manager, self.exclusive, self.free_bytes = manager, exclusive, free_bytes
        self._expert_bytes = expert_bytes
        self.hits = self.misses = 0
        self.read_bytes = 0

    @property
    def demoted(self) -> npt.NDArray[Any]:
        """The experts that came back from the GPU, in order."""
        found: npt.NDArray[Any] = self.manager.copy_expert[self.manager.copy_reason == DEMOTED]
        return found

    @property
    def demoted_bytes(self) -> int:
        """How many bytes came back from the GPU."""
        return sum(self._expert_bytes[expert // self.manager.experts] for expert in self.demoted.tolist())

    @property
    def staged_reads(self) -> int:
        """How many reads were ordered for no copy."""
        return len(self.manager.copy_expert) - self.misses - len(self.demoted)

    def through(self, visits: Iterator[Visit], first_layer: int = 0) -> Iterator[Visit]:
        """Pass visits of layers from `first_layer` of the model on, each with its copies decided."""
        for visit in visits:
            self.decide([visit], first_layer)
            yield visit

    def decide(
        self, visits: Sequence[Visit], first_layer: int = 0, lent: Sequence[Collection[int]] | None = None
    ) -> None:
        """Look up what GPUs that are at one layer visit together copy and what the CPU computes for them.

        GPU by GPU; of each, what the CPU computes, then what is demanded, then what is prefetched, then what is staged.
        Exclusive, what makes room for a copy comes back once the expert that is copied is found or read, and that
        leaves last: so neither waits for the room that the other one leaves.
        `lent` are each GPU's copies that come from another's memory instead.
        """
        manager, layers = self.manager, len(self._expert_bytes)
        first = 0 if manager.shared else first_layer * manager.experts
        number = visits[0].step * layers + first_layer + visits[0].layer
        weights = _weights(visits, first)
        manager.begin(number, first_layer + visits[0].layer, list(weights), list(weights.values()))
        for gpu, visit in enumerate(visits):
            visit.reads = self._reads(visit, first, weights, () if lent is None else lent[gpu])

    def _reads(self, visit: Visit, first: int, weights: Mapping[int, float], lent: Collection[int]) -> HostReads:
        """Returns where the experts of one GPU's visit, the first of which is `first` of the model, come from."""
        found = HostReads()
        for access in visit.resolution.accesses:
            if access.way in BY_CPU:
                found.on_cpu[access.expert] = self._look_up(access.expert + first, weights[access.expert + first])
        for wave in visit.waves:
            for admission in wave.admitted:
                if admission.copy not in lent:
                    self._hand_over(admission, first, weights[admission.expert + first], found)
        for admission, _ in visit.prefetches:
            if admission.copy not in lent:
                self._hand_over(admission, first, None, found)
        for expert in visit.staged:
            staged = self._admit(expert + first, None)
            if staged is not None:
                found.staged.append((expert, staged))
        return found

    def _hand_over(self, admission: Admission, first: int, weight: float | None, found: HostReads) -> None:
        """Say where the expert of a copy to the GPU comes from, and what comes back for it."""
        expert = admission.expert + first
        found.copies[admission.copy] = self._look_up(expert, weight)
        if not self.exclusive:
            return
        for victim, copy in admission.evicted:
            room = self.manager.take_in(victim + first, expert)
            if room is not None:
                found.demoted.setdefault(admission.copy, []).append((victim, copy, room))
        self.manager.release(expert, self.free_bytes)

    def _look_up(self, expert: int, weight: float | None) -> tuple[int, Admission | None]:
        """Use an expert: the read that brings, or brought, its bytes, and the room that it is given if it is made."""
        admission = self._admit(expert, weight)
        if admission is None:
            self.hits += 1
            return self.manager.assigned[expert], None
        self.misses += 1
        return admission.copy, admission

    def _admit(self, expert: int, weight: float | None) -> Admission | None:
        admission = self.manager.look_up(expert, weight)
        if admission is not None:
            self.read_bytes += self._expert_bytes[expert // self.manager.experts]
        return admission


def _weights(visits: Sequence[Visit], first: int) -> dict[int, float]:
    """Returns the gate weight of each expert that visits look up, in the order of its last appearance."""
    weights: dict[int, float] = {}
    for visit in visits:
        for expert, weight in zip(visit.asked.recency, visit.asked.weights, strict=True):
            weights[first + expert] = weights.pop(first + expert, 0.0) + weight
    return weights


class Freed(NamedTuple):
    """A room of host memory that a read takes: the registers of its bytes and of the copies out of it.

    `left`: some of the room is not taken.
    """

    filled: int
    leaving: int
    left: bool


class Brought(NamedTuple):
    """Where an expert lies in host memory: the registers of its bytes and of the copies out of it.

    `requests` is how many the read takes that brings it, into the rooms `freed`; 0 if it is there, or on its way.
    """

    read: int
    filled: int
    leaving: int
    requests: int = 0
    freed: tuple[Freed, ...] = ()


class HostRooms:
    """The rooms of host memory, by read, as registers; `requests` (layers,) is how many a read of an expert takes.

    `back_ns` (layers,) is what the copy of an expert back from the GPU takes, where one comes back. To be asked of all
    that visits look up, in the order in which it was decided.
    """

    def __init__(
        self, experts: int, registers: Registers, requests: Sequence[int], back_ns: Sequence[int] = ()
    ) -> None:
        """Name the rooms of experts, so many of each layer."""
        self._experts, self._registers, self.requests, self.back_ns = experts, registers, requests, back_ns
        self._of: dict[int, tuple[int, int]] = {}

    def bring(self, read: int, admission: Admission | None) -> Brought:
        """Returns where an expert lies that a read brought, or brings now into the room of its admission."""
        return Brought(read, *self._of[read]) if admission is None else self._give(admission, self.requests)

    def take_in(self, admission: Admission) -> Brought:
        """Returns where an expert lies that comes back from the GPU; for `requests`, the ns that its copy takes."""
        return self._give(admission, self.back_ns)

    def _give(self, admission: Admission, takes: Sequence[int]) -> Brought:
        """Returns the room of a read, or of what comes back, now that it is made."""
        freed = []
        for read in admission.former:
            filled, leaving = self._of[read]
            left = read == admission.partly
            freed.append(Freed(filled, leaving, left))
            if not left:
                del self._of[read]
                self._registers.give(filled)
                self._registers.give(leaving)
        filled, leaving = self._of[admission.copy] = self._registers.take(), self._registers.take()
        return Brought(admission.copy, filled, leaving, takes[admission.expert // self._experts], tuple(freed))
