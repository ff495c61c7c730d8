"""Late prefetches, each with its why: worked by hand and held together.

One layer or two of four experts of 20 bytes, 20 ns a copy, dense 3 ns, kernel 7 ns.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from random_cases import Case, cases
from tiny import tiny_inputs, tiny_model, tiny_profile, tiny_scenario, tiny_trace

from prestage.engine.simulate import simulate_inputs
from prestage.errors import InputError
from prestage.output.late import late_data, late_prefetches
from prestage.output.saved import Run, run_of
from prestage.workloads.guesses import Guesses


def run(experts: list[list[list[int]]], layers: int, guesses: Any) -> Run:
    scenario = tiny_scenario(memory={"gpu_budget": "8experts"}, prefetch={"lookahead": 1})
    inputs = tiny_inputs(tiny_model(layers), tiny_profile(), tiny_trace(experts), scenario)
    rows = np.concatenate([step.rows for step in inputs.steps])
    object.__setattr__(inputs, "guesses", Guesses(rows, np.array(guesses, dtype=np.int16)))
    return run_of(simulate_inputs(inputs, baselines=False))


def test_a_prefetch_behind_a_demand_copy_is_late_because_of_it() -> None:
    # Visit 0: dense 0-3, demand 3-23, its prefetch ordered at 3 waits until 23 and is there at 43; kernel 23-30, dense
    # of visit 1 30-33: its choice is known at 33, 30 after the order. Ordered then, the next prefetch waits until 43,
    # is there at 63, and the choice of visit 2 is known at 53, behind the kernel 43-50 and the dense part.
    late = late_prefetches(run([[[0], [0]], [[1], [0]]], 2, [[[[0]], [[1]]], [[[0]], [[-1]]]]))
    assert late.tolist() == [(1, 4, 0, 1, 3, 30, 20, 20, 10), (0, 1, 1, 2, 33, 20, 10, 20, 10)]


def test_a_prefetch_on_an_idle_link_is_late_because_it_was_ordered_too_late() -> None:
    # Visit 1: dense 30-33, found, its prefetch 33-53; kernel 33-40, dense of visit 2 40-43: 10 after the order.
    alone = run([[[0]], [[0]], [[1]]], 1, [[[[-1]]], [[[1]]], [[[-1]]]])
    assert late_prefetches(alone).tolist() == [(0, 1, 1, 2, 33, 10, 0, 20, 10)]
    said = late_data(alone)
    assert (said["prefetches"], said["late"], said["ordered_too_late"], said["behind_others"]) == (1, 1, 1, 0)
    assert said["medians"] == {"had_ms": 1e-5, "queued_ms": 0.0, "copied_ms": 2e-5, "late_ms": 1e-5}
    assert said["worst"][0]["ordered_ms"] == 33e-6


def test_none_late_is_no_row() -> None:
    none = run([[[0]], [[1]]], 1, [[[[-1]]], [[[-1]]]])
    assert len(late_prefetches(none)) == 0
    assert late_data(none)["worst"] == []


@settings(max_examples=30)
@given(cases())
def test_what_a_late_prefetch_had_and_lacked_is_what_it_waited_and_took(case: Case) -> None:
    result = simulate_inputs(case.inputs(), baselines=False)
    late = late_prefetches(run_of(result))
    assert len(late) == result.data["prefetch"]["late"]
    known_ns = result.recording.decoded.visits["choice_known_ns"][late["used_visit"]]
    assert (late["ordered_ns"] + late["had_ns"] == known_ns).all()
    assert (late["had_ns"] + late["late_ns"] == late["queued_ns"] + late["copied_ns"]).all()
    assert (late["queued_ns"] >= 0).all()
    assert (late["copied_ns"] > 0).all()
    assert (late["used_visit"] >= late["ordered_visit"]).all()


def test_several_gpus_and_damaged_runs_are_refused_in_a_line() -> None:
    good = run([[[0]], [[0]], [[1]]], 1, [[[[-1]]], [[[1]]], [[[-1]]]])
    other = good.accesses.copy()
    other["expert"] = 0
    for broken, why in (
        (replace(good, accesses=other), "an expert that came late was used nowhere: damaged"),
        (replace(good, copies=good.copies[:1]), "is copy 1 of 1: damaged"),
        (replace(good, accesses=good.accesses[:1]), "no access waited for them: damaged"),
    ):
        with pytest.raises(InputError, match=why):
            late_prefetches(broken)
    good.timeline.add_lane("gpu1", "compute", "compute stream")
    with pytest.raises(InputError, match="for runs on one GPU, and it has 2"):
        late_prefetches(good)
