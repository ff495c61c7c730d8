"""A serving loop on a machine whose steps take what one says: for a scheduler of one's own, and for theory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..engine.policies.scheduler import ExpertsOf, Limits, Scheduler
from ..workloads.batches import DECODE
from ..workloads.requests.arrivals import Open, Source
from ..workloads.requests.kv_blocks import KvBlocks
from ..workloads.requests.queue import Queue
from ..workloads.requests.request import Request, RequestStep, StepSource, Wait
from ..workloads.requests.rows import RequestRows
from ..workloads.requests.server import Server

#: A step, with the instant at which it was dispatched.
Served = tuple[int, RequestStep]


def tiny_requests(*shapes: tuple[int, int, int]) -> list[Request]:
    """Returns requests of (arrival in ns, prompt tokens, output tokens), numbered from 0."""
    return [Request(number, *shape) for number, shape in enumerate(shapes)]


def tiny_server(
    requests: Sequence[Request] | Source,
    scheduler: type[Scheduler],
    kv: KvBlocks | None = None,
    experts_of: ExpertsOf | None = None,
    **limits: Any,
) -> Server:
    """Returns a server of requests by a scheduler with these `Limits`; room for KV blocks is endless without `kv`.

    Every token goes along a trace of one row.
    """
    source = Open(requests) if isinstance(requests, Sequence) else requests
    queue = Queue(KvBlocks(1 << 40, 1) if kv is None else kv)
    rows = RequestRows(np.zeros(1, dtype=np.int32), np.full(1, DECODE), seed=0)
    return Server(source, queue, scheduler(Limits(**limits), experts_of), rows)


def serve(server: StepSource, step_ns: int | Callable[[RequestStep], int]) -> list[Served]:
    """Run a server to its end on a machine whose steps take so long each, and return what ran when."""
    now_ns, ran = 0, []
    while (step := server.next_step(now_ns)) is not None:
        if isinstance(step, Wait):
            assert step.until_ns > now_ns, "a wait that ends before it begins"
            now_ns = step.until_ns
            continue
        assert isinstance(step, RequestStep)
        ran.append((now_ns, step))
        now_ns += step_ns(step) if callable(step_ns) else step_ns
        server.ended(now_ns)
    return ran
