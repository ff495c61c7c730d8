"""The answer of a run in a few sentences: what was asked, how fast it is, what binds, and what would help."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..engine.prediction import Range
from .tables.layout import known_of, time_of
from .tables.runs import known_digits

#: What each part of the time is, and what would make it less where no warning says more.
_PARTS: dict[str, tuple[str, str]] = {
    "compute": ("computing", "a faster GPU or a smaller dtype; no cache and no prefetch shortens it"),
    "stall": ("waiting for experts' bytes", "more GPU memory for experts, a smaller dtype, or a faster link"),
    "host": ("waiting for the host's thread", "graphs, grouped kernels or a larger batch"),
    "predictor": ("waiting for guesses", "a quicker predictor, or none"),
    "bubble": ("GPUs that wait for each other", "more micro-batches, or another split or placement"),
    "drain": ("the ends of the GPUs' work", "a longer run"),
    "idle": ("waiting for requests", "nothing: the load is lower than what it bears"),
}
#: Below these shares a difference in speed is none, and a part of the time is not worth a word beside the largest.
_SAME, _MINOR = 0.01, 0.1
#: Warnings that are about what costs rest on, and not about the setting.
_OF_COSTS = ("estimated cost in use", "uncalibrated cost in use", "prediction is free", "latency of a CPU")


def answer_of(data: Mapping[str, Any]) -> str:
    """Returns a run's answer in words, given its result as plain data."""
    sentences = [_asked(data), _speed(data), _binds(data), _helps(data)]
    return " ".join(sentence for sentence in sentences if sentence)


def difference_of(first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str]) -> str:
    """Returns in words how a run differs from another of the same work: by how much, and in which parts of the time.

    `first` and `second` are results as plain data, `names` what they are called.
    """
    one, other = names
    rates = [data["tokens_per_second"] for data in (first, second)]
    if not all(rates):
        return ""
    shown = [known_of(rate, known_digits(data)) for rate, data in zip(rates, (first, second), strict=True)]
    gain = rates[1] / rates[0] - 1
    how = "as fast as" if abs(gain) < _SAME else f"{abs(gain):.0%} {'faster' if gain > 0 else 'slower'} than"
    said = f"{other} is {how} {one}: {shown[1]} tokens per second against {shown[0]}."
    parts = {key.removesuffix("_ms"): second["time"][key] - first["time"][key] for key in second["time"]}
    largest = max(map(abs, parts.values()))
    most = sorted((part for part in parts if abs(parts[part]) > _MINOR * largest), key=lambda part: -abs(parts[part]))
    makespan_ms = second["makespan_ms"] - first["makespan_ms"]
    if not most or not round(makespan_ms * 1e6):
        return said
    changes = [
        f"{time_of(abs(parts[part]), 3)} {'more' if parts[part] > 0 else 'less'} {_PARTS[part][0]}" for part in most
    ]
    longer = f"takes {time_of(abs(makespan_ms), 3)} {'longer' if makespan_ms > 0 else 'less'}"
    return f"{said} Its run {longer}: {', '.join(changes)}."


def _asked(data: Mapping[str, Any]) -> str:
    scenario = data["scenario"]
    share = data["budget_bytes"] / data["expert_bytes_total"]
    runtime = scenario.get("runtime", {}).get("name", "prestage")
    return (
        f"How fast does {data['model']['name']} decode on {scenario['machine']['profile']}, by {runtime}, with room "
        f"for {min(1.0, share):.0%} of its experts on the GPU?"
    )


def _speed(data: Mapping[str, Any]) -> str:
    rate, digits = data["tokens_per_second"], known_digits(data)
    if rate is None:
        return "Nothing was decoded."
    band = (data.get("range") or {}).get("tokens_per_second")
    known = ""
    if band is not None:
        low, high = (known_of(each, digits) for each in (Range(**band).p5, Range(**band).p95))
        known = f" ({low} to {high}, as not all costs were measured)" if low != high else ""
    many = f" of {data['requests']['requests']:,} requests" if "requests" in data else ""
    batch = data["scenario"]["workload"]["batch"]
    many = many or (f" of {batch} sequences together" if batch > 1 else "")
    return f"At {known_of(rate, digits)} tokens per second{many}{known}."


def _binds(data: Mapping[str, Any]) -> str:
    parts, makespan_ms = data["time"], data["makespan_ms"]
    if not makespan_ms:
        return ""
    key = max(parts, key=lambda each: parts[each])
    what = _PARTS[key.removesuffix("_ms")][0]
    said = f"{parts[key] / makespan_ms:.0%} of the time is {what}"
    if data.get("resident_ms"):
        said += f"; with all experts resident it would take {data['resident_ms'] / makespan_ms:.0%} of the time"
    return f"{said}."


def _helps(data: Mapping[str, Any]) -> str:
    """Returns what the gravest warning of the setting would do, or what the largest part of the time asks for."""
    for warning in data["warnings"]:
        name, _, rest = warning.partition(": ")
        if name not in _OF_COSTS:
            return f"What would help ({name}): {rest.rpartition('; ')[2]}."
    key = max(data["time"], key=lambda each: data["time"][each])
    return f"What would help: {_PARTS[key.removesuffix('_ms')][1]}."
