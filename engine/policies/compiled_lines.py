"""What compiled policies keep in lines and lists: the parts of `random`, `2q`, `arc` and `least-stale`.

compiled_policies.py says when each is asked; the rules are those of the classes of policies/eviction.py.
"""

from __future__ import annotations

from .compiled_orders import (
    AFTER,
    COUNT,
    HEAP,
    MARK,
    PLACE,
    QUEUE,
    SIZE,
    Array,
    append,
    compiled,
    stays,
    unlink,
)

# Columns of the last row. How many experts the privileged or the newcomers may be and how many are remembered; those of
# a layer, and layers; the forward pass and its layer; what ARC knows of who wants room; the last stamp; then COUNT.
ROOM, GHOSTS, PER_LAYER, LAYERS, STEP, LAYER, IS_NEW, FAVORS_MORE, STAMP = range(9)
# Lines, by their distance from the last row; least-stale has one a layer. A line's row counts in MARK.
# 2Q has newcomers in ONCE, its main LRU in MORE and ghosts in ONCE_GHOSTS; LFRU the privileged in MORE.
ONCE, MORE, ONCE_GHOSTS, MORE_GHOSTS = range(4)
# Where else an expert may be: one that is missed and was a ghost; in no line.
FROM_ONCE, FROM_MORE, NOWHERE = range(4, 7)
# Reals beside the experts' (LRFU: its value; activation-aware: the priority of the lowest of each layer).
NOW, FADES, BASE, TARGET = range(4)


@compiled
def all_experts(state: Array) -> int:
    """Returns how many experts have rows, the first lines' rows following."""
    total: int = state[len(state) - 1, PER_LAYER] * state[len(state) - 1, LAYERS]
    return total


@compiled
def line_row(state: Array, number: int) -> int:
    """Returns the row of a line."""
    return len(state) - 2 - number


@compiled
def line_of(state: Array, expert: int) -> int:
    """Returns the row of the line, or of the heap, of an expert's layer."""
    row: int = all_experts(state) + expert // state[len(state) - 1, PER_LAYER]
    return row


@compiled
def first_place(state: Array, expert: int) -> int:
    """Returns the first place of the heap of an expert's layer."""
    per_layer = state[len(state) - 1, PER_LAYER]
    place: int = expert // per_layer * per_layer
    return place


@compiled
def stamped(state: Array, priority: int) -> int:
    """Returns a key: the priority, ties to who was put there first."""
    state[len(state) - 1, STAMP] += 1
    key: int = (priority << 32) | state[len(state) - 1, STAMP]
    return key


@compiled
def move(state: Array, expert: int, queue: int) -> None:
    """Take an expert out of the line that it is in, if it is in one, and put it last in another, or nowhere."""
    old = state[expert, QUEUE]
    if old <= MORE_GHOSTS:
        unlink(state, expert)
        state[line_row(state, old), MARK] -= 1
    state[expert, QUEUE] = queue
    if queue <= MORE_GHOSTS:
        append(state, line_row(state, queue), expert)
        state[line_row(state, queue), MARK] += 1


@compiled
def _forget_oldest(state: Array, ghosts: int) -> None:
    move(state, state[line_row(state, ghosts), AFTER], NOWHERE)


@compiled
def length_of(state: Array, queue: int) -> int:
    """Returns how many are in a line."""
    length: int = state[line_row(state, queue), MARK]
    return length


@compiled
def leave(held: Array, wave: int, at: int, expert: int, count: int, leaving: Array) -> int:
    """Returns the bytes that an expert makes free if it may go, having put it into `leaving`; else 0."""
    if stays(held, expert, wave, at):
        return 0
    leaving[count] = expert
    size_bytes: int = held[expert, SIZE]
    return size_bytes


# Random: the experts in memory are a list, columns HEAP (by place) and PLACE.


@compiled
def walk_shuffled(
    state: Array, words: Array, held: Array, wave: int, at: int, lacking_bytes: int, leaving: Array
) -> int:
    """Shuffle as far as it is walked (Fisher & Yates)."""
    count, total = 0, state[len(state) - 1, COUNT]
    for first in range(total):
        drawn = first + _below(words, total - first)
        one, other = state[drawn, HEAP], state[first, HEAP]
        state[first, HEAP], state[one, PLACE] = one, first
        if drawn != first:
            state[drawn, HEAP], state[other, PLACE] = other, drawn
        freed = leave(held, wave, at, one, count, leaving)
        count += int(freed > 0)
        lacking_bytes -= freed
        if lacking_bytes <= 0:
            return count
    return 0


@compiled
def _below(words: Array, bound: int) -> int:
    """Returns what `random.Random.randrange(bound)` does: the first draw of as many bits as `bound` that is below."""
    bits = 0
    while bound >> bits:
        bits += 1
    drawn = bound
    while drawn >= bound:
        drawn = _next_word(words) >> (32 - bits)
    return drawn


@compiled
def _next_word(words: Array) -> int:
    """Returns 32 bits of the Mersenne Twister MT19937 (Matsumoto & Nishimura, ACM TOMACS 8, 1998)."""
    if words[624] == 624:
        for at in range(624):
            joined = (words[at] & 0x80000000) | (words[(at + 1) % 624] & 0x7FFFFFFF)
            words[at] = words[(at + 397) % 624] ^ (joined >> 1) ^ ((joined & 1) * 0x9908B0DF)
        words[624] = 0
    word = words[words[624]]
    words[624] += 1
    word ^= word >> 11
    word ^= (word << 7) & 0x9D2C5680
    word ^= (word << 15) & 0xEFC60000
    tempered: int = word ^ (word >> 18)
    return tempered


