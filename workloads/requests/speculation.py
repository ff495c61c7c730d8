"""Speculative decoding: how many drafts of a step are accepted, by random numbers keyed on the request and position.

A draft is accepted with a probability that is conditional on those before it, so d drafts of acceptance a yield
1 + a + ... + a^d = (1 - a^(d + 1)) / (1 - a) tokens a step in the mean (Leviathan, Kalman, Matias, "Fast inference from
transformers via speculative decoding", ICML 2023, equation 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ..keyed_random import uniform_one

#: What the keys of a draw begin with, behind the seed: no two uses share their luck.
ACCEPTED, WRONG, SAME = 0x5BEC0, 0x5BEC1, 0x5BEC2


@dataclass(frozen=True)
class Speculation:
    """So many drafts a step, and the probability of each, by its place, that it is accepted if those before it are.

    Or `recorded`: how many were accepted in steps that were seen, of which one is drawn. A rejected draft goes to the
    experts of the true token's with probability `overlap`, and else to those of another token of its sequence.
    Raises InputError unless there is one probability a draft, and all are 0..1.
    """

    drafts: int
    acceptance: tuple[float, ...] = ()
    overlap: float = 0.0
    seed: int = 0
    recorded: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.drafts < 1:
            raise InputError(f"drafts = {self.drafts}: must be at least 1")
        if not self.recorded and len(self.acceptance) != self.drafts:
            raise InputError(f"acceptance: {len(self.acceptance)} for {self.drafts} drafts: give one for each")
        for name, values in (("acceptance", self.acceptance), ("overlap", (self.overlap,))):
            wrong = [value for value in values if not 0 <= value <= 1]
            if wrong:
                raise InputError(f"{name} = {wrong[0]}: must be 0 to 1")
        if any(not 0 <= accepted <= self.drafts for accepted in self.recorded):
            raise InputError(f"recorded acceptance: must be 0 to {self.drafts}, the drafts of a step")

    def accepted(self, request: int, position: int, drafts: int | None = None) -> int:
        """Returns how many of the drafts behind `position` of a request are accepted, 0..drafts."""
        drafts = self.drafts if drafts is None else drafts
        if self.recorded:
            drawn = uniform_one(self.seed, ACCEPTED, request, position)
            return min(drafts, self.recorded[int(drawn * len(self.recorded))])
        for place in range(drafts):
            if uniform_one(self.seed, ACCEPTED, request, position + 1 + place, place) >= self.acceptance[place]:
                return place
        return drafts

    def mean_tokens(self) -> float:
        """Returns the mean tokens of a step."""
        if self.recorded:
            return 1 + sum(self.recorded) / len(self.recorded)
        return 1 + float(np.cumprod(self.acceptance).sum())


def draft_rows(
    speculation: Speculation,
    own: Sequence[int] | npt.NDArray[np.int64],
    true: npt.NDArray[np.int64],
    request: int,
    first: int,
    accepted: int,
) -> npt.NDArray[np.int64]:
    """Returns the rows of drafts at positions `first`..., whose true rows are `true` (drafts,).

    The `accepted` first ones are true. Each other one has by its keys, (request, position, place), the true row or one
    of `own`, the rows of its sequence.
    """
    rows = true.copy()
    for place in range(accepted, len(true)):
        keys = (request, first + place, place)
        if uniform_one(speculation.seed, SAME, *keys) >= speculation.overlap:
            rows[place] = own[int(uniform_one(speculation.seed, WRONG, *keys) * len(own))]
    return rows
