"""The guide's virtual memory manager: exact counts and latencies by hand, its state table, and the engines' decisions.

The machine is the shipped rtx3090: an expert of 27 MiB takes 3.41 ms from the host, 4.146667 ms right behind another
copy ((40.73 - 3.41) / 9, rounded to ns), and 0.07 ms within the GPU.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from prestage import RoutingTrace, VirtualMemoryManager, load_scenario, simulate, synthesize
from prestage.engine.decide.dispatch import visits
from prestage.engine.decide.memory_manager import MemoryManager
from prestage.engine.load import load_inputs
from prestage.engine.measure.memory_log import (
    CACHE,
    COMPUTATION,
    CPU_MEMORY,
    EVENTS,
    GPU_MEMORY,
    PREFETCH,
    TRANSITIONS,
    MemoryEvent,
    TransitionError,
    next_state,
)
from prestage.engine.policies.eviction import EVICTION, Lru
from prestage.engine.policies.prefetch import PREFETCH as PREFETCH_POLICIES
from prestage.engine.policies.prefetch import Options
from prestage.engine.replay.replay import count_visits
from prestage.engine.scenario.amounts import ScenarioError
from prestage.guide.virtual_memory import VirtualMemoryError, guesses_for_targets
from prestage.resources.profile_costs import ProfileError
from prestage.workloads.batches import plan_steps
from prestage.workloads.predictors import Oracle
from prestage.workloads.statistics import summary
from prestage.workloads.trace_limits import TraceError

ALONE, QUEUED, HIT = 3.41, 4.146667, 0.07


def small(slots: int, k: int = 1, **options: Any) -> VirtualMemoryManager:
    """A manager of 4 experts of 27 MiB a layer with room for so many."""
    return VirtualMemoryManager(4, 27.0, 27 * slots, k, **options)


def log_of(manager: VirtualMemoryManager) -> list[tuple[str, int, int, int]]:
    return [(event.event, event.expert, event.layer, event.token) for event in manager.events]


# Hand-worked runs.


def test_a_run_by_hand_counts_prefetch_hit_cache_hit_miss_and_eviction() -> None:
    # Two layers, room for three. Token 0: 0/0 guessed right, 1/1 missed (guess 1/2 wrong). Token 1: 0/0 is cached;
    # 1/3 is guessed, and memory is full of 0/0, 1/2, 1/1 in order of recency 1/2, 1/1, 0/0: 1/2 leaves for it.
    manager = small(3)
    metrics = manager.simulate_inference([[0, 1], [0, 3]], [[[0], [2]], [[0], [3]]])
    assert log_of(manager) == [
        ("prefetch", 0, 0, 0),
        ("hit", 0, 0, 0),
        ("prefetch", 2, 1, 0),
        ("miss", 1, 1, 0),
        ("cache_hit", 0, 0, 1),
        ("evict", 2, 1, 1),
        ("prefetch", 3, 1, 1),
        ("hit", 3, 1, 1),
    ]
    assert [event.memory_mb for event in manager.events] == [27, 27, 54, 81, 81, 54, 81, 81]
    # Prefetches hidden: 0.07, 3.41, 0.07, 0.07.
    assert [event.time_ms for event in manager.events] == [0, 0, HIT, HIT, 3.48, 3.55, 3.55, 3.55]
    assert metrics["event_counts"] == {"prefetch": 3, "hit": 2, "cache_hit": 1, "miss": 1, "evict": 1}
    assert (metrics["hit_rate"], metrics["cache_hit_rate"], metrics["miss_rate"]) == (3 / 4, 1 / 4, 1 / 4)
    assert metrics["prediction_accuracy"] == 3 / 4
    assert metrics["prefetch"] == {"useful": 2, "wasted": 1, "unused": 0, "dropped": 0}
    assert metrics["total_latency_ms"] == pytest.approx(3 * HIT + ALONE)
    assert metrics["avg_latency_ms"] == pytest.approx((3 * HIT + ALONE) / 4)
    assert metrics["speedup"] == pytest.approx(4 * ALONE / (3 * HIT + ALONE))
    # In use: 27 MiB for 0.07 ms, then 81 MiB, of 81.
    assert metrics["memory_utilization"] == pytest.approx((27 * HIT + 81 * (ALONE + 2 * HIT)) / (81 * 3.62))
    assert metrics["efficiency"] == metrics["speedup"] / metrics["memory_utilization"]
    assert (metrics["total_prefetch_time_ms"], metrics["total_miss_penalty_ms"]) == (pytest.approx(3 * ALONE), ALONE)


def test_the_same_run_with_copies_charged_waits_for_every_prefetch_and_queues_misses_behind_them() -> None:
    # The run above: each prefetch takes 3.41 before its access, and the miss is a copy right behind one.
    manager = small(3)
    charged = manager.simulate_inference([[0, 1], [0, 3]], [[[0], [2]], [[0], [3]]])["copies_charged"]
    accesses = [event for event in manager.events if event.event in ("hit", "cache_hit", "miss")]
    waits = [ALONE + HIT, ALONE + QUEUED, HIT, ALONE + HIT]
    assert [access.charged_latency_ms for access in accesses] == pytest.approx(waits)
    assert charged["total_latency_ms"] == pytest.approx(sum(waits))
    assert charged["avg_latency_ms"] == pytest.approx(sum(waits) / 4)
    starts = [0, 3.41, 3.48, 6.89, 11.036667, 11.106667, 11.106667, 14.516667]
    assert [event.charged_time_ms for event in manager.events] == pytest.approx(starts)


def test_ten_prefetches_cost_the_published_40_73_ms_and_a_hit_0_07() -> None:
    manager = VirtualMemoryManager()
    assert manager.prefetch_experts(range(10), None, 0, 0) == pytest.approx(40.73, abs=1e-5)
    assert manager.access_expert(3, 0, 0) == (HIT, "hit")
    assert manager.access_expert(3, 0, 1) == (HIT, "cache_hit")
    assert manager.access_expert(np.int64(99), 0, 2) == (ALONE, "miss")  # type: ignore[arg-type]
    # The first access waits for all ten, the next ones for nothing.
    waits = [event.charged_latency_ms for event in manager.events if event.event != "prefetch"]
    assert waits == pytest.approx([40.73 + HIT, HIT, ALONE], abs=1e-5)
    assert manager.metrics()["prefetch"] == {"useful": 1, "wasted": 0, "unused": 9, "dropped": 0}


def test_the_surest_guesses_come_first_and_ties_stay_ranked() -> None:
    manager = VirtualMemoryManager(num_experts=8, prefetch_k=3)
    manager.prefetch_experts([1, 2, 3, 4, -1], [0.1, 0.5, 0.1, 0.9, 1.0], 2, 0)
    assert [event.expert for event in manager.events] == [4, 2, 1]
    manager.simulate_inference([[0]], [[[5, 6, 7]]], [[[0.2, 0.2, 0.3]]])
    assert [event.expert for event in manager.events] == [7, 5, 6, 0]


def test_without_caching_everything_brought_for_a_layer_leaves_after_it() -> None:
    manager = small(4, k=2, enable_caching=False)
    metrics = manager.simulate_inference([[0], [0], [3]], [[[0, 1]], [[2, 0]], [[1, 2]]])
    assert log_of(manager)[:4] == [("prefetch", 0, 0, 0), ("prefetch", 1, 0, 0), ("hit", 0, 0, 0), ("evict", 0, 0, 0)]
    assert metrics["event_counts"] == {"prefetch": 6, "hit": 2, "cache_hit": 0, "miss": 1, "evict": 7}
    assert manager.events[-1].memory_mb == 0
    assert metrics["prefetch"] == {"useful": 2, "wasted": 4, "unused": 0, "dropped": 0}


def test_experts_belong_to_their_layer_unless_layers_share_them() -> None:
    traces = [[2, 2, 2]]
    assert small(3).simulate_inference(traces)["event_counts"]["miss"] == 3
    shared = small(3, share_across_layers=True)
    assert shared.simulate_inference(traces)["event_counts"] == {
        "prefetch": 0, "hit": 0, "cache_hit": 2, "miss": 1, "evict": 0,
    }  # fmt: skip
    assert [event.layer for event in shared.events] == [0, 1, 2]


def test_a_prefetch_does_not_evict_what_was_prefetched_for_the_same_access() -> None:
    # Room for two, three guesses: the third finds no room.
    metrics = small(2, k=3).simulate_inference([[0]], [[[0, 1, 2]]])
    assert (metrics["event_counts"]["prefetch"], metrics["prefetch"]["dropped"]) == (2, 1)


def test_an_expert_that_is_guessed_twice_for_one_access_is_prefetched_or_dropped_once() -> None:
    metrics = small(1, k=4).simulate_inference([[0]], [[[0, 1, 0, 1]]])
    assert (metrics["event_counts"]["prefetch"], metrics["prefetch"]["dropped"]) == (1, 1)
    manager = small(1, k=2)  # also in two calls
    for _ in range(2):
        manager.prefetch_experts([0, 1], None, layer_id=0, token_id=0)
    assert manager.metrics()["prefetch"]["dropped"] == 1


def test_the_experts_of_a_token_that_do_not_fit_together_are_served_in_turn() -> None:
    # Top-3 with room for two: 0 and 1 are computed and make room for 2; only one has to leave. Copies on demand of one
    # visit queue behind each other.
    for caching, evicted in ((True, [0]), (False, [0, 1, 2])):
        manager = small(2, enable_caching=caching)
        metrics = manager.simulate_inference([[[0, 1, 2]]])
        assert [event.expert for event in manager.events if event.event == "evict"] == evicted
        assert metrics["total_latency_ms"] == pytest.approx(ALONE + 2 * QUEUED)
        assert metrics["speedup"] == 1


def test_a_hit_costs_nothing_if_hits_are_not_charged_and_other_machines_have_other_prices() -> None:
    free = VirtualMemoryManager(profile="h200-pcie5", charge_hits=False)
    latency_ms, event = free.access_expert(0, 0, 0)
    assert (event, free.access_expert(0, 0, 0)) == ("miss", (0.0, "cache_hit"))
    assert latency_ms == pytest.approx(0.01 + 27 * 2**20 / 55.3e9 * 1e3, rel=0.02)  # 10 us + bytes / 55.3 GB/s


def test_half_an_expert_takes_half_the_time() -> None:
    assert VirtualMemoryManager(expert_size_mb=13.5).access_expert(0, 0, 0) == (ALONE / 2, "miss")


def test_a_run_of_hits_that_cost_nothing_has_no_rates_of_time() -> None:
    manager = small(1, charge_hits=False)
    metrics = manager.simulate_inference([[0]], [[[0]]])
    assert (metrics["hit_rate"], metrics["total_latency_ms"]) == (1, 0)
    assert (metrics["memory_utilization"], metrics["speedup"], metrics["efficiency"]) == (None, None, None)


def test_before_any_access_rates_are_undefined() -> None:
    metrics = VirtualMemoryManager().metrics()
    assert metrics["accesses"] == 0
    assert [metrics[key] for key in ("hit_rate", "avg_latency_ms", "memory_utilization")] == [None, None, None]


def test_each_run_starts_from_an_empty_memory_and_gives_the_same() -> None:
    manager = small(3)
    first = manager.simulate_inference([[0, 1]])
    assert manager.simulate_inference([[0, 1]]) == first
    assert manager.simulate_inference([[0, 1, 2]])["accesses"] == 3  # the trace says how many layers there are


def test_lists_arrays_and_traces_run_alike() -> None:
    lists = [[0, 1], [2, 1], [0, 3]]
    trace = RoutingTrace(np.array(lists)[..., None], 4)
    expected = small(3).simulate_inference(lists)
    for given_ in (np.array(lists), [[[0], [1]], [[2], [1]], [[0], [3]]], trace):
        assert small(3).simulate_inference(given_) == expected


def test_a_token_that_is_not_routed_at_a_layer_has_no_access_there() -> None:
    trace = RoutingTrace(np.array([[[1], [2]], [[1], [0]]]), 4, present=np.array([[True, True], [True, False]]))
    for shared in (False, True):
        manager = small(4, share_across_layers=shared)
        assert manager.simulate_inference(trace)["event_counts"]["miss"] == 2
        assert log_of(manager)[-1] == ("cache_hit", 1, 0, 1)


# The state machine.


def test_the_table_has_the_guides_states_and_every_event_somewhere() -> None:
    states = {CPU_MEMORY, PREFETCH, GPU_MEMORY, CACHE, COMPUTATION}
    assert {state for state, _ in TRANSITIONS} == states == set(TRANSITIONS.values())
    assert {event for _, event in TRANSITIONS} == {*EVENTS, "arrive", "keep"}


def test_what_the_table_does_not_allow_raises_naming_event_state_and_expert() -> None:
    for event in (*EVENTS, "arrive", "keep"):
        for state in (CPU_MEMORY, PREFETCH, GPU_MEMORY, CACHE, COMPUTATION):
            if (state, event) in TRANSITIONS:
                assert next_state(event, state, 5) == TRANSITIONS[state, event]
                continue
            with pytest.raises(TransitionError, match=f"event '{event}', state '{state}', expert 5"):
                next_state(event, state, 5)


def replay_states(events: list[MemoryEvent], caching: bool, shared: bool) -> dict[tuple[int, int], str]:
    """Play a log through the table as a reader would; return who is not in CPU memory at the end."""
    state: dict[tuple[int, int], str] = {}
    for event in events:
        key = (0 if shared else event.layer, event.expert)
        state[key] = next_state(event.event, state.get(key, CPU_MEMORY), event.expert)
        if event.event == "prefetch":
            state[key] = next_state("arrive", state[key], event.expert)
        elif event.event != "evict" and caching:
            state[key] = next_state("keep", state[key], event.expert)
        state = {key: value for key, value in state.items() if value != CPU_MEMORY}
    return state


# Properties.


@st.composite
def runs(draw: st.DrawFn) -> tuple[VirtualMemoryManager, RoutingTrace, np.ndarray[Any, Any], int]:
    """A manager, a random trace and random guesses, some of them none."""
    experts, layers, tokens = draw(st.integers(2, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 12))
    top_k = draw(st.integers(1, min(3, experts)))
    slots, k = draw(st.integers(1, experts * layers)), draw(st.integers(0, experts))
    seed = draw(st.integers(0, 10**6))
    trace = synthesize(tokens, layers, experts, top_k, skew=0.5, reuse=0.3, seed=seed)
    guesses = np.random.default_rng(seed).integers(-1, experts, (tokens, layers, max(1, k)))
    manager = VirtualMemoryManager(
        experts,
        27.0,
        27.0 * slots + draw(st.sampled_from((0, 13))),
        k,
        draw(st.booleans()),
        share_across_layers=draw(st.booleans()),
        eviction=draw(st.sampled_from(sorted(EVICTION))),
    )
    return manager, trace, guesses, slots


@given(runs())
def test_memory_never_exceeds_its_limit_and_every_log_obeys_the_table(
    run: tuple[VirtualMemoryManager, RoutingTrace, np.ndarray[Any, Any], int],
) -> None:
    manager, trace, guesses, slots = run
    metrics = manager.simulate_inference(trace, guesses)
    events, counts = manager.events, metrics["event_counts"]
    assert max(event.memory_mb for event in events) <= 27 * slots
    assert counts["hit"] + counts["cache_hit"] + counts["miss"] == metrics["accesses"] == trace.experts.size
    left = replay_states(events, manager.enable_caching, manager.share_across_layers)
    assert len(left) == counts["prefetch"] + counts["miss"] - counts["evict"] == events[-1].memory_mb / 27
    fates = metrics["prefetch"]
    assert fates["useful"] + fates["wasted"] + fates["unused"] == counts["prefetch"]
    # Every ms of either clock belongs to an access; with copies charged the prefetches are among them.
    accesses = [event for event in events if event.event in ("hit", "cache_hit", "miss")]
    assert metrics["total_latency_ms"] == pytest.approx(math.fsum(event.latency_ms for event in accesses))
    charged_ms = metrics["copies_charged"]["total_latency_ms"]
    assert charged_ms == pytest.approx(math.fsum(event.charged_latency_ms for event in accesses))
    assert charged_ms >= metrics["total_latency_ms"] + metrics["total_prefetch_time_ms"] - 1e-6
    times = [event.time_ms for event in events]
    assert times == sorted(times)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 10**6), st.sampled_from((1, 2)))
def test_it_decides_as_the_engines_do(slots: int, k: int, seed: int, top_k: int) -> None:
    """Guesses made one layer ahead, prefetched after each visit, are the same guesses, prefetched before the next."""
    trace = synthesize(15, 3, 5, top_k, skew=0.5, reuse=0.3, seed=seed)
    steps = plan_steps(trace.sequence, trace.phase)
    guesses = Oracle(0.6, seed).guess(trace, steps, 1, k)
    engine = MemoryManager([1] * 3, 5, slots, Lru)
    counts = count_visits(visits(trace, steps, engine, PREFETCH_POLICIES["top-k"](Options(k, 1)), guesses), engine)
    manager = VirtualMemoryManager(5, 27.0, 27 * slots, k)
    metrics = manager.simulate_inference(trace, *guesses_for_targets(guesses))
    events = metrics["event_counts"]
    assert (counts.accesses, counts.miss) == (metrics["accesses"], events["miss"])
    assert (counts.prefetch, counts.dropped) == (events["prefetch"], metrics["prefetch"]["dropped"])
    assert counts.evict == events["evict"]


def naive_counts(trace: RoutingTrace, guesses: np.ndarray[Any, Any], slots: int, k: int) -> Counter[str]:
    """Top-1 LRU with the guide's order of things, in a list, oldest first; each guess of an access asks once."""
    counts: Counter[str] = Counter()
    order: list[tuple[int, int]] = []
    unused: set[tuple[int, int]] = set()
    for token in range(trace.tokens):
        for layer in range(trace.layers):
            fresh: list[tuple[int, int]] = []
            for guess in dict.fromkeys(guesses[token, layer, :k].tolist()):
                if guess < 0 or (layer, guess) in order:
                    continue
                may_go = [expert for expert in order if expert not in fresh]
                if len(order) == slots and not may_go:
                    counts["dropped"] += 1
                    continue
                if len(order) == slots:
                    order.remove(may_go[0])
                    counts["evict"] += 1
                order.append((layer, guess))
                fresh.append((layer, guess))
                unused.add((layer, guess))
                counts["prefetch"] += 1
            wanted = (layer, int(trace.experts[token, layer, 0]))
            if wanted in order:
                counts["hit" if wanted in unused else "cache_hit"] += 1
                order.remove(wanted)
            else:
                counts["miss"] += 1
                if len(order) == slots:
                    unused.discard(order.pop(0))
                    counts["evict"] += 1
            order.append(wanted)
            unused.discard(wanted)
            unused &= set(order)
    return counts


