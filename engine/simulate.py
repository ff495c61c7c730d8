"""From a scenario to a result: load what it names, check that it fits together, run it, measure it.

`simulate` runs the scenario and, for comparison, baselines of it: everything resident, no prefetch with every expert
dropped after its visit, and, when asked, the same cache without prefetch.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..resources.spool import Spool
from ..resources.timeline import Timeline
from ..workloads.batches import continued_steps, warmup_steps
from ..workloads.requests.log import RequestLog, joined
from .baselines import compared, run_baseline
from .costs.costs import Costs, part_costs
from .costs.uncertainty import linked, replicate_costs, summary, without_uncertainty
from .decide.memory_manager import MemoryManager
from .load import load_inputs
from .loading.capacity import described
from .loading.deciders import dispatched, dispatched_together, make_manager, source_of
from .loading.offloading import low_precision
from .measure.accesses import miss_keys
from .measure.merge import link_usage, merged_timeline, run_metrics, step_metrics
from .measure.merge import makespan_ns as run_ns
from .measure.metrics import saved_bytes
from .measure.misses import offloading_metrics, routing_metrics
from .measure.recording import Recording
from .measure.request_costs import request_costs
from .measure.request_metrics import replica_loads, run_requests
from .measure.result import RunResult
from .measure.speed import Serving
from .measure.traffic import carried_between, sharing_metrics
from .policies.prefetch import NoPrefetch
from .prediction import Range, ranges, unsure
from .run import Chosen, Prepared, Progress, engine_for, prepared, run_all, watched
from .scenario.inputs import Inputs
from .scenario.scenario import Scenario
from .scenario.warnings import warnings_of

#: Enough for percentiles of any kind.
MOST_REPLICATES = 10_000

#: How many rows of a trace are divided among GPUs at once.
_ROWS_AT_ONCE = 1 << 10


@dataclass(frozen=True)
class Result:
    """A finished run: what it says, and all that each GPU recorded; `serving` is what its speed was measured by."""

    said: RunResult
    recordings: list[Recording]
    wall_s: float
    serving: Serving = field(default_factory=Serving)
    #: Which engine ran, and why. It is not in `data`, which is the same by either.
    engine: Chosen = field(default_factory=lambda: Chosen("compiled"))
    #: What ran.
    inputs: Inputs | None = field(default=None, repr=False)

    @cached_property
    def data(self) -> dict[str, Any]:
        """What the run says as plain data for JSON, without `wall_s`."""
        return self.said.plain()

    @cached_property
    def unsure(self) -> list[str]:
        """The costs of the run that nobody measured, in words; none where all were."""
        return [] if self.inputs is None else unsure(self.inputs, self.said.estimates)

    @cached_property
    def range(self) -> dict[str, Range] | None:
        """What the run's figures may be, by name, drawn when it is asked for; None where all costs were measured.

        None of requests under load, too: with other costs other steps are made, and nothing short stands for them.
        """
        return self._drawn_range(None)

    def draw_range(self, progress: Progress | None) -> None:
        """Draw `range` now, as it takes a while, and tell `progress` how far it is."""
        if "range" not in vars(self):
            vars(self)["range"] = self._drawn_range(progress)

    def _drawn_range(self, progress: Progress | None) -> dict[str, Range] | None:
        if self.inputs is None or not self.unsure or self.inputs.pulls is not None:
            return None
        return ranges(self.inputs, self.serving, self.data, progress=progress)

    @property
    def recording(self) -> Recording:
        """The recording of a run on one GPU; ValueError if there are several."""
        (only,) = self.recordings
        return only

    @cached_property
    def timeline(self) -> Timeline:
        """The timeline of the run, all GPUs on it."""
        return merged_timeline(self.recordings)

    def with_range(self) -> dict[str, Any]:
        """Returns `data` with what figures may be where not all costs were measured: `range`, drawn now; `unsure`."""
        drawn = None if self.range is None else {name: band._asdict() for name, band in self.range.items()}
        return {**self.data, "range": drawn, "unsure": self.unsure}

    def json_data(self) -> dict[str, Any]:
        """Returns `with_range` with what may differ between runs of one scenario: the engine, why it, and `wall_s`."""
        why = {"engine": self.engine.engine, "engine_why": self.engine.why, "wall_s": self.wall_s}
        return {**self.with_range(), **why}


def simulate(
    scenario: Scenario,
    *,
    baselines: bool | Mapping[str, float] = True,
    check_prefetch: bool = False,
    replicates: int = 0,
    progress: Progress | None = None,
    stream: Path | None = None,
    engine: str | None = None,
) -> Result:
    """Run a scenario; `baselines=False` leaves out the two runs that speedup and resident_ms need.

    `baselines` may also be makespans in ms that are known, by their names in `baselines.BASELINES`. `check_prefetch`
    also runs the same cache without prefetch. `replicates` more runs, with costs drawn from their uncertainty, give
    percentiles of makespan and tokens/s. `progress` is called with (what, done, total) layer visits. With a folder to
    `stream` to, the timeline and all else that grows with the run is kept in files there, a folder for each GPU, and
    not in memory. `engine` is one of `run.ENGINES`, or as `run.engine_for` says; the numbers are the same. Raises
    InputError if the scenario cannot run, or not by that engine.
    """
    return simulate_inputs(
        load_inputs(scenario),
        baselines=baselines,
        check_prefetch=check_prefetch,
        replicates=replicates,
        progress=progress,
        stream=stream,
        engine=engine,
    )


def simulate_inputs(
    inputs: Inputs,
    *,
    baselines: bool | Mapping[str, float] = True,
    check_prefetch: bool = False,
    replicates: int = 0,
    progress: Progress | None = None,
    stream: Path | None = None,
    engine: str | None = None,
) -> Result:
    """Run what `load_inputs` loaded, as `simulate` does."""
    if not 0 <= replicates <= MOST_REPLICATES:
        raise InputError(f"replicates = {replicates:,}: must be 0 to {MOST_REPLICATES:,}")
    chosen = engine_for(inputs, engine)
    costs = part_costs(inputs)
    began = time.perf_counter()
    ready = prepared(inputs, costs, stream)
    recordings = run_all(inputs, ready, watched(progress, "simulate", inputs.layer_visits), chosen.engine)
    wall_s = time.perf_counter() - began
    unbegun, inputs = inputs, _ran(inputs, ready)
    serving = serving_of(inputs)
    figures = run_metrics(recordings, _shadow_misses(inputs, ready, stream, chosen.engine), serving)
    known = dict(baselines) if isinstance(baselines, Mapping) else {}
    wanted = ["resident", "baseline"] if baselines is True else []
    if check_prefetch:
        wanted.append("no_prefetch")
        if not any(gpu.prefetch.horizons for gpu in ready):
            known["no_prefetch"] = figures["makespan_ms"]
    known.update((name, run_baseline(name, unbegun, costs, progress, stream)) for name in wanted if name not in known)
    said = RunResult(
        figures=figures,
        deduplication=_deduplication(inputs, recordings),
        links=_links(inputs, recordings),
        sharing=None if inputs.expert_parallel is None else sharing_metrics(recordings),
        baselines=compared(known, figures),
        replicates=summary(_replicates(unbegun, replicates, progress)) if replicates else None,
        offloading=_offloading(inputs, recordings, [gpu.costs for gpu in ready]),
        estimates=_estimates(inputs, costs),
        predictor=inputs.predictor,
        capacity=described(inputs),
        predictions_sha256=_digest(inputs),
        model=inputs.model,
        # Of replicas, what each of them has.
        budget_bytes=(sum(gpu["budget_bytes"] for gpu in figures["gpus"]) + _low_bytes(inputs))
        // max(1, len(inputs.replicas)),
        scenario=inputs.scenario,
        versions=versions(),
        requests=_requests(inputs, serving, figures),
    )
    return Result(replace(said, warnings=_warnings(inputs, said)), recordings, wall_s, serving, chosen, inputs)


def _requests(inputs: Inputs, serving: Serving, figures: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns what requests under load came to; None where a fixed batch runs."""
    section, pulls = inputs.scenario.requests, inputs.pulls
    if section is None or pulls is None or serving.log is None:
        return None
    found = run_requests(serving.log, section, pulls.failed)
    if section.cost is not None:
        machines = section.replicas  # whose times are means
        busy_ms = machines * (figures["time"]["compute_ms"] + figures["time"]["predictor_ms"])
        found["cost"] = request_costs(section.cost, serving.log, machines * figures["makespan_ms"], busy_ms)
    if inputs.replicas:
        found["replicas"] = replica_loads(_logs(inputs))
    return found


