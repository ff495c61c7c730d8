"""Probes of kernels, of experts on the CPU, and of what calls take the host."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

from ...workloads.model import Model
from ..device.cuda import Calls, run
from ..device.timing import elapsed_ns
from .bench import FLOOD_COPIES, KIB, Bench, Kernels, Probe, Seen, look_at_host
from .samples import Key


def launch_queue_depths(bench: Bench, tries: int = 3) -> tuple[int, ...]:
    """Returns how many small launches the driver takes before one blocks, for each try."""
    call = _small_kernel(bench)[0]
    return tuple(bench.timer.queue_depth(bench.compute, call, 5000) for _ in range(tries))


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
    """Returns a dense part of one token with attention over a cache of so many positions, as one graph."""
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
        each_ns = elapsed_ns(begun, ended) // (repeats * FLOOD_COPIES)
        yield "copy", {**copy, "beside": "cpu_experts"}, [each_ns]
        yield "copy", {**copy, "beside": "none"}, [flood_ns // FLOOD_COPIES]


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
        "attention_launch": (compute, _small_attention(bench)),
        "graph_launch": (compute, graph),
        "copy_enqueue": (copying, (gpu.use(copying), *copy, gpu.use(compute))),
        "readback_enqueue": (compute, back),
        "event_record": (compute, ((gpu.event().record, (compute,)),)),
        "event_wait": (compute, ((done.wait, (compute,)),)),
    }
    for name, (stream, made) in calls.items():
        yield partial(look_at_host, bench, name, stream, made)


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


def _small_attention(bench: Bench) -> Calls:
    import torch

    cache = bench.gpu.random(2, 1, 8, 1024, 128, dtype="bfloat16", scale=1.0, seed=5)
    query = bench.gpu.random(1, 32, 1, 128, dtype="bfloat16", scale=1.0, seed=6)
    attend = partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
    attend(query, *cache)  # a library plans at the first call of a shape
    return ((attend, (query, *cache)),)
