"""A predictor's guesses as dispatch goes by them: step by step, and for which later step each is meant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ...workloads.batches import PulledSteps, Step, columns_of, worked_out_of
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

    def numbered(which: Any) -> npt.NDArray[np.int64]:
        index = guesses.experts[which].astype(np.int64)
        ids: npt.NDArray[np.int64] = np.where(index < 0, -1, index + offset)
        return ids

    by_row: list[list[list[list[int]]]] = []
    start = end = 0
    for step in steps:
        places = guesses.places(step.rows)
        if len(places) != 1:
            yield np.moveaxis(numbered(places), 0, -1).reshape(layers, horizons, -1).tolist()
            continue
        place = int(places[0])
        if place == end:  # turn many rows into lists at once: most steps have one, the next
            start, end = place, min(place + _ROWS_AT_ONCE, len(guesses.rows))
            by_row = numbered(slice(start, end)).tolist()
        yield by_row[place - start] if start <= place < end else numbered(place).tolist()


def ranked_confidences(guesses: Guesses, steps: Sequence[Step]) -> Iterator[list[list[list[float]]]]:
    """Yield, step by step, the confidences of the guesses, laid out as `ranked_guesses` lays out experts."""
    assert guesses.confidences is not None
    _, layers, horizons, _ = guesses.experts.shape
    for step in steps:
        together = np.moveaxis(guesses.confidences[guesses.places(step.rows)], 0, -1)
        yield together.reshape(layers, horizons, -1).tolist()


class _Following(Sequence[Sequence[int]]):
    """For any step, itself and the `most` steps behind it."""

    def __init__(self, most: int) -> None:
        self._most = most

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: Any) -> Any:
        return range(index, index + self._most + 1)


def later_steps(trace: RoutingTrace, steps: Sequence[Step], most: int) -> Sequence[Sequence[int]]:
    """Returns what `later_table` does, as lists.

    Of steps that are pulled from a scheduler nobody knows the next: they are taken to go on with the same sequences.
    """
    if isinstance(steps, PulledSteps):
        return _Following(most)
    later: list[list[int]] = later_table(trace, steps, most).tolist()
    return later


def later_table(trace: RoutingTrace, steps: Sequence[Step], most: int) -> npt.NDArray[np.int64]:
    """Returns, of each step (steps, 1 + most), itself and the first that one of its sequences has 1, 2, … steps later.

    -1 where there is none: guesses that cross the token boundary so often have no visit to be for.
    """
    return worked_out_of(steps, trace.sequence, ("later", most), partial(_later_table, trace, steps, most))


def _later_table(trace: RoutingTrace, steps: Sequence[Step], most: int) -> npt.NDArray[np.int64]:
    count = len(steps)
    later = np.full((count, 1 + most), count, dtype=np.int64)
    later[:, 0] = np.arange(count)
    columns = columns_of(steps)
    of_row = np.repeat(later[:, 0], np.diff(columns.starts))
    sequences = np.unique(trace.sequence[columns.rows], return_inverse=True)[1].reshape(-1)
    sequence, step_of = np.divmod(np.unique(sequences * max(1, count) + of_row), max(1, count))
    for ahead in range(1, 1 + most):
        goes_on = sequence[ahead:] == sequence[:-ahead]
        np.minimum.at(later[:, ahead], step_of[:-ahead][goes_on], step_of[ahead:][goes_on])
    later[later == count] = -1
    return later
