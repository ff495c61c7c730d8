"""A run's result as tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from ...engine.prediction import Range
from .layout import (
    columns_of,
    known_of,
    number_of,
    plain_console,
    print_rows,
    print_warnings,
    share_of,
    size_of,
    time_of,
)
from .requests import print_requests

#: The digits of figures whose costs were all measured; these are right within about half a percent.
_MEASURED_DIGITS = 4


def print_result(data: dict[str, Any], verbose: bool = False) -> None:
    """Print what a simulated run came to; with `verbose`, warnings with their reasons."""
    console, digits = plain_console(), known_digits(data)
    for line in head_lines(data):
        console.print(Text(line))
    print_rows(console, "What each memory keeps, at its fullest", capacity_rows(data))
    if "requests" in data:
        print_requests(data["requests"])
    else:
        print_rows(console, "Speed", speed_rows(data))
    counts, accesses = data["counts"], data["accesses"]
    outcomes = {name: counts[name] for name in ("prefetch_hit", "cache_hit", "late", "miss")}
    of_warmup = ", those of the warmup too" if data["cold"] is not None else ""
    print_rows(console, f"{accesses:,} accesses{of_warmup}", _count_rows(outcomes, accesses))
    if counts["miss"]:
        print_rows(console, f"{counts['miss']:,} misses", _count_rows(data["misses"], counts["miss"]))
    _print_ways(console, data)
    issued, dropped = counts["prefetch"], counts["dropped"]
    if issued or dropped:
        no_room = f" ({dropped:,} more found no room)" if dropped else ""
        print_rows(console, f"{issued:,} prefetches{no_room}", _count_rows(data["prefetch"], issued))
    moved = data["bytes"]
    total = moved["demand"] + moved["prefetch"]
    names = {"demand": "on demand", "prefetch": "prefetched", "prefetch_not_used": "of it not used"}
    copies = [(name, size_of(moved[key]), share_of(moved[key], total)) for key, name in names.items() if moved[key]]
    if total:
        print_rows(console, f"{size_of(total)} copied to the GPU", copies)
    if data.get("tiers") is not None:
        print_rows(console, *_tier_rows(data["tiers"]))
    if "sharing" in data:
        print_rows(console, *_sharing_rows(data))
    makespan, gpus = data["makespan_ms"], data["gpus"]
    parts = {name: ms for name, ms in data["time"].items() if ms}
    split = [(name.removesuffix("_ms"), time_of(ms, digits), share_of(ms, makespan)) for name, ms in parts.items()]
    streams = "compute stream" if len(gpus) == 1 else f"mean of {len(gpus)} compute streams"
    print_rows(console, f"Where {time_of(makespan, digits)} went ({streams})", split)
    if len(gpus) > 1:
        _print_gpus(console, gpus, makespan)
    print_warnings(console, data["warnings"], verbose)


def known_digits(data: Mapping[str, Any]) -> int:
    """Returns how many digits of a run's speed and times are known: four where all costs were measured."""
    band = (data.get("range") or {}).get("tokens_per_second")
    return _MEASURED_DIGITS if band is None else min(_MEASURED_DIGITS, max(2, Range(**band).digits))


def _count_rows(counts: Mapping[str, int], whole: int) -> list[tuple[str, str, str]]:
    """Returns a row for each count that is not 0."""
    return [(name, f"{number:,}", share_of(number, whole)) for name, number in counts.items() if number]


def head_lines(data: Mapping[str, Any]) -> list[str]:
    """Returns in three lines what runs: the model; on what, over which routing; with what room and policies."""
    scenario, model = data["scenario"], data["model"]
    share = data["budget_bytes"] / data["expert_bytes_total"]
    prefetch, memory = scenario["prefetch"], scenario["memory"]
    ahead = f"prefetches {prefetch['policy']} by {scenario['predictor']['name']}, {prefetch['lookahead']} ahead"
    if prefetch["policy"] == "none" or not prefetch["lookahead"]:
        ahead = "no prefetch"
    return [
        f"{model['name']}: {model['layers']} x {model['experts']} experts, top-{model['top_k']}, "
        f"{size_of(data['expert_bytes_total'])}",
        f"on {scenario['machine']['profile']}{_by_runtime(scenario)}; {_routing(scenario)}, {_batch(data)}",
        f"room for {share:.1%} of the experts ({size_of(data['budget_bytes'])}{_share_of_gpus(data)}); "
        f"{memory['eviction']}, {_of_misses(scenario['miss']['policy'])}, {ahead}",
    ]


def _of_misses(policy: str) -> str:
    """Returns what becomes of a miss, in words."""
    return {"fetch": "misses are copied", "cpu": "misses on the CPU"}.get(policy, f"misses: {policy}")


