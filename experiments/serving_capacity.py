"""Serving capacity: the highest rate of requests at which a service level is met, by bisection with replicates.

Every rate is simulated with several seeds, the same ones for all rates, so that they meet the same luck: arrivals are
the same ones, closer together. A rate is met or missed when the confidence interval of its share of served requests
lies on one side of what was promised. A rate at which requests come faster than they are served is missed, however
patient the promise. Between the highest rate met and the lowest missed the interval is halved until it is narrow
enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..engine.measure.request_metrics import ServiceLevel
from ..engine.scenario.amounts import ScenarioError
from ..engine.scenario.scenario import Scenario, make_scenario
from ..engine.scenario.sections_requests import LEAST_RATE, MOST_RATE
from ..engine.simulate import simulate
from ..engine.timing.ready import make_ready
from ..errors import InputError
from ..workloads.requests.arrivals import ARRIVALS

#: What is simulated: a rate in requests a second and a seed; what comes out is a run's `requests`.
Measure = Callable[[float, int], dict[str, Any]]
Progress = Callable[[str, int, int], None]
#: So many requests run in the mean where they are as good as alone.
_ALONE = 0.01
#: Two-sided quantiles of Student's distribution at 95 % by degrees of freedom, and of the normal one beyond.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
_NORMAL = 1.960
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Point:
    """One rate: what its replicates came to. `share` of the counted requests had all that was promised, on average.

    `half_width` is of the share's 95 % interval over replicates (0 for one). `met` is None where that interval holds
    what was promised, and the mean decides.
    """

    rate: float
    share: float
    half_width: float
    overloaded: bool
    met: bool | None
    latencies: dict[str, Any]

    def decided(self, level: ServiceLevel) -> bool:
        """Returns whether the level counts as met."""
        return self.met if self.met is not None else self.share >= level.share

    def plain(self) -> dict[str, Any]:
        """Returns the point as plain data for JSON."""
        return {
            "rate": self.rate, "share": self.share, "half_width": self.half_width, "overloaded": self.overloaded,
            "met": self.met, **self.latencies,
        }  # fmt: skip


@dataclass
class Search:
    """The rates that were looked at, each with a number of replicates."""

    measure: Measure
    level: ServiceLevel
    seeds: Sequence[int]
    progress: Progress | None = None
    points: dict[float, Point] = field(default_factory=dict)

    def at(self, rate: float) -> Point:
        """Returns what a rate comes to; it is simulated once."""
        if rate not in self.points:
            runs = [self.measure(rate, seed) for seed in self.seeds]
            self.points[rate] = _point(rate, runs, self.level)
            if self.progress is not None:
                self.progress(f"{rate:.3g} requests/s", len(self.points), len(self.points) + 1)
        return self.points[rate]

    def meets(self, rate: float) -> bool:
        """Returns whether a rate meets the level."""
        return self.at(rate).decided(self.level)


def _point(rate: float, runs: Sequence[dict[str, Any]], level: ServiceLevel) -> Point:
    shares = np.array([run["goodput"]["share"] for run in runs])
    count = len(shares)
    quantile = _STUDENT[count - 2] if 2 <= count <= len(_STUDENT) + 1 else _NORMAL
    half_width = quantile * float(shares.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    share = float(shares.mean())
    overloaded = sum(run["overloaded"] for run in runs) * 2 > count
    met: bool | None = share >= level.share
    if overloaded:
        met = False
    elif count > 1 and abs(share - level.share) < half_width:
        met = None
    names = ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms", "queueing_ms")
    latencies = {name: {key: _mean([run[name][key] for run in runs]) for key in runs[0][name]} for name in names}
    rates = {
        name: _mean([run[name] for run in runs])
        for name in ("requests_per_second", "output_tokens_per_second", "running")
    }
    return Point(rate, share, half_width, overloaded, met, latencies | rates)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def search(
    measure: Measure,
    level: ServiceLevel,
    first_rate: float,
    *,
    replicates: int = 5,
    precision: float = 0.05,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Returns the highest rate that meets a level, to a relative `precision`, with the curve of all rates looked at.

    `rate` is met and `missed_rate` is not; `rate` is None where no rate is met, even one at which requests are alone,
    and `missed_rate` where none is missed, even if all come at once: `why` then says so. `certain` is whether both
    were decided by the interval and not by the mean alone. `knee` is the rate of `curve` from which on latency grows
    faster than load. Raises InputError for numbers that cannot be.
    """
    if not level.limits():
        raise InputError("slo: nothing is promised: give one of ttft_ms, itl_ms, tpot_ms and e2e_ms")
    if replicates < 1 or not 0 < precision < 1:
        raise InputError(f"replicates = {replicates}, precision = {precision}: must be at least 1, and between 0 and 1")
    found = Search(measure, level, range(replicates), progress)
    low, high = _bracket(found, first_rate)
    while low is not None and high is not None and high / low > 1 + precision:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if found.meets(middle) else (low, middle)
    curve = [found.points[rate] for rate in sorted(found.points)]
    edges = [found.points[rate] for rate in (low, high) if rate is not None]
    return {
        "rate": low,
        "missed_rate": high,
        "certain": all(point.met is not None for point in edges),
        "confidence": CONFIDENCE,
        "replicates": replicates,
        "precision": precision,
        "why": _why(found, low, high),
        "knee": knee([point.rate for point in curve], [point.latencies["e2e_ms"]["mean"] for point in curve]),
        "curve": [point.plain() for point in curve],
    }


