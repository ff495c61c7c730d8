"""No prediction moves unsaid: against the last release, a row whose error moved is named in CHANGELOG."""

from __future__ import annotations

import fidelity
import pytest

from prestage.calibration.executor.measured import load_measured
from prestage.calibration.published.rows import load_source, predicted, source_names
from prestage.calibration.validate.validate import compare
from prestage.resources.profile import load_profile

#: Published rows that are recomputed here, of several sources and kinds; `prestage reproduce published` has all.
SAMPLE = ("R27-both", "R11-first", "R8-124", "R20c-16k", "R17-int4", "R4-48", "R1", "M2-a100-full", "R18-nllb", "R22")
#: Reports that no other test recomputes: one schedule of each.
SCHEDULES = {"h200-held-out": "held-out", "h200-held-out-again": "held-out-again"}


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


@pytest.mark.slow
@pytest.mark.parametrize("report", SCHEDULES)
def test_a_schedule_of_shapes_that_were_not_measured_is_simulated_as_at_the_last_release(report: str) -> None:
    folder = fidelity.VALIDATION / "h200" / SCHEDULES[report]
    file = min(folder.glob("*.json.gz"), key=lambda path: path.stat().st_size)
    row = compare(load_measured(file), load_profile("h200"))
    assert not unsaid(f"{report}: {row['scenario']}", row["makespan_error"])
