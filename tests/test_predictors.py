"""The predictors: what each guesses, by hand and against plain loops, and that none but the oracle looks ahead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prestage.testing.conformance import LOOKS_AHEAD, check_guesses, check_no_look_ahead
from prestage.testing.random_runs import GUESSES, distinct, random_trace
from prestage.testing.random_runs import HORIZONS as GUESS_HORIZONS
from prestage.workloads import predictors
from prestage.workloads.batches import DECODE, PREFILL, Step, plan_steps
from prestage.workloads.guesses import Guesses
from prestage.workloads.learned import Weights
from prestage.workloads.network import Shape, initial_weights
from prestage.workloads.predictors import PREDICTORS, Activation, Oracle, make_predictor, recall_at
from prestage.workloads.trace import RoutingTrace

#: Options under which each predictor is put to the common tests.
OPTIONS: dict[str, dict[str, Any]] = {"oracle": {"recall": 0.6}, "activation": {"capacity": 2}}

HORIZONS, N = GUESS_HORIZONS, GUESSES


def decoding(experts: object, num_experts: int, sequence: Sequence[int] | None = None) -> RoutingTrace:
    """A trace of decode tokens; `experts` is (tokens, layers, k), or (tokens, layers) for top-1."""
    array = np.array(experts, dtype=np.uint8)
    if array.ndim == 2:
        array = array[..., None]
    trace = RoutingTrace(array, num_experts)
    if sequence is not None:
        trace = RoutingTrace(array, num_experts, sequence=np.array(sequence, dtype=np.int32))
    trace.check()
    return trace


def ragged(seed: int, layers: int = 3, k: int = 2, num_experts: int = 6) -> tuple[RoutingTrace, list[Step]]:
    """Three sequences with prompts, some cells absent, recorded predictions; chunks of two, places for two."""
    trace = random_trace(seed, layers, num_experts, k)
    return trace, plan_steps(trace.sequence, trace.phase, batch=2, prefill="chunked", chunk_tokens=2)


def guess(name: str, trace: RoutingTrace, steps: Sequence[Step], horizons: int = HORIZONS, n: int = N) -> Guesses:
    return make_predictor(name, seed=3, **OPTIONS.get(name, {})).guess(trace, steps, horizons, n)


@pytest.fixture(autouse=True, scope="module")
def weights_for_ragged_traces(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Untrained weights are as good as any for what all predictors have in common."""
    shape = Shape(layers=3, experts=6, top_k=2, horizons=HORIZONS, context=2, width=8, heads=2)
    arrays = {name: array.astype(np.float16) for name, array in initial_weights(shape, seed=1).items()}
    folder = tmp_path_factory.mktemp("weights")
    Weights(shape, arrays, {}, latency_us={"cpu": 1.0}).save(folder)
    OPTIONS["learned"] = {"weights": str(folder)}


def plan(trace: RoutingTrace, batch: int = 1) -> list[Step]:
    return plan_steps(trace.sequence, trace.phase, batch=batch)


class Plain:
    """The simulated tokens in plain lists: what the predictors do with arrays, one token at a time."""

    def __init__(self, trace: RoutingTrace, steps: Sequence[Step]) -> None:
        self.trace = trace
        self.tokens = [(number, int(row)) for number, step in enumerate(steps) for row in step.rows]

    def chosen(self, token: int | None, layer: int) -> list[int]:
        if token is None:
            return []
        row = self.tokens[token][1]
        return self.trace.chosen(row, layer)

    def same_sequence(self, token: int) -> list[int]:
        sequence = self.trace.sequence[self.tokens[token][1]]
        return [i for i, (_, row) in enumerate(self.tokens) if self.trace.sequence[row] == sequence]

    def target(self, token: int, layer: int, ahead: int) -> tuple[int | None, int]:
        on, layer = divmod(layer + ahead, self.trace.layers)
        for _ in range(on):
            later = [i for i in self.same_sequence(token) if self.tokens[i][0] > self.tokens[token][0]]
            if not later:
                return None, layer
            token = later[0]
        return token, layer

    def previous_token(self, token: int, layer: int, ahead: int) -> tuple[list[int], list[float]]:
        target = (layer + ahead) % self.trace.layers
        if target <= layer:
            return self.chosen(token, target), []
        earlier = [i for i in self.same_sequence(token) if self.tokens[i][0] < self.tokens[token][0]]
        return self.chosen(earlier[-1] if earlier else None, target), []

    def frequency(self, token: int, layer: int, ahead: int) -> tuple[list[int], list[float]]:
        target = (layer + ahead) % self.trace.layers
        earlier = [i for i, (step, _) in enumerate(self.tokens) if step < self.tokens[token][0]]
        return best(Counter(expert for i in earlier for expert in self.chosen(i, target)))

    def transition(self, token: int, layer: int, ahead: int) -> tuple[list[int], list[float]]:
        on, target = divmod(layer + ahead, self.trace.layers)
        scores: Counter[int] = Counter()
        for source in range(len(self.tokens)):
            own = self.same_sequence(source)
            follower = own.index(source) + on
            if follower < len(own) and self.tokens[own[follower]][0] < self.tokens[token][0]:
                shared = set(self.chosen(source, layer)) & set(self.chosen(token, layer))
                for expert in self.chosen(own[follower], target):
                    scores[expert] += len(shared)
        return best(scores)


