"""The program of a run: its commands, portion by portion, each decided when the one before has been ordered.

A portion ends where the next decision is made: when the router's choice has come to the host and been noticed. There is
one program for each host thread: of a GPU (perhaps a stage of a pipeline), or of all GPUs that go through every layer
together, since they share its experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ...resources.timeline import ACTIVATION, COMBINE, DENSE, DISPATCH, EXPERT, HEAD
from ...workloads.batches import Step
from ...workloads.requests.request import Wait
from ..policies.prefetch import Gauge
from .commands import CHOICE, COMPUTE, FIXED_REGISTERS, OUTPUT, RESULTS, TOKENS, Command, Op
from .dispatch import Visit
from .expert_parallel import ParallelVisit
from .host_memory import HostRooms
from .pulled import Pulled
from .registers import Registers
from .spare_memory import Store
from .tables import Loans, Rooms, visit_tables
from .visit_commands import (
    COLUMNS,
    FIRST_REGISTER,
    GPU,
    LENDS,
    READS_BACK,
    TIERS,
    WAITS,
    add,
    order_dense,
    order_idle,
    order_readback,
    order_swaps,
    order_tokens,
    order_visit,
)

Array = npt.NDArray[Any]
#: The portions of each step.
Program = Iterator[Iterator[Array]]

#: Rows that any visit needs besides those of its accesses, copies and rooms, and the most for each of these.
_SOME_ROWS, _ROWS_EACH = 64, 8
_COLUMNS = ("kind", "lane", "layer", "tokens", "expert", "copy", "register", "peer", "extra")
_REGISTER = Command._fields.index("register")

#: What commands do to a register but change it: wait for it, or join it, which several parts may do in any order.
_TO_REGISTERS = {Op.WAIT: Op.WAIT, Op.HOLD: Op.WAIT, Op.NOTICE: Op.WAIT, Op.PROMOTE: Op.WAIT, Op.JOIN: Op.JOIN}


class Parts:
    """Parts of a program that the threads of several GPUs carry out beside each other, each in order.

    Where parts name the same registers, a command is put behind those of other parts that must have been ordered first.
    """

    def __init__(self, *, share_registers: bool) -> None:
        self._share = share_registers
        self._commands: dict[int, list[Array]] = {}  # by GPU
        self._named: dict[int, dict[int, dict[Op, int]]] = {}  # by GPU and register: its last command of each kind

    def add(self, gpu: int, commands: Array) -> None:
        """Add to the part of a GPU."""
        part = self._commands.setdefault(gpu, [])
        if not self._share:
            part.extend(commands)
            return
        own = self._named.setdefault(gpu, {})
        behind = dict.fromkeys(self._named, 0)
        for command in commands:
            register = int(command[_REGISTER])
            if register >= 0:
                does = _TO_REGISTERS.get(Op(int(command[0])), Op.TOUCH)
                for other, named in self._named.items():
                    last = max((at for did, at in named.get(register, {}).items() if _in_order(did, does)), default=0)
                    if other != gpu and last > behind[other]:
                        behind[other] = last
                        part.append(_command(Op.BEHIND, gpu, peer=other, extra=last))
                own.setdefault(register, {})[does] = len(part) + 1
            part.append(command)

    def taken(self) -> list[Array]:
        """Returns all commands, each GPU's behind one that says how many they are, and begin anew."""
        found = []
        for gpu, commands in self._commands.items():
            found += [_command(Op.PART, gpu, extra=len(commands)), *commands]
        self._commands.clear()
        self._named.clear()
        return found


def _command(op: Op, gpu: int, **columns: int) -> Array:
    named = {"op": int(op), "gpu": gpu, **columns}
    return np.array([named.get(name, -1) for name in Command._fields], dtype=np.int64)


def _in_order(one: Op, other: Op) -> bool:
    """Whether two things that commands do to one register must come one after the other."""
    return one != other or one == Op.TOUCH


