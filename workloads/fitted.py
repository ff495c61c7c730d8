"""Synthetic traces that are reused and cached like a real one: a generator whose parameters are fitted to a trace.

At each layer a token takes the k experts of the highest score. A score is a sum of normal variables, each with its
part of a variance of 1, and bonuses for recent use:

- how popular the expert is with everybody (`common`), and with this sequence (`popularity`);
- what the sequence is about just now (`drift`), an autoregressive process that forgets in about 50 tokens;
- the token itself (the rest), half of it drawn for each expert alone and half through a hidden state of a few
  dimensions that all layers share, so that an unusual token is unusual in every layer;
- `recency`, by the expert's place in the layer's LRU stack, and `echo`, by how many tokens ago it was chosen, if at
  most 16: text repeats itself at some distances more than at others.

Pooled popularity alone is the wrong model: skew lives within a sequence, and reuse of the last few tokens comes on
top of it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ..bounded import read
from ..errors import InputError
from ..files import write_file
from ..machine_code import compiled
from .synthetic import check_drawn, check_prefill, check_whole, draw_weights, join_sequences, share_evenly
from .trace import RoutingTrace
from .trace_limits import MAX_EXPERTS, MAX_TOP_K, check_total_experts

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

#: What the drift keeps from one token to the next.
DRIFT_KEEPS = 0.98
#: What part of a token's variance comes through the hidden state, and how many dimensions that has.
SHARED, DIMENSIONS = 0.5, 4
#: How many tokens back an echo reaches.
ECHO_TOKENS = 16
#: Classes of places in the LRU stack end at k, and then each this many times farther down.
CLASS_GROWTH = 1.35

#: What each random generator is for; part of its key. The numbers go on where those of `synthetic` end.
_COMMON, _LOADINGS, _SEQUENCE, _DRIFTS, _HIDDEN, _NOISE, _WEIGHTS = range(5, 12)
_CHUNK_NUMBERS = 1 << 20
_FORMAT = "prestage fitted routing 1"


#: How the files of shipped fits end.
_SHIPPED = ".fit.json"


class FitError(InputError):
    """A trace that cannot be fitted, or a file that holds no fit: one line."""


def shipped_fits() -> list[str]:
    """Returns the names of the fits that ship: each is a model's, whose real routing it was fitted to."""
    names = [entry.name for entry in (resources.files("prestage") / "workloads" / "data").iterdir()]
    return sorted(name.removesuffix(_SHIPPED) for name in names if name.endswith(_SHIPPED))


