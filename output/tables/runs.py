"""A run's result as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from ...engine.prediction import Range
from .layout import columns_of, number_of, plain_console, print_rows, share_of
from .requests import print_requests


def print_result(data: dict[str, Any]) -> None:
    """Print what a simulated run came to."""
    console = plain_console()
    console.print(Text(headline(data)))
    print_rows(console, "What each memory keeps, at its fullest", capacity_rows(data))
    if "requests" in data:
        print_requests(data["requests"])
    else:
        print_rows(console, "Speed", speed_rows(data))
    counts, accesses = data["counts"], data["accesses"]
    outcomes = ("prefetch_hit", "cache_hit", "late", "miss")
    print_rows(
        console,
        f"{accesses:,} accesses" + (", those of the warmup too" if data["cold"] is not None else ""),
        [(name, f"{counts[name]:,}", share_of(counts[name], accesses)) for name in outcomes],
    )
    if counts["miss"]:
        causes = [(name, f"{number:,}", share_of(number, counts["miss"])) for name, number in data["misses"].items()]
        print_rows(console, f"{counts['miss']:,} misses", causes)
    if "miss" in data:
        print_rows(console, f"What became of the {counts['miss']:,} misses ({data['miss']['policy']})", _way_rows(data))
    issued = counts["prefetch"]
    if issued or counts["dropped"]:
        fates = [(name, f"{number:,}", share_of(number, issued)) for name, number in data["prefetch"].items()]
        print_rows(console, f"{issued:,} prefetches ({counts['dropped']:,} more found no room)", fates)
    moved = data["bytes"]
    total = moved["demand"] + moved["prefetch"]
    names = {"demand": "on demand", "prefetch": "prefetched", "prefetch_not_used": "of it not used"}
    copies = [(name, f"{moved[key] / 2**20:,.1f} MiB", share_of(moved[key], total)) for key, name in names.items()]
    print_rows(console, f"{total / 2**20:,.1f} MiB copied to the GPU", copies)
    if data.get("tiers") is not None:
        print_rows(console, *_tier_rows(data["tiers"]))
    if "sharing" in data:
        print_rows(console, *_sharing_rows(data))
    makespan, gpus = data["makespan_ms"], data["gpus"]
    split = [(name.removesuffix("_ms"), f"{ms:,.3f} ms", share_of(ms, makespan)) for name, ms in data["time"].items()]
    streams = "compute stream" if len(gpus) == 1 else f"mean of {len(gpus)} compute streams"
    print_rows(console, f"Where {makespan:,.3f} ms went ({streams})", split)
    if len(gpus) > 1:
        _print_gpus(console, gpus, makespan)
    for warning in data["warnings"]:
        console.print(Text(f"warning: {warning}", style="yellow"))


def headline(data: Mapping[str, Any]) -> str:
    """Returns in a line what ran: model, machine, trace, batch and room."""
    scenario, model = data["scenario"], data["model"]
    trace = scenario["workload"]["trace"] or "a synthetic trace"
    share, batch = data["budget_bytes"] / data["expert_bytes_total"], f"batch {scenario['workload']['batch']}"
    if "requests" in data:
        batch = f"{data['requests']['requests']:,} requests by {scenario['requests']['scheduler']['name']}"
    return (
        f"{model['name']} ({model['layers']} x {model['experts']} experts, top-{model['top_k']}) on "
        f"{scenario['machine']['profile']}{_by_runtime(scenario)}, {trace}, {batch}; room for {share:.1%} of the "
        f"experts ({data['budget_bytes'] / 2**30:.2f} GiB{_share_of_gpus(data)})"
    )


def _by_runtime(scenario: Mapping[str, Any]) -> str:
    """Returns which runtime was predicted, if the result says it."""
    name = scenario.get("runtime", {}).get("name")
    return f" by {name}" if name else ""


def _share_of_gpus(data: Mapping[str, Any]) -> str:
    """Returns what share of the GPUs' memory the expert budget is, in words; nothing in a result that does not say."""
    gpus = [memory for memory in data.get("capacity", {"memories": []})["memories"] if memory["kind"] == "gpu"]
    holds_bytes = sum(memory["capacity_bytes"] for memory in gpus)
    whose = "the GPU's memory" if len(gpus) == 1 else f"the memory of {len(gpus)} GPUs"
    return f", {data['budget_bytes'] / holds_bytes:.1%} of {whose}" if gpus else ""


