"""Execution: the same scenario on real streams, with the same decisions, timed by CUDA events.

Everything is made beforehand: the plan with all decisions, slots, pinned host memory, kernel groups or graphs, events,
and the flat list of calls. What is left to the dispatch loop is to make the calls and take the time behind each entry,
so that the host's costs are those of the calls. On several GPUs one thread makes the calls of all, or each has its own.
"""

from __future__ import annotations

import gc
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median_low
from threading import Event, Thread
from time import perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt

from ...collector import collector_off
from ...engine.decide.pipeline import flow_of, sent_bytes
from ...engine.load import load_inputs
from ...engine.run import Progress
from ...engine.scenario.amounts import ScenarioError
from ...engine.scenario.inputs import Inputs
from ...engine.scenario.scenario import Scenario, load_scenario
from ...errors import InputError
from ..device.clocks import Clocks
from ..device.cuda import Calls, CudaError, Gpu
from ..device.host import DISTURBED, Cores
from ..device.profiler import record_profile
from .entries import ExecutionError, Plan
from .executable import check_executable
from .measured import LANE, SPAN_COLUMNS, Measured, MeasuredGpu, Times, lane_column, makespan_ns
from .part import Part
from .plan import decision_counts, make_plans
from .scenario_sets import SETS, scenarios
from .shared import Shared, Way, Ways, check_slots, slot_bytes

#: How many runs are made at most for each that counts, where others disturb the host.
ATTEMPTS = 4
#: Repeats before those that count: clocks, caches and lazily loaded code settle.
WARM_UP = 2
#: How long one of several threads may keep the interpreter from the others.
_SWITCH_S = 1e-5


class Execution:
    """A scenario made ready to run, any number of times: `run` returns one repeat's times, of each GPU.

    The first of `gpus` run a part each; where experts lie in another GPU's memory, that is the next.
    Raises ExecutionError or CudaError if the scenario has parts that cannot be executed.
    """

    def __init__(self, gpus: Sequence[Any], inputs: Inputs, shared: Shared) -> None:
        plans = make_plans(inputs)
        used = gpus[: len(plans) + (shared.peer is not None)]
        self.clocks = Clocks(used)
        one_thread = inputs.scenario.parallel.dispatch_threads == "one"
        self.threads = 1 if one_thread else len(plans)
        ways = _ways(used, inputs, one_thread) if inputs.stages else [None] * len(plans)
        self.parts = [
            Part(used[number], part, plan, shared, clock=number, ways=Ways(ways[number - 1], ways[number]))
            for number, (part, plan) in enumerate(zip(inputs.parts, plans, strict=True))
        ]
        for part in self.parts:
            part.lay_out(self.parts)

    def run(self) -> list[Times]:
        """Run once and return the times; everything launched has ended when it returns."""
        for part in reversed(self.parts):
            part.make_ready()
        programs = [_in_turn(self.parts)] if self.threads == 1 else [_alone(part) for part in self.parts]
        stamps = [array("q", bytes(8 * len(calls))) for calls, _ in programs]
        failed: list[Exception] = []
        others = [
            Thread(target=self._try_to_dispatch, args=(calls, into, failed), daemon=True)
            for (calls, _), into in zip(programs[1:], stamps[1:], strict=True)
        ]
        with collector_off(), _often(self.threads):
            for part in self.parts:
                part.beside.start()
            self.clocks.set()
            for thread in others:
                thread.start()
            self._try_to_dispatch(programs[0][0], stamps[0], failed)
            for thread in others:
                thread.join()
        if failed:
            for part in self.parts:
                part.beside.join()
            raise failed[0]
        for part in self.parts:
            part.synchronize()
        zero_ns = self.clocks.host_zero_ns
        taken = [np.array(into, dtype=np.int64) - zero_ns for into in stamps]
        places = [(thread, steps) for thread, (_, of_parts) in enumerate(programs) for steps in of_parts]
        return [
            part.times(taken[thread][steps], self.clocks)
            for part, (thread, steps) in zip(self.parts, places, strict=True)
        ]

    def _try_to_dispatch(self, calls: Sequence[Calls], stamps: array[int], failed: list[Exception]) -> None:
        """Dispatch, or say what failed and let nobody wait for this thread any more."""
        try:
            _dispatch(calls, stamps)
        except Exception as error:
            failed.append(error)
            for part in self.parts:
                part.let_go()


#: What a thread calls, and which steps of it are of each of its parts.
_Program = tuple[list[Calls], list[npt.NDArray[np.int64]]]


def _alone(part: Part) -> _Program:
    """Returns the program of a thread that serves one GPU only; it turns to it first."""
    return [part.turn, *part.program], [np.arange(1, len(part.program) + 1)]


