"""One visit, decided by compiled code: what `dispatch.visits` and `tables.visit_tables` do, row for row."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...machine_words import fetch_soon
from ..policies.compiled_eviction import BELADY, DEMANDED_AT, begin
from ..policies.compiled_policies import HEAT, begin_visit, begins, warm
from ..policies.miss import CPU as ON_CPU
from ..policies.miss import DEFERRED
from .compiled_memory import claim, drop_prefetched, unpin
from .compiled_prefetch import count_tokens, prefetch_for
from .compiled_rooms import compiled, first_use, note_use, pool_of, reals_of, state_of
from .decision_words import (
    D_CHOSEN,
    D_CPU_MOST,
    D_DEFERRED,
    D_DROPS,
    D_EVICTION,
    D_EXPERTS,
    D_FETCH_FROM,
    D_FILTERS,
    D_FOLLOWED,
    D_FOLLOWING,
    D_GATES,
    D_HORIZONS,
    D_LAYER_EXPERTS,
    D_LAYERS,
    D_MISSES,
    D_ON_CPU,
    D_OWN,
    D_PER_TOKEN,
    D_PREFETCH,
    D_RECENCY,
    D_RESOLVED,
    D_RESULTS,
    D_ROOMS,
    D_SETTINGS,
    D_SHARED,
    D_TIER,
    D_UNPIN_FIRST,
    D_VISIT,
    D_WATCHES,
    D_WAVE,
    E_COPY,
    E_PLACE,
    E_ROOM,
    E_SEEN,
    E_WAVE,
    P_EXPERT,
    POPULARITY,
    Q_FIRST,
    Q_PHASE,
    Q_ROWS,
    R_AT,
    R_COUNT,
    RESOLVED_WORDS,
    X_COPIED,
    X_RESOLVED,
    X_ROOM_FOR,
    X_SERVED,
    X_TAKEN,
    X_VISIT,
    Tables,
)
from .visit_commands import (
    O_COPY,
    O_ROOM,
    R_EXPERT,
    R_TOKENS,
    R_WAY,
    S_COPY,
    S_EXPERT,
    S_FETCHED,
    S_ROOM,
    S_TOKENS,
    S_WAVE,
    SERVED_COLUMNS,
    SETTINGS,
    V_CPU_TOKENS,
    V_LAYER,
    V_NUMBER,
    V_PHASE,
    V_WAVES,
    VISIT_COLUMNS,
    order_visit,
)

Word = Any

#: Where the wave of an access stands that is served by none: it lacks its expert; it needs no expert.
_LACKS, _ELSEWHERE = -1, -2
_SETTINGS = len(SETTINGS)


@compiled
def first_chosen(t: Tables, g: Word, q: Word, layer: Word, row: Word) -> Word:
    """Returns where the choices of a row of a step begin, among those that are laid out."""
    d = t.words
    return ((d[q + Q_FIRST] + row) * d[g + D_LAYERS] + layer) * d[g + D_PER_TOKEN]


@compiled
def look_up(t: Tables, g: Word, q: Word, layer: Word) -> None:
    """List a visit's unique experts in order of access, with the tokens of each, and in order of last appearance."""
    d, rows, k = t.words, t.words[q + Q_ROWS], t.words[g + D_PER_TOKEN]
    base = 0 if d[g + D_SHARED] else layer * d[g + D_LAYER_EXPERTS]
    stamp, count, recency = d[g + D_VISIT] + 1, np.int64(0), d[g + D_RECENCY]
    begin, each = d[g + D_CHOSEN] + first_chosen(t, g, q, layer, np.int64(0)), d[g + D_LAYERS] * k
    if d[g + D_FILTERS]:  # what it serves stands in one list
        begin, k, rows = d[g + D_OWN] + 1, d[d[g + D_OWN]], 1
    for token in range(rows):
        first = begin + token * each
        for at in range(first, first + k):
            if d[at] < 0:
                break
            expert = base + d[at]
            row = t.experts[d[g + D_EXPERTS] + expert]
            if row[E_SEEN] == stamp:
                t.served[row[E_PLACE], S_TOKENS] += 1
                continue
            row[E_SEEN], row[E_PLACE] = stamp, count
            t.served[count, S_EXPERT], t.served[count, S_TOKENS] = expert, 1
            d[recency + count] = expert
            count += 1
            if row[E_COPY] < 0 and d[g + D_TIER] >= 0:
                fetch_soon(t.experts[d[d[g + D_TIER] + D_EXPERTS] + expert], E_COPY)
    d[X_SERVED] = count
    place = count if d[q + Q_ROWS] > 1 else 0
    token = rows - 1
    while place > 0:
        first = begin + token * each
        for at in range(first + k - 1, first - 1, -1):
            if d[at] < 0:
                continue
            row = t.experts[d[g + D_EXPERTS] + base + d[at]]
            if row[E_SEEN] == stamp:
                row[E_SEEN] = -stamp
                place -= 1
                d[recency + place] = base + d[at]
        token -= 1


