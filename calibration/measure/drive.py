"""Measuring a drive: what reads past the system's cache take, by their size and by how many are in flight.

As an execution reads: threads without the interpreter, each with one request at a time, in a file written first.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from ...files import replacing
from ..device.cuda import CudaError
from .bench import MIB
from .samples import Series

#: The file that is read, and the sizes of reads: pieces, and experts.
FILE_BYTES = 1024 * MIB
SIZES = (1 * MIB, 4 * MIB, 9 * MIB, 27 * MIB)
#: How many are in flight.
IN_FLIGHT = (1, 2, 3, 4, 6, 8)
#: How many bytes are read for one look, and how often each is looked at; no round but the first begins after so long.
_LOOK_BYTES, _ROUNDS, _LAST_ROUND_S = 108 * MIB, 3, 20.0


def measure_drive(path: Path, sizes: Sequence[int] = SIZES, file_bytes: int = FILE_BYTES) -> tuple[Series, ...]:
    """Write a file, read it, remove it, and return the series `read`: what each request took, in ns.

    By `bytes` and `in_flight`; the first and the last requests of a look, with fewer in flight, are left out. Raises
    CudaError if the file cannot be read past the cache.
    """
    try:
        with replacing(path) as file:
            random, piece = np.random.default_rng(7), 64 * MIB
            for _ in range(-(-file_bytes // piece)):
                file.write(random.bytes(piece))
        handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        raise CudaError(
            f"--drive {path}: {error.strerror}: give a file on a drive that is read past the cache"
        ) from None
    try:
        return tuple(_look_all(handle, sizes, file_bytes))
    finally:
        os.close(handle)
        path.unlink(missing_ok=True)


def _look_all(handle: int, sizes: Sequence[int], file_bytes: int) -> Iterator[Series]:
    random = np.random.default_rng(8)
    seen: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    with mmap.mmap(-1, max(sizes) * max(IN_FLIGHT)) as memory:
        began_s = time.monotonic()
        for number in range(_ROUNDS):
            if number and time.monotonic() - began_s > _LAST_ROUND_S:
                break
            for size in sizes:
                for count in IN_FLIGHT:
                    took = tuple(_look(handle, memory, size, count, file_bytes, random))
                    seen.setdefault((size, count), []).append(took)
    for (size, count), rounds in seen.items():
        yield Series(term="read", key={"bytes": size, "in_flight": count}, rounds_ns=tuple(rounds))


def _look(handle: int, memory: Any, size: int, count: int, file_bytes: int, random: Any) -> list[int]:
    """Read at random places, so many requests in flight; return what each took while all were."""
    from ..device.worker_code import FAILED, ORDERED, REQUEST_COLUMNS, read_all

    requests = max(4 * count, -(-_LOOK_BYTES // size))
    begins = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    table = np.zeros((requests, REQUEST_COLUMNS), dtype=np.int64)
    table[:, 0] = random.integers(0, (file_bytes - size) // 4096, requests) * 4096
    table[:, 1] = begins + size * (np.arange(requests) % count)
    table[:, 2] = size
    table[:, 5] = np.arange(requests)
    flags, words = np.zeros(requests, dtype=np.int32), np.zeros(4, dtype=np.int32)
    times, needs = np.zeros((requests, 2), dtype=np.int64), np.zeros(1, dtype=np.int64)
    words[ORDERED] = requests
    args = (handle, table, needs, flags.ctypes.data, words.ctypes.data, times)
    threads = [Thread(target=read_all, args=args) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if words[FAILED]:
        raise CudaError("a read from the drive failed")
    inner = times[count - 1 : requests - count + 1]
    return (inner[:, 1] - inner[:, 0]).tolist()  # type: ignore[no-any-return]
