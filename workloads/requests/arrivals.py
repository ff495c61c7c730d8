"""When requests arrive: by rate, in a closed loop of users, or at a trace's own times.

Processes by rate are a table, ARRIVALS; each makes so many instants, the first of them 0, from random numbers that
begin alike however many are asked for. To add one: write the function, name it there, test its mean and its spread.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ..keyed_random import uniform_one
from .request import Request

Floats = npt.NDArray[np.float64]
Instants = npt.NDArray[np.int64]

#: Closed loops, and a trace's own times, which are no processes by rate.
CLOSED, TRACE = "closed", "trace"
#: What the key of a generator begins with, behind the seed.
_GAPS = 0x20001
_THINK = 0x20003
_SECOND_NS = 1e9
#: Some thirty years: what comes later is a mistake.
_MOST_SECONDS = 1e9


@dataclass(frozen=True)
class Process:
    """What arrivals by rate are made by.

    `rate` requests come each second in the mean; with `gamma` the gaps have the coefficient of variation `cv`. Bursts
    are Poisson arrivals in `on_s` of every `on_s` + `off_s` seconds, so much denser.
    """

    rate: float
    cv: float = 1.0
    on_s: float = 1.0
    off_s: float = 1.0

    def __post_init__(self) -> None:
        for name, value, least in (("rate", self.rate, 0), ("cv", self.cv, 0), ("on_s", self.on_s, 0)):
            if not value > least:
                raise InputError(f"{name} = {value}: must be more than 0")
        if self.off_s < 0:
            raise InputError(f"off_s = {self.off_s}: must be at least 0")


def poisson(process: Process, count: int, random: np.random.Generator) -> Floats:
    """Returns the instants of a Poisson process, in s: gaps are exponential, and know nothing of each other."""
    return _from_gaps(random.standard_exponential(max(0, count - 1)) / process.rate)


def gamma(process: Process, count: int, random: np.random.Generator) -> Floats:
    """Returns instants whose gaps are gamma-distributed, in s: cv = 1 is Poisson, more is burstier, less more even."""
    shape = process.cv**-2
    return _from_gaps(random.standard_gamma(shape, max(0, count - 1)) / (shape * process.rate))


def constant(process: Process, count: int, random: np.random.Generator) -> Floats:
    """Returns instants at even distances, in s."""
    return np.arange(count) / process.rate


def bursts(process: Process, count: int, random: np.random.Generator) -> Floats:
    """Returns the instants, in s, of a Poisson process that stands still while it is off, beginning on."""
    period_s = process.on_s + process.off_s
    rate_on = process.rate * period_s / process.on_s
    on_time_s = _from_gaps(random.standard_exponential(max(0, count - 1)) / rate_on)
    return on_time_s + np.floor(on_time_s / process.on_s) * process.off_s


#: By the names that a scenario uses.
ARRIVALS: dict[str, Callable[[Process, int, np.random.Generator], Floats]] = {
    "poisson": poisson,
    "gamma": gamma,
    "constant": constant,
    "bursts": bursts,
}


def _from_gaps(gaps_s: Floats) -> Floats:
    return np.concatenate([[0.0], np.cumsum(gaps_s)])


def arrival_instants(name: str, process: Process, count: int, seed: int) -> Instants:
    """Returns the instants, in ns, int64 (count,), at which requests arrive by one of ARRIVALS.

    Raises InputError for requests that would come too late to be meant.
    """
    random = np.random.default_rng([seed, _GAPS])
    instants_s = ARRIVALS[name](process, count, random)[:count]
    if instants_s[-1] > _MOST_SECONDS:
        raise InputError(
            f"rate = {process.rate:g}: the last of {count:,} requests would come after {instants_s[-1]:.3g} s: must be "
            f"by {_MOST_SECONDS:g} s: raise the rate, or ask for fewer"
        )
    return np.rint(instants_s * _SECOND_NS).astype(np.int64)


class Source(Protocol):
    """Where requests come from: all of them, and those that have arrived."""

    requests: Sequence[Request]

    def arrived(self, now_ns: int) -> list[Request]:
        """Returns the requests that have arrived by now and were not returned before, in order."""

    def next_ns(self) -> int | None:
        """Returns when the next request arrives, None if none is on its way."""

    def finished(self, request: Request, now_ns: int) -> None:
        """Learn that a request has all its tokens."""


class Open:
    """Requests that arrive when they arrive, whatever becomes of the others."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self._next = 0

    def arrived(self, now_ns: int) -> list[Request]:
        """Returns the requests that have arrived by now and were not returned before, in order."""
        first = self._next
        while self._next < len(self.requests) and self.requests[self._next].arrival_ns <= now_ns:
            self._next += 1
        return list(self.requests[first : self._next])

    def next_ns(self) -> int | None:
        """Returns when the next request arrives, None if none is left."""
        return self.requests[self._next].arrival_ns if self._next < len(self.requests) else None

    def finished(self, request: Request, now_ns: int) -> None:
        """Nobody waits for it."""


class Closed:
    """So many users, of whom each sends a request, waits for all its tokens, thinks, and sends the next.

    Requests are handed out in order of number; the first ones come at 0. `think_ns` is a mean: times are exponential,
    by the number of the request that ends them.
    """

    def __init__(self, requests: Sequence[Request], users: int, think_ns: int, seed: int) -> None:
        if users < 1 or think_ns < 0:
            raise InputError(f"users = {users}, thinking {think_ns} ns: must be at least 1 user and 0 ns")
        self.requests = requests
        self._think_ns, self._seed = think_ns, seed
        self._coming: list[tuple[int, int]] = [(0, number) for number in range(min(users, len(requests)))]
        self._given = len(self._coming)

    def arrived(self, now_ns: int) -> list[Request]:
        """Returns the requests that have arrived by now and were not returned before, in order."""
        found = []
        while self._coming and self._coming[0][0] <= now_ns:
            arrival_ns, number = heapq.heappop(self._coming)
            found.append(replace(self.requests[number], arrival_ns=arrival_ns))
        return found

    def next_ns(self) -> int | None:
        """Returns when the next request arrives, None if none is on its way."""
        return self._coming[0][0] if self._coming else None

    def finished(self, request: Request, now_ns: int) -> None:
        """Let its user think, and send the next."""
        if self._given == len(self.requests):
            return
        drawn = uniform_one(self._seed, _THINK, self._given)
        thought_ns = round(-self._think_ns * float(np.log1p(-drawn)))
        heapq.heappush(self._coming, (now_ns + thought_ns, self._given))
        self._given += 1
