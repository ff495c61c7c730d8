"""What comes next, compiled: a word for each lane and host thread says when it does something, and what.

The words stand side by side, so that the first is found quickly; whoever changes what a lane is about to do changes its
word, too.
"""

from __future__ import annotations

from .compiled_work import Word, Words, compiled
from .memory import (
    KEY_COUNT,
    KEYS,
    L_END,
    L_ENTERS,
    L_KEEPS,
    L_KEY,
    L_WAKE,
    NEVER,
    NOW,
    T_KEY,
)

#: Kinds of events, in the order in which they come at one instant (see `lanes.Instant`).
ENTERS, ENDS, KEEPS, GOES_ON, STARTS = range(5)
KIND_BITS, ALL = 3, 7
#: So few words are looked at one by one: where they have just been written, reading several at once has to wait.
_FEW = 24


@compiled
def reschedule(m: Words, lane: Word) -> None:
    """Note what a lane does next: its instant and kind as one number."""
    comes = min(m[lane + L_END] << KIND_BITS | ENDS, m[lane + L_WAKE] << KIND_BITS | STARTS)
    comes = min(comes, m[lane + L_KEEPS] << KIND_BITS | KEEPS)
    m[m[lane + L_KEY]] = min(comes, m[lane + L_ENTERS] << KIND_BITS | ENTERS)


@compiled
def wake(m: Words, lane: Word) -> None:
    """Let a lane try to start work once nothing else happens at this instant."""
    m[lane + L_WAKE] = m[NOW]
    at = m[lane + L_KEY]
    m[at] = min(m[at], m[NOW] << KIND_BITS | STARTS)


@compiled
def goes_on(m: Words, thread: Word, at: Word) -> None:
    """Let a thread go on at an instant."""
    m[m[thread + T_KEY]] = at << KIND_BITS | GOES_ON


@compiled
def rests(m: Words, thread: Word) -> None:
    """Let a thread wait until somebody lets it go on."""
    m[m[thread + T_KEY]] = NEVER << KIND_BITS


@compiled
def next_event(m: Words) -> tuple[Word, Word]:
    """Returns what comes next, its instant and kind as one number, and where; of equal ones the first in order."""
    keys, count = m[KEYS], m[KEY_COUNT]
    first, place = m[keys], keys
    if count <= _FEW:
        for at in range(keys + 1, keys + count):
            key = m[at]
            if key < first:
                first, place = key, at
        return first, m[place + count]
    for at in range(keys + 1, keys + count):
        first = min(first, m[at])
    while m[place] != first:
        place += 1
    return first, m[place + count]
