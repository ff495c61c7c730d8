"""Attention between the sizes of a surface's grid: how samples of such sizes refine it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product

import pytest
from test_surface import made_samples, made_series

from prestage.calibration.fit.attention import Measured, attention_table
from prestage.calibration.fit.surface import surface_of
from prestage.calibration.measure.samples import SurfaceSeries
from prestage.resources.surface import AttentionTable


def attention_samples(ns_of: Callable[[int, int, int], float], more: Iterable[tuple[int, int, int]] = ()) -> Measured:
    """What attention takes over a grid, and more shapes, in ns."""
    grid = product((1, 4, 16, 64), (64, 128), (128, 512, 2048, 8192))
    return {shape: ns_of(*shape) for shape in (*grid, *more)}


def test_sizes_between_those_of_a_grid_are_kept_and_tell_of_the_positions_that_they_lack() -> None:
    def seen(streams: int, width: int, positions: int) -> float:
        odd = (1.1 if streams == 8 else 1.0) * (1.2 if width == 96 else 1.0)
        return odd * streams * width * positions

    more = [(8, 64, 512), (8, 96, 512), (4, 96, 512)]
    table = AttentionTable.model_validate(attention_table("bfloat16", attention_samples(seen, more)))
    assert (table.streams, table.head_dims, table.split_up_to) == ((1, 4, 8, 16, 64), (64, 96, 128), None)
    # What was measured, the same at other positions, of the grid's other width, and of other streams in between.
    between = ((8, 64, 512), (8, 96, 512), (8, 64, 8192), (8, 128, 2048), (8, 96, 128), (1, 96, 2048), (64, 96, 512))
    for shape in between:
        assert table.attention_ns(*shape) == pytest.approx(seen(*shape), rel=1e-3), shape
    assert table.attention_ns(16, 64, 512) == pytest.approx(seen(16, 64, 512)), "the grid itself stays"


def test_behind_the_most_streams_that_are_split_attention_is_told_from_what_lies_behind() -> None:
    def seen(streams: int, width: int, positions: int) -> float:
        # From 33 streams on each has a block of its own, and 64 or 128 of them take as long.
        return (streams if streams <= 32 else 100 * (streams / 64) ** 0.5) * width * positions

    more = [(streams, width, at) for streams in (32, 128) for width in (64, 128) for at in (128, 512, 2048, 8192)]
    data = attention_table("bfloat16", attention_samples(seen, more))
    table = AttentionTable.model_validate(data)
    assert table.split_up_to == 32
    for streams in (20, 32, 33, 40, 64, 100):
        assert table.attention_ns(streams, 64, 2048) == pytest.approx(seen(streams, 64, 2048), rel=1e-3)
    with pytest.raises(ValueError, match="split_up_to = 64: must be one of streams, and two more behind it"):
        AttentionTable.model_validate({**data, "split_up_to": 64})


def test_attention_of_a_second_file_joins_the_surface() -> None:
    main = made_samples(made_series())
    shapes = [(1, 1, 1, 64, at) for at in (128, 512)]
    rows = [SurfaceSeries("attention", "bfloat16", "graph", "none", shape, 2, (2000,)) for shape in shapes]
    first = main.model_copy(update={"surface": (*main.surface, rows[0])})
    second = main.model_copy(update={"surface": (rows[0]._replace(samples_ns=(9,)), rows[1])})
    joined = surface_of([first, second])
    assert joined is not None
    assert [row for row in joined.surface if row.what == "attention"] == rows, "a shape of both is the first's"
