"""A machine from its parts, as the plain data of a profile.

Rates are the datasheets', times the share of them that is usually reached; kernels are sums of matrices and small ones
(`kernels`); and what no datasheet tells, the host's calls and the lanes' gaps, is as on the nearest machine that was
measured, whose device each such cost names. All of it is `datasheet` or `assumed`, never measured, and each cost says
how far it can be off, by how much measured machines differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .chosen import Chosen, Reach, choose
from .kernels import KernelFit
from .reached import (
    MeasuredMachine,
    copy_share,
    kernel_spread,
    nearest,
    pageable_times,
    peer_share,
    surface_of,
    transfer_spread,
)
from .tables import Gpu
from .written import figures

#: A read of a drive, so many of them at once, and the system call that orders one: assumed.
_READ_NS, _LANES, _ORDER_NS = 80_000, 4, 5_000
#: What threads of a processor take to begin an expert and to meet at its end: assumed.
_THREADS_NS = 10_000
_LINK_NS = 500
#: How far a rate of memory that is given is off, for it may be a datasheet's: assumed.
_GIVEN_SPREAD = 0.1
#: One memory: what is read is where it is computed; this stands for no time.
_NO_COPY_BYTES_PER_SECOND = 900_000_000_000

_Plain = dict[str, Any]


def assembled(name: str, without: Iterable[str] = ()) -> _Plain:
    """Returns the profile of a machine by the name that tells its parts, as plain data. Raises PartError.

    `without` are measured profiles whose measurements are left out, for a check against these.
    """
    parts = choose(name, without)
    if parts.gpu is None:
        return {**_identity(parts, None), **_memory_rate(parts), **_on_processor(parts)}
    machine = nearest(parts.gpu, without)
    profile = {
        **_identity(parts, machine),
        **_memory_rate(parts),
        "d2d": _within(parts.gpu, machine),
        "compute": {**_compute(parts, parts.gpu, machine), "surface": _kernels(parts.gpu, without)},
        "host": _taken(machine.data["host"], machine, transfer_spread("host")),
        "allocation": _taken(machine.data["allocation"], machine, transfer_spread("host")),
    }
    if parts.gpu.unified:
        return {**profile, **_one_memory()}
    profile["h2d"] = {"pinned": _pinned(parts.copies, machine, machine.pinned)}
    profile["h2d"]["pageable"] = _pageable(parts.copies, machine)
    profile["d2h"] = _pinned(parts.copies, machine, machine.data["d2h"])
    profile["contention"] = _contention(parts, machine)
    if parts.count > 1:
        profile["peer"] = _peer(parts, parts.gpu, machine)
    return profile


def _identity(parts: Chosen, machine: MeasuredMachine | None) -> _Plain:
    """Returns what a profile says of its machine, and what its memories hold."""
    taken = "" if machine is None else f", and costs that no datasheet tells as measured on {machine.device}"
    gpu = parts.gpu
    unified = gpu is None or gpu.unified
    memory_bytes = parts.ram.capacity_bytes if unified else None
    profile: _Plain = {
        "name": parts.name,
        "device": f"{parts.title} (from parts)",
        "driver": "unknown",
        "date": "unknown",
        "source": f"datasheets of its parts, with the shares of them that are usually reached{taken}",
        "gpu_memory_bytes": memory_bytes if memory_bytes is not None else gpu.memory_bytes if gpu is not None else 0,
        "unified_memory": unified,
    }
    if not unified and parts.ram.capacity_bytes is not None:
        profile["topology"] = _topology(parts)
    if parts.drive is not None:
        capacity, rate = parts.drive
        profile["nvme"] = {
            "read": _fact(
                rate.words + f"; {_LANES} at once share it, and what a read's latency is, are assumed",
                latency_ns=_READ_NS,
                bytes_per_second=rate.bytes_per_second // _LANES,
            ),
            "lanes": _LANES,
            "order": _fact("one system call", source="assumed", ns=_ORDER_NS),
        }
        if capacity is not None and "topology" not in profile:
            profile["nvme"]["drive"] = {"capacity_bytes": capacity, "source": "datasheet"}
    return profile


def _memory_rate(parts: Chosen) -> _Plain:
    """Returns what the processors read of the host's memory, where the memory is known."""
    reach = parts.ram_reach
    if reach is None:
        return {}
    cores: _Plain = {} if parts.processor.cores is None else {"cores": parts.processor.cores}
    fact = _fact(reach.words, _off(max(_GIVEN_SPREAD, reach.spread)), bytes_per_second=reach.bytes_per_second, **cores)
    return {"processor": fact}


