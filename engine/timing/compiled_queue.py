"""The queue of a lane, compiled: in order, as work becomes ready, or by rank; and what is woken when work has ended."""

from __future__ import annotations

import numpy as np

from ...resources.timeline import DECOMPRESS
from .compiled_agenda import goes_on, reschedule, wake, wake_at
from .compiled_work import (
    Word,
    Words,
    compiled,
    copied_works,
    drop_node,
    drop_works,
    hold,
    let_go,
    node_before,
    settle,
    wait_for,
)
from .memory import (
    A_DEPARTURE,
    A_LANE,
    A_THREAD,
    A_WORK,
    AN_ARRIVAL,
    AS_READY,
    BY_RANK,
    DROPPED,
    DROPPED_WORDS,
    G_DROPS_STALE,
    G_NUMBER,
    G_VISIT,
    L_ACTIVE,
    L_AFTER_OTHER,
    L_ENTERING,
    L_ENTERS,
    L_FIRST,
    L_FREE,
    L_GAP,
    L_GPU,
    L_KIND,
    L_LAST,
    L_LAST_ENTERING,
    L_NEXT,
    L_OPEN,
    L_ORDERED,
    N_NEXT,
    N_WHAT,
    N_WHO,
    NEVER,
    NOW,
    NUMBER,
    R_AT,
    R_COUNT,
    W_AFTER,
    W_CANCELLED,
    W_COPY,
    W_END,
    W_EXPERT,
    W_HELD_BACK,
    W_ISSUED,
    W_KIND,
    W_LANE,
    W_LEFT,
    W_NEXT,
    W_NS,
    W_NUMBER,
    W_PIECES,
    W_RANK,
    W_REGISTER,
    W_STARTED,
    W_TARGET,
    W_WAITING,
)

# What a lane starts next.


@compiled
def take_out(m: Words, lane: Word, work: Word, before: Word) -> None:
    """Take work out of a queue, behind other work or, if that is -1, at its head."""
    following = m[work + W_NEXT]
    if before >= 0:
        m[before + W_NEXT] = following
    else:
        m[lane + L_FIRST] = following
    if m[lane + L_LAST] == work:
        m[lane + L_LAST] = before


@compiled
def last_cause(m: Words, work: Word) -> Word:
    """Returns when the last of what work waits for has ended; 0 if it waits for nothing, -1 if one has not ended."""
    last: Word = 0
    node = m[work + W_AFTER]
    while node >= 0:
        ended = m[m[node + N_WHAT] + W_END]
        if ended < 0:
            return np.int64(-1)
        last = max(last, ended)
        node = m[node + N_NEXT]
    return last


@compiled
def ready_at(issued: Word, last: Word, after_other: Word) -> Word:
    """Returns when work may start, so long behind the last of its causes; 0 stands for none."""
    return max(issued, last + after_other) if last else issued


@compiled
def waits_for_cause(m: Words, lane: Word, work: Word) -> None:
    """Let the lane be told when the first of what work waits for, that has not ended, does."""
    node = m[work + W_AFTER]
    while m[m[node + N_WHAT] + W_END] >= 0:
        node = m[node + N_NEXT]
    wait_for(m, m[node + N_WHAT], A_LANE, lane)


@compiled
def look(m: Words, lane: Word) -> None:
    """Let an idle lane try to start work when it may start: at once, later, or when something has ended.

    Where nothing that still comes at this instant can change which work is next, that is known now.
    """
    if m[lane + L_OPEN]:
        wake(m, lane)
        return
    if m[lane + L_NEXT] < 0:
        m[lane + L_NEXT] = m[lane + L_FIRST]
        take_out(m, lane, m[lane + L_NEXT], np.int64(-1))
    work = m[lane + L_NEXT]
    last = last_cause(m, work)
    if last < 0:
        waits_for_cause(m, lane, work)
        return
    ready = ready_at(m[work + W_ISSUED], last, m[lane + L_AFTER_OTHER])
    wake_at(m, lane, max(ready, m[lane + L_FREE] + m[lane + L_GAP]))


# Joining.


@compiled
def joins_now(m: Words, work: Word) -> Word:
    """Whether all that work waits for has ended; if not, it joins its queue when it has."""
    node = m[work + W_AFTER]
    while node >= 0:
        if m[m[node + N_WHAT] + W_END] < 0:
            wait_for(m, m[node + N_WHAT], A_WORK, work)
            return False
        node = m[node + N_NEXT]
    return True