def _logs(inputs: Inputs) -> list[RequestLog]:
    """Returns what was recorded of requests on each machine of a run that has ended."""
    found = [getattr(part.pulled.source, "log", None) for part in inputs.parts if part.pulled is not None]
    return [log for log in found if log is not None]


def _ran(inputs: Inputs, ready: Sequence[Prepared]) -> Inputs:
    """Returns the inputs of a run that has ended, with the steps that were pulled."""
    if inputs.pulls is None:
        return inputs
    parts = tuple(gpu.inputs for gpu in ready)
    if len(parts) == 1:
        return parts[0]
    return replace(inputs, replicas=parts, steps=[step for part in parts for step in part.steps])


def _offloading(inputs: Inputs, recordings: Sequence[Recording], costs: Sequence[Costs]) -> dict[str, Any]:
    """Returns what a run says of misses that are not fetched, and of experts in fewer bytes."""
    said = offloading_metrics(recordings, costs, inputs.scenario, _low_bytes(inputs))
    return said if inputs.rerouted is None else {**said, "routing": routing_metrics(inputs)}


def _low_bytes(inputs: Inputs) -> int:
    """Returns what low-precision copies take in the memories of all GPUs."""
    return sum(low_precision(part)[1] for part in inputs.parts)


def _estimates(inputs: Inputs, costs: Sequence[Costs]) -> dict[str, str]:
    """Returns the rules of the costs that were estimated, those of all GPUs and of the links between them."""
    estimates = [own.estimates for own in costs] + ([inputs.links.estimates] if inputs.links is not None else [])
    return dict(sorted((what, rule) for known in estimates for what, rule in known.items()))


