"""The serving loop without its clock: requests arrive, a scheduler makes a step of them, its end gives tokens.

An engine says what o'clock it is and when a step's tokens were there; all else is decided here. The scheduler is any
object with the `plan` of `engine.policies.scheduler`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ..batches import DECODE, PREFILL
from .arrivals import Source
from .log import RequestLog, StepRecord
from .queue import Live, Queue
from .request import Part, RequestStep, Wait, is_decode
from .rows import RequestRows
from .speculation import Speculation, draft_rows

Rows = npt.NDArray[np.int64]


class Plans(Protocol):
    """What a server asks of its scheduler."""

    def plan(self, queue: Queue) -> None:
        """Give requests parts of the next step."""


@dataclass
class _Planned:
    """A step that runs: what it was made of, and how many drafts of each request are right."""

    start_ns: int
    parts: tuple[Part, ...]
    accepted: dict[int, int]
    record: dict[str, int] = field(default_factory=dict)


class Server:
    """One replica: a source of requests, a queue, a scheduler, and the rows of the trace that stand for tokens.

    `next_step` and `ended` are called in turn, as `request.StepSource` says. `log` has what was recorded.
    """

    #: Whether an engine may ask for a step before the one before it has ended.
    ahead = False

    def __init__(
        self,
        source: Source,
        queue: Queue,
        scheduler: Plans,
        rows: RequestRows,
        speculation: Speculation | None = None,
    ) -> None:
        self.log = RequestLog()
        self.queue = queue
        self.source, self._scheduler = source, scheduler
        self._rows, self._speculation = rows, speculation
        self._live: dict[int, Live] = {}
        self._rows_of: dict[int, Rows] = {}
        self._running: _Planned | None = None

    def next_step(self, now_ns: int) -> RequestStep | Wait | None:
        """Returns the step to dispatch now, or how long there is nothing to do, or None when all requests are served.

        Raises InputError if the scheduler schedules nobody though there are requests.
        """
        assert self._running is None, "next_step before the step before has ended"
        for request in self.source.arrived(now_ns):
            live = self._live[request.number] = Live(request)
            self.queue.waiting.append(live)
            self.log.arrived(request.arrival_ns)
        if not self._live:
            next_ns = self.source.next_ns()
            return None if next_ns is None else Wait(next_ns)
        queue = self.queue
        queue.begin()
        self._scheduler.plan(queue)
        if not queue.parts:
            head = queue.waiting[0].request if queue.waiting else queue.running[0].request
            raise InputError(
                f"requests: the scheduler gave nobody a part of a step, with {len(queue.running)} requests running and "
                f"{len(queue.waiting)} waiting; request {head.number} ({head.prompt_tokens} + {head.output_tokens} "
                f"tokens) with {queue.kv.free_blocks} of {queue.kv.blocks} KV blocks free"
            )
        return self._step(now_ns)

    def _step(self, now_ns: int) -> RequestStep:
        """Returns the step of the parts that were scheduled."""
        queue, parts = self.queue, tuple(self.queue.parts.values())
        rows: list[Rows] = []
        accepted: dict[int, int] = {}
        for part in parts:
            live = self._live[part.request]
            if live.started_ns < 0:
                live.started_ns = now_ns
            rows.append(self._part_rows(part, live, accepted))
        self._running = _Planned(now_ns, parts, accepted, {
            "rows": sum(part.tokens for part in parts),
            "running": len(queue.running),
            "waiting": len(queue.waiting),
            "kv_blocks": queue.kv.used_blocks,
            "preempted": queue.preempted,
            "drafts": sum(part.drafts for part in parts),
            "accepted": sum(accepted.values()),
        })  # fmt: skip
        return RequestStep(
            DECODE if is_decode(parts) else PREFILL,
            np.concatenate(rows),
            parts=parts,
            kv_blocks=queue.kv.used_blocks,
            swap_in_bytes=queue.swap_in_blocks * queue.block_bytes,
            swap_out_bytes=queue.swap_out_blocks * queue.block_bytes,
        )

    def _part_rows(self, part: Part, live: Live, accepted: dict[int, int]) -> Rows:
        """Returns the rows of a part, and notes how many of its drafts are right."""
        own = self._rows_of.get(part.request)
        if own is None:
            request = live.request
            own = self._rows.of(request.number, request.prompt_tokens, self.queue.most_positions(live))
            self._rows_of[part.request] = own
        rows = own[part.first : part.first + part.tokens]
        if not part.drafts or self._speculation is None:
            return rows
        first = part.first + part.tokens - part.drafts
        right = accepted[part.request] = self._speculation.accepted(part.request, first - 1, part.drafts)
        drafts = draft_rows(
            self._speculation, self._rows.sequence_of(part.request), rows[-part.drafts :], part.request, first, right
        )
        return np.concatenate([rows[: -part.drafts], drafts])

    def ended(self, end_ns: int, link_busy_ns: int = 0) -> None:
        """Give the tokens of the step that ran, which were there at `end_ns`; copies kept the link busy so long."""
        step = self._running
        assert step is not None, "ended without a step"
        assert end_ns >= step.start_ns, f"a step that began at {step.start_ns} ns ended at {end_ns} ns"
        queue, tokens = self.queue, 0
        for part in step.parts:
            live = self._live[part.request]
            given = queue.advance(live, step.accepted.get(part.request, 0))
            if given:
                tokens += given
                self.log.gave(part.request, given, end_ns)
            if live.produced == live.request.output_tokens:
                self._leave(live, end_ns)
        # Streams that share a link are busy at once.
        queue.link_busy = min(1.0, link_busy_ns / max(1, end_ns - step.start_ns))
        self.log.step(StepRecord(start_ns=step.start_ns, end_ns=end_ns, tokens=tokens, **step.record))
        self._running = None

    def _leave(self, live: Live, end_ns: int) -> None:
        self.queue.finish(live)
        self.log.finished(live, end_ns)
        self.source.finished(live.request, end_ns)
        del self._live[live.request.number]
        del self._rows_of[live.request.number]
