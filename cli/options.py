"""Options that several commands have, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..workloads.trace import RoutingTrace


def complete_scenario(incomplete: str) -> list[str]:
    """Returns the names of scenarios and models that a shell may complete a beginning to."""
    from ..engine.scenario.scenario import scenario_names
    from ..workloads.model import preset_names

    return [name for name in sorted({*scenario_names(), *preset_names()}) if name.startswith(incomplete)]


def complete_setting(incomplete: str) -> list[str]:
    """Returns the keys of a scenario that a shell may complete a beginning to, each with its sign."""
    from ..engine.scenario.scenario import scenario_keys

    return [f"{key}=" for key in scenario_keys() if key.startswith(incomplete)]


Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set a key, such as prefetch.k=4; KEY= takes it out; repeat it.",
        autocompletion=complete_setting,
    ),
]
ScenarioName = Annotated[
    str | None,
    typer.Argument(
        help="A scenario's TOML file, the name of a shipped one, or a model's; without it, the default.",
        autocompletion=complete_scenario,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]
Sequences = Annotated[
    str, typer.Option(metavar="FIRST:LAST", help="Which sequences, in file order: 61: or :10 or 3:5; all without it.")
]
#: Whose guesses an eviction policy goes by, where nothing but the cache is replayed.
Predictor = Annotated[str, typer.Option(help="Whose guesses an eviction policy goes by, if it goes by any.")]
Lookahead = Annotated[
    int | None, typer.Option(help="How many layers ahead it guesses; all, or as far as it knows, without it.")
]
Weights = Annotated[str | None, typer.Option(help="Those of predictor learned: a folder, a file or a shipped name.")]
Recall = Annotated[float | None, typer.Option(help="That of predictor oracle, 0 to 1; 1 without it.")]


def expert_bytes_of(size: str | None) -> int | None:
    """Returns the bytes that an option gives, with a unit or without."""
    from ..units import option_bytes

    return None if size is None else option_bytes("--expert-bytes", size)


def opened_trace(path: Path) -> RoutingTrace:
    """Returns the trace that an argument names, or that is made of the log that it names."""
    from ..workloads.importers import open_trace

    return open_trace(path)


def listed(text: str) -> list[str]:
    """Returns the words of a comma-separated option."""
    return [word.strip() for word in text.split(",") if word.strip()]
