"""The policies of the compiled replay: what each does when an expert is used, admitted, evicted or must make room.

The same rules, by the same names, as the classes of policies/eviction.py, over arrays instead of dicts. Which one it
is, is a number that every function branches on, so that one loop is compiled, once, for all of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FIFO, LRU, LFU, LFU_INCACHE, CLOCK, SIEVE, S3FIFO, BELADY = range(8)

# What `node` says of each expert. A queue's own node stands before its first and after its last.
BEFORE, AFTER, MARK, QUEUE, PLACE, NEXT = range(6)
# What `scalar` holds: where Sieve's hand is, S3-FIFO's limits and lengths, and how many are in the heap.
HAND, MOST_SMALL, MOST_MAIN, MOST_GHOSTS, SMALL_LENGTH, MAIN_LENGTH, GHOSTS_LENGTH, HAS_EVICTED, STAMP, RANKED = range(10)
# Where S3-FIFO has an expert; the first three are queues, numbered like their nodes. The others have one queue, SMALL.
SMALL, MAIN, GHOSTS, RETURNING, NOWHERE = range(5)

_FAR = 2**31 - 1


class State(NamedTuple):
    """Everything that a policy knows: int32 `node` (experts + 3, 6), int64 `scalar`, and a heap of experts.

    `heap` int32 (experts,) is ordered by `ranked` int64 (experts,), which lags behind `key` where that has grown.
    """

    node: Array
    scalar: Array
    heap: Array
    ranked: Array
    key: Array


@numba.njit(cache=True)
def make_state(kind: int, experts: int, capacity: int) -> State:
    """Return what a policy knows at first; `capacity` is how many of the largest experts its pool holds."""
    node = np.zeros((experts + 3, 6), dtype=np.int32)
    for queue in range(experts, experts + 3):
        node[queue, BEFORE] = node[queue, AFTER] = queue
    node[:, QUEUE] = NOWHERE
    scalar = np.zeros(10, dtype=np.int64)
    scalar[HAND] = experts
    scalar[MOST_SMALL] = int(capacity * 0.1)
    scalar[MOST_MAIN] = capacity - scalar[MOST_SMALL]
    scalar[MOST_GHOSTS] = int(capacity * 0.9)
    heap = np.empty(experts, dtype=np.int32)
    return State(node, scalar, heap, np.zeros(experts, dtype=np.int64), np.zeros(experts, dtype=np.int64))


@numba.njit(cache=True)
def marks(kind: int) -> bool:
    """Whether a walk for victims changes something even if nobody is evicted."""
    return kind == CLOCK or kind == SIEVE or kind == S3FIFO


@numba.njit(cache=True)
def begin(state: State, expert: int, following: int) -> None:
    """Take note of the visit that will use an expert next after this one."""
    state.node[expert, NEXT] = following


@numba.njit(cache=True)
def miss(kind: int, state: State, expert: int) -> None:
    """Take note, before any victim is asked for, of an absent expert that wants room."""
    if kind == S3FIFO and state.node[expert, QUEUE] == GHOSTS:
        _move(state, expert, RETURNING)


@numba.njit(cache=True)
def use(kind: int, state: State, expert: int) -> None:
    """Take note of the use of an expert in memory."""
    if kind == CLOCK or kind == SIEVE:
        state.node[expert, MARK] = 1
    elif kind == S3FIFO:
        state.node[expert, MARK] += 1
    elif kind == LRU:
        _unlink(state.node, expert)
        _append(state.node, _queue(state, SMALL), expert)
    elif kind != FIFO:
        _rank(state, expert, _priority(kind, state, expert))


@numba.njit(cache=True)
def admit(kind: int, state: State, expert: int) -> None:
    """Take note of an expert that was given room on demand, which is its use."""
    if kind == S3FIFO:
        _admit_to_queue(state, expert)
    elif kind == LFU or kind == LFU_INCACHE or kind == BELADY:
        _push(state, expert, _priority(kind, state, expert))
    else:
        state.node[expert, MARK] = 0
        _append(state.node, _queue(state, SMALL), expert)


@numba.njit(cache=True)
def evict(kind: int, state: State, expert: int) -> None:
    """Forget an expert that lost its room; `victims` has taken it out of the heap, if it was in one."""
    if kind == S3FIFO:
        _evict_from_queue(state, expert)
    elif kind == LFU_INCACHE:
        state.node[expert, MARK] = 0
    elif kind != LFU and kind != BELADY:
        if kind == SIEVE and state.scalar[HAND] == expert:
            state.scalar[HAND] = state.node[expert, AFTER]
        _unlink(state.node, expert)


@numba.njit(cache=True)
def victims(
    kind: int, state: State, pinned: Array, wave: int, sizes: Array, lacking_bytes: int, leaving: Array
) -> int:
    """Put those into `leaving` that must go for `lacking_bytes` more, first to go first; return how many.

    Who is pinned by this wave stays. If there are not enough to make the room, `leaving` is not to be used.
    """
    if kind == CLOCK:
        return _walk_clock(state, pinned, wave, sizes, lacking_bytes, leaving)
    if kind == SIEVE:
        return _walk_sieve(state, pinned, wave, sizes, lacking_bytes, leaving)
    if kind == S3FIFO:
        return _walk_queues(state, pinned, wave, sizes, lacking_bytes, leaving)
    if kind == FIFO or kind == LRU:
        return _walk_queue(state, pinned, wave, sizes, lacking_bytes, leaving)
    return _walk_heap(state, pinned, wave, sizes, lacking_bytes, leaving)


# Queues: doubly linked lists through `node`.


@numba.njit(cache=True)
def _queue(state: State, queue: int) -> int:
    """Return a queue's own node."""
    return len(state.key) + queue


