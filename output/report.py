"""The report: one HTML file that needs no network, with everything that a run says, or two runs side by side.

What the figures show is `figures`' to say, how a page is made `page`'s. Bokeh is imported only when one is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from ..engine.measure.comparison import compare
from ..engine.measure.recording import OUTCOMES
from ..engine.scenario.rows import flat
from .answer import answer_of, difference_of
from .figures import ALL_FIGURES, FIGURES, REQUEST_FIGURES, SPAN_LIMIT, busy_over_time, figure_data
from .page import PageError, Section, check_page, html_table, html_tiles, write_page
from .palette import OUTCOME_COLORS
from .saved import Run
from .tables.comparison import comparison_figure
from .tables.layout import time_of
from .tables.requests import LATENCY_COLUMNS, latency_rows, load_rows
from .tables.runs import headline, speed_rows

#: Which of a run's figures stand in half a row.
_HALF = ("wasted", "memory", "latency", "tokens", "first-token", "end-to-end")
#: Which of two runs' figures stand below each other rather than side by side.
_STACKED = ("timeline", "requests")
#: What a figure of the comparison is better for: more of it, or less; nothing is said of the others.
_BETTER = {
    "tokens_per_second": 1,
    "sustained_tokens_per_second": 1,
    "cold.tokens_per_second": 1,
    "makespan_ms": -1,
    "time_to_first_token_ms.mean": -1,
    "time_to_first_token_ms.p99": -1,
    "inter_token_latency_ms.p50": -1,
    "inter_token_latency_ms.p95": -1,
    "inter_token_latency_ms.p99": -1,
    "time_per_output_token_ms.mean": -1,
    "decode_step_ms.p50": -1,
    "decode_step_ms.p99": -1,
    "hit_rate": 1,
    "access_latency_ms": -1,
    "counts.miss": -1,
    "sharing.imbalance": -1,
    "speedup": 1,
}
#: Below this share, a difference is not called better or worse.
_SAME = 0.01


def write_report(
    runs: Sequence[Run],
    path: str | Path,
    *,
    title: str | None = None,
    sections: Sequence[Section] = (),
    all_spans: bool = False,
) -> None:
    """Write the page of one run, or of two side by side, with more `sections` behind what they come to.

    Of each timeline no more than SPAN_LIMIT spans are in it, unless `all_spans` are wanted.
    Raises PageError for another number of runs, a path that no page can be written to, and without Bokeh.
    """
    path = Path(path)
    check_page(path)
    if len(runs) not in (1, 2):
        raise PageError(f"a report is of one result, or compares two; {len(runs)} are given")
    limit = None if all_spans else SPAN_LIMIT
    if len(runs) == 1:
        first, *others = run_sections(runs[0], limit=limit)
        heading, about = title or runs[0].title, headline(runs[0].data)
    else:
        first, *others = comparison_sections(*runs, limit=limit)
        heading = title or f"{runs[0].name} against {runs[1].name}"
        about = " · ".join(dict.fromkeys(f"{headline(run.data)}" for run in runs))
    write_page(path, title=heading, subtitle=about, sections=[first, *sections, *others])


def run_sections(run: Run, *, limit: int | None = SPAN_LIMIT) -> list[Section]:
    """Returns the sections of one run: what it came to, its figures, its settings.

    Of its timeline no more than `limit` spans are drawn (None: all).
    """
    figures = [_figure_section(name, [[run]], limit) for name in _of_one_run(run)]
    load = [] if run.requests is None else [_load(run)]
    return [_summary(run), *load, *figures, _settings(run)]


def comparison_sections(first: Run, second: Run, *, limit: int | None = SPAN_LIMIT) -> list[Section]:
    """Returns the sections of two runs side by side; `limit` as for `run_sections`.

    Raises PageError if both have the same name.
    """
    if first.name == second.name:
        raise PageError(f"both results are called {first.name}: give two different ones")
    data = compare({run.name: run.data for run in (first, second)})
    between = replace(_figure_section("waterfall", [[first, second]], limit), half=True)
    figures = [
        _figure_section(name, [[first, second]] if ALL_FIGURES[name].pairs else [[first], [second]], limit)
        for name in _of_one_run(first, second)
    ]
    return [_difference(data, first, second), _differing(data), _side_by_side(data, (first, second)), between, *figures]


def _of_one_run(*runs: Run) -> list[str]:
    """Returns the figures that have a section of their own; how busy the lanes were lies above the timeline."""
    of_load = [] if any(run.requests is None for run in runs) else list(REQUEST_FIGURES)
    if any(run.steps is None for run in runs):  # as an earlier version saved them
        of_load = [name for name in of_load if name != "concurrency"]
    return [*of_load, *(name for name, figure in FIGURES.items() if figure.runs == 1 and name != "busy")]


def _load(run: Run) -> Section:
    """What became of requests under load: their latencies, and what stood by."""
    data = run.data["requests"]
    html = html_table(LATENCY_COLUMNS, latency_rows(data)) + html_table(["", ""], load_rows(data))
    return Section(f"Latency of {data['counted']:,} of {data['requests']:,} requests, ms", html, name="load")


def _summary(run: Run) -> Section:
    """What the run came to: figures, how its accesses came out, what to know about it."""
    data = run.data
    stall = data["stall_ms"] / data["makespan_ms"]
    of_gpus = f", mean of {len(data['gpus'])} GPUs" if len(data["gpus"]) > 1 else ""
    rows = [
        *speed_rows(data),
        ("stalled", f"{stall:.1%}", f"{time_of(data['stall_ms'])} of {time_of(data['makespan_ms'])}{of_gpus}"),
    ]
    answer = f'<p class="answer">{escape(answer_of(data))}</p>'
    return Section("", answer + html_tiles(_folded(rows)) + _outcome_bar(data) + _notes(data), name="summary")


def _folded(rows: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Returns rows with those that have no name, which go on with the one before, as part of its note."""
    folded: list[tuple[str, str, str]] = []
    for name, value, note in rows:
        if name:
            folded.append((name, value, note))
        else:
            folded[-1] = (*folded[-1][:2], f"{folded[-1][2]}; {note}")
    return folded


