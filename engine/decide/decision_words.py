"""The memory layout of compiled decisions: words and tables, and the names of the places in them.

One array of words holds what is single, as `timing.memory` does: a GPU, a pool or a host thread is the address of its
first word. What there is of every expert, and what eviction policies know, are tables for all GPUs of a run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...machine_words import REALS, TABLE, UNCOMPILED, WORDS, Fields
from ..policies.compiled_orders import SIZE, UNTIL, WAVE

Words = npt.NDArray[Any]
Table = npt.NDArray[Any]
Reals = npt.NDArray[Any]


class Tables(NamedTuple):
    """The arrays of all compiled decisions of a run.

    `words` and the same read as floats; `states` of eviction policies; `experts` by GPU, layer and index; then what a
    visit comes to (see `visit_commands`) and its `rows` of commands, used again for every visit; `leaving` are experts
    that lose their room.
    """

    words: Words
    floats: Reals
    states: Table
    experts: Table
    served: Table
    copies: Table
    taken: Table
    resolved: Table
    rows: Table
    leaving: Words


#: What Numba is told by the annotation `Tables` (see `machine_code`): the address of what `addresses` returns.
TYPES = {
    "Tables": Fields(
        "Tables",
        [
            (name, REALS if name == "floats" else WORDS if name in ("words", "leaving") else TABLE)
            for name in Tables._fields
        ],
    )
}


def addresses(tables: Tables) -> Any:
    """Returns where the arrays lie and how large they are, for compiled code; they must be kept as long.

    The arrays themselves where nothing is compiled.
    """
    if UNCOMPILED:
        return tables
    rows = [(array.ctypes.data, array.shape[0], array.shape[-1]) for array in tables]
    return np.array(rows, dtype=np.int64).reshape(-1)


#: The run: how many registers there are and have room; which GPU asks for something; how many rows the tables of the
#: visit have.
X_REGISTERS, X_ROOM_FOR, X_ASKS, X_SERVED, X_COPIED, X_TAKEN, X_RESOLVED, X_VISIT, HEADER = range(9)

#: A GPU. Its settings and rooms; what the scenario says of memory and prefetching; the memory as it is; counts; its
#: part of each step; records; the most that a visit may come to; the steps that are laid out, what they choose and
#: guess; registers that may be taken again; the clock, for policies that look at it; whether it serves some experts
#: alone; the most registers that a visit may take; host memory, where it is a cache (-1: it holds every expert), and
#: whether prefetches go there alone. Host memory has these words, too, as far as they mean anything there (`D_ROOMS`
#: is then, by register of a room's bytes, that of the copies out of it); and the requests of a read of an expert of
#: each layer, how many copies found theirs, and the bytes read; whether what is copied to the GPU leaves it, what is
#: kept free then, and what an expert's copy back takes, by layer. Where GPUs share experts: lists of what it serves of
#: a visit's choices and, with the visits that they are for, of its guesses (-1: it looks at all guesses), whether it
#: owns each of all experts, the list of all GPUs, whether they lend, whether copies come from another one that has the
#: expert, and, by register of a room, those of its bytes and of the copies out of it. Whether the host waits for what
#: a step samples.
(
    D_SETTINGS, D_ROOMS, D_EXPERTS, D_LAYERS, D_LAYER_EXPERTS, D_SHARED, D_EVICTION, D_POOLS, D_PREFETCH, D_HORIZONS,
    D_K, D_COPY_NS, D_LEAST, D_DECAY, D_POPULAR, D_PROTECTS, D_DROPS, D_UNPIN_FIRST, D_WATCHES, D_ON_CPU, D_CPU_MOST,
    D_DEFERRED, D_FETCH_FROM, D_WAVE, D_VISIT, D_ASSIGNED, D_BUDGET, D_UNUSED, D_FRESH, D_PROTECTED, D_PROTECTED_COUNT,
    D_COPIES, D_DROPPED, D_GUESSED, D_UNIQUE, D_MISSES, D_FULLEST, D_RESULTS, D_HAS_HEAD, D_RECEIVES, D_SENDS,
    D_ADMITTED, D_EVICTED, D_RESOLVED, D_MOST_COPIES, D_MOST_EVICTED, D_RECENCY, D_ASKED,
    D_FIRST_STEP, D_END_STEP, D_STEPS, D_CHOSEN, D_PER_TOKEN, D_LATER, D_LATER_COLUMNS, D_GUESSES, D_RANKS,
    D_CONFIDENCES, D_BUDGETS, D_FOLLOWING, D_FOLLOWED, D_GATES, D_FREE, D_FREE_COUNT,
    D_NOW, D_BACKLOG, D_FILTERS, D_MOST_REGISTERS, D_TIER, D_STAGES, D_REQUESTS, D_FOUND, D_READ_BYTES,
    D_EXCLUSIVE, D_KEPT_FREE, D_BACK_NS,
    D_OWN, D_WANTED, D_OWNED, D_GPUS, D_LENDS, D_FROM_PEERS, D_LANDED, D_LENT, D_AWAITS_TOKENS, D_WORDS,
) = range(86)  # fmt: skip

#: A pool: its bytes, and what is free in the order in which it became free: a ring of (bytes, register of whose room it
#: was, -1 for none); what its policy knows; its first expert on the GPU, and how many it has; of what the policy knows,
#: how many rows, and where its reals and random words are, if it has some.
(
    P_BUDGET, P_FREE_BYTES, P_RING, P_CAPACITY, P_FIRST, P_COUNT, P_STATE, P_EXPERT, P_EXPERTS, P_ROWS, P_REALS, P_LUCK,
    P_WORDS,
) = range(13)  # fmt: skip

#: A record region: where it begins, how many there are, and how many have room.
R_AT, R_COUNT, R_CAPACITY, REGION_WORDS = range(4)
#: Words of records: of a copy (expert, reason, copies that merging saved); of an evicted copy; of an access that is not
#: fetched.
ADMITTED_WORDS, EVICTED_WORDS, RESOLVED_WORDS = 3, 1, 5

#: A step that is laid out: its first row among those that are, how many it has, its phase and what it samples.
Q_FIRST, Q_ROWS, Q_PHASE, Q_SAMPLED, STEP_WORDS = range(5)

#: A host thread: the list of its GPUs; where it is: which of them, the step, the layer to be decided (-1: none yet). Of
#: GPUs that share experts: whether they do, whether one thread turns to all of them, whether tokens are to come back,
#: what the exchange takes that is ordered next; and of the steps that are laid out what exchanges take, where tokens
#: live, who serves any, and who serves each expert (-1: its only owner). Where a scheduler makes the steps: until when
#: there is nothing to do (0: now there is), and what the host takes to make one; until when the steps that are laid out
#: are those that it makes (0: only one is), and where it is noted when each has ended; what it takes to swap KV
#: blocks out before the step, and in. The only owner of each expert (-1: it has several).
(
    H_GPUS, H_AT, H_STEP, H_LAYER, H_STEPS, H_DONE, H_SHARES, H_ONE, H_BACK, H_EXCHANGE_NS, H_EXCHANGES, H_LIVES,
    H_SERVES, H_SERVERS, H_IDLE_UNTIL, H_SCHEDULE_NS, H_UNTIL, H_ENDS, H_SWAP_OUT,
    H_SWAP_IN, H_OWNERS, THREAD_WORDS,
) = range(22)  # fmt: skip

#: An expert: what holds it (as `compiled_eviction` has it); its copy (-1: absent) and room; the visits that looked it
#: up and guessed it last, and its place in the list of this visit's experts or, later, of its guesses. So many words
#: are one line of a processor's cache; where there are many experts, most that are asked for have to be fetched there.
assert (WAVE, UNTIL, SIZE) == (0, 1, 2)
E_WAVE, E_UNTIL, E_SIZE, E_COPY, E_ROOM, E_SEEN, E_PLACE, E_ASKED, E_COLUMNS = range(9)
#: A guess in a visit's list: the expert, how often it was guessed, and for which visit.
A_EXPERT, A_TIMES, A_TARGET, ASKED_WORDS = range(4)

#: Prefetch policies.
NONE, TOP_K, MULTI_STEP, ADAPTIVE_MEMORY, ADAPTIVE_LINK, NEXT_LAYER, POPULARITY, COST_AWARE = range(8)

#: What a decision comes back with: it is made; the next steps are to be laid out; there is too little room to make one;
#: the program is at its end.
DECIDED, STEPS, ROOM, END = range(4)
