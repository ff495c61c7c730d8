"""A published run that logged its time token by token: fit a machine's costs to its beginning, predict the rest.

The log is the per-token CSV of BigMoeOnEdge (`--csv`, described in docs/telemetry.md of that project): wall, compute,
stall, management and I/O time and bytes read of every decoded token. Each cost comes from the one column that shows
it, and what is left of the wall time, the wait for reads that compute does not cover, from a search by simulation. Of
tokens after those it is asked to fit, the fit sees neither times nor routing.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...bounded import read
from ...engine.costs.costs import part_costs
from ...engine.load import load_inputs
from ...engine.measure.merge import served
from ...engine.measure.recording import Recording
from ...engine.measure.speed import Serving, decode_times_ns
from ...engine.run import prepared, run_all
from ...engine.scenario.amounts import ScenarioError
from ...engine.scenario.inputs import Inputs
from ...engine.scenario.scenario import Scenario
from ...errors import InputError
from ...resources.profile import Profile
from ...units import bytes_words

Array = npt.NDArray[np.float64]

#: The columns of a log that are needed; others are left alone.
COLUMNS = ("wall_ms", "io_ms", "compute_ms", "read_bytes", "stall_ms", "mgmt_ms")
#: Tokens per batch of MSER-5, and how far beyond the quartiles, in interquartile ranges, Tukey calls a value far out.
MSER_BATCH, FAR_OUT = 5, 3.0
#: The bytes that a scenario reads may differ by this share from those that the log says.
BYTES_TOLERANCE = 0.01
#: The longest wait of compute for a thread to wake up that the search considers, and how closely it looks, in ns.
LONGEST_WAKE_NS, WAKE_STEP_NS = 2_000_000, 100


#: More ms, or bytes, than this no token takes.
_MOST = 1e15


class PublishedRunError(InputError):
    """A log that cannot be read, or that is not of this scenario."""


@dataclass(frozen=True)
class RunLog:
    """The columns of a log by name, each (tokens,)."""

    path: Path
    columns: Mapping[str, Array]

    def __len__(self) -> int:
        return len(self.columns["wall_ms"])

    def first(self, tokens: int) -> RunLog:
        """Returns the first tokens alone. Raises PublishedRunError if there are not so many."""
        if not 2 * MSER_BATCH <= tokens <= len(self):
            raise PublishedRunError(
                f"{self.path}: {tokens} tokens asked for: must be {2 * MSER_BATCH} to the {len(self)} that it logs"
            )
        return RunLog(self.path, {name: column[:tokens] for name, column in self.columns.items()})


def load_log(path: Path) -> RunLog:
    """Read a log; raise PublishedRunError naming file, line and column."""
    try:
        lines = read(path, PublishedRunError).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PublishedRunError(f"{path}: cannot be read: {error}") from None
    rows = csv.DictReader(line for line in lines if line.strip() and not line.startswith("#"))
    try:
        missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
    except csv.Error as error:
        raise PublishedRunError(f"{path}: no CSV: {error}") from None
    if missing:
        raise PublishedRunError(f"{path}: column {missing[0]}: missing: must be a CSV with {', '.join(COLUMNS)}")
    columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for number, row in enumerate(_rows(path, rows), 1):
        for name, column in columns.items():
            try:
                column.append(float(row[name]))
            except (TypeError, ValueError):
                raise PublishedRunError(f"{path}: token {number}: {name} = {row[name]!r}: must be a number") from None
            if not 0 <= column[-1] <= _MOST:
                raise PublishedRunError(
                    f"{path}: token {number}: {name} = {row[name]!r}: must be at least 0, at most {_MOST:g}"
                )
            if name == "wall_ms" and not column[-1]:
                raise PublishedRunError(f"{path}: token {number}: wall_ms = {row[name]!r}: must be above 0")
    return RunLog(path, {name: np.array(column) for name, column in columns.items()})


def _rows(path: Path, rows: csv.DictReader[str]) -> Iterator[dict[str, str]]:
    try:
        yield from rows
    except csv.Error as error:
        raise PublishedRunError(f"{path}: no CSV: {error}") from None


def warm_up(series: Array) -> int:
    """Returns how many values at the beginning to leave out, so that the mean of the rest is known best.

    MSER-5: of batches of five, drop those without which the squared standard error of the rest is least; at most half
    (White, "An effective truncation heuristic for bias reduction in simulation output", Simulation 69, 1997).
    """
    batches = series[: len(series) // MSER_BATCH * MSER_BATCH].reshape(-1, MSER_BATCH).mean(axis=1)
    errors = [float(batches[at:].var()) / (len(batches) - at) for at in range(len(batches) // 2 + 1)]
    return int(np.argmin(errors)) * MSER_BATCH


def interrupted(compute_ms: Array) -> npt.NDArray[np.bool_]:
    """Returns which tokens took far longer than the others: beyond Tukey's outer fence (1977), q3 + 3 (q3 - q1)."""
    low, high = np.percentile(compute_ms, (25, 75))
    far: npt.NDArray[np.bool_] = compute_ms > high + FAR_OUT * (high - low)
    return far


