"""Measuring the surface: what single kernels take over their shapes, once per GPU, whatever the model.

A model's parts are sums of matrix products, attention and small kernels. Each is timed here over a grid of shapes, as
operators are by AIConfigurator and Vidur, so that the kernels of a model that nobody measured can be put together.

Kernels are timed as an engine meets them: several of one shape in a row, each with weights (or a KV cache) of its own,
behind a kernel that reads more than the L2 cache holds. Weights are cold, activations are not. Events stand around
the whole row and not between its kernels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import product
from math import prod
from typing import Any

from ...collector import collector_off
from ...dtypes import bits_of
from ...engine.run import Progress
from ..device.cuda import Calls, itemsize
from .bench import MIB, Bench, Extent
from .low_bit import LOW_BIT, divides, products
from .samples import Dispatch, Kind, Load, Samples, SurfaceSeries

#: Sizes of hidden states and inner layers: powers of two, what lies between, and what many models have.
_SIZES = (
    *(64, 128, 256, 384, 512, 640, 768, 1024, 1280, 1408, 1536, 1792, 2048, 2560, 2880, 3072, 3584),
    *(4096, 5120, 6144, 7168, 8192, 10240, 12288, 14336, 16384),
)
#: More rows, over which products are less smooth than over columns; those of heads are a vocabulary's tokens.
_MORE_ROWS = (
    *(192, 320, 704, 832, 960, 1088, 1472, 1600, 1856, 1984, 2112, 2240, 2752, 3200, 3840, 4480, 5632, 6400, 6912),
    *(7680, 9216, 11264, 13312, 24576, 32768, 65536, 98304, 131072, 196608, 262144),
)
_ROWS = tuple(sorted({*_SIZES, *_MORE_ROWS}))
_WIDTHS_32 = (256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384)
_COARSE = (128, 512, 1024, 2048, 4096, 8192, 16384)
#: Powers of two, half-way between them, and three: a library changes its kernels where tokens do not fill a tile.
_TOKENS = tuple(sorted({*(2**power for power in range(13)), *(3 * 2**power for power in range(11))}))

#: Of products of weights in fewer bits: the sizes of many models' experts, attention and heads.
_LOW_BIT_ROWS = (
    *(128, 256, 512, 768, 1024, 1408, 1536, 2048, 2560, 2880, 3072, 4096, 5120, 6144, 7168, 8192, 10240, 14336),
    *(16384, 24576, 32768, 65536, 131072),
)
_LOW_BIT_COLUMNS = (128, 256, 512, 768, 1024, 1408, 1536, 2048, 2560, 2944, 4096, 5120, 6144, 7168, 8192, 14336, 16384)
_LOW_BIT_TOKENS = (1, 2, 4, 8, 16, 24, 32, 64, 128, 256, 512, 1024, 4096)

#: A row of kernels lasts about so long, so that its start, which is fitted too, counts little; and has so many at most.
_ROW_NS, _MOST_KERNELS = 100_000, 12
#: What a kernel is guessed to take, to choose how many stand in a row.
_GUESS_NS, _GUESS_BYTES_PER_NS, _GUESS_FLOPS_PER_NS = 4_000, 4_000, {"float32": 40_000}
_GUESS_FAST_FLOPS_PER_NS = 600_000
#: Repeats of a row: more of short ones.
_REPEATS, _REPEATS_OF_LONG, _LONG_NS = 5, 3, 400_000


@dataclass(frozen=True)
class Products:
    """Products of (tokens, columns) and (columns, rows) to measure, for a dtype, by dispatch, beside copies or not."""

    dtype: str
    rows: Sequence[int]
    columns: Sequence[int]
    tokens: Sequence[int]
    most_flops: float
    ways: Sequence[tuple[Dispatch, Load]] = (("graph", "none"),)


@dataclass(frozen=True)
class Attention:
    """Attention to measure: sequences, KV heads, query heads a KV head, head width, positions; and of prompts."""

    batches: Sequence[int]
    kv_heads: Sequence[int]
    groups: Sequence[int]
    head_dims: Sequence[int]
    contexts: Sequence[int]
    prompts: Sequence[int]
    most_flops: float = 2e13
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Grid:
    """What of the surface is measured; `elements` are those of a small kernel's tensor.

    `pool_bytes` of weights and KV caches take turns, `flush_bytes` are read before each row of kernels.
    """

    products: Sequence[Products]
    elements: Sequence[int]
    attention: Attention
    pool_bytes: int = 4 * 1024 * MIB
    flush_bytes: int = 128 * MIB
    flood_bytes: int = 32 * MIB


_EVERY_WAY: tuple[tuple[Dispatch, Load], ...] = (
    ("graph", "none"), ("graph", "h2d"), ("eager", "none"), ("eager", "h2d"),
)  # fmt: skip
_BESIDE: tuple[tuple[Dispatch, Load], ...] = (("graph", "h2d"),)
_SMALL: tuple[Kind, ...] = ("negate", "multiply")
FULL_GRID = Grid(
    products=(
        Products("bfloat16", _ROWS, _SIZES, _TOKENS, 1.2e12),
        Products("float32", (*_SIZES, 32768, 65536, 131072), _WIDTHS_32, _TOKENS[:21], 6e10),
        *(Products(dtype, _COARSE, _COARSE, (1, 16), 1e12, _BESIDE) for dtype in ("bfloat16", "float32")),
    ),
    elements=tuple(4**power for power in range(4, 14)),
    attention=Attention(
        batches=(1, 4, 16), kv_heads=(1, 2, 4, 6, 8, 16), groups=(1, 8), head_dims=(64, 96, 128, 256),
        contexts=tuple(2**power for power in (7, *range(9, 18))), prompts=(128, 512, 2048, 8192, 32768),
    ),
)  # fmt: skip
#: What `--low-bit` measures: products of weights in fewer bits, to be fitted with a surface that has the rest.
LOW_BIT_GRID = Grid(
    products=(
        Products("float8", _LOW_BIT_ROWS, _LOW_BIT_COLUMNS, _LOW_BIT_TOKENS, 1.2e12),
        Products("int4_g128", _LOW_BIT_ROWS, _LOW_BIT_COLUMNS, _LOW_BIT_TOKENS[:10], 2e11),
    ),
    elements=(),
    attention=Attention(batches=(), kv_heads=(), groups=(), head_dims=(), contexts=(), prompts=()),
)  # fmt: skip


def measure_surface(gpu: Any, grid: Grid = FULL_GRID, progress: Progress | None = None) -> tuple[SurfaceSeries, ...]:
    """Returns the surface's series on a GPU (`cuda.Gpu`)."""
    extent = Extent(
        models={}, copy_bytes=(16 * grid.flood_bytes,), batches=(), tokens=(), contexts=(), cpu_tokens=(),
        allocation_bytes=(), rounds=1, flood_bytes=grid.flood_bytes,
    )  # fmt: skip
    rows = _Rows(Bench(gpu, extent), grid)
    todo = [*_product_rows(grid), *_small_rows(grid), *_attention_rows(grid)]
    series = []
    with collector_off():
        for done, row in enumerate(todo):
            series.append(rows.time(row))
            if progress is not None and done % 100 == 0:
                progress("surface", done, len(todo))
    return tuple(series)


