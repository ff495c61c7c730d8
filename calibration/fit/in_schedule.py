"""What every call and kernel costs inside a schedule: medians over the spans and stamps of measured runs.

A tight loop and an idle GPU give other figures than a schedule does, so a profile is fitted on these where there are
any. Every sample is taken where one thing alone decided it: a kernel's duration where the host had launched all of it
before it started, a gap where the next kernel was queued already, a host cost where the host did not have to wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any, NamedTuple

import numpy as np

from ...engine.costs.surface_costs import DENSE_PRODUCTS
from ...engine.load import load_inputs
from ...engine.policies.copy_order import Fifo
from ...engine.scenario.scenario import Scenario
from ...resources.timeline import ACTIVATION, DENSE, EXPERT, HEAD, READBACK
from ...workloads.model import Model, load_model
from ..executor.entries import Passing
from ..executor.measured import LANE, Measured, Numbers, Times
from ..executor.plan import passings

#: A copy or a kernel that started so much later than its lane was free found it idle.
IDLE_NS = 20_000
#: From this share of its time beside copies a kernel counts as one beside a copy.
_BESIDE = 0.95

#: What was observed: the cost's name, what it depends on, and a value in ns.
Observation = tuple[str, dict[str, Any], int]

_KERNELS = {DENSE: "dense", EXPERT: "expert", HEAD: "head"}
#: How the names of costs begin that depend on where copies come from.
_OF_COPIES = ("copy", "event_wait_gap", "host:copy")


def samples(runs: Iterable[Measured]) -> list[dict[str, Any]]:
    """Returns one row for each cost and key: {cost, key, n, median_ns, mean_ns, iqr_ns, run_medians_ns, run_means_ns}.

    `mean_ns` holds the lowest and the highest 2 % to what the others are. `run_medians_ns` and `run_means_ns` have one
    for every repeat of every run in which the cost was seen. `beside_copy` in a key: whether a copy ran.

    - dense, expert, head: duration of a group that was launched whole before it started; quiet, or beside copies.
    - kernel_gap: from one group's end to the next's start, which was launched before (`wait`: behind a wait).
    - event_wait_gap, copy_wait_gap: from the end of a copy, or kernel, to the start of what waited for it.
    - idle_tail: from the host's stamp behind a group's calls, on an idle stream, to its end.
    - copy_alone: the same for a copy on an idle engine; copy_after_wait and copy_queued: start to end; copy_gap.
    - copy_beside_all_gpus: the same as copy_queued while all other GPUs copied too, where there are any.
    - copies_at_once: of two streams' copies, how long an earlier one was still under way.
    - readback: from the dense part's end to the choice's arrival; synchronize: from there to the host's knowing.
    - host:*: the host's time for the calls of one entry; `first`: the first behind a wait. Eager ones have the shape,
      for a call of a product may launch more than one kernel: `size` is an expert's width, or the weight bytes of the
      head or of a typical layer.

    Where experts lie in another GPU's memory, what copies take and what they do to kernels beside them has `peer:`
    before its name. Between the stages of a pipeline:

    - send: duration of a copy to the next GPU; send_wait_gap: from the kernel's end to its start.
    - arrival_gap: from its end to the start of the kernel that waited for it, on another clock: `to` which stage.
    - host:send; host:turn: the first entry on another GPU, as any dense part's, and what turning there adds.

    What dense parts take that attend to a context is left out: it is no cost of a dense part alone.

    Runs with lanes of other kinds, which work beside these, with grouped kernels, and of GPUs that share every layer's
    experts are left out: `fit_beside` looks at them.
    """
    values: dict[tuple[str, tuple[tuple[str, Any], ...]], list[list[int]]] = {}
    for run in runs:
        others = run.scenario.parallel.gpus > 1 or run.scenario.dispatch.expert_kernel == "grouped"
        if others or any(LANE in gpu.spans for gpu in run.gpus):
            continue
        stages = _stages(run)
        for repeat in range(len(run.gpus[0].repeats)):
            here: dict[tuple[str, tuple[tuple[str, Any], ...]], list[int]] = {}
            for cost, key, value_ns in _observe(run, stages, repeat):
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
    """Returns the mean, the lowest and the highest 2 % held to what the others are."""
    least, most = np.percentile(values, (2, 98))
    return float(values.clip(least, most).mean())


@dataclass(frozen=True)
class _Stage:
    """What one GPU ran: its model and, as a stage of several, what it received and sent at each step."""

    model: Model
    passing: Passing | None = None


def _stages(run: Measured) -> list[_Stage]:
    if len(run.gpus) == 1:
        return [_Stage(load_model(run.scenario.model.preset, **run.scenario.model.overrides()))]
    inputs = load_inputs(run.scenario)
    return [_Stage(part.model, passing) for part, passing in zip(inputs.stages, passings(inputs), strict=True)]


def _observe(run: Measured, stages: Sequence[_Stage], repeat: int) -> Iterator[Observation]:
    """Yields what is to be seen on each GPU, and between them."""
    from_peer = run.scenario.copy_.source == "peer"
    copying = [_Busy(*_copied(gpu.spans, gpu.repeats[repeat])) for gpu in run.gpus]
    for number, (gpu, stage) in enumerate(zip(run.gpus, stages, strict=True)):
        others = copying[:number] + copying[number + 1 :]
        observer = _Observer(run.scenario, gpu.spans, stage, gpu.repeats[repeat], copying[number], others)
        for cost, key, value_ns in observer.observe():
            of_copies = cost.startswith(_OF_COPIES) or key.get("beside_copy")
            yield f"peer:{cost}" if from_peer and of_copies else cost, key, value_ns
    if len(stages) > 1:
        yield from _between(run, stages, repeat, copying)


def _between(run: Measured, stages: Sequence[_Stage], repeat: int, copying: Sequence[_Busy]) -> Iterator[Observation]:
    """Yields how long a step's first kernel took to start behind what it waited for, and what turning to it took."""
    stamps_ns = np.sort(np.concatenate([gpu.repeats[repeat].issued_ns for gpu in run.gpus]))
    arrived: list[dict[int, int]] = []
    for gpu, stage in zip(run.gpus, stages, strict=True):
        sent = np.flatnonzero(gpu.spans["kind"] == ACTIVATION)
        steps, ends_ns = gpu.spans["visit"][sent] // stage.model.layers, gpu.repeats[repeat].end_ns[sent]
        arrived.append(dict(zip(steps.tolist(), ends_ns.tolist(), strict=True)))
    for number, (gpu, stage) in enumerate(zip(run.gpus, stages, strict=True)):
        times, kinds = gpu.repeats[repeat], gpu.spans["kind"]
        assert stage.passing is not None
        kernels = np.flatnonzero(np.isin(kinds, list(_KERNELS)))
        firsts = np.flatnonzero((kinds[kernels] == DENSE) & (gpu.spans["visit"][kernels] % stage.model.layers == 0))
        for step, first in enumerate(firsts.tolist()):
            at, before = kernels[first], kernels[first - 1] if first else -1
            issued_ns, free_ns = int(times.issued_ns[at]), int(times.end_ns[before]) if first else 0
            arrived_ns = arrived[number - 1].get(stage.passing.receives[step], -1)
            if run.threads == 1 and step:
                last_ns = int(stamps_ns[np.searchsorted(stamps_ns, issued_ns) - 1])
                key = _host_key(run.scenario, stage.model, DENSE)
                yield "host:turn", {**key, "receives": arrived_ns >= 0}, issued_ns - last_ns
            start_ns = int(times.start_ns[at])
            beside_copy = copying[number].beside(min(arrived_ns, start_ns), start_ns)
            if arrived_ns >= max(issued_ns, free_ns) and beside_copy is not None:
                yield "arrival_gap", {"to": number, "beside_copy": beside_copy}, start_ns - arrived_ns


