"""The graph of a machine as a table, as plain data and as a picture: its links, the routes over them, their loads.

Every row is one direction of a link, by the name that routes and a result's `links` use; a half-duplex link is one row
for both.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from math import log2
from textwrap import fill
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...resources.profile import Profile, ProfileError, load_profile, profile_names
from ...resources.topology import Route, Topology
from ..compare import load_run
from ..scenario import load_scenario
from .plots import _INK, COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The kinds of routes that are shown, by the kinds of their ends, each with its color.
ROUTES = {
    ("host", "gpu"): ("host memory to GPU", COLORS["demand"][0]),
    ("gpu", "gpu"): ("GPU to GPU", COLORS["dense"][0]),
    ("nvme", "host"): ("drive to host memory", COLORS["head"][0]),
}
#: Up to so many routes of a kind are named in a row; of more their number is given.
_NAMED = 4
_NO_ROUTE = "#b0b0b0"
_FILLS = {"gpu": "#d7ecf9", "host": "#fbe3c8", "nvme": "#d5efe4", "cpu": "#eeeeee", "nic": "#f3e4ee"}
#: The place of each kind in the picture, from the top; a switch that only joins GPUs stands below them.
_RANKS = {"nvme": 0, "host": 0, "cpu": 1, "root_port": 2, "switch": 3, "gpu": 4, "nic": 4}
_BELOW = 5
_SLOT_INCHES, _RANK_INCHES = 1.45, 1.15

Place = tuple[float, float]


def machine_of(name: str) -> Profile:
    """Return the profile of this name, or that of the scenario of this name; it has a topology, or ProfileError."""
    if name not in profile_names() and not name.endswith(".json"):
        name = load_scenario(name).machine.profile
    profile = load_profile(name)
    if profile.topology is None:
        others = ", ".join(other for other in profile_names() if load_profile(other).topology is not None)
        raise ProfileError(f"profile {name} is one GPU behind one link: it has no topology; {others} have one")
    return profile


def shown_routes(topology: Topology) -> list[Route]:
    """Return the routes of ROUTES: to each GPU from its own host memory, between GPUs, and from drives."""
    ends = [(topology.host_of(gpu), gpu) for gpu in topology.gpus]
    ends += permutations(topology.gpus, 2)
    ends += [(nvme, host) for nvme in topology.named("nvme") for host in topology.hosts]
    return [topology.route(source, target) for source, target in ends]


def load_links(result: str) -> list[dict[str, Any]]:
    """Return the loads of links that a run tells (named as `compare.load_run` does); ValueError if it tells none."""
    links: list[dict[str, Any]] | None = load_run(result).get("links")
    if not links:
        raise ValueError(f"{result}: tells no links: only runs on a profile with a topology do")
    return links


def describe(profile: Profile, loads: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Return the graph as plain data: nodes, links with the routes over them (and a run's `loads`), routes.

    Raises ValueError if the loads are not those of these links.
    """
    topology = profile.topology
    assert topology is not None, "machine_of gives profiles with a topology"
    routes = shown_routes(topology)
    over: dict[str, list[str]] = defaultdict(list)
    for route in routes:
        for link in dict.fromkeys(route.links):
            over[link].append(f"{route.source}->{route.target}")
    links: dict[str, dict[str, Any]] = {}
    for link in topology.links:
        facts = link.model_dump(include={"kind", "latency_ns", "duplex", "source", "note"})
        for name, a, b, bytes_per_second in link.directions():
            more = {"from": a, "to": b, "bytes_per_second": bytes_per_second, "routes": over[name]}
            links.setdefault(name, {"link": name, **more, **facts})
    if loads and {load["link"] for load in loads} != set(links):
        raise ValueError(f"the result is of another machine: its links are not those of profile {profile.name}")
    for load in loads:
        links[load["link"]] |= load
    return {
        "profile": profile.name,
        "device": profile.device,
        "pcie_peer": topology.pcie_peer,
        "nodes": [node.model_dump(exclude_none=True) for node in topology.nodes],
        "links": list(links.values()),
        "routes": [
            {
                "from": route.source,
                "to": route.target,
                "links": list(route.links),
                "bytes_per_second": route.bytes_per_second,
                "latency_ns": route.latency_ns,
                "staged": route.staged,
            }
            for route in routes
        ],
    }


