"""Rooms of a memory, of a GPU or the host, compiled: registers, free room, evictions and admissions.

Where it says whose room is taken, it writes that into the tables of the visit, with the registers that `tables.Rooms`
would give.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ...machine_code import compiled_once
from ...machine_words import fetch_soon
from ..policies.compiled_eviction import next_victim
from ..policies.compiled_orders import WAVE
from ..policies.compiled_policies import LUCK_WORDS, REALS_BESIDE, admit, drop, evict, has_miss, miss, use, victims
from .decision_words import (
    ADMITTED_WORDS,
    D_ADMITTED,
    D_ASSIGNED,
    D_COPIES,
    D_EVICTED,
    D_EVICTION,
    D_EXPERTS,
    D_FREE,
    D_FREE_COUNT,
    D_FRESH,
    D_FULLEST,
    D_LANDED,
    D_LAYER_EXPERTS,
    D_LENDS,
    D_LENT,
    D_POOLS,
    D_ROOMS,
    D_UNUSED,
    D_WATCHES,
    D_WAVE,
    E_COPY,
    E_ROOM,
    E_SIZE,
    E_UNTIL,
    P_CAPACITY,
    P_COUNT,
    P_EXPERT,
    P_EXPERTS,
    P_FIRST,
    P_FREE_BYTES,
    P_LUCK,
    P_REALS,
    P_RING,
    P_ROWS,
    P_STATE,
    R_AT,
    R_COUNT,
    TYPES,
    X_REGISTERS,
    X_TAKEN,
    Reals,
    Table,
    Tables,
    Words,
)
from .visit_commands import (
    T_LANDED,
    T_LEFT,
    T_LENT,
    T_PEER,
    T_ROOM,
)

Word = Any

#: None of these makes an array: Numba need not count who holds which.
compiled = partial(compiled_once, types=TYPES, error_model="numpy", _nrt=False)
#: Those that Python calls.
entry = partial(compiled, entry=True)


# Registers.


@compiled
def take_register(t: Tables, g: Word) -> Word:
    """Returns a register that stands for nothing that anybody will ask for."""
    d = t.words
    if d[g + D_FREE_COUNT]:
        d[g + D_FREE_COUNT] -= 1
        return d[d[g + D_FREE] + d[g + D_FREE_COUNT]]
    d[X_REGISTERS] += 1
    return d[X_REGISTERS] - 1


@compiled
def give_register(t: Tables, g: Word, register: Word) -> None:
    """Let a register be taken again."""
    d = t.words
    d[d[g + D_FREE] + d[g + D_FREE_COUNT]] = register
    d[g + D_FREE_COUNT] += 1


# Rooms: bytes that are free, in the order in which they became free.


@compiled
def pool_of(t: Tables, g: Word, expert: Word) -> Word:
    """Returns the pool that an expert has room in."""
    d = t.words
    pools = d[g + D_POOLS]
    return d[pools + 1] if d[pools] == 1 else d[pools + 1 + expert // d[g + D_LAYER_EXPERTS]]


@compiled
def state_of(t: Tables, p: Word) -> Table:
    """Returns the rows that hold what a pool's policy knows."""
    d = t.words
    return t.states[d[p + P_STATE] : d[p + P_STATE] + d[p + P_ROWS]]


@compiled
def reals_of(t: Tables, p: Word) -> Reals:
    """Returns the reals that a pool's policy keeps, by expert, and beside them."""
    d = t.words
    return t.floats[d[p + P_REALS] : d[p + P_REALS] + d[p + P_EXPERTS] + REALS_BESIDE]


@compiled
def give_room(t: Tables, g: Word, p: Word, size_bytes: Word, register: Word) -> None:
    """Put room at the end of what is free; -1: it was nobody's."""
    d = t.words
    place = d[p + P_FIRST] + d[p + P_COUNT]
    if place >= d[p + P_CAPACITY]:
        place -= d[p + P_CAPACITY]
    at = d[p + P_RING] + 2 * place
    d[at], d[at + 1] = size_bytes, register
    d[p + P_COUNT] += 1
    d[p + P_FREE_BYTES] += size_bytes
    if d[p + P_COUNT] > d[g + D_FULLEST]:
        d[g + D_FULLEST] = d[p + P_COUNT]


@compiled
def note_taken(t: Tables, g: Word, holder: Word, register: Word, left: Word) -> None:
    """Write whose room is taken into the visit's table, and let its registers go unless some of it is left."""
    d, row = t.words, t.taken[t.words[X_TAKEN]]
    d[X_TAKEN] += 1
    row[T_ROOM], row[T_LEFT] = register, left
    if not left:
        give_register(t, holder, register)
    if holder != g:
        row[T_LENT] = d[d[holder + D_ROOMS] + register]
        if not left:
            give_register(t, holder, row[T_LENT])
    elif d[g + D_LENDS]:
        row[T_LANDED], row[T_LENT], row[T_PEER] = d[d[g + D_LANDED] + register], d[d[g + D_LENT] + register], -1
        if not left:
            give_register(t, g, row[T_LANDED])
            give_register(t, g, row[T_LENT])


