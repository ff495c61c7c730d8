"""The figures of README.md and of docs/, each made here:

    python tests/readme_tables.py [NAME …] [--write]

prints the named tables of TABLES (all without a name), or writes each into its pages between its marks. `lookahead`,
`eviction`, `per-layer`, `routing` and `phone` need the real traces (PRESTAGE_TRACES); `new-user` installs everything
anew; `coverage` needs the package of that name, and half an hour.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from advice_regret import beside_fit, regret, whole_models
from coverage_by_folder import coverage
from day_figure import day_figure, drafts_figure
from dependencies import dependencies_table
from eviction_tables import layers, policies
from host_tables import host_beside
from new_user import path_table, ways_table
from one_command import one_command
from owned_tables import owned
from policy_tables import inclusion, next_gate, residency, routing, streams
from published_pairs import published_pairs
from published_tables import published_figures, published_rows
from request_tables import queueing, request_keys, served
from sizes import how_big, layers_of_tests, lines

from prestage.calibration.fit.check_kernels import check_kernels, check_text
from prestage.calibration.measure.samples import load_samples
from prestage.calibration.observe.reality import line_ns, sizes
from prestage.calibration.validate import from_parts as checks
from prestage.calibration.validate.report import markdown
from prestage.engine.scenario.scenario import Scenario, load_scenario
from prestage.engine.scenario.sections import SyntheticSection
from prestage.engine.scenario.together import APART
from prestage.engine.simulate import simulate
from prestage.errors import InputError
from prestage.experiments.sweep import sweep
from prestage.guide.reproduce import TABLES as PUBLISHED
from prestage.guide.reproduce import virtual_memory
from prestage.output.markdown import table
from prestage.output.parts import shares
from prestage.output.tables.guide import GUIDE_FIGURES, figure_cells, figure_columns, guide_cells
from prestage.resources.profile import load_profile
from prestage.workloads.model import load_model

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
#: Where tables can be.
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def bench(name: str, *arguments: str) -> Any:
    """Run a benchmark beside this file and return what it prints, as data."""
    command = [sys.executable, str(ROOT / "tests" / f"{name}.py"), *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def lookahead() -> str:
    """What looking 0, 1 and 3 layers ahead does to gpt-oss-20b's real routing, in one stream and with a queue."""
    trace = Path(os.environ["PRESTAGE_TRACES"]) / "gpt-oss-20b.npz"
    columns = [
        "lookahead",
        "discipline",
        "tokens/s",
        "hit",
        "late",
        "miss",
        "prefetches",
        "wasted or cancelled",
        "stall",
    ]
    rows = []
    for ahead, discipline in [(0, "fifo"), (1, "fifo"), (3, "fifo"), (1, "priority"), (3, "priority")]:
        settings = [f"workload.trace={trace}", f"prefetch.lookahead={ahead}", f"copy.discipline={discipline}"]
        if discipline == "priority":
            settings += ["copy.chunk_bytes=4194304", "copy.drop_stale=true"]
        data = simulate(load_scenario("gpt-oss-20b", settings), baselines=False).data
        counts, fates, accesses = data["counts"], data["prefetch"], data["accesses"]
        shares = [data["hit_rate"], counts["late"] / accesses, counts["miss"] / accesses]
        lost = fates["wasted"] + fates["cancelled"]
        cells = [
            str(ahead),
            discipline,
            f"{data['tokens_per_second']:.1f}",
            *(f"{share:.1%}" for share in shares),
            f"{counts['prefetch']:,}",
            f"{lost:,}",
            f"{data['stall_ms'] / data['makespan_ms']:.0%}",
        ]
        rows.append(cells)
    return table(columns, rows)


def scenario() -> str:
    """Every key of a scenario with its default and its choices, as TOML."""
    example = Scenario.model_validate({"workload": {"trace": "t.safetensors"}})
    lines = ["```toml", f"seed = {example.seed}"]
    for section, keys in example.plain().items():
        if isinstance(keys, dict):
            described = getattr(example, "copy_" if section == "copy" else section).__doc__
            lines += [f"[{section}]", *_comment(described)]
            lines += [_key(section, key, value) for key, value in keys.items() if key != "synthetic"]
        if section == "workload":
            synthetic = SyntheticSection()
            lines += ["# Instead of trace:", "# [workload.synthetic]", *_comment(synthetic.__doc__)]
            lines += [f"# {_key('workload.synthetic', *item)}" for item in synthetic.model_dump().items()]
    text = "\n".join([*lines, "```"])
    given = 'trace = "t.safetensors"'
    return text.replace(given, f"{given}  # an example: nothing is set, and one is drawn")


def apart() -> str:
    """What cannot go together yet, why, and what to do instead."""
    return table(["what", "why", "instead"], [[row.what, row.why, row.instead] for row in APART])


