"""Speed does not go unseen: ratios within one run, held against committed ones with a generous factor.

The one test that measures time; everything else about speed is in benchmarks.
"""

from __future__ import annotations

import performance
import pytest


@pytest.mark.slow
def test_no_ratio_became_much_worse() -> None:
    now = performance.measured()
    assert set(now) == set(performance.kept()) - ({"replay by libCacheSim"} - set(now))
    said = performance.moves(performance.kept(), now)
    print(said)
    assert not performance.slower(performance.kept(), now), f"\n{said}"


def test_a_ratio_of_three_times_passes_and_more_does_not() -> None:
    assert performance.slower({"a": 2.0, "b": 2.0}, {"a": 6.0, "b": 6.1}) == ["b"]
    assert "| b | 2 | 6.1 | 3.05 |" in performance.moves({"b": 2.0}, {"b": 6.1})
