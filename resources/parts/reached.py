"""How much of a datasheet's figure is usually reached, and how far machines differ in it.

All of it is computed: from the profiles of the machines that were measured (`MEASURED`) and from what others have
published (reached.json). Nothing here is typed in.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from ...dtypes import bits_of
from ...units import whole_bytes
from ..profile_costs import TransferCost
from ..scaled_surface import Scale, scaled_surface
from ..surface import Surface
from .kernels import KernelFit, errors, fitted
from .tables import Gpu, PartError, gpus, published
from .written import parse_link, parse_ram, parse_rate

#: The shipped profiles that were measured, and which GPU of the table, on which link, each has.
MEASURED = {"h200": ("h200", "pcie5 x16"), "h100-x2": ("h100", "pcie5 x16")}

#: Up to so many channels of memory belong to a desktop's or a laptop's processor.
DESKTOP_CHANNELS = 2


@dataclass(frozen=True)
class Share:
    """A share of a datasheet's figure: the geometric mean of `values`, and their relative standard deviation."""

    values: tuple[float, ...]

    @property
    def middle(self) -> float:
        """The share that is taken."""
        return math.exp(statistics.fmean(map(math.log, self.values)))

    @property
    def spread(self) -> float:
        """How far one machine is from it, as a relative standard deviation."""
        return statistics.stdev(map(math.log, self.values))


@dataclass(frozen=True)
class MeasuredMachine:
    """A machine that was measured: its profile as plain data, its GPU's datasheet, and what its kernels reach."""

    name: str
    gpu: Gpu
    data: Mapping[str, Any]
    kernels: KernelFit

    @property
    def device(self) -> str:
        """What its profile calls it."""
        return str(self.data["device"])

    @property
    def pinned(self) -> Mapping[str, Any]:
        """Its copies from pinned memory."""
        found: Mapping[str, Any] = self.data["h2d"]["pinned"]
        return found


@cache
def measured(name: str) -> MeasuredMachine:
    """Returns one of the MEASURED machines."""
    text = (resources.files("prestage") / "calibration" / "profiles" / f"{name}.json").read_text("utf-8")
    data, gpu = json.loads(text), gpus()[MEASURED[name][0]]
    return MeasuredMachine(name, gpu, data, fitted(gpu, data["compute"]))


def nearest(gpu: Gpu, without: Iterable[str] = ()) -> MeasuredMachine:
    """Returns the measured machine whose memory rate is nearest, by its ratio; `without` are profiles left out."""
    left = [measured(name) for name in MEASURED if name not in set(without)]
    if not left:
        raise PartError("no measured machine is left to take costs from")
    rate = gpu.memory_bytes_per_second
    return min(left, key=lambda machine: abs(math.log(rate / machine.gpu.memory_bytes_per_second)))


@cache
def _surface(name: str) -> Surface | None:
    found = measured(name).data["compute"].get("surface")
    return None if found is None else Surface.model_validate(found)


def surface_of(gpu: Gpu, without: Iterable[str] = ()) -> Surface | None:
    """Returns the surface of single kernels of the nearest GPU that has one, scaled to another by their datasheets.

    None if none has. It is `assumed`, and off by as much more as kernels are on GPUs put together from others.
    """
    out = set(without) | {name for name in MEASURED if _surface(name) is None}
    if out >= set(MEASURED):
        return None
    machine = nearest(gpu, out)
    surface = _surface(machine.name)
    assert surface is not None
    theirs, ours = machine.gpu.flops_per_second, gpu.flops_per_second
    half = gpu.half_flops_per_second / machine.gpu.half_flops_per_second
    flops = {table.dtype: half for table in surface.products}
    for dtype in flops.keys() & theirs.keys():
        if dtype in ours:
            flops[dtype] = ours[dtype] / theirs[dtype]
        elif bits_of(dtype) < 16:  # it has no such units, and multiplies in 16 bits
            flops[dtype] = gpu.half_flops_per_second / theirs[dtype]
    memory = gpu.memory_bytes_per_second / machine.gpu.memory_bytes_per_second
    return scaled_surface(surface, Scale(machine.device, memory, flops, kernel_spread()))


def link_share(without: Iterable[str] = ()) -> Share:
    """Returns what long copies from pinned memory reach of a link's rate, by measured profiles and published copies."""
    out = set(without)
    values = [
        _queued_rate(measured(name).pinned) / parse_link(link).bytes_per_second
        for name, (_, link) in MEASURED.items()
        if name not in out
    ]
    return Share((*values, *_published("link")))


