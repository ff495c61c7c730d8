"""Steps that a run pulls from a scheduler, one at a time, as its clock goes on.

The scheduler may look at what has finished, and when. What it makes a step of is decided without a clock all the same:
an engine says what o'clock it is, and that is all that it says.
"""

from __future__ import annotations

from collections.abc import Callable

from ...errors import InputError
from ...workloads.batches import PulledSteps, Step
from ...workloads.requests.request import Repeating, Repeats, RequestStep, StepSource, Wait


def _nothing(size_bytes: int) -> int:
    return 0


class Pulled:
    """The steps of one run as it pulls them, and the expert budget before each, if `budget_of` says that it changes.

    No step may have more than `most_tokens` tokens. `schedule_ns` is what the host takes to make one. `idle` are the
    intervals (from, until) in ns in which there was nothing to run.
    """

    def __init__(
        self,
        source: StepSource,
        most_tokens: int,
        schedule_ns: int,
        budget_of: Callable[[Step], int] | None,
    ) -> None:
        self.source, self.schedule_ns = source, schedule_ns
        self.steps = PulledSteps()
        self.budgets: list[int] | None = None if budget_of is None else []
        self.idle: list[tuple[int, int]] = []
        self.most_tokens, self._budget_of = most_tokens, budget_of
        #: What it takes to copy so many bytes of KV blocks to host memory, and back, in ns.
        self.swap_ns: tuple[Callable[[int], int], Callable[[int], int]] = (_nothing, _nothing)
        self._runs = False
        self._link_busy_ns = self._known = 0

    def next(self, now_ns: int, link_busy_ns: int = 0) -> Step | Wait | None:
        """Returns what the scheduler makes of now, when the tokens of the step before, if there was one, are there.

        `link_busy_ns` is how long copies to the GPU have taken since the run began. Raises InputError for a step
        without tokens or with too many, and for waiting for an instant that has passed.
        """
        if self._runs:
            self._runs = False
            self.source.ended(now_ns, link_busy_ns - self._link_busy_ns)
        self._link_busy_ns = link_busy_ns
        found = self.source.next_step(now_ns)
        if isinstance(found, Wait):
            if found.until_ns <= now_ns:
                raise InputError(f"the scheduler waits for {found.until_ns} ns at {now_ns} ns: must be later")
            self.idle.append((now_ns, found.until_ns))
        elif found is not None:
            self._take(found)
        return found

    def swaps_ns(self, step: Step) -> tuple[int, int]:
        """Returns what it takes to swap KV blocks out before a step, and in; 0 for none."""
        moved = (step.swap_out_bytes, step.swap_in_bytes) if isinstance(step, RequestStep) else (0, 0)
        out_ns, in_ns = (
            ns(size_bytes) if size_bytes else 0 for ns, size_bytes in zip(self.swap_ns, moved, strict=True)
        )
        return out_ns, in_ns

    def ahead(self) -> tuple[int, int]:
        """Take the steps that the source knows to come behind the last; return how many, and until when they hold.

        Those that have not begun by then are none: `repeated` says which have.
        """
        source = self.source
        steps, until_ns = source.repeats() if isinstance(source, Repeating) else Repeats([], 0)
        self._known = len(self.steps)
        for step in steps:
            self._take(step)
        return len(steps), until_ns

    def repeated(self, ends_ns: list[int]) -> None:
        """Learn when the steps ended that ran since `ahead`, but for the last."""
        del self.steps[self._known + len(ends_ns) :]
        if self.budgets is not None:
            del self.budgets[len(self.steps) :]
        if ends_ns and isinstance(self.source, Repeating):
            self.source.repeated(ends_ns)

    def _take(self, step: Step) -> None:
        if not 1 <= len(step.rows) <= self.most_tokens:
            raise InputError(
                f"step {len(self.steps)} of the scheduler has {len(step.rows)} tokens: must have 1 to "
                f"{self.most_tokens}"
            )
        self._runs = True
        self.steps.append(step)
        if self.budgets is not None and self._budget_of is not None:
            self.budgets.append(self._budget_of(step))
