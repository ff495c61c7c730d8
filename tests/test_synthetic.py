import hashlib
import math
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prestage.workloads.statistics import gini, lru_hit_rates, popularity, reuse, top_share
from prestage.workloads.synthetic import WORKING_SET_SHARE, SyntheticConfig, synthesize
from prestage.workloads.trace import RoutingTrace


def digest(trace: RoutingTrace) -> str:
    assert trace.weights is not None
    return hashlib.sha256(trace.experts.tobytes() + trace.weights.tobytes()).hexdigest()


@given(st.data())
def test_every_configuration_within_bounds_gives_a_valid_trace(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 300))
    top_k = data.draw(st.integers(1, min(experts, 8)))
    tokens = data.draw(st.integers(1, 12))
    sequences = data.draw(st.integers(1, tokens))
    prefill = data.draw(st.integers(0, tokens // sequences))
    trace = synthesize(
        tokens,
        data.draw(st.integers(1, 3)),
        experts,
        top_k,
        skew=data.draw(st.sampled_from([0, 0.7, 1.5, 20])),
        working_set=data.draw(st.none() | st.integers(top_k, experts)),
        reuse=data.draw(st.sampled_from([0, 0.5, 1])),
        sequences=sequences,
        prefill_tokens=prefill,
        seed=data.draw(st.integers(0, 5)),
    )
    trace.check()  # in range, distinct within a token, finite weights, increasing positions
    assert trace.tokens == tokens
    assert len(np.unique(trace.sequence)) == sequences
    assert (trace.phase == 0).sum() == sequences * prefill
    assert trace.weights is not None
    assert (np.diff(trace.weights.astype(float), axis=-1) <= 0).all()
    # A float16 has 11 bits: k rounded parts of 1 add up to 1 within k * 2**-11.
    assert np.abs(trace.weights.astype(float).sum(axis=-1) - 1).max() <= top_k * 2**-11


def test_tokens_are_shared_evenly_and_each_sequence_begins_with_its_prefill() -> None:
    trace = synthesize(7, 1, 4, 1, sequences=3, prefill_tokens=2)
    assert trace.sequence.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert trace.position.tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert trace.phase.tolist() == [0, 0, 1, 0, 0, 0, 0]


def test_meta_says_that_it_is_synthetic_and_repeats_the_parameters() -> None:
    trace = synthesize(4, 1, 4, 2, skew=1.5, working_set=3, reuse=0.25, sequences=2, prefill_tokens=1, seed=9)
    assert trace.meta["model"] == trace.meta["source"] == "synthetic"
    again = SyntheticConfig(**trace.meta["synthetic"])
    assert again == SyntheticConfig(4, 1, 4, 2, 1.5, 3, 0.25, 2, 1, 9)


@pytest.mark.process
def test_the_same_seed_gives_the_same_trace_in_another_process() -> None:
    program = (
        "import hashlib; from prestage.workloads.synthetic import synthesize\n"
        "t = synthesize(50, 3, 16, 4, skew=1, working_set=8, reuse=0.5, sequences=2, seed=3)\n"
        "print(hashlib.sha256(t.experts.tobytes() + t.weights.tobytes()).hexdigest())\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    here = synthesize(50, 3, 16, 4, skew=1, working_set=8, reuse=0.5, sequences=2, seed=3)
    assert there.stdout.strip() == digest(here)
    assert digest(synthesize(50, 3, 16, 4, skew=1, working_set=8, reuse=0.5, sequences=2, seed=4)) != digest(here)


def test_luck_is_keyed_on_the_sequence_not_on_how_much_is_asked_for() -> None:
    more: dict[str, Any] = {"skew": 1.0, "working_set": 40, "reuse": 0.5, "seed": 2}
    # 64 layers of 128 experts: several chunks of random numbers.
    short, long = synthesize(100, 64, 128, 2, **more), synthesize(400, 64, 128, 2, **more)
    np.testing.assert_array_equal(long.experts[:100], short.experts)
    assert long.weights is not None
    assert short.weights is not None
    np.testing.assert_array_equal(long.weights[:100], short.weights)
    many = synthesize(400, 64, 128, 2, sequences=4, **more)
    np.testing.assert_array_equal(many.slice(sequences=[0]).experts, short.experts)
    assert (many.slice(sequences=[1]).experts != short.experts).any()


def test_without_skew_working_set_and_reuse_the_choices_are_uniform_and_independent() -> None:
    trace = synthesize(20_000, 2, 16, 4)
    counts = popularity(trace)
    # Each expert is in a token with probability 1/4: 5,000 times with a standard deviation of 61; 5 of them.
    assert np.abs(counts - 5000).max() < 5 * 61
    # Two independent choices of 4 of 16 share one on average, 1/4; (tokens - 1) pairs of standard
    # deviation 0.19 leave 0.0014 on the mean.
    np.testing.assert_allclose(reuse(trace), 4 / 16, atol=5 * 0.0014)
    np.testing.assert_allclose(reuse(trace, lag=2), 4 / 16, atol=5 * 0.0014)
    # Independent uniform routing, top-1: an LRU hits as often as it has slots for the experts.
    rates = lru_hit_rates(synthesize(20_000, 2, 16, 1), [4, 8], "per-layer")
    np.testing.assert_allclose(rates, [0.25, 0.5], atol=0.015)


def expected_reuse(kept_probability: float, experts: int, k: int) -> float:
    """m of k are kept, m binomial; k - m fresh ones are drawn from experts - m, k - m of which were there before."""
    total = 0.0
    for kept in range(k + 1):
        chance = math.comb(k, kept) * kept_probability**kept * (1 - kept_probability) ** (k - kept)
        total += chance * (kept + (k - kept) ** 2 / (experts - kept))
    return total / k


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize(("experts", "k"), [(64, 8), (8, 2), (128, 1)])
def test_measured_reuse_is_the_parameter_and_what_fresh_draws_bring_back(kept: float, experts: int, k: int) -> None:
    trace = synthesize(5000, 4, experts, k, reuse=kept)
    # 20,000 pairs of standard deviation at most 1/2: 0.0035 on the mean over layers; 4 of them.
    assert reuse(trace).mean() == pytest.approx(expected_reuse(kept, experts, k), abs=0.015)
    assert reuse(trace).mean() >= kept - 0.015


def test_reuse_never_reaches_across_sequences() -> None:
    trace = synthesize(2000, 2, 64, 2, reuse=1.0, sequences=1000)
    experts = trace.experts.reshape(1000, 2, 2, 2)
    np.testing.assert_array_equal(experts[:, 0], experts[:, 1])  # a sequence of two tokens repeats itself
    across = (experts[1:, 0, :, :, None] == experts[:-1, 1, :, None, :]).any(axis=-1).mean()
    assert across == pytest.approx(2 / 64, abs=0.02)


def test_skew_grows_with_its_parameter_and_with_nothing_else_it_is_zipf() -> None:
    measured = [gini(popularity(synthesize(4000, 4, 64, 1, skew=skew))).mean() for skew in (0, 0.5, 1, 1.5, 2)]
    assert (np.diff(measured) > 0.05).all()
    # Top-1, so that a choice is one draw: the counts in order follow rank**-1 / H(64).
    counts = -np.sort(-popularity(synthesize(50_000, 2, 64, 1, skew=1.0)), axis=-1)
    zipf = np.arange(1, 65) ** -1.0
    # 50,000 draws: a standard deviation below 0.0018 for the most popular, less for the others.
    np.testing.assert_allclose(counts / 50_000, np.tile(zipf / zipf.sum(), (2, 1)), atol=5 * 0.0018)


def test_layers_are_popular_in_different_experts_and_sequences_in_the_same() -> None:
    trace = synthesize(4000, 8, 64, 1, skew=2.0, sequences=2)
    favorites = popularity(trace).argmax(axis=1)
    assert len(set(favorites.tolist())) > 1
    for number in (0, 1):
        assert (popularity(trace.slice(sequences=[number])).argmax(axis=1) == favorites).all()


def test_a_sequence_draws_its_share_from_its_working_set() -> None:
    # Top-1 without skew: 9 in 10 draws fall on the 8 favorites, and nobody else comes near 1/8 of that.
    trace = synthesize(40_000, 2, 64, 1, working_set=8, sequences=4)
    shares = []
    for number in range(4):
        counts = popularity(trace.slice(sequences=[number]))
        shares.append(top_share(counts, 8 / 64))
    np.testing.assert_allclose(shares, WORKING_SET_SHARE, atol=0.02)
    # Favorites differ by sequence and by layer.
    sets = {
        tuple(np.sort(np.argsort(-layer)[:8]))
        for number in range(4)
        for layer in popularity(trace.slice(sequences=[number]))
    }
    assert len(sets) == 8


def test_a_smaller_working_set_caches_better() -> None:
    rates = [
        lru_hit_rates(synthesize(2000, 4, 64, 2, working_set=size), [0.25], "per-layer")[0] for size in (64, 32, 16, 8)
    ]
    assert (np.diff(rates) > 0.05).all()


def test_a_working_set_of_all_experts_is_none() -> None:
    assert digest(synthesize(50, 2, 8, 2, working_set=8)) == digest(synthesize(50, 2, 8, 2))


GOOD: dict[str, Any] = {"tokens": 10, "layers": 2, "experts": 8, "top_k": 2}


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("tokens", 0, "at least 1"),
        ("tokens", 2.0, "at least 1"),
        ("layers", -1, "at least 1"),
        ("experts", 0, r"1\.\.65536"),
        ("experts", 70_000, r"1\.\.65536"),
        ("top_k", 9, r"1\.\.8"),
        ("top_k", 0, r"1\.\.8"),
        ("top_k", True, r"1\.\.8"),
        ("skew", -0.1, r"0\.\.20"),
        ("skew", float("nan"), r"0\.\.20"),
        ("skew", "1", r"0\.\.20"),
        ("working_set", 1, r"2\.\.8"),
        ("working_set", 9, r"2\.\.8"),
        ("reuse", 1.1, r"0\.\.1"),
        ("reuse", -0.1, r"0\.\.1"),
        ("sequences", 11, r"1\.\.10"),
        ("sequences", 0, r"1\.\.10"),
        ("prefill_tokens", 11, r"0\.\.10"),
        ("seed", -1, "at least 0"),
    ],
)
def test_a_parameter_out_of_bounds_is_named_with_its_bounds(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} = {value!r}: must be .*{allowed}") as caught:
        synthesize(**(GOOD | {name: value}))
    assert "\n" not in str(caught.value)


def test_prefill_is_bounded_by_the_shortest_sequence() -> None:
    with pytest.raises(ValueError, match=r"prefill_tokens = 4: must be an integer, 0\.\.3"):
        synthesize(**GOOD, sequences=3, prefill_tokens=4)


def test_two_thousand_tokens_of_thirty_two_layers_take_under_a_second() -> None:
    def seconds() -> float:
        start = time.process_time()
        synthesize(2000, 32, 64, 8, skew=1.0, working_set=32, reuse=0.5)
        return time.process_time() - start

    assert min(seconds() for _ in range(3)) < 1
