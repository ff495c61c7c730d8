"""A predictor's guesses as dispatch goes by them: step by step, and for which later step each is meant."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ...workloads.batches import Step
from ...workloads.guesses import Guesses
from ...workloads.trace import RoutingTrace

#: How many rows of guesses become lists at once.
_ROWS_AT_ONCE = 256


def ranked_guesses(guesses: Guesses, steps: Sequence[Step], experts: int) -> Iterator[list[list[list[int]]]]:
    """Yield, step by step, the guessed experts of each layer and horizon: [layer][horizon - 1][rank by token].

    A layer's experts are numbered `experts` after those of the layer before.
    """
    _, layers, horizons, _ = guesses.experts.shape
    ahead = np.arange(layers)[:, None] + np.arange(1, horizons + 1)
    offset = (ahead % layers * experts)[:, :, None]
    first = start = end = 0
    for step in steps:
        last = first + len(step.rows)
        if last > end or not end:  # turn many rows into lists at once: most steps have one
            start, end = first, max(last, first + _ROWS_AT_ONCE)
            index = guesses.experts[start:end].astype(np.int64)
            ids: npt.NDArray[np.int64] = np.where(index < 0, -1, index + offset)
            by_row = ids.tolist()
        if last == first + 1:
            yield by_row[first - start]
        else:
            together = np.moveaxis(ids[first - start : last - start], 0, -1)
            yield together.reshape(layers, horizons, -1).tolist()
        first = last


def ranked_confidences(guesses: Guesses, steps: Sequence[Step]) -> Iterator[list[list[list[float]]]]:
    """Yield, step by step, the confidences of the guesses, laid out as `ranked_guesses` lays out experts."""
    assert guesses.confidences is not None
    _, layers, horizons, _ = guesses.experts.shape
    first = 0
    for step in steps:
        last = first + len(step.rows)
        together = np.moveaxis(guesses.confidences[first:last], 0, -1)
        yield together.reshape(layers, horizons, -1).tolist()
        first = last


def later_steps(trace: RoutingTrace, steps: Sequence[Step], most: int) -> list[list[int]]:
    """Return, for each step, itself and the first step that one of its sequences takes 1, 2, … `most` of its own later.

    -1 where there is none: guesses that cross the token boundary so often have no visit to be for.
    """
    upcoming: dict[int, deque[int]] = {}
    later = []
    for index in range(len(steps) - 1, -1, -1):
        own = [
            upcoming.setdefault(sequence, deque(maxlen=most))
            for sequence in dict.fromkeys(trace.sequence[steps[index].rows].tolist())
        ]
        later.append([index, *(min((s[ahead] for s in own if ahead < len(s)), default=-1) for ahead in range(most))])
        for following in own:
            following.appendleft(index)
    return later[::-1]
