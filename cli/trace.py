"""`prestage trace`: routing traces."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import print_json, progress_shown, say_replaced
from .options import Json, opened_trace

if TYPE_CHECKING:
    from ..workloads.trace import RoutingTrace

app = typer.Typer(
    help="""Record, import, look at, fit and draw routing traces.

    Such as `prestage trace synth -o trace.safetensors`, then `prestage trace info trace.safetensors`.
    """
)


@app.command("info")
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
    from ..workloads.statistics import summary

    data = summary(opened_trace(trace))
    if json:
        print_json(data)
        return
    from ..output.tables.traces import print_trace

    print_trace(data)


@app.command("import")
def trace_import(
    log: Annotated[Path, typer.Argument(help="The log to read.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The trace to write: .safetensors or .npz.")],
    format: Annotated[
        str,
        typer.Option(
            help="The log's format: rows, arrays, eval-callback, topk-ids, jsonl, guide, bigmoeonedge; or found (auto)."
        ),
    ] = "auto",
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
      prestage trace import rows.csv --num-experts 16 -o trace.safetensors
      prestage trace import ids.jsonl --format jsonl --num-experts 16 --layers 3 -o trace.npz
    """
    from ..workloads.importers import import_trace
    from ..workloads.trace_files import check_trace_file

    check_trace_file(out)
    trace = import_trace(log, format, num_experts, layers)
    trace.save(out)
    _say_what_is_in(out, trace)


@app.command("record")
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
    runners_up: Annotated[
        int, typer.Option(help="Also record so many experts that each router ranked next, for routing.policy.")
    ] = 0,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, …")] = "auto",
) -> None:
    """Run a transformers MoE model over text or prompts and record its routing. Needs prestage\\[record]."""
    from ..workloads.run_model import RecordConfig, record_files
    from ..workloads.trace_files import check_trace_file

    check_trace_file(out)
    config = RecordConfig(sequence_tokens, prompt_tokens, new_tokens, batch, sequences, guesses, device, runners_up)
    with progress_shown() as progress:
        trace = record_files(model, text or [], prompts or [], config, progress)
    if out.exists():
        say_replaced(out, "trace")
    trace.save(out)
    _say_what_is_in(out, trace)


@app.command("fit")
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
    from ..files import check_file
    from ..workloads.fit import compare, draw_like, fit_routing
    from ..workloads.trace_files import check_trace_file

    if out is not None:
        (check_file if out.suffix == ".json" else check_trace_file)(out)
    real = opened_trace(trace)
    with progress_shown() as progress:
        fitted = fit_routing(real, progress)
    drawn = draw_like(fitted, real, seed)
    if out is not None:
        (fitted if out.suffix == ".json" else drawn[0]).save(out)
    data = {"model": fitted.model, "seed": seed, "draws": len(drawn), "difference": compare(real, drawn)}
    if json:
        print_json(data)
        return
    from ..output.tables.traces import print_fit

    print_fit(data)


@app.command("map")
def trace_map(
    trace: Annotated[Path, typer.Argument(help="A trace (.safetensors, .npz), a shipped one, or a log.")],
    model: Annotated[str, typer.Option(help="The model to be driven: a name or a file, as model.preset.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The trace to write: .safetensors or .npz.")],
    seed: Annotated[int, typer.Option(min=0, help="The seed of what is drawn.")] = 0,
) -> None:
    """Make a trace of one model drive another, by a rule that the new trace states.

    It keeps skew and reuse, and has nothing of the other model's own routing: for want of a trace of that model only.

    \b
    Examples:
      prestage trace map guide --model qwen3-30b-a3b -o mapped.safetensors
    """
    from ..workloads.by_layer import of_model
    from ..workloads.mapping import map_trace
    from ..workloads.model import load_model
    from ..workloads.trace_files import check_trace_file

    check_trace_file(out)
    shape = load_model(model)
    opened = opened_trace(trace)
    mapped = of_model(shape, lambda experts, top_k: map_trace(opened, shape.layers, experts, top_k, shape.name, seed))
    mapped.save(out)
    _say_what_is_in(out, mapped)
    typer.echo(f"{out}: mapped: {mapped.meta['mapping']}")


@app.command("synth")
def trace_synth(
    out: Annotated[Path, typer.Option("--out", "-o", help="The trace to write: .safetensors or .npz.")],
    model: Annotated[str, typer.Option(help="The model whose layers, experts and top-k it has.")] = "mixtral-8x7b",
    fit: Annotated[
        Path | None, typer.Option(help="What `trace fit` wrote; then model, skew, working set and reuse mean nothing.")
    ] = None,
    popularity: Annotated[
        Path | None,
        typer.Option(help="Counts by layer and expert, CSV or JSON, of that model; then skew and reuse mean nothing."),
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
      prestage trace synth --model my-model.toml --popularity counts.csv -o trace.npz
    """
    from ..workloads.trace_files import check_trace_file

    check_trace_file(out)
    if fit is not None:
        from ..workloads.fitted import FittedRouting

        fitted = FittedRouting.load(fit)
        trace = fitted.synthesize(tokens, sequences=sequences, prefill_tokens=prefill_tokens, seed=seed)
        trace.save(out)
        _say_what_is_in(out, trace)
        return
    from dataclasses import replace

    import numpy as np

    from ..workloads.by_layer import of_model
    from ..workloads.model import load_model
    from ..workloads.synthetic import synthesize

    shape = load_model(model)
    sizes = np.array(shape.expert_bytes)
    if popularity is not None:
        from ..workloads.popularity import popular_trace

        trace = popular_trace(popularity, shape, tokens, sequences, prefill_tokens, seed)
    else:
        trace = of_model(
            shape,
            lambda experts, top_k: synthesize(
                tokens,
                shape.layers,
                experts,
                top_k,
                skew=skew,
                working_set=experts if working_set is None else working_set,
                reuse=reuse,
                sequences=sequences,
                prefill_tokens=prefill_tokens,
                seed=seed,
            ),
        )
    trace = replace(trace, meta={**trace.meta, "model": shape.name}).with_extra({"expert_bytes": sizes})
    trace.save(out)
    _say_what_is_in(out, trace)


def _say_what_is_in(path: Path, trace: RoutingTrace) -> None:
    typer.echo(f"{path}: {trace.tokens} tokens, {trace.layers} layers, top-{trace.k} of {trace.num_experts} experts")
    if "experts_from" in trace.meta:
        typer.echo(f"{path}: {trace.num_experts} experts by {trace.meta['experts_from']} (--num-experts)")
    if "reading" in trace.meta:
        typer.echo(f"{path}: taken so: {trace.meta['reading']} (--layers)")
