"""Traces and what the cache alone makes of them, as tables."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from .layout import number_of, plain_console, print_rows, share_of, size_of


def print_replay(data: dict[str, Any]) -> None:
    """Print what a replay counted."""
    console = plain_console()
    read = data["bytes_read"]
    decode = f"{data['hits_decode']:,} of {data['accesses_decode']:,}"
    rows = [
        ("all", f"{data['hits']:,} of {data['accesses']:,}", share_of(data["hit_rate"], 1, 3)),
        ("decode only", decode, share_of(data["hit_rate_decode"], 1, 3)),
        (
            "bytes read",
            "unknown (--model or --expert-bytes says)" if read is None else size_of(read),
            f"{data['evict']:,} evictions",
        ),
    ]
    if data["residency_agreement"] is not None:
        rows.append(("logged residency", "agrees on", share_of(data["residency_agreement"], 1, 3)))
    print_rows(console, f"Found by {data['eviction']} ({data['scope']}, lookup {data['lookup']})", rows)
    for warning in data["warnings"]:
        console.print(Text(f"warning: {warning}", style="yellow"))


def print_miss_ratios(data: dict[str, Any]) -> None:
    """Print miss-ratio curves: a row for each capacity, a column for each policy."""
    console = plain_console()
    of = f"{data['trace']}: " if "trace" in data else ""
    what = f"{of}Miss ratios of {data['accesses']:,} look-ups ({data['scope']}, lookup {data['lookup']}"
    console.print(Text(f"{what}, batch {data['batch']})", style="bold"))
    table = Table(box=None, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for column in ("room", "experts", *data["policies"]):
        table.add_column(column, justify="right", no_wrap=True)
    for at, capacity in enumerate(data["capacities"]):
        experts = capacity["experts"]
        ratios = [share_of(curve["miss_ratio"][at], 1) for curve in data["policies"].values()]
        table.add_row(share_of(capacity["share"], 1), "-" if experts is None else f"{experts:,}", *ratios)
    console.print(table)
    if data["predictor"] is not None:
        console.print(f"Guesses are those of predictor {data['predictor']}.")
    sizes_differ = any(capacity["experts"] is None for capacity in data["capacities"])
    if "belady" in data["policies"] and sizes_differ and data["scope"] == "global":
        console.print("Experts differ in size: belady is no bound here, another policy may miss less.")


def print_trace(data: dict[str, Any]) -> None:
    """Print what a trace is like."""
    console = plain_console()
    reuse, skew = data["reuse"], data["skew"]
    rows = [
        ("tokens", f"{data['tokens']:,}", f"{data['prefill_tokens']:,} prefill, {data['decode_tokens']:,} decode"),
        ("sequences", f"{data['sequences']:,}", ""),
        ("accesses", f"{data['accesses']:,}", f"{data['layers']} layers, top-{data['k']} of {data['num_experts']}"),
        ("reuse of the last token", share_of(reuse["mean"], 1), f"by chance {share_of(reuse['by_chance'], 1)}"),
        ("popularity", number_of(skew["gini"]["mean"], 3), "Gini coefficient, mean over layers"),
        ("", share_of(skew["top_10_percent_share"]["mean"], 1), "of all uses go to the top tenth of a layer's experts"),
    ]
    print_rows(console, data["model"] or "a model that the trace does not name", rows)
    for scope, rates in data["lru_hit_rate"].items():
        hits = [(f"{share} of the experts", share_of(rate, 1), "") for share, rate in rates.items()]
        print_rows(console, f"LRU hit rate, {scope}", hits)


def print_fit(data: dict[str, Any]) -> None:
    """Print how near a fitted generator's trace comes to the one that it was fitted to."""
    console = plain_console()
    for name, curve in data["difference"].items():
        rows = [
            (key, share_of(value, 1), share_of(curve["synthetic"][key], 1)) for key, value in curve["trace"].items()
        ]
        rows.append(("largest difference", f"{100 * curve['max_difference']:.1f} points", ""))
        if data["draws"] > 1:
            rows.append(("of a single draw", f"{100 * curve['max_difference_of_a_draw']:.1f} points", ""))
        print_rows(console, f"{name.replace('_', ' ')}: trace, and the mean of {data['draws']} drawn", rows)
