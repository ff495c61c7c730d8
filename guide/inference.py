"""The guide's inference simulator: predictor, prefetch, access and timing, from one flat configuration.

It is a face, not a simulator. The configuration becomes a scenario, and its one workload runs twice with the same
decisions: through `VirtualMemoryManager`, in the guide's accounting and with every copy charged, and through the
overlapped engine, as `prestage run` would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..engine.load import load_inputs
from ..engine.measure.metrics import memory_steps
from ..engine.measure.recording import OUTCOMES
from ..engine.policies.eviction import EVICTION
from ..engine.scenario.inputs import Inputs
from ..engine.scenario.scenario import Scenario, load_scenario, make_scenario
from ..engine.scenario.sections import PREDICTOR_LANES
from ..engine.simulate import Result, simulate_inputs
from ..errors import InputError
from ..resources.profile import load_profile
from ..words import unknown_name
from ..workloads.batches import DECODE
from ..workloads.importers import open_trace
from ..workloads.model import load_model
from ..workloads.predictors import PREDICTORS
from ..workloads.trace import RoutingTrace
from .virtual_memory import (
    VirtualMemoryError,
    VirtualMemoryManager,
    check_held,
    check_size,
    check_whole,
    guesses_for_targets,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]

_MIB = 2**20
#: What the configuration does not say is as in this scenario.
_BASE = "guide-k10-2gb"


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """What to simulate: by default the guide's run, 500 tokens at 33.86 % prediction accuracy.

    Every one of `num_layers` layers has `num_experts` of `expert_size_mb` (MiB); `gpu_memory_limit_mb` (MiB) is for
    experts alone, and with the model's dense parts must fit the profile's GPU. The `prefetch_k` best guesses are
    prefetched one layer ahead; 0 prefetches nothing. Without `enable_caching`, what was brought for a layer leaves
    after it. `eviction` names a policy.

    `predictor` is a name of PREDICTORS, or the weights of a trained one. `prediction_accuracy` is the oracle's chance
    to name a true expert, `context_length` how many tokens back "context" looks; a trained one has its own context.
    A guess takes `predictor_latency_us` on `predictor_lane`; None: what the predictor itself says, else nothing.

    `trace` are the routing choices, a RoutingTrace or a file; None draws the guide scenarios' workload. Its decode
    tokens run one by one, the first `num_simulation_tokens` of them. `model` gives the dense parts that the overlapped
    engine computes, `profile` the costs. `seed` draws workload and oracle.
    Raises ValueError (VirtualMemoryError naming argument, value and what would be right).
    """

    num_simulation_tokens: int = 500
    prefetch_k: int = 10
    gpu_memory_limit_mb: float = 2048
    num_experts: int = 128
    num_layers: int = 12
    expert_size_mb: float = 27.0
    enable_caching: bool = True
    predictor: str = "oracle"
    prediction_accuracy: float = 0.3386
    context_length: int = 3
    trace: RoutingTrace | str | Path | None = None
    profile: str = "rtx3090"
    seed: int = 0
    eviction: str = "lru"
    model: str = "switch-base-128"
    predictor_lane: str = "gpu"
    predictor_latency_us: float | None = None

    def __post_init__(self) -> None:
        check_whole("num_simulation_tokens", self.num_simulation_tokens, 1)
        check_whole("num_experts", self.num_experts, 1, 1 << 15)
        check_whole("prefetch_k", self.prefetch_k, 0, self.num_experts, " (num_experts)")
        most = load_model(self.model).layers
        check_whole("num_layers", self.num_layers, 1, most, f" (the MoE layers of model {self.model!r})")
        check_size("expert_size_mb", self.expert_size_mb, 1 / _MIB, "more than 0")
        room = f"room for one expert of {self.expert_size_mb} MiB"
        check_size("gpu_memory_limit_mb", self.gpu_memory_limit_mb, self.expert_size_mb, room)
        check_whole("context_length", self.context_length, 1)
        check_whole("seed", self.seed, 0, 2**63 - 1)
        _check_number("prediction_accuracy", self.prediction_accuracy, 1.0)
        if self.predictor_latency_us is not None:
            _check_number("predictor_latency_us", self.predictor_latency_us, 1e9)
        if not isinstance(self.enable_caching, bool):
            raise VirtualMemoryError(f"enable_caching = {self.enable_caching!r}: must be True or False")
        if not isinstance(self.trace, RoutingTrace | str | Path | None):
            raise VirtualMemoryError(f"trace = {self.trace!r}: must be a RoutingTrace, a file's path or None")
        # A name that is no predictor's is that of weights, where there are predictors with weights.
        predictors = [self.predictor] if "learned" in PREDICTORS else PREDICTORS
        for name, known in (
            ("predictor", predictors),
            ("eviction", EVICTION),
            ("predictor_lane", PREDICTOR_LANES),
        ):
            if getattr(self, name) not in known:
                raise VirtualMemoryError(unknown_name(name, getattr(self, name), known))
        check_held(self.gpu_memory_limit_mb, load_profile(self.profile))

    def open_trace(self) -> RoutingTrace | None:
        """Returns the trace, checked against the rest of the configuration; None if it is to be drawn.

        Raises TraceError for a file that cannot be read, VirtualMemoryError for a trace of another shape.
        """
        if self.trace is None:
            return None
        trace = self.trace if isinstance(self.trace, RoutingTrace) else open_trace(self.trace)
        trace.check("trace")
        for name, given in (("num_layers", trace.layers), ("num_experts", trace.num_experts)):
            if getattr(self, name) != given:
                raise VirtualMemoryError(f"{name} = {getattr(self, name)}: the trace has {given}: set {name} = {given}")
        decoded = int((trace.phase == DECODE).sum())
        if decoded < self.num_simulation_tokens:
            raise VirtualMemoryError(
                f"num_simulation_tokens = {self.num_simulation_tokens}: the trace has {decoded} decode tokens"
            )
        return trace

    def scenario(self, top_k: int = 1) -> Scenario:
        """Returns the scenario of the overlapped run, for a router that takes `top_k` experts."""
        data = load_scenario(_BASE).plain()
        workload, tokens = data["workload"], int(self.num_simulation_tokens)
        if self.trace is not None:
            path = "a RoutingTrace" if isinstance(self.trace, RoutingTrace) else str(self.trace)
            workload |= {"trace": path, "synthetic": None}
        elif workload["synthetic"] is not None:
            workload["synthetic"]["tokens"] = tokens
        workload |= {"tokens": tokens, "prefill": "skip", "batch": 1}
        data["model"] = {
            "preset": self.model,
            "layers": int(self.num_layers),
            "experts": int(self.num_experts),
            "top_k": top_k,
            "expert_bytes": round(self.expert_size_mb * _MIB),
        }
        data["machine"]["profile"] = self.profile
        data["memory"] |= {
            "gpu_budget": f"{round(self.gpu_memory_limit_mb * _MIB)}B",
            "eviction": self.eviction,
            "caching": self.enable_caching,
        }
        data["predictor"] |= self._predictor()
        data["prefetch"] |= {"policy": "top-k", "k": int(self.prefetch_k), "lookahead": 1}
        if not self.prefetch_k:
            data["prefetch"] |= {"policy": "none", "k": None}
        return make_scenario({**data, "seed": int(self.seed)}, "InferenceConfig")

    def _predictor(self) -> dict[str, Any]:
        keys: dict[str, Any] = {"lane": self.predictor_lane}
        if self.predictor_latency_us is not None:
            keys["latency_us"] = float(self.predictor_latency_us)
        if self.predictor in PREDICTORS:
            recall, context = float(self.prediction_accuracy), int(self.context_length)
            return {**keys, "name": self.predictor, "recall": recall, "context": context}
        return {**keys, "name": "learned", "weights": str(self.predictor)}


class InferenceSimulator:
    """One configuration, run in the guide's accounting and overlapped; `run_simulation` computes everything.

    `scenario` is what `prestage run` would be given for the overlapped run.
    Raises ValueError where the configuration, its trace and its predictor do not fit together.
    """

    def __init__(self, config: InferenceConfig | None = None) -> None:
        self.config = config or InferenceConfig()
        trace = self.config.open_trace()
        self._inputs = load_inputs(self.config.scenario(1 if trace is None else trace.k), trace)
        self.scenario = self._inputs.scenario
        self._ran: tuple[VirtualMemoryManager, Result] | None = None

    def run_simulation(self) -> dict[str, Any]:
        """Run, and return plain data: what `VirtualMemoryManager.metrics` returns, and under "overlapped" the result.

        So "speedup", over "baseline_latency_ms", is the guide's, with prefetches hidden; "copies_charged" has the same
        run with every copy charged; and "overlapped" has `speedup`, `baseline_ms` and all else that `prestage run
        --json` prints. The same configuration gives the same data.
        """
        manager, _ = in_guides_accounting(self._inputs)
        self._ran = manager, simulate_inputs(self._inputs)
        return self.metrics()

    def metrics(self) -> dict[str, Any]:
        """Returns the data of the run; runs it if it has not run."""
        manager, result = self._finished()
        return {**manager.metrics(), "overlapped": result.data}

    def print_summary(self) -> None:
        """Print speed-up, baseline, latency and hits, in both accountings and overlapped."""
        from ..output.tables.guide import print_inference

        print_inference(self.metrics())

    def plot_latency(self, path: str | Path | None = None) -> Figure:
        """Draw what each token took, in both accountings and overlapped; also write it to `path` (.png, .pdf, .svg)."""
        from ..output.pictures import save
        from ..output.plots import plot_over_tokens

        figure = plot_over_tokens(self.token_latencies_ms(), title="Latency of each token")
        if path is not None:
            save(figure, path)
        return figure

    def plot_memory(self, path: str | Path | None = None, *, overlapped: bool = False) -> Figure:
        """Draw the memory in use over time, in the guide's accounting or overlapped; also write it to `path`."""
        from ..output.pictures import save
        from ..output.plots import plot_memory

        manager, result = self._finished()
        if not overlapped:
            return manager.plot_memory(path)
        figure = plot_memory(*memory_steps(result.recording), title="Expert memory, overlapped")
        if path is not None:
            save(figure, path)
        return figure

    def plot_hits(self, path: str | Path | None = None) -> Figure:
        """Draw how accesses split into hits and misses, in the guide's accounting and overlapped; also write it."""
        from ..output.pictures import save
        from ..output.plots import plot_split

        figure = plot_split(hit_split(self.metrics()), title="What accesses found")
        if path is not None:
            save(figure, path)
        return figure

    def token_latencies_ms(self) -> dict[str, Array]:
        """Returns what each token took, in ms (tokens,): with prefetches hidden, every copy charged, and overlapped.

        Overlapped it is from the end of the token before to its own end, computation included; else its accesses.
        """
        manager, result = self._finished()
        accesses = [event for event in manager.events if event.event in ("hit", "cache_hit", "miss")]
        token = np.array([event.token for event in accesses], dtype=np.int64)
        tokens = self.config.num_simulation_tokens
        return {
            "prefetches hidden": np.bincount(token, [event.latency_ms for event in accesses], tokens),
            "every copy charged": np.bincount(token, [event.charged_latency_ms for event in accesses], tokens),
            "overlapped": np.diff(result.recording.step_end_ns, prepend=0) / 1e6,
        }

    def _finished(self) -> tuple[VirtualMemoryManager, Result]:
        if self._ran is None:
            self.run_simulation()
        assert self._ran is not None
        return self._ran


