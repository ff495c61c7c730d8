"""Machines from parts against the same machines measured, their own measurements left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from prestage.calibration.validate.from_parts import (
    Ratios,
    attention_ratios,
    cost_ratios,
    from_parts,
    names,
    schedule_summary,
    schedules,
)
from prestage.resources.parts import reached
from prestage.resources.profile import load_profile

VALIDATION = Path(__file__).parent.parent / "calibration" / "validation"
FOLDERS = {"h200": VALIDATION / "h200" / "validation", "h100-x2": VALIDATION / "h100-x2" / "two-gpus"}


@pytest.mark.parametrize("name", names())
def test_a_machine_is_put_together_without_its_own_measurements(name: str) -> None:
    made, own = from_parts(name), load_profile(name)
    device = own.device
    assert made.host.launch.device not in (None, device)
    assert made.compute.rule.bytes_per_second != from_measured(name)
    rate = made.h2d["pinned"].queued.bytes_per_second
    others = reached.link_share(without=[name])
    assert rate == pytest.approx(others.middle * 16 * 32e9 * 128 / 130 / 8, rel=5e-3)


def from_measured(name: str) -> int:
    """The rule's rate where the machine's own measurements are used."""
    gpu = reached.MEASURED[name][0]
    rate: int = load_profile(f"gpu={gpu}").compute.rule.bytes_per_second
    return rate


@pytest.mark.parametrize("name", names())
def test_costs_of_every_kind_are_near_those_measured(name: str) -> None:
    families = {row.what: row for row in cost_ratios(name)}
    assert len(families) == 10
    for what, row in families.items():
        assert 0.4 < row.median < 2.5, what
    kernels = [row for what, row in families.items() if "up to" in what]
    assert len(kernels) == 3
    assert all(0.85 < row.median < 1.15 for row in kernels)
    assert 0.85 < families["copies to the GPU, pinned"].median < 1.2


@pytest.mark.parametrize("name", names())
def test_attention_by_the_surface_is_near_every_measured_context(name: str) -> None:
    rows = attention_ratios(name)
    assert [row.what for row in rows] == [f"dense part at {context:,} positions" for context in (1024, 8192, 32768)]
    for row in rows:
        assert len(row.ratios) == 3
        assert all(0.85 < ratio < 1.1 for ratio in row.ratios)


def test_the_middle_of_ratios_is_their_median() -> None:
    assert Ratios("", (0.5, 1.0, 3.0)).median == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_executed_schedules_are_within_an_eighth_on_a_machine_from_parts(name: str) -> None:
    rows = schedules(name, FOLDERS[name])
    assert len(rows) > 20
    assert all(abs(row["error"]) < 0.14 for row in rows), max(rows, key=lambda row: abs(row["error"]))
    for row in schedule_summary(rows):
        assert row["median_size"] < 0.09
        assert row["least"] <= row["median"] <= row["most"]
        assert row["inside"] is None


def test_a_range_says_whether_it_holds_what_was_measured() -> None:
    (path,) = sorted(FOLDERS["h200"].glob("qwen-graph-ahead0.json.gz"))
    (row,) = schedules("h200", path, replicates=5)
    assert row["inside"] in (True, False)
    (summary,) = schedule_summary([row])
    assert summary["inside"] == int(row["inside"])
