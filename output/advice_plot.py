"""The picture of advice: every trial by two goals, and the front of those that no other beats in both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .palette import COLORS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_advice(data: Mapping[str, Any]) -> Figure:
    """Draw the trials of advice: its first goal over its second, or over the GPU memory used; and the front."""
    from matplotlib.figure import Figure

    y = data["goals"][0]
    x = data["goals"][1] if len(data["goals"]) > 1 else "memory"
    picture = Figure(figsize=(8.0, 5.0), layout="constrained")
    axes = picture.subplots()
    tried = [(each["figures"][x], each["figures"][y]) for each in data["tried"]]
    axes.scatter([at for at, _ in tried], [at for _, at in tried], s=16, color="#8c8c8c", label="tried")
    best = sorted((each["figures"][x], each["figures"][y]) for each in data["front"])
    color = COLORS["dense"][0]
    axes.plot([at for at, _ in best], [at for _, at in best], "o-", color=color, label="no other is better in both")
    if data["base"] is not None and x in data["base"]:
        axes.plot(data["base"][x], data["base"][y], "x", color="black", markersize=9, label="as it stands")
    axes.set_xlabel(f"{x} ({data['units'][x]})")
    axes.set_ylabel(f"{y} ({data['units'][y]})")
    axes.grid(color="#dddddd", linewidth=0.6)
    picture.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return picture
