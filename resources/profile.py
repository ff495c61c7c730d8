"""The profile: the measured costs of one machine, as a JSON file that says where each number came from.

Every cost carries a `source` (measured, published, datasheet, fitted or assumed) and a `note`; every key carries its
unit. A profile knows nothing of models: what a kernel of a given size costs on it is a table of measured points and a
stated rule for the rest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError, field_validator, model_validator

from ..errors import InputError
from ..words import problems, unknown_name
from .extending import extended, own
from .facts import Bytes, BytesPerSecond, Cost, Fact, Part
from .parts.assemble import assembled
from .parts.tables import PartError, gpus
from .parts.written import is_of_parts
from .profile_costs import NO_TIME, ComputeCosts, CopyCosts, Duration, HostCosts, ProfileError, TransferCost
from .topology import Topology

#: A factor by which something takes longer beside something else lies between these.
LEAST_FACTOR, MOST_FACTOR = 0.5, 20.0


class Factor(Cost):
    """How many times as long something takes beside something else."""

    factor: float = Field(ge=LEAST_FACTOR, le=MOST_FACTOR)


class Contention(Part):
    """What slows copies to the GPU down, and what they slow down; kernels beside copies are in their own points.

    `copies_sharing` is for copies of several streams of one direction that share the link: how long they take together,
    over one after the other without gaps (None: as long). `copies_take_turns`: whether one copy of a direction waits
    for another stream's to end, or both share the link. `copy_beside_d2h` and `copy_beside_all_gpus` are kept as
    measured: no run copies much to the host, and what several GPUs share is in the topology.
    `compute_beside_peer` is for kernels beside copies from another GPU (None: as beside copies from the host), and
    `peer_beside_copy` how much longer a copy between GPUs takes beside copies from the host.

    Kernels of two streams share the GPU: a decompression on a side stream takes it whole but for its beginning and end,
    and `unpacking_leaves` is what kernels of the compute stream get done beside one; `unpacking_beside_kernels` is how
    many times as long it takes beside them. `kernels_beside_predictor` and `predictor_beside_kernels` are for a
    predictor on a side stream. Without them none slows another down.
    """

    copy_beside_compute: Factor
    copy_beside_d2h: Factor | None = None
    copies_sharing: Factor | None = None
    copies_take_turns: bool = False
    copy_beside_cpu_experts: Factor | None = None
    copy_beside_all_gpus: Factor | None = None
    compute_beside_peer: Factor | None = None
    peer_beside_copy: Duration | None = None
    unpacking_leaves: Duration | None = None
    unpacking_beside_kernels: Factor | None = None
    kernels_beside_predictor: Factor | None = None
    predictor_beside_kernels: Factor | None = None


class Processor(Cost):
    """What the host's processors read of their memory with all threads (STREAM's triad or a sum), and their cores."""

    bytes_per_second: BytesPerSecond = Field(gt=0)
    cores: int | None = Field(default=None, gt=0, le=1 << 20)


class Capacity(Fact):
    """What a memory holds."""

    capacity_bytes: int = Field(gt=0)


class QueueDepth(Cost):
    """What a drive gives to so many reads in flight together: (reads, bytes per second) points, from one read on.

    Between the points it runs straight; more reads than the last get what those get.
    """

    bytes_per_second_by_reads: tuple[tuple[int, int], ...] = Field(min_length=2)

    @field_validator("bytes_per_second_by_reads")
    @classmethod
    def _in_order(cls, points: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        if points[0][0] != 1:
            raise InputError(f"the first is of {points[0][0]} reads: begin with one read alone, [1, bytes per second]")
        for (before, _), (reads, rate) in pairwise([(0, 1), *points]):
            if reads <= before or rate <= 0:
                raise InputError(
                    f"[{reads}, {rate}] after {before} reads: give more reads each time, and a rate above 0"
                )
        return points

    def bytes_per_second(self, reads: int) -> float:
        """Returns what so many reads get together."""
        counts, rates = zip(*self.bytes_per_second_by_reads, strict=True)
        return float(np.interp(reads, counts, rates))


class NvmeCosts(Part):
    """A drive under the host's memory: what reading from it takes, request by request.

    `read` is one request while at most `lanes` are in flight, each of which gets that, and together all that the drive
    gives; more in flight share it. What was measured over `queue_depth` takes the place of this rule: `read` is then
    one request alone, and each of several in flight takes as many times as long as its part of the rate is smaller.
    A scenario that does not say how many I/O lanes there are has `lanes`. `order` is the host thread's time to order
    the read of one expert, room for it included. `drive` says what it holds, where that is known and there is no
    topology to say it.
    """

    read: TransferCost
    lanes: int = Field(gt=0, le=1024)
    queue_depth: QueueDepth | None = None
    order: Duration = NO_TIME
    drive: Capacity | None = None

    def times_as_long(self, reads: int) -> float:
        """Returns how many times as long as alone a request takes while so many are in flight, itself included."""
        if self.queue_depth is None:
            return max(1.0, reads / self.lanes)
        return reads * self.queue_depth.bytes_per_second(1) / self.queue_depth.bytes_per_second(reads)


class Allocation(Part):
    """The host's time to get room: from the driver (raw), or from the caching allocator's free blocks."""

    raw: Duration
    cached: Duration


class Profile(Part):
    """One machine: its identity and its costs. `h2d` maps the kind of host memory (pinned, pageable) to costs.

    Costs are those of one GPU, all being alike. Without a `topology` there is one, behind a link of its own, and
    `host_memory` says what the host holds, where that is known. With `unified_memory` the host has no memory but the
    GPU's, whose `gpu_memory_bytes` they share. Costs of another `device` carry its name and are no measurements of this
    one; `same_device_as` names devices that are the same under another name, such as one of several GPUs of a machine.
    """

    name: str
    device: str
    same_device_as: tuple[str, ...] = ()
    driver: str
    date: str
    versions: dict[str, str] = {}
    source: str
    gpu_memory_bytes: Bytes = Field(gt=0)
    h2d: dict[Literal["pinned", "pageable"], CopyCosts] = Field(min_length=1)
    d2h: CopyCosts
    d2d: CopyCosts | None = None
    peer: CopyCosts | None = None
    #: What an exchange of tokens between two GPUs takes, by the bytes that one sends the other.
    exchange: TransferCost | None = None
    compute: ComputeCosts
    host: HostCosts
    contention: Contention | None = None
    nvme: NvmeCosts | None = None
    allocation: Allocation | None = None
    topology: Topology | None = None
    host_memory: Capacity | None = None
    processor: Processor | None = None
    unified_memory: bool = False

    @model_validator(mode="after")
    def _memories_are_stated_once(self) -> Profile:
        stated = {
            "host_memory": self.host_memory is not None,
            "unified_memory": self.unified_memory,
            "nvme.drive": self.nvme is not None and self.nvme.drive is not None,
        }
        given = [key for key, there in stated.items() if there]
        if self.topology is not None and given:
            raise InputError(f"{', '.join(given)}: the topology's nodes say what each memory holds: leave out")
        if self.unified_memory and self.host_memory is not None:
            raise InputError("host_memory: with unified_memory = true the host has none of its own: leave out")
        return self

    def capacity(self, kind: Literal["gpu", "host", "nvme"], name: str) -> tuple[int | None, str]:
        """Returns the bytes that a memory holds (None: not stated), and which key of the profile says so, or would.

        Host memory is that of all NUMA nodes, a drive all drives together; a GPU is known by its `name`.
        """
        nodes = [node for node in self.topology.nodes if node.kind == kind] if self.topology is not None else []
        if kind == "gpu":
            nodes = [node for node in nodes if node.name == name]
        if nodes:
            sources = ", ".join(dict.fromkeys(node.source for node in nodes))
            names = ", ".join(node.name for node in nodes)
            return sum(node.capacity_bytes or 0 for node in nodes), f"topology, {names} ({sources})"
        if kind == "gpu":
            return self.gpu_memory_bytes, "gpu_memory_bytes"
        stated, key = self.host_memory, "host_memory"
        if kind == "nvme":
            stated, key = self.nvme.drive if self.nvme is not None else None, "nvme.drive"
        return (None, key) if stated is None else (stated.capacity_bytes, f"{key} ({stated.source})")

    def copied_from(self, wanted: Literal["pinned", "pageable"] | None) -> Literal["pinned", "pageable"]:
        """Returns the kind of host memory that copies are priced from: the wanted one, or pinned where none is wanted.

        One memory for the host and the GPU is not copied from, whatever its kind. ProfileError if a kind has no costs.
        """
        found = wanted or ("pinned" if "pinned" in self.h2d else "pageable")
        if found in self.h2d:
            return found
        if self.unified_memory:
            return next(iter(self.h2d))
        raise ProfileError(f"copy.host_memory = {found!r}: profile {self.name} has {', '.join(self.h2d)} only")

    @model_validator(mode="before")
    @classmethod
    def _own_costs_name_no_device(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        same = data.get("same_device_as")
        devices = [data.get("device"), *(same if isinstance(same, list | tuple) else ())]
        return own(data, [name for name in devices if isinstance(name, str)])


def profile_names() -> list[str]:
    """Returns the names of the shipped profiles."""
    folder = resources.files("prestage") / "calibration" / "profiles"
    return sorted(entry.name[: -len(".json")] for entry in folder.iterdir() if entry.name.endswith(".json"))


def load_profile(name: str) -> Profile:
    """Returns a shipped profile by its name, or one from a JSON file by its path; raise ProfileError if it is bad.

    A name that tells parts, 'gpu=rtx4090, ram=2x DDR5-5600', is that of a machine put together from them. A profile
    that `extends` another (by its name, or a path from its own folder) is that one with the keys it gives merged in, as
    a JSON merge patch (RFC 7396): null takes a key out, and one form of a cost replaces the other.
    """
    return _load(name) if name.endswith(".json") else _load_shipped(name)


def _load(name: str) -> Profile:
    try:
        return make_profile(_plain(name), f"profile {name}")
    except RecursionError:
        raise ProfileError(f"profile {name}: nested too deeply: no profile is") from None


#: What is shipped does not change, and a sweep asks for it again and again; nobody can change a profile.
_load_shipped = cache(_load)


def _plain(name: str) -> object:
    """Returns a profile as plain data, merged into what it extends."""
    patches: list[dict[str, Any]] = []
    extending: dict[str | Path, str] = {}  # by what is the same under any name
    folder, key = Path(), "machine.profile"
    while True:
        path = Path(os.path.realpath(folder / name)) if name.endswith(".json") else None
        if (path or name) in extending:
            way = ", ".join(extending.values())
            raise ProfileError(f"profile {name}: extends itself by way of {way}")
        extending[path or name] = name
        data = _read(name, folder / name, key)
        if not isinstance(data, dict) or "extends" not in data:
            break
        key = f"profile {name}: extends"
        folder = (folder / name).parent if path is not None else Path()
        patches.append({entry: value for entry, value in data.items() if entry != "extends"})
        if not isinstance(data["extends"], str):
            raise ProfileError(f"{key} = {data['extends']!r}: give the name of a profile")
        name = data["extends"]
    if patches and not isinstance(data, dict):
        raise ProfileError(f"profile {name}: {type(data).__name__}: must be an object")
    for patch in reversed(patches):
        data = extended(data, patch)
    return data


def unknown_machine(key: str, name: str, known: Iterable[str]) -> str:
    """Returns the message for a machine of no name that is known, which may be that of a GPU."""
    said = unknown_name(key, name, known)
    return f"{said}; or name its parts: 'gpu={name}'" if name in gpus() else said


def _read(name: str, path: Path, key: str) -> Any:
    """Returns what a file, or a shipped profile, holds; ProfileError names the `key` that named it."""
    if is_of_parts(name):
        try:
            return assembled(name)
        except PartError as error:
            raise ProfileError(str(error)) from None
    if not name.endswith(".json"):
        if name not in profile_names():
            raise ProfileError(unknown_machine(key, name, [*profile_names(), "FILE.json"]))
        return json.loads(
            (resources.files("prestage") / "calibration" / "profiles" / f"{name}.json").read_text("utf-8")
        )
    if not path.is_file():
        raise ProfileError(f"{key} = {name!r}: no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{key} = {name!r}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise ProfileError(f"profile {name}: not JSON: {error}") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise ProfileError(f"profile {name}: cannot be read: {error}") from None


def make_profile(data: object, source: str) -> Profile:
    """Returns the profile that plain data describes; ProfileError names `source` and the bad keys."""
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        raise ProfileError(f"{source}: {problems(error, Profile, data)}") from None
