"""Which tokens run together: the list of steps (forward passes) that a serving engine makes of a trace.

Sequences, in file order, fill the places of the batch. A new one is prefilled in steps of its own, then joins;
all decoding places advance together; a finished place takes the next sequence. The places of a micro-batch advance in
steps of their own, one micro-batch after the other.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import InputError

Made = TypeVar("Made")

PREFILL, DECODE = 0, 1
#: What happens to prompt tokens: left out, one step a sequence, or steps of `chunk_tokens`.
PREFILL_MODES = ("skip", "whole", "chunked")
#: How a warmup is written: so many decode tokens, or steps of either phase.
_WARMUP = re.compile(r"\s*([0-9]{1,15})\s*(tokens|steps)\s*")


@dataclass(frozen=True)
class Step:
    """One forward pass: its phase (PREFILL or DECODE) and the trace rows it runs, int64, in order of place.

    `came` are the sequences that have taken a place since the step before, each with the step whose end had left that
    place free (-1: none, it was never taken).
    """

    phase: int
    rows: npt.NDArray[np.int64]
    came: tuple[tuple[int, int], ...] = ()

    @property
    def sampled(self) -> int:
        """How many positions get logits: the last one of each sequence, of which a prefill step has one."""
        return len(self.rows) if self.phase == DECODE else min(1, len(self.rows))


class StepColumns(NamedTuple):
    """Steps as arrays: the first row of each, and the end of the last (steps + 1,); all their rows; phases; samples.

    `rows` (rows,) are those of the trace; `phases` and `sampled` (steps,) as `Step` has them.
    """

    starts: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    phases: npt.NDArray[np.int64]
    sampled: npt.NDArray[np.int64]

    @property
    def most_rows(self) -> int:
        """The most rows of one step."""
        return int(np.diff(self.starts).max(initial=0))


class PlannedSteps(list[Step]):
    """The steps of a run that are all known before it, and do not change any more once somebody asks for `columns`."""

    @cached_property
    def columns(self) -> StepColumns:
        """All of them as arrays."""
        return _columns_of(self)

    @cached_property
    def worked_out(self) -> dict[tuple[Hashable, int], tuple[Any, Any]]:
        """What `worked_out_of` has found, by what that is and the array that it was made of; and that array."""
        return {}


def worked_out_of(steps: Sequence[Step], sequence: npt.NDArray[Any], what: Hashable, make: Callable[[], Made]) -> Made:
    """Returns what is made of steps and the sequence of each row of their trace, which those that are planned keep.

    `what` says what that is; nobody changes it.
    """
    if not isinstance(steps, PlannedSteps):
        return make()
    known, key = steps.worked_out, (what, id(sequence))
    if key not in known:
        known[key] = make(), sequence
    return known[key][0]  # type: ignore[no-any-return]


def columns_of(steps: Sequence[Step]) -> StepColumns:
    """Returns steps as arrays, which those that are planned keep."""
    return steps.columns if isinstance(steps, PlannedSteps) else _columns_of(steps)


def some_columns(steps: Sequence[Step], first: int, end: int) -> StepColumns:
    """Returns some of the steps as arrays, from one to before another."""
    if not isinstance(steps, PlannedSteps):
        return _columns_of(steps[first:end])
    known = steps.columns
    starts = known.starts[first : end + 1]
    rows = known.rows[starts[0] : starts[-1]]
    return StepColumns(starts - starts[0], rows, known.phases[first:end], known.sampled[first:end])


def _columns_of(steps: Sequence[Step]) -> StepColumns:
    counts = np.array([len(step.rows) for step in steps], dtype=np.int64)
    phases = np.array([step.phase for step in steps], dtype=np.int64)
    rows = np.concatenate([np.empty(0, dtype=np.int64), *(step.rows for step in steps)])
    sampled = np.array([step.sampled for step in steps], dtype=np.int64)
    return StepColumns(np.concatenate([[0], np.cumsum(counts)]), rows, phases, sampled)


class PulledSteps(list[Step]):
    """The steps that a run has pulled from a scheduler so far: what comes behind the last of them nobody knows."""


def every_row(sequence: npt.NDArray[np.integer], phase: npt.NDArray[np.integer]) -> list[Step]:
    """Returns steps that run every row of a trace once: what is known of each row whoever schedules it, and when."""
    return plan_steps(sequence, phase, batch=1, prefill="whole")


@dataclass
class _Place:
    """What is left to run of the sequence in a place, and the step that the one before it ended with (-1: none)."""

    rows: deque[int] = field(default_factory=deque)
    free_after: int = -1


def plan_steps(
    sequence: npt.NDArray[np.integer],
    phase: npt.NDArray[np.integer],
    *,
    batch: int = 1,
    prefill: str = "whole",
    chunk_tokens: int = 512,
    tokens: int | None = None,
    micro_batches: int = 1,
) -> list[Step]:
    """Returns the steps that serve a trace whose rows have these `sequence` and `phase` arrays, each (tokens,).

    `tokens` ends the run after that many decode tokens; the last step may then be narrower than the batch. The places
    are divided among the `micro_batches` as evenly as they go, the first ones taking one more.
    Raises ValueError if a number is not positive, there are more micro-batches than places, or the mode is unknown.
    """
    _check_plan(batch, prefill, chunk_tokens, tokens, micro_batches)
    most = {"skip": 0, "whole": len(phase), "chunked": chunk_tokens}[prefill]
    waiting = deque((int(sequence[rows[0]]), rows) for rows in rows_by_sequence(sequence))
    # More places than sequences stay empty: nobody would wait for them.
    sizes = [min(size, len(waiting)) for size in evenly(batch, micro_batches)]
    places = [[_Place() for _ in range(size)] for size in sizes]
    is_prompt = (phase == PREFILL).tolist()
    steps = PlannedSteps()
    came: list[tuple[int, int]] = []
    left = len(phase) if tokens is None else tokens
    ran = True
    while left > 0 and ran:
        ran = False
        for group in places:
            if not left:
                break
            for place in group:
                _prefill(place, waiting, is_prompt, most, steps, came)
            decoding = [place for place in group if place.rows][:left]
            if decoding:
                _add(steps, DECODE, [place.rows.popleft() for place in decoding], came)
                for place in decoding:
                    place.free_after = len(steps) - 1  # if it was its last
                left -= len(decoding)
                ran = True
    return steps


def _check_plan(batch: int, prefill: str, chunk_tokens: int, tokens: int | None, micro_batches: int) -> None:
    """Refuse what makes no plan of steps."""
    numbers = {"batch": batch, "chunk_tokens": chunk_tokens, "tokens": tokens, "micro_batches": micro_batches}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise InputError(f"{name} = {value}: must be at least 1")
    if micro_batches > batch:
        raise InputError(f"micro_batches = {micro_batches}: must be at most batch = {batch}")
    if prefill not in PREFILL_MODES:
        raise InputError(f"prefill = {prefill!r}: choose one of {', '.join(PREFILL_MODES)}")


def _add(steps: list[Step], phase: int, rows: list[int], came: list[tuple[int, int]]) -> None:
    steps.append(Step(phase, np.array(rows, dtype=np.int64), tuple(came)))
    came.clear()


def _prefill(
    place: _Place,
    waiting: deque[tuple[int, list[int]]],
    is_prompt: Sequence[bool],
    most: int,
    steps: list[Step],
    came: list[tuple[int, int]],
) -> None:
    """Bring a place to its next token to decode: run the prompt before it, at most `most` tokens a step (0: none)."""
    rows = place.rows
    while True:
        if not rows:
            if not waiting:
                return
            name, own = waiting.popleft()
            rows.extend(own)
            came.append((name, place.free_after))
        prompt = []
        while rows and is_prompt[rows[0]]:
            prompt.append(rows.popleft())
        for first in range(0, len(prompt), most) if most else ():
            _add(steps, PREFILL, prompt[first : first + most], came)
            place.free_after = len(steps) - 1
        if rows:
            return


def evenly(total: int, parts: int) -> list[int]:
    """Returns `total` in so many parts that differ by one at most, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def continued_steps(steps: Sequence[Step], sequence: npt.NDArray[np.integer]) -> list[tuple[int, ...]]:
    """Return, for each step, the earlier steps whose sampled tokens it goes on from, in order.

    A decode step takes up the last token of each of its sequences; a prefill step's tokens are known, so it waits for
    none. `sequence` (tokens,) is the trace's.
    """
    last: dict[int, int] = {}
    continued = []
    for number, step in enumerate(steps):
        names = dict.fromkeys(sequence[step.rows].tolist())
        before = {last[name] for name in names if name in last} if step.phase == DECODE else set()
        continued.append(tuple(sorted(before)))
        last.update(dict.fromkeys(names, number))
    return continued


