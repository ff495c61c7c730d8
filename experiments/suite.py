"""Benchmark suites: transfers, published tables run again, and studies, each of sweeps over one scenario.

A suite is a TOML file (`suites/`). What is finished is kept in the output folder as it finishes, sweeps in their
journals and the rest in parts.json, so that a suite that was killed goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..bounded import parse_toml, read
from ..engine.measure.insights import best, finished, front
from ..engine.scenario.rows import Row, flat
from ..engine.scenario.scenario import load_scenario
from ..engine.simulate import versions
from ..engine.timing.ready import make_ready
from ..errors import InputError
from ..files import made_folder, write_file
from ..guide.reproduce import TABLES
from ..output.charts import CHARTS, MEMORY
from ..words import file_name, problems, unknown_name
from .grid import make_grid
from .journal import Rows
from .sweep import Progress, sweep
from .workers import Workers

#: A transfer benchmark, as plain data: `calibration.transfer` makes them.
Transfer = dict[str, Any]
#: The figure of speed on the front of speed against memory.
SPEED = "tokens_per_second"
#: The name of the sweep that is a study's scenario alone.
BASE = "base"


class SuiteError(InputError):
    """A suite that cannot run; the message names the suite, the key and what would be right."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


#: A name that is part of a file's.
FileName = Annotated[str, AfterValidator(file_name)]


class Chart(_Part):
    """One picture of a sweep, as `prestage plot` draws it."""

    kind: str
    x: str | None = None
    by: str | None = None
    figure: str = SPEED

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        return _one_of("kind", kind, CHARTS)


class SuiteSweep(_Part):
    """A grid over a study's scenario, with settings of its own."""

    name: FileName
    question: str
    settings: dict[str, Any] = Field(default={}, alias="set")
    grid: dict[str, list[Any]]
    charts: list[Chart] = []


class Study(_Part):
    """One scenario, the settings laid over it (`quick` ones with --quick), and the sweeps that change it."""

    name: FileName
    title: str
    scenario: str
    settings: dict[str, Any] = Field(default={}, alias="set")
    quick: dict[str, Any] = {}
    sweeps: list[SuiteSweep]

    def with_settings(self, part: SuiteSweep | None, quick: bool) -> list[str]:
        """Returns all that is set in a sweep (None: in the scenario alone), as `key=value`."""
        own = part.settings if part is not None else {}
        return [f"{k}={json.dumps(v)}" for k, v in {**self.settings, **(self.quick if quick else {}), **own}.items()]


class Metric(_Part):
    """A figure of a row by which configurations are ranked."""

    name: str
    figure: str
    best: Literal["most", "least"]


class Suite(_Part):
    """What a suite runs and shows."""

    title: str
    transfers: list[str] = []
    published: list[str] = []
    quick_published: list[str] = []
    #: Values, by key, of runs that are shown and never the best configuration: they know the future.
    bounds: dict[str, list[Any]] = {}
    metrics: list[Metric] = Field(min_length=1)
    studies: list[Study]

    @field_validator("transfers")
    @classmethod
    def _profiles(cls, names: list[str]) -> list[str]:
        stems = [file_name(transfer_name(name)) for name in names]
        for name in {name for name, stem in zip(names, stems, strict=True) if stems.count(stem) > 1}:
            raise InputError(f"{name!r}: given twice, or another file has its name: rename one")
        return names

    @field_validator("published", "quick_published")
    @classmethod
    def _tables(cls, names: list[str]) -> list[str]:
        return [_one_of("table", name, TABLES) for name in names]


def transfer_name(profile: str) -> str:
    """Returns what the files about a profile's transfers are called after: a profile's name, or its file's."""
    return Path(profile).name.removesuffix(".json")


def _one_of(what: str, name: str, known: Mapping[str, Any]) -> str:
    if name not in known:
        raise InputError(unknown_name(what, name, known))
    return name


