"""From a scenario to a result: load what it names, check that it fits together, run it, measure it.

`simulate` runs the scenario and, for comparison, baselines of it: everything resident, no prefetch with every expert
dropped after its visit, and, when asked, the same cache without prefetch.
"""

from __future__ import annotations

import hashlib
import itertools
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..resources.network import Carried
from ..resources.spool import Spool
from ..resources.timeline import Timeline
from ..workloads.batches import continued_steps, warmup_steps
from .costs.costs import Costs
from .costs.uncertainty import replicate_costs, summary, without_uncertainty
from .decide.dispatch import Visit
from .decide.memory_manager import BudgetError, MemoryManager
from .decide.partition import divider
from .expert_parallel import held, sent_tokens_and_experts, shadow_misses, sharing_metrics
from .links import Links
from .loading.capacity import described
from .loading.loading import load_inputs
from .loading.offloading import low_precision, plain
from .measure import metrics as measure
from .measure.merge import link_usage, merged_timeline, run_metrics, step_metrics
from .measure.merge import makespan_ns as run_ns
from .measure.misses import offloading_metrics
from .measure.speed import Serving
from .pipeline import flow_of, sent
from .policies.eviction import EVICTION
from .policies.prefetch import NoPrefetch
from .run import Prepared, Progress, Watch, dispatched, engine_for, make_manager, part_costs, prepared, run_all
from .scenario.inputs import Inputs
from .scenario.scenario import MemorySection, PredictorSection, PrefetchSection, Scenario, TiersSection, WorkloadSection
from .scenario.warnings import warnings_of

#: Enough for percentiles of any kind.
MOST_REPLICATES = 10_000
#: What a run is compared with, and what progress calls it.
BASELINES = {
    "resident": "all resident",
    "baseline": "no prefetch, no cache",
    "no_prefetch": "same cache, no prefetch",
}


@dataclass(frozen=True)
class Result:
    """A finished run: `data` is plain data for JSON (without `wall_s`), `recordings` all that each GPU recorded.

    `serving` is what its speed was measured by.
    """

    data: dict[str, Any]
    recordings: list[measure.Recording]
    wall_s: float
    serving: Serving = field(default_factory=Serving)

    @property
    def recording(self) -> measure.Recording:
        """The recording of a run on one GPU; ValueError if there are several."""
        (only,) = self.recordings
        return only

    @cached_property
    def timeline(self) -> Timeline:
        """The timeline of the run, all GPUs on it."""
        return merged_timeline(self.recordings)

    def json_data(self) -> dict[str, Any]:
        """Return `data` with `wall_s`, the one number that differs between runs of one scenario."""
        return {**self.data, "wall_s": self.wall_s}


