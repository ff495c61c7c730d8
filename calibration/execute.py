"""Execution: the same scenario on real streams, with the same decisions, timed by CUDA events.

Everything is made beforehand: the plan with all decisions, slots, pinned host memory, kernel groups or graphs, events,
and the flat list of calls. What is left to the dispatch loop is to make the calls and take the time behind each entry,
so that the host's costs are those of the calls. The experts' host copies alias a pool of distinct pinned buffers where
the model is larger than that; the pool is far larger than any cache.
"""

from __future__ import annotations

import gc
import heapq
from array import array
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median_low
from time import perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.decoder import collector_off
from ..engine.inputs import Inputs
from ..engine.scenario import Scenario, ScenarioError, load_scenario
from ..engine.simulate import Progress, load_inputs
from ..resources.timeline import DENSE, EXPERT, HEAD, PREFETCH, READBACK
from .cuda import Call, Calls, CudaError, Gpu, Workload, run
from .host import DISTURBED, Cores
from .measured import SPAN_COLUMNS, Measured, Times, makespan_ns
from .plan import COPIES, Entry, Plan, check_executable, decision_counts, make_plan
from .profiler import record_profile
from .scenario_sets import SETS, scenarios

#: Bytes of pinned host memory that the experts' host copies alias if they need more.
HOST_POOL_BYTES = 3 * 2**30
#: How many runs are made at most for each that counts, where others disturb the host.
ATTEMPTS = 4
#: For how many tokens a workload has room at least.
MANY_TOKENS = 64
#: Repeats before those that count: clocks, caches and lazily loaded code settle.
WARM_UP = 2


