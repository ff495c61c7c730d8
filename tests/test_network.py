"""Shared links: max-min fairness by hand and by its definition, copies in SimPy's time, bytes of each link."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lone_lanes import Lanes

from prestage.engine.timing.lanes import Lane, Work
from prestage.resources.network import Carried, Network, Transfer, contended, link_loads, max_min
from prestage.resources.topology import Topology

GB = 10**9  # a byte a ns


def machine(*links: tuple[str, str, str, int], duplex: dict[str, str] | None = None) -> Topology:
    """A graph from (end, end, kind, bytes a second); a node's kind is its name without the number."""
    names = dict.fromkeys(end for a, b, _, _ in links for end in (a, b))
    capacity = {"gpu": 2**30, "host": 2**40, "nvme": 2**40}
    nodes: list[dict[str, Any]] = []
    for name in names:
        kind = name.rstrip("0123456789")
        more = {"capacity_bytes": capacity[kind]} if kind in capacity else {}
        nodes.append({"name": name, "kind": kind, "source": "assumed", **more})
    made = [
        {"ends": (a, b), "kind": kind, "bytes_per_second": rate, "latency_ns": 0, "source": "assumed"}
        | {"duplex": (duplex or {}).get(kind, "full")}
        for a, b, kind, rate in links
    ]
    return Topology.model_validate({"nodes": nodes, "links": made})


def fan(gpus: int, uplink: int = GB, each: int = GB) -> Topology:
    """Host memory behind one uplink, from which each GPU has a link of its own."""
    own = [("switch0", f"gpu{number}", "pcie", each) for number in range(gpus)]
    return machine(("host0", "cpu0", "dram", 100 * GB), ("cpu0", "switch0", "pcie", uplink), *own)


class Copies:
    """Lanes that copy over a topology, one for each route."""

    def __init__(self, topology: Topology, *routes: tuple[str, str]) -> None:
        self.made, self.topology = Lanes(), topology
        self.network = Network(topology)
        self.routes = [topology.route(*ends) for ends in routes]
        self.lanes = [self.join(self.made.lane()) for _ in routes]

    def join(self, lane: Lane) -> Lane:
        lane.join(self.network.share())
        return lane

    def copy(self, number: int, size_bytes: int, ns: int, at_ns: int = 0) -> Work:
        transfer = Transfer(self.routes[number], size_bytes)
        work: Work = self.made.submit(self.lanes[number], ns, issued_ns=at_ns, transfer=transfer)
        return work

    def intervals(self) -> list[tuple[int, int, int]]:
        """(lane, start, end) of each copy, in the order in which they ended."""
        self.made.env.run()
        self.made.timeline.settle()
        spans = self.made.timeline.spans()
        return [(int(s["lane"]), int(s["start_ns"]), int(s["end_ns"])) for s in spans]


# Rates, by hand.


def test_max_min_of_two_links_by_hand() -> None:
    # Data Networks' kind of example: A over both links, B over the first (10), C over the second (4). The second fills
    # first, at 2 each for A and C; B then has what A leaves of the first, 8.
    assert max_min([["x", "y"], ["x"], ["y"]], {"x": 10, "y": 4}) == [2, 8, 2]


def test_a_flow_that_wants_less_leaves_the_rest_to_the_others() -> None:
    assert max_min([["x"]] * 3, {"x": 10}, [2, None, None]) == [2, 4, 4]
    assert max_min([["x"]] * 3, {"x": 10}, [None, 9, 3]) == [Fraction(7, 2), Fraction(7, 2), 3]


def test_a_flow_that_passes_a_link_twice_takes_twice_its_rate_of_it() -> None:
    assert max_min([["x", "x"], ["x"]], {"x": 9}) == [3, 3]


def test_rates_are_exact_fractions() -> None:
    assert max_min([["x"]] * 3, {"x": 10}) == [Fraction(10, 3)] * 3


