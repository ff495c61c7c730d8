"""Small random runs, whole: a model, a trace, a machine and every setting that changes decisions or times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from tiny import books, tiny_inputs, tiny_model, tiny_profile

from prestage.engine.costs.costs import Costs, part_costs
from prestage.engine.decide.dispatch import Visit
from prestage.engine.decide.memory_manager import MemoryManager
from prestage.engine.loading.deciders import dispatched, make_manager, make_prefetch
from prestage.engine.measure.recording import Recording
from prestage.engine.policies.copy_order import COPY_ORDERS
from prestage.engine.policies.eviction import EVICTION
from prestage.engine.run import prepared, run, run_all
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import Scenario, make_scenario
from prestage.engine.scenario.sections import DISPATCH_MODES, EXPERT_KERNELS, EXPERT_ORDERS, PREDICTOR_LANES
from prestage.resources.profile import Profile
from prestage.workloads.batches import PREFILL_MODES
from prestage.workloads.model import Model
from prestage.workloads.predictors import PREDICTORS
from prestage.workloads.trace import RoutingTrace

#: A trace's recorded predictions reach this far; deeper lookahead wraps around small models more than once.
DEEPEST = 5


@dataclass(frozen=True)
class Case:
    """One small run."""

    model: Model
    profile: Profile
    trace: RoutingTrace
    scenario: Scenario

    def inputs(self) -> Inputs:
        """Load it afresh: guesses and all."""
        inputs: Inputs = tiny_inputs(self.model, self.profile, self.trace, self.scenario)
        return inputs

    def __repr__(self) -> str:
        """What hypothesis prints of a counterexample."""
        rows = [
            f"{name}={getattr(self.trace, name).tolist()}"
            for name in ("experts", "sequence", "phase", "present", "predictions")
            if getattr(self.trace, name) is not None
        ]
        changed = {
            name: {key: value for key, value in section.items() if value is not None}
            for name, section in self.scenario.plain().items()
            if isinstance(section, dict)
        }
        return f"Case({self.model},\n {self.profile.h2d},\n {changed},\n {', '.join(rows)})"


def play(inputs: Inputs) -> Recording:
    """Simulate it."""
    costs = Costs(inputs)
    return run(inputs, costs, make_manager(inputs), make_prefetch(inputs.scenario, inputs.model))


def played(inputs: Inputs, engine: str) -> list[tuple[bytes, ...]]:
    found: list[tuple[bytes, ...]] = books(run_all(inputs, prepared(inputs, part_costs(inputs)), engine=engine))
    return found


def decide(inputs: Inputs) -> tuple[list[Visit], MemoryManager]:
    """Make its decisions without a clock."""
    manager = make_manager(inputs)
    return list(dispatched(inputs, manager, make_prefetch(inputs.scenario, inputs.model))), manager


@st.composite
def cases(draw: st.DrawFn, /, **fixed: Any) -> Case:
    """Draw a run that can be run; `fixed` settings, such as `copy={"discipline": "fifo"}`, are kept."""
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    top_k = draw(st.integers(1, min(3, experts)))
    sizes = draw(st.integers(1, 30) | st.lists(st.integers(1, 30), min_size=layers, max_size=layers))
    model = tiny_model(
        layers,
        experts,
        top_k,
        dense_ns=draw(st.integers(0, 20)),
        copy_ns=sizes,
        head_ns=draw(st.integers(0, 10)),
        dense_kernels=draw(st.integers(1, 4)),
        expert_kernels=draw(st.integers(1, 3)),
    )
    trace = draw(traces(layers, experts, top_k))
    scenario = draw(scenarios(model, fixed))
    prompts = trace.phase == 0
    if scenario.workload.prefill == "skip" and prompts.all():
        trace.phase[0] = 1  # leave something to run
    by_host = scenario.prefetch.issued_by == "host"
    profile = tiny_profile(
        expert_ns=(expert_ns := draw(st.integers(1, 30))),
        beside_copy_ns=expert_ns + draw(st.integers(0, 10)),
        launch_ns=draw(st.integers(0, 6)),
        enqueue_ns=draw(st.integers(0, 4)),
        synchronize_ns=draw(st.integers(0, 5)),
        readback_ns=draw(st.integers(0, 5)),
        copy_gap_ns=draw(st.integers(0, 3)),
        kernel_gap_ns=draw(st.integers(0, 3)),
        alone_latency_ns=draw(st.integers(0, 5)),
        memory=draw(st.sampled_from(["pinned", "pinned", "pageable" if by_host else "pinned"])),
        io_lanes=draw(st.integers(1, 3)),
        read_latency_ns=draw(st.integers(0, 9)),
        order_ns=draw(st.integers(0, 3)),
    )
    return Case(model, profile, trace, scenario)


@st.composite
def traces(draw: st.DrawFn, layers: int, experts: int, top_k: int) -> RoutingTrace:
    """Draw a trace: sequences, perhaps interleaved, of prompts and answers, perhaps with gaps and predictions."""
    tokens = draw(st.integers(1, 20))
    # A number that stands for all the arrays: hypothesis need not know what is in them.
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    ranks = np.argsort(random.random((tokens, layers, experts)), axis=2)
    chosen = ranks[..., :top_k].astype(np.uint8)
    if draw(st.booleans()) and tokens > 1:  # some tokens repeat the one before
        for row in np.flatnonzero(random.random(tokens) < 0.5):
            chosen[row] = chosen[row - 1]
    sequences = draw(st.integers(1, 4))
    sequence = random.integers(0, sequences, tokens)
    if draw(st.booleans()):
        sequence = np.sort(sequence)
    phase = (random.random(tokens) >= draw(st.sampled_from([0.0, 0.3, 0.7]))).astype(np.uint8)
    present = None
    if draw(st.booleans()):
        present = random.random((tokens, layers)) < 0.8
        if draw(st.booleans()):  # of those that are routed, some choose fewer
            present = present[..., None] & (np.arange(top_k) < random.integers(1, top_k + 1, (tokens, layers, 1)))
        chosen[~present] = 0
    predictions = np.argsort(random.random((tokens, layers, DEEPEST, experts)), axis=3)[..., :2].astype(np.int16)
    predictions[random.random(predictions.shape) < 0.2] = -1
    trace = RoutingTrace(
        chosen,
        experts,
        sequence=sequence.astype(np.int32),
        phase=phase,
        present=present,
        predictions=predictions,
        weights=random.random(chosen.shape).astype(np.float16) if draw(st.booleans()) else None,
    )
    trace.check("a random trace")
    return trace


@st.composite
def scenarios(draw: st.DrawFn, model: Model, fixed: dict[str, dict[str, Any]]) -> Scenario:
    """Draw every setting that a run of this model may have."""
    scope = draw(st.sampled_from(["global", "per-layer"]))
    least = max(model.expert_bytes) * (model.layers if scope == "per-layer" else 1)
    most = model.total_expert_bytes * (model.layers if scope == "per-layer" and not model.uniform else 1)
    sections: dict[str, dict[str, Any]] = {
        "workload": {
            "trace": "none",
            "batch": draw(st.integers(1, 4)),
            "prefill": draw(st.sampled_from(PREFILL_MODES)),
            "chunk_tokens": draw(st.integers(1, 4)),
            "tokens": draw(st.none() | st.integers(1, 12)),
        },
        "memory": {"gpu_budget": f"{draw(st.integers(least, max(least, most)))}B", "scope": scope},
        "predictor": {
            # The trained one needs weights for just this model.
            "name": draw(st.sampled_from([name for name in PREDICTORS if name != "learned"])),
            "recall": draw(st.sampled_from([0.0, 0.5, 0.8, 1.0])),
            "lane": draw(st.sampled_from(PREDICTOR_LANES)),
            "latency_us": draw(st.sampled_from([0.0, 0.004, 0.021])),
        },
        "prefetch": {
            "lookahead": draw(st.integers(0, DEEPEST)),
            "k": draw(st.none() | st.integers(1, model.experts)),
            "protect": draw(st.sampled_from(["until_target", "none"])),
            "issue": draw(st.sampled_from(["after_launch", "before_launch"])),
        },
        "dispatch": {
            "mode": draw(st.sampled_from(DISPATCH_MODES)),
            "router_readback": draw(st.booleans()),
            "expert_order": draw(st.sampled_from(EXPERT_ORDERS)),
            "expert_kernel": draw(st.sampled_from(EXPERT_KERNELS)),
            "launch_queue_depth": draw(st.sampled_from([1, 3, 10, 1000])),
        },
        "copy": {
            "discipline": draw(st.sampled_from(list(COPY_ORDERS))),
            "chunk_bytes": draw(st.sampled_from([0, 0, 4, 11])),
            "contention": draw(st.booleans()),
        },
        "tiers": {
            "host_budget": draw(st.just("all") | st.integers(max(model.expert_bytes), 90).map("{}B".format)),
            "host_policy": draw(st.sampled_from(sorted(EVICTION))),
            "io_lanes": draw(st.none() | st.integers(1, 4)),
            "chunk_bytes": draw(st.sampled_from([0, 0, 3, 8])),
        },
    }
    for name, keys in fixed.items():
        sections.setdefault(name, {}).update(keys)
    if sections["tiers"]["host_budget"] != "all":
        sections["tiers"].setdefault("prefetch", draw(st.sampled_from(["gpu", "gpu", "host"])))
        if _may_be_exclusive(sections):
            sections["tiers"].setdefault("inclusion", draw(st.sampled_from(["inclusive", "exclusive"])))
    return make_scenario({"seed": draw(st.integers(0, 9)), **sections})


def _may_be_exclusive(sections: dict[str, dict[str, Any]]) -> bool:
    """Whether what the GPU evicts may come back to host memory (see `together`)."""
    memory, copy = sections["memory"], sections["copy"]
    others = (not memory.get("caching", True), memory.get("eviction") == "spent", copy.get("drop_stale", False))
    return not any(others) and "parallel" not in sections and "compression" not in sections
