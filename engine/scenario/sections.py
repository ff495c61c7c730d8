"""The sections of what runs and on what: model, machine, workload, predictor, prefetch, dispatch, parallel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from ...errors import InputError
from ...resources.parts.section import of_parts
from ...workloads.batches import PREFILL_MODES, parse_warmup
from ...workloads.guesses import MOST_HORIZONS
from ...workloads.predictors import PREDICTORS
from ..decide.dispatch import ISSUE
from ..decide.expert_parallel import REMOTE
from ..decide.memory_manager import PROTECTION
from ..policies.placement import OBJECTIVES, PLACEMENT
from ..policies.prefetch import PREFETCH
from ..policies.routing import ROUTING
from ..policies.split import SPLITS
from .amounts import parse_bytes
from .section import MOST_US, Bytes, Section, WrittenBytes, one_of

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

#: More positions than any model has, before a sequence begins.
MOST_CONTEXT = 1 << 24
#: More GPUs than one machine has, stages of them, or parts of a batch between them.
MOST_GPUS = 1024
#: Keys of [workload.synthetic] that name a file to draw by, and those that either takes the place of.
DRAWN_BY = ("fit", "popularity")
FIT_REPLACES = ("skew", "working_set", "reuse")


class ModelSection(Section):
    """Which model, and what to change in it; with sizes = "trace", layers are as large as the trace says.

    `preset` is a shipped name, a TOML file, a Hugging Face config.json or its folder, or a GGUF file. `dtype` is of the
    routed experts, `bits_per_weight` of all matrices, where nothing else is known. `expert_bytes` is one number, or one
    for each layer. `kv_dtype` is that of the KV cache (not set: that of activations).
    """

    preset: str = "mixtral-8x7b"
    layers: int | None = Field(default=None, ge=1)
    experts: int | None = Field(default=None, ge=1)
    top_k: int | None = Field(default=None, ge=1)
    dtype: str | None = None
    bits_per_weight: float | None = Field(default=None, gt=0, le=64)
    expert_bytes: Annotated[Bytes, Field(ge=1)] | list[Annotated[Bytes, Field(ge=1)]] | None = None
    kv_dtype: str | None = None
    sizes: Literal["preset", "trace"] = "preset"

    def overrides(self) -> dict[str, Any]:
        """Returns what is set besides the preset."""
        return self.model_dump(exclude={"preset", "sizes"}, exclude_none=True)


class MachineSection(Section):
    """Which machine: a shipped profile's name or a JSON file's path; or its parts, which become such a name.

    Parts are a `gpu` of the table, `gpus` of them, and where it is known the `link` to each, the `cpu`, the `ram` and
    the `drive`: 'pcie4 x16', '7950x', '64GB DDR5-5600', '2TB 7GB/s'. What is left out is what goes with the rest.
    Several GPUs that are parts are the stages of a pipeline where [parallel] does not say what they do.
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


class SyntheticSection(Section):
    """A trace drawn by the synthetic generator, in the shape of the model, or by what was fitted to a real one.

    `fit` is a file that `prestage trace fit` wrote, `popularity` one of how often each expert of a layer was chosen
    (CSV or JSON), which places experts, too; either takes the place of skew, working_set and reuse.
    """

    fit: str | None = None
    popularity: str | None = None
    tokens: int = Field(default=500, ge=1)
    skew: float = Field(default=0.5, ge=0)
    working_set: int | None = Field(default=None, ge=1)
    reuse: float = Field(default=0.3, ge=0, le=1)
    sequences: int = Field(default=1, ge=1)
    prefill_tokens: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _fit_stands_alone(self) -> SyntheticSection:
        fields = type(self).model_fields
        without_meaning = {key for key in FIT_REPLACES if getattr(self, key) != fields[key].default}
        drawn_by = [key for key in DRAWN_BY if getattr(self, key) is not None]
        if len(drawn_by) > 1:
            raise InputError("popularity: no meaning with fit, which says it: leave one of them out")
        if drawn_by and without_meaning:
            keys = ", ".join(sorted(without_meaning))
            raise InputError(f"{keys}: no meaning with {drawn_by[0]}, which says it: leave out")
        return self


class WorkloadSection(Section):
    """The routing trace and how its tokens are batched. Without a trace, one is drawn by `synthetic`.

    `warmup` is what speed and rates leave out at the beginning, while the memory fills: so many decode tokens, or steps
    of either phase ("20steps"). It changes nothing of what runs. `context` is how many positions every sequence has in
    the KV cache before its first token here; with it, and be it 0, attention takes longer the more is cached (not set:
    as long as with nothing cached).
    """

    trace: str | None = None
    synthetic: SyntheticSection | None = None
    tokens: int | None = Field(default=None, ge=1)
    batch: int = Field(default=1, ge=1)
    prefill: Annotated[str, one_of(PREFILL_MODES)] = "whole"
    chunk_tokens: int = Field(default=512, ge=1)
    warmup: str = "0tokens"
    context: int | None = Field(default=None, ge=0, le=MOST_CONTEXT)

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


