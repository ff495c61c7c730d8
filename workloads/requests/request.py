"""What a request is, and what a serving loop makes of requests: steps, or waiting for the next one.

Positions of a request count from 0: its prompt, then the tokens that it was given. The last of these is never run
through the model, so that a request of p and o tokens has p + o - 1 positions in the KV cache at most (and drafts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ..batches import DECODE, Step


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt that arrives at an instant and wants so many tokens.

    `hashes` are of its prompt, one for every `hash_tokens` of them, the last of what is left: each stands for all that
    comes before it too, so that two prompts with one hash are the same up to the end of what it is of.
    """

    number: int
    arrival_ns: int
    prompt_tokens: int
    output_tokens: int
    hashes: tuple[int, ...] = ()
    hash_tokens: int = 512

    @property
    def most_positions(self) -> int:
        """How many positions it has in the KV cache before its last token, without drafts."""
        return self.prompt_tokens + self.output_tokens - 1


class Part(NamedTuple):
    """The rows of one request in a step: `tokens` of them, from position `first` on.

    `first` positions are in the KV cache already. `sampled` rows, the last ones, get logits: none in a chunk that does
    not end its prompt. `drafts` of the rows, the last ones, are drafts that the step verifies.
    """

    request: int
    first: int
    tokens: int
    sampled: int
    drafts: int = 0


@dataclass(frozen=True)
class RequestStep(Step):
    """One forward pass over parts of requests; its rows are theirs, in this order.

    Its phase is DECODE if every part is one known token and its drafts, and else PREFILL. `kv_blocks` are in use while
    it runs; KV blocks that were swapped are copied before it, so many bytes to the GPU and to the host.
    """

    parts: tuple[Part, ...] = ()
    kv_blocks: int = 0
    swap_in_bytes: int = 0
    swap_out_bytes: int = 0

    @property
    def sampled(self) -> int:
        """How many rows get logits."""
        return sum(part.sampled for part in self.parts)


class RepeatedStep(RequestStep):
    """A step that comes behind another and lets the same requests go on, each by one token."""

    #: How many positions each request has in the KV cache before it (requests,).
    cached: npt.NDArray[np.int64]

    def __init__(
        self, first: RequestStep, rows: npt.NDArray[np.int64], cached: npt.NDArray[np.int64], kv_blocks: int
    ) -> None:
        # Thousands are made a second, and the parts of most are never looked at.
        vars(self).update(phase=DECODE, rows=rows, kv_blocks=kv_blocks, cached=cached, first=first)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Those of the first, each so many positions on."""
        parts = zip(vars(self)["first"].parts, self.cached.tolist(), strict=True)
        return tuple(part._replace(first=cached) for part, cached in parts)

    @property
    def sampled(self) -> int:
        """How many rows get logits: all."""
        return len(self.rows)


class Repeats(NamedTuple):
    """Steps that will be made behind the one that was made last, as long as each begins before an instant."""

    steps: list[RequestStep]
    until_ns: int


class Wait(NamedTuple):
    """There is nothing to run before this instant, which is later than now."""

    until_ns: int


@runtime_checkable
class Repeating(Protocol):
    """A source that may know what it will make next, so that an engine need not ask for it step by step."""

    def repeats(self) -> Repeats:
        """Returns what it makes behind the step that it made last, if nobody arrives; no steps if it does not know."""

    def repeated(self, ends_ns: Sequence[int]) -> None:
        """Learn that the last step and those that it knew ended at these instants; the one behind them runs."""


class StepSource(Protocol):
    """What an engine pulls steps from, one at a time."""

    def next_step(self, now_ns: int) -> Step | Wait | None:
        """Returns the step to dispatch now, or how long there is nothing to do, or None at the end of the run."""

    def ended(self, end_ns: int, link_busy_ns: int = 0) -> None:
        """Learn when the tokens of the last step were there, and how long the host-to-GPU link was busy since then."""


def is_decode(parts: tuple[Part, ...]) -> bool:
    """Returns whether every part is one known token and its drafts, with logits."""
    return all(part.tokens == 1 + part.drafts and part.sampled for part in parts)
