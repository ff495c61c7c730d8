"""Machine code of the threads beside the host's: they wait for flags, read a file, and compute experts on the CPU.

They hold no interpreter, so that the host's thread goes on meanwhile. What they share are words in memory: a flag is 0
until what it stands for has ended. A GPU writes flags, and waits for them, on its streams.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import llvmlite.ir as ir  # type: ignore[import-untyped]
import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from ...machine_code import compiled

Function = TypeVar("Function", bound=Callable[..., Any])
_carray: Any = numba.carray  # type: ignore[attr-defined]
_pread: Any = types.ExternalFunction("pread", types.int64(types.int32, types.uintp, types.uintp, types.int64))
_sched_yield: Any = types.ExternalFunction("sched_yield", types.int32())
_clock_gettime: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.uintp))
_CLOCK_MONOTONIC = 1
#: How often a thread looks before it lets others have its core.
_SPINS = 256

#: How the weights of an expert lie in memory. Of groups, each byte holds one weight, or two, the first in its low half,
#: from -8 on; the scales of all groups, in bfloat16, come behind the weights.
FORMATS = ("float32", "bfloat16", "int8", "int4")
_FLOAT32, _BFLOAT16, _INT8, _INT4 = range(4)
#: Weights that share a scale.
GROUP = 128

# A request to the drive, as columns: where in the file, where to, how many bytes, which flags it waits for, its own.
REQUEST_OFFSET, REQUEST_TO, REQUEST_BYTES, REQUEST_FIRST, REQUEST_LAST, REQUEST_FLAG, REQUEST_COLUMNS = range(7)
# An expert on the CPU: where its weights lie, tokens, whether it is the first of its visit, flags as above.
EXPERT_AT, EXPERT_TOKENS, EXPERT_BEGINS, EXPERT_FIRST, EXPERT_LAST, EXPERT_FLAG, EXPERT_COLUMNS = range(7)
#: Words that all threads of one kind share: the next request, how many are ordered, arrivals at barriers, an error.
NEXT, ORDERED, ARRIVED, FAILED, SHARED_WORDS = range(5)


def _free(function: Function) -> Function:
    """Returns the function compiled, to run without the interpreter; sums may be made in any order."""
    return compiled(function, nogil=True, fastmath=True)


def _instruction(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns what stands in compiled code for an instruction that the function builds."""
    made: Callable[..., Any] = intrinsic(function)
    return made


@_instruction
def _load(typingctx: Any, address: Any) -> Any:  # pragma: no cover
    """Returns the word of 32 bits at an address, read anew."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(32).as_pointer())
        return builder.load_atomic(pointer, "acquire", 4)

    return types.int32(types.uintp), build


@_instruction
def _store(typingctx: Any, address: Any, value: Any) -> Any:  # pragma: no cover
    """Write a word of 32 bits to an address, behind all that was written before."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(32).as_pointer())
        builder.store_atomic(args[1], pointer, "release", 4)
        return context.get_dummy_value()

    return types.void(types.uintp, types.int32), build


@_instruction
def _add(typingctx: Any, address: Any) -> Any:  # pragma: no cover
    """Add 1 to the word of 32 bits at an address and return what it was."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(32).as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(32), 1), "seq_cst")

    return types.int32(types.uintp), build


@_instruction
def _as_float(typingctx: Any, bits: Any) -> Any:  # pragma: no cover
    """Returns the float32 of these bits."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), build


@_free
def now_ns(words: Any) -> int:
    """Returns the clock of `perf_counter_ns`; `words` (2,) int64 are this thread's own."""
    _clock_gettime(_CLOCK_MONOTONIC, words.ctypes.data)
    ns: int = words[0] * 1_000_000_000 + words[1]
    return ns


@_free
def wait_until(address: int, value: int, failed: int) -> bool:
    """Wait until the word at an address is `value` or more; return False if the one at `failed` is set before."""
    spins = 0
    while _load(address) < value:
        spins += 1
        if spins % _SPINS == 0:
            if _load(failed) != 0:
                return False
            _sched_yield()
    return True


