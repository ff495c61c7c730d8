"""What writing a timeline costs: seconds and peak memory of our writer beside those of the standard json module.

    python tests/bench_timeline.py [--spans N]

Each writer is a process of its own, so that peaks are its own. Ours makes the events of N spans (a million without
--spans) and streams them. The json module gets the very same events, made beforehand and not counted in its seconds:
once for `dump`, which streams them to the file, and once for `dumps`, faster, which makes the text in memory. Prints,
as JSON, seconds of processor time, peak memory above that of the process before it began, the file's size and the
ratios. All write plain .json, ours .json.gz as well.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from test_export import EXPERTS, made_run  # type: ignore[import-not-found]

from prestage.output.export import About, export_timeline
from prestage.resources.timeline import Timeline


def long_run(spans: int) -> Timeline:
    """Returns a decoding run of so many spans: one of 400 steps, over and over."""
    part = made_run(1, 400)
    timeline, piece = Timeline(), part.spans().copy()
    timeline.lanes = part.lanes
    length_ns = int(piece["end_ns"].max())
    while len(timeline) < spans:
        timeline.extend(piece[: spans - len(timeline)].tobytes())
        for name in ("start_ns", "end_ns", "issued_ns"):
            piece[name] += length_ns
        piece["copy"] = np.where(piece["copy"] > 0, piece["copy"] + len(piece), piece["copy"])
    return timeline


def peak_mib() -> float:
    """Returns the most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_ours(spans: int, path: Path) -> dict[str, float]:
    """Export a made-up run and return what that took."""
    timeline = long_run(spans)
    before_mib, began = peak_mib(), time.process_time()
    export_timeline(timeline, path, About(EXPERTS, layers=4), limit=None)
    return {"seconds": time.process_time() - began, "peak_mib": peak_mib() - before_mib}


def write_json(source: Path, path: Path, *, stream: bool) -> dict[str, float]:
    """Write what `source` holds with the standard module; the memory of the events themselves counts."""
    before_mib = peak_mib()
    content = source.read_bytes()
    document = orjson.loads(content)
    del content
    began = time.process_time()
    with path.open("w") as file:
        if stream:
            json.dump(document, file)
        else:
            file.write(json.dumps(document))
    return {"seconds": time.process_time() - began, "peak_mib": peak_mib() - before_mib}


def measured(*arguments: str) -> dict[str, float]:
    """Run one writer in a process of its own."""
    command = [sys.executable, __file__, "--writer", *arguments]
    report: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return report


def compare(spans: int) -> dict[str, Any]:
    """Returns the report."""
    with tempfile.TemporaryDirectory() as folder:
        ours, packed, theirs = (Path(folder) / name for name in ("ours.json", "ours.json.gz", "theirs.json"))
        rows: dict[str, dict[str, float]] = {}
        for name, arguments, path in (
            ("ours", ("ours", str(spans)), ours),
            ("ours, .gz", ("ours", str(spans)), packed),
            ("json.dumps", ("dumps", str(ours)), theirs),
            ("json.dump", ("dump", str(ours)), theirs),
        ):
            report = measured(*arguments, str(path))
            rows[name] = {**report, "file_mib": path.stat().st_size / 2**20}
    rounded = {name: {key: round(value, 2) for key, value in row.items()} for name, row in rows.items()}
    ratios = {
        f"{name} over ours": {key: round(rows[name][key] / rows["ours"][key], 2) for key in ("seconds", "peak_mib")}
        for name in ("json.dumps", "json.dump")
    }
    return {"spans": spans, **rounded, **ratios}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spans", type=int, default=10**6)
    parser.add_argument("--writer", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.writer is None:
        print(json.dumps(compare(given.spans), indent=2))
        return
    which, source, path = given.writer
    if which == "ours":
        report = write_ours(int(source), Path(path))
    else:
        report = write_json(Path(source), Path(path), stream=which == "dump")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
