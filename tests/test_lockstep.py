"""GPUs that share the experts of every layer, in time: small schedules by hand, and what holds in all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cases import Case, cases, play, played
from tiny import (
    ASSUMED,
    HIDDEN,
    check_books,
    peers,
    run_alike,
    tiny_model,
    tiny_pipeline,
    tiny_profile,
    tiny_scenario,
    tiny_topology,
    tiny_trace,
)

from prestage.engine.costs.all_to_all import AllToAll
from prestage.engine.costs.costs import part_costs
from prestage.engine.decide.expert_parallel import REMOTE
from prestage.engine.load import load_inputs
from prestage.engine.loading.deciders import dispatched_together, make_manager, make_prefetch
from prestage.engine.loading.expert_parallel import place
from prestage.engine.measure.metrics import overlapped_ns
from prestage.engine.measure.recording import Recording
from prestage.engine.measure.time_split import time_split
from prestage.engine.measure.traffic import sharing_metrics
from prestage.engine.policies.placement import PLACEMENT
from prestage.engine.run import ENGINES, prepared, run_all
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import Scenario, load_scenario, make_scenario
from prestage.engine.scenario.sections import DISPATCH_THREADS
from prestage.engine.simulate import simulate_inputs
from prestage.resources.links import Links, LinkSetting
from prestage.resources.profile import Profile, make_profile
from prestage.resources.timeline import COMBINE, DEMAND, DENSE, DISPATCH, EXPERT, PEER, PREDICT, PREFETCH, SPAN

TOKEN_BYTES = 2 * HIDDEN  # int8 weights: hidden states are of 16 bits
#: Copies between GPUs that take 5 ns for the 20 bytes of an expert.
QUICK_PEERS = {
    **peers(0),
    **{name: {"latency_ns": 0, "bytes_per_second": 4 * 10**9, **ASSUMED} for name in ("alone", "queued")},
}


def switched(gpus: int, latency_ns: int = 1) -> dict[str, Any]:
    """A host, and so many GPUs with a port of one byte a ns each to a switch that blocks nothing."""
    topology: dict[str, Any] = tiny_topology(gpus)
    topology["pcie_peer"] = False
    topology["nodes"].append({"name": "nvswitch0", "kind": "switch", **ASSUMED})
    topology["links"] = [link for link in topology["links"] if link["kind"] != "nvlink"] + [
        {
            "ends": [f"gpu{gpu}", "nvswitch0"],
            "kind": "nvlink",
            "bytes_per_second": 10**9,
            "latency_ns": latency_ns,
            **ASSUMED,
        }
        for gpu in range(gpus)
    ]
    return topology


def machine(gpus: int, **changes: Any) -> Profile:
    plain = {**tiny_profile().model_dump(), "topology": switched(gpus), "peer": QUICK_PEERS, **changes}
    return make_profile(plain, "a machine of several GPUs")


def shared(gpus: int, batch: int, memory: str = "4experts", **parallel: Any) -> Scenario:
    """On demand, dispatch free, copies as they are alone."""
    scenario: Scenario = tiny_scenario(
        workload={"batch": batch},
        memory={"gpu_budget": memory},
        copy={"contention": False},
        parallel={"gpus": gpus, **parallel},
    )
    return scenario


def run(inputs: Inputs, stream: Path | None = None) -> list[Recording]:
    return run_all(inputs, prepared(inputs, part_costs(inputs), stream))


def intervals(recording: Recording, *kinds: int) -> list[tuple[int, int]]:
    spans = recording.spans[np.isin(recording.spans["kind"], kinds)]
    return [(int(span["start_ns"]), int(span["end_ns"])) for span in np.sort(spans, order="start_ns")]


# All-to-all.


def all_to_all(topology: dict[str, Any], gpus: int) -> AllToAll:
    profile = machine(gpus, topology=topology)
    links = Links(profile, gpus, LinkSetting())
    return AllToAll(links.routes(), links.topology, TOKEN_BYTES)


def test_the_longest_latency_of_a_route_counts() -> None:
    topology = switched(3)
    topology["links"][-1]["latency_ns"] = 50  # the last GPU's port: 51 ns to and from it, 2 ns between the others
    traffic = np.zeros((3, 3), dtype=np.int64)
    traffic[0, 1] = 1
    assert all_to_all(topology, 3).ns(traffic) == 51 + TOKEN_BYTES


@settings(max_examples=50)
@given(data=st.data(), gpus=st.integers(2, 5), latency_ns=st.integers(0, 9))
def test_an_exchange_takes_the_latency_and_the_most_that_one_gpu_sends_or_receives(
    data: st.DataObject, gpus: int, latency_ns: int
) -> None:
    traffic = np.array(data.draw(st.lists(st.integers(0, 50), min_size=gpus * gpus, max_size=gpus * gpus)))
    traffic = traffic.reshape(gpus, gpus) * (1 - np.eye(gpus, dtype=np.int64))
    most = max(int(traffic.sum(axis=0).max()), int(traffic.sum(axis=1).max()))
    expected = 2 * latency_ns + most * TOKEN_BYTES if most else 0  # two hops; a byte takes a ns
    assert all_to_all(switched(gpus, latency_ns), gpus).ns(traffic) == expected
    assert all_to_all(switched(gpus, latency_ns), gpus).ns(traffic.T) == expected, "there as back"


def test_a_link_that_several_routes_pass_carries_all_of_them() -> None:
    # No link but PCIe: all six ways between three GPUs pass the processor, each GPU's own link in its direction.
    topology = tiny_topology(3)
    topology["links"] = [link for link in topology["links"] if link["kind"] != "nvlink"]
    for link in topology["links"]:
        link["bytes_per_second"] = 10**9
    traffic = np.array([[0, 2, 1], [0, 0, 4], [0, 0, 0]])
    assert all_to_all(topology, 3).ns(traffic) == 5 * TOKEN_BYTES  # what gpu2 receives


# Schedules by hand. A dense part takes 3 ns, an expert 7, its copy from the host 20; a token 16 bytes, 18 ns a way.


def test_tokens_go_to_their_experts_and_back_in_lockstep() -> None:
    # Round-robin: experts 0 and 2 of layer 0 on GPU 0, 1 and 3 on GPU 1, and of layer 1 as well. Each GPU has a token.
    # Layer 0: both choose experts of GPU 1, so one token moves. Dense 0-3, dispatch 3-21, copies 3-23 and 23-43,
    # experts 23-30 and 43-50, combine 50-68. Layer 1: at home, nothing moves: dense 68-71, copies 71-91, experts 91-98.
    trace = tiny_trace([[[1], [0]], [[3], [1]]], sequence=np.array([0, 1], dtype=np.int32))
    inputs = tiny_pipeline(tiny_model(2), machine(2), trace, shared(2, 2))
    first, second = run(inputs)
    assert intervals(first, DENSE) == intervals(second, DENSE) == [(0, 3), (68, 71)]
    assert intervals(first, DISPATCH) == intervals(second, DISPATCH) == [(3, 21)]
    assert intervals(first, COMBINE) == intervals(second, COMBINE) == [(50, 68)]
    assert intervals(first, DEMAND) == [(71, 91)]
    assert intervals(second, DEMAND) == [(3, 23), (23, 43), (71, 91)]
    assert intervals(first, EXPERT) == [(91, 98)]
    assert intervals(second, EXPERT) == [(23, 30), (43, 50), (91, 98)]
    # GPU 0 waits for GPU 1 from 3 to 68 and for its copy from 71 to 91; GPU 1 waits for copies alone until 50.
    assert time_split(first, 98) == {
        "compute_ms": 13e-6, "stall_ms": 20e-6, "host_ms": 0, "predictor_ms": 0, "bubble_ms": 65e-6, "drain_ms": 0,
    }  # fmt: skip
    assert time_split(second, 98) == {
        "compute_ms": 27e-6, "stall_ms": 53e-6, "host_ms": 0, "predictor_ms": 0, "bubble_ms": 18e-6, "drain_ms": 0,
    }  # fmt: skip


def test_a_gpu_that_computes_nothing_overlaps_nothing() -> None:
    first, second = run(tiny_pipeline(tiny_model(1), machine(2), tiny_trace([[[0]]]), shared(2, 1, remote="host")))
    assert overlapped_ns(first) == (0, 20)  # dense 0-3, copy 3-23, expert 23-30
    assert overlapped_ns(second) == (0, 0)


@pytest.mark.parametrize("threads", DISPATCH_THREADS)
def test_the_choices_of_all_gpus_are_known_when_the_last_one_is_which_need_not_be_the_last_gpus(threads: str) -> None:
    # Four sequences live on GPUs 0, 1, 2 and 0, and each GPU fetches what its own tokens use. Layer 0: dense 0-3,
    # copies 3-23, experts 23-30; on GPU 0 another copy 23-43 and expert 43-50. Layer 1's dense parts end at 53, 33, 33.
    trace = tiny_trace([[[expert], [expert]] for expert in range(4)], sequence=np.arange(4, dtype=np.int32))
    scenario = shared(3, 4, remote="host", dispatch_threads=threads)
    recordings = run_alike(tiny_pipeline(tiny_model(2), machine(3), trace, scenario))
    assert [one.decoded.visits["choice_known_ns"].tolist() for one in recordings] == [[3, 53]] * 3
    assert intervals(recordings[1], DENSE) == [(0, 3), (30, 33)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("profile", "way_ns"), [(machine(2), 18), (tiny_profile(gpus=2), 1)])
def test_what_sharing_took_is_what_was_sent_and_how_long_exchanges_were(
    profile: Profile, way_ns: int, engine: str
) -> None:
    # As above: one token goes to GPU 1 and back, 18 ns a way, or the least that there is. GPU 1 serves both pairs of
    # layer 0, and each GPU one of layer 1's: 2 + 1 of the busiest, where the mean GPU has 1 + 1.
    trace = tiny_trace([[[1], [0]], [[3], [1]]], sequence=np.array([0, 1], dtype=np.int32))
    inputs = tiny_pipeline(tiny_model(2), profile, trace, shared(2, 2))
    assert sharing_metrics(run_all(inputs, prepared(inputs, part_costs(inputs)), engine=engine)) == {
        "tokens_sent": 1, "all_to_all_ms": 2 * way_ns / 1e6, "copied_bytes": 0, "imbalance": 1.5,
    }  # fmt: skip


@pytest.mark.parametrize(("threads", "second_copy"), [("per-gpu", (3, 23)), ("one", (53, 73))])
def test_a_thread_waits_for_the_guesses_of_its_own_gpus_only(threads: str, second_copy: tuple[int, int]) -> None:
    # Each GPU has a token of its own experts: dense 0-3, its copy from 3 on. GPU 0 predicts 3-53, and the thread that
    # serves it waits for that. Contention, which slows nothing here, puts read-backs into SimPy's time.
    trace = tiny_trace([[[0]], [[1]]], sequence=np.array([0, 1], dtype=np.int32))
    scenario = shared(2, 2, dispatch_threads=threads)
    plain = {**scenario.plain(), "prefetch": {"lookahead": 1}, "predictor": {"latency_us": 0.05, "lane": "gpu"}}
    profile = make_profile(
        {**tiny_profile(beside_copy_ns=14).model_dump(), "topology": switched(2), "peer": QUICK_PEERS}, "two GPUs"
    )
    inputs = tiny_pipeline(tiny_model(1), profile, trace, make_scenario({**plain, "copy": {"contention": True}}))
    first, second = run(inputs)
    assert intervals(first, DEMAND) == [(3, 23)]
    assert intervals(first, PREDICT) == [(3, 53)]
    assert intervals(second, DEMAND) == [second_copy]


def test_a_gpu_without_tokens_serves_those_of_others() -> None:
    # One token, at home on GPU 0, whose expert is on GPU 1: no dense part there, and the expert waits for the token.
    trace = tiny_trace([[[1]]])
    first, second = run(tiny_pipeline(tiny_model(1), machine(2), trace, shared(2, 1)))
    assert (intervals(first, DENSE), intervals(second, DENSE)) == ([(0, 3)], [])
    assert intervals(second, DISPATCH) == [(3, 21)]
    assert intervals(second, EXPERT) == [(23, 30)]
    assert intervals(first, COMBINE) == [(30, 48)]


def test_gpus_that_are_busy_in_turns_are_out_of_balance_at_every_visit() -> None:
    # Two tokens a step. At the first both choose an expert of GPU 0, at the second one of GPU 1: either serves as many
    # in all, but each time one of them serves 2 and the other none, where the mean is 1.
    sequence = np.array([0, 1, 0, 1], dtype=np.int32)
    for chosen, imbalance in (([0, 0, 1, 1], 2.0), ([0, 1, 1, 0], 1.0), ([0, 0, 0, 1], 3 / 2)):
        trace = tiny_trace([[[expert]] for expert in chosen], sequence=sequence)
        data = simulate_inputs(tiny_pipeline(tiny_model(1), machine(2), trace, shared(2, 2)), baselines=False).data
        assert data["sharing"]["imbalance"] == imbalance, chosen


def test_bytes_come_from_a_peer_once_they_are_there() -> None:
    # Both tokens choose expert 0. GPU 0 copies it from the host, 3-23; GPU 1 from GPU 0, 5 ns once it is there.
    trace = tiny_trace([[[0]], [[0]]], sequence=np.array([0, 1], dtype=np.int32))
    first, second = run(tiny_pipeline(tiny_model(1), machine(2), trace, shared(2, 2, remote="peer")))
    assert (intervals(first, DEMAND), intervals(first, EXPERT)) == ([(3, 23)], [(23, 30)])
    assert (intervals(second, PEER), intervals(second, EXPERT)) == ([(23, 28)], [(28, 35)])
    assert not intervals(first, DISPATCH, COMBINE)


def test_room_that_another_gpu_reads_is_written_after_that() -> None:
    # Room for one expert each. First GPU 0 brings 0 and GPU 1 brings 1: copies 3-23, experts 23-30, dense 30-33. Then
    # GPU 0 needs 1, and copies it from GPU 1 into the room of 0, 33-38. GPU 1 needs 3 in the room of 1: 38-58.
    trace = tiny_trace([[[0]], [[1]], [[1]], [[3]]], sequence=np.array([0, 1, 0, 1], dtype=np.int32))
    inputs = tiny_pipeline(tiny_model(1), machine(2), trace, shared(2, 2, "1experts", remote="peer"))
    first, second = run(inputs)
    assert intervals(first, DEMAND) == [(3, 23)]
    assert intervals(first, PEER) == [(33, 38)]
    assert intervals(second, DEMAND) == [(3, 23), (38, 58)]


def test_two_that_copy_from_one_gpu_share_its_port() -> None:
    # GPUs 1 and 2 want the 20 bytes that GPU 0 has from 23 on. Alone, each copy would take 5 ns; the port of GPU 0 lets
    # one byte a ns through, of which each gets half: 40 ns.
    trace = tiny_trace([[[0]]] * 3, sequence=np.array([0, 1, 2], dtype=np.int32))
    for contention, end_ns in ((True, 63), (False, 28)):
        plain = shared(3, 3, remote="peer").plain()
        scenario = make_scenario({**plain, "copy": {**plain["copy"], "contention": contention}})
        _, second, third = run(tiny_pipeline(tiny_model(1), machine(3), trace, scenario))
        assert intervals(second, PEER) == intervals(third, PEER) == [(23, end_ns)]


def test_what_is_evicted_is_stored_before_its_room_is_written_and_comes_back_from_there() -> None:
    # One token; GPU 0 owns 0 and 2 and has room for one, GPU 1 spare room for one. Expert 0: copy 3-23, kernel 23-30.
    # Expert 2: dense 30-33; 0 is stored on GPU 1, 33-38; copy 38-58, kernel 58-65. Expert 0 again: dense 65-68; it is
    # in the only spare room, so 2 is not stored; it comes back, 68-73.
    trace = tiny_trace([[[0]], [[2]], [[0]]])
    scenario = shared(2, 1, "1experts", spare_bytes="20B")
    first, second = run(tiny_pipeline(tiny_model(1), machine(2), trace, scenario))
    assert intervals(first, DEMAND) == [(3, 23), (38, 58)]
    assert intervals(second, PEER) == [(33, 38)]
    assert intervals(first, PEER) == [(68, 73)]
    assert intervals(first, EXPERT) == [(23, 30), (58, 65), (73, 80)]


def test_one_host_thread_serves_one_gpu_after_the_other() -> None:
    # A launch takes 2 ns. By a thread each, both dense parts are launched by 2; by one thread, the second by 4.
    trace = tiny_trace([[[0]], [[1]]], sequence=np.array([0, 1], dtype=np.int32))
    profile = machine(2, host={**tiny_profile(launch_ns=2).host.model_dump()})
    for threads, starts in (("per-gpu", (2, 2)), ("one", (2, 4))):
        scenario = make_scenario({**shared(2, 2, dispatch_threads=threads).plain(), "dispatch": {"mode": "graph"}})
        inputs = tiny_pipeline(tiny_model(1), profile, trace, scenario)
        assert tuple(intervals(recording, DENSE)[0][0] for recording in run(inputs)) == starts


# What holds in all schedules.


@dataclass(frozen=True)
class Spread:
    """A random run over several GPUs, with all that is random in it as its repr."""

    case: Case
    inputs: Inputs

    def __repr__(self) -> str:
        return f"{self.case!r} over {self.inputs.scenario.parallel!r}"


@st.composite
def spread(draw: st.DrawFn, most: int = 3, /, **fixed: Any) -> Spread:
    """Draw a run over several GPUs."""
    remote = draw(st.sampled_from(REMOTE if most > 1 else ("tokens", "peer", "host")))
    fixed = {**fixed, "dispatch": {"router_readback": True}, "tiers": {"host_budget": "all", "prefetch": "gpu"}}
    if remote in ("peer", "cost"):
        fixed["copy"] = {"discipline": draw(st.sampled_from(["fifo", "two_streams"]))}
    case: Case = draw(cases(**fixed))
    count = draw(st.integers(min(2, most), most))
    parallel = {
        "gpus": count,
        "placement": draw(st.sampled_from(list(PLACEMENT))),
        "replica_bytes": f"{draw(st.integers(0, 60))}B",
        "remote": remote,
        "dispatch_threads": draw(st.sampled_from(DISPATCH_THREADS)),
    }
    topology = tiny_topology(count, draw(st.sampled_from([10**9, 3 * 10**9, 10**15])))
    if count > 1 and draw(st.booleans()):
        topology = switched(count)
    changes = {"topology": topology, "peer": draw(st.sampled_from([None, peers(None), peers(7), QUICK_PEERS]))}
    profile = make_profile({**case.profile.model_dump(), **changes}, "a machine of several GPUs")
    scenario = make_scenario({**case.scenario.plain(), "parallel": parallel})
    return Spread(case, tiny_pipeline(case.model, profile, case.trace, scenario))


@settings(max_examples=60)
@given(drawn=spread())
def test_the_engine_decides_what_is_decided_without_a_clock(drawn: Spread) -> None:
    inputs = drawn.inputs
    recordings = run(inputs)
    managers = [make_manager(part) for part in inputs.parts]
    policies = [make_prefetch(part.scenario, part.model) for part in inputs.parts]
    found = list(dispatched_together(inputs, managers, policies))
    assert len(found) == inputs.layer_visits
    for gpu, (recording, manager) in enumerate(zip(recordings, managers, strict=True)):
        assert recording.manager.copy_expert.tolist() == manager.copy_expert.tolist()
        assert recording.manager.copy_reason.tolist() == manager.copy_reason.tolist()
        assert recording.manager.evicted_copies.tolist() == manager.evicted_copies.tolist()
        assert recording.manager.dropped == manager.dropped
        fetched = recording.copy_spans["copy"][recording.copy_spans["kind"] == PEER]
        assert sorted(fetched.tolist()) == sorted(copy for visit in found for copy in visit.sources[gpu])
    for part, manager in zip(inputs.parts, managers, strict=True):
        assert manager.assigned_bytes <= part.budget_bytes


@pytest.mark.slow
@settings(max_examples=60)
@given(drawn=spread())
def test_nothing_happens_before_its_cause_and_the_parts_of_time_come_to_the_makespan(drawn: Spread) -> None:
    inputs = drawn.inputs
    recordings = run(inputs)
    spans = check_books(recordings)
    exchanges = [intervals(recording, DISPATCH, COMBINE) for recording in recordings]
    assert all(own == exchanges[0] for own in exchanges), "all GPUs exchange tokens at once"
    kernels = spans[np.isin(spans["kind"], (DENSE, EXPERT))]
    for exchange in recordings[0].spans[np.isin(recordings[0].spans["kind"], (DISPATCH, COMBINE))]:
        before, after = (DENSE, EXPERT) if exchange["kind"] == DISPATCH else (EXPERT, DENSE)
        at = exchange["visit"]
        ended = kernels[(kernels["visit"] == at) & (kernels["kind"] == before)]
        begun = kernels[(kernels["visit"] == at + (after == DENSE)) & (kernels["kind"] == after)]
        assert ended["end_ns"].max(initial=0) <= exchange["start_ns"]
        if after == EXPERT or at % inputs.model.layers != inputs.model.layers - 1:
            assert (begun["start_ns"] >= exchange["end_ns"]).all()
    for recording in recordings:
        used = recording.compute_spans[recording.compute_spans["copy"] >= 0]
        assert (used["start_ns"] >= recording.copy_end_ns[used["copy"]]).all()


@pytest.mark.slow
@settings(max_examples=100)
@given(drawn=spread())
def test_both_engines_end_at_the_same_nanoseconds(drawn: Spread) -> None:
    assert played(drawn.inputs, "compiled") == played(drawn.inputs, "simpy")


def test_a_thread_that_copies_what_another_prefetches_waits_until_that_has_been_ordered() -> None:
    # Two GPUs with a token each, two layers of one expert, room for one: dense 0-3, each copies the first layer's from
    # the host. Both predict 3-53 and prefetch the second layer's: GPU 0's thread orders its copy at 53, from the host,
    # for the room has been read by 30. GPU 1's thread knows its guesses at 53, too: it copies from GPU 0, once the
    # bytes are there.
    trace = tiny_trace([[[0], [0]], [[0], [0]]], num_experts=1, sequence=np.array([0, 1], dtype=np.int32))
    scenario = shared(2, 2, "1experts", remote="peer")
    plain = {
        **scenario.plain(), "prefetch": {"lookahead": 1, "k": 1}, "predictor": {"latency_us": 0.05, "recall": 1.0},
    }  # fmt: skip
    inputs = tiny_pipeline(tiny_model(2, 1), machine(2), trace, make_scenario(plain))
    for engine in ("simpy", "compiled"):
        first, second = run_all(inputs, prepared(inputs, part_costs(inputs)), engine=engine)
        assert intervals(first, DEMAND, PREFETCH) == [(3, 23), (53, 73)]
        assert intervals(second, DEMAND, PREFETCH) == [(3, 23)]
        assert intervals(second, PEER) == [(73, 78)]


@settings(max_examples=40)
@given(drawn=spread())
def test_bytes_are_the_same_on_the_gpus_in_the_totals_and_on_the_links(drawn: Spread) -> None:
    inputs = drawn.inputs
    result = simulate_inputs(inputs, baselines=False)
    data = result.data
    total = data["bytes"]["demand"] + data["bytes"]["prefetch"]
    assert total == sum(gpu["bytes"]["demand"] + gpu["bytes"]["prefetch"] for gpu in data["gpus"])
    assert total == sum(row["demand_bytes"] + row["prefetch_bytes"] for row in data["by_layer"])
    assert data["layer_visits"] == inputs.layer_visits
    sizes = np.array(inputs.model.expert_bytes)
    between = tokens = 0
    for recording in result.recordings:
        copies = recording.spans[recording.spans["kind"] == PEER]
        between += int(sizes[copies["expert"] // inputs.model.experts].sum())
        tokens += int(recording.decoded.sent.sum())
    assert (data["sharing"]["copied_bytes"], data["sharing"]["tokens_sent"]) == (between, tokens)
    pairs = sum(int(recording.decoded.accesses["tokens"].sum()) for recording in result.recordings)
    made = inputs.trace.made if inputs.trace.made is not None else np.ones(inputs.trace.experts.shape, bool)
    rows = np.concatenate([step.rows for step in inputs.steps])
    assert pairs == made[rows].sum(), "every choice is served once"
    loads = {load["link"]: load["bytes"] for load in data["links"]}
    assert loads["host0->cpu0"] == total - between
    ways = [size for link, size in loads.items() if link.startswith("gpu") and "cpu" not in link and "->" in link]
    assert sum(ways) == between + 2 * tokens * TOKEN_BYTES  # there and back


@settings(max_examples=60)
@given(drawn=spread(1))
def test_on_one_gpu_it_is_the_decoder_of_one_to_the_nanosecond(drawn: Spread) -> None:
    inputs = drawn.inputs
    alone = play(inputs)
    (recording,) = run(place(inputs, make_manager))
    kept = recording.spans[recording.spans["lane"] < len(alone.decoded.timeline.lanes)]
    order = list(SPAN.names or ())
    assert np.sort(kept, order=order).tolist() == np.sort(alone.spans, order=order).tolist()


@settings(max_examples=10)
@given(drawn=spread())
def test_streamed_to_files_a_run_is_the_same(drawn: Spread) -> None:
    kept = simulate_inputs(drawn.inputs)
    with TemporaryDirectory() as name:
        folder = Path(name)
        streamed = simulate_inputs(drawn.inputs, stream=folder)
        assert streamed.data == kept.data
        for own, other in zip(kept.recordings, streamed.recordings, strict=True):
            assert own.spans.tobytes() == other.spans.tobytes()
            if len(own.spans):
                assert isinstance(other.spans, np.memmap)
                assert np.load(folder / own.device / "spans.npy", mmap_mode="r").tobytes() == own.spans.tobytes()
        assert sorted(path.name for path in folder.iterdir()) == [recording.device for recording in kept.recordings]


# Refusals.


@pytest.mark.parametrize(
    ("settings_given", "said"),
    [
        (["machine.profile=h200-x2"], "parallel.gpus = 8: profile h200-x2 has 2 GPUs"),
        (["machine.profile=h200-pcie5"], "parallel.gpus = 8: profile h200-pcie5 has no topology"),
        (["memory.gpu_budget=1MiB"], "gpu0 of parallel.gpus = 8: the expert budget is 1.00 MiB: it must hold one"),
        (["parallel.placement=best"], "parallel.placement = 'best'"),
        (["parallel.stages=2"], "gpus = 8 with stages = 2"),
        (["parallel.remote=peer", "parallel.spare_bytes=1GiB"], "needs remote = 'tokens'"),
        (["parallel.remote=peer", "copy.discipline=priority"], "choose fifo or two_streams"),
        (["dispatch.router_readback=false"], "meet at every choice of the router"),
        (["memory.scope=shared"], "choose global or per-layer"),
        (["parallel.spare_bytes=many"], "parallel.spare_bytes = 'many'"),
    ],
)
def test_what_cannot_run_is_refused_before_it_runs_naming_what_would_do(settings_given: list[str], said: str) -> None:
    quick = ["workload.synthetic.tokens=32", "workload.tokens=32"]
    with pytest.raises(ScenarioError) as refused:
        load_inputs(load_scenario("placement-8", [*quick, *settings_given]))
    assert said in str(refused.value)


def test_a_route_that_does_not_exist_is_named() -> None:
    topology = tiny_topology(2)
    topology["nodes"].append({"name": "host1", "kind": "host", "capacity_bytes": 10**12, **ASSUMED})
    topology["nodes"].append({"name": "cpu1", "kind": "cpu", **ASSUMED})
    for link in topology["links"]:
        if link["ends"] == ["cpu0", "gpu1"]:
            link["ends"] = ["cpu1", "gpu1"]
    topology["links"] = [link for link in topology["links"] if link["kind"] != "nvlink"]
    topology["links"].append({**topology["links"][0], "ends": ["host1", "cpu1"]})
    with pytest.raises(ScenarioError, match=r"parallel.gpus = 2: topology: there is no route from gpu0 to gpu1"):
        tiny_pipeline(tiny_model(1), machine(2, topology=topology), tiny_trace([[[0]]]), shared(2, 1))
