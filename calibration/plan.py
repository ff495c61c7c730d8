"""The plan of an execution: every call group that the host makes for a scenario, in order, without a GPU or a clock.

A plan interprets the commands of a run's program, as the engines do: commands become entries (a kernel group, a copy, a
read-back) with the expert slots they use and the entries whose end they wait for. What one stream orders by itself
needs no wait. Each stage of a pipeline has a plan of its own, whose entries also say what passes between the stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engine.costs.costs import pieces_of, token_bucket
from ..engine.decide.commands import FIXED_REGISTERS, H2D, PREFETCH_LANE, Command, Op
from ..engine.decide.dispatch import Visit
from ..engine.decide.memory_manager import MemoryManager
from ..engine.decide.pipeline import flow_of, received_steps, sent_bytes
from ..engine.decide.program import Gpu, Program, Stage, stages_program
from ..engine.decide.registers import Registers
from ..engine.decide.tables import Rooms
from ..engine.loading.deciders import dispatched, make_manager, make_prefetch
from ..engine.policies.copy_order import COPY_ORDERS, ByRank, Fifo, Priority, TwoStreams
from ..engine.scenario.inputs import Inputs
from ..engine.timing.simulation import visit_settings
from ..errors import InputError
from ..resources.timeline import ACTIVATION, DEMAND, DENSE, PREFETCH, READBACK
from ..workloads.batches import DECODE
from .cuda import without_kernels

#: The kinds of entries that copy an expert.
COPIES = (DEMAND, PREFETCH)
#: The stream of each lane of an entry: one stream keeps its work in order. The choice is read back behind the kernels.
STREAMS = {"compute": "compute", "d2h": "compute", "h2d": "h2d", "prefetch": "prefetch", "peer": "peer"}


#: The copy orders that are executed: streams of the GPU's, and the queue that the host thread keeps.
EXECUTED_ORDERS = (Fifo, TwoStreams, Priority)


class ExecutionError(InputError):
    """A scenario that can be simulated but not executed; the message names the key and what would be right."""


@dataclass(slots=True)
class Entry:
    """One call group: `waits` are the entries whose end its stream waits for before it starts.

    `host_waits` are those whose end the host waits for behind it.
    `marks` are how many spans it leaves, numbered from `mark`: one, or one a piece of a copy in a priority queue.
    In a priority queue, `overtakes` is a copy into the same room that nobody has used (-1: none): if it is still queued
    it need not be made; and `promotes` are copies that may still be queued and are demanded from here on.
    In a pipeline, `receives` is the step whose data from the stage before its stream waits for (-1: none), and
    `size_bytes` is what is sent to the next stage.
    """

    kind: int
    visit: int
    layer: int
    tokens: int
    lane: str
    expert: int = -1
    copy: int = -1
    slot: int = -1
    target: int = 0
    waits: tuple[int, ...] = ()
    host_waits: tuple[int, ...] = ()
    overtakes: int = -1
    promotes: tuple[int, ...] = ()
    mark: int = 0
    marks: int = 1
    receives: int = -1
    size_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """All entries of a run in the host's order, the visits and the manager that decided them, and the slots used."""

    entries: list[Entry]
    visits: list[Visit]
    manager: MemoryManager
    slots: int
    marks: int
    pieces: int
    #: Where the experts lie at the end: expert -> slot.
    resident: dict[int, int]
    #: Each turn of the host thread to this GPU: which of the thread's turns it is, and how many entries end with it.
    turns: list[tuple[int, int]]


@dataclass(frozen=True)
class Passing:
    """What one stage of a pipeline waits for at each step, and sends: as of `Entry` (steps,); whether it has a head."""

    receives: Sequence[int]
    sends_bytes: Sequence[int]
    has_head: bool


