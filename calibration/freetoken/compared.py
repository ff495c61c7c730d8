"""Whole runs of FreeToken beside what the simulator says of them, as shipped.

    python -m prestage.calibration.freetoken.compared RUNS.jsonl BANDWIDTHS.json --model qwen3-30b-a3b --layers 12 \\
      --threads 14 --profile h200 -o REPORT.json

The runtime is `freetoken`; of the machine, the memory's rate is what its own measurement read (STREAM). Routing is
drawn without reuse or popularity, as the runs drew it. Nothing is fitted to a run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ...engine.prediction import middles
from ...engine.scenario.scenario import make_scenario
from ...engine.simulate import simulate
from ...errors import InputError
from ...files import write_file
from .runs import TOKENS, WARMUP

#: What each way of the runs is in a scenario.
POLICY = {"offload": "fetch", "hybrid": "split", "cpu": "cpu"}


def measured(file: Path) -> Iterator[dict[str, Any]]:
    """Yields each way and number of slots of a file of runs: the mean step of each round, and what was missed."""
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    counted: dict[tuple[str, int], float] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "steps_s" in row:
            key = row["way"], row["slots"]
            if "missed" in row:
                counted[key] = row["missed"]["miss_rate"]
            if row["way"] != "hybrid" or "missed" not in row:  # counting costs a sharing engine kernels
                rows.setdefault(key, []).append(row)
    if not rows:
        raise InputError(f"{file}: no run has ended: give what `calibration.freetoken.runs` writes")
    for (way, slots), found in sorted(rows.items()):
        rounds = [fmean(row["steps_s"]) * 1e9 for row in found]
        yield {
            "way": way, "slots": slots, "experts": found[0]["experts"], "rounds": len(rounds),
            "measured_ns": median(rounds), "missed": counted.get((way, slots)),
        }  # fmt: skip


def predicted_ns(row: Mapping[str, Any], stream: float, options: argparse.Namespace) -> float:
    """Returns what a step takes by the simulator, given what memory reads, in GB/s."""
    miss: dict[str, Any] = {"policy": POLICY[row["way"]]}
    memory: dict[str, Any] = {"gpu_budget": f"{max(1, row['slots'])}experts", "capacity": "ignore"}
    if row["way"] != "offload":
        miss |= {"cpu_gb_per_s": stream, "cpu_threads": options.threads}
    if row["way"] == "cpu":
        memory["eviction"] = "static"
    sections = {
        "model": {"preset": options.model, "layers": options.layers},
        "machine": {"profile": options.profile},
        "runtime": {"name": "freetoken"},
        "workload": {"synthetic": {"tokens": WARMUP + TOKENS, "skew": 0.0, "reuse": 0.0}, "warmup": f"{WARMUP}tokens"},
        "memory": memory,
        "miss": miss,
    }
    result = simulate(make_scenario(sections), baselines=False)
    return float(1e9 / middles(result.data)["tokens_per_second"])


def main(arguments: list[str] | None = None) -> int:
    """Run it; return the status for the shell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("bandwidths", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--profile", default="h200")
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        stream = json.loads(options.bandwidths.read_text(encoding="utf-8"))["ceilings"]["cpu_stream_read_gbs"]
        rows = [row | {"predicted_ns": predicted_ns(row, stream, options)} for row in measured(options.runs)]
    except (InputError, OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_file(options.out, json.dumps({"runtime": "freetoken", "stream_gbs": stream, "rows": rows}, indent=1).encode())
    for row in rows:
        off = row["predicted_ns"] / row["measured_ns"] - 1
        print(f"{row['way']} {row['slots']}: {row['measured_ns'] / 1e6:.2f} ms, {off:+.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
