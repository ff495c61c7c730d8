"""A finished run in a notebook: its figures in a few lines, its tables as data frames, its pictures by name."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..engine.decide.memory_manager import COPY_REASONS
from ..engine.measure.recording import FATES, OUTCOMES
from ..errors import InputError
from ..resources.timeline import KINDS
from ..words import unknown_name
from .late import late_prefetches
from .tables.runs import headline, speed_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from .saved import Run


class Shown:
    """What a run shows of itself. Whoever inherits says how to get its figures and arrays (`_run`)."""

    @property
    def _figures(self) -> Mapping[str, Any]:
        """The run's figures, as result.json has them."""
        return self._run().data

    def _run(self) -> Run:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary()}>"

    def __str__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        """Returns the figures as a table, as Jupyter shows a value."""
        return table_html(headline(self._figures), speed_rows(self._figures), self._figures["warnings"])

    def summary(self) -> str:
        """Returns the figures that a user wants first, a line each, under what ran."""
        rows = speed_rows(self._figures)
        wide, value_wide = (max(len(row[column]) for row in rows) for column in (0, 1))
        lines = [f"{name:<{wide}}  {value:>{value_wide}}  {note}".rstrip() for name, value, note in rows]
        return "\n".join([headline(self._figures), *lines])

    def to_pandas(self, table: str = "tokens") -> DataFrame:
        """Returns a table of the run as a pandas DataFrame: one of FRAMES.

        Times are in ns, sizes in bytes; `tokens` has a row for each decode token, `accesses` for each expert that a
        layer visit asked for, `copies` for each copy to a GPU, `spans` for each span of the timeline, `layers` for
        each layer's counts, `memory` for each change of the expert memory, `late` for each prefetch that came
        late, with its why (`late.late_prefetches`). Raises InputError for another name, and
        without pandas.
        """
        if table not in FRAMES:
            raise InputError(unknown_name("table", table, FRAMES))
        return frame(FRAMES[table](self._run()))

    def plot(self, kind: str = "time", *others: Shown) -> Figure:
        """Draw a figure of `figures.FIGURES` with matplotlib; a waterfall takes another run. Raises FigureError."""
        from .figures_static import draw

        return draw(kind, [self._run(), *(other._run() for other in others)])


def frame(columns: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> DataFrame:
    """Returns columns, or rows, as a DataFrame. Raises InputError without pandas."""
    try:
        from pandas import DataFrame
    except ImportError:
        raise InputError("needs pandas; install the extra: pip install 'prestage[notebook]'") from None
    return DataFrame(columns if isinstance(columns, Mapping) else list(columns))


def table_html(title: str, rows: Iterable[tuple[str, ...]], notes: Iterable[str] = ()) -> str:
    """Returns a table with a title and notes as HTML without a style of its own."""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    said = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<p>{escape(title)}</p><table>{body}</table>{said}"


#: What LaTeX would take for a command.
_ESCAPED = str.maketrans({sign: f"\\{sign}" for sign in "&%$#_{}"} | {"\\": r"\textbackslash{}"})


def latex(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table as a LaTeX tabular: the first column to the left, the others to the right."""
    lines = [" & ".join(cell.translate(_ESCAPED) for cell in row) + r" \\" for row in (columns, *rows)]
    head, *body = lines
    whole = [rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}", r"\hline", head, r"\hline", *body, r"\hline"]
    return "\n".join([*whole, r"\end{tabular}", ""])


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a table as CSV; None is an empty cell."""
    stream = StringIO()
    csv.writer(stream, lineterminator="\n").writerows([columns, *rows])
    return stream.getvalue()


def _words(numbers: npt.NDArray[Any], words: Iterable[str], none: str = "") -> npt.NDArray[Any]:
    """Returns the word of each number (n,); of -1, `none`."""
    return np.array([*words, none], dtype=object)[numbers.astype(np.int64)]


def _columns(table: npt.NDArray[Any]) -> dict[str, Any]:
    return {name: table[name] for name in table.dtype.names or ()}


def _accesses(run: Run) -> dict[str, Any]:
    return {**_columns(run.accesses), "outcome": _words(run.accesses["outcome"], OUTCOMES)}


def _copies(run: Run) -> dict[str, Any]:
    named = {"reason": _words(run.copies["reason"], COPY_REASONS), "fate": _words(run.copies["fate"], FATES)}
    return {**_columns(run.copies), **named}


def _spans(run: Run) -> dict[str, Any]:
    spans, lanes = run.timeline.spans(), run.timeline.lanes
    named = {
        "device": _words(spans["lane"], [lane.device for lane in lanes]),
        "lane": _words(spans["lane"], [lane.title for lane in lanes]),
        "kind": _words(spans["kind"], KINDS),
    }
    return {**_columns(spans), **named}


def _memory(run: Run) -> dict[str, Any]:
    return {**_columns(run.memory), "gpu": _words(run.memory["gpu"], run.gpu_names)}


#: The tables of a run by name.
FRAMES: dict[str, Callable[[Run], Any]] = {
    "tokens": lambda run: _columns(run.tokens),
    "accesses": _accesses,
    "copies": _copies,
    "spans": _spans,
    "layers": lambda run: run.data["by_layer"],
    "memory": _memory,
    "late": lambda run: _columns(late_prefetches(run)),
}
