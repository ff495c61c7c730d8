"""Host threads, compiled: what `host` does as a SimPy process, over words of memory; and the clock that drives all."""

from __future__ import annotations

import numpy as np

from ...resources.timeline import (
    ACTIVATION,
    CPU_EXPERT,
    DECOMPRESS,
    DENSE,
    EXPERT,
    HEAD,
    LAUNCH,
    PEER,
    PREDICT,
    PREFETCH,
)
from ..decide.commands import COMPUTE, FIXED_REGISTERS, PREFETCH_LANE, SIDE, TOKENS, Command, Op
from ..policies.miss import LOW_PRECISION
from .compiled_lanes import (
    Real,
    Reals,
    Word,
    Words,
    backlog,
    compiled,
    copied_works,
    copy_in_queue,
    disturbed,
    drop_works,
    end,
    enter,
    give_up,
    hold,
    join_register,
    keep_engine,
    let_go,
    node_before,
    promote,
    record_span,
    set_register,
    submit,
    try_start,
    wait_for,
)  # fmt: skip
from .memory import (
    A_DEPARTURE,
    A_THREAD,
    ADDED_WORDS,
    AN_ARRIVAL,
    AN_BESIDE,
    AN_NS,
    ARRIVAL_WORDS,
    ARRIVALS,
    ASKED,
    ASKED_FOR,
    AT_KINDS,
    AT_STEP,
    CPU_SHAPE,
    D_HOST,
    D_REQUEST,
    DENSE_SHAPE,
    DONE,
    DROPPED,
    EXPERT_SHAPE,
    FREE_WORK,
    FROM_CPU_SHAPE,
    G_ACCESSES,
    G_AFTER,
    G_ARRIVALS,
    G_ASSIGNED,
    G_ATTENTION,
    G_BACK,
    G_BUDGET,
    G_BUSY_SINCE,
    G_BY_PRIORITY,
    G_CALLS,
    G_COMPUTE,
    G_COPY_LATENCY,
    G_COPY_OF,
    G_COPY_RESUME,
    G_COPY_SLOWDOWN,
    G_CPU,
    G_D2H,
    G_DECISIONS,
    G_DEPTH,
    G_EXCHANGE,
    G_EXCHANGE_NS,
    G_EXPERTS,
    G_FIRST_LAUNCHED,
    G_GROUPED_CONSTANT,
    G_H2D,
    G_HELD,
    G_HOST,
    G_INTERRUPTED,
    G_IO_LANES,
    G_KERNEL_AFTER,
    G_KINDS,
    G_LAST,
    G_LAST_KERNEL,
    G_LAUNCH,
    G_LAUNCHED,
    G_LAYERS,
    G_MEMBER_HOST,
    G_MEMBER_LAUNCHES,
    G_MEMBER_NS,
    G_MEMBER_SLOWDOWN,
    G_MEMBERS,
    G_MOST_NS,
    G_NOW,
    G_NUMBER,
    G_OTHERS_EVERY,
    G_OTHERS_NS,
    G_PEERS,
    G_PREDICT,
    G_PREDICT_HOST,
    G_PREDICT_ISSUE,
    G_PREDICT_LAUNCHES,
    G_PREFETCH,
    G_QUEUED,
    G_READBACK,
    G_READBACK_ENQUEUE,
    G_READBACK_LATENCY,
    G_READBACK_SLOWDOWN,
    G_READS,
    G_READS_BACK,
    G_RESUME,
    G_RING,
    G_SENDS,
    G_SHAPES,
    G_SIDE,
    G_SIZED,
    G_SYNCHRONIZE,
    G_SYNCHRONIZE_BESIDE,
    G_THREAD,
    G_TO_CPU,
    G_TURN,
    G_UNPACKING,
    G_VISIT,
    G_WAIT,
    G_WATCHES,
    GPUS,
    HEAD_SHAPE,
    K_HOST,
    K_ISSUE,
    K_KNOWN,
    K_LAUNCHES,
    K_NS,
    K_SLOWDOWN,
    KERNEL_TOKENS,
    KERNEL_WORDS,
    KERNELS,
    L_END,
    L_ENTERING,
    L_KEEPS,
    L_WAKE,
    LANES,
    LOW_SHAPE,
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
    NEVER,
    NODES_EACH,
    NODES_LEFT,
    NOTE_WORDS,
    NOW,
    P_ALONE,
    P_CLASS,
    P_HOST,
    P_PIECES,
    P_QUEUED,
    P_TRANSFER,
    PORTION,
    PRICE,
    R_AT,
    R_CAPACITY,
    R_COUNT,
    RATE,
    READ_WORDS,
    RECORD_ROOM,
    RECORDS,
    REGISTERS,
    SIZED_SHAPE,
    SPACE,
    T_AT,
    T_BEHIND,
    T_COUNT,
    T_GOES_ON,
    T_GPU,
    T_GPUS,
    T_PART_OF,
    T_PARTS,
    T_ROWS,
    THREADS,
    TO_CPU_SHAPE,
    UNPACK_SHAPE,
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
    WORK_EACH,
    WORK_LEFT,
)  # fmt: skip

