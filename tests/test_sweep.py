"""Sweeps: rows equal single runs, bad grids are refused, and whatever dies, nothing finished is lost or repeated."""

from __future__ import annotations

import csv
import importlib.util
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prestage.engine.scenario.rows import JournalError, read_rows
from prestage.engine.scenario.scenario import load_scenario, make_scenario
from prestage.engine.simulate import simulate
from prestage.errors import InputError
from prestage.experiments.grid import Grid, make_grid, parse_grid
from prestage.experiments.journal import Journal, sweep_rows
from prestage.experiments.sweep import sweep
from prestage.experiments.workers import WorkerError, Workers
from prestage.workloads.importers import open_trace
from prestage.workloads.trace import RoutingTrace

SMALL = ["model.layers=3", "workload.tokens=8", "workload.synthetic.tokens=12", "workload.synthetic.prefill_tokens=2"]
GRID: dict[str, list[Any]] = {"memory.gpu_budget": ["20%", "40%"], "prefetch.lookahead": [0, 1, 2]}
#: A sweep of 16 scenarios of about a tenth of a second each, so that there is time to kill something.
LONG = [
    "sweep",
    "synthetic",
    *("--set", "model.layers=8", "--set", "workload.tokens=100", "--set", "copy.contention=false"),
    *("--grid", "seed=0,1", "--grid", "prefetch.lookahead=0,1", "--grid", "memory.gpu_budget=20%,30%,40%,50%"),
    *("--no-baselines", "--json"),
]
needs_dask = pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None, reason="Dask is not installed (the extra `cluster`)"
)
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc to find worker processes in")


def small_sweep(out: Path, grid: dict[str, list[Any]] | None = None, **options: Any) -> Any:
    return sweep("synthetic", grid or GRID, settings=SMALL, out=out, workers=options.pop("workers", 1), **options)


# The grid.


def test_a_grid_is_every_combination_the_last_key_fastest() -> None:
    grid = make_grid("synthetic", {"prefetch.k": [1, 2], "seed": [5, 6]})
    assert list(grid.points()) == [
        {"prefetch.k": 1, "seed": 5},
        {"prefetch.k": 1, "seed": 6},
        {"prefetch.k": 2, "seed": 5},
        {"prefetch.k": 2, "seed": 6},
    ]


def test_a_sample_is_drawn_by_the_seed_without_repetition_in_the_grids_order() -> None:
    values = {"prefetch.k": list(range(1, 11)), "prefetch.lookahead": list(range(10))}

    def drawn(seed: int) -> list[tuple[Any, ...]]:
        return [
            tuple(point.values())
            for point in make_grid("synthetic", values, settings=[f"seed={seed}"], sample=9).points()
        ]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) == 9
    assert drawn(1) == sorted(drawn(1))
    assert len(make_grid("synthetic", values, sample=1000)) == 100  # there are no more


def test_a_huge_grid_is_sampled_without_being_listed() -> None:
    values = {key: list(range(1, 101)) for key in ("prefetch.k", "workload.batch", "seed", "workload.tokens")}
    grid = Grid(load_scenario("synthetic").plain(), values, sample=3)
    assert (grid.combinations, len(list(grid.points()))) == (10**8, 3)


