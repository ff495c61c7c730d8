"""The figures of a run on a page: `figure_html` makes one by name with Bokeh, with numbers under the pointer.

Every form of data has one function here; what it draws, and in which colors, is `figures`' to say. Text, axes and
backgrounds have no colors of their own: the page's style sheet (page.css) sets them, for light and for dark.
Times are ms from the start of the run in 64 bits: what is drawn is placed on the screen before it becomes 32-bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from importlib import resources
from itertools import cycle, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from bokeh.layouts import column
from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    CustomJS,
    CustomJSHover,
    FixedTicker,
    HoverTool,
    LinearColorMapper,
    NumeralTickFormatter,
    PanTool,
    Range1d,
    RangeTool,
    Span,
    WheelZoomTool,
)
from bokeh.palettes import Cividis256
from bokeh.plotting import figure

from ..resources.timeline import KINDS
from .figure_forms import Bars, Curves, Data, Fall, Grid, Memory, Rows, Spans
from .figures import LABELED, SPAN_LIMIT, figure_data
from .palette import COLORS, DARK_INK, LIGHT_INK, LIMIT_COLOR, SERIES_COLORS, ink_on
from .pictures import bytes_unit, row_names, used_lanes
from .saved import Run
from .span_names import layer_of_each

Array = npt.NDArray[Any]

#: Names of more letters than this are written aslant under the bars of a waterfall, so that they do not meet.
_LONG_NAME = 9
#: Up to so many columns have a name each, and those of a heat map their number in them.
_FEW_COLUMNS = 24
#: Room for a character of lanes' names, and beside them, so that what lies above a timeline lines up with it.
_LANE_PIXELS, _BESIDE_PIXELS = 7, 26
#: Seen on light and on dark.
_GRAY = "#888888"
#: Ends of so many steps are marked.
_MOST_STEPS = 5_000
#: No closer than this can be zoomed in: ms.
_CLOSEST_MS = 0.0005


def figure_html(name: str, runs: Sequence[Run], *, limit: int | None = SPAN_LIMIT) -> Any:
    """Returns a figure of FIGURES by name, as wide as the page lets it; its legend is the page's to write.

    Of a timeline no more than `limit` spans are drawn (None: all), those around what is looked at first.
    Raises FigureError for an unknown name and the wrong number of runs.
    """
    return draw_html(figure_data(name, runs), limit=limit)


def draw_html(data: Data, *, limit: int | None = SPAN_LIMIT) -> Any:
    """Returns the data of a figure as a Bokeh plot."""
    if isinstance(data, Spans):
        return _spans(data, limit)
    return DRAW[type(data)](data)


def legend(data: Data) -> list[tuple[str, str]]:
    """Returns (label, color) of what a figure shows in several colors."""
    if isinstance(data, Bars):
        return [(part.label, f"{part.color}{round(255 * part.alpha):02x}") for part in data.parts]
    if isinstance(data, Rows):
        return [(part.label, part.color) for part in data.parts]
    if isinstance(data, Curves) and len(data.curves) > 1:
        return [(curve.label, curve.color) for curve in data.curves]
    if isinstance(data, Memory) and len(data.gpus) > 1:
        return list(zip(data.gpus, cycle(SERIES_COLORS), strict=False))
    if isinstance(data, Spans):
        kinds = np.unique(data.timeline.spans()["kind"])
        return [(label, color) for kind, (color, label) in COLORS.items() if KINDS.index(kind) in kinds]
    return []


def link(first: Any, second: Any) -> None:
    """Give two plots of one kind the same axes, as far as these are of numbers, so that they compare at a glance."""
    for axis in ("x_range", "y_range"):
        mine, other = getattr(first, axis), getattr(second, axis)
        if "fixed" not in mine.tags and _unit_of(first, axis) == _unit_of(second, axis):
            mine.start, mine.end = min(mine.start, other.start), max(mine.end, other.end)
            if mine.bounds is not None and other.bounds is not None:
                mine.bounds = min(mine.bounds[0], other.bounds[0]), max(mine.bounds[1], other.bounds[1])
            for change, callbacks in other.js_property_callbacks.items():
                mine.js_on_change(change, *callbacks)
            setattr(second, axis, mine)


def _unit_of(plot: Any, axis: str) -> str | None:
    """Returns what an axis is of, without the marks in the second line of its label."""
    said: str | None = (plot.xaxis if axis == "x_range" else plot.yaxis)[0].axis_label
    return said and said.partition("\n")[0]


def _plot(height: int, x: tuple[float, float], y: tuple[float, float], *, named: bool = False, **options: Any) -> Any:
    """Returns an empty plot, whose columns may be `named`; a range that ends before it starts runs downwards."""
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        x_range=Range1d(*x),
        y_range=Range1d(*y),
        toolbar_location=None,
        **{"tools": "", "min_border_right": 14, **options},
    )
    plot.background_fill_color = plot.border_fill_color = plot.outline_line_color = None
    for axis in (*plot.xaxis, *plot.yaxis):
        axis.major_tick_line_color = axis.minor_tick_line_color = None
        axis.formatter = NumeralTickFormatter(format="0,0.[000000]")
        axis.axis_line_color, axis.axis_line_alpha = _GRAY, 0.6
        axis.axis_label_text_font_style, axis.axis_label_text_font_size = "normal", "12px"
        axis.major_label_text_font_size = "11.5px"
    plot.ygrid.grid_line_color = plot.xgrid.grid_line_color = None
    plot.ygrid.grid_line_alpha = plot.xgrid.grid_line_alpha = 0.22
    if not named:
        _fewer_ticks(plot)
    return plot


#: Fewer ticks where a plot is narrow: of named places every so manieth, of numbers as many as have room.
_TICKS_JS = """
const width = plot.inner_width;
for (const axis of plot.below) {
  if (places.length) {
    const every = Math.max(1, Math.ceil(places.length * room / width));
    axis.ticker.ticks = places.filter((_, number) => number % every == 0);
  } else if (axis.ticker.desired_num_ticks)
    axis.ticker.desired_num_ticks = Math.max(2, Math.min(8, Math.floor(width / 70)));
}
"""
#: A name of up to three digits, in pixels, and of each character beyond.
_NAME_PIXELS, _CHARACTER_PIXELS = 26, 8


def _fewer_ticks(plot: Any, names: Sequence[str] = ()) -> None:
    """Write as many ticks below a plot as it is wide enough for, whenever that changes; `names` stand at 0, 1, 2 …"""
    room = max([_NAME_PIXELS, *(_CHARACTER_PIXELS * len(name) for name in names)])
    arguments = {"plot": plot, "places": list(range(len(names))), "room": room}
    plot.js_on_change("inner_width", CustomJS(args=arguments, code=_TICKS_JS))


def _where_there_is_room(plot: Any, drawn: Any, pixels: int) -> None:
    """Draw this only where the plot is at least so wide."""
    code = "drawn.visible = plot.inner_width >= pixels"
    plot.js_on_change("inner_width", CustomJS(args={"plot": plot, "drawn": drawn, "pixels": pixels}, code=code))


def _name_places(axis: Any, names: Sequence[str], every: int = 1) -> None:
    """Write `every` so manieth of the names, which stand at 0, 1, 2 … along an axis."""
    places = list(range(0, len(names), every))
    axis.ticker = FixedTicker(ticks=places)
    axis.major_label_overrides = {place: names[place] for place in places}


def _name_columns(plot: Any, names: Sequence[str]) -> None:
    """Write names below columns, at first about _FEW_COLUMNS of them, then as many as there is room for."""
    every = max(1, -(-len(names) // _FEW_COLUMNS))
    _name_places(plot.xaxis, names)
    plot.xaxis.ticker.ticks = list(range(0, len(names), every))
    _fewer_ticks(plot, names)


def _tip(plot: Any, renderers: Sequence[Any], text: str, **options: Any) -> None:
    """Show this HTML, in which @name is a column, for what is under the pointer."""
    plot.add_tools(HoverTool(renderers=list(renderers), tooltips=f"<div>{text}</div>", show_arrow=False, **options))


def _bars(data: Bars) -> Any:
    count = len(data.rows)
    places, stacked = np.arange(count, dtype=float), np.zeros(count)
    total = np.sum([part.values for part in data.parts], axis=0) if data.parts else stacked
    most = float(total.max(initial=0)) or 1.0
    names = [row if data.across else f"layer {row}" for row in data.rows]
    if data.across:
        plot = _plot(66 + 38 * count, (0, most * 1.01), (count - 0.45, -0.55))
        _name_places(plot.yaxis, data.rows)
        plot.xaxis.axis_label, plot.yaxis.axis_line_color = data.axis, None
        plot.xgrid.grid_line_color = _GRAY
        plot.y_range.tags = ["fixed"]
    else:
        plot = _plot(260, (-0.6, count - 0.4), (0, most * 1.05), named=True)
        _name_columns(plot, data.rows)
        plot.xaxis.axis_label, plot.yaxis.axis_label = "layer", data.axis
        plot.ygrid.grid_line_color = _GRAY
    for part in data.parts:
        says = [
            f"{value:,.3f} {data.unit} ({value / max(whole, 1e-300):.1%})"
            for value, whole in zip(part.values.tolist(), total.tolist(), strict=True)
        ]
        ends = {"from": stacked, "to": stacked + part.values}
        source = ColumnDataSource({"place": places, **ends, "name": names, "says": says})
        look = {"fill_color": part.color, "fill_alpha": part.alpha, "line_color": None, "source": source}
        if data.across:
            drawn = plot.hbar(y="place", left="from", right="to", height=0.7, **look)
        else:
            drawn = plot.vbar(x="place", bottom="from", top="to", width=0.8, **look)
        _tip(plot, [drawn], f"@name<br><b>{part.label}</b><br>@says")
        stacked = stacked + part.values
    if data.across:
        _write_shares(plot, data, total)
    if not data.parts:
        _say(plot, (count - 1) / 2, 0.5, "nothing to show")
    return plot


def _say(plot: Any, x: float, y: float, text: str) -> None:
    source = ColumnDataSource({"x": [x], "y": [y], "text": [text]})
    plot.text(x="x", y="y", text="text", text_color=_GRAY, text_align="center", text_font_size="13px", source=source)


def _write_shares(plot: Any, data: Bars, total: Array) -> None:
    """Write the share of its row into each bar that is wide enough."""
    stacked = np.zeros(len(data.rows))
    for part in data.parts:
        shares = part.values / np.maximum(total, 1e-300)
        wide = np.flatnonzero((part.values > LABELED * total.max()) & (part.alpha == 1))
        columns = {"x": (stacked + part.values / 2)[wide], "y": wide, "says": [f"{shares[at]:.1%}" for at in wide]}
        numbers = plot.text(
            x="x", y="y", text="says", text_color=ink_on(part.color), text_font_size="11.5px", text_align="center",
            text_baseline="middle", source=ColumnDataSource(columns),
        )  # fmt: skip
        narrowest = float((part.values[wide] / total.max()).min()) if len(wide) else 1.0
        _where_there_is_room(plot, numbers, round(44 / narrowest))
        stacked = stacked + part.values


def _grid(data: Grid) -> Any:
    rows, columns = data.shares.shape
    plot = _plot(84 + 34 * rows, (-0.5, columns - 0.5), (rows - 0.5, -0.5), named=True)
    _name_places(plot.yaxis, data.rows)
    _name_columns(plot, data.columns)
    plot.xaxis.axis_label = data.across
    plot.xaxis.axis_line_color = plot.yaxis.axis_line_color = None
    plot.x_range.tags = plot.y_range.tags = ["fixed"]
    down, along = (each.ravel() for each in np.indices(data.shares.shape))
    shares = data.shares.ravel()
    source = ColumnDataSource(
        {
            "row": down,
            "column": along,
            "share": data.shades.ravel(),
            "says": ["" if share != share else f"{share:.0%}" for share in shares.tolist()],
            "name": [f"{data.across} {name}: {kind}" for kind in data.rows for name in data.columns],
            "count": [
                f"{count:,} ({share:.1%})" if share == share else "none"
                for count, share in zip(data.counts.ravel().tolist(), shares.tolist(), strict=True)
            ],
            "ink": [DARK_INK if shade > 0.55 else LIGHT_INK for shade in data.shades.ravel().tolist()],
        }
    )
    mapper = LinearColorMapper(palette=Cividis256, low=0, high=1, nan_color="rgba(0,0,0,0)")
    cells = plot.rect(
        x="column", y="row", width=0.98, height=0.94, source=source, line_color=None,
        fill_color={"field": "share", "transform": mapper},
    )  # fmt: skip
    if columns <= _FEW_COLUMNS:
        numbers = plot.text(
            x="column", y="row", text="says", text_color="ink", text_font_size="11px", text_align="center",
            text_baseline="middle", source=source,
        )  # fmt: skip
        _where_there_is_room(plot, numbers, 26 * columns)
    _tip(plot, [cells], f"@name<br><b>@count</b> {escape(data.axis)}")
    return plot


def _memory(data: Memory) -> Any:
    """One plot for all GPUs: a line each, and the limits dashed."""
    last_ms = max(float(time_ns[-1]) for time_ns, *_ in data.gpus.values()) / 1e6
    most = max(int(max(sizes.max(), limits.max())) for _, sizes, limits in data.gpus.values())
    scale, unit = bytes_unit(most)
    plot = _plot(260, (0, last_ms), (0, 1.12 * most / scale))
    plot.xaxis.axis_label, plot.yaxis.axis_label = "time since the start (ms)", f"expert memory ({unit})"
    plot.ygrid.grid_line_color = _GRAY
    for (name, (time_ns, sizes, limits)), color in zip(data.gpus.items(), cycle(SERIES_COLORS), strict=False):
        says = [
            f"{size / scale:,.3f} of {limit / scale:,.3f} {unit}" for size, limit in zip(sizes, limits, strict=True)
        ]
        columns = {"ms": time_ns / 1e6, "size": sizes / scale, "limit": limits / scale, "says": says}
        source = ColumnDataSource(columns)
        if len(data.gpus) == 1:
            plot.varea_step(x="ms", y1=0, y2="size", step_mode="after", fill_color=color, fill_alpha=0.2, source=source)
        line = plot.step(x="ms", y="size", mode="after", line_color=color, line_width=2, source=source)
        plot.step(
            x="ms", y="limit", mode="after", line_color=LIMIT_COLOR, line_width=2, line_dash=[6, 4], source=source
        )
        _tip(plot, [line], f"{escape(name)}, @ms{{0,0.000}} ms<br><b>@says</b>", mode="vline", line_policy="prev")
    return plot


def _curves(data: Curves) -> Any:
    most = max((float(curve.x[-1]) for curve in data.curves), default=1.0) or 1.0
    plot = _plot(260, (0, 1.02 * most), (0, 1.03))
    plot.xaxis.axis_label, plot.yaxis.axis_label = data.x_words, data.y_axis
    plot.yaxis.formatter = NumeralTickFormatter(format="0%")
    plot.ygrid.grid_line_color = _GRAY
    lines = []
    for curve in data.curves:
        source = ColumnDataSource({"x": curve.x, "y": curve.y})
        look = {"line_color": curve.color, "line_width": 2, "source": source, "name": curve.label}
        lines.append(plot.step(x="x", y="y", mode="after", **look))
    text = f"<b>$name</b><br>@x{{0,0.000}} {data.unit}: @y{{0.0%}} {escape(data.y_axis.removeprefix('share '))}"
    _tip(plot, lines, text, line_policy="nearest")
    for at in data.marks.values():
        plot.add_layout(Span(location=at, dimension="height", line_color=_GRAY, line_dash=[4, 4]))
    return plot


def _rows(data: Rows) -> Any:
    first = min((float(part.from_ms.min()) for part in data.parts), default=0.0)
    last = max((float(part.to_ms.max()) for part in data.parts), default=1.0)
    plot = _plot(80 + min(520, 16 * len(data.names)), (first, last), (len(data.names) - 0.5, -0.5))
    _name_places(plot.yaxis, data.names, max(1, -(-len(data.names) // _FEW_COLUMNS)))
    plot.xaxis.axis_label, plot.yaxis.axis_line_color = "time since the start (ms)", None
    plot.xgrid.grid_line_color, plot.y_range.tags = _GRAY, ["fixed"]
    for part in data.parts:
        columns = {"row": part.row, "from": part.from_ms, "to": part.to_ms, "took": part.to_ms - part.from_ms}
        source = ColumnDataSource({**columns, "name": [data.names[row] for row in part.row.tolist()]})
        look = {"fill_color": part.color, "line_color": None, "source": source}
        drawn = plot.hbar(y="row", left="from", right="to", height=0.8, **look)
        _tip(plot, [drawn], f"@name<br><b>{part.label}</b><br>@took{{0,0.000}} ms from @from{{0,0.000}} ms")
    return plot


def _fall(data: Fall) -> Any:
    names = [data.first, *(step.name for step in data.steps[1:-1]), data.second]
    starts = np.array([step.start_ns for step in data.steps]) / 1e6
    ends = np.array([step.end_ns for step in data.steps]) / 1e6
    spread, lowest = float(np.ptp(ends)) or float(ends.max()), data.lowest_ms
    plot = _plot(440, (-0.6, len(names) - 0.4), (lowest, float(ends.max()) + 0.3 * spread))
    _name_places(plot.xaxis, names)
    if max(map(len, names)) > _LONG_NAME:
        plot.xaxis.major_label_orientation = 0.6
    plot.yaxis.axis_label = "makespan (ms)" if lowest == 0 else "makespan (ms), not from 0"
    plot.ygrid.grid_line_color = _GRAY
    whole = np.isin(np.arange(len(names)), (0, len(names) - 1))
    colors = np.where(whole, COLORS["dense"][0], np.where(ends > starts, COLORS["demand"][0], COLORS["head"][0]))
    says = [
        f"{end - start:{',' if alone else '+,'}.3f}"
        for start, end, alone in zip(starts.tolist(), ends.tolist(), whole.tolist(), strict=True)
    ]
    low, high = np.where(whole, lowest, np.minimum(starts, ends)), np.maximum(starts, ends)
    places = {"place": np.arange(len(names)), "low": low, "high": high}
    source = ColumnDataSource({**places, "color": colors.tolist(), "name": names, "says": says})
    bars = plot.vbar(
        x="place", bottom="low", top="high", width=0.7, fill_color="color", line_color="color", source=source
    )
    plot.text(
        x="place", y="high", text="says", text_align="center", text_baseline="bottom", y_offset=-4,
        text_font_size="11px", text_color=_GRAY, source=source,
    )  # fmt: skip
    _tip(plot, [bars], "@name<br><b>@says ms</b>")
    return plot


def _spans(data: Spans, limit: int | None) -> Any:
    """Every span as a bar on the row of its lane, one renderer for each kind, named after it.

    The page holds all spans, and draws those that can be seen: timeline.js tells how.
    """
    lanes = used_lanes(data.timeline)
    spans = _around(data, limit)
    plot = _plot(
        60 + 44 * len(lanes),
        (data.start_ns / 1e6, data.end_ns / 1e6),
        (len(lanes) - 0.5, -0.5),
        min_border_left=_BESIDE_PIXELS + _LANE_PIXELS * max(map(len, row_names(data.timeline, lanes)), default=0),
    )
    whole = len(spans) == len(data.timeline)
    first_ms = 0.0 if whole else int(spans["start_ns"].min()) / 1e6
    bounds = (first_ms, int(spans["end_ns"].max(initial=0)) / 1e6)
    plot.x_range.update(bounds=bounds, min_interval=_CLOSEST_MS, tags=["timeline"])
    plot.y_range.tags = ["fixed"]
    _name_places(plot.yaxis, row_names(data.timeline, lanes))
    plot.yaxis.axis_line_color = None
    plot.xaxis.axis_label = "time since the start (ms)"
    plot.xaxis.ticker, plot.xgrid.grid_line_color = BasicTicker(desired_num_ticks=8), _GRAY
    _draw_spans(plot, spans, lanes, data)
    ends_ms = data.step_ends_ns[:_MOST_STEPS] / 1e6
    rows = {"x": ends_ms, "y0": np.full(len(ends_ms), -0.5), "y1": np.full(len(ends_ms), len(lanes) - 0.5)}
    plot.segment(
        x0="x", x1="x", y0="y0", y1="y1", line_color=_GRAY, line_dash=[1, 3], name="steps",
        source=ColumnDataSource(rows),
    )  # fmt: skip
    zoom = WheelZoomTool(dimensions="width")
    plot.add_tools(zoom, PanTool(dimensions="width"))
    plot.toolbar.active_scroll = zoom
    return plot


def _draw_spans(plot: Any, spans: Array, lanes: Sequence[int], data: Spans) -> None:
    """Add all spans to a plot, and for each kind of them a renderer, named after it, of those that can be seen."""
    row_of = np.zeros(len(data.timeline.lanes), dtype=np.int64)
    row_of[lanes] = np.arange(len(lanes))
    rows = row_of[spans["lane"]]
    order = np.lexsort((spans["start_ns"], rows, spans["kind"]))
    spans, rows = spans[order], rows[order]
    columns: dict[str, Array] = {
        "from": spans["start_ns"] / 1e6,
        "to": spans["end_ns"] / 1e6,
        "layer": layer_of_each(spans, data.experts_per_layer, data.layers).astype(np.int16),
        "expert": np.where(spans["expert"] >= 0, spans["expert"] % data.experts_per_layer, -1).astype(np.int16),
    }
    present = [kind for kind in COLORS if (spans["kind"] == KINDS.index(kind)).any()]
    firsts = np.flatnonzero(np.diff(spans["kind"].astype(np.int64) * len(lanes) + rows, prepend=-1)).tolist()
    groups = [
        [present.index(KINDS[spans["kind"][first]]), int(rows[first]), first, end]
        for first, end in pairwise([*firsts, len(spans)])
    ]
    seen = (spans["end_ns"] > data.start_ns) & (spans["start_ns"] < data.end_ns)
    shown = []
    for kind in present:
        here = seen & (spans["kind"] == KINDS.index(kind))
        alone = np.ones(int(here.sum()))
        first = {name: values[here] for name, values in columns.items()}
        source = ColumnDataSource({**first, "row": rows[here], "alpha": alone, "count": alone})
        color, label = COLORS[kind]
        drawn = plot.hbar(
            y="row", left="from", right="to", height=0.72, fill_color=color, fill_alpha="alpha", line_color=None,
            source=source, name=label,
        )  # fmt: skip
        drawn.tags = ["span"]
        _tip_of_spans(plot, drawn, source, label)
        shown.append(source)
    script = (resources.files(__package__) / "timeline.js").read_text(encoding="utf-8")
    arguments = {"plot": plot, "all": ColumnDataSource(columns), "groups": groups, "shown": shown}
    for end in ("start", "end"):
        plot.x_range.js_on_change(end, CustomJS(args=arguments, code=script))


def with_overview(busy: Curves, timeline: Any) -> Any:
    """Returns a timeline below how busy the whole run was, where the part that it shows is marked and draggable."""
    plot = _curves(busy)
    plot.x_range.end = max((float(curve.x[-1]) for curve in busy.curves), default=1.0) or 1.0
    plot.update(height=84, min_border_left=timeline.min_border_left, name="overview")
    plot.xaxis.axis_label = plot.yaxis.axis_label = None
    plot.yaxis.ticker = FixedTicker(ticks=[0, 1])
    tool = RangeTool(x_range=timeline.x_range, start_gesture="pan")
    tool.overlay.update(fill_color=LIMIT_COLOR, fill_alpha=0.25, line_color=LIMIT_COLOR, line_dash=[], line_alpha=0.9)
    plot.add_tools(tool)
    return column(plot, timeline, sizing_mode="stretch_width", spacing=0)


def _around(data: Spans, limit: int | None) -> Array:
    """Returns the spans to draw: all, or as many as `limit` around the start of what is looked at first."""
    spans = data.timeline.spans()
    if limit is None or len(spans) <= limit:
        return spans
    spans = spans[np.argsort(spans["start_ns"], kind="stable")]
    middle = int(np.searchsorted(spans["start_ns"], (data.start_ns + data.end_ns) // 2))
    first = min(max(0, middle - limit // 2), len(spans) - limit)
    return spans[first : first + limit]


#: Writes a span's place in the model, and its time in a unit that fits.
_WHERE_JS = """
const {expert: experts, count} = source.data, expert = experts[special_vars.index];
if (count[special_vars.index] > 1) return count[special_vars.index] + " spans";
return value < 0 ? "" : "layer " + value + (expert < 0 ? "" : ", expert " + expert);
"""
_WHEN_JS = """
const took = source.data.to[special_vars.index] - value;
const says = took >= 1 ? took.toFixed(3) + " ms" : (took * 1000).toFixed(3) + " µs";
return (source.data.count[special_vars.index] > 1 ? "within " : "") + says + " from " + value.toFixed(6) + " ms";
"""


def _tip_of_spans(plot: Any, drawn: Any, source: Any, label: str) -> None:
    formatters = {
        "@layer": CustomJSHover(args={"source": source}, code=_WHERE_JS),
        "@from": CustomJSHover(args={"source": source}, code=_WHEN_JS),
    }
    _tip(plot, [drawn], f"<b>{label}</b> @layer{{custom}}<br>@from{{custom}}", formatters=formatters)


#: What draws each form; a timeline needs to know its limit besides.
DRAW: dict[type[Data], Callable[[Any], Any]] = {
    Bars: _bars, Grid: _grid, Memory: _memory, Curves: _curves, Rows: _rows, Fall: _fall,
}  # fmt: skip