def check_executable(inputs: Inputs) -> None:
    """Refuse what depends on the clock or has no counterpart among the CUDA calls that are made, all of it at once."""
    scenario, model = inputs.scenario, inputs.model
    by_clock = make_prefetch(scenario, model).uses_clock
    discipline = f"copy.discipline = {scenario.copy_.discipline!r}"
    checks = (
        (scenario.dispatch.mode == "free", "dispatch.mode = 'free': a real host is not free: choose eager or graph"),
        (scenario.dispatch.expert_kernel != "separate", "dispatch.expert_kernel = 'grouped': choose separate"),
        (scenario.copy_.drop_stale, "copy.drop_stale = true: it decides by the clock; set it to false"),
        (_predicts(inputs), "predictor.latency_us: no predictor runs; set it to 0, or predictor.lane = 'free'"),
        (
            scenario.prefetch.issued_by == "gpu",
            "prefetch.issued_by = 'gpu': the host issues copies; set it to host",
        ),
        (not model.uniform, f"model {model.name}: experts of several sizes; only equal slots are executed"),
        (scenario.tiers.host_budget != "all", "tiers.host_budget: no drive is read; set it to 'all'"),
        (not scenario.only_fetches, "miss.policy and [compression]: experts are copied as they are; leave both out"),
        (scenario.memory.preload != "none", "memory.preload: slots begin empty; set it to none"),
        (scenario.workload.context is not None, "workload.context: kernels have no KV cache; leave it out"),
        (inputs.budgets is not None, "memory.total_bytes: slots are preallocated; give memory.gpu_budget alone"),
        (scenario.parallel.gpus > 1, "parallel.gpus: no tokens are exchanged; leave it out, or use parallel.stages"),
        (scenario.copy_.order not in EXECUTED_ORDERS, f"{discipline}: choose {_executed()}"),
        (
            scenario.copy_.by_rank and scenario.parallel.stages > 1,
            f"{discipline} and parallel.stages: choose {_executed(in_stages=True)}",
        ),
        (by_clock, f"prefetch.policy = {scenario.prefetch.policy!r} decides by the clock: choose another"),
    )
    wrongs = [text for wrong, text in checks if wrong] + without_kernels(model)
    if wrongs:
        raise ExecutionError(f"{'; '.join(wrongs)} (execution on a GPU)")


def _executed(*, in_stages: bool = False) -> str:
    """Returns the names of the copy orders that are executed; in the stages of a pipeline, those of streams alone."""
    names = [
        name
        for name, order in COPY_ORDERS.items()
        if order in EXECUTED_ORDERS and not (in_stages and issubclass(order, ByRank))
    ]
    return " or ".join([", ".join(names[:-1]), names[-1]])


def _predicts(inputs: Inputs) -> bool:
    return inputs.guesses is not None and inputs.predictor.latency_us > 0 and inputs.scenario.predictor.lane != "free"


def passings(inputs: Inputs) -> list[Passing]:
    """Returns what passes at each of several stages."""
    flow, stages = flow_of(inputs.model, inputs.trace, inputs.steps), len(inputs.stages)
    return [
        Passing(received_steps(flow, stage), sent_bytes(flow, stage, stages), stage == stages - 1)
        for stage in range(stages)
    ]


def make_plan(inputs: Inputs) -> Plan:
    """Returns the plan of one GPU, as `make_plans` does."""
    (plan,) = make_plans(inputs)
    return plan


def make_plans(inputs: Inputs) -> list[Plan]:
    """Decide all visits of a scenario and lay out what the host calls for them, for each GPU by itself.

    Raises ExecutionError if it cannot be executed.
    """
    planners = make_planners(inputs)
    one_thread = inputs.scenario.parallel.dispatch_threads == "one"
    for served in [planners] if one_thread else [[planner] for planner in planners]:
        _interpret(stages_program([planner.stage for planner in served]), {one.number: one for one in served})
    return [planner.plan() for planner in planners]


def make_planners(inputs: Inputs) -> list[Planner]:
    """Returns what makes the plan of each GPU; ExecutionError as `make_plans`."""
    for part in inputs.parts:
        check_executable(part)
    passing = passings(inputs) if inputs.links is not None else [None]
    registers = Registers(len(passing) * FIXED_REGISTERS + 1)
    return [
        Planner(number, part, registers, passed)
        for number, (part, passed) in enumerate(zip(inputs.parts, passing, strict=True))
    ]


