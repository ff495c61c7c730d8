"""The machine as a graph: routes by hand, what is refused and how, every shipped machine, and how it is shown."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_profile

from prestage.output.machine import describe, load_links, machine_of, shown_routes
from prestage.output.machine_plot import ROUTES, plot_machine
from prestage.resources.network import Carried, link_loads
from prestage.resources.profile import Profile, load_profile, make_profile, profile_names
from prestage.resources.profile_costs import ProfileError
from prestage.resources.topology import Topology, TopologyError

GB = 10**9
ASSUMED = {"source": "assumed", "note": "for a test"}
MACHINES = [name for name in profile_names() if load_profile(name).topology is not None]


def node(name: str, kind: str, **more: Any) -> dict[str, Any]:
    capacity = {"capacity_bytes": 2**30} if kind in ("gpu", "host", "nvme") else {}
    return {"name": name, "kind": kind, **capacity, **ASSUMED, **more}


def link(a: str, b: str, kind: str, rate: int = GB, latency_ns: int = 0, **more: Any) -> dict[str, Any]:
    return {"ends": [a, b], "kind": kind, "bytes_per_second": rate, "latency_ns": latency_ns, **ASSUMED, **more}


def pair(*links: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Two GPUs behind a switch, and what else joins them."""
    return {
        "nodes": [
            *(node("host0", "host"), node("cpu0", "cpu"), node("switch0", "switch")),
            *(node("gpu0", "gpu"), node("gpu1", "gpu")),
        ],
        "links": [
            link("host0", "cpu0", "dram", 40 * GB, 5, duplex="half"),
            link("cpu0", "switch0", "pcie", 16 * GB, 100),
            link("switch0", "gpu0", "pcie", 16 * GB, 20),
            link("switch0", "gpu1", "pcie", 8 * GB, 20, back_bytes_per_second=4 * GB),
            *links,
        ],
        **more,
    }


def made(data: dict[str, Any]) -> Topology:
    return Topology.model_validate(data)


def problem(topology: dict[str, Any]) -> str:
    """What a profile with this graph is refused with."""
    data = json.loads(tiny_profile().model_dump_json()) | {"topology": topology}
    with pytest.raises(ProfileError) as error:
        make_profile(data, "profile mine.json")
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix("profile mine.json: ")


# Routes.


def test_a_route_names_its_links_its_bottleneck_and_the_sum_of_latencies() -> None:
    route = made(pair()).route("host0", "gpu1")
    assert route.nodes == ("host0", "cpu0", "switch0", "gpu1")
    assert route.links == ("host0<->cpu0", "cpu0->switch0", "switch0->gpu1")
    assert (route.source, route.target, route.staged) == ("host0", "gpu1", False)
    assert (route.bytes_per_second, route.latency_ns) == (8 * GB, 125)
    assert route.ns(80) == 125 + 10
    assert route.ns(81) == 125 + 11  # 10.125 ns, rounded up


def test_a_processor_reads_host_memory_over_its_dram_link() -> None:
    assert made(pair()).route("host0", "cpu0").links == ("host0<->cpu0",)


def test_a_direction_has_its_own_speed_and_a_half_duplex_link_one_name_for_both() -> None:
    route = made(pair()).route("gpu1", "host0")
    assert route.links == ("gpu1->switch0", "switch0->cpu0", "host0<->cpu0")
    assert route.bytes_per_second == 4 * GB


def test_gpus_copy_over_nvlink_if_there_is_one_else_through_the_switch() -> None:
    assert made(pair()).route("gpu0", "gpu1").nodes == ("gpu0", "switch0", "gpu1")
    nvlink = made(pair(link("gpu0", "gpu1", "nvlink", 50 * GB, 7)))
    assert nvlink.route("gpu0", "gpu1").links == ("gpu0->gpu1",)
    assert nvlink.route("host0", "gpu1").nodes[-2] == "switch0"  # no GPU passes bytes on


