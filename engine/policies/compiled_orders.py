"""The orders in which compiled eviction policies keep experts: doubly linked lists, and heaps; and what each row holds.

A policy's state is one int64 array. It has a row for each expert; one for each line, which stands before its first
expert and after its last; and at last one of numbers.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from ... import machine_code
from ...machine_code import Function

Array = npt.NDArray[Any]


def compiled(function: Function) -> Function:
    """Compile a function that makes no array.

    Numba then need not count who holds which array, atomically and at every call, which would take half of the time;
    its option for that, `_nrt`, is internal.
    """
    return machine_code.within(function, _nrt=False)


# What holds an expert, by columns: the wave that pins it, the visit until which it is safe from prefetches, its bytes.
WAVE, UNTIL, SIZE = range(3)

# Columns of an expert's row, of which HEAP is that of whoever is at this place of the heap:
BEFORE, AFTER, MARK, QUEUE, NEXT, PLACE, HEAP, KEY, RANKED, TIE = range(10)
COLUMNS = 10
#: The column of the row that counts a heap's experts.
COUNT = 9


@compiled
def stays(held: Array, expert: int, wave: int, at: int) -> bool:
    """Whether an expert is pinned by this wave, or safe from what is prefetched at visit `at`."""
    held_on: bool = held[expert, WAVE] == wave or held[expert, UNTIL] > at
    return held_on


# Lines: columns BEFORE and AFTER.


@compiled
def unlink(state: Array, expert: int) -> None:
    """Take an expert out of the line that it is in."""
    before, after = state[expert, BEFORE], state[expert, AFTER]
    state[before, AFTER] = after
    state[after, BEFORE] = before


@compiled
def append(state: Array, line: int, expert: int) -> None:
    """Put an expert last in a line."""
    last = state[line, BEFORE]
    state[last, AFTER] = expert
    state[expert, BEFORE] = last
    state[expert, AFTER] = line
    state[line, BEFORE] = expert


# Heaps, the lowest key first. A key that grows (more uses) is noted and its expert sinks only when it comes to the top;
# one that falls (a later next use) rises at once. A heap is known by the row that counts its experts and by its first
# place, which is 0 where there is one heap. Equal keys go by TIE, which becomes NEXT where a grown key is settled; keys
# that carry a stamp are never equal.


@compiled
def lower(state: Array, one: int, other: int) -> bool:
    """Whether an expert stands before another."""
    key, others = state[one, RANKED], state[other, RANKED]
    is_lower: bool = key < others or (key == others and state[one, TIE] < state[other, TIE])
    return is_lower


@compiled
def rank(state: Array, first: int, expert: int, key: int) -> None:
    """Give an expert in the heap another key."""
    state[expert, KEY] = key
    if key < state[expert, RANKED]:
        state[expert, RANKED] = key
        rise(state, first, expert, state[expert, PLACE])


@compiled
def push(state: Array, counter: int, first: int, expert: int, key: int) -> None:
    """Put an expert into the heap."""
    state[expert, KEY] = state[expert, RANKED] = key
    state[counter, COUNT] += 1
    rise(state, first, expert, first + state[counter, COUNT] - 1)


@compiled
def settle(state: Array, counter: int, first: int) -> int:
    """Returns the expert with the lowest key in the heap, which is not empty."""
    while state[state[first, HEAP], RANKED] != state[state[first, HEAP], KEY]:
        top = state[first, HEAP]
        state[top, RANKED], state[top, TIE] = state[top, KEY], state[top, NEXT]
        sink(state, counter, first, top, first)
    lowest: int = state[first, HEAP]
    return lowest


@compiled
def pop(state: Array, counter: int, first: int) -> int:
    """Take the expert with the lowest key out of the heap."""
    lowest: int = settle(state, counter, first)
    take_out(state, counter, first, lowest)
    return lowest


@compiled
def take_out(state: Array, counter: int, first: int, expert: int) -> None:
    """Take an expert out of the heap."""
    place = state[expert, PLACE]
    state[counter, COUNT] -= 1
    last = state[first + state[counter, COUNT], HEAP]
    if last != expert:
        sink(state, counter, first, last, place)
        rise(state, first, last, state[last, PLACE])


@compiled
def rise(state: Array, first: int, expert: int, place: int) -> None:
    """Put an expert at a place of the heap, or as far above as it belongs."""
    while place > first:
        above = first + ((place - first - 1) >> 1)
        other = state[above, HEAP]
        if not lower(state, expert, other):
            break
        state[place, HEAP] = other
        state[other, PLACE] = place
        place = above
    state[place, HEAP] = expert
    state[expert, PLACE] = place


@compiled
def sink(state: Array, counter: int, first: int, expert: int, place: int) -> None:
    """Put an expert at a place of the heap, or as far below as it belongs."""
    end = first + state[counter, COUNT]
    while True:
        below = 2 * place - first + 1
        if below >= end:
            break
        if below + 1 < end and lower(state, state[below + 1, HEAP], state[below, HEAP]):
            below += 1
        other = state[below, HEAP]
        if not lower(state, other, expert):
            break
        state[place, HEAP] = other
        state[other, PLACE] = place
        place = below
    state[place, HEAP] = expert
    state[expert, PLACE] = place
