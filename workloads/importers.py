"""Importers: routing logs that other engines wrote, read as RoutingTrace.

Each format has one function from a path, and the number of experts where the caller knows it, to a trace; IMPORTERS
names them. To add one: write the function, add it to the table, describe it in tests/test_importers.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from inspect import signature
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..bounded import check_need
from ..bounded import read as read_bounded
from ..errors import InputError
from ..words import unknown_name
from .popularity import load_popularity
from .routed_experts import KEYS, import_arrays, import_eval_callback
from .routing_rows import import_rows, is_rows
from .token_lists import import_guide, import_jsonl, import_topk_ids
from .trace import RoutingTrace
from .trace_limits import MAX_EXPERTS, MAX_LAYERS, MAX_TOP_K, TraceError

_INT32_MAX = (1 << 31) - 1
_INT64_MAX = (1 << 63) - 1
#: The model's name, which may hold spaces, is what stands between the two.
_MODEL = re.compile(r"#\s*model=")
_HEADER = re.compile(
    r"\sarch=(?P<arch>\S*)\s+n_layer=(?P<layers>\d+)\s+n_expert=(?P<experts>\d+)"
    r"\s+n_expert_used=(?P<k>\d+)"
)
_LAYER = re.compile(r"#\s*layer=(?P<layer>\d+)\s+expert_bytes=(?P<expert>\d+)\s+dense_bytes=(?P<dense>\d+)(?!\d)")
#: What a (token, layer, slot) takes while a route trace is put together.
_CELL_BYTES = 8
#: Columns that make a route trace. Its author promises names, not places: a later version may add columns.
_KEYS = ("turn", "phase", "step", "layer", "slot")
_REQUIRED = (*_KEYS, "expert")
_PER_SLOT = ("residency", "dropped")


class _Header(NamedTuple):
    """What the comment lines of a route trace say; bytes by layer, where given."""

    model: str
    arch: str
    layers: int
    experts: int
    k: int
    expert_bytes: dict[int, int]
    dense_bytes: dict[int, int]


class _Rows(NamedTuple):
    """The rows of a route trace: each column as float64 (rows,), and the line of the file each came from."""

    columns: dict[str, npt.NDArray[np.float64]]
    lines: npt.NDArray[np.int64]


def import_trace(
    path: str | PathLike[str], format: str, num_experts: int | None = None, layers: int | None = None
) -> RoutingTrace:
    """Read a log written in one of the IMPORTERS' formats; the trace has been checked.

    `num_experts` is needed where the format does not say it, and must agree where it does. So must `layers`, the number
    of MoE layers; where a log has lists of plain ids, it says that each list is of one layer. `auto` tells the format
    by the content; so is told, whatever format of lists is named, that a log is rows or arrays.
    Raises TraceError (a ValueError) naming file, line, column and value, or listing the formats.
    """
    if format != AUTO and format not in IMPORTERS:
        raise TraceError(f"format = {format!r}: choose one of {AUTO}, {', '.join(IMPORTERS)}")
    if layers is not None and not 1 <= layers <= MAX_LAYERS:
        raise TraceError(f"layers = {layers}: must be 1..{MAX_LAYERS}")
    path = Path(path)
    try:
        with _counts_named(path):
            if format == AUTO or format in _LISTS:
                format = _format_of(path, format)
            if "layers" in signature(IMPORTERS[format]).parameters:
                trace = IMPORTERS[format](path, num_experts, layers=layers)
            else:
                trace = IMPORTERS[format](path, num_experts)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror or error}") from error
    trace.check(str(path))
    if layers not in (None, trace.layers):
        raise TraceError(f"{path}: {trace.layers} MoE layers, but layers = {layers} was given: leave it out")
    return trace


def import_bigmoeonedge(path: Path, num_experts: int | None = None) -> RoutingTrace:
    """Read a `*.route.csv` of BigMoeOnEdge (`--route-trace`; described in docs/telemetry.md of that project).

    One row per routed expert. A turn becomes a sequence and a step, which is an absolute context position, the
    position; rows come out by turn, phase and step, though a prefill is logged layer by layer. Where a token was
    not routed at a layer (only the last prompt token reaches the last one), `present` is False. Layers that the
    log never routes and that hold no expert bytes are dense, and left out; `moe_layers` in meta numbers the others.

    Extra arrays: `expert_bytes`, `dense_bytes` int64 (layers,); logged `residency` uint8 (tokens, layers, k), 0
    miss, 1 hit, 2 first hit on a prefetch (and `dropped`, if logged). Weights are None where the log does not know
    all of them.
    """
    text = read_bounded(path, TraceError).decode("utf-8", "replace")
    lines = text.split("\n")
    header = _read_header(path, lines)
    if num_experts not in (None, header.experts):
        raise TraceError(f"{path}: header: n_expert={header.experts}, but {num_experts} was given: leave it out")
    rows = _read_rows(path, lines)
    _check_columns(path, header, rows)
    return _assemble(path, header, rows)


#: Each is called with the path and the number of experts; one that has a parameter `layers` also with their number.
IMPORTERS: dict[str, Callable[..., RoutingTrace]] = {
    "bigmoeonedge": import_bigmoeonedge,
    "jsonl": import_jsonl,
    "topk-ids": import_topk_ids,
    "guide": import_guide,
    "rows": import_rows,
    "arrays": import_arrays,
    "eval-callback": import_eval_callback,
}
#: The format that is told by the content, and those of lists, whose content may be told to be rows or arrays.
AUTO = "auto"
_LISTS = ("jsonl", "topk-ids", "guide")
#: So much of a log's beginning is looked at.
_BEGINNING_BYTES = 1 << 16


#: Which importer reads a log, by how its name ends.
_LOGS = {".route.csv": "bigmoeonedge", ".npy": "arrays", ".csv": AUTO, ".jsonl": AUTO}
#: How the names of files end that may count how often experts were chosen.
_COUNTED = (".csv", ".json")


def shipped_traces() -> list[str]:
    """Returns the names of the traces that ship: each has a file that says how it was made, which weights lack."""
    files = {entry.name for entry in (resources.files("prestage") / "workloads" / "data").iterdir()}
    traces = (name.removesuffix(".safetensors") for name in files if name.endswith(".safetensors"))
    return sorted(name for name in traces if f"{name}.json" in files)


def open_trace(path: str | PathLike[str]) -> RoutingTrace:
    """Load a trace, a shipped one by its name, or import a log whose name tells its format; it has been checked.

    A file of a shipped one's name comes before it; a folder is no trace. Raises TraceError.
    """
    if not Path(path).suffix and str(path) not in shipped_traces() and not Path(path).exists():
        raise TraceError(unknown_name("trace", str(path), [*shipped_traces(), "FILE.npz", "FILE.safetensors", "a log"]))
    with trace_file(path) as file, _counts_named(Path(path)):
        if file is not None:
            return RoutingTrace.load(file)
    return import_trace(path, next(format for ending, format in _LOGS.items() if str(path).endswith(ending)))


@contextmanager
def _counts_named(path: Path) -> Iterator[None]:
    """Lets what is no trace be refused as what it is, where it counts how often experts were chosen."""
    try:
        yield
    except TraceError:
        if path.suffix in _COUNTED and _holds_counts(path):
            raise TraceError(
                f"{path}: counts how often each expert was chosen, and is no trace: set workload.synthetic.popularity "
                f"= '{path}', or draw a trace: prestage trace synth --popularity {path} -o TRACE.safetensors"
            ) from None
        raise


def _holds_counts(path: Path) -> bool:
    try:
        load_popularity(path)
    except TraceError:
        return False
    return True


@contextmanager
def trace_file(path: str | PathLike[str]) -> Iterator[Path | None]:
    """Gives the file of a trace, or of a shipped one's name; None for a log, which is imported."""
    if str(path) in shipped_traces() and not Path(path).is_file():
        with resources.as_file(resources.files("prestage") / "workloads" / "data" / f"{path}.safetensors") as file:
            yield file
    else:
        yield None if str(path).endswith(tuple(_LOGS)) else Path(path)


