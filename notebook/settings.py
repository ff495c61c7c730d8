"""Scenarios from Python: a name, a file, plain data or a scenario, with settings laid over it by their keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine.scenario.amounts import ScenarioError
from ..engine.scenario.scenario import Scenario, keys_named, lay, make_scenario, scenario_data, scenario_keys
from ..words import shown, unknown_key

Given = Scenario | Mapping[str, Any] | str | Path | None


def scenario_of(given: Given = None, settings: Mapping[str, Any] | None = None) -> Scenario:
    """Returns a scenario with settings laid over it.

    `given` is one, a shipped one's name, a TOML file, plain data by sections, or None for the default. A key of
    `settings` is `section.key`, or the key alone where only one section has it: `tokens` is `workload.tokens`. Raises
    ScenarioError, which says what would do.
    """
    if isinstance(given, Scenario):
        data, source = given.plain(), "scenario"
    elif isinstance(given, Mapping):
        data, source = _copied(given), "scenario"
    elif given is None or isinstance(given, str | Path):
        data, source = scenario_data(given)
    else:
        raise ScenarioError(
            f"scenario = {shown(given)}: give the name of a shipped one, a TOML file, a dict of sections or a Scenario"
        )
    for key, value in (settings or {}).items():
        lay(data, whole_key(key), value)
    return make_scenario(data, source)


def settings_of(keys: Mapping[str, Any]) -> list[str]:
    """Returns settings as texts, `section.key=value`, as `--set` takes them; None takes a key out.

    What JSON has no form for, such as a path, is the text that it prints as.
    """
    texts = {
        key: value if isinstance(value, str) else "" if value is None else json.dumps(value, default=str)
        for key, value in keys.items()
    }
    return [f"{whole_key(key)}={text}" for key, text in texts.items()]


def whole_key(key: str) -> str:
    """Returns a key with its section. Raises ScenarioError for one that no section has, and for one of several."""
    if "." in key or key == "seed":
        return key
    found = keys_named(key)
    if not found:
        raise ScenarioError(unknown_key(key, sorted({whole.rpartition(".")[2] for whole in scenario_keys()})))
    if len(found) > 1:
        choices = " or ".join(f"{{{whole!r}: …}}" for whole in found)
        raise ScenarioError(f"{key}: is a key of several sections: give settings={choices}")
    return found[0]


def _copied(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in data.items()}
