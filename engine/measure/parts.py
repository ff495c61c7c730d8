"""Arrays as long as a run, computed in parts: where a run's records are in files, in temporary files beside them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
#: Records that are looked at together where there are very many: some tens of MB.
AT_ONCE = 1 << 20


def parts_of(count: int) -> Iterator[slice]:
    """Yields slices that divide so many records, AT_ONCE of them each."""
    return (slice(first, min(first + AT_ONCE, count)) for first in range(0, count, AT_ONCE))


def room(beside: Array, count: int, dtype: npt.DTypeLike) -> Array:
    """Returns room for so many numbers; of very many, where the records `beside` lie in a file, in a file there."""
    if not isinstance(beside, np.memmap) or count <= AT_ONCE:
        return np.empty(count, dtype=dtype)
    with tempfile.TemporaryFile(dir=Path(str(beside.filename)).parent) as file:
        return np.memmap(file, dtype=dtype, mode="w+", shape=(count,))


def filled(beside: Array, count: int, dtype: npt.DTypeLike, of: Callable[[slice], Any]) -> Array:
    """Returns so many numbers, in `room`: `of` each slice is what stands there."""
    made = room(beside, count, dtype)
    for part in parts_of(count):
        made[part] = of(part)
    return made


def chosen(records: Array, which: Callable[[slice], Array]) -> Array:
    """Returns the records that are chosen, `which` (slice,) bool of each slice; in a file where all lie in one."""
    if not isinstance(records, np.memmap) or len(records) <= AT_ONCE:
        return records.take(np.flatnonzero(which(slice(0, len(records)))))
    with tempfile.TemporaryFile(dir=Path(str(records.filename)).parent) as file:
        count = 0
        for part in parts_of(len(records)):
            some = records[part][which(part)]
            count += len(some)
            file.write(some.tobytes())
        file.flush()
        if not count:
            return np.empty(0, dtype=records.dtype)
        return np.memmap(file, dtype=records.dtype, mode="r+", shape=(count,))


def ascending(numbers: Array) -> bool:
    """Whether none is less than the one before."""
    return all(
        bool((np.diff(numbers[max(0, part.start - 1) : part.stop]) >= 0).all()) for part in parts_of(len(numbers))
    )


def counted(what: Iterable[Array], count: int) -> Array:
    """Returns how often each number below `count` stands in arrays, those below 0 left out (count,)."""
    total = np.zeros(count, dtype=np.int64)
    for numbers in what:
        total += np.bincount(numbers[numbers >= 0], minlength=count)
    return total
