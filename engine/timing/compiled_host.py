"""Host threads, compiled: what `host` does as a SimPy process, over words of memory."""

from __future__ import annotations

import numpy as np

from .compiled_agenda import goes_on
from .compiled_copies import copy, demand, do_without, leave, read, read_back, reclaim, swap
from .compiled_coupling import disturbed
from .compiled_launch import add_member, end_busy, launch, note, predict, reaches_end, take_launched
from .compiled_peers import exchange, move_expert, receive, send
from .compiled_prices import (
    C_EXTRA,
    C_OP,
    C_PEER,
    C_REGISTER,
    C_TOKENS,
    O_BEHIND,
    O_CALL,
    O_CATCH_UP,
    O_COPY,
    O_DECIDE,
    O_ENTER,
    O_EXCHANGE,
    O_EXIT,
    O_FETCH,
    O_HOLD,
    O_IDLE,
    O_JOIN,
    O_LAUNCH,
    O_LEAVE,
    O_MEMBER,
    O_NOTICE,
    O_OUTPUT,
    O_PART,
    O_PREDICT,
    O_PROMOTE,
    O_READ,
    O_READBACK,
    O_RECEIVE,
    O_RECLAIM,
    O_SCHEDULE,
    O_SEND,
    O_STORE,
    O_SWAP,
    O_TOUCH,
    O_TURN,
    O_VISIT,
    O_WAIT,
    ROW_WORDS,
    gpu_of,
)
from .compiled_work import Reals, Word, Words, causes_of, compiled, join_register, set_register
from .memory import (
    G_AFTER,
    G_ASSIGNED,
    G_BUDGET,
    G_BUSY_SINCE,
    G_CALLS,
    G_COPY_RESUME,
    G_D2H,
    G_DECISIONS,
    G_HELD,
    G_INTERRUPTED,
    G_LAST,
    G_LAST_KERNEL,
    G_LAUNCH,
    G_NOW,
    G_OTHERS_EVERY,
    G_OTHERS_NS,
    G_OWN_LAYER,
    G_OWN_STEP,
    G_QUEUED,
    G_READS_BACK,
    G_RESUME,
    G_SYNCHRONIZE,
    G_SYNCHRONIZE_BESIDE,
    G_THREAD,
    G_TURN,
    G_VISIT,
    GPUS,
    NODES_COMMAND,
    NODES_LEFT,
    NOW,
    T_AT,
    T_BEHIND,
    T_COUNT,
    T_GPU,
    T_GPUS,
    T_INSIDE,
    T_OUTSIDE,
    T_PART_OF,
    T_PARTS,
    T_ROWS,
    THREADS,
)

# Commands.


@compiled
def notice(m: Words, gpu: Word, row: Word) -> None:
    """Go on once the router's choice, or guesses, have been noticed."""
    beside = disturbed(m, m[gpu + G_D2H])
    m[gpu + G_NOW] += m[gpu + G_SYNCHRONIZE_BESIDE] if beside else m[gpu + G_SYNCHRONIZE]
    m[gpu + G_BUSY_SINCE] = m[gpu + G_NOW]
    if m[row + C_EXTRA] == 1:
        m[gpu + G_NOW] += m[gpu + G_COPY_RESUME] if m[row + C_TOKENS] else m[gpu + G_RESUME]
        return
    while m[gpu + G_QUEUED]:
        take_launched(m, gpu)


@compiled
def decide(m: Words, row: Word) -> None:
    """Note when the choice was known, and go on to what was decided by it."""
    gpu = gpu_of(m, row)
    note(m, m[gpu + G_DECISIONS], m[gpu + G_NOW], m[gpu + G_ASSIGNED], m[gpu + G_BUDGET])
    if m[gpu + G_READS_BACK]:
        m[gpu + G_NOW] += m[gpu + G_COPY_RESUME] if m[row + C_TOKENS] else m[gpu + G_RESUME]


