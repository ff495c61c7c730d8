"""`prestage doctor`: what is installed, what is ready, and what is missing for what."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

import typer

from .console import print_json
from .options import Json

#: What a run needs, and what else is used where it is installed: for what, and by which extra it comes.
NEEDED = (
    "numpy",
    "numba",
    "simpy",
    "pydantic",
    "typer",
    "rich",
    "matplotlib",
    "bokeh",
    "safetensors",
    "joblib",
    "torch",
    "networkx",
    "orjson",
)
EXTRAS: dict[str, tuple[str, str]] = {
    "optuna": ("advise", "advise"),
    "scipy": ("advise: its Gaussian process", "advise"),
    "pandas": ("tables of a run as data frames", "notebook"),
    "pyarrow": ("sweeps as parquet", "parquet"),
    "distributed": ("sweeps on several machines", "cluster"),
    "transformers": ("recording models, calibrate decode", "record"),
    "psutil": ("machine detect: memory and processor", "machine"),
    "py-cpuinfo": ("machine detect: the processor's name", "machine"),
    "mkdocs": ("the pages as a site", "docs"),
}


def doctor(json: Json = False) -> None:
    """Tell what is installed, whether CUDA and the compiled engine are there, and what is missing for what.

    Exit status 2 if something that every run needs is missing.

    \b
    Examples:
      prestage doctor
      prestage doctor --json
    """
    from ..errors import InputError

    data = examined()
    if json:
        print_json(data)
    else:
        _print(data)
    missing = [name for name, version in data["packages"].items() if version is None]
    if missing:
        raise InputError(f"missing: {', '.join(missing)}: install prestage again: pip brings what every run needs")


def examined() -> dict[str, Any]:
    """Returns what `doctor` says as plain data: versions (None: not installed), the engine, caches, CUDA, plug-ins."""
    from .. import plugins
    from ..calibration.device.found import found_cuda
    from ..engine.timing.ready import is_ready
    from ..machine_code import kept_in
    from ..workloads.importers import shipped_traces

    folder = kept_in(is_ready)
    return {
        "prestage": _version("prestage"),
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(terse=True),
        "packages": {name: _version(name) for name in NEEDED},
        "extras": {
            name: {"version": _version(name), "for": what, "extra": extra} for name, (what, extra) in EXTRAS.items()
        },
        "engine": {"compiled": is_ready(), "kept_in": None if folder is None else str(folder)},
        "cuda": found_cuda(),
        "plugins": [plugin.name for plugin in plugins.loaded()],
        "traces": {"shipped": shipped_traces(), "folder": os.environ.get("PRESTAGE_TRACES")},
    }


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _print(data: dict[str, Any]) -> None:
    from ..output.tables.layout import plain_console, print_rows

    console = plain_console()
    engine, cuda = data["engine"], data["cuda"]
    ready = "compiled" if engine["compiled"] else "not compiled yet: `prestage compile`, once, in about a minute"
    gpus = ", ".join(cuda["gpus"]) or f"none ({cuda['why']}): only calibrate and benchmark need one"
    rows = [
        ("prestage", data["prestage"] or "not installed", ""),
        ("Python", data["python"], data["system"]),
        ("engine", "", ready),
        ("machine code in", "", engine["kept_in"] or "nowhere that can be written: compiled anew each time"),
        ("CUDA", cuda["version"] or "-", gpus),
        ("traces", "", f"{', '.join(data['traces']['shipped'])}; PRESTAGE_TRACES = {data['traces']['folder']}"),
    ]
    rows += [("plug-in", "", name) for name in data["plugins"]]
    print_rows(console, "What runs", rows)
    print_rows(console, "What every run needs", [(n, v or "MISSING", "") for n, v in data["packages"].items()])
    extras = [
        (
            name,
            each["version"] or "missing",
            each["for"] if each["version"] else f"{each['for']}: extra {each['extra']}",
        )
        for name, each in data["extras"].items()
    ]
    print_rows(console, "What some commands use", extras)
    typer.echo("\nExit statuses: 0 well, 1 a fault of Prestage, 2 refused in one line")
