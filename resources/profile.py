"""The profile: the measured costs of one machine, as a JSON file that says where each number came from.

Every cost carries a `source` (measured, published, datasheet or assumed) and a `note`; every key carries its unit.
A profile knows nothing of models: what a kernel of a given size costs on it is a table of measured points and a
stated rule for the rest.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .suggest import unknown_name

Source = Literal["measured", "published", "datasheet", "assumed"]


class ProfileError(ValueError):
    """A profile that cannot be found, read or believed."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Samples(_Part):
    """What a measured number was made from: how many samples, their median and interquartile range."""

    n: int = Field(gt=0)
    median_ns: float = Field(ge=0)
    iqr_ns: float = Field(ge=0)


class _Cost(_Part):
    source: Source
    note: str = ""
    samples: Samples | None = None


class Duration(_Cost):
    """A cost that does not depend on size."""

    ns: int = Field(ge=0)


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
            raise ValueError("give latency_ns and bytes_per_second, or points: one of the two")
        if self.points is not None:
            if len(self.points) < 2:
                raise ValueError("points: give at least two")
            for (bytes_a, ns_a), (bytes_b, ns_b) in zip(self.points, self.points[1:], strict=False):
                if bytes_b <= bytes_a or ns_b < ns_a or bytes_a < 0 or ns_a < 0:
                    raise ValueError(f"points: ({bytes_b}, {ns_b}) after ({bytes_a}, {ns_a}) must grow")
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


class CopyCosts(_Part):
    """One direction of copies: a copy on an idle engine, one queued right behind another, and the gap between."""

    alone: TransferCost
    queued: TransferCost
    gap: Duration


class ExpertPoint(_Cost):
    """One expert's kernels, measured: its shape, weights, tokens and dispatch; alone on the GPU and beside a copy."""

    hidden: int = Field(gt=0)
    expert_ff: int = Field(gt=0)
    dtype: str
    tokens: int = Field(gt=0)
    dispatch: Literal["eager", "graph"]
    ns: int = Field(gt=0)
    beside_copy_ns: int = Field(gt=0)


class KernelRule(_Cost):
    """The rule for kernels that were not measured.

    constant_ns + max(weight bytes / bytes_per_second, 2 x weights x tokens / flops_per_second). Beside a copy the
    part after the constant takes beside_copy_factor times as long.
    """

    constant_ns: int = Field(ge=0)
    bytes_per_second: int = Field(gt=0)
    flops_per_second: int = Field(gt=0)
    beside_copy_factor: float = Field(ge=1, le=10)


class ComputeCosts(_Part):
    """The compute stream: measured experts, the rule for all else, and the gap between consecutive launches."""

    experts: tuple[ExpertPoint, ...] = ()
    rule: KernelRule
    eager_gap: Duration
    graph_gap: Duration


class HostCosts(_Part):
    """The dispatching thread's time for each call; `synchronize` is from the end of a copy to the host knowing."""

    launch: Duration
    graph_launch: Duration
    copy_enqueue: Duration
    synchronize: Duration


class Allocation(_Part):
    """The host's time to get room: from the driver (raw), or from the caching allocator's free blocks."""

    raw: Duration
    cached: Duration


class Profile(_Part):
    """One machine: its identity and its costs. `h2d` maps the kind of host memory (pinned, pageable) to costs."""

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
    compute: ComputeCosts
    host: HostCosts
    allocation: Allocation | None = None


def profile_names() -> list[str]:
    """Return the names of the shipped profiles."""
    folder = resources.files("prestage") / "calibration" / "profiles"
    return sorted(entry.name[: -len(".json")] for entry in folder.iterdir() if entry.name.endswith(".json"))


def load_profile(name: str) -> Profile:
    """Return a shipped profile by its name, or one from a JSON file by its path; raise ProfileError if it is bad."""
    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise ProfileError(f"machine.profile = {name!r}: no such file")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileError(f"machine.profile = {name!r}: cannot be read: {error}") from None
    elif name in profile_names():
        text = (resources.files("prestage") / "calibration" / "profiles" / f"{name}.json").read_text("utf-8")
    else:
        raise ProfileError(unknown_name("machine.profile", name, [*profile_names(), "FILE.json"]))
    try:
        return Profile.model_validate(json.loads(text))
    except json.JSONDecodeError as error:
        raise ProfileError(f"profile {name}: not JSON: {error}") from None
    except ValidationError as error:
        problems = [_explain(problem["loc"], problem["msg"], problem["input"]) for problem in error.errors()]
        raise ProfileError(f"profile {name}: {'; '.join(problems)}") from None


def _explain(place: tuple[int | str, ...], message: str, given: object) -> str:
    """Return one of pydantic's problems as key, value and what would be right."""
    key = ".".join(str(part) for part in place) or "profile"
    message = message.removeprefix("Value error, ").replace("Input should be", "must be")
    message = message.replace("Extra inputs are not permitted", "no such key")
    return f"{key} = {given!r}: {message}" if isinstance(given, str | int | float) else f"{key}: {message}"
