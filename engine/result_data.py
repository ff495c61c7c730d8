"""What a result.json must be, as far as comparisons, figures and reports read it: checked once, when it is read.

Results of other versions have more keys, or fewer: what is there must be of the kind that it is written as, whatever it
is called. A key's ending says what it is: `_ms` and the like are numbers, or tables of numbers by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import InputError
from ..plain import beyond_64_bits

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


class _Gpu(_Written):
    device: str
    time: _Time


class _ModelData(_Written):
    name: str
    layers: int = Field(ge=1, le=2**16)
    experts: int = Field(ge=1, le=2**31)


class _Machine(_Written):
    profile: str


class _ScenarioData(_Written):
    machine: _Machine | None = None


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
    makespan_ms: _Ms
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


def check_has(data: Mapping[str, Any], keys: Collection[str]) -> None:
    """Raise InputError, naming the keys, if a result lacks any of them."""
    missing = [key for key in keys if data.get(key) is None]
    if missing:
        raise InputError(f"lacks {', '.join(missing)}, which this version writes: run `prestage run --out` again")


def _at(data: Mapping[str, Any], name: str) -> Any:
    """Return what lies at a path of keys; None if nothing does."""
    value: Any = data
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
