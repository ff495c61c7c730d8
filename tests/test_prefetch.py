"""Prefetch policies: what all of them owe the dispatcher, and the choice of each, worked by hand."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_inputs, tiny_model, tiny_profile, tiny_scenario, tiny_trace

from prestage.engine.loading.deciders import make_prefetch
from prestage.engine.policies.prefetch import PREFETCH, Gauge, Moment, Options, Prefetch
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.simulate import simulate_inputs
from prestage.testing.conformance import check_choice, check_no_guess

EVERY = pytest.mark.parametrize("name", PREFETCH)


def policy_of(name: str, k: int = 2, lookahead: int = 3, **options: Any) -> Prefetch:
    return PREFETCH[name](Options(k, lookahead, **{"layers": 4, "experts": 5, "copy_ns": 10, **options}))


def gauge_of(now_ns: int = 0, backlog_ns: int = 0) -> Gauge:
    gauge = Gauge()
    gauge.now_ns, gauge.backlog_ns = lambda: now_ns, lambda: backlog_ns
    return gauge


def in_order(chosen: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Returns (layers ahead, expert) of what a policy chose, in the order of fetching."""
    return [(ahead, expert) for ahead, experts in enumerate(chosen, 1) for expert in experts if expert >= 0]


@pytest.mark.slow
@EVERY
@given(data=st.data(), k=st.integers(1, 4), lookahead=st.integers(1, 5), layer=st.integers(0, 3))
def test_a_choice_is_an_expert_of_the_layer_it_is_meant_for(
    name: str, data: st.DataObject, k: int, lookahead: int, layer: int
) -> None:
    policy = policy_of(name, k, lookahead)
    assert 0 <= policy.horizons <= lookahead
    assert policy.guesses in (0, k)
    tokens = data.draw(st.integers(1, 3))
    # Guesses as the dispatcher gives them: experts of the target layer, or -1.
    targets = [(layer + horizon) % 4 for horizon in range(1, policy.horizons + 1)]
    size = k * tokens if policy.guesses else 0
    one_of = [st.sampled_from([-1, *range(target * 5, target * 5 + 5)]) for target in targets]
    ranked = [data.draw(st.lists(guess, min_size=size, max_size=size)) for guess in one_of]
    confidences = [data.draw(st.lists(st.floats(0, 1), min_size=size, max_size=size)) for _ in targets]
    check_choice(policy, layer, ranked, confidences)


@pytest.mark.parametrize("name", [name for name in PREFETCH if policy_of(name).needs_guesses])
def test_no_guess_no_prefetch(name: str) -> None:
    check_no_guess(policy_of(name, 2, 3))


# The members, one by one.


def test_policies_say_what_they_read() -> None:
    # Who reads the clock is exempt from counting as the replay does; who reads the moment is told of it.
    clock = {name for name in PREFETCH if getattr(PREFETCH[name], "uses_clock", False)}
    moment = {name for name in PREFETCH if getattr(PREFETCH[name], "reads_moment", False)}
    assert clock == {"adaptive-link", "cost-aware"}
    assert {"adaptive-memory", *clock} <= moment


def test_none_asks_for_no_guesses_and_fetches_nothing() -> None:
    policy = policy_of("none")
    assert (policy.horizons, policy.guesses) == (0, 0)
    assert in_order(policy.choose([[1, 2], [3]], Moment())) == []


def test_top_k_goes_nearest_layer_first_then_by_rank() -> None:
    policy = policy_of("top-k")
    assert (policy.horizons, policy.guesses) == (3, 2)
    # Three layers ahead, two tokens, ranks beside each other: both tokens' first guesses, then their second ones.
    # The token without a second guess for the next layer leaves a gap; an expert guessed twice comes twice.
    ranked = [[5, 4, 7, -1], [12, 12, 13, 10], [-1, 20, -1, 21]]
    chosen = [(1, 5), (1, 4), (1, 7), (2, 12), (2, 12), (2, 13), (2, 10), (3, 20), (3, 21)]
    assert in_order(policy.choose(ranked, Moment())) == chosen


RANKED = [[5, 6], [10, 11], [15, 16]]
CONFIDENCES = [[0.9, 0.5], [0.8, 0.6], [0.7, 0.5]]


