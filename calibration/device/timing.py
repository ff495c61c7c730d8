"""Timing on one GPU: queues behind a spinning gate, so that what is timed is the GPU and never the host that feeds it.

A kernel spins on the stream while the host queues all that is to be timed; only then it begins. If the gate opened
before everything was queued, or what ran beside ended too early, the same is done again with a longer gate or more of
it. Events take the time, as in nvbandwidth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

from .cuda import Call, Calls, run

#: The gate's time for each queue, and for each call in it; doubled as often as needed.
_GATE_NS, _GATE_NS_A_CALL = 200_000, 15_000
_TRIES = 8
_MOST_BESIDE = 8
#: How long the GPU is busy while the queue is filled, and from when on a call counts as blocked.
_DEPTH_GATE_NS, _BLOCKED_NS = 300_000_000, 20_000_000


class TimingError(RuntimeError):
    """Something that could not be timed, such as a host too slow to fill a queue."""


@dataclass(frozen=True)
class Queued:
    """A queue of groups of calls: how long each took, and from the end of each to the start of the next, in ns."""

    durations_ns: list[int]
    gaps_ns: list[int]
    total_ns: int


@dataclass(frozen=True)
class Beside:
    """What keeps another stream busy meanwhile: calls, made again and again until it outlasts what is timed.

    On another GPU, whose clock is not to be compared, they are made once and must be enough.
    """

    stream: Any
    calls: Calls
    same_gpu: bool = True


class Timer:
    """Times calls on streams of one GPU; `gpu` is `cuda.Gpu` or has its surface."""

    def __init__(self, gpu: Any) -> None:
        self._gpu = gpu
        self._gate = gpu.event()
        self._beside_ends = [gpu.event() for _ in range(_MOST_BESIDE)]
        self._starts: list[Any] = []
        self._ends: list[Any] = []

    def queued(self, stream: Any, groups: Sequence[Calls], beside: Sequence[Beside] = ()) -> Queued:
        """Time groups queued one behind the other on a stream, with an event before and behind each."""
        made = sum(2 + len(calls) for calls in groups) + sum(len(other.calls) for other in beside)
        gate_ns, repeats = _GATE_NS + _GATE_NS_A_CALL * made, 1
        for _ in range(_TRIES):
            held = self._queue(stream, groups, gate_ns, beside, repeats)
            starts, ends = self._starts[: len(groups)], self._ends[: len(groups)]
            outlasting = [end for other, end in zip(beside, self._beside_ends, strict=False) if other.same_gpu]
            covered = all(elapsed_ns(ends[-1], end) >= 0 for end in outlasting)
            if held and covered:
                return _read(starts, ends)
            gate_ns, repeats = (gate_ns if held else 2 * gate_ns), (repeats if covered else 2 * repeats)
        raise TimingError(f"{len(groups)} groups could not be queued before the GPU began with them")

    def ungated(self, stream: Any, groups: Sequence[Calls]) -> Queued:
        """Time groups that the host itself carries out, or waits for: no gate can hold these back."""
        self._grow(len(groups))
        run((self._gpu.use(stream),))
        self._gpu.synchronize()
        starts, ends = self._fill(stream, groups)
        self._gpu.synchronize()
        return _read(starts, ends)

    def alone(self, stream: Any, calls: Calls, times: int) -> list[int]:
        """Time one group on an idle GPU, `times` times."""
        return [self.queued(stream, [calls]).durations_ns[0] for _ in range(times)]

    def host(self, stream: Any, calls: Calls, repeats: int) -> int:
        """Returns what one round of calls takes the host, in ns, while the GPU is too busy to hold it up."""
        gate_ns = _GATE_NS + _GATE_NS_A_CALL * repeats * len(calls)
        for _ in range(_TRIES):
            self._open_gate(stream, gate_ns)
            began_ns = perf_counter_ns()
            for _ in range(repeats):
                for function, args in calls:
                    function(*args)
            took_ns = perf_counter_ns() - began_ns
            held = not self._gate.query()
            self._gpu.synchronize()
            if held:
                return took_ns // repeats
            gate_ns *= 2
        raise TimingError("the host could not make its calls before the GPU was done with them")

    def after_wait(self, first: Any, first_calls: Calls, second: Any, second_calls: Calls) -> int:
        """Returns the ns from the end of the first stream's calls to the start of the second's, which wait for them."""
        done, begun, ended = self._events(3)
        self._open_gate(first, 4 * _GATE_NS)
        run(first_calls)
        done.record(first)
        run((self._gpu.use(second),))
        done.wait(second)
        begun.record(second)
        run(second_calls)
        ended.record(second)
        self._gpu.synchronize()
        return elapsed_ns(done, begun)

    def there_and_back(self, here: Any, there: Any) -> int:
        """Returns the ns from an event of one stream to one of the same that waits for another stream, and that for it.

        The streams may be of different GPUs.
        """
        begun, back = self._events(2)
        turned = self._gpu.event()  # it belongs to the GPU that it is recorded on first
        self._open_gate(here, 4 * _GATE_NS)
        begun.record(here)
        begun.wait(there)
        turned.record(there)
        turned.wait(here)
        back.record(here)
        self._gpu.synchronize()
        return elapsed_ns(begun, back)

    def launched_idle(self, stream: Any, calls: Calls, groups: int) -> list[tuple[int, int]]:
        """Launch on an idle GPU and wait, `groups` times; each: ns from the return to the end, and on to knowing."""
        zero, start, end = self._events(3)
        run((self._gpu.use(stream),))
        self._gpu.synchronize()
        zero.record(stream)
        zero_ns = perf_counter_ns()
        seen = []
        for _ in range(groups):
            start.record(stream)
            run(calls)
            end.record(stream)
            issued_ns = perf_counter_ns() - zero_ns
            end.synchronize()
            known_ns = perf_counter_ns() - zero_ns
            end_ns = elapsed_ns(zero, end)
            seen.append((max(0, end_ns - issued_ns), max(0, known_ns - end_ns)))
        return seen

    def _queue(
        self, stream: Any, groups: Sequence[Calls], gate_ns: int, beside: Sequence[Beside], repeats: int
    ) -> bool:
        """Queue everything behind the gate, wait for the end, and return whether the gate held until all was queued."""
        self._grow(len(groups))
        self._open_gate(stream, gate_ns)
        self._fill(stream, groups)
        for other, ended in zip(beside, self._beside_ends, strict=False):
            self._gate.wait(other.stream)
            run((self._gpu.use(other.stream),))
            for _ in range(repeats):
                run(other.calls)
            if other.same_gpu:
                ended.record(other.stream)
        held = not self._gate.query()
        self._gpu.synchronize()
        return held

    def _fill(self, stream: Any, groups: Sequence[Calls]) -> tuple[list[Any], list[Any]]:
        """Queue groups with their events, and return these."""
        starts, ends = self._starts[: len(groups)], self._ends[: len(groups)]
        for start, end, calls in zip(starts, ends, groups, strict=True):
            start.record(stream)
            run(calls)
            end.record(stream)
        return starts, ends

    def _open_gate(self, stream: Any, gate_ns: int) -> None:
        run((self._gpu.use(stream),))
        self._gpu.spin(gate_ns)
        self._gate.record(stream)

    def queue_depth(self, stream: Any, call: Call, most: int) -> int:
        """Returns how many calls the driver takes while the GPU is busy before one of them blocks; `most` at most."""
        self._open_gate(stream, _DEPTH_GATE_NS)
        function, args = call
        count = most
        for number in range(most):
            began_ns = perf_counter_ns()
            function(*args)
            if perf_counter_ns() - began_ns > _BLOCKED_NS:
                count = number
                break
        self._gpu.synchronize()
        return count

    def _grow(self, count: int) -> None:
        while len(self._starts) < count:
            self._starts.append(self._gpu.event())
            self._ends.append(self._gpu.event())

    def _events(self, count: int) -> list[Any]:
        self._grow(count)
        return self._starts[:count]


def _read(starts: Sequence[Any], ends: Sequence[Any]) -> Queued:
    return Queued(
        [elapsed_ns(start, end) for start, end in zip(starts, ends, strict=True)],
        [elapsed_ns(end, start) for end, start in zip(ends, starts[1:], strict=False)],
        elapsed_ns(starts[0], ends[-1]),
    )


def elapsed_ns(earlier: Any, later: Any) -> int:
    """Returns the ns from one event to another, negative if they came the other way round."""
    ns: int = round(earlier.elapsed_time(later) * 1e6)
    return ns
