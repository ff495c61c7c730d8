"""Shapes: what a model's TOML file says, checked as a whole; a config.json is read into the same.

A model is stacks of blocks. A block has a mixer (attention, linear attention, a state space, or none) and a
feed-forward part (MoE, dense, or none); both may follow a pattern that is repeated over the stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from ...dtypes import dtype_of
from ...errors import InputError
from ...words import problems
from ..trace_limits import MAX_LAYERS
from .mixers import AnyMixer, Count, CountOrNone, GroupedQuery, Latent, Mixer, Table
from .weights import Weights

Matrices = Literal[2, 3]
Text = Annotated[str, Field(min_length=1)]
Dtype = Annotated[str, AfterValidator(dtype_of)]
#: The name of [attention] in a stack's mixers, and that of a block that has none.
ATTENTION, NO_MIXER = "attention", "none"


class Dtypes(Table):
    """`expert`: matrices of the routed experts; `dense`: of mixers, dense and shared feed-forward parts.

    `other`: norms, biases and router, left out as `dense`; `embedding` and `head`, left out as `other`. `kv`: the KV
    cache, left out as `other`; `state`: what linear attention and state spaces keep.
    """

    expert: Dtype
    dense: Dtype
    other: Dtype | None = None
    embedding: Dtype | None = None
    head: Dtype | None = None
    kv: Dtype | None = None
    state: Dtype = "float32"

    @property
    def of_other(self) -> str:
        """The dtype of norms, biases and router."""
        return self.other or self.dense

    @property
    def of_embedding(self) -> str:
        """The dtype of the input embedding."""
        return self.embedding or self.of_other

    @property
    def of_head(self) -> str:
        """The dtype of the language-model head."""
        return self.head or self.of_other

    @property
    def of_kv(self) -> str:
        """The dtype of the KV cache."""
        return self.kv or self.of_other


class Differing(Table):
    """MoE layers, numbered from 0, whose experts differ from the others', and how; what is left out does not."""

    layers: Annotated[list[CountOrNone], Field(min_length=1)]
    experts: Count | None = None
    top_k: Count | None = None
    expert_ff: Count | None = None
    shared_experts: CountOrNone | None = None
    shared_ff: CountOrNone | None = None


class Moe(Table):
    """The MoE layers' routed experts, router, and shared experts, which are as large as the routed ones.

    `shared_ff`: the width of all shared experts together where they differ from the routed ones, and of any dense part
    beside them; `shared_gate`: one number a token weighs them. `latent`: the experts work on so many channels, to and
    from which two matrices lead. `by_layer`: layers that differ.
    """

    experts: Count
    top_k: Count
    expert_ff: Count
    matrices: Matrices = 3
    bias: bool = False
    router_bias: bool = False
    shared_experts: CountOrNone = 0
    shared_ff: CountOrNone = 0
    shared_gate: bool = False
    latent: CountOrNone = 0
    by_layer: list[Differing] = []

    @model_validator(mode="after")
    def _differ(self) -> Self:
        named = [layer for each in self.by_layer for layer in each.layers]
        if twice := [layer for layer in named if named.count(layer) > 1]:
            raise InputError(f"by_layer: names layer {twice[0]} twice: name each once")
        for layer in named:
            try:
                Moe.model_validate(self.of(layer).model_dump())
            except ValidationError as error:
                raise InputError(f"by_layer: layer {layer}: {problems(error, Moe, {})}") from None
        return self

    def of(self, layer: int) -> Moe:
        """Returns what the MoE layer of this number has, from 0."""
        changes: dict[str, Any] = {"by_layer": []}
        for each in self.by_layer:
            if layer in each.layers:
                changes |= each.model_dump(exclude={"layers"}, exclude_none=True)
        return self.model_copy(update=changes)

    def changed(self, changes: Mapping[str, int]) -> Moe:
        """Returns these experts with other numbers, the same in every layer."""
        kept = [each.model_copy(update=dict.fromkeys(changes)) for each in self.by_layer]
        return self.model_copy(update={**changes, "by_layer": kept})

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.top_k > self.experts:
            raise InputError(f"top_k = {self.top_k}: must be 1 to experts = {self.experts}")
        if self.shared_experts and self.shared_ff:
            raise InputError(f"shared_ff = {self.shared_ff}: give it or shared_experts, not both")
        return self

    def expert_weights(self, hidden: int) -> Weights:
        """Returns the weights of one routed expert."""
        width = self.latent or hidden
        bias = (self.matrices - 1) * self.expert_ff + width if self.bias else 0
        return Weights(self.matrices * width * self.expert_ff, bias)

    def resident_weights(self, hidden: int) -> Weights:
        """Returns the weights of router, shared experts and what leads to the latent channels."""
        router = self.experts * hidden + (self.experts if self.router_bias else 0)
        shared_ff = self.shared_ff or self.shared_experts * self.expert_ff
        bias = self.shared_experts * ((self.matrices - 1) * self.expert_ff + hidden) if self.bias else 0
        gate = hidden if self.shared_gate else 0
        return Weights(self.matrices * hidden * shared_ff + 2 * hidden * self.latent, router + gate + bias)


class Dense(Table):
    """The feed-forward part of blocks that are not MoE."""

    ff: Count
    matrices: Matrices = 3

    def weights(self, hidden: int) -> Weights:
        """Returns its weights in a model of this width."""
        return Weights(self.matrices * hidden * self.ff)


class Streams(Table):
    """Residual streams that are mixed before each of a block's two parts, by matrices of a rank (hyper-connections).

    After Zhu et al. 2024, arXiv:2409.19606, as Qwen4-Exp has them.
    """

    count: Count
    rank: Count

    def weights(self, hidden: int) -> Weights:
        """Returns the weights of one mixing in a model of this width."""
        width = self.count * hidden
        return Weights(2 * self.rank * width, width)


