"""Training the predictor on a routing trace: sequences to learn from, sequences to stop by, a seed.

Every token is taken as if it were decoded alone, prompts too, which gives the most examples. Examples are runs of
neighboring tokens, so that they share most of their contexts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .batches import DECODE, plan_steps, rows_by_sequence
from .guesses import Int64s, Run
from .learned import Weights, gather, measured
from .network import Shape, initial_weights, logits
from .trace import RoutingTrace
from .trace_limits import TraceError

if TYPE_CHECKING:
    from torch import Tensor

#: Called with what is running, and how many of how many steps are done.
Progress = Callable[[str, int, int], None]

#: What the weights repeat of the trace's meta.
_PROVENANCE = ("model", "source", "licence")
#: Neighboring tokens of one example, and examples of one step of the optimizer.
_RUN_TOKENS, _RUNS = 16, 2
_LEARNING_RATE, _WEIGHT_DECAY, _BETAS = 3e-3, 0.01, (0.9, 0.98)
#: Steps over which the learning rate rises, a tenth of all at most, and the share that is left after its cosine.
_WARM_UP_STEPS, _LAST_SHARE = 100, 0.02
_LARGEST_GRADIENT = 1.0
_MOST_EPOCHS = 10_000


@dataclass(frozen=True)
class Settings:
    """How to train. The last `held_out` of the trace's sequences, in file order, decide when to stop.

    Of a single sequence its last tokens do. Training stops after `patience` epochs in a row without a lower loss on
    those, and the best epoch's weights stay.
    """

    horizons: int = 3
    context: int = 3
    epochs: int = 5
    patience: int = 2
    held_out: float = 0.1
    seed: int = 0
    width: int = 64
    heads: int = 4
    blocks: int = 2

    def __post_init__(self) -> None:
        for name in ("epochs", "patience"):
            if not 1 <= getattr(self, name) <= _MOST_EPOCHS:
                raise InputError(f"{name} = {getattr(self, name)}: must be at least 1, and at most {_MOST_EPOCHS:,}")
        if self.seed < 0:
            raise InputError(f"seed = {self.seed}: must be at least 0")
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out = {self.held_out}: must be above 0 and below 1")


def train(trace: RoutingTrace, settings: Settings, progress: Progress | None = None) -> Weights:
    """Train a predictor. The same trace, settings, torch and number of threads give the same file of weights.

    Raises ValueError for impossible settings and TraceError where there is no second token to stop by.
    """
    shape = Shape(
        trace.layers,
        trace.num_experts,
        trace.k,
        settings.horizons,
        settings.context,
        settings.width,
        settings.heads,
        settings.blocks,
    )
    units = [np.array(rows) for rows in rows_by_sequence(trace.sequence)]
    if len(units) == 1:
        units = list(units[0][:, None])
    if len(units) < 2:
        raise TraceError("the trace has 1 token: training needs one to learn from and one more to stop by")
    stop_by = min(max(1, round(settings.held_out * len(units))), len(units) - 1)
    lessons = _Examples.of(trace.select(np.concatenate(units[:-stop_by])), shape)
    checks = _Examples.of(trace.select(np.concatenate(units[-stop_by:])), shape)
    arrays, losses = _fit(shape, settings, lessons, checks, progress or (lambda *_: None))
    made = {
        **{key: trace.meta[key] for key in _PROVENANCE if key in trace.meta},
        "sequences": len(np.unique(trace.sequence)),
        "first_sequence": int(trace.sequence[0]),
        "last_sequence": int(trace.sequence[-1]),
        "tokens": lessons.tokens,
        "held_out_tokens": checks.tokens,
        "held_out_loss_nats": losses,
        "seed": settings.seed,
    }
    return measured(Weights(shape, {name: array.astype(np.float16) for name, array in arrays.items()}, made))


def _fit(
    shape: Shape, settings: Settings, lessons: _Examples, checks: _Examples, progress: Progress
) -> tuple[Mapping[str, npt.NDArray[Any]], list[float]]:
    """Returns the arrays of the epoch with the lowest loss on `checks`, and that loss after every epoch."""
    import torch

    weights = {
        name: torch.from_numpy(array).requires_grad_() for name, array in initial_weights(shape, settings.seed).items()
    }
    random = np.random.default_rng(settings.seed)
    optimizer = torch.optim.AdamW(weights.values(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY, betas=_BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(len(lessons.batches()) * settings.epochs))
    best, losses = {name: value.detach().clone() for name, value in weights.items()}, []
    for epoch in range(1, settings.epochs + 1):
        batches = lessons.batches(random)
        for step, places in enumerate(batches, 1):
            loss, count = lessons.loss(weights, shape, places)
            optimizer.zero_grad()
            torch.autograd.backward(loss / max(count, 1))
            torch.nn.utils.clip_grad_norm_(weights.values(), _LARGEST_GRADIENT)
            optimizer.step()
            schedule.step()
            progress(f"epoch {epoch}", step, len(batches))
        losses.append(checks.mean_loss(weights, shape))
        if losses[-1] <= min(losses):
            best = {name: value.detach().clone() for name, value in weights.items()}
        elif len(losses) - 1 - int(np.argmin(losses)) >= settings.patience:
            break
    return {name: value.numpy() for name, value in best.items()}, losses


def _rate(steps: int) -> Callable[[int], float]:
    """Returns the learning rate's factor at each step: a linear rise, then a cosine."""
    warm_up = max(1, min(_WARM_UP_STEPS, steps // 10))

    def factor(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
        return min(1.0, (step + 1) / warm_up) * (_LAST_SHARE + (1 - _LAST_SHARE) * cosine)

    return factor


@dataclass(frozen=True, eq=False)
class _Examples:
    """Tokens with what they know and what they are to guess."""

    run: Run
    known: Int64s
    #: The true experts (tokens, layers, horizons, k) of what each visit guesses, -1 for none.
    truth: npt.NDArray[np.int16]

    @classmethod
    def of(cls, trace: RoutingTrace, shape: Shape) -> _Examples:
        """Take every token of the trace as a step of its own."""
        steps = plan_steps(trace.sequence, np.full(trace.tokens, DECODE))
        run = Run.of(trace, steps, shape.horizons, 1)
        return cls(run, run.known_tokens(shape.context), run.truth())

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return len(self.known)

    def batches(self, random: np.random.Generator | None = None) -> list[Int64s]:
        """Returns the places of each step: runs of neighbors, shuffled by `random` and from where it says."""
        first = 0 if random is None else int(random.integers(_RUN_TOKENS))
        starts = np.arange(first - _RUN_TOKENS if first else 0, self.tokens, _RUN_TOKENS)
        if random is not None:
            starts = random.permutation(starts)
        together = [starts[i : i + _RUNS, None] + np.arange(_RUN_TOKENS) for i in range(0, len(starts), _RUNS)]
        return [places[(places >= 0) & (places < self.tokens)] for places in together]

    def loss(self, weights: dict[str, Tensor], shape: Shape, places: Int64s) -> tuple[Tensor, int]:
        """Returns the loss in nats, summed over guesses, and how many guesses there are.

        Top-1: cross-entropy among the experts. Otherwise each expert's being used or not is a question of its own, and
        a guess costs their binary cross-entropies together.
        """
        import torch
        import torch.nn.functional as F

        scores = logits(weights, shape, *gather(self.run.chosen, self.known[places]))
        truth = torch.from_numpy(self.truth[places].astype(np.int64))
        asked = truth[..., 0] >= 0
        scores, truth = scores[asked], truth[asked]
        if shape.top_k == 1:
            return F.cross_entropy(scores, truth[:, 0], reduction="sum"), len(truth)
        used = torch.zeros_like(scores).scatter_(-1, truth, 1.0)
        return F.binary_cross_entropy_with_logits(scores, used, reduction="sum"), len(truth)

    def mean_loss(self, weights: dict[str, Tensor], shape: Shape) -> float:
        """Returns the loss of a guess, in nats, over all tokens."""
        import torch

        with torch.inference_mode():
            parts = list(self._losses(weights, shape))
        return sum(loss for loss, _ in parts) / max(sum(count for _, count in parts), 1)

    def _losses(self, weights: dict[str, Tensor], shape: Shape) -> Iterator[tuple[float, int]]:
        for places in self.batches():
            loss, count = self.loss(weights, shape, places)
            yield float(loss), count
