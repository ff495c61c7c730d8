"""What is kept is what would be made: nothing depends on it, and it does not outlive what it was made of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from prestage.engine.load import load_inputs
from prestage.engine.scenario.scenario import Scenario, load_scenario
from prestage.kept import KEPT, Kept, digest_of, file_state
from prestage.workloads.synthetic import synthesize

LEARNED = ("workload.tokens=20",)
SETTINGS = ("workload.tokens=20", "workload.synthetic.tokens=200", "predictor.name=transition")


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    KEPT.clear()


def scenario(*settings: str) -> Scenario:
    return load_scenario("speed", [*SETTINGS, *settings])


def test_the_same_question_is_answered_by_the_same_object_until_it_is_crowded_out() -> None:
    kept, made = Kept(most_bytes=100), []

    def get(key: str, size_bytes: int) -> str:
        def make() -> str:
            made.append(key)
            return key

        return kept.get(key, make, lambda value: size_bytes)

    for key in ("a", "b", "a", "c", "b", "a"):  # 40 + 40; a is the newer one when c comes
        assert get(key, 40) == key
    assert made == ["a", "b", "c", "b", "a"]
    get("large", 101)
    get("large", 101)
    assert made[-2:] == ["large", "large"]


def test_scenarios_that_name_the_same_share_their_trace_and_guesses() -> None:
    first, second = load_inputs(scenario()), load_inputs(scenario("memory.gpu_budget=40%"))
    assert second.trace is first.trace
    assert second.guesses is first.guesses
    for array in (first.trace.experts, first.trace.sequence, first.trace.weights):
        assert not array.flags.writeable  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "setting",
    ["seed=1", "workload.synthetic.skew=0.3", "workload.tokens=21", "predictor.name=frequency", "prefetch.k=1"],
)
def test_what_differs_in_anything_that_guesses_are_made_of_does_not_share_them(setting: str) -> None:
    first, second = load_inputs(scenario()), load_inputs(scenario(setting))
    assert second.guesses is not first.guesses


def test_what_is_kept_is_what_would_be_made() -> None:
    for settings in (LEARNED, ("workload.tokens=20", "prefetch.lookahead=3")):
        kept = load_inputs(load_scenario("guide", settings))
        again = load_inputs(load_scenario("guide", settings))
        KEPT.clear()
        anew = load_inputs(load_scenario("guide", settings))
        assert again.guesses is kept.guesses
        assert anew.guesses is not kept.guesses
        assert anew.guesses is not None and kept.guesses is not None
        assert anew.guesses.digest == kept.guesses.digest


def test_a_trace_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    of = load_scenario("speed", [f"workload.trace={path}", "workload.tokens=20"])
    found = []
    for seed in (0, 1):
        synthesize(50, 32, 8, 2, seed=seed).save(path)
        found.append(load_inputs(of))
    assert found[0].trace is not found[1].trace
    assert not np.array_equal(found[0].trace.experts, found[1].trace.experts)
    assert load_inputs(of).trace is found[1].trace


def test_a_file_of_the_same_size_and_time_in_its_place_is_another(tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    for file in (path, other):
        file.write_bytes(b"12345")
        os.utime(file, ns=(1, 1))
    before = file_state(path)
    other.replace(path)
    assert file_state(path) != before
    assert file_state(tmp_path) is None
    assert file_state(tmp_path / "missing") is None


def test_a_digest_tells_types_shapes_and_values_apart() -> None:
    four = np.arange(4, dtype=np.int32)
    others: list[list[npt.NDArray[Any] | None]] = [
        [four.astype(np.int64)],
        [four.reshape(2, 2)],
        [four[::-1]],
        [four, None],
        [four[:2], four[2:]],
        [None],
    ]
    digests = {digest_of([four]), *map(digest_of, others)}
    assert len(digests) == 1 + len(others)
    assert digest_of([np.arange(8, dtype=np.int32)[::2]]) == digest_of([np.array([0, 2, 4, 6], dtype=np.int32)])
