"""The runtime: the software that is predicted, and what it costs beyond the machine, as a TOML file.

A runtime says how it drives the GPU (`defaults`, keys of a scenario that it sets where nobody else does), what it
cannot do otherwise (`only`), how it copies and hands over, and what each of its own costs is, from where, and how far
that may be off. A file of one's own is another runtime; one that `extends` another is that one with its keys merged in
(RFC 7396). To add one: write one more file in `runtimes/`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from ..bounded import parse_toml, read, read_json
from ..errors import InputError
from ..units import whole_bytes
from ..words import problems, unknown_name
from .advice import Advice
from .extending import extended
from .facts import BytesPerSecond, Dtype, Part

#: Where a number came from: measured by us, published by others, read in the runtime's source, fitted to its runs, or
#: assumed. Each with how far it is taken to be off where nobody says: a relative standard deviation.
SPREADS = {"measured": 0.05, "fitted": 0.1, "published": 0.2, "source": 0.3, "assumed": 0.5}
Known = Literal["measured", "published", "source", "fitted", "assumed"]
#: How far off predictions of software are that nobody here has run, whatever its costs (relative): as llama.cpp was
#: before any part of it was measured, .32, the rms of 40 log errors.
STRUCTURE = 0.3
#: Likewise of prompts: the rms of the log errors of our own 36 prompts of llama.cpp, whose machine and kernels were
#: measured by themselves. No other runtime's prompts were measured.
PROMPTS = 0.49
#: The runtime of a scenario that names none: our own executor, whose costs are the machine's.
DEFAULT = "prestage"


class RuntimeFileError(InputError):
    """A runtime that cannot be found, read or believed."""


class OwnCost(Part):
    """A cost beyond the machine's: where it is from, and how far it may be off (relative standard deviation)."""

    source: Known
    note: str = ""
    spread: float | None = Field(default=None, ge=0, le=3)

    @property
    def sigma(self) -> float:
        """How far it may be off, as the standard deviation of its logarithm."""
        return SPREADS[self.source] if self.spread is None else self.spread


class OwnTime(OwnCost):
    """Time of the host thread, in ns."""

    ns: int = Field(ge=0)


class OwnFactor(OwnCost):
    """How many times as long as the machine's own cost."""

    factor: float = Field(gt=0, le=100)


class OwnShare(OwnCost):
    """A share of what the machine reaches; never more than all of it."""

    share: float = Field(gt=0, le=1)


class OwnRate(OwnCost):
    """Bytes a second."""

    bytes_per_second: BytesPerSecond = Field(gt=0)


class OwnProducts(OwnCost):
    """Its own products of weights in fewer than 16 bits: of the GPU's operations a second in float32, in tiles of so
    many tokens."""

    of_float32: float = Field(gt=0, le=100)
    tile: int = Field(ge=8, le=4096)


class OwnCount(OwnCost):
    """How many: of kernels that are launched."""

    count: int = Field(ge=1, le=100_000)


class CpuRate(OwnCost):
    """What experts on the CPU get of the rate that its memory is read with (STREAM), measured for one shape.

    `expert_bytes` is of a whole expert, `tokens` how many chose it, `threads` how many compute.
    """

    dtype: Dtype
    expert_bytes: Annotated[int, BeforeValidator(whole_bytes)] = Field(gt=0)
    tokens: int = Field(default=1, ge=1)
    threads: int = Field(ge=1, le=4096)
    share: float = Field(gt=0, le=2)


class CpuCore(OwnCost):
    """What one thread computes of experts that lie in its cache: bytes of weights a second, once for each token.

    `tokens` is how many chose an expert: kernels that take several at once do more. `threads` is how many computed
    together, for more of them may each do less; such a rate counts for its dtype before others, and for other dtypes
    only where all rates are such.
    """

    dtype: Dtype
    tokens: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)
    bytes_per_second: BytesPerSecond = Field(gt=0)


class Launches(Part):
    """Kernels that it launches for models whose name begins so, in place of the model's and of what it has for all."""

    model: str = Field(min_length=1)
    dense: int | None = Field(default=None, ge=1, le=100_000)
    expert: int | None = Field(default=None, ge=1, le=100_000)
    source: Known
    note: str = ""


