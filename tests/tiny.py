"""A machine and a model whose every cost is a round number of ns, so that a reader can check a schedule by hand.

One byte takes one ns to copy, and the dense part of d bytes takes d ns; an expert's kernel takes what the test says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from prestage.engine.costs.costs import Costs
from prestage.engine.decide.memory_manager import MemoryManager
from prestage.engine.loading.loading import completed, steps_of
from prestage.engine.measure.merge import makespan_ns, merged_timeline
from prestage.engine.measure.metrics import Recording, time_split
from prestage.engine.policies.eviction import EVICTION
from prestage.engine.policies.prefetch import NoPrefetch
from prestage.engine.run import Prepared, make_manager, make_prefetch, part_costs, run, run_all
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.predicting import predictor_cost
from prestage.engine.scenario.scenario import Scenario, make_scenario
from prestage.resources.profile import Profile
from prestage.workloads.model import Model
from prestage.workloads.predictors import make_predictor
from prestage.workloads.trace import RoutingTrace

ASSUMED = {"source": "assumed"}
HIDDEN = EXPERT_FF = 8


def tiny_profile(
    *,
    expert_ns: int = 7,
    beside_copy_ns: int | None = None,
    launch_ns: int = 0,
    enqueue_ns: int = 0,
    synchronize_ns: int = 0,
    readback_ns: int = 0,
    copy_gap_ns: int = 0,
    kernel_gap_ns: int = 0,
    alone_latency_ns: int = 0,
    memory: str = "pinned",
    cpu_ns: int = 30,
    cpu_beside_copy_ns: int | None = None,
    copy_beside_cpu: float = 1.0,
    gpus: int = 1,
    peer_latency_ns: int | None = None,
    io_lanes: int = 1,
    read_latency_ns: int = 0,
    order_ns: int = 0,
) -> Profile:
    """Return a profile of round numbers; what is not given costs nothing. A drive reads a byte in a ns, as a copy.

    Several `gpus` have wide links of their own to the host and to each other; copies between them take
    `peer_latency_ns` and one ns a byte, or nothing.

    An expert takes the CPU `cpu_ns` for up to four tokens, and in proportion for more.
    """

    def line(latency_ns: int) -> dict[str, Any]:
        return {"latency_ns": latency_ns, "bytes_per_second": 10**9, **ASSUMED}

    def fixed(ns: int) -> dict[str, Any]:
        return {"ns": ns, **ASSUMED}

    def copies(alone_ns: int, gap_ns: int) -> dict[str, Any]:
        return {"alone": line(alone_ns), "queued": line(0), "gap": fixed(gap_ns)}

    points = [
        {
            "hidden": HIDDEN,
            "expert_ff": EXPERT_FF,
            "dtype": "int8",
            "tokens": tokens,
            "dispatch": dispatch,
            "ns": expert_ns,
            "beside_copy_ns": expert_ns if beside_copy_ns is None else beside_copy_ns,
            **ASSUMED,
        }
        for dispatch in ("eager", "graph")
        for tokens in range(1, 9)
    ]
    cpu_point = {
        "hidden": HIDDEN,
        "expert_ff": EXPERT_FF,
        "dtype": "int8",
        "tokens": 4,
        "threads": 2,
        "ns": cpu_ns,
        "beside_copy_ns": cpu_ns if cpu_beside_copy_ns is None else cpu_beside_copy_ns,
        **ASSUMED,
    }
    factors = {"copy_beside_compute": 1.0, "copy_beside_d2h": 1.0, "copies_sharing": 1.0}
    factors["copy_beside_cpu_experts"] = copy_beside_cpu
    return Profile.model_validate(
        {
            "name": "tiny",
            "device": "a machine of round numbers",
            "driver": "none",
            "date": "never",
            "source": "made for tests",
            "gpu_memory_bytes": 10**9,
            "h2d": {memory: copies(alone_latency_ns, copy_gap_ns)},
            "d2h": copies(readback_ns, 0),
            "compute": {
                "experts": points,
                "cpu_experts": [cpu_point],
                "rule": {
                    "constant_ns": 0,
                    "bytes_per_second": 10**9,
                    "flops_per_second": 10**18,
                    "beside_copy_factor": 1.0,
                    **ASSUMED,
                },
                "eager_gap": fixed(kernel_gap_ns),
                "graph_gap": fixed(kernel_gap_ns),
            },
            "host": {
                "launch": fixed(launch_ns),
                "graph_launch": fixed(launch_ns),
                "copy_enqueue": fixed(enqueue_ns),
                "synchronize": fixed(synchronize_ns),
            },
            "peer": None if gpus == 1 else peers(peer_latency_ns),
            "topology": None if gpus == 1 else tiny_topology(gpus),
            "nvme": {"read": line(read_latency_ns), "lanes": io_lanes, "order": fixed(order_ns)},
            "contention": {name: {"factor": factor, **ASSUMED} for name, factor in factors.items()},
        }
    )


def peers(latency_ns: int | None) -> dict[str, Any]:
    """Return the costs of copies between GPUs."""
    free = {"points": [[0, 0], [1, 0]], **ASSUMED}
    line = {"latency_ns": latency_ns, "bytes_per_second": 10**9, **ASSUMED} if latency_ns is not None else free
    return {"alone": line, "queued": line, "gap": {"ns": 0, **ASSUMED}}


def tiny_topology(gpus: int, host_bytes_per_second: int = 10**15) -> dict[str, Any]:
    """Return a host and so many GPUs, all linked with each other by wide links of their own."""
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


def tiny_model(
    layers: int,
    experts: int = 4,
    top_k: int = 1,
    *,
    dense_ns: int = 3,
    copy_ns: int | list[int] = 20,
    head_ns: int = 0,
    dense_kernels: int = 1,
    expert_kernels: int = 1,
) -> Model:
    """Return a model whose dense part, copy and head take these times on `tiny_profile`."""
    sizes = [copy_ns] * layers if isinstance(copy_ns, int) else copy_ns
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
        expert_bytes=tuple(sizes),
        dense_bytes=(dense_ns,) * layers,
        head_bytes=head_ns,
        dense_kernels=dense_kernels,
        expert_kernels=expert_kernels,
    )


def tiny_trace(experts: list[list[list[int]]], num_experts: int = 4, **arrays: Any) -> RoutingTrace:
    """Return a decode trace from experts[token][layer][rank]; other arrays as RoutingTrace takes them."""
    trace = RoutingTrace(np.array(experts, dtype=np.uint8), num_experts, **arrays)
    trace.check("tiny trace")
    return trace


def tiny_scenario(**sections: Any) -> Scenario:
    """Return a scenario with these sections over: host free, no prefetch, room for 8 experts."""
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
    """Return what a scenario would have loaded from files."""
    policy = make_prefetch(scenario, model)
    steps, guesses = steps_of(scenario, trace), None
    if policy.guesses:
        options = {"recall": scenario.predictor.recall} if scenario.predictor.name == "oracle" else {}
        predictor = make_predictor(scenario.predictor.name, seed=scenario.seed, **options)
        guesses = predictor.guess(trace, steps, policy.horizons, policy.guesses)
    budget_bytes = scenario.memory.budget_bytes(model.expert_bytes, model.experts)
    cost = predictor_cost(scenario.predictor)
    return Inputs(scenario, model, profile, trace, steps, budget_bytes, guesses, predictor=cost)


def tiny_pipeline(model: Model, profile: Profile, trace: RoutingTrace, scenario: Scenario) -> Inputs:
    """Return what a scenario of several stages or micro-batches would have loaded from files."""
    steps = steps_of(scenario, trace)
    return completed(Inputs(scenario, model, profile, trace, steps, budget_bytes=0, guesses=None))


def run_resident(inputs: Inputs) -> list[Recording]:
    """Run inputs with every expert in memory from the start, on all GPUs."""
    ready = []
    for part, costs in zip(inputs.parts, part_costs(inputs), strict=True):
        model = part.model
        manager = MemoryManager(model.expert_bytes, model.experts, model.total_expert_bytes, EVICTION["lru"])
        manager.preload(range(model.total_experts))
        ready.append(Prepared(part, costs, manager, NoPrefetch()))
    return run_all(inputs, ready)


def tiny_run(model: Model, profile: Profile, trace: RoutingTrace, scenario: Scenario) -> Recording:
    """Run a scenario over hand-made inputs."""
    inputs = tiny_inputs(model, profile, trace, scenario)
    return run(inputs, Costs(inputs), make_manager(inputs), make_prefetch(scenario, model))


def tiny_costs(model: Model, profile: Profile, scenario: Scenario, *, timed: bool = False) -> Costs:
    """Return what a scenario's costs are where nothing is run."""
    nothing = RoutingTrace(np.zeros((0, model.layers, model.top_k), dtype=np.uint8), model.experts)
    return Costs(Inputs(scenario, model, profile, nothing, [], budget_bytes=0, guesses=None), timed=timed)


def check_books(recordings: list[Recording]) -> npt.NDArray[Any]:
    """Check that every GPU's time comes to the makespan, that a visit's kernels of one kind wait for another GPU once,
    and that no lane overlaps itself; return all spans, merged.
    """
    run_ns = makespan_ns(recordings)
    for recording in recordings:
        assert sum(round(ms * 1e6) for ms in time_split(recording, run_ns).values()) == run_ns
        arrivals = recording.decoded.arrivals[["visit", "kind"]]
        assert len(np.unique(arrivals)) == len(arrivals)  # `time_split` looks for one each
    timeline = merged_timeline(recordings)
    spans = timeline.spans()
    assert len(spans) == sum(len(recording.spans) for recording in recordings)
    for lane in range(len(timeline.lanes)):
        busy = np.sort(spans[spans["lane"] == lane], order=["start_ns", "end_ns"])
        assert (busy["start_ns"][1:] >= busy["end_ns"][:-1]).all(), timeline.lanes[lane]
    return spans
