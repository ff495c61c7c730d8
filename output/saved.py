"""A finished run as figures need it: its data, its timeline, and what became of every access, copy and decode token.

`run_of` makes one of a Result, `load_result` of a folder that `prestage run --out` wrote: both hold the same numbers.
The folder's `run.safetensors` has an array for each field of TABLES, named "table.field", and of a run under load for
those of its requests and steps; the metadata names the lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import orjson
import safetensors
import safetensors.numpy

from ..engine.measure.comparison import read_result
from ..engine.measure.merge import served
from ..engine.measure.metrics import memory_steps
from ..engine.measure.recording import FATES, OUTCOMES, Recording
from ..engine.measure.result_data import check_has
from ..engine.measure.speed import Served, decode_times_ns
from ..errors import InputError
from ..files import replacing
from ..resources.timeline import KINDS, SPAN, Timeline
from ..workloads.model import MOST_BYTES
from ..workloads.requests.log import FinishedRequest, StepRecord
from .shown import Shown

if TYPE_CHECKING:
    from ..engine.simulate import Result

Array = npt.NDArray[Any]

#: The file beside result.json.
RUN_FILE = "run.safetensors"
#: The tables of a run, a row for each: span; access, with an index into OUTCOMES and how long after its choice was
#: known its bytes came; copy, with why it was ordered, an index into FATES (-1: no prefetch) and the bytes that it
#: moved; layer visit, with the expert memory of its GPU (in order of `gpu_names`); decode token, with its step's time
#: and how long after its sequence's last token it was there (-1: it is the first).
TABLES = {
    "span": SPAN,
    "access": np.dtype(
        [("visit", "<i4"), ("layer", "<u2"), ("expert", "<i4"), ("outcome", "u1"), ("wait_ns", "<i8")],
    ),
    "copy": np.dtype([("layer", "<u2"), ("reason", "u1"), ("fate", "i1"), ("bytes", "<i8")]),
    "memory": np.dtype([("time_ns", "<i8"), ("assigned_bytes", "<i8"), ("budget_bytes", "<i8"), ("gpu", "<u2")]),
    "token": np.dtype([("took_ns", "<i8"), ("gap_ns", "<i8")]),
}
#: A row for each request, of a run under load alone: what `FinishedRequest` has.
REQUEST = "request"
REQUEST_ROW = np.dtype([(field, "<i8") for field in FinishedRequest._fields])
#: A row for each step of such a run: what `StepRecord` has.
STEP = "step"
STEP_ROW = np.dtype([(field, "<i8") for field in StepRecord._fields])


#: What figures and reports read of a result.json.
_READ = (
    "model", "gpus", "counts", "accesses", "by_layer", "warnings", "estimates", "versions", "stall_ms",
    "decode_tokens", "warmup", "time_to_first_token_ms", "inter_token_latency_ms", "time_per_output_token_ms",
    "decode_step_ms", "budget_bytes", "expert_bytes_total", "scenario.machine",
    "scenario.workload.batch", "scenario.memory.preload",
)  # fmt: skip
#: The same, of what may be null.
_READ_OR_NULL = (
    "tokens_per_second", "sustained_tokens_per_second", "hit_rate", "late_wait_ms", "overlap", "cold",
    "memory_utilization",    "scenario.workload.trace",
)  # fmt: skip


class SavedRunError(InputError):
    """A folder that holds no result; the message names the file and what would be right."""


@dataclass(frozen=True, repr=False)
class Run(Shown):
    """A run by name: `data` as in result.json, and structured arrays of the dtypes of TABLES."""

    name: str
    data: dict[str, Any]
    timeline: Timeline
    accesses: Array
    copies: Array
    memory: Array
    tokens: Array
    requests: Array | None = None
    steps: Array | None = None

    @property
    def title(self) -> str:
        """What ran on what."""
        return f"{self.data['model']['name']} on {self.data['scenario']['machine']['profile']}"

    @property
    def gpu_names(self) -> list[str]:
        """The devices with a compute stream, in the order of their lanes."""
        lanes = self.timeline.lanes
        return list(dict.fromkeys(lanes[number].device for number in self.timeline.lanes_with("compute")))

    @property
    def makespan_ns(self) -> int:
        """From 0 to the end of the last kernel."""
        makespan_ns: int = round(self.data["makespan_ms"] * 1e6)
        return makespan_ns

    def _run(self) -> Run:
        return self


def run_of(result: Result, name: str = "run", *, ranges: bool = False) -> Run:
    """Returns a finished run as figures need it.

    `ranges`: with p5 and p95 of its figures where not all costs were measured, for which twelve more runs are made.
    """
    recordings, layers, log = result.recordings, result.data["model"]["layers"], result.serving.log
    return Run(
        name,
        result.with_range() if ranges else result.data,
        result.timeline,
        np.concatenate([_accesses(recording, layers) for recording in recordings]),
        np.concatenate([_copies(recording) for recording in recordings]),
        np.concatenate([_memory(recording, gpu) for gpu, recording in enumerate(recordings)]),
        _tokens(served(recordings, result.serving)),
        None if log is None else _rows_of(log.requests, REQUEST_ROW),
        None if log is None else _rows_of(log.steps, STEP_ROW),
    )


def _rows_of(columns: dict[str, Array], dtype: np.dtype[Any]) -> Array:
    table = np.empty(len(next(iter(columns.values()))), dtype=dtype)
    for field, values in columns.items():
        table[field] = values
    return table


def _accesses(recording: Recording, layers: int) -> Array:
    """Returns the accesses of a GPU, with the numbers that visits, layers and experts have in the whole model."""
    first = recording.first_layer
    step, layer = np.divmod(recording.access_visit, len(recording.expert_bytes))
    return _table(
        "access",
        visit=step * layers + first + layer,
        layer=recording.access_layer + first,
        expert=recording.access_expert + (0 if recording.manager.shared else first * recording.manager.experts),
        outcome=recording.outcomes,
        wait_ns=recording.wait_ns,
    )


def _copies(recording: Recording) -> Array:
    return _table(
        "copy",
        layer=recording.copy_layer + recording.first_layer,
        reason=recording.copy_reason,
        fate=recording.copy_fates,
        bytes=recording.copied_bytes,
    )


def _memory(recording: Recording, gpu: int) -> Array:
    time_ns, assigned_bytes, budget_bytes = memory_steps(recording)
    gpus = np.full(len(time_ns), gpu)
    return _table("memory", time_ns=time_ns, assigned_bytes=assigned_bytes, budget_bytes=budget_bytes, gpu=gpus)


def _tokens(run: Served) -> Array:
    return _table("token", took_ns=decode_times_ns(run), gap_ns=run.gaps_ns)


def save_run(run: Run, path: Path) -> None:
    """Write what result.json lacks of a run, whole or not at all; the same run gives the same bytes."""
    tables = {
        "span": run.timeline.spans(),
        "access": run.accesses,
        "copy": run.copies,
        "memory": run.memory,
        "token": run.tokens,
    }
    if run.requests is not None:
        tables[REQUEST] = run.requests
    if run.steps is not None:
        tables[STEP] = run.steps
    arrays = {
        f"{name}.{field}": np.ascontiguousarray(table[field])
        for name, table in tables.items()
        for field in table.dtype.names or ()
    }
    lanes = [[lane.device, lane.role, lane.title] for lane in run.timeline.lanes]
    meta = orjson.dumps({"lanes": lanes, "makespan_ns": run.makespan_ns}).decode()
    with replacing(path) as stream:
        stream.write(safetensors.numpy.save(arrays, metadata={"meta": meta}))


def load_result(where: str | Path, name: str | None = None) -> Run:
    """Returns the run that `prestage run --out` wrote into a folder; `where` may also be its result.json.

    `name` is what figures call it: the folder's name without it. Raises ValueError (SavedRunError, CompareError).
    """
    where = Path(where)
    folder = where.parent if where.name == "result.json" else where
    if not folder.is_dir():
        writes = f"`prestage run --out {folder}` writes one"
        if where.suffix:  # a page or a timeline, and not the name of a folder
            writes = "give one that `prestage run --out FOLDER` wrote"
        raise SavedRunError(f"{where}: there is no such folder; {writes}")
    data = read_result(folder)
    path = folder / RUN_FILE
    try:
        check_has(data, _READ, _READ_OR_NULL)
        timeline, makespan_ns, tables = _read(path)
    except SavedRunError:
        raise
    except InputError as error:
        raise SavedRunError(f"{folder / 'result.json'}: {error}") from None
    run = Run(
        name or folder.resolve().name,
        data,
        timeline,
        tables["access"],
        tables["copy"],
        tables["memory"],
        tables["token"],
        tables.get(REQUEST),
        tables.get(STEP),
    )
    if run.makespan_ns != makespan_ns:
        raise SavedRunError(f"{path}: is of another run than the result.json beside it; run `prestage run --out` again")
    _check_within(path, tables, timeline, run)
    return run


def _check_within(path: Path, tables: dict[str, Array], timeline: Timeline, run: Run) -> None:
    """Refuse numbers that stand for nothing: lanes, kinds, outcomes and the like that do not exist. SavedRunError."""
    layers, whole = run.data["model"]["layers"], 2**62
    bounds = {
        "span.lane": (0, len(timeline.lanes) - 1), "span.kind": (0, len(KINDS) - 1),
        "span.start_ns": (0, whole), "span.end_ns": (0, whole), "span.issued_ns": (-whole, whole),
        "access.outcome": (0, len(OUTCOMES) - 1), "access.layer": (0, layers - 1), "access.wait_ns": (0, whole),
        "copy.fate": (-1, len(FATES) - 1), "copy.layer": (0, layers - 1), "copy.bytes": (0, MOST_BYTES),
        "memory.time_ns": (0, whole), "memory.assigned_bytes": (0, MOST_BYTES),
        "memory.budget_bytes": (0, 4 * MOST_BYTES), "token.took_ns": (0, whole),
        "memory.gpu": (0, len(run.gpu_names) - 1),
    }  # fmt: skip
    if run.steps is not None:
        bounds |= {f"{STEP}.{name}": (0, whole) for name in ("start_ns", "end_ns")}
        bounds |= {f"{STEP}.{name}": (0, 2**31) for name in ("running", "waiting", "kv_blocks")}
    for name, (least, most) in bounds.items():
        table, _, column = name.partition(".")
        values = tables[table][column]
        wrong = np.flatnonzero((values < least) | (values > most))
        if len(wrong):
            raise SavedRunError(
                f"{path}: {name} at row {wrong[0]} is {values[wrong[0]]}: must be {least} to {most}: damaged, or of "
                "another version"
            )
    spans = tables["span"]
    backward = np.flatnonzero(spans["end_ns"] < spans["start_ns"])
    if len(backward):
        raise SavedRunError(f"{path}: span at row {backward[0]} ends before it starts: damaged")


def load_results(places: Sequence[Path]) -> list[Run]:
    """Returns the runs of several folders, as `load_result` does, with names that tell them apart: paths if need be."""
    runs = [load_result(place) for place in places]
    if len({run.name for run in runs}) == len(runs):
        return runs
    return [replace(run, name=str(place)) for run, place in zip(runs, places, strict=True)]


def _table(name: str, **columns: Array) -> Array:
    """Returns columns as a structured array of a dtype of TABLES. Raises ValueError if they differ in length."""
    table = np.empty(len(next(iter(columns.values()))), dtype=TABLES[name])
    for field, values in columns.items():
        if len(values) != len(table):
            raise InputError(f"{name}.{field} has {len(values)} rows, other fields of {name} have {len(table)}")
        table[field] = values
    return table


def _column(arrays: dict[str, Array], name: str, dtype: np.dtype[Any]) -> Array:
    """Returns an array of a file; InputError unless it is one row of numbers of this type."""
    values = arrays[name]
    if values.ndim != 1 or values.dtype != dtype:
        raise InputError(f"{name} is {values.dtype} {values.shape}: must be {dtype} (rows,)")
    return values


def _read(path: Path) -> tuple[Timeline, int, dict[str, Array]]:
    """Returns the timeline, the makespan and the tables of a file that `save_run` wrote."""
    if not path.is_file():
        raise SavedRunError(f"{path}: is not there; `prestage run --out {path.parent}` writes it beside result.json")
    try:
        with safetensors.safe_open(path, framework="numpy") as content:
            meta = orjson.loads((content.metadata() or {})["meta"])
            arrays = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        timeline, makespan_ns = Timeline(), int(meta["makespan_ns"])
        if not all(isinstance(word, str) for lane in meta["lanes"] for word in lane):
            raise InputError("its lanes must each be a device, a role and a title")
        for device, role, title in meta["lanes"]:
            timeline.add_lane(device, role, title)
        tables = {
            name: _table(
                name, **{field: _column(arrays, f"{name}.{field}", dtype[field]) for field in dtype.names or ()}
            )
            for name, dtype in TABLES.items()
        }
        for name, dtype in ((REQUEST, REQUEST_ROW), (STEP, STEP_ROW)):
            fields = dtype.names or ()
            if f"{name}.{fields[0]}" in arrays:
                columns = [_column(arrays, f"{name}.{field}", np.dtype("<i8")) for field in fields]
                tables[name] = np.array(list(zip(*columns, strict=True)), dtype=dtype)
        timeline.extend(tables["span"].tobytes())
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise SavedRunError(f"{path}: is not what `prestage run --out` writes: {error}") from None
    return timeline, makespan_ns, tables
