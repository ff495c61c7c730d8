"""Published tables, run again: ours beside theirs, row by row, with a verdict that says by how much and why.

Nothing is tuned to a row: a table's rows share one workload, stated in their scenarios. To add a table: write a
function that returns its rows, name it in TABLES.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from typing import Any

from ..engine.load import load_inputs
from ..engine.scenario.inputs import Inputs
from ..engine.scenario.scenario import load_scenario
from ..engine.simulate import simulate, simulate_inputs
from ..errors import InputError
from ..resources.profile import Profile, load_profile
from ..words import unknown_name
from ..workloads.model import load_model
from .inference import InferenceConfig, InferenceSimulator, in_guides_accounting
from .virtual_memory import VirtualMemoryManager

_MIB = 2**20
#: The guide's machine and expert.
_PROFILE, _EXPERT_MIB, _TEN = "rtx3090", 27.0, 10
_EXPERT_BYTES = round(_EXPERT_MIB * _MIB)
#: What the guide says beyond its tables: the predictor's top-1 accuracy and share of the model's memory, the speed-up
#: simulated and theoretical, the best context length in tokens, and what caching adds.
ACCURACY, PREDICTOR_SHARE = 0.3386, 0.0032
SPEEDUP, THEORETICAL_SPEEDUP = (1.8, 2.2), 2.1
BEST_CONTEXT, CACHING_GAIN = 3, 0.20
CONTEXTS = range(1, 7)


@dataclass(frozen=True)
class Published:
    """One row of the guide's table: ranges in the units of our metrics; 2.8 ms is what rounds to it."""

    hit_rate: tuple[float, float]
    memory_utilization: tuple[float, float]
    avg_latency_ms: tuple[float, float]


#: "Memory Management Simulation Guide", Virtual Memory Performance, by the scenario that repeats the row.
VIRTUAL_MEMORY = {
    "guide-k5-1gb": Published((0.35, 0.40), (0.60, 0.70), (2.75, 2.85)),
    "guide-k10-2gb": Published((0.45, 0.50), (0.70, 0.80), (2.35, 2.45)),
    "guide-k20-4gb": Published((0.55, 0.60), (0.80, 0.90), (2.05, 2.15)),
}


def virtual_memory() -> list[dict[str, Any]]:
    """Returns the guide's three configurations: in its own accounting, with copies charged, and overlapped.

    Experts belong to their layer; beside it stands what the guide's accounting gives if layers shared them. The
    overlapped engine makes the same decisions as the virtual memory manager, and hides of the copies what fits beside
    computation; its time per access is that of the whole run.
    """
    return [_configuration(name, published) for name, published in VIRTUAL_MEMORY.items()]


def _configuration(name: str, published: Published) -> dict[str, Any]:
    inputs = load_inputs(load_scenario(name))
    manager, metrics = in_guides_accounting(inputs)
    _, shared = in_guides_accounting(inputs, share_across_layers=True)
    reasons = _reasons(inputs, manager, metrics, published)
    bounds = vars(published)
    return {
        "scenario": name,
        "prefetch_k": manager.prefetch_k,
        "gpu_memory_limit_mb": inputs.budget_bytes / _MIB,
        "published": {key: list(ends) for key, ends in bounds.items()},
        "guide_accounting": metrics,
        "shared_across_layers": shared,
        "overlapped": _overlapped(inputs),
        "verdicts": {key: {**_verdict(metrics[key], *ends), "why": reasons[key]} for key, ends in bounds.items()},
    }


def _overlapped(inputs: Inputs) -> dict[str, Any]:
    """Run a scenario through the overlapped engine; memory is of the limit, as in the guide, not of whole experts."""
    data = simulate_inputs(inputs, baselines=False).data
    return {
        "hit_rate": data["hit_rate"],
        "late_rate": data["late_rate"],
        "time_per_access_ms": data["makespan_ms"] / data["accesses"],
        "memory_utilization": data["memory_utilization"] * data["budget_bytes"] / inputs.budget_bytes,
        "makespan_ms": data["makespan_ms"],
        "counts": data["counts"],
    }


def _verdict(ours: float, low: float, high: float) -> dict[str, Any]:
    """Say whether a figure lies inside its published range, and else how far from the nearer end."""
    off = min(0.0, ours - low) + max(0.0, ours - high)
    return {"ours": ours, "inside": not off, "off_by": off}


