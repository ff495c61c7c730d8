"""The sets of what runs beside the GPU's stream: experts on the CPU, a drive, compressed and grouped experts, two GPUs.

As `scenario_sets`: those that costs are fitted on, and others, with other traces, that they are validated on.
"""

from __future__ import annotations

from typing import Any

from .scenario_sets import Line, Sections, as_sections

#: What each does, by keys: of all that runs on one GPU, the machine, and how many threads compute.
_HERE = {"machine__profile": "h200-offload"}
#: Eight threads at half of what eight read (LIBRARIES of the machine): what policies go by.
_CPU = {**_HERE, "miss__policy": "cpu", "miss__cpu_threads": 8}
#: Qwen's experts in one byte a weight, or half of one, and a scale for each group.
_INT8 = {"model__dtype": "int8", "model__expert_bytes": 4_792_320}
_INT4 = {"model__dtype": "int4", "model__expert_bytes": 2_433_024}
_GOES_BY = {"miss__cpu_gb_per_s": 115.0}
_TOKENS = "workload__synthetic__tokens"
_BATCH = {"workload__batch": 4, "workload__synthetic__sequences": 4}
_DRIVE = {**_HERE, _TOKENS: 12, "tiers__host_budget": "60experts", "tiers__io_lanes": 4}
_LITTLE = {"tiers__host_budget": "30experts"}
_PACKED = {
    **_HERE, "compression__where": "host", "compression__ratio": 0.508, "compression__decompress_gb_per_s": 1000.0,
}  # fmt: skip
_IN_LINE = {"compression__lane": "compute"}
_GROUPED = {**_HERE, "dispatch__expert_kernel": "grouped"}
_GUESSES = {**_HERE, "predictor__latency_us": 20.0}
_UNEQUAL = {**_HERE, "model__expert_bytes": [9437184, 11010048, 14155776, 9961472]}
_TOTAL = {**_HERE, "memory__gpu_budget": "100%"}
_MIXTRAL = {_TOKENS: 24}


def _keys(*groups: dict[str, Any], **more: Any) -> Sections:
    merged: dict[str, Any] = {}
    for group in (*groups, more):
        merged |= group
    return as_sections(**merged)


def _line(
    shape: str, note: str, *groups: dict[str, Any], lookahead: int = 0, recall: float = 0.9, mode: str = "graph",
    readback: bool = True, **more: Any,
) -> Line:  # fmt: skip
    return Line(shape, mode, lookahead, recall, readback, _keys(*groups, **more), note)


FIT_BESIDE = [
    *(_line(shape, "cpu", _CPU) for shape in ("qwen", "deepseek", "switch")),
    _line("mixtral", "cpu", _CPU, _MIXTRAL),
    _line("qwen", "cpu", _CPU, lookahead=1),
    _line("deepseek", "cpu-batch4", _CPU, _BATCH),
    _line("qwen", "cpu-balanced", _CPU, _GOES_BY, miss__policy="balanced"),
    _line("qwen", "cpu-int8", _CPU, _INT8),
    _line("qwen", "cpu-int4", _CPU, _INT4),
    _line("qwen", "drive", _DRIVE),
    _line("switch", "drive", _DRIVE, _LITTLE, lookahead=1),
    _line("deepseek", "drive-pieces", _DRIVE, _LITTLE, tiers__chunk_bytes=4 * 2**20),
    _line("qwen", "packed", _PACKED, _IN_LINE),
    _line("mixtral", "packed", _PACKED, _MIXTRAL, _IN_LINE),
    _line("deepseek", "packed-gpu", _PACKED, _IN_LINE, compression__where="gpu"),
    _line("qwen", "packed-aside", _PACKED, lookahead=1),
    _line("qwen", "packed-gpu-aside", _PACKED, compression__where="gpu", memory__gpu_budget="60experts"),
    _line("qwen", "grouped", _GROUPED),
    _line("deepseek", "grouped-batch4", _GROUPED, _BATCH),
    _line("qwen", "predictor", _GUESSES, lookahead=1),
    _line("mixtral", "predictor", _GUESSES, _MIXTRAL, lookahead=1),
]

