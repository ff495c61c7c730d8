"""Probes of copies: alone, in batches, beside kernels and each other, between GPUs; and of allocations."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

from ..device.cuda import run
from ..device.timing import Beside
from .bench import FLOOD_COPIES, MIB, Bench, Kernels, Probe, Seen, look_at_host
from .samples import Key

_BESIDE_COPIES = 12
#: What goes back through a pipeline: a sampled token's id.
_TOKEN_BYTES = 8


def copy_probes(bench: Bench) -> Iterator[Probe]:
    """Single copies of every size, alone and queued, and the gaps between; bytes are compared here."""
    extent = bench.extent
    sizes = [size for size in sorted({*extent.copy_bytes, *extent.expert_bytes}) if size <= extent.most_bytes]
    ways = (("h2d", "pinned"), ("h2d", "pageable"), ("d2h", "pinned"), ("d2d", "device"))
    for (direction, memory), size_bytes in product(ways, sizes):
        _verify(bench, direction, memory, size_bytes)
        yield partial(_look_at_copies, bench, direction, memory, size_bytes)


def _look_at_copies(bench: Bench, direction: str, memory: str, size_bytes: int) -> Iterator[Seen]:
    key: Key = {"direction": direction, "memory": memory, "bytes": size_bytes, "beside": "none"}
    groups = bench.copies(direction, memory, size_bytes, 6 if size_bytes <= 64 * MIB else 3)
    timer, stream = bench.timer, bench.copying
    if memory == "pageable":  # the host carries these out
        alone = [timer.ungated(stream, [calls]).durations_ns[0] for calls in groups[:3]]
        queue = timer.ungated(stream, groups)
    else:
        alone = [timer.queued(stream, [calls]).durations_ns[0] for calls in groups[:3]]
        queue = timer.queued(stream, groups)
    yield "copy", {**key, "mode": "alone"}, alone
    yield "copy", {**key, "mode": "queued"}, queue.durations_ns[1:]
    yield "copy_gap", {"direction": direction, "memory": memory}, [max(0, gap) for gap in queue.gaps_ns]


def _verify(bench: Bench, direction: str, memory: str, size_bytes: int) -> None:
    """Copy once and compare every byte; RuntimeError if one differs."""
    target, source = (end[:size_bytes] for end in bench.ends(direction, memory))
    target.zero_()
    run(bench.copies(direction, memory, size_bytes, 1)[0])
    bench.gpu.synchronize()
    if not bool((target.cpu() == source.cpu()).all()):
        raise RuntimeError(f"a {direction} copy of {size_bytes} bytes ({memory}) brought other bytes")


def batch_probes(bench: Bench) -> Iterator[Probe]:
    """So many experts in a row with nothing between them, by size."""
    ways = (("h2d", "pinned"), ("h2d", "pageable"), ("d2d", "device"))
    for size_bytes, (direction, memory) in product(bench.extent.expert_bytes, ways):
        if size_bytes <= bench.extent.most_bytes:
            yield partial(_look_at_batches, bench, direction, memory, size_bytes)


def _look_at_batches(bench: Bench, direction: str, memory: str, size_bytes: int) -> Iterator[Seen]:
    for count in bench.extent.batches:
        calls = tuple(call for group in bench.copies(direction, memory, size_bytes, count) for call in group)
        time_it = bench.timer.ungated if memory == "pageable" else bench.timer.queued
        key: Key = {"direction": direction, "memory": memory, "bytes": size_bytes, "copies": count}
        yield "copy_batch", key, time_it(bench.copying, [calls]).durations_ns


def contention_probes(bench: Bench) -> Iterator[Probe]:
    """Copies beside kernels, beside the other direction and beside CPU experts; two streams of one direction."""
    size_bytes = bench.extent.flood_bytes // 2
    kernels = bench.models[0].groups("expert", max(bench.extent.tokens) // 8, "graph")
    load = Beside(bench.compute, tuple(call for _, calls in kernels for call in calls) * 8)
    loads = {"compute": [load], "d2h": [bench.flood("d2h")]}
    for name, beside in loads.items():
        yield partial(_look_beside, bench, "h2d", size_bytes, name, beside)
    yield partial(_look_beside, bench, "d2h", size_bytes, "h2d", [bench.flood("h2d")])
    yield partial(_look_at_streams, bench, size_bytes)


def _look_beside(bench: Bench, direction: str, size_bytes: int, name: str, beside: Sequence[Beside]) -> Iterator[Seen]:
    groups = bench.copies(direction, "pinned", size_bytes, _BESIDE_COPIES)
    key: Key = {"direction": direction, "memory": "pinned", "bytes": size_bytes, "mode": "queued"}
    yield "copy", {**key, "beside": name}, bench.timer.queued(bench.copying, groups, beside).durations_ns[1:]
    yield "copy", {**key, "beside": "none"}, bench.timer.queued(bench.copying, groups).durations_ns[1:]


def _look_at_streams(bench: Bench, size_bytes: int) -> Iterator[Seen]:
    """So many copies one after the other, and the same shared out over two streams: all together."""
    count = 16
    half = tuple(call for calls in bench.copies("h2d", "pinned", size_bytes, count // 2) for call in calls)
    key: Key = {"direction": "h2d", "bytes": size_bytes, "copies": count}
    yield "copy_streams", {**key, "streams": 1}, [bench.timer.queued(bench.copying, [half + half]).total_ns]
    # The second stream begins with the first, and the first is done when both are.
    done = bench.gpu.event()
    wait = ((done.record, (bench.other,)), (done.wait, (bench.copying,)))
    fork = bench.gpu.event()
    calls = (
        (fork.record, (bench.copying,)), (fork.wait, (bench.other,)),
        bench.gpu.use(bench.other), *half, bench.gpu.use(bench.copying), *half, *wait,
    )  # fmt: skip
    yield "copy_streams", {**key, "streams": 2}, [bench.timer.queued(bench.copying, [calls]).total_ns]


def link_probes(bench: Bench) -> Iterator[Probe]:
    """Copies from the host while all other GPUs load too; kernels beside copies from another GPU."""
    others = bench.other_gpus
    if not others:
        return
    for size_bytes in bench.extent.shared_bytes:
        yield partial(
            _look_beside, bench, "h2d", size_bytes, "all_gpus", _all_loading(bench, _BESIDE_COPIES * size_bytes)
        )
    flood = _from_peer(bench, others[0])
    for kernels in bench.models:
        for part in ("expert", "dense"):
            yield partial(_look_beside_peer, bench, kernels, part, flood)


def _all_loading(bench: Bench, least_bytes: int) -> list[Beside]:
    """Returns what keeps all other GPUs loading for so many bytes at least, from memory that no cache holds."""
    beside = []
    for other in bench.other_gpus:
        size_bytes = bench.extent.flood_bytes
        target, places = other.empty(size_bytes), len(bench.pinned) // size_bytes
        starts = [number % places * size_bytes for number in range(max(FLOOD_COPIES, 2 * least_bytes // size_bytes))]
        calls = tuple((target.copy_, (bench.pinned[at : at + size_bytes], True)) for at in starts)
        beside.append(Beside(other.stream(), calls, same_gpu=False))
    return beside


def _from_peer(bench: Bench, other: Any) -> Beside:
    """Returns copies of experts' size from another GPU to this one, for longer than a queue of kernels takes."""
    size_bytes = bench.extent.flood_bytes
    source = other.empty(size_bytes)
    behind = bench.gpu.use(bench.other)  # torch orders such copies behind the current stream of this GPU
    stream = other.stream()
    call = (bench.target[:size_bytes].copy_, (source, True))
    return Beside(stream, (behind, other.use(stream), *(call,) * (8 * FLOOD_COPIES)), same_gpu=False)


