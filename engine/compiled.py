"""Compiled replay: the same decisions as the memory manager's, on demand only, at the speed of machine code.

The order in which experts leave is a doubly linked list in arrays, one node an expert and one a pool. Every function
here equals `replay.replay` to the last access; tests hold it to that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from ..workloads.batches import Step
from ..workloads.trace import RoutingTrace

Array = npt.NDArray[Any]


def replay_lru(
    trace: RoutingTrace, steps: Sequence[Step], pool_bytes: Sequence[int], expert_bytes: Sequence[int], lookup: str
) -> tuple[npt.NDArray[np.uint8], int]:
    """Replay LRU on demand; return the outcome of each (token, layer, rank), as in `Replayed`, and the evictions.

    `pool_bytes` has one entry for a global pool, or one a layer; `expert_bytes` (layers,).
    """
    outcome = np.full(trace.experts.shape, 255, dtype=np.uint8)
    present = np.ones((1, 1), dtype=bool) if trace.present is None else trace.present
    rows = np.concatenate([step.rows for step in steps]) if steps else np.empty(0, dtype=np.int64)
    starts = np.cumsum([0, *(len(step.rows) for step in steps)])
    evicted = _lru(
        trace.experts,
        present,
        trace.present is not None,
        rows,
        starts,
        trace.num_experts,
        np.array(expert_bytes, dtype=np.int64),
        np.array(pool_bytes, dtype=np.int64),
        lookup == "single",
        outcome,
    )
    return outcome, int(evicted)


@numba.njit(cache=True)
def _unlink(before: Array, after: Array, node: int) -> None:
    """Take a node out of its list."""
    before[after[node]] = before[node]
    after[before[node]] = after[node]


@numba.njit(cache=True)
def _link(before: Array, after: Array, anchor: int, node: int) -> None:
    """Put a node in front of another; in front of the pool's own node is last to go."""
    last = before[anchor]
    after[last] = node
    before[node] = last
    after[node] = anchor
    before[anchor] = node


@numba.njit(cache=True)
def _lru(
    experts: Array,
    present: Array,
    has_gaps: bool,
    rows: Array,
    starts: Array,
    num_experts: int,
    expert_bytes: Array,
    pool_bytes: Array,
    single: bool,
    outcome: Array,
) -> int:
    """Serve every step and layer: look up, pin, make room wave by wave, then renew recency by last appearance."""
    layers, k = experts.shape[1], experts.shape[2]
    total = layers * num_experts
    free = pool_bytes.copy()
    before = np.arange(total + len(pool_bytes))
    after = np.arange(total + len(pool_bytes))
    resident = np.zeros(total, dtype=np.bool_)
    pinned = np.full(total, -1, dtype=np.int64)  # the wave that pins it
    seen = np.full(total, -1, dtype=np.int64)  # the look-up that it was last seen in
    most = np.max(np.diff(starts)) * k if len(starts) > 1 else 0
    wanted = np.empty(most, dtype=np.int64)
    missing = np.empty(most, dtype=np.int64)
    wave = visit = evicted = 0
    for step in range(len(starts) - 1):
        pairs = (starts[step + 1] - starts[step]) * k
        for layer in range(layers):
            pool = layer if len(pool_bytes) > 1 else 0
            head = total + pool
            size = expert_bytes[layer]
            first = 0
            while first < pairs:
                # One look-up: the whole batch, or one (token, expert) pair.
                last = first + 1 if single else pairs
                visit += 1
                wave += 1
                lacking = 0
                for pair in range(first, last):
                    row, rank = rows[starts[step] + pair // k], pair % k
                    wanted[pair] = -1
                    if has_gaps and not present[row, layer]:
                        continue
                    expert = layer * num_experts + experts[row, layer, rank]
                    wanted[pair] = expert
                    if seen[expert] == visit:
                        continue
                    seen[expert] = visit
                    if resident[expert]:
                        outcome[row, layer, rank] = 1
                        pinned[expert] = wave
                    else:
                        outcome[row, layer, rank] = 0
                        missing[lacking] = expert
                        lacking += 1
                served = 0
                while True:
                    while served < lacking:
                        node = after[head]
                        room = free[pool]
                        while room < size and node != head:  # would evicting all that is unpinned be enough?
                            if pinned[node] != wave:
                                room += expert_bytes[node // num_experts]
                            node = after[node]
                        if room < size:
                            break
                        node = after[head]
                        while free[pool] < size:
                            following = after[node]
                            if pinned[node] != wave:
                                _unlink(before, after, node)
                                resident[node] = False
                                free[pool] += expert_bytes[node // num_experts]
                                evicted += 1
                            node = following
                        free[pool] -= size
                        pinned[missing[served]] = wave
                        resident[missing[served]] = True
                        after[missing[served]] = -1  # not in the list yet
                        served += 1
                    # Those of this wave, in the order of last appearance: walk back and put each before the others.
                    anchor = head
                    visit += 1
                    for pair in range(last - 1, first - 1, -1):
                        expert = wanted[pair]
                        if expert < 0 or seen[expert] == visit or pinned[expert] != wave:
                            continue
                        seen[expert] = visit
                        if after[expert] >= 0:
                            _unlink(before, after, expert)
                        _link(before, after, anchor, expert)
                        anchor = expert
                    if served == lacking:
                        break
                    wave += 1
                first = last
    return evicted


#: The policies that have a compiled replay, under the names of EVICTION.
COMPILED: dict[str, Callable[..., tuple[npt.NDArray[np.uint8], int]]] = {"lru": replay_lru}
