"""What became of every access, prefetch and byte, and why each miss missed; worked by hand and held together.

One layer or two of four experts of 20 bytes, 20 ns a copy, dense 3 ns, kernel 7 ns.
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from random_cases import Case, cases
from tiny import tiny_inputs, tiny_model, tiny_profile, tiny_run, tiny_scenario, tiny_trace

from prestage.engine.measure.accesses import MISS_CAUSES, AccessSums, accesses_from
from prestage.engine.measure.recording import FATES, OUTCOMES
from prestage.engine.measure.time_split import time_split
from prestage.engine.simulate import simulate_inputs
from prestage.workloads.guesses import Guesses


def run(
    experts: list[list[list[int]]],
    layers: int,
    budget: str,
    guesses: Any = None,
    scope: str = "global",
    **sections: Any,
) -> dict[str, Any]:
    trace = tiny_trace(experts)
    scenario = tiny_scenario(memory={"gpu_budget": budget, "scope": scope}, **sections)
    inputs = tiny_inputs(tiny_model(layers), tiny_profile(), trace, scenario)
    if guesses is not None:
        rows = np.concatenate([step.rows for step in inputs.steps])
        object.__setattr__(inputs, "guesses", Guesses(rows, np.array(guesses, dtype=np.int16)))
    return simulate_inputs(inputs, baselines=False).data


def test_a_first_miss_is_compulsory_and_a_later_one_capacity() -> None:
    # Room for two: 0 and 1 come, 0 is found, 2 evicts 1, 1 evicts 0.
    data = run([[[0]], [[1]], [[0]], [[2]], [[1]]], 1, "2experts")
    assert data["misses"] == {"compulsory": 3, "pollution": 0, "capacity": 1}
    assert data["counts"]["cache_hit"] == 1


def test_a_miss_that_the_same_cache_without_prefetch_would_have_found_is_pollution() -> None:
    # Room for two. 0, 1, then a wrong guess at the second token brings 3 in place of 0: the third token misses 0, which
    # the cache alone would have had. Then 0 evicts 1, and nobody ever uses 3 before it goes for 1.
    wrong = [[[[-1]]], [[[3]]], [[[-1]]], [[[-1]]]]
    data = run([[[0]], [[1]], [[0]], [[1]]], 1, "2experts", wrong, prefetch={"lookahead": 1})
    assert data["misses"] == {"compulsory": 2, "pollution": 2, "capacity": 0}
    assert data["pollution"] == 2
    assert data["prefetch"] == {"useful": 0, "late": 0, "wasted": 1, "unused": 0, "cancelled": 0}
    assert data["bytes"] == {"demand": 80, "prefetch": 20, "prefetch_not_used": 20}


def test_the_link_is_used_within_the_makespan_only() -> None:
    # Dense 0-3, copy 3-23, expert 23-30; dense 30-33, copy 33-53, expert 53-60; dense 60-63, expert 63-70, the end. A
    # wrong guess for the last token is copied 53-73: 17 of its 20 ns are within the run.
    data = run([[[0]], [[1]], [[0]]], 1, "8experts", [[[[-1]]], [[[3]]], [[[-1]]]], prefetch={"lookahead": 1})
    assert data["makespan_ms"] == 70 / 1e6
    assert data["link_utilization"] == (20 + 20 + 17) / 70


def test_a_gap_whose_bytes_come_as_its_kernel_is_launched_is_stall_also_the_first() -> None:
    # The host launches in 20 ns: the dense part at 20, the expert at 43 (it notices the choice at 23), when the copy of
    # 23-43 ends. Of a gap that two things end at once, bytes come first. The host alone is waited for until 20
    # and, behind the expert of 43-50, for the head at 63.
    eager = tiny_scenario(dispatch={"mode": "eager"})
    recording = tiny_run(tiny_model(1), tiny_profile(launch_ns=20), tiny_trace([[[0]]]), eager)
    assert {name: round(ms * 1e6) for name, ms in time_split(recording).items() if ms} == {
        "compute_ms": 10, "stall_ms": 20, "host_ms": 20 + 13,
    }  # fmt: skip


def test_copies_overlap_with_the_kernels_that_run_meanwhile() -> None:
    # Dense 0-3, copies 3-23 and 23-43, kernels 23-30 and 43-50: 7 of 40 ns.
    model, trace = tiny_model(1, top_k=2), tiny_trace([[[0, 1]]])
    inputs = tiny_inputs(model, tiny_profile(), trace, tiny_scenario(memory={"gpu_budget": "8experts"}))
    assert simulate_inputs(inputs, baselines=False).data["overlap"] == 7 / 40


def test_without_the_cpu_no_visit_has_its_results() -> None:
    recording = tiny_run(tiny_model(1), tiny_profile(), tiny_trace([[[0]]]), tiny_scenario())
    assert recording.results_ns.tolist() == [-1]


def test_rates_from_a_step_on_leave_out_the_accesses_before_it() -> None:
    # Everything fits: the first token misses twice, the second finds both, the third misses at its last layer. Each
    # miss waits 20 ns. The cache alone missed the same three: visits 0, 1 and 5, of experts 0, 5 and 6 of eight.
    trace = tiny_trace([[[0], [1]], [[0], [1]], [[0], [2]]])
    recording = tiny_run(tiny_model(2), tiny_profile(), trace, tiny_scenario())
    alone = np.array([0 * 8 + 0, 1 * 8 + 5, 5 * 8 + 6])
    assert accesses_from(recording, alone) == AccessSums(6, 3, 0, 60, 0, 3)
    assert accesses_from(recording, alone, 1) == AccessSums(4, 3, 0, 20, 0, 1)
    assert accesses_from(recording, None, 2) == AccessSums(2, 1, 0, 20, 0, None)


def test_layers_are_told_apart() -> None:
    # Two layers, all in room; layer 1 is prefetched from layer 0 in the first token (3 ns dense after it: late), and
    # layer 0 across the boundary from layer 1.
    sure = [[[[0]], [[1]]], [[[0]], [[-1]]]]
    data = run([[[0], [0]], [[1], [0]]], 2, "8experts", sure, prefetch={"lookahead": 1})
    first, second = data["by_layer"]
    assert [first[name] for name in OUTCOMES] == [0, 0, 1, 1]  # 0 missed; 1 was on its way
    assert [second[name] for name in OUTCOMES] == [0, 1, 1, 0]  # 0 was on its way, then there
    assert (first["compulsory_miss"], second["compulsory_miss"]) == (1, 0)
    assert (first["prefetch_late"], second["prefetch_late"]) == (1, 1)
    assert (first["demand_bytes"], first["prefetch_bytes"]) == (20, 20)
    assert (second["demand_bytes"], second["prefetch_bytes"]) == (0, 20)
    assert data["bytes"] == {"demand": 20, "prefetch": 40, "prefetch_not_used": 0}


def test_a_prefetch_that_nobody_used_belongs_to_its_experts_layer_and_not_to_that_which_asked() -> None:
    data = run([[[0], [0]]], 2, "8experts", [[[[3]], [[-1]]]], prefetch={"lookahead": 1})
    first, second = data["by_layer"]
    assert (first["prefetch_unused"], second["prefetch_unused"]) == (0, 1)
    assert (first["prefetch_bytes"], second["prefetch_bytes"]) == (0, 20)


def test_where_layers_share_experts_copies_belong_to_the_layer_that_used_them() -> None:
    # Two layers share experts 0 and 1, with room for one: token 0 uses 0 and 1, token 1 uses 1 (found) and 0.
    data = run([[[0], [1]], [[1], [0]]], 2, "1experts", scope="shared")
    first, second = data["by_layer"]
    assert (first["miss"], first["cache_hit"], second["miss"]) == (1, 1, 2)
    assert (first["demand_bytes"], second["demand_bytes"]) == (20, 40)


@pytest.mark.slow
@settings(max_examples=100)
@given(case=cases())
def test_layers_and_causes_add_up_to_the_totals(case: Case) -> None:
    data = simulate_inputs(case.inputs(), baselines=False).data
    rows = data["by_layer"]

    def total(name: str) -> int:
        return sum(row[name] for row in rows)

    assert [row["layer"] for row in rows] == list(range(case.model.layers))
    assert {name: total(name) for name in OUTCOMES} == {name: data["counts"][name] for name in OUTCOMES}
    assert {name: total(f"{name}_miss") for name in MISS_CAUSES} == data["misses"]
    assert sum(data["misses"].values()) == data["counts"]["miss"]
    assert {name: total(f"prefetch_{name}") for name in FATES} == data["prefetch"]
    assert (total("demand_bytes"), total("prefetch_bytes")) == (data["bytes"]["demand"], data["bytes"]["prefetch"])
