"""How big it is and how long a user waits for it: tables of docs/speed.md and docs/code-map.md.

    python tests/readme_tables.py sizes lines tests --write

`sizes` builds a wheel and starts processes with empty caches of machine code; its times are of the processor.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from extras import tracked, wheel

from prestage.output.markdown import table

ROOT = Path(__file__).parent.parent
#: Marks by which tests are chosen, the most special first: a test counts where it is first named.
LAYERS = {
    "gpu": "needs a CUDA GPU",
    "browser": "opens pages in a headless Chromium",
    "docs": "runs the code of README.md and docs/",
    "process": "starts whole processes",
    "slow": "trainings, published runs, long runs and sweeps",
    "": 'the rest: `pytest -m "not slow"`',
}
_IMPORTED = "import sys, prestage; print(len(sys.modules))"


def how_big() -> str:
    """The wheel, and what starting takes where no machine code was kept before."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made, _ = wheel(sys.executable, folder)
        listed = (
            ["-c", _IMPORTED],
            ["-m", "prestage", "--help"],
            ["-m", "prestage", "run", "--out", str(folder / "out")],
        )
        _seconds(listed[0], folder)  # Python's own files are written
        lines = [
            ["wheel", f"{made.stat().st_size / 1e6:.1f} MB"],
            ["`import prestage`", f"{_seconds(listed[0], folder):.2f} s"],
            ["`prestage --help`", f"{_seconds(listed[1], folder):.2f} s"],
            ["`prestage run`, the first time", f"{_seconds(listed[2], folder):.1f} s"],
            ["the second time, before `prestage compile`", f"{_seconds(listed[2], folder):.2f} s"],
        ]
    return table(["what", "measured"], lines)


def _seconds(arguments: list[str], folder: Path) -> float:
    """Returns the processor's seconds of a Python process whose machine code is kept in the folder."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder / "code")}
    subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, cwd=folder, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def lines() -> str:
    """Lines of Python by folder, and of them those that are neither empty nor a comment or docstring."""
    files, whole, code = Counter[str](), Counter[str](), Counter[str]()
    for path in tracked():
        if path.suffix == ".py":
            folder = path.parts[0] if len(path.parts) > 1 else "(front door and root)"
            text = (ROOT / path).read_text(encoding="utf-8")
            files[folder] += 1
            whole[folder] += text.count("\n")
            code[folder] += len(lines_of_code(text))
    rows = [[f"`{each}`", str(files[each]), f"{whole[each]:,}", f"{code[each]:,}"] for each in sorted(files)]
    total = ["all", str(files.total()), f"{whole.total():,}", f"{code.total():,}"]
    return table(["folder", "files", "lines", "of code"], [*rows, total])


def lines_of_code(text: str) -> set[int]:
    """Returns the numbers of the lines that a statement other than a docstring stands on."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.expr | ast.stmt | ast.arg | ast.keyword):
            found |= {node.lineno, node.end_lineno or node.lineno}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return found


class _Collected:
    """A plug-in of pytest: counts tests, and their files, by the first of the marks that they have."""

    def __init__(self) -> None:
        self.tests, self.files = Counter[str](), dict[str, set[Path]]()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            mark = next(mark for mark in LAYERS if not mark or item.get_closest_marker(mark))
            self.tests[mark] += 1
            self.files.setdefault(mark, set()).add(item.path)


def layers_of_tests() -> str:
    """Tests by the mark that chooses them, as pytest collects them."""
    found = _Collected()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", str(ROOT / "tests")], plugins=[found])
    rows = [
        [f"`{mark}`" if mark else "", what, str(len(found.files.get(mark, ()))), f"{found.tests[mark]:,}"]
        for mark, what in LAYERS.items()
    ]
    return table(["mark", "what they do", "files", "tests"], rows)
