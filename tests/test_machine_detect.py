"""What a machine tells of its parts, from the texts that drivers and systems print; and the tables in the terminal."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from prestage.cli.own import Own
from prestage.output.parts import costs_of, listed_parts, print_costs, print_parts, shares
from prestage.resources.parts.chosen import choose
from prestage.resources.parts.detect import Detected, detect, tell_cpu, tell_gpus, tell_memory
from prestage.resources.profile import load_profile

GIB = 2**30


@pytest.mark.parametrize(
    ("smi", "gpu", "link"),
    [
        ("NVIDIA GeForce RTX 4090, 4, 16\n", "rtx4090", "pcie4 x16"),
        ("NVIDIA GeForce RTX 3090, 4, 8\nNVIDIA GeForce RTX 3090, 4, 8\n", "2x rtx3090", "pcie4 x8"),
        ("NVIDIA H100 80GB HBM3, 5, 16\n" * 8, "8x h100", "pcie5 x16"),
        ("NVIDIA H200, 5, 16\n", "h200", "pcie5 x16"),
        ("NVIDIA A100-SXM4-80GB, 4, 16\n", "a100-sxm-80gb", "pcie4 x16"),
        ("Tesla V100-SXM2-32GB, 3, 16\n", "v100-sxm2", "pcie3 x16"),
        ("NVIDIA GeForce RTX 3080 Laptop GPU, 4, 16\n", "rtx3080-mobile", "pcie4 x16"),
        ("NVIDIA RTX 6000 Ada Generation, 4, 16\n", "rtx6000-ada", "pcie4 x16"),
        ("NVIDIA L40S, [N/A], [N/A]\n", "l40s", None),
    ],
)
def test_gpus_are_known_by_what_the_driver_calls_them(smi: str, gpu: str, link: str | None) -> None:
    found = Detected()
    tell_gpus(found, smi)
    assert found.parts.get("gpu") == gpu
    assert found.parts.get("link") == link
    assert not found.missing


def test_what_the_driver_does_not_tell_is_said() -> None:
    none, other, mixed = Detected(), Detected(), Detected()
    tell_gpus(none, "")
    tell_gpus(other, "NVIDIA Something New, 7, 16\n")
    tell_gpus(mixed, "NVIDIA L4, 4, 16\nNVIDIA L4, 4, 16\nTesla T4, 3, 16\n")
    assert none.missing == ["gpu: nvidia-smi tells of none"]
    assert not other.parts and "Something New" in other.missing[0]
    assert mixed.parts["gpu"] == "2x l4" and "others beside" in mixed.missing[0]


@pytest.mark.parametrize(
    ("brand", "sockets", "cpu"),
    [
        ("AMD Ryzen 9 7950X 16-Core Processor", 1, "7950x"),
        ("AMD EPYC 7742 64-Core Processor", 2, "2x epyc-7742"),
        ("Intel(R) Core(TM) i9-10900X CPU @ 3.70GHz", 1, "i9-10900x"),
        ("13th Gen Intel(R) Core(TM) i9-13900K", 1, "i9-13900k"),
        ("Intel(R) Xeon(R) Platinum 8480+", 2, "2x xeon-8480+"),
        ("AMD Ryzen Threadripper PRO 5955WX 16-Cores", 1, "threadripper-pro-5955wx"),
        ("Some Processor That Nobody Knows", 1, "12 cores"),
    ],
)
def test_processors_are_known_by_their_own_names(brand: str, sockets: int, cpu: str) -> None:
    found = Detected(parts={"gpu": "l4"})
    tell_cpu(found, brand, sockets, 12)
    assert found.parts["cpu"] == cpu
    assert bool(found.missing) == cpu.endswith("cores")


def test_a_chip_with_one_memory_is_its_own_gpu() -> None:
    found = Detected()
    tell_gpus(found, "")
    tell_cpu(found, "Apple M3 Max", 1, 16)
    tell_memory(found, 64 * GIB)
    assert found.name == "gpu=m3-max, ram=64GB"
    assert load_profile(found.name).gpu_memory_bytes == 64 * GIB


def test_memory_is_told_in_whole_modules() -> None:
    found = Detected(parts={"gpu": "rtx4090", "cpu": "7950x"})
    tell_memory(found, 62 * GIB + 700_000_000)  # what the firmware keeps is not told
    assert found.parts["ram"] == "64GB"
    assert not found.missing  # the kind is what the processor takes
    ram = choose(found.name).ram
    assert ram.capacity_bytes == 64 * GIB and ram.rate is not None
    unknown = Detected(parts={"cpu": "8 cores"})
    tell_memory(unknown, 16 * GIB)
    assert "its kind is not told" in unknown.missing[0]
    nothing = Detected()
    tell_memory(nothing, None)
    assert nothing.missing == ["ram: its size is not told"]


def test_this_machine_tells_something() -> None:
    assert detect().parts.keys() & {"gpu", "cpu", "ram"}


def test_the_tables_are_printed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    print_parts(listed_parts(), None)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("rtx4090", "7950x", "samsung-990-pro", "pcie4", "DDR5", "h200-pcie5"))
    print_parts(listed_parts(), "cpus")
    assert "rtx4090" not in capsys.readouterr().out


def test_every_cost_is_told_with_what_it_rests_on(capsys: pytest.CaptureFixture[str]) -> None:
    data = costs_of(load_profile("gpu=rtx4090, ram=64GB DDR5-5600, cpu=7950x"))
    by_name = {cost["cost"]: cost for cost in data["costs"]}
    assert by_name["h2d.pinned.queued"]["source"] == "datasheet"
    assert by_name["host.launch"]["source"].startswith("assumed, of NVIDIA H100")
    assert "GB/s" in by_name["compute.rule"]["value"]
    assert 0.1 < by_name["compute.rule"]["off"] < 0.4
    print_costs(data)
    assert "h2d.pinned.queued" in capsys.readouterr().out
    measured = {cost["cost"]: cost for cost in costs_of(load_profile("h200"))["costs"]}
    assert measured["h2d.pinned.alone"]["value"].endswith("GB/s of long copies")


def test_shares_are_told_with_their_spread() -> None:
    by_name = {row["of"]: row for row in shares()}
    assert 0.7 < by_name["link"]["share"] < 0.9
    assert all(row["off"] > 0 for row in by_name.values())


def test_a_command_takes_this_machine_as_it_is_detected_but_for_what_is_given() -> None:
    told = Detected({"gpu": "2x rtx3090", "link": "pcie4 x16", "cpu": "7950x", "ram": "64GB"}, [])
    with patch("prestage.resources.parts.detect.detect", return_value=told):
        settings = Own(model="m.gguf", gpu="detect", ram="64GB DDR5-5600").settings(None)
        assert Own(gpu="detect").scenario(None) == "one-gpu"
    assert settings == [
        'model.preset="m.gguf"',
        'machine.profile="gpu=2x rtx3090, link=pcie4 x16, cpu=7950x, ram=64GB DDR5-5600"',
    ]
    with patch("prestage.resources.parts.detect.detect", return_value=Detected({"ram": "32GB"}, [])):
        assert Own(gpu="detect").settings(None) == ['machine.profile="gpu=none, ram=32GB"']
