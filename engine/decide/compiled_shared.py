"""The program of GPUs that share the experts of every layer, by compiled code: `program.SharedLayers`, row for row.

Tokens go to an owner of what they chose, or every GPU serves its own. What each exchange takes is laid out with the
steps, and so is who serves what: none of it depends on what a memory holds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...machine_words import fetch_soon
from ...resources.timeline import COMBINE, DENSE, DISPATCH, EXPERT, HEAD
from .commands import COMPUTE, FIXED_REGISTERS, OUTPUT, RESULTS, TOKENS, Op
from .compiled_memory import resize
from .compiled_prefetch import ask_for_guesses
from .compiled_program import has_room_for_visit
from .compiled_rooms import compiled, entry
from .compiled_visits import decide_visit, first_chosen, order_own
from .decision_words import (
    D_BUDGETS,
    D_CHOSEN,
    D_END_STEP,
    D_EXPERTS,
    D_FILTERS,
    D_FIRST_STEP,
    D_LAYER_EXPERTS,
    D_LAYERS,
    D_OWN,
    D_PER_TOKEN,
    D_POOLS,
    D_RESULTS,
    D_SETTINGS,
    D_STEPS,
    D_WANTED,
    DECIDED,
    E_SEEN,
    END,
    H_BACK,
    H_DONE,
    H_EXCHANGE_NS,
    H_EXCHANGES,
    H_GPUS,
    H_LAYER,
    H_LIVES,
    H_ONE,
    H_OWNERS,
    H_SERVERS,
    H_SERVES,
    H_STEP,
    H_STEPS,
    Q_PHASE,
    Q_ROWS,
    Q_SAMPLED,
    ROOM,
    STEP_WORDS,
    STEPS,
    X_ASKS,
    X_COPIED,
    Tables,
)
from .visit_commands import (
    DECIDE,
    JOIN,
    LAUNCH,
    NOTICE,
    O_WAVE,
    SETTINGS,
    TOUCH,
    add,
    order_dense,
    order_readback,
    wait,
)

Word = Any

_VISIT, _OUTPUT, _CATCH_UP, _TURN = int(Op.VISIT), int(Op.OUTPUT), int(Op.CATCH_UP), int(Op.TURN)
_RECEIVE, _CALL, _EXCHANGE, _SETTINGS = int(Op.RECEIVE), int(Op.CALL), int(Op.EXCHANGE), len(SETTINGS)


@compiled
def turn(t: Tables, h: Word, gpu: Word) -> Word:
    """Let the thread come to a GPU, if there is one for all; return where the GPU's decisions are."""
    d = t.words
    if d[h + H_ONE]:
        add(t.rows, _TURN, gpu, -1, -1, -1, -1, -1, -1, -1, -1, 0)
    return d[d[h + H_GPUS] + 1 + gpu]


@compiled
def row(t: Tables, op: Word, gpu: Word, kind: Word, register: Word) -> None:
    """Add a command that has a kind or a register alone."""
    add(t.rows, op, gpu, kind, -1, -1, -1, -1, -1, register, -1, -1)


@compiled
def receive(t: Tables, gpu: Word, kind: Word) -> None:
    """Let the next kernel, of a kind, wait for tokens."""
    row(t, _RECEIVE, gpu, kind, gpu * FIXED_REGISTERS + TOKENS)


@compiled
def begin_layer_of_all(t: Tables, h: Word, lives: Word, q: Word, layer: Word) -> None:
    """Order what comes before a layer's choices are known; `lives` is where the tokens of each GPU are."""
    d, rows = t.words, t.rows
    count = d[d[h + H_GPUS]]
    for gpu in range(count):
        g = turn(t, h, gpu)
        add(rows, _VISIT, gpu, -1, -1, -1, -1, -1, -1, -1, -1, 0)
        if d[lives + gpu]:
            if d[h + H_BACK]:
                receive(t, gpu, DENSE)
            settings = d[d[g + D_SETTINGS] : d[g + D_SETTINGS] + _SETTINGS]
            order_dense(settings, layer, d[lives + gpu], d[h + H_STEP], d[q + Q_PHASE], d[g + D_RESULTS], rows)
            d[g + D_RESULTS] = 0
    choices = count * FIXED_REGISTERS
    first = True
    for gpu in range(count):
        g = turn(t, h, gpu)
        if d[lives + gpu]:
            settings = d[d[g + D_SETTINGS] : d[g + D_SETTINGS] + _SETTINGS]
            order_readback(settings, layer, d[lives + gpu], rows)
            row(t, TOUCH if first else JOIN, gpu, -1, choices)
            first = False
    for gpu in range(count):
        turn(t, h, gpu)
        row(t, NOTICE, gpu, -1, choices)
    add(rows, _CATCH_UP, 0, -1, -1, -1, -1, -1, -1, -1, -1, 1)


@compiled
def exchange(t: Tables, h: Word, kind: Word, who: Word) -> None:
    """Order an exchange of tokens behind the last kernels of those GPUs that are marked at `who`."""
    d = t.words
    count = d[d[h + H_GPUS]]
    for gpu in range(count):
        turn(t, h, gpu)
        row(t, _CALL, gpu, -1, -1)
    for gpu in range(count):
        if d[who + gpu]:
            wait(t.rows, 0, gpu * FIXED_REGISTERS + OUTPUT, 0)
    row(t, _EXCHANGE, 0, kind, -1)


