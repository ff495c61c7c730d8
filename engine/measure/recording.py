"""What one GPU of a run recorded: spans, decisions and bytes, and what became of every access and every copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from .parts import ascending, chosen, filled, parts_of, room

Array = npt.NDArray[Any]
#: What an access can turn out to be, by number.
OUTCOMES = ("prefetch_hit", "cache_hit", "late", "miss")
PREFETCH_HIT, CACHE_HIT, LATE, MISS = range(len(OUTCOMES))

#: How a prefetch can end, by number.
FATES = ("useful", "late", "wasted", "unused", "cancelled")
USEFUL, ARRIVED_LATE, WASTED, UNUSED, CANCELLED = range(len(FATES))


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
        return self._in_order(lambda spans: self._on_lanes(spans, "compute"))

    @cached_property
    def copy_spans(self) -> Array:
        """The copies of experts to this GPU, from the host or from another GPU, in order of start."""
        return self._in_order(
            lambda spans: (self._on_lanes(spans, "h2d") | (spans["kind"] == PEER)) & (spans["copy"] >= 0)
        )

    @cached_property
    def link_spans(self) -> Array:
        """All copies from the host to the GPU in order of start, the CPU's results among them."""
        return self._in_order(lambda spans: self._on_lanes(spans, "h2d"))

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

    def _on_lanes(self, spans: Array, role: str) -> Array:
        return self.decoded.timeline.on_lanes(spans, role)

    def _in_order(self, which: Callable[[Array], Array]) -> Array:
        """Returns the spans that are chosen, `which` (spans,) bool of some of them, in order of start."""
        spans = chosen(self.spans, lambda part: which(self.spans[part]))
        if ascending(spans["start_ns"]):  # on first-in first-out lanes they are
            return spans
        return spans.take(np.argsort(spans["start_ns"], kind="stable"))

    def _filled(self, count: int, dtype: npt.DTypeLike, of: Callable[[slice], Any]) -> Array:
        return filled(self.spans, count, dtype, of)

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
        which = self.copy_layer if self.moved is None else self.manager.copy_expert

        def of(each: Sequence[int]) -> Array:
            of_each = np.array(each, dtype=np.int64)
            return self._filled(len(which), np.int64, lambda part: of_each[which[part]])

        sizes, pieces = self.moved or (self.expert_bytes, self.copy_pieces)
        return of(sizes), of(pieces)

    @cached_property
    def copied_bytes(self) -> Array:
        """Bytes that each copy moved (copies,): all, those of the pieces that were made, or none."""
        (sizes, pieces), copies = self.whole_copies, self.copy_spans
        moved = self._filled(len(sizes), np.int64, lambda part: 0)
        for part in parts_of(len(copies)):
            np.add.at(moved, copies["copy"][part], 1)
        for part in parts_of(len(sizes)):
            moved[part] = np.minimum(sizes[part], moved[part] * -(-sizes[part] // pieces[part]))
        whole = copies["copy"][copies["kind"] == PEER]
        moved[whole] = sizes[whole]
        return moved

    @cached_property
    def copy_end_ns(self) -> Array:
        """When each copy's bytes were all there (copies,); -1 for one that was never made, 0 for a preloaded one."""
        reason, copies = self.copy_reason, self.copy_spans
        end_ns = self._filled(len(reason), np.int64, lambda part: np.where(reason[part] > PREFETCHED, 0, -1))
        for part in parts_of(len(copies)):
            end_ns[copies["copy"][part]] = copies["end_ns"][part]  # the last piece stays, which is written last
        return end_ns

    @cached_property
    def first_access(self) -> Array:
        """Index of the first access of each copy (copies,); -1 where there was none."""
        copies = self.decoded.accesses["copy"]
        index = self._filled(len(self.copy_reason), np.int64, lambda part: -1)
        for part in reversed(list(parts_of(len(copies)))):
            index[copies[part][::-1]] = np.arange(part.start, part.stop)[::-1]  # the one that is written last stays
        return index

    # Of every access: first those that have a copy, in order, then those that a miss policy resolved without one.

    def _by_access(self, dtype: npt.DTypeLike, of: Callable[[slice, Array], Any], resolved: Any) -> Array:
        """Returns a number for each access: `of` a slice of those with a copy, and their copies; then `resolved`."""
        accesses = self.decoded.accesses
        made = room(self.spans, len(accesses) + len(self.resolved_accesses), dtype)
        for part in parts_of(len(accesses)):
            made[part] = of(part, accesses["copy"][part])
        made[len(accesses) :] = resolved
        return made

    @cached_property
    def wait_ns(self) -> Array:
        """How long after the choice was known each access's bytes, or results, were there (accesses,), 0 if before."""
        known_ns, visits = self.decoded.visits["choice_known_ns"], self.decoded.accesses["visit"]
        end_ns, behind, behind_ns = self.copy_end_ns, self.resolved_accesses, 0
        if len(behind):
            there_ns = np.where(np.isin(behind["way"], BY_CPU), self.results_ns[behind["visit"]], 0)
            behind_ns = np.maximum(0, there_ns - known_ns[behind["visit"]])
        return self._by_access(
            np.int64, lambda part, copies: np.maximum(0, end_ns[copies] - known_ns[visits[part]]), behind_ns
        )

    @cached_property
    def access_visit(self) -> Array:
        """The visit of each access (accesses,)."""
        visits = self.decoded.accesses["visit"]
        if not len(self.resolved_accesses):
            return visits
        return self._by_access(np.int32, lambda part, _: visits[part], self.resolved_accesses["visit"])

    @cached_property
    def outcomes(self) -> Array:
        """What each access turned out to be (accesses,): an index into OUTCOMES."""
        first_access, reasons, waits_ns = self.first_access, self.copy_reason, self.wait_ns

        def of(part: slice, copies: Array) -> Array:
            first = first_access[copies] == np.arange(part.start, part.stop)
            reason = reasons[copies]
            outcomes = np.full(len(copies), CACHE_HIT, dtype=np.int8)
            outcomes[first & (reason == PREFETCHED)] = PREFETCH_HIT
            outcomes[waits_ns[part] > 0] = LATE
            outcomes[first & (reason == DEMANDED)] = MISS
            return outcomes

        return self._by_access(np.int8, of, MISS)

    @cached_property
    def copy_fates(self) -> Array:
        """How each prefetch ended (copies,): an index into FATES; -1 for a copy that was no prefetch."""
        first_access, reasons, end_ns, outcomes = self.first_access, self.copy_reason, self.copy_end_ns, self.outcomes
        evicted = np.zeros(len(first_access), dtype=bool)
        evicted[self.manager.evicted_copies] = True

        def of(part: slice) -> Array:
            first = first_access[part]
            outcome = np.where(first >= 0, outcomes[np.maximum(first, 0)], -1) if len(outcomes) else first
            unused = np.where(end_ns[part] < 0, CANCELLED, np.where(evicted[part], WASTED, UNUSED))
            fate = np.where(first >= 0, np.where(outcome == LATE, ARRIVED_LATE, USEFUL), unused)
            return np.where(reasons[part] == PREFETCHED, fate, -1)

        return self._filled(len(first_access), np.int64, of)

    @cached_property
    def copy_layer(self) -> Array:
        """The layer of each copy's expert (copies,); where layers share experts, of its first use or of who asked."""
        experts = self.manager.copy_expert
        layers = self._filled(len(experts), np.int64, lambda part: experts[part] // self.manager.experts)
        if self.manager.shared and len(self.decoded.accesses):
            asked = np.zeros(len(layers), dtype=np.int64)
            asked[self.copy_spans["copy"]] = self.copy_spans["visit"]
            used = self.decoded.accesses["visit"][self.first_access]
            layers = np.where(self.first_access >= 0, used, asked) % len(self.expert_bytes)
        return layers

    @cached_property
    def access_layer(self) -> Array:
        """The layer of each access (accesses,)."""
        visits, layers = self.access_visit, len(self.expert_bytes)
        return self._filled(len(visits), visits.dtype, lambda part: visits[part] % layers)

    @cached_property
    def access_expert(self) -> Array:
        """The expert of each access (accesses,)."""
        experts = self.manager.copy_expert
        behind = self.resolved_accesses["expert"]
        return self._by_access(np.int64, lambda _, copies: experts[copies], behind)

    @cached_property
    def step_end_ns(self) -> Array:
        """When each step's head had ended (steps,)."""
        ends: Array = self.compute_spans["end_ns"][self.compute_spans["kind"] == HEAD]
        return ends


def ratio(part: float, whole: float) -> float | None:
    """Returns part / whole; None of nothing."""
    return part / whole if whole else None