#: What can become of misses, and the shipped scenario that does it; `balanced` that fetches is a plain LRU cache.
WAYS = {
    "fetched": "balanced",
    "on the CPU, whole layers": "llama-cpp-n-cpu-moe",
    "on the CPU, the least popular": "cpu-experts",
    "fetched or on the CPU, by cost": "fiddler",
    "dealt out to both": "balanced",
    "in low precision": "low-precision",
    "skipped under a gate weight": "skip",
    "fetched compressed": "compressed-host",
    "kept compressed": "compressed-gpu",
    "in mixed precision": "mixed-precision",
}
#: The machines of that table; the second's CPU is assumed to read 40 GB/s.
WAY_MACHINES = {"H200": [], "RTX 3090": ["machine.profile=rtx3090", "miss.cpu_gb_per_s=40"]}


def misses() -> str:
    """The same workload and memory under every way to do with misses, on two machines."""
    columns = ["a miss is", "scenario", "found", "not in full", "MiB copied a token"]
    columns += [f"tokens/s, {machine}" for machine in WAY_MACHINES]
    rows = []
    for way, name in WAYS.items():
        settings = ["miss.policy=fetch"] if way == "fetched" else []
        runs = [
            simulate(load_scenario(name, [*settings, *machine]), baselines=False).data
            for machine in WAY_MACHINES.values()
        ]
        copied = [sum(data["bytes"][why] for why in ("demand", "prefetch")) / data["decode_tokens"] for data in runs]
        cells = [
            way,
            "" if settings else f"`{name}`",
            " / ".join(dict.fromkeys(f"{data['hit_rate']:.0%}" for data in runs)),
            f"{_not_in_full(runs[0]):.1%}",
            " / ".join(dict.fromkeys(f"{moved / 2**20:,.0f}" for moved in copied)),
            *(f"{data['tokens_per_second']:.1f}" for data in runs),
        ]
        rows.append(cells)
    return table(columns, rows)


#: Machines on which misses are shared; the CPU of the second and third is assumed to read so much.
SHARED_MACHINES = {**WAY_MACHINES, "RTX 4090": ["machine.gpu=rtx4090", "machine.cpu=7950x", "miss.cpu_gb_per_s=60"]}
SHARED_POLICIES = ("fetch", "cpu", "cost", "balanced", "split", "split-if-twice", "cpu-then-upload")
DEFERRED = ("cpu", "balanced")


def shared_misses() -> str:
    """The same workload and memory with misses shared between the link and the CPU, by policy, on three machines."""
    columns = ["miss.policy", *(f"{machine}: found, link, CPU busy, tokens/s" for machine in SHARED_MACHINES)]
    rows = []
    for policy, deferred in (*((policy, 0) for policy in SHARED_POLICIES), *((policy, 2) for policy in DEFERRED)):
        cells = [f"`{policy}`" + (f", {deferred} of 6 deferred" if deferred else "")]
        settings = [f"miss.policy={policy}"] + ([f"miss.deferred_experts={deferred}"] if deferred else [])
        for machine in SHARED_MACHINES.values():
            data = simulate(load_scenario("balanced", [*settings, *machine]), baselines=False).data
            busy = data.get("miss", {}).get("cpu", {}).get("busy_ms", 0.0) / data["makespan_ms"]
            shares = (data["hit_rate"], data["link_utilization"], busy)
            cells.append(" / ".join(f"{share:.0%}" for share in shares) + f" / {data['tokens_per_second']:.1f}")
        rows.append(cells)
    return table(columns, rows)


def _not_in_full(data: dict[str, Any]) -> float:
    """Returns the share of gate weight that was skipped, or computed in less than full precision."""
    if "precision_mass" in data:
        return 1.0 - float(data["precision_mass"]["1"])
    mass = data.get("miss", {}).get("gate_mass") or {}
    return float(mass.get("low_precision", 0.0) + mass.get("skipped", 0.0))


def pipelines() -> str:
    """Tokens per second of scenario pipeline-2: micro-batches by host threads, under two budgets."""
    threads = {"a thread for each GPU": "per-gpu", "one thread": "one"}
    columns = [(budget, name) for budget in ("75%", "100%") for name in threads]
    rows = []
    for micro_batches in (1, 2, 4, 8):
        cells = [str(micro_batches)]
        for budget, name in columns:
            settings = [
                "workload.prefill=skip",
                f"memory.gpu_budget={budget}",
                f"parallel.micro_batches={micro_batches}",
                f"parallel.dispatch_threads={threads[name]}",
            ]
            cells.append(
                f"{simulate(load_scenario('pipeline-2', settings), baselines=False).data['tokens_per_second']:.1f}"
            )
        rows.append(cells)
    return table(["micro-batches", *(f"{budget}, {name}" for budget, name in columns)], rows)


