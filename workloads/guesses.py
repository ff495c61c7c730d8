"""Guesses, and what they are made from: ranked experts of the layers ahead, and what follows what in a run.

Every predictor, written or trained, makes its guesses out of a `Run` and hands them out as `Guesses`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ..bounded import check_memory
from ..errors import InputError
from .batches import Step
from .trace import RoutingTrace

Int16s = npt.NDArray[np.int16]
Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

#: How many layers ahead anybody looks.
MOST_HORIZONS = 1024
#: What a guess takes while guesses are made: expert, confidence, and what they are ranked by.
_GUESS_BYTES = 16
#: Greater than every expert, so that it stands last in a sorted list and shifts nothing.
_NONE_TAKEN = np.iinfo(np.int16).max
#: Work that is done for many cells at once is cut into pieces of about this many numbers, to stay in the caches.
_PIECE = 1 << 20


@dataclass(frozen=True, eq=False)
class Guesses:
    """Ranked guesses of every simulated token at every layer; the arrays are taken over and made read-only.

    rows         int64 (rows,): the trace rows that the steps run, each once, in order of step and place.
    experts      int16 (rows, layers, horizons, n), best first, -1 = no guess. `experts[i, l, h - 1]` is guessed by
                 token `rows[i]` once its choice at layer l is known, for layer (l + h) % layers of the token
                 (l + h) // layers tokens on (0: itself), the next being its sequence's first in a later step.
    confidences  float32, shaped as `experts`, 0 where there is no guess; None if the predictor has none.

    There is no guess where no such token is simulated, nor by a token that made no choice (is not `present`) at l.
    """

    rows: Int64s
    experts: Int16s
    confidences: Floats | None = None

    def __post_init__(self) -> None:
        for array in (self.rows, self.experts, self.confidences):
            if array is not None:
                array.setflags(write=False)

    @property
    def horizons(self) -> int:
        """How many layers ahead the farthest guesses are for."""
        return int(self.experts.shape[2])

    @cached_property
    def _place_of(self) -> Int64s:
        """Where the guesses of each trace row lie, -1 for one without any."""
        places = np.full(int(self.rows.max(initial=-1)) + 1, -1, dtype=np.int64)
        places[self.rows] = np.arange(len(self.rows))
        return places

    def places(self, rows: Int64s) -> Int64s:
        """Returns where the guesses of some trace rows lie among `rows`, of the same shape. IndexError without any."""
        places = self._place_of[rows]
        if len(places) and places.min() < 0:
            raise IndexError(f"no guesses were made for row {rows[places.argmin()]} of the trace")
        return places

    @property
    def digest(self) -> str:
        """SHA-256 of shapes and values, in hexadecimal: the same guesses have the same digest on every machine."""
        sha = hashlib.sha256()
        for array in (self.rows, self.experts, self.confidences):
            if array is not None:
                sha.update(f"{array.dtype.name}{array.shape}".encode())
                sha.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        return sha.hexdigest()


@dataclass(frozen=True, eq=False)
class Run:
    """What predictors look at: the simulated rows and what follows what among them.

    A place is an index into `rows`, -1 is none.
    """

    layers: int
    k: int
    horizons: int
    rows: Int64s
    #: The step of each place, and the first place of each step; the last entry closes the last step.
    step: Int64s
    starts: Int64s
    #: The true experts (rows + 1, layers, k), -1 where none is; the last row is all absent, for place -1.
    chosen: Int16s
    #: The first place of the sequence's next step, the last place of its step before, and the place just before.
    next: Int64s
    previous: Int64s
    before: Int64s
    #: How many experts each layer has (layers,): others are not guessed.
    experts: Int64s

    @classmethod
    def of(cls, trace: RoutingTrace, steps: Sequence[Step], horizons: int, n: int) -> Run:
        """Look the steps up in the trace; ValueError as `Predictor.guess` raises it."""
        for name, value in (("horizons", horizons), ("n", n)):
            if value < 1:
                raise InputError(f"predictor {name} = {value}: must be at least 1")
        if horizons > MOST_HORIZONS:
            raise InputError(f"predictor horizons = {horizons:,}: must be at most {MOST_HORIZONS:,} layers ahead")
        if trace.num_experts > _NONE_TAKEN:
            raise InputError(f"num_experts = {trace.num_experts}: guesses hold at most {_NONE_TAKEN}")
        rows = np.concatenate([np.empty(0, dtype=np.int64), *(step.rows for step in steps)])
        asked = f"{n:,} guesses for {horizons:,} layers ahead by {len(rows):,} tokens at {trace.layers:,} layers"
        check_memory(asked, len(rows) * trace.layers * horizons * n * _GUESS_BYTES)
        outside = (rows < 0) | (rows >= trace.tokens)
        if outside.any():
            raise InputError(f"steps name row {rows[outside][0]}: the trace has rows 0 to {trace.tokens - 1}")
        widths = np.array([len(step.rows) for step in steps], dtype=np.int64)
        step = np.repeat(np.arange(len(steps)), widths)
        chosen = np.full((len(rows) + 1, trace.layers, trace.k), -1, dtype=np.int16)
        chosen[:-1] = trace.experts[rows]
        if trace.made is not None:
            chosen[:-1][~trace.made[rows]] = -1
        nxt, previous, before = _neighbors(trace.sequence[rows], step)
        return cls(
            layers=trace.layers,
            k=trace.k,
            horizons=horizons,
            rows=rows,
            step=step,
            starts=np.concatenate([[0], np.cumsum(widths)]),
            chosen=chosen,
            next=nxt,
            previous=previous,
            before=before,
            experts=trace.experts_by_layer.astype(np.int64),
        )

    def targets(self) -> Iterator[tuple[Int64s, Int64s]]:
        """Yields for each horizon the targets' places (rows, layers), -1 for none, and their layers (layers,)."""
        tokens_on = [np.arange(len(self.rows))]
        for ahead in range(1, self.horizons + 1):
            on, layer = np.divmod(np.arange(self.layers) + ahead, self.layers)
            while len(tokens_on) <= on[-1]:
                tokens_on.append(_follow(self.next, tokens_on[-1]))
            yield np.stack([tokens_on[tokens] for tokens in on], axis=1), layer

    def truth(self) -> Int16s:
        """Returns the true experts (rows, layers, horizons, k) of all that is to be guessed, -1 where nothing is."""
        truth = [
            np.where(self.can_guess(token)[..., None], self.chosen[token, layer], -1) for token, layer in self.targets()
        ]
        return np.stack(truth, axis=2)

    def latest(self, ahead: int) -> Int16s:
        """Returns the sequence's last choice at the layer so far ahead (rows, layers, k) that each visit knows of."""
        here = np.arange(self.layers)
        layer = (here + ahead) % self.layers
        token = np.where(layer <= here, np.arange(len(self.rows))[:, None], self.previous[:, None])
        return self.chosen[token, layer]

    def tokens_ago(self, most: int) -> Int64s:
        """Returns the places 0 to `most` tokens earlier in the same sequence, (most + 1, rows), -1 for none."""
        ago = [np.arange(len(self.rows))]
        for _ in range(most):
            ago.append(_follow(self.before, ago[-1]))
        return np.stack(ago)

    def known_tokens(self, most: int) -> Int64s:
        """Returns the places of the token itself and of the `most` last ones of its sequence's earlier steps.

        Shape (rows, most + 1), latest first, -1 for none.
        """
        known = [np.arange(len(self.rows)), self.previous]
        while len(known) <= most:
            known.append(_follow(self.before, known[-1]))
        return np.stack(known[: most + 1], axis=1)

    def can_guess(self, token: Int64s) -> npt.NDArray[np.bool_]:
        """Returns where (rows, layers) a token that made a choice has the target `token`."""
        return (token >= 0) & (self.chosen[:-1, :, 0] >= 0)

    def pieces(self, numbers: int, start: int = 0, end: int | None = None) -> Iterator[slice]:
        """Cut places `start` to `end` so that `numbers` for each make about _PIECE together."""
        end = len(self.rows) if end is None else end
        size = max(1, _PIECE // numbers)
        for first in range(start, end, size):
            yield slice(first, min(first + size, end))

    def no_guesses(self, n: int) -> Int16s:
        """Returns an array for the experts, all -1."""
        return np.full((len(self.rows), self.layers, self.horizons, n), -1, dtype=np.int16)

    def no_confidences(self, n: int) -> Floats:
        """Returns an array for the confidences, all 0."""
        return np.zeros((len(self.rows), self.layers, self.horizons, n), dtype=np.float32)

    def guesses(self, experts: Int16s, confidences: Floats | None = None) -> Guesses:
        """Freeze the arrays, after taking out what nobody guesses or nobody will use."""
        differ = len(set(self.experts.tolist())) > 1
        for ahead, (token, layer) in enumerate(self.targets()):
            guessed = experts[:, :, ahead]
            guessed[~self.can_guess(token)] = -1
            if differ:
                guessed[guessed >= self.experts[layer][:, None]] = -1
        if confidences is not None:
            confidences[experts < 0] = 0
        return Guesses(self.rows, experts, confidences)


def _follow(link: Int64s, places: Int64s) -> Int64s:
    return np.where(places >= 0, link[places], -1)


def _neighbors(sequence: npt.NDArray[np.integer], step: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """Returns `next`, `previous` and `before` of a run."""
    nxt, previous, before = (np.full(len(step), -1, dtype=np.int64) for _ in range(3))
    order = np.argsort(sequence, kind="stable")
    same = sequence[order][1:] == sequence[order][:-1]
    before[order[1:][same]] = order[:-1][same]
    # Runs of one sequence in one step: their bounds, and whether the next run is of the same sequence.
    first = np.flatnonzero(np.concatenate([[True], ~same | (np.diff(step[order]) != 0)])[: len(order)])
    last = np.append(first[1:], len(order)) - 1
    run = np.repeat(np.arange(len(first)), last - first + 1)
    if len(first) > 1:
        linked = sequence[order[first[1:]]] == sequence[order[first[:-1]]]
        nxt[order] = np.append(np.where(linked, order[first[1:]], -1), -1)[run]
        previous[order] = np.append(-1, np.where(linked, order[last[:-1]], -1))[run]
    return nxt, previous, before


def best_of(scores: Int64s, n: int) -> tuple[Int16s, Floats]:
    """Returns the n experts with the highest scores (…, experts) above 0, ties to the lower index, and their shares.

    Shapes (…, n); -1 and 0 where there are fewer.
    """
    e = scores.shape[-1]
    # One number that orders by score, then by falling index.
    keys = scores * e + np.arange(e - 1, -1, -1)
    if n < e:
        keys = np.partition(keys, e - n, axis=-1)[..., e - n :]
    score, index = np.divmod(np.sort(keys, axis=-1)[..., ::-1], e)
    experts = np.full((*scores.shape[:-1], n), -1, dtype=np.int16)
    experts[..., :e] = np.where(score > 0, e - 1 - index, -1)
    shares = np.zeros(experts.shape, dtype=np.float32)
    shares[..., :e] = score / np.maximum(scores.sum(axis=-1, keepdims=True), 1)
    return experts, shares


def found_in(truth: Int16s, listed: Int16s) -> npt.NDArray[np.bool_]:
    """Returns which of the guesses `listed` (…, n) are among the true experts `truth` (…, k); -1 never is."""
    found = np.zeros(listed.shape, dtype=np.bool_)
    for expert in np.moveaxis(truth, -1, 0):
        found |= listed == expert[..., None]
    return found & (listed >= 0)
