"""Tiers: schedules over a drive worked by hand, what host memory decides, and what no run may do.

On the tiny machine a byte takes a ns to read and a ns to copy; a read costs a latency on top.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cases import Case, cases, play
from tiny import tiny_inputs, tiny_model, tiny_profile, tiny_run, tiny_scenario, tiny_trace

from prestage.engine.costs.costs import Costs
from prestage.engine.decide.commands import FIXED_REGISTERS
from prestage.engine.decide.dispatch import Visit
from prestage.engine.decide.host_memory import HostMemory, HostRooms
from prestage.engine.decide.memory_manager import DEMOTED, MemoryManager
from prestage.engine.decide.program import Gpu, Stage, stages_program
from prestage.engine.decide.registers import Registers
from prestage.engine.decide.tables import Rooms
from prestage.engine.load import load_inputs
from prestage.engine.loading.deciders import dispatched, make_host_memory, make_manager, make_prefetch
from prestage.engine.measure.metrics import tiers
from prestage.engine.measure.recording import Recording
from prestage.engine.policies.copy_order import COPY_ORDERS
from prestage.engine.policies.eviction import EVICTION, Lru
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.simulate import simulate, simulate_inputs
from prestage.engine.timing.simulation import settings_of
from prestage.resources.profile import Profile, load_profile, make_profile, profile_names
from prestage.resources.profile_costs import Interruptions, ProfileError
from prestage.resources.timeline import DEMAND, PREFETCH, READ, covered_ns

D, P, X = 3, 20, 7  # dense part, copy, expert
LATENCY = 30
R = LATENCY + P  # read


def small(host: str, experts: list[list[list[int]]], *, io_lanes: int = 1, **sections: Any) -> Recording:
    """Run a trace on the tiny machine with so much host memory; the GPU has room for one visit, or else as said."""
    layers, top_k = len(experts[0]), len(experts[0][0])
    scenario = tiny_scenario(
        **{"memory": {"gpu_budget": f"{top_k}experts"}, "tiers": {"host_budget": host}, **sections}
    )
    model = tiny_model(layers, top_k=top_k, dense_ns=D, copy_ns=P)
    profile = tiny_profile(expert_ns=X, io_lanes=io_lanes, read_latency_ns=LATENCY)
    recording: Recording = tiny_run(model, profile, tiny_trace(experts), scenario)
    return recording


def spans(recording: Recording, *kinds: int) -> list[tuple[int, int]]:
    """(start, end) of the spans of these kinds, in order of recording."""
    return [(int(s["start_ns"]), int(s["end_ns"])) for s in recording.spans if s["kind"] in kinds]


# Worked by hand.


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_with_nothing_cached_and_one_lane_a_pass_takes_l_times_d_r_p_x(layers: int) -> None:
    # Top-1, another expert at every layer: dense, read, copy, expert, one after the other.
    recording = small("1experts", [[[layer % 4] for layer in range(layers)]])
    assert recording.makespan_ns == layers * (D + R + P + X)


@pytest.mark.parametrize(
    ("io_lanes", "makespan_ns"),
    [
        (1, D + 4 * R + P + X),  # one read after the other; only the last copy and expert come behind them
        (2, D + 2 * R + 2 * P + X),  # two rounds; the copies of the second come behind it
        (3, D + R + 4 * P + X),  # three copies take longer than the second round: from there on the link is busy
        (4, D + R + 4 * P + X),  # all at once
        (8, D + R + 4 * P + X),
    ],
)
def test_n_lanes_read_the_four_misses_of_a_visit_in_rounds(io_lanes: int, makespan_ns: int) -> None:
    recording = small("4experts", [[[0, 1, 2, 3]]], io_lanes=io_lanes)
    assert recording.makespan_ns == makespan_ns
    rounds = [D + (n // io_lanes) * R for n in range(4)]
    assert spans(recording, READ) == [(start, start + R) for start in rounds]


def test_an_expert_read_in_requests_takes_as_long_as_its_share_on_each_lane() -> None:
    # 20 bytes in requests of at most 5: four of 30 + 5 ns, on four lanes at once, or two rounds on two.
    trace = [[[0]]]
    assert small("1experts", trace, io_lanes=4, tiers={"host_budget": "1experts", "chunk_bytes": 5}).makespan_ns == (
        D + (LATENCY + 5) + P + X
    )
    assert small("1experts", trace, io_lanes=2, tiers={"host_budget": "1experts", "chunk_bytes": 5}).makespan_ns == (
        D + 2 * (LATENCY + 5) + P + X
    )


def test_more_lanes_than_the_drive_has_speed_for_share_what_it_gives() -> None:
    # Measured with 2 lanes: four reads at once on 4 lanes take twice as long each.
    recording = small("4experts", [[[0, 1, 2, 3]]], io_lanes=2, tiers={"host_budget": "4experts", "io_lanes": 4})
    assert spans(recording, READ) == [(D, D + 2 * R)] * 4


@pytest.mark.parametrize("discipline", COPY_ORDERS)
@pytest.mark.parametrize("io_lanes", [2, 3, 8, 64])
def test_a_lane_that_is_idle_slows_no_read(io_lanes: int, discipline: str) -> None:
    # Top-1, so that one read is in flight at a time: it takes as long however many lanes might share the drive.
    for measured in (1, 2):
        recording = small(
            "1experts", [[[0], [1], [2]]], io_lanes=measured, copy={"discipline": discipline},
            tiers={"host_budget": "1experts", "io_lanes": io_lanes},
        )  # fmt: skip
        assert [end - start for start, end in spans(recording, READ)] == [R] * 3
        assert recording.makespan_ns == 3 * (D + R + P + X)


def test_reads_share_the_drive_while_both_are_in_flight_and_no_longer() -> None:
    # Measured with one lane, read by two. The host orders a read in 10: they start at 13 and 23. The first has 40 of
    # its 50 left at 23, and takes 80 for it beside the second; that has 10 left at 103, alone again.
    profile = tiny_profile(expert_ns=X, io_lanes=1, read_latency_ns=LATENCY, order_ns=10)
    scenario = tiny_scenario(
        dispatch={"mode": "graph"}, memory={"gpu_budget": "2experts"}, tiers={"host_budget": "2experts", "io_lanes": 2}
    )
    recording = tiny_run(tiny_model(1, top_k=2, dense_ns=D, copy_ns=P), profile, tiny_trace([[[0, 1]]]), scenario)
    assert sorted(spans(recording, READ)) == [(D + 10, 103), (D + 20, 113)]


def deep(profile: Profile, *points: tuple[int, int]) -> Profile:
    """The machine with what its drive gives to so many reads in flight."""
    data = profile.model_dump()
    data["nvme"]["queue_depth"] = {"bytes_per_second_by_reads": points, "source": "measured"}
    return make_profile(data, "deep")


@pytest.mark.parametrize(("reads", "read_ns"), [(1, R), (2, 80), (3, 120), (4, 200)])
def test_a_measured_curve_says_what_so_many_reads_in_flight_get_together(reads: int, read_ns: int) -> None:
    # 1 GB/s alone, 1.25 together from two on and 1 again with four: two take 2 / 1.25 times as long, four 4 times.
    tiny = tiny_profile(expert_ns=X, io_lanes=1, read_latency_ns=LATENCY)
    profile = deep(tiny, (1, 10**9), (2, 125 * 10**7), (3, 125 * 10**7), (4, 10**9))
    scenario = tiny_scenario(memory={"gpu_budget": "4experts"}, tiers={"host_budget": "4experts", "io_lanes": 4})
    chosen = tiny_trace([[list(range(reads))]])
    recording = tiny_run(tiny_model(1, top_k=reads, dense_ns=D, copy_ns=P), profile, chosen, scenario)
    assert spans(recording, READ) == [(D, D + read_ns)] * reads


def test_a_curve_runs_straight_between_its_points_and_is_flat_beyond() -> None:
    nvme = deep(tiny_profile(), (1, 1900), (2, 2580), (4, 2580), (16, 2340)).nvme
    assert nvme is not None
    rates = [reads * 1900 / nvme.times_as_long(reads) for reads in (1, 2, 3, 10, 16, 40)]
    assert rates == pytest.approx([1900, 2580, 2580, 2460, 2340, 2340])


@pytest.mark.parametrize(
    ("points", "says"),
    [
        ([[2, 10], [4, 20]], "the first is of 2 reads: begin with one read alone"),
        ([[1, 10], [1, 20]], "[1, 20] after 1 reads: give more reads each time"),
        ([[1, 10], [4, 0]], "[4, 0] after 1 reads: give more reads each time, and a rate above 0"),
        ([[1, 10]], "at least 2 items"),
        ([[1, 10], [2.5, 20]], "valid integer"),
        ([], "at least 2 items"),
    ],
)
def test_a_curve_that_cannot_be_is_refused_naming_its_key(points: Any, says: str) -> None:
    data = tiny_profile().model_dump()
    data["nvme"]["queue_depth"] = {"bytes_per_second_by_reads": points, "source": "measured"}
    with pytest.raises(ProfileError) as caught:
        make_profile(data, "mine.json")
    assert str(caught.value).startswith("mine.json: nvme.queue_depth.bytes_per_second_by_reads")
    assert says in str(caught.value)


@pytest.mark.slow
@given(case=cases(tiers={"host_budget": "2experts"}))
def test_a_drive_that_is_shared_by_more_lanes_than_it_can_serve_reads_no_faster(case: Case) -> None:
    # Whatever is in flight, the reads of n lanes' worth take at least their time on n lanes.
    inputs = case.inputs()
    nvme = inputs.profile.nvme
    assert nvme is not None
    recording = play(inputs)
    reads = recording.spans[recording.spans["kind"] == READ]
    requests = Costs(inputs).reads
    assert requests is not None
    alone_ns = sum(requests.by_layer[int(span["expert"]) // inputs.model.experts].request_ns for span in reads)
    assert covered_ns(reads["start_ns"], reads["end_ns"]) >= (alone_ns - len(reads)) / nvme.lanes


def test_what_host_memory_holds_costs_what_it_costs_today() -> None:
    # The GPU has room for one expert; two take turns. Host memory has both from their second use on.
    tokens = [[[0]], [[1]], [[0]], [[1]]]
    recording, today = small("4experts", tokens), small("all", tokens)
    took = [D + R + P + X] * 2 + [D + P + X] * 2
    assert [int(end) for end in recording.step_end_ns] == [sum(took[: n + 1]) for n in range(4)]
    assert [int(end) for end in today.step_end_ns] == [(n + 1) * (D + P + X) for n in range(4)]
    assert tiers([today]) is None


def test_a_room_in_host_memory_is_read_into_once_the_copy_out_of_it_has_ended() -> None:
    # Two lanes, but room for one expert: read, copy out, then the next read.
    recording = small("1experts", [[[0, 1]]], io_lanes=2)
    assert spans(recording, READ) == [(D, D + R), (D + R + P, D + R + P + R)]
    assert spans(recording, DEMAND) == [(D + R, D + R + P), (D + 2 * R + P, D + 2 * R + 2 * P)]
    assert recording.makespan_ns == D + 2 * (R + P) + X


def test_a_room_that_is_long_free_holds_no_read_up() -> None:
    # Token 1 reads 0 and then 2 into the same room (see above), and ends at 150; token 2 finds 2 on the GPU and reads 1
    # from 153, when its choice is known.
    recording = small("1experts", [[[0, 2]], [[2, 1]]], memory={"gpu_budget": "4experts"})
    assert spans(recording, READ) == [(3, 53), (73, 123), (153, 203)]
    assert recording.makespan_ns == 203 + P + X


def test_a_prefetch_goes_through_both_tiers() -> None:
    # One lane. Layer 0's expert is missed: read 3-53, copied 53-73. Its prefetch for layer 1 is ordered with it, behind
    # it: read 53-103, copied 103-123. Expert 0 is done at 80, layer 1's dense part at 83; its expert waits till 123.
    recording = small("4experts", [[[0], [1]]], memory={"gpu_budget": "2experts"}, prefetch={"lookahead": 1, "k": 1})
    assert spans(recording, READ) == [(3, 53), (53, 103)]
    assert spans(recording, PREFETCH) == [(103, 123)]
    assert recording.makespan_ns == 123 + X


def test_a_prefetch_as_far_as_host_memory_leaves_the_copy_to_the_demand() -> None:
    # As above, but layer 1's expert is only read ahead, 53-103. It is demanded when its choice is known, at 83, and the
    # copy waits for the read: 103-123. With two lanes the read is over by 53, and the copy goes from 83 to 103.
    ahead = {"lookahead": 1, "k": 1}
    for io_lanes, read_ns, copied_ns in ((1, 103, 123), (2, 53, 103)):
        recording = small(
            "4experts",
            [[[0], [1]]],
            io_lanes=io_lanes,
            memory={"gpu_budget": "2experts"},
            prefetch=ahead,
            tiers={"host_budget": "4experts", "prefetch": "host"},
        )
        assert spans(recording, READ) == [(3, 53), (read_ns - R, read_ns)]
        assert spans(recording, DEMAND) == [(53, 73), (copied_ns - P, copied_ns)]
        assert not spans(recording, PREFETCH)
        data = tiers([recording])
        assert data is not None
        assert (data["host_hits"], data["host_misses"], data["staged_reads"]) == (1, 1, 1)
        assert recording.makespan_ns == copied_ns + X


def test_what_several_tokens_guess_is_read_ahead_once() -> None:
    # Three tokens at once guess experts 0, 1 and 0 of layer 1, and host memory holds one: 0 is read, then 1 instead.
    trace = tiny_trace([[[0], [0]], [[0], [1]], [[0], [0]]], sequence=np.array([0, 1, 2]))
    scenario = tiny_scenario(
        memory={"gpu_budget": "1experts"}, workload={"batch": 3}, prefetch={"lookahead": 1},
        tiers={"host_budget": "1experts", "prefetch": "host"},
    )  # fmt: skip
    data = tiers([tiny_run(tiny_model(2), tiny_profile(), trace, scenario)])
    assert data is not None and data["staged_reads"] == 2


@pytest.mark.parametrize(("memory", "second_read_ns"), [("pinned", D), ("pageable", D + R + P)])
def test_a_pageable_copy_holds_the_host_also_while_its_expert_is_read(memory: str, second_read_ns: int) -> None:
    # Two misses, two lanes: pinned, both are read at once; pageable, the second is ordered once the first is there.
    profile = tiny_profile(expert_ns=X, io_lanes=2, read_latency_ns=LATENCY, memory=memory)
    scenario = tiny_scenario(tiers={"host_budget": "2experts"})
    recording = tiny_run(tiny_model(1, top_k=2, dense_ns=D, copy_ns=P), profile, tiny_trace([[[0, 1]]]), scenario)
    assert spans(recording, READ) == [(D, D + R), (second_read_ns, second_read_ns + R)]


def test_the_host_pays_for_ordering_a_read() -> None:
    profile = tiny_profile(expert_ns=X, order_ns=11)
    scenario = tiny_scenario(dispatch={"mode": "graph"}, tiers={"host_budget": "1experts"})
    recording = tiny_run(tiny_model(1, dense_ns=D, copy_ns=P), profile, tiny_trace([[[0]]]), scenario)
    assert spans(recording, READ) == [(D + 11, D + 11 + P)]


def test_other_work_takes_the_compute_stream_once_it_is_due_when_the_host_begins_a_pass() -> None:
    # Every 50 ns for 100. Without it a pass takes 30, and the host begins the next once it has the choice: at 0, 3, 33
    # and 63, when one is due: the fourth ends at 90 + 100 + 30. The fifth begins at 193, with those of 100 and 150 due.
    tiny = tiny_profile(expert_ns=X)
    noise = Interruptions(every_ns=50, ns=100, source="assumed")
    profile = tiny.model_copy(update={"compute": tiny.compute.model_copy(update={"interruptions": noise})})
    scenario = tiny_scenario(memory={"gpu_budget": "1experts"})
    tokens = [[[0]], [[1]], [[2]], [[3]], [[0]]]
    recording = tiny_run(tiny_model(1, dense_ns=D, copy_ns=P), profile, tiny_trace(tokens), scenario)
    assert [int(end) for end in recording.step_end_ns] == [30, 60, 90, 220, 450]


# What it reports.


def test_the_result_says_what_host_memory_held_and_the_drive_did() -> None:
    recording = small("2experts", [[[0]], [[1]], [[0]], [[2]], [[1]]], io_lanes=2)
    # 0 and 1 are read, 0 is found, 2 takes the room of 1, which was used longest ago, and 1 is read again.
    data = tiers([recording])
    assert data == {
        "host_budget_bytes": 2 * P,
        "host_hits": 1,
        "host_misses": 4,
        "host_hit_rate": 0.2,
        "host_evict": 2,
        "staged_reads": 0,
        "demoted": 0,
        "demoted_bytes": 0,
        "read_bytes": 4 * P,
        "read_requests": 4,
        "io_lanes": 2,
        "read_busy_ms": 4 * R / 1e6,
        "read_utilization": 4 * R / (2 * recording.makespan_ns),
    }
    assert recording.makespan_ns == 5 * (D + P + X) + 4 * R


# Decisions.


def decide_host(inputs: Inputs) -> HostMemory:
    """Make all decisions of a run without a clock, and return host memory after them."""
    host = make_host_memory(inputs)
    assert host is not None
    for _ in dispatched(inputs, make_manager(inputs), make_prefetch(inputs.scenario, inputs.model), None, host):
        pass
    return host


def counts(host: HostMemory | None) -> tuple[int, int, int]:
    """Hits, misses and evictions."""
    assert host is not None
    return host.hits, host.misses, host.manager.evicted


def test_host_memory_numbers_visits_by_the_layers_of_the_model_and_weighs_their_experts_as_the_gpu_does() -> None:
    class Watching(Lru):
        def begin(self, visit: int, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
            begun.append((visit, layer, list(experts), list(weights)))

    begun: list[tuple[int, int, list[int], list[float]]] = []
    # A stage of layers 1 and 2 of a model of four layers of four experts, in which nothing is ever found.
    inputs = tiny_inputs(
        tiny_model(2), tiny_profile(), tiny_trace([[[0], [1]], [[2], [3]]]), tiny_scenario(memory={"caching": False})
    )
    decided = dispatched(inputs, make_manager(inputs), make_prefetch(inputs.scenario, inputs.model))
    host = HostMemory(MemoryManager([P] * 4, 4, 8 * P, Watching), [P] * 4)
    assert len(list(host.through(decided, first_layer=1))) == 4
    assert begun == [(1, 1, [4], [1.0]), (2, 2, [9], [1.0]), (5, 1, [6], [1.0]), (6, 2, [11], [1.0])]


@pytest.mark.slow
@settings(max_examples=200)
@given(case=cases(copy={"drop_stale": False}, tiers={"host_budget": "1experts"}))
def test_engine_and_replay_find_the_same_in_the_least_host_memory(case: Case) -> None:
    inputs = case.inputs()
    assert counts(play(inputs).host_memory) == counts(decide_host(inputs))


@pytest.mark.slow
@pytest.mark.parametrize("policy", EVICTION)
@settings(max_examples=20)
@given(data=st.data())
def test_engine_and_replay_find_the_same_under_every_policy(policy: str, data: st.DataObject) -> None:
    fixed = {"host_budget": "3experts", "host_policy": policy}
    inputs = data.draw(cases(copy={"drop_stale": False}, tiers=fixed)).inputs()
    assert counts(play(inputs).host_memory) == counts(decide_host(inputs))


@settings(max_examples=100)
@given(
    case=cases(
        prefetch={"lookahead": 0},
        copy={"drop_stale": False},
        tiers={"host_budget": "3experts", "host_policy": "lru", "inclusion": "inclusive"},
    )
)
def test_a_host_lru_finds_what_an_independent_lru_fed_with_the_gpus_misses_finds(case: Case) -> None:
    inputs = case.inputs()
    visits: list[Visit] = list(dispatched(inputs, make_manager(inputs), make_prefetch(inputs.scenario, inputs.model)))
    sizes, experts = inputs.model.expert_bytes, inputs.model.experts
    room = 3 * max(sizes)
    held: OrderedDict[int, int] = OrderedDict()
    hits = misses = 0
    for visit in visits:
        for admission in [admission for wave in visit.waves for admission in wave.admitted]:
            if admission.expert in held:
                hits += 1
                held.move_to_end(admission.expert)
                continue
            misses += 1
            size = sizes[admission.expert // experts]
            while sum(held.values()) + size > room:
                held.popitem(last=False)
            held[admission.expert] = size
    assert counts(decide_host(inputs))[:2] == (hits, misses)


# What no run may do.


@pytest.mark.slow
@settings(max_examples=150)
@given(case=cases(copy={"drop_stale": False}, tiers={"host_budget": "2experts", "inclusion": "inclusive"}))
def test_a_copy_starts_once_its_expert_is_read_and_a_read_once_its_room_is_free(case: Case) -> None:
    inputs = case.inputs()
    recording = play(inputs)
    first_ns, last_ns = by_copy(recording.spans[recording.spans["kind"] == READ])
    copied_ns, left_ns = by_copy(recording.copy_spans)  # what was given up was not copied
    room_left_ns: dict[int, int] = {}
    for copy, read, former in host_decisions(inputs):
        for other in former:
            assert first_ns[read] >= max(last_ns[other], room_left_ns.get(other, 0))
        if copy in copied_ns:
            assert copied_ns[copy] >= last_ns[read]
            room_left_ns[read] = max(room_left_ns.get(read, 0), left_ns[copy])


@pytest.mark.parametrize("discipline", COPY_ORDERS)
def test_a_long_run_remembers_the_last_use_of_no_more_experts_than_have_room_or_have_left_some(discipline: str) -> None:
    # Rooms of 2, 3 and 5 bytes split: parts of one are given to several experts. 900 visits, three experts each.
    model, profile = tiny_model(3, 8, 3, copy_ns=[2, 3, 5]), tiny_profile(io_lanes=2)
    chosen = np.argsort(np.random.default_rng(0).random((300, 3, 8)), axis=2)[..., :3]
    scenario = tiny_scenario(
        memory={"gpu_budget": "40B"}, tiers={"host_budget": "60B"}, copy={"discipline": discipline},
        predictor={"recall": 0.5}, prefetch={"policy": "top-k", "lookahead": 1},
    )  # fmt: skip
    inputs = tiny_inputs(model, profile, tiny_trace(chosen.tolist(), 8), scenario)
    manager, host_memory, costs = make_manager(inputs), make_host_memory(inputs), Costs(inputs)
    assert host_memory is not None and costs.reads is not None
    registers = Registers(FIXED_REGISTERS)
    host = HostRooms(model.experts, registers, [read.requests for read in costs.reads.by_layer])
    gpu = Gpu(settings_of(scenario, costs, True), Rooms(registers), registers, host)
    visits = dispatched(inputs, manager, make_prefetch(scenario, model), None, host_memory)
    for step in stages_program([Stage(gpu, visits, 3, inputs.steps, lambda visit: None)]):
        for _ in step:
            pass
    copies, reads = len(manager.copy_expert), len(host_memory.manager.copy_expert)
    assert min(copies, reads) > 900
    # The smallest has 2 bytes; one room more may be left over in part. A room of host memory has two registers.
    assert 7 < registers.count <= FIXED_REGISTERS + (40 // 2 + 1) + 2 * (60 // 2 + 1)


def host_decisions(inputs: Inputs) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """(copy to the GPU, or -1; its read; the reads whose room that takes, where it is ordered) in order."""
    host = make_host_memory(inputs)
    assert host is not None
    for visit in dispatched(inputs, make_manager(inputs), make_prefetch(inputs.scenario, inputs.model), None, host):
        assert visit.reads is not None
        yield from ((copy, read, room.former if room else ()) for copy, (read, room) in visit.reads.copies.items())
        yield from ((-1, read.copy, read.former) for _, read in visit.reads.staged)


def by_copy(spans: Any) -> tuple[dict[int, int], dict[int, int]]:
    """When the first span of each copy starts, and when the last one ends."""
    start_ns: dict[int, int] = {}
    end_ns: dict[int, int] = {}
    for span in spans:
        copy = int(span["copy"])
        start_ns[copy] = min(start_ns.get(copy, 1 << 62), int(span["start_ns"]))
        end_ns[copy] = max(end_ns.get(copy, 0), int(span["end_ns"]))
    return start_ns, end_ns


@pytest.mark.slow
@settings(max_examples=100)
@given(case=cases(tiers={"host_budget": "2experts"}))
def test_every_read_is_made_once_in_all_its_requests(case: Case) -> None:
    inputs = case.inputs()
    recording = play(inputs)
    costs = Costs(inputs).reads
    host, data = recording.host_memory, tiers([recording])
    assert costs is not None and host is not None and data is not None
    read = host.manager.copy_expert[host.manager.copy_reason != DEMOTED]
    layers = [expert // inputs.model.experts for expert in read]
    assert data["read_requests"] == sum(costs.by_layer[layer].requests for layer in layers)
    assert data["read_bytes"] == sum(inputs.model.expert_bytes[layer] for layer in layers)
    assert data["host_hits"] + data["host_misses"] == len(recording.manager.copy_expert)
    assert data["host_misses"] + data["staged_reads"] == len(layers)
    assert host.manager.assigned_bytes <= host.manager.budget_bytes


def test_with_room_for_every_expert_each_is_read_once() -> None:
    # No cold start is forgiven: the first copy of each expert waits for its read.
    data = simulate(
        load_scenario("synthetic", ["model.layers=2", "workload.tokens=30", *NVME, "tiers.host_budget=100%"])
    )
    used = len(set(data.recording.manager.copy_expert))
    assert data.data["tiers"]["host_misses"] == used < data.data["tiers"]["host_hits"]


#: A machine with a drive.
NVME = ["machine.profile=oneplus15r-ufs4"]


# What is refused.


def test_a_machine_without_a_drive_cannot_have_tiers() -> None:
    with pytest.raises(ProfileError, match=r"tiers\.host_budget = '50%': profile h200-pcie5 has no nvme"):
        load_inputs(load_scenario("synthetic", ["tiers.host_budget=50%"]))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("tiers.host_budget=some", "host_budget = 'some': write it as 'all', '50%', '16GiB' or '512experts'"),
        ("tiers.host_policy=arx", "tiers.host_policy = 'arx': choose one of"),
        ("tiers.prefetch=host", "prefetch = 'host': host memory has every expert"),
        ("tiers.io_lanes=0", "tiers.io_lanes = 0"),
        ("tiers.host_bugdet=50%", "did you mean 'host_budget'"),
    ],
)
def test_a_bad_setting_is_named(setting: str, says: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        load_scenario("synthetic", [setting])
    assert says in str(caught.value)


def test_host_memory_without_room_for_one_expert_is_refused() -> None:
    with pytest.raises(ScenarioError, match=r"tiers\.host_budget = '1MiB': the expert budget is 1.00 MiB"):
        load_inputs(load_scenario("synthetic", [*NVME, "tiers.host_budget=1MiB"]))


def test_more_host_memory_than_the_machine_has_is_refused() -> None:
    told = r"tiers\.host_budget = '65GiB': host would keep 65\.00 GiB, 1\.00 GiB more than the 64\.00 GiB that it"
    with pytest.raises(ScenarioError, match=told):
        load_inputs(load_scenario("nvme", ["tiers.host_budget=65GiB"]))


@pytest.mark.parametrize("name", [name for name in profile_names() if name.endswith("-nvme")])
def test_the_lanes_of_a_profile_together_read_no_faster_than_the_link_to_its_drive(name: str) -> None:
    profile = load_profile(name)
    assert profile.nvme is not None and profile.topology is not None
    (link,) = [link for link in profile.topology.links if link.kind == "nvme"]
    size_bytes = 1 << 30
    assert profile.nvme.lanes * size_bytes * 1e9 / profile.nvme.read.ns(size_bytes) <= link.bytes_per_second
    if profile.nvme.queue_depth is not None:
        rates = [rate for _, rate in profile.nvme.queue_depth.bytes_per_second_by_reads]
        assert max(rates) <= link.bytes_per_second


def test_sizes_of_the_trace_need_a_trace_that_has_them() -> None:
    with pytest.raises(ScenarioError, match=r"model\.sizes = 'trace': the trace does not say"):
        load_inputs(load_scenario("synthetic", ["model.sizes=trace"]))


def test_baselines_go_through_the_same_tiers_but_the_resident_one_which_reads_nothing() -> None:
    scenario = tiny_scenario(memory={"gpu_budget": "1experts"}, tiers={"host_budget": "1experts"})
    tokens = [[[0], [1]]] * 2
    inputs = tiny_inputs(tiny_model(2, dense_ns=D, copy_ns=P), tiny_profile(expert_ns=X), tiny_trace(tokens), scenario)
    data = simulate_inputs(inputs).data
    assert data["baseline_ms"] == data["makespan_ms"] == 4 * (D + P + P + X) / 1e6
    assert data["resident_ms"] == 4 * (D + X) / 1e6
