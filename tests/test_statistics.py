"""What statistics say of traces, against small ones worked out by hand and against naive counts."""

import json
import math
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prestage.workloads.statistics import (
    SCOPES,
    Scope,
    capacity_in_experts,
    gini,
    lru_depths,
    lru_hit_rates,
    normalized_entropy,
    popularity,
    reuse,
    summary,
    top_share,
)
from prestage.workloads.trace import RoutingTrace


def trace_of(experts: Any, num_experts: int, **more: Any) -> RoutingTrace:
    trace = RoutingTrace(np.array(experts, dtype=np.uint8), num_experts, **more)
    trace.check()
    return trace


def random_trace(seed: int, tokens: int, layers: int, k: int, num_experts: int, absent: float = 0.0) -> RoutingTrace:
    """Skewed, so that there are hits at every capacity."""
    rng = np.random.default_rng(seed)
    scores = rng.random((tokens, layers, num_experts)) ** (1 + np.arange(num_experts))
    experts = np.argsort(scores, axis=-1)[..., :k]
    present = rng.random((tokens, layers)) >= absent
    if seed % 2 and absent:
        present = present[..., None] & (np.arange(k) < rng.integers(1, k + 1, (tokens, layers, 1)))
    return trace_of(np.where(present.reshape(tokens, layers, -1), experts, 0), num_experts, present=present)


# The rule of the memory manager, written down directly.


def visits_of(trace: RoutingTrace) -> Iterator[list[tuple[int, int]]]:
    for token in range(trace.tokens):
        for layer in range(trace.layers):
            if chosen := trace.chosen(token, layer):
                yield [(layer, expert) for expert in chosen]


def simulated_hits(trace: RoutingTrace, capacity: int, scope: Scope) -> tuple[int, int]:
    """Returns hits and accesses: look all k up, pin them, admit the misses, then renew in the router's order."""
    caches: dict[int, OrderedDict[tuple[int, int], None]] = {}
    hits = accesses = 0
    for visit in visits_of(trace):
        cache = caches.setdefault(visit[0][0] if scope == "per-layer" else 0, OrderedDict())
        found = [expert in cache for expert in visit]
        hits, accesses = hits + sum(found), accesses + len(visit)
        for expert, was_found in zip(visit, found, strict=True):
            if not was_found:
                if len(cache) == capacity:
                    del cache[next(old for old in cache if old not in visit)]
                cache[expert] = None
        for expert in visit:
            cache.move_to_end(expert)
    return hits, accesses


# Popularity and skew


def test_popularity_counts_each_choice_by_layer_and_skips_absent_rows() -> None:
    present = np.array([[True, True], [True, False]])
    trace = trace_of([[[0, 2], [1, 0]], [[2, 1], [0, 0]]], 3, present=present)
    assert popularity(trace).tolist() == [[1, 1, 2], [1, 1, 0]]


def test_skew_of_known_distributions() -> None:
    counts = np.array([[5, 5, 5, 5], [0, 20, 0, 0], [0, 0, 0, 0], [1, 2, 3, 4]])
    # Of 1, 2, 3, 4: sum((2i - 5) x) = -3 - 2 + 3 + 12 = 10, over 4 * 10: 1/4.
    np.testing.assert_allclose(gini(counts), [0, 3 / 4, np.nan, 1 / 4])
    np.testing.assert_allclose(top_share(counts, 0.25), [0.25, 1, np.nan, 0.4])
    # Three eighths of four experts is one and a half: 4 + 3/2 of 10.
    assert top_share(counts, 0.375)[3] == pytest.approx(0.55)
    by_hand = -sum(p * math.log(p) for p in (0.1, 0.2, 0.3, 0.4)) / math.log(4)
    np.testing.assert_allclose(normalized_entropy(counts), [1, 0, np.nan, by_hand], atol=1e-12)


@pytest.mark.parametrize("experts", [7, 8, 32, 64, 128])
def test_uniform_counts_give_the_top_tenth_a_tenth_whatever_the_number(experts: int) -> None:
    assert top_share(np.ones(experts), 0.1) == pytest.approx(0.1)


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan")])
def test_a_share_that_is_no_fraction_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"share = .*: must be a fraction"):
        top_share(np.ones(4), share)


# Reuse


def test_reuse_by_hand() -> None:
    trace = trace_of([[[0, 1], [2, 3]], [[1, 2], [2, 3]], [[3, 0], [0, 1]]], 4)
    # Layer 0: {1} of 2, then none; layer 1: both of 2, then none.
    assert reuse(trace).tolist() == [1 / 4, 1 / 2]
    # Two tokens apart: {0} of 2 in layer 0, none in layer 1.
    assert reuse(trace, lag=2).tolist() == [1 / 2, 0]
    assert np.isnan(reuse(trace, lag=3)).all()
    assert np.isnan(reuse(trace, lag=99)).all()
    with pytest.raises(ValueError, match="lag = 0: must be at least 1"):
        reuse(trace, lag=0)


