"""A prediction as a range: p5 to p95 over what its costs may be, where they are not all measured.

Decisions are the same in every draw but where a policy looks at the clock or at costs. A long run is drawn by its first
steps, whose speed moves as the whole run's does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .costs.costs import Costs, part_costs
from .costs.ranges import drawn_costs, structure
from .costs.uncertainty import PERCENTILES
from .measure.merge import makespan_ns, step_metrics
from .measure.speed import Serving
from .run import Progress, engine_for, prepared, run_all
from .scenario.inputs import Inputs

#: How many draws, and over how many layer visits at most.
DRAWS, MOST_VISITS = 12, 2_400
#: What is given as a range, as ratios of the run's own figure.
FIGURES = ("tokens_per_second", "makespan_ms", "time_to_first_token_ms")
#: Estimates that are rules of what was measured, and unsure by nothing else.
_BY_RULE = {"grouped expert kernel"}


class Range(NamedTuple):
    """What a figure may be, at the percentiles 5, 50 and 95 of its draws."""

    p5: float
    p50: float
    p95: float

    @property
    def digits(self) -> int:
        """How many digits of the figure are known: of a range from 28 to 49, one of 37 is; its last may be off."""
        half = (self.p95 - self.p5) / 2
        return 6 if half <= 0 else max(1, 1 + math.floor(math.log10(abs(self.p50) / half)) + 1)

    def rounded(self, value: float) -> float:
        """Returns a figure with as many digits as are known of it."""
        return float(f"{value:.{self.digits}g}")


def unsure(inputs: Inputs, estimates: Mapping[str, str]) -> list[str]:
    """Returns which costs of a run nobody measured, in words; none where all are."""
    runtime = [f"{inputs.runtime.name}: {cost}" for cost in inputs.runtime.unmeasured]
    machine = [] if _measured(inputs) else [f"the machine's ({inputs.profile.name})"]
    return machine + sorted(set(estimates) - _BY_RULE) + runtime


def _measured(inputs: Inputs) -> bool:
    """Whether the costs that every run pays were measured on this machine."""
    host, copies = inputs.profile.host, next(iter(inputs.profile.h2d.values()))
    facts = (host.launch, host.graph_launch, copies.queued)
    return all(fact.source in ("measured", "fitted") and fact.device is None for fact in facts)


def ranges(
    inputs: Inputs,
    serving: Serving,
    figures: Mapping[str, Any],
    draws: int = DRAWS,
    progress: Progress | None = None,
) -> dict[str, Range]:
    """Returns the range of each of FIGURES that a run has, `figures` being its own; `progress` is told of the draws."""
    few, figures = _beginning(inputs), middles(figures)
    shorter = few is not inputs
    point = _figures(few, part_costs(few), serving) if shorter else figures
    runs: list[dict[str, Any]] = []
    for costs in drawn_costs(few, draws):
        if progress is not None:
            progress("range", len(runs), draws)
        runs.append(_figures(few, costs, serving))
    if progress is not None:
        progress("range", draws, draws)
    own = inputs.runtime.neutral
    sigma = 0.0 if own else inputs.runtime.structure
    prompts = 0.0 if own else max(sigma, inputs.runtime.prompts)
    found = {}
    for name in FIGURES:
        if not figures.get(name) or not point.get(name):
            continue
        ratios = [run[name] / point[name] for run in runs]
        otherwise = structure(inputs.scenario.seed, draws, prompts if name == "time_to_first_token_ms" else sigma)
        times = [factor if name == "tokens_per_second" else 1 / factor for factor in otherwise]
        values = figures[name] * np.array(ratios) * np.array(times)
        found[name] = percentiles(values.tolist())
    return found


def _beginning(inputs: Inputs) -> Inputs:
    """Returns inputs with the first steps alone, if there are many; those of several GPUs as they are."""
    steps = max(1, MOST_VISITS // inputs.trace.layers)
    if len(inputs.parts) > 1 or len(inputs.steps) <= steps:
        return inputs
    budgets = None if inputs.budgets is None else inputs.budgets[:steps]
    return replace(inputs, steps=inputs.steps[:steps], budgets=budgets)


def _figures(inputs: Inputs, costs: list[Costs], serving: Serving) -> dict[str, Any]:
    recordings = run_all(inputs, prepared(inputs, costs), engine=engine_for(inputs).engine)
    warm = min(serving.warmup_steps, len(inputs.steps) - 1)
    speed = step_metrics(recordings, replace(serving, warmup_steps=warm))
    return {**middles(speed), "makespan_ms": makespan_ns(recordings) / 1e6}


def middles(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Returns figures by name, of percentiles the middle one."""
    middle = {name: value["p50"] for name, value in figures.items() if isinstance(value, Mapping) and "p50" in value}
    return {**figures, **middle}


def percentiles(values: Sequence[float]) -> Range:
    """Returns the percentiles 5, 50 and 95 of some draws."""
    return Range(*np.percentile(values, PERCENTILES).tolist())
