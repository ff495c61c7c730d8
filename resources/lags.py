"""Lags: what passes on a lane between two pieces of work, and between the cause of one and its start."""

from __future__ import annotations

from dataclasses import dataclass

#: Before any work: an instant that no submission can precede, however long the lags.
NEVER = -(10**18)


@dataclass(frozen=True, slots=True)
class Lags:
    """What passes on a lane between two pieces of work, and between the cause of one and its start, in ns.

    `gap_ns`: from the end of one to the start of the next. `after_other_ns`: from the end of what work waits for. All
    are so much longer, as is the time from the instant at which work is issued, where a lane that disturbs this one was
    busy meanwhile: at some instant between the last cause and the start that the work would have without.
    """

    gap_ns: int = 0
    gap_longer_ns: int = 0
    after_other_ns: int = 0
    after_other_longer_ns: int = 0
    after_issue_longer_ns: int = 0

    @property
    def gap_disturbed_ns(self) -> int:
        """The gap beside a disturber."""
        return self.gap_ns + self.gap_longer_ns

    @property
    def after_other_disturbed_ns(self) -> int:
        """What passes behind what work waits for, beside a disturber."""
        return self.after_other_ns + self.after_other_longer_ns

    @property
    def longer(self) -> bool:
        """Whether any is longer beside a disturber."""
        return bool(self.gap_longer_ns or self.after_other_longer_ns or self.after_issue_longer_ns)
