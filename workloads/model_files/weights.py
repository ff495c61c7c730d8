"""Numbers of weights, and the bytes that they take in a dtype."""

from __future__ import annotations

from typing import NamedTuple

from ...dtypes import bits_of


class Weights(NamedTuple):
    """Numbers of weights: those in the big matrices, and all others (norms, biases, router), whose dtype may differ."""

    matrix: int = 0
    other: int = 0

    def plus(self, more: Weights, times: int = 1) -> Weights:
        """Returns the sum of these and so many times the others."""
        return Weights(self.matrix + times * more.matrix, self.other + times * more.other)

    def bytes(self, matrix: str, other: str) -> int:
        """Returns the bytes of all weights, the matrices in one dtype and the others in another."""
        return bytes_of(self.matrix, matrix) + bytes_of(self.other, other)

    @property
    def total(self) -> int:
        """All of them."""
        return self.matrix + self.other


def bytes_of(weights: int, dtype: str) -> int:
    """Returns the bytes of so many weights in a dtype, exact, rounded up to a whole byte."""
    return -int(-weights * bits_of(dtype) // 8)
