"""What a run under load comes to: latencies by hand, Little's law, queueing theory, goodput, windows, overload."""

from __future__ import annotations

import numpy as np
import pytest
from queueing_theory import lindley

from prestage.engine.measure.request_metrics import (
    ServiceLevel,
    Window,
    latencies,
    level_of,
    little,
    overloaded,
    request_metrics,
)
from prestage.engine.policies.scheduler import SCHEDULERS, Chunked, Orca, Static
from prestage.engine.scenario.sections_requests import SloSection
from prestage.errors import InputError
from prestage.testing import serve, tiny_requests, tiny_server
from prestage.workloads.requests.arrivals import Process, arrival_instants
from prestage.workloads.requests.kv_blocks import KvBlocks
from prestage.workloads.requests.lengths import PROMPTS, Lengths, draw_lengths
from prestage.workloads.requests.log import RequestLog
from prestage.workloads.requests.request import Request, RequestStep

MS = 1_000_000
NONE = Window()


def by_hand() -> RequestLog:
    """A (at 0: 5 + 3) and B (at 15 ms: 2 + 2), steps of 10 ms: A runs in 0-10, 10-20, 20-30, B in 20-30, 30-40."""
    server = tiny_server(tiny_requests((0, 5, 3), (15 * MS, 2, 2)), Orca)
    serve(server, 10 * MS)
    return server.log


def test_latencies_by_hand() -> None:
    found = latencies(by_hand())
    assert (found.queueing / MS).tolist() == [0, 5]
    assert (found.ttft / MS).tolist() == [10, 15]
    assert (found.e2e / MS).tolist() == [30, 25]
    assert (found.tpot / MS).tolist() == [10, 10]
    assert (found.gaps / MS).tolist() == [10, 10, 10]
    assert found.gap_of.tolist() == [0, 0, 1]


def test_tokens_of_requests_that_have_not_ended_belong_to_none() -> None:
    # A wants nine tokens and had three when the run was stopped, C wants nine and had one; B, between, has both of its.
    server = tiny_server(tiny_requests((0, 5, 9), (0, 2, 2), (15 * MS, 2, 9)), Orca)
    for step in range(3):
        assert isinstance(server.next_step(step * 10 * MS), RequestStep)
        server.ended((step + 1) * 10 * MS)
    assert server.log.token_times()[0].tolist() == [0, 0, 0, 1, 1, 2]
    found = latencies(server.log)
    assert (found.ttft / MS).tolist() == [10]
    assert (found.worst_gap / MS).tolist() == (found.gaps / MS).tolist() == [10]
    assert found.gap_of.tolist() == [0]
    assert (found.token_ns / MS).tolist() == [10, 20]


def test_rates_and_what_stood_by_by_hand() -> None:
    data = request_metrics(by_hand(), NONE)
    assert data["window_s"] == [0.0, 0.04]
    assert data["requests_per_second"] == 50
    assert data["output_tokens_per_second"] == 125
    assert data["running"] == 1.25  # 1, 1, 2 and 1 in four steps of one length
    assert data["waiting"] == 0
    assert data["ttft_ms"]["mean"] == 12.5
    assert data["ttft_ms"]["p50"] == 12.5
    assert data["rows_per_step"] == (5 + 1 + 3 + 1) / 4
    # A is there for 30 ms and B for 25 of 40.
    assert data["little"] == {"in_system": pytest.approx(55 / 40), "rate_times_latency": pytest.approx(55 / 40)}


def test_a_request_of_one_token_has_no_gaps() -> None:
    server = tiny_server(tiny_requests((0, 1, 1)), Orca)
    serve(server, 10 * MS)
    data = request_metrics(server.log, NONE, ServiceLevel(itl_ms=1, tpot_ms=1))
    assert data["itl_ms"] == data["tpot_ms"] == {"mean": None, "p50": None, "p95": None, "p99": None}
    assert data["goodput"]["share"] == 1


def test_goodput_counts_who_got_all_that_was_promised() -> None:
    # TTFTs are 10 and 15 ms, gaps 10, ends after 30 and 25.
    log = by_hand()
    both = request_metrics(log, NONE, ServiceLevel(ttft_ms=15, itl_ms=10, e2e_ms=30))["goodput"]
    assert (both["share"], both["met"], both["requests_per_second"]) == (1, True, 50)
    one = request_metrics(log, NONE, ServiceLevel(ttft_ms=14, itl_ms=10, share=0.5))["goodput"]
    assert (one["share"], one["met"], one["missed"]) == (0.5, True, {"ttft": 0.5, "itl": 0})
    none = request_metrics(log, NONE, ServiceLevel(ttft_ms=14, e2e_ms=29))["goodput"]
    assert (none["share"], none["met"], none["missed"]) == (0, False, {"ttft": 0.5, "e2e": 0.5})


def test_a_promise_that_does_not_say_to_how_many_is_to_as_many_as_a_scenarios() -> None:
    assert ServiceLevel() == level_of(SloSection()) == level_of(None)


