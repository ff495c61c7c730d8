"""What GPUs take to exchange data, by size: copies of each to the other, and NCCL's all-to-all.

Exchanges stand in a row in which each waits for the last one on all GPUs, as a layer's do: so one clock is enough, and
what a row takes, shared out, is from the last cause of an exchange to its end everywhere. The first of a row is not
timed: it waits until all GPUs are there.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from queue import Empty
from tempfile import TemporaryDirectory
from time import perf_counter_ns
from typing import Any

from ..device.cuda import Calls, Gpu, run
from ..device.timing import TimingError, elapsed_ns
from .bench import KIB, Bench, Probe, Seen
from .samples import Key, Series

#: Bytes that each GPU sends to each other one: 4 KiB to 64 MiB.
SIZES = tuple(4 * KIB << power for power in range(15))
#: Exchanges in a row that is timed, rows of a look, and rows of which the host's time is taken.
_ROW, _LOOKS, _HOST_ROWS = 10, 5, 50
#: How long GPUs are held back until a row of NCCL's calls is queued: so long for each call.
_GATE_NS_A_CALL = 500_000
#: How long processes wait for each other.
_PATIENCE_S = 90


@dataclass(frozen=True)
class _End:
    """One GPU of two that exchange: where it copies on, its memory, and the event behind its copies."""

    gpu: Any
    stream: Any
    sent: Any
    received: Any
    done: Any


def exchange_probes(bench: Bench) -> Iterator[Probe]:
    """Exchanges between two GPUs by a copy of each to the other; bytes are compared here."""
    sizes = [size for size in SIZES if size <= bench.extent.most_bytes]
    if not bench.other_gpus or not sizes:
        return
    there = bench.other_gpus[0]
    bench.gpu.meet(there)
    here_end, there_end = (_end(gpu, max(sizes), seed) for seed, gpu in enumerate((bench.gpu, there), 31))
    for size_bytes in sizes:
        calls = _exchange(here_end, there_end, size_bytes)
        _verify(calls, here_end, there_end, size_bytes)
        yield partial(_look_at_exchange, bench, here_end.stream, calls, size_bytes)


def _end(gpu: Any, most_bytes: int, seed: int) -> _End:
    import torch

    stream, done = gpu.stream(), gpu.event()
    sent = gpu.random(most_bytes // 2, dtype="bfloat16", scale=1.0, seed=seed).view(torch.uint8)
    received = gpu.empty(most_bytes)
    gpu.synchronize()
    done.record(stream)
    return _End(gpu, stream, sent, received, done)


def _exchange(here: _End, there: _End, size_bytes: int) -> Calls:
    """Returns the calls of one exchange, behind the last one's end on both GPUs."""
    both = ((here, there), (there, here))
    waits = tuple((other.done.wait, (one.stream,)) for one, other in both)
    copies: Calls = ()
    for one, other in both:
        copy = one.gpu.between(other.received[:size_bytes], one.sent[:size_bytes], one.stream)
        copies += (one.gpu.use(one.stream), copy, (one.done.record, (one.stream,)))
    return (*waits, *copies, here.gpu.use(here.stream))


def _verify(calls: Calls, here: _End, there: _End, size_bytes: int) -> None:
    """Exchange once and compare every byte; RuntimeError if one differs."""
    for end in (here, there):
        end.received.zero_()
        end.gpu.synchronize()
    run(calls)
    for one, other in ((here, there), (there, here)):
        one.gpu.synchronize()
        other.gpu.synchronize()
        if not bool((one.received[:size_bytes].cpu() == other.sent[:size_bytes].cpu()).all()):
            raise RuntimeError(f"an exchange of {size_bytes} bytes brought other bytes")


