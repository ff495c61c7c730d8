"""Host memory as a cache under the GPU's, above a drive that holds every expert.

`HostMemory` decides, without a clock, what each copy to a GPU finds there, and what each expert does that the CPU
computes, in the order in which these are ordered; so the replay and the engines count the same. All GPUs of a run share
it. `HostRooms` names its rooms by register.

Host memory keeps what it has handed to the GPU (inclusive): experts are read-only, so nobody writes one back, and to
keep only what the GPU lacks would cost a copy back over the link for each expert that leaves the GPU.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from ..policies.miss import BY_CPU
from .dispatch import HostReads, Visit
from .memory_manager import Admission, MemoryManager
from .registers import Registers


class HostMemory:
    """Which experts lie in host memory, decided by `manager`, whose copies are reads from the drive.

    Every copy to a GPU uses its expert here, and so does an expert that the CPU computes; it is read first where it is
    absent. A prefetch renews nothing, as on the GPU. `expert_bytes` (layers,) are the model's, as are the experts'
    numbers here.
    """

    def __init__(self, manager: MemoryManager, expert_bytes: Sequence[int]) -> None:
        self.manager = manager
        self._expert_bytes = expert_bytes
        self.hits = self.misses = 0
        self.read_bytes = 0

    @property
    def staged_reads(self) -> int:
        """How many reads were ordered for no copy."""
        return len(self.manager.copy_expert) - self.misses

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
                    expert = admission.expert + first
                    found.copies[admission.copy] = self._look_up(expert, weights[expert])
        for admission, _ in visit.prefetches:
            if admission.copy not in lent:
                found.copies[admission.copy] = self._look_up(admission.expert + first, None)
        for expert in visit.staged:
            staged = self._admit(expert + first, None)
            if staged is not None:
                found.staged.append((expert, staged))
        return found

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

    To be asked of all that visits look up, in the order in which it was decided.
    """

    def __init__(self, experts: int, registers: Registers, requests: Sequence[int]) -> None:
        """Name the rooms of experts, so many of each layer."""
        self._experts, self._registers, self.requests = experts, registers, requests
        self._of: dict[int, tuple[int, int]] = {}

    def bring(self, read: int, admission: Admission | None) -> Brought:
        """Returns where an expert lies that a read brought, or brings now into the room of its admission."""
        return Brought(read, *self._of[read]) if admission is None else self._read(admission)

    def _read(self, admission: Admission) -> Brought:
        """Returns the room of a read, now that it is made."""
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
        requests = self.requests[admission.expert // self._experts]
        return Brought(admission.copy, filled, leaving, requests, tuple(freed))