def test_a_flow_that_nothing_bounds_is_refused() -> None:
    with pytest.raises(ValueError, match="flow 0 passes no link and has no demand"):
        max_min([[]], {})
    assert max_min([[]], {}, [5]) == [5]
    assert max_min([], {}) == []


# Rates, by definition.

LINKS = "abcde"
FLOWS = st.lists(
    st.tuples(st.lists(st.sampled_from(LINKS), min_size=1, max_size=5), st.none() | st.integers(1, 50)),
    min_size=1,
    max_size=8,
)
CAPACITIES = st.fixed_dictionaries({link: st.integers(1, 60) for link in LINKS})


def used(flows: list[list[str]], rates: list[Fraction]) -> dict[str, Fraction]:
    return {
        link: sum((rate * flow.count(link) for flow, rate in zip(flows, rates, strict=True)), Fraction(0))
        for link in LINKS
    }


@given(FLOWS, CAPACITIES)
def test_no_link_carries_more_than_it_can_and_no_flow_gets_more_than_it_wants(
    asked: list[tuple[list[str], int | None]], capacities: dict[str, int]
) -> None:
    flows, demands = [flow for flow, _ in asked], [demand for _, demand in asked]
    rates = max_min(flows, capacities, demands)
    assert all(rate > 0 for rate in rates)
    assert all(load <= capacities[link] for link, load in used(flows, rates).items())
    assert all(demand is None or rate <= demand for rate, demand in zip(rates, demands, strict=True))


@given(FLOWS, CAPACITIES)
def test_every_flow_has_its_demand_or_a_full_link_on_which_nobody_has_more(
    asked: list[tuple[list[str], int | None]], capacities: dict[str, int]
) -> None:
    # The bottleneck condition: it holds if and only if rates are max-min fair (Bertsekas and Gallager, 6.5.2).
    flows, demands = [flow for flow, _ in asked], [demand for _, demand in asked]
    rates = max_min(flows, capacities, demands)
    load = used(flows, rates)
    for flow, rate, demand in zip(flows, rates, demands, strict=True):
        most_on = {link: max(r for f, r in zip(flows, rates, strict=True) if link in f) for link in flow}
        assert rate == demand or any(load[link] == capacities[link] and most_on[link] == rate for link in flow)


@given(FLOWS, CAPACITIES, st.randoms(use_true_random=False))
def test_the_order_of_flows_does_not_matter(
    asked: list[tuple[list[str], int | None]], capacities: dict[str, int], random: Any
) -> None:
    order = list(range(len(asked)))
    random.shuffle(order)
    rates = max_min([flow for flow, _ in asked], capacities, [demand for _, demand in asked])
    shuffled = max_min([asked[i][0] for i in order], capacities, [asked[i][1] for i in order])
    assert shuffled == [rates[i] for i in order]


@given(st.lists(st.sampled_from(LINKS), min_size=1, max_size=5, unique=True), CAPACITIES)
def test_a_single_flow_gets_its_bottleneck(flow: list[str], capacities: dict[str, int]) -> None:
    assert max_min([flow], capacities) == [min(capacities[link] for link in flow)]


# Copies in time.


@pytest.mark.parametrize("copies", [1, 2, 3, 5, 8])
def test_n_equal_copies_on_one_link_take_n_times_as_long(copies: int) -> None:
    lanes = Copies(fan(copies), *[("host0", f"gpu{number}") for number in range(copies)])
    for number in range(copies):
        lanes.copy(number, 600, 600)  # 1 byte a ns: all that the uplink carries
    assert lanes.intervals() == [(number, 0, copies * 600) for number in range(copies)]


def test_a_copy_alone_takes_what_its_cost_says_whatever_the_link_carries() -> None:
    lanes = Copies(fan(2), ("host0", "gpu0"), ("host0", "gpu1"))
    lanes.copy(0, 600, 777)
    lanes.copy(1, 600, 777, at_ns=777)
    assert lanes.intervals() == [(0, 0, 777), (1, 777, 1554)]