class Stack(Table):
    """Blocks in a row, closed by a norm. Block i from `moe_first` on is MoE if (i - moe_first) % moe_every is 0.

    `attentions`: of each block (an encoder-decoder's decoder has 2); `caches`: for how many of them one token adds to
    the KV cache, left out as all. `mixers` names those of [mixers], block by block ("attention": that of [attention],
    "none": none), and `feed_forward` says moe, dense or none; both are repeated until the stack's end.
    """

    blocks: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    moe_first: CountOrNone = 0
    moe_every: Count = 1
    attentions: Count = 1
    caches: CountOrNone | None = None
    mixers: Annotated[list[Text], Field(min_length=1)] | None = None
    feed_forward: Annotated[list[Literal["moe", "dense", "none"]], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.caches is not None and self.caches > self.attentions:
            raise InputError(f"caches = {self.caches}: must be 0 to attentions = {self.attentions}")
        if self.feed_forward is not None and {"moe_first", "moe_every"} & self.model_fields_set:
            raise InputError("feed_forward: says which blocks are MoE: leave moe_first and moe_every out")
        for key, pattern in (("mixers", self.mixers), ("feed_forward", self.feed_forward)):
            if pattern is not None and len(pattern) > self.blocks:
                raise InputError(f"{key}: {len(pattern)} entries: must be at most blocks = {self.blocks}")
        return self

    @property
    def mixer_of_block(self) -> list[str]:
        """The name of each block's mixer (blocks,)."""
        pattern = self.mixers or [ATTENTION]
        return [pattern[i % len(pattern)] for i in range(self.blocks)]

    @property
    def feed_forward_of_block(self) -> list[str]:
        """What each block's feed-forward part is: moe, dense or none (blocks,)."""
        if self.feed_forward is not None:
            return [self.feed_forward[i % len(self.feed_forward)] for i in range(self.blocks)]
        moe = (i >= self.moe_first and (i - self.moe_first) % self.moe_every == 0 for i in range(self.blocks))
        return ["moe" if each else "dense" for each in moe]


class Kernels(Table):
    """Kernels that an eager implementation launches for a typical layer's dense part and for one expert."""

    dense: Count
    expert: Count


class Shapes(Table):
    """A model's TOML file.

    `host_table_bytes`: of a table that is looked up in host memory and is no expert, such as one of n-grams.
    """

    name: Text
    source: Text
    hidden: Count
    vocabulary: Count
    tied_embeddings: bool = False
    host_table_bytes: CountOrNone = 0
    streams: Streams | None = None
    dtypes: Dtypes
    stacks: Annotated[list[Stack], Field(min_length=1)]
    attention: Annotated[GroupedQuery | Latent, Field(discriminator="kind")] | None = None
    mixers: dict[Text, Mixer] = {}
    moe: Moe
    dense: Dense | None = None
    kernels: Kernels

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        blocks = sum(stack.blocks for stack in self.stacks)
        if blocks > MAX_LAYERS:
            raise InputError(f"stacks: {blocks:,} blocks in all: must be at most {MAX_LAYERS:,}")
        parts = {part for stack in self.stacks for part in stack.feed_forward_of_block}
        if "moe" not in parts:
            raise InputError("stacks: no block is MoE: moe_first must be less than blocks in one of them")
        if self.dense is None and "dense" in parts:
            raise InputError("dense: missing: some blocks are not MoE, so [dense] must say ff")
        if self.dense is not None and "dense" not in parts:
            raise InputError("dense: every block is MoE, so [dense] must be left out")
        highest = max((layer for each in self.moe.by_layer for layer in each.layers), default=0)
        if highest >= self.moe_layers:
            raise InputError(f"moe.by_layer: layer {highest}: must be 0 to {self.moe_layers - 1}, the MoE layers")
        self._check_mixers({name for stack in self.stacks for name in stack.mixer_of_block})
        return self

    def _check_mixers(self, named: set[str]) -> None:
        for name in self.mixers:
            if name in (ATTENTION, NO_MIXER):
                raise InputError(f"mixers.{name}: the name of [attention] or of no mixer: choose another")
            if name not in named:
                raise InputError(f"mixers.{name}: no stack names it in its mixers")
        for name in sorted(named - set(self.mixers) - {NO_MIXER}):
            if name != ATTENTION:
                known = ", ".join([ATTENTION, NO_MIXER, *self.mixers])
                raise InputError(f"stacks: mixers name {name!r}: choose one of {known}")
            if self.attention is None:
                raise InputError("attention: missing; must be given")
        if self.attention is not None and ATTENTION not in named:
            raise InputError("attention: no stack names it in its mixers, so [attention] must be left out")

    @property
    def one_attention(self) -> GroupedQuery | None:
        """The grouped-query attention of all blocks, in some of them over a window or not; None where they differ."""
        first = self.attention
        if not isinstance(first, GroupedQuery) or len(self.stacks) > 1:
            return None
        alike = (each.model_copy(update={"window": first.window}) == first for each in self.mixers.values())
        return first if all(alike) and NO_MIXER not in self.stacks[0].mixer_of_block else None

    def mixer(self, name: str) -> AnyMixer | None:
        """Returns a mixer by the name that a stack gives it; None where a block has none."""
        return self.attention if name == ATTENTION else self.mixers.get(name)

    @property
    def moe_layers(self) -> int:
        """How many blocks are MoE."""
        return sum(stack.feed_forward_of_block.count("moe") for stack in self.stacks)
