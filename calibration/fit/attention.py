"""Fitting attention of decoding: one table of a whole grid, refined by samples of streams and widths between its sizes.

A stream is a KV head of one sequence. Its time is no smooth function of either size: a library has kernels for some
widths only, and shares a stream's positions out over as many blocks as the GPU has left for it, which leaves some
empty, and beyond some number of streams gives each a block of its own. What lies between the sizes of a grid is hence
measured, too, at a few positions. At the others, and with the other size's values, it is as many times what the grid
says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import exp, log
from typing import Any

import numpy as np

from ...resources.surface import AttentionTable

#: Attention that grows by such a power of the streams, between two numbers of them, has another kernel behind.
_ANOTHER_KERNEL = 1.2

#: What each (streams, width, positions) takes, in ns.
Measured = Mapping[tuple[int, int, int], float]
#: Ratios over positions, in logarithms, of a pair of streams and width.
_Ratios = dict[int, float]


def attention_table(dtype: str, seen: Measured) -> dict[str, Any]:
    """Returns a table of attention as plain data of a profile."""
    return _Refined(dtype, seen).table()


class _Refined:
    """A grid of attention, and what pairs of streams and widths take that lie between its sizes.

    Pairs that were seen at half of all positions or more make the grid.
    """

    def __init__(self, dtype: str, seen: Measured) -> None:
        self._dtype, self._seen = dtype, seen
        self._positions = sorted({positions for _, _, positions in seen})
        pairs: dict[tuple[int, int], list[int]] = {}
        for streams, width, positions in seen:
            pairs.setdefault((streams, width), []).append(positions)
        gridded = {pair for pair, at in pairs.items() if 2 * len(at) >= len(self._positions)}
        grid = {shape: ns for shape, ns in seen.items() if shape[:2] in gridded}
        self._grid = AttentionTable.model_validate(self._data(grid, grid.get))
        self._between = {pair: sorted(at) for pair, at in pairs.items() if pair not in gridded}

    def table(self) -> dict[str, Any]:
        """Returns the whole table; what the grid itself has not is left out, too."""
        if not self._between:
            return self._data(self._seen, self._seen.get)
        holes = {
            (streams, width, positions)
            for streams in self._grid.streams
            for width in self._grid.head_dims
            for positions in self._positions
            if (streams, width, positions) not in self._seen
        }
        return self._data(self._seen, lambda shape: None if shape in holes else self._ns(*shape))

    def _data(self, shapes: Measured, ns_of: Any) -> dict[str, Any]:
        streams, widths = ([*sorted({shape[number] for shape in shapes})] for number in (0, 1))
        axes = {"streams": streams, "head_dims": widths, "positions": self._positions}
        made = [ns_of((one, width, at)) for one in streams for width in widths for at in self._positions]
        data = {"dtype": self._dtype, **axes, "ns": [0 if ns is None else max(1, round(ns)) for ns in made]}
        split = _split_up_to(shapes, streams)
        return data if split is None else {**data, "split_up_to": split}

    def _ns(self, streams: int, width: int, positions: int) -> float:
        """Returns what was measured, or else what the grid says, times what was seen nearby."""
        seen = self._seen.get((streams, width, positions))
        if seen is not None:
            return seen
        if width in self._grid.head_dims:
            return self._of_grid(streams, width, positions)
        ratios = {one: self._over_widths(one, width) for one, other in sorted(self._between) if other == width}
        known = [log(one) for one in ratios]
        ratio = np.interp(log(streams), known, [_at(positions, each) for each in ratios.values()])
        return self._across(streams, width, positions) * exp(float(ratio))

    def _of_grid(self, streams: int, width: int, positions: int) -> float:
        """Returns what one of the grid's widths takes: of other streams, by the ratio of the nearest width."""
        ns = self._grid.attention_ns(streams, width, positions)
        near = [other for one, other in self._between if one == streams and other in self._grid.head_dims]
        if streams in self._grid.streams or not near:
            return ns
        other = min(near, key=lambda each: abs(log(each / width)))
        ratios = {
            at: log(self._seen[streams, other, at] / self._grid.attention_ns(streams, other, at))
            for at in self._between[streams, other]
        }
        return ns * exp(_at(positions, ratios))

    def _over_widths(self, streams: int, width: int) -> _Ratios:
        """Returns how many times what lies between the grid's widths some streams of another width took."""
        return {
            at: log(self._seen[streams, width, at] / self._across(streams, width, at))
            for at in self._between[streams, width]
        }

    def _across(self, streams: int, width: int, positions: int) -> float:
        """Returns what lies between two widths of the grid."""
        widths = self._grid.head_dims
        logs = [log(self._seen.get((streams, each, positions)) or self._of_grid(streams, each, positions))
                for each in widths]  # fmt: skip
        return exp(float(np.interp(log(width), np.log(widths), logs)))


def _at(positions: int, ratios: _Ratios) -> float:
    return float(np.interp(log(positions), np.log(list(ratios)), list(ratios.values())))


def _split_up_to(seen: Measured, streams: Sequence[int]) -> int | None:
    """Returns behind how many streams attention grows by far more than in proportion, if anywhere."""
    powers = {
        fewer: max(
            (
                log(seen[more, width, at] / ns) / log(more / fewer)
                for (one, width, at), ns in seen.items()
                if one == fewer and (more, width, at) in seen
            ),
            default=0.0,
        )
        for fewer, more in list(pairwise(streams))[:-1]
    }
    most = max(powers, key=lambda fewer: powers[fewer], default=None)
    return most if most is not None and powers[most] > _ANOTHER_KERNEL else None
