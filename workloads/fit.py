"""Fit the generator of `fitted` to a trace: draw, measure, correct, until what is drawn measures the same.

Scores are normal, so the part of their experts that two tokens share depends on the correlation of their scores alone:
reuse measured far apart gives the variance of popularity, and so on, by inverting one curve. The bonus for recency
has no such formula; it moves by the logarithm of how often each class of places should be, and was, chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .fitted import ECHO_TOKENS, FitError, FittedRouting, LayerFit, class_ends
from .statistics import SCOPES, Scope, lru_depths, lru_hit_rates, reuse, tokens_by_sequence
from .trace import RoutingTrace

FloatArray = npt.NDArray[np.float64]

#: What a fit is judged by: reuse at these lags, and LRU hit rates at these shares of all experts.
LAGS = range(1, ECHO_TOKENS + 1)
SHARES = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40, 0.50, 0.60, 0.75)

#: Lags that drift and popularity both act on, and lags that only popularity does (where sequences are that long).
_NEAR, _FAR = range(8, 17), (64, 96, 128, 192)
#: Rounds of correction; after so many the steps become smaller, so that the luck of a draw averages out.
_ROUNDS, _FULL_ROUNDS, _STEP = 20, 8, 0.6
#: How many tokens a round draws: about so many of a long trace's, and at least so many by drawing a short one again.
_MOST_TOKENS, _LEAST_TOKENS = 5000, 2000
#: How many tokens, at least, are drawn to be compared: one short sequence says little.
_COMPARED_TOKENS = 6000
#: Rates of classes that are hardly ever chosen stay finite in a logarithm.
_TINY_RATE = 1e-3


def fit_routing(trace: RoutingTrace, progress: Callable[[str, int, int], None] | None = None) -> FittedRouting:
    """Returns the generator fitted to a trace: reuse by lag, LRU hit rates and overlap between sequences, by layer.

    Deterministic. Raises FitError for a trace whose sequences are all shorter than 17 tokens.
    """
    lengths = tokens_by_sequence(trace)
    longest = max(lengths)
    if longest <= max(LAGS):
        raise FitError(f"the trace's longest sequence has {longest} tokens: a fit needs one of {max(LAGS) + 1}")
    far = [lag for lag in _FAR if lag <= 0.6 * longest] or list(_NEAR)
    drawn = _lengths_to_draw(lengths)
    copies = -(-_LEAST_TOKENS // sum(drawn))
    wanted = _Measured([trace], far)
    correlation = _Correlation(trace.num_experts, trace.k)
    state = _State(wanted, correlation)
    for number in range(_ROUNDS):
        fitted = state.fitted(trace)
        traces = [fitted.draw(drawn, seed=number * copies + copy) for copy in range(copies)]
        state.correct(_Measured(traces, far), _STEP * min(1.0, _FULL_ROUNDS / (number + 1)))
        if progress is not None:
            progress("rounds", number + 1, _ROUNDS)
    return state.fitted(trace)


def compare(trace: RoutingTrace, drawn: Sequence[RoutingTrace]) -> dict[str, Any]:
    """Returns how far drawn traces are from a trace, ready for JSON; rates are fractions.

    `reuse` by lag, averaged over layers, and `lru_hit_rate_SCOPE` by share of all experts. Each has the curve of the
    trace, the mean of the drawn ones, the largest difference between these two, and the largest of any single one; a
    rate that is not defined (a capacity below k) is None.
    """
    lags, shares = [str(lag) for lag in LAGS], [f"{share:.0%}" for share in SHARES]

    def rates(scope: Scope) -> Callable[[RoutingTrace], FloatArray]:
        return lambda each: lru_hit_rates(each, SHARES, scope)

    found = {"reuse": _difference(lags, _reuse_by_lag, trace, drawn)}
    return found | {f"lru_hit_rate_{scope}": _difference(shares, rates(scope), trace, drawn) for scope in SCOPES}


def draw_like(fitted: FittedRouting, trace: RoutingTrace, seed: int) -> list[RoutingTrace]:
    """Returns drawn traces with the sequences of a trace, from this seed on; several if it is short."""
    lengths = tokens_by_sequence(trace)
    return [fitted.draw(lengths, seed + copy) for copy in range(-(-_COMPARED_TOKENS // sum(lengths)))]


def _difference(
    names: list[str],
    curve: Callable[[RoutingTrace], FloatArray],
    trace: RoutingTrace,
    drawn: Sequence[RoutingTrace],
) -> dict[str, Any]:
    def plain(values: FloatArray) -> dict[str, float | None]:
        return {name: None if np.isnan(value) else float(value) for name, value in zip(names, values, strict=True)}

    wanted, curves = curve(trace), np.array([curve(each) for each in drawn])
    mean = curves.mean(axis=0)
    return {
        "trace": plain(wanted),
        "synthetic": plain(mean),
        "max_difference": float(np.nanmax(np.abs(mean - wanted))),
        "max_difference_of_a_draw": float(np.nanmax(np.abs(curves - wanted))),
    }


def _reuse_by_lag(trace: RoutingTrace) -> FloatArray:
    return np.array([np.nanmean(reuse(trace, lag)) for lag in LAGS])


def _lengths_to_draw(lengths: list[int]) -> list[int]:
    """Returns the lengths of the first sequences, two at least if there are two, up to about _MOST_TOKENS."""
    ends = np.cumsum(lengths)
    return lengths[: max(2, int(np.searchsorted(ends, _MOST_TOKENS)))]


class _Correlation:
    """Turns the part of their k experts that two tokens share into the correlation of their normal scores."""

    def __init__(self, experts: int, k: int) -> None:
        # No closed form for k > 1: drawn once, 2,000 pairs of tokens for each of 21 correlations.
        self._grid = np.linspace(0, 1, 21)
        first, second = np.random.default_rng(0).standard_normal((2, 2000, experts))
        chosen = np.argpartition(-first, k - 1, axis=1)[:, :k]
        shared = []
        for correlation in self._grid:
            scores = correlation * first + np.sqrt(1 - correlation**2) * second
            threshold = -np.partition(-scores, k - 1, axis=1)[:, k - 1 : k]
            shared.append((np.take_along_axis(scores, chosen, axis=1) >= threshold).mean())
        self._shared = np.maximum.accumulate(shared)

    def of(self, shared: FloatArray) -> FloatArray:
        """Returns the correlations; 0 for less than chance, and where nothing is known."""
        return np.interp(np.nan_to_num(shared), self._shared, self._grid)


class _Measured:
    """What a fit looks at, as the mean over some traces, by layer; `classes` (layers, classes), `lags` (lags,)."""

    def __init__(self, traces: Sequence[RoutingTrace], far: Sequence[int]) -> None:
        def mean(measure: Callable[[RoutingTrace], FloatArray]) -> FloatArray:
            return np.asarray(np.mean([measure(trace) for trace in traces], axis=0))

        by_lag = mean(lambda trace: np.array([reuse(trace, lag) for lag in LAGS]))
        self.lags = np.nanmean(by_lag, axis=1)
        self.near = by_lag[_NEAR.start - LAGS.start : _NEAR.stop - LAGS.start].mean(axis=0)
        self.far = mean(lambda trace: np.mean([reuse(trace, lag) for lag in far], axis=0))
        self.between = mean(_overlap_between_sequences)
        self.classes = mean(_class_rates)


def _class_rates(trace: RoutingTrace) -> FloatArray:
    """Returns how many of a token's experts come from each class of places, (layers, classes); first uses do not."""
    ends = class_ends(trace.num_experts, trace.k)
    rates = []
    for layer in range(trace.layers):
        rows = slice(None) if trace.routed is None else trace.routed[:, layer]
        one = RoutingTrace(trace.experts[rows, layer : layer + 1], trace.num_experts)
        depths = lru_depths(one, "per-layer")
        classes = np.searchsorted(ends, depths[depths >= 0], side="right")
        rates.append(np.bincount(classes, minlength=len(ends)) / max(one.tokens, 1))
    return np.array(rates)


