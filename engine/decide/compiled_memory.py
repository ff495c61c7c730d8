"""The memory manager, compiled: what `MemoryManager` decides about rooms, over words and tables, in the same order.

Where it says who leaves and whose room is taken, it writes that into the tables of the visit, with the registers that
`tables.Rooms` would give.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ...machine_code import compiled_once
from ...machine_words import fetch_soon
from ..policies.compiled_eviction import (
    DEMANDED_AT,
    EXTRA_ROWS,
    S3FIFO,
    SPENT,
    admit,
    drop,
    evict,
    miss,
    next_victim,
    use,
    victims,
)
from ..policies.compiled_orders import WAVE
from .decision_words import (
    ADMITTED_WORDS,
    D_ADMITTED,
    D_ASSIGNED,
    D_BUDGET,
    D_COPIES,
    D_DROPS,
    D_EVICTED,
    D_EVICTION,
    D_EXPERTS,
    D_FOUND,
    D_FREE,
    D_FREE_COUNT,
    D_FRESH,
    D_FROM_PEERS,
    D_FULLEST,
    D_GPUS,
    D_LANDED,
    D_LAYER_EXPERTS,
    D_LENDS,
    D_LENT,
    D_MISSES,
    D_OWNED,
    D_POOLS,
    D_PROTECTED,
    D_PROTECTED_COUNT,
    D_PROTECTS,
    D_READ_BYTES,
    D_REQUESTS,
    D_ROOMS,
    D_TIER,
    D_UNUSED,
    D_WATCHES,
    D_WAVE,
    E_COPY,
    E_ROOM,
    E_SIZE,
    E_UNTIL,
    E_WAVE,
    P_BUDGET,
    P_CAPACITY,
    P_COUNT,
    P_EXPERT,
    P_EXPERTS,
    P_FIRST,
    P_FREE_BYTES,
    P_RING,
    P_STATE,
    R_AT,
    R_COUNT,
    TYPES,
    X_COPIED,
    X_REGISTERS,
    X_SERVED,
    X_TAKEN,
    Table,
    Tables,
    Words,
)
from .memory_manager import DEMANDED, PREFETCHED
from .visit_commands import (
    O_COPY,
    O_EXPERT,
    O_FILLED,
    O_FIRST,
    O_FREED,
    O_FREED_LAST,
    O_FROM,
    O_LANDED,
    O_LAST,
    O_LEAVING,
    O_NUMBER,
    O_PEER,
    O_READ,
    O_REQUESTS,
    O_ROOM,
    O_TARGET,
    O_WAVE,
    S_EXPERT,
    S_FETCHED,
    STAGED,
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
    state = t.states[d[p + P_STATE] : d[p + P_STATE] + d[p + P_EXPERTS] + EXTRA_ROWS]
    if found:
        evict(kind, state, expert - d[p + P_EXPERT])
    else:
        drop(kind, state, expert - d[p + P_EXPERT])
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
    state = t.states[d[p + P_STATE] : d[p + P_STATE] + d[p + P_EXPERTS] + EXTRA_ROWS]
    count = victims(d[g + D_EVICTION], state, held, d[g + D_WAVE], at, lacking_bytes, t.leaving)
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
    if demanded and d[g + D_EVICTION] == S3FIFO:
        state = t.states[d[p + P_STATE] : d[p + P_STATE] + d[p + P_EXPERTS] + EXTRA_ROWS]
        miss(d[g + D_EVICTION], state, expert - d[p + P_EXPERT])
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
def note_use(t: Tables, g: Word, p: Word, expert: Word, found: Word) -> None:
    """Tell the policy that an expert was used: it was found, or admitted on demand."""
    d = t.words
    state = t.states[d[p + P_STATE] : d[p + P_STATE] + d[p + P_EXPERTS] + EXTRA_ROWS]
    if found:
        use(d[g + D_EVICTION], state, expert - d[p + P_EXPERT])
    else:
        admit(d[g + D_EVICTION], state, expert - d[p + P_EXPERT], 1)


@entry
def admit_preloaded(kind: Word, state: Table, experts: Words, count: Word) -> None:
    """Take note of so many experts that have room before the run, as if prefetches had brought them."""
    for number in range(count):
        admit(kind, state, experts[number], 0)


# Host memory above a drive: what `host_memory` decides.


@compiled
def read(t: Tables, g: Word, expert: Word, demanded: Word, copied: Words) -> None:
    """Read an absent expert into host memory."""
    d, host = t.words, t.words[g + D_TIER]
    p, row = pool_of(t, host, expert), t.experts[d[host + D_EXPERTS] + expert]
    make_room(t, host, p, expert, demanded, DEMANDED_AT)  # a pool holds one expert at least, and nobody is pinned
    take_room(t, g, host, p, row[E_SIZE], 1)
    copied[O_FREED_LAST] = d[X_TAKEN]
    row[E_ROOM] = take_register(t, host)
    d[d[host + D_ROOMS] + row[E_ROOM]] = take_register(t, host)
    note_admission(t, host, expert, DEMANDED if demanded else PREFETCHED)
    state = t.states[d[p + P_STATE] : d[p + P_STATE] + d[p + P_EXPERTS] + EXTRA_ROWS]
    admit(d[host + D_EVICTION], state, expert - d[p + P_EXPERT], demanded)
    copied[O_REQUESTS] = d[d[host + D_REQUESTS] + expert // d[host + D_LAYER_EXPERTS]]
    d[host + D_READ_BYTES] += row[E_SIZE]


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
    copied[O_NUMBER], copied[O_FILLED] = row[E_COPY], row[E_ROOM]
    copied[O_LEAVING] = d[d[host + D_ROOMS] + row[E_ROOM]]


@compiled
def stage(t: Tables, g: Word, expert: Word) -> None:
    """Read an expert into host memory for no copy, if it is absent there."""
    d, host = t.words, t.words[g + D_TIER]
    row = t.experts[d[host + D_EXPERTS] + expert]
    if row[E_COPY] >= 0:
        return
    copied = t.copies[d[X_COPIED]]
    d[X_COPIED] += 1
    copied[O_EXPERT], copied[O_COPY], copied[O_ROOM], copied[O_WAVE], copied[O_TARGET] = expert, -1, -1, STAGED, -1
    copied[O_FIRST], copied[O_LAST], copied[O_FREED] = d[X_TAKEN], d[X_TAKEN], d[X_TAKEN]
    read(t, g, expert, 0, copied)
    copied[O_NUMBER], copied[O_FILLED] = row[E_COPY], row[E_ROOM]
    copied[O_LEAVING] = d[d[host + D_ROOMS] + row[E_ROOM]]


@compiled
def find_at_peer(t: Tables, g: Word, expert: Word, copied: Words) -> None:
    """Let a copy come from the first other GPU that has the expert, an owner of it before others, if there is one."""
    d, gpus = t.words, t.words[g + D_GPUS]
    holder: Word = -1
    for number in range(d[gpus]):
        other = d[gpus + 1 + number]
        row = t.experts[d[other + D_EXPERTS] + expert]
        if other == g or row[E_COPY] < 0 or (holder >= 0 and not d[d[other + D_OWNED] + expert]):
            continue
        if holder < 0 or not d[d[d[gpus + 1 + holder] + D_OWNED] + expert]:
            holder = number
    if holder >= 0:
        other = d[gpus + 1 + holder]
        room = t.experts[d[other + D_EXPERTS] + expert, E_ROOM]
        copied[O_PEER], copied[O_FROM] = holder, d[d[other + D_LANDED] + room]
        copied[O_READ] = d[d[other + D_LENT] + room]


@compiled
def claim(t: Tables, g: Word, expert: Word, wave: Word, target: Word, at: Word) -> Word:
    """Give an absent expert room for a copy meant for visit `target`; False, with nothing changed, if it finds none.

    A prefetch (`wave` -1) at visit `at` respects protected experts.
    """
    d, p = t.words, pool_of(t, g, expert)
    row = t.experts[d[g + D_EXPERTS] + expert]
    if not make_room(t, g, p, expert, int(wave >= 0), at):
        return False
    copied = t.copies[d[X_COPIED]]
    d[X_COPIED] += 1
    copied[O_EXPERT], copied[O_COPY], copied[O_WAVE], copied[O_TARGET] = expert, d[g + D_COPIES], wave, target
    copied[O_FIRST] = d[X_TAKEN]
    take_room(t, g, g, p, row[E_SIZE], 1)
    copied[O_LAST] = d[X_TAKEN]
    copied[O_ROOM] = row[E_ROOM] = take_register(t, g)
    if d[g + D_LENDS]:
        copied[O_LANDED] = d[d[g + D_LANDED] + row[E_ROOM]] = take_register(t, g)
        d[d[g + D_LENT] + row[E_ROOM]] = take_register(t, g)
        copied[O_PEER] = -1
        if d[g + D_FROM_PEERS]:
            find_at_peer(t, g, expert, copied)
    note_admission(t, g, expert, DEMANDED if wave >= 0 else PREFETCHED)
    if d[g + D_TIER] >= 0:
        bring(t, g, expert, int(wave >= 0), copied)
    return True


@compiled
def prefetch(t: Tables, g: Word, expert: Word, target: Word, at: Word) -> Word:
    """Give an absent expert room, expected at visit `target`; False if it finds none."""
    d = t.words
    if not claim(t, g, expert, -1, target, at):
        return False
    p, row = pool_of(t, g, expert), t.experts[d[g + D_EXPERTS] + expert]
    state = t.states[d[p + P_STATE] : d[p + P_STATE] + d[p + P_EXPERTS] + EXTRA_ROWS]
    admit(d[g + D_EVICTION], state, expert - d[p + P_EXPERT], 0)
    if d[g + D_PROTECTS]:
        row[E_UNTIL] = target
        if d[g + D_DROPS]:
            place = d[g + D_PROTECTED] + 2 * d[g + D_PROTECTED_COUNT]
            d[place], d[place + 1] = expert, row[E_COPY]
            d[g + D_PROTECTED_COUNT] += 1
    if d[g + D_WATCHES]:
        d[d[g + D_FRESH] + expert] = 1
        d[g + D_UNUSED] += row[E_SIZE]
    return True


@compiled
def unpin(t: Tables, g: Word) -> None:
    """End the visit's hold on its experts; those that are not kept leave now, in the order of their copies."""
    d = t.words
    spends = d[g + D_EVICTION] == SPENT
    if d[g + D_DROPS] or spends:
        count = 0
        for number in range(d[X_SERVED]):
            expert = t.served[number, S_EXPERT]
            row = t.experts[d[g + D_EXPERTS] + expert]
            was_kept = spends and not d[g + D_DROPS] and not t.served[number, S_FETCHED]
            if row[E_WAVE] == d[g + D_WAVE] and row[E_COPY] >= 0 and not was_kept:
                place = count
                while place and t.experts[d[g + D_EXPERTS] + t.leaving[place - 1], E_COPY] > row[E_COPY]:
                    t.leaving[place] = t.leaving[place - 1]
                    place -= 1
                t.leaving[place] = expert
                count += 1
        for number in range(count):
            leave(t, g, pool_of(t, g, t.leaving[number]), t.leaving[number], 0)
    d[g + D_WAVE] += 1