def test_a_threshold_keeps_the_guesses_that_reach_it() -> None:
    policy = policy_of("threshold", threshold=0.6)
    chosen = in_order(policy.choose(RANKED, Moment(confidences=CONFIDENCES)))
    assert chosen == [(1, 5), (2, 10), (2, 11), (3, 15)]


def test_multi_step_asks_for_more_confidence_the_farther_ahead() -> None:
    # The threshold 0.4 means 0.4, 0.4 / 0.8 = 0.5 and 0.4 / 0.64 = 0.625 for one, two and three layers ahead.
    policy = policy_of("multi-step", threshold=0.4, decay=0.8)
    chosen = in_order(policy.choose(RANKED, Moment(confidences=CONFIDENCES)))
    assert chosen == [(1, 5), (1, 6), (2, 10), (2, 11), (3, 15)]


def test_adaptive_memory_fetches_fewer_guesses_the_more_unused_prefetches_lie_there() -> None:
    policy = policy_of("adaptive-memory", k=2, lookahead=1)
    ranked = [[5, 6, 7, 8]]  # two tokens: first guesses 5 and 6, second guesses 7 and 8
    fetched = {
        share: [expert for _, expert in in_order(policy.choose(ranked, Moment(unused_share=share)))]
        for share in (0.0, 0.4, 0.5, 1.0)
    }
    assert fetched == {0.0: [5, 6, 7, 8], 0.4: [5, 6, 7, 8], 0.5: [5, 6], 1.0: []}


def test_adaptive_link_fetches_fewer_guesses_the_more_copies_wait() -> None:
    policy = policy_of("adaptive-link", k=2, lookahead=1, copy_ns=10)
    ranked = [[5, 6]]
    fetched = {
        backlog_ns: [expert for _, expert in in_order(policy.choose(ranked, Moment(gauge=gauge_of(0, backlog_ns))))]
        for backlog_ns in (0, 9, 10, 19, 20, 50)
    }
    assert fetched == {0: [5, 6], 9: [5, 6], 10: [5], 19: [5], 20: [], 50: []}


def test_next_layer_fetches_whole_layers_across_the_token_boundary_without_a_predictor() -> None:
    policy = policy_of("next-layer", lookahead=2)
    assert (policy.horizons, policy.guesses) == (2, 0)
    chosen = in_order(policy.choose([], Moment(layer=2)))
    assert chosen == [(1, expert) for expert in range(15, 20)] + [(2, expert) for expert in range(5)]


def test_popularity_fetches_what_most_tokens_chose_so_far() -> None:
    policy = policy_of("popularity", k=2, lookahead=1)
    assert policy.guesses == 0
    assert in_order(policy.choose([], Moment(layer=0))) == []  # nobody has been chosen yet
    policy.observe([5, 6, 7], [1, 3, 1])
    assert in_order(policy.choose([], Moment(layer=0))) == [(1, 6), (1, 5)]  # 5 and 7 tie: the lower index
    policy.observe([7], [1])
    assert in_order(policy.choose([], Moment(layer=0))) == [(1, 6), (1, 7)]


def test_cost_aware_weighs_the_stall_saved_against_the_stall_caused() -> None:
    # A visit took 100 / 10 = 10 ns on average; a copy takes 10 ns; half of the visits miss. One layer ahead a right
    # guess hides min(10, 10 - 0) = 10 ns, a wrong one costs 0.5 x 10 = 5 ns: worth it if 10 c > 5 (1 - c), c > 1/3.
    policy = policy_of("cost-aware", k=2, lookahead=1, copy_ns=10)

    def fetched(confidences: list[float], backlog_ns: int = 0) -> list[int]:
        moment = Moment(visit=10, confidences=[confidences], misses_per_visit=0.5, gauge=gauge_of(100, backlog_ns))
        return [expert for _, expert in in_order(policy.choose([[5, 6]], moment))]

    assert fetched([0.34, 0.0]) == [5]
    assert fetched([0.33, 0.0]) == []
    # With 6 ns queued only 4 ns can be hidden: 4 c > 5 (1 - c), c > 5/9.
    assert fetched([0.56, 0.0], 6) == [5]
    assert fetched([0.55, 0.0], 6) == []
    # What is fetched queues 10 ns more: nothing of a second copy can be hidden.
    assert fetched([0.9, 0.9]) == [5]


