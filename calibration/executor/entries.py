"""Entries: what the host calls for in an execution, in order, and the streams and threads that carry it out.

An entry is a kernel group, a copy, a read-back, a read from a drive or an expert on the CPU. It names what it waits for
by the numbers of other entries. What one stream, or the threads of the CPU, order by themselves needs no wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...engine.decide.dispatch import Visit
from ...engine.decide.memory_manager import MemoryManager
from ...errors import InputError
from ...resources.timeline import DEMAND, PREFETCH

#: The kinds of entries that copy an expert from the host.
COPIES = (DEMAND, PREFETCH)

#: How many side streams decompress experts, in turns: what is ready first goes first.
ASIDE = 4

#: The stream of each lane of an entry: one stream keeps its work in order. The choice is read back behind the kernels,
#: guesses behind the predictor; what goes to the CPU and comes back has streams of its own, and so has each way between
#: two GPUs.
STREAMS = {
    "compute": "compute", "d2h": "compute", "h2d": "h2d", "prefetch": "prefetch", "peer": "peer", "to_cpu": "to_cpu",
    "back": "back", "side": "side", "guesses": "side", "all-to-all": "all-to-all", "fetch": "fetch", "store": "store",
    **{f"aside{number}": f"aside{number}" for number in range(ASIDE)},
}  # fmt: skip
#: The lanes of threads beside the host's: experts on the CPU, and reads from a drive.
CPU, DRIVE = "cpu", "drive"
#: That of an entry at which the host only waits.
HOST_LANE = "host"

#: An entry of any GPU: the GPU's number and the entry's.
Ref = tuple[int, int]


class ExecutionError(InputError):
    """A scenario that can be simulated but not executed; the message names the key and what would be right."""


@dataclass(slots=True)
class Entry:
    """One call group: `waits` are the entries whose end it waits for before it starts; `others` those of other GPUs.

    `host_waits` are those whose end the host waits for behind it. `signals`: a thread beside the host's waits for its
    end. `marks` are how many spans it leaves, numbered from `mark`: one, or one a piece of a copy in a priority queue.
    In a priority queue, `overtakes` is a copy into the same room that nobody has used (-1: none): if it is still queued
    it need not be made; and `promotes` are copies that may still be queued and are demanded from here on.
    In a pipeline, `receives` is the step whose data from the stage before its stream waits for (-1: none), and
    `size_bytes` is what is sent to the next stage.
    `slot` is the expert's room on the GPU, `host_slot` the one in host memory where that is a cache, `source` the GPU
    and the slot that it is copied from or, stored, to; `scratch` is where it lies decompressed for one use (all -1:
    none). `members` are the (slot, tokens) of a grouped kernel. A read is piece `piece` of `pieces`. `begins`: the
    first expert on the CPU of its visit.
    """

    kind: int
    visit: int
    layer: int
    tokens: int
    lane: str
    expert: int = -1
    copy: int = -1
    slot: int = -1
    target: int = 0
    waits: tuple[int, ...] = ()
    others: tuple[Ref, ...] = ()
    host_waits: tuple[Ref, ...] = ()
    signals: bool = False
    overtakes: int = -1
    promotes: tuple[int, ...] = ()
    mark: int = 0
    marks: int = 1
    receives: int = -1
    size_bytes: int = 0
    host_slot: int = -1
    source: Ref = (-1, -1)
    scratch: int = -1
    members: tuple[tuple[int, int], ...] = ()
    piece: int = 0
    pieces: int = 1
    begins: bool = False


@dataclass(frozen=True)
class Passing:
    """What one stage of a pipeline waits for at each step, and sends: as of `Entry` (steps,); whether it has a head."""

    receives: Sequence[int]
    sends_bytes: Sequence[int]
    has_head: bool


@dataclass(frozen=True)
class Plan:
    """All entries of a run in the host's order, the visits and the manager that decided them, and the slots used."""

    entries: list[Entry]
    visits: list[Visit]
    manager: MemoryManager
    slots: int
    marks: int
    pieces: int
    #: Where the experts lie at the end: expert -> slot.
    resident: dict[int, int]
    #: Each turn of the host thread to this GPU: which of the thread's turns it is, and how many entries end with it.
    turns: list[tuple[int, int]]
    #: Rooms of host memory that are used, and of decompressed experts.
    host_slots: int = 0
    scratches: int = 0
    #: Where the experts lie that are there before the run: expert -> slot.
    preloaded: dict[int, int] = field(default_factory=dict)
