"""Random scenarios, drawn from the schema of all sections together: whatever is accepted runs to its end.

The keys and their bounds are those of the pydantic models, so that a new key is drawn as soon as it is there. A
scenario is either refused, with an InputError before it runs, or runs; whatever else comes is a fault. By hand:

    python tests/random_scenarios.py --first 0 --count 5000
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import orjson
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from prestage.dtypes import DTYPES
from prestage.engine.load import load_inputs
from prestage.engine.policies.split import SPLITS
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import Scenario, load_scenario, make_scenario, scenario_names
from prestage.engine.simulate import simulate_inputs
from prestage.errors import InputError
from prestage.resources.profile import Contention, Profile, load_profile, make_profile, profile_names
from prestage.resources.profile_costs import ComputeCosts, HostCosts
from prestage.resources.runtime import runtime_names
from prestage.workloads.fitted import ECHO_TOKENS, FittedRouting, LayerFit, class_ends
from prestage.workloads.importers import open_trace
from prestage.workloads.model import load_model, preset_names
from prestage.workloads.synthetic import synthesize
from prestage.workloads.trace import RoutingTrace

Random = random.Random
#: How often a section, a key of it, and a number no machine has, are drawn.
_SECTION, _KEY, _ABSURD = 0.5, 0.4, 0.01
_BUDGETS = ("0B", "1B", "0%", "1%", "12.5%", "50%", "100%", "300%", "1experts", "3experts", "9experts", "2GiB", "1TiB")
_BYTES = ("0B", "1B", "4KiB", "100MiB", "1.5GiB", "24GB", "80GiB", "2TiB")
_ABSURD_INTEGERS = (2**31, 2**53 + 1, 2**63 - 1, 2**64, 10**30)
_ABSURD_NUMBERS = (5e-324, 1e-300, 1e18, 1e300)
#: Text keys and what is drawn for each; a text key that is not here keeps its default.
_TEXTS: dict[str, tuple[str, ...]] = {
    "memory.gpu_budget": _BUDGETS,
    "memory.total_bytes": _BYTES,
    "memory.workspace_bytes": _BYTES[:4],
    "parallel.replica_bytes": _BYTES[:5],
    "parallel.spare_bytes": _BYTES[:5],
    "tiers.host_budget": ("all", *_BUDGETS),
    "model.dtype": tuple(DTYPES),
    "runtime.name": tuple(runtime_names()),
}
#: Integers that cost time or memory in proportion, and what is drawn for each.
_SMALL: dict[str, tuple[int, ...]] = {
    "model.expert_bytes": (1, 4096, 1_000_003, 400_000_000),
    "workload.synthetic.tokens": (1, 2, 7, 20),
    "workload.synthetic.sequences": (1, 2, 5),
    "workload.synthetic.prefill_tokens": (0, 1, 3, 9),
    "copy.chunk_bytes": (0, 1 << 20, 3_000_001, 64 << 20),
    "tiers.chunk_bytes": (0, 1 << 20, 3_000_001, 64 << 20),
    "parallel.gpus": (1, 2, 3, 8),
    "parallel.stages": (1, 2, 3),
}
#: Keys that are drawn apart, since they say together which model and which trace of it run on what.
_DRAWN_APART: tuple[str, ...] = (
    *("model.preset", "model.layers", "model.experts", "model.top_k", "machine.profile", "workload.trace"),
    *("workload.synthetic", "workload.synthetic.fit", "workload.synthetic.popularity", "predictor.weights"),
)
#: Keys that stay when others are taken out: without them a run would be of another model, or long.
_STAYING = (
    *(*_DRAWN_APART, "workload.tokens", "workload.synthetic.tokens"),
    *("requests.count", "requests.prompt_tokens", "requests.output_tokens"),
)
#: Requests of a length and number that both engines serve soon.
_FEW_REQUESTS = {"count": 5, "prompt_tokens": 7, "output_tokens": 4}


#: Every key of every section, as a scenario's TOML names it.
KEYS = tuple(
    f"{field.alias or name}.{key}"
    for name, field in Scenario.model_fields.items()
    for kind in (field.annotation, *get_args(field.annotation))  # a section, or one that may be left out
    if isinstance(kind, type) and issubclass(kind, BaseModel)
    for key in kind.model_fields
)


@dataclass(frozen=True)
class Outcome:
    """What became of a scenario: `kind` is ran, refused or fault, `text` the refusal or the traceback."""

    kind: str
    text: str = ""


class TooLong(BaseException):
    """A scenario that did not end; no `except Exception` may take it for something else."""


def draw(seed: int, folder: Path) -> dict[str, Any]:
    """Returns the plain data of a random scenario; files that it names are written to `folder`."""
    rng = Random(seed)
    data = _shipped(rng, folder) if rng.random() < 0.3 else _fresh(rng, folder)
    for section, field in Scenario.model_fields.items():
        name = field.alias or section
        kind = _section_of(field)
        if kind is None:
            if rng.random() < 0.2:
                data[name] = _value(rng, name, field)
        elif rng.random() < _SECTION:
            _draw_section(rng, name, kind, data.setdefault(name, {}))
    if isinstance(data.get("requests"), dict):
        data["requests"].update(_FEW_REQUESTS)
    return data


def play(seed: int, folder: Path, limit_s: int = 20) -> Outcome:
    """Draw a scenario and run it, with drawn keys taken out until it is accepted; tell what became of it.

    Only what loads it may refuse it. Now and then a refusal stays the last word.
    """
    rng, data = Random(seed + 2), draw(seed, folder)
    try:
        with _no_longer_than(limit_s):
            inputs = None
            while inputs is None:
                try:
                    inputs = load_inputs(make_scenario(data))
                except InputError as refusal:
                    if not str(refusal).strip():
                        return Outcome("fault", f"a refusal says nothing: {data}")
                    keys = _removable(data)
                    if not keys or rng.random() < 0.02:
                        return Outcome("refused", str(refusal))
                    section, key = rng.choice(keys)
                    del section[key]
            result = simulate_inputs(
                inputs,
                baselines=rng.random() < 0.5,
                check_prefetch=rng.random() < 0.2,
                replicates=1 if rng.random() < 0.2 else 0,
            )
            written = orjson.dumps(result.json_data(), option=orjson.OPT_SERIALIZE_NUMPY)
            if not orjson.loads(written)["makespan_ms"] >= 0:
                return Outcome("fault", f"makespan_ms = {result.data['makespan_ms']}: {data}")
    except (Exception, TooLong):
        return Outcome("fault", f"{traceback.format_exc()}\n{json.dumps(data, default=str)}")
    return Outcome("ran")


def accepted(seed: int, folder: Path) -> Inputs | None:
    """Draw a scenario and take keys out until it is accepted; None if none of it is."""
    return accepted_of(draw(seed, folder), seed)


def composed(seed: int, folder: Path) -> dict[str, Any]:
    """Returns the plain data of a random scenario of several GPUs, or micro-batches, with much that goes with them.

    Drives, misses on the CPU, preloading, budgets of a total, compression, copy orders and predictors that take time.
    """
    rng = Random(seed)
    data = _fresh(rng, folder)
    data["model"]["layers"] = layers = data["model"]["layers"]
    workload = data["workload"]
    workload |= {"batch": rng.choice((1, 2, 4)), "prefill": rng.choice(("skip", "whole", "chunked"))}
    data["machine"] = {"profile": _host_of_several(rng, folder)}
    stages = min(layers, rng.choice((2, 2, 3)))
    data["parallel"] = rng.choice((
        {"stages": stages}, {"stages": stages, "micro_batches": 2}, {"gpus": 2}, {"gpus": 3}, {"micro_batches": 2},
    )) | {"dispatch_threads": rng.choice(("per-gpu", "one"))}  # fmt: skip
    if "gpus" in data["parallel"]:
        data["parallel"] |= {"remote": rng.choice(("tokens", "tokens", "peer", "host", "cost"))}
        data["parallel"] |= {"placement": rng.choice(("round-robin", "replicated")), "replica_bytes": "1GiB"}
        data["parallel"] |= {"spare_bytes": "2GiB"} if rng.random() < 0.3 else {}
    data["memory"] = {"capacity": "ignore", "gpu_budget": rng.choice(("30%", "60%", "3experts", "9experts"))}
    data["memory"] |= rng.choice(({}, {"scope": "per-layer"}, {"eviction": rng.choice(("lfu", "belady", "static"))}))
    data["memory"] |= {"preload": rng.choice(("popular", "layers"))} if rng.random() < 0.4 else {}
    data["memory"] |= {"total_bytes": rng.choice(("24GB", "80GiB"))} if rng.random() < 0.2 else {}
    if rng.random() < 0.6:
        data["tiers"] = {"host_budget": rng.choice(("3experts", "9experts", "50%"))}
        data["tiers"] |= {"prefetch": rng.choice(("gpu", "host")), "io_lanes": rng.choice((1, 2, 5))}
        data["tiers"] |= {"chunk_bytes": rng.choice((0, 3_000_001)), "host_policy": rng.choice(("lru", "belady"))}
    if rng.random() < 0.6:
        policy = rng.choice(("cpu", "cpu", "balanced", "cost", "low_precision", "skip"))
        policy = {"balanced": "split", "cost": "cpu-then-upload"}.get(policy, policy) if seed % 2 else policy
        data["miss"] = {"policy": policy, "cpu_gb_per_s": rng.choice((4, 40, 400)), "threshold": 0.2}
        data["miss"] |= {"deferred_experts": 1 + seed % 2} if seed % 3 == 0 else {}
    if rng.random() < 0.2:
        data["compression"] = {"where": rng.choice(("host", "gpu")), "ratio": 0.5, "decompress_gb_per_s": 100}
        data["compression"] |= {"lane": rng.choice(("side", "compute"))}
    data["predictor"] = {"latency_us": rng.choice((0, 0, 30)), "lane": rng.choice(("gpu", "host", "compute"))}
    data["prefetch"] = {
        "lookahead": rng.choice((0, 1, 2)),
        "policy": rng.choice(("top-k", "cost-aware", "adaptive-link")),
    }
    data["dispatch"] = {"mode": rng.choice(("eager", "graph")), "launch_queue_depth": rng.choice((5, 1000))}
    data["dispatch"] |= {"router_readback": False} if rng.random() < 0.2 else {}
    data["copy"] = {"discipline": rng.choice(("fifo", "two_streams", "priority"))}
    data["copy"] |= {"host_memory": "pageable"} if rng.random() < 0.2 else {}
    return data


def _host_of_several(rng: Random, folder: Path) -> str:
    """Returns a machine of several GPUs with a drive, as shipped ones have each, in a file."""
    name = rng.choice(("h200-x2", "h100-x2", "rtx3090-x2", "rtx4090-x4", "h200-hgx-x8"))
    data = json.loads(load_profile(name).model_dump_json(exclude_none=True))
    data["nvme"] = json.loads(load_profile("rtx3090-nvme").model_dump_json(exclude_none=True))["nvme"]
    path = folder / "several.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return str(path)


def accepted_of(data: dict[str, Any], seed: int) -> Inputs | None:
    """Take keys out of a scenario until it is accepted, drawn by a seed; None if none of it is."""
    rng = Random(seed + 2)
    while True:
        try:
            return load_inputs(make_scenario(data))
        except InputError:
            keys = _removable(data)
            if not keys:
                return None
            section, key = rng.choice(keys)
            del section[key]


def _removable(data: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Returns the keys that may be left out, each with the table that holds it."""
    tables = [(name, table) for name, table in data.items() if isinstance(table, dict)]
    synthetic = data["workload"].get("synthetic")
    if isinstance(synthetic, dict):
        tables.append(("workload.synthetic", synthetic))
    return [(table, key) for name, table in tables for key in table if f"{name}.{key}" not in _STAYING]


