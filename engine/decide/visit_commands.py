"""From a layer visit to commands: the calls that the host makes for it, in order. No other place knows them.

    launch the dense part, copy the choice to the host, notice it              (`order_dense`)
    decide; hand over what needs no copy; copy what is missing; launch the
    experts, each behind its bytes; predict, and prefetch                      (`order_visit`)

A visit is decided elsewhere, by the memory manager or by compiled code, and comes in as tables of integers; the
commands go out as rows. All of it is compiled, and Python calls the same functions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ...machine_code import compiled_once
from ...resources.timeline import DECOMPRESS, DEMAND, DEMOTION, DENSE, EXPERT, PREDICT, PREFETCH
from ...resources.timeline import GUESSES as GUESSES_SPAN
from ...resources.timeline import READ as READ_SPAN
from ...resources.timeline import READBACK as READBACK_SPAN
from ...resources.timeline import SWAP as SWAP_SPAN
from ..policies.miss import CPU as ON_CPU
from ..policies.miss import DEFERRED, LOW_PRECISION
from .commands import CHOICE, COMPUTE, GUESSES, H2D, HOST, LATER, OUTPUT, RESULTS, UNPACKED, Command, Op

Array = npt.NDArray[Any]
# What compiled functions take (see `machine_code`).
Words = npt.NDArray[Any]
Table = npt.NDArray[Any]
Word = Any

# The operations by number, which compiled code takes for constants.
WAIT, RECLAIM, TOUCH, JOIN = int(Op.WAIT), int(Op.RECLAIM), int(Op.TOUCH), int(Op.JOIN)
LAUNCH, MEMBER, COPY, READBACK = int(Op.LAUNCH), int(Op.MEMBER), int(Op.COPY), int(Op.READBACK)
NOTICE, DECIDE, HOLD, PREDICT_OP = int(Op.NOTICE), int(Op.DECIDE), int(Op.HOLD), int(Op.PREDICT)
PROMOTE, TO_CPU, CPU, FROM_CPU, UNPACK = (
    int(Op.PROMOTE), int(Op.TO_CPU), int(Op.CPU), int(Op.FROM_CPU), int(Op.UNPACK),
)  # fmt: skip
FETCH, STORE, READ, LEAVE = int(Op.FETCH), int(Op.STORE), int(Op.READ), int(Op.LEAVE)
OUTPUT_OP, CATCH_UP, IDLE, SCHEDULE = int(Op.OUTPUT), int(Op.CATCH_UP), int(Op.IDLE), int(Op.SCHEDULE)
SWAP = int(Op.SWAP)
COLUMNS = len(Command._fields)

# What a scenario says of every visit: an array of integers.
#: Where compressed experts are decompressed: nowhere; on the GPU at every use, by the compute stream or aside; once,
#: when they have come from the host, by the compute stream at first use or aside behind the copy.
PLAIN, ON_GPU, ON_GPU_ASIDE, FROM_HOST, FROM_HOST_ASIDE = range(5)
SETTINGS = (
    "gpu", "first_register", "reads_back", "by_priority", "prefetch_first", "resident_first", "grouped", "holds",
    "predictor_lane", "prefetch_lane", "packing", "lends", "awaits_guesses", "gpu_issues", "tiers", "gathers",
    "cpu_blocks", "waits",
)  # fmt: skip
(
    GPU, FIRST_REGISTER, READS_BACK, BY_PRIORITY, PREFETCH_FIRST, RESIDENT_FIRST, GROUPED, HOLDS, PREDICTOR_LANE,
    PREFETCH_LANE, PACKING, LENDS, AWAITS_GUESSES, GPU_ISSUES, TIERS, GATHERS, CPU_BLOCKS, WAITS,
) = range(len(SETTINGS))  # fmt: skip

# A visit: an array of integers, and tables of what it serves, of its copies, of the rooms they take, and of what needs
# no copy.
V_NUMBER, V_LAYER, V_WAVES, V_CPU_TOKENS, V_PHASE, VISIT_COLUMNS = range(6)
#: By access, in order: the expert, the tokens that chose it, its copy and room, its wave, whether it is fetched.
S_EXPERT, S_TOKENS, S_COPY, S_ROOM, S_WAVE, S_FETCHED, SERVED_COLUMNS = range(7)
#: By copy, in order of dispatch: its wave (or what else it is), the visit it is for, and where its rooms begin and end
#: in the table of rooms taken.
#: Where GPUs lend each other experts: the GPU that it comes from (-1: the host), the register that stands for its bytes
#: there, the one to join when they have been read (-1: that same one), and the one of its own bytes.
#: Where host memory is a cache: the registers of the expert's bytes there and of the copies out of its room, the read
#: that brings them, in how many requests (0: it is there, or on its way; of what comes back from the GPU: what its copy
#: takes, in ns), and where the rooms that it takes begin and end in the table of rooms taken.
(
    O_EXPERT, O_COPY, O_ROOM, O_WAVE, O_TARGET, O_FIRST, O_LAST, O_PEER, O_FROM, O_READ, O_LANDED, O_FILLED, O_LEAVING,
    O_NUMBER, O_REQUESTS, O_FREED, O_FREED_LAST, COPIED_COLUMNS,
) = range(18)  # fmt: skip
#: Instead of a wave: a prefetch; a read into host memory for no copy; a copy back into host memory, out of O_ROOM,
#: which stands behind the copy that it makes room for.
PREFETCHED, STAGED, DEMOTED = -1, -2, -3
#: By room that is taken: whether some of it is left. Where GPUs lend each other experts: what stands for its bytes, for
#: copies of them, the GPU that stores the expert (-1: none), the register of where it lies there, and of what lay
#: there. Of a room of host memory: what stands for its bytes is T_ROOM, for copies of them T_LENT.
T_ROOM, T_LEFT, T_LANDED, T_LENT, T_PEER, T_EXPERT, T_SHELF, T_FORMER, TAKEN_COLUMNS = range(9)
#: By access that needs no copy, or some of its tokens: its way, and the tokens; if the CPU computes it, where it lies
#: in host memory, as of a copy.
R_EXPERT, R_WAY, R_TOKENS, R_FILLED, R_LEAVING, R_NUMBER, R_REQUESTS, R_FREED, R_FREED_LAST, RESOLVED_COLUMNS = range(
    10
)

#: What is known of a room: its bytes are on their way, and no kernel waits for them yet; they came compressed.
UNREAD, PACKED = 1, 2

#: At most so many commands behind a copy belong to it.
_BEHIND_A_COPY = 4

#: None of these makes an array: Numba need not count who holds which.
_compiled = partial(compiled_once, _nrt=False)
#: Those that Python calls.
_entry = partial(_compiled, entry=True)


@_entry
def add(
    rows: Table, op: Word, gpu: Word, kind: Word, lane: Word, layer: Word, tokens: Word, expert: Word, copy: Word,
    register: Word, peer: Word, extra: Word,
) -> None:  # fmt: skip
    """Add a command; `rows[0, 0]` counts them, the first being row 1."""
    at = rows[0, 0] + 1
    rows[0, 0] = at
    row = rows[at]
    row[0], row[1], row[2], row[3], row[4], row[5] = op, gpu, kind, lane, layer, tokens
    row[6], row[7], row[8], row[9], row[10] = expert, copy, register, peer, extra


@_compiled
def wait(rows: Table, gpu: Word, register: Word, calls: Word) -> None:
    """Let the next work wait for a register; the host makes so many calls for it."""
    add(rows, WAIT, gpu, -1, -1, -1, -1, -1, -1, register, -1, calls)


@_entry
def order_dense(
    settings: Words, layer: Word, tokens: Word, step: Word, phase: Word, results: Word, rows: Table
) -> None:
    """Launch the dense part of a layer over a step's `tokens` tokens, behind the CPU's `results`, if there are any."""
    gpu, first = settings[GPU], settings[FIRST_REGISTER]
    if results:
        wait(rows, gpu, first + RESULTS, 1)
    add(rows, LAUNCH, gpu, DENSE, COMPUTE, layer, tokens, -1, -1, first + CHOICE, phase, step)
    add(rows, TOUCH, gpu, -1, -1, -1, -1, -1, -1, first + OUTPUT, -1, -1)


@_entry
def order_readback(settings: Words, layer: Word, tokens: Word, rows: Table) -> None:
    """Copy the choice that the dense part has made to the host."""
    gpu, first = settings[GPU], settings[FIRST_REGISTER]
    wait(rows, gpu, first + OUTPUT, 0)
    add(rows, READBACK, gpu, READBACK_SPAN, -1, layer, tokens, -1, -1, first + CHOICE, -1, -1)


@_entry
def order_tokens(settings: Words, tokens: Word, rows: Table) -> None:
    """Copy what the head has sampled at `tokens` positions to the host, which waits for it."""
    gpu, first = settings[GPU], settings[FIRST_REGISTER]
    add(rows, OUTPUT_OP, gpu, -1, -1, -1, -1, -1, -1, first + OUTPUT, -1, -1)
    wait(rows, gpu, first + OUTPUT, 0)
    add(rows, READBACK, gpu, READBACK_SPAN, -1, -1, tokens, -1, -1, first + CHOICE, -1, -1)
    add(rows, NOTICE, gpu, -1, -1, -1, -1, -1, -1, first + CHOICE, -1, -1)
    add(rows, CATCH_UP, gpu, -1, -1, -1, -1, -1, -1, -1, -1, -1)


@_entry
def order_idle(settings: Words, until_ns: Word, rows: Table) -> None:
    """Let the host have nothing to do until an instant."""
    add(rows, IDLE, settings[GPU], -1, -1, -1, -1, -1, -1, -1, -1, until_ns)
    add(rows, CATCH_UP, settings[GPU], -1, -1, -1, -1, -1, -1, -1, -1, -1)


@_entry
def order_swaps(settings: Words, out_ns: Word, in_ns: Word, rows: Table) -> None:
    """Copy KV blocks to host memory, and others back behind them, in so many ns each (0: none), before any kernel."""
    gpu, register = settings[GPU], settings[FIRST_REGISTER] + CHOICE
    if out_ns:
        add(rows, SWAP, gpu, SWAP_SPAN, -1, -1, -1, -1, -1, register, -1, out_ns)
        wait(rows, gpu, register, 1)
    if in_ns:
        add(rows, SWAP, gpu, SWAP_SPAN, H2D, -1, -1, -1, -1, register, -1, in_ns)
        wait(rows, gpu, register, 1)


@_compiled
def reclaim_in_host(settings: Words, tier: Words, taken: Table, rows: Table) -> None:
    """Let the next work wait for what leaves the rooms of host memory that it takes."""
    gpu = settings[GPU]
    for place in range(tier[4], tier[5]):
        left = taken[place, T_LEFT]
        add(rows, RECLAIM, gpu, -1, -1, -1, left, -1, -1, taken[place, T_ROOM], -1, 0)
        add(rows, RECLAIM, gpu, -1, -1, -1, left, -1, -1, taken[place, T_LENT], -1, 0)


@_compiled
def order_read(settings: Words, expert: Word, tier: Words, taken: Table, behind: Word, rows: Table) -> None:
    """Read an expert into host memory, if it has to be, behind what leaves the rooms that it takes and a register.

    `tier` are the columns of its row that say where it lies there (O_FILLED or R_FILLED, and what follows).
    """
    gpu, filled, read, requests = settings[GPU], tier[0], tier[2], tier[3]
    if requests == 0:
        return
    reclaim_in_host(settings, tier, taken, rows)
    if behind >= 0:
        wait(rows, gpu, behind, 0)
    for request in range(requests):
        add(rows, READ, gpu, READ_SPAN, -1, -1, -1, expert, read, filled, -1, int(request == 0))


@_compiled
def order_low(settings: Words, visit: Words, resolved: Table, rows: Table) -> None:
    """Launch what low precision stands in for."""
    for number in range(len(resolved)):
        access = resolved[number]
        if access[R_WAY] == LOW_PRECISION:
            add(
                rows, LAUNCH, settings[GPU], EXPERT, COMPUTE, visit[V_LAYER], access[R_TOKENS], access[R_EXPERT], -1,
                -1, visit[V_PHASE], LOW_PRECISION,
            )  # fmt: skip


@_compiled
def order_on_cpu(
    settings: Words, visit: Words, resolved: Table, way: Word, behind: Word, taken: Table, rows: Table
) -> None:
    """Let the CPU compute what has a way, one expert after another, each behind a register that then stands for all."""
    gpu = settings[GPU]
    for number in range(len(resolved)):
        access = resolved[number]
        if access[R_WAY] != way:
            continue
        if settings[TIERS]:
            order_read(settings, access[R_EXPERT], access[R_FILLED:], taken, -1, rows)
            wait(rows, gpu, access[R_FILLED], 0)
        wait(rows, gpu, behind, 0)
        add(rows, CPU, gpu, -1, -1, visit[V_LAYER], access[R_TOKENS], access[R_EXPERT], -1, -1, -1, -1)
        if settings[TIERS]:
            add(rows, LEAVE, gpu, -1, -1, -1, -1, -1, -1, access[R_LEAVING], -1, -1)


@_compiled
def order_results(settings: Words, layer: Word, tokens: Word, behind: Word, rows: Table) -> None:
    """Bring the CPU's results of so many tokens to the GPU behind a register."""
    gpu = settings[GPU]
    if settings[CPU_BLOCKS]:
        add(rows, HOLD, gpu, -1, -1, -1, -1, -1, -1, behind, -1, -1)
    wait(rows, gpu, behind, 0)
    add(rows, FROM_CPU, gpu, -1, -1, layer, tokens, -1, -1, settings[FIRST_REGISTER] + RESULTS, -1, -1)