def _reasons(
    inputs: Inputs, manager: VirtualMemoryManager, metrics: dict[str, Any], published: Published
) -> dict[str, str]:
    """Explain each figure by what the run counted."""
    counts, accesses, layers = metrics["event_counts"], metrics["accesses"], inputs.model.layers
    slots = inputs.budget_bytes // inputs.model.expert_bytes[0]
    brought = (counts["prefetch"] + counts["miss"]) / accesses
    low_rate, high_rate = published.hit_rate
    formula_ms = manager.miss_ms - (manager.miss_ms - manager.hit_ms) * (low_rate + high_rate) / 2
    more_ms = sum(published.avg_latency_ms) / 2 - formula_ms
    return {
        "hit_rate": (
            f"{metrics['prefetch_hit_rate']:.1%} by prefetching, for the predictor is right with probability "
            f"{inputs.scenario.predictor.recall:.2%} at any k; {metrics['cache_hit_rate']:.1%} by caching, for "
            f"{brought:.1f} experts come in an access, so {slots} slots remember {slots / brought:.1f} accesses, and a "
            f"layer's next use is {layers} accesses away. More hits need a recall that grows with k, or a cache that "
            "prefetches cannot flush"
        ),
        "memory_utilization": (
            f"experts come at {brought:.1f} an access and leave only for others: once full "
            f"({slots} slots, {slots / brought:.1f} of {accesses:,} accesses), it stays full"
        ),
        "avg_latency_ms": (
            f"{manager.miss_ms:.2f} ms x miss rate + {manager.hit_ms:.2f} ms x hit rate. The published hit rate gives "
            f"{formula_ms:.2f} ms by this formula; the published latency has {more_ms:.2f} ms more, which nothing "
            "published explains"
        ),
    }


@dataclass(frozen=True)
class Row:
    """One published figure beside ours: fractions and plain numbers in `unit`; None where there is none.

    `ours` is in the guide's accounting, `charged` with every copy charged, `overlapped` on the engine's timeline.
    """

    name: str
    unit: str
    published: tuple[float, float] | None
    ours: float
    charged: float | None
    overlapped: float | None
    why: str

    def data(self) -> dict[str, Any]:
        """Returns the row as plain data, with the verdict on `ours`: None if nothing is published."""
        published = None if self.published is None else list(self.published)
        verdict = None if self.published is None else _verdict(self.ours, *self.published)
        return {**asdict(self), "published": published, "verdict": verdict}


def transfers() -> list[dict[str, Any]]:
    """Returns the guide's copies and allocations: what its accounting charges and what the engine's copy lane takes."""
    profile = load_profile(_PROFILE)
    assert profile.d2d is not None and profile.allocation is not None
    one_ms, all_ms = (
        VirtualMemoryManager(prefetch_k=_TEN).prefetch_experts([*range(count)], None, 0, 0) for count in (1, _TEN)
    )
    lane = [_on_lane_ms(count) for count in (1, _TEN)]
    held = "the profile holds the published figures"
    pageable = "; on the lane none queues: the copies are pageable, and each holds the host until it ends"
    rows = _copies("CPU to GPU", (3.41, 40.73, 6.6), (one_ms, all_ms), lane, held + pageable)
    within = profile.d2d.alone.ns(_EXPERT_BYTES), profile.d2d.queued.ns(_EXPERT_BYTES)
    both_ms = within[0] / 1e6, (within[0] + (_TEN - 1) * within[1]) / 1e6
    rows += _copies("GPU to GPU", (0.07, 0.68, 398), both_ms, None, f"{held}; the engine moves no bytes for a hit")
    raw, cached = profile.allocation.raw.ns / 1e6, profile.allocation.cached.ns / 1e6
    unpaid = f"{held}; no access pays for it, for experts reuse each other's room"
    for name, published, ours in (("one", 0.05, raw), ("ten", 0.36, raw + (_TEN - 1) * cached)):
        rows.append(Row(f"allocation, {name}", "ms", _rounding_to(published, 0.01), ours, None, None, unpaid))
    return [row.data() for row in rows]


