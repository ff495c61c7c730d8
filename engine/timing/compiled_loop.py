"""The compiled loop: lanes and host threads run until a decision is due, compiled code decides, and they go on.

Python is asked for what compiled code does not know: a price, a rate, the next steps, more room.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from ...machine_code import compiled_once
from ..decide.compiled_memory import cancel
from ..decide.compiled_program import next_portion
from ..decide.compiled_shared import next_shared_portion
from ..decide.decision_words import (
    ADAPTIVE_LINK,
    COST_AWARE,
    D_ASSIGNED,
    D_BACKLOG,
    D_BUDGET,
    D_NOW,
    D_PREFETCH,
    DECIDED,
    END,
    H_EXCHANGE_NS,
    H_SHARES,
    H_UNTIL,
    TYPES,
    Tables,
)
from ..decide.decision_words import ROOM as NO_ROOM
from ..decide.decision_words import STEPS as NO_STEPS
from .compiled_clock import advance, backlogs
from .compiled_launch import end_busy
from .compiled_prices import COLUMNS, ROW_WORDS
from .compiled_work import Reals, Word, Words
from .memory import (
    DROPPED,
    DROPPED_WORDS,
    G_ASSIGNED,
    G_BUDGET,
    G_EXCHANGE_NS,
    G_NOW,
    G_PART,
    GPUS,
    PORTION,
    R_AT,
    R_COUNT,
    ROOM,
    STEPS,
    T_AT,
    T_COUNT,
    T_GPUS,
    T_PROGRAM,
    T_ROWS,
)

compiled = partial(compiled_once, types=TYPES, error_model="numpy", _nrt=False)
#: Those that Python calls.
entry = partial(compiled, entry=True)


@compiled
def cancel_dropped(t: Tables, m: Words) -> None:
    """Take back the rooms of the prefetches that were dropped since the last decision."""
    region = m[DROPPED]
    for number in range(m[region + R_COUNT]):
        at = m[region + R_AT] + number * DROPPED_WORDS
        cancel(t, m[m[m[GPUS] + 1 + m[at]] + G_PART], m[at + 1], m[at + 2])
    m[region + R_COUNT] = 0


@compiled
def end_thread(m: Words, thread: Word) -> None:
    """Let a thread do no more."""
    gpus = m[thread + T_GPUS]
    for at in range(gpus + 1, gpus + 1 + m[gpus]):
        end_busy(m, m[at])
    m[thread + T_COUNT], m[thread + T_AT] = 0, 0


@compiled
def take_portion(t: Tables, m: Words, thread: Word) -> None:
    """Give a thread its portion, with what the machine has to know of the visits that it came of."""
    d, rows, count = t.words, t.rows, t.rows[0, 0]
    to = m[thread + T_ROWS]
    for row in range(1, count + 1):
        for column in range(COLUMNS):
            m[to + column] = rows[row, column]
        to += ROW_WORDS
    m[thread + T_COUNT], m[thread + T_AT] = count, 0
    gpus = m[thread + T_GPUS]
    for at in range(gpus + 1, gpus + 1 + m[gpus]):
        g = m[m[at] + G_PART]
        m[m[at] + G_ASSIGNED], m[m[at] + G_BUDGET] = d[g + D_ASSIGNED], d[g + D_BUDGET]
        m[m[at] + G_EXCHANGE_NS] = d[m[thread + T_PROGRAM] + H_EXCHANGE_NS]


@compiled
def tell_clock(t: Tables, m: Words, f: Reals, thread: Word) -> None:
    """Let policies and schedulers that look at the clock see what it is at each GPU of a thread."""
    d, gpus, known = t.words, m[thread + T_GPUS], t.words[m[thread + T_PROGRAM] + H_UNTIL]
    for at in range(gpus + 1, gpus + 1 + m[gpus]):
        g = m[m[at] + G_PART]
        if d[g + D_PREFETCH] == COST_AWARE or d[g + D_PREFETCH] == ADAPTIVE_LINK:
            d[g + D_NOW], d[g + D_BACKLOG] = m[m[at] + G_NOW], backlogs(m, f, m[at])
        elif known:
            d[g + D_NOW] = m[m[at] + G_NOW]


@compiled
def decide_portion(t: Tables, m: Words, f: Reals, thread: Word) -> Word:
    """Decide a thread's next portion now; return what comes of it (see `decision_words`)."""
    if m[m[DROPPED] + R_COUNT]:
        cancel_dropped(t, m)
    tell_clock(t, m, f, thread)
    program = m[thread + T_PROGRAM]
    what = next_shared_portion(t, program) if t.words[program + H_SHARES] else next_portion(t, program)
    if what == DECIDED:
        take_portion(t, m, thread)
    return what


@entry
def carry_on(t: Tables, m: Words, f: Reals, thread: Word, due: Word) -> tuple[Word, Word]:
    """Go on until something is asked for: return what (see `memory`), and by which thread, if it is one's.

    `thread` has a new portion, which it carries out first, or its next decision is due; -1 where there is none.
    """
    while True:
        if not due:
            why, thread = advance(m, f, thread)
            if why != PORTION:
                return why, thread
        due = 0
        what = decide_portion(t, m, f, thread)
        if what == NO_STEPS:
            return np.int64(STEPS), thread
        if what == NO_ROOM:
            return np.int64(ROOM), thread
        if what == END:
            end_thread(m, thread)
            thread = np.int64(-1)
