"""The forms of a figure's data: bars, heat maps, memory over time, curves, rows, timelines, falls between two runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.measure.comparison import Step
from ..errors import InputError
from ..resources.timeline import Timeline
from .pictures import few_digits, step_ends_ns

Array = npt.NDArray[Any]


class FigureError(InputError):
    """A figure that cannot be drawn; the message says which, and what would be right."""


@dataclass(frozen=True)
class Part:
    """One color of a stacked bar chart: a value for each row (rows,)."""

    label: str
    color: str
    values: Array
    alpha: float = 1.0


@dataclass(frozen=True)
class Bars:
    """Stacked bars: a few rows that lie (`across`), or a column for each of many. All values are in `unit`."""

    rows: Sequence[str]
    parts: Sequence[Part]
    axis: str
    unit: str
    across: bool = True


@dataclass(frozen=True)
class Grid:
    """A heat map of shares from 0 to 1 (rows, columns), with the `counts` behind them; a share may be NaN."""

    rows: Sequence[str]
    columns: Sequence[str]
    shares: Array
    counts: Array
    across: str
    axis: str

    @property
    def shades(self) -> Array:
        """How strongly each cell is colored (rows, columns), from 0 to 1: each row on a scale up to its most."""
        most = np.array([np.nanmax(row, initial=0.0) for row in self.shares])
        return self.shares / np.where(most > 0, most, 1.0)[:, None]

    @property
    def scales(self) -> list[str]:
        """The rows' names, each with the share that is colored most strongly."""
        most = [np.nanmax(row, initial=0.0) for row in self.shares]
        return [f"{name}, up to {share:.0%}" for name, share in zip(self.rows, most, strict=True)]


@dataclass(frozen=True)
class Memory:
    """Bytes over time on each GPU, and their limit: (time_ns, assigned_bytes, budget_bytes) by its name."""

    gpus: dict[str, tuple[Array, Array, Array]]


@dataclass(frozen=True)
class Curve:
    """One line: x and y, both (points,)."""

    label: str
    color: str
    x: Array
    y: Array


@dataclass(frozen=True)
class Curves:
    """Steps whose y is a share from 0 to 1, which holds until the next x; `marks` are named values of x."""

    curves: Sequence[Curve]
    x_axis: str
    y_axis: str
    unit: str
    marks: dict[str, float]

    @property
    def x_words(self) -> str:
        """What the x axis is, with its marks in a second line: beside the lines themselves, curves would cross them."""
        marks = ", ".join(f"{name} {few_digits(at)}" for name, at in self.marks.items())
        return f"{self.x_axis}\n{marks}" if marks else self.x_axis


@dataclass(frozen=True)
class RowBars:
    """One color of bars that lie: the row of each, and from when to when in ms, all (bars,)."""

    label: str
    color: str
    row: Array
    from_ms: Array
    to_ms: Array


@dataclass(frozen=True)
class Rows:
    """Bars over time on rows, the first on top."""

    names: Sequence[str]
    parts: Sequence[RowBars]


@dataclass(frozen=True)
class Spans:
    """A timeline, and the part of it to look at first."""

    timeline: Timeline
    layers: int
    experts_per_layer: int
    start_ns: int
    end_ns: int

    @property
    def step_ends_ns(self) -> Array:
        """Where steps end (steps,)."""
        return step_ends_ns(self.timeline)


@dataclass(frozen=True)
class Fall:
    """The bars that lead from one run's makespan to another's."""

    first: str
    second: str
    steps: Sequence[Step]

    @property
    def lowest_ms(self) -> float:
        """Where to begin the axis: where the runs are close, bars from 0 would hide what is between them."""
        ends_ms = [step.end_ns / 1e6 for step in self.steps]
        spread_ms = max(ends_ms) - min(ends_ms) or max(ends_ms)
        return max(0.0, min(ends_ms) - 1.5 * spread_ms)


#: What whoever draws has to know.
Data = Bars | Grid | Memory | Curves | Rows | Spans | Fall
