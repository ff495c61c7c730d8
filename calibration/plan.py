"""The plan of an execution: every call group that the host makes for a scenario, in order, without a GPU or a clock.

The decisions come from the visits that the simulator draws too; here they become entries (a kernel group, a copy, a
read-back) with the expert slots they use and the entries whose end they wait for. What one stream orders by itself
needs no wait. Each stage of a pipeline has a plan of its own, whose entries also say what passes between the stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..engine.costs.costs import pieces_of, token_bucket
from ..engine.decide.dispatch import Visit, launch_order
from ..engine.decide.memory_manager import Admission, MemoryManager
from ..engine.pipeline import flow_of, received_steps, sent_bytes
from ..engine.run import dispatched, make_manager, make_prefetch
from ..engine.scenario.inputs import Inputs
from ..engine.scenario.scenario import Scenario
from ..errors import InputError
from ..resources.timeline import ACTIVATION, DEMAND, DENSE, EXPERT, HEAD, PREFETCH, READBACK
from ..workloads.batches import DECODE, Step
from .cuda import without_kernels

#: The kinds of entries that copy an expert.
COPIES = (DEMAND, PREFETCH)


class ExecutionError(InputError):
    """A scenario that can be simulated but not executed; the message names the key and what would be right."""


@dataclass(slots=True)
class Entry:
    """One call group: `waits` are the entries whose end its stream waits for before it starts.

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
    #: How many entries there are up to the end of each step (steps,).
    step_ends: list[int]


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
        (inputs.budgets is not None, "memory.total_bytes: slots are preallocated; give memory.gpu_budget alone"),
        (scenario.parallel.gpus > 1, "parallel.gpus: no tokens are exchanged; leave it out, or use parallel.stages"),
        (_queues_in_stages(scenario), "copy.discipline = 'priority' and parallel.stages: choose fifo or two_streams"),
        (by_clock, f"prefetch.policy = {scenario.prefetch.policy!r} decides by the clock: choose another"),
    )
    wrongs = [text for wrong, text in checks if wrong] + without_kernels(model)
    if wrongs:
        raise ExecutionError(f"{'; '.join(wrongs)} (execution on a GPU)")


def _queues_in_stages(scenario: Scenario) -> bool:
    return scenario.copy_.discipline == "priority" and scenario.parallel.stages > 1


def _predicts(inputs: Inputs) -> bool:
    return inputs.guesses is not None and inputs.predictor.latency_us > 0 and inputs.scenario.predictor.lane != "free"


def make_plans(inputs: Inputs) -> list[Plan]:
    """Decide all visits of a scenario and lay out what the host calls for them, for each GPU by itself.

    Raises ExecutionError if it cannot be executed.
    """
    if inputs.links is None:
        return [make_plan(part) for part in inputs.parts]
    return [make_plan(part, passing) for part, passing in zip(inputs.stages, passings(inputs), strict=True)]


def passings(inputs: Inputs) -> list[Passing]:
    """Return what passes at each of several stages."""
    flow, stages = flow_of(inputs.model, inputs.trace, inputs.steps), len(inputs.stages)
    return [
        Passing(received_steps(flow, stage), sent_bytes(flow, stage, stages), stage == stages - 1)
        for stage in range(stages)
    ]


def make_plan(inputs: Inputs, passing: Passing | None = None) -> Plan:
    """Return the plan of one GPU, as `make_plans` does; `passing`: it is a stage among others."""
    check_executable(inputs)
    manager, prefetch = make_manager(inputs), make_prefetch(inputs.scenario, inputs.model)
    visits = list(dispatched(inputs, manager, prefetch))
    planner = _Planner(inputs, passing)
    for visit in visits:
        planner.visit(visit)
    resident = {expert: planner.slot_of[copy] for expert, copy in manager.assigned.items()}
    return Plan(
        planner.entries, visits, manager, planner.slots, planner.marks, planner.pieces, resident, planner.step_ends
    )


