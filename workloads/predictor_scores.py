"""How good predictors are on a trace, and how good any could be.

Every predictor is asked the same questions, those of one sequence decoded after the other. All sequences that are not
scored run first, so that a predictor that counts as it goes has seen what a trained one was trained on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .batches import DECODE, plan_steps
from .guesses import Guesses, Int64s, Run, found_in
from .learned import Learned, measure_latency
from .predictors import Predictor
from .trace import RoutingTrace

Floats64 = npt.NDArray[np.float64]

#: Called with what is running, and how many of how many predictors are done.
Progress = Callable[[str, int, int], None]

#: Predictors that learn as they go, and need nothing else.
ONLINE = ("frequency", "previous-token", "transition", "activation")
#: Bins of equal width in which confidence is compared with what came true.
CALIBRATION_BINS = 10
#: What the bounds suppose that a predictor knows besides its layer and horizon.
BOUND_KNOWLEDGE = ("nothing", "choice here", "choice here and last choice there")


def evaluate(
    trace: RoutingTrace,
    predictors: Mapping[str, Predictor],
    *,
    horizons: int = 3,
    lengths: Sequence[int] = (),
    sequences: str = ":",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score predictors, by name, on some sequences of a trace (`RoutingTrace.sequences_in`), as plain data.

    Only guesses of decode tokens count. `lengths` are the k of recall@k; without them 1, top-k and twice top-k, for
    top-1 models 1, 5 and 10. Raises ValueError as the predictors do.
    """
    names = trace.sequences_in(sequences)
    scored = np.isin(trace.sequence, names)
    trace = trace.select(np.concatenate([np.flatnonzero(~scored), np.flatnonzero(scored)]))
    first = trace.tokens - int(scored.sum())
    all_steps = plan_steps(trace.sequence, trace.phase)
    steps = [step for step in all_steps if step.rows[0] >= first]
    run = Run.of(trace, steps, horizons, 1)
    asked = trace.phase[run.rows] == DECODE
    truth = run.truth()
    truth[~asked] = -1
    if any(length < 1 for length in lengths):
        raise InputError(f"recall@{min(lengths)}: a list has at least 1 guess")
    lengths = sorted(set(lengths or ((1, 5, 10) if trace.k == 1 else (1, trace.k, 2 * trace.k))))
    entries = []
    for done, (name, predictor) in enumerate(predictors.items()):
        if progress is not None:
            progress("predictors", done, len(predictors))
        # One that is trained beforehand has nothing to learn from the sequences before.
        asked_steps = steps if isinstance(predictor, Learned) else all_steps
        began = time.perf_counter()
        guesses = predictor.guess(trace, asked_steps, horizons, max(*lengths, trace.k))
        guess_us = (time.perf_counter() - began) * 1e6 / max(len(guesses.rows) * run.layers, 1)
        guesses = _last(guesses, len(run.rows))
        entry = {"name": name, "horizons": scores(guesses, truth, lengths), "guess_us": guess_us}
        entries.append({**entry, **_costs(predictor), "predictions_sha256": guesses.digest})
    return {
        "model": trace.meta.get("model"),
        "layers": trace.layers,
        "k": trace.k,
        "num_experts": trace.num_experts,
        "sequences": len(names),
        "tokens": int(asked.sum()),
        "predictors": entries,
        "top1_bounds": [
            {"horizon": ahead + 1, **bounds(run, truth[:, :, ahead], ahead + 1, trace.num_experts)}
            for ahead in range(horizons)
        ],
    }


def _last(guesses: Guesses, rows: int) -> Guesses:
    """Returns the guesses of the last rows."""
    first = len(guesses.rows) - rows
    confidences = None if guesses.confidences is None else guesses.confidences[first:]
    return Guesses(guesses.rows[first:], guesses.experts[first:], confidences)


def _costs(predictor: Predictor) -> dict[str, Any]:
    """Returns what one guess alone takes on this machine, by device, and the weights' bytes; null without weights."""
    if not isinstance(predictor, Learned):
        return {"latency_us": None, "memory_bytes": None}
    return {"latency_us": measure_latency(predictor.weights), "memory_bytes": predictor.weights.memory_bytes}


