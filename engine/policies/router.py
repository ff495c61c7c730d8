"""Routers: which of several replicas serves a request, by the request and by how many requests each has.

A router is asked for one request after the other, as they arrive. To add one: write a class with this method, name it
in ROUTERS, and work a case by hand in tests/test_replicas.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...workloads.requests.request import Request


class Router:
    """What all routers are made with: how many replicas there are."""

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas

    def choose(self, request: Request, outstanding: Sequence[int]) -> int:
        """Returns the number of the replica that serves a request; `outstanding` are the requests of each."""
        raise NotImplementedError


class RoundRobin(Router):
    """One after the other, whatever they have to do."""

    def __init__(self, replicas: int) -> None:
        super().__init__(replicas)
        self._last = -1

    def choose(self, request: Request, outstanding: Sequence[int]) -> int:
        """Returns the one behind the last."""
        self._last = (self._last + 1) % self.replicas
        return self._last


class LeastOutstanding(Router):
    """Whoever has the fewest requests that it was given and has not ended; of equals, the first."""

    def choose(self, request: Request, outstanding: Sequence[int]) -> int:
        """Returns the one with the fewest."""
        return _least(outstanding)


class PrefixAware(Router):
    """Whoever was given the longest beginning of the prompt before, as long as all have about as much to do.

    It goes by the hashes of prompts that it has seen, and knows of no replica what its KV cache has lost since. If less
    than `threshold` of the prompt was seen, who was given the fewest blocks is chosen; and where the busiest replica
    has more than `most_apart` requests more than the idlest, and more than `most_times` as many, the idlest. So does
    the `cache_aware` policy of SGLang's router and of vLLM's, whose defaults these numbers are.
    """

    threshold = 0.3
    most_apart = 64
    most_times = 1.5

    def __init__(self, replicas: int) -> None:
        super().__init__(replicas)
        self._seen: list[set[tuple[int, int]]] = [set() for _ in range(replicas)]

    def choose(self, request: Request, outstanding: Sequence[int]) -> int:
        """Returns the one that was given the most of its prompt, or the one with the least to do."""
        blocks = list(enumerate(request.hashes))
        chosen = self._chosen(blocks, outstanding)
        self._seen[chosen].update(blocks)
        return chosen

    def _chosen(self, blocks: Sequence[tuple[int, int]], outstanding: Sequence[int]) -> int:
        most, least = max(outstanding), min(outstanding)
        if not blocks or (most - least > self.most_apart and most > self.most_times * least):
            return _least(outstanding)
        known = [next((at for at, block in enumerate(blocks) if block not in seen), len(blocks)) for seen in self._seen]
        if max(known) >= self.threshold * len(blocks):
            return known.index(max(known))
        return _least([len(seen) for seen in self._seen])


def _least(numbers: Sequence[int]) -> int:
    return min(range(len(numbers)), key=lambda number: numbers[number])


#: By the names that a scenario uses.
ROUTERS: dict[str, type[Router]] = {
    "round-robin": RoundRobin,
    "least-outstanding": LeastOutstanding,
    "prefix-aware": PrefixAware,
}
