"""Which tokens run together, worked by hand: a step is written as its phase and the trace rows that it runs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prestage.workloads.batches import (
    DECODE,
    PREFILL,
    Step,
    columns_of,
    continued_steps,
    decode_tokens,
    plan_steps,
    rows_by_sequence,
    some_columns,
)

P, D = PREFILL, DECODE
Plan = list[tuple[int, list[int]]]


def plan(rows: str, **options: object) -> Plan:
    """The steps of a trace written row by row: `Ap` is a prompt token of sequence A, `Ad` one to decode."""
    steps = plan_steps(*arrays(rows), **options)  # type: ignore[arg-type]
    return [(step.phase, step.rows.tolist()) for step in steps]


def arrays(rows: str) -> tuple[np.ndarray, np.ndarray]:
    names = [row[0] for row in rows.split()]
    phase = [DECODE if row[1] == "d" else PREFILL for row in rows.split()]
    return np.array([ord(name) for name in names], dtype=np.int32), np.array(phase, dtype=np.uint8)


def test_one_place_decodes_the_sequences_one_after_the_other() -> None:
    assert plan("Ad Ad Bd") == [(D, [0]), (D, [1]), (D, [2])]


def test_sequences_fill_the_places_in_file_order_and_advance_together() -> None:
    # A has rows 0 to 2, B has 3 and 4: B ends first and its place stays empty, for there is no third sequence.
    assert plan("Ad Ad Ad Bd Bd", batch=2) == [(D, [0, 3]), (D, [1, 4]), (D, [2])]


def test_a_finished_place_takes_the_next_sequence_and_keeps_its_number() -> None:
    # A (row 0) ends after one step: C takes the first place, so C's rows stand before B's.
    assert plan("Ad Bd Bd Bd Cd Cd", batch=2) == [(D, [0, 1]), (D, [4, 2]), (D, [5, 3])]


def test_more_places_than_sequences_are_left_empty() -> None:
    assert plan("Ad Bd", batch=5) == [(D, [0, 1])]


def test_file_order_is_that_of_first_appearance_even_if_sequences_are_interleaved() -> None:
    # B appears first, then A, then C.
    rows = "Bd Ad Bd Cd Ad"
    assert rows_by_sequence(arrays(rows)[0]) == [[0, 2], [1, 4], [3]]
    assert plan(rows, batch=2) == [(D, [0, 1]), (D, [2, 4]), (D, [3])]


def test_a_prompt_runs_whole_in_a_step_of_its_own_before_its_sequence_joins() -> None:
    rows = "Ap Ap Ad Ad Bp Bd"
    assert plan(rows, batch=2) == [(P, [0, 1]), (P, [4]), (D, [2, 5]), (D, [3])]
    assert plan(rows) == [(P, [0, 1]), (D, [2]), (D, [3]), (P, [4]), (D, [5])]


def test_a_new_sequence_is_prefilled_while_the_others_stand_still() -> None:
    # C takes A's place after the first step: its prompt runs alone, then C and B decode together.
    assert plan("Ad Bd Bd Cp Cp Cd", batch=2) == [(D, [0, 1]), (P, [3, 4]), (D, [5, 2])]


def test_a_chunked_prompt_takes_as_many_steps_as_it_has_chunks() -> None:
    rows = "Ap Ap Ap Ap Ap Ad"
    assert plan(rows, prefill="chunked", chunk_tokens=2) == [(P, [0, 1]), (P, [2, 3]), (P, [4]), (D, [5])]
    assert plan(rows, prefill="chunked", chunk_tokens=5) == [(P, [0, 1, 2, 3, 4]), (D, [5])]
    assert plan(rows, prefill="chunked", chunk_tokens=512) == plan(rows)


def test_skipped_prompts_leave_the_decode_tokens_alone() -> None:
    assert plan("Ap Ap Ad Ad Bp Bd", batch=2, prefill="skip") == [(D, [2, 5]), (D, [3])]


def test_a_sequence_of_several_turns_is_prefilled_again_before_it_goes_on() -> None:
    # A: prompt 0, answer 1, prompt 2 and 3, answer 4.
    assert plan("Ap Ad Ap Ap Ad") == [(P, [0]), (D, [1]), (P, [2, 3]), (D, [4])]
    # Beside B, which decodes 5 and 6, and waits while A's second prompt runs.
    assert plan("Ap Ad Ap Ap Ad Bd Bd", batch=2) == [(P, [0]), (D, [1, 5]), (P, [2, 3]), (D, [4, 6])]
    assert plan("Ap Ad Ap Ap Ad", prefill="skip") == [(D, [1]), (D, [4])]


def test_a_sequence_without_an_answer_gives_its_place_to_the_next() -> None:
    # A and B are prompts only. Both run in the first place, then C does.
    assert plan("Ap Ap Bp Cd", batch=1) == [(P, [0, 1]), (P, [2]), (D, [3])]
    assert plan("Ap Ad Ap", batch=1) == [(P, [0]), (D, [1]), (P, [2])]
    assert plan("Ap Bp") == [(P, [0]), (P, [1])]
    assert plan("Ap Bp", prefill="skip") == []


def test_the_run_ends_after_so_many_decode_tokens_even_within_a_step() -> None:
    rows = "Ap Ad Ad Bp Bd Bd"
    assert plan(rows, batch=2, tokens=3) == [(P, [0]), (P, [3]), (D, [1, 4]), (D, [2])]
    assert plan(rows, batch=2, tokens=4) == [(P, [0]), (P, [3]), (D, [1, 4]), (D, [2, 5])]
    # Prompt tokens do not count, and nothing is prefilled that will not decode any more.
    assert plan(rows, tokens=2) == [(P, [0]), (D, [1]), (D, [2])]
    assert plan(rows, batch=2, tokens=99) == plan(rows, batch=2)


def test_decode_tokens_counts_the_rows_of_decode_steps_only() -> None:
    steps = [Step(PREFILL, np.arange(5)), Step(DECODE, np.arange(3)), Step(DECODE, np.arange(1))]
    assert decode_tokens(steps) == 4
    assert decode_tokens([]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch = 0: must be at least 1"),
        ({"chunk_tokens": -1}, "chunk_tokens = -1: must be at least 1"),
        ({"tokens": 0}, "tokens = 0: must be at least 1"),
        ({"prefill": "hole"}, "prefill = 'hole': choose one of skip, whole, chunked"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as error:
        plan("Ad", **options)
    assert str(error.value) == message


@given(
    rows=st.lists(st.tuples(st.sampled_from("ABCD"), st.sampled_from("pd")), min_size=1, max_size=30),
    batch=st.integers(1, 5),
    prefill=st.sampled_from(["skip", "whole", "chunked"]),
    chunk_tokens=st.integers(1, 4),
    tokens=st.none() | st.integers(1, 20),
)
def test_every_token_runs_once_in_the_order_of_its_sequence(
    rows: list[tuple[str, str]], batch: int, prefill: str, chunk_tokens: int, tokens: int | None
) -> None:
    sequence, phase = arrays(" ".join(name + kind for name, kind in rows))
    steps = plan_steps(sequence, phase, batch=batch, prefill=prefill, chunk_tokens=chunk_tokens, tokens=tokens)
    ran = [row for step in steps for row in step.rows.tolist()]
    assert len(ran) == len(set(ran))
    expected = [row for row in range(len(rows)) if prefill != "skip" or phase[row] == DECODE]
    if tokens is None or tokens > (phase == DECODE).sum():
        assert sorted(ran) == expected
    else:
        assert sum(phase[ran] == DECODE) == tokens
    for rows_of in rows_by_sequence(sequence):
        mine = [row for row in ran if row in rows_of]
        assert mine == sorted(mine)
        whole = [row for row in rows_of if row in expected]
        assert mine == whole[: len(mine)]  # nothing is left out on the way
    for step in steps:
        assert (phase[step.rows] == step.phase).all()
        of = sequence[step.rows]
        if step.phase == DECODE:
            assert len(set(of.tolist())) == len(of) <= batch
        else:
            assert len(set(of.tolist())) == 1
            assert prefill != "chunked" or len(of) <= chunk_tokens


def test_micro_batches_advance_in_steps_of_their_own_and_keep_their_places() -> None:
    # Three places: A and B are one micro-batch, C the other. B ends first, and D takes its place beside A.
    rows = "Ad Ad Ad Bd Cd Cd Cd Dd"
    steps = [(D, [0, 3]), (D, [4]), (D, [1, 7]), (D, [5]), (D, [2]), (D, [6])]
    assert plan(rows, batch=3, micro_batches=2) == steps
    assert plan(rows, batch=3, micro_batches=2, tokens=4) == [(D, [0, 3]), (D, [4]), (D, [1])]
    with pytest.raises(ValueError, match="micro_batches = 4: must be at most batch = 3"):
        plan(rows, batch=3, micro_batches=4)


def test_a_micro_batch_is_prefilled_just_before_its_first_step() -> None:
    rows = "Ap Ad Bp Bp Bd Bd"
    chunks = {"prefill": "chunked", "chunk_tokens": 1}
    steps = [(P, [0]), (D, [1]), (P, [2]), (P, [3]), (D, [4]), (D, [5])]
    assert plan(rows, batch=2, micro_batches=2, **chunks) == steps


def test_a_decode_step_goes_on_from_the_last_steps_of_its_sequences_and_a_prompt_from_none() -> None:
    # Steps: the prompt of A (0); A and B decode (1); A and C (2), C having no step before; A (3); a prompt of A (4).
    rows = "Ap Ad Ad Ad Ap Bd Cd"
    sequence, _ = arrays(rows)
    steps = [Step(P, np.array([0])), Step(D, np.array([1, 5])), Step(D, np.array([2, 6])), Step(D, np.array([3]))]
    steps.append(Step(P, np.array([4])))
    assert continued_steps(steps, sequence) == [(), (0,), (1,), (2,), ()]
    # C decodes on from its own first step, however long ago that was.
    assert continued_steps([steps[2], steps[3], Step(D, np.array([3, 6]))], sequence) == [(), (0,), (0, 1)]


@pytest.mark.parametrize("kept", [True, False])
def test_steps_are_told_as_arrays_all_of_them_or_some(kept: bool) -> None:
    sequence, phase = np.array([0, 0, 0, 1, 1]), np.array([PREFILL, PREFILL, DECODE, PREFILL, DECODE])
    planned = plan_steps(sequence, phase, batch=2)
    steps = planned if kept else list(planned)
    # Both prompts by themselves, then one step of the two decode tokens.
    told = columns_of(steps)
    assert (told.starts.tolist(), told.rows.tolist()) == ([0, 2, 3, 5], [0, 1, 3, 2, 4])
    assert (told.phases.tolist(), told.sampled.tolist()) == ([PREFILL, PREFILL, DECODE], [1, 1, 2])
    assert told.most_rows == 2 and columns_of([]).most_rows == 0
    some = some_columns(steps, 1, 3)
    assert (some.starts.tolist(), some.rows.tolist()) == ([0, 1, 3], [3, 2, 4])
    assert (some.phases.tolist(), some.sampled.tolist()) == ([PREFILL, DECODE], [1, 2])