#: What scenario `placement-8` is varied by in its table.
SHARINGS = {
    "`round-robin`": [],
    "`balanced`": ["parallel.placement=balanced"],
    "`searched`, load": ["parallel.placement=searched"],
    "`searched`, bytes": ["parallel.placement=searched", "parallel.objective=bytes"],
    "`co-activated`": ["parallel.placement=co-activated"],
    "`replicated`, 20 GiB": ["parallel.placement=replicated", "parallel.replica_bytes=20GiB"],
    "bytes from a peer": ["parallel.remote=peer"],
    "bytes from the host": ["parallel.remote=host"],
    "whatever costs least": ["parallel.remote=cost"],
    "40 GiB of spare memory each": ["parallel.spare_bytes=40GiB"],
}


def sharings() -> str:
    """Scenario placement-8, by who owns which expert and what moves."""
    columns = ["scenario `placement-8`", "tokens/s", "hidden states sent", "busiest GPU over the mean"]
    rows = []
    for name, settings in SHARINGS.items():
        data = simulate(load_scenario("placement-8", settings), baselines=False).data
        sharing = data["sharing"]
        cells = [name, f"{data['tokens_per_second']:.1f}", f"{sharing['tokens_sent']:,}", f"{sharing['imbalance']:.2f}"]
        rows.append(cells)
    return table(columns, rows)


def parallel_speed() -> str:
    """The figures of `bench_parallel.py` at full scale, from runs of it: long without contention, a tenth with it."""
    columns = {"no contention": ["--steps", "1000"], "links shared, kernels slowed": ["--steps", "100", "--contention"]}
    runs = [bench("bench_parallel", *options) for options in columns.values()]
    rows = {
        "steps": [f"{run['steps']:,}" for run in runs],
        "layer visits": [f"{run['layer_visits']:,}" for run in runs],
        "accesses": [f"{run['accesses']:,}" for run in runs],
        "processor seconds on one core": [f"{run['cpu_s']:.1f}" for run in runs],
        "a layer visit": [f"{run['ms_per_visit']:.2f} ms" for run in runs],
        "an access": [f"{run['us_per_access']:.1f} us" for run in runs],
    }
    return table(["what", *columns], [[name, *cells] for name, cells in rows.items()])


#: What scenario `nvme` is varied by in its table.
DRIVES = {
    "no prefetching": ["prefetch.lookahead=0"],
    "prefetched to the GPU": [],
    "prefetched to host memory only": ["tiers.prefetch=host"],
    "no prefetching, host memory by LFU": ["prefetch.lookahead=0", "tiers.host_policy=lfu"],
    "no prefetching, host memory by Belady": ["prefetch.lookahead=0", "tiers.host_policy=belady"],
    "no prefetching, every expert in host memory": ["prefetch.lookahead=0", "tiers.host_budget=all"],
}


def drives() -> str:
    """Scenario nvme, by what is prefetched and which experts host memory keeps."""
    columns = ["scenario `nvme`", "tokens/s", "copies that host memory had", "read a token", "I/O lanes busy"]
    rows = []
    for name, settings in DRIVES.items():
        data = simulate(load_scenario("nvme", settings), baselines=False).data
        tiers = data["tiers"]
        cells = [name, f"{data['tokens_per_second']:.2f}"]
        if tiers is None:
            cells += ["all", "0 MiB", "0%"]
        else:
            read_mib = tiers["read_bytes"] / data["decode_tokens"] / 2**20
            cells += [f"{tiers['host_hit_rate']:.0%}", f"{read_mib:,.0f} MiB", f"{tiers['read_utilization']:.0%}"]
        rows.append(cells)
    return table(columns, rows)


def phone() -> str:
    """How well the second half of a published phone run is predicted by costs fitted on the first."""
    folder = Path(os.environ["PRESTAGE_TRACES"]) / "bigmoeonedge-qwen"
    settings = [f"workload.trace={folder / 'qwen.route.csv'}", "model.sizes=trace"]
    command = [sys.executable, "-m", "prestage", "calibrate", "check-run", "phone", str(folder / "qwen.metrics")]
    command += ["--after", "64", "--json", *(word for setting in settings for word in ("--set", setting))]
    data = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    columns = ["wall time of tokens 65 to 128", "median error of a token", "error of the mean"]
    rows = [
        [name, f"{row['median_abs_error']:.1%}", f"{row['mean_error']:+.1%}"]
        for name, row in (("simulated", data), ("a straight line in bytes read", data["line"]))
    ]
    parts = (
        f"{name} {logged:.1f} ms logged, {ours:.1f} simulated" for name, (logged, ours) in data["parts_ms"].items()
    )
    return f"{table(columns, rows)}\n\nA token, on average: {'; '.join(parts)}."


