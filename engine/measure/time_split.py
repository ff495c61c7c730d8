"""Where the time of a run went on one GPU: each idle gap before a kernel belongs to its last prerequisite."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...resources.timeline import DECOMPRESS, DENSE, EXPERT, GUESSES, HEAD, KINDS, PREDICT, SWAP
from ...workloads.batches import PulledSteps
from .recording import Array, Recording


def time_split(recording: Recording, run_ns: int | None = None) -> dict[str, float]:
    """Split the makespan: each idle gap before a kernel belongs to the last thing that the kernel waited for.

    compute + stall (its bytes, the CPU's results, or, inside host gaps, pageable copies that hold the host's thread) +
    host (its launch, and the GPU's own gap between launches) + predictor (its kernels on the compute stream, and
    inside host gaps its time on the host thread, or the host's wait for its guesses) + bubble (what another GPU sends)
    + drain (after its last kernel, until the run ends at `run_ns` on another GPU) = makespan. Where a scheduler makes
    the steps, the time of the host's gaps in which it had nothing to run is apart, as idle.
    """
    spans, gaps = recording.compute_spans, _Gaps(recording)
    busy_ns = spans["end_ns"] - spans["start_ns"]
    predicting = spans["kind"] == PREDICT
    on_host, held = gaps.within_host(_host_predictions(recording)), gaps.within_host(_held_host(recording))
    idle = gaps.within_host(idle_spans(recording))
    parts_ns = {
        "compute_ms": int(busy_ns[~predicting].sum()),
        "stall_ms": int(gaps.ns[gaps.for_bytes].sum()) + held,
        "host_ms": int(gaps.of_host_ns.sum()) - on_host - held - idle,
        "predictor_ms": int(busy_ns[predicting].sum()) + on_host,
        "bubble_ms": int(gaps.ns[gaps.for_gpu].sum()),
        "drain_ms": 0 if run_ns is None else run_ns - recording.makespan_ns,
    }
    if isinstance(recording.steps, PulledSteps):
        parts_ns["idle_ms"] = idle
    return {name: ns / 1e6 for name, ns in parts_ns.items()}


def idle_spans(recording: Recording) -> Array:
    """Returns when there was nothing to run, in order: spans of start_ns and end_ns."""
    idle: Array = np.array(list(recording.idle), dtype=[("start_ns", "<i8"), ("end_ns", "<i8")])
    return idle


def host_held_ns(recording: Recording) -> int:
    """Returns how much of the stall it is that pageable copies hold the host's thread, which then launches nothing."""
    held = _held_host(recording)
    return _Gaps(recording).within_host(held) if len(held) else 0


class _Gaps:
    """The idle time before each kernel of a GPU, and what it is put down to."""

    def __init__(self, recording: Recording) -> None:
        self._start_ns = recording.compute_spans["start_ns"]
        self.ns = _gaps_ns(recording)
        gpu_came_last = _behind_arrivals(recording)
        self.for_bytes = _waiting_for_bytes(recording, gpu_came_last)
        self.for_gpu = gpu_came_last & (self.ns > 0) & ~self.for_bytes
        self.of_host_ns = self.ns * ~(self.for_bytes | self.for_gpu)

    def within_host(self, busy: Array) -> int:
        """Returns how much of these spans (in order, not overlapping) lies in gaps that are the host's, in ns."""
        if not len(busy):
            return 0
        chosen = self.of_host_ns > 0
        until_ns, before = self._start_ns[chosen], busy_before(busy)
        return int((before(until_ns) - before(until_ns - self.ns[chosen])).sum())


def _gaps_ns(recording: Recording) -> Array:
    """Returns how long the compute stream was idle before each of its spans."""
    ends_ns = recording.compute_spans["end_ns"]
    gaps_ns: Array = recording.compute_spans["start_ns"] - (
        np.concatenate([[0], ends_ns[:-1]]) if len(ends_ns) else ends_ns
    )
    return gaps_ns


def _waiting_for_bytes(recording: Recording, gpu_came_last: Array) -> Array:
    """Returns which spans of the compute stream waited, last of all, for an expert's bytes or the CPU's results.

    `gpu_came_last` (spans,): what another GPU sent came no earlier than that.
    """
    spans, gap_ns = recording.compute_spans, _gaps_ns(recording)
    has_copy = spans["copy"] >= 0
    ready_ns = np.full(len(spans), -1, dtype=np.int64)
    ready_ns[has_copy] = recording.copy_end_ns[spans["copy"][has_copy]]
    needs_bytes = (spans["kind"] == EXPERT) | (spans["kind"] == DECOMPRESS)
    if len(recording.resolved):
        results_ns = _results_before(recording)
        ready_ns, needs_bytes = np.maximum(ready_ns, results_ns), needs_bytes | (results_ns >= 0)
    swapped_ns = _swapped_before(recording)
    if swapped_ns is not None:
        ready_ns, needs_bytes = np.maximum(ready_ns, swapped_ns), needs_bytes | (swapped_ns >= 0)
    # A grouped kernel waits for copies that its span does not name: neither its launch nor the lane held it up.
    lags = recording.kernel_lags
    held_up = (spans["start_ns"] > spans["issued_ns"]) & (gap_ns > max(lags.gap_ns, lags.gap_disturbed_ns))
    held_up &= ~gpu_came_last
    since_ns = spans["start_ns"] - ready_ns
    came_last = (since_ns == lags.after_other_ns) | (since_ns == lags.after_other_disturbed_ns)
    waiting: Array = needs_bytes & (gap_ns > 0) & (held_up | came_last)
    return waiting


def _results_before(recording: Recording) -> Array:
    """Returns when the CPU's results were there that each span of the compute stream waited for; -1 for none.

    They are wanted by what follows the visit's experts: the next layer's dense part, or the head.
    """
    spans, layers = recording.compute_spans, len(recording.expert_bytes)
    next_layer = (spans["kind"] == DENSE) & (spans["visit"] % layers > 0)
    visits = np.where(next_layer, spans["visit"] - 1, spans["visit"])
    wanted = next_layer | (spans["kind"] == HEAD)
    results_ns: Array = np.where(wanted, recording.results_ns[visits], -1)
    return results_ns


def _swapped_before(recording: Recording) -> Array | None:
    """Returns when the KV blocks were there that each span of the compute stream waited for; None where none was.

    They are ordered before the first visit of a step, whose dense part waits for them.
    """
    swaps = recording.spans[recording.spans["kind"] == SWAP]
    if not len(swaps):
        return None
    ends_ns = np.full(len(recording.decoded.visits) + 1, -1, dtype=np.int64)
    np.maximum.at(ends_ns, swaps["visit"] + 1, swaps["end_ns"])
    spans = recording.compute_spans
    swapped_ns: Array = np.where(spans["kind"] == DENSE, ends_ns[spans["visit"]], -1)
    return swapped_ns


def cpu_stall_ns(recording: Recording) -> int:
    """Returns how much of the stall is for the CPU's results."""
    waiting = _waiting_for_bytes(recording, _behind_arrivals(recording))
    waiting &= np.isin(recording.compute_spans["kind"], (DENSE, HEAD))
    return int(_gaps_ns(recording)[waiting].sum())


def _behind_arrivals(recording: Recording) -> Array:
    """Returns which kernels started as soon as something had come from another GPU, and not as soon as launched."""
    spans, arrivals, lags = recording.compute_spans, recording.decoded.arrivals, recording.kernel_lags
    waits = np.zeros(len(spans), dtype=bool)
    if not len(arrivals):
        return waits
    kernels, first = np.unique(_visit_and_kind(spans), return_index=True)
    at = first[np.searchsorted(kernels, _visit_and_kind(arrivals))]
    since_ns = spans["start_ns"][at] - arrivals["arrived_ns"]
    came_last = np.isin(since_ns, (lags.after_other_ns, lags.after_other_disturbed_ns))
    waits[at] = came_last & (spans["start_ns"][at] > spans["issued_ns"][at])
    return waits


def _visit_and_kind(of: Array) -> Array:
    """Returns one number for the visit and the kind of each span or arrival."""
    numbers: Array = of["visit"].astype(np.int64) * len(KINDS) + of["kind"]
    return numbers


def _host_predictions(recording: Recording) -> Array:
    """Returns the spans of the host thread's predicting or, where the GPU predicts, of its waiting for guesses."""
    spans = recording.spans
    predictions: Array = spans[recording.decoded.timeline.on_lanes(spans, "host") & (spans["kind"] == PREDICT)]
    if not len(predictions):
        predictions = spans[spans["kind"] == GUESSES]
        predictions["start_ns"] = predictions["issued_ns"]  # the host has waited since it asked
    return predictions


def _held_host(recording: Recording) -> Array:
    """Returns the intervals in which a copy held the host's thread, from its order to the end of its last piece."""
    copies = recording.copy_spans if recording.copies_hold_host else recording.copy_spans[:0]
    held = np.empty(len(np.unique(copies["copy"])), dtype=[("start_ns", "<i8"), ("end_ns", "<i8")])
    if len(held):
        _, number = np.unique(copies["copy"], return_inverse=True)
        held["start_ns"], held["end_ns"] = np.iinfo(np.int64).max, 0
        np.minimum.at(held["start_ns"], number, copies["issued_ns"])
        np.maximum.at(held["end_ns"], number, copies["end_ns"])
        held = held[np.argsort(held["start_ns"], kind="stable")]
    return held


def busy_before(spans: Array) -> Callable[[Array], Array]:
    """Returns a function: how many ns of these spans (in order, not overlapping) lie before each instant."""
    start_ns, end_ns = spans["start_ns"], spans["end_ns"]
    before_ns = np.concatenate([[0], np.cumsum(end_ns - start_ns)])

    def busy(at_ns: Array) -> Array:
        ended = np.searchsorted(end_ns, at_ns, side="right")
        running = np.minimum(ended, len(start_ns) - 1)
        part_ns = np.where(ended < len(start_ns), np.maximum(0, at_ns - start_ns[running]), 0)
        total_ns: Array = before_ns[ended] + part_ns
        return total_ns

    return busy
