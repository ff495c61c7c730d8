"""Warnings that go into the result: what makes a setting work badly, why, and what would help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..workloads.model import Model
from ..workloads.trace import RoutingTrace
from .scenario import Scenario


def cliff_warning(budget_bytes: int, expert_bytes: Sequence[int], k: int, scope: str, eviction: str) -> str | None:
    """Warn of a global LRU too small to keep anything from one token to the next; None if it is not.

    Between two visits of a layer at batch 1, k experts of every other layer are used. A global LRU that has no room
    for these and one more has evicted every expert before its layer comes round again: its hit rate is exactly 0.
    """
    least_bytes = k * sum(expert_bytes) - (k - 1) * max(expert_bytes)
    if scope != "global" or eviction != "lru" or budget_bytes >= least_bytes:
        return None
    layers = len(expert_bytes)
    return (
        f"cliff: this global LRU evicts every expert before it is used again, because one token uses "
        f"{(layers - 1) * k} experts of other layers in between ((layers - 1) x top-k): its decode hit rate at batch 1 "
        f"is exactly 0; use scope = per-layer, or a budget of at least {least_bytes / 2**20:,.1f} MiB"
    )


def warnings_of(
    trace: RoutingTrace, model: Model, budget_bytes: int, scenario: Scenario, data: dict[str, Any]
) -> list[str]:
    """Return the warnings of one run, given its metrics."""
    warnings = []
    if scenario.workload.batch == 1:
        memory = scenario.memory
        cliff = cliff_warning(budget_bytes, model.expert_bytes, trace.k, memory.scope, memory.eviction)
        warnings += [cliff] if cliff else []
    if data["estimates"]:
        warnings.append(
            f"estimated cost in use: {', '.join(data['estimates'])} by the profile's rule, not measured; "
            f"calibrate this machine, or read the rule under estimates"
        )
    if data["prefetch"]["useful"] and not data["predictor"]["latency_us"]:
        warnings.append("prediction is free: predictor.latency_us = 0; set it to what your predictor takes")
    if scenario.predictor.lane in ("gpu", "compute") and data["predictor"]["latency_source"] == "measured on cpu":
        warnings.append(
            f"the predictor's latency, {data['predictor']['latency_us']:.0f} us, was measured on a CPU and its lane is "
            "on the GPU: train it where there is one, or set predictor.latency_us"
        )
    return warnings
