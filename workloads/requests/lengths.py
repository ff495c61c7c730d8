"""How long prompts and outputs are: a number, or a distribution with a mean and a coefficient of variation.

Distributions are a table, LENGTHS. Random numbers begin alike however many are asked for. To add one: write the
function, name it there, test its mean and its spread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import InputError

Floats = npt.NDArray[np.float64]
#: More tokens than any request has.
MOST_TOKENS = 1 << 24
#: What the key of a generator begins with, behind the seed and the purpose.
PROMPTS, OUTPUTS = 0x20010, 0x20011


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens: one of LENGTHS around `mean`, with the coefficient of variation `cv`, cut to least..most.

    What is cut is not drawn again: the mean of what comes out is then another one.
    """

    mean: float
    distribution: str = "fixed"
    cv: float = 1.0
    least: int = 1
    most: int = MOST_TOKENS

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most <= MOST_TOKENS:
            raise InputError(f"least = {self.least}, most = {self.most}: must be 1 <= least <= most <= {MOST_TOKENS}")
        if not 1 <= self.mean <= MOST_TOKENS:
            raise InputError(f"mean = {self.mean:g}: must be 1 to {MOST_TOKENS} tokens")
        if not 0 <= self.cv <= 100:
            raise InputError(f"cv = {self.cv:g}: must be 0 to 100")
        if self.distribution == "uniform" and self.cv > _UNIFORM_CV:
            raise InputError(f"cv = {self.cv:g}: of a uniform distribution above 0, it is {_UNIFORM_CV:.3f} at most")


#: Of a uniform distribution from 0 on.
_UNIFORM_CV = 3**-0.5


def fixed(lengths: Lengths, count: int, random: np.random.Generator) -> Floats:
    """Returns the mean, every time."""
    return np.full(count, lengths.mean, dtype=np.float64)


def uniform(lengths: Lengths, count: int, random: np.random.Generator) -> Floats:
    """Returns numbers uniform around the mean."""
    half = lengths.mean * lengths.cv / _UNIFORM_CV
    return lengths.mean + half * (2 * random.random(count) - 1)


def exponential(lengths: Lengths, count: int, random: np.random.Generator) -> Floats:
    """Returns exponential numbers, whose coefficient of variation is 1."""
    return lengths.mean * random.standard_exponential(count)


def lognormal(lengths: Lengths, count: int, random: np.random.Generator) -> Floats:
    """Returns log-normal numbers: the logarithms have the variance ln(1 + cv^2)."""
    variance = np.log1p(lengths.cv**2)
    drawn: Floats = lengths.mean * np.exp(np.sqrt(variance) * random.standard_normal(count) - variance / 2)
    return drawn


#: By the names that a scenario uses.
LENGTHS: dict[str, Callable[[Lengths, int, np.random.Generator], Floats]] = {
    "fixed": fixed,
    "uniform": uniform,
    "exponential": exponential,
    "lognormal": lognormal,
}


def draw_lengths(lengths: Lengths, count: int, seed: int, purpose: int) -> npt.NDArray[np.int64]:
    """Returns so many lengths in tokens, int64 (count,), rounded; `purpose` is PROMPTS or OUTPUTS."""
    random = np.random.default_rng([seed, purpose])
    drawn = LENGTHS[lengths.distribution](lengths, count, random)
    return np.clip(np.rint(drawn), lengths.least, lengths.most).astype(np.int64)
