"""Attention over what is cached, as it runs on the GPU: one new token of each sequence looks at all of its keys.

It is the call that the surface's attention was measured with. Keys and values of a sequence lie in a cache of fixed
length, as an engine's do, of which a step looks at the beginning; what is in them are random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple


class Attended(NamedTuple):
    """One attention of a layer in a step: of so many sequences, over `keys` each; `number` among the layer's own.

    The cache of a sequence has room for `most_keys`.
    """

    number: int
    heads: int
    kv_heads: int
    head_dim: int
    sequences: int
    keys: int
    most_keys: int


class Caches:
    """The KV caches of a model's layers, each made when it is first looked at."""

    def __init__(self, gpu: Any, dtype: str) -> None:
        self._gpu, self._dtype = gpu, dtype
        self._made: dict[tuple[int, ...], Any] = {}

    def attention(self, layer: int, asked: Attended) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Returns the call that attends in a layer."""
        import torch

        heads, kv_heads, head_dim, sequences = asked.heads, asked.kv_heads, asked.head_dim, asked.sequences
        cache = self._kept((layer, asked.number), 2, sequences, kv_heads, asked.most_keys, head_dim)
        queries = self._kept((), sequences, heads, 1, head_dim)
        keys, values = cache[:, :, :, : asked.keys]
        attend = partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=heads > kv_heads)
        return attend, (queries, keys, values)

    def _kept(self, name: tuple[int, ...], *shape: int) -> Any:
        """Returns the memory of a name and a shape, made of random numbers at first."""
        key = (*name, *shape)
        if key not in self._made:
            self._made[key] = self._gpu.random(*shape, dtype=self._dtype, scale=1.0, seed=6)
        return self._made[key]