def _format_of(path: Path, named: str) -> str:
    """Returns the format that a log's beginning tells; the named one if it tells none. Raises OSError.

    What is no file, but a pipe, can be read only once: its format must be named.
    """
    if not path.is_file() and path.exists():
        if named == AUTO:
            raise TraceError(f"{path}: no file: name its format, one of {', '.join(IMPORTERS)}")
        return named
    with path.open("rb") as stream:
        beginning = stream.read(_BEGINNING_BYTES)
    if beginning.startswith(b"\x93NUMPY"):
        return "arrays"
    text = beginning.decode("utf-8", "replace")
    if "ffn_moe_topk-" in text:
        return "eval-callback"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if text.lstrip().startswith("{"):
        if any(is_rows(value) for value in map(_object, lines)):
            return "rows"
        return "arrays" if any(f'"{key}"' in text for key in KEYS) and '"experts"' not in text else _or(named, "jsonl")
    cells = [line for line in lines if not line.startswith("#")][:1]
    if cells and not lines[0].startswith("#"):
        names = [name.strip() for name in re.split(r"[,;\t]", cells[0])]
        if len(names) > 1 and is_rows(dict.fromkeys(names, "")):
            return "rows"
    if named != AUTO:
        return named
    if text.startswith("#"):
        return "bigmoeonedge"
    if text.lstrip().startswith("["):
        return "guide" if len(lines) == 1 or not lines[0].endswith("]") else "jsonl"
    if b"topk_ids" in read_bounded(path, TraceError):
        return "topk-ids"
    raise TraceError(f"{path}: its content does not tell its format: choose one of {', '.join(IMPORTERS)}")