def main() -> None:
    """Play many scenarios and print what is a fault."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--count", type=int, default=1000)
    options.add_argument("--limit-s", type=int, default=20)
    asked = options.parse_args()
    counts: Counter[str] = Counter()
    for seed in range(asked.first, asked.first + asked.count):
        with tempfile.TemporaryDirectory() as folder:
            outcome = play(seed, Path(folder), asked.limit_s)
        counts[outcome.kind] += 1
        if outcome.kind == "fault":
            print(f"--- seed {seed}\n{outcome.text}", flush=True)
    print(dict(counts))
    sys.exit(1 if counts["fault"] else 0)


def _shipped(rng: Random, folder: Path) -> dict[str, Any]:
    """Returns the sections that a shipped scenario sets, cut to a few tokens."""
    data = dict(load_scenario(rng.choice(scenario_names())).model_dump(by_alias=True, exclude_unset=True))
    workload = data["workload"]
    workload["tokens"] = rng.choice((1, 3, 8))
    if workload.get("synthetic"):
        workload["synthetic"] = {"tokens": 12, "prefill_tokens": 3}
    else:
        trace = open_trace(workload["trace"])
        rows = np.flatnonzero(trace.sequence == trace.sequence[-1])[-12:]
        workload["trace"] = str(folder / "cut.npz")
        trace.select(rows).save(workload["trace"])
    return data


def _fresh(rng: Random, folder: Path) -> dict[str, Any]:
    """Returns a small model, a workload for it and a machine."""
    model: dict[str, Any] = {"preset": rng.choice(preset_names()), "layers": rng.choice((1, 2, 3, 4))}
    if rng.random() < 0.7:
        model["experts"] = rng.choice((1, 2, 4, 9, 16, 64))
        model["top_k"] = rng.choice([k for k in (1, 2, 4) if k <= model["experts"]])
    whole = load_model(model["preset"], **{key: value for key, value in model.items() if key != "preset"})
    sequences = rng.choice((1, 1, 2, 3))
    shape = {"tokens": rng.choice((3, 8, 20)), "sequences": sequences, "prefill_tokens": rng.choice((0, 0, 1))}
    workload: dict[str, Any] = {"synthetic": dict(shape)}
    source = rng.random()
    if source < 0.3:
        trace = synthesize(layers=whole.layers, experts=whole.experts, top_k=whole.top_k, reuse=0.3, **shape)
        workload = {"trace": _written(rng, trace, folder)}
    elif source < 0.35:
        some_fit(whole.layers, whole.experts, whole.top_k).save(folder / "fit.json")
        workload = {"synthetic": {"fit": str(folder / "fit.json"), "tokens": 8}}
    return {"model": model, "workload": workload, "machine": {"profile": _machine(rng, folder)}}


def some_fit(layers: int, experts: int, top_k: int) -> FittedRouting:
    """Returns a generator as `trace fit` makes it, without fitting: half of a score is common, half is the token's."""
    layer = LayerFit(0.3, 0.1, 0.1, (0.5,) * len(class_ends(experts, top_k)))
    return FittedRouting("random", experts, top_k, (0.1,) * ECHO_TOKENS, (layer,) * layers)


