"""A few costs of a runtime, fitted to what it took, with the shipped runtime's as priors.

The logarithm of each cost has a normal prior about the shipped number, as wide as that is taken to be off; a measured
step is off by its spread, and by a share that no model is better than. The most probable costs are found by Gauss and
Newton's method on simulations, and the uncertainties are those of the linear model at that point.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from ...engine.load import load_inputs
from ...engine.scenario.inputs import Inputs
from ...engine.scenario.scenario import Scenario
from ...engine.simulate import simulate_inputs
from ...resources.runtime import Runtime, load_runtime
from ...words import problems
from ..decode.served import replayed_ns
from .logs import Observation, ObserveError
from .served_steps import link_share

Floats = npt.NDArray[np.float64]
#: How far a simulation with the right costs is off, as a share of the time.
MODEL_ERROR = 0.03
#: Host time of a layer visit that also guesses what the next layers need, and orders it; a layer cost of such runs.
GUESS = "guess"
#: Its prior, in ns, and how far that may be off: the routers ahead, top-k and the memory manager, in Python.
_GUESS_PRIOR = (300_000, 0.7)
#: What all threads compute of experts on the CPU, whatever their type, as a factor of the runtime's `cpu_cores`.
CORES = "cpu_cores"
_FIELDS = ("ns", "factor", "share", "bytes_per_second", "count", "of_float32")
_NUDGE = 0.1
_ROUNDS = 5
#: Costs whose effects are parallel to this cosine cannot be told apart.
_PARALLEL = 0.995


@dataclass(frozen=True)
class Fitted:
    """A fit: each cost's prior, value and relative uncertainty before and after; and, per observation, ns a step.

    `left_out` are the predictions of each observation by the costs that the others alone would give, to first order.
    `sums`: pairs of costs that the observations cannot tell apart.
    """

    priors: Mapping[str, float]
    values: Mapping[str, float]
    before: Mapping[str, float]
    after: Mapping[str, float]
    predicted: Sequence[float]
    left_out: Sequence[float]
    sums: Sequence[tuple[str, str]]
    helps: str


class Predictor:
    """Simulates observations with other costs of their runtime; each scenario is loaded once.

    Where copies were measured beside steps that were served, the runtime has what of the link's rate they reached.
    """

    def __init__(self, observations: Sequence[Observation], runtime: str, engine: str | None = None) -> None:
        self.runtime = load_runtime(runtime)
        self._engine = engine
        loaded: dict[int, Inputs] = {}  # steps that were served have one scenario for all of a file
        for each in observations:
            if id(each.settings) not in loaded:
                loaded[id(each.settings)] = _inputs(each, runtime)
        self._inputs = [loaded[id(each.settings)] for each in observations]
        self._steps = [each.steps for each in observations]
        self._replays: dict[tuple[int, str], list[int]] = {}
        served = {
            id(steps.repeat): (steps.repeat, own)
            for steps, own in zip(self._steps, self._inputs, strict=True)
            if steps is not None
        }
        self.copy_rate = link_share(served.values())
        if self.copy_rate is not None:
            costs = self.runtime.costs.model_copy(update={"copy_rate": self.copy_rate})
            self.runtime = self.runtime.model_copy(update={"costs": costs})
        self._known: dict[tuple[int, str], float] = {}

    def ns(self, number: int, values: Mapping[str, float]) -> float:
        """Returns what a decode step of an observation takes, in ns, with these costs in place of the runtime's."""
        key = (number, json.dumps(sorted(values.items())))
        if key not in self._known:
            inputs, steps = self._inputs[number], self._steps[number]
            guesses = inputs.scenario.prefetch.policy != "none"
            changed = replace(inputs, runtime=with_costs(self.runtime, values, guesses))
            if steps is not None:
                replay = (id(steps.repeat), key[1])
                if replay not in self._replays:
                    self._replays[replay] = replayed_ns(steps.repeat, changed)
                self._known[key] = steps.median_of(self._replays[replay])
            else:
                result = simulate_inputs(changed, baselines=False, engine=self._engine)
                self._known[key] = float(result.data["decode_step_ms"]["mean"]) * 1e6
        return self._known[key]

    def busiest_ns(self, number: int) -> float:
        """Returns what the busiest of the GPU, the link and the CPU takes a step, with the costs as shipped."""
        result = simulate_inputs(self._inputs[number], baselines=False, engine=self._engine)
        step = float(result.data["decode_step_ms"]["mean"]) * 1e6
        (gpu,) = result.data["gpus"]
        whole = float(result.data["makespan_ms"])
        on_cpu = (result.data.get("miss") or {}).get("cpu") or {"busy_ms": 0.0}
        lanes = (gpu["time"]["compute_ms"], (gpu["link_utilization"] or 0.0) * whole, on_cpu["busy_ms"])
        return step * float(max(lanes)) / whole


