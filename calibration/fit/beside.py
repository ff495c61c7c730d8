"""Fitting what runs beside the GPU's stream: from executed schedules and reads from a drive, to what a profile adds.

Each cost is the median, or the mean of calm samples, over the spans of schedules in which nothing else decided it. What
an entry waited for is told by its plan, which is made again from the scenario.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from json import dumps, loads
from pathlib import Path
from typing import Any

import numpy as np

from ...engine.load import load_inputs
from ...engine.scenario.inputs import Inputs
from ...resources.extending import extended
from ...resources.profile import Profile, load_profile, make_profile
from ...resources.profile_costs import ProfileError
from ...resources.timeline import (
    ACTIVATION,
    COMBINE,
    CPU_EXPERT,
    DECOMPRESS,
    DENSE,
    DISPATCH,
    EXPERT,
    HEAD,
    PEER,
    PREDICT,
    READ,
)
from ...workloads.model import Model
from ..executor.entries import COPIES, Entry, Plan
from ..executor.measured import Measured, Times
from ..executor.plan import make_plans
from ..measure.samples import Samples
from .fit import profile_text
from .seen import BESIDE, Busy, Seen, intervals, share_of, unsure
from .side_by_side import side_by_side

_KERNELS = (DENSE, EXPERT, HEAD, DECOMPRESS)
#: How many reads in flight a drive's profile has by itself.
LANES = 4

#: What was observed: a cost's name, what it depends on, and a value in ns.
Observation = tuple[str, tuple[Any, ...], float]


def observe(runs: Iterable[Measured]) -> dict[str, dict[tuple[Any, ...], Seen]]:
    """Returns what was seen in runs, by cost and what it depends on; as of `_observe`."""
    values: dict[tuple[str, tuple[Any, ...]], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    apart = []
    for number, run in enumerate(runs):
        inputs = load_inputs(run.scenario)
        plans = make_plans(inputs)
        apart.append(float(np.std(run.makespans_ns) / np.mean(run.makespans_ns)))
        for cost, key, value_ns in _observe(run, inputs, plans):
            values[cost, key][number].append(value_ns)
    found: dict[str, dict[tuple[Any, ...], Seen]] = defaultdict(dict)
    for (cost, key), by_run in sorted(values.items(), key=lambda item: repr(item[0])):
        samples = [value_ns for ours in by_run.values() for value_ns in ours]
        low, middle, high = np.percentile(samples, (25, 50, 75)).tolist()
        clipped = np.clip(samples, *np.percentile(samples, (2, 98)))
        medians = tuple(float(np.median(ours)) for ours in by_run.values())
        repeats = float(np.sqrt(np.mean([apart[number] ** 2 for number in by_run])))
        found[cost][key] = Seen(len(samples), middle, float(clipped.mean()), high - low, medians, repeats)
    return found


def _observe(run: Measured, inputs: Inputs, plans: Sequence[Plan]) -> Iterator[Observation]:
    """Yields costs of one run.

    - cpu: (hidden, ff, dtype, tokens, threads, beside a copy): an expert on the CPU.
    - notice, results: from the tokens' arrival to the first expert; from the last one's end to the copy of results.
    - hand_over, take_back, order, exchange_call, move: the host's time for the calls of one entry.
    - read: (bytes, how many were in flight): a read from a drive.
    - unpack, grouped: (bytes, beside a copy): a kernel that makes weights of compressed ones; one for several experts.
    - predict: (hidden, experts, tokens).
    - exchange: (bytes,): from the instant at which two GPUs could begin with an exchange to its end.
    """
    times = run.times
    for number, plan in enumerate(plans):
        its = times[number]
        busy, kernels = intervals(plan, its, COPIES), intervals(plan, its, _KERNELS)
        last_issued_ns = 0
        for entry in plan.entries:
            if not entry.marks:
                continue
            issued_ns = int(its.issued_ns[entry.mark])
            yield from _calls(entry, issued_ns, last_issued_ns, its)
            yield from _work(entry, its, busy, kernels, inputs)
            last_issued_ns = issued_ns
        yield from _hand_over(plan, its, busy)
        yield from _reads(plan, its, inputs.model)
    if len(plans) == 2:
        yield from _exchanges(plans, times)


def _calls(entry: Entry, issued_ns: int, last_issued_ns: int, times: Times) -> Iterator[Observation]:
    """Yields what the host took for the calls of an entry since those of the last, or since it knew the choice."""
    if entry.kind == ACTIVATION and entry.lane == "to_cpu":
        yield "hand_over", (), issued_ns - max(int(times.choice_known_ns[entry.visit]), last_issued_ns)
    elif entry.kind == ACTIVATION and entry.lane == "back":
        yield "take_back", (), issued_ns - last_issued_ns
    elif entry.kind == READ and entry.piece == 0:
        yield "order", (), issued_ns - max(last_issued_ns, int(times.choice_known_ns[entry.visit]))
    elif entry.kind == PEER:
        yield "move", (), issued_ns - last_issued_ns


def _work(entry: Entry, times: Times, busy: Busy, kernels: Busy, inputs: Inputs) -> Iterator[Observation]:
    """Yields what an entry's own work took, if copies were under way throughout or not at all."""
    model = inputs.model
    start_ns, end_ns = int(times.start_ns[entry.mark]), int(times.end_ns[entry.mark])
    beside = share_of(busy, start_ns, end_ns)
    if 0 < beside < BESIDE:
        return
    if entry.kind == CPU_EXPERT:
        shape = (model.hidden, model.expert_ff, model.expert_dtype, entry.tokens)
        yield "cpu", (*shape, inputs.scenario.miss.cpu_threads, beside > 0), end_ns - start_ns
    elif entry.kind == DECOMPRESS and share_of(kernels, start_ns, end_ns) <= 2 - BESIDE:  # its own
        yield "unpack", (model.expert_bytes[entry.expert // model.experts], beside > 0), end_ns - start_ns
    elif entry.kind == EXPERT and entry.members:
        yield "grouped", (len(entry.members) * model.expert_bytes[entry.layer], beside > 0), end_ns - start_ns
    elif entry.kind == PREDICT and beside == 0:
        yield "predict", (model.hidden, model.experts, entry.tokens), end_ns - start_ns


def _hand_over(plan: Plan, times: Times, busy: Busy) -> Iterator[Observation]:
    """Yields what passes until the CPU begins, and until its results go back while no other copy is under way."""
    arrived_ns = ended_ns = -1
    for entry in plan.entries:
        at = entry.mark
        if entry.lane == "to_cpu":
            arrived_ns = int(times.end_ns[at])
        elif entry.kind == CPU_EXPERT:
            if entry.begins and all(plan.entries[other].lane == "to_cpu" for other in entry.waits):
                yield "notice", (), int(times.start_ns[at]) - arrived_ns
            ended_ns = int(times.end_ns[at])
        elif entry.lane == "back":
            start_ns = int(times.start_ns[at])
            if share_of(busy, ended_ns, start_ns) == 0 and int(times.issued_ns[at]) < ended_ns:
                yield "results", (), start_ns - ended_ns


def _reads(plan: Plan, times: Times, model: Model) -> Iterator[Observation]:
    """Yields what reads from a drive take, by their bytes and how many were in flight meanwhile, rounded."""
    reads = [entry for entry in plan.entries if entry.kind == READ]
    starts_ns, ends_ns = (column[[entry.mark for entry in reads]] for column in (times.start_ns, times.end_ns))
    for entry, start_ns, end_ns in zip(reads, starts_ns.tolist(), ends_ns.tolist(), strict=True):
        overlaps_ns = np.maximum(0, np.minimum(ends_ns, end_ns) - np.maximum(starts_ns, start_ns))
        size_bytes = -(-model.expert_bytes[entry.layer] // entry.pieces)
        yield "read", (size_bytes, round(float(overlaps_ns.sum()) / max(1, end_ns - start_ns))), end_ns - start_ns


def _exchanges(plans: Sequence[Plan], times: Sequence[Times]) -> Iterator[Observation]:
    """Yields what exchanges take from the last of their causes to the end of both copies, and the second's calls."""
    pairs = zip(*([one for one in plan.entries if one.kind in (DISPATCH, COMBINE)] for plan in plans), strict=True)
    for pair in pairs:
        causes = [
            int(times[gpu].end_ns[plans[gpu].entries[other].mark])
            for number, entry in enumerate(pair)
            for gpu, other in (*((number, wait) for wait in entry.waits), *entry.others)
        ]
        issued_ns = [int(times[number].issued_ns[entry.mark]) for number, entry in enumerate(pair)]
        end_ns = max(int(times[number].end_ns[entry.mark]) for number, entry in enumerate(pair))
        yield "exchange", (max(entry.size_bytes for entry in pair),), end_ns - max(*causes, *issued_ns)
        yield "exchange_call", (), abs(issued_ns[1] - issued_ns[0])


def fit_beside(runs: Iterable[Measured], drive: Samples | None = None, links: Samples | None = None) -> dict[str, Any]:
    """Returns what a profile says besides, as plain data to be merged into it: only what was seen.

    Samples of a `drive` and of the `links` between two GPUs give sizes that no schedule had. Raises ProfileError if
    nothing was, and if `links` are not of exchanges or the runs have none.
    """
    runs = list(runs)
    seen = observe(runs)
    if links is not None and "exchange" not in seen:
        raise ProfileError("links: in these runs GPUs exchange nothing: execute the set fit-shared")
    host = {
        name: _duration(seen[cost])
        for name, cost in (
            ("cpu_hand_over", "hand_over"), ("cpu_take_back", "take_back"), ("cpu_notice", "notice"),
            ("cpu_results", "results"), ("exchange_call", "exchange_call"), ("expert_move", "move"),
        )
        if cost in seen
    }  # fmt: skip
    compute: dict[str, Any] = {}
    if "cpu" in seen:
        compute["cpu_experts"] = _cpu_points(seen["cpu"])
    if "predict" in seen:
        compute["predictors"] = [
            {
                **_measured(one),
                "uncertainty": unsure([one]),
                "hidden": hidden,
                "experts": experts,
                "tokens": tokens,
                "ns": round(one.mean_ns),
            }
            for (hidden, experts, tokens), one in seen["predict"].items()
        ]
    for name, cost in (("unpacking", "unpack"), ("grouped", "grouped")):
        if cost in seen:
            compute[name] = _line(seen[cost])
    data: dict[str, Any] = {"host": host, "compute": compute, "contention": side_by_side(runs)}
    if "exchange" in seen:
        data["exchange"] = _exchange(seen["exchange"], {} if links is None else _exchanges_apart(links))
    if drive is not None or "read" in seen:
        data["nvme"] = _drive(drive, seen)
    data = {name: part for name, part in data.items() if part}
    if not data:
        raise ProfileError("in these runs nothing works beside the GPU's stream: execute the set fit-beside")
    return data


def _apart(samples: Samples) -> dict[tuple[int, int], tuple[int, float]]:
    """Returns how many reads were measured by bytes and how many in flight, and what they took in the mean."""
    took = {
        (int(series.key["bytes"]), int(series.key["in_flight"])): [ns for of in series.rounds_ns for ns in of]
        for series in samples.series
        if series.term == "read"
    }
    return {key: (len(all_ns), float(np.mean(all_ns))) for key, all_ns in took.items()}


def _between(apart: dict[tuple[int, int], tuple[int, float]], size_bytes: int) -> float:
    """Returns what one read of so many bytes alone takes, on straight lines between those that were measured apart."""
    points = sorted((size, ns) for (size, count), (_, ns) in apart.items() if count == 1)
    sizes, times = zip(*points, strict=True)
    return float(np.interp(size_bytes, sizes, times))


def written(data: dict[str, Any], name: str, base: str) -> tuple[str, Profile]:
    """Returns a profile that extends `base` with what was fitted, as a file's text and as a profile.

    Where the base is a file, all of it is in the text; of one that extends a shipped profile, what it adds to that.
    What is measured of a predictor's other shapes stays as it is there. Raises ProfileError.
    """
    known = load_profile(base)
    if "expert_move" in data.get("host", {}):  # with the wait for what lay in its room, which is charged by itself
        data["host"]["expert_move"]["ns"] = max(0, data["host"]["expert_move"]["ns"] - known.host.event_wait.ns)
    compute = dict(data.get("compute", {}))
    if "predictors" in compute:
        ours = {(point["hidden"], point["experts"], point["tokens"]) for point in compute["predictors"]}
        others = [
            point.model_dump(exclude_none=True)
            for point in known.compute.predictors
            if (point.hidden, point.experts, point.tokens) not in ours
        ]
        compute["predictors"] = [*compute["predictors"], *others]
    added: dict[str, Any] = {
        "name": name,
        "source": f"{known.source if base.endswith('.json') else f'the costs of {base}'}; of executed schedules what "
        "works beside the GPU's stream (calibrate fit-beside)",
        **data,
    }
    if compute:
        added["compute"] = compute
    profile = make_profile(extended(known.model_dump(exclude_none=True), added), f"fit of {name}")
    if patch := _patch(base):
        return dumps(extended(patch, added), indent=1), profile
    if base.endswith(".json"):
        return profile_text(profile), profile
    return dumps({"extends": base, **added}, indent=1), profile


def _patch(base: str) -> dict[str, Any]:
    """Returns a profile's file as it is, if it is one that extends a shipped profile; else nothing."""
    if not base.endswith(".json"):
        return {}
    data: dict[str, Any] = loads(Path(base).read_bytes())
    return data if "extends" in data and not data["extends"].endswith(".json") else {}


def _measured(seen: Seen, note: str = "inside schedules") -> dict[str, Any]:
    return {"source": "measured", "note": note, "samples": seen.shown}


def _duration(seen: dict[tuple[Any, ...], Seen]) -> dict[str, Any]:
    (one,) = seen.values()
    return {**_measured(one), "uncertainty": unsure([one]), "ns": max(0, round(one.median_ns))}


def _cpu_points(seen: dict[tuple[Any, ...], Seen]) -> list[dict[str, Any]]:
    """Returns each shape over its tokens; one not seen beside a copy takes so many times as long there as others do."""
    quiet = {key[:-1]: one for key, one in seen.items() if not key[-1]}
    ratios = [one.mean_ns / quiet[key[:-1]].mean_ns for key, one in seen.items() if key[-1] and key[:-1] in quiet]
    ratio = max(1.0, float(np.median(ratios))) if ratios else 1.0
    points, off = [], unsure(seen.values(), decides=True)
    for key, one in seen.items():
        *shape, beside = key
        if beside and (*shape, False) in seen:
            continue
        hidden, inner, dtype, tokens, threads = shape
        quiet_ns = one.mean_ns / ratio if beside else one.mean_ns
        disturbed = seen.get((*shape, True))
        beside_ns = quiet_ns * ratio if disturbed is None else max(quiet_ns, disturbed.mean_ns)
        points.append({
            **_measured(one), "uncertainty": off, "hidden": hidden, "expert_ff": inner, "dtype": dtype,
            "tokens": tokens, "threads": threads, "ns": round(quiet_ns), "beside_copy_ns": round(beside_ns),
        })  # fmt: skip
    return points + list(_more_tokens(points))


def _more_tokens(points: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields points of several tokens of shapes that were seen over one alone: so many times that as of another shape.

    In between the profile's own rule, in proportion, would read the weights anew for every token.
    """
    by_shape: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = defaultdict(dict)
    for point in points:
        by_shape[tuple(point[name] for name in ("hidden", "expert_ff", "dtype", "threads"))][point["tokens"]] = point
    many = max(by_shape.values(), key=len)
    if len(many) == 1 or 1 not in many:
        return
    for known in by_shape.values():
        if set(known) == {1}:
            for tokens in sorted(set(many) - {1}):
                times = many[tokens]["ns"] / many[1]["ns"]
                yield {
                    **known[1], "tokens": tokens, "source": "fitted",
                    "note": f"one token's {known[1]['ns']} ns, as many times as for {many[1]['hidden']} x "
                    f"{many[1]['expert_ff']}, {many[1]['dtype']}",
                    "ns": round(known[1]["ns"] * times), "beside_copy_ns": round(known[1]["beside_copy_ns"] * times),
                }  # fmt: skip


def _line(seen: dict[tuple[Any, ...], Seen]) -> dict[str, Any]:
    """Returns constant + bytes / rate by least squares of relative residuals, and how much longer beside a copy."""
    quiet = {size: one for (size, beside), one in seen.items() if not beside} or {
        size: one for (size, _), one in seen.items()
    }
    sizes, times = (np.array(column, dtype=float) for column in (list(quiet), [one.mean_ns for one in quiet.values()]))
    counts = np.sqrt([one.n for one in quiet.values()])
    if len(sizes) == 1:
        constant_ns, ns_per_byte = 0.0, float(times[0] / sizes[0])
    else:
        weights = np.stack([counts / times, counts * sizes / times], axis=1)
        constant_ns, ns_per_byte = np.linalg.lstsq(weights, counts, rcond=None)[0].tolist()
        if constant_ns < 0:
            constant_ns, ns_per_byte = 0.0, float((counts @ counts) / (counts @ (counts * sizes / times)))
    ratios = [one.mean_ns / quiet[size].mean_ns for (size, beside), one in seen.items() if beside and size in quiet]
    total = Seen(sum(one.n for one in seen.values()), float(np.median(times)), 0.0, 0.0)
    return {
        "source": "measured", "note": f"a line through {len(sizes)} sizes inside schedules",
        "samples": {"n": total.n, "median_ns": total.median_ns, "iqr_ns": 0.0},
        "uncertainty": unsure(seen.values()),
        "constant_ns": round(constant_ns), "bytes_per_second": round(1e9 / ns_per_byte),
        "beside_copy_factor": round(max(1.0, float(np.median(ratios)) if ratios else 1.0), 4),
    }  # fmt: skip


def _exchanges_apart(samples: Samples) -> dict[int, float]:
    """Returns what exchanges between two GPUs by copies took in a row, in ns, by bytes."""
    found = {
        int(series.key["bytes"]): float(np.median([ns for of in series.rounds_ns for ns in of]))
        for series in samples.series
        if series.term == "exchange" and (series.key["how"], series.key["mode"]) == ("copies", "in a row")
    }
    if not found:
        raise ProfileError("links: no series of exchanges by copies: must be what `calibrate measure --links` wrote")
    return found


def _exchange(seen: dict[tuple[Any, ...], Seen], apart: Mapping[int, float]) -> dict[str, Any]:
    """Returns a table over bytes, made to grow; no smaller exchange takes less than the smallest seen.

    Sizes that no schedule had take what they take `apart`, and as much more as the nearest does inside schedules: what
    is added there are waits, which do not grow with the bytes.
    """
    often = {size: one for (size,), one in seen.items() if one.n >= 3} or {size: one for (size,), one in seen.items()}
    took = {size: one.median_ns for size, one in often.items()}
    sizes_apart, ns_apart = sorted(apart), [apart[size] for size in sorted(apart)]
    for size in sizes_apart:
        near = min(often, key=lambda one: abs(np.log(max(1, one) / size)))
        if size not in often:
            took[size] = apart[size] + often[near].median_ns - float(np.interp(near, sizes_apart, ns_apart))
    sizes = sorted(took)
    grown = np.minimum.accumulate([took[size] for size in reversed(sizes)])[::-1]
    table = [(0, round(grown[0])), *((size, round(ns)) for size, ns in zip(sizes, grown.tolist(), strict=True) if size)]
    if len(table) == 1:
        table.append((1 << 30, table[0][1]))
    total = sum(one.n for one in seen.values())
    shown = {"n": total, "median_ns": float(np.median([one.median_ns for one in often.values()])), "iqr_ns": 0.0}
    off = unsure(seen.values())
    note = f"inside schedules{', and in a row apart from them' if apart else ''}"
    return {"source": "measured", "note": note, "samples": shown, "uncertainty": off, "points": table}


def _near_9_mib(means: Mapping[tuple[int, int], tuple[int, float]]) -> int:
    """Returns the size of reads, of (size, in flight), that is nearest to 9 MiB."""
    return min((size for size, _ in means), key=lambda one: abs(one - 9 * 2**20))


def _together(means: Mapping[tuple[int, int], tuple[int, float]], sizes: set[int]) -> list[tuple[int, int]]:
    """Returns what so many reads in flight, of these sizes, get together in bytes a second, each size by its reads."""
    points = []
    for count in sorted({count for size, count in means if size in sizes}):
        here = [(n, count * size * 1e9 / ns) for (size, of), (n, ns) in means.items() if of == count and size in sizes]
        points.append((count, round(float(np.average([rate for _, rate in here], weights=[n for n, _ in here])))))
    return points


def _drive(samples: Samples | None, seen: dict[str, dict[tuple[Any, ...], Seen]]) -> dict[str, Any]:
    """Returns reads alone over their size, and what several in flight get together: in schedules if any were there.

    Of schedules all sizes count, each by its reads. Reads measured apart give sizes that no schedule had, as many times
    as long as at the nearest that one had; without schedules, all, and of the size nearest 9 MiB what several get.
    """
    apart = {} if samples is None else _apart(samples)
    if "read" in seen:
        means = {key: (one.n, one.mean_ns) for key, one in seen["read"].items()}
        ours, note, off = {size for size, _ in means}, "inside schedules", unsure(seen["read"].values(), decides=True)
        for (size, count), (n, ns) in apart.items():
            near = min(ours, key=lambda one: abs(np.log(one / size)))
            if count == 1 and (near, 1) in means and abs(near / size - 1) > 0.01:
                as_long = means[near, 1][1] / _between(apart, near)
                means[size, 1] = (n, ns * as_long)
    else:
        means, note = apart, f"past the system's cache, {'' if samples is None else samples.date}"
        ours, off = {_near_9_mib(means)}, None
    alone = sorted((size, ns) for (size, count), (_, ns) in means.items() if count == 1)
    grown = np.minimum.accumulate(np.array([ns for _, ns in alone])[::-1])[::-1]
    table = [(size, round(ns)) for (size, _), ns in zip(alone, grown.tolist(), strict=True)]
    together = _together(means, ours)
    if len(together) < 2 and apart:  # schedules that never had more than one in flight
        together = _together(apart, {_near_9_mib(apart)})
    total = sum(n for n, _ in means.values())
    shown = {"n": total, "median_ns": round(float(np.median([ns for _, ns in means.values()])), 1), "iqr_ns": 0.0}
    data: dict[str, Any] = {
        "read": {"source": "measured", "note": note, "samples": shown, "uncertainty": off, "points": table},
        "lanes": LANES,
    }
    if len(together) > 1:  # of reads that were never alone, or never together, nothing is known
        data["queue_depth"] = {"source": "measured", "note": note, "bytes_per_second_by_reads": together}
    if "order" in seen:
        data["order"] = _duration(seen["order"])
    return data
