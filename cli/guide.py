"""The command that runs published tables again: `reproduce`."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import print_json
from .options import Json


def reproduce(
    tables: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TABLE]...", help="The published tables to run again; without one, all of them."),
    ] = None,
    json: Json = False,
) -> None:
    """Run published tables again: ours beside theirs, with a verdict on every row and what contradicts itself.

    \b
    Examples:
      prestage reproduce
      prestage reproduce inference caching
      prestage reproduce virtual-memory --json
    """
    from ..guide import reproduce as published

    data = published.reproduce(tables or ())
    if json:
        print_json({"tables": data})
        return
    from ..output.tables.guide import print_reproduction

    print_reproduction(data)
