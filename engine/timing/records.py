"""What a run records on each GPU: spans, accesses, visits, arrivals, and accesses that needed no copy."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ...resources.timeline import Timeline

#: The title of the lane of copies from another GPU.
COPIES_FROM = "copy engine from {}"

#: One access: the visit, the copy that held the expert's bytes, and how many of the batch's tokens chose it.
ACCESS = np.dtype([("visit", "<i4"), ("copy", "<i4"), ("tokens", "<i4")])
#: One access, or some tokens of it, that needed no copy: its way, a number of `policies.miss.WAYS`; how many tokens of
#: what gate weight; whether these were all of its tokens.
RESOLVED = np.dtype(
    [("visit", "<i4"), ("expert", "<i4"), ("way", "<i4"), ("tokens", "<i4"), ("gate", "<f8"), ("whole", "?")]
)
#: One layer visit: when the host knew the choice; the expert bytes assigned once all was decided, and the budget.
VISIT = np.dtype([("choice_known_ns", "<i8"), ("assigned_bytes", "<i8"), ("budget_bytes", "<i8")])
#: When what another GPU sent had come, and what waited for it: the first kernel of a kind in a visit.
ARRIVAL = np.dtype([("visit", "<i4"), ("kind", "<i4"), ("arrived_ns", "<i8")])

RECORDS = {"accesses": ACCESS, "visits": VISIT, "arrivals": ARRIVAL}
#: Pack the fields of one record, in the order of ACCESS, of VISIT, of ARRIVAL and of RESOLVED.
pack_access = struct.Struct("<iii").pack
pack_visit = struct.Struct("<qqq").pack
pack_arrival = struct.Struct("<iiq").pack
pack_resolved = struct.Struct("<iiiid?").pack


@dataclass(frozen=True)
class Decoded:
    """What a run recorded: the timeline, and arrays of dtype ACCESS, VISIT and ARRIVAL in order of dispatch.

    `resolved` is what a miss policy found another way for, an array of dtype RESOLVED, if there is one.
    """

    timeline: Timeline
    accesses: npt.NDArray[Any]
    visits: npt.NDArray[Any]
    arrivals: npt.NDArray[Any] = field(default_factory=lambda: np.empty(0, dtype=ARRIVAL))
    resolved: npt.NDArray[Any] | None = None
    #: Of GPUs that share experts: the tokens sent to each of them (exchanges, GPUs), in order.
    sent: npt.NDArray[Any] = field(default_factory=lambda: np.empty((0, 0), dtype=np.int32))
