"""Cache-aware routing, computed before a run: as decisions need no clock, neither do the choices.

The run's visits are decided once, each token's experts chosen again by who is in memory then; the trace of what was
chosen is what every engine, metric and baseline goes by. So the run decides as this did, to the last access.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ...workloads.batches import Step
from ...workloads.trace import RoutingTrace
from ...workloads.trace_checks import POPULARITY, RUNNERS_UP, RUNNERS_UP_WEIGHTS
from ..decide.dispatch import Accesses, accesses_at, whole
from ..decide.memory_manager import MemoryManager
from ..policies.eviction import EVICTION
from ..policies.eviction_informed import popularity
from ..policies.routing import ROUTING, Leeway
from ..scenario.amounts import ScenarioError
from ..scenario.inputs import Inputs, Rerouted
from .deciders import dispatched, make_manager, make_prefetch
from .offloading import whole_setting


def rerouted(inputs: Inputs) -> Inputs:
    """Returns one GPU's inputs with the trace as the scenario's routing makes it; ScenarioError if it cannot."""
    section = inputs.scenario.routing
    if section.policy == "router":
        return inputs
    trace = _with_candidates(inputs)
    prefetch = make_prefetch(inputs.scenario, inputs.model)
    if prefetch.uses_clock:
        raise ScenarioError(
            f"prefetch.policy = {inputs.scenario.prefetch.policy!r} looks at the clock, and routing.policy = "
            f"{section.policy!r} decides before it starts: choose another of the two"
        )
    if section.keep > trace.k:
        raise ScenarioError(f"routing.keep = {section.keep}: must be at most {trace.k}, the experts of a token")
    if POPULARITY not in trace.extra:  # learned from what the router chose, as nobody knows yet what comes of it
        popular = np.array(popularity(whole_setting(inputs))).reshape(trace.layers, trace.num_experts)
        trace = trace.with_extra({POPULARITY: popular})
    assert trace.weights is not None
    chosen = replace(trace, experts=trace.experts.copy(), weights=trace.weights.copy())
    inputs = replace(inputs, trace=chosen)
    manager = make_manager(inputs)
    chooser = _Chooser(trace, chosen, manager, section.policy, Leeway(trace.k, section.margin, section.keep))
    part = replace(whole(chosen, inputs.steps, inputs.guesses, prefetch), accesses=chooser.accesses(inputs.steps))
    for _ in dispatched(inputs, manager, prefetch, part=part):
        pass
    return replace(inputs, rerouted=chooser.made())


def _with_candidates(inputs: Inputs) -> RoutingTrace:
    """Returns the trace, which says who came next at the router, and with which gates."""
    trace, policy = inputs.trace, inputs.scenario.routing.policy
    lacking = [name for name in (RUNNERS_UP, RUNNERS_UP_WEIGHTS) if name not in trace.extra]
    lacking += ["weights"] if trace.weights is None else []
    if lacking:
        raise ScenarioError(
            f"routing.policy = {policy!r} goes by the gate weights of who was chosen and who came next, and the trace "
            f"has no {' and no '.join(lacking)}: record one with `--runners-up`, or choose routing.policy = 'router'"
        )
    for key, name in (
        ("memory.eviction", inputs.scenario.memory.eviction), ("tiers.host_policy", inputs.scenario.tiers.host_policy)
    ):  # fmt: skip
        if getattr(EVICTION[name], "needs_future", False):
            raise ScenarioError(
                f"{key} = {name!r} must know all choices beforehand, which routing.policy makes as it goes"
            )
    return trace


@dataclass
class _Chooser:
    """Chooses again, visit by visit, and writes into the trace `chosen` what is used in place of what `trace` has."""

    trace: RoutingTrace
    chosen: RoutingTrace
    manager: MemoryManager
    policy: str
    leeway: Leeway
    choices: int = 0
    changed: int = 0
    gate_before: float = 0.0
    gate_after: float = 0.0

    def accesses(self, steps: list[Step]) -> Iterator[Iterator[Accesses]]:
        """Yields the look-ups of each step, made layer by layer when they are asked for."""
        for step in steps:
            yield (self._visit(step, layer) for layer in range(self.trace.layers))

    def _visit(self, step: Step, layer: int) -> Accesses:
        trace, chosen, k = self.trace, self.chosen, self.trace.k
        rows = step.rows if trace.made is None else step.rows[trace.made[step.rows, layer].all(axis=1)]
        first, assigned = layer * trace.num_experts, self.manager.assigned
        resident = np.array([first + expert in assigned for expert in range(trace.num_experts)])
        for row in rows.tolist():
            experts = np.concatenate([trace.experts[row, layer], trace.extra[RUNNERS_UP][row, layer]])
            gates = self._gates(row, layer)
            used = ROUTING[self.policy](gates, resident[experts], self.leeway)
            chosen.experts[row, layer] = experts[used]
            assert chosen.weights is not None
            chosen.weights[row, layer] = gates[used]
            self.choices += k
            self.changed += int((used >= k).sum())
            self.gate_before += float(gates[:k].sum())
            self.gate_after += float(gates[used].sum())
        return accesses_at(chosen, step, layer)

    def _gates(self, row: int, layer: int) -> npt.NDArray[np.float64]:
        assert self.trace.weights is not None
        both = [self.trace.weights[row, layer], self.trace.extra[RUNNERS_UP_WEIGHTS][row, layer]]
        return np.concatenate(both).astype(np.float64)

    def made(self) -> Rerouted:
        """Returns what came of it."""
        return Rerouted(self.choices, self.changed, self.gate_before, self.gate_after)
