"""The timeline: every interval that some lane was busy, recorded once; every metric of time derives from it.

A span is 40 bytes in one growing buffer, so that recording is one `pack` and a million spans are 40 MB.
Lanes are numbered in the order in which they are added; `spans()` hands everything out as one numpy array.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .spool import Column

#: What a span is, by its `kind` number. Kernels, copies and collectives are those of imported timelines, which might be
#: for anything.
KINDS = (
    *("dense", "expert", "head", "demand", "prefetch", "readback", "predict", "launch"),
    *("activation", "dispatch", "combine", "peer", "cpu_expert", "decompress", "read"),
    *("kernel", "copy", "collective"),
    *("guesses", "swap", "demotion"),
)
DENSE, EXPERT, HEAD, DEMAND, PREFETCH, READBACK, PREDICT, LAUNCH = range(8)
ACTIVATION, DISPATCH, COMBINE, PEER, CPU_EXPERT, DECOMPRESS, READ = range(8, 15)
KERNEL, COPY, COLLECTIVE = range(15, 18)
GUESSES, SWAP, DEMOTION = 18, 19, 20

#: What a lane is for: one of these roles.
ROLES = ("compute", "h2d", "d2h", "predictor", "host", "peer", "cpu", "nvme", "side")

#: One span. Times are integer nanoseconds; `issued_ns` is when the host had asked for it; `expert`, `visit` and
#: `copy` are -1 where they mean nothing. `copy` on an expert's kernel names the copy that brought its bytes; on a
#: read from a drive it is the number of that read.
SPAN = np.dtype(
    [
        ("start_ns", "<i8"),
        ("end_ns", "<i8"),
        ("issued_ns", "<i8"),
        ("expert", "<i4"),
        ("visit", "<i4"),
        ("copy", "<i4"),
        ("lane", "<u2"),
        ("kind", "<u2"),
    ]
)
#: Packs the fields of one span, in the order of SPAN.
pack_span = struct.Struct("<qqqiiiHH").pack


def union(start_ns: npt.NDArray[Any], end_ns: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Returns (start_ns, end_ns) of the disjoint intervals that intervals, in any order, cover together; in order."""
    order = np.argsort(start_ns, kind="stable")
    start_ns, until_ns = start_ns[order], np.maximum.accumulate(end_ns[order])
    first = np.ones(len(start_ns), dtype=bool)
    first[1:] = start_ns[1:] > until_ns[:-1]
    last = np.append(first[1:], True)[: len(first)]
    return start_ns[first], until_ns[last]


def covered_ns(start_ns: npt.NDArray[Any], end_ns: npt.NDArray[Any]) -> int:
    """Returns how long at least one of some intervals lasts, in ns."""
    starts_ns, ends_ns = union(start_ns, end_ns)
    return int((ends_ns - starts_ns).sum())


def _in_order(spans: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Returns spans by their ends, of equal ends by lane, of equal lanes as they are; the same array if they are so.

    Sorted twice, since a sort that takes over what is in order already, as much of a timeline is, takes one number.
    """
    ends_ns, lanes = np.ascontiguousarray(spans["end_ns"]), spans["lane"].astype(np.int64)
    before = np.diff(ends_ns)
    if ((before > 0) | ((before == 0) & (np.diff(lanes) >= 0))).all():
        return spans
    order = np.argsort(ends_ns, kind="stable")
    instants = np.cumsum(np.diff(ends_ns[order], prepend=ends_ns[order[0]]) > 0)
    order = order[np.argsort(instants * (1 << 16) + lanes[order], kind="stable")]
    ordered: npt.NDArray[Any] = spans.take(order)  # whole records at once: an index in brackets copies field by field
    return ordered


@dataclass(frozen=True)
class LaneName:
    """A lane as people see it: `device` ("gpu0", "host"), `role` (one of ROLES) and a title for its track."""

    device: str
    role: str
    title: str


class Timeline:
    """All spans of one run: in the order of recording or, once they are settled, in that of their ends."""

    def __init__(self, column: Column | None = None) -> None:
        """Keep the spans in a column of dtype SPAN; without one, in memory."""
        self.lanes: list[LaneName] = []
        self._spans = Column(SPAN) if column is None else column
        self._settled = True  # or not, while it does not matter
        #: Adds packed spans; lanes that record many call it with `pack_span` themselves.
        self.extend = self._spans.buffer.extend

    def add(self, spans: bytes) -> None:
        """Add many packed spans at once."""
        self._spans.add(spans)

    def add_lane(self, device: str, role: str, title: str) -> int:
        """Returns the number of a new lane; `role` must be one of ROLES."""
        if role not in ROLES:
            raise InputError(f"role = {role!r}: choose one of {', '.join(ROLES)}")
        self.lanes.append(LaneName(device, role, title))
        return len(self.lanes) - 1

    def record(
        self,
        start_ns: int,
        end_ns: int,
        issued_ns: int,
        expert: int,
        visit: int,
        copy: int,
        lane: int,
        kind: int,
    ) -> None:
        """Add one span; the arguments are the fields of SPAN, in its order."""
        self.extend(pack_span(start_ns, end_ns, issued_ns, expert, visit, copy, lane, kind))

    def settle(self, until_ns: int | None = None) -> None:
        """Put spans in order: by their ends, of equal ends by lane. Those that end before `until_ns` go to the file.

        Without it all do; nothing that is recorded later may end earlier. Without a file, all stay where they are.
        """
        if not self._spans.in_file:
            self._settled = False  # until somebody looks
            return
        buffer = self._spans.buffer
        spans = _in_order(np.frombuffer(bytes(buffer), dtype=SPAN))
        if until_ns is None:
            buffer[:] = spans.tobytes()
            return
        ended = int(np.searchsorted(spans["end_ns"], until_ns))
        buffer[:] = spans[:ended].tobytes()
        self._spans.flush()
        buffer.extend(spans[ended:].tobytes())

    def __len__(self) -> int:
        return len(self._spans)

    def spans(self) -> npt.NDArray[Any]:
        """Returns all spans as a structured array of dtype SPAN, in order.

        It is a read-only view, so that a long timeline is not held twice: while it lives, nothing can be recorded.
        """
        if not self._settled:
            self._settled = True
            recorded = self._spans.array()
            ordered = _in_order(recorded)
            if ordered is not recorded:
                np.frombuffer(self._spans.buffer, dtype=SPAN)[:] = ordered
        return self._spans.array()

    def last_end_ns(self, role: str) -> int:
        """Returns the latest end of any span on the lanes of one role, 0 without any; no order is made for that."""
        recorded = self._spans.array()
        ends_ns = recorded["end_ns"][self.on_lanes(recorded, role)]
        return int(ends_ns.max(initial=0))

    def on_lanes(self, spans: npt.NDArray[Any], role: str) -> npt.NDArray[np.bool_]:
        """Returns which of some of its spans are on the lanes of one role."""
        of_role = np.array([lane.role == role for lane in self.lanes], dtype=np.bool_)
        which: npt.NDArray[np.bool_] = of_role[spans["lane"]] if len(spans) else np.zeros(0, dtype=np.bool_)
        return which

    def lanes_with(self, role: str) -> list[int]:
        """Returns the numbers of the lanes of one role."""
        return [number for number, lane in enumerate(self.lanes) if lane.role == role]