def suite_names() -> list[str]:
    """Returns the names of the shipped suites."""
    folder = resources.files("prestage") / "experiments" / "suites"
    return sorted(entry.name[: -len(".toml")] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_suite(name: str | Path = "default") -> Suite:
    """Returns a suite: a TOML file's, its scenarios' files beside it, or a shipped one; SuiteError or OSError else."""
    if str(name) in suite_names():
        text = (resources.files("prestage") / "experiments" / "suites" / f"{name}.toml").read_text("utf-8")
    elif str(name).endswith(".toml"):
        text = _text(Path(name))
    else:
        raise SuiteError(unknown_name("suite", str(name), [*suite_names(), "FILE.toml"]))
    data = parse_toml(text, f"suite {str(name)!r}", SuiteError)
    try:
        suite = Suite.model_validate(data)
    except ValidationError as error:
        raise SuiteError(f"suite {str(name)!r}: {problems(error, Suite, data)}") from None
    # A scenario's file is looked for beside the suite's.
    beside = [
        study.model_copy(update={"scenario": str(Path(name).parent / study.scenario)})
        if study.scenario.endswith(".toml")
        else study
        for study in suite.studies
    ]
    return suite.model_copy(update={"studies": beside})


def _text(path: Path) -> str:
    try:
        return read(path, SuiteError).decode("utf-8")
    except UnicodeDecodeError:
        raise SuiteError(f"suite {str(path)!r}: not UTF-8 text") from None


@dataclass(frozen=True)
class Finished:
    """A suite's results: `data` is plain data for JSON, `rows` the sweeps' rows by study and sweep."""

    suite: Suite
    data: dict[str, Any]
    rows: dict[tuple[str, str], Rows]

    def of_study(self, study: Study) -> list[Row]:
        """Returns the runs that a study chooses from, each once, with what differs from its scenario as settings."""
        return _choices(self.suite, study, self.rows)


def run_suite(
    suite: Suite,
    out: Path,
    *,
    quick: bool = False,
    transfers: Mapping[str, Transfer] | None = None,
    measured: Mapping[str, Callable[[], Transfer]] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Finished:
    """Run what is not there yet, and return everything.

    `out` is the folder that keeps it: rows/STUDY-SWEEP.jsonl and parts.json. `transfers` are transfer benchmarks by
    name, and `measured` what measures more of them, each once. `workers` processes run sweeps and tables (all cores; 1:
    here). `progress` is called with (what, done, total).
    Raises ValueError (SuiteError, GridError, …) and OSError, for what the suite's definition says before anything runs.
    """
    jobs = _jobs(suite, quick)
    make_ready(progress)
    with made_folder(out / "rows"):
        parts = _Parts(out / "parts.json")
        copies = {**(transfers or {})}
        copies |= {name: parts.get(f"transfer {name}", measure) for name, measure in (measured or {}).items()}
        published = _published(suite.quick_published if quick else suite.published, parts, workers, progress)
        rows: dict[tuple[str, str], Rows] = {}
        done, total = 0, sum(job.size for job in jobs)
        for job in jobs:
            rows[job.study.name, job.name] = sweep(
                job.study.scenario,
                job.grid,
                settings=job.settings,
                out=out / "rows" / f"{job.study.name}-{job.name}.jsonl",
                workers=workers,
                progress=_counted(progress, done, total),
            )
            done += job.size
            for row in rows[job.study.name, job.name].errors if job.name == BASE else ():
                raise SuiteError(f"study {job.study.name!r}: its scenario cannot run: {row['error']}")
    studies = [_study(suite, study, rows) for study in suite.studies]
    data = {"title": suite.title, "quick": quick, "versions": versions(), "transfers": copies, "published": published}
    return Finished(suite, {**data, "studies": studies}, rows)


@dataclass(frozen=True)
class _Job:
    """One sweep to run."""

    study: Study
    name: str
    grid: dict[str, list[Any]]
    settings: list[str]
    size: int


def _jobs(suite: Suite, quick: bool) -> list[_Job]:
    """Returns the sweeps of a suite: of each study its scenario alone (BASE) and its own, checked before any runs."""
    jobs: dict[tuple[str, str], _Job] = {}
    _check_files(suite)
    for study in suite.studies:
        seed = load_scenario(study.scenario, study.with_settings(None, quick)).seed
        for name, part in ((BASE, None), *((part.name, part) for part in study.sweeps)):
            grid = {"seed": [seed]} if part is None else part.grid
            settings = study.with_settings(part, quick)
            size = len(make_grid(study.scenario, grid, settings=settings))
            jobs[study.name, name] = _Job(study, name, grid, settings, size)
    return list(jobs.values())


def picture_name(study: Study, part: SuiteSweep | None, number: int = 0) -> str:
    """Returns what a sweep's chart of this number is called, without an ending; without a sweep, the study's front."""
    return f"{study.name}-{'front' if part is None else part.name}" + (f"-{number + 1}" if number else "")


def _check_files(suite: Suite) -> None:
    """Raise SuiteError if two sweeps, or two charts, would be one file, on a system that does not tell cases apart."""
    seen: dict[tuple[str, str], str] = {}
    for what, name, whose in _files(suite):
        first = seen.setdefault((what, name.lower()), whose)
        if first is not whose:
            raise SuiteError(
                f"suite {suite.title!r}: two {what} are named {name!r}, of {first} and of {whose}: rename one"
            )


def _files(suite: Suite) -> Iterator[tuple[str, str, str]]:
    """Yields what each file of a suite is: of sweeps or charts, its name, and whose it is."""
    for study in suite.studies:
        for part in (None, *study.sweeps):
            name = BASE if part is None else part.name
            whose = f"study {study.name!r}, sweep {name!r}"
            yield "sweeps", f"{study.name}-{name}", whose
            for number in range(1 if part is None else len(part.charts)):
                yield "charts", picture_name(study, part, number), whose


def _counted(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Returns what tells a sweep's scenarios as part of all scenarios of the suite."""
    if progress is None:
        return None

    def told(what: str, done: int, of: int) -> None:
        if what == "scenarios":
            progress(what, before + done, total)

    return told


class _Parts:
    """Plain data by name in a JSON file, each part made once; another version of Prestage begins anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._made: dict[str, Any] = {}
        if path.is_file():
            try:
                kept = orjson.loads(path.read_bytes())
                if kept["versions"] == versions():
                    self._made = {**kept["parts"]}
            except (orjson.JSONDecodeError, KeyError, TypeError) as error:
                raise SuiteError(f"{path}: is not what a suite keeps; remove it, or give another folder") from error

    def __contains__(self, name: str) -> bool:
        return name in self._made

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """Returns a part; where there is none yet, make and keep it."""
        if name not in self._made:
            self.keep(name, make())
        return self._made[name]

    def keep(self, name: str, part: Any) -> None:
        """Write a part to the file."""
        self._made[name] = part
        write_file(self._path, orjson.dumps({"versions": versions(), "parts": self._made}, option=orjson.OPT_INDENT_2))


def _published(
    names: Sequence[str], parts: _Parts, workers: int | None, progress: Progress | None
) -> dict[str, list[dict[str, Any]]]:
    missing = [name for name in names if f"published {name}" not in parts]
    with Workers(workers) as crew:
        for done, (name, rows) in enumerate(crew.run(published_table, missing), start=1):
            if rows is None:
                raise SuiteError(f"published table {name}: its worker died of it")
            parts.keep(f"published {name}", rows)
            if progress is not None:
                progress("published tables", done, len(missing))
    return {name: parts.get(f"published {name}", TABLES[name]) for name in names}


def published_table(name: str) -> list[dict[str, Any]]:
    """Returns the rows of a published table, in whatever process this is."""
    return TABLES[name]()


def _study(suite: Suite, study: Study, rows: Mapping[tuple[str, str], Rows]) -> dict[str, Any]:
    """Returns what the rows of a study come to: where it starts, the best by each metric, the front, errors."""
    choices = _choices(suite, study, rows)
    (base,) = rows[study.name, BASE]
    failed = [row for part in study.sweeps for row in rows[study.name, part.name].errors]
    return {
        "name": study.name,
        "title": study.title,
        "scenario": base["scenario"],
        "choices": len(choices),
        "errors": [{"settings": row["settings"], "error": row["error"]} for row in failed],
        "best": [_best(metric, choices, base) for metric in suite.metrics],
        "front": [spot._asdict() for spot in front(finished(choices, SPEED, MEMORY), SPEED, MEMORY)],
    }


def _best(metric: Metric, rows: Sequence[Row], base: Row) -> dict[str, Any]:
    """Returns the best of rows by a metric: its value, the scenario's, what changed, and the name of the row."""
    found = best(finished(rows, metric.figure, MEMORY), metric.figure, MEMORY, most=metric.best == "most")
    row = next(row for row in rows if row["settings"] == found["settings"])
    return {
        **metric.model_dump(),
        "value": found[metric.figure],
        "start": flat(base).get(metric.figure),
        "settings": row["settings"],
        "row": f"rows/{row['journal']}#{row['key'][:8]}",
    }


def _choices(suite: Suite, study: Study, rows: Mapping[tuple[str, str], Rows]) -> list[Row]:
    """Returns a study's rows, each once, without errors and bounds, with what differs from its scenario as settings."""
    (base,) = rows[study.name, BASE]
    keys = dict.fromkeys(key for part in study.sweeps for key in (*part.settings, *part.grid))
    distinct: dict[str, Row] = {}
    for name in (BASE, *(part.name for part in study.sweeps)):
        for row in rows[study.name, name]:
            if row["error"] is None:
                distinct.setdefault(row["key"], {**row, "journal": f"{study.name}-{name}.jsonl"})
    chosen = []
    for row in distinct.values():
        values = {key: _value(row["scenario"], key) for key in keys}
        if not any(values.get(key) in bounds for key, bounds in suite.bounds.items()):
            changed = {key: value for key, value in values.items() if value != _value(base["scenario"], key)}
            chosen.append({**row, "settings": changed})
    return chosen


def _value(scenario: Mapping[str, Any], key: str) -> Any:
    """Returns the value of `section.key` in a scenario's plain data, None where it has none."""
    value: Any = scenario
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