@compiled
def append(m: Words, lane: Word, work: Word) -> None:
    """Put work at the end of a queue."""
    m[work + W_NEXT] = -1
    if m[lane + L_LAST] >= 0:
        m[m[lane + L_LAST] + W_NEXT] = work
    else:
        m[lane + L_FIRST] = work
    m[lane + L_LAST] = work
    if m[lane + L_ACTIVE] < 0 and m[lane + L_NEXT] < 0:
        look(m, lane)


@compiled
def enters_at(m: Words, lane: Word) -> None:
    """Note when the first of what will enter a lane's queue does."""
    work = m[lane + L_ENTERING]
    m[lane + L_ENTERS] = max(m[NOW], m[work + W_ISSUED]) if work >= 0 else NEVER
    reschedule(m, lane)


@compiled
def will_enter(m: Words, lane: Word, work: Word) -> None:
    """Let work join a queue by rank when it is issued."""
    before, following = m[lane + L_LAST_ENTERING], np.int64(-1)
    if before >= 0 and m[before + W_ISSUED] > m[work + W_ISSUED]:
        before, following = np.int64(-1), m[lane + L_ENTERING]
        while m[following + W_ISSUED] <= m[work + W_ISSUED]:
            before, following = following, m[following + W_NEXT]
    m[work + W_NEXT] = following
    if before >= 0:
        m[before + W_NEXT] = work
    else:
        m[lane + L_ENTERING] = work
        enters_at(m, lane)
    if following < 0:
        m[lane + L_LAST_ENTERING] = work


@compiled
def submit(m: Words, lane: Word, work: Word) -> None:
    """Queue work; the lane looks at it once nothing else happens at this instant."""
    m[work + W_LANE] = lane
    hold(m, work)
    m[lane + L_ORDERED] += m[work + W_NS]
    if m[lane + L_KIND] == BY_RANK:
        m[NUMBER] += 1
        m[work + W_NUMBER] = m[NUMBER]
        if not m[work + W_HELD_BACK] or joins_now(m, work):
            will_enter(m, lane, work)
    elif m[lane + L_KIND] != AS_READY or joins_now(m, work):
        append(m, lane, work)


@compiled
def enter(m: Words, lane: Word) -> None:
    """Let work that is issued now join a queue by rank."""
    work = m[lane + L_ENTERING]
    m[lane + L_ENTERING] = m[work + W_NEXT]
    if m[lane + L_ENTERING] < 0:
        m[lane + L_LAST_ENTERING] = -1
    enters_at(m, lane)
    append(m, lane, work)


@compiled
def join_queue(m: Words, work: Word) -> None:
    """Let work join its queue, all that it waits for having ended."""
    lane = m[work + W_LANE]
    if m[lane + L_KIND] == BY_RANK:
        will_enter(m, lane, work)
    else:
        append(m, lane, work)


# Leaving.


@compiled
def precedes(m: Words, one: Word, other: Word) -> Word:
    """Whether one piece of work goes before another."""
    if m[one + W_RANK] != m[other + W_RANK]:
        return m[one + W_RANK] < m[other + W_RANK]
    if m[one + W_TARGET] != m[other + W_TARGET]:
        return m[one + W_TARGET] < m[other + W_TARGET]
    return m[one + W_NUMBER] < m[other + W_NUMBER]


@compiled
def is_stale(m: Words, lane: Word, work: Word) -> Word:
    """Whether a queued prefetch's target has been dispatched without it; if so, note that it is dropped."""
    if m[work + W_RANK] == 0 or m[work + W_STARTED]:
        return False
    gpu = m[lane + L_GPU]
    if not m[gpu + G_DROPS_STALE]:
        return False
    if m[work + W_TARGET] >= m[gpu + G_VISIT]:
        return False
    region = m[DROPPED]
    at = m[region + R_AT] + m[region + R_COUNT] * DROPPED_WORDS
    m[at], m[at + 1], m[at + 2] = m[gpu + G_NUMBER], m[work + W_EXPERT], m[work + W_COPY]
    m[region + R_COUNT] += 1
    return True


