"""Stack algorithms: one pass over the look-ups of a cache says, for every capacity at once, what is found.

What a cache of one size holds, a larger one holds too, under LRU and under Belady's rule; so there is an order, the
stack, whose first C experts are what C places hold, and a look-up is found exactly if its expert's depth is below C.
Mattson, Gecsei, Slutz, Traiger, "Evaluation techniques for storage hierarchies", IBM Systems Journal 9(2), 1970.

A visit looks all its experts up before it admits the missing ones, and evicts none of its own. Capacities that cannot
hold the largest visit serve it in waves, to which no stack belongs: there the depths say nothing.

In all functions, look-ups `experts` (n,) are ints below `num_experts`, unique within a visit; visit i is those from
`starts[i]` to `starts[i + 1]`; a first look-up's depth is -1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..machine_code import compiled

Array = npt.NDArray[Any]


@compiled
def lru_depths(experts: Array, recency: Array, starts: Array, num_experts: int) -> Array:
    """Returns each look-up's depth, when its visit begins, in the stack of the most recently used, int32 (n,).

    `recency` (n,) are each visit's experts in the order that it leaves them in, the last most recent. A use that is
    still its expert's last is a 1 in a Fenwick tree over the uses in order: O(log num_experts) a look-up. Fenwick, "A
    new data structure for cumulative frequency tables", Software: Practice and Experience 24(3), 1994.
    """
    size = 2 * num_experts
    tree = np.zeros(size + 1, dtype=np.int32)
    user = np.zeros(size + 1, dtype=np.int32)
    last = np.zeros(num_experts, dtype=np.int32)  # the number of an expert's last use, from 1; 0: none
    depths = np.empty(len(experts), dtype=np.int32)
    now = seen = 0
    for visit in range(len(starts) - 1):
        first, end = starts[visit], starts[visit + 1]
        if now + end - first > size:
            now = _renumber(tree, user, last, now)
        for at in range(first, end):
            use = last[experts[at]]
            depths[at] = seen - _sum(tree, use) if use else -1
        for at in range(first, end):
            expert = recency[at]
            if last[expert]:
                _add(tree, last[expert], -1)
            else:
                seen += 1
            now += 1
            _add(tree, now, 1)
            last[expert] = now
            user[now] = expert
    return depths


@compiled
def _renumber(tree: Array, user: Array, last: Array, now: int) -> int:
    """Number the last uses afresh from 1, in order; return how many there are."""
    tree[:] = 0
    count = 0
    for use in range(1, now + 1):
        expert = user[use]
        if last[expert] == use:
            count += 1
            last[expert] = count
            user[count] = expert
            _add(tree, count, 1)
    return count


@compiled
def _sum(tree: Array, at: int) -> int:
    """Returns the sum of the first `at` numbers."""
    total = 0
    while at > 0:
        total += tree[at]
        at &= at - 1
    return total


@compiled
def _add(tree: Array, at: int, number: int) -> None:
    """Add to the number at a place, from 1."""
    while at < len(tree):
        tree[at] += number
        at += at & -at


@compiled
def next_visits(experts: Array, starts: Array, num_experts: int) -> Array:
    """Returns the number of the visit that next looks the same expert up, int32 (n,); the visits' count if none."""
    visits = len(starts) - 1
    following = np.empty(len(experts), dtype=np.int32)
    coming = np.full(num_experts, visits, dtype=np.int32)
    for visit in range(visits - 1, -1, -1):
        for at in range(starts[visit], starts[visit + 1]):
            following[at] = coming[experts[at]]
            coming[experts[at]] = visit
    return following


@compiled
def belady_depths(experts: Array, starts: Array, num_experts: int) -> Array:
    """Returns each look-up's depth in the stack of Belady's rule, int32 (n,): whose next use is farthest away leaves.

    Mattson et al.'s priority stack: who is looked up goes on top, and whoever that displaces moves down past all that
    are used sooner, displacing the first that is not; O(depth) a look-up. A visit's own experts are used soonest.
    """
    following = next_visits(experts, starts, num_experts)
    stack = np.empty(num_experts, dtype=np.int32)
    coming = np.full(num_experts, -1, dtype=np.int32)  # the visit of an expert's next use; -1: not seen yet
    depths = np.empty(len(experts), dtype=np.int32)
    height = 0
    for visit in range(len(starts) - 1):
        first, end = starts[visit], starts[visit + 1]
        for at in range(first, end):
            depths[at] = -1 if coming[experts[at]] < 0 else 0
            coming[experts[at]] = visit
        for at in range(first, end):
            moving = expert = experts[at]
            depth = 0
            if depths[at] < 0:
                stack[height] = expert
                height += 1
            while stack[depth] != expert:
                other = stack[depth]
                if depth == 0 or coming[moving] < coming[other]:
                    stack[depth] = moving
                    moving = other
                depth += 1
            stack[depth] = moving
            if depths[at] == 0:
                depths[at] = depth
        for at in range(first, end):
            coming[experts[at]] = following[at]
    return depths
