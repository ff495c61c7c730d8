"""Many tasks over processes on this machine, or over a Dask cluster: joblib's generator, whatever is behind it.

Results come as they finish. When a worker dies, the tasks that were under way run again, one by one, so that a task
that kills its worker is found out and the rest goes on.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import BrokenProcessPool

from .. import plugins
from ..errors import InputError

Task = TypeVar("Task")
Done = TypeVar("Done")

#: How long to wait for a cluster's scheduler to answer.
CONNECT_S = 10
#: How often a process looks whether the one that started it is still there.
_LOOK_S = 1
#: joblib starts a worker anew that was idle for long or has grown by 300 MB, as one does that reads machine code; it
#: warns in a thread of its own, which ends, and with it every task, where warnings are errors. Nobody has to act.
_STARTED_ANEW = "A worker stopped while some jobs were given to the executor"
#: It also warns where nobody waits for the tasks that remain, as after Ctrl-C; whoever stopped them knows.
_NOT_AWAITED = ".*iterator to limit unnecessary computation time"
for _message in (_STARTED_ANEW, _NOT_AWAITED):
    warnings.filterwarnings("ignore", message=_message)

#: So many processes may be asked for, or four times the cores if that is more: each takes memory of its own.
MOST_WORKERS = 64

#: In what joblib raises, as if the worker had died, for a task that a worker cannot unpickle.
_UNREADABLE = "failed to un-serialize"


class WorkerError(InputError):
    """Workers that cannot be had."""


def default_workers() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """`count` processes on this machine (all cores without it; 1 is this process), or those of a Dask cluster."""

    def __init__(self, count: int | None = None, cluster: str | None = None) -> None:
        most = max(MOST_WORKERS, 4 * default_workers())
        if count is not None and not 1 <= count <= most:
            raise WorkerError(f"workers = {count:,}: must be at least 1, and at most {most} here")
        if count is not None and cluster is not None:
            raise WorkerError("give workers or a cluster: a cluster brings its own workers")
        self._count = count or default_workers()
        self._client = None if cluster is None else _connect(cluster)
        #: What the death of a worker raises, and what that of the scheduler.
        self._deaths: tuple[type[BaseException], ...] = (BrokenProcessPool,)
        self._losses: tuple[type[BaseException], ...] = ()
        if self._client is not None:
            from distributed.client import FutureCancelledError
            from distributed.scheduler import KilledWorker

            self._deaths, self._losses = (KilledWorker,), (FutureCancelledError,)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._client is not None:
            self._client.close()
        elif kind is not None and self._count > 1:
            # Interrupted or failed: nobody waits for what is still running.
            get_reusable_executor().shutdown(wait=True, kill_workers=True)

    def run(self, work: Callable[[Task], Done], tasks: Iterable[Task]) -> Iterator[tuple[Task, Done | None]]:
        """Yields each task with what `work` made of it, as they finish; None where its worker died of it twice.

        Tasks are taken as workers become free, so there may be more than fit into memory. `work` must be importable.
        Raises WorkerError if the cluster's scheduler is lost, or workers cannot read a task.
        """
        lock = threading.Lock()
        waiting = enumerate(tasks)
        flying: dict[int, Task] = {}

        def taken() -> Iterator[Any]:
            while True:
                with lock:  # joblib takes tasks from several threads
                    number, task = next(waiting, (-1, None))
                    if task is None:
                        return
                    flying[number] = task
                yield delayed(_numbered)(work, number, task, plugins.loaded())

        done = False
        while not done:
            try:
                for number, result in self._parallel(taken()):
                    yield flying.pop(number), result
                done = True
            except self._deaths as death:
                if _UNREADABLE in str(death):
                    raise WorkerError(
                        f"workers cannot read what {work.__module__}.{work.__qualname__} is to do: it and its tasks "
                        f"must be importable where they run: {_last_line(death.__cause__)}"
                    ) from None
                with lock:
                    lost = sorted(flying)
                for number in lost:
                    task = flying.pop(number)
                    yield task, self._alone(work, task)
            except self._losses:
                raise WorkerError("the cluster's scheduler is gone; what was finished is kept") from None

    def _alone(self, work: Callable[[Task], Done], task: Task) -> Done | None:
        try:
            return next(iter(self._parallel([delayed(_numbered)(work, 0, task, plugins.loaded())])))[1]  # type: ignore[no-any-return]
        except self._deaths:
            return None

    def _parallel(self, calls: Iterable[Any]) -> Iterator[Any]:
        if self._client is None:
            results = Parallel(
                self._count, "loky", "generator_unordered", initializer=_follow, initargs=(os.getpid(),)
            )(calls)
        else:
            with parallel_config("dask", client=self._client, n_jobs=-1):
                results = Parallel(return_as="generator_unordered")(calls)
        try:
            yield from results
        finally:
            results.close()


def _last_line(error: BaseException | None) -> str:
    """Returns the line of a worker's traceback that names its error."""
    return str(error).strip().strip('"').strip().rpartition("\n")[2] if error is not None else "no reason given"


def _numbered(
    work: Callable[[Task], Done], number: int, task: Task, added: Iterable[plugins.Plugin]
) -> tuple[int, Done]:
    plugins.load_same(added)
    return number, work(task)


def _follow(parent: int) -> None:
    """Leave it to the parent to end this process: on Ctrl-C it does; if it is killed, this one ends soon after it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to every process, and each would say so

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _connect(address: str) -> Any:
    """Returns a client of the Dask scheduler at an address. Raises WorkerError."""
    try:
        from distributed import Client
    except ImportError:
        raise WorkerError(
            f"cluster = {address!r}: needs Dask; install the extra: pip install 'prestage[cluster]'"
        ) from None
    try:
        client = Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise WorkerError(f"cluster = {address!r}: no scheduler answers there: {error}") from None
    if not client.scheduler_info()["workers"]:
        client.close()
        raise WorkerError(f"cluster = {address!r}: the scheduler has no workers; start one: dask worker {address}")
    return client
