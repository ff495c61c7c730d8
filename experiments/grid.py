"""Grids: the scenarios of a sweep, as values by key over one scenario, checked before anything runs.

A value that the scenario takes neither alone nor beside any one other value of the grid is refused. A combination
that does not fit together is left to the sweep, which makes it a row with its error.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..bounded import parse_toml
from ..engine.scenario.amounts import ScenarioError
from ..engine.scenario.scenario import (
    Scenario,
    apply_setting,
    lay,
    load_scenario,
    make_scenario,
    parse_value,
    scenario_names,
)
from ..words import shown, unknown_name

#: What a grid may have of values, and a sweep of rows: enough for any study, and not a key pressed too long.
MOST_VALUES, MOST_ROWS = 10_000, 1_000_000
#: One combination: the value of each of the grid's keys.
Point = dict[str, Any]


class GridError(ScenarioError):
    """A grid that names no sweep; the message says which key or value, and what would be right."""


@dataclass(frozen=True)
class Grid:
    """All combinations of `values` (by key, in order, the last key fastest) over `base`, a scenario's plain data.

    With `sample`, that many of them, drawn without repetition by the scenario's seed, in the same order.
    """

    base: Mapping[str, Any]
    values: Mapping[str, Sequence[Any]]
    sample: int | None = None

    def __post_init__(self) -> None:
        if not self.values:
            raise GridError("the grid is empty: give at least one key=value,value,…")
        for key, values in self.values.items():
            if not values:
                raise GridError(f"grid {key}: no values; write {key}=value,value,…")
        if self.sample is not None and not 1 <= self.sample <= MOST_ROWS:
            raise GridError(f"sample = {self.sample}: must be at least 1, and at most {MOST_ROWS:,}")
        count = sum(map(len, self.values.values()))
        if count > MOST_VALUES:
            raise GridError(f"grid: {count:,} values: must be at most {MOST_VALUES:,}")
        if min(self.combinations, self.sample or self.combinations) > MOST_ROWS or self.combinations > sys.maxsize:
            raise GridError(
                f"grid: {self.combinations:,} combinations: at most {MOST_ROWS:,} are run: sample them (--sample 999), "
                "or try fewer values"
            )
        beside: Point = {}
        for key, values in self.values.items():
            for value in values:
                beside = self._check(key, value, beside)

    def __len__(self) -> int:
        return self.combinations if self.sample is None else min(self.sample, self.combinations)

    @property
    def combinations(self) -> int:
        """How many combinations there are, sampled or not."""
        return math.prod(len(values) for values in self.values.values())

    def points(self) -> Iterator[Point]:
        """Yields the combinations, one by one as they are asked for."""
        numbers: Iterable[int] = range(self.combinations)
        if len(self) < self.combinations:
            seed = self.base.get("seed", 0)
            numbers = sorted(random.Random(seed).sample(range(self.combinations), len(self)))
        for number in numbers:
            point = {}
            for key, values in reversed(list(self.values.items())):
                number, at = divmod(number, len(values))
                point[key] = values[at]
            yield {key: point[key] for key in self.values}

    def data(self, point: Point) -> dict[str, Any]:
        """Returns the plain data of a combination's scenario, not checked."""
        data: dict[str, Any] = deepcopy(dict(self.base))
        for key, value in point.items():
            lay(data, key, value)
        return data

    def scenario(self, point: Point) -> Scenario:
        """Returns the scenario of a combination; ScenarioError if its values do not fit together."""
        return make_scenario(self.data(point), "grid")

    def _check(self, key: str, value: Any, last: Point) -> Point:
        """Refuse a value that no pair of the grid's values, nor the value alone, makes a scenario with.

        Return what it was found to go with, which is tried first for the next one, given as `last`.
        """
        others = [{other: one} for other, values in self.values.items() if other != key for one in values]
        first: ScenarioError | None = None
        for beside in [{}, last, *others]:
            try:
                self.scenario({**beside, key: value})
            except ScenarioError as error:
                first = first or error
            else:
                return beside
        assert first is not None
        raise GridError(str(first))


def parse_grid(options: Iterable[str]) -> dict[str, list[Any]]:
    """Returns the values by key of `section.key=value,value,…` options; a TOML array may stand for the list.

    Raises GridError for a key that comes twice and for a list without values.
    """
    return values_by_key("--grid", "section.key=value,value,…", options, _listed)