def print_machine(data: Mapping[str, Any]) -> None:
    """Print what `describe` returned."""
    console = Console()
    console.print(Text(f"{data['profile']}: {data['device']}"))
    nodes = Table(box=None, padding=(0, 2, 0, 0))
    for number, column in enumerate(("node", "kind", "capacity", "source")):
        nodes.add_column(column, justify="right" if number == 2 else "left", no_wrap=True)
    for node in data["nodes"]:
        nodes.add_row(node["name"], node["kind"], _size(node.get("capacity_bytes")), node["source"])
    console.print(nodes)
    kinds = {node["name"]: node["kind"] for node in data["nodes"]}
    loaded = any("bytes" in link for link in data["links"])
    columns = ["link", "kind", "GB/s", *(["moved", "busy", "used"] if loaded else ["latency", "source"]), "routes"]
    links = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        left = column in ("link", "kind", "source", "routes")
        links.add_column(column, justify="left" if left else "right", no_wrap=column != "routes")
    for link in data["links"]:
        more = [f"{link['latency_ns'] / 1e3:,.1f} µs", link["source"]]
        if loaded:
            more = [_size(link["bytes"]), f"{link['busy_ms']:,.1f} ms", _share(link["utilization"], 1)]
        rate, routes = f"{link['bytes_per_second'] / 1e9:,.1f}", _summary(link["routes"], kinds)
        links.add_row(link["link"], link["kind"], rate, *more, routes)
    console.print(links)


def _summary(routes: Iterable[str], kinds: Mapping[str, str]) -> str:
    """Name the routes over a link; of more than a few of a kind, give their number."""
    by_kind: dict[str, list[str]] = defaultdict(list)
    for route in routes:
        by_kind["->".join(kinds[end] for end in route.split("->"))].append(route)
    some = [names if len(names) <= _NAMED else [f"{len(names)} {kind}"] for kind, names in by_kind.items()]
    return ", ".join(name for names in some for name in names)


def _share(share: float | None, digits: int) -> str:
    return "-" if share is None else f"{share:.{digits}%}"


def _size(size_bytes: int | None) -> str:
    if size_bytes is None:
        return "-"
    unit, name = (2**40, "TiB") if size_bytes >= 2**40 else (2**30, "GiB") if size_bytes >= 2**30 else (2**20, "MiB")
    return f"{size_bytes / unit:,.1f}".removesuffix(".0") + f" {name}"


# The picture.


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
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK)
    return figure


def _undirected(links: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Return the rows of each link by its ends: one for a half-duplex link, else two."""
    both: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for link in links:
        ends, back = (link["from"], link["to"]), (link["to"], link["from"])
        both.setdefault(back if back in both else ends, []).append(link)
    return both


def _places(data: Mapping[str, Any]) -> dict[str, Place]:
    """Return where each node stands, in inches: GPUs in order, whatever is above or below them over their middle."""
    kinds = {node["name"]: node["kind"] for node in data["nodes"]}
    near: dict[str, list[str]] = defaultdict(list)
    bus: set[str] = set()
    for link in data["links"]:
        for a, b in ((link["from"], link["to"]), (link["to"], link["from"])):
            near[a] += [b] if b not in near[a] else []
        if link["kind"] in ("pcie", "nvme", "dram", "upi"):
            bus |= {link["from"], link["to"]}
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


def _middle(across: Sequence[float]) -> float:
    return (min(across) + max(across)) / 2 if across else 0.0


def _apart(wanted: Mapping[str, float]) -> dict[str, float]:
    """Return places near those wanted, a slot apart at least, with the same middle for those that had to move."""
    order = sorted(wanted, key=lambda name: wanted[name])
    places: dict[str, float] = {}
    for name in order:
        least = max(places.values(), default=float("-inf")) + _SLOT_INCHES
        places[name] = max(wanted[name], least)
    shift = sum(places[name] - wanted[name] for name in order) / len(order)
    return {name: place - shift for name, place in places.items()}


def _colors(rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, str]) -> list[str]:
    """Return the colors of the routes over a link, in the order of ROUTES; gray if there are none."""
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
        *at(0.5 if y0 == y1 else 0.42), _label(rows), ha="center", va="center", fontsize=7, color=_INK, zorder=3,
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"},
    )  # fmt: skip


def _label(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say the speed of a link in GB/s, of both directions if they differ, and how much of each a run used."""
    speeds = dict.fromkeys(f"{row['bytes_per_second'] / 1e9:,.4g}" for row in rows)
    shared = " shared" if rows[0]["duplex"] == "half" else ""
    text = f"{rows[0]['kind']} {' / '.join(speeds)}{shared}"
    if "utilization" in rows[0]:
        text += "\n" + " / ".join(_share(row["utilization"], 0) for row in rows)
    return text


def _draw_node(axes: Axes, node: Mapping[str, Any], place: Place) -> None:
    capacity = f"\n{_size(node['capacity_bytes'])}" if "capacity_bytes" in node else ""
    axes.text(
        *place, f"{node['name']}{capacity}", ha="center", va="center", fontsize=9, color=_INK, zorder=4,
        bbox={"boxstyle": "round,pad=0.35", "facecolor": _FILLS.get(node["kind"], "white"), "edgecolor": _INK},
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