@compiled
def find(t: Tables, g: Word) -> Word:
    """Find the experts of a visit that have room; return how many lack it."""
    d = t.words
    lacking: Word = 0
    for number in range(d[X_SERVED]):
        served = t.served[number]
        row = t.experts[d[g + D_EXPERTS] + served[S_EXPERT]]
        if row[E_COPY] < 0:
            served[S_WAVE] = _LACKS
            lacking += 1
            continue
        served[S_COPY], served[S_ROOM], served[S_WAVE], served[S_FETCHED] = row[E_COPY], row[E_ROOM], 0, 0
        row[E_WAVE] = d[g + D_WAVE]
        if d[g + D_WATCHES]:
            first_use(t, g, served[S_EXPERT])
    return lacking


@compiled
def note_wave(t: Tables, g: Word, p: Word, wave: Word) -> None:
    """Tell the policy what a wave used, in the order of last appearance; a miss is an admission, no use."""
    d = t.words
    for number in range(d[X_SERVED]):
        expert = d[d[g + D_RECENCY] + number]
        served = t.served[t.experts[d[g + D_EXPERTS] + expert, E_PLACE]]
        if served[S_WAVE] == wave:
            note_use(t, g, p, expert, 1 - served[S_FETCHED])


@compiled
def fetch(t: Tables, g: Word, wave: Word) -> Word:
    """Give room to experts that lack it, in order, until one finds none; whether all have it."""
    d = t.words
    for number in range(d[X_SERVED]):
        served = t.served[number]
        if served[S_WAVE] != _LACKS:
            continue
        expert, copied = served[S_EXPERT], t.copies[d[X_COPIED]]
        if not claim(t, g, expert, wave, d[g + D_VISIT], DEMANDED_AT):
            return False
        served[S_COPY], served[S_ROOM], served[S_WAVE], served[S_FETCHED] = copied[O_COPY], copied[O_ROOM], wave, 1
        t.experts[d[g + D_EXPERTS] + expert, E_WAVE] = d[g + D_WAVE]
    return True


@compiled
def among_best(t: Tables, g: Word, first: Word, place: Word, most: Word) -> bool:
    """Whether one of a token's choices, which begin at `first`, is among its best `most` by gate weight.

    Ties, and choices without gate weights, go by their order.
    """
    d, better = t.words, np.int64(0)
    for at in range(first, first + d[g + D_PER_TOKEN]):
        if d[d[g + D_CHOSEN] + at] < 0 or at == place:
            continue
        if d[g + D_GATES] < 0 or t.floats[d[g + D_GATES] + at] == t.floats[d[g + D_GATES] + place]:
            better += at < place
        elif t.floats[d[g + D_GATES] + at] > t.floats[d[g + D_GATES] + place]:
            better += 1
    return bool(better < most)