@compiled
def drop_prefetched(t: Tables, g: Word, visit: Word) -> None:
    """Let go of what was prefetched for visits up to this one and is still protected: wrong guesses."""
    d = t.words
    kept = 0
    for number in range(d[g + D_PROTECTED_COUNT]):
        at = d[g + D_PROTECTED] + 2 * number
        expert, copy = d[at], d[at + 1]
        row = t.experts[d[g + D_EXPERTS] + expert]
        if row[E_COPY] != copy:
            continue
        if row[E_UNTIL] <= visit:
            leave(t, g, pool_of(t, g, expert), expert, 0)
            continue
        place = d[g + D_PROTECTED] + 2 * kept
        d[place], d[place + 1] = expert, copy
        kept += 1
    d[g + D_PROTECTED_COUNT] = kept


@compiled
def cancel(t: Tables, g: Word, expert: Word, copy: Word) -> None:
    """Take back the room of a prefetch that was never copied, if it still has it."""
    if t.experts[t.words[g + D_EXPERTS] + expert, E_COPY] == copy:
        leave(t, g, pool_of(t, g, expert), expert, 0)


@compiled
def resize(t: Tables, g: Word, budgets: Word) -> None:
    """Give every pool the budget that stands there; experts leave in the policy's order until what remains fits."""
    d, pools = t.words, t.words[g + D_POOLS]
    total_bytes: Word = 0
    for number in range(d[pools]):
        p = d[pools + 1 + number]
        more_bytes = d[budgets + number] - d[p + P_BUDGET]
        d[p + P_BUDGET] = d[budgets + number]
        total_bytes += d[p + P_BUDGET]
        if more_bytes > 0:
            give_room(t, g, p, more_bytes, -1)
        elif more_bytes < 0:
            while d[p + P_FREE_BYTES] < -more_bytes:
                evict_for(t, g, p, 1, DEMANDED_AT)
            take_room(t, g, g, p, -more_bytes, 0)
    d[g + D_BUDGET] = total_bytes