# The operations and columns of commands by number, which compiled code takes for constants.
O_VISIT, O_WAIT, O_RECLAIM, O_TOUCH, O_JOIN, O_OUTPUT, O_LAUNCH, O_MEMBER = (int(op) for op in list(Op)[:8])
O_COPY, O_READBACK, O_NOTICE, O_DECIDE, O_HOLD, O_PREDICT, O_PROMOTE, O_TO_CPU = (int(op) for op in list(Op)[8:16])
O_CPU, O_FROM_CPU, O_UNPACK, O_READ, O_CATCH_UP, O_TURN, O_RECEIVE, O_SEND = (int(op) for op in list(Op)[16:24])
O_CALL, O_EXCHANGE, O_FETCH, O_STORE, O_LEAVE, O_PART, O_BEHIND = (int(op) for op in list(Op)[24:31])
COLUMNS = len(Command._fields)
C_OP, C_GPU, C_KIND, C_LANE, C_LAYER, C_TOKENS, C_EXPERT, C_COPY, C_REGISTER, C_PEER, C_EXTRA = range(COLUMNS)

#: Kinds of events, in the order in which they come at one instant (see `lanes.Instant`).
ENTERS, ENDS, KEEPS, GOES_ON, STARTS = range(5)
KIND_BITS, ALL = 3, 7


@compiled
def gpu_of(m: Words, row: Word) -> Word:
    """Returns the GPU that a command is for."""
    return m[m[GPUS] + 1 + m[row + C_GPU]]


# Prices.


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
            what = SIZED_SHAPE + m[m[m[gpu + G_COPY_OF] + m[row + C_EXPERT]] + P_CLASS]
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
    shape = shape_of(m, row)
    if shape < 0:
        return shape
    return m[KERNELS] + (shape * m[KERNEL_TOKENS] + max(0, m[row + C_TOKENS])) * KERNEL_WORDS


@compiled
def attention_of(m: Words, row: Word) -> Word:
    """Returns where it stands what attention adds to a dense part; -1 of other commands, and where it adds nothing."""
    if m[row + C_OP] != O_LAUNCH or m[row + C_KIND] != DENSE:
        return np.int64(-1)
    return m[gpu_of(m, row) + G_ATTENTION]


@compiled
def knows_prices(m: Words, thread: Word) -> Word:
    """Whether all prices of a portion are known; if not, note which is asked for."""
    for at in range(m[thread + T_COUNT]):
        row = m[thread + T_ROWS] + at * COLUMNS
        attention = attention_of(m, row)
        if attention >= 0 and m[attention + AT_STEP] != m[row + C_EXTRA]:
            m[ASKED], m[ASKED_FOR] = -1 - m[row + C_GPU], m[row + C_EXTRA]
            return False
        price = price_of(m, row)
        if price >= 0 and not m[price + K_KNOWN]:
            m[ASKED], m[ASKED_FOR] = shape_of(m, row), max(0, m[row + C_TOKENS])
            return False
    return True


# Work.


@compiled
def free_work(m: Words) -> Word:
    """Returns a piece of work that waits for nothing."""
    work = m[FREE_WORK]
    m[FREE_WORK] = m[work + W_NEXT]
    m[WORK_LEFT] -= 1
    m[work + W_RANK], m[work + W_TARGET], m[work + W_NUMBER], m[work + W_PIECES] = 0, 0, 0, 1
    m[work + W_STARTED], m[work + W_CANCELLED], m[work + W_REFERENCES], m[work + W_HELD_BACK] = 0, 0, 0, 0
    m[work + W_END], m[work + W_NEXT], m[work + W_WAITING], m[work + W_AFTER], m[work + W_LANE] = -1, -1, -1, -1, -1
    return work