class Rows:
    """A buffer of commands, used again for every portion; `share_registers`: its parts name the same ones."""

    def __init__(self, *, share_registers: bool = False) -> None:
        self._rows = np.zeros((4096, COLUMNS), dtype=np.int64)
        self._parts = Parts(share_registers=share_registers)
        self._apart = False  # whether there are parts that are not in the buffer yet

    def room_for(self, more: int) -> Array:
        """Returns the buffer with room for so many more commands."""
        if self._apart:
            self._end_parts()
        needed = int(self._rows[0, 0]) + more + 1
        if needed > len(self._rows):
            grown = np.zeros((2 * needed, COLUMNS), dtype=np.int64)
            grown[: len(self._rows)] = self._rows
            self._rows = grown
        return self._rows

    def add(self, op: Op, gpu: int, **columns: int) -> None:
        """Add a command by the names of its columns; what is left out is -1."""
        add(self.room_for(1), int(op), gpu, *(columns.get(name, -1) for name in _COLUMNS))

    @contextmanager
    def part(self, gpu: int) -> Iterator[None]:
        """Let a thread of the GPU's own carry out what is added, beside the parts of others just before and behind."""
        first, self._apart = int(self._rows[0, 0]), False
        yield
        last, self._rows[0, 0] = int(self._rows[0, 0]), first
        self._parts.add(gpu, self._rows[first + 1 : last + 1].copy())
        self._apart = True

    def _end_parts(self) -> None:
        self._apart = False
        commands = self._parts.taken()
        rows = self.room_for(len(commands))
        first = int(rows[0, 0])
        rows[0, 0] = first + len(commands)
        rows[first + 1 : rows[0, 0] + 1] = commands

    def portion(self) -> Array:
        """Returns the commands since the last portion (commands, columns); they are valid until the next is begun."""
        if self._apart:
            self._end_parts()
        count = int(self._rows[0, 0])
        self._rows[0, 0] = 0
        return self._rows[1 : count + 1]


@dataclass(eq=False)
class Gpu:
    """What the commands of one GPU are made of: the settings of a run, and its rooms."""

    settings: Array
    rooms: Rooms
    registers: Registers
    host: HostRooms | None = None
    may_wait: bool = False  # whether its host thread may have to wait between its commands
    known: Array = field(default_factory=lambda: np.zeros(1024, dtype=np.int64))
    results: bool = False  # whether the next dense part, or the head, waits for the CPU's results

    def __post_init__(self) -> None:
        self.number = int(self.settings[GPU])
        self.reads_back = bool(self.settings[READS_BACK])

    def register(self, name: int) -> int:
        """Returns the number of a register that every GPU has."""
        return int(self.settings[FIRST_REGISTER]) + name

    def dense(self, rows: Rows, layer: int, tokens: int, step: int, phase: int) -> None:
        """Order a layer's dense part in a step."""
        order_dense(self.settings, layer, tokens, step, phase, self.results, rows.room_for(_SOME_ROWS))
        self.results = False

    def read_back(self, rows: Rows, layer: int, tokens: int) -> None:
        """Order the copy of the choice to the host."""
        order_readback(self.settings, layer, tokens, rows.room_for(_SOME_ROWS))

    def serve(self, rows: Rows, visit: Visit, phase: int, loans: Loans | None = None) -> None:
        """Order all that a visit in a step of a phase comes to, now that it is decided."""
        tables = visit_tables(visit, phase, self.rooms, loans, self.host)
        if self.registers.count > len(self.known):
            self.known = np.concatenate([self.known, np.zeros(self.registers.count, dtype=np.int64)])
        parts = len(tables.served) + 2 * len(tables.copies) + len(tables.taken) + len(tables.resolved)
        parts += tables.requests
        self.results = order_visit(
            self.settings, self.known, tables.visit, tables.served, tables.copies, tables.taken, tables.resolved,
            rows.room_for(_SOME_ROWS + _ROWS_EACH * parts),
        )  # fmt: skip

    def decide(self, rows: Rows, visit: Visit) -> None:
        """Order what the host does between the choice and what is decided by it."""
        fetches = int(bool(visit.waves[0].admitted))
        rows.add(Op.DECIDE, self.number, layer=visit.layer, tokens=fetches, extra=visit.number)

    def head(self, rows: Rows, tokens: int) -> None:
        """Order the head over `tokens` positions."""
        self.await_results(rows)
        rows.add(Op.LAUNCH, self.number, kind=HEAD, lane=COMPUTE, tokens=tokens)
        if self.settings[WAITS]:
            rows.add(Op.OUTPUT, self.number, register=self.register(OUTPUT))
            rows.add(Op.NOTICE, self.number, register=self.register(OUTPUT))

    def await_results(self, rows: Rows) -> None:
        """Let the next work wait for what the CPU has computed for this visit, if anything."""
        if self.results:
            rows.add(Op.WAIT, self.number, register=self.register(RESULTS), extra=1)
            self.results = False


