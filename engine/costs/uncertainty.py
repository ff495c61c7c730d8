"""Replicates: the same run again and again, each with costs drawn from how far the profile says they can be off.

A replicate draws one factor for every cost, from its spread between runs and its error on held-back samples, and a
small one for every kernel, launch and copy, from its scatter within a run. Decisions do not change: they never look at
the clock. Draws are keyed by (seed, replicate, cost), so the same scenario draws the same.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from ...resources.profile import Profile, make_profile
from ...workloads.batches import DECODE
from ...workloads.keyed_random import uniform
from ..scenario.inputs import Inputs
from .costs import ByTokens, CopyCost, Costs, KernelCost

#: What of a cost grows with its factor, and what shrinks.
_TIMES = (
    *("ns", "beside_copy_ns", "alone_ns", "latency_ns"),
    *("constant_ns", "product_ns", "small_kernel_ns", "eager_kernel_ns"),
)
_RATES = ("bytes_per_second", "flops_per_second")
#: What tells the costs of a list apart; points over tokens share the factor of their shape.
_SHAPE = ("hidden", "expert_ff", "weight_bytes", "dtype", "kernels", "context", "dispatch")
#: Of a run's result, what is summarized.
SUMMARIZED = ("makespan_ms", "tokens_per_second")
PERCENTILES = (5, 50, 95)

_BLOCK = 4096


def replicate_costs(inputs: Inputs, count: int, *, timed: bool = False) -> Iterator[Costs]:
    """Yields the costs of each replicate of a run on one GPU; `timed` as `Costs` takes it."""
    plain, seed, name = inputs.profile.model_dump(), inputs.scenario.seed, inputs.profile.name
    for number in range(count):
        drawn = make_profile(_drawn(plain, "profile", (seed, number)), f"replicate {number} of {name}")
        yield _ScatteredCosts(replace(inputs, profile=drawn), number, timed)


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


def _drawn(value: Any, path: str, keys: tuple[int, int]) -> Any:
    """Returns plain data with every cost in it multiplied by the factor drawn for its path."""
    if isinstance(value, list | tuple):
        return [_drawn(item, path, keys) for item in value]
    if not isinstance(value, dict):
        return value
    unsure = value.get("uncertainty")
    if unsure is None:
        return {name: _drawn(item, f"{path}.{name}", keys) for name, item in value.items()}
    shape = "/".join(str(value[name]) for name in _SHAPE if name in value)
    sigma = math.hypot(unsure["run_spread"], unsure["held_back_error"])
    factor = math.exp(sigma * float(_normal(*keys, _number(f"{path}/{shape}"), 0)[0]))
    return {name: _times(name, item, factor) for name, item in value.items()}


def _times(name: str, item: Any, factor: float) -> Any:
    if item is None:
        return None
    if name in _TIMES:
        return round(item * factor)
    if name in _RATES:
        return max(1, round(item / factor))
    if name == "points":
        return [(size, round(ns * factor)) for size, ns in item]
    if name == "factor":  # what the neighbor adds is what is unsure
        return min(20.0, max(0.5, item * factor))
    return item


def _normal(seed: int, replicate: int, what: int, first: int, count: int = 1) -> npt.NDArray[np.float64]:
    """Returns standard normal numbers `first` to `first + count`, by Box and Muller (1958) from keyed uniform ones."""
    index = np.arange(first, first + count)
    radius, angle = (uniform(seed, replicate, what, half, index) for half in (0, 1))
    drawn: npt.NDArray[np.float64] = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)
    return drawn


def _number(name: str) -> int:
    """Returns a number for a name, the same everywhere."""
    return zlib.crc32(name.encode())


class _Anew(ByTokens):
    """What something costs over so many tokens, drawn anew each time."""

    def __getitem__(self, tokens: int) -> KernelCost:
        return self._cost(tokens)


class _ScatteredCosts(Costs):
    """Costs of which every kernel, launch and copy is drawn anew when it is asked for."""

    drawn_anew = True

    def __init__(self, inputs: Inputs, replicate: int, timed: bool) -> None:
        super().__init__(inputs, timed=timed)
        model, profile, scenario = inputs.model, inputs.profile, inputs.scenario

        def factors(what: str, scatter: float) -> Callable[[], float]:
            return _factors((scenario.seed, replicate, _number(what)), scatter)

        compute, host = profile.compute, profile.host
        launch = host.launch if scenario.dispatch.mode == "eager" else host.graph_launch
        self._host_factor = factors("host", launch.uncertainty.scatter if launch.uncertainty else 0.0)
        self._kernel_factor = {
            part: factors(part, _scatter(points, model.hidden))
            for part, points in (("expert", compute.experts), ("dense", compute.dense), ("head", compute.heads))
        }
        queued = (profile.h2d.get("pinned") or next(iter(profile.h2d.values()))).queued
        copy_factor = factors("copy", queued.uncertainty.scatter if queued.uncertainty else 0.0)
        self.copies = _ScatteredCopies(self.copies, copy_factor)

    def by_layer(self, phase: int = DECODE) -> tuple[list[ByTokens], list[ByTokens]]:
        """Returns what gives every kernel a cost of its own."""
        layers = range(self.model.layers)
        dense: list[ByTokens] = [_Anew(partial(self.dense, layer, phase=phase)) for layer in layers]
        return dense, [_Anew(partial(self.expert, layer, phase=phase)) for layer in layers]

    def dense(self, layer: int, tokens: int, phase: int = DECODE) -> KernelCost:
        """Returns the dense part of one layer, drawn."""
        return self._scattered("dense", super().dense(layer, tokens, phase))

    def head(self, tokens: int) -> KernelCost:
        """Returns the head, drawn."""
        return self._scattered("head", super().head(tokens))

    def expert(self, layer: int, tokens: int, phase: int = DECODE) -> KernelCost:
        """Returns one expert's kernels, drawn."""
        return self._scattered("expert", super().expert(layer, tokens, phase))

    def _scattered(self, part: str, cost: KernelCost) -> KernelCost:
        ns, host_ns = cost.ns * self._kernel_factor[part](), cost.host_ns * self._host_factor()
        return replace(cost, ns=round(ns), host_ns=round(host_ns))


