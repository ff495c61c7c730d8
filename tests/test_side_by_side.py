"""How far kernels of two streams slow each other down: what a simulation was given is found again in its spans."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_execute_beside import inputs_of
from tiny import ASSUMED

from prestage.calibration.executor.measured import Times
from prestage.calibration.executor.plan import make_plan
from prestage.calibration.fit.side_by_side import _by_itself_ns, _factor, _left, _Span, _spans, _sums, side_by_side
from prestage.engine.costs.costs import part_costs
from prestage.engine.loading.stages import with_profile
from prestage.engine.run import prepared, run_all
from prestage.engine.scenario.inputs import Inputs
from prestage.resources.profile import Factor
from prestage.resources.profile_costs import Duration


def slowed(variant: str, **factors: float) -> Inputs:
    """The inputs on a machine whose kernels take tens of microseconds, and slow each other down so."""
    inputs = inputs_of(variant)
    compression = inputs.scenario.compression.model_copy(update={"decompress_gb_per_s": 0.7})
    inputs = replace(inputs, scenario=inputs.scenario.model_copy(update={"compression": compression}))
    if "predictor" in variant:
        inputs = replace(inputs, predictor=replace(inputs.predictor, latency_us=3.0))
    profile = inputs.profile
    measured = {
        name: Duration(ns=round(value), **ASSUMED) if name == "unpacking_leaves" else Factor(factor=value, **ASSUMED)
        for name, value in factors.items()
    }
    return with_profile(
        inputs, profile.model_copy(update={"contention": profile.contention.model_copy(update=measured)})
    )


def test_a_kernel_that_stood_still_counts() -> None:
    # 10 by itself; of 30 the other stream was busy for 24, in which it did what is left of the 10 after 6: 4.
    assert _factor(24, 10 - (30 - 24)) == 6
    assert _factor(24, 0) == 20  # the largest that a profile takes
    assert _factor(24, 30) == 1  # the fastest


def test_what_a_kernel_takes_by_itself_depends_on_how_much_of_it_was_beside_a_copy() -> None:
    alone = [_Span((), 10, 0, 0.0), _Span((), 12, 0, 0.0), _Span((), 21, 0, 1.0)]
    assert _by_itself_ns(alone, 0.5) == 16
    assert _by_itself_ns(alone[:2], 0.5) == 11
    assert _by_itself_ns(alone[2:], 0.0) == 21


@pytest.mark.parametrize(
    ("variant", "factors"),
    [
        ("compressed in host memory, aside", {"unpacking_leaves": 1500, "unpacking_beside_kernels": 1.5}),
        ("compressed on the GPU, aside", {"unpacking_leaves": 900, "unpacking_beside_kernels": 1.0}),
        ("predictor in graphs", {"kernels_beside_predictor": 1.25, "predictor_beside_kernels": 2.0}),
    ],
)
def test_what_a_simulation_was_given_is_found_again(variant: str, factors: dict[str, float]) -> None:
    inputs = slowed(variant, **factors)
    (recording,) = run_all(inputs, prepared(inputs, part_costs(inputs)))
    plan = make_plan(inputs)
    taken: dict[Any, list[Any]] = defaultdict(list)
    for span in np.sort(recording.spans, order="start_ns"):
        taken[span["kind"], span["visit"], span["expert"]].append((span["start_ns"], span["end_ns"]))
    marks = sum(entry.marks for entry in plan.entries)
    start_ns, end_ns = np.full((2, marks), -1, dtype=np.int64)
    for entry in plan.entries:
        if spans_of := taken[entry.kind, entry.visit, entry.expert]:
            start_ns[entry.mark], end_ns[entry.mark] = spans_of.pop(0)
    stamps = np.zeros(marks, dtype=np.int64)
    times = Times(start_ns, end_ns, stamps, stamps, stamps, stamps[:1])
    found = {name: (_sums(spans), one_ns) for name, spans, one_ns in _spans(plan, times)}
    assert set(found) == set(factors)
    for name, ((count, beside_ns, done_ns), one_ns) in found.items():
        assert count > 5, name
        value = _left(beside_ns / one_ns, done_ns) if name == "unpacking_leaves" else _factor(beside_ns, done_ns)
        assert value == pytest.approx(factors[name], rel=0.05), name


def test_of_runs_in_which_nothing_was_aside_nothing_is_said() -> None:
    assert side_by_side([]) == {}
