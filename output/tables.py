"""Results as tables for the terminal."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text


def plain_console() -> Console:
    """Return the terminal, which takes words as they are: a name such as `[red]` or `:key:` is no markup."""
    return Console(markup=False, emoji=False)


def print_result(data: dict[str, Any]) -> None:
    """Print what a simulated run came to."""
    console = plain_console()
    console.print(Text(headline(data)))
    _rows(console, "What each memory keeps, at its fullest", capacity_rows(data))
    _rows(console, "Speed", speed_rows(data))
    counts, accesses = data["counts"], data["accesses"]
    outcomes = ("prefetch_hit", "cache_hit", "late", "miss")
    _rows(
        console,
        f"{accesses:,} accesses" + (", those of the warmup too" if data["cold"] is not None else ""),
        [(name, f"{counts[name]:,}", _share(counts[name], accesses)) for name in outcomes],
    )
    if counts["miss"]:
        causes = [(name, f"{number:,}", _share(number, counts["miss"])) for name, number in data["misses"].items()]
        _rows(console, f"{counts['miss']:,} misses", causes)
    if "miss" in data:
        _rows(console, f"What became of the {counts['miss']:,} misses ({data['miss']['policy']})", _way_rows(data))
    issued = counts["prefetch"]
    if issued or counts["dropped"]:
        fates = [(name, f"{number:,}", _share(number, issued)) for name, number in data["prefetch"].items()]
        _rows(console, f"{issued:,} prefetches ({counts['dropped']:,} more found no room)", fates)
    moved = data["bytes"]
    total = moved["demand"] + moved["prefetch"]
    names = {"demand": "on demand", "prefetch": "prefetched", "prefetch_not_used": "of it not used"}
    copies = [(name, f"{moved[key] / 2**20:,.1f} MiB", _share(moved[key], total)) for key, name in names.items()]
    _rows(console, f"{total / 2**20:,.1f} MiB copied to the GPU", copies)
    if data.get("tiers") is not None:
        _rows(console, *_tier_rows(data["tiers"]))
    if "sharing" in data:
        _rows(console, *_sharing_rows(data))
    makespan, gpus = data["makespan_ms"], data["gpus"]
    split = [(name.removesuffix("_ms"), f"{ms:,.3f} ms", _share(ms, makespan)) for name, ms in data["time"].items()]
    streams = "compute stream" if len(gpus) == 1 else f"mean of {len(gpus)} compute streams"
    _rows(console, f"Where {makespan:,.3f} ms went ({streams})", split)
    if len(gpus) > 1:
        _print_gpus(console, gpus, makespan)
    for warning in data["warnings"]:
        console.print(Text(f"warning: {warning}", style="yellow"))


def headline(data: Mapping[str, Any]) -> str:
    """Return in a line what ran: model, machine, trace, batch and room."""
    scenario, model = data["scenario"], data["model"]
    trace = scenario["workload"]["trace"] or "a synthetic trace"
    share, batch = data["budget_bytes"] / data["expert_bytes_total"], scenario["workload"]["batch"]
    return (
        f"{model['name']} ({model['layers']} x {model['experts']} experts, top-{model['top_k']}) on "
        f"{scenario['machine']['profile']}, {trace}, batch {batch}; room for {share:.1%} of the experts "
        f"({data['budget_bytes'] / 2**30:.2f} GiB{_share_of_gpus(data)})"
    )


def _share_of_gpus(data: Mapping[str, Any]) -> str:
    """Return what share of the GPUs' memory the expert budget is, in words; nothing in a result that does not say."""
    gpus = [memory for memory in data.get("capacity", {"memories": []})["memories"] if memory["kind"] == "gpu"]
    holds_bytes = sum(memory["capacity_bytes"] for memory in gpus)
    whose = "the GPU's memory" if len(gpus) == 1 else f"the memory of {len(gpus)} GPUs"
    return f", {data['budget_bytes'] / holds_bytes:.1%} of {whose}" if gpus else ""


