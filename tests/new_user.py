"""A new user's path, timed from a clean clone: what README.md says to type, then the report and a look at it.

    python tests/new_user.py [--keep DIR]
    python tests/new_user.py --ways

prints a table of commands and seconds. Packages are fetched anew, whatever this machine has kept of them; the report is
opened in Chromium where there is one. With `--ways` it prints what the five ways of new users in tests/test_paths.py
take, each in a clean clone with the packages of this environment, so that no machine code of Prestage's is there.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
#: What follows the README's first command, in its environment.
THEN = (
    "prestage report prestage-out -o report.html",
    "prestage suite --quick -o prestage-suite",
)
#: Loads a page, draws it and ends.
OPEN = "chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --screenshot=report.png report.html"


def commands() -> list[str]:
    """Returns the path's commands in order: each runs in the environment that those before it made."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = next(
        block for block in re.findall(r"^```bash\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE) if "venv" in block
    )
    activate = ". .venv/bin/activate"
    install = [command.strip() for command in first.split("&&") if command.strip() != activate]
    opened = [OPEN] if shutil.which("chromium") else []
    return [f"git clone {ROOT} clone", *install, THEN[0], *opened, *THEN[1:]]


def timed(folder: Path) -> Iterator[tuple[str, float]]:
    """Run the commands in a folder and yield each with its seconds; RuntimeError for one that fails."""
    environment = {**os.environ, "PIP_NO_CACHE_DIR": "1", "PIP_QUIET": "1", "MPLBACKEND": "Agg"}
    for number, command in enumerate(commands()):
        where = folder / "clone" if number else folder
        activate = ". .venv/bin/activate && " if (where / ".venv").exists() else ""
        began = perf_counter()
        done = subprocess.run(
            ["bash", "-c", activate + command], cwd=where, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{command}: status {done.returncode}: {done.stderr.strip()}")
        yield command, perf_counter() - began


def path_table(keep: Path | None = None) -> str:
    """Returns the commands and their seconds as Markdown; the clone is left in the folder `keep`, if any."""
    lines = ["| command | seconds |", "|---|---|"]
    total = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for command, seconds in timed(keep or Path(scratch)):
            total += seconds
            shown = "look at report.html in a browser" if command == OPEN else f"`{command.replace(str(ROOT), 'URL')}`"
            lines.append(f"| {shown} | {seconds:.1f} |")
    return "\n".join([*lines, f"| all | {total:.1f} |"])


@contextmanager
def clean_clone() -> Iterator[tuple[Path, Path]]:
    """Yields an empty folder to work in, and one to import prestage from: a clean clone, where nothing is compiled."""
    with tempfile.TemporaryDirectory() as made:
        folder, packages = Path(made) / "here", Path(made) / "packages"
        folder.mkdir()
        clone = ["git", "clone", "--quiet", "--shared", str(ROOT), str(packages / "prestage")]
        subprocess.run(clone, check=True)
        yield folder, packages


def ways_table() -> str:
    """Returns the five ways of new users and what each takes, as Markdown: commands, processor and wall seconds."""
    from test_paths import WAYS, walked

    lines = ["| who | commands | processor seconds | seconds |", "|---|---|---|---|"]
    for who, script in WAYS.items():
        with clean_clone() as (folder, packages):
            before, began = resource.getrusage(resource.RUSAGE_CHILDREN), perf_counter()
            with patch.dict(os.environ, PYTHONPATH=str(packages)):
                walked(script, folder, most_s=float("inf"))
            after, took_s = resource.getrusage(resource.RUSAGE_CHILDREN), perf_counter() - began
        busy_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        number = len(re.findall(r"^!? ?(?:prestage|python) ", script, re.MULTILINE))
        lines.append(f"| {who} | {number} | {busy_s:.0f} | {took_s:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="Leave the clone in this folder.")
    parser.add_argument("--ways", action="store_true", help="Time the five ways of new users instead.")
    arguments = parser.parse_args()
    if arguments.ways:
        print(ways_table())
        return
    keep = arguments.keep
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
    print(path_table(keep))


if __name__ == "__main__":
    main()
