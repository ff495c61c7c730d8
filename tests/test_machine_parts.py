"""Machines from parts: how parts are written, what the tables hold, and that what comes of them is a profile."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import prestage
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.origins import origins
from prestage.engine.scenario.scenario import apply_setting, load_scenario, make_scenario
from prestage.engine.simulate import simulate
from prestage.experiments.grid import make_grid
from prestage.resources.facts import Fact
from prestage.resources.parts import reached
from prestage.resources.parts.chosen import choose
from prestage.resources.parts.kernels import Group, KernelFit
from prestage.resources.parts.section import lay_machine, of_parts
from prestage.resources.parts.tables import cpus, drives, find_cpu, find_gpu, gpus, memory_kinds, published
from prestage.resources.parts.written import parse_drive, parse_link, parse_ram, split_parts, times
from prestage.resources.profile import load_profile
from prestage.resources.profile_costs import KernelRule, ProfileError
from prestage.workloads.model import load_model

GIB = 2**30
WORKLOAD = {"synthetic": {"tokens": 4}, "tokens": 4}


def costs(part: BaseModel) -> Iterator[Fact]:
    if isinstance(part, Fact):
        yield part
    for name in type(part).model_fields:
        value = getattr(part, name)
        for entry in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,):
            if isinstance(entry, BaseModel):
                yield from costs(entry)


# How parts are written.


@pytest.mark.parametrize(
    ("text", "size_gib", "gb_per_s", "channels"),
    [
        ("2x DDR5-5600", None, 89.6, 2),  # 2 x 8 bytes x 5,600 MT/s
        ("64GB DDR5-5600", 64, 89.6, 2),
        ("2x32GB DDR5-5600", 64, 89.6, 2),
        ("4x16GB DDR4-3200", 64, 51.2, 2),  # four modules share two channels
        ("8x DDR4-2666", None, 170.624, 8),
        ("512GB 8x DDR4-2666", 512, 170.624, 8),
        ("1TB 16x DDR5-4800", 1024, 614.4, 16),
        ("128GB 256-bit LPDDR5X-8000", 128, 256.0, 2),
        ("64 GiB 84.5GB/s", 64, 84.5, None),
        ("84.5 GB/s", None, 84.5, None),
    ],
)
def test_memory_is_read_as_it_is_sold(text: str, size_gib: int | None, gb_per_s: float, channels: int | None) -> None:
    ram = parse_ram(text)
    assert ram.capacity_bytes == (None if size_gib is None else size_gib * GIB)
    assert ram.rate is not None and ram.rate.bytes_per_second == round(gb_per_s * 1e9)
    assert ram.channels == channels
    assert ram.rate.given == ("GB/s" in text)


def test_a_processor_with_more_channels_fills_them_all() -> None:
    assert parse_ram("256GB DDR4-3200", most_channels=8).channels == 8
    epyc = choose("gpu=rtx3090, cpu=epyc-7742, ram=256GB DDR4-2666")
    assert epyc.ram.rate is not None and epyc.ram.rate.bytes_per_second == 170_624_000_000
    both = choose("gpu=rtx3090, cpu=2x xeon-8480+")
    assert both.ram.channels == 16  # nothing said of memory: both sockets' channels at the processor's rate
    assert both.processor.title == "2 x Intel Xeon Platinum 8480+"


@pytest.mark.parametrize(
    ("text", "gb_per_s"),
    [
        ("pcie4 x16", 31.5077),
        ("PCIe 5.0 x8", 31.5077),
        ("pcie gen3 x4", 3.9385),
        ("25.2GB/s", 25.2),
        ("nvlink-c2c", 450),
    ],
)
def test_a_links_rate_is_a_lanes_times_the_lanes_after_the_line_code(text: str, gb_per_s: float) -> None:
    assert parse_link(text).bytes_per_second / 1e9 == pytest.approx(gb_per_s, rel=1e-4)


def test_a_drive_may_have_a_size_a_rate_or_a_name() -> None:
    assert parse_drive("2TB 7 GB/s")[0] == 2 * 10**12
    assert parse_drive("405MiB/s")[1].bytes_per_second == 405 * 2**20
    assert parse_drive("1TB samsung-990-pro")[1].bytes_per_second == 7_450_000_000


@pytest.mark.parametrize("text", ["2x rtx3090", "2 x rtx3090", "2xrtx3090"])
def test_several_of_a_part_are_told_by_a_number(text: str) -> None:
    assert times(text) == (2, "rtx3090")
    assert times("rtx3090") == (1, "rtx3090")


@pytest.mark.parametrize("text", ["rtx4090", "RTX 4090", "4090", "NVIDIA GeForce RTX 4090", "geforce rtx-4090"])
def test_a_gpu_is_found_by_the_names_that_people_give_it(text: str) -> None:
    assert find_gpu(text).name == "rtx4090"


@pytest.mark.parametrize("text", ["7950x", "Ryzen 9 7950X", "AMD Ryzen 9 7950X"])
def test_a_processor_is_found_by_the_names_that_people_give_it(text: str) -> None:
    assert find_cpu(text).name == "7950x"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu=a100", "there are several: choose one of a100-40gb, a100-80gb"),
        ("gpu=rtx4091", r"did you mean 'rtx4090'"),
        ("gpu=7950x", "is a processor: set machine.cpu, and machine.gpu = 'none'"),
        ("ram=64GB", "name its gpu"),
        ("gpu=rtx4090, gpu=rtx3090", "gpu is given twice"),
        ("gpu=rtx4090, disk=1TB", "part = 'disk': choose one of gpu"),
        ("gpu=rtx4090, ram", "write it as gpu=rtx4090, ram=2x DDR5-5600"),
        ("gpu=rtx4090, ram=lots", "write it as '2x DDR5-5600'"),
        ("gpu=rtx4090, ram=2x DDR6-5600", "kind = 'DDR6': choose one of"),
        ("gpu=rtx4090, ram=2x DDR5-99999", "DDR5 has 3200 to 9600 MT/s"),
        ("gpu=rtx4090, ram=LPDDR5X-8000", "say how wide it is"),
        ("gpu=rtx4090, link=pcie4 x32", "give x1 to x16"),
        ("gpu=rtx4090, link=pcie9", "choose one of pcie1 x16"),
        ("gpu=rtx4090, link=0GB/s", "must be more than 0"),
        ("gpu=rtx4090, cpu=7951x", "did you mean"),
        ("gpu=rtx4090, drive=fast", "machine.drive = 'fast': choose one of"),
        ("gpu=2x rtx3090", "say what the host's memory holds"),
        ("gpu=2x m3-ultra", "is one with the host's memory: give 1"),
        ("gpu=m3-ultra, link=pcie4", "has the host's memory, and no link"),
        ("gpu=none, cpu=7950x", "give ram with its size"),
        ("gpu=rtx3090, gpus=two", "gpus = 'two': give a number"),
        ("gpu=0x rtx3090", "give at least 1x"),
        ("gpu=2x rtx3090, gpus=3, ram=64GB DDR5-5600", "machine.gpu says 2x already"),
        ("gpu=rtx3090, cpu=0 cores 3GHz", "give at least one core"),
        ("gpu=rtx3090, cpu=4 cores 0GHz", "more than 0"),
        ("gpu=rtx3090, cpu=7950x, ram=8x DDR5-5600", "the processor has 2 channels"),
        ("gpu=rtx3090, link=nvlink-c2c", "rtx3090 is not on one: give pcie4 x16"),
    ],
)
def test_what_is_no_part_is_refused_with_what_would_do(name: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        load_profile(name)


# The tables.


def test_the_tables_hold_what_is_promised() -> None:
    assert sum(not gpu.unified for gpu in gpus().values()) >= 45
    assert sum(gpu.unified for gpu in gpus().values()) >= 15
    assert len(cpus()) >= 25
    assert len(drives()) >= 10


@pytest.mark.parametrize("name", [*gpus()])
def test_every_gpu_is_found_by_its_name_and_full_name_and_makes_a_profile(name: str) -> None:
    gpu = gpus()[name]
    assert find_gpu(name) is gpu
    assert find_gpu(gpu.title) is gpu
    profile = load_profile(f"gpu={name}, ram=64GB 50GB/s")
    assert profile.gpu_memory_bytes == (64 * GIB if gpu.unified else gpu.memory_bytes)
    assert {cost.source for cost in costs(profile)} <= {"datasheet", "assumed"}
    rule = profile.compute.rule
    assert rule.bytes_per_second < gpu.memory_bytes_per_second
    assert rule.uncertainty is not None and rule.uncertainty.held_back_error > 0


@pytest.mark.parametrize("name", [*cpus()])
def test_every_processor_is_found_by_its_name_and_fills_its_channels(name: str) -> None:
    assert find_cpu(name) is find_cpu(cpus()[name].title)
    parts = choose(f"gpu=rtx4090, cpu={name}")
    assert parts.ram.rate is not None and parts.cpu_reach is not None
    assert parts.cpu_reach.bytes_per_second < parts.ram.rate.bytes_per_second


def test_every_line_of_the_tables_names_its_source() -> None:
    rows: list[Any] = [*gpus().values(), *cpus().values(), *drives().values(), *memory_kinds().values(), *published()]
    assert all(len(row.source) > 8 for row in rows)


# What is reached, by hand.


def test_a_share_is_the_geometric_mean_and_its_spread_that_of_one_machine() -> None:
    share = reached.Share((0.5, 0.8))
    assert share.middle == pytest.approx(math.sqrt(0.4))
    assert share.spread == pytest.approx(abs(math.log(0.5 / 0.8)) / math.sqrt(2))


def test_pageable_copies_are_as_quick_as_those_of_known_machines_in_the_middle() -> None:
    h200 = reached.measured("h200")
    times = reached.pageable_times(h200)
    # Itself, the other measured one, and a published one of four sizes, each over what the H200's host takes for it.
    queued = dict(h200.data["h2d"]["pageable"]["queued"]["points"])
    published = {2**20: 13.73, 2**22: 17.07, 2**24: 18.42, 2**26: 12.88}
    ratios = [rate * queued[size] / size for size, rate in published.items()]
    assert times.values[0] == 1 and times.values[2] == pytest.approx(math.prod(ratios) ** 0.25)
    size, ns = (load_profile("gpu=rtx4090").h2d["pageable"].queued.points or ())[-1]
    nearest = reached.nearest(find_gpu("rtx4090"))
    theirs = dict(nearest.data["h2d"]["pageable"]["queued"]["points"])
    least_ns = min(theirs.values())
    assert (theirs[size] - least_ns) / (ns - least_ns) == pytest.approx(
        reached.pageable_times(nearest).middle, rel=1e-3
    )


def test_shares_come_from_the_measured_profiles_and_from_what_is_published() -> None:
    h200 = load_profile("h200").h2d["pinned"].queued.bytes_per_second
    assert h200 is not None
    assert reached.link_share().values[0] == pytest.approx(h200 / (16 * 32e9 * 128 / 130 / 8), rel=1e-6)
    assert len(reached.link_share(without=["h200"]).values) == len(reached.link_share().values) - 1
    assert reached.link_share().values[2] == pytest.approx(25.2e9 / (16 * 16e9 * 128 / 130 / 8), rel=1e-6)


def test_a_group_of_kernels_takes_its_products_its_small_ones_and_its_bytes() -> None:
    gpu = find_gpu("h100")  # 3,350 GB/s, 989.5 TFLOP/s
    fit = KernelFit(1000, 100, 10, memory_share=0.5, flops_share=1.0, beside_copy_factor=1.0)
    group = Group("expert", 3350e6, 1675e6, products=3, kernels=5, tokens=1, eager=True, ns=0)
    assert fit.ns(gpu, group) == pytest.approx(3 * 1000 + 2 * 100 + 5 * 10 + 2e6)
    many = group._replace(tokens=2**20)  # bound by operations: 2 x weights x tokens
    assert fit.ns(gpu, many) == pytest.approx(3250 + 2 * 1675e6 * 2**20 / 989.5e12 * 1e9)


def test_the_rule_of_a_profile_counts_the_same() -> None:
    rule = KernelRule(
        source="assumed", constant_ns=5, bytes_per_second=1, flops_per_second=1, beside_copy_factor=1.0,
        product_ns=1000, small_kernel_ns=100, eager_kernel_ns=10,
    )  # fmt: skip
    assert rule.group_ns(5, 3, eager=False) == 5 + 3000 + 200
    assert rule.group_ns(5, 3, eager=True) == 5 + 3000 + 200 + 50


def test_the_nearest_measured_machine_is_by_the_ratio_of_memory_rates() -> None:
    assert reached.nearest(find_gpu("rtx4090")).name == "h100-x2"
    assert reached.nearest(find_gpu("b200")).name == "h200"
    assert reached.nearest(find_gpu("h200"), without=["h200"]).name == "h100-x2"


def test_a_gpu_without_units_for_8_bits_multiplies_them_in_16() -> None:
    named = "times its float8 FLOP/s"
    h200, ada, ampere = (find_gpu(name) for name in ("h200", "rtx4090", "rtx3090"))
    for gpu, flops in ((ada, ada.flops_per_second["float8"]), (ampere, ampere.flops_per_second["bfloat16"])):
        surface = reached.surface_of(gpu)
        assert surface is not None and surface.note is not None
        assert f"{flops / h200.flops_per_second['float8']:.3g} {named}" in surface.note


# The machine that comes of it.


def test_copies_go_at_what_the_slower_of_link_and_memory_reaches() -> None:
    share = reached.link_share().middle
    fast = load_profile("gpu=rtx4090, link=pcie4 x16, ram=2x DDR5-5600").h2d["pinned"].queued
    assert fast.bytes_per_second == pytest.approx(share * 31.5077e9, rel=5e-3)
    slow = load_profile("gpu=rtx4090, ram=64GB 4GB/s")
    assert slow.h2d["pinned"].queued.bytes_per_second == 4 * 10**9
    pageable = slow.h2d["pageable"].queued.points
    assert pageable is not None and pageable[-1] == (2**30, 2**30 // 4)  # no faster than the memory


def test_the_link_is_no_newer_than_the_processors() -> None:
    old = choose("gpu=rtx5090, cpu=i9-10900x")
    assert old.link is not None and "pcie3 x16" in old.link.words
    new = choose("gpu=rtx5090, cpu=9950x")
    assert new.link is not None and "pcie5 x16" in new.link.words


def test_what_is_given_is_taken_as_it_is() -> None:
    queued = load_profile("gpu=rtx4090, link=25.2GB/s").h2d["pinned"].queued
    assert queued.bytes_per_second == 25_200_000_000
    assert queued.uncertainty is not None and queued.uncertainty.held_back_error == 0


def test_what_no_datasheet_tells_is_anothers_and_is_off_by_as_much_as_machines_differ() -> None:
    profile = load_profile("gpu=rtx4090")
    measured = load_profile("h100-x2")
    launch = profile.host.launch
    assert (launch.ns, launch.source, launch.device) == (measured.host.launch.ns, "assumed", measured.device)
    assert launch.uncertainty is not None
    assert launch.uncertainty.held_back_error == pytest.approx(reached.transfer_spread("host"), abs=1e-5)


def test_more_than_two_channels_are_read_at_less_of_their_rate() -> None:
    desktop, server = reached.ram_share(2), reached.ram_share(8)
    by_hand = [36 / 48, 46 / 51.2, 95 / 102.4, 63 / 76.8]
    assert sorted(desktop.values) == pytest.approx(sorted(by_hand))
    assert len(server.values) == 6 and server.middle < 0.75 < desktop.middle
    rates = {ram: load_profile(f"gpu=rtx4090, ram={ram}").processor for ram in ("2x DDR4-3200", "8x DDR4-3200")}
    two, eight = (rate.bytes_per_second for rate in rates.values() if rate is not None)
    assert eight / two == pytest.approx(4 * server.middle / desktop.middle, rel=0.01)


def test_several_gpus_are_a_graph_on_one_memory() -> None:
    topology = load_profile("gpu=2x rtx3090, ram=128GB DDR4-3200, drive=2TB 7GB/s").topology
    assert topology is not None
    assert topology.gpus == ("gpu0", "gpu1")
    assert topology.route("gpu0", "gpu1").staged  # a GeForce reads no other's memory
    peer = load_profile("gpu=2x rtx3090, ram=128GB DDR4-3200").peer
    assert peer is not None  # into and out of the host's memory, which both halves share
    assert peer.queued.bytes_per_second == pytest.approx(51.2e9 * reached.ram_share(2).middle / 2, rel=5e-3)
    assert topology.node("host0").capacity_bytes == 128 * GIB
    assert topology.named("nvme") == ("nvme0",)
    with_switch = load_profile("gpu=8x h100, ram=1TB 16x DDR5-4800")
    assert with_switch.topology is not None and with_switch.peer is not None
    assert with_switch.topology.route("gpu0", "gpu7").bytes_per_second == 450 * 10**9


def test_one_memory_has_no_copies_and_a_processor_launches_nothing() -> None:
    apple = load_profile("gpu=m3-ultra")
    assert apple.unified_memory and apple.gpu_memory_bytes == 512 * GIB
    alone = load_profile("gpu=none, cpu=7950x, ram=64GB DDR5-5200")
    assert alone.unified_memory and alone.gpu_memory_bytes == 64 * GIB
    assert alone.host.launch.ns == 0
    assert alone.compute.rule.bytes_per_second == pytest.approx(reached.cpu_share().middle * 83.2e9, rel=5e-3)


def test_copies_and_experts_on_the_processor_share_the_memory() -> None:
    tight = load_profile("gpu=rtx4090, ram=2x DDR4-3200")
    assert tight.contention is not None and tight.contention.copy_beside_cpu_experts is not None
    ram, cpu = 51.2 * reached.ram_share(2).middle, 51.2 * reached.cpu_share().middle
    both = cpu + 31.5077 * reached.link_share().middle
    assert tight.contention.copy_beside_cpu_experts.factor == pytest.approx(both / ram, rel=0.01)
    wide = load_profile("gpu=rtx4090, ram=12x DDR5-4800")
    assert wide.contention is not None and wide.contention.copy_beside_cpu_experts is not None
    assert wide.contention.copy_beside_cpu_experts.factor == 1.0


def test_a_profile_may_extend_a_machine_from_parts(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"extends": "gpu=rtx4090", "name": "mine", "host": {"launch": {"ns": 1}}}))
    mine = load_profile(str(path))
    assert mine.host.launch.ns == 1
    assert mine.compute.rule == load_profile("gpu=rtx4090").compute.rule


# In a scenario.


def test_parts_in_a_scenario_are_the_name_of_a_profile() -> None:
    machine: dict[str, Any] = {"gpu": "rtx4090", "gpus": 2, "ram": "64GB DDR5-5600"}
    scenario = make_scenario({"machine": machine, "workload": WORKLOAD})
    assert scenario.machine.profile == "gpu=rtx4090, gpus=2, ram=64GB DDR5-5600"
    assert scenario.plain()["machine"] == {"profile": scenario.machine.profile}
    assert make_scenario(scenario.plain()).machine == scenario.machine
    assert load_scenario("synthetic", ["machine.gpu=4090"]).machine.profile == "gpu=4090"  # a number, as TOML reads it


@pytest.mark.parametrize(
    ("sections", "stages"),
    [
        ({"machine": {"gpu": "rtx4090", "gpus": 4}}, 4),
        ({"machine": {"gpu": "4x rtx4090"}}, 4),
        ({"machine": {"profile": "gpu=4x rtx4090"}, "parallel": {"placement": "linear"}}, 4),
        ({"machine": {"gpu": "rtx4090"}}, 1),
        ({"machine": {"profile": "h200-hgx-x8"}}, 1),  # a profile of eight is taken for what it costs
        ({"machine": {"gpu": "4x rtx4090"}, "parallel": {"stages": 2}}, 2),
        ({"machine": {"gpu": "4x rtx4090"}, "parallel": {"gpus": 4}}, 1),
        ({"machine": {"gpu": "2x rtx4090"}, "copy": {"source": "peer"}}, 1),
        ({"machine": {"gpu": "2x rtx4090"}, "workload": {"synthetic": {"tokens": 4}}, "requests": {"rate": 1.0}}, 1),
    ],
)
def test_gpus_that_parts_count_are_stages_where_nothing_says_what_they_do(
    sections: dict[str, Any], stages: int
) -> None:
    scenario = make_scenario({"workload": WORKLOAD, **sections})
    assert scenario.parallel.stages == stages
    assert make_scenario(scenario.plain()) == scenario


def test_a_setting_of_several_gpus_is_shown_as_what_follows_from_it() -> None:
    scenario, keys = origins("one-gpu", ["machine.gpus=4"])
    assert scenario == load_scenario("one-gpu", ["machine.gpu=4x rtx4090"]).model_copy(
        update={"machine": scenario.machine}
    )
    assert next(key for key in keys if key.key == "parallel.stages")[1:] == (4, 1, "follows from others")


@pytest.mark.parametrize(
    ("first", "then", "parallel"),
    [
        (["machine.gpu=rtx4090"], "machine.gpus=4", (4, 1)),
        (["machine.gpu=4x rtx4090"], "machine.gpu=2x rtx4090", (2, 1)),
        (["machine.gpu=4x rtx4090"], "machine.profile=h200-pcie5", (1, 1)),
        (["machine.gpu=2x rtx4090"], "parallel.gpus=2", (1, 2)),
        (["machine.gpu=2x rtx4090"], "requests.rate=1", (1, 1)),
        (["machine.gpu=2x rtx4090", "copy.source=peer"], "copy.source=host", (2, 1)),
        (["machine.gpu=4x rtx4090", "parallel.stages=2"], "machine.gpus=4", (2, 1)),
        (["machine.gpu=4x rtx4090", "parallel.gpus=4"], "machine.gpu=8x rtx4090", (1, 4)),
    ],
)
def test_what_gpus_do_is_worked_out_anew_over_a_whole_scenario(
    first: list[str], then: str, parallel: tuple[int, int]
) -> None:
    whole = load_scenario("one-gpu", first).plain()  # as the base of a sweep has it, with all keys
    apply_setting(whole, then)
    section = make_scenario(whole).parallel
    assert (section.stages, section.gpus) == parallel


def test_a_grid_of_gpus_is_of_as_many_stages() -> None:
    grid = make_grid("one-gpu", {"machine.gpus": [1, 2, 4]}, settings=["machine.gpu=rtx4090"])
    assert [grid.scenario(point).parallel.stages for point in grid.points()] == [1, 2, 4]


def test_a_setting_of_a_part_takes_a_profiles_place_and_leaves_other_parts() -> None:
    scenario = load_scenario("synthetic", ["machine.gpu=rtx4090", "machine.ram=2x DDR5-5600"])
    assert scenario.machine.profile == "gpu=rtx4090, ram=2x DDR5-5600"
    data = scenario.plain()
    lay_machine(data["machine"], "gpu")
    data["machine"]["gpu"] = "rtx3090"
    assert make_scenario(data).machine.profile == "gpu=rtx3090, ram=2x DDR5-5600"
    back = load_scenario("synthetic", ["machine.gpu=rtx4090", "machine.profile=rtx3090"])
    assert back.machine.profile == "rtx3090"
    without = load_scenario("synthetic", ["machine.gpu=rtx4090", "machine.ram=2x DDR5-5600", "machine.ram="])
    assert without.machine.profile == "gpu=rtx4090"
    assert load_scenario("synthetic", ["machine.ram="]).machine.profile == "h200-pcie5"


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"gpu": "rtx4090", "profile": "h200"}, "give a profile, or parts"),
        ({"ram": "64GB"}, "name the gpu too"),
        ({"gpu": "rtx4090", "gpus": "2"}, r"machine\.gpus = '2': must be a valid integer"),
        ({"gpu": ["rtx4090"]}, r"machine\.gpu: must be a valid string"),
        ({"gpu": "rtx4090, ram=1"}, "give one part"),
    ],
)
def test_a_section_that_says_two_things_or_none_is_refused(machine: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        make_scenario({"machine": machine, "workload": WORKLOAD})


def test_a_section_without_parts_stays_as_it_is() -> None:
    assert of_parts({"profile": "h200"}) == {"profile": "h200"}
    assert split_parts("gpu=rtx4090,ram=2x DDR5-5600") == {"gpu": "rtx4090", "ram": "2x DDR5-5600"}


def run(*settings: str, replicates: int = 0) -> dict[str, Any]:
    small = ["model.preset=gpt-oss-20b", "workload.tokens=4", "workload.synthetic.prefill_tokens=4"]
    return simulate(load_scenario("synthetic", [*small, *settings]), baselines=False, replicates=replicates).data


def test_a_run_says_that_every_cost_is_estimated_and_how_far_off_it_may_be() -> None:
    data = run("machine.gpu=rtx4090", "machine.ram=64GB DDR5-5600", replicates=8)
    estimated = next(said for said in data["warnings"] if said.startswith("estimated cost"))
    assert "dense part, expert, head" in estimated
    said = next(said for said in data["warnings"] if said.startswith("uncalibrated"))
    assert "h2d.pinned.queued (datasheet)" in said and "host" in said and "(of NVIDIA H100" in said
    assert not [warning for warning in data["warnings"] if "too narrow" in warning]
    low, high = (data["replicates"]["makespan_ms"][name] for name in ("p5", "p95"))
    assert 0.02 < (high - low) / data["makespan_ms"] < 1.0


def test_experts_on_the_processor_go_at_what_its_memory_gives() -> None:
    settings = ["miss.policy=cpu", "memory.preload=layers", "memory.cpu_layers=18", "memory.eviction=static"]
    settings += ["prefetch.policy=none", "machine.gpu=rtx4090"]
    slow, fast = (run(*settings, f"machine.ram=64GB {rate}GB/s") for rate in (20, 80))
    assert slow["miss"]["ways"]["cpu"] == fast["miss"]["ways"]["cpu"] > 0
    assert slow["makespan_ms"] > 1.5 * fast["makespan_ms"]


@pytest.mark.parametrize("name", sorted(name for name, gpu in gpus().items() if gpu.unified))
def test_a_gpu_that_has_the_hosts_memory_runs_llama_cpp_by_its_name_alone(name: str) -> None:
    # llama.cpp copies from pageable memory and computes misses on the processor: here nothing is copied, and the
    # processor reads the GPU's own memory.
    result = prestage.simulate(
        "one-gpu",
        settings={"machine.profile": f"gpu={name}", "runtime.name": "llama.cpp"},
        preset="deepseek-v2-lite", bits_per_weight=4.85, tokens=8, baselines=False,
    )  # fmt: skip
    assert result.data["hit_rate"] == 1.0
    model, gpu = load_model("deepseek-v2-lite", bits_per_weight=4.85), gpus()[name]
    assert model.active_parameters is not None
    most = gpu.memory_bytes_per_second / (model.active_parameters * 4.85 / 8)
    assert 0.2 * most < result.data["tokens_per_second"] < most
    processor = load_profile(f"gpu={name}").processor
    assert processor is not None
    assert 0.5 * gpu.memory_bytes_per_second < processor.bytes_per_second < gpu.memory_bytes_per_second
