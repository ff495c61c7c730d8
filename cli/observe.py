"""`prestage calibrate observe`: from what a runtime took to a file of that runtime's costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .console import print_json
from .options import Json

if TYPE_CHECKING:
    from ..calibration.observe.fit import Fitted
    from ..calibration.observe.logs import Observation
    from ..resources.runtime import Runtime

#: What is fitted where --fit is not given, by how the runtime works; costs that it lacks are left out.
_FITTED = ("step", "layer", "expert", "guess", "cpu_submit", "cpu_cores", "cpu_core", "cpu_stream")


def calibrate_observe(
    logs: Annotated[list[Path], typer.Argument(help="decode.json, llama-bench -o json or jsonl, or CSV.")],
    runtime: Annotated[str, typer.Option(help="The runtime that was run, whose costs are the priors.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The runtime file to write, TOML.")],
    machine: Annotated[str | None, typer.Option(help="The machine: a profile's name or file.")] = None,
    model: Annotated[str | None, typer.Option(help="The model that was run, for logs that do not say it.")] = None,
    fit: Annotated[
        list[str] | None,
        typer.Option(
            help="A cost to fit (layer, step, cpu_submit, …; guess: what a layer that prefetches adds; cpu_cores: what "
            "threads compute, as a factor); repeat it."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="SECTION.KEY=VALUE of all runs; repeat it.")
    ] = None,
    json: Json = False,
) -> None:
    """Fit a few costs of a runtime to what it took, with the shipped runtime's numbers as priors, and write a file.

    Each cost is printed with how far it is known; each setting with what it took, the fit, and what a fit to the others
    alone says of it. `runtime.name = "FILE"` uses the file.
    """
    from ..calibration.observe.fit import GUESS, Predictor, errors, median_worst, runtime_file
    from ..calibration.observe.fit import fit as fitted_to
    from ..calibration.observe.logs import Context, load_logs
    from ..files import check_file, write_file
    from ..output.tables.measured import print_observed

    check_file(out)
    if out.suffix != ".toml":
        raise InputError(f"--out {out}: a runtime file's name ends in .toml")
    observations = load_logs(logs, Context(machine, model, _sections(settings or ())))
    predictor = Predictor(observations, runtime)
    names = fit or _chosen(observations, predictor.runtime)
    fitted = fitted_to(predictor, observations, names)
    about = f"{runtime}, fitted by `prestage calibrate observe` to {', '.join(file.name for file in logs)}"
    write_file(out, runtime_file(fitted, predictor, runtime, (out.stem, about)).encode())
    written = [out]
    if GUESS in fitted.values:
        written.append(out.with_name(f"{out.stem}-prefetch.toml"))
        told = (written[1].stem, f"{about}: with prefetching")
        text = runtime_file(fitted, predictor, runtime, told, guesses=True)
        write_file(written[1], text.encode())
    if json:
        print_json(_plain(observations, fitted))
        return
    print_observed(_plain(observations, fitted))
    middle, worst = median_worst(errors(observations, fitted.left_out))
    typer.echo(f"left out one by one: median error {middle:.1%}, worst {worst:.1%}")
    for one, other in fitted.sums:
        typer.echo(f"{one} and {other} cannot be told apart by these settings: only their sum is known")
    typer.echo(fitted.helps)
    typer.echo(", ".join(map(str, written)))


def _sections(settings: list[str] | tuple[()]) -> dict[str, dict[str, Any]]:
    """Returns sections of keys; numbers as numbers."""
    sections: dict[str, dict[str, Any]] = {}
    for setting in settings:
        key, given, value = setting.partition("=")
        section, dot, name = key.partition(".")
        if not (given and dot and name):
            raise InputError(f"--set {setting}: write it as SECTION.KEY=VALUE")
        try:
            plain: Any = int(value)
        except ValueError:
            try:
                plain = float(value)
            except ValueError:
                plain = value
        sections.setdefault(section, {})[name] = plain
    return sections


def _chosen(observations: list[Observation], runtime: Runtime) -> list[str]:
    """Returns the costs of _FITTED that the runtime has, and that have a part in some setting."""
    costs = {**runtime.costs.given(), **({"cpu_cores": None} if runtime.cpu_cores else {})}
    # With what a thread computes of each dtype, the share of STREAM counts for nothing.
    costs = {name: cost for name, cost in costs.items() if name != "cpu_stream" or not runtime.cpu_cores}
    guesses = any(each.settings.get("prefetch", {}).get("policy", "none") != "none" for each in observations)
    on_cpu = any(each.settings.get("memory", {}).get("cpu_layers") for each in observations)
    names = [name for name in _FITTED if name in costs and (on_cpu or not name.startswith("cpu_"))]
    return [*names, "guess"] if guesses and "layer" in costs else names


def _plain(observations: list[Observation], fitted: Fitted) -> dict[str, Any]:
    costs = {
        name: {"prior": fitted.priors[name], "value": value, "spread_before": fitted.before[name],
               "spread": fitted.after[name]}
        for name, value in fitted.values.items()
    }  # fmt: skip
    rows = [
        {"name": each.name, "model": each.group, "samples": each.samples, "spread": each.spread, "measured_ns": each.ns,
         "fitted_ns": own, "left_out_ns": left_out}
        for each, own, left_out in zip(observations, fitted.predicted, fitted.left_out, strict=True)
    ]  # fmt: skip
    sums = [list(pair) for pair in fitted.sums]
    return {"costs": costs, "settings": rows, "sums": sums, "helps": fitted.helps}
