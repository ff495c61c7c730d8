"""Measuring a machine: what every copy, kernel and call takes on it, by CUDA events; in rounds, raw samples kept.

Each function below returns probes: things to time, made ready beforehand. A round takes every probe once, and rounds
are repeated, so that the samples of one thing lie apart in time. Copied bytes are compared before anything is timed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from itertools import product
from typing import Any

from ..engine.run import Progress
from ..workloads.model import Model, load_model
from .cuda import Calls, Workload, run
from .samples import Key, Samples, Series
from .timing import Beside, Timer, elapsed_ns

#: What one look sees: a term, its key, and samples in ns.
Seen = tuple[str, Key, Iterable[int]]
#: Looks once.
Probe = Callable[[], Iterator[Seen]]
MakeProbes = Callable[["Bench"], Iterable[Probe]]
_Name = tuple[str, tuple[tuple[str, int | str], ...]]

KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    `models` maps presets (or files) to how many of their layers, among which are all different dense parts; `batches`
    are how many experts are copied together; `shared_bytes` the copies that are made while all GPUs load;
    `rotated_bytes` of experts take turns, so that no cache holds them.
    """

    models: Mapping[str, int]
    copy_bytes: Sequence[int]
    batches: Sequence[int]
    tokens: Sequence[int]
    contexts: Sequence[int]
    cpu_tokens: Sequence[int]
    allocation_bytes: Sequence[int]
    rounds: int
    shared_bytes: Sequence[int] = (16 * MIB, 336 * MIB)
    rotated_bytes: int = 160 * MIB
    flood_bytes: int = 32 * MIB

    @property
    def most_bytes(self) -> int:
        """The largest copy."""
        return max(self.copy_bytes)

    @property
    def expert_bytes(self) -> list[int]:
        """Sizes of the models' experts, each once."""
        return sorted({load_model(name).expert_bytes[0] for name in self.models})


FULL = Extent(
    models={"mixtral-8x7b": 2, "qwen3-30b-a3b": 4, "switch-base-128": 12, "deepseek-v2-lite": 4, "olmoe-1b-7b": 4},
    copy_bytes=(*(4 * KIB << 2 * power for power in range(9)), GIB),
    batches=(1, 2, 5, 10, 20),
    tokens=tuple(2**power for power in range(13)),
    contexts=(1024, 8192, 32768),
    cpu_tokens=(1, 16),
    allocation_bytes=(27 * MIB, 336 * MIB),
    rounds=5,
)
QUICK = Extent(
    models={"qwen3-30b-a3b": 4},
    copy_bytes=(4 * KIB, 256 * KIB, 16 * MIB, GIB),
    batches=(1, 10),
    tokens=(1, 8, 64, 512),
    contexts=(8192,),
    cpu_tokens=(1,),
    allocation_bytes=(27 * MIB,),
    rounds=2,
)

#: Of a model that is added, so many layers are measured at most: their dense parts may differ.
MOST_LAYERS = 4


def with_models(extent: Extent, names: Iterable[str]) -> Extent:
    """Return an extent with more models, by their presets or files; ModelError if one is none."""
    more = {name: min(MOST_LAYERS, load_model(name).layers) for name in names}
    return replace(extent, models={**extent.models, **more})


#: No round but the first two is begun after so long.
_LAST_ROUND_S = 200.0
#: Probes at the start of a round that are taken twice, and count the second time.
_SETTLING = 20
_FLOOD_COPIES = 16
_BESIDE_COPIES = 12
_HOST_CALLS = 100
#: What goes back through a pipeline: a sampled token's id.
_TOKEN_BYTES = 8
#: Calls in one queue, two events around each group among them: fewer than the driver takes before it blocks.
_MOST_CALLS = 900


