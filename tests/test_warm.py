"""Commands of pages run in processes that have everything imported: a shell cannot tell, but for the time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from coverage_by_layer import by_folder
from warm import shell_function


@pytest.mark.process
@pytest.mark.parametrize(
    "command",
    [
        "prestage --version",
        "prestage list evictions | head -2",
        "prestage run none.toml",
        "prestage show gpt-oss-20b --gpu 'rtx 4090' > shown.txt && wc -c < shown.txt",
        "prestage run synthetic --set model.layers=2 --no-baselines --out 'an out' && ls 'an out'",
        "prestage sweep synthetic --set model.layers=2 --grid prefetch.k=1,2 --workers 2 -o s.jsonl 2>&1",
        "! prestage mrc none.npz 2>&1",
        "prestage timeline summary /dev/stdin < /dev/null",
    ],
)
def test_a_shell_cannot_tell_a_command_that_was_forked(command: str, tmp_path: Path) -> None:
    forked, anew = (
        shelled(f"{function}\n{command}", tmp_path, name)
        for name, function in (
            ("forked", shell_function() + 'prestage() { warm_prestage "$@"; }'),
            ("anew", f'prestage() {{ {sys.executable!r} -m prestage "$@"; }}'),
        )
    )
    assert (forked.returncode, forked.stdout, forked.stderr) == (anew.returncode, anew.stdout, anew.stderr)
    assert forked.stdout or forked.stderr


def shelled(script: str, folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    (folder / name).mkdir()
    environment = {**os.environ, "COLUMNS": "90"}
    command = ["bash", "-c", f"set -o pipefail\n{script}"]
    return subprocess.run(command, cwd=folder / name, env=environment, capture_output=True, text=True)


def test_coverage_is_counted_by_folder() -> None:
    def summary(*counts: int) -> dict[str, int]:
        return dict(zip(("num_statements", "covered_lines", "num_branches", "covered_branches"), counts, strict=True))

    files = {
        "errors.py": summary(10, 9, 0, 0),
        "cli/run.py": summary(30, 15, 4, 1),
        "engine/timing/host.py": summary(50, 40, 8, 6),
        "engine/timing/deep/er.py": summary(50, 50, 0, 0),
        "engine/run.py": summary(1, 1, 2, 2),
    }
    assert by_folder(files).splitlines()[2:] == [
        "| `(front door and root)` | 10 | 90% | 0 |  |",
        "| `cli` | 30 | 50% | 4 | 25% |",
        "| `engine` | 1 | 100% | 2 | 100% |",
        "| `engine/timing` | 100 | 90% | 8 | 75% |",
        "| all | 141 | 82% | 14 | 64% |",
    ]
