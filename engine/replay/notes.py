"""What policies learn of a pool's visits whatever is in memory: the same at every capacity, so computed once.

Scores of experts, expectations, tokens of the sequences in flight, forward passes: each policy's class learns them as a
visit begins. Here they are notes, (expert, value) pairs by visit, which compiled replays read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ...machine_code import compiled
from ...workloads.batches import Step, columns_of
from ..decide.lookups import Lookups
from ..policies import compiled_policies as kinds
from ..policies.compiled_eviction import SCORED, STATIC
from ..policies.eviction_base import Setting
from ..policies.eviction_informed import GateWeight, Heat, PayBack, popularity

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Notes:
    """What a policy learns of v visits: `experts` and `values` int32 (n,), visit i's from `starts[i]` (v + 1,) on.

    Beside them what it knows before: a rank of each expert (`ranks` int64 (experts,)), and `Random`'s `luck`.
    """

    starts: Array
    experts: Array = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    values: Array = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    ranks: Array | None = None
    luck: Array = field(default_factory=lambda: np.zeros(1, dtype=np.int64))


#: The policies whose score is a sum that fades; on demand alone, nobody is spared by pay-back.
SCORING: dict[str, type[GateWeight]] = {"gate-weight": GateWeight, "heat": Heat, "payback": PayBack}


def takes_notes(policy: str, steps: Sequence[Step], lookup: str) -> bool:
    """Whether compiled replays have a policy by its notes: gate weights only where each look-up is one token's."""
    if policy == "gate-weight":
        return lookup == "single" or all(len(step.rows) == 1 for step in steps)
    return policy in NOTES


def notes_of(policy: str, lookups: Lookups, setting: Setting) -> Notes:
    """Returns the notes of a policy for the pool that the setting describes; `policy` must be in NOTES."""
    return NOTES[policy][1](lookups, setting)