def _outcome_bar(data: Mapping[str, Any]) -> str:
    counts, accesses = data["counts"], data["accesses"]
    shown = [(counts[outcome], *OUTCOME_COLORS[outcome]) for outcome in OUTCOMES if counts[outcome]]
    bar = "".join(f'<i style="flex:{count};background:{color}"></i>' for count, color, _ in shown)
    names = {f"{label} {count:,} ({count / accesses:.1%})": color for count, color, label in shown}
    return f'<section><h2>{accesses:,} accesses</h2><div class="split">{bar}</div>{_legend(names)}</section>'


def _notes(data: Mapping[str, Any]) -> str:
    """Returns the warnings and the estimates in use."""
    notes = [("warning", *warning.partition(":")[::2]) for warning in data["warnings"]]
    notes += [("note", f"estimated: {what}", f" {how}") for what, how in data["estimates"].items()]
    return "".join(f'<p class="{kind}"><b>{escape(name)}</b>:{escape(rest)}</p>' for kind, name, rest in notes)


def _side_by_side(data: Mapping[str, Any], runs: Sequence[Run]) -> Section:
    """The figures of both runs, their ratio and whether that is better, and what to know about each."""
    rows = [
        (_name(name), *(comparison_figure(name, value) for value in values), _judged(name, data["ratios"][name][1]))
        for name, values in data["figures"].items()
    ]
    html = html_table(["", *data["runs"], "ratio"], rows)
    if not data["same_work"]:
        html += '<p class="warning"><b>These runs decode different numbers of tokens.</b></p>'
    by_notes: dict[str, list[str]] = {}
    for run in runs:
        by_notes.setdefault(_notes(run.data), []).append(run.name)
    for notes, names in by_notes.items():
        html += f"<h3>{escape(' and '.join(names))}</h3>{notes}" if notes else ""
    return Section("Side by side", html, half=True, name="summary")


def _difference(data: Mapping[str, Any], first: Run, second: Run) -> Section:
    """In words, which of two runs is faster and why; nothing of runs that are no comparison."""
    said = difference_of(first.data, second.data, (first.name, second.name)) if data["same_work"] else ""
    return Section("", f'<p class="answer">{escape(said)}</p>' if said else "", name="answer")


def _differing(data: Mapping[str, Any]) -> Section:
    """The settings in which two runs differ."""
    rows = [[key, *(str(value) for value in values)] for key, values in data["settings"].items()]
    html = html_table(["", *data["runs"]], rows) if rows else "<p>None: the same scenario twice.</p>"
    return Section("Settings that differ", html, name="settings")