def test_a_copy_that_the_driver_does_not_let_over_pcie_goes_through_host_memory_and_costs_both_ways() -> None:
    route = made(pair(pcie_peer=False)).route("gpu0", "gpu1")
    assert route.staged
    assert route.nodes == ("gpu0", "switch0", "cpu0", "host0", "cpu0", "switch0", "gpu1")
    assert route.links == (
        "gpu0->switch0", "switch0->cpu0", "host0<->cpu0", "host0<->cpu0", "cpu0->switch0", "switch0->gpu1"
    )  # fmt: skip
    assert route.latency_ns == 125 + 125
    assert route.bytes_per_second == 8 * GB
    # Memory that carries 10 GB/s is written and read: 5 for each.
    slow = pair(pcie_peer=False)
    slow["links"][0]["bytes_per_second"] = 10 * GB
    assert made(slow).route("gpu0", "gpu1").bytes_per_second == 5 * GB


def test_the_widest_way_is_taken_and_of_equals_the_shortest() -> None:
    nodes = [node("host0", "host"), node("cpu0", "cpu"), node("cpu1", "cpu"), node("switch0", "switch")]
    links = [
        link("host0", "cpu0", "dram", 40 * GB),
        link("cpu0", "gpu0", "pcie", 4 * GB),
        link("cpu0", "cpu1", "upi", 30 * GB),
        link("cpu1", "switch0", "pcie", 16 * GB),
        link("switch0", "gpu0", "pcie", 16 * GB),
    ]
    topology = {"nodes": [*nodes, node("gpu0", "gpu")], "links": links}
    assert made(topology).route("host0", "gpu0").nodes == ("host0", "cpu0", "cpu1", "switch0", "gpu0")
    links[1]["bytes_per_second"] = 16 * GB
    assert made(topology).route("host0", "gpu0").nodes == ("host0", "cpu0", "gpu0")


def test_a_gpu_belongs_to_the_host_memory_that_it_reaches_fastest() -> None:
    nodes = [node("host0", "host"), node("host1", "host"), node("cpu0", "cpu"), node("cpu1", "cpu")]
    links = [link(f"host{n}", f"cpu{n}", "dram", 40 * GB) for n in range(2)]
    links += [link(f"cpu{n}", f"gpu{n}", "pcie", 16 * GB) for n in range(2)]
    links.append(link("cpu0", "cpu1", "upi", 30 * GB))
    topology = made({"nodes": [*nodes, node("gpu0", "gpu"), node("gpu1", "gpu")], "links": links})
    assert [topology.host_of(gpu) for gpu in topology.gpus] == ["host0", "host1"]
    assert topology.route("host0", "gpu1").nodes == ("host0", "cpu0", "cpu1", "gpu1")
    assert topology.route("host0", "host1").nodes == ("host0", "cpu0", "cpu1", "host1")


def test_machines_are_joined_by_a_network() -> None:
    nodes, links = [], []
    for n in range(2):
        nodes += [node(f"host{n}", "host"), node(f"cpu{n}", "cpu"), node(f"gpu{n}", "gpu"), node(f"nic{n}", "nic")]
        links += [link(f"host{n}", f"cpu{n}", "dram", 40 * GB), link(f"cpu{n}", f"gpu{n}", "pcie", 16 * GB)]
        links += [link(f"cpu{n}", f"nic{n}", "pcie", 16 * GB), link(f"nic{n}", "switch0", "infiniband", 12 * GB, 600)]
    topology = made({"nodes": [*nodes, node("switch0", "switch")], "links": links})
    route = topology.route("gpu0", "gpu1")
    assert route.nodes == ("gpu0", "cpu0", "nic0", "switch0", "nic1", "cpu1", "gpu1")
    assert (route.bytes_per_second, route.latency_ns) == (12 * GB, 1200)
    assert topology.host_of("gpu1") == "host1"


def test_the_graph_is_a_networkx_one_with_an_edge_for_each_direction() -> None:
    graph = made(pair()).graph()
    assert graph.number_of_nodes() == 5 and graph.number_of_edges() == 8
    assert graph.edges["gpu1", "switch0"]["bytes_per_second"] == 4 * GB
    assert graph.nodes["gpu1"] == {"kind": "gpu", "capacity_bytes": 2**30}


# What is refused.


def test_a_route_that_does_not_exist_is_refused_naming_its_ends() -> None:
    topology = made(pair())
    with pytest.raises(TopologyError, match=r"node = 'gpu2': choose one of .* \(did you mean 'gpu1'\?\)"):
        topology.route("host0", "gpu2")
    with pytest.raises(TopologyError, match="no copy starts or ends at switch0, a switch: give one of cpu, gpu, h"):
        topology.route("switch0", "gpu0")
    with pytest.raises(TopologyError, match="a copy from gpu0 to itself passes no link"):
        topology.route("gpu0", "gpu0")
    data = pair()
    data["nodes"].append(node("nvme0", "nvme"))
    with pytest.raises(TopologyError, match="there is no route from nvme0 to gpu1: link them, or name others"):
        made(data).route("nvme0", "gpu1")