def _warnings(inputs: Inputs, said: RunResult) -> list[str]:
    """Returns the warnings of a run, that of percentiles too narrow last."""
    found = warnings_of(inputs, said.plain())
    if said.replicates is not None and (missing := without_uncertainty(inputs.profile)):
        found.append(
            f"the percentiles are too narrow: profile {inputs.profile.name} does not say how far {', '.join(missing)} "
            f"can be off; calibrate this machine"
        )
    return found


#: Packages do not change while they are in use.
_version = cache(version)


def versions() -> dict[str, str]:
    """Returns the versions of what makes a result."""
    return {
        "prestage": _version("prestage"),
        "python": platform.python_version(),
        "simpy": _version("simpy"),
        "numpy": _version("numpy"),
    }


def serving_of(inputs: Inputs) -> Serving:
    """Returns what the speed of a run is measured by; of a pipeline, with the step that each step goes on from."""
    if inputs.pulls is not None:
        logs = _logs(inputs)
        if not inputs.replicas:
            return Serving(log=logs[0] if logs else None)
        log, order = joined(logs)
        return Serving(log=log, order=order)
    previous = None
    if inputs.stages:
        previous = [max(before, default=-1) for before in continued_steps(inputs.steps, inputs.trace.sequence)]
    return Serving(warmup_steps(inputs.steps, inputs.scenario.workload.warmup), previous)


def _replicates(inputs: Inputs, count: int, progress: Progress | None) -> list[dict[str, Any]]:
    """Returns makespan and tokens/s of each replicate."""
    results = []
    # The same seed for all GPUs: what is drawn is how far the profile is off, and they share it.
    drawn = zip(*(replicate_costs(part, count) for part in inputs.parts), strict=True)
    for number, costs in enumerate(drawn, 1):
        replicate = linked(inputs, costs, timed=False)
        ready = prepared(replicate, costs)
        recordings = run_all(replicate, ready)
        serving = serving_of(_ran(inputs, ready))
        speed = step_metrics(recordings, serving)
        results.append({"makespan_ms": run_ns(recordings) / 1e6, "tokens_per_second": speed["tokens_per_second"]})
        if progress is not None:
            progress("replicates", number, count)
    return results


def _shadow_misses(
    inputs: Inputs, ready: Sequence[Prepared], stream: Path | None, engine: str
) -> list[npt.NDArray[np.int64] | None]:
    """Returns what the same caches without prefetch miss, as `accesses.miss_keys`; None if nothing is prefetched."""
    if not any(gpu.prefetch.horizons for gpu in ready):
        return [None] * len(ready)
    managers = [make_manager(part, Spool(stream, keep=False)) for part in inputs.parts]
    if inputs.expert_parallel is not None:
        missed = _misses_apart(inputs, managers) if engine == "compiled" else None
        missed = _misses_together(inputs, managers) if missed is None else missed
    else:
        missed = [_misses_alone(part, own, engine) for part, own in zip(inputs.parts, managers, strict=True)]
    for manager in managers:  # what is mapped stays readable
        manager.spool.remove()
    return list(missed)


