"""The commands of many runs: `sweep`, `suite`, `compare`, `breakeven`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .console import print_json, progress_shown, stop_status
from .options import Json, ScenarioName, Settings, complete_scenario
from .own import NOTHING, Own, takes_own


@takes_own
def sweep(
    scenario: Annotated[
        str | None,
        typer.Argument(
            help="A scenario or a sweep: a TOML file, a shipped one's or a model's name; else the default.",
            autocompletion=complete_scenario,
        ),
    ] = None,
    grid: Annotated[
        list[str] | None, typer.Option("--grid", metavar="KEY=V1,V2,…", help="Try these values of a key; repeat it.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a key in all of them; repeat it.")
    ] = None,
    own: Own = NOTHING,
    sample: Annotated[int | None, typer.Option(help="Run so many of the combinations, drawn by the seed.")] = None,
    workers: Annotated[int | None, typer.Option(help="How many processes; all cores without it.")] = None,
    cluster: Annotated[str | None, typer.Option(help="The address of a Dask scheduler whose workers run it.")] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The journal (.jsonl), or a .csv or .parquet made of one beside it.")
    ] = Path("sweep.jsonl"),
    baselines: Annotated[bool, typer.Option(help="Also run the baselines, once for all rows that share one.")] = True,
    json: Json = False,
) -> None:
    """Run every combination of some keys' values, over all cores or a cluster; a killed sweep goes on where it was.

    \b
    Examples:
      prestage sweep --grid prefetch.k=1,2,4 --grid memory.gpu_budget=25%,50%
      prestage sweep gpt-oss-20b --grid prefetch.lookahead=0,1,2 --sample 2 --workers 2 -o sweep.csv
      prestage sweep guide-insights -o insights.jsonl

    A combination that cannot run is a row with its error. Draw the rows with `prestage plot`, run one of them again
    with `prestage run sweep.jsonl#KEY`. On several machines: `dask scheduler` on one, `dask worker ADDRESS --nthreads 1
    --nworkers N` on each, then --cluster ADDRESS.
    """
    from ..experiments.grid import parse_grid
    from ..experiments.sweep import sweep as run_sweep

    scenario, settings = own.given(scenario, settings)
    try:
        with progress_shown(log_every_s=30) as progress:
            rows = run_sweep(
                scenario,
                parse_grid(grid or ()),
                out=out,
                settings=settings,
                sample=sample,
                workers=workers,
                cluster=cluster,
                baselines=baselines,
                progress=progress,
            )
    except (KeyboardInterrupt, SystemExit) as left:
        typer.echo(f"stopped; {out.with_suffix('.jsonl')} has what is done, and the same command goes on", err=True)
        raise typer.Exit(stop_status(left)) from None
    failed = [row["error"] for row in rows.errors]
    if json:
        print_json({"rows": len(rows), "errors": len(failed), "file": str(out)})
    else:
        from ..output.tables.sweeps import print_sweep

        print_sweep(rows)
        typer.echo(f"{out}: {len(rows):,} rows" + (f", {len(failed):,} of them with an error" if failed else ""))
    if failed and len(failed) == len(rows):
        raise InputError(f"every scenario failed, the first with: {failed[0]}")


def suite(
    name: Annotated[str, typer.Argument(metavar="[SUITE]", help="A suite's TOML file or a shipped one's name.")] = (
        "default"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer tokens and fewer published tables.")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder that keeps it all.")] = Path("prestage-suite"),
    workers: Annotated[int | None, typer.Option(help="How many processes; all cores without it.")] = None,
    device: Annotated[int | None, typer.Option(help="The CUDA GPU whose transfers are measured, if any: 0.")] = None,
    json: Json = False,
) -> None:
    """Run the comprehensive benchmark suite into one report; a killed suite goes on where it was.

    \b
    Examples:
      prestage suite --quick
      prestage suite -o results
      prestage suite my-suite.toml --workers 4 --json

    Transfers (by profiles, and measured where there is a GPU), published tables run again, and sweeps over prefetch,
    budget, predictor, eviction, lookahead and context, with the best configuration by each metric. The folder then has
    report.html, suite.json, suite.md, figures and a journal of rows for each sweep, which `prestage plot` also draws.
    """
    from ..calibration.fit.transfer import from_profile, measurement
    from ..experiments.suite import load_suite, run_suite
    from ..experiments.suite_report import write_suite
    from ..files import check_folder
    from ..resources.profile import load_profile

    definition = load_suite(name)
    check_folder(out)
    try:
        with progress_shown(log_every_s=30) as progress:
            finished = run_suite(
                definition,
                out,
                quick=quick,
                transfers={profile: from_profile(load_profile(profile)) for profile in definition.transfers},
                measured=measurement(device, quick=quick, progress=progress),
                workers=workers,
                progress=progress,
            )
    except (KeyboardInterrupt, SystemExit) as left:
        typer.echo(f"stopped; {out} has what is done, and the same command goes on", err=True)
        raise typer.Exit(stop_status(left)) from None
    written = write_suite(finished, out)
    if json:
        print_json(finished.data)
        return
    from ..output.tables.sweeps import print_suite

    print_suite(finished.data)
    for path in written:
        typer.echo(str(path))


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Results (result.json, or its folder) or scenarios, which may carry settings: NAME,KEY=VALUE"
        ),
    ],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a key in all scenarios; repeat it.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the waterfall to this .png, .pdf or .svg.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tell why, of every warning.")] = False,
    json: Json = False,
) -> None:
    """Set runs side by side: figures, ratios to the first, and where the time between them arises.

    \b
    Examples:
      prestage compare default default,prefetch.lookahead=0
      prestage compare gpt-oss-20b gpt-oss-20b,copy.discipline=priority --set workload.tokens=50 --plot waterfall.png

    A run that is refused is left out of the comparison and named at its end, with status 2.
    """
    from ..engine.measure.comparison import compare as compare_runs
    from ..engine.measure.comparison import waterfall
    from ..experiments.compare import load_runs
    from ..output.pictures import check_picture

    if plot is not None:
        check_picture(plot)
    with progress_shown() as progress:
        loaded, refused = load_runs(runs, settings or (), progress=progress)
    left_out = InputError("; ".join(why if why.startswith(name) else f"{name}: {why}" for name, why in refused.items()))
    if refused and len(loaded) < 2:
        raise left_out
    data = {**compare_runs(loaded), "refused": refused}
    if plot is not None:
        from ..output.charts import plot_waterfall
        from ..output.pictures import save

        first, *others = loaded
        save(plot_waterfall({name: waterfall(loaded[first], loaded[name]) for name in others}, first), plot)
    if json:
        print_json(data)
    else:
        from ..output.tables.comparison import print_comparison

        print_comparison(data, verbose)
        if plot is not None:
            typer.echo(str(plot))
    if refused:
        raise left_out


@takes_own
def breakeven(
    scenario: ScenarioName = None,
    settings: Settings = None,
    own: Own = NOTHING,
    budgets: Annotated[str, typer.Option(help="Budgets to try: 10%,25%,4GiB; the scenario's without it.")] = "",
    lookaheads: Annotated[str, typer.Option(help="Lookaheads to try: 1,2,3; the scenario's without it.")] = "",
    workers: Annotated[int | None, typer.Option(help="How many processes; all cores without it.")] = None,
    cluster: Annotated[str | None, typer.Option(help="The address of a Dask scheduler whose workers run it.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it to this .png, .pdf or .svg.")] = None,
    json: Json = False,
) -> None:
    """Find the least recall of a predictor at which prefetching pays, against the same cache without it.

    \b
    Examples:
      prestage breakeven --set workload.tokens=50
      prestage breakeven gpt-oss-20b --budgets 25%,50% --set workload.tokens=20 --plot breakeven.png

    The predictor is the oracle, whatever the scenario's; its time (predictor.latency_us, lane) counts.
    """
    from ..engine.scenario.scenario import load_scenario
    from ..experiments.breakeven import break_even
    from ..experiments.grid import parse_grid
    from ..output.pictures import check_picture

    if plot is not None:
        check_picture(plot)
    options = {"memory.gpu_budget": budgets, "prefetch.lookahead": lookaheads}
    tried = parse_grid(f"{key}={values}" for key, values in options.items() if values)
    with progress_shown(log_every_s=10) as progress:
        data = break_even(
            load_scenario(*own.given(scenario, settings)),
            budgets=tried.get("memory.gpu_budget", ()),
            lookaheads=tried.get("prefetch.lookahead", ()),
            workers=workers,
            cluster=cluster,
            progress=progress,
        )
    if plot is not None:
        from ..output.charts import plot_break_even
        from ..output.pictures import save

        save(plot_break_even(data), plot)
    if json:
        print_json(data)
        return
    from ..output.tables.sweeps import print_break_even

    print_break_even(data)
    if plot is not None:
        typer.echo(str(plot))
