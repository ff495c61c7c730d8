"""One GPU where absent experts need not come, or come in fewer bytes: it waits for other things than copies.

The CPU computes an expert, low precision stands in for it, or it is skipped; compressed experts are decompressed. It is
`Gpu` with a lane for the CPU. What becomes of each access was decided in dispatch; here it takes its time.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any

import numpy as np
import simpy

from ..resources.lane import Completion, CoupledLane, FifoLane, Lags, Pending, PriorityLane, couple, later
from ..resources.timeline import ACTIVATION, CPU_EXPERT, DECOMPRESS, DENSE, EXPERT, HEAD
from .costs.costs import Costs, KernelCost
from .costs.offload_costs import CpuCosts, ShrunkCosts
from .decide.dispatch import Visit
from .decide.memory_manager import Admission, MemoryManager
from .gpu import RESOLVED, Decoded, Gpu, Lane, pack_resolved
from .policies.miss import CPU, LOW_PRECISION, MISS, Resolved
from .scenario.scenario import Scenario
from .scenario.sections_memory import shrunk


class OffloadedGpu(Gpu):
    """A `Gpu` whose misses are not all fetched, or whose experts are in fewer bytes."""

    def __init__(
        self, env: simpy.Environment, manager: MemoryManager, costs: Costs, scenario: Scenario, **options: Any
    ) -> None:
        super().__init__(env, manager, costs, scenario, **options)
        self._resolved = bytearray()  # records of dtype RESOLVED
        self._results: Completion = 0  # the end of what the next kernel but an expert needs of the CPU
        self._shrunk = ShrunkCosts(costs, scenario)
        self._low_ratio = scenario.miss.low_ratio
        compression = scenario.compression
        self._packed_at = compression.where
        self._unpacks_aside = compression.lane == "side"
        if compression.where != "none" and self._unpacks_aside:
            device = self.timeline.lanes[self._compute.number].device
            number = self.timeline.add_lane(device, "side", "decompression (side stream)")
            self._unpacking = FifoLane(self.timeline, number)
        self._packed: set[int] = set()  # copies that came compressed and have not been used
        self._unpacking_of: dict[int, Pending] = {}  # by copy, in a priority queue
        self._mixed = compression.mixed is not None
        self._tokens_of: dict[int, int] = {}  # of the visit being served
        if self._mixed:
            by_size = {size: costs.copy(size) for size in set(manager.size_of)}
            self._copy_costs = [by_size[size] for size in manager.size_of]
            self._experts = 1  # there is a copy cost for each expert
        if uses_cpu(scenario):
            self._add_cpu()

    def _add_cpu(self) -> None:
        """Make the lane of the CPU, which shares the host's memory with the copies, and a stream for its results.

        On the copies' own stream a result would wait for copies that wait for the kernels behind it.
        """
        costs, timeline, contention = self.costs, self.timeline, self._scenario.copy_.contention
        self._cpu_costs = CpuCosts(costs, self._scenario)
        self._cpu = CoupledLane(
            self.env,
            timeline,
            timeline.add_lane("host", "cpu", "CPU experts"),
            Lags(after_other_ns=costs.synchronize_ns),
        )
        device = timeline.lanes[self._h2d.number].device
        number = timeline.add_lane(device, "h2d", "copy engine H2D, results of the CPU")
        lags = replace(costs.copy_lags, after_other_ns=costs.copy_lags.after_other_ns + costs.enqueue_ns)
        self._back = CoupledLane(self.env, timeline, number, lags)
        copies = [lane for lane in dict.fromkeys((self._h2d, self._prefetch_lane)) if isinstance(lane, CoupledLane)]
        others = [lane for lane in (self._compute, self._d2h) if isinstance(lane, CoupledLane)]
        for lane in copies:
            (lane.turns if costs.copies_take_turns else lane.sharing).append(self._back)
        (self._back.turns if costs.copies_take_turns else self._back.sharing).extend(copies)
        self._back.disturbers, self._back.sharing_factor = copies[0].disturbers, costs.copies_sharing
        copies.append(self._back)
        for lane in others:
            lane.disturbers = copies
        if contention:
            self._cpu.disturbers = copies
            for lane in copies:
                lane.slowed_by.append((self._cpu, self._cpu_costs.copy_slowdown))
        couple([*copies, *others, self._cpu])

    def _couples_copies(self) -> bool:
        return uses_cpu(self._scenario)

    def recorded(self) -> Decoded:
        """Return what was recorded, and what was resolved without a copy."""
        decoded = super().recorded()
        resolved = np.frombuffer(memoryview(self._resolved).toreadonly(), dtype=RESOLVED)
        return replace(decoded, resolved=resolved)

    def launch(
        self, cost: KernelCost, kind: int, after: Completion = 0, expert: int = -1, copy: int = -1
    ) -> Completion:
        """Launch kernels, behind the CPU's results or the decompression that they need."""
        if kind == EXPERT and copy >= 0:
            after = self._unpacked(expert, copy, after)
            if self._mixed:
                layer, size_bytes = expert // self._manager.experts, self._manager.size_of[expert]
                cost = self._shrunk.expert(layer, self._tokens_of[expert], size_bytes, self._phase)
        elif kind in (DENSE, HEAD) and self._results:
            self.now_ns += self._wait_ns
            after, self._results = later(after, self._results), 0
        return super().launch(cost, kind, after, expert, copy)

    def serve(self, visit: Visit, chosen: Completion) -> Generator[simpy.Event, Any, Completion]:
        """Hand what the CPU computes to it, launch what low precision stands in for, then serve as any GPU does."""
        if visit.resolution.accesses:
            yield from self._resolve(visit, chosen)
        if self._mixed:
            self._tokens_of = dict(zip(visit.accesses.experts, visit.accesses.tokens, strict=True))
        return (yield from super().serve(visit, chosen))

    def _resolve(self, visit: Visit, chosen: Completion) -> Generator[simpy.Event, Any, None]:
        to_cpu: list[Resolved] = []
        for access in visit.resolution.accesses:
            self._resolved += pack_resolved(
                visit.number, access.expert, access.way, access.tokens, access.gate, access.whole
            )
            if access.way == CPU:
                to_cpu.append(access)
            elif access.way == LOW_PRECISION:
                size_bytes = shrunk(self.costs.model.expert_bytes[visit.layer], self._low_ratio)
                cost = self._shrunk.expert(visit.layer, access.tokens, size_bytes, self._phase)
                if self.watch_queue:
                    yield from self.wait_for_queue(cost.launches)
                self.launch(cost, EXPERT, 0, access.expert)
        if to_cpu:
            self._compute_on_cpu(visit, to_cpu, chosen)

    # Experts on the CPU.

    def _compute_on_cpu(self, visit: Visit, accesses: list[Resolved], chosen: Completion) -> None:
        """Send the tokens' activations to the host, compute one expert after another there, and bring back the sum."""
        costs = self._cpu_costs
        self.now_ns += self.costs.enqueue_ns + self.costs.records_ns
        ns = costs.activations_ns(visit.resolution.cpu_tokens)
        there = self._d2h.submit(ns, ns, self.now_ns, chosen, ACTIVATION, -1, visit.number)
        for access in accesses:
            cost = costs.expert(visit.layer, access.tokens)
            computed = self._cpu.submit(
                cost.ns, cost.ns, self.now_ns, there, CPU_EXPERT, access.expert, visit.number, -1, cost.slowdown
            )
        ns, slowdown = costs.results_ns(visit.resolution.cpu_tokens), self._copy_slowdown
        self._results = self._back.submit(
            ns, ns, self.now_ns, computed, ACTIVATION, -1, visit.number, slowdown=slowdown
        )

    # Compressed experts.

    def _copy(self, lane: Lane, admission: Admission, kind: int, predicted: Completion, target: int) -> Completion:
        """Enqueue a copy; what comes compressed from the host is decompressed behind it, aside or at its first use."""
        end = super()._copy(lane, admission, kind, predicted, target)
        expert, copy = admission.expert, admission.copy
        if self._packed_at == "host" and self._unpacks_aside:
            self._arriving[copy] = self._decompress_behind(expert, copy, end)
        elif self._packed_at == "host":
            self._packed.difference_update(admission.former)  # which nobody has used, if they are still there
            self._packed.add(copy)
        return end

    def _unpacked(self, expert: int, copy: int, after: Completion) -> Completion:
        """Decompress what a kernel is about to read, if it is compressed; return what the kernel waits for."""
        if self._packed_at == "gpu" and self._unpacks_aside:
            self.now_ns += self._wait_ns
            return self._decompress_aside(expert, copy, after)
        if self._packed_at == "gpu" or copy in self._packed:
            self._packed.discard(copy)
            cost = self._shrunk.decompress(expert // self._manager.experts)
            super().launch(cost, DECOMPRESS, after, expert, copy)
            return 0
        return after

    def _decompress_aside(self, expert: int, copy: int, after: Completion) -> Completion:
        """Decompress an expert on a side stream."""
        cost = self._shrunk.decompress(expert // self._manager.experts)
        self.now_ns += cost.host_ns
        return self._unpacking.submit(cost.ns, cost.ns, self.now_ns, after, DECOMPRESS, expert, self.visit, copy)

    def _decompress_behind(self, expert: int, copy: int, copied: Completion) -> Completion:
        """Decompress what comes on a side stream, in the order in which it arrives."""
        if isinstance(copied, int):
            return self._decompress_aside(expert, copy, copied)
        cost = self._shrunk.decompress(expert // self._manager.experts)
        self.now_ns += cost.host_ns
        done, visit, issued_ns = Pending(), self.visit, self.now_ns

        def arrived() -> None:
            end_ns = self._unpacking.submit(
                cost.ns, cost.ns, issued_ns, copied.end_ns or 0, DECOMPRESS, expert, visit, copy
            )
            assert isinstance(end_ns, int), "nothing on this lane waits for what is not known"
            done.resolve(end_ns)

        copied.then(arrived)
        if self._priority is not None:
            self._unpacking_of[copy] = done
        return done

    def _give_up(self, queue: PriorityLane, copy: int, touched: Completion) -> Completion:
        """Copy no more of an expert that was evicted, and decompress nothing then."""
        unpacked, work = self._unpacking_of.pop(copy, None), self._queued.get(copy)
        if unpacked is None or work is None or touched is not unpacked:
            return super()._give_up(queue, copy, touched)
        free = super()._give_up(queue, copy, work.done)
        return unpacked if free is work.done else free


def uses_cpu(scenario: Scenario) -> bool:
    """Whether misses of a scenario may be computed on the CPU."""
    return bool(getattr(MISS[scenario.miss.policy], "uses_cpu", False))
