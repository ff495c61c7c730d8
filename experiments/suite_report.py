"""The report of a benchmark suite: suite.json, tables as Markdown, figures, and one page of all.

The sections are made once, as tables and pictures with their captions; Markdown and the page show the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from ..engine.measure.insights import InsightError
from ..files import replacing_folder, write_file
from ..output import markdown
from ..output.charts import plot_sweep
from ..output.pictures import save
from ..output.plots import plot_transfer
from ..output.tables.guide import GUIDE_FIGURES, figure_cells, figure_columns, guide_cells
from ..output.tables.layout import known_of
from ..output.tables.measured import TRANSFER_COLUMNS, transfer_cells
from ..output.tables.sweeps import BEST_COLUMNS, SWEEP_COLUMNS, best_cells, setting_words
from .suite import SPEED, Finished, Study, SuiteSweep, picture_name, transfer_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: How many rows of one sweep a table shows; the journal has all.
_MOST_ROWS = 40


@dataclass(frozen=True)
class Table:
    """Columns, and rows of as many cells, as text."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A figure under a file's name, without its ending, and what it shows."""

    name: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Lines:
    """Sentences, one below the other."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Part:
    """A heading, text, and what stands below it in this order; on the page, `folded` parts open when asked to."""

    title: str
    text: str
    blocks: Sequence[Table | Picture | Lines] = ()
    folded: bool = False


def write_suite(finished: Finished, out: Path) -> list[Path]:
    """Write suite.json, suite.md, figures/NAME.svg and report.html, all or none, into the suite's folder.

    Return their paths.
    """
    data, parts = finished.data, [*_parts(finished)]
    pictures = [block for part in parts for block in part.blocks if isinstance(block, Picture)]
    figures = [Path("figures") / f"{picture.name}.svg" for picture in pictures]
    with replacing_folder(out) as folder:
        write_file(folder / "suite.json", orjson.dumps(data, option=orjson.OPT_INDENT_2) + b"\n")
        (folder / "figures").mkdir()
        for picture, path in zip(pictures, figures, strict=True):
            save(picture.figure, folder / path)
        write_file(folder / "suite.md", _as_markdown(data, parts).encode())
        _write_page(data, parts, folder / "report.html")
    return [*(out / name for name in ("suite.json", "suite.md", "report.html")), *(out / path for path in figures)]


def _as_markdown(data: Mapping[str, Any], parts: Sequence[Part]) -> str:
    pieces = [f"# {data['title']}", _subtitle(data)]
    for part in parts:
        pieces += [f"## {part.title}", *([part.text] if part.text else [])]
        for block in part.blocks:
            if isinstance(block, Table):
                pieces.append(markdown.table(block.columns, block.rows))
            elif isinstance(block, Lines):
                pieces.append("\n".join(f"- {line}" for line in block.lines))
            else:
                pieces.append(f"![{block.caption}](figures/{block.name}.svg)")
    return "\n\n".join(pieces) + "\n"


def _write_page(data: Mapping[str, Any], parts: Sequence[Part], path: Path) -> None:
    from ..output.page import Section, write_page

    links = "".join(f'<li><a href="#part-{n}">{escape(part.title)}</a></li>' for n, part in enumerate(parts))
    sections = [Section("Contents", f'<ul class="contents">{links}</ul>', name="contents")]
    for number, part in enumerate(parts):
        html = _part_html(part)
        if part.folded:
            html = f"<details><summary>Its tables and pictures</summary>{html}</details>"
        sections.append(Section(part.title, html, name=f"part-{number}"))
    write_page(path, title=data["title"], subtitle=_subtitle(data), sections=sections)


def _part_html(part: Part) -> str:
    from ..output.page import html_picture, html_table

    pieces = [f"<p>{escape(part.text)}</p>"] if part.text else []
    for block in part.blocks:
        if isinstance(block, Table):
            pieces.append(html_table(block.columns, block.rows))
        elif isinstance(block, Lines):
            pieces.append(f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in block.lines)}</ul>")
        else:
            pieces.append(html_picture(block.figure, block.caption))
    return "\n".join(pieces)


def _subtitle(data: Mapping[str, Any]) -> str:
    runs = sum(study["choices"] for study in data["studies"])
    counted = [(len(data["transfers"]), "machine's copies", "machines' copies")]
    counted += [(len(data["published"]), "published table", "published tables"), (runs, "run", "runs")]
    what = ", ".join(f"{number:,} {one if number == 1 else many}" for number, one, many in counted if number)
    made = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    return f"{what}{', over fewer tokens (--quick)' if data['quick'] else ''}; {made}."


def _parts(finished: Finished) -> Iterator[Part]:
    data = finished.data
    yield Part("In short", "", [Lines([_in_short(study) for study in data["studies"]])])
    yield Part(
        "The best configurations",
        "For each metric, the best of all runs of a study. Runs that know the future are left out. Of equal runs, the "
        "one with the least memory is named. A study starts at its own scenario, and says what changed from there.",
        [Table(BEST_COLUMNS, [cells for study in data["studies"] for cells in best_cells(study)])],
    )
    yield Part("The words", "", [Table(("word", "what it means"), list(_WORDS.items()))], folded=True)
    for name, report in data["transfers"].items():
        picture = Picture(
            f"transfer-{transfer_name(name)}",
            f"Throughput of one copy by its size: {report['machine']}",
            plot_transfer(report),
        )
        blocks: list[Table | Picture | Lines] = [Table(TRANSFER_COLUMNS, [*transfer_cells(report)]), picture]
        yield Part(f"Transfers: {report['machine']}", "", blocks, folded=True)
    if data["published"]:
        yield Part(
            "Published tables, run again",
            "Ours is in the guide's accounting, prefetches hidden; charged has every copy charged; overlapped is one "
            "timeline. The verdict is on ours: inside the published range, or how far outside.",
            [_published_table(name, rows) for name, rows in data["published"].items()],
            folded=True,
        )
    for study, found in zip(finished.suite.studies, data["studies"], strict=True):
        yield _trade_offs(finished, study, found)
        for part in study.sweeps:
            yield _sweep_part(finished, study, part)


def _in_short(study: Mapping[str, Any]) -> str:
    """Returns what a study comes to, in sentences: the fastest setting, and what prefetching gains at most."""
    by_figure = {found["figure"]: found for found in study["best"]}
    said = f"{study['title']}."
    fastest = by_figure.get(SPEED)
    if fastest is not None and fastest["value"] is not None:
        gain = f", {fastest['value'] / fastest['start']:.2f} times what it starts with" if fastest["start"] else ""
        speed = f"{known_of(fastest['value'], 3)} tokens/s"
        said += (
            f" Fastest with {setting_words(fastest['settings'])}: {speed}{gain}." if fastest["settings"] else
            f" Nothing that was tried is faster than what it starts with, {speed}."
        )  # fmt: skip
    prefetching = by_figure.get("prefetch_speedup")
    if prefetching is not None and prefetching["value"] is not None:
        gain = prefetching["value"] - 1
        said += (
            f" Prefetching gains {gain:.1%} at most over the same cache without it." if gain > 0 else
            " Prefetching never gains over the same cache without it."
        )  # fmt: skip
    return said


#: The words of the tables, explained.
_WORDS = {
    "tokens/s": "decoded tokens of all sequences per second",
    "hit": "share of look-ups whose expert was in GPU memory when the router had chosen",
    "late": "share of look-ups whose expert was on its way",
    "memory": "mean share of the room for experts that was in use",
    "stall": "time in which the compute stream waited for an expert's bytes",
    "over no cache": "speed against the same run with no prefetch and every expert dropped after its use",
    "over same cache": "speed against the same cache without prefetch: what prefetching adds",
    "expert budget": "GPU memory that experts may take",
    "lookahead": "how many layers ahead experts are guessed and fetched",
    "recall": "share of the experts that are wanted which a predictor names",
}


def _published_table(name: str, rows: Sequence[dict[str, Any]]) -> Table:
    if name != "virtual-memory":
        columns = [name.replace("-", " "), *figure_columns(rows)[1:]]
        return Table(columns, [[row["name"], *figure_cells(row)] for row in rows])
    columns = ["virtual memory", "figure", "published", "ours", "shared by layers", "charged", "overlapped", "verdict"]
    return Table(columns, [[row["scenario"], f.name, *guide_cells(row, f)] for row in rows for f in GUIDE_FIGURES])


def _trade_offs(finished: Finished, study: Study, found: Mapping[str, Any]) -> Part:
    """Returns the front of speed against memory over all sweeps of a study, and what could not run."""
    front = [
        [f"{spot['memory'] / 2**30:.2f}", f"{spot['speed']:.1f}", setting_words(spot["settings"])]
        for spot in found["front"]
    ]
    blocks: list[Table | Picture | Lines] = [Table(("expert budget (GiB)", "tokens/s", "changed"), front)]
    caption = f"{study.title}: speed against memory, and the front of runs that none beats with less memory"
    rows = finished.of_study(study)
    blocks.append(Picture(picture_name(study, None), caption, plot_sweep("pareto", rows, figure=SPEED)))
    text = f"Scenario {study.scenario}, {found['choices']:,} runs to choose from. No run is faster with less memory."
    fastest = found["best"][0]
    text += f" The best by {fastest['name']} again, with its timeline: prestage run {fastest['row']} --out best."
    if found["errors"]:
        blocks.append(
            Table(("could not run", "why"), [[setting_words(e["settings"]), e["error"]] for e in found["errors"]])
        )
    return Part(f"{study.title}: trade-offs", text, blocks)


def _sweep_part(finished: Finished, study: Study, part: SuiteSweep) -> Part:
    rows = [row for row in finished.rows[study.name, part.name] if row["error"] is None]
    shown = [
        [
            *(str(row["settings"][key]) for key in part.grid),
            *(show(row.get(key)) for key, show in SWEEP_COLUMNS.values()),
        ]
        for row in rows[:_MOST_ROWS]
    ]
    blocks: list[Table | Picture | Lines] = [Table([*part.grid, *SWEEP_COLUMNS], shown)]
    for number, chart in enumerate(part.charts):
        name = picture_name(study, part, number)
        caption = f"{part.question}: {chart.figure}, {study.name}"
        try:
            figure = plot_sweep(chart.kind, rows, x=chart.x, by=chart.by, figure=chart.figure)
        except InsightError as error:
            raise InsightError(f"{study.name}, {part.name}: {error}") from None
        blocks.append(Picture(name, caption, figure))
    fixed = f"With {setting_words(part.settings)}. " if part.settings else ""
    cut = f"The first {_MOST_ROWS} of {len(rows):,} rows; " if len(rows) > _MOST_ROWS else ""
    return Part(
        f"{study.name}: {part.question}",
        f"{fixed}{cut}All figures: rows/{study.name}-{part.name}.jsonl.",
        blocks,
        folded=True,
    )