def capacity_rows(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return what each memory keeps against what it holds: name, sum and parts. Of several GPUs, the fullest."""
    memories = data["capacity"]["memories"]
    gpus = [memory for memory in memories if memory["kind"] == "gpu"]
    fullest = max(gpus, key=lambda memory: memory["sum_bytes"])
    shown = {**fullest, "memory": f"{fullest['memory']}, the fullest of {len(gpus)}"} if len(gpus) > 1 else fullest
    return [_memory_row(memory) for memory in (shown, *(memory for memory in memories if memory["kind"] != "gpu"))]


def _memory_row(memory: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the row of one memory; parts of less than a hundredth of it all are told together."""
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
    rows = [(way.replace("_", " "), f"{number:,}", _share(number, misses)) for way, number in miss["ways"].items()]
    mass = miss["gate_mass"] or {}
    rows += [
        (f"gate weight, {way.replace('_', ' ')}", _share(share, 1), "of all that was routed")
        for way, share in mass.items()
        if share
    ]
    if "cpu" in miss:
        rows.append(("CPU busy", f"{miss['cpu']['busy_ms']:,.3f} ms", f"GPU waits {miss['cpu']['stall_ms']:,.3f} ms"))
    return rows


def _print_gpus(console: Console, gpus: Sequence[Mapping[str, Any]], makespan_ms: float) -> None:
    """Print what each GPU did, one beside the other: its layers, where its time went, its copies and its memory."""
    table = _table("", *(gpu["device"] for gpu in gpus))
    table.add_row("layers", *(gpu["layers"] for gpu in gpus))
    for part in gpus[0]["time"]:
        table.add_row(part.removesuffix("_ms"), *(_share(gpu["time"][part], makespan_ms) for gpu in gpus))
    table.add_row("hit rate", *(_share(gpu["hit_rate"], 1) for gpu in gpus))
    copied = (gpu["bytes"]["demand"] + gpu["bytes"]["prefetch"] for gpu in gpus)
    table.add_row("copied (MiB)", *(f"{size_bytes / 2**20:,.0f}" for size_bytes in copied))
    table.add_row("budget (MiB)", *(f"{gpu['budget_bytes'] / 2**20:,.0f}" for gpu in gpus))
    table.add_row("of it used", *(_share(gpu["memory_utilization"], 1) for gpu in gpus))
    console.print(Text("\nEach GPU", style="bold"))
    console.print(table)


def _sharing_rows(data: Mapping[str, Any]) -> tuple[str, list[tuple[str, str, str]]]:
    """Return the title and rows of what GPUs that share the experts sent each other."""
    sharing, parallel = data["sharing"], data["scenario"]["parallel"]
    return f"{len(data['gpus'])} GPUs share the experts: {parallel['placement']}, {parallel['remote']}", [
        ("tokens sent", f"{sharing['tokens_sent']:,}", "and as many back"),
        ("all-to-all", f"{sharing['all_to_all_ms']:,.3f} ms", _share(sharing["all_to_all_ms"], data["makespan_ms"])),
        ("experts copied", f"{sharing['copied_bytes'] / 2**20:,.1f} MiB", "from one GPU to another"),
        ("imbalance", _number(sharing["imbalance"], 3), "tokens of each visit's busiest GPU / mean"),
    ]


def _tier_rows(tiers: Mapping[str, Any]) -> tuple[str, list[tuple[str, str, str]]]:
    """Return the title and rows of what host memory held and the drive below it did."""
    copies = tiers["host_hits"] + tiers["host_misses"]
    busy = f"{tiers['io_lanes']} I/O lanes busy {_share(tiers['read_utilization'], 1)}"
    return f"{copies:,} copies from host memory ({tiers['host_budget_bytes'] / 2**30:.2f} GiB of experts)", [
        ("found there", f"{tiers['host_hits']:,}", _share(tiers["host_hits"], copies)),
        ("read first", f"{tiers['host_misses']:,}", _share(tiers["host_misses"], copies)),
        ("read ahead", f"{tiers['staged_reads']:,}", "into host memory alone"),
        ("read", f"{tiers['read_bytes'] / 2**20:,.1f} MiB", busy),
    ]


def speed_rows(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the figures that a user wants first: name, value and a note; behind the warmup where there is one."""
    late = "" if data["late_wait_ms"] is None else f"late ones wait {data['late_wait_ms']:,.3f} ms on average"
    rows = [
        *_rate_rows(data),
        *_wait_rows(data),
        ("hit rate", _share(data["hit_rate"], 1), late),
        ("overlap", _share(data["overlap"], 1), "of copy time has compute beside it"),
        ("memory utilization", _share(data["memory_utilization"], 1), "of the expert budget"),
    ]
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
    """Yield tokens per second while decoding, over all time if that is another figure, and with the warmup."""
    decoded, warm, scenario = data["decode_tokens"], data["warmup"]["decode_tokens"], data["scenario"]
    rate, sustained = data["tokens_per_second"], data["sustained_tokens_per_second"]
    which = f"{decoded:,} tokens" + (" from a cold start" if scenario["memory"]["preload"] == "none" else "")
    if data["cold"] is not None:
        which = f"decode tokens {warm + 1:,} to {decoded:,}"
    yield "tokens per second", _number(rate, 2), f"batch {scenario['workload']['batch']}, {which}"
    if rate != sustained:
        yield "sustained", _number(sustained, 2), "decode tokens per second of all time"
    if data["cold"] is not None:
        yield (
            "from a cold start",
            _number(data["cold"]["tokens_per_second"], 2),
            (f"all {decoded:,} tokens, hit rate {_share(data['cold']['hit_rate'], 1)}"),
        )


def _wait_rows(data: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the median of each wait that there was, with its mean and high percentiles."""
    for key, name in _WAITS.items():
        wait = data[key]
        if wait["p50"] is not None:
            others = (f"{which} {_number(wait[which], 3 if wait[which] < 100 else 1)}" for which in _BESIDE_MEDIAN)
            yield name, f"{_number(wait['p50'], 3)} ms", f"p50; {', '.join(others)}"


#: What the table of a sweep shows of each row: its key and how it is written.
SWEEP_COLUMNS: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "tokens/s": ("tokens_per_second", lambda value: _number(value, 2)),
    "hit": ("hit_rate", lambda value: _share(value, 1)),
    "late": ("late_rate", lambda value: _share(value, 1)),
    "memory": ("memory_utilization", lambda value: _share(value, 1)),
    "stall": ("stall_ms", lambda value: f"{_number(value, 1)} ms"),
    "over no cache": ("speedup", lambda value: f"{_number(value, 2)}x"),
    "over same cache": ("prefetch_speedup", lambda value: f"{_number(value, 2)}x"),
}
#: The best rows that the table of a sweep shows.
_BEST_ROWS = 10


def print_sweep(rows: Iterable[dict[str, Any]]) -> None:
    """Print the fastest rows of a sweep."""
    console = plain_console()
    best = heapq.nlargest(_BEST_ROWS, rows, key=lambda row: row.get("tokens_per_second") or 0.0)
    table = _table(*(key for key in best[0]["settings"]), *SWEEP_COLUMNS, "key")
    for row in best:
        figures = [show(row.get(key)) for key, show in SWEEP_COLUMNS.values()]
        table.add_row(*(str(value) for value in row["settings"].values()), *figures, row["key"][:8])
    console.print(Text(f"The {len(best)} fastest", style="bold"))
    console.print(table)


#: The columns of the best configurations of a suite's studies.
BEST_COLUMNS = ("study", "best by", "value", "where it starts", "changed")


def print_suite(data: dict[str, Any]) -> None:
    """Print the best configuration of each study of a suite by each metric, and how many could not run."""
    console = plain_console()
    table = _table(*BEST_COLUMNS)
    for study in data["studies"]:
        for cells in best_cells(study):
            table.add_row(*cells)
    console.print(table)
    for study in data["studies"]:
        if study["errors"]:
            console.print(
                Text(f"{study['name']}: {len(study['errors'])} could not run, see the report", style="yellow")
            )


def best_cells(study: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the best configurations of a study in BEST_COLUMNS."""
    for found in study["best"]:
        values = (_digits(found[key]) for key in ("value", "start"))
        yield [study["name"], found["name"], *values, setting_words(found["settings"])]


def setting_words(settings: Mapping[str, Any]) -> str:
    """Return settings in words; nothing where there are none."""
    return ", ".join(f"{key} = {value}" for key, value in settings.items()) or "nothing"


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"


#: The columns of where a difference arises.
_DIFFERENCE = ("from_ms", "to_ms", "difference_ms")


def print_comparison(data: dict[str, Any]) -> None:
    """Print runs side by side, and where the time between them arises."""
    console = plain_console()
    names = data["runs"]
    if not data["same_work"]:
        console.print(Text("warning: these runs decode different numbers of tokens", style="yellow"))
    console.print(Text("Settings that differ", style="bold"))
    settings = _table("", *names)
    for key, values in data["settings"].items():
        settings.add_row(key, *(str(value) for value in values))
    console.print(settings)
    console.print(Text("\nFigures, and their ratio to the first", style="bold"))
    figures = _table("", *names)
    for key, values in data["figures"].items():
        ratios = [None, *data["ratios"][key][1:]]
        shares = ["" if ratio is None else f" ({ratio:.2f}x)" for ratio in ratios]
        figures.add_row(
            key, *(comparison_figure(key, value) + share for value, share in zip(values, shares, strict=True))
        )
    console.print(figures)
    for name, gpus in data["where"].items():
        for gpu, parts in gpus.items():
            table = _table("", names[0], name, "difference")
            parts = {**parts, "makespan": {key: sum(part[key] for part in parts.values()) for key in _DIFFERENCE}}
            for part, ms in parts.items():
                table.add_row(
                    part, *(f"{ms[key]:,.3f} ms" for key in _DIFFERENCE[:2]), f"{ms['difference_ms']:+,.3f} ms"
                )
            console.print(Text(f"\nWhere {name} differs ({gpu})", style="bold"))
            console.print(table)


def comparison_figure(name: str, value: float | None) -> str:
    """Return a figure of a comparison with its unit, which its name gives; counts are whole."""
    if value is None:
        return "-"
    if "bytes" in name:
        return f"{value / 2**30:,.2f} GiB"
    if "_ms" in name:
        return f"{value:,.3f} ms"
    if name.startswith(("counts.", "miss.ways.")):
        return f"{value:,}"
    return f"{value:,.2f}" if name.endswith(("tokens_per_second", "speedup", "imbalance")) else f"{value:.1%}"


def print_break_even(data: dict[str, Any]) -> None:
    """Print the least recall that pays, by budget and lookahead."""
    console = plain_console()
    table = _table("budget", "lookahead", "pays from recall", "same cache alone", "with recall 1")
    for cell in data["cells"]:
        best, alone = cell["with_recall_1_ms"], cell["without_ms"]
        table.add_row(
            cell["budget"],
            str(cell["lookahead"]),
            break_even_words(cell),
            f"{alone:,.1f} ms",
            f"{best:,.1f} ms ({alone / best:.2f}x)",
        )
    console.print(table)


def break_even_words(cell: dict[str, Any]) -> str:
    """Return a break-even in words: a recall, an interval where luck decides, always or never."""
    recall, below = cell["recall"], cell["not_below"]
    if recall is None:
        return "never"
    if below is None:
        return "0 (always)" if recall == 0 else f"luck decides up to {recall:.2f}"
    return f"{recall:.2f}" if recall - below < 0.015 else f"{recall:.2f} (luck decides from {below:.2f})"


def _replicate_row(replicates: dict[str, Any], name: str, digits: int) -> tuple[str, str, str]:
    low, middle, high = (_number(replicates[name][percentile], digits) for percentile in ("p5", "p50", "p95"))
    return f"{name.replace('_', ' ')}, p50", middle, f"p5 {low}, p95 {high} of {replicates['count']} replicates"


def print_replay(data: dict[str, Any]) -> None:
    """Print what a replay counted."""
    console = plain_console()
    read = data["bytes_read"]
    decode = f"{data['hits_decode']:,} of {data['accesses_decode']:,}"
    rows = [
        ("all", f"{data['hits']:,} of {data['accesses']:,}", _share(data["hit_rate"], 1, 3)),
        ("decode only", decode, _share(data["hit_rate_decode"], 1, 3)),
        (
            "bytes read",
            "unknown (--model or --expert-bytes says)" if read is None else f"{read / 2**20:,.1f} MiB",
            f"{data['evict']:,} evictions",
        ),
    ]
    if data["residency_agreement"] is not None:
        rows.append(("logged residency", "agrees on", _share(data["residency_agreement"], 1, 3)))
    _rows(console, f"Found by {data['eviction']} ({data['scope']}, lookup {data['lookup']})", rows)
    for warning in data["warnings"]:
        console.print(Text(f"warning: {warning}", style="yellow"))


def print_miss_ratios(data: dict[str, Any]) -> None:
    """Print miss-ratio curves: a row for each capacity, a column for each policy."""
    console = plain_console()
    what = f"Miss ratios of {data['accesses']:,} look-ups ({data['scope']}, lookup {data['lookup']}"
    console.print(Text(f"{what}, batch {data['batch']})", style="bold"))
    table = Table(box=None, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for column in ("room", "experts", *data["policies"]):
        table.add_column(column, justify="right", no_wrap=True)
    for at, capacity in enumerate(data["capacities"]):
        experts = capacity["experts"]
        ratios = [_share(curve["miss_ratio"][at], 1) for curve in data["policies"].values()]
        table.add_row(_share(capacity["share"], 1), "-" if experts is None else f"{experts:,}", *ratios)
    console.print(table)
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
        ("reuse of the last token", _share(reuse["mean"], 1), f"by chance {_share(reuse['by_chance'], 1)}"),
        ("popularity", _number(skew["gini"]["mean"], 3), "Gini coefficient, mean over layers"),
        ("", _share(skew["top_10_percent_share"]["mean"], 1), "of all uses go to the top tenth of a layer's experts"),
    ]
    _rows(console, data["model"] or "a model that the trace does not name", rows)
    for scope, rates in data["lru_hit_rate"].items():
        hits = [(f"{share} of the experts", _share(rate, 1), "") for share, rate in rates.items()]
        _rows(console, f"LRU hit rate, {scope}", hits)


#: The columns of the transfer benchmark.
TRANSFER_COLUMNS = ("", "MiB", "single", "ten", "throughput of ten", "an expert of")


def print_transfer(data: dict[str, Any]) -> None:
    """Print the transfer benchmark: one copy, ten in a row and their throughput, by way and size; and allocations."""
    console = plain_console()
    console.print(Text(data["machine"], style="bold"))
    table = _table(*TRANSFER_COLUMNS)
    for cells in transfer_cells(data):
        table.add_row(*cells)
    console.print(table)


def transfer_cells(data: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the transfer benchmark's rows in TRANSFER_COLUMNS, the guide's last."""
    guide = data["guide"]

    def row(name: str, size_bytes: int, times: dict[str, Any], *more: str) -> list[str]:
        return [name, _mib(size_bytes), *(f"{times[key]:,.3f} ms" for key in ("single_ms", "ten_ms")), *more]

    for copied in data["rows"]:
        yield row(
            copied["way"], copied["bytes"], copied, f"{copied['gb_per_s']:,.1f} GB/s", ", ".join(copied["models"])
        )
    for allocated in data["allocations"]:
        yield row(f"allocation, {allocated['how']}", allocated["bytes"], allocated, "", "")
    for said in guide["rows"]:
        speed = "" if said["what"] == "allocation" else f"{10 * guide['bytes'] / said['ten_ms'] / 1e6:,.1f} GB/s"
        yield row(f"{said['what']} ({guide['machine']})", guide["bytes"], said, speed, "")


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.2f}"


def print_calibration(data: dict[str, Any]) -> None:
    """Print how each cost was fitted, and how far it can be off."""
    console = plain_console()
    table = _table("cost", "form", "samples", "between runs", "within a run", "held back")
    for term in data["terms"]:
        shares = (f"{term[name]:.2%}" for name in ("run_spread", "scatter", "held_back_error"))
        table.add_row(term["name"], term["form"], f"{term['n']:,}", *shares)
    console.print(Text(f"{data['name']}: {data['device']}", style="bold"))
    console.print(table)
    if data["noisy"]:
        worst = max(data["noisy"], key=lambda row: float(row["iqr_over_median"]))
        console.print(
            Text(
                f"warning: {len(data['noisy'])} series are noisier than 10 %, worst {_described(worst)}", style="yellow"
            )
        )


def _described(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )


def print_predictors(data: dict[str, Any], *, layers: bool = False) -> None:
    """Print how good predictors are: a table by horizon, bounds on top-1, and every target layer if asked for."""
    console = plain_console()
    lengths = list(data["predictors"][0]["horizons"][0]["recall"])
    shape = f"{data['layers']} layers, top-{data['k']} of {data['num_experts']} experts"
    console.print(
        Text(f"{data['model'] or 'trace'}: {shape}; {data['tokens']:,} tokens of {data['sequences']} sequences")
    )
    heads = ["predictor", "ahead", "top-1", *(f"recall@{n}" for n in lengths), "miscalibration"]
    if layers:
        heads.insert(2, "layer")
    table = Table(box=None, padding=(0, 1))
    for head in heads:
        # On a narrow terminal only names of weights, which are paths, are folded.
        table.add_column(head, min_width=max(len(head), 14 if head == "predictor" else 0), overflow="fold")
    for entry in data["predictors"]:
        for at in entry["horizons"]:
            named = (entry["name"], str(at["horizon"]))
            every = ["all"] if layers else []
            recalls = [_share(at["recall"][n], 1) for n in lengths]
            table.add_row(*named, *every, _share(at["top1"], 1), *recalls, _number(at["calibration_error"], 3))
            for layer, top1 in enumerate(at["layers"]["top1"] if layers else ()):
                recalls = [_share(at["layers"]["recall"][n][layer], 1) for n in lengths]
                table.add_row(*named, str(layer), _share(top1, 1), *recalls, "")
    console.print(table)
    for entry in data["predictors"]:
        if entry["memory_bytes"] is not None:
            latency = ", ".join(f"{us:,.0f} us on {device}" for device, us in entry["latency_us"].items())
            console.print(Text(f"{entry['name']}: {entry['memory_bytes']:,} bytes; one guess takes {latency}"))
    bounds = Table("no top-1 above, one layer ahead, knowing", "entropy", "Fano", "hindsight", box=None, padding=(0, 1))
    for knows, bound in data["top1_bounds"][0]["knowing"].items():
        entropy = f"{_number(bound['entropy_bits'], 2)} bits"
        bounds.add_row(knows, entropy, _share(bound["fano"], 1), _share(bound["hindsight"], 1))
    console.print(bounds)


def print_virtual_memory(data: dict[str, Any]) -> None:
    """Print a run of the virtual memory manager: its counts, and its times in both accountings."""
    console = plain_console()
    counts, accesses, charged = data["event_counts"], data["accesses"], data["copies_charged"]
    events = [(name.replace("_", " "), f"{count:,}") for name, count in counts.items()]
    _rows(console, f"{accesses:,} accesses, hit rate {_share(data['hit_rate'], 1)}", events)
    table = _table("", "prefetches hidden", "every copy charged")
    for name, key, show in _PRICED:
        table.add_row(name, show(data[key]), show(charged[key]))
    console.print(table)


#: What depends on which copies cost time: its name, its key, and how it is written.
_PRICED: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("mean latency of an access", "avg_latency_ms", lambda value: f"{_number(value, 3)} ms"),
    ("latency in all", "total_latency_ms", lambda value: f"{_number(value, 1)} ms"),
    ("memory utilization", "memory_utilization", lambda value: _share(value, 1)),
    ("speedup over no prefetch, no cache", "speedup", lambda value: f"{_number(value, 2)}x"),
    ("speedup / memory utilization", "efficiency", lambda value: _number(value, 2)),
)