def test_values_are_read_as_settings_are_and_come_once() -> None:
    parsed = parse_grid(["memory.gpu_budget=25%, 4GiB", "copy.drop_stale=[true, false]", "prefetch.k=1,2,1"])
    assert parsed == {"memory.gpu_budget": ["25%", "4GiB"], "copy.drop_stale": [True, False], "prefetch.k": [1, 2, 1]}
    assert len(make_grid("synthetic", {"prefetch.k": [1, 2, 1]})) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the grid is empty"),
        (["prefetch.k="], "grid prefetch.k: no values"),
        (["prefetch.k"], "--grid 'prefetch.k': write it as section.key=value"),
        (["prefetch.k=1", "prefetch.k=2"], "prefetch.k has its values already"),
        (["prefetch.lookahed=1"], "prefetch.lookahed: no such key; did you mean 'lookahead'"),
        (["prefetch.k=1,two"], "prefetch.k = 'two': must be a valid integer"),
        (["prefetch.k=0"], "prefetch.k = 0: must be greater than or equal to 1"),
        (["memory.gpu_budget=25%,lots"], "gpu_budget = 'lots'"),
        (["memory.eviction=lrv"], "memory.eviction = 'lrv': choose one of"),
        (["machine.profile=h200-pcie5,none"], "machine.profile = 'none': choose one of"),
        (["model.preset=gpt-oss-21b"], "model 'gpt-oss-21b'"),
        (["workload.trace=none.npz"], "none.npz: cannot be read"),
        (["copy.drop_stale=true"], "drop_stale = true needs discipline = 'priority'"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_runs(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("'", ".")):
        sweep("synthetic", parse_grid(options), settings=SMALL, out=tmp_path / "rows.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["rows.txt", "none/rows.jsonl"])
def test_a_file_that_cannot_take_rows_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="rows"):
        small_sweep(tmp_path / name)


def test_workers_and_a_cluster_are_refused_together() -> None:
    with pytest.raises(WorkerError, match="give workers or a cluster"):
        Workers(2, "tcp://127.0.0.1:1")
    with pytest.raises(WorkerError, match="workers = 0"):
        Workers(0)


# Rows.


@pytest.mark.slow
def test_a_row_is_what_a_run_of_its_scenario_alone_gives(tmp_path: Path) -> None:
    rows = list(small_sweep(tmp_path / "rows.jsonl"))
    assert [tuple(row["settings"].values()) for row in rows] == [(b, k) for b in ("20%", "40%") for k in (0, 1, 2)]
    for row in rows:
        alone = simulate(make_scenario(row["scenario"]), check_prefetch=True).data
        del alone["by_layer"]
        assert {name: row[name] for name in alone} == alone
        assert row.keys() - alone.keys() == {"key", "settings", "error", "sha256"}


def test_a_baseline_that_rows_share_runs_once(tmp_path: Path) -> None:
    told: dict[str, int] = {}
    small_sweep(tmp_path / "rows.jsonl", progress=lambda what, done, total: told.update({what: total}))
    # Six rows: one with everything resident, one without cache and one without prefetch for either budget.
    assert told == {"baselines": 1 + 2 + 2, "scenarios": 6}


def test_without_baselines_what_they_give_is_left_out(tmp_path: Path) -> None:
    assert all("speedup" not in row for row in small_sweep(tmp_path / "rows.jsonl", baselines=False))


def test_the_configuration_is_the_key(tmp_path: Path) -> None:
    keys = {row["key"] for row in small_sweep(tmp_path / "a.jsonl")}
    assert keys == {row["key"] for row in small_sweep(tmp_path / "b.jsonl", dict(reversed(list(GRID.items()))))}
    assert not keys & {row["key"] for row in small_sweep(tmp_path / "c.jsonl", GRID | {"seed": [1]})}


def test_another_file_under_the_same_name_is_another_configuration(tmp_path: Path) -> None:
    keys = []
    for tokens in (4, 5):
        drawn = simulate(load_scenario("synthetic", settings=SMALL), baselines=False).recording.trace
        RoutingTrace(drawn.experts[:tokens], drawn.num_experts).save(tmp_path / "t.npz")
        grid = {"workload.trace": [str(tmp_path / "t.npz")]}
        keys += [
            row["key"]
            for row in sweep("synthetic", grid, settings=["model.layers=3"], out=tmp_path / f"{tokens}.jsonl")
        ]
    assert len(set(keys)) == 2


def test_a_trace_is_read_once_by_a_worker_however_many_rows_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = simulate(load_scenario("synthetic", settings=SMALL), baselines=False).recording.trace
    drawn.save(tmp_path / "t.npz")
    opened: list[str] = []

    def counting(path: str) -> RoutingTrace:
        opened.append(path)
        return open_trace(path)

    monkeypatch.setattr("prestage.experiments.sweep.open_trace", counting)
    settings = ["model.layers=3", f"workload.trace={tmp_path / 't.npz'}"]
    rows = sweep("synthetic", GRID, settings=settings, out=tmp_path / "rows.jsonl", workers=1)
    assert len(rows) == 6 and not list(rows.errors)
    assert opened == [str(tmp_path / "t.npz")] * 2  # to check it before anything runs, and in the only worker


def test_a_combination_that_cannot_run_is_a_row_with_its_error_and_the_rest_goes_on(tmp_path: Path) -> None:
    grid: dict[str, list[Any]] = {
        "copy.drop_stale": [False, True],
        "copy.discipline": ["fifo", "priority"],
        "prefetch.k": [2, 33],
    }
    rows = small_sweep(tmp_path / "rows.csv", grid)
    said = {tuple(row["settings"].values()): row["error"] for row in rows}
    assert len(said) == 8
    assert sorted(key for key, error in said.items() if error is None) == [
        (False, "fifo", 2),
        (False, "priority", 2),
        (True, "priority", 2),
    ]
    assert "needs discipline = 'priority'" in said[True, "fifo", 2]
    assert said[False, "fifo", 33] == "prefetch.k = 33: a layer has 32 experts"
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert [row["error"] for row in csv.DictReader(file)] == [row["error"] or "" for row in rows]


def test_csv_and_parquet_hold_every_row_in_the_grids_order(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (the extra `parquet`)")
    rows = list(small_sweep(tmp_path / "rows.csv"))
    small_sweep(tmp_path / "rows.parquet")  # the journal has them all
    with (tmp_path / "rows.csv").open(newline="") as file:
        from_csv = list(csv.DictReader(file))
    from_parquet = parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    for row, text, typed in zip(rows, from_csv, from_parquet, strict=True):
        assert typed["tokens_per_second"] == row["tokens_per_second"] == float(text["tokens_per_second"])
        assert typed["prefetch.lookahead"] == row["settings"]["prefetch.lookahead"] == int(text["prefetch.lookahead"])
        assert typed["counts.miss"] == row["counts"]["miss"]
        assert typed["scenario.prefetch.k"] is None and text["scenario.prefetch.k"] == ""


def test_two_points_that_make_one_scenario_are_one_row(tmp_path: Path) -> None:
    assert len(small_sweep(tmp_path / "rows.jsonl", {"predictor.recall": [1, 1.0, 0.5]}, workers=2)) == 2
    assert len(list(read_rows(tmp_path / "rows.jsonl"))) == 2


# The journal.


def test_a_sweep_goes_on_where_it_was_and_repeats_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    whole = {row["key"]: row for row in small_sweep(path)}
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:100])  # killed within the fourth row
    ran: list[int] = []
    rows = small_sweep(path, progress=lambda what, done, _: ran.append(done) if what == "scenarios" else None)
    assert ran == [3, 4, 5, 6]
    assert {row["key"]: row for row in rows} == whole
    assert path.read_bytes().splitlines(keepends=True)[:3] == lines[:3]


