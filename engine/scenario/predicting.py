"""The predictor of a scenario, and what it costs the run: time in every layer visit, and memory where it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...kept import KEPT, digest_of, frozen
from ...workloads.batches import Step
from ...workloads.guesses import Guesses
from ...workloads.learned import load_weights
from ...workloads.predictors import SHIPPED, Predictor, make_predictor
from ...workloads.trace import RoutingTrace
from .amounts import ScenarioError
from .scenario import Scenario
from .sections import ON_GPU, PredictorSection


@dataclass(frozen=True)
class PredictorCost:
    """What one prediction takes on its lane and from where that is known, and the bytes of the predictor's weights."""

    latency_us: float = 0.0
    latency_source: str = "assumed"
    memory_bytes: int = 0
    gpu_memory_bytes: int = 0


FREE = PredictorCost()


def scenario_predictor(scenario: Scenario, first_layer: int = 0) -> Predictor:
    """Returns the predictor that a scenario names, for the model's layers from `first_layer` on.

    Raises ValueError if its weights cannot be used.
    """
    return make_predictor(scenario.predictor.name, seed=scenario.seed, **_options(scenario, first_layer))


def _options(scenario: Scenario, first_layer: int) -> dict[str, Any]:
    """Returns what a scenario says to its predictor."""
    section = scenario.predictor
    options: dict[str, dict[str, Any]] = {
        "oracle": {
            "recall": section.recall,
            "first_layer": first_layer,
            "by_horizon": tuple(section.recall_by_horizon or ()),
            "draft_recall": section.draft_recall,
        },
        "context": {"context": section.context},
        "learned": {"weights": section.weights},
    }
    return options.get(section.name, {})


def guesses_of(
    scenario: Scenario, first_layer: int, trace: RoutingTrace, steps: Sequence[Step], horizons: int, n: int
) -> Guesses:
    """Returns what a scenario's predictor guesses; the same arrays for the same question, where they are kept.

    A predictor of one's own is asked each time. Raises ValueError as `scenario_predictor` and its `guess` do.
    """
    predictor = scenario_predictor(scenario, first_layer)
    if type(predictor) not in SHIPPED:
        return predictor.guess(trace, steps, horizons, n)
    options = _options(scenario, first_layer)
    if "weights" in options:
        options["weights"] = load_weights(options["weights"])  # the same object for the same file
    known = [trace.experts, trace.present, trace.sequence, trace.position, trace.phase]
    rows = np.concatenate([step.rows for step in steps]) if steps else None
    asked = digest_of(
        [*known, trace.predictions, trace.confidences, rows, np.array([len(step.rows) for step in steps])]
    )
    key = (type(predictor), *options.items(), scenario.seed, trace.num_experts, asked, horizons, n)
    return KEPT.get(
        key,
        lambda: predictor.guess(trace, steps, horizons, n),
        lambda guesses: frozen([guesses.rows, guesses.experts, guesses.confidences]),
    )


def predictor_cost(section: PredictorSection) -> PredictorCost:
    """Returns what a scenario's predictor costs.

    A latency that the scenario leaves out is what was measured for the weights, on a GPU if the lane is one and it
    was measured there; 0 without weights, or on the lane "free". Raises ScenarioError if it was not measured at all.
    """
    given = section.latency_us
    if section.weights is None:
        return FREE if given is None else PredictorCost(given, "scenario")
    weights = load_weights(section.weights)
    on_gpu = section.lane in ON_GPU
    gpu_memory_bytes = weights.memory_bytes if on_gpu else 0
    if given is not None or section.lane == "free":
        return PredictorCost(given or 0.0, "scenario", weights.memory_bytes, gpu_memory_bytes)
    measured = weights.latency_us
    for device in ("cuda", "cpu") if on_gpu else ("cpu",):
        if device in measured:
            return PredictorCost(measured[device], f"measured on {device}", weights.memory_bytes, gpu_memory_bytes)
    raise ScenarioError(
        f"predictor.weights = {section.weights!r}: no latency was measured for lane {section.lane!r}: set "
        "predictor.latency_us"
    )
