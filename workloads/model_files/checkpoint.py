"""Checkpoints: what a model's folder of safetensors holds, by the files' headers or their index, to check shapes by."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ...bounded import check_json, read_json
from ..model import Model, ModelError
from .config_fields import Config
from .hf_config import language
from .named import CONFIG

INDEX = "model.safetensors.index.json"
#: Longer headers are none: a model of 100,000 tensors has some 15 MB.
_MOST_HEADER_BYTES = 256 << 20
#: Parts of a checkpoint that are not the language model: other senses, and layers that only guess ahead.
_OTHER = re.compile(r"(?:^|\.)(?:visual|vision\w*|audio\w*|mm_projector|multi_modal_projector|mtp|nextn)(?:\.|$)")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class Checkpoint(NamedTuple):
    """Bytes of a checkpoint's language model, and of what else it holds; None where only their sum is known."""

    model_bytes: int
    other_bytes: int | None
    read: str


def checkpoint_of(folder: Path) -> Checkpoint:
    """Returns what a folder's safetensors files hold; of their index alone, the bytes of all of it.

    Raises ModelError if there is neither, or one that cannot be read.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if files:
        blocks = _blocks(folder)
        sizes = [(name, size) for path in files for name, size in _tensors(path)]
        other = sum(size for name, size in sizes if _is_other(name, blocks))
        total = sum(size for _, size in sizes)
        return Checkpoint(total - other, other, f"the headers of {len(files)} safetensors files")
    index = folder / INDEX
    if not index.is_file():
        raise ModelError(f"{folder}: neither model*.safetensors nor {INDEX}: nothing to check by")
    total = _json(index).get("metadata", {}).get("total_size")
    if type(total) is not int or total < 1:
        raise ModelError(f"{index}: metadata.total_size = {total!r}: must be an integer of at least 1")
    return Checkpoint(total, None, f"total_size of {INDEX}")


def weight_bytes(model: Model) -> int:
    """Returns the bytes of all of a model's weights, a tied embedding once."""
    return (
        model.total_expert_bytes + sum(model.dense_bytes) + model.head_bytes + model.embedding_beside_head_bytes
    ) + model.host_table_bytes


def _is_other(name: str, blocks: int | None) -> bool:
    layer = _LAYER.search(name)
    beyond = blocks is not None and layer is not None and int(layer[1]) >= blocks
    return beyond or _OTHER.search(name) is not None


def _blocks(folder: Path) -> int | None:
    path = folder / CONFIG
    return language(Config(str(path), _json(path))).blocks if path.is_file() else None


def _tensors(path: Path) -> Iterator[tuple[str, int]]:
    """Yields the name and bytes of each tensor by a file's header; the file may be cut behind it."""
    try:
        with path.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            if length > _MOST_HEADER_BYTES:
                raise ModelError(f"{path}: a header of {length:,} bytes: damaged, or no safetensors")
            header = json.loads(check_json(stream.read(length), path, length, ModelError))
    except (OSError, struct.error, json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ModelError(f"{path}: no safetensors header") from None
    for name, entry in header.items() if isinstance(header, dict) else ():
        if name == "__metadata__":
            continue
        try:
            begin, end = entry["data_offsets"]
            yield name, int(end) - int(begin)
        except (TypeError, KeyError, ValueError):
            raise ModelError(f"{path}: {name}: data_offsets: must be two numbers") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(read_json(path, ModelError))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ModelError(f"{path}: not JSON") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path}: must be an object")
    return data
