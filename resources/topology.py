"""The machine as a graph: GPUs, host memories, processors, switches and drives, and the links between them.

Copies follow routes over it. What one copy takes by itself is the profile's business; the graph says which links it
passes, so that `network` can share them out among copies that run at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from ..errors import InputError
from ..words import unknown_name
from .facts import Bytes, BytesPerSecond, Fact, FlopsPerSecond, Part

if TYPE_CHECKING:
    import networkx as nx

NodeKind = Literal["gpu", "host", "cpu", "root_port", "switch", "nvme", "nic"]
LinkKind = Literal["pcie", "nvlink", "c2c", "upi", "dram", "nvme", "ethernet", "infiniband"]

#: Nodes that bytes can lie in; all others only pass them on. `host` is the memory of one NUMA node.
MEMORIES: frozenset[NodeKind] = frozenset({"gpu", "host", "nvme"})
_ENDS = MEMORIES | {"cpu"}
_INNER: frozenset[NodeKind] = frozenset({"cpu", "root_port", "switch", "nic"})
_PCIE: frozenset[NodeKind] = frozenset({"cpu", "root_port", "switch", "gpu", "nvme", "nic"})
#: What each kind of link may end at.
LINK_ENDS: dict[LinkKind, frozenset[NodeKind]] = {
    "pcie": _PCIE,
    "nvlink": frozenset({"gpu", "switch"}),
    "c2c": frozenset({"gpu", "cpu"}),
    "upi": frozenset({"cpu"}),
    "dram": frozenset({"host", "cpu"}),
    "nvme": _PCIE - {"gpu", "nic"},
    "ethernet": frozenset({"nic", "switch"}),
    "infiniband": frozenset({"nic", "switch"}),
}


class TopologyError(InputError):
    """A route that does not exist, or ends at a node that does not."""


class Node(Fact):
    """One node. A memory (gpu, host, nvme) has a capacity; a gpu or cpu may say how fast it computes.

    `flops_per_second`: dense, of the 16-bit type that experts are computed in; `memory_bytes_per_second`: of its own
    memory (a host's is that of its dram link).
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    kind: NodeKind
    capacity_bytes: Bytes | None = Field(default=None, gt=0)
    flops_per_second: FlopsPerSecond | None = Field(default=None, gt=0)
    memory_bytes_per_second: BytesPerSecond | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Node:
        if self.kind in MEMORIES and self.capacity_bytes is None:
            raise InputError(f"{self.name}: a {self.kind} needs capacity_bytes")
        if self.kind not in MEMORIES and self.capacity_bytes is not None:
            raise InputError(f"{self.name}: a {self.kind} holds nothing: capacity_bytes is of {_listed(MEMORIES)}")
        computes = self.flops_per_second is not None or self.memory_bytes_per_second is not None
        if computes and self.kind not in ("gpu", "cpu"):
            raise InputError(f"{self.name}: a {self.kind} computes nothing: give flops_per_second to a gpu or cpu")
        return self


class Link(Fact):
    """A link between two nodes, as fast as a long copy can be over it.

    `bytes_per_second` is from the first of `ends` to the second, and back too unless `back_bytes_per_second` says
    otherwise. `duplex` "full" lets each direction have its own; "half" makes both share one.
    """

    ends: tuple[str, str]
    kind: LinkKind
    bytes_per_second: BytesPerSecond = Field(gt=0)
    back_bytes_per_second: BytesPerSecond | None = Field(default=None, gt=0)
    latency_ns: int = Field(ge=0)
    duplex: Literal["full", "half"] = "full"

    @model_validator(mode="after")
    def _is_one_or_two(self) -> Link:
        if self.ends[0] == self.ends[1]:
            raise InputError(f"ends: {self.ends[0]} is linked to itself")
        if self.duplex == "half" and self.back_bytes_per_second is not None:
            raise InputError("back_bytes_per_second: both directions of a half-duplex link share bytes_per_second")
        return self

    def directions(self) -> Iterator[tuple[str, str, str, int]]:
        """Yields (name, from, to, bytes a second) of both; they have one name where they share one bandwidth."""
        a, b = self.ends
        shared = f"{a}<->{b}" if self.duplex == "half" else None
        yield shared or f"{a}->{b}", a, b, self.bytes_per_second
        yield shared or f"{b}->{a}", b, a, self.back_bytes_per_second or self.bytes_per_second


@dataclass(frozen=True)
class Route:
    """The way of a copy: the nodes and the links that it passes, and how fast a long one is by itself.

    A copy that is `staged` goes through host memory, in pieces, so that both halves run at once: it takes bandwidth of
    the links of both, and a half-duplex link that it passes twice is named twice.
    """

    nodes: tuple[str, ...]
    links: tuple[str, ...]
    bytes_per_second: int
    latency_ns: int
    staged: bool = False

    @property
    def source(self) -> str:
        """Where the bytes are."""
        return self.nodes[0]

    @property
    def target(self) -> str:
        """Where they go."""
        return self.nodes[-1]

    def ns(self, size_bytes: int) -> int:
        """Returns what a copy takes by itself, in ns, rounded up: for routes whose copies nobody has measured."""
        return self.latency_ns - (-size_bytes * 10**9 // self.bytes_per_second)


class Topology(Part):
    """The graph of one machine. GPUs are named gpu0, gpu1, … in the order given.

    `pcie_peer`: whether a GPU reads another's memory over PCIe; where the driver does not allow that, such a copy is
    staged through host memory.
    """

    nodes: tuple[Node, ...]
    links: tuple[Link, ...]
    pcie_peer: bool = True

    @model_validator(mode="after")
    def _is_a_machine(self) -> Topology:
        self._check_nodes()
        self._check_links()
        for gpu in self.gpus:
            try:
                self.host_of(gpu)
            except TopologyError:
                raise InputError(
                    f"{gpu} has no host link: no host memory reaches it; link it to a cpu, root_port or switch"
                ) from None
        return self

    def _check_nodes(self) -> None:
        for name, times in Counter(node.name for node in self.nodes).items():
            if times > 1:
                raise InputError(f"nodes: {name} is given {times} times; give each node a name of its own")
        if not self.hosts:
            raise InputError("nodes: there is no host: give the memory of one NUMA node at least")
        expected = tuple(f"gpu{number}" for number in range(len(self.gpus)))
        if not expected or self.gpus != expected:
            raise InputError(f"nodes: GPUs {_listed(self.gpus)}: name them gpu0, gpu1, … in this order")

    def _check_links(self) -> None:
        kinds = {node.name: node.kind for node in self.nodes}
        seen: set[frozenset[str]] = set()
        for number, link in enumerate(self.links):
            for end in link.ends:
                if end not in kinds:
                    raise InputError(unknown_name(f"links.{number}.ends", end, kinds))
                if kinds[end] not in LINK_ENDS[link.kind]:
                    allowed = _listed(LINK_ENDS[link.kind])
                    raise InputError(f"links.{number}: {end} is a {kinds[end]}; {link.kind} links join {allowed}")
            if frozenset(link.ends) in seen:
                a, b = link.ends
                raise InputError(f"links.{number}: {a} and {b} are linked twice; give one link with the sum")
            seen.add(frozenset(link.ends))

    @property
    def gpus(self) -> tuple[str, ...]:
        """The names of the GPUs, in order."""
        return self.named("gpu")

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names of the host memories, one for each NUMA node, in order."""
        return self.named("host")

    def named(self, kind: NodeKind) -> tuple[str, ...]:
        """Returns the names of the nodes of one kind, in order."""
        return tuple(node.name for node in self.nodes if node.kind == kind)

    def node(self, name: str) -> Node:
        """Returns a node by its name; TopologyError if there is none."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise TopologyError(unknown_name("topology: node", name, [node.name for node in self.nodes]))

    def capacities(self) -> dict[str, int]:
        """Returns what each link carries, in bytes a second, by the names that routes use."""
        return {name: rate for link in self.links for name, _, _, rate in link.directions()}

    def graph(self) -> nx.DiGraph[str]:
        """Returns the networkx graph: an edge for each direction, with name, kind, bytes_per_second, latency_ns."""
        import networkx as nx

        graph: nx.DiGraph[str] = nx.DiGraph()
        for node in self.nodes:
            graph.add_node(node.name, kind=node.kind, capacity_bytes=node.capacity_bytes)
        for link in self.links:
            for name, a, b, rate in link.directions():
                graph.add_edge(a, b, name=name, kind=link.kind, bytes_per_second=rate, latency_ns=link.latency_ns)
        return graph

    def route(self, source: str, target: str) -> Route:
        """Returns the widest way from one memory to another and, of equally wide ones, that of fewest hops.

        A processor may be an end too: it reads a host memory to compute. Only processors, switches, root ports and
        network cards pass bytes on. Between GPUs that share no such way, or only one over PCIe that the driver does not
        let them use, a copy is staged through the host memory that makes it fastest. Raises TopologyError.
        """
        for name in (source, target):
            if self.node(name).kind not in _ENDS:
                kind = self.node(name).kind
                raise TopologyError(
                    f"topology: no copy starts or ends at {name}, a {kind}: give one of {_listed(_ENDS)}"
                )
        if source == target:
            raise TopologyError(f"topology: a copy from {source} to itself passes no link")
        peers = self.node(source).kind == self.node(target).kind == "gpu"
        route = self._direct(source, target, {"nvlink"} if peers and not self.pcie_peer else set(LINK_ENDS))
        if route is None and peers:
            route = self._staged(source, target)
        if route is None:
            raise TopologyError(f"topology: there is no route from {source} to {target}: link them, or name others")
        return route

    def host_of(self, gpu: str) -> str:
        """Returns the host memory that a GPU copies from fastest: its own NUMA node's. Raises TopologyError."""
        ways = [route for host in self.hosts if (route := self._direct(host, gpu, set(LINK_ENDS))) is not None]
        if not ways:
            raise TopologyError(f"topology: there is no route from a host to {gpu}")
        return min(ways, key=lambda route: (-route.bytes_per_second, len(route.links))).source

    @cached_property
    def _graph(self) -> nx.DiGraph[str]:
        return self.graph()

    @cached_property
    def _found(self) -> dict[tuple[str, str, frozenset[LinkKind]], Route | None]:
        """Routes over links of some kinds that were asked for, for a run asks for those of all GPUs again and again."""
        return {}

    def _direct(self, source: str, target: str, kinds: Collection[LinkKind]) -> Route | None:
        """Returns the best route over links of some kinds that no third memory is on; None if there is none."""
        asked = (source, target, frozenset(kinds))
        if asked not in self._found:
            self._found[asked] = self._widest(*asked)
        return self._found[asked]

    def _widest(self, source: str, target: str, kinds: Collection[LinkKind]) -> Route | None:
        import networkx as nx

        graph = self._graph
        inner = {node.name for node in self.nodes if node.kind in _INNER} | {source, target}
        usable = [(a, b) for a, b, edge in graph.edges(data=True) if {a, b} <= inner and edge["kind"] in kinds]
        widths = sorted({graph.edges[edge]["bytes_per_second"] for edge in usable}, reverse=True)
        for width in widths:
            wide = nx.DiGraph(edge for edge in usable if graph.edges[edge]["bytes_per_second"] >= width)
            if source in wide and target in wide and nx.has_path(wide, source, target):
                return self._along(nx.shortest_path(wide, source, target))
        return None

    def _staged(self, source: str, target: str) -> Route | None:
        ways = []
        for host in self.hosts:
            down = self._direct(source, host, set(LINK_ENDS))
            up = self._direct(host, target, set(LINK_ENDS))
            if down is not None and up is not None:
                ways.append(self._along([*down.nodes, *up.nodes[1:]], staged=True))
        return min(ways, key=lambda route: (-route.bytes_per_second, len(route.links)), default=None)

    def _along(self, nodes: list[str], *, staged: bool = False) -> Route:
        graph = self._graph
        edges = [graph.edges[edge] for edge in pairwise(nodes)]
        links = tuple(edge["name"] for edge in edges)
        passes, carries = Counter(links), self.capacities()
        return Route(
            tuple(nodes),
            links,
            min(carries[name] // times for name, times in passes.items()),
            sum(edge["latency_ns"] for edge in edges),
            staged,
        )


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))
