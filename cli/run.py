"""The commands of single runs: `run`, and `replay` and `mrc` of the cache alone."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import print_json, progress_shown, say_replaced
from .options import (
    Json,
    Lookahead,
    Predictor,
    Recall,
    ScenarioName,
    Settings,
    Weights,
    expert_bytes_of,
    listed,
    opened_trace,
)
from .own import NOTHING, Own, takes_own

if TYPE_CHECKING:
    from ..engine.scenario.scenario import Scenario


@takes_own
def run(
    scenario: ScenarioName = None,
    settings: Settings = None,
    own: Own = NOTHING,
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
        str | None,
        typer.Option(help="What carries the run out: compiled, or simpy, the reference: same numbers."),
    ] = None,
    bench: Annotated[bool, typer.Option("--bench", help="Run pp512 and tg128 of it, as llama-bench has them.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tell why, of every warning.")] = False,
    json: Json = False,
) -> None:
    """Simulate a scenario: how fast it decodes, what was hit, late or missed, and where the time went.

    \b
    Examples:
      prestage run --out prestage-out
      prestage run --model gpt-oss-120b --gpu rtx4090 --ram "64GB DDR5-5600"
      prestage run gpt-oss-20b --gpu rtx3060 --ram "2x DDR4-3200" --runtime llama.cpp --bench
      prestage run --set prefetch.lookahead=0 --set memory.gpu_budget=25%
      prestage run gpt-oss-20b --set workload.trace=trace.npz --json
      prestage run my-scenario.toml --no-baselines --check-prefetch

    `prestage show` tells what would run; docs/scenario.md lists every key.
    """
    with progress_shown():
        from ..engine.load import load_inputs
        from ..engine.run import NOT_COMPILED, engine_for
        from ..engine.scenario.scenario import load_scenario
        from ..engine.simulate import simulate_inputs
        from ..engine.timing.ready import make_ready
        from ..files import check_folder, made_folder
        from ..output.run_folder import write_result

        chosen = load_scenario(*own.given(scenario, settings))
        inputs = None if bench else load_inputs(chosen)
    if inputs is None:
        _bench(chosen, json)
        return
    if out is not None:
        check_folder(out)
    with nullcontext() if stream is None else made_folder(stream, keep=False), progress_shown() as progress:
        if engine_for(inputs, engine).engine == "compiled":
            make_ready(progress)
        result = simulate_inputs(
            inputs,
            baselines=baselines,
            check_prefetch=check_prefetch,
            replicates=replicates,
            progress=progress,
            stream=stream,
            engine=engine,
        )
        result.draw_range(progress)
        if out is not None and (out / "result.json").exists():
            say_replaced(out, "run")
        written = [] if out is None else write_result(result, out, all_spans=all_spans)
    if result.engine.why == NOT_COMPILED and sys.stderr.isatty():
        typer.echo(f"by SimPy ({NOT_COMPILED}): `prestage compile` makes runs many times faster", err=True)
    if json:
        print_json(result.json_data())
        return
    from ..output.tables.runs import print_result

    print_result(result.json_data(), verbose)
    for line in written:
        typer.echo(line)


def _bench(scenario: Scenario, json: bool) -> None:
    """Run and print what llama-bench would measure of a scenario."""
    from ..experiments.bench import bench

    with progress_shown() as progress:
        data = bench(scenario, progress=progress)
    if json:
        print_json(data)
        return
    from ..output.tables.runs import print_bench

    print_bench(data)


def compile_engine() -> None:
    """Compile the engine, once after installation, so that runs go by machine code and not by SimPy; it takes a minute.

    \b
    Examples:
      prestage compile
    """
    from ..engine.timing.ready import make_ready

    with progress_shown() as progress:
        make_ready(progress)
    typer.echo("the engine is compiled")


def replay(
    trace: Annotated[Path, typer.Argument(help="A trace (.safetensors, .npz) or a log that `trace import` reads.")],
    budget: Annotated[str, typer.Option(help="Room for experts: 4000MiB, 512experts or 25%.")],
    eviction: Annotated[str, typer.Option(help="The eviction policy, of `prestage list evictions`.")] = "lru",
    scope: Annotated[
        str,
        typer.Option(help="One pool for all layers (global), one each (per-layer, benefit), or shared experts."),
    ] = "global",
    lookup: Annotated[str, typer.Option(help="Look up unique experts (batch) or every token's (single).")] = "batch",
    batch: Annotated[int, typer.Option(help="How many sequences decode together.")] = 1,
    model: Annotated[str | None, typer.Option(help="The model that gives their bytes: mixtral-8x7b …")] = None,
    expert_bytes: Annotated[str | None, typer.Option(help="Bytes of every expert: 28311552 or 27MiB.")] = None,
    predictor: Predictor = "transition",
    lookahead: Lookahead = None,
    weights: Weights = None,
    recall: Recall = None,
    json: Json = False,
) -> None:
    """Replay a trace through the expert cache, without a clock: what is found, and how much is read.

    \b
    Examples:
      prestage replay trace.safetensors --budget 25% --model mixtral-8x7b
      prestage replay log.route.csv --budget 4000MiB --json
      prestage replay trace.npz --budget 512experts --scope per-layer --lookup single
    """
    with progress_shown():
        from ..engine.replay.replay import replay_trace

        data = replay_trace(
            opened_trace(trace),
            budget,
            eviction=eviction,
            scope=scope,
            lookup=lookup,
            batch=batch,
            model=model,
            expert_bytes=expert_bytes_of(expert_bytes),
            predictor=predictor,
            lookahead=lookahead,
            weights=weights,
            recall=recall,
        )
    if json:
        print_json(data)
        return
    from ..output.tables.traces import print_replay

    print_replay(data)


def mrc(
    traces: Annotated[
        list[Path], typer.Argument(help="Traces (.safetensors, .npz) or logs that `trace import` reads: a panel each.")
    ],
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
    predictor: Predictor = "transition",
    lookahead: Lookahead = None,
    weights: Weights = None,
    recall: Recall = None,
    out: Annotated[
        list[Path] | None, typer.Option("--out", "-o", help="Write a .csv, .png, .pdf or .svg; repeat it.")
    ] = None,
    json: Json = False,
) -> None:
    """Draw miss-ratio curves: what share of look-ups misses, by how many experts have room and who is evicted.

    Is it the policy, or the working set? Where experts are of one size, and those of a visit fit, `belady` is the
    fewest misses that any policy could have on demand; where sizes differ, another one may have fewer.

    \b
    Examples:
      prestage mrc trace.safetensors --policies lru,s3fifo,belady -o curves.png
      prestage mrc trace.npz --policies lru,predictive,belady --predictor oracle --recall 0.8 --lookahead 3
    """
    from ..engine.replay.miss_ratio import DEFAULT_POLICIES, miss_ratio_curves
    from ..output.run_folder import check_miss_ratio_path, write_miss_ratios

    for path in out or ():
        check_miss_ratio_path(path)
    curves = []
    for trace in traces:
        with progress_shown() as progress:
            data = miss_ratio_curves(
                opened_trace(trace),
                capacities=listed(capacities),
                points=points,
                policies=listed(policies) or DEFAULT_POLICIES,
                scope=scope,
                lookup=lookup,
                batch=batch,
                model=model,
                expert_bytes=expert_bytes_of(expert_bytes),
                predictor=predictor,
                lookahead=lookahead,
                weights=weights,
                recall=recall,
                progress=progress,
            )
        curves.append(data if len(traces) == 1 else {"trace": str(trace), **data})
    for path in out or ():
        write_miss_ratios(curves, path)
    if json:
        print_json(curves[0] if len(curves) == 1 else {"traces": curves})
        return
    from ..output.tables.traces import print_miss_ratios

    for data in curves:
        print_miss_ratios(data)
    for path in out or ():
        typer.echo(str(path))
