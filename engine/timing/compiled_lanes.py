"""Lanes, compiled: what `lanes` does with SimPy processes, over words of memory, to the same nanosecond.

At one instant what ends comes first, then engines are kept or left, host threads go on, and lanes start, each in the
order of creation, as there.
"""

from __future__ import annotations

import numpy as np

from .compiled_agenda import reschedule, wake
from .compiled_coupling import count_in_crowd, go_on, knows_rates, occupy, tell_neighbors
from .compiled_queue import append, choose, finish, last_cause, look, ready_at, waits_for_cause
from .compiled_work import Reals, Word, Words, compiled
from .memory import (
    BY_RANK,
    G_SPANS,
    IN_ORDER,
    L_ACTIVE,
    L_AFTER_ISSUE_DISTURBED,
    L_AFTER_OTHER,
    L_AFTER_OTHER_DISTURBED,
    L_BUSY,
    L_CROWD,
    L_DISTURBERS,
    L_END,
    L_FIRST,
    L_FREE,
    L_GAP,
    L_GAP_DISTURBED,
    L_GOES_ON,
    L_GPU,
    L_KEEPS,
    L_KIND,
    L_LEFT,
    L_LONGER,
    L_NEXT,
    L_NUMBER,
    L_ORDERED,
    L_SINCE,
    L_SLOT,
    L_START,
    L_STRETCH,
    L_TURNS,
    L_WAITS_FOR_ENGINE,
    L_WAKE,
    NEVER,
    NOW,
    R_AT,
    R_COUNT,
    RECORDS,
    SPAN_WORDS,
    W_ALONE,
    W_CANCELLED,
    W_COPY,
    W_EXPERT,
    W_GPU,
    W_ISSUED,
    W_KIND,
    W_NEXT,
    W_NS,
    W_PIECES,
    W_STARTED,
    W_TRANSFER,
    W_VISIT,
)


@compiled
def engine_is_busy(m: Words, lane: Word) -> Word:
    """Whether another lane has the engine that this one takes turns at."""
    others, busy = m[lane + L_TURNS], False
    for at in range(others + 1, others + 1 + m[others]):
        if m[m[at] + L_ACTIVE] >= 0 or m[m[at] + L_GOES_ON]:
            busy = True
    return busy


@compiled
def was_disturbed(m: Words, lane: Word, ready: Word) -> Word:
    """Whether a disturber was busy between the last cause of work and now, when it would start undisturbed."""
    caused = max(ready, m[lane + L_FREE])
    others = m[lane + L_DISTURBERS]
    for at in range(others + 1, others + 1 + m[others]):
        other = m[at]
        if m[other + L_FREE] > caused or (m[other + L_ACTIVE] >= 0 and m[other + L_END] > caused):
            return True
    return False


@compiled
def start(m: Words, f: Reals, lane: Word, work: Word, alone: Word) -> Word:
    """Start work on an idle lane, or behind other work; False if a rate is asked for that is not known."""
    slot, transfer = m[lane + L_SLOT], np.int64(-1)
    if slot >= 0 and m[work + W_TRANSFER] >= 0:
        transfer = 2 * m[work + W_TRANSFER] + np.int64(alone)
        if not knows_rates(m, slot, transfer):
            wake(m, lane)
            return False
    m[lane + L_NEXT], m[lane + L_GOES_ON], m[lane + L_ACTIVE] = -1, 0, work
    m[work + W_STARTED] = 1
    m[lane + L_ORDERED] -= m[work + W_NS]
    m[lane + L_START] = m[NOW]
    f[lane + L_LEFT] = m[work + W_ALONE] if alone else m[work + W_NS]
    if transfer >= 0:
        occupy(m, f, slot, transfer)
    if m[lane + L_CROWD] >= 0:
        count_in_crowd(m, f, lane, 1)
    tell_neighbors(m, f, lane)
    go_on(m, f, lane)
    return True


@compiled
def try_start(m: Words, f: Reals, lane: Word) -> Word:
    """Start the next work if it may start now; False if a rate is asked for that is not known."""
    now = m[NOW]
    m[lane + L_WAKE] = NEVER
    if m[lane + L_ACTIVE] >= 0 or (m[lane + L_NEXT] < 0 and not choose(m, lane)):
        reschedule(m, lane)
        return True
    work = m[lane + L_NEXT]
    last = last_cause(m, work)
    if last < 0:
        reschedule(m, lane)
        waits_for_cause(m, lane, work)
        return True
    if engine_is_busy(m, lane):
        reschedule(m, lane)
        m[lane + L_WAITS_FOR_ENGINE] = 1
        return True
    ready = ready_at(m[work + W_ISSUED], last, m[lane + L_AFTER_OTHER])
    following = m[lane + L_FREE] + m[lane + L_GAP]
    begins = max(ready, following)
    if begins <= now and m[lane + L_LONGER] and was_disturbed(m, lane, max(m[work + W_ISSUED], last)):
        issued = m[work + W_ISSUED] + m[lane + L_AFTER_ISSUE_DISTURBED]
        ready = ready_at(issued, last, m[lane + L_AFTER_OTHER_DISTURBED])
        following = m[lane + L_FREE] + m[lane + L_GAP_DISTURBED]
    begins = max(begins, ready, following)
    if begins > now:
        m[lane + L_WAKE] = begins
        reschedule(m, lane)
        return True
    return start(m, f, lane, work, ready > following)