def test_a_gpu_without_a_host_link_is_refused() -> None:
    data = pair(link("gpu0", "gpu1", "nvlink", 50 * GB))
    del data["links"][3]
    assert problem(data) == (
        "topology: gpu1 has no host link: no host memory reaches it; link it to a cpu, root_port or switch"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": {"+": node("gpu1", "gpu")}}, "topology: nodes: gpu1 is given 2 times; give each node a name of its"),
        ({"nodes": {"+": node("gpu3", "gpu")}}, "topology: nodes: GPUs gpu0, gpu1, gpu3: name them gpu0, gpu1, … in"),
        ({"nodes": {0: node("cpu1", "cpu")}}, "topology: nodes: there is no host: give the memory of one NUMA node"),
        ({"nodes": {0: node("host0", "host", capacity_bytes=0)}}, "topology.nodes.0.capacity_bytes = 0: must be great"),
        ({"nodes": {0: node("host0", "host", capacity_bytes=-5)}}, "topology.nodes.0.capacity_bytes = -5: must be gre"),
        (
            {"nodes": {0: node("host0", "host", capacity_bytes=None)}},
            "topology.nodes.0: host0: a host needs capacity_b",
        ),
        (
            {"nodes": {1: node("cpu0", "cpu", capacity_bytes=5)}},
            "topology.nodes.1: cpu0: a cpu holds nothing: capacity",
        ),
        (
            {"nodes": {2: node("switch0", "switch", flops_per_second=5)}},
            "topology.nodes.2: switch0: a switch computes ",
        ),
        ({"nodes": {2: node("switch0", "router")}}, "topology.nodes.2.kind = 'router': must be 'gpu', 'host', "),
        ({"nodes": {2: node("a->b", "switch")}}, "topology.nodes.2.name = 'a->b': must match pattern"),
        (
            {"links": {"+": link("cpu0", "gpu7", "pcie")}},
            "topology: links.4.ends = 'gpu7': choose one of host0, cpu0, ",
        ),
        (
            {"links": {"+": link("gpu1", "switch0", "pcie")}},
            "topology: links.4: gpu1 and switch0 are linked twice; giv",
        ),
        ({"links": {"+": link("gpu1", "gpu1", "nvlink")}}, "topology.links.4: ends: gpu1 is linked to itself"),
        (
            {"links": {"+": link("host0", "gpu1", "pcie")}},
            "topology: links.4: host0 is a host; pcie links join cpu, gp",
        ),
        ({"links": {1: link("cpu0", "switch0", "usb")}}, "topology.links.1.kind = 'usb': must be 'pcie', 'nvlink', "),
        ({"links": {1: link("cpu0", "switch0", "pcie", 0)}}, "topology.links.1.bytes_per_second = 0: must be greater"),
        ({"links": {1: link("cpu0", "switch0", "pcie", 5, -1)}}, "topology.links.1.latency_ns = -1: must be greater"),
        (
            {"links": {1: link("cpu0", "switch0", "pcie", duplex="half", back_bytes_per_second=5)}},
            "topology.links.1: back_bytes_per_second: both directions of a half-duplex link share bytes_per_second",
        ),
        ({"links": {1: link("cpu0", "switch0", "pcie") | {"speed": 5}}}, "topology.links.1.speed: no such key"),
    ],
)
def test_a_bad_graph_is_refused_naming_key_and_value(change: dict[str, dict[Any, Any]], message: str) -> None:
    data = pair()
    for part, changes in change.items():
        for at, value in changes.items():
            if at == "+":
                data[part].append(value)
            else:
                data[part][at] = value
    assert message in problem(data)


# Profiles that extend others.


def write(folder: Path, file: str, **data: Any) -> str:
    path = folder / file
    path.write_text(json.dumps(data))
    return str(path)