@compiled
def begin_visit(m: Words, row: Word) -> None:
    """Begin a visit; at the first of a forward pass, what other work has taken holds up the first kernel."""
    gpu = gpu_of(m, row)
    m[gpu + G_VISIT] += 1
    m[gpu + G_NOW] += m[gpu + G_OWN_LAYER] + (m[gpu + G_OWN_STEP] if m[row + C_EXTRA] == 1 else 0)
    every = m[gpu + G_OTHERS_EVERY]
    if every and m[row + C_EXTRA]:
        due = (m[gpu + G_NOW] - m[gpu + G_INTERRUPTED]) // every
        m[gpu + G_INTERRUPTED] += due * every
        m[gpu + G_HELD] = due * m[gpu + G_OTHERS_NS]


@compiled
def idle_until(m: Words, gpu: Word, until: Word) -> None:
    """Let the host have nothing to do until an instant."""
    end_busy(m, gpu)
    m[gpu + G_NOW] = max(m[gpu + G_NOW], until)
    m[gpu + G_BUSY_SINCE] = m[gpu + G_NOW]


@compiled
def turn_to(m: Words, thread: Word, row: Word) -> None:
    """Let a thread that has worked elsewhere go on at this GPU."""
    gpu, at = gpu_of(m, row), m[thread + T_GPU]
    if at >= 0 and at != gpu:
        end_busy(m, at)
        m[gpu + G_BUSY_SINCE] = m[at + G_NOW]
        m[gpu + G_NOW] = m[at + G_NOW] + m[row + C_EXTRA] * m[gpu + G_TURN]
    m[thread + T_GPU] = gpu


@compiled
def catch_up(m: Words, thread: Word, row: Word) -> None:
    """Let the clock come up to the host's."""
    now = m[gpu_of(m, row) + G_NOW]
    if m[row + C_EXTRA] == 1:
        gpus = m[thread + T_GPUS]
        for at in range(gpus + 1, gpus + 1 + m[gpus]):
            now = min(now, m[m[at] + G_NOW])
    goes_on(m, thread, max(now, m[NOW]))


@compiled
def move_registers(m: Words, row: Word) -> Word:
    """Carry out a command that only moves what registers stand for; whether it is one."""
    op, register, gpu = m[row + C_OP], m[row + C_REGISTER], gpu_of(m, row)
    if op == O_WAIT:
        if register >= 0:
            m[gpu + G_AFTER] = causes_of(m, register, m[gpu + G_AFTER])
        m[gpu + G_CALLS] += m[row + C_EXTRA]
    elif op == O_RECLAIM:
        reclaim(m, row)
    elif op == O_TOUCH:
        set_register(m, register, m[gpu + G_LAST])
    elif op == O_JOIN:
        join_register(m, register, m[gpu + G_LAST])
    elif op == O_OUTPUT:
        set_register(m, register, m[gpu + G_LAST_KERNEL])
    elif op == O_LEAVE:
        leave(m, gpu, register)
    else:
        return False
    return True


@compiled
def is_behind(m: Words, thread: Word, row: Word) -> Word:
    """Whether the thread of another GPU has come so far in its part; if not, this one waits for it."""
    gpu, other = gpu_of(m, row), m[m[m[GPUS] + 1 + m[row + C_PEER]] + G_THREAD]
    if m[other + T_AT] < m[row + C_EXTRA]:
        m[thread + T_BEHIND] = 1
        return False
    if m[thread + T_BEHIND]:
        m[thread + T_BEHIND] = 0
        m[gpu + G_NOW] = max(m[gpu + G_NOW], m[NOW])
    return True


@compiled
def passes(m: Words, thread: Word, row: Word) -> Word:
    """Let the thread come to where only one may be at a time, or leave it; False if another is there."""
    threads, gpu = m[THREADS], gpu_of(m, row)
    entering = m[row + C_OP] == O_ENTER
    for place in range(threads + 1, threads + 1 + m[threads]):
        other = m[place]
        if entering and m[other + T_INSIDE]:
            m[thread + T_OUTSIDE] = 1
            return False
        if not entering and m[other + T_OUTSIDE]:
            goes_on(m, other, m[NOW])
    if m[thread + T_OUTSIDE]:
        m[thread + T_OUTSIDE] = 0
        m[gpu + G_NOW] = max(m[gpu + G_NOW], m[NOW])
    m[thread + T_INSIDE] = np.int64(entering)
    return True