def _look_beside_peer(bench: Bench, kernels: Kernels, part: str, flood: Beside) -> Iterator[Seen]:
    groups = kernels.groups(part, 1, "graph")
    queue = bench.timer.queued(bench.compute, [group for _, group in groups], [flood])
    for (size, _), took_ns in list(zip(groups, queue.durations_ns, strict=True))[1:]:
        yield "kernel", kernels.key(part, size, 1, "graph", "beside_peer"), [took_ns]


def peer_probes(bench: Bench) -> Iterator[Probe]:
    """Copies to another GPU, where there is one; what waits for one, and what the host takes for both."""
    if not bench.other_gpus:
        return
    other = bench.other_gpus[0]
    target, behind = other.empty(bench.extent.most_bytes), other.stream()
    for size_bytes in sorted({_TOKEN_BYTES, *bench.extent.copy_bytes, *bench.extent.expert_bytes}):
        if size_bytes <= bench.extent.most_bytes:
            yield partial(_look_at_peer, bench, target, size_bytes)
    yield partial(_look_at_peer_wait, bench, behind)
    gpu, compute, copying = bench.gpu, bench.compute, bench.copying
    copy = (target[:_TOKEN_BYTES].copy_, (bench.device[:_TOKEN_BYTES], True))
    enqueue = (other.use(behind), gpu.use(copying), copy, gpu.use(compute))
    yield partial(look_at_host, bench, "peer_enqueue", copying, enqueue)
    yield partial(look_at_host, bench, "turn", compute, (other.use(behind), gpu.use(compute)))


def _look_at_peer(bench: Bench, target: Any, size_bytes: int) -> Iterator[Seen]:
    key: Key = {"direction": "peer", "memory": "device", "bytes": size_bytes, "beside": "none"}
    calls = ((target[:size_bytes].copy_, (bench.device[:size_bytes], True)),)
    queue = bench.timer.queued(bench.copying, [calls] * 4)
    yield "copy", {**key, "mode": "alone"}, bench.timer.alone(bench.copying, calls, 3)
    yield "copy", {**key, "mode": "queued"}, queue.durations_ns[1:]
    yield "copy_gap", {"direction": "peer", "memory": "device"}, [max(0, gap) for gap in queue.gaps_ns]


def _look_at_peer_wait(bench: Bench, behind: Any) -> Iterator[Seen]:
    yield "peer_wait", {}, [bench.timer.there_and_back(bench.copying, behind) // 2 for _ in range(10)]


def allocation_probes(bench: Bench) -> Iterator[Probe]:
    """Getting room for one expert and for ten."""
    for size_bytes, blocks in product(bench.extent.allocation_bytes, (1, 10)):
        yield partial(_look_at_allocation, bench, size_bytes, blocks)


def _look_at_allocation(bench: Bench, size_bytes: int, blocks: int) -> Iterator[Seen]:
    for how in ("raw", "cached"):
        samples_ns = []
        for _ in range(3):
            if how == "raw":
                bench.gpu.release()
            began_ns = time.perf_counter_ns()
            room = [bench.gpu.empty(size_bytes) for _ in range(blocks)]
            samples_ns.append(time.perf_counter_ns() - began_ns)
            del room
        yield "allocation", {"how": how, "bytes": size_bytes, "blocks": blocks}, samples_ns
