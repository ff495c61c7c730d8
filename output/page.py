"""A page: one HTML file that needs no network, light and dark, made of Sections of HTML and of figures.

`report` puts one together from runs; others may from whatever they have. Bokeh is needed only where there are figures.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from ..errors import InputError
from ..files import check_file, write_file
from .pictures import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class PageError(InputError):
    """A page that cannot be written; the message says why, and what would be right."""


#: Of a cell with words in it.
_WORDS = ' class="words"'
#: Where a key may be broken.
_JOINT = re.compile(r"(?<=[a-z0-9])([._])(?=[a-z])")


@dataclass(frozen=True)
class Section:
    """A part of a page: a title, HTML, and a Bokeh layout below it, or several side by side by their captions.

    `half`: it shares a row with another; `stacked`: its layouts stand below one another; `name` is its id in the page,
    for links. A section without a title has no card around it.
    """

    title: str
    html: str = ""
    layout: Any = None
    half: bool = False
    stacked: bool = False
    name: str = ""


def write_page(path: Path, *, title: str, subtitle: str = "", sections: Sequence[Section]) -> None:
    """Write sections as one HTML file, whole or not at all. Raises PageError, and OSError if it cannot be written."""
    check_page(path)
    roots: dict[str, Any] = {}
    body = "\n".join(_section_html(section, roots) for section in sections)
    page = _PAGE.format(
        title=escape(title),
        subtitle=escape(subtitle),
        style=_file("page.css"),
        libraries=f"<script>{_bokeh()}</script>" if roots else "",
        body=body,
        figures=_document(roots),
        script=_file("page.js"),
    )
    write_file(path, page.encode())


def check_page(path: Path) -> None:
    """Raise PageError unless a page can be written under this name: asked before anything is read or drawn."""
    if path.suffix != ".html":
        raise PageError(f"{path}: a report's file must end in .html")
    check_file(path)


def html_table(header: Sequence[str], rows: Sequence[Sequence[str | tuple[str, str]]]) -> str:
    """Returns a table as HTML: the first column and columns of words to the left, numbers to the right.

    A cell may be (text, "good") or (text, "bad"), which gives it a color.
    """
    words = [all(_in_words(row[column]) for row in rows if column < len(row)) for column in range(len(header))]
    head = "".join(
        f"<th{_WORDS if word else ''}>{_breakable(name)}</th>" for name, word in zip(header, words, strict=True)
    )
    body = "".join("<tr>" + "".join(map(_cell, row, words)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _in_words(content: str | tuple[str, str]) -> bool:
    """Returns whether a cell is of words: a text that begins with a letter."""
    text = content if isinstance(content, str) else content[0]
    return text[:1].isalpha()


def _cell(content: str | tuple[str, str], word: bool) -> str:
    if isinstance(content, str):
        return f"<td{_WORDS if word else ''}>{_breakable(content)}</td>"
    text, kind = content
    return f'<td class="{kind}">{escape(text)}</td>'


def _breakable(text: str) -> str:
    """Returns a text as HTML whose keys (`memory.gpu_budget`) may go on in another line behind a dot or underscore."""
    return _JOINT.sub(r"\1<wbr>", escape(text))


def html_picture(picture: Figure, says: str) -> str:
    """Returns a matplotlib figure as HTML, the picture inside; `says` is for who cannot see it."""
    stream = io.BytesIO()
    render(picture, stream)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<div class="scroll"><img class="picture" alt="{escape(says)}" src="data:image/png;base64,{data}"></div>'


def html_tiles(rows: Sequence[tuple[str, str, str]]) -> str:
    """Returns (name, value, note) as tiles, the first of which stands out."""
    tiles = (
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(note)}</span></div>'
        for name, value, note in rows
    )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _section_html(section: Section, roots: dict[str, Any]) -> str:
    """Returns a section as HTML; its layouts go into `roots` by the id of the element that will hold them."""
    layouts = section.layout if isinstance(section.layout, dict) else {"": section.layout}
    places = []
    for caption, layout in layouts.items():
        if layout is not None:
            place = f"plot-{len(roots)}"
            roots[place] = layout
            heading = f"<h3>{escape(caption)}</h3>" if caption else ""
            places.append(f'<div>{heading}<div class="plot" id="{place}"></div></div>')
    plots = "".join(places) if section.stacked or len(places) == 1 else f'<div class="side">{"".join(places)}</div>'
    heading = f"<h2>{escape(section.title)}</h2>" if section.title else ""
    kind = "half" if section.half else "" if section.title else "bare"
    name = f' id="{escape(section.name)}"' if section.name else ""
    return f'<section class="{kind}"{name}>{heading}{section.html}{plots}</section>'


def _document(roots: Mapping[str, Any]) -> str:
    """Returns the Bokeh document of a page as JSON that may stand inside a script element: nothing in it opens tags."""
    if not roots:
        return "{}"
    from bokeh.document import Document

    document = Document()
    with document.models.freeze():  # otherwise it goes through all models again with every one
        for layout in roots.values():
            document.add_root(layout)
    places = {layout.id: place for place, layout in roots.items()}
    return orjson.dumps({"page": document.to_json(deferred=False), "roots": places}).decode().replace("<", "\\u003c")


def _bokeh() -> str:
    """Returns Bokeh's own script: its core draws all that is drawn here."""
    from bokeh.resources import Resources

    return "\n".join(Resources(mode="inline", components=["bokeh"], log_level="warn").js_raw)


def _file(name: str) -> str:
    """Returns a file that lies beside this one."""
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


# Its first script keeps a dark page from flashing white before the others are read.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<script>
document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
</script>
<style>
{style}</style>
</head>
<body>
<header><div>
<div><h1>{title}</h1><p>{subtitle}</p></div><button id="theme" type="button">Theme: auto</button>
</div></header>
<main>
{body}
</main>
{libraries}
<script type="application/json" id="figures">{figures}</script>
<script>
{script}</script>
</body>
</html>
"""
