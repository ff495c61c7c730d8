"""Schedulers: which requests run in the next step, over how many positions; which are admitted, and which preempted.

The queue owns requests, KV blocks and drafts; a scheduler's `plan` asks it to let running requests go on (`grow`), to
admit waiting ones (`admit`) and to take one off the GPU (`preempt`). To add one: write a class with this method, name
it in SCHEDULERS, and work a case by hand in tests/test_scheduler.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...workloads.requests.queue import Live, Queue


@dataclass(frozen=True)
class Limits:
    """How much a step may hold, in vLLM's words.

    `max_num_seqs` requests run at once, and `max_num_batched_tokens` positions are computed in a step; of one prompt
    `long_prefill_token_threshold` at most, if it is not 0. Those that are aware of experts look at the first `window`
    requests that wait, pass over one `patience` times at most, and admit nobody while the link was busy for more than
    `most_link_busy` of the last step.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    long_prefill_token_threshold: int = 0
    window: int = 16
    patience: int = 16
    most_link_busy: float = 1.0


#: Which experts of which layers a request goes to, bool (layers * experts,).
ExpertsOf = Callable[[int], npt.NDArray[np.bool_]]


class Scheduler:
    """What all schedulers are made with: limits, and whom to ask for a request's experts."""

    def __init__(self, limits: Limits, experts_of: ExpertsOf | None = None) -> None:
        self.limits = limits
        self.experts_of = experts_of

    def plan(self, queue: Queue) -> None:
        """Give requests parts of the next step; with requests there and none in a step, it must give one."""
        raise NotImplementedError

    def goes_on(self, queue: Queue) -> bool:
        """Whether the next plan is known: to let all that run go on by a token, if nobody arrives, ends or decodes yet.

        An engine then need not ask for it. False where a scheduler does not say so.
        """
        return False


class _GoesOn(Scheduler):
    """A scheduler that lets all go on that decode, in the order in which they run, where nobody can be admitted."""

    def goes_on(self, queue: Queue) -> bool:
        """Whether nobody waits, or for a place that only an end makes free."""
        return not queue.waiting or len(queue.running) >= self.limits.max_num_seqs


class Static(_GoesOn):
    """Batches that nobody joins: when one is done, those that wait make the next, each with all its room reserved."""

    def plan(self, queue: Queue) -> None:
        """Let the batch go on; or make one of those that wait, in order."""
        if queue.running:
            for live in list(queue.running):
                queue.grow(live, queue.due(live))
            return
        _admit_reserved(queue, self.limits)


class Orca(_GoesOn):
    """Continuous batching: who waits joins at any step, whole prompt at once, with all its room reserved.

    Yu et al., "Orca: a distributed serving system for transformer-based generative models", OSDI 2022, algorithm 1.
    """

    def plan(self, queue: Queue) -> None:
        """Let all that run go on, and admit those that wait, in order, as long as there is a place and room."""
        for live in list(queue.running):
            queue.grow(live, queue.due(live))
        _admit_reserved(queue, self.limits)


def _admit_reserved(queue: Queue, limits: Limits) -> None:
    """Admit whole prompts, in order, as long as there is a place and room for all that each will ever hold."""
    while queue.waiting and len(queue.running) < limits.max_num_seqs:
        live = queue.waiting[0]
        if not queue.admit(live, live.known - queue.start(live), queue.most_positions(live)):
            return


class PrefillFirst(_GoesOn):
    """Steps of prompts as long as some can be admitted, and else a step that decodes all that run (vLLM, version 0).

    A step of prompts holds `max_num_batched_tokens` of them, or one longer prompt by itself. A hundredth of the blocks
    is kept free on admission. Where blocks are missing to decode, who came last has to leave.
    """

    watermark = 0.01

    def plan(self, queue: Queue) -> None:
        """Admit prompts; if there are none, decode."""
        budget = self.limits.max_num_batched_tokens
        spare = int(self.watermark * queue.kv.blocks)
        while queue.waiting and len(queue.running) < self.limits.max_num_seqs:
            live = queue.waiting[0]
            count = live.known - queue.start(live)
            alone = not queue.parts
            kept = spare if queue.running else 0
            if (count > budget and not alone) or queue.kv.free_blocks - queue.kv.needed(live.known) < kept:
                break
            if not queue.admit(live, count):
                break
            budget -= count
        if not queue.parts:
            _go_on(queue, queue.running, [queue.due(live) for live in queue.running])


