"""GGUF files of a model's shapes with random weights, for llama.cpp to be measured on without a checkpoint.

    python -m prestage.calibration.llama_cpp.random_gguf qwen3-30b-a3b FILE.gguf --experts q4_k --layers 12

Every block of a quantized tensor is valid: its scales are finite and of the size that keeps a layer's output of the
order of its input, all other bits are random. Blocks are drawn once and repeated, each tensor beginning elsewhere, so
that a file is written as fast as the disk takes it. There is no vocabulary, only its size: `llama-bench` needs none.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...files import check_file
from ...workloads.model_files.mixers import GroupedQuery
from ...workloads.model_files.shapes import Shapes
from ...workloads.model_files.sources import read_shapes

Bytes = npt.NDArray[np.uint8]
#: How many bytes of blocks are drawn of each type and width.
_POOL_BYTES = 1 << 24


def _half(value: float, blocks: int) -> Bytes:
    """Returns scales around a value (blocks, 2), as float16."""
    drawn = np.random.default_rng(1).uniform(0.75, 1.25, blocks) * value
    return drawn.astype("<f2").view(np.uint8).reshape(blocks, 2)


def _bits(blocks: int, size_bytes: int) -> Bytes:
    return np.random.default_rng(2).integers(0, 256, (blocks, size_bytes), dtype=np.uint8)


def _q8_0(blocks: int, spread: float) -> Bytes:
    """A float16 scale, then 32 int8."""
    return np.concatenate([_half(spread / 74, blocks), _bits(blocks, 32)], axis=1)


def _q4_0(blocks: int, spread: float) -> Bytes:
    """A float16 scale, then 32 numbers of 4 bits, less 8."""
    return np.concatenate([_half(spread / 4.6, blocks), _bits(blocks, 16)], axis=1)


def _q4_k(blocks: int, spread: float) -> Bytes:
    """Two float16 scales, of scales and of minima; 8 of each in 6 bits, packed; 256 numbers of 4 bits.

    A minimum equals its scale, and one factor is 7.5 times the other, so that weights are as often below 0 as above.
    """
    scale = spread / (37 * 4.6)  # the root mean square of 0 to 63, and of 0 to 15 about their mean
    factors = _half(scale, blocks).view("<f2")
    minima = (factors.astype(np.float32) * 7.5).astype("<f2")
    packed = _bits(blocks, 12)
    packed[:, 4:8] = packed[:, 0:4]
    packed[:, 8:12] = (packed[:, 8:12] & 15) * 17
    halves = np.concatenate([factors, minima], axis=1).view(np.uint8)
    return np.concatenate([halves, packed, _bits(blocks, 128)], axis=1)


def _q6_k(blocks: int, spread: float) -> Bytes:
    """256 numbers of 6 bits in two parts, less 32; 16 int8 scales; a float16 scale of those."""
    return np.concatenate([_bits(blocks, 208), _half(spread / (74 * 18.5), blocks)], axis=1)


def _mxfp4(blocks: int, spread: float) -> Bytes:
    """An exponent (E8M0, OCP Microscaling Formats 1.0), then 32 numbers of 4 bits (E2M1), of root mean square 2.9.

    Half of the exponents are one less: 2.3 in all, and as near to the spread as a whole power of two comes.
    """
    exponent = 127 + round(math.log2(spread / 2.3))
    drawn = np.random.default_rng(3).integers(exponent - 1, exponent + 1, (blocks, 1)).astype(np.uint8)
    return np.concatenate([drawn, _bits(blocks, 16)], axis=1)


def _f32(blocks: int, spread: float) -> Bytes:
    drawn = np.random.default_rng(4).standard_normal((blocks, 1), dtype=np.float32) * np.float32(spread)
    return drawn.astype("<f4").view(np.uint8)


def _f16(blocks: int, spread: float) -> Bytes:
    drawn = np.random.default_rng(5).standard_normal((blocks, 1), dtype=np.float32) * np.float32(spread)
    return drawn.astype("<f2").view(np.uint8)


class _Type(NamedTuple):
    """A tensor type of GGUF: its weights and bytes a block, and what draws blocks whose weights have a deviation."""

    name: str
    weights: int
    size_bytes: int
    draw: Callable[[int, float], Bytes]


#: By our name of the type (ggml-common.h has the blocks). Published files of Q4_K_M have Q6_K here and there.
TYPES = {
    "float32": _Type("F32", 1, 4, _f32),
    "float16": _Type("F16", 1, 2, _f16),
    "q8_0": _Type("Q8_0", 32, 34, _q8_0),
    "q4_0": _Type("Q4_0", 32, 18, _q4_0),
    "q4_k": _Type("Q4_K", 256, 144, _q4_k),
    "q6_k": _Type("Q6_K", 256, 210, _q6_k),
    "mxfp4": _Type("MXFP4", 32, 17, _mxfp4),
}


class Tensor(NamedTuple):
    """A tensor: its name, its shape, rows last as GGUF writes it reversed, and its type's name in TYPES."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def size_bytes(self) -> int:
        """The bytes of its blocks."""
        kind = TYPES[self.type]
        return math.prod(self.shape) // kind.weights * kind.size_bytes