def _visits(lookups: Lookups, setting: Setting) -> tuple[Array, Array]:
    """Returns the forward pass and the layer of each visit."""
    trace = setting.known_trace()
    first = lookups.starts[:-1] if lookups.cells is None else lookups.cells[lookups.starts[:-1]]
    return _step_of(setting)[first // (trace.layers * trace.k)], first // trace.k % trace.layers


def _step_of(setting: Setting) -> Array:
    """Returns the forward pass of each row of the trace."""
    columns = columns_of(setting.steps)
    step_of = np.zeros(setting.known_trace().tokens, dtype=np.int64)
    step_of[columns.rows] = np.repeat(np.arange(len(setting.steps)), np.diff(columns.starts))
    return step_of


def _random(lookups: Lookups, setting: Setting) -> Notes:
    return Notes(np.zeros_like(lookups.starts), luck=kinds.luck(setting))


def _popular(lookups: Lookups, setting: Setting) -> Notes:
    ranks = np.unique(popularity(setting), return_inverse=True)[1].reshape(-1).astype(np.int64)
    return Notes(np.zeros_like(lookups.starts), ranks=ranks)


def _passes(lookups: Lookups, setting: Setting) -> Notes:
    """Returns the forward pass of each visit, with one of its experts."""
    step, _ = _visits(lookups, setting)
    visits = np.arange(len(lookups.starts), dtype=np.int64)
    return Notes(visits, lookups.experts[lookups.starts[:-1]], step.astype(np.int32))


def _scores(policy: str, lookups: Lookups, setting: Setting) -> Notes:
    """Returns the rank among all scores of each look-up's, as its visit begins; equal scores have equal ranks."""
    trace = setting.known_trace()
    cells = np.arange(len(lookups.experts)) if lookups.cells is None else lookups.cells
    weights = np.ones(len(cells))
    if policy == "gate-weight" and trace.weights is not None:
        weights = trace.weights.reshape(-1)[cells].astype(np.float64)
    # All of a visit's look-ups are of one forward pass.
    now = _step_of(setting)[cells // (trace.layers * trace.k)] / SCORING[policy].HALF_LIFE_STEPS
    last = np.full(int(lookups.recency.max(initial=0)) + 1, -math.inf)
    scores = np.empty(len(cells))
    _add_decayed(lookups.recency, now, weights, 2.0, last, scores)
    ranks = np.unique(scores, return_inverse=True)[1].reshape(-1).astype(np.int32)
    return Notes(lookups.starts, lookups.recency, ranks)


@compiled
def _add_decayed(experts: Array, now: Array, amounts: Array, base: float, last: Array, sums: Array) -> None:
    """Fill in `eviction_base.add_decayed` of each expert's sum so far.

    The base is given, lest the compiler takes another function for 2.0 ** x, which may round elsewhere.
    """
    for at in range(len(experts)):
        total = amounts[at] + base ** (last[experts[at]] - now[at])
        sums[at] = last[experts[at]] = math.log2(total) + now[at] if total > 0 else -math.inf


def _expectations(lookups: Lookups, setting: Setting) -> Notes:
    """Returns when experts are expected from now on, as `Predictive` has it: a visit's number, from 1 on, or 0."""
    trace, guesses = setting.known_trace(), setting.guesses
    assert guesses is not None  # `Predictive` asks for them
    columns = columns_of(setting.steps)
    step, layer = _visits(lookups, setting)
    in_pool = np.isin(np.arange(trace.layers), setting.layers)
    stride = 0 if setting.shared else setting.experts
    total = trace.layers * setting.experts
    places = guesses.places(columns.rows)
    found = (guesses.experts, places, columns.starts, step, layer, in_pool, stride, total)
    return _counted(len(step), lambda *room: _expect(*found, *room))


def _counted(visits: int, fill: Callable[..., int]) -> Notes:
    """Returns the notes that a function fills in, once it has counted them without."""
    starts = np.zeros(visits + 1, dtype=np.int64)
    nothing = np.empty(0, dtype=np.int32)
    count = fill(False, nothing, nothing, starts)
    experts, values = np.empty(count, dtype=np.int32), np.empty(count, dtype=np.int32)
    fill(True, experts, values, starts)
    return Notes(starts, experts, values)


@compiled
def _expect(
    guessed: Array,
    places: Array,
    row_starts: Array,
    step: Array,
    layer: Array,
    in_pool: Array,
    stride: int,
    total: int,
    writes: bool,
    experts: Array,
    values: Array,
    starts: Array,
) -> int:
    """Fill the notes in, if it `writes`; return how many there are. `guessed` (rows, layers, horizons, n)."""
    _, layers, horizons, n = guessed.shape
    expected = np.full(total, -1, dtype=np.int64)
    # Who may be expected at a visit: a chain for each of the next visits, whose first is at `total`. -2: not in it.
    chains = np.full((horizons + 1, total + 1), -2, dtype=np.int32)
    chains[:, total] = -1
    now, count = -1, 0
    for visit in range(len(step)):
        at = step[visit] * layers + layer[visit]
        for when in range(now + 1, min(at, now + horizons) + 1):
            chain = chains[when % (horizons + 1)]
            expert, chain[total] = chain[total], -1
            while expert >= 0:
                if expected[expert] == when:
                    expected[expert] = -1
                    if writes:
                        experts[count], values[count] = expert, 0
                    count += 1
                following = chain[expert]
                chain[expert] = -2
                expert = following
        is_new, now = at != now, at
        for ahead in range(1, horizons + 1 if is_new else 0):
            target, when = (layer[visit] + ahead) % layers, now + ahead
            if not in_pool[target]:
                continue
            chain = chains[when % (horizons + 1)]
            for row in range(row_starts[step[visit]], row_starts[step[visit] + 1]):
                for place in range(n):
                    index = int(guessed[places[row], layer[visit], ahead - 1, place])
                    expert = target * stride + index
                    if index < 0 or (expected[expert] >= 0 and expected[expert] <= when):
                        continue
                    expected[expert] = when
                    if chain[expert] == -2:
                        chain[expert], chain[total] = chain[total], expert
                    if writes:
                        experts[count], values[count] = expert, when + 1
                    count += 1
        starts[visit + 1] = count
    return count


def _activations(lookups: Lookups, setting: Setting) -> Notes:
    """Returns how many tokens of the sequences in flight chose an expert, whenever that changes (`ActivationAware`)."""
    trace = setting.known_trace()
    row_starts, rows, *_ = columns_of(setting.steps)
    step, layer = _visits(lookups, setting)
    sequence = np.unique(trace.sequence, return_inverse=True)[1].reshape(-1)
    first, last = np.full(sequence.max(initial=0) + 1, len(setting.steps)), np.full(sequence.max(initial=0) + 1, -1)
    step_of = np.repeat(np.arange(len(setting.steps)), np.diff(row_starts))
    np.minimum.at(first, sequence[rows], step_of)
    np.maximum.at(last, sequence[rows], step_of)
    begun = last >= 0
    ends = np.bincount(first[begun], minlength=len(setting.steps) + 1)
    ends -= np.bincount(last[begun] + 1, minlength=len(setting.steps) + 1)
    in_flight = int(np.cumsum(ends).max(initial=1))
    made = np.ones((1, 1, 1), dtype=bool) if trace.made is None else np.ascontiguousarray(trace.made)
    routed = made[..., 0] if trace.routed is None else np.ascontiguousarray(trace.routed)
    stride = 0 if setting.shared else setting.experts
    total = trace.layers * setting.experts
    # A batch visits a layer that it looks nobody up at, too: who ended before is forgotten then, and others later.
    every_step = not setting.single
    given = (
        trace.experts, made, routed, trace.made is not None, rows, row_starts, sequence, last, in_flight, every_step,
    )  # fmt: skip
    return _counted(len(step), lambda *room: _activate(*given, step, layer, stride, total, *room))


@compiled
def _activate(
    chosen: Array,
    made: Array,
    routed: Array,
    has_gaps: bool,
    rows: Array,
    row_starts: Array,
    sequence: Array,
    last: Array,
    in_flight: int,
    every_step: bool,
    step: Array,
    layer: Array,
    stride: int,
    total: int,
    writes: bool,
    experts: Array,
    values: Array,
    starts: Array,
) -> int:
    """Fill the notes in, if it `writes`; return how many there are. At most `in_flight` sequences run at once."""
    tokens = np.zeros(total, dtype=np.int64)  # of all sequences in flight
    used = np.zeros((in_flight, total), dtype=np.int32)  # of each
    order = np.zeros((in_flight, total), dtype=np.int32)  # the experts that each has used, first use first
    distinct = np.zeros(in_flight, dtype=np.int64)  # and how many these are
    slot_of = np.full(len(last), -1, dtype=np.int64)
    free, flying = np.arange(in_flight), np.zeros(in_flight, dtype=np.int64)
    spare, flights, count = in_flight, 0, 0
    for visit in range(len(step)):
        is_begun = visit > 0 and step[visit] == step[visit - 1]
        if is_begun and layer[visit] == layer[visit - 1]:
            starts[visit + 1] = count
            continue
        before = step[visit - 1] if visit > 0 and (every_step or is_begun) else step[visit] - 1
        for until in range(before + 1, step[visit] + 1):  # none, if the step has begun
            kept = 0
            for at in range(flights):
                slot = slot_of[flying[at]]
                if last[flying[at]] >= until:
                    flying[kept] = flying[at]
                    kept += 1
                    continue
                gone = order[slot, : distinct[slot]]
                count = _forget(used[slot], gone, tokens, writes, experts, values, count)
                distinct[slot] = 0
                free[spare] = slot
                spare += 1
            flights = kept
        for at in range(row_starts[step[visit]], row_starts[step[visit] + 1]):
            row = rows[at]
            if has_gaps and not routed[row, layer[visit]]:
                continue
            if slot_of[sequence[row]] < 0:
                spare -= 1
                slot_of[sequence[row]] = free[spare]
                flying[flights] = sequence[row]
                flights += 1
            slot = slot_of[sequence[row]]
            for place in range(chosen.shape[2]):
                if has_gaps and not made[row, layer[visit], place]:
                    break
                expert = layer[visit] * stride + int(chosen[row, layer[visit], place])
                if used[slot, expert] == 0:
                    order[slot, distinct[slot]] = expert
                    distinct[slot] += 1
                used[slot, expert] += 1
                tokens[expert] += 1
                if writes:
                    experts[count], values[count] = expert, tokens[expert]
                count += 1
        starts[visit + 1] = count
    return count


@compiled
def _forget(used: Array, order: Array, tokens: Array, writes: bool, experts: Array, values: Array, count: int) -> int:
    """Take the tokens of a sequence that has ended off those of all; return how many notes there are then."""
    for expert in order:
        tokens[expert] -= used[expert]
        used[expert] = 0
        if writes:
            experts[count], values[count] = expert, tokens[expert]
        count += 1
    return count


#: The policies that have notes, by their names in EVICTION, with their kinds.
NOTES: dict[str, tuple[int, Callable[[Lookups, Setting], Notes]]] = {
    **{policy: (SCORED, partial(_scores, policy)) for policy in SCORING},
    "static": (STATIC, _popular),
    "random": (kinds.RANDOM, _random),
    "least-stale": (kinds.LEAST_STALE, _passes),
    "activation-aware": (kinds.ACTIVATION_AWARE, _activations),
    "predictive": (kinds.PREDICTIVE, _expectations),
}