def best(scores: Counter[int]) -> tuple[list[int], list[float]]:
    ranked = sorted((expert for expert in scores if scores[expert]), key=lambda expert: (-scores[expert], expert))
    return ranked, [scores[expert] / scores.total() for expert in ranked]


# Every predictor of the table


@pytest.mark.parametrize("name", PREDICTORS)
def test_guesses_are_ranked_distinct_experts_in_frozen_arrays(name: str) -> None:
    for seed in range(20):
        trace, steps = ragged(seed)
        guesses = guess(name, trace, steps)
        check_guesses(guesses, trace, steps)
        assert guesses.experts.shape[2:] == (HORIZONS, N)


@pytest.mark.parametrize("name", PREDICTORS)
def test_the_same_question_has_the_same_digest(name: str) -> None:
    trace, steps = ragged(1)
    guesses = guess(name, trace, steps)
    assert guesses.digest == guess(name, trace, steps).digest
    assert len(guesses.digest) == 64
    other = guesses.experts.copy()
    other[0, 0, 0, 0] += 1
    assert guesses.digest != Guesses(guesses.rows, other, guesses.confidences).digest


@pytest.mark.parametrize("name", PREDICTORS)
def test_nobody_guesses_without_a_choice_or_for_a_token_that_does_not_come(name: str) -> None:
    for seed in range(10):
        trace, steps = ragged(seed)
        plain = Plain(trace, steps)
        guesses = guess(name, trace, steps)
        for token, layer, ahead in np.ndindex(guesses.experts.shape[:3]):
            if plain.target(token, layer, ahead + 1)[0] is None or not plain.chosen(token, layer):
                assert (guesses.experts[token, layer, ahead] == -1).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PREDICTORS if name not in LOOKS_AHEAD])
@given(seed=st.integers(0, 999))
def test_the_future_does_not_change_a_guess(name: str, seed: int) -> None:
    trace, steps = ragged(seed)
    check_no_look_ahead(name, trace, steps, seed, **OPTIONS.get(name, {}))


def test_the_oracle_does_look_ahead() -> None:
    one = decoding([[0], [1]], 4)
    other = decoding([[0], [2]], 4)
    assert Oracle().guess(one, plan(one), 1, 1).experts[0, 0, 0].tolist() == [1]
    assert Oracle().guess(other, plan(other), 1, 1).experts[0, 0, 0].tolist() == [2]


@pytest.mark.parametrize("name", PREDICTORS)
@pytest.mark.parametrize("n", [1, 2, 9])
def test_a_shorter_list_is_the_beginning_of_a_longer_one(name: str, n: int) -> None:
    # 9 is more than the 6 experts there are.
    trace, steps = ragged(5)
    several, some = guess(name, trace, steps).experts, guess(name, trace, steps, n=n).experts
    width = min(n, N)
    assert np.array_equal(some[..., :width], several[..., :width])
    assert (np.sort(some)[..., : max(0, n - trace.num_experts)] == -1).all()


@pytest.mark.parametrize("name", PREDICTORS)
def test_farther_horizons_do_not_change_nearer_ones(name: str) -> None:
    trace, steps = ragged(6)
    assert np.array_equal(guess(name, trace, steps, 2).experts, guess(name, trace, steps).experts[:, :, :2])


