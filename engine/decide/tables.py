"""Visits as tables of integers: what Python's memory manager decided, in the form that `visit_commands` takes.

Rooms get registers here: a copy has one from its admission until the last of its room is given to another. They are
used again, so there are never more than experts have room, and some.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..policies.miss import BY_CPU, Resolved
from .dispatch import HostReads, Visit
from .host_memory import Brought, HostRooms
from .memory_manager import Admission
from .registers import Registers
from .visit_commands import (
    COPIED_COLUMNS,
    DEMOTED,
    PREFETCHED,
    RESOLVED_COLUMNS,
    SERVED_COLUMNS,
    STAGED,
    TAKEN_COLUMNS,
)

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Tables:
    """One visit: its header, and the rows of what it serves, copies, takes and resolves (see `visit_commands`)."""

    visit: Array
    served: Array
    copies: Array
    taken: Array
    resolved: Array
    requests: int  # to the drive


class Room(NamedTuple):
    """The registers of a room: of its last reader, and, where GPUs lend each other experts, of its bytes and copies."""

    register: int
    landed: int = -1
    lent: int = -1


class Rooms:
    """The rooms of one GPU, by copy; `preloaded` are the copies that nobody has to order."""

    def __init__(self, registers: Registers, preloaded: Iterable[int] = (), *, lends: bool = False) -> None:
        self._registers, self._lends = registers, lends
        copies = list(preloaded)
        taken = iter(registers.take_fresh((3 if lends else 1) * len(copies)))
        rooms = map(Room, taken, taken, taken) if lends else map(Room, taken)
        self._of: dict[int, Room] = dict(zip(copies, rooms, strict=True))

    def of(self, copy: int) -> Room:
        """Returns the room of a copy."""
        return self._of[copy]

    def registers_of(self, copies: Iterable[int]) -> list[int]:
        """Returns the register of each copy's room."""
        return [self._of[copy].register for copy in copies]

    def admit(self, copy: int) -> Room:
        """Returns the room of a new copy."""
        take = self._registers.take
        room = self._of[copy] = Room(take(), take(), take()) if self._lends else Room(take())
        return room

    def leave(self, copy: int) -> None:
        """Let the registers of a copy's room be taken again."""
        for register in self._of.pop(copy):
            if register >= 0:
                self._registers.give(register)


@dataclass(frozen=True)
class Loans:
    """What one GPU's copies of a visit have to do with other GPUs' memory.

    `sources`: by copy that comes from another GPU, which one, and the registers of the bytes there and of who has read
    them (see `visit_commands`); `stores`: by evicted copy that another GPU keeps, which one, the expert, the register
    of where it lies, and of what lay there before (-1: nothing).
    """

    sources: Mapping[int, tuple[int, int, int]] = field(default_factory=dict)
    stores: Mapping[int, tuple[int, int, int, int]] = field(default_factory=dict)


_NO_LOANS = Loans()
_HERE, _STAYS = (-1, -1, -1), (-1, -1, -1, -1)
_ALL_IN_HOST = (-1, -1, -1, 0, 0, 0)


