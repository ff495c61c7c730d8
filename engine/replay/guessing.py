"""Whose guesses an eviction policy goes by in a replay: a predictor by its name, and how far ahead it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import InputError
from ...words import unknown_name
from ...workloads.batches import Step
from ...workloads.guesses import Guesses
from ...workloads.learned import Learned
from ...workloads.predictors import PREDICTORS, Predictor, Recorded, make_predictor
from ...workloads.trace import RoutingTrace
from ..policies.eviction import EVICTION


def goes_by_guesses(eviction: str) -> bool:
    """Whether an eviction policy, by its name in EVICTION, asks a predictor."""
    return bool(getattr(EVICTION[eviction], "needs_guesses", False))


@dataclass(frozen=True)
class Guessing:
    """A predictor by its name in PREDICTORS, asked `lookahead` layers ahead: without it all, or as far as it knows.

    `weights` are those of "learned": a folder, a file or a shipped name. `recall` is that of "oracle", 1 without it.
    Raises InputError.
    """

    predictor: str = "transition"
    lookahead: int | None = None
    weights: str | None = None
    recall: float | None = None

    def __post_init__(self) -> None:
        if self.predictor not in PREDICTORS:
            raise InputError(unknown_name("predictor", self.predictor, PREDICTORS))
        if self.lookahead is not None and self.lookahead < 1:
            raise InputError(f"lookahead = {self.lookahead}: must be at least 1")
        if (self.weights is not None) != (self.predictor == "learned"):
            given = f"predictor = {self.predictor!r}, weights = {self.weights!r}"
            raise InputError(f"{given}: weights (a folder of `prestage predictor train`) go with predictor = 'learned'")
        if self.recall is not None and self.predictor != "oracle":
            raise InputError(f"recall = {self.recall}: goes with predictor = 'oracle' (given {self.predictor!r})")

    def made(self) -> Predictor:
        """Returns the predictor. Raises InputError if a value is impossible, or its weights cannot be used."""
        options: dict[str, Any] = {"weights": self.weights, "recall": self.recall}
        return make_predictor(self.predictor, **{name: value for name, value in options.items() if value is not None})

    def guesses(self, trace: RoutingTrace, steps: Sequence[Step]) -> Guesses:
        """Returns as many guesses of each layer ahead as a token uses experts.

        Raises InputError where the predictor cannot guess so far ahead, or not on this trace.
        """
        predictor = self.made()
        horizons = _reach(predictor, trace) if self.lookahead is None else self.lookahead
        return predictor.guess(trace, steps, horizons, trace.k)


#: What is asked where nobody says.
USUAL = Guessing()


def _reach(predictor: Predictor, trace: RoutingTrace) -> int:
    """Returns how many layers ahead a predictor is asked where nobody says."""
    if isinstance(predictor, Learned):
        return min(trace.layers, predictor.weights.shape.horizons)
    if isinstance(predictor, Recorded) and trace.predictions is not None:
        return min(trace.layers, int(trace.predictions.shape[2]))
    return trace.layers
