"""The profile: the measured costs of one machine, as a JSON file that says where each number came from.

Every cost carries a `source` (measured, published, datasheet, fitted or assumed) and a `note`; every key carries its
unit. A profile knows nothing of models: what a kernel of a given size costs on it is a table of measured points and a
stated rule for the rest.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from ..errors import InputError
from ..words import problems, unknown_name
from .facts import Fact, Part
from .topology import Topology


class ProfileError(InputError):
    """A profile that cannot be found, read or believed."""


class Samples(Part):
    """What a measured number was made from: how many samples, their median and interquartile range."""

    n: int = Field(gt=0)
    median_ns: float = Field(ge=0)
    iqr_ns: float = Field(ge=0)


class Uncertainty(Part):
    """How far a cost can be off, as relative standard deviations.

    `run_spread`: of the medians of whole runs; `scatter`: of single events about their run's median;
    `held_back_error`: how far the fit was off, root mean square, on samples that it was not made from.
    """

    run_spread: float = Field(ge=0)
    scatter: float = Field(ge=0)
    held_back_error: float = Field(ge=0)


class _Cost(Fact):
    samples: Samples | None = None
    uncertainty: Uncertainty | None = None


class Duration(_Cost):
    """A cost that does not depend on size."""

    ns: int = Field(ge=0)


class DurationBesideCopy(Duration):
    """A duration that may be longer beside a copy to the GPU; without `beside_copy_ns` it is not."""

    beside_copy_ns: int | None = Field(default=None, ge=0)

    @property
    def disturbed_ns(self) -> int:
        """What it is beside a copy."""
        return self.ns if self.beside_copy_ns is None else self.beside_copy_ns


class Latency(_Cost):
    """From the return of the host's last call to the start of the work on an idle lane.

    Below 0 the work begins before the last call, which records an event behind it, has returned. Beside a copy it may
    be longer; without `beside_copy_ns` it is not.
    """

    ns: int
    beside_copy_ns: int | None = None


#: What a profile from before this cost was measured says of it: other costs of that profile hold it.
_WITHIN = "not measured by itself: within this profile's other costs"
_NO_TIME = Duration(ns=0, source="assumed", note=_WITHIN)
_NO_GAP = DurationBesideCopy(ns=0, source="assumed", note=_WITHIN)
_NO_LATENCY = Latency(ns=0, source="assumed", note=_WITHIN)


class TransferCost(_Cost):
    """What one copy takes: a line, latency_ns + ceil(bytes * 10^9 / bytes_per_second), or a monotone table.

    Between the points of a table, (bytes, ns), the cost runs straight; beyond its ends it keeps the end's slope.
    """

    latency_ns: int | None = Field(default=None, ge=0)
    bytes_per_second: int | None = Field(default=None, gt=0)
    points: tuple[tuple[int, int], ...] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> TransferCost:
        line = self.latency_ns is not None and self.bytes_per_second is not None
        if line == (self.points is not None):
            raise InputError("give latency_ns and bytes_per_second, or points: one of the two")
        if self.points is not None:
            if len(self.points) < 2:
                raise InputError("points: give at least two")
            for (bytes_a, ns_a), (bytes_b, ns_b) in zip(self.points, self.points[1:], strict=False):
                if bytes_b <= bytes_a or ns_b < ns_a or bytes_a < 0 or ns_a < 0:
                    raise InputError(f"points: ({bytes_b}, {ns_b}) after ({bytes_a}, {ns_a}) must grow")
        return self

    def ns(self, size_bytes: int) -> int:
        """Return the duration of a copy of `size_bytes`, in ns, rounded up."""
        if self.points is None:
            assert self.latency_ns is not None and self.bytes_per_second is not None
            return self.latency_ns - (-size_bytes * 10**9 // self.bytes_per_second)
        at = bisect_left(self.points, (size_bytes, 0))
        at = min(max(at, 1), len(self.points) - 1)
        (bytes_a, ns_a), (bytes_b, ns_b) = self.points[at - 1], self.points[at]
        return max(0, ns_a - (-(size_bytes - bytes_a) * (ns_b - ns_a) // (bytes_b - bytes_a)))


class CopyCosts(Part):
    """One direction of copies: a copy on an idle engine, one queued right behind another, and the gap between.

    `event_wait_gap` is from the end of the kernel that a copy waited for to its start; it may be longer beside a copy
    from the host, which is then another copy than this.
    """

    alone: TransferCost
    queued: TransferCost
    gap: Duration
    event_wait_gap: DurationBesideCopy = _NO_GAP
    launch_latency: Latency = _NO_LATENCY


class ExpertPoint(_Cost):
    """One expert's kernels, measured: its shape, weights, tokens and dispatch; on a quiet GPU and beside a copy.

    `ns` is inside a schedule, behind other kernels; `alone_ns`, where known, by itself on an idle GPU;
    `launch_latency_ns`, where known, is this group's own.
    """

    hidden: int = Field(gt=0)
    expert_ff: int = Field(gt=0)
    dtype: str
    tokens: int = Field(gt=0)
    dispatch: Literal["eager", "graph"]
    ns: int = Field(gt=0)
    beside_copy_ns: int = Field(gt=0)
    alone_ns: int | None = Field(default=None, gt=0)
    launch_latency_ns: int | None = None


class KernelPoint(_Cost):
    """The kernels of a layer's dense part or of the head, measured; what they are is told by their weights and number.

    `context` is the number of cached positions that each token attends to; the rest is as of an ExpertPoint.
    """

    hidden: int = Field(gt=0)
    weight_bytes: int = Field(gt=0)
    dtype: str
    kernels: int = Field(gt=0)
    tokens: int = Field(gt=0)
    context: int = Field(default=0, ge=0)
    dispatch: Literal["eager", "graph"]
    ns: int = Field(gt=0)
    beside_copy_ns: int = Field(gt=0)
    alone_ns: int | None = Field(default=None, gt=0)
    launch_latency_ns: int | None = None


class CpuExpertPoint(_Cost):
    """One expert computed by the CPU, measured; `beside_copy_ns` while host memory also feeds a copy to the GPU."""

    hidden: int = Field(gt=0)
    expert_ff: int = Field(gt=0)
    dtype: str
    tokens: int = Field(gt=0)
    threads: int = Field(gt=0)
    ns: int = Field(gt=0)
    beside_copy_ns: int = Field(gt=0)


class PredictorPoint(_Cost):
    """One inference of a linear predictor, hidden state in and a score for each expert out, with its top-k."""

    hidden: int = Field(gt=0)
    experts: int = Field(gt=0)
    tokens: int = Field(gt=0)
    ns: int = Field(gt=0)


class KernelRule(_Cost):
    """The rule for kernels that were not measured.

    constant_ns + max(weight bytes / bytes_per_second, 2 x weights x tokens / flops_per_second). Beside a copy the
    part after the constant takes beside_copy_factor times as long.
    """

    constant_ns: int = Field(ge=0)
    bytes_per_second: int = Field(gt=0)
    flops_per_second: int = Field(gt=0)
    beside_copy_factor: float = Field(ge=1, le=10)

    def part_ns(self, weight_bytes: int, flops: float) -> float:
        """Return what comes on top of the constant, in ns, on a quiet GPU."""
        return max(weight_bytes * 1e9 / self.bytes_per_second, flops * 1e9 / self.flops_per_second)


class Interruptions(_Cost):
    """Other work that takes the compute stream for `ns`, each time `every_ns` after the last: a machine's noise.

    As fixed-frequency noise in Hoefler, Schneider & Lumsdaine, "Characterizing the influence of system noise on
    large-scale applications by simulation" (SC 2010). One that is due comes when the host begins a forward pass.
    """

    every_ns: int = Field(gt=0)
    ns: int = Field(gt=0)


class ComputeCosts(Part):
    """The compute stream: measured kernels, the rule for all else, and the gap between consecutive launches.

    `event_wait_gap` is from the end of a copy to the start of a kernel that waited for it; `peer_wait_gap` the same
    where the copy came from another GPU (None: as from the host).
    """

    experts: tuple[ExpertPoint, ...] = ()
    dense: tuple[KernelPoint, ...] = ()
    heads: tuple[KernelPoint, ...] = ()
    cpu_experts: tuple[CpuExpertPoint, ...] = ()
    predictors: tuple[PredictorPoint, ...] = ()
    rule: KernelRule
    eager_gap: DurationBesideCopy
    graph_gap: DurationBesideCopy
    event_wait_gap: DurationBesideCopy = _NO_GAP
    interruptions: Interruptions | None = None
    peer_wait_gap: DurationBesideCopy | None = None
    launch_latency: Latency = _NO_LATENCY


class HostCosts(Part):
    """The dispatching thread's time for each call.

    `launch` is that of a small kernel and `product_launches` that of a matrix product by dtype (else as any kernel's);
    `copy_enqueue` that of a copy to the GPU and `readback_enqueue` that of the choice's (None: as any copy's).
    `event_record` and `event_wait` put an event, or a wait for one, on a stream. `readback` is from the end of the
    dense part to the choice being in host memory; `readback_late`, where the host asked for it only after that, from
    its asking (both None: what the profile's D2H copies say). `synchronize` is from there to the host knowing, and
    `resume` what the host's first calls after that wait take longer, `copy_resume` if these enqueue a copy.
    `peer_enqueue` is that of a copy to or from another GPU (None: as any copy's), `turn` a thread's turning to another.
    """

    launch: Duration
    graph_launch: Duration
    copy_enqueue: Duration
    synchronize: DurationBesideCopy
    product_launches: dict[str, Duration] = {}
    readback_enqueue: Duration | None = None
    event_record: Duration = _NO_TIME
    event_wait: Duration = _NO_TIME
    readback: DurationBesideCopy | None = None
    readback_late: Duration | None = None
    resume: Duration = _NO_TIME
    copy_resume: Duration = _NO_TIME
    peer_enqueue: Duration | None = None
    turn: Duration = _NO_TIME


class Factor(_Cost):
    """How many times as long something takes beside something else."""

    factor: float = Field(ge=0.5, le=20)


class Contention(Part):
    """What slows copies to the GPU down, and what they slow down; kernels beside copies are in their own points.

    `copies_sharing` is for two streams of one direction: how long both take together, over one after the other.
    `copies_take_turns`: whether one copy of a direction waits for another stream's to end, or both share the link.
    `compute_beside_peer` is for kernels beside copies from another GPU (None: as beside copies from the host), and
    `peer_beside_copy` how much longer a copy between GPUs takes beside copies from the host.
    """

    copy_beside_compute: Factor
    copy_beside_d2h: Factor
    copies_sharing: Factor
    copies_take_turns: bool = False
    copy_beside_cpu_experts: Factor | None = None
    copy_beside_all_gpus: Factor | None = None
    compute_beside_peer: Factor | None = None
    peer_beside_copy: Duration | None = None


class NvmeCosts(Part):
    """A drive under the host's memory: what reading from it takes, request by request.

    `read` is one request on one of `lanes` that all read, which together get all that the drive gives; more lanes
    share that. `order` is the host thread's time to order the read of one expert, room for it included.
    """

    read: TransferCost
    lanes: int = Field(gt=0)
    order: Duration = _NO_TIME


class Allocation(Part):
    """The host's time to get room: from the driver (raw), or from the caching allocator's free blocks."""

    raw: Duration
    cached: Duration


class Profile(Part):
    """One machine: its identity and its costs. `h2d` maps the kind of host memory (pinned, pageable) to costs.

    Costs are those of one GPU, all being alike. Without a `topology` there is one, behind a link of its own.
    """

    name: str
    device: str
    driver: str
    date: str
    versions: dict[str, str] = {}
    source: str
    gpu_memory_bytes: int = Field(gt=0)
    h2d: dict[Literal["pinned", "pageable"], CopyCosts] = Field(min_length=1)
    d2h: CopyCosts
    d2d: CopyCosts | None = None
    peer: CopyCosts | None = None
    compute: ComputeCosts
    host: HostCosts
    contention: Contention | None = None
    nvme: NvmeCosts | None = None
    allocation: Allocation | None = None
    topology: Topology | None = None


def profile_names() -> list[str]:
    """Return the names of the shipped profiles."""
    folder = resources.files("prestage") / "calibration" / "profiles"
    return sorted(entry.name[: -len(".json")] for entry in folder.iterdir() if entry.name.endswith(".json"))


def load_profile(name: str) -> Profile:
    """Return a shipped profile by its name, or one from a JSON file by its path; raise ProfileError if it is bad.

    A profile that `extends` another (by its name, or a path from its own folder) is that one with the keys it gives
    merged in, as a JSON merge patch (RFC 7396): null takes a key out.
    """
    return make_profile(_plain(name, Path(), ()), f"profile {name}")


def _plain(name: str, folder: Path, extending: tuple[str, ...]) -> object:
    """Return a profile as plain data, merged into what it extends."""
    if name in extending:
        raise ProfileError(f"profile {name}: extends itself by way of {', '.join(extending)}")
    key = f"profile {extending[-1]}: extends" if extending else "machine.profile"
    path = folder / name
    if name.endswith(".json"):
        if not path.is_file():
            raise ProfileError(f"{key} = {name!r}: no such file")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileError(f"{key} = {name!r}: cannot be read: {error}") from None
    elif name in profile_names():
        text = (resources.files("prestage") / "calibration" / "profiles" / f"{name}.json").read_text("utf-8")
    else:
        raise ProfileError(unknown_name(key, name, [*profile_names(), "FILE.json"]))
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ProfileError(f"profile {name}: not JSON: {error}") from None
    if not isinstance(data, dict) or "extends" not in data:
        return data
    base = data.pop("extends")
    if not isinstance(base, str):
        raise ProfileError(f"profile {name}: extends = {base!r}: give the name of a profile")
    return _merged(_plain(base, path.parent, (*extending, name)), data)


def _merged(base: object, patch: object) -> object:
    """Return `base` with `patch` merged in, by RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    merged: dict[str, Any] = dict(base) if isinstance(base, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merged(merged.get(key), value)
    return merged


def make_profile(data: object, source: str) -> Profile:
    """Return the profile that plain data describes; ProfileError names `source` and the bad keys."""
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        raise ProfileError(f"{source}: {problems(error, Profile, data)}") from None
