"""The plan of an execution: every call group that the host makes for a scenario, in order, without a GPU or a clock.

A plan interprets the commands of a run's program, as the engines do (`planner`). Each stage of a pipeline has a plan of
its own, whose entries also say what passes between the stages; and so has each of two GPUs that share the experts of
every layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ...engine.costs.all_to_all import AllToAll
from ...engine.decide.commands import FIXED_REGISTERS, Command, Op
from ...engine.decide.dispatch import Visit
from ...engine.decide.expert_parallel import ParallelVisit
from ...engine.decide.memory_manager import MemoryManager
from ...engine.decide.pipeline import flow_of, received_steps, sent_bytes
from ...engine.decide.program import Program, SharedLayers, stages_program
from ...engine.decide.registers import Registers
from ...engine.loading.deciders import dispatched_together
from ...engine.policies.miss import BY_CPU
from ...engine.scenario.inputs import Inputs
from .entries import Passing, Plan, Ref
from .executable import check_executable
from .planner import Planner


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
    if inputs.gpus:
        _interpret(_shared_program(inputs, planners), dict(enumerate(planners)))
        return [planner.plan() for planner in planners]
    one_thread = inputs.scenario.parallel.dispatch_threads == "one"
    for served in [planners] if one_thread else [[planner] for planner in planners]:
        _interpret(stages_program([planner.stage() for planner in served]), {one.number: one for one in served})
    return [planner.plan() for planner in planners]


def make_planners(inputs: Inputs) -> list[Planner]:
    """Returns what makes the plan of each GPU; ExecutionError as `make_plans`."""
    for part in inputs.parts:
        check_executable(part)
    parts = inputs.parts
    passing = passings(inputs) if inputs.stages else [None] * len(parts)
    registers = Registers(len(parts) * FIXED_REGISTERS + 1)
    known: dict[int, tuple[Ref, ...]] = {}
    planners = [
        Planner(number, part, registers, passed, known)
        for number, (part, passed) in enumerate(zip(parts, passing, strict=True))
    ]
    for planner in planners:
        planner.beside = planners
    return planners


def _shared_program(inputs: Inputs, planners: Sequence[Planner]) -> Program:
    """Returns the program of one thread that dispatches to GPUs that share the experts of every layer."""
    links, layout = inputs.links, inputs.expert_parallel
    assert links is not None and layout is not None
    exchange = AllToAll(links.routes(), links.topology, inputs.model.activation_bytes(1), inputs.profile.exchange)
    token_bytes = inputs.model.activation_bytes(1)

    def decided(visit: ParallelVisit) -> None:
        for planner, own in zip(planners, visit.visits, strict=True):
            planner.note(own)
            if visit.traffic is not None:
                planner.sent_bytes = (visit.traffic * token_bytes).tolist()

    visits = dispatched_together(inputs, [one.manager for one in planners], [one.prefetch for one in planners])
    layers = SharedLayers(
        [one.gpu for one in planners], visits, inputs.model.layers, True, lambda traffic: exchange.ns(traffic) > 0,
        decided,
    )  # fmt: skip
    return layers.program(inputs.steps, layout.homes)


def _interpret(program: Program, planners: dict[int, Planner]) -> None:
    """Hand the commands of one host thread to the planners of its GPUs, and end its turns to them.

    What goes between GPUs is called for on both sides, in turns of their own.
    """
    turn, at = -1, -1
    for step in program:
        for portion in step:
            for row in portion.tolist():
                command = Command._make(row)
                if command.op == Op.TURN:
                    if at >= 0:
                        planners[at].end_turn(turn)
                    turn, at = turn + 1, command.gpu
                elif command.op == Op.EXCHANGE:
                    planners[at].end_turn(turn)
                    planners[0].exchange(command)
                    for planner in planners.values():
                        turn += 1
                        planner.end_turn(turn)
                else:
                    planners[command.gpu].carry_out(command)
    planners[at].end_turn(turn)


def decision_counts(visits: Iterable[Visit], manager: MemoryManager) -> dict[str, int]:
    """Returns what was decided, by number: found, missed, prefetched and dropped experts, and those evicted.

    Where there are any, also those that the CPU computed, `cpu`, and what was read from a drive, `read`.
    """
    counts: Counter[str] = Counter(found=0, miss=0, prefetch=0)
    for visit in visits:
        counts["found"] += sum(len(wave.found) for wave in visit.waves)
        counts["miss"] += sum(len(wave.admitted) for wave in visit.waves)
        counts["prefetch"] += len(visit.prefetches)
        counts["cpu"] += sum(access.way in BY_CPU for access in visit.resolution.accesses)
        if visit.reads is not None:
            found = (*visit.reads.copies.values(), *visit.reads.on_cpu.values())
            counts["read"] += len(visit.reads.staged) + sum(admission is not None for _, admission in found)
    more = {name: count for name, count in counts.items() if count or name in ("found", "miss", "prefetch")}
    return {**more, "dropped": manager.dropped, "evict": manager.evicted}