@_free
def _wait_for(needs: Any, first: int, last: int, flags: int, failed: int) -> bool:
    """Wait for flags; False as of `wait_until`."""
    for at in range(first, last):  # noqa: SIM110 - a generator would be an object
        if not wait_until(flags + 4 * needs[at], 1, failed):
            return False
    return True


@_free
def read_all(fd: int, requests: Any, needs: Any, flags: int, shared: int, times: Any) -> None:
    """Carry out requests to the drive, each by the first thread that is free, once it is ordered and may begin.

    `times` (requests, 2) are filled with starts and ends. A read that fails, or is short, sets the shared word FAILED.
    """
    words = np.zeros(2, dtype=np.int64)
    failed = shared + 4 * FAILED
    while True:
        number = _add(shared + 4 * NEXT)
        if number >= len(requests) or not wait_until(shared + 4 * ORDERED, number + 1, failed):
            return
        request = requests[number]
        if not _wait_for(needs, request[REQUEST_FIRST], request[REQUEST_LAST], flags, failed):
            return
        times[number, 0] = now_ns(words)
        done = 0
        while done < request[REQUEST_BYTES]:
            at = request[REQUEST_OFFSET] + done
            got = _pread(fd, request[REQUEST_TO] + done, request[REQUEST_BYTES] - done, at)
            if got <= 0:
                _store(failed, 1)
                return
            done += got
        times[number, 1] = now_ns(words)
        _store(flags + 4 * request[REQUEST_FLAG], 1)


