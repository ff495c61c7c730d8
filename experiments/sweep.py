"""Sweeps: many scenarios over processes or a cluster, into a journal from which a killed sweep goes on.

A row is a result without its layers, under the key of its configuration: the scenario and the contents of the files
that it names. Every row can be run again alone: `prestage run results.jsonl#KEY`.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from .. import plugins
from ..bounded import read
from ..engine.baselines import BASELINES, baseline_scenario, run_baseline
from ..engine.costs.costs import part_costs
from ..engine.load import load_inputs
from ..engine.scenario.amounts import ScenarioError
from ..engine.scenario.inputs import Inputs
from ..engine.scenario.rows import Row
from ..engine.scenario.scenario import Scenario, make_scenario
from ..engine.scenario.sections import DRAWN_BY
from ..engine.simulate import simulate_inputs, versions
from ..engine.timing.ready import make_ready
from ..errors import InputError
from ..resources.profile import load_profile
from ..workloads.fitted import FittedRouting
from ..workloads.importers import open_trace
from ..workloads.model import load_model
from ..workloads.popularity import load_popularity
from ..workloads.trace import RoutingTrace
from ..workloads.trace_limits import TraceError
from .grid import Grid, Point, make_grid
from .journal import Journal, Rows, check_export, check_one_sweep, export
from .workers import Workers

#: Called with what is running, and how many of how many are done.
Progress = Callable[[str, int, int], None]
#: SHA-256 of what a scenario names: its profile, its model, and its trace or what one is drawn by (None without).
Hashes = dict[str, str | None]
#: So few scenarios go by SimPy where the engine is not compiled yet; more of them wait for that.
_FEW = 8
#: Traces that a worker keeps.
_TRACES = 8


@dataclass(frozen=True)
class Task:
    """One scenario to run: all that a worker needs, without the trace itself."""

    key: str
    point: Point
    scenario: dict[str, Any]
    hashes: Hashes
    #: Makespans in ms of BASELINES by name; None leaves them out.
    baselines: dict[str, float] | None = None


@dataclass(frozen=True)
class Baseline:
    """One run that rows share: the scenario of one of BASELINES."""

    name: str
    key: str
    scenario: dict[str, Any]
    hashes: Hashes


def sweep(
    scenario: Scenario | str | Path | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    *,
    out: str | Path,
    settings: Iterable[str] = (),
    sample: int | None = None,
    workers: int | None = None,
    cluster: str | None = None,
    baselines: bool = True,
    progress: Progress | None = None,
) -> Rows:
    """Run every combination of a grid's values over a scenario, and return the rows in the order of the grid.

    `scenario` is one, the name or file of one, or of a sweep, which has a grid of its own; `grid` maps keys to values.
    `out` is the journal (.jsonl), or a .csv or .parquet file that is exported at the end from a journal beside it. Rows
    that the journal holds are not run again, those with an error are. `workers` processes run them (all cores; 1 is
    this process), or those of the Dask scheduler at the address `cluster`. `baselines` are run once for all rows that
    share them. `progress` is called with (what, done, total).

    Raises ValueError (GridError, ScenarioError, JournalError, WorkerError, …) and OSError before anything runs.
    """
    path = Path(out)
    check_export(path)
    plan = Plan(make_grid(scenario, grid, settings=settings, sample=sample), baselines, path.with_suffix(".jsonl"))
    if len(plan.grid) > _FEW:
        make_ready(progress)
    with Workers(workers, cluster) as crew, Journal(path.with_suffix(".jsonl"), plan.check_rows) as journal:
        if baselines:
            _run_baselines(plan, crew, journal, progress)
        done = len(plan.grid) - sum(1 for _ in plan.tasks(journal.done))
        if progress is not None:
            progress("scenarios", done, len(plan.grid))
        for task, line in crew.run(run_task, plan.tasks(journal.done)):
            journal.append(task.key, line or failed_row(task, "its worker died of it"))
            done += 1
            if progress is not None:
                progress("scenarios", done, len(plan.grid))
    rows = Rows(path.with_suffix(".jsonl"), (key for key, _, _ in plan.points()))
    export(rows, path)
    return rows


@dataclass
class Plan:
    """What is to run: a grid with the hashes of the files that it names, each read once."""

    grid: Grid
    baselines: bool
    #: The journal, for what is said of it.
    path: Path = Path()
    #: Makespans in ms of baselines, by their key.
    known: dict[str, float] = field(default_factory=dict)
    _hashes: dict[tuple[str, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A file that is missing or broken is refused now, and not in every row that names it.
        for key, what in (("machine.profile", "profile"), ("model.preset", "model"), ("workload.trace", "trace")):
            section, name = key.split(".")
            for value in self.grid.values.get(key, [self.grid.base[section][name]]):
                if value is not None:
                    self._hash(what, value)

    def check_rows(self, rows: Iterator[Row]) -> None:
        """Refuse rows of another scenario than this grid's, or of one whose files have changed. Raises JournalError."""
        row = next(rows, None)
        if row is None:
            return
        found = (each for each in self.points() if isinstance(each[2], Scenario))
        _, point, scenario = next(found, (None, next(self.grid.points()), None))
        first: Row = {"scenario": self.grid.data(point), "error": "cannot run"}
        if isinstance(scenario, Scenario):
            self.hashes(scenario)
            first = {"scenario": scenario.plain(), "error": None, "versions": versions()}
        check_one_sweep(chain([row], rows), self.path, first, self.grid.values, self._hashes)

    def points(self) -> Iterator[tuple[str, Point, Scenario | ScenarioError]]:
        """Yields (key, point, its scenario, or why it is none)."""
        for point in self.grid.points():
            try:
                scenario = self.grid.scenario(point)
            except ScenarioError as error:
                yield _key(self.grid.data(point), {}, self.baselines), point, error
            else:
                yield _key(scenario.plain(), self.hashes(scenario), self.baselines), point, scenario

    def tasks(self, done: set[bytes]) -> Iterator[Task]:
        """Yields what is not done, once: two points of the grid may make one scenario."""
        begun = set(done)
        for key, point, scenario in self.points():
            if bytes.fromhex(key) in begun:
                continue
            begun.add(bytes.fromhex(key))
            if isinstance(scenario, ScenarioError):
                yield Task(key, point, self.grid.data(point), {})
                continue
            hashes = self.hashes(scenario)
            known = {
                shared.name: self.known[shared.key] for shared in _shared(scenario, hashes) if shared.key in self.known
            }
            yield Task(key, point, scenario.plain(), hashes, known if self.baselines else None)

    def missing_baselines(self, done: set[bytes]) -> Iterator[Baseline]:
        """Yields the baselines of what is not done, each once, that are not known now."""
        begun = set(self.known)
        for key, _, scenario in self.points():
            if isinstance(scenario, ScenarioError) or bytes.fromhex(key) in done:
                continue
            for shared in _shared(scenario, self.hashes(scenario)):
                if shared.key not in begun:
                    begun.add(shared.key)
                    yield shared

    def hashes(self, scenario: Scenario) -> Hashes:
        """Returns the hashes of what a scenario names."""
        trace, synthetic = scenario.workload.trace, scenario.workload.synthetic
        named = {key: getattr(synthetic, key, None) for key in DRAWN_BY}
        drawn_by = next((self._hash(key, name) for key, name in named.items() if name is not None), None)
        return {
            "profile": self._hash("profile", scenario.machine.profile),
            "model": self._hash("model", scenario.model.preset),
            "trace": self._hash("trace", trace) if trace is not None else None,
            "fit": drawn_by,
            **self._asked(scenario),
            **({"plugins": plugins.digest()} if plugins.loaded() else {}),
        }

    def _asked(self, scenario: Scenario) -> Hashes:
        """Returns the hashes of the files that [requests] names, if any."""
        section = scenario.requests
        drafts = None if section is None else section.speculation
        named = {
            "requests": None if section is None else section.trace,
            "acceptance": drafts.acceptance if drafts is not None and isinstance(drafts.acceptance, str) else None,
        }
        return {what: self._hash(what, path) for what, path in named.items() if path is not None}

    def _hash(self, what: str, name: str) -> str:
        if (what, name) not in self._hashes:
            self._hashes[what, name] = _CONTENT[what](name)
        return self._hashes[what, name]


