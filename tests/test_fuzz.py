"""Damaged files of every reader are read, or refused in a line: a few of each here, as many as wanted by fuzz.py."""

from __future__ import annotations

from pathlib import Path

import fuzz
import pytest

#: Damages of each reader here.
TRIES = 40


@pytest.mark.parametrize("name", fuzz.READERS)
def test_a_damaged_file_is_read_or_refused_in_a_line(name: str, tmp_path: Path) -> None:
    reader = fuzz.READERS[name]
    valid = reader.make()
    (tmp_path / reader.name).write_bytes(valid)
    reader.read(tmp_path / reader.name)  # what is damaged was valid
    for seed in range(TRIES):
        error = fuzz.crash(reader, fuzz.damaged(reader, seed, valid), tmp_path)
        assert error is None, f"seed {seed}: {error!r}"
