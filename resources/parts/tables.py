"""The tables of parts, read once, and how a part is found by the name that people give it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Literal, TypeVar

from pydantic import Field, model_validator

from ...errors import InputError
from ...words import did_you_mean, shown, unknown_name
from ..facts import Bytes, BytesPerSecond, FlopsPerSecond, Part

#: No GPU's memory is as slow: a number without its unit.
LEAST_BYTES_PER_SECOND = 10**9


class PartError(InputError):
    """A part that no table has, or that is written in a way that says nothing; the message says what would do."""


class Listed(Part):
    """One line of a table: what a part is called, in full too, and the document that its numbers come from.

    `driver_names` are what the driver calls it, where that is another name.
    """

    name: str
    title: str
    source: str
    driver_names: tuple[str, ...] = ()


class Gpu(Listed):
    """A GPU by its datasheet: operations a second by dtype are dense; `link` is its host interface.

    `pcie_peer`: whether GPUs of this kind read each other's memory over PCIe. `nvlink_bytes_per_second` is one
    direction's, to all others through a switch. `unified`: it has the host's memory and no link.
    """

    memory_bytes: Bytes = Field(gt=0)
    memory_bytes_per_second: BytesPerSecond = Field(gt=0)
    flops_per_second: dict[str, FlopsPerSecond] = Field(min_length=1)
    copy_engines: int | None = Field(default=None, ge=1)
    link: str | None = None
    pcie_peer: bool = False
    nvlink_bytes_per_second: BytesPerSecond | None = Field(default=None, gt=0)
    unified: bool = False

    @model_validator(mode="after")
    def _is_whole(self) -> Gpu:
        if self.link is None and not self.unified:
            raise InputError(f"{self.name}: link: say what it is plugged into, such as 'pcie4 x16'; or unified = True")
        if not {"bfloat16", "float16", "float32"} & self.flops_per_second.keys():
            raise InputError(f"{self.name}: flops_per_second: give that of bfloat16, float16 or float32")
        if self.memory_bytes_per_second < LEAST_BYTES_PER_SECOND:
            given = f"{self.memory_bytes_per_second:,} bytes a second"
            raise InputError(f"{self.name}: memory_bytes_per_second: {given}: write it with its unit, '448GB/s'")
        return self

    @property
    def half_flops_per_second(self) -> int:
        """Operations a second in 16 bits, or in 32 where its 16 are no faster than those."""
        known = self.flops_per_second
        return known.get("bfloat16") or known.get("float16") or known["float32"]


class Cpu(Listed):
    """A processor: `memory` is what its sockets' channels take, as `written.parse_ram` reads it; `pcie` a generation.

    `ghz` is the base clock, which all cores hold, and `boost_ghz` that of one core.
    """

    cores: int = Field(ge=1)
    memory: str
    ghz: float = Field(gt=0)
    boost_ghz: float = Field(gt=0)
    instructions: tuple[str, ...]
    pcie: int = Field(ge=1)


class LinkKind(Part):
    """A generation of a link: what one lane carries in one direction, after its line code."""

    name: str
    kind: Literal["pcie", "c2c"]
    lane_bytes_per_second: BytesPerSecond = Field(gt=0)
    most_lanes: int = Field(ge=1)
    source: str


class MemoryKind(Part):
    """A kind of memory: the transfers a second, in millions, that its modules have, and the bits of a channel.

    `channel_bits` 0: it is soldered in any width, which must be given.
    """

    name: str
    least_mt_per_s: int = Field(ge=1)
    most_mt_per_s: int = Field(ge=1)
    channel_bits: int = Field(ge=0)
    source: str


class Drive(Listed):
    """A drive: the sequential reads of its datasheet."""

    bytes_per_second: BytesPerSecond = Field(gt=0)


class Reached(Part):
    """A published measurement: `reached` bytes a second of what a link, memory or processor is said to have (`of`).

    Of copies from pageable memory, `of` are the bytes of one; the rows of one machine share their `source`.
    """

    what: Literal["link", "ram", "cpu", "pageable"]
    of: str
    reached: BytesPerSecond = Field(gt=0)
    source: str


_Row = TypeVar("_Row", bound=Part)
_Found = TypeVar("_Found", bound=Listed)
#: Words that a maker's or seller's full name has, and the table's does not need.
_MAKERS = re.compile(r"nvidia|geforce|tesla|amd|radeon|instinct|intel|apple|\bcore\b|generation")


def gpus() -> dict[str, Gpu]:
    """Returns the table of GPUs by name; code of a user's own may add to it."""
    return _by_name("gpus", Gpu)


