"""A profile that extends another: what it takes over stays the other machine's, and what it gives stands by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import ASSUMED, EXPERT_FF, HIDDEN, tiny_costs, tiny_model, tiny_profile, tiny_scenario

from prestage.calibration.fit.transfer import from_profile
from prestage.engine.costs.offload_costs import CpuCosts
from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.simulate import simulate
from prestage.output.machine import describe
from prestage.resources.profile import Profile, load_profile, make_profile, profile_names
from prestage.resources.profile_costs import ProfileError
from prestage.workloads.model import load_model

H200 = "NVIDIA H200"
RULE = {"bytes_per_second": 10**12, "flops_per_second": 10**14, "source": "datasheet"}
POINT = {"hidden": HIDDEN, "tokens": 1, "ns": 5, "beside_copy_ns": 5, **ASSUMED}
#: A point of each family of measured work, and how to say its dtype.
FAMILIES: dict[str, dict[str, Any]] = {
    "experts": {**POINT, "expert_ff": EXPERT_FF, "dispatch": "graph"},
    "dense": {**POINT, "weight_bytes": 3, "kernels": 1, "dispatch": "graph"},
    "heads": {**POINT, "weight_bytes": 3, "kernels": 1, "dispatch": "graph"},
    "cpu_experts": {**POINT, "expert_ff": EXPERT_FF, "threads": 2},
}


def extending(folder: Path, base: str = "h200", device: str | None = "NVIDIA A100", **keys: Any) -> Profile:
    """The profile of a file that extends another; without a device it keeps the other's."""
    data = {"extends": base, "name": "mine", **({"device": device} if device else {}), **keys}
    path = folder / "mine.json"
    path.write_text(json.dumps(data))
    return load_profile(str(path))


def run(profile: Path, *settings: str) -> dict[str, Any]:
    small = ["workload.synthetic.tokens=4", "workload.synthetic.prefill_tokens=0"]
    small += ["workload.synthetic.working_set=6"]
    small += ["workload.synthetic.sequences=1", "model.preset=mixtral-8x7b"]
    scenario = load_scenario("synthetic", [*small, f"machine.profile={profile}", *settings])
    return simulate(scenario, baselines=False).data


# Whose measurements they are.


def test_every_cost_that_is_taken_over_carries_its_device(tmp_path: Path) -> None:
    mine = extending(tmp_path, host={"launch": {"ns": 1, **ASSUMED}})
    assert mine.host.launch.device is None
    contention, host, compute = mine.contention, mine.host, mine.compute
    assert contention is not None
    costs = [host.synchronize, mine.h2d["pinned"].alone, mine.d2h.gap, contention.copy_beside_compute, compute.rule]
    costs += [*compute.experts, *compute.dense, *compute.heads, *compute.cpu_experts, *compute.predictors]
    assert {cost.device for cost in costs} == {H200}


def test_a_profile_of_the_same_device_has_its_measurements(tmp_path: Path) -> None:
    for mine in (extending(tmp_path, device=None), extending(tmp_path, device="my box", same_device_as=[H200])):
        assert mine.compute == load_profile("h200").compute


def test_who_extends_a_machine_of_that_device_under_another_name_is_no_such_machine(tmp_path: Path) -> None:
    mine = extending(tmp_path, base="h200-x2")
    assert mine.same_device_as == ()
    assert mine.compute.rule.device is not None and mine.topology is not None
    data = describe(mine)
    assert all(part["device"] for part in (*data["nodes"], *data["links"]))


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_say_of_which_device_they_are(name: str) -> None:
    profile = load_profile(name)
    costs = [profile.compute.rule, profile.d2h.alone, profile.host.launch, *profile.compute.experts]
    assert {cost.device for cost in costs} == {None}


