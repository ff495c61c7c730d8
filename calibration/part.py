"""One GPU's part of an execution: its plan made into calls on its own streams, slots, events and kernel groups.

Everything is made beforehand, so that calling is all that is left to do. The experts' copies in host memory, or in
another GPU's, alias a pool of distinct buffers where the model is larger than that; the pool is far larger than any
cache.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event
from time import perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.policies.copy_order import ByRank, QueuedCopy, Rank
from ..engine.scenario.inputs import Inputs
from ..errors import InputError
from ..resources.timeline import ACTIVATION, DENSE, EXPERT, HEAD, PREFETCH, READBACK
from .clocks import Clocks
from .cuda import Call, Calls, CudaError, Workload, run
from .host import Cores
from .measured import Times
from .plan import COPIES, STREAMS, Entry, Plan

#: Bytes of host memory that the experts' copies alias if they need more.
POOL_BYTES = 3 * 2**30
#: For how many tokens a workload has room at least.
MANY_TOKENS = 64


class Shared:
    """What executions share: memory that experts are copied from, filled with random weights once, and GPU memory.

    Each buffer holds numbers of its own, so that a slot's bytes tell which buffer they came from. The pool lies in
    host memory, pinned or not, or in the memory of the GPU `peer`. `cores` knows how fast the host can be.
    """

    def __init__(self, gpu: Any, size_bytes: int = POOL_BYTES, *, pinned: bool = True, peer: Any = None) -> None:
        self.cores = Cores()
        self.peer = peer
        self._on_gpu: dict[int, dict[Any, Any]] = {}
        self.bytes = gpu.host_empty(size_bytes, pinned=pinned) if peer is None else peer.empty(size_bytes)
        piece = 64 * 2**20
        for number, start in enumerate(range(0, size_bytes, piece)):
            part = self.bytes[start : start + piece]
            random = gpu.random(len(part) // 2, dtype="bfloat16", scale=0.02, seed=1000 + number)
            part.copy_(random.view(part.dtype))
        gpu.synchronize()

    def on(self, gpu: Any) -> dict[Any, Any]:
        """Returns what workloads on a GPU share there."""
        return self._on_gpu.setdefault(gpu.index, {})

    def buffers(self, count: int, size_bytes: int) -> list[Any]:
        """Returns a buffer of `size_bytes` for each of `count` experts; they repeat where the pool is too small."""
        different = len(self.bytes) // size_bytes
        if not different:
            raise InputError(f"an expert of {size_bytes} bytes is larger than the pool of {len(self.bytes)} bytes")
        views = [self.bytes[at * size_bytes : (at + 1) * size_bytes] for at in range(min(count, different))]
        return [views[number % different] for number in range(count)]


@dataclass(frozen=True)
class Way:
    """The way from one GPU to another: memory on both, the events behind each step's copy, and the streams.

    torch orders a copy between GPUs behind the current streams of both: that of the first makes it, and `behind` is one
    of the second that has nothing else to do. Between two threads, `made` says of each step whether the copy is
    enqueued: only then can a stream wait for its event.
    """

    source: Any
    target: Any
    behind: Any
    ends: Sequence[Any]
    made: Sequence[Event]


@dataclass(frozen=True)
class Ways:
    """The ways that a stage receives by and sends by, if it does."""

    receives: Way | None = None
    sends: Way | None = None


def check_slots(inputs: Inputs, slots: int, free_bytes: int) -> None:
    """Raise CudaError if so many experts take more than is free of a GPU, or one takes more than the pool."""
    size_bytes = inputs.model.expert_bytes[0]
    if size_bytes > POOL_BYTES:
        raise CudaError(
            f"model {inputs.model.name}: an expert takes {size_bytes / 2**30:.1f} GiB, and the pool that experts are "
            f"copied from {POOL_BYTES / 2**30:.1f} GiB"
        )
    if slots * size_bytes > free_bytes:
        raise CudaError(
            f"memory.gpu_budget = {inputs.scenario.memory.gpu_budget!r}: {slots} experts take "
            f"{slots * size_bytes / 2**30:.1f} GiB, and {free_bytes / 2**30:.1f} GiB of the GPU are free"
        )


class Part:
    """One GPU's part of a scenario, ready to run: `program` are the calls, step by step.

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
        ways: Ways = Ways(),
    ) -> None:
        """Make everything on `gpu`, whose clock has this number; `ways` are those from and to other stages."""
        self._gpu, self._inputs, self.plan = gpu, inputs, plan
        self._receives, self._sends = ways.receives, ways.sends
        model, scenario = inputs.model, inputs.scenario
        size_bytes = model.expert_bytes[0]
        check_slots(inputs, plan.slots, gpu.free_bytes())
        self._host = shared.buffers(model.total_experts, size_bytes)
        self.slots = gpu.empty(max(1, plan.slots), size_bytes)
        # As many tokens for all small runs: then their workloads share the same memory.
        most_tokens = max(MANY_TOKENS, *(entry.tokens for entry in plan.entries))
        graphs = scenario.dispatch.mode == "graph"
        self.workload = Workload(gpu, model, self.slots, most_tokens=most_tokens, graphs=graphs, shared=shared.on(gpu))
        self._compute = gpu.stream()
        # A copy is made by the GPU that the bytes come from.
        copying = gpu if shared.peer is None else shared.peer
        self._behind = None if shared.peer is None else gpu.stream()
        streams = {"compute": self._compute, "h2d": copying.stream(), "prefetch": copying.stream()}
        streams["peer"] = gpu.stream()
        self._streams = {lane: streams[name] for lane, name in STREAMS.items()}
        copies_clock = clock if shared.peer is None else clock + 1
        self._choice = gpu.empty(most_tokens * model.top_k, dtype="int32")
        self._host_choice = gpu.host_empty(most_tokens * model.top_k, dtype="int32")
        self._starts = [gpu.event() for _ in range(plan.marks)]
        self._ends = [gpu.event() for _ in range(plan.marks)]
        self._clocks = [clock] * plan.marks
        for entry in plan.entries:
            if entry.kind == READBACK:  # it follows the dense part on the same stream
                self._starts[entry.mark] = self._ends[entry.mark - 1]
            elif entry.kind == ACTIVATION and ways.sends is not None:
                self._ends[entry.mark] = ways.sends.ends[self._step_of(entry)]
            elif entry.kind in COPIES:
                self._clocks[entry.mark : entry.mark + entry.marks] = [copies_clock] * entry.marks
        order = scenario.copy_.order()
        self._queue = _CopyQueue(plan.entries, self._ends, order) if isinstance(order, ByRank) else None
        self.program: list[Calls] = []
        self.turns: list[tuple[int, int]] = []
        self._stamp_of: list[int] = []
        self._wait_stamps: list[tuple[int, int, int]] = []
        self._lay_out()
        gpu.synchronize()

    @property
    def turn(self) -> Calls:
        """The calls by which a thread turns to this GPU."""
        return (self._gpu.use(self._compute),)

    # From entries to calls.

    def _lay_out(self) -> None:
        """Make the calls of each step of the program; note the step of each entry, and the steps around each wait.

        `turns` are the plan's, by steps of the program in place of entries.
        """
        program, plan = self.program, self.plan
        poll: Calls = ((self._queue.poll, ()),) if self._queue is not None else ()
        turn_of = {end: turn for turn, end in plan.turns}
        for number, entry in enumerate(plan.entries):
            program.append(poll + self._promotes(entry) + self._calls(number, entry))
            self._stamp_of.append(len(program) - 1)
            for other in entry.host_waits:
                program.append(self._host_wait(other))
                if plan.entries[other].kind == READBACK:
                    self._wait_stamps.append((entry.visit, len(program) - 2, len(program) - 1))
            if number + 1 in turn_of:
                self.turns.append((turn_of[number + 1], len(program)))
        if self._queue is not None:
            program.append(((self._queue.drain, ()),))
            self.turns[-1] = (self.turns[-1][0], len(program))

    def _host_wait(self, number: int) -> Calls:
        """Returns the calls by which the host waits for the end of an entry; copies in its queue go on meanwhile."""
        entry, queue = self.plan.entries[number], self._queue
        end = self._ends[entry.mark + entry.marks - 1]
        if queue is None:
            return ((end.synchronize, ()),)
        made: Calls = ((queue.wait_until_made, (number,)),) if entry.kind in COPIES else ()
        return (*made, (queue.wait_for, (end,)))

    def _calls(self, number: int, entry: Entry) -> Calls:
        if entry.kind == ACTIVATION:
            return self._send(entry)
        kernels = {
            DENSE: lambda: self.workload.dense(entry.layer, entry.tokens),
            EXPERT: lambda: self.workload.expert(entry.slot, entry.tokens),
            HEAD: lambda: self.workload.head(entry.tokens),
        }
        if entry.kind in kernels:
            before = self._receive(entry) if entry.receives >= 0 else self._waits(entry)
            return before + self._timed(entry.mark, kernels[entry.kind](), self._compute)
        if entry.kind == READBACK:
            count = entry.tokens * self._inputs.model.top_k
            copy = (self._host_choice[:count].copy_, (self._choice[:count], True))
            return copy, (self._ends[entry.mark].record, (self._compute,))
        if self._queue is not None:
            return self._queue.prepare(number, [self._queued_piece(entry, piece) for piece in range(entry.marks)])
        copies = tuple(self._piece(entry, piece) for piece in range(self.plan.pieces))
        timed = self._timed(entry.mark, copies, self._streams[entry.lane])
        return self._on_copy_stream(entry, self._waits(entry) + timed)

    def _send(self, entry: Entry) -> Calls:
        """Returns the calls that copy what the last kernel leaves to the next GPU."""
        way = self._sends
        assert way is not None
        copy = (way.target[: entry.size_bytes].copy_, (way.source[: entry.size_bytes], True))
        stream = self._streams["peer"]
        timed = self._timed(entry.mark, (copy,), stream)
        calls = (self._gpu.use(way.behind), self._gpu.use(stream), *self._waits(entry), *timed)
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
            if self._queue is not None and self.plan.entries[other].kind in COPIES:
                calls.append((self._queue.wait_until_made, (other,)))
            last = self.plan.entries[other]
            calls.append((self._ends[last.mark + last.marks - 1].wait, (stream,)))
        return tuple(calls)

    def _timed(self, mark: int, calls: Calls, stream: Any) -> Calls:
        return (self._starts[mark].record, (stream,)), *calls, (self._ends[mark].record, (stream,))

    def _on_copy_stream(self, entry: Entry, calls: Calls) -> Calls:
        behind = () if self._behind is None else (self._gpu.use(self._behind),)
        return (*behind, self._gpu.use(self._streams[entry.lane]), *calls, self._gpu.use(self._compute))

    def _piece(self, entry: Entry, piece: int) -> Call:
        """Returns the call that copies one piece of an expert into its slot."""
        size_bytes = len(self._host[entry.expert])
        piece_bytes = -(-size_bytes // self.plan.pieces)
        here = slice(piece * piece_bytes, min(size_bytes, (piece + 1) * piece_bytes))
        return self.slots[entry.slot][here].copy_, (self._host[entry.expert][here], True)

    def _queued_piece(self, entry: Entry, piece: int) -> Calls:
        """Returns the calls that make one piece of a copy from the priority queue."""
        waits = self._waits(entry) if piece == 0 else ()
        timed = self._timed(entry.mark + piece, (self._piece(entry, piece),), self._streams[entry.lane])
        return self._on_copy_stream(entry, waits + timed)

    def holds_right_bytes(self, expert: int, slot: int) -> bool:
        """Whether a slot holds what the host has of an expert, byte for byte."""
        here = self.slots[slot]
        return bool((here == self._host[expert].to(here.device)).all())

    # Running.

    def synchronize(self) -> None:
        """Wait for all that was launched."""
        self._gpu.synchronize()

    def let_go(self) -> None:
        """Let no thread wait for what others have not enqueued."""
        if self._receives is not None:
            for made in self._receives.made:
                made.set()

    def make_ready(self) -> None:
        """Forget the last run, let the GPU become idle, and turn to it."""
        if self._queue is not None:
            self._queue.clear()
        if self._receives is not None:
            for made in self._receives.made:
                made.clear()
        run(self.turn)
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
        for mark in np.flatnonzero(made).tolist():
            start_ns[mark] = clocks.at_ns(self._clocks[mark], self._starts[mark])
            end_ns[mark] = clocks.at_ns(self._clocks[mark], self._ends[mark])
        return Times(start_ns, end_ns, issued_ns, *self._known(stamps), stamps[-1:])

    def _known(self, stamps: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Returns when the host began to wait for each visit's choice (-1: never), and when it knew it."""
        dense = [step for entry, step in zip(self.plan.entries, self._stamp_of, strict=True) if entry.kind == DENSE]
        known_ns = stamps[dense]
        from_ns = np.full(len(known_ns), -1, dtype=np.int64)
        for visit, before, behind in self._wait_stamps:
            from_ns[visit], known_ns[visit] = stamps[before], stamps[behind]
        return from_ns, known_ns


class _CopyQueue:
    """The host-side queue of an order by rank; one copy under way at a time.

    The host thread itself looks (`poll`) whether the copy under way has ended, before each entry and while it waits.
    """

    def __init__(self, entries: Sequence[Entry], ends: Sequence[Any], order: ByRank) -> None:
        self._entries, self._ends, self._order = entries, ends, order
        self._pieces: dict[int, list[Calls]] = {}
        self._first_rank: dict[int, Rank] = {}
        self.clear()

    def prepare(self, number: int, pieces: list[Calls]) -> Calls:
        """Say what makes each piece of a copy, and return the call that queues it."""
        self._pieces[number], entry = pieces, self._entries[number]
        self._first_rank[number] = self._order.rank(QueuedCopy(entry.kind != PREFETCH, entry.target, entry.expert))
        return ((self.push, (number,)),)

    def demand(self, number: int, visit: int) -> Call:
        """Returns the call by which a visit demands a copy that may still be queued."""
        return self.promote, (number, self._order.rank(QueuedCopy(True, visit, self._entries[number].expert)))

    def clear(self) -> None:
        """Forget the last run."""
        #: Of each span, when its copy was enqueued (-1: it was not).
        self.issued_ns = array("q", [-1]) * len(self._ends)
        self._heap: list[tuple[Rank, int]] = []
        self._rank: dict[int, Rank] = {}  # what is queued
        self._next_piece: dict[int, int] = {}
        self._under_way: Any = None

    def push(self, number: int) -> None:
        """Queue a copy; one into the same room that nobody has used need not be made any more."""
        self._rank.pop(self._entries[number].overtakes, None)
        self._next_piece[number] = 0
        self._queue(number, self._first_rank[number])
        self.poll()

    def promote(self, number: int, rank: Rank) -> None:
        """Give a copy that is still queued, and is demanded now, its rank."""
        if number in self._rank:
            self._queue(number, rank)

    def poll(self) -> None:
        """Enqueue the next piece of the first copy, if none is under way."""
        if self._under_way is not None:
            if not self._under_way.query():
                return
            self._under_way = None
        while self._heap:
            rank, number = heapq.heappop(self._heap)
            if self._rank.get(number) == rank:
                self._enqueue(number, rank)
                return

    def wait_until_made(self, number: int) -> None:
        """Wait until a copy is enqueued whole: only then can a stream wait for its event."""
        while number in self._rank:
            self.poll()

    def wait_for(self, event: Any) -> None:
        """Wait for an event, and keep the copies going meanwhile."""
        while not event.query():
            self.poll()

    def drain(self) -> None:
        """Enqueue all that is queued."""
        while self._rank:
            self.poll()

    def _queue(self, number: int, rank: Rank) -> None:
        self._rank[number] = rank
        heapq.heappush(self._heap, (rank, number))

    def _enqueue(self, number: int, rank: Rank) -> None:
        pieces, piece = self._pieces[number], self._next_piece[number]
        run(pieces[piece])
        mark = self._entries[number].mark + piece
        self.issued_ns[mark] = perf_counter_ns()
        self._under_way = self._ends[mark]
        self._next_piece[number] = piece + 1
        if piece + 1 < len(pieces):
            heapq.heappush(self._heap, (rank, number))
        else:
            del self._rank[number]