class _ScatteredCopies(Sequence[CopyCost]):
    """The costs of copies by layer, each drawn anew when it is asked for."""

    def __init__(self, copies: Sequence[CopyCost], factor: Callable[[], float]) -> None:
        self._copies, self._factor = copies, factor

    def __len__(self) -> int:
        return len(self._copies)

    @overload
    def __getitem__(self, layer: int) -> CopyCost: ...
    @overload
    def __getitem__(self, layer: slice) -> Sequence[CopyCost]: ...
    def __getitem__(self, layer: int | slice) -> CopyCost | Sequence[CopyCost]:
        """Returns the cost of the next copy of an expert of this layer."""
        if isinstance(layer, slice):
            return self._copies[layer]
        cost, factor = self._copies[layer], self._factor()
        return replace(
            cost,
            queued_ns=round(cost.queued_ns * factor),
            alone_ns=round(cost.alone_ns * factor),
            piece_queued_ns=round(cost.piece_queued_ns * factor),
            piece_alone_ns=round(cost.piece_alone_ns * factor),
        )


def _scatter(points: Sequence[Any], hidden: int) -> float:
    """Returns the scatter of kernels of this width, of any where there are none, of nothing as 0."""
    known = [point for point in points if point.uncertainty]
    ours = [point for point in known if point.hidden == hidden] or known
    return float(np.median([point.uncertainty.scatter for point in ours])) if ours else 0.0


def _factors(keys: tuple[int, int, int], scatter: float) -> Callable[[], float]:
    """Returns what gives the factor of one event after the other."""

    def draw() -> Iterator[float]:
        first = 1
        while True:
            yield from np.maximum(0.1, 1 + scatter * _normal(*keys, first, _BLOCK)).tolist()
            first += _BLOCK

    return draw().__next__