@compiled
def take_room(t: Tables, g: Word, holder: Word, p: Word, size_bytes: Word, notes: Word) -> None:
    """Take room off what is free in a memory: a GPU's, or the host's below it; `notes`: note whose it was."""
    d = t.words
    d[p + P_FREE_BYTES] -= size_bytes
    while size_bytes > 0:
        at = d[p + P_RING] + 2 * d[p + P_FIRST]
        extent_bytes, register = d[at], d[at + 1]
        left = extent_bytes > size_bytes
        if notes and register >= 0:
            note_taken(t, g, holder, register, left)
        if left:
            d[at] = extent_bytes - size_bytes
            return
        size_bytes -= extent_bytes
        d[p + P_COUNT] -= 1
        d[p + P_FIRST] += 1
        if d[p + P_FIRST] == d[p + P_CAPACITY]:
            d[p + P_FIRST] = 0


# Who leaves.


@compiled
def first_use(t: Tables, g: Word, expert: Word) -> None:
    """Note that a prefetched expert is used, or leaves, for the first time."""
    d, fresh = t.words, t.words[g + D_FRESH] + expert
    if d[fresh]:
        d[fresh] = 0
        d[g + D_UNUSED] -= t.experts[d[g + D_EXPERTS] + expert, E_SIZE]


@compiled
def leave(t: Tables, g: Word, p: Word, expert: Word, found: Word) -> None:
    """Let an expert lose its room; `found`: `victims` has found it."""
    d, kind = t.words, t.words[g + D_EVICTION]
    row = t.experts[d[g + D_EXPERTS] + expert]
    state = state_of(t, p)
    if found:
        evict(kind, state, expert - d[p + P_EXPERT])
    else:
        reals = reals_of(t, p)
        drop(kind, state, reals, expert - d[p + P_EXPERT])
    region = d[g + D_EVICTED]
    d[d[region + R_AT] + d[region + R_COUNT]] = row[E_COPY]
    d[region + R_COUNT] += 1
    row[E_COPY], row[E_UNTIL] = -1, -1
    if d[g + D_WATCHES]:
        first_use(t, g, expert)
    d[g + D_ASSIGNED] -= row[E_SIZE]
    give_room(t, g, p, row[E_SIZE], row[E_ROOM])


@compiled
def evict_for(t: Tables, g: Word, p: Word, lacking_bytes: Word, at: Word) -> Word:
    """Evict until there is so much more room, for a prefetch at visit `at`; False, and nobody, if that cannot be."""
    d = t.words
    first = d[g + D_EXPERTS] + d[p + P_EXPERT]
    held = t.experts[first : first + d[p + P_EXPERTS]]
    state, reals = state_of(t, p), reals_of(t, p)
    luck = d[d[p + P_LUCK] : d[p + P_LUCK] + LUCK_WORDS]
    count = victims(d[g + D_EVICTION], state, reals, luck, held, d[g + D_WAVE], at, lacking_bytes, t.leaving)
    for number in range(count):
        leave(t, g, p, d[p + P_EXPERT] + t.leaving[number], 1)
    coming = next_victim(state)
    if coming < len(held):
        fetch_soon(held[coming], WAVE)
    return count > 0


@compiled
def make_room(t: Tables, g: Word, p: Word, expert: Word, demanded: Word, at: Word) -> Word:
    """Make room for an absent expert in a memory, at visit `at`; False, and nobody leaves, if that cannot be."""
    d = t.words
    if has_miss(d[g + D_EVICTION]):
        state, reals = state_of(t, p), reals_of(t, p)
        miss(d[g + D_EVICTION], state, reals, expert - d[p + P_EXPERT], demanded)
    lacking_bytes = t.experts[d[g + D_EXPERTS] + expert, E_SIZE] - d[p + P_FREE_BYTES]
    return lacking_bytes <= 0 or evict_for(t, g, p, lacking_bytes, at)


@compiled
def note_admission(t: Tables, g: Word, expert: Word, reason: Word) -> None:
    """Note that an expert has room in a memory now, by a new copy."""
    d = t.words
    row = t.experts[d[g + D_EXPERTS] + expert]
    row[E_COPY] = d[g + D_COPIES]
    d[g + D_COPIES] += 1
    d[g + D_ASSIGNED] += row[E_SIZE]
    region = d[g + D_ADMITTED]
    record = d[region + R_AT] + d[region + R_COUNT] * ADMITTED_WORDS
    d[record], d[record + 1], d[record + 2] = expert, reason, 0
    d[region + R_COUNT] += 1


@compiled
def note_saved(t: Tables, g: Word, copies: Word) -> None:
    """Note how many copies merging guesses saved of the expert that was given room last."""
    d, region = t.words, t.words[g + D_ADMITTED]
    d[d[region + R_AT] + (d[region + R_COUNT] - 1) * ADMITTED_WORDS + 2] = copies


@compiled
def note_admitted(t: Tables, g: Word, p: Word, expert: Word, demanded: Word) -> None:
    """Tell the policy that an expert has been given room, on demand or not."""
    d = t.words
    state, reals = state_of(t, p), reals_of(t, p)
    admit(d[g + D_EVICTION], state, reals, expert - d[p + P_EXPERT], demanded)


@compiled
def note_use(t: Tables, g: Word, p: Word, expert: Word, found: Word) -> None:
    """Tell the policy that an expert was used: it was found, or admitted on demand."""
    if not found:
        note_admitted(t, g, p, expert, 1)
        return
    d = t.words
    state, reals = state_of(t, p), reals_of(t, p)
    use(d[g + D_EVICTION], state, reals, expert - d[p + P_EXPERT])


@entry
def admit_preloaded(kind: Word, state: Table, reals: Reals, experts: Words, count: Word) -> None:
    """Take note of so many experts that have room before the run, as if prefetches had brought them."""
    for number in range(count):
        admit(kind, state, reals, experts[number], 0)
