"""The planner of one GPU: it interprets the commands of a run's program, and makes entries of them (`entries`).

Registers stand for entries, as in the engines for work; rooms have slots besides: of the GPU's memory, and of the
host's where that is a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...engine.costs.runtime_costs import pieces_of, token_bucket
from ...engine.decide.commands import COMPUTE, FIXED_REGISTERS, H2D, PREFETCH_LANE, SIDE, TOKENS, Command, Op
from ...engine.decide.dispatch import Visit
from ...engine.decide.host_memory import HostRooms
from ...engine.decide.program import Gpu, Stage
from ...engine.decide.registers import Registers
from ...engine.decide.tables import Rooms
from ...engine.loading.deciders import dispatched, make_host_memory, make_manager, make_prefetch
from ...engine.scenario.inputs import Inputs
from ...engine.timing.simulation import visit_settings
from ...resources.timeline import (
    ACTIVATION,
    COMBINE,
    CPU_EXPERT,
    DECOMPRESS,
    DENSE,
    EXPERT,
    GUESSES,
    PEER,
    PREDICT,
    READ,
    READBACK,
)
from ...workloads.batches import DECODE
from .entries import (
    ASIDE,
    COPIES,
    CPU,
    DRIVE,
    HOST_LANE,
    STREAMS,
    Entry,
    ExecutionError,
    Passing,
    Plan,
    Ref,
)


@dataclass
class _Ahead:
    """What has been said of the next entry of one GPU, until it comes."""

    waits: list[Ref] = field(default_factory=list)
    promotes: list[int] = field(default_factory=list)
    overtakes: int = -1
    slots: list[int] = field(default_factory=list)
    host_slots: list[int] = field(default_factory=list)
    host_slot: int = -1
    source: Ref = (-1, -1)
    former: Ref = (-1, -1)
    receives: int = -1


class Planner:
    """Interprets the commands of one GPU: registers stand for entries, and rooms have slots besides.

    Registers of all GPUs are known to all planners: `known`, by number, is what each stands for.
    """

    def __init__(
        self, number: int, inputs: Inputs, registers: Registers, passing: Passing | None,
        known: dict[int, tuple[Ref, ...]] | None = None,
    ) -> None:  # fmt: skip
        scenario, model = inputs.scenario, inputs.model
        self.number, self._inputs = number, inputs
        self.manager, self.prefetch = make_manager(inputs), make_prefetch(scenario, model)
        self._host = make_host_memory(inputs)
        predicts = inputs.guesses is not None and inputs.predictor.latency_us > 0 and scenario.predictor.lane != "free"
        lends = scenario.parallel.gpus > 1 and scenario.parallel.lends
        preloaded = dict(self.manager.assigned)
        own = registers.own()
        self._lends = lends
        self._rooms = Rooms(own, preloaded.values(), lends=lends)
        requests = [pieces_of(size, scenario.tiers.chunk_bytes) for size in model.expert_bytes]
        tier = None if self._host is None else HostRooms(model.experts, registers.own(), requests)
        self._requests = requests
        settings = visit_settings(scenario, predicts=predicts, gpu=number, lends=lends)
        self.gpu = Gpu(settings, self._rooms, own, tier)
        self._passing = passing
        self.beside: Sequence[Planner] = [self]
        self._visits: list[Visit] = []
        self._experts = model.experts
        self._graph = scenario.dispatch.mode == "graph"
        self._queued = scenario.copy_.by_rank
        self._packed = scenario.compression.where
        self._copy_lanes = {H2D: "h2d", PREFETCH_LANE: "h2d"}
        if scenario.copy_.order.prefetch_stream:
            self._copy_lanes[PREFETCH_LANE] = "prefetch"
        self._pieces = pieces_of(model.expert_bytes[0], scenario.copy_.chunk_bytes)
        self._entries: list[Entry] = []
        self._turns: list[tuple[int, int]] = []
        self._slots = self._marks = self._host_slots = self._unpacked = 0
        self._register: dict[int, tuple[Ref, ...]] = {} if known is None else known
        self._slot_of: dict[int, int] = {}  # by the register of a room
        self._slot_by_copy: dict[int, int] = {}
        self._landed: dict[int, int] = {}  # by what says that its bytes are there
        self._from = -1  # what was waited for last that says so
        self._host_slot_of: dict[int, int] = {}  # of host memory, by the register of what fills it
        self._free: list[int] = []
        self._free_host: list[int] = []
        self._freed_by: dict[int, tuple[Ref, ...]] = {}
        self._ahead = _Ahead()
        self._kernel_waits: list[Ref] = []
        self._visit = self._layer = -1
        self._decodes, self._tokens = False, 0  # of the step
        self._last_kernel = self._first_read = -1
        self._begins = False
        self._members: list[tuple[int, int]] = []
        self.sent_bytes: list[list[int]] = []
        self._aside = self._most_unpacked = self._unpacked_here = 0
        self._preloaded: dict[int, int] = {}
        for expert, copy in preloaded.items():
            slot = self._slot_of[self._rooms.of(copy).register] = self._slot_by_copy[copy] = self._new_slot()
            self._preloaded[expert] = slot

    def stage(self) -> Stage:
        """Returns what this GPU is to do, by itself or as a stage of a pipeline."""
        passing, inputs = self._passing, self._inputs
        return Stage(
            self.gpu, dispatched(inputs, self.manager, self.prefetch, host_memory=self._host), inputs.model.layers,
            inputs.steps, self._visits.append,
            has_head=passing is None or passing.has_head,
            receives=None if passing is None else passing.receives,
            sends=None if passing is None else passing.sends_bytes,
        )  # fmt: skip

    def note(self, visit: Visit) -> None:
        """Note what was decided."""
        self._visits.append(visit)

    def plan(self) -> Plan:
        """Returns the plan, once all commands have been carried out."""
        resident = {
            expert: self._slot_of[self._rooms.of(copy).register] for expert, copy in self.manager.assigned.items()
        }
        return Plan(
            self._entries, self._visits, self.manager, self._slots, self._marks, self._pieces, resident, self._turns,
            self._host_slots, self._most_unpacked, self._preloaded,
        )  # fmt: skip

    def end_turn(self, turn: int) -> None:
        """Note that the host thread leaves this GPU, to which it had turned as its turn of this number."""
        if not self._turns or self._turns[-1][1] < len(self._entries):
            self._turns.append((turn, len(self._entries)))

    def carry_out(self, command: Command) -> None:
        """Add what a command asks for; raise ExecutionError if no call here stands for it."""
        carry = _CARRY_OUT.get(command.op)
        if carry is None:
            raise ExecutionError(f"command {Op(command.op).name}: no CUDA call is made for it (execution on a GPU)")
        carry(self, command)

    def _add(self, command: Command, kind: int, lane: str, tokens: int, **more: Any) -> Entry:
        """Add an entry behind all that was said of it; the command's register stands for it."""
        ahead, self._ahead = self._ahead, _Ahead()
        entry = Entry(
            kind, self._visit, more.pop("layer", self._layer), tokens, lane, command.expert, command.copy,
            overtakes=ahead.overtakes, promotes=tuple(ahead.promotes), mark=self._marks, receives=ahead.receives,
            **more,
        )  # fmt: skip
        self._wait_for(entry, ahead.waits)
        self._entries.append(entry)
        self._marks += entry.marks
        if command.register >= 0:
            self._register[command.register] = (self._ref(),)
        return entry

    def _wait_for(self, entry: Entry, refs: Iterable[Ref]) -> None:
        """Let an entry wait for others, but for what its stream, or the CPU, has in order."""
        waits, others = [], []
        for ref in dict.fromkeys(refs):
            gpu, number = ref
            other = self.beside[gpu]._entries[number]
            if gpu != self.number:
                others.append(ref)
            elif STREAMS.get(other.lane, other.lane) != STREAMS.get(entry.lane, entry.lane) or entry.lane == DRIVE:
                waits.append(number)
            if entry.lane in (CPU, DRIVE) and other.lane in STREAMS:
                other.signals = True
        entry.waits, entry.others = tuple(waits), tuple(others)

    def _ref(self) -> Ref:
        """Returns the last entry."""
        return self.number, len(self._entries) - 1

    def _padded(self, tokens: int) -> int:
        """Returns for how many tokens kernels run: graphs of decode steps are made for some counts only."""
        return token_bucket(tokens) if self._graph and self._decodes else tokens

    def _new_slot(self) -> int:
        self._slots += 1
        return self._slots - 1

    # Commands.

    def _nothing(self, command: Command) -> None:
        """Add nothing: it says what the engines' clocks do."""

    def _begin_visit(self, command: Command) -> None:
        self._visit += 1
        self._unpacked_here = 0

    def _wait(self, command: Command) -> None:
        self._ahead.waits += self._register.get(command.register, ())
        if command.register in self._host_slot_of:
            self._ahead.host_slot = self._host_slot_of[command.register]
        for planner in self.beside:
            if command.register in planner._landed:
                self._from = command.register
                self._ahead.former = self._ahead.source
                self._ahead.source = planner.number, planner._landed[command.register]

    def _hold(self, command: Command) -> None:
        """Let the host wait for what a register stands for, behind all that it has called for so far.

        Where it has called for nothing since it turned to this GPU, the wait is an entry by itself, without a span.
        """
        if len(self.beside) > 1 and (not self._entries or (self._turns and self._turns[-1][1] == len(self._entries))):
            self._entries.append(Entry(-1, self._visit, self._layer, 0, HOST_LANE, mark=self._marks, marks=0))
        self._entries[-1].host_waits += self._register.get(command.register, ())

    def _reclaim(self, command: Command) -> None:
        """Let the next copy have a room's slot; what is left of the room is nobody's, but waits are for it too."""
        register = command.register
        refs = self._register.get(register, ())
        self._ahead.waits += refs
        if command.tokens != 1:
            self._register[register] = ()
        if register in self._slot_of:
            slot = self._slot_of.pop(register)
            self._ahead.slots.append(slot)
            self._freed_by[slot] = refs
            if self._queued and len(refs) == 1 and self._entries[refs[0][1]].kind in COPIES:
                self._ahead.overtakes = refs[0][1]
        if register in self._host_slot_of:
            self._ahead.host_slots.append(self._host_slot_of.pop(register))

    def _touch(self, command: Command) -> None:
        self._register[command.register] = (self._ref(),)
        last = self._entries[-1]
        copied = last.kind in COPIES or last.lane == "fetch"
        if self._lends and copied and command.register != self._from:
            self._lands(self, command.register, last.slot)

    def _lands(self, there: Planner, register: int, slot: int) -> None:
        """Note where the bytes lie, and on which GPU, that a register stands for from now on."""
        for planner in self.beside:
            planner._landed.pop(register, None)
        there._landed[register] = slot

    def _join(self, command: Command) -> None:
        """Let a register stand for the last entry, too; of one stream it keeps the last."""
        last = self._entries[-1]
        kept = [
            ref
            for ref in self._register.get(command.register, ())
            if ref[0] != self.number or last.lane == DRIVE or self._entries[ref[1]].lane != last.lane
        ]
        self._register[command.register] = (*kept, self._ref())

    def _output(self, command: Command) -> None:
        self._register[command.register] = ((self.number, self._last_kernel),)

    def _receive(self, command: Command) -> None:
        if command.register >= 0:  # a copy may come before the kernel that waits
            self._kernel_waits += self._register[command.register]
        else:
            self._ahead.receives = command.extra

    def _promote(self, command: Command) -> None:
        ((_, entry),) = self._register[command.register]
        if self._entries[entry].kind in COPIES:
            self._ahead.promotes.append(entry)

    def _launch(self, command: Command) -> None:
        if command.kind == DENSE:
            self._layer, self._decodes = command.layer, command.peer == DECODE
            self._tokens = self._padded(command.tokens)
        self._ahead.waits += self._kernel_waits
        self._kernel_waits = []
        more: dict[str, Any] = {}
        tokens = self._padded(max(1, command.tokens))
        if command.kind == DECOMPRESS:
            more = self._unpacks(command)
        elif command.kind == EXPERT and self._members:
            more["members"], self._members = tuple(self._members), []
            tokens = sum(count for _, count in more["members"])
        elif command.kind == EXPERT:
            more["slot"] = self._slot_of[command.register]
            if self._packed == "gpu":
                more["scratch"] = self._unpacked
        self._add(command, command.kind, "compute", tokens, **more)
        if command.kind != DECOMPRESS:
            self._last_kernel = len(self._entries) - 1

    def _member(self, command: Command) -> None:
        self._members.append((self._slot_by_copy[command.copy], self._padded(command.tokens)))

    def _unpacks(self, command: Command) -> dict[str, Any]:
        """Returns where an expert lies that is decompressed now, and where to: its room, or one for a single use."""
        slot = self._slot_by_copy[command.copy]
        if self._packed == "host":
            return {"slot": slot}
        self._unpacked, self._unpacked_here = self._unpacked_here, self._unpacked_here + 1
        self._most_unpacked = max(self._most_unpacked, self._unpacked_here)
        return {"slot": slot, "scratch": self._unpacked}

    def _unpack(self, command: Command) -> None:
        lane = f"aside{self._aside}"
        self._aside = (self._aside + 1) % ASIDE
        self._add(command, DECOMPRESS, lane, 1, **self._unpacks(command))

    def _read_back(self, command: Command) -> None:
        if command.kind == GUESSES:
            lane = "guesses" if self._entries[-1].lane == "side" else "d2h"
            self._add(command, GUESSES, lane, self._tokens)
        else:
            self._add(command, READBACK, "d2h", self._padded(command.tokens))

    def _predict(self, command: Command) -> None:
        self._add(command, PREDICT, {SIDE: "side", COMPUTE: "compute"}[command.lane], self._tokens)

    def _take_slot(self) -> tuple[int, tuple[Ref, ...]]:
        """Returns a slot for what comes next, and what it has to wait for besides: what is reclaimed goes first."""
        slots = self._ahead.slots
        slot = slots.pop(0) if slots else self._free.pop() if self._free else self._new_slot()
        self._free += slots
        return slot, self._freed_by.pop(slot, ())

    def _copy(self, command: Command) -> None:
        slot, freed_by = self._take_slot()
        self._ahead.waits += freed_by
        self._slot_of[command.register] = self._slot_by_copy[command.copy] = slot
        layer, marks = command.expert // self._experts, self._pieces if self._queued else 1
        lane, host_slot = self._copy_lanes[command.lane], self._ahead.host_slot
        self._add(
            command, command.kind, lane, 0, layer=layer, slot=slot, target=command.extra, marks=marks,
            host_slot=host_slot,
        )  # fmt: skip

    def _send(self, command: Command) -> None:
        passing = self._passing
        assert passing is not None
        self._add(command, ACTIVATION, "peer", self._tokens, size_bytes=passing.sends_bytes[command.extra])

    # The CPU and the drive.

    def _to_cpu(self, command: Command) -> None:
        self._add(command, ACTIVATION, "to_cpu", command.tokens)
        self._begins = True

    def _cpu(self, command: Command) -> None:
        begins, self._begins = self._begins, False
        self._add(command, CPU_EXPERT, CPU, command.tokens, host_slot=self._ahead.host_slot, begins=begins)

    def _from_cpu(self, command: Command) -> None:
        self._add(command, ACTIVATION, "back", command.tokens)

    def _read(self, command: Command) -> None:
        """Read a piece of an expert into a room of host memory; the others wait for what the first does."""
        layer = command.expert // self._experts
        if command.extra:
            taken = self._ahead.host_slots
            slot = taken.pop(0) if taken else self._free_host.pop() if self._free_host else self._host_slots
            self._free_host += taken
            self._host_slots = max(self._host_slots, slot + 1)
            self._host_slot_of[command.register] = slot
            self._first_read = len(self._entries)
            self._add(command, READ, DRIVE, 0, layer=layer, host_slot=slot, pieces=self._requests[layer])
            return
        first = self._entries[self._first_read]
        piece = len(self._entries) - self._first_read
        entry = self._add(
            command._replace(register=-1), READ, DRIVE, 0, layer=layer, host_slot=first.host_slot, piece=piece,
            pieces=first.pieces,
        )  # fmt: skip
        entry.waits = first.waits
        self._register[command.register] += (self._ref(),)

    # Two GPUs that share the experts of every layer.

    def exchange(self, command: Command) -> None:
        """Let both GPUs send each other tokens, once all that was waited for has ended; both have all then."""
        waits, self._ahead.waits = self._ahead.waits, []
        for planner in self.beside:
            (other,) = (one.number for one in self.beside if one is not planner)
            there, back = planner.sent_bytes[planner.number][other], planner.sent_bytes[other][planner.number]
            planner._ahead = _Ahead(waits=list(waits))
            planner._add(
                command._replace(register=-1), command.kind, "all-to-all", 0,
                size_bytes=back if command.kind == COMBINE else there, source=(other, -1),
            )  # fmt: skip
        for planner in self.beside:
            self._register[planner.number * FIXED_REGISTERS + TOKENS] = tuple(one._ref() for one in self.beside)

    def _fetch(self, command: Command) -> None:
        """Copy an expert out of another GPU's memory."""
        source = self._ahead.source
        slot, freed_by = self._take_slot()
        self._ahead.waits += freed_by
        self._slot_of[command.register] = self._slot_by_copy[command.copy] = slot
        layer = command.expert // self._experts
        self._add(command, PEER, "fetch", 0, layer=layer, slot=slot, source=source)

    def _store(self, command: Command) -> None:
        """Copy an evicted expert into a room of another GPU's spare memory: that of what lay there, if it is known."""
        there = self.beside[command.peer]
        mine, shelf = self._ahead.source, self._ahead.former
        if shelf[1] >= 0:  # what was waited for last is what lay there
            mine, shelf = shelf, mine
        slot = shelf[1] if shelf[1] >= 0 else there._new_slot()
        self._lands(there, command.register, slot)
        self._add(command, PEER, "store", 0, slot=mine[1], source=(command.peer, slot))


