"""The links of a run on several GPUs: the way of each copy over the machine's graph; what copies between GPUs take.

What a copy takes by itself is the profile's; where it has no cost for a way between GPUs, the graph's bandwidth and
latency stand in, and are named in `estimates`. Copies that run at once and want more of a link than it carries share it
out, through one network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Protocol

from .lags import Lags
from .network import Network, Transfer, contended
from .profile import Profile
from .profile_costs import DurationBesideCopy
from .topology import Route, Topology, TopologyError


@dataclass(frozen=True)
class HostLink:
    """The way of one GPU's copies from the host, where others share it: the network, the route and their sizes.

    `transfers` (layers,): what one copy moves, or one piece of it where it goes in pieces of its own.
    """

    network: Network
    transfers: Sequence[Transfer]


@dataclass(frozen=True)
class LinkSetting:
    """What of a scenario changes the copies over links.

    `free`: neither calls nor gaps cost anything; `contention`: copies slow one another down; `timed`: every copy is
    timed by one more event; `moves`: what goes between GPUs are experts, of GPUs that share them.
    """

    free: bool = False
    contention: bool = False
    timed: bool = False
    moves: bool = False


class CopyTimes(Protocol):
    """The copy of one expert from the host."""

    @property
    def queued_ns(self) -> int:
        """What the copy takes behind another."""

    @property
    def pieces(self) -> int:
        """In how many pieces it goes."""


class HostCopies(Protocol):
    """One GPU's copies from the host, as `Costs` has them."""

    @property
    def expert_bytes(self) -> Sequence[int]:
        """The bytes that move for an expert of each layer (layers,)."""

    @property
    def copies(self) -> Sequence[CopyTimes]:
        """What these take (layers,)."""

    @property
    def by_priority(self) -> bool:
        """Whether they go piece by piece out of a queue by rank."""


class PeerCosts:
    """What copies from one GPU to another take: their time by size, their host's calls and the lags of their lane.

    What stands in for a cost that the profile lacks is added to `estimates`.
    """

    def __init__(self, route: Route, profile: Profile, setting: LinkSetting, estimates: dict[str, str]) -> None:
        free = setting.free
        # Nobody has measured copies that are staged through host memory: they are no faster than the graph says.
        measured = None if route.staged else profile.peer
        if measured is None:
            estimates["copies between GPUs"] = (
                "the latencies and the narrowest link of their route over the machine's graph; calls and gaps as of "
                "copies from the host"
            )
        copies = measured or profile.h2d.get("pinned") or next(iter(profile.h2d.values()))
        self.route = route
        self._costs = measured
        self.latency_ns = 0 if free else copies.launch_latency.ns
        records = 2 if setting.timed else 1
        enqueue = profile.host.peer_enqueue or profile.host.copy_enqueue
        self.host_ns = 0 if free else enqueue.ns + records * profile.host.event_record.ns
        if setting.moves and not free and profile.host.expert_move is not None:
            self.host_ns = profile.host.expert_move.ns
        gap_ns, wait = copies.gap.ns, copies.event_wait_gap
        beside = setting.contention
        wait_longer_ns = wait.disturbed_ns - wait.ns if beside else 0
        self.lags = Lags(gap_ns) if free else Lags(gap_ns, 0, wait.ns, wait_longer_ns)
        longer = profile.contention.peer_beside_copy if beside and profile.contention else None
        self._longer_ns = longer.ns if longer else 0
        #: How much later a kernel of the other GPU starts behind such a copy than behind one from the host.
        self.arrival_ns = 0 if free else _more(profile.compute.peer_wait_gap, profile.compute.event_wait_gap)
        self._transfers: dict[int, Transfer] = {}

    def alone_ns(self, size_bytes: int) -> int:
        """Returns what a copy of so many bytes takes on an idle lane."""
        return self.route.ns(size_bytes) if self._costs is None else self._costs.alone.ns(size_bytes)

    def queued_ns(self, size_bytes: int) -> int:
        """Returns what it takes right behind another."""
        return self.route.ns(size_bytes) if self._costs is None else self._costs.queued.ns(size_bytes)

    @property
    def slowed(self) -> bool:
        """Whether copies from the host slow these down."""
        return self._longer_ns > 0 or self.lags.after_other_longer_ns > 0

    def slowdown(self, size_bytes: int) -> float:
        """Returns how many times as long it takes beside copies from the host."""
        ns = self.alone_ns(size_bytes)
        return 1 + self._longer_ns / ns if ns else 1.0

    def transfer(self, size_bytes: int) -> Transfer:
        """Returns what such a copy moves over the links, always the same for the same size."""
        return self._transfers.setdefault(size_bytes, Transfer(self.route, size_bytes))


