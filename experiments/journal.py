"""The journal of a sweep: JSONL, one finished scenario a line, no header; and its export as csv or parquet.

A line is written whole, as soon as its scenario has finished, so that whatever dies next loses nothing that is there.
"""

from __future__ import annotations

import csv
import io
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson

from ..engine.scenario.rows import JournalError, Row, flat, parsed, read_rows
from ..engine.scenario.sections import DRAWN_BY, FIT_REPLACES
from ..files import check_file, naming, replacing
from ..output.shown import frame, latex, table_html
from ..output.tables.sweeps import sweep_cells
from ..resources.parts.written import PARTS

if TYPE_CHECKING:
    from pandas import DataFrame

try:
    import fcntl
except ImportError:  # Windows locks no files this way: there, two sweeps into one journal are the user's to avoid
    fcntl = None  # type: ignore[assignment]

#: A kind of file and a name, whose contents a row notes.
Content = tuple[str, str]
#: More keys than any scenario has.
MOST_KEYS = 256
#: Rows that go into a parquet file at a time.
_BATCH = 1000


class Journal:
    """A journal open for writing, and nobody else's meanwhile; `done` are the keys of the rows that it holds.

    Opening drops what a killed sweep left half-written, and the rows with an error, which run again; before that,
    `check` may refuse the rows that are there.
    """

    def __init__(self, path: Path, check: Callable[[Iterator[Row]], None] | None = None) -> None:
        self.path = path
        self.done: set[bytes] = set()
        self._file = _locked(path)
        try:
            if check is not None:
                check(read_rows(path))
            if any(self._keep(row) is None for row in parsed(path)):
                self.done.clear()
                self._rewrite()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self.path.stat().st_size == 0:
            self.path.unlink()  # nothing came of it
        self._file.close()

    def rows(self) -> Iterator[Row]:
        """Yields the rows."""
        return read_rows(self.path)

    def append(self, key: str, line: bytes) -> None:
        """Add a row, given as one line of JSON."""
        self.done.add(bytes.fromhex(key))
        with naming(self.path):
            self._file.write(line + b"\n")

    def _keep(self, row: Row | None) -> bytes | None:
        """Note a row as done and return its key; None for a row that runs again or is there already."""
        key = bytes.fromhex(row["key"]) if row is not None else b""
        if row is None or row["error"] is not None or key in self.done:
            return None
        self.done.add(key)
        return key

    def _rewrite(self) -> None:
        with replacing(self.path) as file:
            for row in parsed(self.path):
                if self._keep(row) is not None:
                    file.write(orjson.dumps(row) + b"\n")
        self._file.close()
        self._file = _locked(self.path)


def check_one_sweep(
    rows: Iterable[Row], path: str | Path, first: Row, keys: Iterable[str], digests: Mapping[Content, str] | None = None
) -> None:
    """Refuse rows that are not of one sweep with `first`: what is no key of its grid must be the same in all of them.

    So must be the version that ran them, and the contents of files of one name; `digests` are those known beforehand.
    """
    outside = _outside(keys)
    base, known = _of_base(first, outside), dict(digests or {})
    for row in rows:
        other = _of_base(row, outside)
        contents = _contents(row)
        changed = next((each for each in contents if known.setdefault(each, contents[each]) != contents[each]), None)
        key = next((key for key, value in base.items() if key in other and other[key] != value), None)
        if changed is not None:
            what = f"the {changed[0]} {changed[1]!r} had other contents"
        elif key is not None:
            what = f"{key} = {other[key]!r}, and here it is {base[key]!r}"
        else:
            continue
        raise JournalError(
            f"{path}: has rows of another sweep: in row {row['key'][:8]} {what}: give another file, or move this one "
            "away"
        )


def sweep_rows(path: str | Path) -> Iterator[Row]:
    """Yields the rows of a journal like `read_rows`, after a look whether they are of one sweep; JournalError else."""
    first = next(read_rows(path), None)
    if first is not None:
        keys = {key for row in read_rows(path) for key in row.get("settings", ())}
        if len(keys) > MOST_KEYS:
            raise JournalError(f"{path}: its rows vary {len(keys):,} keys, and a scenario has not so many: no sweep")
        check_one_sweep(read_rows(path), path, first, keys)
    return read_rows(path)


#: Keys that settle others: a trace takes the place of a synthetic one, and weights are of one predictor.
_SETTLED = {
    "workload.trace": ("workload.synthetic",),
    "workload.synthetic": ("workload.trace",),
    **{
        f"workload.synthetic.{key}": tuple(
            f"workload.synthetic.{other}" for other in (*FIT_REPLACES, *DRAWN_BY) if other != key
        )
        for key in DRAWN_BY
    },
    "predictor.name": ("predictor.weights",),
    **{f"machine.{part}": ("machine.profile",) for part in PARTS},
}
#: Where a scenario names each kind of file whose contents a row notes.
_NAMED = {
    "profile": "machine.profile",
    "model": "model.preset",
    "trace": "workload.trace",
    "fit": "workload.synthetic.fit",
    "requests": "requests.trace",
    "acceptance": "requests.speculation.acceptance",
}


def _outside(varied: Iterable[str]) -> Callable[[str], bool]:
    """Returns whether a key is varied or settled by what is: the key, a section that it lies in, or one in it."""
    given = set(varied)
    given |= {
        other for key, others in _SETTLED.items() if any(key in _sections(one) for one in given) for other in others
    }
    holding = {section for key in given for section in _sections(key)}
    return lambda key: key in holding or not given.isdisjoint(_sections(key))