@dataclass(frozen=True)
class FittedRun:
    """A profile fitted to the beginning of a run, and what the fit came to, by name."""

    profile: Profile
    terms: dict[str, float]


def fit_run(scenario: Scenario, log: RunLog, tokens: int, name: str) -> FittedRun:
    """Fit the costs of the scenario's machine to the first `tokens` tokens of a log, and call the profile `name`.

    What is not fitted (the link between the tiers, free launches) stays as the scenario's profile has it; its lanes are
    those that the scenario reads with. Raises ValueError, PublishedRunError among them, if scenario and log are not of
    one run.
    """
    log = log.first(tokens)
    inputs = load_inputs(_with_tokens(scenario, tokens))
    warm = slice(warm_up(log.columns["read_bytes"]), None)
    column = {key: values[warm] for key, values in log.columns.items()}
    reads, read_bytes = _reads(_play(inputs), tokens)
    _check_bytes(log, read_bytes)
    reads, read_bytes = reads[warm], read_bytes[warm]
    far = interrupted(column["compute_ms"])
    quiet_ms = float(column["compute_ms"][~far].mean())
    totals = {"compute_ms": quiet_ms, **{key: column[key].sum() for key in ("read_bytes", "io_ms")}}
    for key, total in totals.items():
        if not total:
            raise PublishedRunError(
                f"{log.path}: {key}: 0 from token {warm.start + 1} to {tokens}, interruptions aside: "
                "must be more, a rate is fitted to it"
            )
    excess_ms = column["compute_ms"][far] - quiet_ms
    assert inputs.profile.nvme is not None  # else it does not load
    costs: dict[str, Any] = {
        "lanes": inputs.scenario.tiers.io_lanes or inputs.profile.nvme.lanes,
        "lane_bytes_per_second": round(read_bytes.sum() / column["io_ms"].sum() * 1e3),
        "order_ns": round(column["mgmt_ms"].sum() / reads.sum() * 1e6),
        "weight_bytes_per_second": round(_weight_bytes(inputs) / quiet_ms * 1e3),
        "interruptions": int(far.sum()),
        "interruption_ns": round(excess_ms.mean() * 1e6) if far.any() else 0,
        "every_ns": round(column["wall_ms"].sum() / max(1, far.sum()) * 1e6),
    }
    wanted_ms = float(column["wall_ms"].mean()) - float(excess_ms.sum()) / len(far)

    def simulated_ms(wake_ns: int) -> float:
        profile = _profile(inputs.profile, {**costs, "wake_ns": wake_ns, "interruptions": 0}, name)
        return float(_step_ms(_play(inputs, profile))[warm].mean())

    costs["wake_ns"] = _search(simulated_ms, wanted_ms)
    return FittedRun(_profile(inputs.profile, costs, name), {"warm_up_tokens": warm.start, **costs})


def _search(simulated_ms: Callable[[int], float], wanted_ms: float) -> int:
    """Returns the wake-up time in ns with which the simulated mean is nearest to the wanted one."""
    low, high = 0, LONGEST_WAKE_NS
    while high - low > WAKE_STEP_NS:
        middle = (low + high) // 2
        low, high = (middle, high) if simulated_ms(middle) < wanted_ms else (low, middle)
    return low