class _Planner:
    def __init__(self, inputs: Inputs, passing: Passing | None) -> None:
        scenario = inputs.scenario
        self.entries: list[Entry] = []
        self.step_ends: list[int] = []
        self._passing = passing
        self._last_kernel = -1  # its entry
        self.slots = self.marks = 0
        self.slot_of: dict[int, int] = {}  # by copy
        self._scenario = scenario
        self._layers, self._experts = inputs.model.layers, inputs.model.experts
        self._steps = inputs.steps
        self._touched: dict[int, int] = {}  # by copy: the entry of the last kernel that reads it, or of the copy
        self._copy_entry: dict[int, int] = {}
        self._promotes: tuple[int, ...] = ()
        self._graph = scenario.dispatch.mode == "graph"
        self._queued = scenario.copy_.discipline == "priority"
        self._prefetch_lane = "prefetch" if scenario.copy_.discipline == "two_streams" else "h2d"
        self.pieces = pieces_of(inputs.model.expert_bytes[0], scenario.copy_.chunk_bytes)

    def visit(self, visit: Visit) -> None:
        """Add one layer visit, and behind the last layer the head of its step."""
        number, layer, settings = visit.number, visit.layer, self._scenario
        step = self._steps[visit.step]
        tokens = self._tokens(len(step.rows), step)
        receives = -1 if self._passing is None or layer else self._passing.receives[visit.step]
        self._add(Entry(DENSE, number, layer, tokens, "compute", receives=receives))
        if settings.dispatch.router_readback:
            self._add(Entry(READBACK, number, layer, tokens, "d2h"))
        for wave in visit.waves:
            if self._queued:
                entries = (self._copy_entry.get(copy, -1) for copy in wave.found.values())
                self._promotes = tuple(entry for entry in entries if entry >= 0)
            for admission in wave.admitted:
                self._copy(admission, DEMAND, "h2d", visit, number)
            if settings.prefetch.issue == "before_launch" and wave is visit.waves[-1]:
                self._prefetches(visit)
            resident_first = settings.dispatch.expert_order == "resident_first"
            for expert, chosen_by, copy in launch_order(visit, wave, resident_first):
                self._expert(visit, expert, chosen_by, copy)
        if settings.prefetch.issue == "after_launch":
            self._prefetches(visit)
        if layer == self._layers - 1:
            self._end_step(visit, step, tokens)

    def _end_step(self, visit: Visit, step: Step, tokens: int) -> None:
        """Add the head, over the positions that need it, and what goes to the next stage behind the last kernel."""
        passing, number, layer = self._passing, visit.number, visit.layer
        if passing is None or passing.has_head:
            self._add(Entry(HEAD, number, layer, self._tokens(step.sampled, step), "compute"))
        if passing is not None and (size_bytes := passing.sends_bytes[visit.step]):
            waits = (self._last_kernel,)
            self._add(Entry(ACTIVATION, number, layer, tokens, "peer", waits=waits, size_bytes=size_bytes))
        self.step_ends.append(len(self.entries))

    def _tokens(self, tokens: int, step: Step) -> int:
        return token_bucket(tokens) if self._graph and step.phase == DECODE else tokens

    def _add(self, entry: Entry) -> int:
        entry.mark, entry.promotes, self._promotes = self.marks, self._promotes, ()
        self.marks += entry.marks
        self.entries.append(entry)
        number = len(self.entries) - 1
        if entry.lane == "compute":
            self._last_kernel = number
        return number

    def _prefetches(self, visit: Visit) -> None:
        for admission, target in visit.prefetches:
            self._copy(admission, PREFETCH, self._prefetch_lane, visit, target)

    def _copy(self, admission: Admission, kind: int, lane: str, visit: Visit, target: int) -> None:
        """Add a copy into the slot of the expert that left, behind the last kernel that reads it there."""
        if admission.former:
            former = admission.former[0]  # experts of one size: exactly one
            slot, before = self.slot_of.pop(former), self._touched.pop(former)
        else:
            slot, before = self.slots, -1
            self.slots += 1
        self.slot_of[admission.copy] = slot
        unused = before >= 0 and self.entries[before].kind in COPIES
        waits = (before,) if before >= 0 and self.entries[before].lane != lane else ()
        entry = Entry(
            kind, visit.number, admission.expert // self._experts, 0, lane, admission.expert, admission.copy,
            slot, target, waits, before if unused else -1, marks=self.pieces if self._queued else 1,
        )  # fmt: skip
        self._copy_entry[admission.copy] = self._touched[admission.copy] = self._add(entry)

    def _expert(self, visit: Visit, expert: int, tokens: int, copy: int) -> None:
        """Add an expert's kernels; the first use of a copy waits for it, later ones follow on the same stream."""
        copied = self._copy_entry.pop(copy, -1)
        waits = (copied,) if copied >= 0 else ()
        tokens, slot = self._tokens(tokens, self._steps[visit.step]), self.slot_of[copy]
        entry = Entry(EXPERT, visit.number, visit.layer, tokens, "compute", expert, copy, slot, waits=waits)
        self._touched[copy] = self._add(entry)


def decision_counts(visits: Iterable[Visit], manager: MemoryManager) -> dict[str, int]:
    """Return what was decided, by number: found, missed, prefetched and dropped experts, and those evicted."""
    found = miss = prefetch = 0
    for visit in visits:
        found += sum(len(wave.found) for wave in visit.waves)
        miss += sum(len(wave.admitted) for wave in visit.waves)
        prefetch += len(visit.prefetches)
    return {"found": found, "miss": miss, "prefetch": prefetch, "dropped": manager.dropped, "evict": manager.evicted}
