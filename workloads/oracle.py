"""The oracle: it knows the future with a given recall, and is wrong by the same luck whatever the policy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .batches import Step
from .guesses import Guesses, Int16s, Int64s, Run
from .keyed_random import uniform
from .trace import RoutingTrace

Floats64 = npt.NDArray[np.float64]

#: Greater than every expert, so that it stands last in a sorted list and shifts nothing.
_NONE_TAKEN = np.iinfo(np.int16).max


class Oracle:
    """Knows the future with a given recall, and is wrong by the same luck whatever the policy.

    Each true expert is in the list with probability `recall`, at its rank of the router's order; the others' ranks,
    and those beyond top-k, hold distinct wrong experts, uniform among all wrong ones; -1 if there are too few. Draws
    are keyed by (seed, sequence, position, layer, horizon) of the target and the rank, so that a longer list begins
    with the shorter one. It is as confident as it is right: `recall` within top-k, 0 beyond.

    `first_layer` is the model's layer that is layer 0 of the trace, where that holds a part of the model: a part meets
    the luck of the whole.

    With `by_horizon` it is as good as routers of later layers on this layer's hidden state: a recall for each layer
    ahead, the last one for all farther ones, and no guess of the next token, whose state nobody has. `draft_recall` is
    that of guesses of the next token, as a drafted token lets make them.
    """

    def __init__(
        self,
        recall: float = 1.0,
        seed: int = 0,
        first_layer: int = 0,
        by_horizon: Sequence[float] = (),
        draft_recall: float | None = None,
    ) -> None:
        for share in (recall, *by_horizon, 0.0 if draft_recall is None else draft_recall):
            if not 0 <= share <= 1:
                raise InputError(f"predictor recall = {share}: must lie between 0 and 1")
        self.recall = recall
        self.seed = seed
        self.first_layer = first_layer
        self.by_horizon = tuple(by_horizon)
        self.draft_recall = draft_recall

    def _recalls(self, layers: int, ahead: int) -> tuple[Floats64, npt.NDArray[np.bool_]]:
        """Returns the recall of guesses made at each layer (layers,) for so many beyond the next, and who guesses."""
        recall = self.by_horizon[min(ahead, len(self.by_horizon) - 1)] if self.by_horizon else self.recall
        crosses = np.arange(layers) + ahead + 1 >= layers
        drafted = (recall if self.by_horizon == () else 0.0) if self.draft_recall is None else self.draft_recall
        return np.where(crosses, drafted, recall), ~crosses | (self.draft_recall is not None or not self.by_horizon)

    def guess(self, trace: RoutingTrace, steps: Sequence[Step], horizons: int, n: int) -> Guesses:
        """Returns the truth, each expert of it kept with probability `recall`."""
        run = Run.of(trace, steps, horizons, n)
        experts, confidences = run.no_guesses(n), run.no_confidences(n)
        # Coin and choice of each rank.
        draws = np.arange(2 * n)
        for ahead, (token, layer) in enumerate(run.targets()):
            recalls, guessing = self._recalls(run.layers, ahead)
            for piece in run.pieces(run.layers * 2 * n):
                target = run.rows[token[piece]][..., None]
                of_model = self.first_layer + layer[:, None]
                luck = uniform(self.seed, trace.sequence[target], trace.position[target], of_model, ahead + 1, draws)
                truth = run.chosen[token[piece], layer]
                guessed = _spoil(truth, luck, recalls, n, run.experts[layer])
                experts[piece, :, ahead] = np.where(guessing[:, None], guessed, -1)
            right = experts[:, :, ahead, : trace.k] >= 0
            confidences[:, :, ahead, : trace.k] = np.where(right, recalls[:, None], 0.0)
        return run.guesses(experts, confidences)


def _spoil(truth: Int16s, luck: Floats64, recall: Floats64, n: int, of_layer: Int64s) -> Int16s:
    """Returns the first n ranks of `truth` (…, layers, k), each kept or replaced by `luck` (…, 2 n): coin and choice.

    `recall` (layers,) is the probability that one is kept.

    Wrong ones are of the layer's experts, `of_layer` (layers,) of them. Where fewer were chosen there are as many
    guesses less, and none where nothing was.
    """
    k = truth.shape[-1]
    ranked = np.full((*truth.shape[:-1], n), -1, dtype=np.int16)
    none = truth < 0
    # What cannot be drawn any more, in ascending order: the true experts, then also the wrong ones in use.
    barred = list(np.moveaxis(np.sort(np.where(none, _NONE_TAKEN, truth), axis=-1), -1, 0))
    free = (of_layer - k + none.sum(axis=-1)).astype(np.int16)
    for rank in range(n):
        wrong = (luck[..., 2 * rank + 1] * free).astype(np.int16)
        for expert in barred:
            wrong += wrong >= expert
        replaced = free > 0
        if rank < k:
            kept = luck[..., 2 * rank] < recall
            ranked[..., rank] = np.where(kept, truth[..., rank], ranked[..., rank])
            replaced &= ~kept & ~none[..., rank]
        ranked[..., rank] = np.where(replaced, wrong, ranked[..., rank])
        free -= replaced
        moving = np.where(replaced, wrong, _NONE_TAKEN)
        for place, expert in enumerate(barred):
            barred[place], moving = np.minimum(expert, moving), np.maximum(expert, moving)
        barred.append(moving)
    ranked[none[..., 0]] = -1
    return ranked
