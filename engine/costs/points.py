"""Measured points of a group of kernels, and what lies between two of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple


class Point(NamedTuple):
    """A measured kernel group at so many tokens; `device` is another's that it was measured on, or empty."""

    tokens: int
    ns: int
    beside_copy_ns: int
    latency_ns: int
    device: str = ""


def between(points: Sequence[Point], tokens: int) -> tuple[float, float, int]:
    """Returns duration, that beside a copy and latency, in ns, on a straight line between the measured neighbors."""
    at = bisect_left(points, (tokens,))
    after = points[at]
    before = points[at - 1] if at else after
    share = (tokens - before.tokens) / (after.tokens - before.tokens) if at else 0.0
    ns, beside_ns, latency_ns = (low + share * (high - low) for low, high in zip(before[1:4], after[1:4], strict=True))
    return ns, beside_ns, round(latency_ns)