class Shared:
    """What executions share: pinned (or pageable) host memory, filled with random weights once, and GPU memory.

    Each buffer of host memory holds numbers of its own, so that a slot's bytes tell which buffer they came from.
    `on_gpu` is what a Workload shares with others; `cores` knows how fast the host can be.
    """

    def __init__(self, gpu: Any, size_bytes: int = HOST_POOL_BYTES, *, pinned: bool = True) -> None:
        self.on_gpu: dict[Any, Any] = {}
        self.cores = Cores()
        self.bytes = gpu.host_empty(size_bytes, pinned=pinned)
        piece = 64 * 2**20
        for number, start in enumerate(range(0, size_bytes, piece)):
            part = self.bytes[start : start + piece]
            random = gpu.random(len(part) // 2, dtype="bfloat16", scale=0.02, seed=1000 + number)
            part.copy_(random.view(part.dtype))
        gpu.synchronize()

    def buffers(self, count: int, size_bytes: int) -> list[Any]:
        """Return a buffer of `size_bytes` for each of `count` experts; they repeat where the pool is too small."""
        different = len(self.bytes) // size_bytes
        if not different:
            raise ValueError(f"an expert of {size_bytes} bytes is larger than the host pool of {len(self.bytes)} bytes")
        views = [self.bytes[at * size_bytes : (at + 1) * size_bytes] for at in range(min(count, different))]
        return [views[number % different] for number in range(count)]


class Execution:
    """A scenario made ready to run on a GPU, any number of times: `run` returns one repeat's times.

    Raises ExecutionError or CudaError if the scenario has parts that cannot be executed.
    """

    def __init__(self, gpu: Any, inputs: Inputs, shared: Shared) -> None:
        self._gpu, self._inputs = gpu, inputs
        self.plan = make_plan(inputs)
        model, scenario, plan = inputs.model, inputs.scenario, self.plan
        size_bytes = model.expert_bytes[0]
        if plan.slots * size_bytes > (free_bytes := gpu.free_bytes()):
            raise CudaError(
                f"memory.gpu_budget = {scenario.memory.gpu_budget!r}: {plan.slots} experts take "
                f"{plan.slots * size_bytes / 2**30:.1f} GiB, and {free_bytes / 2**30:.1f} GiB of the GPU are free"
            )
        self._host = shared.buffers(model.total_experts, size_bytes)
        self.slots = gpu.empty(max(1, plan.slots), size_bytes)
        # As many tokens for all small runs: then their workloads share the same memory.
        most_tokens = max(MANY_TOKENS, *(entry.tokens for entry in plan.entries))
        graphs = scenario.dispatch.mode == "graph"
        self.workload = Workload(gpu, model, self.slots, most_tokens=most_tokens, graphs=graphs, shared=shared.on_gpu)
        self._compute = gpu.stream()
        self._streams = {"compute": self._compute, "d2h": self._compute, "h2d": gpu.stream()}
        self._streams["prefetch"] = gpu.stream()
        self._choice = gpu.empty(most_tokens * model.top_k, dtype="int32")
        self._host_choice = gpu.host_empty(most_tokens * model.top_k, dtype="int32")
        self._zero = gpu.event()
        self._starts = [gpu.event() for _ in range(plan.marks)]
        self._ends = [gpu.event() for _ in range(plan.marks)]
        for entry in plan.entries:
            if entry.kind == READBACK:  # it follows the dense part on the same stream
                self._starts[entry.mark] = self._ends[entry.mark - 1]
        self._queue = _CopyQueue(plan.entries, self._ends) if scenario.copy_.discipline == "priority" else None
        self._program, self._stamp_of, self._wait_stamps = self._lay_out()
        self._stamps = array("q", bytes(8 * len(self._program)))
        gpu.synchronize()

    # From entries to calls.

    def _lay_out(self) -> tuple[list[Calls], list[int], list[tuple[int, int, int]]]:
        """Return the calls of each step, the step of each entry, and (visit, step before, step of) each wait."""
        program: list[Calls] = []
        stamp_of: list[int] = []
        waits: list[tuple[int, int, int]] = []
        poll: Calls = ((self._queue.poll, ()),) if self._queue is not None else ()
        for number, entry in enumerate(self.plan.entries):
            program.append(poll + self._promotes(entry) + self._calls(number, entry))
            stamp_of.append(len(program) - 1)
            if entry.kind == READBACK:
                end = self._ends[entry.mark]
                wait: Call = (end.synchronize, ()) if self._queue is None else (self._queue.wait_for, (end,))
                program.append((wait,))
                waits.append((entry.visit, len(program) - 2, len(program) - 1))
        if self._queue is not None:
            program.append(((self._queue.drain, ()),))
        return program, stamp_of, waits

    def _calls(self, number: int, entry: Entry) -> Calls:
        kernels = {
            DENSE: lambda: self.workload.dense(entry.layer, entry.tokens),
            EXPERT: lambda: self.workload.expert(entry.slot, entry.tokens),
            HEAD: lambda: self.workload.head(entry.tokens),
        }
        if entry.kind in kernels:
            before = self._waits(entry) if entry.kind == EXPERT else ()
            return before + self._timed(entry.mark, kernels[entry.kind](), self._compute)
        if entry.kind == READBACK:
            count = entry.tokens * self._inputs.model.top_k
            copy = (self._host_choice[:count].copy_, (self._choice[:count], True))
            return copy, (self._ends[entry.mark].record, (self._compute,))
        if self._queue is not None:
            return self._queue.prepare(number, [self._queued_piece(entry, piece) for piece in range(entry.marks)])
        copies = tuple(self._piece(entry, piece) for piece in range(self.plan.pieces))
        return self._on_copy_stream(
            entry, self._waits(entry) + self._timed(entry.mark, copies, self._streams[entry.lane])
        )

    def _promotes(self, entry: Entry) -> Calls:
        if self._queue is None:
            return ()
        return tuple((self._queue.promote, (other, entry.visit)) for other in entry.promotes)

    def _waits(self, entry: Entry) -> Calls:
        """Return the calls that make an entry's stream wait for others; what is not enqueued yet is waited for here."""
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
        return self._gpu.use(self._streams[entry.lane]), *calls, self._gpu.use(self._compute)

    def _piece(self, entry: Entry, piece: int) -> Call:
        """Return the call that copies one piece of an expert into its slot."""
        size_bytes = len(self._host[entry.expert])
        piece_bytes = -(-size_bytes // self.plan.pieces)
        here = slice(piece * piece_bytes, min(size_bytes, (piece + 1) * piece_bytes))
        return self.slots[entry.slot][here].copy_, (self._host[entry.expert][here], True)

    def _queued_piece(self, entry: Entry, piece: int) -> Calls:
        """Return the calls that make one piece of a copy from the priority queue."""
        waits = self._waits(entry) if piece == 0 else ()
        timed = self._timed(entry.mark + piece, (self._piece(entry, piece),), self._streams[entry.lane])
        return self._on_copy_stream(entry, waits + timed)

    def holds_right_bytes(self, expert: int, slot: int) -> bool:
        """Whether a slot holds what the host has of an expert, byte for byte."""
        here = self.slots[slot]
        return bool((here == self._host[expert].to(here.device)).all())

    # Running.

    def run(self) -> Times:
        """Run once and return the times; everything launched has ended when it returns."""
        if self._queue is not None:
            self._queue.clear()
        use, streams = self._gpu.use(self._compute)
        use(*streams)
        self._gpu.synchronize()
        with collector_off():
            self._zero.record(self._compute)
            zero_ns = perf_counter_ns()
            _dispatch(self._program, self._stamps)
        self._gpu.synchronize()
        return self._times(zero_ns)

    def _times(self, zero_ns: int) -> Times:
        plan, queue = self.plan, self._queue
        stamps = np.array(self._stamps, dtype=np.int64) - zero_ns
        issued_ns = np.repeat(stamps[self._stamp_of], [entry.marks for entry in plan.entries])
        made = np.ones(plan.marks, dtype=bool)
        if queue is not None:
            queued_ns = np.array(queue.issued_ns, dtype=np.int64)
            copies = np.array([entry.kind in COPIES for entry in plan.entries for _ in range(entry.marks)])
            made = ~copies | (queued_ns >= 0)
            issued_ns = np.where(copies, np.where(made, queued_ns - zero_ns, -1), issued_ns)
        start_ns, end_ns = np.full((2, plan.marks), -1, dtype=np.int64)
        for mark in np.flatnonzero(made).tolist():
            start_ns[mark] = round(self._zero.elapsed_time(self._starts[mark]) * 1e6)
            end_ns[mark] = round(self._zero.elapsed_time(self._ends[mark]) * 1e6)
        return Times(start_ns, end_ns, issued_ns, *self._known(stamps), stamps[-1:])

    def _known(self, stamps: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return when the host began to wait for each visit's choice (-1: never), and when it knew it."""
        dense = [step for entry, step in zip(self.plan.entries, self._stamp_of, strict=True) if entry.kind == DENSE]
        known_ns = stamps[dense]
        from_ns = np.full(len(known_ns), -1, dtype=np.int64)
        for visit, before, behind in self._wait_stamps:
            from_ns[visit], known_ns[visit] = stamps[before], stamps[behind]
        return from_ns, known_ns


def _dispatch(program: Sequence[Calls], stamps: array[int]) -> None:
    """Make all calls, and take the time behind those of each step. This loop is the host whose costs are measured."""
    clock = perf_counter_ns
    for step, calls in enumerate(program):
        for function, args in calls:
            function(*args)
        stamps[step] = clock()


class _CopyQueue:
    """The host-side queue of the priority discipline: demand first, then the nearest; one copy under way at a time.

    The host thread itself looks (`poll`) whether the copy under way has ended, before each entry and while it waits.
    """

    def __init__(self, entries: Sequence[Entry], ends: Sequence[Any]) -> None:
        self._entries, self._ends = entries, ends
        self._pieces: dict[int, list[Calls]] = {}
        self.clear()

    def prepare(self, number: int, pieces: list[Calls]) -> Calls:
        """Say what makes each piece of a copy, and return the call that queues it."""
        self._pieces[number] = pieces
        return ((self.push, (number,)),)

    def clear(self) -> None:
        """Forget the last run."""
        #: Of each span, when its copy was enqueued (-1: it was not).
        self.issued_ns = array("q", [-1]) * len(self._ends)
        self._heap: list[tuple[tuple[int, int], int]] = []
        self._rank: dict[int, tuple[int, int]] = {}  # what is queued
        self._next_piece: dict[int, int] = {}
        self._under_way: Any = None

    def push(self, number: int) -> None:
        """Queue a copy; one into the same room that nobody has used need not be made any more."""
        entry = self._entries[number]
        self._rank.pop(entry.overtakes, None)
        self._next_piece[number] = 0
        self._queue(number, (int(entry.kind == PREFETCH), entry.target))
        self.poll()

    def promote(self, number: int, visit: int) -> None:
        """Give a queued prefetch that is demanded now a demand's rank."""
        if number in self._rank:
            self._queue(number, (0, visit))

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

    def _queue(self, number: int, rank: tuple[int, int]) -> None:
        self._rank[number] = rank
        heapq.heappush(self._heap, (rank, number))

    def _enqueue(self, number: int, rank: tuple[int, int]) -> None:
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


def execute(
    gpu: Any,
    inputs: Inputs,
    name: str,
    shared: Shared,
    *,
    repeats: int = 5,
    keep_all: bool = False,
    profile: Path | None = None,
) -> Measured:
    """Execute a scenario `repeats` times behind a warm-up; keep the median repeat's times, or those of all.

    `profile` is a file for the trace of one more run, under PyTorch's profiler.

    Raises ExecutionError or CudaError if it cannot be executed, CudaError also if a slot held the wrong bytes.
    """
    execution = Execution(gpu, inputs, shared)
    plan = execution.plan
    for _ in range(WARM_UP):
        execution.run()
    times, disturbed = undisturbed(execution, repeats, shared.cores)
    if profile is not None:
        record_profile(execution.run, profile)
    wrong = [expert for expert, slot in plan.resident.items() if not execution.holds_right_bytes(expert, slot)]
    if wrong:
        raise CudaError(f"{name}: experts {wrong} are not where the memory manager has put them")
    spans = _spans(plan)
    makespans_ns = tuple(makespan_ns(spans, repeat) for repeat in times)
    middle = makespans_ns.index(median_low(makespans_ns))
    return Measured(
        name=name,
        scenario=inputs.scenario,
        machine=gpu.describe() | {"date": f"{datetime.now(UTC):%Y-%m-%d}"},
        makespans_ns=makespans_ns,
        spans=spans,
        repeats=tuple(times) if keep_all else (times[middle],),
        counts=decision_counts(plan.visits, plan.manager),
        verified=len(plan.resident),
        disturbed=disturbed,
    )


def undisturbed(execution: Execution, repeats: int, cores: Cores) -> tuple[list[Times], int]:
    """Run until `repeats` runs were made on an undisturbed core; return them and how many others there were.

    After four times as many runs the least disturbed ones must do.
    """
    seen: list[tuple[float, Times]] = []
    while len(seen) < ATTEMPTS * repeats and sum(slower < DISTURBED for slower, _ in seen) < repeats:
        with cores.quietest():
            times = execution.run()
            seen.append((cores.slowdown(), times))
    quiet = [times for slower, times in seen if slower < DISTURBED]
    if len(quiet) < repeats:
        quiet = [times for _, times in sorted(seen, key=lambda run: run[0])[:repeats]]
    return quiet[:repeats], len(seen) - repeats


def _spans(plan: Plan) -> dict[str, npt.NDArray[np.int64]]:
    """Return SPAN_COLUMNS of a plan's spans (marks,)."""
    marks = [entry.marks for entry in plan.entries]
    return {
        column: np.repeat(np.array([getattr(entry, column) for entry in plan.entries], dtype=np.int64), marks)
        for column in SPAN_COLUMNS
    }


def execute_all(
    chosen: Mapping[str, Scenario],
    *,
    device: int = 0,
    repeats: int = 5,
    keep_all: bool = False,
    profile: Path | None = None,
    progress: Progress | None = None,
) -> Iterator[Measured]:
    """Execute scenarios one after the other on a CUDA GPU, as `execute` does, sharing memory.

    All scenarios are loaded and checked before the first runs. Raises CudaError without such a GPU.
    """
    gpu = Gpu(device)
    inputs = {name: load_inputs(scenario) for name, scenario in chosen.items()}
    for ready in inputs.values():
        check_executable(ready)
    shared: dict[bool, Shared] = {}
    for done, (name, ready) in enumerate(inputs.items()):
        if progress is not None:
            progress("execute", done, len(inputs))
        pinned = ready.scenario.copy_.host_memory != "pageable"
        if pinned not in shared:
            shared[pinned] = Shared(gpu, pinned=pinned)
        yield execute(gpu, ready, name, shared[pinned], repeats=repeats, keep_all=keep_all, profile=profile)
        gc.collect()  # an execution's calls refer to each other
        gpu.release()


def chosen_scenarios(names: Sequence[str], settings: Sequence[str] = ()) -> dict[str, Scenario]:
    """Return scenarios by name: those of a set (its name), one of a set, a shipped one, or a TOML file's.

    `settings` are laid over the last two. ScenarioError if there is no such scenario, or a set's is to be changed.
    """
    in_sets = {name: scenario for set_name in SETS for name, scenario in scenarios(set_name).items()}
    chosen: dict[str, Scenario] = {}
    for name in names:
        if settings and (name in SETS or name in in_sets):
            raise ScenarioError(f"--set {settings[0]!r}: {name} is what it is; change a scenario's file instead")
        if name in SETS:
            chosen |= scenarios(name)
        elif name in in_sets:
            chosen[name] = in_sets[name]
        else:
            chosen[Path(name).stem] = load_scenario(name, settings)
    return chosen
