"""The commands that draw: `plot`, `report`, `topology`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .console import print_json, progress_shown
from .options import Json


def plot(
    kind: Annotated[
        str,
        typer.Argument(
            help="Of a sweep: lines, heatmap, pareto, tornado. Of one run or two: time, lanes, timeline. Of one: busy, "
            "outcomes, wasted, memory, latency, tokens; under load concurrency, requests, first-token, end-to-end. "
            "Of two: waterfall."
        ),
    ],
    results: Annotated[
        list[Path], typer.Argument(help="A sweep's journal (.jsonl), or a folder of `prestage run --out`, or two.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .png, .pdf or .svg to write.")],
    x: Annotated[str | None, typer.Option(help="The key of the grid across; that with most values without it.")] = None,
    by: Annotated[str | None, typer.Option(help="The key of the lines, or of the heat map's rows.")] = None,
    figure: Annotated[
        str | None,
        typer.Option(help="What of a sweep is drawn, by its name in a row: counts.miss; tokens_per_second without it."),
    ] = None,
) -> None:
    """Draw a run, as a report does, for print; or a sweep: lines, a heat map, speed against memory, what matters most.

    \b
    Examples:
      prestage plot timeline prestage-out -o timeline.pdf
      prestage plot timeline prestage-out other-out -o both.png
      prestage plot outcomes prestage-out -o outcomes.pdf
      prestage plot lines sweep.jsonl --x prefetch.k --by memory.gpu_budget -o lines.png
      prestage plot heatmap sweep.jsonl --figure hit_rate -o heatmap.svg
      prestage plot pareto sweep.jsonl -o pareto.png
      prestage plot tornado sweep.jsonl -o tornado.png
    """
    with progress_shown(doing="drawing"):
        _plot(kind, results, out, x, by, figure)
    typer.echo(str(out))


def _plot(kind: str, results: list[Path], out: Path, x: str | None, by: str | None, figure: str | None) -> None:
    from ..engine.measure.insights import InsightError
    from ..experiments.journal import sweep_rows
    from ..output.charts import CHARTS, plot_sweep
    from ..output.figures import ALL_FIGURES
    from ..output.figures_static import draw
    from ..output.pictures import check_picture, save
    from ..output.saved import load_results
    from ..words import unknown_name

    check_picture(out)
    if kind in CHARTS:
        if len(results) != 1:
            raise InputError(f"{kind} is drawn from one journal, and {len(results)} are given")
        if results[0].is_dir():
            raise InputError(
                f"{results[0]}: a folder: {kind} is drawn from a sweep's journal (.jsonl); of a run there are "
                f"{', '.join(ALL_FIGURES)}"
            )
        try:
            picture = plot_sweep(kind, sweep_rows(results[0]), x=x, by=by, figure=figure or "tokens_per_second")
        except InsightError as error:
            raise InsightError(f"{results[0]}: {error}") from None
    elif kind in ALL_FIGURES:
        if x or by or figure:
            raise InputError(f"{kind} is a picture of a run: --x, --by and --figure are for those of a sweep")
        picture = draw(kind, load_results(results))
    else:
        raise InputError(unknown_name("KIND", kind, [*CHARTS, *ALL_FIGURES]))
    save(picture, out)


def report(
    results: Annotated[
        list[Path], typer.Argument(help="A folder that `prestage run --out` wrote, or two to set side by side.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .html to write.")] = Path("report.html"),
    all_spans: Annotated[bool, typer.Option(help="Draw all spans of a timeline, not 250,000 in its middle.")] = False,
) -> None:
    """Write a report of a run, or of two side by side: one HTML file that needs no network.

    \b
    Examples:
      prestage report prestage-out -o report.html
      prestage report prestage-out other-out -o comparison.html

    `prestage plot KIND` draws each of its figures for print.
    """
    with progress_shown(doing="writing the report"):
        from ..output.page import check_page
        from ..output.report import write_report
        from ..output.saved import load_results

        check_page(out)
        write_report(load_results(results), out, all_spans=all_spans)
    typer.echo(f"{out} (open it in a browser)")


def topology(
    machine: Annotated[
        str,
        typer.Argument(
            help="A scenario (a TOML file or a name), a profile (a name, a JSON file), or parts: gpu=rtx4090."
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Draw it to this .png, .pdf or .svg.")] = None,
    result: Annotated[
        str | None, typer.Option(help="A run on it (a result.json or its folder): also show what the links carried.")
    ] = None,
    json: Json = False,
) -> None:
    """Show a machine as a graph: its links, how fast they are, the routes over them, and what a run moved over each.

    \b
    Examples:
      prestage topology h200-hgx-x8 -o hgx.png
      prestage topology rtx4090-x4 --json
    """
    from ..output.machine import describe, load_links, machine_of, print_machine
    from ..output.pictures import check_picture, save

    if out is not None:
        check_picture(out)
    data = describe(machine_of(machine), load_links(result) if result is not None else ())
    if out is not None:
        from ..output.machine_plot import plot_machine

        save(plot_machine(data), out)
    if json:
        print_json(data)
        return
    print_machine(data)
    if out is not None:
        typer.echo(str(out))
