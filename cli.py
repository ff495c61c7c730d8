"""The command line. Each command imports what it needs when it runs, so that `--help` is quick.

Whatever goes wrong with the input ends in one line on standard error and exit status 2; `--json` prints one JSON
object on standard output and nothing else there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

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

# A missing argument, an unknown option and a bad value are all of the class that BadParameter is made from; typer
# gives it no name of its own.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__base__)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]


def main() -> None:
    """Run the command line; bad input is one line and exit status 2."""
    try:
        sys.exit(app(args=sys.argv[1:] or ["--help"], prog_name="prestage", standalone_mode=False))
    except _UsageError as error:
        asked = error.ctx.command_path if error.ctx else "prestage"
        message = f"{error.format_message().rstrip('.')}; `{asked} --help` tells more"
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except ValueError as error:
        message = str(error)
    typer.echo(f"prestage: {' '.join(message.split())}", err=True)
    sys.exit(2)


@app.command()
def run(
    scenario: Annotated[
        str | None, typer.Argument(help="A scenario's TOML file or the name of a shipped one; without it, the default.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a key, such as prefetch.k=4; repeat it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write result.json, timeline.json.gz, timeline.png and memory.png there.")
    ] = None,
    all_spans: Annotated[bool, typer.Option(help="Write all spans to the timeline, not the first 200,000.")] = False,
    baselines: Annotated[bool, typer.Option(help="Also run the two baselines (speedup, resident_ms).")] = True,
    json: Json = False,
) -> None:
    """Simulate a scenario: how fast it decodes, what was hit, late or missed, and where the time went.

    \b
    Examples:
      prestage run --out prestage-out
      prestage run --set prefetch.lookahead=0 --set memory.gpu_budget=50%
      prestage run gpt-oss-20b --set workload.trace=trace.npz --json
      prestage run my-scenario.toml --no-baselines

    The README lists every key; a key or name that does not exist is refused with those that do.
    """
    from .engine.output.files import make_folder, write_result
    from .engine.scenario import load_scenario
    from .engine.simulate import load_inputs, simulate_inputs

    inputs = load_inputs(load_scenario(scenario, settings or ()))
    if out is not None:
        make_folder(out)
    with _progress() as progress:
        result = simulate_inputs(inputs, baselines=baselines, progress=progress)
        written = [] if out is None else write_result(result, out, all_spans=all_spans)
    if json:
        _print_json(result.json_data())
        return
    from .engine.output.tables import print_result

    print_result(result.json_data())
    for line in written:
        typer.echo(line)


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
    expert_bytes: Annotated[int | None, typer.Option(help="Bytes of every expert.")] = None,
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
    from .engine.replay import replay_trace

    data = replay_trace(
        _open_trace(trace),
        budget,
        eviction=eviction,
        scope=scope,
        lookup=lookup,
        batch=batch,
        model=model,
        expert_bytes=expert_bytes,
        predictor=predictor,
        lookahead=lookahead,
    )
    if json:
        _print_json(data)
        return
    from .engine.output.tables import print_replay

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
    from .engine import reproduce as published

    data = published.reproduce(tables or ())
    if json:
        _print_json({"tables": data})
        return
    from .engine.output.tables import print_reproduction

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
    expert_bytes: Annotated[int | None, typer.Option(help="Bytes of every expert.")] = None,
    out: Annotated[
        list[Path] | None, typer.Option("--out", "-o", help="Write a .csv, .png, .pdf or .svg; repeat it.")
    ] = None,
    json: Json = False,
) -> None:
    """Draw miss-ratio curves: what share of look-ups misses, by how many experts have room and who is evicted.

    Is it the policy, or the working set? `belady` is the fewest misses that any policy could have on demand.
    """
    from .engine.miss_ratio import DEFAULT_POLICIES, miss_ratio_curves
    from .engine.output.files import check_miss_ratio_path, write_miss_ratios

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
            expert_bytes=expert_bytes,
            progress=progress,
        )
    for path in out or ():
        write_miss_ratios(data, path)
    if json:
        _print_json(data)
        return
    from .engine.output.tables import print_miss_ratios

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
    from .engine.output.tables import print_trace

    print_trace(data)


@trace_app.command("import")
def trace_import(
    log: Annotated[Path, typer.Argument(help="The log to read.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The trace to write: .safetensors or .npz.")],
    format: Annotated[
        str, typer.Option(help="The log's format, such as jsonl; any other name lists them all.")
    ] = "bigmoeonedge",
    num_experts: Annotated[int | None, typer.Option(help="Experts a layer, where the log does not say it.")] = None,
) -> None:
    """Turn an engine's routing log into a trace.

    \b
    Example:
      prestage trace import log.route.csv -o trace.safetensors
    """
    from .workloads.importers import import_trace

    trace = import_trace(log, format, num_experts)
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
    """Run a transformers MoE model over text or prompts and record its routing. Needs prestage[record]."""
    from .workloads.run_model import RecordConfig, record_files

    config = RecordConfig(sequence_tokens, prompt_tokens, new_tokens, batch, sequences, guesses, device)
    with _progress() as progress:
        trace = record_files(model, text or [], prompts or [], config, progress)
    trace.save(out)
    _say_what_is_in(out, trace)


@trace_app.command("fit")
def trace_fit(
    trace: Annotated[Path, typer.Argument(help="A trace (.safetensors, .npz) or a log that `trace import` reads.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the generator (.json) or a trace drawn by it (.safetensors or .npz)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="The seed of the trace that is drawn and compared.")] = 0,
    json: Json = False,
) -> None:
    """Fit the synthetic generator to a trace, and show how near what it draws comes to it.

    A scenario uses the generator as `fit` in [workload.synthetic], `trace synth` with --fit.
    """
    from .workloads.fit import compare, draw_like, fit_routing

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
    from .engine.output.tables import print_fit

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


def _say_what_is_in(path: Path, trace: RoutingTrace) -> None:
    typer.echo(f"{path}: {trace.tokens} tokens, {trace.layers} layers, top-{trace.k} of {trace.num_experts} experts")


def _listed(text: str) -> list[str]:
    """Return the words of a comma-separated option."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _open_trace(path: Path) -> RoutingTrace:
    from .workloads.importers import open_trace

    return open_trace(path)


def _print_json(data: dict[str, Any]) -> None:
    import orjson

    sys.stdout.write(orjson.dumps(data, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY).decode() + "\n")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """Show a progress bar on standard error where a person is looking; yield what moves it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def move(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield move
