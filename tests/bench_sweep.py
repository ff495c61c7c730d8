"""The sweep at scale, on this machine: how it speeds up with workers, what kills cost, and what the driver keeps.

    python tests/bench_sweep.py [speed|faults|memory …] [--scenarios N] [--tokens N] [--repeats N]

`speed` runs scenarios of gpt-oss-20b with one process, two, and a Dask cluster of two workers on this machine, in
turn; `faults` kills a worker and then the driver in the middle and compares what the resumed sweep has with an
undisturbed one; `memory` compares the driver's peak memory after 200 and 20,000 rows. Prints JSON. Times are wall
seconds, with the CPU seconds of all processes beside them, because on a shared machine the former also measure others.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from test_sweep import rows_of, start_cluster, wait_for_rows, wait_for_workers, worker_pids

#: 10 budgets x 3 k x 10 recalls x 2 disciplines = 600 scenarios.
GRID = {
    "copy.discipline": "fifo,two_streams",
    "predictor.recall": "0.5,0.55,0.6,0.65,0.7,0.75,0.8,0.85,0.9,0.95",
    "prefetch.k": "1,2,4",
    "memory.gpu_budget": "15%,20%,25%,30%,35%,40%,45%,50%,55%,60%",
}
#: The cheapest scenario there is, to make very many rows.
CHEAP = ["--set", "model.layers=1", "--set", "workload.synthetic.tokens=2", "--set", "workload.synthetic.sequences=1"]
CHEAP += ["--set", "workload.synthetic.prefill_tokens=0", "--set", "prefetch.lookahead=0", "--no-baselines"]


def command(scenarios: int, tokens: int, out: str) -> list[str]:
    """Returns the command of a sweep of `scenarios` of gpt-oss-20b over `tokens` tokens."""
    trace = Path(os.environ["PRESTAGE_TRACES"]) / "gpt-oss-20b.npz"
    grid = [part for key, values in GRID.items() for part in ("--grid", f"{key}={values}")]
    settings = [f"workload.trace={trace}", f"workload.tokens={tokens}", "copy.contention=false"]
    sets = [part for setting in settings for part in ("--set", setting)]
    sample = ["--sample", str(scenarios)] if scenarios < 600 else []
    return [
        sys.executable,
        "-m",
        "prestage",
        "sweep",
        "gpt-oss-20b",
        *grid,
        *sets,
        *sample,
        "-o",
        out,
        "--no-baselines",
    ]


def timed(arguments: list[str], cwd: Path) -> dict[str, float]:
    """Run a command; return its wall seconds and the CPU seconds of all its processes."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(arguments, cwd=cwd, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"wall_s": round(time.monotonic() - began, 2), "cpu_s": round(cpu_s, 2)}


def speed(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Time one process, two, and a cluster of two, in turn."""
    address, processes = start_cluster(folder)
    try:
        wait_for_workers(address, 2)
        ways = {"one": ["--workers", "1"], "two": ["--workers", "2"], "cluster": ["--cluster", address]}
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for repeat in range(arguments.repeats):
            for way, how in ways.items():
                sweep = command(arguments.scenarios, arguments.tokens, f"{way}{repeat}.jsonl")
                runs[way].append(timed([*sweep, *how], folder))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    wall = {way: statistics.median(run["wall_s"] for run in timed_runs) for way, timed_runs in runs.items()}
    same = all(rows_of(folder / f"{way}0.jsonl") == rows_of(folder / "one0.jsonl") for way in ways)
    return {
        "scenarios": arguments.scenarios,
        "tokens": arguments.tokens,
        "runs": runs,
        "two_over_one": round(wall["one"] / wall["two"], 2),
        "cluster_over_two": round(wall["cluster"] / wall["two"], 2),
        "rows_equal": same,
        "load_average": os.getloadavg()[0],
    }


def faults(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Kill a worker at a third and the driver at two thirds, resume, and compare with an undisturbed sweep."""
    count = arguments.scenarios
    killed = [*command(count, arguments.tokens, "killed.jsonl"), "--workers", "2"]
    journal = folder / "killed.jsonl"
    driver = subprocess.Popen(killed, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_rows(driver, journal, count // 3, timeout_s=3600)
    os.kill(worker_pids(driver.pid)[0], signal.SIGKILL)
    wait_for_rows(driver, journal, 2 * count // 3, timeout_s=3600)
    driver.kill()
    driver.wait()
    at_kill = journal.read_bytes().count(b"\n")
    timed(killed, folder)
    timed([*command(count, arguments.tokens, "whole.jsonl"), "--workers", "2"], folder)
    rows = rows_of(journal)
    return {
        "rows_when_the_driver_was_killed": at_kill,
        "rows_after_resume": len(rows),
        "distinct": len({json.loads(row)["key"] for row in rows}),
        "errors": sum(json.loads(row)["error"] is not None for row in rows),
        "equal_to_undisturbed": rows == rows_of(folder / "whole.jsonl"),
    }


def memory(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Returns the driver's peak memory in MiB after 200 and 20,000 rows."""
    peaks = {}
    for count in (200, 20_000):
        seeds = ",".join(map(str, range(count // 100)))
        grid = ["--grid", f"seed={seeds}", "--grid", f"predictor.latency_us={','.join(map(str, range(100)))}"]
        sweep = [sys.executable, "-m", "prestage", "sweep", *CHEAP, *grid, "-o", f"{count}.csv", "--workers", "2"]
        driver = subprocess.Popen(sweep, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(driver.pid, 0)
        assert status == 0
        assert (folder / f"{count}.jsonl").read_bytes().count(b"\n") == count
        peaks[f"{count}_rows_mib"] = round(usage.ru_maxrss / 1024, 1)
    return peaks


MEASURES: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "speed": speed,
    "faults": faults,
    "memory": memory,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measures", nargs="*", choices=[*MEASURES, []])
    parser.add_argument("--scenarios", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    for name in arguments.measures or MEASURES:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({name: MEASURES[name](arguments, Path(folder))}, indent=2), flush=True)


if __name__ == "__main__":
    main()
