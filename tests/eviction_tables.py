"""What eviction policies and scopes come to on real traces, as tables:

    python tests/eviction_tables.py [policies] [layers]

`policies` is every policy's hit rate on gpt-oss-20b at a quarter of the experts (minutes). `layers` sets our per-layer
rows beside those of a published curve whose rule overshoots its budget. Both need the real traces (PRESTAGE_TRACES).
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable
from pathlib import Path

from prestage.engine.policies.eviction import EVICTION
from prestage.engine.replay.replay import replay_trace
from prestage.output.markdown import table
from prestage.workloads.importers import open_trace
from prestage.workloads.trace import RoutingTrace

CURVE = Path("bigmoeonedge-qwen")
POOLS = ("global", "per-layer")
#: What the published curve calls an equal pool for each layer.
PUBLISHED_LAYERS = {"layer": "lru", "layerlfu": "lfu"}


def policies() -> str:
    """The hit rate of every policy, in one pool and in one for each layer."""
    trace = open_trace(_traces() / "gpt-oss-20b.npz")
    rows = []
    for name in EVICTION:
        rates = [
            replay_trace(trace, "25%", eviction=name, scope=scope)["hit_rate"] for scope in ("global", "per-layer")
        ]
        rows.append([f"`{name}`", *(f"{rate:.2%}" for rate in rates)])
    return table(["eviction", "global", "per-layer"], rows)


def layers() -> str:
    """Each published per-layer row, our row at its budget, and the room that our rule needs for its hit rate."""
    trace = open_trace(_traces() / CURVE / "qwen.route.csv")
    with (_traces() / CURVE / "qwen-curve.csv").open(newline="") as file:
        published = [row for row in csv.DictReader(file) if row["policy"] in PUBLISHED_LAYERS]
    sizes = [int(size) for size in trace.extra["expert_bytes"]]
    rows = []
    for name, eviction in PUBLISHED_LAYERS.items():
        rates = [rate_with_slots(trace, eviction, slots) for slots in range(1, trace.num_experts // 2 + 1)]
        for row in published:
            if row["policy"] != name:
                continue
            ours = replay_trace(trace, f"{row['budget_mib']}MiB", eviction=eviction, scope="per-layer")
            slots = next(slots for slots, rate in enumerate(rates, 1) if round(rate, 3) >= float(row["hit_pct_cum"]))
            cells = [name, row["budget_mib"], row["hit_pct_cum"], f"{100 * ours['hit_rate']:.3f}"]
            rows.append(
                [*cells, f"{ours['budget_bytes'] / 2**20:.1f}", f"{slots}", f"{slots * sum(sizes) / 2**20:.1f}"]
            )
    columns = ["published row", "budget, MiB", "its hits, %", "ours, %", "ours holds, MiB"]
    return table([*columns, "slots a layer for its hits", "MiB for its hits"], rows)


def rate_with_slots(trace: RoutingTrace, eviction: str, slots: int) -> float:
    """Returns the hit rate, in %, with so many slots in each layer, whatever the size of its experts."""
    budget = f"{slots * trace.layers}experts"
    data = replay_trace(trace, budget, eviction=eviction, scope="per-layer", expert_bytes=1)
    return 100 * float(data["hit_rate"])


def _traces() -> Path:
    return Path(os.environ["PRESTAGE_TRACES"])


TABLES: dict[str, Callable[[], str]] = {"policies": policies, "layers": layers}

if __name__ == "__main__":
    for name in sys.argv[1:] or TABLES:
        print(TABLES[name](), end="\n\n")