def values_by_key(
    name: str, form: str, options: Iterable[str], parse: Callable[[str, str], list[Any]]
) -> dict[str, list[Any]]:
    """Returns the values by key of options `name` of a `form`; `parse` makes them of an option and its text behind `=`.

    Raises GridError for an option of another form, and for a key that comes twice.
    """
    values: dict[str, list[Any]] = {}
    for option in options:
        key, equals, text = (part.strip() for part in option.partition("="))
        if not equals or not all(key.split(".")):
            raise GridError(f"{name} {option!r}: write it as {form}")
        if key in values:
            raise GridError(f"{name} {option!r}: {key} has its values already; give them all at once")
        values[key] = parse(option, text)
    return values


def _listed(_: str, text: str) -> list[Any]:
    parsed = parse_value(text) if text.startswith("[") else None
    return parsed if isinstance(parsed, list) else [parse_value(part) for part in text.split(",") if part.strip()]


def sweep_names() -> list[str]:
    """Returns the names of the shipped sweeps."""
    folder = resources.files("prestage") / "experiments" / "sweeps"
    return sorted(entry.name[: -len(".toml")] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def make_grid(
    scenario: Scenario | str | Path | None = None,
    values: Mapping[str, Sequence[Any]] | None = None,
    *,
    settings: Iterable[str] = (),
    sample: int | None = None,
) -> Grid:
    """Returns the grid of a sweep: `values` by key over a scenario or its name, or over a sweep's file or name.

    A sweep's own grid has its values unless `values` has others for the key. `settings` are `section.key=value`
    strings. Values that come twice count once. Raises GridError and ScenarioError.
    """
    wanted = dict(values or {})
    if not isinstance(scenario, Scenario):
        scenario, own = _open(scenario, settings)
        wanted = {**own, **wanted}
    distinct = {key: list({repr(value): value for value in listed}.values()) for key, listed in wanted.items()}
    return Grid(scenario.plain(), distinct, sample)


def _open(name: str | Path | None, settings: Iterable[str]) -> tuple[Scenario, dict[str, list[Any]]]:
    """Returns the scenario and the grid that a name stands for: a sweep's, or a scenario's with no grid."""
    path = Path(name) if name is not None else None
    if str(name) in sweep_names():
        text = (resources.files("prestage") / "experiments" / "sweeps" / f"{name}.toml").read_text("utf-8")
    elif path is not None and path.suffix == ".toml" and path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise GridError(f"sweep {str(name)!r}: not UTF-8 text") from None
    else:
        if path is not None and path.suffix not in (".toml", ".jsonl") and str(name) not in scenario_names():
            known = [*sweep_names(), *scenario_names(), "FILE.toml"]
            raise GridError(unknown_name("sweep or scenario", str(name), known))
        return load_scenario(name, settings), {}
    data = parse_toml(text, f"sweep {str(name)!r}", GridError)
    if "grid" not in data:
        return load_scenario(name, settings), {}
    _check_sweep(data, f"sweep {str(name)!r}")
    scenario = data.get("scenario")
    if scenario is not None and scenario.endswith(".toml") and path is not None:
        scenario = path.parent / scenario
    base = load_scenario(scenario).plain()
    for key, value in data.get("set", {}).items():
        lay(base, key, value)
    for setting in settings:
        apply_setting(base, setting)
    own = {key: listed if isinstance(listed, list) else [listed] for key, listed in data["grid"].items()}
    return make_scenario(base, f"sweep {str(name)!r}"), own


def _check_sweep(data: Mapping[str, Any], source: str) -> None:
    """Raise GridError if a sweep's file has other keys than its three, or values of another kind."""
    unknown = sorted(data.keys() - {"scenario", "set", "grid"})
    if unknown:
        raise GridError(f"{source}: {unknown[0]}: no such key; known keys: scenario, set, grid")
    if not isinstance(data.get("scenario", ""), str):
        raise GridError(f"{source}: scenario = {shown(data['scenario'])}: must be a name or a TOML file, in quotes")
    for section in ("set", "grid"):
        if not isinstance(data.get(section, {}), dict):
            raise GridError(
                f'{source}: {section} = {shown(data[section])}: must be a section of keys, such as "prefetch.k"'
            )