def test_cost_aware_counts_only_copies_that_would_be_made() -> None:
    # As above, but two copies can be hidden: 20 ns until the target visit, 10 ns a copy. Experts 5 and 8 are in memory
    # and 6 is guessed by both tokens: they cost one copy together, so 7 is worth one too, and 9 none. Counting a copy
    # for every guess, that of 5 and the first of 6 would have been all.
    policy = policy_of("cost-aware", k=3, lookahead=1, copy_ns=10)
    moment = Moment(visit=5, confidences=[[0.9] * 6], misses_per_visit=0.5, gauge=gauge_of(100), assigned={5, 8})
    chosen = in_order(policy.choose([[5, 6, 6, 8, 7, 9]], moment))
    assert list(dict.fromkeys(expert for _, expert in chosen)) == [6, 7]


# Through a scenario.


def test_k_left_out_is_the_models_top_k_and_no_lookahead_is_no_prefetch() -> None:
    model = tiny_model(2, experts=4, top_k=3)
    policy = make_prefetch(tiny_scenario(prefetch={"lookahead": 2}), model)
    assert (policy.horizons, policy.guesses) == (2, 3)
    policy = make_prefetch(tiny_scenario(prefetch={"lookahead": 2, "k": 4}), model)
    assert (policy.horizons, policy.guesses) == (2, 4)
    for keys in ({"lookahead": 0}, {"policy": "none", "lookahead": 3}):
        assert make_prefetch(tiny_scenario(prefetch=keys), model).horizons == 0
    with pytest.raises(ScenarioError) as error:
        make_prefetch(tiny_scenario(prefetch={"lookahead": 1, "k": 5}), model)
    assert str(error.value) == "prefetch.k = 5: a layer has 4 experts"


@pytest.mark.parametrize("name", [name for name in PREFETCH if name != "none"])
def test_every_policy_fetches_something_in_a_run(name: str) -> None:
    # Two layers that always choose experts 0 and 1 of four, room for three: a sure oracle, and idle time to fetch in.
    trace = tiny_trace([[[0], [1]]] * 6)
    scenario = tiny_scenario(memory={"gpu_budget": "1experts"}, prefetch={"policy": name, "lookahead": 1})
    inputs = tiny_inputs(tiny_model(2, dense_ns=100), tiny_profile(), trace, scenario)
    data = simulate_inputs(inputs, baselines=False).data
    assert data["counts"]["prefetch"] > 0
    assert sum(data["prefetch"].values()) == data["counts"]["prefetch"]


def test_guesses_that_the_tokens_of_a_batch_share_are_copied_once_and_the_saving_is_told() -> None:
    # Two sequences decode side by side through one layer, perfectly foreseen: experts 1 and 3, then 2 and 2, then 0
    # and 1. Before the second step both guess expert 2, so one copy of 20 bytes is saved; before the third none is.
    trace = tiny_trace([[[1]], [[2]], [[0]], [[3]], [[2]], [[1]]], sequence=np.array([0, 0, 0, 1, 1, 1]))
    scenario = tiny_scenario(workload={"batch": 2}, prefetch={"lookahead": 1})
    data = simulate_inputs(tiny_inputs(tiny_model(1), tiny_profile(), trace, scenario), baselines=False).data
    assert data["deduplication"] == {"guessed": 4, "unique": 3, "saved_copies": 1, "saved_bytes": 20}
    # Had expert 2 been in memory, nothing would have been copied for either guess, and nothing is saved.
    trace = tiny_trace([[[2]], [[2]], [[0]], [[3]], [[2]], [[1]]], sequence=np.array([0, 0, 0, 1, 1, 1]))
    data = simulate_inputs(tiny_inputs(tiny_model(1), tiny_profile(), trace, scenario), baselines=False).data
    assert data["deduplication"] == {"guessed": 4, "unique": 3, "saved_copies": 0, "saved_bytes": 0}
