"""What one GPU of a run recorded and what it comes to: every number a function of it; docs/numbers.md has the formulas.

Rates are fractions and None where undefined. All counts are cumulative, over prefill and decode. How fast it was is
`speed`'s to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ...resources.lags import Lags
from ...resources.timeline import (
    DECOMPRESS,
    DEMAND,
    DENSE,
    EXPERT,
    GUESSES,
    HEAD,
    KINDS,
    PEER,
    PREDICT,
    PREFETCH,
    READBACK,
    covered_ns,
)  # fmt: skip
from ...workloads.batches import Step
from ...workloads.trace import RoutingTrace
from ..decide.dispatch import Visit
from ..decide.host_memory import HostMemory
from ..decide.memory_manager import DEMANDED, PREFETCHED, MemoryManager
from ..policies.miss import CPU
from ..timing.records import RESOLVED, Decoded
from .speed import Served, speed_metrics

Array = npt.NDArray[Any]

#: What an access can turn out to be, by number.
OUTCOMES = ("prefetch_hit", "cache_hit", "late", "miss")
PREFETCH_HIT, CACHE_HIT, LATE, MISS = range(len(OUTCOMES))
#: How a prefetch can end, by number.
FATES = ("useful", "late", "wasted", "unused", "cancelled")
USEFUL, ARRIVED_LATE, WASTED, UNUSED, CANCELLED = range(len(FATES))
#: Why an access missed: its expert was never used before; it would have been found without prefetching; neither.
MISS_CAUSES = ("compulsory", "pollution", "capacity")


#: Bytes of one chosen expert's number, as the choice is copied to the host: a 32-bit integer.
_CHOICE_BYTES = 4


@dataclass(frozen=True)
class Recording:
    """What one GPU of a run did, with what its metrics need besides: the manager's books, the steps and the sizes.

    `expert_bytes`, what a copy moves, and `copy_pieces`, the spans that a whole one has, are those of an expert of each
    layer (layers,). Where they differ within a layer, `moved` has both of every expert (layers * experts,).
    `copies_hold_host`: pageable copies, until whose end the host's thread does nothing else.
    Layers are those of this GPU, `device`, from 0; its first is the model's `first_layer`.
    """

    decoded: Decoded
    manager: MemoryManager
    trace: RoutingTrace
    steps: Sequence[Step]
    expert_bytes: Sequence[int]
    copy_pieces: Sequence[int]
    kernel_lags: Lags
    device: str = "gpu0"
    first_layer: int = 0
    host_memory: HostMemory | None = None
    copies_hold_host: bool = False
    moved: tuple[Sequence[int], Sequence[int]] | None = None
    _spans: Array = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_spans", self.decoded.timeline.spans())

    @property
    def spans(self) -> Array:
        """All spans, dtype SPAN."""
        return self._spans

    def forget(self) -> None:
        """Let go of all arrays that were derived, if the records lie in files; they are derived anew when asked for."""
        if isinstance(self._spans, np.memmap):
            derived = [name for name in vars(self) if isinstance(getattr(Recording, name, None), cached_property)]
            for name in derived:
                if isinstance(vars(self)[name], np.ndarray):
                    del vars(self)[name]

    @cached_property
    def compute_spans(self) -> Array:
        """The compute stream's spans in order of start."""
        return self._in_order(self._on_lanes("compute"))

    @cached_property
    def copy_spans(self) -> Array:
        """The copies of experts to this GPU, from the host or from another GPU, in order of start."""
        copied = (self._on_lanes("h2d") | (self._spans["kind"] == PEER)) & (self._spans["copy"] >= 0)
        return self._in_order(copied)

    @cached_property
    def link_spans(self) -> Array:
        """All copies from the host to the GPU in order of start, the CPU's results among them."""
        return self._in_order(self._on_lanes("h2d"))

    @cached_property
    def results_ns(self) -> Array:
        """When the CPU's results of each visit were on the GPU (visits,); -1 where it computed nothing."""
        ends_ns = np.full(len(self.decoded.visits), -1, dtype=np.int64)
        results = self.link_spans[self.link_spans["copy"] < 0]
        np.maximum.at(ends_ns, results["visit"], results["end_ns"])
        return ends_ns

    @cached_property
    def resolved(self) -> Array:
        """What a miss policy found another way for, of dtype RESOLVED."""
        resolved = self.decoded.resolved
        return np.empty(0, dtype=RESOLVED) if resolved is None else resolved

    @cached_property
    def resolved_accesses(self) -> Array:
        """Those of `resolved` that are whole accesses, and thereby misses."""
        whole: Array = self.resolved[self.resolved["whole"]]
        return whole

    def _on_lanes(self, role: str) -> Array:
        which: Array = np.isin(self._spans["lane"], self.decoded.timeline.lanes_with(role))
        return which

    def _in_order(self, which: Array) -> Array:
        spans = self._spans[which]
        if (np.diff(spans["start_ns"]) >= 0).all():  # on first-in first-out lanes they are
            return spans
        return spans[np.argsort(spans["start_ns"], kind="stable")]

    def bytes_of(self, experts: Array) -> Array:
        """Return the bytes that a whole copy of each of these experts moves, of one size within a layer."""
        sizes: Array = np.array(self.expert_bytes, dtype=np.int64)[experts // self.manager.experts]
        return sizes

    @cached_property
    def makespan_ns(self) -> int:
        """From 0 to the end of the last kernel."""
        return int(self.compute_spans["end_ns"].max(initial=0))

    @cached_property
    def copy_reason(self) -> Array:
        """Why each copy was ordered (copies,): DEMANDED, PREFETCHED or PRELOADED."""
        reason: Array = self.manager.copy_reason
        return reason

    @cached_property
    def whole_copies(self) -> tuple[Array, Array]:
        """The bytes that each copy moves, and the spans that it has, if it is made whole (copies,)."""
        which = self.copy_layer if self.moved is None else np.array(self.manager.copy_expert, dtype=np.int64)
        sizes, pieces = self.moved or (self.expert_bytes, self.copy_pieces)
        return np.array(sizes, dtype=np.int64)[which], np.array(pieces, dtype=np.int64)[which]

    @cached_property
    def copied_bytes(self) -> Array:
        """Bytes that each copy moved (copies,): all, those of the pieces that were made, or none."""
        sizes, pieces = self.whole_copies
        made = np.bincount(self.copy_spans["copy"], minlength=len(sizes))
        moved: Array = np.minimum(sizes, made * -(-sizes // pieces))
        whole = self.copy_spans["copy"][self.copy_spans["kind"] == PEER]
        moved[whole] = sizes[whole]
        return moved

    @cached_property
    def copy_end_ns(self) -> Array:
        """When each copy's bytes were all there (copies,); -1 for one that was never made, 0 for a preloaded one."""
        end_ns: Array = np.where(self.copy_reason > PREFETCHED, 0, -1).astype(np.int64)
        np.maximum.at(end_ns, self.copy_spans["copy"], self.copy_spans["end_ns"])
        return end_ns

    @cached_property
    def first_access(self) -> Array:
        """Index of the first access of each copy (copies,); -1 where there was none."""
        copies, first = np.unique(self.decoded.accesses["copy"], return_index=True)
        index = np.full(len(self.copy_reason), -1, dtype=np.int64)
        index[copies] = first
        return index

    # Of every access: first those that have a copy, in order, then those that a miss policy resolved without one.

    @cached_property
    def wait_ns(self) -> Array:
        """How long after the choice was known each access's bytes, or results, were there (accesses,), 0 if before."""
        there_ns = self.copy_end_ns[self.decoded.accesses["copy"]]
        if len(self.resolved_accesses):
            on_cpu = self.resolved_accesses["way"] == CPU
            there_ns = np.append(there_ns, np.where(on_cpu, self.results_ns[self.resolved_accesses["visit"]], 0))
        waits_ns: Array = np.maximum(0, there_ns - self.decoded.visits["choice_known_ns"][self.access_visit])
        return waits_ns

    @cached_property
    def access_visit(self) -> Array:
        """The visit of each access (accesses,)."""
        visits = self.decoded.accesses["visit"]
        return np.append(visits, self.resolved_accesses["visit"]) if len(self.resolved_accesses) else visits

    @cached_property
    def outcomes(self) -> Array:
        """What each access turned out to be (accesses,): an index into OUTCOMES."""
        copies = self.decoded.accesses["copy"]
        first = self.first_access[copies] == np.arange(len(copies))
        reason = self.copy_reason[copies]
        found = np.where(first & (reason == PREFETCHED), PREFETCH_HIT, CACHE_HIT)
        found = np.where(self.wait_ns[: len(found)] > 0, LATE, found)
        outcomes = np.where(first & (reason == DEMANDED), MISS, found)
        return np.append(outcomes, np.full(len(self.resolved_accesses), MISS)) if len(self.resolved) else outcomes

    @cached_property
    def copy_fates(self) -> Array:
        """How each prefetch ended (copies,): an index into FATES; -1 for a copy that was no prefetch."""
        used = self.first_access >= 0
        outcome = np.full(len(used), -1)
        outcome[used] = self.outcomes[self.first_access[used]]
        evicted = np.zeros(len(used), dtype=bool)
        evicted[self.manager.evicted_copies] = True
        unused = np.where(self.copy_end_ns < 0, CANCELLED, np.where(evicted, WASTED, UNUSED))
        fate = np.where(used, np.where(outcome == LATE, ARRIVED_LATE, USEFUL), unused)
        return np.where(self.copy_reason == PREFETCHED, fate, -1)

    @cached_property
    def copy_layer(self) -> Array:
        """The layer of each copy's expert (copies,); where layers share experts, of its first use or of who asked."""
        layers: Array = np.array(self.manager.copy_expert, dtype=np.int64) // self.manager.experts
        if self.manager.shared and len(self.decoded.accesses):
            asked = np.zeros(len(layers), dtype=np.int64)
            asked[self.copy_spans["copy"]] = self.copy_spans["visit"]
            used = self.decoded.accesses["visit"][self.first_access]
            layers = np.where(self.first_access >= 0, used, asked) % len(self.expert_bytes)
        return layers

    @cached_property
    def access_layer(self) -> Array:
        """The layer of each access (accesses,)."""
        layers: Array = self.access_visit % len(self.expert_bytes)
        return layers

    @cached_property
    def access_expert(self) -> Array:
        """The expert of each access (accesses,)."""
        experts: Array = np.array(self.manager.copy_expert, dtype=np.int64)[self.decoded.accesses["copy"]]
        return np.append(experts, self.resolved_accesses["expert"]) if len(self.resolved_accesses) else experts

    @cached_property
    def step_end_ns(self) -> Array:
        """When each step's head had ended (steps,)."""
        ends: Array = self.compute_spans["end_ns"][self.compute_spans["kind"] == HEAD]
        return ends


def metrics(recording: Recording, shadow_misses: Array | None = None) -> dict[str, Any]:
    """Return the metrics of a run on one GPU, without a warmup; `merge.run_metrics` has all others.

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
    """Return what one GPU did in a run whose last kernel on any GPU ends at `run_ns`, as plain data for JSON.

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
        "misses": (causes := _count(miss_causes(recording, shadow_misses), MISS_CAUSES)),
        "pollution": causes["pollution"],
        "bytes": _bytes(recording),
        "by_layer": by_layer(recording, shadow_misses),
        "time": (time := time_split(recording, run_ns)),
        "stall_ms": time["stall_ms"],
        "host_held_ms": host_held_ns(recording) / 1e6,
        "overlap": overlap(recording),
        "link_utilization": link_utilization(recording, run_ns),
        "memory_utilization": memory_utilization(recording, run_ns),
        "layer_visits": len(recording.decoded.visits),
        "tiers": tiers(recording),
    }


@dataclass(frozen=True)
class AccessSums:
    """What rates of accesses are made of: how many there were, hit and came late, and what all and late ones waited.

    `missed_alone` is what the same cache without prefetch misses; None where nothing is prefetched.
    """

    accesses: int
    hits: int
    late: int
    waited_ns: int
    late_ns: int
    missed_alone: int | None


def accesses_from(recording: Recording, shadow_misses: Array | None, first_step: int = 0) -> AccessSums:
    """Return the sums over one GPU's accesses from a step on; `shadow_misses` as `gpu_metrics` takes them."""
    layers = len(recording.expert_bytes)
    outcomes, waits_ns = recording.outcomes, recording.wait_ns
    if first_step:
        there = recording.access_visit >= first_step * layers
        outcomes, waits_ns = outcomes[there], waits_ns[there]
    missed = None
    if shadow_misses is not None:
        first_key = first_step * layers * recording.manager.experts * layers
        missed = int(np.count_nonzero(shadow_misses >= first_key))
    late = outcomes == LATE
    return AccessSums(
        len(outcomes),
        int(np.count_nonzero(outcomes <= CACHE_HIT)),
        int(np.count_nonzero(late)),
        int(waits_ns.sum()),
        int(waits_ns[late].sum()),
        missed,
    )


#: The names of what `access_rates` returns.
ACCESS_RATES = ("hit_rate", "hit_rate_without_prefetch", "late_rate", "late_wait_ms", "access_latency_ms")


def access_rates(each: Sequence[AccessSums]) -> dict[str, float | None]:
    """Return the rates and mean waits of all GPUs' accesses together, by ACCESS_RATES."""
    accesses, late = sum(gpu.accesses for gpu in each), sum(gpu.late for gpu in each)
    alone = [gpu.missed_alone for gpu in each if gpu.missed_alone is not None]
    values = (
        ratio(sum(gpu.hits for gpu in each), accesses),
        ratio(accesses - sum(alone), accesses) if alone else None,
        ratio(late, accesses),
        ratio(sum(gpu.late_ns for gpu in each) / 1e6, late),
        ratio(sum(gpu.waited_ns for gpu in each) / 1e6, accesses),
    )
    return dict(zip(ACCESS_RATES, values, strict=True))


def time_split(recording: Recording, run_ns: int | None = None) -> dict[str, float]:
    """Split the makespan: each idle gap before a kernel belongs to the last thing that the kernel waited for.

    compute + stall (its bytes, the CPU's results, or, inside host gaps, pageable copies that hold the host's thread) +
    host (its launch, and the GPU's own gap between launches) + predictor (its kernels on the compute stream, and
    inside host gaps its time on the host thread, or the host's wait for its guesses) + bubble (what another GPU sends)
    + drain (after its last kernel, until the run ends at `run_ns` on another GPU) = makespan.
    """
    spans, gaps = recording.compute_spans, _Gaps(recording)
    busy_ns = spans["end_ns"] - spans["start_ns"]
    predicting = spans["kind"] == PREDICT
    on_host, held = gaps.within_host(_host_predictions(recording)), gaps.within_host(_held_host(recording))
    parts_ns = {
        "compute_ms": int(busy_ns[~predicting].sum()),
        "stall_ms": int(gaps.ns[gaps.for_bytes].sum()) + held,
        "host_ms": int(gaps.of_host_ns.sum()) - on_host - held,
        "predictor_ms": int(busy_ns[predicting].sum()) + on_host,
        "bubble_ms": int(gaps.ns[gaps.for_gpu].sum()),
        "drain_ms": 0 if run_ns is None else run_ns - recording.makespan_ns,
    }
    return {name: ns / 1e6 for name, ns in parts_ns.items()}


def host_held_ns(recording: Recording) -> int:
    """Return how much of the stall it is that pageable copies hold the host's thread, which then launches nothing."""
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
        """Return how much of these spans (in order, not overlapping) lies in gaps that are the host's, in ns."""
        if not len(busy):
            return 0
        chosen = self.of_host_ns > 0
        until_ns, before = self._start_ns[chosen], busy_before(busy)
        return int((before(until_ns) - before(until_ns - self.ns[chosen])).sum())


def _gaps_ns(recording: Recording) -> Array:
    """Return how long the compute stream was idle before each of its spans."""
    ends_ns = recording.compute_spans["end_ns"]
    gaps_ns: Array = recording.compute_spans["start_ns"] - (
        np.concatenate([[0], ends_ns[:-1]]) if len(ends_ns) else ends_ns
    )
    return gaps_ns


def _waiting_for_bytes(recording: Recording, gpu_came_last: Array) -> Array:
    """Return which spans of the compute stream waited, last of all, for an expert's bytes or the CPU's results.

    `gpu_came_last` (spans,): what another GPU sent came no earlier than that.
    """
    spans, gap_ns = recording.compute_spans, _gaps_ns(recording)
    has_copy = spans["copy"] >= 0
    ready_ns = np.full(len(spans), -1, dtype=np.int64)
    ready_ns[has_copy] = recording.copy_end_ns[spans["copy"][has_copy]]
    needs_bytes = np.isin(spans["kind"], (EXPERT, DECOMPRESS))
    if len(recording.resolved):
        results_ns = _results_before(recording)
        ready_ns, needs_bytes = np.maximum(ready_ns, results_ns), needs_bytes | (results_ns >= 0)
    # A grouped kernel waits for copies that its span does not name: neither its launch nor the lane held it up.
    lags = recording.kernel_lags
    held_up = (spans["start_ns"] > spans["issued_ns"]) & (gap_ns > max(lags.gap_ns, lags.gap_disturbed_ns))
    held_up &= ~gpu_came_last
    came_last = np.isin(spans["start_ns"] - ready_ns, (lags.after_other_ns, lags.after_other_disturbed_ns))
    waiting: Array = needs_bytes & (gap_ns > 0) & (held_up | came_last)
    return waiting


def _results_before(recording: Recording) -> Array:
    """Return when the CPU's results were there that each span of the compute stream waited for; -1 for none.

    They are wanted by what follows the visit's experts: the next layer's dense part, or the head.
    """
    spans, layers = recording.compute_spans, len(recording.expert_bytes)
    next_layer = (spans["kind"] == DENSE) & (spans["visit"] % layers > 0)
    visits = np.where(next_layer, spans["visit"] - 1, spans["visit"])
    wanted = next_layer | (spans["kind"] == HEAD)
    results_ns: Array = np.where(wanted, recording.results_ns[visits], -1)
    return results_ns


def cpu_stall_ns(recording: Recording) -> int:
    """Return how much of the stall is for the CPU's results."""
    waiting = _waiting_for_bytes(recording, _behind_arrivals(recording))
    waiting &= np.isin(recording.compute_spans["kind"], (DENSE, HEAD))
    return int(_gaps_ns(recording)[waiting].sum())


def _behind_arrivals(recording: Recording) -> Array:
    """Return which kernels started as soon as something had come from another GPU, and not as soon as launched."""
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
    """Return one number for the visit and the kind of each span or arrival."""
    numbers: Array = of["visit"].astype(np.int64) * len(KINDS) + of["kind"]
    return numbers


def _host_predictions(recording: Recording) -> Array:
    """Return the spans of the host thread's predicting or, where the GPU predicts, of its waiting for guesses."""
    spans = recording.spans
    lanes = recording.decoded.timeline.lanes_with("host")
    predictions: Array = spans[np.isin(spans["lane"], lanes) & (spans["kind"] == PREDICT)]
    if not len(predictions):
        predictions = spans[spans["kind"] == GUESSES]
        predictions["start_ns"] = predictions["issued_ns"]  # the host has waited since it asked
    return predictions


def _held_host(recording: Recording) -> Array:
    """Return the intervals in which a copy held the host's thread, from its order to the end of its last piece."""
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
    """Return a function: how many ns of these spans (in order, not overlapping) lie before each instant."""
    start_ns, end_ns = spans["start_ns"], spans["end_ns"]
    before_ns = np.concatenate([[0], np.cumsum(end_ns - start_ns)])

    def busy(at_ns: Array) -> Array:
        ended = np.searchsorted(end_ns, at_ns, side="right")
        running = np.minimum(ended, len(start_ns) - 1)
        part_ns = np.where(ended < len(start_ns), np.maximum(0, at_ns - start_ns[running]), 0)
        total_ns: Array = before_ns[ended] + part_ns
        return total_ns

    return busy


def overlap(recording: Recording) -> float | None:
    """Return the share of copy time under which the compute stream was busy; None without copies."""
    return ratio(*overlapped_ns(recording))


def overlapped_ns(recording: Recording) -> tuple[int, int]:
    """Return the copy time under which the compute stream was busy, and all copy time, in ns."""
    copies = recording.copy_spans
    total_ns = int((copies["end_ns"] - copies["start_ns"]).sum())
    if not len(recording.compute_spans):
        return 0, 0
    busy = busy_before(recording.compute_spans)
    return int((busy(copies["end_ns"]) - busy(copies["start_ns"])).sum()), total_ns


def link_utilization(recording: Recording, run_ns: int | None = None) -> float | None:
    """Return the share of the makespan (`run_ns`; None: this GPU's) during which the link to the GPU carries a copy.

    Two streams share the link: what several copies cover counts once. What is copied after the end does not count.
    """
    copies = recording.link_spans
    run_ns = recording.makespan_ns if run_ns is None else run_ns
    return ratio(covered_ns(*(np.minimum(copies[side], run_ns) for side in ("start_ns", "end_ns"))), run_ns)


def tiers(recording: Recording) -> dict[str, Any] | None:
    """Return what copies to the GPU found in host memory and what was read; None where it holds every expert.

    A hit is a copy whose expert was in host memory, or on its way there; a staged read is a prefetch into host memory
    alone. Utilization is the share of the makespan that the lanes were busy, on average; what is read after the end
    does not count.
    """
    host = recording.host_memory
    if host is None:
        return None
    spans = recording.spans
    lanes = recording.decoded.timeline.lanes_with("nvme")
    reads = spans[np.isin(spans["lane"], lanes)]
    busy_ns = int((reads["end_ns"] - reads["start_ns"]).sum())
    within = {side: np.minimum(reads[side], recording.makespan_ns) for side in ("start_ns", "end_ns")}
    within_ns = int((within["end_ns"] - within["start_ns"]).sum())
    return {
        "host_budget_bytes": host.manager.budget_bytes,
        "host_hits": host.hits,
        "host_misses": host.misses,
        "host_hit_rate": ratio(host.hits, host.hits + host.misses),
        "host_evict": host.manager.evicted,
        "staged_reads": host.staged_reads,
        "read_bytes": host.read_bytes,
        "read_requests": len(reads),
        "io_lanes": len(lanes),
        "read_busy_ms": busy_ns / 1e6,
        "read_utilization": ratio(within_ns, recording.makespan_ns * len(lanes)),
    }


def memory_steps(recording: Recording) -> tuple[Array, Array, Array]:
    """Return (time_ns, assigned_bytes, budget_bytes) of the expert memory, from each visit's dispatch to the next."""
    visits = recording.decoded.visits
    return visits["choice_known_ns"], visits["assigned_bytes"], visits["budget_bytes"]


def memory_utilization(recording: Recording, run_ns: int | None = None) -> float | None:
    """Return assigned bytes / expert budget, weighted by time over the makespan (`run_ns`; None: this GPU's)."""
    time_ns, assigned_bytes, budget_bytes = memory_steps(recording)
    run_ns = recording.makespan_ns if run_ns is None else run_ns
    if not run_ns:
        return None
    until_ns = np.minimum(np.concatenate([time_ns[1:], [run_ns]]), run_ns)
    share = assigned_bytes / budget_bytes
    # Not a dot product, which BLAS adds up in an order that depends on how many threads it has.
    return float((np.maximum(0, until_ns - time_ns) * share).sum() / run_ns)


def miss_causes(recording: Recording, shadow_misses: Array | None) -> Array:
    """Return why each access missed (accesses,): an index into MISS_CAUSES; -1 for one that did not.

    Compulsory and capacity as in Hill & Smith (1989), "Evaluating associativity in CPU caches"; pollution is the
    prefetcher's doing: the same cache without it, in a shadow run, had the expert.
    """
    in_order = np.argsort(recording.access_visit, kind="stable")
    _, first = np.unique(recording.access_expert[in_order], return_index=True)
    compulsory = np.zeros(len(recording.access_expert), dtype=bool)
    compulsory[in_order[first]] = True
    polluted = np.zeros(len(compulsory), dtype=bool)
    if shadow_misses is not None:
        polluted = ~np.isin(_access_keys(recording), shadow_misses)
    cause = np.where(compulsory, 0, np.where(polluted, 1, 2))
    return np.where(recording.outcomes == MISS, cause, -1)


def miss_keys(visits: Iterable[Visit], total_experts: int) -> Array:
    """Return one integer per miss of dispatched visits: visit * experts of the model + expert."""
    return np.array(
        [visit.number * total_experts + expert for visit in visits for expert in visit.missed()],
        dtype=np.int64,
    )


def _access_keys(recording: Recording) -> Array:
    total = recording.manager.experts * len(recording.expert_bytes)
    keys: Array = recording.access_visit.astype(np.int64) * total + recording.access_expert
    return keys


def by_layer(recording: Recording, shadow_misses: Array | None) -> list[dict[str, int]]:
    """Return, layer by layer, the outcomes of accesses, the causes of misses, the fates of prefetches and the bytes."""
    layers = len(recording.expert_bytes)
    columns: dict[str, Array] = {}

    def tally(names: Sequence[str], what: Array, layer: Array, weight: Array | None = None) -> None:
        for number, name in enumerate(names):
            chosen = what == number
            weights = None if weight is None else weight[chosen]
            columns[name] = np.bincount(layer[chosen], weights=weights, minlength=layers)

    tally(OUTCOMES, recording.outcomes, recording.access_layer)
    tally([f"{cause}_miss" for cause in MISS_CAUSES], miss_causes(recording, shadow_misses), recording.access_layer)
    tally([f"prefetch_{fate}" for fate in FATES], recording.copy_fates, recording.copy_layer)
    tally(["demand_bytes", "prefetch_bytes"], recording.copy_reason, recording.copy_layer, recording.copied_bytes)
    return [
        {"layer": layer, **{name: int(column[layer]) for name, column in columns.items()}} for layer in range(layers)
    ]


def span_bytes(recording: Recording) -> Array:
    """Return the bytes that each span moved (spans,); 0 for what moves none. The last piece of a copy has the rest."""
    spans = recording.spans
    moved = np.zeros(len(spans), dtype=np.int64)
    copies = np.flatnonzero(np.isin(spans["kind"], (DEMAND, PREFETCH)) & (spans["copy"] >= 0))
    copies = copies[np.lexsort((spans["start_ns"][copies], spans["copy"][copies]))]
    numbers = spans["copy"][copies]
    sizes, pieces = (of_each[numbers] for of_each in recording.whole_copies)
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
    """Return the bytes of the copies that were saved by asking once for all guesses of a visit."""
    sizes, layer_of = (
        (recording.expert_bytes, recording.manager.experts) if recording.moved is None else (recording.moved[0], 1)
    )
    return sum(sizes[expert // layer_of] * copies for expert, copies in recording.manager.saved_copies.items())


def _count(numbers: Array, names: Sequence[str]) -> dict[str, int]:
    counts = np.bincount(numbers[numbers >= 0], minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=True))


def _bytes(recording: Recording) -> dict[str, int]:
    moved, reason = recording.copied_bytes, recording.copy_reason
    unused = recording.first_access < 0
    return {
        "demand": int(moved[reason == DEMANDED].sum()),
        "prefetch": int(moved[reason == PREFETCHED].sum()),
        "prefetch_not_used": int(moved[(reason == PREFETCHED) & unused].sum()),
    }


def ratio(part: float, whole: float) -> float | None:
    """Return part / whole; None of nothing."""
    return part / whole if whole else None
