"""The graph of a machine as plain data and as a table: its links, the routes over them, and what a run moved.

Every row is one direction of a link, by the name that routes and a result's `links` use; a half-duplex link is one row
for both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..engine.measure.comparison import read_result
from ..engine.scenario.scenario import load_scenario, scenario_names
from ..errors import InputError
from ..resources.parts.written import is_of_parts
from ..resources.profile import Profile, load_profile, profile_names, unknown_machine
from ..resources.profile_costs import ProfileError
from ..resources.topology import Route, Topology
from ..units import binary_unit
from .tables.layout import plain_console

#: Up to so many routes of a kind are named in a row; of more their number is given.
_NAMED = 4


def machine_of(name: str) -> Profile:
    """Returns the profile of this name, or that of the scenario of this name; it has a topology, or ProfileError."""
    if name not in profile_names() and not name.endswith(".json") and not is_of_parts(name):
        if not name.endswith(".toml") and name not in scenario_names():
            known = [*profile_names(), "FILE.json", *scenario_names(), "FILE.toml"]
            raise ProfileError(unknown_machine("MACHINE", name, known))
        name = load_scenario(name).machine.profile
    profile = load_profile(name)
    if profile.topology is None:
        others = ", ".join(other for other in profile_names() if load_profile(other).topology is not None)
        raise ProfileError(f"profile {name} is one GPU behind one link: it has no topology; {others} have one")
    return profile


def shown_routes(topology: Topology) -> list[Route]:
    """Returns the routes that are told: to each GPU from its own host memory, between GPUs, and from drives."""
    ends = [(topology.host_of(gpu), gpu) for gpu in topology.gpus]
    ends += permutations(topology.gpus, 2)
    ends += [(nvme, host) for nvme in topology.named("nvme") for host in topology.hosts]
    return [topology.route(source, target) for source, target in ends]


def load_links(result: str) -> list[dict[str, Any]]:
    """Returns the loads of links that a run's result.json, or the folder that holds it, tells; ValueError if none."""
    path = Path(result)
    if path.suffix != ".json" and not path.is_dir():
        raise InputError(f"--result {result}: there is no such folder; give a result.json, or the folder that holds it")
    links: list[dict[str, Any]] | None = read_result(path).get("links")
    if not links:
        raise InputError(f"{result}: tells no links: only runs on a profile with a topology do")
    return links


def describe(profile: Profile, loads: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Returns the graph as plain data: nodes, links with the routes over them (and a run's `loads`), routes.

    Raises ValueError if the loads are not those of these links.
    """
    topology = profile.topology
    assert topology is not None, "machine_of gives profiles with a topology"
    routes = shown_routes(topology)
    over: dict[str, list[str]] = defaultdict(list)
    for route in routes:
        for name in dict.fromkeys(route.links):
            over[name].append(f"{route.source}->{route.target}")
    links: dict[str, dict[str, Any]] = {}
    for link in topology.links:
        told = {"kind", "latency_ns", "duplex", "source", "note"} | ({"device"} if link.device else set())
        facts = link.model_dump(include=told)
        for name, a, b, bytes_per_second in link.directions():
            more = {"from": a, "to": b, "bytes_per_second": bytes_per_second, "routes": over[name]}
            links.setdefault(name, {"link": name, **more, **facts})
    if loads and {load["link"] for load in loads} != set(links):
        raise InputError(f"the result is of another machine: its links are not those of profile {profile.name}")
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
    console = plain_console()
    console.print(Text(f"{data['profile']}: {data['device']}"))
    nodes = Table(box=None, padding=(0, 2, 0, 0))
    for number, column in enumerate(("node", "kind", "capacity", "source")):
        nodes.add_column(column, justify="right" if number == 2 else "left", no_wrap=True)
    for node in data["nodes"]:
        nodes.add_row(node["name"], node["kind"], size(node.get("capacity_bytes")), _provenance(node))
    console.print(nodes)
    kinds = {node["name"]: node["kind"] for node in data["nodes"]}
    loaded = any("bytes" in link for link in data["links"])
    columns = ["link", "kind", "GB/s", *(["moved", "busy", "used"] if loaded else ["latency", "source"]), "routes"]
    links = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        left = column in ("link", "kind", "source", "routes")
        links.add_column(column, justify="left" if left else "right", no_wrap=column != "routes")
    for link in data["links"]:
        more = [f"{link['latency_ns'] / 1e3:,.1f} µs", _provenance(link)]
        if loaded:
            more = [size(link["bytes"]), f"{link['busy_ms']:,.1f} ms", share(link["utilization"], 1)]
        rate, routes = f"{link['bytes_per_second'] / 1e9:,.1f}", _summary(link["routes"], kinds)
        links.add_row(link["link"], link["kind"], rate, *more, routes)
    console.print(links)


def _provenance(part: Mapping[str, Any]) -> str:
    return f"{part['source']}, of {part['device']}" if part.get("device") else str(part["source"])


def _summary(routes: Iterable[str], kinds: Mapping[str, str]) -> str:
    """Name the routes over a link; of more than a few of a kind, give their number."""
    by_kind: dict[str, list[str]] = defaultdict(list)
    for route in routes:
        by_kind["->".join(kinds[end] for end in route.split("->"))].append(route)
    some = [names if len(names) <= _NAMED else [f"{len(names)} {kind}"] for kind, names in by_kind.items()]
    return ", ".join(name for names in some for name in names)


def share(part: float | None, digits: int) -> str:
    """Say a fraction in percent, with so many digits."""
    return "-" if part is None else f"{part:.{digits}%}"


def size(size_bytes: int | None) -> str:
    """Returns the bytes of a memory, in tenths of their unit where they are not whole: `80 GiB`, `7.6 GiB`."""
    if size_bytes is None:
        return "-"
    unit_bytes, unit = binary_unit(size_bytes)
    return f"{size_bytes / unit_bytes:,.1f}".removesuffix(".0") + f" {unit}"
