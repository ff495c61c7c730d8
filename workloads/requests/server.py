"""The serving loop without its clock: requests arrive, a scheduler makes a step of them, its end gives tokens.

An engine says what o'clock it is and when a step's tokens were there; all else is decided here. The scheduler is any
object with the `plan` of `engine.policies.scheduler`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ..batches import DECODE, PREFILL
from .arrivals import Source
from .kv_blocks import KvBlocks
from .log import RequestLog, StepRecord
from .queue import Live, Queue
from .request import Part, RepeatedStep, Repeats, RequestStep, Wait, is_decode
from .rows import RequestRows
from .speculation import Speculation, draft_rows

#: Later than any request comes; and more steps than anybody looks ahead.
_NEVER, _MOST_REPEATS = 1 << 60, 256
#: Where a step's record has its KV blocks, and how many were preempted.
_BLOCKS, _PREEMPTED = (StepRecord._fields.index(name) for name in ("kv_blocks", "preempted"))

Rows = npt.NDArray[np.int64]


class Plans(Protocol):
    """What a server asks of its scheduler."""

    def plan(self, queue: Queue) -> None:
        """Give requests parts of the next step."""


@dataclass
class _Planned:
    """A step that runs: what it was made of, and how many drafts of each request are right."""

    start_ns: int
    step: RequestStep
    parts: tuple[Part, ...]
    accepted: dict[int, int]
    record: dict[str, int] = field(default_factory=dict)


class Server:
    """One replica: a source of requests, a queue, a scheduler, and the rows of the trace that stand for tokens.

    `next_step` and `ended` are called in turn, as `request.StepSource` says. `log` has what was recorded.
    """

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
        self._took_ns = 0
        self._known_blocks: list[int] = []

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
        record = {
            "rows": sum(part.tokens for part in parts),
            "running": len(queue.running),
            "waiting": len(queue.waiting),
            "kv_blocks": queue.kv.used_blocks,
            "preempted": queue.preempted,
            "drafts": sum(part.drafts for part in parts),
            "accepted": sum(accepted.values()),
        }
        step = RequestStep(
            DECODE if is_decode(parts) else PREFILL,
            np.concatenate(rows),
            parts=parts,
            kv_blocks=queue.kv.used_blocks,
            swap_in_bytes=queue.swap_in_blocks * queue.block_bytes,
            swap_out_bytes=queue.swap_out_blocks * queue.block_bytes,
        )
        self._running = _Planned(now_ns, step, parts, accepted, record)
        return step

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
        row = -1
        for part in step.parts:
            row += part.tokens
            live = self._live[part.request]
            given = queue.advance(live, step.accepted.get(part.request, 0))
            if given:
                tokens += given
                self.log.gave(part.request, given, end_ns, row)
            if live.produced == live.request.output_tokens:
                self._leave(live, end_ns)
        # Streams that share a link are busy at once.
        self._took_ns = end_ns - step.start_ns
        queue.link_busy = min(1.0, link_busy_ns / max(1, end_ns - step.start_ns))
        self.log.step(StepRecord(start_ns=step.start_ns, end_ns=end_ns, tokens=tokens, **step.record))
        self._running = None

    def repeats(self) -> Repeats:
        """Returns the steps that follow the one that runs if nobody arrives: all go on by one token until one ends."""
        running, queue, none = self._running, self.queue, Repeats([], 0)
        goes_on = getattr(self._scheduler, "goes_on", None)
        if running is None or goes_on is None or type(queue.kv) is not KvBlocks or queue.drafts or not goes_on(queue):
            return none
        lives, parts = queue.running, running.parts
        alike = len(lives) == len(parts) and all(
            part.request == live.request.number and part.tokens == part.sampled == 1
            for part, live in zip(parts, lives, strict=True)
        )
        if not alike:
            return none
        comes_ns = self.source.next_ns()
        until_ns = _NEVER if comes_ns is None else comes_ns
        left = min(live.request.output_tokens - live.produced for live in lives) - 1
        most = min(left, _MOST_REPEATS, 2 + (until_ns - running.start_ns) // max(1, self._took_ns))
        if most < 1:
            return none
        kv = queue.kv
        first = np.array([part.first for part in parts])
        held = np.array([kv.held(part.request) for part in parts])
        # So many positions each has in the step that runs and in those behind it, and so many blocks more they take.
        cached = first + np.arange(1, most + 1)[:, None]
        more = np.maximum(0, -(-(cached + 1) // kv.block_tokens) - held).sum(axis=1)
        count = int(np.searchsorted(more, kv.free_blocks, side="right"))
        rows = np.stack(
            [self._rows_of[part.request][part.first + 1 : part.first + 1 + count] for part in parts], axis=1
        )
        blocks = (kv.used_blocks + more).tolist()
        steps: list[RequestStep] = [
            RepeatedStep(running.step, *each) for each in zip(rows, cached, blocks, strict=False)
        ]
        self._known_blocks = blocks[:count]
        return Repeats(steps, until_ns)

    def repeated(self, ends_ns: Sequence[int]) -> None:
        """Learn that the step that ran and those that were known behind it ended at these instants."""
        step, queue, count = self._running, self.queue, len(ends_ns)
        assert step is not None, "repeated without a step"
        ends = np.array(ends_ns, dtype=np.int64)
        numbers = [part.request for part in step.parts]
        records = np.tile(np.array(StepRecord(0, 0, tokens=len(numbers), **step.record)), (count, 1))
        records[:, 0], records[:, 1] = [step.start_ns, *ends_ns[:-1]], ends
        records[1:, _BLOCKS] = self._known_blocks[: count - 1]
        records[1:, _PREEMPTED] = 0
        self.log.repeated(numbers, ends, records)
        parts = []
        for part, live in zip(step.parts, queue.running, strict=True):
            live.known += count
            live.computed = part.first + count
            taken = queue.kv.take(part.request, live.computed + 1)
            assert taken, f"request {part.request}: no KV block for a step that was known"
            parts.append(part._replace(first=live.computed))
        queue.parts = {part.request: part for part in parts}
        record = step.record | {"kv_blocks": queue.kv.used_blocks, "preempted": 0}
        self._running = replace(step, start_ns=ends_ns[-1], parts=tuple(parts), record=record)

    def _leave(self, live: Live, end_ns: int) -> None:
        self.queue.finish(live)
        self.log.finished(live, end_ns)
        self.source.finished(live.request, end_ns)
        del self._live[live.request.number]
        del self._rows_of[live.request.number]
