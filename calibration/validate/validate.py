"""Validation: simulated against measured, scenario by scenario, with the machine's own spread beside every error.

It needs no GPU: a measured run says what was executed and when, and the same scenario is simulated with a profile. An
ablation simulates once more with one term of the costs left out, so that each shows what it is for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from ...engine.costs.costs import Costs, part_costs
from ...engine.costs.uncertainty import linked, replicate_costs
from ...engine.decide.memory_manager import DEMANDED, PREFETCHED
from ...engine.load import load_inputs
from ...engine.loading.stages import with_profile
from ...engine.measure.merge import makespan_ns as run_ns
from ...engine.measure.recording import LATE, Recording
from ...engine.measure.time_split import time_split
from ...engine.run import prepared, run_all
from ...engine.scenario.inputs import Inputs
from ...engine.scenario.scenario import Scenario
from ...engine.timing.records import Decoded
from ...resources.profile import Profile
from ...resources.profile_costs import Duration, DurationBesideCopy, TransferCost
from ...resources.timeline import CPU_EXPERT, LAUNCH, PREFETCH, READ, covered_ns
from ..executor.measured import Measured
from .drift import drift_rows, drifts

#: Lanes that a bound is taken from, by role.
ROLES = ("compute", "h2d", "d2h", "host", "cpu", "nvme")
#: A bound that errs by so much does not do; a lane that is busy for a larger share decides alone.
BOUND_FAILS, DECIDES = 0.05, 0.8

#: What an ablation changes: the profile, or the scenario.
Ablation = Callable[[Profile, Scenario], tuple[Profile, Scenario]]


def compare(measured: Measured, profile: Profile) -> dict[str, Any]:
    """Simulate what was measured and return the comparison, as plain data; errors are simulated / measured - 1.

    `counts_equal` is false where it was executed with other decisions than today's; what is read off them (`stall_ms`,
    `late`, `start_error_us`) is None then.

    Raises ValueError if the scenario cannot run on the profile.
    """
    simulated = simulate_measured(measured, profile)
    executed = _as_recordings(measured, simulated)
    real_ns, made_ns = measured.makespan_ns, run_ns(simulated)
    busy_real, busy_made = _busy(executed), _busy(simulated)
    bound = max(busy_made, key=lambda lane: busy_made[lane])
    scenario = measured.scenario
    sides = (executed, simulated)
    # What a GPU stores in another's memory is on the timeline of either.
    equal = all(
        gpu.counts == _counts(mine) for gpu, mine in zip(measured.gpus, simulated, strict=True)
    ) and _same_spans(*sides, scenario)
    return {
        "scenario": measured.name,
        "model": scenario.model.preset,
        "dispatch": scenario.dispatch.mode,
        "measured_ms": real_ns / 1e6,
        "simulated_ms": made_ns / 1e6,
        "makespan_error": made_ns / real_ns - 1,
        "spread": measured.spread,
        "bound": bound,
        "bound_ms": busy_made[bound] / 1e6,
        "bound_error": busy_made[bound] / real_ns - 1,
        "busiest_share": max(busy_real.values()) / real_ns,
        "counts_equal": equal,
        "busy_ms": {lane: _pair(busy_real[lane] / 1e6, busy_made[lane] / 1e6) for lane in busy_made},
        "stall_ms": _pair(*(sum(time_split(gpu)["stall_ms"] for gpu in side) for side in sides)) if equal else None,
        "late": _pair(*(sum(int((gpu.outcomes == LATE).sum()) for gpu in side) for side in sides)) if equal else None,
        "start_error_us": _start_errors(executed, simulated) if equal else None,
    }


def simulate_measured(measured: Measured, profile: Profile, ablation: Ablation | None = None) -> list[Recording]:
    """Simulate the scenario of a measured run on a profile, with the events that the execution is timed by."""
    scenario = measured.scenario
    if ablation is not None:
        profile, scenario = ablation(profile, scenario)
    inputs = _as_executed(scenario, profile)
    return _simulate(inputs, part_costs(inputs, timed=True))


def _as_executed(scenario: Scenario, profile: Profile) -> Inputs:
    """Returns the inputs of what was executed, on a profile.

    What a scenario says that the CPU, a predictor or decompression takes is what policies went by; what these took is
    the profile's, where it has it.
    """
    said = load_inputs(scenario)
    updates: dict[str, Any] = {}
    if scenario.miss.cpu_gb_per_s is not None:
        updates["miss"] = scenario.miss.model_copy(update={"cpu_gb_per_s": None})
    unpacking = profile.compute.unpacking
    if unpacking is not None and scenario.compression.where != "none":
        rate = {"decompress_us": unpacking.constant_ns / 1e3, "decompress_gb_per_s": unpacking.bytes_per_second / 1e9}
        updates["compression"] = scenario.compression.model_copy(update=rate)
    latency_us = _guess_us(said, profile)
    if latency_us is not None and scenario.predictor.latency_us:
        updates["predictor"] = scenario.predictor.model_copy(update={"latency_us": latency_us})
    if not updates:
        return with_profile(said, profile, timed=True)
    timed = load_inputs(scenario.model_copy(update=updates))
    return replace(with_profile(timed, profile, timed=True), decides_by=said)


def _guess_us(inputs: Inputs, profile: Profile) -> float | None:
    """Returns what the executor's predictor takes over the tokens of most steps; None if it was not measured."""
    model, tokens = inputs.model, inputs.most_tokens
    points = [
        (point.tokens, point.ns)
        for point in profile.compute.predictors
        if (point.hidden, point.experts) == (model.hidden, model.experts)
    ]
    return None if not points else min(points, key=lambda point: abs(point[0] - tokens))[1] / 1e3