def _interpret(program: Program, planners: dict[int, Planner]) -> None:
    """Hand the commands of one host thread to the planners of its GPUs, and end its turns to them."""
    turn, at = -1, -1
    for step in program:
        for portion in step:
            for row in portion.tolist():
                command = Command._make(row)
                if command.op == Op.TURN:
                    if at >= 0:
                        planners[at].end_turn(turn)
                    turn, at = turn + 1, command.gpu
                else:
                    planners[command.gpu].carry_out(command)
    planners[at].end_turn(turn)


@dataclass
class _Ahead:
    """What has been said of the next entry of one GPU, until it comes."""

    waits: list[int] = field(default_factory=list)
    promotes: list[int] = field(default_factory=list)
    overtakes: int = -1
    slot: int = -1
    receives: int = -1


class Planner:
    """Interprets the commands of one GPU: registers stand for entries, and rooms have slots besides."""

    def __init__(self, number: int, inputs: Inputs, registers: Registers, passing: Passing | None) -> None:
        scenario = inputs.scenario
        self.number = number
        self._manager, prefetch = make_manager(inputs), make_prefetch(scenario, inputs.model)
        self._rooms = Rooms(registers)
        self._visits: list[Visit] = []
        self._sends = () if passing is None else passing.sends_bytes
        self.stage = Stage(
            Gpu(visit_settings(scenario, gpu=number), self._rooms, registers),
            dispatched(inputs, self._manager, prefetch), inputs.model.layers, inputs.steps, self._visits.append,
            has_head=passing is None or passing.has_head,
            receives=None if passing is None else passing.receives,
            sends=None if passing is None else passing.sends_bytes,
        )  # fmt: skip
        self._experts = inputs.model.experts
        self._graph = scenario.dispatch.mode == "graph"
        self._queued = scenario.copy_.by_rank
        self._copy_lanes = {H2D: "h2d", PREFETCH_LANE: "h2d"}
        if scenario.copy_.order.prefetch_stream:
            self._copy_lanes[PREFETCH_LANE] = "prefetch"
        self._pieces = pieces_of(inputs.model.expert_bytes[0], scenario.copy_.chunk_bytes)
        self._entries: list[Entry] = []
        self._turns: list[tuple[int, int]] = []
        self._slots = self._marks = 0
        self._register: dict[int, int] = {}  # what it stands for: an entry, -1 for nothing
        self._slot_of: dict[int, int] = {}  # by the register of a room
        self._ahead = _Ahead()
        self._visit = self._layer = -1
        self._decodes, self._tokens = False, 0  # of the step
        self._last_kernel = -1

    def plan(self) -> Plan:
        """Returns the plan, once all commands have been carried out."""
        resident = {
            expert: self._slot_of[self._rooms.of(copy).register] for expert, copy in self._manager.assigned.items()
        }
        return Plan(
            self._entries, self._visits, self._manager, self._slots, self._marks, self._pieces, resident, self._turns
        )

    def end_turn(self, turn: int) -> None:
        """Note that the host thread leaves this GPU, to which it had turned as its turn of this number."""
        self._turns.append((turn, len(self._entries)))

    def carry_out(self, command: Command) -> None:
        """Add what a command asks for; raise ExecutionError if no CUDA call here stands for it."""
        carry = _CARRY_OUT.get(command.op)
        if carry is None:
            raise ExecutionError(f"command {Op(command.op).name}: no CUDA call is made for it (execution on a GPU)")
        carry(self, command)

    def _add(self, command: Command, kind: int, lane: str, tokens: int, **more: Any) -> None:
        """Add an entry behind all that was said of it; the command's register stands for it."""
        ahead, self._ahead = self._ahead, _Ahead()
        stream, entries = STREAMS[lane], self._entries
        waits = tuple(other for other in ahead.waits if STREAMS[entries[other].lane] != stream)
        entries.append(Entry(
            kind, self._visit, more.pop("layer", self._layer), tokens, lane, command.expert, command.copy,
            waits=waits, overtakes=ahead.overtakes, promotes=tuple(ahead.promotes), mark=self._marks,
            receives=ahead.receives, **more,
        ))  # fmt: skip
        self._marks += entries[-1].marks
        if command.register >= 0:
            self._register[command.register] = len(entries) - 1

    def _padded(self, tokens: int) -> int:
        """Returns for how many tokens kernels run: graphs of decode steps are made for some counts only."""
        return token_bucket(tokens) if self._graph and self._decodes else tokens

    # Commands.

    def _nothing(self, command: Command) -> None:
        """Add nothing: it says what the engines' clocks do."""

    def _begin_visit(self, command: Command) -> None:
        self._visit += 1

    def _wait(self, command: Command) -> None:
        entry = self._register.get(command.register, -1)
        if entry >= 0:
            self._ahead.waits.append(entry)

    def _hold(self, command: Command) -> None:
        """Let the host wait for what a register stands for, behind all that it has called for so far."""
        self._entries[-1].host_waits += (self._register[command.register],)

    def _reclaim(self, command: Command) -> None:
        """Let the next copy have a room's slot; equal experts leave nothing of it."""
        self._wait(command)
        entry = self._register[command.register]
        self._register[command.register] = -1
        self._ahead.slot = self._slot_of.pop(command.register)
        if self._entries[entry].kind in COPIES:
            self._ahead.overtakes = entry

    def _touch(self, command: Command) -> None:
        self._register[command.register] = len(self._entries) - 1

    def _output(self, command: Command) -> None:
        self._register[command.register] = self._last_kernel

    def _receive(self, command: Command) -> None:
        self._ahead.receives = command.extra

    def _promote(self, command: Command) -> None:
        entry = self._register[command.register]
        if self._entries[entry].kind in COPIES:
            self._ahead.promotes.append(entry)

    def _launch(self, command: Command) -> None:
        if command.kind == DENSE:
            self._layer, self._decodes = command.layer, command.peer == DECODE
            self._tokens = self._padded(command.tokens)
        slot = self._slot_of.get(command.register, -1)
        self._add(command, command.kind, "compute", self._padded(command.tokens), slot=slot)
        self._last_kernel = len(self._entries) - 1

    def _read_back(self, command: Command) -> None:
        self._add(command, READBACK, "d2h", self._padded(command.tokens))

    def _copy(self, command: Command) -> None:
        slot = self._ahead.slot
        if slot < 0:
            slot, self._slots = self._slots, self._slots + 1
        self._slot_of[command.register] = slot
        layer, marks = command.expert // self._experts, self._pieces if self._queued else 1
        lane = self._copy_lanes[command.lane]
        self._add(command, command.kind, lane, 0, layer=layer, slot=slot, target=command.extra, marks=marks)

    def _send(self, command: Command) -> None:
        self._add(command, ACTIVATION, "peer", self._tokens, size_bytes=self._sends[command.extra])


