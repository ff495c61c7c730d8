"""The commands of machines: the tables of parts, a machine put together from them, and the one that this runs on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import print_json, say_replaced
from .options import Json
from .own import Cpu, Drive, Gpu, Link, Own, Ram

app = typer.Typer(
    help="""List parts of machines, put a machine together, and look at one.

    Such as `prestage machine show "gpu=rtx4090, ram=64GB DDR5-5600"`.
    """,
    no_args_is_help=True,
)


@app.command("list")
def list_parts(
    kind: Annotated[
        str | None, typer.Argument(help="gpus, cpus, drives, links, memories or profiles; all without it.")
    ] = None,
    json: Json = False,
) -> None:
    """List the parts that machines are put together from, and the shipped profiles.

    \b
    Examples:
      prestage machine list gpus
      prestage machine list --json
    """
    from ..errors import InputError
    from ..output.parts import listed_parts, print_parts
    from ..words import unknown_name

    tables = listed_parts()
    if kind is not None and kind not in tables:
        raise InputError(unknown_name("KIND", kind, tables))
    if json:
        print_json(tables if kind is None else {kind: tables[kind]})
        return
    print_parts(tables, kind)


@app.command("show")
def show(
    machine: Annotated[
        str, typer.Argument(help="A profile (a name, a JSON file), or parts: 'gpu=rtx4090, ram=64GB DDR5-5600'.")
    ],
    json: Json = False,
) -> None:
    """Show what everything costs on a machine, what each cost rests on, and how far off it may be.

    \b
    Examples:
      prestage machine show "gpu=rtx4090, ram=64GB DDR5-5600"
      prestage machine show h200 --json
    """
    from ..output.parts import costs_of, print_costs
    from ..resources.profile import load_profile

    data = costs_of(load_profile(machine))
    if json:
        print_json(data)
        return
    print_costs(data)


@app.command("make")
def make(
    machine: Annotated[
        str | None, typer.Argument(help="Its parts, as `machine show` takes them; options override these.")
    ] = None,
    gpu: Gpu = None,
    cpu: Cpu = None,
    ram: Ram = None,
    link: Link = None,
    drive: Drive = None,
    name: Annotated[str | None, typer.Option(help="What to call it; the file's name without it.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The profile to write, a .json.")] = Path("machine.json"),
) -> None:
    """Put a machine together and write it as a profile, in which every cost can then be changed.

    \b
    Examples:
      prestage machine make --gpu rtx4090 --ram "64GB DDR5-5600" --cpu 7950x -o my.json
      prestage machine make --gpu "2x rtx3090" --ram "128GB DDR4-3200" --link "pcie4 x8" -o two.json
      prestage machine make "gpu=rtx4090, ram=64GB DDR5-5600" -o my.json

    `machine.profile = "my.json"` then runs on it; parts can stand in a scenario too: machine.gpu, machine.ram, ….
    """
    from ..errors import InputError
    from ..files import check_file
    from ..resources.parts.made import write_profile
    from ..resources.parts.written import joined_parts, split_parts

    said = {} if machine is None else split_parts(machine)
    if gpu is None and "gpu" not in said:
        raise InputError("--gpu: missing: name the machine's GPU, such as rtx4090, or none")
    if out.suffix != ".json":
        raise InputError(f"--out = {str(out)!r}: a profile is a .json file")
    check_file(out)
    if out.exists():
        say_replaced(out, "profile")
    parts = {**said, **Own(gpu=gpu, cpu=cpu, ram=ram, link=link, drive=drive).parts()}
    write_profile(joined_parts(parts), name or out.stem, out)
    typer.echo(str(out))


@app.command("detect")
def detect_parts(json: Json = False) -> None:
    """Tell the parts of the machine that this runs on, as `machine.profile` takes them.

    \b
    Examples:
      prestage machine detect
      prestage machine detect --json

    nvidia-smi tells the GPUs; psutil and py-cpuinfo are asked where they are installed (extra `machine`).
    """
    from ..resources.parts.detect import detect

    found = detect()
    if json:
        print_json({"profile": found.name if "gpu" in found.parts else None, **vars(found)})
        return
    typer.echo(found.name)
    for line in found.missing:
        typer.echo(f"not known: {line}")


@app.command("shares")
def print_shares(json: Json = False) -> None:
    """Tell how much of datasheets' figures is usually reached, and how far machines differ in it.

    \b
    Examples:
      prestage machine shares

    All of it is computed: from the measured profiles that ship, and from what others have published.
    """
    from ..output.parts import shares

    rows = shares()
    if json:
        print_json({"shares": rows})
        return
    for row in rows:
        share = "" if row["share"] is None else f"{row['share']:.2f} reached, "
        typer.echo(f"{row['of']}: {share}off by {row['off']:.0%} ({row['machines']} machines)")