@_compiled
def order_resolved(settings: Words, rooms: Words, visit: Words, resolved: Table, taken: Table, rows: Table) -> bool:
    """Launch what low precision stands in for, and let the CPU compute the rest; return whether it has results.

    What was deferred by the visit before comes with its results: the CPU, which does one thing after another, has done
    it before. `rooms` has at LATER for how many tokens it was.
    """
    gpu, layer, tokens = settings[GPU], visit[V_LAYER], visit[V_CPU_TOKENS]
    results, later = settings[FIRST_REGISTER] + RESULTS, settings[FIRST_REGISTER] + LATER
    pending, at_once, deferred = rooms[later], False, False
    order_low(settings, visit, resolved, rows)
    for number in range(len(resolved)):
        at_once = at_once or resolved[number, R_WAY] == ON_CPU
        deferred = deferred or resolved[number, R_WAY] == DEFERRED
    if pending and not at_once:
        order_results(settings, layer, pending, later, rows)
    rooms[later] = tokens if deferred else 0
    if at_once or deferred:
        sent = results if at_once else later
        wait(rows, gpu, settings[FIRST_REGISTER] + CHOICE, 0)
        add(rows, TO_CPU, gpu, -1, -1, layer, tokens, -1, -1, sent, -1, -1)
        order_on_cpu(settings, visit, resolved, ON_CPU, sent, taken, rows)
        if at_once:
            add(rows, TOUCH, gpu, -1, -1, -1, -1, -1, -1, results, -1, -1)
        if deferred:
            order_on_cpu(settings, visit, resolved, DEFERRED, sent, taken, rows)
            add(rows, TOUCH, gpu, -1, -1, -1, -1, -1, -1, later, -1, -1)
    if at_once:
        order_results(settings, layer, max(tokens, pending), results, rows)
    return at_once or pending > 0