def _profile(base: Profile, costs: Mapping[str, Any], name: str) -> Profile:
    """Returns the profile with the fitted costs in place of its own."""

    def fitted(note: str, **values: Any) -> dict[str, Any]:
        return {**values, "source": "fitted", "note": note, "device": None}

    data = base.model_dump(exclude_none=True)
    data["name"] = name
    compute, nvme = data["compute"], data["nvme"]
    compute["rule"] |= fitted(
        "weight bytes of a token / mean compute time of a token that nothing interrupted; FLOP/s are assumed",
        bytes_per_second=costs["weight_bytes_per_second"],
    )
    compute["event_wait_gap"] = fitted(
        "from the end of a read to the compute that waited for it: makes the simulated mean time of a token that "
        "nothing interrupted the logged one",
        ns=costs["wake_ns"],
    )
    compute.pop("interruptions", None)
    if costs["interruptions"]:
        compute["interruptions"] = fitted(
            f"{costs['interruptions']} tokens whose compute time is far out (beyond q3 + 3 IQR): their mean excess, "
            f"and the time of all tokens / their number",
            every_ns=costs["every_ns"],
            ns=costs["interruption_ns"],
        )
    nvme.pop("queue_depth", None)  # what so many lanes share is in the rate of one
    nvme["lanes"] = costs["lanes"]
    nvme["read"] = fitted(
        "bytes read / time that the lanes were busy; requests are all about as large, so none of it shows as latency",
        latency_ns=0,
        bytes_per_second=costs["lane_bytes_per_second"],
    )
    nvme["order"] = fitted("management time (room made, pages committed, read ordered) / reads", ns=costs["order_ns"])
    return Profile.model_validate(data)


def check_run(scenario: Scenario, log: RunLog, after: int) -> dict[str, Any]:
    """Simulate a published run and compare its tokens beyond `after` with the log; return plain data for JSON.

    Errors are relative: `median_abs_error` of single tokens, `mean_error` of their mean. `line` is what a straight
    line in bytes read scores that is fitted to the tokens up to `after`. `mean_se` is how far the mean of so many
    logged tokens is off by chance (standard deviation / sqrt(tokens)), relative.
    """
    log.first(after)
    if after >= len(log):
        raise PublishedRunError(f"{log.path}: it logs {len(log)} tokens: nothing is left after {after} to compare")
    inputs = load_inputs(_with_tokens(scenario, len(log)))
    recording = _play(inputs)
    _, read_bytes = _reads(recording, len(log))
    _check_bytes(log, read_bytes)
    step_ms, wall_ms = _step_ms(recording), log.columns["wall_ms"]
    slope, intercept = np.polyfit(log.columns["read_bytes"][:after], wall_ms[:after], 1)
    line_ms = intercept + slope * log.columns["read_bytes"]
    rest = slice(after, None)
    return {
        "tokens": len(log) - after,
        "logged_ms": float(wall_ms[rest].mean()),
        "simulated_ms": float(step_ms[rest].mean()),
        **_errors(step_ms[rest], wall_ms[rest]),
        "line": _errors(line_ms[rest], wall_ms[rest]),
        "mean_se": float(wall_ms[rest].std(ddof=1) / np.sqrt(len(log) - after) / wall_ms[rest].mean()),
        "parts_ms": _parts(recording, log, rest),
        "by_token_ms": [[float(logged), float(simulated)] for logged, simulated in zip(wall_ms, step_ms, strict=True)],
    }


def fit_text(fitted: FittedRun, tokens: int) -> str:
    """Returns the fitted costs, a line each, for people."""
    terms = fitted.terms
    lines = [
        f"{tokens} tokens, of which {terms['warm_up_tokens']:.0f} warm up and are left out:",
        f"  a lane reads               {terms['lane_bytes_per_second'] / 1e6:8.1f} MB/s",
        f"  weights are computed with  {terms['weight_bytes_per_second'] / 1e9:8.2f} GB/s",
        f"  to order a read takes      {terms['order_ns'] / 1e6:8.3f} ms",
        f"  to wake up behind it       {terms['wake_ns'] / 1e6:8.3f} ms",
        f"  interruptions, {terms['interruptions']:.0f} seen:   {terms['interruption_ns'] / 1e6:8.1f} ms "
        f"every {terms['every_ns'] / 1e9:.2f} s",
    ]
    return "\n".join(lines)


