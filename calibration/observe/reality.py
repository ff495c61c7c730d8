"""How well Prestage predicts the runs of real runtimes in `calibration/samples/h200-runtimes`: the report, as JSON.

    python -m prestage.calibration.observe.reality decode OUT.json [ENGINE]

In place of `decode`: `decode-2026-12-01`, `llama.cpp` or `llama.cpp-flash`. What is fitted to which runs is said here:
of three models two runs each, of mixtral-8x7b none; and for llama.cpp, two models for each that is predicted, and three
rows of the model itself. Later runs are also predicted by the constants of the earlier ones' committed report.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...bounded import read, unpacked
from ...files import write_file
from .fit import GUESS, Fitted, Predictor, fit, median_worst
from .logs import Context, Observation, ObserveError, llama_bench, load_logs

SAMPLES = Path(__file__).parent.parent / "samples" / "h200-runtimes"
VALIDATION = Path(__file__).parent.parent / "validation"
#: Earlier runs, and later ones: on another day, and of llama.cpp with flash attention.
DAYS = ("decode.json.gz", "decode-2026-12-01.json.gz")
BENCH, BENCH_FLASH = SAMPLES / "llama-bench.jsonl.gz", SAMPLES / "llama-bench-flash.jsonl.gz"
DECODED = ("gpt-oss-20b", "olmoe-1b-7b", "qwen3-30b-a3b", "mixtral-8x7b")
#: The runs that constants of all models together are fitted to: the first choice, made before any error was seen.
COMMON = (
    "gpt-oss-20b-25pct-b1-c100-p0-own", "gpt-oss-20b-25pct-b1-c100-p4-own", "olmoe-1b-7b-25pct-b1-c100-p0-own",
    "olmoe-1b-7b-25pct-b1-c100-p8-own", "qwen3-30b-a3b-25pct-b1-c100-p0-own", "qwen3-30b-a3b-60pct-b4-c100-p0-own",
)  # fmt: skip
DECODE_COSTS = ("layer", "expert", GUESS)
#: The runs that each model's own constants are fitted to: of one sequence and of four, so that the time of a layer and
#: that of an expert can be told apart. They do not guess, so the time of guessing stays as assumed. Chosen when the
#: errors of other choices were known.
OWN = re.compile("(gpt-oss|olmoe|qwen3).*-(100pct-b1|60pct-b4)-c100-p0-own")
#: Files of llama-bench: the model, in whose file of shapes its types stand, and its layers.
BENCHED = {"mixtral-8x7b": 4, "qwen3-30b-a3b": 12, "gpt-oss-20b": 8, "olmoe-1b-7b": 8}
#: The models that constants are fitted to, for each that is predicted.
HELD_OUT = {
    "mixtral-8x7b": ("qwen3-30b-a3b", "gpt-oss-20b"), "qwen3-30b-a3b": ("mixtral-8x7b", "gpt-oss-20b"),
    "gpt-oss-20b": ("mixtral-8x7b", "qwen3-30b-a3b"), "olmoe-1b-7b": ("qwen3-30b-a3b", "gpt-oss-20b"),
}  # fmt: skip
#: Chosen when the errors of a first choice were known.
BENCH_COSTS = ("step", "gpu_kernels", "cpu_submit", "cpu_cores")
#: The three rows of each model that its own constants are fitted to, with as many costs: no layer on the CPU, and the
#: most layers there with the most and the fewest threads.
OWN_ROWS = re.compile("mixtral.*-ncmoe(0-t16|4-t16|4-t4)-d0|qwen3.*-ncmoe(0-t16|12-t16|12-t4)-d0|"
                      "(gpt-oss|olmoe).*-ncmoe(0-t16|8-t16|8-t4)-d0")  # fmt: skip
OWN_COSTS = ("gpu_kernels", "cpu_submit", "cpu_cores")
#: What its memory gives 16 threads: 95.3 GB/s, on another day 98.4 (calibration/samples/h200-runtimes/components).
CPU_GB_PER_S = 97.0


def decoded(file: str = DAYS[0], *, disturbed: bool = False) -> list[Observation]:
    """Returns the runs of `calibrate decode`, of a day; with repeats in which others slowed the host, or without."""
    context = Context(profile="h200", disturbed=disturbed)
    return load_logs([SAMPLES / model / file for model in DECODED], context)


def bench_rows(bench: Path = BENCH) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields the rows of llama-bench, model by model."""
    lines = map(json.loads, unpacked(read(bench, ObserveError), bench, ObserveError).splitlines())
    rows = [row for line in lines for row in line.get("rows", ())]
    for model in BENCHED:
        yield model, [row for row in rows if row["model_filename"].startswith(model)]


