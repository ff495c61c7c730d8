"""Lanes, compiled: what `lanes` does with SimPy processes, over words of memory, to the same nanosecond.

At one instant what ends comes first, then engines are kept or left, host threads go on, and lanes start, each in the
order of creation, as there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ... import machine_code
from .memory import (
    A_DEPARTURE,
    A_LANE,
    A_THREAD,
    A_WORK,
    AN_ARRIVAL,
    AS_READY,
    ASKED,
    ASKED_FOR,
    BY_RANK,
    CROWD_BUSY,
    CROWD_LANES,
    CROWD_TIMES,
    DROPPED,
    DROPPED_WORDS,
    FREE_NODE,
    FREE_WORK,
    G_DROPS_STALE,
    G_NUMBER,
    G_SPANS,
    G_VISIT,
    L_ACTIVE,
    L_AFTER_ISSUE_DISTURBED,
    L_AFTER_OTHER,
    L_AFTER_OTHER_DISTURBED,
    L_CROWD,
    L_DISTURBERS,
    L_END,
    L_ENTERING,
    L_FIRST,
    L_FREE,
    L_GAP,
    L_GAP_DISTURBED,
    L_GOES_ON,
    L_GPU,
    L_KEEPS,
    L_KIND,
    L_LAST,
    L_LAST_ENTERING,
    L_LEFT,
    L_LONGER,
    L_NEIGHBORS,
    L_NEXT,
    L_NUMBER,
    L_SHARING,
    L_SHARING_FACTOR,
    L_SINCE,
    L_SLOT,
    L_SLOWED_BY,
    L_START,
    L_STRETCH,
    L_TURNS,
    L_WAITS_FOR_ENGINE,
    L_WAKE,
    N_NEXT,
    N_WHAT,
    N_WHO,
    NEVER,
    NODES_LEFT,
    NOW,
    NUMBER,
    R_AT,
    R_COUNT,
    RATE_ROWS,
    RATE_WORDS,
    RATES,
    RECORDS,
    REGISTERS,
    S_GROUP,
    S_LANE,
    S_MOVING,
    S_STRETCH,
    SPAN_WORDS,
    T_GOES_ON,
    V_GROUP,
    V_MOVING,
    W_AFTER,
    W_ALONE,
    W_CANCELLED,
    W_COPY,
    W_END,
    W_EXPERT,
    W_HELD_BACK,
    W_ISSUED,
    W_KIND,
    W_LANE,
    W_NEXT,
    W_NS,
    W_NUMBER,
    W_PIECES,
    W_RANK,
    W_REFERENCES,
    W_SLOWDOWN,
    W_STARTED,
    W_TARGET,
    W_TRANSFER,
    W_VISIT,
    W_WAITING,
    WORK_LEFT,
)  # fmt: skip

Words = npt.NDArray[Any]
#: A word of memory, and one that is read as a float (see `machine_code`).
Word = Any
Real = Any
Reals = npt.NDArray[Any]

_FNV_START, _FNV_STEP = np.uint64(14695981039346656037), np.uint64(1099511628211)

#: Addresses are checked nowhere, and none of these makes an array: Numba need not count who holds which.
compiled = partial(machine_code.compiled_once, error_model="numpy", _nrt=False)


# Lists and work.


@compiled
def node_before(m: Words, what: Word, following: Word) -> Word:
    """Returns a new node before another."""
    node = m[FREE_NODE]
    m[FREE_NODE] = m[node + N_NEXT]
    m[NODES_LEFT] -= 1
    m[node + N_WHAT], m[node + N_NEXT] = what, following
    return node


@compiled
def drop_node(m: Words, node: Word) -> Word:
    """Free a node; return the next one."""
    following = m[node + N_NEXT]
    m[node + N_NEXT] = m[FREE_NODE]
    m[FREE_NODE] = node
    m[NODES_LEFT] += 1
    return following


@compiled
def wait_for(m: Words, work: Word, who: Word, what: Word) -> None:
    """Let somebody, of a kind, be told when work ends."""
    node = node_before(m, what, m[work + W_WAITING])
    m[node + N_WHO] = who
    m[work + W_WAITING] = node


@compiled
def hold(m: Words, work: Word) -> Word:
    """Note that somebody may ask for this work; return it."""
    m[work + W_REFERENCES] += 1
    return work


@compiled
def let_go(m: Words, work: Word) -> None:
    """Note that one fewer asks for it; work that nobody asks for is free, and what it was behind may be."""
    m[work + W_REFERENCES] -= 1
    if m[work + W_REFERENCES]:
        return
    m[work + W_NEXT] = -1
    free = work
    while free >= 0:
        work = free
        free = m[work + W_NEXT]
        node = m[work + W_AFTER]
        while node >= 0:
            cause = m[node + N_WHAT]
            node = drop_node(m, node)
            m[cause + W_REFERENCES] -= 1
            if m[cause + W_REFERENCES] == 0:
                m[cause + W_NEXT] = free
                free = cause
        m[work + W_NEXT] = m[FREE_WORK]
        m[FREE_WORK] = work
        m[WORK_LEFT] += 1


@compiled
def drop_works(m: Words, node: Word) -> None:
    """Free a list of work."""
    while node >= 0:
        work = m[node + N_WHAT]
        node = drop_node(m, node)
        let_go(m, work)


@compiled
def copied_works(m: Words, node: Word, following: Word) -> Word:
    """Returns a copy of a list of work before another list."""
    while node >= 0:
        following = node_before(m, hold(m, m[node + N_WHAT]), following)
        node = m[node + N_NEXT]
    return following


@compiled
def set_register(m: Words, register: Word, work: Word) -> None:
    """Let a register stand for one piece of work."""
    at = m[REGISTERS] + register
    old = m[at]
    m[at] = node_before(m, hold(m, work), -1)
    drop_works(m, old)


@compiled
def join_register(m: Words, register: Word, work: Word) -> None:
    """Let a register stand for a piece of work, too; of what has ended it keeps the last."""
    at = m[REGISTERS] + register
    last, kept, node = -1, node_before(m, hold(m, work), -1), m[at]
    while node >= 0:
        other = m[node + N_WHAT]
        node = drop_node(m, node)
        if m[other + W_END] < 0:
            kept = node_before(m, other, kept)
        elif last < 0 or m[other + W_END] > m[last + W_END]:
            if last >= 0:
                let_go(m, last)
            last = other
        else:
            let_go(m, other)
    m[at] = node_before(m, last, kept) if last >= 0 else kept


# Who changes whom.


@compiled
def disturbed(m: Words, lane: Word) -> Word:
    """Whether one of the disturbers is busy now."""
    others, busy = m[lane + L_DISTURBERS], False
    for at in range(others + 1, others + 1 + m[others]):
        if m[m[at] + L_ACTIVE] >= 0:
            busy = True
    return busy


@compiled
def stretch_of(m: Words, f: Reals, lane: Word) -> Word:
    """Returns how many times as long the active work takes now."""
    stretch = 1.0
    others = m[lane + L_SHARING]
    for at in range(others + 1, others + 1 + m[others]):
        if m[m[at] + L_ACTIVE] >= 0:
            stretch += 1.0
    if stretch != 1.0:
        stretch *= f[lane + L_SHARING_FACTOR]
    slot = m[lane + L_SLOT]
    if slot >= 0:
        stretch *= f[slot + S_STRETCH]
    crowd = m[lane + L_CROWD]
    if crowd >= 0:
        stretch *= f[crowd + CROWD_TIMES + m[crowd + CROWD_BUSY]]
    slowdown = f[m[lane + L_ACTIVE] + W_SLOWDOWN]
    if slowdown != 1.0 and disturbed(m, lane):
        stretch *= slowdown
    others = m[lane + L_SLOWED_BY]
    for at in range(others + 1, others + 1 + 2 * m[others], 2):
        if m[m[at] + L_ACTIVE] >= 0:
            stretch *= f[at + 1]
    return stretch


@compiled
def go_on(m: Words, f: Reals, lane: Word) -> None:
    """Let the active work go on from now at the speed that the others leave it."""
    f[lane + L_STRETCH] = stretch_of(m, f, lane)
    m[lane + L_SINCE] = m[NOW]
    m[lane + L_END] = m[NOW] + np.int64(np.rint(f[lane + L_LEFT] * f[lane + L_STRETCH]))


@compiled
def retime(m: Words, f: Reals, lane: Word) -> None:
    """Let work in progress go on at another speed, unless it ends at this instant."""
    if m[lane + L_ACTIVE] >= 0 and m[lane + L_END] > m[NOW]:
        done = (m[NOW] - m[lane + L_SINCE]) / f[lane + L_STRETCH]
        f[lane + L_LEFT] = max(0.0, f[lane + L_LEFT] - done)
        go_on(m, f, lane)


@compiled
def tell_neighbors(m: Words, f: Reals, lane: Word) -> None:
    """Let all go on that a lane's start or end has to do with."""
    others = m[lane + L_NEIGHBORS]
    for at in range(others + 1, others + 1 + m[others]):
        retime(m, f, m[at])


