"""Figures of docs/requests.md: the keys of [requests], and waits against theory."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pydantic import BaseModel

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

ROOT = Path(__file__).parent.parent
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
    lines = (ROOT / "docs" / "queueing.jsonl").read_text().splitlines()
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
    """What was served in real time on an H200, beside the simulation, as `python tests/served_report.py` found it."""
    rows: dict[tuple[str, str], list[str]] = {}
    ways: list[str] = []
    for found in map(json.loads, (ROOT / "docs" / "served.jsonl").read_text().splitlines()):
        model = found["model"]
        ways += [found["costs"]] if found["costs"] not in ways else []
        for number, repeat in enumerate(found["repeats"]):
            what = f"{repeat['steps']} same steps, repeat {number}, median"
            rows.setdefault((model, what), [_ms(repeat["measured_ms"]), ""]).append(f"{repeat['median_error']:+.1%}")
        for name, wait in found["waits"].items():
            what = name.replace("_ms.", " ").upper().replace(" P", " p")
            spread = f"{_ms(wait['least_ms'])} to {_ms(wait['most_ms'])}"
            rows.setdefault((model, what), [_ms(wait["measured_ms"]), spread]).append(f"{wait['error']:+.1%}")
        alike = f"{sum(found['admitted'])} of {len(found['admitted'])} alike"
        rows.setdefault((model, "order of admissions, repeats"), ["", ""]).append(alike)
    columns = ["model", "what", "measured, ms", "of repeats", *(f"costs {way}: error" for way in ways)]
    return table(columns, [[*key, *cells] for key, cells in rows.items()])


def _ms(value: float) -> str:
    return f"{value:.1f}"
