"""Prefetch policies, compiled: what those of `policies.prefetch` choose, merged as `dispatch` merges it.

A guess that its policy chooses is asked for; an expert that is asked for twice at one visit is for the first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...machine_words import fetch_soon
from .compiled_host_memory import stage
from .compiled_memory import prefetch
from .compiled_rooms import compiled, note_saved
from .decision_words import (
    A_EXPERT,
    A_TARGET,
    A_TIMES,
    ADAPTIVE_LINK,
    ADAPTIVE_MEMORY,
    ASKED_WORDS,
    COST_AWARE,
    D_ASKED,
    D_BACKLOG,
    D_BUDGET,
    D_CONFIDENCES,
    D_COPY_NS,
    D_DECAY,
    D_DROPPED,
    D_EXPERTS,
    D_FILTERS,
    D_FIRST_STEP,
    D_GUESSED,
    D_GUESSES,
    D_HORIZONS,
    D_K,
    D_LATER,
    D_LATER_COLUMNS,
    D_LAYER_EXPERTS,
    D_LAYERS,
    D_LEAST,
    D_MISSES,
    D_NOW,
    D_OWNED,
    D_POPULAR,
    D_PREFETCH,
    D_RANKS,
    D_SHARED,
    D_STAGES,
    D_TIER,
    D_UNIQUE,
    D_UNUSED,
    D_VISIT,
    D_WANTED,
    E_ASKED,
    E_COPY,
    E_PLACE,
    H_GPUS,
    H_OWNERS,
    MULTI_STEP,
    NEXT_LAYER,
    POPULARITY,
    Q_FIRST,
    Q_ROWS,
    X_SERVED,
    Tables,
)
from .visit_commands import S_EXPERT, S_TOKENS

Word = Any
Real = Any


@compiled
def ask(t: Tables, g: Word, expert: Word, target: Word) -> None:
    """Note that an expert is wanted, for visit `target` unless it is wanted for one before."""
    d = t.words
    if d[g + D_SHARED]:
        expert %= d[g + D_LAYER_EXPERTS]
    row, stamp = t.experts[d[g + D_EXPERTS] + expert], d[g + D_VISIT] + 1
    asked = d[g + D_ASKED]
    if row[E_ASKED] == stamp:
        d[asked + row[E_PLACE] + A_TIMES] += 1
        return
    place = 1 + d[asked] * ASKED_WORDS
    row[E_ASKED], row[E_PLACE] = stamp, place
    d[asked] += 1
    d[asked + place + A_EXPERT], d[asked + place + A_TIMES], d[asked + place + A_TARGET] = expert, 1, target
    if row[E_COPY] < 0 and d[g + D_TIER] >= 0:
        fetch_soon(t.experts[d[d[g + D_TIER] + D_EXPERTS] + expert], E_COPY)


@compiled
def serves(t: Tables, g: Word, expert: Word) -> Word:
    """Whether a GPU serves an expert."""
    d = t.words
    return d[g + D_FILTERS] == 0 or d[d[g + D_OWNED] + expert]


@compiled
def target_of(t: Tables, g: Word, step: Word, ahead: Word) -> Word:
    """Returns the visit of the layer that comes `ahead` layers after a step's first; -1 if no step has it."""
    d, layers = t.words, t.words[g + D_LAYERS]
    wraps: Word = 0
    while ahead >= layers:
        ahead -= layers
        wraps += 1
    later = d[d[g + D_LATER] + (step - d[g + D_FIRST_STEP]) * d[g + D_LATER_COLUMNS] + wraps]
    return later * layers + ahead if later >= 0 else later


@compiled
def first_guess(t: Tables, g: Word, q: Word, layer: Word, ahead: Word) -> Word:
    """Returns the place of a step's first guess, among guesses or confidences, for the layer so far ahead."""
    d = t.words
    return ((d[q + Q_FIRST] * d[g + D_LAYERS] + layer) * d[g + D_HORIZONS] + ahead - 1) * d[g + D_RANKS]


@compiled
def want(t: Tables, g: Word, expert: Word, target: Word) -> None:
    """Put a guess for visit `target` into a GPU's list."""
    d, wanted = t.words, t.words[g + D_WANTED]
    at = wanted + 1 + 2 * d[wanted]
    d[at], d[at + 1] = expert, target
    d[wanted] += 1
    fetch_soon(t.experts[d[g + D_EXPERTS] + expert], E_ASKED)


