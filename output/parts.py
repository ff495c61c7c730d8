"""Machines from parts, in the terminal: the tables of parts, and what each cost of a machine is and rests on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from rich.table import Table
from rich.text import Text

from ..resources.facts import Fact
from ..resources.parts.reached import DESKTOP_CHANNELS, cpu_share, kernel_spread, link_share, ram_share, transfer_spread
from ..resources.parts.tables import cpus, drives, gpus, link_kinds, memory_kinds
from ..resources.profile import Profile, profile_names
from .tables.layout import plain_console

#: So many costs of a kind are told one by one; of measured points their number is.
_FEW = 12
_SHOWN_FIRST = ("gpu_memory_bytes", "h2d", "d2h", "peer", "compute", "host", "nvme", "contention")


def listed_parts() -> dict[str, Any]:
    """Returns the tables of parts, and the shipped profiles, as plain data: a list of rows for each kind."""
    kinds: dict[str, Mapping[str, BaseModel]] = {"gpus": gpus(), "cpus": cpus(), "drives": drives()}
    kinds |= {"links": link_kinds(), "memories": memory_kinds()}
    tables: dict[str, Any] = {
        kind: [row.model_dump(exclude_defaults=True) for row in table.values()] for kind, table in kinds.items()
    }
    return {**tables, "profiles": profile_names()}


def print_parts(tables: Mapping[str, Any], kind: str | None) -> None:
    """Print the tables of parts, or that of one kind."""
    columns = {
        "gpus": ("name", "title", "GB", "GB/s", "16-bit TFLOP/s", "link"),
        "cpus": ("name", "title", "cores", "GHz", "memory", "pcie"),
        "drives": ("name", "title", "GB/s"),
        "links": ("name", "GB/s a lane", "lanes"),
        "memories": ("name", "MT/s", "bits a channel"),
        "profiles": ("name",),
    }
    rows = {"gpus": _gpu_rows, "cpus": _cpu_rows, "drives": _drive_rows, "links": _link_rows, "memories": _memory_rows}
    for name, headings in columns.items():
        if kind in (None, name):
            made = rows[name]() if name in rows else [(profile,) for profile in tables["profiles"]]
            _print(f"{len(made)} {name}", headings, made)


def costs_of(profile: Profile) -> dict[str, Any]:
    """Returns a machine as plain data: its name and memory, and of each cost what it is, what it rests on, its error.

    `off` is the relative standard deviation that replicates draw from; None where nothing is said of it.
    """
    costs = [
        {
            "cost": place,
            "value": _value(cost),
            "source": cost.provenance,
            "off": _off(cost),
            "note": cost.note,
        }
        for place, cost in _costs(profile, "")
    ]
    return {
        "profile": profile.name,
        "device": profile.device,
        "source": profile.source,
        "gpu_memory_bytes": profile.gpu_memory_bytes,
        "costs": costs,
    }


def print_costs(data: Mapping[str, Any]) -> None:
    """Print what `costs_of` returned."""
    console = plain_console()
    console.print(Text(f"{data['profile']}: {data['device']}"))
    console.print(Text(data["source"]))
    rows = [
        (cost["cost"], cost["value"], "-" if cost["off"] is None else f"{cost['off']:.0%}", cost["source"])
        for cost in data["costs"]
    ]
    _print(f"{len(rows)} costs", ("cost", "value", "off by", "source"), rows)


def shares() -> list[dict[str, Any]]:
    """Returns what is usually reached of datasheets' figures, how far machines differ in it and of how many that is."""
    found = [
        ("link", link_share()),
        (f"host memory, up to {DESKTOP_CHANNELS} channels", ram_share(DESKTOP_CHANNELS)),
        ("host memory, more channels", ram_share(DESKTOP_CHANNELS + 1)),
        ("experts on the CPU, of host memory", cpu_share()),
    ]
    rows: list[dict[str, Any]] = [
        {"of": name, "share": share.middle, "off": share.spread, "machines": len(share.values)} for name, share in found
    ]
    spreads = [("kernels of decoding", kernel_spread())]
    spreads += [(f"durations of {family}", transfer_spread(family)) for family in ("host", "compute", "h2d")]
    return [*rows, *({"of": name, "share": None, "off": off, "machines": 2} for name, off in spreads)]