def _run_baselines(plan: Plan, crew: Workers, journal: Journal, progress: Progress | None) -> None:
    """Find the makespans of all baselines of rows to come: in the journal's rows, or by running each once."""
    for row in journal.rows():
        if row["error"] is None and "resident_ms" in row and row["versions"]["prestage"] == version("prestage"):
            for shared in _shared(make_scenario(row["scenario"]), row["sha256"]):
                if f"{shared.name}_ms" in row:
                    plan.known[shared.key] = row[f"{shared.name}_ms"]
    total = sum(1 for _ in plan.missing_baselines(journal.done))
    for number, (shared, makespan_ms) in enumerate(crew.run(run_shared, plan.missing_baselines(journal.done)), start=1):
        if makespan_ms is not None:
            plan.known[shared.key] = makespan_ms
        if progress is not None:
            progress("baselines", number, total)


def _shared(scenario: Scenario, hashes: Hashes) -> Iterator[Baseline]:
    """Yields the baselines of a scenario, under a key that scenarios share if they share the baseline."""
    prefetches = scenario.prefetch.lookahead > 0 and scenario.prefetch.policy != "none"
    for name in BASELINES:
        if name != "no_prefetch" or prefetches:  # without prefetch, the row is its own
            plain = baseline_scenario(name, scenario).plain()
            yield Baseline(name, _key(plain, hashes, name), plain, hashes)