def _sections(key: str) -> list[str]:
    """Returns a key and the sections that it lies in: a.b.c, a.b, a."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _of_base(row: Row, outside: Callable[[str], bool]) -> dict[str, Any]:
    """Returns what a row says of its sweep, by key: all of its scenario but what is varied, and the version."""
    base = {key: value for key, value in flat(row["scenario"]).items() if not outside(key)}
    return base if row["error"] is not None else base | {"version": row.get("versions", {}).get("prestage")}


def _contents(row: Row) -> dict[Content, str]:
    """Returns the digests of the files that a row's scenario names, by kind and name."""
    named, digests = flat(row["scenario"]), row.get("sha256", {})
    return {(what, named[key]): digests[what] for what, key in _NAMED.items() if named.get(key) and digests.get(what)}


class Rows:
    """The rows of a finished sweep, in the order of its grid; each is read from the journal when it is asked for."""

    def __init__(self, path: Path, keys: Iterable[str]) -> None:
        self.path = path
        where, at = {}, 0
        with path.open("rb") as file:
            for line in file:
                where[bytes.fromhex(orjson.loads(line)["key"])] = at
                at += len(line)
        # Two points of a grid can make one scenario, whose row then counts once.
        self._offsets = array("q", dict.fromkeys(where[bytes.fromhex(key)] for key in keys))

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self) -> Iterator[Row]:
        with self.path.open("rb") as file:
            for offset in self._offsets:
                file.seek(offset)
                yield orjson.loads(file.readline())

    @property
    def errors(self) -> Iterator[Row]:
        """The rows of scenarios that failed."""
        return (row for row in self if row["error"] is not None)

    def to_pandas(self) -> DataFrame:
        """Returns the rows as a DataFrame, a column for each figure by its dotted name.

        Raises InputError without pandas.
        """
        return frame(flat(row) for row in self)

    def to_latex(self) -> str:
        """Returns the varied settings and main figures of each row as a LaTeX tabular."""
        return latex(*sweep_cells(self))

    def to_csv(self, path: str | Path) -> None:
        """Write every figure of every row as .csv, or as .parquet by the file's ending. Raises JournalError."""
        check_export(Path(path))
        export(self, Path(path))

    def __repr__(self) -> str:
        return f"<Rows of {self.path}: {len(self):,}, {sum(1 for _ in self.errors):,} of them failed>"

    def _repr_html_(self) -> str:
        columns, rows = sweep_cells(self)
        return table_html(repr(self), [tuple(columns), *map(tuple, rows)])


def check_export(path: Path) -> None:
    """Refuse, before anything runs, a file that rows cannot be exported to. Raises JournalError and OSError."""
    if path.suffix not in EXPORTS:
        raise JournalError(f"{path}: a sweep's file must end in one of {', '.join(EXPORTS)}")
    check_file(path)
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise JournalError(f"{path}: needs pyarrow; install the extra: pip install 'prestage[parquet]'") from None


def export(rows: Iterable[Row], path: Path) -> None:
    """Write rows as .csv or .parquet, whole or not at all; `rows` is gone through twice, for the columns first."""
    EXPORTS[path.suffix](rows, path)


def _write_csv(rows: Iterable[Row], path: Path) -> None:
    columns = list(_columns(rows))
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        table = csv.DictWriter(text, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(flat(row) for row in rows)
        text.detach()


def _write_parquet(rows: Iterable[Row], path: Path) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    arrow = {bool: pyarrow.bool_(), int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}
    columns = _columns(rows)
    schema = pyarrow.schema([(name, arrow[kind]) for name, kind in columns.items()])
    batch: list[dict[str, Any]] = []
    with replacing(path) as file, ParquetWriter(file, schema) as table:

        def write() -> None:
            table.write_table(pyarrow.Table.from_pylist(batch, schema))
            batch.clear()

        for row in rows:
            values = flat(row)
            batch.append({name: kind(values[name]) for name, kind in columns.items() if values.get(name) is not None})
            if len(batch) == _BATCH:
                write()
        write()


def _columns(rows: Iterable[Row]) -> dict[str, type]:
    """Returns the columns of all rows, in order of appearance, with the type that holds every value of each."""
    columns: dict[str, type] = {}
    for row in rows:
        for name, value in flat(row).items():
            kind, known = type(value), columns.get(name)
            if value is None or kind is known:
                columns.setdefault(name, type(None))
            elif known in (None, type(None)):
                columns[name] = kind
            else:
                columns[name] = float if {kind, known} == {int, float} else str
    return {name: str if kind is type(None) else kind for name, kind in columns.items()}


def _nothing(rows: Iterable[Row], path: Path) -> None:
    """Leave the journal as what it is."""


#: How rows are exported, by the ending of the file; a journal is JSONL already.
EXPORTS = {".jsonl": _nothing, ".csv": _write_csv, ".parquet": _write_parquet}


def _locked(path: Path) -> BinaryIO:
    """Open a journal to append to, unbuffered: a row is in the file once it is written."""
    file = path.open("ab", buffering=0)
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise JournalError(
                f"{path}: another sweep is writing it; wait for that one, or give another file"
            ) from None
    return file