@pytest.mark.parametrize("name", PREDICTORS)
def test_working_piece_by_piece_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, steps = ragged(7)
    whole = guess(name, trace, steps)
    # One row or step to a piece, then two steps of 3 layers x 6 experts.
    for piece in (1, 40):
        monkeypatch.setattr(predictors, "_PIECE", piece)
        assert guess(name, trace, steps).digest == whole.digest


@pytest.mark.parametrize("name", PREDICTORS)
def test_no_steps_give_no_guesses(name: str) -> None:
    trace, _ = ragged(0)
    assert guess(name, trace, []).experts.shape == (0, trace.layers, HORIZONS, N)


@pytest.mark.parametrize("name", PREDICTORS)
def test_impossible_questions_are_refused(name: str) -> None:
    trace, steps = ragged(0)
    with pytest.raises(ValueError, match="predictor horizons = 0: must be at least 1"):
        guess(name, trace, steps, horizons=0)
    with pytest.raises(ValueError, match="predictor n = 0: must be at least 1"):
        guess(name, trace, steps, n=0)
    with pytest.raises(ValueError, match=f"row 99: the trace has rows 0 to {trace.tokens - 1}"):
        guess(name, trace, [Step(DECODE, np.array([0, 99]))])


@pytest.mark.parametrize("name", ["previous-token", "frequency", "transition"])
def test_arrays_agree_with_plain_loops(name: str) -> None:
    for seed in range(15):
        trace, steps = ragged(seed)
        plain = Plain(trace, steps)
        guesses = guess(name, trace, steps)
        for token, layer, ahead in np.ndindex(guesses.experts.shape[:3]):
            experts, shares = getattr(plain, name.replace("-", "_"))(token, layer, ahead + 1)
            if plain.target(token, layer, ahead + 1)[0] is None or not plain.chosen(token, layer):
                experts, shares = [], []
            expected = [*experts, -1, -1, -1][:N]
            assert guesses.experts[token, layer, ahead].tolist() == expected
            if guesses.confidences is not None:
                assert guesses.confidences[token, layer, ahead] == pytest.approx([*shares, 0, 0, 0][:N])


# The oracle


