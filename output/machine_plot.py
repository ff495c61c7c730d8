"""The picture of a machine: memories at the top, GPUs below, links as wide as they are fast, in their routes' colors.

Nodes stand in rows by what they are, each over the middle of what it is linked to, so that links hardly cross.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import log2
from textwrap import fill
from typing import TYPE_CHECKING, Any

from .machine import share, size
from .palette import COLORS
from .pictures import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The name and color of routes, by the kinds of their ends.
ROUTES = {
    ("host", "gpu"): ("host memory to GPU", COLORS["demand"][0]),
    ("gpu", "gpu"): ("GPU to GPU", COLORS["dense"][0]),
    ("nvme", "host"): ("drive to host memory", COLORS["head"][0]),
}
_NO_ROUTE = "#b0b0b0"
_FILLS = {"gpu": "#d7ecf9", "host": "#fbe3c8", "nvme": "#d5efe4", "cpu": "#eeeeee", "nic": "#f3e4ee"}
#: The place of each kind in the picture, from the top; a switch that only joins GPUs stands below them.
_RANKS = {"nvme": 0, "host": 0, "cpu": 1, "root_port": 2, "switch": 3, "gpu": 4, "nic": 4}
_BELOW = 5
_SLOT_INCHES, _RANK_INCHES = 1.45, 1.15

Place = tuple[float, float]


def plot_machine(data: Mapping[str, Any]) -> Figure:
    """Draw what `describe` returned: memories at the top, GPUs below, links as wide as they are fast.

    Each link has the colors of the routes over it; its label says GB/s, and how much of that a run used.
    """
    from matplotlib.figure import Figure

    places = _places(data)
    across = [x for x, _ in places.values()]
    down = [y for _, y in places.values()]
    width = max(across) - min(across) + 2.2 * _SLOT_INCHES
    height = max(down) - min(down) + 1.9 * _RANK_INCHES
    figure = Figure(figsize=(max(width, 6.5), height), layout="constrained")
    axes = figure.subplots()
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set_xlim(min(across) - 0.6 * _SLOT_INCHES, max(across) + 0.6 * _SLOT_INCHES)
    axes.set_ylim(min(down) - 0.5 * _RANK_INCHES, max(down) + 0.4 * _RANK_INCHES)
    kinds = {node["name"]: node["kind"] for node in data["nodes"]}
    links = _undirected(data["links"])
    ends = Counter(end for pair in links for end in pair)
    for (a, b), rows in links.items():
        # The label is nearer to the end that fewer links meet at, where there is more room.
        pair = (a, b) if ends[a] <= ends[b] else (b, a)
        _draw_link(axes, rows, places[pair[0]], places[pair[1]], _colors(rows, kinds))
    for node in data["nodes"]:
        _draw_node(axes, node, places[node["name"]])
    _add_legend(figure, data, kinds)
    title = fill(f"{data['profile']}: {data['device']}", round(9 * figure.get_figwidth()))
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def _undirected(links: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Returns the rows of each link by its ends: one for a half-duplex link, else two."""
    both: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for link in links:
        ends, back = (link["from"], link["to"]), (link["to"], link["from"])
        both.setdefault(back if back in both else ends, []).append(link)
    return both


def _places(data: Mapping[str, Any]) -> dict[str, Place]:
    """Returns where each node stands, in inches: GPUs in order, whatever is above or below them over their middle."""
    kinds = {node["name"]: node["kind"] for node in data["nodes"]}
    near, bus = _neighbors(data["links"])
    ranks = {name: _RANKS[kind] if name in bus or kind != "switch" else _BELOW for name, kind in kinds.items()}
    levels = sorted(set(ranks.values()))
    leaves = [name for name in kinds if ranks[name] == _RANKS["gpu"]]
    x = {name: number * _SLOT_INCHES for number, name in enumerate(leaves)}
    others = [rank for rank in reversed(levels) if rank < _RANKS["gpu"]] + [rank for rank in levels if rank == _BELOW]
    for rank in others:
        row = [name for name in kinds if ranks[name] == rank]
        wanted = {name: _middle([x[other] for other in near[name] if other in x]) for name in row}
        x |= _apart(wanted)
    return {name: (x[name], -levels.index(ranks[name]) * _RANK_INCHES) for name in kinds}


