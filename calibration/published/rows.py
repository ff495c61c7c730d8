"""Published runs of real engines, predicted blind: rows, each with its scenario, what was measured, and ours.

A source is a file in `published/`. Nothing is fitted to a row: a prediction comes from the parts of the machine, the
runtime's file, and drawn routing. Where a row states a share of look-ups that were found, the routing's reuse is tuned
to it under the row's capacity and policy, before any time is simulated. What cannot be run says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from ...bounded import parse_toml
from ...engine.costs.costs import Costs
from ...engine.costs.cpu_streams import cpu_stream
from ...engine.costs.offload_costs import CpuCosts
from ...engine.costs.ranges import drawn_costs
from ...engine.load import load_inputs
from ...engine.loading.deciders import dispatched, make_host_memory, make_manager, make_prefetch
from ...engine.prediction import DRAWS, Range, middles, percentiles
from ...engine.scenario.inputs import Inputs
from ...engine.scenario.scenario import Scenario, apply_setting, make_scenario
from ...engine.simulate import Result, simulate_inputs
from ...errors import InputError
from ...resources.facts import Part
from ...words import problems
from ...workloads.model import load_model

Unit = Literal["tokens/s", "s/token", "prompt tokens/s", "tokens/s of a request", "us of CPU experts", "GB/s together"]
#: The unit that divides the tokens of an answer by the time of the whole request, its prompt included.
_OF_REQUEST = "tokens/s of a request"
#: Units of which less is better.
_TIMES = ("s/token", "us of CPU experts")
#: Decode tokens of a row, and how many of them warm the cache up, if the row says nothing.
_TOKENS, _WARMUP = 48, "24tokens"
#: How often the interval of the routing's reuse is halved, and how near a stated share counts as met.
_HALVINGS, _NEAR = 9, 0.005
#: What any row begins with.
_BASE: dict[str, Any] = {
    "workload": {"synthetic": {"skew": 0.6, "reuse": 0.4}, "warmup": _WARMUP},
    "memory": {"capacity": "ignore"},
    "prefetch": {"lookahead": 0},
}
#: A machine that computes on its processor launches nothing.
_ON_CPU = (
    "runtime.name=prestage", "dispatch.mode=graph", "dispatch.expert_kernel=grouped", "dispatch.router_readback=false",
    "memory.preload=popular", "memory.gpu_budget=100%",
)  # fmt: skip


class PublishedError(InputError):
    """A table of published runs that cannot be read."""


class Row(Part):
    """One published figure: what ran, what was measured, in which unit, and how the scenario differs from its source's.

    `cpu_layers` are the first layers whose experts the CPU computes, or "all"; `prompt` the tokens of a prompt, which
    is computed in pieces of a `micro_batch`; `answer` the tokens of its answer, where the whole request was timed;
    `found` the share of look-ups that the source says were found; rows of one `group` are neighbors, whose order
    counts. `alone` are rates in GB/s of the CPU and of copies by themselves.
    `missing` says why a row cannot be run.
    """

    id: str
    what: str
    measured: float = Field(gt=0)
    unit: Unit = "tokens/s"
    runtime: str | None = None
    settings: tuple[str, ...] = ()
    cpu_layers: int | Literal["all"] | None = None
    prompt: int | None = Field(default=None, ge=1)
    micro_batch: int = Field(default=512, ge=1)
    answer: int | None = Field(default=None, ge=1)
    found: float | None = Field(default=None, ge=0, le=1)
    on_cpu: bool = False
    group: str | None = None
    alone: tuple[float, float] | None = None
    missing: str | None = None

    @model_validator(mode="after")
    def _names_its_request(self) -> Row:
        if self.unit == _OF_REQUEST and None in (self.prompt, self.answer):
            raise InputError(f"unit = {self.unit!r}: give the tokens of its prompt and of its answer")
        return self


class Source(Part):
    """A source of published rows, with what all of them run on, and what was assumed."""

    source: str
    runtime: str
    notes: str = ""
    settings: tuple[str, ...] = ()
    rows: tuple[Row, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Predicted:
    """What we say of a row: the figure and its range, the share found, and ours with the stated share.

    `reason` says why there is no figure. `scenario`: what ran, as sections of the keys that are not their defaults.
    """

    row: Row
    source: str
    value: float | None = None
    range: Range | None = None
    found: float | None = None
    reason: str | None = None
    scenario: Mapping[str, Any] | None = None

    @property
    def error(self) -> float | None:
        """Predicted over measured, less one."""
        return None if self.value is None else self.value / self.row.measured - 1

    @property
    def within(self) -> bool:
        """Whether what was measured lies between p5 and p95."""
        return self.range is not None and self.range.p5 <= self.row.measured <= self.range.p95

    def plain(self) -> dict[str, Any]:
        """Returns it as plain data."""
        spread = self.range
        return {
            "id": self.row.id,
            "source": self.source,
            "what": self.row.what,
            "unit": self.row.unit,
            "measured": self.row.measured,
            "predicted": self.value,
            "p5": None if spread is None else spread.p5,
            "p95": None if spread is None else spread.p95,
            "error": self.error,
            "within": self.within,
            "stated_found": self.row.found,
            "found": self.found,
            "reason": self.reason,
            "scenario": self.scenario,
        }


def source_names() -> list[str]:
    """Returns the names of the shipped sources."""
    return sorted(path.stem for path in _folder().iterdir() if path.suffix == ".toml")


def load_source(name: str) -> Source:
    """Returns a shipped source by its name. Raises PublishedError."""
    data = parse_toml((_folder() / f"{name}.toml").read_text("utf-8"), f"published {name}", PublishedError)
    try:
        return Source.model_validate(data)
    except ValidationError as error:
        raise PublishedError(f"published {name}: {problems(error, Source, data)}") from None


def predictions(names: Sequence[str] = (), draws: int = DRAWS) -> Iterator[Predicted]:
    """Yields what we say of every row of the named sources, or of all."""
    for name in names or source_names():
        source = load_source(name)
        for row in source.rows:
            yield predicted(row, source, draws)


def predicted(row: Row, source: Source, draws: int = DRAWS) -> Predicted:
    """Returns what we say of a row; a reason where it cannot be run."""
    if row.missing is not None:
        return Predicted(row, source.source, reason=row.missing)
    try:
        inputs = load_inputs(make_scenario(_plain(row, source), row.id))
        if row.found is not None:
            inputs = tuned(inputs, row.found)
        return replace(_measured_as(row, source.source, inputs, draws), scenario=_changed(inputs.scenario))
    except InputError as error:
        return Predicted(row, source.source, reason=str(error))


def _changed(scenario: Scenario) -> dict[str, Any]:
    """Returns the sections and keys of a scenario that are no defaults; files of the table by their names in it."""
    plain, usual = scenario.plain(), make_scenario({"workload": {"synthetic": {}}}).plain()
    changed = {
        name: {
            key: value.removeprefix(f"{_folder()}/") if isinstance(value, str) else value
            for key, value in keys.items()
            if key not in usual.get(name, {}) or usual[name][key] != value
        }
        for name, keys in plain.items()
        if isinstance(keys, Mapping)
    }
    return {name: keys for name, keys in changed.items() if keys}


def _plain(row: Row, source: Source) -> dict[str, Any]:
    """Returns a row's scenario as plain data."""
    data: dict[str, Any] = {key: dict(value) for key, value in _BASE.items()}
    data["workload"]["synthetic"] = dict(_BASE["workload"]["synthetic"], tokens=_TOKENS)
    apply_setting(data, f"runtime.name={_beside(row.runtime or source.runtime)}")
    for setting in (*source.settings, *(_ON_CPU if row.on_cpu else ()), *row.settings):
        key, _, value = setting.partition("=")
        apply_setting(data, f"{key}={_beside(value)}" if key == "model.preset" else setting)
    if row.cpu_layers is not None:
        model = load_model(**_model_of(data))
        layers = model.layers if row.cpu_layers == "all" else row.cpu_layers
        # One layer's experts more than stay there: what a large batch is copied to.
        room = (model.layers - layers + 1) * model.experts
        data["memory"] |= {"cpu_layers": layers, "preload": "layers", "gpu_budget": f"{room}experts"}
    if row.prompt is not None:
        # The prompt, then one token, or some that stand for the answer's; nothing warms up.
        decoded = 1 if row.answer is None else min(row.answer, _TOKENS)
        data["workload"]["synthetic"] |= {"tokens": row.prompt + decoded, "prefill_tokens": row.prompt}
        data["workload"] |= {
            "warmup": "0tokens",
            "prefill": "chunked",
            "chunk_tokens": min(row.prompt, row.micro_batch),
        }
    return data


