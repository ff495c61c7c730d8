"""Host memory above a drive, compiled: what `host_memory` decides, row for row."""

from __future__ import annotations

from typing import Any

from ..policies.compiled_eviction import DEMANDED_AT
from .compiled_rooms import (
    compiled,
    evict_for,
    leave,
    make_room,
    note_admission,
    note_admitted,
    note_use,
    pool_of,
    take_register,
    take_room,
)
from .decision_words import (
    D_ASSIGNED,
    D_BACK_NS,
    D_EXPERTS,
    D_FOUND,
    D_KEPT_FREE,
    D_LAYER_EXPERTS,
    D_MISSES,
    D_READ_BYTES,
    D_REQUESTS,
    D_ROOMS,
    D_TIER,
    D_WAVE,
    E_COPY,
    E_ROOM,
    E_SIZE,
    E_WAVE,
    P_EXPERT,
    P_FREE_BYTES,
    X_COPIED,
    X_TAKEN,
    Tables,
    Words,
)
from .memory_manager import DEMANDED, DEMOTED, PREFETCHED
from .visit_commands import DEMOTED as BACK
from .visit_commands import (
    O_COPY,
    O_EXPERT,
    O_FILLED,
    O_FIRST,
    O_FREED,
    O_FREED_LAST,
    O_LAST,
    O_LEAVING,
    O_NUMBER,
    O_REQUESTS,
    O_ROOM,
    O_TARGET,
    O_WAVE,
    STAGED,
)

Word = Any


@compiled
def begin_row(t: Tables, copied: Words, expert: Word, room: Word, wave: Word) -> None:
    """Begin the row of what comes to host memory and is no copy to the GPU."""
    d = t.words
    copied[O_EXPERT], copied[O_COPY], copied[O_ROOM], copied[O_WAVE], copied[O_TARGET] = expert, -1, room, wave, -1
    copied[O_FIRST], copied[O_LAST], copied[O_FREED] = d[X_TAKEN], d[X_TAKEN], d[X_TAKEN]


@compiled
def settle_in(t: Tables, g: Word, expert: Word, reason: Word, copied: Words) -> None:
    """Give an absent expert the room in host memory that has been made for it."""
    d, host = t.words, t.words[g + D_TIER]
    p, row = pool_of(t, host, expert), t.experts[d[host + D_EXPERTS] + expert]
    take_room(t, g, host, p, row[E_SIZE], 1)
    copied[O_FREED_LAST] = d[X_TAKEN]
    row[E_ROOM] = take_register(t, host)
    d[d[host + D_ROOMS] + row[E_ROOM]] = take_register(t, host)
    note_admission(t, host, expert, reason)
    note_admitted(t, host, p, expert, int(reason == DEMANDED))


@compiled
def note_place(t: Tables, host: Word, row: Words, copied: Words) -> None:
    """Note where an expert lies in host memory."""
    d = t.words
    copied[O_NUMBER], copied[O_FILLED] = row[E_COPY], row[E_ROOM]
    copied[O_LEAVING] = d[d[host + D_ROOMS] + row[E_ROOM]]


@compiled
def read(t: Tables, g: Word, expert: Word, demanded: Word, copied: Words) -> None:
    """Read an absent expert into host memory."""
    d, host = t.words, t.words[g + D_TIER]
    # A pool holds one expert at least, and nobody is pinned.
    make_room(t, host, pool_of(t, host, expert), expert, demanded, DEMANDED_AT)
    settle_in(t, g, expert, DEMANDED if demanded else PREFETCHED, copied)
    copied[O_REQUESTS] = d[d[host + D_REQUESTS] + expert // d[host + D_LAYER_EXPERTS]]
    d[host + D_READ_BYTES] += t.experts[d[host + D_EXPERTS] + expert, E_SIZE]


@compiled
def list_evicted(t: Tables, g: Word, p: Word, count: Word) -> None:
    """Note so many experts that have just left for another, and their rooms, as copies behind its own."""
    d = t.words
    for number in range(count):
        copied, expert = t.copies[d[X_COPIED]], d[p + P_EXPERT] + t.leaving[number]
        d[X_COPIED] += 1
        copied[O_EXPERT], copied[O_ROOM] = expert, t.experts[d[g + D_EXPERTS] + expert, E_ROOM]


@compiled
def take_in(t: Tables, g: Word, expert: Word, room: Word, copied: Words) -> Word:
    """Let an expert come back to host memory out of a room of the GPU's; False if it is there, or finds no room."""
    d, host = t.words, t.words[g + D_TIER]
    row = t.experts[d[host + D_EXPERTS] + expert]
    if row[E_COPY] >= 0 or not make_room(t, host, pool_of(t, host, expert), expert, 0, DEMANDED_AT):
        return False
    begin_row(t, copied, expert, room, BACK)
    settle_in(t, g, expert, DEMOTED, copied)
    copied[O_REQUESTS] = d[d[host + D_BACK_NS] + expert // d[host + D_LAYER_EXPERTS]]
    note_place(t, host, row, copied)
    return True


@compiled
def hand_over(t: Tables, g: Word, expert: Word, first: Word) -> None:
    """Let what is listed from copy `first` on come back to host memory, and an expert that is copied out leave it."""
    d, host = t.words, t.words[g + D_TIER]
    row = t.experts[d[host + D_EXPERTS] + expert]
    row[E_WAVE], kept = d[host + D_WAVE], first
    for at in range(first, d[X_COPIED]):
        kept += int(take_in(t, g, t.copies[at, O_EXPERT], t.copies[at, O_ROOM], t.copies[kept]))
    d[X_COPIED], row[E_WAVE] = kept, -1
    p = pool_of(t, host, expert)
    leave(t, host, p, expert, 0)
    while d[p + P_FREE_BYTES] < d[host + D_KEPT_FREE] and d[host + D_ASSIGNED]:
        evict_for(t, host, p, 1, DEMANDED_AT)


@compiled
def bring(t: Tables, g: Word, expert: Word, demanded: Word, copied: Words) -> None:
    """Look up in host memory what is copied to the GPU, and read it first if it is absent there."""
    d, host = t.words, t.words[g + D_TIER]
    row = t.experts[d[host + D_EXPERTS] + expert]
    copied[O_REQUESTS], copied[O_FREED], copied[O_FREED_LAST] = 0, d[X_TAKEN], d[X_TAKEN]
    if row[E_COPY] < 0:
        d[host + D_MISSES] += 1
        read(t, g, expert, demanded, copied)
    else:
        d[host + D_FOUND] += 1
        if demanded:
            note_use(t, host, pool_of(t, host, expert), expert, 1)
    note_place(t, host, row, copied)


@compiled
def stage(t: Tables, g: Word, expert: Word) -> None:
    """Read an expert into host memory for no copy, if it is absent there."""
    d, host = t.words, t.words[g + D_TIER]
    row = t.experts[d[host + D_EXPERTS] + expert]
    if row[E_COPY] >= 0:
        return
    copied = t.copies[d[X_COPIED]]
    d[X_COPIED] += 1
    begin_row(t, copied, expert, -1, STAGED)
    read(t, g, expert, 0, copied)
    note_place(t, host, row, copied)
