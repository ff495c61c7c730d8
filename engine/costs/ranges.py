"""How far a run's costs may be off: the same machine and runtime, with each cost drawn from its stated uncertainty.

Every cost has one factor a draw, log-normal, of the spread that it states, or that its source usually has. Of n draws
each cost has one in every n-th of its distribution, in an order of its own: a Latin hypercube (McKay, Beckman and
Conover, "A comparison of three methods for selecting values of input variables", Technometrics 21(2), 1979). Orders are
keyed by (seed, cost), so the same scenario draws the same.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from statistics import NormalDist
from types import NoneType
from typing import Any, TypeVar

import numpy as np

from ...resources.facts import Fact, Part
from ...resources.profile import Profile
from ...resources.runtime import OwnCost, OwnShare, Runtime
from ...workloads.keyed_random import uniform
from ..scenario.inputs import Inputs
from .costs import Costs
from .cpu_streams import MIDDLE, SPREAD
from .uncertainty import RATES, TIMES, cost_key

#: How far costs are off whose profile does not say it, by where they are from (relative standard deviation).
UNSTATED = {"measured": 0.02, "fitted": 0.05, "published": 0.15, "datasheet": 0.15, "assumed": 0.3}
#: Those that were measured on another device.
_FOREIGN = 0.2
#: What grows with a cost's factor, and what shrinks: a runtime's own costs, too.
_TIMES = {*TIMES, "factor", "count"}
_RATES = {*RATES, "share", "of_float32"}

#: What can hold no part.
_LEAVES = (int, float, str, NoneType)

_AnyPart = TypeVar("_AnyPart", bound=Part)
#: The factor of a cost, by its path and spread.
Draw = Callable[[str, float], float]


def drawn_costs(inputs: Inputs, count: int) -> Iterator[list[Costs]]:
    """Yields the costs of each GPU of a run, draw by draw."""
    for draw in _drawings(inputs.scenario.seed, count):
        yield costs_times(inputs, draw)


def costs_times(inputs: Inputs, draw: Draw) -> list[Costs]:
    """Returns the costs of each GPU of a run, each times what `draw` gives for its path and spread."""
    profiles = {id(part.profile): part.profile for part in inputs.parts}  # GPUs that are alike share one
    drawn = {number: profile_times(profile, draw) for number, profile in profiles.items()}
    return [
        Costs(replace(part, profile=drawn[id(part.profile)], runtime=_drawn(_with_share(part), "runtime", draw)))
        for part in inputs.parts
    ]


def profile_times(profile: Profile, draw: Draw) -> Profile:
    """Returns a profile whose costs are each times what `draw` gives for its path ("profile.…") and spread."""
    return _drawn(profile, "profile", draw)


def unsure_costs(inputs: Inputs) -> dict[str, Fact | OwnCost]:
    """Returns the costs of a run that may be off, by path, as draws know them; of those that share one, the first."""
    found: dict[str, Fact | OwnCost] = {}
    _collect(inputs.profile, "profile", found)
    _collect(_with_share(inputs), "runtime", found)
    return found


def _collect(value: Any, path: str, found: dict[str, Fact | OwnCost]) -> None:
    if isinstance(value, tuple):
        for each in value:
            _collect(each, path, found)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            _collect(each, f"{path}.{key}", found)
    elif isinstance(value, Part):
        if isinstance(value, Fact | OwnCost) and _is_cost(value) and _sigma(value) > 0:
            found.setdefault(cost_key(value, path), value)
        for name in type(value).model_fields:
            _collect(getattr(value, name), f"{path}.{name}", found)


def structure(seed: int, count: int, sigma: float) -> list[float]:
    """Returns a factor for each draw of what no cost stands for: that a runtime works otherwise than is thought."""
    return [draw("structure", sigma) for draw in _drawings(seed, count)]


def _with_share(inputs: Inputs) -> Runtime:
    """Returns the runtime with the share of STREAM that a bandwidth alone is taken for, so that it is drawn."""
    runtime = inputs.runtime
    if runtime.costs.cpu_stream is not None or runtime.cpu_rates or inputs.scenario.miss.cpu_gb_per_s is None:
        return runtime
    share = OwnShare(share=MIDDLE, spread=SPREAD, source="assumed")
    return runtime.model_copy(update={"costs": runtime.costs.model_copy(update={"cpu_stream": share})})


def _drawings(seed: int, count: int) -> list[Draw]:
    """Returns what gives each cost its factor, for each of so many draws."""
    middles = [NormalDist().inv_cdf((place + 0.5) / count) for place in range(count)]

    @cache
    def normals(path: str) -> list[float]:
        """Returns the standard normal number of a cost in each draw."""
        order = np.argsort(uniform(seed, zlib.crc32(path.encode()), np.arange(count)), kind="stable")
        return [middles[place] for place in order]

    def drawing(number: int) -> Draw:
        return lambda path, sigma: math.exp(sigma * normals(path)[number]) if sigma else 1.0

    return [drawing(number) for number in range(count)]


def _is_cost(part: Part) -> bool:
    return isinstance(part, OwnCost) or hasattr(part, "uncertainty")


def spread_of(cost: Fact | OwnCost) -> float:
    """Returns how far a cost may be off, as the standard deviation of its logarithm."""
    return _sigma(cost)


def _sigma(cost: Any) -> float:
    if isinstance(cost, OwnCost):
        return cost.sigma
    unsure = getattr(cost, "uncertainty", None)
    if unsure is not None:
        return float(unsure.sigma)
    if not isinstance(cost, Fact):
        return 0.0
    foreign = cost.device is not None and cost.source == "measured"
    return _FOREIGN if foreign else UNSTATED[cost.source]


def _drawn(part: _AnyPart, path: str, draw: Draw) -> _AnyPart:
    """Returns a part with every cost in it times the factor drawn for its path; itself if there is none."""
    factor = draw(cost_key(part, path), _sigma(part)) if _is_cost(part) else 1.0
    changed: dict[str, Any] = {}
    for name in type(part).model_fields:
        value = getattr(part, name)
        new = value if isinstance(value, _LEAVES) else _drawn_value(value, f"{path}.{name}", draw)
        if new is value and factor != 1:
            new = _scaled(name, value, factor)
        if new is not value:
            changed[name] = new
    return part.model_copy(update=changed) if changed else part


def _drawn_value(value: Any, path: str, draw: Draw) -> Any:
    if isinstance(value, Part):
        return _drawn(value, path, draw)
    if isinstance(value, tuple) and value and isinstance(value[0], Part):
        return tuple(_drawn(each, path, draw) for each in value)
    if isinstance(value, Mapping) and any(isinstance(each, Part) for each in value.values()):
        return {key: _drawn_value(each, f"{path}.{key}", draw) for key, each in value.items()}
    return value


def _scaled(name: str, value: Any, factor: float) -> Any:
    if name == "points" and value is not None:
        return tuple((size, round(ns * factor)) for size, ns in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if name in _TIMES:
        least = 1 if name == "count" else 0.5 if name == "factor" else None
        grown = value * factor if isinstance(value, float) else round(value * factor)
        return grown if least is None else max(least, grown)
    if name in _RATES:
        shrunk = value / factor if isinstance(value, float) else max(1, round(value / factor))
        return min(1.0, shrunk) if name == "share" else shrunk
    return value