def test_rows_with_an_error_run_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    small_sweep(path, {"prefetch.k": [2, 33]})
    ran: list[int] = []
    small_sweep(path, {"prefetch.k": [2, 33]}, progress=lambda what, done, _: ran.append(done))
    assert ran[-2:] == [1, 2]
    assert len(list(read_rows(path))) == 2


def test_a_grid_that_grew_runs_only_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    small_sweep(path)
    ran: list[int] = []
    rows = small_sweep(path, GRID | {"seed": [0, 1]}, progress=lambda what, done, _: ran.append(done))
    assert (len(rows), ran.index(6)) == (12, len(ran) - 7)  # it told 6 before it ran the other 6


def test_two_sweeps_into_one_journal_are_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "rows.jsonl"), pytest.raises(JournalError, match="another sweep is writing it"):
        small_sweep(tmp_path / "rows.jsonl")


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"mine": 1}\n')
    with pytest.raises(JournalError, match=r"rows.jsonl: line 1 is no row of a sweep"):
        small_sweep(path)
    assert path.read_text() == '{"mine": 1}\n'


def test_a_row_runs_again_alone_by_its_key(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = next(iter(small_sweep(path)))
    assert load_scenario(f"{path}#{row['key'][:8]}") == make_scenario(row["scenario"])
    with pytest.raises(JournalError, match="0 rows have a key that begins with 'x'"):
        load_scenario(f"{path}#x")


# Faults, with real processes and real kills.


def deadly(number: int) -> int:
    """What a worker does in the next test: the sixth kills it."""
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)
    return number