@numba.njit(cache=True)
def _unlink(node: Array, expert: int) -> None:
    before, after = node[expert, BEFORE], node[expert, AFTER]
    node[before, AFTER] = after
    node[after, BEFORE] = before


@numba.njit(cache=True)
def _append(node: Array, queue: int, expert: int) -> None:
    last = node[queue, BEFORE]
    node[last, AFTER] = expert
    node[expert, BEFORE] = last
    node[expert, AFTER] = queue
    node[queue, BEFORE] = expert


@numba.njit(cache=True)
def _walk_queue(state: State, pinned: Array, wave: int, sizes: Array, lacking_bytes: int, leaving: Array) -> int:
    """Walk from the first to the last."""
    queue = _queue(state, SMALL)
    expert = state.node[queue, AFTER]
    count = 0
    while lacking_bytes > 0 and expert != queue:
        if pinned[expert] != wave:
            leaving[count] = expert
            count += 1
            lacking_bytes -= sizes[expert]
        expert = state.node[expert, AFTER]
    return count


@numba.njit(cache=True)
def _walk_clock(state: State, pinned: Array, wave: int, sizes: Array, lacking_bytes: int, leaving: Array) -> int:
    """Walk from the hand; who is marked loses the mark and is put behind the hand."""
    node, queue = state.node, _queue(state, SMALL)
    expert = node[queue, AFTER]
    count = 0
    while lacking_bytes > 0 and expert != queue:
        following = node[expert, AFTER]
        if node[expert, MARK]:
            node[expert, MARK] = 0
            _unlink(node, expert)
            _append(node, queue, expert)
            if following == queue:
                following = expert
        elif pinned[expert] != wave:
            leaving[count] = expert
            count += 1
            lacking_bytes -= sizes[expert]
        expert = following
    return count


@numba.njit(cache=True)
def _walk_sieve(state: State, pinned: Array, wave: int, sizes: Array, lacking_bytes: int, leaving: Array) -> int:
    """Walk from the hand to the newest, then from the oldest; who is marked loses the mark and comes last."""
    node, scalar, queue = state.node, state.scalar, _queue(state, SMALL)
    start = node[queue, AFTER] if scalar[HAND] == queue else scalar[HAND]
    expert = start
    count = 0
    end = spared = len(leaving)  # who is spared waits at the far end of `leaving`, backward
    while lacking_bytes > 0 and expert != queue:
        if node[expert, MARK]:
            node[expert, MARK] = 0
            spared -= 1
            leaving[spared] = expert
        elif pinned[expert] != wave:
            scalar[HAND] = leaving[count] = expert
            count += 1
            lacking_bytes -= sizes[expert]
        expert = node[expert, AFTER]
        if expert == queue:
            expert = node[queue, AFTER]
        if expert == start:
            break
    while lacking_bytes > 0 and end > spared:
        end -= 1
        expert = leaving[end]
        if pinned[expert] != wave:
            scalar[HAND] = leaving[count] = expert
            count += 1
            lacking_bytes -= sizes[expert]
    if lacking_bytes > 0:
        scalar[HAND] = start
    return count


# S3-FIFO: two queues of experts in memory, and one of those that were evicted from the small one.


@numba.njit(cache=True)
def _move(state: State, expert: int, queue: int) -> None:
    """Take an expert out of the queue that it is in, if it is in one, and put it last in another, or nowhere."""
    old = state.node[expert, QUEUE]
    if old <= GHOSTS:
        _unlink(state.node, expert)
        state.scalar[SMALL_LENGTH + old] -= 1
    state.node[expert, QUEUE] = queue
    if queue <= GHOSTS:
        _append(state.node, _queue(state, queue), expert)
        state.scalar[SMALL_LENGTH + queue] += 1


@numba.njit(cache=True)
def _admit_to_queue(state: State, expert: int) -> None:
    """Put it last in the queue where it belongs, with no uses."""
    scalar = state.scalar
    is_full = not scalar[HAS_EVICTED] and scalar[SMALL_LENGTH] >= scalar[MOST_SMALL]
    state.node[expert, MARK] = 0
    _move(state, expert, MAIN if is_full or state.node[expert, QUEUE] == RETURNING else SMALL)


