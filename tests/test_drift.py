"""Costs that have moved are told by executed schedules: those that are committed, and a profile that says otherwise."""

from pathlib import Path

import pytest

from prestage.calibration.executor.measured import Measured, load_measured
from prestage.calibration.validate.drift import drifts
from prestage.calibration.validate.report import markdown
from prestage.calibration.validate.validate import validate
from prestage.resources.profile import load_profile

RUNS = Path(__file__).resolve().parent.parent / "calibration" / "validation" / "h200" / "validation"


@pytest.fixture(scope="module")
def run() -> Measured:
    return load_measured(RUNS / "qwen-graph-ahead0.json.gz")


def test_what_the_profile_says_otherwise_has_moved_and_nothing_else(run: Measured) -> None:
    # Every expert point a quarter lower: one that was measured is a third longer than that.
    h200 = load_profile("h200")
    points = tuple(point.model_copy(update={"ns": round(0.75 * point.ns)}) for point in h200.compute.experts)
    changed = h200.model_copy(update={"compute": h200.compute.model_copy(update={"experts": points})})
    before, after = ({one.name: one for one in drifts([run], profile)} for profile in (h200, changed))
    assert before.keys() == after.keys()
    others = {name for name, one in after.items() if one.change != before[name].change}
    assert others == {"expert 2048 x 768, 1 tokens, graph"}
    (name,) = others
    assert after[name].moved and after[name].change == pytest.approx((1 + before[name].change) / 0.75 - 1, rel=1e-3)
    assert next(iter(drifts([run], changed))).name == name  # those that moved most come first


def test_a_cost_is_as_steady_as_it_was_between_the_runs_of_the_fit(run: Measured) -> None:
    found = {one.name: one for one in drifts([run], load_profile("h200"))}
    copy = found["copy queued, 9437184 bytes"]
    assert copy.within == pytest.approx(0.01 + 2 * 0.00095) and not copy.moved


def test_a_validation_says_which_costs_moved(run: Measured) -> None:
    h200 = load_profile("h200")
    gap = h200.compute.graph_gap.model_copy(update={"ns": 5000})
    changed = h200.model_copy(update={"compute": h200.compute.model_copy(update={"graph_gap": gap})})
    text = markdown(validate([run], changed), every_row=False)
    assert "costs moved." in text and "| gap between graphs |" in text


def test_what_the_hosts_calls_take_is_told_together(run: Measured) -> None:
    # Every call of the host twice as dear in the profile: what was measured is half of that, and so it has moved.
    h200 = load_profile("h200")
    costs = {name: getattr(h200.host, name) for name in ("graph_launch", "event_record", "event_wait", "copy_enqueue")}
    costs |= {name: getattr(h200.host, name) for name in ("readback_enqueue", "resume", "copy_resume")}
    twice = {name: cost.model_copy(update={"ns": 2 * cost.ns}) for name, cost in costs.items()}
    changed = h200.model_copy(update={"host": h200.host.model_copy(update=twice)})
    before, after = (
        {one.name: one for one in drifts([run], profile)}["calls of the host, graph"] for profile in (h200, changed)
    )
    assert not before.moved and after.moved
    assert 1 + after.change == pytest.approx((1 + before.change) / 2, rel=1e-3)
