"""What others' benchmarks and profilers print of decode steps, as settings and times: vLLM, SGLang, PyTorch.

Each is known by keys that only it has. A step of a server is what passes between two tokens of a sequence while as many
are decoded as may run at once; what a sequence begins with is its prompt and half of what it says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ...errors import InputError

#: What PyTorch's profiler names a step, where `profiler.step()` is called at its end.
_STEP = "ProfilerStep#"
#: Steps of a trace from which a median can be taken.
_LEAST_STEPS = 2


@dataclass(frozen=True)
class Seen:
    """What a log says of one setting: sequences at once, positions before a step, and what steps took, in ns."""

    name: str
    batch: int
    context: int | None
    samples: Sequence[float]


def seen(row: Mapping[str, Any], error: type[InputError]) -> Seen | None:
    """Returns what one object of a log says; None if no reader knows it. Raises `error` for one that lacks a part."""
    for knows, reads in _READERS:
        if all(key in row for key in knows):
            try:
                found = reads(row)
            except (KeyError, TypeError, ZeroDivisionError, IndexError) as problem:
                raise error(f"lacks a part of it: {type(problem).__name__}: {problem}") from problem
            except ValueError as problem:
                raise error(str(problem)) from problem
            if not all(isinstance(each, int | float) and 0 < each < 1e15 for each in found.samples):
                raise error("holds a time that is no number above 0")
            return found
    return None


def _profiled(trace: Mapping[str, Any]) -> Seen:
    """Returns the steps of a PyTorch profiler's trace: the marks of the host's thread, of which each has one."""
    marks = [event for event in trace["traceEvents"] if str(event.get("name", "")).startswith(_STEP)]
    steps = [float(event["dur"]) * 1e3 for event in marks if event.get("cat") == "user_annotation" and "dur" in event]
    if len(steps) < _LEAST_STEPS:
        raise ValueError(
            f"{len(steps)} marks {_STEP}…: call profiler.step() behind each of at least {_LEAST_STEPS} decode steps"
        )
    return Seen("profiled", 1, None, steps)


def _served_by_vllm(row: Mapping[str, Any]) -> Seen:
    """Returns `vllm bench serve --save-result`: the time between tokens, at the concurrency that was set."""
    return _served(row, row.get("max_concurrency"), row["completed"], "--max-concurrency")


def _served_by_sglang(row: Mapping[str, Any]) -> Seen:
    """Returns `sglang.bench_serving`, which also says how many requests ran at once in the mean."""
    return _served(row, row.get("max_concurrency") or row["concurrency"], row["completed"], "--max-concurrency")


def _served(row: Mapping[str, Any], at_once: Any, completed: int, option: str) -> Seen:
    if at_once is None:
        raise ValueError(f"max_concurrency is not there: how many sequences a step decodes is not known: set {option}")
    batch = max(1, round(float(at_once)))
    context = round((row["total_input_tokens"] + row["total_output_tokens"] / 2) / completed)
    return Seen(f"concurrency-{batch}", batch, context, [float(row["median_tpot_ms"]) * 1e6])


def _latency_of_vllm(row: Mapping[str, Any]) -> Seen:
    raise ValueError(
        "vllm bench latency says how long whole requests took, prompts included: give the result of vllm bench serve"
    )


def _one_batch(row: Mapping[str, Any]) -> Seen:
    """Returns a line of `sglang.bench_one_batch`: decoding of a batch, its steps' median."""
    context = round(row["input_len"] + row["output_len"] / 2)
    ns = float(row["median_decode_latency"]) * 1e9
    return Seen(f"batch-{row['batch_size']}-{row['input_len']}", int(row["batch_size"]), context, [ns])


def step_ns(samples: Sequence[float]) -> float:
    """Returns the middle of what steps took."""
    return float(median(samples))


#: The keys that only one kind of log has, and who reads it; the first that fits.
_READERS = (
    (("traceEvents",), _profiled),
    (("median_decode_latency", "batch_size", "input_len"), _one_batch),
    (("median_tpot_ms", "concurrency"), _served_by_sglang),
    (("median_tpot_ms", "total_input_tokens"), _served_by_vllm),
    (("avg_latency", "latencies"), _latency_of_vllm),
)