def _compute(parts: Chosen, gpu: Gpu, machine: MeasuredMachine) -> _Plain:
    measured = machine.data["compute"]
    gaps = ("eager_gap", "graph_gap", "event_wait_gap", "launch_latency")
    compute = {name: _taken(measured[name], machine, transfer_spread("compute")) for name in gaps}
    compute["rule"] = _rule(gpu, machine.kernels, machine.device)
    if parts.cpu_reach is not None:
        compute["cpu_rule"] = _cpu_rule(parts, parts.cpu_reach)
    return compute


def _kernels(gpu: Gpu, without: Iterable[str]) -> _Plain | None:
    """Returns the surface of single kernels, as this machine's own estimate; None where no measured GPU has one."""
    surface = surface_of(gpu, without)
    if surface is None:
        return None
    plain = surface.model_dump()
    for fact in (plain, *(each for groups in plain["groups"].values() for each in groups.values())):
        fact["device"] = None
    return plain


def _rule(gpu: Gpu, fit: KernelFit, device: str) -> _Plain:
    return _fact(
        f"{gpu.memory_bytes_per_second / 1e9:,.0f} GB/s and {gpu.half_flops_per_second / 1e12:,.1f} TFLOP/s "
        f"({gpu.source}); shares of {fit.memory_share:.2f} and {fit.flops_share:.2f} and all constants as on {device}",
        _off(kernel_spread()),
        constant_ns=0,
        product_ns=round(fit.product_ns),
        small_kernel_ns=round(fit.small_ns),
        eager_kernel_ns=round(fit.eager_ns),
        bytes_per_second=figures(fit.memory_share * gpu.memory_bytes_per_second),
        flops_per_second=figures(fit.flops_share * gpu.half_flops_per_second),
        beside_copy_factor=fit.beside_copy_factor,
    )


def _cpu_rule(parts: Chosen, reach: Reach) -> _Plain:
    slower = 1.0 if parts.link is None else _shared_ram(parts)
    return _fact(
        f"{reach.words}; {parts.processor.words}; what threads take to begin and to meet is assumed",
        _off(reach.spread),
        constant_ns=_THREADS_NS,
        bytes_per_second=reach.bytes_per_second,
        flops_per_second=parts.processor.flops_per_second,
        beside_copy_factor=slower,
    )


def _shared_ram(parts: Chosen) -> float:
    """Returns how many times as long copies and experts on the processor take beside each other: memory's share."""
    if parts.ram_reach is None or parts.cpu_reach is None:
        return 1.0
    wanted = parts.copies.bytes_per_second + parts.cpu_reach.bytes_per_second
    return round(min(10.0, max(1.0, wanted / parts.ram_reach.bytes_per_second)), 3)


def _contention(parts: Chosen, machine: MeasuredMachine) -> _Plain:
    """Returns the measured machine's, but for what the host's memory says of copies beside experts on the processor."""
    measured = machine.data["contention"]
    kept = ("copy_beside_compute", "copy_beside_d2h", "copies_sharing", "compute_beside_peer", "peer_beside_copy")
    contention = {
        name: _taken(measured[name], machine, (measured[name].get("uncertainty") or {}).get("held_back_error", 0.0))
        for name in kept
        if measured.get(name) is not None
    }
    contention["copies_take_turns"] = measured.get("copies_take_turns", False)
    if parts.cpu_reach is not None:
        note = "both at the rates that they have alone, over what the host's memory reaches"
        contention["copy_beside_cpu_experts"] = _fact(note, source="assumed", factor=_shared_ram(parts))
    return contention


