"""Which experts a request's tokens go to: each request goes along a sequence of the routing trace.

Request and position alone say the row, by a keyed draw of the sequence and of where in it the request begins, so that
a token goes to the same experts under any scheduler, batch, chunk, preemption, prefix hit or draft depth.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ..batches import PREFILL, rows_by_sequence
from ..keyed_random import uniform_one

Rows = npt.NDArray[np.int64]
#: What the keys of a draw begin with, behind the seed.
_SEQUENCE, _PLACE = 0x20005, 0x20006


class RequestRows:
    """The rows of a trace that stand for the positions of requests.

    A prompt goes through the prompt rows of its sequence, from a drawn place on and around, and its tokens through the
    rows that decode; where a sequence has none of a kind, through all of it. `sequence` and `phase` (tokens,) are the
    trace's. Raises InputError for an empty trace.
    """

    def __init__(self, sequence: npt.NDArray[np.integer], phase: npt.NDArray[np.integer], seed: int) -> None:
        if not len(sequence):
            raise InputError("requests: the routing trace has no rows, and says of no token where it goes")
        self._seed = seed
        self._sequences: list[tuple[Rows, Rows, Rows]] = []
        for listed in rows_by_sequence(sequence):
            rows = np.array(listed, dtype=np.int64)
            prompt = rows[phase[rows] == PREFILL]
            decode = rows[phase[rows] != PREFILL]
            self._sequences.append((rows, prompt if len(prompt) else rows, decode if len(decode) else rows))

    def sequence_of(self, request: int) -> Rows:
        """Returns all rows of the sequence that a request goes along."""
        return self._sequences[self._drawn(request)][0]

    def _drawn(self, request: int) -> int:
        return int(uniform_one(self._seed, _SEQUENCE, request) * len(self._sequences))

    def of(self, request: int, prompt_tokens: int, positions: int) -> Rows:
        """Returns the rows of the first so many positions of a request, int64 (positions,)."""
        _, prompt, decode = self._sequences[self._drawn(request)]
        drawn = uniform_one(self._seed, _PLACE, request)
        of_prompt = np.arange(min(positions, prompt_tokens)) + int(drawn * len(prompt))
        of_decode = np.arange(max(0, positions - prompt_tokens)) + int(drawn * len(decode))
        return np.concatenate([prompt[of_prompt % len(prompt)], decode[of_decode % len(decode)]])
