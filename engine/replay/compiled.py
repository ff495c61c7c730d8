"""Compiled replays: the same decisions as the memory manager's, on demand only, at the speed of machine code.

Each pool's look-ups, laid out flat, go through one loop that looks up, pins, makes room and serves in waves; a policy
is what the loop asks of compiled_policies.py. LRU has a loop of its own for the common case. Every replay here equals
`replay.replay` with the policy of the same name to the last access; tests hold it to that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ... import machine_code, machine_library
from ...machine_code import Function, trailing_zeros
from ...workloads.batches import Step
from ...workloads.stacks import next_visits
from ...workloads.trace import RoutingTrace
from ..decide.lookups import Lookups, in_file_order, list_lookups
from ..policies.compiled_eviction import (
    BELADY,
    CLOCK,
    DEMANDED_AT,
    FIFO,
    LFU,
    LFU_INCACHE,
    LRU,
    PRELOADED,
    S3FIFO,
    SIEVE,
    begin,
)
from ..policies.compiled_orders import NEXT, SIZE, WAVE, compiled
from ..policies.compiled_policies import (
    ARC,
    LFRU,
    LRFU,
    TWO_Q,
    admit,
    evict,
    make_state,
    marks,
    miss,
    note,
    use,
    victims,
)
from ..policies.eviction_base import NO_SETTING, Setting
from .notes import NOTES, Notes, notes_of, takes_notes

Array = npt.NDArray[Any]


def _called(function: Function) -> Function:
    """Compile a function that Python calls, and that makes no array."""
    return machine_library.entry(machine_code.compiled(function, _nrt=False))  # type: ignore[no-any-return]


Outcome = npt.NDArray[np.uint8]

#: The policies that have a compiled replay without notes, by their names in EVICTION. On demand, `preloaded` is FIFO.
KINDS = {
    "fifo": FIFO,
    "lru": LRU,
    "lfu": LFU,
    "lfu-incache": LFU_INCACHE,
    "clock": CLOCK,
    "sieve": SIEVE,
    "s3fifo": S3FIFO,
    "2q": TWO_Q,
    "arc": ARC,
    "lfru": LFRU,
    "lrfu": LRFU,
    "preloaded": PRELOADED,
    "belady": BELADY,
}


def replay_compiled(
    eviction: str,
    trace: RoutingTrace,
    steps: Sequence[Step],
    pool_bytes: Sequence[int],
    expert_bytes: Sequence[int],
    lookup: str,
    *,
    shared: bool = False,
    setting: Setting = NO_SETTING,
) -> tuple[Outcome, int]:
    """Replay on demand; return the outcome of each (token, layer, rank), as in `Replayed`, and the evictions.

    `pool_bytes` has one entry for a global pool, or one a layer; `expert_bytes` (layers,). With `shared`, layers share
    the experts of the same index, and one pool. A policy of NOTES needs the `setting` of the whole run.
    """
    if shared:
        expert_bytes = expert_bytes[:1]
    outcome = np.full(trace.experts.size, 255, dtype=np.uint8)
    one_window = eviction == "lru" and lookup == "single" and len(set(expert_bytes)) == len(pool_bytes) == 1
    if one_window and in_file_order(trace, steps):  # the loop is so fast that listing the look-ups would take as long
        capacity = pool_bytes[0] // expert_bytes[0]
        live, last = _past(outcome.size + capacity, len(expert_bytes) * trace.num_experts)
        stride = 0 if shared else trace.num_experts
        misses = int(_lru_one_by_one(trace.experts, stride, capacity, live, last, outcome))
        return outcome.reshape(trace.experts.shape), max(0, misses - capacity)
    evicted = 0
    for pool, room_bytes in enumerate(pool_bytes):
        layer = pool if len(pool_bytes) > 1 else None
        lookups = list_lookups(trace, steps, lookup, layer, shared=shared)
        policy = pool_policy(eviction, lookups, setting, layer, shared=shared)
        sizes = expert_bytes if len(pool_bytes) == 1 else [expert_bytes[pool]] * trace.layers
        whole = lookups.cells is None
        found = outcome if whole else np.empty(len(lookups.experts), dtype=np.uint8)
        evicted += replay_pool(policy, lookups, room_bytes, sizes, trace.num_experts, found)
        if not whole:
            outcome[lookups.cells] = found
    return outcome.reshape(trace.experts.shape), evicted


def is_compiled(eviction: str, steps: Sequence[Step], lookup: str) -> bool:
    """Whether a policy has a compiled replay of these steps."""
    return eviction in COMPILED and (eviction not in NOTES or takes_notes(eviction, steps, lookup))


class PoolPolicy(NamedTuple):
    """A policy by its name in EVICTION, with its notes of one pool; None if it has none."""

    eviction: str
    notes: Notes | None


def pool_policy(
    eviction: str, lookups: Lookups, setting: Setting, layer: int | None, *, shared: bool = False
) -> PoolPolicy:
    """Returns a policy for the pool of one layer, or of all; `setting` is the whole run's, with its trace."""
    if eviction not in NOTES:
        return PoolPolicy(eviction, None)
    trace = setting.known_trace()
    group = tuple(range(trace.layers)) if layer is None else (layer,)
    known = replace(setting, layers=group, experts=trace.num_experts, shared=shared)
    return PoolPolicy(eviction, notes_of(eviction, lookups, known))