def _copies(
    name: str,
    published: tuple[float, float, float],
    ours_ms: tuple[float, float],
    lane_ms: list[float] | None,
    why: str,
) -> list[Row]:
    """Returns the rows of one direction: one copy, ten, and MiB/ms of ten; published, charged and on the lane."""
    one, ten, rate = published
    mib = _TEN * _EXPERT_MIB
    ours_rate = mib / ours_ms[1]
    lane: tuple[float | None, ...] = (None, None, None) if lane_ms is None else (*lane_ms, mib / lane_ms[1])
    rates = _rounding_to(rate, 0.1 if rate < 100 else 1)
    rate_why = f"{mib:g} MiB over the time of ten; the published {ten} ms gives {mib / ten:.4g} MiB/ms"
    return [
        Row(f"{name}, one", "ms", _rounding_to(one, 0.01), ours_ms[0], ours_ms[0], lane[0], why),
        Row(f"{name}, ten", "ms", _rounding_to(ten, 0.01), ours_ms[1], ours_ms[1], lane[1], why),
        Row(f"{name}, throughput", "MiB/ms", rates, ours_rate, ours_rate, lane[2], rate_why),
    ]


def _on_lane_ms(count: int) -> float:
    """Returns how long the engine's copy lane is busy with so many experts, demanded together."""
    scenario = InferenceConfig(num_simulation_tokens=1, num_layers=1, prefetch_k=0).scenario(top_k=count)
    copies = simulate(scenario, baselines=False).recording.copy_spans
    return int(copies["end_ns"].max() - copies["start_ns"].min()) / 1e6


def _rounding_to(value: float, digit: float) -> tuple[float, float]:
    """Returns the bounds of what is written as `value` to the last `digit`."""
    return round(value - digit / 2, 6), round(value + digit / 2, 6)


def inference() -> list[dict[str, Any]]:
    """Returns the guide's inference simulation, and what its formula gives for its prediction accuracy."""
    profile = load_profile(_PROFILE)
    rows = []
    workloads = [*_workloads()]
    if _ships("guide-predictor"):
        workload, config = workloads[-1]
        workloads.append((workload, replace(config, predictor="guide-predictor")))
    for workload, config in workloads:
        metrics = _ran(config)
        rows.append(
            Row(f"speed-up, {config.predictor} on {workload}", "x", SPEEDUP, *_speedups(metrics), _speedup_why(metrics))
        )
    theory = _formula_speedup(profile, ACCURACY)
    why = (
        f"miss / (miss - {ACCURACY:.2%} x (miss - hit)), every copy ahead hidden; {THEORETICAL_SPEEDUP}x needs a hit "
        f"rate of {_rate_for(profile, THEORETICAL_SPEEDUP):.1%}"
    )
    bounds = _rounding_to(THEORETICAL_SPEEDUP, 0.1)
    rows.append(Row("speed-up, theoretical", "x", bounds, theory, None, None, why))
    return [row.data() for row in rows]


def _speedup_why(metrics: dict[str, Any]) -> str:
    profile = load_profile(_PROFILE)
    low, high = (_rate_for(profile, speedup) for speedup in SPEEDUP)
    accesses, copies = metrics["accesses"], metrics["event_counts"]["prefetch"]
    copied_ms = metrics["total_prefetch_time_ms"] / accesses
    saved_ms = metrics["hit_rate"] * (_miss_ms(profile) - _hit_ms(profile))
    return (
        f"hit rate {metrics['hit_rate']:.1%}; {SPEEDUP[0]}-{SPEEDUP[1]}x need {low:.0%}-{high:.0%}. An access brings "
        f"{copies / accesses:.1f} guesses, {copied_ms:.1f} ms of copies that save {saved_ms:.2f} ms: hidden, they are "
        "free; charged, or on a link that is busy (and pageable, so that the host waits too), they cost what they take"
    )


def context_length() -> list[dict[str, Any]]:
    """Returns speed-up by how many tokens back a predictor looks, and which does best; published is only that 3 does.

    It rests on the predictor "context", which learns as it goes; and, where docs/predictors.json has them, on the
    trained predictor's scores for each context.
    """
    rows = []
    for workload, config in _workloads():
        config = replace(config, predictor="context")
        runs = {length: _ran(replace(config, context_length=length)) for length in CONTEXTS}
        for length, metrics in runs.items():
            found = f"{metrics['prediction_accuracy']:.2%} of the experts used were among {config.prefetch_k} guesses"
            rows.append(Row(f"speed-up, context {length} on {workload}", "x", None, *_speedups(metrics), found))
        rest = f"on the mixture predictor that learns from the {config.num_simulation_tokens} tokens as they come"
        if config.trace is None:
            rest += "; this workload remembers one token, so that there is nothing farther back to find"
        by_length = {length: metrics["speedup"] for length, metrics in runs.items()}
        rows.append(_best_context(f"best context, mixture on {workload}", by_length, f"speed-up; rests {rest}"))
    return [row.data() for row in [*rows, *_trained_contexts()]]


