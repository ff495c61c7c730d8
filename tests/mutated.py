"""Runs the tests of changed code: pytest collects once, and each change is tried in a copy of that process.

Where a change lies within functions, their code is exchanged in the copy, which takes no time. Where it does not
(a constant of a module, a default), a new process loads the module changed. Tests that run the changed function come
before those that do not, quick ones before slow ones; that order, and how long all take, comes from a first run of
the tests as the code is, in which every function says when it runs.
"""

from __future__ import annotations

import ast
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import SourceFileLoader
from itertools import accumulate
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

ROOT = Path(__file__).parent.parent
#: The tests that may be asked: none that starts processes, which would load the code as it is.
MARKS = "not process and not docs and not browser and not gpu"
#: A change may take this many seconds of processor time more than three times what its tests take without it.
MORE_S = 30
#: And no more memory than this: a loop that a change makes endless would otherwise take all there is.
MOST_BYTES = 8 << 30
_QUIET = ("-q", "-x", "-s", "-p", "no:cacheprovider", "--tb=line")


@dataclass(frozen=True)
class Asked:
    """Which tests are asked about a change: those of these marks, as far as they take so many seconds together."""

    marks: str
    seconds: float

    @property
    def quick(self) -> bool:
        """Whether none is slow."""
        return "not slow" in self.marks


class FirstRun:
    """What the tests do on the code as it is: by test, its seconds and the functions that it ran."""

    def __init__(self, seconds: Mapping[str, float], ran: Mapping[str, list[str]]) -> None:
        self._seconds, self._ran = dict(seconds), {test: set(names) for test, names in ran.items()}

    def order(self, items: list[Any], own: tuple[str, ...], functions: set[str], limits: Asked) -> list[Any]:
        """Returns the tests in the order in which they are to be asked about a change of these functions.

        Those of the `own` files that run one of them, those of other files that do, and, unless all are quick, the rest
        of the own ones.
        """

        def late(item: Any) -> tuple[bool, bool, float]:
            runs = bool(functions & self._ran.get(item.nodeid, set()))
            return not runs, item.path.stem not in own, self._seconds.get(item.nodeid, 0.0)

        def asked(item: Any) -> bool:
            runs_none, of_others, _ = late(item)
            return not (runs_none and (limits.quick or of_others))

        chosen = sorted(filter(asked, items), key=late)
        until = accumulate(self._seconds.get(item.nodeid, 0.0) for item in chosen)
        return [item for item, seconds in zip(chosen, until, strict=True) if seconds <= limits.seconds]

    def limit_s(self, items: list[Any]) -> int:
        """Returns the seconds of processor time after which a change of code counts as one that never ends."""
        return MORE_S + int(3 * sum(self._seconds.get(item.nodeid, 0.0) for item in items))


def tried(
    tests: Mapping[str, tuple[str, ...]],
    also: tuple[str, ...],
    work: Callable[[Callable[..., tuple[bool, str]]], None],
    asked: Asked,
    files: tuple[Path, Path],
) -> None:
    """Collect the tests of all modules, run them once as they are, then call `work` with what tries a change.

    `tests`: by module (a path below the root), its test files. `also`: test files of no module alone. `files`: what
    tests print; and where the first run is kept, for the next time. What tries a change takes a module, its tree and
    its changed tree, and returns whether a test failed, and which.
    """
    import pytest

    log, kept = files

    class Session:
        @pytest.hookimpl(tryfirst=True)
        def pytest_runtestloop(self, session: Any) -> bool:
            if session.testsfailed:
                raise SystemExit("the tests cannot be collected")
            for module in tests:  # also those that are imported when something needs them
                import_module("prestage." + module.removesuffix(".py").replace("/", "."))
            first = _first_run(session, tests, log, kept)
            work(lambda module, tree, new: _noticed(session, (first, asked), tests[module], (module, tree, new), log))
            return True

    of_all = sorted({name for names in (*tests.values(), also) for name in names})
    if pytest.main([*_QUIET, "-m", asked.marks, *_paths(of_all)], plugins=[Session()]):
        raise SystemExit("the tests cannot be run")


