"""The layout, read off the sources with `ast`: who may import whom, and what may be imported at module level."""

from __future__ import annotations

import ast
import configparser
from collections.abc import Callable
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Modules at the top that are below all: every folder may import them, and they import nothing of ours.
BELOW_ALL = {
    "bounded.py",
    "collector.py",
    "dtypes.py",
    "errors.py",
    "files.py",
    "kept.py",
    "machine_code.py",
    "machine_library.py",
    "machine_words.py",
    "plain.py",
    "plugins.py",
    "units.py",
    "words.py",
}
#: The folders, floor by floor from the ground: each imports those below it, and none beside it. `engine` stands for the
#: files that lie in it by themselves. The package's own two files, at the top, may import all but `calibration`.
FLOORS = [
    {"workloads", "resources"},
    {"engine/policies"},
    {"engine/decide"},
    {"engine/scenario"},
    {"engine/costs"},
    {"engine/loading"},
    {"engine/timing"},
    {"engine/replay"},
    {"engine/measure"},
    {"engine"},
    {"output", "testing"},
    {"guide"},
    {"experiments"},
    {"calibration/device"},
    {"calibration/executor", "calibration/measure"},
    {"calibration/fit"},
    {"calibration/validate"},
    {"calibration/decode", "calibration/freetoken", "calibration/llama_cpp"},
    {"calibration/observe", "calibration/published"},
    {"calibration", "calibration/profiles"},  # no code
    {"notebook"},
    {"cli"},
]
FLOOR_OF = {folder: number for number, floor in enumerate(FLOORS) for folder in floor}
#: Slow to import: never at module level, so that `--help` and a run without pictures are quick.
LAZY = {"torch", "matplotlib", "networkx", "bokeh"}
#: Written in Bokeh's terms from end to end, and loaded by nobody until a page is written.
BOKEH = "output/figures_html.py"
#: Written in torch from end to end, and run by themselves: nothing outside their folder loads them.
TORCH_PROGRAMS = "workloads/training"
#: Where the discrete-event kernel may be imported at all: decisions know no clock.
CLOCKED = {"engine", "resources"}
CLOCK_FREE = [
    *(
        f"engine/decide/{name}.py"
        for name in ("memory_manager", "dispatch", "host_memory", "program", "expert_parallel", "pipeline")
    ),
    *(f"engine/replay/{name}.py" for name in ("replay", "compiled")),
]
#: What was measured is kept with the sources, and not shipped: no command reads it unless it is named.
EVIDENCE = ("calibration/samples", "calibration/validation")
PACKAGES = [ROOT / name for name in sorted({folder.split("/")[0] for folder in FLOOR_OF})]
MODULES = sorted([*ROOT.glob("*.py"), *(path for package in PACKAGES for path in package.rglob("*.py"))])


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def of_every(paths: list[Path]) -> Callable[[Callable[[Path], None]], Callable[[], None]]:
    """Makes one test of what holds for every file: it fails with all files for which it does not, and why."""

    def made(holds: Callable[[Path], None]) -> Callable[[], None]:
        def test() -> None:
            wrong = {}
            for path in paths:
                try:
                    holds(path)
                except AssertionError as error:
                    wrong[name_of(path)] = str(error)
            assert paths and not wrong

        return test

    return made


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def imports(path: Path, *, runs: bool = False, at_import: bool = False) -> list[tuple[int, str, str]]:
    """(level, module, name) of every import.

    `runs`: without those for type checkers; `at_import`: of those alone that run when the module is imported.
    """
    found = []
    waiting: list[ast.AST] = [tree_of(path)]
    while waiting:
        node = waiting.pop()
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if (runs or at_import) and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            found += [(0, alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.level, node.module or "", alias.name) for alias in node.names]
        waiting += ast.iter_child_nodes(node)
    return found


