"""What parts of an eager decoder take on a GPU: products of both layouts, the KV cache's growth, profiles of steps.

    python -m prestage.calibration.decode.parts OUT gpt-oss-20b=1,100 olmoe-1b-7b=4,8000

Products are of one to eight rows with weights that are cold, as (out, in) that `linear` takes, and as (in, out), as
gpt-oss keeps its experts. A model is decoded under PyTorch's profiler, all its experts on the GPU, in a batch of so
many sequences of so many tokens; its trace is written beside `parts.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from ...errors import InputError
from ...files import write_file
from ..device.cuda import Gpu
from ..device.profiler import record_profile
from .deciding import Filling
from .models import load
from .runtime import Runtime

#: (out, in) of matrices, and over how many rows.
SHAPES = ((5760, 2880), (2880, 2880), (2048, 2048), (1536, 2048), (2048, 768), (28672, 4096), (4096, 14336))
ROWS = (1, 2, 4, 8)
#: (sequences, KV heads, cached positions, width of a head) of a layer's keys, or values.
CACHES = ((1, 8, 8000, 64), (4, 8, 8000, 64), (4, 16, 8000, 128), (4, 4, 8000, 128), (1, 4, 100, 128))
#: Weights between two uses of the same ones, so that no cache of the GPU holds them.
_COLD_BYTES = 1 << 28
_REPEATS, _STEPS, _LAYERS = 7, 3, 3


def products(gpu: Any) -> Iterator[dict[str, Any]]:
    """Yields what products take, in us each, by layout, of many that follow each other."""
    for rows, columns in SHAPES:
        count = max(2, _COLD_BYTES // (2 * rows * columns))
        weights = [gpu.random(rows, columns, dtype="bfloat16", scale=0.02, seed=n) for n in range(count)]
        turned = [weight.view(columns, rows) for weight in weights]
        for tokens in ROWS:
            x = gpu.random(tokens, columns, dtype="bfloat16", scale=1.0, seed=99)
            for layout, call in (("out_in", partial(_linear, x, weights)), ("in_out", partial(_times, x, turned))):
                yield {"what": "product", "layout": layout, "out": rows, "in": columns, "rows": tokens,
                       "us": _us(gpu, call, count)}  # fmt: skip


def _linear(x: Any, weights: Sequence[Any]) -> None:
    from torch.nn.functional import linear

    for weight in weights:
        linear(x, weight)


def _times(x: Any, weights: Sequence[Any]) -> None:
    for weight in weights:
        x @ weight


def caches(gpu: Any) -> Iterator[dict[str, Any]]:
    """Yields what it takes to put one position behind a layer's keys and values as transformers' cache does, in us."""
    for shape in CACHES:
        sequences, heads, positions, width = shape
        kept = [gpu.random(*shape, dtype="bfloat16", scale=1.0, seed=n) for n in range(2)]
        new = [gpu.random(sequences, heads, 1, width, dtype="bfloat16", scale=1.0, seed=n) for n in range(2)]
        yield {"what": "cache", "sequences": sequences, "kv_heads": heads, "positions": positions, "width": width,
               "us": _us(gpu, partial(_grown, kept, new), 1)}  # fmt: skip


def _grown(kept: Sequence[Any], new: Sequence[Any]) -> None:
    import torch

    for pair in zip(kept, new, strict=True):
        torch.cat(pair, dim=-2)


def _us(gpu: Any, call: Callable[[], object], count: int) -> float:
    """Returns the median over repeats of what one of `count` in a call takes."""
    import torch

    taken: list[float] = []
    stream = gpu.stream()
    gpu.synchronize()
    use, args = gpu.use(stream)
    use(*args)
    with torch.inference_mode():
        for _ in range(_REPEATS + 2):
            first, last = gpu.event(), gpu.event()
            first.record(stream)
            call()
            last.record(stream)
            gpu.synchronize()
            taken.append(first.elapsed_time(last) * 1e3 / count)
    return round(float(median(taken[2:])), 3)


def profile(gpu: Any, model: str, batch: int, context: int, out: Path) -> None:
    """Decode some steps of a model's random weights under the profiler and write its trace."""
    import torch

    loaded = load(gpu, model, layers=_LAYERS)
    slots = loaded.layers * loaded.num_experts
    runtime = Runtime(gpu, loaded, slots)
    torch.manual_seed(1)
    prompt = runtime.fill(torch.randint(loaded.model.config.vocab_size, (batch, context), device=gpu.device))

    def decode() -> None:
        filling = Filling(loaded.layers, loaded.num_experts, loaded.layout.expert_bytes, slots)
        runtime.decode(prompt, filling, _STEPS)

    record_profile(decode, out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m prestage.calibration.decode.parts", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="*", metavar="MODEL=BATCH,CONTEXT")
    given = parser.parse_args(arguments)
    gpu = Gpu()
    rows = [*products(gpu), *caches(gpu)]
    write_file(given.out / "parts.json", json.dumps(rows, indent=1).encode() + b"\n")
    for text in given.models:
        try:
            name, _, words = text.partition("=")
            batch, context = map(int, words.split(","))
            profile(gpu, name, batch, context, given.out / f"{name}-b{batch}-c{context}.json.gz")
        except (InputError, ValueError) as error:
            print(f"{text}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
