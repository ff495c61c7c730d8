"""Speed in the words of those who serve models: rates, and how long a sequence waits for its tokens.

A request is a prompt and the tokens after it; a further prompt of the same sequence begins another one. Its output
tokens are those of its decode steps and, where its prompt runs, the first one, which the prefill ends with. Requests
come in a closed loop of as many users as the batch has places: the first ones at 0, another as soon as a place is free,
and a sequence's further ones as soon as the answer to the one before is whole.

What follows a warmup leaves out its steps: their tokens and time from the rates, and the waits for their tokens. A wait
for a later token counts whole, also where it began in the warmup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ...workloads.batches import DECODE, Step
from ...workloads.requests.log import RequestLog

Array = npt.NDArray[Any]

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Serving:
    """By what the speed of a run is measured: the steps at its beginning to leave out, and which steps overlap.

    `previous` (steps,), for steps that overlap, is the step whose tokens each of them goes on from, -1 for none: a
    step takes from the end of that one, or from its own first kernel, to its end.
    """

    warmup_steps: int = 0
    previous: Sequence[int] | None = None
    #: Of requests under load: what was recorded of them.
    log: RequestLog | None = None
    #: Of several replicas: the place of each step of the log among those of all, one replica's behind another's.
    order: Array | None = None


@dataclass(frozen=True)
class Served:
    """The steps of a run in time: when the tokens of each were there, and how long it took, both (steps,).

    `sequence` (tokens,) is the trace's, `run_ns` the end of the last kernel.
    """

    steps: Sequence[Step]
    sequence: Array
    end_ns: Array
    took_ns: Array
    run_ns: int
    log: RequestLog | None = None

    @cached_property
    def decodes(self) -> Array:
        """Which steps decode (steps,)."""
        return np.array([step.phase == DECODE for step in self.steps], dtype=bool)

    @cached_property
    def tokens(self) -> Array:
        """The tokens of each step (steps,)."""
        return np.array([len(step.rows) for step in self.steps], dtype=np.int64)

    @cached_property
    def passed_ns(self) -> Array:
        """What each step added to the time that the run took until then (steps,); of all it is what they took."""
        added_ns: Array = np.diff(np.maximum.accumulate(self.end_ns), prepend=0)
        return added_ns

    @cached_property
    def requests(self) -> Requests:
        """The requests of the run and their output tokens."""
        return _requests(self) if self.log is None else _logged(self, self.log)

    @cached_property
    def gaps_ns(self) -> Array:
        """From the token before it to each decode token (decode tokens,), in order of step and place.

        -1 for a request's first token, which no prefill came before.
        """
        gaps_ns = np.full(int(self.tokens.sum()), -1, dtype=np.int64)
        requests = self.requests
        gaps_ns[requests.token_at] = np.where(requests.is_first, -1, requests.since_last_ns)
        decoded: Array = gaps_ns[np.repeat(self.decodes, self.tokens)]
        return decoded


@dataclass(frozen=True)
class Requests:
    """Output tokens, request by request and each request's in order, and what is known of each request.

    Of tokens (output tokens,): their request, their step, their place among all tokens of all steps, when they were
    there, and since when their request has had to wait for them. Of requests (requests,): when they came.
    """

    request: Array
    step: Array
    token_at: Array
    end_ns: Array
    arrival_ns: Array

    @cached_property
    def is_first(self) -> Array:
        """Which tokens are the first of their request (output tokens,)."""
        first: Array = np.diff(self.request, prepend=-1) != 0
        return first

    @cached_property
    def since_last_ns(self) -> Array:
        """How long after the token before it, or after its request came, each token was there (output tokens,)."""
        before_ns = np.concatenate([[0], self.end_ns[:-1]]) if len(self.end_ns) else self.end_ns
        waited_ns: Array = self.end_ns - np.where(self.is_first, self.arrival_ns[self.request], before_ns)
        return waited_ns


def speed(served: Served, first_step: int = 0) -> dict[str, Any]:
    """Returns rates and waits of a run from a step on, as plain data for JSON; percentiles are numpy's linear ones.

    `tokens_per_second`: decode tokens / time of the decode steps; `sustained_tokens_per_second`: decode tokens / all
    time. Of waits, `time_to_first_token_ms` is from a request's arrival to its first token, `inter_token_latency_ms`
    from any token of a request to its next, `time_per_output_token_ms` the mean of these in a request, for each
    request; `decode_step_ms` what the decode steps took, one sample a token. Each has its mean, p50, p95 and p99.
    """
    decodes, tokens = served.decodes[first_step:], served.tokens[first_step:]
    decoded = int(tokens[decodes].sum())
    warm_ns = int(served.end_ns[:first_step].max(initial=0))
    requests = served.requests
    after = requests.step >= first_step
    first, later = after & requests.is_first, after & ~requests.is_first
    gaps_ns = requests.since_last_ns[later]
    of_request, gaps = np.unique(requests.request[later], return_counts=True)
    gap_sums_ns = np.bincount(requests.request[later], weights=gaps_ns)[of_request]
    return {
        "tokens_per_second": _rate(decoded, int(served.passed_ns[first_step:][decodes].sum())),
        "sustained_tokens_per_second": _rate(decoded, served.run_ns - warm_ns),
        "time_to_first_token_ms": spread_ms(requests.since_last_ns[first]),
        "inter_token_latency_ms": spread_ms(gaps_ns),
        "time_per_output_token_ms": spread_ms(gap_sums_ns / gaps),
        "decode_step_ms": spread_ms(np.repeat(served.took_ns[first_step:][decodes], tokens[decodes])),
    }


def speed_metrics(served: Served, warmup_steps: int = 0) -> dict[str, Any]:
    """Returns what a run says of its speed: `speed` behind the warmup, and under `cold` that of the whole run.

    `cold` is None without a warmup; `decode_tokens` and `prefill_tokens` are those of the whole run, `warmup` has the
    steps and decode tokens that are left out of the rest, and the ms that they took.
    """
    warm = slice(warmup_steps)
    return {
        "decode_tokens": int(served.tokens[served.decodes].sum()),
        "prefill_tokens": int(served.tokens[~served.decodes].sum()),
        **speed(served, warmup_steps),
        "warmup": {
            "steps": warmup_steps,
            "decode_tokens": int(served.tokens[warm][served.decodes[warm]].sum()),
            "ms": int(served.end_ns[warm].max(initial=0)) / 1e6,
        },
        "cold": speed(served) if warmup_steps else None,
    }


def decode_times_ns(served: Served) -> Array:
    """Returns what the step of each decode token took (decode tokens,)."""
    times_ns: Array = np.repeat(served.took_ns[served.decodes], served.tokens[served.decodes])
    return times_ns


def spread_ms(ns: Array) -> dict[str, float | None]:
    """Returns the mean and PERCENTILES of durations in ms; None of none."""
    names = [f"p{percent}" for percent in PERCENTILES]
    if not len(ns):
        return dict.fromkeys(["mean", *names])
    found = np.percentile(ns / 1e6, PERCENTILES).tolist()
    return {"mean": float(ns.sum()) / len(ns) / 1e6, **dict(zip(names, found, strict=True))}


def _rate(tokens: int, ns: int) -> float | None:
    return tokens * 1e9 / ns if ns else None


def _logged(served: Served, log: RequestLog) -> Requests:
    """Returns the requests that were recorded under load; a token's place is that of its request's last row."""
    number, token_ns = log.token_times()
    step, row = log.token_places()
    first_row = np.cumsum(served.tokens) - served.tokens
    token_at = first_row[step] + row
    requests = log.requests
    request = np.searchsorted(requests["number"], number)
    return Requests(request, step, token_at, token_ns, requests["arrival_ns"])


def _requests(served: Served) -> Requests:
    """Find the requests of a run: what runs is put in order of sequence, within one in order of time."""
    step = np.repeat(np.arange(len(served.steps)), served.tokens)
    rows = [step.rows for step in served.steps]
    sequence = served.sequence[np.concatenate(rows)] if rows else np.empty(0, dtype=np.int64)
    order = np.argsort(sequence, kind="stable")
    step, sequence, prompt = step[order], sequence[order], ~served.decodes[step[order]]
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = sequence[1:] != sequence[:-1]
    turns = begins.copy()
    turns[1:] |= prompt[1:] & ~prompt[:-1]
    request = np.cumsum(turns) - 1
    is_token = ~prompt
    # The last token of a prompt gives the first one of the answer.
    is_token[:-1] |= turns[1:] | ~prompt[1:]
    is_token[-1:] = True
    ends = np.append(turns[1:], True)[: len(turns)]
    end_ns = served.end_ns[step]
    arrival_ns = np.roll(end_ns[ends], 1)  # the first turn of a sequence arrives as is said below
    free_after = {name: after for step in served.steps for name, after in step.came}
    came_after = np.array([free_after.get(name, -1) for name in sequence[begins].tolist()], dtype=np.int64)
    arrival_ns[begins[turns]] = np.where(came_after >= 0, served.end_ns[came_after], 0)
    return Requests(request[is_token], step[is_token], order[is_token], end_ns[is_token], arrival_ns)
