"""Which parts a machine has: what its name tells, and for what it does not tell what goes with the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...words import shown
from .reached import DESKTOP_CHANNELS, Share, cpu_share, link_share, ram_share
from .tables import Cpu, Gpu, PartError, cpus, find_cpu, find_gpu, gpus, link_kinds
from .written import (
    Ram,
    Rate,
    figures,
    link_of,
    parse_cores,
    parse_drive,
    parse_link,
    parse_ram,
    split_parts,
    times,
    written_link,
)

#: A machine without a GPU computes on its processor.
NO_GPU = "none"
_MOST_GPUS = 64
#: Operations a cycle of a core: two multiply-add units over a vector of float32, or a tile product of bfloat16.
_FLOPS_A_CYCLE = {"avx2": 32, "sve2": 32, "avx512": 64, "amx": 2048}
#: What of them kernels are assumed to reach; and the processor that is assumed where none is named.
_FLOPS_SHARE = 0.5
_DEFAULT_CORES, _DEFAULT_GHZ, _DEFAULT_INSTRUCTIONS = 8, 3.5, ("avx2",)
#: A channel of 8 bytes of LPDDR5X-8533.
_CHANNEL_BYTES_PER_SECOND = 68_264_000_000


@dataclass(frozen=True)
class Reach:
    """What is reached of a rate: bytes a second, how far it can be off (relative), and why, in words.

    `most_bytes_per_second` is the rate itself, which nothing exceeds.
    """

    bytes_per_second: int
    spread: float
    words: str
    most_bytes_per_second: int


@dataclass(frozen=True)
class Processor:
    """The processors of a machine together, in words, with the operations a second that they reach."""

    title: str
    flops_per_second: int
    words: str
    memory: str | None
    pcie: int | None
    cores: int | None = None


@dataclass(frozen=True)
class Chosen:
    """A machine's parts; `gpu` None computes on the processor. Rates that nobody can know are None."""

    name: str
    gpu: Gpu | None
    count: int
    link: Reach | None
    processor: Processor
    ram: Ram
    ram_reach: Reach | None
    cpu_reach: Reach | None
    drive: tuple[int | None, Rate] | None

    @property
    def title(self) -> str:
        """The parts in words."""
        several = f"{self.count} x " if self.count > 1 else ""
        words = [several + self.gpu.title] if self.gpu is not None else []
        words += [self.processor.title] if self.processor.title else []
        rate = self.ram.rate
        words += [rate.words.partition(" (")[0]] if rate is not None else []
        return ", ".join(words)

    @property
    def copies(self) -> Reach:
        """What copies from the host to a GPU reach: its link, or the host's memory if that is slower."""
        assert self.link is not None
        ram = self.ram_reach
        return ram if ram is not None and ram.bytes_per_second < self.link.bytes_per_second else self.link


def choose(name: str, without: Iterable[str] = ()) -> Chosen:
    """Returns the parts of a machine by its name, 'gpu=rtx4090, ram=2x DDR5-5600'. Raises PartError.

    `without` are measured profiles that say nothing of what is reached.
    """
    given = split_parts(name)
    if "gpu" not in given:
        raise PartError(f"machine {shown(name)}: name its gpu, such as rtx4090, or gpu={NO_GPU}")
    count, gpu = _gpus(given)
    processor, sockets_memory = _processor(given.get("cpu"))
    ram = _ram(given.get("ram"), sockets_memory)
    if gpu is None and (ram.capacity_bytes is None or ram.rate is None):
        raise PartError(
            f"machine {shown(name)}: gpu={NO_GPU} computes on the processor: give ram with its size and its kind, "
            "'64GB DDR5-5600'"
        )
    rate, channels = _read_by_processor(ram, gpu)
    if rate is None:
        ram_reach = cpu_reach = None
    else:
        ram_reach, share = _reach(rate, ram_share(channels)), cpu_share()
        of = rate.bytes_per_second
        cpu_reach = Reach(figures(of * share.middle), share.spread, f"{share.middle:.2f} of {rate.words}", of)
    link = None if gpu is None or gpu.unified else _reach(_link(given.get("link"), gpu, processor), link_share(without))
    if link is None and "link" in given:
        raise PartError(f"machine.link = {shown(given['link'])}: {given['gpu']} has the host's memory, and no link")
    drive = parse_drive(given["drive"]) if "drive" in given else None
    if count > 1 and ram.capacity_bytes is None:
        raise PartError(f"machine {shown(name)}: with {count} GPUs, say what the host's memory holds: 128GB DDR5-5600")
    return Chosen(name, gpu, count, link, processor, ram, ram_reach, cpu_reach, drive)


