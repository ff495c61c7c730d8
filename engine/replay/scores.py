"""Scores of a pool's look-ups that follow from the look-ups alone, whoever is in memory.

A policy that evicts the least score, and keeps that of absent experts, has the same scores at every capacity: they are
worked out once, and compiled replays go by their ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...workloads.batches import Step
from ...workloads.trace import RoutingTrace
from ..decide.lookups import Lookups
from ..policies.eviction_base import add_decayed
from ..policies.eviction_informed import GateWeight, Heat, PayBack

Array = npt.NDArray[Any]

#: The policies, by their names in EVICTION. On demand alone, nobody is spared by pay-back.
SCORING: dict[str, type[GateWeight]] = {"gate-weight": GateWeight, "heat": Heat, "payback": PayBack}


def has_scores(policy: str, steps: Sequence[Step], lookup: str) -> bool:
    """Whether a policy's scores follow from the look-ups: gate weights only where each look-up is one token's."""
    if policy not in SCORING:
        return False
    return policy != "gate-weight" or lookup == "single" or all(len(step.rows) == 1 for step in steps)


def ranked_scores(policy: str, lookups: Lookups, trace: RoutingTrace, steps: Sequence[Step]) -> Array:
    """Returns the rank among all scores (n,) of each look-up's, as its visit begins, in the order of last appearance.

    Equal scores have equal ranks. `policy` must have scores here (`has_scores`).
    """
    per_row = trace.layers * trace.k
    cells = np.arange(len(lookups.experts)) if lookups.cells is None else lookups.cells
    weights = np.ones(len(cells))
    if policy == "gate-weight" and trace.weights is not None:
        weights = trace.weights.reshape(-1)[cells].astype(np.float64)
    step_of = np.zeros(trace.tokens, dtype=np.int64)
    for number, step in enumerate(steps):
        step_of[step.rows] = number
    # All of a visit's look-ups are of one step.
    now = (step_of[cells // per_row] / SCORING[policy].HALF_LIFE_STEPS).tolist()
    score_of: dict[int, float] = {}
    scores = []
    for expert, at, weight in zip(lookups.recency.tolist(), now, weights.tolist(), strict=True):
        score = score_of[expert] = add_decayed(score_of.get(expert, -math.inf), at, weight)
        scores.append(score)
    ranks: Array = np.unique(np.array(scores), return_inverse=True)[1].astype(np.int32)
    return ranks
