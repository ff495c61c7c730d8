"""The engine's decisions are the replay's: the same counts whatever the clock does in between.

On every shared trace, and on hundreds of random small runs that differ in everything that a scenario may say. The
naive decisions of `naive.py` are the third opinion.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import naive_counts
from random_cases import Case, cases, decide

from prestage.engine.load import load_inputs
from prestage.engine.loading.deciders import make_manager
from prestage.engine.policies.eviction import EVICTION
from prestage.engine.policies.prefetch import PREFETCH
from prestage.engine.replay.replay import VisitCounts, count_visits, replay
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import make_scenario
from prestage.engine.simulate import simulate_inputs

EXAMPLES = 300


def engine_counts(inputs: Inputs) -> VisitCounts:
    """The counts of a simulated run, from its result."""
    data = simulate_inputs(inputs, baselines=False).data
    counts = data["counts"]
    found = counts["prefetch_hit"] + counts["cache_hit"] + counts["late"]
    assert data["layer_visits"] == inputs.layer_visits  # it came to its end
    return VisitCounts(data["accesses"], found, counts["miss"], counts["prefetch"], counts["dropped"], counts["evict"])


def replay_counts(inputs: Inputs) -> VisitCounts:
    return count_visits(*decide(inputs))


# Random small runs.


@pytest.mark.slow
@settings(max_examples=EXAMPLES)
@given(case=cases(copy={"discipline": "fifo"}))
def test_in_every_fifo_configuration_the_engine_counts_what_the_replay_counts(case: Case) -> None:
    inputs = case.inputs()
    counts = engine_counts(inputs)
    assert counts == replay_counts(inputs)
    assert counts == naive_counts(inputs)


@pytest.mark.slow
@pytest.mark.parametrize("discipline", ["two_streams", "priority"])
@settings(max_examples=EXAMPLES // 2)
@given(data=st.data())
def test_the_discipline_changes_when_bytes_come_but_no_count(discipline: str, data: st.DataObject) -> None:
    case = data.draw(cases(copy={"discipline": discipline}))
    inputs = case.inputs()
    assert engine_counts(inputs) == replay_counts(inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVICTION)
@settings(max_examples=30)
@given(data=st.data())
def test_every_eviction_policy_decides_the_same_with_a_clock_and_without(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(memory={"eviction": name}))
    inputs = case.inputs()
    assert engine_counts(inputs) == replay_counts(inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PREFETCH if not getattr(PREFETCH[name], "uses_clock", False)])
@settings(max_examples=30)
@given(data=st.data())
def test_every_prefetch_policy_without_a_clock_decides_the_same_with_one(name: str, data: st.DataObject) -> None:
    # The frequency predictor gives confidences, which some policies need.
    case = data.draw(cases(prefetch={"policy": name}, predictor={"name": "frequency"}))
    inputs = case.inputs()
    assert engine_counts(inputs) == replay_counts(inputs)


@pytest.mark.slow
@settings(max_examples=100)
@given(case=cases(prefetch={"lookahead": 0}))
def test_without_prefetch_the_engine_finds_what_the_sequential_replay_finds(case: Case) -> None:
    inputs = case.inputs()
    replayed = replay(inputs.trace, inputs.steps, make_manager(inputs))
    counts = engine_counts(inputs)
    assert (counts.found, counts.miss, counts.evict) == (replayed.count(1), replayed.count(0), replayed.evict)
    assert (counts.prefetch, counts.dropped) == (0, 0)


# Real traces.

#: The traces, each with the preset and the overrides that make it fit.
REAL: dict[str, dict[str, Any]] = {
    "gpt-oss-20b.npz": {"preset": "gpt-oss-20b"},
    "olmoe-1b-7b.npz": {"preset": "olmoe-1b-7b"},
    "qwen3-30b-a3b_k6.npz": {"preset": "qwen3-30b-a3b", "top_k": 6},
    "switch-base-8_encoder.npz": {"preset": "switch-base-128", "layers": 6, "experts": 8},
    "bigmoeonedge-qwen/qwen.route.csv": {"preset": "qwen3-30b-a3b", "top_k": 6},
}
#: Settings that exercise each discipline, deep lookahead, batches, waves and both kinds of lane.
CONFIGURATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "no prefetch": {"prefetch": {"policy": "none"}, "memory": {"gpu_budget": "40%"}},
    "one layer ahead": {"predictor": {"recall": 0.8}, "memory": {"gpu_budget": "25%"}},
    "three layers ahead, per layer, in a batch": {
        "workload": {"batch": 4},
        "prefetch": {"lookahead": 3, "k": 2, "protect": "none"},
        "predictor": {"name": "transition"},
        "memory": {"gpu_budget": "30%", "scope": "per-layer"},
        "dispatch": {"mode": "graph", "router_readback": False, "expert_order": "resident_first"},
        "copy": {"contention": False},
    },
    "in little room, before the launch, by priority": {
        "workload": {"prefill": "chunked", "chunk_tokens": 16},
        "prefetch": {"lookahead": 5, "issue": "before_launch"},
        "predictor": {"name": "previous-token", "latency_us": 20.0, "lane": "compute"},
        "memory": {"gpu_budget": "10experts"},
        "dispatch": {"expert_kernel": "grouped"},
        "copy": {"discipline": "priority", "chunk_bytes": 1 << 20},
    },
    "in two streams": {
        "prefetch": {"lookahead": 2},
        "predictor": {"name": "frequency"},
        "copy": {"discipline": "two_streams"},
    },
}
Load = Callable[[str, str], Inputs]


@pytest.fixture(scope="module")
def load(traces: Path) -> Load:
    """Load a real trace with a configuration; the first tokens are enough."""

    def loaded(trace: str, configuration: str) -> Inputs:
        sections = {name: dict(keys) for name, keys in CONFIGURATIONS[configuration].items()}
        workload = {"trace": str(traces / trace), "tokens": 12, **sections.pop("workload", {})}
        return load_inputs(make_scenario({"model": REAL[trace], "workload": workload, **sections}))

    return loaded


@pytest.mark.slow
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("trace", REAL)
def test_on_a_real_trace_the_engine_counts_what_the_replay_counts(load: Load, trace: str, configuration: str) -> None:
    inputs = load(trace, configuration)
    counts = engine_counts(inputs)
    assert counts == replay_counts(inputs)
    assert counts.accesses > 0 and counts.miss > 0
    assert counts.evict > 0 or inputs.budget_bytes >= sum(inputs.model.expert_bytes) * 2


def test_on_a_real_trace_of_unequal_experts_too(load: Load) -> None:
    inputs = load("bigmoeonedge-qwen/qwen.route.csv", "one layer ahead")
    sizes = tuple(int(size) for size in inputs.trace.extra["expert_bytes"])
    assert len(set(sizes)) > 1
    budget_bytes = sum(sizes) * inputs.model.experts // 4
    inputs = replace(inputs, model=replace(inputs.model, expert_bytes=sizes), budget_bytes=budget_bytes)
    counts = engine_counts(inputs)
    assert counts == replay_counts(inputs)
    assert counts.prefetch > 0 and counts.evict > 0


@pytest.mark.slow
def test_the_random_runs_cover_what_they_are_meant_to_cover() -> None:
    """Not of the engine but of the cases: what a run may meet, some of them meet."""
    met: dict[str, int] = {}

    @settings(max_examples=200, database=None)
    @given(case=cases())
    def collect(case: Case) -> None:
        inputs = case.inputs()
        visits, manager = decide(inputs)
        counts = count_visits(visits, manager)
        for what, is_met in {
            "found": counts.found,
            "prefetch": counts.prefetch,
            "dropped": counts.dropped,
            "evict": counts.evict,
            "waves": any(len(visit.waves) > 1 for visit in visits),
            "empty visits": any(not visit.accesses.experts for visit in visits),
            "shared experts": any(max(visit.accesses.tokens, default=0) > 1 for visit in visits),
            "rooms in parts": any(
                len(admission.former) > 1 for visit in visits for wave in visit.waves for admission in wave.admitted
            ),
            "prompts": any(step.phase == 0 for step in inputs.steps),
            "batches": any(len(step.rows) > 1 and step.phase == 1 for step in inputs.steps),
        }.items():
            met[what] = met.get(what, 0) + bool(is_met)

    collect()
    assert min(met.values()) >= 10, met
    assert np.mean(list(met.values())) >= 60, met