def parse_warmup(text: object) -> tuple[int, str]:
    """Returns the number and the unit, "tokens" or "steps", of a warmup; raise InputError for what is none."""
    match = _WARMUP.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise InputError(f"{text!r}: write it as '100tokens' or '20steps'")
    return int(match[1]), match[2]


def warmup_steps(steps: Sequence[Step], warmup: str) -> int:
    """Returns how many steps at the beginning are the warmup: as few as have so many decode tokens, or so many.

    Raises InputError if no decode step is left behind them.
    """
    number, unit = parse_warmup(warmup)
    if not number:
        return 0
    decoded = np.cumsum([len(step.rows) if step.phase == DECODE else 0 for step in steps], dtype=np.int64)
    left_out = number if unit == "steps" else int(np.searchsorted(decoded, number)) + 1
    if left_out >= len(steps) or decoded[left_out - 1] == decoded[-1]:
        raise InputError(
            f"warmup = {warmup!r}: no token is left to measure behind it: the run has {decoded[-1]} decode tokens in "
            f"{len(steps)} steps; give less, or run more tokens"
        )
    return left_out


def rows_by_sequence(sequence: npt.NDArray[np.integer]) -> list[list[int]]:
    """Returns the rows of each sequence, sequences in order of first appearance, rows in file order."""
    order = np.argsort(sequence, kind="stable")
    named = np.asarray(sequence)[order]
    each = [rows.tolist() for rows in np.split(order, np.flatnonzero(named[1:] != named[:-1]) + 1) if len(rows)]
    return sorted(each, key=lambda rows: rows[0])


def decode_tokens(steps: Sequence[Step]) -> int:
    """Returns how many tokens the decode steps produce."""
    return sum(len(step.rows) for step in steps if step.phase == DECODE)