def _first_run(session: Any, tests: Mapping[str, Any], log: Path, kept: Path) -> FirstRun:
    """Returns what the tests did as the code is; refuses to go on where one fails."""
    if not kept.exists():
        result = kept.with_suffix(".part")

        def first() -> int:
            seen: set[str] = set()
            for module in tests:
                _announce(module, seen)
            recorder = _Recorder(seen)
            session.config.pluginmanager.register(recorder)
            session.config.pluginmanager.register(_Failed(log.with_suffix(".failed")))
            status = _run(session, session.items)
            result.write_text(json.dumps({"seconds": recorder.seconds, "ran": recorder.ran}), encoding="utf-8")
            return status

        if _in_a_copy(first, log, 3600):
            raise SystemExit(f"the tests fail as the code is: see {log}")
        result.replace(kept)
    found = json.loads(kept.read_text(encoding="utf-8"))
    return FirstRun(found["seconds"], found["ran"])


class _Recorder:
    """A plug-in of pytest: seconds of processor time by test, and what it ran."""

    def __init__(self, seen: set[str]) -> None:
        self.seconds: dict[str, float] = {}
        self.ran: dict[str, list[str]] = {}
        self._seen, self._from = seen, 0.0

    def pytest_runtest_logstart(self) -> None:
        self._seen.clear()
        self._from = time.process_time()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.seconds[nodeid] = time.process_time() - self._from
        self.ran[nodeid] = sorted(self._seen)


def _noticed(
    session: Any,
    known: tuple[FirstRun, Asked],
    files: tuple[str, ...],
    change: tuple[str, ast.Module, ast.Module],
    log: Path,
) -> tuple[bool, str]:
    """Returns whether a test fails on a change, and its name."""
    (first, asked), (module, tree, new) = known, change
    pairs = _changed_functions(module, tree, new)
    report = log.with_suffix(".failed")
    report.unlink(missing_ok=True)
    if pairs is not None:
        names = {f"{module}:{old.co_qualname}" for _, old, _ in pairs}
        items = first.order(session.items, files, names, asked)

        def exchanged() -> int:
            for function, _, code in pairs:
                function.__code__ = code
            session.config.pluginmanager.register(_Failed(report))
            return _run(session, items)

        failed = _in_a_copy(exchanged, log, first.limit_s(items)) != 0
    else:
        source = log.with_suffix(".py")
        source.write_text(ast.unparse(new), encoding="utf-8")
        command = [sys.executable, __file__, module, str(source), str(report), asked.marks, *_paths(files)]
        items = [item for item in session.items if item.path.stem in files]

        def anew() -> int:
            return subprocess.run(command, check=False, cwd=ROOT).returncode

        failed = _in_a_copy(anew, log, first.limit_s(items)) != 0
    return failed, _read(report) if failed else ""


def _paths(tests: Iterable[str]) -> list[str]:
    return [str(ROOT / "tests" / f"{name}.py") for name in tests]


class _Failed:
    """A plug-in of pytest: writes down the name of the test that failed."""

    def __init__(self, report: Path) -> None:
        self._report = report

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._report.write_text(report.nodeid, encoding="utf-8")
            print(report.longreprtext, flush=True)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._report.write_text(f"{report.nodeid}, as it is collected", encoding="utf-8")


def _read(report: Path) -> str:
    return report.read_text(encoding="utf-8") if report.exists() else "it never ended, or ended the tests"


def _in_a_copy(work: Callable[[], int], log: Path, limit_s: int) -> int:
    """Returns the status of work that is done in a copy of this process, 1 if something ended it."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            _limit(limit_s)
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return 0 if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 else 1


def _limit(seconds: int) -> None:
    """Limit this process in its processor time and memory."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)


def _run(session: Any, items: list[Any]) -> int:
    from _pytest.main import pytest_runtestloop

    session.items[:] = items
    with suppress(session.Failed, session.Interrupted):
        pytest_runtestloop(session)
    return 1 if session.testsfailed else 0