_CARRY_OUT: dict[int, Callable[[Planner, Command], None]] = {
    Op.VISIT: Planner._begin_visit,
    Op.WAIT: Planner._wait,
    Op.RECLAIM: Planner._reclaim,
    Op.TOUCH: Planner._touch,
    Op.OUTPUT: Planner._output,
    Op.LAUNCH: Planner._launch,
    Op.COPY: Planner._copy,
    Op.READBACK: Planner._read_back,
    Op.NOTICE: Planner._hold,
    Op.DECIDE: Planner._nothing,
    Op.HOLD: Planner._hold,
    Op.PROMOTE: Planner._promote,
    Op.CATCH_UP: Planner._nothing,
    Op.RECEIVE: Planner._receive,
    Op.SEND: Planner._send,
}


def decision_counts(visits: Iterable[Visit], manager: MemoryManager) -> dict[str, int]:
    """Returns what was decided, by number: found, missed, prefetched and dropped experts, and those evicted."""
    found = miss = prefetch = 0
    for visit in visits:
        found += sum(len(wave.found) for wave in visit.waves)
        miss += sum(len(wave.admitted) for wave in visit.waves)
        prefetch += len(visit.prefetches)
    return {"found": found, "miss": miss, "prefetch": prefetch, "dropped": manager.dropped, "evict": manager.evicted}