@contextmanager
def fit_file(name: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives the file of a fit, or of a shipped one's name; a file of that name comes before it."""
    if str(name) in shipped_fits() and not Path(name).is_file():
        with resources.as_file(resources.files("prestage") / "workloads" / "data" / f"{name}{_SHIPPED}") as file:
            yield file
    else:
        yield Path(name)


@dataclass(frozen=True)
class LayerFit:
    """One layer: parts of the variance of a score, and the bonus of each class of places, most recent first."""

    common: float
    popularity: float
    drift: float
    recency: tuple[float, ...]


@dataclass(frozen=True)
class FittedRouting:
    """The generator's parameters. `model` names where they come from, `echo` is by distance: 1, …, ECHO_TOKENS."""

    model: str
    num_experts: int
    top_k: int
    echo: tuple[float, ...]
    layers: tuple[LayerFit, ...]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the parameters as JSON, whole or not at all."""
        content = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1).encode() + b"\n"
        write_file(Path(path), content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote, or a shipped fit by its name; FitError for anything else."""
        try:
            with fit_file(path) as file:
                data = json.loads(read(file, FitError).decode("utf-8"))
        except OSError as error:
            raise FitError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise FitError(f"{path}: not JSON: must be what `prestage trace fit -o FILE.json` wrote") from error
        if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
            raise FitError(f"{path}: format: must be {_FORMAT!r}, as `prestage trace fit -o FILE.json` writes it")
        try:
            layers = tuple(LayerFit(**{**each, "recency": tuple(each["recency"])}) for each in data.pop("layers"))
            fitted = cls(layers=layers, echo=tuple(data.pop("echo")), **data)
            fitted._check()
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            raise FitError(f"{path}: {error if isinstance(error, InputError) else _not_as_written(error)}") from error
        return fitted

    def _check(self) -> None:
        check_whole("num_experts", self.num_experts, 1, MAX_EXPERTS)
        check_whole("top_k", self.top_k, 1, min(self.num_experts, MAX_TOP_K))
        check_total_experts("layers", len(self.layers), self.num_experts, FitError)
        _check_numbers("echo", self.echo, ECHO_TOKENS)
        classes = len(class_ends(self.num_experts, self.top_k))
        if not self.layers:
            raise InputError("layers: must be at least one")
        for number, layer in enumerate(self.layers):
            parts = (layer.common, layer.popularity, layer.drift)
            if not all(isinstance(part, (int, float)) and part >= 0 for part in parts) or sum(parts) > 1 + 1e-9:
                raise InputError(f"layer {number}: parts {parts}: must be at least 0, and at most 1 together")
            _check_numbers(f"layer {number}: recency", layer.recency, classes)

    def synthesize(self, tokens: int, *, sequences: int = 1, prefill_tokens: int = 0, seed: int = 0) -> RoutingTrace:
        """Returns a checked trace of `tokens` rows, shared evenly among sequences, each beginning with its prefill.

        Random numbers are keyed on (seed, sequence): a longer sequence begins like a shorter one, and the first
        sequences do not change when more are asked for. Raises ValueError for a parameter out of bounds.
        """
        check_whole("tokens", tokens, 1, None)
        check_whole("sequences", sequences, 1, tokens)
        check_prefill(prefill_tokens, tokens, sequences)
        check_whole("seed", seed, 0, None)
        check_drawn(tokens, len(self.layers), self.top_k, sequences)
        return self.draw(share_evenly(tokens, sequences), seed, prefill_tokens)

    def draw(self, lengths: Sequence[int], seed: int, prefill_tokens: int = 0) -> RoutingTrace:
        """Returns a checked trace of sequences of these lengths."""
        parts = [_Sequence(self, seed, number).draw(length) for number, length in enumerate(lengths)]
        meta = {"model": "synthetic", "fitted_to": self.model, "seed": seed}
        return join_sequences(parts, self.num_experts, prefill_tokens, meta)


def _check_numbers(name: str, numbers: Sequence[Any], count: int) -> None:
    if len(numbers) != count or not all(isinstance(each, (int, float)) and math.isfinite(each) for each in numbers):
        raise InputError(f"{name}: must be {count} numbers")


def _not_as_written(error: Exception) -> str:
    """Returns what to say of data of another shape than `save` writes."""
    return f"not as `prestage trace fit -o FILE.json` writes it ({type(error).__name__}: {error})"


class _Sequence:
    """One sequence's state: what its scores are made of, and each layer's LRU stack."""

    def __init__(self, fitted: FittedRouting, seed: int, number: int) -> None:
        self._fitted, self._key = fitted, (seed, number)
        layers, self._k = fitted.layers, fitted.top_k
        self._shape = (len(layers), fitted.num_experts)
        common, popularity, drift = (
            np.sqrt([[getattr(layer, name)] for layer in layers]) for name in ("common", "popularity", "drift")
        )
        rest = 1 - common**2 - popularity**2 - drift**2
        self._token = np.sqrt(np.maximum(rest, 0))
        everybody = np.random.default_rng([seed, _COMMON]).standard_normal(self._shape)
        loadings = np.random.default_rng([seed, _LOADINGS]).standard_normal((DIMENSIONS, *self._shape))
        self._loadings = loadings * self._token * np.sqrt(SHARED / DIMENSIONS)
        own = self._generator(_SEQUENCE).standard_normal((2, *self._shape))
        self._base = common * everybody + popularity * own[0]
        self._drift, self._moves = drift * own[1], drift * np.sqrt(1 - DRIFT_KEEPS**2)
        ends = class_ends(fitted.num_experts, self._k)
        classes = np.searchsorted(ends, np.arange(fitted.num_experts), side="right")
        self._echo = np.array(fitted.echo, dtype=np.float64)
        self._bonus = np.array([layer.recency for layer in layers], dtype=np.float64)[:, classes]

    def _generator(self, purpose: int) -> np.random.Generator:
        seed, number = self._key
        return np.random.default_rng([seed, purpose, number])

    def draw(self, length: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.float16]]:
        """Returns the choices (length, layers, k) and their weights."""
        chosen = np.empty((length, self._shape[0], self._k), dtype=np.int64)
        weights = np.empty(chosen.shape, dtype=np.float16)
        drifts, hidden, noise, scores = (self._generator(each) for each in (_DRIFTS, _HIDDEN, _NOISE, _WEIGHTS))
        # The stack begins in the order of the sequence's own liking, nearly as it will stay.
        places = np.argsort(np.argsort(-(self._base + self._drift), axis=1), axis=1)
        rows = max(1, _CHUNK_NUMBERS // (self._shape[0] * self._shape[1]))
        for first in range(0, length, rows):
            count = min(rows, length - first)
            _choose(
                self._base,
                self._drift,
                self._moves * drifts.standard_normal((count, *self._shape)),
                hidden.standard_normal((count, DIMENSIONS)),
                self._loadings,
                self._token * np.sqrt(1 - SHARED) * noise.standard_normal((count, *self._shape)),
                self._bonus,
                self._echo,
                places,
                chosen,
                first,
            )
            weights[first : first + count] = draw_weights(scores, (count, self._shape[0], self._k))
        return chosen.astype(np.uint8 if self._fitted.num_experts <= 256 else np.uint16), weights


@compiled
def _choose(
    base: FloatArray,
    drift: FloatArray,
    moves: FloatArray,
    hidden: FloatArray,
    loadings: FloatArray,
    noise: FloatArray,
    bonus: FloatArray,
    echo: FloatArray,
    places: IntArray,
    chosen: IntArray,
    first: int,
) -> None:
    """Fill rows of `chosen` (tokens, layers, k), best first; `drift` and `places` (layers, experts) go on with each.

    The last of a token's experts is then the most recent, as in `lru_depths`.
    """
    _, layers, k = chosen.shape
    experts = base.shape[1]
    best = np.empty(k, dtype=np.float64)
    echoed = np.empty(experts, dtype=np.float64)
    for token in range(len(noise)):
        row = first + token
        for layer in range(layers):
            best[:] = -np.inf
            echoed[:] = 0
            for back in range(1, min(len(echo), row) + 1):
                for slot in range(k):
                    echoed[chosen[row - back, layer, slot]] += echo[back - 1]
            for expert in range(experts):
                drift[layer, expert] = DRIFT_KEEPS * drift[layer, expert] + moves[token, layer, expert]
                score = base[layer, expert] + drift[layer, expert] + noise[token, layer, expert]
                score += bonus[layer, places[layer, expert]] + echoed[expert]
                for dimension in range(hidden.shape[1]):
                    score += hidden[token, dimension] * loadings[dimension, layer, expert]
                at = k
                while at > 0 and score > best[at - 1]:
                    if at < k:
                        best[at] = best[at - 1]
                        chosen[row, layer, at] = chosen[row, layer, at - 1]
                    at -= 1
                if at < k:
                    best[at] = score
                    chosen[row, layer, at] = expert
            _move_to_front(places[layer], chosen[row, layer])


@compiled
def _move_to_front(places: IntArray, chosen: IntArray) -> None:
    """Renew a layer's LRU stack: the chosen experts come first, the last of them foremost."""
    k = len(chosen)
    before = np.empty(k, dtype=np.int64)
    for slot in range(k):
        before[slot] = places[chosen[slot]]
    for expert in range(len(places)):
        behind = 0
        for slot in range(k):
            if before[slot] > places[expert]:
                behind += 1
        places[expert] += behind
    for slot in range(k):
        places[chosen[slot]] = k - 1 - slot


def class_ends(experts: int, k: int) -> IntArray:
    """Returns where each class of places in the LRU stack ends: k, and so on to the number of experts."""
    ends = [k]
    while ends[-1] < experts:
        ends.append(min(experts, max(ends[-1] + 1, round(ends[-1] * CLASS_GROWTH))))
    return np.array(ends)
