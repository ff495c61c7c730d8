"""What is recorded of requests and steps while they run: whole numbers, appended, from which all metrics are made."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .queue import Live

Array = npt.NDArray[np.int64]


class FinishedRequest(NamedTuple):
    """One request that has all its tokens; instants in ns. `cached` positions of it were found, not computed."""

    number: int
    arrival_ns: int
    started_ns: int
    first_token_ns: int
    finished_ns: int
    prompt_tokens: int
    output_tokens: int
    preempted: int
    cached: int


class StepRecord(NamedTuple):
    """One step: when it was asked for and when its tokens were there, what it ran and gave, and what stood by."""

    start_ns: int
    end_ns: int
    rows: int
    tokens: int
    running: int
    waiting: int
    kv_blocks: int
    preempted: int
    drafts: int
    accepted: int


class RequestLog:
    """The columns of FinishedRequest and StepRecord, and of every token whose it is and when it was there.

    `requests`, `steps` and `token_times()` give them as arrays. `changes` are instants at which the number of requests
    in the system changed, with the change: of the arrivals, and of the ends.
    """

    def __init__(self) -> None:
        self._requests = array("q")
        self._steps = array("q")
        self._token_request = array("q")
        self._token_ns = array("q")
        self._token_row = array("q")
        self._token_step = array("q")
        self._first_token_ns: dict[int, int] = {}
        self._changes = array("q")

    def arrived(self, arrival_ns: int) -> None:
        """Record that a request arrived."""
        self._changes.extend((arrival_ns, 1))

    def gave(self, request: int, tokens: int, end_ns: int, row: int = 0) -> None:
        """Record that a request was given tokens; its last row was so many behind the first of the step."""
        self._first_token_ns.setdefault(request, end_ns)
        self._token_request.extend([request] * tokens)
        self._token_ns.extend([end_ns] * tokens)
        self._token_row.extend([row] * tokens)
        self._token_step.extend([self._ended_steps] * tokens)

    def finished(self, live: Live, end_ns: int) -> None:
        """Record that a request has all its tokens."""
        request = live.request
        first_ns = self._first_token_ns.pop(request.number)
        record = FinishedRequest(
            request.number, request.arrival_ns, live.started_ns, first_ns, end_ns,
            request.prompt_tokens, request.output_tokens, live.preempted, live.cached,
        )  # fmt: skip
        self._requests.extend(record)
        self._changes.extend((end_ns, -1))

    def step(self, record: StepRecord) -> None:
        """Record a step that has ended."""
        self._steps.extend(record)

    def repeated(self, requests: Sequence[int], ends_ns: Array, steps: Array) -> None:
        """Record steps (steps, fields of StepRecord) that each gave a token to the same requests, at these instants."""
        for request in requests:
            self._first_token_ns.setdefault(request, int(ends_ns[0]))
        self._token_request.frombytes(np.tile(np.array(requests, dtype=np.int64), len(ends_ns)).tobytes())
        self._token_row.frombytes(np.tile(np.arange(len(requests)), len(ends_ns)).tobytes())
        of_steps = self._ended_steps + np.arange(len(ends_ns))
        self._token_step.frombytes(np.repeat(of_steps, len(requests)).tobytes())
        self._token_ns.frombytes(np.repeat(ends_ns, len(requests)).tobytes())
        self._steps.frombytes(steps.astype(np.int64).tobytes())

    @property
    def _ended_steps(self) -> int:
        return len(self._steps) // len(StepRecord._fields)

    @property
    def requests(self) -> dict[str, Array]:
        """The columns of FinishedRequest, each (requests,), in order of number."""
        table = _table(self._requests, len(FinishedRequest._fields))
        table = table[np.argsort(table[:, 0], kind="stable")]
        return dict(zip(FinishedRequest._fields, table.T, strict=True))

    @property
    def steps(self) -> dict[str, Array]:
        """The columns of StepRecord, each (steps,)."""
        return dict(zip(StepRecord._fields, _table(self._steps, len(StepRecord._fields)).T, strict=True))

    def token_times(self) -> tuple[Array, Array]:
        """Returns the request of each token and when it was there, both (tokens,), by request and then by time."""
        request, end_ns = (np.array(column, dtype=np.int64) for column in (self._token_request, self._token_ns))
        order = np.argsort(request, kind="stable")
        return request[order], end_ns[order]

    def token_places(self) -> tuple[Array, Array]:
        """Returns each token's step, and its request's last row among those of it, both (tokens,), as `token_times`."""
        order = np.argsort(np.array(self._token_request, dtype=np.int64), kind="stable")
        step, row = (np.array(column, dtype=np.int64)[order] for column in (self._token_step, self._token_row))
        return step, row

    @property
    def changes(self) -> Array:
        """Instants in ns and how the number of requests changed then, (changes, 2), in order of time."""
        table = _table(self._changes, 2)
        return table[np.argsort(table[:, 0], kind="stable")]


def joined(logs: Sequence[RequestLog]) -> tuple[RequestLog, Array]:
    """Returns what several replicas recorded as one log, its steps in the order of their ends, and that order.

    It is (steps,): for each step its place among those of all replicas, one replica's behind another's.
    """
    found = RequestLog()
    ends_ns = np.concatenate([log.steps["end_ns"] for log in logs])
    order = np.argsort(ends_ns, kind="stable")
    place = np.argsort(order)
    first = 0
    for log in logs:
        found._requests += log._requests
        found._changes += log._changes
        found._token_request += log._token_request
        found._token_ns += log._token_ns
        found._token_row += log._token_row
        steps = np.array(log._token_step, dtype=np.int64)
        found._token_step.frombytes(place[first + steps].tobytes())
        first += log._ended_steps
    steps = np.concatenate([_table(log._steps, len(StepRecord._fields)) for log in logs])
    found._steps.frombytes(steps[order].tobytes())
    return found, order


def _table(column: array[int], width: int) -> Array:
    return np.array(column, dtype=np.int64).reshape(-1, width)
