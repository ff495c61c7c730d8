"""Synthetic routing traces, with the three things that decide what a cache can do as parameters.

Popularity skew (some experts are chosen more often by everybody), a working set (a sequence favors some experts),
and lag-1 reuse (a token keeps experts of the token before). With skew 0, no working set and reuse 0, the choices
are independent and uniform.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bounded import check_memory
from ..errors import InputError
from .batches import DECODE, PREFILL
from .trace import RoutingTrace
from .trace_limits import MAX_EXPERTS, MAX_TOP_K, check_total_experts

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

#: The working set's part of the probability of one draw, unless it has more by popularity alone.
WORKING_SET_SHARE = 0.9
#: Beyond this the least popular experts are never met, and numbers come near the end of the float range.
MAX_SKEW = 20.0
#: What each random generator is for; part of its key, so that none shares its luck with another.
_RANKS, _WORKING_SETS, _DRAWS, _KEEPS, _WEIGHTS = range(5)
#: What a choice, a token and a sequence take, from drawing them to running them; about, and rather more.
_CHOICE_BYTES, _TOKEN_BYTES, _SEQUENCE_BYTES = 16, 500, 1000
#: How many random numbers are held at once.
_CHUNK_NUMBERS = 1 << 20


@dataclass(frozen=True)
class SyntheticConfig:
    """What to generate.

    - `tokens`: rows in all, shared evenly among `sequences` (the first ones get one more where it does not divide).
    - `layers`, `experts`, `top_k`: the model.
    - `skew`: Zipf exponent of the popularity, over ranks that each layer deals out in its own order; 0 is uniform.
    - `working_set`: experts that each sequence favors at each layer, drawn by popularity, top_k..experts; a fresh
      draw falls into it with a probability of at least WORKING_SET_SHARE. None: no favorites.
    - `reuse`: the probability that an expert of the previous token of the sequence is kept, each by itself. The other
      places are drawn afresh, which may bring back an expert not kept, so that the measured
      reuse is at least this.
    - `prefill_tokens`: the first so many tokens of each sequence are prefill.

    Raises ValueError naming the parameter, its value and its bounds.
    """

    tokens: int
    layers: int
    experts: int
    top_k: int
    skew: float = 0.0
    working_set: int | None = None
    reuse: float = 0.0
    sequences: int = 1
    prefill_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        bounds: dict[str, tuple[int, int | None]] = {
            "tokens": (1, None),
            "layers": (1, None),
            "experts": (1, MAX_EXPERTS),
            "top_k": (1, min(self.experts, MAX_TOP_K)),
            "sequences": (1, self.tokens),
            "seed": (0, None),
        }
        for name, (low, high) in bounds.items():
            check_whole(name, getattr(self, name), low, high)
        check_total_experts("synthetic", self.layers, self.experts, InputError)
        check_drawn(self.tokens, self.layers, self.top_k, self.sequences)
        check_prefill(self.prefill_tokens, self.tokens, self.sequences)
        if self.working_set is not None:
            check_whole("working_set", self.working_set, self.top_k, self.experts)
        for name, most in (("skew", MAX_SKEW), ("reuse", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
                raise InputError(f"{name} = {value!r}: must be a number 0..{most:g}")


def check_drawn(tokens: int, layers: int, top_k: int, sequences: int) -> None:
    """Refuse more tokens than memory has room for while they are drawn and run."""
    need_bytes = tokens * (layers * top_k * _CHOICE_BYTES + _TOKEN_BYTES) + sequences * _SEQUENCE_BYTES
    check_memory(f"tokens = {tokens:,} (layers {layers:,}, top-{top_k}, sequences {sequences:,})", need_bytes)


def check_whole(name: str, value: object, low: int, high: int | None, why: str = "") -> None:
    """Raise ValueError naming the parameter, its value, its bounds and why, unless it is an integer low..high."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"{low}..{high}"
        raise InputError(f"{name} = {value!r}: must be an integer, {allowed}{why}")


def check_prefill(prefill_tokens: int, tokens: int, sequences: int) -> None:
    """Refuse a prompt longer than a sequence, of which `tokens` are shared evenly: ValueError that says how long."""
    most = tokens // sequences
    check_whole("prefill_tokens", prefill_tokens, 0, most, f" (tokens = {tokens} of {sequences} sequences)")


