"""Columns that grow in memory or in files hold the same records, and files take them out of memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import books, tiny_inputs, tiny_model, tiny_profile, tiny_scenario, tiny_trace

from prestage.engine.costs.costs import part_costs
from prestage.engine.run import ENGINES, prepared, run_all
from prestage.resources.spool import HELD_BACK_BYTES, Column, Spool
from prestage.resources.timeline import EXPERT, SPAN, Timeline

PAIR = np.dtype([("a", "<i4"), ("b", "<i8")])


@pytest.mark.parametrize("in_file", [False, True])
def test_a_column_is_what_was_appended_in_order(tmp_path: Path, in_file: bool) -> None:
    column = Column(PAIR, tmp_path / "pairs.npy" if in_file else None)
    assert column.array().tolist() == []
    for a in range(5):
        column.buffer.extend(np.array((a, a * a), dtype=PAIR).tobytes())
        if a % 2:
            column.flush()
    assert len(column) == 5
    assert column.array().tolist() == [(a, a * a) for a in range(5)]


def test_whole_numbers_are_appended_one_by_one(tmp_path: Path) -> None:
    column = Column(np.int32, tmp_path / "numbers.npy")
    append = column.buffer.append  # as hot loops do: the buffer is always the same object
    for number in (7, -1, 2**31 - 1):
        append(number)
        column.flush()
    assert column.array().tolist() == [7, -1, 2**31 - 1]
    assert np.load(tmp_path / "numbers.npy", mmap_mode="r").tolist() == [7, -1, 2**31 - 1]


def test_what_is_flushed_is_in_the_file_and_not_in_memory(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "run")
    column = spool.column("bytes", np.uint8)
    column.buffer.extend(b"x" * HELD_BACK_BYTES)
    spool.flush()
    assert len(column.buffer) == HELD_BACK_BYTES, "small pieces wait"
    column.buffer.extend(b"y")
    spool.flush()
    assert len(column.buffer) == 0 and len(column) == HELD_BACK_BYTES + 1
    assert len(np.load(tmp_path / "run" / "bytes.npy", mmap_mode="r")) == HELD_BACK_BYTES + 1


def test_without_a_folder_nothing_is_flushed() -> None:
    spool = Spool()
    column = spool.column("bytes", np.uint8)
    column.buffer.extend(b"x" * (HELD_BACK_BYTES + 1))
    spool.flush()
    assert len(column.buffer) == HELD_BACK_BYTES + 1


def test_what_is_not_kept_is_removed(tmp_path: Path) -> None:
    spool = Spool(tmp_path, keep=False)
    column = spool.column("bytes", np.uint8)
    column.buffer.extend(b"abc")
    assert column.array().tolist() == [97, 98, 99]
    (inside,) = tmp_path.iterdir()
    assert (inside / "bytes.npy").is_file()
    spool.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_spool_within_another_is_flushed_with_it_into_a_folder_inside(tmp_path: Path) -> None:
    outer = Spool(tmp_path)
    column = outer.within("inner").column("bytes", np.uint8)
    column.buffer.extend(bytes(HELD_BACK_BYTES + 1))
    outer.flush()
    assert not column.buffer
    assert len(np.load(tmp_path / "inner" / "bytes.npy")) == HELD_BACK_BYTES + 1
    assert Spool().within("inner").column("bytes", np.uint8).array().size == 0


def test_a_spool_within_one_that_is_not_kept_goes_with_it(tmp_path: Path) -> None:
    outer = Spool(tmp_path, keep=False)
    outer.within("inner").column("bytes", np.uint8)
    outer.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_timeline_in_a_file_is_that_in_memory(tmp_path: Path) -> None:
    column = Column(SPAN, tmp_path / "spans.npy")
    kept, streamed = Timeline(), Timeline(column)
    for timeline in (kept, streamed):
        lane = timeline.add_lane("gpu0", "compute", "compute stream")
        for start_ns in range(0, 100, 10):
            timeline.record(start_ns, start_ns + 7, start_ns, 3, 1, 2, lane, EXPERT)
            column.flush()
    assert len(kept) == len(streamed) == 10
    assert (kept.spans() == streamed.spans()).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_that_is_written_to_files_is_that_in_memory(tmp_path: Path, engine: str) -> None:
    # The host runs ahead of the lanes: its last span is recorded before that of a kernel that ends earlier.
    scenario = tiny_scenario(prefetch={"lookahead": 1}, dispatch={"mode": "eager", "router_readback": False})
    trace = tiny_trace([[[0], [1], [2]], [[3], [1], [0]]])
    inputs = tiny_inputs(tiny_model(3), tiny_profile(launch_ns=15), trace, scenario)
    costs = part_costs(inputs)
    kept = run_all(inputs, prepared(inputs, costs), engine=engine)
    written = run_all(inputs, prepared(inputs, costs, tmp_path), engine=engine)
    assert books(written) == books(kept)
    assert all((np.diff(one.spans["end_ns"]) >= 0).all() for one in (*kept, *written))
    assert len(np.load(tmp_path / "gpu0" / "spans.npy")) == len(kept[0].spans) > 0


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_what_is_added_at_once_comes_behind_what_was_appended(tmp_path: Path, dtype: type, in_file: bool) -> None:
    column = Column(dtype, tmp_path / "numbers.npy" if in_file else None)
    column.buffer.append(1)
    column.add(np.array([2, 3], dtype).tobytes())
    column.add(np.array([4], dtype).tobytes())
    column.buffer.append(5)
    assert len(column) == 5
    column.add(np.array([6], dtype).tobytes())
    assert column.array().tolist() == [1, 2, 3, 4, 5, 6]
