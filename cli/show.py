"""`prestage show`: what a run would be made of, before it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import print_json, progress_shown
from .options import Json, ScenarioName, Settings
from .own import NOTHING, Own, takes_own


@takes_own
def show(
    scenario: ScenarioName = None,
    settings: Settings = None,
    own: Own = NOTHING,
    all_keys: Annotated[bool, typer.Option("--all", help="List all keys, also those that have their default.")] = False,
    toml: Annotated[
        bool, typer.Option("--toml", help="Print the whole scenario as TOML, to change and to run.")
    ] = False,
    json: Json = False,
) -> None:
    """Show a scenario as it would run: where each value comes from, what each memory keeps, and the runtime.

    \b
    Examples:
      prestage show
      prestage show qwen3-30b-a3b --gpu rtx4090 --ram "64GB DDR5-5600" --runtime llama.cpp
      prestage show gpt-oss-20b --toml > mine.toml
    """
    with progress_shown():
        from ..engine.scenario.origins import origins, toml_of
        from ..engine.shown import shown

        loaded, keys = origins(*own.given(scenario, settings))
        data = {} if toml else shown(loaded, keys)
    if toml:
        typer.echo(toml_of(keys), nl=False)
        return
    if json:
        print_json(data)
        return
    from ..output.tables.scenario import print_scenario

    print_scenario(data, all_keys)