def _overlap_between_sequences(trace: RoutingTrace) -> FloatArray:
    """Returns the mean part of its experts that a token shares with one of another sequence, (layers,); 0 if alone."""
    numbers, sequence = np.unique(trace.sequence, return_inverse=True)
    if len(numbers) < 2:
        return np.zeros(trace.layers)
    shares = np.zeros((len(numbers), trace.layers, trace.num_experts))
    routed = np.ones((1, 1)) if trace.routed is None else trace.routed
    for slot in range(trace.k):
        np.add.at(shares, (sequence[:, None], np.arange(trace.layers), trace.experts[..., slot]), routed)
    shares *= trace.k / np.maximum(shares.sum(axis=-1, keepdims=True), 1)
    pairs = (shares.sum(axis=0) ** 2).sum(axis=-1) - (shares**2).sum(axis=(0, 2))
    return np.asarray(pairs / (len(numbers) * (len(numbers) - 1) * trace.k))


class _State:
    """The parameters as they are being fitted, each (layers,), but `recency` (layers, classes) and `echo` (lags,)."""

    def __init__(self, wanted: _Measured, correlation: _Correlation) -> None:
        self._wanted, self._correlation = wanted, correlation
        self._sequence = correlation.of(wanted.far)
        self._drift = correlation.of(wanted.near) - self._sequence
        self._common = correlation.of(wanted.between)
        self._recency = np.zeros(wanted.classes.shape)
        self._echo = np.zeros(len(LAGS))
        self._keep_in_bounds()

    def _keep_in_bounds(self) -> None:
        """All parts of the variance at least 0, and some of it left for the token."""
        self._sequence = np.clip(self._sequence, 0, 0.95)
        self._drift = np.clip(self._drift, 0, 0.95 - self._sequence)
        self._common = np.clip(self._common, 0, self._sequence)

    def correct(self, got: _Measured, step: float) -> None:
        """Move the parameters by what was measured of a draw with them.

        A bonus of b makes the experts it is for likelier by about half of b, hence the sizes of the last two steps.
        """
        wanted, of = self._wanted, self._correlation.of
        far, near = of(wanted.far) - of(got.far), of(wanted.near) - of(got.near)
        token = np.sqrt(1 - self._sequence - self._drift)[:, None]
        ratio = (wanted.classes + _TINY_RATE) / (got.classes + _TINY_RATE)
        self._sequence = self._sequence + step * far
        self._drift = self._drift + step * (near - far)
        self._common = self._common + step * (of(wanted.between) - of(got.between))
        self._recency = self._recency + step * _STEP * token * np.log(ratio)
        self._echo = self._echo + step * (wanted.lags - got.lags)
        # Only differences count.
        self._recency -= self._recency.mean(axis=1, keepdims=True)
        self._keep_in_bounds()

    def fitted(self, trace: RoutingTrace) -> FittedRouting:
        """Returns the generator with these parameters."""
        parts: list[list[float]] = (
            np.stack([self._common, self._sequence - self._common, self._drift], axis=1).round(6).tolist()
        )
        recency: list[list[float]] = np.asarray(self._recency.round(6)).tolist()
        return FittedRouting(
            model=str(trace.meta.get("model", "unknown")),
            num_experts=trace.num_experts,
            top_k=trace.k,
            echo=tuple(self._echo.round(6).tolist()),
            layers=tuple(
                LayerFit(common, popularity, drift, tuple(bonus))
                for (common, popularity, drift), bonus in zip(parts, recency, strict=True)
            ),
        )
