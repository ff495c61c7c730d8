"""What caches by LRU miss on demand alone, in machine code: all GPUs' in one walk over the trace.

It comes to what `compiled_misses.missed` does, without rooms, registers and commands, where nothing but LRU decides who
leaves: every visit fits, and experts of a pool are of one size. A pool is a ring of its experts, the one used longest
ago first; those that a visit finds are taken out of it, as many leave as are missing, and all that it used come last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...workloads.batches import columns_of, some_columns
from ..policies.eviction import Lru
from .compiled_rooms import compiled, entry
from .sources import Source

Array = npt.NDArray[Any]
# What compiled functions take (see `machine_code`).
Word = Any
Words = npt.NDArray[Any]

#: An expert in its pool's ring, or the ring's own place, between its last and its first: its neighbors (-1: absent),
#: and the visit that has looked it up last, by its number from 1 on; less than 0 once that visit has listed it.
BEFORE, BEHIND, SEEN, NODE_WORDS = range(4)
#: A pool: the place of its ring, and how many experts more it has room for.
RING, LEFT, POOL_WORDS = range(3)
#: The trace: its layers, experts of a layer, and choices of a token.
LAYERS, EXPERTS, PER_TOKEN, TERM_WORDS = range(4)

#: About how many choices are looked up at once.
_NUMBERS_AT_ONCE = 1 << 17


@compiled
def unlink(nodes: Words, node: Word) -> None:
    """Take an expert out of its ring."""
    before, behind = nodes[node + BEFORE], nodes[node + BEHIND]
    nodes[before + BEHIND], nodes[behind + BEFORE] = behind, before


@compiled
def look_up(nodes: Words, chosen: Words, terms: Words, rows: Word, layer: Word, stamp: Word, missing: Words) -> Word:
    """Take what a visit finds out of the rings; list what is missing, and return how much that is."""
    base, k, count = layer * terms[EXPERTS], terms[PER_TOKEN], 0
    first, each = layer * k, terms[LAYERS] * k
    for row in range(rows):
        for at in range(first + row * each, first + row * each + k):
            node = (base + chosen[at]) * NODE_WORDS
            if nodes[node + SEEN] == stamp:
                continue
            nodes[node + SEEN] = stamp
            if nodes[node + BEFORE] >= 0:
                unlink(nodes, node)
            else:
                missing[count] = node
                count += 1
    return count


@compiled
def use(
    nodes: Words, pools: Words, pool_of: Words, chosen: Words, terms: Words, rows: Word, layer: Word, stamp: Word
) -> None:  # fmt: skip
    """Put what a visit used behind all others of its pool, in the order of last appearance."""
    base, k = layer * terms[EXPERTS], terms[PER_TOKEN]
    first, each = layer * k, terms[LAYERS] * k
    last: Word = -1
    for row in range(rows - 1, -1, -1):
        for at in range(first + row * each + k - 1, first + row * each - 1, -1):
            node = (base + chosen[at]) * NODE_WORDS
            if nodes[node + SEEN] == stamp:
                nodes[node + SEEN] = -stamp
                nodes[node + BEHIND] = last  # who is put into its ring after this one
                last = node
    while last >= 0:
        node = last
        last = nodes[node + BEHIND]
        ring = pools[pool_of[node // NODE_WORDS] + RING]
        newest = nodes[ring + BEFORE]
        nodes[node + BEFORE], nodes[node + BEHIND] = newest, ring
        nodes[newest + BEHIND], nodes[ring + BEFORE] = node, node


@entry
def lru_misses(
    nodes: Words, pools: Words, pool_of: Words, chosen: Words, starts: Words, terms: Words, steps: Word, visit: Word,
    missing: Words, keys: Words,
) -> Word:  # fmt: skip
    """List what is missing at the visits of some steps, from `visit` on: visit * all experts + expert; return how much.

    `pool_of` says of every expert where its pool is.
    """
    total, each, count = terms[LAYERS] * terms[EXPERTS], terms[LAYERS] * terms[PER_TOKEN], 0
    for step in range(steps):
        rows, of_step = starts[step + 1] - starts[step], chosen[starts[step] * each :]
        for layer in range(terms[LAYERS]):
            lacking = look_up(nodes, of_step, terms, rows, layer, visit + 1, missing)
            for at in range(lacking):
                expert = missing[at] // NODE_WORDS
                keys[count] = visit * total + expert
                count += 1
                pool = pool_of[expert]
                if pools[pool + LEFT]:
                    pools[pool + LEFT] -= 1
                else:
                    oldest = nodes[pools[pool + RING] + BEHIND]
                    unlink(nodes, oldest)
                    nodes[oldest + BEFORE] = -1
            use(nodes, pools, pool_of, of_step, terms, rows, layer, visit + 1)
            visit += 1
    return count


def is_lru_alone(source: Source) -> bool:
    """Whether nothing but LRU decides what a GPU misses that prefetches nothing, and every visit of its trace fits."""
    manager, trace = source.manager, source.trace
    most = min(columns_of(source.steps).most_rows * trace.k, trace.num_experts)
    return (
        all(
            type(pool.policy) is Lru and pool.swaps and pool.budget_bytes >= most * max(manager.size_of)
            for pool in manager.pools
        )
        and source.budgets is None
        and source.miss is None
        and trace.made is None
        and not (manager.shared or manager.drop_after_visit or manager.assigned)
    )


class _Caches:
    """The rings of all GPUs' pools, empty; `owner` (layers * experts,) is the GPU that an expert is kept on."""

    def __init__(self, sources: Sequence[Source], owner: Array) -> None:
        trace = sources[0].trace
        pools = [(source, number) for source in sources for number in range(len(source.manager.pools))]
        counts = np.array([len(source.manager.pools) for source in sources])
        firsts = np.cumsum(counts) - counts
        of_layer = np.arange(len(owner)) // trace.num_experts
        #: Where the pool of each expert is.
        self.pool_of = (firsts[owner] + np.where(counts[owner] > 1, of_layer, 0)) * POOL_WORDS
        rings = (len(owner) + np.arange(len(pools))) * NODE_WORDS
        self.nodes = np.full((len(owner) + len(pools)) * NODE_WORDS, -1, dtype=np.int64)
        self.nodes[SEEN::NODE_WORDS] = 0
        self.nodes[rings + BEFORE] = self.nodes[rings + BEHIND] = rings
        room = [
            source.manager.pools[number].budget_bytes // source.manager.size_of[number * trace.num_experts]
            for source, number in pools
        ]
        self.pools = np.stack([rings, room], axis=1).reshape(-1)


