"""What commands take, compiled: tables of costs, whose rows Python fills in when they are first needed."""

from __future__ import annotations

import numpy as np

from ...resources.timeline import DECOMPRESS, DENSE, HEAD
from ..decide.commands import Command, Op
from ..policies.miss import LOW_PRECISION
from .compiled_work import Real, Reals, Word, Words, compiled
from .memory import (
    ASKED,
    ASKED_FOR,
    AT_STEP,
    CPU_SHAPE,
    DENSE_SHAPE,
    EXPERT_SHAPE,
    F_END,
    F_NEXT,
    FACTOR_WORDS,
    FROM_CPU_SHAPE,
    G_ATTENTION,
    G_COPY_EACH,
    G_COPY_OF,
    G_EXPERTS,
    G_KINDS,
    G_LAYERS,
    G_PEERS,
    G_SCATTER,
    G_SHAPES,
    G_SIZED,
    GPUS,
    HEAD_SHAPE,
    K_KNOWN,
    KERNEL_TOKENS,
    KERNEL_WORDS,
    KERNELS,
    L_NUMBER,
    LANE,
    LOW_SHAPE,
    M_LANE,
    P_CLASS,
    PRICE,
    SCATTERS,
    SIZED_SHAPE,
    T_COUNT,
    T_GPUS,
    T_ROWS,
    TO_CPU_SHAPE,
    UNPACK_SHAPE,
)

# The operations and columns of commands by number, which compiled code takes for constants.
O_VISIT, O_WAIT, O_RECLAIM, O_TOUCH, O_JOIN, O_OUTPUT, O_LAUNCH, O_MEMBER = (int(op) for op in list(Op)[:8])
O_COPY, O_READBACK, O_NOTICE, O_DECIDE, O_HOLD, O_PREDICT, O_PROMOTE, O_TO_CPU = (int(op) for op in list(Op)[8:16])
O_CPU, O_FROM_CPU, O_UNPACK, O_READ, O_CATCH_UP, O_TURN, O_RECEIVE, O_SEND = (int(op) for op in list(Op)[16:24])
O_CALL, O_EXCHANGE, O_FETCH, O_STORE, O_LEAVE, O_PART, O_BEHIND, O_ENTER = (int(op) for op in list(Op)[24:32])
O_EXIT, O_IDLE, O_SCHEDULE, O_SWAP = (int(op) for op in list(Op)[32:36])
COLUMNS = len(Command._fields)
C_OP, C_GPU, C_KIND, C_LANE, C_LAYER, C_TOKENS, C_EXPERT, C_COPY, C_REGISTER, C_PEER, C_EXTRA = range(COLUMNS)
#: What a row has besides in a thread's portion: where its GPU is, and what prices it (-1: nothing).
C_PLACE, C_PRICE, ROW_WORDS = range(COLUMNS, COLUMNS + 3)


@compiled
def gpu_of(m: Words, row: Word) -> Word:
    """Returns the GPU that a command is for."""
    return m[row + C_PLACE]


@compiled
def copy_price(m: Words, gpu: Word, expert: Word) -> Word:
    """Returns what a copy of an expert takes."""
    return m[m[gpu + G_COPY_OF] + expert * m[gpu + G_COPY_EACH]]


@compiled
def shape_of(m: Words, row: Word) -> Word:
    """Returns the shape that prices a command; -1 if none does."""
    op, kind, layer, gpu = m[row + C_OP], m[row + C_KIND], m[row + C_LAYER], gpu_of(m, row)
    what: Word = -1
    phase: Word = 0
    if op in (O_LAUNCH, O_MEMBER):
        phase = max(0, m[row + C_PEER])
        if kind == DENSE:
            what = DENSE_SHAPE
        elif kind == HEAD:
            what, layer = HEAD_SHAPE, 0
        elif kind == DECOMPRESS:
            what, layer = UNPACK_SHAPE, m[row + C_EXPERT] // m[gpu + G_EXPERTS]
        elif m[row + C_TOKENS] < 0:
            return np.int64(-1)  # what its members come to
        elif m[row + C_EXTRA] == LOW_PRECISION:
            what = LOW_SHAPE
        elif m[gpu + G_SIZED]:
            what = SIZED_SHAPE + m[copy_price(m, gpu, m[row + C_EXPERT]) + P_CLASS]
        else:
            what = EXPERT_SHAPE
    elif op == O_UNPACK:
        what, layer = UNPACK_SHAPE, m[row + C_EXPERT] // m[gpu + G_EXPERTS]
    elif op == O_CPU:
        what = CPU_SHAPE
    elif op == O_TO_CPU:
        what = TO_CPU_SHAPE
    elif op == O_FROM_CPU:
        what = FROM_CPU_SHAPE
    else:
        return what
    return m[m[gpu + G_SHAPES] + (phase * m[gpu + G_KINDS] + what) * m[gpu + G_LAYERS] + layer]


