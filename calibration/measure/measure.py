"""Measuring a machine: what every copy, kernel and call takes on it, by CUDA events; in rounds, raw samples kept.

Functions of `copies` and `kernels` make probes: things to time, made ready beforehand. A round takes
every probe once, and rounds are repeated, so that the samples of one thing lie apart in time. Copied bytes are compared
before anything is timed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from ...engine.run import Progress
from .bench import GIB, KIB, MIB, Bench, Extent, MakeProbes, Probe
from .copies import allocation_probes, batch_probes, contention_probes, copy_probes, link_probes, peer_probes
from .exchanges import exchange_probes
from .kernels import (
    cpu_probes,
    host_probes,
    kernel_probes,
    latency_probes,
    launch_queue_depths,
    predictor_probes,
)
from .samples import Samples, Series

_Name = tuple[str, tuple[tuple[str, int | str], ...]]


FULL = Extent(
    models={"mixtral-8x7b": 2, "qwen3-30b-a3b": 4, "switch-base-128": 12, "deepseek-v2-lite": 4, "olmoe-1b-7b": 4},
    copy_bytes=(*(4 * KIB << 2 * power for power in range(9)), GIB),
    batches=(1, 2, 5, 10, 20),
    tokens=tuple(2**power for power in range(13)),
    contexts=(1024, 8192, 32768),
    cpu_tokens=(1, 16),
    allocation_bytes=(27 * MIB, 336 * MIB),
    rounds=5,
)
QUICK = Extent(
    models={"qwen3-30b-a3b": 4},
    copy_bytes=(4 * KIB, 256 * KIB, 16 * MIB, GIB),
    batches=(1, 10),
    tokens=(1, 8, 64, 512),
    contexts=(8192,),
    cpu_tokens=(1,),
    allocation_bytes=(27 * MIB,),
    rounds=2,
)


#: No round but the first two is begun after so long.
_LAST_ROUND_S = 200.0
#: Probes at the start of a round that are taken twice, and count the second time.
_SETTLING = 20


def measure(
    gpu: Any, extent: Extent = FULL, progress: Progress | None = None, what: Sequence[MakeProbes] | None = None
) -> Samples:
    """Measure a GPU (`cuda.Gpu`) and return the samples: of all there is to measure, or of some.

    Raises RuntimeError if a copy brought other bytes.
    """
    bench = Bench(gpu, extent)
    probes = [probe for make in (PROBES if what is None else what) for probe in make(bench)]
    series, depths = take_rounds(probes, extent.rounds, progress), launch_queue_depths(bench)
    return described(gpu, series, depths)


def described(gpu: Any, series: tuple[Series, ...], launch_queue_depth: tuple[int, ...] = ()) -> Samples:
    """Returns series as samples of the machine that a GPU is in, taken today."""
    return Samples(
        date=datetime.now(UTC).date().isoformat(),
        cpu_threads=os.cpu_count() or 1,
        gpus=gpu.count(),
        series=series,
        launch_queue_depth=launch_queue_depth,
        **gpu.describe(),
    )


def take_rounds(probes: Sequence[Probe], rounds: int, progress: Progress | None = None) -> tuple[Series, ...]:
    """Take every probe once a round, `rounds` times, or less often if time runs out."""
    seen: dict[_Name, list[list[int]]] = {}
    began_s = time.monotonic()
    for probe in probes:  # loads kernels, fills caches and raises the clocks
        list(probe())
    for number in range(rounds):
        if number > 1 and time.monotonic() - began_s > _LAST_ROUND_S:
            break
        here: dict[_Name, list[int]] = {}
        for probe in probes[:_SETTLING]:  # what the last round ended with, freed memory, slows copies for a while
            list(probe())
        for done, probe in enumerate(probes, 1):
            for term, key, samples_ns in probe():
                here.setdefault((term, tuple(sorted(key.items()))), []).extend(samples_ns)
            if progress is not None:
                progress("measure", number * len(probes) + done, rounds * len(probes))
        for name, samples in here.items():
            seen.setdefault(name, []).append(samples)
    return tuple(
        Series(term=term, key=dict(key), rounds_ns=tuple(map(tuple, by_round)))
        for (term, key), by_round in seen.items()
    )


#: All there is to measure, in order.
PROBES: tuple[MakeProbes, ...] = (
    copy_probes,
    batch_probes,
    contention_probes,
    link_probes,
    peer_probes,
    exchange_probes,
    kernel_probes,
    predictor_probes,
    host_probes,
    latency_probes,
    cpu_probes,
    allocation_probes,
)
#: What several GPUs of one machine add.
LINKS: tuple[MakeProbes, ...] = (link_probes, peer_probes, exchange_probes)
#: What the transfer benchmark needs.
TRANSFERS: tuple[MakeProbes, ...] = (copy_probes, batch_probes, allocation_probes)