def _simulate(inputs: Inputs, costs: Sequence[Costs]) -> list[Recording]:
    return run_all(inputs, prepared(inputs, costs))


def predicted_ms(measured: Measured, profile: Profile, replicates: int) -> dict[str, float]:
    """Returns p5, p50 and p95 of the makespan over `replicates` draws of the costs from their uncertainty."""
    inputs = _as_executed(measured.scenario, profile)
    # The same seed for all GPUs: what is drawn is how far the profile is off, and they share it.
    drawn = (replicate_costs(part, replicates, timed=True) for part in inputs.parts)
    makespans_ms = [
        run_ns(_simulate(linked(inputs, costs, timed=True), costs)) / 1e6 for costs in zip(*drawn, strict=True)
    ]
    return dict(zip(("p5", "p50", "p95"), np.percentile(makespans_ms, (5, 50, 95)).tolist(), strict=True))


def _as_recordings(measured: Measured, simulated: Sequence[Recording]) -> list[Recording]:
    """Returns a measured run with the books of its simulation, whose decisions are the same."""
    executed = []
    for mine, times, timeline in zip(simulated, measured.times, measured.timelines(), strict=True):
        visits = mine.decoded.visits.copy()
        visits["choice_known_ns"] = times.choice_known_ns
        executed.append(replace(mine, decoded=Decoded(timeline, mine.decoded.accesses, visits, mine.decoded.arrivals)))
    return executed


def _counts(recording: Recording) -> dict[str, int]:
    manager, reasons = recording.manager, Counter(recording.copy_reason.tolist())
    miss, prefetch = reasons[DEMANDED], reasons[PREFETCHED]
    found = len(recording.decoded.accesses) - miss
    made = Counter(recording.spans["kind"].tolist())
    more = {"cpu": made[CPU_EXPERT], "read": _reads(recording)}
    counts = {"found": found, "miss": miss, "prefetch": prefetch}
    counts |= {name: count for name, count in more.items() if count}
    return {**counts, "dropped": manager.dropped, "evict": manager.evicted}


def _reads(recording: Recording) -> int:
    """Returns how many experts were read from a drive, in however many requests each."""
    reads = recording.spans[recording.spans["kind"] == READ]
    return len(np.unique(reads["copy"]))


def _identities(recording: Recording) -> Any:
    """Returns what the spans are (not when), the host's own left out."""
    spans = recording.spans[recording.spans["kind"] != LAUNCH]
    return spans[["kind", "visit", "expert", "copy"]], spans


def _same_spans(executed: Sequence[Recording], simulated: Sequence[Recording], scenario: Scenario) -> bool:
    """Whether the same kernels and copies were made; which queued prefetches are given up is a matter of time.

    Of each GPU by itself; of GPUs that share experts together, for a copy between two is on the timeline of either.
    """
    queued, apart = scenario.copy_.by_rank, scenario.parallel.gpus == 1
    counts: list[Counter[Any]] = []
    for side in (executed, simulated):
        made: Counter[Any] = Counter()
        for number, recording in enumerate(side):
            what, _ = _identities(recording)
            made.update((number if apart else 0, *row) for row in what.tolist() if row[0] != PREFETCH or not queued)
        counts.append(made)
    return counts[0] == counts[1]