def benched(bench: Path = BENCH) -> list[Observation]:
    """Returns the settings of llama-bench that generate."""
    found = []
    for model, own in bench_rows(bench):
        layers = BENCHED[model]
        more: dict[str, dict[str, Any]] = {"model": {"layers": layers}, "miss": {"cpu_gb_per_s": CPU_GB_PER_S}}
        found += llama_bench(bench, own, Context("h200", str(SAMPLES / "models" / f"{model}.toml"), more))
    return found


def report(observations: Sequence[Observation], before: Sequence[float], after: Sequence[float],
           busiest: Sequence[float], fitted_to: Sequence[bool]) -> list[dict[str, Any]]:  # fmt: skip
    """Returns a row a setting: what was measured and predicted, in ns a decode step."""
    rows = zip(observations, before, after, busiest, fitted_to, strict=True)
    return [
        {
            "name": each.name, "model": each.group, "samples": each.samples, "spread": each.spread,
            "measured_ns": round(each.ns), "predicted_ns": round(shipped), "fitted_ns": round(own),
            "busiest_ns": round(lane), "fitted_to": seen,
        }
        for each, shipped, own, lane, seen in rows
    ]  # fmt: skip


def _costs(fitted: Fitted) -> dict[str, Any]:
    return {
        name: {"prior": fitted.priors[name], "value": value, "before": fitted.before[name], "after": fitted.after[name]}
        for name, value in fitted.values.items()
    }


def earlier_fits(report: str) -> Iterator[tuple[str | None, list[str], dict[str, float]]]:
    """Yields the fits of a committed report: the model that each predicts (None: all), its runs, and its costs."""
    for each in json.loads((VALIDATION / f"{report}.json").read_text(encoding="utf-8"))["fits"]:
        yield each.get("predicts"), each["fitted_to"], {name: cost["value"] for name, cost in each["costs"].items()}


def add_earlier(rows: Sequence[dict[str, Any]], predictor: Predictor, report: str,
                first: Sequence[Sequence[str]]) -> None:  # fmt: skip
    """Add to each row what the constants of an earlier report say of it; `first` are the runs of its first fits."""
    fits = list(earlier_fits(report))
    for number, row in enumerate(rows):
        row |= {"earlier_first_ns": row["predicted_ns"], "earlier_ns": row["predicted_ns"]}
        for model, runs, values in fits:
            if model in (None, row["model"]):
                key = "earlier_first_ns" if tuple(runs) in first else "earlier_ns"
                row[key] = round(predictor.ns(number, values))


def _decode_fits(predictor: Predictor, observations: Sequence[Observation],
                 before: Sequence[float]) -> tuple[list[dict[str, Any]], list[float], list[float]]:  # fmt: skip
    """Returns the fits, and what the first and the second choice of runs say of each observation, in ns."""
    everything = range(len(observations))
    common = fit(predictor, observations, DECODE_COSTS, [n for n in everything if observations[n].name in COMMON])
    fits = [{"fitted_to": list(COMMON), "costs": _costs(common), "sums": list(common.sums)}]
    after = list(before)
    for model in DECODED:
        own = [number for number in everything if observations[number].group == model]
        chosen = [number for number in own if OWN.fullmatch(observations[number].name)]
        if chosen:
            fitted = fit(predictor, observations, DECODE_COSTS, chosen)
            runs = [observations[number].name for number in chosen]
            fits.append({"predicts": model, "fitted_to": runs, "costs": _costs(fitted), "sums": list(fitted.sums)})
            for number in own:
                after[number] = predictor.ns(number, fitted.values)
    return fits, [predictor.ns(number, common.values) for number in everything], after