def _model_of(data: Mapping[str, Any]) -> dict[str, Any]:
    section = dict(data["model"])
    return {"name_or_path": section.pop("preset"), **section}


def tuned(inputs: Inputs, found: float) -> Inputs:
    """Returns inputs whose drawn routing finds this share of look-ups under the scenario's capacity and policy.

    By halving the interval of its reuse. Where even routing without reuse finds more, that is what comes nearest: a row
    has what was found beside what was stated.
    """
    low, high = 0.0, 0.999
    best = inputs
    for _ in range(_HALVINGS):
        reuse = (low + high) / 2
        best = _with_reuse(inputs, reuse)
        share = found_share(best)
        if abs(share - found) < _NEAR:
            break
        low, high = (reuse, high) if share < found else (low, reuse)
    return best


def _with_reuse(inputs: Inputs, reuse: float) -> Inputs:
    data = inputs.scenario.plain()
    data["workload"]["synthetic"]["reuse"] = reuse
    return load_inputs(make_scenario(data))


def found_share(inputs: Inputs) -> float:
    """Returns the share of look-ups that find their expert, decided without a clock, behind the warmup.

    Where host memory is a cache over a drive, an expert is found that is read from no drive.
    """
    host = make_host_memory(inputs)
    visits = dispatched(inputs, make_manager(inputs), make_prefetch(inputs.scenario, inputs.model))
    missed = looked_up = read = 0
    first = inputs.model.layers * (len(inputs.steps) // 3)
    for visit in visits if host is None else host.through(visits):
        misses = sum(len(wave.admitted) for wave in visit.waves) if host is None else host.misses - read
        read = 0 if host is None else host.misses
        if visit.number >= first:
            looked_up += len(visit.accesses.experts)
            missed += misses
    return 1 - missed / max(1, looked_up)


def _measured_as(row: Row, source: str, inputs: Inputs, draws: int) -> Predicted:
    """Returns a row's figure in its unit, with its range."""
    if row.unit == "us of CPU experts":
        return _component(row, source, inputs, draws, _experts_us)
    if row.alone is not None:
        return _component(row, source, inputs, draws, _together)
    result = simulate_inputs(inputs, baselines=False)
    spread = result.range or {}
    name = "time_to_first_token_ms" if row.unit == "prompt tokens/s" else "tokens_per_second"
    value, band = middles(result.data)[name], spread.get(name)
    if row.unit == "prompt tokens/s":
        tokens = row.prompt or 1
        value, band = tokens * 1e3 / value, band and Range(*(tokens * 1e3 / each for each in reversed(band)))
    elif row.unit == _OF_REQUEST:
        value, band = _of_request(row.answer or 1, result)
    elif row.unit in _TIMES:
        value, band = 1 / value, band and Range(*(1 / each for each in reversed(band)))
    share = found_share(inputs) if row.found is not None else None
    return Predicted(row, source, value, band or Range(value, value, value), share)


def _of_request(answer: int, result: Result) -> tuple[float, Range | None]:
    """Returns the tokens of an answer a second of its request, and its range.

    The first token counts by its time, the rest by their rate.
    """

    def rate(first_ms: float, tokens_per_second: float) -> float:
        return answer / (first_ms / 1e3 + (answer - 1) / tokens_per_second)

    middle, spread = middles(result.data), result.range or {}
    value = rate(middle["time_to_first_token_ms"], middle["tokens_per_second"])
    first, decoding = spread.get("time_to_first_token_ms"), spread.get("tokens_per_second")
    if first is None or decoding is None:
        return value, None
    # Both are slow, or quick, together.
    return value, Range(*map(rate, reversed(first), decoding))


def _experts_us(row: Row, inputs: Inputs, costs: Costs) -> float:
    """Returns what the CPU takes for a token's experts of a layer."""
    model = inputs.model
    return model.top_k * CpuCosts(costs, inputs.scenario).expert(0, 1).ns / 1e3


def _together(row: Row, inputs: Inputs, costs: Costs) -> float:
    """Returns what CPU experts and copies reach together, in GB/s, given what each reaches alone."""
    assert row.alone is not None
    stream = cpu_stream(costs.own, costs.profile, inputs.scenario.miss)
    assert stream is not None
    cpu, copies = row.alone
    return (cpu + copies) / stream.beside(cpu * 1e9, copies * 1e9)


def _component(row: Row, source: str, inputs: Inputs, draws: int, of: Any) -> Predicted:
    values = [of(row, inputs, costs) for (costs,) in drawn_costs(inputs, draws)]
    return Predicted(row, source, of(row, inputs, Costs(inputs)), percentiles(values))


# What the table comes to.


def summary(rows: Sequence[Predicted]) -> dict[str, Any]:
    """Returns the table's figures, in which every source weighs the same."""
    weights = _weights(rows)
    known = [row for row in rows if row.error is not None]
    errors = [(abs(row.error or 0.0), weights[row.row.id]) for row in known]
    widths = [(row.range.p95 / row.range.p5, weights[row.row.id]) for row in known if row.range is not None]
    pairs = list(neighbors(known))
    return {
        "rows": len(rows),
        "not_run": [row.row.id for row in rows if row.error is None],
        "median_error": weighted_median(errors),
        "within_p5_p95": sum(weights[row.row.id] for row in rows if row.within),
        "median_width": weighted_median(widths),
        "interval_score": _mean_score(known, weights, _band),
        "interval_score_half_to_twice": _mean_score(known, weights, lambda row: (_value(row) / 2, _value(row) * 2)),
        "ordered": sum(right for _, _, right in pairs),
        "ordered_of": len(pairs),
        "wrong_order": [f"{first}, {second}" for first, second, right in pairs if not right],
        "beyond_twice": [row.row.id for row in known if not 0.5 <= _value(row) / row.row.measured <= 2],
    }


def _value(row: Predicted) -> float:
    """Returns what is predicted for a row that could be run."""
    assert row.value is not None
    return row.value


def _band(row: Predicted) -> tuple[float, float]:
    """Returns p5 and p95 of a row that could be run."""
    assert row.range is not None
    return row.range.p5, row.range.p95


def _weights(rows: Sequence[Predicted]) -> dict[str, float]:
    sources = {row.source for row in rows}
    count = {source: sum(row.source == source for row in rows) for source in sources}
    return {row.row.id: 1 / len(sources) / count[row.source] for row in rows}


def weighted_median(values: Sequence[tuple[float, float]]) -> float | None:
    """Returns the value at which half of the weight is reached, of (value, weight) pairs; None of none."""
    half, reached = sum(weight for _, weight in values) / 2, 0.0
    for value, weight in sorted(values):
        reached += weight
        if reached >= half * (1 - 1e-9):  # sums of weights are off by a rounding
            return value
    return None


def _mean_score(
    rows: Sequence[Predicted], weights: Mapping[str, float], band: Callable[[Predicted], tuple[float, float]]
) -> float | None:
    """Returns the mean interval score of logarithms at 90 % (Gneiting and Raftery, JASA 102, 2007): less is better."""
    total = sum(weights[row.row.id] for row in rows)
    scores = [weights[row.row.id] * interval_score(*band(row), measured=row.row.measured) for row in rows]
    return sum(scores) / total if total else None


def interval_score(low: float, high: float, measured: float) -> float:
    """Returns the interval score of one figure: the width, and what it is missed by 20 times, as logarithms."""
    low, high, at = math.log(low), math.log(high), math.log(measured)
    return high - low + 20 * (max(0.0, low - at) + max(0.0, at - high))


def neighbors(rows: Sequence[Predicted], least: float = 0.05) -> Iterator[tuple[str, str, bool]]:
    """Yields pairs of a group, next to each other as measured, that differ by more: their ids, and if ours do alike."""
    groups: dict[str, list[Predicted]] = {}
    for row in rows:
        if row.row.group is not None:
            groups.setdefault(row.row.group, []).append(row)
    for group in groups.values():
        ordered = sorted(group, key=lambda row: row.row.measured)
        for first, second in pairwise(ordered):
            if second.row.measured / first.row.measured > 1 + least:
                assert first.value is not None and second.value is not None
                yield first.row.id, second.row.id, first.value < second.value


def _folder() -> Path:
    return Path(str(resources.files("prestage") / "calibration" / "published"))


def _beside(name: str) -> str:
    """Returns the path of a file of the table's own, by the name that a row gives it; other names as they are."""
    return str(_folder() / name) if name.startswith(("models/", "runtimes/")) else name
