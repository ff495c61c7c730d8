"""Which tokens run together: the list of steps (forward passes) that a serving engine makes of a trace.

Sequences, in file order, fill the places of the batch. A new one is prefilled in steps of its own, then joins;
all decoding places advance together; a finished place takes the next sequence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PREFILL, DECODE = 0, 1
#: What happens to prompt tokens: left out, one step a sequence, or steps of `chunk_tokens`.
PREFILL_MODES = ("skip", "whole", "chunked")


@dataclass(frozen=True)
class Step:
    """One forward pass: its phase (PREFILL or DECODE) and the trace rows it runs, int64, in order of place."""

    phase: int
    rows: npt.NDArray[np.int64]


def plan_steps(
    sequence: npt.NDArray[np.integer],
    phase: npt.NDArray[np.integer],
    *,
    batch: int = 1,
    prefill: str = "whole",
    chunk_tokens: int = 512,
    tokens: int | None = None,
) -> list[Step]:
    """Return the steps that serve a trace whose rows have these `sequence` and `phase` arrays, each (tokens,).

    `tokens` ends the run after that many decode tokens; the last step may then be narrower than the batch.
    Raises ValueError if a number is not positive or the mode is unknown.
    """
    for name, value in (("batch", batch), ("chunk_tokens", chunk_tokens), ("tokens", tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    if prefill not in PREFILL_MODES:
        raise ValueError(f"prefill = {prefill!r}: choose one of {', '.join(PREFILL_MODES)}")
    most = {"skip": 0, "whole": len(phase), "chunked": chunk_tokens}[prefill]
    waiting = deque(rows_by_sequence(sequence))
    places: list[deque[int]] = [deque() for _ in range(batch)]
    is_prompt = (phase == PREFILL).tolist()
    steps: list[Step] = []
    left = len(phase) if tokens is None else tokens
    while left > 0:
        for place in places:
            _prefill(place, waiting, is_prompt, most, steps)
        together = [place.popleft() for place in places if place][:left]
        if not together:
            break
        steps.append(Step(DECODE, np.array(together, dtype=np.int64)))
        left -= len(together)
    return steps


def _prefill(
    place: deque[int], waiting: deque[list[int]], is_prompt: Sequence[bool], most: int, steps: list[Step]
) -> None:
    """Bring a place to its next token to decode: run the prompt before it, at most `most` tokens a step (0: none)."""
    while True:
        if not place:
            if not waiting:
                return
            place.extend(waiting.popleft())
        prompt = []
        while place and is_prompt[place[0]]:
            prompt.append(place.popleft())
        for first in range(0, len(prompt), most) if most else ():
            steps.append(Step(PREFILL, np.array(prompt[first : first + most], dtype=np.int64)))
        if place:
            return


def rows_by_sequence(sequence: npt.NDArray[np.integer]) -> list[list[int]]:
    """Return the rows of each sequence, sequences in order of first appearance, rows in file order."""
    rows: dict[int, list[int]] = {}
    for row, name in enumerate(sequence.tolist()):
        rows.setdefault(name, []).append(row)
    return list(rows.values())


def decode_tokens(steps: Sequence[Step]) -> int:
    """Return how many tokens the decode steps produce."""
    return sum(len(step.rows) for step in steps if step.phase == DECODE)
