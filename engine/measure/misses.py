"""The misses of a run that were not fetched: how many, their gate weight, and the time that the CPU took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...resources.timeline import CPU_EXPERT, DECOMPRESS
from ...workloads.model import Model
from ..costs.costs import Costs
from ..costs.offload_costs import CpuCosts
from ..policies.miss import BY_CPU, FETCHED, WAYS
from ..scenario.inputs import Inputs
from ..scenario.scenario import Scenario
from ..scenario.sections_memory import shrunk
from .recording import MISS, Recording
from .time_split import cpu_stall_ns


def offloading_metrics(
    recordings: Sequence[Recording], costs: Sequence[Costs], scenario: Scenario, low_precision_bytes: int
) -> dict[str, Any]:
    """Returns what a run says beyond others where its misses are not all fetched, or its experts are in fewer bytes.

    Of all its GPUs: `miss` (see `miss_metrics`), with the bytes that low-precision copies hold; `decompress_ms`;
    `precision_mass`.
    """
    data: dict[str, Any] = {}
    if scenario.miss.policy != "fetch":
        data["miss"] = {
            **miss_metrics(recordings, costs, scenario),
            "low_precision_bytes": low_precision_bytes,
        }
    if scenario.compression.where != "none":
        data["decompress_ms"] = sum(map(decompress_ms, recordings))
    if scenario.compression.mixed is not None:
        models = [own.model for own in costs]
        data["precision_mass"] = precision_mass(recordings, models, scenario.compression.mixed)
    return data


def miss_metrics(recordings: Sequence[Recording], costs: Sequence[Costs], scenario: Scenario) -> dict[str, Any]:
    """Returns what became of the misses of all GPUs, as plain data for JSON.

    `ways` split counts.miss; `tokens` are (token, expert) pairs, and `gate_mass` their share of all gate weight, by way
    (None where the trace has no weights); a partly skipped expert counts in these two, and as fetched in `ways`.
    """
    resolved = np.concatenate([recording.resolved for recording in recordings])
    whole = np.concatenate([recording.resolved_accesses for recording in recordings])
    misses = sum(int((recording.outcomes == MISS).sum()) for recording in recordings)
    ways = _by_way(np.bincount(whole["way"], minlength=len(WAYS)).tolist())
    ways[WAYS[FETCHED]] = misses - len(whole)
    total = gate_mass(recordings)
    mass = None
    if total is not None and total.any():
        mass = {name: float(total_of / total.sum()) for name, total_of in _summed(resolved, "gate").items()}
    data: dict[str, Any] = {
        "policy": scenario.miss.policy,
        "ways": ways,
        "tokens": {name: int(tokens) for name, tokens in _summed(resolved, "tokens").items()},
        "gate_mass": mass,
        "by_layer": _by_layer(recordings, total),
    }
    if np.isin(resolved["way"], BY_CPU).any():
        data["cpu"] = _cpu(recordings, costs, scenario)
    return data


def routing_metrics(inputs: Inputs) -> dict[str, Any]:
    """Returns what routing that knows the cache changed: the share of choices, and of gate weight that is left."""
    made = inputs.rerouted
    assert made is not None
    return {
        "policy": inputs.scenario.routing.policy,
        "changed": made.changed / made.choices if made.choices else 0.0,
        "gate_mass": made.gate_after / made.gate_before if made.gate_before else None,
    }


def gate_mass(recordings: Sequence[Recording]) -> npt.NDArray[np.float64] | None:
    """Returns the gate weight of all that was looked up, by layer (layers,); None where the trace has no weights."""
    if recordings[0].trace.weights is None:
        return None
    total = np.zeros(max(recording.first_layer + recording.trace.layers for recording in recordings))
    for recording in _of_layers(recordings):
        first, layers = recording.first_layer, recording.trace.layers
        total[first : first + layers] += _routed(recording).reshape(layers, -1).sum(axis=1)
    return total


def _of_layers(recordings: Sequence[Recording]) -> list[Recording]:
    """Returns one recording for each group of layers of each replica: GPUs that share experts have the same steps."""
    return list({(recording.first_layer, id(recording.steps)): recording for recording in recordings}.values())


def precision_mass(
    recordings: Sequence[Recording], models: Sequence[Model], mixed: Sequence[Sequence[float]]
) -> dict[str, float]:
    """Returns the share of all gate weight (of all tokens, without weights) that experts of each ratio computed.

    `models` are of each GPU's layers. `mixed` are [share, ratio] pairs; the keys are the ratios as they are written.
    """
    of_ratio = dict.fromkeys((f"{ratio:g}" for _, ratio in mixed), 0.0)
    all_routed = 0.0
    known = {recording.first_layer: model for recording, model in zip(recordings, models, strict=True)}
    for recording in _of_layers(recordings):
        model = known[recording.first_layer]
        routed, sizes = _routed(recording), np.array(recording.manager.size_of)
        all_routed += float(routed.sum())
        whole = np.repeat(model.expert_bytes, model.experts)
        for ratio in dict.fromkeys(ratio for _, ratio in mixed):
            here = sizes == np.array([shrunk(int(size_bytes), ratio) for size_bytes in whole])
            of_ratio[f"{ratio:g}"] += float(routed[here].sum())
    return {name: total / all_routed if all_routed else 0.0 for name, total in of_ratio.items()}


def _routed(recording: Recording) -> npt.NDArray[np.float64]:
    """Returns the gate weight that was routed to each expert (layers * experts,); tokens where there are no weights."""
    trace = recording.trace
    rows = np.concatenate([*(step.rows for step in recording.steps), np.zeros(0, np.int64)])  # a replica may have none
    ids = trace.experts[rows].astype(np.int64) + np.arange(trace.layers)[:, None] * trace.num_experts
    weights = np.ones(ids.shape) if trace.weights is None else trace.weights[rows].astype(np.float64)
    if trace.made is not None:
        weights = weights * trace.made[rows]
    experts = trace.layers * trace.num_experts
    return np.bincount(ids.ravel(), weights=weights.ravel(), minlength=experts).astype(np.float64)


def decompress_ms(recording: Recording) -> float:
    """Returns how long decompressing took, in all."""
    spans = recording.spans[recording.spans["kind"] == DECOMPRESS]
    return float((spans["end_ns"] - spans["start_ns"]).sum()) / 1e6


def _by_way(numbers: list[Any]) -> dict[str, Any]:
    return dict(zip(WAYS, numbers, strict=True))


def _summed(resolved: npt.NDArray[Any], column: str) -> dict[str, Any]:
    """Returns the sum of a column by way, but for what was fetched."""
    sums = np.bincount(resolved["way"], weights=resolved[column], minlength=len(WAYS)).tolist()
    return {name: value for way, (name, value) in enumerate(_by_way(sums).items()) if way != FETCHED}


def _by_layer(recordings: Sequence[Recording], total: npt.NDArray[np.float64] | None) -> list[dict[str, Any]]:
    """Return, layer by layer, the (token, expert) pairs of each way and the share of the layer's gate weight."""
    rows = []
    layers = max(recording.first_layer + len(recording.expert_bytes) for recording in recordings)
    resolved = np.concatenate([recording.resolved for recording in recordings])
    layer_of = np.concatenate([
        recording.first_layer + recording.resolved["visit"] % len(recording.expert_bytes) for recording in recordings
    ])  # fmt: skip
    for layer in range(layers):
        here = resolved[layer_of == layer]
        row: dict[str, Any] = {"layer": layer}
        row.update((name, int(tokens)) for name, tokens in _summed(here, "tokens").items())
        for name, mass in _summed(here, "gate").items():
            row[f"{name}_gate_mass"] = float(mass / total[layer]) if total is not None and total[layer] else None
        rows.append(row)
    return rows


