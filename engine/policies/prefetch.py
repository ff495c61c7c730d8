"""Prefetch policies: which of the predictor's guesses to fetch, and in which order.

A policy sees the ranked guesses of one layer visit, one list per horizon, nearest first, and yields what to fetch;
the dispatcher asks the memory manager for room and drops what finds none. To add one: write a class with `guesses`
and `choose`, name it in PREFETCH, describe it in tests/test_prefetch.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol


class Prefetch(Protocol):
    """What the dispatcher asks of a prefetch policy."""

    @property
    def horizons(self) -> int:
        """How many layers ahead it wants guesses for; 0 if it fetches nothing."""

    @property
    def guesses(self) -> int:
        """How many ranked guesses it wants for each token and horizon."""

    def choose(self, ranked: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
        """Yield (horizon, expert) in the order of fetching.

        `ranked[h - 1]` holds the experts guessed for h layers ahead, best first; those of the batch's tokens lie
        rank by rank; -1 means no guess. An expert may come twice: fetching what is assigned does nothing.
        """


class NoPrefetch:
    """Fetch nothing ahead of demand."""

    horizons = 0
    guesses = 0

    def __init__(self, k: int, lookahead: int) -> None:
        pass

    def choose(self, ranked: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
        """Yield nothing."""
        return iter(())


class TopK:
    """Fetch each token's k best guesses for every layer from the next one to `lookahead` layers ahead."""

    def __init__(self, k: int, lookahead: int) -> None:
        self.guesses = k
        self.horizons = lookahead

    def choose(self, ranked: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
        """Yield the nearest layer first, then by rank."""
        for horizon, experts in enumerate(ranked, 1):
            for expert in experts:
                if expert >= 0:
                    yield horizon, expert


PREFETCH: dict[str, Callable[[int, int], Prefetch]] = {"none": NoPrefetch, "top-k": TopK}