def check_text(report: Mapping[str, Any]) -> str:
    """Returns how well a run was predicted, a line each, for people."""
    rows = [("this simulation", report), ("a straight line in bytes read", report["line"])]
    lines = [
        f"{report['tokens']} tokens: {report['logged_ms']:.1f} ms each logged, {report['simulated_ms']:.1f} simulated",
        f"{'':30}{'median error of a token':>26}{'error of the mean':>20}",
    ]
    for name, errors in rows:
        lines.append(f"{name:30}{errors['median_abs_error']:>26.1%}{errors['mean_error']:>20.1%}")
    for name, (logged_ms, simulated_ms) in report["parts_ms"].items():
        lines.append(f"{name}: {logged_ms:.1f} ms logged, {simulated_ms:.1f} simulated")
    lines.append(f"by chance alone the logged mean is off by {report['mean_se']:.1%} (one standard error)")
    return "\n".join(lines)


def _errors(predicted_ms: Array, logged_ms: Array) -> dict[str, float]:
    return {
        "median_abs_error": float(np.median(np.abs(predicted_ms / logged_ms - 1))),
        "mean_error": float(predicted_ms.mean() / logged_ms.mean() - 1),
    }


def _parts(recording: Recording, log: RunLog, rest: slice) -> dict[str, list[float]]:
    """Returns the mean of each part of a token's time, logged and simulated: compute, waiting for reads, management."""
    spans = recording.compute_spans
    step = spans["visit"] // len(recording.expert_bytes)
    busy_ns = np.bincount(step, weights=spans["end_ns"] - spans["start_ns"], minlength=len(recording.steps))
    compute_ms = busy_ns[-len(log) :] / 1e6
    waits_ms = _step_ms(recording) - compute_ms
    logged = log.columns
    return {
        "compute": [float(logged["compute_ms"][rest].mean()), float(compute_ms[rest].mean())],
        "stall and management": [
            float((logged["stall_ms"] + logged["mgmt_ms"])[rest].mean()),
            float(waits_ms[rest].mean()),
        ],
    }


def _with_tokens(scenario: Scenario, tokens: int) -> Scenario:
    if scenario.workload.batch != 1:
        raise ScenarioError(f"workload.batch = {scenario.workload.batch}: a log of tokens is of batch 1")
    return scenario.model_copy(update={"workload": scenario.workload.model_copy(update={"tokens": tokens})})


def _play(inputs: Inputs, profile: Profile | None = None) -> Recording:
    """Simulate, with another profile's costs if one is given."""
    inputs = replace(inputs, profile=profile or inputs.profile)
    costs = part_costs(inputs)
    if costs[0].reads is None:
        raise ScenarioError("tiers.host_budget = 'all': a run that reads experts from a drive has less of it")
    (recording,) = run_all(inputs, prepared(inputs, costs))
    return recording


def _step_ms(recording: Recording) -> Array:
    """Returns what each decode step, of one token, took from the end of the one before (tokens,)."""
    took_ms: Array = decode_times_ns(served([recording], Serving())) / 1e6
    return took_ms


def _reads(recording: Recording, tokens: int) -> tuple[Array, Array]:
    """Returns how many experts each decode step read, and their bytes (tokens,)."""
    layers = len(recording.expert_bytes)
    read = recording.copy_spans[recording.copied_bytes[recording.copy_spans["copy"]] > 0]
    step = read["visit"] // layers
    sizes = np.array(recording.expert_bytes, dtype=np.float64)[read["visit"] % layers]
    count, total = (
        np.bincount(step, weights=weights, minlength=len(recording.steps)).astype(np.float64)[-tokens:]
        for weights in (np.ones(len(step)), sizes)
    )
    return count, total


def _check_bytes(log: RunLog, read_bytes: Array) -> None:
    """Refuse a scenario whose cache is not that of the run."""
    logged = log.columns["read_bytes"][: len(read_bytes)]
    if len(logged) != len(read_bytes) or abs(read_bytes.sum() / logged.sum() - 1) > BYTES_TOLERANCE:
        raise PublishedRunError(
            f"{log.path}: read_bytes: {bytes_words(int(logged.sum()))} in {len(logged)} tokens, and the scenario reads "
            f"{bytes_words(int(read_bytes.sum()))} in {len(read_bytes)}: trace, budget and eviction must be the run's"
        )


def _weight_bytes(inputs: Inputs) -> int:
    """Returns the weight bytes that one decoded token is computed with."""
    model = inputs.model
    return sum(model.dense_bytes) + model.chosen_bytes + model.head_bytes
