"""A result: all that a run says, part by part, and as the plain data that result.json has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...workloads.model import Model
from ..scenario.predicting import PredictorCost
from ..scenario.scenario import Scenario


@dataclass(frozen=True)
class RunResult:
    """All that a run says; `plain` lays the parts side by side."""

    #: What `merge.run_metrics` returns: counts, times and rates.
    figures: Mapping[str, Any]
    #: How many guesses were left once merged; None where nobody guesses.
    deduplication: Mapping[str, int] | None
    #: What each link between GPUs carried, and how GPUs shared experts; None where there is nothing of the kind.
    links: Sequence[Mapping[str, Any]] | None
    sharing: Mapping[str, Any] | None
    #: Makespans of baselines in ms, and what compares the run with them (`baselines.compared`).
    baselines: Mapping[str, float | None]
    #: Percentiles over runs with costs drawn from their uncertainty; None without such runs.
    replicates: Mapping[str, Any] | None
    #: What became of misses that were not fetched, and of experts in fewer bytes (`misses.offloading_metrics`).
    offloading: Mapping[str, Any]
    #: The rule of each cost that was estimated, by what it is of.
    estimates: Mapping[str, str]
    predictor: PredictorCost
    #: What every memory keeps (`capacity.described`).
    capacity: Mapping[str, Any]
    #: What identifies the guesses; None without any.
    predictions_sha256: str | None
    model: Model
    budget_bytes: int
    scenario: Scenario
    #: The versions of what made it, by package.
    versions: Mapping[str, str]
    warnings: Sequence[str] = ()
    #: What requests under load came to (`request_metrics.run_requests`); None without them.
    requests: Mapping[str, Any] | None = None

    def plain(self) -> dict[str, Any]:
        """Returns the result as plain data for JSON, in the order of result.json; parts not there have no key."""
        model = self.model
        parts = {"requests": self.requests, "links": self.links, "sharing": self.sharing}
        return {
            **self.figures,
            "deduplication": self.deduplication,
            **{name: part for name, part in parts.items() if part is not None},
            **self.baselines,
            **({} if self.replicates is None else {"replicates": self.replicates}),
            **self.offloading,
            "estimates": self.estimates,
            "seed": self.scenario.seed,
            "predictor": asdict(self.predictor),
            "capacity": self.capacity,
            "warnings": list(self.warnings),
            "predictions_sha256": self.predictions_sha256,
            "model": {"name": model.name, "layers": model.layers, "experts": model.experts, "top_k": model.top_k},
            "budget_bytes": self.budget_bytes,
            "expert_bytes_total": model.total_expert_bytes,
            "scenario": self.scenario.plain(),
            "versions": self.versions,
        }
