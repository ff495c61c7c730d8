"""Work and lists of it, compiled: what waits for what, and the registers that stand for it."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ... import machine_code
from .memory import (
    FREE_NODE,
    FREE_WORK,
    MOST_LAG,
    N_NEXT,
    N_WHAT,
    N_WHO,
    NEW_NODE,
    NEW_WORK,
    NODE_WORDS,
    NODES_LEFT,
    NOW,
    REGISTERS,
    SETTLED,
    W_AFTER,
    W_CANCELLED,
    W_END,
    W_HELD_BACK,
    W_LANE,
    W_LEFT,
    W_NEXT,
    W_NUMBER,
    W_PIECES,
    W_RANK,
    W_REFERENCES,
    W_REGISTER,
    W_STARTED,
    W_TARGET,
    W_WAITING,
    WORK_LEFT,
    WORK_WORDS,
)

Words = npt.NDArray[Any]
#: A word of memory, and one that is read as a float (see `machine_code`).
Word = Any
Real = Any
Reals = npt.NDArray[Any]

#: Addresses are checked nowhere, and none of these makes an array: Numba need not count who holds which.
compiled = partial(machine_code.compiled_once, error_model="numpy", _nrt=False)
#: Those that Python calls.
entry = partial(compiled, entry=True)


@compiled
def node_before(m: Words, what: Word, following: Word) -> Word:
    """Returns a new node before another."""
    node = m[FREE_NODE]
    if node >= 0:
        m[FREE_NODE] = m[node + N_NEXT]
    else:
        node = m[NEW_NODE]
        m[NEW_NODE] += NODE_WORDS
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
def joined(m: Words, front: Word, back: Word) -> Word:
    """Returns two lists as one."""
    if front < 0:
        return back
    node = front
    while m[node + N_NEXT] >= 0:
        node = m[node + N_NEXT]
    m[node + N_NEXT] = back
    return front


@compiled
def wait_for(m: Words, work: Word, who: Word, what: Word) -> None:
    """Let somebody, of a kind, be told when work ends."""
    node = node_before(m, what, m[work + W_WAITING])
    m[node + N_WHO] = who
    m[work + W_WAITING] = node


@compiled
def free_work(m: Words) -> Word:
    """Returns a piece of work that waits for nothing."""
    work = m[FREE_WORK]
    if work >= 0:
        m[FREE_WORK] = m[work + W_NEXT]
    else:
        work = m[NEW_WORK]
        m[NEW_WORK] += WORK_WORDS
    m[WORK_LEFT] -= 1
    m[work + W_RANK], m[work + W_TARGET], m[work + W_NUMBER], m[work + W_PIECES] = 0, 0, 0, 1
    m[work + W_STARTED], m[work + W_CANCELLED], m[work + W_REFERENCES], m[work + W_HELD_BACK] = 0, 0, 0, 0
    m[work + W_END], m[work + W_NEXT], m[work + W_WAITING], m[work + W_AFTER], m[work + W_LANE] = -1, -1, -1, -1, -1
    m[work + W_REGISTER], m[work + W_LEFT] = -1, -1
    return work


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
def replace(m: Words, at: Word, work: Word) -> None:
    """Let a word name another piece of work."""
    before = m[at]
    m[at] = hold(m, work)
    if before >= 0:
        let_go(m, before)


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


# Registers: what they stand for is a list, or, once all of it has ended, the instant of the last end, so that nobody
# asks any more for what has ended long ago.


@compiled
def settle(m: Words, register: Word) -> None:
    """Let a register keep the instant of the last end alone, if all that it stands for has ended."""
    last, node = np.int64(0), m[m[REGISTERS] + register]
    if node < 0:
        return
    while node >= 0:
        ended = m[m[node + N_WHAT] + W_END]
        if ended < 0:
            return
        last = max(last, ended)
        node = m[node + N_NEXT]
    drop_works(m, m[m[REGISTERS] + register])
    m[m[REGISTERS] + register] = SETTLED - last


@compiled
def ended_work(m: Words, ended: Word) -> Word:
    """Returns work that has ended at an instant, and is held."""
    work = free_work(m)
    m[work + W_END] = ended
    return hold(m, work)


@compiled
def copied_register(m: Words, register: Word, following: Word) -> Word:
    """Returns a list of what a register stands for, before another list."""
    node = m[m[REGISTERS] + register]
    if node <= SETTLED:
        return node_before(m, ended_work(m, SETTLED - node), following)
    return copied_works(m, node, following)


@compiled
def causes_of(m: Words, register: Word, following: Word) -> Word:
    """Returns a list of what a register stands for, before another list; none of what nothing can wait for any more.

    Whatever is issued from now on is issued later than any lane would let pass behind it.
    """
    settle(m, register)
    node = m[m[REGISTERS] + register]
    if node <= SETTLED and SETTLED - node + m[MOST_LAG] <= m[NOW]:
        return following
    return copied_register(m, register, following)


@compiled
def set_register(m: Words, register: Word, work: Word) -> None:
    """Let a register stand for one piece of work."""
    at = m[REGISTERS] + register
    old = m[at]
    m[at] = node_before(m, hold(m, work), -1)
    drop_works(m, old)


@compiled
def clear_register(m: Words, register: Word) -> None:
    """Let a register stand for nothing."""
    at = m[REGISTERS] + register
    drop_works(m, m[at])
    m[at] = -1


@compiled
def join_register(m: Words, register: Word, work: Word) -> None:
    """Let a register stand for a piece of work, too; of what has ended it keeps the last."""
    at = m[REGISTERS] + register
    last, kept, node = np.int64(-1), node_before(m, hold(m, work), -1), m[at]
    if node <= SETTLED and SETTLED - node + m[MOST_LAG] > m[NOW]:
        last = ended_work(m, SETTLED - node)
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