@dataclass(frozen=True)
class Stage:
    """One GPU of a pipeline, or the only one: its visits as they are decided, and what it is to do with its steps.

    `receives` (steps,) is the step whose data from the stage before each one waits for (-1: none);
    `sends` (steps,) the bytes that go to the next stage. `decided` is told each visit as it is decided. Where threads
    share host memory, each visit is `alone` from its decision until it is ordered.
    """

    gpu: Gpu
    visits: Iterator[Visit]
    layers: int
    steps: Sequence[Step]
    decided: Callable[[Visit], None]
    has_head: bool = True
    #: Whether the host waits for the tokens that a step samples, as one that schedules by them does.
    awaits_tokens: bool = False
    receives: Sequence[int] | None = None
    sends: Sequence[int] | None = None
    alone: bool = False

    def step(self, rows: Rows, step: int) -> Iterator[Array]:
        """Yields the portions of one step."""
        gpu, phase, tokens = self.gpu, self.steps[step].phase, len(self.steps[step].rows)
        for layer in range(self.layers):
            rows.add(Op.VISIT, gpu.number, extra=int(layer == 0))
            if self.receives is not None and layer == 0 and self.receives[step] >= 0:
                rows.add(Op.RECEIVE, gpu.number, kind=DENSE, extra=self.receives[step])
            gpu.dense(rows, layer, tokens, step, phase)
            if gpu.reads_back:
                gpu.read_back(rows, layer, tokens)
                rows.add(Op.NOTICE, gpu.number, register=gpu.register(CHOICE))
            rows.add(Op.CATCH_UP, gpu.number)
            if self.alone:
                rows.add(Op.ENTER, gpu.number)
            yield rows.portion()
            visit = next(self.visits)
            self.decided(visit)
            gpu.decide(rows, visit)
            self.serve(rows, visit, phase)
            if self.alone:
                rows.add(Op.EXIT, gpu.number)
        rows.add(Op.CATCH_UP, gpu.number)
        if self.has_head:
            gpu.head(rows, max(1, self.steps[step].sampled))  # of chunks, too, whose logits nobody looks at
        if self.awaits_tokens:
            order_tokens(gpu.settings, max(1, self.steps[step].sampled), rows.room_for(_SOME_ROWS))
        if self.sends is not None and self.sends[step]:
            gpu.await_results(rows)
            rows.add(Op.OUTPUT, gpu.number, register=gpu.register(OUTPUT))
            rows.add(Op.WAIT, gpu.number, register=gpu.register(OUTPUT), extra=1)
            rows.add(Op.SEND, gpu.number, kind=ACTIVATION, extra=step)
        yield rows.portion()

    def serve(self, rows: Rows, visit: Visit, phase: int) -> None:
        """Order what a visit in a step of a phase comes to, now that it is decided."""
        self.gpu.serve(rows, visit, phase)


def stages_program(stages: Sequence[Stage]) -> Program:
    """Yields the program of a thread that takes every step through some stages, one after the other."""
    rows = Rows()
    for step in range(len(stages[0].steps)):
        yield _through(stages, rows, step)


def pulled_program(stage: Stage, pulled: Pulled, gauge: Gauge) -> Program:
    """Yields the program of a thread that asks a scheduler for each step when it has the tokens of the one before.

    It idles while there is nothing to run. `gauge` is the thread's clock.
    """
    rows = Rows()
    while (found := pulled.next(gauge.now_ns(), gauge.link_busy_ns())) is not None:
        if isinstance(found, Wait):
            order_idle(stage.gpu.settings, found.until_ns, rows.room_for(_SOME_ROWS))
            yield iter([rows.portion()])
        else:
            if pulled.schedule_ns:
                rows.add(Op.SCHEDULE, stage.gpu.number, extra=pulled.schedule_ns)
            order_swaps(stage.gpu.settings, *pulled.swaps_ns(found), rows.room_for(_SOME_ROWS))
            yield _through([stage], rows, len(pulled.steps) - 1)


