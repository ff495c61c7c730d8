"""The costs of a profile: what copies, kernels and the host's calls take, each with where it is from."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..dtypes import dtype_of
from ..errors import InputError
from .facts import Bytes, BytesPerSecond, Cost, Dtype, FlopsPerSecond, Part
from .surface import Surface


class ProfileError(InputError):
    """A profile that cannot be found, read or believed."""


class Duration(Cost):
    """A cost that does not depend on size."""

    ns: int = Field(ge=0)


class DurationBesideCopy(Duration):
    """A duration that may be longer beside a copy to the GPU; without `beside_copy_ns` it is not."""

    beside_copy_ns: int | None = Field(default=None, ge=0)

    @property
    def disturbed_ns(self) -> int:
        """What it is beside a copy."""
        return self.ns if self.beside_copy_ns is None else self.beside_copy_ns


class Latency(Cost):
    """From the return of the host's last call to the start of the work on an idle lane.

    Below 0 the work begins before the last call, which records an event behind it, has returned. Beside a copy it may
    be longer; without `beside_copy_ns` it is not.
    """

    ns: int
    beside_copy_ns: int | None = None


#: What a profile from before this cost was measured says of it: other costs of that profile hold it.
_WITHIN = "not measured by itself: within this profile's other costs"
NO_TIME = Duration(ns=0, source="assumed", note=_WITHIN)

_NO_GAP = DurationBesideCopy(ns=0, source="assumed", note=_WITHIN)

_NO_LATENCY = Latency(ns=0, source="assumed", note=_WITHIN)


class TransferCost(Cost):
    """What one copy takes: a line, latency_ns + ceil(bytes * 10^9 / bytes_per_second), or a monotone table.

    Between the points of a table, (bytes, ns), the cost runs straight; beyond its ends it keeps the end's slope.
    """

    latency_ns: int | None = Field(default=None, ge=0)
    bytes_per_second: BytesPerSecond | None = Field(default=None, gt=0)
    points: tuple[tuple[int, int], ...] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> TransferCost:
        given = [name for name in ("latency_ns", "bytes_per_second", "points") if getattr(self, name) is not None]
        if given not in (["latency_ns", "bytes_per_second"], ["points"]):
            both = "give latency_ns and bytes_per_second, or points: one of the two"
            raise InputError(f"{both} (given: {', '.join(given) or 'neither'})")
        if self.points is not None:
            if len(self.points) < 2:
                raise InputError("points: give at least two")
            for (bytes_a, ns_a), (bytes_b, ns_b) in zip(self.points, self.points[1:], strict=False):
                if bytes_b <= bytes_a or ns_b < ns_a or bytes_a < 0 or ns_a < 0:
                    raise InputError(f"points: ({bytes_b}, {ns_b}) after ({bytes_a}, {ns_a}) must grow")
        return self

    def ns(self, size_bytes: int) -> int:
        """Returns the duration of a copy of `size_bytes`, in ns, rounded up."""
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


class ExpertPoint(Cost):
    """One expert's kernels, measured: its shape, weights, tokens and dispatch; on a quiet GPU and beside a copy.

    `ns` is inside a schedule, behind other kernels; `alone_ns`, where known, by itself on an idle GPU;
    `launch_latency_ns`, where known, is this group's own.
    """

    hidden: int = Field(gt=0)
    expert_ff: int = Field(gt=0)
    dtype: Dtype
    tokens: int = Field(gt=0)
    dispatch: Literal["eager", "graph"]
    ns: int = Field(gt=0)
    beside_copy_ns: int = Field(gt=0)
    alone_ns: int | None = Field(default=None, gt=0)
    launch_latency_ns: int | None = None


class KernelPoint(Cost):
    """The kernels of a layer's dense part or of the head, measured; what they are is told by their weights and number.

    `context` is the number of cached positions that each token attends to; the rest is as of an ExpertPoint.
    """

    hidden: int = Field(gt=0)
    weight_bytes: Bytes = Field(gt=0)
    dtype: Dtype
    kernels: int = Field(gt=0)
    tokens: int = Field(gt=0)
    context: int = Field(default=0, ge=0)
    dispatch: Literal["eager", "graph"]
    ns: int = Field(gt=0)
    beside_copy_ns: int = Field(gt=0)
    alone_ns: int | None = Field(default=None, gt=0)
    launch_latency_ns: int | None = None


class CpuExpertPoint(Cost):
    """One expert computed by the CPU, measured; `beside_copy_ns` while host memory also feeds a copy to the GPU."""

    hidden: int = Field(gt=0)
    expert_ff: int = Field(gt=0)
    dtype: Dtype
    tokens: int = Field(gt=0)
    threads: int = Field(gt=0)
    ns: int = Field(gt=0)
    beside_copy_ns: int = Field(gt=0)


class PredictorPoint(Cost):
    """One inference of a linear predictor, hidden state in and a score for each expert out, with its top-k."""

    hidden: int = Field(gt=0)
    experts: int = Field(gt=0)
    tokens: int = Field(gt=0)
    ns: int = Field(gt=0)


class KernelRule(Cost):
    """The rule for kernels that were not measured.

    constant_ns + max(weight bytes / bytes_per_second, 2 x weights x tokens / flops_per_second). Beside a copy the
    part after the constant takes beside_copy_factor times as long. To the constant each matrix product of the group may
    add `product_ns`, each other kernel `small_kernel_ns`, and each kernel that is launched by itself
    `eager_kernel_ns`.
    """

    constant_ns: int = Field(ge=0)
    bytes_per_second: BytesPerSecond = Field(gt=0)
    flops_per_second: FlopsPerSecond = Field(gt=0)
    beside_copy_factor: float = Field(ge=1, le=10)
    product_ns: int = Field(default=0, ge=0)
    small_kernel_ns: int = Field(default=0, ge=0)
    eager_kernel_ns: int = Field(default=0, ge=0)

    def group_ns(self, kernels: int, products: int, *, eager: bool) -> int:
        """Returns the constant of a group of kernels, so many of them matrix products."""
        each_ns = self.eager_kernel_ns if eager else 0
        small_ns = (kernels - products) * self.small_kernel_ns
        return self.constant_ns + products * self.product_ns + small_ns + kernels * each_ns

    def part_ns(self, weight_bytes: int, flops: float) -> float:
        """Returns what comes on top of the constant, in ns, on a quiet GPU."""
        return max(weight_bytes * 1e9 / self.bytes_per_second, flops * 1e9 / self.flops_per_second)


class StreamedKernel(Cost):
    """A kernel that goes through bytes: constant_ns + bytes / bytes_per_second; beside a copy so many times as long."""

    constant_ns: int = Field(ge=0)
    bytes_per_second: BytesPerSecond = Field(gt=0)
    beside_copy_factor: float = Field(default=1.0, ge=1, le=10)

    def ns(self, size_bytes: int) -> int:
        """Returns its duration on a quiet GPU, in ns, rounded up."""
        return self.constant_ns - (-size_bytes * 10**9 // self.bytes_per_second)


class Interruptions(Cost):
    """Other work that takes the compute stream for `ns`, each time `every_ns` after the last: a machine's noise.

    As fixed-frequency noise in Hoefler, Schneider & Lumsdaine, "Characterizing the influence of system noise on
    large-scale applications by simulation" (SC 2010). One that is due comes when the host begins a forward pass.
    """

    every_ns: int = Field(gt=0)
    ns: int = Field(gt=0)


#: What tells measured points apart.
_SHAPE = (
    *("hidden", "expert_ff", "weight_bytes", "experts", "dtype", "kernels", "tokens", "context"),
    *("dispatch", "threads"),
)


class ComputeCosts(Part):
    """The compute stream: measured kernels, what all else is made of, and the gap between consecutive launches.

    A shape that was not measured is put together from the `surface`; where there is none, the rule estimates it.
    `event_wait_gap` is from the end of a copy to the start of a kernel that waited for it; `peer_wait_gap` the same
    where the copy came from another GPU (None: as from the host). `cpu_rule` is for experts on the CPU where no
    `cpu_experts` were measured. `grouped` is one kernel for several experts, over the bytes of all (None: of what each
    takes), and `unpacking` the decompression of an expert over its bytes, as an execution makes it.
    """

    experts: tuple[ExpertPoint, ...] = ()
    dense: tuple[KernelPoint, ...] = ()
    heads: tuple[KernelPoint, ...] = ()
    cpu_experts: tuple[CpuExpertPoint, ...] = ()
    predictors: tuple[PredictorPoint, ...] = ()
    rule: KernelRule
    surface: Surface | None = None
    cpu_rule: KernelRule | None = None
    grouped: StreamedKernel | None = None
    unpacking: StreamedKernel | None = None
    eager_gap: DurationBesideCopy
    graph_gap: DurationBesideCopy
    event_wait_gap: DurationBesideCopy = _NO_GAP
    interruptions: Interruptions | None = None
    peer_wait_gap: DurationBesideCopy | None = None
    launch_latency: Latency = _NO_LATENCY

    @model_validator(mode="after")
    def _points_differ(self) -> ComputeCosts:
        for name in ("experts", "dense", "heads", "cpu_experts", "predictors"):
            seen: dict[tuple[Any, ...], int] = {}
            points: Sequence[Any] = getattr(self, name)
            keys = [key for key in _SHAPE if points and hasattr(points[0], key)]
            for number, point in enumerate(points):
                shape = tuple(getattr(point, key) for key in keys)
                if seen.setdefault(shape, number) != number:
                    raise InputError(
                        f"{name}.{number}: measured already, as {name}.{seen[shape]}: give each shape once"
                    )
        return self


class HostCosts(Part):
    """The dispatching thread's time for each call.

    `launch` is that of a small kernel and `product_launches` that of a matrix product by dtype (else as any kernel's),
    `further_launch` that of each kernel beyond its first that a product's call launches (see `surface.LaunchTable`);
    `attention_launch` that of attention over what is cached (None: as a product's);
    `copy_enqueue` that of a copy to the GPU and `readback_enqueue` that of the choice's (None: as any copy's).
    `event_record` and `event_wait` put an event, or a wait for one, on a stream. `readback` is from the end of the
    dense part to the choice being in host memory; `readback_late`, where the host asked for it only after that, from
    its asking (both None: what the profile's D2H copies say). `synchronize` is from there to the host knowing, and
    `resume` what the host's first calls after that wait take longer, `copy_resume` if these enqueue a copy.
    `peer_enqueue` is that of a copy to or from another GPU (None: as any copy's), `turn` a thread's turning to another,
    `exchange_call` a GPU's part in an exchange of tokens (None: as a launch), `expert_move` the calls of an expert's
    copy between GPUs that share experts, with its events (None: as of a copy in a pipeline).
    Experts on the CPU: `cpu_hand_over` is the time to hand a visit's tokens over, `cpu_take_back` to order the copy of
    their results beforehand (both None: a copy's enqueue, and nothing). `cpu_notice` is from the tokens' arrival to the
    start of the first expert (None: as `synchronize`), `cpu_results` from the end of the last to the start of the copy
    of their results (None: a copy's enqueue, by the CPU's own thread).
    """

    launch: Duration
    graph_launch: Duration
    copy_enqueue: Duration
    synchronize: DurationBesideCopy
    product_launches: dict[str, Duration] = {}
    further_launch: Duration = NO_TIME
    attention_launch: Duration | None = None
    readback_enqueue: Duration | None = None
    event_record: Duration = NO_TIME
    event_wait: Duration = NO_TIME
    readback: DurationBesideCopy | None = None
    readback_late: Duration | None = None
    resume: Duration = NO_TIME
    copy_resume: Duration = NO_TIME
    peer_enqueue: Duration | None = None
    turn: Duration = NO_TIME
    exchange_call: Duration | None = None
    expert_move: Duration | None = None
    cpu_hand_over: Duration | None = None
    cpu_take_back: Duration | None = None
    cpu_notice: Duration | None = None
    cpu_results: Duration | None = None

    @field_validator("product_launches", mode="before")
    @classmethod
    def _of_known_dtypes(cls, launches: object) -> object:
        if not isinstance(launches, dict):
            return launches
        named: dict[str, Any] = {}
        for name, cost in launches.items():
            try:
                dtype = dtype_of(str(name))
            except InputError as error:
                raise InputError(f"{name!r}: {error}") from None
            if dtype in named:
                raise InputError(f"{name}: given already, as {dtype}: give each dtype once")
            named[dtype] = cost
        return named
