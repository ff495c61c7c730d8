"""Samples: what `prestage calibrate measure` saw on one machine, raw, as a JSON file that is checked when it is read.

A series holds all samples of one thing, in ns, round by round: a round goes once through everything that is measured,
so that rounds lie apart in time and tell how far the machine differs from itself. `TERMS` says what there is to
measure and what each depends on.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...bounded import read, unpacked
from ...dtypes import bits_of
from ...errors import InputError
from ...words import problems

#: What is measured, with the keys that tell its series apart.
TERMS: dict[str, tuple[str, ...]] = {
    # One copy: alone on an idle engine, queued behind another of its size, or one of a flood with nothing between;
    # beside other work, or not ("none").
    "copy": ("direction", "memory", "bytes", "mode", "beside"),
    # From the end of one copy to the start of the next.
    "copy_gap": ("direction", "memory"),
    # Several copies in a row with nothing between them, all together.
    "copy_batch": ("direction", "memory", "bytes", "copies"),
    # So many copies over two streams of one direction, all together.
    "copy_streams": ("direction", "bytes", "copies", "streams"),
    # Getting room: from the driver (raw) or from the caching allocator (cached); all together, host time.
    "allocation": ("how", "bytes", "blocks"),
    # The kernels of a dense part, an expert or the head; alone, queued behind others, or beside copies from the host or
    # from another GPU. `size` is an expert's inner width, otherwise the weight bytes.
    "kernel": ("part", "hidden", "size", "dtype", "kernels", "tokens", "context", "dispatch", "where"),
    # From the end of one group of kernels to the start of the next, which was queued.
    "kernel_gap": ("dispatch", "beside"),
    # From the end of what a stream waits for to the start of what waits.
    "event_wait_gap": ("waits",),
    # From an event on one GPU to one on another that waits for it: half of the way there and back.
    "peer_wait": (),
    # Of GPUs that each send so many bytes to each other one, by copies or by NCCL's all-to-all: in a row, in which each
    # waits for the last on all GPUs; or the host's time, for both GPUs (copies) or one of the processes (nccl).
    "exchange": ("how", "bytes", "gpus", "mode"),
    # Host time of one call; of `turn`, to another GPU and back.
    "host": ("call",),
    # From the return of the last call to the start of the work, on an idle GPU.
    "launch_latency": (),
    # From the end of the dense part to the end of the choice's copy to the host; from there to the host's knowing.
    "readback": (),
    "synchronize": (),
    # One inference of a linear predictor with its top-k.
    "predictor": ("hidden", "experts", "tokens"),
    # One expert on the CPU; beside copies to the GPU ("h2d"), or not ("none").
    "cpu_expert": ("hidden", "size", "dtype", "tokens", "threads", "beside"),
    # One read from a drive past the system's cache, while so many are in flight.
    "read": ("bytes", "in_flight"),
}

Key = dict[str, int | str]


class SamplesError(InputError):
    """A file that holds no samples."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Series(_Part):
    """All samples of one thing: its term, the keys that TERMS asks for, and the samples of each round, in ns."""

    term: str
    key: Key
    rounds_ns: tuple[tuple[int, ...], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _known(self) -> Series:
        if self.term not in TERMS:
            raise InputError(f"term = {self.term!r}: choose one of {', '.join(TERMS)}")
        if set(self.key) != set(TERMS[self.term]):
            raise InputError(f"{self.term}: key must have {', '.join(TERMS[self.term])} (given {', '.join(self.key)})")
        for name, value in self.key.items():
            least = 0 if name == "context" else 1
            if isinstance(value, int) and not least <= value <= 2**53:
                raise InputError(f"{self.term}: key {name} = {value}: must be at least {least}, and at most 2**53")
        if not all(self.rounds_ns) or min(min(samples) for samples in self.rounds_ns) < 0:
            raise InputError(f"{self.term} {self.key}: every round must have samples, none below 0")
        return self


#: What kernels of the surface are, how they are launched, and what runs beside them.
Kind = Literal["product", "negate", "multiply", "attention", "prompt", "launch"]
#: How many sizes the shape of each has.
SHAPES: dict[str, int] = {"product": 3, "negate": 1, "multiply": 1, "attention": 5, "prompt": 4, "launch": 3}
Dispatch = Literal["graph", "eager"]
Load = Literal["none", "h2d"]


class SurfaceSeries(NamedTuple):
    """All samples of one row of kernels of one shape, in ns for all `kernels` of it together.

    `what` is a product of (tokens, columns) and (columns, rows), whose shape is (rows, columns, tokens); a small kernel
    (negate, multiply) of so many elements; attention of one new token a sequence (sequences, KV heads, query heads a KV
    head, head width, positions); or that of a prompt (KV heads, query heads a KV head, head width, tokens). A launch is
    the host's time for some calls of a product, which launch so many kernels.
    """

    what: Kind
    dtype: str
    dispatch: Dispatch
    beside: Load
    shape: Annotated[tuple[Annotated[int, Field(ge=1, le=2**53)], ...], Field(min_length=1, max_length=5)]
    kernels: Annotated[int, Field(ge=1, le=2**20)]
    samples_ns: Annotated[tuple[Annotated[int, Field(ge=1, le=10**12)], ...], Field(min_length=1)]


class Samples(_Part):
    """Everything measured on one machine in one go: what `TERMS` names, the surface of its kernels, or both.

    `launch_queue_depth` is how many launches the driver takes before one blocks, once for each try.
    """

    format: Literal["prestage samples 1"] = "prestage samples 1"
    device: str
    gpus: int = Field(ge=1)
    gpu_memory_bytes: int = Field(gt=0)
    driver: str
    date: str
    versions: dict[str, str]
    cpu_threads: int = Field(ge=1)
    launch_queue_depth: tuple[int, ...] = ()
    series: tuple[Series, ...] = ()
    surface: tuple[SurfaceSeries, ...] = ()

    @model_validator(mode="after")
    def _has_some(self) -> Samples:
        if not self.series and not self.surface:
            raise InputError("series, surface: give one of the two at least")
        if any(series.term != "read" for series in self.series) and not self.launch_queue_depth:
            raise InputError("launch_queue_depth: missing")
        for number, row in enumerate(self.surface):
            try:
                bits_of(row.dtype)
            except InputError as error:
                raise InputError(f"surface.{number}: dtype = {row.dtype!r}: {error}") from None
            if len(row.shape) != SHAPES[row.what]:
                raise InputError(
                    f"surface.{number}: {row.what} of {row.dtype} has {len(row.shape)} sizes: give {SHAPES[row.what]}"
                )
        return self

    def save(self, path: Path) -> None:
        """Write the samples as compact JSON, compressed if the file's name ends in .gz."""
        from ...files import replacing

        data = self.model_dump(exclude=None if self.surface else {"surface"})
        text = json.dumps(data, separators=(",", ":")).encode() + b"\n"
        with replacing(path) as file:
            file.write(gzip.compress(text, mtime=0) if path.name.endswith(".gz") else text)


def load_samples(path: Path) -> Samples:
    """Read samples; SamplesError, naming file and key, if they are not what `save` writes."""
    try:
        text = unpacked(read(path, SamplesError), path, SamplesError).decode("utf-8")
    except OSError as error:
        raise SamplesError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SamplesError(f"{path}: not UTF-8 text") from None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SamplesError(f"{path}: not JSON: {error}") from None
    try:
        return Samples.model_validate_json(text)
    except ValidationError as error:
        raise SamplesError(f"{path}: {problems(error, Samples, data)}") from None