def _more(cost: DurationBesideCopy | None, than: DurationBesideCopy) -> int:
    """Returns what a duration, if there is one, has more than another."""
    return max(0, cost.ns - than.ns) if cost is not None else 0


class Links:
    """The links of a machine with so many GPUs at work, for as many runs as there are.

    Raises TopologyError if the profile's machine has fewer GPUs.
    """

    def __init__(self, profile: Profile, gpus: int, setting: LinkSetting) -> None:
        topology = profile.topology
        have = len(topology.gpus) if topology is not None else 1
        if topology is None or have < gpus:
            known = f"{have} GPUs" if have > 1 else "1 GPU" if topology is not None else "no topology, so 1 GPU"
            raise TopologyError(f"profile {profile.name} has {known}: choose a machine.profile with {gpus}")
        self.gpus = topology.gpus[:gpus]
        self.topology: Topology = topology
        self.host_routes = [topology.route(topology.host_of(gpu), gpu) for gpu in self.gpus]
        #: What stands in for costs that the profile lacks, as of `Costs`.
        self.estimates: dict[str, str] = {}
        self._profile, self._setting = profile, setting
        self._peers: dict[tuple[int, int], PeerCosts] = {}
        self._routes: dict[tuple[int, int], Route] = {}

    def route(self, source: int, target: int) -> Route:
        """Returns the way from one GPU to another; TopologyError if there is none."""
        if (source, target) not in self._routes:
            self._routes[source, target] = self.topology.route(self.gpus[source], self.gpus[target])
        return self._routes[source, target]

    def routes(self) -> dict[tuple[int, int], Route]:
        """Returns the way from each GPU to each other one; TopologyError if there is none."""
        return {pair: self.route(*pair) for pair in permutations(range(len(self.gpus)), 2)}

    def peer(self, source: int, target: int) -> PeerCosts:
        """Returns what copies from one GPU to another take; TopologyError if there is no route."""
        if (source, target) not in self._peers:
            self._peers[source, target] = PeerCosts(
                self.route(source, target), self._profile, self._setting, self.estimates
            )
        return self._peers[source, target]

    def peers(self) -> dict[tuple[int, int], PeerCosts]:
        """Returns what copies from each GPU to each other one take; from then on they count where links are shared."""
        return {pair: self.peer(*pair) for pair in self.routes()}

    def to_next(self) -> list[PeerCosts]:
        """Returns what copies from each GPU to the next take, and from the last to the first, as in a pipeline."""
        gpus = len(self.gpus)
        return [self.peer(number, (number + 1) % gpus) for number in range(gpus)]

    def with_profile(self, profile: Profile, *, timed: bool = False) -> Links:
        """Returns these links at the costs of another profile."""
        return Links(profile, len(self.gpus), replace(self._setting, timed=timed))

    def network(self, costs: Sequence[HostCopies]) -> Network | None:
        """Returns a network for one run, given each GPU's costs; None if its copies can never slow one another down.

        Copies between GPUs count for what `peer` was asked before.
        """
        if not self._setting.contention:
            return None
        asked = []
        for route, own in zip(self.host_routes, costs, strict=True):
            copies = zip(own.expert_bytes, own.copies, strict=True)
            asked.append((route, max(size * 10**9 // max(1, copy.queued_ns) for size, copy in copies)))
        long = 1 << 30
        asked += [(peer.route, long * 10**9 // max(1, peer.queued_ns(long))) for peer in self._peers.values()]
        return Network(self.topology) if contended(asked, self.topology) else None

    def host_link(self, gpu: int, costs: HostCopies, network: Network | None) -> HostLink | None:
        """Returns the way from the host to one GPU, for its copies to share; None where they never have to."""
        if network is None:
            return None
        pieces = [copy.pieces if costs.by_priority else 1 for copy in costs.copies]
        sizes = [-(-size // count) for size, count in zip(costs.expert_bytes, pieces, strict=True)]
        transfer_of = {size: Transfer(self.host_routes[gpu], size) for size in sizes}
        return HostLink(network, [transfer_of[size] for size in sizes])
