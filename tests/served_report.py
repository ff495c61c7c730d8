"""What was served in real time on an H200, held against the simulation: by costs as shipped, and by fitted ones.

    python tests/served_report.py

fits the costs of the runtime twice: to what other requests took, served just before, of both models together; and for
each repeat to the other repeats of its model. It writes docs/served.jsonl, a line for each model and each way, from
which the table of docs/requests.md is made, and the first fit as calibration/samples/h200-served/served.toml. It takes
some two minutes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from prestage.calibration.decode.served import WAITS, compare_served, read_served
from prestage.calibration.observe.fit import Predictor, fit, runtime_file
from prestage.calibration.observe.logs import load_logs

ROOT = Path(__file__).parent.parent
SAMPLES, OUT = ROOT / "calibration" / "samples" / "h200-served", ROOT / "docs" / "served.jsonl"
MODELS = ("mixtral-8x7b", "qwen3-30b-a3b")
COSTS = ("step", "layer", "expert")
#: How costs were come by: as shipped, from other requests, from other repeats.
SHIPPED, REQUESTS, REPEATS = "as shipped", "fitted to other requests", "fitted to other repeats"


def fitted(logs: Sequence[Path], out: Path) -> Path:
    """Write the runtime whose costs are fitted to these files."""
    observations = load_logs(logs)
    predictor = Predictor(observations, "transformers")
    found = fit(predictor, observations, COSTS)
    about = f"transformers, fitted to what was served: {', '.join(sorted({each.group for each in observations}))}"
    out.write_text(runtime_file(found, predictor, "transformers", (out.stem, about)))
    return out


def compared(data: dict[str, Any], runtime: Path | None = None) -> dict[str, Any]:
    """Returns what the simulation makes of a file, by its own runtime or another."""
    return compare_served(data, None if runtime is None else {"runtime": {"name": str(runtime)}})


def by_other_repeats(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns what the simulation makes of each repeat by costs that are fitted to the others; waits in the median."""
    each = []
    for left_out, repeat in enumerate(data["repeats"]):
        others = [other for number, other in enumerate(data["repeats"]) if number != left_out]
        log = folder / "others.json"
        log.write_text(json.dumps({**data, "repeats": others}))
        runtime = fitted([log], folder / f"{data['model']['name']}-{left_out}.toml")
        each.append(compared({**data, "repeats": [repeat]}, runtime))
    names = [f"{name}.{at}" for name, at in WAITS]
    measured = {name: [one["waits"][name]["measured_ms"] for one in each] for name in names}
    simulated = {name: median(one["waits"][name]["simulated_ms"] for one in each) for name in names}
    return each[0] | {
        "repeats": [one["repeats"][0] for one in each],
        "admitted": [same for one in each for same in one["admitted"]],
        "waits": {
            name: {
                "measured_ms": median(took), "least_ms": min(took), "most_ms": max(took),
                "simulated_ms": simulated[name], "error": simulated[name] / median(took) - 1,
            }
            for name, took in measured.items()
        },
    }  # fmt: skip


def main() -> None:
    """Make the report."""
    everything = fitted([SAMPLES / model / "fit" / "served.json.gz" for model in MODELS], SAMPLES / "served.toml")
    lines = []
    with TemporaryDirectory() as folder:
        for model in MODELS:
            data = read_served(SAMPLES / model)
            ways = {
                SHIPPED: compared(data), REQUESTS: compared(data, everything),
                REPEATS: by_other_repeats(data, Path(folder)),
            }  # fmt: skip
            lines += [json.dumps({"costs": costs, **found}) for costs, found in ways.items()]
    OUT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
