"""A GPU that nobody slows down: first-in first-out lanes without contention know the end of work as it is submitted.

It does what `Gpu` does, to the nanosecond, in half the time: the lanes' arithmetic in place, no promises, no
generators. Whatever can wait in SimPy's time is left to `Gpu`; `undisturbed` says which runs need it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import simpy

from ..resources.lane import NEVER
from ..resources.timeline import DEMAND, DENSE, EXPERT, GUESSES, LAUNCH, PREFETCH, READBACK, pack_span
from ..workloads.batches import Step
from .costs.costs import Costs, KernelCost
from .decide.dispatch import Visit, launch_order
from .decide.memory_manager import Admission, MemoryManager
from .gpu import Gpu, contended, pack_access, pack_visit
from .scenario.scenario import Scenario


def undisturbed(manager: MemoryManager, costs: Costs, scenario: Scenario, most_tokens: int) -> bool:
    """Whether nothing in a run can slow a lane down or make the host wait, but for the choice."""
    dispatch = scenario.dispatch
    return (
        scenario.copy_.discipline == "fifo"
        and not contended(costs, scenario)
        and not costs.copies_hold_host
        and costs.reads is None
        and costs.interruptions is None
        and manager.uniform
        and dispatch.router_readback
        and costs.most_launches(most_tokens) <= dispatch.launch_queue_depth
        and dispatch.expert_kernel == "separate"
        and scenario.prefetch.issue == "after_launch"
        and scenario.prefetch.issued_by == "host"
    )


class UndisturbedGpu(Gpu):
    """A `Gpu` whose lanes are free of each other, whose host never waits for a copy or a full queue of launches.

    Drive it by `forward` and `head` alone.
    """

    __slots__ = (
        "_arriving_ns",
        "_compute_lane",
        "_compute_next_ns",
        "_copy_gap_ns",
        "_copy_lane",
        "_copy_latency_ns",
        "_copy_next_ns",
        "_copy_wait_gap_ns",
        "_kernel_gap_ns",
        "_kernel_wait_gap_ns",
        "_read_ns",
        "_readback_lane",
        "_readback_next_ns",
        "_record",
    )

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        costs = self.costs
        self._record = self.timeline.extend
        self._compute_lane, self._copy_lane = self._compute.number, self._h2d.number
        self._readback_lane = self._d2h.number
        self._compute_next_ns = self._copy_next_ns = self._readback_next_ns = NEVER
        self._kernel_gap_ns, self._kernel_wait_gap_ns = costs.kernel_lags.gap_ns, costs.kernel_lags.after_other_ns
        self._copy_gap_ns, self._copy_wait_gap_ns = costs.copy_lags.gap_ns, costs.copy_lags.after_other_ns
        self._copy_latency_ns = costs.copy_latency_ns
        # Where all ends are known at once, none is a promise.
        self._arriving_ns, self._read_ns = cast(dict[int, int], self._arriving), cast(dict[int, int], self._read)

    def launch(self, cost: KernelCost, kind: int, after: int = 0, expert: int = -1, copy: int = -1) -> int:  # type: ignore[override]
        """Launch a group of kernels, as `Gpu.launch` does, and return its end."""
        start_ns = issued_ns = self.now_ns + cost.issue_ns
        self.now_ns += cost.host_ns
        if after and after + self._kernel_wait_gap_ns > start_ns:
            start_ns = after + self._kernel_wait_gap_ns
        if self._compute_next_ns > start_ns:
            start_ns = self._compute_next_ns
        end_ns = start_ns + cost.ns
        self._compute_next_ns = end_ns + self._kernel_gap_ns
        self._record(pack_span(start_ns, end_ns, issued_ns, expert, self.visit, copy, self._compute_lane, kind))
        return end_ns

    def forward(self, step: Step, visits: Iterator[Visit], after: int = 0) -> Iterable[simpy.Event]:  # type: ignore[override]
        """Dispatch the layer visits of one step, as `Gpu.forward` does; nothing waits."""
        self.begin_step(step.phase)
        tokens = len(step.rows)
        costs, record, lane, readback_lane = self.costs, self._record, self._compute_lane, self._readback_lane
        record_access, record_visit = self._accesses.extend, self._decided.extend
        arriving, read = self._arriving_ns, self._read_ns
        gap_ns, wait_gap_ns = self._kernel_gap_ns, self._kernel_wait_gap_ns
        number, now_ns, free_ns = self.visit, self.now_ns, self._compute_next_ns
        for dense_costs, expert_costs in zip(self.dense_costs, self._expert_costs, strict=True):
            self.visit = number = number + 1
            cost = dense_costs[tokens]
            start_ns = issued_ns = now_ns + cost.issue_ns
            if after and after + wait_gap_ns > start_ns:
                start_ns = after + wait_gap_ns
            if free_ns > start_ns:
                start_ns = free_ns
            chosen_ns = start_ns + cost.ns
            free_ns = chosen_ns + gap_ns
            after = 0
            record(pack_span(start_ns, chosen_ns, issued_ns, -1, number, -1, lane, DENSE))
            # The choice comes to the host, which is idle until then.
            since_ns, now_ns = self._busy_since_ns, now_ns + cost.host_ns + costs.readback_enqueue_ns
            if now_ns > since_ns:
                record(pack_span(since_ns, now_ns, since_ns, -1, number, -1, self._host, LAUNCH))
            start_ns = issued_ns = now_ns + costs.readback_latency_ns
            if chosen_ns > start_ns:
                start_ns = chosen_ns
            if self._readback_next_ns > start_ns:
                start_ns = self._readback_next_ns
            self._readback_next_ns = known_ns = start_ns + costs.readback_ns
            record(pack_span(start_ns, known_ns, issued_ns, -1, number, -1, readback_lane, READBACK))
            if known_ns > now_ns:
                now_ns = known_ns
            self._busy_since_ns = now_ns = now_ns + costs.synchronize_ns
            visit = next(visits)
            record_visit(pack_visit(now_ns, visit.assigned_bytes, visit.budget_bytes))
            now_ns += costs.copy_resume_ns if visit.waves[0].admitted else costs.resume_ns
            for wave in visit.waves:
                for admission in wave.admitted:
                    now_ns = self._enqueue(admission, DEMAND, 0, now_ns)
                for expert, chosen_by, copy in launch_order(visit, wave, self._resident_first):
                    cost = expert_costs[chosen_by]
                    ready_ns = 0
                    if copy in arriving:
                        ready_ns = arriving.pop(copy) + wait_gap_ns
                        now_ns += self._wait_ns
                    start_ns = issued_ns = now_ns + cost.issue_ns
                    now_ns += cost.host_ns
                    if ready_ns > start_ns:
                        start_ns = ready_ns
                    if free_ns > start_ns:
                        start_ns = free_ns
                    read[copy] = end_ns = start_ns + cost.ns
                    free_ns = end_ns + gap_ns
                    record(pack_span(start_ns, end_ns, issued_ns, expert, number, copy, lane, EXPERT))
                    record_access(pack_access(number, copy, chosen_by))
            predicted = 0
            if self._predicting:
                self.now_ns, self._compute_next_ns = now_ns, free_ns
                predicted = cast(int, self._predict(known_ns))
                if self.awaits_guesses:
                    self.learn(visit, self.read_back(predicted, GUESSES))
                    predicted = 0
                now_ns, free_ns = self.now_ns, self._compute_next_ns
            for admission, _ in visit.prefetches:
                now_ns = self._enqueue(admission, PREFETCH, predicted, now_ns)
        self.now_ns, self._compute_next_ns = now_ns, free_ns
        return ()

    def read_back(self, after: int, kind: int = READBACK) -> int:  # type: ignore[override]
        """Enqueue a copy to the host, as `Gpu.read_back` does, and return its end."""
        costs = self.costs
        self.now_ns += costs.readback_enqueue_ns
        self.end_busy()
        issued_ns = self.now_ns + costs.readback_latency_ns
        start_ns = max(issued_ns, after, self._readback_next_ns)
        self._readback_next_ns = end_ns = start_ns + costs.readback_ns
        self._record(pack_span(start_ns, end_ns, issued_ns, -1, self.visit, -1, self._readback_lane, kind))
        return end_ns

    def _enqueue(self, admission: Admission, kind: int, after: int, now_ns: int) -> int:
        """Enqueue a copy at `now_ns`, as `Gpu._copy` does where experts are of one size; return when that is done."""
        expert, copy, former = admission.expert, admission.copy, admission.former
        cost = self._copy_costs[expert // self._experts]
        now_ns += cost.host_ns
        if former:
            now_ns += self._wait_ns
            for other in former:
                room_ns = (self._read_ns if other in self._read_ns else self._arriving_ns).pop(other, 0)
                if room_ns > after:
                    after = room_ns
        start_ns = issued_ns = now_ns + self._copy_latency_ns
        if after and after + self._copy_wait_gap_ns > start_ns:
            start_ns = after + self._copy_wait_gap_ns
        if start_ns > self._copy_next_ns:
            end_ns = start_ns + cost.alone_ns
        else:
            start_ns = self._copy_next_ns
            end_ns = start_ns + cost.queued_ns
        self._copy_next_ns = end_ns + self._copy_gap_ns
        self._record(pack_span(start_ns, end_ns, issued_ns, expert, self.visit, copy, self._copy_lane, kind))
        self._arriving_ns[copy] = end_ns
        return now_ns
