"""Cache-aware routing: which of the experts that its router ranked a token uses, given which are in memory.

A way sees the gate weights of a token's candidates, the k chosen first and then the runners-up, and which of them are
resident; it knows no clock. What it does to a model's answers no simulator says: how many choices it changed and how
much gate weight that costs is counted, no more. To add one: write a function, name it in ROUTING, describe it in
tests/test_routing.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Gates = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Leeway:
    """How far a way may go: of the `k` experts of a token the best `keep` stay; `margin` is in gate weight."""

    k: int
    margin: float = 0.0
    keep: int = 1


#: Given gate weights (candidates,) and who is resident (candidates,), the places of the k to use, ascending.
Routing = Callable[[Gates, Mask, Leeway], npt.NDArray[Any]]


def as_routed(gates: Gates, resident: Mask, leeway: Leeway) -> npt.NDArray[Any]:
    """Use what the router chose."""
    return np.arange(leeway.k)


def cache_aware(gates: Gates, resident: Mask, leeway: Leeway) -> npt.NDArray[Any]:
    """Let a resident expert win if its gate weight is within the margin of an absent one's.

    The cache prior of "Mixture of cache-conditional experts" (Skliar et al. 2024, arXiv:2412.00099): the k best by
    gate + margin x resident, the first `keep` in any case; there the margin is in logits and a share of their range,
    here in gate weight. Ties go to the router's order.
    """
    scores = gates + leeway.margin * resident
    scores[: leeway.keep] = np.inf
    return np.sort(np.argsort(-scores, kind="stable")[: leeway.k])


#: By the names that a scenario uses.
ROUTING: dict[str, Routing] = {"router": as_routed, "cache-aware": cache_aware}
