"""`prestage list`: the names that a scenario may use."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import print_json
from .options import Json


def _complete_kind(incomplete: str) -> list[str]:
    from ..notebook.lists import kinds

    return [kind for kind in kinds() if kind.startswith(incomplete)]


def list_names(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="Of what: scenarios, models, machines, runtimes, traces, evictions, …; of everything without it.",
            autocompletion=_complete_kind,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List the names that a scenario may give: models, machines, runtimes, traces, policies, also those of plug-ins.

    \b
    Examples:
      prestage list
      prestage list evictions
    """
    from ..notebook.lists import kinds, names

    found = {each: names(each) for each in ([kind] if kind is not None else kinds())}
    if json:
        print_json(found)
    elif kind is not None:
        typer.echo("\n".join(found[kind]))
    else:
        typer.echo("\n\n".join(f"{each}\n  " + "\n  ".join(_lines(listed)) for each, listed in found.items()))


def _lines(names: list[str]) -> list[str]:
    from textwrap import wrap

    return wrap(", ".join(names), 78, break_on_hyphens=False)