@compiled
def way_on_cpu(t: Tables, g: Word, q: Word, layer: Word, expert: Word) -> Word:
    """Returns whether the CPU computes an expert for this layer or, if no token has it among its best, for the next."""
    d, k = t.words, t.words[g + D_PER_TOKEN]
    if d[g + D_DEFERRED] == 0 or layer == d[g + D_LAYERS] - 1:
        return np.int64(ON_CPU)
    for token in range(d[q + Q_ROWS]):
        first = first_chosen(t, g, q, layer, token)
        for at in range(first, first + k):
            chosen = d[d[g + D_CHOSEN] + at] + layer * d[g + D_LAYER_EXPERTS] == expert
            if chosen and among_best(t, g, first, at, k - d[g + D_DEFERRED]):
                return np.int64(ON_CPU)
    return np.int64(DEFERRED)


@compiled
def note_resolved(t: Tables, g: Word, q: Word, layer: Word, number: Word) -> None:
    """Note that the CPU computes all of an access: its tokens, and the sum of their gate weights."""
    d, served, k = t.words, t.served[number], t.words[g + D_PER_TOKEN]
    expert, gate = served[S_EXPERT], 0.0
    way = way_on_cpu(t, g, q, layer, expert)
    if d[g + D_GATES] < 0:
        gate = float(served[S_TOKENS])
    else:
        base = 0 if d[g + D_SHARED] else layer * d[g + D_LAYER_EXPERTS]
        for token in range(d[q + Q_ROWS]):
            first = first_chosen(t, g, q, layer, token)
            for at in range(first, first + k):
                if d[d[g + D_CHOSEN] + at] + base == expert:
                    gate += t.floats[d[g + D_GATES] + at]
    row = t.resolved[d[X_RESOLVED]]
    row[R_EXPERT], row[R_WAY], row[R_TOKENS] = expert, way, served[S_TOKENS]
    d[X_RESOLVED] += 1
    region = d[g + D_RESOLVED]
    at = d[region + R_AT] + d[region + R_COUNT] * RESOLVED_WORDS
    d[at], d[at + 1], d[at + 2], d[at + 3] = d[g + D_VISIT], expert, way, served[S_TOKENS]
    t.floats[at + 4] = gate
    d[region + R_COUNT] += 1


@compiled
def send_to_cpu(t: Tables, g: Word, q: Word, layer: Word) -> Word:
    """Let the CPU compute absent experts that few enough tokens chose; return for how many tokens it does."""
    d, most = t.words, t.words[g + D_CPU_MOST]
    for number in range(d[X_SERVED]):
        served = t.served[number]
        if served[S_WAVE] == _LACKS and (most < 0 or served[S_TOKENS] <= most):
            served[S_WAVE] = _ELSEWHERE
            note_resolved(t, g, q, layer, number)
    tokens: Word = 0
    if d[X_RESOLVED] == 0:
        return tokens
    base = 0 if d[g + D_SHARED] else layer * d[g + D_LAYER_EXPERTS]
    for token in range(d[q + Q_ROWS]):
        first = d[g + D_CHOSEN] + first_chosen(t, g, q, layer, token)
        for at in range(first, first + d[g + D_PER_TOKEN]):
            if d[at] >= 0:
                place = t.experts[d[g + D_EXPERTS] + base + d[at], E_PLACE]
                if t.served[place, S_WAVE] == _ELSEWHERE:
                    tokens += 1
                    break
    return tokens


@compiled
def leave_out_resolved(t: Tables) -> None:
    """Take out of the table of accesses those that need no expert of the GPU's."""
    d = t.words
    kept: Word = 0
    for number in range(d[X_SERVED]):
        if t.served[number, S_WAVE] == _ELSEWHERE:
            continue
        if kept < number:
            for column in range(SERVED_COLUMNS):
                t.served[kept, column] = t.served[number, column]
        kept += 1
    d[X_SERVED] = kept


@compiled
def note_next_uses(t: Tables, g: Word, p: Word) -> None:
    """Let the policy of a memory's pool that knows the future know when the experts of a visit are used next."""
    d = t.words
    if d[g + D_EVICTION] != BELADY:
        return
    state = state_of(t, p)
    first = d[g + D_FOLLOWING] + d[g + D_FOLLOWED]
    for number in range(d[X_SERVED]):
        begin(state, t.served[number, S_EXPERT] - d[p + P_EXPERT], d[first + number])
    d[g + D_FOLLOWED] += d[X_SERVED]


