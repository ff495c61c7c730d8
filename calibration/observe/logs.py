"""Logs of real runtimes, as observations: a scenario, and what a decode step of it took.

Kinds are known by what they hold: the files of `calibrate decode`, `llama-bench -o json` or `jsonl`, what vLLM's and
SGLang's benchmarks write, a PyTorch profiler's trace of steps, and CSV whose columns are keys of a scenario and
`tokens_per_second`. Each may be gzipped.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ...bounded import check_json, read, unpacked
from ...errors import InputError
from ...workloads.model import Model, load_model
from ..decode.runs import FORMAT, quartile_spread
from ..decode.serving import FORMAT as SERVED
from ..device.host import DISTURBED
from .served_steps import ServedSteps, steps_by_rows
from .serving_logs import Seen, seen, step_ns

_KINDS = (
    "the decode.json or served.json of calibrate decode, llama-bench -o json or jsonl, vllm bench serve --save-result, "
    "sglang.bench_serving or bench_one_batch, a PyTorch profiler's trace, or CSV with a column tokens_per_second"
)
#: Repeats of one setting that differ by more contradict each other; of so many, the shortest and the longest aside.
_CONTRADICTS = 1.5
_MANY = 5
#: How far a model's bytes may be off those of the file that was run: quantizations mix types.
_OTHER_SIZE = 0.15
#: What a scenario's [model] changes of a preset.
_OVERRIDES = ("layers", "experts", "top_k", "dtype", "bits_per_weight", "expert_bytes")


class ObserveError(InputError):
    """A log that cannot be read, or from which nothing can be fitted."""


@dataclass(frozen=True)
class Observation:
    """One setting: `ns` a decode step (the median), over `samples`, whose quartiles lie `spread` of it apart.

    `settings` are a scenario's sections; `group` is the model. `steps`: the steps that were served, if that is known.
    """

    name: str
    group: str
    settings: Mapping[str, Any]
    ns: float
    samples: int
    spread: float | None
    steps: ServedSteps | None = None


@dataclass(frozen=True)
class Context:
    """What logs leave out: the machine, the model (llama-bench, CSV), and more sections of the scenario.

    With `disturbed`, repeats of a decode.json count too in which other programs slowed the host's core.
    """

    profile: str | None = None
    model: str | None = None
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    disturbed: bool = False


def load_logs(files: Sequence[Path], context: Context = Context()) -> list[Observation]:
    """Returns the observations of all files. Raises ObserveError, naming the file and what would be right."""
    found = [each for file in files for each in _read(file, context)]
    if len(found) < 2:
        raise ObserveError(f"{', '.join(map(str, files))}: {len(found)} setting: give at least two, that differ")
    return found


def _read(file: Path, context: Context) -> list[Observation]:
    packed = read(file, ObserveError)
    content = unpacked(packed, file, ObserveError)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ObserveError(f"{file}: is not text: give {_KINDS}") from error
    if not text.lstrip().startswith(("{", "[")):
        return _csv(file, text, context)
    check_json(content, file, len(packed), ObserveError)
    rows = _objects(file, text)
    if len(rows) == 1 and rows[0].get("format") == FORMAT:
        return _decoded(file, rows[0], context)
    if len(rows) == 1 and rows[0].get("format") == SERVED:
        return _in_real_time(file, rows[0], context)
    served = [(number, found) for number, row in enumerate(rows, 1) if (found := _seen(file, number, row)) is not None]
    if served:
        return [_served(file, number, found, context) for number, found in served]
    # Rows as llama-bench prints them, or in the lines of our own driver.
    rows = [row for each in rows for row in (each["rows"] if isinstance(each.get("rows"), list) else [each])]
    rows = [row for row in rows if isinstance(row, dict) and "samples_ns" in row]
    if not rows:
        raise ObserveError(f"{file}: no row has samples_ns: give {_KINDS}")
    return llama_bench(file, rows, context)


def _objects(file: Path, text: str) -> list[dict[str, Any]]:
    try:
        whole = json.loads(text)
    except ValueError:
        try:
            whole = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise ObserveError(f"{file}: is neither JSON nor JSON lines: {error}") from error
    rows = whole if isinstance(whole, list) else [whole]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ObserveError(f"{file}: holds no objects: give {_KINDS}")
    return rows


def _seen(file: Path, number: int, row: Mapping[str, Any]) -> Seen | None:
    try:
        return seen(row, ObserveError)
    except ObserveError as error:
        raise ObserveError(f"{file}: object {number}: {error}") from error


def _served(file: Path, number: int, found: Seen, context: Context) -> Observation:
    """Returns one setting of a server's benchmark, or of a profiled run."""
    if context.model is None:
        raise ObserveError(f"{file}: its layers and experts are not said: give --model")
    workload: dict[str, Any] = {"synthetic": {"tokens": 16 * found.batch}, "prefill": "skip", "batch": found.batch,
                                "warmup": "2steps"}  # fmt: skip
    if found.context is not None:
        workload["context"] = found.context
    sections = _merged({"model": {"preset": context.model}, "workload": workload}, context)
    name = f"{file.name.partition('.')[0]}-{number}-{found.name}"
    spread = quartile_spread(found.samples) if len(found.samples) > 1 else None
    return Observation(name, context.model, sections, step_ns(found.samples), len(found.samples), spread)


