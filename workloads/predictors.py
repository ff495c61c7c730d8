"""Predictors: which experts the layers ahead will use, guessed by every token at every layer.

Guesses are computed once, before the clock starts, and frozen, so that a policy under test can change neither what
is guessed nor the luck. A guess uses only what is known when the router's choice it follows is known: all earlier
steps, and the layers of its own step up to its own (the oracle alone looks ahead). To add one: write a class with
`guess`, name it in PREDICTORS, describe it in tests/test_predictors.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..bounded import check_memory
from ..errors import InputError
from ..machine_code import compiled
from ..words import unknown_name
from .batches import Step
from .guesses import MOST_HORIZONS, Guesses, Int16s, Int64s, Run, best_of, found_in
from .learned import Learned, load_weights
from .oracle import Oracle as Oracle
from .trace import RoutingTrace

Floats64 = npt.NDArray[np.float64]

#: Work that is done for many cells at once is cut into pieces of about this many numbers, to stay in the caches.
_PIECE = 1 << 20
#: The unit in which shares of one are counted and ranked, far below what tells two apart.
_SHARE = 2.0**-32
#: Divides nothing by something.
_TINY = float(np.finfo(np.float64).tiny)


class Predictor(Protocol):
    """What guesses; options such as a seed go to the constructor."""

    def guess(self, trace: RoutingTrace, steps: Sequence[Step], horizons: int, n: int) -> Guesses:
        """Returns the n best guesses for each of the `horizons` layers ahead of every token of the steps.

        Raises ValueError if `horizons` or `n` is not positive, a step names a row that the trace lacks, or the trace
        holds too little for this predictor.
        """


class PreviousToken:
    """Guesses what the sequence's latest token used at the target layer, in the router's order.

    That is this token itself where it has been through the target layer, else its sequence's last token of an earlier
    step.
    """

    def guess(self, trace: RoutingTrace, steps: Sequence[Step], horizons: int, n: int) -> Guesses:
        """Returns the choices of the token before."""
        run = Run.of(trace, steps, horizons, n)
        experts = run.no_guesses(n)
        for ahead in range(horizons):
            experts[:, :, ahead, : run.k] = run.latest(ahead + 1)[..., :n]
        return run.guesses(experts)


class Frequency:
    """Guesses the experts that the target layer used most in all earlier steps; ties go to the lower index.

    The confidence is the expert's share of the layer's uses.
    """

    def guess(self, trace: RoutingTrace, steps: Sequence[Step], horizons: int, n: int) -> Guesses:
        """Returns the most used experts so far."""
        run = Run.of(trace, steps, horizons, n)
        experts, confidences = run.no_guesses(n), run.no_confidences(n)
        layer = np.stack([layer for _, layer in run.targets()], axis=1)
        before = np.zeros((run.layers, trace.num_experts), dtype=np.int64)
        at_once = max(1, _PIECE // before.size)
        for first in range(0, len(run.starts) - 1, at_once):
            starts = run.starts[first : first + at_once + 1]
            places = slice(int(starts[0]), int(starts[-1]))
            step = run.step[places] - first
            used = run.chosen[places]
            cell = (step[:, None] * run.layers + np.arange(run.layers))[..., None] * trace.num_experts + used
            uses = np.bincount(cell[used >= 0], minlength=(len(starts) - 1) * before.size)
            uses = uses.reshape(-1, *before.shape)
            after = before + np.cumsum(uses, axis=0)
            best, share = best_of(after - uses, n)
            experts[places] = best[step[:, None, None], layer]
            confidences[places] = share[step[:, None, None], layer]
            before = after[-1]
        return run.guesses(experts, confidences)


class Transition:
    """First-order transitions between layers, counted in finished steps, separately for every layer and horizon.

    A candidate's score is how often it was used, so many layers on, by tokens that used one of this token's experts
    here, summed over those experts; ties go to the lower index; never seen is not guessed. The confidence is the share
    of the candidate in all scores. Across the token boundary the pairs are tokens that follow each other in a
    sequence, also within a prompt. The counts take 4 * horizons * layers * experts**2 bytes.
    """

    def guess(self, trace: RoutingTrace, steps: Sequence[Step], horizons: int, n: int) -> Guesses:
        """Returns what followed most often."""
        run = Run.of(trace, steps, horizons, n)
        experts, confidences = run.no_guesses(n), run.no_confidences(n)
        e = trace.num_experts
        _check_counts("transition", run.layers * horizons * e**2)
        counts = np.zeros((run.layers, horizons, e, e), dtype=np.int32)
        ago = run.tokens_ago((run.layers - 1 + horizons) // run.layers)
        _guess_transitions(run.chosen, run.starts, ago, counts, experts, confidences)
        return run.guesses(experts, confidences)


@compiled
def _guess_transitions(
    chosen: npt.NDArray[Any],
    starts: npt.NDArray[Any],
    ago: npt.NDArray[Any],
    counts: npt.NDArray[Any],
    experts: npt.NDArray[Any],
    confidences: npt.NDArray[Any],
) -> None:
    """Fill in the guesses of every step by the `counts` (layers, horizons, experts, experts) of the steps before it.

    `chosen`, `starts` and `ago` are those of a `Run`; guesses and their confidences are (rows, layers, horizons, n).
    """
    _, layers, horizons, n = experts.shape
    most = min(n, counts.shape[3])
    scores = np.zeros(counts.shape[3], dtype=np.int64)
    for step in range(len(starts) - 1):
        for place in range(starts[step], starts[step + 1]):
            for layer in range(layers):
                for ahead in range(horizons):
                    scores[:] = 0
                    for source in chosen[place, layer]:
                        if source >= 0:
                            scores += counts[layer, ahead, source]
                    total = max(scores.sum(), 1)
                    found = _rank_best(scores, experts[place, layer, ahead, :most])
                    for rank in range(found):
                        score = scores[experts[place, layer, ahead, rank]]
                        confidences[place, layer, ahead, rank] = score / total
        for place in range(starts[step], starts[step + 1]):
            for layer in range(layers):
                for ahead in range(horizons):
                    tokens_on, target = divmod(layer + ahead + 1, layers)
                    for source in chosen[ago[tokens_on, place], layer]:
                        for used in chosen[place, target]:
                            if source >= 0 and used >= 0:
                                counts[layer, ahead, source, used] += 1


@compiled
def _rank_best(scores: npt.NDArray[Any], best: npt.NDArray[Any]) -> int:
    """Put the indices of the highest scores above 0 into `best`, ties to the lower; return how many there are."""
    found = 0
    for index in range(len(scores)):
        if scores[index] == 0 or (found == len(best) and scores[index] <= scores[best[found - 1]]):
            continue
        at = min(found, len(best) - 1)
        found = min(found + 1, len(best))
        while at > 0 and scores[best[at - 1]] < scores[index]:
            best[at] = best[at - 1]
            at -= 1
        best[at] = index
    return found


def _check_counts(name: str, pairs: int) -> None:
    """Refuse counts of more pairs of experts than memory has room for."""
    check_memory(f"predictor {name!r}: {pairs:,} counts", 4 * pairs)


class Context:
    """A mixture of what followed each part of a context of `context` tokens, counted in finished steps.

    The parts are nothing at all, this token's choice here, and what the sequence chose at the target layer 1 to
    `context` tokens before (the last ones known here). Each gives the distribution of what was used in its place,
    layer by layer and horizon by horizon, and weighs as much as it explained so far: interpolated Markov sources with
    online expectation maximization (Jelinek & Mercer, "Interpolated estimation of Markov source parameters from sparse
    data", 1980). The confidence is the mixture's probability. The counts take
    4 * horizons * layers * (context + 2) * experts**2 bytes.
    """

    def __init__(self, context: int = 3) -> None:
        if not 1 <= context <= MOST_HORIZONS:
            raise InputError(f"predictor context = {context}: must be at least 1, and at most {MOST_HORIZONS:,}")
        self.context = context

    def guess(self, trace: RoutingTrace, steps: Sequence[Step], horizons: int, n: int) -> Guesses:
        """Returns the likeliest experts of the mixture."""
        run = Run.of(trace, steps, horizons, n)
        experts, confidences = run.no_guesses(n), run.no_confidences(n)
        _check_counts("context", run.layers * horizons * (self.context + 2) * trace.num_experts**2)
        mixture = _Mixture(run.layers, horizons, self.context + 2, trace.num_experts)
        known = run.known_tokens(self.context)
        tokens_on = (np.arange(run.layers)[:, None] + np.arange(1, horizons + 1)) // run.layers
        target_layer = (np.arange(run.layers)[:, None] + np.arange(1, horizons + 1)) % run.layers
        ago = run.tokens_ago(int(tokens_on.max()))
        cells = run.layers * horizons * (self.context + 2) * run.k * trace.num_experts
        for start, end in zip(run.starts[:-1], run.starts[1:], strict=True):
            for piece in run.pieces(cells, int(start), int(end)):
                scores = mixture.scores(self._parts(run, known, np.arange(piece.start, piece.stop)[:, None, None]))
                experts[piece], confidences[piece] = best_of(np.rint(scores / _SHARE).astype(np.int64), n)
            lessons = []
            for piece in run.pieces(cells, int(start), int(end)):
                source = ago[tokens_on, piece].transpose(2, 0, 1)
                lessons.append((self._parts(run, known, source), run.chosen[piece][:, target_layer]))
            mixture.learn(lessons)
        return run.guesses(experts, confidences)

    def _parts(self, run: Run, known: Int64s, place: Int64s) -> Int16s:
        """Returns the context of guesses by these places (rows, layers or 1, horizons or 1).

        Shape (rows, layers, horizons, parts, k), -1 where there is nothing.
        """
        layers, horizons = run.layers, run.horizons
        here, ahead = np.indices((layers, horizons))
        target = (here + ahead + 1) % layers
        place = np.broadcast_to(place, (len(place), layers, horizons))
        parts = np.full((*place.shape, self.context + 2, run.k), -1, dtype=np.int16)
        parts[..., 0, 0] = np.where(place >= 0, 0, -1)
        parts[..., 1, :] = run.chosen[place, here]
        # The token itself counts among the last ones where it has been through the target layer.
        passed = target <= here
        for ago in range(self.context):
            token = np.where(passed, known[place, ago], known[place, ago + 1])
            parts[..., 2 + ago, :] = run.chosen[np.where(place >= 0, token, -1), target]
        return parts


class _Mixture:
    """What was used after each part of a context, by layer and horizon, and how much each part explained."""

    def __init__(self, layers: int, horizons: int, parts: int, experts: int) -> None:
        self._uses = np.zeros((layers, horizons, parts, experts, experts), dtype=np.int32)
        self._all_uses = np.zeros(self._uses.shape[:-1], dtype=np.int64)
        self._explained = np.full((layers, horizons, parts), round(1 / _SHARE), dtype=np.int64)
        self._at = np.indices((layers, horizons, parts, 1), sparse=True)[:3]

    def scores(self, parts: Int16s) -> npt.NDArray[np.float64]:
        """Returns the mixture's distribution (rows, layers, horizons, experts) in contexts (…, parts, k)."""
        total = np.maximum(self._all_uses[*self._at, parts], 1)
        given = np.where(parts >= 0, 1 / total, 0.0)
        weight = self._weights(parts)
        scores = np.zeros((*parts.shape[:3], self._uses.shape[-1]))
        for part in range(parts.shape[3]):
            for rank in range(parts.shape[4]):
                at = (self._at[0][..., 0, 0], self._at[1][..., 0, 0], part, parts[..., part, rank])
                scores += self._uses[at] * (weight[..., part] * given[..., part, rank])[..., None]
        return scores

    def _weights(self, parts: Int16s) -> npt.NDArray[np.float64]:
        """Returns how much each part of a context counts, for one of its experts (rows, layers, horizons, parts)."""
        seen = (parts >= 0) & (self._all_uses[*self._at, parts] > 0)
        weight = np.where(seen.any(axis=-1), self._explained, 0.0)
        weight = weight / np.maximum(weight.sum(axis=-1, keepdims=True), _TINY)
        shared: npt.NDArray[np.float64] = weight / np.maximum(seen.sum(axis=-1), 1)
        return shared

    def learn(self, lessons: Sequence[tuple[Int16s, Int16s]]) -> None:
        """Learn from contexts (rows, layers, horizons, parts, k) and what was used, (rows, layers, horizons, k)."""
        self._explained += sum(self._shares(parts, used) for parts, used in lessons)
        for parts, used in lessons:
            at, counted = self._pairs(parts, used)
            places = np.broadcast_arrays(*at)
            np.add.at(self._uses, tuple(place[counted] for place in places), 1)
            np.add.at(self._all_uses, tuple(place[counted] for place in places[:-1]), 1)

    def _shares(self, parts: Int16s, used: Int16s) -> Int64s:
        """Returns how many of the uses each part explains, in units of _SHARE: whole ones add up alike in any order."""
        at, counted = self._pairs(parts, used)
        chance = np.where(counted, self._uses[at] / np.maximum(self._all_uses[at[:-1]], 1), 0.0)
        chance = (chance * self._weights(parts)[..., None, None]).sum(axis=4)
        share = chance / np.maximum(chance.sum(axis=3, keepdims=True), _TINY)
        explained: Int64s = np.rint(share / _SHARE).astype(np.int64).sum(axis=(0, 4))
        return explained

    def _pairs(self, parts: Int16s, used: Int16s) -> tuple[tuple[Any, ...], npt.NDArray[np.bool_]]:
        """Returns where in `_uses` the pairs (rows, layers, horizons, parts, k, k) are counted and whether they are."""
        source, target = parts[..., None], used[..., None, None, :]
        at = (*(index[..., None] for index in self._at), source, target)
        return at, (source >= 0) & (target >= 0)


class Activation:
    """Matches the sequence so far with finished ones, and guesses what the most similar of them used most.

    A sequence is described by its activation matrix: how many of its tokens used each expert of each layer. Two are
    as similar as the cosine between their rows, summed over layers. Finished sequences are collected, `capacity` at
    most; a newcomer then replaces the one most similar to it. While none is finished there is no guess; ties go to the
    lower index, an expert that the match never used is not guessed. The confidence is the expert's share of the
    match's uses of the layer.

    Source: Xue et al., "MoE-Infinity: Efficient MoE Inference on Personal Machines with Sparsity-Aware Expert Cache",
    arXiv:2401.14361, section 4; there the matrices are collected beforehand, here as sequences end.
    """

    def __init__(self, capacity: int = 100) -> None:
        if capacity < 1:
            raise InputError(f"predictor capacity = {capacity}: must be at least 1")
        self.capacity = capacity

    def guess(self, trace: RoutingTrace, steps: Sequence[Step], horizons: int, n: int) -> Guesses:
        """Returns the most used experts of the most similar finished sequence."""
        run = Run.of(trace, steps, horizons, n)
        experts, confidences = run.no_guesses(n), run.no_confidences(n)
        collected = _Collection(self.capacity, run.layers, trace.num_experts, n)
        target_layer = np.stack([layer for _, layer in run.targets()], axis=1)
        sequence = trace.sequence[run.rows]
        last_step = dict(zip(sequence.tolist(), run.step.tolist(), strict=True))
        none_used = np.zeros((run.layers, trace.num_experts))
        used: dict[int, Floats64] = {}
        for step, (start, end) in enumerate(zip(run.starts[:-1], run.starts[1:], strict=True)):
            ended = []
            for name in dict.fromkeys(sequence[start:end].tolist()):
                places = start + np.flatnonzero(sequence[start:end] == name)
                before = used.get(name, none_used)
                used[name] = after = before + _uses(run.chosen[places], trace.num_experts)
                if collected.held:
                    match = collected.most_similar(before, after)[:, None]
                    experts[places] = collected.ranked[match, target_layer]
                    confidences[places] = collected.shares[match, target_layer]
                if last_step[name] == step:
                    ended.append(used.pop(name))
            for matrix in ended:
                collected.add(matrix)
        return run.guesses(experts, confidences)


class _Collection:
    """Activation matrices of finished sequences, and what each of them would guess."""

    def __init__(self, capacity: int, layers: int, experts: int, n: int) -> None:
        self._capacity = capacity
        # By layer first, so that one product over all layers compares with every matrix.
        self._matrices = np.zeros((layers, 0, experts))
        self._squares = np.zeros((layers, 0))
        self.ranked = np.zeros((0, layers, n), dtype=np.int16)
        self.shares = np.zeros((0, layers, n), dtype=np.float32)
        self._n = n

    @property
    def held(self) -> int:
        """How many matrices there are."""
        return len(self.ranked)

    def most_similar(self, before: Floats64, after: Floats64) -> Int64s:
        """Returns for each layer which matrix is most similar to `after` up to it, and to `before` beyond it."""
        then, now = self._cosines(before), self._cosines(after)
        similarity = then.sum(axis=0) + np.cumsum(now - then, axis=0)
        match: Int64s = np.argmax(similarity, axis=-1)
        return match

    def add(self, matrix: Floats64) -> None:
        """Collect a matrix, in place of the most similar one if there is no room."""
        ranked, shares = best_of(matrix.astype(np.int64), self._n)
        squares = np.square(matrix).sum(axis=-1)
        if self.held < self._capacity:
            self._matrices = np.concatenate([self._matrices, matrix[:, None]], axis=1)
            self._squares = np.concatenate([self._squares, squares[:, None]], axis=1)
            self.ranked = np.concatenate([self.ranked, ranked[None]])
            self.shares = np.concatenate([self.shares, shares[None]])
            return
        place = int(np.argmax(self._cosines(matrix).sum(axis=0)))
        self._matrices[:, place], self._squares[:, place] = matrix, squares
        self.ranked[place], self.shares[place] = ranked, shares

    def _cosines(self, matrix: Floats64) -> Floats64:
        """Returns the cosine of every row with that of every matrix held (layers, held), 0 if one is empty."""
        products = (self._matrices @ matrix[..., None])[..., 0]
        squares = self._squares * np.square(matrix).sum(axis=-1)[:, None]
        cosines: Floats64 = products / np.sqrt(np.maximum(squares, 1))
        return cosines


def _uses(chosen: Int16s, num_experts: int) -> Floats64:
    """Returns how often each expert of each layer (layers, experts) is among the choices (tokens, layers, k)."""
    layers = chosen.shape[1]
    cell = np.arange(layers)[:, None] * num_experts + chosen
    return np.bincount(cell[chosen >= 0], minlength=layers * num_experts).reshape(layers, -1).astype(np.float64)


class Recorded:
    """Repeats the trace's own `predictions`, such as a learned predictor's, and their `confidences` if it has them."""

    def guess(self, trace: RoutingTrace, steps: Sequence[Step], horizons: int, n: int) -> Guesses:
        """Returns the first n recorded guesses of each horizon; -1 where fewer were recorded.

        Raises ValueError if the trace has no predictions, or none so far ahead.
        """
        run = Run.of(trace, steps, horizons, n)
        if trace.predictions is None:
            raise InputError(
                "predictor 'recorded': the trace has no array predictions; it must have one of shape (tokens, layers, "
                f"horizons >= {horizons}, n)"
            )
        recorded = trace.predictions.shape[2]
        if recorded < horizons:
            raise InputError(
                f"predictor 'recorded': the trace's predictions reach {recorded} layers ahead, not {horizons}: "
                f"record {horizons} or ask for at most {recorded}"
            )
        experts = run.no_guesses(n)
        width = min(n, trace.predictions.shape[3])
        experts[..., :width] = trace.predictions[run.rows, :, :horizons, :n]
        if trace.confidences is None:
            return run.guesses(experts)
        confidences = run.no_confidences(n)
        confidences[..., :width] = trace.confidences[run.rows, :, :horizons, :n]
        return run.guesses(experts, confidences)


def recall_at(guesses: Guesses, trace: RoutingTrace, steps: Sequence[Step]) -> npt.NDArray[np.float64]:
    """Returns the share of true experts that the guesses contain, float64 (horizons,), in order of horizon.

    True experts are those that the targets used, once for each token that could guess them; 0 where there are none.
    """
    run = Run.of(trace, steps, *guesses.experts.shape[2:])
    recalls = np.zeros(guesses.horizons)
    for ahead, truth in enumerate(np.moveaxis(run.truth(), 2, 0)):
        found = int(found_in(truth, guesses.experts[:, :, ahead]).sum())
        recalls[ahead] = found / max(int((truth >= 0).sum()), 1)
    return recalls


def _learned(weights: str) -> Predictor:
    return Learned(load_weights(weights))


PREDICTORS: dict[str, Callable[..., Predictor]] = {
    "oracle": Oracle,
    "previous-token": PreviousToken,
    "frequency": Frequency,
    "transition": Transition,
    "context": Context,
    "activation": Activation,
    "recorded": Recorded,
    "learned": _learned,
}

#: Predictors whose guesses depend on nothing but what they are made with and asked.
SHIPPED = (Oracle, PreviousToken, Frequency, Transition, Context, Activation, Recorded, Learned)


def make_predictor(name: str, *, seed: int = 0, **options: Any) -> Predictor:
    """Returns the predictor of that name in PREDICTORS, built with its options, and with the seed if it draws at all.

    Raises ValueError if there is no such predictor, it has no such option or lacks one, or a value is impossible.
    """
    if name not in PREDICTORS:
        raise InputError(unknown_name("predictor.name", name, PREDICTORS))
    known = list(inspect.signature(PREDICTORS[name]).parameters)
    seeds = {"seed": seed} if "seed" in known else {}
    for option in options:
        if option not in known:
            own = [key for key in known if key != "seed"]
            raise InputError(unknown_name(f"option of predictor {name!r}", option, own or ["none, it has no options"]))
    try:
        inspect.signature(PREDICTORS[name]).bind(**seeds, **options)
    except TypeError as error:
        raise InputError(f"predictor {name!r}: {error}") from None
    return PREDICTORS[name](**seeds, **options)