def test_reuse_stays_within_a_sequence_and_ignores_gaps_and_absent_rows() -> None:
    # Rows 0 and 2 are sequence 0, rows 1 and 3 sequence 1: by sequence {0} {0} and {1} {1}.
    assert reuse(trace_of([[[0]], [[1]], [[0]], [[1]]], 2, sequence=np.array([0, 1, 0, 1]))).tolist() == [1]
    # Positions 0 and 2 are two apart.
    gap = trace_of([[[0]], [[0]]], 2, position=np.array([0, 2]))
    assert np.isnan(reuse(gap)).all()
    assert reuse(gap, lag=2).tolist() == [1]
    # The middle token was not routed at layer 1, so no pair is left there.
    present = np.array([[True, True], [True, False], [True, True]])
    ragged = trace_of([[[1], [0]], [[1], [0]], [[0], [0]]], 2, present=present)
    np.testing.assert_array_equal(reuse(ragged), [1 / 2, np.nan])


# LRU


def test_depths_by_hand() -> None:
    # One layer, k = 2. Visits: {0,1} {2,0} {3,1} {3,0}; the stack, most recent first, before each:
    # (), (1 0), (0 2 1), (1 3 0 2).
    trace = trace_of([[[0, 1]], [[2, 0]], [[3, 1]], [[3, 0]]], 4)
    assert lru_depths(trace).tolist() == [-1, -1, -1, 1, -1, 2, 1, 2]
    # Warm depths 1, 2, 1, 2 of 8 accesses: 2 experts hold those at depth 1, 3 all four.
    assert lru_hit_rates(trace, [2, 3, 4]).tolist() == [2 / 8, 4 / 8, 4 / 8]


def test_a_found_expert_is_pinned_before_the_misses_of_its_visit_evict() -> None:
    # With two places, {0,1} leaves 0 the older one. Looked up one by one, {2,0} would evict 0 for 2 and then
    # miss 0; looked up together, 0 is found and pinned, and 1 goes.
    trace = trace_of([[[0, 1]], [[2, 0]]], 3)
    assert lru_hit_rates(trace, [2]).tolist() == [1 / 4]
    assert simulated_hits(trace, 2, "global") == (1, 4)


@pytest.mark.parametrize("scope", SCOPES)
@given(st.data())
def test_hit_rates_equal_a_direct_simulation_from_k_experts_on(scope: Scope, data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 9), label="num_experts")
    k = data.draw(st.integers(1, min(4, num_experts)), label="k")
    layers = data.draw(st.integers(1, 4), label="layers")
    tokens = data.draw(st.integers(1, 25), label="tokens")
    absent = data.draw(st.sampled_from([0.0, 0.4]), label="absent")
    trace = random_trace(data.draw(st.integers(0, 1000), label="seed"), tokens, layers, k, num_experts, absent)
    everything = num_experts * (layers if scope == "global" else 1)
    capacities = range(k, everything + 2)
    rates = lru_hit_rates(trace, list(capacities), scope)
    for capacity, rate in zip(capacities, rates, strict=True):
        hits, accesses = simulated_hits(trace, capacity, scope)
        np.testing.assert_allclose(rate, hits / accesses if accesses else np.nan, rtol=1e-12)


def test_more_layers_and_tokens_than_the_random_cases_have_agree_too() -> None:
    trace = random_trace(5, tokens=150, layers=6, k=3, num_experts=16)
    cases: dict[Scope, tuple[int, ...]] = {"global": (3, 20, 50, 96), "per-layer": (3, 5, 9, 16)}
    for scope, capacities in cases.items():
        rates = lru_hit_rates(trace, capacities, scope)
        assert len(set(rates)) > 1
        for capacity, rate in zip(capacities, rates, strict=True):
            hits, accesses = simulated_hits(trace, capacity, scope)
            assert rate == hits / accesses


def test_more_experts_than_sixteen_bits_can_number_are_told_apart() -> None:
    # Layer 1's expert 25,536 is number 65,536 of all: 0 in 16 bits, like layer 0's expert 0.
    experts = np.array([[[0], [25_536]], [[0], [25_536]]], dtype=np.uint16)
    assert lru_depths(RoutingTrace(experts, 40_000)).tolist() == [-1, -1, 1, 1]


def test_a_cache_smaller_than_one_visit_has_no_rate() -> None:
    trace = random_trace(1, 20, 2, 3, 8)
    for scope in SCOPES:
        rates = lru_hit_rates(trace, [0, 1, 2, 3], scope)
        assert np.isnan(rates[:3]).all()
        assert not np.isnan(rates[3])


def test_one_global_lru_of_all_other_layers_choices_never_hits() -> None:
    # Before a token returns to a layer, every other layer has used k experts at least.
    trace = random_trace(2, 60, 5, 2, 8)
    assert lru_hit_rates(trace, [(5 - 1) * 2]).tolist() == [0]
    assert lru_hit_rates(trace, [8 * 5])[0] > 0.9


