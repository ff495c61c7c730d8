"""What goes together: drives, the CPU, preloading and budgets of a total with several GPUs; and what does not yet.

Cases worked by hand on the machine of round numbers: a dense part takes 3 ns, an expert 7, its copy 20, its read from
the drive 20, on the CPU 30; the hidden state of a token takes 16 ns to the host and back.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_cases import played
from random_scenarios import KEYS, accepted_of, composed
from tiny import check_books, tiny_model, tiny_pipeline, tiny_profile, tiny_scenario, tiny_trace

from prestage.engine.costs.costs import part_costs
from prestage.engine.load import load_inputs
from prestage.engine.loading.capacity import host_parts, memories
from prestage.engine.loading.deciders import make_manager
from prestage.engine.loading.offloading import cached_budgets, low_precision, served_experts
from prestage.engine.measure.merge import makespan_ns
from prestage.engine.measure.recording import Recording
from prestage.engine.run import prepared, run_all
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import make_scenario
from prestage.engine.scenario.together import APART
from prestage.engine.simulate import simulate_inputs
from prestage.resources.profile import load_profile
from prestage.resources.timeline import ACTIVATION, CPU_EXPERT, DEMAND, KINDS, READ
from prestage.workloads.trace import RoutingTrace

Engine = pytest.mark.parametrize("engine", ["simpy", "compiled"])
ON_CPU = {"policy": "cpu"}
TWO_LANES = {"io_lanes": 2}


def apart(*chosen: list[int]) -> RoutingTrace:
    """One decode token of each sequence: the expert that it chooses at each layer."""
    experts = [[[expert] for expert in of_layers] for of_layers in chosen]
    trace: RoutingTrace = tiny_trace(experts, sequence=np.arange(len(chosen), dtype=np.int32))
    return trace


def loaded(trace: RoutingTrace, machine: dict[str, Any] | None = None, **sections: Any) -> Inputs:
    """Two GPUs, as a scenario of them would be loaded; all tokens of the trace are one batch."""
    sections = {"workload": {"batch": trace.tokens}, **sections}
    profile = tiny_profile(gpus=2, **(machine or {}))
    inputs: Inputs = tiny_pipeline(tiny_model(trace.layers), profile, trace, tiny_scenario(**sections))
    return inputs


def ran(inputs: Inputs, engine: str) -> list[Recording]:
    recordings = run_all(inputs, prepared(inputs, part_costs(inputs)), engine=engine)
    check_books(recordings)
    return recordings


def spans(recording: Recording, kind: int) -> list[tuple[int, int]]:
    of_kind = recording.spans[recording.spans["kind"] == kind]
    return sorted((int(span["start_ns"]), int(span["end_ns"])) for span in of_kind)


# A drive under several GPUs.


@Engine
def test_a_pass_through_two_stages_reads_copies_and_computes_one_after_the_other(engine: str) -> None:
    inputs = loaded(apart([0, 0]), parallel={"stages": 2}, tiers={"host_budget": "4experts"})
    first, second = ran(inputs, engine)
    # Dense 3, read 20, copy 20, expert 7: 50 ns a layer, the second layer's on the other GPU.
    assert (spans(first, READ), spans(first, DEMAND)) == ([(3, 23)], [(23, 43)])
    assert (spans(second, READ), spans(second, DEMAND)) == ([(53, 73)], [(73, 93)])
    assert makespan_ns([first, second]) == 2 * (3 + 20 + 20 + 7)


@Engine
def test_gpus_that_copy_the_same_expert_read_it_once(engine: str) -> None:
    inputs = loaded(apart([0], [0]), parallel={"gpus": 2, "remote": "host"}, tiers={"host_budget": "4experts"})
    recordings = ran(inputs, engine)
    assert [spans(recording, READ) for recording in recordings] == [[(3, 23)], []]
    assert [spans(recording, DEMAND) for recording in recordings] == [[(23, 43)], [(23, 43)]]
    result = simulate_inputs(inputs, baselines=False)
    tiers = result.data["tiers"]
    assert (tiers["host_hits"], tiers["host_misses"], tiers["read_requests"], tiers["read_bytes"]) == (1, 1, 1, 20)
    assert tiers["read_utilization"] == 20 / 50


@Engine
def test_gpus_take_turns_at_the_one_drive(engine: str) -> None:
    # Sequence 0 lives on GPU 0 and chooses its expert 0; sequence 1 on GPU 1 chooses its expert 1.
    inputs = loaded(apart([0], [1]), parallel={"gpus": 2}, tiers={"host_budget": "4experts"})
    recordings = ran(inputs, engine)
    assert [spans(recording, READ) for recording in recordings] == [[(3, 23)], [(23, 43)]]
    assert makespan_ns(recordings) == 3 + 20 + 20 + 20 + 7
    wide = ran(loaded(apart([0], [1]), TWO_LANES, parallel={"gpus": 2}, tiers={"host_budget": "4experts"}), engine)
    assert [spans(recording, READ) for recording in wide] == [[(3, 23)], [(3, 23)]]


@Engine
def test_a_room_that_another_gpu_copies_from_is_read_into_once_that_has_ended(engine: str) -> None:
    # Host memory of one expert: GPU 0's is read at 3 and copied at 23; GPU 1's takes its room at 43.
    inputs = loaded(apart([0], [1]), TWO_LANES, parallel={"gpus": 2}, tiers={"host_budget": "1experts"})
    recordings = ran(inputs, engine)
    assert [spans(recording, READ) for recording in recordings] == [[(3, 23)], [(43, 63)]]
    assert makespan_ns(recordings) == 43 + 20 + 20 + 7


@Engine
def test_micro_batches_share_host_memory_on_one_gpu(engine: str) -> None:
    trace = apart([0], [0])
    inputs = loaded(trace, parallel={"micro_batches": 2}, tiers={"host_budget": "4experts"})
    (recording,) = ran(inputs, engine)
    assert spans(recording, READ) == [(3, 23)]


def test_the_whole_model_lies_on_the_drive_and_host_memory_has_its_budget_whatever_the_gpus() -> None:
    inputs = loaded(apart([0, 0]), parallel={"stages": 2}, tiers={"host_budget": "3experts"})
    assert host_parts(inputs) == {"experts": 60}
    assert {memory.name: memory.sum_bytes for memory in memories(inputs) if memory.kind != "gpu"} == {
        "host": 60,
        "drive": 160,
    }


# Misses on the CPU.


@Engine
def test_what_the_cpu_computes_is_read_first_where_host_memory_lacks_it(engine: str) -> None:
    trace = tiny_trace([[[0]], [[0]]])
    inputs = loaded(
        trace, workload={"batch": 1}, parallel={"micro_batches": 1}, miss=ON_CPU, tiers={"host_budget": "2experts"}
    )
    (recording,) = ran(inputs, engine)
    # Hidden state 3-19, read 3-23; back 53-69, when the head is done; the second token finds it in host memory.
    assert spans(recording, READ) == [(3, 23)]
    assert spans(recording, ACTIVATION) == [(3, 19), (53, 69), (72, 88), (118, 134)]
    assert spans(recording, CPU_EXPERT) == [(23, 53), (88, 118)]
    tiers = simulate_inputs(inputs, baselines=False).data["tiers"]
    assert (tiers["host_hits"], tiers["host_misses"]) == (1, 1)


@Engine
def test_a_room_that_the_cpu_reads_is_not_read_into_before_it_is_done(engine: str) -> None:
    # Room for one in host memory: expert 1 of the second sequence is read once the CPU has computed expert 0, at 53.
    inputs = loaded(apart([0], [1]), TWO_LANES, parallel={"gpus": 2}, miss=ON_CPU, tiers={"host_budget": "1experts"})
    recordings = ran(inputs, engine)
    assert [spans(recording, READ) for recording in recordings] == [[(3, 23)], [(53, 73)]]
    assert [spans(recording, CPU_EXPERT) for recording in recordings] == [[(23, 53)], [(73, 103)]]


@Engine
def test_the_next_stage_waits_for_what_the_cpu_computes_for_the_one_before(engine: str) -> None:
    inputs = loaded(apart([0, 0]), parallel={"stages": 2}, miss=ON_CPU)
    first, second = ran(inputs, engine)
    # Dense 3, hidden state 16, expert 30, result 16: 65 ns a layer.
    assert [spans(recording, CPU_EXPERT) for recording in (first, second)] == [[(19, 49)], [(84, 114)]]
    assert makespan_ns([first, second]) == 2 * 65


@Engine
def test_one_cpu_serves_all_gpus_one_expert_after_the_other(engine: str) -> None:
    inputs = loaded(apart([0], [1]), parallel={"gpus": 2}, miss=ON_CPU)
    recordings = ran(inputs, engine)
    assert [spans(recording, CPU_EXPERT) for recording in recordings] == [[(19, 49)], [(49, 79)]]
    miss = simulate_inputs(inputs, baselines=False).data["miss"]
    assert (miss["ways"]["cpu"], miss["tokens"]["cpu"], miss["cpu"]["busy_ms"] * 1e6) == (2, 2, 60)


@Engine
def test_tokens_go_to_the_cpu_of_their_experts_owner_and_their_results_come_back(engine: str) -> None:
    # Sequence 0 lives on GPU 0 and chooses GPU 1's expert 1: GPU 1 has it computed, and sends the result back.
    inputs = loaded(apart([1, 0]), {"peer_latency_ns": 5}, parallel={"gpus": 2}, miss=ON_CPU)
    recordings = ran(inputs, engine)
    (there,) = (spans(recording, KINDS.index("dispatch")) for recording in recordings[:1])
    ((start_ns, end_ns),) = spans(recordings[1], CPU_EXPERT)
    activations = spans(recordings[1], ACTIVATION)
    assert there[0][1] == activations[0][0] and activations[0][1] == start_ns and end_ns == activations[1][0]
    back = spans(recordings[0], KINDS.index("combine"))
    assert back[0][0] == activations[1][1]


def test_layers_for_the_cpu_are_the_models_whichever_stage_has_them() -> None:
    memory = {"preload": "layers", "cpu_layers": 3, "gpu_budget": "100%", "eviction": "static"}
    inputs = loaded(apart([0] * 4), parallel={"stages": 2}, memory=memory, miss=ON_CPU)
    # Layers 2 and 3 are the second stage's 0 and 1, of which the CPU has the first.
    assert [sorted(make_manager(part).assigned) for part in inputs.stages] == [[], [4, 5, 6, 7]]


# Preloading and totals.


@Engine
def test_gpus_that_share_the_experts_begin_with_their_own(engine: str) -> None:
    memory = {"preload": "layers", "gpu_budget": "100%"}
    inputs = loaded(apart([0, 0], [1, 1]), parallel={"gpus": 2}, memory=memory)
    for part in inputs.gpus:
        assert sorted(make_manager(part).assigned) == sorted(served_experts(part))
    recordings = ran(inputs, engine)
    assert makespan_ns(recordings) == 2 * (3 + 7)
    assert sum(len(spans(recording, DEMAND)) for recording in recordings) == 0
    assert host_parts(inputs) == {}  # what stays on the GPUs that serve it need not lie in host memory


@Engine
def test_what_was_preloaded_goes_to_spare_memory_like_any_other(engine: str) -> None:
    # GPU 0 has room for one of its experts 0 and 2, and begins with 0: 2 takes its room, and 0 comes back from GPU 1.
    memory = {"preload": "popular", "gpu_budget": "1experts"}
    trace = tiny_trace([[[0]], [[2]], [[0]]])
    inputs = loaded(trace, workload={"batch": 1}, parallel={"gpus": 2, "spare_bytes": "20B"}, memory=memory)
    first, _ = ran(inputs, engine)
    assert len(spans(first, DEMAND)) == 1
    assert simulate_inputs(inputs, baselines=False).data["sharing"]["copied_bytes"] == 40


def test_low_precision_copies_have_their_share_of_the_least_that_a_total_leaves() -> None:
    # 4 experts of 20 bytes; a total of 103 leaves 100 less 10 a token of the KV cache: 80, 80 and 70.
    model = replace(tiny_model(1), kv_bytes_per_token=10)
    trace = tiny_trace([[[0]], [[1]], [[2]]])
    scenario = tiny_scenario(
        memory={"gpu_budget": "100%", "total_bytes": "103B"}, miss={"policy": "low_precision", "low_share": 0.5},
        parallel={"micro_batches": 1},
    )  # fmt: skip
    inputs = tiny_pipeline(model, tiny_profile(), trace, scenario)
    assert inputs.budgets == [80, 80, 70]
    low, low_bytes = low_precision(inputs)
    assert (len(low), low_bytes) == (4, 20)  # 5 bytes each, of 35
    assert cached_budgets(inputs) == [60, 60, 50]
    result = simulate_inputs(inputs, baselines=False)
    assert result.recording.decoded.visits["budget_bytes"].tolist() == [60, 60, 40]  # in whole experts
    with pytest.raises(
        ScenarioError, match=r"memory\.total_bytes = '63B'.*low-precision copies 15 bytes, too little is left"
    ):
        tiny_pipeline(model, tiny_profile(), trace, scenario.model_copy(
            update={"memory": scenario.memory.model_copy(update={"total_bytes": "63B"})}
        ))  # fmt: skip


def test_each_gpu_that_shares_the_experts_has_the_kv_cache_of_its_own_sequences() -> None:
    model = replace(tiny_model(1), kv_bytes_per_token=10)
    trace = tiny_trace([[[0]], [[1]], [[1]]], sequence=np.array([0, 1, 1], dtype=np.int32))
    scenario = tiny_scenario(
        workload={"batch": 2}, memory={"gpu_budget": "100%", "total_bytes": "53B"}, parallel={"gpus": 2}
    )
    inputs = tiny_pipeline(model, tiny_profile(gpus=2), trace, scenario)
    # Of 50 bytes beside the dense part GPU 0 caches one token in step 0, GPU 1 one and then two; 40 are its experts.
    assert [part.budgets for part in inputs.gpus] == [[40, 40], [40, 30]]
    result = simulate_inputs(inputs, baselines=False)
    assert [gpu["budget_bytes"] for gpu in result.data["gpus"]] == [40, 40]


# Experts in fewer bytes.


@Engine
def test_compressed_experts_are_read_and_copied_in_fewer_bytes_on_every_stage(engine: str) -> None:
    packed = {"where": "host", "ratio": 0.5, "decompress_gb_per_s": 4.0, "decompress_us": 0.0, "lane": "compute"}
    inputs = loaded(apart([0, 0]), parallel={"stages": 2}, tiers={"host_budget": "4experts"}, compression=packed)
    first, second = ran(inputs, engine)
    # Dense 3, read 10, copy 10, decompressed in 5, expert 7: 35 ns a layer.
    assert (spans(first, READ), spans(first, DEMAND)) == ([(3, 13)], [(13, 23)])
    assert makespan_ns([first, second]) == 70


# Whatever goes together: both engines, and the books.


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 40, 10))
def test_random_compositions_end_alike_by_simpy_and_compiled(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + 10):
        inputs = accepted_of(composed(seed, tmp_path), seed)
        if inputs is not None:
            assert played(inputs, "compiled") == played(inputs, "simpy"), f"seed {seed}"


@pytest.mark.slow
def test_what_is_drawn_composes_several_gpus_with_drives_the_cpu_and_totals(tmp_path: Path) -> None:
    drawn: Counter[str] = Counter()
    for seed in range(60):
        inputs = accepted_of(composed(seed, tmp_path), seed)
        if inputs is None or len(inputs.parts) == 1:
            continue
        scenario = inputs.scenario
        drawn["several"] += 1
        drawn["drive"] += scenario.tiers.host_budget != "all"
        drawn["cpu"] += scenario.uses_cpu
        drawn["drive and cpu"] += scenario.uses_cpu and scenario.tiers.host_budget != "all"
        drawn["preload"] += scenario.memory.preload != "none"
        drawn["total"] += scenario.memory.total_bytes is not None
    assert drawn["several"] >= 15 and min(drawn.values()) >= 2, drawn


@pytest.mark.slow
def test_an_expert_read_in_a_hundred_requests_finds_room_for_all_that_waits_for_them(tmp_path: Path) -> None:
    profile = json.loads(load_profile("rtx3090-x2").model_dump_json(exclude_none=True))
    profile["nvme"] = json.loads(load_profile("rtx3090-nvme").model_dump_json(exclude_none=True))["nvme"]
    (tmp_path / "drive.json").write_text(json.dumps(profile))
    data = {
        "model": {"preset": "mixtral-8x7b", "layers": 3, "experts": 64, "top_k": 1},
        "workload": {"synthetic": {"tokens": 40, "sequences": 1, "prefill_tokens": 0}},
        "machine": {"profile": str(tmp_path / "drive.json")},
        "parallel": {"stages": 2, "dispatch_threads": "one"},
        "memory": {"gpu_budget": "9experts", "capacity": "ignore"},
        "tiers": {"host_budget": "3experts", "io_lanes": 5, "chunk_bytes": 2000001},
        "prefetch": {"policy": "top-k", "lookahead": 2},
    }
    inputs = load_inputs(make_scenario(data))
    assert played(inputs, "compiled") == played(inputs, "simpy")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_host_memory_holds_what_it_says_and_every_read_comes_before_its_use(seed: int, tmp_path: Path) -> None:
    inputs = accepted_of(composed(seed, tmp_path), seed)
    if inputs is None or inputs.scenario.tiers.host_budget == "all":
        return
    recordings = run_all(inputs, prepared(inputs, part_costs(inputs)), engine="simpy")
    check_books(recordings)
    host = recordings[0].host_memory
    assert host is not None
    assert host.manager.assigned_bytes <= host.manager.budget_bytes
    reads = sum(len(np.unique(r.spans["copy"][r.spans["kind"] == READ])) for r in recordings)
    assert reads == len(host.manager.copy_expert) == host.misses + host.staged_reads


# What does not.


def test_every_row_of_the_table_names_keys_that_there_are_and_says_what_to_do() -> None:
    for row in APART:
        assert row.what and row.why and row.instead
        assert not any(text.endswith(".") for text in (row.what, row.why, row.instead))


CLASHES: dict[str, dict[str, Any]] = {
    "memory.scope": {"memory": {"scope": "shared"}, "miss": ON_CPU},
    "parallel.gpus": {"memory": {"scope": "benefit"}, "parallel": {"gpus": 2}},
    "routing.policy": {"routing": {"policy": "cache-aware"}, "parallel": {"gpus": 2}},
    "compression.mixed": {"memory": {"scope": "per-layer"}, "compression": {"mixed": [[1, 0.5]]}},
    "low_precision": {"miss": {"policy": "low_precision"}, "compression": {"mixed": [[1, 0.5]]}},
    "dispatch.expert_kernel": {"miss": {"policy": "low_precision"}, "dispatch": {"expert_kernel": "grouped"}},
    "memory.caching": {"miss": {"policy": "low_precision"}, "memory": {"caching": False}},
    "dispatch.router_readback": {"dispatch": {"router_readback": False}, "parallel": {"gpus": 2}},
    "tiers.host_policy": {"tiers": {"host_budget": "50%", "host_policy": "belady"}, "parallel": {"stages": 2}},
    "tiers.inclusion": {"tiers": {"host_budget": "50%", "inclusion": "exclusive"}, "parallel": {"stages": 2}},
    "copy.discipline": {"copy": {"discipline": "priority"}, "parallel": {"gpus": 2, "remote": "peer"}},
    "compression.where": {
        "compression": {"where": "gpu", "decompress_gb_per_s": 1.0}, "parallel": {"gpus": 2, "remote": "peer"},
    },
    "parallel.remote": {"miss": ON_CPU, "parallel": {"gpus": 2, "remote": "cost"}},
    "miss.deferred_experts": {"miss": {**ON_CPU, "deferred_experts": 1}, "parallel": {"gpus": 2}},
    "prefetch.issued_by": {"prefetch": {"issued_by": "gpu"}, "tiers": {"host_budget": "50%"}},
    "copy.source": {"copy": {"source": "peer"}, "miss": ON_CPU},
    "workload.batch": {"requests": {}, "workload": {"batch": 2}},
}  # fmt: skip


@pytest.mark.parametrize("key", CLASHES)
def test_what_does_not_go_together_is_refused_by_its_row(key: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        tiny_scenario(**CLASHES[key])
    (row,) = [row for row in APART if f"{row.why}: {row.instead}" in str(caught.value)]
    assert key in str(caught.value)
    named = str(caught.value).split(f": {row.why}")[0]
    assert [each for each in KEYS if f"{each} = " in named]


def test_every_row_refuses_one_of_these() -> None:
    refused = set()
    for sections in CLASHES.values():
        with pytest.raises(ScenarioError) as caught:
            tiny_scenario(**sections)
        refused.add(next(row.what for row in APART if row.why in str(caught.value)))
    assert refused == {row.what for row in APART}
