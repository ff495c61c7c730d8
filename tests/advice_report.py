"""How near 60 trials of advice come to the best of whole spaces: `python tests/advice_report.py FOLDER`.

Every point of each case's space is simulated once, into a file of FOLDER (again only what is missing there); the search
is then run over that table, once a seed, as `prestage advise` runs it, and random search beside it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from prestage.errors import InputError
from prestage.experiments.advice_result import best_trial
from prestage.experiments.advice_search import Search, load_optuna
from prestage.experiments.advice_space import Request, Space, make_space
from prestage.experiments.advise import Evaluator
from prestage.experiments.workers import Workers

GOAL = "tokens_per_second"
TRIALS = 60
#: A search succeeds that comes so near the best of the space.
NEAR = 0.98
#: A prompt that counts beside its answer, so that settings of both do.
REQUEST = Request(prompt=256, output=32, most=3)
CHUNKS = [8, 16, 32, 64, 128, 256]
TENTHS = [f"{share}%" for share in range(10, 100, 10)]
_CACHE: dict[str, list[Any]] = {
    "memory.gpu_budget": TENTHS,
    "memory.eviction": ["lru", "lfu", "lfu-incache", "clock", "sieve"],
    "prefetch.lookahead": [0, 1, 2],
    "prefetch.k": [1, 2, 4, 6],
    "workload.chunk_tokens": CHUNKS,
}
_LLAMA: dict[str, list[Any]] = {
    "memory.cpu_layers": list(range(25)),
    "miss.cpu_threads": [1, 2, 4, 8, 12, 16],
    "workload.chunk_tokens": CHUNKS,
    "copy.host_memory": ["pageable", "pinned"],
    "miss.fetch_from": ["32tokens", "1000000tokens"],
}
_KT: dict[str, list[Any]] = {
    "memory.gpu_budget": TENTHS,
    "memory.preload": ["popular", "front", "even"],
    "miss.cpu_threads": [2, 4, 8, 12, 16],
    "workload.chunk_tokens": CHUNKS,
    "miss.fetch_from": ["16tokens", "64tokens", "128tokens", "256tokens", "1000000tokens"],
}
GPT, LITE = "model.preset=gpt-oss-20b", "model.preset=deepseek-v2-lite"
#: Settings and space of each case.
CASES: dict[str, tuple[list[str], dict[str, list[Any]]]] = {
    "RTX 3060, 7950X: llama.cpp": (
        ["runtime.name=llama.cpp", GPT, "machine.gpu=rtx3060", "machine.cpu=7950x"], _LLAMA,
    ),
    "RTX 4090, 7950X: KTransformers": (
        ["runtime.name=ktransformers", LITE, "machine.gpu=rtx4090", "machine.cpu=7950x"], _KT,
    ),
    "RTX 3090, 5950X: MoE-Infinity": (
        ["runtime.name=moe-infinity", GPT, "machine.gpu=rtx3090", "machine.cpu=5950x"], _CACHE,
    ),
    "RTX 5080, 5950X: llama.cpp": (
        ["runtime.name=llama.cpp", GPT, "machine.gpu=rtx5080", "machine.cpu=5950x"], _LLAMA,
    ),
    "RTX 5090, 9950X: KTransformers": (
        ["runtime.name=ktransformers", GPT, "machine.gpu=rtx5090", "machine.cpu=9950x"], _KT,
    ),
    "H200, PCIe 5: MoE-Infinity": (
        ["runtime.name=moe-infinity", LITE, "machine.profile=h200"], _CACHE,
    ),
}  # fmt: skip


@cache
def cached_space(name: str) -> Space:
    """Returns the space of a case, made once in a process."""
    return space_of(name)


def space_of(name: str) -> Space:
    """Returns the space of a case."""
    settings, over = CASES[name]
    return make_space("synthetic", settings, over=over, request=REQUEST)


def point_of(task: tuple[str, dict[str, Any]]) -> tuple[tuple[Any, ...], float | None]:
    """Returns a point of a case and what it comes to; None if it cannot run."""
    name, point = task
    try:
        return tuple(point.values()), Evaluator(cached_space(name), [GOAL])(point)[GOAL]
    except InputError:
        return tuple(point.values()), None


def table_of(name: str, folder: Path, workers: int = 1) -> dict[tuple[Any, ...], float | None]:
    """Returns what every point of a case comes to (None: it cannot run), simulating what the folder's file lacks."""
    space, path = space_of(name), folder / f"{''.join(c if c.isalnum() else '-' for c in name)}.jsonl"
    known: dict[tuple[Any, ...], float | None] = {}
    if path.exists():
        known = {tuple(point): value for point, value in map(json.loads, path.read_text().splitlines())}
    tasks = [(name, point) for point in space.grid.points() if tuple(point.values()) not in known]
    with path.open("a", buffering=1) as file:
        for _, row in Workers(workers).run(point_of, tasks):
            if row is not None:
                known[row[0]] = row[1]
                file.write(json.dumps(row) + "\n")
    return known


def searched(name: str, table: Mapping[tuple[Any, ...], float | None], seeds: int) -> Iterator[float]:
    """Yields what share of the best each seed's search finds."""
    best = max(value for value in table.values() if value is not None)

    def evaluate(point: Mapping[str, Any]) -> dict[str, float]:
        value = table[tuple(point.values())]
        if value is None:
            raise InputError("does not fit")
        return {GOAL: value}

    for seed in range(seeds):
        found = best_trial(Search(cached_space(name), [GOAL], evaluate, seed=seed).run(TRIALS), GOAL)
        yield 0.0 if found is None else found.figures[GOAL] / best


def drawn(table: Mapping[tuple[Any, ...], float | None], seeds: int) -> Iterator[float]:
    """Yields what share of the best so many points at random come to, by seed."""
    values = list(table.values())
    best = max(value for value in values if value is not None)
    for seed in range(seeds):
        tried = random.Random(seed).sample(values, TRIALS)
        yield max((value for value in tried if value is not None), default=0.0) / best


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--case", action="append", help="only cases that begin so")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    load_optuna()
    print("| machine and runtime | points | feasible | within 2 % | advice | worst | random | worst |")
    print("|---|---|---|---|---|---|---|---|")
    for name in CASES:
        if options.case and not any(name.startswith(start) for start in options.case):
            continue
        table = table_of(name, options.folder, options.workers)
        feasible = [value for value in table.values() if value is not None]
        near = sum(value >= NEAR * max(feasible) for value in feasible)
        cells = [name, f"{len(table):,}", f"{len(feasible):,}", f"{near:,}"]
        for shares in (list(searched(name, table, options.seeds)), list(drawn(table, options.seeds))):
            cells += [f"{sum(share >= NEAR for share in shares)} of {len(shares)}", f"{min(shares):.1%}"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    from advice_report import main as as_a_module  # whose functions workers can import

    as_a_module()