class Bench:
    """What the probes share: the GPU, its timer, streams, and memory to copy from and to."""

    def __init__(self, gpu: Any, extent: Extent) -> None:
        import torch

        self.gpu, self.extent = gpu, extent
        self.timer = Timer(gpu)
        self.compute, self.copying, self.other = gpu.stream(), gpu.stream(), gpu.stream()
        most_bytes = extent.most_bytes
        self.device = gpu.random(most_bytes // 2, dtype="bfloat16", scale=0.02, seed=5).view(torch.uint8)
        self.target = gpu.empty(most_bytes)
        self.pinned, self.back = gpu.host_empty(most_bytes), gpu.host_empty(most_bytes)
        self.pageable = gpu.host_empty(most_bytes, pinned=False)
        for host in (self.pinned, self.pageable):
            host.copy_(self.device)
        self._kept: list[Calls] = []
        self._pool = gpu.graph_pool()

    def ends(self, direction: str, memory: str) -> tuple[Any, Any]:
        """Return (target, source) of copies in a direction."""
        host = self.pinned if memory == "pinned" else self.pageable
        return {
            "h2d": (self.target, host),
            "d2h": (self.back if memory == "pinned" else self.pageable, self.device),
            "d2d": (self.target, self.device),
        }[direction]

    def copies(self, direction: str, memory: str, size_bytes: int, count: int) -> list[Calls]:
        """Return `count` groups of one copy each, from and to different memory as far as there is any."""
        target, source = self.ends(direction, memory)
        places = len(source) // size_bytes
        starts = [number % places * size_bytes for number in range(count)]
        return [((target[at : at + size_bytes].copy_, (source[at : at + size_bytes], True)),) for at in starts]

    def flood(self, direction: str) -> Beside:
        """Return copies that keep a direction of the link busy."""
        groups = self.copies(direction, "pinned", self.extent.flood_bytes, _FLOOD_COPIES)
        return Beside(self.other, tuple(call for calls in groups for call in calls))

    def graph(self, calls: Calls) -> Calls:
        """Return the call that replays all of these as one CUDA graph; what they use is kept for as long as this."""
        self._kept.append(calls)
        return ((self.gpu.capture(calls, self._pool).replay, ()),)

    @cached_property
    def other_gpus(self) -> list[Any]:
        """All other GPUs of this machine."""
        return [self.gpu.sibling(index) for index in range(self.gpu.count()) if index != self.gpu.index]

    @cached_property
    def models(self) -> list[Kernels]:
        """The kernels of all measured models, with their weights on the GPU."""
        return [Kernels(self, load_model(name, layers=layers)) for name, layers in self.extent.models.items()]


class Kernels:
    """The kernels of one model, eager and as graphs, over enough slots and layers that no cache holds all weights."""

    def __init__(self, bench: Bench, model: Model) -> None:
        import torch

        self.model = model
        size_bytes = model.expert_bytes[0]
        self.slots = max(2, -(-bench.extent.rotated_bytes // size_bytes))
        weights = bench.gpu.random(self.slots * size_bytes // 2, dtype="bfloat16", scale=0.02, seed=7)
        slots = weights.view(torch.uint8).view(self.slots, size_bytes)
        most_tokens = max(bench.extent.tokens)
        self.workloads = {
            dispatch: Workload(bench.gpu, model, slots, most_tokens=most_tokens, graphs=dispatch == "graph")
            for dispatch in ("eager", "graph")
        }

    def groups(self, part: str, tokens: int, dispatch: str) -> list[tuple[int, Calls]]:
        """Return (size, calls) of each group of a part that is to be timed in a row."""
        model, workload = self.model, self.workloads[dispatch]
        if part == "expert":
            groups = [(model.expert_ff, workload.expert(slot, tokens)) for slot in range(self.slots)]
        elif part == "head":
            groups = [(model.head_bytes, workload.head(tokens))] * 4
        else:
            groups = [(model.dense_bytes[layer], workload.dense(layer, tokens)) for layer in range(model.layers)]
        # The first of a queue is not timed: it stands at the end once more.
        return [*groups[: _MOST_CALLS // (len(groups[0][1]) + 2) - 1], groups[0]]

    def key(self, part: str, size: int, tokens: int, dispatch: str, where: str, context: int = 0) -> Key:
        """Return the key of a kernel's series."""
        model = self.model
        kernels = {"expert": model.expert_kernels, "dense": model.dense_kernels, "head": 1}[part]
        return {
            "part": part, "hidden": model.hidden, "size": size, "tokens": tokens, "context": context,
            "dtype": model.expert_dtype if part == "expert" else model.dense_dtype,
            "kernels": kernels, "dispatch": dispatch, "where": where,
        }  # fmt: skip


def measure(
    gpu: Any, extent: Extent = FULL, progress: Progress | None = None, what: Sequence[MakeProbes] | None = None
) -> Samples:
    """Measure a GPU (`cuda.Gpu`) and return the samples: of all there is to measure, or of some.

    Raises RuntimeError if a copy brought other bytes.
    """
    bench = Bench(gpu, extent)
    probes = [probe for make in (PROBES if what is None else what) for probe in make(bench)]
    return Samples(
        date=datetime.now(UTC).date().isoformat(),
        cpu_threads=os.cpu_count() or 1,
        gpus=gpu.count(),
        series=take_rounds(probes, extent.rounds, progress),
        launch_queue_depth=launch_queue_depths(bench),
        **gpu.describe(),
    )


def take_rounds(probes: Sequence[Probe], rounds: int, progress: Progress | None = None) -> tuple[Series, ...]:
    """Take every probe once a round, `rounds` times, or less often if time runs out."""
    seen: dict[_Name, list[list[int]]] = {}
    began_s = time.monotonic()
    for probe in probes:  # loads kernels, fills caches and raises the clocks
        list(probe())
    for number in range(rounds):
        if number > 1 and time.monotonic() - began_s > _LAST_ROUND_S:
            break
        here: dict[_Name, list[int]] = {}
        for probe in probes[:_SETTLING]:  # what the last round ended with, freed memory, slows copies for a while
            list(probe())
        for done, probe in enumerate(probes, 1):
            for term, key, samples_ns in probe():
                here.setdefault((term, tuple(sorted(key.items()))), []).extend(samples_ns)
            if progress is not None:
                progress("measure", number * len(probes) + done, rounds * len(probes))
        for name, samples in here.items():
            seen.setdefault(name, []).append(samples)
    return tuple(
        Series(term=term, key=dict(key), rounds_ns=tuple(map(tuple, by_round)))
        for (term, key), by_round in seen.items()
    )


def launch_queue_depths(bench: Bench, tries: int = 3) -> tuple[int, ...]:
    """Return how many small launches the driver takes before one blocks, for each try."""
    call = _small_kernel(bench)[0]
    return tuple(bench.timer.queue_depth(bench.compute, call, 5000) for _ in range(tries))


# Copies.


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


# Several GPUs.


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
    """Return what keeps all other GPUs loading for so many bytes at least, from memory that no cache holds."""
    beside = []
    for other in bench.other_gpus:
        size_bytes = bench.extent.flood_bytes
        target, places = other.empty(size_bytes), len(bench.pinned) // size_bytes
        starts = [number % places * size_bytes for number in range(max(_FLOOD_COPIES, 2 * least_bytes // size_bytes))]
        calls = tuple((target.copy_, (bench.pinned[at : at + size_bytes], True)) for at in starts)
        beside.append(Beside(other.stream(), calls, same_gpu=False))
    return beside


def _from_peer(bench: Bench, other: Any) -> Beside:
    """Return copies of experts' size from another GPU to this one, for longer than a queue of kernels takes."""
    size_bytes = bench.extent.flood_bytes
    source = other.empty(size_bytes)
    behind = bench.gpu.use(bench.other)  # torch orders such copies behind the current stream of this GPU
    stream = other.stream()
    call = (bench.target[:size_bytes].copy_, (source, True))
    return Beside(stream, (behind, other.use(stream), *(call,) * (8 * _FLOOD_COPIES)), same_gpu=False)


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
    yield partial(_look_at_host, bench, "peer_enqueue", copying, enqueue)
    yield partial(_look_at_host, bench, "turn", compute, (other.use(behind), gpu.use(compute)))


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


# Kernels.


def kernel_probes(bench: Bench) -> Iterator[Probe]:
    """Experts, dense parts and heads over tokens, eager and as graphs: alone, queued, beside copies; over context."""
    for kernels in bench.models:
        for part, tokens, dispatch in product(("expert", "dense", "head"), bench.extent.tokens, ("eager", "graph")):
            yield partial(_look_at_kernels, bench, kernels, part, tokens, dispatch)
        for context in bench.extent.contexts:
            groups = [
                (size, _attending(bench, kernels, size, context)) for size in sorted(set(kernels.model.dense_bytes))
            ]
            yield partial(_look_at_context, bench, kernels, groups, context)


def _look_at_kernels(bench: Bench, kernels: Kernels, part: str, tokens: int, dispatch: str) -> Iterator[Seen]:
    timer, stream = bench.timer, bench.compute
    groups = kernels.groups(part, tokens, dispatch)
    calls = [group for _, group in groups]
    key = partial(kernels.key, part, tokens=tokens, dispatch=dispatch)
    for size, group in dict(groups).items():
        yield "kernel", key(size=size, where="alone"), timer.alone(stream, group, 2)
    for where, beside in (("queued", []), ("beside_copy", [bench.flood("h2d")])):
        queue = timer.queued(stream, calls, beside)
        for (size, _), took_ns in list(zip(groups, queue.durations_ns, strict=True))[1:]:
            yield "kernel", key(size=size, where=where), [took_ns]
        yield "kernel_gap", {"dispatch": dispatch, "beside": "h2d" if beside else "none"}, queue.gaps_ns


def _attending(bench: Bench, kernels: Kernels, size: int, context: int) -> Calls:
    """Return a dense part of one token with attention over a cache of so many positions, as one graph."""
    import torch

    model = kernels.model
    values = model.kv_bytes_per_token * 8 // (2 * model.layers * round(model.dtype_bits("dense")))
    head_dim = next(dim for dim in (128, 64, 32, 16, 8, 4, 2, 1) if values % dim == 0)
    shape = (1, values // head_dim, context, head_dim)
    keys, cached = (bench.gpu.random(*shape, dtype=model.dense_dtype, scale=1.0, seed=seed) for seed in (8, 9))
    attention = torch.nn.functional.scaled_dot_product_attention
    layer = model.dense_bytes.index(size)
    dense = kernels.workloads["eager"].dense(layer, 1)
    return bench.graph(((attention, (keys[:, :, :1], keys, cached)), *dense))


def _look_at_context(
    bench: Bench, kernels: Kernels, groups: Sequence[tuple[int, Calls]], context: int
) -> Iterator[Seen]:
    for size, calls in groups:
        key = kernels.key("dense", size, 1, "graph", "queued", context)
        yield "kernel", key, bench.timer.queued(bench.compute, [calls] * 6).durations_ns[1:]


def predictor_probes(bench: Bench) -> Iterator[Probe]:
    """A linear predictor of each measured model over a few tokens."""
    for kernels, tokens in product(bench.models, (1, 4, 16, 64)):
        yield partial(_look_at_predictor, bench, _predictor(bench, kernels.model, tokens), kernels.model, tokens)


def _predictor(bench: Bench, model: Model, tokens: int) -> Calls:
    import torch

    state = bench.gpu.random(tokens, model.hidden, dtype="bfloat16", scale=1.0, seed=1)
    weights = bench.gpu.random(model.hidden, model.experts, dtype="bfloat16", scale=model.hidden**-0.5, seed=2)
    scores = bench.gpu.empty(tokens, model.experts, dtype="bfloat16")
    calls = ((partial(torch.mm, out=scores), (state, weights)), (torch.topk, (scores, model.top_k)))
    return bench.graph(calls)


def _look_at_predictor(bench: Bench, calls: Calls, model: Model, tokens: int) -> Iterator[Seen]:
    key: Key = {"hidden": model.hidden, "experts": model.experts, "tokens": tokens}
    yield "predictor", key, bench.timer.queued(bench.compute, [calls] * 8).durations_ns[1:]


def cpu_probes(bench: Bench) -> Iterator[Probe]:
    """One expert on the CPU over threads, alone and beside copies to the GPU; and those copies."""
    every = os.cpu_count() or 1
    for kernels, threads, tokens in product(bench.models, sorted({1, -(-every // 2), every}), bench.extent.cpu_tokens):
        if threads > 1 or tokens == 1:  # one thread over many tokens takes seconds and serves nobody
            yield partial(_look_at_cpu, bench, kernels.model, threads, tokens)


def _look_at_cpu(bench: Bench, model: Model, threads: int, tokens: int) -> Iterator[Seen]:
    import torch

    key: Key = {
        "hidden": model.hidden, "size": model.expert_ff, "dtype": model.expert_dtype, "tokens": tokens,
        "threads": threads,
    }  # fmt: skip
    expert = _CpuExpert(bench.pageable, model, tokens)
    flood, begun, ended = bench.flood("h2d"), bench.gpu.event(), bench.gpu.event()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone_ns = [expert.time_ns() for _ in range(3)]
        flood_ns = bench.timer.queued(flood.stream, [flood.calls]).total_ns
        # Copies for about three experts, and as many experts as are done meanwhile.
        repeats = 1 + 3 * max(alone_ns) // max(1, flood_ns)
        run((bench.gpu.use(flood.stream),))
        begun.record(flood.stream)
        run(flood.calls * repeats)
        ended.record(flood.stream)
        beside_ns = [expert.time_ns()]
        while not ended.query():
            beside_ns.append(expert.time_ns())
        bench.gpu.synchronize()
    finally:
        torch.set_num_threads(before)
    yield "cpu_expert", {**key, "beside": "none"}, alone_ns
    yield "cpu_expert", {**key, "beside": "h2d"}, beside_ns[:-1] or beside_ns
    if threads > 1:
        copy: Key = {"direction": "h2d", "memory": "pinned", "bytes": bench.extent.flood_bytes, "mode": "flood"}
        each_ns = elapsed_ns(begun, ended) // (repeats * _FLOOD_COPIES)
        yield "copy", {**copy, "beside": "cpu_experts"}, [each_ns]
        yield "copy", {**copy, "beside": "none"}, [flood_ns // _FLOOD_COPIES]


class _CpuExpert:
    """An expert that the CPU computes, each time with other weights of the pool, so that no cache holds them."""

    def __init__(self, pool: Any, model: Model, tokens: int) -> None:
        import torch

        dtype = getattr(torch, model.expert_dtype)
        self._x = torch.ones(tokens, model.hidden, dtype=dtype)
        self._weights = pool.view(dtype)
        self._shape = (model.hidden, model.expert_ff)
        self._next = 0

    def time_ns(self) -> int:
        """Compute it once and return what that took."""
        hidden, inner = self._shape
        up, gate, down = (self._matrix() for _ in range(3))
        began_ns = time.perf_counter_ns()
        between = (self._x @ gate.view(hidden, inner)).relu_()
        between.mul_(self._x @ up.view(hidden, inner)) @ down.view(inner, hidden)
        return time.perf_counter_ns() - began_ns

    def _matrix(self) -> Any:
        count = self._shape[0] * self._shape[1]
        if self._next + count > len(self._weights):
            self._next = 0
        start, self._next = self._next, self._next + count
        return self._weights[start : start + count]


# The host and the way between it and the GPU.


def host_probes(bench: Bench) -> Iterator[Probe]:
    """The host's time for each kind of call."""
    graph = bench.models[0].groups("expert", 1, "graph")[0][1]
    gpu, compute, copying = bench.gpu, bench.compute, bench.copying
    done = gpu.event()
    done.record(compute)
    gpu.synchronize()
    copy, back = (bench.copies(direction, "pinned", 4 * KIB, 1)[0] for direction in ("h2d", "d2h"))
    calls: dict[str, tuple[Any, Calls]] = {
        "launch": (compute, _small_kernel(bench)),
        "product_launch": (compute, _small_product(bench)),
        "graph_launch": (compute, graph),
        "copy_enqueue": (copying, (gpu.use(copying), *copy, gpu.use(compute))),
        "readback_enqueue": (compute, back),
        "event_record": (compute, ((gpu.event().record, (compute,)),)),
        "event_wait": (compute, ((done.wait, (compute,)),)),
    }
    for name, (stream, made) in calls.items():
        yield partial(_look_at_host, bench, name, stream, made)


def _look_at_host(bench: Bench, name: str, stream: Any, calls: Calls) -> Iterator[Seen]:
    yield "host", {"call": name}, [bench.timer.host(stream, calls, _HOST_CALLS) for _ in range(3)]


def latency_probes(bench: Bench) -> Iterator[Probe]:
    """What passes between host and GPU, and between streams."""
    yield partial(_look_at_latencies, bench, bench.models[0].groups("expert", 1, "graph")[0][1])


def _look_at_latencies(bench: Bench, kernel: Calls) -> Iterator[Seen]:
    timer, compute, copying = bench.timer, bench.compute, bench.copying
    alone_ns = sorted(timer.alone(compute, kernel, 5))[2]
    seen = timer.launched_idle(compute, kernel, 10)
    yield "launch_latency", {}, [max(0, tail_ns - alone_ns) for tail_ns, _ in seen]
    yield "synchronize", {}, [known_ns for _, known_ns in seen]
    back = bench.copies("d2h", "pinned", 64, 1)[0]
    queue = timer.queued(compute, [kernel, back] * 5)
    took = zip(queue.gaps_ns[::2], queue.durations_ns[1::2], strict=True)
    yield "readback", {}, [gap_ns + copy_ns for gap_ns, copy_ns in took]
    copy = bench.copies("h2d", "pinned", bench.extent.flood_bytes // 8, 1)[0]
    kernels = [timer.after_wait(copying, copy, compute, kernel) for _ in range(5)]
    copies = [timer.after_wait(compute, kernel, copying, copy) for _ in range(5)]
    yield "event_wait_gap", {"waits": "kernel"}, [max(0, gap_ns) for gap_ns in kernels]
    yield "event_wait_gap", {"waits": "copy"}, [max(0, gap_ns) for gap_ns in copies]


def _small_kernel(bench: Bench) -> Calls:
    import torch

    y = bench.gpu.random(1, 4096, dtype="bfloat16", scale=1.0, seed=3)
    return ((partial(torch.neg, out=y), (y,)),)


def _small_product(bench: Bench) -> Calls:
    import torch

    x = bench.gpu.random(1, 256, dtype="bfloat16", scale=1.0, seed=3)
    weights = bench.gpu.random(256, 256, dtype="bfloat16", scale=0.06, seed=4)
    return ((partial(torch.mm, out=bench.gpu.empty(1, 256, dtype="bfloat16")), (x, weights)),)


#: All there is to measure, in order.
PROBES: tuple[MakeProbes, ...] = (
    copy_probes,
    batch_probes,
    contention_probes,
    link_probes,
    peer_probes,
    kernel_probes,
    predictor_probes,
    host_probes,
    latency_probes,
    cpu_probes,
    allocation_probes,
)
#: What several GPUs of one machine add.
LINKS: tuple[MakeProbes, ...] = (link_probes, peer_probes)
#: What the transfer benchmark needs.
TRANSFERS: tuple[MakeProbes, ...] = (copy_probes, batch_probes, allocation_probes)
