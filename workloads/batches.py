"""Which tokens run together: the list of steps (forward passes) that a serving engine makes of a trace.

Sequences, in file order, fill the places of the batch. A new one is prefilled in steps of its own, then joins;
all decoding places advance together; a finished place takes the next sequence. The places of a micro-batch advance in
steps of their own, one micro-batch after the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InputError

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
    micro_batches: int = 1,
) -> list[Step]:
    """Return the steps that serve a trace whose rows have these `sequence` and `phase` arrays, each (tokens,).

    `tokens` ends the run after that many decode tokens; the last step may then be narrower than the batch. The places
    are divided among the `micro_batches` as evenly as they go, the first ones taking one more.
    Raises ValueError if a number is not positive, there are more micro-batches than places, or the mode is unknown.
    """
    numbers = {"batch": batch, "chunk_tokens": chunk_tokens, "tokens": tokens, "micro_batches": micro_batches}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise InputError(f"{name} = {value}: must be at least 1")
    if micro_batches > batch:
        raise InputError(f"micro_batches = {micro_batches}: must be at most batch = {batch}")
    if prefill not in PREFILL_MODES:
        raise InputError(f"prefill = {prefill!r}: choose one of {', '.join(PREFILL_MODES)}")
    most = {"skip": 0, "whole": len(phase), "chunked": chunk_tokens}[prefill]
    waiting = deque(rows_by_sequence(sequence))
    # More places than sequences stay empty: nobody would wait for them.
    sizes = [min(size, len(waiting)) for size in evenly(batch, micro_batches)]
    places: list[list[deque[int]]] = [[deque() for _ in range(size)] for size in sizes]
    is_prompt = (phase == PREFILL).tolist()
    steps: list[Step] = []
    left = len(phase) if tokens is None else tokens
    ran = True
    while left > 0 and ran:
        ran = False
        for group in places:
            if not left:
                break
            for place in group:
                _prefill(place, waiting, is_prompt, most, steps)
            together = [place.popleft() for place in group if place][:left]
            if together:
                steps.append(Step(DECODE, np.array(together, dtype=np.int64)))
                left -= len(together)
                ran = True
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


def evenly(total: int, parts: int) -> list[int]:
    """Return `total` in so many parts that differ by one at most, the larger ones first."""
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


def rows_by_sequence(sequence: npt.NDArray[np.integer]) -> list[list[int]]:
    """Return the rows of each sequence, sequences in order of first appearance, rows in file order."""
    rows: dict[int, list[int]] = {}
    for row, name in enumerate(sequence.tolist()):
        rows.setdefault(name, []).append(row)
    return list(rows.values())


def decode_tokens(steps: Sequence[Step]) -> int:
    """Return how many tokens the decode steps produce."""
    return sum(len(step.rows) for step in steps if step.phase == DECODE)