_CARRY_OUT: dict[int, Callable[[Planner, Command], None]] = {
    Op.VISIT: Planner._begin_visit,
    Op.WAIT: Planner._wait,
    Op.RECLAIM: Planner._reclaim,
    Op.TOUCH: Planner._touch,
    Op.JOIN: Planner._join,
    Op.LEAVE: Planner._join,
    Op.OUTPUT: Planner._output,
    Op.LAUNCH: Planner._launch,
    Op.MEMBER: Planner._member,
    Op.COPY: Planner._copy,
    Op.READBACK: Planner._read_back,
    Op.NOTICE: Planner._hold,
    Op.DECIDE: Planner._nothing,
    Op.HOLD: Planner._hold,
    Op.PREDICT: Planner._predict,
    Op.PROMOTE: Planner._promote,
    Op.TO_CPU: Planner._to_cpu,
    Op.CPU: Planner._cpu,
    Op.FROM_CPU: Planner._from_cpu,
    Op.UNPACK: Planner._unpack,
    Op.READ: Planner._read,
    Op.CATCH_UP: Planner._nothing,
    Op.CALL: Planner._nothing,
    Op.RECEIVE: Planner._receive,
    Op.SEND: Planner._send,
    Op.FETCH: Planner._fetch,
    Op.STORE: Planner._store,
}
