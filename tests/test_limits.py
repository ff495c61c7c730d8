"""How long files and functions may be, and how many parameters these may have: what goes beyond is named here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from sizes import lines_of_code
from test_architecture import MODULES, ROOT, name_of, tree_of

MOST_LINES, MOST_FUNCTION_LINES, MOST_BRANCHES, MOST_PARAMETERS = 500, 60, 20, 6
#: The processes of the SimPy engine, in the order in which to read them, and of how many lines of code they may be.
SIMPY_PROCESSES, MOST_OF_SIMPY = ("lanes.py", "host_state.py", "host.py"), 850
#: Of functions in machine code, which take arrays and numbers one by one, parameters are not counted.
MACHINE_CODE = {"compiled", "_compiled", "entry", "_entry"}
_OPTIONS = "public: each parameter is an option by its name, with a default"
_KERNEL = "machine code, which takes arrays and numbers one by one"
_FIELDS = "a record: a parameter for each field, called once for each span or command"
#: Functions with more lines or branches.
LONG_FUNCTIONS = {
    "engine/decide/memory_manager.py MemoryManager.__init__": "sets up one thing after another",
    "calibration/executor/part.py Part.__init__": "sets up one thing after another",
    "engine/replay/compiled.py _replay": "machine code: one loop, whose parts would be copied into it",
    "engine/replay/notes.py _activate": "machine code: one loop, whose parts would be copied into it",
    "engine/timing/compiled_clock.py advance": "machine code: a branch for each kind of event",
    "engine/timing/compiled_host.py carry_out_one": "machine code: a branch for each command",
    "workloads/importers.py _format_of": "a branch for each format",
    "workloads/model_files/quantization.py _quantized": "a branch for each format",
    "workloads/training/bpe.py learn": "an algorithm with its books: each step needs all of them",
}
#: Functions with more parameters; the command line's are its options.
MANY_PARAMETERS = {
    "calibration/executor/execute.py execute": _OPTIONS,
    "calibration/executor/execute.py execute_all": _OPTIONS,
    "calibration/executor/grouped_kernels.py _first": _KERNEL,
    "calibration/executor/grouped_kernels.py _last": _KERNEL,
    "calibration/executor/grouped_kernels.py first_products": _KERNEL,
    "calibration/executor/grouped_kernels.py last_product": _KERNEL,
    "calibration/executor/scenario_sets.py _pipe": "a row of a table",
    "calibration/device/worker_code.py _row": _KERNEL,
    "calibration/device/worker_code.py compute_all": _KERNEL,
    "engine/decide/dispatch.py visits": _OPTIONS,
    "engine/decide/memory_manager.py MemoryManager.__init__": _OPTIONS,
    "engine/replay/compiled.py _lru_by_visits": _KERNEL,
    "engine/replay/compiled.py _replay": _KERNEL,
    "engine/replay/compiled.py replay_compiled": _OPTIONS,
    "engine/replay/miss_ratio.py miss_ratio_curves": _OPTIONS,
    "engine/replay/replay.py replay_trace": _OPTIONS,
    "engine/simulate.py simulate": _OPTIONS,
    "engine/simulate.py simulate_inputs": _OPTIONS,
    "experiments/advise.py advise": _OPTIONS,
    "experiments/suite.py run_suite": _OPTIONS,
    "experiments/sweep.py sweep": _OPTIONS,
    "guide/virtual_memory.py VirtualMemoryManager.__init__": _OPTIONS,
    "notebook/runs.py simulate": _OPTIONS,
    "notebook/runs.py sweep": _OPTIONS,
    "resources/timeline.py Timeline.record": _FIELDS,
    "workloads/batches.py plan_steps": _OPTIONS,
    "workloads/model.py load_model": _OPTIONS,
    "workloads/network.py _look_back": "runs beside training: each is an array of its own",
    "workloads/synthetic.py synthesize": _OPTIONS,
}


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function of a module by its file, class and name."""

    def within(node: ast.AST, place: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                yield f"{name_of(path)} {place}{child.name}", child
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                yield from within(child, f"{place}{child.name}.")

    return within(tree_of(path), "")


def branches(function: ast.FunctionDef) -> int:
    """The cyclomatic complexity: one, and one for each way that is taken or not; of inner functions by themselves."""
    count, waiting = 1, list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.If | ast.For | ast.While | ast.ExceptHandler | ast.IfExp | ast.match_case):
            count += 1
        elif isinstance(node, ast.comprehension):
            count += 1 + len(node.ifs)
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        waiting += ast.iter_child_nodes(node)
    return count


def parameters(function: ast.FunctionDef) -> int:
    """How many a caller gives: not the object itself."""
    taken = function.args
    names = [each.arg for each in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def is_machine_code(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(each).split("(")[0] in MACHINE_CODE for each in function.decorator_list)


def test_no_file_is_longer_than_can_be_read_in_one_sitting() -> None:
    long = {name_of(path) for path in MODULES if len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES}
    assert not long


def test_the_processes_of_the_simpy_engine_can_be_read_in_one_sitting() -> None:
    texts = [(ROOT / "engine" / "timing" / name).read_text(encoding="utf-8") for name in SIMPY_PROCESSES]
    assert sum(len(lines_of_code(text)) for text in texts) <= MOST_OF_SIMPY


def test_no_function_does_too_much() -> None:
    long = {
        name
        for path in MODULES
        if path.parent.name != "cli"  # whose lines are options and their help
        for name, function in functions(path)
        if (function.end_lineno or 0) - function.lineno >= MOST_FUNCTION_LINES or branches(function) > MOST_BRANCHES
    }
    assert long == set(LONG_FUNCTIONS)


def test_no_function_of_the_domain_takes_too_many_parameters() -> None:
    many = {
        name
        for path in MODULES
        if path.parent.name != "cli"
        for name, function in functions(path)
        if parameters(function) > MOST_PARAMETERS and not is_machine_code(function)
    }
    assert many == set(MANY_PARAMETERS)


def test_the_rules_can_tell() -> None:
    text = "class K:\n def f(self, a, *, b):\n  if a and b:\n   return [x for x in a if x]\n  return 0 if a else 1\n"
    tree = ast.parse(text)
    (function,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    assert parameters(function) == 2
    assert branches(function) == 6  # one; `if`, `and`, `for … in`, its `if`, and the conditional expression
