"""Fitting the surface: tables of single kernels from their samples, and what groups of them take besides.

A row of kernels takes its start and so many times what one takes. The start is known from rows of one, two and sixteen
small kernels. What a group of different kernels takes besides their sum is then seen inside schedules, or else where
whole groups were measured: a start, in eager dispatch something for each kernel, and a factor for all kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...dtypes import bits_of
from ...engine.costs.surface_costs import Kernels, SurfaceCosts, dense_kernels, expert_kernels, head_kernels
from ...resources.profile_costs import ProfileError
from ...resources.surface import Surface
from ..measure.samples import Samples, SurfaceSeries
from .attention import attention_table
from .evidence import MICRO, SCHEDULE, Evidence, Row

#: Fewer samples than these inside schedules say little of a group.
_LEAST_SAMPLES = 5
#: Groups of more tokens than these say more of their products than of what they take besides.
_MOST_TOKENS = 64
_MIB = 2**20
#: Fewer shapes than these give no start by themselves; and what a sum of kernels may be off by as a whole.
_LEAST_SHAPES, _LEAST_FACTOR, _MOST_FACTOR = 3, 0.9, 1.1
#: Matrices of an expert as it is measured.
_MATRICES = 3
#: Small kernels in the rows that tell what one more takes.
_FEW, _MANY = 2, 16
_PARTS = ("expert", "dense", "head")
_DISPATCHES = ("graph", "eager")

_Key = tuple[str, str, str, str]
_Points = Mapping[str, Sequence[dict[str, Any]]]


def surface_of(files: Sequence[Samples]) -> Samples | None:
    """Returns the first samples of a surface, or None; with dtypes and attention only others have, and all launches.

    Raises ProfileError if one is of another GPU than the first file, or launches were counted without a surface.
    """
    for file in files:
        if file.surface and file.device != files[0].device:
            raise ProfileError(f"the surface is of an {file.device}, and the samples of an {files[0].device}")
    launches = [row for file in files for row in file.surface if row.what == "launch"]
    measured = [file for file in files if any(row.what != "launch" for row in file.surface)]
    if not measured:
        if launches:
            raise ProfileError("samples: launches were counted without a surface: give its samples, too (--surface)")
        return None
    first, *others = measured
    series = [row for row in first.surface if row.what != "launch"]
    for other in others:
        series += _only_in(other.surface, series)
    return first.model_copy(update={"surface": (*series, *launches)})


def _only_in(other: Sequence[SurfaceSeries], series: Sequence[SurfaceSeries]) -> list[SurfaceSeries]:
    """Returns products of dtypes, and attention of shapes, that only the other series have."""
    dtypes, shapes = {row.dtype for row in series}, {row.shape for row in series if row.what == "attention"}
    return [
        row
        for row in other
        if (row.what == "product" and row.dtype not in dtypes) or (row.what == "attention" and row.shape not in shapes)
    ]


def fit_surface(samples: Samples, evidence: Evidence, points: _Points) -> dict[str, Any]:
    """Returns the surface as plain data of a profile.

    `evidence` is where groups were seen; `points` are those of the profile by part, with the latencies of their
    launches. Raises ProfileError if the samples lack rows of small kernels or products.
    """
    rows = _Rows(samples.surface)
    base = {
        "source": "measured",
        "note": f"single kernels over their shapes, weights cold, on an {samples.device} (driver {samples.driver}, "
        f"{samples.date}); what groups take besides, inside schedules where they were seen",
        "products": list(rows.products()), "small": list(rows.small()),
        "attention": list(rows.attention()), "prompts": list(rows.prompts()),
        "beside_copy_ns_per_mib": round(rows.longer_beside_copy(), 3),
    }  # fmt: skip
    plain = {"start_ns": 0, "start_beside_copy_ns": 0, "source": "assumed"}
    nothing = {part: dict.fromkeys(_DISPATCHES, plain) for part in _PARTS}
    alone = Surface.model_validate({**base, "groups": nothing})
    groups = _Groups(alone, rows, evidence, points)
    return {**base, "groups": {part: {way: groups.fit(part, way) for way in _DISPATCHES} for part in _PARTS}}


def starts_ns(series: Sequence[SurfaceSeries]) -> dict[tuple[str, str], float]:
    """Returns what a row of kernels takes besides them, in ns, by (dispatch, beside); ProfileError if none says it."""
    return _Rows(series).start_ns


class _Rows:
    """The samples of rows of kernels, each in one number, and what one kernel of each shape takes."""

    def __init__(self, series: Sequence[SurfaceSeries]) -> None:
        self._seen: dict[_Key, dict[tuple[tuple[int, ...], int], float]] = {}
        for row in series:
            key = (row.what, row.dtype, row.dispatch, row.beside)
            self._seen.setdefault(key, {})[row.shape, row.kernels] = float(np.median(row.samples_ns))
        self.start_ns = {
            (dispatch, beside): self._start_ns(dispatch, beside)
            for dispatch in _DISPATCHES
            for beside in ("none", "h2d")
        }

    def _start_ns(self, dispatch: str, beside: str) -> float:
        """Returns what a row takes besides its kernels: the median over small ones."""
        starts = []
        for (what, _, *way), seen in self._seen.items():
            if what in ("negate", "multiply") and way == [dispatch, beside]:
                for (shape, count), ns in seen.items():
                    if count == _FEW and (shape, _MANY) in seen:
                        each = (seen[shape, _MANY] - ns) / (_MANY - _FEW)
                        starts.append(ns - _FEW * each)
        if not starts:
            raise ProfileError(f"surface: no rows of small kernels, {dispatch}, beside {beside}: measure it again")
        return max(0.0, float(np.median(starts)))

    def _each(
        self, what: str, dtype: str, dispatch: str = "graph", beside: str = "none"
    ) -> dict[tuple[int, ...], float]:
        """Returns what one kernel of each shape takes, in ns."""
        seen, start_ns = self._seen.get((what, dtype, dispatch, beside), {}), self.start_ns[dispatch, beside]
        if what in ("negate", "multiply"):
            return {
                shape: max(1.0, (ns - seen[shape, _FEW]) / (_MANY - _FEW))
                for (shape, count), ns in seen.items()
                if count == _MANY and (shape, _FEW) in seen
            }
        return {shape: max(1.0, (ns - start_ns) / count) for (shape, count), ns in seen.items()}

    def _dtypes(self, what: str) -> list[str]:
        return list(
            dict.fromkeys(dtype for kind, dtype, *way in self._seen if kind == what and way == ["graph", "none"])
        )

    def products(self) -> Iterable[dict[str, Any]]:
        """Yields a table for each dtype; 16-bit ones are alike, and the first of them has them all."""
        dtypes = self._dtypes("product")
        if not dtypes:
            raise ProfileError("surface: no rows of products: measure it again")
        for dtype in dtypes:
            if dtype != "float16" or "bfloat16" not in dtypes:
                yield {"dtype": dtype, **_table(self._each("product", dtype), ("rows", "columns", "tokens"))}

    def small(self) -> Iterable[dict[str, Any]]:
        """Yields a table for each small kernel and dtype."""
        for what in ("negate", "multiply"):
            for dtype in self._dtypes(what):
                yield {"what": what, "dtype": dtype, **_table(self._each(what, dtype), ("elements",))}

    def attention(self) -> Iterable[dict[str, Any]]:
        """Yields a table for each dtype: KV heads of all sequences count, query heads that share one do not."""
        for dtype in self._dtypes("attention"):
            alike: dict[tuple[int, int, int], list[float]] = {}
            for (batch, kv_heads, _, head_dim, positions), ns in self._each("attention", dtype).items():
                alike.setdefault((batch * kv_heads, head_dim, positions), []).append(ns)
            yield attention_table(dtype, {shape: float(np.median(seen)) for shape, seen in alike.items()})

    def prompts(self) -> Iterable[dict[str, Any]]:
        """Yields a table for each dtype: query heads count, how many share a KV head does not."""
        for dtype in self._dtypes("prompt"):
            alike: dict[tuple[int, ...], list[float]] = {}
            for (kv_heads, group, head_dim, tokens), ns in self._each("prompt", dtype).items():
                alike.setdefault((kv_heads * group, head_dim, tokens), []).append(ns)
            medians = {shape: float(np.median(seen)) for shape, seen in alike.items()}
            yield {"dtype": dtype, **_table(medians, ("heads", "head_dims", "tokens"))}

    def longer_beside_copy(self) -> float:
        """Returns how many ns longer products take for each MiB of weights beside a copy: those bound by memory."""
        longer = []
        for dtype, size in (("bfloat16", 2), ("float32", 4)):
            quiet, beside = self._each("product", dtype), self._each("product", dtype, beside="h2d")
            for (rows, columns, tokens), ns in beside.items():
                if tokens <= 16 and rows * columns * size >= 8 * _MIB and (rows, columns, tokens) in quiet:
                    longer.append((ns - quiet[rows, columns, tokens]) / (rows * columns * size / _MIB))
        return max(0.0, float(np.median(longer))) if longer else 0.0


def _table(each: dict[tuple[int, ...], float], names: Sequence[str]) -> dict[str, Any]:
    """Returns shapes and what each takes as axes and numbers over their grid; 0 where there is none."""
    named = axes_of(each, names)
    axes = list(named.values())
    grid = np.zeros([len(axis) for axis in axes], dtype=np.int64)
    places = [{size: place for place, size in enumerate(axis)} for axis in axes]
    for shape, ns in each.items():
        grid[tuple(place[size] for place, size in zip(places, shape, strict=True))] = max(1, round(ns))
    return {**named, "ns": grid.ravel().tolist()}


def axes_of(shapes: Iterable[tuple[int, ...]], names: Sequence[str]) -> dict[str, list[int]]:
    """Returns the sizes of shapes along each axis, by its name."""
    return {name: sorted({shape[number] for shape in shapes}) for number, name in enumerate(names)}


@dataclass(frozen=True)
class _Group:
    """A group that was seen: its kernels, their sum by the surface, and what it took, in ns."""

    kernels: Kernels
    sum_ns: float
    whole_ns: float


@dataclass(frozen=True)
class _Besides:
    """What groups take: a start, so much for each kernel more than in a graph, and so many times their kernels' sum."""

    start_ns: float
    kernel_ns: float
    factor: float

    def ns(self, group: _Group) -> float:
        """Returns what a group takes by these."""
        return self.start_ns + group.kernels.launches * self.kernel_ns + self.factor * group.sum_ns


