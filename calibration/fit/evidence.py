"""Evidence: what a cost was seen to be, by microbenchmarks and inside schedules, and how sure that is.

A row is the summary of many samples of one thing. A fit takes rows from the schedules where there are any, because a
tight loop and an idle GPU give other figures, and from the microbenchmarks else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...bounded import read
from ...files import replacing
from ..executor.measured import load_all
from ..measure.samples import Samples, SamplesError
from . import in_schedule

#: An interquartile range above this share of the median is noisy.
NOISY = 0.1
#: How the name of a file of rows ends.
ROWS_ENDING = ".rows.json"
#: Which run, in percent from the fastest, stands for a calm one.
_CALM = 25
#: The largest relative error that is stated: what is near 0, such as a difference of two clocks, has none of use.
_MOST_UNSURE = 0.5
#: Where a figure is from, as a profile's notes say it.
MICRO, SCHEDULE = "by microbenchmark", "inside schedules"
#: The interquartile range of a normal distribution, in standard deviations.
_IQR_SIGMAS = 1.349

Key = Mapping[str, Any]
#: Sizes, or tokens, and what each takes in ns.
Points = Sequence[tuple[int, float]]
#: Makes of points a function from size to ns.
Fitter = Callable[[Points], Callable[[int], float]]


@dataclass(frozen=True)
class Row:
    """A cost as it was observed: what it depends on, how many samples, and these in short, in ns.

    `run_medians_ns` and `run_means_ns` have those of each round, or of each run of a schedule; `where` is MICRO or
    SCHEDULE.
    """

    cost: str
    key: Key
    n: int
    median_ns: float
    mean_ns: float
    iqr_ns: float
    run_medians_ns: tuple[float, ...]
    run_means_ns: tuple[float, ...]
    where: str = SCHEDULE

    @property
    def calm_ns(self) -> float:
        """The mean of a calm run: the lower quartile of runs, as what disturbs the host only makes it slower."""
        return float(np.percentile(self.run_means_ns, _CALM))

    @property
    def typical_ns(self) -> float:
        """The mean of a typical run: the median of all."""
        return float(np.median(self.run_means_ns))

    @property
    def noisy(self) -> bool:
        """Whether the interquartile range is more than NOISY of the median."""
        return self.iqr_ns > NOISY * self.median_ns

    @property
    def run_spread(self) -> float:
        """How far the medians of runs lie apart: their standard deviation over their mean."""
        mean_ns = float(np.mean(self.run_medians_ns))
        return float(np.std(self.run_medians_ns)) / mean_ns if mean_ns else 0.0

    @property
    def scatter(self) -> float:
        """How far single samples lie apart: a standard deviation, from the interquartile range, over the median."""
        return self.iqr_ns / _IQR_SIGMAS / self.median_ns if self.median_ns else 0.0

    @property
    def shown(self) -> dict[str, float]:
        """What a profile keeps of the samples."""
        return {"n": self.n, "median_ns": max(0.0, self.median_ns), "iqr_ns": self.iqr_ns}


@dataclass(frozen=True)
class Term:
    """One fitted cost as the report shows it: name, form, samples, and how far it can be off (fractions)."""

    name: str
    form: str
    n: int
    uncertainty: dict[str, float]


class Evidence:
    """All rows, by cost; `schedule` are those from inside schedules."""

    def __init__(self, rows: Iterable[Row], schedule: Iterable[Row] = ()) -> None:
        self._rows: dict[str, list[Row]] = {}
        self._schedule: dict[str, list[Row]] = {}
        for found, into in ((rows, self._rows), (schedule, self._schedule)):
            for row in found:
                into.setdefault(row.cost, []).append(row)

    def micro(self, cost: str, **key: Any) -> list[Row]:
        """Returns the rows of microbenchmarks whose key has these values."""
        return [row for row in self._rows.get(cost, ()) if _matches(row, key)]

    def schedule(self, cost: str, **key: Any) -> list[Row]:
        """Returns the rows from inside schedules whose key has these values."""
        return [row for row in self._schedule.get(cost, ()) if _matches(row, key)]

    def schedule_like(self, prefix: str) -> list[Row]:
        """Returns the rows from inside schedules whose cost begins so."""
        return [row for cost, rows in self._schedule.items() if cost.startswith(prefix) for row in rows]

    def noisy(self) -> list[Row]:
        """Returns the rows of microbenchmarks that are noisy."""
        return [row for rows in self._rows.values() for row in rows if row.noisy]


def _matches(row: Row, key: Key) -> bool:
    return all(row.key.get(name) == value for name, value in key.items())


def sample_rows(samples: Sequence[Samples]) -> list[Row]:
    """Returns the summary of every series; of one that several files have, that of the first."""
    rows: list[Row] = []
    known: set[tuple[str, str]] = set()
    for file in samples:
        its = [_summary(series.term, series.key, series.rounds_ns) for series in file.series]
        rows += [row for row in its if _name(row) not in known]
        known.update(map(_name, its))
    return rows


def _name(row: Row) -> tuple[str, str]:
    return row.cost, repr(sorted(row.key.items()))


def _summary(cost: str, key: Key, rounds_ns: Iterable[Iterable[float]]) -> Row:
    rounds = [list(samples) for samples in rounds_ns]
    every = [value for samples in rounds for value in samples]
    low, middle, high = np.percentile(every, (25, 50, 75)).tolist()
    medians, means = (tuple(float(of(samples)) for samples in rounds) for of in (np.median, np.mean))
    return Row(cost, key, len(every), middle, float(np.mean(every)), high - low, medians, means, MICRO)


def load_schedule(paths: Iterable[Path]) -> list[Row]:
    """Returns the rows from inside schedules: of measured runs, of folders of them, and of files of rows (.rows.json).

    Raises SamplesError or MeasuredError.
    """
    rows, runs = [], []
    for path in paths:
        if path.name.endswith(ROWS_ENDING):
            rows += _load_rows(path)
        else:
            runs.append(path)
    return rows + (rows_of(in_schedule.samples(load_all(runs)), "measured runs") if runs else [])


def check_rows_file(path: Path) -> None:
    """Raise SamplesError if a file of rows may not be called so."""
    if not path.name.endswith(ROWS_ENDING):
        raise SamplesError(f"{path}: a file of rows must end in {ROWS_ENDING}")


def save_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as JSON, one a line."""
    check_rows_file(path)
    kept = [{name: value for name, value in asdict(row).items() if name != "where"} for row in rows]
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in kept)
    with replacing(path) as file:
        file.write(f"[\n{lines}\n]\n".encode())


