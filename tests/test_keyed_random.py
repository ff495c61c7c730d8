"""The keyed random numbers: uniform, independent between neighbours, and a function of their keys alone."""

import numpy as np
import pytest

from prestage.workloads.keyed_random import uniform, uniform_one

#: Outputs 0 to 2 of SplitMix64 seeded with 0, as published with many implementations of it.
SPLITMIX64_SEED_0 = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
WORD = (1 << 64) - 1


def splitmix64(seed: int, output: int) -> int:
    """The paper's generator in plain integers: its state after `output + 1` additions, finalized."""
    z = (seed + (output + 1) * 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def test_one_key_gives_the_published_outputs_of_splitmix64() -> None:
    assert uniform(range(3)).tolist() == [(word >> 11) / 2**53 for word in SPLITMIX64_SEED_0]


@pytest.mark.parametrize("keys", [(7, 11), (0, 0, 0), (2**64 - 1, 5), (-1, -2, 3), (2**70 + 9, 1)])
def test_a_chain_seeds_each_generator_with_the_output_before(keys: tuple[int, ...]) -> None:
    state = 0
    for key in keys:
        state = splitmix64(state, key & WORD)
    assert uniform(*keys) == uniform_one(*keys) == (state >> 11) / 2**53


def test_keys_broadcast_and_agree_with_one_by_one() -> None:
    layers = np.arange(3, dtype=np.int16)[:, None]
    draws = np.arange(4, dtype=np.uint8)
    numbers = uniform(5, layers, draws)
    assert numbers.shape == (3, 4)
    assert numbers.dtype == np.float64
    assert all(numbers[layer, draw] == uniform(5, layer, draw) for layer in range(3) for draw in range(4))


def test_a_negative_number_is_the_same_key_in_every_type() -> None:
    assert uniform(-3) == uniform(np.int8(-3)) == uniform(np.int64(-3)) == uniform(2**64 - 3)


def test_plain_integers_give_an_array_without_dimensions() -> None:
    assert uniform(1, 2).shape == ()
    assert uniform(1, np.empty((0, 4), dtype=np.int64)).shape == (0, 4)


def test_numbers_do_not_depend_on_what_was_asked_before() -> None:
    positions = np.arange(1000)
    numbers = uniform(3, positions)
    order = np.argsort(uniform(99, positions))
    assert np.array_equal(uniform(3, order), numbers[order])


def test_numbers_are_uniform() -> None:
    # 2**20 numbers in 256 bins: chi-square has 255 degrees of freedom, mean 255, deviation sqrt(510) = 22.6;
    # five deviations either way.
    numbers = uniform(0, np.arange(1 << 14)[:, None], np.arange(64)).ravel()
    assert 0 <= numbers.min() < 1e-5
    assert 1 - 1e-5 < numbers.max() < 1
    bins = np.bincount((numbers * 256).astype(int), minlength=256)
    expected = len(numbers) / 256
    assert abs(((bins - expected) ** 2 / expected).sum() - 255) < 5 * 510**0.5


@pytest.mark.parametrize("axis", range(5))
def test_neighbors_along_every_key_are_independent(axis: int) -> None:
    # The correlation of n independent pairs has deviation 1 / sqrt(n); neighbors one and eight apart.
    grid = np.meshgrid(*[np.arange(12)] * 5, indexing="ij", sparse=True)
    numbers = np.moveaxis(uniform(*grid), axis, 0)
    for apart in (1, 8):
        one, other = numbers[apart:].ravel(), numbers[:-apart].ravel()
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / len(one) ** 0.5


def test_the_order_of_keys_matters() -> None:
    assert uniform(1, 2) != uniform(2, 1)
    assert uniform(1, 2) != uniform(1, 2, 0)


def test_keys_that_are_not_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="float64: keys must be integers"):
        uniform(0, np.array([0.5]))
    with pytest.raises(ValueError, match="at least one key"):
        uniform()
