"""A model on a machine, described in one command: what each of docs/machine-parts.md's takes, cold and warm.

    python tests/one_command.py

Cold: the first command in a clean clone, where nothing is compiled; warm: the same again. Processor seconds, which
other work on the machine changes little, and those of the clock, which it lengthens; nothing is left behind.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from gguf_files import OUTSIDE, block, facts, write
from new_user import clean_clone

from prestage.output.markdown import table

CONFIG = Path(__file__).parent / "data" / "configs" / "Mixtral-8x7B-v0.1.json"
#: What is asked, and the command.
ASKED = {
    "gpt-oss-120b on a 4090 with 64 GB of DDR5": "run --model gpt-oss-120b --gpu rtx4090 --ram '64GB DDR5-5600'",
    "a config.json (Mixtral-8x7B) on two 3090s": "run --model config.json --gpu '2x rtx3090' --ram '128GB DDR4-3200'",
    "a GGUF file (24 layers) on a 4090": "run --model some.gguf --gpu rtx4090 --ram '64GB DDR5-5600'",
}


def seconds(command: str, folder: Path, packages: Path) -> tuple[float, float]:
    """Returns the processor's and the clock's seconds of a command, with the package in a folder of packages.

    Raises RuntimeError if the command fails.
    """
    environment = {**os.environ, "PYTHONPATH": str(packages), "COLUMNS": "100"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        f"{sys.executable} -m prestage {command}",
        shell=True,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{command}: status {done.returncode}: {done.stderr.strip()}")
    ended, after = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, ended - began


def one_command() -> str:
    """Returns each command's seconds, cold and warm, in Markdown."""
    rows = []
    for asked, command in ASKED.items():
        with clean_clone() as (folder, packages):
            (folder / "config.json").write_bytes(CONFIG.read_bytes())
            write(
                folder / "some.gguf",
                facts("tiny", block_count=24),
                [*OUTSIDE, *(tensor for n in range(24) for tensor in block(n))],
            )
            there = sorted(folder.iterdir())
            both = [seconds(command, folder, packages) for _ in range(2)]
            rows.append([asked, *(f"{each[number]:.0f}" for number in range(2) for each in both)])
            assert sorted(folder.iterdir()) == there, "a command wrote a file"
    heads = ["one command", "processor seconds, cold", "warm", "seconds by the clock, cold", "warm"]
    return table(heads, rows)


if __name__ == "__main__":
    print(one_command())