def test_the_window_leaves_out_the_first_and_the_last_to_arrive_and_their_time() -> None:
    server = tiny_server(tiny_requests(*[(20 * MS * number, 1, 1) for number in range(10)]), Orca)
    serve(server, 10 * MS)
    data = request_metrics(server.log, Window(2, 3))
    assert (data["requests"], data["counted"]) == (10, 5)
    assert data["window_s"] == [0.04, 0.14]
    assert data["requests_per_second"] == 50
    with pytest.raises(InputError, match="a warmup of 6 and a cooldown of 4 leave none of 10 requests to measure"):
        request_metrics(server.log, Window(6, 4))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_littles_law_work_conservation_and_blocks_hold_in_a_run_with_preemptions(name: str) -> None:
    random = np.random.default_rng(1)
    shapes = random.integers((0, 1, 1), (30 * MS, 30, 20), (200, 3))
    shapes[:, 0] = np.cumsum(shapes[:, 0])
    kv = KvBlocks(16, 4)
    server = tiny_server(tiny_requests(*(tuple(s) for s in shapes.tolist())), SCHEDULERS[name], kv, max_num_seqs=8)
    ran = serve(server, lambda step: 1 * MS + step.rows.size * MS // 10)
    sides = little(server.log)
    assert sides["in_system"] == pytest.approx(sides["rate_times_latency"], rel=1e-12)
    # Whoever is there is worked for: a step begins when the one before ends, or when somebody comes.
    steps = server.log.steps
    begins, ends = steps["start_ns"][1:], steps["end_ns"][:-1]
    idle = begins > ends
    assert set(begins[idle].tolist()) <= set(shapes[:, 0].tolist())
    present = np.cumsum(server.log.changes[:, 1])
    for end in ends[idle].tolist():
        assert present[server.log.changes[:, 0] <= end][-1] == 0
    assert kv.free_blocks == 16
    assert len(ran) == len(steps["rows"])


#: Service of one step: a request is a prompt of so many tokens, at 100 ns each, and one token comes out.
SERVICES = {
    "D": Lengths(1000),
    "U": Lengths(1000, "uniform", cv=0.5),
    "M": Lengths(1000, "exponential"),
}


def waits_ns(service: str, load: float, count: int, seed: int) -> np.ndarray:
    """The queueing times of requests who come by a Poisson process, and are served one by one, in order."""
    lengths = draw_lengths(SERVICES[service], count, seed, PROMPTS)
    arrivals = arrival_instants("poisson", Process(load * 1e9 / 100_000), count, seed)
    requests = [
        Request(number, at, length, 1)
        for number, (at, length) in enumerate(zip(arrivals.tolist(), lengths.tolist(), strict=True))
    ]
    server = tiny_server(requests, Static, max_num_seqs=1)
    serve(server, rows_of)
    done = server.log.requests
    return done["started_ns"] - done["arrival_ns"]


def rows_of(step: RequestStep) -> int:
    return 100 * step.parts[0].tokens


def pollaczek_khinchine_ns(service: str, load: float) -> float:
    """The mean wait of M/G/1: load * (1 + cv^2) / (2 (1 - load)) services."""
    cv = {"D": 0.0, "U": 0.5, "M": 1.0}[service]
    return load * (1 + cv**2) / (2 * (1 - load)) * 100_000


@pytest.mark.slow
@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize(("load", "count", "within"), [(0.3, 6000, 0.1), (0.6, 10_000, 0.15)])
def test_waits_are_those_of_queueing_theory(service: str, load: float, count: int, within: float) -> None:
    # Some three standard errors of so few requests; `python tests/queueing_theory.py` takes as many as 2 % needs.
    mean = float(waits_ns(service, load, count, seed=3)[count // 20 :].mean())
    assert mean == pytest.approx(pollaczek_khinchine_ns(service, load), rel=within)


def test_every_wait_is_that_of_lindleys_recursion() -> None:
    """To the nanosecond: the serving loop is the queue that theory speaks of."""
    lengths = draw_lengths(SERVICES["M"], 500, 7, PROMPTS)
    arrivals = arrival_instants("poisson", Process(0.9 * 1e9 / 100_000), 500, 7)
    assert (waits_ns("M", 0.9, 500, seed=7) == lindley(arrivals, lengths * 100)).all()


def test_a_backlog_that_was_there_at_the_beginning_is_no_growth() -> None:
    log = RequestLog()
    for arrival_ns in [1000] * 100:
        log.arrived(arrival_ns)
    assert not overloaded(log, 1000, 2000)
    for arrival_ns in [1001] * 9 + [2001] * 9:  # three deviations of 9 are 9
        log.arrived(arrival_ns)
    assert not overloaded(log, 1000, 2000)
    log.arrived(2000)
    assert overloaded(log, 1000, 2000)  # of 10, 10 more: 9.5 would have been luck


def test_a_load_above_capacity_is_called_overloaded_and_one_below_is_not() -> None:
    for load, expected in ((0.8, False), (1.3, True)):
        arrivals = arrival_instants("poisson", Process(load * 1e9 / 10_000), 2000, 1)
        requests = [Request(number, at, 1, 1) for number, at in enumerate(arrivals.tolist())]
        server = tiny_server(requests, Chunked, max_num_seqs=1)
        serve(server, 10_000)
        assert request_metrics(server.log, Window(200, 200))["overloaded"] is expected