def cpus() -> dict[str, Cpu]:
    """Returns the table of processors by name; code of a user's own may add to it."""
    return _by_name("cpus", Cpu)


def drives() -> dict[str, Drive]:
    """Returns the table of drives by name; code of a user's own may add to it."""
    return _by_name("drives", Drive)


@cache
def link_kinds() -> Mapping[str, LinkKind]:
    """Returns the generations of links by name."""
    return {row.name: row for row in _rows("links", LinkKind)}


@cache
def memory_kinds() -> Mapping[str, MemoryKind]:
    """Returns the kinds of memory by name."""
    return {row.name: row for row in _rows("memories", MemoryKind)}


@cache
def published() -> tuple[Reached, ...]:
    """Returns what others have measured of links, memories and processors."""
    return tuple(_rows("reached", Reached))


def find_gpu(text: str) -> Gpu:
    """Returns the GPU of a name such as 'rtx4090', 'RTX 4090' or '4090'; PartError if none, or several, have it."""
    return _find("machine.gpu", text, gpus())


def gpu_of_device(device: str) -> Gpu | None:
    """Returns the GPU that a profile's `device` tells of, such as '2 x NVIDIA H200 (141 GB), PCIe 5'; None: unknown."""
    try:
        return find_gpu(re.split(r" \(|,", re.sub(r"^\d+ x ", "", device))[0])
    except PartError:
        return None


def find_cpu(text: str) -> Cpu:
    """Returns the processor of a name such as '7950x' or 'Ryzen 9 7950X'; PartError if none, or several, have it."""
    return _find("machine.cpu", text, cpus())


def find_drive(text: str) -> Drive:
    """Returns the drive of a name such as 'samsung-990-pro'; PartError if none, or several, have it."""
    return _find("machine.drive", text, drives())


#: Of more parts than these, a message names the nearest alone.
_MOST_NAMED = 40


def _find(key: str, text: str, table: Mapping[str, _Found]) -> _Found:
    wanted = _plain(text)
    called = {name: {_plain(each) for each in (name, part.title, *part.driver_names)} for name, part in table.items()}
    for fits in (str.__eq__, str.endswith, str.startswith):
        found = [name for name, calls in called.items() if wanted and any(fits(call, wanted) for call in calls)]
        if len(found) == 1:
            return table[found[0]]
        if found:
            raise PartError(f"{key} = {shown(text)}: there are several: choose one of {', '.join(found)}")
    if len(table) <= _MOST_NAMED:
        raise PartError(unknown_name(key, text, table))
    kind, hint = key.removeprefix("machine."), did_you_mean(text, table)
    where = f"`prestage machine list {kind}s`, or add it as docs/machine-parts.md says"
    raise PartError(f"{key} = {shown(text)}: no such part; {f'{hint} ' if hint else ''}see {where}")


def _plain(text: str) -> str:
    """Returns a part's name without its maker, spaces, hyphens and case."""
    return re.sub(r"[^a-z0-9+]", "", _MAKERS.sub("", text.lower()))


@cache
def _by_name(table: str, row: type[_Found]) -> dict[str, _Found]:
    return {part.name: part for part in _rows(table, row)}


def _rows(table: str, row: type[_Row]) -> list[_Row]:
    text = (resources.files(__package__) / f"{table}.json").read_text("utf-8")
    return [row.model_validate(entry) for entry in json.loads(text)]