class _Groups:
    """What groups take besides the sum of their kernels."""

    def __init__(self, surface: Surface, rows: _Rows, evidence: Evidence, points: _Points) -> None:
        self._rows, self._evidence, self._points = rows, evidence, points
        self._longer_ns_per_mib = surface.beside_copy_ns_per_mib
        self._costs = SurfaceCosts(surface, "graph")
        self._quiet = {dispatch: self._besides(dispatch, beside_copy=False) for dispatch in _DISPATCHES}
        self._beside = {
            dispatch: self._besides(dispatch, beside_copy=True, factor=self._quiet[dispatch].factor)
            for dispatch in _DISPATCHES
        }

    def fit(self, part: str, dispatch: str) -> dict[str, Any]:
        """Returns the costs of a part's groups in one way of dispatch."""
        quiet, beside = self._quiet[dispatch], self._beside[dispatch]
        seen, where = self._seen(part, dispatch, beside_copy=False)
        latencies = [
            point["launch_latency_ns"]
            for point in self._points.get(part, ())
            if point["dispatch"] == dispatch and point.get("launch_latency_ns") is not None
        ]
        errors = [quiet.ns(one) / one.whole_ns - 1 for one in seen]
        error = float(np.sqrt(np.mean(np.square(errors)))) if errors else 0.0
        unsure = {"run_spread": 0.0, "scatter": 0.0, "held_back_error": round(error, 5)}
        return {
            "start_ns": round(quiet.start_ns), "start_beside_copy_ns": round(max(quiet.start_ns, beside.start_ns)),
            "kernel_ns": round(quiet.kernel_ns), "kernel_beside_copy_ns": round(max(quiet.kernel_ns, beside.kernel_ns)),
            "factor": round(quiet.factor, 4),
            "launch_latency_ns": round(float(np.median(latencies))) if latencies else 0,
            "source": "measured", "note": f"{len(seen)} groups {where}" if seen else "as of rows of small kernels",
            **({"uncertainty": unsure} if len(seen) > 1 else {}),
        }  # fmt: skip

    def _besides(self, dispatch: str, *, beside_copy: bool, factor: float | None = None) -> _Besides:
        """Returns what groups of one way of dispatch take, whichever part they are of: least squares, relative errors.

        A shape that was seen over many tokens counts once. A `factor` that is given stays.
        """
        by_shape: dict[tuple[Any, ...], list[_Group]] = {}
        for part in _PARTS:
            for one in self._seen(part, dispatch, beside_copy=beside_copy)[0]:
                by_shape.setdefault((one.kernels.dtype, one.kernels.products[0], one.kernels.launches), []).append(one)
        if len(by_shape) < _LEAST_SHAPES:
            return _Besides(self._rows.start_ns[dispatch, "h2d" if beside_copy else "none"], 0.0, factor or 1.0)
        left, right = [], []
        for (*_, launches), groups in by_shape.items():
            whole_ns = float(np.median([one.whole_ns for one in groups]))
            sum_ns = float(np.median([one.sum_ns for one in groups]))
            known_ns = sum_ns * (1.0 if factor is None else factor)
            unknown = [1.0, launches if dispatch == "eager" else 0.0, sum_ns if factor is None else 0.0]
            left.append(np.array(unknown) / whole_ns)
            right.append((whole_ns - known_ns) / whole_ns)
        start_ns, kernel_ns, more = np.linalg.lstsq(np.array(left), np.array(right), rcond=None)[0].tolist()
        fitted = max(_LEAST_FACTOR, min(_MOST_FACTOR, 1.0 + more)) if factor is None else factor
        return _Besides(max(0.0, start_ns), max(0.0, kernel_ns), fitted)

    def _seen(self, part: str, dispatch: str, *, beside_copy: bool) -> tuple[list[_Group], str]:
        """Returns the groups that were seen, and where."""
        inside = [
            row
            for row in self._evidence.schedule(part, dispatch=dispatch, beside_copy=beside_copy)
            if row.n >= _LEAST_SAMPLES
        ]
        where = "beside_copy" if beside_copy else "queued"
        rows = inside or self._evidence.micro("kernel", part=part, dispatch=dispatch, where=where, context=0)
        found = [self._group(part, row, beside_copy) for row in rows if row.key["tokens"] <= _MOST_TOKENS]
        return found, SCHEDULE if inside else MICRO

    def _group(self, part: str, row: Row, beside_copy: bool) -> _Group:
        kernels = kernels_of(part, row)
        sum_ns = self._costs.time(kernels, row.key["tokens"]).ns
        longer_ns = self._longer_ns_per_mib * kernels.weight_bytes / _MIB if beside_copy else 0.0
        return _Group(kernels, sum_ns + longer_ns, row.median_ns)


def kernels_of(part: str, row: Row) -> Kernels:
    """Returns the kernels of a group that was seen, from the key of its row."""
    key = row.key
    hidden, dtype, size = key["hidden"], key["dtype"], key.get("size", key.get("weight_bytes", key.get("expert_ff")))
    if part == "expert":
        size_bytes = round(_MATRICES * hidden * size * float(bits_of(dtype)) / 8)
        return expert_kernels(hidden, size, dtype, _MATRICES, key["kernels"], size_bytes)
    if part == "head":
        return head_kernels(hidden, dtype, size)
    return dense_kernels(hidden, dtype, key["kernels"], size)