def pageable_times(machine: MeasuredMachine) -> Share:
    """Returns how many times as fast as a measured machine's copies from pageable memory those of known machines are.

    Of the measured ones, itself among them, and of those that are published: each the geometric mean over the sizes
    that are published.
    """
    rows: dict[str, dict[int, float]] = {}
    for entry in published():
        if entry.what == "pageable":
            rows.setdefault(entry.source, {})[int(str(whole_bytes(entry.of)))] = float(entry.reached)
    sizes = sorted({size for rates in rows.values() for size in rates})
    own = _pageable_rates(machine, sizes)
    known = [_pageable_rates(measured(name), sizes) for name in MEASURED] + list(rows.values())
    ratios = [[math.log(rate / own[size]) for size, rate in rates.items()] for rates in known]
    return Share(tuple(math.exp(statistics.fmean(logs)) for logs in ratios))


def _pageable_rates(machine: MeasuredMachine, sizes: Iterable[int]) -> dict[int, float]:
    """Returns the bytes a second of a machine's copies of such sizes from pageable memory, straight between points."""
    cost = TransferCost.model_validate(machine.data["h2d"]["pageable"]["queued"])
    return {size: size * 1e9 / cost.ns(size) for size in sizes}


def ram_share(channels: int) -> Share:
    """Returns what reading reaches of the datasheet rate of a memory of so many channels, by what is published.

    Desktops' two channels and servers' many are apart: the latter are shared by processors of several dies or sockets,
    whose links to the memory, and not its modules, are often what is slowest.
    """
    rows = [(parse_ram(entry.of), entry.reached) for entry in published() if entry.what == "ram"]
    return Share(
        tuple(
            reached / ram.rate.bytes_per_second
            for ram, reached in rows
            if ram.rate is not None and ((ram.channels or 1) > DESKTOP_CHANNELS) == (channels > DESKTOP_CHANNELS)
        )
    )


def cpu_share() -> Share:
    """Returns what experts on a processor get of the rate that its memory is said to have, by what is published."""
    return Share(tuple(_published("cpu")))


def copy_share(machine: MeasuredMachine) -> float:
    """Returns what long copies within a GPU reach of its memory's rate, for a read and a write of each byte."""
    size_bytes, ns = machine.data["d2d"]["queued"]["points"][-1]
    return float(2 * size_bytes * 1e9 / ns / machine.gpu.memory_bytes_per_second)


def peer_share(machine: MeasuredMachine) -> float:
    """Returns what long copies to another GPU reach of NVLink's rate."""
    size_bytes, ns = machine.data["peer"]["queued"]["points"][-1]
    assert machine.gpu.nvlink_bytes_per_second is not None
    return float(size_bytes * 1e9 / ns / machine.gpu.nvlink_bytes_per_second)


@cache
def kernel_spread() -> float:
    """Returns how far kernels are off, root mean square of log ratios, on each measured GPU put together from others.

    Over every measured group of decoding of each, its own measurements left out.
    """
    logs = [math.log(ratio) for name in MEASURED for _, ratio in foreign_errors(name)]
    return math.sqrt(statistics.fmean(each * each for each in logs))


def foreign_errors(name: str) -> list[tuple[Any, float]]:
    """Returns each measured group of a machine's decoding, and its ratio to that by another machine's measurements."""
    machine = measured(name)
    fit = nearest(machine.gpu, without=(name,)).kernels
    return list(errors(fit, machine.gpu, machine.data["compute"]))


@cache
def transfer_spread(family: str) -> float:
    """Returns how far the durations of a family ('host', 'compute', 'h2d') differ between measured machines.

    The root mean square of the log ratios of the same cost on two of them, over the square root of 2, as of one
    machine from their middle; durations under a microsecond, which are differences of others, count for nothing.
    """
    first, second = (dict(_durations(measured(name).data[family])) for name in MEASURED)
    logs = [math.log(ns / second[place]) for place, ns in first.items() if min(ns, second.get(place, 0)) >= _LEAST_NS]
    return math.sqrt(statistics.fmean(each * each for each in logs) / 2)


_LEAST_NS = 1000


def _durations(part: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Yields (place, ns) of every duration in plain data that does not depend on a size."""
    for key, value in part.items() if isinstance(part, dict) else ():
        if key == "ns":
            yield place, value
        else:
            yield from _durations(value, f"{place}.{key}")


def _queued_rate(copies: Mapping[str, Any]) -> float:
    queued = copies["queued"]
    if "points" not in queued:
        return float(queued["bytes_per_second"])
    size_bytes, ns = queued["points"][-1]
    return float(size_bytes * 1e9 / ns)


def _published(what: str) -> list[float]:
    shares = []
    for entry in published():
        if entry.what == what:
            of = parse_rate(entry.of) or parse_link(entry.of).bytes_per_second
            shares.append(entry.reached / of)
    return shares
