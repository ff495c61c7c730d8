"""What a scenario would run with, as plain data, without running it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .load import load_inputs
from .loading.capacity import EXPERTS, LOW, described
from .scenario.origins import Key
from .scenario.scenario import Scenario
from .scenario.warnings import warnings_before


def shown(scenario: Scenario, keys: Sequence[Key]) -> dict[str, Any]:
    """Returns a scenario's keys with their origins, its model, its sums by memory, its runtime, and what to beware of.

    Loads what the scenario names; raises what loading does for what cannot run, or does not fit.
    """
    inputs = load_inputs(scenario)
    model, capacity, runtime = inputs.model, described(inputs), inputs.runtime
    gpus = [memory["parts"] for memory in capacity["memories"] if memory["kind"] == "gpu"]
    budget_bytes = sum(parts.get(name, 0) for parts in gpus for name in (EXPERTS, LOW))
    return {
        "scenario": scenario.plain(),
        "keys": [key._asdict() for key in keys],
        "model": {"name": model.name, "layers": model.layers, "experts": model.experts, "top_k": model.top_k},
        "expert_bytes_total": model.total_expert_bytes,
        "budget_bytes": budget_bytes,
        "capacity": capacity,
        "runtime": {"name": runtime.name, "title": runtime.title or runtime.name, "not_measured": runtime.unmeasured},
        "warnings": warnings_before(inputs, capacity),
    }