def replay_pool(
    policy: PoolPolicy,
    lookups: Lookups,
    pool_bytes: int,
    expert_bytes: Sequence[int],
    num_experts: int,
    found: Outcome,
) -> int:
    """Replay one pool's look-ups: set `found` (n,) to 1 or 0 for each, and return the evictions.

    `expert_bytes` (layers,) are the sizes of the experts that the pool may hold.
    """
    eviction, notes = policy
    if eviction == "spent":  # what a visit demanded leaves with it: on demand alone, nothing is ever there
        found[:] = 0
        return len(found)
    kind, capacity = KINDS[eviction] if notes is None else NOTES[eviction][0], pool_bytes // max(expert_bytes)
    experts = len(expert_bytes) * num_experts
    if kind == LRU and min(expert_bytes) == max(expert_bytes) and capacity >= lookups.largest_visit:
        live, last = _past(len(found) + capacity, experts)
        if lookups.largest_visit == 1:
            misses = int(_lru_one_by_one(lookups.experts.reshape(1, 1, -1), 0, capacity, live, last, found))
        else:
            misses = _lru_by_visits(lookups.experts, lookups.recency, lookups.starts, capacity, live, last, found)
        return max(0, misses - capacity)
    following = np.empty(0, np.int32)
    if kind == BELADY:
        following = next_visits(lookups.experts, lookups.starts, experts)
    if notes is None:
        notes = Notes(np.zeros_like(lookups.starts))
    held = np.full((experts, 3), -1, dtype=np.int64)
    held[:, SIZE] = np.repeat(np.array(expert_bytes, dtype=np.int64), num_experts)
    state, reals = make_state(kind, capacity, len(expert_bytes), num_experts)
    if notes.ranks is not None:
        state[:experts, NEXT] = notes.ranks[:experts]  # shared, only the first layer has any
    evicted = _replay(
        kind,
        lookups.experts,
        lookups.recency,
        lookups.starts,
        following,
        notes.experts,
        notes.values,
        notes.starts,
        pool_bytes,
        state,
        reals,
        notes.luck.copy(),
        np.zeros(experts, dtype=np.bool_),  # who is in memory, as the policy knows
        held,
        np.empty(experts, dtype=np.int32),  # room for a visit's misses
        np.empty(2 * experts, dtype=np.int32),  # for victims, in front, and for whom a walk sets aside, at the back
        found,
    )
    return int(evicted)


# LRU where all experts are of one size and every visit fits: no list of who was used when is kept, the past itself is
# that list. Every use has a number; what is in memory are the experts last used at number `oldest` or later. `live` has
# a bit for each use that is still its expert's last: the victim is the next one from `oldest` on. At first, as many
# uses by nobody as there are places make the memory full, so that each miss costs one and nothing asks whether there
# is room. A visit first takes the bits of all it asks for, then evicts, so nobody evicts what it pins.

# Numbers are unsigned, because Numba asks of every signed index whether it counts from the end.

_ONE, _WORD_BITS, _WORD_SHIFT, _BIT_MASK = np.uint64(1), np.uint64(64), np.uint64(6), np.uint64(63)