@_compiled
def order_stores(settings: Words, taken: Table, first: Word, last: Word, rows: Table) -> None:
    """Copy evicted experts into other GPUs' spare memory, before their rooms are taken."""
    gpu = settings[GPU]
    for place in range(first, last):
        room = taken[place]
        if room[T_PEER] >= 0:
            wait(rows, gpu, room[T_LANDED], 0)
            if room[T_FORMER] >= 0:
                wait(rows, gpu, room[T_FORMER], 0)
            add(rows, STORE, gpu, -1, -1, -1, -1, room[T_EXPERT], -1, room[T_SHELF], room[T_PEER], -1)
            add(rows, TOUCH, gpu, -1, -1, -1, -1, -1, -1, room[T_LENT], -1, -1)


@_compiled
def order_demotions(settings: Words, copies: Table, number: Word, taken: Table, rows: Table) -> None:
    """Copy what makes room for a copy back to host memory, behind its last reader; its room is then as if read."""
    gpu, at = settings[GPU], number + 1
    while at < len(copies) and copies[at, O_WAVE] == DEMOTED:
        back = copies[at]
        reclaim_in_host(settings, back[O_FILLED:], taken, rows)
        wait(rows, gpu, back[O_ROOM], 1)
        add(rows, SWAP, gpu, DEMOTION, -1, -1, -1, back[O_EXPERT], -1, back[O_FILLED], -1, back[O_REQUESTS])
        add(rows, TOUCH, gpu, -1, -1, -1, -1, -1, -1, back[O_ROOM], -1, -1)
        at += 1