def missed_by_lru(sources: Sequence[Source], owner: Array) -> list[Array]:
    """Returns what each GPU misses that prefetches nothing: visit * all experts + expert, for each miss, by visit.

    All have the same trace and steps, and `is_lru_alone`; `owner` (layers * experts,) is the GPU that serves an expert.
    """
    trace, steps, caches = sources[0].trace, sources[0].steps, _Caches(sources, owner)
    terms = np.array([trace.layers, trace.num_experts, trace.k], dtype=np.int64)
    missing = np.empty(len(owner), dtype=np.int64)
    found: list[list[Array]] = [[np.empty(0, dtype=np.int64)] for _ in sources]
    all_rows, step = columns_of(steps).starts, 0
    while step < len(steps):
        most_rows = all_rows[step] + _NUMBERS_AT_ONCE // (trace.k * trace.layers)
        end = max(step + 1, min(int(np.searchsorted(all_rows, most_rows)), len(steps)))
        some = some_columns(steps, step, end)
        chosen = trace.experts[some.rows].astype(np.int64).reshape(-1)
        keys = np.empty(chosen.size, dtype=np.int64)
        count = lru_misses(
            caches.nodes, caches.pools, caches.pool_of, chosen, some.starts, terms, end - step, step * trace.layers,
            missing, keys,
        )  # fmt: skip
        gpu = owner[keys[:count] % len(owner)]
        for number, own in enumerate(found):
            own.append(keys[:count][gpu == number])
        step = end
    return [np.concatenate(own) for own in found]
