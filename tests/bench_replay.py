"""Replay speed against other cache simulators, side by side in one run on one core.

    python tests/bench_replay.py [--repeats N] [--accesses N]

Prints, as JSON, millions of accesses per second of LRU with one place an expert, every (token, expert) pair looked up
by itself, on two skewed synthetic traces, and how many times faster the compiled replay is than each of:

- libCacheSim (`pip install libcachesim`), a C library, by its Python bindings' fastest way: the whole trace, as packed
  records in a file, in one call;
- a loop over a `collections.OrderedDict`, what a user writes first;
- `cachetools.LRUCache` (`pip install cachetools`) in such a loop.

Each gets the trace in its own favorite form beforehand; the compiled replay is timed whole, from trace and steps to the
outcome of every access. All must count the same misses. What is not installed is skipped, saying so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prestage.engine.decide.lookups import list_lookups
from prestage.engine.replay.compiled import COMPILED
from prestage.workloads.batches import plan_steps
from prestage.workloads.synthetic import synthesize
from prestage.workloads.trace import RoutingTrace

#: Layers, experts per layer, top-k: the shapes of gpt-oss-20b and DeepSeek-V3.
SHAPES = ((24, 32, 4), (58, 256, 8))
SHARES = (0.25, 0.5, 0.75)

Experts = npt.NDArray[np.int32]
#: Given the places, replays all accesses and returns the misses.
Replay = Callable[[int], int]


def compiled(trace: RoutingTrace) -> Replay:
    """Prestage's own: the whole call, with the outcome of every access."""
    steps = plan_steps(trace.sequence, trace.phase)

    def replay(places: int) -> int:
        outcome, _ = COMPILED["lru"](trace, steps, [places], [1] * trace.layers, "single")
        return int(outcome.size - np.count_nonzero(outcome))

    return replay


def libcachesim(experts: Experts, folder: Path) -> Replay:
    """Packed records of its "oracle general" format, memory-mapped, in one call."""
    from libcachesim import LRU, TraceReader, TraceType  # type: ignore[import-untyped]

    records = np.zeros(len(experts), dtype=[("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
    records["id"], records["size"], records["next"] = experts, 1, -1
    file = folder / "trace.oracleGeneral"
    records.tofile(file)

    def replay(places: int) -> int:
        reader = TraceReader(str(file), TraceType.ORACLE_GENERAL_TRACE)
        miss_ratio: float = LRU(places).process_trace(reader)[0]
        return round(miss_ratio * len(experts))

    return replay


def ordered_dict(experts: Experts) -> Replay:
    """The plain loop."""
    accesses = experts.tolist()

    def replay(places: int) -> int:
        held: OrderedDict[int, None] = OrderedDict()
        move_to_end = held.move_to_end
        misses = 0
        for expert in accesses:
            if expert in held:
                move_to_end(expert)
            else:
                misses += 1
                if len(held) == places:
                    held.popitem(last=False)
                held[expert] = None
        return misses

    return replay


def cachetools(experts: Experts) -> Replay:
    """The same loop over its LRUCache."""
    from cachetools import LRUCache

    accesses = experts.tolist()

    def replay(places: int) -> int:
        held: LRUCache[int, None] = LRUCache(places)
        misses = 0
        for expert in accesses:
            if expert in held:
                held[expert]
            else:
                misses += 1
                held[expert] = None
        return misses

    return replay


def measure(replays: dict[str, tuple[Replay, int]], places: int, accesses: int) -> dict[str, float]:
    """Returns the median rate of each, in millions of accesses per second, taking turns; each has its own repeats."""
    seconds: dict[str, list[float]] = {name: [] for name in replays}
    misses = {}
    for turn in range(max(repeats for _, repeats in replays.values())):
        for name, (replay, repeats) in replays.items():
            if turn < repeats:
                began = time.process_time()
                misses[name] = replay(places)
                seconds[name].append(time.process_time() - began)
    if len(set(misses.values())) != 1:
        raise SystemExit(f"with {places} places they disagree about the misses: {misses}")
    return {name: round(accesses / statistics.median(taken) / 1e6, 2) for name, taken in seconds.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--accesses", type=int, default=10_000_000)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    missing = [name for name in ("libcachesim", "cachetools") if find_spec(name) is None]
    report: dict[str, object] = {"skipped, not installed": missing}
    for layers, experts, top_k in SHAPES:
        tokens = -(-arguments.accesses // (layers * top_k))
        trace = synthesize(tokens, layers, experts, top_k, skew=0.8, reuse=0.3, seed=1)
        accesses = list_lookups(trace, plan_steps(trace.sequence, trace.phase), "single", shared=False).experts
        with tempfile.TemporaryDirectory() as folder:
            replays: dict[str, tuple[Replay, int]] = {"compiled": (compiled(trace), arguments.repeats)}
            if "libcachesim" not in missing:
                replays["libcachesim"] = (libcachesim(accesses, Path(folder)), arguments.repeats)
            replays["ordereddict"] = (ordered_dict(accesses), 1)
            if "cachetools" not in missing:
                replays["cachetools"] = (cachetools(accesses), 1)
            replays["compiled"][0](layers * experts)  # compiles, or loads what was compiled
            for share in SHARES:
                rates = measure(replays, int(layers * experts * share), len(accesses))
                report[f"{layers} x {experts}, {share:.0%}"] = {
                    "million_accesses_per_second": rates,
                    "times_faster": {
                        name: round(rates["compiled"] / rate, 1) for name, rate in rates.items() if name != "compiled"
                    },
                }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
