"""What goes from one GPU to another, compiled: activations, tokens and experts, and who waits for them."""

from __future__ import annotations

import numpy as np

from ...resources.timeline import ACTIVATION, PEER
from ..decide.commands import FIXED_REGISTERS, TOKENS
from .compiled_launch import new_work, pay_waits
from .compiled_prices import C_EXTRA, C_KIND, C_REGISTER, gpu_of, way_of
from .compiled_queue import submit
from .compiled_work import (
    Reals,
    Word,
    Words,
    compiled,
    copied_register,
    copied_works,
    drop_works,
    entry,
    free_work,
    hold,
    joined,
    let_go,
    node_before,
    wait_for,
)
from .memory import (
    AN_ARRIVAL,
    ARRIVAL_WORDS,
    ARRIVALS,
    G_AFTER,
    G_ARRIVALS,
    G_CALLS,
    G_EXCHANGE,
    G_EXCHANGE_NS,
    G_KERNEL_AFTER,
    G_NOW,
    G_NUMBER,
    G_SENDS,
    G_VISIT,
    GPUS,
    M_ALONE,
    M_HOST,
    M_LAG,
    M_LANE,
    M_LATENCY,
    M_QUEUED,
    M_SLOWDOWN,
    M_TARGET,
    M_TRANSFER,
    N_NEXT,
    N_WHAT,
    R_AT,
    R_COUNT,
    W_END,
    W_NUMBER,
)


@compiled
def note_arrival(m: Words, gpu: Word, kind: Word, work: Word) -> None:
    """Record what a kernel waits for that another GPU sends."""
    region = m[ARRIVALS]
    at = m[region + R_AT] + m[region + R_COUNT] * ARRIVAL_WORDS
    m[at], m[at + 1], m[at + 2], m[at + 3] = m[gpu + G_NUMBER], m[gpu + G_VISIT], kind, hold(m, work)
    m[region + R_COUNT] += 1


@entry
def settle_arrivals(m: Words) -> Word:
    """Turn the first arrivals that are known into instants; return how many these are.

    What follows the first that is not known yet stays as it is.
    """
    region = m[ARRIVALS]
    for number in range(m[region + R_COUNT]):
        at = m[region + R_AT] + number * ARRIVAL_WORDS
        work = m[at + 3]
        if m[work + W_END] < 0:
            return number
        m[at + 3] = m[work + W_END]
        let_go(m, work)
    return m[region + R_COUNT]


@compiled
def arrival_of(m: Words, gpu: Word, step: Word) -> Word:
    """Returns work that ends when what the stage before sends for a step is there."""
    at = m[gpu + G_ARRIVALS] + step
    if m[at] < 0:
        m[at] = hold(m, free_work(m))
    return m[at]


@compiled
def receive(m: Words, row: Word) -> None:
    """Make the compute stream wait for what another GPU sends."""
    gpu, register = gpu_of(m, row), m[row + C_REGISTER]
    if register >= 0:
        arrivals = copied_register(m, register, np.int64(-1))
    else:
        arrivals = node_before(m, hold(m, arrival_of(m, gpu, m[row + C_EXTRA])), np.int64(-1))
    node = arrivals
    while node >= 0:
        note_arrival(m, gpu, m[row + C_KIND], m[node + N_WHAT])
        node = m[node + N_NEXT]
    m[gpu + G_KERNEL_AFTER] = joined(m, arrivals, m[gpu + G_KERNEL_AFTER])
    m[gpu + G_CALLS] += 1


@compiled
def move_work(m: Words, f: Reals, gpu: Word, move: Word, kind: Word, row: Word) -> Word:
    """Submit what goes from one GPU to another."""
    pay_waits(m, gpu)
    m[gpu + G_NOW] += m[move + M_HOST]
    work = new_work(
        m, f, gpu, kind, m[move + M_QUEUED], m[move + M_ALONE], m[gpu + G_NOW] + m[move + M_LATENCY],
        f[move + M_SLOWDOWN], m[move + M_TRANSFER], row, m[row + C_REGISTER],
    )  # fmt: skip
    submit(m, m[move + M_LANE], work)
    return work


@compiled
def send(m: Words, f: Reals, row: Word) -> None:
    """Enqueue the copy of what was waited for to the next stage."""
    gpu = gpu_of(m, row)
    move = m[m[gpu + G_SENDS] + m[row + C_EXTRA]]
    work = move_work(m, f, gpu, move, ACTIVATION, row)
    arrival = arrival_of(m, m[m[GPUS] + 1 + m[move + M_TARGET]], m[row + C_EXTRA])
    wait_for(m, work, AN_ARRIVAL, hold(m, arrival))
    m[work + W_NUMBER] = m[move + M_LAG]


@compiled
def move_expert(m: Words, f: Reals, row: Word) -> None:
    """Enqueue a copy of an expert from another GPU, or to it, by this one's host thread."""
    move_work(m, f, gpu_of(m, row), way_of(m, row), PEER, row)


@compiled
def exchange(m: Words, f: Reals, row: Word) -> None:
    """Let all GPUs exchange tokens at once."""
    asks = gpu_of(m, row)
    after, ns, issued = m[asks + G_AFTER], m[asks + G_EXCHANGE_NS], np.int64(0)
    m[asks + G_AFTER] = -1
    for number in range(m[m[GPUS]]):
        issued = max(issued, m[m[m[GPUS] + 1 + number] + G_NOW])
    for number in range(m[m[GPUS]]):
        gpu = m[m[GPUS] + 1 + number]
        m[gpu + G_AFTER] = copied_works(m, after, m[gpu + G_AFTER])
        register = number * FIXED_REGISTERS + TOKENS
        work = new_work(m, f, gpu, m[row + C_KIND], ns, ns, issued, 1.0, -1, row, register)
        submit(m, m[gpu + G_EXCHANGE], work)
    drop_works(m, after)