def _routing(scenario: Mapping[str, Any]) -> str:
    """Returns where the routing comes from, in words."""
    workload = scenario["workload"]
    if workload["trace"]:
        return f"routing of {workload['trace']}"
    fit = (workload["synthetic"] or {}).get("fit")
    return f"routing drawn like {fit}'s" if fit else "routing drawn"


def _batch(data: Mapping[str, Any]) -> str:
    if "requests" in data:
        asked, count = data["scenario"]["requests"], _replicas(data)
        each = f" on each of {count} replicas ({asked['router']})" if count > 1 else ""
        return f"{data['requests']['requests']:,} requests by scheduler {asked['scheduler']['name']}{each}"
    return f"batch {data['scenario']['workload']['batch']}"


def headline(data: Mapping[str, Any]) -> str:
    """Returns in a line what ran: model, machine, trace, batch and room."""
    scenario, model = data["scenario"], data["model"]
    share = data["budget_bytes"] / data["expert_bytes_total"]
    room = f"{size_of(data['budget_bytes'])}{_share_of_gpus(data)}"
    return (
        f"{model['name']} ({model['layers']} x {model['experts']} experts, top-{model['top_k']}) on "
        f"{scenario['machine']['profile']}{_by_runtime(scenario)}, {_routing(scenario)}, {_batch(data)}; room for "
        f"{share:.1%} of the experts ({room})"
    )


def _by_runtime(scenario: Mapping[str, Any]) -> str:
    """Returns which runtime was predicted, if the result says it."""
    name = scenario.get("runtime", {}).get("name")
    return f" by {name}" if name else ""


def _replicas(data: Mapping[str, Any]) -> int:
    """Returns how many machines served the requests of a run."""
    return len(data.get("requests", {}).get("replicas", ())) or 1