@pytest.mark.parametrize("recall", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("n", [4, 6])
def test_the_oracle_finds_the_share_it_is_told_to(recall: float, n: int) -> None:
    # Each true expert is an independent coin: the deviation is sqrt(r (1 - r) / N); 4.5 of them. At a horizon that
    # crosses the boundary the last token has no target, so N is a little below 400 * 6 * 4.
    trace = decoding(distinct(np.random.default_rng(0), (400, 6), 4, 32), 32)
    measured = recall_at(Oracle(recall, seed=1).guess(trace, plan(trace), 8, n), trace, plan(trace))
    coins = 398 * 6 * 4
    assert measured == pytest.approx(np.full(8, recall), abs=4.5 * (recall * (1 - recall) / coins) ** 0.5)


def test_a_perfect_oracle_tells_the_truth_in_the_routers_order() -> None:
    # Two layers, so that horizon 1 at layer 1 is the next token's layer 0, and horizon 4 is two tokens on.
    trace = decoding([[[5, 1], [0, 2]], [[3, 4], [2, 1]], [[1, 0], [4, 5]]], 6)
    experts = Oracle().guess(trace, plan(trace), 4, 2).experts
    assert experts[0, 0].tolist() == [[0, 2], [3, 4], [2, 1], [1, 0]]
    assert experts[0, 1].tolist() == [[3, 4], [2, 1], [1, 0], [4, 5]]
    assert experts[1, 1].tolist() == [[1, 0], [4, 5], [-1, -1], [-1, -1]]
    assert experts[2, 0].tolist() == [[4, 5], [-1, -1], [-1, -1], [-1, -1]]
    assert (experts[2, 1] == -1).all()


def test_a_perfect_oracle_leaves_absent_targets_open() -> None:
    # Token 1 was not routed at layer 0: nothing is true of it there, and it makes no guess from there.
    trace = replace(
        decoding([[1, 2], [0, 3], [1, 1]], 4), present=np.array([[True, True], [False, True], [True, True]])
    )
    experts = Oracle().guess(trace, plan(trace), 2, 1).experts[..., 0]
    assert experts.tolist() == [[[2, -1], [-1, 3]], [[-1, -1], [1, 1]], [[1, -1], [-1, -1]]]


def test_a_list_longer_than_top_k_is_filled_with_wrong_experts() -> None:
    # 5 experts of which 2 are true: 3 wrong ones follow, then nothing is left.
    trace = decoding(distinct(np.random.default_rng(2), (30, 2), 2, 5), 5)
    experts = Oracle().guess(trace, plan(trace), 1, 7).experts[:-1, :, 0]
    assert np.array_equal(experts[:, 0, :2], trace.experts[:-1, 1])
    assert np.array_equal(experts[:, 1, :2], trace.experts[1:, 0])
    assert (np.sort(experts[..., :5]) == np.arange(5)).all()
    assert (experts[..., 5:] == -1).all()


def test_an_oracle_without_recall_is_wrong_as_long_as_there_are_wrong_experts() -> None:
    # 3 experts of which 2 are true: the one wrong expert is guessed first, then there is none.
    trace = decoding(distinct(np.random.default_rng(3), (30, 1), 2, 3), 3)
    experts = Oracle(recall=0).guess(trace, plan(trace), 1, 2).experts[:-1, 0, 0]
    assert experts[:, 0].tolist() == (3 - trace.experts[1:, 0].astype(int).sum(axis=-1)).tolist()
    assert (experts[:, 1] == -1).all()


def test_one_wrong_expert_stands_in_for_whichever_true_one_is_lost() -> None:
    # 3 experts of which 2 are true: whatever the coins, a lost first or only second rank gets the wrong expert.
    trace = decoding(distinct(np.random.default_rng(4), (200, 1), 2, 3), 3)
    experts = Oracle(recall=0.5).guess(trace, plan(trace), 1, 2).experts[:-1, 0, 0]
    truth = trace.experts[1:, 0]
    wrong = 3 - truth.astype(int).sum(axis=-1)
    kinds = set()
    for ranked, true, stand_in in zip(experts.tolist(), truth.tolist(), wrong.tolist(), strict=True):
        allowed = {"both": true, "first": [true[0], stand_in], "second": [stand_in, true[1]], "none": [stand_in, -1]}
        kinds |= {kind for kind, list_ in allowed.items() if list_ == ranked}
        assert ranked in allowed.values()
    assert kinds == {"both", "first", "second", "none"}


def test_every_wrong_expert_is_as_likely_at_every_rank() -> None:
    # All targets use experts 1 and 4 of 6: each of the other four stands at each rank a quarter of the time, within
    # 4.5 deviations of sqrt(n / 4 * 3 / 4).
    trace = decoding(np.tile([1, 4], (1000, 4, 1)), 6)
    experts = Oracle(recall=0).guess(trace, plan(trace), 1, 4).experts[:-1, :, 0].reshape(-1, 4)
    for rank in range(4):
        counts = np.bincount(experts[:, rank], minlength=6)
        assert counts[[1, 4]].tolist() == [0, 0]
        assert abs(counts[[0, 2, 3, 5]] - len(experts) / 4).max() < 4.5 * (len(experts) * 3 / 16) ** 0.5


def test_the_oracle_has_the_same_luck_in_every_batch() -> None:
    # The guesses for one target do not depend on which tokens run with it, or on which of them are run at all.
    sequence = np.repeat(np.arange(4), 5).tolist()
    trace = decoding(distinct(np.random.default_rng(5), (20, 3), 2, 8), 8, sequence)
    oracle = Oracle(recall=0.5, seed=9)
    alone = oracle.guess(trace, plan(trace), 4, 3)
    together = oracle.guess(trace, plan(trace, batch=3), 4, 3)
    assert alone.rows.tolist() != together.rows.tolist()
    assert np.array_equal(alone.experts[np.argsort(alone.rows)], together.experts[np.argsort(together.rows)])
    last = oracle.guess(trace.select(np.arange(10, 20)), plan(trace.select(np.arange(10, 20))), 4, 3)
    assert np.array_equal(last.experts, alone.experts[10:])


def test_more_recall_keeps_what_less_recall_kept() -> None:
    trace = decoding(distinct(np.random.default_rng(6), (100, 3), 2, 8), 8)
    kept = []
    for recall in (0.3, 0.6, 0.9):
        experts = Oracle(recall, seed=2).guess(trace, plan(trace), 1, 2).experts[:-1, 0, 0]
        kept.append(experts == trace.experts[:-1, 1])
    assert (kept[0] <= kept[1]).all()
    assert (kept[1] <= kept[2]).all()
    assert kept[0].sum() < kept[1].sum() < kept[2].sum()


def test_another_seed_or_horizon_is_other_luck() -> None:
    trace = decoding(distinct(np.random.default_rng(7), (60, 2), 2, 16), 16)
    experts = Oracle(0.5, seed=0).guess(trace, plan(trace), 3, 2).experts
    assert not np.array_equal(experts, Oracle(0.5, seed=1).guess(trace, plan(trace), 3, 2).experts)
    # Horizon 3 at (t, 0) and horizon 1 at (t + 1, 0) have the same target.
    assert not np.array_equal(experts[:-1, 0, 2], experts[1:, 0, 0])


def test_every_sequence_position_and_layer_has_its_own_luck() -> None:
    # All tokens use the same experts, so only luck can differ between targets.
    trace = decoding(np.tile([0, 1, 2, 3], (60, 2, 1)), 8, sequence=np.repeat([0, 1], 30).tolist())
    experts = Oracle(0.5).guess(trace, plan(trace), 2, 4).experts[:, :, 0]
    assert not np.array_equal(experts[:29], experts[30:59])
    assert not np.array_equal(experts[:28], experts[1:29])
    assert not np.array_equal(experts[:29, 0], experts[:29, 1])


def test_a_recall_that_is_no_probability_is_refused() -> None:
    with pytest.raises(ValueError, match=r"predictor recall = 1\.5: must lie between 0 and 1"):
        Oracle(recall=1.5)


# The others, by hand


def test_previous_token_repeats_the_latest_use_across_the_token_boundary() -> None:
    # Layers 0 and 1 of tokens a, b, c use (1, 2), (3, 4), (5, 0); columns are horizons 1, 2, 3.
    trace = decoding([[1, 2], [3, 4], [5, 0]], 6)
    experts = guess("previous-token", trace, plan(trace), 3, 1).experts[..., 0]
    assert experts.tolist() == [
        # a at 0: its own layer 1 has no token before; b at 0 as a; b at 1 is after a's layer 0: nothing known.
        # a at 1: b at 0 and at 1 as a; c at 0 as a.
        [[-1, 1, -1], [1, 2, 1]],
        # b at 0: its own layer 1 as a; c at 0 as b; c at 1 as a. b at 1: c at 0, c at 1 as b; nobody after c.
        [[2, 3, 2], [3, 4, -1]],
        # c at 0: its own layer 1 as b; nobody after c.
        [[4, -1, -1], [-1, -1, -1]],
    ]


def test_previous_token_follows_each_sequence_of_a_batch() -> None:
    # Sequences 0 and 1 run side by side; each token's layer 1 is guessed from its own sequence, in router's order.
    trace = decoding([[[0, 1], [2, 3]], [[4, 5], [7, 6]], [[0, 2], [1, 5]], [[6, 3], [0, 4]]], 8, sequence=[0, 1, 0, 1])
    steps = plan(trace, batch=2)
    assert [step.rows.tolist() for step in steps] == [[0, 1], [2, 3]]
    experts = guess("previous-token", trace, steps, 1, 3).experts[:, :, 0]
    assert experts[:2, 0].tolist() == [[-1, -1, -1], [-1, -1, -1]]
    assert experts[:2, 1].tolist() == [[0, 1, -1], [4, 5, -1]]
    assert experts[2:, 0].tolist() == [[2, 3, -1], [7, 6, -1]]


def test_previous_token_of_a_prompt_is_the_last_of_the_chunk_before() -> None:
    # One sequence, top-1, two layers: prompt tokens 0 to 3 in chunks of two, then tokens 4 and 5.
    trace = replace(
        decoding([[0, 1], [2, 3], [4, 5], [6, 7], [0, 2], [1, 1]], 8),
        phase=np.array([PREFILL] * 4 + [DECODE] * 2, dtype=np.uint8),
    )
    steps = plan_steps(trace.sequence, trace.phase, prefill="chunked", chunk_tokens=2)
    experts = guess("previous-token", trace, steps, 2, 1).experts[..., 0]
    # At layer 0, one ahead: tokens 2 and 3 know token 1 (3), token 4 knows token 3 (7), token 5 knows token 4 (2).
    assert experts[:, 0, 0].tolist() == [-1, -1, 3, 3, 7, 2]
    # At layer 1, two ahead, is layer 1 of the next step's first token: as their own.
    assert experts[:, 1, 1].tolist() == [1, 3, 5, 7, 2, -1]


def test_frequency_ranks_by_uses_in_earlier_steps() -> None:
    # One layer, top-1, tokens use 2, 1, 1, 0, 3. Guesses by token 0: nothing used yet; token 1: {2: 1};
    # token 2: {1: 1, 2: 1}, the tie to the lower index; token 3: {1: 2, 2: 1}; nobody comes after token 4.
    trace = decoding([[2], [1], [1], [0], [3]], 4)
    guesses = guess("frequency", trace, plan(trace), 1, 2)
    assert guesses.experts[:, 0, 0].tolist() == [[-1, -1], [2, -1], [1, 2], [1, 2], [-1, -1]]
    assert guesses.confidences is not None
    assert guesses.confidences[:, 0, 0] == pytest.approx(
        np.array([[0, 0], [1, 0], [1 / 2] * 2, [2 / 3, 1 / 3], [0, 0]])
    )


def test_frequency_counts_the_target_layer_over_all_sequences() -> None:
    # Both sequences' first tokens used layer 1's expert 3 and 0; layer 0 used 2 twice.
    trace = decoding([[2, 3], [2, 0], [1, 1], [1, 1]], 4, sequence=[0, 1, 0, 1])
    experts = guess("frequency", trace, plan(trace, batch=2), 1, 2).experts[:, :, 0]
    assert experts[2:, 0].tolist() == [[0, 3], [0, 3]]
    # Within step 0 nothing is finished, and after step 1 nobody comes.
    assert (experts[:2] == -1).all()
    assert (experts[2:, 1] == -1).all()


def test_transition_sums_what_followed_each_of_the_tokens_experts() -> None:
    trace = decoding(
        [[[0, 1], [2, 3]], [[0, 2], [3, 1]], [[0, 1], [1, 3]], [[0, 1], [0, 1]]],
        4,
    )
    guesses = guess("transition", trace, plan(trace), 1, 3)
    experts, shares = guesses.experts[:, :, 0], guesses.confidences
    assert shares is not None
    # Token 0: nothing finished. Token 1 at layer 0 uses 0 and 2; of them only 0 was seen, and 2 and 3 followed.
    assert experts[0].tolist() == [[-1, -1, -1], [-1, -1, -1]]
    assert experts[1, 0].tolist() == [2, 3, -1]
    assert shares[1, 0, 0].tolist() == [0.5, 0.5, 0]
    # Token 2 at layer 0 uses 0 and 1. After 0 came 2, 3 (token 0) and 3, 1 (token 1); after 1 came 2, 3.
    assert experts[2, 0].tolist() == [3, 2, 1]
    assert shares[2, 0, 0] == pytest.approx([3 / 6, 2 / 6, 1 / 6])
    # Token 2 at layer 1 uses 1 and 3. Across the boundary only token 0 -> 1 is finished: after 3 came 0, 2.
    assert experts[2, 1].tolist() == [0, 2, -1]
    # Token 3 at layer 0 sees three tokens: after 0 came 2 3, 3 1, 1 3; after 1 came 2 3, 1 3.
    assert experts[3, 0].tolist() == [3, 1, 2]
    assert shares[3, 0, 0] == pytest.approx([5 / 10, 3 / 10, 2 / 10])


def test_transition_keeps_sequences_apart_across_the_boundary() -> None:
    # One layer, top-1: sequence 0 uses 0, 1, 0, 1 and sequence 1 uses 0, 2, 0, 2, side by side. After step 1, expert 0
    # was followed once by 1 and once by 2, never by a 0 of the other sequence.
    trace = decoding([[0], [0], [1], [2], [0], [0], [1], [2]], 4, sequence=[0, 1] * 4)
    experts = guess("transition", trace, plan(trace, batch=2), 1, 3).experts[:, 0, 0]
    assert experts[4:6].tolist() == [[1, 2, -1], [1, 2, -1]]


def test_transition_learns_within_a_prompt() -> None:
    # One layer, top-1: the prompt 0 1 2 0 1 teaches 0 -> 1, 1 -> 2, 2 -> 0 before the first decode token, 0.
    trace = replace(
        decoding([[0], [1], [2], [0], [1], [0], [3]], 4),
        phase=np.array([PREFILL] * 5 + [DECODE] * 2, dtype=np.uint8),
    )
    experts = guess("transition", trace, plan(trace), 1, 2).experts[:, 0, 0]
    assert experts.tolist() == [[-1, -1]] * 5 + [[1, -1], [-1, -1]]


def test_context_mixes_what_followed_each_part_by_what_it_explained() -> None:
    # One layer, top-1, one token back. The parts are nothing, this token's choice, and the last one known at the target
    # layer, which is the same: the token itself has been through it.
    trace = decoding([[0], [1], [0], [2], [0], [1], [0], [3]], 4)
    guesses = make_predictor("context", context=1).guess(trace, plan(trace), 1, 3)
    experts, shares = guesses.experts[:, 0, 0], guesses.confidences
    assert shares is not None
    # Token 1 knows of no finished pair, token 2 of 0 -> 1, token 3 also of 1 -> 0 but of nothing after 2.
    assert experts[1:4].tolist() == [[-1, -1, -1], [1, -1, -1], [0, 1, -1]]
    # Token 4, 0: after nothing came 1, 0 and 2, after 0 came 1 and 2. No part foresaw any, so all three weigh 1.
    assert experts[4].tolist() == [1, 2, 0]
    assert shares[4, 0, 0] == pytest.approx([4 / 9, 4 / 9, 1 / 9])
    # That token, 0, was foreseen with 1/3 after nothing alone, for 2 was new: it weighs 2. Then came 1, foreseen with
    # 1/4 after nothing and 1/2 after 0: 2 x 1/4 and 1 x 1/2 twice, so that each part explains a third of it.
    assert experts[6].tolist() == [1, 2, 0]
    mixed = [(7 / 3 * alone + 8 / 3 * after) / 5 for alone, after in ((2 / 5, 2 / 3), (1 / 5, 1 / 3), (2 / 5, 0))]
    assert shares[6, 0, 0] == pytest.approx(mixed)


def test_context_looks_as_far_back_as_it_is_told() -> None:
    # Seven tokens in ten repeat the one three before; the others, and all else, are chance: 1 of 8.
    random = np.random.default_rng(0)
    experts = random.integers(0, 8, 600)
    for token in np.flatnonzero(random.random(600) < 0.7):
        experts[token] = experts[token - 3] if token >= 3 else experts[token]
    trace = decoding(experts[:, None], 8)
    steps = plan(trace)
    recalls = [
        recall_at(make_predictor("context", context=context).guess(trace, steps, 1, 1), trace, steps)[0]
        for context in (1, 2, 3)
    ]
    assert max(recalls[:2]) < 0.25 < 0.6 < recalls[2]


def test_context_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="predictor context = 0: must be at least 1"):
        make_predictor("context", context=0)


