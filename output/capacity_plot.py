"""The picture of a search for capacity: latency against load, with the promise and the rate at which it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .palette import COLORS, LIMIT_COLOR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The latencies that are drawn, each by itself, with what is promised of it.
_DRAWN = {"ttft_ms": "first token", "itl_ms": "between tokens", "e2e_ms": "end to end"}


def plot_capacity(data: Mapping[str, Any]) -> Figure:
    """Draw what `serving_capacity` found: p50, p95 and p99 of latencies over the rate of requests."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(10.0, 3.6), layout="constrained")
    for axes, (key, name) in zip(picture.subplots(1, len(_DRAWN)), _DRAWN.items(), strict=True):
        _draw(axes, data, key, name)
    handles, labels = picture.axes[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    return picture


def _draw(axes: Axes, data: Mapping[str, Any], key: str, name: str) -> None:
    for part, kind in (("p50", "expert"), ("p95", "dense"), ("p99", "demand")):
        known = [(point["rate"], point[key][part]) for point in data["curve"] if point[key][part] is not None]
        rates, ms = [rate for rate, _ in known], [value for _, value in known]
        axes.plot(rates, ms, "o-", color=COLORS[kind][0], markersize=3, label=part)
    if data["rate"] is not None:
        axes.axvline(data["rate"], color="#777777", linewidth=0.9, linestyle="--", label="met up to here")
    if key in data["slo"]:
        axes.axhline(data["slo"][key], color=LIMIT_COLOR, linewidth=0.9, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("requests/s")
    axes.set_ylabel("ms")
    axes.set_title(name, fontsize=10)
    axes.grid(color="#dddddd", linewidth=0.6)
