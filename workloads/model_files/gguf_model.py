"""A model by its GGUF header: every tensor's own type and bytes, layer by layer.

Routed experts are the tensors whose names say `_exps` (or have an expert's number, as old files do); shared experts,
attention, norms and router are the layer's dense part. Layers that only guess ahead are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ...dtypes import dtype_of
from ...errors import InputError
from ...words import shown
from ..model import Attending, Cached, Model, ModelError, Routed
from .gguf import Header, Tensor, read_header

_BLOCK = re.compile(r"blk\.(?P<block>\d+)\.(?P<name>.+)")
_EXPERTS = re.compile(r"ffn_(?P<part>gate_up|gate|up|down)_exps\.")
_ONE_EXPERT = re.compile(r"ffn_(?P<part>gate|up|down)\.(?P<index>\d+)\.")
#: Tables that are looked up a row a token and stay in host memory.
_TABLES = re.compile(r"per_layer_token_embd|ngram")
#: Every so many blocks one sees all tokens and not a window, where an architecture's files do not say so.
_FULL_EVERY = {"gpt-oss": 2, "gemma4": 6, "gemma3": 6, "llama4": 4}
#: Assumed: kernels of a dense part and of an expert, as of the presets.
_DENSE_KERNELS, _EXPERT_KERNELS = 58, 5
_KV_BYTES, _STATE_BYTES = 2, 4


def read_gguf(path: Path) -> Model:
    """Returns the model of a GGUF file, or of all parts of a split one.

    Raises ModelError, naming the file, the tensor or key, and what would be right.
    """
    header = read_header(path)
    facts = _Facts(path, header.metadata)
    blocks = _sorted_out(facts, header)
    moe = [block for block in blocks.blocks if block.experts]
    if not moe:
        raise ModelError(f"{path}: no tensor of routed experts (blk.N.ffn_up_exps): not a mixture of experts")
    layers, tail = _layers(blocks.blocks)
    experts = _Experts.of(facts, moe)
    routed_of = [Routed(each.number, each.top_k, each.width) for each in experts]
    most = Routed(*map(max, zip(*routed_of, strict=True)))
    head = blocks.size("output.weight") or blocks.size("token_embd.weight")
    caches = tuple(_cached(facts, group) for group in [*layers, tail])
    dense = [tensor for block in blocks.blocks for tensor in block.dense]
    routed = [tensor for block in moe for tensor in block.experts]
    used, in_experts = _weights([*dense, *blocks.others]), _weights(routed)
    tied = not blocks.size("output.weight")
    return Model(
        name=str(header.metadata.get("general.name") or path.stem),
        layers=len(moe),
        experts=most.experts,
        top_k=most.top_k,
        hidden=facts.count("embedding_length"),
        expert_ff=most.expert_ff,
        expert_matrices=experts[0].matrices,
        expert_dtype=_most(routed),
        dense_dtype=_most(dense),
        expert_bytes=tuple(-(-block.expert_bytes // each.number) for block, each in zip(moe, experts, strict=True)),
        dense_bytes=tuple(map(_dense_bytes, layers)),
        head_bytes=head + blocks.size("output_norm.weight") + _dense_bytes(tail),
        dense_kernels=_DENSE_KERNELS,
        expert_kernels=_EXPERT_KERNELS,
        kv_bytes_per_token=sum(each.bytes_per_token for layer in caches for each in layer),
        source=_source(path, facts, blocks),
        parameters=used + in_experts,
        embedding_bytes=blocks.size("token_embd.weight"),
        tied_embeddings=tied,
        active_parameters=used + _chosen_weights(moe, experts) - (0 if tied else blocks.weights("token_embd.weight")),
        caches=caches,
        host_table_bytes=blocks.table_bytes,
        attention=tuple(_attending(facts, group) for group in [*layers[:-1], layers[-1] + tail]),
        by_layer=tuple(routed_of) if len(set(routed_of)) > 1 else (),
    )


def _weights(tensors: list[Tensor]) -> int:
    return sum(tensor.weights for tensor in tensors)


def _chosen_weights(blocks: list[_Block], experts: list[_Experts]) -> int:
    """Returns how many weights of routed experts a token uses."""
    chosen = (_weights(block.experts) * each.top_k // each.number for block, each in zip(blocks, experts, strict=True))
    return sum(chosen)


def _dense_bytes(blocks: list[_Block]) -> int:
    """Returns the bytes of what is no expert."""
    return sum(block.dense_bytes for block in blocks)


class _Facts:
    """The metadata of one architecture, by keys without its name."""

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self.path = path
        self.arch = str(metadata.get("general.architecture", ""))
        self._metadata = metadata

    def get(self, key: str) -> Any:
        return self._metadata.get(f"{self.arch}.{key}")

    def count(self, key: str, default: int | None = None, block: int = 0) -> int:
        """Returns a whole number, or a block's of a list; ModelError if it is none."""
        value = self.get(key)
        if isinstance(value, list):
            value = value[block] if block < len(value) else None
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 <= value < 1 << 40:
            raise ModelError(f"{self.path}: {self.arch}.{key} = {shown(value)}: must be an integer of at least 0")
        return value


