"""A timeline in numbers that a simulated and a profiled one both have: how busy each lane was, and what overlapped.

Nothing here knows of tokens or experts; busy time is that of the union of intervals, so that what runs beside itself
counts once. Per GPU the split is HolisticTraceAnalysis's temporal breakdown: compute, what is not compute (copies and
communication with no kernel beside them), and idle, from the GPU's first work to its last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..resources.timeline import KINDS, Timeline, union
from .span_names import CATEGORIES, COLLECTIVES

if TYPE_CHECKING:
    from .profiler_trace import Imported

Array = npt.NDArray[Any]

_COPIES = [number for number, kind in enumerate(KINDS) if CATEGORIES[kind] == "gpu_memcpy"]
_KERNELS = [number for number, kind in enumerate(KINDS) if CATEGORIES[kind] == "kernel" and number not in COLLECTIVES]


def timeline_summary(timeline: Timeline) -> dict[str, Any]:
    """Returns a timeline's split as plain data: of each GPU, of each role of each device, and of each kind of span.

    `gpus` maps a device to span_ms = compute_ms + not_compute_ms + idle_ms, copy_ms and `overlap`, the share of its
    copies' time with a kernel beside it (None without copies). `roles` maps "device role" to its spans, busy_ms, and
    busy_share of `of_ms`: of a GPU's time from first work to last, which is that of its shares in `gpus`, and of the
    whole timeline's, from first start to last end, for all else. `kinds` maps a kind to its spans and ms.
    """
    spans = timeline.spans()
    first_ns, last_ns = int(spans["start_ns"].min(initial=2**62)), int(spans["end_ns"].max(initial=0))
    span_ns = max(0, last_ns - first_ns)
    device_of, devices = _numbered([lane.device for lane in timeline.lanes])
    gpus = _gpus(spans, device_of[spans["lane"]], devices)
    role_of, names = _numbered([(lane.device, lane.role) for lane in timeline.lanes])
    role = role_of[spans["lane"]]
    busy_ns = _busy_ns(role, spans, len(names)).tolist()
    roles = {}
    for (device, name), count, ns in zip(names, np.bincount(role, minlength=len(names)).tolist(), busy_ns, strict=True):
        if count:
            of_ms = gpus[device]["span_ms"] if device in gpus else span_ns / 1e6
            share = ns / 1e6 / of_ms if of_ms else None
            roles[f"{device} {name}"] = {"spans": count, "busy_ms": ns / 1e6, "of_ms": of_ms, "busy_share": share}
    kinds = {}
    for number in np.unique(spans["kind"]).tolist():
        here = spans[spans["kind"] == number]
        took_ms = float((here["end_ns"] - here["start_ns"]).sum(dtype=np.float64)) / 1e6
        kinds[KINDS[number]] = {"spans": len(here), "ms": took_ms}
    return {"spans": len(spans), "span_ms": span_ns / 1e6, "gpus": gpus, "roles": roles, "kinds": kinds}


def kernel_costs(imported: Imported) -> list[dict[str, Any]]:
    """Returns a row for each kind of work of an imported timeline: what it took, and what beside copies to the GPU.

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
    took_ns = (spans["end_ns"] - spans["start_ns"])[chosen]
    beside = _beside_copies(timeline, spans)[chosen]
    stream_of, streams = _numbered([(lane.device, lane.title) for lane in timeline.lanes])
    keys = np.stack([stream_of[spans["lane"]], imported.name_of, imported.span_bytes], axis=1)[chosen]
    distinct, which = np.unique(keys, axis=0, return_inverse=True)
    which = which.reshape(-1)
    count = len(distinct)
    total_ns = np.zeros(count, dtype=np.int64)
    np.add.at(total_ns, which, took_ns)
    samples = _samples(which, took_ns, count)
    quiet, disturbed = (_samples(which[mask], took_ns[mask], count) for mask in (~beside, beside))
    rows = []
    for number, (stream, name, size_bytes) in enumerate(distinct.tolist()):
        device, title = streams[stream]
        sampled = samples[number]
        assert sampled is not None  # a group has a span
        rows.append(
            {
                "device": device,
                "lane": title,
                "name": imported.names[name],
                "bytes": size_bytes or None,
                "n": sampled["n"],
                "total_ms": int(total_ns[number]) / 1e6,
                "samples": sampled,
                "quiet": quiet[number],
                "beside_copy": disturbed[number],
            }
        )
    return sorted(rows, key=lambda row: -float(row["total_ms"]))


def _numbered(names: Sequence[Any]) -> tuple[Array, list[Any]]:
    """Returns the number of each name, in order of first appearance, and the names by number."""
    numbers: dict[Any, int] = {}
    of_each = [numbers.setdefault(name, len(numbers)) for name in names]
    return np.array(of_each, dtype=np.int64), list(numbers)


