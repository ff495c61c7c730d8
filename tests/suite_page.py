"""docs/suite.md and its figures, from the benchmark suite:

    python tests/suite_page.py DIR

runs `prestage suite -o DIR` (what DIR holds already is not run again) and writes the page anew.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "suite.md"
FIGURES = ROOT / "docs" / "suite"
INTRODUCTION = """# The benchmark suite

`prestage suite -o DIR` runs the comprehensive suite of the "Memory Management Simulation Guide" as one command, on the
guide's machine and on two others. In full it takes some minutes on two cores, with `--quick` half a minute. A suite
that is killed goes on where it was. The folder then has `report.html` with the content of this page, `suite.json`, the
figures, and a journal for each sweep. `prestage plot` draws a journal's rows, and `prestage run
DIR/rows/NAME.jsonl#KEY` runs one again. On a machine with a CUDA GPU the suite measures its transfers too.

`experiments/suites/default.toml` says what runs. Copy it, change it, and run `prestage suite mine.toml`. This page is
made by `python tests/suite_page.py DIR`.
"""


def write_page(folder: Path) -> None:
    """Write the page and its figures from a finished suite's folder."""
    _, subtitle, *parts = (folder / "suite.md").read_text(encoding="utf-8").split("\n\n")
    text = "\n\n".join([INTRODUCTION.rstrip(), subtitle, *parts]).replace("](figures/", "](suite/")
    shutil.rmtree(FIGURES, ignore_errors=True)
    shutil.copytree(folder / "figures", FIGURES)
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    """Run the suite and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    subprocess.run([sys.executable, "-m", "prestage", "suite", "-o", str(folder)], check=True)
    write_page(folder)


if __name__ == "__main__":
    main()
