"""Parts as people write them: '2x DDR5-5600', '64GB DDR5-5600', 'pcie4 x16', '7 GB/s', '2x xeon-8480+'.

A rate by itself ('84.5GB/s') is what is reached; what is written as a part has its datasheet's rate, of which `reached`
says how much is. The sizes of memory modules are powers of two under decimal names: '64GB' of memory is 64 GiB.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...units import NUMBER, RATES, amount
from ...words import shown, unknown_name
from .tables import Drive, LinkKind, PartError, find_drive, link_kinds, memory_kinds

#: The parts of a machine, in the order in which its name tells them.
PARTS = ("gpu", "gpus", "link", "cpu", "ram", "drive")
_MODULE_BYTES = {"MB": 2**20, "MiB": 2**20, "GB": 2**30, "GiB": 2**30, "TB": 2**40, "TiB": 2**40}
#: A count that is glued to its part has three digits at most: 7900xtx is a name.
_TIMES = re.compile(r"(\d{1,4})\s*x\s+(.+)|(\d{1,3})x(?=\D)(.+)", re.IGNORECASE)
_LINK = re.compile(r"pci-?e\s*(?:gen)?\s*(\d)(?:\.0)?\s*(?:x\s*(\d{1,2}))?", re.IGNORECASE)
_RAM = re.compile(
    rf"(?:(?P<modules>\d{{1,3}})\s*x(?=[\s\d])\s*)?(?:(?P<size>{NUMBER})\s*(?P<unit>[MGT]i?B)(?!/)\s*)?"
    rf"(?:(?P<channels>\d{{1,3}})\s*x\s*)?(?:(?P<bits>\d{{2,5}})-?bit\s+)?"
    rf"(?:(?P<kind>[A-Z]+\d?[A-Z]?)-(?P<mt>\d{{3,5}})|(?P<rate>{NUMBER}\s*[kKMGT]i?B/s))?",
    re.IGNORECASE,
)
_CORES = re.compile(rf"(\d{{1,4}})\s*cores?(?:\s+(?:at\s+)?({NUMBER})\s*GHz)?", re.IGNORECASE)
_MOST_GHZ = 20


@dataclass(frozen=True)
class Rate:
    """Bytes a second: by a datasheet or, with `given`, what somebody says is reached; `words` say whose it is."""

    bytes_per_second: int
    words: str
    given: bool = False


@dataclass(frozen=True)
class Ram:
    """A host's memory: what it holds (None: not said), and its rate (None: not said either)."""

    capacity_bytes: int | None
    rate: Rate | None
    channels: int | None


def is_of_parts(name: str) -> bool:
    """Returns whether a profile's name tells parts, and is no shipped one's and no file's."""
    return "=" in name and not name.endswith(".json")


def split_parts(name: str) -> dict[str, str]:
    """Returns the parts that a machine's name tells, 'gpu=rtx4090, ram=2x DDR5-5600', by key; PartError if none."""
    parts: dict[str, str] = {}
    for entry in name.split(","):
        key, equals, value = (piece.strip() for piece in entry.partition("="))
        if not equals or not value:
            raise PartError(f"machine {shown(name)}: {entry.strip()!r}: write it as gpu=rtx4090, ram=2x DDR5-5600")
        if key not in PARTS:
            raise PartError(unknown_name(f"machine {shown(name)}: part", key, PARTS))
        if key in parts:
            raise PartError(f"machine {shown(name)}: {key} is given twice")
        parts[key] = value
    return parts


def joined_parts(parts: dict[str, str]) -> str:
    """Returns the name of a machine of these parts, as `split_parts` reads it. Raises PartError."""
    for key, value in parts.items():
        if "," in value or "=" in value or not value.strip():
            raise PartError(f"machine.{key} = {shown(value)}: give one part, without ',' and '='")
    return ", ".join(f"{key}={parts[key].strip()}" for key in PARTS if key in parts)


def times(text: str) -> tuple[int, str]:
    """Returns how many of what '2x rtx3090' says; one of what stands alone."""
    match = _TIMES.fullmatch(text.strip())
    if match is None:
        return 1, text.strip()
    count = int(match[1] or match[3])
    if count < 1:
        raise PartError(f"{shown(text)}: give at least 1x")
    return count, (match[2] or match[4]).strip()


def parse_rate(text: str) -> int | None:
    """Returns the bytes a second of '25.2GB/s'; None for what is no rate."""
    found = amount(text, RATES)
    return None if found is None else int(found)


def figures(number: float) -> int:
    """Returns a number at three figures: no more is known of what a share of a datasheet's rate comes to."""
    return int(float(f"{number:.3g}"))


def parse_link(text: str) -> Rate:
    """Returns what 'pcie4 x16', 'nvlink-c2c' or '25.2GB/s' carries in one direction. Raises PartError."""
    rate = parse_rate(text)
    if rate is not None:
        return Rate(_positive("machine.link", text, rate), f"{text.strip()}, as given", given=True)
    kind, lanes = link_of(text)
    return Rate(kind.lane_bytes_per_second * lanes, f"{written_link(kind, lanes)} ({kind.source})")


