"""The surface of a GPU's kernels: what matrix products, attention and small kernels take over their shapes.

A profile that has one can price the kernels of any model as the sum of what they are made of, as AIConfigurator, Vidur
and APEX do with operators. Between measured shapes a cost runs straight in the logarithms of sizes and time. A product
whose rows are an exact size of the grid costs what was measured; one that takes far longer than both of its neighbors
is a library's choice for that very size, and says nothing of sizes between.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from math import log, prod
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from ..errors import InputError
from .facts import Cost, Dtype, Fact, Part

#: A size of rows that takes longer than both of its neighbors, and so much longer than between them, is peculiar.
PECULIAR = 0.2

Group = Literal["expert", "dense", "head"]
_Sizes = Annotated[tuple[Annotated[int, Field(ge=1, le=2**40)], ...], Field(min_length=1)]
_Numbers = npt.NDArray[np.float64]


def _must_fill(axes: Mapping[str, Sequence[int]], name: str, numbers: Sequence[int]) -> None:
    """Raises InputError if the sizes along an axis do not grow, or there is not one number for each shape."""
    for axis, sizes in axes.items():
        if any(after <= before for before, after in pairwise(sizes)):
            raise InputError(f"{axis}: sizes must grow")
    count = prod(map(len, axes.values()))
    if len(numbers) != count:
        raise InputError(f"{name}: {len(numbers)} numbers: {' x '.join(axes)} makes {count}")


class Line(NamedTuple):
    """Durations along one axis: the logarithms of its sizes and of the durations there.

    To these `beyond` is added; beyond the last size a duration grows with that `power` of the size.
    """

    steps: Sequence[float]
    logs: Sequence[float]
    beyond: float
    power: int

    def ns(self, size: float) -> float:
        """Returns the duration for a size, in ns; below the axis its smallest size counts."""
        steps, logs = self.steps, self.logs
        at = max(log(size), steps[0])
        if at >= steps[-1]:
            return float(np.exp(logs[-1] + (self.beyond + self.power * (at - steps[-1]))))
        after = bisect_right(steps, at)
        share = (at - steps[after - 1]) / (steps[after] - steps[after - 1])
        return float(np.exp(logs[after - 1] * (1 - share) + logs[after] * share + self.beyond))


class _Table(Part):
    """Durations in ns over a grid, the last axis fastest; 0 where nothing was measured."""

    ns: Annotated[tuple[Annotated[int, Field(ge=0, le=10**12)], ...], Field(min_length=1)]

    #: The fields that hold the sizes along each axis, and the power of the size that a cost grows with beyond its end.
    axes: ClassVar[tuple[tuple[str, int], ...]]

    @model_validator(mode="after")
    def _fills_its_grid(self) -> _Table:
        _must_fill({name: getattr(self, name) for name, _ in self.axes}, "ns", self.ns)
        if self.ns[0] == 0:
            raise InputError("ns: the smallest shape must have been measured")
        return self

    @cached_property
    def _log_sizes(self) -> list[_Numbers]:
        return [np.log(np.array(getattr(self, name), dtype=np.float64)) for name, _ in self.axes]

    @cached_property
    def _log_ns(self) -> _Numbers:
        """The logarithms of all durations; what was not measured grows from the last that was, along the last axis."""
        shape = tuple(len(sizes) for sizes in self._log_sizes)
        with np.errstate(divide="ignore"):
            logs = np.log(np.array(self.ns, dtype=np.float64).reshape(shape))
        for number in reversed(range(len(shape))):
            steps, power = self._log_sizes[number], self.axes[number][1]
            along = np.moveaxis(logs, number, -1)
            for place in range(1, len(steps)):
                grown = along[..., place - 1] + power * (steps[place] - steps[place - 1])
                along[..., place] = np.where(np.isneginf(along[..., place]), grown, along[..., place])
        return logs

    @cached_property
    def _lines(self) -> dict[tuple[float, ...], Line]:
        """What `_along` has found, by all sizes but the last."""
        return {}

    def _along(self, values: _Numbers, *sizes: float) -> Line:
        """Returns the durations along the last axis, for a size along each other; below an axis the smallest counts.

        `values` are logarithms as of `_log_ns`, always the same for the same sizes.
        """
        line = self._lines.get(sizes)
        if line is not None:
            return line
        beyond = 0.0
        for size, steps, (_, power) in zip(sizes, self._log_sizes, self.axes, strict=False):
            at = max(log(size), float(steps[0]))
            if at >= steps[-1]:
                beyond += power * (at - float(steps[-1]))
                values = values[-1]
                continue
            after = int(np.searchsorted(steps, at, side="right"))
            share = (at - steps[after - 1]) / (steps[after] - steps[after - 1])
            values = values[after - 1] * (1 - share) + values[after] * share
        line = self._lines[sizes] = Line(self._log_sizes[-1].tolist(), values.tolist(), beyond, self.axes[-1][1])
        return line


class ProductTable(_Table):
    """Products of (tokens, columns) and (columns, rows) whose weights are cold, inside CUDA graphs."""

    dtype: Dtype
    rows: _Sizes
    columns: _Sizes
    tokens: _Sizes

    axes = (("rows", 1), ("columns", 1), ("tokens", 1))

    @cached_property
    def _smooth(self) -> _Numbers:
        """`_log_ns` without peculiar sizes of rows."""
        logs, steps = self._log_ns, self._log_sizes[0]
        smooth = logs.copy()
        for place in range(1, len(steps) - 1):
            share = (steps[place] - steps[place - 1]) / (steps[place + 1] - steps[place - 1])
            before, here, after = logs[place - 1], logs[place], logs[place + 1]
            between = before * (1 - share) + after * share
            peak = (here > np.maximum(before, after)) & (here - between > log(1 + PECULIAR))
            smooth[place] = np.where(peak, between, here)
        return smooth

    @cached_property
    def most_flops_per_ns(self) -> float:
        """The most operations a ns of any measured product; 0 if none was."""
        rows, columns, tokens = (np.array(getattr(self, name), dtype=np.float64) for name, _ in self.axes)
        flops = (2 * rows[:, None, None] * columns[:, None] * tokens).ravel()
        ns = np.array(self.ns, dtype=np.float64)
        return float(np.divide(flops, ns, out=np.zeros_like(ns), where=ns > 0).max())

    def over_tokens(self, rows: float, columns: float) -> Line:
        """Returns what one product takes behind another, by its tokens."""
        return self._along(self._log_ns if rows in self.rows else self._smooth, rows, columns)

    def product_ns(self, rows: float, columns: float, tokens: float) -> float:
        """Returns what one product takes behind another, in ns."""
        return self.over_tokens(rows, columns).ns(tokens)


class SmallTable(_Table):
    """Small kernels over the elements of a tensor: one that reads it (negate), or it and another (multiply)."""

    what: Literal["negate", "multiply"]
    dtype: Dtype
    elements: _Sizes

    axes = (("elements", 1),)

    @cached_property
    def over_elements(self) -> Line:
        """What one small kernel takes behind another, by its elements."""
        return self._along(self._log_ns)


class AttentionTable(_Table):
    """Attention of one new token of each sequence: over KV heads of all sequences, their width, cached positions.

    A library shares the positions of a stream out over several blocks while there are few streams. Where it has been
    seen to stop, more streams than `split_up_to` are told from the next two sizes, not from one on either side.
    """

    dtype: Dtype
    streams: _Sizes
    head_dims: _Sizes
    positions: _Sizes
    split_up_to: int | None = Field(default=None, ge=1)

    axes = (("streams", 1), ("head_dims", 1), ("positions", 1))

    @model_validator(mode="after")
    def _goes_on_behind(self) -> AttentionTable:
        if self.split_up_to is not None and self.split_up_to not in self.streams[:-2]:
            raise InputError(f"split_up_to = {self.split_up_to}: must be one of streams, and two more behind it")
        return self

    def attention_ns(self, streams: float, head_dim: float, positions: float) -> float:
        """Returns what the attention of one layer takes, in ns; `streams` is sequences times KV heads."""
        if self.split_up_to is not None and streams > self.split_up_to:
            first, second = self.streams[self.streams.index(self.split_up_to) + 1 :][:2]
            if streams < first:
                nearest, further = (self._of(each, head_dim, positions) for each in (first, second))
                power = max(0.0, min(1.0, log(further / nearest) / log(second / first)))
                return nearest * float((streams / first) ** power)
        return self._of(streams, head_dim, positions)

    def _of(self, streams: float, head_dim: float, positions: float) -> float:
        return self._along(self._log_ns, streams, head_dim).ns(positions)


class PromptTable(_Table):
    """Causal attention of a whole prompt: over query heads, their width, and tokens, with whose square it grows."""

    dtype: Dtype
    heads: _Sizes
    head_dims: _Sizes
    tokens: _Sizes

    axes = (("heads", 1), ("head_dims", 1), ("tokens", 2))

    def prompt_ns(self, heads: float, head_dim: float, tokens: float) -> float:
        """Returns what the attention of one layer over a prompt takes, in ns."""
        return self._along(self._log_ns, heads, head_dim).ns(tokens)


class LaunchTable(Part):
    """How many kernels one call of a product launches, over a grid as of `ProductTable`; 0 where none was counted.

    A library splits a product of few tokens and many columns over several blocks, and adds up their parts in a second
    kernel.
    """

    dtype: Dtype
    rows: _Sizes
    columns: _Sizes
    tokens: _Sizes
    kernels: Annotated[tuple[Annotated[int, Field(ge=0, le=1000)], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _fills_its_grid(self) -> LaunchTable:
        _must_fill({"rows": self.rows, "columns": self.columns, "tokens": self.tokens}, "kernels", self.kernels)
        return self

    def launched(self, rows: int, columns: int, tokens: int) -> int:
        """Returns the kernels of the nearest shape; if it was not counted, of the next with fewer columns; else 1."""
        row, column, token = (
            min(range(len(sizes)), key=lambda place: abs(log(size / sizes[place])))
            for size, sizes in ((rows, self.rows), (columns, self.columns), (tokens, self.tokens))
        )
        for place in range(column, -1, -1):
            count = self.kernels[(row * len(self.columns) + place) * len(self.tokens) + token]
            if count:
                return count
        return 1


class GroupCosts(Cost):
    """What a group of kernels takes beside the kernels themselves, in one way of dispatch.

    `start_ns` once, and `kernel_ns` for each kernel more than in a graph; both also beside a copy. The kernels' own sum
    is taken `factor` times. `launch_latency_ns` is as of a measured point.
    """

    start_ns: int = Field(ge=0)
    start_beside_copy_ns: int = Field(ge=0)
    kernel_ns: int = Field(default=0, ge=0)
    kernel_beside_copy_ns: int = Field(default=0, ge=0)
    launch_latency_ns: int = 0
    factor: float = Field(default=1.0, ge=0.1, le=20)


class GroupsByDispatch(Part):
    """The costs of a part's groups, launched kernel by kernel or as graphs."""

    eager: GroupCosts
    graph: GroupCosts


class Surface(Fact):
    """All that is known of single kernels on a GPU, whatever the model.

    Beside a copy to the GPU, products take `beside_copy_ns_per_mib` longer for each MiB of weights that they read.
    `launches` count what the host's calls of products launch; without, each launches one kernel.
    """

    products: Annotated[tuple[ProductTable, ...], Field(min_length=1)]
    small: tuple[SmallTable, ...] = ()
    attention: tuple[AttentionTable, ...] = ()
    prompts: tuple[PromptTable, ...] = ()
    groups: dict[Group, GroupsByDispatch]
    beside_copy_ns_per_mib: float = Field(default=0.0, ge=0, le=1e6)
    launches: tuple[LaunchTable, ...] = ()

    @model_validator(mode="after")
    def _has_every_group(self) -> Surface:
        missing = [name for name in ("expert", "dense", "head") if name not in self.groups]
        if missing:
            raise InputError(f"groups: {', '.join(missing)}: missing")
        return self