def _inputs(observation: Observation, runtime: str) -> Inputs:
    settings = {**observation.settings, "runtime": {"name": runtime}}
    try:
        scenario = Scenario.model_validate(settings)
    except ValidationError as error:
        raise ObserveError(f"{observation.name}: {problems(error, Scenario, settings)}") from error
    return load_inputs(scenario)


def _number(runtime: Runtime, name: str) -> tuple[str, float, float]:
    """Returns the key, number and spread of a runtime's cost."""
    if name == GUESS:
        return "ns", *_GUESS_PRIOR
    if name == CORES and runtime.cpu_cores:
        return "factor", 1.0, max(core.sigma for core in runtime.cpu_cores)
    cost = runtime.costs.given().get(name)
    if cost is None:
        known = [*runtime.costs.given(), *([CORES] if runtime.cpu_cores else []), GUESS]
        raise ObserveError(f"--fit {name}: {runtime.name} has no such cost (choose of {', '.join(known)})")
    key = next(key for key in _FIELDS if hasattr(cost, key))
    return key, float(getattr(cost, key)), cost.sigma


def with_costs(runtime: Runtime, values: Mapping[str, float], guesses: bool = False) -> Runtime:
    """Returns the runtime with other numbers; where layers guess ahead, with that added to each layer's."""
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if name not in (GUESS, CORES):
            key, _, _ = _number(runtime, name)
            exact = value if key in ("factor", "of_float32") else min(value, 1.0) if key == "share" else round(value)
            changed[name] = getattr(runtime.costs, name).model_copy(update={key: exact})
    if guesses and GUESS in values:
        layer = changed.get("layer", runtime.costs.layer)
        if layer is None:
            raise ObserveError(f"--fit {GUESS}: {runtime.name} has no cost `layer` that it could be added to")
        changed["layer"] = layer.model_copy(update={"ns": layer.ns + round(values[GUESS])})
    cores = tuple(
        core.model_copy(update={"bytes_per_second": max(1, round(core.bytes_per_second * values.get(CORES, 1.0)))})
        for core in runtime.cpu_cores
    )
    return runtime.model_copy(update={"costs": runtime.costs.model_copy(update=changed), "cpu_cores": cores})


def fit(predictor: Predictor, observations: Sequence[Observation], names: Sequence[str],
        numbers: Sequence[int] | None = None) -> Fitted:  # fmt: skip
    """Fit the costs `names` to some observations (all, or those of the numbers given).

    Raises ObserveError if there are fewer observations than one.
    """
    chosen = list(range(len(observations))) if numbers is None else list(numbers)
    if not chosen or not names:
        raise ObserveError("nothing to fit: give observations, and --fit the costs")
    told = [_number(predictor.runtime, name) for name in names]
    prior, sigma = np.array([value for _, value, _ in told]), np.array([off for _, _, off in told])
    measured = np.array([observations[number].ns for number in chosen])
    noise = np.array([np.hypot(MODEL_ERROR, observations[number].spread or 0.0) for number in chosen])

    def predicted(x: Floats) -> Floats:
        values = dict(zip(names, (prior * np.exp(x)).tolist(), strict=True))
        return np.array([predictor.ns(number, values) for number in chosen])

    x = np.zeros(len(names))
    for _ in range(_ROUNDS):
        now, slope = _slope(predicted, x, measured)
        weighed = slope / noise[:, None]
        informed = weighed.T @ weighed + np.diag(sigma**-2.0)
        step = np.linalg.solve(informed, weighed.T @ ((1 - now / measured) / noise) - x / sigma**2)
        x = x + np.clip(step, -1.0, 1.0)
        if np.abs(step).max() < 0.02:
            break
    now, slope = _slope(predicted, x, measured)
    weighed = slope / noise[:, None]
    covariance = np.linalg.inv(weighed.T @ weighed + np.diag(sigma**-2.0))
    after = np.sqrt(np.diag(covariance))
    leverage = np.einsum("ij,jk,ik->i", weighed, covariance, weighed)
    left_out = measured * (1 - (1 - now / measured) / np.maximum(1 - leverage, 0.05))
    return Fitted(
        dict(zip(names, prior.tolist(), strict=True)),
        dict(zip(names, (prior * np.exp(x)).tolist(), strict=True)),
        dict(zip(names, sigma.tolist(), strict=True)),
        dict(zip(names, after.tolist(), strict=True)),
        now.tolist(),
        left_out.tolist(),
        _sums(names, weighed),
        _helps(names, after / sigma, weighed, [observations[number].name for number in chosen]),
    )