def _written(rng: Random, trace: RoutingTrace, folder: Path) -> str:
    """Write a trace with gaps, phases, guesses and sizes that its generator does not draw; return the file's name."""
    numbers = np.random.default_rng(rng.randrange(2**32))
    tokens, layers, experts = trace.tokens, trace.layers, trace.num_experts
    arrays: dict[str, Any] = {}
    if rng.random() < 0.5:
        arrays["present"] = present = numbers.random((tokens, layers)) < 0.8
        if rng.random() < 0.5:
            fewer = numbers.integers(1, trace.k + 1, (tokens, layers, 1))
            arrays["present"] = present = present[..., None] & (np.arange(trace.k) < fewer)
        arrays["experts"] = np.where(present.reshape(tokens, layers, -1), trace.experts, 0).astype(trace.experts.dtype)
    if rng.random() < 0.5:
        arrays["phase"] = (numbers.random(tokens) < 0.7).astype(np.uint8)
    if rng.random() < 0.3:
        arrays["weights"] = None
    if rng.random() < 0.5:
        guesses = np.argsort(numbers.random((tokens, layers, 2, experts)), axis=3)[..., : min(3, experts)]
        arrays["predictions"] = guesses.astype(np.int16)
        if rng.random() < 0.5:
            arrays["confidences"] = np.sort(numbers.random(guesses.shape))[..., ::-1].astype(np.float16)
    if rng.random() < 0.5:
        arrays["extra"] = {"expert_bytes": numbers.integers(1, 10**8, layers)}
    path = folder / rng.choice(("trace.npz", "trace.safetensors"))
    replace(trace, **arrays).save(path)
    return str(path)