def hit_split(metrics: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Returns how many accesses came out how: in the guide's accounting, which knows no late ones, and overlapped."""
    counts, overlapped = metrics["event_counts"], metrics["overlapped"]["counts"]
    guide = {"prefetch_hit": counts["hit"], "cache_hit": counts["cache_hit"], "late": 0, "miss": counts["miss"]}
    return {"guide's accounting": guide, "overlapped": {name: overlapped[name] for name in OUTCOMES}}


def in_guides_accounting(
    inputs: Inputs, *, share_across_layers: bool = False
) -> tuple[VirtualMemoryManager, dict[str, Any]]:
    """Run a scenario of batch 1 and experts of one size through the virtual memory manager; return it and metrics.

    Raises ValueError for another scenario: guesses are for the next layer, and rows run one by one.
    """
    scenario, model = inputs.scenario, inputs.model
    if any(len(step.rows) != 1 for step in inputs.steps) or len(set(model.expert_bytes)) != 1:
        raise InputError("the guide's accounting needs workload.batch = 1, decode tokens only, and experts of one size")
    manager = VirtualMemoryManager(
        model.experts,
        model.expert_bytes[0] / _MIB,
        inputs.budget_bytes / _MIB,
        0 if scenario.prefetch.policy == "none" else scenario.prefetch.k or model.top_k,
        scenario.memory.caching,
        num_layers=model.layers,
        share_across_layers=share_across_layers,
        eviction=scenario.memory.eviction,
        seed=scenario.seed,
        profile=scenario.machine.profile,
    )
    trace = inputs.trace.select(np.concatenate([step.rows for step in inputs.steps]))
    predictions = guesses_for_targets(inputs.guesses) if inputs.guesses is not None else ()
    return manager, manager.simulate_inference(trace, *predictions)


def _check_number(name: str, value: object, most: float) -> None:
    """Raise VirtualMemoryError unless an argument is a number from 0 to `most`."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not (number and 0 <= float(value) <= most):  # type: ignore[arg-type]
        raise VirtualMemoryError(f"{name} = {value!r}: must be a number, 0 to {most:g}")