def _trained_contexts() -> Iterator[Row]:
    """Yields the trained predictor's scores by context, from the project's own evaluation, if it is there."""
    report = _evaluation().get("gpt-oss-20b contexts")
    if report is None:
        return
    by_length = {int(length): scores["horizons"][0] for length, scores in report["context"].items()}
    for length, scores in sorted(by_length.items()):
        recalls = ", ".join(f"recall@{n} {recall:.2%}" for n, recall in scores["recall"].items())
        yield Row(f"top-1, trained, context {length}", "%", None, scores["top1"], None, None, f"{recalls}, next layer")
    rest = "top-1 for the next layer; rests on held-out routing of gpt-oss-20b (docs/predictors.json), not on time"
    yield _best_context("best context, trained", {n: scores["top1"] for n, scores in by_length.items()}, rest)


def _best_context(name: str, by_length: dict[int, float], what: str) -> Row:
    best = max(by_length, key=lambda length: by_length[length])
    ahead = by_length[best] / by_length[BEST_CONTEXT] - 1
    spread = max(by_length.values()) / min(by_length.values()) - 1
    why = f"by {what}. It is {ahead:.2%} better than {BEST_CONTEXT}; best and worst of all are {spread:.2%} apart"
    return Row(name, "tokens", (BEST_CONTEXT, BEST_CONTEXT), best, None, None, why)


