"""Fitting what each call of the host takes, from what whole entries of calls take inside schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .evidence import Row


def solve_host(rows: Sequence[Row], record_ns: float) -> dict[str, int]:
    """Returns what each call takes, solved from what whole entries take inside schedules; nothing without these.

    Entries are those of calm runs, and an event's record is the microbenchmark's. The rest is least squares, each entry
    weighted by its share of the time.
    """
    equations: list[tuple[dict[str, int], float, float, int]] = []
    for row in rows:
        counted = calls_of(row)
        records = counted.pop("event_record")
        equations.append((counted, row.calm_ns - records * record_ns, row.calm_ns, row.n))
    names = sorted({name for counted, _, _, _ in equations for name in counted})
    if not names:
        return {}
    weights = np.array([math.sqrt(n / whole_ns) for _, _, whole_ns, n in equations])
    left = np.array([[counted.get(name, 0) for name in names] for counted, _, _, _ in equations]) * weights[:, None]
    right = np.array([ns for _, ns, _, _ in equations]) * weights
    solution = np.linalg.lstsq(left, right, rcond=None)[0]
    return {name: max(0, round(ns)) for name, ns in zip(names, solution.tolist(), strict=True)}


def calls_of(row: Row) -> dict[str, int]:
    """Returns how many calls of each kind an entry makes; the first one behind a wait also resumes."""
    entry, key = row.cost.removeprefix("peer:").partition(":")[2], row.key
    if key.get("first"):
        resume = "copy_resume" if entry.startswith("copy") else "resume"
        return {**calls_of(replace(row, key={**key, "first": False})), resume: 1}
    if entry == "readback":
        return {"readback_enqueue": 1, "event_record": 1}
    if entry.startswith("copy"):
        enqueue = "peer_enqueue" if row.cost.startswith("peer:") else "copy_enqueue"
        return {enqueue: 1, "event_record": 2, **({"event_wait": 1} if entry == "copy_reuse" else {})}
    if entry == "send":
        return {"peer_enqueue": 1, "event_record": 2, "event_wait": 1}
    if entry == "turn":
        dense = calls_of(replace(row, cost="host:dense"))
        return {**dense, "turn": 1, **({"event_wait": 1} if key["receives"] else {})}
    counted = {"event_record": 2, **({"event_wait": 1} if entry == "expert_first_use" else {})}
    if key["dispatch"] == "graph":
        return {**counted, "graph_launch": 1}
    return {**counted, "launch": key["kernels"] - key["products"], f"product_launches:{key['dtype']}": key["products"]}
