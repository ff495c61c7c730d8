"""What was served in real time against the simulation: of the same steps, and of the same requests by its own clock.

*Replayed*: the simulation runs the very steps of a repeat, begun as soon as it can, and what each took is compared. *By
itself*: it is given the scenario alone, and schedules by its own clock; the order of admissions and the waits of
requests are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import orjson

from ...bounded import read, unpacked
from ...engine.costs.costs import part_costs
from ...engine.load import load_inputs
from ...engine.run import prepared, run_all
from ...engine.scenario.inputs import Inputs
from ...engine.scenario.scenario import make_scenario
from ...engine.simulate import simulate
from ...workloads.batches import DECODE, PREFILL
from ...workloads.requests.request import Part, RequestStep, Wait, is_decode
from .models import DecodeError
from .serving import FORMAT

#: What is compared of requests.
WAITS = tuple((name, at) for name in ("ttft_ms", "itl_ms") for at in ("p50", "p95"))


@dataclass
class Recorded:
    """Steps that ran, as what makes steps: each again, in order; `took_ns` is what they take now."""

    steps: Sequence[RequestStep]
    #: Before which step there was nothing to run, and until when.
    waits: Mapping[int, int]
    took_ns: list[int] = field(default_factory=list)
    _began_ns: int = 0

    def next_step(self, now_ns: int) -> RequestStep | Wait | None:
        """Returns the next step, or how long nothing had come before it."""
        at = len(self.took_ns)
        if self.waits.get(at, 0) > now_ns:
            return Wait(self.waits[at])
        self._began_ns = now_ns
        return self.steps[at] if at < len(self.steps) else None

    def ended(self, end_ns: int, link_busy_ns: int = 0) -> None:
        """Learn when a step's tokens were there."""
        self.took_ns.append(end_ns - self._began_ns)


def read_served(path: Path) -> dict[str, Any]:
    """Returns what `calibrate decode --requests` wrote, given the file or its folder. Raises DecodeError."""
    if path.is_dir():
        packed = path / "served.json.gz"
        path = packed if packed.exists() else path / "served.json"
    try:
        data = orjson.loads(unpacked(read(path, DecodeError), path, DecodeError))
    except OSError as error:
        raise DecodeError(f"{path}: cannot be read: {error.strerror}") from None
    except orjson.JSONDecodeError as error:
        raise DecodeError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise DecodeError(f"{path}: is not what `calibrate decode --requests` writes: its format must be {FORMAT!r}")
    return data


def compare_served(data: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """Returns each repeat beside the simulation, as plain data for JSON; `settings` go over sections of the scenario.

    `steps`: their median error (simulated / measured - 1), the median of errors without sign, and the error of their
    sum, and what a copy of an expert took beside them. `waits`: measured (the median of repeats), simulated and the
    error. `admitted`: how many repeats admitted in the simulation's order.
    """
    scenario = dict(data["scenario"])
    for section, keys in (settings or {}).items():
        scenario[section] = {**scenario.get(section, {}), **keys}
    chosen = make_scenario(scenario)
    inputs = load_inputs(chosen)
    found = simulate(chosen, baselines=False)
    log = found.serving.log
    assert log is not None
    order = log.requests["number"][np.argsort(log.requests["started_ns"], kind="stable")].tolist()
    repeats = [_replayed(repeat, inputs) for repeat in data["repeats"]]
    measured = {
        f"{name}.{at}": [repeat["requests"][name][at] for repeat in data["repeats"]] for name, at in WAITS
    }  # fmt: skip
    simulated = {f"{name}.{at}": found.data["requests"][name][at] for name, at in WAITS}
    return {
        "model": data["model"]["name"],
        "requests": len(order),
        "repeats": repeats,
        "steps": {
            name: median(repeat[name] for repeat in repeats) for name in ("median_error", "median_off", "sum_error")
        },
        "admitted": [repeat["admitted"] == order for repeat in data["repeats"]],
        "waits": {
            name: {
                "measured_ms": median(values), "least_ms": min(values), "most_ms": max(values),
                "simulated_ms": simulated[name], "error": simulated[name] / median(values) - 1,
            }
            for name, values in measured.items()
        },
    }  # fmt: skip


def replayed_ns(repeat: Mapping[str, Any], inputs: Inputs) -> list[int]:
    """Returns what each step of a repeat takes in the simulation, in ns, each begun as soon as it can."""
    parts = [parts_of(step) for step in repeat["steps"]]
    steps = [
        RequestStep(DECODE if is_decode(own) else PREFILL, np.array(step["rows"], dtype=np.int64), parts=own)
        for own, step in zip(parts, repeat["steps"], strict=True)
    ]
    begun = [step["from_ns"] for step in repeat["steps"]]
    # What idled until an instant idled before the first step from then on.
    waits = {int(np.searchsorted(begun, until)): until for _, until in repeat["idle"]}
    source = Recorded(steps, waits)
    assert inputs.pulls is not None
    replayed = replace(inputs, pulls=replace(inputs.pulls, source=lambda: source))
    run_all(replayed, prepared(replayed, part_costs(replayed)))
    return source.took_ns


def parts_of(step: Mapping[str, Any]) -> tuple[Part, ...]:
    """Returns which rows of which requests a step of a repeat has."""
    return tuple(Part(*part) for part in step["parts"])


def took_ns(repeat: Mapping[str, Any]) -> list[int]:
    """Returns what each step of a repeat took, in ns."""
    return [step["until_ns"] - step["from_ns"] for step in repeat["steps"]]


def _replayed(repeat: Mapping[str, Any], inputs: Inputs) -> dict[str, Any]:
    """Returns what the steps of a repeat take in the simulation, beside what they took."""
    took, simulated = np.array(took_ns(repeat)), np.array(replayed_ns(repeat, inputs))
    errors = simulated / took - 1
    return {
        "steps": len(took),
        "measured_ms": float(np.median(took)) / 1e6,
        "simulated_ms": float(np.median(simulated)) / 1e6,
        "median_error": float(np.median(errors)),
        "median_off": float(np.median(np.abs(errors))),
        "sum_error": float(simulated.sum() / took.sum() - 1),
        "copy_ms": [ns / 1e6 for ns in repeat.get("copy_ns", ())],
    }