def test_uniform_independent_routing_hits_as_often_as_there_are_slots_for_its_experts() -> None:
    # Top-1 of 20, so that a layer's cache of s holds the last s distinct ones and each is as likely: s / 20.
    experts = np.random.default_rng(7).integers(0, 20, (20_000, 2, 1))
    rates = lru_hit_rates(trace_of(experts, 20), [5, 10, 0.75], "per-layer")
    # 40,000 draws: a standard deviation of at most 0.0025, and 20 cold starts more or less.
    np.testing.assert_allclose(rates, [0.25, 0.5, 0.75], atol=0.01)


def test_capacities_are_counts_or_shares() -> None:
    trace = random_trace(3, 2, 3, 2, 10)
    assert capacity_in_experts(trace, 0.1) == 3  # 0.1 * 30 = 3.0000000000000004 or so: neither 2 nor 4
    assert capacity_in_experts(trace, 0.7, "per-layer") == 7  # 0.7 * 10 = 7.000000000000001
    assert capacity_in_experts(trace, 0.29, "per-layer") == 2
    assert capacity_in_experts(trace, 1.0) == 30
    assert capacity_in_experts(trace, 1) == 1
    numpy_count: Any = np.int64(4)
    assert capacity_in_experts(trace, numpy_count) == 4
    bad: Any
    for bad in (-1, 1.5, -0.1, float("nan"), True, "5"):
        with pytest.raises(ValueError, match="capacity = "):
            capacity_in_experts(trace, bad)


def test_an_unknown_scope_is_refused() -> None:
    scope: Any = "layer"
    with pytest.raises(ValueError, match="scope = 'layer': choose one of global, per-layer"):
        lru_depths(random_trace(0, 2, 2, 1, 2), scope)


@given(st.integers(0, 500))
def test_hit_rates_never_fall_with_capacity(seed: int) -> None:
    trace = random_trace(seed, 30, 3, 2, 6)
    for scope in SCOPES:
        assert (np.diff(lru_hit_rates(trace, list(range(2, 19)), scope)) >= 0).all()


# Summary


def test_a_summary_is_plain_json_and_says_what_it_counted() -> None:
    present = np.array([[True, False], [True, True], [True, True]])
    trace = trace_of(
        [[[0], [0]], [[1], [0]], [[1], [0]]],
        2,
        present=present,
        sequence=np.array([0, 1, 1]),
        phase=np.array([0, 0, 1]),
        meta={"model": "tiny"},
    )
    told = summary(trace)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert {name: told[name] for name in list(told)[:9]} == {
        "model": "tiny",
        "tokens": 3,
        "layers": 2,
        "k": 1,
        "num_experts": 2,
        "sequences": 2,
        "prefill_tokens": 2,
        "decode_tokens": 1,
        "accesses": 5,
    }
    assert told["reuse"] == {"lag": 1, "by_chance": 0.5, "mean": 1, "per_layer": [1, 1]}
    # Counts 1, 2 and 2, 0: Gini (-1 + 2) / 6 and 2 / 4.
    assert told["skew"]["gini"]["per_layer"] == pytest.approx([1 / 6, 1 / 2])
    assert told["skew"]["gini"]["mean"] == pytest.approx(1 / 3)
    # Per layer, half of two experts is one: of 1, 1, 0 | 0, 0 the repetitions hit, here 1 of 3 and 1 of 2.
    assert told["lru_hit_rate"]["per-layer"] == {"5%": None, "10%": None, "25%": None, "50%": 0.4, "75%": 0.4}
    assert list(told["lru_hit_rate"]["global"]) == ["5%", "10%", "25%", "50%", "75%"]


def test_a_real_trace_agrees_with_a_direct_simulation(traces: Path) -> None:
    trace = RoutingTrace.load(traces / "olmoe-1b-7b.npz")
    rates = summary(trace)["lru_hit_rate"]
    experts_in: dict[Scope, int] = {"global": 16 * 64, "per-layer": 64}
    for scope, everything in experts_in.items():
        for share, rate in rates[scope].items():
            capacity = everything * int(share[:-1]) // 100
            if capacity < trace.k:
                assert rate is None
            else:
                hits, accesses = simulated_hits(trace, capacity, scope)
                assert rate == hits / accesses


def test_the_summary_of_forty_thousand_real_tokens_takes_seconds(traces: Path) -> None:
    trace = RoutingTrace.load(traces / "gpt-oss-20b.npz")
    start = time.perf_counter()
    told = summary(trace)
    assert time.perf_counter() - start < 15
    assert told["accesses"] == 40_290 * 24 * 4
    # Router and token are not independent: far more comes back than by chance.
    assert told["reuse"]["mean"] > 2 * told["reuse"]["by_chance"]
    assert told["lru_hit_rate"]["global"]["10%"] == 0  # 76 experts, no more than the 23 other layers use