@pytest.mark.process
def test_tasks_that_nobody_waits_for_end_without_a_word() -> None:
    few = "tasks = Workers(2).run(abs, range(50)); next(tasks); tasks.close()"
    script = f"from prestage.experiments.workers import Workers; {few}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.process
def test_a_task_that_kills_its_worker_is_found_out_and_the_rest_goes_on() -> None:
    with Workers(2) as workers:
        assert sorted(workers.run(deadly, range(30))) == [(n, None if n == 5 else n) for n in range(30)]


class Unreadable:
    """A task that no worker can unpickle."""

    def __reduce__(self) -> tuple[type[int], tuple[str]]:
        return int, ("no number",)


def reading(task: Unreadable) -> str:
    return repr(task)


@pytest.mark.process
def test_a_task_that_workers_cannot_read_stops_all_at_once_saying_so() -> None:
    said = r"workers cannot read what .*reading is to do: .* ValueError: invalid"
    with pytest.raises(WorkerError, match=said), Workers(2) as workers:
        list(workers.run(reading, [Unreadable(), Unreadable()]))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The rows of the long sweep as this process alone makes them, as sorted lines."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = subprocess.run(command(*LONG, "--workers", "1"), cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return rows_of(folder / "sweep.jsonl")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "prestage", *arguments]


def rows_of(journal: Path) -> list[bytes]:
    return sorted(journal.read_bytes().splitlines())