def _slope(predicted: Callable[[Floats], Floats], x: Floats, measured: Floats) -> tuple[Floats, Floats]:
    """Returns the predictions at x, and how much of the measured time each unit of x adds (observations, costs)."""
    now = predicted(x)
    columns = [(predicted(x + _NUDGE * unit) - now) / _NUDGE / measured for unit in np.eye(len(x))]
    return now, np.stack(columns, axis=1)


def _sums(names: Sequence[str], weighed: Floats) -> list[tuple[str, str]]:
    """Returns the pairs of costs whose effects on all observations are parallel."""
    sizes = np.linalg.norm(weighed, axis=0)
    cosines = weighed.T @ weighed / np.maximum(np.outer(sizes, sizes), 1e-12)
    pairs = zip(*np.triu(cosines > _PARALLEL, 1).nonzero(), strict=True)
    return [(names[one], names[other]) for one, other in pairs]


def _helps(names: Sequence[str], kept: Floats, weighed: Floats, settings: Sequence[str]) -> str:
    """Returns in words which cost the observations say least of, and which setting says most of it."""
    least = int(np.argmax(kept))
    share = np.abs(weighed[:, least]) / np.maximum(np.linalg.norm(weighed, axis=1), 1e-12)
    if not weighed[:, least].any():
        return f"`{names[least]}` has no part in any of these settings: measure one that it has a part in"
    most = settings[int(np.argmax(share))]
    return f"`{names[least]}` is known least ({kept[least]:.0%} of its prior's width is left): repeat, and vary, {most}"


def errors(observations: Sequence[Observation], predicted: Sequence[float]) -> list[float]:
    """Returns predicted over measured time, less one."""
    return [ns / each.ns - 1 for each, ns in zip(observations, predicted, strict=True)]


def median_worst(values: Sequence[float]) -> tuple[float, float]:
    """Returns the median and the largest of the errors' sizes."""
    sizes = [abs(value) for value in values]
    return median(sizes), max(sizes)


def runtime_file(fitted: Fitted, predictor: Predictor, base: str, told: tuple[str, str], guesses: bool = False) -> str:
    """Returns a runtime file, as TOML: the base runtime with the fitted costs; `told`: its name, and about it."""
    name, about = told
    lines = [f"extends = {json.dumps(base)}", f"name = {json.dumps(name)}", f"about = {json.dumps(about)}"]
    runtime = with_costs(predictor.runtime, fitted.values, guesses)
    for cost in fitted.values:
        if cost not in (GUESS, CORES):
            key, _, _ = _number(runtime, cost)
            lines += [
                "",
                f"[costs.{cost}]",
                f"{key} = {getattr(getattr(runtime.costs, cost), key)}",
                'source = "fitted"',
            ]
            lines += [f"spread = {fitted.after[cost]:.3g}"]
    if predictor.copy_rate is not None:
        rate = predictor.copy_rate
        lines += [
            "",
            "[costs.copy_rate]",
            f"share = {rate.share}",
            f'source = "{rate.source}"',
            f'note = "{rate.note}"',
        ]
    for core in runtime.cpu_cores if CORES in fitted.values else ():
        lines += ["", "[[cpu_cores]]", f'dtype = "{core.dtype}"', f"tokens = {core.tokens}"]
        lines += [] if core.threads is None else [f"threads = {core.threads}"]
        lines += [f"bytes_per_second = {core.bytes_per_second}", 'source = "fitted"']
        lines += [f"spread = {fitted.after[CORES]:.3g}"]
    return "\n".join(lines) + "\n"
