"""Serving capacity: the rate that theory gives, what is said where there is none, and the knee of a curve."""

from __future__ import annotations

import math
from typing import Any

import pytest

from prestage.engine.measure.request_metrics import ServiceLevel, Window, request_metrics
from prestage.engine.policies.scheduler import Static
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.scenario import load_scenario
from prestage.errors import InputError
from prestage.experiments.serving_capacity import Measure, knee, search, serving_capacity
from prestage.testing import serve, tiny_server
from prestage.workloads.requests.arrivals import Process, arrival_instants
from prestage.workloads.requests.lengths import PROMPTS, Lengths, draw_lengths
from prestage.workloads.requests.request import Request

#: A prompt has 100 tokens in the mean, exponential, at 10 us each: one server, 1,000 requests a second at most.
TOKEN_NS = 10_000


def one_server(level: ServiceLevel, count: int = 2500) -> Measure:
    def measure(rate: float, seed: int) -> dict[str, Any]:
        lengths = draw_lengths(Lengths(100, "exponential"), count, seed, PROMPTS)
        arrivals = arrival_instants("poisson", Process(rate), count, seed)
        columns = zip(arrivals.tolist(), lengths.tolist(), strict=True)
        requests = [Request(number, at, length, 1) for number, (at, length) in enumerate(columns)]
        server = tiny_server(requests, Static, max_num_seqs=1)
        serve(server, lambda step: step.parts[0].tokens * TOKEN_NS)
        return request_metrics(server.log, Window(count // 10, count // 10), level)

    return measure


@pytest.mark.slow
def test_capacity_is_that_of_a_queue_with_exponential_service() -> None:
    # M/M/1: a request is in the system for longer than t with probability exp(-(mu - lambda) t); mu = 1,000 a second,
    # t = 10 ms, and 90 % are promised: lambda = 1,000 - ln(10) / 0.010 = 770 a second.
    level = ServiceLevel(e2e_ms=10, share=0.9)
    found = search(one_server(level), level, 300.0, replicates=3, precision=0.05)
    theory = 1000 - math.log(10) / 0.010
    assert found["rate"] == pytest.approx(theory, rel=0.08)
    assert found["rate"] < found["missed_rate"] <= found["rate"] * 1.05
    assert found["why"] is None
    shares = [point["share"] for point in found["curve"]]
    assert shares == sorted(shares, reverse=True)  # the same luck at every rate
    assert found["curve"][0]["rate"] < found["knee"] < found["curve"][-1]["rate"]


def test_a_rate_above_capacity_is_missed_however_patient_the_promise() -> None:
    level = ServiceLevel(ttft_ms=1e9)
    found = search(one_server(level, 2000), level, 900.0, replicates=2)
    assert found["rate"] <= 1150  # of 1,600 requests three deviations are 120
    assert found["missed_rate"] > 950


def test_what_no_rate_meets_is_said_with_what_a_request_alone_takes() -> None:
    level = ServiceLevel(ttft_ms=0.001)
    found = search(one_server(level, 200), level, 1.0, replicates=1)
    assert found["rate"] is None
    assert "no rate meets it" in found["why"]
    assert "(p99; promised 0.0)" in found["why"]


def test_what_no_rate_misses_is_said() -> None:
    level = ServiceLevel(ttft_ms=1e6)
    found = search(one_server(level, 8), level, 1.0, replicates=1)
    assert found["missed_rate"] is None
    assert "for so few requests" in found["why"]


def test_numbers_that_cannot_be_are_refused() -> None:
    level = ServiceLevel(ttft_ms=1)
    with pytest.raises(InputError, match="nothing is promised: give one of ttft_ms, itl_ms"):
        search(one_server(level), ServiceLevel(), 1.0)
    with pytest.raises(InputError, match="precision = 1: must be"):
        search(one_server(level), level, 1.0, precision=1)
    with pytest.raises(ScenarioError, match=r"give a scenario with \[requests\]"):
        serving_capacity(load_scenario("synthetic"), level)
    with pytest.raises(ScenarioError, match="arrivals = 'closed': has no rate: choose one of poisson"):
        serving_capacity(load_scenario("synthetic", ["requests.arrivals=closed"]), level)


def test_the_knee_lies_farthest_below_the_line_between_the_ends() -> None:
    # From (0, 1) to (10, 11): at 8 a latency of 2 lies 7 below the line.
    assert knee([0, 4, 8, 9, 10], [1, 1.5, 2, 5, 11]) == 8
    assert knee([1, 2], [1, 2]) is None
    assert knee([1, 2, 3], [5, 5, 5]) is None
