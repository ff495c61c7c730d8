"""The recordings of a run's GPUs as one: metrics, the timeline, the memory. A run on one GPU passes through unchanged.

Counts and bytes add up; the makespan is the end of the last kernel on any GPU; rates are computed anew. A recording
numbers layers, visits, experts and copies for itself; here they become the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...resources.links import Links
from ...resources.network import Carried, link_loads
from ...resources.timeline import DEMAND, DENSE, HEAD, PREFETCH, READ, LaneName, Timeline
from . import metrics
from .accesses import ACCESS_RATES, access_rates, accesses_from
from .metrics import gpu_metrics, overlapped_ns, span_bytes
from .recording import Recording, ratio
from .speed import Served, Serving, speed_metrics

Array = npt.NDArray[Any]


def run_metrics(
    recordings: Sequence[Recording],
    shadow_misses: Sequence[Array | None],
    serving: Serving | None = None,
) -> dict[str, Any]:
    """Returns the metrics of a run as plain data for JSON, with what each GPU did under `gpus`.

    `shadow_misses` are those of each GPU, as `metrics.gpu_metrics` takes them. Of several GPUs, `time`, its `stall_ms`
    with `host_held_ms` and `link_utilization` are means, so that the parts still add up to the makespan, and
    `memory_utilization` is that of all their budgets together. Behind a warmup (see `serving`) are speed and the rates
    of accesses; `cold` has those of the whole run.
    """
    serving = serving or Serving()
    run_ns, warm = makespan_ns(recordings), serving.warmup_steps
    each = [
        gpu_metrics(recording, run_ns, misses, warm)
        for recording, misses in zip(one_by_one(recordings), shadow_misses, strict=True)
    ]
    merged = each[0] if len(each) == 1 else _merged(recordings, each, apart=serving.order is not None)
    if len(each) > 1:
        merged.update(_access_rates(recordings, shadow_misses, warm))
    gpus = [_gpu_entry(recording, data) for recording, data in zip(recordings, each, strict=True)]
    data = {"makespan_ms": run_ns / 1e6, **step_metrics(recordings, serving), **merged, "gpus": gpus}
    if data["cold"] is not None:
        data["cold"].update(_access_rates(recordings, shadow_misses, 0))
    return data


def _access_rates(
    recordings: Sequence[Recording], shadow_misses: Sequence[Array | None], first_step: int
) -> dict[str, float | None]:
    """Returns the rates of all GPUs' accesses from a step on."""
    return access_rates(
        [
            accesses_from(recording, misses, first_step)
            for recording, misses in zip(one_by_one(recordings), shadow_misses, strict=True)
        ]
    )


def one_by_one(recordings: Iterable[Recording]) -> Iterator[Recording]:
    """Yields recordings; what lies in files is brought into memory for one of them at a time."""
    for recording in recordings:
        yield recording
        recording.forget()


def makespan_ns(recordings: Iterable[Recording]) -> int:
    """Returns the end of the last kernel on any GPU."""
    return max(recording.makespan_ns for recording in one_by_one(recordings))


def step_metrics(recordings: Sequence[Recording], serving: Serving | None = None) -> dict[str, Any]:
    """Returns speed as `speed.speed_metrics` does."""
    serving = serving or Serving()
    return speed_metrics(served(recordings, serving), serving.warmup_steps)


def served(recordings: Sequence[Recording], serving: Serving) -> Served:
    """Returns the steps of a run in time: each has ended once its heads have, on whichever GPUs they run."""
    first, order = recordings[0], serving.order
    if order is not None:
        times = [_step_times_ns([recording], None) for recording in recordings]
        end_ns, took_ns = (np.concatenate(each)[order] for each in zip(*times, strict=True))
        all_steps = [step for recording in recordings for step in recording.steps]
        steps = [all_steps[place] for place in order.tolist()]
        return Served(steps, first.trace.sequence, end_ns, took_ns, makespan_ns(recordings), serving.log)
    end_ns, took_ns = _step_times_ns(recordings, serving.previous)
    return Served(first.steps, first.trace.sequence, end_ns, took_ns, makespan_ns(recordings), serving.log)