@dataclass
class _Block:
    """The tensors of one block: routed experts, and all others."""

    number: int
    experts: list[Tensor] = field(default_factory=list)
    dense: list[Tensor] = field(default_factory=list)

    @property
    def expert_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.experts)

    @property
    def dense_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.dense)

    @property
    def recurrent(self) -> bool:
        """Whether it keeps a state and no keys."""
        return any(".ssm_" in tensor.name for tensor in self.dense)

    @property
    def attends(self) -> bool:
        return any(re.search(r"\.attn_(k|qkv|kv_a_mqa|kv)\.", tensor.name) for tensor in self.dense)


@dataclass
class _Blocks:
    """All blocks in order, the tensors outside of them, and what is left out of the model."""

    blocks: list[_Block]
    others: list[Tensor]
    table_bytes: int
    draft_blocks: set[int]
    unknown: list[str]

    def size(self, name: str) -> int:
        return sum(tensor.size_bytes for tensor in self.others if tensor.name == name)

    def weights(self, name: str) -> int:
        return sum(tensor.weights for tensor in self.others if tensor.name == name)


def _sorted_out(facts: _Facts, header: Header) -> _Blocks:
    count = facts.count("block_count")
    first_draft = count - facts.count("nextn_predict_layers", default=0)
    by_number: dict[int, _Block] = {}
    others, drafts, table_bytes = list[Tensor](), set[int](), 0
    for tensor in header.tensors:
        match = _BLOCK.fullmatch(tensor.name)
        number = int(match["block"]) if match else -1
        if match and (number >= first_draft or match["name"].startswith("nextn.")):
            drafts.add(number)
        elif tensor.name.startswith(("nextn.", "mtp.")):
            drafts.add(count)
        elif _TABLES.search(tensor.name):
            table_bytes += tensor.size_bytes
        elif match is None:
            others.append(tensor)
        else:
            block = by_number.setdefault(number, _Block(number))
            routed = _EXPERTS.match(match["name"]) or _ONE_EXPERT.match(match["name"])
            (block.experts if routed else block.dense).append(tensor)
    unknown = sorted({tensor.dtype for tensor in header.tensors if tensor.dtype.startswith("type ")})
    return _Blocks([by_number[n] for n in sorted(by_number)], others, table_bytes, drafts, unknown)


def _layers(blocks: list[_Block]) -> tuple[list[list[_Block]], list[_Block]]:
    """Returns the blocks of each MoE layer's dense part, up to the MoE one itself, and those behind the last one."""
    layers, waiting = list[list[_Block]](), list[_Block]()
    for block in blocks:
        waiting.append(block)
        if block.experts:
            layers.append(waiting)
            waiting = []
    return layers, waiting


class _Experts(NamedTuple):
    """A layer's experts, how many a token takes, the width of one, and its matrices (a fused gate and up are two)."""

    number: int
    top_k: int
    width: int
    matrices: int

    @classmethod
    def of(cls, facts: _Facts, moe: list[_Block]) -> list[_Experts]:
        found = [cls._of_block(facts, block) for block in moe]
        for block, experts in zip(moe, found, strict=True):
            if experts.matrices != found[0].matrices:
                raise ModelError(
                    f"{facts.path}: block {block.number}: an expert has {experts.matrices} matrices, in block "
                    f"{moe[0].number} {found[0].matrices}: every MoE layer must have the same"
                )
        return found

    @classmethod
    def _of_block(cls, facts: _Facts, block: _Block) -> _Experts:
        names = [tensor.name.partition(".")[2].partition(".")[2] for tensor in block.experts]
        weights = [(n, t) for n, t in zip(names, block.experts, strict=True) if n.endswith(".weight")]
        parts = {match["part"] for n, _ in weights if (match := _EXPERTS.match(n) or _ONE_EXPERT.match(n))}
        down = next((tensor for n, tensor in weights if n.startswith("ffn_down")), None)
        if down is None or len(down.shape) < 2:
            raise ModelError(f"{facts.path}: blk.{block.number}.ffn_down_exps.weight: missing")
        count = down.shape[2] if len(down.shape) > 2 else sum(n.startswith("ffn_down.") for n, _ in weights)
        top_k = facts.count("expert_used_count", block=block.number)
        return cls(count, top_k, down.shape[0], 3 if parts & {"gate", "gate_up"} else 2)