def _through(stages: Sequence[Stage], rows: Rows, step: int) -> Iterator[Array]:
    for stage in stages:
        rows.add(Op.TURN, stage.gpu.number, extra=1)
        yield from stage.step(rows, step)


class SharedLayers:
    """The program of GPUs that share the experts of every layer: they meet at every choice, and exchange tokens.

    `one_thread` dispatches to all of them, in turns. `moves` says whether a visit's traffic is an exchange at all.
    """

    def __init__(
        self, gpus: Sequence[Gpu], visits: Iterator[ParallelVisit], layers: int, one_thread: bool,
        moves: Callable[[Array], bool], decided: Callable[[ParallelVisit], None],
    ) -> None:  # fmt: skip
        self._gpus, self._visits, self._layers, self._one = gpus, visits, layers, one_thread
        self._moves, self._decided = moves, decided
        self._rows = Rows(share_registers=any(gpu.settings[LENDS] or gpu.settings[TIERS] for gpu in gpus))
        self._choices = len(gpus) * FIXED_REGISTERS  # the register of the last choice of all
        self._shelves: dict[tuple[int, int], int] = {}  # registers of spare memory, by GPU and number
        self._left: list[int] = []  # registers that nobody needs once a visit is ordered
        self._back = False  # whether tokens come back from other GPUs before the next kernels
        #: Whether threads of their own do not wait for each other, but where all meet.
        self.apart = not one_thread and any(gpu.may_wait for gpu in gpus)

    def program(self, steps: Sequence[Step], homes: Sequence[Array]) -> Program:
        """Yields the program; `homes` (steps,) are the GPUs of each step's tokens."""
        for number, (step, home) in enumerate(zip(steps, homes, strict=True)):
            yield self._step(number, step, np.bincount(home, minlength=len(self._gpus)).tolist())

    def _step(self, number: int, step: Step, tokens: list[int]) -> Iterator[Array]:
        rows, phase = self._rows, step.phase
        for layer in range(self._layers):
            self._dense(layer, tokens, number, phase)
            self._choose(layer, tokens)
            rows.add(Op.CATCH_UP, 0, extra=1)
            yield rows.portion()
            visit = next(self._visits)
            self._decided(visit)
            moves = visit.traffic is not None and self._moves(visit.traffic)
            self._send(visit, moves, tokens)
            self._serve(visit, phase, moves)
            if moves:
                self._exchange(COMBINE, self._outputs(visit))
            self._back = moves
        for gpu, count in zip(self._each(), tokens, strict=True):
            if count:
                self._receive(gpu, HEAD)
                gpu.head(rows, min(count, step.sampled))
        self._back = False
        yield rows.portion()

    def _turns(self) -> Iterator[Gpu]:
        """Yields the GPUs, each with its thread at it."""
        for gpu in self._gpus:
            if self._one:
                self._rows.add(Op.TURN, gpu.number, extra=0)
            yield gpu

    def _each(self) -> Iterator[Gpu]:
        """Yields the GPUs, each with its own thread or the one at it."""
        if not self.apart:
            yield from self._turns()
            return
        for gpu in self._gpus:
            with self._rows.part(gpu.number):
                yield gpu

    def _receive(self, gpu: Gpu, kind: int) -> None:
        if self._back:
            self._rows.add(Op.RECEIVE, gpu.number, kind=kind, register=gpu.register(TOKENS))

    def _dense(self, layer: int, tokens: list[int], step: int, phase: int) -> None:
        """Order the dense part of each GPU's tokens; a thread that waits for no other reads its choice back at once."""
        for gpu, count in zip(self._each(), tokens, strict=True):
            self._rows.add(Op.VISIT, gpu.number, extra=0)
            if count:
                self._receive(gpu, DENSE)
                gpu.dense(self._rows, layer, count, step, phase)
                if self.apart:
                    gpu.read_back(self._rows, layer, count)

    def _choose(self, layer: int, tokens: list[int]) -> None:
        """Bring every GPU's choice to the host, and let every thread notice when the last one is known."""
        first = True
        for gpu, count in zip(self._turns(), tokens, strict=True):
            if count:
                if not self.apart:
                    gpu.read_back(self._rows, layer, count)
                op = Op.TOUCH if first else Op.JOIN
                self._rows.add(op, gpu.number, register=self._choices)
                first = False
        for gpu in self._turns():
            self._rows.add(Op.NOTICE, gpu.number, register=self._choices)

    def _send(self, visit: ParallelVisit, moves: bool, tokens: list[int]) -> None:
        """Note what was decided, and let tokens go to the GPUs that have their experts."""
        for gpu, own in zip(self._turns(), visit.visits, strict=True):
            gpu.decide(self._rows, own)
        if not moves:
            return
        homes = [gpu for gpu, count in zip(self._gpus, tokens, strict=True) if count]
        self._exchange(DISPATCH, [gpu.register(OUTPUT) for gpu in homes])
        for gpu, own in zip(self._turns(), visit.visits, strict=True):
            if own.computes:
                self._rows.add(Op.RECEIVE, gpu.number, kind=EXPERT, register=gpu.register(TOKENS))

    def _outputs(self, visit: ParallelVisit) -> list[int]:
        """Returns the registers of what the GPUs, and the CPU for them, have computed of a visit."""
        registers = []
        for gpu, own in zip(self._gpus, visit.visits, strict=True):
            registers += [gpu.register(OUTPUT)] if own.computes else []
            registers += [gpu.register(RESULTS)] if gpu.results else []
            gpu.results = False
        return registers

    def _exchange(self, kind: int, after: Sequence[int]) -> None:
        """Order an exchange of tokens once some registers' work has ended."""
        for gpu in self._turns():
            self._rows.add(Op.CALL, gpu.number)
        for register in after:
            self._rows.add(Op.WAIT, 0, register=register, extra=0)
        self._rows.add(Op.EXCHANGE, 0, kind=kind)

    def _serve(self, visit: ParallelVisit, phase: int, moves: bool) -> None:
        for gpu, own in zip(self._each(), visit.visits, strict=True):
            if moves and own.resolution.cpu_tokens:  # what goes to the CPU has come from other GPUs
                self._rows.add(Op.WAIT, gpu.number, register=gpu.register(TOKENS), extra=0)
            loans = self._loans(visit, gpu.number) if gpu.settings[LENDS] else None
            gpu.serve(self._rows, own, phase, loans)
            if own.computes:
                self._rows.add(Op.OUTPUT, gpu.number, register=gpu.register(OUTPUT))
            for register in self._left:
                gpu.registers.give(register)
            self._left.clear()

    def _loans(self, visit: ParallelVisit, gpu: int) -> Loans:
        """Returns what a GPU's copies have to do with other GPUs' memory, by register, in the order of its admissions.

        What is fetched out of spare memory may leave its room to what is stored next.
        """
        stores: dict[int, tuple[int, int, int, int]] = {}
        sources: dict[int, tuple[int, int, int]] = {}
        for admission in visit.visits[gpu].admissions():
            for copy in admission.former:
                if copy in visit.stores[gpu]:
                    stores[copy] = self._stored(visit.stores[gpu][copy], self._gpus[gpu].registers)
            if admission.copy in visit.sources[gpu]:
                sources[admission.copy] = self._source(*visit.sources[gpu][admission.copy])
        return Loans(sources, stores)

    def _stored(self, store: Store, registers: Registers) -> tuple[int, int, int, int]:
        """Returns where an evicted expert goes: GPU, expert, and the registers of its room and of what lay there."""
        shelf = self._shelves[store.gpu, store.number] = registers.take()
        former = self._shelves.pop((store.gpu, store.former), -1)
        self._left += [former] if former >= 0 else []
        return store.gpu, store.expert, shelf, former

    def _source(self, other: int, number: int) -> tuple[int, int, int]:
        """Returns where a copy from another GPU comes from: out of its spare memory, or of its own."""
        shelf = self._shelves.get((other, number), -1)
        if shelf >= 0:
            return other, shelf, -1
        room = self._gpus[other].rooms.of(number)
        return other, room.landed, room.lent
