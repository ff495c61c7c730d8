"""The memory manager, compiled: what `MemoryManager` decides about rooms, over words and tables, in the same order."""

from __future__ import annotations

from typing import Any

from ..policies.compiled_eviction import DEMANDED_AT, SPENT
from .compiled_host_memory import bring, hand_over, list_evicted
from .compiled_rooms import (
    compiled,
    evict_for,
    give_room,
    leave,
    make_room,
    note_admission,
    note_admitted,
    pool_of,
    take_register,
    take_room,
)
from .decision_words import (
    D_BUDGET,
    D_COPIES,
    D_DROPS,
    D_EVICTED,
    D_EVICTION,
    D_EXCLUSIVE,
    D_EXPERTS,
    D_FRESH,
    D_FROM_PEERS,
    D_GPUS,
    D_LANDED,
    D_LENDS,
    D_LENT,
    D_OWNED,
    D_POOLS,
    D_PROTECTED,
    D_PROTECTED_COUNT,
    D_PROTECTS,
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
    P_FREE_BYTES,
    R_COUNT,
    X_COPIED,
    X_SERVED,
    X_TAKEN,
    Tables,
    Words,
)
from .memory_manager import DEMANDED, PREFETCHED
from .visit_commands import (
    O_COPY,
    O_EXPERT,
    O_FIRST,
    O_FROM,
    O_LANDED,
    O_LAST,
    O_PEER,
    O_READ,
    O_ROOM,
    O_TARGET,
    O_WAVE,
    S_EXPERT,
    S_FETCHED,
)

Word = Any


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
    row, evicted = t.experts[d[g + D_EXPERTS] + expert], d[d[g + D_EVICTED] + R_COUNT]
    if not make_room(t, g, p, expert, int(wave >= 0), at):
        return False
    copied = t.copies[d[X_COPIED]]
    d[X_COPIED] += 1
    first, exclusive = d[X_COPIED], d[g + D_TIER] >= 0 and d[d[g + D_TIER] + D_EXCLUSIVE]
    if exclusive:
        list_evicted(t, g, p, d[d[g + D_EVICTED] + R_COUNT] - evicted)
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
        if exclusive:
            hand_over(t, g, expert, first)
    return True


@compiled
def prefetch(t: Tables, g: Word, expert: Word, target: Word, at: Word) -> Word:
    """Give an absent expert room, expected at visit `target`; False if it finds none."""
    d = t.words
    if not claim(t, g, expert, -1, target, at):
        return False
    p, row = pool_of(t, g, expert), t.experts[d[g + D_EXPERTS] + expert]
    note_admitted(t, g, p, expert, 0)
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