@compiled
def count_in_crowd(m: Words, f: Reals, lane: Word, more: Word) -> None:
    """Count a lane into its crowd, or out; the others go on at another speed, if that changes it."""
    crowd = m[lane + L_CROWD]
    before = f[crowd + CROWD_TIMES + m[crowd + CROWD_BUSY]]
    m[crowd + CROWD_BUSY] += more
    if m[crowd + CROWD_BUSY] == 0 or f[crowd + CROWD_TIMES + m[crowd + CROWD_BUSY]] == before:
        return
    others = m[crowd + CROWD_LANES]
    for at in range(others + 1, others + 1 + m[others]):
        if m[at] != lane:
            retime(m, f, m[at])


# The network: sets of transfers have rows of known stretches.


@compiled
def rate_row(m: Words, slot: Word, transfer: Word) -> Word:
    """Returns where the stretches with this transfer at a slot are, or belong."""
    group = m[slot + S_GROUP]
    count = m[group]
    mark = _FNV_START ^ np.uint64(group)
    for at in range(1, count + 1):
        place = m[group + at]
        moving = transfer if place == slot else m[place + S_MOVING]
        mark = (mark ^ np.uint64(moving + 1)) * _FNV_STEP
        mark ^= mark >> np.uint64(29)
    words, rows = m[RATE_WORDS], m[RATE_ROWS]
    number: Word = np.int64(mark % np.uint64(rows))
    while True:
        row = m[RATES] + number * words
        if not m[row + V_GROUP]:
            return row
        same = m[row + V_GROUP] == group
        for at in range(1, count + 1):
            place = m[group + at]
            if same and m[row + V_MOVING + at - 1] != (transfer if place == slot else m[place + S_MOVING]):
                same = False
        if same:
            return row
        number = number + 1 if number + 1 < rows else 0


