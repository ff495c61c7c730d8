"""Experts on the CPU by the rate at which host memory is read (STREAM), of which a runtime's kernels reach a share.

A share was measured for one dtype, size of an expert, tokens and number of threads. Between sizes it runs straight over
their logarithm, and beyond the last it stays; of threads the nearest measured number counts, and so of tokens. A dtype
that was not measured has the runtime's own share of any, or where the runtime says nothing the middle of those that
published engines reach. Threads reach no more than each of them does alone, and no kernel more than STREAM.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...dtypes import bits_of
from ...resources.profile import Profile
from ...resources.runtime import CpuRate, Runtime
from ..scenario.sections_memory import MissSection

#: Between which shares of STREAM the experts of published engines lie, and their middle (a ratio's).
LOWEST, HIGHEST = 0.25, 0.94
MIDDLE = (LOWEST * HIGHEST) ** 0.5
#: How far a share is off of which that is all there is: the two are p5 and p95.
SPREAD = 0.4
#: What copies and experts on the CPU reach of STREAM together.
_TOGETHER = 0.95
#: An expert's weights are read once for so many tokens, as by the kernels that were measured.
TOKENS_A_PASS = 16


class CpuStream:
    """The rate of a runtime's experts on the CPU of one machine."""

    def __init__(self, runtime: Runtime, stream: float, threads: int | None, given: str) -> None:
        """Take what memory is read with, in bytes a second, the threads that compute, and who said so, in words."""
        self._runtime, self._stream, self._threads, self._given = runtime, stream, threads, given

    def share(self, dtype: str, size_bytes: int, tokens: int) -> tuple[float, str]:
        """Returns the share of STREAM that an expert reaches, and where that is from, in words."""
        rates = [rate for rate in self._runtime.cpu_rates if bits_of(rate.dtype) == bits_of(dtype)]
        if rates:
            return _between(_nearest(rates, self._threads, tokens), size_bytes), "by the runtime's table"
        own = self._runtime.costs.cpu_stream
        if own is None:
            return MIDDLE, f"assumed: published engines reach {LOWEST} to {HIGHEST}"
        low, high = (own.share * np.exp(side * 1.645 * own.sigma) for side in (-1, 1))
        return own.share, f"{own.source}: {low:.2f} to {min(1.0, high):.2f} for this runtime"

    def rate(self, dtype: str, size_bytes: int, tokens: int) -> tuple[float, str]:
        """Returns the bytes a second that an expert is computed with, and how that was made, in words."""
        share, words = self.share(dtype, size_bytes, tokens)
        rate = share * self._stream
        said = f"{share:.2f} of {self._stream / 1e9:g} GB/s ({self._given}; {words})"
        core = self._runtime.costs.cpu_core
        if core is not None and self._threads is not None and core.bytes_per_second * self._threads < rate:
            rate = core.bytes_per_second * self._threads
            said = f"{self._threads} threads of {core.bytes_per_second / 1e9:g} GB/s ({core.source}), below {said}"
        return min(rate, self._stream), said

    def beside(self, rate: float, copies: float) -> float:
        """Returns how many times as long copies and experts take beside each other: both want more than there is.

        What both reach together is shared in proportion to what each has alone.
        """
        return max(1.0, (rate + copies) / (_TOGETHER * self._stream))


def cpu_stream(runtime: Runtime, profile: Profile, miss: MissSection) -> CpuStream | None:
    """Returns what a run's experts on the CPU go by; None where its profile's own measurements or rule do."""
    processor = profile.processor
    threads = miss.cpu_threads or (processor.cores if processor is not None else None)
    if miss.cpu_gb_per_s is not None:
        return CpuStream(runtime, miss.cpu_gb_per_s * 1e9, threads, "miss.cpu_gb_per_s, taken as STREAM")
    if runtime.costs.cpu_stream is None or processor is None:
        return None
    given = f"what the profile says of its memory, {processor.provenance}"
    return CpuStream(runtime, float(processor.bytes_per_second), threads, given)


def _nearest(rates: Sequence[CpuRate], threads: int | None, tokens: int) -> list[CpuRate]:
    """Returns the rates of the nearest numbers of threads (the most, if it is not known) and tokens, by their ratio."""
    known = {rate.threads for rate in rates}
    chosen = max(known) if threads is None else min(sorted(known), key=lambda one: abs(np.log(one / threads)))
    rates = [rate for rate in rates if rate.threads == chosen]
    nearest = min(sorted({rate.tokens for rate in rates}), key=lambda one: abs(np.log(one / tokens)))
    return [rate for rate in rates if rate.tokens == nearest]


def _between(rates: Sequence[CpuRate], size_bytes: int) -> float:
    points = sorted((rate.expert_bytes, rate.share) for rate in rates)
    sizes, shares = zip(*points, strict=True)
    return float(np.interp(np.log(size_bytes), np.log(sizes), shares))
