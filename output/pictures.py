"""What pictures have in common: how they are written, their ink, units and rows."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..files import check_file, replacing
from ..resources.timeline import KINDS, Timeline
from .span_names import track_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]

_BYTE_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
INK = "#333333"
WIDTH_INCHES = 12.0
#: Metadata that would name a version or a date, by file format.
_NO_METADATA: dict[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    ".svg": {"Creator": None, "Date": None},
}


def at_changes(times_ns: Array, sizes: Array, limits: Array) -> tuple[Array, Array, Array]:
    """Returns those of the samples, each (samples,), at which a value changes, and the last: all that show."""
    if not len(times_ns):
        return times_ns, sizes, limits
    kept = np.append(True, (sizes[1:] != sizes[:-1]) | (limits[1:] != limits[:-1]))
    kept[-1] = True
    return times_ns[kept], sizes[kept], limits[kept]


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as .png, .pdf or .svg, whole or not at all; the same figure gives the same bytes.

    Raises ValueError for another ending.
    """
    path = Path(path)
    check_picture(path)
    with replacing(path) as stream:
        render(figure, stream, path.suffix)


def render(figure: Figure, stream: BinaryIO, ending: str = ".png") -> None:
    """Write a figure to a stream as what this ending says; the same figure gives the same bytes.

    Names are drawn as they are: a `$` in one begins no formula, and a character that the font lacks is a box.
    """
    from matplotlib import rc_context
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatter

    axes = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    powers = [axis for axis in axes if isinstance(axis.get_major_formatter(), LogFormatter)]
    ticks = [tick for axis in powers for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())]
    formulas = {id(label) for tick in ticks for label in tick.findobj(Text)}
    for text in figure.findobj(Text):
        if id(text) not in formulas and isinstance(text, Text):
            text.set_parse_math(False)
    with rc_context({"svg.hashsalt": "prestage"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(stream, format=ending[1:], dpi=150, metadata=_NO_METADATA[ending])


def check_picture(path: Path) -> None:
    """Raise ValueError unless a picture can be written under this name: asked before anything runs."""
    if path.suffix not in _NO_METADATA:
        raise InputError(f"{path}: a picture's file must end in one of {', '.join(_NO_METADATA)}")
    check_file(path)


def used_lanes(timeline: Timeline) -> list[int]:
    """Returns the numbers of the lanes that have a span, in the order in which they are shown."""
    used = set(np.unique(timeline.spans()["lane"]).tolist())
    return [number for number in track_order(timeline) if number in used]


def step_ends_ns(timeline: Timeline) -> Array:
    """Returns when each step ended (steps,), in order: with its last head kernel."""
    spans = timeline.spans()
    ends: Array = np.unique(spans["end_ns"][spans["kind"] == KINDS.index("head")])
    return ends


def row_names(timeline: Timeline, rows: list[int]) -> list[str]:
    """Returns the titles of the lanes, with their device where there are several GPUs."""
    lanes = [timeline.lanes[number] for number in rows]
    several = len({lane.device for lane in timeline.lanes} - {"host"}) > 1
    return [f"{lane.device}: {lane.title}" if several and lane.device != "host" else lane.title for lane in lanes]


def few_digits(number: float) -> str:
    """Returns a number as a label says it: four digits of it, or all before the point."""
    return f"{number:,.4g}" if abs(number) < 1000 else f"{number:,.0f}"


def bytes_unit(most: int) -> tuple[int, str]:
    """Returns the bytes of the unit in which to show numbers of up to `most` bytes, and its name."""
    return next((scale, name) for scale, name in _BYTE_UNITS if max(most, 1) >= scale)


def set_title(axes: Axes, title: str | None) -> None:
    """Write a title over the left end of the axes, if there is one."""
    if title:
        axes.set_title(title, loc="left", fontsize=11, color=INK)


def style_axes(axes: Axes) -> None:
    """Plain numbers with thousands separators, no box, the grid behind the data."""
    from matplotlib.ticker import FuncFormatter

    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value, 6):,.10g}"))
    axes.yaxis.label.set_color(INK)
    axes.xaxis.label.set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#999999")
