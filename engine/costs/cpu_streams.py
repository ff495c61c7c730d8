"""Experts on the CPU by the rate at which host memory is read (STREAM), of which a runtime's kernels reach a share.

A share was measured for one dtype, size of an expert, tokens and number of threads. Between sizes it runs straight over
their logarithm, and beyond the last it stays; of threads the nearest measured number counts, and so of tokens. A dtype
that was not measured has the runtime's own share of any, or where the runtime says nothing the middle of those that
published engines reach. Threads reach no more than each of them does alone, and no kernel more than STREAM.

Where a runtime says what a thread computes by dtype (`cpu_cores`), of weights that lie in its cache, and what it reads
of memory (`cpu_thread`, or its part of STREAM), each is a time, and both in part hide behind each other: together they
take the 1.5-norm of the two. Of a dtype that was not measured, threads compute as many weights a second as of the
measured ones: straight over the logarithms of bits and weights, beyond them as the last. What was measured of the
nearest number of tokens counts. Of a dtype that was measured with several numbers of threads, what these compute
together runs straight between them; with more, or fewer, each does what it did with the nearest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...dtypes import bits_of
from ...resources.profile import Profile
from ...resources.runtime import CpuCore, CpuRate, Runtime
from ..scenario.sections_memory import MissSection

#: Between which shares of STREAM the experts of published engines lie, and their middle (a ratio's).
LOWEST, HIGHEST = 0.25, 0.94
MIDDLE = (LOWEST * HIGHEST) ** 0.5
#: How far a share is off of which that is all there is: the two are p5 and p95.
SPREAD = 0.4
#: What copies and experts on the CPU reach of STREAM together.
_TOGETHER = 0.95
#: The norm of the times of reading and computing: 1 if neither hid behind the other, endless if one did wholly. It is
#: what joins what was measured of both apart and together, on an H200's host.
_HIDDEN = 1.5
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

    @property
    def by_thread(self) -> bool:
        """Whether it is known what a thread reads and what it computes, and how many there are."""
        known = self._runtime.cpu_cores and self._runtime.costs.cpu_thread is not None
        return bool(known) and self._threads is not None

    def computed(self, dtype: str, tokens: int) -> float | None:
        """Returns the bytes of weights a second that all threads compute, each byte once for so many tokens."""
        if not self._runtime.cpu_cores or self._threads is None:
            return None
        return _core_rate(self._runtime.cpu_cores, dtype, tokens, self._threads) * self._threads / tokens

    def rate(self, dtype: str, size_bytes: int, tokens: int) -> tuple[float, str]:
        """Returns the bytes a second that an expert is computed with, and how that was made, in words."""
        if self.by_thread:
            return self._by_thread(dtype, tokens)
        share, words = self.share(dtype, size_bytes, tokens)
        rate = share * self._stream
        said = f"{share:.2f} of {self._stream / 1e9:g} GB/s ({self._given}; {words})"
        core = self._runtime.costs.cpu_core
        if core is not None and self._threads is not None and core.bytes_per_second * self._threads < rate:
            rate = core.bytes_per_second * self._threads
            said = f"{self._threads} threads of {core.bytes_per_second / 1e9:g} GB/s ({core.source}), below {said}"
        return min(rate, self._stream), said

    def _by_thread(self, dtype: str, tokens: int) -> tuple[float, str]:
        """Returns bytes of an expert's weights a second, each counted once, by what a thread reads and computes."""
        computed, thread, threads = self.computed(dtype, tokens), self._runtime.costs.cpu_thread, self._threads
        assert computed is not None and thread is not None and threads is not None
        read = min(self._stream, threads * float(thread.bytes_per_second))
        rate = (read**-_HIDDEN + computed**-_HIDDEN) ** (-1 / _HIDDEN)
        said = f" over {tokens} tokens" if tokens > 1 else ""
        return rate, (
            f"{threads} threads that read {read / 1e9:.1f} GB/s of {self._stream / 1e9:g} ({self._given}) and compute "
            f"{computed / 1e9:.1f}{said} by the runtime's table, which in part hide behind each other"
        )

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


def _core_rate(cores: Sequence[CpuCore], dtype: str, tokens: int, threads: int) -> float:
    """Returns what each of so many threads computes of a dtype, in bytes a second for one of so many tokens."""
    bits = float(bits_of(dtype))
    together = [core for core in cores if core.threads is not None and float(bits_of(core.dtype)) == bits]
    if together:
        return _thread_rate(_at_tokens(together, tokens), threads)
    cores = [core for core in cores if core.threads is None] or cores
    known = sorted({float(bits_of(core.dtype)) for core in cores})
    weights = []
    for each in known:
        own = _at_tokens([core for core in cores if float(bits_of(core.dtype)) == each], tokens)
        rate = own[0].bytes_per_second if own[0].threads is None else _thread_rate(own, threads)
        weights.append(rate * 8 / each)
    return float(np.exp(np.interp(np.log(bits), np.log(known), np.log(weights)))) * bits / 8


def _at_tokens(cores: Sequence[CpuCore], tokens: int) -> list[CpuCore]:
    """Returns the rates of the nearest number of tokens, by its ratio."""
    nearest = min((core.tokens for core in cores), key=lambda one: (abs(np.log(one / tokens)), one))
    return [core for core in cores if core.tokens == nearest]


def _thread_rate(cores: Sequence[CpuCore], threads: int) -> float:
    """Returns what each of so many threads computes: what they do together runs straight between measured numbers."""
    counts, rates = np.array(sorted((core.threads, core.bytes_per_second) for core in cores), dtype=np.float64).T
    inside = float(np.clip(threads, counts[0], counts[-1]))
    return float(np.interp(inside, counts, counts * rates)) / inside


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
