"""What a timeline comes to, in numbers that a simulated and a profiled one both have: who was busy, and beside whom.

Nothing here knows of tokens or experts; busy time is that of the union of intervals, so that what runs beside itself
counts once. Per GPU the split is HolisticTraceAnalysis's temporal breakdown: compute, what is not compute (copies and
communication with no kernel beside them), and idle, from the GPU's first work to its last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...resources.timeline import KINDS, Timeline, covered_ns, union
from .export import CATEGORIES, COLLECTIVES

if TYPE_CHECKING:
    from .profiler_trace import Imported

Array = npt.NDArray[Any]

_COPIES = [number for number, kind in enumerate(KINDS) if CATEGORIES[kind] == "gpu_memcpy"]
_KERNELS = [number for number, kind in enumerate(KINDS) if CATEGORIES[kind] == "kernel" and number not in COLLECTIVES]


def timeline_summary(timeline: Timeline) -> dict[str, Any]:
    """Return a timeline's split as plain data: of each GPU, of each role of each device, and of each kind of span.

    `gpus` maps a device to span_ms = compute_ms + not_compute_ms + idle_ms, copy_ms and `overlap`, the share of its
    copies' time with a kernel beside it (None without copies). `roles` maps "device role" to its spans, busy_ms, and
    busy_share of the time from the timeline's first start to its last end; `kinds` maps a kind to its spans and ms.
    """
    spans = timeline.spans()
    first_ns, last_ns = int(spans["start_ns"].min(initial=2**62)), int(spans["end_ns"].max(initial=0))
    span_ns = max(0, last_ns - first_ns)
    on_gpu = [lane.device.startswith("gpu") for lane in timeline.lanes]
    gpus, roles = {}, {}
    for device in dict.fromkeys(lane.device for lane, gpu in zip(timeline.lanes, on_gpu, strict=True) if gpu):
        lanes = [number for number, lane in enumerate(timeline.lanes) if lane.device == device]
        here = spans[np.isin(spans["lane"], lanes) & np.isin(spans["kind"], [*_COPIES, *_KERNELS, *COLLECTIVES])]
        if len(here):
            gpus[device] = _gpu(here)
    for device, role in dict.fromkeys((lane.device, lane.role) for lane in timeline.lanes):
        lanes = [number for number, lane in enumerate(timeline.lanes) if (lane.device, lane.role) == (device, role)]
        here = spans[np.isin(spans["lane"], lanes)]
        if len(here):
            busy_ns = _busy_ns(here)
            share = busy_ns / span_ns if span_ns else None
            roles[f"{device} {role}"] = {"spans": len(here), "busy_ms": busy_ns / 1e6, "busy_share": share}
    kinds = {}
    for number in np.unique(spans["kind"]).tolist():
        here = spans[spans["kind"] == number]
        kinds[KINDS[number]] = {"spans": len(here), "ms": int((here["end_ns"] - here["start_ns"]).sum()) / 1e6}
    return {"spans": len(spans), "span_ms": span_ns / 1e6, "gpus": gpus, "roles": roles, "kinds": kinds}


def kernel_costs(imported: Imported) -> list[dict[str, Any]]:
    """Return a row for each kind of work of an imported timeline: what it took, and what beside copies to the GPU.

    Work is told apart by the title of its lane, its name and, of copies, the bytes; without a GPU it is the host's.
    A row holds n, total_ms, `samples` {n, median_ns, iqr_ns}, as a profile's costs carry them, and the same of what ran
    with no copy to the GPU under way on the same device (`quiet`) and with one (`beside_copy`); None where there are
    none. Largest total first.
    """
    timeline, spans = imported.timeline, imported.timeline.spans()
    roles = np.array([lane.role for lane in timeline.lanes])
    chosen = np.flatnonzero(roles[spans["lane"]] != "host")
    if not len(chosen):
        chosen = np.arange(len(spans))
    took_ns = spans["end_ns"] - spans["start_ns"]
    beside = _beside_copies(timeline, spans)
    same = {(lane.device, lane.title): number for number, lane in enumerate(timeline.lanes)}
    lanes = np.array([same[lane.device, lane.title] for lane in timeline.lanes])[spans["lane"]]
    keys = np.stack([lanes, imported.name_of, imported.span_bytes], axis=1)[chosen]
    distinct, which = np.unique(keys, axis=0, return_inverse=True)
    groups = np.split(chosen[np.argsort(which, kind="stable")], np.cumsum(np.bincount(which))[:-1])
    rows = []
    for (lane, name, size_bytes), group in zip(distinct.tolist(), groups, strict=True):
        here = timeline.lanes[lane]
        rows.append(
            {
                "device": here.device,
                "lane": here.title,
                "name": imported.names[name],
                "bytes": size_bytes or None,
                "n": len(group),
                "total_ms": int(took_ns[group].sum()) / 1e6,
                "samples": _samples(took_ns[group]),
                "quiet": _samples(took_ns[group[~beside[group]]]),
                "beside_copy": _samples(took_ns[group[beside[group]]]),
            }
        )
    return sorted(rows, key=lambda row: -float(row["total_ms"]))


def _busy_ns(spans: Array) -> int:
    return covered_ns(spans["start_ns"], spans["end_ns"])


def _gpu(spans: Array) -> dict[str, float | None]:
    kernels, copies = (spans[np.isin(spans["kind"], kinds)] for kinds in (_KERNELS, _COPIES))
    busy_ns, compute_ns, copy_ns = _busy_ns(spans), _busy_ns(kernels), _busy_ns(copies)
    both_ns = compute_ns + copy_ns - _busy_ns(spans[np.isin(spans["kind"], [*_KERNELS, *_COPIES])])
    span_ns = int(spans["end_ns"].max() - spans["start_ns"].min())
    return {
        "span_ms": span_ns / 1e6,
        "compute_ms": compute_ns / 1e6,
        "not_compute_ms": (busy_ns - compute_ns) / 1e6,
        "idle_ms": (span_ns - busy_ns) / 1e6,
        "copy_ms": copy_ns / 1e6,
        "overlap": both_ns / copy_ns if copy_ns else None,
    }


def _beside_copies(timeline: Timeline, spans: Array) -> Array:
    """Return which spans a copy to the GPU of the same device overlaps, other than themselves (spans,)."""
    beside = np.zeros(len(spans), dtype=bool)
    for device in dict.fromkeys(lane.device for lane in timeline.lanes):
        of_device = [number for number, lane in enumerate(timeline.lanes) if lane.device == device]
        to_gpu = [number for number in of_device if timeline.lanes[number].role == "h2d"]
        copies = spans[np.isin(spans["lane"], to_gpu)]
        start_ns, end_ns = union(copies["start_ns"], copies["end_ns"])
        others = np.isin(spans["lane"], of_device) & ~np.isin(spans["lane"], to_gpu)
        if len(start_ns):
            at = np.minimum(np.searchsorted(end_ns, spans["start_ns"], side="right"), len(end_ns) - 1)
            beside |= others & (start_ns[at] < spans["end_ns"]) & (end_ns[at] > spans["start_ns"])
    return beside


def _samples(took_ns: Array) -> dict[str, float] | None:
    if not len(took_ns):
        return None
    low, median, high = np.percentile(took_ns, (25, 50, 75)).tolist()
    return {"n": len(took_ns), "median_ns": median, "iqr_ns": high - low}
