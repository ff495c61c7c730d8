"""GGUF files for tests, written byte by byte as docs/gguf.md of ggml says."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ALIGNMENT = 32
#: By a type's number: how many weights a block of so many bytes holds. 144 is one that Prestage does not know.
BLOCKS = {0: (1, 4), 1: (1, 2), 8: (32, 34), 12: (256, 144), 14: (256, 210), 39: (32, 17), 144: (256, 140)}

#: A tensor: its name, its shape as GGUF writes it (the inner length first), and its type's number.
Entry = tuple[str, Sequence[int], int]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(given: Any) -> bytes:
    """The kind of a value, then the value."""
    if isinstance(given, bool):
        return struct.pack("<I?", 7, given)
    if isinstance(given, int):
        return struct.pack("<II", 4, given)
    if isinstance(given, float):
        return struct.pack("<If", 6, given)
    if isinstance(given, str):
        return struct.pack("<I", 8) + text(given)
    kinds = {bool: 7, int: 4, str: 8}
    kind = kinds[type(given[0])]
    content = b"".join(text(each) if kind == 8 else struct.pack("<?" if kind == 7 else "<I", each) for each in given)
    return struct.pack("<IIQ", 9, kind, len(given)) + content


def size_of(shape: Sequence[int], type_number: int) -> int:
    count = 1
    for length in shape:
        count *= length
    block, block_bytes = BLOCKS[type_number]
    return -(-count // block) * block_bytes


def write(path: Path, metadata: Mapping[str, Any], tensors: Sequence[Entry], cut: bool = False) -> int:
    """Write a file, or only its header, and return the header's bytes."""
    content = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    content += b"".join(text(key) + value(given) for key, given in metadata.items())
    offset = 0
    for name, shape, type_number in tensors:
        content += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_number, offset)
        offset += -(-size_of(shape, type_number) // ALIGNMENT) * ALIGNMENT
    header = len(content)
    content += b"\0" * (-len(content) % ALIGNMENT)
    path.write_bytes(content if cut else content + b"\0" * offset)
    return header


def facts(arch: str, **more: Any) -> dict[str, Any]:
    """Metadata of a small model: 2 blocks of 4 experts of 32 x 16, attention of 2 heads of 16 with 1 key head."""
    usual = {
        "block_count": 2,
        "embedding_length": 32,
        "expert_count": 4,
        "expert_used_count": 2,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": 16,
        "attention.value_length": 16,
    }
    return {
        "general.architecture": arch,
        "general.name": "Tiny",
        # A vocabulary is long, and passed over.
        "tokenizer.ggml.tokens": [f"token {n}" for n in range(5000)],
        **{f"{arch}.{key}": given for key, given in (usual | more).items()},
    }


def block(number: int, up: int = 8, down: int = 8) -> list[Entry]:
    """A MoE block: attention in float16, a shared expert in q8_0, norms and router in float32."""
    name = f"blk.{number}"
    return [
        (f"{name}.attn_norm.weight", (32,), 0),
        (f"{name}.attn_q.weight", (32, 32), 1),
        (f"{name}.attn_k.weight", (32, 16), 1),
        (f"{name}.attn_v.weight", (32, 16), 1),
        (f"{name}.attn_output.weight", (32, 32), 1),
        (f"{name}.ffn_norm.weight", (32,), 0),
        (f"{name}.ffn_gate_inp.weight", (32, 4), 0),
        (f"{name}.ffn_gate_exps.weight", (32, 16, 4), up),
        (f"{name}.ffn_up_exps.weight", (32, 16, 4), up),
        (f"{name}.ffn_down_exps.weight", (16, 32, 4), down),
        (f"{name}.ffn_gate_shexp.weight", (32, 16), 8),
        (f"{name}.ffn_up_shexp.weight", (32, 16), 8),
        (f"{name}.ffn_down_shexp.weight", (16, 32), 8),
    ]


OUTSIDE: list[Entry] = [
    ("token_embd.weight", (32, 10), 1),
    ("output_norm.weight", (32,), 0),
    ("output.weight", (32, 10), 8),
]
