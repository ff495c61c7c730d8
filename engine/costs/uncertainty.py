"""Replicates: the same run many times, each with costs drawn from the uncertainty that the profile states.

A replicate draws one factor for every cost, from its spread between runs and its error on held-back samples, and a
small one for every kernel, launch and copy, from its scatter within a run. Decisions do not change: they never look at
the clock. Draws are keyed by (seed, replicate, cost), so the same scenario draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from ...resources.profile import Profile
from ...workloads.keyed_random import uniform
from ..scenario.inputs import Inputs
from ..scenario.scenario import Scenario
from .costs import Costs
from .scatter import Scatter, box_muller, crc

#: What of a cost grows with its factor, and what shrinks.
TIMES = (
    *("ns", "beside_copy_ns", "alone_ns", "latency_ns"),
    *("constant_ns", "product_ns", "small_kernel_ns", "eager_kernel_ns"),
)
RATES = ("bytes_per_second", "flops_per_second")
#: What tells the costs of a list apart; points over tokens share the factor of their shape.
_SHAPE = ("hidden", "expert_ff", "weight_bytes", "dtype", "kernels", "context", "dispatch")
#: Of a run's result, what is summarized.
SUMMARIZED = ("makespan_ms", "tokens_per_second")
PERCENTILES = (5, 50, 95)


def replicate_costs(inputs: Inputs, count: int, *, timed: bool = False) -> Iterator[Costs]:
    """Yields the costs of each replicate of a run on one GPU; `timed` as `Costs` takes it."""
    scenario, hidden = inputs.scenario, inputs.model.hidden
    profile = _of_width(inputs.profile, hidden, "eager" if scenario.dispatch.mode == "eager" else "graph")
    unsure = dict(_unsure(profile, "profile"))
    ways = _ways_to(unsure)
    drawn = _normals(scenario.seed, count, [crc(path) for path in unsure])
    for number in range(count):
        factors = {
            path: math.exp(sigma * float(z)) for (path, sigma), z in zip(unsure.items(), drawn[number], strict=True)
        }
        scatter = _scatter_of(inputs.profile, scenario, hidden, number)
        yield Costs(replace(inputs, profile=_drawn(profile, "profile", factors, ways)), timed=timed, scatter=scatter)


def linked(inputs: Inputs, costs: Sequence[Costs], *, timed: bool) -> Inputs:
    """Returns the inputs of a replicate: what copies and exchanges between its GPUs take is drawn, too."""
    if inputs.links is None:
        return inputs
    drawn = costs[0].profile
    profile = inputs.profile.model_copy(update={"exchange": drawn.exchange})
    return replace(inputs, profile=profile, links=inputs.links.with_profile(drawn, timed=timed))


def _of_width(profile: Profile, hidden: int, dispatch: str) -> Profile:
    """Returns a profile with the measured points alone that a model of this width may be priced by."""
    compute = profile.compute
    ours = {
        name: tuple(point for point in getattr(compute, name) if (point.hidden, point.dispatch) == (hidden, dispatch))
        for name in ("experts", "dense", "heads")
    }
    return profile.model_copy(update={"compute": compute.model_copy(update=ours)})


def _normals(seed: int, count: int, numbers: Sequence[int]) -> npt.NDArray[np.float64]:
    """Returns the standard normal number of each replicate and cost, (count, costs)."""
    replicate = np.arange(count)[:, None]
    radius, angle = (uniform(seed, replicate, np.array(numbers, dtype=np.int64), half, 0) for half in (0, 1))
    return box_muller(radius, angle)


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the percentiles of each number in SUMMARIZED over the replicates' results; None where it is undefined."""
    percentiles: dict[str, Any] = {"count": len(results)}
    for name in SUMMARIZED:
        values = [result[name] for result in results if result[name] is not None]
        found = np.percentile(values, PERCENTILES).tolist() if values else [None] * len(PERCENTILES)
        percentiles[name] = {f"p{percent}": value for percent, value in zip(PERCENTILES, found, strict=True)}
    return percentiles