def test_activation_follows_the_most_similar_finished_sequence() -> None:
    # Two layers, top-1. Sequence 0 uses experts 0 and 1, sequence 1 uses 2 and 3, then each once more something else,
    # so that its matrix's layer 1 has {1: 2, 5: 1} and {3: 2, 4: 1}.
    first, second = [[0, 1], [0, 1], [0, 5]], [[2, 3], [2, 3], [2, 4]]
    trace = decoding([*first, *second, [2, 3], [0, 1]], 6, sequence=[0, 0, 0, 1, 1, 1, 2, 2])
    guesses = guess("activation", trace, plan(trace), 1, 2)
    experts, shares = guesses.experts[:, :, 0], guesses.confidences
    assert shares is not None
    # While sequence 0 runs nothing is finished; sequence 1 has only sequence 0 to match.
    assert (experts[:3] == -1).all()
    assert experts[3, 0].tolist() == [1, 5]
    assert shares[3, 0, 0] == pytest.approx([2 / 3, 1 / 3])
    # Sequence 2 begins like sequence 1: at once at layer 0, and at layer 1 for the next token's layer 0.
    assert experts[6].tolist() == [[3, 4], [2, -1]]
    # Its second token uses 0: at layer 0 the matrix {2: 1, 0: 1} is as similar to both there, 1 / sqrt(2); layer 1
    # still is sequence 1's.
    assert experts[7, 0].tolist() == [3, 4]


