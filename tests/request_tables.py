"""Figures of docs/requests.md: the keys of [requests], and gpt-oss-20b's real routing under load."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.scenario.sections_requests import (
    KvSection,
    LengthSection,
    RequestsSection,
    SchedulerSection,
    SloSection,
    SpeculationSection,
)
from prestage.engine.simulate import simulate
from prestage.output.markdown import table

#: The tables of [requests], by their names.
SECTIONS: dict[str, type[BaseModel]] = {
    "requests": RequestsSection,
    "requests.prompt_tokens": LengthSection,
    "requests.scheduler": SchedulerSection,
    "requests.kv": KvSection,
    "requests.speculation": SpeculationSection,
    "requests.slo": SloSection,
}
#: What the table of loads tries: requests a second, with and without prefetching.
RATES = (0.1, 0.5, 1.0, 2.0, 4.0)


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


def request_loads() -> str:
    """gpt-oss-20b's real routing at a quarter of the experts on an H200, by rate, with and without prefetching."""
    trace = Path(os.environ["PRESTAGE_TRACES"]) / "gpt-oss-20b.npz"
    columns = ["requests/s", "prefetch", "running", "experts a visit", "found", "TTFT p50, s", "TTFT p95, s",
               "ITL p50, ms", "ITL p95, ms", "tokens/s", "keeps up"]  # fmt: skip
    rows = []
    for rate in RATES:
        for policy in ("none", "top-k"):
            settings = [
                f"workload.trace={trace}",
                "machine.profile=h200",
                "memory.gpu_budget=25%",
                f"prefetch.policy={policy}",
                f"requests.rate={rate}",
                "requests.count=60",
                "requests.prompt_tokens=128",
                "requests.output_tokens=32",
            ]
            data = simulate(load_scenario("gpt-oss-20b", settings), baselines=False).data
            rows.append([f"{rate:g}", policy, *_cells(data)])
    return table(columns, rows)


def _cells(data: dict[str, Any]) -> list[str]:
    found, visits = data["requests"], data["requests"]["steps"] * data["model"]["layers"]
    ttft, itl = found["ttft_ms"], found["itl_ms"]
    return [
        f"{found['running']:.1f}",
        f"{data['accesses'] / visits:.1f}",
        f"{data['hit_rate']:.1%}",
        f"{ttft['p50'] / 1e3:.2f}",
        f"{ttft['p95'] / 1e3:.2f}",
        f"{itl['p50']:.1f}",
        f"{itl['p95']:.1f}",
        f"{found['output_tokens_per_second']:.1f}",
        "no" if found["overloaded"] else "yes",
    ]