BESIDE = [
    # Experts on the CPU.
    _line("qwen", "cpu", _CPU),
    _line("deepseek", "cpu", _CPU, lookahead=1, recall=0.8),
    _line("switch", "cpu", _CPU, lookahead=1, recall=0.8),
    _line("mixtral", "cpu", _CPU, _MIXTRAL, lookahead=1, recall=0.8),
    _line("qwen", "cpu-batch4", _CPU, _BATCH),
    _line("qwen", "cpu", _CPU, mode="eager"),
    _line("qwen", "cpu-int8", _CPU, _INT8),
    _line("qwen", "cpu-int4", _CPU, _INT4, readback=False),
    _line("qwen", "cpu", _CPU, readback=False),
    _line("deepseek", "cpu-layers", _CPU, memory__preload="layers", memory__cpu_layers=2, memory__gpu_budget="50%"),
    _line("deepseek", "cpu-balanced", _CPU, _GOES_BY, miss__policy="balanced"),
    _line("qwen", "cpu-cost", _CPU, _GOES_BY, _BATCH, miss__policy="cost"),
    # A drive.
    _line("qwen", "drive", _DRIVE, tiers__host_budget="80experts"),
    _line("deepseek", "drive", _DRIVE, _LITTLE),
    _line("switch", "drive", _DRIVE, _LITTLE),
    _line("qwen", "drive", _DRIVE, lookahead=1, recall=0.8),
    _line("deepseek", "drive-two-lanes", _DRIVE, _LITTLE, lookahead=1, recall=0.8, tiers__io_lanes=2),
    _line("qwen", "drive-pieces", _DRIVE, tiers__chunk_bytes=2 * 2**20, tiers__io_lanes=8),
    _line("switch", "drive-host", _DRIVE, _LITTLE, lookahead=1, recall=0.8, tiers__prefetch="host"),
    # Compressed experts.
    _line("deepseek", "packed", _PACKED),
    _line("qwen", "packed-compute", _PACKED, _IN_LINE, lookahead=1, recall=0.8),
    _line("qwen", "packed-gpu", _PACKED, _IN_LINE, compression__where="gpu", memory__gpu_budget="60experts"),
    _line("mixtral", "packed", _PACKED, _MIXTRAL, lookahead=1, recall=0.8),
    _line("mixtral", "packed-gpu", _PACKED, _MIXTRAL, _IN_LINE, compression__where="gpu"),
    _line("deepseek", "packed-gpu-aside", _PACKED, compression__where="gpu", memory__gpu_budget="40experts"),
    _line("qwen", "packed-gpu-aside", _PACKED, compression__where="gpu", lookahead=1, recall=0.8),
    _line("qwen", "packed-aside", _PACKED, _BATCH),
    # Unequal sizes, grouped kernels, a predictor.
    _line("qwen", "unequal", _UNEQUAL, memory__gpu_budget="960MiB"),
    _line("qwen", "unequal", _UNEQUAL, lookahead=1, recall=0.8, memory__gpu_budget="1200MiB"),
    _line("deepseek", "grouped", _GROUPED),
    _line("qwen", "grouped", _GROUPED, lookahead=1, recall=0.8),
    _line("qwen", "grouped-batch4", _GROUPED, _BATCH, dispatch__expert_order="resident_first"),
    _line("deepseek", "predictor", _GUESSES, lookahead=1, recall=0.8),
    _line("switch", "predictor", _GUESSES, lookahead=2, recall=0.8),
    _line("qwen", "predictor-compute", _GUESSES, lookahead=1, recall=0.8, predictor__lane="compute"),
    # Others.
    _line("qwen", "preloaded", _HERE, memory__preload="popular"),
    _line("deepseek", "preloaded", _HERE, memory__preload="layers", memory__gpu_budget="50%"),
    _line("qwen", "total", _TOTAL, memory__total_bytes="2200MiB"),
    _line("switch", "total", _TOTAL, memory__total_bytes="4GiB", lookahead=1, recall=0.8),
    _line("qwen", "drive-and-cpu", _DRIVE, miss__policy="cpu", miss__cpu_threads=8),
    _line("deepseek", "preloaded", _HERE, memory__preload="popular", lookahead=1, recall=0.8, mode="eager"),
]  # fmt: skip

_SHARED = {
    "machine__profile": "h200-x2", "parallel__gpus": 2, "parallel__dispatch_threads": "one", "workload__batch": 8,
    "workload__synthetic__sequences": 8, _TOKENS: 80,
}  # fmt: skip
#: Prompts of 64 tokens, each in a step of its own: exchanges of a quarter of a mebibyte.
_PROMPTS = {"workload__prefill": "whole", "workload__synthetic__prefill_tokens": 64, _TOKENS: 576}
_ROOM = {"qwen": "120experts", "deepseek": "70experts"}


def _share(shape: str, note: str, **keys: Any) -> Line:
    return _line(shape, note, _SHARED, {"memory__gpu_budget": _ROOM[shape]}, **keys)


FIT_SHARED = [
    *(_share(shape, "tokens") for shape in ("qwen", "deepseek")),
    _share("qwen", "peer", parallel__remote="peer"),
    _share("deepseek", "tokens", lookahead=1),
    _share("deepseek", "tokens-large", memory__gpu_budget="128experts"),
]

SHARED = [
    *(_share(shape, "tokens-batch4", workload__batch=4) for shape in ("qwen", "deepseek")),
    *(_share(shape, "tokens", lookahead=1, recall=0.8) for shape in ("qwen", "deepseek")),
    *(_share(shape, "peer", parallel__remote="peer", workload__batch=4) for shape in ("qwen", "deepseek")),
    *(_share(shape, "cost", parallel__remote="cost") for shape in ("qwen", "deepseek")),
    _share("qwen", "spare", parallel__spare_bytes="600MiB", memory__gpu_budget="80experts"),
    _share("deepseek", "spare", parallel__spare_bytes="800MiB", memory__gpu_budget="50experts"),
    _share("qwen", "host", parallel__remote="host"),
    _share("deepseek", "tokens", mode="eager"),
    _share("qwen", "peer", parallel__remote="peer", lookahead=1, recall=0.8),
    *(_share(shape, "tokens-prompts", **_PROMPTS) for shape in ("qwen", "deepseek")),
]
