"""Scores of predictors by hand, bounds against known entropies, and the command line over both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prestage.output.tables.measured import print_predictors
from prestage.workloads.batches import plan_steps
from prestage.workloads.guesses import Guesses, Run
from prestage.workloads.predictor_scores import (
    BOUND_KNOWLEDGE,
    ONLINE,
    bounds,
    calibration_error,
    evaluate,
    predictability,
    scores,
)
from prestage.workloads.predictors import make_predictor
from prestage.workloads.trace import RoutingTrace
from prestage.workloads.trace_limits import TraceError

REPORT = Path(__file__).parent.parent / "docs" / "predictors.json"


def decoding(experts: object, num_experts: int, sequence: list[int] | None = None, **arrays: Any) -> RoutingTrace:
    array = np.array(experts, dtype=np.uint8)
    names = np.zeros(len(array), np.int32) if sequence is None else np.array(sequence, np.int32)
    trace = RoutingTrace(array.reshape(*array.shape[:2], -1), num_experts, sequence=names, **arrays)
    trace.check()
    return trace


def markov(tokens: int, experts: int, stay: float, seed: int = 0) -> RoutingTrace:
    """One layer, top-1: the last token's expert again with probability `stay`, else any of the others alike."""
    random = np.random.default_rng(seed)
    moves = np.where(random.random(tokens) < stay, 0, random.integers(1, experts, tokens))
    return decoding((np.cumsum(moves) % experts)[:, None], experts)


def run_and_truth(trace: RoutingTrace, ahead: int = 1) -> tuple[Run, Any]:
    run = Run.of(trace, plan_steps(trace.sequence, trace.phase), ahead, 1)
    return run, run.truth()[:, :, ahead - 1]


# Scores by hand


def test_scores_of_two_tokens_by_hand() -> None:
    # Two layers, top-2. One ahead: token 0 at layer 0 guesses its layer 1 (truth 2 3), at layer 1 token 1's layer 0
    # (truth 1 2); token 1 at layer 0 its layer 1 (truth 0 3).
    trace = decoding([[[0, 1], [2, 3]], [[1, 2], [0, 3]]], 4)
    run, _ = run_and_truth(trace)
    experts = np.full((2, 2, 1, 3), -1, dtype=np.int16)
    confidences = np.zeros(experts.shape, dtype=np.float32)
    experts[0, 0, 0], confidences[0, 0, 0] = (3, 0, 2), (0.95, 0.45, 0.2)
    experts[0, 1, 0], confidences[0, 1, 0] = (0, 2, 1), (0.55, 0.55, 0.2)
    experts[1, 0, 0], confidences[1, 0, 0] = (3, 0, 1), (0.95, 0.95, 0.2)
    (at,) = scores(Guesses(np.arange(2), experts, confidences), run.truth(), [1, 2, 3])
    assert at["targets"] == 3
    assert at["top1"] == pytest.approx(2 / 3)
    # Found among the first 1, 2, 3: 1 1 2, 0 1 2, 1 2 2 of six.
    assert at["recall"] == pytest.approx({"1": 2 / 6, "2": 4 / 6, "3": 6 / 6})
    # By target layer: layer 0 is the second row, layer 1 the others.
    assert at["layers"]["top1"] == [0.0, 1.0]
    assert at["layers"]["recall"]["2"] == [1 / 2, 3 / 4]
    # The two best guesses of each: 0.95 three times, all right (bin 10: |2.85 - 3|); 0.45, wrong (0.45); 0.55 twice,
    # one right (|1.1 - 1|); together 0.7 of six guesses.
    assert at["calibration_error"] == pytest.approx(0.7 / 6, abs=1e-6)


def test_a_horizon_without_targets_has_no_shares() -> None:
    trace = decoding([[[0]], [[1]]], 4, sequence=[0, 1])
    run, _ = run_and_truth(trace)
    (at,) = scores(Guesses(np.arange(2), np.zeros((2, 1, 1, 1), np.int16)), run.truth(), [1])
    assert at == {
        "horizon": 1,
        "targets": 0,
        "top1": None,
        "recall": {"1": None},
        "calibration_error": None,
        "layers": {"top1": [None], "recall": {"1": [None]}},
    }


def test_confidence_that_comes_true_has_no_calibration_error() -> None:
    random = np.random.default_rng(0)
    confidences = random.random(100_000)
    right = random.random(100_000) < confidences
    # A bin's error is its luck: about sqrt(p (1 - p) / 10,000), 0.004 on average, 0.005 at most.
    error = calibration_error(confidences, right)
    assert error is not None
    assert error < 0.005
    assert calibration_error(np.ones(4), np.array([True, False, False, False])) == pytest.approx(0.75)
    assert calibration_error(np.empty(0), np.empty(0, np.bool_)) is None


def test_sequences_that_are_not_scored_are_learned_from_first() -> None:
    # Sequence 0 is scored, and sequence 1, later in the file, has taught that 2 follows: at once from its start.
    trace = decoding([[1, 2], [1, 2], [1, 2], [1, 2]], 4, sequence=[0, 0, 1, 1])
    named = {name: make_predictor(name) for name in ("frequency", "transition")}
    data = evaluate(trace, named, horizons=1, sequences=":1")
    assert data["tokens"] == 2
    assert [entry["horizons"][0]["top1"] for entry in data["predictors"]] == [1, 1]
    alone = evaluate(trace.slice(sequences=[0]), named, horizons=1)
    assert [entry["horizons"][0]["top1"] for entry in alone["predictors"]] == [1 / 3, 1 / 3]