def _judged(name: str, ratio: float | None) -> str | tuple[str, str]:
    """Returns the cell of a ratio, which says in a word and a color whether it is for the better."""
    if ratio is None:
        return "-"
    change = (ratio - 1) * _BETTER.get(name, 0)
    if abs(change) < _SAME:
        return f"{ratio:.2f}x"
    return (f"{ratio:.2f}x better", "good") if change > 0 else (f"{ratio:.2f}x worse", "bad")


def _name(key: str) -> str:
    """Returns what a figure of the comparison is called: its key in words."""
    return key.removesuffix("_ms").replace("_ms.", " ").replace(".", ": ").replace("_", " ")


def _figure_section(name: str, groups: Sequence[Sequence[Run]], limit: int | None) -> Section:
    """Returns the section of a figure, drawn of each group of runs, on the same axes; its legend is common to all."""
    drawing, figure = _figures_html(), ALL_FIGURES[name]
    data = [figure_data(name, group) for group in groups]
    plots = [drawing.draw_html(each, limit=limit) for each in data]
    for other in plots[1:]:
        drawing.link(plots[0], other)
    captions = [group[0].name for group in groups] if len(groups) > 1 else [""]
    names = dict(entry for each in data for entry in drawing.legend(each))
    controls = _legend(names)
    if name == "timeline":
        plots = [drawing.with_overview(busy_over_time(run), plot) for (run,), plot in zip(groups, plots, strict=True)]
        captions = [_part_drawn(caption, run, limit) for caption, (run,) in zip(captions, groups, strict=True)]
        controls = _controls(names) + _legend(dict(drawing.legend(busy_over_time(groups[0][0]))), "The strip on top:")
    return Section(
        figure.title,
        f'<p class="reading">{escape(figure.reading)}</p>{controls}',
        dict(zip(captions, plots, strict=True)),
        half=name in _HALF and len(groups) == 1,
        stacked=name in _STACKED,
        name=name,
    )


def _part_drawn(caption: str, run: Run, limit: int | None) -> str:
    """Returns the caption of a timeline: how many of its spans are there."""
    total, said = len(run.timeline), f"{caption}: " if caption else ""
    if limit is None or total <= limit:
        return f"{said}{total:,} spans"
    return f"{said}{limit:,} of {total:,} spans, around the middle of the run (--all-spans draws all)"


def _controls(names: Mapping[str, str]) -> str:
    """Returns the buttons above a timeline: where to look, and which kinds to show."""
    buttons = "".join(
        f'<button data-action="{action}">{label}</button>'
        for action, label in (
            ("first", "Two steps"),
            ("whole", "Everything"),
            ("closer", "Zoom in"),
            ("farther", "Zoom out"),
        )
    )
    keys = (
        "<span>Scroll to zoom, drag to move, or <kbd>W</kbd> <kbd>S</kbd> <kbd>A</kbd> <kbd>D</kbd>; "
        "drag across the strip to choose a part; click a name to hide it.</span>"
    )
    kinds = "".join(
        f'<button data-kind="{escape(label)}" aria-pressed="true">{_swatch(color)}{escape(label)}</button>'
        for label, color in names.items()
    )
    return f'<div class="controls">{buttons}{keys}</div><div class="legend">{kinds}</div>'


def _legend(names: Mapping[str, str], of: str = "") -> str:
    entries = f"<span>{of}</span>" if of else ""
    entries += "".join(f"<span>{_swatch(color)}{escape(label)}</span>" for label, color in names.items())
    return f'<div class="legend">{entries}</div>' if names else ""


def _swatch(color: str) -> str:
    return f'<i style="background:{color}"></i>'


def _settings(run: Run) -> Section:
    """Everything that makes the run again, folded away."""
    lines = {**flat(run.data["scenario"]), **flat({"versions": run.data["versions"]})}
    rows = "".join(
        f'<tr><td>{escape(key)}</td><td class="left">{escape(str(value))}</td></tr>'
        for key, value in lines.items()
        if value is not None
    )
    html = f'<details><summary>Settings and versions</summary><div class="scroll"><table>{rows}</table></div></details>'
    return Section("", f"<section>{html}</section>", name="settings")


def _figures_html() -> Any:
    """Returns the module that draws with Bokeh. Raises PageError, saying how to get it, where there is none."""
    try:
        from . import figures_html
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "bokeh":
            raise
        raise PageError("a report needs Bokeh, which is not installed: pip install 'bokeh>=3.9'") from None
    return figures_html
