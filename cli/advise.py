"""The command of advice: `advise`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import print_json, progress_shown, stop_status
from .options import Json, ScenarioName, Settings
from .own import NOTHING, Own, takes_own


@takes_own
def advise(
    scenario: ScenarioName = None,
    goal: Annotated[
        list[str] | None,
        typer.Option(help="tokens_per_second (the default), decode, ttft, goodput, cost, memory; repeat for several."),
    ] = None,
    within: Annotated[
        list[str] | None,
        typer.Option("--within", metavar="NAME=LIMIT", help="Keep memory=20GiB, ttft=500 (ms), decode=20; repeat it."),
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option("--over", metavar="KEY=RANGE", help="Try first..last[:step] or V1,V2,… of a key; repeat it."),
    ] = None,
    prompt: Annotated[int | None, typer.Option(help="Tokens of a request's prompt; 512 without it.")] = None,
    output: Annotated[int | None, typer.Option(help="Tokens of its answer; 256 without it.")] = None,
    trials: Annotated[int, typer.Option(min=1, max=10_000, help="How many settings to try.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="The luck of the search.")] = 0,
    price: Annotated[float | None, typer.Option(min=0, help="What the machine costs an hour, for --goal cost.")] = None,
    journal: Annotated[
        Path | None, typer.Option(help="Keep what was tried in this file; the same command goes on from there.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw all trials and the Pareto front to this .png or .svg.")
    ] = None,
    settings: Settings = None,
    own: Own = NOTHING,
    json: Json = False,
) -> None:
    """Find the settings of a scenario's runtime that do best, what they gain, what binds and what to buy next.

    \b
    Examples:
      prestage advise gpt-oss-20b --gpu rtx3060 --ram "2x DDR4-3200" --runtime llama.cpp --prompt 512 --output 128
      prestage advise my-scenario.toml --goal ttft --over memory.gpu_budget=25%,50%,75%
      prestage advise my-scenario.toml --goal tokens_per_second --goal memory --plot front.png --journal tried.log

    It tries what the runtime's file lists, or what --over does, and prints the runtime's own command line. It does not
    recommend what is within the scatter of runs, or what hangs on a cost that nobody measured.
    """
    from ..experiments.advise import advise as find
    from ..output.pictures import check_picture

    if plot is not None:
        check_picture(plot)
    scenario, settings = own.given(scenario, settings)
    try:
        with progress_shown(log_every_s=10) as progress:
            found = find(
                scenario, settings=settings, goal=goal or "tokens_per_second", within=within or (), over=over,
                prompt=prompt, output=output, trials=trials, seed=seed, price=price, journal=journal, progress=progress,
            )  # fmt: skip
    except (KeyboardInterrupt, SystemExit) as left:
        kept = f"{journal} has what is done, and the same command goes on" if journal else "nothing is kept"
        typer.echo(f"stopped; {kept}", err=True)
        raise typer.Exit(stop_status(left)) from None
    if plot is not None:
        from ..output.advice_plot import plot_advice
        from ..output.pictures import save

        save(plot_advice(found.data), plot)
    if json:
        print_json(found.data)
        return
    from ..output.tables.advice import print_advice

    print_advice(found.data)
    if plot is not None:
        typer.echo(str(plot))
