"""Metrics of a recording on one GPU: every number is a function of it; docs/numbers.md has the formulas.

Rates are fractions and None where undefined. All counts are cumulative, over prefill and decode. How fast it was is
`speed`'s to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...resources.timeline import DEMAND, PEER, PREFETCH, READBACK, covered_ns
from ..decide.memory_manager import DEMANDED, PREFETCHED
from .accesses import MISS_CAUSES, access_rates, accesses_from, miss_causes
from .parts import counted, filled, parts_of
from .recording import FATES, OUTCOMES, Array, Recording, ratio
from .speed import Served, speed_metrics
from .time_split import busy_before, host_held_ns, time_split

#: Bytes of one chosen expert's number, as the choice is copied to the host: a 32-bit integer.
_CHOICE_BYTES = 4


def metrics(recording: Recording, shadow_misses: Array | None = None) -> dict[str, Any]:
    """Returns the metrics of a run on one GPU, without a warmup; `merge.run_metrics` has all others.

    `shadow_misses` are as of `gpu_metrics`.
    """
    end_ns, run_ns = recording.step_end_ns, recording.makespan_ns
    served = Served(recording.steps, recording.trace.sequence, end_ns, np.diff(end_ns, prepend=0), run_ns)
    return {
        "makespan_ms": run_ns / 1e6,
        **speed_metrics(served),
        **gpu_metrics(recording, run_ns, shadow_misses),
    }


def gpu_metrics(
    recording: Recording, run_ns: int, shadow_misses: Array | None = None, first_step: int = 0
) -> dict[str, Any]:
    """Returns what one GPU did in a run whose last kernel on any GPU ends at `run_ns`, as plain data for JSON.

    `shadow_misses` are the `miss_keys` of the same cache without prefetch; None if the run has no prefetch. Rates and
    waits of accesses (ACCESS_RATES) are from `first_step` on, all else is of the whole run.
    """
    counts = _count(recording.outcomes, OUTCOMES)
    prefetched = recording.copy_reason == PREFETCHED
    manager = recording.manager
    return {
        "accesses": sum(counts.values()),
        **access_rates([accesses_from(recording, shadow_misses, first_step)]),
        "counts": {
            **counts,
            "prefetch": int(prefetched.sum()),
            "dropped": manager.dropped,
            "evict": manager.evicted,
        },
        "prefetch": _count(recording.copy_fates, FATES),
        "misses": (causes := _count(why := miss_causes(recording, shadow_misses), MISS_CAUSES)),
        "pollution": causes["pollution"],
        "bytes": _bytes(recording),
        "by_layer": by_layer(recording, why),
        "time": (time := time_split(recording, run_ns)),
        "stall_ms": time["stall_ms"],
        "host_held_ms": host_held_ns(recording) / 1e6,
        "overlap": overlap(recording),
        "link_utilization": link_utilization(recording, run_ns),
        "memory_utilization": memory_utilization(recording, run_ns),
        "layer_visits": len(recording.decoded.visits),
        "tiers": tiers([recording]),
    }


def overlap(recording: Recording) -> float | None:
    """Returns the share of copy time under which the compute stream was busy; None without copies."""
    return ratio(*overlapped_ns(recording))


def overlapped_ns(recording: Recording) -> tuple[int, int]:
    """Returns the copy time under which the compute stream was busy, and all copy time, in ns."""
    copies = recording.copy_spans
    total_ns = int((copies["end_ns"] - copies["start_ns"]).sum())
    spans, busy_ns = recording.compute_spans, 0
    if not len(spans):
        return 0, 0
    for part in parts_of(len(spans)) if total_ns else ():
        busy = busy_before(spans[part])
        busy_ns += int((busy(copies["end_ns"]) - busy(copies["start_ns"])).sum())
    return busy_ns, total_ns


def link_utilization(recording: Recording, run_ns: int | None = None) -> float | None:
    """Returns the share of the makespan (`run_ns`; None: this GPU's) during which the link to the GPU carries a copy.

    Two streams share the link: what several copies cover counts once. What is copied after the end does not count.
    """
    copies = recording.link_spans
    run_ns = recording.makespan_ns if run_ns is None else run_ns
    return ratio(covered_ns(*(np.minimum(copies[side], run_ns) for side in ("start_ns", "end_ns"))), run_ns)


def tiers(recordings: Sequence[Recording]) -> dict[str, Any] | None:
    """Returns what the run's copies to the GPUs found in host memory and what was read; None where it has every expert.

    An expert that the CPU computes counts as one that is copied. A hit is a copy whose expert was in host memory, or on
    its way there; a staged read is a prefetch into host memory alone; what is demoted comes back from the GPU.
    Evicted is who leaves host memory for whatever reason: where it is exclusive, what is copied to the GPU, too.
    Utilization is the share of the makespan that the lanes were busy, on average; what is read after the end does not
    count.
    """
    hosts = list({id(one.host_memory): one.host_memory for one in recordings if one.host_memory is not None}.values())
    run_ns = max(recording.makespan_ns for recording in recordings)
    if not hosts:
        return None
    lanes = len(hosts) * len(recordings[0].decoded.timeline.lanes_with("nvme"))
    hits, misses = (sum(getattr(host, name) for host in hosts) for name in ("hits", "misses"))
    requests = busy_ns = within_ns = 0
    for recording in recordings:
        reads = recording.spans[recording.decoded.timeline.on_lanes(recording.spans, "nvme")]
        requests += len(reads)
        busy_ns += int((reads["end_ns"] - reads["start_ns"]).sum())
        within = {side: np.minimum(reads[side], run_ns) for side in ("start_ns", "end_ns")}
        within_ns += int((within["end_ns"] - within["start_ns"]).sum())
    return {
        "host_budget_bytes": sum(host.manager.budget_bytes for host in hosts),
        "host_hits": hits,
        "host_misses": misses,
        "host_hit_rate": ratio(hits, hits + misses),
        "host_evict": sum(host.manager.evicted for host in hosts),
        "staged_reads": sum(host.staged_reads for host in hosts),
        "demoted": sum(len(host.demoted) for host in hosts),
        "demoted_bytes": sum(host.demoted_bytes for host in hosts),
        "read_bytes": sum(host.read_bytes for host in hosts),
        "read_requests": requests,
        "io_lanes": lanes,
        "read_busy_ms": busy_ns / 1e6,
        "read_utilization": ratio(within_ns, run_ns * lanes),
    }


def memory_steps(recording: Recording) -> tuple[Array, Array, Array]:
    """Returns (time_ns, assigned_bytes, budget_bytes) of the expert memory, from each visit's dispatch to the next."""
    visits = recording.decoded.visits
    return visits["choice_known_ns"], visits["assigned_bytes"], visits["budget_bytes"]


def memory_utilization(recording: Recording, run_ns: int | None = None) -> float | None:
    """Returns assigned bytes / expert budget, weighted by time over the makespan (`run_ns`; None: this GPU's)."""
    time_ns, assigned_bytes, budget_bytes = memory_steps(recording)
    run_ns = recording.makespan_ns if run_ns is None else run_ns
    if not run_ns:
        return None

    def of(part: slice) -> Array:
        ends_ns = time_ns[part.start + 1 : part.stop + 1]
        until_ns = np.minimum(ends_ns if part.stop < len(time_ns) else np.append(ends_ns, run_ns), run_ns)
        weighted: Array = np.maximum(0, until_ns - time_ns[part]) * (assigned_bytes[part] / budget_bytes[part])
        return weighted

    # Not a dot product, which BLAS adds up in an order that depends on how many threads it has.
    return float(filled(recording.spans, len(time_ns), np.float64, of).sum() / run_ns)


def by_layer(recording: Recording, causes: Array) -> list[dict[str, int]]:
    """Return, layer by layer, the outcomes of accesses, the causes of misses, the fates of prefetches and the bytes.

    `causes` are those of each access's miss, as `miss_causes` returns them.
    """
    layers = len(recording.expert_bytes)
    columns: dict[str, Array] = {}

    def tally(names: Sequence[str], what: Array, layer: Array, weight: Array | None = None) -> None:
        sums = np.zeros(len(names) * layers, dtype=np.int64)
        for part in parts_of(len(what)):
            chosen = (what[part] >= 0) & (what[part] < len(names))
            cells = what[part][chosen].astype(np.int64) * layers + layer[part][chosen]
            weights = None if weight is None else weight[part][chosen]
            sums += np.bincount(cells, weights=weights, minlength=len(sums)).astype(np.int64)
        columns.update(zip(names, sums.reshape(len(names), layers), strict=True))

    tally(OUTCOMES, recording.outcomes, recording.access_layer)
    tally([f"{cause}_miss" for cause in MISS_CAUSES], causes, recording.access_layer)
    tally([f"prefetch_{fate}" for fate in FATES], recording.copy_fates, recording.copy_layer)
    tally(["demand_bytes", "prefetch_bytes"], recording.copy_reason, recording.copy_layer, recording.copied_bytes)
    return [
        {"layer": layer, **{name: int(column[layer]) for name, column in columns.items()}} for layer in range(layers)
    ]


def span_bytes(recording: Recording) -> Array:
    """Returns the bytes that each span moved (spans,); 0 for what moves none. The last piece of a copy has the rest."""
    spans = recording.spans
    moved = np.zeros(len(spans), dtype=np.int64)
    copies = np.flatnonzero(np.isin(spans["kind"], (DEMAND, PREFETCH)) & (spans["copy"] >= 0))
    sizes, pieces = recording.whole_copies
    if pieces.max(initial=1) == 1:
        moved[copies] = sizes[spans["copy"][copies]]
    else:
        copies = copies[np.lexsort((spans["start_ns"][copies], spans["copy"][copies]))]
        numbers = spans["copy"][copies]
        sizes, pieces = sizes[numbers], pieces[numbers]
        piece = np.arange(len(copies)) - np.searchsorted(numbers, numbers)
        piece_bytes = -(-sizes // pieces)
        moved[copies] = np.minimum(piece_bytes, sizes - piece * piece_bytes)
    between = spans["kind"] == PEER
    moved[between] = recording.bytes_of(spans["expert"][between])
    readbacks = spans["kind"] == READBACK
    tokens = np.array([len(step.rows) for step in recording.steps], dtype=np.int64)
    step = spans["visit"][readbacks] // len(recording.expert_bytes)
    moved[readbacks] = tokens[step] * recording.trace.k * _CHOICE_BYTES
    return moved


def saved_bytes(recording: Recording) -> int:
    """Returns the bytes of the copies that were saved by asking once for all guesses of a visit."""
    sizes, layer_of = (
        (recording.expert_bytes, recording.manager.experts) if recording.moved is None else (recording.moved[0], 1)
    )
    return sum(sizes[expert // layer_of] * copies for expert, copies in recording.manager.saved_copies.items())


def _count(numbers: Array, names: Sequence[str]) -> dict[str, int]:
    counts = counted((numbers[part] for part in parts_of(len(numbers))), len(names)).tolist()
    return dict(zip(names, counts, strict=True))


def _bytes(recording: Recording) -> dict[str, int]:
    moved, reason, first = recording.copied_bytes, recording.copy_reason, recording.first_access
    sums = np.zeros(3, dtype=np.int64)
    for part in parts_of(len(moved)):
        prefetched = reason[part] == PREFETCHED
        for number, which in enumerate((reason[part] == DEMANDED, prefetched, prefetched & (first[part] < 0))):
            sums[number] += moved[part][which].sum()
    return dict(zip(("demand", "prefetch", "prefetch_not_used"), sums.tolist(), strict=True))