def _gpus(given: dict[str, str]) -> tuple[int, Gpu | None]:
    count, name = times(given["gpu"])
    if "gpus" in given:
        if not given["gpus"].isdecimal():
            raise PartError(f"machine.gpus = {shown(given['gpus'])}: give a number")
        if count > 1 and count != int(given["gpus"]):
            raise PartError(f"machine.gpus = {given['gpus']}: machine.gpu says {count}x already: give one of them")
        count = int(given["gpus"])
    if not 1 <= count <= _MOST_GPUS:
        raise PartError(f"machine.gpus = {count}: give 1 to {_MOST_GPUS}")
    if name.lower() in ("cpu", "no gpu"):
        raise PartError(f"machine.gpu = {shown(name)}: without a GPU, set machine.gpu = '{NO_GPU}'")
    if name == NO_GPU:
        gpu = None
    elif name.lower() in cpus() and name.lower() not in gpus():
        raise PartError(f"machine.gpu = {shown(name)}: is a processor: set machine.cpu, and machine.gpu = '{NO_GPU}'")
    else:
        gpu = find_gpu(name)
    if count > 1 and (gpu is None or gpu.unified):
        raise PartError(f"machine.gpus = {count}: {name} is one with the host's memory: give 1")
    return count, gpu


def _processor(text: str | None) -> tuple[Processor, str | None]:
    """Returns the processors, and the memory that fills all their channels if that is known."""
    sockets, name = times(text) if text is not None else (1, "")
    cores = parse_cores(name)
    if text is None or cores is not None:
        count, ghz = cores if cores is not None else (_DEFAULT_CORES, None)
        title = f"{sockets * count} cores" if cores is not None else ""
        flops, words = _flops(sockets * count, ghz or _DEFAULT_GHZ, _DEFAULT_INSTRUCTIONS)
        known = sockets * count if cores is not None else None
        return Processor(title, flops, f"{words}, assumed", None, None, known), None
    cpu: Cpu = find_cpu(name)
    flops, words = _flops(sockets * cpu.cores, cpu.ghz, cpu.instructions)
    title = f"{sockets} x {cpu.title}" if sockets > 1 else cpu.title
    processor = Processor(title, flops, f"{words} ({cpu.source})", cpu.memory, cpu.pcie, sockets * cpu.cores)
    return processor, _filled(cpu.memory, sockets)


def _filled(memory: str, sockets: int) -> str:
    """Returns the memory of so many sockets, as `parse_ram` reads it."""
    channels, kind = times(memory)
    if sockets == 1 or kind == memory:
        return memory
    return f"{channels * sockets}x {kind}"


def _flops(cores: int, ghz: float, instructions: tuple[str, ...]) -> tuple[int, str]:
    best = max(instructions, key=lambda name: _FLOPS_A_CYCLE[name])
    flops = cores * ghz * 1e9 * _FLOPS_A_CYCLE[best] * _FLOPS_SHARE
    return figures(flops), f"{_FLOPS_SHARE:g} of {cores} cores x {ghz:g} GHz x {_FLOPS_A_CYCLE[best]} ({best})"


def _ram(text: str | None, filled: str | None) -> Ram:
    if text is None:
        return parse_ram(filled) if filled is not None else Ram(None, None, None)
    channels = parse_ram(filled).channels if filled is not None else None
    ram = parse_ram(text, most_channels=channels or 2)
    if channels is not None and ram.channels is not None and ram.channels > channels:
        raise PartError(
            f"machine.ram = {shown(text)}: the processor has {channels} channels (modules: 4x16GB DDR5-5600)"
        )
    if ram.rate is None and filled is not None:
        return Ram(ram.capacity_bytes, parse_ram(filled).rate, channels)
    return ram


def _read_by_processor(ram: Ram, gpu: Gpu | None) -> tuple[Rate | None, int]:
    """Returns the rate and the channels of what the processor reads; a GPU with the host's memory states them, too."""
    if ram.rate is not None or gpu is None or not gpu.unified:
        return ram.rate, ram.channels or DESKTOP_CHANNELS
    of = gpu.memory_bytes_per_second
    return Rate(of, f"the {of / 1e9:,.0f} GB/s of {gpu.title}"), -(-of // _CHANNEL_BYTES_PER_SECOND)


def _link(text: str | None, gpu: Gpu, processor: Processor) -> Rate:
    assert gpu.link is not None
    kind, lanes = link_of(gpu.link)
    if text is not None:
        said = parse_link(text)
        if not said.given and link_of(text)[0].kind not in ("pcie", kind.kind):
            raise PartError(
                f"machine.link = {shown(text)}: {gpu.name} is not on one: give {gpu.link}, or '25GB/s' as reached"
            )
        return said
    slower = f"pcie{processor.pcie}"
    if kind.kind == "pcie" and processor.pcie is not None and slower in link_kinds():
        kind = min(kind, link_kinds()[slower], key=lambda each: each.lane_bytes_per_second)
    return parse_link(written_link(kind, lanes))


def _reach(rate: Rate, share: Share) -> Reach:
    if rate.given:
        return Reach(rate.bytes_per_second, 0.0, rate.words, rate.bytes_per_second)
    words = f"{share.middle:.2f} of {rate.words}"
    return Reach(figures(rate.bytes_per_second * share.middle), share.spread, words, rate.bytes_per_second)