def _busy(recordings: Sequence[Recording]) -> dict[str, int]:
    """Returns for how long lanes of each role were busy, any of them, in ns: of each GPU, and of each host thread."""
    intervals: dict[str, list[Any]] = {}
    for role, recording in product(ROLES, recordings):
        spans, timeline = recording.spans, recording.decoded.timeline
        for number in timeline.lanes_with(role):
            device = timeline.lanes[number].device
            name = role if len(recordings) == 1 or device == role else f"{device} {role}"
            intervals.setdefault(name, []).append(spans[spans["lane"] == number])
    busy = {name: np.concatenate(parts) for name, parts in intervals.items()}
    return {name: covered_ns(spans["start_ns"], spans["end_ns"]) for name, spans in busy.items()}


def _start_errors(executed: Sequence[Recording], simulated: Sequence[Recording]) -> dict[str, float]:
    """Returns by how much spans start earlier or later than measured, in us: median and 90th percentile of |error|."""
    errors: list[float] = []
    for pair in zip(executed, simulated, strict=True):
        ordered = []
        for recording in pair:
            what, spans = _identities(recording)
            first: dict[Any, int] = {}
            for name, start_ns in zip(what.tolist(), spans["start_ns"].tolist(), strict=True):
                first[name] = min(start_ns, first.get(name, start_ns))
            ordered.append(first)
        real, made = ordered
        errors += [abs(made[name] - start_ns) / 1e3 for name, start_ns in real.items() if name in made]
    median, high = np.percentile(errors, (50, 90)).tolist()
    return {"p50": median, "p90": high}


def _pair(measured: float, simulated: float) -> dict[str, float | None]:
    error = simulated / measured - 1 if measured else None
    return {"measured": measured, "simulated": simulated, "error": error}


# Ablations.

_NOTHING = DurationBesideCopy(ns=0, source="assumed", note="left out")


def _without_host(profile: Profile, scenario: Scenario) -> tuple[Profile, Scenario]:
    fields = [name for name, value in profile.host if isinstance(value, Duration)]
    free = {**dict.fromkeys(fields, _NOTHING), "product_launches": {}}
    return profile.model_copy(update={"host": profile.host.model_copy(update=free)}), scenario


def _without_contention(profile: Profile, scenario: Scenario) -> tuple[Profile, Scenario]:
    copy = scenario.copy_.model_copy(update={"contention": False})
    return profile, scenario.model_copy(update={"copy_": copy})


def _without_table(profile: Profile, scenario: Scenario) -> tuple[Profile, Scenario]:
    h2d = {
        memory: costs.model_copy(update={name: _line(getattr(costs, name)) for name in ("alone", "queued")})
        for memory, costs in profile.h2d.items()
    }
    return profile.model_copy(update={"h2d": h2d}), scenario


def _line(cost: TransferCost) -> TransferCost:
    """Returns bytes over bandwidth alone, the bandwidth that of the largest copy measured."""
    size_bytes = cost.points[-1][0] if cost.points else 2**30
    rate = round(size_bytes * 1e9 / cost.ns(size_bytes))
    return TransferCost(latency_ns=0, bytes_per_second=rate, source=cost.source)