def scores(guesses: Guesses, truth: npt.NDArray[np.int16], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Returns how good the guesses are, horizon by horizon; `truth` (rows, layers, horizons, k) is as `Run.truth`.

    Each horizon has `targets` (guesses that count), `top1` (share whose best guess is used), `recall` by length (share
    of the experts used that the list so long contains), `calibration_error` of the top-k guesses (null without
    confidences), and `top1` and `recall` again by target layer, under `layers`. Shares of nothing are null.
    """
    entries = []
    layers, k = truth.shape[1], truth.shape[3]
    for ahead in range(guesses.horizons):
        # By target layer.
        true = np.roll(truth[:, :, ahead], ahead + 1, axis=1)
        hit = found_in(true, np.roll(guesses.experts[:, :, ahead], ahead + 1, axis=1))
        targets = (true[..., 0] >= 0).sum(axis=0)
        hits = hit.sum(axis=0)
        recall = {str(n): _shares(hits[:, :n].sum(axis=1), targets * k) for n in lengths}
        every = {str(n): _shares(hits[:, :n].sum(), targets.sum() * k) for n in lengths}
        counted = truth[:, :, ahead, 0] >= 0
        error = None
        if guesses.confidences is not None:
            right = found_in(truth[:, :, ahead], guesses.experts[:, :, ahead])[counted][:, :k]
            error = calibration_error(guesses.confidences[:, :, ahead][counted][:, :k].ravel(), right.ravel())
        entries.append(
            {
                "horizon": ahead + 1,
                "targets": int(targets.sum()),
                "top1": _shares(hits[:, 0].sum(), targets.sum()),
                "recall": every,
                "calibration_error": error,
                "layers": {"top1": _shares(hits[:, 0], targets), "recall": recall},
            }
        )
        assert len(targets) == layers
    return entries


def _shares(part: Any, whole: Any) -> Any:
    """Divide numbers, or lists of them, into plain data; null where there is nothing to divide by."""
    if np.ndim(part):
        return [_shares(*pair) for pair in zip(part, whole, strict=True)]
    return float(part / whole) if whole else None


def calibration_error(confidences: npt.NDArray[np.floating], right: npt.NDArray[np.bool_]) -> float | None:
    """Returns the expected calibration error: how far confidence is from what came true, mean over bins, by their size.

    Both (guesses,); null if there are none. Source: Guo et al., "On Calibration of Modern Neural Networks", 2017.
    """
    if not len(confidences):
        return None
    bins = np.minimum((confidences * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    claimed = np.bincount(bins, weights=confidences, minlength=CALIBRATION_BINS)
    came_true = np.bincount(bins, weights=right, minlength=CALIBRATION_BINS)
    return float(np.abs(claimed - came_true).sum() / len(confidences))


def bounds(run: Run, truth: npt.NDArray[np.int16], ahead: int, num_experts: int) -> dict[str, Any]:
    """Returns upper bounds on top-1 for predictors that know a given context c, and nothing else of the trace.

    `truth` (rows, layers, k) is what the layer so far ahead used. For each of BOUND_KNOWLEDGE (the router's first
    choices; the last one at the target layer is the sequence's):

    entropy_bits  H(X|c) of the trace's own frequencies, X being one of the k experts used, drawn evenly.
    fano          k times the largest p with H(X|c) <= H2(p) + (1 - p) log2(experts - 1), 1 at most: whoever names a
                  used expert with probability P names X with P/k. Fano's inequality, used as in Song et al., "Limits
                  of Predictability in Human Mobility", Science 327, 2010, there with the entropy of the whole history.
    hindsight     what the best fixed answer to every context would have got.

    Both hold exactly on this trace for every predictor that answers a context always alike. What is estimated from few
    samples of a context is too predictable, so the bounds err upward. A predictor that knows more may exceed them.
    """
    asked = truth[..., 0] >= 0
    used = truth[asked].astype(np.int64)
    layer = np.broadcast_to(np.arange(run.layers), asked.shape)[asked]
    here = run.chosen[:-1, :, 0][asked]
    there = run.latest(ahead)[..., 0][asked]
    first = num_experts + 1
    contexts = (layer, layer * first + here + 1, (layer * first + here + 1) * first + there + 1)
    found = {}
    for knows, context in zip(BOUND_KNOWLEDGE, contexts, strict=True):
        entropy_bits, hindsight = _of_context(context, used, num_experts)
        fano = None if entropy_bits is None else min(1.0, used.shape[1] * predictability(entropy_bits, num_experts))
        found[knows] = {"entropy_bits": entropy_bits, "fano": fano, "hindsight": hindsight}
    return {"knowing": found}


def _of_context(context: Int64s, used: Int64s, num_experts: int) -> tuple[float | None, float | None]:
    """Returns H(X|c) in bits and the share of targets (targets, k) that the best fixed answers name."""
    if not len(used):
        return None, None
    cell, uses = np.unique(context[:, None] * num_experts + used, return_counts=True)
    first = np.flatnonzero(np.diff(cell // num_experts, prepend=-1))
    in_context = np.add.reduceat(uses, first)
    bits = float((in_context * np.log2(in_context)).sum() - (uses * np.log2(uses)).sum()) / used.size
    return max(bits, 0.0), float(np.maximum.reduceat(uses, first).sum() / len(used))


def predictability(entropy_bits: float, outcomes: int) -> float:
    """Returns the largest chance to name what has this entropy among so many outcomes, by Fano's inequality."""
    low, high = 1 / outcomes, 1.0
    if outcomes == 1:
        return high
    for _ in range(40):
        middle = (low + high) / 2
        most = (1 - middle) * math.log2((outcomes - 1) / (1 - middle)) - middle * math.log2(middle)
        low, high = (middle, high) if most >= entropy_bits else (low, middle)
    return high