def test_a_profile_extends_another_as_a_merge_patch(tmp_path: Path) -> None:
    base = load_profile("rtx3090")
    change = {"d2d": None, "host": {"launch": {"ns": 1}}}
    mine = load_profile(write(tmp_path, "mine.json", extends="rtx3090", name="mine", **change))
    assert (mine.name, mine.d2d, mine.host.launch.ns) == ("mine", None, 1)
    assert mine.host.graph_launch.note == base.host.graph_launch.note
    assert mine.host.launch.note == ""  # it told of the old number
    assert mine.compute == base.compute
    # A path counts from the file's own folder.
    assert load_profile(write(tmp_path, "next.json", extends="mine.json", name="next")).d2d is None


def test_a_profile_that_extends_nothing_known_or_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"mine\.json: extends = 'h201': choose one of .*\(did you mean 'h200'\?\)"):
        load_profile(write(tmp_path, "mine.json", extends="h201"))
    with pytest.raises(ProfileError, match=r"extends = 'no\.json': no such file"):
        load_profile(write(tmp_path, "mine.json", extends="no.json"))
    with pytest.raises(ProfileError, match="extends = 3: give the name of a profile"):
        load_profile(write(tmp_path, "mine.json", extends=3))
    one, two = str(tmp_path / "one.json"), str(tmp_path / "two.json")
    write(tmp_path, "one.json", extends=two)
    write(tmp_path, "two.json", extends=one)
    with pytest.raises(ProfileError, match=r"one\.json: extends itself by way of .*one\.json, .*two\.json"):
        load_profile(one)


# Every shipped machine.


def test_the_machines_are_shipped() -> None:
    assert {"h200-x2", "h200-hgx-x8", "rtx3090-x2", "rtx4090-x4", "rtx3090-nvme", "gb200"} <= set(MACHINES)


def shipped(name: str) -> tuple[Profile, Topology]:
    profile = load_profile(name)
    assert profile.topology is not None
    return profile, profile.topology


@pytest.mark.parametrize("name", MACHINES)
def test_every_host_memory_reaches_every_gpu_and_back_and_every_gpu_each_other(name: str) -> None:
    _, topology = shipped(name)
    ends = [*permutations([*topology.hosts, *topology.gpus], 2)]
    ends += [(nvme, host) for nvme in topology.named("nvme") for host in topology.hosts]
    for source, target in ends:
        route = topology.route(source, target)
        assert (route.source, route.target) == (source, target)
        assert route.bytes_per_second <= min(topology.capacities()[link] for link in route.links)


@pytest.mark.parametrize("name", MACHINES)
def test_a_copy_alone_asks_for_no_more_than_its_links_carry(name: str) -> None:
    # Otherwise the graph would stretch what was measured alone, and one GPU's timings would move.
    profile, topology = shipped(name)
    host, gpu = topology.host_of("gpu0"), "gpu0"
    directions = [(costs, topology.route(host, gpu)) for costs in profile.h2d.values()]
    directions.append((profile.d2h, topology.route(gpu, host)))
    if profile.peer is not None and len(topology.gpus) > 1:
        directions.append((profile.peer, topology.route("gpu0", "gpu1")))
    for costs, route in directions:
        for cost in (costs.alone, costs.queued):
            for size_bytes in (2**exponent for exponent in range(10, 31)):
                assert size_bytes * 1e9 / cost.ns(size_bytes) <= route.bytes_per_second


@pytest.mark.parametrize("name", MACHINES)
def test_every_gpu_has_the_memory_that_the_profile_says(name: str) -> None:
    profile, topology = shipped(name)
    assert {topology.node(gpu).capacity_bytes for gpu in topology.gpus} == {profile.gpu_memory_bytes}


def test_two_h200s_that_load_at_once_take_what_was_measured() -> None:
    # 336 MiB in 6.39 ms on one; on each of two in 6.69: together they get 105.3 of the 111 GB/s of their own links.
    profile, topology = shipped("h200-x2")
    size_bytes = 336 * 2**20
    together_ns = 2 * size_bytes * 10**9 / topology.capacities()["host0<->cpu0"]
    assert together_ns == pytest.approx(6.69e6, rel=1e-3)
    assert profile.h2d["pinned"].queued.ns(size_bytes) == pytest.approx(6.39e6, rel=2e-3)
    assert len({topology.route("host0", gpu).links[1] for gpu in topology.gpus}) == 2  # separate links
    assert topology.route("gpu0", "gpu1").links == ("gpu0->gpu1",)


