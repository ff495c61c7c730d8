"""The clock that drives all, compiled: what comes next, lane by lane and thread by thread."""

from __future__ import annotations

import numpy as np

from .compiled_agenda import ALL, ENDS, ENTERS, GOES_ON, KEEPS, KIND_BITS, STARTS, next_event, rests
from .compiled_host import SHORT, carry_out, end_part, wake_parts
from .compiled_lanes import backlog, end, keep_engine, try_start
from .compiled_prices import prepare
from .compiled_queue import enter
from .compiled_work import Reals, Word, Words, compiled, entry
from .memory import (
    ARRIVALS,
    DONE,
    DROPPED,
    G_H2D,
    G_PREFETCH,
    GPUS,
    NEVER,
    NODES_COMMAND,
    NODES_EACH,
    NODES_LEFT,
    NOW,
    PORTION,
    R_CAPACITY,
    R_COUNT,
    RATE,
    RECORD_ROOM,
    RECORDS,
    RESUMES,
    SPACE,
    T_AT,
    T_COUNT,
    T_PART_OF,
    WORK_EACH,
    WORK_LEFT,
)


@compiled
def has_room(m: Words, region: Word, more: Word) -> Word:
    """Whether a region has room for so many more records."""
    return m[region + R_COUNT] + more < m[region + R_CAPACITY]


@compiled
def has_space(m: Words, thread: Word) -> Word:
    """Whether there is room for all that a thread's portion may take and record."""
    gpus = m[m[GPUS]]
    more = 8 + m[thread + T_COUNT] + gpus * gpus
    return (
        m[RECORDS] + more < m[RECORD_ROOM]
        and has_room(m, m[ARRIVALS], more)
        and has_room(m, m[DROPPED], 1)
        and m[WORK_LEFT] > WORK_EACH * more
        and m[NODES_LEFT] > NODES_EACH * more + m[NODES_COMMAND]
    )


@compiled
def has_space_for_event(m: Words) -> Word:
    """Whether there is room for what a lane records at any one event, and for it to wait for something."""
    return m[RECORDS] + 8 < m[RECORD_ROOM] and m[NODES_LEFT] > 8 * NODES_EACH


@entry
def backlogs(m: Words, f: Reals, gpu: Word) -> Word:
    """Returns the copy time that is queued on a GPU's link now, in ns."""
    first, second = m[gpu + G_H2D], m[gpu + G_PREFETCH]
    return backlog(m, f, first) + (backlog(m, f, second) if second != first else 0)


@entry
def advance(m: Words, f: Reals, thread: Word) -> tuple[Word, Word]:
    """Go on until something is asked for: return what (see `memory`), and by which thread, if it is one's.

    `thread` has a new portion, which it carries out first; -1 where there is none.
    """
    if thread >= 0:
        if not has_space(m, thread):
            return SPACE, thread
        asked = prepare(m, thread)
        if asked >= 0:
            return asked, thread
        done = carry_out(m, f, thread)
        if done == SHORT:
            m[RESUMES] = thread
        elif done:
            return PORTION, thread
    while True:
        where, at, kind = m[RESUMES], m[NOW], np.int64(GOES_ON)
        resumes = where >= 0
        if not resumes:
            first, where = next_event(m)
            at, kind = first >> KIND_BITS, first & ALL
        if at >= NEVER:
            return DONE, np.int64(-1)
        if not (has_space(m, where) if kind == GOES_ON else has_space_for_event(m)):
            return SPACE, np.int64(-1)
        m[NOW] = at
        if kind == ENDS:
            if not end(m, f, where):
                return RATE, np.int64(-1)
        elif kind == ENTERS:
            enter(m, where)
        elif kind == KEEPS:
            keep_engine(m, where)
        elif kind == STARTS:
            if not try_start(m, f, where):
                return RATE, np.int64(-1)
        else:
            before = np.int64(-1)
            if not resumes:
                rests(m, where)
                before = m[where + T_AT]
            done = carry_out(m, f, where)
            m[RESUMES] = where if done == SHORT else -1
            if done == SHORT:
                continue
            if m[where + T_PART_OF] >= 0:
                if m[where + T_AT] > before:
                    wake_parts(m)
                if done:
                    end_part(m, where)
            elif done:
                return PORTION, where
