"""`prestage predictor`: predictors of expert choices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import print_json, progress_shown, say_replaced
from .options import Json, Sequences, opened_trace

app = typer.Typer(
    help="""Train, measure and evaluate predictors of expert choices.

    Such as `prestage predictor train trace.safetensors -o my-predictor`.
    """
)


@app.command("train")
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
    from ..files import check_file, check_folder
    from ..workloads.learned import WEIGHTS_FILE
    from ..workloads.predictor_training import Settings, train

    (check_file if out.suffix == ".safetensors" else check_folder)(out)
    settings = Settings(horizons=horizons, context=context, epochs=epochs, held_out=held_out, seed=seed)
    given = opened_trace(trace)
    lessons = given.slice(sequences=given.sequences_in(sequences))
    with progress_shown() as progress:
        weights = train(lessons, settings, progress)
    if (out / WEIGHTS_FILE).exists() or out.is_file():
        say_replaced(out, "predictor")
    file = weights.save(out)
    if json:
        about = {"memory_bytes": weights.memory_bytes, "latency_us": weights.latency_us}
        print_json({"file": str(file), **about, **weights.made})
        return
    losses = ", ".join(f"{loss:.4f}" for loss in weights.made["held_out_loss_nats"])
    typer.echo(f"{file}: {weights.memory_bytes:,} bytes; loss on held-out sequences after each epoch: {losses}")


@app.command("measure")
def predictor_measure(
    weights: Annotated[Path, typer.Argument(help="Trained weights: a folder or a file.")], json: Json = False
) -> None:
    """Measure what one guess takes on this machine, CPU and GPU, and note it beside the weights; runs charge it.

    Such as `prestage predictor measure my-predictor`, after training on another machine.
    """
    from ..workloads.learned import load_weights, measured

    found = measured(load_weights(weights))
    file = found.save(weights)
    if json:
        print_json({"file": str(file), "latency_us": found.latency_us})
        return
    typer.echo(f"{file}: " + ", ".join(f"{us:,.0f} us on {device}" for device, us in found.latency_us.items()))


@app.command("evaluate")
def predictor_evaluate(
    trace: Annotated[Path, typer.Argument(help="A trace (.safetensors, .npz) or a log that `trace import` reads.")],
    weights: Annotated[
        list[str] | None, typer.Option(help="Trained weights: a folder, a file or a shipped name; repeat it.")
    ] = None,
    predictor: Annotated[
        list[str] | None,
        typer.Option(help="A predictor's name; repeat it. Without one, every predictor that learns as it goes."),
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
    from ..workloads.predictor_scores import ONLINE, evaluate
    from ..workloads.predictors import make_predictor

    asked = {name: make_predictor(name) for name in predictor or ONLINE}
    asked |= {name: make_predictor("learned", weights=name) for name in weights or ()}
    with progress_shown() as progress:
        data = evaluate(
            opened_trace(trace),
            asked,
            horizons=horizons,
            lengths=recall or (),
            sequences=sequences,
            progress=progress,
        )
    if json:
        print_json(data)
        return
    from ..output.tables.measured import print_predictors

    print_predictors(data, layers=layers)
