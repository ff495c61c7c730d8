"""Eviction policies for compiled code: what each does when an expert is used, admitted, evicted or must make room.

The same rules, by the same names, as the classes of policies/eviction.py, over arrays instead of dicts. Which one it
is, is a number that every function branches on, so that one loop is compiled, once, for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .compiled_orders import (
    AFTER,
    BEFORE,
    COUNT,
    KEY,
    MARK,
    NEXT,
    QUEUE,
    SIZE,
    Array,
    append,
    compiled,
    pop,
    push,
    rank,
    stays,
    take_out,
    unlink,
)

FIFO, LRU, LFU, LFU_INCACHE, CLOCK, SIEVE, S3FIFO, BELADY, STATIC, PRELOADED, SPENT, SCORED = range(12)

#: Later than any visit: who makes room on demand, from which nothing but a pin is safe.
DEMANDED_AT = 1 << 62

#: Rows of a state beside those of the experts: three queues, and the numbers.
EXTRA_ROWS = 4
# Columns of the last row: where Sieve's hand is, S3-FIFO's limits and lengths, the last stamp; then COUNT.
HAND, MOST_SMALL, MOST_MAIN, MOST_GHOSTS, IN_SMALL, IN_MAIN, IN_GHOSTS, HAS_EVICTED, STAMP = range(9)
# Where S3-FIFO has an expert; the first three are queues. Who keeps what was preloaded has that in MAIN, and what was
# demanded in SMALL. The other policies have one queue, SMALL.
SMALL, MAIN, GHOSTS, RETURNING, NOWHERE = range(5)

_FAR = 2**31 - 1


def begin_states(kind: int, states: Array, capacities: Sequence[int]) -> None:
    """Lay out what a policy knows at first of some pools; `states` (pools, experts + EXTRA_ROWS, COLUMNS) are all 0.

    `capacities` are how many of the largest experts each pool holds.
    """
    experts, held = states.shape[1] - EXTRA_ROWS, np.array(capacities, dtype=np.int64)
    if kind == S3FIFO:  # the others do not look at it, and what nobody has written to costs nothing
        states[:, :experts, QUEUE] = NOWHERE
    for queue in range(experts, experts + 3):
        states[:, queue, [BEFORE, AFTER]] = queue
    states[:, -1, HAND] = experts
    states[:, -1, MOST_SMALL] = -(-held // 10)
    states[:, -1, MOST_MAIN] = held + -held // 10
    states[:, -1, MOST_GHOSTS] = held * 9 // 10


@compiled
def marks(kind: int) -> bool:
    """Whether a walk for victims changes something even if nobody is evicted."""
    return kind in (CLOCK, SIEVE, S3FIFO)


@compiled
def ranks(kind: int) -> bool:
    """Whether a policy keeps its experts in a heap, out of which `victims` takes whom it returns."""
    return kind in (LFU, LFU_INCACHE, BELADY, STATIC, SCORED)


@compiled
def drop(kind: int, state: Array, expert: int) -> None:
    """Forget an expert that loses its room without having been found by `victims`."""
    if ranks(kind):
        take_out(state, len(state) - 1, 0, expert)
    evict(kind, state, expert)


@compiled
def begin(state: Array, expert: int, following: int) -> None:
    """Take note of the visit that will use an expert next after this one."""
    state[expert, NEXT] = following


@compiled
def score(state: Array, expert: int, order: int, resident: bool) -> None:
    """Take note, as a visit begins, of the rank among all scores of an expert that it looks up."""
    state[expert, NEXT] = order
    if resident:
        rank(state, 0, expert, _priority(SCORED, state, expert, 0))


@compiled
def miss(kind: int, state: Array, expert: int) -> None:
    """Take note, before any victim is asked for, of an absent expert that wants room."""
    if kind == S3FIFO and state[expert, QUEUE] == GHOSTS:
        _move(state, expert, RETURNING)


@compiled
def use(kind: int, state: Array, expert: int) -> None:
    """Take note of the use of an expert in memory."""
    if kind in (CLOCK, SIEVE):
        state[expert, MARK] = 1
    elif kind == S3FIFO:
        state[expert, MARK] += 1
    elif kind == LRU:
        unlink(state, expert)
        append(state, _queue(state, SMALL), expert)
    elif kind not in (FIFO, STATIC, PRELOADED, SPENT, SCORED):
        rank(state, 0, expert, _priority(kind, state, expert, 1))


@compiled
def admit(kind: int, state: Array, expert: int, demanded: int) -> None:
    """Take note of an expert that was given room, on demand (1), which is its use, or by a prefetch (0)."""
    if kind == S3FIFO:
        _admit_to_queue(state, expert)
    elif ranks(kind):
        push(state, len(state) - 1, 0, expert, _priority(kind, state, expert, demanded))
    else:
        state[expert, MARK] = 0
        kept = kind in (PRELOADED, SPENT) and not demanded
        append(state, _queue(state, MAIN if kept else SMALL), expert)


@compiled
def evict(kind: int, state: Array, expert: int) -> None:
    """Forget an expert that lost its room; `victims` has taken it out of the heap, if it was in one."""
    if kind == S3FIFO:
        _evict_from_queue(state, expert)
    elif kind == LFU_INCACHE:
        state[expert, MARK] = 0
    elif not ranks(kind):
        if kind == SIEVE and state[len(state) - 1, HAND] == expert:
            state[len(state) - 1, HAND] = state[expert, AFTER]
        unlink(state, expert)


@compiled
def victims(kind: int, state: Array, held: Array, wave: int, at: int, lacking_bytes: int, leaving: Array) -> int:
    """Put those into `leaving` (2 x experts,) that must go for `lacking_bytes` more, in order; return how many.

    Whoever `stays` stays. 0 if there are not enough to make the room.
    """
    if kind == CLOCK:
        return _walk_clock(state, held, wave, at, lacking_bytes, leaving)
    if kind == SIEVE:
        return _walk_sieve(state, held, wave, at, lacking_bytes, leaving)
    if kind == S3FIFO:
        return _walk_queues(state, held, wave, at, lacking_bytes, leaving)
    if kind in (FIFO, LRU, PRELOADED, SPENT):
        last = MAIN if kind in (PRELOADED, SPENT) else SMALL
        return _walk_until(last, state, held, wave, at, lacking_bytes, leaving)
    return _walk_heap(state, held, wave, at, lacking_bytes, leaving)


@compiled
def next_victim(state: Array) -> int:
    """Returns who is likely to go next: the first in line where a policy has a line, else a row that is no expert's."""
    first: int = state[_queue(state, SMALL), AFTER]
    return first


