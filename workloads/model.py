"""Models: how many experts a Mixture-of-Experts model has, and how many bytes each of its parts moves.

The unit is the MoE layer. Everything that runs between the experts of MoE layer l-1 and those of layer l is the dense
part of layer l: attention, norms, router, shared experts, and any dense-only block in between. Dense blocks before the
first MoE layer belong to the dense part of layer 0, those after the last one to the head.

A model is described by its published shapes in a TOML file (`models/` holds the presets); no file states a byte count.
The formulas that turn shapes into weights are the `weights` methods below; `dtypes.DTYPES` turns weights into bytes.
To add a model, write one more TOML file and add its published size to tests/test_model.py.
"""

from __future__ import annotations

import difflib
import operator
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..bounded import parse_toml, read
from ..dtypes import DTYPES, dtype_of
from ..errors import InputError
from ..words import problems
from .trace import MAX_LAYERS, check_total_experts

#: What all experts of a model, its dense parts and head may take together: an exbibyte, so that sums fit into 64 bits.
MOST_BYTES = 2**60


class ModelError(InputError):
    """A model that cannot be; the message names the file, the key, the value and what would be right."""


@dataclass(frozen=True)
class Model:
    """What a run needs to know of a model. Build it with `load_model`.

    - `layers`: MoE layers; `experts`: routed experts of one layer, of which each token takes `top_k`.
    - `hidden`, `expert_ff`: width of the model and of one routed expert's inner layer, which has `expert_matrices`
      matrices (3 gated, 2 plain) of `expert_dtype`. The dense part's matrices are of `dense_dtype`.
    - `expert_bytes` (layers,): bytes to move for one expert of that layer, biases included.
    - `dense_bytes` (layers,): weight bytes read by the dense part of that layer; no embedding table.
    - `head_bytes`: final norm and language-model head, with any block after the last MoE layer.
    - `embedding_bytes`: the table of input embeddings; with `tied_embeddings` it is the head's matrix too.
    - `dense_kernels`, `expert_kernels`: GPU kernels that an eager PyTorch implementation launches for a layer's dense
      part and for one expert. Assumptions, counted by reading the implementation.
    - `kv_bytes_per_token`: what one token adds to the KV cache, over all layers.
    - `parameters`: all weights, embeddings included and tied ones once; None where it is not known.

    Raises ModelError naming the field and its value if a number is out of range or a length is not `layers`.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    expert_ff: int
    expert_matrices: int
    expert_dtype: str
    dense_dtype: str
    expert_bytes: tuple[int, ...]
    dense_bytes: tuple[int, ...]
    head_bytes: int
    dense_kernels: int
    expert_kernels: int
    kv_bytes_per_token: int = 0
    source: str = ""
    parameters: int | None = None
    embedding_bytes: int = 0
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        for field in _AT_LEAST_ONE:
            self._check(field, getattr(self, field), 1)
        for field in ("head_bytes", "kv_bytes_per_token", "embedding_bytes"):
            self._check(field, getattr(self, field), 0)
        if self.top_k > self.experts:
            raise ModelError(f"model {self.name}: top_k = {self.top_k}: must be 1 to experts = {self.experts}")
        check_total_experts(f"model {self.name}", self.layers, self.experts, ModelError)
        for field in ("expert_dtype", "dense_dtype"):
            if getattr(self, field) not in DTYPES:
                raise ModelError(f"model {self.name}: {field} = {getattr(self, field)!r}: {_CHOOSE_DTYPE}")
        for field, low in (("expert_bytes", 1), ("dense_bytes", 0)):
            sizes = getattr(self, field)
            if len(sizes) != self.layers:
                raise ModelError(
                    f"model {self.name}: {field} has {len(sizes)} entries: must have one per layer, {self.layers}"
                )
            for layer, size in enumerate(sizes):
                self._check(f"{field}[{layer}]", size, low)
        total_bytes = self.total_expert_bytes + sum(self.dense_bytes) + self.head_bytes
        for what, size in (("all weights", total_bytes), ("kv_bytes_per_token", self.kv_bytes_per_token)):
            if size > MOST_BYTES:
                raise ModelError(f"model {self.name}: {what}: {size} bytes: must be at most {MOST_BYTES}")

    def _check(self, field: str, value: object, low: int) -> None:
        if type(value) is not int or value < low:
            raise ModelError(f"model {self.name}: {field} = {value!r}: must be an integer of at least {low}")

    @property
    def total_experts(self) -> int:
        """Routed experts of all layers; expert ids are 0 to this, exclusive."""
        return self.layers * self.experts

    # Cached: hot paths ask for these, and a frozen instance never changes.
    @cached_property
    def total_expert_bytes(self) -> int:
        """Bytes of all routed experts."""
        return self.experts * sum(self.expert_bytes)

    @property
    def embedding_beside_head_bytes(self) -> int:
        """Bytes that the input embedding takes beside the head: none where it is the head's own matrix."""
        return 0 if self.tied_embeddings else self.embedding_bytes

    @cached_property
    def uniform(self) -> bool:
        """Whether all experts have the same size."""
        return len(set(self.expert_bytes)) == 1

    def expert_id(self, layer: int, index: int) -> int:
        """Return the one number that names expert `index` of MoE layer `layer`, both from 0."""
        return layer * self.experts + index

    def dtype_bits(self, part: Literal["expert", "dense"]) -> float:
        """Return the bits per weight of the routed experts or of the dense part's matrices."""
        return float(DTYPES[self.expert_dtype if part == "expert" else self.dense_dtype])


