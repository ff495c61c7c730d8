"""The section of requests under load: who arrives, how a step is made of them, KV blocks, drafts, what is promised."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ...errors import InputError
from ...workloads.requests.arrivals import ARRIVALS, CLOSED, TRACE
from ...workloads.requests.lengths import LENGTHS, MOST_TOKENS, Lengths
from ...workloads.requests.traces import AUTO, TRACES
from ..policies.router import ROUTERS
from ..policies.scheduler import SCHEDULERS
from .section import MOST_US, Section, one_of

#: More requests than anybody waits for.
MOST_REQUESTS = 10_000_000
#: Each is run by itself, with all that it keeps.
MOST_REPLICAS = 64
#: Requests a second: one in eleven days, and more than any machine serves.
LEAST_RATE, MOST_RATE = 1e-6, 1e6
#: How a window's edges are written.
_EDGE = re.compile(r"\s*(\d{1,9}(?:\.\d{1,6})?)\s*(%|requests)\s*")
#: How a KV budget is written, beside bytes.
_BLOCKS = re.compile(r"\s*(\d{1,12})\s*blocks\s*")


class LengthSection(Section):
    """Lengths in tokens: a distribution around `mean`, with the coefficient of variation `cv`, cut to least..most."""

    mean: float = Field(gt=0, le=MOST_TOKENS)
    distribution: Annotated[str, one_of(LENGTHS)] = "fixed"
    cv: float = Field(default=1.0, ge=0, le=100)
    least: int = Field(default=1, ge=1, le=MOST_TOKENS)
    most: int = Field(default=MOST_TOKENS, ge=1, le=MOST_TOKENS)

    @model_validator(mode="after")
    def _can_be(self) -> LengthSection:
        self.lengths()
        return self

    def lengths(self) -> Lengths:
        """Returns what the lengths are drawn by. Raises InputError for what cannot be."""
        return Lengths(self.mean, self.distribution, self.cv, self.least, self.most)


#: So many tokens, or a distribution.
TokenCount = Annotated[int, Field(ge=1, le=MOST_TOKENS)] | LengthSection


class SchedulerSection(Section):
    """Who makes the steps of requests, and how much a step may hold (vLLM's words).

    `max_num_seqs` requests run at once, and a step computes `max_num_batched_tokens` positions at most, of one prompt
    `long_prefill_token_threshold` (0: all). "expert-aware" looks at the first `window` that wait, passes over one
    `patience` times at most, and admits nobody while copies kept the link busy for more than `most_link_busy` of the
    last step. Making a step takes the host `step_us`.
    """

    name: Annotated[str, one_of(SCHEDULERS)] = "chunked"
    max_num_seqs: int = Field(default=256, ge=1, le=1 << 20)
    max_num_batched_tokens: int = Field(default=2048, ge=1, le=MOST_TOKENS)
    long_prefill_token_threshold: int = Field(default=0, ge=0, le=MOST_TOKENS)
    window: int = Field(default=16, ge=1)
    patience: int = Field(default=16, ge=0)
    most_link_busy: float = Field(default=1.0, ge=0, le=1)
    step_us: float = Field(default=0.0, ge=0, le=MOST_US)


class KvSection(Section):
    """The KV cache in blocks of `block_tokens` positions: how many, and what becomes of them.

    `budget` is written as "8GiB", "2000blocks", or a share ("20%") of what dense weights, embeddings, workspace and
    predictor leave of `memory.total_bytes` or, without a total, of the GPU's memory. With `boundary` = "moving", which
    needs a total, experts also have what of it no block holds. Whoever has to leave the GPU is computed again, or
    swapped to host memory, as long as `swap_budget` has room. With `prefix_caching`, blocks whose content is known are
    shared.
    """

    block_tokens: int = Field(default=16, ge=1, le=1 << 16)
    budget: str = "20%"
    boundary: Literal["fixed", "moving"] = "fixed"
    prefix_caching: bool = False
    swap_budget: str = "0B"


class SpeculationSection(Section):
    """Drafts that a step verifies, and how many of them are right.

    `acceptance` is the probability that a draft is right if those before it are: a number, one for each place, or the
    path of a JSON list of how many were right in steps that were seen. What is wrong goes to the experts of the true
    token's with probability `overlap`, and else to those of another token of its sequence. Drafting takes `draft_us`
    a step, on the host's time. What makes drafts keeps `drafter_bytes` of GPU memory: "2GiB" for a model of its own, or
    "layer" for a draft head that is one more layer of this model, experts and all (as DeepSeek's MTP module). With
    `draft_layers` each draft is made by such a layer behind the model's own, over all rows of a step and on the compute
    stream, the head once more for each; its experts are kept in `memory` and copied as those of any other layer.
    """

    drafts: int = Field(default=1, ge=1, le=64)
    acceptance: float | list[float] | str = 0.7
    overlap: float = Field(default=0.0, ge=0, le=1)
    draft_us: float = Field(default=0.0, ge=0, le=MOST_US)
    drafter_bytes: str = "0B"
    draft_layers: bool = False

    @model_validator(mode="after")
    def _is_there_once(self) -> SpeculationSection:
        if self.draft_layers and self.drafter_bytes != "0B":
            raise InputError(
                f"drafter_bytes = {self.drafter_bytes!r}: with draft_layers, what makes drafts is part of the model: "
                "leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _is_a_share(self) -> SpeculationSection:
        given = [self.acceptance] if isinstance(self.acceptance, float) else self.acceptance
        if isinstance(given, list):
            if not isinstance(self.acceptance, float) and len(given) != self.drafts:
                raise InputError(f"acceptance = {given}: give one number, or {self.drafts}, one for each draft")
            if not all(0 <= share <= 1 for share in given):
                raise InputError(f"acceptance = {self.acceptance}: must be 0 to 1")
        return self


class SloSection(Section):
    """What is promised to a request, in ms, and to how many of them.

    Its first token by `ttft_ms` after its arrival, no gap between two tokens above `itl_ms`, their mean by `tpot_ms`,
    its last token by `e2e_ms`. `share` of the requests are to have all that is set.
    """

    ttft_ms: float | None = Field(default=None, gt=0)
    itl_ms: float | None = Field(default=None, gt=0)
    tpot_ms: float | None = Field(default=None, gt=0)
    e2e_ms: float | None = Field(default=None, gt=0)
    share: float = Field(default=0.99, gt=0, le=1)


class CostSection(Section):
    """What the machine draws and costs, from which energy and money for a million output tokens are counted.

    `watts` are drawn while the compute stream is busy, and `idle_watts` (not set: as many) in the rest of the run,
    where it waits for copies or has nothing to serve. `price_per_hour` is in any currency.
    """

    watts: float | None = Field(default=None, gt=0, le=1e9)
    idle_watts: float | None = Field(default=None, ge=0, le=1e9)
    price_per_hour: float | None = Field(default=None, ge=0, le=1e9)

    @model_validator(mode="after")
    def _idle_beside_busy(self) -> CostSection:
        if self.idle_watts is not None and self.watts is None:
            raise InputError("idle_watts: give watts, too, what the machine draws while it computes")
        return self


class RequestsSection(Section):
    """Requests under load, in place of a fixed batch: when they arrive and how long they are.

    Arrivals are by `rate`, in requests a second (with "gamma" of a coefficient of variation `cv`, with "bursts" all in
    `on_s` of every `on_s` + `off_s` seconds), of `users` who think for `think_s` in the mean between an answer and the
    next request (closed), or at the times of `trace`, which also gives the lengths. A trace is of Azure, BurstGPT,
    Mooncake or a benchmark; `rate` then takes the place of its times unless `arrivals` = "trace". `count` requests are
    served (not set: 100, or all of the trace), with 512 and 128 tokens where nothing else is said. The first and the
    last of them, as `warmup` and `cooldown` say ("10%" or "50requests"), are left out of all latencies, and their time
    of the rates. Of several `replicas`, each of them this machine with a scheduler of its own, `router` chooses one for
    each request when it arrives.
    """

    arrivals: Annotated[str, one_of([*ARRIVALS, CLOSED, TRACE])] = "poisson"
    rate: float = Field(default=1.0, ge=LEAST_RATE, le=MOST_RATE)
    cv: float = Field(default=1.0, ge=1e-3, le=100)
    on_s: float = Field(default=1.0, ge=1e-6, le=1e6)
    off_s: float = Field(default=1.0, ge=0, le=1e6)
    users: int = Field(default=8, ge=1, le=MOST_REQUESTS)
    think_s: float = Field(default=0.0, ge=0, le=1e6)
    count: int | None = Field(default=None, ge=1, le=MOST_REQUESTS)
    trace: str | None = None
    format: Annotated[str, one_of([AUTO, *TRACES])] = AUTO
    prompt_tokens: TokenCount | None = None
    output_tokens: TokenCount | None = None
    warmup: str = "10%"
    cooldown: str = "10%"
    replicas: int = Field(default=1, ge=1, le=MOST_REPLICAS)
    router: Annotated[str, one_of(ROUTERS)] = "round-robin"
    scheduler: SchedulerSection = SchedulerSection()
    kv: KvSection = KvSection()
    speculation: SpeculationSection | None = None
    slo: SloSection | None = None
    cost: CostSection | None = None

    @field_validator("warmup", "cooldown", mode="before")
    @classmethod
    def _edge_reads(cls, value: object) -> object:
        if isinstance(value, str | int | float):
            edge_requests(value, 100)
        return value

    @model_validator(mode="after")
    def _a_trace_has_times(self) -> RequestsSection:
        if self.arrivals == TRACE and self.trace is None:
            raise InputError("arrivals = 'trace': give trace, a file of requests")
        lengths = {"prompt_tokens": self.prompt_tokens, "output_tokens": self.output_tokens}
        given = [name for name, value in lengths.items() if value is not None]
        if self.trace is not None and given:
            raise InputError(f"{', '.join(given)}: no meaning with trace, which says it: leave out")
        return self

    @property
    def draft_layers(self) -> int:
        """How many draft layers run behind the model's own: one for each draft, or none."""
        return self.speculation.drafts if self.speculation is not None and self.speculation.draft_layers else 0

    @model_validator(mode="after")
    def _users_have_one_machine(self) -> RequestsSection:
        if self.replicas > 1 and self.arrivals == CLOSED:
            raise InputError(
                f"replicas = {self.replicas}: with arrivals = 'closed', whose users wait for one machine, must be 1: "
                "give a replica's share of the users, or arrivals by a rate"
            )
        return self


def edge_requests(text: object, count: int) -> int:
    """Returns how many of `count` requests an edge of the window leaves out; InputError for what is none."""
    match = _EDGE.fullmatch(text) if isinstance(text, str) else None
    if match is None or (match[2] == "requests" and "." in match[1]) or float(match[1]) > 10**8:
        raise InputError(f"{text!r}: write it as '10%' or '50requests'")
    if match[2] == "%" and float(match[1]) >= 100:
        raise InputError(f"{text!r}: must be less than 100%")
    return int(match[1]) if match[2] == "requests" else int(count * float(match[1]) / 100)


def blocks_of(text: str) -> int | None:
    """Returns how many blocks '2000blocks' are; None for a budget that is written otherwise."""
    match = _BLOCKS.fullmatch(text)
    return None if match is None else int(match[1])