def print_inference(data: dict[str, Any]) -> None:
    """Print a run of the inference simulator: in the guide's accounting, with copies charged, and overlapped."""
    console = plain_console()
    charged, overlapped, accesses = data["copies_charged"], data["overlapped"], data["accesses"]
    console.print(Text(_in_words(overlapped)))
    table = _table("", "prefetches hidden", "every copy charged", "overlapped")
    times = (data, charged, {"total_latency_ms": overlapped["makespan_ms"]})
    baselines = (data["baseline_latency_ms"], data["baseline_latency_ms"], overlapped["baseline_ms"])
    tokens = overlapped["decode_tokens"]
    rows: tuple[tuple[str, Iterable[float], Callable[[float], str]], ...] = (
        ("speedup", (run["speedup"] for run in (data, charged, overlapped)), _times),
        ("no prefetch, no cache", baselines, _ms),
        ("in all", (run["total_latency_ms"] for run in times), _ms),
        ("a token", (run["total_latency_ms"] / tokens for run in times), _ms),
        ("an access", (run["total_latency_ms"] / accesses for run in times), _ms),
        ("memory utilization", (run["memory_utilization"] for run in (data, charged, overlapped)), _percent),
        ("hit rate", (data["hit_rate"], data["hit_rate"], overlapped["hit_rate"]), _percent),
        ("  by prefetching", _shares(data, overlapped, "hit", "prefetch_hit"), _percent),
        ("  by caching", _shares(data, overlapped, "cache_hit", "cache_hit"), _percent),
        ("late", (0.0, 0.0, overlapped["late_rate"]), _percent),
        ("miss", _shares(data, overlapped, "miss", "miss"), _percent),
    )
    for name, values, show in rows:
        table.add_row(name, *map(show, values))
    console.print(table)
    foretold = _share(data["prediction_accuracy"], 1, 2)
    console.print(Text(f"{foretold} of the experts used were among the guesses prefetched for them"))


