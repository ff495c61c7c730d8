"""Whatever is accepted runs: random scenarios of all sections together are refused before the run, or end."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from random_scenarios import KEYS, draw, play

from prestage.engine.scenario.scenario import Scenario, load_scenario
from prestage.engine.simulate import simulate

#: Scenarios in the suite; `python tests/random_scenarios.py --first 0 --count 5000` plays more.
COUNT, PARTS = 200, 5


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_whatever_is_accepted_runs(part: int, tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    for seed in range(part, COUNT, PARTS):
        outcome = play(seed, tmp_path)
        assert outcome.kind != "fault", f"seed {seed}: {outcome.text}"
        counts[outcome.kind] += 1
    # Many are accepted in the end, else this says little.
    assert counts["ran"] >= COUNT / PARTS / 3


def test_the_baseline_of_shrunk_experts_has_room_for_a_whole_one(tmp_path: Path) -> None:
    # Half of the experts are kept in a billionth of their bytes: a budget of half an expert holds one of these.
    small = ("model.layers=2", "workload.synthetic.tokens=4", "workload.synthetic.prefill_tokens=0", "model.experts=1")
    mixed = (
        "model.top_k=1",
        "workload.synthetic.working_set=1",
        "memory.gpu_budget=25%",
        "compression.mixed=[[0.5, 1], [0.5, 1e-9]]",
    )
    result = simulate(load_scenario("synthetic", (*small, *mixed, "model.expert_bytes=1000000")))
    assert result.data["baseline_ms"] > 0


@pytest.mark.slow
def test_every_key_of_every_section_is_drawn(tmp_path: Path) -> None:
    drawn = set()
    for seed in range(400):
        data = draw(seed, tmp_path)
        drawn |= {f"{name}.{key}" for name, section in data.items() if isinstance(section, dict) for key in section}
    assert not set(KEYS) - drawn
    assert {name.partition(".")[0] for name in KEYS} == set(Scenario.model_fields) - {"seed", "copy_"} | {"copy"}