def _look_at_exchange(bench: Bench, stream: Any, calls: Calls, size_bytes: int) -> Iterator[Seen]:
    key: Key = {"how": "copies", "bytes": size_bytes, "gpus": 2}
    rows = [bench.timer.queued(stream, [calls, calls * _ROW]).durations_ns[1] for _ in range(_LOOKS)]
    yield "exchange", {**key, "mode": "in a row"}, [ns // _ROW for ns in rows]
    yield "exchange", {**key, "mode": "host"}, [bench.timer.host(stream, calls, _HOST_ROWS)]


@dataclass(frozen=True)
class _Meeting:
    """What processes that exchange agree upon: their number, how they find each other, and what is measured."""

    gpus: int
    backend: str
    make_gpu: Callable[[int], Any]
    path: Path
    sizes: tuple[int, ...]
    rounds: int


def measure_collectives(
    gpus: int,
    sizes: Sequence[int] = SIZES,
    rounds: int = 3,
    *,
    backend: str = "nccl",
    make_gpu: Callable[[int], Any] = Gpu,
) -> tuple[Series, ...]:
    """Returns the series `exchange` of all-to-alls between so many GPUs, a process for each; of the first one's clock.

    Raises RuntimeError if a process fails or does not answer.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with TemporaryDirectory() as folder:
        meeting = _Meeting(gpus, backend, make_gpu, Path(folder) / "meeting", tuple(sizes), rounds)
        processes = [
            context.Process(target=_take_part, args=(rank, meeting, results), daemon=True) for rank in range(gpus)
        ]
        for process in processes:
            process.start()
        try:
            seen = results.get(timeout=_PATIENCE_S)
            for process in processes:
                process.join(timeout=_PATIENCE_S)
        except Empty:
            raise RuntimeError(f"{backend}: {gpus} processes gave no answer within {_PATIENCE_S} s") from None
        finally:
            for process in processes:
                process.kill()
    if isinstance(seen, str):
        raise RuntimeError(f"{backend}: {seen}")
    return tuple(
        Series(term="exchange", key={"how": backend, "bytes": size, "gpus": gpus, "mode": mode}, rounds_ns=rounds_ns)
        for (size, mode), rounds_ns in seen.items()
    )


def _take_part(rank: int, meeting: _Meeting, results: Any) -> None:
    """Be one of the processes; the first one, and whichever fails, says what was seen."""
    import torch.distributed as dist

    try:
        gpu = meeting.make_gpu(rank)
        dist.init_process_group(
            meeting.backend, init_method=f"file://{meeting.path}", rank=rank, world_size=meeting.gpus,
            timeout=timedelta(seconds=_PATIENCE_S),
        )  # fmt: skip
        seen = _all_to_alls(gpu, rank, meeting)
        dist.barrier()
        if rank == 0:
            results.put(seen)
        dist.destroy_process_group()
    except Exception as error:
        results.put(f"process {rank}: {type(error).__name__}: {error}")


def _all_to_alls(gpu: Any, rank: int, meeting: _Meeting) -> dict[tuple[int, str], tuple[tuple[int, ...], ...]]:
    """Returns, by bytes and mode, what all-to-alls took in each round; nothing is sent from a GPU to itself."""
    from torch.distributed import all_to_all_single, barrier

    gpus, sizes = meeting.gpus, meeting.sizes
    stream, gate, start, end = gpu.stream(), gpu.event(), gpu.event(), gpu.event()
    run((gpu.use(stream),))
    received, sent = (gpu.empty((gpus - 1) * max(sizes)).zero_() for _ in range(2))
    seen: dict[tuple[int, str], list[tuple[int, ...]]] = {}
    for size in sizes * (meeting.rounds + 1):
        splits = [0 if other == rank else size for other in range(gpus)]
        room = (gpus - 1) * size
        rows_ns, host_ns = [], []
        for _ in range(_LOOKS):
            barrier()
            gpu.synchronize()
            gpu.spin(_GATE_NS_A_CALL * (_ROW + 1))
            gate.record(stream)
            all_to_all_single(received[:room], sent[:room], splits, splits)
            start.record(stream)
            began_ns = perf_counter_ns()
            for _ in range(_ROW):
                all_to_all_single(received[:room], sent[:room], splits, splits)
            took_ns = perf_counter_ns() - began_ns
            end.record(stream)
            held = not gate.query()
            gpu.synchronize()
            host_ns.append(took_ns // _ROW)
            if held:
                rows_ns.append(elapsed_ns(start, end) // _ROW)
        if not rows_ns:
            raise TimingError(f"all-to-alls of {size} bytes could not be queued before the GPU began with them")
        seen.setdefault((size, "in a row"), []).append(tuple(rows_ns))
        seen.setdefault((size, "host"), []).append(tuple(host_ns))
    return {key: tuple(taken[1:]) for key, taken in seen.items()}  # the first round loads kernels and opens ways