@compiled
def finish(m: Words, work: Word) -> None:
    """Say that work has ended, to all who wait for it: what is sent to another GPU arrives later by its number."""
    m[work + W_END] = m[NOW]
    sent = work
    while sent >= 0:
        arrival, node = np.int64(-1), m[sent + W_WAITING]
        m[sent + W_WAITING] = -1
        while node >= 0:
            what, who = m[node + N_WHAT], m[node + N_WHO]
            node = drop_node(m, node)
            if who == A_LANE:
                look(m, what)
            elif who == A_THREAD:
                goes_on(m, what, m[NOW])
            elif who == A_WORK:
                if joins_now(m, what):
                    join_queue(m, what)
            else:
                arrival = what
                m[arrival + W_END] = m[NOW] + (m[sent + W_NUMBER] if who == AN_ARRIVAL else 0)
        if m[sent + W_REGISTER] >= 0:
            settle(m, m[sent + W_REGISTER])
        if m[sent + W_LEFT] >= 0:
            settle(m, m[sent + W_LEFT])
        if sent != work:
            let_go(m, sent)
        sent = arrival
    drop_works(m, m[work + W_AFTER])
    m[work + W_AFTER] = -1
    let_go(m, work)


@compiled
def depart(m: Words, work: Word) -> None:
    """Let what stands for a copy's leaving its room in host memory end, if anything does: the copy is given up."""
    node, before = m[work + W_WAITING], np.int64(-1)
    while node >= 0 and m[node + N_WHO] != A_DEPARTURE:
        before, node = node, m[node + N_NEXT]
    if node < 0:
        return
    leaving = m[node + N_WHAT]
    following = drop_node(m, node)
    if before >= 0:
        m[before + N_NEXT] = following
    else:
        m[work + W_WAITING] = following
    finish(m, leaving)


@compiled
def choose(m: Words, lane: Word) -> Word:
    """Take the next work off the queue; whether there is any."""
    while m[lane + L_FIRST] >= 0:
        best, before_best = m[lane + L_FIRST], np.int64(-1)
        if m[lane + L_KIND] == BY_RANK:
            before, work = best, m[best + W_NEXT]
            while work >= 0:
                if precedes(m, work, best):
                    best, before_best = work, before
                before, work = work, m[work + W_NEXT]
        take_out(m, lane, best, before_best)
        if m[lane + L_KIND] == BY_RANK and (m[best + W_CANCELLED] or is_stale(m, lane, best)):
            m[best + W_CANCELLED] = 1
            depart(m, best)
            let_go(m, best)
            continue
        m[lane + L_NEXT] = best
        return True
    return False


# By rank: copies that are demanded, or not wanted any more, while they are queued.


@compiled
def promote(m: Words, work: Word, target: Word) -> None:
    """Give a queued copy a demand's rank, for all pieces that have not started yet."""
    later = m[work + W_RANK] > 0 or m[work + W_TARGET] > target
    if m[work + W_END] < 0 and later:
        m[work + W_RANK], m[work + W_TARGET] = 0, target
        m[NUMBER] += 1
        m[work + W_NUMBER] = m[NUMBER]


@compiled
def copy_in_queue(m: Words, work: Word, lane: Word) -> Word:
    """Returns the work if it is a copy of this queue, or the copy that it decompresses; else -1."""
    if m[work + W_LANE] == lane:
        return work
    node = m[work + W_AFTER]
    if node >= 0 and m[work + W_KIND] == DECOMPRESS and m[m[node + N_WHAT] + W_LANE] == lane:
        return m[node + N_WHAT]
    return np.int64(-1)


@compiled
def give_up(m: Words, lane: Word, last: Word) -> Word:
    """Begin no further piece of a copy whose room nobody has read; return what the room waits for, a list."""
    work = copy_in_queue(m, last, lane)
    if work >= 0:
        queued = m[work + W_END] < 0 and work != m[lane + L_ACTIVE] and work != m[lane + L_NEXT]
        if m[work + W_CANCELLED] or queued:
            m[work + W_CANCELLED] = 1
            depart(m, work)
            return np.int64(-1) if m[work + W_STARTED] else copied_works(m, m[work + W_AFTER], np.int64(-1))
        m[work + W_PIECES] = 1
    return node_before(m, hold(m, last), np.int64(-1))