@compiled
def want_where_served(t: Tables, h: Word, expert: Word, target: Word) -> None:
    """Put a guess into the lists of those GPUs of a thread that serve the expert."""
    d, gpus = t.words, t.words[h + H_GPUS]
    owner = d[d[h + H_OWNERS] + expert]
    if owner >= 0:
        want(t, d[gpus + 1 + owner], expert, target)
        return
    for gpu in range(d[gpus]):
        if serves(t, d[gpus + 1 + gpu], expert):
            want(t, d[gpus + 1 + gpu], expert, target)


@compiled
def ask_for_guesses(t: Tables, h: Word, g: Word, q: Word, step: Word, layer: Word, share: Real) -> None:
    """Ask for guesses: those sure enough, or the first part of the ranks, so much of all; rank by rank, by token.

    A GPU asks for those that it serves; or a thread `h`, which is -1 otherwise, lists them for all of its GPUs.
    """
    d, floats, layers = t.words, t.floats, t.words[g + D_LAYERS]
    sure = d[g + D_PREFETCH] == MULTI_STEP
    least = floats[g + D_LEAST]
    rows, ranks, k = d[q + Q_ROWS], d[g + D_RANKS], d[g + D_K]
    stride = layers * d[g + D_HORIZONS] * ranks
    count = ranks * rows
    if share < 1.0:
        count = count * max(0, -np.int64(np.floor(-k * share))) // k
    for ahead in range(1, d[g + D_HORIZONS] + 1):
        target = target_of(t, g, step, layer + ahead)
        if target < 0:
            return
        first = first_guess(t, g, q, layer, ahead)
        base = 0 if d[g + D_SHARED] else (layer + ahead) % layers * d[g + D_LAYER_EXPERTS]
        rank, row = 0, 0
        for _ in range(count):
            at = first + row * stride + rank
            index = d[d[g + D_GUESSES] + at]
            counts = index >= 0 and (not sure or floats[d[g + D_CONFIDENCES] + at] >= least)
            if counts and h >= 0:
                want_where_served(t, h, base + index, target)
            elif counts and serves(t, g, base + index):
                ask(t, g, base + index, target)
            row += 1
            if row == rows:
                rank, row = rank + 1, 0
        least /= floats[g + D_DECAY]


@compiled
def ask_for_own(t: Tables, g: Word) -> None:
    """Ask for the guesses that a GPU serves, where they have been listed for all."""
    d, wanted = t.words, t.words[g + D_WANTED]
    for at in range(wanted + 1, wanted + 1 + 2 * d[wanted], 2):
        ask(t, g, d[at], d[at + 1])


@compiled
def ask_for_what_pays(t: Tables, g: Word, q: Word, step: Word, layer: Word) -> None:
    """Ask for guesses whose copy is expected to save more stall than it causes, as `CostAware` has it."""
    d, floats, layers = t.words, t.floats, t.words[g + D_LAYERS]
    copy_ns, queued_ns = d[g + D_COPY_NS], d[g + D_BACKLOG]
    number, stamp = d[g + D_VISIT], d[g + D_VISIT] + 1
    visit_ns = d[g + D_NOW] / max(1, number)
    harm_ns = min(1.0, d[g + D_MISSES] / (number + 1)) * copy_ns
    rows, ranks = d[q + Q_ROWS], d[g + D_RANKS]
    stride = layers * d[g + D_HORIZONS] * ranks
    for ahead in range(1, d[g + D_HORIZONS] + 1):
        target = target_of(t, g, step, layer + ahead)
        if target < 0:
            return
        first = first_guess(t, g, q, layer, ahead)
        base = 0 if d[g + D_SHARED] else (layer + ahead) % layers * d[g + D_LAYER_EXPERTS]
        for rank in range(ranks):
            for row in range(rows):
                at = first + row * stride + rank
                index = d[d[g + D_GUESSES] + at]
                if index < 0 or not serves(t, g, base + index):
                    continue
                hidden_ns = min(np.float64(copy_ns), max(0.0, ahead * visit_ns - queued_ns))
                confidence = floats[d[g + D_CONFIDENCES] + at]
                pays = confidence * hidden_ns > (1.0 - confidence) * harm_ns
                if not pays and d[d[g + D_ASKED]] == 0:
                    continue  # nobody has been asked for, and what is known of this one need not be fetched
                known = t.experts[d[g + D_EXPERTS] + base + index]
                if known[E_ASKED] == stamp:
                    d[d[g + D_ASKED] + known[E_PLACE] + A_TIMES] += 1
                elif pays and known[E_COPY] < 0:
                    queued_ns += copy_ns
                    ask(t, g, base + index, target)


