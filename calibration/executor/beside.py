"""The threads beside the host's: the CPU that computes experts, and the I/O lanes that read from a drive.

They run machine code (`worker_code`) that waits for flags. A flag is a word in pinned host memory, 0 until what it
stands for has ended: a GPU's stream writes it behind its work, or waits for it, and the host's thread goes on
meanwhile. All threads stay on cores of their own, if there are as many.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from threading import Thread
from typing import Any

import numpy as np
import numpy.typing as npt

from ...engine.scenario.inputs import Inputs
from ..device.cuda import Call, Calls, CudaError, expert_matrices
from .entries import CPU, DRIVE, Entry, Plan
from .shared import Shared, aligned, aligned_empty

Table = npt.NDArray[np.int64]
#: How an activation is seen whose bits machine code reads, by its bytes.
_BITS = {2: ("int16", np.uint16), 4: ("int32", np.uint32)}


class Beside:
    """What runs beside the host's thread in one execution: flags, and the threads that wait for and write them.

    `buffers` are the experts' bytes in host memory. `tokens` and `results` (tokens, hidden) are pinned memory that the
    tokens for the CPU come to, and their sums over its experts go from. Raises CudaError as `Shared.file_descriptor`.
    """

    def __init__(self, gpu: Any, inputs: Inputs, plan: Plan, shared: Shared, buffers: Sequence[Any]) -> None:
        self._gpu, self._inputs, self._plan = gpu, inputs, plan
        entries = plan.entries
        beside = [number for number, entry in enumerate(entries) if entry.lane in (CPU, DRIVE)]
        signals = [number for number, entry in enumerate(entries) if entry.signals]
        self.needed = bool(beside)
        self._flag_of = {number: at for at, number in enumerate([*beside, *signals])}
        self.flags = gpu.host_empty(max(1, len(self._flag_of)), dtype="int32")
        self.flags.zero_()
        self._words = self.flags.numpy()
        self._on_cpu = [number for number in beside if entries[number].lane == CPU]
        self._reads = [number for number in beside if entries[number].lane == DRIVE]
        self._rows = {number: row for of_lane in (self._on_cpu, self._reads) for row, number in enumerate(of_lane)}
        self._shared_words = {lane: np.zeros(4, dtype=np.int32) for lane in (CPU, DRIVE)}
        self._cpu_times, self._read_times = (np.zeros((len(of), 2), np.int64) for of in (self._on_cpu, self._reads))
        self._threads: list[Thread] = []
        self._cores = shared.cores
        lanes = inputs.scenario.tiers.io_lanes or (inputs.profile.nvme.lanes if inputs.profile.nvme else 1)
        self.io_lanes = lanes if self._reads else 0
        self.cpu_threads = 0
        self.host_slots = self._host_memory(shared)
        if self._on_cpu:
            free = max(1, len(shared.cores.numbers) - 1 - self.io_lanes)
            self.cpu_threads = inputs.scenario.miss.cpu_threads or free
            self._make_cpu(buffers)
        if self._reads:
            self._fd = shared.file_descriptor()
            self._requests, self._read_needs = self._request_table(shared, buffers)

    # Flags.

    def flag(self, number: int) -> int | None:
        """Returns the flag of an entry; None if it has none."""
        return self._flag_of.get(number)

    def awaits(self, number: int, stream: Any) -> Call:
        """Returns the call that makes a stream wait for an entry that a thread beside the host's works at."""
        return self._gpu.wait_flag(self.flags, self._flag_of[number], stream)  # type: ignore[no-any-return]

    def tells(self, number: int, stream: Any) -> Call:
        """Returns the call that lets a stream write the flag of an entry, behind all that is on it."""
        return self._gpu.write_flag(self.flags, self._flag_of[number], stream)  # type: ignore[no-any-return]

    def orders(self, number: int) -> Calls:
        """Returns the calls that order the work of an entry."""
        from ..device.worker_code import ORDERED

        if self._plan.entries[number].lane == CPU:  # it waits for its tokens, no more
            return ()
        words = self._shared_words[DRIVE]
        return ((words.__setitem__, (ORDERED, self._rows[number] + 1)),)

    def host_wait(self, number: int) -> Call:
        """Returns the call by which the host's thread waits for an entry."""
        from ..device.worker_code import FAILED, wait_until

        failed = self._shared_words[CPU].ctypes.data + 4 * FAILED
        return wait_until, (self._words.ctypes.data + 4 * self._flag_of[number], 1, failed)

    # Making ready.

    def _host_memory(self, shared: Shared) -> list[Any]:
        """Returns the rooms of host memory, where that is a cache."""
        size_bytes = aligned(max(self._inputs.scenario.compression.copied_bytes(one) for one in self._sizes()))
        memory = aligned_empty(self._gpu, self._plan.host_slots * size_bytes)
        return [memory[at * size_bytes : (at + 1) * size_bytes] for at in range(self._plan.host_slots)]

    def _sizes(self) -> Sequence[int]:
        return self._inputs.model.expert_bytes

    def _needs(self, numbers: Sequence[int]) -> tuple[Table, list[tuple[int, int]]]:
        """Returns the flags that entries wait for, one after the other, and where those of each begin and end."""
        needs: list[int] = []
        ends = []
        for number in numbers:
            first = len(needs)
            needs += [self._flag_of[other] for other in self._plan.entries[number].waits]
            ends.append((first, len(needs)))
        return np.array(needs or [0], dtype=np.int64), ends

    def _request_table(self, shared: Shared, buffers: Sequence[Any]) -> tuple[Table, Table]:
        """Returns the requests to the drive, and the flags that they wait for."""
        needs, ends = self._needs(self._reads)
        rows = []
        for number, (first, last) in zip(self._reads, ends, strict=True):
            entry = self._plan.entries[number]
            buffer, slot = buffers[entry.expert], self.host_slots[entry.host_slot]
            begins, stops = (_piece(len(buffer), entry.pieces, piece) for piece in (entry.piece, entry.piece + 1))
            place = shared.place_in_file(buffer) + begins
            rows.append((place, slot.data_ptr() + begins, stops - begins, first, last, self._flag_of[number]))
        return np.array(rows, dtype=np.int64), needs

    def _make_cpu(self, buffers: Sequence[Any]) -> None:
        """Make the memory of what the CPU computes, and the table of its experts."""
        from ..device.worker_code import FORMATS

        model, entries = self._inputs.model, self._plan.entries
        most = max(entry.tokens for entry in entries if entry.lane == CPU or entry.lane in ("to_cpu", "back"))
        bytes_a_number = model.activation_bytes(1) // model.hidden
        if bytes_a_number not in _BITS or model.dense_dtype == "float16":
            raise CudaError(f"model {model.name}: dense_dtype = {model.dense_dtype!r}: the CPU takes bfloat16, float32")
        dtype, bits = _BITS[bytes_a_number]
        self.tokens, self.results = (self._gpu.host_empty(most, model.hidden, dtype=dtype) for _ in range(2))
        self.tokens.zero_()
        self.results.zero_()
        self._numbers = self.tokens.numpy().view(bits), self.results.numpy().view(bits)
        self._between = np.zeros((most, model.expert_ff), dtype=np.float32)
        self.sums = np.zeros((most, model.hidden), dtype=np.float32)
        self._form = FORMATS.index(model.expert_dtype)
        self._shape = np.array(
            [model.hidden, model.expert_ff, model.expert_matrices, min(len(buffer) for buffer in buffers)],
            dtype=np.int64,
        )
        check_cpu_bytes(self._inputs)
        needs, ends = self._needs(self._on_cpu)
        rows = []
        for number, (first, last) in zip(self._on_cpu, ends, strict=True):
            entry = entries[number]
            where = buffers[entry.expert] if entry.host_slot < 0 else self.host_slots[entry.host_slot]
            rows.append((where.data_ptr(), entry.tokens, entry.begins, first, last, self._flag_of[number]))
        self._experts, self._cpu_needs = np.array(rows, dtype=np.int64), needs

    # Running.

    def start(self) -> None:
        """Forget the last run, and let the threads begin: on cores that the calling thread does not use, if any are."""
        if not self.needed:
            return
        from ..device.worker_code import compute_all, read_all

        self.flags.zero_()
        for words in self._shared_words.values():
            words[:] = 0
        flags = self._words.ctypes.data
        work: list[tuple[Any, tuple[Any, ...]]] = []
        for thread in range(self.cpu_threads):
            pointers = np.array([flags, self._shared_words[CPU].ctypes.data], dtype=np.int64)
            tokens, results = self._numbers
            work.append((compute_all, (
                thread, self.cpu_threads, self._form, self._shape, self._experts, self._cpu_needs, pointers, tokens,
                self._between, self.sums, results, self._cpu_times,
            )))  # fmt: skip
        for _ in range(self.io_lanes):
            drive = self._shared_words[DRIVE].ctypes.data
            work.append((read_all, (self._fd, self._requests, self._read_needs, flags, drive, self._read_times)))
        others = [number for number in self._cores.numbers if number not in self._used_now()]
        self._threads = [
            Thread(target=self._serve, args=(function, args, others[at : at + 1]), daemon=True)
            for at, (function, args) in enumerate(work)
        ]
        for begun in self._threads:
            begun.start()

    def _used_now(self) -> set[int]:
        return set(os.sched_getaffinity(0)) if self._cores.can_pin else set()

    def _serve(self, function: Any, args: tuple[Any, ...], core: list[int]) -> None:
        """Work on one core, and if something failed let nobody wait."""
        from ..device.worker_code import FAILED

        if self._cores.can_pin:
            os.sched_setaffinity(0, core or self._cores.numbers)
        function(*args)
        if any(words[FAILED] for words in self._shared_words.values()):
            self.let_go()

    def let_go(self) -> None:
        """Let nobody wait any more."""
        from ..device.worker_code import FAILED

        for words in self._shared_words.values():
            words[FAILED] = 1
        self.flags.fill_(1)

    def join(self) -> None:
        """Wait until the threads have ended."""
        for thread in self._threads:
            thread.join()
        self._threads = []

    def check(self) -> None:
        """Raise CudaError if a read from the drive failed."""
        from ..device.worker_code import FAILED

        if self._shared_words[DRIVE][FAILED]:
            raise CudaError("a read from the drive failed, or came short: is its file as it was written?")

    def wrong_by(self, buffers: Sequence[Any]) -> float:
        """Returns how far the CPU's sums of the last visit are off, relative to the same products by torch."""
        import torch

        entries = [self._plan.entries[number] for number in self._on_cpu]
        visit = [entry for entry in entries if entry.visit == entries[-1].visit]
        dtype = getattr(torch, self._inputs.model.dense_dtype)
        x = self.tokens.view(dtype).float()
        wanted = torch.zeros(self.sums.shape)
        for entry in visit:
            matrices = expert_matrices(self._inputs.model, buffers[entry.expert])
            first, *others, last = (matrix.float() for matrix in matrices)
            given = x[: entry.tokens]
            between = (given @ first.t()).relu_()
            wanted[: entry.tokens] += (between * (given @ others[0].t()) if others else between) @ last.t()
        return float((torch.from_numpy(self.sums) - wanted).norm() / wanted.norm())

    def when_ns(self, number: int) -> tuple[int, int]:
        """Returns when the work of an entry started and ended in the last run, by the clock of `perf_counter_ns`."""
        times = self._cpu_times if self._plan.entries[number].lane == CPU else self._read_times
        start_ns, end_ns = times[self._rows[number]].tolist()
        return start_ns, end_ns


