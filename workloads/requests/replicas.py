"""Replicas behind a router: machines that serve alike and apart, and one queue of arrivals that is divided among them.

A router may look at how many requests each replica has been given and not ended, so who serves an arrival is known once
every replica has come to its instant. The replicas therefore run in turns, each in a thread of its own, of which one
goes on at a time: always the one whose clock is behind all others'. What is decided depends on no thread's luck.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from ...errors import InputError
from .request import Request

Found = TypeVar("Found")


class Routes(Protocol):
    """What is asked of a router."""

    def choose(self, request: Request, outstanding: Sequence[int]) -> int:
        """Returns the number of the replica that serves a request; `outstanding` are the requests of each."""


class _StoppedError(Exception):
    """Another replica has failed."""


class Turns:
    """So many runs, of which always the one goes on whose clock is behind; of equals, the first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._clock_ns: dict[int, int] = dict.fromkeys(range(count), 0)
        self._may_go = [threading.Semaphore(0) for _ in range(count)]
        self._failed: BaseException | None = None

    def run(self, works: Sequence[Callable[[], Found]]) -> list[Found]:
        """Do a work for each run, each in a thread, and return what they return. Raises what the first to fail does."""
        found: dict[int, Found] = {}

        def go(number: int) -> None:
            self._may_go[number].acquire()
            try:
                if self._failed is None:
                    found[number] = works[number]()
            except BaseException as error:  # whoever called hears of it
                self._failed = self._failed or error
            del self._clock_ns[number]
            self._pass_on()

        threads = [threading.Thread(target=go, args=(number,), daemon=True) for number in range(self.count)]
        for thread in threads:
            thread.start()
        try:
            self._pass_on()
            for thread in threads:
                thread.join()
        except BaseException as error:
            self._failed = self._failed or error
            raise
        if self._failed is not None:
            raise self._failed
        return [found[number] for number in range(self.count)]

    def come_to(self, number: int, now_ns: int) -> None:
        """Say that a run has come to an instant, and go on once no other is behind it."""
        self._clock_ns[number] = now_ns
        if self._behind() != number:
            self._pass_on()
            self._may_go[number].acquire()
        if self._failed is not None:
            raise _StoppedError

    def _behind(self) -> int:
        return min(self._clock_ns, key=lambda number: (self._clock_ns[number], number))

    def _pass_on(self) -> None:
        if self._clock_ns:
            self._may_go[self._behind()].release()


class Routed:
    """Requests that arrive when they arrive, each served by the replica that a router chooses: one of `shares`."""

    def __init__(self, requests: Sequence[Request], router: Routes, turns: Turns) -> None:
        self.requests, self.turns = requests, turns
        self.shares = [Share(self, number) for number in range(turns.count)]
        self._router = router
        self._next = 0
        self._outstanding = [0] * turns.count
        self._ends_ns: list[deque[int]] = [deque() for _ in range(turns.count)]

    def next_ns(self) -> int | None:
        """Returns when the next request arrives that nobody has been given; None if none is left."""
        return self.requests[self._next].arrival_ns if self._next < len(self.requests) else None

    def route(self, until_ns: int) -> None:
        """Give those that arrive by an instant to replicas, all of which have come to it.

        Raises InputError for a router that chooses none of them.
        """
        while (arrival_ns := self.next_ns()) is not None and arrival_ns <= until_ns:
            for number, ends_ns in enumerate(self._ends_ns):
                while ends_ns and ends_ns[0] <= arrival_ns:
                    ends_ns.popleft()
                    self._outstanding[number] -= 1
            request = self.requests[self._next]
            chosen = self._router.choose(request, tuple(self._outstanding))
            if chosen not in range(self.turns.count):
                raise InputError(
                    f"requests: the router gave request {request.number} to replica {chosen!r}: must be 0 to "
                    f"{self.turns.count - 1}"
                )
            self._next += 1
            self._outstanding[chosen] += 1
            self.shares[chosen].given.append(request)

    def ended(self, number: int, now_ns: int) -> None:
        """Learn that a replica has ended a request."""
        self._ends_ns[number].append(now_ns)


class Share:
    """One replica's source of requests: those that it was given."""

    def __init__(self, routed: Routed, number: int) -> None:
        self._routed, self._number = routed, number
        self.requests = routed.requests
        self.given: list[Request] = []

    def arrived(self, now_ns: int) -> list[Request]:
        """Returns the requests that have arrived here by now and were not returned before, in order."""
        self._routed.turns.come_to(self._number, now_ns)
        self._routed.route(now_ns)
        found, self.given = self.given, []
        return found

    def next_ns(self) -> int | None:
        """Returns when the next request arrives that may come here; None if none is left."""
        return self._routed.next_ns()

    def finished(self, request: Request, now_ns: int) -> None:
        """Learn that a request has all its tokens."""
        self._routed.ended(self._number, now_ns)
