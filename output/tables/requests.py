"""Runs under load, and searches for capacity, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from .layout import columns_of, plain_console, print_rows

#: Latencies by their keys, in the order in which a request meets them.
_LATENCIES = {
    "queueing_ms": "queueing",
    "ttft_ms": "first token (TTFT)",
    "itl_ms": "between tokens (ITL)",
    "tpot_ms": "mean of a request (TPOT)",
    "e2e_ms": "end to end",
}
#: What heads their table.
LATENCY_COLUMNS = ("", "mean", "p50", "p95", "p99")


def print_requests(data: Mapping[str, Any]) -> None:
    """Print the latencies and rates of a run's requests."""
    console = plain_console()
    console.print(Text(f"\nLatency of {data['counted']:,} of {data['requests']:,} requests, ms", style="bold"))
    table = columns_of(*LATENCY_COLUMNS)
    for row in latency_rows(data):
        table.add_row(*row)
    console.print(table)
    print_rows(console, "Load", load_rows(data))
    if data["overloaded"]:
        console.print(Text("requests came faster than they were served: the backlog grew to the end", style="yellow"))


def latency_rows(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Returns the latencies: what, then mean and percentiles in ms."""
    return [
        (name, *(_number(data[key][part]) for part in ("mean", "p50", "p95", "p99")))
        for key, name in _LATENCIES.items()
    ]


def load_rows(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns rates, what stood by and what was promised."""
    begin_s, end_s = data["window_s"]
    rows = [
        ("requests/s", _number(data["requests_per_second"])),
        ("output tokens/s", _number(data["output_tokens_per_second"])),
        ("measured from", f"{begin_s:,.2f} s to {end_s:,.2f} s"),
        ("steps, rows in each", f"{data['steps']:,}, {_number(data['rows_per_step'])}"),
        ("running, waiting (mean)", f"{_number(data['running'])}, {_number(data['waiting'])}"),
        ("KV blocks (mean)", _number(data["kv_blocks"])),
        ("preemptions", f"{data['preemptions']:,}"),
    ]
    if "replicas" in data:
        rows.append(("requests of each replica", ", ".join(f"{each['requests']:,}" for each in data["replicas"])))
    if data["prefix_hit_rate"]:
        rows.append(("prompt tokens found in the KV cache", f"{data['prefix_hit_rate']:.1%}"))
    if data["draft_acceptance"] is not None:
        rows.append(("drafts accepted", f"{data['draft_acceptance']:.1%}"))
    costs = data.get("cost") or {}
    for name in ("energy_kwh", "price"):
        if costs.get(name) is not None:
            each = costs[f"{name}_per_million_tokens"]
            rows.append((f"{name.replace('_', ', ')} for a million tokens", _number(each)))
    goodput = data["goodput"]
    if goodput is not None:
        met = "met" if goodput["met"] else "missed"
        rows.append(("goodput", f"{goodput['requests_per_second']:,.3g} requests/s, {goodput['share']:.1%}: {met}"))
    return rows


def print_capacity(data: Mapping[str, Any]) -> None:
    """Print the highest rate that meets a service level, and the curve that was looked at."""
    console = plain_console()
    console.print(Text(capacity_line(data)))
    rows = [
        (
            f"{point['rate']:,.3g}",
            f"{point['share']:.1%}",
            {True: "met", False: "missed", None: "undecided"}[point["met"]]
            + (", overloaded" if point["overloaded"] else ""),
            *(_number(point[key]["p95"]) for key in ("ttft_ms", "itl_ms", "e2e_ms")),
            _number(point["output_tokens_per_second"]),
        )
        for point in data["curve"]
    ]
    table = columns_of("requests/s", "served so", "", "TTFT p95", "ITL p95", "end to end p95, ms", "tokens/s")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def capacity_line(data: Mapping[str, Any]) -> str:
    """Returns in a line what a search came to."""
    promised = ", ".join(f"{name} = {limit:g}" for name, limit in data["slo"].items() if name != "share")
    promised += f" for {data['slo']['share']:.0%}"
    if data["why"] is not None:
        return f"{promised}: {data['why']}"
    sure = f"{data['confidence']:.0%} sure" if data["certain"] else "by the mean: the replicates do not decide"
    knee = "" if data["knee"] is None else f"; the knee of the curve is at {data['knee']:.3g}"
    return f"{promised}: {data['rate']:.3g} requests/s are met, {data['missed_rate']:.3g} are not ({sure}){knee}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if value >= 10 else f"{value:,.3g}"


def print_served(data: Mapping[str, Any]) -> None:
    """Print what was served in real time beside the simulation."""
    console = plain_console()
    console.print(Text(f"{data['model']}: {data['requests']:,} requests served", style="bold"))
    table = columns_of("same steps", "measured, ms", "simulated, ms", "median error", "median off", "sum", "a copy, ms")
    for number, repeat in enumerate(data["repeats"]):
        errors = (f"{repeat[name]:+.1%}" for name in ("median_error", "median_off", "sum_error"))
        name, copies = f"repeat {number}, {repeat['steps']:,} steps", ", ".join(f"{ms:.3f}" for ms in repeat["copy_ms"])
        table.add_row(name, _number(repeat["measured_ms"]), _number(repeat["simulated_ms"]), *errors, copies)
    console.print(table)
    table = columns_of("by its own clock", "measured, ms", "of repeats", "simulated, ms", "error")
    for name, wait in data["waits"].items():
        spread = f"{_number(wait['least_ms'])}-{_number(wait['most_ms'])}"
        row = (_number(wait["measured_ms"]), spread, _number(wait["simulated_ms"]), f"{wait['error']:+.1%}")
        table.add_row(name.replace("_ms.", " "), *row)
    console.print(table)
    same, repeats = sum(data["admitted"]), len(data["admitted"])
    console.print(Text(f"admitted in the simulation's order: {same} of {repeats} repeats"))
