"""How sure advice is: the gain under draws of all uncertain costs, and which single cost could reverse it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..engine.costs.costs import Costs
from ..engine.costs.ranges import costs_times, drawn_costs, spread_of, unsure_costs
from ..engine.measure.recording import Recording
from ..engine.prediction import DRAWS, Range, percentiles
from ..engine.run import prepared, run_all
from ..engine.scenario.inputs import Inputs
from .advice_goals import Goal

#: How far one run of the same settings is from the next, by how kernels reach the GPU: measured on an H200 over whole
#: schedules (CUDA graphs 0.1-0.5 %, eager 0.1-8 %).
NOISE = {"graph": 0.01, "eager": 0.05, "free": 0.01}
#: The ends at which a single cost is tried: 5 % of a normal distribution lie beyond each.
_ENDS = 1.645
#: What would settle a cost, by the beginning of its path.
MEASURES = {
    "profile.h2d": "measure copies: prestage calibrate measure",
    "profile.d2h": "measure copies: prestage calibrate measure",
    "profile.compute": "measure kernels: prestage calibrate measure",
    "profile.host": "measure launches: prestage calibrate measure",
    "profile.processor": "measure what the processors read of memory (STREAM), and give it as miss.cpu_gb_per_s",
    "runtime": "run the runtime twice with this varied, and fit it: prestage calibrate observe",
}

#: The figures of goals that recordings of some inputs came to.
OfRun = Callable[[Inputs, list[Recording]], Mapping[str, float]]


class Deciding(NamedTuple):
    """A cost whose ends turn a gain into a loss: its name, source, the gain at its ends, and what would settle it."""

    cost: str
    source: str
    least: float
    most: float
    measure: str


@dataclass(frozen=True)
class Pair:
    """Two runs that are compared: what figures of goals recordings come to, the inputs of each, and the goal."""

    of_run: OfRun
    ours: Inputs
    theirs: Inputs
    goal: Goal
    name: str

    def gain(self, our_costs: Sequence[Costs], their_costs: Sequence[Costs]) -> float:
        """Returns how many times as good ours is as theirs, at some costs of their GPUs."""
        pairs = ((self.ours, our_costs), (self.theirs, their_costs))
        figures = [self.of_run(inputs, run_all(inputs, prepared(inputs, costs)))[self.name] for inputs, costs in pairs]
        return self.goal.gain(*figures)


def drawn_gains(pair: Pair) -> Range:
    """Returns how many times as good one run is as another, both at the same draws of what costs may be."""
    ours, theirs = (drawn_costs(inputs, DRAWS) for inputs in (pair.ours, pair.theirs))
    return percentiles([pair.gain(*costs) for costs in zip(ours, theirs, strict=True)])


def deciding_costs(pair: Pair) -> list[Deciding]:
    """Returns the costs that turn a gain around by themselves, each at its ends, the least sure gain first."""
    facts = unsure_costs(pair.ours)
    groups: dict[str, list[str]] = {}
    for path in facts:
        groups.setdefault(_group(path), []).append(path)
    found = []
    for group, paths in groups.items():
        gains = [pair.gain(*_at_end(pair, group, end)) for end in (-_ENDS, _ENDS)]
        if min(gains) <= 1 < max(gains):
            widest = max((facts[path] for path in paths), key=spread_of)
            measure = next((text for start, text in MEASURES.items() if group.startswith(start)), "measure it")
            found.append(Deciding(group, widest.source, min(gains), max(gains), measure))
    return sorted(found, key=lambda each: each.least)


def _at_end(pair: Pair, group: str, end: float) -> list[list[Costs]]:
    """Returns the costs of both runs with those of a group at one end of what they may be."""

    def draw(path: str, sigma: float) -> float:
        return math.exp(end * sigma) if _group(path) == group else 1.0

    return [costs_times(inputs, draw) for inputs in (pair.ours, pair.theirs)]


def _group(path: str) -> str:
    """Returns what one measurement would settle: "profile.h2d" of all its copies, "runtime.costs.step" by itself."""
    parts = path.partition("/")[0].split(".")
    return ".".join(parts[: 3 if parts[:2] == ["runtime", "costs"] else 2])