def without_uncertainty(profile: Profile) -> list[str]:
    """Returns which of the costs that every run uses say nothing of how far they can be off."""
    host, compute = profile.host, profile.compute
    costs: dict[str, Sequence[Any]] = {
        "host.launch": [host.launch],
        "host.graph_launch": [host.graph_launch],
        "h2d": [copies.queued for copies in profile.h2d.values()],
        "compute": [*compute.experts, *compute.dense, *compute.heads, compute.rule],
    }
    return [name for name, known in costs.items() if not any(cost.uncertainty for cost in known)]


def _unsure(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """Yields the path of every cost in a part of a profile that says how far it can be off, and how far."""
    if isinstance(value, tuple):
        for item in value if value and isinstance(value[0], BaseModel) else ():
            yield from _unsure(item, path)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _unsure(item, f"{path}.{name}")
    elif isinstance(value, BaseModel):
        unsure = getattr(value, "uncertainty", None)
        if unsure is not None:
            yield cost_key(value, path), unsure.sigma
        else:
            for name in type(value).model_fields:
                yield from _unsure(getattr(value, name), f"{path}.{name}")


def cost_key(cost: BaseModel, path: str) -> str:
    """Returns what costs of a path share a factor by."""
    known = type(cost).model_fields
    return f"{path}/" + "/".join(str(getattr(cost, name)) for name in _SHAPE if name in known)


def _ways_to(unsure: Iterable[str]) -> frozenset[str]:
    """Returns the paths of all parts of a profile in which there are costs of these keys."""
    paths = {key.partition("/")[0] for key in unsure}
    return frozenset(
        path[:end] for path in paths for end in range(1, len(path) + 1) if path[end : end + 1] in ("", ".")
    )


def _drawn(value: Any, path: str, factors: Mapping[str, float], ways: Container[str]) -> Any:
    """Returns a part of a profile with every cost in it multiplied by its factor; `ways` as of `_ways_to`.

    What holds no such cost is the same object, with all that was worked out of it.
    """
    if path not in ways:
        return value
    if isinstance(value, tuple):
        return tuple(_drawn(item, path, factors, ways) for item in value)
    if isinstance(value, dict):
        return {name: _drawn(item, f"{path}.{name}", factors, ways) for name, item in value.items()}
    held = {name: getattr(value, name) for name in type(value).model_fields}
    if held.get("uncertainty") is None:
        changed = {name: _drawn(item, f"{path}.{name}", factors, ways) for name, item in held.items()}
    else:
        factor = factors[cost_key(value, path)]
        changed = {name: _times(name, item, factor) for name, item in held.items()}
    changed = {name: item for name, item in changed.items() if item is not held[name]}
    return value.model_copy(update=changed) if changed else value


def _times(name: str, item: Any, factor: float) -> Any:
    if item is None:
        return None
    if name in TIMES:
        return round(item * factor)
    if name in RATES:
        return max(1, round(item / factor))
    if name == "points":
        return tuple((size, round(ns * factor)) for size, ns in item)
    if name == "factor":  # what the neighbor adds is what is unsure
        return min(20.0, max(0.5, item * factor))
    return item


def _scatter_of(profile: Profile, scenario: Scenario, hidden: int, replicate: int) -> Scatter:
    """Returns how far single kernels, launches and copies of a profile scatter in a replicate."""
    compute, host = profile.compute, profile.host
    launch = host.launch if scenario.dispatch.mode == "eager" else host.graph_launch
    queued = (profile.h2d.get("pinned") or next(iter(profile.h2d.values()))).queued
    parts = {"expert": compute.experts, "dense": compute.dense, "head": compute.heads}
    return Scatter(
        scenario.seed,
        replicate,
        {name: _scatter(points, hidden) for name, points in parts.items()}
        | {
            name: cost.uncertainty.scatter if cost.uncertainty else 0.0
            for name, cost in (("host", launch), ("copy", queued))
        },
    )


def _scatter(points: Sequence[Any], hidden: int) -> float:
    """Returns the scatter of kernels of this width, of any where there are none, of nothing as 0."""
    known = [point for point in points if point.uncertainty]
    ours = [point for point in known if point.hidden == hidden] or known
    return float(np.median([point.uncertainty.scatter for point in ours])) if ours else 0.0