def _or(named: str, told: str) -> str:
    return told if named == AUTO else named


def _object(line: str) -> dict[str, Any]:
    """Returns the object of a line; an empty one if it is none, or cut."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_header(path: Path, lines: list[str]) -> _Header:
    facts: re.Match[str] | None = None
    model = ""
    expert_bytes: dict[int, int] = {}
    dense_bytes: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.startswith("#"):
            if line.strip():
                break
            continue
        if match := _LAYER.match(line):
            layer = _whole(match["layer"])
            expert_bytes[layer], dense_bytes[layer] = _whole(match["expert"]), _whole(match["dense"])
        elif (named := _MODEL.match(line)) and (match := _HEADER.search(line, named.end())):
            facts, model = match, line[named.end() : match.start()].strip()
        elif line.startswith("# route_trace") and line.split()[2:3] != ["v1"]:
            raise TraceError(f"{path}: line {number}: {line.strip()!r}: must be '# route_trace v1'")
    if facts is None:
        raise TraceError(
            f"{path}: line 1: no header: must begin with comment lines, one of them "
            "'# model=… arch=… n_layer=… n_expert=… n_expert_used=…'"
        )
    layers, experts, k = (_whole(facts[name]) for name in ("layers", "experts", "k"))
    if not (1 <= layers <= MAX_LAYERS and 1 <= k <= experts <= MAX_EXPERTS and k <= MAX_TOP_K):
        raise TraceError(
            f"{path}: header: n_layer={layers} n_expert={experts} n_expert_used={k}: must be n_layer 1..{MAX_LAYERS}, "
            f"n_expert 1..{MAX_EXPERTS}, n_expert_used 1..n_expert, and at most {MAX_TOP_K}"
        )
    for layer, size in [*expert_bytes.items(), *dense_bytes.items()]:
        if size > _INT64_MAX:
            raise TraceError(f"{path}: header: layer={layer}: {size} bytes: must be at most {_INT64_MAX}")
    return _Header(model, facts["arch"], layers, experts, k, expert_bytes, dense_bytes)


def _whole(digits: str) -> int:
    """Returns a number of any length; of a very long one the beginning, which is out of every range too."""
    return int(digits.lstrip("0")[:40] or "0")


def _read_rows(path: Path, lines: list[str]) -> _Rows:
    numbered = [(n, line) for n, line in enumerate(lines, start=1) if line.strip() and line[0] != "#"]
    if len(numbered) < 2:
        raise TraceError(f"{path}: line {len(lines)}: no rows: must hold column names and a row per routed expert")
    (named_at, names), *body = numbered
    columns = [name.strip() for name in names.split(",")]
    for name in _REQUIRED:
        if columns.count(name) != 1:
            raise TraceError(f"{path}: line {named_at}: column {name}: must be named once in {names.strip()!r}")
    rows = [line for _, line in body]
    try:
        table = np.loadtxt(rows, delimiter=",", comments=None, dtype=np.float64, ndmin=2)
        if table.shape != (len(rows), len(columns)):
            raise InputError(f"{table.shape[1]} columns")
    except ValueError as error:
        raise _blame(path, columns, body, error) from error
    lines_of = np.array([n for n, _ in body], dtype=np.int64)
    return _Rows({name: table[:, i] for i, name in enumerate(columns)}, lines_of)


def _blame(path: Path, columns: list[str], body: list[tuple[int, str]], error: ValueError) -> TraceError:
    """Find the line that made the fast reader stop."""
    for number, line in body:
        values = line.split(",")
        if len(values) != len(columns):
            return TraceError(
                f"{path}: line {number}: {len(values)} values in {line.strip()!r}: "
                f"must be {len(columns)}: {','.join(columns)}"
            )
        for name, value in zip(columns, values, strict=True):
            try:
                float(value)
            except ValueError:
                return TraceError(f"{path}: line {number}: {name} = {value.strip()!r}: must be a number")
    return TraceError(f"{path}: {' '.join(str(error).split())}: must be a table of numbers")


def _check_columns(path: Path, header: _Header, rows: _Rows) -> None:
    limits: dict[str, int] = {
        "turn": _INT32_MAX,
        "phase": 1,
        "step": _INT32_MAX,
        "layer": header.layers - 1,
        "slot": header.k - 1,
        "expert": header.experts - 1,
        "residency": 2,
        "dropped": 1,
    }
    for name, high in limits.items():
        if name in rows.columns:
            value = rows.columns[name]
            fine = (value >= 0) & (value <= high) & (value == np.floor(value))
            _refuse(path, rows, name, fine, f"an integer 0..{high}")
    if "weight" in rows.columns:
        weight = rows.columns["weight"]
        fine = np.isnan(weight) | ((weight >= 0) & (weight <= float(np.finfo(np.float16).max)))
        _refuse(path, rows, "weight", fine, "at least 0, or nan where it is not known")


def _refuse(path: Path, rows: _Rows, name: str, fine: npt.NDArray[np.bool_], wanted: str) -> None:
    if not fine.all():
        at = int(np.argmin(fine))
        value = rows.columns[name][at]
        raise TraceError(f"{path}: line {rows.lines[at]}: {name} = {value:.17g}: must be {wanted}")


def _assemble(path: Path, header: _Header, rows: _Rows) -> RoutingTrace:
    turn, phase, step, layer, slot = (rows.columns[name].astype(np.int64) for name in _KEYS)
    routed = np.zeros(header.layers, dtype=np.bool_)
    routed[layer] = True
    kept = [at for at in range(header.layers) if routed[at] or header.expert_bytes.get(at, 0)]
    place = np.full(header.layers, -1)
    place[kept] = np.arange(len(kept))

    # One token is one (turn, phase, step); np.unique sorts them so.
    keys, token = np.unique(np.stack([turn, phase, step], axis=1), axis=0, return_inverse=True)
    token = token.reshape(-1)
    shape = (len(keys), len(kept), header.k)
    what = f"{shape[0]:,} tokens x {shape[1]:,} layers x {shape[2]:,} slots"
    check_need(path, what, math.prod(shape) * _CELL_BYTES, path.stat().st_size, TraceError)
    cell = (token * len(kept) + place[layer]) * header.k + slot
    filled = np.zeros(shape, dtype=np.bool_)
    filled.reshape(-1)[cell] = True
    _check_cells(path, header, rows, cell, filled)

    def spread(name: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        array = np.zeros(shape, dtype=dtype)
        array.reshape(-1)[cell] = rows.columns[name].astype(dtype)
        return array

    meta: dict[str, Any] = {
        "model": PurePosixPath(header.model).name.removesuffix(".gguf"),
        "arch": header.arch,
        "num_experts": header.experts,
        "source": f"imported from {path.name} (BigMoeOnEdge route_trace v1)",
    }
    if len(kept) < header.layers:
        meta["moe_layers"] = kept
    weights = None
    if "weight" in rows.columns:
        unknown = int(np.isnan(rows.columns["weight"]).sum())
        if unknown:
            meta["weights"] = f"left out: {unknown} of {len(cell)} not known to the log"
        else:
            weights = spread("weight", np.float16)
    present: npt.NDArray[np.bool_] = filled[..., 0]  # all slots or none, by now
    return RoutingTrace(
        experts=spread("expert", np.uint8 if header.experts <= 256 else np.uint16),
        num_experts=header.experts,
        weights=weights,
        sequence=keys[:, 0].astype(np.int32),
        position=keys[:, 2].astype(np.int32),
        phase=keys[:, 1].astype(np.uint8),
        present=None if present.all() else present,
        meta=meta,
        extra={name: spread(name, np.uint8) for name in _PER_SLOT if name in rows.columns}
        | _layer_bytes(path, header, kept),
    )


def _check_cells(
    path: Path, header: _Header, rows: _Rows, cell: npt.NDArray[np.int64], filled: npt.NDArray[np.bool_]
) -> None:
    """Refuse a slot that is logged twice, and a (token, layer) that has only some of its slots."""
    order = np.argsort(cell, kind="stable")
    twice = np.flatnonzero(np.diff(cell[order]) == 0)
    if len(twice):
        again = int(order[twice + 1].min())
        raise TraceError(
            f"{path}: line {rows.lines[again]}: slot = {rows.columns['slot'][again]:.0f}: "
            "logged before for the same turn, phase, step and layer: must appear once"
        )
    count = filled.sum(axis=2)
    partial = (count > 0) & (count < header.k)
    if partial.any():
        at = int(np.flatnonzero(partial.reshape(-1)[cell // header.k])[0])
        there = int(count.reshape(-1)[cell[at] // header.k])
        where = ", ".join(f"{name} {rows.columns[name][at]:.0f}" for name in ("turn", "step", "layer"))
        raise TraceError(
            f"{path}: line {rows.lines[at]}: slot: {there} of {header.k} slots are logged for {where}: "
            "must be all (is the file truncated?)"
        )


def _layer_bytes(path: Path, header: _Header, kept: list[int]) -> dict[str, npt.NDArray[np.int64]]:
    if not header.expert_bytes:
        return {}
    for at in kept:
        if not header.expert_bytes.get(at):
            raise TraceError(
                f"{path}: header: layer={at} is routed, but its expert_bytes is 0 or missing: "
                f"must be '# layer={at} expert_bytes=… dense_bytes=…'"
            )
    return {
        "expert_bytes": np.array([header.expert_bytes[at] for at in kept], dtype=np.int64),
        "dense_bytes": np.array([header.dense_bytes[at] for at in kept], dtype=np.int64),
    }
