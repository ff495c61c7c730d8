"""What a model's kernels take by a GPU's surface: each part the sum of its matrix products and small kernels.

An expert is its matrices, an activation, a multiplication where it is gated, and small kernels up to the number that
the model states. A dense part is products that read its weights, as it is executed, and small kernels; the head is one
product.

Weights in fewer bits cost what the surface's nearest dtype of such weights takes over as many bytes, or what their
operations take in 16 bits, whichever is more; or, where that is less, what they take over one token or a 16-bit product
over all tokens takes, whichever is more: kernels of many tokens unpack once, while they multiply. Where both sides of a
product have 8 bits, the activations are quantized by a small kernel of their own. A surface without products of such
weights, and a runtime whose own kernels are told beside 16-bit ones, have 16-bit ones of as many bytes in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import log
from typing import NamedTuple, TypeVar

from ...dtypes import bits_of
from ...resources.surface import (
    AttentionTable,
    Group,
    GroupCosts,
    LaunchTable,
    ProductTable,
    PromptTable,
    SmallTable,
    Surface,
)

#: Matrix products of a layer's dense part as it is executed and measured; the rest of its kernels are small.
DENSE_PRODUCTS = 4
#: In which dtype products of another are made, and the one whose products have 8 bits on both sides.
_STAND_IN, _BOTH_SIDES = "bfloat16", "float8"
_MIB = 2**20

_Table = TypeVar("_Table")


class Product(NamedTuple):
    """A product of (tokens, columns) and (columns, rows)."""

    rows: int
    columns: int


@dataclass(frozen=True)
class Kernels:
    """What a part of a model launches: its products, whose weights take `weight_bytes` in all, and small kernels.

    `small` are what each small kernel is, and the elements of its tensor for each token.
    """

    part: Group
    dtype: str
    products: tuple[Product, ...]
    small: tuple[tuple[str, int], ...]
    weight_bytes: int

    @property
    def launches(self) -> int:
        """Kernels in all."""
        return len(self.products) + len(self.small)

    def of_experts(self, count: int) -> Kernels:
        """Returns grouped kernels over the weights of so many experts, each with its own tokens."""
        products = tuple(Product(each.rows * count, each.columns) for each in self.products)
        small = tuple((what, elements * count) for what, elements in self.small)
        return replace(self, products=products, small=small, weight_bytes=self.weight_bytes * count)


def expert_kernels(hidden: int, inner: int, dtype: str, matrices: int, kernels: int, size_bytes: int) -> Kernels:
    """Returns the kernels of one expert of `size_bytes`."""
    products = (Product(inner, hidden),) * (matrices - 1) + (Product(hidden, inner),)
    small = (("negate", inner), ("multiply", inner))[: 2 if matrices > 2 else 1]
    small += (("negate", hidden),) * (kernels - len(products) - len(small))
    products = products[:kernels]
    return Kernels("expert", dtype, products, small[: kernels - len(products)], size_bytes)


def dense_kernels(hidden: int, dtype: str, kernels: int, size_bytes: int) -> Kernels:
    """Returns the kernels of a layer's dense part, whose weights take `size_bytes`."""
    count = min(DENSE_PRODUCTS, kernels)
    width = product_width(hidden, dtype, count, size_bytes)
    pair = (Product(width, hidden), Product(hidden, width))
    return Kernels("dense", dtype, (pair * count)[:count], (("negate", hidden),) * (kernels - count), size_bytes)


def head_kernels(hidden: int, dtype: str, size_bytes: int) -> Kernels:
    """Returns the one kernel of a head whose weights take `size_bytes`."""
    return Kernels("head", dtype, (Product(product_width(hidden, dtype, 1, size_bytes), hidden),), (), size_bytes)