class _Copies:
    """The table of a visit's copies, and that of the rooms that they take, as they are filled."""

    def __init__(self, rooms: Rooms, loans: Loans, host: HostRooms | None, reads: HostReads | None) -> None:
        self._rooms, self._loans, self._host, self._reads = rooms, loans, host, reads
        self.copies: list[tuple[int, ...]] = []
        self.taken: list[tuple[int, ...]] = []
        self.requests = 0

    def add(self, admission: Admission, wave: int, target: int) -> int:
        """Add a copy, and return the register of its room."""
        first, rooms, loans = len(self.taken), self._rooms, self._loans
        demoted = () if self._reads is None else self._reads.demoted.get(admission.copy, ())
        back = [(expert, rooms.of(copy).register, taken_in) for expert, copy, taken_in in demoted]
        for copy in admission.former:
            room = rooms.of(copy)
            left = int(copy == admission.partly)
            self.taken.append((room.register, left, room.landed, room.lent, *loans.stores.get(copy, _STAYS)))
            if not left:
                rooms.leave(copy)
        room = rooms.admit(admission.copy)
        source = loans.sources.get(admission.copy, _HERE)
        last = len(self.taken)
        lent = admission.copy in loans.sources
        tier = _ALL_IN_HOST if lent or self._reads is None else self._tier(*self._reads.copies[admission.copy])
        self.copies.append((
            admission.expert, admission.copy, room.register, wave, target, first, last, *source, room.landed, *tier,
        ))  # fmt: skip
        for expert, register, taken_in in back:
            self._take_in(expert, register, taken_in)
        return room.register

    def stage(self) -> None:
        """Add what is read into host memory for no copy."""
        for expert, admission in self._reads.staged if self._reads is not None else ():
            first = len(self.taken)
            tier = self._tier(admission.copy, admission)
            self.copies.append((expert, -1, -1, STAGED, -1, first, first, *_HERE, -1, *tier))

    def resolve(self, access: Resolved) -> tuple[int, ...]:
        """Returns the row of an access that needs no copy, or of some of its tokens."""
        on_cpu = self._reads is not None and access.way in BY_CPU
        tier = self._tier(*self._reads.on_cpu[access.expert]) if on_cpu and self._reads else _ALL_IN_HOST
        return access.expert, access.way, access.tokens, *tier

    def _take_in(self, expert: int, register: int, admission: Admission) -> None:
        """Add what comes back from the GPU, out of the room of a register, behind the copy that it makes room for."""
        assert self._host is not None
        first = len(self.taken)
        tier = self._columns(self._host.take_in(admission))
        self.copies.append((expert, -1, register, DEMOTED, -1, first, first, *_HERE, -1, *tier))

    def _tier(self, read: int, admission: Admission | None) -> tuple[int, ...]:
        """Returns the columns that say where an expert lies in host memory, and by which read."""
        assert self._host is not None
        brought = self._host.bring(read, admission)
        self.requests += brought.requests
        return self._columns(brought)

    def _columns(self, brought: Brought) -> tuple[int, ...]:
        first = len(self.taken)
        self.taken += [(room.filled, int(room.left), -1, room.leaving, *_STAYS) for room in brought.freed]
        return brought.filled, brought.leaving, brought.read, brought.requests, first, len(self.taken)


def visit_tables(
    visit: Visit, phase: int, rooms: Rooms, loans: Loans | None = None, host: HostRooms | None = None
) -> Tables:
    """Returns a visit in a step of a phase as tables; visits must come in the order in which they are dispatched.

    `host` are the rooms of host memory, where that does not hold every expert.
    """
    copies = _Copies(rooms, loans or _NO_LOANS, host, visit.reads)
    resolved = [copies.resolve(access) for access in visit.resolution.accesses]
    served_by: dict[int, tuple[int, int, int, int]] = {}
    for number, wave in enumerate(visit.waves):
        for expert, copy in wave.found.items():
            served_by[expert] = (copy, rooms.of(copy).register, number, 0)
        for admission in wave.admitted:
            served_by[admission.expert] = (admission.copy, copies.add(admission, number, visit.number), number, 1)
    for admission, target in visit.prefetches:
        copies.add(admission, PREFETCHED, target)
    copies.stage()
    experts = zip(visit.accesses.experts, visit.accesses.tokens, strict=True)
    return Tables(
        np.array([visit.number, visit.layer, len(visit.waves), visit.resolution.cpu_tokens, phase], dtype=np.int64),
        _table([(expert, tokens, *served_by[expert]) for expert, tokens in experts], SERVED_COLUMNS),
        _table(copies.copies, COPIED_COLUMNS),
        _table(copies.taken, TAKEN_COLUMNS),
        _table(resolved, RESOLVED_COLUMNS),
        copies.requests,
    )


def _table(rows: Sequence[tuple[int, ...]], columns: int) -> Array:
    return np.array(rows, dtype=np.int64).reshape(-1, columns)