class RoutingSection(Section):
    """Which experts a token uses, of those that its router ranked.

    `cache-aware` takes a resident expert in place of an absent one whose gate weight is greater by at most `margin`,
    but never of the best `keep`. It needs a trace with `runners_up` and their gate weights, and changes what the model
    answers: how many choices and how much gate weight is reported, what that does to answers is not known.
    """

    policy: Annotated[str, one_of(ROUTING)] = "router"
    margin: float = Field(default=0.1, ge=0)
    keep: int = Field(default=1, ge=0)


class PredictorSection(Section):
    """Who guesses the experts of coming layers, how well, and what a guess costs on which lane.

    `weights` are those of "learned": a folder, a file or a shipped name. Without `latency_us` a guess takes what was
    measured for the weights, and nothing for a predictor that has none. `recall_by_horizon` models routers of later
    layers on this layer's hidden state: the oracle's recall one layer ahead, two, and so on, and no guess of the next
    token; `draft_recall` is that of guesses of the next token, as a drafted token lets make them.
    """

    name: Annotated[str, one_of(PREDICTORS)] = "oracle"
    recall: float = Field(default=0.9, ge=0, le=1)
    recall_by_horizon: list[Annotated[float, Field(ge=0, le=1)]] | None = Field(default=None, min_length=1)
    draft_recall: float | None = Field(default=None, ge=0, le=1)
    context: int = Field(default=3, ge=1, le=MOST_HORIZONS)
    lane: Annotated[str, one_of(PREDICTOR_LANES)] = "gpu"
    latency_us: float | None = Field(default=None, ge=0, le=MOST_US)
    weights: str | None = None

    @model_validator(mode="after")
    def _recalls_are_of_the_oracle(self) -> PredictorSection:
        for key in ("recall_by_horizon", "draft_recall"):
            if getattr(self, key) is not None and self.name != "oracle":
                raise InputError(f"{key} = {getattr(self, key)}: goes with name = 'oracle' (given {self.name!r})")
        return self

    @model_validator(mode="after")
    def _weights_are_of_learned(self) -> PredictorSection:
        if (self.weights is not None) != (self.name == "learned"):
            given = f"name = {self.name!r} and weights = {self.weights!r}"
            raise InputError(f"{given}: weights (a folder of `prestage predictor train`) go with name = 'learned'")
        return self


class PrefetchSection(Section):
    """What is fetched ahead of demand.

    What is predicted on the GPU is read back to the host, which waits for it before it enqueues the copies; or, with
    `issued_by` = "gpu", the GPU issues them itself behind the prediction, and they take the host no time.
    `stream-prefill` fetches whole layers in steps of `stream_tokens` or more.
    """

    policy: Annotated[str, one_of(PREFETCH)] = "top-k"
    k: int | None = Field(default=None, ge=1)
    lookahead: int = Field(default=1, ge=0, le=MOST_HORIZONS)
    threshold: float = Field(default=0.5, ge=0, le=1)
    decay: float = Field(default=0.7, gt=0, le=1)
    stream_tokens: int = Field(default=32, ge=1)
    protect: Annotated[str, one_of(PROTECTION)] = "until_target"
    issue: Annotated[str, one_of(ISSUE)] = "after_launch"
    issued_by: Annotated[str, one_of(ISSUERS)] = "host"


class DispatchSection(Section):
    """How the host thread drives the GPU.

    With `mode` = "graph" each group of kernels is a CUDA graph. Graphs are made for batches: a decode step runs at the
    next power of two of its tokens, a prompt over the tokens that it has.
    """

    mode: Annotated[str, one_of(DISPATCH_MODES)] = "eager"
    router_readback: bool = True
    expert_order: Annotated[str, one_of(EXPERT_ORDERS)] = "router"
    expert_kernel: Annotated[str, one_of(EXPERT_KERNELS)] = "separate"
    launch_queue_depth: int = Field(default=1000, ge=1, le=1_000_000)


#: What says how GPUs share the experts of every layer.
SHARING = ("placement", "replicas", "replica_bytes", "objective", "remote", "spare_bytes")


class ParallelSection(Section):
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
    dispatch_threads: Annotated[str, one_of(DISPATCH_THREADS)] = "per-gpu"
    gpus: int = Field(default=1, ge=1, le=MOST_GPUS)
    placement: Annotated[str, one_of(PLACEMENT)] = "round-robin"
    replicas: int = Field(default=2, ge=1, le=MOST_GPUS)
    replica_bytes: WrittenBytes = "0B"
    objective: Annotated[str, one_of(OBJECTIVES)] = "load"
    remote: Annotated[str, one_of(REMOTE)] = "tokens"
    spare_bytes: WrittenBytes = "0B"

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
