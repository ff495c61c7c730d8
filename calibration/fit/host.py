"""Fitting what each call of the host takes, from what whole entries of calls take inside schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from ...engine.costs.surface_costs import further_launches
from ...resources.surface import LaunchTable
from ..measure.launches import CALLS
from ..measure.samples import SurfaceSeries
from .evidence import Row
from .surface import axes_of, kernels_of

#: What each kernel beyond a product's first takes, as a profile has it.
FURTHER = "further_launch"


def _further(tables: Sequence[LaunchTable], row: Row) -> int:
    """Returns how many kernels an entry's products launch beyond one each, by a surface's tables."""
    part = row.cost.rpartition(":")[2].partition("_")[0]
    if "hidden" not in row.key or part not in ("expert", "dense", "head"):
        return 0
    return further_launches(tables, kernels_of(part, row), 1)  # how many tokens there are hardly counts


def launch_tables(series: Sequence[SurfaceSeries]) -> list[LaunchTable]:
    """Returns how many kernels calls of products launch, a table for each dtype that was counted."""
    tables = []
    for dtype in dict.fromkeys(row.dtype for row in series if row.what == "launch"):
        counted = {row.shape: row.kernels for row in series if row.what == "launch" and row.dtype == dtype}
        axes = axes_of(counted, ("rows", "columns", "tokens"))
        kernels = tuple(math.ceil(counted.get(shape, 0) / CALLS) for shape in product(*axes.values()))
        tables.append(LaunchTable.model_validate({"dtype": dtype, **axes, "kernels": kernels}))
    return tables


def further_launch_ns(series: Sequence[SurfaceSeries]) -> float | None:
    """Returns what calls of two kernels take more than those of one, of the first dtype that has both; else None."""
    for dtype in dict.fromkeys(row.dtype for row in series if row.what == "launch"):
        one, two = (
            [np.median(row.samples_ns) / CALLS for row in series
             if (row.what, row.dtype, row.kernels) == ("launch", dtype, count * CALLS)]
            for count in (1, 2)
        )  # fmt: skip
        if one and two:
            return max(0.0, float(np.median(two) - np.median(one)))
    return None


def solve_host(
    rows: Sequence[Row], record_ns: float, tables: Sequence[LaunchTable] = (), further_ns: float = 0.0
) -> dict[str, int]:
    """Returns what each call takes, solved from what whole entries take inside schedules; nothing without these.

    Entries are those of calm runs. An event's record and a product's further kernels are the microbenchmark's: few
    models of a set launch such, and what else differs between models would pass for it. The rest is least squares, each
    entry weighted by its share of the time.
    """
    known_ns = {"event_record": record_ns, FURTHER: further_ns}
    equations: list[tuple[dict[str, int], float, float, int]] = []
    for row in rows:
        counted = calls_of(row, tables)
        left_ns = row.calm_ns - sum(counted.pop(name, 0) * ns for name, ns in known_ns.items())
        equations.append((counted, left_ns, row.calm_ns, row.n))
    names = sorted({name for counted, _, _, _ in equations for name in counted})
    if not names:
        return {}
    weights = np.array([math.sqrt(n / whole_ns) for _, _, whole_ns, n in equations])
    left = np.array([[counted.get(name, 0) for name in names] for counted, _, _, _ in equations]) * weights[:, None]
    right = np.array([ns for _, ns, _, _ in equations]) * weights
    solution = np.linalg.lstsq(left, right, rcond=None)[0]
    return {name: max(0, round(ns)) for name, ns in zip(names, solution.tolist(), strict=True)}


def calls_of(row: Row, tables: Sequence[LaunchTable] = ()) -> dict[str, int]:
    """Returns how many calls of each kind an entry makes; the first one behind a wait also resumes.

    `tables` tell of how many kernels calls of products launch: without, of one.
    """
    entry, key = row.cost.removeprefix("peer:").partition(":")[2], row.key
    if key.get("first"):
        resume = "copy_resume" if entry.startswith("copy") else "resume"
        return {**calls_of(replace(row, key={**key, "first": False}), tables), resume: 1}
    if entry == "readback":
        return {"readback_enqueue": 1, "event_record": 1}
    if entry.startswith("copy"):
        enqueue = "peer_enqueue" if row.cost.startswith("peer:") else "copy_enqueue"
        return {enqueue: 1, "event_record": 2, **({"event_wait": 1} if entry == "copy_reuse" else {})}
    if entry == "send":
        return {"peer_enqueue": 1, "event_record": 2, "event_wait": 1}
    if entry == "turn":
        dense = calls_of(replace(row, cost="host:dense"), tables)
        return {**dense, "turn": 1, **({"event_wait": 1} if key["receives"] else {})}
    counted = {"event_record": 2, **({"event_wait": 1} if entry == "expert_first_use" else {})}
    if key["dispatch"] == "graph":
        return {**counted, "graph_launch": 1}
    more = _further(tables, row)
    counted |= {"launch": key["kernels"] - key["products"], f"product_launches:{key['dtype']}": key["products"]}
    return {**counted, FURTHER: more} if more else counted