class Architecture(NamedTuple):
    """What llama.cpp calls a family of models, and how its tensors differ from Mixtral's."""

    name: str
    qk_norm: str = "none"
    biases: bool = False
    ff_norm: str = "ffn_norm"


#: By what tells them apart: the norm of queries and keys, and whether attention has sinks.
_ARCHITECTURES = {
    ("none", False): Architecture("llama"),
    ("head", False): Architecture("qwen3moe", "head"),
    ("whole", False): Architecture("olmoe", "whole"),
    ("none", True): Architecture("gpt-oss", biases=True, ff_norm="post_attention_norm"),
}


def write_random(model: str, out: Path, *, experts: str = "q4_k", dense: str | None = None,
                 layers: int | None = None) -> int:  # fmt: skip
    """Write a GGUF file of a model's shapes, a preset's or a file's; return its bytes.

    `experts` and `dense`: names in TYPES; dense left out: as the experts, but q8_0 beside mxfp4. `layers`: only the
    first so many. Raises InputError for a model, type or width that cannot be written.
    """
    import gguf

    check_file(out)
    shapes = read_shapes(model)
    dense = dense or ("q8_0" if experts == "mxfp4" else experts)
    for option, name in (("--experts", experts), ("--dense", dense)):
        if name not in TYPES:
            raise InputError(f"{option} {name!r}: choose one of {', '.join(TYPES)}")
    mixer, architecture = _architecture(model, shapes)
    blocks = min(layers or shapes.moe_layers, shapes.moe_layers)
    tensors = list(_tensors(shapes, mixer, architecture, blocks, experts, dense))
    _check_widths(tensors)
    writer = gguf.GGUFWriter(out, architecture.name)
    for key, value in _facts(shapes, mixer, architecture, blocks).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[TYPES[tensor.type].name]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    _write_data(file, tensors, writer.data_alignment)
    writer.close()
    return out.stat().st_size


def _architecture(model: str, shapes: Shapes) -> tuple[GroupedQuery, Architecture]:
    """Returns a model's attention, and what llama.cpp calls it; InputError if this cannot write it."""
    mixer = shapes.one_attention
    parts = {part for stack in shapes.stacks for part in stack.feed_forward_of_block}
    moe = shapes.moe
    if mixer is None or parts != {"moe"} or moe.shared_experts or moe.shared_ff or moe.latent:
        raise InputError(
            f"model {model}: only models of one kind of grouped-query attention whose blocks are all MoE, without "
            "shared experts, are written: mixtral-8x7b, qwen3-30b-a3b, olmoe-1b-7b, gpt-oss-20b"
        )
    return mixer, _ARCHITECTURES[mixer.qk_norm, mixer.sinks]


def _facts(shapes: Shapes, mixer: GroupedQuery, architecture: Architecture, blocks: int) -> dict[str, Any]:
    """Returns the file's keys and values."""
    arch, moe = architecture.name, shapes.moe
    facts: dict[str, Any] = {
        "general.name": f"{shapes.name}, {blocks} layers, random weights",
        f"{arch}.block_count": blocks,
        f"{arch}.context_length": 131072,
        f"{arch}.embedding_length": shapes.hidden,
        f"{arch}.feed_forward_length": moe.expert_ff,
        f"{arch}.expert_feed_forward_length": moe.expert_ff,
        f"{arch}.expert_count": moe.experts,
        f"{arch}.expert_used_count": moe.top_k,
        f"{arch}.attention.head_count": mixer.heads,
        f"{arch}.attention.head_count_kv": mixer.kv_heads,
        f"{arch}.attention.key_length": mixer.head_dim,
        f"{arch}.attention.value_length": mixer.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.dimension_count": mixer.head_dim,
        f"{arch}.rope.freq_base": 1e6,
        f"{arch}.vocab_size": shapes.vocabulary,
        "tokenizer.ggml.model": "none",
    }
    if mixer.sinks:
        facts[f"{arch}.attention.sliding_window"] = 128  # of every other layer of gpt-oss
    return facts


