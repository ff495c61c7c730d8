"""What products take of the host over their shapes: how long their calls last, and how many kernels they launch.

A library splits a product of few tokens and many columns over several blocks and adds up their parts in a kernel of its
own, so that one call launches two. The GPU's time for it is the surface's; the host's is seen here. Kernels are counted
in a CUDA graph of the calls, and calls are timed on an idle GPU, whose work is waited for in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from time import perf_counter_ns
from typing import Any

from ...collector import collector_off
from ...engine.run import Progress
from ..device.cuda import Calls, itemsize, run
from .samples import SurfaceSeries

_ROWS = (
    *(128, 256, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536, 1664, 1792, 1920, 2048, 2304, 2560, 2880, 3072),
    *(3328, 3584, 4096, 4608, 5120, 5376, 6144, 6656, 7168, 8192, 10240, 12288, 14336, 16384, 20480, 32768),
)
_ROWS_32 = (256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384)
_TOKENS = (1, 2, 4, 8, 16)
#: Calls that are timed together, and how often: the median of a noisy host.
CALLS, _REPEATS = 8, 5
#: Matrices of more elements are left out: they take the GPU longer than the host.
_MOST = 2**27


@dataclass(frozen=True)
class Shapes:
    """Products of (tokens, columns) and (columns, rows) whose calls are timed, for a dtype."""

    dtype: str
    rows: Sequence[int]
    columns: Sequence[int]
    tokens: Sequence[int]


SHAPES = (
    Shapes("bfloat16", _ROWS, _ROWS, _TOKENS),
    Shapes("float32", _ROWS_32, _ROWS_32, (1, 4, 16)),
)


def measure_launches(
    gpu: Any, shapes: Sequence[Shapes] = SHAPES, progress: Progress | None = None
) -> tuple[SurfaceSeries, ...]:
    """Returns a series for each shape: `kernels` that CALLS calls launch, and the host's ns for all these calls."""
    series: list[SurfaceSeries] = []
    for part in shapes:
        todo = [each for each in product(part.rows, part.columns, part.tokens) if each[0] * each[1] <= _MOST]
        most = max(each[0] * each[1] for each in todo), max(part.tokens) * max(*part.rows, *part.columns)
        weights, inputs = (gpu.random(count, dtype=part.dtype, scale=0.02, seed=5) for count in most)
        outputs = gpu.empty(most[1] * itemsize(part.dtype)).view(inputs.dtype)
        with collector_off():
            for done, (rows, columns, tokens) in enumerate(todo):
                calls = _calls(weights, inputs, outputs, rows, columns, tokens)
                kernels = gpu.launches(calls)
                samples_ns = tuple(_host_ns(gpu, calls) for _ in range(_REPEATS))
                shape = (rows, columns, tokens)
                series.append(SurfaceSeries("launch", part.dtype, "eager", "none", shape, kernels, samples_ns))
                if progress is not None and done % 100 == 0:
                    progress("launches", done, len(todo))
    return tuple(series)


def _calls(weights: Any, inputs: Any, outputs: Any, rows: int, columns: int, tokens: int) -> Calls:
    import torch

    x, y = inputs[: tokens * columns].view(tokens, columns), outputs[: tokens * rows].view(tokens, rows)
    matrix = weights[: rows * columns].view(rows, columns).t()
    return ((partial(torch.mm, out=y), (x, matrix)),) * CALLS


def _host_ns(gpu: Any, calls: Calls) -> int:
    """Returns how long the host takes to make the calls, behind which it waits for their work."""
    gpu.synchronize()
    began_ns = perf_counter_ns()
    run(calls)
    ended_ns = perf_counter_ns()
    gpu.synchronize()
    return max(1, ended_ns - began_ns)
