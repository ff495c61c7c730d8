"""A machine and a model whose every cost is a round number of ns, so that a reader can check a schedule by hand.

One byte takes one ns to copy, and the dense part of d bytes takes d ns; an expert's kernel takes what the test says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine.costs.costs import part_costs
from ..engine.load import steps_of
from ..engine.loading.deciders import make_prefetch
from ..engine.measure.recording import Recording
from ..engine.run import prepared, run_all
from ..engine.scenario.inputs import Inputs
from ..engine.scenario.predicting import predictor_cost
from ..engine.scenario.scenario import Scenario, make_scenario
from ..resources.profile import Profile
from ..resources.runtime import load_runtime
from ..workloads.model import Model
from ..workloads.predictors import make_predictor
from ..workloads.trace import RoutingTrace

ASSUMED = {"source": "assumed"}
HIDDEN = EXPERT_FF = 8


@dataclass(frozen=True)
class RoundCosts:
    """What things take on the machine, in ns unless they say otherwise; what is not given costs nothing.

    A drive reads a byte in a ns, as a copy does. Several `gpus` have wide links of their own to the host and to each
    other; copies between them take `peer_latency_ns` and one ns a byte, or nothing. An expert takes the CPU `cpu_ns`
    for up to four tokens, and in proportion for more.
    """

    expert_ns: int = 7
    beside_copy_ns: int | None = None
    launch_ns: int = 0
    enqueue_ns: int = 0
    synchronize_ns: int = 0
    readback_ns: int = 0
    copy_gap_ns: int = 0
    kernel_gap_ns: int = 0
    alone_latency_ns: int = 0
    memory: str = "pinned"
    cpu_ns: int = 30
    cpu_beside_copy_ns: int | None = None
    copy_beside_cpu: float = 1.0
    gpus: int = 1
    peer_latency_ns: int | None = None
    io_lanes: int = 1
    read_latency_ns: int = 0
    order_ns: int = 0

    def profile(self) -> Profile:
        """Returns the machine's profile."""
        experts, cpu = self._points()
        factors = {"copy_beside_compute": 1.0, "copy_beside_d2h": 1.0, "copies_sharing": 1.0}
        factors["copy_beside_cpu_experts"] = self.copy_beside_cpu
        return Profile.model_validate(
            {
                "name": "tiny",
                "device": "a machine of round numbers",
                "driver": "none",
                "date": "never",
                "source": "made for tests",
                "gpu_memory_bytes": 10**9,
                "h2d": {self.memory: _copies(self.alone_latency_ns, self.copy_gap_ns)},
                "d2h": _copies(self.readback_ns, 0),
                "compute": {
                    "experts": experts,
                    "cpu_experts": [cpu],
                    "rule": {
                        "constant_ns": 0,
                        "bytes_per_second": 10**9,
                        "flops_per_second": 10**18,
                        "beside_copy_factor": 1.0,
                        **ASSUMED,
                    },
                    "eager_gap": _fixed(self.kernel_gap_ns),
                    "graph_gap": _fixed(self.kernel_gap_ns),
                },
                "host": {
                    "launch": _fixed(self.launch_ns),
                    "graph_launch": _fixed(self.launch_ns),
                    "copy_enqueue": _fixed(self.enqueue_ns),
                    "synchronize": _fixed(self.synchronize_ns),
                },
                "peer": None if self.gpus == 1 else peers(self.peer_latency_ns),
                "topology": None if self.gpus == 1 else tiny_topology(self.gpus),
                "nvme": {
                    "read": _line(self.read_latency_ns),
                    "lanes": self.io_lanes,
                    "order": _fixed(self.order_ns),
                },
                "contention": {name: {"factor": factor, **ASSUMED} for name, factor in factors.items()},
            }
        )

    def _points(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Returns what an expert takes the GPU, by dispatch and tokens, and the CPU."""
        shape = {"hidden": HIDDEN, "expert_ff": EXPERT_FF, "dtype": "int8", **ASSUMED}
        beside_ns = self.expert_ns if self.beside_copy_ns is None else self.beside_copy_ns
        points = [
            {**shape, "tokens": tokens, "dispatch": dispatch, "ns": self.expert_ns, "beside_copy_ns": beside_ns}
            for dispatch in ("eager", "graph")
            for tokens in range(1, 9)
        ]
        beside_ns = self.cpu_ns if self.cpu_beside_copy_ns is None else self.cpu_beside_copy_ns
        return points, {**shape, "tokens": 4, "threads": 2, "ns": self.cpu_ns, "beside_copy_ns": beside_ns}


@dataclass(frozen=True)
class RoundSizes:
    """What the parts of a model take on the machine, in ns, and of how many kernels they are.

    `copy_ns` is of an expert, or a list of one for each layer.
    """

    dense_ns: int = 3
    copy_ns: int | list[int] = 20
    head_ns: int = 0
    dense_kernels: int = 1
    expert_kernels: int = 1


def _line(latency_ns: int) -> dict[str, Any]:
    return {"latency_ns": latency_ns, "bytes_per_second": 10**9, **ASSUMED}


def _fixed(ns: int) -> dict[str, Any]:
    return {"ns": ns, **ASSUMED}


def _copies(alone_ns: int, gap_ns: int) -> dict[str, Any]:
    return {"alone": _line(alone_ns), "queued": _line(0), "gap": _fixed(gap_ns)}


def tiny_profile(**costs: Any) -> Profile:
    """Returns the machine's profile; `costs` are the fields of `RoundCosts`."""
    return RoundCosts(**costs).profile()


def peers(latency_ns: int | None) -> dict[str, Any]:
    """Returns the costs of copies between GPUs."""
    free = {"points": [[0, 0], [1, 0]], **ASSUMED}
    line = {"latency_ns": latency_ns, "bytes_per_second": 10**9, **ASSUMED} if latency_ns is not None else free
    return {"alone": line, "queued": line, "gap": {"ns": 0, **ASSUMED}}


def tiny_topology(gpus: int, host_bytes_per_second: int = 10**15) -> dict[str, Any]:
    """Returns a host and so many GPUs, all linked with each other by wide links of their own."""
    nodes: list[dict[str, Any]] = [
        {"name": "host0", "kind": "host", "capacity_bytes": 10**12},
        {"name": "cpu0", "kind": "cpu"},
    ]
    nodes += [{"name": f"gpu{number}", "kind": "gpu", "capacity_bytes": 10**9} for number in range(gpus)]
    pairs = [("host0", "cpu0", "dram", host_bytes_per_second)]
    pairs += [("cpu0", f"gpu{number}", "pcie", 10**15) for number in range(gpus)]
    pairs += [(f"gpu{a}", f"gpu{b}", "nvlink", 10**15) for a in range(gpus) for b in range(a)]
    return {
        "nodes": [{**node, **ASSUMED} for node in nodes],
        "links": [
            {"ends": [a, b], "kind": kind, "bytes_per_second": rate, "latency_ns": 0, **ASSUMED}
            for a, b, kind, rate in pairs
        ],
    }


def tiny_model(layers: int, experts: int = 4, top_k: int = 1, **sizes: Any) -> Model:
    """Returns a model of so many layers, experts of each, and experts a token; `sizes` are fields of `RoundSizes`."""
    size = RoundSizes(**sizes)
    copy_ns = [size.copy_ns] * layers if isinstance(size.copy_ns, int) else size.copy_ns
    return Model(
        name="tiny",
        layers=layers,
        experts=experts,
        top_k=top_k,
        hidden=HIDDEN,
        expert_ff=EXPERT_FF,
        expert_matrices=3,
        expert_dtype="int8",
        dense_dtype="int8",
        expert_bytes=tuple(copy_ns),
        dense_bytes=(size.dense_ns,) * layers,
        head_bytes=size.head_ns,
        dense_kernels=size.dense_kernels,
        expert_kernels=size.expert_kernels,
    )


def tiny_trace(experts: list[list[list[int]]], num_experts: int = 4, **arrays: Any) -> RoutingTrace:
    """Returns a decode trace from experts[token][layer][rank]; other arrays as RoutingTrace takes them."""
    trace = RoutingTrace(np.array(experts, dtype=np.uint8), num_experts, **arrays)
    trace.check("tiny trace")
    return trace


def tiny_scenario(**sections: Any) -> Scenario:
    """Returns a scenario with these sections over: host free, no prefetch, room for 8 experts."""
    data: dict[str, dict[str, Any]] = {
        "workload": {"trace": "none"},
        "memory": {"gpu_budget": "8experts"},
        "predictor": {"recall": 1.0},
        "prefetch": {"lookahead": 0},
        "dispatch": {"mode": "free"},
    }
    for name, keys in sections.items():
        data[name] = {**data.get(name, {}), **keys}
    return make_scenario(data)


def tiny_inputs(model: Model, profile: Profile, trace: RoutingTrace, scenario: Scenario) -> Inputs:
    """Returns what a scenario would have loaded from files."""
    policy = make_prefetch(scenario, model)
    steps, guesses = steps_of(scenario, trace), None
    if policy.guesses:
        options = {"recall": scenario.predictor.recall} if scenario.predictor.name == "oracle" else {}
        predictor = make_predictor(scenario.predictor.name, seed=scenario.seed, **options)
        guesses = predictor.guess(trace, steps, policy.horizons, policy.guesses)
    budget_bytes = scenario.memory.budget_bytes(model.expert_bytes, model.experts)
    cost = predictor_cost(scenario.predictor)
    runtime = load_runtime(scenario.runtime.name)
    return Inputs(scenario, model, profile, trace, steps, budget_bytes, guesses, predictor=cost, runtime=runtime)


def record(inputs: Inputs, engine: str | None = None) -> Recording:
    """Simulate inputs on one GPU and return what was recorded: its `spans` say what ran when, on which lane.

    `engine` is one of `run.ENGINES`; None is what a run goes by.
    """
    ready = prepared(inputs, part_costs(inputs))
    (recording,) = run_all(inputs, ready) if engine is None else run_all(inputs, ready, engine=engine)
    return recording


def tiny_run(model: Model, profile: Profile, trace: RoutingTrace, scenario: Scenario) -> Recording:
    """Simulate hand-made inputs on one GPU and return what was recorded, as `record` does."""
    return record(tiny_inputs(model, profile, trace, scenario))
