"""One GPU's part of an execution: its plan made into calls on its own streams, slots, events and kernel groups.

Everything is made beforehand, so that calling is all that is left to do. The experts' copies in host memory, or in
another GPU's, alias a pool of distinct buffers where the model is larger than that; the pool is far larger than any
cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...engine.policies.copy_order import ByRank
from ...engine.scenario.inputs import Inputs
from ...resources.timeline import (
    ACTIVATION,
    DECOMPRESS,
    DENSE,
    EXPERT,
    GUESSES,
    HEAD,
    PEER,
    PREDICT,
    READBACK,
)
from ..device.clocks import Clocks
from ..device.cuda import EXECUTABLE_DTYPES, Call, Calls, Workload, run
from .attending import Attends
from .beside import Beside, is_beside
from .copy_queue import CopyQueue
from .entries import COPIES, HOST_LANE, STREAMS, Entry, Plan
from .grouped import Grouped
from .measured import Times
from .shared import Shared, Ways, check_slots, row_bytes, slot_bytes
from .unpack import unpacking

#: For how many tokens a workload has room at least.
MANY_TOKENS = 64
_NO_WAYS = Ways()
#: How far results may be off whose sums are made in another order, in the element type.
_MOST_WRONG = 0.03


class Part:
    """One GPU's part of a scenario, ready to run: `program` are the calls, step by step, once they are laid out.

    Raises ExecutionError or CudaError if the scenario has parts that cannot be executed.
    """

    def __init__(
        self,
        gpu: Any,
        inputs: Inputs,
        plan: Plan,
        shared: Shared,
        *,
        clock: int = 0,
        ways: Ways = _NO_WAYS,
    ) -> None:
        """Make everything on `gpu`, whose clock has this number; `ways` are those from and to other stages."""
        self._gpu, self._inputs, self.plan = gpu, inputs, plan
        self._receives, self._sends = ways.receives, ways.sends
        model, scenario = inputs.model, inputs.scenario
        check_slots(inputs, plan.slots, gpu.free_bytes())
        self._packing = scenario.compression.where
        self._host = shared.buffers([size for size in model.expert_bytes for _ in range(model.experts)])
        self._copied = [scenario.compression.copied_bytes(len(buffer)) for buffer in self._host]
        self.slots = gpu.empty(max(1, plan.slots), slot_bytes(inputs))
        #: Where copies land that are decompressed behind their arrival, and experts that are for one use.
        self._landing = gpu.empty(plan.slots, row_bytes(max(self._copied))) if self._packing == "host" else self.slots
        self._scratch = gpu.empty(max(1, plan.scratches), max(model.expert_bytes)) if plan.scratches else self.slots
        # As many tokens for all small runs: then their workloads share the same memory.
        most_tokens = max(MANY_TOKENS, *(entry.tokens for entry in plan.entries))
        graphs = scenario.dispatch.mode == "graph"
        self._attends = Attends(inputs)
        self.workload = Workload(
            gpu, model, self._scratch, most_tokens=most_tokens, graphs=graphs, shared=shared.on(gpu)
        )
        waves = [entry for entry in plan.entries if entry.members]
        self.grouped = Grouped(gpu, model, self.slots, self.workload.inputs, waves) if waves else None
        self._compute = gpu.stream()
        # A copy is made by the GPU that the bytes come from.
        copying = gpu if shared.peer is None else shared.peer
        self._behind = None if shared.peer is None else gpu.stream()
        streams = {name: gpu.stream() for name in {*STREAMS.values()} - {"compute", "h2d", "prefetch"}}
        streams |= {"compute": self._compute, "h2d": copying.stream(), "prefetch": copying.stream()}
        self._streams = {lane: streams[name] for lane, name in STREAMS.items()}
        copies_clock = clock if shared.peer is None else clock + 1
        self._choice = gpu.empty(most_tokens * model.top_k, dtype="int32")
        self._host_choice = gpu.host_empty(most_tokens * model.top_k, dtype="int32")
        self._host_guesses = gpu.host_empty(most_tokens, model.top_k, dtype="int64")
        self.beside = Beside(gpu, inputs, plan, shared, self._host)
        self._results = gpu.empty(most_tokens, model.hidden, dtype=model.dense_dtype)
        sent = [entry.size_bytes for entry in plan.entries if entry.lane == "all-to-all"]
        self.sent = gpu.empty(max([1, *sent]))
        self.received = gpu.empty(max([1, *sent]))
        self._starts = [gpu.event() for _ in range(plan.marks)]
        self._ends = [gpu.event() for _ in range(plan.marks)]
        self._clocks = [clock] * plan.marks
        for entry in plan.entries:
            if entry.kind in (READBACK, GUESSES):  # it follows the kernels on the same stream
                self._starts[entry.mark] = self._ends[entry.mark - 1]
            elif entry.lane == "peer" and ways.sends is not None:
                self._ends[entry.mark] = ways.sends.ends[self._step_of(entry)]
            elif entry.kind in COPIES:
                self._clocks[entry.mark : entry.mark + entry.marks] = [copies_clock] * entry.marks
        order = scenario.copy_.order()
        self._queue = CopyQueue(plan.entries, self._ends, order) if isinstance(order, ByRank) else None
        self.program: list[Calls] = []
        self.turns: list[tuple[int, int]] = []
        self._stamp_of: list[int] = []
        self._wait_stamps: list[tuple[int, int, int]] = []
        self._parts: Sequence[Part] = [self]
        self._unpacked = {entry.copy for entry in plan.entries if entry.kind == DECOMPRESS}

    @property
    def turn(self) -> Calls:
        """The calls by which a thread turns to this GPU."""
        return (self._gpu.use(self._compute),)

    # From entries to calls.

    def lay_out(self, parts: Sequence[Part]) -> None:
        """Make the calls of each step of the program, given those of all GPUs; note the steps of entries and waits.

        `turns` are the plan's, by steps of the program in place of entries.
        """
        self._parts = parts
        if len(parts) == 2 and any(entry.source[0] >= 0 for entry in self.plan.entries):
            self._gpu.meet(next(part for part in parts if part is not self)._gpu)
        program, plan = self.program, self.plan
        poll: Calls = ((self._queue.poll, ()),) if self._queue is not None else ()
        turn_of = {end: turn for turn, end in plan.turns}
        for number, entry in enumerate(plan.entries):
            program.append(poll + self._promotes(entry) + self._calls(number, entry))
            self._stamp_of.append(len(program) - 1)
            for gpu, other in entry.host_waits:
                part = parts[gpu]
                program.append(part.host_wait(other))
                if part.plan.entries[other].kind == READBACK:
                    self._wait_stamps.append((entry.visit, len(program) - 2, len(program) - 1))
            if number + 1 in turn_of:
                self.turns.append((turn_of[number + 1], len(program)))
        if self._queue is not None:
            program.append(((self._queue.drain, ()),))
            self.turns[-1] = (self.turns[-1][0], len(program))
        self._gpu.synchronize()

    def host_wait(self, number: int) -> Calls:
        """Returns the calls by which the host waits for the end of an entry; copies in its queue go on meanwhile."""
        entry, queue = self.plan.entries[number], self._queue
        if is_beside(entry):
            return (self.beside.host_wait(number),)
        end = self.end_of(number)
        if queue is None:
            return ((end.synchronize, ()),)
        made: Calls = ((queue.wait_until_made, (number,)),) if entry.kind in COPIES else ()
        return (*made, (queue.wait_for, (end,)))

    def end_of(self, number: int) -> Any:
        """Returns the event at the end of an entry."""
        entry = self.plan.entries[number]
        return self._ends[entry.mark + entry.marks - 1]

    def _calls(self, number: int, entry: Entry) -> Calls:
        """Returns the calls of an entry, and behind them the flag of its end if a thread beside the host's waits."""
        if entry.lane == HOST_LANE:
            return ()
        if is_beside(entry):
            return self.beside.orders(number)
        calls = self._work(number, entry)
        if entry.signals:
            calls += (self.beside.tells(number, self._streams[entry.lane]),)
        return calls

    def _work(self, number: int, entry: Entry) -> Calls:
        kind, lane = entry.kind, entry.lane
        if lane == "peer":
            return self._send(entry)
        if kind in (READBACK, GUESSES):
            return self._read_back(entry)
        if kind in COPIES:
            if self._queue is not None:
                return self._queue.prepare(number, [self._queued_piece(entry, piece) for piece in range(entry.marks)])
            copies = tuple(self._piece(entry, piece) for piece in range(self.plan.pieces))
            return self._on_copy_stream(entry, self._waits(entry) + self._timed(entry, copies))
        made = self._waits(entry) if entry.receives < 0 else self._receive(entry)
        made += self._timed(entry, self._group(entry))
        return made if lane == "compute" else (self._gpu.use(self._streams[lane]), *made, self._gpu.use(self._compute))

    def _group(self, entry: Entry) -> Calls:
        """Returns what an entry does of kernels, and of copies that are no experts from the host."""
        kind = entry.kind
        if kind == EXPERT and entry.members:
            assert self.grouped is not None
            return self.grouped.calls(entry)
        if kind == EXPERT:
            return self.workload.expert(entry.slot if entry.scratch < 0 else entry.scratch, entry.tokens)
        if kind == DENSE:
            return self.workload.dense(entry.layer, entry.tokens, self._attends.of(entry.visit))
        if kind == HEAD:
            return self.workload.head(entry.tokens)
        if kind == PREDICT:
            return self.workload.predict(entry.tokens)
        if kind == DECOMPRESS:
            into = self.slots[entry.slot] if entry.scratch < 0 else self._scratch[entry.scratch]
            return (unpacking(self._landing[entry.slot], into),)
        if kind == ACTIVATION:  # to the CPU, or from it
            source, target = self.workload.tokens, self.beside.tokens
            if entry.lane == "back":
                source, target = self.beside.results, self._results
            source, target = (each[: entry.tokens].view(target.dtype) for each in (source, target))
            return ((target.copy_, (source, True)),)
        return self._to_other(entry)

    def _to_other(self, entry: Entry) -> Calls:
        """Returns the copy between this GPU and another one: of tokens, or of an expert."""
        other, stream = self._parts[entry.source[0]], self._streams[entry.lane]
        if entry.kind != PEER:
            if not entry.size_bytes:
                return ()
            sent, received = self.sent[: entry.size_bytes], other.received[: entry.size_bytes]
            return (self._gpu.between(received, sent, stream),)
        mine, its = self.slots[entry.slot], other.slots[entry.source[1]]
        target, source = (mine, its) if entry.lane == "fetch" else (its, mine)
        return (self._gpu.between(target, source, stream),)

    def _read_back(self, entry: Entry) -> Calls:
        """Returns the calls that copy the choice, or guesses, to the host, behind what has made them."""
        stream = self._streams[entry.lane]
        if entry.kind == GUESSES:
            target, source = self._host_guesses[: entry.tokens], self.workload.guesses[: entry.tokens]
        else:
            count = entry.tokens * self._inputs.model.top_k
            target, source = self._host_choice[:count], self._choice[:count]
        made: Calls = ((target.copy_, (source, True)), (self._ends[entry.mark].record, (stream,)))
        return made if stream is self._compute else (self._gpu.use(stream), *made, self._gpu.use(self._compute))

    def _send(self, entry: Entry) -> Calls:
        """Returns the calls that copy what the last kernel leaves to the next GPU."""
        way = self._sends
        assert way is not None
        copy = (way.target[: entry.size_bytes].copy_, (way.source[: entry.size_bytes], True))
        stream = self._streams["peer"]
        calls = (self._gpu.use(way.behind), self._gpu.use(stream), *self._waits(entry), *self._timed(entry, (copy,)))
        made: Calls = ((way.made[self._step_of(entry)].set, ()),) if way.made else ()
        return (*calls, *made, self._gpu.use(self._compute))

    def _receive(self, entry: Entry) -> Calls:
        """Returns the calls that make the compute stream wait for what another GPU sends."""
        way, step = self._receives, entry.receives
        assert way is not None
        made: Calls = ((way.made[step].wait, ()),) if way.made else ()
        return (*made, (way.ends[step].wait, (self._compute,)))

    def _step_of(self, entry: Entry) -> int:
        return entry.visit // self._inputs.model.layers

    def _promotes(self, entry: Entry) -> Calls:
        if self._queue is None:
            return ()
        return tuple(self._queue.demand(other, entry.visit) for other in entry.promotes)

    def _waits(self, entry: Entry) -> Calls:
        """Returns the calls that make an entry's stream wait for others; what is not queued yet is waited for here."""
        stream = self._streams[entry.lane]
        calls: list[Call] = []
        for other in entry.waits:
            last = self.plan.entries[other]
            if is_beside(last):
                calls.append(self.beside.awaits(other, stream))
                continue
            if self._queue is not None and last.kind in COPIES:
                calls.append((self._queue.wait_until_made, (other,)))
            calls.append((self.end_of(other).wait, (stream,)))
        calls += [(self._parts[gpu].end_of(other).wait, (stream,)) for gpu, other in entry.others]
        return tuple(calls)

    def _timed(self, entry: Entry, calls: Calls, piece: int = 0) -> Calls:
        """Returns calls with an event before and behind them."""
        mark, stream = entry.mark + piece, self._streams[entry.lane]
        return (self._starts[mark].record, (stream,)), *calls, (self._ends[mark].record, (stream,))

    def _on_copy_stream(self, entry: Entry, calls: Calls) -> Calls:
        behind = () if self._behind is None else (self._gpu.use(self._behind),)
        return (*behind, self._gpu.use(self._streams[entry.lane]), *calls, self._gpu.use(self._compute))

    def _piece(self, entry: Entry, piece: int) -> Call:
        """Returns the call that copies one piece of an expert into its slot."""
        source = self._host[entry.expert] if entry.host_slot < 0 else self.beside.host_slots[entry.host_slot]
        size_bytes = self._copied[entry.expert]
        piece_bytes = -(-size_bytes // self.plan.pieces)
        here = slice(piece * piece_bytes, min(size_bytes, (piece + 1) * piece_bytes))
        return self._landing[entry.slot][here].copy_, (source[here], True)

    def _queued_piece(self, entry: Entry, piece: int) -> Calls:
        """Returns the calls that make one piece of a copy from the priority queue."""
        waits = self._waits(entry) if piece == 0 else ()
        return self._on_copy_stream(entry, waits + self._timed(entry, (self._piece(entry, piece),), piece))

    def holds_right_bytes(self, expert: int, slot: int) -> bool:
        """Whether a slot holds what the host has of an expert, decompressed or as it is, byte for byte."""
        here, copied = self.slots[slot], self._host[expert][: self._copied[expert]]
        there = copied.to(here.device)
        if self._packing == "host" and self.plan.manager.assigned[expert] not in self._unpacked:
            here = self._landing[slot]  # nobody has used it
        elif self._packing == "host":
            wanted = here.clone()
            run((unpacking(there, wanted[: len(self._host[expert])]),))
            return bool((here == wanted).all())
        return bool((here[: len(there)] == there).all())

    def wrong_results(self) -> str:
        """Returns what the last run has computed wrong, in words: experts in grouped kernels, or on the CPU."""
        waves = [entry for entry in self.plan.entries if entry.members]
        off = [("grouped kernels", self.grouped.wrong_by(waves[-1]))] if self.grouped is not None else []
        if self.beside.cpu_threads and self._inputs.model.expert_dtype in EXECUTABLE_DTYPES:
            off.append(("experts on the CPU", self.beside.wrong_by(self._host)))
        return "; ".join(f"{what} are off by {error:.2%}" for what, error in off if not error < _MOST_WRONG)

    # Running.

    def synchronize(self) -> None:
        """Wait for all that was launched, and for the threads beside. Raises CudaError if one of these failed."""
        self._gpu.synchronize()
        self.beside.join()
        self.beside.check()

    def let_go(self) -> None:
        """Let no thread wait for what others have not enqueued."""
        self.beside.let_go()
        if self._receives is not None:
            for made in self._receives.made:
                made.set()

    def make_ready(self) -> None:
        """Forget the last run, put what is preloaded in its place, let the GPU become idle, and turn to it."""
        if self._queue is not None:
            self._queue.clear()
        if self._receives is not None:
            for made in self._receives.made:
                made.clear()
        run(self.turn)
        for expert, slot in self.plan.preloaded.items():
            self._landing[slot][: self._copied[expert]].copy_(self._host[expert][: self._copied[expert]])
            if self._packing == "host":
                run((unpacking(self._landing[slot], self.slots[slot]),))
        if self.grouped is not None:
            self.grouped.begin()
        self._gpu.synchronize()

    def times(self, stamps: npt.NDArray[np.int64], clocks: Clocks) -> Times:
        """Returns the times of a run that has ended; `stamps` (steps of the program,) are ns from its start."""
        plan, queue = self.plan, self._queue
        issued_ns = np.repeat(stamps[self._stamp_of], [entry.marks for entry in plan.entries])
        made = np.ones(plan.marks, dtype=bool)
        if queue is not None:
            queued_ns = np.array(queue.issued_ns, dtype=np.int64)
            copies = np.array([entry.kind in COPIES for entry in plan.entries for _ in range(entry.marks)])
            made = ~copies | (queued_ns >= 0)
            issued_ns = np.where(copies, np.where(made, queued_ns - clocks.host_zero_ns, -1), issued_ns)
        start_ns, end_ns = np.full((2, plan.marks), -1, dtype=np.int64)
        for number, entry in enumerate(plan.entries):
            if is_beside(entry):
                made[entry.mark] = False
                when_ns = self.beside.when_ns(number)
                start_ns[entry.mark], end_ns[entry.mark] = (ns - clocks.host_zero_ns for ns in when_ns)
        for mark in np.flatnonzero(made).tolist():
            start_ns[mark] = clocks.at_ns(self._clocks[mark], self._starts[mark])
            end_ns[mark] = clocks.at_ns(self._clocks[mark], self._ends[mark])
        return Times(start_ns, end_ns, issued_ns, *self._known(stamps), stamps[-1:])

    def _known(self, stamps: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Returns when the host began to wait for each visit's choice (-1: never), and when it knew it.

        Where nothing was waited for, that is when the dense part was launched, or what came last before.
        """
        visits = len(self.plan.visits)
        known_ns, from_ns = np.zeros(visits, dtype=np.int64), np.full(visits, -1, dtype=np.int64)
        for entry, step in zip(self.plan.entries, self._stamp_of, strict=True):
            if entry.kind == DENSE:
                known_ns[entry.visit] = stamps[step]
        for visit, before, behind in self._wait_stamps:
            if from_ns[visit] < 0:
                from_ns[visit] = stamps[before]
            known_ns[visit] = stamps[behind]
        return from_ns, np.maximum.accumulate(known_ns)