@given(st.integers(1, 10), st.integers(0, 5), st.integers(0, 10**6))
def test_its_counts_are_those_of_a_naive_list(slots: int, k: int, seed: int) -> None:
    trace = synthesize(20, 2, 5, 1, skew=0.5, reuse=0.3, seed=seed)
    guesses = np.random.default_rng(seed).integers(-1, 5, (20, 2, max(1, k)))
    metrics = VirtualMemoryManager(5, 27.0, 27 * slots, k).simulate_inference(trace, guesses)
    counts = naive_counts(trace, guesses, slots, k)
    assert metrics["event_counts"] == {name: counts[name] for name in EVENTS}
    assert metrics["prefetch"]["dropped"] == counts["dropped"]


@given(st.integers(1, 20), st.integers(0, 10**6))
@settings(max_examples=30)
def test_sharing_layers_is_a_model_of_one_layer(slots: int, seed: int) -> None:
    trace = synthesize(12, 3, 6, 1, skew=0.5, seed=seed)
    guesses = np.random.default_rng(seed).integers(0, 6, (12, 3, 2))
    shared = VirtualMemoryManager(6, 27.0, 27 * slots, 2, share_across_layers=True).simulate_inference(trace, guesses)
    one = VirtualMemoryManager(6, 27.0, 27 * slots, 2)
    assert one.simulate_inference(trace.experts.reshape(-1, 1, 1), guesses.reshape(-1, 1, 2)) == shared


