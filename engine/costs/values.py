"""Costs as values: of one launch group, one copy, one read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class KernelCost:
    """One launch group: its duration on a quiet GPU, the factor beside a copy, its launches and the host's time.

    `latency_ns` is from the return of the host's last call to the start on an idle lane; it may be below 0.
    `issue_ns` is from the host's first call to the start on an idle lane: several launches count as one piece of work,
    as late as its last launch demands. Kernels last alike, but for one of `long_ns` (attention) that is launched in the
    middle: what is launched before it has to be done.
    """

    ns: int
    slowdown: float
    launches: int
    host_ns: int
    latency_ns: int = 0
    long_ns: int = 0
    issue_ns: int = field(init=False)

    def __post_init__(self) -> None:
        issue_ns = self.latency_ns + issue_after_ns(self.ns, self.long_ns, self.launches, self.host_ns)
        object.__setattr__(self, "issue_ns", issue_ns)


def issue_after_ns(ns: int, long_ns: int, launches: int, host_ns: int) -> int:
    """Returns how long after the host's first call a group of kernels starts on an idle lane, without the latency.

    Compiled code calls this function, too.
    """
    if launches == 1:
        return host_ns
    others_ns = max(0, ns - long_ns)
    last_ns = host_ns - others_ns * (launches - 1) // launches - (ns - others_ns)
    middle_ns = host_ns // 2 - others_ns // 2 if long_ns else 0
    return max(host_ns // launches, middle_ns, last_ns)


@dataclass(frozen=True, slots=True)
class CopyCost:
    """One expert's copy, in `pieces` equal pieces: its duration queued and on an idle engine, whole and by piece.

    `host_ns` is what enqueuing all of it takes the host.
    """

    queued_ns: int
    alone_ns: int
    piece_queued_ns: int
    piece_alone_ns: int
    pieces: int
    host_ns: int


@dataclass(frozen=True, slots=True)
class ReadCost:
    """One expert's read from the drive: so many equal requests, what each takes alone, and the host's time.

    `back_ns` is what its copy back from the GPU takes, whose room it leaves.
    """

    requests: int
    request_ns: int
    host_ns: int
    back_ns: int = 0


@dataclass(frozen=True, slots=True)
class ReadCosts:
    """What reads take: the cost of an expert of each layer (layers,), and what those in flight on the lanes share.

    `times_as_long` (lanes,): how many times as long as alone a request takes while 1, 2, … lanes read.
    """

    by_layer: Sequence[ReadCost]
    times_as_long: Sequence[float]

    @property
    def shared(self) -> bool:
        """Whether requests in flight at once slow each other down, or speed each other up."""
        return any(times != 1 for times in self.times_as_long)
