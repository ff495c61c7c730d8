"""Coupled lanes, compiled: those that slow each other down, or share a link or an engine."""

from __future__ import annotations

import numpy as np

from .compiled_agenda import reschedule
from .compiled_work import Reals, Word, Words, compiled, entry
from .memory import (
    ASKED,
    ASKED_FOR,
    CROWD_BUSY,
    CROWD_LANES,
    CROWD_TIMES,
    L_ACTIVE,
    L_CROWD,
    L_DISTURBERS,
    L_END,
    L_LEFT,
    L_NEIGHBORS,
    L_SHARING,
    L_SHARING_FACTOR,
    L_SINCE,
    L_SLOT,
    L_SLOWED_BY,
    L_STRETCH,
    NOW,
    RATE_FOUND,
    RATE_ROWS,
    RATE_WORDS,
    RATES,
    S_GROUP,
    S_LANE,
    S_MOVING,
    S_STRETCH,
    V_GROUP,
    V_MOVING,
    W_SLOWDOWN,
)

_FNV_START, _FNV_STEP = np.uint64(14695981039346656037), np.uint64(1099511628211)


# Neighbors.


@compiled
def disturbed(m: Words, lane: Word) -> Word:
    """Whether one of the disturbers is busy now."""
    others, busy = m[lane + L_DISTURBERS], False
    for at in range(others + 1, others + 1 + m[others]):
        if m[m[at] + L_ACTIVE] >= 0:
            busy = True
    return busy


@compiled
def stretch_of(m: Words, f: Reals, lane: Word) -> Word:
    """Returns how many times as long the active work takes now."""
    stretch = 1.0
    others = m[lane + L_SHARING]
    for at in range(others + 1, others + 1 + m[others]):
        if m[m[at] + L_ACTIVE] >= 0:
            stretch += 1.0
    if stretch != 1.0:
        stretch *= f[lane + L_SHARING_FACTOR]
    slot = m[lane + L_SLOT]
    if slot >= 0:
        stretch *= f[slot + S_STRETCH]
    crowd = m[lane + L_CROWD]
    if crowd >= 0:
        stretch *= f[crowd + CROWD_TIMES + m[crowd + CROWD_BUSY]]
    slowdown = f[m[lane + L_ACTIVE] + W_SLOWDOWN]
    if slowdown != 1.0 and disturbed(m, lane):
        stretch *= slowdown
    others = m[lane + L_SLOWED_BY]
    for at in range(others + 1, others + 1 + 2 * m[others], 2):
        if m[m[at] + L_ACTIVE] >= 0:
            stretch *= f[at + 1]
    return stretch


@compiled
def go_on(m: Words, f: Reals, lane: Word) -> None:
    """Let the active work go on from now at the speed that the others leave it."""
    f[lane + L_STRETCH] = stretch_of(m, f, lane)
    m[lane + L_SINCE] = m[NOW]
    m[lane + L_END] = m[NOW] + np.int64(np.rint(f[lane + L_LEFT] * f[lane + L_STRETCH]))
    reschedule(m, lane)


@compiled
def retime(m: Words, f: Reals, lane: Word) -> None:
    """Let work in progress go on at another speed, unless it ends at this instant."""
    if m[lane + L_ACTIVE] >= 0 and m[lane + L_END] > m[NOW]:
        done = (m[NOW] - m[lane + L_SINCE]) / f[lane + L_STRETCH]
        f[lane + L_LEFT] = max(0.0, f[lane + L_LEFT] - done)
        go_on(m, f, lane)


@compiled
def tell_neighbors(m: Words, f: Reals, lane: Word) -> None:
    """Let all go on that a lane's start or end has to do with."""
    others = m[lane + L_NEIGHBORS]
    for at in range(others + 1, others + 1 + m[others]):
        retime(m, f, m[at])


@compiled
def count_in_crowd(m: Words, f: Reals, lane: Word, more: Word) -> None:
    """Count a lane into its crowd, or out; the others go on at another speed, if that changes it."""
    crowd = m[lane + L_CROWD]
    before = f[crowd + CROWD_TIMES + m[crowd + CROWD_BUSY]]
    m[crowd + CROWD_BUSY] += more
    if m[crowd + CROWD_BUSY] == 0 or f[crowd + CROWD_TIMES + m[crowd + CROWD_BUSY]] == before:
        return
    others = m[crowd + CROWD_LANES]
    for at in range(others + 1, others + 1 + m[others]):
        if m[at] != lane:
            retime(m, f, m[at])


# The network: sets of transfers have rows of known stretches.


@entry
def rate_row(m: Words, slot: Word, transfer: Word) -> Word:
    """Returns where the stretches with this transfer at a slot are, or belong."""
    group = m[slot + S_GROUP]
    count = m[group]
    mark = _FNV_START ^ np.uint64(group)
    for at in range(1, count + 1):
        place = m[group + at]
        moving = transfer if place == slot else m[place + S_MOVING]
        mark = (mark ^ np.uint64(moving + 1)) * _FNV_STEP
        mark ^= mark >> np.uint64(29)
    words, rows = m[RATE_WORDS], m[RATE_ROWS]
    number: Word = np.int64(mark % np.uint64(rows))
    while True:
        row = m[RATES] + number * words
        if not m[row + V_GROUP]:
            return row
        same = m[row + V_GROUP] == group
        for at in range(1, count + 1):
            place = m[group + at]
            if same and m[row + V_MOVING + at - 1] != (transfer if place == slot else m[place + S_MOVING]):
                same = False
        if same:
            return row
        number = number + 1 if number + 1 < rows else 0


@compiled
def knows_rates(m: Words, slot: Word, transfer: Word) -> Word:
    """Whether the stretches with this transfer at a slot are known; if not, note that they are asked for."""
    m[RATE_FOUND] = rate_row(m, slot, transfer)
    if m[m[RATE_FOUND] + V_GROUP]:
        return True
    m[ASKED], m[ASKED_FOR] = slot, transfer
    return False


@compiled
def occupy(m: Words, f: Reals, slot: Word, transfer: Word) -> None:
    """Let a transfer take its part, or leave it (-1); all whose rate that changes go on at another speed.

    The rates are those that `knows_rates` has found.
    """
    group = m[slot + S_GROUP]
    values = m[RATE_FOUND] + V_MOVING + m[group]
    m[slot + S_MOVING] = transfer
    for at in range(m[group]):
        place = m[group + 1 + at]
        if place == slot:
            f[slot + S_STRETCH] = f[values + at]
        elif f[place + S_STRETCH] != f[values + at]:
            f[place + S_STRETCH] = f[values + at]
            retime(m, f, m[place + S_LANE])
