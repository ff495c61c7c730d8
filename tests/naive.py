"""The decisions of a run, once more, in the plainest way: lists, loops and no cleverness, LRU only.

Written from the words of the design, not from the code, so that the two can be held against each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from prestage.engine.replay.replay import VisitCounts
from prestage.engine.scenario.inputs import Inputs
from prestage.workloads.batches import Step
from prestage.workloads.trace import RoutingTrace


class NaivePool:
    """A budget, the experts in it (least recently used first), and its bytes one by one.

    `free` is every free byte in the order in which it became free, as the copy that lay there last (-1: none).
    Where all experts are of one size, bytes that no whole expert can use are left out.
    """

    def __init__(self, budget_bytes: int, sizes: Sequence[int]) -> None:
        rest = budget_bytes % sizes[0] if len(set(sizes)) == 1 else 0
        self.free = deque([-1] * (budget_bytes - rest))
        self.order: list[int] = []


class NaiveManager:
    """LRU residency over bytes; `log` is what happened, in order.

    ("in", expert, copy, former copies, the one of them that still has free room or -1) and ("out", expert, copy).
    """

    def __init__(
        self,
        sizes: Sequence[int],
        experts: int,
        budget_bytes: int,
        scope: str = "global",
        protect: str = "until_target",
    ) -> None:
        if scope == "global":
            self.pool = [NaivePool(budget_bytes, sizes)] * len(sizes)
        else:
            self.pool = [NaivePool(budget_bytes // len(sizes), [size]) for size in sizes]
        self.sizes = sizes
        self.experts = experts
        self.protect = protect == "until_target"
        self.copy: dict[int, int] = {}  # of every expert in memory
        self.until: dict[int, int] = {}
        self.pinned: list[int] = []
        self.copies = self.dropped = 0
        self.log: list[tuple[object, ...]] = []

    def size(self, expert: int) -> int:
        return self.sizes[expert // self.experts]

    def used_bytes(self) -> int:
        return sum(self.size(expert) for expert in self.copy)

    def evict(self, expert: int) -> None:
        pool = self.pool[expert // self.experts]
        pool.order.remove(expert)
        copy = self.copy.pop(expert)
        pool.free.extend([copy] * self.size(expert))
        self.until.pop(expert, None)
        self.log.append(("out", expert, copy))

    def claim(self, expert: int, spared: Sequence[int]) -> bool:
        """Give an expert room without evicting whom is spared; False, and nothing changes, if that cannot be."""
        pool = self.pool[expert // self.experts]
        may_go = [other for other in pool.order if other not in spared]
        if len(pool.free) + sum(self.size(other) for other in may_go) < self.size(expert):
            return False
        while len(pool.free) < self.size(expert):
            self.evict(may_go.pop(0))
        taken = [pool.free.popleft() for _ in range(self.size(expert))]
        former = tuple(copy for copy in dict.fromkeys(taken) if copy >= 0)
        self.copy[expert] = self.copies
        pool.order.append(expert)
        partly = next((copy for copy in former if copy in pool.free), -1)
        self.log.append(("in", expert, self.copies, former, partly))
        self.copies += 1
        return True

    def visit(self, experts: Sequence[int], recency: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        """Returns the waves, each as (found, admitted); the last one stays pinned."""
        found = [expert for expert in experts if expert in self.copy]
        missing = [expert for expert in experts if expert not in self.copy]
        waves = []
        while True:
            self.pinned = list(found)
            admitted: list[int] = []
            while missing and self.claim(missing[0], self.pinned):
                admitted.append(missing.pop(0))
                self.pinned.append(admitted[-1])
            for expert in recency:
                if expert in self.pinned:
                    order = self.pool[expert // self.experts].order
                    order.remove(expert)
                    order.append(expert)
            waves.append((found, admitted))
            if not missing:
                return waves
            found = []

    def unpin(self) -> None:
        self.pinned = []

    def prefetch(self, expert: int, now: int, target: int) -> bool:
        """Returns whether a copy was ordered; `now` is the visit that asks."""
        if expert in self.copy:
            return False
        protected = [other for other, until in self.until.items() if self.protect and until > now]
        if not self.claim(expert, [*self.pinned, *protected]):
            self.dropped += 1
            return False
        self.until[expert] = target
        return True


def naive_counts(inputs: Inputs) -> VisitCounts:
    """Play a whole run and count it."""
    trace, steps, scenario = inputs.trace, inputs.steps, inputs.scenario
    layers, experts = trace.layers, trace.num_experts
    manager = NaiveManager(
        inputs.model.expert_bytes, experts, inputs.budget_bytes, scenario.memory.scope, scenario.prefetch.protect
    )
    accesses = missed = prefetched = first_row = 0
    for index, step in enumerate(steps):
        for layer in range(layers):
            pairs = [layer * experts + int(expert) for row in step.rows for expert in trace.chosen(row, layer)]
            unique = list(dict.fromkeys(pairs))
            by_last = list(reversed(dict.fromkeys(reversed(pairs))))
            waves = manager.visit(unique, by_last)
            accesses += len(unique)
            missed += sum(len(admitted) for _, admitted in waves)
            if scenario.prefetch.issue == "after_launch":
                manager.unpin()
            if inputs.guesses is not None and scenario.tiers.prefetch == "gpu":
                asked: list[int] = []
                _, _, horizons, ranks = inputs.guesses.experts.shape
                for ahead in range(1, horizons + 1):
                    target_layer = (layer + ahead) % layers
                    target_step = step_after(trace, steps, index, (layer + ahead) // layers)
                    for rank in range(ranks):
                        for token in range(len(step.rows)):
                            guess = int(inputs.guesses.experts[first_row + token, layer, ahead - 1, rank])
                            expert = target_layer * experts + guess
                            if guess >= 0 and target_step >= 0 and expert not in asked:
                                asked.append(expert)
                                prefetched += manager.prefetch(
                                    expert, index * layers + layer, target_step * layers + target_layer
                                )
            manager.unpin()
        first_row += len(step.rows)
    evicted = sum(event[0] == "out" for event in manager.log)
    return VisitCounts(accesses, accesses - missed, missed, prefetched, manager.dropped, evicted)


def step_after(trace: RoutingTrace, steps: Sequence[Step], index: int, tokens: int) -> int:
    """Returns the first step that one of this step's sequences takes `tokens` steps of its own later; -1 for none."""
    if not tokens:
        return index
    firsts = []
    for sequence in set(trace.sequence[steps[index].rows].tolist()):
        own = [number for number in range(index + 1, len(steps)) if sequence in trace.sequence[steps[number].rows]]
        firsts += own[tokens - 1 : tokens]
    return min(firsts, default=-1)
