"""What advice searches: the settings that a runtime really has, on one model and machine, for one length of request.

A space is a grid (`grid.Grid`) with the keys whose values have an order. Its base is the scenario with what the
runtime's file says that advice begins with, and a workload of one prompt and some tokens of its answer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.load import load_inputs
from ..engine.scenario.amounts import ScenarioError
from ..engine.scenario.scenario import (
    Scenario,
    apply_setting,
    lay,
    make_scenario,
    parse_value,
    scenario_data,
)
from ..errors import InputError
from ..resources.profile import load_profile
from ..resources.runtime import DEFAULT, Runtime, load_runtime
from ..workloads.model import Model, load_model
from .grid import MOST_ROWS, MOST_VALUES, Grid, GridError, Point, values_by_key

#: So many tokens of an answer are simulated at most.
MOST_SIMULATED = 32
#: A request's lengths where nobody says them.
PROMPT_TOKENS, OUTPUT_TOKENS = 512, 256


@dataclass(frozen=True)
class Request:
    """One request: tokens of its prompt, and of its answer, of which `most` are run; the others come at their pace."""

    prompt: int = PROMPT_TOKENS
    output: int = OUTPUT_TOKENS
    most: int = MOST_SIMULATED

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.output < 1:
            raise ScenarioError(f"prompt = {self.prompt}, output = {self.output}: must be at least 1 token each")

    @property
    def simulated(self) -> int:
        """How many tokens of the answer are run."""
        return min(self.output, self.most)


@dataclass(frozen=True)
class Space:
    """A grid whose base is the setting to be bettered; `ordered` keys have neighbors among their values.

    `request` is None where the scenario has a trace or requests under load, and goes by these.
    """

    grid: Grid
    ordered: frozenset[str]
    runtime: Runtime
    model: Model
    request: Request | None

    @property
    def keys(self) -> list[str]:
        """The keys that are searched."""
        return list(self.grid.values)

    def __len__(self) -> int:
        return self.grid.combinations

    def point(self, places: Mapping[str, int]) -> Point:
        """Returns the values at these places of each key's."""
        return {key: self.grid.values[key][place] for key, place in places.items()}

    def scenario(self, point: Point) -> Scenario:
        """Returns the scenario of some settings; ScenarioError if they do not go together."""
        return make_scenario(self.data(point))

    def data(self, point: Point) -> dict[str, Any]:
        """Returns the plain data of some settings' scenario, not checked."""
        data = self.grid.data(point)
        for key, value in point.items():
            tunable = self.runtime.advice.settings.get(key)
            if tunable is not None:
                for other, text in tunable.goes_with(
                    value, layers=self.model.layers, experts=self.model.experts
                ).items():
                    lay(data, other, text)
        return data

    def base_values(self) -> Point:
        """Returns the values of its keys in the scenario as it stands; None of those that are not set."""
        base = self.base().plain()
        return {key: _value(base, key) for key in self.keys}

    def base_places(self) -> tuple[int, ...]:
        """Returns where the scenario as it stands lies; in the middle of a key whose values lack its own.

        Threads that are not set are all there are.
        """
        places = []
        for key, own in self.base_values().items():
            values = self.grid.values[key]
            of_threads = own is None and key == "miss.cpu_threads"
            places.append(values.index(own) if own in values else len(values) - 1 if of_threads else len(values) // 2)
        return tuple(places)

    def base(self) -> Scenario:
        """Returns the scenario as it is without advice."""
        return make_scenario(self.grid.base)


def _value(data: Mapping[str, Any], key: str) -> Any:
    """Returns the value of `section.key`; None where it is not set."""
    value: Any = data
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def make_space(
    scenario: str | Path | None,
    settings: Iterable[str] = (),
    *,
    over: Mapping[str, list[Any]] | None = None,
    request: Request | None = None,
    total_bytes: str | None = None,
) -> Space:
    """Returns what advice on a scenario searches: `over`, values by key, or what its runtime's file says.

    `settings` go before what the runtime begins with. `request` is not given where the workload is a trace or
    [requests]. `total_bytes` is how much of the GPU's memory may be used. Raises ScenarioError.
    """
    given = list(settings)
    data, source = scenario_data(scenario)
    runtime = _runtime(data, given)
    for setting in sorted(given, key=lambda each: not each.strip().startswith("runtime.name")):
        apply_setting(data, setting)
    said = {setting.partition("=")[0].strip() for setting in given}
    for key, value in runtime.advice.start.items():
        if key not in said:
            lay(data, key, value)
    if total_bytes is not None:
        lay(data, "memory.total_bytes", total_bytes)
        if "memory.gpu_budget" not in said:
            lay(data, "memory.gpu_budget", "100%")
    first = make_scenario(data, source)
    request = _request(first, request)
    if request is not None:
        _lay_request(data, request)
        first = make_scenario(data, source)
    model = load_model(first.model.preset, **first.model.overrides())
    values, ordered = _values(runtime, first, model, over)
    # A search runs few of them, however many there are.
    space = Space(Grid({**data, "seed": first.seed}, values, sample=MOST_ROWS), ordered, runtime, model, request)
    return _fitted(space, said)


def _fitted(space: Space, said: Collection[str]) -> Space:
    """Returns a space whose base leaves as few layers to the CPU as fit, where nobody says how many: `--fit`."""
    for key, tunable in space.runtime.advice.settings.items():
        if tunable.values == "layers" and key not in said and space.base().memory.cpu_layers is None:
            low, high = 0, space.model.layers
            while low < high:  # what fits with some layers on the CPU, fits with more
                middle = (low + high) // 2
                low, high = (low, middle) if _fits(space, {key: middle}) else (middle + 1, high)
            return replace(space, grid=replace(space.grid, base=space.data({key: high})))
    return space


def _fits(space: Space, point: Point) -> bool:
    try:
        load_inputs(space.scenario(point))
    except InputError:
        return False
    return True


def _runtime(data: Mapping[str, Any], settings: Iterable[str]) -> Runtime:
    """Returns the runtime that a scenario's data names, or a setting does."""
    named = data.get("runtime")
    name = named.get("name", DEFAULT) if isinstance(named, Mapping) else DEFAULT
    for setting in settings:
        key, _, value = setting.partition("=")
        if key.strip() == "runtime.name":
            name = parse_value(value)
    return load_runtime(str(name))


def _request(scenario: Scenario, given: Request | None) -> Request | None:
    """Returns the lengths that advice is for; None where the scenario's own workload says them."""
    own = scenario.requests is not None or scenario.workload.trace is not None
    if own and given is not None:
        what = "requests" if scenario.requests is not None else "workload.trace"
        raise ScenarioError(f"prompt and output: {what} says how long requests are: leave one of the two out")
    return None if own else given or Request()


def _lay_request(data: dict[str, Any], request: Request) -> None:
    """Make a scenario's workload one request; what of its KV cache is not simulated is kept free."""
    lay(data, "workload.synthetic.prefill_tokens", request.prompt)
    lay(data, "workload.synthetic.tokens", request.prompt + request.simulated)
    lay(data, "workload.synthetic.sequences", 1)
    lay(data, "workload.tokens", None)
    lay(data, "workload.batch", 1)
    scenario = make_scenario(data)
    model = load_model(scenario.model.preset, **scenario.model.overrides())
    synthetic = scenario.workload.synthetic
    if synthetic is not None and (synthetic.working_set or 0) > model.experts:  # a default of another model's
        lay(data, "workload.synthetic.working_set", None)
    run, whole = model.cached_bytes(request.prompt + np.array([request.simulated, request.output])).tolist()
    if whole > run and scenario.memory.workspace_bytes == "0B":
        lay(data, "memory.workspace_bytes", f"{whole - run}B")


def _values(
    runtime: Runtime, scenario: Scenario, model: Model, over: Mapping[str, list[Any]] | None
) -> tuple[dict[str, list[Any]], frozenset[str]]:
    """Returns the values by key, and the keys whose values are in an order."""
    if over is not None:
        numbers = {key for key, values in over.items() if all(type(value) in (int, float) for value in values)}
        known = {key for key in over if key in runtime.advice.settings and runtime.advice.settings[key].ordered}
        return {key: list(values) for key, values in over.items()}, frozenset(numbers | known)
    processor = load_profile(scenario.machine.profile).processor
    cores, plain = None if processor is None else processor.cores, scenario.plain()
    values = {
        key: tunable.choices(layers=model.layers, cores=cores, top_k=min(model.top_k, model.experts // 2))
        for key, tunable in runtime.advice.settings.items()
        if not any(_value(plain, other) == value for other, value in tunable.unless.items())
    }
    values = {key: listed for key, listed in values.items() if len(listed) > 1}
    if not values:
        raise ScenarioError(
            f"runtime.name = {runtime.name!r}: its file says nothing of what can be set ([advice.settings]): give "
            "--over KEY=VALUE,VALUE,…, or choose another runtime"
        )
    return values, frozenset(key for key in values if runtime.advice.settings[key].ordered)


def parse_over(options: Iterable[str]) -> dict[str, list[Any]]:
    """Returns the values by key of `key=first..last`, `key=first..last:step` and `key=value,value,…` options.

    Raises GridError.
    """
    return values_by_key("--over", "section.key=first..last, or section.key=value,value,…", options, _range_or_list)


def _range_or_list(option: str, text: str) -> list[Any]:
    return _range(option, text) if ".." in text else [parse_value(part) for part in text.split(",") if part]


def _range(option: str, text: str) -> list[Any]:
    """Returns the whole numbers from first to last, and a unit behind both ("5%..95%:5")."""
    ends, _, step = text.partition(":")
    first, _, last = ends.partition("..")
    unit = last.lstrip("0123456789 ")
    try:
        low, high = int(first.removesuffix(unit) if unit else first), int(last.removesuffix(unit) if unit else last)
        by = int(step) if step else 1
    except ValueError:
        low, high, by = 1, 0, 1
    if by < 1 or high <= low:
        raise GridError(f"--over {option!r}: write a range as first..last or first..last:step, of whole numbers")
    if (high - low) // by >= MOST_VALUES:
        raise GridError(f"--over {option!r}: has {(high - low) // by + 1:,} values: must be at most {MOST_VALUES:,}")
    return [f"{number}{unit}" if unit else number for number in range(low, high + 1, by)]
