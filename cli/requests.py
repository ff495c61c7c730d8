"""The command of requests under load: `capacity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import print_json, progress_shown
from .options import Json, ScenarioName, Settings
from .own import NOTHING, Own, takes_own


@takes_own
def capacity(
    scenario: ScenarioName = None,
    slo: Annotated[
        list[str] | None,
        typer.Option(
            "--slo", metavar="KEY=MS", help="A promise: ttft_ms, itl_ms, tpot_ms, e2e_ms, or share; repeat it."
        ),
    ] = None,
    settings: Settings = None,
    own: Own = NOTHING,
    replicates: Annotated[
        int, typer.Option(min=1, max=1000, help="Runs of every rate, each with a seed of its own.")
    ] = 5,
    precision: Annotated[
        float, typer.Option(help="How far the rate that is met and the one that is missed may be apart.")
    ] = 0.05,
    plot: Annotated[Path | None, typer.Option(help="Draw latency against rate into this .png, .pdf or .svg.")] = None,
    json: Json = False,
) -> None:
    """Find the highest rate of requests at which a service level is met, with the curve of latency against rate.

    \b
    Examples:
      prestage capacity synthetic --set model.layers=2 --set requests.count=20 --slo ttft_ms=500 --plot c.png
      prestage capacity my-scenario.toml --slo e2e_ms=4000 --slo share=0.9 --replicates 3 --json

    Rates are bisected; every rate is run with the same seeds. Without --slo, the scenario says it (requests.slo).
    """
    from ..engine.measure.request_metrics import level_of
    from ..engine.scenario.scenario import load_scenario
    from ..experiments.serving_capacity import serving_capacity

    if plot is not None:
        from ..output.pictures import check_picture

        check_picture(plot)
    promised = [f"requests.slo.{one}" for one in slo or ()]
    name, given = own.given(scenario, settings)
    chosen = load_scenario(name, [*given, *promised])
    level = level_of(None if chosen.requests is None else chosen.requests.slo)
    with progress_shown(log_every_s=10) as progress:
        data = serving_capacity(chosen, level, replicates=replicates, precision=precision, progress=progress)
    if plot is not None:
        from ..output.capacity_plot import plot_capacity
        from ..output.pictures import save

        save(plot_capacity(data), plot)
    if json:
        print_json(data)
        return
    from ..output.tables.requests import print_capacity

    print_capacity(data)
    if plot is not None:
        typer.echo(str(plot))