def _in_turn(parts: Sequence[Part]) -> _Program:
    """Returns the program of a thread that serves several GPUs, turn by turn."""
    if len(parts) == 1:
        return parts[0].program, [np.arange(len(parts[0].program))]
    calls: list[Calls] = []
    places: list[list[int]] = [[] for _ in parts]
    begun = [0] * len(parts)
    turns = sorted((turn, number, end) for number, part in enumerate(parts) for turn, end in part.turns)
    for _, number, end in turns:
        part = parts[number]
        calls.append(part.turn)
        places[number] += range(len(calls), len(calls) + end - begun[number])
        calls += part.program[begun[number] : end]
        begun[number] = end
    return calls, [np.array(steps) for steps in places]


def _ways(gpus: Sequence[Any], inputs: Inputs, one_thread: bool) -> list[Way]:
    """Returns the way from each stage to the next, and from the last to the first."""
    flow, stages = flow_of(inputs.model, inputs.trace, inputs.steps), len(inputs.stages)
    ways = []
    for stage in range(stages):
        source, target = gpus[stage], gpus[(stage + 1) % stages]
        most_bytes = max(1, *sent_bytes(flow, stage, stages))
        ends = [source.event() for _ in flow.steps]
        made = [] if one_thread else [Event() for _ in flow.steps]
        ways.append(Way(source.empty(most_bytes), target.empty(most_bytes), target.stream(), ends, made))
    return ways


