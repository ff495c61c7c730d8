"""Comparisons: runs side by side, and where the time between them arises, to the nanosecond.

A makespan is compute + stall + host + predictor + bubble + drain on every GPU, and idle under load, so the difference
of two makespans is the sum of the differences of these parts: nothing is left over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from ...bounded import read
from ...errors import InputError
from ..scenario.rows import flat
from .result_data import check_result

#: The parts of a makespan, in the order in which they are told.
PARTS = ("compute", "stall", "host", "predictor", "bubble", "drain", "idle")
#: What is set side by side, where the runs have it.
FIGURES = (
    "tokens_per_second",
    "sustained_tokens_per_second",
    "cold.tokens_per_second",
    "makespan_ms",
    "time_to_first_token_ms.mean",
    "time_to_first_token_ms.p99",
    "inter_token_latency_ms.p50",
    "inter_token_latency_ms.p95",
    "inter_token_latency_ms.p99",
    "time_per_output_token_ms.mean",
    "decode_step_ms.p50",
    "decode_step_ms.p99",
    "hit_rate",
    "late_rate",
    "access_latency_ms",
    "counts.miss",
    "miss.ways.cpu",
    "miss.ways.low_precision",
    "miss.ways.skipped",
    "miss.gate_mass.low_precision",
    "miss.gate_mass.skipped",
    "counts.prefetch",
    "bytes.demand",
    "bytes.prefetch",
    "overlap",
    "link_utilization",
    "memory_utilization",
    "sharing.imbalance",
    "budget_bytes",
    "speedup",
)


class CompareError(InputError):
    """Runs that cannot be compared."""


class Step(NamedTuple):
    """One bar of a waterfall: what it is, and where it starts and ends, in ns."""

    name: str
    start_ns: int
    end_ns: int


def read_result(path: Path) -> dict[str, Any]:
    """Returns the plain data of a result.json, given the file or the folder that holds it. Raises CompareError."""
    if path.is_dir():
        path = path / "result.json"
    try:
        data = orjson.loads(read(path, CompareError))
    except OSError as error:
        raise CompareError(f"{path}: cannot be read: {error.strerror}") from None
    except orjson.JSONDecodeError as error:
        raise CompareError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict) or not {"makespan_ms", "time", "scenario"} <= data.keys():
        raise CompareError(f"{path}: is no result of `prestage run --out`: it must have makespan_ms, time and scenario")
    try:
        check_result(data, FIGURES)
    except InputError as error:
        raise CompareError(f"{path}: is not as `prestage run --out` writes it: {error}") from None
    return data


def compare(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns two or more runs side by side, as plain data for JSON: all against the first.

    `figures` and `ratios` (to the first) are lists in the order of `runs`, None where undefined; `settings` are those
    that differ; `where` has, for every run but the first, each GPU's parts: from_ms, to_ms and their difference;
    `warnings` are those of each run.
    Raises CompareError.
    """
    if len(runs) < 2:
        raise CompareError("give at least two different runs to compare")
    names = list(runs)
    flattened = [flat(run) for run in runs.values()]
    figures = {name: _of(flattened, name) for name in FIGURES}
    figures = {name: values for name, values in figures.items() if any(value is not None for value in values)}
    first = runs[names[0]]
    parts_ns = {name: _parts_ns(name, run) for name, run in runs.items()}
    return {
        "runs": names,
        "settings": _differing([flat(run["scenario"]) for run in runs.values()]),
        "same_work": all(run.get("decode_tokens") == first.get("decode_tokens") for run in runs.values()),
        "figures": figures,
        "ratios": {name: [_ratio(value, values[0]) for value in values] for name, values in figures.items()},
        "where": {name: _where(parts_ns[names[0]], parts_ns[name]) for name in names[1:]},
        "warnings": {name: list(run.get("warnings", ())) for name, run in runs.items()},
    }


def waterfall(first: Mapping[str, Any], second: Mapping[str, Any], gpu: str = "gpu0") -> list[Step]:
    """Returns the bars that lead from one makespan to another: the first, each part's difference, the second."""
    parts = _parts_ns("first", first), _parts_ns("second", second)
    if not all(gpu in run for run in parts):
        raise CompareError(
            f"waterfall: a run has no {gpu}: its GPUs are {', '.join(min(parts, key=lambda run: gpu in run))}"
        )
    before, after = (run[gpu] for run in parts)
    at = sum(before.values())
    steps = [Step("first", 0, at)]
    for part in PARTS:
        steps.append(Step(part, at, at + after[part] - before[part]))
        at = steps[-1].end_ns
    return [*steps, Step("second", 0, at)]


def _parts_ns(name: str, run: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Returns the parts of a run's makespan on each GPU, in ns, which add up to it."""
    makespan_ns = round(run["makespan_ms"] * 1e6)
    parts_ns = {}
    # A result from before there were several GPUs has one.
    for gpu in run.get("gpus") or [{"device": "gpu0", "time": run["time"]}]:
        parts = {part: round(gpu["time"].get(f"{part}_ms", 0.0) * 1e6) for part in PARTS}
        if sum(parts.values()) != makespan_ns:
            raise CompareError(
                f"{name}: {gpu['device']}: the parts of time come to {sum(parts.values())} ns and makespan_ms to "
                f"{makespan_ns} ns"
            )
        parts_ns[gpu["device"]] = parts
    return parts_ns


def _where(
    before: Mapping[str, Mapping[str, int]], after: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Returns where two runs differ, on each GPU that both have."""
    return {
        gpu: {
            part: {
                "from_ms": parts[part] / 1e6,
                "to_ms": after[gpu][part] / 1e6,
                "difference_ms": (after[gpu][part] - parts[part]) / 1e6,
            }
            for part in PARTS
            if part != "idle" or parts[part] or after[gpu][part]
        }
        for gpu, parts in before.items()
        if gpu in after
    }


def _differing(scenarios: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns the settings that are not the same in all scenarios."""
    keys = dict.fromkeys(key for scenario in scenarios for key in scenario)
    listed = {key: _of(scenarios, key) for key in keys}
    return {key: values for key, values in listed.items() if any(value != values[0] for value in values)}


def _of(runs: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    return [run.get(name) for run in runs]


def _ratio(value: float | None, first: float | None) -> float | None:
    return value / first if value is not None and first else None