@compiled
def record_span(
    m: Words, gpu: Word, begin: Word, until: Word, issued: Word, expert: Word, visit: Word, copy: Word, lane: Word,
    kind: Word,
) -> None:  # fmt: skip
    """Record a span of a GPU, in the words of `resources.timeline.SPAN`."""
    region = m[gpu + G_SPANS]
    at = m[region + R_AT] + m[region + R_COUNT] * SPAN_WORDS
    low = np.int64(0xFFFFFFFF)
    m[at], m[at + 1], m[at + 2] = begin, until, issued
    m[at + 3] = (expert & low) | (visit << 32)
    m[at + 4] = (copy & low) | (lane << 32) | (kind << 48)
    m[region + R_COUNT] += 1
    m[RECORDS] = max(m[RECORDS], m[region + R_COUNT])


@compiled
def end(m: Words, f: Reals, lane: Word) -> Word:
    """End the active work; False if a rate is asked for that is not known."""
    now, work, slot = m[NOW], m[lane + L_ACTIVE], m[lane + L_SLOT]
    moves = slot >= 0 and m[work + W_TRANSFER] >= 0
    if moves and not knows_rates(m, slot, -1):
        return False
    m[lane + L_ACTIVE], m[lane + L_END], m[lane + L_FREE] = -1, NEVER, now
    m[lane + L_BUSY] += now - m[lane + L_START]
    if moves:
        occupy(m, f, slot, -1)
    if m[lane + L_CROWD] >= 0:
        count_in_crowd(m, f, lane, -1)
    turns = m[lane + L_TURNS]
    for at in range(turns + 1, turns + 1 + m[turns]):
        m[m[at] + L_FREE] = now
    gpu = m[lane + L_GPU]
    record_span(
        m, gpu if gpu >= 0 else m[work + W_GPU], m[lane + L_START], now, m[work + W_ISSUED], m[work + W_EXPERT],
        m[work + W_VISIT], m[work + W_COPY], m[lane + L_NUMBER], m[work + W_KIND],
    )  # fmt: skip
    if m[work + W_PIECES] > 1:
        m[work + W_PIECES] -= 1
        append(m, lane, work)
    else:
        finish(m, work)
    tell_neighbors(m, f, lane)
    if m[turns]:
        m[lane + L_GOES_ON], m[lane + L_KEEPS] = 1, now
    reschedule(m, lane)
    if not m[turns] and m[lane + L_NEXT] < 0 and m[lane + L_FIRST] >= 0:
        look(m, lane)
    return True


@compiled
def keep_engine(m: Words, lane: Word) -> None:
    """Say whether an engine stays with a lane: if its next work may start as soon as the gap has passed."""
    m[lane + L_KEEPS] = NEVER
    reschedule(m, lane)
    following, stays = m[lane + L_FIRST], False
    if following >= 0:
        wake(m, lane)
        if m[lane + L_KIND] != BY_RANK:
            last = last_cause(m, following)
            by = m[NOW] + m[lane + L_GAP]
            stays = last >= 0 and ready_at(m[following + W_ISSUED], last, m[lane + L_AFTER_OTHER]) <= by
    m[lane + L_GOES_ON] = np.int64(stays)
    if stays:
        return
    others = m[lane + L_TURNS]
    for at in range(others + 1, others + 1 + m[others]):
        if m[m[at] + L_WAITS_FOR_ENGINE]:
            m[m[at] + L_WAITS_FOR_ENGINE] = 0
            wake(m, m[at])


@compiled
def backlog(m: Words, f: Reals, lane: Word) -> Word:
    """Returns the undisturbed work that is queued or running on a lane now, in ns."""
    total, active, work = np.int64(0), m[lane + L_ACTIVE], m[lane + L_NEXT]
    if active >= 0:
        done = (m[NOW] - m[lane + L_SINCE]) / f[lane + L_STRETCH]
        total += max(np.int64(0), np.int64(np.rint(f[lane + L_LEFT] - done)))
        total += m[active + W_NS] * (m[active + W_PIECES] - 1)
    if m[lane + L_GPU] < 0 or m[lane + L_KIND] == IN_ORDER:  # GPUs share it, or all that is ordered is queued
        return total + m[lane + L_ORDERED]
    if work >= 0:
        total += m[work + W_NS] * m[work + W_PIECES]
    work = m[lane + L_FIRST]
    while work >= 0:
        if not m[work + W_CANCELLED]:
            total += m[work + W_NS] * m[work + W_PIECES]
        work = m[work + W_NEXT]
    return total