def _cached(facts: _Facts, group: Iterable[_Block]) -> tuple[Cached, ...]:
    """Returns what some blocks keep of a sequence, with keys and values in 16 bits, blocks of one window added up."""
    by_window: dict[int, int] = {}
    state = 0
    for block in group:
        if block.recurrent:
            inner, width = facts.count("ssm.inner_size", 0), facts.count("ssm.state_size", 0)
            mixed = inner + 2 * facts.count("ssm.group_count", 0) * width
            state += inner * width + mixed * facts.count("ssm.conv_kernel", 0)
        elif block.attends:
            window = _window(facts, block.number)
            by_window[window] = by_window.get(window, 0) + _KV_BYTES * _values(facts, block.number)
    kept = [Cached(size_bytes, window) for window, size_bytes in sorted(by_window.items())]
    return (*kept, Cached(state_bytes=_STATE_BYTES * state)) if state else tuple(kept)


def _attending(facts: _Facts, group: Iterable[_Block]) -> tuple[Attending, ...]:
    """Returns what some blocks attend to; in full, where a sparse attention's indexer is not described."""
    found = []
    for block in group:
        if block.attends and not block.recurrent:
            heads, window = facts.count("attention.head_count", block=block.number), _window(facts, block.number)
            key, value = _widths(facts, block.number)
            values, width = _values(facts, block.number), -(-(key + value) // 2)
            rank = facts.get("attention.kv_lora_rank")
            kv_heads = 1 if rank is not None else max(1, values // max(1, key + value))
            latent = 0 if rank is None else -(-(values + facts.count("attention.kv_lora_rank")) // 2)
            found.append(Attending(heads, kv_heads, width, _KV_BYTES * values, window, latent_dim=latent))
    return tuple(found)


def _values(facts: _Facts, block: int) -> int:
    """Returns the values that one token adds to a block's cache."""
    if facts.get("attention.kv_lora_rank") is not None:
        return facts.count("attention.kv_lora_rank") + facts.count("rope.dimension_count", 0)
    heads = facts.count("attention.head_count", block=block)
    return facts.count("attention.head_count_kv", heads, block) * sum(_widths(facts, block))


def _widths(facts: _Facts, block: int) -> tuple[int, int]:
    """Returns the widths of a key and of a value of a block's heads; where keys are compressed, as they are made."""
    usual = facts.count("embedding_length") // max(1, facts.count("attention.head_count", block=block))
    kind = "_mla" if facts.get("attention.key_length_mla") is not None else "_swa" if _window(facts, block) else ""
    key = facts.count(f"attention.key_length{kind}", facts.count("attention.key_length", usual))
    return key, facts.count(f"attention.value_length{kind}", facts.count("attention.value_length", usual))


def _window(facts: _Facts, block: int) -> int:
    """Returns the window of a block's attention in tokens, 0 where it sees all."""
    window = facts.count("attention.sliding_window", 0)
    pattern = facts.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        return window if block < len(pattern) and pattern[block] else 0
    every = pattern if type(pattern) is int else _FULL_EVERY.get(facts.arch, 1)
    return window if every and block % every < every - 1 else 0


def _most(tensors: Iterable[Tensor]) -> str:
    """Returns the dtype in which most bytes of matrices are; of a type that is not known, by its bits per weight."""
    sizes: dict[str, list[int]] = {}
    for tensor in tensors:
        if len(tensor.shape) > 1:
            size = sizes.setdefault(tensor.dtype, [0, 0])
            size[0] += tensor.size_bytes
            size[1] += tensor.weights
    if not sizes:
        return "float32"
    dtype = max(sizes, key=lambda name: (sizes[name][0], name))
    try:
        return dtype_of(dtype)
    except InputError:
        return dtype_of(f"{8 * sizes[dtype][0] / sizes[dtype][1]:.4g}bpw")


def _source(path: Path, facts: _Facts, blocks: _Blocks) -> str:
    notes = [f"{path.name}, GGUF of {facts.arch}"]
    if blocks.draft_blocks:
        notes.append(f"without its {len(blocks.draft_blocks)} draft layers")
    if blocks.unknown:
        notes.append(f"{', '.join(blocks.unknown)} by the tensors' places")
    return "; ".join(notes)