@compiled
def carry_out_one(m: Words, f: Reals, thread: Word, row: Word) -> Word:
    """Carry out a command; False if the thread has to wait first, and comes to it again."""
    op = m[row + C_OP]
    if move_registers(m, row):
        return True
    if op == O_LAUNCH:
        return launch(m, f, thread, row)
    if op in (O_NOTICE, O_HOLD):
        gpu = gpu_of(m, row)
        if op == O_NOTICE:
            end_busy(m, gpu)
        if not reaches_end(m, thread, gpu, m[row + C_REGISTER]):
            return False
        if op == O_NOTICE:
            notice(m, gpu, row)
    elif op == O_BEHIND:
        return is_behind(m, thread, row)
    elif op in (O_ENTER, O_EXIT):
        return passes(m, thread, row)
    elif op == O_COPY:
        copy(m, f, row)
    elif op == O_READ:
        read(m, f, row)
    elif op == O_VISIT:
        begin_visit(m, row)
    elif op == O_READBACK:
        read_back(m, f, row)
    elif op == O_CATCH_UP:
        catch_up(m, thread, row)
    elif op == O_DECIDE:
        decide(m, row)
    elif op == O_MEMBER:
        add_member(m, f, row)
    elif op == O_PREDICT:
        return predict(m, f, thread, row)
    elif op == O_PROMOTE:
        demand(m, row)
    elif op == O_TURN:
        turn_to(m, thread, row)
    elif op == O_RECEIVE:
        receive(m, row)
    elif op == O_SEND:
        send(m, f, row)
    elif op == O_CALL:
        m[gpu_of(m, row) + G_NOW] += m[gpu_of(m, row) + G_LAUNCH]
    elif op == O_EXCHANGE:
        exchange(m, f, row)
    elif op == O_IDLE:
        idle_until(m, gpu_of(m, row), m[row + C_EXTRA])
    elif op == O_SCHEDULE:
        m[gpu_of(m, row) + G_NOW] += m[row + C_EXTRA]
    elif op == O_SWAP:
        swap(m, f, row)
    elif op in (O_FETCH, O_STORE):
        move_expert(m, f, row)
    else:
        do_without(m, f, row)
    return True


# Parts.


#: What a thread says that has come to no end, for want of nodes.
SHORT = 2


@compiled
def begin_parts(m: Words, thread: Word) -> None:
    """Let the GPUs' own threads carry out the parts that are next, all of which this one waits for."""
    while m[thread + T_AT] < m[thread + T_COUNT]:
        row = m[thread + T_ROWS] + m[thread + T_AT] * ROW_WORDS
        if m[row + C_OP] != O_PART:
            return
        part = m[gpu_of(m, row) + G_THREAD]
        m[part + T_ROWS], m[part + T_COUNT], m[part + T_AT] = row + ROW_WORDS, m[row + C_EXTRA], 0
        m[part + T_PART_OF] = thread
        goes_on(m, part, m[NOW])
        m[thread + T_PARTS] += 1
        m[thread + T_AT] += 1 + m[row + C_EXTRA]


@compiled
def wake_parts(m: Words) -> None:
    """Let all parts look again that wait for another part's thread, one of which has come further."""
    gpus = m[GPUS]
    for at in range(gpus + 1, gpus + 1 + m[gpus]):
        part = m[m[at] + G_THREAD]
        if m[part + T_BEHIND]:
            goes_on(m, part, m[NOW])


@compiled
def end_part(m: Words, part: Word) -> None:
    """Let the thread that waits for parts go on, if this was the last of them."""
    thread = m[part + T_PART_OF]
    m[thread + T_PARTS] -= 1
    if m[thread + T_PARTS] == 0:
        goes_on(m, thread, m[NOW])


@compiled
def carry_out(m: Words, f: Reals, thread: Word) -> Word:
    """Carry out a thread's commands from where it is; whether it has come to their end, and neither waits nor rests.

    SHORT if too few nodes are left for the next one: it goes on there, at once, when there are more.
    """
    while m[thread + T_AT] < m[thread + T_COUNT]:
        if m[NODES_LEFT] <= m[NODES_COMMAND]:
            return SHORT
        row = m[thread + T_ROWS] + m[thread + T_AT] * ROW_WORDS
        if m[row + C_OP] == O_PART:
            begin_parts(m, thread)
            return False
        if not carry_out_one(m, f, thread, row):
            return False
        m[thread + T_AT] += 1
        if m[row + C_OP] == O_CATCH_UP:
            return False
    return True