def test_prompts_are_not_scored() -> None:
    trace = decoding([[0, 1]] * 5, 4, phase=np.array([0, 0, 0, 1, 1], dtype=np.uint8))
    data = evaluate(trace, {"previous-token": make_predictor("previous-token")}, horizons=1)
    assert data["tokens"] == 2
    assert data["predictors"][0]["horizons"][0]["targets"] == 3


@pytest.mark.parametrize("span", ["3", "9:", "2:2", "a:b", "-1:"])
def test_a_span_of_no_sequences_is_refused(span: str) -> None:
    trace = decoding([[0], [1]], 4, sequence=[4, 7])
    assert trace.sequences_in("1:") == [7]
    assert trace.sequences_in(":") == [4, 7]
    with pytest.raises(TraceError, match="write FIRST:LAST, such as 3:5 or 61:, within the 2 there are"):
        trace.sequences_in(span)


def test_a_list_without_guesses_is_refused() -> None:
    with pytest.raises(ValueError, match="recall@0: a list has at least 1 guess"):
        evaluate(markov(9, 4, 0.5), {}, lengths=[5, 0])


# Bounds


def test_predictability_solves_fanos_inequality() -> None:
    # Certain: 1. Uniform: 1 of n. Staying with p among n: the p of its own entropy.
    assert predictability(0.0, 8) == pytest.approx(1)
    assert predictability(3.0, 8) == pytest.approx(1 / 8)
    for p in (0.3, 0.6, 0.9):
        entropy_bits = -p * np.log2(p) - (1 - p) * np.log2((1 - p) / 7)
        assert predictability(entropy_bits, 8) == pytest.approx(p)
    assert predictability(0.0, 1) == 1


@pytest.mark.parametrize("stay", [0.2, 0.5, 0.8])
def test_bounds_of_a_markov_trace_come_to_its_theory(stay: float) -> None:
    # Knowing the choice here, the entropy is that of staying, for which Fano's inequality is an equality: both bounds
    # are p, within 4.5 deviations of sqrt(p (1 - p) / 40,000) and what 8 x 8 estimated chances add.
    found = bounds(*run_and_truth(markov(40_000, 8, stay)), 1, 8)["knowing"]["choice here"]
    entropy_bits = -stay * np.log2(stay) - (1 - stay) * np.log2((1 - stay) / 7)
    assert found["entropy_bits"] == pytest.approx(entropy_bits, abs=0.03)
    assert found["fano"] == pytest.approx(stay, abs=0.015)
    assert found["hindsight"] == pytest.approx(stay, abs=0.015)


@pytest.mark.parametrize("stay", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_no_predictor_beats_the_bounds_of_what_it_knows(stay: float, horizon: int) -> None:
    trace = markov(3_000, 8, stay, seed=1)
    data = evaluate(trace, {name: make_predictor(name) for name in ONLINE}, horizons=horizon)
    for knows, bound in data["top1_bounds"][-1]["knowing"].items():
        assert bound["hindsight"] <= bound["fano"] + 1e-9
        for entry in data["predictors"]:
            if knows != "nothing" or entry["name"] == "frequency":
                assert entry["horizons"][-1]["top1"] <= bound["hindsight"]


def test_who_knows_more_is_bounded_less() -> None:
    random = np.random.default_rng(4)
    trace = decoding(np.argsort(random.random((4000, 3, 6)), axis=-1)[..., :2], 6)
    knowing = bounds(*run_and_truth(trace), 1, 6)["knowing"]
    assert tuple(knowing) == BOUND_KNOWLEDGE
    entropies = [knowing[knows]["entropy_bits"] for knows in BOUND_KNOWLEDGE]
    assert entropies == sorted(entropies, reverse=True)
    shares = [knowing[knows]["hindsight"] for knows in BOUND_KNOWLEDGE]
    assert shares == sorted(shares)
    # Top-2 of 6 drawn evenly: knowing nothing, the best guess is used a third of the time.
    assert shares[0] == pytest.approx(1 / 3, abs=0.05)


# What is published


def test_the_published_report_says_that_training_beats_counting() -> None:
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    for name, k in (("gpt-oss-20b", "4"), ("guide", "10")):
        entries = {entry["name"]: entry["horizons"] for entry in report[name]["predictors"]}
        learned = entries.pop("learned")
        assert set(entries) == set(ONLINE)
        for at in range(3):
            for counted in entries.values():
                assert learned[at]["recall"][k] > counted[at]["recall"][k]
                assert learned[at]["top1"] > counted[at]["top1"]


# The command line


def prestage(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "prestage", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.process
def test_predictors_are_trained_and_evaluated_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = decoding((np.arange(60)[:, None] + np.arange(2)) % 4, 4, sequence=[0] * 20 + [1] * 20 + [2] * 20)
    trace.save(tmp_path / "trace.safetensors")
    files = [tmp_path / "trace.safetensors", "--sequences"]
    trained = prestage("predictor", "train", *files, ":2", "-o", tmp_path / "w", "--epochs", 2, "--context", 1)
    assert trained.returncode == 0, trained.stderr
    assert str(tmp_path / "w" / "predictor.safetensors") in trained.stdout
    shown = prestage("predictor", "evaluate", *files, "2:", "--weights", tmp_path / "w", "--json")
    data = json.loads(shown.stdout)
    assert [entry["name"] for entry in data["predictors"]] == [*ONLINE, str(tmp_path / "w")]
    assert data["tokens"] == 20
    assert data["predictors"][-1]["memory_bytes"] > 0
    assert data["predictors"][-1]["latency_us"]["cpu"] > 0
    print_predictors(data, layers=True)
    table = capsys.readouterr().out
    assert all(word in table for word in (*ONLINE, "recall@10", "hindsight", "one guess takes"))
    refused = prestage("predictor", "evaluate", *files, "9:")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "write FIRST:LAST" in refused.stderr