@_compiled
def order_copy(
    settings: Words, rooms: Words, kind: Word, lane: Word, copies: Table, number: Word, taken: Table, behind: Word,
    rows: Table,
) -> None:  # fmt: skip
    """Copy an expert into its room, behind the last readers of what lay there, and behind a register if it is one."""
    gpu, lends, copied = settings[GPU], settings[LENDS], copies[number]
    by_gpu, tiers = settings[GPU_ISSUES] and kind == PREFETCH, settings[TIERS] and copied[O_PEER] < 0
    room, expert, copy, first, last = copied[O_ROOM], copied[O_EXPERT], copied[O_COPY], copied[O_FIRST], copied[O_LAST]
    if tiers:
        order_read(settings, expert, copied[O_FILLED:], taken, behind, rows)
        order_demotions(settings, copies, number, taken, rows)
    if lends:
        order_stores(settings, taken, first, last, rows)
    for place in range(first, last):
        add(
            rows, RECLAIM, gpu, -1, -1, -1, taken[place, T_LEFT], -1, -1, taken[place, T_ROOM], -1,
            int(place == first and not by_gpu),
        )  # fmt: skip
        if lends:
            add(rows, RECLAIM, gpu, -1, -1, -1, taken[place, T_LEFT], -1, -1, taken[place, T_LENT], -1, 0)
    if behind >= 0:
        wait(rows, gpu, behind, 0)
    if settings[GATHERS]:  # a kernel on the compute stream: behind all that was launched there
        add(rows, OUTPUT_OP, gpu, -1, -1, -1, -1, -1, -1, settings[FIRST_REGISTER] + OUTPUT, -1, -1)
        wait(rows, gpu, settings[FIRST_REGISTER] + OUTPUT, 0)
    if tiers:
        wait(rows, gpu, copied[O_FILLED], 0)
    if copied[O_PEER] < 0:
        add(rows, COPY, gpu, kind, lane, -1, int(by_gpu), expert, copy, room, -1, copied[O_TARGET])
    else:
        wait(rows, gpu, copied[O_FROM], 0)
        add(rows, FETCH, gpu, -1, -1, -1, -1, expert, copy, room, copied[O_PEER], -1)
        if copied[O_READ] < 0:
            add(rows, TOUCH, gpu, -1, -1, -1, -1, -1, -1, copied[O_FROM], -1, -1)
        else:
            add(rows, JOIN, gpu, -1, -1, -1, -1, -1, -1, copied[O_READ], -1, -1)
    if tiers:
        add(rows, LEAVE, gpu, -1, -1, -1, -1, -1, -1, copied[O_LEAVING], -1, -1)
    if lends:
        add(rows, TOUCH, gpu, -1, -1, -1, -1, -1, -1, copied[O_LANDED], -1, -1)
    if settings[HOLDS]:
        add(rows, HOLD, gpu, -1, -1, -1, -1, -1, -1, room, -1, -1)
    rooms[room] = UNREAD | PACKED if settings[PACKING] == FROM_HOST else UNREAD
    if settings[PACKING] == FROM_HOST_ASIDE:
        wait(rows, gpu, room, 0)
        add(rows, UNPACK, gpu, DECOMPRESS, -1, -1, -1, expert, copy, room, -1, -1)