def _keys(group: Array, start_ns: Array, end_ns: Array) -> tuple[Array, Array, Array]:
    """Returns (starts, ends, times): whole numbers that order intervals by group and within it by time.

    A key is the group's number times the number of `times`, plus the place of the time among them.
    """
    times, places = np.unique(np.concatenate([start_ns, end_ns]), return_inverse=True)
    starts, ends = group * len(times) + places.reshape(2, -1)
    return starts, ends, times


def _busy_ns(group: Array, spans: Array, count: int) -> Array:
    """Returns how long at least one span of each of `count` groups lasts (count,); `group` (spans,) numbers them."""
    busy_ns = np.zeros(count, dtype=np.int64)
    if len(spans):
        starts, ends, times = _keys(group, spans["start_ns"], spans["end_ns"])
        starts, ends = union(starts, ends)
        np.add.at(busy_ns, starts // len(times), times[ends % len(times)] - times[starts % len(times)])
    return busy_ns


def _gpus(spans: Array, device: Array, devices: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Returns the split of each GPU that works; `device` (spans,) numbers its `devices`."""
    on_gpu = np.array([name.startswith("gpu") for name in devices], dtype=bool)
    if not len(spans):
        return {}
    here = on_gpu[device] & np.isin(spans["kind"], [*_COPIES, *_KERNELS, *COLLECTIVES])
    spans, device, count = spans[here], device[here], len(devices)
    kernels, copies = (np.isin(spans["kind"], kinds) for kinds in (_KERNELS, _COPIES))
    either = kernels | copies
    busy_ns = _busy_ns(device, spans, count)
    compute_ns, copy_ns, either_ns = (_busy_ns(device[mask], spans[mask], count) for mask in (kernels, copies, either))
    first_ns, last_ns = np.full(count, 2**62), np.full(count, -(2**62))
    np.minimum.at(first_ns, device, spans["start_ns"])
    np.maximum.at(last_ns, device, spans["end_ns"])
    rows = zip(
        devices,
        *(column.tolist() for column in (first_ns, last_ns, busy_ns, compute_ns, copy_ns, either_ns)),
        strict=True,
    )
    return {name: _gpu(*times_ns) for name, *times_ns in rows if times_ns[0] <= times_ns[1]}


def _gpu(
    first_ns: int, last_ns: int, busy_ns: int, compute_ns: int, copy_ns: int, either_ns: int
) -> dict[str, float | None]:
    span_ns, both_ns = last_ns - first_ns, compute_ns + copy_ns - either_ns
    return {
        "span_ms": span_ns / 1e6,
        "compute_ms": compute_ns / 1e6,
        "not_compute_ms": (busy_ns - compute_ns) / 1e6,
        "idle_ms": (span_ns - busy_ns) / 1e6,
        "copy_ms": copy_ns / 1e6,
        "overlap": both_ns / copy_ns if copy_ns else None,
    }


def _beside_copies(timeline: Timeline, spans: Array) -> Array:
    """Returns which spans a copy to the GPU of the same device overlaps, other than themselves (spans,)."""
    to_gpu = np.array([lane.role == "h2d" for lane in timeline.lanes], dtype=bool)[spans["lane"]]
    if not to_gpu.any():
        return np.zeros(len(spans), dtype=bool)
    device_of, _ = _numbered([lane.device for lane in timeline.lanes])
    starts, ends, _ = _keys(device_of[spans["lane"]], spans["start_ns"], spans["end_ns"])
    copy_starts, copy_ends = union(starts[to_gpu], ends[to_gpu])
    at = np.minimum(np.searchsorted(copy_ends, starts, side="right"), len(copy_ends) - 1)
    beside: Array = ~to_gpu & (copy_starts[at] < ends) & (copy_ends[at] > starts)
    return beside


def _samples(group: Array, took_ns: Array, count: int) -> list[dict[str, float] | None]:
    """Returns the number, median and interquartile range of each of `count` groups; None of one that has nothing.

    Between two values the quantile runs straight, as numpy's does.
    """
    order = np.lexsort((took_ns, group))
    ordered, sizes = took_ns[order], np.bincount(group, minlength=count)
    first = np.cumsum(sizes) - sizes
    there = np.flatnonzero(sizes)
    quartiles = []
    for share in (0.25, 0.5, 0.75):
        place = (sizes[there] - 1) * share
        below = place.astype(np.int64)
        low, high = ordered[first[there] + below], ordered[first[there] + np.minimum(below + 1, sizes[there] - 1)]
        part = place - below
        quartiles.append(np.where(part < 0.5, low + (high - low) * part, high - (high - low) * (1 - part)).tolist())
    samples: list[dict[str, float] | None] = [None] * count
    for number, size, low, median, high in zip(there.tolist(), sizes[there].tolist(), *quartiles, strict=True):
        samples[number] = {"n": size, "median_ns": median, "iqr_ns": high - low}
    return samples
