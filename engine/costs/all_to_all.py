"""What an exchange of tokens between GPUs takes, over the links of a machine's graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ...resources.profile_costs import TransferCost
from ...resources.topology import Route, Topology


class AllToAll:
    """What it takes to send every token to the GPUs that have its experts, or back.

    An h-relation as Valiant prices it ("A bridging model for parallel computation", CACM 33(8), 1990), for every link:
    the longest latency of a route + the most of bytes / bytes a second over the links. Where each GPU has a port to a
    switch that blocks nothing, that is the most that one GPU sends or receives.
    """

    rule = "the longest latency of a route + the most of bytes / bytes a second over the links of the machine's graph"

    def __init__(
        self,
        routes: Mapping[tuple[int, int], Route],
        topology: Topology,
        token_bytes: int,
        cost: TransferCost | None = None,
    ) -> None:
        """Take the way from each GPU to each other one; `cost` is what was measured of two GPUs that exchange."""
        self._cost, self._token_bytes = cost if len(routes) == 2 else None, token_bytes
        gpus = 1 + max((gpu for pair in routes for gpu in pair), default=0)
        rates = topology.capacities()
        number = {link: index for index, link in enumerate(rates)}
        passes = np.zeros((len(rates), gpus * gpus), dtype=np.int64)
        for (source, target), route in routes.items():
            for link in route.links:
                passes[number[link], source * gpus + target] += 1
        used = passes.any(axis=1)
        self._passed_bytes = passes[used] * token_bytes
        self._bytes_per_second = np.array(list(rates.values()), dtype=np.int64)[used]
        self._latency_ns = max((route.latency_ns for route in routes.values()), default=0)

    @property
    def how(self) -> str | None:
        """How it is estimated, in words; None where it was measured."""
        return self.rule if self._cost is None else None

    def ns(self, traffic: npt.NDArray[Any]) -> int:
        """Returns the time of an exchange, in ns, `traffic[a, b]` tokens from GPU a to GPU b; 0 if none moves."""
        size_bytes = self._passed_bytes @ traffic.ravel()
        if not size_bytes.any():
            return 0
        if self._cost is not None:
            return self._cost.ns(int(traffic.max()) * self._token_bytes)
        return self._latency_ns - int((-size_bytes * 10**9 // self._bytes_per_second).min())

    def all_ns(self, traffic: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Returns the time of each of some exchanges, in ns (exchanges,), as `ns` does; `traffic` (exchanges, …)."""
        if self._cost is not None:
            return np.array([self.ns(one) for one in traffic], dtype=np.int64)
        size_bytes = traffic.reshape(len(traffic), -1) @ self._passed_bytes.T
        ns = self._latency_ns - (-size_bytes * 10**9 // self._bytes_per_second).min(axis=1, initial=0)
        return np.where(size_bytes.any(axis=1), ns, 0)