def _machine(rng: Random, folder: Path) -> str:
    """Returns a shipped profile, or the file of one that lacks some of what it may lack."""
    name = rng.choice(profile_names())
    if rng.random() < 0.6:
        return name
    data = json.loads(load_profile(name).model_dump_json(exclude_none=True))
    for table, kind in (
        (data, Profile),
        (data["compute"], ComputeCosts),
        (data["host"], HostCosts),
        (data.get("contention", {}), Contention),
    ):
        for key, field in kind.model_fields.items():
            if not field.is_required() and rng.random() < 0.3:
                table.pop(key, None)
    make_profile(data, "a random profile")
    path = folder / "machine.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return str(path)


def _draw_section(rng: Random, name: str, section: type[BaseModel], into: dict[str, Any]) -> None:
    for key, field in section.model_fields.items():
        path, part = f"{name}.{key}", _section_of(field)
        if part is not None and isinstance(into.get(key), dict):
            _draw_section(rng, path, part, into[key])
        elif path not in _DRAWN_APART and rng.random() < _KEY:
            into[key] = _value(rng, path, field)


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Returns the section that a key holds, if it does."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _value(rng: Random, path: str, field: FieldInfo) -> Any:
    """Returns a value within the bounds of a key, those at the edge most of all; None where that is allowed."""
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    if type(None) in get_args(field.annotation) and rng.random() < 0.3:
        return None
    names = _names_of(field)
    if names is not None:
        return rng.choice(names)
    if path == "parallel.split":
        return rng.choice((*SPLITS, [1, 1], [1, 2], [2, 1, 1]))
    if path == "compression.mixed":
        return rng.choice(([[1, 0.5]], [[0.25, 1], [0.75, 0.3]], [[0.5, 1], [0.5, 1e-9]]))
    kind = rng.choice(kinds)
    if kind is bool:
        return rng.random() < 0.5
    if kind is int:
        return _integer(rng, path, field)
    if kind is float:
        return _number(rng, field)
    return rng.choice(_TEXTS[path]) if path in _TEXTS else field.default