class _Kernel(NamedTuple):
    """A kernel group as it ran: what it is, over how many tokens, behind which copy, and when."""

    kind: int
    visit: int
    tokens: int
    copy: int
    start_ns: int
    end_ns: int
    issued_ns: int


class _Observer:
    """Goes through one repeat on one GPU in the order in which the host asked for its spans."""

    def __init__(
        self,
        settings: Scenario,
        spans: Mapping[str, Numbers],
        stage: _Stage,
        times: Times,
        copying: _Busy,
        others: Sequence[_Busy],
    ) -> None:
        """Look at one GPU, which was `copying` from time to time, as were `others`."""
        self._copying, self._others = copying, others
        self._settings, self._spans, self._model, self._times = settings, spans, stage.model, times
        self._passing = stage.passing
        self._dispatch = settings.dispatch.mode
        #: What also attends to a context: its time is no cost of a dense part alone.
        self._attending = () if settings.workload.context is None else (DENSE,)
        # Where the queue of launches may be full, or the host looks after copies too, calls take longer.
        one_thread = stage.passing is None or settings.parallel.dispatch_threads == "one"
        self._times_host = one_thread and settings.dispatch.router_readback and not settings.copy_.by_rank
        self._times_copies = settings.copy_.order is Fifo and not settings.copy_.chunk_bytes
        starts_ns, ends_ns = _copied(spans, times)
        by_start = np.argsort(starts_ns, kind="stable")
        before_ns = np.maximum.accumulate(ends_ns[by_start])[:-1]
        self._overlaps_ns = np.maximum(0, before_ns - starts_ns[by_start][1:]).tolist()
        self._copy_end: dict[int, int] = {}  # of copies that no kernel has used yet
        self._reader_end: dict[int, int] = {}  # by slot
        self._free = {"compute": 0, "copy": 0}

    def observe(self) -> Iterator[Observation]:
        """Yields what is to be seen, span by span."""
        spans, times = self._spans, self._times
        if self._settings.copy_.order.prefetch_stream:
            for overlap_ns in self._overlaps_ns:
                yield "copies_at_once", {"bytes": self._model.expert_bytes[0]}, overlap_ns
        stamp_ns, first = 0, True
        columns = (spans[name].tolist() for name in ("kind", "visit", "tokens", "copy", "slot"))
        when = (column.tolist() for column in (times.start_ns, times.end_ns, times.issued_ns))
        for kind, visit, tokens, copy, slot, start_ns, end_ns, issued_ns in zip(*columns, *when, strict=True):
            if start_ns < 0:
                continue
            entry = self._entry_name(kind, copy, slot)
            turned = self._passing is not None and kind == DENSE and visit % self._model.layers == 0
            if self._times_host and not turned and kind not in self._attending:
                key = _host_key(self._settings, self._model, kind)
                yield f"host:{entry}", {**key, "first": first}, issued_ns - stamp_ns
            stamp_ns, first = issued_ns, kind == READBACK
            if kind in _KERNELS:
                yield from self._kernel(_Kernel(kind, visit, tokens, copy, start_ns, end_ns, issued_ns))
                if kind == EXPERT:
                    self._reader_end[slot] = end_ns
            elif kind == READBACK:
                stamp_ns = int(times.choice_known_ns[visit])
                yield from self._readback(visit, start_ns, end_ns, issued_ns)
            elif kind == ACTIVATION:
                yield from self._send(visit, start_ns, end_ns, issued_ns)
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
        if kind in (READBACK, ACTIVATION):
            return "readback" if kind == READBACK else "send"
        return "copy_reuse" if slot in self._reader_end else "copy_fresh"

    def _kernel(self, kernel: _Kernel) -> Iterator[Observation]:
        kind, visit, tokens, copy, start_ns, end_ns, issued_ns = kernel
        free_ns, self._free["compute"] = self._free["compute"], end_ns
        waits = kind == EXPERT and copy in self._copy_end
        copied_ns = self._copy_end.pop(copy) if waits else -1
        group = self._group_key(kind, visit, tokens)
        beside_ns = self._copying.before(end_ns) - self._copying.before(start_ns)
        quiet, disturbed = not beside_ns, beside_ns >= _BESIDE * (end_ns - start_ns)
        clear = (quiet or disturbed) and kind not in self._attending
        if issued_ns <= start_ns and clear:
            yield _KERNELS[kind], {**group, "beside_copy": disturbed}, end_ns - start_ns
        if self._receives(kind, visit):
            return
        if issued_ns <= free_ns and copied_ns <= free_ns:
            beside_copy = self._copying.before(start_ns) > self._copying.before(free_ns)
            key = {"dispatch": self._dispatch, "beside_copy": beside_copy, "wait": waits}
            yield "kernel_gap", key, start_ns - free_ns
        elif issued_ns <= copied_ns:
            # The copy that it waited for has just ended; the next may have begun.
            beside_copy = self._copying.before(start_ns) > self._copying.before(copied_ns)
            yield "event_wait_gap", {"dispatch": self._dispatch, "beside_copy": beside_copy}, start_ns - copied_ns
        elif issued_ns > max(free_ns, copied_ns) and clear:
            yield "idle_tail", {"what": _KERNELS[kind], **group, "beside_copy": disturbed}, end_ns - issued_ns

    def _receives(self, kind: int, visit: int) -> bool:
        """Whether a kernel waits for what another GPU sends."""
        step, layer = divmod(visit, self._model.layers)
        return self._passing is not None and kind == DENSE and not layer and self._passing.receives[step] >= 0

    def _group_key(self, kind: int, visit: int, tokens: int) -> dict[str, Any]:
        model = self._model
        key = {
            "hidden": model.hidden,
            "dispatch": self._dispatch,
            "kernels": _size(self._model, kind)[0],
            "tokens": tokens,
        }
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
            beside = {busy.beside(start_ns, end_ns) for busy in self._others}
            if beside <= {False}:
                yield "copy_queued", key, end_ns - start_ns
            elif beside == {True}:
                yield "copy_beside_all_gpus", key, end_ns - start_ns
            yield "copy_gap", {}, start_ns - free_ns
        elif issued_ns > free_ns + IDLE_NS:
            yield "copy_alone", key, end_ns - issued_ns

    def _send(self, visit: int, start_ns: int, end_ns: int, issued_ns: int) -> Iterator[Observation]:
        assert self._passing is not None
        key = {"bytes": self._passing.sends_bytes[visit // self._model.layers]}
        kernel_ns = self._free["compute"]
        beside_copy = self._copying.beside(min(start_ns, kernel_ns), end_ns)
        if issued_ns <= kernel_ns and beside_copy is not None:
            yield "send", {**key, "beside_copy": beside_copy}, end_ns - start_ns
            yield "send_wait_gap", {"beside_copy": beside_copy}, start_ns - kernel_ns

    def _readback(self, visit: int, start_ns: int, end_ns: int, issued_ns: int) -> Iterator[Observation]:
        beside_ns = self._copying.before(end_ns) - self._copying.before(start_ns)
        if 0 < beside_ns < _BESIDE * (end_ns - start_ns):
            return
        key = {"beside_copy": beside_ns > 0}
        if issued_ns <= start_ns:
            yield "readback", key, end_ns - start_ns
        else:
            yield "readback_late", key, end_ns - issued_ns
        if self._times.waits_from_ns[visit] <= end_ns and not self._settings.copy_.by_rank:
            yield "synchronize", key, int(self._times.choice_known_ns[visit]) - end_ns


def _host_key(settings: Scenario, model: Model, kind: int) -> dict[str, Any]:
    """Returns what the host's time for an entry depends on."""
    if kind not in _KERNELS:
        return {"dispatch": settings.dispatch.mode}
    kernels, products = _size(model, kind)
    dtype = model.expert_dtype if kind == EXPERT else model.dense_dtype
    key = {"dispatch": settings.dispatch.mode, "kernels": kernels, "products": products, "dtype": dtype}
    if settings.dispatch.mode != "eager":
        return key
    size = {DENSE: median_low(model.dense_bytes), EXPERT: model.expert_ff, HEAD: model.head_bytes}[kind]
    return {**key, "hidden": model.hidden, "size": size}


def _size(model: Model, kind: int) -> tuple[int, int]:
    """Returns how many kernels a group has, and how many of them are products."""
    return {
        DENSE: (model.dense_kernels, DENSE_PRODUCTS),
        EXPERT: (model.expert_kernels, model.expert_matrices),
        HEAD: (1, 1),
    }[kind]


def _copied(spans: Mapping[str, Numbers], times: Times) -> tuple[Numbers, Numbers]:
    """Returns when the copies of experts that were made started and ended (copies,)."""
    copies = (spans["slot"] >= 0) & ~np.isin(spans["kind"], list(_KERNELS)) & (times.start_ns >= 0)
    return times.start_ns[copies], times.end_ns[copies]


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
        """Returns the busy ns before an instant."""
        begun = int(np.searchsorted(self._start_ns, at_ns, side="right"))
        if not begun:
            return 0
        return int(self._before_ns[begun - 1] + min(at_ns, int(self._end_ns[begun - 1])) - self._start_ns[begun - 1])

    def beside(self, start_ns: int, end_ns: int) -> bool | None:
        """Whether one was running (almost) all the time between two instants, or none; None if it was neither."""
        share = (self.before(end_ns) - self.before(start_ns)) / max(1, end_ns - start_ns)
        return None if 1 - _BESIDE < share < _BESIDE else share >= _BESIDE