def _in_words(data: dict[str, Any]) -> str:
    """Return in a line what an inference simulation was of."""
    model, scenario = data["model"], data["scenario"]
    trace = scenario["workload"]["trace"] or "a synthetic trace"
    return (
        f"{model['layers']} x {model['experts']} experts, top-{model['top_k']}, on {scenario['machine']['profile']}; "
        f"{data['decode_tokens']:,} tokens of {trace}; predictor {scenario['predictor']['name']}, "
        f"k = {scenario['prefetch']['k'] or 0}; room for {data['budget_bytes'] / 2**20:,.0f} MiB of experts"
    )


def _shares(data: dict[str, Any], overlapped: dict[str, Any], event: str, outcome: str) -> list[float]:
    guide = data["event_counts"][event] / data["accesses"]
    return [guide, guide, overlapped["counts"][outcome] / overlapped["accesses"]]


def _ms(value: float) -> str:
    return f"{value:,.3f} ms"


def _times(value: float) -> str:
    return f"{value:.2f}x"


def _percent(value: float) -> str:
    return f"{value:.1%}"


class GuideFigure(NamedTuple):
    """A figure of the guide's table: its key with us and in the overlapped engine, and how it is written."""

    name: str
    key: str
    overlapped: str
    unit: str
    units_in_one: int
    digits: int
    difference: str


