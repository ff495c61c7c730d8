"""The pages of docs/ as a reader follows them: every block of code in order, in one folder and one Python session.

    python tests/docs_pages.py [PAGE …]

runs pages and writes what their blocks print into the blocks that show it: ```text after a line `<!-- output -->`. On a
page that shows none, `prestage run` runs over a few tokens only. A block that is not run says why on the line above it:
`<!-- not run: REASON -->`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warm import shell_function

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
#: What is code to run, by the language of its block; blocks of other languages are to read.
RUNS = ("python", "bash", "sh", "console")
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>output|not run: (?P<reason>[^\n]+)) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
#: `prestage` as the shell of a user knows it, and with fewer tokens for `prestage run`.
SHELL = """
set -euo pipefail
prestage() {
    if [ "$1" = run ]; then set -- "$@" $FEWER; fi
    warm_prestage "$@"
}
"""
FEWER = "--set workload.tokens=4"


@dataclass(frozen=True)
class Block:
    """One block of a page: where its text stands, and why it is not run, if it is not."""

    language: str
    text: str
    start: int
    is_output: bool
    reason: str | None

    @property
    def runs(self) -> bool:
        """Whether it is code that a reader would run."""
        return self.language in RUNS and self.reason is None


def blocks(page: str) -> list[Block]:
    """Returns the blocks of a page's text, in order."""
    return [
        Block(match["language"], match["text"], match.start("text"), match["mark"] == "output", match["reason"])
        for match in _BLOCK.finditer(page)
    ]


def played(page: str, folder: Path) -> Iterator[tuple[Block, str]]:
    """Run a page's blocks in a folder, and yield each block that shows output with what was printed since the last."""
    module: dict[str, Any] = {"__name__": "page"}
    fewer = "" if any(block.is_output for block in blocks(page)) else FEWER
    said = ""
    for block in blocks(page):
        if block.is_output:
            yield block, said
            said = ""
        elif block.runs and block.language == "python":
            said += _python(block.text, module, folder)
        elif block.runs:
            said += _shell(block.text, folder, fewer)


def _python(code: str, module: dict[str, Any], folder: Path) -> str:
    out = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out):
        exec(compile(code, "page", "exec"), module)
    return out.getvalue()


def _shell(code: str, folder: Path, fewer: str) -> str:
    environment = {**os.environ, "FEWER": fewer, "MPLBACKEND": "Agg", "COLUMNS": "110", "TERM": "dumb"}
    done = subprocess.run(
        ["bash", "-c", shell_function() + SHELL + code], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise AssertionError(f"{code}\nended with status {done.returncode}: {done.stderr}")
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


def with_outputs(page: str, folder: Path) -> str:
    """Returns a page's text with every shown output as it is printed now."""
    pieces, at = [], 0
    for block, said in played(page, folder):
        pieces += [page[at : block.start], said]
        at = block.start + len(block.text)
    return "".join([*pieces, page[at:]])


def without_keys(page: str) -> str:
    """Returns a page's text without the keys of rows, which change with every profile and version."""
    return re.sub(r" [0-9a-f]{8}$", " KEY", page, flags=re.MULTILINE)


def make_folder(folder: Path) -> Path:
    """Give a folder what a reader in a clone has beside him."""
    (folder / "calibration").symlink_to(ROOT / "calibration")
    return folder


def main() -> None:
    """Write the outputs of the named pages, all without one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", type=Path, default=sorted(DOCS.glob("*.md")))
    for path in parser.parse_args().pages:
        with tempfile.TemporaryDirectory() as folder:
            text = with_outputs(path.read_text(encoding="utf-8"), make_folder(Path(folder)))
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