def link_of(text: str) -> tuple[LinkKind, int]:
    """Returns the generation and the lanes of 'pcie4 x16' (16 where none are named). Raises PartError."""
    kinds = link_kinds()
    match = _LINK.fullmatch(text.strip())
    name = f"pcie{match[1]}" if match else text.strip().lower()
    if name not in kinds:
        raise PartError(unknown_name("machine.link", text, [*(f"{kind} x16" for kind in kinds), "25.2GB/s"]))
    kind = kinds[name]
    lanes = int(match[2]) if match and match[2] else kind.most_lanes
    if not 1 <= lanes <= kind.most_lanes:
        raise PartError(f"machine.link = {shown(text)}: give x1 to x{kind.most_lanes}")
    return kind, lanes


def written_link(kind: LinkKind, lanes: int) -> str:
    """Returns a link as `link_of` reads it."""
    return f"{kind.name} x{lanes}" if kind.most_lanes > 1 else kind.name


def parse_ram(text: str, *, most_channels: int = 2) -> Ram:
    """Returns the memory of '2x DDR5-5600', '64GB DDR5-5600', '4x16GB DDR4-3200', '64GB 84.5GB/s', '64GB'.

    Without a number of channels, all `most_channels` of the processor are filled; more modules than these share them.
    Raises PartError.
    """
    match = _RAM.fullmatch(text.strip())
    if match is None or not text.strip():
        raise PartError(
            f"machine.ram = {shown(text)}: write it as '2x DDR5-5600', '64GB DDR5-5600', '4x16GB DDR4-3200' or "
            f"'64GB 84.5GB/s'"
        )
    part = match.groupdict()
    units = {unit.lower(): size for unit, size in _MODULE_BYTES.items()}
    modules = int(part["modules"] or 1)
    size_bytes = int(float(part["size"]) * units[part["unit"].lower()]) * modules if part["size"] else None
    if part["rate"]:
        rate = _positive("machine.ram", text, parse_rate(part["rate"]) or 0)
        return Ram(size_bytes, Rate(rate, f"{part['rate'].strip()}, as given", given=True), None)
    if not part["kind"]:
        if size_bytes is None:
            raise PartError(f"machine.ram = {shown(text)}: say what it is, such as '2x DDR5-5600' or '64GB'")
        return Ram(size_bytes, None, None)
    filled = part["channels"] or part["modules"]
    channels = most_channels if filled is None else int(filled)
    if part["size"] and part["modules"] and not part["channels"]:
        channels = min(channels, most_channels)
    return Ram(size_bytes, _memory_rate(text, part, channels), channels)


def _memory_rate(text: str, part: dict[str, str | None], channels: int) -> Rate:
    kinds = {name.upper(): kind for name, kind in memory_kinds().items()}
    name, mt_per_s = str(part["kind"]).upper(), int(part["mt"] or 0)
    if name not in kinds:
        raise PartError(unknown_name(f"machine.ram = {shown(text)}: kind", part["kind"], kinds))
    kind = kinds[name]
    if not kind.least_mt_per_s <= mt_per_s <= kind.most_mt_per_s:
        raise PartError(
            f"machine.ram = {shown(text)}: {kind.name} has {kind.least_mt_per_s} to {kind.most_mt_per_s} MT/s"
        )
    bits = int(part["bits"]) if part["bits"] else kind.channel_bits * channels
    if not 1 <= bits <= 2**16:
        raise PartError(f"machine.ram = {shown(text)}: say how wide it is, such as '256-bit {kind.name}-{mt_per_s}'")
    words = f"{bits} bits of {kind.name}-{mt_per_s}" if part["bits"] else f"{channels} x {kind.name}-{mt_per_s}"
    return Rate(bits * mt_per_s * 10**6 // 8, f"{words} ({kind.source})")


def parse_drive(text: str) -> tuple[int | None, Rate]:
    """Returns what a drive holds (None: not said) and reads: '7 GB/s', '2TB 7GB/s', 'samsung-990-pro'.

    A drive's size is decimal. Raises PartError.
    """
    match = re.fullmatch(rf"(?:({NUMBER})\s*([GT])B\s+)?(.+)", text.strip(), re.IGNORECASE)
    if match is None:
        raise PartError(f"machine.drive = {shown(text)}: write it as '7GB/s', '2TB 7GB/s' or 'samsung-990-pro'")
    capacity = int(float(match[1]) * 10 ** {"G": 9, "T": 12}[match[2].upper()]) if match[1] else None
    rate = parse_rate(match[3])
    if rate is not None:
        return capacity, Rate(_positive("machine.drive", text, rate), f"{match[3].strip()}, as given", given=True)
    drive: Drive = find_drive(match[3])
    return capacity, Rate(drive.bytes_per_second, drive.source)


def parse_cores(text: str) -> tuple[int, float | None] | None:
    """Returns the cores and GHz (None: not said) of '4 cores 2.8GHz'; None for what names a processor. PartError."""
    match = _CORES.fullmatch(text.strip())
    if match is None:
        return None
    cores, ghz = int(match[1]), float(match[2]) if match[2] else None
    if cores < 1 or (ghz is not None and not 0 < ghz <= _MOST_GHZ):
        raise PartError(
            f"machine.cpu = {shown(text)}: give at least one core, of more than 0 and at most {_MOST_GHZ} GHz"
        )
    return cores, ghz


def _positive(key: str, text: str, rate: int) -> int:
    if rate < 1:
        raise PartError(f"{key} = {shown(text)}: must be more than 0")
    return rate
