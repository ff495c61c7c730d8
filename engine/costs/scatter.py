"""The scatter of single events: each kernel, launch and copy of a run takes its cost times a random factor of its own.

The n-th event of a kind on a GPU has the n-th factor, whichever engine asks, and whenever: factors are keyed by (seed,
replicate, kind, n).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import numpy.typing as npt

from ...resources.timeline import DENSE, EXPERT, HEAD
from ...workloads.keyed_random import uniform
from .values import CopyCost, KernelCost

#: What scatters, by number: kernels of the three parts of a model, the host's time to launch one, copies of experts.
SCATTERED = ("dense", "expert", "head", "host", "copy")
_PART_OF = {DENSE: "dense", EXPERT: "expert", HEAD: "head"}
_BLOCK = 4096


@dataclass(frozen=True)
class Scatter:
    """The factors of one GPU's events in one replicate; `of` is the scatter of each of SCATTERED, as a share."""

    seed: int
    replicate: int
    of: Mapping[str, float]

    def factors(self, what: str, first: int, number: int) -> npt.NDArray[np.float64]:
        """Returns the factors of so many events, from the `first` (0 is the first of all) on."""
        index = np.arange(first + 1, first + 1 + number)  # number 0 is that of the cost itself
        radius, angle = (uniform(self.seed, self.replicate, crc(what), half, index) for half in (0, 1))
        found: npt.NDArray[np.float64] = np.maximum(0.1, 1 + self.of[what] * box_muller(radius, angle))
        return found


class Scattering:
    """Costs of events as they come."""

    def __init__(self, scatter: Scatter) -> None:
        self._next = {what: _each(scatter, what) for what in SCATTERED}

    def kernel(self, kind: int, cost: KernelCost) -> KernelCost:
        """Returns what the next launch of a kind takes, given what such launches take; others do not scatter."""
        part = _PART_OF.get(kind)
        if part is None:
            return cost
        ns, host_ns = cost.ns * next(self._next[part]), cost.host_ns * next(self._next["host"])
        return replace(cost, ns=round(ns), host_ns=round(host_ns))

    def copy(self, cost: CopyCost) -> CopyCost:
        """Returns what the next copy takes, given what such copies take."""
        factor = next(self._next["copy"])
        return replace(
            cost,
            queued_ns=round(cost.queued_ns * factor),
            alone_ns=round(cost.alone_ns * factor),
            piece_queued_ns=round(cost.piece_queued_ns * factor),
            piece_alone_ns=round(cost.piece_alone_ns * factor),
        )


def scattering(scatter: Scatter | None) -> Scattering | None:
    """Returns what scatters the costs of events; None where nothing does."""
    return None if scatter is None else Scattering(scatter)


def _each(scatter: Scatter, what: str) -> Iterator[float]:
    for first in count(step=_BLOCK):
        yield from scatter.factors(what, first, _BLOCK).tolist()


def box_muller(radius: npt.NDArray[np.float64], angle: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns standard normal numbers of pairs of uniform ones in [0, 1), by Box and Muller (1958)."""
    drawn: npt.NDArray[np.float64] = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)
    return drawn


def crc(name: str) -> int:
    """Returns a number for a name, the same everywhere."""
    return zlib.crc32(name.encode())
