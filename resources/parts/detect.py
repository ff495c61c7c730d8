"""The parts of the machine that this runs on: what the driver, the system and the optional libraries tell of them.

nvidia-smi tells the GPUs and their links; psutil and py-cpuinfo, where they are installed, and else the system's own
files tell memory and processor. Nobody tells without root's rights which memory modules there are: that is for the user
to add.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .tables import PartError, find_cpu, find_gpu
from .written import PARTS, joined_parts

_QUERY = ("name", "pcie.link.gen.max", "pcie.link.width.max")
_TIMEOUT_S = 20
_GIB = 2**30
#: Installed memory is told less what the firmware keeps; modules come in steps of this.
_MODULE_BYTES = 4 * _GIB
#: What processors' own names have beside what tables call them.
_NOISE = re.compile(r"\((?:r|tm)\)|\bcpu\b|@.*|\b\d+-cores?\b|\bprocessor\b|\b\d+th gen\b|with radeon.*", re.IGNORECASE)


@dataclass
class Detected:
    """The parts that were found, as a section's keys have them, and what could not be told, in words."""

    parts: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The machine's name, as `machine.profile` takes it."""
        return joined_parts({key: self.parts[key] for key in PARTS if key in self.parts})


def detect() -> Detected:
    """Returns the parts of this machine."""
    found = Detected()
    brand, sockets, cores = _processor()
    tell_gpus(found, _nvidia_smi())
    tell_cpu(found, brand, sockets, cores)
    tell_memory(found, _memory_bytes())
    return found


def tell_gpus(found: Detected, smi: str) -> None:
    """Note the GPUs of what nvidia-smi prints: name, generation and lanes, a line each; the most of one kind."""
    rows = [tuple(cell.strip() for cell in line.split(",")) for line in smi.splitlines() if line.count(",") == 2]
    if not rows:
        found.missing.append("gpu: nvidia-smi tells of none")
        return
    (name, generation, lanes), count = Counter(rows).most_common(1)[0]
    if count < len(rows):
        found.missing.append(f"gpu: there are others beside {name}")
    try:
        found.parts["gpu"] = f"{count}x {find_gpu(name).name}" if count > 1 else find_gpu(name).name
    except PartError as error:
        found.missing.append(f"gpu: {name}: {error}")
        return
    if generation.isdecimal() and lanes.isdecimal():
        found.parts["link"] = f"pcie{generation} x{lanes}"


def tell_cpu(found: Detected, brand: str, sockets: int, cores: int | None) -> None:
    """Note the processors, by their own name or by their cores; a GPU of the same chip if there is no other."""
    name = re.sub(r"\s+", " ", _NOISE.sub("", brand)).strip()
    if "gpu" not in found.parts and name:
        try:
            chip = find_gpu(name)
        except PartError:
            chip = None
        if chip is not None and chip.unified:
            found.parts["gpu"] = chip.name
            found.missing = [line for line in found.missing if not line.startswith("gpu:")]
            return
    try:
        cpu = find_cpu(name).name
        found.parts["cpu"] = f"{sockets}x {cpu}" if sockets > 1 else cpu
    except PartError:
        found.missing.append(f"cpu: {name or 'its name'} is in no table")
        if cores is not None:
            found.parts["cpu"] = f"{cores} cores"


def tell_memory(found: Detected, total_bytes: int | None) -> None:
    """Note how much memory there is, up to whole modules."""
    if total_bytes is None:
        found.missing.append("ram: its size is not told")
        return
    found.parts["ram"] = f"{-(-total_bytes // _MODULE_BYTES) * _MODULE_BYTES // _GIB}GB"
    if "cpu" not in found.parts or found.parts["cpu"].endswith("cores"):
        found.missing.append("ram: its kind is not told: add it, such as DDR5-5600, or its rate, such as 60GB/s")


def _nvidia_smi() -> str:
    """Returns what nvidia-smi says of its GPUs; nothing where it is not there or fails."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return told.stdout


def _processor() -> tuple[str, int, int | None]:
    """Returns the processor's own name, how many sockets there are, and cores in all (None: not told)."""
    lines = _proc_lines(Path("/proc/cpuinfo"))
    sockets = len(set(_values(lines, "physical id"))) or 1
    brand = next(iter(_values(lines, "model name")), "")
    try:
        import psutil

        cores = psutil.cpu_count(logical=False)
    except ImportError:
        pairs = set(zip(_values(lines, "physical id"), _values(lines, "core id"), strict=False))
        cores = len(pairs) or os.cpu_count()
    if not brand:
        try:
            import cpuinfo

            brand = str(cpuinfo.get_cpu_info().get("brand_raw", ""))
        except ImportError:
            brand = platform.processor()
    return brand, sockets, cores


def _memory_bytes() -> int | None:
    try:
        import psutil

        return int(psutil.virtual_memory().total)
    except ImportError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a Unix
        return None


def _proc_lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _values(lines: Iterable[str], key: str) -> list[str]:
    """Returns the values of a key of /proc/cpuinfo, one for each processor, in order."""
    pairs = (line.partition(":") for line in lines)
    return [value.strip() for name, _, value in pairs if name.strip() == key]