@pytest.mark.parametrize("name", sorted(EVICTION))
def test_every_eviction_policy_can_be_chosen(name: str) -> None:
    trace = synthesize(30, 2, 8, 2, skew=0.5, reuse=0.3)
    guesses = np.random.default_rng(0).integers(0, 8, (30, 2, 3))
    for shared in (False, True):
        manager = VirtualMemoryManager(8, 27.0, 27 * 6, 3, eviction=name, share_across_layers=shared)
        metrics = manager.simulate_inference(trace, guesses)
        assert metrics["accesses"] == 120
        assert metrics["event_counts"]["evict"] > 0


# What is refused.

TRACE = [[0, 1], [2, 3]]
GUESSES = [[[0, 1], [1, 2]], [[2, 0], [3, 1]]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, r"num_experts = 0: must be an integer, 1\.\.32768"),
        ({"num_experts": 2.5}, r"num_experts = 2\.5: must be an integer"),
        ({"num_experts": True}, r"num_experts = True: must be an integer"),
        ({"expert_size_mb": -27.0}, r"expert_size_mb = -27\.0: must be a size in MiB, more than 0"),
        ({"expert_size_mb": math.nan}, r"expert_size_mb = nan"),
        ({"gpu_memory_limit_mb": -1}, r"gpu_memory_limit_mb = -1: must be a size in MiB, room for one of 27\.0 MiB"),
        ({"gpu_memory_limit_mb": 26}, r"gpu_memory_limit_mb = 26: .* room for one"),
        ({"gpu_memory_limit_mb": math.inf}, r"gpu_memory_limit_mb = inf"),
        (
            {"gpu_memory_limit_mb": 24577},
            r"gpu_memory_limit_mb = 24577: the GPU of profile rtx3090 has 24,576 MiB in all",
        ),
        ({"prefetch_k": 129}, r"prefetch_k = 129: must be an integer, 0\.\.128 \(num_experts\)"),
        ({"prefetch_k": -1}, r"prefetch_k = -1"),
        ({"num_layers": 0}, r"num_layers = 0: must be an integer, at least 1"),
        ({"eviction": "lur"}, r"eviction = 'lur': choose one of .*did you mean 'lru'"),
        ({"profile": "h200-pcie5"}, r"charge_hits = True: profile 'h200-pcie5' has no d2d cost"),
    ],
)
def test_a_bad_setting_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(VirtualMemoryError, match=message):
        VirtualMemoryManager(**options)


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(ProfileError, match=r"rtx3091.*did you mean 'rtx3090'"):
        VirtualMemoryManager(profile="rtx3091")


