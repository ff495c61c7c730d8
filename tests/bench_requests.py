"""Speed of runs under load: steps a second of small resident models, and an hour of traffic to mixtral.

    python tests/bench_requests.py [--requests 7200] [--stream DIR]

Prints, as JSON, steps and seconds, of the clock and of this process's CPU time, from a scenario to its result; and, on
Linux, the most memory at once that no file backs: of what is streamed to files the system keeps what it likes.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from prestage.engine.scenario.scenario import make_scenario
from prestage.engine.simulate import simulate

COMMON: dict[str, Any] = {
    "machine": {"profile": "h200-pcie5"},
    "workload": {"synthetic": {"tokens": 628, "skew": 0.6, "sequences": 4, "prefill_tokens": 32}},
    "memory": {"gpu_budget": "100%"}, "prefetch": {"policy": "none"},
    "dispatch": {"mode": "graph", "router_readback": False},
}  # fmt: skip


def small(preset: str) -> dict[str, Any]:
    """Four users of two layers, each of whose answers has 512 tokens."""
    requests = {"arrivals": "closed", "users": 4, "count": 200, "prompt_tokens": 64, "output_tokens": 512,
                "kv": {"budget": "100000blocks"}}  # fmt: skip
    return COMMON | {"model": {"preset": preset, "layers": 2}, "requests": requests}


def hour(count: int) -> dict[str, Any]:
    """So many requests at two a second; 7,200 are an hour."""
    lengths = {"distribution": "lognormal", "cv": 0.7}
    requests = {"rate": 2.0, "count": count, "prompt_tokens": {"mean": 1000, **lengths},
                "output_tokens": {"mean": 200, **lengths}, "kv": {"budget": "40GiB"}}  # fmt: skip
    return COMMON | {"model": {"preset": "mixtral-8x7b"}, "requests": requests}


def measured(data: dict[str, Any], stream: Path | None = None) -> dict[str, Any]:
    """What a run takes, the second time, when all is compiled."""
    scenario = make_scenario(data)
    for _ in range(2 if stream is None else 1):
        clock_s, cpu_s = time.perf_counter(), time.process_time()
        found = simulate(scenario, baselines=False, stream=stream).data["requests"]
        clock_s, cpu_s = time.perf_counter() - clock_s, time.process_time() - cpu_s
    return {
        "steps": found["steps"], "seconds": clock_s, "cpu_seconds": cpu_s, "steps_per_second": found["steps"] / clock_s,
        "steps_per_cpu_second": found["steps"] / cpu_s,
    }  # fmt: skip


class Watched:
    """The most memory of this process that no file backs, in MiB, looked at twice a second."""

    def __init__(self) -> None:
        self.most_mib = 0
        self._status = Path("/proc/self/status")
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self._status.exists():
            found = re.search(r"^RssAnon:\s+(\d+) kB", self._status.read_text(), re.MULTILINE)
            self.most_mib = max(self.most_mib, int(found[1]) >> 10 if found else 0)
            time.sleep(0.5)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=7200)
    parser.add_argument("--stream", type=Path, help="keep records in files there")
    given = parser.parse_args()
    watched = Watched()
    found = {f"{preset}, two layers": measured(small(preset)) for preset in ("mixtral-8x7b", "olmoe-1b-7b")}
    with tempfile.TemporaryDirectory() as folder:
        found[f"{given.requests} requests to mixtral"] = measured(hour(given.requests), given.stream or Path(folder))
    peaks = {
        "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "peak_without_files_MiB": watched.most_mib,
    }
    print(json.dumps(found | peaks, indent=2))


if __name__ == "__main__":
    main()
