"""Copies over the host's link, compiled: experts, choices and activations, and what is done without a copy."""

from __future__ import annotations

import numpy as np

from ...resources.timeline import ACTIVATION, CPU_EXPERT, DECOMPRESS, PREFETCH
from ..decide.commands import PREFETCH_LANE
from .compiled_lanes import backlog
from .compiled_launch import end_busy, new_work, pay_waits
from .compiled_prices import (
    C_EXPERT,
    C_EXTRA,
    C_KIND,
    C_LANE,
    C_OP,
    C_REGISTER,
    C_TOKENS,
    O_CPU,
    O_FROM_CPU,
    O_TO_CPU,
    copy_price,
    factor_of,
    gpu_of,
    price_of,
    times,
)
from .compiled_queue import copy_in_queue, give_up, promote, submit
from .compiled_work import (
    Reals,
    Word,
    Words,
    causes_of,
    clear_register,
    compiled,
    copied_works,
    drop_works,
    free_work,
    hold,
    join_register,
    joined,
    set_register,
    wait_for,
)
from .memory import (
    A_DEPARTURE,
    D_HOST,
    D_REQUEST,
    F_COPY,
    G_AFTER,
    G_BACK,
    G_BY_PRIORITY,
    G_CALLS,
    G_COPY_LATENCY,
    G_COPY_SLOWDOWN,
    G_CPU,
    G_D2H,
    G_EXPERTS,
    G_FROM_CPU,
    G_H2D,
    G_IO_LANES,
    G_LAST,
    G_NOW,
    G_PREFETCH,
    G_READBACK,
    G_READBACK_ENQUEUE,
    G_READBACK_LATENCY,
    G_READBACK_SLOWDOWN,
    G_READS,
    G_SCATTER,
    G_TO_CPU,
    G_UNPACKING,
    G_VISIT,
    K_HOST,
    K_NS,
    K_SLOWDOWN,
    N_NEXT,
    N_WHAT,
    P_ALONE,
    P_HOST,
    P_PIECES,
    P_QUEUED,
    P_TRANSFER,
    READ_WORDS,
    REGISTERS,
    W_AFTER,
    W_HELD_BACK,
    W_LEFT,
    W_PIECES,
    W_RANK,
    W_REGISTER,
    W_TARGET,
)


@compiled
def copy(m: Words, f: Reals, row: Word) -> None:
    """Enqueue the copy of an expert to the GPU."""
    gpu = gpu_of(m, row)
    price = copy_price(m, gpu, m[row + C_EXPERT])
    lane = m[gpu + G_PREFETCH] if m[row + C_LANE] == PREFETCH_LANE else m[gpu + G_H2D]
    if m[row + C_TOKENS] != 1:  # else the GPU issues it
        m[gpu + G_NOW] += m[price + P_HOST]
    pay_waits(m, gpu)
    issued = m[gpu + G_NOW] + m[gpu + G_COPY_LATENCY]
    queued, alone = m[price + P_QUEUED], m[price + P_ALONE]
    if m[gpu + G_SCATTER] >= 0:
        factor = factor_of(m, f, gpu, F_COPY)
        queued, alone = times(queued, factor), times(alone, factor)
    work = new_work(
        m, f, gpu, m[row + C_KIND], queued, alone, issued, f[gpu + G_COPY_SLOWDOWN], m[price + P_TRANSFER], row,
        m[row + C_REGISTER],
    )  # fmt: skip
    if m[gpu + G_BY_PRIORITY]:
        m[work + W_RANK] = 1 if m[row + C_KIND] == PREFETCH else 0
        m[work + W_TARGET], m[work + W_PIECES] = m[row + C_EXTRA], m[price + P_PIECES]
        m[work + W_HELD_BACK] = np.int64(m[gpu + G_IO_LANES] >= 0)
    submit(m, lane, work)


@compiled
def read(m: Words, f: Reals, row: Word) -> None:
    """Order a request to the drive, on the I/O lane that has the least to do now."""
    gpu = gpu_of(m, row)
    cost = m[gpu + G_READS] + m[row + C_EXPERT] // m[gpu + G_EXPERTS] * READ_WORDS
    if m[row + C_EXTRA]:
        m[gpu + G_NOW] += m[cost + D_HOST]
    else:
        m[gpu + G_AFTER] = copied_works(m, m[m[gpu + G_LAST] + W_AFTER], np.int64(-1))
    lanes = m[gpu + G_IO_LANES]
    lane, least = m[lanes + 1], backlog(m, f, m[lanes + 1])
    for at in range(lanes + 2, lanes + 1 + m[lanes]):
        other = backlog(m, f, m[at])
        if other < least:
            lane, least = m[at], other
    ns, now = m[cost + D_REQUEST], m[gpu + G_NOW]
    work = new_work(m, f, gpu, m[row + C_KIND], ns, ns, now, 1.0, -1, row, -1)
    m[work + W_HELD_BACK] = 1
    submit(m, lane, work)
    if m[row + C_EXTRA]:
        set_register(m, m[row + C_REGISTER], work)
    else:
        join_register(m, m[row + C_REGISTER], work)
    m[work + W_REGISTER] = m[row + C_REGISTER]


