"""`prestage calibrate decode`: a real model, decoded with its experts in host memory, as the simulator decides."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import print_json, progress_shown
from .options import Json


def calibrate_decode(
    model: Annotated[str, typer.Argument(help="A transformers model's folder or name, or a preset: random weights.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for decode.json and a trace a setting.")],
    gpu_budget: Annotated[
        list[str] | None, typer.Option(help="What experts have of the GPU: 25%, 4GiB, 512experts; repeat it.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences that run together (1); repeat it.")] = None,
    context: Annotated[list[int] | None, typer.Option(help="Tokens of each that are cached (100); repeat it.")] = None,
    prefetch: Annotated[
        list[int] | None, typer.Option(help="Experts a token to prefetch for each layer ahead (0: none); repeat it.")
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BUDGET,BATCH,CONTEXT,PREFETCH,own|recorded",
            help="One setting, in place of all combinations of the options above; repeat it.",
        ),
    ] = None,
    routing: Annotated[
        Path | None, typer.Option(help="A trace whose choices are used in place of the routers', which still run.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to prompt with; without it, random tokens.")] = None,
    tokens: Annotated[int, typer.Option(help="Decode steps of a run.")] = 48,
    warmup: Annotated[int, typer.Option(help="How many of them count in no rate: the memory fills.")] = 16,
    lookahead: Annotated[int, typer.Option(help="How many layers ahead is prefetched.")] = 1,
    predictor: Annotated[
        str, typer.Option(help="gates (the next layers' routers); with --routing also any of the simulator's.")
    ] = "gates",
    eviction: Annotated[str, typer.Option(help="The eviction policy.")] = "lru",
    layers: Annotated[int | None, typer.Option(help="Only the model's first so many layers.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts a token, in place of the model's.")] = None,
    repeats: Annotated[int, typer.Option(help="How many repeats of each setting, in rounds.")] = 7,
    requests: Annotated[
        str | None,
        typer.Option(
            metavar="SCENARIO",
            help="Serve the requests of this scenario in real time, in place of fixed batches; see `calibrate served`.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting laid over the scenario of --requests; repeat it.")
    ] = None,
    deadline: Annotated[float | None, typer.Option(help="Begin no run after so many seconds.")] = None,
    profile: Annotated[str, typer.Option(help="The machine that the scenarios written beside name.")] = "h200-pcie5",
    device: Annotated[int, typer.Option(help="Which CUDA GPU.")] = 0,
    json: Json = False,
) -> None:
    """Decode a model with its experts in host memory and a cache of them on the GPU, and note what it took.

    Attention, routers, KV cache and head are the model's own; the memory manager decides as in a simulation, of which
    each setting's scenario and routing are written.

    With --requests a scenario's server makes the steps as the real clock goes; its trace says the experts. Of the other
    options --layers, --top-k, --repeats, --deadline and --device are meant then.
    """
    from ..calibration.decode.runs import DecodeConfig, Point, decode_all, parse_point, summary
    from ..calibration.device.cuda import Gpu

    if requests is not None:
        serving = (model, requests, tuple(settings or ()), layers, top_k, repeats, deadline)
        _serve(Gpu(device), serving, out, as_json=json)
        return
    from ..output.tables.measured import print_decoded

    if run:
        points = [parse_point(each) for each in run]
    else:
        grid = product(gpu_budget or ["25%"], batch or [1], context or [100], prefetch or [0])
        points = [Point(*each, routing is not None) for each in grid]
    config = DecodeConfig(
        model, points, tokens=tokens, warmup=warmup, lookahead=lookahead, predictor=predictor, eviction=eviction,
        routing=routing, text=text, layers=layers, top_k=top_k, repeats=repeats, deadline_s=deadline, profile=profile,
    )  # fmt: skip
    with progress_shown() as progress:
        report = decode_all(Gpu(device), config, out, progress)
    if json:
        print_json(report)
        return
    print_decoded(summary(report))
    typer.echo(str(out / "decode.json"))


def _serve(gpu: Any, serving: tuple[Any, ...], out: Path, *, as_json: bool) -> None:
    """Serve requests, and say how it went."""
    from ..calibration.decode.serving import ServeConfig, serve_all

    with progress_shown() as progress:
        report = serve_all(gpu, ServeConfig(*serving), out, progress)
    if as_json:
        print_json(report)
        return
    for number, repeat in enumerate(report["repeats"]):
        waits = repeat["requests"]
        typer.echo(
            f"repeat {number}: {len(repeat['steps']):,} steps, TTFT p50 {waits['ttft_ms']['p50']:,.1f} ms, "
            f"ITL p50 {waits['itl_ms']['p50']:,.1f} ms"
        )
    typer.echo(str(out / "served.json"))


def calibrate_served(
    files: Annotated[list[Path], typer.Argument(help="served.json of `calibrate decode --requests`, or its folder.")],
    runtime: Annotated[
        str | None,
        typer.Option(help="The runtime that is simulated, in place of the scenario's: a name or FILE.toml."),
    ] = None,
    json: Json = False,
) -> None:
    """Hold what was served in real time against the simulation: the same steps, and the same requests by its clock.

    Steps are compared one by one, with the very schedule of each repeat. Waits and the order of admissions are those of
    a simulation that schedules by itself.
    """
    from ..calibration.decode.served import compare_served, read_served
    from ..output.tables.requests import print_served

    settings = None if runtime is None else {"runtime": {"name": runtime}}
    compared = [compare_served(read_served(file), settings) for file in files]
    if json:
        print_json({"served": compared})
        return
    for one in compared:
        print_served(one)
