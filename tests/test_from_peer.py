"""Experts in another GPU's memory, and what copies between GPUs cost beside others, by hand."""

from typing import Any

import pytest
from tiny import run_alike, tiny_costs, tiny_inputs, tiny_model, tiny_pipeline, tiny_profile, tiny_scenario, tiny_trace

from prestage.engine.measure.recording import Recording
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import make_scenario
from prestage.resources.from_peer import from_peer
from prestage.resources.profile import Profile, load_profile
from prestage.resources.profile_costs import ProfileError
from prestage.resources.timeline import KINDS

ASSUMED = {"source": "assumed"}


def spans_of(recording: Recording, kind: str) -> list[tuple[int, int]]:
    spans = recording.spans[recording.spans["kind"] == KINDS.index(kind)]
    return sorted((int(span["start_ns"]), int(span["end_ns"])) for span in spans)


def changed(profile: Profile, **sections: dict[str, Any]) -> Profile:
    """Returns a profile with these keys changed in its sections."""
    data = profile.model_dump(exclude_none=True)
    for name, keys in sections.items():
        data[name] = {**(data.get(name) or {}), **keys}
    return Profile.model_validate(data)


def test_experts_in_a_peers_memory_come_at_the_costs_of_copies_between_gpus() -> None:
    # One layer, two tokens that want two experts: the dense part 0-3, a copy of 5 + 20 ns, the expert's kernel 28-35.
    profile = tiny_profile(gpus=2, peer_latency_ns=5)
    trace = tiny_trace([[[0]], [[1]]])
    (peer,) = run_alike(tiny_inputs(tiny_model(1), profile, trace, tiny_scenario(copy={"source": "peer"})))
    assert spans_of(peer, "demand") == [(3, 28), (38, 63)]
    assert spans_of(peer, "expert") == [(28, 35), (63, 70)]
    (host,) = run_alike(tiny_inputs(tiny_model(1), profile, trace, tiny_scenario()))
    assert spans_of(host, "demand") == [(3, 23), (33, 53)]


def test_kernels_beside_copies_from_a_peer_take_as_many_times_as_long_as_the_profile_says() -> None:
    profile = load_profile("h100-x2")
    seen = from_peer(profile)
    assert profile.contention is not None and profile.contention.compute_beside_peer is not None
    factor = profile.contention.compute_beside_peer.factor
    for expert in seen.compute.experts:
        assert expert.beside_copy_ns == round(expert.ns * factor)
    for kernel in (*seen.compute.dense, *seen.compute.heads):
        assert kernel.beside_copy_ns == round(kernel.ns * factor)
    assert seen.contention is not None and seen.contention.copies_sharing is None  # that was of another link
    # Copies from a peer delay no event, as those from the host do.
    assert profile.compute.graph_gap.disturbed_ns > 2 * profile.compute.graph_gap.ns
    assert seen.compute.graph_gap.disturbed_ns == seen.compute.graph_gap.ns
    assert seen.compute.event_wait_gap.ns == profile.compute.peer_wait_gap.ns  # type: ignore[union-attr]
    assert seen.host.copy_enqueue == profile.host.peer_enqueue


def test_what_cannot_be_is_refused() -> None:
    scenario = tiny_scenario(copy={"source": "peer"})
    with pytest.raises(ProfileError, match="tiny has no costs of copies between GPUs"):
        tiny_costs(tiny_model(1), tiny_profile(), scenario)
    data = {"workload": {"synthetic": {"tokens": 4}}}
    for keys, says in (
        ({"parallel": {"stages": 2}}, "parallel.stages = 2: the GPU that holds all experts does nothing else"),
        ({"copy": {"source": "peer", "host_memory": "pinned"}}, "source = 'peer' copies from no host_memory"),
        ({"tiers": {"host_budget": "50%"}}, "tiers.host_budget"),
        ({"miss": {"policy": "cpu"}}, "miss.policy = 'cpu'"),
    ):
        with pytest.raises(ScenarioError, match=says):
            make_scenario({"copy": {"source": "peer"}, **data, **keys})


def pipeline(profile: Profile, experts: list[list[list[int]]], **sections: Any) -> Inputs:
    """Two stages of one layer; one thread; one sequence."""
    parallel = {"stages": 2, "dispatch_threads": "one"}
    scenario = tiny_scenario(parallel=parallel, dispatch={"mode": "graph"}, **sections)
    inputs: Inputs = tiny_pipeline(tiny_model(2), profile, tiny_trace(experts), scenario)
    return inputs


def test_a_thread_takes_its_time_to_turn_to_another_gpu() -> None:
    plain = tiny_profile(gpus=2, launch_ns=10)
    turning = changed(plain, host={"turn": {"ns": 4, **ASSUMED}})
    first_ns = []
    for profile in (plain, turning):
        start_ns, end_ns = spans_of(run_alike(pipeline(profile, [[[0], [1]]]))[1], "launch")[0]
        first_ns.append(end_ns - start_ns)
    assert first_ns == [10, 14]  # the launch of the second GPU's dense part


def test_a_kernel_starts_later_behind_what_comes_from_another_gpu() -> None:
    plain = tiny_profile(gpus=2, peer_latency_ns=5)
    later = changed(plain, compute={"peer_wait_gap": {"ns": 3, **ASSUMED}})
    begun = [spans_of(run_alike(pipeline(profile, [[[0], [1]]]))[1], "dense")[0][0] for profile in (plain, later)]
    arrived = spans_of(run_alike(pipeline(plain, [[[0], [1]]]))[0], "activation")[0][1]
    assert begun == [arrived, arrived + 3]


@pytest.mark.parametrize(("contention", "took_ns"), [(True, 32), (False, 21)])
def test_a_copy_between_gpus_takes_longer_beside_a_copy_from_the_host(contention: bool, took_ns: int) -> None:
    # Two micro-batches want an expert each: while the first one's activations leave, 16 bytes in 5 + 16 ns, the second
    # one's expert comes, which takes 200 ns.
    factors = {
        name: {"factor": 1.0, **ASSUMED} for name in ("copy_beside_compute", "copy_beside_d2h", "copies_sharing")
    }
    longer = {"peer_beside_copy": {"ns": 11, **ASSUMED}}
    profile = changed(tiny_profile(gpus=2, peer_latency_ns=5, beside_copy_ns=8), contention={**factors, **longer})
    scenario = tiny_scenario(
        workload={"batch": 2},
        parallel={"stages": 2, "dispatch_threads": "one", "micro_batches": 2},
        dispatch={"mode": "graph", "router_readback": False},
        copy={"contention": contention},
    )
    trace = tiny_trace([[[0], [0]], [[1], [1]]], sequence=[0, 1])
    first, _ = run_alike(tiny_pipeline(tiny_model(2, copy_ns=200), profile, trace, scenario))
    (sent, _), (_, fetched) = spans_of(first, "activation"), spans_of(first, "demand")
    assert fetched[0] <= sent[0] and sent[1] <= fetched[1]
    assert sent[1] - sent[0] == took_ns