def _past(uses: int, experts: int) -> tuple[Array, Array]:
    """Returns `live`, of that many uses, the first word being nobody's, and each expert's last use, none so far: 0."""
    live = np.full(uses // 64 + 2, np.iinfo(np.uint64).max, dtype=np.uint64)
    return live, np.zeros(experts, dtype=np.uint32 if uses < 2**32 - 64 else np.uint64)


@compiled
def _clear(live: Array, use_number: np.uint64) -> None:
    """Say that a use is no longer its expert's last."""
    live[use_number >> _WORD_SHIFT] &= ~(_ONE << (use_number & _BIT_MASK))


@compiled
def _after_next_live(live: Array, oldest: np.uint64) -> np.uint64:
    """Returns the number after that of the first live use from `oldest` on."""
    at = oldest >> _WORD_SHIFT
    word = live[at] >> (oldest & _BIT_MASK)
    if word == 0:
        at += _ONE
        while live[at] == 0:
            at += _ONE
        oldest, word = at << _WORD_SHIFT, live[at]
    return oldest + np.uint64(trailing_zeros(word)) + _ONE


@_called
def _lru_one_by_one(chosen: Array, stride: int, capacity: int, live: Array, last: Array, found: Array) -> np.uint64:
    """Replay LRU, every look-up a visit of its own, and return the misses: twice as fast as by visits.

    `chosen` (tokens, layers, k) are looked up in order; a layer's experts begin at its multiple of `stride`.
    """
    oldest = _WORD_BITS
    now = oldest + np.uint64(capacity)
    at = misses = np.uint64(0)
    for token in range(chosen.shape[0]):
        first = np.uint64(0)
        for layer in range(chosen.shape[1]):
            for rank in range(chosen.shape[2]):
                expert = first + np.uint64(chosen[token, layer, rank])
                before = np.uint64(last[expert])
                _clear(live, before)
                last[expert] = now
                now += _ONE
                if before >= oldest:
                    found[at] = 1
                else:
                    found[at] = 0
                    misses += _ONE
                    oldest = _after_next_live(live, oldest)
                at += _ONE
            first += np.uint64(stride)
    return misses


@_called
def _lru_by_visits(
    experts: Array, recency: Array, starts: Array, capacity: int, live: Array, last: Array, found: Array
) -> int:
    """Replay LRU visit by visit, and return the misses."""
    oldest = _WORD_BITS
    now = oldest + np.uint64(capacity)
    misses = 0
    for visit in range(len(starts) - 1):
        lacking = 0
        for at in range(starts[visit], starts[visit + 1]):
            before = np.uint64(last[experts[at]])
            _clear(live, before)
            found[at] = before >= oldest
            lacking += int(before < oldest)
        for at in range(starts[visit], starts[visit + 1]):
            last[recency[at]] = now
            now += _ONE
        misses += lacking
        for _ in range(lacking):
            oldest = _after_next_live(live, oldest)
    return misses


@_called
def _replay(
    kind: int,
    experts: Array,
    recency: Array,
    starts: Array,
    following: Array,
    noted: Array,
    values: Array,
    note_starts: Array,
    pool_bytes: int,
    state: Array,
    reals: Array,
    luck: Array,
    resident: Array,
    held: Array,
    missing: Array,
    leaving: Array,
    found: Array,
) -> int:
    """Serve every visit: look up, pin, make room wave by wave, and tell the policy what was used; return evictions."""
    free_bytes = pool_bytes
    wave = evicted = 0
    for visit in range(len(starts) - 1):
        first, last = starts[visit], starts[visit + 1]
        wave += 1
        lacking = 0
        for at in range(first, last):
            expert = experts[at]
            if kind == BELADY:
                begin(state, expert, following[at])
            if resident[expert]:
                found[at] = 1
                held[expert, WAVE] = wave
            else:
                found[at] = 0
                missing[lacking] = expert
                lacking += 1
        for at in range(note_starts[visit], note_starts[visit + 1]):
            note(kind, state, reals, noted[at], values[at], resident[noted[at]])
        size_bytes = held[experts[first], SIZE]  # a visit's experts are of one layer
        taken, most = last - first - lacking, pool_bytes // size_bytes
        served = 0
        while True:
            while served < lacking:
                expert = missing[served]
                miss(kind, state, reals, expert, 1)
                if taken == most:
                    if marks(kind):  # the walk for room is in vain, but it clears marks
                        victims(kind, state, reals, luck, held, wave, DEMANDED_AT, pool_bytes + 1, leaving)
                    break
                if free_bytes < size_bytes:
                    lacking_bytes = size_bytes - free_bytes
                    count = victims(kind, state, reals, luck, held, wave, DEMANDED_AT, lacking_bytes, leaving)
                    for at in range(count):
                        victim = leaving[at]
                        evict(kind, state, victim)
                        resident[victim] = False
                        free_bytes += held[victim, SIZE]
                    evicted += count
                free_bytes -= size_bytes
                held[expert, WAVE] = wave
                taken += 1
                served += 1
            for at in range(first, last):
                expert = recency[at]
                if held[expert, WAVE] == wave:
                    if resident[expert]:
                        use(kind, state, reals, expert)
                    else:
                        admit(kind, state, reals, expert, 1)
                        resident[expert] = True
            if served == lacking:
                break
            wave += 1
            taken = 0
    return evicted


#: The compiled replays by policy: (trace, steps, pool_bytes, expert_bytes, lookup) -> (outcome, evictions).
#: See `is_compiled`.
COMPILED: dict[str, Callable[..., tuple[Outcome, int]]] = {
    name: partial(replay_compiled, name) for name in [*KINDS, *NOTES, "spent"]
}
