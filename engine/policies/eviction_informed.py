"""Eviction policies that know more than what was used: the router's weights, sequences, guesses, or the future."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from .eviction_base import NO_SETTING, Eviction, Ranking, Setting


class Belady(Eviction):
    """Evict the expert whose next use is farthest away: the fewest misses on demand, where experts are of one size.

    Belady, "A study of replacement algorithms for a virtual-storage computer" (1966). It reads the future off the
    trace, so it needs a setting with trace and steps. Experts never used again go first, ties to who was put there
    first. A prefetched expert's next use is the one after the visit that fetched it.
    """

    def __init__(self, setting: Setting = NO_SETTING) -> None:
        super().__init__(setting)
        self._now = -1  # the pool's own visits, counted
        self._uses, self._next, self._end = _uses(setting)
        self._never = len(self._uses) + 1
        self._order = Ranking()

    def begin(self, visit: int, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """Move on by one visit."""
        self._now += 1

    def admit(self, expert: int, demanded: bool) -> None:
        """Rank it by its next use."""
        at, end, now = self._next[expert], self._end[expert], self._now
        while at < end and self._uses[at] <= now:
            at += 1
        self._next[expert] = at
        self._order.put(expert, -self._uses[at] if at < end else -self._never)

    def use(self, expert: int, weight: float) -> None:
        """Rank it by its next use."""
        self.admit(expert, True)

    def evict(self, expert: int) -> None:
        """Take it out of the order."""
        self._order.remove(expert)

    def victims(self) -> Iterator[int]:
        """Walk from the farthest next use to the nearest."""
        return iter(self._order)


def _uses(setting: Setting) -> tuple[array[int], list[int], list[int]]:
    """Return the visits (of the pool's layers, counted from 0) that use each expert, expert by expert, ascending.

    Beside them, for every expert of the model, where its own begin and where they end.
    """
    experts, visits = _accesses(setting)
    order = np.argsort(experts, kind="stable")
    layers = 1 + max(setting.layers, default=0)
    count = np.bincount(experts, minlength=layers * setting.experts)
    ends = np.cumsum(count)
    return array("q", visits[order].astype(np.int64).tobytes()), (ends - count).tolist(), ends.tolist()


def _accesses(setting: Setting) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return all (token, expert) pairs that the pool's layers will look up, in order: experts, and visits from 0."""
    trace = setting.trace
    if trace is None:
        raise ValueError("this eviction policy reads the future: its setting needs the trace and the steps")
    rows = np.concatenate([np.empty(0, dtype=np.int64), *(step.rows for step in setting.steps)])
    step = np.repeat(np.arange(len(setting.steps)), [len(step.rows) for step in setting.steps])
    layers = np.array(setting.layers, dtype=np.int64)
    offset = 0 if setting.shared else layers * setting.experts
    chosen = trace.experts[rows][:, layers].astype(np.int64) + np.reshape(offset, (1, -1, 1))
    visit = step[:, None] * len(layers) + np.arange(len(layers))
    # Dispatch goes step by step, layer by layer, then token by token.
    order = np.argsort(visit, axis=None, kind="stable")
    if trace.present is not None:
        order = order[trace.present[rows][:, layers].reshape(-1)[order]]
    experts = chosen.reshape(-1, trace.k)[order].reshape(-1)
    visits = np.arange(len(experts)) if setting.single else np.repeat(visit.reshape(-1)[order], trace.k)
    return experts, visits