@compiled
def knows_rates(m: Words, slot: Word, transfer: Word) -> Word:
    """Whether the stretches with this transfer at a slot are known; if not, note that they are asked for."""
    if m[rate_row(m, slot, transfer) + V_GROUP]:
        return True
    m[ASKED], m[ASKED_FOR] = slot, transfer
    return False


@compiled
def occupy(m: Words, f: Reals, slot: Word, transfer: Word) -> None:
    """Let a transfer take its part, or leave it (-1); all whose rate that changes go on at another speed."""
    group = m[slot + S_GROUP]
    values = rate_row(m, slot, transfer) + V_MOVING + m[group]
    m[slot + S_MOVING] = transfer
    for at in range(m[group]):
        place = m[group + 1 + at]
        if place == slot:
            f[slot + S_STRETCH] = f[values + at]
        elif f[place + S_STRETCH] != f[values + at]:
            f[place + S_STRETCH] = f[values + at]
            retime(m, f, m[place + S_LANE])


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
        m[lane + L_WAKE] = m[NOW]


# One lane.


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
    if following < 0:
        m[lane + L_LAST_ENTERING] = work


@compiled
def submit(m: Words, lane: Word, work: Word) -> None:
    """Queue work; the lane looks at it once nothing else happens at this instant."""
    m[work + W_LANE] = lane
    hold(m, work)
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
    append(m, lane, work)


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
    gpu = m[lane + L_GPU]
    if not m[gpu + G_DROPS_STALE] or m[work + W_RANK] == 0 or m[work + W_STARTED]:
        return False
    if m[work + W_TARGET] >= m[gpu + G_VISIT]:
        return False
    region = m[DROPPED]
    at = m[region + R_AT] + m[region + R_COUNT] * DROPPED_WORDS
    m[at], m[at + 1], m[at + 2] = m[gpu + G_NUMBER], m[work + W_EXPERT], m[work + W_COPY]
    m[region + R_COUNT] += 1
    return True