def _cpu(recordings: Sequence[Recording], costs: Sequence[Costs], scenario: Scenario) -> dict[str, Any]:
    """Returns how busy the CPU was, how long the GPU stalled for it, and what its experts would have cost to fetch.

    Of several GPUs the stall is the mean, as that of `time` is. `cpu_ms` and `fetch_ms` are the profile's, by
    themselves; `fetch_is_shorter` for all of them says that no expert was done sooner on the CPU.
    """
    busy_ns = cpu_ns = fetch_ns = shorter = 0
    for recording, own in zip(recordings, costs, strict=True):
        cpu, spans = CpuCosts(own, scenario), recording.spans[recording.spans["kind"] == CPU_EXPERT]
        busy_ns += int((spans["end_ns"] - spans["start_ns"]).sum())
        rows = recording.resolved[np.isin(recording.resolved["way"], BY_CPU)]
        layers = (rows["visit"] % len(recording.expert_bytes)).tolist()
        for (layer, tokens), count in Counter(zip(layers, rows["tokens"].tolist(), strict=True)).items():
            on_cpu_ns = cpu.expert(layer, tokens).ns + cpu.there_and_back_ns(tokens)
            fetched_ns = own.copies[layer].queued_ns + own.expert(layer, tokens).ns
            cpu_ns += count * on_cpu_ns
            fetch_ns += count * fetched_ns
            shorter += count * (fetched_ns <= on_cpu_ns)
    return {
        "busy_ms": busy_ns / 1e6,
        "stall_ms": sum(map(cpu_stall_ns, recordings)) / len(recordings) / 1e6,
        "cpu_ms": cpu_ns / 1e6,
        "fetch_ms": fetch_ns / 1e6,
        "fetch_is_shorter": shorter,
    }