# Queues.


@compiled
def _queue(state: Array, queue: int) -> int:
    """Returns a queue's own node."""
    return len(state) - 4 + queue


@compiled
def _walk_until(last: int, state: Array, held: Array, wave: int, at: int, lacking_bytes: int, leaving: Array) -> int:
    """Walk the queues up to the last that is to be walked, each from its first to its last."""
    count = 0
    for number in range(SMALL, last + 1):
        queue = _queue(state, number)
        expert = state[queue, AFTER]
        while lacking_bytes > 0 and expert != queue:
            if not stays(held, expert, wave, at):
                leaving[count] = expert
                count += 1
                lacking_bytes -= held[expert, SIZE]
            expert = state[expert, AFTER]
    return count if lacking_bytes <= 0 else 0


@compiled
def _walk_clock(state: Array, held: Array, wave: int, at: int, lacking_bytes: int, leaving: Array) -> int:
    """Walk from the hand; who is marked loses the mark and is put behind the hand."""
    queue = _queue(state, SMALL)
    expert = state[queue, AFTER]
    count = 0
    while lacking_bytes > 0 and expert != queue:
        following = state[expert, AFTER]
        if state[expert, MARK]:
            state[expert, MARK] = 0
            unlink(state, expert)
            append(state, queue, expert)
            if following == queue:
                following = expert
        elif not stays(held, expert, wave, at):
            leaving[count] = expert
            count += 1
            lacking_bytes -= held[expert, SIZE]
        expert = following
    return count if lacking_bytes <= 0 else 0


@compiled
def _walk_sieve(state: Array, held: Array, wave: int, at: int, lacking_bytes: int, leaving: Array) -> int:
    """Walk from the hand to the newest, then from the oldest; who is marked loses the mark and comes last."""
    queue = _queue(state, SMALL)
    start = state[queue, AFTER] if state[len(state) - 1, HAND] == queue else state[len(state) - 1, HAND]
    expert = start
    count = 0
    end = spared = 2 * len(held)  # who is spared waits at the back of `leaving`
    while lacking_bytes > 0 and expert != queue:
        if state[expert, MARK]:
            state[expert, MARK] = 0
            spared -= 1
            leaving[spared] = expert
        elif not stays(held, expert, wave, at):
            state[len(state) - 1, HAND] = leaving[count] = expert
            count += 1
            lacking_bytes -= held[expert, SIZE]
        expert = state[expert, AFTER]
        if expert == queue:
            expert = state[queue, AFTER]
        if expert == start:
            break
    while lacking_bytes > 0 and end > spared:
        end -= 1
        expert = leaving[end]
        if not stays(held, expert, wave, at):
            state[len(state) - 1, HAND] = leaving[count] = expert
            count += 1
            lacking_bytes -= held[expert, SIZE]
    if lacking_bytes > 0:
        state[len(state) - 1, HAND] = start
    return count if lacking_bytes <= 0 else 0


