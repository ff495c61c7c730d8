"""The folder that `prestage run --out` writes: numbers, timeline and pictures, each whole or not at all; and curves."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from ..engine.measure.merge import memory_steps
from ..errors import InputError
from ..files import check_file, replacing_folder, write_file
from .about import about_run
from .export import SPAN_LIMIT, ExportSummary, export_timeline
from .pictures import save
from .plots import default_window, plot_memory, plot_miss_ratios, plot_timeline
from .saved import RUN_FILE, run_of, save_run

if TYPE_CHECKING:
    from ..engine.simulate import Result


def write_result(result: Result, folder: Path, *, all_spans: bool = False) -> list[str]:
    """Write result.json, run.safetensors, timeline.json.gz, timeline.png and memory.png; return a line about each.

    The folder has all of them or none. The same scenario writes the same bytes: what differs between runs (wall_s) is
    left out. Raises OSError if the folder cannot be written.
    """
    with replacing_folder(folder) as place:
        exported = _write_result(result, place, all_spans)
    cut = ""
    if exported.truncated:
        cut = f": the first {exported.spans_written:,} of {exported.spans_total:,} spans (--all-spans writes all)"
    return [
        f"{folder / 'result.json'}",
        f"{folder / RUN_FILE} (`prestage report {folder}` makes a page of it)",
        f"{folder / 'timeline.json.gz'} (open in ui.perfetto.dev){cut}",
        f"{folder / 'timeline.png'}",
        f"{folder / 'memory.png'}",
    ]


def _write_result(result: Result, folder: Path, all_spans: bool) -> ExportSummary:
    experts = result.data["model"]["experts"]
    name = f"{result.data['model']['name']} on {result.data['scenario']['machine']['profile']}"
    time_ns, assigned_bytes, budget_bytes = memory_steps(result.recordings)
    write_file(folder / "result.json", orjson.dumps(result.with_range(), option=orjson.OPT_INDENT_2) + b"\n")
    save_run(run_of(result), folder / RUN_FILE)
    exported = export_timeline(
        result.timeline,
        folder / "timeline.json.gz",
        about_run(result),
        limit=None if all_spans else SPAN_LIMIT,
    )
    start_ns, end_ns = default_window(result.timeline)
    picture = plot_timeline(result.timeline, start_ns=start_ns, end_ns=end_ns, experts_per_layer=experts, title=name)
    save(picture, folder / "timeline.png")
    save(plot_memory(time_ns, assigned_bytes, budget_bytes, title=name), folder / "memory.png")
    return exported


#: How the file of miss-ratio curves may end: a table, or a picture.
MISS_RATIO_FILES = (".csv", ".png", ".pdf", ".svg")


def check_miss_ratio_path(path: Path) -> None:
    """Raise ValueError unless miss-ratio curves can be written under this name: asked before they are computed."""
    if path.suffix not in MISS_RATIO_FILES:
        raise InputError(f"{path}: the file of miss-ratio curves must end in one of {', '.join(MISS_RATIO_FILES)}")
    check_file(path)


def write_miss_ratios(curves: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the miss-ratio curves of one trace or more, each with its name as `trace`.

    As a table (.csv, a row for each policy and capacity) or a picture (.png, .pdf, .svg). Raises ValueError or OSError
    if the file cannot be written.
    """
    check_miss_ratio_path(path)
    if path.suffix != ".csv":
        first = curves[0]
        what = (first["model"] or "trace") if len(curves) == 1 else f"{len(curves)} traces"
        where = f"{first['scope']}, lookup {first['lookup']}, batch {first['batch']}"
        where += "" if first["predictor"] is None else f", guesses of {first['predictor']}"
        save(plot_miss_ratios(*curves, title=f"{what} ({where})"), path)
        return
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    named = ["trace"] if len(curves) > 1 else []
    columns = ("policy", "capacity_share", "capacity_experts", "capacity_bytes", "accesses", "hits", "miss_ratio")
    rows.writerow([*named, *columns])
    for data in curves:
        for policy, curve in data["policies"].items():
            for capacity, hits, ratio in zip(data["capacities"], curve["hits"], curve["miss_ratio"], strict=True):
                room = [capacity["share"], capacity["experts"], capacity["bytes"]]
                rows.writerow([*(data[key] for key in named), policy, *room, data["accesses"], hits, ratio])
    write_file(path, text.getvalue().encode())