def test_eight_h200s_have_two_numa_nodes_and_share_uplinks_in_pairs() -> None:
    _, topology = shipped("h200-hgx-x8")
    assert [topology.host_of(gpu) for gpu in topology.gpus] == ["host0"] * 4 + ["host1"] * 4
    uplinks = [topology.route(topology.host_of(gpu), gpu).links[1] for gpu in topology.gpus]
    assert uplinks[::2] == uplinks[1::2] and len(set(uplinks)) == 4
    assert topology.route("gpu0", "gpu7").nodes == ("gpu0", "nvswitch0", "gpu7")


@pytest.mark.parametrize("name", ["rtx3090-x2", "rtx4090-x4"])
def test_geforce_cards_copy_to_each_other_through_host_memory(name: str) -> None:
    assert shipped(name)[1].route("gpu0", "gpu1").staged


# How it is shown.


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_is_told_whole(name: str) -> None:
    profile, topology = shipped(name)
    data = describe(profile)
    assert [link["link"] for link in data["links"]] == list(topology.capacities())
    over = {(route["from"], route["to"]): route["links"] for route in data["routes"]}
    assert over == {(route.source, route.target): list(route.links) for route in shown_routes(topology)}
    for row in data["links"]:
        ends = [tuple(route.split("->")) for route in row["routes"]]
        assert ends == [pair for pair, links in over.items() if row["link"] in links]
    assert json.loads(json.dumps(data)) == data


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_is_drawn_with_every_node_apart_and_every_link_labelled(name: str) -> None:
    _, topology = shipped(name)
    figure = plot_machine(describe(load_profile(name)))
    (axes,) = figure.axes
    figure.canvas.draw()
    boxes = {text.get_text().split("\n")[0]: text.get_window_extent() for text in axes.texts}
    nodes = [boxes[node.name] for node in topology.nodes]
    assert not any(a.overlaps(b) for number, a in enumerate(nodes) for b in nodes[:number])
    assert len(axes.texts) == len(topology.nodes) + len(topology.links)
    words = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for number, a in enumerate(words) for b in words[:number])
    colors = {line.get_color() for line in axes.lines}
    assert {color for _, color in ROUTES.values()} & colors


def test_what_a_run_moved_over_each_link_is_told_beside_it(tmp_path: Path) -> None:
    profile, topology = shipped("h200-x2")
    size_bytes = topology.capacities()["host0<->cpu0"] // 1000
    carried = [Carried(topology.route("host0", "gpu1"), size_bytes, np.array([0]), np.array([2 * 10**6]))]
    loads = link_loads(carried, topology, 4 * 10**6)
    time = {f"{part}_ms": 0.0 for part in ("stall", "host", "predictor", "bubble", "drain")}
    run = {"makespan_ms": 4.0, "time": {"compute_ms": 4.0, **time}, "scenario": {}}
    (tmp_path / "result.json").write_text(json.dumps({**run, "links": loads}))
    data = describe(profile, load_links(str(tmp_path)))
    told = {row["link"]: (row["bytes"], row["busy_ms"], row["utilization"]) for row in data["links"]}
    # They take 1 ms of all that memory carries; the run took 4.
    assert told["host0<->cpu0"] == (size_bytes, 2.0, pytest.approx(0.25))
    assert told["cpu0->gpu0"] == (0, 0.0, 0.0)
    assert "25%" in {text.get_text().split("\n")[-1] for text in plot_machine(data).axes[0].texts}

    with pytest.raises(ValueError, match="its links are not those of profile gb200"):
        describe(load_profile("gb200"), loads)
    (tmp_path / "result.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match=r"--result out: there is no such folder; give a result\.json"):
        load_links("out")
    with pytest.raises(ValueError, match="tells no links: only runs on a profile with a topology do"):
        load_links(str(tmp_path))


def test_a_machine_is_named_by_its_profile_or_by_a_scenario(tmp_path: Path) -> None:
    assert machine_of("gb200").name == "gb200"
    scenario = tmp_path / "mine.toml"
    scenario.write_text('[machine]\nprofile = "rtx4090-x4"\n[workload.synthetic]\ntokens = 3\n')
    assert machine_of(str(scenario)).name == "rtx4090-x4"
    with pytest.raises(ProfileError, match="profile rtx3090 is one GPU behind one link: it has no topology; gb200, h1"):
        machine_of("rtx3090")
    with pytest.raises(ProfileError, match=r"MACHINE = 'gb300': choose one of .* \(did you mean 'gb200'\?\)"):
        machine_of("gb300")
