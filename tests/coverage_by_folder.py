"""Which lines and branches of each folder the tests run: a table of docs/code-map.md.

    pip install coverage && python tests/readme_tables.py coverage --write

counts what `pytest -m "not slow"` runs, and then, with compiled code as plain Python, what the tests run that ask most
of it (PLAIN): machine code cannot be counted. It takes half an hour. Slow tests are not counted, nor is what runs in
processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from prestage.output.markdown import table

ROOT = Path(__file__).parent.parent
#: Folders whose own folders have rows.
_SPLIT = ("engine",)
_SETTINGS = f"""[run]
branch = true
parallel = true
source = {ROOT}
omit = {ROOT / "tests"}/*
"""
#: What coverage counts of a file: how many there are, and how many were run.
_KEYS = ("num_statements", "covered_lines", "num_branches", "covered_branches")
#: Tests of the compiled engine, of compiled decisions and of compiled replays.
PLAIN = (
    "compiled_lru", "compiled_misses", "composition", "decisions", "engines", "lockstep", "miss_ratio", "replay",
)  # fmt: skip


def measured(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns coverage's summary of each file, by its path from the root. Raises CalledProcessError if a test fails."""
    settings = folder / "settings"
    settings.write_text(_SETTINGS, encoding="utf-8")

    def call(*arguments: str, **more: str) -> None:
        command = [sys.executable, "-m", "coverage", arguments[0], f"--rcfile={settings}", *arguments[1:]]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"COVERAGE_FILE": str(folder / "data")} | more, check=True)

    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow")
    call("run", *tests, "tests")
    call("run", *tests, *(f"tests/test_{name}.py" for name in PLAIN), NUMBA_DISABLE_JIT="1")
    call("combine")
    call("json", "-o", str(folder / "found.json"))
    found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    return {name: file["summary"] for name, file in found["files"].items()}


def by_folder(files: dict[str, dict[str, Any]]) -> str:
    """Returns statements and branches of each folder, and the shares of them that were run, as Markdown."""
    counts: dict[str, Counter[str]] = {}
    for name, summary in files.items():
        *folders, _ = Path(name).parts
        folder = "/".join(folders[: 2 if folders and folders[0] in _SPLIT else 1]) or "(front door and root)"
        for each in (folder, "all"):
            counts.setdefault(each, Counter()).update({key: summary[key] for key in _KEYS})
    order = sorted(counts, key=lambda folder: (folder == "all", folder))
    return table(["folder", "statements", "run", "branches", "run"], [_row(each, counts[each]) for each in order])


def _row(folder: str, counts: Counter[str]) -> list[str]:
    cells = [folder if folder == "all" else f"`{folder}`"]
    for number, run in (_KEYS[:2], _KEYS[2:]):
        cells += [f"{counts[number]:,}", f"{counts[run] / counts[number]:.0%}" if counts[number] else ""]
    return cells


def coverage() -> str:
    """Run the tests and return the table."""
    with tempfile.TemporaryDirectory() as folder:
        return by_folder(measured(Path(folder)))
