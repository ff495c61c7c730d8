"""Mutation testing: small changes to the code, one at a time, and whether the tests of that code notice.

    python tests/mutate.py [--count 60] [--seed 0] [--module NAME …]

prints every change that no test noticed, and how many were. Changes are drawn from all of the TARGETS by the seed:
another comparison, operator, number, truth or end of a condition, a statement less. Each runs in a process of its
own, in which the module is loaded changed; files stay as they are, and machine code that is made there is not kept.
Modules that are compiled are no targets: that they do as their Python does is tested elsewhere, on random runs.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import os
import random
import resource
import signal
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
#: By module: the tests that are to notice, quickest first.
TARGETS: dict[str, tuple[str, ...]] = {
    "engine/policies/eviction.py": ("test_eviction", "test_memory_manager", "test_replay"),
    "engine/policies/eviction_queues.py": ("test_eviction", "test_libcachesim"),
    "engine/policies/eviction_base.py": ("test_eviction", "test_memory_manager"),
    "engine/policies/prefetch.py": ("test_prefetch", "test_prefetch_share", "test_dispatch"),
    "engine/policies/miss.py": ("test_miss", "test_miss_upload"),
    "engine/policies/placement.py": ("test_placement", "test_expert_parallel"),
    "engine/policies/scheduler.py": ("test_scheduler", "test_requests_run", "test_serving"),
    "engine/decide/memory_manager.py": ("test_memory_manager", "test_preload", "test_dispatch", "test_partition"),
    "engine/decide/host_memory.py": ("test_tiers",),
    "engine/decide/partition.py": ("test_partition",),
    "engine/measure/metrics.py": ("test_simulate", "test_accounting", "test_speed", "test_tiers"),
    "engine/measure/speed.py": ("test_speed",),
    "engine/measure/time_split.py": ("test_accounting", "test_by_layer", "test_decoder", "test_split"),
    "engine/measure/misses.py": ("test_accounting", "test_by_layer"),
    "engine/measure/request_metrics.py": ("test_request_metrics",),
    "engine/costs/attention.py": ("test_context", "test_beside_costs", "test_served"),
    "engine/costs/cpu_streams.py": ("test_runtimes", "test_beside_costs", "test_miss"),
    "engine/costs/scatter.py": ("test_measured_costs",),
    "engine/timing/lanes.py": ("test_lane", "test_copy_order"),
}  # fmt: skip
#: The tests that are asked, those that answer soon before the others.
MARKS = ("not slow", "slow and not process and not docs and not browser and not gpu")
#: Seconds of processor time that the tests of one change may take; a change that never ends is noticed.
MOST_S = 120
_OTHER: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,), ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.FloorDiv,), ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,), ast.And: (ast.Or,), ast.Or: (ast.And,), ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
}  # fmt: skip
_NOT_RUN = ("annotation", "returns", "decorator_list", "type_params")
_CALLED = {"min": "max", "max": "min", "any": "all", "all": "any", "append": "extend"}


def places(tree: ast.Module) -> list[ast.AST]:
    """Returns the nodes that can be changed, in the order of the source: none of a refusal's words, or of a type."""
    return [node for node in _walk(tree) if _changes(node)]


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params") or isinstance(
            node, ast.Raise | ast.Assert
        ):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child
                yield from _walk(child)


def _changes(node: ast.AST) -> list[Any]:
    """Returns the ways to change a node."""
    match node:
        case ast.Compare(ops=[op]) | ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op):
            return list(_OTHER.get(type(op), ()))
        case ast.Constant(value=bool()):
            return ["not"]
        case ast.Constant(value=int() | float()):
            return ["more"]
        case ast.If() | ast.While() | ast.IfExp():
            return ["negated"]
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in _CALLED:
            return ["called"]
        case ast.Return(value=ast.expr()):
            return ["nothing"]
        case ast.Expr(value=ast.Call()):
            return ["left out"]
    return []


def changed(tree: ast.Module, at: int, draw: random.Random) -> tuple[ast.Module, str]:
    """Returns a module with the place of a number changed, and what was: "line: before -> after"."""
    tree = copy.deepcopy(tree)
    node: Any = places(tree)[at]
    before, line = ast.unparse(node), node.lineno
    how = draw.choice(_changes(node))
    match how:
        case "not":
            node.value = not node.value
        case "more":
            node.value += 1
        case "negated":
            node.test = ast.UnaryOp(ast.Not(), node.test)
        case "called":
            name = "id" if isinstance(node.func, ast.Name) else "attr"
            setattr(node.func, name, _CALLED[getattr(node.func, name)])
        case "nothing":
            node.value = ast.Constant(None)
        case "left out":
            node.value = ast.Constant(None)
        case _ if isinstance(node, ast.Compare):
            node.ops = [how()]
        case _:
            node.op = how()
    ast.fix_missing_locations(tree)
    first = [text.splitlines()[0] for text in (before, ast.unparse(node))]
    return tree, f"{line}: {first[0]} -> {first[1]}"


def noticed(module: str, tree: ast.Module, log: Path, marks: tuple[str, ...] = MARKS) -> bool:
    """Returns whether the tests of a module fail on it as it is in `tree`; what they print goes to `log`."""
    for chosen in marks:
        child = os.fork()
        if child == 0:
            os._exit(_tested(module, tree, log, chosen))
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) not in (0, 5):  # 5: no test has these marks
            return True
    return False


def _tested(module: str, tree: ast.Module, log: Path, marks: str) -> int:
    """Runs the tests of a changed module in this process, and returns their exit status."""
    import pytest
    from numba.core import caching

    resource.setrlimit(resource.RLIMIT_CPU, (MOST_S, MOST_S))
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    caching.IndexDataCacheFile.save = lambda *_: None  # type: ignore[method-assign]
    path, plain = str(ROOT / module), SourceFileLoader.get_code

    def get_code(self: SourceFileLoader, name: str) -> Any:
        if os.path.realpath(self.path) == os.path.realpath(path):
            return compile(tree, self.path, "exec")
        return plain(self, name)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign,assignment]
    quiet = ["-q", "-x", "-p", "no:cacheprovider", "--tb=line"]
    tests = [str(ROOT / "tests" / f"{name}.py") for name in TARGETS[module]]
    return int(pytest.main([*quiet, "-m", marks, *tests]))


def main() -> None:
    """Draw changes, run the tests on each, and print those that nobody noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--module", action="append", choices=TARGETS)
    given = parser.parse_args()
    for name in ("numpy", "numba", "simpy", "pydantic", "typer", "rich"):  # each process has them then
        importlib.util.find_spec(name)
        __import__(name)
    trees = {module: ast.parse((ROOT / module).read_text(encoding="utf-8")) for module in given.module or TARGETS}
    every = [(module, at) for module, tree in trees.items() for at in range(len(places(tree)))]
    draw = random.Random(given.seed)
    chosen = draw.sample(every, min(given.count, len(every)))
    log = Path(os.environ.get("TMPDIR", "/tmp")) / f"mutate-{os.getpid()}.log"
    survived, passes = 0, set()
    for number, (module, at) in enumerate(chosen, 1):
        if module not in passes and noticed(module, trees[module], log, ("not slow",)):
            raise SystemExit(f"{module}: its tests fail as it is: see {log}")
        passes.add(module)
        tree, what = changed(trees[module], at, draw)
        if not noticed(module, tree, log):
            survived += 1
            print(f"{module}:{what}: nobody noticed", flush=True)
        print(f"{number - survived} of {number} noticed", file=sys.stderr, flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} noticed, of {len(every)} possible")


if __name__ == "__main__":
    main()