def _piece(size_bytes: int, pieces: int, piece: int) -> int:
    """Returns where a piece of a read begins; the last one ends at the aligned size."""
    if piece == pieces:
        return aligned(size_bytes)
    return min(aligned(size_bytes), piece * aligned(-(-size_bytes // pieces)))


def check_cpu_bytes(inputs: Inputs) -> None:
    """Raise CudaError if the weights of an expert and the scales of their groups are more than its bytes."""
    from ..device.worker_code import GROUP

    model = inputs.model
    count = model.expert_matrices * model.hidden * model.expert_ff
    grouped = model.expert_dtype in ("int8", "int4")
    bits = round(model.dtype_bits("expert"))
    needed = count * bits // 8 + (2 * count // GROUP if grouped else 0)
    if grouped and (model.hidden % GROUP or model.expert_ff % GROUP):
        raise CudaError(f"model {model.name}: {model.expert_dtype} experts: hidden and ff must be multiples of {GROUP}")
    if needed > min(model.expert_bytes):
        raise CudaError(
            f"model {model.name}: {min(model.expert_bytes)} bytes an expert: its {model.expert_dtype} weights"
            f"{f' and a scale for each {GROUP}' if grouped else ''} take {needed}: set model.expert_bytes"
        )


def is_beside(entry: Entry) -> bool:
    """Whether a thread beside the host's works at an entry."""
    return entry.lane in (CPU, DRIVE)