def test_the_rest_is_retimed_when_others_come_and_go() -> None:
    lanes = Copies(fan(2), ("host0", "gpu0"), ("host0", "gpu1"))
    lanes.copy(0, 100, 100)
    lanes.copy(1, 30, 30, at_ns=40)
    # The first has 60 left at 40, when the second comes. At half speed each, the second's 30 take 60, to 100; the
    # first then has 30 left and the link to itself, to 130.
    assert lanes.intervals() == [(1, 40, 100), (0, 0, 130)]


def test_two_links_by_hand_with_what_remains_recomputed() -> None:
    # gpu0 and gpu1 share a switch with an uplink of 1; the host's memory carries 1.5; gpu2 has a link of 1.25.
    topology = machine(
        ("host0", "cpu0", "dram", 3 * GB // 2),
        ("cpu0", "switch0", "pcie", GB),
        ("switch0", "gpu0", "pcie", GB),
        ("switch0", "gpu1", "pcie", GB),
        ("cpu0", "gpu2", "pcie", 5 * GB // 4),
    )
    lanes = Copies(topology, ("host0", "gpu0"), ("host0", "gpu1"), ("host0", "gpu2"))
    lanes.copy(0, 100, 100)
    lanes.copy(1, 200, 200)
    lanes.copy(2, 350, 280)
    # From 0: memory fills first, 0.5 each (the uplink is full too); gpu0 is done at 200, with gpu1 at 100 of 200 and
    # gpu2 at 100 of 350. Then memory gives 0.75 to each: gpu1 has 100 left, done at 333.3; gpu2 is at 200 then, and
    # its last 150, alone at its 1.25, take 120.
    assert lanes.intervals() == [(0, 0, 200), (1, 0, 333), (2, 0, 453)]


def test_a_copy_that_shares_no_full_link_is_not_touched() -> None:
    lanes = Copies(fan(3, uplink=3 * GB), *[("host0", f"gpu{number}") for number in range(3)])
    for number in range(3):
        lanes.copy(number, 100, 100, at_ns=10 * number)
    assert lanes.intervals() == [(0, 0, 100), (1, 10, 110), (2, 20, 120)]


def test_both_directions_share_a_half_duplex_link_and_not_a_full_one() -> None:
    for duplex, end_ns in (("full", 100), ("half", 200)):
        topology = machine(("host0", "cpu0", "dram", 9 * GB), ("cpu0", "gpu0", "pcie", GB), duplex={"pcie": duplex})
        lanes = Copies(topology, ("host0", "gpu0"), ("gpu0", "host0"))
        lanes.copy(0, 100, 100)
        lanes.copy(1, 100, 100)
        assert lanes.intervals() == [(0, 0, end_ns), (1, 0, end_ns)]


def test_two_streams_of_one_gpu_share_its_link_and_a_queue_of_pieces_does_too() -> None:
    lanes = Copies(fan(1), ("host0", "gpu0"))
    queue = lanes.made.queue()
    lanes.join(queue)
    lanes.copy(0, 100, 100)
    transfer = Transfer(lanes.routes[0], 20)
    lanes.made.enqueue(queue, True, 0, ns=20, transfer=transfer, pieces=3)
    # Pieces of 20 at half speed take 40 each, to 120; the stream has 40 left then.
    assert lanes.intervals() == [(1, 0, 40), (1, 40, 80), (1, 80, 120), (0, 0, 160)]


def test_work_that_moves_nothing_takes_no_part() -> None:
    lanes = Copies(fan(2), ("host0", "gpu0"), ("host0", "gpu1"))
    lanes.copy(0, 100, 100)
    lanes.copy(1, 0, 50)
    lanes.made.submit(lanes.lanes[1], 50)
    assert lanes.intervals() == [(1, 0, 50), (0, 0, 100), (1, 50, 100)]


# What each link carried.

COPIES = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 10**6), st.integers(0, 10**6)), min_size=1, max_size=12)