GUIDE_FIGURES = (
    GuideFigure("hit rate", "hit_rate", "hit_rate", "%", 100, 1, "points"),
    GuideFigure("memory", "memory_utilization", "memory_utilization", "%", 100, 1, "points"),
    GuideFigure("mean latency", "avg_latency_ms", "time_per_access_ms", "ms", 1, 2, "ms"),
)
_LEGEND = (
    "ours: the guide's accounting, prefetches hidden. shared: so, if layers shared experts of one index. "
    "charged: ours with every copy charged. overlapped: ours on one timeline; its latency is the time per access, "
    "computation included. verdict: ours is inside the published range, or how far outside."
)


def print_reproduction(tables: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Print published tables by name, each row beside ours, and why it differs."""
    console = plain_console()
    console.print(Text(_LEGEND))
    for name, rows in tables.items():
        console.print(Text(f"\n{name.replace('-', ' ')}", style="bold underline"))
        if name == "virtual-memory":
            _print_configurations(console, rows)
        else:
            _print_figures(console, rows)


def _print_figures(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows of `reproduce.Row`, or those that have two statements."""
    table = _table(*figure_columns(rows))
    for row in rows:
        table.add_row(row["name"], *figure_cells(row))
    console.print(table)
    for row in rows:
        console.print(Text(f"  {row['name']}: {row['why']}.", style="dim"))


def figure_columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the columns of a table of figures, the first one's being the name's."""
    if "statements" in rows[0]:
        return ["", "stated", "also stated", "apart", "ours"]
    return ["", "published", "ours", "charged", "overlapped", "verdict"]


def figure_cells(row: dict[str, Any]) -> list[str]:
    """Return a figure: published, ours, with copies charged, overlapped and the verdict; or statements and ours."""
    unit = row["unit"]
    if "statements" in row:
        return [
            *(_quantity(value, unit) for value in row["statements"]),
            f"{row['apart']:.3g}x",
            _quantity(row["ours"], unit),
        ]
    published, verdict = row["published"], row["verdict"]
    ends = dict.fromkeys(_plain(bound, unit, digits=6) for bound in published or ())
    told = _with_unit("-".join(ends), unit) if ends else "-"
    values = [_quantity(row[key], unit) for key in ("ours", "charged", "overlapped")]
    if verdict is None:
        return [told, *values, "-"]
    return [told, *values, "inside" if verdict["inside"] else _quantity(verdict["off_by"], unit, "+")]


def _quantity(value: float | None, unit: str, sign: str = "") -> str:
    """Return four digits of a value and its unit; shares are fractions written in percent."""
    return "-" if value is None else _with_unit(_plain(value, unit, sign), unit)


def _plain(value: float, unit: str, sign: str = "", digits: int = 4) -> str:
    return f"{value * (100 if unit == '%' else 1):{sign}.{digits}g}"


def _with_unit(number: str, unit: str) -> str:
    return f"{number}{'' if unit == 'x' else ' '}{unit}"


def _print_configurations(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Print the guide's configurations: published, in its accounting, with copies charged, overlapped; and why."""
    for row in rows:
        console.print(Text(f"\n{row['scenario']}", style="bold"))
        table = _table("", "published", "ours", "shared", "charged", "overlapped", "verdict")
        for figure in GUIDE_FIGURES:
            table.add_row(figure.name, *guide_cells(row, figure))
        console.print(table)
        for figure in GUIDE_FIGURES:
            console.print(Text(f"  {figure.name}: {row['verdicts'][figure.key]['why']}.", style="dim"))


def guide_cells(row: dict[str, Any], figure: GuideFigure) -> list[str]:
    """Return a figure: published, ours, if layers shared experts, with copies charged, overlapped; and the verdict."""
    key, scale, digits = figure.key, figure.units_in_one, figure.digits
    ours, verdict = row["guide_accounting"], row["verdicts"][key]
    low, high = (bound * scale for bound in row["published"][key])
    values = (
        ours[key],
        row["shared_across_layers"][key],
        ours["copies_charged"].get(key, ours[key]),
        row["overlapped"][figure.overlapped],
    )
    outside = f"{verdict['off_by'] * scale:+.{digits}f} {figure.difference}"
    return [
        f"{low:g}-{high:g} {figure.unit}",
        *(f"{_number(value * scale, digits)} {figure.unit}" for value in values),
        "inside" if verdict["inside"] else outside,
    ]


#: What the table of timelines shows of each GPU: the key and its words; all but the first also as a share of it.
_GPU_ROWS = {
    "span_ms": "first work to last",
    "compute_ms": "kernels",
    "not_compute_ms": "copies and communication alone",
    "idle_ms": "idle",
}


#: So many GPUs, roles, lanes and rows of one are printed; of more it is said, and --json has them.
_MOST_PRINTED = 64


def print_timelines(summaries: Mapping[str, dict[str, Any]]) -> None:
    """Print the summaries of timelines, by name, side by side; what a timeline has not stays empty.

    Below stands what of each file was repaired or left out, by its `reading`.
    """
    table = _table("", *summaries)

    def add(name: str, cells: Iterable[str]) -> None:
        table.add_row(name, *cells)

    add("spans", (f"{summary['spans']:,}" for summary in summaries.values()))
    devices = dict.fromkeys(device for summary in summaries.values() for device in summary["gpus"])
    for device in islice(devices, _MOST_PRINTED):
        gpus = [summary["gpus"].get(device) for summary in summaries.values()]
        for key, words in _GPU_ROWS.items():
            add(f"{device}: {words}", ("" if gpu is None else _ms_and_share(gpu[key], gpu["span_ms"]) for gpu in gpus))
        add(f"{device}: overlap", ("" if gpu is None else _share(gpu["overlap"], 1) for gpu in gpus))
    roles = dict.fromkeys(role for summary in summaries.values() for role in summary["roles"])
    for role in islice(roles, _MOST_PRINTED):
        parts = [summary["roles"].get(role) for summary in summaries.values()]
        add(f"{role}, busy", ("" if part is None else _ms_and_share(part["busy_ms"], part["of_ms"]) for part in parts))
    console = plain_console()
    console.print(table)
    _say_more(console, {"GPUs": len(devices), "roles": len(roles)})
    console.print(
        "A GPU's shares are of its time from first work to last, all others of the whole timeline; overlap: of copy "
        "time, with kernels beside it."
    )
    for name, summary in summaries.items():
        for line in _reading_lines(summary.get("reading")):
            console.print(Text(f"{name}: {line}", style="yellow"))


def _say_more(console: Console, numbers: Mapping[str, int]) -> None:
    for what, number in numbers.items():
        if number > _MOST_PRINTED:
            console.print(f"{number - _MOST_PRINTED:,} more {what} are not shown: see --json.")


def _reading_lines(reading: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield what is to be said of how a file was read: nothing if all was read as it stands."""
    if reading is None:
        return
    for key, words in (("left_out", f"of {reading['events']:,} events are left out"), ("repaired", "values repaired")):
        reasons = list(reading[key].items())
        if reasons:
            total = sum(told["events"] for _, told in reasons)
            said = [f"{told['events']:,} {reason} ({told['first']})" for reason, told in reasons[:8]]
            said += [f"{len(reasons) - 8:,} reasons more (see --json)"] if len(reasons) > 8 else []
            yield f"{total:,} {words}: {'; '.join(said)}"
    if reading["breaks_off"]:
        yield f"breaks off after {reading['events']:,} events: {reading['breaks_off']}; what comes behind is left out"


def _ms_and_share(ms: float, whole_ms: float) -> str:
    return f"{ms:,.3f} ms" if ms == whole_ms else f"{ms:,.3f} ms {_share(ms, whole_ms):>6}"


def print_kernels(rows: Sequence[dict[str, Any]]) -> None:
    """Print what each kind of work of a timeline took, a table a lane: quiet is beside no copy to the GPU."""
    console = plain_console()
    lanes: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        lanes.setdefault((row["device"], row["lane"]), []).append(row)
    for lane, here in islice(lanes.items(), _MOST_PRINTED):
        table = _table("n", "total ms", "median us", "IQR us", "quiet us", "beside copies", "MiB", "work")
        for column in table.columns[:-1]:
            column.no_wrap = True
        table.columns[-1].justify = "left"
        for row in here[:_MOST_PRINTED]:
            parts = [row["samples"]["median_ns"], row["samples"]["iqr_ns"]]
            parts += [part and part["median_ns"] for part in (row["quiet"], row["beside_copy"])]
            took = ("" if ns is None else f"{ns / 1e3:,.1f}" for ns in parts)
            size = _mib(row["bytes"]) if row["bytes"] else ""
            # A kernel's name can be as long as a page.
            name = Text(row["name"].removeprefix("void "), no_wrap=True, overflow="ellipsis")
            table.add_row(f"{row['n']:,}", f"{row['total_ms']:,.3f}", *took, size, name)
        console.print(Text(", ".join(lane), style="bold"))
        console.print(table)
        _say_more(console, {"kinds of work": len(here)})
    _say_more(console, {"lanes": len(lanes)})


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=not number)
    return table


def print_fit(data: dict[str, Any]) -> None:
    """Print how near a fitted generator's trace comes to the one that it was fitted to."""
    console = plain_console()
    for name, curve in data["difference"].items():
        rows = [(key, _share(value, 1), _share(curve["synthetic"][key], 1)) for key, value in curve["trace"].items()]
        rows.append(("largest difference", f"{100 * curve['max_difference']:.1f} points", ""))
        if data["draws"] > 1:
            rows.append(("of a single draw", f"{100 * curve['max_difference_of_a_draw']:.1f} points", ""))
        _rows(console, f"{name.replace('_', ' ')}: trace, and the mean of {data['draws']} drawn", rows)


def _rows(console: Console, title: str, rows: Iterable[tuple[str, ...]]) -> None:
    console.print(Text(f"\n{title}", style="bold"))
    table = Table(show_header=False, box=None, padding=(0, 2))
    for justify in ("left", "right", "left"):
        table.add_column(justify=justify)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _share(part: float | None, whole: float, digits: int = 1) -> str:
    return "-" if part is None or not whole else f"{part / whole:.{digits}%}"
