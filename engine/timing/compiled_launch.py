"""What a host thread submits, compiled: kernels through the launch queue, and what it pays for its calls."""

from __future__ import annotations

from ...resources.timeline import DECOMPRESS, DENSE, EXPERT, HEAD, LAUNCH, PREDICT
from ..costs.values import issue_after_ns
from ..decide.commands import COMPUTE, SIDE
from .compiled_lanes import record_span
from .compiled_prices import (
    C_COPY,
    C_EXPERT,
    C_KIND,
    C_LANE,
    C_LAYER,
    C_REGISTER,
    C_TOKENS,
    attention_of,
    factor_of,
    gpu_of,
    price_of,
    times,
)
from .compiled_queue import submit
from .compiled_work import (
    Real,
    Reals,
    Word,
    Words,
    compiled,
    entry,
    free_work,
    hold,
    joined,
    let_go,
    replace,
    set_register,
    wait_for,
)
from .memory import (
    A_THREAD,
    ADDED_WORDS,
    AN_BESIDE,
    AN_NS,
    AT_KINDS,
    F_DENSE,
    F_EXPERT,
    F_HEAD,
    F_HOST,
    G_ACCESSES,
    G_AFTER,
    G_BUSY_SINCE,
    G_CALLS,
    G_COMPUTE,
    G_DEPTH,
    G_FIRST_LAUNCHED,
    G_GROUPED_SAVED,
    G_HELD,
    G_HOST,
    G_KERNEL_AFTER,
    G_LAST,
    G_LAST_KERNEL,
    G_LAUNCHED,
    G_LAYERS,
    G_MEMBER_HOST,
    G_MEMBER_LAUNCHES,
    G_MEMBER_NS,
    G_MEMBER_SLOWDOWN,
    G_MEMBERS,
    G_MOST_NS,
    G_NOW,
    G_PREDICT,
    G_PREDICT_HOST,
    G_PREDICT_ISSUE,
    G_PREDICT_LAUNCHES,
    G_QUEUED,
    G_RING,
    G_SCATTER,
    G_SIDE,
    G_VISIT,
    G_WAIT,
    G_WATCHES,
    K_HOST,
    K_ISSUE,
    K_LAUNCHES,
    K_NS,
    K_SLOWDOWN,
    N_NEXT,
    N_WHAT,
    NOTE_WORDS,
    R_AT,
    R_COUNT,
    RECORDS,
    REGISTERS,
    SETTLED,
    W_AFTER,
    W_ALONE,
    W_COPY,
    W_END,
    W_EXPERT,
    W_GPU,
    W_ISSUED,
    W_KIND,
    W_NS,
    W_REGISTER,
    W_SLOWDOWN,
    W_TRANSFER,
    W_VISIT,
)

# Records.


@entry
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
    m[RECORDS] = max(m[RECORDS], m[region + R_COUNT])


# Work.


@compiled
def new_work(
    m: Words, f: Reals, gpu: Word, kind: Word, ns: Word, alone: Word, issued: Word, slowdown: Real, transfer: Word,
    row: Word, register: Word,
) -> Word:  # fmt: skip
    """Returns new work behind what was waited for; a register, if any, stands for it."""
    work = free_work(m)
    m[work + W_NS], m[work + W_ALONE], m[work + W_ISSUED], m[work + W_TRANSFER] = ns, alone, issued, transfer
    m[work + W_KIND], m[work + W_VISIT], m[work + W_GPU] = kind, m[gpu + G_VISIT], gpu
    m[work + W_EXPERT], m[work + W_COPY] = m[row + C_EXPERT], m[row + C_COPY]
    f[work + W_SLOWDOWN] = slowdown
    m[work + W_AFTER] = m[gpu + G_AFTER]
    m[gpu + G_AFTER] = -1
    replace(m, gpu + G_LAST, work)
    if register >= 0:
        set_register(m, register, work)
        m[work + W_REGISTER] = register
    return work


@compiled
def pay_waits(m: Words, gpu: Word) -> None:
    """Let the host make its calls for what was waited for."""
    m[gpu + G_NOW] += m[gpu + G_CALLS] * m[gpu + G_WAIT]
    m[gpu + G_CALLS] = 0


issue_after = compiled(issue_after_ns)


# The launch queue.


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
def reaches_end(m: Words, thread: Word, gpu: Word, register: Word) -> Word:
    """Bring a GPU's clock to the end of what a register stands for; False if the thread has to wait for it first."""
    last, node = m[gpu + G_NOW], m[m[REGISTERS] + register]
    if node <= SETTLED:
        last = max(last, SETTLED - node)
    while node >= 0:
        work = m[node + N_WHAT]
        if m[work + W_END] < 0:
            wait_for(m, work, A_THREAD, thread)
            return False
        last = max(last, m[work + W_END])
        node = m[node + N_NEXT]
    m[gpu + G_NOW] = last
    return True


# Kernels.


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
def launch(m: Words, f: Reals, thread: Word, row: Word) -> Word:
    """Launch what a command says; False if the launch queue is full."""
    gpu, kind, price = gpu_of(m, row), m[row + C_KIND], price_of(m, row)
    long: Word = 0
    if price >= 0:
        ns, launches, host, issue = m[price + K_NS], m[price + K_LAUNCHES], m[price + K_HOST], m[price + K_ISSUE]
        slowdown = f[price + K_SLOWDOWN]
        attention = attention_of(m, row)
        if attention >= 0:
            kind_of = m[attention + AT_KINDS + m[row + C_LAYER]]
            added = attention + AT_KINDS + m[gpu + G_LAYERS] + kind_of * ADDED_WORDS
            long = m[added + AN_NS]
            if long > 0:
                slowdown = max(1.0, (ns * slowdown + f[added + AN_BESIDE]) / (ns + long))
                issue += issue_after(ns + long, long, launches, host) - issue_after(ns, 0, launches, host)
                ns += long
    else:
        saved = (m[gpu + G_MEMBERS] - 1) * m[gpu + G_GROUPED_SAVED]
        ns = max(m[gpu + G_MEMBER_NS] - saved, m[gpu + G_MOST_NS])
        launches, host, slowdown = m[gpu + G_MEMBER_LAUNCHES], m[gpu + G_MEMBER_HOST], f[gpu + G_MEMBER_SLOWDOWN]
        issue = issue_after(ns, 0, launches, host)
    if m[gpu + G_WATCHES] and not has_place(m, thread, gpu, launches):
        return False
    if m[gpu + G_SCATTER] >= 0 and kind != DECOMPRESS:
        part = F_DENSE if kind == DENSE else F_HEAD if kind == HEAD else F_EXPERT
        exact = issue_after(ns, long, launches, host)
        ns, host = times(ns, factor_of(m, f, gpu, part)), times(host, factor_of(m, f, gpu, F_HOST))
        issue += issue_after(ns, long, launches, host) - exact
    held = m[gpu + G_HELD]
    if held:
        issue += issue_after(ns + held, long, launches, host) - issue_after(ns, long, launches, host)
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