def _tensors(shapes: Shapes, mixer: GroupedQuery, architecture: Architecture, blocks: int, experts: str,
             dense: str) -> Iterator[Tensor]:  # fmt: skip
    """Yields the file's tensors, in order."""
    hidden, moe = shapes.hidden, shapes.moe
    head = "q6_k" if dense == "q4_k" else dense
    yield Tensor("token_embd.weight", (shapes.vocabulary, hidden), dense)
    yield Tensor("output_norm.weight", (hidden,), "float32")
    yield Tensor("output.weight", (shapes.vocabulary, hidden), head)
    queries, keys = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    wide = {"none": None, "head": (mixer.head_dim, mixer.head_dim), "whole": (queries, keys)}[architecture.qk_norm]
    for block in range(blocks):
        at = f"blk.{block}"
        yield Tensor(f"{at}.attn_norm.weight", (hidden,), "float32")
        for name, width in (("attn_q", queries), ("attn_k", keys), ("attn_v", keys)):
            yield Tensor(f"{at}.{name}.weight", (width, hidden), dense)
            if architecture.biases:
                yield Tensor(f"{at}.{name}.bias", (width,), "float32")
        yield Tensor(f"{at}.attn_output.weight", (hidden, queries), dense)
        if wide:
            yield Tensor(f"{at}.attn_q_norm.weight", (wide[0],), "float32")
            yield Tensor(f"{at}.attn_k_norm.weight", (wide[1],), "float32")
        if mixer.sinks:
            yield Tensor(f"{at}.attn_sinks.weight", (mixer.heads,), "float32")
        yield Tensor(f"{at}.{architecture.ff_norm}.weight", (hidden,), "float32")
        yield Tensor(f"{at}.ffn_gate_inp.weight", (moe.experts, hidden), "float32")
        for name in ("gate", "up"):
            yield Tensor(f"{at}.ffn_{name}_exps.weight", (moe.experts, moe.expert_ff, hidden), experts)
        yield Tensor(f"{at}.ffn_down_exps.weight", (moe.experts, hidden, moe.expert_ff), experts)
        if architecture.biases:
            yield Tensor(f"{at}.attn_output.bias", (hidden,), "float32")
            yield Tensor(f"{at}.ffn_gate_inp.bias", (moe.experts,), "float32")
            for name, width in (("gate", moe.expert_ff), ("up", moe.expert_ff), ("down", hidden)):
                yield Tensor(f"{at}.ffn_{name}_exps.bias", (moe.experts, width), "float32")


def _check_widths(tensors: Sequence[Tensor]) -> None:
    """Refuse rows that are not whole blocks."""
    for tensor in tensors:
        weights = TYPES[tensor.type].weights
        if tensor.shape[-1] % weights:
            fits = [name for name, kind in TYPES.items() if not tensor.shape[-1] % kind.weights]
            raise InputError(
                f"{tensor.name}: rows of {tensor.shape[-1]} are no whole blocks of {tensor.type} ({weights}): choose "
                f"one of {', '.join(fits)}"
            )


def _write_data(file: IO[bytes], tensors: Sequence[Tensor], alignment: int) -> None:
    """Write the tensors' blocks, from pools of each type and width, each tensor beginning at another block."""
    pools: dict[tuple[str, int], Bytes] = {}
    for number, tensor in enumerate(tensors):
        kind, width = TYPES[tensor.type], tensor.shape[-1]
        is_norm = tensor.name.endswith("norm.weight")
        if is_norm:  # about 1, as trained ones are
            file.write((1 + np.zeros(width, dtype="<f4")).tobytes())
        else:
            if (tensor.type, width) not in pools:
                count = min(_POOL_BYTES // kind.size_bytes, 1 << 20)
                pools[tensor.type, width] = kind.draw(count, width**-0.5)
            pool = pools[tensor.type, width]
            first = number * 9973 % len(pool)
            left = tensor.size_bytes // kind.size_bytes
            while left:
                piece = pool[first : first + left]
                file.write(piece.data)
                left, first = left - len(piece), 0
        file.write(bytes(-tensor.size_bytes % alignment))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m prestage.calibration.llama_cpp.random_gguf", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="a preset or a file of shapes")
    parser.add_argument("out", type=Path)
    parser.add_argument("--experts", default="q4_k")
    parser.add_argument("--dense")
    parser.add_argument("--layers", type=int)
    given = parser.parse_args(arguments)
    try:
        size = write_random(given.model, given.out, experts=given.experts, dense=given.dense, layers=given.layers)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"{given.out}: {size} bytes")


if __name__ == "__main__":
    main()
