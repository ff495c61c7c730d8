"""Where the time of a run went on one GPU: each idle gap before a kernel belongs to its last prerequisite."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ...resources.timeline import DECOMPRESS, DENSE, EXPERT, GUESSES, HEAD, KINDS, PREDICT, SWAP
from ...workloads.batches import PulledSteps
from .parts import parts_of
from .recording import Array, Recording


def time_split(recording: Recording, run_ns: int | None = None) -> dict[str, float]:
    """Split the makespan: each idle gap before a kernel belongs to the last thing that the kernel waited for.

    compute + stall (its bytes, the CPU's results, or, inside host gaps, pageable copies that hold the host's thread) +
    host (its launch, and the GPU's own gap between launches) + predictor (its kernels on the compute stream, and
    inside host gaps its time on the host thread, or the host's wait for its guesses) + bubble (what another GPU sends)
    + drain (after its last kernel, until the run ends at `run_ns` on another GPU) = makespan. Where a scheduler makes
    the steps, the time of the host's gaps in which it had nothing to run is apart, as idle.
    """
    parts = (_host_predictions(recording), _held_host(recording), idle_spans(recording))
    within = [busy_before(part) if len(part) else None for part in parts]
    parts_ns = dict.fromkeys(("compute_ms", "stall_ms", "host_ms", "predictor_ms", "bubble_ms"), 0)
    idle_ns = 0
    for gaps in _all_gaps(recording):
        busy_ns = gaps.spans["end_ns"] - gaps.spans["start_ns"]
        predicting = gaps.spans["kind"] == PREDICT
        of_predictor, of_held, of_idle = (gaps.within_host(before) for before in within)
        parts_ns["compute_ms"] += int(busy_ns[~predicting].sum())
        parts_ns["stall_ms"] += int(gaps.ns[gaps.for_bytes].sum()) + of_held
        parts_ns["host_ms"] += int(gaps.of_host_ns.sum()) - of_predictor - of_held - of_idle
        parts_ns["predictor_ms"] += int(busy_ns[predicting].sum()) + of_predictor
        parts_ns["bubble_ms"] += int(gaps.ns[gaps.for_gpu].sum())
        idle_ns += of_idle
    parts_ns["drain_ms"] = 0 if run_ns is None else run_ns - recording.makespan_ns
    if isinstance(recording.steps, PulledSteps):
        parts_ns["idle_ms"] = idle_ns
    return {name: ns / 1e6 for name, ns in parts_ns.items()}


def idle_spans(recording: Recording) -> Array:
    """Returns when there was nothing to run, in order: spans of start_ns and end_ns."""
    idle: Array = np.array(list(recording.idle), dtype=[("start_ns", "<i8"), ("end_ns", "<i8")])
    return idle


def host_held_ns(recording: Recording) -> int:
    """Returns how much of the stall it is that pageable copies hold the host's thread, which then launches nothing."""
    held = _held_host(recording)
    if not len(held):
        return 0
    before = busy_before(held)
    return sum(gaps.within_host(before) for gaps in _all_gaps(recording))


def cpu_stall_ns(recording: Recording) -> int:
    """Returns how much of the stall is for the CPU's results."""
    return sum(
        int(gaps.ns[gaps.for_bytes & np.isin(gaps.spans["kind"], (DENSE, HEAD))].sum()) for gaps in _all_gaps(recording)
    )


def _all_gaps(recording: Recording) -> Iterator[_Gaps]:
    """Yields the gaps before the kernels of a GPU, some at a time; all at once where other GPUs send something."""
    spans, waits = recording.compute_spans, _Waits(recording)
    together = len(spans) and len(recording.decoded.arrivals)
    for part in [slice(0, len(spans))] if together else parts_of(len(spans)):
        before_ns = int(spans["end_ns"][part.start - 1]) if part.start else 0
        yield _Gaps(spans[part], before_ns, waits)


class _Waits:
    """What the kernels of a GPU may have waited for."""

    def __init__(self, recording: Recording) -> None:
        self.recording, self.lags = recording, recording.kernel_lags
        self._swapped_ns = _swapped(recording)

    def bytes_ns(self, spans: Array) -> tuple[Array, Array]:
        """Returns when what each of these spans needed was there, -1 for nothing, and which needed bytes or results."""
        recording = self.recording
        has_copy = spans["copy"] >= 0
        ready_ns = np.full(len(spans), -1, dtype=np.int64)
        ready_ns[has_copy] = recording.copy_end_ns[spans["copy"][has_copy]]
        needs_bytes = (spans["kind"] == EXPERT) | (spans["kind"] == DECOMPRESS)
        if len(recording.resolved):
            results_ns = _results_before(recording, spans)
            ready_ns, needs_bytes = np.maximum(ready_ns, results_ns), needs_bytes | (results_ns >= 0)
        if self._swapped_ns is not None:
            swapped_ns = np.where(spans["kind"] == DENSE, self._swapped_ns[spans["visit"]], -1)
            ready_ns, needs_bytes = np.maximum(ready_ns, swapped_ns), needs_bytes | (swapped_ns >= 0)
        return ready_ns, needs_bytes


class _Gaps:
    """The idle time before each of some kernels, behind one that ended at `before_ns`, and what it is put down to."""

    def __init__(self, spans: Array, before_ns: int, waits: _Waits) -> None:
        self.spans = spans
        self.ns: Array = spans["start_ns"] - np.concatenate([[before_ns], spans["end_ns"][:-1]])
        gpu_came_last = _behind_arrivals(waits.recording, spans)
        self.for_bytes = self._waiting_for_bytes(waits, gpu_came_last)
        self.for_gpu = gpu_came_last & (self.ns > 0) & ~self.for_bytes
        self.of_host_ns = self.ns * ~(self.for_bytes | self.for_gpu)

    def within_host(self, before: Callable[[Array], Array] | None) -> int:
        """Returns how much of some spans, given by their `busy_before`, lies in gaps that are the host's, in ns."""
        if before is None:
            return 0
        chosen = self.of_host_ns > 0
        until_ns = self.spans["start_ns"][chosen]
        return int((before(until_ns) - before(until_ns - self.ns[chosen])).sum())

    def _waiting_for_bytes(self, waits: _Waits, gpu_came_last: Array) -> Array:
        """Returns which spans waited, last of all, for an expert's bytes, KV blocks or the CPU's results.

        `gpu_came_last` (spans,): what another GPU sent came no earlier than that.
        """
        spans, lags = self.spans, waits.lags
        ready_ns, needs_bytes = waits.bytes_ns(spans)
        # A grouped kernel waits for copies that its span does not name: neither its launch nor the lane held it up.
        held_up = (spans["start_ns"] > spans["issued_ns"]) & (self.ns > max(lags.gap_ns, lags.gap_disturbed_ns))
        held_up &= ~gpu_came_last
        since_ns = spans["start_ns"] - ready_ns
        came_last = (since_ns == lags.after_other_ns) | (since_ns == lags.after_other_disturbed_ns)
        waiting: Array = needs_bytes & (self.ns > 0) & (held_up | came_last)
        return waiting


def _results_before(recording: Recording, spans: Array) -> Array:
    """Returns when the CPU's results were there that each span of the compute stream waited for; -1 for none.

    They are wanted by what follows the visit's experts: the next layer's dense part, or the head.
    """
    layers = len(recording.expert_bytes)
    next_layer = (spans["kind"] == DENSE) & (spans["visit"] % layers > 0)
    visits = np.where(next_layer, spans["visit"] - 1, spans["visit"])
    wanted = next_layer | (spans["kind"] == HEAD)
    results_ns: Array = np.where(wanted, recording.results_ns[visits], -1)
    return results_ns


def _swapped(recording: Recording) -> Array | None:
    """Returns when the KV blocks were there that the dense part of each visit waited for; None where none was swapped.

    They are ordered before the first visit of a step.
    """
    swaps = recording.spans[recording.spans["kind"] == SWAP]
    if not len(swaps):
        return None
    ends_ns = np.full(len(recording.decoded.visits) + 1, -1, dtype=np.int64)
    np.maximum.at(ends_ns, swaps["visit"] + 1, swaps["end_ns"])
    return ends_ns


def _behind_arrivals(recording: Recording, spans: Array) -> Array:
    """Returns which kernels started as soon as something had come from another GPU, and not as soon as launched.

    `spans` are all of the compute stream, where anything came.
    """
    arrivals, lags = recording.decoded.arrivals, recording.kernel_lags
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