def _gpu_rows() -> list[tuple[str, ...]]:
    return [
        (
            gpu.name,
            gpu.title,
            f"{gpu.memory_bytes / 1e9:.0f}",
            f"{gpu.memory_bytes_per_second / 1e9:,.0f}",
            f"{gpu.half_flops_per_second / 1e12:,.1f}",
            gpu.link or "the host's memory",
        )
        for gpu in gpus().values()
    ]


def _cpu_rows() -> list[tuple[str, ...]]:
    return [(cpu.name, cpu.title, str(cpu.cores), f"{cpu.ghz:g}", cpu.memory, str(cpu.pcie)) for cpu in cpus().values()]


def _drive_rows() -> list[tuple[str, ...]]:
    return [(drive.name, drive.title, f"{drive.bytes_per_second / 1e9:g}") for drive in drives().values()]


def _link_rows() -> list[tuple[str, ...]]:
    return [
        (link.name, f"{link.lane_bytes_per_second / 1e9:.3f}", str(link.most_lanes)) for link in link_kinds().values()
    ]


def _memory_rows() -> list[tuple[str, ...]]:
    return [
        (kind.name, f"{kind.least_mt_per_s} to {kind.most_mt_per_s}", str(kind.channel_bits or "as given"))
        for kind in memory_kinds().values()
    ]


def _costs(part: BaseModel, place: str) -> Iterator[tuple[str, Fact]]:
    """Yields (place, cost) of every cost; of many measured points of a kind, none."""
    names = list(type(part).model_fields)
    if isinstance(part, Profile):
        names.sort(key=lambda name: _SHOWN_FIRST.index(name) if name in _SHOWN_FIRST else len(_SHOWN_FIRST))
    for name in names:
        value = getattr(part, name)
        here = f"{place}.{name}" if place else name
        entries: Iterable[tuple[str, Any]] = [("", value)]
        if isinstance(value, dict):
            entries = value.items()
        elif isinstance(value, Sequence) and not isinstance(value, str):
            entries = [(str(number), entry) for number, entry in enumerate(value)] if len(value) <= _FEW else []
        for key, entry in entries:
            if isinstance(entry, Fact):
                yield f"{here}.{key}".rstrip("."), entry
            if isinstance(entry, BaseModel):
                yield from _costs(entry, f"{here}.{key}".rstrip("."))


def _value(cost: Fact) -> str:
    """Returns the numbers of a cost in words, the first few."""
    numbers = cost.model_dump(exclude_none=True, exclude={"source", "note", "device", "samples", "uncertainty"})
    words = [_number(name, value) for name, value in numbers.items() if isinstance(value, int | float) and value]
    if "points" in numbers:
        size_bytes, ns = numbers["points"][-1]
        words = [f"{size_bytes * 1e9 / ns / 1e9:.1f} GB/s of long copies" if ns else "no time"]
    return ", ".join(words[:4]) or "0"


def _number(name: str, value: float) -> str:
    if name.endswith("bytes_per_second"):
        return f"{value / 1e9:,.1f} GB/s"
    if name.endswith("flops_per_second"):
        return f"{value / 1e12:,.1f} TFLOP/s"
    if name.endswith("_bytes"):
        return f"{value / 2**30:,.1f} GiB"
    if name == "ns" or name.endswith("_ns"):
        what = name.removesuffix("ns").strip("_").replace("_", " ")
        return f"{value / 1e3:,.2f} us {what}".rstrip()
    return f"{value:g} x" if name.endswith("factor") else f"{name} {value:g}"


def _off(cost: Fact) -> float | None:
    uncertainty = getattr(cost, "uncertainty", None)
    if uncertainty is None:
        return None
    return round(math.hypot(uncertainty.run_spread, uncertainty.held_back_error), 4)


def _print(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    console = plain_console()
    console.print()
    console.print(Text(title))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)
