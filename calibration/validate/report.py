"""A validation's report for people: Markdown tables, and one picture of all errors beside the machine's own spread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from ...files import replacing_folder, write_file
from ...output.markdown import table
from ...output.pictures import save
from ...output.plots import plot_errors

#: How many costs that moved are shown.
MOST_MOVED = 20


def write_report(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write validation.json, validation.md and validation.png, all or none, to a folder and return their paths."""
    names = [f"validation.{ending}" for ending in ("json", "md", "png")]
    with replacing_folder(folder) as place:
        write_file(place / names[0], orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
        write_file(place / names[1], markdown(report, every_row=True).encode() + b"\n")
        save(plot_errors(report["rows"]), place / names[2])
    return [folder / name for name in names]


def markdown(report: dict[str, Any], *, every_row: bool) -> str:
    """Returns the report as Markdown: sizes of the errors, dispatch modes, ablations, and each scenario if asked."""
    machine = report["machine"]
    gpus = {1: "one", 2: "two"}.get(report["gpus"], report["gpus"])
    parts = [
        f"{len(report['rows'])} schedules executed {report['repeats']} times each on {gpus} {machine['device']} "
        f"(driver {machine['driver']}, torch {machine['versions']['torch']}, {machine['date']}) and simulated with the "
        f"profile `{report['profile']}`; errors are of the makespan, simulated / measured - 1.",
        _summary_table(report["summary"]),
    ]
    if report["replicates"]:
        inside = report["summary"]["all"]["inside"]
        parts.append(
            f"{inside} of {len(report['rows'])} measured makespans lie between the 5th and the 95th percentile of "
            f"{report['replicates']} simulations with costs drawn from their uncertainty."
        )
    if report["dispatch"]:
        parts.append(_pairs_table(report["dispatch"]))
    if report["ablation"]:
        parts.append(_ablation_table(report["ablation"]))
    if any(row["moved"] for row in report.get("drift", ())):
        parts.append(_drift_table(report["drift"]))
    if every_row:
        parts.append(_rows_table(report["rows"]))
    return "\n\n".join(parts)


def _summary_table(summary: dict[str, Any]) -> str:
    rows = [
        (
            name,
            sizes["n"],
            f"{sizes['median']:.2%}",
            f"{sizes['p90']:.2%}",
            f"{sizes['worst']:.2%}",
            f"{sizes['spread_median']:.2%}",
            f"{sizes['bound_median']:.1%}",
            sizes["no_lane_decides"],
            f"{sizes['counts_equal']} of {sizes['n']}",
        )
        for name, sizes in summary.items()
    ]
    columns = (
        "schedules", "n", "median error", "90th percentile", "worst", "machine's own spread (median)",
        "busiest lane alone (median error)", "no lane busy over 80 %", "counts equal",
    )  # fmt: skip
    return table(columns, rows)


def _pairs_table(pairs: Sequence[dict[str, Any]]) -> str:
    rows = [
        (
            pair["scenario"].replace("-graph", ""),
            f"{pair['measured']:.3f}",
            f"{pair['simulated']:.3f}",
            f"{pair['error']:+.1%}",
        )
        for pair in pairs
    ]
    return table(("eager over graphs", "measured", "simulated", "error"), rows)


def _ablation_table(ablation: dict[str, dict[str, float]]) -> str:
    rows = [(name, f"{sizes['median']:.2%}", f"{sizes['worst']:.1%}") for name, sizes in ablation.items()]
    return table(("costs with", "median error", "worst"), rows)


def _drift_table(drift: Sequence[dict[str, Any]]) -> str:
    """Returns the costs that have moved, the most first, and how many have not."""
    moved = [row for row in drift if row["moved"]]
    rows = [
        (
            row["cost"],
            row["n"],
            f"{row['profile_ns'] / 1e3:.1f} us",
            f"{row['measured_ns'] / 1e3:.1f} us",
            f"{row['change']:+.1%}",
            f"{row['within']:.1%}",
        )
        for row in moved[:MOST_MOVED]
    ]
    columns = ("cost that moved", "samples", "profile", "today", "change", "varies by")
    return f"{len(moved)} of {len(drift)} costs moved.\n\n{table(columns, rows)}"


def _rows_table(rows: Sequence[dict[str, Any]]) -> str:
    columns = ("schedule", "measured", "simulated", "error", "spread", "busiest lane alone", "busy")
    cells = [
        (
            row["scenario"],
            f"{row['measured_ms']:.2f} ms",
            f"{row['simulated_ms']:.2f} ms",
            f"{row['makespan_error']:+.2%}",
            f"{row['spread']:.2%}",
            f"{row['bound']} {row['bound_error']:+.1%}",
            f"{row['busiest_share']:.0%}",
        )
        for row in rows
    ]
    return table(columns, cells)
