"""A device that runs on the CPU what an execution asks of a GPU: every call is done when it returns.

It makes the same products and copies into the same slots, so that all of an execution but the CUDA calls can be tested
anywhere: streams and events keep their places but have nothing to wait for.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from prestage.calibration.device.cuda import Call, Calls, run


class CpuStream:
    """Where something was put."""


class CpuEvent:
    """The time at which it was recorded; waiting for one that never was is the bug that CUDA would hide."""

    def __init__(self) -> None:
        self.at_ns = -1

    def record(self, stream: CpuStream) -> None:
        assert isinstance(stream, CpuStream)
        self.at_ns = time.perf_counter_ns()

    def wait(self, stream: CpuStream) -> None:
        assert isinstance(stream, CpuStream)
        assert self.at_ns >= 0, "a wait for an event that is not recorded"

    def query(self) -> bool:
        return self.at_ns >= 0

    def synchronize(self) -> None:
        assert self.at_ns >= 0, "a wait for an event that is not recorded"

    def elapsed_time(self, other: CpuEvent) -> float:
        return (other.at_ns - self.at_ns) / 1e6


class CpuGraph:
    """Calls kept for later."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def replay(self) -> None:
        run(self.calls)


class CpuDevice:
    """The surface of `prestage.calibration.device.cuda.Gpu`; several stand for several GPUs."""

    device = torch.device("cpu")

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self.current: CpuStream | None = None

    def empty(self, *shape: int, dtype: str = "uint8") -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype))

    def random(self, *shape: int, dtype: str, scale: float, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.empty(shape, dtype=getattr(torch, dtype)).normal_(0.0, scale, generator=generator)

    def host_empty(self, *shape: int, dtype: str = "uint8", pinned: bool = True) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype))

    def stream(self) -> CpuStream:
        return CpuStream()

    def use(self, stream: CpuStream) -> Call:
        return self._use, (stream,)

    def _use(self, stream: CpuStream) -> None:
        self.current = stream

    def event(self) -> CpuEvent:
        return CpuEvent()

    def write_flag(self, flags: torch.Tensor, number: int, stream: CpuStream) -> Call:
        assert isinstance(stream, CpuStream)
        return flags.numpy().__setitem__, (number, 1)

    def wait_flag(self, flags: torch.Tensor, number: int, stream: CpuStream) -> Call:
        assert isinstance(stream, CpuStream)
        return self._wait_flag, (flags.numpy(), number)

    def _wait_flag(self, words: Any, number: int) -> None:
        """Only threads beside this one write the flag: what this one would have to write hangs here, and fails."""
        until = time.monotonic() + 30
        while not words[number]:
            assert time.monotonic() < until, "a wait for a flag that nobody writes"
            time.sleep(0)

    def between(self, target: torch.Tensor, source: torch.Tensor, stream: CpuStream) -> Call:
        assert isinstance(stream, CpuStream)
        size = min(target.numel(), source.numel())
        return target[:size].copy_, (source[:size],)

    def meet(self, other: CpuDevice) -> None:
        pass

    def graph_pool(self) -> None:
        return None

    def launches(self, calls: Calls) -> int:
        run(calls)
        return len(calls)

    def capture(self, calls: Calls, pool: None) -> CpuGraph:
        return CpuGraph(calls)

    def synchronize(self) -> None:
        pass

    def free_bytes(self) -> int:
        return 2**30

    def describe(self) -> dict[str, Any]:
        return {"device": "CPU", "gpu_memory_bytes": 1, "driver": "none", "versions": {"torch": torch.__version__}}
