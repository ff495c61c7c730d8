"""What every call and kernel costs inside a schedule: medians over the spans and stamps of measured runs.

A tight loop and an idle GPU give other figures than a schedule does, so a profile is fitted on these where there are
any. Every sample is taken where one thing alone decided it: a kernel's duration where the host had launched all of it
before it started, a gap where the next kernel was queued already, a host cost where the host did not have to wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ..engine.costs import DENSE_PRODUCTS
from ..resources.timeline import DENSE, EXPERT, HEAD, READBACK
from ..workloads.model import Model, load_model
from .measured import Measured, Numbers, Times

#: A copy or a kernel that started so much later than its lane was free found it idle.
IDLE_NS = 20_000
#: From this share of its time beside copies a kernel counts as one beside a copy.
_BESIDE = 0.95

#: What was observed: the cost's name, what it depends on, and a value in ns.
Observation = tuple[str, dict[str, Any], int]

_KERNELS = {DENSE: "dense", EXPERT: "expert", HEAD: "head"}


def samples(runs: Iterable[Measured]) -> list[dict[str, Any]]:
    """Return one row for each cost and key: {cost, key, n, median_ns, mean_ns, iqr_ns, run_medians_ns, run_means_ns}.

    `mean_ns` holds the lowest and the highest 2 % to what the others are. `run_medians_ns` and `run_means_ns` have one
    for every repeat of every run in which the cost was seen. `beside_copy` in a key: whether a copy ran.

    - dense, expert, head: duration of a group that was launched whole before it started; quiet, or beside copies.
    - kernel_gap: from one group's end to the next's start, which was launched before (`wait`: behind a wait).
    - event_wait_gap, copy_wait_gap: from the end of a copy, or kernel, to the start of what waited for it.
    - idle_tail: from the host's stamp behind a group's calls, on an idle stream, to its end.
    - copy_alone: the same for a copy on an idle engine; copy_after_wait and copy_queued: start to end; copy_gap.
    - copies_at_once: of two streams' copies, how long an earlier one was still under way.
    - readback: from the dense part's end to the choice's arrival; synchronize: from there to the host's knowing.
    - host:*: the host's time for the calls of one entry; `first`: the first behind a wait.
    """
    values: dict[tuple[str, tuple[tuple[str, Any], ...]], list[list[int]]] = {}
    for run in runs:
        model = load_model(run.scenario.model.preset, **run.scenario.model.overrides())
        for times in run.repeats:
            here: dict[tuple[str, tuple[tuple[str, Any], ...]], list[int]] = {}
            for cost, key, value_ns in _Observer(run, model, times).observe():
                here.setdefault((cost, tuple(sorted(key.items()))), []).append(value_ns)
            for name, seen in here.items():
                values.setdefault(name, []).append(seen)
    return [_row(cost, dict(key), values[cost, key]) for cost, key in sorted(values, key=repr)]


def _row(cost: str, key: dict[str, Any], by_repeat: list[list[int]]) -> dict[str, Any]:
    values = np.array([value for seen in by_repeat for value in seen])
    low, middle, high = np.percentile(values, (25, 50, 75)).tolist()
    return {
        "cost": cost,
        "key": key,
        "n": len(values),
        "median_ns": middle,
        "mean_ns": _mean(values),
        "iqr_ns": high - low,
        "run_medians_ns": [float(np.median(seen)) for seen in by_repeat],
        "run_means_ns": [_mean(np.array(seen)) for seen in by_repeat],
    }


def _mean(values: Numbers) -> float:
    """Return the mean, the lowest and the highest 2 % held to what the others are."""
    least, most = np.percentile(values, (2, 98))
    return float(values.clip(least, most).mean())


class _Observer:
    """Goes through one repeat in the order in which the host asked for its spans."""

    def __init__(self, run: Measured, model: Model, times: Times) -> None:
        self._run, self._model, self._times = run, model, times
        self._dispatch = run.scenario.dispatch.mode
        settings = run.scenario
        # Where the queue of launches may be full, or the host looks after copies too, calls take longer.
        self._times_host = settings.dispatch.router_readback and settings.copy_.discipline != "priority"
        self._times_copies = settings.copy_.discipline == "fifo" and not settings.copy_.chunk_bytes
        copies = (run.spans["slot"] >= 0) & ~np.isin(run.spans["kind"], list(_KERNELS)) & (times.start_ns >= 0)
        self._copying = _Busy(times.start_ns[copies], times.end_ns[copies])
        by_start = np.argsort(times.start_ns[copies], kind="stable")
        before_ns = np.maximum.accumulate(times.end_ns[copies][by_start])[:-1]
        self._overlaps_ns = np.maximum(0, before_ns - times.start_ns[copies][by_start][1:]).tolist()
        self._copy_end: dict[int, int] = {}  # of copies that no kernel has used yet
        self._reader_end: dict[int, int] = {}  # by slot
        self._free = {"compute": 0, "copy": 0}

    def observe(self) -> Iterator[Observation]:
        """Yield what is to be seen, span by span."""
        spans, times = self._run.spans, self._times
        if self._run.scenario.copy_.discipline == "two_streams":
            for overlap_ns in self._overlaps_ns:
                yield "copies_at_once", {"bytes": self._model.expert_bytes[0]}, overlap_ns
        stamp_ns, first = 0, True
        columns = (spans[name].tolist() for name in ("kind", "visit", "tokens", "copy", "slot"))
        when = (column.tolist() for column in (times.start_ns, times.end_ns, times.issued_ns))
        for kind, visit, tokens, copy, slot, start_ns, end_ns, issued_ns in zip(*columns, *when, strict=True):
            if start_ns < 0:
                continue
            entry = self._entry_name(kind, copy, slot)
            if self._times_host:
                yield f"host:{entry}", {**self._host_key(kind), "first": first}, issued_ns - stamp_ns
            stamp_ns, first = issued_ns, kind == READBACK
            if kind in _KERNELS:
                yield from self._kernel(kind, visit, tokens, copy, start_ns, end_ns, issued_ns)
                if kind == EXPERT:
                    self._reader_end[slot] = end_ns
            elif kind == READBACK:
                stamp_ns = int(times.choice_known_ns[visit])
                yield from self._readback(visit, start_ns, end_ns, issued_ns)
            else:
                if self._times_copies:
                    yield from self._copy(slot, start_ns, end_ns, issued_ns)
                self._free["copy"] = max(self._free["copy"], end_ns)
                self._copy_end[copy] = end_ns
                self._reader_end.pop(slot, None)

    def _entry_name(self, kind: int, copy: int, slot: int) -> str:
        if kind == EXPERT:
            return "expert_first_use" if copy in self._copy_end else "expert_again"
        if kind in _KERNELS:
            return _KERNELS[kind]
        if kind == READBACK:
            return "readback"
        return "copy_reuse" if slot in self._reader_end else "copy_fresh"

    def _host_key(self, kind: int) -> dict[str, Any]:
        if kind not in _KERNELS:
            return {"dispatch": self._dispatch}
        kernels, products = self._size(kind)
        dtype = self._model.expert_dtype if kind == EXPERT else self._model.dense_dtype
        return {"dispatch": self._dispatch, "kernels": kernels, "products": products, "dtype": dtype}

    def _size(self, kind: int) -> tuple[int, int]:
        """Return how many kernels a group has, and how many of them are products."""
        model = self._model
        return {
            DENSE: (model.dense_kernels, DENSE_PRODUCTS),
            EXPERT: (model.expert_kernels, model.expert_matrices),
            HEAD: (1, 1),
        }[kind]

    def _kernel(
        self, kind: int, visit: int, tokens: int, copy: int, start_ns: int, end_ns: int, issued_ns: int
    ) -> Iterator[Observation]:
        free_ns, self._free["compute"] = self._free["compute"], end_ns
        waits = kind == EXPERT and copy in self._copy_end
        copied_ns = self._copy_end.pop(copy) if waits else -1
        group = self._group_key(kind, visit, tokens)
        beside_ns = self._copying.before(end_ns) - self._copying.before(start_ns)
        quiet, disturbed = not beside_ns, beside_ns >= _BESIDE * (end_ns - start_ns)
        if issued_ns <= start_ns and (quiet or disturbed):
            yield _KERNELS[kind], {**group, "beside_copy": disturbed}, end_ns - start_ns
        if issued_ns <= free_ns and copied_ns <= free_ns:
            beside_copy = self._copying.before(start_ns) > self._copying.before(free_ns)
            key = {"dispatch": self._dispatch, "beside_copy": beside_copy, "wait": waits}
            yield "kernel_gap", key, start_ns - free_ns
        elif issued_ns <= copied_ns:
            # The copy that it waited for has just ended; the next may have begun.
            beside_copy = self._copying.before(start_ns) > self._copying.before(copied_ns)
            yield "event_wait_gap", {"dispatch": self._dispatch, "beside_copy": beside_copy}, start_ns - copied_ns
        elif issued_ns > max(free_ns, copied_ns) and (quiet or disturbed):
            yield "idle_tail", {"what": _KERNELS[kind], **group, "beside_copy": disturbed}, end_ns - issued_ns

    def _group_key(self, kind: int, visit: int, tokens: int) -> dict[str, Any]:
        model = self._model
        key = {"hidden": model.hidden, "dispatch": self._dispatch, "kernels": self._size(kind)[0], "tokens": tokens}
        if kind == EXPERT:
            return {**key, "expert_ff": model.expert_ff, "dtype": model.expert_dtype}
        weights = model.head_bytes if kind == HEAD else model.dense_bytes[visit % model.layers]
        return {**key, "weight_bytes": weights, "dtype": model.dense_dtype}

    def _copy(self, slot: int, start_ns: int, end_ns: int, issued_ns: int) -> Iterator[Observation]:
        key = {"bytes": self._model.expert_bytes[0]}
        free_ns, read_ns = self._free["copy"], self._reader_end.get(slot, -1)
        if read_ns > max(issued_ns, free_ns):
            yield "copy_wait_gap", {}, start_ns - read_ns
            yield "copy_after_wait", key, end_ns - start_ns
        elif issued_ns <= free_ns:
            yield "copy_queued", key, end_ns - start_ns
            yield "copy_gap", {}, start_ns - free_ns
        elif issued_ns > free_ns + IDLE_NS:
            yield "copy_alone", key, end_ns - issued_ns

    def _readback(self, visit: int, start_ns: int, end_ns: int, issued_ns: int) -> Iterator[Observation]:
        beside_ns = self._copying.before(end_ns) - self._copying.before(start_ns)
        if 0 < beside_ns < _BESIDE * (end_ns - start_ns):
            return
        key = {"beside_copy": beside_ns > 0}
        if issued_ns <= start_ns:
            yield "readback", key, end_ns - start_ns
        else:
            yield "readback_late", key, end_ns - issued_ns
        if self._times.waits_from_ns[visit] <= end_ns and self._run.scenario.copy_.discipline != "priority":
            yield "synchronize", key, int(self._times.choice_known_ns[visit]) - end_ns


class _Busy:
    """How long any of some intervals had been running before an instant; they may overlap."""

    def __init__(self, start_ns: Numbers, end_ns: Numbers) -> None:
        # Where the number of running ones rises from 0 or falls to it.
        at_ns = np.concatenate([start_ns, end_ns])
        step = np.concatenate([np.ones(len(start_ns), np.int64), -np.ones(len(end_ns), np.int64)])
        order = np.lexsort((-step, at_ns))
        running = np.cumsum(step[order])
        rises = (step[order] == 1) & (running == 1)
        self._start_ns = at_ns[order][rises]
        self._end_ns = at_ns[order][running == 0]
        self._before_ns = np.concatenate([[0], np.cumsum(self._end_ns - self._start_ns)])

    def before(self, at_ns: int) -> int:
        """Return the busy ns before an instant."""
        begun = int(np.searchsorted(self._start_ns, at_ns, side="right"))
        if not begun:
            return 0
        return int(self._before_ns[begun - 1] + min(at_ns, int(self._end_ns[begun - 1])) - self._start_ns[begun - 1])