def _step_times_ns(recordings: Sequence[Recording], previous: Sequence[int] | None) -> tuple[Array, Array]:
    """Returns when each step ended and what it took, both (steps,)."""
    end_ns = np.zeros(len(recordings[0].steps), dtype=np.int64)
    for recording in one_by_one(recordings):  # a GPU may have no tokens in a step
        heads = recording.compute_spans[recording.compute_spans["kind"] == HEAD]
        np.maximum.at(end_ns, heads["visit"] // len(recording.expert_bytes), heads["end_ns"])
    if previous is None:
        return end_ns, np.diff(end_ns, prepend=0)
    before = np.asarray(previous, dtype=np.int64)
    return end_ns, end_ns - np.where(before >= 0, end_ns[before], _step_start_ns(recordings[0]))


def merged_timeline(recordings: Sequence[Recording]) -> Timeline:
    """Returns all spans on one timeline, those of each GPU in turn; lanes of the same name become one.

    Numbers become those of the model, and of the run.
    """
    if len(recordings) == 1:
        return recordings[0].decoded.timeline
    layers = _layers(recordings)
    timeline = Timeline()
    numbers: dict[LaneName, int] = {}
    copies = 0
    for recording in recordings:
        spans = recording.spans.copy()
        lanes = recording.decoded.timeline.lanes
        for lane in lanes:
            if lane not in numbers:
                numbers[lane] = timeline.add_lane(lane.device, lane.role, lane.title)
        spans["lane"] = np.array([numbers[lane] for lane in lanes], dtype=np.uint16)[spans["lane"]]
        own = len(recording.expert_bytes)
        step, layer = np.divmod(spans["visit"], own)
        spans["visit"] = np.where(spans["visit"] < 0, -1, step * layers + recording.first_layer + layer)
        if not recording.manager.shared:
            first = recording.first_layer * recording.manager.experts
            spans["expert"] = np.where(spans["expert"] < 0, -1, spans["expert"] + first)
        own_copies = (spans["copy"] >= 0) & (spans["kind"] != READ)  # reads are numbered for all GPUs
        spans["copy"] = np.where(own_copies, spans["copy"] + copies, spans["copy"])
        copies += len(recording.manager.copy_expert)
        timeline.extend(spans.tobytes())
    return timeline


def memory_steps(recordings: Sequence[Recording]) -> tuple[Array, Array, Array]:
    """Returns (time_ns, assigned_bytes, budget_bytes) of the expert memory of all GPUs together, in order of time."""
    each = [metrics.memory_steps(recording) for recording in recordings]
    if len(each) == 1:
        return each[0]
    at_ns = np.unique(np.concatenate([time_ns for time_ns, _, _ in each]))
    assigned, budget = np.zeros(len(at_ns), dtype=np.int64), np.zeros(len(at_ns), dtype=np.int64)
    for time_ns, assigned_bytes, budget_bytes in each:
        if len(time_ns):
            place = np.searchsorted(time_ns, at_ns, side="right") - 1  # -1: before this GPU's first visit
            assigned += np.where(place < 0, 0, assigned_bytes[place])
            budget += budget_bytes[np.maximum(place, 0)]
    return at_ns, assigned, budget


def link_usage(recordings: Sequence[Recording], links: Links, sent: Iterable[Carried]) -> list[dict[str, Any]]:
    """Returns what each link of the machine carried, as `network.link_loads` does.

    That is the copies from the host, and what GPUs have `sent` each other; read-backs, of a few bytes, are left out.
    """
    fetched = []
    for route, recording in zip(links.host_routes, one_by_one(recordings), strict=True):
        copies = np.isin(recording.spans["kind"], (DEMAND, PREFETCH))
        times = recording.spans[copies]
        fetched.append(Carried(route, span_bytes(recording)[copies], times["start_ns"].copy(), times["end_ns"].copy()))
    return link_loads([*fetched, *sent], links.topology, makespan_ns(recordings))


def budget_bytes(recording: Recording) -> int:
    """Returns the most expert memory that a GPU has in a run."""
    return int(recording.decoded.visits["budget_bytes"].max(initial=0))


def _step_start_ns(recording: Recording) -> Array:
    """Returns when the first kernel of each step started (steps,)."""
    spans = recording.compute_spans
    first = (spans["kind"] == DENSE) & (spans["visit"] % len(recording.expert_bytes) == 0)
    starts: Array = spans["start_ns"][first]
    return starts


def _layers(recordings: Iterable[Recording]) -> int:
    """Returns the layers of the model that these GPUs hold together."""
    return max(recording.first_layer + len(recording.expert_bytes) for recording in recordings)


def _gpu_entry(recording: Recording, data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the result says of one GPU."""
    first = recording.first_layer
    last = first + len(recording.expert_bytes) - 1
    names = ("accesses", "hit_rate", "counts", "bytes", "time", "stall_ms", "host_held_ms", "overlap")
    return {
        "device": recording.device,
        "layers": f"{first}-{last}" if last > first else str(first),
        **{name: data[name] for name in names},
        "link_utilization": data["link_utilization"],
        "memory_utilization": data["memory_utilization"],
        "budget_bytes": budget_bytes(recording),
    }


def _merged(recordings: Sequence[Recording], each: Sequence[dict[str, Any]], *, apart: bool) -> dict[str, Any]:
    """Returns the metrics of several GPUs as those of one, in the same order; `_access_rates` has the rates.

    `apart`: they are replicas, each with layer visits of its own; else GPUs that hold the same layers visit them
    together.
    """
    visits = {number if apart else r.first_layer: len(r.decoded.visits) for number, r in enumerate(recordings)}
    causes = _sums(data["misses"] for data in each)
    time = {part: ms / len(each) for part, ms in _sums(data["time"] for data in each).items()}
    return {
        "accesses": sum(data["accesses"] for data in each),
        **dict.fromkeys(ACCESS_RATES),
        "counts": _sums(data["counts"] for data in each),
        "prefetch": _sums(data["prefetch"] for data in each),
        "misses": causes,
        "pollution": causes["pollution"],
        "bytes": _sums(data["bytes"] for data in each),
        "by_layer": _by_layer(recordings, each),
        "time": time,
        "stall_ms": time["stall_ms"],
        "host_held_ms": sum(data["host_held_ms"] for data in each) / len(each),
        "overlap": ratio(*map(sum, zip(*map(overlapped_ns, one_by_one(recordings)), strict=True))),
        "link_utilization": _mean(each, "link_utilization", lambda _: 1),
        "memory_utilization": _mean(each, "memory_utilization", lambda at: budget_bytes(recordings[at])),
        "layer_visits": sum(visits.values()),
        "tiers": metrics.tiers(recordings),
    }


def _sums(dicts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the sum of each number over dicts of the same keys."""
    total: dict[str, Any] = {}
    for numbers in dicts:
        for name, number in numbers.items():
            total[name] = total.get(name, 0) + number
    return total


def _by_layer(recordings: Sequence[Recording], each: Sequence[dict[str, Any]]) -> list[dict[str, int]]:
    """Returns what happened at each of the model's layers, on all GPUs that hold it."""
    rows: dict[int, list[dict[str, int]]] = {}
    for recording, data in zip(recordings, each, strict=True):
        for row in data["by_layer"]:
            rows.setdefault(recording.first_layer + row["layer"], []).append(row)
    return [{**_sums(rows[layer]), "layer": layer} for layer in sorted(rows)]


def _mean(each: Sequence[dict[str, Any]], name: str, weight: Callable[[int], int]) -> float | None:
    """Returns the mean of a figure over the GPUs that have it, weighted; None if none has."""
    known = [(data[name], weight(at)) for at, data in enumerate(each) if data[name] is not None]
    return ratio(sum(value * share for value, share in known), sum(share for _, share in known))