def simulate(
    scenario: Scenario,
    *,
    baselines: bool | Mapping[str, float] = True,
    check_prefetch: bool = False,
    replicates: int = 0,
    progress: Progress | None = None,
    stream: Path | None = None,
    engine: str = "lanes",
) -> Result:
    """Run a scenario; `baselines=False` leaves out the two runs that speedup and resident_ms need.

    `baselines` may also be makespans in ms that are known, by their names in BASELINES. `check_prefetch` also runs the
    same cache without prefetch. `replicates` more runs, with costs drawn from their uncertainty, give percentiles of
    makespan and tokens/s. `progress` is called with (what, done, total) layer visits. With a folder to
    `stream` to, the timeline and all else that grows with the run is kept in files there, a folder for each GPU, and
    not in memory. `engine` is one of `run.ENGINES`; baselines always go by lanes. Raises InputError if the scenario
    cannot run, or not by that engine.
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
    engine: str = "lanes",
) -> Result:
    """Run what `load_inputs` loaded, as `simulate` does, by one of `run.ENGINES`; baselines go by lanes."""
    if not 0 <= replicates <= MOST_REPLICATES:
        raise InputError(f"replicates = {replicates:,}: must be 0 to {MOST_REPLICATES:,}")
    engine = engine_for(inputs, engine)
    scenario, model = inputs.scenario, inputs.model
    costs = part_costs(inputs)
    began = time.perf_counter()
    ready = prepared(inputs, costs, stream)
    recordings = run_all(inputs, ready, _watched(progress, "simulate", inputs.layer_visits), engine)
    wall_s = time.perf_counter() - began
    serving = serving_of(inputs)
    data = run_metrics(recordings, _shadow_misses(inputs, ready, stream), serving)
    data["deduplication"] = _deduplication(inputs, recordings)
    if inputs.links is not None:
        data["links"] = link_usage(recordings, inputs.links, _sent(inputs, recordings, inputs.links))
    if inputs.placed is not None:
        data["sharing"] = sharing_metrics(recordings)
    known = dict(baselines) if isinstance(baselines, Mapping) else {}
    wanted = ["resident", "baseline"] if baselines is True else []
    if check_prefetch:
        wanted.append("no_prefetch")
        if not any(gpu.prefetch.horizons for gpu in ready):
            known["no_prefetch"] = data["makespan_ms"]
    known.update((name, run_baseline(name, inputs, costs, progress, stream)) for name in wanted if name not in known)
    data.update(_compared(known, data))
    if replicates:
        data["replicates"] = summary(_replicates(inputs, replicates, progress))
    low_bytes = low_precision(inputs)[1]
    if not inputs.stages:
        data.update(offloading_metrics(recordings[0], costs[0], scenario, low_bytes))
    estimates = [own.estimates for own in costs] + ([inputs.links.estimates] if inputs.links is not None else [])
    data["estimates"] = dict(sorted((what, rule) for known in estimates for what, rule in known.items()))
    data["engine"] = engine
    data["seed"] = scenario.seed
    data["predictor"] = asdict(inputs.predictor)
    data["capacity"] = described(inputs)
    data["warnings"] = warnings_of(inputs, data)
    if replicates and (missing := without_uncertainty(inputs.profile)):
        data["warnings"].append(
            f"the percentiles are too narrow: profile {inputs.profile.name} does not say how far {', '.join(missing)} "
            f"can be off; calibrate this machine"
        )
    data["predictions_sha256"] = _digest(inputs)
    data["model"] = {"name": model.name, "layers": model.layers, "experts": model.experts, "top_k": model.top_k}
    data["budget_bytes"] = sum(gpu["budget_bytes"] for gpu in data["gpus"]) + low_bytes
    data["expert_bytes_total"] = model.total_expert_bytes
    data["scenario"] = scenario.plain()
    data["versions"] = versions()
    return Result(data, recordings, wall_s, serving)


#: Packages do not change while they are in use.
_version = cache(version)


def versions() -> dict[str, str]:
    """Return the versions of what makes a result."""
    return {
        "prestage": _version("prestage"),
        "python": platform.python_version(),
        "simpy": _version("simpy"),
        "numpy": _version("numpy"),
    }


def serving_of(inputs: Inputs) -> Serving:
    """Return what the speed of a run is measured by; of a pipeline, with the step that each step goes on from."""
    previous = None
    if inputs.stages:
        previous = [max(before, default=-1) for before in continued_steps(inputs.steps, inputs.trace.sequence)]
    return Serving(warmup_steps(inputs.steps, inputs.scenario.workload.warmup), previous)


def _watched(progress: Progress | None, what: str, total: int) -> Watch:
    """Return what tells `progress` of every hundredth part of the visits."""
    if progress is None:
        return iter
    every = max(1, total // 100)
    counter = itertools.count(1)  # over all GPUs

    def watch(visits: Iterator[Visit]) -> Iterator[Visit]:
        for visit in visits:
            done = next(counter)
            if done % every == 0 or done == total:
                progress(what, done, total)
            yield visit

    return watch


def run_baseline(
    name: str, inputs: Inputs, costs: Sequence[Costs], progress: Progress | None = None, stream: Path | None = None
) -> float:
    """Return the makespan in ms of one of BASELINES, given the costs of each GPU; `stream` as `simulate` takes it."""
    if name != "no_prefetch" and not inputs.scenario.only_fetches:
        inputs = replace(inputs, scenario=plain(inputs.scenario))
        costs = part_costs(inputs)
    if name == "resident":
        inputs = replace(inputs, budgets=None, stages=tuple(replace(stage, budgets=None) for stage in inputs.stages))
    if name != "no_prefetch" and inputs.placed is not None:
        inputs = replace(inputs, placed=replace(inputs.placed, spare_experts=0))
    ready = [
        Prepared(part, own, _baseline_manager(name, part, Spool(stream, keep=False)), NoPrefetch())
        for part, own in zip(inputs.parts, costs, strict=True)
    ]
    makespan_ns = run_ns(run_all(inputs, ready, _watched(progress, BASELINES[name], inputs.layer_visits)))
    for gpu in ready:
        gpu.manager.spool.remove()
    return makespan_ns / 1e6


def _baseline_manager(name: str, inputs: Inputs, spool: Spool) -> MemoryManager:
    """Return the memory manager of one of BASELINES on one GPU."""
    if name == "no_prefetch":
        return make_manager(inputs, spool)
    model, scope = inputs.model, inputs.scenario.memory.scope
    sizes, lru = model.expert_bytes, EVICTION["lru"]
    if name == "resident":
        manager = MemoryManager(sizes, model.experts, model.total_expert_bytes, lru, spool=spool)
        manager.preload(range(model.total_experts) if inputs.placed is None else held(inputs.placed, inputs.device))
        return manager
    divide = _with_room_for_one(divider(scope, sizes, inputs.trace), sizes)
    return MemoryManager(
        sizes, model.experts, inputs.budget_bytes, lru, scope=scope, divide=divide, drop_after_visit=True, spool=spool
    )


def _with_room_for_one(divide: Callable[[int], list[int]], sizes: Sequence[int]) -> Callable[[int], list[int]]:
    """Return `divide` for experts that are not compressed any more: where a pool cannot hold one, all can."""

    def divided(budget_bytes: int) -> list[int]:
        try:
            return divide(budget_bytes)
        except BudgetError:
            return divide(len(sizes) * max(sizes))

    return divided


def baseline_scenario(name: str, scenario: Scenario) -> Scenario:
    """Return the scenario with all that one of BASELINES does not depend on at its default: equal ones share it."""
    changes: dict[str, Any] = {"prefetch": PrefetchSection(lookahead=0)}
    changes["workload"] = scenario.workload.model_copy(
        update={"warmup": WorkloadSection.model_fields["warmup"].default}
    )
    if name == "resident":
        changes["memory"], changes["tiers"] = MemorySection(gpu_budget="100%", capacity="ignore"), TiersSection()
    elif name == "baseline":
        kept = {"gpu_budget", "scope", "total_bytes", "workspace_bytes"}  # the scope says what a share is of
        changes["memory"] = MemorySection(**scenario.memory.model_dump(include=kept), capacity="ignore")
    if name != "no_prefetch":
        scenario = plain(scenario)
    if name != "no_prefetch" or not getattr(EVICTION[scenario.memory.eviction], "needs_guesses", False):
        changes["predictor"] = PredictorSection()
    return scenario.model_copy(update=changes)


def _compared(known: Mapping[str, float], data: dict[str, Any]) -> dict[str, float | None]:
    """Return the makespans of the baselines that are known and what compares the run with them."""
    compared: dict[str, float | None] = {f"{name}_ms": known[name] for name in sorted(known)}
    if "baseline" in known:
        compared["speedup"] = speedup = known["baseline"] / data["makespan_ms"]
        used = data["memory_utilization"]
        compared["efficiency"] = speedup / used if used else None
    if "no_prefetch" in known:
        compared["prefetch_speedup"] = known["no_prefetch"] / data["makespan_ms"]
    return compared


def _replicates(inputs: Inputs, count: int, progress: Progress | None) -> list[dict[str, Any]]:
    """Return makespan and tokens/s of each replicate."""
    results = []
    # The same seed for all GPUs: what is drawn is how far the profile is off, and they share it.
    drawn = zip(*(replicate_costs(part, count) for part in inputs.parts), strict=True)
    for number, costs in enumerate(drawn, 1):
        recordings = run_all(inputs, prepared(inputs, costs))
        speed = step_metrics(recordings, serving_of(inputs))
        results.append({"makespan_ms": run_ns(recordings) / 1e6, "tokens_per_second": speed["tokens_per_second"]})
        if progress is not None:
            progress("replicates", number, count)
    return results


def _shadow_misses(
    inputs: Inputs, ready: Sequence[Prepared], stream: Path | None
) -> list[npt.NDArray[np.int64] | None]:
    """Return what the same caches without prefetch miss, as `measure.miss_keys`; None if nothing is prefetched."""
    if not any(gpu.prefetch.horizons for gpu in ready):
        return [None] * len(ready)
    managers = [make_manager(part, Spool(stream, keep=False)) for part in inputs.parts]
    if inputs.placed is not None:
        missed = shadow_misses(inputs, managers)
    else:
        shadows = [dispatched(part, own, NoPrefetch()) for part, own in zip(inputs.parts, managers, strict=True)]
        missed = [
            measure.miss_keys(own, part.model.total_experts) for own, part in zip(shadows, inputs.parts, strict=True)
        ]
    for manager in managers:  # what is mapped stays readable
        manager.spool.remove()
    return list(missed)


def _sent(inputs: Inputs, recordings: Sequence[measure.Recording], links: Links) -> list[Carried]:
    """Return what GPUs have sent each other."""
    if inputs.placed is not None:
        return sent_tokens_and_experts(inputs, recordings, links)
    return sent(recordings, flow_of(inputs.model, inputs.trace, inputs.steps), links)


def _digest(inputs: Inputs) -> str | None:
    """Return what identifies the guesses of a run, those of all GPUs together; None if there are none."""
    digests = [part.guesses.digest for part in inputs.guessers if part.guesses is not None]
    if len(digests) < 2:
        return digests[0] if digests else None
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _deduplication(inputs: Inputs, recordings: Sequence[measure.Recording]) -> dict[str, int] | None:
    """Return how many guesses prefetching went by, how many were left once merged, and the bytes that this saved.

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
        "saved_bytes": sum(map(measure.saved_bytes, recordings)),
    }
