"""What comes next, compiled: a word for each lane and host thread says when it does something, and what.

The words stand side by side, so that the first is found quickly; whoever changes what a lane is about to do changes its
word, too. Where there are many they stand in blocks, of each of which the first is known.
"""

from __future__ import annotations

from .compiled_work import Word, Words, compiled
from .memory import (
    FIRSTS,
    KEY_COUNT,
    KEYS,
    L_END,
    L_ENTERS,
    L_KEEPS,
    L_KEY,
    L_OPEN,
    L_WAKE,
    NEVER,
    NOW,
    T_KEY,
)

#: Kinds of events, in the order in which they come at one instant (see `lanes.Instant`).
ENTERS, ENDS, KEEPS, GOES_ON, STARTS = range(5)
KIND_BITS, ALL = 3, 7
#: So few words have no blocks, but are looked at one by one.
FEW = 24
#: Words of a block.
BLOCK = 8


@compiled
def set_key(m: Words, at: Word, key: Word) -> None:
    """Set the word of a lane or thread, and who is first of its block, of equal ones the first in order."""
    m[at] = key
    if not m[FIRSTS]:
        return
    block = (at - m[KEYS]) // BLOCK
    known = m[FIRSTS] + 2 * block
    if key < m[known] or (key == m[known] and at < m[known + 1]):
        m[known], m[known + 1] = key, at
    elif at == m[known + 1]:
        place = m[KEYS] + BLOCK * block
        first = m[place]
        for other in range(place + 1, place + BLOCK):
            if m[other] < first:
                first, place = m[other], other
        m[known], m[known + 1] = first, place


@compiled
def reschedule(m: Words, lane: Word) -> None:
    """Note what a lane does next: its instant and kind as one number."""
    comes = min(m[lane + L_END] << KIND_BITS | ENDS, m[lane + L_WAKE] << KIND_BITS | STARTS)
    if m[lane + L_OPEN]:
        comes = min(comes, m[lane + L_KEEPS] << KIND_BITS | KEEPS)
        comes = min(comes, m[lane + L_ENTERS] << KIND_BITS | ENTERS)
    set_key(m, m[lane + L_KEY], comes)


@compiled
def wake(m: Words, lane: Word) -> None:
    """Let a lane try to start work once nothing else happens at this instant."""
    m[lane + L_WAKE] = m[NOW]
    at, comes = m[lane + L_KEY], m[NOW] << KIND_BITS | STARTS
    if comes < m[at]:
        set_key(m, at, comes)


@compiled
def wake_at(m: Words, lane: Word, at: Word) -> None:
    """Let an idle lane try to start work at an instant, or at this one if that has passed."""
    m[lane + L_WAKE] = max(m[NOW], at)
    reschedule(m, lane)


@compiled
def goes_on(m: Words, thread: Word, at: Word) -> None:
    """Let a thread go on at an instant."""
    set_key(m, m[thread + T_KEY], at << KIND_BITS | GOES_ON)


@compiled
def rests(m: Words, thread: Word) -> None:
    """Let a thread wait until somebody lets it go on."""
    set_key(m, m[thread + T_KEY], NEVER << KIND_BITS)


@compiled
def next_event(m: Words) -> tuple[Word, Word]:
    """Returns what comes next, its instant and kind as one number, and where; of equal ones the first in order."""
    keys, count, firsts = m[KEYS], m[KEY_COUNT], m[FIRSTS]
    if firsts:
        known = firsts
        for at in range(firsts + 2, firsts + count // BLOCK * 2, 2):
            if m[at] < m[known]:
                known = at
        return m[known], m[m[known + 1] + count]
    first, place = m[keys], keys
    for at in range(keys + 1, keys + count):
        key = m[at]
        if key < first:
            first, place = key, at
    return first, m[place + count]