def _load_rows(path: Path) -> list[Row]:
    try:
        data = json.loads(read(path, SamplesError))
    except SamplesError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise SamplesError(f"{path}: cannot be read as JSON: {error}") from None
    return rows_of(data, str(path))


def rows_of(data: Any, source: str) -> list[Row]:
    """Returns rows from plain data; SamplesError, naming `source` and the row, if it is something else."""
    rows = []
    if not isinstance(data, list):
        raise SamplesError(f"{source}: must be a list of rows")
    for number, row in enumerate(data):
        try:
            medians, means = (tuple(map(float, row[f"run_{what}_ns"])) for what in ("medians", "means"))
            median_ns, mean_ns, iqr_ns = (float(row[name]) for name in ("median_ns", "mean_ns", "iqr_ns"))
            tokens = row["key"].get("tokens", 1)
            if row["n"] < 1 or not medians or not means or type(tokens) is not int or tokens < 1:
                raise ValueError("n, run_medians_ns, run_means_ns and tokens must not be 0 or empty")
            if not np.isfinite([*medians, *means, median_ns, mean_ns, iqr_ns]).all():
                raise ValueError("its times must be finite")
            rows.append(
                Row(str(row["cost"]), dict(row["key"]), int(row["n"]), median_ns, mean_ns, iqr_ns, medians, means)
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise SamplesError(f"{source}: row {number}: {type(error).__name__}: {error}") from None
    return rows


def uncertainty(rows: Sequence[Row], fitter: Fitter | None = None, size: str = "") -> dict[str, float]:
    """Returns how far a cost fitted on these rows can be off, as the profile's `Uncertainty`.

    The last run of every row is held back: the rest is fitted, and predicts it. Without a fitter each row stands for
    itself; with one, it makes a function of the rows' `size`. Rows count by how long they take.
    """
    kept = [_without_last(row) for row in rows]
    if fitter is None:
        predicted = kept
    else:
        function = fitter([(row.key[size], kept_ns) for row, kept_ns in zip(rows, kept, strict=True)])
        predicted = [function(row.key[size]) for row in rows]
    weights = [row.median_ns for row in rows]
    errors = [row.run_medians_ns[-1] / ns - 1 if ns else 0.0 for row, ns in zip(rows, predicted, strict=True)]
    return {
        "run_spread": _root_mean_square([row.run_spread for row in rows], weights),
        "scatter": _root_mean_square([row.scatter for row in rows], weights),
        "held_back_error": _root_mean_square(errors, weights),
    }


def _without_last(row: Row) -> float:
    return float(np.median(row.run_medians_ns[:-1] or row.run_medians_ns))


def _root_mean_square(values: Sequence[float], weights: Sequence[float]) -> float:
    if not any(weight > 0 for weight in weights):
        return 0.0
    mean = float(np.sqrt(np.average(np.square(values), weights=np.maximum(0, weights))))
    return round(min(_MOST_UNSURE, mean), 5)


def weighted_mean_ns(rows: Sequence[Row]) -> float:
    """Returns the mean over all samples of several rows, in ns."""
    return float(np.average([row.mean_ns for row in rows], weights=[row.n for row in rows]))


def together(rows: Sequence[Row]) -> dict[str, float]:
    """Returns what a profile keeps of the samples of several rows."""
    weights = [row.n for row in rows]
    median_ns, iqr_ns = (
        float(np.average([getattr(row, name) for row in rows], weights=weights)) for name in ("median_ns", "iqr_ns")
    )
    return {"n": sum(weights), "median_ns": max(0.0, round(median_ns, 1)), "iqr_ns": round(iqr_ns, 1)}


def latency_of(seen: Sequence[tuple[int, float]], note: str) -> dict[str, Any]:
    """Returns a latency from (samples, ns): the median over all samples."""
    values = np.repeat([ns for _, ns in seen], [n for n, _ in seen])
    return {"ns": round(float(np.median(values))), "source": "measured", "note": note}
