"""Runs to set side by side: finished ones, and scenarios that are simulated now."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..engine.measure.comparison import read_result
from ..engine.run import Progress
from ..engine.scenario.scenario import load_scenario
from ..engine.simulate import simulate
from ..errors import InputError


def load_runs(
    names: Iterable[str], settings: Iterable[str] = (), *, progress: Progress | None = None
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Returns the data of runs by their names, as `load_run` does, and of those that cannot be had, why."""
    loaded: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    names = list(dict.fromkeys(names))
    for done, name in enumerate(names):
        if progress is not None:
            progress("runs", done, len(names))
        try:
            loaded[name] = load_run(name, settings, progress=progress)
        except InputError as error:
            refused[name] = str(error)
    return loaded, refused


def load_run(name: str, settings: Iterable[str] = (), *, progress: Progress | None = None) -> dict[str, Any]:
    """Returns the data of a run: a result.json, a folder with one, or a scenario that is simulated now.

    A scenario's name may be followed by settings of its own: `default,prefetch.lookahead=0`; `settings` come first.
    Raises ValueError if it is neither, or cannot run.
    """
    path = Path(name)
    if path.is_dir() or (path.suffix == ".json" and ("," not in name or path.is_file())):  # a setting may end in .json
        return read_result(path)
    scenario, *own = name.split(",")
    return simulate(load_scenario(scenario or None, [*settings, *own]), baselines=False, progress=progress).data