@_compiled
def order_experts(
    settings: Words, rooms: Words, visit: Words, served: Table, wave: Word, fetched: Word, rows: Table
) -> None:
    """Launch the experts of one wave in order of access: all (-1), those that were found (0) or are fetched (1)."""
    gpu, layer, packing = settings[GPU], visit[V_LAYER], settings[PACKING]
    for number in range(len(served)):
        access = served[number]
        if access[S_WAVE] != wave or (fetched >= 0 and access[S_FETCHED] != fetched):
            continue
        expert, copy, room = access[S_EXPERT], access[S_COPY], access[S_ROOM]
        if rooms[room] & UNREAD:
            wait(rows, gpu, room, 1)
        if packing == ON_GPU_ASIDE:
            wait(rows, gpu, -1, 1)
            add(rows, UNPACK, gpu, DECOMPRESS, -1, -1, -1, expert, copy, settings[FIRST_REGISTER] + UNPACKED, -1, -1)
            wait(rows, gpu, settings[FIRST_REGISTER] + UNPACKED, 0)
        elif packing == ON_GPU or rooms[room] & PACKED:
            add(rows, LAUNCH, gpu, DECOMPRESS, COMPUTE, layer, -1, expert, copy, -1, -1, -1)
        rooms[room] = 0
        add(rows, LAUNCH, gpu, EXPERT, COMPUTE, layer, access[S_TOKENS], expert, copy, room, visit[V_PHASE], -1)