def _neighbors(links: Iterable[Mapping[str, Any]]) -> tuple[dict[str, list[str]], set[str]]:
    """Returns what each node is linked to, and the nodes that a link of a bus leads to."""
    near: dict[str, list[str]] = defaultdict(list)
    bus: set[str] = set()
    for link in links:
        for a, b in ((link["from"], link["to"]), (link["to"], link["from"])):
            near[a] += [b] if b not in near[a] else []
        if link["kind"] in ("pcie", "nvme", "dram", "upi"):
            bus |= {link["from"], link["to"]}
    return near, bus


def _middle(across: Sequence[float]) -> float:
    return (min(across) + max(across)) / 2 if across else 0.0


def _apart(wanted: Mapping[str, float]) -> dict[str, float]:
    """Returns places near those wanted, a slot apart at least, with the same middle for those that had to move."""
    order = sorted(wanted, key=lambda name: wanted[name])
    places: dict[str, float] = {}
    for name in order:
        least = max(places.values(), default=float("-inf")) + _SLOT_INCHES
        places[name] = max(wanted[name], least)
    shift = sum(places[name] - wanted[name] for name in order) / len(order)
    return {name: place - shift for name, place in places.items()}


def _colors(rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, str]) -> list[str]:
    """Returns the colors of the routes over a link, in the order of ROUTES; gray if there are none."""
    over = {tuple(kinds[end] for end in route.split("->")) for link in rows for route in link["routes"]}
    return [color for ends, (_, color) in ROUTES.items() if ends in over] or [_NO_ROUTE]


def _draw_link(axes: Axes, rows: Sequence[Mapping[str, Any]], start: Place, end: Place, colors: list[str]) -> None:
    (x0, y0), (x1, y1) = start, end
    length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
    # A link between neighbors of one row is straight; a longer one would run through those between, so it sags.
    sag = 0.35 * _RANK_INCHES if y0 == y1 and length > 1.01 * _SLOT_INCHES else 0.0

    def at(t: float) -> Place:
        return x0 + (x1 - x0) * t, y0 + (y1 - y0) * t - 4 * sag * t * (1 - t)

    points = 1.0 + 1.4 * max(0.0, log2(rows[0]["bytes_per_second"] / 4e9))
    for number, color in enumerate(colors):
        # Strips lie side by side and together are as wide as the link is fast; 72 points are an inch.
        off = (number - (len(colors) - 1) / 2) * points / len(colors) / 72 / length
        way = [(x - off * (y1 - y0), y + off * (x1 - x0)) for x, y in (at(step / 20) for step in range(21))]
        axes.plot(*zip(*way, strict=True), color=color, linewidth=points / len(colors), zorder=1)
    axes.text(
        *at(0.5 if y0 == y1 else 0.42), _label(rows), ha="center", va="center", fontsize=7, color=INK, zorder=3,
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"},
    )  # fmt: skip


def _label(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say the speed of a link in GB/s, of both directions if they differ, and how much of each a run used."""
    speeds = dict.fromkeys(f"{row['bytes_per_second'] / 1e9:,.4g}" for row in rows)
    shared = " shared" if rows[0]["duplex"] == "half" else ""
    text = f"{rows[0]['kind']} {' / '.join(speeds)}{shared}"
    if "utilization" in rows[0]:
        text += "\n" + " / ".join(share(row["utilization"], 0) for row in rows)
    return text


def _draw_node(axes: Axes, node: Mapping[str, Any], place: Place) -> None:
    capacity = f"\n{size(node['capacity_bytes'])}" if "capacity_bytes" in node else ""
    axes.text(
        *place, f"{node['name']}{capacity}", ha="center", va="center", fontsize=9, color=INK, zorder=4,
        bbox={"boxstyle": "round,pad=0.35", "facecolor": _FILLS.get(node["kind"], "white"), "edgecolor": INK},
    )  # fmt: skip


def _add_legend(figure: Figure, data: Mapping[str, Any], kinds: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    there = {(kinds[route["from"]], kinds[route["to"]]) for route in data["routes"]}
    lines = [Line2D([], [], color=color, linewidth=4) for ends, (_, color) in ROUTES.items() if ends in there]
    names = [name for ends, (name, _) in ROUTES.items() if ends in there]
    lines.append(Line2D([], [], color="white"))
    loaded = "utilization" in data["links"][0]
    names.append("GB/s a direction; used of it, there / back" if loaded else "GB/s a direction")
    figure.legend(lines, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