def test_activation_replaces_the_most_similar_matrix_when_there_is_no_room() -> None:
    # One layer, top-1, room for two: 0 0, 1 1 and then 0 2 end; the last is nearest to 0 0 and takes its place.
    trace = decoding([[0], [0], [1], [1], [0], [2], [0], [3]], 4, sequence=[0, 0, 1, 1, 2, 2, 3, 3])
    assert guess("activation", trace, plan(trace), 1, 3).experts[6, 0, 0].tolist() == [0, 2, -1]
    roomy = Activation(capacity=3).guess(trace, plan(trace), 1, 3)
    assert roomy.experts[6, 0, 0].tolist() == [0, -1, -1]


def test_activation_needs_room_for_one_matrix() -> None:
    with pytest.raises(ValueError, match="predictor capacity = 0: must be at least 1"):
        Activation(capacity=0)


def test_recorded_repeats_the_traces_predictions() -> None:
    trace, steps = ragged(8)
    trace = replace(trace, present=None)
    assert trace.predictions is not None
    assert trace.confidences is not None
    guesses = guess("recorded", trace, steps, 2, 5)
    last = {int(trace.sequence[row]): int(row) for step in steps for row in step.rows}
    assert guesses.confidences is not None
    for place, row in enumerate(guesses.rows):
        if row != last[int(trace.sequence[row])]:
            assert np.array_equal(guesses.experts[place, :, :, :N], trace.predictions[row, :, :2])
            assert (guesses.experts[place, :, :, N:] == -1).all()
    real = guesses.experts[..., :N] >= 0
    assert np.array_equal(guesses.confidences[..., :N][real], trace.confidences[guesses.rows, :, :2][real])
    assert guess("recorded", replace(trace, confidences=None), steps).confidences is None


