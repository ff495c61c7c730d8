"""Eviction policies for compiled code, all of them: those of compiled_eviction.py, and those that keep more.

The same rules, by the same names, as the classes of policies/eviction.py. The functions are those of
compiled_eviction.py, which they ask for all policies that are there. For replays, what a policy learns at the beginning
of a visit that depends on no memory (guesses, tokens of sequences, scores, forward passes) is worked out once for all
capacities, as notes (engine/replay/notes.py).
"""

from __future__ import annotations

import math
import random

import numpy as np
import numpy.typing as npt

from . import compiled_eviction as common
from .compiled_eviction import SCORED
from .compiled_lines import (
    BASE,
    FADES,
    FROM_MORE,
    FROM_ONCE,
    GHOSTS,
    LAYER,
    LAYERS,
    MORE,
    NOW,
    NOWHERE,
    ONCE,
    ONCE_GHOSTS,
    PER_LAYER,
    ROOM,
    STEP,
    all_experts,
    evict_from_four,
    evict_from_two,
    first_place,
    leave,
    length_of,
    line_of,
    line_row,
    move,
    move_target,
    stamped,
    trim,
    walk_layers,
    walk_newcomers_first,
    walk_shuffled,
    walk_to_target,
)
from .compiled_orders import (
    AFTER,
    BEFORE,
    COLUMNS,
    COUNT,
    HEAP,
    KEY,
    MARK,
    NEXT,
    PLACE,
    QUEUE,
    TIE,
    Array,
    append,
    compiled,
    pop,
    push,
    rank,
    settle,
    take_out,
    unlink,
)
from .eviction_base import Setting
from .eviction_informed import ActivationAware, Heat

RANDOM, TWO_Q, ARC, LFRU, LRFU, HEAT, LEAST_STALE, ACTIVATION_AWARE, PREDICTIVE = range(SCORED + 1, SCORED + 10)
_FIRST = RANDOM

_EPSILON, _HALF_LIFE_STEPS = ActivationAware.EPSILON, Heat.HALF_LIFE_STEPS
#: Below the bits of any number from 0 on.
_BELOW_ALL = -1
#: Above the stamps of all uses, and so far above that the visit of any guess may be taken from it.
_EXPECTED = 1 << 62
#: Reals beside those of the experts.
REALS_BESIDE = 4
_STALE_PRIORITY = -1.0  # of a layer whose lowest expert may be another: it has to be looked up


def rows_beside(kind: int, layers: int) -> int:
    """Returns how many rows a state has beside those of the experts."""
    return common.EXTRA_ROWS if kind < _FIRST else max(layers, 4) + 1


def make_state(kind: int, capacity: int, layers: int, experts: int) -> tuple[Array, Array]:
    """Returns what a policy knows at first: its state, and reals. `experts` are those of one layer."""
    reals = np.zeros(layers * experts + REALS_BESIDE, dtype=np.float64)
    state = np.zeros((layers * experts + rows_beside(kind, layers), COLUMNS), dtype=np.int64)
    begin_state(kind, state, reals, capacity, layers, experts)
    return state, reals