# 2Q.


@compiled
def evict_from_two(state: Array, expert: int) -> None:
    """Take it out; remember a newcomer."""
    if state[expert, QUEUE] == MORE:
        move(state, expert, NOWHERE)
        return
    move(state, expert, ONCE_GHOSTS)
    if length_of(state, ONCE_GHOSTS) > state[len(state) - 1, GHOSTS]:
        _forget_oldest(state, ONCE_GHOSTS)


@compiled
def walk_newcomers_first(state: Array, held: Array, wave: int, at: int, lacking_bytes: int, leaving: Array) -> int:
    """Walk the newcomers beyond their part, then the main LRU, then the other newcomers."""
    newcomers, main = line_row(state, ONCE), line_row(state, MORE)
    excess = length_of(state, ONCE) - state[len(state) - 1, ROOM]
    new, old = state[newcomers, AFTER], state[main, AFTER]
    count = 0
    while lacking_bytes > 0:
        if new != newcomers and (excess > 0 or old == main):
            expert, new, excess = new, state[new, AFTER], excess - 1
        elif old != main:
            expert, old = old, state[old, AFTER]
        else:
            return 0
        freed = leave(held, wave, at, expert, count, leaving)
        count += int(freed > 0)
        lacking_bytes -= freed
    return count


# ARC: T1, T2, B1 and B2 are the lines ONCE, MORE, ONCE_GHOSTS and MORE_GHOSTS; who was prefetched, and is not used yet,
# is marked.


@compiled
def move_target(state: Array, reals: Array, expert: int, demanded: int) -> None:
    """Move the target towards the LRU that has forgotten this expert, if it is demanded."""
    numbers, target = len(state) - 1, all_experts(state) + TARGET
    once, more = length_of(state, ONCE_GHOSTS), length_of(state, MORE_GHOSTS)
    if demanded and state[expert, QUEUE] == ONCE_GHOSTS:
        reals[target] = min(reals[target] + max(more / once, 1.0), float(state[numbers, ROOM]))
        move(state, expert, FROM_ONCE)
    elif demanded and state[expert, QUEUE] == MORE_GHOSTS:
        reals[target] = max(reals[target] - max(once / more, 1.0), 0.0)
        move(state, expert, FROM_MORE)
    state[numbers, IS_NEW] = state[expert, QUEUE] < FROM_ONCE or state[expert, QUEUE] == NOWHERE
    state[numbers, FAVORS_MORE] = state[expert, QUEUE] == FROM_MORE


@compiled
def trim(state: Array, coming: int) -> None:
    """Forget the oldest so that T1 + B1 hold the capacity and all four twice it, with so many more to come."""
    capacity = state[len(state) - 1, ROOM]
    once = length_of(state, ONCE) + length_of(state, ONCE_GHOSTS) + coming
    if once > capacity:
        if length_of(state, ONCE_GHOSTS):
            _forget_oldest(state, ONCE_GHOSTS)
    elif length_of(state, MORE_GHOSTS) and once + length_of(state, MORE) + length_of(state, MORE_GHOSTS) > 2 * capacity:
        _forget_oldest(state, MORE_GHOSTS)


@compiled
def evict_from_four(state: Array, expert: int) -> None:
    """Take it out and remember it, unless nobody has used it or the first LRU takes up all the capacity."""
    is_new = state[len(state) - 1, IS_NEW]
    is_full = length_of(state, ONCE) >= state[len(state) - 1, ROOM]
    if is_new:
        trim(state, 1)
    if state[expert, QUEUE] == MORE:
        move(state, expert, MORE_GHOSTS)
    else:
        move(state, expert, NOWHERE if state[expert, MARK] or (is_new and is_full) else ONCE_GHOSTS)
        state[expert, MARK] = 0


@compiled
def walk_to_target(
    state: Array, reals: Array, held: Array, wave: int, at: int, lacking_bytes: int, leaving: Array
) -> int:
    """Walk the first LRU while it exceeds its target, else the second; then what is left (REPLACE)."""
    first, second = line_row(state, ONCE), line_row(state, MORE)
    target, favors_more = reals[all_experts(state) + TARGET], state[len(state) - 1, FAVORS_MORE]
    once, more, left = state[first, AFTER], state[second, AFTER], length_of(state, ONCE)
    count = 0
    while lacking_bytes > 0:
        within = left < target or (left == target and not favors_more)
        if once != first and (not within or more == second):
            expert, once, left = once, state[once, AFTER], left - 1
        elif more != second:
            expert, more = more, state[more, AFTER]
        else:
            return 0
        freed = leave(held, wave, at, expert, count, leaving)
        count += int(freed > 0)
        lacking_bytes -= freed
    return count


# Least-stale: a line for each layer, in the order of last uses, of which those of earlier forward passes come first.


@compiled
def walk_layers(state: Array, held: Array, wave: int, at: int, lacking_bytes: int, leaving: Array) -> int:
    """Walk the stale, then the fresh; layer by layer, back from the one before this."""
    numbers, count = len(state) - 1, 0
    step, layers = state[numbers, STEP], state[numbers, LAYERS]
    for fresh in range(2):
        for back in range(1, layers + 1):
            line = all_experts(state) + (state[numbers, LAYER] - back + layers) % layers
            expert = state[line, AFTER]
            while expert != line and (fresh or state[expert, MARK] != step):
                if not fresh or state[expert, MARK] == step:
                    freed = leave(held, wave, at, expert, count, leaving)
                    count += int(freed > 0)
                    lacking_bytes -= freed
                    if lacking_bytes <= 0:
                        return count
                expert = state[expert, AFTER]
    return 0