def run_task(task: Task) -> bytes:
    """Run a task, in whatever process this is, and return its row as a line of JSON; an error is a row too."""
    try:
        inputs = worker_inputs(make_scenario(task.scenario), task.hashes)
        if task.baselines is None:
            result = simulate_inputs(inputs, baselines=False)
        else:
            complete = task.baselines.keys() >= BASELINES.keys() - {"no_prefetch"}
            result = simulate_inputs(inputs, baselines=task.baselines if complete else True, check_prefetch=True)
    except InputError as error:
        return failed_row(task, " ".join(str(error).split()))
    except Exception as error:  # whatever it is, it is this scenario's, and the others go on
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {' '.join(str(error).split())} ({where.filename}, line {where.lineno})"
        return failed_row(task, f"{plugins.whose_fault()}: {what}")
    head = {"key": task.key, "settings": task.point, "error": None, "sha256": task.hashes, **_plugged()}
    figures = {name: value for name, value in result.data.items() if name != "by_layer"}
    # As it was asked for: a run knows more, such as the bytes of a share of memory, by which no row is known again.
    return orjson.dumps({**head, **figures, "scenario": task.scenario})


def _plugged() -> dict[str, list[str]]:
    """Returns what a row says of the plug-ins that it ran with; nothing without any."""
    names = [plugin.name for plugin in plugins.loaded()]
    return {"plugins": names} if names else {}


def failed_row(task: Task, error: str) -> bytes:
    """Returns the row of a scenario that failed, as a line of JSON."""
    return orjson.dumps(
        {
            "key": task.key,
            "settings": task.point,
            "error": error,
            "sha256": task.hashes,
            **_plugged(),
            "seed": task.scenario.get("seed"),
            "scenario": task.scenario,
            "versions": versions(),
        }
    )


def run_shared(shared: Baseline) -> float | None:
    """Run a baseline and return its makespan in ms; None if it cannot run, which its rows then say themselves."""
    with suppress(Exception):
        inputs = worker_inputs(make_scenario(shared.scenario), shared.hashes)
        return run_baseline(shared.name, inputs, part_costs(inputs))
    return None


def worker_inputs(scenario: Scenario, hashes: Hashes) -> Inputs:
    """Load a scenario's inputs; a trace's file is read once in this process, however many scenarios name it."""
    path, digest = scenario.workload.trace, hashes["trace"]
    return load_inputs(scenario, None if path is None or digest is None else _trace(path, digest))


@lru_cache(maxsize=_TRACES)
def _trace(path: str, digest: str) -> RoutingTrace:
    """Returns the trace of a file if it has this SHA-256: the same whenever it is asked for, so it may be kept."""
    trace = open_trace(path)
    if _trace_sha256(trace) != digest:
        raise TraceError(f"{path}: this worker finds another trace there than the sweep began with")
    return trace


def _key(scenario: Mapping[str, Any], hashes: Hashes, what: bool | str) -> str:
    """Returns the key of a configuration: 32 hexadecimal digits of its SHA-256."""
    return _sha256([version("prestage"), scenario, hashes, what])[:32]


def _sha256(data: Any) -> str:
    return hashlib.sha256(orjson.dumps(data, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _trace_sha256(trace: RoutingTrace) -> str:
    sha = hashlib.sha256()
    for name, value in [*vars(trace).items(), *trace.extra.items()]:
        if isinstance(value, np.ndarray):
            sha.update(f"{name} {value.dtype.str} {value.shape}".encode())
            sha.update(value.tobytes())
    return sha.hexdigest()


def _file_sha256(key: str, path: str) -> str:
    try:
        return hashlib.sha256(read(Path(path), ScenarioError)).hexdigest()
    except OSError as error:
        raise ScenarioError(f"{key} = {path!r}: cannot be read: {error.strerror or error}") from None


#: What identifies the contents of what a scenario names; it raises what is wrong with them.
_CONTENT: dict[str, Callable[[str], str]] = {
    "profile": lambda name: _sha256(load_profile(name).model_dump(mode="json")),
    "model": lambda name: _sha256(load_model(name)),
    "fit": lambda path: _sha256(asdict(FittedRouting.load(path))),
    "popularity": lambda path: _sha256(load_popularity(Path(path)).tolist()),
    "trace": lambda path: _trace_sha256(open_trace(path)),
    "requests": partial(_file_sha256, "requests.trace"),
    "acceptance": partial(_file_sha256, "requests.speculation.acceptance"),
}
