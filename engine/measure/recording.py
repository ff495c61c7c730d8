"""What one GPU of a run recorded: spans, decisions and bytes, and what became of every access and every copy."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...resources.lags import Lags
from ...resources.timeline import HEAD, PEER, SWAP
from ...workloads.batches import Step
from ...workloads.trace import RoutingTrace
from ..decide.host_memory import HostMemory
from ..decide.memory_manager import DEMANDED, PREFETCHED, MemoryManager
from ..policies.miss import BY_CPU
from ..timing.records import RESOLVED, Decoded

Array = npt.NDArray[Any]
#: What an access can turn out to be, by number.
OUTCOMES = ("prefetch_hit", "cache_hit", "late", "miss")
PREFETCH_HIT, CACHE_HIT, LATE, MISS = range(len(OUTCOMES))

#: How a prefetch can end, by number.
FATES = ("useful", "late", "wasted", "unused", "cancelled")
USEFUL, ARRIVED_LATE, WASTED, UNUSED, CANCELLED = range(len(FATES))
#: Spans that are looked at together where there are very many: some tens of MB.
AT_ONCE = 1 << 20


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
    #: When the host had nothing to do, in ns (from, until), where a scheduler makes the steps.
    idle: Sequence[tuple[int, int]] = ()

    @cached_property
    def spans(self) -> Array:
        """All spans, dtype SPAN, in order."""
        return self.decoded.timeline.spans()

    def forget(self) -> None:
        """Let go of all arrays that were derived, if the records lie in files; they are derived anew when asked for."""
        if isinstance(vars(self).get("spans"), np.memmap):
            derived = [name for name in vars(self) if isinstance(getattr(Recording, name, None), cached_property)]
            for name in derived:
                if name != "spans" and isinstance(vars(self)[name], np.ndarray):
                    del vars(self)[name]

    @cached_property
    def compute_spans(self) -> Array:
        """The compute stream's spans in order of start."""
        return self._in_order(self._on_lanes("compute"))

    @cached_property
    def copy_spans(self) -> Array:
        """The copies of experts to this GPU, from the host or from another GPU, in order of start."""
        copied = (self._on_lanes("h2d") | (self.spans["kind"] == PEER)) & (self.spans["copy"] >= 0)
        return self._in_order(copied)

    @cached_property
    def link_spans(self) -> Array:
        """All copies from the host to the GPU in order of start, the CPU's results among them."""
        return self._in_order(self._on_lanes("h2d"))

    @cached_property
    def results_ns(self) -> Array:
        """When the CPU's results of each visit were on the GPU (visits,); -1 where it computed nothing."""
        ends_ns = np.full(len(self.decoded.visits), -1, dtype=np.int64)
        results = self.link_spans[(self.link_spans["copy"] < 0) & (self.link_spans["kind"] != SWAP)]
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
        return self.decoded.timeline.on_lanes(self.spans, role)

    def _in_order(self, which: Array) -> Array:
        spans = self._chosen(which)
        if (np.diff(spans["start_ns"]) >= 0).all():  # on first-in first-out lanes they are
            return spans
        return spans.take(np.argsort(spans["start_ns"], kind="stable"))

    def _chosen(self, which: Array) -> Array:
        """Returns the spans that are chosen; of very many that lie in a file, in one without a name beside it."""
        spans, count = self.spans, int(np.count_nonzero(which))
        if not isinstance(spans, np.memmap) or count <= AT_ONCE:
            return spans.take(np.flatnonzero(which))
        with tempfile.TemporaryFile(dir=Path(str(spans.filename)).parent) as file:
            for first in range(0, len(spans), AT_ONCE):
                part = slice(first, first + AT_ONCE)
                file.write(spans[part][which[part]].tobytes())
            file.flush()
            return np.memmap(file, dtype=spans.dtype, mode="r+", shape=(count,))

    def bytes_of(self, experts: Array) -> Array:
        """Returns the bytes that a whole copy of each of these experts moves, of one size within a layer."""
        sizes: Array = np.array(self.expert_bytes, dtype=np.int64)[experts // self.manager.experts]
        return sizes

    @cached_property
    def makespan_ns(self) -> int:
        """From 0 to the end of the last kernel."""
        return self.decoded.timeline.last_end_ns("compute")

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
        end_ns[self.copy_spans["copy"]] = self.copy_spans["end_ns"]  # the last piece stays, which is written last
        return end_ns

    @cached_property
    def first_access(self) -> Array:
        """Index of the first access of each copy (copies,); -1 where there was none."""
        copies = self.decoded.accesses["copy"]
        index = np.full(len(self.copy_reason), -1, dtype=np.int64)
        index[copies[::-1]] = np.arange(len(copies))[::-1]  # the one that is written last stays
        return index

    # Of every access: first those that have a copy, in order, then those that a miss policy resolved without one.

    @cached_property
    def wait_ns(self) -> Array:
        """How long after the choice was known each access's bytes, or results, were there (accesses,), 0 if before."""
        there_ns = self.copy_end_ns[self.decoded.accesses["copy"]]
        if len(self.resolved_accesses):
            on_cpu = np.isin(self.resolved_accesses["way"], BY_CPU)
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
        outcomes = np.full(len(copies), CACHE_HIT, dtype=np.int8)
        outcomes[first & (reason == PREFETCHED)] = PREFETCH_HIT
        outcomes[self.wait_ns[: len(copies)] > 0] = LATE
        outcomes[first & (reason == DEMANDED)] = MISS
        more = len(self.resolved_accesses) if len(self.resolved) else 0
        return np.append(outcomes, np.full(more, MISS, dtype=np.int8))

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


def ratio(part: float, whole: float) -> float | None:
    """Returns part / whole; None of nothing."""
    return part / whole if whole else None