def _comment(docstring: str | None) -> list[str]:
    return [f"# {line}" for line in inspect.cleandoc(docstring or "").splitlines() if line]


def _key(section: str, key: str, value: object) -> str:
    """Returns one line of TOML; the choices are those that the refusal of a wrong one names."""
    line = f"{key} is not set" if value is None else f"{key} = {json.dumps(value)}"
    try:
        load_scenario("synthetic", [f"{section}.{key}=?"])
    except InputError as error:
        choices = re.search(r"choose one of (.*)|must be '(.*)'", str(error))
        if choices:
            line += f"  # {choices[1] or choices[2].replace(chr(39), '')}"
    return f"# {line}" if value is None and "synthetic" not in section else line


def speed() -> str:
    """The figures of `bench_speed.py`, from a run of it."""
    data = bench("bench_speed")
    plain, contended = data["timeouts_per_visit"], data["timeouts_per_visit_contended"]
    replayed = data["replay_accesses_per_second"]
    return "\n".join(
        [
            "| what | measured |",
            "|---|---|",
            f"| bare SimPy timeouts in the time of one layer visit, timeline recorded (scenario `speed`) | "
            f"{plain['median']} (from {plain['min']} to {plain['max']}) |",
            f"| the same where copies slow kernels down | {contended['median']} |",
            f"| memory that a run keeps, per span of its timeline | {data['bytes_per_span']} bytes |",
            f"| LRU replay, one core, half of the experts | {replayed['lru']['50%'] / 1e6:.0f} million accesses/s "
            f"(reference implementation {replayed['reference']['50%'] / 1e6:.2f}) |",
        ]
    )


def guide() -> str:
    """The guide's three configurations, published and ours, as `prestage reproduce virtual-memory` has them."""
    columns = [
        "configuration",
        "figure",
        "published",
        "ours",
        "experts shared by layers",
        "copies charged",
        "overlapped",
    ]
    rows = []
    for row in virtual_memory():
        name = f"k={row['prefetch_k']}, {row['gpu_memory_limit_mb'] / 1024:g} GB"
        for figure in GUIDE_FIGURES:
            published, *ours, verdict = guide_cells(row, figure)
            ours[0] += f" ({verdict})"
            rows.append([name, figure.name, published, *ours])
            name = ""
    return table(columns, rows)