@_free
def _row(weights: Any, form: int, row: int, x: Any, token: int, columns: int, scales_at: int) -> Any:
    """Returns the product of one row of a matrix and a token; `weights` are the bytes from the matrix on."""
    total = np.float32(0)
    if form == _FLOAT32:
        whole = weights.view(np.float32)[row * columns : (row + 1) * columns]
        for at in range(columns):
            total += whole[at] * x[token, at]
        return total
    if form == _BFLOAT16:
        half = weights.view(np.uint16)[row * columns : (row + 1) * columns]
        for at in range(columns):
            total += _as_float(np.uint32(half[at]) << np.uint32(16)) * x[token, at]
        return total
    scales = weights[scales_at:].view(np.uint16)
    for group in range(columns // GROUP):
        part = np.float32(0)
        first = group * GROUP
        if form == _INT8:
            bytes_ = weights.view(np.int8)[row * columns + first : row * columns + first + GROUP]
            for at in range(GROUP):
                part += np.float32(bytes_[at]) * x[token, first + at]
        else:
            pairs = weights[(row * columns + first) // 2 : (row * columns + first + GROUP) // 2]
            for at in range(GROUP // 2):
                low, high = np.float32(pairs[at] & 15) - 8, np.float32(pairs[at] >> 4) - 8
                part += low * x[token, first + 2 * at] + high * x[token, first + 2 * at + 1]
        scale = _as_float(np.uint32(scales[(row * columns + first) // GROUP]) << np.uint32(16))
        total += scale * part
    return total


@_free
def _meet(shared: int, threads: int, times: int, failed: int) -> bool:
    """Wait until all threads have come here for the `times`-th time."""
    _add(shared + 4 * ARRIVED)
    met: bool = wait_until(shared + 4 * ARRIVED, threads * times, failed)
    return met


@_free
def _matrix(weights: Any, form: int, number: int, count: int) -> Any:
    """Returns the bytes of an expert's weights from one of its matrices on; its scales lie behind all."""
    if form == _FLOAT32:
        return weights[4 * number * count :]
    if form == _BFLOAT16:
        return weights[2 * number * count :]
    return weights[number * count if form == _INT8 else number * count // 2 :]


@_free
def _scales_at(form: int, number: int, count: int, matrices: int) -> int:
    """Returns where the scales of a matrix begin, in bytes behind its weights' begin."""
    weights = count if form == _INT8 else count // 2
    return (matrices - number) * weights + number * 2 * (count // GROUP)


@_free
def compute_all(
    thread: int, threads: int, form: int, shape: Any, experts: Any, needs: Any, pointers: Any, x: Any, between: Any,
    y: Any, results: Any, times: Any,
) -> None:  # fmt: skip
    """Compute experts on the CPU, one after the other, all threads a part of the rows of each.

    `shape` is (hidden, ff, matrices, bytes of an expert), `pointers` (flags, shared, weights); `x` (tokens, hidden) are
    the tokens in float32 bits or bfloat16, `between` (tokens, ff) and `y` (tokens, hidden) float32, which is the sum
    over the experts of a visit; `results` (tokens, hidden) is what goes back, in the type of `x`. `times` (experts, 2).
    """
    hidden, inner, matrices, size_bytes = shape[0], shape[1], shape[2], shape[3]
    flags, shared = pointers[0], pointers[1]
    failed, met = shared + 4 * FAILED, 0
    words = np.zeros(2, dtype=np.int64)
    tokens_in = np.zeros(y.shape, dtype=np.float32)
    for number in range(len(experts)):
        expert = experts[number]
        if not _wait_for(needs, expert[EXPERT_FIRST], expert[EXPERT_LAST], flags, failed):
            return
        if thread == 0:
            times[number, 0] = now_ns(words)
        tokens = expert[EXPERT_TOKENS]
        for token in range(tokens):
            for at in range(hidden):
                tokens_in[token, at] = _token(x, token, at)
        weights = _carray(_pointer(expert[EXPERT_AT]), (size_bytes,), np.uint8)
        count = hidden * inner
        for row in range(thread * inner // threads, (thread + 1) * inner // threads):
            for token in range(tokens):
                gate = _row(
                    weights, form, row, tokens_in, token, hidden, _scales_at(form, 0, count, matrices)
                )  # fmt: skip
                gate = max(gate, np.float32(0))
                if matrices == 3:
                    second = _matrix(weights, form, 1, count)
                    gate *= _row(second, form, row, tokens_in, token, hidden, _scales_at(form, 1, count, matrices))
                between[token, row] = gate
        met += 1
        if not _meet(shared, threads, met, failed):
            return
        last = _matrix(weights, form, matrices - 1, count)
        for row in range(thread * hidden // threads, (thread + 1) * hidden // threads):
            if expert[EXPERT_BEGINS]:
                y[:, row] = 0
            for token in range(tokens):
                part = _row(last, form, row, between, token, inner, _scales_at(form, matrices - 1, count, matrices))
                y[token, row] += part
                _put(results, token, row, y[token, row])
        met += 1
        if not _meet(shared, threads, met, failed):
            return
        if thread == 0:
            times[number, 1] = now_ns(words)
            _store(flags + 4 * expert[EXPERT_FLAG], 1)


@_instruction
def _pointer(typingctx: Any, address: Any) -> Any:  # pragma: no cover
    """Returns an address as a pointer to bytes."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    bytes_: Any = types.CPointer(types.uint8)  # type: ignore[no-untyped-call]
    return bytes_(types.int64), build


@_free
def _token(x: Any, token: int, at: int) -> Any:
    """Returns a number of a token: bfloat16 as uint16, or float32 as uint32."""
    bits = np.uint32(x[token, at])
    return _as_float(bits << np.uint32(16) if x.itemsize == 2 else bits)


@_free
def _put(results: Any, token: int, at: int, value: float) -> None:
    """Write a number as `_token` reads it, cut to the type."""
    bits = _bits(np.float32(value))
    results[token, at] = bits >> np.uint32(16) if results.itemsize == 2 else bits


@_instruction
def _bits(typingctx: Any, value: Any) -> Any:  # pragma: no cover
    """Returns the bits of a float32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), build