class CacheMove(OwnShare):
    """What kernels move of a layer's KV cache for rows that decode, beside one look at it: bytes read and written.

    For models whose name begins so. `times` the keys and values that a row looks at, and `times_heads` again for each
    query head of a KV head; at a `share` of the rate that the GPU reads weights with.
    """

    model: str = ""
    times: float = Field(default=0.0, ge=0, le=1000)
    times_heads: float = Field(default=0.0, ge=0, le=1000)


class Copies(Part):
    """How an expert comes to the GPU.

    In `per_expert` copies (a matrix each); `synchronized`: the host waits for the end of each before it orders the
    next. Who moves the bytes: a copy `engine`; a gather `kernel`, which reads host memory and occupies the compute
    stream; or the `cpu`, whose thread is held by a pageable copy throughout.
    """

    per_expert: int = Field(default=1, ge=1, le=1024)
    synchronized: bool = False
    mover: Literal["engine", "kernel", "cpu"] = "engine"


class Costs(Part):
    """What the runtime takes beyond the machine; what is left out is nothing, or as the machine's.

    Of the host thread, in ns: `layer` each layer visit, `step` each forward pass (of one sequence: a token), `expert`
    each group of an expert's kernels, `copy_call` each copy, `cpu_submit` and `cpu_return` each visit that computes
    experts on the CPU, before and behind them, `indexed` each position that a layer of sparse attention has cached, for
    a row that decodes (within the dense part, for the GPU waits). Times as long as the machine's: `launch` a launch,
    `gap` between groups of kernels and what a group takes to start, `gpu_kernels` all kernels, `gpu_experts` the
    experts' besides. `gpu_products` is what its own products of quantized weights compute a second, at most.
    `dense_launches` and `expert_launches` are kernels that it launches for a layer's dense part and an expert, in place
    of the model's. `copy_rate` is what its copies reach of the link's rate. Experts on the CPU reach `cpu_stream` of
    STREAM, and `cpu_core` bytes a second a thread at most; `cpu_rates` of the runtime, where it has them, go before
    `cpu_stream`. With `cpu_cores`, by dtype, these count, and that a thread reads `cpu_thread` of memory at most.
    """

    layer: OwnTime | None = None
    step: OwnTime | None = None
    expert: OwnTime | None = None
    copy_call: OwnTime | None = None
    cpu_submit: OwnTime | None = None
    cpu_return: OwnTime | None = None
    indexed: OwnTime | None = None
    launch: OwnFactor | None = None
    gap: OwnFactor | None = None
    gpu_kernels: OwnFactor | None = None
    gpu_experts: OwnFactor | None = None
    gpu_products: OwnProducts | None = None
    dense_launches: OwnCount | None = None
    expert_launches: OwnCount | None = None
    copy_rate: OwnShare | None = None
    cpu_stream: OwnShare | None = None
    cpu_core: OwnRate | None = None
    cpu_thread: OwnRate | None = None

    def given(self) -> dict[str, OwnCost]:
        """Returns the costs that are given, by name."""
        named = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: cost for name, cost in named if cost is not None}


class Only(Part):
    """The values of a scenario's key that the runtime can do, and why no other; an empty list is none but the key's
    default."""

    values: tuple[str | bool | int, ...] = Field(min_length=1)
    why: str


