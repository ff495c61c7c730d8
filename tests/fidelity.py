"""How far each prediction was off at the last release, and which are off otherwise today:

    python tests/fidelity.py            # rows that moved by more than MOVED points, and whether CHANGELOG names them
    python tests/fidelity.py --release  # what is committed becomes what later changes are held against

Rows are those of the committed validations (schedules on real GPUs), of real runtimes, and of the table of published
runs. tests/test_fidelity.py shows that none moved unsaid, of those committed and of a sample that is predicted again.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
VALIDATION = ROOT / "calibration" / "validation"
RELEASED = Path(__file__).parent / "fidelity.json"
#: By so many points of its error a row may move without a word.
MOVED = 2.0
#: A figure as changes are told.
_PERCENT = r"[-+]\d+\.\d"
_FOUND = ("samples", "measured_ns", "predicted_ns")


def errors() -> dict[str, float]:
    """Returns the error of every committed row in percent, simulated / measured - 1, by "report: row"."""
    found: dict[str, float] = {}
    for file in sorted(VALIDATION.glob("*.json")):
        for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
            error = row.get("makespan_error")
            error = row["predicted_ns"] / row["measured_ns"] - 1 if error is None else error
            found[f"{file.stem}: {_name(row)}"] = 100 * error
    for line in (VALIDATION / "published.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["error"] is not None:
            found[f"published: {row['id']}"] = 100 * row["error"]
    return {name: round(error, 2) for name, error in found.items()}


def _name(row: dict[str, Any]) -> str:
    """Returns what a row calls itself, or else the settings that it is of."""
    said = row.get("scenario") or row.get("name")
    settings = (f"{key}={value}" for key, value in row.items() if isinstance(value, str | int) and key not in _FOUND)
    return said or ",".join(settings)


def released() -> dict[str, float]:
    """Returns the errors at the last release."""
    said: dict[str, float] = json.loads(RELEASED.read_text(encoding="utf-8"))
    return said


def moved(before: dict[str, float], now: dict[str, float]) -> dict[str, str]:
    """Returns what became of each row that moved by more than MOVED points, or went away."""
    return {
        name: f"{error:+.1f} % -> " + ("gone" if name not in now else f"{now[name]:+.1f} %")
        for name, error in before.items()
        if name not in now or abs(now[name] - error) > MOVED
    }


def unsaid(changes: dict[str, str], changelog: str) -> dict[str, str]:
    """Returns those changes that the changelog does not tell between its first heading and the next release's.

    A row that went away is named. One that moved is named with its error of today last in brackets behind it, to
    within MOVED: a row may move again after it was told of.
    """
    current = changelog.split("\n## ")[1]
    return {name: change for name, change in changes.items() if not _is_told(name.partition(": ")[2], change, current)}


def _is_told(row: str, change: str, text: str) -> bool:
    """Returns whether a text names a row, and, unless it is gone, what it moved to."""
    if change.endswith("gone"):
        return f"`{row}`" in text
    told = re.findall(rf"`{re.escape(row)}`\s+\([^)]*?({_PERCENT})\s+%\)", text)
    return any(abs(float(percent) - float(re.findall(_PERCENT, change)[-1])) <= MOVED for percent in told)


def main() -> None:
    """Print what moved, or keep what is there now."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", action="store_true")
    if parser.parse_args().release:
        RELEASED.write_text(json.dumps(errors(), indent=0) + "\n", encoding="utf-8")
        return
    changes = moved(released(), errors())
    silent = unsaid(changes, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    for name, change in changes.items():
        print(f"{name}: {change}{', not in CHANGELOG' if name in silent else ''}")


if __name__ == "__main__":
    main()
