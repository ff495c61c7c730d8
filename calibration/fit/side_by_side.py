"""How far kernels of two streams of one GPU slow each other down, from executed schedules.

A kernel that takes q by itself took d, and for o of that the other stream was busy. In o it did what it does by itself
in q - (d - o): beside the other, it took o / (q - d + o) times as long. The sums of both over all kernels give the
factor, so that a kernel that stood still counts, and one that was touched hardly does.

Decompression takes the whole GPU while it runs, whatever the bytes. What kernels get done beside it is then the same
for one of them, not for its time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engine.load import load_inputs
from ...resources.timeline import DECOMPRESS, DENSE, EXPERT, HEAD, PREDICT
from ..executor.entries import COPIES, Entry, Plan
from ..executor.measured import Measured, Times
from ..executor.plan import make_plans
from .seen import BESIDE, Busy, Seen, busy_with, intervals, share_of, unsure

#: Of each kind of work aside: what is said of kernels beside it, and of itself beside kernels.
_FACTORS = {
    DECOMPRESS: ("unpacking_leaves", "unpacking_beside_kernels"),
    PREDICT: ("kernels_beside_predictor", "predictor_beside_kernels"),
}
_KERNELS = (DENSE, EXPERT, HEAD)
#: Fewer kernels beside others say nothing; a factor is at most so large.
_LEAST, _MOST = 20, 20.0


@dataclass(frozen=True)
class _Span:
    """One kernel: what it is, how long it took, and for how much of that another stream, and a copy, was busy."""

    key: tuple[Any, ...]
    took_ns: int
    beside_ns: float
    copied: float


def side_by_side(runs: Iterable[Measured]) -> dict[str, dict[str, Any]]:
    """Returns what a profile's contention says of side streams, as plain data; nothing where nothing ran aside."""
    seen: dict[str, list[_Beside]] = defaultdict(list)
    for run in runs:
        apart = float(np.std(run.makespans_ns) / np.mean(run.makespans_ns))
        for plan, times in zip(make_plans(load_inputs(run.scenario)), run.times, strict=True):
            for name, spans, one_ns in _spans(plan, times):
                count, beside_ns, done_ns = _sums(spans)
                if count >= _LEAST:
                    # What is left beside one: of the time beside, as many as go into it.
                    per_ns = one_ns if name == "unpacking_leaves" else 1.0
                    seen[name].append(_Beside(count, beside_ns / per_ns, done_ns, apart))
    found = {}
    for name, by_run in seen.items():
        value_of = _left if name == "unpacking_leaves" else _factor
        value = value_of(sum(one.beside for one in by_run), sum(one.done_ns for one in by_run))
        values = tuple(value_of(one.beside, one.done_ns) for one in by_run)
        count = sum(one.count for one in by_run)
        of = Seen(count, value, value, 0.0, values, float(np.sqrt(np.mean([one.apart**2 for one in by_run]))))
        found[name] = {
            "source": "measured", "note": f"inside schedules: {count} kernels", "uncertainty": unsure([of]),
            **({"ns": round(value)} if name == "unpacking_leaves" else {"factor": round(value, 4)}),
        }  # fmt: skip
    return found


@dataclass(frozen=True)
class _Beside:
    """Of one run: kernels that had others beside them, for how long (or beside how many), what they did, in ns.

    `apart`: how far the run's repeats lie apart, as a share.
    """

    count: int
    beside: float
    done_ns: float
    apart: float


def _left(beside: float, done_ns: float) -> float:
    """Returns what kernels get done beside one kernel aside, in ns: no less than nothing."""
    return max(1.0, done_ns / beside)


def _factor(beside_ns: float, done_ns: float) -> float:
    """Returns how many times as long what was done beside others took; 1 at least."""
    return float(np.clip(beside_ns / max(done_ns, beside_ns / _MOST), 1.0, _MOST))


def _sums(spans: Sequence[_Span]) -> tuple[int, float, float]:
    """Returns how many kernels had others beside them, for how long, in ns, and what they had done in that time."""
    alone: dict[tuple[Any, ...], list[_Span]] = defaultdict(list)
    for span in spans:
        if not span.beside_ns:
            alone[span.key].append(span)
    count, beside_ns, done_ns = 0, 0.0, 0.0
    for span in spans:
        if span.beside_ns and span.key in alone:
            count += 1
            beside_ns += span.beside_ns
            done_ns += _by_itself_ns(alone[span.key], span.copied) - (span.took_ns - span.beside_ns)
    return count, beside_ns, done_ns


def _by_itself_ns(alone: Sequence[_Span], copied: float) -> float:
    """Returns what a kernel takes by itself with a copy beside it for a share of its time: between quiet and beside."""
    quiet = [span.took_ns for span in alone if span.copied == 0]
    beside = [span.took_ns for span in alone if span.copied >= BESIDE]
    if not quiet or not beside:
        return float(np.mean(quiet or beside or [span.took_ns for span in alone]))
    return float(np.mean(quiet) + copied * (np.mean(beside) - np.mean(quiet)))


def _spans(plan: Plan, times: Times) -> Iterator[tuple[str, list[_Span], float]]:
    """Yields, for each thing that a run shows, the kernels that it is of, and what one kernel aside takes, in ns.

    Of several kernels aside at once no one tells what it would take: these count as what others have beside them alone.
    """
    copies = intervals(plan, times, COPIES)
    compute = [entry for entry in plan.entries if entry.kind in _KERNELS and not entry.members]
    for kind, (slows, slowed) in _FACTORS.items():
        aside = [entry for entry in plan.entries if entry.kind == kind and entry.lane != "compute"]
        if aside:
            busy, kernels = busy_with(aside, times), busy_with(compute, times)
            spans = [_span(entry, times, kernels, copies) for entry in aside]
            together = [_overlap_ns(entry, times, busy) for entry in aside]
            single = [span for span, ns in zip(spans, together, strict=True) if ns <= span.took_ns]
            alone = [span for span in single if not span.beside_ns] or single or spans
            one_ns = float(np.mean([span.took_ns for span in alone]))
            yield slows, [_span(entry, times, busy, copies) for entry in compute if entry.kind == EXPERT], one_ns
            yield slowed, single, one_ns


def _overlap_ns(entry: Entry, times: Times, busy: Busy) -> float:
    """Returns for how long others, each by itself, were busy while an entry was; itself too, if it is one of them."""
    starts_ns, ends_ns = busy
    overlap = np.minimum(ends_ns, times.end_ns[entry.mark]) - np.maximum(starts_ns, times.start_ns[entry.mark])
    return float(overlap[overlap > 0].sum())


def _span(entry: Entry, times: Times, busy: Busy, copies: Busy) -> _Span:
    start_ns, end_ns = int(times.start_ns[entry.mark]), int(times.end_ns[entry.mark])
    beside_ns, until_ns = 0, start_ns
    for first_ns, last_ns in zip(*(each.tolist() for each in busy), strict=True):
        if first_ns >= end_ns:
            break
        if last_ns > until_ns:
            beside_ns += min(last_ns, end_ns) - max(first_ns, until_ns)
            until_ns = min(last_ns, end_ns)
    key = (entry.kind, entry.layer if entry.kind == EXPERT else -1, entry.tokens)
    return _Span(key, end_ns - start_ns, beside_ns, share_of(copies, start_ns, end_ns))
