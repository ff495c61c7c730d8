"""The command line. Each command imports what it needs when it runs, so that `--help` is quick.

Whatever goes wrong with the input ends in one line on standard error and exit status 2; `--json` prints one JSON
object on standard output and nothing else there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from .errors import InputError

if TYPE_CHECKING:
    from .workloads.trace import RoutingTrace

app = typer.Typer(
    help="""Simulate Mixture-of-Experts inference with expert offloading and prefetching.

    Start with `prestage run --out prestage-out`; every command's --help has examples.
    """,
    add_completion=False,
    pretty_exceptions_enable=False,
)
trace_app = typer.Typer(
    help="""Record, import, look at, fit and draw routing traces.

    Such as `prestage trace synth -o trace.safetensors`, then `prestage trace info trace.safetensors`.
    """
)
app.add_typer(trace_app, name="trace")
calibrate_app = typer.Typer(help="Measure a GPU, fit its profile, and prove it.", no_args_is_help=True)
app.add_typer(calibrate_app, name="calibrate")

benchmark_app = typer.Typer(help="Benchmark this machine, or show what was measured on another.", no_args_is_help=True)
app.add_typer(benchmark_app, name="benchmark")
predictor_app = typer.Typer(
    help="""Train, measure and evaluate predictors of expert choices.

    Such as `prestage predictor train trace.safetensors -o my-predictor`.
    """
)
app.add_typer(predictor_app, name="predictor")

timeline_app = typer.Typer(
    help="""Read the timelines of runs, simulated and profiled.

    Such as `prestage timeline summary prestage-out/timeline.json.gz profiler-trace.json`.
    """
)
app.add_typer(timeline_app, name="timeline")


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(version("prestage"))
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


# A missing argument, an unknown option and a bad value are all of the class that BadParameter is made from; typer
# gives it no name of its own.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__base__)

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key, such as prefetch.k=4; KEY= takes it out; repeat it."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]


def main() -> None:
    """Run the command line; what is refused is one line and exit status 2 (terminal.py has the others)."""
    from . import terminal

    terminal.prepare()
    sys.exit(terminal.flushed(_status(sys.argv[1:] or ["--help"])))


def _status(arguments: list[str]) -> int:
    """Run a command and return its exit status."""
    from . import terminal

    try:
        for argument in arguments:
            if any("\ud800" <= character <= "\udfff" for character in argument):
                raise InputError(f"{argument!r}: not UTF-8: results and messages are, so give it another name")
        return int(app(args=arguments, prog_name="prestage", standalone_mode=False) or 0)
    except _UsageError as error:
        asked = error.ctx.command_path if error.ctx else "prestage"
        return terminal.refuse(f"{error.format_message().rstrip('.')}; `{asked} --help` tells more")
    except InputError as error:
        return terminal.refuse(str(error))
    except BrokenPipeError:
        return terminal.BROKEN_PIPE
    except OSError as error:
        return terminal.refuse(terminal.os_words(error))
    except MemoryError as error:
        return terminal.refuse(f"out of memory: {str(error) or 'ask for less, or use a larger machine'}")
    except SystemExit as left:
        # Typer makes one of a pipe that nobody reads.
        return terminal.BROKEN_PIPE if isinstance(left.__context__, BrokenPipeError) else _code(left)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception:
        return terminal.report_fault()


def _code(left: KeyboardInterrupt | SystemExit) -> int:
    """Return the exit status of who was told to stop."""
    return left.code if isinstance(left, SystemExit) and isinstance(left.code, int) else 130


@app.command()
def run(
    scenario: Annotated[
        str | None, typer.Argument(help="A scenario's TOML file or the name of a shipped one; without it, the default.")
    ] = None,
    settings: Settings = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Write result.json, run.safetensors, timeline.json.gz and two pictures there."
        ),
    ] = None,
    all_spans: Annotated[bool, typer.Option(help="Write all spans to the timeline, not the first 200,000.")] = False,
    stream: Annotated[
        Path | None, typer.Option(help="Keep the timeline in files there while it grows, and not in memory.")
    ] = None,
    baselines: Annotated[bool, typer.Option(help="Also run the two baselines (speedup, resident_ms).")] = True,
    check_prefetch: Annotated[
        bool,
        typer.Option("--check-prefetch", help="Also run the same cache without prefetch, and warn if it is faster."),
    ] = False,
    replicates: Annotated[
        int,
        typer.Option(
            min=0, max=10_000, help="Run so many more times, costs drawn from their uncertainty: p5, p50, p95."
        ),
    ] = 0,
    engine: Annotated[
        str, typer.Option(help="What carries the run out: lanes; or simpy or compiled, by commands: same numbers.")
    ] = "lanes",
    json: Json = False,
) -> None:
    """Simulate a scenario: how fast it decodes, what was hit, late or missed, and where the time went.

    \b
    Examples:
      prestage run --out prestage-out
      prestage run --set prefetch.lookahead=0 --set memory.gpu_budget=50%
      prestage run gpt-oss-20b --set workload.trace=trace.npz --json
      prestage run my-scenario.toml --no-baselines --check-prefetch

    The README lists every key; a key or name that does not exist is refused with those that do.
    """
    from .engine.loading.loading import load_inputs
    from .engine.scenario.scenario import load_scenario
    from .engine.simulate import simulate_inputs
    from .files import check_folder, made_folder
    from .output.files import write_result

    inputs = load_inputs(load_scenario(scenario, settings or ()))
    if out is not None:
        check_folder(out)
    with nullcontext() if stream is None else made_folder(stream, keep=False), _progress() as progress:
        result = simulate_inputs(
            inputs,
            baselines=baselines,
            check_prefetch=check_prefetch,
            replicates=replicates,
            progress=progress,
            stream=stream,
            engine=engine,
        )
        if out is not None and (out / "result.json").exists():
            _say_replaced(out, "run")
        written = [] if out is None else write_result(result, out, all_spans=all_spans)
    if json:
        _print_json(result.json_data())
        return
    from .output.tables import print_result

    print_result(result.json_data())
    for line in written:
        typer.echo(line)


@app.command()
def sweep(
    scenario: Annotated[
        str | None, typer.Argument(help="A scenario or a sweep: a TOML file or a shipped one's name; else the default.")
    ] = None,
    grid: Annotated[
        list[str] | None, typer.Option("--grid", metavar="KEY=V1,V2,…", help="Try these values of a key; repeat it.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a key in all of them; repeat it.")
    ] = None,
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
    from .experiments.grid import parse_grid
    from .experiments.sweep import sweep as run_sweep

    try:
        with _progress(log_every_s=30) as progress:
            rows = run_sweep(
                scenario,
                parse_grid(grid or ()),
                out=out,
                settings=settings or (),
                sample=sample,
                workers=workers,
                cluster=cluster,
                baselines=baselines,
                progress=progress,
            )
    except (KeyboardInterrupt, SystemExit) as left:
        typer.echo(f"stopped; {out.with_suffix('.jsonl')} has what is done, and the same command goes on", err=True)
        raise typer.Exit(_code(left)) from None
    failed = [row["error"] for row in rows.errors]
    if json:
        _print_json({"rows": len(rows), "errors": len(failed), "file": str(out)})
    else:
        from .output.tables import print_sweep

        print_sweep(rows)
        typer.echo(f"{out}: {len(rows):,} rows" + (f", {len(failed):,} of them with an error" if failed else ""))
    if failed and len(failed) == len(rows):
        raise InputError(f"every scenario failed, the first with: {failed[0]}")


@app.command()
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
    from .calibration.transfer import from_profile, measurement
    from .experiments.suite import load_suite, run_suite
    from .experiments.suite_report import write_suite
    from .files import check_folder
    from .resources.profile import load_profile

    definition = load_suite(name)
    check_folder(out)
    try:
        with _progress(log_every_s=30) as progress:
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
        raise typer.Exit(_code(left)) from None
    written = write_suite(finished, out)
    if json:
        _print_json(finished.data)
        return
    from .output.tables import print_suite

    print_suite(finished.data)
    for path in written:
        typer.echo(str(path))


@app.command()
def plot(
    kind: Annotated[
        str,
        typer.Argument(
            help="Of a sweep: lines, heatmap, pareto, tornado. Of a run: time, lanes, timeline, busy, outcomes, "
            "wasted, memory, latency, tokens. Of two runs: waterfall."
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
      prestage plot outcomes prestage-out -o outcomes.pdf
      prestage plot lines sweep.jsonl --x prefetch.k --by memory.gpu_budget -o lines.png
      prestage plot heatmap sweep.jsonl --figure hit_rate -o heatmap.svg
      prestage plot pareto sweep.jsonl -o pareto.png
      prestage plot tornado sweep.jsonl -o tornado.png
    """
    from .experiments.insights import InsightError
    from .experiments.journal import sweep_rows
    from .output.charts import CHARTS, plot_sweep
    from .output.figures import FIGURES
    from .output.figures_static import draw
    from .output.plots import check_picture, save
    from .output.saved import load_results
    from .words import unknown_name

    check_picture(out)
    if kind in CHARTS:
        if len(results) != 1:
            raise InputError(f"{kind} is drawn from one journal, and {len(results)} are given")
        try:
            picture = plot_sweep(kind, sweep_rows(results[0]), x=x, by=by, figure=figure or "tokens_per_second")
        except InsightError as error:
            raise InsightError(f"{results[0]}: {error}") from None
    elif kind in FIGURES:
        if x or by or figure:
            raise InputError(f"{kind} is a picture of a run: --x, --by and --figure are for those of a sweep")
        picture = draw(kind, load_results(results))
    else:
        raise InputError(unknown_name("KIND", kind, [*CHARTS, *FIGURES]))
    save(picture, out)
    typer.echo(str(out))


