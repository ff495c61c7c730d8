"""Many runs as tables: sweeps, suites, break-even."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from rich.text import Text

from .layout import columns_of, number_of, plain_console, share_of

#: What the table of a sweep shows of each row: its key and how it is written.
SWEEP_COLUMNS: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "tokens/s": ("tokens_per_second", lambda value: number_of(value, 2)),
    "hit": ("hit_rate", lambda value: share_of(value, 1)),
    "late": ("late_rate", lambda value: share_of(value, 1)),
    "memory": ("memory_utilization", lambda value: share_of(value, 1)),
    "stall": ("stall_ms", lambda value: f"{number_of(value, 1)} ms"),
    "over no cache": ("speedup", lambda value: f"{number_of(value, 2)}x"),
    "over same cache": ("prefetch_speedup", lambda value: f"{number_of(value, 2)}x"),
}
#: The best rows that the table of a sweep shows.
_BEST_ROWS = 10


#: How the figures of a row are headed in a terminal, in the order in which they are left out where it is narrow.
_NARROW = {"memory": "memory", "late": "late", "over no cache": "no cache", "stall": "stall", "hit": "hit"}
_HEADS = {**_NARROW, "over same cache": "same cache"}
#: Warnings of rows that ran less than they are headed by.
_NOT_AS_ASKED = ("short trace", "empty places")
#: So many reasons of failed rows are told.
_MOST_REASONS = 5


def print_sweep(rows: Iterable[dict[str, Any]]) -> None:
    """Print the fastest rows of a sweep as wide as the terminal is, and why others failed."""
    console = plain_console()
    reasons: dict[str, list[Mapping[str, Any]]] = {}
    best = heapq.nlargest(_BEST_ROWS, _ran(rows, reasons), key=lambda row: row["tokens_per_second"] or 0.0)
    if best:
        columns, cells = sweep_cells(best)
        kept = _fitting(columns, cells, console.width)
        table = columns_of(*(_short(name, columns) for name in kept))
        for row in cells:
            table.add_row(*(cell for name, cell in zip(columns, row, strict=True) if name in kept))
        console.print(Text(f"The {len(best)} fastest", style="bold"))
        console.print(table)
        for warning, of in _not_as_asked(best).items():
            console.print(Text(f"warning: {warning} ({of})", style="yellow"))
    for reason, failed in list(reasons.items())[:_MOST_REASONS]:
        settings = setting_words(failed[0]["settings"])
        others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        console.print(Text(f"could not run ({settings}{others}): {reason}", style="yellow"))
    if len(reasons) > _MOST_REASONS:
        console.print(Text(f"… and for {len(reasons) - _MOST_REASONS} other reasons", style="yellow"))


def _ran(rows: Iterable[dict[str, Any]], reasons: dict[str, list[Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yields the rows that ran; notes the others by their reason."""
    for row in rows:
        if row.get("error") is None:
            yield row
        else:
            reasons.setdefault(row["error"], []).append(row)


def _not_as_asked(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Returns the warnings of rows that ran less than was asked, each with the settings of its rows."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for warning in row.get("warnings", ()):
            if warning.startswith(_NOT_AS_ASKED):
                found.setdefault(warning, []).append(setting_words(row["settings"]))
    return {warning: "; ".join(of) for warning, of in found.items()}


def _short(name: str, columns: Iterable[str]) -> str:
    """Returns a column's heading: of a key its last word, where no other column has that."""
    last = name.rpartition(".")[2]
    alone = sum(other.rpartition(".")[2] == last for other in columns) == 1
    return _HEADS.get(name, last if alone else name)


def _fitting(columns: list[str], cells: list[list[str]], width: int) -> list[str]:
    """Returns the columns that say something and fit into a width, the key always."""
    said = {name: [row[number] for row in cells] for number, name in enumerate(columns)}
    kept = [name for name in columns if name not in _HEADS or {*said[name]} - {"0.0%", "-", "-x", "- ms"}]
    widths = {name: max(map(len, [_short(name, columns), *said[name]])) + 1 for name in kept}
    for name in _NARROW:
        if sum(widths[each] for each in kept) > width and name in kept:
            kept.remove(name)
    return kept


def sweep_cells(rows: Iterable[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Returns rows of a sweep as a table: its columns, the varied settings first, and the cells of each row."""
    keys: dict[str, None] = {}
    cells = []
    for row in rows:
        keys.update(dict.fromkeys(row["settings"]))
        figures = [show(row.get(key)) for key, show in SWEEP_COLUMNS.values()]
        cells.append([*(str(value) for value in row["settings"].values()), *figures, row["key"][:8]])
    return [*keys, *SWEEP_COLUMNS, "key"], cells


#: The columns of the best configurations of a suite's studies.
BEST_COLUMNS = ("study", "best by", "value", "where it starts", "changed")


def print_suite(data: dict[str, Any]) -> None:
    """Print the best configuration of each study of a suite by each metric, and how many could not run."""
    console = plain_console()
    table = columns_of(*BEST_COLUMNS)
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
    """Yields the best configurations of a study in BEST_COLUMNS."""
    for found in study["best"]:
        values = (_digits(found[key]) for key in ("value", "start"))
        yield [study["name"], found["name"], *values, setting_words(found["settings"])]


def setting_words(settings: Mapping[str, Any]) -> str:
    """Returns settings in words; nothing where there are none."""
    return ", ".join(f"{key} = {value}" for key, value in settings.items()) or "nothing"


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"


def print_break_even(data: dict[str, Any]) -> None:
    """Print the least recall that pays, by budget and lookahead."""
    console = plain_console()
    table = columns_of("budget", "lookahead", "pays from recall", "same cache alone", "with recall 1")
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
    """Returns a break-even in words: a recall, an interval where luck decides, always or never."""
    recall, below = cell["recall"], cell["not_below"]
    if recall is None:
        return "never"
    if below is None:
        return "0 (always)" if recall == 0 else f"luck decides up to {recall:.2f}"
    return f"{recall:.2f}" if recall - below < 0.015 else f"{recall:.2f} (luck decides from {below:.2f})"