def _bracket(found: Search, first_rate: float) -> tuple[float | None, float | None]:
    """Returns a rate that is met and the double of it that is missed; None for one that there is not."""
    rate = first_rate
    if found.meets(rate):
        while rate < MOST_RATE:
            faster = min(2 * rate, MOST_RATE)
            if not found.meets(faster):
                return rate, faster
            rate = faster
        return rate, None
    while rate > LEAST_RATE and not _alone(found.at(rate)):
        slower = max(rate / 2, LEAST_RATE)
        if found.meets(slower):
            return slower, rate
        rate = slower
    return None, rate


def _alone(point: Point) -> bool:
    """Whether requests hardly ever meet at a rate: coming slower would change nothing."""
    running: float = point.latencies["running"] or 0.0
    return running < _ALONE


def _why(found: Search, low: float | None, high: float | None) -> str | None:
    """Returns what there is to say where no rate is met, or none is missed."""
    if low is None and high is not None:
        alone = found.points[high].latencies
        said = ", ".join(
            f"{name} {alone[f'{name}_ms']['p99']:,.1f} ms (p99; promised {limit:,.1f})"
            for name, limit in found.level.limits().items()
            if alone[f"{name}_ms"]["p99"] is not None
        )
        return f"no rate meets it: at {high:.2g} requests/s, where requests are alone, {said}"
    if high is None and low is not None:
        return f"no rate misses it: even {low:,.0f} requests/s do not, for so few requests; serve more of them (count)"
    return None


def knee(rates: Sequence[float], latencies: Sequence[float | None]) -> float | None:
    """Returns the rate at which latency begins to grow faster than load; None of fewer than three.

    The point farthest below the line between the ends, both axes from 0 to 1: Satopaa et al., "Finding a kneedle in a
    haystack", ICDCS workshops 2011.
    """
    known = [(rate, ms) for rate, ms in zip(rates, latencies, strict=True) if ms is not None]
    if len(known) < 3 or known[0][1] == known[-1][1]:
        return None
    x, y = np.array(known).T
    below = (x - x[0]) / (x[-1] - x[0]) - (y - y[0]) / (y[-1] - y[0])
    return float(x[int(np.argmax(below))])


def serving_capacity(
    scenario: Scenario,
    level: ServiceLevel,
    *,
    replicates: int = 5,
    precision: float = 0.05,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Returns the highest rate at which a scenario meets a service level, as `search`, with the scenario.

    The search begins at its `requests.rate`. Raises ScenarioError if its requests do not come by a rate.
    """
    if scenario.requests is None:
        raise ScenarioError(
            "requests: missing: capacity is of requests under load: give a scenario with [requests], or "
            "set requests.prompt_tokens = 512"
        )
    arrivals = scenario.requests.arrivals
    if arrivals not in ARRIVALS:
        raise ScenarioError(f"requests.arrivals = {arrivals!r}: has no rate: choose one of {', '.join(ARRIVALS)}")
    make_ready(progress)

    def measure(rate: float, seed: int) -> dict[str, Any]:
        data = scenario.plain()
        data["seed"] = scenario.seed + seed
        data["requests"] |= {"rate": rate, "slo": {**level.limits_ms(), "share": level.share}}
        found: dict[str, Any] = simulate(make_scenario(data), baselines=False).data["requests"]
        return found

    found = search(
        measure, level, scenario.requests.rate, replicates=replicates, precision=precision, progress=progress
    )  # fmt: skip
    return {"slo": {**level.limits_ms(), "share": level.share}, **found, "scenario": scenario.plain()}