def _misses_together(inputs: Inputs, managers: Sequence[MemoryManager]) -> list[npt.NDArray[np.int64]]:
    """Returns what each GPU's cache (`managers`, fresh ones) misses without prefetch, as `metrics.miss_keys`."""
    missed = [manager.spool.column("missed", np.int64) for manager in managers]
    for visit in dispatched_together(inputs, managers, [NoPrefetch() for _ in managers]):
        for manager, keys, own in zip(managers, missed, visit.visits, strict=True):
            keys.buffer.extend(miss_keys([own], inputs.model.total_experts).tobytes())
            if not visit.layer:
                manager.spool.flush()
    return [keys.array() for keys in missed]


def _misses_apart(inputs: Inputs, managers: Sequence[MemoryManager]) -> list[npt.NDArray[np.int64]] | None:
    """Returns what `_misses_together` does, by compiled code, where each GPU serves what it owns alone; else None."""
    from .decide.sources import shared_in_python

    layout, trace = inputs.expert_parallel, inputs.trace
    assert layout is not None
    sources = [source_of(part, own, NoPrefetch()) for part, own in zip(inputs.parts, managers, strict=True)]
    in_python = shared_in_python(sources, layout.remote, spares=layout.spare_experts > 0) is not None
    if in_python or layout.remote != "tokens" or layout.replicated:
        return None
    from .decide.compiled_lru import is_lru_alone, missed_by_lru  # which compile at their first import
    from .decide.compiled_misses import missed

    if all(map(is_lru_alone, sources)):
        return missed_by_lru(sources, layout.first_owners)
    owners = layout.first_owners.astype(np.min_scalar_type(layout.gpus)).reshape(trace.layers, -1)
    owner = owners[np.arange(trace.layers)[:, None], trace.experts]
    return [
        missed(
            replace(source, trace=replace(trace, experts=_own_choices(trace.experts, owner, gpu))),
            inputs.model.total_experts,
        )
        for gpu, source in enumerate(sources)
    ]


def _own_choices(experts: npt.NDArray[Any], owner: npt.NDArray[Any], gpu: int) -> npt.NDArray[Any]:
    """Returns the choices (tokens, layers, k) of those experts that a GPU owns, in their order, then -1s, by token.

    `owner` (tokens, layers, k) owns what was chosen.
    """
    chosen = np.full(experts.shape, -1, dtype=np.int16 if experts.dtype.itemsize < 2 else np.int32)
    for first in range(0, len(experts), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        own = owner[part] == gpu
        place = np.cumsum(own, axis=2, dtype=np.int8 if own.shape[2] < 1 << 7 else np.int64)[own] - 1
        begin = np.flatnonzero(own) // own.shape[2] * own.shape[2]
        chosen[part].reshape(-1)[begin + place] = experts[part][own]
    return chosen


def _misses_alone(inputs: Inputs, manager: MemoryManager, engine: str) -> npt.NDArray[np.int64]:
    """Returns what a GPU's memory misses without prefetch, decided by compiled code where that runs it too."""
    prefetch, total_experts = NoPrefetch(), inputs.model.total_experts
    if engine == "compiled":
        from .decide.sources import decided_in_python

        source = source_of(inputs, manager, prefetch)
        if decided_in_python(source) is None:
            from .decide.compiled_lru import is_lru_alone, missed_by_lru  # which compile at their first import
            from .decide.compiled_misses import missed

            if is_lru_alone(source):
                return missed_by_lru([source], np.zeros(total_experts, dtype=np.int64))[0]
            return missed(source, total_experts)
    return miss_keys(dispatched(inputs, manager, prefetch), total_experts)


def _links(inputs: Inputs, recordings: Sequence[Recording]) -> list[dict[str, Any]] | None:
    """Returns what each link between GPUs carried; None where there are none."""
    links = inputs.links
    return None if links is None else link_usage(recordings, links, carried_between(inputs, recordings, links))


def _digest(inputs: Inputs) -> str | None:
    """Returns what identifies the guesses of a run, those of all GPUs together; None if there are none."""
    digests = [part.guesses.digest for part in inputs.guessers if part.guesses is not None]
    if len(digests) < 2:
        return digests[0] if digests else None
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _deduplication(inputs: Inputs, recordings: Sequence[Recording]) -> dict[str, int] | None:
    """Returns how many guesses prefetching went by, how many were left once merged, and the bytes that this saved.

    Those are of the experts that were prefetched: a copy for every guess of a visit but the first that named one. None
    where nobody guesses.
    """
    if all(part.guesses is None for part in inputs.guessers):
        return None
    managers = [recording.manager for recording in recordings]
    return {
        "guessed": sum(manager.guessed for manager in managers),
        "unique": sum(manager.unique_guesses for manager in managers),
        "saved_copies": sum(manager.saved_copies.total() for manager in managers),
        "saved_bytes": sum(map(saved_bytes, recordings)),
    }