def synthesize(
    tokens: int,
    layers: int,
    experts: int,
    top_k: int,
    *,
    skew: float = 0.0,
    working_set: int | None = None,
    reuse: float = 0.0,
    sequences: int = 1,
    prefill_tokens: int = 0,
    seed: int = 0,
) -> RoutingTrace:
    """Returns a checked trace; the parameters are SyntheticConfig's, and are repeated in its meta.

    Random numbers are keyed on (seed, sequence): a longer sequence begins like a shorter one, and the
    first sequences do not change when more are asked for. `weights` are a softmax over k standard normal scores,
    descending. Raises ValueError for a parameter out of bounds.
    """
    config = SyntheticConfig(
        tokens=tokens,
        layers=layers,
        experts=experts,
        top_k=top_k,
        skew=skew,
        working_set=working_set,
        reuse=reuse,
        sequences=sequences,
        prefill_tokens=prefill_tokens,
        seed=seed,
    )
    popularity = _popularity(config)
    lengths = share_evenly(tokens, sequences)
    parts = [_route(config, popularity, number, length) for number, length in enumerate(lengths)]
    chosen = _reused([fresh for fresh, _, _ in parts], [keep for _, keep, _ in parts])
    routed = [(own, weights) for own, (_, _, weights) in zip(chosen, parts, strict=True)]
    return join_sequences(routed, experts, prefill_tokens, {"model": "synthetic", "synthetic": asdict(config)})


def share_evenly(tokens: int, sequences: int) -> list[int]:
    """Returns the length of each sequence; the first ones get one more where it does not divide."""
    each, longer = divmod(tokens, sequences)
    return [each + (number < longer) for number in range(sequences)]


def join_sequences(
    parts: Sequence[tuple[npt.NDArray[Any], npt.NDArray[np.float16]]],
    experts: int,
    prefill_tokens: int,
    meta: dict[str, Any],
) -> RoutingTrace:
    """Returns the checked trace of sequences given as choices and weights, each (length, layers, k)."""
    lengths = [len(chosen) for chosen, _ in parts]
    position = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    trace = RoutingTrace(
        experts=np.concatenate([chosen for chosen, _ in parts]),
        num_experts=experts,
        weights=np.concatenate([weights for _, weights in parts]),
        sequence=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        position=position,
        phase=np.where(position < prefill_tokens, PREFILL, DECODE).astype(np.uint8),
        meta={"source": "synthetic", **meta},
    )
    trace.check("synthetic trace")
    return trace


def _generator(config: SyntheticConfig, purpose: int, sequence: int = 0) -> np.random.Generator:
    return np.random.default_rng([config.seed, purpose, sequence])


def _popularity(config: SyntheticConfig) -> FloatArray:
    """Returns the probability that one draw takes an expert, (layers, experts): Zipf over each layer's own order."""
    by_rank = np.arange(1, config.experts + 1, dtype=np.float64) ** -config.skew
    generator = _generator(config, _RANKS)
    ranks = np.stack([generator.permutation(config.experts) for _ in range(config.layers)])
    return by_rank[ranks] / math.fsum(by_rank)


def _favor(config: SyntheticConfig, popularity: FloatArray, sequence: int) -> FloatArray:
    """Returns the probabilities (layers, experts) of one sequence: its working set gets the share it is due."""
    if config.working_set is None or config.working_set == config.experts:
        return popularity
    times = _generator(config, _WORKING_SETS, sequence).standard_exponential(popularity.shape)
    chosen = _first_of_race(times / popularity, config.working_set)
    inside = np.zeros(popularity.shape, dtype=np.bool_)
    np.put_along_axis(inside, chosen, True, axis=-1)
    natural = (popularity * inside).sum(axis=-1, keepdims=True)
    outside = (popularity * ~inside).sum(axis=-1, keepdims=True)
    share = np.maximum(natural, WORKING_SET_SHARE)
    favored: FloatArray = np.where(inside, popularity * share / natural, popularity * (1 - share) / outside)
    # (1 - share) may round to 0 where the set holds nearly everything; a probability must not.
    return np.maximum(favored, np.finfo(np.float64).tiny * 1e100)


