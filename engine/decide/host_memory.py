"""Host memory as a cache under the GPU's, above a drive that holds every expert.

`HostMemory` decides, without a clock, what each copy to the GPU finds there, in the order in which the copies are
ordered; so the replay and the engines count the same. `HostRooms` names its rooms by register.

Host memory keeps what it has handed to the GPU (inclusive): experts are read-only, so nobody writes one back, and to
keep only what the GPU lacks would cost a copy back over the link for each expert that leaves the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .dispatch import Visit
from .memory_manager import Admission, MemoryManager
from .registers import Registers


class HostMemory:
    """Which experts lie in host memory, decided by `manager`, whose copies are reads from the drive.

    Every copy to the GPU uses its expert here, which is read first where it is absent; a prefetch renews nothing, as
    on the GPU.
    """

    def __init__(self, manager: MemoryManager, expert_bytes: Sequence[int]) -> None:
        self.manager = manager
        self._expert_bytes = expert_bytes
        self.hits = self.misses = 0
        self.read_bytes = 0
        #: Of each copy to the GPU that the last visit decided: the read that brings, or brought, its bytes; and, where
        #: that read has to be made, the room it is given.
        self.decided: dict[int, tuple[int, Admission | None]] = {}
        #: Reads that the last visit orders for nobody yet: prefetches into host memory.
        self.staged: list[Admission] = []

    @property
    def staged_reads(self) -> int:
        """How many reads were ordered for no copy."""
        return len(self.manager.copy_expert) - self.misses

    def through(self, visits: Iterator[Visit]) -> Iterator[Visit]:
        """Pass visits on, each with its copies decided."""
        for visit in visits:
            self.decide(visit)
            yield visit

    def decide(self, visit: Visit) -> None:
        """Look up what a visit copies to the GPU, in the order of the copies."""
        accesses, manager = visit.accesses, self.manager
        self.decided.clear()
        manager.begin(visit.number, visit.layer, accesses.recency, accesses.weights)
        demanded = [admission for wave in visit.waves for admission in wave.admitted]
        weights = dict(zip(accesses.recency, accesses.weights, strict=True)) if demanded else {}
        for admission in demanded:
            self._look_up(admission.expert, admission.copy, weights[admission.expert])
        for admission, _ in visit.prefetches:
            self._look_up(admission.expert, admission.copy, None)
        self.staged = [read for expert in visit.staged if (read := self._admit(expert, None)) is not None]

    def _look_up(self, expert: int, copy: int, weight: float | None) -> None:
        admission = self._admit(expert, weight)
        if admission is None:
            self.hits += 1
            self.decided[copy] = self.manager.assigned[expert], None
        else:
            self.misses += 1
            self.decided[copy] = admission.copy, admission

    def _admit(self, expert: int, weight: float | None) -> Admission | None:
        admission = self.manager.look_up(expert, weight)
        if admission is not None:
            self.read_bytes += self._expert_bytes[expert // self.manager.experts]
        return admission


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

    To be asked of the copies of each visit in order, before the next visit is decided.
    """

    def __init__(self, memory: HostMemory, registers: Registers, requests: Sequence[int]) -> None:
        self._memory, self._registers, self.requests = memory, registers, requests
        self._of: dict[int, tuple[int, int]] = {}

    def bring(self, copy: int) -> Brought:
        """Returns where the expert of a copy to the GPU lies."""
        read, admission = self._memory.decided[copy]
        if admission is None:
            return Brought(read, *self._of[read])
        return self._read(admission)

    def staged(self) -> Iterator[tuple[int, Brought]]:
        """Yields what the visit reads for no copy: the expert, and where it will lie."""
        for admission in self._memory.staged:
            yield admission.expert, self._read(admission)

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
        requests = self.requests[admission.expert // self._memory.manager.experts]
        return Brought(admission.copy, filled, leaving, requests, tuple(freed))
