"""What each piece of one run takes, in ns: the machine's profile applied to a model's shapes.

Measured points are used as they stand. A shape or a number of tokens that was not measured is estimated by the
profile's rule, and every estimate in use is named in `estimates`, which goes into the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..resources.profile import ExpertPoint, Profile, ProfileError, TransferCost
from ..workloads.model import Model
from .scenario import Scenario


@dataclass(frozen=True, slots=True)
class KernelCost:
    """One launch group: its duration on a quiet GPU, the factor beside a copy, and how many launches it takes."""

    ns: int
    slowdown: float
    launches: int


@dataclass(frozen=True, slots=True)
class CopyCost:
    """One expert's copy, in `pieces` equal pieces: its duration queued and on an idle engine, whole and by piece."""

    queued_ns: int
    alone_ns: int
    piece_queued_ns: int
    piece_alone_ns: int
    pieces: int


class Costs:
    """The costs of one run; every method is a table look-up after the first call."""

    def __init__(self, model: Model, profile: Profile, scenario: Scenario) -> None:
        self._model = model
        self._rule = profile.compute.rule
        self._mode = scenario.dispatch.mode
        self._chunk_bytes = scenario.copy_.chunk_bytes
        # By layer and tokens; the head stands behind the dense part of the last layer.
        self._experts: list[dict[int, KernelCost]] = [{} for _ in range(model.layers)]
        self._dense: list[dict[int, KernelCost]] = [{} for _ in range(model.layers + 1)]
        self.estimates: dict[str, str] = {}
        memory = scenario.copy_.host_memory or ("pinned" if "pinned" in profile.h2d else "pageable")
        if memory not in profile.h2d:
            known = ", ".join(profile.h2d)
            raise ProfileError(f"copy.host_memory = {memory!r}: profile {profile.name} has {known} only")
        h2d = profile.h2d[memory]
        self.copies_hold_host = memory == "pageable"
        self.copy_gap_ns = h2d.gap.ns
        self.copies = [self._copy(h2d.alone, h2d.queued, size) for size in model.expert_bytes]
        self.readback_ns = profile.d2h.alone.ns(0)
        self.predict_ns = round(scenario.predictor.latency_us * 1000)
        free = self._mode == "free"
        graph = self._mode == "graph"
        self.kernel_gap_ns = 0 if free else (profile.compute.graph_gap if graph else profile.compute.eager_gap).ns
        self.launch_ns = 0 if free else (profile.host.graph_launch if graph else profile.host.launch).ns
        self.enqueue_ns = 0 if free else profile.host.copy_enqueue.ns
        self.synchronize_ns = 0 if free else profile.host.synchronize.ns
        self._point_mode: Literal["eager", "graph"] = "eager" if self._mode == "eager" else "graph"
        self._points = {(p.hidden, p.expert_ff, p.dtype, p.dispatch, p.tokens): p for p in profile.compute.experts}

    def _copy(self, alone: TransferCost, queued: TransferCost, size_bytes: int) -> CopyCost:
        pieces = -(-size_bytes // self._chunk_bytes) if self._chunk_bytes else 1
        piece_bytes = -(-size_bytes // pieces)
        queued_ns, alone_ns = queued.ns(piece_bytes), alone.ns(piece_bytes)
        rest_ns = (pieces - 1) * (queued_ns + self.copy_gap_ns)
        return CopyCost(queued_ns + rest_ns, alone_ns + rest_ns, queued_ns, alone_ns, pieces)

    def dense(self, layer: int, tokens: int) -> KernelCost:
        """Return the dense part of one layer over `tokens` tokens."""
        cost = self._dense[layer].get(tokens)
        if cost is None:
            model = self._model
            cost = self._by_rule("dense part", model.dense_bytes[layer], tokens, model.dense_kernels)
            self._dense[layer][tokens] = cost
        return cost

    def head(self, tokens: int) -> KernelCost:
        """Return the head over `tokens` tokens."""
        cost = self._dense[-1].get(tokens)
        if cost is None:
            cost = self._dense[-1][tokens] = self._by_rule("head", self._model.head_bytes, tokens, 1)
        return cost

    def expert(self, layer: int, tokens: int) -> KernelCost:
        """Return one expert's kernels over `tokens` tokens."""
        cost = self._experts[layer].get(tokens)
        if cost is None:
            cost = self._experts[layer][tokens] = self._expert(layer, tokens)
        return cost

    def most_launches(self, tokens: int) -> int:
        """Return the most launches of one layer visit with so many tokens, the head and a prediction included."""
        model = self._model
        experts = min(model.experts, tokens * model.top_k)
        return self._launches(model.dense_kernels) + experts * self._launches(model.expert_kernels) + 2

    def _expert(self, layer: int, tokens: int) -> KernelCost:
        model = self._model
        launches = self._launches(model.expert_kernels)
        point = self._point(tokens)
        if point is not None:
            return KernelCost(point.ns, point.beside_copy_ns / point.ns, launches)
        rule = self._by_rule("expert", model.expert_bytes[layer], tokens, model.expert_kernels)
        one = self._point(1)
        if one is None:
            return rule
        # Measured at one token only: keep the measurement and add what the rule says more tokens cost.
        more_ns = rule.ns - self._by_rule("expert", model.expert_bytes[layer], 1, model.expert_kernels).ns
        return KernelCost(one.ns + more_ns, one.beside_copy_ns / one.ns, launches)

    def grouped(self, layer: int, tokens: list[int]) -> KernelCost:
        """Return one grouped kernel over several experts: their sum, with the rule's constant paid once."""
        costs = [self.expert(layer, count) for count in tokens]
        ns = sum(cost.ns for cost in costs) - (len(costs) - 1) * self._rule.constant_ns
        ns = max(ns, max(cost.ns for cost in costs))
        self.estimates["grouped expert kernel"] = "the experts' sum, the rule's constant paid once"
        return KernelCost(ns, max(cost.slowdown for cost in costs), costs[0].launches)

    @property
    def slowed_beside_copies(self) -> bool:
        """Whether this machine's kernels take longer beside a copy."""
        return self._rule.beside_copy_factor > 1 or any(p.beside_copy_ns > p.ns for p in self._points.values())

    def _point(self, tokens: int) -> ExpertPoint | None:
        model = self._model
        return self._points.get((model.hidden, model.expert_ff, model.expert_dtype, self._point_mode, tokens))

    def _by_rule(self, what: str, weight_bytes: int, tokens: int, kernels: int) -> KernelCost:
        rule = self._rule
        dtype_bits = self._model.dtype_bits("expert" if what == "expert" else "dense")
        flops = 2 * tokens * (weight_bytes * 8 / dtype_bits)
        moved_ns = weight_bytes * 1e9 / rule.bytes_per_second
        part_ns = max(moved_ns, flops * 1e9 / rule.flops_per_second)
        ns = rule.constant_ns + round(part_ns)
        beside_ns = rule.constant_ns + part_ns * rule.beside_copy_factor
        self.estimates[what] = (
            f"{rule.constant_ns} ns + max(weight bytes / {rule.bytes_per_second} B/s, "
            f"2 x weights x tokens / {rule.flops_per_second} FLOP/s) ({rule.source})"
        )
        return KernelCost(ns, beside_ns / ns if ns else 1.0, self._launches(kernels))

    def _launches(self, kernels: int) -> int:
        return kernels if self._mode == "eager" else 1