@cache
def target(path: Path, level: int, module: str, name: str) -> Path | None:
    """The module of this project that an import loads; None for others'."""
    if level == 0:
        return None
    folder = path.parents[level - 1]
    for parts in ([*module.split("."), name] if module else [name], module.split(".") if module else []):
        base = folder.joinpath(*parts)
        for candidate in (base.with_suffix(".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
    raise AssertionError(f"{name_of(path)} imports {'.' * level}{module} {name}, which is not there")


def folder_of(path: Path) -> str:
    """The folder whose floor a module is on: the one at the top, or the one inside `engine` or `calibration`."""
    parts = path.relative_to(ROOT).parts[:-1]
    return "/".join(parts[:2] if parts[:1] in (("engine",), ("calibration",)) else parts[:1])


def goes_down(path: Path, loaded: Path) -> bool:
    """Whether an import stays in its folder, or leads to one on a floor below."""
    home, other = folder_of(path), folder_of(loaded)
    return name_of(loaded) in BELOW_ALL or home == other or FLOOR_OF.get(other, len(FLOORS)) < FLOOR_OF[home]


@of_every(MODULES)
def test_a_folder_imports_only_those_below_it_even_inside_functions_and_for_types(path: Path) -> None:
    home = folder_of(path)
    loaded = {module for found in imports(path) if (module := target(path, *found)) is not None}
    if name_of(path) in BELOW_ALL:
        assert {name_of(module) for module in loaded} <= BELOW_ALL
    elif home:
        assert not {name_of(module) for module in loaded if not goes_down(path, module)}
    else:
        assert not any(folder_of(module).startswith("calibration") for module in loaded)


@of_every(MODULES)
def test_programs_of_torch_are_loaded_by_nobody_else(path: Path) -> None:
    loaded = [target(path, *found) for found in imports(path, at_import=True)]
    programs = [module for module in loaded if module is not None and name_of(module).startswith(TORCH_PROGRAMS)]
    assert not programs or name_of(path).startswith(TORCH_PROGRAMS)


@of_every(MODULES)
def test_inside_imports_are_relative(path: Path) -> None:
    assert not [module for level, module, _ in imports(path) if level == 0 and module.split(".")[0] == "prestage"]


@of_every(MODULES)
def test_what_is_slow_to_import_is_imported_where_it_is_used(path: Path) -> None:
    loaded = {module.split(".")[0] for level, module, _ in imports(path, at_import=True) if level == 0}
    whole = {"torch"} if name_of(path).startswith(TORCH_PROGRAMS) else {"bokeh"} if name_of(path) == BOKEH else set()
    assert loaded & LAZY <= whole
    assert ROOT / BOKEH not in [target(path, *found) for found in imports(path, at_import=True)]
    anywhere = {module.split(".")[0] for level, module, _ in imports(path, runs=True) if level == 0}
    if "matplotlib" in anywhere:
        drawing = (
            "pictures",
            "plots",
            "charts",
            "machine_plot",
            "figures_static",
            "published_plot",
            "advice_plot",
            "capacity_plot",
        )
        assert name_of(path) in (f"output/{name}.py" for name in drawing)
    if "bokeh" in anywhere:
        assert name_of(path) in (BOKEH, "output/page.py")
    if "torch" in anywhere:
        assert folder_of(path).split("/")[0] in ("workloads", "calibration")
    if "simpy" in anywhere:
        assert path.relative_to(ROOT).parts[0] in CLOCKED


@pytest.mark.parametrize("name", CLOCK_FREE)
def test_what_decides_knows_no_clock(name: str) -> None:
    seen, waiting = set(), [ROOT / name]
    while waiting:  # nor anything that it loads
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for level, module, imported in imports(path, at_import=True):
            assert module.split(".")[0] != "simpy", f"{name} loads simpy by way of {name_of(path)}"
            loaded = target(path, level, module, imported)
            waiting += [loaded] if loaded else []


@of_every(MODULES)
def test_files_are_written_by_the_one_writer(path: Path) -> None:
    # Growing records and journals are written little by little.
    if name_of(path) in ("files.py", "resources/spool.py", "experiments/journal.py"):
        return
    for call in (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        modes = [node.value for node in [*call.args[:2], *(key.value for key in call.keywords if key.arg == "mode")]
                 if isinstance(node, ast.Constant)]  # fmt: skip
        assert name not in ("write_text", "write_bytes", "save_file", "mkdtemp", "NamedTemporaryFile"), name
        if name == "open" and "archive" not in ast.unparse(call.func):  # a member of an archive is no file
            assert not {"w", "x", "a", "+"} & set(
                "".join(mode for mode in modes if isinstance(mode, str) and len(mode) < 4)
            )


@of_every([ROOT / "__init__.py", *sorted((ROOT / "cli").glob("*.py"))])
def test_the_front_door_imports_nothing_of_its_own_until_it_is_used(path: Path) -> None:
    loaded = {module for found in imports(path, at_import=True) if (module := target(path, *found)) is not None}
    assert {name_of(module) for module in loaded if module.parent != ROOT / "cli"} <= {"errors.py"}


def test_no_circle() -> None:
    graph = {path: {target(path, *found) for found in imports(path, at_import=True)} - {None} for path in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)  # CycleError names a circle


@of_every(MODULES)
def test_every_module_opens_by_saying_what_it_is(path: Path) -> None:
    said = ast.get_docstring(tree_of(path))
    assert said is not None
    assert said.splitlines()[0].endswith((".", ":", ",")), "the first line is a sentence"


def test_every_package_is_listed_and_every_folder_of_modules_is_a_package() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = config["options"]["packages"].split()
    folders = {path.parent for path in MODULES}
    assert all((folder / "__init__.py").is_file() for folder in folders)
    assert sorted(listed) == sorted(".".join(["prestage", *folder.relative_to(ROOT).parts]) for folder in folders)


def test_every_data_file_inside_a_package_is_shipped() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    shipped = config["options.package_data"]
    for package in PACKAGES:
        for path in package.rglob("*"):
            if path.suffix in (".toml", ".json", ".css", ".js") and not name_of(path.parent).startswith(EVIDENCE):
                name = ".".join(["prestage", *path.parent.relative_to(ROOT).parts])
                assert f"*{path.suffix}" in shipped.get(name, ""), f"{name_of(path)} is not in package_data"


def test_the_rules_can_tell(tmp_path: Path) -> None:
    # The reader of imports itself: what runs at import, what does not, and what is only for types.
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nimport torch.nn\nif TYPE_CHECKING:\n    import a\nelse:\n    import b\n"
        "try:\n    from . import c\nexcept ImportError:\n    pass\nclass K:\n    import d\n"
        "    def f(self):\n        import e\n",
        encoding="utf-8",
    )
    at_import = {(level, module or name) for level, module, name in imports(path, at_import=True)}
    assert at_import == {(0, "typing"), (0, "torch.nn"), (0, "b"), (1, "c"), (0, "d")}
    assert {module or name for _, module, name in imports(path)} == {"typing", "torch.nn", "a", "b", "c", "d", "e"}