def insights() -> str:
    """The guide's configuration insights: the shipped sweeps, one setting changed at a time."""
    usual: dict[str, Any] = {"prefetch.k": 10, "memory.gpu_budget": "2GiB", "memory.caching": True}
    columns = ["changed", "hit rate", "of it without prefetch", "ms a token", "over no cache", "over the same cache"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        changed = list(sweep("guide-insights", out=Path(folder) / "insights.jsonl"))
        contexts = list(sweep("guide-context", out=Path(folder) / "context.jsonl"))
    changes = [(row, [key for key in usual if row["settings"][key] != usual[key]]) for row in changed]
    chosen = [("nothing", row) for row, keys in changes if not keys]
    chosen += [
        (f"{key} = {json.dumps(row['settings'][key])}", row) for key in usual for row, keys in changes if keys == [key]
    ]
    chosen += [
        (f"predictor = context of {row['settings']['predictor.context']}, k = {row['settings']['prefetch.k']}", row)
        for row in contexts
    ]
    for name, row in chosen:
        cells = [
            name,
            f"{row['hit_rate']:.1%}",
            f"{row['hit_rate_without_prefetch']:.1%}",
            f"{row['inter_token_latency_ms']['p50']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['prefetch_speedup']:.2f}x",
        ]
        rows.append(cells)
    return table(columns, rows)


def reproduce() -> str:
    """The guide's other tables, published and ours, as `prestage reproduce` has them."""
    made = {name: rows() for name, rows in PUBLISHED.items() if name != "virtual-memory"}
    return "\n\n".join(
        table([name.replace("-", " "), *figure_columns(rows)[1:]], [[row["name"], *figure_cells(row)] for row in rows])
        for name, rows in made.items()
    )


def replay_speed() -> str:
    """The figures of `bench_replay.py`, from a run of it."""
    data = bench("bench_replay")
    missing = data.pop("skipped, not installed")
    others = list(next(iter(data.values()))["times_faster"])
    columns, rows = ["layers x experts, room", "compiled LRU", *others], []
    for name, row in data.items():
        rates, faster = row["million_accesses_per_second"], row["times_faster"]
        cells = [f"{rates[other]:.1f} ({faster[other]:.1f}x)" for other in others]
        rows.append([name, f"{rates['compiled']:.0f}", *cells])
    return "\n".join([table(columns, rows), *(f"\nNot installed, not measured: {name}." for name in missing)])


def timeline_speed() -> str:
    """The figures of `bench_timeline.py`, from a run of it."""
    data = bench("bench_timeline")
    ours = data["ours"]
    rows = []
    for name in ("ours", "ours, .gz", "json.dumps", "json.dump"):
        row = data[name]
        times = {key: f" ({row[key] / ours[key]:.2f}x)" if "json" in name else "" for key in ("seconds", "peak_mib")}
        seconds, peak = f"{row['seconds']:.1f}{times['seconds']}", f"{row['peak_mib']:,.0f} MiB{times['peak_mib']}"
        rows.append([name, seconds, peak, f"{row['file_mib']:.0f} MiB"])
    return table(["a million spans, written by", "seconds", "peak memory", "file"], rows)


def _validation(name: str) -> dict[str, Any]:
    """Returns a committed report of calibration/validation."""
    text = (ROOT / "calibration" / "validation" / f"{name}.json").read_text("utf-8")
    return dict(json.loads(text))


def reality() -> str:
    """How well simulated makespans match those measured on a GPU, from the committed report of `calibrate validate`."""
    return markdown(_validation("h200"), every_row=False)


def reality_rows() -> str:
    """Every schedule of the same report."""
    return markdown(_validation("h200"), every_row=True).rpartition("\n\n")[2]


def two_gpus() -> str:
    """The same on two GPUs, each schedule by itself."""
    return markdown(_validation("h100-x2"), every_row=True)


def beside() -> str:
    """What works beside the GPU's stream, each schedule by itself."""
    report = _validation("h200-offload")
    return f"{_kinds(report['rows'])}\n\n{markdown(report, every_row=True)}"


def _kinds(rows: list[dict[str, Any]]) -> str:
    """The sizes of errors by what runs beside, as the scenarios' names say it."""
    kinds = {
        "a drive": ("-drive",), "experts on the CPU": ("-cpu",), "compressed experts": ("-packed",),
        "unequal sizes, grouped kernels, a predictor": ("-unequal", "-grouped", "-predictor"), "others": ("",),
    }  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
    for row in rows:
        kind = next(name for name, marks in kinds.items() if any(mark in row["scenario"] for mark in marks))
        found[kind].append(row)
    lines = []
    for name, members in found.items():
        errors = [abs(row["makespan_error"]) for row in members]
        spread = median(row["spread"] for row in members)
        lines.append((name, len(errors), f"{median(errors):.2%}", f"{max(errors):.2%}", f"{spread:.2%}"))
    return table(("what", "n", "median error", "worst", "machine's own spread (median)"), lines)


def shared() -> str:
    """Two GPUs that share the experts of every layer, each schedule by itself."""
    return markdown(_validation("h200-pair-shared"), every_row=True)


def exchanges() -> str:
    """What two H200s take to exchange data, by bytes that each sends the other, from the samples as they are."""
    seen: dict[int, dict[tuple[str, str], float]] = {}
    for series in load_samples(ROOT / "calibration" / "samples" / "h200-x2.json.gz").series:
        if series.term == "exchange":
            size, how, mode = (series.key[name] for name in ("bytes", "how", "mode"))
            us = median(ns for of in series.rounds_ns for ns in of) / 1000
            seen.setdefault(int(size), {})[str(how), str(mode)] = us
    columns = [(how, mode) for mode in ("in a row", "host") for how in ("copies", "nccl")]
    rows = []
    for size, took in sorted(seen.items()):
        shown = f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB"
        rows.append([shown, *(f"{took[column]:.1f} us" for column in columns)])
    names = ("copies, in a row", "NCCL, in a row", "host, both GPUs' copies", "host, a process's NCCL call")
    return table(["each sends", *names], rows)


def aside() -> str:
    """Decompression beside kernels, executed on another H200: each schedule."""
    return markdown(_validation("h200-aside"), every_row=True).rpartition("\n\n")[2]


def shared_again() -> str:
    """GPUs that share experts, executed again beside another program."""
    return markdown(_validation("h200-x2-shared"), every_row=True)


def drift() -> str:
    """Which costs of `h200` had moved on one GPU of the machine with two."""
    return markdown(_validation("h200-x2-drift"), every_row=False)


def pair() -> str:
    """Pipelines on two H200s."""
    return markdown(_validation("h200-pair"), every_row=False)


def held_out_kernels() -> str:
    """How near the surface of `h200` comes to kernels, and groups of them, of shapes that it was not measured on."""
    folder = ROOT / "calibration" / "validation" / "h200"
    files = [load_samples(folder / f"held-out.{name}.json.gz") for name in ("single", "groups")]
    return check_text(check_kernels(files, load_profile("h200")))


def held_out() -> str:
    """Whole schedules of shapes that were not measured, simulated with `h200` and with a profile of that session."""
    ours, own = (_validation(f"h200-held-out{name}") for name in ("", "-own"))
    return f"{markdown(ours, every_row=False)}\n\n{markdown(own, every_row=True)}"


def held_out_context() -> str:
    """Schedules that attend to a context, simulated with `h200` and with the profile of a machine of that kind."""
    ours, pair = (_validation(f"h200-held-out-context{name}") for name in ("", "-pair"))
    return f"{markdown(ours, every_row=False)}\n\n{markdown(pair, every_row=True)}"


def held_out_today() -> str:
    """All of these, with a context and without, in one session, with `h200` and with that session's own costs."""
    ours, own = (_validation(f"h200-held-out-2026-12{name}") for name in ("", "-own"))
    return f"{markdown(ours, every_row=False)}\n\n{markdown(own, every_row=True)}"


def held_out_again() -> str:
    """Eager schedules among them, executed again on another day with more repeats, simulated with `h200`."""
    return markdown(_validation("h200-held-out-again"), every_row=True)


def _signed(row: dict[str, Any], key: str) -> str:
    return f"{row[key] / row['measured_ns'] - 1:+.1%}"


#: What the two fits of a runtime's report are.
_FITS = {
    "decode": ("first choice of constants", "second choice"),
    "llama.cpp": ("first: constants of two other models", "second: of three rows of the same model"),
}
#: Errors are counted that are larger; one within the spread of its setting may be the setting's.
_WANTED = 0.10


def _errors(rows: list[dict[str, Any]], key: str) -> list[str]:
    """The median and the worst error, how many are beyond _WANTED, and how many of those within their spread."""
    middle, worst = sizes(rows, key)
    beyond = [row for row in rows if abs(row[key] / row["measured_ns"] - 1) > _WANTED]
    within = [row for row in beyond if row["spread"] and abs(row[key] / row["measured_ns"] - 1) <= row["spread"]]
    return [f"{middle:.1%}", f"{worst:.1%}", str(len(beyond)), str(len(within))]


def _error_table(name: str, rows: list[dict[str, Any]]) -> str:
    """The errors of a report's rows that are in no second fit, and of the baselines."""
    held = [row for row in rows if not row["fitted_to"]]
    first, second = _FITS[name]
    keys = {"predicted_ns": "as shipped", "first_ns": first, "fitted_ns": second, "busiest_ns": "busiest lane alone",
            "line_ns": "a line through the fitted runs"}  # fmt: skip
    for row, ns in zip(rows, line_ns(rows), strict=True):
        row["line_ns"] = ns
    lines = [[words, *_errors(held, key)] for key, words in keys.items()]
    return table(
        [f"{len(held)} settings, time of a step", "median error", "worst", "beyond 10%", "within spread"], lines
    )


def _runtime_rows(name: str, report: str) -> str:
    """Every setting of a real runtime: measured, predicted as shipped and with what was fitted to others, baselines."""
    rows = _validation(report)["rows"]
    spreads = [row["spread"] for row in rows if row["spread"] is not None]
    held = sum(not row["fitted_to"] for row in rows)
    text = f"{len(rows)} settings, {held} of them in no second fit; the median spread is {median(spreads):.1%}."
    keys = ("predicted_ns", "first_ns", "fitted_ns", "busiest_ns")
    each = [
        [row["name"] + (" (fitted)" if row["fitted_to"] else ""), f"{row['measured_ns'] / 1e6:,.2f}",
         str(row["samples"]), "-" if row["spread"] is None else f"{row['spread']:.1%}",
         f"{row['predicted_ns'] / 1e6:,.2f}", *(_signed(row, key) for key in keys)]
        for row in rows
    ]  # fmt: skip
    columns = ["setting", "measured, ms", "n", "spread", "as shipped, ms", "error", "first", "second", "busiest lane"]
    return f"{text}\n\n{_error_table(name, rows)}\n\n{table(columns, each)}"


def runs_decoded() -> str:
    """What `calibrate decode` measured on an H200, beside what is predicted."""
    return _runtime_rows("decode", "h200-decode-2026-12-01")


def runs_decoded_all() -> str:
    """The same with all repeats, whoever slowed the host."""
    rows = _validation("h200-decode-2026-12-01")["rows"]
    return _error_table("decode", [row | row["all"] for row in rows])


def runs_decoded_before() -> str:
    """The errors of an earlier day's."""
    return _error_table("decode", _validation("h200-decode")["rows"])


def runs_llama_cpp() -> str:
    """What llama-bench measured on an H200 with flash attention, beside what is predicted."""
    return _runtime_rows("llama.cpp", "h200-llama.cpp-flash")


def runs_llama_cpp_before() -> str:
    """The errors of earlier rows, without flash attention."""
    return _error_table("llama.cpp", _validation("h200-llama.cpp")["rows"])


def runs_blind() -> str:
    """What was predicted of later runs before anything was changed, with constants fitted to the earlier ones."""
    keys = {"predicted_ns": "as shipped", "earlier_first_ns": "earlier constants, first",
            "earlier_ns": "earlier constants, second"}  # fmt: skip
    lines = []
    for runtime, report in (("transformers", "decode-2026-12-01"), ("llama.cpp", "llama.cpp-flash")):
        rows = _validation(f"h200-{report}-blind")["rows"]
        lines += [[runtime, str(len(rows)), words, *_errors(rows, key)] for key, words in keys.items()]
    return table(["runtime", "settings", "constants", "median error", "worst", "beyond 10%", "within spread"], lines)


def prompts_llama_cpp() -> str:
    """What llama-bench's prompts took on an H200 with flash attention, beside what is predicted."""
    report = _validation("h200-llama.cpp-flash-prompts")
    rows = [
        [row["model"], str(row["n_prompt"]), str(row["n_cpu_moe"]),
         "pinned" if row["load_mode"] == "none" else "pageable",
         f"{row['measured_ns'] / 1e6:,.1f}", f"{row['predicted_ns'] / 1e6:,.1f}", _signed(row, "predicted_ns")]
        for row in report["rows"]
    ]  # fmt: skip
    return table(
        ["model", "tokens", "layers on the CPU", "host memory", "measured, ms", "predicted, ms", "error"], rows
    )


def runs_freetoken() -> str:
    """What whole runs of FreeToken took on an H200, beside what is predicted."""
    report = _validation("h200-freetoken")
    rows = [
        ["fetched" if row["way"] == "offload" else "shared with the CPU", f"{row['slots']:,} of {row['experts']:,}",
         f"{row['missed']:.0%}", str(row["rounds"]), f"{row['measured_ns'] / 1e6:,.2f}",
         f"{row['predicted_ns'] / 1e6:,.2f}", _signed(row, "predicted_ns")]
        for row in sorted(report["rows"], key=lambda row: (row["way"] != "offload", row["slots"]))
    ]  # fmt: skip
    return table(["misses", "slots", "missed", "rounds", "measured, ms", "as shipped, ms", "error"], rows)


#: Each stands in one page or several.
def engines() -> str:
    """What a run takes by each engine."""
    from bench_engines import table as measured

    made: str = measured()
    return made


def whole() -> str:
    """What whole runs take, from a run of `bench_whole.py`."""
    from bench_whole import table as measured

    made: str = measured()
    return made


def models() -> str:
    """What the published configs of tests/data/configs come to, beside their tensors' count and published figures."""
    data = ROOT / "tests" / "data"
    facts = json.loads((data / "published_models.json").read_text(encoding="utf-8"))
    rows = []
    for name in sorted(facts, key=str.lower):
        model, fact = load_model(data / "configs" / f"{name}.json"), facts[name]
        assert model.parameters is not None and model.active_parameters is not None
        tensors = fact.get("tensors")
        rows.append(
            (
                name,
                f"{model.parameters / 1e9:.2f}",
                "-" if tensors is None else f"{model.parameters / tensors - 1:+.2%}",
                fact.get("total", "-"),
                f"{model.active_parameters / 1e9:.2f}",
                f"{fact['active']} ({fact['counts']})" if "active" in fact else "-",
                f"{model.expert_dtype}, {model.dense_dtype}",
                f"{model.kv_bytes_per_token / 1024:,.1f}",
                f"{model.state_bytes / 2**20:,.1f}" if model.state_bytes else "-",
            )
        )
    columns = ("model", "weights, B", "against its tensors", "published", "active, B", "published (counts)",
               "experts, dense part", "KV a token, KiB", "states, MiB")  # fmt: skip
    return table(columns, rows)


def from_parts() -> str:
    """How machines put together from datasheets and another machine compare with the same machines measured."""
    rows = []
    for name in checks.names():
        for row in checks.cost_ratios(name):
            found = (row.median, min(row.ratios), max(row.ratios))
            rows.append([name, row.what, str(len(row.ratios)), *(f"{each:.2f}" for each in found)])
    return table(["machine", "cost", "number", "median", "least", "most"], rows)


def attention_growth() -> str:
    """How the dense part grows with the context by the surface, against what was measured."""
    rows = []
    for name in checks.names():
        for row in checks.attention_ratios(name):
            found = (row.median, min(row.ratios), max(row.ratios))
            rows.append([name, row.what, str(len(row.ratios)), *(f"{each:.2f}" for each in found)])
    return table(["machine", "cost", "number", "median", "least", "most"], rows)


def schedules_from_parts() -> str:
    """The same, on the schedules that were executed, with a range of 40 replicates."""
    columns = ["machine", "dispatch", "schedules", "median error", "its size", "from", "to", "within p5 to p95"]
    rows = []
    for name, folder in (("h200", "validation"), ("h100-x2", "two-gpus")):
        found = checks.schedules(name, ROOT / "calibration" / "validation" / name / folder, replicates=40)
        for row in checks.schedule_summary(found):
            size = f"{row['median_size']:.1%}"
            median, least, most = (f"{row[key]:+.1%}" for key in ("median", "least", "most"))
            inside = f"{row['inside']} of {row['schedules']}"
            rows.append([name, row["dispatch"], str(row["schedules"]), median, size, least, most, inside])
    return table(columns, rows)


def part_shares() -> str:
    """What is usually reached of datasheets' figures."""
    rows = [
        [row["of"], "" if row["share"] is None else f"{row['share']:.2f}", f"{row['off']:.0%}", str(row["machines"])]
        for row in shares()
    ]
    return table(["of", "reached", "off by", "machines"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "from-parts": from_parts,
    "attention-growth": attention_growth,
    "schedules-from-parts": schedules_from_parts,
    "part-shares": part_shares,
    "one-command": one_command,
    "new-user": path_table,
    "ways": ways_table,
    "sizes": how_big,
    "lines": lines,
    "tests": layers_of_tests,
    "coverage": coverage,
    "owned": owned,
    "lookahead": lookahead,
    "guide": guide,
    "reproduce": reproduce,
    "insights": insights,
    "eviction": policies,
    "per-layer": layers,
    "misses": misses,
    "shared-misses": shared_misses,
    "routing": routing,
    "residency": residency,
    "next-gate": next_gate,
    "streams": streams,
    "pipelines": pipelines,
    "sharings": sharings,
    "parallel-speed": parallel_speed,
    "drives": drives,
    "inclusion": inclusion,
    "phone": phone,
    "scenario": scenario,
    "request-keys": request_keys,
    "request-day": day_figure,
    "request-drafts": drafts_figure,
    "queueing": queueing,
    "served": served,
    "apart": apart,
    "reality": reality,
    "reality-rows": reality_rows,
    "two-gpus": two_gpus,
    "beside": beside,
    "shared": shared,
    "pair": pair,
    "exchanges": exchanges,
    "aside": aside,
    "shared-again": shared_again,
    "drift": drift,
    "held-out-kernels": held_out_kernels,
    "held-out": held_out,
    "held-out-again": held_out_again,
    "held-out-context": held_out_context,
    "held-out-2026-12": held_out_today,
    "host-beside": host_beside,
    "whole": whole,
    "speed": speed,
    "replay-speed": replay_speed,
    "timeline-speed": timeline_speed,
    "engines": engines,
    "runs-decoded": runs_decoded,
    "runs-decoded-all": runs_decoded_all,
    "runs-decoded-before": runs_decoded_before,
    "runs-llama.cpp": runs_llama_cpp,
    "runs-llama.cpp-before": runs_llama_cpp_before,
    "runs-blind": runs_blind,
    "prompts-llama.cpp": prompts_llama_cpp,
    "runs-freetoken": runs_freetoken,
    "published-figures": published_figures,
    "published-rows": published_rows,
    "models": models,
    "dependencies": dependencies_table,
    "advice-regret": regret,
    "advice-regret-whole": whole_models,
    "advice-fit": beside_fit,
    "advice-pairs": published_pairs,
}


def pages_of(name: str) -> list[Path]:
    """Returns the pages that have the marks of a table."""
    found = [page for page in PAGES if _marks(name).search(page.read_text(encoding="utf-8"))]
    if not found:
        raise SystemExit(f"no page has marks for {name}")
    return found


def shown(name: str) -> list[str]:
    """Returns what each page shows between the marks of a table."""
    matches = (_marks(name).search(page.read_text(encoding="utf-8")) for page in pages_of(name))
    return [match[2].strip() for match in matches if match is not None]


def write(name: str, text: str) -> None:
    """Put a table between its marks, wherever they are."""
    for page in pages_of(name):
        whole = page.read_text(encoding="utf-8")
        page.write_text(_marks(name).sub(lambda match: f"{match[1]}\n{text}\n{match[3]}", whole), encoding="utf-8")


def _marks(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- tests/readme_tables.py {name} -->)\n(.*?)(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Print or write the named tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*TABLES, []])
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.names or TABLES:
        text = TABLES[name]()
        if arguments.write:
            write(name, text)
        else:
            print(text, end="\n\n")


if __name__ == "__main__":
    main()