def capacity_rows(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns what each memory keeps against what it holds: name, sum and parts. Of several GPUs, the fullest."""
    memories = data["capacity"]["memories"]
    gpus = [memory for memory in memories if memory["kind"] == "gpu"]
    fullest = max(gpus, key=lambda memory: memory["sum_bytes"])
    shown = {**fullest, "memory": f"{fullest['memory']}, the fullest of {len(gpus)}"} if len(gpus) > 1 else fullest
    return [_memory_row(memory) for memory in (shown, *(memory for memory in memories if memory["kind"] != "gpu"))]


def _memory_row(memory: Mapping[str, Any]) -> tuple[str, str, str]:
    """Returns the row of one memory; parts of less than a hundredth of it all are told together."""
    name, sum_bytes = memory["memory"], memory["sum_bytes"]
    named = {part: size_bytes for part, size_bytes in memory["parts"].items() if 100 * size_bytes >= sum_bytes}
    told = sorted(named.items(), key=lambda part: -part[1])
    told.append(("all else", sum_bytes - sum(named.values())))
    words = ", ".join(f"{part} {_gib(size_bytes)}" for part, size_bytes in told if 1000 * size_bytes >= sum_bytes)
    if memory["capacity_bytes"] is None:
        return name, f"{_gib(sum_bytes)} GiB", f"not checked, no capacity is stated: {words}"
    used = f"{_gib(sum_bytes)} of {_gib(memory['capacity_bytes'])} GiB ({memory['share']:.1%})"
    return name, used, words if memory["fits"] else f"more than it holds: {words}"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:,.2f}"


def _way_rows(data: dict[str, Any]) -> list[tuple[str, str, str]]:
    miss, misses = data["miss"], data["counts"]["miss"]
    rows = [(way.replace("_", " "), f"{number:,}", share_of(number, misses)) for way, number in miss["ways"].items()]
    mass = miss["gate_mass"] or {}
    rows += [
        (f"gate weight, {way.replace('_', ' ')}", share_of(share, 1), "of all that was routed")
        for way, share in mass.items()
        if share
    ]
    if "cpu" in miss:
        rows.append(("CPU busy", f"{miss['cpu']['busy_ms']:,.3f} ms", f"GPU waits {miss['cpu']['stall_ms']:,.3f} ms"))
    return rows


def _print_gpus(console: Console, gpus: Sequence[Mapping[str, Any]], makespan_ms: float) -> None:
    """Print what each GPU did, one beside the other: its layers, where its time went, its copies and its memory."""
    table = columns_of("", *(gpu["device"] for gpu in gpus))
    table.add_row("layers", *(gpu["layers"] for gpu in gpus))
    for part in gpus[0]["time"]:
        table.add_row(part.removesuffix("_ms"), *(share_of(gpu["time"][part], makespan_ms) for gpu in gpus))
    table.add_row("hit rate", *(share_of(gpu["hit_rate"], 1) for gpu in gpus))
    copied = (gpu["bytes"]["demand"] + gpu["bytes"]["prefetch"] for gpu in gpus)
    table.add_row("copied (MiB)", *(f"{size_bytes / 2**20:,.0f}" for size_bytes in copied))
    table.add_row("budget (MiB)", *(f"{gpu['budget_bytes'] / 2**20:,.0f}" for gpu in gpus))
    table.add_row("of it used", *(share_of(gpu["memory_utilization"], 1) for gpu in gpus))
    console.print(Text("\nEach GPU", style="bold"))
    console.print(table)


def _sharing_rows(data: Mapping[str, Any]) -> tuple[str, list[tuple[str, str, str]]]:
    """Returns the title and rows of what GPUs that share the experts sent each other."""
    sharing, parallel = data["sharing"], data["scenario"]["parallel"]
    return f"{len(data['gpus'])} GPUs share the experts: {parallel['placement']}, {parallel['remote']}", [
        ("tokens sent", f"{sharing['tokens_sent']:,}", "and as many back"),
        ("all-to-all", f"{sharing['all_to_all_ms']:,.3f} ms", share_of(sharing["all_to_all_ms"], data["makespan_ms"])),
        ("experts copied", f"{sharing['copied_bytes'] / 2**20:,.1f} MiB", "from one GPU to another"),
        ("imbalance", number_of(sharing["imbalance"], 3), "tokens of each visit's busiest GPU / mean"),
    ]


def _tier_rows(tiers: Mapping[str, Any]) -> tuple[str, list[tuple[str, str, str]]]:
    """Returns the title and rows of what host memory held and the drive below it did."""
    copies = tiers["host_hits"] + tiers["host_misses"]
    busy = f"{tiers['io_lanes']} I/O lanes busy {share_of(tiers['read_utilization'], 1)}"
    return f"{copies:,} copies from host memory ({tiers['host_budget_bytes'] / 2**30:.2f} GiB of experts)", [
        ("found there", f"{tiers['host_hits']:,}", share_of(tiers["host_hits"], copies)),
        ("read first", f"{tiers['host_misses']:,}", share_of(tiers["host_misses"], copies)),
        ("read ahead", f"{tiers['staged_reads']:,}", "into host memory alone"),
        ("read", f"{tiers['read_bytes'] / 2**20:,.1f} MiB", busy),
    ]


def speed_rows(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns the figures that a user wants first: name, value and a note; behind the warmup where there is one."""
    late = "" if data["late_wait_ms"] is None else f"late ones wait {data['late_wait_ms']:,.3f} ms on average"
    rows = [
        *_rate_rows(data),
        *_wait_rows(data),
        ("hit rate", share_of(data["hit_rate"], 1), late),
        ("overlap", share_of(data["overlap"], 1), "of copy time has compute beside it"),
        ("memory utilization", share_of(data["memory_utilization"], 1), "of the expert budget"),
    ]
    if data.get("range"):
        rows += list(_range_rows(data))
    if "replicates" in data:
        rows += [
            _replicate_row(data["replicates"], "makespan_ms", 3),
            _replicate_row(data["replicates"], "tokens_per_second", 2),
        ]
    if "speedup" in data:
        rows += [
            ("speedup", f"{data['speedup']:.2f}x", f"over no prefetch and no cache ({data['baseline_ms']:,.3f} ms)"),
            (
                "all resident",
                f"{data['resident_ms']:,.3f} ms",
                f"this run takes {data['makespan_ms'] / data['resident_ms']:.2f}x as long{_would_not_fit(data)}",
            ),
        ]
    return rows


def _range_rows(data: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yields what is known of figures whose costs were not all measured: with as many digits as that is."""
    names = {"tokens_per_second": ("tokens/s", ""), "makespan_ms": ("makespan", " ms")}
    unsure = data["unsure"]
    others = f" and {len(unsure) - 2} more" if len(unsure) > 2 else ""
    for number, (key, (name, unit)) in enumerate(names.items()):
        if key in data["range"]:
            band = Range(**data["range"][key])
            low, high = (f"{band.rounded(value):,.6g}" for value in (band.p5, band.p95))
            why = f"; not measured: {', '.join(unsure[:2])}{others}" if number == 0 else ""
            known = f"{band.rounded(data[key]):,.6g}{unit}"
            yield f"{name}, as far as known", known, f"{low} to {high}{unit} (p5 to p95){why}"


def _would_not_fit(data: Mapping[str, Any]) -> str:
    """Say so if a GPU does not hold all experts, so that what is compared with cannot be."""
    resident = data["capacity"]["resident"] if "capacity" in data else {"fits": True}
    if resident["fits"] is not False:
        return ""
    held = f"{_gib(resident['sum_bytes'])} GiB in {_gib(resident['capacity_bytes'])}"
    return f"; it would not fit, {held}"


#: What each wait of a token is called.
_WAITS = {
    "time_to_first_token_ms": "TTFT (first token)",
    "inter_token_latency_ms": "ITL (next token)",
    "time_per_output_token_ms": "TPOT (per token)",
    "decode_step_ms": "decode step",
}
_BESIDE_MEDIAN = ("mean", "p95", "p99")


def _rate_rows(data: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yields tokens per second while decoding, over all time if that is another figure, and with the warmup."""
    decoded, warm, scenario = data["decode_tokens"], data["warmup"]["decode_tokens"], data["scenario"]
    rate, sustained = data["tokens_per_second"], data["sustained_tokens_per_second"]
    which = f"{decoded:,} tokens" + (" from a cold start" if scenario["memory"]["preload"] == "none" else "")
    if data["cold"] is not None:
        which = f"decode tokens {warm + 1:,} to {decoded:,}"
    yield "tokens per second", number_of(rate, 2), f"batch {scenario['workload']['batch']}, {which}"
    if rate != sustained:
        yield "sustained", number_of(sustained, 2), "decode tokens per second of all time"
    if data["cold"] is not None:
        yield (
            "from a cold start",
            number_of(data["cold"]["tokens_per_second"], 2),
            (f"all {decoded:,} tokens, hit rate {share_of(data['cold']['hit_rate'], 1)}"),
        )


def _wait_rows(data: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yields the median of each wait that there was, with its mean and high percentiles."""
    for key, name in _WAITS.items():
        wait = data[key]
        if wait["p50"] is not None:
            others = (f"{which} {number_of(wait[which], 3 if wait[which] < 100 else 1)}" for which in _BESIDE_MEDIAN)
            yield name, f"{number_of(wait['p50'], 3)} ms", f"p50; {', '.join(others)}"


def _replicate_row(replicates: dict[str, Any], name: str, digits: int) -> tuple[str, str, str]:
    low, middle, high = (number_of(replicates[name][percentile], digits) for percentile in ("p5", "p50", "p95"))
    return f"{name.replace('_', ' ')}, p50", middle, f"p5 {low}, p95 {high} of {replicates['count']} replicates"
