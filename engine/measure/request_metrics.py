"""Metrics of a run under load: latencies of requests, rates, utilization, and which requests met their objectives.

All is a function of what `workloads.requests.log` recorded. Left out at the beginning and at the end is what the window
says; latencies are those of the requests in between, and rates are over the time from the first of these to arrive to
the first of those left out behind them, or to the end of the run where none are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...workloads.requests.log import RequestLog
from ..scenario.sections_requests import RequestsSection, SloSection, edge_requests
from .recording import ratio
from .speed import spread_ms

Array = npt.NDArray[Any]

#: The backlog grows for ever if of those that came in the window so many more are left, and more than luck explains.
_GROWTH, _DEVIATIONS = 0.05, 3


@dataclass(frozen=True)
class Window:
    """How many requests are left out, by order of arrival: the first ones, and the last ones."""

    warmup: int = 0
    cooldown: int = 0


@dataclass(frozen=True)
class ServiceLevel:
    """What a request is promised, in ms; None: nothing.

    Its first token so long after its arrival, no gap between two of its tokens longer than `itl_ms`, their mean at most
    `tpot_ms`, and its last token so long after its arrival. `share` of the requests are to be served like that.
    """

    ttft_ms: float | None = None
    itl_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None
    share: float = 0.99

    def limits(self) -> dict[str, float]:
        """Returns what is promised, by name."""
        named = {"ttft": self.ttft_ms, "itl": self.itl_ms, "tpot": self.tpot_ms, "e2e": self.e2e_ms}
        return {name: limit for name, limit in named.items() if limit is not None}

    def limits_ms(self) -> dict[str, float]:
        """Returns what is promised, by the keys of a scenario."""
        return {f"{name}_ms": limit for name, limit in self.limits().items()}


@dataclass(frozen=True)
class Latencies:
    """Of each request, in order of number, in ns (requests,): one row of the saved run.

    `tpot` is NaN for a request of one token; `worst_gap` is 0 for it. Gaps are (tokens after a request's first,), with
    the place of their request in `gap_of`. The tokens of one step come at once: the gaps between them are 0.
    """

    arrival: Array
    queueing: Array
    ttft: Array
    e2e: Array
    tpot: Array
    worst_gap: Array
    gaps: Array
    gap_of: Array
    token_ns: Array


def level_of(section: SloSection | None) -> ServiceLevel:
    """Returns what a scenario promises; nothing without its section."""
    return ServiceLevel() if section is None else ServiceLevel(**section.model_dump())


def run_requests(log: RequestLog, section: RequestsSection, failed: int = 0) -> dict[str, Any]:
    """Returns what a run says of the requests of a scenario, as `request_metrics`; `failed` of a trace are left out."""
    count = len(log.requests["number"])
    window = Window(edge_requests(section.warmup, count), edge_requests(section.cooldown, count))
    level = level_of(section.slo)
    return {**request_metrics(log, window, level if level.limits() else None), "failed": failed}


def latencies(log: RequestLog) -> Latencies:
    """Returns the latencies of all finished requests."""
    requests = log.requests
    request, token_ns = log.token_times()
    ended = np.isin(request, requests["number"])  # tokens of requests that have not ended belong to none
    place, token_ns = np.searchsorted(requests["number"], request[ended]), token_ns[ended]
    first = np.diff(place, prepend=-1) != 0
    gaps = np.diff(token_ns, prepend=0)[~first]
    gap_of = place[~first]
    worst = np.zeros(len(requests["number"]), dtype=np.int64)
    np.maximum.at(worst, gap_of, gaps)
    e2e = requests["finished_ns"] - requests["arrival_ns"]
    ttft = requests["first_token_ns"] - requests["arrival_ns"]
    after = (requests["output_tokens"] - 1).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        tpot = np.where(after > 0, (e2e - ttft) / after, np.nan)
    return Latencies(
        requests["arrival_ns"], requests["started_ns"] - requests["arrival_ns"], ttft, e2e, tpot, worst, gaps, gap_of,
        token_ns,
    )  # fmt: skip


def request_metrics(log: RequestLog, window: Window, level: ServiceLevel | None = None) -> dict[str, Any]:
    """Returns what a run says of its requests, as plain data for JSON; latencies as `speed.spread_ms` in ms.

    `ttft_ms` is from arrival to first token, `itl_ms` each gap between tokens of a request, `tpot_ms` (end-to-end -
    TTFT) / (output tokens - 1), `e2e_ms` from arrival to last token, `queueing_ms` from arrival to the first step that
    had a part of it. Raises InputError if the window leaves no request.
    """
    requests, found, steps = log.requests, latencies(log), log.steps
    counted = in_window(found.arrival, window)
    begin_ns, end_ns = _span(found, requests["finished_ns"], counted, window)
    seconds = max(1, end_ns - begin_ns) / 1e9
    ended = (requests["finished_ns"] >= begin_ns) & (requests["finished_ns"] < end_ns + (window.cooldown == 0))
    given = (found.token_ns >= begin_ns) & (found.token_ns < end_ns + (window.cooldown == 0))
    prompt_tokens = int(requests["prompt_tokens"].sum())
    return {
        "requests": len(found.arrival),
        "counted": int(counted.sum()),
        "window_s": [begin_ns / 1e9, end_ns / 1e9],
        "requests_per_second": int(ended.sum()) / seconds,
        "output_tokens_per_second": int(given.sum()) / seconds,
        "ttft_ms": spread_ms(found.ttft[counted]),
        "itl_ms": spread_ms(found.gaps[counted[found.gap_of]]),
        "tpot_ms": spread_ms(found.tpot[counted & ~np.isnan(found.tpot)]),
        "e2e_ms": spread_ms(found.e2e[counted]),
        "queueing_ms": spread_ms(found.queueing[counted]),
        "running": _mean_over_time(steps, "running", begin_ns, end_ns),
        "waiting": _mean_over_time(steps, "waiting", begin_ns, end_ns),
        "kv_blocks": _mean_over_time(steps, "kv_blocks", begin_ns, end_ns),
        "steps": len(steps["rows"]),
        "rows_per_step": float(steps["rows"].mean()) if len(steps["rows"]) else None,
        "preemptions": int(steps["preempted"].sum()),
        "prefix_hit_rate": ratio(int(requests["cached"].sum()), prompt_tokens),
        "draft_acceptance": ratio(int(steps["accepted"].sum()), int(steps["drafts"].sum())),
        "tokens_per_request_step": _tokens_per_part(steps),
        "little": little(log),
        "overloaded": overloaded(log, begin_ns, end_ns),
        "goodput": None if level is None else _goodput(found, counted, ended, level, seconds),
    }


def in_window(arrival_ns: Array, window: Window) -> Array:
    """Returns which requests count, bool (requests,). Raises InputError if none is left."""
    count = len(arrival_ns)
    if window.warmup + window.cooldown >= count:
        raise InputError(
            f"requests: a warmup of {window.warmup} and a cooldown of {window.cooldown} leave none of {count} requests "
            "to measure: give less, or serve more"
        )
    rank = np.empty(count, dtype=np.int64)
    rank[np.argsort(arrival_ns, kind="stable")] = np.arange(count)
    return (rank >= window.warmup) & (rank < count - window.cooldown)


def _span(found: Latencies, finished_ns: Array, counted: Array, window: Window) -> tuple[int, int]:
    """Returns from when to when rates are taken."""
    begin_ns = int(found.arrival[counted].min())
    if not window.cooldown:
        return begin_ns, int(finished_ns.max())
    return begin_ns, int(found.arrival[~counted & (found.arrival >= begin_ns)].min())


def _mean_over_time(steps: dict[str, Array], name: str, begin_ns: int, end_ns: int) -> float | None:
    """Returns the mean of what each step had, over the time of the steps between two instants; nothing is 0."""
    start = np.clip(steps["start_ns"], begin_ns, end_ns)
    end = np.clip(steps["end_ns"], begin_ns, end_ns)
    return ratio(int((steps[name] * (end - start)).sum()), end_ns - begin_ns)


def _tokens_per_part(steps: dict[str, Array]) -> float | None:
    """Returns the mean tokens that a request with drafts is given in a step; None without drafts."""
    drafted = steps["drafts"] > 0
    return None if not drafted.any() else float((steps["tokens"][drafted]).sum() / steps["running"][drafted].sum())


def replica_loads(logs: Sequence[RequestLog]) -> list[dict[str, int]]:
    """Returns what each of several replicas served: requests, output tokens, steps, preemptions."""
    return [
        {
            "requests": len(log.requests["number"]),
            "output_tokens": int(log.requests["output_tokens"].sum()),
            "steps": len(log.steps["rows"]),
            "preemptions": int(log.steps["preempted"].sum()),
            "prefix_hit_tokens": int(log.requests["cached"].sum()),
        }
        for log in logs
    ]


def little(log: RequestLog) -> dict[str, float | None]:
    """Returns both sides of Little's law over the whole run: requests in the system, and rate times time in it.

    J. D. C. Little, "A proof for the queuing formula L = lambda W", Operations Research 9(3), 1961.
    """
    changes, requests = log.changes, log.requests
    if not len(changes):
        return {"in_system": None, "rate_times_latency": None}
    time_ns, present = changes[:, 0], np.cumsum(changes[:, 1])
    whole_ns = int(time_ns[-1] - time_ns[0])
    inside = int((present[:-1] * np.diff(time_ns)).sum())
    spent = int((requests["finished_ns"] - requests["arrival_ns"]).sum())
    return {"in_system": ratio(inside, whole_ns), "rate_times_latency": ratio(spent, whole_ns)}


def overloaded(log: RequestLog, begin_ns: int, end_ns: int) -> bool:
    """Returns whether the backlog grew as it does above capacity: requests come faster than they are served.

    Of those that came between the two instants, a twentieth more is left at the end than was there at the beginning,
    and more than three deviations of a Poisson number of that size.
    """
    changes = log.changes
    arrivals = changes[changes[:, 1] > 0, 0]
    last_ns = min(end_ns, int(arrivals.max(initial=begin_ns)))
    inside = (changes[:, 0] > begin_ns) & (changes[:, 0] <= last_ns)
    came = int((changes[inside, 1] > 0).sum())
    return bool(int(changes[inside, 1].sum()) > max(_GROWTH * came, _DEVIATIONS * came**0.5))


def _goodput(found: Latencies, counted: Array, ended: Array, level: ServiceLevel, seconds: float) -> dict[str, Any]:
    """Returns what share of the counted requests got what was promised, and missed which promise.

    The rate is of those that got it and `ended` in the window.
    """
    missed = misses(found, level)
    got = ~np.logical_or.reduce([np.zeros(len(counted), dtype=bool), *missed.values()])
    met, number = counted & got, int(counted.sum())
    return {
        "requests_per_second": int((ended & got).sum()) / seconds,
        "share": int(met.sum()) / number,
        "missed": {name: int((counted & late).sum()) / number for name, late in missed.items()},
        "met": int(met.sum()) >= level.share * number,
    }


def misses(found: Latencies, level: ServiceLevel) -> dict[str, Array]:
    """Returns which requests missed each promise, bool (requests,), by its name."""
    took = {"ttft": found.ttft, "itl": found.worst_gap, "tpot": np.nan_to_num(found.tpot), "e2e": found.e2e}
    return {name: took[name] > limit * 1e6 for name, limit in level.limits().items()}