class Chunked(_GoesOn):
    """One budget of positions a step, for those that run, in order, and then for those that wait (vLLM, version 1).

    Prompts are cut to what is left of the budget. Where blocks are missing for a running request, the last running one
    has to leave, to the head of those that wait; a step in which one left admits nobody.
    """

    def plan(self, queue: Queue) -> None:
        """Let those that run go on, in order, then admit those that wait."""
        budget = self.limits.max_num_batched_tokens
        at, left = 0, False
        while at < len(queue.running) and budget:
            live = queue.running[at]
            count = self._cut(queue.due(live), budget)
            there = True
            while there and not queue.grow(live, count):
                last = queue.running[-1]
                queue.preempt(last)
                left, there = True, last is not live
            if not there:
                break
            budget -= count
            at += 1
        if not left:
            self._admit(queue, budget)

    def _admit(self, queue: Queue, budget: int) -> None:
        while queue.waiting and budget and len(queue.running) < self.limits.max_num_seqs:
            live = self.choose(queue)
            count = self._cut(live.known - queue.start(live), budget)
            if not queue.admit(live, count):
                return
            budget -= count

    def _cut(self, due: int, budget: int) -> int:
        """Returns how much of what is due a step takes."""
        most = self.limits.long_prefill_token_threshold
        return min(due, budget, most) if most else min(due, budget)

    def choose(self, queue: Queue) -> Live:
        """Returns who of those that wait is admitted next."""
        return queue.waiting[0]


class Sarathi(_GoesOn):
    """One budget a step: first all that decode, then prompts that have begun, then new ones, in chunks.

    Nobody who decodes waits for a prompt. The whole of a prompt has its blocks before it begins. Agrawal et al.,
    "Taming throughput-latency tradeoff in LLM inference with Sarathi-Serve", OSDI 2024, algorithm 3.
    """

    def plan(self, queue: Queue) -> None:
        """Let those that decode go on, then prompts that have begun, then admit."""
        budget = self.limits.max_num_batched_tokens
        decoding = [live for live in queue.running if live.decodes]
        budget -= _go_on(queue, decoding, [queue.due(live) for live in decoding])
        for live in queue.running:
            if live.request.number not in queue.parts and not live.decodes and budget > 0:
                count = min(queue.due(live), budget)
                queue.grow(live, count)
                budget -= count
        while queue.waiting and budget > 0 and len(queue.running) < self.limits.max_num_seqs:
            live = queue.waiting[0]
            count = min(live.known - queue.start(live), budget)
            if not queue.admit(live, count, live.known):
                return
            budget -= count


def _go_on(queue: Queue, wanted: list[Live], counts: list[int]) -> int:
    """Let these requests go on, in order; where blocks are missing, who runs last leaves. Returns the positions."""
    given = 0
    for live, count in zip(list(wanted), counts, strict=True):
        while live in queue.running and not queue.grow(live, count):
            queue.preempt(queue.running[-1])
        given += count if live.request.number in queue.parts else 0
    return given


class ExpertAware(Chunked):
    """As chunked, but of the first that wait it admits whoever adds the fewest experts to those that run already.

    It knows the experts of a request beforehand, which a real one has to guess: it bounds what such a scheduler can
    gain. Nobody is passed over more than `patience` times; and while the last step kept the link to the GPU busy for
    more than `most_link_busy` of its time, nobody is admitted, as long as somebody runs.
    """

    def __init__(self, limits: Limits, experts_of: ExpertsOf | None = None) -> None:
        super().__init__(limits, experts_of)
        self._passed: dict[int, int] = {}

    def goes_on(self, queue: Queue) -> bool:
        """Whether nobody waits: else it looks at the link after every step."""
        return not queue.waiting

    def _admit(self, queue: Queue, budget: int) -> None:
        if not queue.running or queue.link_busy <= self.limits.most_link_busy:
            super()._admit(queue, budget)

    def choose(self, queue: Queue) -> Live:
        """Returns who adds the fewest experts; of equals, who came first."""
        first = queue.waiting[0]
        passed = self._passed.get(first.request.number, 0)
        if self.experts_of is None or not queue.running or passed >= self.limits.patience:
            return first
        there = np.logical_or.reduce([self.experts_of(live.request.number) for live in queue.running])
        seen = list(queue.waiting)[: self.limits.window]
        added = [int((self.experts_of(live.request.number) & ~there).sum()) for live in seen]
        chosen = seen[added.index(min(added))]
        for live in seen[: seen.index(chosen)]:
            self._passed[live.request.number] = self._passed.get(live.request.number, 0) + 1
        return chosen


#: By the names that a scenario uses.
SCHEDULERS: dict[str, type[Scheduler]] = {
    "static": Static,
    "orca": Orca,
    "prefill-first": PrefillFirst,
    "chunked": Chunked,
    "sarathi": Sarathi,
    "expert-aware": ExpertAware,
}
