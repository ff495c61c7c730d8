"""Tables of docs/reality.md on the host's calls: what they take beside copies to the GPU, and after long waits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prestage.calibration.executor.measured import Measured, Times, load_all
from prestage.output.markdown import table
from prestage.resources.timeline import DEMAND, DENSE, EXPERT, HEAD, PREFETCH, READBACK

SETS = Path(__file__).parent.parent / "calibration" / "validation" / "h200"
#: Sets of executed schedules, and what they are.
_SETS = {
    "fit": "fit, 2026-11-25",
    "fit-2026-12": "fit, 2026-12-01",
    "held-out-2026-12": "held out, 2026-12-01",
}
_PARTS = {DENSE: "dense part", EXPERT: "expert", HEAD: "head"}
#: A call is beside copies, or quiet, if they go on for more than so much of it, or for less than the rest.
_BESIDE = 0.95
#: Calls after waits up to the first are what others are compared with; after the second, waits are long.
_SHORT_NS, _LONG_NS = 100_000, 5_000_000
#: A repeat with fewer quiet calls of a part than this says nothing of it.
_LEAST = 15


class _Calls(NamedTuple):
    """What the host's calls for one group of kernels took, which share of that copies went on, and its last wait."""

    kind: int
    took_ns: int
    beside: float
    waited_ns: int


def host_beside() -> str:
    """Calls of eager groups of kernels beside copies, as a share of quiet ones of the same schedule and repeat."""
    rows = []
    for folder, what in _SETS.items():
        ratios = _ratios(load_all([SETS / folder]))
        for kind, part in _PARTS.items():
            seen = [ratios[kind, *key] for key in ((True, False), (False, True), (True, True))]
            rows.append([what, part, *(f"{np.median(each):.2f} ({len(each):,})" if each else "" for each in seen)])
    columns = ["set", "calls of", "beside copies", "after waits of 5 ms", "after such waits, beside copies"]
    return table(columns, rows)


def _ratios(runs: list[Measured]) -> dict[tuple[int, bool, bool], list[float]]:
    """Returns by kind, whether beside copies, and whether after a long wait, how many times as long calls took."""
    found: dict[tuple[int, bool, bool], list[float]] = defaultdict(list)
    for run in runs:
        if run.scenario.dispatch.mode != "eager":
            continue
        for times in run.gpus[0].repeats:
            calls = list(_calls(run, times))
            for kind in _PARTS:
                own = [call for call in calls if call.kind == kind]
                quiet = [one.took_ns for one in own if one.beside < 1 - _BESIDE and one.waited_ns < _SHORT_NS]
                if len(quiet) < _LEAST:
                    continue
                for one in own:
                    if not 1 - _BESIDE <= one.beside <= _BESIDE and not _SHORT_NS <= one.waited_ns < _LONG_NS:
                        key = kind, one.beside > _BESIDE, one.waited_ns >= _LONG_NS
                        found[key].append(one.took_ns / float(np.median(quiet)))
    return found


def _calls(run: Measured, times: Times) -> Iterator[_Calls]:
    """Yields what one repeat's calls took; the first ones behind a wait, which also resume, are left out."""
    spans = run.gpus[0].spans
    kinds, visits = spans["kind"].tolist(), spans["visit"].tolist()
    copied = np.isin(spans["kind"], [DEMAND, PREFETCH]) & (times.start_ns >= 0)
    starts_ns, ends_ns = np.sort(times.start_ns[copied]), np.sort(times.end_ns[copied])
    sums_ns = np.concatenate([[0], np.cumsum(ends_ns - starts_ns)])

    def copied_ns(at_ns: int) -> int:
        begun = int(np.searchsorted(starts_ns, at_ns, side="right"))
        return int(sums_ns[begun]) - (max(0, int(ends_ns[begun - 1]) - at_ns) if begun else 0)

    stamp_ns, waited_ns, first = 0, 0, True
    for number, kind in enumerate(kinds):
        if times.start_ns[number] < 0:
            continue
        issued_ns = int(times.issued_ns[number])
        if kind in _PARTS and not first and issued_ns > stamp_ns:
            beside = (copied_ns(issued_ns) - copied_ns(stamp_ns)) / (issued_ns - stamp_ns)
            yield _Calls(kind, issued_ns - stamp_ns, beside, waited_ns)
        stamp_ns, first = issued_ns, kind == READBACK
        if first:
            known_ns = int(times.choice_known_ns[visits[number]])
            waited_ns = known_ns - max(issued_ns, int(times.waits_from_ns[visits[number]]))
            stamp_ns = known_ns
