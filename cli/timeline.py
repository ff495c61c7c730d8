"""`prestage timeline`: timelines of runs, simulated and profiled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import print_json
from .options import Json

app = typer.Typer(
    help="""Read the timelines of runs, simulated and profiled.

    Such as `prestage timeline summary prestage-out/timeline.json.gz profiler-trace.json`.
    """
)


@app.command("import")
def timeline_import(
    trace: Annotated[Path, typer.Argument(help="A trace of PyTorch's profiler, or a timeline.json.gz of ours.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="A timeline (.json, .json.gz) or a picture (.png, .pdf, .svg) to write."),
    ] = None,
    kernels: Annotated[bool, typer.Option(help="Also show what each kernel and copy took.")] = False,
    json: Json = False,
) -> None:
    """Read a profiler's trace as a timeline: lanes from streams and threads, spans from kernels, copies and calls.

    \b
    Examples:
      prestage timeline import trace.json.gz --kernels
      prestage timeline import trace.json.gz -o timeline.json.gz
      prestage timeline import trace.json.gz -o timeline.pdf

    The median, interquartile range and number of each kernel (--json: as `samples`) are what a profile's costs carry.
    What is odd in the file is read as far as it can be; how much was repaired or left out is said (--json: `reading`).
    """
    from ..files import check_file
    from ..output.profiler_trace import load_timeline, write_imported
    from ..output.summary import kernel_costs, timeline_summary

    if out is not None:
        check_file(out)
    imported = load_timeline(trace)
    summary = {**timeline_summary(imported.timeline), "reading": imported.reading.plain()}
    costs = kernel_costs(imported) if kernels or json else []
    if out is not None:
        write_imported(imported, out, title=trace.name)
    if json:
        print_json({**summary, "kernels": costs})
        return
    from ..output.tables.measured import print_kernels, print_timelines

    print_timelines({trace.name: summary})
    if kernels:
        print_kernels(costs)
    if out is not None:
        typer.echo(str(out))


@app.command("summary")
def timeline_summaries(
    traces: Annotated[list[Path], typer.Argument(help="Traces of PyTorch's profiler, or timelines of ours.")],
    json: Json = False,
) -> None:
    """Show how busy each GPU and host was in one timeline or several, simulated or profiled, side by side.

    Such as `prestage timeline summary prestage-out/timeline.json.gz trace.json.gz`.
    """
    from ..output.profiler_trace import load_timeline
    from ..output.summary import timeline_summary

    named = {path.name for path in traces}
    names = [path.name if len(named) == len(traces) else str(path) for path in traces]
    summaries = {}
    for name, path in zip(names, traces, strict=True):
        imported = load_timeline(path)
        summaries[name] = {**timeline_summary(imported.timeline), "reading": imported.reading.plain()}
    if json:
        print_json(summaries)
        return
    from ..output.tables.measured import print_timelines

    print_timelines(summaries)


@app.command("late")
def timeline_late(
    run: Annotated[Path, typer.Argument(help="A folder that `prestage run --out` wrote.")], json: Json = False
) -> None:
    """Tell which prefetches of a run came late, and why: ordered too late, or behind other copies.

    Such as `prestage timeline late prestage-out`.
    """
    from ..output.late import late_data
    from ..output.saved import load_result

    data = late_data(load_result(run))
    if json:
        print_json(data)
        return
    from ..output.tables.measured import print_late

    print_late(data)