def caching() -> list[dict[str, Any]]:
    """Returns what caching adds to the speed-up of the guide's configuration."""
    rows = []
    for workload, config in _workloads():
        cached, dropped = _ran(config), _ran(replace(config, enable_caching=False))
        ours, charged, overlapped = (a / b - 1 for a, b in zip(_speedups(cached), _speedups(dropped), strict=True))
        brought = (cached["event_counts"]["prefetch"] + cached["event_counts"]["miss"]) / cached["accesses"]
        slots = int(config.gpu_memory_limit_mb // config.expert_size_mb)
        why = (
            f"cache hits are {cached['cache_hit_rate']:.2%} of accesses: {brought:.1f} experts come in an access, so "
            f"that {slots} slots remember {slots / brought:.1f} accesses, and a layer comes round after "
            f'{config.num_layers}. "About 20 %" is taken as 15-25 %'
        )
        bounds = (CACHING_GAIN - 0.05, CACHING_GAIN + 0.05)
        rows.append(
            Row(f"gain by caching, {config.predictor} on {workload}", "%", bounds, ours, charged, overlapped, why)
        )
    return [row.data() for row in rows]


def memory_overhead() -> list[dict[str, Any]]:
    """Returns the predictor's memory as a share of the model's experts."""
    config = InferenceConfig()
    total_bytes = load_model(config.model).total_expert_bytes
    layers, experts, parts = config.num_layers, config.num_experts, config.context_length + 2
    sizes = {
        "transition": (4 * layers * experts**2, "its counts, 4 bytes for every pair of experts of neighboring layers"),
        "context": (4 * layers * parts * experts**2, f"its counts, 4 bytes for every pair and each of {parts} parts"),
    }
    for scores in _evaluation().get("guide", {}).get("predictors", []):
        if scores["memory_bytes"] is not None:
            sizes[scores["name"]] = scores["memory_bytes"], "its weights, 2 bytes each (docs/predictors.json)"
    published_mib = PREDICTOR_SHARE * total_bytes / _MIB
    return [
        Row(f"memory of predictor {name}", "%", _rounding_to(PREDICTOR_SHARE, 0.0001), size / total_bytes, None, None,
            f"{what}: {size / _MIB:.2f} MiB of {total_bytes / _MIB:,.0f} MiB of experts; the published share is "
            f"{published_mib:.0f} MiB").data()
        for name, (size, what) in sizes.items()
    ]  # fmt: skip


def contradictions() -> list[dict[str, Any]]:
    """Returns what the guide states twice, differently: both figures, how far apart and which one the profile holds."""
    profile = load_profile(_PROFILE)
    assert profile.d2d is not None and profile.allocation is not None
    h2d = profile.h2d["pageable"]
    miss_ms, ten_ms = _miss_ms(profile), (h2d.alone.ns(_EXPERT_BYTES) + 9 * h2d.queued.ns(_EXPERT_BYTES)) / 1e6
    by_latency, by_accuracy = miss_ms / 2.4, _formula_speedup(profile, ACCURACY)
    _, metrics = in_guides_accounting(load_inputs(InferenceConfig(prediction_accuracy=ACCURACY).scenario()))
    rows = [
        ("GPU to GPU over CPU to GPU", "x", 2.7, 49.0, miss_ms / _hit_ms(profile),
         f"its table's {miss_ms} and {_hit_ms(profile)} ms for one expert give the second"),
        ("CPU to GPU, ten experts", "ms", 2.74, 40.73, ten_ms,
         f"2.74 ms would be {_TEN * _EXPERT_BYTES / 2.74e6:.0f} GB/s, more than the 31.5 GB/s of PCIe 4.0 x16"),
        ("allocation, one expert", "ms", 1.0, 0.05, profile.allocation.raw.ns / 1e6,
         "it is charged to no access, so nothing simulated depends on it"),
        ("speed-up of k=10, 2 GB", "x", SPEEDUP[0], by_latency, metrics["speedup"],
         f"its simulation has 1.8-2.2x, its mean latency of 2.4 ms is {by_latency:.2f}x by a miss of {miss_ms} ms"),
        ("speed-up at 33.86 %", "x", THEORETICAL_SPEEDUP, by_accuracy, metrics["speedup"],
         "its theory has 2.1x, its own miss and hit at its accuracy give the other, copies ahead being free in both"),
    ]  # fmt: skip
    return [
        {"name": name, "unit": unit, "statements": [one, other], "apart": max(one, other) / min(one, other),
         "ours": ours, "why": why}
        for name, unit, one, other, ours, why in rows
    ]  # fmt: skip


def _workloads() -> Iterator[tuple[str, InferenceConfig]]:
    """Yields the workloads of the inference tables: the guide scenarios', and routing recorded from our own model."""
    yield "the synthetic trace", InferenceConfig(prediction_accuracy=ACCURACY)
    if _ships("guide"):
        yield "recorded routing", InferenceConfig(prediction_accuracy=ACCURACY, trace="guide")


def _ships(name: str) -> bool:
    """Whether a trace or weights of this name come with the package."""
    return (resources.files("prestage") / "workloads" / "data" / f"{name}.safetensors").is_file()


def _ran(config: InferenceConfig) -> dict[str, Any]:
    """Returns the metrics of a run."""
    return InferenceSimulator(config).run_simulation()


def _speedups(metrics: dict[str, Any]) -> tuple[float, float, float]:
    return metrics["speedup"], metrics["copies_charged"]["speedup"], metrics["overlapped"]["speedup"]


def _miss_ms(profile: Profile) -> float:
    return profile.h2d["pageable"].alone.ns(_EXPERT_BYTES) / 1e6


def _hit_ms(profile: Profile) -> float:
    assert profile.d2d is not None
    return profile.d2d.alone.ns(_EXPERT_BYTES) / 1e6


def _formula_speedup(profile: Profile, hit_rate: float) -> float:
    """Returns the guide's speed-up of a hit rate: a miss each over misses and hits, nothing else taking time."""
    miss_ms = _miss_ms(profile)
    return miss_ms / (miss_ms - hit_rate * (miss_ms - _hit_ms(profile)))


def _rate_for(profile: Profile, speedup: float) -> float:
    """Returns the hit rate that a speed-up needs by that formula."""
    miss_ms = _miss_ms(profile)
    return (miss_ms - miss_ms / speedup) / (miss_ms - _hit_ms(profile))


def _evaluation() -> dict[str, Any]:
    """Returns the scores of our trained predictors, from docs/predictors.json; empty where it is not there."""
    path = resources.files("prestage") / "docs" / "predictors.json"
    report: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return report


TABLES: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "transfers": transfers,
    "virtual-memory": virtual_memory,
    "inference": inference,
    "context-length": context_length,
    "caching": caching,
    "memory-overhead": memory_overhead,
    "contradictions": contradictions,
}


def reproduce(names: Sequence[str] = ()) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of published tables by name, all of them without a name; ValueError for an unknown one."""
    for name in names:
        if name not in TABLES:
            raise InputError(unknown_name("TABLE", name, TABLES))
    return {name: TABLES[name]() for name in names or TABLES}
