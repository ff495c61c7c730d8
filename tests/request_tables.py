"""Figures of docs/requests.md: the keys of [requests], and waits against theory."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pydantic import BaseModel

from prestage.calibration.decode.served import compare_served, read_served
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.scenario.sections_requests import (
    CostSection,
    KvSection,
    LengthSection,
    RequestsSection,
    SchedulerSection,
    SloSection,
    SpeculationSection,
)
from prestage.output.markdown import table

#: What was served in real time: a folder a model.
SERVED = Path(__file__).parent.parent / "calibration" / "samples" / "h200-served"
#: The tables of [requests], by their names.
SECTIONS: dict[str, type[BaseModel]] = {
    "requests": RequestsSection,
    "requests.prompt_tokens": LengthSection,
    "requests.scheduler": SchedulerSection,
    "requests.kv": KvSection,
    "requests.speculation": SpeculationSection,
    "requests.slo": SloSection,
    "requests.cost": CostSection,
}


def request_keys() -> str:
    """Every key of [requests] with its default and its choices, as TOML."""
    lines = ["```toml"]
    for name, section in SECTIONS.items():
        lines.append(f"[{name}]")
        lines += [f"# {line.strip()}" if line.strip() else "#" for line in (section.__doc__ or "").strip().splitlines()]
        for key, field in section.model_fields.items():
            if f"{name}.{key}" not in SECTIONS or key.endswith("_tokens"):
                lines.append(_line(name, key, field.get_default()))
    return "\n".join([*lines, "```"])


def _line(section: str, key: str, value: object) -> str:
    if not isinstance(value, str | int | float | bool):
        return f"# {key} is not set"
    try:
        load_scenario("synthetic", [f"{section}.{key}=?"])
    except ScenarioError as error:
        choices = re.search(r"choose one of (.*)|must be '(.*)'", str(error))
        if choices:
            return f"{key} = {json.dumps(value)}  # {choices[1] or choices[2].replace(chr(39), '')}"
    return f"{key} = {json.dumps(value)}"


def queueing() -> str:
    """Waits in services against Pollaczek-Khinchine, as `python tests/queueing_theory.py` has found them."""
    lines = (Path(__file__).parent.parent / "docs" / "queueing.jsonl").read_text().splitlines()
    columns = ["service", "load", "theory", "mean", "half-width", "of theory", "runs", "inside"]
    rows = [
        [
            cell["service"], f"{cell['load']:g}", f"{cell['theory']:.4f}", f"{cell['mean']:.4f}",
            f"{cell['half_width']:.4f}", f"{cell['relative']:.1%}", str(cell["runs"]),
            "yes" if cell["inside"] else "no",
        ]
        for cell in map(json.loads, lines)
    ]  # fmt: skip
    return table(columns, rows)


def served() -> str:
    """What was served in real time on an H200, beside the simulation."""
    columns = ["model", "what", "measured, ms", "of repeats", "simulated, ms", "error"]
    rows = []
    for folder in sorted(path for path in SERVED.iterdir() if path.is_dir()):
        found = compare_served(read_served(folder))
        for number, repeat in enumerate(found["repeats"]):
            what = f"{repeat['steps']} same steps, repeat {number}"
            errors = f"{repeat['median_error']:+.1%} (their sum {repeat['sum_error']:+.1%})"
            rows.append([folder.name, what, _ms(repeat["measured_ms"]), "", _ms(repeat["simulated_ms"]), errors])
        for name, wait in found["waits"].items():
            spread = f"{_ms(wait['least_ms'])} to {_ms(wait['most_ms'])}"
            what = name.replace("_ms.", " ").upper().replace(" P", " p")
            cells = (_ms(wait["measured_ms"]), spread, _ms(wait["simulated_ms"]), f"{wait['error']:+.1%}")
            rows.append([folder.name, what, *cells])
        same = f"{sum(found['admitted'])} of {len(found['admitted'])} repeats alike"
        rows.append([folder.name, "order of admissions", same, "", "", ""])
    return table(columns, rows)


def _ms(value: float) -> str:
    return f"{value:.1f}"