def wait_for_rows(driver: subprocess.Popen[bytes], journal: Path, rows: int, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not journal.exists() or journal.read_bytes().count(b"\n") < rows:
        assert driver.poll() is None, "the sweep ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def worker_pids(driver: int) -> list[int]:
    """The worker processes of a driver."""
    children = Path(f"/proc/{driver}/task/{driver}/children").read_text().split()
    lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    return [pid for pid, line in lines.items() if "popen_loky" in line]


@pytest.mark.process
@needs_proc
def test_a_killed_worker_then_a_killed_driver_lose_nothing_and_repeat_nothing(
    tmp_path: Path, undisturbed: list[bytes]
) -> None:
    journal = tmp_path / "sweep.jsonl"
    driver = subprocess.Popen(command(*LONG, "--workers", "2"), cwd=tmp_path, stdout=subprocess.DEVNULL)
    wait_for_rows(driver, journal, 3)
    os.kill(worker_pids(driver.pid)[0], signal.SIGKILL)
    wait_for_rows(driver, journal, 8)
    orphans = worker_pids(driver.pid)
    driver.kill()
    driver.wait()
    before = journal.read_bytes()
    assert 8 <= before.count(b"\n") < 16
    done = subprocess.run(command(*LONG, "--workers", "2"), cwd=tmp_path, capture_output=True, check=True)
    assert b'"errors": 0' in done.stdout
    assert rows_of(journal) == undisturbed  # 16 rows, each once
    assert journal.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    for _ in range(100):  # they end without their driver, within about a second
        if not any(is_running(pid) for pid in orphans):
            return
        time.sleep(0.1)
    raise AssertionError(f"still running without their driver: {[pid for pid in orphans if is_running(pid)]}")


def is_running(pid: int) -> bool:
    """Whether a process is there and is not one that has ended but that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.process
def test_ctrl_c_leaves_a_valid_journal_says_so_and_the_same_command_goes_on(
    tmp_path: Path, undisturbed: list[bytes]
) -> None:
    journal = tmp_path / "sweep.jsonl"
    driver = subprocess.Popen(
        command(*LONG, "--workers", "2"), cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True
    )
    wait_for_rows(driver, journal, 3)
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, said = driver.communicate(timeout=120)
    assert driver.returncode == 130
    *progress, last = said.decode().splitlines()
    assert last == "stopped; sweep.jsonl has what is done, and the same command goes on"
    assert all(line.startswith("scenarios: ") for line in progress)  # said where it takes long
    assert set(rows_of(journal)) < set(undisturbed)
    subprocess.run(command(*LONG, "--workers", "2"), cwd=tmp_path, capture_output=True, check=True)
    assert rows_of(journal) == undisturbed


def start_cluster(folder: Path) -> tuple[str, list[subprocess.Popen[bytes]]]:
    """Start a Dask scheduler and two workers as the README says: its address, and the processes, scheduler first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    quiet: dict[str, Any] = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    dask = [sys.executable, "-m", "dask"]
    host = ["--host", "127.0.0.1", "--no-dashboard"]
    one = ["--nthreads", "1", "--no-nanny"]
    scheduler = [*dask, "scheduler", *host, "--port", address.rpartition(":")[2]]
    commands = [scheduler, *([*dask, "worker", address, *host, *one] for _ in range(2))]
    return address, [subprocess.Popen(line, **quiet) for line in commands]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A cluster of two workers, ended at the end."""
    address, processes = start_cluster(tmp_path)
    yield address, processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.process
@needs_dask
def test_a_cluster_gives_the_same_rows_even_if_a_worker_is_killed(
    tmp_path: Path, undisturbed: list[bytes], cluster: tuple[str, list[subprocess.Popen[bytes]]]
) -> None:
    address, processes = cluster
    wait_for_workers(address, 2)
    journal = tmp_path / "sweep.jsonl"
    driver = subprocess.Popen(command(*LONG, "--cluster", address), cwd=tmp_path, stdout=subprocess.DEVNULL)
    wait_for_rows(driver, journal, 5)
    processes[-1].kill()
    assert driver.wait(120) == 0
    assert rows_of(journal) == undisturbed


@pytest.mark.process
@needs_dask
def test_a_lost_scheduler_ends_the_sweep_with_one_line_and_it_goes_on_without(
    tmp_path: Path, undisturbed: list[bytes], cluster: tuple[str, list[subprocess.Popen[bytes]]]
) -> None:
    address, processes = cluster
    wait_for_workers(address, 1)
    driver = subprocess.Popen(command(*LONG, "--cluster", address), cwd=tmp_path, stderr=subprocess.PIPE)
    wait_for_rows(driver, tmp_path / "sweep.jsonl", 2)
    processes[0].kill()
    _, said = driver.communicate(timeout=120)
    assert driver.returncode == 2
    assert b"prestage: the cluster's scheduler is gone; what was finished is kept" in said.splitlines()
    subprocess.run(command(*LONG, "--workers", "1"), cwd=tmp_path, capture_output=True, check=True)
    assert rows_of(tmp_path / "sweep.jsonl") == undisturbed


def wait_for_workers(address: str, count: int) -> None:
    code = (
        "import sys\nfrom distributed import Client\n"
        "client = Client(sys.argv[1], timeout=60)\nclient.wait_for_workers(int(sys.argv[2]), timeout=60)\n"
    )
    subprocess.run([sys.executable, "-c", code, address, str(count)], capture_output=True, check=True)


@needs_dask
def test_a_cluster_that_does_not_answer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prestage.experiments.workers.CONNECT_S", 1)
    with pytest.raises(WorkerError, match=r"127.0.0.1:9.: no scheduler answers there"):
        sweep("synthetic", GRID, settings=SMALL, out=tmp_path / "rows.jsonl", cluster="tcp://127.0.0.1:9")
    assert not list(tmp_path.iterdir())


# One journal, one sweep.


def test_another_base_scenario_is_refused_and_the_journal_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    small_sweep(path, {"prefetch.lookahead": [0, 1]})
    before = path.read_bytes()
    with pytest.raises(JournalError, match=r"another sweep: in row \w{8} workload.batch = 1, and here it is 2: give"):
        sweep("synthetic", {"prefetch.lookahead": [0, 1]}, settings=[*SMALL, "workload.batch=2"], out=path, workers=1)
    # Nor one whose grid lacks what the rows vary: their values would be drawn as if they were the scenario's.
    with pytest.raises(JournalError, match=r"prefetch.lookahead = 0, and here it is 1"):
        small_sweep(path, {"prefetch.k": [1, 2]})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("grid", "settings"),
    [
        ({"workload.synthetic.reuse": [0.1, 0.5]}, []),
        ({"workload.trace": ["a.npz", "b.npz"]}, []),
        ({"predictor.name": ["oracle", "frequency"]}, []),
        ({"workload.synthetic.tokens": [12, 14]}, ["workload.trace=a.npz"]),
        ({"copy.drop_stale": [True, False], "copy.discipline": ["fifo", "priority"]}, []),
        ({"compression.mixed": [[[1.0, 1.0]], [[0.5, 1.0], [0.5, 0.5]]]}, []),
    ],
)
def test_the_same_sweep_goes_on_whatever_its_grid_settles_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: dict[str, list[Any]], settings: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn = simulate(load_scenario("synthetic", settings=SMALL), baselines=False).recording.trace
    drawn.save("a.npz")
    drawn.save("b.npz")
    for _ in range(2):
        rows = sweep("synthetic", grid, settings=[*SMALL, *settings], out="rows.jsonl", workers=1, baselines=False)
    assert len(rows) == len(list(sweep_rows("rows.jsonl"))) == math.prod(map(len, grid.values()))


def test_rows_made_of_a_file_that_has_changed_are_refused(tmp_path: Path) -> None:
    grid = {"workload.trace": [str(tmp_path / "t.npz")]}
    drawn = simulate(load_scenario("synthetic", settings=SMALL), baselines=False).recording.trace
    drawn.save(tmp_path / "t.npz")
    sweep("synthetic", grid, settings=["model.layers=3"], out=tmp_path / "rows.jsonl", workers=1)
    drawn.slice(first=5).save(tmp_path / "t.npz")
    with pytest.raises(JournalError, match=r"the trace '.*t.npz' had other contents: give another file"):
        sweep("synthetic", grid, settings=["model.layers=3"], out=tmp_path / "rows.jsonl", workers=1)


def test_rows_of_a_request_trace_that_has_changed_are_refused(tmp_path: Path) -> None:
    asked = tmp_path / "burst.csv"
    head = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    asked.write_text(head + "5,m,4,2,6,API log\n6,m,3,2,5,API log\n")
    settings = ["model.layers=2", f"requests.trace={asked}", "requests.warmup=0%", "requests.cooldown=0%"]
    grid = {"requests.rate": [1.0, 2.0]}

    def swept() -> list[Any]:
        out = tmp_path / "rows.jsonl"
        return list(sweep("synthetic", grid, settings=settings, out=out, workers=1, baselines=False))

    assert [row["error"] for row in swept()] == [None, None] and len(swept()) == 2
    asked.write_text(head + "5,m,4,3,7,API log\n6,m,3,2,5,API log\n")
    with pytest.raises(JournalError, match=r"the requests '.*burst.csv' had other contents: give another file"):
        swept()


def test_rows_of_two_sweeps_in_one_file_are_not_drawn(tmp_path: Path) -> None:
    # As an older version left them: drawn together, they would be a median over both.
    for batch in (1, 2):
        settings = [*SMALL, "workload.synthetic.sequences=2", f"workload.batch={batch}"]
        sweep(
            "synthetic", {"prefetch.lookahead": [0, 1]}, settings=settings, out=tmp_path / f"{batch}.jsonl", workers=1
        )
    both = tmp_path / "both.jsonl"
    both.write_bytes((tmp_path / "1.jsonl").read_bytes() + (tmp_path / "2.jsonl").read_bytes())
    with pytest.raises(JournalError, match=r"has rows of another sweep: .* workload.batch = 2, and here it is 1"):
        sweep_rows(both)
    assert len(list(read_rows(both))) == 4