def test_recorded_names_what_the_trace_would_need() -> None:
    trace, steps = ragged(0)
    with pytest.raises(ValueError, match="predictions reach 5 layers ahead, not 6: record 6 or ask for at most 5"):
        guess("recorded", trace, steps, horizons=6)
    with pytest.raises(ValueError, match=r"no array predictions; it must have one of shape .*horizons >= 2"):
        guess("recorded", replace(trace, predictions=None, confidences=None), steps, horizons=2)


# Recall, and the table


def test_recall_is_the_share_of_true_experts_in_the_lists() -> None:
    # Two tokens, two layers, top-2. One ahead the targets are token 0 at 1, token 1 at 0, token 1 at 1: six true
    # experts, of which the lists below hold 2, 1 and 0. Two ahead: token 1 at 0 and at 1, of which 0 and 1.
    trace = decoding([[[0, 1], [2, 3]], [[1, 2], [0, 3]]], 4)
    experts = np.full((2, 2, 2, 2), -1, dtype=np.int16)
    experts[0, 0, 0] = 3, 2
    experts[0, 1, 0] = 0, 2
    experts[1, 0, 0] = 1, 2
    experts[0, 0, 1] = 0, 3
    experts[0, 1, 1] = 3, -1
    assert recall_at(Guesses(np.arange(2), experts), trace, plan(trace)) == pytest.approx([3 / 6, 1 / 4])


