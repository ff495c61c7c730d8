"""The transfer benchmark: the guide's table of single and batched copies and allocations, for experts of many models.

From measured samples, from a profile, or measured here; the "Memory Management Simulation Guide" published the same for
an RTX 3090 and one size, 27.00 MiB, and stands beside it. Throughput is that of ten copies in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ...engine.run import Progress
from ...resources.profile import Profile
from ...resources.profile_costs import CopyCosts
from ...workloads.model import load_model, preset_names
from ..device.cuda import CudaError, Gpu
from ..measure.measure import FULL, QUICK, TRANSFERS, measure
from ..measure.samples import Samples
from .evidence import Evidence, sample_rows

#: How many experts a batch has.
BATCH = 10
#: Ways that bytes can go: direction and memory, and what people call them.
WAYS = {
    ("h2d", "pinned"): "CPU -> GPU, pinned",
    ("h2d", "pageable"): "CPU -> GPU, pageable",
    ("d2d", "device"): "GPU -> GPU",
}
#: What the guide published for 27.00 MiB on an RTX 3090, in ms: single, ten.
GUIDE_BYTES = 27 * 2**20
GUIDE = {"CPU -> GPU": (3.41, 40.73), "GPU -> GPU": (0.07, 0.68), "allocation": (0.05, 0.36)}
#: Sizes of the curve, in bytes.
_CURVE_BYTES = tuple(2**power for power in range(12, 31))


def from_samples(samples: Samples) -> dict[str, Any]:
    """Returns the benchmark of measured samples: rows, allocations and curves, as plain data."""
    evidence = Evidence(sample_rows([samples]))
    rows, models = [], _models()
    for direction, memory in WAYS:
        key = {"direction": direction, "memory": memory}
        for single in evidence.micro("copy_batch", **key, copies=1):
            size_bytes = int(single.key["bytes"])
            ten = evidence.micro("copy_batch", **key, bytes=size_bytes, copies=BATCH)
            rows += [_row((direction, memory), size_bytes, single.median_ns, batch.median_ns, models) for batch in ten]
    allocations = []
    for one in evidence.micro("allocation", blocks=1):
        how, size_bytes = str(one.key["how"]), int(one.key["bytes"])
        for many in evidence.micro("allocation", how=how, bytes=size_bytes, blocks=BATCH):
            allocations.append(_allocation(how, size_bytes, one.median_ns, many.median_ns))
    curves = {
        name: sorted(
            (int(row.key["bytes"]), row.key["bytes"] / row.median_ns)
            for row in evidence.micro("copy", direction=direction, memory=memory, mode="alone", beside="none")
        )
        for (direction, memory), name in WAYS.items()
    }
    return _report(f"{samples.device}, measured {samples.date}", rows, allocations, curves)


def measurement(
    device: int | None = None, *, quick: bool = False, progress: Progress | None = None
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Returns by name what measures the benchmark on a CUDA GPU (the first without `device`); nothing without a GPU.

    Raises CudaError if `device` is given and is none.
    """
    try:
        gpu = Gpu(device or 0)
    except CudaError:
        if device is not None:
            raise
        return {}
    extent = QUICK if quick else FULL
    return {f"gpu{gpu.index}": lambda: from_samples(measure(gpu, extent, progress, TRANSFERS))}


def from_profile(profile: Profile) -> dict[str, Any]:
    """Returns what a profile says of the same: a copy alone, then nine queued behind it."""
    rows, curves, models = [], {}, _models()
    sizes = sorted({GUIDE_BYTES, *models})
    for direction, memory, costs in _copies(profile):
        for size_bytes in sizes:
            single_ns = costs.alone.ns(size_bytes)
            ten_ns = single_ns + (BATCH - 1) * (costs.gap.ns + costs.queued.ns(size_bytes))
            rows.append(_row((direction, memory), size_bytes, single_ns, ten_ns, models))
        curves[WAYS[direction, memory]] = [
            (size, size / costs.alone.ns(size)) for size in _CURVE_BYTES if costs.alone.ns(size)
        ]
    allocations = []
    if profile.allocation is not None:
        for how, cost in (("raw", profile.allocation.raw), ("cached", profile.allocation.cached)):
            allocations.append(_allocation(how, GUIDE_BYTES, cost.ns, BATCH * cost.ns))
    return _report(f"{profile.device}, profile {profile.name}{_borrowed(profile)}", rows, allocations, curves)


def _borrowed(profile: Profile) -> str:
    """Return, in words, of which other devices some of the copies' costs are; nothing if there are none."""
    parts = [cost for _, _, costs in _copies(profile) for cost in (costs.alone, costs.queued, costs.gap)]
    devices = dict.fromkeys(cost.device for cost in parts if cost.device is not None)
    return f" (in part as measured on {', '.join(devices)})" if devices else ""


def _copies(profile: Profile) -> Iterator[tuple[str, str, CopyCosts]]:
    for direction, memory in WAYS:
        costs = profile.d2d if direction == "d2d" else profile.h2d.get("pinned" if memory == "pinned" else "pageable")
        if costs is not None:
            yield direction, memory, costs


def _row(
    way: tuple[str, str], size_bytes: int, single_ns: float, ten_ns: float, models: dict[int, list[str]]
) -> dict[str, Any]:
    return {
        "way": WAYS[way],
        "bytes": size_bytes,
        "models": models.get(size_bytes, []),
        "single_ms": single_ns / 1e6,
        "ten_ms": ten_ns / 1e6,
        "gb_per_s": BATCH * size_bytes / ten_ns,
    }


def _allocation(how: str, size_bytes: int, single_ns: float, ten_ns: float) -> dict[str, Any]:
    return {"how": how, "bytes": size_bytes, "single_ms": single_ns / 1e6, "ten_ms": ten_ns / 1e6}


def _models() -> dict[int, list[str]]:
    """Returns the names of the shipped models by the bytes of their experts."""
    named: dict[int, list[str]] = {}
    for model in map(load_model, preset_names()):
        named.setdefault(model.expert_bytes[0], []).append(model.name)
    return named


def _report(
    machine: str,
    rows: list[dict[str, Any]],
    allocations: list[dict[str, Any]],
    curves: dict[str, list[tuple[int, float]]],
) -> dict[str, Any]:
    published = [{"what": what, "single_ms": single, "ten_ms": ten} for what, (single, ten) in GUIDE.items()]
    return {
        "machine": machine,
        "rows": rows,
        "allocations": allocations,
        "curves_bytes_gb_per_s": {name: [list(point) for point in curve] for name, curve in curves.items()},
        "guide": {"machine": "RTX 3090, as published", "bytes": GUIDE_BYTES, "rows": published},
    }