@pytest.mark.parametrize(
    ("traces", "predictions", "confidences", "message"),
    [
        ([[0, 1], [2]], None, None, r"routing_traces: token 1 has shape \(1,\), token 0 \(2,\)"),
        ([[0, [1, 2]]], None, None, r"routing_traces: token 0 is ragged"),
        ([], None, None, r"routing_traces: empty"),
        ([0, 1], None, None, r"routing_traces: experts: shape \(2,\)"),
        ([[0.5, 1.0]], None, None, r"routing_traces: dtype float64: must be integers"),
        ([[0, 4]], None, None, r"routing_traces: experts.*4.*0\.\.3"),
        ([[0, -1]], None, None, r"routing_traces: experts.*-1"),
        ([[[1, 1]]], None, None, r"routing_traces: experts at row 0, layer 0: \[1, 1\]: an expert appears twice"),
        (TRACE, GUESSES[:1], None, r"predictions: shape \(1, 2, 2\): must be \(tokens, layers, n\) = \(2, 2, n\)"),
        (TRACE, TRACE, None, r"predictions: shape \(2, 2\)"),
        (TRACE, [[[0, 1], [1]], [[2, 0], [3, 1]]], None, r"predictions: token 0 is ragged"),
        (TRACE, [[[0, 1], [1, 9]], [[2, 0], [3, 1]]], None, r"predictions at \(0, 1, 1\): 9: must be -1 .* or 0\.\.3"),
        (TRACE, [[[0, 1], [-2, 1]], [[2, 0], [3, 1]]], None, r"predictions at \(0, 1, 0\): -2"),
        (TRACE, GUESSES, [[[0.5]]], r"confidence_scores: shape \(1, 1, 1\): must be of the predictions' shape, \(2, 2"),
        (TRACE, GUESSES, [[[1, 1], [1, math.nan]], [[1, 1], [1, 1]]], r"confidence_scores at \(0, 1, 1\): nan"),
        (TRACE, GUESSES, [[[1, 1], [1, math.inf]], [[1, 1], [1, 1]]], r"confidence_scores at \(0, 1, 1\): inf"),
        (TRACE, GUESSES, [[[1, 1], [1]], [[1, 1], [1, 1]]], r"confidence_scores: ragged"),
        (TRACE, None, [[[1]]], r"confidence_scores: given without predictions"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    traces: Any, predictions: Any, confidences: Any, message: str
) -> None:
    manager = small(3)
    with pytest.raises((VirtualMemoryError, TraceError), match=message):
        manager.simulate_inference(traces, predictions, confidences)
    assert manager.events == []


def test_a_trace_of_another_model_is_refused() -> None:
    with pytest.raises(VirtualMemoryError, match="num_experts = 4: routing_traces are of 8 experts"):
        small(3).simulate_inference(RoutingTrace(np.zeros((1, 1, 1), dtype=int), 8))
    with pytest.raises(VirtualMemoryError, match="num_layers = 3: routing_traces have 2 layers"):
        small(3, num_layers=3).simulate_inference(TRACE)


def test_single_calls_check_their_place() -> None:
    manager = VirtualMemoryManager()
    for call, message in (
        (lambda: manager.access_expert(128, 0, 0), r"expert_id = 128: must be an integer, 0\.\.127"),
        (lambda: manager.access_expert(0, 12, 0), r"layer_id = 12: must be an integer, 0\.\.11"),
        (lambda: manager.access_expert(0, 0, -1), r"token_id = -1"),
        (lambda: manager.prefetch_experts([128], None, 0, 0), r"predicted_experts at \(0, 0\): 128"),
        (lambda: manager.prefetch_experts([[1]], None, 0, 0), r"predicted_experts: shape \(1, 1\)"),  # type: ignore
        (lambda: manager.prefetch_experts([1], [math.nan], 0, 0), r"confidence_scores at \(0, 0\): nan"),
        (lambda: manager.prefetch_experts([1], [1.0, 0.5], 0, 0), r"confidence_scores: shape \(1, 2\)"),
    ):
        with pytest.raises(VirtualMemoryError, match=message):
            call()
    assert manager.events == []


# What it shows.


def test_the_plots_show_memory_under_its_limit_and_a_row_for_each_event(tmp_path: Path) -> None:
    manager = small(3)
    manager.simulate_inference([[0, 1], [0, 3]], [[[0], [2]], [[0], [3]]])
    for charged in (False, True):
        memory = manager.plot_memory(tmp_path / "memory.png", charged=charged)
        (line, limit) = memory.axes[0].lines
        assert np.asarray(line.get_ydata()).max() == 81 == np.asarray(limit.get_ydata()).max()
        latency = manager.plot_latency(tmp_path / "latency.svg", charged=charged)
        rows = [label.get_text().split("\n")[0] for label in latency.axes[0].get_yticklabels()]
        assert rows == ["prefetch", "hit", "cache hit", "miss"]
    assert "1 x 7.56 ms" in latency.axes[0].get_yticklabels()[-1].get_text()  # 3.41 + 4.146667
    assert {path.name for path in tmp_path.iterdir()} == {"memory.png", "latency.svg"}


def test_plots_of_nothing_are_empty() -> None:
    manager = VirtualMemoryManager()
    figures = (manager.plot_memory(), manager.plot_latency())
    assert all(isinstance(figure, Figure) for figure in figures)


def test_the_report_prints_both_accountings_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    manager = small(3)
    manager.simulate_inference([[0, 1], [0, 3]], [[[0], [2]], [[0], [3]]])
    manager.print_report()
    # (3 x 0.07 + 3.41) / 4, and (3.48 + 7.556667 + 0.07 + 3.48) / 4.
    lines = capsys.readouterr().out.splitlines()
    assert any("mean latency" in line and "0.905 ms" in line and "3.647 ms" in line for line in lines)


# The guide's configurations.


@pytest.mark.parametrize("name", ["guide-k5-1gb", "guide-k10-2gb", "guide-k20-4gb"])
def test_the_guides_scenarios_run_overlapped_with_the_same_decisions(name: str) -> None:
    inputs = load_inputs(load_scenario(name, ["workload.synthetic.tokens=40"]))
    k, gigabytes = (int(digits) for digits in name.removeprefix("guide-k").removesuffix("gb").split("-"))
    assert (inputs.scenario.prefetch.k, inputs.budget_bytes) == (k, gigabytes * 2**30)
    assert (inputs.model.experts, inputs.model.layers, inputs.model.top_k) == (128, 12, 1)
    manager = VirtualMemoryManager(prefetch_k=k, gpu_memory_limit_mb=1024 * gigabytes)
    assert inputs.guesses is not None
    events = manager.simulate_inference(inputs.trace, *guesses_for_targets(inputs.guesses))["event_counts"]
    counts = simulate(inputs.scenario, baselines=False).data["counts"]
    assert counts["miss"] == events["miss"]
    assert counts["prefetch_hit"] + counts["cache_hit"] + counts["late"] == events["hit"] + events["cache_hit"]
    assert (counts["prefetch"], counts["evict"]) == (events["prefetch"], events["evict"])


def test_the_guides_scenarios_share_one_workload_and_predictor() -> None:
    scenarios = [load_scenario(name) for name in ("guide-k5-1gb", "guide-k10-2gb", "guide-k20-4gb")]
    first = scenarios[0]
    for scenario in scenarios[1:]:
        assert (scenario.workload, scenario.predictor, scenario.seed) == (first.workload, first.predictor, first.seed)
    with pytest.raises(ScenarioError, match="did you mean 'guide-k5-1gb'"):
        load_scenario("guide-k5-1g")


def test_their_skew_and_reuse_are_those_of_a_real_top_1_router(traces: Path) -> None:
    real = summary(RoutingTrace.load(traces / "switch-base-8_encoder.npz"))
    synthetic = load_scenario("guide-k10-2gb").workload.synthetic
    assert synthetic is not None
    drawn = [
        summary(synthesize(215, 6, 8, 1, skew=synthetic.skew, reuse=synthetic.reuse, seed=seed)) for seed in range(20)
    ]
    gini = np.mean([run["skew"]["gini"]["mean"] for run in drawn])
    assert gini == pytest.approx(real["skew"]["gini"]["mean"], abs=0.005)
    assert np.mean([run["reuse"]["mean"] for run in drawn]) == pytest.approx(real["reuse"]["mean"], abs=0.005)
