"""Products of weights in 8 and 4 bits, by the kernels that torch has for them: what measures their part of the surface.

`float8` products have both sides in 8 bits, as W8A8 engines make them, and a scale a tensor; quantizing the activations
is a small kernel by itself and not in there. `int4_g128` weights are unpacked and scaled inside the product, whose
activations have 16 bits (tinygemm, which torchao and Hugging Face's engines use).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

#: Weights that share a scale, the tiles along the columns that a kernel reads at once, and what these make of a size.
_GROUP, _TILES = 128, 8
_TILE_ROWS, _TILE_COLUMNS = 8, 16

#: The dtypes of weights that have kernels here.
LOW_BIT = ("float8", "int4_g128")

Call = tuple[Callable[..., Any], tuple[Any, ...]]


def divides(dtype: str, rows: int, columns: int) -> bool:
    """Returns whether a product of this shape has a kernel."""
    return columns % (_GROUP if dtype == "int4_g128" else 16) == 0 and rows % 16 == 0


def products(dtype: str, shape: tuple[int, int, int], pool: Any, inputs: Any, kernels: int) -> Iterator[Call]:
    """Yields so many calls of a product of (rows, columns, tokens), each with weights of its own in a pool (bytes,).

    `inputs` are bfloat16 numbers that are on the GPU already. What comes out of a call is let go at once.
    """
    rows, columns, tokens = shape
    make = _int4 if dtype == "int4_g128" else _float8
    size_bytes = rows * columns // (2 if dtype == "int4_g128" else 1)
    places = max(1, len(pool) // size_bytes)
    starts = [number % places * size_bytes for number in range(kernels)]
    weights = [pool[at : at + size_bytes] for at in starts]
    yield from make(rows, columns, inputs[: tokens * columns].view(tokens, columns), weights)


def _float8(rows: int, columns: int, x: Any, weights: Sequence[Any]) -> Iterator[Call]:
    import torch

    quantized = x.to(torch.float8_e4m3fn)
    scale = torch.ones((), dtype=torch.float32, device=x.device)
    product = partial(torch._scaled_mm, out_dtype=torch.bfloat16, use_fast_accum=True)
    for each in weights:
        matrix = each.view(torch.float8_e4m3fn).view(rows, columns)
        yield product, (quantized, matrix.t(), scale, scale)


def _int4(rows: int, columns: int, x: Any, weights: Sequence[Any]) -> Iterator[Call]:
    import torch

    scales = torch.ones((columns // _GROUP, rows, 2), dtype=torch.bfloat16, device=x.device)
    packed = (rows // _TILE_ROWS, columns // (_TILES * _TILE_COLUMNS), 32, _TILES // 2)
    for each in weights:
        yield torch._weight_int4pack_mm, (x, each.view(torch.int32).view(*packed), _GROUP, scales)
