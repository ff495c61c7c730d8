"""The memory manager: which experts have room on the GPU, decided in the order of dispatch and nothing else.

It knows two states, absent and assigned, and no clock: the replay, the SimPy engine and the execution on a GPU
drive the same manager through the same calls and get the same decisions. Every admission is numbered; that number
names the copy that brings the bytes, the room they lie in, and the stay of the expert until it is evicted.

Room is bytes, not addresses: freed room is taken again in the order in which it was freed (a free list), and each
admission says whose former room it took, because a copy must wait for the last kernel that still reads there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, repeat
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...resources.spool import Spool
from ...units import bytes_words
from ..policies.eviction import NO_SETTING, Eviction, Setting
from ..policies.prefetch_share import FixedShare
from .pools import BudgetError, Pool, pool_budgets

#: Whether a prefetched expert is safe from other prefetches until the visit it is meant for.
PROTECTION = ("until_target", "none")

#: In a tier below another, `demoted`: the tier above has evicted it.
COPY_REASONS = ("demanded", "prefetched", "preloaded", "demoted")
DEMANDED, PREFETCHED, PRELOADED, DEMOTED = range(len(COPY_REASONS))

#: No expert at all.
_NONE: Set[int] = frozenset()


@dataclass(slots=True)
class Admission:
    """Room given to `expert` (copy number `copy`): the copies whose former room it took, in order.

    `partly` is the last of them, if some of its room is still free, so that a later admission names it again; or -1.
    `evicted` are (expert, copy) of those that had to leave for it, in order: where sizes differ, perhaps not those
    whose room it took.
    """

    expert: int
    copy: int
    former: tuple[int, ...]
    partly: int = -1
    evicted: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class Wave:
    """What one layer visit can hold at once, in access order: experts found (with their copies), experts given room."""

    found: dict[int, int]
    admitted: list[Admission]


class MemoryManager:
    """Expert residency under a budget of bytes, in the order in which the host dispatches.

    `expert_bytes` gives the bytes of one expert of each layer (layers,); experts are `layer * experts + index`, and
    `index` alone if the scope is shared. Where they differ within a layer, `size_of` gives the bytes of every expert
    (layers * experts,). `eviction` makes one policy per pool out of `setting`, with the pool's capacity and layers
    filled in. `divide` turns a budget into the bytes of each pool, as `partition.divider` returns it; without it, the
    scope cannot be benefit.
    `prefetch_share` limits what prefetched experts hold before their first use; None does not. `watch_unused` keeps
    `unused_bytes` even without it. `spool` keeps the records of a run; None is in memory. Raises BudgetError if a pool
    cannot hold one expert of its layers.
    """

    def __init__(
        self,
        expert_bytes: Sequence[int],
        experts: int,
        budget_bytes: int,
        eviction: Callable[[Setting], Eviction],
        *,
        setting: Setting = NO_SETTING,
        scope: str = "global",
        divide: Callable[[int], list[int]] | None = None,
        protect: str = "until_target",
        drop_after_visit: bool = False,
        prefetch_share: FixedShare | None = None,
        watch_unused: bool = False,
        size_of: Sequence[int] | None = None,
        spool: Spool | None = None,
    ) -> None:
        if protect not in PROTECTION:
            raise InputError(f"protect = {protect!r}: choose one of {', '.join(PROTECTION)}")
        self.experts = experts
        self.shared = scope == "shared"
        each_size, per_layer = (expert_bytes, 1) if size_of is None else (size_of, experts)
        self.size_of = size_of or list(chain.from_iterable(repeat(size_bytes, experts) for size_bytes in expert_bytes))
        self.uniform = min(each_size) == max(each_size)
        self.divide = divide or partial(pool_budgets, expert_bytes, scope=scope)
        budgets = self.divide(budget_bytes)
        layers = range(len(expert_bytes))
        groups = [tuple(layers)] if len(budgets) == 1 else [(layer,) for layer in layers]
        self._pools: list[Pool] = []
        for pool_bytes, group in zip(budgets, groups, strict=True):
            sizes = each_size[group[0] * per_layer : (group[-1] + 1) * per_layer]
            known = replace(
                setting, capacity=pool_bytes // max(sizes), layers=group, experts=experts, shared=self.shared
            )
            pool = Pool(pool_bytes, eviction(known), min(sizes) == max(sizes))
            self._pools += [pool] * len(group)
        self.protects = protect == "until_target"
        self.drop_after_visit = drop_after_visit
        self.budget_bytes = sum(budgets)
        self.assigned_bytes = 0
        #: The experts that have room, each with the number of the copy that holds or will hold its bytes.
        self.assigned: dict[int, int] = {}
        self._pinned: Set[int] = _NONE
        self._until: dict[int, int] = {}  # prefetched expert -> the visit that it is protected until
        self._visit = -1
        self.prefetch_share = prefetch_share
        self.watches_unused = watch_unused or prefetch_share is not None
        self._unused: dict[int, None] = {}  # prefetched experts before their first use, if they are watched
        self.unused_bytes = 0
        # Of every admission, by copy number: the expert and why it came; and the copies evicted, in order.
        #: Where the records of a run are kept.
        self.spool = spool or Spool()
        self._copy_experts = self.spool.column("copy_expert", np.int32)
        self._copy_reasons = self.spool.column("copy_reason", np.uint8)
        self._evictions = self.spool.column("evicted_copies", np.int32)
        self._copies = 0
        #: How many experts found no room when they were to be prefetched.
        self.dropped = 0
        #: How many guesses prefetching went by, and how many were left once those of a visit were merged.
        self.guessed = self.unique_guesses = 0
        #: The copies that merging saved, by expert: those of the guesses that named one beside the first.
        self.saved_copies: Counter[int] = Counter()

    @property
    def pools(self) -> list[Pool]:
        """The pools, in the order of their layers."""
        return list(dict.fromkeys(self._pools))

    def record(self, admitted: npt.NDArray[np.int64], evicted: npt.NDArray[np.int64]) -> None:
        """Take over what was decided elsewhere: (expert, reason) of new copies (copies, 2), and the copies evicted."""
        self._copies += len(admitted)
        self._copy_experts.add(admitted[:, 0].astype(np.int32).tobytes())
        self._copy_reasons.add(admitted[:, 1].astype(np.uint8).tobytes())
        self._evictions.add(evicted.astype(np.int32).tobytes())

    @property
    def copies(self) -> int:
        """How many experts have been given room."""
        return self._copies

    @property
    def evicted(self) -> int:
        """How many experts have lost their room."""
        return len(self._evictions)

    @property
    def copy_expert(self) -> npt.NDArray[Any]:
        """The expert of each copy (copies,)."""
        return self._copy_experts.array()

    @property
    def copy_reason(self) -> npt.NDArray[Any]:
        """Why each copy came (copies,): DEMANDED, PREFETCHED or PRELOADED."""
        return self._copy_reasons.array()

    @property
    def evicted_copies(self) -> npt.NDArray[Any]:
        """The copies evicted, in order."""
        return self._evictions.array()

    def fitting(self, experts: Iterable[int]) -> list[int]:
        """Returns those, in order, that all have room now, each where the ones before it have theirs."""
        free = {id(pool): pool.free_bytes for pool in self._pools}
        fit = []
        for expert in experts:
            pool = id(self._pools[expert // self.experts])
            if self.size_of[expert] <= free[pool]:
                free[pool] -= self.size_of[expert]
                fit.append(expert)
        return fit

    def preload(self, experts: Iterable[int]) -> None:
        """Give room to absent experts before the run starts, without a copy."""
        given, sizes = list(experts), self.size_of
        for expert in given:
            pool, size_bytes = self._pools[expert // self.experts], sizes[expert]
            if size_bytes > pool.free_bytes:
                raise BudgetError(
                    f"expert {expert}: takes {bytes_words(size_bytes)} to preload, and {bytes_words(pool.free_bytes)} "
                    "are free: preload fewer, or give more budget"
                )
            if pool.misses:
                pool.policy.miss(expert, False)
            pool.take(size_bytes)
            pool.policy.admit(expert, False)
        self.assigned.update(zip(given, range(self._copies, self._copies + len(given)), strict=True))
        self.assigned_bytes += sum(map(sizes.__getitem__, given))
        self._copies += len(given)
        self._copy_experts.buffer.extend(given)
        self._copy_reasons.buffer.extend([PRELOADED] * len(given))

    def visit(
        self,
        number: int,
        layer: int,
        experts: Sequence[int],
        recency: Sequence[int],
        weights: Sequence[float],
        elsewhere: Collection[int] = (),
    ) -> list[Wave]:
        """Serve one layer visit; return its waves. What the last wave holds stays pinned until `unpin`.

        `experts` are unique, in access order; `recency` are the same in the order of their last appearance, with
        `weights` beside. What is found comes in the first wave; misses follow in order, but for those of `elsewhere`,
        which are not fetched.
        """
        self._visit = number
        pool = self._pools[layer]
        assigned = self.assigned
        if pool.begins:
            pool.policy.begin(number, layer, recency, weights)
        found = {}
        for expert in experts:
            if expert in assigned:
                found[expert] = assigned[expert]
        self._pinned = found.keys()
        if self.watches_unused:
            self._note_first_uses(found)
        if len(found) == len(experts):  # nothing to fetch: the common case, kept short
            for _ in map(pool.use, recency, weights):  # a quarter of the time of zip(…, strict=True)
                pass
            return [Wave(found, [])]
        missing = [expert for expert in experts if expert not in assigned and expert not in elsewhere]
        if self.prefetch_share is not None:
            for expert in missing:
                self.prefetch_share.missed(expert)
        waves = []
        while True:
            self._pinned = pinned = set(found)
            admitted: list[Admission] = []
            for expert in missing:
                admission = self._claim(expert, pool, DEMANDED, None)
                if admission is None:
                    break
                pinned.add(expert)
                admitted.append(admission)
            waves.append(Wave(found, admitted))
            served = len(admitted) == len(missing)
            self._note_use(pool.policy, waves[-1], recency, weights)
            if served:
                return waves
            found, missing = {}, missing[len(admitted) :]
            self.unpin()

    def _note_first_uses(self, experts: Iterable[int]) -> None:
        for expert in experts:
            if expert in self._unused:
                del self._unused[expert]
                self.unused_bytes -= self.size_of[expert]

    def _note_use(self, policy: Eviction, wave: Wave, recency: Sequence[int], weights: Sequence[float]) -> None:
        """Tell the policy what a wave used, in the order of last appearance; a miss is an admission, no use."""
        found = wave.found
        here = self._pinned
        for expert, weight in zip(recency, weights, strict=True):
            if expert in found:
                policy.use(expert, weight)
            elif expert in here:
                policy.admit(expert, True)

    def unpin(self) -> None:
        """End the visit's hold on its experts: those that are spent leave now, with `drop_after_visit` all."""
        if self.drop_after_visit or self._pools[0].spends:
            for expert in sorted(self._pinned, key=self.assigned.__getitem__):
                if self.drop_after_visit or self._pools[expert // self.experts].policy.spent(expert):
                    self._evict(expert)
        self._pinned = _NONE

    def prefetch(self, expert: int, target: int, guesses: int = 1) -> Admission | None:
        """Give room to an expert expected at visit number `target`; None if it is assigned or finds no room.

        So many `guesses` of one visit have named it; ask once for all of them.
        """
        if expert in self.assigned:
            return None
        pool = self._pools[expert // self.experts]
        admission = self._claim(expert, pool, PREFETCHED, self._visit)
        if admission is None:
            self.dropped += 1
            return None
        if guesses > 1:
            self.saved_copies[expert] += guesses - 1
        pool.policy.admit(expert, False)
        if self.protects:
            self._until[expert] = target
        if self.watches_unused:
            self._unused[expert] = None
            self.unused_bytes += self.size_of[expert]
        return admission

    def begin(self, number: int, layer: int, recency: Sequence[int], weights: Sequence[float]) -> None:
        """Begin a visit (as `visit`) whose experts are looked up one by one, and only those that a tier above lacks."""
        self._visit = number
        pool = self._pools[layer]
        if pool.begins:
            pool.policy.begin(number, layer, recency, weights)

    def look_up(self, expert: int, weight: float | None) -> Admission | None:
        """Use an expert, with its gate weight, and give it room if it has none; None if it has.

        Without a weight it is a prefetch, which uses nothing. Nothing may be pinned; nothing is protected.
        """
        pool = self._pools[expert // self.experts]
        if expert in self.assigned:
            if weight is not None:
                pool.use(expert, weight)
            return None
        reason = PREFETCHED if weight is None else DEMANDED
        admission = self._claim(expert, pool, reason, None, spares=False)
        assert admission is not None  # a pool holds one expert at least
        pool.policy.admit(expert, weight is not None)
        return admission

    def take_in(self, expert: int, keep: int) -> Admission | None:
        """Give room to an expert that a tier above has evicted, which is no use of it; `keep` stays where it is.

        None if it has room, or finds none. Nothing may be pinned.
        """
        if expert in self.assigned:
            return None
        pool = self._pools[expert // self.experts]
        self._pinned = {keep}
        admission = self._claim(expert, pool, DEMOTED, None, spares=False)
        self._pinned = _NONE
        if admission is not None:
            pool.policy.admit(expert, False)
        return admission

    def release(self, expert: int, free_bytes: int) -> None:
        """Let go of an expert that a tier above has taken over, and of others until so much of its pool is free."""
        self._evict(expert)
        pool = self._pools[expert // self.experts]
        while pool.free_bytes < free_bytes and self.assigned:
            self._evict(next(pool.policy.victims()))

    def drop_prefetched(self, number: int) -> None:
        """Let go of what was prefetched for visits up to `number` and is still protected: wrong guesses.

        Ends a visit whose `drop_after_visit` has taken out what it used. Needs protection until the target.
        """
        for expert in [expert for expert, target in self._until.items() if target <= number]:
            self._evict(expert)

    def cancel(self, expert: int) -> None:
        """Take back the room of a prefetch that was never copied (policies that use the clock only)."""
        self._evict(expert)

    def resize(self, budget_bytes: int) -> None:
        """Set a new budget; experts leave in the policy's order until what remains fits.

        Raises BudgetError if a pool cannot hold one expert of its layers. Call it between visits.
        """
        budgets = self.divide(budget_bytes)
        for pool, pool_bytes in zip(self.pools, budgets, strict=True):
            more_bytes = pool_bytes - pool.budget_bytes
            pool.budget_bytes = pool_bytes
            if more_bytes > 0:
                pool.give(more_bytes, -1)
                continue
            while pool.free_bytes < -more_bytes:
                self._evict(next(pool.policy.victims()))
            if more_bytes:
                pool.take(-more_bytes)
        self.budget_bytes = sum(budgets)

    def _claim(
        self, expert: int, pool: Pool, reason: int, prefetch_at: int | None, *, spares: bool = True
    ) -> Admission | None:
        """Give an absent expert room, evicting what must go; None if that cannot be done, and nothing changes.

        `prefetch_at` is the visit number of a prefetch, which respects protected experts; None is a demand. A policy
        that keeps others from making room for a prefetch is not asked to if nothing can do without it (`spares`).
        """
        former: tuple[int, ...]
        evicted: tuple[tuple[int, int], ...] = ()
        partly = -1
        if pool.misses:
            pool.policy.miss(expert, reason == DEMANDED or (pool.policy.may_spare and not spares))
        if pool.swaps and not pool.free:  # full, and one expert out makes exactly room for one in
            pinned, until = self._pinned, self._until
            only = self._unused if prefetch_at is not None and self._at_limit(expert) else None
            for victim in pool.policy.victims():
                if victim not in pinned and (prefetch_at is None or until.get(victim, -1) <= prefetch_at):
                    if only is not None and victim not in only:
                        continue
                    break
            else:
                return None
            former = (self._forget(victim, pool),)
            evicted = ((victim, former[0]),)
        else:
            size_bytes = self.size_of[expert]
            if pool.free_bytes < size_bytes:
                evicted = self._make_room(pool, expert, prefetch_at)
                if not evicted:
                    return None
            former = pool.take(size_bytes)
            if former and pool.free and pool.free[0][1] == former[-1]:
                partly = former[-1]
            self.assigned_bytes += size_bytes
        copy = self._copies
        self._copies = copy + 1
        self._copy_experts.buffer.append(expert)
        self._copy_reasons.buffer.append(reason)
        self.assigned[expert] = copy
        return Admission(expert, copy, former, partly, evicted)

    def _at_limit(self, expert: int) -> bool:
        """Whether prefetched experts nobody has used would hold more than their share with this one."""
        if self.prefetch_share is None:
            return False
        return self.unused_bytes + self.size_of[expert] > self.prefetch_share.share * self.budget_bytes

    def _make_room(self, pool: Pool, wanted: int, prefetch_at: int | None) -> tuple[tuple[int, int], ...]:
        """Evict until `wanted` has room; return (expert, copy) of those evicted: none if that cannot be done."""
        lacking = self.size_of[wanted] - pool.free_bytes
        pinned, until = self._pinned, self._until
        only = self._unused if prefetch_at is not None and self._at_limit(wanted) else None
        victims: list[int] = []
        for expert in pool.policy.victims():
            if expert in pinned or (prefetch_at is not None and until.get(expert, -1) > prefetch_at):
                continue
            if only is not None and expert not in only:
                continue
            victims.append(expert)
            lacking -= self.size_of[expert]
            if lacking <= 0:
                evicted = tuple((victim, self.assigned[victim]) for victim in victims)
                for victim in victims:
                    self._evict(victim)
                return evicted
        return ()

    def _forget(self, expert: int, pool: Pool) -> int:
        """Make an expert absent; return the copy whose room it leaves, which the caller gives on."""
        copy = self.assigned.pop(expert)
        self._until.pop(expert, None)
        pool.policy.evict(expert)
        self._evictions.buffer.append(copy)
        if self.watches_unused:
            if self.prefetch_share is not None:
                self.prefetch_share.evicted(expert, expert in self._unused)
            self._note_first_uses((expert,))
        return copy

    def _evict(self, expert: int) -> None:
        pool, size_bytes = self._pools[expert // self.experts], self.size_of[expert]
        pool.give(size_bytes, self._forget(expert, pool))
        self.assigned_bytes -= size_bytes
