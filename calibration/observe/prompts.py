"""Prompts that llama-bench measured on an H200, each beside what is predicted of it: the report, as JSON.

    python -m prestage.calibration.observe.prompts OUT.json [flash]

`flash`: those with flash attention. No cost was fitted to a prompt. Tokens of the files are drawn, and so is the
routing here: each token's experts anew.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ...engine.load import load_inputs
from ...engine.prediction import middles
from ...engine.scenario.scenario import make_scenario
from ...engine.simulate import simulate_inputs
from ...files import write_file
from ...workloads.model import load_model
from .reality import BENCH, BENCH_FLASH, BENCHED, CPU_GB_PER_S, SAMPLES, bench_rows

#: What tells one setting from another.
_CELL = ("n_prompt", "n_cpu_moe", "n_threads", "n_ubatch", "load_mode")


def prompts(bench: Path = BENCH) -> Iterator[tuple[str, Mapping[str, Any], list[int]]]:
    """Yields each setting of a prompt: its model, a row of it, and the samples of all its rows, in ns."""
    for model, rows in bench_rows(bench):
        cells: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for row in rows:
            if row["n_prompt"] and not row["n_gen"]:
                cells.setdefault(tuple(row[key] for key in _CELL), []).append(row)
        for own in cells.values():
            yield model, own[0], [ns for row in own for ns in row["samples_ns"]]


def scenario_of(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the scenario of a row: its prompt, then one token, which is not looked at."""
    preset = str(SAMPLES / "models" / f"{name}.toml")
    model = load_model(preset, layers=BENCHED[name])
    tokens, on_cpu = row["n_prompt"], min(row["n_cpu_moe"], model.layers)
    # One layer's experts more than stay there: what a large batch is copied to.
    room = (model.layers - on_cpu + (1 if on_cpu else 0)) * model.experts
    return {
        "model": {"preset": preset, "layers": model.layers},
        "machine": {"profile": "h200"},
        "runtime": {"name": "llama.cpp"},
        "workload": {
            "synthetic": {"tokens": tokens + 1, "prefill_tokens": tokens, "skew": 0.0, "reuse": 0.0},
            "prefill": "chunked",
            "chunk_tokens": min(tokens, row["n_ubatch"]),
        },
        "memory": {"cpu_layers": on_cpu, "gpu_budget": f"{room}experts"},
        "prefetch": {"lookahead": 0},
        "copy": {"host_memory": "pinned" if row["load_mode"] == "none" else "pageable"},
        "miss": {"cpu_threads": row["n_threads"], "cpu_gb_per_s": CPU_GB_PER_S},
    }


def report(bench: Path) -> list[dict[str, Any]]:
    """Returns a row a setting: what a prompt took and what is predicted, in ns."""
    found = []
    for name, row, samples in prompts(bench):
        result = simulate_inputs(load_inputs(make_scenario(scenario_of(name, row))), baselines=False)
        found.append({
            "model": name, **{key: row[key] for key in _CELL}, "samples": len(samples), "measured_ns": median(samples),
            "predicted_ns": round(middles(result.data)["time_to_first_token_ms"] * 1e6),
        })  # fmt: skip
    return found


def main(arguments: Sequence[str]) -> None:
    """Run from the command line."""
    out, *flash = arguments or [""]
    if not out or flash not in ([], ["flash"]):
        sys.exit(str(__doc__))
    rows = report(BENCH_FLASH if flash else BENCH)
    write_file(Path(out), json.dumps({"rows": rows}, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