@compiled
def join_queue(m: Words, work: Word) -> None:
    """Let work join its queue, all that it waits for having ended."""
    lane = m[work + W_LANE]
    if m[lane + L_KIND] == BY_RANK:
        will_enter(m, lane, work)
    else:
        append(m, lane, work)


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
                m[what + L_WAKE] = m[NOW]
            elif who == A_THREAD:
                m[what + T_GOES_ON] = m[NOW]
            elif who == A_WORK:
                if joins_now(m, what):
                    join_queue(m, what)
            else:
                arrival = what
                m[arrival + W_END] = m[NOW] + (m[sent + W_NUMBER] if who == AN_ARRIVAL else 0)
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
            m[lane + L_WAKE] = m[NOW]
            return False
    m[lane + L_NEXT], m[lane + L_GOES_ON], m[lane + L_ACTIVE] = -1, 0, work
    m[work + W_STARTED] = 1
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
        return True
    work = m[lane + L_NEXT]
    last = last_cause(m, work)
    if last < 0:
        waits_for_cause(m, lane, work)
        return True
    if engine_is_busy(m, lane):
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
    m[RECORDS] += 1


@compiled
def end(m: Words, f: Reals, lane: Word) -> Word:
    """End the active work; False if a rate is asked for that is not known."""
    now, work, slot = m[NOW], m[lane + L_ACTIVE], m[lane + L_SLOT]
    moves = slot >= 0 and m[work + W_TRANSFER] >= 0
    if moves and not knows_rates(m, slot, -1):
        return False
    m[lane + L_ACTIVE], m[lane + L_END], m[lane + L_FREE] = -1, NEVER, now
    if moves:
        occupy(m, f, slot, -1)
    if m[lane + L_CROWD] >= 0:
        count_in_crowd(m, f, lane, -1)
    turns = m[lane + L_TURNS]
    for at in range(turns + 1, turns + 1 + m[turns]):
        m[m[at] + L_FREE] = now
    record_span(
        m, m[lane + L_GPU], m[lane + L_START], now, m[work + W_ISSUED], m[work + W_EXPERT], m[work + W_VISIT],
        m[work + W_COPY], m[lane + L_NUMBER], m[work + W_KIND],
    )  # fmt: skip
    if m[work + W_PIECES] > 1:
        m[work + W_PIECES] -= 1
        append(m, lane, work)
    else:
        finish(m, work)
    tell_neighbors(m, f, lane)
    if m[turns]:
        m[lane + L_GOES_ON], m[lane + L_KEEPS] = 1, now
    elif m[lane + L_FIRST] >= 0:
        m[lane + L_WAKE] = now
    return True


@compiled
def keep_engine(m: Words, lane: Word) -> None:
    """Say whether an engine stays with a lane: if its next work may start as soon as the gap has passed."""
    m[lane + L_KEEPS] = NEVER
    following, stays = m[lane + L_FIRST], False
    if following >= 0:
        m[lane + L_WAKE] = m[NOW]
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
            m[m[at] + L_WAKE] = m[NOW]


@compiled
def backlog(m: Words, f: Reals, lane: Word) -> Word:
    """Returns the undisturbed work that is queued or running on a lane now, in ns."""
    total, active, work = np.int64(0), m[lane + L_ACTIVE], m[lane + L_NEXT]
    if active >= 0:
        done = (m[NOW] - m[lane + L_SINCE]) / f[lane + L_STRETCH]
        total += max(np.int64(0), np.int64(np.rint(f[lane + L_LEFT] - done)))
        total += m[active + W_NS] * (m[active + W_PIECES] - 1)
    if work >= 0:
        total += m[work + W_NS] * m[work + W_PIECES]
    work = m[lane + L_FIRST]
    while work >= 0:
        if not m[work + W_CANCELLED]:
            total += m[work + W_NS] * m[work + W_PIECES]
        work = m[work + W_NEXT]
    return total


# The priority discipline's queue.


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
    if node >= 0 and m[m[work + W_LANE] + L_KIND] == AS_READY and m[m[node + N_WHAT] + W_LANE] == lane:
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
