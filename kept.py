"""Caches of what was loaded or computed before: traces, weights, guesses.

A key says all that a value was made of: a file by what tells one state of it from the next, numbers by their digest. So
what is kept is what would be made, and nothing depends on whether it was; rows of a sweep, replicates and baselines
that name the same share it. Values are never changed by anybody.
"""

from __future__ import annotations

import hashlib
import os
import stat
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Value = TypeVar("Value")

#: What is kept takes at most so much memory in all: rows of a sweep name few traces, and large ones are soon read again
#: beside the run that they are for.
MOST_BYTES = 128 << 20


class Kept:
    """The values that were asked for last, as many as fit."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes, self._bytes, self._lock = most_bytes, 0, Lock()
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value], bytes_of: Callable[[Value], int]) -> Value:
        """Returns the value of a key, made if it is not kept; one of more bytes than fit is not."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]  # type: ignore[no-any-return]
        value = make()
        size_bytes = bytes_of(value)
        with self._lock:
            if size_bytes <= self._most_bytes and key not in self._values:
                self._values[key] = value, size_bytes
                self._bytes += size_bytes
                while self._bytes > self._most_bytes:
                    self._bytes -= self._values.popitem(last=False)[1][1]
        return value

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._values.clear()
            self._bytes = 0


#: What this process keeps.
KEPT = Kept()


def file_state(path: str | os.PathLike[str]) -> tuple[Hashable, ...] | None:
    """Returns what tells one state of a file from the next; None if there is no such file, or it has no end."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return os.path.realpath(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def digest_of(arrays: Iterable[npt.NDArray[Any] | None]) -> bytes:
    """Returns the SHA-256 of arrays: their types, shapes and values, in order."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(b"none" if array is None else _digest(array))
    return digest.digest()


#: Of so few bytes a digest is soon worked out again.
_SOON_READ_BYTES = 1 << 12
#: The digests of frozen arrays that live, by `id`; empty before anybody has asked for them.
_digests: dict[int, bytes] = {}


def _digest(array: npt.NDArray[Any]) -> bytes:
    """Returns the digest of one array, which is worked out once if it is frozen."""
    known = _digests.get(id(array))
    if known:
        return known
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape} ".encode())
    digest.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    if known is not None:
        _digests[id(array)] = digest.digest()
    return digest.digest()


#: What an entry takes beside its arrays.
_ENTRY_BYTES = 1 << 10


def frozen(arrays: Iterable[npt.NDArray[Any] | None]) -> int:
    """Make arrays read-only, and return the bytes that an entry of them takes."""
    size_bytes = _ENTRY_BYTES
    for array in arrays:
        if array is not None:
            array.setflags(write=False)
            if array.nbytes > _SOON_READ_BYTES and id(array) not in _digests:
                _digests[id(array)] = b""
                weakref.finalize(array, _digests.pop, id(array), None).atexit = False
            size_bytes += array.nbytes
    return size_bytes
