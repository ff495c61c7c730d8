"""The schema of result.json, as far as comparisons, figures and reports read it: checked when a file is read.

Results of other versions have more keys, or fewer: what is there must be of the kind that it is written as, whatever it
is called. A key's ending says what it is: `_ms` and the like are numbers, or tables of numbers by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...errors import InputError
from ...plain import beyond_64_bits

#: Times are kept in ns of 64 bits, so that no result has more ms.
_MOST_MS = 2**63 / 1e6
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Ms = Annotated[float, Field(ge=0, le=_MOST_MS, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0)]
#: How the keys of figures end, at the top of a result: each is a number, null, or a table of such.
_FIGURE_ENDINGS = ("_ms", "_per_second", "_rate", "_utilization", "_tokens", "speedup", "overlap", "efficiency")


class _Written(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Time(_Written):
    compute_ms: _Ms
    stall_ms: _Ms
    host_ms: _Ms
    predictor_ms: _Ms
    bubble_ms: _Ms
    drain_ms: _Ms
    idle_ms: _Ms = 0.0


class _Gpu(_Written):
    device: str
    time: _Time


class _ModelData(_Written):
    name: str
    layers: int = Field(ge=1, le=2**16)
    experts: int = Field(ge=1, le=2**31)
    top_k: int = Field(1, ge=1, le=2**31)


class _Machine(_Written):
    profile: str


class _Workload(_Written):
    trace: str | None = None
    batch: _Count = 1


class _MemoryData(_Written):
    preload: str = "none"


class _ScenarioData(_Written):
    machine: _Machine | None = None
    workload: _Workload | None = None
    memory: _MemoryData | None = None


class _Spread(_Written):
    mean: _Number | None
    p50: _Number | None
    p95: _Number | None
    p99: _Number | None

    @model_validator(mode="after")
    def _all_or_none(self) -> _Spread:
        figures = (self.mean, self.p50, self.p95, self.p99)
        if any(figure is None for figure in figures) and any(figure is not None for figure in figures):
            raise InputError("mean, p50, p95 and p99 must all be numbers, or all null")
        return self


class _Warmup(_Written):
    decode_tokens: _Count


class _Cold(_Written):
    tokens_per_second: _Number | None
    hit_rate: _Number | None


class _Replicated(_Written):
    p5: _Number
    p50: _Number
    p95: _Number


class _Replicates(_Written):
    makespan_ms: _Replicated
    tokens_per_second: _Replicated | None = None


class _Memory(_Written):
    memory: str
    kind: str
    sum_bytes: _Count
    capacity_bytes: _Count | None
    fits: bool | None


class _Capacity(_Written):
    memories: list[_Memory] = Field(min_length=1)
    resident: _Memory


class _Link(_Written):
    link: str
    bytes: _Count
    busy_ms: _Ms
    utilization: _Number | None


class _Layer(_Written):
    layer: _Count
    prefetch_hit: _Count
    cache_hit: _Count
    late: _Count
    miss: _Count


class _Counts(_Written):
    prefetch_hit: _Count
    cache_hit: _Count
    late: _Count
    miss: _Count


class _Result(_Written):
    makespan_ms: float = Field(gt=0, le=_MOST_MS, allow_inf_nan=False)
    time: _Time
    scenario: _ScenarioData
    gpus: list[_Gpu] = []
    model: _ModelData | None = None
    accesses: _Count = 0
    counts: _Counts | None = None
    by_layer: list[_Layer] = []
    links: list[_Link] | None = None
    warnings: list[str] = []
    estimates: dict[str, str] = {}
    versions: dict[str, str] = {}
    stall_ms: _Ms = 0
    decode_tokens: _Count = 0
    tokens_per_second: _Number | None = None
    sustained_tokens_per_second: _Number | None = None
    hit_rate: _Number | None = None
    late_wait_ms: _Number | None = None
    overlap: _Number | None = None
    memory_utilization: _Number | None = None
    speedup: _Number = 1
    baseline_ms: _Number = 0
    resident_ms: float = Field(1, gt=0, allow_inf_nan=False)
    budget_bytes: _Count = 0
    expert_bytes_total: int = Field(1, ge=1)
    time_to_first_token_ms: _Spread | None = None
    inter_token_latency_ms: _Spread | None = None
    time_per_output_token_ms: _Spread | None = None
    decode_step_ms: _Spread | None = None
    warmup: _Warmup | None = None
    cold: _Cold | None = None
    replicates: _Replicates | None = None
    capacity: _Capacity | None = None

    @model_validator(mode="after")
    def _agrees(self) -> _Result:
        counts = self.counts
        came_out = 0 if counts is None else counts.prefetch_hit + counts.cache_hit + counts.late + counts.miss
        if came_out and not self.accesses:
            raise InputError(f"accesses = 0: counts has {came_out:,} of them")
        devices = [gpu.device for gpu in self.gpus]
        if len(set(devices)) < len(devices):
            raise InputError("gpus: two have one device")
        return self


def check_result(data: Mapping[str, Any], figures: Collection[str]) -> None:
    """Raise InputError, naming the key, if plain data is not of the kind that a result is written as.

    `figures` are the figures, by their path in a result, that must be numbers if they are there.
    """
    too_large = beyond_64_bits(data)
    if too_large is not None:
        raise InputError(too_large)
    try:
        _Result.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"{key}: {str(first['msg']).replace('Input should be', 'must be')}") from None
    named = {name: _at(data, name) for name in figures}
    named |= {key: value for key, value in data.items() if key.endswith(_FIGURE_ENDINGS)}
    for key, value in named.items():
        for inner in value.values() if isinstance(value, Mapping) else (value,):
            if isinstance(inner, bool) or not isinstance(inner, int | float | None):
                raise InputError(f"{key} = {value!r}: must be a number, or null")


def check_has(data: Mapping[str, Any], keys: Collection[str], nullable: Collection[str] = ()) -> None:
    """Raise InputError, naming the keys (section.key), if a result lacks any; `nullable` ones may be null."""
    missing = [key for key in keys if _at(data, key) is None]
    for key in nullable:
        section, _, last = key.rpartition(".")
        if last not in (_at(data, section) if section else data):
            missing.append(key)
    if missing:
        raise InputError(f"lacks {', '.join(missing)}, which this version writes: run `prestage run --out` again")


def _at(data: Mapping[str, Any], name: str) -> Any:
    """Returns what lies at a path of keys; None if nothing does."""
    value: Any = data
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