@numba.njit(cache=True)
def _evict_from_queue(state: State, expert: int) -> None:
    """Take it out of its queue; remember a newcomer."""
    scalar = state.scalar
    scalar[HAS_EVICTED] = 1
    if state.node[expert, QUEUE] == MAIN:
        _move(state, expert, NOWHERE)
        return
    _move(state, expert, GHOSTS)
    if scalar[GHOSTS_LENGTH] > scalar[MOST_GHOSTS]:
        _move(state, state.node[_queue(state, GHOSTS), AFTER], NOWHERE)


@numba.njit(cache=True)
def _walk_queues(state: State, pinned: Array, wave: int, sizes: Array, lacking_bytes: int, leaving: Array) -> int:
    """Walk the main queue while it has more than its part, else the small one; who earned it moves and stays."""
    node, scalar = state.node, state.scalar
    small, main = _queue(state, SMALL), _queue(state, MAIN)
    in_small, in_main = small, main  # the last in each queue that was walked over and stayed
    count = 0
    while lacking_bytes > 0:
        expert = node[in_main, AFTER]
        if expert != main and (scalar[MAIN_LENGTH] > scalar[MOST_MAIN] or node[in_small, AFTER] == small):
            if node[expert, MARK]:
                node[expert, MARK] = min(node[expert, MARK], 3) - 1
                _move(state, expert, MAIN)
                continue
            in_main = expert
        else:
            expert = node[in_small, AFTER]
            if expert == small:
                break
            if node[expert, MARK] >= 2:
                node[expert, MARK] = 0
                _move(state, expert, MAIN)
                continue
            in_small = expert
        if pinned[expert] != wave:
            leaving[count] = expert
            count += 1
            lacking_bytes -= sizes[expert]
    return count


# Rankings: a heap, the lowest key first. A key that grows (more uses) is noted and its expert sinks only when it comes
# to the top; one that falls (a later next use) rises at once.


@numba.njit(cache=True)
def _priority(kind: int, state: State, expert: int) -> int:
    """Return the key of an expert just used: its uses, or how near its next one is; ties in the order of use."""
    state.scalar[STAMP] += 1
    if kind == BELADY:
        return ((_FAR - np.int64(state.node[expert, NEXT])) << 32) | state.scalar[STAMP]
    state.node[expert, MARK] += 1
    return (np.int64(state.node[expert, MARK]) << 32) | state.scalar[STAMP]


@numba.njit(cache=True)
def _rank(state: State, expert: int, key: int) -> None:
    """Give an expert in the heap another key."""
    state.key[expert] = key
    if key < state.ranked[expert]:
        state.ranked[expert] = key
        _rise(state, expert, state.node[expert, PLACE])


@numba.njit(cache=True)
def _push(state: State, expert: int, key: int) -> None:
    """Put an expert into the heap."""
    state.key[expert] = state.ranked[expert] = key
    state.scalar[RANKED] += 1
    _rise(state, expert, state.scalar[RANKED] - 1)


@numba.njit(cache=True)
def _pop(state: State) -> int:
    """Take the expert with the lowest key out of the heap."""
    heap, scalar = state.heap, state.scalar
    while state.ranked[heap[0]] != state.key[heap[0]]:
        state.ranked[heap[0]] = state.key[heap[0]]
        _sink(state, heap[0])
    first = heap[0]
    scalar[RANKED] -= 1
    if scalar[RANKED]:
        _sink(state, heap[scalar[RANKED]])
    return first


@numba.njit(cache=True)
def _rise(state: State, expert: int, place: int) -> None:
    """Put an expert at a place of the heap, or as far above as it belongs."""
    node, heap, ranked = state.node, state.heap, state.ranked
    while place > 0:
        above = (place - 1) >> 1
        other = heap[above]
        if ranked[other] <= ranked[expert]:
            break
        heap[place] = other
        node[other, PLACE] = place
        place = above
    heap[place] = expert
    node[expert, PLACE] = place


@numba.njit(cache=True)
def _sink(state: State, expert: int) -> None:
    """Put an expert at the top of the heap, or as far below as it belongs."""
    node, heap, ranked = state.node, state.heap, state.ranked
    size, place = state.scalar[RANKED], 0
    while True:
        below = 2 * place + 1
        if below >= size:
            break
        if below + 1 < size and ranked[heap[below + 1]] < ranked[heap[below]]:
            below += 1
        other = heap[below]
        if ranked[expert] <= ranked[other]:
            break
        heap[place] = other
        node[other, PLACE] = place
        place = below
    heap[place] = expert
    node[expert, PLACE] = place


@numba.njit(cache=True)
def _walk_heap(state: State, pinned: Array, wave: int, sizes: Array, lacking_bytes: int, leaving: Array) -> int:
    """Take the lowest out of the heap, one after the other; who is pinned is put back."""
    count = 0
    end = aside = len(leaving)  # who is pinned waits at the far end of `leaving`
    while lacking_bytes > 0:
        expert = _pop(state)
        if pinned[expert] == wave:
            aside -= 1
            leaving[aside] = expert
        else:
            leaving[count] = expert
            count += 1
            lacking_bytes -= sizes[expert]
    for expert in leaving[aside:end]:
        _push(state, expert, state.key[expert])
    return count