def surface_samples(gpu: Any, surface: tuple[SurfaceSeries, ...]) -> Samples:
    """Returns samples of a GPU that hold its surface alone."""
    return Samples(
        date=datetime.now(UTC).date().isoformat(), cpu_threads=os.cpu_count() or 1, gpus=gpu.count(), surface=surface,
        **gpu.describe(),
    )  # fmt: skip


@dataclass(frozen=True)
class _Row:
    """One row of kernels of a shape: how many, and about what each takes."""

    what: Kind
    dtype: str
    dispatch: Dispatch
    beside: Load
    shape: tuple[int, ...]
    kernels: int
    guess_ns: float


def _product_rows(grid: Grid) -> Iterator[_Row]:
    for part in grid.products:
        for rows, columns, tokens in product(part.rows, part.columns, part.tokens):
            flops, size_bytes = 2 * rows * columns * tokens, int(rows * columns * bits_of(part.dtype) / 8)
            if part.dtype in LOW_BIT and not divides(part.dtype, rows, columns):
                continue
            if flops > part.most_flops or 2 * size_bytes > grid.pool_bytes or tokens * rows > 2**29:
                continue
            per_ns = _GUESS_FLOPS_PER_NS.get(part.dtype, _GUESS_FAST_FLOPS_PER_NS)
            guess_ns = _GUESS_NS + max(size_bytes / _GUESS_BYTES_PER_NS, flops / per_ns)
            count = _count(guess_ns, grid.pool_bytes // size_bytes)
            for dispatch, beside in part.ways:
                yield _Row("product", part.dtype, dispatch, beside, (rows, columns, tokens), count, guess_ns)


def _small_rows(grid: Grid) -> Iterator[_Row]:
    """Rows of one small kernel and of several, whose difference is what one more takes."""
    dtypes = list(dict.fromkeys(part.dtype for part in grid.products))
    for dtype, elements, (dispatch, beside) in product(dtypes, grid.elements, _EVERY_WAY):
        guess_ns = 1_500 + 2 * elements * itemsize(dtype) / 2_500
        for what, count in product(_SMALL, (1, 2, 16)):
            yield _Row(what, dtype, dispatch, beside, (elements,), count, guess_ns)


def _attention_rows(grid: Grid) -> Iterator[_Row]:
    part = grid.attention
    shapes = product(part.batches, part.kv_heads, part.groups, part.head_dims)
    for batch, kv_heads, group, head_dim in shapes:
        for context in part.contexts:
            size_bytes = 2 * batch * kv_heads * head_dim * context * itemsize(part.dtype)
            if 2 * size_bytes <= grid.pool_bytes:
                guess_ns = 10_000 + size_bytes / 2_000
                shape = (batch, kv_heads, group, head_dim, context)
                count = _count(guess_ns, grid.pool_bytes // size_bytes)
                yield _Row("attention", part.dtype, "graph", "none", shape, count, guess_ns)
        for tokens in part.prompts if batch == 1 else ():
            flops = 2 * tokens**2 * kv_heads * group * head_dim
            if flops <= part.most_flops:
                guess_ns = 10_000 + flops / 300_000
                asked = (kv_heads, group, head_dim, tokens)
                yield _Row("prompt", part.dtype, "graph", "none", asked, _count(guess_ns, 4), guess_ns)


def _queries(row: _Row) -> tuple[int, ...]:
    """Returns the shape of a row's queries: (sequences, heads, tokens of each, head width)."""
    kv_heads, group, head_dim, context = row.shape[-4:]
    batch, tokens = (row.shape[0], 1) if row.what == "attention" else (1, context)
    return batch, kv_heads * group, tokens, head_dim


def _count(guess_ns: float, most: int) -> int:
    """Returns how many kernels stand in a row."""
    return max(2, min(_MOST_KERNELS, most, round(_ROW_NS / guess_ns)))


class _Rows:
    """Makes rows of kernels and times them."""

    def __init__(self, bench: Bench, grid: Grid) -> None:
        import torch

        gpu = bench.gpu
        self._bench = bench
        self._pools = {
            dtype: gpu.random(grid.pool_bytes // 2, dtype="bfloat16", scale=0.02, seed=5).view(torch.uint8)
            if dtype in LOW_BIT
            else gpu.random(grid.pool_bytes // itemsize(dtype), dtype=dtype, scale=0.02, seed=5)
            for dtype in dict.fromkeys(part.dtype for part in grid.products)
        }
        self._flushed = gpu.random(grid.flush_bytes // 2, dtype="bfloat16", scale=1.0, seed=6)
        self._most = gpu.empty(1, dtype="bfloat16")[0]
        made, asking = list(_product_rows(grid)), list(_attention_rows(grid))
        most = max([*(row.shape[1] * row.shape[2] for row in made), *(prod(_queries(row)) for row in asking)])
        self._inputs = gpu.random(most, dtype="float32", scale=1.0, seed=7)
        self._outputs = gpu.empty(max(row.shape[0] * row.shape[2] for row in made), dtype="float32")
        small = max(grid.elements, default=1)
        # A pool lives as long as one of its graphs does.
        self._pool = gpu.graph_pool()
        self._first = gpu.capture(((torch.neg, (self._flushed[:1],)),), self._pool)
        self._small = [gpu.random(small, dtype="float32", scale=1.0, seed=seed) for seed in (8, 9)]

    def time(self, row: _Row) -> SurfaceSeries:
        """Returns the samples of a row of kernels, in ns for the whole row."""
        import torch

        bench, timer = self._bench, self._bench.timer
        calls = tuple(self._calls(row))
        if row.dispatch == "graph":
            graph = bench.gpu.capture(calls, self._pool)
            launched: Calls = ((graph.replay, ()),)
        else:
            launched = calls
            for function, args in calls:  # so that no first launch is timed
                function(*args)
        flush: Calls = ((partial(torch.amax, out=self._most), (self._flushed, (0,))),)
        repeats = _REPEATS if row.kernels * row.guess_ns < _LONG_NS else _REPEATS_OF_LONG
        beside = [bench.flood("h2d")] if row.beside == "h2d" else []
        queue = timer.queued(bench.compute, [flush, launched] * repeats, beside)
        samples_ns = tuple(max(1, ns) for ns in queue.durations_ns[1::2])
        return SurfaceSeries(row.what, row.dtype, row.dispatch, row.beside, row.shape, row.kernels, samples_ns)

    def _calls(self, row: _Row) -> Iterable[Any]:
        make = {
            "product": self._products, "negate": self._small_kernels, "multiply": self._small_kernels,
            "attention": self._attention, "prompt": self._attention,
        }  # fmt: skip
        return make[row.what](row)

    def _of(self, memory: Any, row: _Row, *shape: int) -> Any:
        """Returns the beginning of some memory in a row's dtype."""
        import torch

        return memory.view(getattr(torch, row.dtype))[: prod(shape)].view(*shape)

    def _own(self, row: _Row, *shape: int) -> list[Any]:
        """Returns memory of the pool of its own for each kernel of a row, as far as there is any."""
        pool, size = self._pools[row.dtype], prod(shape)
        places = max(1, len(pool) // size)
        starts = [number % places * size for number in range(row.kernels)]
        return [pool[at : at + size].view(*shape) for at in starts]

    def _products(self, row: _Row) -> Iterator[Any]:
        import torch

        rows, columns, tokens = row.shape
        if row.dtype in LOW_BIT:
            inputs = self._inputs.view(torch.bfloat16)
            yield from products(row.dtype, (rows, columns, tokens), self._pools[row.dtype], inputs, row.kernels)
            return
        x, y = self._of(self._inputs, row, tokens, columns), self._of(self._outputs, row, tokens, rows)
        for weights in self._own(row, rows, columns):
            yield partial(torch.mm, out=y), (x, weights.t())

    def _small_kernels(self, row: _Row) -> Iterator[Any]:
        import torch

        (elements,) = row.shape
        first, second = (self._of(memory, row, elements) for memory in self._small)
        call = {
            "negate": (partial(torch.neg, out=first), (first,)),
            "multiply": (partial(torch.mul, out=first), (first, second)),
        }[row.what]
        return (call for _ in range(row.kernels))

    def _attention(self, row: _Row) -> Iterator[Any]:
        import torch

        kv_heads, group, head_dim, context = row.shape[-4:]
        queries = _queries(row)
        attention = partial(
            torch.nn.functional.scaled_dot_product_attention, is_causal=row.what == "prompt", enable_gqa=group > 1
        )
        asked = self._of(self._inputs, row, *queries)
        for cached in self._own(row, 2, queries[0], kv_heads, context, head_dim):
            yield attention, (asked, cached[0], cached[1])
