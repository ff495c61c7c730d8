"""Growing records: columns that are only ever appended to, in memory or in files.

A run keeps its records in the columns of a spool. Without a folder they stay in memory. With one, `flush` moves what
is new to a file for each column, so that memory does not grow with the run, and `array` hands out a view of the file.
The files are numpy's: `numpy.load(…, mmap_mode="r")` reads them.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

#: What a column holds back in memory before `flush` writes it, in bytes.
HELD_BACK_BYTES = 1 << 20


class Column:
    """Records of one dtype in a growing buffer: an `array` of 32-bit integers, or a bytearray of anything else, packed.

    Whoever records appends to `buffer`, which is always the same object, or adds many records at once. Who does both
    asks for `buffer` anew after each `add`: what was added is not in it before.
    """

    __slots__ = ("_added", "_buffer", "_dtype", "_path", "_written")

    def __init__(self, dtype: npt.DTypeLike, path: Path | None = None) -> None:
        """Keep them in memory, or in a file once they are flushed; a file that is there is replaced."""
        self._dtype = np.dtype(dtype)
        self._path = path
        self._written = 0
        self._buffer: Any = array("i") if self._dtype == np.int32 else bytearray()
        self._added: list[bytes] = []
        if path is not None:
            with path.open("wb") as file:
                self._write_header(file)

    def _write_header(self, file: Any) -> None:
        """Say how many records there are; numpy leaves room there for any number."""
        header = npy.header_data_from_array_1_0(np.empty(0, self._dtype)) | {"shape": (self._written,)}
        npy.write_array_header_1_0(file, header)

    def add(self, records: bytes) -> None:
        """Add packed records behind all others; they join the buffer once somebody asks for it.

        So it grows once: where many are appended piece by piece, it is copied again and again.
        """
        self._added.append(records)

    @property
    def buffer(self) -> Any:
        """What is recorded and in no file yet."""
        if self._added:
            added, self._added = b"".join(self._added), []
            (self._buffer.frombytes if isinstance(self._buffer, array) else self._buffer.extend)(added)
        return self._buffer

    def __len__(self) -> int:
        return self._written + memoryview(self.buffer).nbytes // self._dtype.itemsize

    @property
    def in_file(self) -> bool:
        """Whether there is a file."""
        return self._path is not None

    def flush(self, least_bytes: int = 0) -> None:
        """Move what is in memory to the file, if there is one and more than so much is there."""
        if self._path is None or memoryview(self.buffer).nbytes <= least_bytes:
            return
        with self._path.open("r+b") as file:
            file.seek(0, 2)
            file.write(self.buffer)
            self._written = len(self)
            del self.buffer[:]
            file.seek(0)
            self._write_header(file)

    def array(self) -> npt.NDArray[Any]:
        """Returns all records, read-only; while they live, nothing can be recorded that stays in memory."""
        self.flush()
        if self._added and not self._buffer and not self._written:
            self._added = [b"".join(self._added)]
            return np.frombuffer(self._added[0], dtype=self._dtype)
        if not self._written:
            return np.frombuffer(memoryview(self.buffer).toreadonly(), dtype=self._dtype)
        records: npt.NDArray[Any] = np.load(self._path or "", mmap_mode="r")
        return records


class Spool:
    """The columns of one run on one GPU, in a folder or, without one, in memory."""

    def __init__(self, folder: Path | None = None, *, keep: bool = True) -> None:
        """Keep files in `folder`, made if need be; without `keep`, in one inside it, until `remove` is called."""
        self._columns: list[Column] = []
        self._folder = folder
        self._remove: Callable[[], object] = _nothing
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if not keep:
            self._folder = Path(tempfile.mkdtemp(dir=folder))
            self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def column(self, name: str, dtype: npt.DTypeLike) -> Column:
        """Returns a new column; its file is named after it."""
        column = Column(dtype, None if self._folder is None else self._folder / f"{name}.npy")
        self._columns.append(column)
        return column

    def within(self, name: str) -> Spool:
        """Returns a spool of columns that are flushed and removed with these, in a folder inside theirs."""
        inner = Spool(None if self._folder is None else self._folder / name)
        inner._columns = self._columns
        return inner

    @property
    def is_due(self) -> bool:
        """Whether there is a folder, and a column has grown large."""
        return self._folder is not None and any(
            memoryview(column.buffer).nbytes > HELD_BACK_BYTES for column in self._columns
        )

    def flush(self) -> None:
        """Move what has grown large to the files."""
        if self._folder is not None:
            for column in self._columns:
                column.flush(HELD_BACK_BYTES)

    def remove(self) -> None:
        """Remove the files that are not to be kept; nothing may read them any more."""
        self._remove()


def _nothing() -> None:
    """Nothing is to be removed."""
