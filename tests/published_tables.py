"""The tables of published runs: the first one, before anything was learned from it, and the one of today's costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prestage.calibration.published.rows import Predicted, load_source, source_names, summary
from prestage.engine.prediction import Range
from prestage.output.markdown import table

VALIDATION = Path(__file__).parent.parent / "calibration" / "validation"
FIRST, NOW = VALIDATION / "published-2026-11-30.jsonl", VALIDATION / "published.jsonl"


def rows_of(file: Path) -> list[Predicted]:
    """Returns the predictions of a committed table, each with its row as the table of sources has it now."""
    known = {row.id: row for name in source_names() for row in load_source(name).rows}
    return [_predicted(known, json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def _predicted(known: dict[str, Any], said: dict[str, Any]) -> Predicted:
    band = None if said["p5"] is None else Range(said["p5"], said["predicted"], said["p95"])
    return Predicted(known[said["id"]], said["source"], said["predicted"], band, said["found"], said["reason"])


def published_figures() -> str:
    """Returns what both tables come to, in Markdown."""
    both = [summary(rows_of(file)) for file in (FIRST, NOW)]
    lines = (
        ("rows", lambda each: f"{each['rows']}"),
        ("of them not run", lambda each: f"{len(each['not_run'])}"),
        ("median error", lambda each: f"{each['median_error']:.0%}"),
        ("within p5 to p95", lambda each: f"{each['within_p5_p95']:.0%}"),
        ("median of p95 / p5", lambda each: f"{each['median_width']:.2f}"),
        ("interval score", lambda each: f"{each['interval_score']:.2f}"),
        ("interval score of half to twice", lambda each: f"{each['interval_score_half_to_twice']:.2f}"),
        ("off by more than twice", lambda each: f"{len(each['beyond_twice'])}"),
        ("neighbors ordered as measured", lambda each: f"{each['ordered']} of {each['ordered_of']}"),
    )
    return table(
        ["every source weighs the same", "first, blind", "now"], [[name, *map(of, both)] for name, of in lines]
    )


def published_rows() -> str:
    """Returns every row: measured, the first prediction's error, and today's prediction with its range."""
    first = {each.row.id: each for each in rows_of(FIRST)}
    rows = []
    for each in rows_of(NOW):
        before = first.get(each.row.id)
        then = "-" if before is None or before.error is None else f"{before.error:+.0%}"
        measured = f"{each.row.measured:,.4g} {each.row.unit}"
        if each.value is None or each.range is None or each.error is None:
            rows.append([each.row.id, measured, then, "-", "-", each.reason or "-", ""])
            continue
        band = f"{each.range.p5:,.3g} to {each.range.p95:,.3g}"
        inside = "yes" if each.within else "no"
        rows.append([each.row.id, measured, then, f"{each.value:,.3g}", band, f"{each.error:+.0%}", inside])
    return table(["row", "measured", "first error", "predicted", "p5 to p95", "error", "within"], rows)
