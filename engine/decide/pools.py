"""Pools of expert memory: budgets of bytes, what is free of each, and how a budget is divided into them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ...errors import InputError
from ...units import bytes_words
from ..policies.eviction import Eviction

#: How room is divided: one pool for all layers; an equal one for each; one for each, by the hits it brings; one for
#: all, where layers share the experts of the same index.
SCOPES = ("global", "per-layer", "benefit", "shared")


class BudgetError(InputError):
    """The expert budget cannot hold a single expert of some layer."""


class Pool:
    """A budget of bytes, what lies in it, and what is free, in the order in which it became free."""

    def __init__(self, budget_bytes: int, policy: Eviction, swaps: bool) -> None:
        self.policy = policy
        self.use = policy.use
        # Hooks that most policies leave as they are cost nothing.
        self.begins = type(policy).begin is not Eviction.begin
        self.misses = type(policy).miss is not Eviction.miss
        self.spends = type(policy).spent is not Eviction.spent
        self.swaps = swaps  # all experts are of one size: when it is full, one out makes room for one in
        self.budget_bytes = budget_bytes
        self.free_bytes = budget_bytes
        # (bytes, copy whose room it was; -1 for room never used)
        self.free: deque[tuple[int, int]] = deque([(budget_bytes, -1)] if budget_bytes else ())

    def take(self, size_bytes: int) -> tuple[int, ...]:
        """Take `size_bytes` off the free list and return the copies whose former room that was."""
        self.free_bytes -= size_bytes
        extent_bytes, copy = self.free.popleft()
        if extent_bytes == size_bytes:  # experts of one size reuse each other's room exactly
            return (copy,) if copy >= 0 else ()
        former: list[int] = []
        while True:
            if copy >= 0:
                former.append(copy)
            if extent_bytes > size_bytes:
                self.free.appendleft((extent_bytes - size_bytes, copy))
            size_bytes -= extent_bytes
            if size_bytes <= 0:
                return tuple(former)
            extent_bytes, copy = self.free.popleft()

    def give(self, size_bytes: int, copy: int) -> None:
        """Put the room of a copy at the end of the free list."""
        self.free_bytes += size_bytes
        self.free.append((size_bytes, copy))


def pool_budgets(expert_bytes: Sequence[int], budget_bytes: int, scope: str) -> list[int]:
    """Returns the bytes of each pool: one for all layers, or one a layer.

    Room that no whole expert can use is left out where all experts of a pool are of one size. Raises BudgetError if a
    pool cannot hold one expert of its layers, ValueError if there is no such scope, it is benefit, which needs a trace
    (see `partition.divider`), or it is shared by layers whose experts differ in size.
    """
    if scope not in SCOPES:
        raise InputError(f"scope = {scope!r}: choose one of {', '.join(SCOPES)}")
    check_sizes(expert_bytes, scope)
    if scope == "benefit":
        raise InputError("scope = 'benefit' needs a trace to measure it on: give divide")
    if scope in ("global", "shared"):
        return [_usable("the expert budget", expert_bytes, budget_bytes)]
    where = f"a layer's share (1/{len(expert_bytes)}) of the expert budget"
    return [_usable(where, [size_bytes], budget_bytes // len(expert_bytes)) for size_bytes in expert_bytes]


def check_sizes(expert_bytes: Sequence[int], scope: str) -> None:
    """Raise ValueError if the scope needs experts of one size in all layers, and these are not."""
    if scope in ("benefit", "shared") and min(expert_bytes) != max(expert_bytes):
        raise InputError(f"scope = {scope!r} needs experts of one size in all layers: choose global or per-layer")


def _usable(where: str, sizes: Sequence[int], budget_bytes: int) -> int:
    """Returns the bytes of a pool that experts of these sizes can use."""
    if budget_bytes < max(sizes):
        raise BudgetError(f"{where} is {bytes_words(budget_bytes)}: it must hold one expert, {bytes_words(max(sizes))}")
    return budget_bytes - budget_bytes % sizes[0] if min(sizes) == max(sizes) else budget_bytes