@compiled
def replace(m: Words, at: Word, work: Word) -> None:
    """Let a word name another piece of work."""
    before = m[at]
    m[at] = hold(m, work)
    if before >= 0:
        let_go(m, before)


@compiled
def new_work(
    m: Words, f: Reals, gpu: Word, kind: Word, ns: Word, alone: Word, issued: Word, slowdown: Real, transfer: Word,
    row: Word, register: Word,
) -> Word:  # fmt: skip
    """Returns new work behind what was waited for; a register, if any, stands for it."""
    work = free_work(m)
    m[work + W_NS], m[work + W_ALONE], m[work + W_ISSUED], m[work + W_TRANSFER] = ns, alone, issued, transfer
    m[work + W_KIND], m[work + W_VISIT] = kind, m[gpu + G_VISIT]
    m[work + W_EXPERT], m[work + W_COPY] = m[row + C_EXPERT], m[row + C_COPY]
    f[work + W_SLOWDOWN] = slowdown
    m[work + W_AFTER] = m[gpu + G_AFTER]
    m[gpu + G_AFTER] = -1
    replace(m, gpu + G_LAST, work)
    if register >= 0:
        set_register(m, register, work)
    return work


@compiled
def pay_waits(m: Words, gpu: Word) -> None:
    """Let the host make its calls for what was waited for."""
    m[gpu + G_NOW] += m[gpu + G_CALLS] * m[gpu + G_WAIT]
    m[gpu + G_CALLS] = 0


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
def launch_kernel(
    m: Words,
    f: Reals,
    gpu: Word,
    kind: Word,
    ns: Word,
    slowdown: Real,
    launches: Word,
    host: Word,
    issue: Word,
    row: Word,
) -> Word:
    """Launch a group of kernels on the compute stream."""
    issued = m[gpu + G_NOW] + issue
    m[gpu + G_NOW] += host
    m[gpu + G_AFTER] = joined(m, m[gpu + G_KERNEL_AFTER], m[gpu + G_AFTER])
    m[gpu + G_KERNEL_AFTER] = -1
    work = new_work(m, f, gpu, kind, ns, ns, issued, slowdown, -1, row, m[row + C_REGISTER])
    submit(m, m[gpu + G_COMPUTE], work)
    if m[gpu + G_WATCHES]:
        place = (m[gpu + G_FIRST_LAUNCHED] + m[gpu + G_QUEUED]) % (m[gpu + G_DEPTH] + 2)
        m[m[gpu + G_RING] + 2 * place], m[m[gpu + G_RING] + 2 * place + 1] = hold(m, work), launches
        m[gpu + G_QUEUED] += 1
        m[gpu + G_LAUNCHED] += launches
    return work


@compiled
def take_launched(m: Words, gpu: Word) -> None:
    """Forget the first launch of the queue."""
    first = m[gpu + G_FIRST_LAUNCHED]
    work, launches = m[m[gpu + G_RING] + 2 * first], m[m[gpu + G_RING] + 2 * first + 1]
    m[gpu + G_FIRST_LAUNCHED] = (first + 1) % (m[gpu + G_DEPTH] + 2)
    m[gpu + G_QUEUED] -= 1
    m[gpu + G_LAUNCHED] -= launches
    let_go(m, work)


@compiled
def has_place(m: Words, thread: Word, gpu: Word, launches: Word) -> Word:
    """Whether the launch queue has a place for so many more; if not, the thread waits for the first to end."""
    while m[gpu + G_QUEUED] and m[gpu + G_LAUNCHED] + launches > m[gpu + G_DEPTH]:
        work = m[m[gpu + G_RING] + 2 * m[gpu + G_FIRST_LAUNCHED]]
        if m[work + W_END] < 0:
            wait_for(m, work, A_THREAD, thread)
            return False
        m[gpu + G_NOW] = max(m[gpu + G_NOW], m[work + W_END])
        take_launched(m, gpu)
    return True


@compiled
def reaches_end(m: Words, thread: Word, gpu: Word, node: Word) -> Word:
    """Bring a GPU's clock to the end of all of some work; False if the thread has to wait for one first."""
    last = m[gpu + G_NOW]
    while node >= 0:
        work = m[node + N_WHAT]
        if m[work + W_END] < 0:
            wait_for(m, work, A_THREAD, thread)
            return False
        last = max(last, m[work + W_END])
        node = m[node + N_NEXT]
    m[gpu + G_NOW] = last
    return True