@compiled
def divide_choices(t: Tables, h: Word, q: Word, layer: Word, place: Word) -> None:
    """List for each GPU what it serves of a visit's choices, token by token."""
    d, gpus = t.words, t.words[h + H_GPUS]
    first = d[gpus + 1]
    experts, k = d[first + D_LAYER_EXPERTS], d[first + D_PER_TOKEN]
    servers = d[h + H_SERVERS] + place * experts if d[h + H_SERVERS] >= 0 else d[h + H_OWNERS] + layer * experts
    for gpu in range(d[gpus]):
        d[d[d[gpus + 1 + gpu] + D_OWN]] = 0
    for token in range(d[q + Q_ROWS]):
        begin = d[first + D_CHOSEN] + first_chosen(t, first, q, layer, token)
        for at in range(begin, begin + k):
            if d[at] < 0:
                break
            g = d[gpus + 1 + d[servers + d[at]]]
            own = d[g + D_OWN]
            d[own] += 1
            d[own + d[own]] = d[at]
            fetch_soon(t.experts[d[g + D_EXPERTS] + layer * experts + d[at]], E_SEEN)


@compiled
def divide_guesses(t: Tables, h: Word, q: Word, step: Word, layer: Word) -> None:
    """List for each GPU what it serves of the guesses that the policy asks for."""
    d, gpus = t.words, t.words[h + H_GPUS]
    for gpu in range(d[gpus]):
        d[d[d[gpus + 1 + gpu] + D_WANTED]] = 0
    ask_for_guesses(t, h, d[gpus + 1], q, step, layer, 1.0)


@compiled
def serve_all(t: Tables, h: Word, step: Word, layer: Word) -> None:
    """Decide a visit on every GPU, in order, and order what it comes to, tokens there and back included."""
    d, rows, gpus = t.words, t.rows, t.words[h + H_GPUS]
    first = d[gpus + 1]
    at = step - d[first + D_FIRST_STEP]
    place = at * d[first + D_LAYERS] + layer
    lives, serves = d[h + H_LIVES] + at * d[gpus], d[h + H_SERVES] + place * d[gpus]
    d[h + H_EXCHANGE_NS] = d[d[h + H_EXCHANGES] + place]
    moves = d[h + H_EXCHANGE_NS] > 0
    if d[first + D_FILTERS]:
        q = d[first + D_STEPS] + at * STEP_WORDS
        divide_choices(t, h, q, layer, place)
        if d[first + D_WANTED] >= 0:
            divide_guesses(t, h, q, step, layer)
    decisions = rows[0, 0]
    for gpu in range(d[gpus]):
        g = turn(t, h, gpu)
        add(rows, DECIDE, gpu, -1, -1, layer, 0, -1, -1, -1, -1, step * d[g + D_LAYERS] + layer)
    if moves:
        exchange(t, h, DISPATCH, lives)
        for gpu in range(d[gpus]):
            turn(t, h, gpu)
            if d[serves + gpu]:
                receive(t, gpu, EXPERT)
    for gpu in range(d[gpus]):
        g = turn(t, h, gpu)
        if layer == 0 and d[g + D_BUDGETS] >= 0:
            resize(t, g, d[g + D_BUDGETS] + at * d[d[g + D_POOLS]])
        decide_visit(t, g, d[g + D_STEPS] + at * STEP_WORDS, step, layer)
        decisions += 1 + d[h + H_ONE]
        rows[decisions, 5] = int(d[X_COPIED] > 0 and t.copies[0, O_WAVE] == 0)  # whether it fetches
        order_own(t, g)
        if d[serves + gpu]:
            row(t, _OUTPUT, gpu, -1, gpu * FIXED_REGISTERS + OUTPUT)
    if moves:
        exchange(t, h, COMBINE, serves)
    d[h + H_BACK] = moves
    d[h + H_DONE] += 1


@compiled
def end_step_of_all(t: Tables, h: Word, lives: Word, q: Word) -> None:
    """Order the head of every GPU's tokens."""
    d = t.words
    for gpu in range(d[d[h + H_GPUS]]):
        g = turn(t, h, gpu)
        if d[lives + gpu]:
            if d[h + H_BACK]:
                receive(t, gpu, HEAD)
            if d[g + D_RESULTS]:
                wait(t.rows, gpu, gpu * FIXED_REGISTERS + RESULTS, 1)
                d[g + D_RESULTS] = 0
            tokens = min(d[lives + gpu], d[q + Q_SAMPLED])
            add(t.rows, LAUNCH, gpu, HEAD, COMPUTE, -1, tokens, -1, -1, -1, -1, -1)
    d[h + H_BACK] = 0


@entry
def next_shared_portion(t: Tables, h: Word) -> Word:
    """Put the next portion of all GPUs into `rows`, decided now; return what comes of it (see `decision_words`)."""
    d, step, layer, gpus = t.words, t.words[h + H_STEP], t.words[h + H_LAYER], t.words[h + H_GPUS]
    t.rows[0, 0] = 0
    if step == d[h + H_STEPS]:
        return np.int64(END)
    g = d[gpus + 1]
    d[X_ASKS] = g
    if step < d[g + D_FIRST_STEP] or step >= d[g + D_END_STEP]:
        return np.int64(STEPS)
    at = step - d[g + D_FIRST_STEP]
    q, lives = d[g + D_STEPS] + at * STEP_WORDS, d[h + H_LIVES] + at * d[gpus]
    if layer >= 0:
        for gpu in range(d[gpus]):
            d[X_ASKS] = d[gpus + 1 + gpu]
            if not has_room_for_visit(t, d[gpus + 1 + gpu]):
                return np.int64(ROOM)
        serve_all(t, h, step, layer)
    if layer + 1 < d[g + D_LAYERS]:
        begin_layer_of_all(t, h, lives, q, layer + 1)
        d[h + H_LAYER] = layer + 1
    else:
        end_step_of_all(t, h, lives, q)
        d[h + H_LAYER] = -1
        d[h + H_STEP] += 1
    return np.int64(DECIDED)