@compiled
def price_of(m: Words, row: Word) -> Word:
    """Returns what a command's kernel takes; -1 if nothing prices it."""
    return m[row + C_PRICE]


@compiled
def way_of(m: Words, row: Word) -> Word:
    """Returns what it takes to copy a command's expert from another GPU, or to it."""
    gpu = gpu_of(m, row)
    of_class = m[copy_price(m, gpu, m[row + C_EXPERT]) + P_CLASS]
    # By class: for each other GPU the way from it, then the way to it.
    place = 2 * (of_class * m[m[GPUS]] + m[row + C_PEER]) + (0 if m[row + C_OP] == O_FETCH else 1)
    return m[m[gpu + G_PEERS] + place]


@compiled
def attention_of(m: Words, row: Word) -> Word:
    """Returns where it stands what attention adds to a dense part; -1 of other commands, and where it adds nothing."""
    if m[row + C_OP] != O_LAUNCH or m[row + C_KIND] != DENSE:
        return np.int64(-1)
    return m[gpu_of(m, row) + G_ATTENTION]


@compiled
def factor_of(m: Words, f: Reals, gpu: Word, what: Word) -> Real:
    """Returns the factor of a GPU's next event that scatters so."""
    at = m[gpu + G_SCATTER] + what * FACTOR_WORDS
    m[at + F_NEXT] += 1
    return f[m[at + F_NEXT] - 1]


@compiled
def times(ns: Word, factor: Real) -> Word:
    """Returns so many times as long, rounded as Python does."""
    return np.int64(np.rint(ns * factor))


@compiled
def knows_factors(m: Words, thread: Word) -> Word:
    """Whether enough factors are drawn for a portion, whatever is in it; if not, note for which GPU."""
    gpus = m[thread + T_GPUS]
    for number in range(gpus + 1, gpus + 1 + m[gpus]):
        at = m[m[number] + G_SCATTER]
        for what in range(SCATTERS if at >= 0 else 0):
            drawn = at + what * FACTOR_WORDS
            if m[drawn + F_END] - m[drawn + F_NEXT] < m[thread + T_COUNT]:
                m[ASKED], m[ASKED_FOR] = -m[number], m[thread + T_COUNT]
                return False
    return True


@compiled
def prepare(m: Words, thread: Word) -> Word:
    """Look up where the GPUs and prices of a portion's commands are; return what is asked for, or -1 if all is known.

    That is a price, of a shape for so many tokens; or, if it is less than 0, for a GPU's address, so many factors, or
    where these are less than 0, what attention adds in step -1 - that; or a place in a timeline of a lane between GPUs,
    which has one from its first use on.
    """
    if not knows_factors(m, thread):
        return PRICE
    row = m[thread + T_ROWS]
    for _ in range(m[thread + T_COUNT]):
        m[row + C_PLACE] = m[m[GPUS] + 1 + m[row + C_GPU]]
        attention = attention_of(m, row)
        if attention >= 0 and m[attention + AT_STEP] != m[row + C_EXTRA]:
            m[ASKED], m[ASKED_FOR] = -gpu_of(m, row), -1 - m[row + C_EXTRA]
            return PRICE
        shape, tokens = shape_of(m, row), max(0, m[row + C_TOKENS])
        price: Word = -1
        if shape >= 0:
            price = m[KERNELS] + (shape * m[KERNEL_TOKENS] + tokens) * KERNEL_WORDS
            if not m[price + K_KNOWN]:
                m[ASKED], m[ASKED_FOR] = shape, tokens
                return PRICE
        m[row + C_PRICE] = price
        if (m[row + C_OP] == O_FETCH or m[row + C_OP] == O_STORE) and m[m[way_of(m, row) + M_LANE] + L_NUMBER] < 0:
            m[ASKED] = row
            return LANE
        row += ROW_WORDS
    return np.int64(-1)