@compiled
def note_visit(t: Tables, g: Word, holder: Word, p: Word, layer: Word) -> None:
    """Let the policy of a memory's pool, a GPU's or the host's below it, know of a visit and what it looks up."""
    d = t.words
    if not begins(d[holder + D_EVICTION]):
        return
    state, reals = state_of(t, p), reals_of(t, p)
    begin_visit(state, d[g + D_VISIT] // d[g + D_LAYERS], layer - d[p + P_EXPERT] // d[g + D_LAYER_EXPERTS])
    if d[holder + D_EVICTION] != HEAT:
        return
    for number in range(d[X_SERVED]):
        expert = d[d[g + D_RECENCY] + number]
        warm(state, reals, expert - d[p + P_EXPERT], t.experts[d[holder + D_EXPERTS] + expert, E_COPY] >= 0)


@compiled
def serve(t: Tables, g: Word, q: Word, layer: Word) -> None:
    """Serve a visit's look-ups, wave by wave; what the last wave holds stays pinned."""
    d, visit, p = t.words, t.words[X_VISIT], pool_of(t, g, layer * t.words[g + D_LAYER_EXPERTS])
    note_next_uses(t, g, p)
    note_visit(t, g, g, p, layer)
    if d[g + D_TIER] >= 0:
        host, of_host = d[g + D_TIER], pool_of(t, d[g + D_TIER], np.int64(0))
        note_next_uses(t, host, of_host)
        note_visit(t, g, host, of_host, layer)
    lacking = find(t, g)
    on_cpu = lacking and d[g + D_ON_CPU] and (d[g + D_FETCH_FROM] < 0 or d[q + Q_ROWS] < d[g + D_FETCH_FROM])
    d[visit + V_CPU_TOKENS] = send_to_cpu(t, g, q, layer) if on_cpu else 0
    d[g + D_MISSES] += lacking
    wave: Word = 0
    while True:
        served = lacking == 0 or fetch(t, g, wave)
        note_wave(t, g, p, wave)
        if served:
            break
        unpin(t, g)
        wave += 1
    d[visit + V_WAVES] = wave + 1


@compiled
def decide_visit(t: Tables, g: Word, q: Word, step: Word, layer: Word) -> None:
    """Decide a visit, and write what it comes to into the tables; `q` is where the step is laid out."""
    d, visit = t.words, t.words[X_VISIT]
    d[X_SERVED], d[X_COPIED], d[X_TAKEN], d[X_RESOLVED] = 0, 0, 0, 0
    number = step * d[g + D_LAYERS] + layer
    d[g + D_VISIT] = number
    d[visit + V_NUMBER], d[visit + V_LAYER], d[visit + V_PHASE] = number, layer, d[q + Q_PHASE]
    look_up(t, g, q, layer)
    if d[g + D_PREFETCH] == POPULARITY:
        count_tokens(t, g, layer)
    serve(t, g, q, layer)
    if d[g + D_HORIZONS] == 0:
        unpin(t, g)
    elif d[g + D_UNPIN_FIRST]:
        unpin(t, g)
        if d[g + D_DROPS]:
            drop_prefetched(t, g, number)
        prefetch_for(t, g, q, step, layer)
    else:
        prefetch_for(t, g, q, step, layer)
        unpin(t, g)
    if d[X_RESOLVED]:
        leave_out_resolved(t)


@compiled
def order_own(t: Tables, g: Word) -> None:
    """Order what a GPU's visit comes to, now that it is decided."""
    d = t.words
    d[g + D_RESULTS] = order_visit(
        d[d[g + D_SETTINGS] : d[g + D_SETTINGS] + _SETTINGS],
        d[d[g + D_ROOMS] : d[g + D_ROOMS] + d[X_ROOM_FOR]],
        d[d[X_VISIT] : d[X_VISIT] + VISIT_COLUMNS],
        t.served[: d[X_SERVED]],
        t.copies[: d[X_COPIED]],
        t.taken[: d[X_TAKEN]],
        t.resolved[: d[X_RESOLVED]],
        t.rows,
    )