def begin_state(kind: int, state: Array, reals: Array, capacity: int, layers: int, experts: int) -> None:
    """Lay out what a policy knows at first of a pool, in arrays that are all 0, as `make_state` makes them."""
    if kind < _FIRST:
        common.begin_states(kind, state[None], [capacity])
        return
    total = layers * experts
    state[:total, QUEUE] = NOWHERE
    lines = np.arange(total, len(state) - 1)
    state[lines, BEFORE] = state[lines, AFTER] = lines
    state[-1, [PER_LAYER, LAYERS]] = experts, layers
    if kind == TWO_Q:
        state[-1, [ROOM, GHOSTS]] = capacity // 4, capacity // 2
    else:
        state[-1, ROOM] = max(1, capacity // 2) if kind == LFRU else capacity
    reals[total + FADES], reals[total + BASE] = 1.0 / max(1, capacity), 2.0
    if kind == HEAT:
        reals[:total] = -math.inf
    elif kind == LEAST_STALE:
        state[-1, STEP] = -1


#: How many words `luck` has.
LUCK_WORDS = 625


def luck(setting: Setting) -> npt.NDArray[np.int64]:
    """Returns the words of `Random`'s generator, at last how many are used up."""
    layers = tuple(setting.first_layer + layer for layer in setting.layers)
    return np.array(random.Random(f"{setting.seed} {layers}").getstate()[1], dtype=np.int64)


@compiled
def marks(kind: int) -> bool:
    """Whether a walk for victims changes something even if nobody is evicted."""
    return kind == RANDOM or common.marks(kind)


@compiled
def note(kind: int, state: Array, reals: Array, expert: int, value: int, resident: bool) -> None:
    """Take note, as a visit begins, of what `replay.notes` says of an expert."""
    if kind == SCORED:
        common.score(state, expert, value, resident)
    elif kind == LEAST_STALE:
        state[len(state) - 1, STEP] = value
        state[len(state) - 1, LAYER] = expert // state[len(state) - 1, PER_LAYER]
    elif kind == PREDICTIVE:
        state[expert, NEXT] = value
        if resident:
            rank(state, 0, expert, _expected_key(state, expert))
    else:
        line = line_of(state, expert)
        state[line, QUEUE] += value - state[expert, NEXT]  # all of its layer's tokens
        state[expert, NEXT] = value
        reals[line - all_experts(state)] = _STALE_PRIORITY
        if resident:
            rank(state, first_place(state, expert), expert, stamped(state, state[expert, NEXT]))


@compiled
def begins(kind: int) -> bool:
    """Whether `begin_visit` and `warm` are to be told of each visit."""
    return kind in (HEAT, LEAST_STALE)


@compiled
def begin_visit(state: Array, step: int, layer: int) -> None:
    """Take note, before its look-ups, of a visit at a layer of the pool."""
    state[len(state) - 1, STEP] = step
    state[len(state) - 1, LAYER] = layer


@compiled
def warm(state: Array, reals: Array, expert: int, resident: bool) -> None:
    """Heat an expert that the visit which begins looks up: `add_decayed`, by forward passes."""
    now = state[len(state) - 1, STEP] / _HALF_LIFE_STEPS
    # The base is read, as in `_count_decayed`.
    reals[expert] = math.log2(1.0 + reals[all_experts(state) + BASE] ** (reals[expert] - now)) + now
    if resident:
        state[expert, NEXT] = stamped(state, 0)
        rank(state, 0, expert, _bits(reals[expert]))


@compiled
def has_miss(kind: int) -> bool:
    """Whether a policy wants to know who wants room before it is asked for victims."""
    return kind in (common.S3FIFO, TWO_Q, ARC)


@compiled
def miss(kind: int, state: Array, reals: Array, expert: int, demanded: int) -> None:
    """Take note, before any victim is asked for, of an absent expert that wants room, on demand (1) or not (0)."""
    if kind == ARC:
        move_target(state, reals, expert, demanded)
    elif demanded and kind == TWO_Q:
        if state[expert, QUEUE] == ONCE_GHOSTS:
            move(state, expert, FROM_ONCE)
    elif demanded and kind < _FIRST:
        common.miss(kind, state, expert)


@compiled
def use(kind: int, state: Array, reals: Array, expert: int) -> None:
    """Take note of the use of an expert in memory."""
    if kind < _FIRST:
        common.use(kind, state, expert)
    elif kind == TWO_Q:
        if state[expert, QUEUE] == MORE:
            move(state, expert, MORE)
    elif kind == ARC:
        move(state, expert, ONCE if state[expert, MARK] else MORE)
        state[expert, MARK] = 0
    elif kind == LFRU:
        _privilege(state, expert)
    elif kind == LRFU:
        _count_decayed(state, reals, expert)
    elif kind == LEAST_STALE:
        unlink(state, expert)
        append(state, line_of(state, expert), expert)
        state[expert, MARK] = state[len(state) - 1, STEP]
    elif kind == PREDICTIVE:
        state[expert, MARK] = stamped(state, 0)
        rank(state, 0, expert, _expected_key(state, expert))


@compiled
def admit(kind: int, state: Array, reals: Array, expert: int, demanded: int) -> None:
    """Take note of an expert that was given room, on demand (1), which is its use, or not (0)."""
    numbers = len(state) - 1
    if kind < _FIRST:
        common.admit(kind, state, expert, demanded)
    elif kind == RANDOM:
        state[state[numbers, COUNT], HEAP] = expert
        state[expert, PLACE] = state[numbers, COUNT]
        state[numbers, COUNT] += 1
    elif kind in (TWO_Q, ARC):
        comes_back = state[expert, QUEUE] in (FROM_ONCE, FROM_MORE)
        move(state, expert, MORE if comes_back else ONCE)
        if kind == ARC and not comes_back:
            state[expert, MARK] = 1 - demanded
            trim(state, 0)
    elif kind == LFRU:
        state[expert, MARK] = demanded
        push(state, numbers, 0, expert, stamped(state, demanded))
    elif kind == LRFU:
        reals[expert], key = -math.inf, _BELOW_ALL
        if demanded:
            reals[all_experts(state) + NOW] += reals[all_experts(state) + FADES]
            reals[expert] = reals[all_experts(state) + NOW]
            key = _bits(reals[expert])
        state[expert, NEXT] = state[expert, TIE] = stamped(state, 0)
        push(state, numbers, 0, expert, key)
    elif kind == HEAT:
        state[expert, NEXT] = state[expert, TIE] = stamped(state, 0)
        push(state, numbers, 0, expert, _bits(reals[expert]) if reals[expert] >= 0.0 else _BELOW_ALL)
    elif kind == LEAST_STALE:
        append(state, line_of(state, expert), expert)
        state[expert, MARK] = state[numbers, STEP]
    elif kind == PREDICTIVE:
        state[expert, MARK] = stamped(state, 0)
        push(state, numbers, 0, expert, _expected_key(state, expert))
    else:
        line = line_of(state, expert)
        push(state, line, first_place(state, expert), expert, stamped(state, state[expert, NEXT]))
        reals[line - all_experts(state)] = _STALE_PRIORITY


@compiled
def evict(kind: int, state: Array, expert: int) -> None:
    """Forget an expert that lost its room; `victims` has taken it out of the heap, if it was in one."""
    if kind < _FIRST:
        common.evict(kind, state, expert)
    elif kind == RANDOM:
        numbers = len(state) - 1
        state[numbers, COUNT] -= 1
        last = state[state[numbers, COUNT], HEAP]
        state[state[expert, PLACE], HEAP] = last
        state[last, PLACE] = state[expert, PLACE]
    elif kind == TWO_Q:
        evict_from_two(state, expert)
    elif kind == ARC:
        evict_from_four(state, expert)
    elif kind == LFRU:
        if state[expert, QUEUE] == MORE:
            move(state, expert, NOWHERE)
    elif kind == LEAST_STALE:
        unlink(state, expert)


@compiled
def drop(kind: int, state: Array, reals: Array, expert: int) -> None:
    """Forget an expert that loses its room without having been found by `victims`."""
    if kind < _FIRST:
        common.drop(kind, state, expert)
        return
    if kind in (LRFU, HEAT, PREDICTIVE) or (kind == LFRU and state[expert, QUEUE] != MORE):
        take_out(state, len(state) - 1, 0, expert)
    elif kind == ACTIVATION_AWARE:
        line = line_of(state, expert)
        take_out(state, line, first_place(state, expert), expert)
        reals[line - all_experts(state)] = _STALE_PRIORITY
    evict(kind, state, expert)


@compiled
def victims(
    kind: int, state: Array, reals: Array, words: Array, held: Array, wave: int, at: int, lacking_bytes: int,
    leaving: Array,
) -> int:  # fmt: skip
    """Put those into `leaving` (2 x experts,) that must go for `lacking_bytes` more, in order; return how many.

    Whoever `stays` stays. 0 if there are not enough to make the room.
    """
    if kind < _FIRST:
        return common.victims(kind, state, held, wave, at, lacking_bytes, leaving)
    if kind == RANDOM:
        return walk_shuffled(state, words, held, wave, at, lacking_bytes, leaving)
    if kind == TWO_Q:
        return walk_newcomers_first(state, held, wave, at, lacking_bytes, leaving)
    if kind == ARC:
        return walk_to_target(state, reals, held, wave, at, lacking_bytes, leaving)
    if kind == LEAST_STALE:
        return walk_layers(state, held, wave, at, lacking_bytes, leaving)
    return _walk_heaps(kind, state, reals, held, wave, at, lacking_bytes, leaving)


# Rankings: heaps of compiled_orders.py, one, or one for each layer, which the row of the layer's line counts.


@compiled
def _privilege(state: Array, expert: int) -> None:
    """Count a use, and put the expert into the privileged LRU; who is pushed out of it falls back to the others."""
    state[expert, MARK] += 1
    if state[expert, QUEUE] != MORE:
        take_out(state, len(state) - 1, 0, expert)
    move(state, expert, MORE)
    if length_of(state, MORE) > state[len(state) - 1, ROOM]:
        fallen = state[line_row(state, MORE), AFTER]
        move(state, fallen, NOWHERE)
        push(state, len(state) - 1, 0, fallen, stamped(state, state[fallen, MARK]))


@compiled
def _count_decayed(state: Array, reals: Array, expert: int) -> None:
    """Count a use of LRFU: its value is what `add_decayed` makes of it.

    That is more than before: with room for n experts, a use adds some 1 / n or more, which rounding does not take away.
    The base is read, lest the compiler takes another function for 2.0 ** x, which may round elsewhere.
    """
    experts = all_experts(state)
    now = reals[experts + NOW] = reals[experts + NOW] + reals[experts + FADES]
    value = math.log2(1.0 + reals[experts + BASE] ** (reals[expert] - now)) + now
    reals[expert] = value
    state[expert, NEXT] = stamped(state, 0)
    rank(state, 0, expert, _bits(value))


@compiled
def _bits(value: float) -> int:
    """Returns the bits of a number above 0, which are in the order of such numbers."""
    return np.float64(value).view(np.int64)  # type: ignore[return-value]


@compiled
def _expected_key(state: Array, expert: int) -> int:
    """Returns the key of predictive eviction: the last use, or, behind all those, the latest visit first.

    NEXT is the number of the visit that it is expected at, from 1 on; 0 where it is not expected.
    """
    if state[expert, NEXT] == 0:
        last_use: int = state[expert, MARK]
        return last_use
    return _EXPECTED + stamped(state, -state[expert, NEXT])


@compiled
def _lowest_layer(state: Array, reals: Array) -> int:
    """Returns the layer of the expert of least priority, -1 if nobody is in memory (activation-aware)."""
    numbers, experts, lowest = len(state) - 1, all_experts(state), -1
    for layer in range(state[numbers, LAYERS]):
        line = experts + layer
        if state[line, COUNT] == 0:
            continue
        if reals[layer] == _STALE_PRIORITY:
            top = settle(state, line, layer * state[numbers, PER_LAYER])
            share = state[top, NEXT] / max(1, state[line, QUEUE])
            reals[layer] = (share + _EPSILON) * (1.0 - layer / state[numbers, LAYERS])
        if lowest < 0 or reals[layer] < reals[lowest]:
            lowest = layer
    return lowest


@compiled
def _pop_lowest(kind: int, state: Array, reals: Array) -> int:
    """Take the expert that is first to go out of the heaps; -1 if there is none."""
    numbers = len(state) - 1
    if kind != ACTIVATION_AWARE:
        return pop(state, numbers, 0) if state[numbers, COUNT] else -1
    layer = _lowest_layer(state, reals)
    if layer < 0:
        return -1
    reals[layer] = _STALE_PRIORITY
    return pop(state, all_experts(state) + layer, layer * state[numbers, PER_LAYER])


@compiled
def _push_back(kind: int, state: Array, reals: Array, expert: int) -> None:
    """Put an expert that stays back into its heap."""
    if kind != ACTIVATION_AWARE:
        push(state, len(state) - 1, 0, expert, state[expert, KEY])
        return
    line = line_of(state, expert)
    push(state, line, first_place(state, expert), expert, state[expert, KEY])
    reals[line - all_experts(state)] = _STALE_PRIORITY


@compiled
def _walk_heaps(
    kind: int, state: Array, reals: Array, held: Array, wave: int, at: int, lacking_bytes: int, leaving: Array
) -> int:
    """Take the lowest out of the heaps, one after the other, then LFRU's privileged; who stays is put back."""
    count = 0
    aside = 2 * len(held)  # who stays waits at the back of `leaving`
    while lacking_bytes > 0:
        expert = _pop_lowest(kind, state, reals)
        if expert < 0:
            break
        freed = leave(held, wave, at, expert, count, leaving)
        count += int(freed > 0)
        lacking_bytes -= freed
        if freed == 0:
            aside -= 1
            leaving[aside] = expert
    ranked = count
    privileged = line_row(state, MORE)
    expert = state[privileged, AFTER] if kind == LFRU else privileged
    while lacking_bytes > 0 and expert != privileged:
        freed = leave(held, wave, at, expert, count, leaving)
        count += int(freed > 0)
        lacking_bytes -= freed
        expert = state[expert, AFTER]
    for place in range(aside, 2 * len(held)):
        _push_back(kind, state, reals, leaving[place])
    if lacking_bytes <= 0:
        return count
    for place in range(ranked):
        _push_back(kind, state, reals, leaving[place])
    return 0
