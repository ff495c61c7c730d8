"""Where each key of a scenario has its value from: a setting, the scenario's file, its runtime, or the defaults."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from ...resources.runtime import load_runtime
from .scenario import Scenario, apply_setting, in_order, make_scenario, scenario_data

#: What the origins of values are called.
SETTING, DEFAULT, FOLLOWS = "--set", "default", "follows from others"


class Key(NamedTuple):
    """One key of a scenario: its value, what it would be if nobody said (None: not set), and who said it."""

    key: str
    value: Any
    default: Any
    origin: str


def origins(name: str | Path | None = None, settings: Iterable[str] = ()) -> tuple[Scenario, list[Key]]:
    """Returns the scenario that `load_scenario` would, and all its keys in order with their origins.

    An origin is `--set`, `scenario NAME`, `runtime NAME`, `follows from others` or `default`. Raises ScenarioError.
    """
    data, source = scenario_data(name)
    settings = in_order(settings)
    for setting in settings:
        apply_setting(data, setting)
    scenario = make_scenario(data, source)
    said = set(_written(data))
    set_keys = {_as_kept(setting.partition("=")[0].strip()) for setting in settings}
    runtime = load_runtime(scenario.runtime.name)
    brought = {f"{section}.{key}" for section, keys in runtime.defaults.items() for key in keys}
    defaults = dict(_defaults(Scenario))
    keys = []
    for key, value in _levels(scenario.plain()):
        origin = DEFAULT
        if key in said:
            origin = SETTING if key in set_keys else source.replace("'", "")
        elif key in brought:
            origin = f"runtime {runtime.name}"
        elif value != defaults.get(key):
            origin = FOLLOWS
        keys.append(Key(key, value, defaults.get(key), origin))
    return scenario, keys


def toml_of(keys: Iterable[Key]) -> str:
    """Returns keys as a scenario's TOML, those that are not set left out."""
    sections: dict[str, list[str]] = {}
    for each in keys:
        section, _, name = each.key.rpartition(".")
        if each.value is not None:
            sections.setdefault(section, []).append(f"{name} = {json.dumps(each.value, ensure_ascii=False)}")
    lines = []
    for section, entries in sections.items():
        lines += [*([f"\n[{section}]"] if section else []), *entries]
    return "\n".join(lines) + "\n"


def _as_kept(key: str) -> str:
    """Returns the key under which a scenario keeps a setting: a machine's parts are its profile."""
    return "machine.profile" if key.startswith("machine.") else key


def _written(data: Mapping[str, Any]) -> Iterator[str]:
    return (_as_kept(key) for key, _ in _levels(data))


def _levels(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each key of sections within sections, joined by dots, with its value."""
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _levels(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _defaults(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if inner is None:
            yield key, None if field.is_required() else field.default
        else:
            yield from _defaults(inner, f"{key}.")
