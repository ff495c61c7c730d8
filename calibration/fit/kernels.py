"""Fitting kernels: a table over tokens for each shape, quiet and beside a copy, and a rule for all other shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .evidence import MICRO, SCHEDULE, Evidence, Key, Row, Term, latency_of, uncertainty


class KernelFitter:
    """The kernels: points by shape and tokens, the rule for all other shapes, and the latency of their launch."""

    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence
        self.terms: list[Term] = []
        self._latencies: list[tuple[int, float]] = []
        self._latencies_beside: list[tuple[int, float]] = []
        self._rule_points: list[tuple[int, float, float]] = []
        self._flops: list[float] = []

    def points(self, part: str) -> list[dict[str, Any]]:
        """Returns the profile's points of all shapes of a part, in the order in which they were measured."""
        size = "expert_ff" if part == "expert" else "weight_bytes"
        seen = [(row.key, "size") for row in self._evidence.micro("kernel", part=part, where="queued", context=0)]
        seen += [(row.key, size) for row in self._evidence.schedule(part, beside_copy=False)]
        shapes = dict.fromkeys(
            tuple(key[name] for name in ("hidden", size_name, "dtype", "kernels", "dispatch"))
            for key, size_name in seen
        )
        attending = [row for row in self._evidence.micro("kernel", part=part) if row.key["context"]]
        return [point for shape in shapes for point in self._shape(part, *shape)] + list(map(_with_context, attending))

    def _shape(
        self, part: str, hidden: int, size: int, dtype: str, kernels: int, dispatch: str
    ) -> list[dict[str, Any]]:
        """Returns the points of one shape by tokens; `size` is an expert's inner width, otherwise the weight bytes."""
        shape: Key = {"hidden": hidden, "dtype": dtype, "kernels": kernels, "dispatch": dispatch}
        ours = {**shape, "part": part, "size": size, "context": 0}
        theirs = {**shape, "expert_ff" if part == "expert" else "weight_bytes": size}
        tables = {
            where: {row.key["tokens"]: row for row in self._evidence.micro("kernel", where=where, **ours)}
            for where in ("alone", "queued", "beside_copy")
        }
        seen = {
            beside: {row.key["tokens"]: row for row in self._evidence.schedule(part, beside_copy=beside, **theirs)}
            for beside in (False, True)
        }
        quiet = _scaled(tables["queued"], seen[False])
        beside = _scaled(tables["beside_copy"], seen[True])
        latencies = self._latencies_of(part, theirs, quiet, beside)
        points = []
        for tokens in sorted(quiet):
            row = seen[False].get(tokens) or tables["queued"][tokens]
            quiet_ns = max(1, round(quiet[tokens]))
            alone = tables["alone"].get(tokens)
            points.append(
                {
                    **({"expert_ff": size} if part == "expert" else {"weight_bytes": size, "kernels": kernels}),
                    "hidden": hidden, "dtype": dtype, "dispatch": dispatch, "tokens": tokens,
                    "ns": quiet_ns, "beside_copy_ns": max(quiet_ns, round(beside.get(tokens, quiet_ns))),
                    "alone_ns": round(alone.median_ns) if alone else None,
                    "launch_latency_ns": _nearest(latencies, tokens),
                    "source": "measured", "note": row.where, "samples": row.shown,
                }
            )  # fmt: skip
        self._report(part, shape, size, [seen[False].get(t) or tables["queued"][t] for t in sorted(quiet)], points)
        return points

    def _latencies_of(self, part: str, shape: Key, quiet: dict[int, float], beside: dict[int, float]) -> dict[int, int]:
        """Returns by tokens what passes from the launch to the start on an idle stream, and remember all of them."""
        latencies = {}
        launches = shape["kernels"] if shape["dispatch"] == "eager" else 1
        for row in self._evidence.schedule("idle_tail", what=part, **shape):
            tokens = row.key["tokens"]
            duration_ns = (beside if row.key["beside_copy"] else quiet).get(tokens)
            if duration_ns is None:
                continue
            latency_ns = row.median_ns - duration_ns / launches
            if row.key["beside_copy"]:
                self._latencies_beside.append((row.n, latency_ns))
            else:
                self._latencies.append((row.n, latency_ns))
                latencies[tokens] = round(latency_ns)
        return latencies

    def _report(self, part: str, shape: Key, size: int, rows: Sequence[Row], points: Sequence[dict[str, Any]]) -> None:
        """Report a shape's table, give its points their uncertainty, and keep what the rule is made from."""
        unsure = uncertainty(rows)
        for point in points:
            point["uncertainty"] = unsure
        name = f"{part} {shape['hidden']} x {size} {shape['dtype']}, {shape['dispatch']}"
        self.terms.append(Term(name, "table", sum(row.n for row in rows), unsure))
        if shape["dispatch"] == "graph" and part != "dense":
            itemsize = {"float32": 4}.get(str(shape["dtype"]), 2)
            weights_bytes = size if part == "head" else 3 * int(shape["hidden"]) * size * itemsize
            self._rule_points.append((weights_bytes, points[0]["ns"], points[0]["beside_copy_ns"]))
            if itemsize == 2:
                last = points[-1]
                self._flops.append(2 * last["tokens"] * weights_bytes / itemsize / last["ns"] * 1e9)

    def rule(self) -> dict[str, Any]:
        """Returns the rule for shapes that were not measured: a line through experts and heads of one token."""
        weight_bytes, quiet_ns, beside_ns = (
            np.array(column, dtype=np.float64) for column in zip(*self._rule_points, strict=True)
        )
        rows = np.stack([1 / quiet_ns, weight_bytes / quiet_ns], axis=1)
        constant_ns, ns_per_byte = np.linalg.lstsq(rows, np.ones(len(quiet_ns)), rcond=None)[0].tolist()
        if ns_per_byte <= 0 or constant_ns < 0:  # too few shapes, or too alike: the fastest of them bounds all
            constant_ns, ns_per_byte = 0.0, float((quiet_ns / weight_bytes).min())
        residuals = (constant_ns + ns_per_byte * weight_bytes) / quiet_ns - 1
        beyond_ns = np.maximum(1, quiet_ns - constant_ns)
        factor = float(np.median((beside_ns - constant_ns) / beyond_ns))
        worst = np.abs(residuals).max()
        return {
            "constant_ns": round(constant_ns),
            "bytes_per_second": round(1e9 / ns_per_byte),
            "flops_per_second": round(max(self._flops)),
            "beside_copy_factor": round(max(1.0, min(10.0, factor)), 3),
            "source": "measured",
            "note": f"a line through experts and heads of one token, in graphs; residuals up to {worst:.0%}",
        }

    def launch_latency(self) -> dict[str, Any]:
        """Returns the latency for shapes that have none of their own."""
        if not self._latencies:
            return latency_of([(row.n, row.median_ns) for row in self._evidence.micro("launch_latency")], MICRO)
        costs = latency_of(self._latencies, f"{SCHEDULE}: end less the return of the last call, less the kernel")
        if self._latencies_beside:
            costs["beside_copy_ns"] = latency_of(self._latencies_beside, "")["ns"]
        return costs