def _names_of(field: FieldInfo) -> list[Any] | None:
    """Returns the members of the table, or the literals, that a key chooses from."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if get_origin(kind) is Literal:
            return list(get_args(kind))
    for mark in field.metadata:
        check = getattr(mark, "func", None)
        if inspect.isfunction(check) and "names" in (known := inspect.getclosurevars(check).nonlocals):
            return sorted(known["names"])
    return None


def _bounds(field: FieldInfo) -> tuple[float, float]:
    """Returns the least and the greatest value of a number; an open end is met at a step from it."""
    low, high = 0.0, math.inf
    for mark in field.metadata:
        bound: Any = next((getattr(mark, name) for name in ("ge", "gt", "le", "lt") if hasattr(mark, name)), None)
        if isinstance(mark, Ge | Gt):
            low = float(bound) if isinstance(mark, Ge) else math.nextafter(float(bound), math.inf)
        elif isinstance(mark, Le | Lt):
            high = float(bound) if isinstance(mark, Le) else math.nextafter(float(bound), 0)
    return low, high


def _integer(rng: Random, path: str, field: FieldInfo) -> int:
    low, high = _bounds(field)
    if rng.random() < _ABSURD:
        return rng.choice(_ABSURD_INTEGERS)
    if path in _SMALL:
        return rng.choice(_SMALL[path])
    least = math.ceil(low)
    drawn = rng.choice((least, least, least + 1, least + 2, 5, 17, 1000))
    return min(drawn, int(high)) if high < math.inf else drawn


def _number(rng: Random, field: FieldInfo) -> float:
    low, high = _bounds(field)
    if rng.random() < _ABSURD:
        return rng.choice(_ABSURD_NUMBERS)
    if high < math.inf:
        return rng.choice((low, high, low + (high - low) / 2, low + (high - low) * rng.random()))
    return rng.choice((low, low + 0.001, 1.0, 37.5, 1e4))


@contextmanager
def _no_longer_than(limit_s: int) -> Iterator[None]:
    """Raise TooLong where what runs within takes more time of the processor than this."""

    def stop(*_: object) -> None:
        raise TooLong(f"longer than {limit_s} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


if __name__ == "__main__":
    main()
