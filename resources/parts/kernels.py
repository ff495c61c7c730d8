"""What kernels take on a GPU that nobody measured: sums of matrices and small kernels, fitted where there were some.

A group of kernels that multiplies so many bytes of weights takes a constant for each matrix product, one for each other
kernel, and the time in which the bytes come from memory. The constants and the share of the datasheet's rate are fitted
to every measured group of one token; another GPU has them with its own datasheet's rates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...dtypes import DTYPES
from .tables import Gpu

#: How experts, dense parts and heads are measured: gate, up, down and two small kernels; attention's four products.
EXPERT_PRODUCTS, EXPERT_KERNELS, DENSE_PRODUCTS = 3, 5, 4
#: Beyond so many tokens prefill begins, whose kernels another rule would have to tell.
DECODE_TOKENS = 16
_ROUNDS, _LEAST_ERROR = 50, 0.01


class Group(NamedTuple):
    """A measured group of kernels: its weights in bytes and in number, how many kernels, and what it took, in ns."""

    family: str
    weight_bytes: float
    weights: float
    products: int
    kernels: int
    tokens: int
    eager: bool
    ns: int


@dataclass(frozen=True)
class KernelFit:
    """The constants of kernels on one GPU, in ns, and the shares that it reaches of its datasheet's rates.

    `eager_ns` is what each kernel takes longer where it is launched by itself.
    """

    product_ns: float
    small_ns: float
    eager_ns: float
    memory_share: float
    flops_share: float
    beside_copy_factor: float

    def ns(self, gpu: Gpu, group: Group) -> float:
        """Returns what a group takes on a GPU of this kind, quiet."""
        return self.constant_ns(group) + max(
            group.weight_bytes * 1e9 / (self.memory_share * gpu.memory_bytes_per_second),
            2 * group.weights * group.tokens * 1e9 / (self.flops_share * gpu.half_flops_per_second),
        )

    def constant_ns(self, group: Group) -> float:
        """Returns what a group takes beside its bytes or operations."""
        small = group.kernels - group.products
        return group.products * self.product_ns + small * self.small_ns + group.eager * group.kernels * self.eager_ns


def groups(compute: Mapping[str, Any]) -> Iterator[Group]:
    """Yields every measured group of a profile's compute part, as plain data, without context."""
    for point in compute["experts"]:
        weights = EXPERT_PRODUCTS * point["hidden"] * point["expert_ff"]
        yield _group("expert", point, weights * _bytes_of(point), EXPERT_PRODUCTS, EXPERT_KERNELS)
    for point in compute["dense"]:
        if not point.get("context"):
            yield _group("dense part", point, point["weight_bytes"], DENSE_PRODUCTS, point["kernels"])
    for point in compute["heads"]:
        yield _group("head", point, point["weight_bytes"], 1, 1)


def fitted(gpu: Gpu, compute: Mapping[str, Any]) -> KernelFit:
    """Returns the constants and shares of a measured GPU: least absolute relative errors over its groups of one token.

    By least squares, weighted anew until they are that (Schlossmacher, "An iterative technique for absolute deviations
    curve fitting", JASA 68, 1973). The share of the operations is what the profile's own rule found of long prompts.
    """
    single = [group for group in groups(compute) if group.tokens == 1]
    times = np.array([group.ns for group in single], dtype=float)
    terms = np.array([_terms(group) for group in single], dtype=float) / times[:, None]
    weights = np.ones(len(single))
    found = np.zeros(terms.shape[1])
    for _ in range(_ROUNDS):
        found = np.linalg.lstsq(terms * weights[:, None], weights, rcond=None)[0]
        weights = 1 / np.sqrt(np.maximum(np.abs(terms @ found - 1), _LEAST_ERROR))
    ns_a_byte, product_ns, small_ns, eager_ns = found.tolist()
    rule = compute["rule"]
    return KernelFit(
        product_ns=product_ns,
        small_ns=small_ns,
        eager_ns=eager_ns,
        memory_share=1e9 / ns_a_byte / gpu.memory_bytes_per_second,
        flops_share=rule["flops_per_second"] / gpu.half_flops_per_second,
        beside_copy_factor=rule["beside_copy_factor"],
    )


def errors(fit: KernelFit, gpu: Gpu, compute: Mapping[str, Any]) -> Sequence[tuple[Group, float]]:
    """Returns each measured group of decoding, and the ratio of what the fit says of it to what it took."""
    measured = [group for group in groups(compute) if group.tokens <= DECODE_TOKENS]
    return [(group, fit.ns(gpu, group) / group.ns) for group in measured]


def _terms(group: Group) -> tuple[float, int, int, int]:
    return group.weight_bytes, group.products, group.kernels - group.products, group.eager * group.kernels


def _group(family: str, point: Mapping[str, Any], size_bytes: float, products: int, kernels: int) -> Group:
    weights, eager = size_bytes / _bytes_of(point), point["dispatch"] == "eager"
    return Group(family, size_bytes, weights, products, kernels, point["tokens"], eager, point["ns"])


def _bytes_of(point: Mapping[str, Any]) -> float:
    return float(DTYPES[point["dtype"]] / 8)