_AT_LEAST_ONE = (
    "layers",
    "experts",
    "top_k",
    "hidden",
    "expert_ff",
    "expert_matrices",
    "dense_kernels",
    "expert_kernels",
)
_CHOOSE_DTYPE = f"choose one of {', '.join(DTYPES)}"


def preset_names() -> list[str]:
    """Return the names of the shipped models, sorted."""
    files = resources.files(f"{__package__}.models").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    layers: int | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    dtype: str | None = None,
    expert_bytes: int | Iterable[int] | None = None,
) -> Model:
    """Return a model by its preset's name, or by the path of a TOML file (`*.toml`, or anything with a separator).

    Overrides, all optional: `layers` keeps the first so many MoE layers, and the head; `experts` and `top_k` change the
    router; `dtype` changes the routed experts' matrices; `expert_bytes` states their size, one number or one per layer,
    and wins over `dtype`. Everything else is derived again from the shapes.

    Raises ModelError, naming the file, the key, the value and what would be right.
    """
    shapes = _read(os.fspath(name_or_path))
    changes = {"layers": layers, "experts": experts, "top_k": top_k}
    for key, value in changes.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ModelError(f"model.{key} = {value!r}: must be an integer of at least 1")
    try:
        dtype = None if dtype is None else dtype_of(dtype)
    except InputError as error:
        raise ModelError(f"model.dtype = {dtype!r}: {error}") from None
    known = shapes.moe_layers
    if layers is not None and layers > known:
        raise ModelError(f"model.layers = {layers}: {shapes.name} has {known} MoE layers; give 1 to {known}")
    moe = shapes.moe.model_copy(update={key: changes[key] for key in ("experts", "top_k") if changes[key] is not None})
    if moe.top_k > moe.experts:
        key, value = ("top_k", moe.top_k) if top_k is not None else ("experts", moe.experts)
        raise ModelError(
            f"model.{key} = {value}: {shapes.name} would take {moe.top_k} of {moe.experts} experts; "
            f"top_k must be 1 to experts"
        )
    dtypes = shapes.dtypes.model_copy(update={} if dtype is None else {"expert": dtype})
    model = _derive(shapes.model_copy(update={"moe": moe, "dtypes": dtypes}), known if layers is None else layers)
    return model if expert_bytes is None else replace(model, expert_bytes=_per_layer(expert_bytes, model.layers))