def _first_of_race(times: FloatArray, count: int) -> IntArray:
    """Returns who arrives first along the last axis, in order, the `count` first.

    If times are exponential over probability, this draws without replacement: Efraimidis, Spirakis, "Weighted
    random sampling with a reservoir", Information Processing Letters 97(5), 2006.
    """
    last = np.partition(times, count - 1, axis=-1)[..., count - 1, None]
    first = np.flatnonzero(times <= last) % times.shape[-1]
    if first.size * times.shape[-1] == times.size * count:
        first = first.reshape(*times.shape[:-1], count)
    else:  # some arrive at once: the first in order win
        first = np.argsort(times, axis=-1, kind="stable")[..., :count]
    order = np.argsort(np.take_along_axis(times, first, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(first, order, axis=-1)


def _route(
    config: SyntheticConfig, popularity: FloatArray, sequence: int, length: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_], npt.NDArray[np.float16]]:
    """Returns what each token of one sequence draws, which experts of the token before it keeps, and the weights.

    Each is (length, layers, k).
    """
    shape = (length, config.layers, config.top_k)
    chosen = np.empty(shape, dtype=np.uint8 if config.experts <= 256 else np.uint16)
    kept = np.empty(shape, dtype=np.bool_)
    weights = np.empty(shape, dtype=np.float16)
    probabilities = _favor(config, popularity, sequence)
    draws, keeps, scores = (_generator(config, purpose, sequence) for purpose in (_DRAWS, _KEEPS, _WEIGHTS))
    rows = max(1, _CHUNK_NUMBERS // (config.layers * config.experts))
    for first in range(0, length, rows):
        chunk = slice(first, min(first + rows, length))
        size = (chunk.stop - chunk.start, config.layers)
        times = draws.standard_exponential((*size, config.experts)) / probabilities
        chosen[chunk] = _first_of_race(times, config.top_k)
        kept[chunk] = keeps.random((*size, config.top_k)) < config.reuse
        weights[chunk] = draw_weights(scores, (*size, config.top_k))
    return chosen, kept, weights


def _reused(drawn: Sequence[npt.NDArray[Any]], keep: Sequence[npt.NDArray[np.bool_]]) -> list[npt.NDArray[Any]]:
    """Returns the choices of sequences, given what each token draws and keeps; no sequence is longer than one before.

    All sequences go on token by token together: a token depends on the one before it alone.
    """
    if not any(kept.any() for kept in keep):
        return list(drawn)
    chosen = np.concatenate(drawn)
    kept = np.concatenate(keep)
    lengths = np.array([len(own) for own in drawn])
    starts = np.cumsum(lengths) - lengths
    _, layers, k = chosen.shape
    for position in range(1, max(lengths)):
        rows = starts[: np.count_nonzero(lengths > position)] + position
        previous, fresh = (chosen[those].reshape(-1, k).astype(np.int32) for those in (rows - 1, rows))
        chosen[rows] = _keep_some(previous, kept[rows].reshape(-1, k), fresh).reshape(-1, layers, k)
    return np.split(chosen, starts[1:])


def _keep_some(previous: IntArray, keep: npt.NDArray[np.bool_], fresh: IntArray) -> IntArray:
    """Returns the next token's experts (layers, k): the kept ones, then as many fresh ones as there are places.

    Of the k fresh ones at most as many are kept ones as are kept, so the others always fill the places.
    """
    kept = np.where(keep, previous, -1)
    repeated = np.zeros(fresh.shape, dtype=np.bool_)
    for column in kept.T:
        repeated |= fresh == column[:, None]
    usable = np.concatenate([keep, ~repeated], axis=1)
    first = usable & (np.cumsum(usable, axis=1) <= previous.shape[1])
    kept_first: IntArray = np.concatenate([previous, fresh], axis=1)[first].reshape(previous.shape)
    return kept_first


def draw_weights(generator: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float16]:
    """Returns the softmax over the last axis of standard normal scores, descending."""
    scores = -np.sort(-generator.standard_normal(shape), axis=-1)
    powers = np.exp(scores - scores[..., :1])
    weights: npt.NDArray[np.float16] = (powers / powers.sum(axis=-1, keepdims=True)).astype(np.float16)
    return weights