@_compiled
def order_members(
    settings: Words, rooms: Words, visit: Words, served: Table, wave: Word, fetched: Word, rows: Table
) -> None:
    """Put the experts of one wave, chosen as in `order_experts`, into the grouped kernel that is launched next."""
    gpu = settings[GPU]
    for number in range(len(served)):
        access = served[number]
        if access[S_WAVE] != wave or (fetched >= 0 and access[S_FETCHED] != fetched):
            continue
        room = access[S_ROOM]
        if rooms[room] & UNREAD:
            wait(rows, gpu, room, 1)
        rooms[room] = 0
        add(
            rows, MEMBER, gpu, EXPERT, -1, visit[V_LAYER], access[S_TOKENS], access[S_EXPERT], access[S_COPY],
            -1, visit[V_PHASE], -1,
        )  # fmt: skip


@_compiled
def order_grouped(settings: Words, rooms: Words, visit: Words, served: Table, wave: Word, rows: Table) -> None:
    """Launch one kernel for all experts of a wave, behind the bytes of all; none if no token is routed here."""
    gpu, before = settings[GPU], rows[0, 0]
    if settings[RESIDENT_FIRST]:
        order_members(settings, rooms, visit, served, wave, 0, rows)
        order_members(settings, rooms, visit, served, wave, 1, rows)
    else:
        order_members(settings, rooms, visit, served, wave, -1, rows)
    if rows[0, 0] == before:
        return
    last = rows[rows[0, 0], 7]  # the copy of the last member
    add(rows, LAUNCH, gpu, EXPERT, COMPUTE, visit[V_LAYER], -1, -1, last, -1, visit[V_PHASE], -1)
    for number in range(len(served)):
        access = served[number]
        if access[S_WAVE] == wave:
            add(rows, TOUCH, gpu, -1, -1, -1, -1, -1, -1, access[S_ROOM], -1, -1)


