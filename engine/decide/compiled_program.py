"""The program of a host thread, portion by portion, by compiled code: `program.stages_program`, command for command."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...resources.timeline import ACTIVATION, DENSE, HEAD
from .commands import CHOICE, COMPUTE, OUTPUT, RESULTS, Op
from .compiled_memory import resize
from .compiled_rooms import compiled, entry
from .compiled_visits import decide_visit, order_own
from .decision_words import (
    D_ADMITTED,
    D_AWAITS_TOKENS,
    D_BUDGETS,
    D_END_STEP,
    D_EVICTED,
    D_FIRST_STEP,
    D_FULLEST,
    D_HAS_HEAD,
    D_LAYERS,
    D_MOST_COPIES,
    D_MOST_EVICTED,
    D_MOST_REGISTERS,
    D_NOW,
    D_POOLS,
    D_RECEIVES,
    D_RESOLVED,
    D_RESULTS,
    D_SENDS,
    D_SETTINGS,
    D_STEPS,
    D_TIER,
    D_VISIT,
    DECIDED,
    END,
    H_AT,
    H_DONE,
    H_ENDS,
    H_GPUS,
    H_IDLE_UNTIL,
    H_LAYER,
    H_SCHEDULE_NS,
    H_STEP,
    H_STEPS,
    H_SWAP_IN,
    H_SWAP_OUT,
    H_UNTIL,
    P_CAPACITY,
    Q_PHASE,
    Q_ROWS,
    Q_SAMPLED,
    R_CAPACITY,
    R_COUNT,
    ROOM,
    STEP_WORDS,
    STEPS,
    X_ASKS,
    X_COPIED,
    X_REGISTERS,
    X_ROOM_FOR,
    Tables,
)
from .visit_commands import (
    DECIDE,
    FIRST_REGISTER,
    GPU,
    LAUNCH,
    NOTICE,
    O_WAVE,
    READS_BACK,
    SCHEDULE,
    SETTINGS,
    WAITS,
    add,
    order_dense,
    order_idle,
    order_readback,
    order_swaps,
    order_tokens,
    wait,
)

Word = Any

_VISIT, _OUTPUT, _CATCH_UP, _TURN = int(Op.VISIT), int(Op.OUTPUT), int(Op.CATCH_UP), int(Op.TURN)
_RECEIVE, _SEND, _SETTINGS = int(Op.RECEIVE), int(Op.SEND), len(SETTINGS)


@compiled
def begin_layer(t: Tables, g: Word, q: Word, step: Word, layer: Word) -> None:
    """Order what comes before a layer's choice is known."""
    d, rows = t.words, t.rows
    settings = d[d[g + D_SETTINGS] : d[g + D_SETTINGS] + _SETTINGS]
    gpu, tokens = settings[GPU], d[q + Q_ROWS]
    add(rows, _VISIT, gpu, -1, -1, -1, -1, -1, -1, -1, -1, int(layer == 0))
    if layer == 0 and d[g + D_RECEIVES] >= 0 and d[d[g + D_RECEIVES] + step] >= 0:
        add(rows, _RECEIVE, gpu, DENSE, -1, -1, -1, -1, -1, -1, -1, d[d[g + D_RECEIVES] + step])
    order_dense(settings, layer, tokens, step, d[q + Q_PHASE], d[g + D_RESULTS], rows)
    d[g + D_RESULTS] = 0
    if settings[READS_BACK]:
        order_readback(settings, layer, tokens, rows)
        add(rows, NOTICE, gpu, -1, -1, -1, -1, -1, -1, settings[FIRST_REGISTER] + CHOICE, -1, -1)
    add(rows, _CATCH_UP, gpu, -1, -1, -1, -1, -1, -1, -1, -1, -1)


@compiled
def order_decided(t: Tables, g: Word, layer: Word) -> None:
    """Order what a visit comes to, now that it is decided."""
    d = t.words
    fetches = d[X_COPIED] > 0 and t.copies[0, O_WAVE] == 0
    gpu = d[d[g + D_SETTINGS] + GPU]
    add(t.rows, DECIDE, gpu, -1, -1, layer, int(fetches), -1, -1, -1, -1, d[g + D_VISIT])
    order_own(t, g)


@compiled
def end_step(t: Tables, g: Word, q: Word, step: Word) -> None:
    """Order the head of a step, and send its activations on."""
    d, rows = t.words, t.rows
    settings = d[d[g + D_SETTINGS] : d[g + D_SETTINGS] + _SETTINGS]
    gpu, first = settings[GPU], settings[FIRST_REGISTER]
    add(rows, _CATCH_UP, gpu, -1, -1, -1, -1, -1, -1, -1, -1, -1)
    sends = d[g + D_SENDS] >= 0 and d[d[g + D_SENDS] + step] > 0
    if d[g + D_RESULTS] and (d[g + D_HAS_HEAD] or sends):
        wait(rows, gpu, first + RESULTS, 1)
        d[g + D_RESULTS] = 0
    if d[g + D_HAS_HEAD]:
        add(rows, LAUNCH, gpu, HEAD, COMPUTE, -1, d[q + Q_SAMPLED], -1, -1, -1, -1, -1)
        if settings[WAITS]:
            add(rows, _OUTPUT, gpu, -1, -1, -1, -1, -1, -1, first + OUTPUT, -1, -1)
            add(rows, NOTICE, gpu, -1, -1, -1, -1, -1, -1, first + OUTPUT, -1, -1)
    if d[g + D_AWAITS_TOKENS]:
        order_tokens(settings, d[q + Q_SAMPLED], rows)
    if sends:
        add(rows, _OUTPUT, gpu, -1, -1, -1, -1, -1, -1, first + OUTPUT, -1, -1)
        wait(rows, gpu, first + OUTPUT, 1)
        add(rows, _SEND, gpu, ACTIVATION, -1, -1, -1, -1, -1, -1, -1, step)