@compiled
def ask_for_layers(t: Tables, g: Word, step: Word, layer: Word) -> None:
    """Ask for every expert of the coming layers."""
    d, experts = t.words, t.words[g + D_LAYER_EXPERTS]
    for ahead in range(1, d[g + D_HORIZONS] + 1):
        target = target_of(t, g, step, layer + ahead)
        if target < 0:
            return
        base = (layer + ahead) % d[g + D_LAYERS] * experts
        for index in range(experts):
            if serves(t, g, base + index):
                ask(t, g, base + index, target)


@compiled
def count_tokens(t: Tables, g: Word, layer: Word) -> None:
    """Count the tokens of a visit's experts."""
    d = t.words
    base = layer * d[g + D_LAYER_EXPERTS] if d[g + D_SHARED] else 0
    for number in range(d[X_SERVED]):
        served = t.served[number]
        d[d[g + D_POPULAR] + base + served[S_EXPERT]] += served[S_TOKENS]


@compiled
def ask_for_popular(t: Tables, g: Word, step: Word, layer: Word) -> None:
    """Ask for the experts of each coming layer that most tokens have chosen so far, ties to the lower index."""
    d, experts = t.words, t.words[g + D_LAYER_EXPERTS]
    for ahead in range(1, d[g + D_HORIZONS] + 1):
        target = target_of(t, g, step, layer + ahead)
        if target < 0:
            return
        base = (layer + ahead) % d[g + D_LAYERS] * experts
        last_count: Word = 1 << 62
        last_index: Word = -1
        for _ in range(min(experts, d[g + D_K])):
            most: Word = 0
            best: Word = -1
            for index in range(experts):
                count = d[d[g + D_POPULAR] + base + index]
                later = count < last_count or (count == last_count and index > last_index)
                if later and count > most:
                    most, best = count, index
            if best < 0:
                break
            if serves(t, g, base + best):
                ask(t, g, base + best, target)
            last_count, last_index = most, best


@compiled
def prefetch_for(t: Tables, g: Word, q: Word, step: Word, layer: Word) -> None:
    """Ask for what the policy wants, and give room to what of it is absent."""
    d, kind = t.words, t.words[g + D_PREFETCH]
    asked, at = d[g + D_ASKED], d[g + D_VISIT]
    d[asked] = 0
    if kind == COST_AWARE:
        ask_for_what_pays(t, g, q, step, layer)
    elif kind == NEXT_LAYER:
        ask_for_layers(t, g, step, layer)
    elif kind == POPULARITY:
        ask_for_popular(t, g, step, layer)
    elif d[g + D_WANTED] >= 0:
        ask_for_own(t, g)
    else:
        share = 1.0
        if kind == ADAPTIVE_MEMORY:
            share = 1.0 - d[g + D_UNUSED] / d[g + D_BUDGET]
        elif kind == ADAPTIVE_LINK:
            waiting = d[g + D_BACKLOG] / d[g + D_COPY_NS] if d[g + D_COPY_NS] else 0.0
            share = 1.0 - waiting / d[g + D_K]
        ask_for_guesses(t, np.int64(-1), g, q, step, layer, share)
    d[g + D_UNIQUE] += d[asked]
    guess = asked + 1
    for _ in range(d[asked]):
        expert, times, target = d[guess + A_EXPERT], d[guess + A_TIMES], d[guess + A_TARGET]
        guess += ASKED_WORDS
        d[g + D_GUESSED] += times
        if t.experts[d[g + D_EXPERTS] + expert, E_COPY] >= 0:
            continue
        if d[g + D_STAGES]:
            stage(t, g, expert)
        elif not prefetch(t, g, expert, target, at):
            d[g + D_DROPPED] += 1
        elif times > 1:
            note_saved(t, g, times - 1)
