"""Registers: what commands name to wait for (see `commands`), as numbers that are used again."""

from __future__ import annotations


class Registers:
    """The registers of a run: a few that every GPU has, then one for each room, by copy.

    Each program takes its `own`, for a register may be used again only behind its last use in the same program.
    """

    def __init__(self, fixed: int) -> None:
        """Keep the first `fixed` for other things than rooms."""
        self._count = [fixed]
        self._free: list[int] = []

    @property
    def count(self) -> int:
        """How many registers the run has come to need."""
        return self._count[0]

    def own(self) -> Registers:
        """Returns those of one more program: numbers that no other takes."""
        registers = Registers(0)
        registers._count = self._count
        return registers

    def take(self) -> int:
        """Returns one that stands for nothing that anybody will ask for."""
        if self._free:
            return self._free.pop()
        self._count[0] += 1
        return self._count[0] - 1

    def take_fresh(self, count: int) -> range:
        """Returns so many that nobody has had before."""
        first = self._count[0]
        self._count[0] += count
        return range(first, first + count)

    def give(self, register: int) -> None:
        """Let it be taken again."""
        self._free.append(register)