@compiled
def leave(m: Words, gpu: Word, register: Word) -> None:
    """Let a room of host memory be free, as far as the last copy goes, when that has ended or is given up."""
    work = m[gpu + G_LAST]
    if m[gpu + G_BY_PRIORITY]:
        leaving = free_work(m)
        wait_for(m, work, A_DEPARTURE, hold(m, leaving))
        work = leaving
    join_register(m, register, work)
    m[work + W_LEFT] = register


@compiled
def reclaim(m: Words, row: Word) -> None:
    """Let the next work wait for the room that it writes anew."""
    gpu, register, left = gpu_of(m, row), m[row + C_REGISTER], m[row + C_TOKENS] == 1
    at = m[REGISTERS] + register
    node = m[at]
    if m[gpu + G_BY_PRIORITY] and node >= 0 and m[node + N_NEXT] < 0:
        waits = give_up(m, m[gpu + G_H2D], m[node + N_WHAT])
        m[at] = copied_works(m, waits, np.int64(-1)) if left else np.int64(-1)
        drop_works(m, node)
        m[gpu + G_AFTER] = joined(m, waits, m[gpu + G_AFTER])
    else:
        m[gpu + G_AFTER] = causes_of(m, register, m[gpu + G_AFTER])
        if not left:
            clear_register(m, register)
    m[gpu + G_CALLS] += m[row + C_EXTRA]


@compiled
def read_back(m: Words, f: Reals, row: Word) -> None:
    """Enqueue the copy of the router's choice to the host."""
    gpu = gpu_of(m, row)
    m[gpu + G_NOW] += m[gpu + G_READBACK_ENQUEUE]
    end_busy(m, gpu)
    issued, ns = m[gpu + G_NOW] + m[gpu + G_READBACK_LATENCY], m[gpu + G_READBACK]
    slowdown = f[gpu + G_READBACK_SLOWDOWN]
    submit(
        m, m[gpu + G_D2H], new_work(m, f, gpu, m[row + C_KIND], ns, ns, issued, slowdown, -1, row, m[row + C_REGISTER])
    )


@compiled
def swap(m: Words, f: Reals, row: Word) -> None:
    """Enqueue a copy of KV blocks to the host or back, as one that is demanded."""
    gpu, back = gpu_of(m, row), m[row + C_LANE] >= 0
    m[gpu + G_NOW] += m[gpu + G_READBACK_ENQUEUE]
    pay_waits(m, gpu)
    issued, ns = m[gpu + G_NOW] + m[gpu + G_COPY_LATENCY], m[row + C_EXTRA]
    slowdown = f[gpu + G_COPY_SLOWDOWN]
    work = new_work(m, f, gpu, m[row + C_KIND], ns, ns, issued, slowdown, -1, row, m[row + C_REGISTER])
    if back and m[gpu + G_BY_PRIORITY]:
        m[work + W_RANK], m[work + W_TARGET] = 0, m[gpu + G_VISIT] + 1
    submit(m, m[gpu + G_H2D] if back else m[gpu + G_D2H], work)


@compiled
def demand(m: Words, row: Word) -> None:
    """Give a copy into a room that is still queued a demand's rank."""
    lane, node = m[gpu_of(m, row) + G_H2D], m[m[REGISTERS] + m[row + C_REGISTER]]
    while node >= 0:
        work = copy_in_queue(m, m[node + N_WHAT], lane)
        if work >= 0:
            promote(m, work, m[row + C_EXTRA])
        node = m[node + N_NEXT]


@compiled
def do_without(m: Words, f: Reals, row: Word) -> None:
    """Hand activations to the CPU, compute an expert there, bring the results back, or decompress an expert aside."""
    gpu, op, price = gpu_of(m, row), m[row + C_OP], price_of(m, row)
    kind, lane, slowdown = ACTIVATION, m[gpu + G_D2H], 1.0
    if op == O_TO_CPU:
        m[gpu + G_NOW] += m[gpu + G_TO_CPU]
    elif op == O_CPU:
        lane, kind, slowdown = m[gpu + G_CPU], CPU_EXPERT, f[price + K_SLOWDOWN]
    elif op == O_FROM_CPU:
        lane, slowdown = m[gpu + G_BACK], f[gpu + G_COPY_SLOWDOWN]
        m[gpu + G_NOW] += m[gpu + G_FROM_CPU]
    else:
        lane, kind = m[gpu + G_UNPACKING], DECOMPRESS
        pay_waits(m, gpu)
        m[gpu + G_NOW] += m[price + K_HOST]
    ns = m[price + K_NS]
    work = new_work(m, f, gpu, kind, ns, ns, m[gpu + G_NOW], slowdown, -1, row, m[row + C_REGISTER])
    m[work + W_HELD_BACK] = 1
    submit(m, lane, work)
