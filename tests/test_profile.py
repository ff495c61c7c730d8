"""Profiles: what a copy costs, by hand and by theory; every shipped one conforms; a bad one is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from tiny import tiny_costs, tiny_profile

from prestage.engine.scenario.scenario import load_scenario
from prestage.resources.facts import Samples
from prestage.resources.profile import Profile, load_profile, make_profile, profile_names
from prestage.resources.profile_costs import ProfileError, TransferCost
from prestage.workloads.model import load_model

MIB = 2**20
GUIDE_BYTES = 27 * MIB
SOURCES = {"measured", "published", "datasheet", "fitted", "assumed"}


def line(latency_ns: int, bytes_per_second: int) -> TransferCost:
    return TransferCost(source="assumed", latency_ns=latency_ns, bytes_per_second=bytes_per_second)


def table(*points: tuple[int, int]) -> TransferCost:
    return TransferCost(source="assumed", points=points)


def costs_of(part: BaseModel, at: str = "") -> Iterator[tuple[str, BaseModel]]:
    """Every cost of a profile, with its place."""
    for name in type(part).model_fields:
        value = getattr(part, name)
        values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
        for number, item in enumerate(values):
            if isinstance(item, BaseModel) and not isinstance(item, Samples):
                place = f"{at}{name}[{number}]" if len(values) > 1 else f"{at}{name}"
                if "note" in type(item).model_fields:
                    yield place, item
                yield from costs_of(item, f"{place}.")


# What a copy costs.


def test_a_line_is_latency_and_bytes_rounded_up_to_the_nanosecond() -> None:
    cost = line(100, 3 * 10**9)  # 3 bytes a ns
    assert [cost.ns(size) for size in (0, 1, 3, 4, 9)] == [100, 101, 101, 102, 103]


def test_a_table_runs_straight_between_its_points_and_on_beyond_its_ends() -> None:
    cost = table((10, 100), (20, 200), (40, 240))
    assert [cost.ns(size) for size in (10, 15, 20, 30, 40)] == [100, 150, 200, 220, 240]  # the points, and midway
    assert [cost.ns(size) for size in (5, 0)] == [50, 0]  # 10 ns a byte below
    assert [cost.ns(size) for size in (50, 140)] == [260, 440]  # 2 ns a byte above
    assert cost.ns(21) == 202
    assert table((10, 10), (20, 1010)).ns(5) == 0  # 10 - 5 x 100 ns would be negative
    assert table((0, 0), (3, 10)).ns(1) == 4  # 3.33, rounded up


@given(
    st.lists(st.tuples(st.integers(1, 10**9), st.integers(0, 10**9)), min_size=2, max_size=6),
    st.lists(st.integers(0, 10**11), min_size=2, max_size=8),
)
def test_more_bytes_never_take_less(steps: list[tuple[int, int]], sizes: list[int]) -> None:
    points = [(0, 0)]
    for more_bytes, more_ns in steps:
        points.append((points[-1][0] + more_bytes, points[-1][1] + more_ns))
    for cost in (table(*points), line(7, steps[0][0])):
        assert all(cost.ns(small) <= cost.ns(large) for small, large in pairwise(sorted(sizes)))


# Facts that were published or measured.


@pytest.mark.parametrize(("copies", "published_ms"), [(1, "3.41"), (10, "40.73")])
def test_the_guides_transfers_come_out_as_published(copies: int, published_ms: str) -> None:
    h2d = load_profile("rtx3090").h2d["pageable"]
    total_ns = h2d.alone.ns(GUIDE_BYTES) + (copies - 1) * (h2d.gap.ns + h2d.queued.ns(GUIDE_BYTES))
    assert f"{total_ns / 1e6:.2f}" == published_ms


def test_an_h200s_copies_take_what_was_measured() -> None:
    profile = load_profile("h200-pcie5")
    # 10 us + bytes / 55.3 GB/s alone, 4.5 us + bytes / 55.5 GB/s queued: what takes 1 ms at that speed.
    pinned, pageable = profile.h2d["pinned"], profile.h2d["pageable"]
    assert pinned.alone.ns(55_300_000) == 10_000 + 1_000_000
    assert pinned.queued.ns(55_500_000) == 4_500 + 1_000_000
    assert pinned.gap.ns == 1_300
    assert GUIDE_BYTES / pageable.alone.ns(GUIDE_BYTES) == pytest.approx(15, rel=1e-4)  # bytes a ns = GB/s
    assert 256 * MIB / pageable.alone.ns(256 * MIB) == pytest.approx(8, rel=1e-4)
    # A read-back is a launch, a copy of few bytes and a synchronize: 22 to 29 us.
    host = profile.host
    assert 22_000 <= host.launch.ns + profile.d2h.alone.ns(0) + host.synchronize.ns <= 29_000


@pytest.mark.parametrize(
    ("preset", "dispatch", "us"),
    [
        ("mixtral-8x7b", "eager", 98.0),
        ("mixtral-8x7b", "graph", 98.9),
        ("qwen3-30b-a3b", "eager", 17.0),
        ("qwen3-30b-a3b", "graph", 23.5),
    ],
)
def test_an_expert_that_was_measured_takes_what_was_measured_and_is_no_estimate(
    preset: str, dispatch: str, us: float
) -> None:
    costs = tiny_costs(
        load_model(preset), load_profile("h200-pcie5"), load_scenario("synthetic", [f"dispatch.mode={dispatch}"])
    )
    assert costs.expert(0, 1).ns == us * 1000
    assert costs.estimates == {}


def test_an_expert_that_was_not_measured_is_estimated_by_the_stated_rule_and_said_to_be() -> None:
    model = load_model("gpt-oss-20b")
    costs = tiny_costs(model, load_profile("h200-pcie5"), load_scenario("synthetic"))
    # 13.5 us + 13,236,480 bytes / 4.2 TB/s = 13.5 + 3.15 us.
    assert model.expert_bytes[0] == 13_236_480
    assert costs.expert(0, 1).ns == 13_500 + 3_152
    assert list(costs.estimates) == ["expert"]
    assert "4.2 TB/s" in costs.estimates["expert"]


# Every shipped profile.


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_says_where_each_number_comes_from(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.source and profile.device
    costs = dict(costs_of(profile))
    assert {"compute.rule", "host.launch", "d2h.alone"} <= set(costs)
    for place, cost in costs.items():
        said = cost.model_dump()
        assert said["source"] in SOURCES, place
        assert said["note"], f"{place} does not say how"


@pytest.mark.parametrize("name", profile_names())
def test_every_profiles_costs_are_of_a_machine(name: str) -> None:
    profile = load_profile(name)
    for direction in [*profile.h2d.values(), profile.d2h]:
        for cost in (direction.alone, direction.queued):
            assert 1e8 < 10**9 * 64 * MIB / cost.ns(64 * MIB) < 1e12  # bytes a second
            assert cost.ns(MIB) < cost.ns(64 * MIB)
    for point in profile.compute.experts:
        assert point.ns <= point.beside_copy_ns  # a copy beside it makes nothing faster
    assert len({(p.hidden, p.expert_ff, p.dtype, p.tokens, p.dispatch) for p in profile.compute.experts}) == len(
        profile.compute.experts
    )


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_survives_a_file(name: str, tmp_path: Path) -> None:
    profile = load_profile(name)
    path = tmp_path / "mine.json"
    path.write_text(profile.model_dump_json())
    assert load_profile(str(path)) == profile


def test_the_two_profiles_are_shipped() -> None:
    assert {"h200-pcie5", "rtx3090"} <= set(profile_names())


# What is refused.


def changed(**changes: Any) -> dict[str, Any]:
    """A good profile as plain data with some keys changed, by their dotted names (__ between); None takes one out."""
    data: dict[str, Any] = json.loads(tiny_profile().model_dump_json())
    for name, value in changes.items():
        *path, last = name.split("__")
        part = data
        for key in path:
            part = part[key]
        if value is None:
            del part[last]
        else:
            part[last] = value
    return data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"h2d": {}}, "h2d: must have at least 1 item"),
        ({"device": None}, "device: missing; must be given"),
        ({"speed": 3}, "speed: no such key"),
        ({"gpu_memory_bytes": 0}, "gpu_memory_bytes = 0: must be greater than 0"),
        ({"host__launch__ns": -1}, "host.launch.ns = -1: must be greater than or equal to 0"),
        ({"host__launch__ns": 1.5}, "host.launch.ns = 1.5: must be a valid integer"),
        ({"host__launch__us": 6}, "host.launch.us: no such key; known keys: source, "),
        ({"host__launch__source": "guessed"}, "host.launch.source = 'guessed': must be 'measured', 'published', "),
        ({"d2h__alone__bytes_per_second": 0}, "d2h.alone.bytes_per_second = 0: must be greater than 0"),
        ({"d2h__alone__latency_ns": None}, "d2h.alone: give latency_ns and bytes_per_second, or points: one of the"),
        ({"d2h__alone__points": [[0, 0], [1, 1]]}, "or points: one of the two"),
        ({"d2h__alone__gb_per_s": 25}, "d2h.alone.gb_per_s: no such key; known keys: source, note, device, "),
        ({"d2h__alone__byte_per_second": 25}, "no such key; did you mean 'bytes_per_second'?"),
        (
            {"gpu_memory_bytes": "24 gigs"},
            "gpu_memory_bytes = '24 gigs': write it as a whole number of bytes, or as '2",
        ),
        ({"d2h__alone__bytes_per_second": 25.5}, "d2h.alone.bytes_per_second = 25.5: must be a valid integer"),
        ({"host__product_launches": {"bf17": {"ns": 1, "source": "assumed"}}}, "(did you mean 'bfloat16'?)"),
        (
            {"host__product_launches": {name: {"ns": 1, "source": "assumed"} for name in ("bf16", "bfloat16")}},
            "bfloat16: given already, as bfloat16: give each dtype once",
        ),
        ({"host__launch__ns": 10**30}, "host.launch: ns = 1e+30: must be at most 1e+12"),
        ({"compute__rule__constant_ns": 10**13}, "compute.rule: constant_ns = 1e+13: must be at most 1e+12"),
        ({"gpu_memory_bytes": 10**400}, "gpu_memory_bytes = a number of over 300 digits: must be at most 9.22e+18"),
        ({"compute__rule__beside_copy_factor": 0.5}, "compute.rule.beside_copy_factor = 0.5: must be greater than or"),
        ({"compute__rule__constant_ns": float("inf")}, "compute.rule.constant_ns = inf: must be a finite number"),
    ],
)
def test_a_bad_profile_is_refused_naming_file_and_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(changed(**changes)))
    with pytest.raises(ProfileError) as error:
        load_profile(str(path))
    assert str(error.value).startswith(f"profile {path}: ")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([[0, 0]], "points: give at least two"),
        ([[5, 0], [5, 9]], "points: (5, 9) after (5, 0) must grow"),
        ([[0, 9], [5, 8]], "points: (5, 8) after (0, 9) must grow"),
        ([[-1, 0], [5, 8]], "points: (5, 8) after (-1, 0) must grow"),
    ],
)
def test_a_table_that_does_not_grow_is_refused(points: list[list[int]], message: str) -> None:
    data = changed()
    data["d2h"]["alone"] = {"points": points, "source": "assumed"}
    with pytest.raises(ValueError) as error:
        Profile.model_validate(data)
    assert message in str(error.value)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(changed(speed=3, gpu_memory_bytes=0)))
    with pytest.raises(ProfileError, match=r"gpu_memory_bytes = 0: .*; speed: no such key"):
        load_profile(str(path))


def test_a_profile_that_is_not_there_or_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"machine\.profile = 'none\.json': no such file"):
        load_profile("none.json")
    with pytest.raises(
        ProfileError, match=r"machine\.profile = 'rtx309': choose one of .* \(did you mean 'rtx3090'\?\)"
    ):
        load_profile("rtx309")
    path = tmp_path / "mine.json"
    path.write_text("{")
    with pytest.raises(ProfileError, match="not JSON"):
        load_profile(str(path))
    path.write_bytes(b"\xff")
    with pytest.raises(ProfileError, match="cannot be read"):
        load_profile(str(path))


def test_a_profile_never_changes() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_profile("h200-pcie5").host.launch.ns = 0


def test_what_is_no_profile_at_all_is_refused() -> None:
    with pytest.raises(ProfileError, match=r"^mine.json: \[3\]: must be a table of keys, such as name$"):
        make_profile([3], "mine.json")