def _share_of_gpus(data: Mapping[str, Any]) -> str:
    """Returns what share of the GPUs' memory the expert budget is, in words; nothing in a result that does not say."""
    gpus = [memory for memory in data.get("capacity", {"memories": []})["memories"] if memory["kind"] == "gpu"]
    gpus = gpus[: len(gpus) // _replicas(data)]
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


def _print_ways(console: Console, data: dict[str, Any]) -> None:
    """Print what became of misses that were not simply fetched, and of choices that were made again."""
    if "miss" in data:
        misses, policy = data["counts"]["miss"], data["miss"]["policy"]
        print_rows(console, f"What became of the {misses:,} misses ({policy})", _way_rows(data))
    if "routing" in data:
        routing = data["routing"]
        print_rows(console, f"Routing that knows the cache ({routing['policy']})", _routing_rows(routing))


def _way_rows(data: dict[str, Any]) -> list[tuple[str, str, str]]:
    miss, misses = data["miss"], data["counts"]["miss"]
    rows = [
        (way.replace("_", " "), f"{number:,}", share_of(number, misses))
        for way, number in miss["ways"].items()
        if number
    ]
    mass = miss["gate_mass"] or {}
    rows += [
        (f"gate weight, {way.replace('_', ' ')}", share_of(share, 1), "of all that was routed")
        for way, share in mass.items()
        if share
    ]
    if "cpu" in miss:
        rows.append(("CPU busy", time_of(miss["cpu"]["busy_ms"]), f"GPU waits {time_of(miss['cpu']['stall_ms'])}"))
    return rows


def _routing_rows(routing: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    changed = ("choices changed", share_of(routing["changed"], 1), "of those that a router made")
    mass = routing["gate_mass"]
    known = (
        []
        if mass is None
        else [("gate weight used", share_of(mass, 1), "of what the router chose; no claim of quality")]
    )
    return [changed, *known]


def _print_gpus(console: Console, gpus: Sequence[Mapping[str, Any]], makespan_ms: float) -> None:
    """Print a row for each GPU, or for several that are alike: where its time went, its hits, copies and memory."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "layers": lambda gpu: str(gpu["layers"]),
        **{part.removesuffix("_ms"): _share_of_time(part, makespan_ms) for part in gpus[0]["time"]},
        "hits": lambda gpu: share_of(gpu["hit_rate"], 1),
        "copied": lambda gpu: size_of(gpu["bytes"]["demand"] + gpu["bytes"]["prefetch"]),
        "budget": lambda gpu: size_of(gpu["budget_bytes"]),
        "used": lambda gpu: share_of(gpu["memory_utilization"], 1),
    }
    cells = {name: [show(gpu) for gpu in gpus] for name, show in columns.items()}
    cells = {name: column for name, column in cells.items() if set(column) not in ({"0.0%"}, {"-"})}
    alike: dict[tuple[str, ...], list[str]] = {}
    for gpu, row in zip(gpus, zip(*cells.values(), strict=True), strict=True):
        alike.setdefault(row, []).append(gpu["device"])
    table = columns_of("", *cells)
    for row, names in alike.items():
        table.add_row(names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} alike", *row)
    console.print(Text("\nEach GPU", style="bold"))
    console.print(table)


def _share_of_time(part: str, makespan_ms: float) -> Callable[[Mapping[str, Any]], str]:
    return lambda gpu: share_of(gpu["time"][part], makespan_ms)


def _sharing_rows(data: Mapping[str, Any]) -> tuple[str, list[tuple[str, str, str]]]:
    """Returns the title and rows of what GPUs that share the experts sent each other."""
    sharing, parallel = data["sharing"], data["scenario"]["parallel"]
    all_to_all_ms, copied_bytes = sharing["all_to_all_ms"], sharing["copied_bytes"]
    rows = [
        ("tokens sent", f"{sharing['tokens_sent']:,}", "and as many back"),
        ("all-to-all", time_of(all_to_all_ms), share_of(all_to_all_ms, data["makespan_ms"])),
        ("experts copied", size_of(copied_bytes), "from one GPU to another"),
        ("imbalance", number_of(sharing["imbalance"], 3), "tokens of each visit's busiest GPU / mean"),
    ]
    none = {
        "tokens sent": not sharing["tokens_sent"],
        "all-to-all": not all_to_all_ms,
        "experts copied": not copied_bytes,
    }
    title = f"{len(data['gpus'])} GPUs share the experts: {parallel['placement']}, {parallel['remote']}"
    return title, [row for row in rows if not none.get(row[0])]


def _tier_rows(tiers: Mapping[str, Any]) -> tuple[str, list[tuple[str, str, str]]]:
    """Returns the title and rows of what host memory held and the drive below it did."""
    copies = tiers["host_hits"] + tiers["host_misses"]
    busy = f"{tiers['io_lanes']} I/O lanes busy {share_of(tiers['read_utilization'], 1)}"
    back = [("copied back", f"{tiers['demoted']:,}", "from the GPU, which evicted them")] if tiers["demoted"] else []
    return f"{copies:,} copies from host memory ({size_of(tiers['host_budget_bytes'])} of experts)", [
        ("found there", f"{tiers['host_hits']:,}", share_of(tiers["host_hits"], copies)),
        ("read first", f"{tiers['host_misses']:,}", share_of(tiers["host_misses"], copies)),
        ("read ahead", f"{tiers['staged_reads']:,}", "into host memory alone"),
        *back,
        ("read", size_of(tiers["read_bytes"]), busy),
    ]


def speed_rows(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns the figures that a user wants first: name, value and a note; behind the warmup where there is one.

    With as many digits as are known, and without figures that there are none of.
    """
    digits = known_digits(data)
    rows = [*_rate_rows(data, digits), *_wait_rows(data, digits)]
    wait_ms = data["late_wait_ms"]
    late = "" if wait_ms is None else f"late ones wait {time_of(wait_ms, digits)} on average"
    for key, name, note in (
        ("hit_rate", "hit rate", late),
        ("overlap", "overlap", "of copy time has compute beside it"),
        ("memory_utilization", "memory utilization", "of the expert budget"),
    ):
        if data[key] is not None:
            rows.append((name, share_of(data[key], 1), note))
    if "replicates" in data:
        rows += [
            _replicate_row(data["replicates"], "makespan_ms", digits),
            _replicate_row(data["replicates"], "tokens_per_second", digits),
        ]
    if "speedup" in data:
        baseline, resident = (time_of(data[key], digits) for key in ("baseline_ms", "resident_ms"))
        longer = f"{data['makespan_ms'] / data['resident_ms']:.2f}"
        as_long = "as long as this run" if longer == "1.00" else f"this run takes {longer}x as long"
        rows.append(("speedup", f"{data['speedup']:.2f}x", f"over no prefetch and no cache ({baseline})"))
        rows.append(("all resident", resident, as_long))
        rows += _would_not_fit(data)
    return rows


def _known(data: Mapping[str, Any], key: str) -> str:
    """Returns the range of a figure whose costs were not all measured, in words; nothing if they were."""
    band = (data.get("range") or {}).get(key)
    if band is None:
        return ""
    low, high = (known_of(band[end], known_digits(data)) for end in ("p5", "p95"))
    return f"{low} to {high} (p5 to p95); " if low != high else ""


def _would_not_fit(data: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Say so if a GPU does not hold all experts, so that what is compared with cannot be."""
    resident = data["capacity"]["resident"] if "capacity" in data else {"fits": True}
    if resident["fits"] is False:
        held = f"{_gib(resident['sum_bytes'])} GiB in {_gib(resident['capacity_bytes'])}"
        yield "", "", f"it would not fit, {held}"


#: What each wait of a token is called.
_WAITS = {
    "time_to_first_token_ms": "TTFT (first token)",
    "inter_token_latency_ms": "ITL (next token)",
    "time_per_output_token_ms": "TPOT (per token)",
    "decode_step_ms": "decode step",
}
_BESIDE_MEDIAN = ("mean", "p95", "p99")


def _rate_rows(data: Mapping[str, Any], digits: int) -> Iterator[tuple[str, str, str]]:
    """Yields tokens per second while decoding, over all time if that is another figure, and with the warmup."""
    decoded, warm, scenario = data["decode_tokens"], data["warmup"]["decode_tokens"], data["scenario"]
    rate, sustained = (known_of(data[key], digits) for key in ("tokens_per_second", "sustained_tokens_per_second"))
    which = f"{decoded:,} tokens" + (" from a cold start" if scenario["memory"]["preload"] == "none" else "")
    if data["cold"] is not None:
        which = f"decode tokens {warm + 1:,} to {decoded:,}"
    known = _known(data, "tokens_per_second")
    batch = "" if "requests" in data else f"batch {scenario['workload']['batch']}, "
    yield "tokens per second", rate, f"{known}{batch}{which}"
    if rate != sustained:
        yield "sustained", sustained, "with the time of prompts"
    if data["cold"] is not None:
        cold = data["cold"]
        hits = f"all {decoded:,} tokens, hit rate {share_of(cold['hit_rate'], 1)}"
        yield "from a cold start", known_of(cold["tokens_per_second"], digits), hits


def _wait_rows(data: Mapping[str, Any], digits: int) -> Iterator[tuple[str, str, str]]:
    """Yields the median of each wait that there was, with its mean and high percentiles where these differ.

    What another row says already is left out: of a sequence by itself TPOT is the mean ITL, and a step is a token.
    """
    said: list[Mapping[str, Any]] = []
    for key, name in _WAITS.items():
        wait = data[key]
        if wait["p50"] is None or _says_the_same(wait, said):
            continue
        said.append(wait)
        alone = len({wait["p50"], *(wait[which] for which in _BESIDE_MEDIAN)}) == 1
        others = (f"{which} {known_of(wait[which], digits)}" for which in _BESIDE_MEDIAN)
        yield name, f"{known_of(wait['p50'], digits)} ms", "" if alone else f"p50; {', '.join(others)}"


def _says_the_same(wait: Mapping[str, Any], said: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a row of waits is one that was said, or a single one that is its mean."""
    single = wait["p50"] == wait["p99"]
    return any(
        all(math.isclose(wait[which], other[which], rel_tol=1e-9) for which in ("p50", *_BESIDE_MEDIAN))
        or (single and math.isclose(wait["mean"], other["mean"], rel_tol=1e-9))
        for other in said
    )


def _replicate_row(replicates: dict[str, Any], name: str, digits: int) -> tuple[str, str, str]:
    low, middle, high = (known_of(replicates[name][percentile], digits) for percentile in ("p5", "p50", "p95"))
    return f"{name.replace('_', ' ')}, p50", middle, f"p5 {low}, p95 {high} of {replicates['count']} replicates"


def print_bench(data: Mapping[str, Any]) -> None:
    """Print the tests of `experiments.bench` as llama-bench prints its own: a table in Markdown."""
    model = data["model"]
    named = [f"{model['name']} {model['dtype']}", size_of(model["bytes"]), f"{model['parameters'] / 1e9:.1f} B"]
    columns = ["model", "size", "params", "runtime", "test", "t/s"]
    if data["cpu_layers"] is not None:
        columns.insert(4, "n-cpu-moe")
    rows = []
    for row in data["rows"]:
        band, digits = row["range"], _MEASURED_DIGITS
        known = ""
        if band is not None:
            digits = min(digits, max(2, Range(**band).digits))
            known = f" ({known_of(band['p5'], digits)} to {known_of(band['p95'], digits)})"
        on_cpu = [] if data["cpu_layers"] is None else [str(data["cpu_layers"])]
        speed = known_of(row["tokens_per_second"], digits) + known
        rows.append([*named, data["runtime"], *on_cpu, row["test"], speed])
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    console = plain_console()
    console.print(Text(f"{model['name']} on {data['machine']}"))
    for cells in (columns, ["-" * width for width in widths], *rows):
        line = " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        console.print(Text(f"| {line} |"), no_wrap=True, overflow="ignore", crop=False)
