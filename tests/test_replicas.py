"""Replicas behind a router: who serves whom, worked by hand, and each replica as if it were alone with its requests."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from prestage.engine.policies.router import ROUTERS, LeastOutstanding, PrefixAware, RoundRobin, Router
from prestage.engine.policies.scheduler import SCHEDULERS
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.scenario import make_scenario
from prestage.engine.simulate import Result, simulate
from prestage.errors import InputError
from prestage.output.saved import load_result, run_of, save_run
from prestage.testing import serve, tiny_requests, tiny_server
from prestage.workloads.requests.log import joined
from prestage.workloads.requests.replicas import Routed, Turns
from prestage.workloads.requests.request import Request
from prestage.workloads.requests.server import Server


def served(requests: list[Request], router: Router, steps_ns: list[int], scheduler: str = "chunked") -> list[Server]:
    """Serve requests on a replica for each of `steps_ns`, what its steps take."""
    turns = Turns(len(steps_ns))
    servers = [tiny_server(share, SCHEDULERS[scheduler]) for share in Routed(requests, router, turns).shares]
    turns.run([partial(serve, server, step_ns) for server, step_ns in zip(servers, steps_ns, strict=True)])
    return servers


def who(servers: list[Server]) -> list[list[int]]:
    return [server.log.requests["number"].tolist() for server in servers]


def test_round_robin_goes_around_whatever_is_left_to_do() -> None:
    requests = tiny_requests(*((10 * number, 1, 1) for number in range(7)))
    assert who(served(requests, RoundRobin(3), [500, 10, 10])) == [[0, 3, 6], [1, 4], [2, 5]]


def test_the_least_outstanding_is_the_replica_that_has_ended_the_most() -> None:
    """The first replica's steps take 50 ns, the second's 10, and every request one step of one token.

    0 goes to the first. At 5 that still has it, and 1 goes to the second, which ends it at 15: an end at an
    arrival's very instant counts, so 2 and 3, at 15 and 26, go there, too. 4 comes at 30, when the second has 3 until
    36 and the first has 0 until 50: of equals the first. 5, at 40, finds the second idle, and 6 at 100 both: the first.
    """
    requests = tiny_requests(*((at, 1, 1) for at in (0, 5, 15, 26, 30, 40, 100)))
    first, second = who(served(requests, LeastOutstanding(2), [50, 10]))
    assert (first, second) == ([0, 4, 6], [1, 2, 3, 5])


def test_prefixes_go_where_they_were_seen_until_that_replica_has_too_much_to_do() -> None:
    def ask(number: int, *hashes: int) -> Request:
        return Request(number, 0, 512 * max(1, len(hashes)), 1, hashes)

    router = PrefixAware(2)
    idle = (0, 0)
    assert router.choose(ask(0, 1, 2, 3), idle) == 0  # nobody has seen anything: of equals, the first
    assert router.choose(ask(1, 7, 8), idle) == 1  # not seen: whoever was given the fewest blocks
    assert router.choose(ask(2, 1, 2, 9), idle) == 0  # two of three were seen there
    assert router.choose(ask(3, 7, 20, 21, 22), idle) == 1  # a quarter was seen, less than 0.3: who has fewer, 2 of 4
    assert router.choose(ask(4, 2, 3), idle) == 0  # the same blocks elsewhere are no beginning: fewer blocks, 4 of 5
    assert router.choose(ask(5, 1, 2, 3), (64, 0)) == 0  # 64 more are not yet too many
    assert router.choose(ask(6, 1, 2, 3), (65, 0)) == 1  # 65 are
    assert router.choose(ask(7, 1, 2, 3), (200, 135)) == 0  # but not if they are less than half as many again
    assert router.choose(ask(8), (3, 2)) == 1  # no hashes: who has the fewest requests


@pytest.mark.parametrize("name", ROUTERS)
def test_a_replica_serves_as_if_it_were_alone_with_its_requests(name: str) -> None:
    random = np.random.default_rng(5)
    arrivals = np.cumsum(random.integers(1, 40, 60)).tolist()
    shapes = zip(arrivals, random.integers(1, 9, 60).tolist(), random.integers(1, 9, 60).tolist(), strict=True)
    requests = tiny_requests(*shapes)
    steps_ns = [7, 11, 13]
    servers = served(requests, ROUTERS[name](3), steps_ns)
    assert sorted(number for numbers in who(servers) for number in numbers) == list(range(60))
    assert all(who(servers))
    for server, numbers, step_ns in zip(servers, who(servers), steps_ns, strict=True):
        alone = tiny_server([requests[number] for number in numbers], SCHEDULERS["chunked"])
        serve(alone, step_ns)
        for column, values in alone.log.requests.items():
            assert values.tolist() == server.log.requests[column].tolist()
    log, order = joined([server.log for server in servers])
    assert (np.diff(log.steps["end_ns"]) >= 0).all() and sorted(order.tolist()) == list(range(len(order)))
    step, _ = log.token_places()
    assert log.steps["end_ns"][step].tolist() == log.token_times()[1].tolist()


def test_what_goes_wrong_on_one_replica_ends_all() -> None:
    class Lost(Router):
        def choose(self, request: Request, outstanding: Any) -> int:
            return 2 if request.number == 3 else request.number % 2

    requests = tiny_requests(*((10 * number, 1, 4) for number in range(6)))
    with pytest.raises(InputError, match="the router gave request 3 to replica 2: must be 0 to 1"):
        served(requests, Lost(2), [10, 10])


def ran(engine: str, sections: Mapping[str, Any] | None = None, **requests: Any) -> Result:
    asked = {"rate": 400.0, "count": 10, "prompt_tokens": 12, "output_tokens": 4, "slo": {"ttft_ms": 500.0}}
    data: dict[str, Any] = {
        "model": {"preset": "gpt-oss-20b", "layers": 2},
        "machine": {"profile": "h200-pcie5"},
        "workload": {"synthetic": {"tokens": 64, "sequences": 4, "prefill_tokens": 8}},
        "memory": {"gpu_budget": "25%"},
        "prefetch": {"lookahead": 1},
        "requests": asked | requests,
    }
    return simulate(make_scenario(data | dict(sections or {})), baselines=False, engine=engine)


def test_replicas_say_what_became_of_their_experts() -> None:
    """Of all replicas, also where some have no requests."""
    for count in (2, 12):
        found = ran("simpy", {"compression": {"mixed": [[0.5, 1], [0.5, 0.5]]}}, replicas=count).data["precision_mass"]
        assert sum(found.values()) == pytest.approx(1.0)
        found = ran("simpy", {"miss": {"policy": "skip", "threshold": 1.0}}, replicas=count).data
        assert found["miss"]["ways"]["skipped"] == found["counts"]["miss"] > 0
        assert 0 < found["miss"]["gate_mass"]["skipped"] <= 1


def test_replicas_run_the_same_by_either_engine_and_are_measured_together(tmp_path: Path) -> None:
    one, other = (ran(engine, replicas=2, router="least-outstanding") for engine in ("simpy", "compiled"))
    assert one.data == other.data
    assert one.timeline.spans().tolist() == other.timeline.spans().tolist()
    found, alone = other.data["requests"], ran("compiled").data
    assert [each["requests"] for each in found["replicas"]] == [5, 5]
    assert found["requests"] == 10 and found["steps"] == sum(each["steps"] for each in found["replicas"])
    assert found["little"]["in_system"] == pytest.approx(found["little"]["rate_times_latency"])
    assert found["ttft_ms"]["mean"] < alone["requests"]["ttft_ms"]["mean"]
    assert other.data["budget_bytes"] == alone["budget_bytes"]  # of each
    assert other.data["layer_visits"] == 2 * found["steps"]
    assert other.data["inter_token_latency_ms"]["mean"] == pytest.approx(
        np.concatenate([np.diff(log_times(other, number)) for number in range(10)]).mean() / 1e6
    )
    save_run(run_of(other), tmp_path / "run.safetensors")
    (tmp_path / "result.json").write_bytes(orjson.dumps(other.json_data()))
    assert load_result(tmp_path).gpu_names == ["gpu0", "gpu1"]


def log_times(result: Result, number: int) -> Any:
    log = result.serving.log
    assert log is not None
    request, token_ns = log.token_times()
    return token_ns[request == number]


def test_two_machines_draw_and_cost_twice_what_one_does() -> None:
    """Two machines that stand idle for nearly all of the run cost twice as much a run as one does."""
    sparse: dict[str, Any] = {"rate": 0.5, "count": 4, "cost": {"watts": 400.0, "price_per_hour": 3.0}}
    one, two = (ran("compiled", **sparse, replicas=count).data["requests"]["cost"] for count in (1, 2))
    assert two["price"] == pytest.approx(2 * one["price"], rel=0.01)
    assert two["energy_kwh"] == pytest.approx(2 * one["energy_kwh"], rel=0.01)


def test_users_who_wait_have_one_machine() -> None:
    with pytest.raises(ScenarioError, match=r"requests: replicas = 2: with arrivals = 'closed'.* must be 1"):
        ran("compiled", replicas=2, arrivals="closed")