@app.command()
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
    from .output.page import check_page
    from .output.report import write_report
    from .output.saved import load_results

    check_page(out)
    write_report(load_results(results), out, all_spans=all_spans)
    typer.echo(f"{out} (open it in a browser)")


@app.command()
def topology(
    machine: Annotated[
        str, typer.Argument(help="A scenario (a TOML file or a shipped one's name) or a profile (a name, a JSON file).")
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
    from .output.machine import describe, load_links, machine_of, print_machine
    from .output.plots import check_picture, save

    if out is not None:
        check_picture(out)
    data = describe(machine_of(machine), load_links(result) if result is not None else ())
    if out is not None:
        from .output.machine_plot import plot_machine

        save(plot_machine(data), out)
    if json:
        _print_json(data)
        return
    print_machine(data)
    if out is not None:
        typer.echo(str(out))


@app.command()
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
    json: Json = False,
) -> None:
    """Set runs side by side: figures, ratios to the first, and where the time between them arises.

    \b
    Examples:
      prestage compare default default,prefetch.lookahead=0
      prestage compare gpt-oss-20b gpt-oss-20b,copy.discipline=priority --set workload.tokens=50 --plot waterfall.png
    """
    from .experiments.compare import compare as compare_runs
    from .experiments.compare import load_run, waterfall
    from .output.plots import check_picture

    if plot is not None:
        check_picture(plot)
    loaded = {name: load_run(name, settings or ()) for name in runs}
    data = compare_runs(loaded)
    if plot is not None:
        from .output.charts import plot_waterfall
        from .output.plots import save

        first, *others = loaded
        save(plot_waterfall({name: waterfall(loaded[first], loaded[name]) for name in others}, first), plot)
    if json:
        _print_json(data)
        return
    from .output.tables import print_comparison

    print_comparison(data)
    if plot is not None:
        typer.echo(str(plot))


@app.command()
def breakeven(
    scenario: Annotated[str | None, typer.Argument(help="A scenario's TOML file or a shipped one's name.")] = None,
    settings: Settings = None,
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
    from .engine.scenario.scenario import load_scenario
    from .experiments.breakeven import break_even
    from .experiments.grid import parse_grid
    from .output.plots import check_picture

    if plot is not None:
        check_picture(plot)
    options = {"memory.gpu_budget": budgets, "prefetch.lookahead": lookaheads}
    tried = parse_grid(f"{key}={values}" for key, values in options.items() if values)
    with _progress() as progress:
        data = break_even(
            load_scenario(scenario, settings or ()),
            budgets=tried.get("memory.gpu_budget", ()),
            lookaheads=tried.get("prefetch.lookahead", ()),
            workers=workers,
            cluster=cluster,
            progress=progress,
        )
    if plot is not None:
        from .output.charts import plot_break_even
        from .output.plots import save

        save(plot_break_even(data), plot)
    if json:
        _print_json(data)
        return
    from .output.tables import print_break_even

    print_break_even(data)
    if plot is not None:
        typer.echo(str(plot))


@app.command()
def replay(
    trace: Annotated[Path, typer.Argument(help="A trace (.safetensors, .npz) or a log that `trace import` reads.")],
    budget: Annotated[str, typer.Option(help="Room for experts: 4000MiB, 512experts or 25%.")],
    eviction: Annotated[str, typer.Option(help="The eviction policy; a wrong name lists them all.")] = "lru",
    scope: Annotated[
        str,
        typer.Option(help="One pool for all layers (global), one each (per-layer, benefit), or shared experts."),
    ] = "global",
    lookup: Annotated[str, typer.Option(help="Look up unique experts (batch) or every token's (single).")] = "batch",
    batch: Annotated[int, typer.Option(help="How many sequences decode together.")] = 1,
    model: Annotated[str | None, typer.Option(help="The model that gives their bytes: mixtral-8x7b …")] = None,
    expert_bytes: Annotated[str | None, typer.Option(help="Bytes of every expert: 28311552 or 27MiB.")] = None,
    predictor: Annotated[str, typer.Option(help="Whose guesses an eviction policy goes by.")] = "transition",
    lookahead: Annotated[int | None, typer.Option(help="How many layers ahead it guesses; all without it.")] = None,
    json: Json = False,
) -> None:
    """Replay a trace through the expert cache, without a clock: what is found, and how much is read.

    \b
    Examples:
      prestage replay trace.safetensors --budget 25% --model mixtral-8x7b
      prestage replay log.route.csv --budget 4000MiB --json
      prestage replay trace.npz --budget 512experts --scope per-layer --lookup single
    """
    from .engine.replay.replay import replay_trace

    data = replay_trace(
        _open_trace(trace),
        budget,
        eviction=eviction,
        scope=scope,
        lookup=lookup,
        batch=batch,
        model=model,
        expert_bytes=_bytes(expert_bytes),
        predictor=predictor,
        lookahead=lookahead,
    )
    if json:
        _print_json(data)
        return
    from .output.tables import print_replay

    print_replay(data)


@app.command()
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
    from .guide import reproduce as published

    data = published.reproduce(tables or ())
    if json:
        _print_json({"tables": data})
        return
    from .output.tables import print_reproduction

    print_reproduction(data)


@app.command()
def mrc(
    trace: Annotated[Path, typer.Argument(help="A trace (.safetensors, .npz) or a log that `trace import` reads.")],
    capacities: Annotated[
        str, typer.Option(help="Room for experts, with commas between: 10%,4GiB,512experts; evenly spaced without it.")
    ] = "",
    points: Annotated[int, typer.Option(help="How many evenly spaced capacities, up to all experts.")] = 50,
    policies: Annotated[
        str, typer.Option(help="Eviction policies, with commas between; the usual six without it.")
    ] = "",
    scope: Annotated[
        str,
        typer.Option(help="One pool for all layers (global), one each (per-layer, benefit), or layers share experts."),
    ] = "global",
    lookup: Annotated[str, typer.Option(help="Look up unique experts (batch) or every token's (single).")] = "batch",
    batch: Annotated[int, typer.Option(help="How many sequences decode together.")] = 1,
    model: Annotated[str | None, typer.Option(help="The model that gives the experts' bytes.")] = None,
    expert_bytes: Annotated[str | None, typer.Option(help="Bytes of every expert: 28311552 or 27MiB.")] = None,
    out: Annotated[
        list[Path] | None, typer.Option("--out", "-o", help="Write a .csv, .png, .pdf or .svg; repeat it.")
    ] = None,
    json: Json = False,
) -> None:
    """Draw miss-ratio curves: what share of look-ups misses, by how many experts have room and who is evicted.

    Is it the policy, or the working set? Where experts are of one size, and those of a visit fit, `belady` is the
    fewest misses that any policy could have on demand; where sizes differ, another one may have fewer.
    """
    from .engine.replay.miss_ratio import DEFAULT_POLICIES, miss_ratio_curves
    from .output.files import check_miss_ratio_path, write_miss_ratios

    for path in out or ():
        check_miss_ratio_path(path)
    with _progress() as progress:
        data = miss_ratio_curves(
            _open_trace(trace),
            capacities=_listed(capacities),
            points=points,
            policies=_listed(policies) or DEFAULT_POLICIES,
            scope=scope,
            lookup=lookup,
            batch=batch,
            model=model,
            expert_bytes=_bytes(expert_bytes),
            progress=progress,
        )
    for path in out or ():
        write_miss_ratios(data, path)
    if json:
        _print_json(data)
        return
    from .output.tables import print_miss_ratios

    print_miss_ratios(data)
    for path in out or ():
        typer.echo(str(path))


@trace_app.command("info")
def trace_info(
    trace: Annotated[Path, typer.Argument(help="A trace (.safetensors, .npz) or a log that `trace import` reads.")],
    json: Json = False,
) -> None:
    """Describe a trace: its shape, how skewed it is, how much is reused, and LRU hit rates by capacity.

    \b
    Examples:
      prestage trace info trace.safetensors
      prestage trace info log.route.csv --json
    """
    from .workloads.statistics import summary

    data = summary(_open_trace(trace))
    if json:
        _print_json(data)
        return
    from .output.tables import print_trace

    print_trace(data)


@trace_app.command("import")
def trace_import(
    log: Annotated[Path, typer.Argument(help="The log to read.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The trace to write: .safetensors or .npz.")],
    format: Annotated[
        str, typer.Option(help="The log's format, such as jsonl; any other name lists them all.")
    ] = "bigmoeonedge",
    num_experts: Annotated[int | None, typer.Option(help="Experts a layer, where the log does not say it.")] = None,
    layers: Annotated[
        int | None,
        typer.Option(help="MoE layers. A list of plain ids is then all ids of one layer, and not one id a layer."),
    ] = None,
) -> None:
    """Turn an engine's routing log into a trace.

    \b
    Examples:
      prestage trace import log.route.csv -o trace.safetensors
      prestage trace import ids.jsonl --format jsonl --num-experts 16 --layers 3 -o trace.npz
    """
    from .workloads.importers import import_trace
    from .workloads.trace import check_trace_file

    check_trace_file(out)
    trace = import_trace(log, format, num_experts, layers)
    trace.save(out)
    _say_what_is_in(out, trace)


@trace_app.command("record")
def trace_record(
    model: Annotated[str, typer.Option(help="A transformers model: a folder, or a name on the hub.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The trace to write: .safetensors or .npz.")],
    text: Annotated[
        list[Path] | None, typer.Option(help="A file of text to prefill and decode as it stands; repeat it.")
    ] = None,
    prompts: Annotated[
        list[Path] | None, typer.Option(help="A file of prompts, one a line, that the model continues; repeat it.")
    ] = None,
    sequence_tokens: Annotated[int, typer.Option(help="Length of a sequence cut from text.")] = 256,
    prompt_tokens: Annotated[int, typer.Option(help="How many of them are prefilled; the others are decoded.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens that the model adds to a prompt, at most.")] = 64,
    batch: Annotated[int, typer.Option(help="How many sequences run together.")] = 8,
    sequences: Annotated[int | None, typer.Option(help="How many sequences to run at most.")] = None,
    guesses: Annotated[
        int, typer.Option(help="Also record what the routers of so many next layers make of each hidden state.")
    ] = 0,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, …")] = "auto",
) -> None:
    """Run a transformers MoE model over text or prompts and record its routing. Needs prestage\\[record]."""
    from .workloads.run_model import RecordConfig, record_files
    from .workloads.trace import check_trace_file

    check_trace_file(out)
    config = RecordConfig(sequence_tokens, prompt_tokens, new_tokens, batch, sequences, guesses, device)
    with _progress() as progress:
        trace = record_files(model, text or [], prompts or [], config, progress)
    if out.exists():
        _say_replaced(out, "trace")
    trace.save(out)
    _say_what_is_in(out, trace)


@trace_app.command("fit")
def trace_fit(
    trace: Annotated[Path, typer.Argument(help="A trace (.safetensors, .npz) or a log that `trace import` reads.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the generator (.json) or a trace drawn by it (.safetensors or .npz)."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the trace that is drawn and compared.")] = 0,
    json: Json = False,
) -> None:
    """Fit the synthetic generator to a trace, and show how near what it draws comes to it.

    A scenario uses the generator as `fit` in \\[workload.synthetic], `trace synth` with --fit.
    """
    from .files import check_file
    from .workloads.fit import compare, draw_like, fit_routing
    from .workloads.trace import check_trace_file

    if out is not None:
        (check_file if out.suffix == ".json" else check_trace_file)(out)
    real = _open_trace(trace)
    with _progress() as progress:
        fitted = fit_routing(real, progress)
    drawn = draw_like(fitted, real, seed)
    if out is not None:
        (fitted if out.suffix == ".json" else drawn[0]).save(out)
    data = {"model": fitted.model, "seed": seed, "draws": len(drawn), "difference": compare(real, drawn)}
    if json:
        _print_json(data)
        return
    from .output.tables import print_fit

    print_fit(data)


@trace_app.command("synth")
def trace_synth(
    out: Annotated[Path, typer.Option("--out", "-o", help="The trace to write: .safetensors or .npz.")],
    model: Annotated[str, typer.Option(help="The model whose layers, experts and top-k it has.")] = "mixtral-8x7b",
    fit: Annotated[
        Path | None, typer.Option(help="What `trace fit` wrote; then model, skew, working set and reuse mean nothing.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens in all, those of the prompts included.")] = 500,
    skew: Annotated[float, typer.Option(help="Zipf exponent of the experts' popularity; 0 is even.")] = 0.5,
    working_set: Annotated[
        int | None, typer.Option(help="Experts a layer that a sequence favors; all without it.")
    ] = None,
    reuse: Annotated[float, typer.Option(help="Chance that a token keeps an expert of the last one.")] = 0.3,
    sequences: Annotated[int, typer.Option(help="How many sequences.")] = 1,
    prefill_tokens: Annotated[int, typer.Option(help="Prompt tokens of each sequence.")] = 0,
    seed: Annotated[int, typer.Option(help="The seed.")] = 0,
) -> None:
    """Draw a synthetic trace in the shape of a model, whose experts' bytes it names.

    \b
    Examples:
      prestage trace synth -o trace.safetensors
      prestage trace synth --model gpt-oss-20b --tokens 200 --reuse 0.45 --working-set 16 -o trace.npz
    """
    from .workloads.trace import check_trace_file

    check_trace_file(out)
    if fit is not None:
        from .workloads.fitted import FittedRouting

        fitted = FittedRouting.load(fit)
        trace = fitted.synthesize(tokens, sequences=sequences, prefill_tokens=prefill_tokens, seed=seed)
        trace.save(out)
        _say_what_is_in(out, trace)
        return
    from dataclasses import replace

    import numpy as np

    from .workloads.model import load_model
    from .workloads.synthetic import synthesize

    shape = load_model(model)
    trace = synthesize(
        tokens,
        shape.layers,
        shape.experts,
        shape.top_k,
        skew=skew,
        working_set=shape.experts if working_set is None else working_set,
        reuse=reuse,
        sequences=sequences,
        prefill_tokens=prefill_tokens,
        seed=seed,
    )
    sizes = np.array(shape.expert_bytes)
    trace = replace(trace, meta={**trace.meta, "model": shape.name}, extra={"expert_bytes": sizes})
    trace.save(out)
    _say_what_is_in(out, trace)


def _say_replaced(path: Path, what: str) -> None:
    """Tell, on standard error, that what was made before is lost."""
    typer.echo(f"{path}: has a {what} already, which this one replaces", err=True)


def _say_what_is_in(path: Path, trace: RoutingTrace) -> None:
    typer.echo(f"{path}: {trace.tokens} tokens, {trace.layers} layers, top-{trace.k} of {trace.num_experts} experts")
    if "reading" in trace.meta:
        typer.echo(f"{path}: taken so: {trace.meta['reading']} (--layers)")


def _listed(text: str) -> list[str]:
    """Return the words of a comma-separated option."""
    return [word.strip() for word in text.split(",") if word.strip()]


@calibrate_app.command("measure")
def calibrate_measure(
    out: Annotated[Path, typer.Option("--out", "-o", help="The file of samples to write.")] = Path("samples.json"),
    device: Annotated[int, typer.Option(help="Which CUDA GPU.")] = 0,
    quick: Annotated[bool, typer.Option(help="Fewer sizes, one model and two rounds: a minute, not four.")] = False,
    links: Annotated[bool, typer.Option(help="Only what several GPUs of one machine add.")] = False,
) -> None:
    """Measure what copies, kernels and calls take on a CUDA GPU, and keep every sample."""
    from .calibration.cuda import Gpu
    from .calibration.evidence import sample_rows
    from .calibration.measure import FULL, LINKS, PROBES, QUICK, measure
    from .files import check_file

    check_file(out)
    gpu = Gpu(device)
    if links and gpu.count() < 2:
        raise InputError("--links: torch finds one GPU only")
    if out.exists():
        _say_replaced(out, "file")
    with _progress() as progress:
        samples = measure(gpu, QUICK if quick else FULL, progress, LINKS if links else PROBES)
    samples.save(out)
    noisy = sum(row.noisy for row in sample_rows([samples]))
    typer.echo(
        f"{out}: {len(samples.series)} series, {noisy} of them with an interquartile range over 10 % of the median; "
        f"next: prestage calibrate fit {out} -o PROFILE.json"
    )


@calibrate_app.command("fit")
def calibrate_fit(
    samples: Annotated[
        list[Path],
        typer.Argument(help="The samples that `calibrate measure` wrote; further files give what the first lacks."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The profile to write; its name is the file's.")],
    in_schedule: Annotated[
        list[Path] | None,
        typer.Option(
            help="Measured runs, folders of them, or rows (.rows.json): costs as they are inside schedules; repeat it."
        ),
    ] = None,
    topology: Annotated[
        str | None,
        typer.Option(help="A profile whose graph of several GPUs is this machine's: how fast its links are is fitted."),
    ] = None,
    rows_out: Annotated[
        Path | None, typer.Option(help="Also write what the runs show as rows (.rows.json), far smaller than the runs.")
    ] = None,
    json: Json = False,
) -> None:
    """Fit a profile to samples: each cost with how well it predicts the samples that were held back."""
    from .calibration.evidence import check_rows_file, load_schedule, save_rows
    from .calibration.fit import fit, fit_data, write_profile
    from .calibration.samples import load_samples
    from .files import check_file
    from .resources.profile import load_profile

    for path in filter(None, (out, rows_out)):
        check_file(path)
    if rows_out is not None:
        check_rows_file(rows_out)
    rows = load_schedule(in_schedule or ())
    first, *more = (load_samples(path) for path in samples)
    graph = None if topology is None else load_profile(topology).topology
    if topology is not None and graph is None:
        raise InputError(f"--topology {topology}: that profile has no topology")
    fitted = fit(first, out.name.removesuffix(".json"), rows, more, graph)
    if rows_out is not None:
        save_rows(rows, rows_out)
    write_profile(fitted.profile, out)
    if json:
        _print_json(fit_data(fitted))
        return
    from .output.tables import print_calibration

    print_calibration(fit_data(fitted))
    typer.echo(str(out))


@calibrate_app.command("fit-run")
def calibrate_fit_run(
    scenario: Annotated[str, typer.Argument(help="The run's scenario: a TOML file, or a shipped one's name.")],
    log: Annotated[Path, typer.Argument(help="The run's log, token by token (BigMoeOnEdge's --csv).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The profile to write; its name is the file's.")],
    tokens: Annotated[int, typer.Option(help="Fit to so many tokens from the first; no other is looked at.")],
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Fit a drive, its lanes and the compute to the beginning of a published run."""
    from .calibration.fit import write_profile
    from .calibration.published_run import fit_run, fit_text, load_log
    from .engine.scenario.scenario import load_scenario
    from .files import check_file

    check_file(out)
    fitted = fit_run(load_scenario(scenario, settings or ()), load_log(log), tokens, out.name.removesuffix(".json"))
    write_profile(fitted.profile, out)
    if json:
        _print_json(fitted.terms)
        return
    typer.echo(fit_text(fitted, tokens))
    typer.echo(str(out))


@calibrate_app.command("check-run")
def calibrate_check_run(
    scenario: Annotated[str, typer.Argument(help="The run's scenario: a TOML file, or a shipped one's name.")],
    log: Annotated[Path, typer.Argument(help="The run's log, token by token (BigMoeOnEdge's --csv).")],
    after: Annotated[int, typer.Option(help="Compare the tokens after so many, which the profile was fitted to.")],
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Simulate a published run and compare its tokens with the log, and with a straight line in bytes read."""
    from .calibration.published_run import check_run, check_text, load_log
    from .engine.scenario.scenario import load_scenario

    report = check_run(load_scenario(scenario, settings or ()), load_log(log), after)
    if json:
        _print_json(report)
        return
    typer.echo(check_text(report))


@calibrate_app.command("execute")
def calibrate_execute(
    scenarios: Annotated[
        list[str],
        typer.Argument(
            help="TOML files, shipped names, sets (`validation`, `fit`, `two-gpus`, `fit-two-gpus`) or one of a set."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The file to write (.json, .json.gz), or a folder for several scenarios."),
    ],
    device: Annotated[int, typer.Option(help="Which CUDA GPU.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, max=10_000, help="How many repeats; the median one is written.")] = 5,
    all_repeats: Annotated[bool, typer.Option(help="Write the times of all repeats.")] = False,
    profiler: Annotated[
        Path | None, typer.Option(help="Also run once under PyTorch's profiler and write its trace (.json, .json.gz).")
    ] = None,
    settings: Settings = None,
) -> None:
    """Execute scenarios on a CUDA GPU, with the decisions that a simulation makes, timed by CUDA events."""
    from .calibration.execute import chosen_scenarios, execute_all
    from .files import check_file, made_folder

    chosen = chosen_scenarios(scenarios, settings or ())
    single = out.name.endswith((".json", ".json.gz"))
    if single and len(chosen) > 1:
        raise InputError(f"--out {out}: {len(chosen)} scenarios need a folder")
    if profiler is not None and len(chosen) > 1:
        raise InputError(f"--profiler {profiler}: one trace holds one scenario, and {len(chosen)} are to be executed")
    for path in filter(None, (out if single else None, profiler)):
        check_file(path)
    with nullcontext() if single else made_folder(out), _progress() as progress:
        runs = execute_all(
            chosen, device=device, repeats=repeats, keep_all=all_repeats, profile=profiler, progress=progress
        )
        if not single:
            out.mkdir(parents=True, exist_ok=True)
        for run in runs:
            path = out if single else out / f"{run.name}.json.gz"
            run.save(path)
            typer.echo(f"{path}: {run.makespan_ns / 1e6:.3f} ms, spread {run.spread:.2%}, {run.disturbed} disturbed")


@calibrate_app.command("validate")
def calibrate_validate(
    profile: Annotated[str, typer.Option("--profile", help="The profile: a shipped one's name or a JSON file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for validation.json, .md and .png.")],
    scenarios: Annotated[
        list[str] | None, typer.Argument(help="Scenarios, as `execute` takes them; without any, the set `validation`.")
    ] = None,
    measured: Annotated[
        list[Path] | None, typer.Option(help="Measured runs or folders of them, in place of executing; repeat it.")
    ] = None,
    device: Annotated[int, typer.Option(help="Which CUDA GPU executes the scenarios.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, max=10_000, help="How many repeats are executed.")] = 5,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest error of a makespan, unless the machine's own spread is larger.")
    ] = 0.05,
    ablate: Annotated[bool, typer.Option(help="Also simulate with each term of the costs left out.")] = False,
    replicates: Annotated[
        int,
        typer.Option(min=0, max=10_000, help="Also simulate so many times with costs drawn from their uncertainty."),
    ] = 0,
) -> None:
    """Compare simulated with measured makespans; exit status 1 if one is off by more than the tolerance.

    With --measured no GPU is needed.
    """
    from .calibration.execute import chosen_scenarios, execute_all
    from .calibration.measured import load_all
    from .calibration.report import markdown, write_report
    from .calibration.validate import failures, validate
    from .resources.profile import load_profile

    costs = load_profile(profile)
    with _progress() as progress:
        if measured:
            runs = load_all(measured, scenarios or ())
        else:
            chosen = chosen_scenarios(scenarios or ["validation"])
            runs = list(execute_all(chosen, device=device, repeats=repeats, progress=progress))
        report = validate(runs, costs, ablate=ablate, replicates=replicates, progress=progress)
    written = write_report(report, out)
    typer.echo(markdown(report, every_row=True))
    for path in written:
        typer.echo(path)
    failed = failures(report["rows"], tolerance)
    for line in failed:
        typer.echo(line, err=True)
    if failed:
        raise typer.Exit(1)


@benchmark_app.command("transfer")
def benchmark_transfer(
    samples: Annotated[Path | None, typer.Option(help="Samples that `calibrate measure` wrote.")] = None,
    profile: Annotated[str | None, typer.Option(help="A profile: a shipped one's name or a JSON file.")] = None,
    device: Annotated[int | None, typer.Option(help="Measure this CUDA GPU now (without all three: 0).")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A picture of throughput over size to write.")] = None,
    json: Json = False,
) -> None:
    """Copies and allocations as the guide's table has them: one, ten in a row, throughput; for many models' experts."""
    from .calibration import transfer

    if sum(source is not None for source in (samples, profile, device)) > 1:
        raise InputError("--samples, --profile, --device: give one of them")
    if samples is not None:
        from .calibration.samples import load_samples

        report = transfer.from_samples(load_samples(samples))
    elif profile is not None:
        from .resources.profile import load_profile

        report = transfer.from_profile(load_profile(profile))
    else:
        from .calibration.cuda import Gpu
        from .calibration.measure import FULL, TRANSFERS, measure

        gpu = Gpu(device or 0)
        with _progress() as progress:
            report = transfer.from_samples(measure(gpu, FULL, progress, TRANSFERS))
    if out is not None:
        from .output.plots import plot_transfer, save

        save(plot_transfer(report), out)
    if json:
        _print_json(report)
        return
    from .output.tables import print_transfer

    print_transfer(report)
    if out is not None:
        typer.echo(str(out))


Sequences = Annotated[
    str, typer.Option(metavar="FIRST:LAST", help="Which sequences, in file order: 61: or :10 or 3:5; all without it.")
]


@predictor_app.command("train")
def predictor_train(
    trace: Annotated[Path, typer.Argument(help="A trace (.safetensors, .npz) or a log that `trace import` reads.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write the weights to.")],
    sequences: Sequences = ":",
    context: Annotated[int, typer.Option(help="How many tokens it looks back.")] = 3,
    horizons: Annotated[int, typer.Option(help="How many layers ahead it guesses.")] = 3,
    epochs: Annotated[int, typer.Option(help="Passes over the trace, at most.")] = 5,
    held_out: Annotated[float, typer.Option(help="Share of the sequences that decides when to stop.")] = 0.1,
    seed: Annotated[int, typer.Option(help="The seed.")] = 0,
    json: Json = False,
) -> None:
    """Train a predictor on a trace: a small transformer over the experts of the last tokens and layers.

    A scenario uses it with predictor.name=learned and predictor.weights=my-predictor.

    \b
    Examples:
      prestage predictor train trace.safetensors -o my-predictor
      prestage predictor train trace.npz -o my-predictor --sequences :61 --context 4
    """
    from .files import check_file, check_folder
    from .workloads.learned import WEIGHTS_FILE
    from .workloads.predictor_training import Settings, train

    (check_file if out.suffix == ".safetensors" else check_folder)(out)
    settings = Settings(horizons=horizons, context=context, epochs=epochs, held_out=held_out, seed=seed)
    given = _open_trace(trace)
    lessons = given.slice(sequences=given.sequences_in(sequences))
    with _progress() as progress:
        weights = train(lessons, settings, progress)
    if (out / WEIGHTS_FILE).exists() or out.is_file():
        _say_replaced(out, "predictor")
    file = weights.save(out)
    if json:
        about = {"memory_bytes": weights.memory_bytes, "latency_us": weights.latency_us}
        _print_json({"file": str(file), **about, **weights.made})
        return
    losses = ", ".join(f"{loss:.4f}" for loss in weights.made["held_out_loss_nats"])
    typer.echo(f"{file}: {weights.memory_bytes:,} bytes; loss on held-out sequences after each epoch: {losses}")


@predictor_app.command("measure")
def predictor_measure(
    weights: Annotated[Path, typer.Argument(help="Trained weights: a folder or a file.")], json: Json = False
) -> None:
    """Measure what one guess takes on this machine, CPU and GPU, and note it beside the weights; runs charge it.

    Such as `prestage predictor measure my-predictor`, after training on another machine.
    """
    from .workloads.learned import load_weights, measured

    found = measured(load_weights(weights))
    file = found.save(weights)
    if json:
        _print_json({"file": str(file), "latency_us": found.latency_us})
        return
    typer.echo(f"{file}: " + ", ".join(f"{us:,.0f} us on {device}" for device, us in found.latency_us.items()))


@predictor_app.command("evaluate")
def predictor_evaluate(
    trace: Annotated[Path, typer.Argument(help="A trace (.safetensors, .npz) or a log that `trace import` reads.")],
    weights: Annotated[
        list[str] | None, typer.Option(help="Trained weights: a folder, a file or a shipped name; repeat it.")
    ] = None,
    predictor: Annotated[
        list[str] | None,
        typer.Option(help="A predictor's name; repeat it. Without any: all that learn as they go, beside the weights."),
    ] = None,
    sequences: Sequences = ":",
    horizons: Annotated[int, typer.Option(help="How many layers ahead.")] = 3,
    recall: Annotated[list[int] | None, typer.Option(help="The k of recall@k; repeat it.")] = None,
    layers: Annotated[bool, typer.Option(help="Print every layer too.")] = False,
    json: Json = False,
) -> None:
    """Score predictors on a trace: top-1, recall@k, calibration, per layer and horizon, and bounds on top-1.

    Sequences that are not scored run first, so that all predictors have seen them; --weights my-predictor adds a
    trained one.

    \b
    Examples:
      prestage predictor evaluate trace.safetensors
      prestage predictor evaluate trace.npz --predictor transition --recall 4 --recall 8 --json
    """
    from .workloads.predictor_scores import ONLINE, evaluate
    from .workloads.predictors import make_predictor

    asked = {name: make_predictor(name) for name in predictor or ONLINE}
    asked |= {name: make_predictor("learned", weights=name) for name in weights or ()}
    with _progress() as progress:
        data = evaluate(
            _open_trace(trace),
            asked,
            horizons=horizons,
            lengths=recall or (),
            sequences=sequences,
            progress=progress,
        )
    if json:
        _print_json(data)
        return
    from .output.tables import print_predictors

    print_predictors(data, layers=layers)


@timeline_app.command("import")
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
    from .files import check_file
    from .output.profiler_trace import load_timeline, write_imported
    from .output.summary import kernel_costs, timeline_summary

    if out is not None:
        check_file(out)
    imported = load_timeline(trace)
    summary = {**timeline_summary(imported.timeline), "reading": imported.reading.plain()}
    costs = kernel_costs(imported) if kernels or json else []
    if out is not None:
        write_imported(imported, out, title=trace.name)
    if json:
        _print_json({**summary, "kernels": costs})
        return
    from .output.tables import print_kernels, print_timelines

    print_timelines({trace.name: summary})
    if kernels:
        print_kernels(costs)
    if out is not None:
        typer.echo(str(out))


@timeline_app.command("summary")
def timeline_summaries(
    traces: Annotated[list[Path], typer.Argument(help="Traces of PyTorch's profiler, or timelines of ours.")],
    json: Json = False,
) -> None:
    """Show how busy each GPU and host was in one timeline or several, simulated or profiled, side by side.

    Such as `prestage timeline summary prestage-out/timeline.json.gz trace.json.gz`.
    """
    from .output.profiler_trace import load_timeline
    from .output.summary import timeline_summary

    named = {path.name for path in traces}
    names = [path.name if len(named) == len(traces) else str(path) for path in traces]
    summaries = {}
    for name, path in zip(names, traces, strict=True):
        imported = load_timeline(path)
        summaries[name] = {**timeline_summary(imported.timeline), "reading": imported.reading.plain()}
    if json:
        _print_json(summaries)
        return
    from .output.tables import print_timelines

    print_timelines(summaries)


def _bytes(size: str | None) -> int | None:
    """Return the bytes that an option gives, with a unit or without."""
    from .units import option_bytes

    return None if size is None else option_bytes("--expert-bytes", size)


def _open_trace(path: Path) -> RoutingTrace:
    from .workloads.importers import open_trace

    return open_trace(path)


def _print_json(data: dict[str, Any]) -> None:
    import orjson

    from .terminal import print_bytes

    print_bytes(orjson.dumps(data, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY) + b"\n")


@contextmanager
def _progress(log_every_s: float | None = None) -> Iterator[Callable[[str, int, int], None] | None]:
    """Show on standard error how far things are; yield what moves it.

    A person at a terminal sees a bar with an estimate. Elsewhere a line is written every `log_every_s`, or nothing.
    """
    if not sys.stderr.isatty():
        yield None if log_every_s is None else _logged(log_every_s)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def move(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(escape(what), total=total)
            bars.update(tasks[what], completed=done)

        yield move


def _logged(every_s: float) -> Callable[[str, int, int], None]:
    """Return what writes a line on standard error now and then, with an estimate of the time that is left."""
    began: dict[str, tuple[float, int]] = {}
    told = monotonic()

    def move(what: str, done: int, total: int) -> None:
        nonlocal told
        now = monotonic()
        since, before = began.setdefault(what, (now, done))
        if now - told >= every_s and done > before:
            told = now
            left_s = (now - since) / (done - before) * (total - done)
            typer.echo(f"{what}: {done:,} of {total:,}, about {left_s / 60:,.1f} min left", err=True)

    return move
