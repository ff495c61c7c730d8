"""Checking the surface: kernels that were measured, and what a profile's surface says of them.

What is measured as a point of the profile does not count here: every kernel is put together from the surface, as those
of a model that nobody measured are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engine.costs.surface_costs import Product, SurfaceCosts
from ...resources.profile import Profile
from ...resources.profile_costs import ProfileError
from ..measure.samples import Samples, SurfaceSeries
from .evidence import Evidence, Row, sample_rows
from .surface import kernels_of, starts_ns


@dataclass(frozen=True)
class Checked:
    """A kernel, or a group of them: what it is, its shape, and what it takes, measured and by the surface, in ns."""

    what: str
    shape: str
    measured_ns: float
    surface_ns: float

    @property
    def error(self) -> float:
        """By how much the surface is off, relative to what was measured."""
        return self.surface_ns / self.measured_ns - 1


def check_kernels(samples: Sequence[Samples], profile: Profile) -> list[Checked]:
    """Returns every kernel and group of the samples beside what a profile's surface says; ProfileError without one."""
    surface = profile.compute.surface
    if surface is None:
        raise ProfileError(f"profile {profile.name} has no surface: measure one (prestage calibrate measure --surface)")
    costs = {dispatch: SurfaceCosts(surface, dispatch) for dispatch in ("graph", "eager")}
    found = [one for file in samples if file.surface for one in _single(file.surface, costs["graph"])]
    evidence = Evidence(sample_rows(samples))
    for part in ("expert", "dense", "head"):
        rows = evidence.micro("kernel", part=part, where="queued", context=0)
        found += [_group(part, row, costs[row.key["dispatch"]]) for row in rows]
    return found


def _single(series: Iterable[SurfaceSeries], costs: SurfaceCosts) -> Iterator[Checked]:
    """Yields single kernels in graphs, with nothing beside them."""
    start_ns = starts_ns(list(series))["graph", "none"]
    for row in series:
        if (row.dispatch, row.beside) == ("graph", "none") and row.what not in ("negate", "multiply"):
            each_ns = (float(np.median(row.samples_ns)) - start_ns) / row.kernels
            shape = " x ".join(map(str, row.shape))
            what = f"{row.what}, {row.dtype}"
            if row.what == "attention":
                what += f", {row.shape[-1]:,} positions"
            yield Checked(what, shape, max(1.0, each_ns), _surface_ns(row, costs))


def _surface_ns(row: SurfaceSeries, costs: SurfaceCosts) -> float:
    if row.what == "product":
        rows, columns, tokens = row.shape
        return costs.product_ns(row.dtype, Product(rows, columns), tokens)
    if row.what == "attention":
        sequences, kv_heads, _, head_dim, positions = row.shape
        return costs.attention_ns(sequences, kv_heads, head_dim, positions)
    kv_heads, group, head_dim, tokens = row.shape
    return costs.prompt_ns(kv_heads * group, head_dim, tokens)


def _group(part: str, row: Row, costs: SurfaceCosts) -> Checked:
    key = row.key
    shape = f"{key['hidden']} x {key['size']}, {key['kernels']} kernels, {key['tokens']} tokens"
    what = f"{part}, {key['dtype']}, {key['dispatch']}"
    return Checked(what, shape, row.median_ns, costs.time(kernels_of(part, row), key["tokens"]).ns)


def summary(checked: Sequence[Checked]) -> list[dict[str, Any]]:
    """Returns for each kind of kernel, and for all, how far the surface is off: fractions."""
    kinds = list(dict.fromkeys(one.what for one in checked))
    groups = {what: [one for one in checked if one.what == what] for what in kinds} | {"all": list(checked)}
    return [{"what": what, **_sizes([one.error for one in ones])} for what, ones in groups.items()]


def _sizes(errors: Sequence[float]) -> dict[str, Any]:
    sizes = np.abs(errors)
    return {
        "n": len(errors), "bias": float(np.median(errors)), "median": float(np.median(sizes)),
        "p90": float(np.percentile(sizes, 90)), "worst": float(sizes.max()),
        "within_10": int((sizes <= 0.1).sum()), "within_25": int((sizes <= 0.25).sum()),
    }  # fmt: skip


def check_text(checked: Sequence[Checked], worst: int = 5) -> str:
    """Returns a table of the summary and the kernels that are furthest off, as Markdown."""
    lines = [
        "| kernels | n | median error | 90th percentile | worst | within 10 % | within 25 % |",
        "|---|" + "---|" * 6,
    ]
    for row in summary(checked):
        lines.append(
            f"| {row['what']} | {row['n']:,} | {row['median']:.1%} | {row['p90']:.1%} | {row['worst']:.1%} | "
            f"{row['within_10'] / row['n']:.0%} | {row['within_25'] / row['n']:.1%} |"
        )
    lines += ["", "| furthest off | shape | measured | by the surface | error |", "|---|---|---|---|---|"]
    for one in sorted(checked, key=lambda each: -abs(each.error))[:worst]:
        measured_us, surface_us = one.measured_ns / 1e3, one.surface_ns / 1e3
        lines.append(f"| {one.what} | {one.shape} | {measured_us:.1f} us | {surface_us:.1f} us | {one.error:+.1%} |")
    return "\n".join(lines)