@contextmanager
def _often(threads: int) -> Iterator[None]:
    """Let several threads take turns at the interpreter within tens of microseconds, not milliseconds."""
    before = sys.getswitchinterval()
    if threads > 1:
        sys.setswitchinterval(_SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _dispatch(program: Sequence[Calls], stamps: array[int]) -> None:
    """Make all calls, and take the time behind those of each step. This loop is the host whose costs are measured."""
    clock = perf_counter_ns
    for step, calls in enumerate(program):
        for function, args in calls:
            function(*args)
        stamps[step] = clock()


def execute(
    gpus: Sequence[Any],
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
    execution = Execution(gpus, inputs, shared)
    for _ in range(WARM_UP):
        execution.run()
    runs, disturbed = undisturbed(execution, repeats, shared.cores)
    if profile is not None:
        record_profile(execution.run, profile)
    for part in execution.parts:
        wrong = [expert for expert, slot in part.plan.resident.items() if not part.holds_right_bytes(expert, slot)]
        if wrong:
            raise CudaError(f"{name}: experts {wrong} are not where the memory manager has put them")
        if results := part.wrong_results():
            raise CudaError(f"{name}: {results}")
    spans = [_spans(part.plan) for part in execution.parts]
    makespans_ns = tuple(makespan_ns(spans, times) for times in runs)
    kept = runs if keep_all else [runs[makespans_ns.index(median_low(makespans_ns))]]
    return Measured(
        name=name,
        scenario=inputs.scenario,
        machine=gpus[0].describe() | {"date": f"{datetime.now(UTC):%Y-%m-%d}"},
        makespans_ns=makespans_ns,
        gpus=tuple(
            MeasuredGpu(
                what, tuple(times[number] for times in kept),
                decision_counts(part.plan.visits, part.plan.manager), len(part.plan.resident),
            )
            for number, (part, what) in enumerate(zip(execution.parts, spans, strict=True))
        ),
        disturbed=disturbed,
        clocks_within_ns=execution.clocks.within_ns,
    )  # fmt: skip


def undisturbed(execution: Execution, repeats: int, cores: Cores) -> tuple[list[list[Times]], int]:
    """Run until `repeats` runs were made on undisturbed cores; return them and how many others there were.

    After four times as many runs the least disturbed ones must do.
    """
    seen: list[tuple[float, list[Times]]] = []
    while len(seen) < ATTEMPTS * repeats and sum(slower < DISTURBED for slower, _ in seen) < repeats:
        with cores.quietest(execution.threads):
            times = execution.run()
            seen.append((cores.slowdown(), times))
    quiet = [times for slower, times in seen if slower < DISTURBED]
    if len(quiet) < repeats:
        quiet = [times for _, times in sorted(seen, key=lambda run: run[0])[:repeats]]
    return quiet[:repeats], len(seen) - repeats


def _spans(plan: Plan) -> dict[str, npt.NDArray[np.int64]]:
    """Returns SPAN_COLUMNS of a plan's spans (marks,), and their lanes where the kinds do not say these."""
    entries = [entry for entry in plan.entries if entry.marks]
    marks = [entry.marks for entry in entries]
    columns = {name: [getattr(entry, name) for entry in entries] for name in SPAN_COLUMNS}
    lanes = lane_column([(entry.kind, entry.lane) for entry in entries])
    if lanes is not None:
        columns[LANE] = lanes
    return {name: np.repeat(np.array(values, dtype=np.int64), marks) for name, values in columns.items()}


def execute_all(
    chosen: Mapping[str, Scenario],
    *,
    device: int = 0,
    repeats: int = 5,
    keep_all: bool = False,
    profile: Path | None = None,
    drive: Path | None = None,
    progress: Progress | None = None,
    failed: Callable[[str, Exception], None] | None = None,
) -> Iterator[Measured]:
    """Execute scenarios one after the other on CUDA GPUs from `device` on, as `execute` does, sharing memory.

    `drive` is a file that is written on the drive which experts are read from, and removed in the end. With
    `failed`, which is told of a scenario that ends with an error and why, the next ones run nevertheless.
    All scenarios have been loaded and checked when this returns; each runs when it is asked for. Raises InputError
    naming all that cannot be executed, CudaError also without as many GPUs.
    """
    inputs = load_executable(chosen)
    first = Gpu(device)
    gpus = [first, *(first.sibling(device + more) for more in range(1, max(map(gpus_needed, inputs.values()))))]
    check_room(gpus, inputs)

    def one_by_one() -> Iterator[Measured]:
        shared: dict[str, Shared] = {}
        for done, (name, ready) in enumerate(inputs.items()):
            if progress is not None:
                progress("execute", done, len(inputs))
            try:
                ours = _shared_by(shared, gpus, ready, drive)
                yield execute(gpus, ready, name, ours, repeats=repeats, keep_all=keep_all, profile=profile)
            except Exception as error:
                if failed is None:
                    raise
                failed(name, error)
            gc.collect()  # an execution's calls refer to each other
            first.release()
        for ours in shared.values():
            ours.close()

    return one_by_one()


def load_executable(chosen: Mapping[str, Scenario]) -> dict[str, Inputs]:
    """Returns the inputs of scenarios, by name; raise InputError naming all that cannot be executed, and why."""
    ready: dict[str, Inputs] = {}
    refused: dict[str, InputError] = {}
    for name, scenario in chosen.items():
        try:
            inputs = load_inputs(scenario)
            for part in inputs.parts:
                check_executable(part)
        except InputError as error:
            refused[name] = error
        else:
            ready[name] = inputs
    _refuse(refused, len(chosen), ExecutionError)
    return ready


def check_room(gpus: Sequence[Any], inputs: Mapping[str, Inputs]) -> None:
    """Raise CudaError naming all scenarios whose experts do not fit what is free of the GPUs, or the pool."""
    refused: dict[str, InputError] = {}
    for name, ready in inputs.items():
        for number, part in enumerate(ready.parts):
            size_bytes, free_bytes = slot_bytes(part), gpus[number].free_bytes()
            least_bytes = min(part.scenario.compression.kept_bytes(size) for size in part.model.expert_bytes)
            most = min(part.budget_bytes // least_bytes, part.model.total_experts)
            if most * size_bytes > free_bytes:
                most = make_plans(ready)[number].slots
            try:
                check_slots(part, most, free_bytes)
            except CudaError as error:
                refused[name] = error
                break
    _refuse(refused, len(inputs), CudaError)


def _refuse(refused: Mapping[str, InputError], scenarios: int, kind: type[InputError]) -> None:
    """Raise what is wrong with a scenario, or with all of several by their names; nothing if there are none."""
    if not refused:
        return
    if scenarios == 1:
        raise next(iter(refused.values()))
    whys = "; ".join(f"{name}: {error}" for name, error in refused.items())
    raise kind(f"{len(refused)} of {scenarios} scenarios cannot be executed, and none was: {whys}")


def gpus_needed(inputs: Inputs) -> int:
    """Returns how many GPUs an execution takes."""
    return len(inputs.parts) + (inputs.scenario.copy_.source == "peer")


def _shared_by(shared: dict[str, Shared], gpus: Sequence[Any], inputs: Inputs, drive: Path | None) -> Shared:
    """Returns what executions share that copy from where this one does, made if it is the first of them."""
    copy = inputs.scenario.copy_
    peer = gpus[len(inputs.parts)] if copy.source == "peer" else None
    where = "peer" if peer is not None else copy.host_memory or "pinned"
    if where not in shared:
        shared[where] = Shared(gpus[0], pinned=where == "pinned", peer=peer, drive=drive)
    return shared[where]


def chosen_scenarios(names: Sequence[str], settings: Sequence[str] = ()) -> dict[str, Scenario]:
    """Returns scenarios by name: those of a set (its name), one of a set, a shipped one, or a TOML file's.

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
        elif (stem := Path(name).stem) in chosen:
            raise ScenarioError(f"{name}: another scenario is called {stem!r}, and their files would be one: rename it")
        else:
            chosen[stem] = load_scenario(name, settings)
    return chosen
