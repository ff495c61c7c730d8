"""The compiled engine: one simulation over a machine that is laid out in memory, and the loop that feeds it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from ..decide.commands import Command, Op
from .compiled_clock import advance, backlogs
from .compiled_coupling import rate_row
from .compiled_launch import end_busy
from .compiled_layout import RECORDED, Driven, Layout, Machine
from .compiled_peers import settle_arrivals
from .compiled_prices import ROW_WORDS
from .memory import (
    ADDED_WORDS,
    AN_BESIDE,
    AN_NS,
    ARRIVAL_WORDS,
    ARRIVALS,
    ASKED,
    ASKED_FOR,
    AT_KINDS,
    AT_STEP,
    DONE,
    DROPPED,
    DROPPED_WORDS,
    G_ACCESSES,
    G_ASSIGNED,
    G_ATTENTION,
    G_BUDGET,
    G_DECISIONS,
    G_EXCHANGE_NS,
    G_H2D,
    G_NOW,
    G_NUMBER,
    G_PREFETCH,
    G_SPANS,
    K_SLOWDOWN,
    KERNEL_TOKENS,
    KERNEL_WORDS,
    KERNELS,
    L_ACTIVE,
    L_BUSY,
    L_NUMBER,
    L_START,
    LANE,
    NODES_COMMAND,
    NODES_EACH,
    NODES_LEFT,
    NOW,
    PORTION,
    PRICE,
    R_AT,
    R_CAPACITY,
    R_COUNT,
    RATE,
    RATE_ROWS,
    RATE_WORDS,
    RATES,
    RATES_KNOWN,
    RECORD_ROOM,
    RECORDS,
    S_GROUP,
    S_MOVING,
    T_AT,
    T_CAPACITY,
    T_COUNT,
    T_ROWS,
    V_GROUP,
    V_MOVING,
    WORK_EACH,
    WORK_LEFT,
)
from .records import ARRIVAL

Array = npt.NDArray[Any]

_REGISTER = Command._fields.index("register")


class CompiledEngine:
    """One simulation over a machine laid out in memory."""

    def __init__(self, machine: Machine, threads: Sequence[Driven]) -> None:
        self._machine, self._threads = machine, threads
        self.layout = self._layout = Layout(machine, threads)
        self._memory = self._layout.memory
        self._steps = [iter(thread.program) for thread in threads]
        self._portions: list[Iterator[Array]] = [iter(()) for _ in threads]
        self._begun = [False] * len(threads)
        self._number_of = {at: number for number, at in enumerate(self._layout.threads)}

    def now_ns(self, gpu: int) -> int:
        """Returns the clock of the host thread at a GPU."""
        return int(self._memory.words[self._layout.gpus[gpu] + G_NOW])

    def clock_ns(self) -> int:
        """Returns the simulation's clock."""
        return int(self._memory.words[NOW])

    def backlog_ns(self, gpu: int) -> int:
        """Returns the copy time that is queued on a GPU's link now, in ns."""
        return int(backlogs(self._memory.words, self._memory.floats, self._layout.gpus[gpu]))

    def link_busy_ns(self, gpu: int) -> int:
        """Returns how long the copy lanes to a GPU have been busy until now, in ns."""
        words, at = self._memory.words, self._layout.gpus[gpu]
        busy_ns = 0
        for lane in {int(words[at + G_H2D]), int(words[at + G_PREFETCH])}:
            busy_ns += int(words[lane + L_BUSY])
            busy_ns += int(words[NOW] - words[lane + L_START]) if words[lane + L_ACTIVE] >= 0 else 0
        return busy_ns

    def run(self) -> None:
        """Run until nothing is left to do."""
        memory, thread = self._memory, -1
        while True:
            why, thread = advance(memory.words, memory.floats, thread)
            if why == DONE:
                break
            if why == PORTION:
                thread = self._next_portion(thread)
            else:
                self.answer(why)
        self.flush()

    def answer(self, why: int) -> None:
        """Give the machine what it has come back for: a price, a rate, or space."""
        if why == PRICE:
            self._price()
        elif why == RATE:
            self._find_rates()
        elif why == LANE:
            self._name_lane()
        else:
            self._make_space()

    def _next_portion(self, at: int) -> int:
        """Give a thread its next portion, decided now; return the thread, or -1 if it has no more to do."""
        number, words = self._number_of[at], self._memory.words
        driven = self._threads[number]
        self._drop()
        while True:
            portion = next(self._portions[number], None)
            if portion is not None:
                break
            if self._begun[number]:
                self.flush()
                driven.ended()
            step = next(self._steps[number], None)
            if step is None:
                for gpu in driven.gpus:
                    end_busy(words, self._layout.gpus[gpu])
                words[at + T_COUNT] = words[at + T_AT] = 0
                self._begun[number] = False
                return -1
            self._begun[number], self._portions[number] = True, step
        self._take(at, driven, portion)
        return at

    def _take(self, at: int, driven: Driven, portion: Array) -> None:
        """Copy a portion into a thread's place, with what the machine has to know of the visit that it came of."""
        layout, memory = self._layout, self._memory
        if len(portion) > memory.words[at + T_CAPACITY]:
            capacity = 2 * len(portion)
            rows = memory.allocate(capacity * ROW_WORDS)
            memory.words[at + T_ROWS], memory.words[at + T_CAPACITY] = rows, capacity
        most = int(portion[:, _REGISTER].max()) + 1
        if most > layout.registers:
            layout.add_registers(most)
        words = memory.words
        rows = int(words[at + T_ROWS])
        words[rows : rows + len(portion) * ROW_WORDS].reshape(-1, ROW_WORDS)[:, : portion.shape[1]] = portion
        words[at + T_COUNT], words[at + T_AT] = len(portion), 0
        for gpu in driven.gpus:
            place, state = layout.gpus[gpu], self._machine.gpus[gpu].state
            words[place + G_ASSIGNED], words[place + G_BUDGET] = state.assigned
        if self._machine.exchange_ns is not None and (portion[:, 0] == Op.EXCHANGE).any():
            words[layout.gpus[0] + G_EXCHANGE_NS] = self._machine.exchange_ns()

    def _name_lane(self) -> None:
        """Give a lane of copies between GPUs its place in a timeline, at its first use, by the command that asks."""
        words = self._memory.words
        command = Command._make(words[words[ASKED] : words[ASKED] + len(Command._fields)].tolist())
        pair = (command.peer, command.gpu) if command.op == Op.FETCH else (command.gpu, command.peer)
        lane = self._machine.peers[pair][1]()
        words[self._layout.lane_of(lane) + L_NUMBER] = lane.number

    def _drop(self) -> None:
        """Tell the memory managers which prefetches were dropped since the last decision."""
        words = self._memory.words
        region = int(words[DROPPED])
        if not words[region + R_COUNT]:
            return
        at, count = int(words[region + R_AT]), int(words[region + R_COUNT])
        for gpu, expert, copy in words[at : at + count * DROPPED_WORDS].reshape(-1, DROPPED_WORDS).tolist():
            manager = self._machine.gpus[gpu].manager
            if manager.assigned.get(expert) == copy:
                manager.cancel(expert)
        words[region + R_COUNT] = 0

    def _price(self) -> None:
        """Ask what a kernel takes that nobody has asked for yet."""
        words, floats = self._memory.words, self._memory.floats
        shape, tokens = int(words[ASKED]), int(words[ASKED_FOR])
        if shape < 0:
            if tokens < 0:
                self._attend(-shape, -1 - tokens)
            else:
                self._layout.draw(-shape, tokens)
            return
        cost = self._layout.prices[shape](tokens)
        at = int(words[KERNELS] + (shape * words[KERNEL_TOKENS] + tokens) * KERNEL_WORDS)
        words[at : at + K_SLOWDOWN] = (1, cost.ns, cost.launches, cost.host_ns, cost.issue_ns)
        floats[at + K_SLOWDOWN] = cost.slowdown

    def _attend(self, gpu: int, step: int) -> None:
        """Put down what attention adds to the dense parts of a GPU, by its address, in a step."""
        words, floats = self._memory.words, self._memory.floats
        costs = self._machine.gpus[int(words[gpu + G_NUMBER])].lanes.costs
        at = int(words[gpu + G_ATTENTION])
        words[at + AT_STEP] = step
        first = at + AT_KINDS + len(costs.attention.kind_of)
        for kind, added in enumerate(costs.attention_in(step)):
            words[first + kind * ADDED_WORDS + AN_NS] = added.ns
            floats[first + kind * ADDED_WORDS + AN_BESIDE] = added.beside_copy_ns

    def _find_rates(self) -> None:
        """Work out, exactly, how transfers that run at once share the links, and keep it."""
        layout, memory, network = self._layout, self._memory, self._machine.network
        assert network is not None
        words = memory.words
        slot, transfer = int(words[ASKED]), int(words[ASKED_FOR])
        group = int(words[slot + S_GROUP])
        places = words[group + 1 : group + 1 + words[group]].tolist()
        moving = [transfer if place == slot else int(words[place + S_MOVING]) for place in places]
        if 2 * words[RATES_KNOWN] >= words[RATE_ROWS]:
            words[RATE_ROWS] *= 2
            words[RATES_KNOWN] = 0
            rates = memory.allocate(int(words[RATE_ROWS] * words[RATE_WORDS]))
            words = memory.words
            words[RATES] = rates
        row = int(rate_row(words, slot, transfer))
        words[row + V_GROUP] = group
        at = row + V_MOVING
        words[at : at + len(moving)] = moving
        running = [None if number < 0 else layout.transfers[number] for number in moving]
        memory.floats[at + len(moving) : at + 2 * len(moving)] = network.stretches(running)
        words[RATES_KNOWN] += 1

    def _make_space(self) -> None:
        """Write out what was recorded, and make more room where that is not enough for every thread's portion."""
        self.flush()
        words, gpus = self._memory.words, len(self._layout.gpus)
        more = 8 + gpus * gpus + max(int(words[thread + T_COUNT]) for thread in self._layout.threads)
        nodes = NODES_EACH * more + words[NODES_COMMAND]
        if words[WORK_LEFT] <= WORK_EACH * more or words[NODES_LEFT] <= nodes:
            self._layout.add_space()
        for region, size in ((ARRIVALS, ARRIVAL_WORDS), (DROPPED, DROPPED_WORDS)):
            at = int(words[region])
            if words[at + R_COUNT] + more >= words[at + R_CAPACITY]:
                self._memory.grow_region(at, size)
        if more >= words[RECORD_ROOM]:
            for at, (place, size) in product(self._layout.gpus, RECORDED.items()):
                self._memory.grow_region(int(words[at + place]), size)
            self._memory.words[RECORD_ROOM] *= 2

    def _records(self, region: int, words: int) -> Array:
        """Returns the records of a region (records, words), and forget them."""
        memory = self._memory.words
        at, count = memory[region : region + R_CAPACITY].tolist()
        memory[region + R_COUNT] = 0
        return memory[at : at + count * words].reshape(-1, words)

    def flush(self) -> None:
        """Write out what was recorded, GPU by GPU.

        Raises RuntimeError where more work or lists were made than there was room for, which nothing shall do: what
        lies behind them in memory may be wrong by then.
        """
        memory = self._memory.words
        if min(memory[WORK_LEFT], memory[NODES_LEFT]) < 0:
            raise RuntimeError("the compiled engine ran out of room; --engine simpy does without (please report it)")
        for at, one in zip(self._layout.gpus, self._machine.gpus, strict=True):
            accesses, decisions, _ = one.columns
            columns = ((G_SPANS, one.lanes.timeline), (G_ACCESSES, accesses), (G_DECISIONS, decisions))
            for place, column in columns:
                records = self._records(int(memory[at + place]), RECORDED[place])
                if len(records):
                    column.add((records.astype("<i4") if place == G_ACCESSES else records).tobytes())
        memory[RECORDS] = 0
        region, known = int(memory[ARRIVALS]), int(settle_arrivals(memory))
        arrivals = self._records(region, ARRIVAL_WORDS)
        for number, one in enumerate(self._machine.gpus if known else ()):
            own = arrivals[:known][arrivals[:known, 0] == number, 1:]
            packed = np.empty(len(own), dtype=ARRIVAL)
            packed["visit"], packed["kind"], packed["arrived_ns"] = own.T
            one.columns[-1].add(packed.tobytes())
        arrivals[: len(arrivals) - known] = arrivals[known:].copy()
        memory[region + R_COUNT] = len(arrivals) - known
