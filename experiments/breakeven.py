"""Break-even: the least recall of a predictor at which prefetching pays, against the same cache without it.

The oracle guesses with any recall. Its luck is keyed, so what it gets right at one recall it gets right at every
higher one, and the makespan falls with recall, nearly: a right guess can still push a copy behind another. Hence
recall is bisected, and then tested on both sides; where these tests contradict, the answer is an interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.baselines import baseline_scenario, run_baseline
from ..engine.costs.costs import part_costs
from ..engine.loading.deciders import make_prefetch
from ..engine.measure.merge import makespan_ns as run_ns
from ..engine.run import prepared, run_all
from ..engine.scenario.amounts import ScenarioError
from ..engine.scenario.scenario import Scenario, make_scenario
from ..engine.timing.ready import make_ready
from ..errors import InputError
from .grid import make_grid
from .sweep import Hashes, Plan, Progress, worker_inputs
from .workers import Workers

#: Recalls are looked at in steps of 1 / this.
STEPS = 100
#: How far beyond the two recalls that bisection ends with it is tested, in steps, on both sides.
PROBES = (2, 5, 10)


@dataclass(frozen=True)
class Cell:
    """One search: a budget and a lookahead, with the scenario that has them."""

    budget: str
    lookahead: int
    scenario: dict[str, Any]
    hashes: Hashes


def break_even(
    scenario: Scenario,
    *,
    budgets: Sequence[str] = (),
    lookaheads: Sequence[int] = (),
    workers: int | None = None,
    cluster: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Returns the least recall that pays, for every budget and lookahead (the scenario's own without any).

    Each of `cells` has `recall`: from there on every recall tested pays, which means a shorter makespan (a tie does not
    pay); None where even recall 1 does not. `not_below`: up to there no recall tested pays; between the two lies one
    step, or an interval where luck decides. `without_ms` is the same cache without prefetch, `with_recall_1_ms` the
    best that prefetching can do, and `tested_ms` what was run, by recall. Raises ValueError.
    """
    if scenario.prefetch.lookahead == 0 and not lookaheads:
        raise ScenarioError("prefetch.lookahead = 0: nothing is prefetched, so no recall can pay; set it to 1 or more")
    if 0 in lookaheads:
        raise ScenarioError("lookahead 0: nothing is prefetched, so no recall can pay; give 1 or more")
    values: dict[str, Sequence[Any]] = {
        "memory.gpu_budget": budgets or [scenario.memory.gpu_budget],
        "prefetch.lookahead": lookaheads or [scenario.prefetch.lookahead],
    }
    plan = Plan(make_grid(scenario, values), baselines=False)
    cells = []
    for _, _, one in plan.points():
        if isinstance(one, ScenarioError):
            raise one
        cells.append(Cell(one.memory.gpu_budget, one.prefetch.lookahead, one.plain(), plan.hashes(one)))
    found: dict[tuple[str, int], dict[str, Any]] = {}
    make_ready(progress)
    if workers is not None:
        workers = min(workers, len(cells))
    elif cluster is None and len(cells) == 1:
        workers = 1
    with Workers(workers, cluster) as crew:
        for cell, result in crew.run(search, cells):
            if result is None or "error" in result:
                why = "a worker died" if result is None else result["error"]
                raise ScenarioError(f"budget {cell.budget}, lookahead {cell.lookahead}: {why}")
            found[cell.budget, cell.lookahead] = result
            if progress is not None:
                progress("break-even", len(found), len(cells))
    return {
        "scenario": scenario.plain(),
        "cells": [
            {"budget": cell.budget, "lookahead": cell.lookahead, **found[cell.budget, cell.lookahead]} for cell in cells
        ],
    }


def search(cell: Cell) -> dict[str, Any]:
    """Search one cell, in whatever process this is; a scenario that cannot run gives `error`."""
    try:
        return _search(make_scenario(cell.scenario), cell.hashes)
    except InputError as error:
        return {"error": str(error)}


def _search(scenario: Scenario, hashes: Hashes) -> dict[str, Any]:
    inputs = worker_inputs(baseline_scenario("no_prefetch", scenario), hashes)
    if not make_prefetch(scenario, inputs.model).guesses:
        raise ScenarioError(f"prefetch.policy = {scenario.prefetch.policy!r} asks no predictor: recall changes nothing")
    without_ms = run_baseline("no_prefetch", inputs, part_costs(inputs))
    tested: dict[int, float] = {}

    def pays(step: int) -> bool:
        tested[step] = _makespan_ms(scenario, step / STEPS, hashes)
        return tested[step] < without_ms

    recall, below = bracket(pays)
    return {
        "recall": None if recall is None else recall / STEPS,
        "not_below": None if below is None else below / STEPS,
        "without_ms": without_ms,
        "with_recall_1_ms": tested[STEPS],
        "tested_ms": {f"{step / STEPS:g}": tested[step] for step in sorted(tested)},
    }


def bracket(pays: Callable[[int], bool]) -> tuple[int | None, int | None]:
    """Returns (least step from which on all tested pay, greatest up to which none does) of 0 … STEPS.

    The first is None if STEPS does not pay, the second if 0 does.
    """
    if not pays(STEPS):
        return None, STEPS
    tested = {STEPS: True, 0: pays(0)}
    low, high = 0, STEPS
    while not tested[0] and high - low > 1:
        middle = (low + high) // 2
        tested[middle] = pays(middle)
        low, high = (low, middle) if tested[middle] else (middle, high)
    for step in _probes(low, 0 if tested[0] else high):
        if step not in tested:
            tested[step] = pays(step)
    losing = sorted(step for step in tested if not tested[step])
    paying = sorted(step for step in tested if tested[step])
    recall = min(step for step in paying if not losing or step > losing[-1])
    below = max((step for step in losing if step < paying[0]), default=None)
    return recall, below


def _probes(low: int, high: int) -> Iterator[int]:
    for far in PROBES:
        yield from (step for step in (low - far, high + far) if 0 <= step <= STEPS)


def _makespan_ms(scenario: Scenario, recall: float, hashes: Hashes) -> float:
    """Returns the makespan of a scenario in ms, the predictor being an oracle of this recall."""
    predictor = scenario.predictor.model_copy(update={"name": "oracle", "recall": recall})
    scenario = scenario.model_copy(update={"predictor": predictor})
    inputs = worker_inputs(scenario, hashes)
    return run_ns(run_all(inputs, prepared(inputs, part_costs(inputs)))) / 1e6
