"""Golden outputs: what the shipped scenarios come to today, so that no number moves unnoticed.

They are seeded outputs of this program, not theory: a change of meaning may move them. Then say so in CHANGELOG.md and
renew `golden.json` with

    python tests/test_golden.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prestage.engine.scenario.scenario import load_scenario, scenario_names
from prestage.engine.simulate import simulate

FILE = Path(__file__).with_name("golden.json")
#: As shipped, for so many decode tokens.
SETTINGS = ["workload.tokens=40"]


def figures(name: str) -> dict[str, Any]:
    """The counts of a shipped scenario, and its times in whole ns."""
    data = simulate(load_scenario(name, SETTINGS)).data
    times_ms = {key: data[key] for key in ("makespan_ms", "baseline_ms", "resident_ms")} | data["time"]
    return {
        "accesses": data["accesses"],
        "layer_visits": data["layer_visits"],
        "counts": data["counts"],
        "prefetch": data["prefetch"],
        "misses": data["misses"],
        "bytes": data["bytes"],
        "time_ns": {key.replace("_ms", "_ns"): round(ms * 1e6) for key, ms in times_ms.items()},
        "predictions_sha256": data["predictions_sha256"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", scenario_names())
def test_a_shipped_scenario_comes_to_its_golden_figures(name: str) -> None:
    golden = json.loads(FILE.read_text(encoding="utf-8"))
    assert figures(name) == golden[name], "if this is meant, renew it: python tests/test_golden.py"


def test_golden_figures_are_of_the_shipped_scenarios() -> None:
    assert sorted(json.loads(FILE.read_text(encoding="utf-8"))) == scenario_names()


if __name__ == "__main__":
    golden = {name: figures(name) for name in scenario_names()}
    FILE.write_text(json.dumps(golden, indent=2) + "\n", encoding="utf-8")
    print(f"{FILE.name}: {', '.join(golden)}")