def _merged(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Returns sections with what the context says on top."""
    sections = {name: dict(keys) if isinstance(keys, Mapping) else keys for name, keys in settings.items()}
    if context.profile is not None:
        sections["machine"] = {"profile": context.profile}
    for name, keys in context.more.items():
        sections[name] = {**sections.get(name, {}), **keys}
    return sections


def _decoded(file: Path, report: Mapping[str, Any], context: Context) -> list[Observation]:
    """Returns the settings of a decode.json; their traces lie beside it."""
    found = []
    try:
        for run in report["runs"]:
            settings = deepcopy(run["scenario"])
            trace = file.parent / settings["workload"]["trace"]
            if not trace.is_file():
                raise ObserveError(f"{file}: {run['name']}: its trace {trace} is not there: keep both together")
            settings["workload"]["trace"] = str(trace)
            batch = settings["workload"]["batch"]
            repeats = run["repeats"] if context.disturbed else _undisturbed(run["repeats"])
            steps = [batch * 1e9 / repeat["tokens_per_second"] for repeat in repeats]
            sections = _merged(settings, context)
            taken = (median(steps), len(steps), quartile_spread(steps))
            found.append(Observation(run["name"], report["model"]["name"], sections, *taken))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ObserveError(f"{file}: is not a whole {FORMAT}: {type(error).__name__}: {error}") from error
    return found


def _undisturbed(repeats: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Returns the repeats whose core nobody slowed down, as of executed schedules; else the least disturbed one.

    Files without `host_slowdown` do not say which: all repeats count.
    """
    slower = [repeat.get("host_slowdown", 1.0) for repeat in repeats]
    quiet = [repeat for repeat, factor in zip(repeats, slower, strict=True) if factor < DISTURBED]
    return quiet or [repeats[slower.index(min(slower))]]


def _in_real_time(file: Path, report: Mapping[str, Any], context: Context) -> list[Observation]:
    """Returns the steps of a served.json, those of a repeat with as many rows together."""
    try:
        sections, model = _merged(report["scenario"], context), report["model"]["name"]
        return [
            Observation(f"{model}-repeat{number}-{name}", model, sections, steps.ns, len(steps.numbers), None, steps)
            for number, repeat in enumerate(report["repeats"])
            for name, steps in steps_by_rows(repeat).items()
        ]
    except (KeyError, TypeError) as error:
        raise ObserveError(f"{file}: is not a whole {SERVED}: {type(error).__name__}: {error}") from error


def llama_bench(file: Path, rows: Sequence[Mapping[str, Any]], context: Context) -> list[Observation]:
    """Returns the settings of llama-bench's rows that generate, those of several rounds together.

    Rows of a prompt are left out. Raises ObserveError for several models, another model than the one that is given, and
    rows that contradict each other.
    """
    names = sorted({str(row.get("model_filename")) for row in rows})
    if len(names) > 1:
        raise ObserveError(f"{file}: holds rows of {', '.join(names)}: give each model's rows by themselves")
    if context.model is None:
        raise ObserveError(f"{file}: llama-bench says nothing of layers and experts: give --model")
    overrides = {key: value for key, value in context.more.get("model", {}).items() if key in _OVERRIDES}
    model = load_model(context.model, **overrides)
    cells: dict[tuple[int, int, int, bool], list[float]] = {}
    try:
        for row in rows:
            if row["n_prompt"] == 0 and row["n_gen"] > 0:
                whole = row.get("use_mmap", row.get("load_mode") not in ("none", "dio"))
                cell = (min(row["n_cpu_moe"], model.layers), row["n_threads"], row["n_depth"], bool(whole))
                if not row["samples_ns"]:
                    raise ObserveError(
                        f"{file}: samples_ns = []: a row needs a sample: run llama-bench with -r 1 or more"
                    )
                cells.setdefault(cell, []).extend(each / row["n_gen"] for each in row["samples_ns"])
        _check_model(file, rows[0], model)
    except (KeyError, TypeError) as error:
        raise ObserveError(f"{file}: is not llama-bench's: {type(error).__name__}: {error}") from error
    return [_cell(file, cell, samples, context, model) for cell, samples in cells.items()]


def _check_model(file: Path, row: Mapping[str, Any], model: Model) -> None:
    """Refuse a model of another number of weights, or of other bytes, than the file that was run."""
    said, parameters = row["model_n_params"], model.parameters
    if parameters is not None and abs(said / parameters - 1) > 0.05:
        raise ObserveError(
            f"{file}: model_n_params = {said:,}, but --model has {parameters:,}: give the model that was run, or "
            "--set model.layers for a cut one"
        )
    size = row.get("model_size")
    ours = sum(model.dense_bytes) + model.total_expert_bytes + model.head_bytes + model.embedding_beside_head_bytes
    if size is not None and abs(size / ours - 1) > _OTHER_SIZE:
        raise ObserveError(
            f"{file}: model_size = {size:,} bytes, but --model has {ours:,}: give a preset or a file of the "
            "quantization that was run, or --set model.bits_per_weight"
        )


def _cell(file: Path, cell: tuple[int, int, int, bool], samples: Sequence[float], context: Context,
          model: Model) -> Observation:  # fmt: skip
    """Returns one setting of llama-bench."""
    on_cpu, threads, depth, mmap = cell
    name = f"{model.name}-ncmoe{on_cpu}-t{threads}-d{depth}{'' if mmap else '-nommap'}"
    middle = sorted(samples)[1:-1] if len(samples) >= _MANY else sorted(samples)
    if middle[-1] > _CONTRADICTS * middle[0]:
        low, high = middle[0] / 1e6, middle[-1] / 1e6
        raise ObserveError(
            f"{file}: {name}: {low:.3f} and {high:.3f} ms a token contradict each other: measure it again"
        )
    settings = {
        "model": {"preset": context.model},
        "workload": {"synthetic": {"tokens": 16}, "prefill": "skip", "context": depth, "warmup": "2steps"},
        "memory": {"cpu_layers": on_cpu, "gpu_budget": f"{max((model.layers - on_cpu) * model.experts, 1)}experts"},
        "copy": {"host_memory": "pageable" if mmap else "pinned"},
        "miss": {"cpu_threads": threads},
    }
    sections = _merged(settings, context)
    return Observation(name, model.name, sections, median(samples), len(samples), quartile_spread(samples))


def _csv(file: Path, text: str, context: Context) -> list[Observation]:
    """Returns the rows of a table: a column `tokens_per_second`, all others keys such as memory.gpu_budget."""
    table = csv.DictReader(io.StringIO(text))
    columns = table.fieldnames or []
    if "tokens_per_second" not in columns or not all("." in name for name in columns if name != "tokens_per_second"):
        raise ObserveError(
            f"{file}: columns {', '.join(columns)[:200]}: give {_KINDS}; the others are keys of a scenario"
        )
    return list(_csv_rows(file, table, context))


def _csv_rows(file: Path, table: csv.DictReader[str], context: Context) -> Iterator[Observation]:
    for number, row in enumerate(table, start=2):
        try:
            rate = float(row.pop("tokens_per_second"))
        except (TypeError, ValueError):
            rate = 0.0
        if not 0 < rate < float("inf") or None in row.values():
            raise ObserveError(
                f"{file}: line {number}: tokens_per_second must be a number above 0, and no column missing"
            )
        settings: dict[str, Any] = {"model": {"preset": context.model} if context.model else {}}
        for key, value in row.items():
            section, _, name = key.partition(".")
            settings.setdefault(section, {})[name] = int(value) if value.isdigit() else value
        sections = _merged(settings, context)
        workload = sections.setdefault("workload", {})
        if "trace" not in workload:
            sections["workload"] = {"synthetic": {"tokens": 16}, "prefill": "skip", "warmup": "2steps"} | workload
        batch = int(sections.get("workload", {}).get("batch", 1))
        group = str(sections["model"].get("preset", "model"))
        yield Observation(f"line {number}", group, sections, batch * 1e9 / rate, 1, None)