class Runtime(Part):
    """A runtime: how it works and what that costs.

    `defaults` are sections of keys of a scenario; `waits`: the host waits for the end of every forward pass (it samples
    by itself); `cpu_blocks`: the host's thread itself computes experts on the CPU, or waits for them, so that it orders
    nothing meanwhile. `structure`: how far predictions are off whatever the costs, for the software works otherwise
    than is thought (relative standard deviation), and `prompts` how far those of prompts are, if that is more.
    """

    name: str
    title: str = ""
    about: str = ""
    version: str = ""
    defaults: dict[str, dict[str, Any]] = {}
    only: dict[str, Only] = {}
    copies: Copies = Copies()
    waits: bool = False
    cpu_blocks: bool = False
    structure: float = Field(default=STRUCTURE, ge=0, le=3)
    prompts: float = Field(default=PROMPTS, ge=0, le=3)
    costs: Costs = Costs()
    cpu_rates: tuple[CpuRate, ...] = ()
    cpu_cores: tuple[CpuCore, ...] = ()
    launches: tuple[Launches, ...] = ()
    cache_moves: tuple[CacheMove, ...] = ()
    #: What of it can be set, for advice.
    advice: Advice = Advice()

    @property
    def neutral(self) -> bool:
        """Whether it costs nothing beyond the machine."""
        return self.copies == Copies() and not (self.costs.given() or self.cache_moves or self.waits or self.cpu_blocks)

    @property
    def unmeasured(self) -> list[str]:
        """The costs that were not measured, each with where it is from."""
        costs = self.costs.given().items()
        return [f"{name} ({cost.source})" for name, cost in costs if cost.source not in ("measured", "fitted")]


def runtime_names() -> list[str]:
    """Returns the names of the shipped runtimes."""
    files = (resources.files("prestage") / "resources" / "runtimes").iterdir()
    return sorted(entry.name.removesuffix(".toml") for entry in files if entry.name.endswith(".toml"))


def load_runtime(name: str) -> Runtime:
    """Returns a shipped runtime by its name, or one from a TOML or JSON file by its path.

    Raises RuntimeFileError, naming the file, the key, the value and what would be right.
    """
    return _load(name) if _is_file(name) else _load_shipped(name)


def _load(name: str) -> Runtime:
    data = _plain(name)
    try:
        return Runtime.model_validate(data)
    except ValidationError as error:
        raise RuntimeFileError(f"runtime {name}: {problems(error, Runtime, data)}") from None


#: What is shipped does not change, and nobody can change a runtime.
_load_shipped = cache(_load)


def _is_file(name: str) -> bool:
    return name.endswith((".toml", ".json"))


def _plain(name: str) -> dict[str, Any]:
    """Returns a runtime as plain data, merged into what it extends."""
    patches: list[dict[str, Any]] = []
    seen: list[str] = []
    folder, key = Path(), "runtime.name"
    while True:
        place = os.path.realpath(folder / name) if _is_file(name) else name
        if place in seen:
            raise RuntimeFileError(f"runtime {name}: extends itself by way of {', '.join(seen)}")
        seen.append(place)
        data = _read(name, folder / name, key)
        patches.append({entry: value for entry, value in data.items() if entry != "extends"})
        if "extends" not in data:
            break
        key = f"runtime {name}: extends"
        folder = (folder / name).parent if _is_file(name) else Path()
        if not isinstance(data["extends"], str):
            raise RuntimeFileError(f"{key} = {data['extends']!r}: give the name of a runtime")
        name = data["extends"]
    merged = patches.pop()
    for patch in reversed(patches):
        merged = extended(merged, patch)
    return merged


def _read(name: str, path: Path, key: str) -> dict[str, Any]:
    """Returns what a file, or a shipped runtime, holds; RuntimeFileError names the `key` that named it."""
    where = f"runtime {name}"
    if not _is_file(name):
        if name not in runtime_names():
            raise RuntimeFileError(unknown_name(key, name, [*runtime_names(), "FILE.toml", "FILE.json"]))
        text = (resources.files("prestage") / "resources" / "runtimes" / f"{name}.toml").read_text("utf-8")
        return parse_toml(text, where, RuntimeFileError)
    if not path.is_file():
        raise RuntimeFileError(f"{key} = {name!r}: no such file")
    try:
        if name.endswith(".json"):
            data = json.loads(read_json(path, RuntimeFileError))
        else:
            data = parse_toml(read(path, RuntimeFileError).decode("utf-8"), where, RuntimeFileError)
    except (OSError, UnicodeDecodeError) as error:
        raise RuntimeFileError(f"{key} = {name!r}: cannot be read: {error}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise RuntimeFileError(f"{where}: not JSON: {error}") from None
    if not isinstance(data, Mapping):
        raise RuntimeFileError(f"{where}: {type(data).__name__}: must be an object")
    return dict(data)