@_compiled
def order_prefetches(settings: Words, rooms: Words, visit: Words, copies: Table, taken: Table, rows: Table) -> None:
    """Predict, then copy what the guesses ask for, once whoever issues the copies has them."""
    gpu, first, lane = settings[GPU], settings[FIRST_REGISTER], settings[PREDICTOR_LANE]
    behind = first + CHOICE if settings[GPU_ISSUES] else -1
    if lane >= 0:
        if lane != HOST and lane != COMPUTE:
            wait(rows, gpu, first + CHOICE, 1 - settings[READS_BACK])
        add(rows, PREDICT_OP, gpu, PREDICT, lane, -1, -1, -1, -1, first + GUESSES, -1, -1)
        if lane != HOST:
            behind = first + GUESSES
    if settings[AWAITS_GUESSES]:
        fetches = 0
        for number in range(len(copies)):
            if copies[number, O_WAVE] == PREFETCHED:
                fetches = 1
        wait(rows, gpu, first + GUESSES, 0)
        add(rows, READBACK, gpu, GUESSES_SPAN, -1, -1, -1, -1, -1, first + GUESSES, -1, -1)
        add(rows, NOTICE, gpu, -1, -1, -1, fetches, -1, -1, first + GUESSES, -1, 1)
        behind = -1
    for number in range(len(copies)):
        if copies[number, O_WAVE] == PREFETCHED:
            order_copy(settings, rooms, PREFETCH, settings[PREFETCH_LANE], copies, number, taken, behind, rows)
    for number in range(len(copies)):
        if copies[number, O_WAVE] == STAGED:
            copied = copies[number]
            order_read(settings, copied[O_EXPERT], copied[O_FILLED:], taken, behind, rows)


@_compiled
def wait_for_gathers(settings: Words, rows: Table) -> None:
    """Let the next kernel wait for the last copy so far: a gather kernel, which had the compute stream to itself."""
    last = rows[0, 0]
    for at in range(last, max(0, last - _BEHIND_A_COPY), -1):
        if rows[at, 0] == COPY:
            wait(rows, settings[GPU], rows[at, 8], 0)
            return


@_entry
def order_visit(
    settings: Words, rooms: Words, visit: Words, served: Table, copies: Table, taken: Table, resolved: Table,
    rows: Table,
) -> bool:  # fmt: skip
    """Order all that a visit comes to once it is decided; return whether the next kernel waits for the CPU's results.

    `rooms` (registers,) is what is known of each room, from visit to visit.
    """
    gpu, last = settings[GPU], visit[V_WAVES] - 1
    on_cpu = order_resolved(settings, rooms, visit, resolved, taken, rows)
    for wave in range(visit[V_WAVES]):
        if settings[BY_PRIORITY]:
            for number in range(len(served)):
                access = served[number]
                if access[S_WAVE] == wave and not access[S_FETCHED]:
                    add(
                        rows, PROMOTE, gpu, -1, H2D, -1, -1, access[S_EXPERT], access[S_COPY], access[S_ROOM], -1,
                        visit[V_NUMBER],
                    )  # fmt: skip
        for number in range(len(copies)):
            if copies[number, O_WAVE] == wave:
                order_copy(settings, rooms, DEMAND, H2D, copies, number, taken, -1, rows)
        if settings[PREFETCH_FIRST] and wave == last:
            order_prefetches(settings, rooms, visit, copies, taken, rows)
        if settings[GATHERS]:
            wait_for_gathers(settings, rows)
        if settings[GROUPED]:
            order_grouped(settings, rooms, visit, served, wave, rows)
        elif settings[RESIDENT_FIRST]:
            order_experts(settings, rooms, visit, served, wave, 0, rows)
            order_experts(settings, rooms, visit, served, wave, 1, rows)
        else:
            order_experts(settings, rooms, visit, served, wave, -1, rows)
    if not settings[PREFETCH_FIRST]:
        order_prefetches(settings, rooms, visit, copies, taken, rows)
        if settings[GATHERS]:
            wait_for_gathers(settings, rows)
    return on_cpu


def settings_array(**chosen: int) -> Array:
    """Returns the settings of a run, by the names in SETTINGS; what is left out is 0, lanes are none."""
    defaults = {"predictor_lane": -1, "prefetch_lane": H2D}
    return np.array([int(chosen.get(name, defaults.get(name, 0))) for name in SETTINGS], dtype=np.int64)
