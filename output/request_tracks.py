"""Tracks of requests in a timeline file: one each, from arrival to last token, and within it what it went through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy.typing as npt

#: The category of all of these.
REQUEST = "request"
#: The process that stands for all requests, beside those of devices.
REQUESTS_PID = 900_000
#: What a request goes through, each from one instant of it to the next.
_PHASES = ("waits", "first token", "tokens")
_INSTANTS = ("arrival_ns", "started_ns", "first_token_ns", "finished_ns")


def request_events(requests: Mapping[str, npt.NDArray[Any]], until_ns: int | None = None) -> Iterator[dict[str, Any]]:
    """Yields the events of requests, `ts` in ns: asynchronous slices, which viewers show on a track an id.

    `requests` are the columns of `workloads.requests.log.FinishedRequest`. Who arrives behind `until_ns` is left out.
    """
    if not len(requests.get("number", ())):
        return
    yield {"ph": "M", "name": "process_name", "pid": REQUESTS_PID, "tid": 0, "args": {"name": "requests"}}
    yield {"ph": "M", "name": "process_sort_index", "pid": REQUESTS_PID, "tid": 0, "args": {"sort_index": -1}}
    columns = [
        requests[name].tolist() for name in ("number", "prompt_tokens", "output_tokens", "preempted", *_INSTANTS)
    ]
    for number, prompt, output, preempted, *instants in zip(*columns, strict=True):
        if until_ns is not None and instants[0] > until_ns:
            continue
        args = {"prompt_tokens": prompt, "output_tokens": output, "preempted": preempted}
        yield _half("b", number, f"request {number}", instants[0], args)
        for phase, begin_ns, end_ns in zip(_PHASES, instants[:-1], instants[1:], strict=True):
            if end_ns > begin_ns:
                yield _half("b", number, phase, begin_ns)
                yield _half("e", number, phase, end_ns)
        yield _half("e", number, f"request {number}", instants[-1])


def _half(phase: str, number: int, name: str, ns: int, args: dict[str, int] | None = None) -> dict[str, Any]:
    """Returns the beginning or the end of an asynchronous slice."""
    event = {"ph": phase, "cat": REQUEST, "id": number, "name": name, "pid": REQUESTS_PID, "tid": 0, "ts": ns}
    return event if args is None else event | {"args": args}
