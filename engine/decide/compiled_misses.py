"""The misses of a cache alone (a shadow run): compiled decisions whose commands are not carried out."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...resources.timeline import DEMAND
from .commands import FIXED_REGISTERS, Command
from .compiled_decisions import Decisions
from .compiled_program import next_portion
from .compiled_rooms import entry
from .decision_layout import Part
from .decision_words import DECIDED, END, ROOM, STEPS, Tables
from .program import Gpu
from .registers import Registers
from .sources import Source
from .tables import Rooms
from .visit_commands import COPY, CPU, DECIDE, settings_array

# What compiled functions take (see `machine_code`).
Word = Any
Words = npt.NDArray[Any]

_OP, _KIND, _EXPERT, _EXTRA = map(Command._fields.index, ("op", "kind", "expert", "extra"))
#: How many misses are taken at once, before those of one more visit.
_AT_ONCE = 1 << 16


@entry
def next_misses(t: Tables, h: Word, total_experts: Word, keys: Words, room: Word) -> tuple[Word, Word]:
    """Decide until there are more than `room` keys, or something else is wanted; return why, and how many there are.

    A key is visit * total_experts + expert.
    """
    count, visit = 0, 0
    while count <= room:
        why = next_portion(t, h)
        if why != DECIDED:
            return why, count
        for at in range(1, t.rows[0, 0] + 1):
            row = t.rows[at]
            if row[_OP] == DECIDE:
                visit = row[_EXTRA]
            elif row[_OP] == CPU or (row[_OP] == COPY and row[_KIND] == DEMAND):
                keys[count] = visit * total_experts + row[_EXPERT]
                count += 1
    return np.int64(DECIDED), count


def missed(source: Source, total_experts: int) -> Words:
    """Returns what a GPU misses: visit * total_experts + expert, an integer for each miss, in order.

    `total_experts` are those of all its layers.
    """
    manager, registers = source.manager, Registers(FIXED_REGISTERS + 1)
    gpu = Gpu(settings_array(), Rooms(registers, manager.assigned.values()), registers)
    decisions = Decisions([Part(source, gpu, lambda resolved: None)], [[0]])
    (thread,) = decisions.threads
    found: list[Words] = []
    why = DECIDED
    while why != END:
        if why == STEPS:
            decisions.lay_out_steps()
        elif why == ROOM:
            decisions.make_room()
        keys = np.zeros(_AT_ONCE + len(decisions.tables.rows), dtype=np.int64)  # a visit's may be all rows
        why, count = next_misses(decisions.at, thread, total_experts, keys, _AT_ONCE)
        found.append(keys[:count].copy())
    decisions.finish()
    return np.concatenate(found)