def _alone(profile: Profile, scenario: Scenario) -> tuple[Profile, Scenario]:
    def swap(points: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(
            point
            if point.alone_ns is None
            else point.model_copy(
                update={
                    "ns": point.alone_ns,
                    "beside_copy_ns": max(1, round(point.alone_ns * point.beside_copy_ns / point.ns)),
                }
            )
            for point in points
        )

    compute = profile.compute
    tables = {name: swap(getattr(compute, name)) for name in ("experts", "dense", "heads")}
    return profile.model_copy(update={"compute": compute.model_copy(update=tables)}), scenario


#: What can be left out, by name.
ABLATIONS: dict[str, Ablation] = {
    "no host costs": _without_host,
    "no contention": _without_contention,
    "no table for small copies": _without_table,
    "kernels timed alone": _alone,
}


# All scenarios together.


def validate(
    runs: Sequence[Measured],
    profile: Profile,
    *,
    ablate: bool = False,
    replicates: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Compare all runs and return the report as plain data: rows, their summary, pairs of dispatch modes, ablations.

    With `replicates`, each row says between which percentiles of so many draws of the costs the measured makespan is.
    """
    rows = []
    for done, measured in enumerate(runs):
        if progress is not None:
            progress("compare", done, len(runs))
        row = compare(measured, profile)
        if ablate:
            row["ablation"] = {
                name: run_ns(simulate_measured(measured, profile, change)) / measured.makespan_ns - 1
                for name, change in ABLATIONS.items()
            }
        if replicates:
            row["predicted_ms"] = predicted_ms(measured, profile, replicates)
            row["inside"] = row["predicted_ms"]["p5"] <= row["measured_ms"] <= row["predicted_ms"]["p95"]
        rows.append(row)
    machine = dict(runs[0].machine)
    return {
        "profile": profile.name,
        "machine": machine,
        "gpus": max(run.gpus_used for run in runs),
        "repeats": len(runs[0].makespans_ns),
        "replicates": replicates,
        "summary": summary(rows),
        "dispatch": dispatch_pairs(rows),
        "ablation": ablation_summary(rows) if ablate else None,
        "drift": drift_rows(drifts(runs, profile)),
        "rows": rows,
    }  # fmt: skip


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return, for each dispatch mode and for those that a bound does not predict, the sizes of the errors."""
    groups = {
        "graph": [row for row in rows if row["dispatch"] == "graph"],
        "graph, bound off by 5 %": [row for row in rows if row["dispatch"] == "graph" and _bound_fails(row)],
        "eager": [row for row in rows if row["dispatch"] == "eager"],
        "all": list(rows),
    }
    return {name: _sizes(members) for name, members in groups.items() if members}


def _bound_fails(row: dict[str, Any]) -> bool:
    return bool(abs(row["bound_error"]) >= BOUND_FAILS)


def _sizes(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    errors = np.abs([row["makespan_error"] for row in rows])
    bounds = np.abs([row["bound_error"] for row in rows])
    return {
        "n": len(rows),
        "median": float(np.median(errors)),
        "p90": float(np.percentile(errors, 90)),
        "worst": float(errors.max()),
        "within_spread": int(sum(error <= row["spread"] for error, row in zip(errors, rows, strict=True))),
        "spread_median": float(np.median([row["spread"] for row in rows])),
        "bound_median": float(np.median(bounds)),
        "bound_worst": float(bounds.max()),
        "no_lane_decides": int(sum(row["busiest_share"] <= DECIDES for row in rows)),
        "counts_equal": int(sum(row["counts_equal"] for row in rows)),
        "inside": int(sum(row["inside"] for row in rows)) if "inside" in rows[0] else None,
    }


def dispatch_pairs(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns how many times as long eager dispatch takes as graphs, for scenarios that ran with both."""
    by_name = {row["scenario"]: row for row in rows}
    pairs = []
    for name, row in by_name.items():
        other = by_name.get(name.replace("-graph-", "-eager-"))
        if row["dispatch"] != "graph" or other is None or other is row:
            continue
        real, made = (other[key] / row[key] for key in ("measured_ms", "simulated_ms"))
        pairs.append({"scenario": name, "measured": real, "simulated": made, "error": made / real - 1})
    return pairs


def ablation_summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns the median and the worst |makespan error| with everything, and with each term left out."""
    cases = {"everything": [row["makespan_error"] for row in rows]}
    cases |= {name: [row["ablation"][name] for row in rows] for name in ABLATIONS}
    return {
        name: {"median": float(np.median(np.abs(errors))), "worst": float(np.max(np.abs(errors)))}
        for name, errors in cases.items()
    }


def failures(rows: Iterable[dict[str, Any]], tolerance: float) -> list[str]:
    """Returns a line for each row that is off by more than `tolerance` and the machine's spread, or counts other."""
    lines = []
    for row in rows:
        if abs(row["makespan_error"]) > max(tolerance, row["spread"]):
            lines.append(f"{row['scenario']}: off by {row['makespan_error']:+.2%}, spread {row['spread']:.2%}")
        if not row["counts_equal"]:
            lines.append(f"{row['scenario']}: counts differ")
    return lines
