"""Prefetches that came late, each with its why: what it had before its use, what it waited for, and what it took.

had + late = queued + copied: from the order to the instant the router's choice was known, and what was missing then,
against the wait before the copy, behind others or for its read from a drive, and the copy's own time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..engine.measure.recording import ARRIVED_LATE, LATE
from ..errors import InputError
from ..resources.timeline import PREFETCH

if TYPE_CHECKING:
    from .saved import Run

#: The times of a late prefetch, of which `had_ns + late_ns = queued_ns + copied_ns`.
TIMES = ("had_ns", "queued_ns", "copied_ns", "late_ns")
#: A late prefetch: the layer and the expert; the layer visits that ordered and used it, as `accesses` numbers them;
#: when it was ordered; and its TIMES.
LATE_PREFETCH = np.dtype(
    [(name, "<i8") for name in ("layer", "expert", "ordered_visit", "used_visit", "ordered_ns", *TIMES)]
)


def late_prefetches(run: Run) -> npt.NDArray[Any]:
    """Returns the prefetches of a run that came late (prefetches,), dtype LATE_PREFETCH, in the order of their copies.

    A copy in pieces lasts from its first to its last. Raises InputError if the run has several GPUs: its copies are
    numbered on each.
    """
    if len(run.gpu_names) != 1:
        raise InputError(f"{run.name}: late prefetches are listed for runs on one GPU, and it has {len(run.gpu_names)}")
    spans = run.timeline.spans()
    spans = spans[spans["kind"] == PREFETCH]
    wrong = (spans["copy"] < 0) | (spans["copy"] >= len(run.copies))
    if np.any(wrong):
        raise InputError(f"{run.name}: a prefetch is copy {spans['copy'][wrong][0]} of {len(run.copies)}: damaged")
    spans = spans[run.copies["fate"][spans["copy"]] == ARRIVED_LATE]
    spans = spans[np.argsort(spans["copy"], kind="stable")]
    copies, first = np.unique(spans["copy"], return_index=True)
    late = np.zeros(len(copies), dtype=LATE_PREFETCH)
    if not len(late):
        return late
    begin, used = spans[first], _uses(run, spans[first])
    start_ns = np.minimum.reduceat(spans["start_ns"], first)
    end_ns = np.maximum.reduceat(spans["end_ns"], first)
    late["layer"], late["expert"], late["used_visit"] = used["layer"], used["expert"], used["visit"]
    late["ordered_visit"], late["ordered_ns"] = begin["visit"], begin["issued_ns"]
    late["late_ns"] = used["wait_ns"]
    late["had_ns"] = end_ns - used["wait_ns"] - begin["issued_ns"]
    late["queued_ns"], late["copied_ns"] = start_ns - begin["issued_ns"], end_ns - start_ns
    return late


def _uses(run: Run, ordered: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Returns the late access of each of some prefetches (their first spans): the expert's next after the order."""
    waits = run.accesses[run.accesses["outcome"] == LATE]
    if not len(waits):
        raise InputError(f"{run.name}: prefetches came late and no access waited for them: damaged")
    visits = int(run.accesses["visit"].max()) + 2
    key = waits["expert"].astype(np.int64) * visits + waits["visit"]
    order = np.argsort(key, kind="stable")
    at = np.searchsorted(key[order], ordered["expert"].astype(np.int64) * visits + ordered["visit"])
    found: npt.NDArray[Any] = waits[order[np.minimum(at, len(order) - 1)]]
    if not np.array_equal(found["expert"], ordered["expert"]):
        raise InputError(f"{run.name}: an expert that came late was used nowhere: damaged")
    return found


def late_data(run: Run) -> dict[str, Any]:
    """Returns what is to be said of a run's late prefetches, as plain data.

    `late`; of them `ordered_too_late`, whose copy takes longer than they had, and `behind_others`, which would have
    come in time but for the copies before them, or the drive; `medians` in ms; `worst`, the ten that were waited for
    longest.
    """
    late = late_prefetches(run)
    too_late = int(np.count_nonzero(late["copied_ns"] > late["had_ns"]))
    worst = late[np.argsort(-late["late_ns"], kind="stable")[:10]]
    names = late.dtype.names or ()
    return {
        "prefetches": sum(run.data["prefetch"].values()),
        "late": len(late),
        "ordered_too_late": too_late,
        "behind_others": len(late) - too_late,
        "medians": {_ms(name): float(np.median(late[name])) / 1e6 if len(late) else None for name in TIMES},
        "worst": [
            {_ms(name): row[name].item() / 1e6 if name.endswith("_ns") else row[name].item() for name in names}
            for row in worst
        ],
    }


def _ms(name: str) -> str:
    return name.removesuffix("_ns") + "_ms" if name.endswith("_ns") else name