def _pinned(reach: Reach, machine: MeasuredMachine, measured: Mapping[str, Any]) -> _Plain:
    """Returns copies at what a link reaches, with the latencies and gaps of the measured machine's."""
    copies = {
        name: _taken(measured[name], machine, transfer_spread("h2d"))
        for name in ("gap", "event_wait_gap", "launch_latency")
        if name in measured
    }
    for name in ("alone", "queued"):
        scatter = measured[name]["uncertainty"]["scatter"]
        note = f"{reach.words}; the latency as measured on {machine.device}"
        latency_ns = _latency_ns(measured[name], reach.bytes_per_second)
        rate = reach.bytes_per_second
        copies[name] = _fact(note, _off(reach.spread, scatter), latency_ns=latency_ns, bytes_per_second=rate)
    return copies


def _latency_ns(cost: Mapping[str, Any], bytes_per_second: int) -> int:
    """Returns what the smallest measured copy takes beside its bytes."""
    if "points" not in cost:
        return int(cost["latency_ns"])
    size_bytes, ns = cost["points"][0]
    return max(0, int(ns - size_bytes * 10**9 // bytes_per_second))


def _pageable(reach: Reach, machine: MeasuredMachine) -> _Plain:
    """Returns copies from pageable memory as known machines have them, or as long as the link takes if that is longer.

    What a copy takes beyond the smallest one goes with their middle rate.
    """
    measured = machine.data["h2d"]["pageable"]
    copies, times = {"gap": _taken(measured["gap"], machine, transfer_spread("h2d"))}, pageable_times(machine)
    for name in ("alone", "queued"):
        cost = _taken(measured[name], machine, times.spread)
        least_ns = cost["points"][0][1]
        quicker = [(size, least_ns + (ns - least_ns) / times.middle) for size, ns in cost["points"]]
        points = [(size, round(max(ns, size * 1e9 / reach.bytes_per_second))) for size, ns in quicker]
        copies[name] = {**cost, "points": points}
    return copies


def _within(gpu: Gpu, machine: MeasuredMachine) -> _Plain:
    """Returns copies within a GPU's memory, which read and write each byte."""
    share = copy_share(machine)
    rate = figures(share * gpu.memory_bytes_per_second / 2)
    note = f"{share:.2f} of {gpu.memory_bytes_per_second / 1e9:,.0f} GB/s ({gpu.source}), for a read and a write"
    return _line(rate, note, machine, machine.data["d2d"])


def _peer(parts: Chosen, gpu: Gpu, machine: MeasuredMachine) -> _Plain:
    """Returns copies to another GPU: over NVLink or over PCIe, through host memory if GPUs do not read each other's."""
    assert parts.link is not None
    if gpu.nvlink_bytes_per_second is not None:
        share = peer_share(machine)
        note = f"{share:.2f} of NVLink's {gpu.nvlink_bytes_per_second / 1e9:,.0f} GB/s a direction ({gpu.source})"
        return _line(figures(share * gpu.nvlink_bytes_per_second), note, machine, machine.data["peer"])
    rate, ram = parts.link.bytes_per_second, parts.ram_reach
    if gpu.pcie_peer or ram is None or ram.bytes_per_second >= 2 * rate:
        return _line(rate, parts.link.words, machine, machine.data["peer"])
    return _line(ram.bytes_per_second // 2, f"into and out of {ram.words}", machine, machine.data["peer"])


def _line(rate: int, note: str, machine: MeasuredMachine, measured: _Plain) -> _Plain:
    copies: _Plain = {"gap": _taken(measured["gap"], machine, transfer_spread("h2d"))}
    for name in ("alone", "queued"):
        latency_ns = _latency_ns(measured[name], rate)
        copies[name] = _fact(note, _off(transfer_spread("h2d")), latency_ns=latency_ns, bytes_per_second=rate)
    return copies


def _topology(parts: Chosen) -> _Plain:
    """Returns the graph: each GPU behind a link of its own, all of them and the drive on one host's memory."""
    gpu, link, ram = parts.gpu, parts.link, parts.ram
    assert gpu is not None and link is not None
    names = [f"gpu{number}" for number in range(parts.count)]
    nodes: list[_Plain] = [
        {"name": "host0", "kind": "host", "capacity_bytes": ram.capacity_bytes, **_said("as given", "assumed")},
        {"name": "cpu0", "kind": "cpu", **_said(parts.processor.title or "not said", "assumed")},
    ]
    nodes += [
        {
            **{"name": name, "kind": "gpu", "capacity_bytes": gpu.memory_bytes, **_said(gpu.source)},
            "flops_per_second": gpu.half_flops_per_second,
            "memory_bytes_per_second": gpu.memory_bytes_per_second,
        }
        for name in names
    ]
    reach = parts.ram_reach
    dram_rate = parts.count * link.most_bytes_per_second if reach is None else reach.bytes_per_second
    note = "not said: as much as all links together" if reach is None else reach.words
    dram = _link("host0", "cpu0", "dram", dram_rate, note)
    kind = "c2c" if gpu.link == "nvlink-c2c" else "pcie"
    links = [{**dram, "latency_ns": 0, "duplex": "half"}]
    # Copies have costs of their own; a link is what their sum never exceeds.
    links += [_link("cpu0", name, kind, link.most_bytes_per_second, link.words) for name in names]
    if parts.count > 1 and gpu.nvlink_bytes_per_second is not None:
        nodes.append({"name": "nvswitch0", "kind": "switch", **_said("switches that block nothing, as one", "assumed")})
        links += [_link(name, "nvswitch0", "nvlink", gpu.nvlink_bytes_per_second, gpu.source) for name in names]
    if parts.drive is not None and parts.drive[0] is not None:
        capacity, rate = parts.drive
        nodes.append({"name": "nvme0", "kind": "nvme", "capacity_bytes": capacity, **_said("as given", "assumed")})
        links.append({**_link("nvme0", "cpu0", "nvme", rate.bytes_per_second, rate.words), "latency_ns": _READ_NS})
    return {"pcie_peer": gpu.pcie_peer, "nodes": nodes, "links": links}


def _link(a: str, b: str, kind: str, rate: int, note: str) -> _Plain:
    latency = f"{note}; the latency is assumed"
    return {"ends": [a, b], "kind": kind, "bytes_per_second": rate, "latency_ns": _LINK_NS, **_said(latency)}


def _one_memory() -> _Plain:
    """Returns the copies of a machine whose host and GPU share one memory: they take no time."""
    free = _fact(
        "one memory: what is read is where it is computed; this stands for no time",
        source="assumed",
        latency_ns=0,
        bytes_per_second=_NO_COPY_BYTES_PER_SECOND,
    )
    copies = {"alone": free, "queued": free, "gap": _fact("none", source="assumed", ns=0)}
    return {"h2d": {"pinned": copies}, "d2h": copies}


def _on_processor(parts: Chosen) -> _Plain:
    """Returns the costs of a machine that computes on its processor: nothing is launched, and nothing is copied."""
    assert parts.cpu_reach is not None
    nothing = _fact("the processor computes: nothing is launched", source="assumed", ns=0)
    calls = ("launch", "graph_launch", "copy_enqueue", "synchronize", "readback")
    rule = _cpu_rule(parts, parts.cpu_reach)
    return {
        **_one_memory(),
        "compute": {"rule": rule, "cpu_rule": rule, "eager_gap": nothing, "graph_gap": nothing},
        "host": dict.fromkeys(calls, nothing),
    }


def _taken(value: Any, machine: MeasuredMachine, spread: float) -> Any:
    """Returns a measured machine's costs as another's: assumed, of that device, off by as much as machines differ."""
    if not isinstance(value, dict):
        return value
    if "source" not in value:
        return {key: _taken(entry, machine, spread) for key, entry in value.items()}
    scatter = (value.get("uncertainty") or {}).get("scatter", 0.0)
    numbers = {key: entry for key, entry in value.items() if key not in ("source", "note", "samples", "uncertainty")}
    said = {"source": "assumed", "note": f"as measured on {machine.device}", "device": machine.device}
    return {**numbers, **said, "uncertainty": _off(spread, scatter)}


def _fact(note: str, uncertainty: _Plain | None = None, *, source: str = "datasheet", **numbers: Any) -> _Plain:
    return {**numbers, **_said(note, source), **({"uncertainty": uncertainty} if uncertainty else {})}


def _said(note: str, source: str = "datasheet") -> _Plain:
    return {"source": source, "note": note}


def _off(spread: float, scatter: float = 0.0) -> _Plain:
    return {"run_spread": 0.0, "scatter": round(scatter, 5), "held_back_error": round(spread, 5)}