def product_width(hidden: int, dtype: str, products: int, size_bytes: int) -> int:
    """Returns the other width of products with the hidden state that together read about `size_bytes`."""
    return max(16, int(size_bytes * 8 / (products * hidden * bits_of(dtype))) // 16 * 16)


def further_launches(tables: Sequence[LaunchTable], kernels: Kernels, tokens: int) -> int:
    """Returns how many kernels the calls of a group's products launch beyond one each, by a surface's tables.

    A dtype of which none was counted launches what one of as many bits does; without one, nothing more.
    """
    alike = [table for table in tables if bits_of(table.dtype) == bits_of(kernels.dtype)]
    table = next((table for table in alike if table.dtype == kernels.dtype), alike[0] if alike else None)
    if table is None:
        return 0
    return sum(table.launched(each.rows, each.columns, tokens) - 1 for each in kernels.products)


@dataclass(frozen=True, slots=True)
class GroupTime:
    """What a group of kernels takes, in ns: on a quiet GPU, beside a copy, and from its launch to its start."""

    ns: float
    beside_copy_ns: float
    latency_ns: int


#: What a kernel takes, in ns, by its tokens, or its elements.
_Price = Callable[[int], float]


def _nothing(elements: int) -> float:
    return 0.0


class _Made(NamedTuple):
    """What a group's kernels are priced by: each distinct product's `prices`, and which of these each product has.

    `small` are how many there are of a small kernel, its price, and its elements for each token.
    """

    prices: Sequence[_Price]
    numbers: Sequence[int]
    small: Sequence[tuple[int, _Price, int]]


class SurfaceCosts:
    """The kernels of any model on one GPU, in one way of dispatch, by its surface.

    What a group of kernels takes to start is taken `starts` times: none where one graph holds them all.
    """

    def __init__(self, surface: Surface, dispatch: str, starts: float = 1.0, *, low_bit: bool = True) -> None:
        self._surface, self._dispatch, self._starts = surface, dispatch, starts
        self._products = {table.dtype: table for table in surface.products if low_bit or bits_of(table.dtype) >= 16}
        self._small: dict[tuple[str, str], SmallTable] = {(table.what, table.dtype): table for table in surface.small}
        self._stand_in = self._products.get(_STAND_IN) or surface.products[0]
        self._measured, self._named = cache(self._find_measured), cache(self._name)
        self._made_of, self.described = cache(self._find_parts), cache(self._describe)

    def group(self, part: Group) -> GroupCosts:
        """Returns what a part's groups take beside their kernels."""
        groups = self._surface.groups[part]
        return groups.eager if self._dispatch == "eager" else groups.graph

    def time(self, kernels: Kernels, tokens: int) -> GroupTime:
        """Returns what a group of kernels over `tokens` tokens takes."""
        group, made = self.group(kernels.part), self._made_of(kernels)
        each_ns = [price(tokens) for price in made.prices]
        products_ns = sum(each_ns[number] for number in made.numbers)
        small_ns = sum(count * price(tokens * elements) for count, price, elements in made.small)
        sum_ns, launches = group.factor * (products_ns + small_ns), kernels.launches
        longer_ns = group.factor * self._surface.beside_copy_ns_per_mib * kernels.weight_bytes / _MIB
        start_ns, start_beside_ns = self._starts * group.start_ns, self._starts * group.start_beside_copy_ns
        quiet_ns = start_ns + launches * group.kernel_ns + sum_ns
        beside_ns = start_beside_ns + launches * group.kernel_beside_copy_ns + sum_ns + longer_ns
        return GroupTime(quiet_ns, max(quiet_ns, beside_ns), group.launch_latency_ns)

    def _find_parts(self, kernels: Kernels) -> _Made:
        """Returns what prices a group's kernels, whatever their tokens."""
        bits = kernels.weight_bytes * 8 / sum(each.rows * each.columns for each in kernels.products)
        distinct = list(dict.fromkeys(kernels.products))
        return _Made(
            [self._product(kernels.dtype, each, bits) for each in distinct],
            [distinct.index(each) for each in kernels.products],
            [
                (kernels.small.count(shape), self._small_kernel(shape[0], kernels.dtype), shape[1])
                for shape in dict.fromkeys(kernels.small)
            ],
        )

    def _product(self, dtype: str, product: Product, bits: float | None) -> _Price:
        """Returns what prices one product by its tokens; `bits` a weight, if they are not the dtype's own."""
        table, own_bits, nearest_bits = self._measured(dtype)
        rows, columns = product.rows, product.columns
        if own_bits is None:
            line = table.over_tokens(rows, columns)
            if dtype != _BOTH_SIDES:
                return line.ns
            quantizing = self._small_kernel("negate", _STAND_IN)
            return lambda tokens: line.ns(tokens) + quantizing(tokens * columns)
        shrunk = max(1.0, columns * ((own_bits if bits is None else bits) / nearest_bits))
        fewer, flops, most = table.over_tokens(rows, shrunk), 2 * rows * columns, self._stand_in.most_flops_per_ns
        if table is self._stand_in:
            return lambda tokens: max(fewer.ns(tokens), flops * tokens / most)
        wide, least_ns = self._stand_in.over_tokens(rows, columns), fewer.ns(1)
        return lambda tokens: min(max(fewer.ns(tokens), flops * tokens / most), max(least_ns, wide.ns(tokens)))

    def product_ns(self, dtype: str, product: Product, tokens: int, bits: float | None = None) -> float:
        """Returns what one product takes; `bits` a weight, if they are not the dtype's own."""
        return self._product(dtype, product, bits)(tokens)

    def _small_kernel(self, what: str, dtype: str) -> _Price:
        """Returns what prices one small kernel by its elements."""
        table = self._small.get((what, dtype)) or self._small.get((what, self._stand_in.dtype))
        return _nothing if table is None else table.over_elements.ns

    @property
    def flops_per_ns(self) -> float:
        """Operations a ns of the quickest product."""
        return self._stand_in.most_flops_per_ns

    @property
    def has_attention(self) -> bool:
        """Whether attention of decoding was measured."""
        return bool(self._surface.attention)

    @property
    def has_prompts(self) -> bool:
        """Whether attention of prompts was measured."""
        return bool(self._surface.prompts)

    def attention_ns(self, sequences: int, kv_heads: int, head_dim: float, positions: float) -> float:
        """Returns what attention of one new token of each sequence takes in a layer.

        Raises LookupError if the surface has no attention.
        """
        table: AttentionTable = _only(self._surface.attention)
        return table.attention_ns(sequences * kv_heads, head_dim, max(1.0, positions))

    def cached_ns(self, sequences: int, kv_heads: int, key_bytes: int, keys: float) -> float:
        """Returns what it takes to attend to so many keys of each sequence that take `key_bytes`, with their values.

        Heads of another width, dtype or kind cost what heads of as many bytes cost.
        """
        table: AttentionTable = _only(self._surface.attention)
        head_dim = key_bytes * 8 / (2 * kv_heads * float(bits_of(table.dtype)))
        return self.attention_ns(sequences, kv_heads, head_dim, keys)

    def prompt_ns(self, heads: int, head_dim: int, tokens: float) -> float:
        """Returns what causal attention over a prompt takes in a layer.

        Raises LookupError if the surface has no attention of prompts.
        """
        table: PromptTable = _only(self._surface.prompts)
        return table.prompt_ns(heads, head_dim, max(1.0, tokens))

    def longer_beside_copy_ns(self, read_bytes: float) -> float:
        """Returns how much longer kernels take beside a copy that read so many bytes."""
        return self._surface.beside_copy_ns_per_mib * read_bytes / _MIB

    def attention_described(self) -> str:
        """Returns what an estimate of attention is made of, in words."""
        of = "" if self._surface.device is None else f", of {self._surface.device} and not this machine"
        return (
            f"interpolated on the surface of single kernels ({self._surface.source}{of}): heads as those of as many "
            f"bytes of cache, a prompt as a whole one of as many pairs of positions"
        )

    def constant_ns(self, kernels: Kernels) -> float:
        """Returns what a group takes whose products read next to nothing."""
        group = self.group(kernels.part)
        least = self._stand_in
        floor_ns = least.product_ns(least.rows[0], least.columns[0], 1)
        small_ns = sum(self._small_kernel(what, kernels.dtype)(width) for what, width in kernels.small)
        kernels_ns = kernels.launches * group.kernel_ns + len(kernels.products) * floor_ns + small_ns
        return self._starts * group.start_ns + kernels_ns

    def _describe(self, kernels: Kernels) -> str:
        """Returns what a group's estimate is made of and how far such were off, in words."""
        surface, unsure = self._surface, self.group(kernels.part).uncertainty
        within = "" if unsure is None else f", within {unsure.held_back_error:.0%} (rms of measured ones)"
        of = "" if surface.device is None else f", of {surface.device} and not this machine"
        return (
            f"interpolated on the surface of single kernels ({surface.source}{of}): {len(kernels.products)} products "
            f"of {self._named(kernels.dtype)} weights and {len(kernels.small)} small kernels{within}"
        )

    def _find_measured(self, dtype: str) -> tuple[ProductTable, float | None, float]:
        """Returns the products that price a dtype's, the bits of a weight of it, and of theirs.

        None in place of its bits where they need not be compared.
        """
        table = self._table(dtype)
        if table is not None and (dtype == _BOTH_SIDES or bits_of(dtype) >= 16):
            return table, None, float(bits_of(table.dtype))
        nearest = table or self._nearest(dtype)
        return nearest, float(bits_of(dtype)), float(bits_of(nearest.dtype))

    def _name(self, dtype: str) -> str:
        """Returns what weights of a dtype are priced as, in words."""
        return dtype if self._table(dtype) else f"{self._nearest(dtype).dtype} of as many bytes as {dtype}"

    def _nearest(self, dtype: str) -> ProductTable:
        """Returns the products whose weights are nearest in bits; the 16-bit ones, where none have fewer than those."""
        bits = float(bits_of(dtype))
        fewer = [table for table in self._products.values() if bits_of(table.dtype) < 16] if bits < 16 else []
        return min(fewer, key=lambda table: abs(log(bits / float(bits_of(table.dtype)))), default=self._stand_in)

    def _table(self, dtype: str) -> ProductTable | None:
        """Returns the products of a dtype, or those of another of as many bits where these are the stand-in's."""
        table = self._products.get(dtype)
        return self._stand_in if table is None and bits_of(dtype) == bits_of(self._stand_in.dtype) else table


def _only(tables: Sequence[_Table]) -> _Table:
    if not tables:
        raise LookupError("the surface has no attention")
    return tables[0]