def _per_layer(expert_bytes: int | Iterable[int], layers: int) -> tuple[int, ...]:
    given = expert_bytes if isinstance(expert_bytes, Iterable) else (expert_bytes,) * layers
    sizes = []
    for layer, size in enumerate(given):
        try:
            # numpy's integers are welcome, as from a trace's `expert_bytes`; True and False are not.
            sizes.append(0 if isinstance(size, bool) else operator.index(size))
        except TypeError:
            sizes.append(0)
        if sizes[-1] < 1:
            raise ModelError(f"model.expert_bytes = {size!r} at layer {layer}: must be an integer of at least 1")
    if len(sizes) != layers:
        raise ModelError(f"model.expert_bytes has {len(sizes)} entries: must be one number, or one per layer, {layers}")
    return tuple(sizes)


# --- From shapes to weights -----------------------------------------------------------------------------------------


class _Weights(NamedTuple):
    """Numbers of weights: those in the big matrices, and all others (norms, biases, router), whose dtype may differ."""

    matrix: int = 0
    other: int = 0

    def plus(self, more: _Weights, times: int = 1) -> _Weights:
        return _Weights(self.matrix + times * more.matrix, self.other + times * more.other)

    def bytes(self, dtypes: _Dtypes, matrix: str) -> int:
        return _bytes(self.matrix, matrix) + _bytes(self.other, dtypes.of_other)

    @property
    def total(self) -> int:
        return self.matrix + self.other