def _scaled(micro: dict[int, Row], seen: dict[int, Row]) -> dict[int, float]:
    """Returns ns by tokens: as seen inside schedules, else the microbenchmark times the nearest ratio of the two."""
    ratios = {tokens: row.median_ns / micro[tokens].median_ns for tokens, row in seen.items() if tokens in micro}
    scaled = {tokens: row.median_ns * (_nearest(ratios, tokens) or 1.0) for tokens, row in micro.items()}
    return scaled | {tokens: row.median_ns for tokens, row in seen.items()}


def _with_context(row: Row) -> dict[str, Any]:
    """Returns the point of a dense part that attends to cached positions."""
    key = {name: value for name, value in row.key.items() if name not in ("part", "size", "where")}
    ns = round(row.median_ns)
    return {
        **key, "weight_bytes": row.key["size"], "ns": ns, "beside_copy_ns": ns, "source": "measured", "note": MICRO,
        "samples": row.shown,
    }  # fmt: skip


def _nearest(by_tokens: dict[int, Any], tokens: int) -> Any:
    """Returns the value at the nearest number of tokens, on a logarithmic scale; None if there is none."""
    if not by_tokens:
        return None
    return by_tokens[min(by_tokens, key=lambda other: (abs(math.log2(other / tokens)), other))]
