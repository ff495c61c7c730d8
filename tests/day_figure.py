"""The day's figure of docs/requests.md: gpt-oss-20b's real routing under load on an H200, at a quarter of its experts.

    python tests/day_figure.py

simulates every rate with and without prefetching, with the boundary between KV blocks and experts at three places, and
with two drafts of two acceptances, given or made by draft layers, and writes a line a run to docs/requests-day.jsonl,
from which the page's tables are made. It takes some three minutes; the trace is that of PRESTAGE_TRACES.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.simulate import simulate
from prestage.output.markdown import table

OUT = Path(__file__).parent.parent / "docs" / "requests-day.jsonl"
#: Requests a second, and what KV blocks have of what 6.5 GiB leave beside the dense weights.
RATES, SHARES = (0.1, 0.25, 0.5, 1.0, 2.0), ("5%", "25%", "50%")
DRAFTS = (0.6, 0.9)
#: With a quarter of it for KV blocks, a quarter of the experts has the rest.
MIDDLE = "25%"
COMMON = (
    "machine.profile=h200", "memory.gpu_budget=100%", "memory.total_bytes=6.5GiB", "requests.count=60",
    "requests.prompt_tokens=1024", "requests.output_tokens=64",
)  # fmt: skip


def runs() -> Iterator[dict[str, Any]]:
    """What is simulated: rate, prefetch policy, share of the KV blocks, and the acceptance of two drafts, if any.

    `layers`: whether draft layers make them, which have experts of their own.
    """
    for rate in RATES:
        for share in SHARES:
            for policy in ("none", "top-k"):
                yield {"rate": rate, "prefetch": policy, "kv": share, "acceptance": None, "layers": False}
        for acceptance in DRAFTS:
            for layers in (False, True):
                yield {"rate": rate, "prefetch": "none", "kv": MIDDLE, "acceptance": acceptance, "layers": layers}


def one(run: dict[str, Any]) -> dict[str, Any]:
    """A run, with what came out."""
    trace = Path(os.environ["PRESTAGE_TRACES"]) / "gpt-oss-20b.npz"
    settings = [
        *COMMON, f"workload.trace={trace}", f"prefetch.policy={run['prefetch']}", f"requests.rate={run['rate']}",
        f"requests.kv.budget={run['kv']}",
    ]  # fmt: skip
    if run["acceptance"] is not None:
        settings += ["requests.speculation.drafts=2", f"requests.speculation.acceptance={run['acceptance']}",
                     f"requests.speculation.draft_layers={str(run['layers']).lower()}"]  # fmt: skip
    data = simulate(load_scenario("gpt-oss-20b", settings), baselines=False).data
    found = data["requests"]
    visits = found["steps"] * data["model"]["layers"]
    return run | {
        "budget_bytes": data["budget_bytes"], "blocks": found["kv_blocks"],
        "running": found["running"], "waiting": found["waiting"], "union": data["accesses"] / visits,
        "hit_rate": data["hit_rate"], "ttft_p50": found["ttft_ms"]["p50"], "ttft_p95": found["ttft_ms"]["p95"],
        "itl_p50": found["itl_ms"]["p50"], "itl_p95": found["itl_ms"]["p95"], "tpot_p50": found["tpot_ms"]["p50"],
        "tokens_per_second": found["output_tokens_per_second"], "preemptions": found["preemptions"],
        "tokens_a_step": found["tokens_per_request_step"], "overloaded": found["overloaded"],
    }  # fmt: skip


def read() -> list[dict[str, Any]]:
    """The runs that were made."""
    return [json.loads(line) for line in OUT.read_text().splitlines()]


def day_figure() -> str:
    """The runs without drafts, as a table."""
    columns = ["requests/s", "KV blocks", "prefetch", "running", "waiting", "experts a visit", "found", "TTFT p50, s",
               "TTFT p95, s", "ITL p50, ms", "ITL p95, ms", "tokens/s", "keeps up"]  # fmt: skip
    rows = [
        [f"{run['rate']:g}", run["kv"], run["prefetch"], f"{run['running']:.1f}", f"{run['waiting']:.1f}", *_cells(run)]
        for run in read()
        if run["acceptance"] is None
    ]
    return table(columns, rows)


def drafts_figure() -> str:
    """The runs with two drafts beside those without, as a table."""
    columns = ["requests/s", "acceptance", "tokens a step", "experts a visit", "found", "TTFT p50, s", "TTFT p95, s",
               "ITL p50, ms", "ITL p95, ms", "tokens/s", "keeps up", "TPOT p50, ms"]  # fmt: skip
    rows = [
        [
            f"{run['rate']:g}", _drafts(run),
            f"{run['tokens_a_step'] or 1:.2f}", *_cells(run), f"{run['tpot_p50']:.1f}",
        ]
        for run in read()
        if run["kv"] == MIDDLE and run["prefetch"] == "none"
    ]  # fmt: skip
    return table(columns, rows)


def _drafts(run: dict[str, Any]) -> str:
    if run["acceptance"] is None:
        return "no drafts"
    return f"{run['acceptance']:g}" + (", by draft layers" if run["layers"] else "")


def _cells(run: dict[str, Any]) -> list[str]:
    return [
        f"{run['union']:.1f}", f"{run['hit_rate']:.1%}", f"{run['ttft_p50'] / 1e3:.2f}", f"{run['ttft_p95'] / 1e3:.2f}",
        f"{run['itl_p50']:.1f}", f"{run['itl_p95']:.1f}", f"{run['tokens_per_second']:.1f}",
        "no" if run["overloaded"] else "yes",
    ]  # fmt: skip


if __name__ == "__main__":
    lines = []
    for run in runs():
        lines.append(json.dumps(one(run)))
        print(lines[-1], flush=True)
        OUT.write_text("\n".join(lines) + "\n")
