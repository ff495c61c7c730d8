"""Drawn outputs: what small runs of all sections together come to today, so that no number moves unnoticed.

The scenarios of `drawn.json` were drawn by `random_scenarios`, without files, and stay as they are; beside each stands
a digest of every part of its result. They run by SimPy, where decisions are made in Python: of what goes by either,
that is the code that is read. A change of meaning, or of a shipped profile, may move them: as with `test_golden`, say
so in CHANGELOG.md and renew the digests with

    python tests/test_drawn.py

and with `--draw` the scenarios, too: after that, digests tell nothing of what moved before.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from random_scenarios import accepted_of, composed, draw

from prestage.engine.costs.costs import part_costs
from prestage.engine.load import load_inputs
from prestage.engine.run import prepared, run_all
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import make_scenario
from prestage.engine.simulate import simulate_inputs
from prestage.errors import InputError

FILE = Path(__file__).with_name("drawn.json")
#: What is no figure: what was asked, by what, and words.
NO_FIGURES = ("scenario", "versions", "estimates", "warnings")
#: How many are drawn of each kind, and the most spans that one may have.
COUNT, MOST_SPANS = 60, 4_000
#: Runs are checked in so many tests, each of which says what moved in which.
PARTS = 12
#: Machines that need no file: measured ones, and of parts with a drive; all but the first have several GPUs.
MACHINES: tuple[dict[str, Any], ...] = (
    {"profile": "h200"}, {"profile": "h100-x2"}, {"profile": "h200-x2"},
    {"gpu": "rtx4090", "gpus": 3, "link": "pcie4 x16", "ram": "2x DDR5-5600", "drive": "7 GB/s"},
    {"gpu": "rtx3090", "gpus": 2, "link": "pcie3 x16", "ram": "4x DDR4-3200", "drive": "3 GB/s"},
)  # fmt: skip


def digests(data: dict[str, Any]) -> dict[str, str]:
    """Returns a digest of every part of a scenario's result, and of the spans on each GPU."""
    result = simulate_inputs(load_inputs(make_scenario(data)), engine="simpy")
    parts = {key: part for key, part in result.data.items() if key not in NO_FIGURES}
    texts = {key: json.dumps(_rounded(part), sort_keys=True, default=str).encode() for key, part in parts.items()}
    texts["spans"] = result.timeline.spans().tobytes()
    return {key: hashlib.sha256(text).hexdigest()[:8] for key, text in texts.items()}


def _rounded(part: Any) -> Any:
    """Returns plain data with nine digits of each number, which no order of sums moves."""
    if isinstance(part, dict):
        return {str(key): _rounded(value) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return [_rounded(value) for value in part]
    return float(f"{part:.9g}") if isinstance(part, float) else part


@pytest.mark.parametrize("part", range(PARTS))
def test_a_drawn_run_comes_to_what_it_came_to(part: int) -> None:
    known = json.loads(FILE.read_text(encoding="utf-8"))[part::PARTS]
    assert known
    moved = {}
    for row in known:
        now = digests(row["scenario"])
        parts = sorted(key for key in now.keys() | row["digests"].keys() if now.get(key) != row["digests"].get(key))
        if parts:
            moved[row["name"]] = parts
    assert not moved, "if this is meant, say so in CHANGELOG.md and renew them: python tests/test_drawn.py"


def without_files(data: dict[str, Any], machines: Sequence[dict[str, Any]], rng: Random) -> dict[str, Any]:
    """Returns a drawn scenario whose trace is synthetic, and whose machine is one of these."""
    data["machine"] = dict(rng.choice(machines))
    workload = data["workload"]
    if "trace" in workload or "fit" in workload.get("synthetic", {}):
        workload.pop("trace", None)
        workload["synthetic"] = {"tokens": rng.choice((3, 8)), "prefill_tokens": rng.choice((0, 1))}
    return data


def _drawn(
    name: str, make: Callable[[int, Path], dict[str, Any]], kept: Callable[[Inputs], bool], first: int, count: int
) -> list[dict[str, Any]]:
    """Returns so many scenarios of a kind that run and are small, with their names; on MACHINES from the first on."""
    found: list[dict[str, Any]] = []
    for seed in itertools.count():
        if len(found) == count:
            break
        with tempfile.TemporaryDirectory() as folder:
            data = without_files(make(seed, Path(folder)), MACHINES[first:], Random(seed))
            inputs = accepted_of(data, seed)
            if inputs is None or not kept(inputs) or folder in str(data):
                continue
            try:
                recorded = run_all(inputs, prepared(inputs, part_costs(inputs)), engine="simpy")
            except InputError:
                continue
            if 20 < sum(len(one.spans) for one in recorded) < MOST_SPANS:
                found.append({"name": f"{name} {seed}", "scenario": json.loads(json.dumps(data, default=_set))})
    return found


def _set(section: Any) -> Any:
    """Returns what is set of a section that a shipped scenario has."""
    return section.model_dump(by_alias=True, exclude_unset=True, mode="json")


def main() -> None:
    """Renew the digests of `drawn.json`, and with --draw its scenarios."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--draw", action="store_true", help="draw the scenarios anew")
    if options.parse_args().draw:
        rows = _drawn("all sections", draw, lambda _: True, 0, COUNT)
        rows += _drawn("pipeline", composed, lambda inputs: inputs.expert_parallel is None, 1, COUNT // 2)
        rows += _drawn("sharing", composed, lambda inputs: inputs.expert_parallel is not None, 1, COUNT // 2)
        rows += _drawn("misses", composed, lambda inputs: inputs.scenario.miss.policy != "fetch", 0, COUNT // 2)
    else:
        rows = json.loads(FILE.read_text(encoding="utf-8"))
    rows = [{"name": row["name"], "scenario": row["scenario"], "digests": digests(row["scenario"])} for row in rows]
    lines = ",\n".join(json.dumps(row) for row in rows)
    FILE.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{FILE.name}: {len(rows)} runs")


if __name__ == "__main__":
    main()
