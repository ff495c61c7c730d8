"""No prediction moves unsaid: against the last release, a row whose error moved is named in CHANGELOG."""

from __future__ import annotations

import re
from typing import Any

import fidelity
import numpy as np
import pytest
from published_tables import published_figures

from prestage.calibration.executor.measured import load_measured
from prestage.calibration.published.rows import load_source, predicted, source_names
from prestage.calibration.validate.validate import compare
from prestage.resources.profile import Profile, load_profile
from prestage.resources.profile_costs import TransferCost

#: Published rows that are recomputed here, of several sources and kinds; `prestage reproduce published` has all.
SAMPLE = ("R27-both", "R11-first", "R8-124", "R20c-16k", "R17-int4", "R4-48", "R1", "M2-a100-full", "R18-nllb", "R22")
#: Schedules that are simulated anew, by report: two bound by the host, and one by the link. test_reality.py has all
#: of the third report.
SCHEDULES = {
    "h200-held-out": "held-out/held-j-eager",
    "h200-held-out-again": "held-out-again/held-j-eager",
    "h200": "validation/qwen-graph-ahead0-waves",
}


def test_the_readme_tells_the_errors_of_the_committed_reports() -> None:
    errors = {name: abs(error) for name, error in fidelity.errors().items()}
    schedules = [error for name, error in errors.items() if name.startswith("h200: ")]
    held_out = ("h200-llama.cpp-flash: gpt-oss-20b-", "h200-llama.cpp-flash: olmoe-1b-7b-")
    software = [error for name, error in errors.items() if name.startswith(held_out)]
    told = " ".join((fidelity.ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{len(schedules)} schedules" in told
    assert f"time is {np.median(schedules):.1f} %, the 90th percentile {np.percentile(schedules, 90):.1f} %" in told
    assert f"off by {np.median(software):.0f} % in the median and {max(software):.0f} % at worst" in told


def test_the_readme_tells_how_many_published_runs_lie_in_their_range() -> None:
    told = " ".join((fidelity.ROOT / "README.md").read_text(encoding="utf-8").split())
    (now,) = re.findall(r"^\| within p5 to p95 \| \S+ \| (\S+) \|$", published_figures(), re.MULTILINE)
    assert f"{now} do)" in told


def test_every_row_that_moved_since_the_last_release_is_told_in_the_changelog() -> None:
    changes = fidelity.moved(fidelity.released(), fidelity.errors())
    assert not fidelity.unsaid(changes, (fidelity.ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))


def test_a_row_moves_by_more_than_two_points_or_by_going_away_and_is_named_by_its_own_name() -> None:
    changes = fidelity.moved(
        {"r: a": 1.0, "r: b": 1.0, "r: c": -1.0, "r: d": 0.0}, {"r: a": 2.9, "r: b": 3.1, "r: d": -2.1}
    )
    assert changes == {"r: b": "+1.0 % -> +3.1 %", "r: c": "-1.0 % -> gone", "r: d": "+0.0 % -> -2.1 %"}
    said = "# Changelog\n\n## Unreleased\n\n- `b` (+1.0 to\n  +3.1 %) is nearer, as `cd`.\n\n## 0.1.0\n\n- `c` went.\n"
    assert set(fidelity.unsaid(changes, said)) == {"r: c", "r: d"}
    # Told of before it moved on: that does not say where it is.
    assert set(fidelity.unsaid({"r: b": "+1.0 % -> +5.3 %"}, said)) == {"r: b"}


def unsaid(name: str, error: float) -> dict[str, str]:
    """Returns how a row moved from the last release to an error, a fraction, unless CHANGELOG names it."""
    changes = fidelity.moved({name: fidelity.released()[name]}, {name: 100 * error})
    said: dict[str, str] = fidelity.unsaid(changes, (fidelity.ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    return said


@pytest.mark.slow
@pytest.mark.parametrize("row", SAMPLE)
def test_a_published_run_is_predicted_as_at_the_last_release_or_the_changelog_names_it(row: str) -> None:
    sources = map(load_source, source_names())
    ((known, source),) = [(each, source) for source in sources for each in source.rows if each.id == row]
    error = predicted(known, source).error
    assert error is not None and not unsaid(f"published: {row}", error)


def simulated(report: str, profile: Profile) -> dict[str, Any]:
    """Returns the row of a report's schedule of SCHEDULES on a machine."""
    return compare(load_measured(fidelity.VALIDATION / "h200" / f"{SCHEDULES[report]}.json.gz"), profile)


@pytest.mark.slow
@pytest.mark.parametrize("report", SCHEDULES)
def test_a_schedule_is_simulated_as_at_the_last_release_or_the_changelog_names_it(report: str) -> None:
    row = simulated(report, load_profile("h200"))
    assert not unsaid(f"{report}: {row['scenario']}", row["makespan_error"])


def slower(copy: TransferCost) -> TransferCost:
    """Returns a copy that takes a tenth longer."""
    if copy.points is None:
        assert copy.bytes_per_second is not None
        return copy.model_copy(update={"bytes_per_second": copy.bytes_per_second * 10 // 11})
    return copy.model_copy(update={"points": tuple((size, ns * 11 // 10) for size, ns in copy.points)})


@pytest.mark.slow
def test_a_link_a_tenth_slower_is_a_change_that_has_to_be_told() -> None:
    profile = load_profile("h200")
    links = {
        memory: costs.model_copy(update={"alone": slower(costs.alone), "queued": slower(costs.queued)})
        for memory, costs in profile.h2d.items()
    }
    error = simulated("h200", profile.model_copy(update={"h2d": links}))["makespan_error"]
    assert error == pytest.approx(simulated("h200", profile)["makespan_error"] + 0.094, abs=0.01), "94 % are copies"
    assert unsaid("h200: qwen-graph-ahead0-waves", error)
