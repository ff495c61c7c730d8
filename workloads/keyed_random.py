"""Counter-based random numbers: a function of their keys, independent of when and how often they are asked for.

No state and no call order, so that two policies which ask in different orders, or about different tokens, meet
the same luck.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError

#: What `uniform` takes: one integer, or many.
Key = int | np.integer[Any] | Sequence[int] | npt.NDArray[np.integer[Any]]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
#: The finalizer of SplitMix64: shift right, exclusive or, multiply; the last shift has no multiplier.
_ROUNDS = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_LAST_SHIFT = np.uint64(31)
_ONE = np.uint64(1)
_WORD = (1 << 64) - 1
_GAMMA_INT = int(_GAMMA)
_ROUNDS_INT = tuple((int(shift), int(factor)) for shift, factor in _ROUNDS)


def uniform(*keys: Key) -> npt.NDArray[np.float64]:
    """Returns numbers uniform in [0, 1), one for each tuple of the integer keys broadcast together.

    Each key picks an output of a SplitMix64 generator, and that output seeds the generator of the next key:
    `uniform(a, b)` is output b of the generator seeded with output a of the generator seeded with 0, its upper 53
    bits over 2**53. Put the keys that vary least first: they are then hashed at their own size. Keys are taken
    modulo 2**64. Raises ValueError if there is no key, or one is not an integer.

    Source: SplitMix64 of Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, with
    Stafford's variant 13 of the finalizer, as in java.util.SplittableRandom.
    """
    if not keys:
        raise InputError("uniform() takes at least one key")
    words = [_words(key) for key in keys]
    shape = np.broadcast_shapes(*(word.shape for word in words))
    # At least one dimension throughout: numpy's arrays wrap around silently, its scalars warn.
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        state = _mix(state + (np.atleast_1d(word) + _ONE) * _GAMMA)
    return ((state >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape)


def uniform_one(*keys: int) -> float:
    """Returns the one number that `uniform` gives for these integers, without arrays: many times quicker for one."""
    state = 0
    for key in keys:
        state = (state + ((key & _WORD) + 1) * _GAMMA_INT) & _WORD
        for shift, factor in _ROUNDS_INT:
            state = ((state ^ (state >> shift)) * factor) & _WORD
        state ^= state >> 31
    return (state >> 11) * 2.0**-53


def _words(key: Key) -> npt.NDArray[np.uint64]:
    if isinstance(key, int):
        return np.array(key & _WORD, dtype=np.uint64)
    array = np.asarray(key)
    if array.dtype.kind not in "iub":
        raise InputError(f"a key of uniform() is {array.dtype}: keys must be integers")
    return array.astype(np.uint64)


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble a fresh array in place."""
    for shift, factor in _ROUNDS:
        state ^= state >> shift
        state *= factor
    state ^= state >> _LAST_SHIFT
    return state
