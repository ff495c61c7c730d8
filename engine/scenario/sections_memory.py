"""The sections of where experts lie and how they come: memory, copy, tiers, miss, compression."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from ...errors import InputError
from ...units import BYTES
from ..decide.pools import SCOPES
from ..policies.copy_order import COPY_ORDERS, ByRank, CopyOrder, orders_by_rank
from ..policies.eviction import EVICTION
from ..policies.miss import MISS
from ..policies.prefetch_share import PREFETCH_SHARE
from ..policies.preload import PRELOAD
from .amounts import AMOUNT, parse_budget
from .section import LEAST_GB_PER_S, MOST_GB_PER_S, MOST_US, Bytes, GbPerS, Section, WrittenBytes, budget_text, one_of

#: What is pinned if whole layers are, as many as leave room for two.
WHOLE_LAYERS = "layers"

#: Where experts lie compressed: nowhere; in host memory, so that copies are shorter; in GPU memory too.
COMPRESSED = ("none", "host", "gpu")

#: From how many tokens of a step on misses are fetched, whoever computes them in smaller ones.
FETCH_FROM = r"^[1-9][0-9]{0,8}tokens(/expert)?$"

#: What decompresses: the compute stream, in the way of the kernels, or the GPU's side stream.
DECOMPRESS_LANES = ("compute", "side")


class MemorySection(Section):
    """The GPU memory that experts may use, and who leaves it first.

    With `total_bytes`, '24GiB' or a share of the GPU's memory, experts get what dense weights, embeddings, KV cache,
    workspace and predictor leave of it, step by step: all of that, or `gpu_budget` at most if it is given too.
    `prefetch_limit` keeps prefetched experts that nobody has used yet within `prefetch_share` of the budget (fixed), or
    within a share that starts there and follows the workload (adaptive). Without `caching`, what was brought for a
    visit leaves after it. `preload` is what lies there before the run: nothing, the most popular experts, or whole
    layers from the last one back; with `cpu_layers`, all but those of the first so many layers. Of what is preloaded
    the first `pinned`, written as `gpu_budget` is, stay for the whole run, and `eviction` has the rest; "layers" are
    all whole layers that leave room for two. What every memory of the machine keeps is added up before the run, and
    more than it holds is refused, unless `capacity` is "ignore".
    """

    gpu_budget: str = "25%"
    scope: Annotated[str, one_of(SCOPES)] = "global"
    eviction: Annotated[str, one_of(EVICTION)] = "lru"
    prefetch_limit: Annotated[str, one_of(("none", *PREFETCH_SHARE))] = "none"
    prefetch_share: float = Field(default=0.5, ge=0, le=1)
    caching: bool = True
    total_bytes: WrittenBytes | None = None
    workspace_bytes: WrittenBytes = "0B"
    capacity: Literal["check", "ignore"] = "check"
    preload: Annotated[str, one_of(PRELOAD)] = "none"
    cpu_layers: int | None = Field(default=None, ge=0)
    pinned: str = "0%"

    @model_validator(mode="before")
    @classmethod
    def _a_total_alone_is_for_all_experts(cls, given: Any) -> Any:
        """Let experts have all that a total leaves where no budget is given."""
        if isinstance(given, Mapping) and given.get("total_bytes") is not None and "gpu_budget" not in given:
            return {**given, "gpu_budget": "100%"}
        return given

    @model_validator(mode="after")
    def _preloaded_stays(self) -> MemorySection:
        if self.preload != "none" and not self.caching:
            raise InputError(f"preload = {self.preload!r} needs caching = true: else it leaves after its first use")
        if self.cpu_layers is not None and self.preload != "layers":
            raise InputError(f"cpu_layers = {self.cpu_layers} needs preload = 'layers' (given {self.preload!r})")
        return self

    @property
    def pins(self) -> bool:
        """Whether some experts stay for the whole run."""
        if self.pinned == WHOLE_LAYERS:
            return True
        match = AMOUNT.fullmatch(self.pinned)
        return match is not None and Fraction(match[1]) > 0

    @model_validator(mode="after")
    def _pinned_is_preloaded(self) -> MemorySection:
        if self.pinned != WHOLE_LAYERS and not AMOUNT.fullmatch(self.pinned):
            raise InputError(f"pinned = {self.pinned!r}: write it as '10%', '4GiB', '512experts' or '{WHOLE_LAYERS}'")
        if self.pinned == WHOLE_LAYERS and self.preload not in ("layers", "front"):
            raise InputError(f"pinned = {self.pinned!r} needs preload = 'layers' or 'front' (given {self.preload!r})")
        if self.pins and (self.preload == "none" or self.scope != "global"):
            raise InputError(
                f"pinned = {self.pinned!r} needs a preload, whose first experts stay, and scope = 'global' (given "
                f"preload = {self.preload!r}, scope = {self.scope!r})"
            )
        return self

    @field_validator("gpu_budget", "pinned", mode="before")
    @classmethod
    def _has_a_unit(cls, budget: object) -> object:
        return budget_text(budget, "'25%', '4GiB' or '512experts'")

    @model_validator(mode="after")
    def _budget_reads(self) -> MemorySection:
        if not AMOUNT.fullmatch(self.gpu_budget):
            raise InputError(f"gpu_budget = {self.gpu_budget!r}: write it as '25%', '4GiB' or '512experts'")
        for key, value in (("total_bytes", self.total_bytes), ("workspace_bytes", self.workspace_bytes)):
            match = AMOUNT.fullmatch(value) if value is not None else None
            share = key == "total_bytes" and match is not None and match[2] == "%" and Fraction(match[1]) <= 100
            if value is not None and (match is None or match[2] not in BYTES) and not share:
                of_gpu = ", or a share of the GPU's memory, '95%'" if key == "total_bytes" else ""
                raise InputError(f"{key} = {value!r}: write it as '24GiB'{of_gpu}")
        return self

    def of_gpu(self, capacity_bytes: int) -> MemorySection:
        """Returns this section with the bytes of a total that is given as a share of what a GPU holds."""
        if self.total_bytes is None or not self.total_bytes.rstrip().endswith("%"):
            return self
        return self.model_copy(update={"total_bytes": f"{parse_budget(self.total_bytes, [capacity_bytes], 1)}B"})

    def budget_bytes(self, expert_bytes: Iterable[int], experts: int | Sequence[int]) -> int:
        """Returns the budget in bytes for a model with these bytes per expert (layers,) and experts per layer."""
        return parse_budget(self.gpu_budget, expert_bytes, experts, self.scope)


class CopySection(Section):
    """How copies share the link. `chunk_bytes` 0 copies an expert in one piece.

    `source` is where the experts lie: in host memory, or in that of another GPU, which does nothing else.
    """

    source: Literal["host", "peer"] = "host"
    discipline: Annotated[str, one_of(COPY_ORDERS)] = "fifo"
    chunk_bytes: Bytes = Field(default=0, ge=0)
    drop_stale: bool = False
    host_memory: Literal["pinned", "pageable"] | None = None
    contention: bool = True

    @model_validator(mode="after")
    def _peers_have_no_host_memory(self) -> CopySection:
        if self.source == "peer" and self.host_memory is not None:
            raise InputError(f"source = 'peer' copies from no host_memory (given {self.host_memory!r})")
        return self

    @model_validator(mode="after")
    def _stale_needs_queue(self) -> CopySection:
        if self.drop_stale and not self.by_rank:
            needed = " or ".join(map(repr, orders_by_rank()))
            raise InputError(f"drop_stale = true needs discipline = {needed} (given {self.discipline!r})")
        return self

    @property
    def order(self) -> type[CopyOrder]:
        """The copy order."""
        return COPY_ORDERS[self.discipline]

    @property
    def by_rank(self) -> bool:
        """Whether the host keeps copies in a queue."""
        return issubclass(self.order, ByRank)


class TiersSection(Section):
    """What lies under the GPU's memory: host memory of `host_budget`, and below it a drive that holds every expert.

    With "all", host memory holds every expert and nothing is read. Else it is a cache, empty at first, from which
    `host_policy` says who goes; an expert that it lacks is read in requests of at most `chunk_bytes` (0: in one),
    which `io_lanes` serve, each one at a time (left out: as many as the profile was measured with). "inclusive", it
    keeps what is copied to the GPU; "exclusive", that leaves it, and what the GPU evicts is copied back. What is
    prefetched goes through host memory to the GPU, or as far as host memory (`prefetch` = "host").
    """

    host_budget: str = "all"
    host_policy: Annotated[str, one_of(EVICTION)] = "lru"
    inclusion: Literal["inclusive", "exclusive"] = "inclusive"
    io_lanes: int | None = Field(default=None, ge=1, le=1024)
    chunk_bytes: Bytes = Field(default=0, ge=0)
    prefetch: Literal["gpu", "host"] = "gpu"

    @field_validator("host_budget", mode="before")
    @classmethod
    def _has_a_unit(cls, budget: object) -> object:
        return budget_text(budget, "'all', '50%', '16GiB' or '512experts'")

    @model_validator(mode="after")
    def _budget_reads(self) -> TiersSection:
        if self.prefetch == "host" and self.host_budget == "all":
            raise InputError("prefetch = 'host': host memory has every expert; give a host_budget, or prefetch = 'gpu'")
        if self.inclusion == "exclusive" and self.host_budget == "all":
            raise InputError(
                "inclusion = 'exclusive': host memory has every expert; give a host_budget, or inclusion = 'inclusive'"
            )
        if self.host_budget != "all" and not AMOUNT.fullmatch(self.host_budget):
            raise InputError(f"host_budget = {self.host_budget!r}: write it as 'all', '50%', '16GiB' or '512experts'")
        return self


class MissSection(Section):
    """What becomes of an access whose expert is absent.

    `fetch` copies it; `cpu` computes it on the CPU, `cost` does whichever of the two the profile says is shorter and
    `balanced` whichever is done first by what the visit has given to each so far; `split` gives the link and the CPU
    their shares of the visit's, `split-if-twice` only where the CPU is twice the link. `cpu-then-upload` computes on
    the CPU and copies behind what `upload_after` visits missed, at most `upload_most` experts a step, if it saves more
    in `upload_horizon` steps than the copy takes, and while copies take at most `upload_share` of the CPU's time. An
    expert that more than
    `cpu_max_tokens` tokens chose is fetched, and so is every one in a step of `fetch_from` tokens or more: '32tokens',
    or '32tokens/expert', which is times experts over top-k. `low_precision` uses a copy of it at `low_ratio` of its
    bytes, if it has one: such copies, the most popular first, have `low_share` of the budget at most; with
    `fetch_behind` the expert itself is copied behind. `skip` leaves it out for tokens whose gate weight is under
    `threshold`, and fetches for the others; weights are the trace's, as its router gave them. The CPU's time is the
    profile's, for `cpu_threads` (not set: as many as were measured), or for a shape that was not measured an estimate.
    `cpu_gb_per_s`, what the CPU reads of host memory (STREAM), takes the place of both: experts reach a share of it,
    the runtime's. Of each token's experts the `deferred_experts` of least gate weight, if the CPU computes them, are
    added to the result of the next layer instead, unless another token has them among its others.
    """

    policy: Annotated[str, one_of(MISS)] = "fetch"
    deferred_experts: int = Field(default=0, ge=0)
    threshold: float = Field(default=0.05, ge=0)
    cpu_threads: int | None = Field(default=None, ge=1)
    cpu_max_tokens: int | None = Field(default=None, ge=0)
    fetch_from: str | None = Field(default=None, pattern=FETCH_FROM)
    cpu_gb_per_s: GbPerS | None = Field(default=None, ge=LEAST_GB_PER_S, le=MOST_GB_PER_S)
    low_ratio: float = Field(default=0.25, gt=0, lt=1)
    low_share: float = Field(default=0.5, gt=0, lt=1)
    fetch_behind: bool = True
    upload_after: int = Field(default=2, ge=1)
    upload_most: int = Field(default=4, ge=1)
    upload_share: float = Field(default=1.0, gt=0, le=1)
    upload_horizon: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _defers_what_the_cpu_computes(self) -> MissSection:
        if self.deferred_experts and not getattr(MISS[self.policy], "uses_cpu", False):
            using = [name for name, policy in MISS.items() if getattr(policy, "uses_cpu", False)]
            raise InputError(
                f"deferred_experts = {self.deferred_experts} with policy = {self.policy!r}: only what the CPU computes "
                f"is deferred: choose one of {', '.join(using)}"
            )
        return self

    def fetch_tokens(self, experts: int, top_k: int) -> int | None:
        """Returns from how many tokens of a step on misses are fetched, for a layer of so many experts; None: never."""
        if self.fetch_from is None:
            return None
        tokens, _, each = self.fetch_from.partition("tokens")
        return -(-int(tokens) * experts // top_k) if each else int(tokens)


class CompressionSection(Section):
    """Experts in fewer bytes: `ratio` of what they are, compressed in host memory or in GPU memory too.

    Compressed in host memory, a copy is decompressed once, behind its arrival; in GPU memory, at every use.
    Decompressing takes `decompress_us` (not set: the constant of the profile's kernel rule) and the expert's bytes at
    `decompress_gb_per_s`, on `lane`. `mixed` instead stores the experts of every layer in several precisions, by
    popularity: [share of the experts, ratio] pairs, the most popular first; they are used as they are.
    """

    where: Annotated[str, one_of(COMPRESSED)] = "none"
    ratio: float = Field(default=0.5, gt=0, le=1)
    decompress_gb_per_s: GbPerS | None = Field(default=None, ge=LEAST_GB_PER_S, le=MOST_GB_PER_S)
    decompress_us: float | None = Field(default=None, ge=0, le=MOST_US)
    lane: Annotated[str, one_of(DECOMPRESS_LANES)] = "side"
    mixed: list[list[float]] | None = None

    @field_validator("mixed", mode="before")
    @classmethod
    def _pairs(cls, mixed: object) -> object:
        if mixed is not None and not _are_pairs(mixed):
            raise InputError("must be [share of the experts, ratio of their bytes] pairs whose shares come to 1")
        return mixed

    @model_validator(mode="after")
    def _says_what_it_takes(self) -> CompressionSection:
        if self.where != "none" and self.decompress_gb_per_s is None:
            raise InputError(f"where = {self.where!r}: say what decompressing takes, decompress_gb_per_s")
        if self.where != "none" and self.mixed is not None:
            raise InputError(f"where = {self.where!r} and mixed: give one of the two")
        return self

    def copied_bytes(self, size_bytes: int) -> int:
        """Returns what a copy of an expert moves."""
        return size_bytes if self.where == "none" else shrunk(size_bytes, self.ratio)

    def kept_bytes(self, size_bytes: int) -> int:
        """Returns the room that an expert takes in GPU memory."""
        return size_bytes if self.where != "gpu" else shrunk(size_bytes, self.ratio)


def _are_pairs(mixed: object) -> bool:
    """Whether they are pairs of a share and a ratio, each over 0 and at most 1, whose shares come to 1."""
    if not isinstance(mixed, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in mixed):
        return False
    numbers = [number for pair in mixed for number in pair]
    within = all(type(number) in (int, float) and 0 < number <= 1 for number in numbers)
    return within and abs(sum(numbers[::2]) - 1) < 1e-9


def shrunk(size_bytes: int, ratio: float) -> int:
    """Returns so many times the bytes, rounded up to a whole one."""
    return -int(-size_bytes * Fraction(str(ratio)) // 1)