def _bytes(weights: int, dtype: str) -> int:
    # Exact, rounded up to a whole byte.
    return -int(-weights * DTYPES[dtype] // 8)


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_Count = Annotated[int, Field(ge=1)]
_CountOrNone = Annotated[int, Field(ge=0)]
_Matrices = Literal[2, 3]
_Text = Annotated[str, Field(min_length=1)]
_Dtype = Annotated[str, AfterValidator(dtype_of)]


class _Dtypes(_Table):
    """`expert`: matrices of the routed experts; `dense`: of attention, dense and shared feed-forward parts.

    `other`: norms, biases, router, embedding and head, left out as `dense`. `kv`: the KV cache, left out as `other`.
    """

    expert: _Dtype
    dense: _Dtype
    other: _Dtype | None = None
    kv: _Dtype | None = None

    @property
    def of_other(self) -> str:
        return self.other or self.dense

    @property
    def of_kv(self) -> str:
        return self.kv or self.of_other


class _GroupedQuery(_Table):
    """Attention whose query heads share key and value heads (Ainslie et al. 2023, arXiv:2305.13245).

    `sinks`: one logit a query head. `qk_norm`: a norm of each head's queries and keys ("head"), or of all ("whole").
    """

    kind: Literal["gqa"]
    heads: _Count
    kv_heads: _Count
    head_dim: _Count
    bias: bool = False
    sinks: bool = False
    qk_norm: Literal["none", "head", "whole"] = "none"

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.heads % self.kv_heads:
            raise InputError(f"kv_heads = {self.kv_heads}: must divide heads = {self.heads}")
        return self

    @property
    def cached_values(self) -> int:
        return 2 * self.kv_heads * self.head_dim

    def weights(self, hidden: int) -> _Weights:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        bias = queries + 2 * keys + hidden if self.bias else 0
        sinks = self.heads if self.sinks else 0
        norms = {"none": 0, "head": 2 * self.head_dim, "whole": queries + keys}[self.qk_norm]
        return _Weights(hidden * (2 * queries + 2 * keys), bias + sinks + norms)


class _Latent(_Table):
    """Multi-head latent attention, which caches one compressed vector (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    `q_lora_rank` 0: the queries are projected directly.
    """

    kind: Literal["mla"]
    heads: _Count
    q_lora_rank: _CountOrNone
    kv_lora_rank: _Count
    qk_nope_head_dim: _Count
    qk_rope_head_dim: _Count
    v_head_dim: _Count

    @property
    def cached_values(self) -> int:
        return self.kv_lora_rank + self.qk_rope_head_dim

    def weights(self, hidden: int) -> _Weights:
        queries = self.heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        rank = self.q_lora_rank
        q = rank * (hidden + queries) if rank else hidden * queries
        kv_a = hidden * self.cached_values
        kv_b = self.kv_lora_rank * self.heads * (self.qk_nope_head_dim + self.v_head_dim)
        output = self.heads * self.v_head_dim * hidden
        return _Weights(q + kv_a + kv_b + output, rank + self.kv_lora_rank)


_ATTENTION: dict[str, type[_GroupedQuery] | type[_Latent]] = {"gqa": _GroupedQuery, "mla": _Latent}


class _Moe(_Table):
    """The MoE layers' routed experts, router, and shared experts, which are as large as the routed ones."""

    experts: _Count
    top_k: _Count
    expert_ff: _Count
    matrices: _Matrices = 3
    bias: bool = False
    router_bias: bool = False
    shared_experts: _CountOrNone = 0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.top_k > self.experts:
            raise InputError(f"top_k = {self.top_k}: must be 1 to experts = {self.experts}")
        return self

    def expert_weights(self, hidden: int) -> _Weights:
        bias = (self.matrices - 1) * self.expert_ff + hidden if self.bias else 0
        return _Weights(self.matrices * hidden * self.expert_ff, bias)

    def resident_weights(self, hidden: int) -> _Weights:
        router = self.experts * hidden + (self.experts if self.router_bias else 0)
        return _Weights(other=router).plus(self.expert_weights(hidden), self.shared_experts)


class _Dense(_Table):
    """The feed-forward part of blocks that are not MoE."""

    ff: _Count
    matrices: _Matrices = 3

    def weights(self, hidden: int) -> _Weights:
        return _Weights(self.matrices * hidden * self.ff)


class _Stack(_Table):
    """Blocks in a row, closed by a norm. Block i from `moe_first` on is MoE if (i - moe_first) % moe_every is 0.

    `attentions`: of each block (an encoder-decoder's decoder has 2); `caches`: for how many of them one token adds to
    the KV cache, left out as all.
    """

    blocks: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    moe_first: _CountOrNone = 0
    moe_every: _Count = 1
    attentions: _Count = 1
    caches: _CountOrNone | None = None

    @model_validator(mode="after")
    def _caches_its_own(self) -> Self:
        if self.caches is not None and self.caches > self.attentions:
            raise InputError(f"caches = {self.caches}: must be 0 to attentions = {self.attentions}")
        return self

    @property
    def moe_blocks(self) -> int:
        return len(range(self.moe_first, self.blocks, self.moe_every))

    @property
    def moe(self) -> list[bool]:
        return [i >= self.moe_first and (i - self.moe_first) % self.moe_every == 0 for i in range(self.blocks)]


class _Kernels(_Table):
    """Kernels that an eager implementation launches for a typical layer's dense part and for one expert."""

    dense: _Count
    expert: _Count


class _Shapes(_Table):
    """A model's TOML file."""

    name: _Text
    source: _Text
    hidden: _Count
    vocabulary: _Count
    tied_embeddings: bool = False
    dtypes: _Dtypes
    stacks: Annotated[list[_Stack], Field(min_length=1)]
    attention: Annotated[_GroupedQuery | _Latent, Field(discriminator="kind")]
    moe: _Moe
    dense: _Dense | None = None
    kernels: _Kernels

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        blocks = sum(stack.blocks for stack in self.stacks)
        if blocks > MAX_LAYERS:
            raise InputError(f"stacks: {blocks:,} blocks in all: must be at most {MAX_LAYERS:,}")
        if not self.moe_layers:
            raise InputError("stacks: no block is MoE: moe_first must be less than blocks in one of them")
        if self.dense is None and self.moe_layers < sum(stack.blocks for stack in self.stacks):
            raise InputError("dense: missing: some blocks are not MoE, so [dense] must say ff")
        if self.dense is not None and self.moe_layers == sum(stack.blocks for stack in self.stacks):
            raise InputError("dense: every block is MoE, so [dense] must be left out")
        return self

    @property
    def moe_layers(self) -> int:
        return sum(stack.moe_blocks for stack in self.stacks)


class _Part(NamedTuple):
    """The dense part of one MoE layer, or the end of the model: its weights, and values cached per token."""

    weights: _Weights
    cached_values: int


def _parts(shapes: _Shapes) -> list[_Part]:
    """Return the dense part of every MoE layer, then what follows the last one, without the language-model head."""
    hidden = shapes.hidden
    norm = _Weights(other=hidden)
    attention = shapes.attention.weights(hidden).plus(norm)
    moe = shapes.moe.resident_weights(hidden).plus(norm)
    dense = shapes.dense.weights(hidden).plus(norm) if shapes.dense else norm
    parts: list[_Part] = []
    weights, cached = _Weights(), 0
    for stack in shapes.stacks:
        for is_moe in stack.moe:
            weights = weights.plus(attention, stack.attentions).plus(moe if is_moe else dense)
            caches = stack.attentions if stack.caches is None else stack.caches
            cached += caches * shapes.attention.cached_values
            if is_moe:
                parts.append(_Part(weights, cached))
                weights, cached = _Weights(), 0
        weights = weights.plus(norm)
    return [*parts, _Part(weights, cached)]


def _derive(shapes: _Shapes, layers: int) -> Model:
    """Return the model of these shapes with its first `layers` MoE layers."""
    dtypes, moe, hidden = shapes.dtypes, shapes.moe, shapes.hidden
    *dense, tail = _parts(shapes)
    kept = [*dense[:layers], tail]
    expert = moe.expert_weights(hidden)
    head = _Weights(other=shapes.vocabulary * hidden)
    tables = 1 if shapes.tied_embeddings else 2
    return Model(
        name=shapes.name,
        layers=layers,
        experts=moe.experts,
        top_k=moe.top_k,
        hidden=hidden,
        expert_ff=moe.expert_ff,
        expert_matrices=moe.matrices,
        expert_dtype=dtypes.expert,
        dense_dtype=dtypes.dense,
        expert_bytes=(expert.bytes(dtypes, dtypes.expert),) * layers,
        dense_bytes=tuple(part.weights.bytes(dtypes, dtypes.dense) for part in dense[:layers]),
        head_bytes=tail.weights.plus(head).bytes(dtypes, dtypes.dense),
        dense_kernels=shapes.kernels.dense,
        expert_kernels=shapes.kernels.expert,
        kv_bytes_per_token=_bytes(sum(part.cached_values for part in kept), dtypes.of_kv),
        source=shapes.source,
        parameters=sum(part.weights.total for part in kept) + layers * moe.experts * expert.total + tables * head.total,
        embedding_bytes=head.bytes(dtypes, dtypes.dense),
        tied_embeddings=shapes.tied_embeddings,
    )


# --- From a file to shapes ------------------------------------------------------------------------------------------


def _read(name: str) -> _Shapes:
    if name.endswith(".toml") or Path(name).name != name:
        label, text = name, _read_text(Path(name))
    else:
        presets = preset_names()
        if name not in presets:
            nearest = difflib.get_close_matches(name.lower(), presets, n=1)
            hint = f"did you mean {nearest[0]}? " if nearest else ""
            raise ModelError(f"model {name!r}: {hint}choose one of {', '.join(presets)}, or FILE.toml")
        label = f"{name}.toml"
        text = (resources.files(f"{__package__}.models") / label).read_text(encoding="utf-8")
    data = parse_toml(text, label, ModelError)
    try:
        return _Shapes.model_validate(data)
    except ValidationError as error:
        raise ModelError(f"{label}: {problems(error, _Shapes, data)}") from None


def _read_text(path: Path) -> str:
    try:
        return read(path, ModelError).decode("utf-8")
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ModelError(f"{path}: not UTF-8 text") from None
