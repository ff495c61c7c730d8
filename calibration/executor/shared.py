"""What executions share: memory that experts are copied from, a file that they are read from, ways between GPUs."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from ...engine.scenario.inputs import Inputs
from ...errors import InputError
from ...files import replacing
from ...units import bytes_words
from ..device.cuda import CudaError
from ..device.host import Cores

#: Bytes of host memory that the experts' copies alias if they need more.
POOL_BYTES = 3 * 2**30
#: What reads that pass by the system's cache are aligned to: addresses, places in the file and sizes.
ALIGNED = 4096


def aligned(size_bytes: int) -> int:
    """Returns so many bytes, rounded up to what reads are aligned to."""
    return -(-size_bytes // ALIGNED) * ALIGNED


def aligned_empty(gpu: Any, size_bytes: int, *, pinned: bool = True) -> Any:
    """Returns uninitialized host memory that begins where a read may."""
    memory = gpu.host_empty(size_bytes + ALIGNED, pinned=pinned)
    first = -memory.data_ptr() % ALIGNED
    return memory[first : first + size_bytes]


class Shared:
    """What executions share: memory that experts are copied from, filled with random weights once, and GPU memory.

    Each buffer holds numbers of its own, so that a slot's bytes tell which buffer they came from. The pool lies in
    host memory, pinned or not, or in the memory of the GPU `peer`. `cores` knows how fast the host can be. `drive` is
    the file on the drive that takes a copy of the pool where experts are read from there.
    """

    def __init__(
        self, gpu: Any, size_bytes: int = POOL_BYTES, *, pinned: bool = True, peer: Any = None,
        drive: Path | None = None,
    ) -> None:  # fmt: skip
        self.cores = Cores()
        self.peer = peer
        self._drive, self._fd = drive, -1
        self._on_gpu: dict[int, dict[Any, Any]] = {}
        self.bytes = aligned_empty(gpu, size_bytes, pinned=pinned) if peer is None else peer.empty(size_bytes)
        piece = 64 * 2**20
        for number, start in enumerate(range(0, size_bytes, piece)):
            part = self.bytes[start : start + piece]
            random = gpu.random(len(part) // 2, dtype="bfloat16", scale=0.02, seed=1000 + number)
            part[: len(random) * 2].copy_(random.view(part.dtype))
        gpu.synchronize()

    def on(self, gpu: Any) -> dict[Any, Any]:
        """Returns what workloads on a GPU share there."""
        return self._on_gpu.setdefault(gpu.index, {})

    def buffers(self, sizes: Sequence[int]) -> list[Any]:
        """Returns a buffer for each expert, of its bytes; they repeat where the pool is too small for all."""
        views: list[Any] = []
        at = 0
        for size_bytes in sizes:
            if size_bytes > len(self.bytes):
                raise InputError(
                    f"an expert of {bytes_words(size_bytes)} is larger than the pool, {bytes_words(len(self.bytes))}"
                )
            if at + size_bytes > len(self.bytes):
                at = 0
            views.append(self.bytes[at : at + size_bytes])
            at += aligned(size_bytes)
        return views

    def place_in_file(self, buffer: Any) -> int:
        """Returns where the bytes of a buffer lie in the file on the drive."""
        return int(buffer.data_ptr() - self.bytes.data_ptr())

    def file_descriptor(self) -> int:
        """Returns the file on the drive, open for reads that pass by the system's cache; it is written at first.

        Raises CudaError if there is none, or its file system has no such reads.
        """
        if self._fd >= 0:
            return self._fd
        if self._drive is None:
            raise CudaError(
                "tiers.host_budget: experts are read from a drive: name a file there that may be written, --drive FILE"
            )
        try:
            with replacing(self._drive) as file:
                file.write(memoryview(self.bytes.numpy()))
                file.write(bytes(ALIGNED))
            self._fd = os.open(self._drive, os.O_RDONLY | os.O_DIRECT)
            with mmap.mmap(-1, ALIGNED) as page:
                os.preadv(self._fd, [page], 0)
        except OSError as error:
            raise CudaError(
                f"--drive {self._drive}: {error.strerror}: give a file on a drive whose file system reads past the "
                f"cache (O_DIRECT)"
            ) from None
        return self._fd

    def close(self) -> None:
        """Remove the file on the drive, if there is one."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._drive is not None:
            self._drive.unlink(missing_ok=True)


@dataclass(frozen=True)
class Way:
    """The way from one GPU to another: memory on both, the events behind each step's copy, and the streams.

    torch orders a copy between GPUs behind the current streams of both: that of the first makes it, and `behind` is one
    of the second that has nothing else to do. Between two threads, `made` says of each step whether the copy is
    enqueued: only then can a stream wait for its event.
    """

    source: Any
    target: Any
    behind: Any
    ends: Sequence[Any]
    made: Sequence[Event]


@dataclass(frozen=True)
class Ways:
    """The ways that a stage receives by and sends by, if it does."""

    receives: Way | None = None
    sends: Way | None = None


def slot_bytes(inputs: Inputs) -> int:
    """Returns the bytes of a slot: of the largest expert, as it lies in GPU memory; of packed ones, for kernels."""
    compression = inputs.scenario.compression
    size_bytes = max(compression.kept_bytes(size) for size in inputs.model.expert_bytes)
    return size_bytes if compression.where == "none" else row_bytes(size_bytes)


def row_bytes(size_bytes: int) -> int:
    """Returns so many bytes, rounded up so that kernels may begin behind them."""
    return -(-size_bytes // 256) * 256


def check_slots(inputs: Inputs, slots: int, free_bytes: int) -> None:
    """Raise CudaError if so many experts take more than is free of a GPU, or one takes more than the pool."""
    size_bytes = slot_bytes(inputs)
    if size_bytes > POOL_BYTES:
        raise CudaError(
            f"model {inputs.model.name}: an expert takes {bytes_words(size_bytes)}, and the pool that experts are "
            f"copied from {bytes_words(POOL_BYTES)}"
        )
    if slots * size_bytes > free_bytes:
        raise CudaError(
            f"memory.gpu_budget = {inputs.scenario.memory.gpu_budget!r}: {slots} experts take "
            f"{bytes_words(slots * size_bytes)}, and {bytes_words(free_bytes)} of the GPU are free"
        )
