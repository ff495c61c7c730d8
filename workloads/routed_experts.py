"""Importers of arrays (tokens, layers, k): what engines return for routing replay, and what llama.cpp's debug prints.

SGLang, vLLM and TensorRT-LLM return `routed_experts` with a completion: nested lists, or a `.npy` file's bytes in
base64. A `.npy` file itself, and a list of completions, are read too. Prompt tokens are prefill where their number is
said (`prompt_tokens`).
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bounded import allowed_bytes, check_json, read
from .batches import DECODE, PREFILL
from .token_lists import assemble, tokens_of_steps
from .trace import RoutingTrace
from .trace_limits import TraceError

Array = npt.NDArray[Any]

#: What engines call the array.
KEYS = ("routed_experts", "expert_ids", "topk_ids", "expert_indices")
_MAGIC = b"\x93NUMPY"
#: What llama-eval-callback prints: the layer, the shape, and rows of numbers.
_PRINTED = re.compile(r"ffn_moe_topk-(\d+)\s*=\s*\(i32\)[^\n]*=\s*\{\s*(\d+),\s*(\d+)[^\n]*\}")
_NUMBERS = re.compile(r"\[\s*(-?[\d][-\d., ]*)\s*\]")


def import_arrays(path: Path, num_experts: int | None) -> RoutingTrace:
    """Read a `.npy` array (tokens, layers, k), or JSON that holds one, of a completion or of each of several.

    Each completion is a sequence. Without a number of experts, the highest id and 1 are taken.
    """
    content = read(path, TraceError)
    if content.startswith(_MAGIC):
        found = [(_npy(path, content), 0)]
    else:
        found = list(_arrays(path, _documents(path, content)))
    if not found:
        raise TraceError(f"{path}: no {KEYS[0]} found: must hold an array (tokens, layers, k) under that name")
    shapes = {array.shape[1:] for array, _ in found}
    if len(shapes) > 1:
        raise TraceError(f"{path}: arrays of {sorted(shapes)} layers and choices: must be of one model")
    experts = np.concatenate([array for array, _ in found])
    lengths = [len(array) for array, _ in found]
    meta: dict[str, Any] = {"source": f"imported from {path.name}"}
    if num_experts is None:
        num_experts = int(experts.max(initial=0)) + 1
        meta["experts_from"] = "the highest id"
    if experts.size and (experts.min() < 0 or experts.max() >= num_experts):
        wrong = int(experts.min() if experts.min() < 0 else experts.max())
        raise TraceError(f"{path}: expert {wrong}: must be 0..{num_experts - 1}")
    phase = [np.where(np.arange(len(array)) < prompt, PREFILL, DECODE) for array, prompt in found]
    return RoutingTrace(
        experts=experts,
        num_experts=num_experts,
        sequence=np.repeat(np.arange(len(found), dtype=np.int32), lengths),
        phase=np.concatenate(phase).astype(np.uint8),
        meta=meta,
    )


def import_eval_callback(path: Path, num_experts: int | None) -> RoutingTrace:
    """Read `ffn_moe_topk-N` as llama.cpp's llama-eval-callback prints it; run it with `-lv 2`, or it leaves some out.

    A layer that is not above the last one begins the next step; steps are as `import_topk_ids` takes them.
    """
    text = read(path, TraceError).decode("utf-8", "replace")
    steps: list[dict[int, Any]] = []
    last = -1
    matches = list(_PRINTED.finditer(text))
    for at, match in enumerate(matches):
        layer, k, tokens = (int(match[n]) for n in (1, 2, 3))
        where = f"line {text.count(chr(10), 0, match.start()) + 1}"
        block = text[match.end() : matches[at + 1].start() if at + 1 < len(matches) else len(text)]
        rows = _printed_rows(block.partition("sum =")[0])
        if len(rows) != tokens or any(len(row) != k for row in rows):
            raise TraceError(f"{path}: {where}: ffn_moe_topk-{layer}: not {tokens} rows of {k}: print all (-lv 2)")
        if layer <= last or not steps:
            steps.append({})
        steps[-1][layer] = (where, rows)
        last = layer
    if not steps:
        raise TraceError(f"{path}: no ffn_moe_topk-N found: must be what llama-eval-callback prints")
    numbers = sorted({layer for step in steps for layer in step})
    return assemble(path, list(tokens_of_steps(path, steps, numbers)), num_experts, {"moe_layers": numbers})


def _printed_rows(block: str) -> list[list[int]]:
    """Returns the rows of a printed tensor; none if some of it is left out."""
    if "..." in block:
        return []
    try:
        return [[int(float(each)) for each in row.split(",") if each.strip()] for row in _NUMBERS.findall(block)]
    except (ValueError, OverflowError):
        return []


def _documents(path: Path, content: bytes) -> list[Any]:
    """Returns the JSON document of a file, or those of its lines."""
    check_json(content, path, len(content), TraceError)
    try:
        return [json.loads(content)]
    except (ValueError, RecursionError) as error:
        try:
            return [json.loads(line) for line in content.splitlines() if line.strip()]
        except (ValueError, RecursionError):
            raise TraceError(f"{path}: not JSON ({' '.join(str(error).split())})") from None


def _arrays(path: Path, documents: list[Any]) -> Iterator[tuple[Array, int]]:
    for value, prompt in (each for document in documents for each in _named(document)):
        if isinstance(value, str):
            try:
                content = base64.b64decode(value, validate=True)
            except (binascii.Error, ValueError):
                content = b""
            if not content.startswith(_MAGIC):
                raise TraceError(f"{path}: {KEYS[0]}: bytes without a shape: save the array as .npy")
            yield _npy(path, content), prompt
            continue
        try:
            array = np.array(value)
        except ValueError:
            raise TraceError(f"{path}: {KEYS[0]}: rows of different lengths: must be (tokens, layers, k)") from None
        yield _checked(path, array), prompt


def _named(value: Any, prompt: int = 0, depth: int = 8) -> Iterator[tuple[Any, int]]:
    """Yields each array of a document, and how many of its tokens are the prompt's."""
    if depth == 0:
        return
    if isinstance(value, dict):
        given = value.get("prompt_tokens")
        prompt = given if type(given) is int else prompt
        key = next((key for key in KEYS if _deep(value.get(key)) or isinstance(value.get(key), str)), None)
        if key is not None:
            yield value[key], prompt
            return
        for each in value.values():
            yield from _named(each, prompt, depth - 1)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for each in value:
            yield from _named(each, prompt, depth - 1)


def _deep(value: Any) -> bool:
    """Returns whether it is a list of lists of lists."""
    for _ in range(3):
        if not isinstance(value, list) or not value:
            return False
        value = value[0]
    return True


def _npy(path: Path, content: bytes) -> Array:
    try:
        stream = io.BytesIO(content)
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(stream)
        if dtype.hasobject or dtype.itemsize * int(np.prod(shape, dtype=object)) > allowed_bytes(len(content)):
            raise ValueError("objects, or larger than the file")
        return _checked(path, np.load(io.BytesIO(content), allow_pickle=False))
    except TraceError:
        raise
    except (ValueError, EOFError, OSError, SyntaxError, MemoryError, OverflowError) as error:
        raise TraceError(f"{path}: damaged .npy array: {' '.join(str(error).split())}") from None


def _checked(path: Path, array: Array) -> Array:
    if array.ndim != 3 or array.dtype.kind not in "iu" or 0 in array.shape:
        raise TraceError(
            f"{path}: {KEYS[0]}: shape {array.shape} of {array.dtype}: must be integers (tokens, layers, k)"
        )
    return array