@compiled
def has_room_to_change(t: Tables, g: Word, most: Word) -> Word:
    """Whether all that so many copies may change in a memory has room."""
    d = t.words
    admitted, evicted = d[g + D_ADMITTED], d[g + D_EVICTED]
    return (
        d[admitted + R_COUNT] + most <= d[admitted + R_CAPACITY]
        and d[evicted + R_COUNT] + d[g + D_MOST_EVICTED] <= d[evicted + R_CAPACITY]
        and d[g + D_FULLEST] + d[g + D_MOST_EVICTED] < d[d[d[g + D_POOLS] + 1] + P_CAPACITY]
    )


@compiled
def has_room_for_visit(t: Tables, g: Word) -> Word:
    """Whether all that a visit may come to has room."""
    d, most, resolved = t.words, t.words[g + D_MOST_COPIES], t.words[g + D_RESOLVED]
    return (
        d[X_REGISTERS] + d[g + D_MOST_REGISTERS] <= d[X_ROOM_FOR]
        and d[resolved + R_COUNT] + most <= d[resolved + R_CAPACITY]
        and has_room_to_change(t, g, most)
        and (d[g + D_TIER] < 0 or has_room_to_change(t, d[g + D_TIER], d[d[g + D_TIER] + D_MOST_COPIES]))
    )


@compiled
def next_gpu(t: Tables, h: Word) -> None:
    """Let a thread come to its next GPU, or to the first one with the next step."""
    d = t.words
    d[h + H_LAYER] = -1
    d[h + H_AT] += 1
    if d[h + H_AT] == d[d[h + H_GPUS]]:
        d[h + H_AT] = 0
        d[h + H_STEP] += 1


@compiled
def end_repeated(t: Tables, g: Word, h: Word, step: Word) -> None:
    """Note when the step before has ended; where somebody has come by then, what is laid out behind it is not made."""
    d = t.words
    d[d[h + H_ENDS] + step - d[g + D_FIRST_STEP] - 1] = d[g + D_NOW]
    if d[g + D_NOW] >= d[h + H_UNTIL]:
        d[g + D_END_STEP] = min(d[g + D_END_STEP], step)


@entry
def next_portion(t: Tables, h: Word) -> Word:
    """Put a thread's next portion into `rows`, decided now; return what comes of it (see `decision_words`)."""
    d, step, layer = t.words, t.words[h + H_STEP], t.words[h + H_LAYER]
    t.rows[0, 0] = 0
    if step == d[h + H_STEPS]:
        return np.int64(END)
    g = d[d[h + H_GPUS] + 1 + d[h + H_AT]]
    d[X_ASKS] = g
    if layer < 0 and d[h + H_UNTIL] and step > d[g + D_FIRST_STEP]:
        end_repeated(t, g, h, step)
    if step < d[g + D_FIRST_STEP] or step >= d[g + D_END_STEP]:
        if not d[h + H_IDLE_UNTIL]:
            return np.int64(STEPS)
        order_idle(d[d[g + D_SETTINGS] : d[g + D_SETTINGS] + _SETTINGS], d[h + H_IDLE_UNTIL], t.rows)
        d[h + H_IDLE_UNTIL] = 0
        return np.int64(DECIDED)
    q = d[g + D_STEPS] + (step - d[g + D_FIRST_STEP]) * STEP_WORDS
    if layer < 0:
        settings = d[g + D_SETTINGS]
        if d[h + H_SCHEDULE_NS]:
            add(t.rows, SCHEDULE, d[settings + GPU], -1, -1, -1, -1, -1, -1, -1, -1, d[h + H_SCHEDULE_NS])
        if d[h + H_SWAP_OUT] or d[h + H_SWAP_IN]:
            order_swaps(d[settings : settings + _SETTINGS], d[h + H_SWAP_OUT], d[h + H_SWAP_IN], t.rows)
            d[h + H_SWAP_OUT] = d[h + H_SWAP_IN] = 0
        add(t.rows, _TURN, d[settings + GPU], -1, -1, -1, -1, -1, -1, -1, -1, 1)
        begin_layer(t, g, q, step, np.int64(0))
        d[h + H_LAYER] = 0
        return np.int64(DECIDED)
    if not has_room_for_visit(t, g):
        return np.int64(ROOM)
    if layer == 0 and d[g + D_BUDGETS] >= 0:
        resize(t, g, d[g + D_BUDGETS] + (step - d[g + D_FIRST_STEP]) * d[d[g + D_POOLS]])
    decide_visit(t, g, q, step, layer)
    order_decided(t, g, layer)
    d[h + H_DONE] += 1
    if layer + 1 < d[g + D_LAYERS]:
        begin_layer(t, g, q, step, layer + 1)
        d[h + H_LAYER] = layer + 1
    else:
        end_step(t, g, q, step)
        next_gpu(t, h)
    return np.int64(DECIDED)
