"""Mixers: what stands between two feed-forward parts of a block, its weights, and what it keeps of a sequence.

Attention adds to a KV cache with every token (with a window: until the window is full); linear attention and state
spaces keep a state of one size. To add a kind: write one more class, name it in `Mixer`, describe it in
tests/test_mixers.py.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...errors import InputError
from .weights import Weights


class Table(BaseModel):
    """A table of a model's file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]


class Kept(NamedTuple):
    """What a mixer keeps of one sequence: values a token, up to `window` tokens (0: all), and values once."""

    values_per_token: int = 0
    window: int = 0
    state_values: int = 0


class Attends(NamedTuple):
    """What an attention looks at for one row: query heads over cached keys (see `workloads.model.Attending`).

    `values_per_key` are read of the cache for each key, in `kv_heads` equal parts.
    """

    heads: int
    kv_heads: int
    head_dim: int
    values_per_key: int
    most: int = 0
    ratio: int = 1
    latent_dim: int = 0
    indexes: bool = False


def _indexer(heads: int, dim: int, ratio: int = 1) -> tuple[Attends, ...]:
    """Returns what an indexer looks at: a key for each position (or so many), and no values."""
    return (Attends(heads, 1, -(-dim // 2), dim, ratio=ratio, indexes=True),) if heads else ()


class _Keeps(Table):
    """A mixer that attends to nothing that grows."""

    @property
    def attends(self) -> tuple[Attends, ...]:
        """What it looks at of the positions before a row."""
        return ()


class GroupedQuery(_Keeps):
    """Attention whose query heads share key and value heads (Ainslie et al. 2023, arXiv:2305.13245).

    `sinks`: one logit a query head. `qk_norm`: a norm of each head's queries and keys ("head"), or of all ("whole").
    `value_dim`: of a value head, left out as `head_dim`. `qkv_bias`: biases of queries, keys and values alone. `gate`:
    of the output, one number a head, or one a channel. `values = "keys"`: one projection gives both, cached twice.
    `index_heads` of `index_dim` are an indexer's, which caches one key a token; a row attends to the `index_top_k`
    positions that it chooses (0: to all).
    """

    kind: Literal["gqa"]
    heads: Count
    kv_heads: Count
    head_dim: Count
    value_dim: Count | None = None
    bias: bool = False
    qkv_bias: bool = False
    sinks: bool = False
    qk_norm: Literal["none", "head", "whole"] = "none"
    gate: Literal["none", "head", "channel"] = "none"
    values: Literal["own", "keys"] = "own"
    window: CountOrNone = 0
    index_heads: CountOrNone = 0
    index_dim: CountOrNone = 0
    index_top_k: CountOrNone = 0

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.heads % self.kv_heads:
            raise InputError(f"kv_heads = {self.kv_heads}: must divide heads = {self.heads}")
        return self

    @property
    def kept(self) -> tuple[Kept, ...]:
        """What it keeps of one sequence."""
        values = self.kv_heads * (self.head_dim + (self.value_dim or self.head_dim))
        return (Kept(values + (self.index_dim if self.index_heads else 0), self.window),)

    @property
    def attends(self) -> tuple[Attends, ...]:
        """What it looks at of the positions before a row."""
        width = self.head_dim + (self.value_dim or self.head_dim)
        most = self.window or self.index_top_k
        attention = Attends(self.heads, self.kv_heads, -(-width // 2), self.kv_heads * width, most)
        return (attention, *_indexer(self.index_heads, self.index_dim))

    def weights(self, hidden: int) -> Weights:
        """Returns its weights in a model of this width."""
        value_dim = self.value_dim or self.head_dim
        queries, keys, values = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * value_dim
        output = self.heads * value_dim
        gate = {"none": 0, "head": self.heads, "channel": output}[self.gate]
        projected = queries + keys + (values if self.values == "own" else 0) + output + gate
        bias = queries + keys + values if self.bias or self.qkv_bias else 0
        bias += hidden if self.bias else 0
        sinks = self.heads if self.sinks else 0
        norms = {"none": 0, "head": 2 * self.head_dim, "whole": queries + keys}[self.qk_norm]
        if self.index_heads:
            projected += (self.index_heads + 1) * self.index_dim
            norms += 2 * self.index_dim
        return Weights(hidden * projected, bias + sinks + norms)


class Latent(_Keeps):
    """Multi-head latent attention, which caches one compressed vector (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    `q_lora_rank` 0: the queries are projected directly. `index_heads` of `index_dim` are those of a sparse attention's
    indexer, which reads the low-rank queries and caches one key a token; a row attends to the `index_top_k` positions
    that it chooses, 0 to all (DeepSeek-V3.2, arXiv:2512.02556, section 2).
    """

    kind: Literal["mla"]
    heads: Count
    q_lora_rank: CountOrNone
    kv_lora_rank: Count
    qk_nope_head_dim: Count
    qk_rope_head_dim: CountOrNone
    v_head_dim: Count
    gate: Literal["none", "channel"] = "none"
    index_heads: CountOrNone = 0
    index_dim: CountOrNone = 0
    index_top_k: CountOrNone = 0

    @model_validator(mode="after")
    def _indexes(self) -> Self:
        if self.index_heads and not (self.index_dim and self.q_lora_rank):
            raise InputError(f"index_heads = {self.index_heads}: needs index_dim and q_lora_rank")
        return self

    @property
    def kept(self) -> tuple[Kept, ...]:
        """What it keeps of one sequence."""
        return (Kept(self.kv_lora_rank + self.qk_rope_head_dim + (self.index_dim if self.index_heads else 0)),)

    @property
    def attends(self) -> tuple[Attends, ...]:
        """What it looks at: of a prompt by heads of their own width, decoding by all heads in the compressed one."""
        width = self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim
        cached = self.kv_lora_rank + self.qk_rope_head_dim
        latent = Attends(
            self.heads, 1, -(-width // 2), cached, self.index_top_k, latent_dim=-(-(cached + self.kv_lora_rank) // 2)
        )
        return (latent, *_indexer(self.index_heads, self.index_dim))

    def weights(self, hidden: int) -> Weights:
        """Returns its weights in a model of this width."""
        queries = self.heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        rank = self.q_lora_rank
        q = rank * (hidden + queries) if rank else hidden * queries
        kv_a = hidden * (self.kv_lora_rank + self.qk_rope_head_dim)
        kv_b = self.kv_lora_rank * self.heads * (self.qk_nope_head_dim + self.v_head_dim)
        output = self.heads * self.v_head_dim * hidden * (2 if self.gate == "channel" else 1)
        index, norm = 0, 0
        if self.index_heads:
            index = rank * self.index_heads * self.index_dim + hidden * (self.index_dim + self.index_heads)
            norm = 2 * self.index_dim
        return Weights(q + kv_a + kv_b + output + index, rank + self.kv_lora_rank + norm)


class Compressed(_Keeps):
    """DeepSeek-V4's attention: over a window, and over keys compressed by `ratio` (0: the window alone).

    Keys are values too. Queries and outputs have low ranks, the outputs' by `o_groups`; `index_heads` are an indexer's
    over compressed keys, which overlap then, `index_top_k` of them chosen (0: all); `streams` residual streams are
    mixed before and behind the block's parts.
    """

    kind: Literal["compressed"]
    heads: Count
    head_dim: Count
    q_lora_rank: Count
    o_groups: Count
    o_lora_rank: Count
    window: Count
    ratio: CountOrNone
    streams: Count
    index_heads: CountOrNone = 0
    index_dim: CountOrNone = 0
    index_top_k: CountOrNone = 0

    @property
    def kept(self) -> tuple[Kept, ...]:
        """What it keeps of one sequence."""
        window = Kept(self.head_dim, self.window)
        index = self.index_dim if self.index_heads else 0
        return (window, Kept(-(-(self.head_dim + index) // self.ratio))) if self.ratio else (window,)

    @property
    def attends(self) -> tuple[Attends, ...]:
        """What it looks at of the positions before a row: its window, and compressed keys."""
        window = Attends(self.heads, 1, self.head_dim, self.head_dim, self.window)
        if not self.ratio:
            return (window,)
        most = self.index_top_k * self.ratio
        compressed = Attends(self.heads, 1, self.head_dim, self.head_dim, most, self.ratio)
        return (window, compressed, *_indexer(self.index_heads, self.index_dim, self.ratio))

    def weights(self, hidden: int) -> Weights:
        """Returns its weights in a model of this width."""
        queries, rank = self.heads * self.head_dim, self.q_lora_rank
        output = queries * self.o_lora_rank + self.o_groups * self.o_lora_rank * hidden
        matrices = rank * (hidden + queries) + hidden * self.head_dim + output
        small = self.heads + rank + self.head_dim
        if self.ratio:
            overlap = 2 if self.index_heads else 1
            matrices += 2 * hidden * overlap * self.head_dim
            small += self.ratio * overlap * self.head_dim + self.head_dim
        if self.index_heads:
            matrices += (
                4 * hidden * self.index_dim + rank * self.index_heads * self.index_dim + hidden * self.index_heads
            )
            small += (2 * self.ratio + 1) * self.index_dim
        mixed = self.streams * (self.streams + 2)
        return Weights(matrices, small + 2 * (mixed * self.streams * hidden + mixed + 3))


class GatedDelta(_Keeps):
    """A gated delta rule (Yang et al. 2024, arXiv:2412.06464), as Qwen3-Next has it; its state is a matrix a head."""

    kind: Literal["gated_delta"]
    key_heads: Count
    value_heads: Count
    key_dim: Count
    value_dim: Count
    convolution: Count

    @property
    def _mixed(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def kept(self) -> tuple[Kept, ...]:
        """What it keeps of one sequence."""
        state = self.value_heads * self.key_dim * self.value_dim
        return (Kept(state_values=state + self._mixed * self.convolution),)

    def weights(self, hidden: int) -> Weights:
        """Returns its weights in a model of this width."""
        values = self.value_heads * self.value_dim
        projected = self._mixed + values + 2 * self.value_heads
        small = self._mixed * self.convolution + 2 * self.value_heads + self.value_dim
        return Weights(hidden * (projected + values), small)


class KimiDelta(_Keeps):
    """Kimi delta attention, a delta rule with a gate a channel (Kimi Linear, arXiv:2510.26692, section 3).

    The gates go through two matrices of rank `head_dim`, the output's through one with `output_gate` = "whole".
    """

    kind: Literal["kimi_delta"]
    heads: Count
    head_dim: Count
    convolution: Count
    output_gate: Literal["low_rank", "whole"] = "low_rank"

    @property
    def kept(self) -> tuple[Kept, ...]:
        """What it keeps of one sequence."""
        inner = self.heads * self.head_dim
        return (Kept(state_values=inner * self.head_dim + 3 * inner * self.convolution),)

    def weights(self, hidden: int) -> Weights:
        """Returns its weights in a model of this width."""
        inner = self.heads * self.head_dim
        low_rank = self.head_dim * (hidden + inner)
        gates = low_rank + (low_rank if self.output_gate == "low_rank" else hidden * inner)
        small = 3 * inner * self.convolution + inner + self.heads + self.head_dim
        return Weights(4 * hidden * inner + gates + hidden * self.heads, small)


class Lightning(_Keeps):
    """Lightning attention, linear attention with a decay and an output gate (MiniMax-01, arXiv:2501.08313)."""

    kind: Literal["lightning"]
    heads: Count
    head_dim: Count

    @property
    def kept(self) -> tuple[Kept, ...]:
        """What it keeps of one sequence."""
        return (Kept(state_values=self.heads * self.head_dim**2),)

    def weights(self, hidden: int) -> Weights:
        """Returns its weights in a model of this width."""
        inner = self.heads * self.head_dim
        return Weights(5 * hidden * inner, inner)


class Mamba(_Keeps):
    """A selective state space (Gu and Dao 2023, arXiv:2312.00752); with `norms` of its step, input and output."""

    kind: Literal["mamba"]
    inner: Count
    state: Count
    rank: Count
    convolution: Count
    norms: bool = False

    @property
    def kept(self) -> tuple[Kept, ...]:
        """What it keeps of one sequence."""
        return (Kept(state_values=self.inner * (self.state + self.convolution)),)

    def weights(self, hidden: int) -> Weights:
        """Returns its weights in a model of this width."""
        matrices = 3 * hidden * self.inner + self.inner * (2 * self.rank + 2 * self.state)
        small = self.inner * (self.convolution + 1) + self.inner + self.inner * self.state + self.inner
        return Weights(matrices, small + (self.rank + 2 * self.state if self.norms else 0))


class Mamba2(_Keeps):
    """A state space of heads (Dao and Gu 2024, arXiv:2405.21060), its inputs and outputs shared by groups."""

    kind: Literal["mamba2"]
    heads: Count
    head_dim: Count
    groups: Count
    state: Count
    convolution: Count
    bias: bool = False

    @property
    def _mixed(self) -> int:
        return self.heads * self.head_dim + 2 * self.groups * self.state

    @property
    def kept(self) -> tuple[Kept, ...]:
        """What it keeps of one sequence."""
        inner = self.heads * self.head_dim
        return (Kept(state_values=inner * self.state + self._mixed * self.convolution),)

    def weights(self, hidden: int) -> Weights:
        """Returns its weights in a model of this width."""
        inner = self.heads * self.head_dim
        projected = inner + self._mixed + self.heads
        small = self._mixed * (self.convolution + 1) + 3 * self.heads + inner
        small += projected + hidden if self.bias else 0
        return Weights(hidden * (projected + inner), small)


class ShortConvolution(_Keeps):
    """A gated short convolution (LFM2, arXiv:2511.23404): two gates, the convolution, and the way out."""

    kind: Literal["short_convolution"]
    width: Count
    bias: bool = False

    @property
    def kept(self) -> tuple[Kept, ...]:
        """What it keeps of one sequence."""
        return ()  # a few values a channel of the model

    def weights(self, hidden: int) -> Weights:
        """Returns its weights in a model of this width."""
        return Weights(4 * hidden * hidden, hidden * (self.width + (5 if self.bias else 0)))


class Stated(_Keeps):
    """Any other mixer, by its numbers: what it multiplies by, and what it keeps of a sequence."""

    kind: Literal["stated"]
    weights_in_matrices: Count
    other_weights: CountOrNone = 0
    values_per_token: CountOrNone = 0
    window: CountOrNone = 0
    state_values: CountOrNone = 0

    @property
    def kept(self) -> tuple[Kept, ...]:
        """What it keeps of one sequence."""
        return (Kept(self.values_per_token, self.window, self.state_values),)

    @property
    def attends(self) -> tuple[Attends, ...]:
        """What it reads of its cache; of heads nothing is known."""
        values = self.values_per_token
        return (Attends(0, max(1, values // 256), 0, values, self.window),) if values else ()

    def weights(self, hidden: int) -> Weights:
        """Returns its weights in a model of this width."""
        return Weights(self.weights_in_matrices, self.other_weights)


AnyMixer = (
    GroupedQuery | Latent | Compressed | GatedDelta | KimiDelta | Lightning | Mamba | Mamba2 | ShortConvolution | Stated
)
Mixer = Annotated[AnyMixer, Field(discriminator="kind")]