def _codes(code: CodeType, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], CodeType]]:
    """Yields the code objects within one, with their paths: a name and which of that name it is, level by level."""
    count: dict[str, int] = {}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            number = count[inner.co_name] = count.get(inner.co_name, 0) + 1
            below = (*path, (inner.co_name, number))
            yield below, inner
            yield from _codes(inner, below)


def _changed_functions(
    module: str, tree: ast.Module, new: ast.Module
) -> list[tuple[FunctionType, CodeType, CodeType]] | None:
    """Returns the living functions whose code differs, with both codes; None if something else differs, too."""
    name = str(ROOT / module)
    before, after = compile(tree, name, "exec"), compile(new, name, "exec")
    old, changed = dict(_codes(before)), dict(_codes(after))
    if _body(before) != _body(after) or old.keys() != changed.keys():
        return None
    differ = {path for path in old if old[path] != changed[path]}
    if any(not old[path].co_flags & 2 and _body(old[path]) != _body(changed[path]) for path in differ):
        return None  # of a class, whose body has run already
    by_code = {old[path]: changed[path] for path in differ if old[path].co_flags & 2}
    found = [(each, each.__code__, by_code[each.__code__]) for each in _living(module) if each.__code__ in by_code]
    same = all(code.co_freevars == was.co_freevars for _, was, code in found)
    return found if found and same else None


def _body(code: CodeType) -> tuple[Any, ...]:
    """Returns what a code object does itself, without the code within it."""
    return code.co_code, code.co_names, [each for each in code.co_consts if not isinstance(each, CodeType)]


def _living(module: str) -> list[FunctionType]:
    """Returns the functions of a module that are there, but for those that become machine code."""
    from numba.core.dispatcher import Dispatcher

    # isinstance would ask lazy objects of other libraries what they are.
    everything = gc.get_objects()
    compiled = {id(each.py_func) for each in everything if issubclass(type(each), Dispatcher)}
    return [
        each
        for each in everything
        if type(each) is FunctionType
        and id(each) not in compiled
        and each.__code__.co_filename.endswith(module)
        and os.path.realpath(each.__code__.co_filename) == os.path.realpath(ROOT / module)
    ]


def _announce(module: str, seen: set[str]) -> None:
    """Let every living function of a module say, in `seen`, that it runs."""
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    before = dict(_codes(compile(tree, module, "exec")))
    _seen_by[module] = seen
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            said = f"__import__('mutated')._seen_by[{module!r}].add({_MARK!r})"
            at = 1 if ast.get_docstring(node, clean=False) is not None else 0
            node.body[at:at] = [ast.copy_location(ast.parse(said).body[0], node.body[0])]
    ast.fix_missing_locations(tree)
    after = dict(_codes(compile(tree, module, "exec")))
    by_code = {before[path]: after[path] for path in before.keys() & after.keys() if before[path].co_flags & 2}
    for function in _living(module):
        code = by_code.get(function.__code__)
        if code is not None and code.co_freevars == function.__code__.co_freevars:
            function.__code__ = _named(code, module)


_MARK = "the name of the function"
_seen_by: dict[str, set[str]] = {}


def _named(code: CodeType, module: str) -> CodeType:
    """Returns the code with its module and name where the mark stands, and so for the code within it."""

    def new(each: Any) -> Any:
        if isinstance(each, CodeType):
            return _named(each, module)
        return f"{module}:{code.co_qualname}" if each == _MARK else each

    return code.replace(co_consts=tuple(new(each) for each in code.co_consts))


def main() -> None:
    """Run the tests on one changed module, which this process loads in place of the one there."""
    import pytest
    from numba.core import caching

    module, source, report, marks, *files = sys.argv[1:]
    caching.IndexDataCacheFile.save = lambda *_: None  # type: ignore[method-assign]
    plain, path = SourceFileLoader.get_code, os.path.realpath(ROOT / module)

    def get_code(self: SourceFileLoader, name: str) -> Any:
        if os.path.realpath(self.path) == path:
            return compile(Path(source).read_text(encoding="utf-8"), self.path, "exec")
        return plain(self, name)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign,assignment]
    raise SystemExit(int(pytest.main([*_QUIET, "-m", marks, *files], plugins=[_Failed(Path(report))])))


if __name__ == "__main__":
    main()