# S3-FIFO: two queues of experts in memory, and one of those that were evicted from the small one.


@compiled
def _move(state: Array, expert: int, queue: int) -> None:
    """Take an expert out of the queue that it is in, if it is in one, and put it last in another, or nowhere."""
    old = state[expert, QUEUE]
    if old <= GHOSTS:
        unlink(state, expert)
        state[len(state) - 1, IN_SMALL + old] -= 1
    state[expert, QUEUE] = queue
    if queue <= GHOSTS:
        append(state, _queue(state, queue), expert)
        state[len(state) - 1, IN_SMALL + queue] += 1


@compiled
def _admit_to_queue(state: Array, expert: int) -> None:
    """Put it last in the queue where it belongs, with no uses."""
    is_full = (
        not state[len(state) - 1, HAS_EVICTED] and state[len(state) - 1, IN_SMALL] >= state[len(state) - 1, MOST_SMALL]
    )
    state[expert, MARK] = 0
    _move(state, expert, MAIN if is_full or state[expert, QUEUE] == RETURNING else SMALL)


@compiled
def _evict_from_queue(state: Array, expert: int) -> None:
    """Take it out of its queue; remember a newcomer."""
    state[len(state) - 1, HAS_EVICTED] = 1
    if state[expert, QUEUE] == MAIN:
        _move(state, expert, NOWHERE)
        return
    _move(state, expert, GHOSTS)
    if state[len(state) - 1, IN_GHOSTS] > state[len(state) - 1, MOST_GHOSTS]:
        _move(state, state[_queue(state, GHOSTS), AFTER], NOWHERE)


@compiled
def _walk_queues(state: Array, held: Array, wave: int, at: int, lacking_bytes: int, leaving: Array) -> int:
    """Walk the main queue while it has more than its part, else the small one; who earned it moves and stays."""
    small, main = _queue(state, SMALL), _queue(state, MAIN)
    in_small, in_main = small, main  # the last in each queue that was walked over and stayed
    count = 0
    while lacking_bytes > 0:
        expert = state[in_main, AFTER]
        if expert != main and (
            state[len(state) - 1, IN_MAIN] > state[len(state) - 1, MOST_MAIN] or state[in_small, AFTER] == small
        ):
            while state[expert, MARK]:
                state[expert, MARK] = min(state[expert, MARK], 3) - 1
                _move(state, expert, MAIN)
                expert = state[in_main, AFTER]
            in_main = expert
        else:
            expert = state[in_small, AFTER]
            while expert != small and state[expert, MARK] >= 2:
                state[expert, MARK] = 0
                _move(state, expert, MAIN)
                expert = state[in_small, AFTER]
            if expert == small:
                if state[in_main, AFTER] == main:
                    break
                continue
            in_small = expert
        if not stays(held, expert, wave, at):
            leaving[count] = expert
            count += 1
            lacking_bytes -= held[expert, SIZE]
    return count if lacking_bytes <= 0 else 0


# Rankings: a heap of compiled_orders.py, by (rank, stamp).


@compiled
def _priority(kind: int, state: Array, expert: int, used: int) -> int:
    """Returns the key of an expert that was used, or came: its uses, or how near its next one is; ties to who came."""
    state[len(state) - 1, STAMP] += 1
    if kind == BELADY:
        order = _FAR - state[expert, NEXT]
    elif kind in (STATIC, SCORED):
        order = state[expert, NEXT]
    else:
        order = state[expert, MARK] = state[expert, MARK] + used
    key: int = (order << 32) | state[len(state) - 1, STAMP]
    return key


@compiled
def _walk_heap(state: Array, held: Array, wave: int, at: int, lacking_bytes: int, leaving: Array) -> int:
    """Take the lowest out of the heap, one after the other; who stays is put back, and all if they are not enough."""
    count = 0
    end = aside = 2 * len(held)  # who stays waits at the back of `leaving`
    while lacking_bytes > 0 and state[len(state) - 1, COUNT]:
        expert = pop(state, len(state) - 1, 0)
        if stays(held, expert, wave, at):
            aside -= 1
            leaving[aside] = expert
        else:
            leaving[count] = expert
            count += 1
            lacking_bytes -= held[expert, SIZE]
    for place in range(aside, end):
        push(state, len(state) - 1, 0, leaving[place], state[leaving[place], KEY])
    if lacking_bytes <= 0:
        return count
    for place in range(count):
        push(state, len(state) - 1, 0, leaving[place], state[leaving[place], KEY])
    return 0