def test_the_run_names_all_that_is_another_machines(tmp_path: Path) -> None:
    # experts are emptied and a rule given, as docs/add-a-machine.md says; nothing else is.
    extending(tmp_path, compute={"experts": [], "rule": RULE}, gpu_memory_bytes=10**12)
    data = run(tmp_path / "mine.json")
    estimated = next(said for said in data["warnings"] if said.startswith("estimated cost"))
    assert "dense part, expert, head," in estimated
    uncalibrated = next(said for said in data["warnings"] if said.startswith("uncalibrated"))
    lanes = "compute.event_wait_gap, compute.launch_latency"
    assert f"h2d.pinned, compute.graph_gap, {lanes}, host, contention (of {H200})" in uncalibrated
    # Its own rule goes before another machine's points: as if they were emptied too.
    empty: dict[str, Any] = {"experts": [], "dense": [], "heads": []}
    extending(tmp_path, compute={**empty, "rule": RULE}, gpu_memory_bytes=10**12)
    assert run(tmp_path / "mine.json")["makespan_ms"] == data["makespan_ms"]


def test_another_machines_points_stand_in_where_the_rule_is_its_too_and_are_estimates(tmp_path: Path) -> None:
    model, scenario = load_model("mixtral-8x7b"), load_scenario("synthetic", ["dispatch.mode=graph"])
    measured, taken = (tiny_costs(model, profile, scenario) for profile in (load_profile("h200"), extending(tmp_path)))
    assert taken.expert(0, 1) == measured.expert(0, 1)
    assert measured.estimates == {}
    assert taken.estimates == {"expert": f"as measured on {H200}, not on this machine"}


def test_a_machines_own_points_go_before_another_machines() -> None:
    data = tiny_profile(expert_ns=7).model_dump()
    data["compute"]["rule"]["device"] = "another"
    borrowed = {**data["compute"]["experts"][0], "tokens": 16, "ns": 99, "beside_copy_ns": 99, "device": "another"}
    data["compute"]["experts"] = [*data["compute"]["experts"], borrowed]
    costs = tiny_costs(tiny_model(1), make_profile(data, "mine"), tiny_scenario())
    assert costs.expert(0, 8).ns == 7
    assert costs.estimates == {}
    costs.expert(0, 16)  # beyond its own points by the rule, which is another's
    assert costs.estimates["expert"].endswith("(assumed, of another)")


def test_another_machines_cpu_is_an_estimate() -> None:
    data = tiny_profile(cpu_ns=30).model_dump()
    for point in data["compute"]["cpu_experts"]:
        point["device"] = "another"
    costs = tiny_costs(tiny_model(1), make_profile(data, "mine"), tiny_scenario())
    cpu = CpuCosts(costs, tiny_scenario(miss={"policy": "cpu"}, memory={"preload": "popular"}))
    assert cpu.expert(0, 1).ns == 30
    assert costs.estimates["expert on the CPU"] == "as measured on another, not on this machine"


@pytest.mark.slow
def test_the_transfer_table_says_whose_copies_they_are(tmp_path: Path) -> None:
    mine = extending(tmp_path, h2d={"pinned": {"alone": {"latency_ns": 1, "bytes_per_second": 10**10, **ASSUMED}}})
    assert from_profile(mine)["machine"].endswith(f"(in part as measured on {H200})")
    assert "in part" not in from_profile(load_profile("h200-x2"))["machine"]


# What a patch changes is the patch's.


def test_a_number_that_is_changed_is_not_called_measured_unless_the_patch_says_so(tmp_path: Path) -> None:
    assert load_profile("h200").host.launch.source == "measured"
    for device in ("NVIDIA A100", None):
        launch = extending(tmp_path, device=device, host={"launch": {"ns": 1}}).host.launch
        assert (launch.source, launch.note, launch.device) == ("assumed", "", None)
        assert launch.samples is None and launch.uncertainty is None
    launch = extending(tmp_path, host={"launch": {"ns": 1, "source": "measured"}}).host.launch
    assert (launch.source, launch.device) == ("measured", None)
    again = extending(tmp_path, host={"launch": {"source": "measured", "note": "the same here"}}).host.launch
    assert (again.ns, again.device, again.note) == (load_profile("h200").host.launch.ns, None, "the same here")