def test_recall_without_targets_is_zero() -> None:
    trace = decoding([[0], [1]], 4, sequence=[0, 1])
    assert recall_at(Oracle().guess(trace, plan(trace), 2, 1), trace, plan(trace)).tolist() == [0, 0]


def test_an_unknown_predictor_or_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"predictor\.name = 'orcale': choose one of .* \(did you mean 'oracle'\?\)"):
        make_predictor("orcale")
    with pytest.raises(ValueError, match=r"option of predictor 'oracle' = 'recal': .* \(did you mean 'recall'\?\)"):
        make_predictor("oracle", recal=0.5)
    with pytest.raises(ValueError, match="option of predictor 'frequency' = 'recall': choose one of none"):
        make_predictor("frequency", recall=0.5)


@pytest.mark.parametrize("name", PREDICTORS)
def test_every_predictor_may_be_given_a_seed(name: str) -> None:
    trace, steps = ragged(2)
    digests = {
        make_predictor(name, seed=seed, **OPTIONS.get(name, {})).guess(trace, steps, 2, 2).digest for seed in (0, 1)
    }
    assert len(digests) == (2 if name == "oracle" else 1)


def test_real_routing_is_more_predictable_than_chance(traces: Path) -> None:
    # 4 guesses among 32 experts find an eighth by chance.
    trace = RoutingTrace.load(traces / "gpt-oss-20b.npz")
    steps = plan_steps(trace.sequence, trace.phase, tokens=500)
    for name in ("previous-token", "frequency", "transition", "context"):
        assert (recall_at(guess(name, trace, steps, 3, 4), trace, steps) > 1.25 / 8).all()