def decode_report(engine: str | None = None, file: str = DAYS[0]) -> dict[str, Any]:
    """Returns the report of `calibrate decode`'s runs, of a day: with repeats that nobody disturbed, and `all`."""
    observations = decoded(file)
    predictor = Predictor(observations, "transformers", engine)
    everything = range(len(observations))
    before = [predictor.ns(number, {}) for number in everything]
    busiest = [predictor.busiest_ns(number) for number in everything]
    fits, first, after = _decode_fits(predictor, observations, before)
    rows = report(observations, before, after, busiest, [OWN.fullmatch(each.name) is not None for each in observations])
    repeats = decoded(file, disturbed=True)
    all_fits, all_first, all_after = _decode_fits(predictor, repeats, before)
    for number, (row, each) in enumerate(zip(rows, repeats, strict=True)):
        row |= {"first_ns": round(first[number]), "first_to": row["name"] in COMMON}
        row["all"] = {"samples": each.samples, "spread": each.spread, "measured_ns": round(each.ns),
                      "first_ns": round(all_first[number]), "fitted_ns": round(all_after[number])}  # fmt: skip
    if file != DAYS[0]:
        add_earlier(rows, predictor, "h200-decode", [COMMON])
    return {"runtime": "transformers", "fits": fits, "all_fits": all_fits, "rows": rows}


def bench_report(engine: str | None = None, bench: Path = BENCH) -> dict[str, Any]:
    """Returns the report of llama-bench's rows, each model predicted by fits to two others and to three of its own."""
    observations = benched(bench)
    predictor = Predictor(observations, "llama.cpp", engine)
    everything = range(len(observations))
    before = [predictor.ns(number, {}) for number in everything]
    busiest = [predictor.busiest_ns(number) for number in everything]
    after, first, fits = list(before), list(before), []
    seen = [OWN_ROWS.fullmatch(each.name) is not None for each in observations]
    for model, others in HELD_OUT.items():
        foreign = [number for number in everything if observations[number].group in others]
        own = [number for number in everything if observations[number].group == model]
        for names, chosen, into in (
            (BENCH_COSTS, foreign, first), (OWN_COSTS, [number for number in own if seen[number]], after)
        ):  # fmt: skip
            fitted = fit(predictor, observations, names, chosen)
            told = {"costs": _costs(fitted), "sums": list(fitted.sums)}
            runs = list(others) if chosen is foreign else [observations[number].name for number in chosen]
            fits.append({"predicts": model, "fitted_to": runs} | told)
            for number in own:
                into[number] = predictor.ns(number, fitted.values)
    rows = report(observations, before, after, busiest, seen)
    for row, ns in zip(rows, first, strict=True):
        row["first_ns"] = round(ns)
    if bench != BENCH:
        add_earlier(rows, predictor, "h200-llama.cpp", list(HELD_OUT.values()))
    return {"runtime": "llama.cpp", "fits": fits, "rows": rows}


def sizes(rows: Sequence[dict[str, Any]], key: str) -> tuple[float, float]:
    """Returns the median and the worst size of a prediction's error."""
    return median_worst([row[key] / row["measured_ns"] - 1 for row in rows])


def line_ns(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Returns what a line through the fitted runs, over the busiest lane's time, says of each row."""
    seen = [row for row in rows if row["fitted_to"]]
    slope, start = np.polyfit([row["busiest_ns"] for row in seen], [row["measured_ns"] for row in seen], 1)
    return [float(start + slope * row["busiest_ns"]) for row in rows]


def main(arguments: Sequence[str]) -> None:
    """Run from the command line."""
    made: dict[str, Callable[..., dict[str, Any]]] = {
        "decode": decode_report, "decode-2026-12-01": partial(decode_report, file=DAYS[1]),
        "llama.cpp": bench_report, "llama.cpp-flash": partial(bench_report, bench=BENCH_FLASH),
    }  # fmt: skip
    if len(arguments) not in (2, 3) or arguments[0] not in made:
        sys.exit(str(__doc__))
    found = made[arguments[0]](*arguments[2:])
    write_file(Path(arguments[1]), json.dumps(found, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
