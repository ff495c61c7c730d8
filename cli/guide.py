"""The command that runs published tables again: `reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .console import print_json, progress_shown
from .options import Json


def reproduce(
    tables: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TABLE]...",
            help="The guide's tables to run again; without one, all of them. Or 'published': runs of real engines.",
        ),
    ] = None,
    sources: Annotated[
        list[str] | None, typer.Option("--source", help="Of 'published', this source alone; repeat it for more.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Of 'published', a .png, .pdf or .svg: predicted by measured.")
    ] = None,
    json: Json = False,
) -> None:
    """Run published tables again: ours beside theirs, with a verdict on every row and what contradicts itself.

    \b
    Examples:
      prestage reproduce
      prestage reproduce inference caching
      prestage reproduce virtual-memory --json
      prestage reproduce published --source llmfit
    """
    if tables == ["published"]:
        _published(sources or [], out, json)
        return
    if sources or out is not None:
        raise InputError("--source, --out: go with `prestage reproduce published`")
    from ..guide import reproduce as published

    data = published.reproduce(tables or ())
    if json:
        print_json({"tables": data})
        return
    from ..output.tables.guide import print_reproduction

    print_reproduction(data)


#: So few rows have run by SimPy before the engine would be compiled.
_FEW_ROWS = 8


def _published(sources: list[str], out: Path | None, json: bool) -> None:
    """Predict published runs of real engines, and say how far off that is."""
    from ..calibration.published.rows import load_source, predictions, source_names, summary
    from ..engine.timing.ready import make_ready
    from ..output.published import print_published
    from ..output.published_plot import check_picture, write_picture
    from ..words import unknown_name

    for name in sources:
        if name not in source_names():
            raise InputError(unknown_name("--source", name, source_names()))
    if out is not None:
        check_picture(out)
    total = sum(len(load_source(name).rows) for name in sources or source_names())
    with progress_shown() as progress:
        if total > _FEW_ROWS:
            make_ready(progress)
        rows = []
        for done, row in enumerate(predictions(sources), 1):
            rows.append(row)
            if progress is not None:
                progress("published rows", done, total)
    plain = [row.plain() for row in rows]
    data = {"rows": plain, "summary": summary(rows)}
    if out is not None:
        write_picture(plain, out)
    if json:
        print_json(data)
        return
    print_published(data)
    if out is not None:
        typer.echo(str(out))
