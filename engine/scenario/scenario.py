"""The scenario: everything that names a run, as TOML, checked as a whole before anything runs.

Sections and keys are those of the models below; a key left out has its default, an unknown key is an error that
names the nearest known one. Any key can be set from outside with `section.key=value`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from ...bounded import parse_toml, read
from ...errors import InputError
from ...plain import beyond_64_bits
from ...resources.parts.section import lay_machine, of_parts
from ...units import BYTES, NUMBER, gb_per_s, whole_bytes, written_bytes
from ...words import problems, unknown_name
from ...workloads.batches import PREFILL_MODES, parse_warmup
from ...workloads.guesses import MOST_HORIZONS
from ...workloads.importers import shipped_traces
from ...workloads.learned import shipped_weights
from ...workloads.model import MOST_BYTES
from ...workloads.predictors import PREDICTORS
from ..decide.dispatch import ISSUE
from ..decide.memory_manager import PROTECTION, SCOPES
from ..placed import REMOTE
from ..policies.copy_order import COPY_ORDERS, ByRank, CopyOrder, orders_by_rank
from ..policies.eviction import EVICTION
from ..policies.miss import MISS
from ..policies.placement import OBJECTIVES, PLACEMENT
from ..policies.prefetch import PREFETCH
from ..policies.prefetch_share import PREFETCH_SHARE
from ..policies.preload import PRELOAD
from ..policies.split import SPLITS
from .rows import find_row

#: How kernels reach the GPU, and what that costs the host: one launch a kernel, one a CUDA graph, or nothing.
DISPATCH_MODES = ("eager", "graph", "free")
#: In which order a visit's experts are launched.
EXPERT_ORDERS = ("router", "resident_first")
#: One kernel for each expert, or one for all of a wave, which waits for all their bytes.
EXPERT_KERNELS = ("separate", "grouped")
#: Which lane a prediction occupies: a side stream of the GPU, the compute stream, the host thread, or none.
PREDICTOR_LANES = ("gpu", "compute", "host", "free")
#: Those on which a prediction is in the GPU's memory when it is done.
ON_GPU = ("gpu", "compute")
#: Who enqueues the copies of a prefetch: the host, which must know the guesses first, or the GPU that made them.
ISSUERS = ("host", "gpu")
#: One host thread that serves all stages, step by step, or one for each GPU.
DISPATCH_THREADS = ("per-gpu", "one")
#: Where experts lie compressed: nowhere; in host memory, so that copies are shorter; in GPU memory too.
COMPRESSED = ("none", "host", "gpu")
#: What decompresses: the compute stream, in the way of the kernels, or the GPU's side stream.
DECOMPRESS_LANES = ("compute", "side")
#: More GPUs than one machine has, stages of them, or parts of a batch between them.
MOST_GPUS = 1024
#: Bounds of what a scenario may say that something takes: nothing that is guessed or moved takes longer than 1,000 s
#: or is slower than 1 kB/s, and nothing is faster than 10^9 GB/s.
MOST_US, LEAST_GB_PER_S, MOST_GB_PER_S = 1e9, 1e-6, 1e9
#: Keys of [workload.synthetic] that a fit takes the place of.
_FIT_REPLACES = ("skew", "working_set", "reuse")

#: How many of a scenario's faults are told.
_MOST_PROBLEMS = 20
_AMOUNT = re.compile(rf"\s*({NUMBER})\s*(%|experts|{'|'.join(BYTES)})\s*")

#: A number of bytes, or one with a unit; kept as a number.
_Bytes = Annotated[int, BeforeValidator(whole_bytes)]
#: The same, kept as it was written.
_Written = Annotated[str, BeforeValidator(written_bytes)]
_GbPerS = Annotated[float, BeforeValidator(gb_per_s)]


class ScenarioError(InputError):
    """A scenario that cannot run; the message names the file, the key, the value and what would be right."""


def _one_of(names: Collection[str]) -> AfterValidator:
    """Return a check that admits the members of a table only, also one added later, and says who they are."""

    def check(value: str) -> str:
        if value not in names:
            raise InputError(unknown_name("value", value, names).removeprefix("value = "))
        return value

    return AfterValidator(check)


def _budget(value: object, how: str) -> object:
    """Return a budget that is a text; a number by itself could be of bytes, of experts or a share."""
    if not isinstance(value, str):
        raise InputError(f"must be a valid string with its unit: write it as {how}")
    return value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class ModelSection(_Section):
    """Which model, and what to change in it; with sizes = "trace", layers are as large as the trace says.

    `preset` is a shipped name, a TOML file, a Hugging Face config.json or its folder, or a GGUF file. `dtype` is of the
    routed experts, `bits_per_weight` of all matrices, where nothing else is known.
    """

    preset: str = "mixtral-8x7b"
    layers: int | None = Field(default=None, ge=1)
    experts: int | None = Field(default=None, ge=1)
    top_k: int | None = Field(default=None, ge=1)
    dtype: str | None = None
    bits_per_weight: float | None = Field(default=None, gt=0, le=64)
    expert_bytes: _Bytes | None = Field(default=None, ge=1)
    sizes: Literal["preset", "trace"] = "preset"

    def overrides(self) -> dict[str, Any]:
        """Return what is set besides the preset."""
        return self.model_dump(exclude={"preset", "sizes"}, exclude_none=True)


class MachineSection(_Section):
    """Which machine: a shipped profile's name or a JSON file's path; or its parts, which become such a name.

    Parts are a `gpu` of the table, `gpus` of them, and where it is known the `link` to each, the `cpu`, the `ram` and
    the `drive`: 'pcie4 x16', '7950x', '64GB DDR5-5600', '2TB 7GB/s'. What is left out is what goes with the rest.
    """

    profile: str = "h200-pcie5"
    gpu: str | None = Field(default=None, exclude=True)
    gpus: int | None = Field(default=None, exclude=True, ge=1)
    link: str | None = Field(default=None, exclude=True)
    cpu: str | None = Field(default=None, exclude=True)
    ram: str | None = Field(default=None, exclude=True)
    drive: str | None = Field(default=None, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _parts_are_a_profile(cls, given: Any) -> Any:
        return of_parts(given) if isinstance(given, Mapping) else given


class SyntheticSection(_Section):
    """A trace drawn by the synthetic generator, in the shape of the model, or by what was fitted to a real one.

    `fit` is a file that `prestage trace fit` wrote; it takes the place of skew, working_set and reuse.
    """

    fit: str | None = None
    tokens: int = Field(default=500, ge=1)
    skew: float = Field(default=0.5, ge=0)
    working_set: int | None = Field(default=None, ge=1)
    reuse: float = Field(default=0.3, ge=0, le=1)
    sequences: int = Field(default=1, ge=1)
    prefill_tokens: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _fit_stands_alone(self) -> SyntheticSection:
        without_meaning = set(_FIT_REPLACES) & self.model_fields_set
        if self.fit is not None and without_meaning:
            raise InputError(f"{', '.join(sorted(without_meaning))}: no meaning with fit, which says it: leave out")
        return self


class WorkloadSection(_Section):
    """The routing trace and how its tokens are batched. Without a trace, one is drawn by `synthetic`.

    `warmup` is what speed and rates leave out at the beginning, while the memory fills: so many decode tokens, or steps
    of either phase ("20steps"). It changes nothing of what runs.
    """

    trace: str | None = None
    synthetic: SyntheticSection | None = None
    tokens: int | None = Field(default=None, ge=1)
    batch: int = Field(default=1, ge=1)
    prefill: Annotated[str, _one_of(PREFILL_MODES)] = "whole"
    chunk_tokens: int = Field(default=512, ge=1)
    warmup: str = "0tokens"

    @field_validator("warmup", mode="before")
    @classmethod
    def _warmup_reads(cls, value: object) -> object:
        if isinstance(value, str | int | float):  # a number, without its unit, is told how to write it too
            parse_warmup(value)
        return value

    @model_validator(mode="after")
    def _one_source(self) -> WorkloadSection:
        if (self.trace is None) == (self.synthetic is None):
            raise InputError("give trace (a file) or [workload.synthetic]: one of the two")
        return self


class MemorySection(_Section):
    """The GPU memory that experts may use, and who leaves it first.

    With `total_bytes`, experts get what dense weights, embeddings, KV cache, workspace and predictor leave of it, step
    by step: all of that, or `gpu_budget` at most if it is given too. `prefetch_limit` keeps prefetched experts that
    nobody has used yet within `prefetch_share` of the budget (fixed), or within a share that starts there and follows
    the workload (adaptive). Without `caching`, what was brought for a visit leaves after it. `preload` is what lies
    there before the run: nothing, the most popular experts, or whole layers from the last one back; with `cpu_layers`,
    all but those of the first so many layers. What every memory of the machine keeps is added up before the run, and
    more than it holds is refused, unless `capacity` is "ignore".
    """

    gpu_budget: str = "25%"
    scope: Annotated[str, _one_of(SCOPES)] = "global"
    eviction: Annotated[str, _one_of(EVICTION)] = "lru"
    prefetch_limit: Annotated[str, _one_of(("none", *PREFETCH_SHARE))] = "none"
    prefetch_share: float = Field(default=0.5, ge=0, le=1)
    caching: bool = True
    total_bytes: _Written | None = None
    workspace_bytes: _Written = "0B"
    capacity: Literal["check", "ignore"] = "check"
    preload: Annotated[str, _one_of(PRELOAD)] = "none"
    cpu_layers: int | None = Field(default=None, ge=0)

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

    @field_validator("gpu_budget", mode="before")
    @classmethod
    def _has_a_unit(cls, budget: object) -> object:
        return _budget(budget, "'25%', '4GiB' or '512experts'")

    @model_validator(mode="after")
    def _budget_reads(self) -> MemorySection:
        if not _AMOUNT.fullmatch(self.gpu_budget):
            raise InputError(f"gpu_budget = {self.gpu_budget!r}: write it as '25%', '4GiB' or '512experts'")
        for key, value in (("total_bytes", self.total_bytes), ("workspace_bytes", self.workspace_bytes)):
            match = _AMOUNT.fullmatch(value) if value is not None else None
            if value is not None and (match is None or match[2] not in BYTES):
                raise InputError(f"{key} = {value!r}: write it as '24GiB'")
        return self

    def budget_bytes(self, expert_bytes: Iterable[int], experts: int) -> int:
        """Return the budget in bytes for a model with these bytes per expert (layers,) and experts per layer."""
        return parse_budget(self.gpu_budget, expert_bytes, experts, self.scope)


class PredictorSection(_Section):
    """Who guesses the experts of coming layers, how well, and what a guess costs on which lane.

    `weights` are those of "learned": a folder, a file or a shipped name. Without `latency_us` a guess takes what was
    measured for the weights, and nothing for a predictor that has none.
    """

    name: Annotated[str, _one_of(PREDICTORS)] = "oracle"
    recall: float = Field(default=0.9, ge=0, le=1)
    context: int = Field(default=3, ge=1, le=MOST_HORIZONS)
    lane: Annotated[str, _one_of(PREDICTOR_LANES)] = "gpu"
    latency_us: float | None = Field(default=None, ge=0, le=MOST_US)
    weights: str | None = None

    @model_validator(mode="after")
    def _weights_are_of_learned(self) -> PredictorSection:
        if (self.weights is not None) != (self.name == "learned"):
            given = f"name = {self.name!r} and weights = {self.weights!r}"
            raise InputError(f"{given}: weights (a folder of `prestage predictor train`) go with name = 'learned'")
        return self


class PrefetchSection(_Section):
    """What is fetched ahead of demand.

    What is predicted on the GPU is read back to the host, which waits for it before it enqueues the copies; or, with
    `issued_by` = "gpu", the GPU issues them itself behind the prediction, and they take the host no time.
    """

    policy: Annotated[str, _one_of(PREFETCH)] = "top-k"
    k: int | None = Field(default=None, ge=1)
    lookahead: int = Field(default=1, ge=0, le=MOST_HORIZONS)
    threshold: float = Field(default=0.5, ge=0, le=1)
    decay: float = Field(default=0.7, gt=0, le=1)
    protect: Annotated[str, _one_of(PROTECTION)] = "until_target"
    issue: Annotated[str, _one_of(ISSUE)] = "after_launch"
    issued_by: Annotated[str, _one_of(ISSUERS)] = "host"


class DispatchSection(_Section):
    """How the host thread drives the GPU.

    With `mode` = "graph" each group of kernels is a CUDA graph. Graphs are made for batches: a decode step runs at the
    next power of two of its tokens, a prompt over the tokens that it has.
    """

    mode: Annotated[str, _one_of(DISPATCH_MODES)] = "eager"
    router_readback: bool = True
    expert_order: Annotated[str, _one_of(EXPERT_ORDERS)] = "router"
    expert_kernel: Annotated[str, _one_of(EXPERT_KERNELS)] = "separate"
    launch_queue_depth: int = Field(default=1000, ge=1)


class CopySection(_Section):
    """How copies share the link. `chunk_bytes` 0 copies an expert in one piece.

    `source` is where the experts lie: in host memory, or in that of another GPU, which does nothing else.
    """

    source: Literal["host", "peer"] = "host"
    discipline: Annotated[str, _one_of(COPY_ORDERS)] = "fifo"
    chunk_bytes: _Bytes = Field(default=0, ge=0)
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


class ParallelSection(_Section):
    """How a run is spread over several GPUs: stages of a pipeline, each on a GPU with what [memory] gives to one.

    `split` divides the layers: as many to each stage (equal), so that kernels (compute) or experts (memory) weigh the
    same, by simulating the first steps (searched), or by a list of counts. `micro_batches` are parts of the batch that
    are in different stages at once. Dispatch threads: one for each GPU, or one that serves all of them, in order.

    Or `gpus` that share the experts of every layer, by a `placement` (one of PLACEMENT), each with what [memory] gives
    to one; in percent, of the experts that it owns. `replicas`, `replica_bytes` a GPU and `objective` are as of
    `placement.Request`. `remote` says how a choice of another GPU's expert is served (one of REMOTE). In `spare_bytes`
    each GPU keeps what others evict.
    """

    stages: int = Field(default=1, ge=1, le=MOST_GPUS)
    split: str | list[int] = "equal"
    micro_batches: int = Field(default=1, ge=1, le=MOST_GPUS)
    dispatch_threads: Annotated[str, _one_of(DISPATCH_THREADS)] = "per-gpu"
    gpus: int = Field(default=1, ge=1, le=MOST_GPUS)
    placement: Annotated[str, _one_of(PLACEMENT)] = "round-robin"
    replicas: int = Field(default=2, ge=1, le=MOST_GPUS)
    replica_bytes: _Written = "0B"
    objective: Annotated[str, _one_of(OBJECTIVES)] = "load"
    remote: Annotated[str, _one_of(REMOTE)] = "tokens"
    spare_bytes: _Written = "0B"

    @property
    def lends(self) -> bool:
        """Whether GPUs copy experts from one another."""
        return self.remote in ("peer", "cost") or parse_bytes(self.spare_bytes) > 0

    @field_validator("split", mode="before")
    @classmethod
    def _split_reads(cls, value: object) -> object:
        counts = isinstance(value, list) and all(type(count) is int and count > 0 for count in value)
        if not (isinstance(value, str) and value in SPLITS) and not counts:
            raise InputError(f"choose one of {', '.join(SPLITS)}, or give the layers of each stage, such as [16, 16]")
        return value

    @field_validator("replica_bytes", "spare_bytes")
    @classmethod
    def _bytes_read(cls, value: str) -> str:
        parse_bytes(value)
        return value

    @model_validator(mode="after")
    def _one_way_to_use_gpus(self) -> ParallelSection:
        if self.gpus > 1 and max(self.stages, self.micro_batches) > 1:
            raise InputError(
                f"gpus = {self.gpus} with stages = {self.stages}, micro_batches = {self.micro_batches}: share the "
                f"experts of all layers, or divide the layers: one of the two"
            )
        if self.remote != "tokens" and parse_bytes(self.spare_bytes):
            raise InputError(f"spare_bytes = {self.spare_bytes!r}: needs remote = 'tokens' (given {self.remote!r})")
        return self

    @model_validator(mode="after")
    def _split_is_of_stages(self) -> ParallelSection:
        if isinstance(self.split, list) and len(self.split) != self.stages:
            raise InputError(f"split = {self.split}: give one number for each of the {self.stages} stages")
        return self


class TiersSection(_Section):
    """What lies under the GPU's memory: host memory of `host_budget`, and below it a drive that holds every expert.

    With "all", host memory holds every expert and nothing is read. Else it is a cache, empty at first, from which
    `host_policy` says who goes; an expert that it lacks is read in requests of at most `chunk_bytes` (0: in one),
    which `io_lanes` serve, each one at a time (left out: as many as the profile was measured with). What is
    prefetched goes through host memory to the GPU, or as far as host memory (`prefetch` = "host").
    """

    host_budget: str = "all"
    host_policy: Annotated[str, _one_of(EVICTION)] = "lru"
    io_lanes: int | None = Field(default=None, ge=1, le=1024)
    chunk_bytes: _Bytes = Field(default=0, ge=0)
    prefetch: Literal["gpu", "host"] = "gpu"

    @field_validator("host_budget", mode="before")
    @classmethod
    def _has_a_unit(cls, budget: object) -> object:
        return _budget(budget, "'all', '50%', '16GiB' or '512experts'")

    @model_validator(mode="after")
    def _budget_reads(self) -> TiersSection:
        if self.prefetch == "host" and self.host_budget == "all":
            raise InputError("prefetch = 'host': host memory has every expert; give a host_budget, or prefetch = 'gpu'")
        if self.host_budget != "all" and not _AMOUNT.fullmatch(self.host_budget):
            raise InputError(f"host_budget = {self.host_budget!r}: write it as 'all', '50%', '16GiB' or '512experts'")
        return self


class MissSection(_Section):
    """What becomes of an access whose expert is absent.

    `fetch` copies it; `cpu` computes it on the CPU, `cost` does whichever of the two the profile says is shorter and
    `balanced` whichever is done first by what the visit has given to each so far; an expert that more than
    `cpu_max_tokens` tokens chose is fetched. `low_precision` uses a copy of it at `low_ratio` of its bytes, if it has
    one: such copies, the most popular first, have `low_share` of the budget at most; with `fetch_behind` the expert
    itself is copied behind. `skip` leaves it out for tokens whose gate weight is under `threshold`, and fetches for the
    others; weights are the trace's, as its router gave them. The CPU's time is the profile's, for `cpu_threads` (not
    set: as many as were measured), or for a shape that was not measured an estimate; `cpu_gb_per_s`, what the CPU reads
    of host memory, takes the place of both.
    """

    policy: Annotated[str, _one_of(MISS)] = "fetch"
    threshold: float = Field(default=0.05, ge=0)
    cpu_threads: int | None = Field(default=None, ge=1)
    cpu_max_tokens: int | None = Field(default=None, ge=0)
    cpu_gb_per_s: _GbPerS | None = Field(default=None, ge=LEAST_GB_PER_S, le=MOST_GB_PER_S)
    low_ratio: float = Field(default=0.25, gt=0, lt=1)
    low_share: float = Field(default=0.5, gt=0, lt=1)
    fetch_behind: bool = True


class CompressionSection(_Section):
    """Experts in fewer bytes: `ratio` of what they are, compressed in host memory or in GPU memory too.

    Compressed in host memory, a copy is decompressed once, behind its arrival; in GPU memory, at every use.
    Decompressing takes `decompress_us` (not set: the constant of the profile's kernel rule) and the expert's bytes at
    `decompress_gb_per_s`, on `lane`. `mixed` instead stores the experts of every layer in several precisions, by
    popularity: [share of the experts, ratio] pairs, the most popular first; they are used as they are.
    """

    where: Annotated[str, _one_of(COMPRESSED)] = "none"
    ratio: float = Field(default=0.5, gt=0, le=1)
    decompress_gb_per_s: _GbPerS | None = Field(default=None, ge=LEAST_GB_PER_S, le=MOST_GB_PER_S)
    decompress_us: float | None = Field(default=None, ge=0, le=MOST_US)
    lane: Annotated[str, _one_of(DECOMPRESS_LANES)] = "side"
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
        """Return what a copy of an expert moves."""
        return size_bytes if self.where == "none" else shrunk(size_bytes, self.ratio)

    def kept_bytes(self, size_bytes: int) -> int:
        """Return the room that an expert takes in GPU memory."""
        return size_bytes if self.where != "gpu" else shrunk(size_bytes, self.ratio)


def _are_pairs(mixed: object) -> bool:
    """Whether they are pairs of a share and a ratio, each over 0 and at most 1, whose shares come to 1."""
    if not isinstance(mixed, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in mixed):
        return False
    numbers = [number for pair in mixed for number in pair]
    within = all(type(number) in (int, float) and 0 < number <= 1 for number in numbers)
    return within and abs(sum(numbers[::2]) - 1) < 1e-9


def shrunk(size_bytes: int, ratio: float) -> int:
    """Return so many times the bytes, rounded up to a whole one."""
    return -int(-size_bytes * Fraction(str(ratio)) // 1)


class Scenario(_Section):
    """One run, whole. `model_dump()` gives it back as plain data."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    model: ModelSection = ModelSection()
    machine: MachineSection = MachineSection()
    workload: WorkloadSection
    memory: MemorySection = MemorySection()
    predictor: PredictorSection = PredictorSection()
    prefetch: PrefetchSection = PrefetchSection()
    dispatch: DispatchSection = DispatchSection()
    copy_: CopySection = Field(default=CopySection(), alias="copy")
    parallel: ParallelSection = ParallelSection()
    tiers: TiersSection = TiersSection()
    miss: MissSection = MissSection()
    compression: CompressionSection = CompressionSection()

    @model_validator(mode="after")
    def _offloading_fits(self) -> Scenario:
        for wrong, text in _unfit(self):
            if wrong:
                raise InputError(text)
        return self

    @property
    def only_fetches(self) -> bool:
        """Whether all that happens to experts is that they are copied, as they are, when they are absent."""
        compression = self.compression
        return self.miss.policy == "fetch" and compression.where == "none" and compression.mixed is None

    @property
    def uses_cpu(self) -> bool:
        """Whether misses may be computed on the CPU."""
        return bool(getattr(MISS[self.miss.policy], "uses_cpu", False))

    @model_validator(mode="after")
    def _sharing_is_known(self) -> Scenario:
        """Refuse what GPUs that share the experts cannot do."""
        if self.parallel.gpus == 1:
            return self
        if self.memory.scope not in ("global", "per-layer"):
            raise InputError(f"memory.scope = {self.memory.scope!r}: with parallel.gpus, choose global or per-layer")
        if self.memory.total_bytes is not None:
            raise InputError("memory.total_bytes: with parallel.gpus, give memory.gpu_budget alone")
        if self.memory.preload != "none":
            raise InputError(f"memory.preload = {self.memory.preload!r}: with parallel.gpus, choose none")
        if not self.dispatch.router_readback:
            raise InputError(
                "dispatch.router_readback = false: with parallel.gpus, hosts meet at every choice: set true"
            )
        if parse_bytes(self.parallel.spare_bytes) and not self.memory.caching:
            raise InputError("memory.caching = false: with parallel.spare_bytes, evicted experts are kept: set true")
        if self.copy_.by_rank and self.parallel.lends:
            streams = " or ".join(name for name in COPY_ORDERS if name not in orders_by_rank())
            raise InputError(
                f"copy.discipline = {self.copy_.discipline!r}: where GPUs copy experts from one another, one may be "
                f"waiting for what another puts off: choose {streams}"
            )
        return self

    @model_validator(mode="after")
    def _dropping_knows_the_visit(self) -> Scenario:
        prefetch = self.prefetch
        if not self.memory.caching and (prefetch.protect, prefetch.issue) != ("until_target", "after_launch"):
            raise InputError("memory.caching = false: needs prefetch.protect = 'until_target', issue = 'after_launch'")
        return self

    @model_validator(mode="after")
    def _the_gpu_can_issue_copies(self) -> Scenario:
        if self.prefetch.issued_by != "gpu":
            return self
        copy, lane = self.copy_, self.predictor.lane
        for wrong, text in (
            (lane not in ON_GPU, f"predictor.lane = {lane!r}, where the host has the guesses: choose gpu or compute"),
            (copy.by_rank, f"copy.discipline = {copy.discipline!r}, a queue of the host's: choose another"),
            (copy.host_memory == "pageable", "copy.host_memory = 'pageable', which the host copies: choose pinned"),
            (self.tiers.host_budget != "all", "tiers.host_budget, for reads that the host orders: set it to 'all'"),
            (not self.only_fetches, "[miss] or [compression], whose work the host orders: leave them out"),
            (self.parallel.lends, "copies between GPUs, which the host orders: choose another parallel.remote"),
        ):
            if wrong:
                raise InputError(
                    f"prefetch.issued_by = 'gpu' does not go with {text}, or set prefetch.issued_by = 'host'"
                )
        return self

    @model_validator(mode="after")
    def _host_cache_serves_one_gpu(self) -> Scenario:
        parallel = self.parallel
        if self.tiers.host_budget != "all" and max(parallel.stages, parallel.micro_batches, parallel.gpus) > 1:
            raise InputError(
                f"tiers.host_budget = {self.tiers.host_budget!r}: host memory as a cache serves one GPU without "
                "micro-batches; give 'all', or parallel.stages, parallel.micro_batches and parallel.gpus = 1"
            )
        return self

    @model_validator(mode="after")
    def _a_peer_holds_all_experts_and_does_nothing_else(self) -> Scenario:
        if self.copy_.source == "peer" and max(self.parallel.stages, self.parallel.gpus) > 1:
            raise InputError(
                "copy.source = 'peer': a GPU that holds experts has no stage and no share of them: set parallel.stages "
                "and parallel.gpus = 1"
            )
        if self.copy_.source == "peer" and self.tiers.host_budget != "all":
            raise InputError("copy.source = 'peer': no expert lies in host memory: set tiers.host_budget = 'all'")
        if self.copy_.source == "peer" and not self.only_fetches:
            raise InputError("copy.source = 'peer': no expert lies in host memory: leave out [miss] and [compression]")
        return self

    @model_validator(mode="after")
    def _micro_batches_have_places(self) -> Scenario:
        if self.parallel.micro_batches > self.workload.batch:
            raise InputError(
                f"parallel.micro_batches = {self.parallel.micro_batches}: must be at most workload.batch = "
                f"{self.workload.batch}, whose places they divide"
            )
        return self

    def plain(self) -> dict[str, Any]:
        """Return the scenario as plain data, by the names that its TOML uses, all defaults filled in."""
        return self.model_dump(by_alias=True)


def _unfit(scenario: Scenario) -> Iterator[tuple[bool, str]]:
    """Yield (whether it is so, what to say) of what does not go together with misses that are not fetched."""
    memory, miss, compression = scenario.memory, scenario.miss, scenario.compression
    policy, packed, mixed = miss.policy, compression.where != "none", compression.mixed is not None
    low = policy == "low_precision"
    shared, grouped = memory.scope == "shared", scenario.dispatch.expert_kernel == "grouped"
    chosen = f"miss.policy = {policy!r}" if policy != "fetch" else "[compression]"
    beyond = not scenario.only_fetches
    yield shared and beyond, f"{chosen}: with memory.scope = 'shared', choose miss.policy = 'fetch' and no compression"
    yield shared and memory.preload != "none", "memory.scope = 'shared': needs memory.preload = 'none'"
    yield mixed and memory.scope != "global", f"compression.mixed: needs memory.scope = 'global' (not {memory.scope!r})"
    several = max(scenario.parallel.stages, scenario.parallel.micro_batches, scenario.parallel.gpus) > 1
    yield several and beyond, f"{chosen}: with [parallel], choose miss.policy = 'fetch' and no compression"
    tiered = scenario.tiers.host_budget != "all"
    yield tiered and beyond, f"{chosen}: with tiers.host_budget, choose miss.policy = 'fetch' and no compression"
    yield (
        several and memory.cpu_layers is not None,
        f"memory.cpu_layers = {memory.cpu_layers}: with [parallel], leave it out",
    )
    yield low and (mixed or packed), "miss.policy = 'low_precision': needs compression.where = 'none' and no mixed"
    one_by_one = "needs dispatch.expert_kernel = 'separate': what a group of such kernels takes is not known"
    yield grouped and low, f"miss.policy = 'low_precision': {one_by_one}"
    yield grouped and (mixed or packed), f"[compression]: {one_by_one}"
    yield (
        low and memory.total_bytes is not None,
        "miss.policy = 'low_precision': give memory.gpu_budget alone, no total",
    )
    yield (
        low and miss.fetch_behind and not memory.caching,
        "miss.fetch_behind = true: needs memory.caching = true, else what it fetches leaves before it is used",
    )


def parse_budget(text: str, expert_bytes: Iterable[int], experts: int, scope: str = "global") -> int:
    """Return the bytes of '25%' (of all experts), '4GiB' or '512experts' (of the largest); ScenarioError else.

    With the scope shared, all experts are those of one layer.
    """
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise ScenarioError(f"budget {text!r}: write it as '25%', '4GiB' or '512experts'")
    number, unit = match.groups()
    sizes = list(expert_bytes)[: 1 if scope == "shared" else None]
    whole, _, decimals = number.partition(".")
    value, scale = int(whole + decimals), int(10 ** len(decimals))
    factor: int = {"%": sum(sizes) * experts, "experts": max(sizes), **BYTES}[unit]
    budget_bytes = value * factor // (scale * (100 if unit == "%" else 1))
    if budget_bytes > MOST_BYTES:
        raise ScenarioError(f"budget {text!r}: more than any machine has: at most {MOST_BYTES} bytes")
    return budget_bytes


def parse_bytes(text: str) -> int:
    """Return the bytes of '24GiB'; ScenarioError else."""
    match = _AMOUNT.fullmatch(text)
    if match is None or match[2] not in BYTES:
        raise ScenarioError(f"{text!r}: write bytes as '24GiB'")
    return parse_budget(text, [1], 1)


def scenario_names() -> list[str]:
    """Return the names of the shipped scenarios."""
    folder = resources.files("prestage") / "engine" / "scenario" / "shipped"
    return sorted(entry.name[: -len(".toml")] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_scenario(name: str | Path | None = None, settings: Iterable[str] = ()) -> Scenario:
    """Return a scenario: a TOML file's, a shipped one's by name, the embedded default's, or a sweep's row's.

    A row is named by its journal and the beginning of its key, `results.jsonl#1f3a`.

    `settings` are `section.key=value` strings laid over it; a value is read as TOML, or as a bare string; without one
    (`section.key=`) the key is taken out, and has its default again. A trace, a fit or weights named in a file are
    looked for beside that file; named in a setting, in the current folder. Raises ScenarioError.
    """
    source = "scenario 'default'" if name is None else f"scenario {str(name)!r}"
    data = _read(name, source)
    for setting in settings:
        apply_setting(data, setting)
    return make_scenario(data, source)


def make_scenario(data: Mapping[str, Any], source: str = "scenario") -> Scenario:
    """Return the scenario that plain data describes; ScenarioError names `source` and every bad key."""
    too_large = beyond_64_bits(data)
    if too_large is not None:
        raise ScenarioError(f"{source}: {too_large}")
    try:
        return Scenario.model_validate(data)
    except ValidationError as error:
        raise ScenarioError(f"{source}: {problems(error, Scenario, data)}") from None


def _read(name: str | Path | None, source: str) -> dict[str, Any]:
    path = Path(name) if name is not None else None
    if path is not None and ".jsonl#" in path.name:
        file, _, key = str(path).rpartition("#")
        data: dict[str, Any] = find_row(file, key)["scenario"]
        return data
    if path is not None and (path.suffix == ".toml" or path.is_file()):
        try:
            text = read(path, ScenarioError).decode("utf-8")
        except OSError as error:
            raise ScenarioError(f"{source}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ScenarioError(f"{source}: not UTF-8 text") from None
        folder = path.parent
    else:
        shipped = "default" if name is None else str(name)
        if shipped not in scenario_names():
            raise ScenarioError(unknown_name("scenario", shipped, [*scenario_names(), "FILE.toml"]))
        text = (resources.files("prestage") / "engine" / "scenario" / "shipped" / f"{shipped}.toml").read_text("utf-8")
        folder = None
    data = parse_toml(text, source, ScenarioError)
    if folder is not None:
        workload = data.get("workload")
        _find_beside(folder, workload, "trace")
        _find_beside(folder, workload.get("synthetic") if isinstance(workload, dict) else None, "fit")
        _find_beside(folder, data.get("predictor"), "weights")
    return data


def _find_beside(folder: Path, section: Any, key: str) -> None:
    """Make a file that a section names relative to the folder of the scenario, unless it is one that ships."""
    named = section.get(key) if isinstance(section, dict) else None
    if isinstance(named, str) and named not in (*shipped_traces(), *shipped_weights()):
        section[key] = str(folder / named)


def apply_setting(data: dict[str, Any], setting: str) -> None:
    """Lay one `section.key=value` over plain data."""
    key, equals, text = setting.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise ScenarioError(f"--set {setting!r}: write it as section.key=value")
    lay(data, key.strip(), parse_value(text))


def parse_value(text: str) -> Any:
    """Return what a value means that is given outside a file: TOML, or else the bare string."""
    try:
        return parse_toml(f"value = {text.strip()}", "value")["value"]
    except InputError:
        return text.strip()


def lay(data: dict[str, Any], key: str, value: Any) -> None:
    """Lay a value over plain data under `section.key`. Raises ScenarioError.

    An empty value takes the key out, so that it has its default again; so does 'none', of a key that may be left out
    and has no default.
    """
    parts = key.split(".")
    field = _field(parts)
    if parts[0] == "machine" and isinstance(data.get("machine"), dict):
        lay_machine(data["machine"], parts[-1], out=value in ("", None))
    if field is not None and (value in ("", None) or (value == "none" and _may_be_missing(field))):
        _take_out(data, parts)
        return
    _drop_replaced(data, parts, value)
    for part in parts[:-1]:
        if data.get(part) is None:
            data[part] = {}
        data = data[part]
        if not isinstance(data, dict):
            raise ScenarioError(f"{key}: {part!r} is a value, not a section")
    data[parts[-1]] = value


def _field(parts: Sequence[str]) -> FieldInfo | None:
    """Return what the scenario says of a section or a key; None if it has no such."""
    section: type[BaseModel] | None = Scenario
    field = None
    for part in parts:
        named = section.model_fields.items() if section is not None else ()
        field = next((field for name, field in named if part == (field.alias or name)), None)
        if field is None:
            return None
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    return field


def _may_be_missing(field: FieldInfo) -> bool:
    return field.default is None


def _take_out(data: dict[str, Any], parts: Sequence[str]) -> None:
    """Take a key out of plain data. Without its trace, a workload is drawn."""
    section: Any = data
    for part in parts[:-1]:
        section = section.get(part) if isinstance(section, dict) else None
    if isinstance(section, dict):
        section.pop(parts[-1], None)
        if list(parts) == ["workload", "trace"] and section.get("synthetic") is None:
            section["synthetic"] = {}


def _drop_replaced(data: dict[str, Any], parts: list[str], value: Any) -> None:
    """Take out what a setting replaces: a trace and a synthetic one, and weights of another predictor."""
    workload, predictor = (data.get(section) for section in ("workload", "predictor"))
    if parts[:1] == ["workload"] and isinstance(workload, dict):
        if parts[1:] == ["trace"]:
            workload.pop("synthetic", None)
        elif parts[1:2] == ["synthetic"]:
            workload.pop("trace", None)
        synthetic = workload.get("synthetic")
        if parts[1:] == ["synthetic", "fit"] and isinstance(synthetic, dict):
            for key in _FIT_REPLACES:
                synthetic.pop(key, None)
    if parts == ["predictor", "name"] and value != "learned" and isinstance(predictor, dict):
        predictor.pop("weights", None)