@compiled
def end_busy(m: Words, gpu: Word) -> None:
    """Record the host thread's work since it last began as one span."""
    since, now = m[gpu + G_BUSY_SINCE], m[gpu + G_NOW]
    if now > since:
        record_span(m, gpu, since, now, since, -1, m[gpu + G_VISIT], -1, m[gpu + G_HOST], LAUNCH)
        m[gpu + G_BUSY_SINCE] = now


@compiled
def note(m: Words, region: Word, first: Word, second: Word, third: Word) -> None:
    """Record an access or a decision."""
    at = m[region + R_AT] + m[region + R_COUNT] * NOTE_WORDS
    m[at], m[at + 1], m[at + 2] = first, second, third
    m[region + R_COUNT] += 1
    m[RECORDS] += 1


@compiled
def note_arrival(m: Words, gpu: Word, kind: Word, work: Word) -> None:
    """Record what a kernel waits for that another GPU sends."""
    region = m[ARRIVALS]
    at = m[region + R_AT] + m[region + R_COUNT] * ARRIVAL_WORDS
    m[at], m[at + 1], m[at + 2], m[at + 3] = m[gpu + G_NUMBER], m[gpu + G_VISIT], kind, hold(m, work)
    m[region + R_COUNT] += 1


@compiled
def issue_after(ns: Word, launches: Word, host: Word) -> Word:
    """Returns how long after the host's first call a group of kernels starts on an idle lane, but for the latency."""
    return max(host // launches, host - ns * (launches - 1) // launches)


# Commands.


@compiled
def launch(m: Words, f: Reals, thread: Word, row: Word) -> Word:
    """Launch what a command says; False if the launch queue is full."""
    gpu, kind, price = gpu_of(m, row), m[row + C_KIND], price_of(m, row)
    if price >= 0:
        ns, launches, host, issue = m[price + K_NS], m[price + K_LAUNCHES], m[price + K_HOST], m[price + K_ISSUE]
        slowdown = f[price + K_SLOWDOWN]
        attention = attention_of(m, row)
        if attention >= 0:
            kind_of = m[attention + AT_KINDS + m[row + C_LAYER]]
            added = attention + AT_KINDS + m[gpu + G_LAYERS] + kind_of * ADDED_WORDS
            longer = ns + m[added + AN_NS]
            if longer > ns:
                slowdown = max(1.0, (ns * slowdown + f[added + AN_BESIDE]) / longer)
                issue += issue_after(longer, launches, host) - issue_after(ns, launches, host)
                ns = longer
    else:
        saved = (m[gpu + G_MEMBERS] - 1) * m[gpu + G_GROUPED_CONSTANT]
        ns = max(m[gpu + G_MEMBER_NS] - saved, m[gpu + G_MOST_NS])
        launches, host, slowdown = m[gpu + G_MEMBER_LAUNCHES], m[gpu + G_MEMBER_HOST], f[gpu + G_MEMBER_SLOWDOWN]
        issue = issue_after(ns, launches, host)
    if m[gpu + G_WATCHES] and not has_place(m, thread, gpu, launches):
        return False
    held = m[gpu + G_HELD]
    if held:
        issue += issue_after(ns + held, launches, host) - issue_after(ns, launches, host)
        ns += held
        m[gpu + G_HELD] = 0
    m[gpu + G_MEMBERS], m[gpu + G_MEMBER_NS], m[gpu + G_MOST_NS], f[gpu + G_MEMBER_SLOWDOWN] = 0, 0, 0, 0.0
    pay_waits(m, gpu)
    work = launch_kernel(m, f, gpu, kind, ns, slowdown, launches, host, issue, row)
    if kind != DECOMPRESS:
        replace(m, gpu + G_LAST_KERNEL, work)
    if kind == EXPERT and m[row + C_COPY] >= 0 and m[row + C_TOKENS] >= 0:
        note(m, m[gpu + G_ACCESSES], m[gpu + G_VISIT], m[row + C_COPY], m[row + C_TOKENS])
    return True


@compiled
def add_member(m: Words, f: Reals, row: Word) -> None:
    """Put an expert into the grouped kernel that is launched next."""
    gpu, price = gpu_of(m, row), price_of(m, row)
    if m[gpu + G_MEMBERS] == 0:
        m[gpu + G_MEMBER_LAUNCHES], m[gpu + G_MEMBER_HOST] = m[price + K_LAUNCHES], m[price + K_HOST]
    m[gpu + G_MEMBERS] += 1
    m[gpu + G_MEMBER_NS] += m[price + K_NS]
    m[gpu + G_MOST_NS] = max(m[gpu + G_MOST_NS], m[price + K_NS])
    f[gpu + G_MEMBER_SLOWDOWN] = max(f[gpu + G_MEMBER_SLOWDOWN], f[price + K_SLOWDOWN])
    note(m, m[gpu + G_ACCESSES], m[gpu + G_VISIT], m[row + C_COPY], m[row + C_TOKENS])


@compiled
def copy(m: Words, f: Reals, row: Word) -> None:
    """Enqueue the copy of an expert to the GPU."""
    gpu = gpu_of(m, row)
    price = m[m[gpu + G_COPY_OF] + m[row + C_EXPERT]]
    lane = m[gpu + G_PREFETCH] if m[row + C_LANE] == PREFETCH_LANE else m[gpu + G_H2D]
    if m[row + C_TOKENS] != 1:  # else the GPU issues it
        m[gpu + G_NOW] += m[price + P_HOST]
    pay_waits(m, gpu)
    issued = m[gpu + G_NOW] + m[gpu + G_COPY_LATENCY]
    work = new_work(
        m, f, gpu, m[row + C_KIND], m[price + P_QUEUED], m[price + P_ALONE], issued, f[gpu + G_COPY_SLOWDOWN],
        m[price + P_TRANSFER], row, m[row + C_REGISTER],
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
    submit(m, lane, work)
    if m[row + C_EXTRA]:
        set_register(m, m[row + C_REGISTER], work)
    else:
        join_register(m, m[row + C_REGISTER], work)


@compiled
def leave(m: Words, gpu: Word, register: Word) -> None:
    """Let a room of host memory be free, as far as the last copy goes, when that has ended or is given up."""
    work = m[gpu + G_LAST]
    if m[gpu + G_BY_PRIORITY]:
        leaving = free_work(m)
        wait_for(m, work, A_DEPARTURE, hold(m, leaving))
        work = leaving
    join_register(m, register, work)


@compiled
def reclaim(m: Words, row: Word) -> None:
    """Let the next work wait for the room that it writes anew."""
    gpu, at = gpu_of(m, row), m[REGISTERS] + m[row + C_REGISTER]
    node = m[at]
    if m[gpu + G_BY_PRIORITY] and node >= 0 and m[node + N_NEXT] < 0:
        waits = give_up(m, m[gpu + G_H2D], m[node + N_WHAT])
    else:
        waits = copied_works(m, node, np.int64(-1))
    m[at] = copied_works(m, waits, np.int64(-1)) if m[row + C_TOKENS] == 1 else np.int64(-1)
    drop_works(m, node)
    m[gpu + G_AFTER] = joined(m, waits, m[gpu + G_AFTER])
    m[gpu + G_CALLS] += m[row + C_EXTRA]


@compiled
def predict(m: Words, f: Reals, thread: Word, row: Word) -> Word:
    """Run the predictor on its lane; False if the launch queue is full."""
    gpu = gpu_of(m, row)
    ns, launches, host, issue = (
        m[gpu + G_PREDICT], m[gpu + G_PREDICT_LAUNCHES], m[gpu + G_PREDICT_HOST], m[gpu + G_PREDICT_ISSUE],
    )  # fmt: skip
    if m[row + C_LANE] == COMPUTE:
        if m[gpu + G_WATCHES] and not has_place(m, thread, gpu, launches):
            return False
        launch_kernel(m, f, gpu, PREDICT, ns, 1.0, launches, host, issue, row)
    elif m[row + C_LANE] == SIDE:
        pay_waits(m, gpu)
        issued = m[gpu + G_NOW] + issue
        m[gpu + G_NOW] += host
        work = new_work(m, f, gpu, PREDICT, ns, ns, issued, 1.0, -1, row, m[row + C_REGISTER])
        submit(m, m[gpu + G_SIDE], work)
    else:
        end_busy(m, gpu)
        now = m[gpu + G_NOW]
        record_span(m, gpu, now, now + ns, now, -1, m[gpu + G_VISIT], -1, m[gpu + G_HOST], PREDICT)
        m[gpu + G_NOW] += ns
        m[gpu + G_BUSY_SINCE] = m[gpu + G_NOW]
    return True


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
    else:
        lane, kind = m[gpu + G_UNPACKING], DECOMPRESS
        pay_waits(m, gpu)
        m[gpu + G_NOW] += m[price + K_HOST]
    ns = m[price + K_NS]
    submit(m, lane, new_work(m, f, gpu, kind, ns, ns, m[gpu + G_NOW], slowdown, -1, row, m[row + C_REGISTER]))


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
        arrivals = copied_works(m, m[m[REGISTERS] + register], np.int64(-1))
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
    gpu = gpu_of(m, row)
    of_class = m[m[m[gpu + G_COPY_OF] + m[row + C_EXPERT]] + P_CLASS]
    # By class: for each other GPU the way from it, then the way to it.
    place = 2 * (of_class * m[m[GPUS]] + m[row + C_PEER]) + (0 if m[row + C_OP] == O_FETCH else 1)
    move_work(m, f, gpu, m[m[gpu + G_PEERS] + place], PEER, row)


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
    every = m[gpu + G_OTHERS_EVERY]
    if every and m[row + C_EXTRA]:
        due = (m[gpu + G_NOW] - m[gpu + G_INTERRUPTED]) // every
        m[gpu + G_INTERRUPTED] += due * every
        m[gpu + G_HELD] = due * m[gpu + G_OTHERS_NS]


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
    m[thread + T_GOES_ON] = max(now, m[NOW])


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
def demand(m: Words, row: Word) -> None:
    """Give a copy into a room that is still queued a demand's rank."""
    lane, node = m[gpu_of(m, row) + G_H2D], m[m[REGISTERS] + m[row + C_REGISTER]]
    while node >= 0:
        work = copy_in_queue(m, m[node + N_WHAT], lane)
        if work >= 0:
            promote(m, work, m[row + C_EXTRA])
        node = m[node + N_NEXT]


@compiled
def move_registers(m: Words, row: Word) -> Word:
    """Carry out a command that only moves what registers stand for; whether it is one."""
    op, register, gpu = m[row + C_OP], m[row + C_REGISTER], gpu_of(m, row)
    if op == O_WAIT:
        if register >= 0:
            m[gpu + G_AFTER] = copied_works(m, m[m[REGISTERS] + register], m[gpu + G_AFTER])
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
def carry_out_one(m: Words, f: Reals, thread: Word, row: Word) -> Word:
    """Carry out a command; False if the thread has to wait first, and comes to it again."""
    op = m[row + C_OP]
    if move_registers(m, row):
        return True
    if op == O_LAUNCH:
        return launch(m, f, thread, row)
    if op in (O_NOTICE, O_HOLD):
        gpu = gpu_of(m, row)
        if not reaches_end(m, thread, gpu, m[m[REGISTERS] + m[row + C_REGISTER]]):
            return False
        if op == O_NOTICE:
            notice(m, gpu, row)
    elif op == O_BEHIND:
        return is_behind(m, thread, row)
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
    elif op in (O_FETCH, O_STORE):
        move_expert(m, f, row)
    else:
        do_without(m, f, row)
    return True


@compiled
def begin_parts(m: Words, thread: Word) -> None:
    """Let the GPUs' own threads carry out the parts that are next, all of which this one waits for."""
    while m[thread + T_AT] < m[thread + T_COUNT]:
        row = m[thread + T_ROWS] + m[thread + T_AT] * COLUMNS
        if m[row + C_OP] != O_PART:
            return
        part = m[gpu_of(m, row) + G_THREAD]
        m[part + T_ROWS], m[part + T_COUNT], m[part + T_AT] = row + COLUMNS, m[row + C_EXTRA], 0
        m[part + T_PART_OF], m[part + T_GOES_ON] = thread, m[NOW]
        m[thread + T_PARTS] += 1
        m[thread + T_AT] += 1 + m[row + C_EXTRA]


@compiled
def wake_parts(m: Words) -> None:
    """Let all parts look again that wait for another part's thread, one of which has come further."""
    gpus = m[GPUS]
    for at in range(gpus + 1, gpus + 1 + m[gpus]):
        part = m[m[at] + G_THREAD]
        if m[part + T_BEHIND]:
            m[part + T_GOES_ON] = m[NOW]


@compiled
def end_part(m: Words, part: Word) -> None:
    """Let the thread that waits for parts go on, if this was the last of them."""
    thread = m[part + T_PART_OF]
    m[thread + T_PARTS] -= 1
    if m[thread + T_PARTS] == 0:
        m[thread + T_GOES_ON] = m[NOW]


@compiled
def carry_out(m: Words, f: Reals, thread: Word) -> Word:
    """Carry out a thread's commands from where it is; whether it has come to their end, and neither waits nor rests."""
    while m[thread + T_AT] < m[thread + T_COUNT]:
        row = m[thread + T_ROWS] + m[thread + T_AT] * COLUMNS
        if m[row + C_OP] == O_PART:
            begin_parts(m, thread)
            return False
        if not carry_out_one(m, f, thread, row):
            return False
        m[thread + T_AT] += 1
        if m[row + C_OP] == O_CATCH_UP:
            return False
    return True


# The clock.


@compiled
def next_event(m: Words) -> tuple[Word, Word]:
    """Returns what comes next: its instant and kind (ends, entries, then as of `Instant`) as one number, and where."""
    first: Word = NEVER << KIND_BITS
    where: Word = -1
    lanes = m[LANES]
    for place in range(lanes + 1, lanes + 1 + m[lanes]):
        lane = m[place]
        comes = min(m[lane + L_END] << KIND_BITS | ENDS, m[lane + L_WAKE] << KIND_BITS | STARTS)
        comes = min(comes, m[lane + L_KEEPS] << KIND_BITS | KEEPS)
        if m[lane + L_ENTERING] >= 0:
            comes = min(comes, max(m[NOW], m[m[lane + L_ENTERING] + W_ISSUED]) << KIND_BITS | ENTERS)
        if comes < first:
            first, where = comes, lane
    threads = m[THREADS]
    for place in range(threads + 1, threads + 1 + m[threads]):
        comes = m[m[place] + T_GOES_ON] << KIND_BITS | GOES_ON
        if comes < first:
            first, where = comes, m[place]
    return first, where


@compiled
def has_room(m: Words, region: Word, more: Word) -> Word:
    """Whether a region has room for so many more records."""
    return m[region + R_COUNT] + more < m[region + R_CAPACITY]


@compiled
def has_space(m: Words, thread: Word) -> Word:
    """Whether there is room for all that a thread's portion may take and record (-1: any one event)."""
    gpus = m[m[GPUS]]
    more = 8 + (m[thread + T_COUNT] + gpus * gpus if thread >= 0 else 0)
    return (
        m[RECORDS] + more < m[RECORD_ROOM]
        and has_room(m, m[ARRIVALS], more)
        and has_room(m, m[DROPPED], 1)
        and m[WORK_LEFT] > WORK_EACH * more
        and m[NODES_LEFT] > NODES_EACH * more
    )


@compiled
def advance(m: Words, f: Reals, thread: Word) -> tuple[Word, Word]:
    """Go on until something is asked for: return what (see `memory`), and by which thread, if it is one's.

    `thread` has a new portion, which it carries out first; -1 where there is none.
    """
    if thread >= 0:
        if not has_space(m, thread):
            return SPACE, thread
        if not knows_prices(m, thread):
            return PRICE, thread
        if carry_out(m, f, thread):
            return PORTION, thread
    while True:
        first, where = next_event(m)
        at, kind = first >> KIND_BITS, first & ALL
        if at >= NEVER:
            return DONE, np.int64(-1)
        if not has_space(m, where if kind == GOES_ON else np.int64(-1)):
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
            m[where + T_GOES_ON] = NEVER
            before, done = m[where + T_AT], carry_out(m, f, where)
            if m[where + T_PART_OF] >= 0:
                if m[where + T_AT] > before:
                    wake_parts(m)
                if done:
                    end_part(m, where)
            elif done:
                return PORTION, where


@compiled
def backlogs(m: Words, f: Reals, gpu: Word) -> Word:
    """Returns the copy time that is queued on a GPU's link now, in ns."""
    first, second = m[gpu + G_H2D], m[gpu + G_PREFETCH]
    return backlog(m, f, first) + (backlog(m, f, second) if second != first else 0)


@compiled
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