@pytest.mark.parametrize("rate", [25130000000, 25.13e9, "25.13GB/s"])
def test_a_bandwidth_replaces_a_table_and_a_table_a_bandwidth(tmp_path: Path, rate: object) -> None:
    assert load_profile("h200").h2d["pinned"].alone.points is not None
    line = {"latency_ns": 10000, "bytes_per_second": rate, "source": "published"}
    alone = extending(tmp_path, h2d={"pinned": {"alone": line}}).h2d["pinned"].alone
    assert (alone.latency_ns, alone.bytes_per_second, alone.points) == (10000, 25_130_000_000, None)
    (tmp_path / "base.json").write_text((tmp_path / "mine.json").read_text())
    table = {"points": [[0, 5], [10, 25]], "source": "measured"}
    alone = extending(tmp_path, base="base.json", h2d={"pinned": {"alone": table}}).h2d["pinned"].alone
    assert (alone.latency_ns, alone.bytes_per_second, alone.points) == (None, None, ((0, 5), (10, 25)))


def test_half_a_form_is_refused_in_words_that_tell(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"alone: give latency_ns and bytes_per_second, or points.*given: bytes_per"):
        extending(tmp_path, h2d={"pinned": {"alone": {"bytes_per_second": 10**10}}})


# Who extends whom.


def test_two_files_of_one_name_are_no_cycle(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "mine.json").write_text(json.dumps({"extends": "h200", "name": "inner"}))
    assert extending(tmp_path, base="inner/mine.json").name == "mine"


def test_one_file_under_two_names_is_a_cycle(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "mine.json")
    with pytest.raises(ProfileError, match=r"extends itself by way of .*mine\.json"):
        extending(tmp_path, base="link.json")
    with pytest.raises(ProfileError, match="extends itself by way of"):
        extending(tmp_path, base="./mine.json")


def test_a_long_chain_is_read(tmp_path: Path) -> None:
    for number in range(1500):
        base = f"{number - 1}.json" if number else "rtx3090"
        (tmp_path / f"{number}.json").write_text(json.dumps({"extends": base, "name": f"link {number}"}))
    assert extending(tmp_path, base="1499.json", device=None).name == "mine"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, '{"host":' + "9" * 5000 + "}", "[3]"])
def test_files_that_are_no_profiles_are_refused_wherever_they_stand(tmp_path: Path, text: str) -> None:
    (tmp_path / "base.json").write_text(text)
    with pytest.raises(ProfileError, match="profile "):
        load_profile(str(tmp_path / "base.json"))
    with pytest.raises(ProfileError, match="profile "):
        extending(tmp_path, base="base.json")


# Dtypes.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dtype_is_checked_wherever_it_stands(family: str) -> None:
    data = tiny_profile().model_dump()
    data["compute"][family] = [{**FAMILIES[family], "dtype": "nvfp3"}]
    with pytest.raises(ProfileError, match=rf"compute\.{family}\.0\.dtype = 'nvfp3': choose one of .*bfloat16"):
        make_profile(data, "mine")


@pytest.mark.parametrize("name", ["bfloat16", "bf16", "BF16", "torch.bfloat16"])
def test_a_dtype_by_another_name_is_the_same(name: str) -> None:
    data = tiny_profile().model_dump()
    for family, point in FAMILIES.items():
        data["compute"][family] = [{**point, "dtype": name}]
    data["host"]["product_launches"] = {name: {"ns": 9, **ASSUMED}}
    profile = make_profile(data, "mine")
    families = (getattr(profile.compute, family) for family in FAMILIES)
    assert {point.dtype for points in families for point in points} == {"bfloat16"}
    assert list(profile.host.product_launches) == ["bfloat16"]
    model = load_model("mixtral-8x7b", dtype=name)
    assert model == load_model("mixtral-8x7b", dtype="bfloat16")


def test_a_shape_that_is_given_twice_is_refused_for_one_of_the_two_would_not_be_used() -> None:
    data = tiny_profile().model_dump()
    point = FAMILIES["experts"]
    data["compute"]["experts"] = [{**point, "dtype": "bf16"}, {**point, "dtype": "bfloat16", "ns": 9}]
    with pytest.raises(ProfileError, match=r"experts\.1: measured already, as experts\.0"):
        make_profile(data, "mine")