@given(COPIES)
def test_bytes_are_conserved_and_no_link_is_over_its_capacity(asked: list[tuple[int, int, int]]) -> None:
    topology = fan(3, uplink=2 * GB)
    ends = [("host0", "gpu0"), ("host0", "gpu1"), ("host0", "gpu2"), ("gpu0", "gpu1")]
    lanes = Copies(topology, *ends)
    queued: list[list[int]] = [[] for _ in ends]
    for lane, size_bytes, at_ns in sorted(asked, key=lambda copy: copy[2]):
        lanes.copy(lane, size_bytes, size_bytes, at_ns)
        queued[lane].append(size_bytes)
    lanes.made.env.run()
    spans = lanes.made.timeline.spans()
    carried = [
        Carried(route, np.array(queued[lane]), mine["start_ns"], mine["end_ns"])
        for lane, route in enumerate(lanes.routes)
        for mine in [spans[spans["lane"] == lane]]
    ]
    makespan_ns = int(spans["end_ns"].max())
    loads = {load["link"]: load for load in link_loads(carried, topology, makespan_ns)}
    to_gpu = [sum(queued[lane]) for lane in range(4)]
    assert loads["cpu0->switch0"]["bytes"] == loads["host0->cpu0"]["bytes"] == sum(to_gpu[:3])
    assert loads["switch0->gpu1"]["bytes"] == to_gpu[1] + to_gpu[3]
    assert loads["gpu0->switch0"]["bytes"] == to_gpu[3]
    assert loads["switch0->cpu0"]["bytes"] == 0
    for load in loads.values():
        # A copy ends within half a ns for each time that it was retimed: less than one in a thousand here.
        assert load["bytes"] <= topology.capacities()[load["link"]] * (load["busy_ms"] / 1e3 + 24e-9)
        assert 0 <= load["utilization"] <= 1.001


def test_a_link_is_busy_while_any_copy_passes_it() -> None:
    topology = fan(2)
    routes = [topology.route("host0", f"gpu{number}") for number in range(2)]
    carried = [
        Carried(routes[0], 50, np.array([0, 300]), np.array([100, 400])),
        Carried(routes[1], np.array([10, 20]), np.array([50, 350]), np.array([150, 360])),
    ]
    loads = {load["link"]: load for load in link_loads(carried, topology, 1000)}
    # Busy from 0 to 150 and from 300 to 400; 130 bytes of the 1,000 that it could have carried.
    assert loads["cpu0->switch0"] == {"link": "cpu0->switch0", "bytes": 130, "busy_ms": 250e-6, "utilization": 0.13}
    assert loads["switch0->gpu1"] == {"link": "switch0->gpu1", "bytes": 30, "busy_ms": 110e-6, "utilization": 0.03}
    assert loads["switch0->cpu0"] == {"link": "switch0->cpu0", "bytes": 0, "busy_ms": 0.0, "utilization": 0.0}
    assert link_loads([], topology, 0)[0]["utilization"] is None


def test_a_link_is_used_within_the_makespan_only() -> None:
    # To 350: all of the first, half of the second (300 to 400) and nothing of what starts then.
    topology = fan(1)
    carried = [Carried(topology.route("host0", "gpu0"), 50, np.array([0, 300, 350]), np.array([100, 400, 360]))]
    loads = {load["link"]: load for load in link_loads(carried, topology, 350)}
    assert loads["cpu0->switch0"]["utilization"] == 75 / 350
    assert loads["cpu0->switch0"]["bytes"] == 150


def test_lanes_need_a_network_only_where_their_copies_can_meet() -> None:
    topology = fan(3, uplink=2 * GB)
    routes = [topology.route("host0", f"gpu{number}") for number in range(3)]
    assert not contended([(route, GB) for route in routes[:2]], topology)
    assert contended([(route, GB) for route in routes], topology)
