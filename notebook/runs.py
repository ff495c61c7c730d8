"""Runs, comparisons and sweeps as a notebook asks for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from ..engine import simulate as simulating
from ..engine.measure import comparison
from ..engine.run import Progress
from ..engine.scenario.scenario import Scenario
from ..errors import InputError
from ..experiments import sweep as sweeping
from ..experiments.journal import Rows
from ..output.saved import Run, run_of
from ..output.shown import Shown, csv_text, frame, latex, table_html
from ..output.tables.layout import number_of
from .settings import Given, scenario_of, settings_of, whole_key

if TYPE_CHECKING:
    from pandas import DataFrame


class Result(Shown, simulating.Result):
    """A finished run: what it says, what each GPU recorded, and how it shows itself."""

    __repr__ = Shown.__repr__  # the dataclass's would print every array

    @cached_property
    def run(self) -> Run:
        """The run as figures and saved folders have it: its data, timeline, accesses, copies, memory and tokens."""
        return run_of(self)

    def _run(self) -> Run:
        return self.run

    @property
    def _figures(self) -> Mapping[str, Any]:
        return self.with_range()  # without the arrays of the run


def simulate(
    scenario: Given = None,
    *,
    baselines: bool | Mapping[str, float] = True,
    check_prefetch: bool = False,
    replicates: int = 0,
    progress: Progress | None = None,
    stream: Path | None = None,
    engine: str | None = None,
    settings: Mapping[str, Any] | None = None,
    **keys: Any,
) -> Result:
    """Simulate a scenario: `simulate("default", tokens=20)`.

    `scenario` is a shipped one's name, a TOML file, plain data by sections, a Scenario, or None for the default;
    `settings` maps keys, with their section or alone where that is clear, to values, and so do further `keys`. The
    rest is as the command has it: `baselines=False` leaves out the two runs that speedup and
    resident_ms need; `check_prefetch` also runs the same cache without prefetch; `replicates` more runs, with costs
    drawn from their uncertainty, give percentiles; `stream` is a folder that keeps the timeline while it grows;
    `engine` is "compiled" or "simpy". Raises InputError.
    """
    return _shown(
        simulating.simulate(
            scenario_of(scenario, {**(settings or {}), **keys}),
            baselines=baselines,
            check_prefetch=check_prefetch,
            replicates=replicates,
            progress=progress,
            stream=stream,
            engine=engine,
        )
    )


def _shown(result: simulating.Result) -> Result:
    return Result(**{each.name: getattr(result, each.name) for each in fields(result)})


class Comparison(dict[str, Any]):
    """Runs side by side: `figures`, `ratios` to the first, `settings` that differ, `where` the time went."""

    def to_pandas(self) -> DataFrame:
        """Returns the figures as a DataFrame: a row for each, a column for each run.

        Raises InputError without pandas.
        """
        return frame(self["figures"]).T.set_axis(self["runs"], axis=1)

    def to_latex(self) -> str:
        """Returns the figures as a LaTeX tabular."""
        return latex(["", *self["runs"]], self._cells())

    def to_csv(self) -> str:
        """Returns the figures as CSV, None as an empty cell."""
        return csv_text(["figure", *self["runs"]], [(name, *values) for name, values in self["figures"].items()])

    def _cells(self) -> list[tuple[str, ...]]:
        return [(name, *(number_of(each, 3) for each in values)) for name, values in self["figures"].items()]

    def __repr__(self) -> str:
        return f"<Comparison of {', '.join(self['runs'])}: {len(self['figures'])} figures>"

    def _repr_html_(self) -> str:
        return table_html("Runs side by side", [("", *self["runs"]), *self._cells()])


def compare(*runs: Any) -> Comparison:
    """Returns two or more runs side by side, all against the first: `compare(one, other)`.

    A run is a result, or its plain data (`Result.data`, a result.json). They may also be in one list, or in one dict by
    names; without names they are called as `load_result` named them, else by number. Raises InputError, CompareError.
    """
    given = runs[0] if len(runs) == 1 else runs
    if isinstance(given, Mapping) and not _is_data(given):
        named = dict(given)
    elif isinstance(given, Iterable) and not isinstance(given, str | Mapping):
        named = {}
        for number, run in enumerate(given, 1):
            name = getattr(run, "name", f"run {number}")
            named[name if name not in named else f"{name} ({number})"] = run
    else:
        raise InputError(f"runs = {type(given).__name__}: give two or more results: compare(one, other)")
    return Comparison(comparison.compare({name: _data_of(name, run) for name, run in named.items()}))


def _is_data(run: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether a mapping is the data of one run, and not of runs by their names."""
    return isinstance(run, Mapping) and "makespan_ms" in run


def sweep(
    scenario: Scenario | str | Path | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    *,
    out: str | Path = "sweep.jsonl",
    settings: Iterable[str] | Mapping[str, Any] = (),
    sample: int | None = None,
    workers: int | None = None,
    cluster: str | None = None,
    baselines: bool = True,
    progress: Progress | None = None,
    **keys: Any,
) -> Rows:
    """Run every combination of a grid's values: `sweep("default", {"prefetch.k": [1, 2, 4]}, tokens=20)`.

    `scenario` is one, the name or file of one, or of a sweep, which has a grid of its own; `grid` maps keys to values.
    Keys, of the grid, of `settings` and further `keys`, stand with their section or alone where that is clear;
    `settings` may also be texts, `key=value`. The rest is as the command has it: `out` is the journal (.jsonl), or a
    .csv or .parquet file exported at the end from a journal beside it, whose finished rows are not run again; `sample`
    runs so many combinations; `workers` processes (all cores; 1 is this process), or those of the Dask scheduler at
    the address `cluster`, run them; `baselines` are run once for all rows that share them; `progress` is called with
    (what, done, total).

    Raises ValueError (GridError, ScenarioError, JournalError, WorkerError, …) and OSError before anything runs.
    """
    given = list(settings_of(settings) if isinstance(settings, Mapping) else settings)
    return sweeping.sweep(
        scenario,
        None if grid is None else {whole_key(key): values for key, values in grid.items()},
        out=out,
        settings=[*given, *settings_of(keys)],
        sample=sample,
        workers=workers,
        cluster=cluster,
        baselines=baselines,
        progress=progress,
    )


def _data_of(name: str, run: Any) -> Mapping[str, Any]:
    data = getattr(run, "data", run)
    if not _is_data(data):
        raise InputError(f"{name} = {type(run).__name__}: give a Result, a loaded run, or a result's data")
    return data
