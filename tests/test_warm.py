"""Commands of pages run in processes that have everything imported: a shell cannot tell, but for the time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
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
