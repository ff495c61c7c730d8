"""Advice: the search and its journal, goals and limits, when it says no, and the runtime's own command line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import prestage
from prestage.engine.timing.ready import COMPILING
from prestage.errors import InputError
from prestage.experiments.advice_goals import GOALS, Limits, Reading, parse_limits
from prestage.experiments.advice_result import best_trial, front
from prestage.experiments.advice_sampler import Axes, propose
from prestage.experiments.advice_search import AdviceError, Search, Trial
from prestage.experiments.advice_space import Request, Space, make_space, parse_over
from prestage.resources.runtime import load_runtime, runtime_names

pytest.importorskip("optuna")

SMALL = ["runtime.name=prestage", "model.preset=gpt-oss-20b", "model.layers=2", "machine.gpu=rtx3060"]
SMALL += ["machine.cpu=7950x", "memory.gpu_budget=25%", "prefetch.lookahead=0"]
OVER = {"memory.gpu_budget": ["25%", "50%", "75%"], "copy.discipline": ["fifo", "priority"]}


def small_space() -> Space:
    return make_space("synthetic", SMALL, over=OVER, request=Request(4, 4))


def by_budget(point: Mapping[str, Any]) -> dict[str, float]:
    """The more budget the better, and three quarters do not fit."""
    if point["memory.gpu_budget"] == "75%":
        raise InputError("does not fit")
    return {"tokens_per_second": float(point["memory.gpu_budget"][:-1]) + (point["copy.discipline"] == "priority")}


def seen(trials: list[Trial]) -> list[tuple[Any, ...]]:
    return [(trial.number, trial.places, dict(trial.figures), trial.refused) for trial in trials]


def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    space, whole = small_space(), tmp_path / "whole.log"
    unbroken = Search(space, ["tokens_per_second"], by_budget, journal=whole).run(6)
    killed, calls = tmp_path / "killed.log", [0]

    def dies(point: Mapping[str, Any]) -> dict[str, float]:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return by_budget(point)

    with pytest.raises(KeyboardInterrupt):
        Search(space, ["tokens_per_second"], dies, journal=killed).run(6)
    again: list[Any] = []

    def counted(point: Mapping[str, Any]) -> dict[str, float]:
        again.append(point)
        return by_budget(point)

    resumed = Search(space, ["tokens_per_second"], counted, journal=killed).run(6)
    assert seen(resumed) == seen(unbroken)
    assert len(again) == 3  # the one under way, and the two that were to come
    assert len({trial.places for trial in unbroken}) == 6 == len(space)  # all of the space, none twice
    best = best_trial(resumed, "tokens_per_second")
    assert best is not None and best.point == {"memory.gpu_budget": "50%", "copy.discipline": "priority"}
    assert sum(trial.refused == "does not fit" for trial in resumed) == 2
    with pytest.raises(AdviceError, match=r"killed\.log: holds another search"):
        Search(space, ["decode"], by_budget, journal=killed).run(2)


@pytest.mark.slow
def test_what_is_tried_follows_from_the_seed_the_number_and_what_was_tried() -> None:
    axes = Axes([8, 3, 2], [True, True, False])
    tried: list[Any] = []
    for number in range(16):
        places = propose(axes, tried, 7, number)
        assert places == propose(axes, list(tried), 7, number)
        tried.append((places, (float(-abs(places[0] - 5) + places[1]),) if places[2] else None))
    assert len({places for places, _ in tried}) == 16
    assert (5, 2, 1) in {places for places, _ in tried}
    assert propose(axes, [], 8, 0) != propose(axes, [], 7, 0)


def test_with_no_neighbor_of_the_best_left_each_policy_is_tried_with_other_settings_of_the_rest() -> None:
    axes = Axes([6, 3], [True, False])
    tried: list[Any] = [((0, 0), (1.0,)), ((1, 0), (0.5,)), ((0, 1), (0.9,)), ((0, 2), None)]
    tried += [((3, 2), (0.8,)), ((5, 2), (0.1,))]
    # Beside the best of each policy, (0, 0), (0, 1) and (3, 2), and at the ends of the order.
    beside = {(5, 0), (1, 1), (5, 1), (2, 2), (4, 2), (3, 0), (3, 1)}
    assert {propose(axes, tried, seed, 20) for seed in range(100)} == beside
    assert {propose(axes, tried[:3], seed, 20) for seed in range(20)} == {(0, 2)}  # a neighbor of the best comes first
    alone = Axes([6], [True])  # without a policy, the ends
    assert {propose(alone, [((1,), (1.0,)), ((0,), (0.5,)), ((2,), None)], seed, 20) for seed in range(20)} == {(5,)}


@pytest.mark.slow
def test_sixty_trials_come_near_the_best_of_thousands() -> None:
    axes = Axes([25, 6, 6, 2, 2], [True, True, True, False, False])

    def speed(places: tuple[int, ...]) -> float | None:
        layers, threads, chunk, pinned, offload = places
        if layers < 3:
            return None
        rate = min(18.0, 6.0 * 2**threads / 2)
        copied = 0.4 / (12 if pinned else 5)
        prompt = 32 / 2**chunk * (layers * (copied if offload else 0.05 * 2**chunk / rate) + (24 - layers) * 1e-3)
        return float(32 / (prompt + 32 * (layers * 0.05 / rate + 24 * 2e-4)))

    for seed in range(2):
        tried: list[Any] = []
        for number in range(60):
            places = propose(axes, tried, seed, number)
            value = speed(places)
            tried.append((places, None if value is None else (math.log(value),)))
        # By hand: fewest layers that fit, all threads, the largest chunk, copied from pinned memory or all on the CPU.
        best = max(speed((3, 5, 5, pinned, offload)) or 0 for pinned in (0, 1) for offload in (0, 1))
        assert max(goods[0] for _, goods in tried if goods) >= math.log(0.98 * best)


def test_a_request_takes_its_prompt_and_then_a_token_after_the_other() -> None:
    # 100 ms to the first token and 10 ms for each of four more: 5 tokens in 140 ms.
    figures = {"time_to_first_token_ms": 100.0, "tokens_per_second": 100.0}
    reading = Reading(figures, Request(prompt=8, output=5), price_per_hour=3.6, memory_bytes=2**31)
    assert GOALS["tokens_per_second"].figure(reading) == pytest.approx(5 / 0.140)
    assert GOALS["decode"].figure(reading) == 100 and GOALS["ttft"].figure(reading) == 100
    assert GOALS["cost"].figure(reading) == pytest.approx(1e-3 / (5 / 0.140) * 1e6)  # 3.6 an hour is 1e-3 a second
    assert GOALS["memory"].figure(reading) == 2
    assert GOALS["ttft"].gain(50, 100) == 2 == GOALS["decode"].gain(100, 50)


def test_the_front_holds_what_no_other_beats_in_both() -> None:
    points = [(10.0, 5.0), (9.0, 4.0), (8.0, 4.5), (10.0, 5.0), (2.0, 1.0)]
    trials = [
        Trial(number, (number,), {}, {"tokens_per_second": speed, "memory": held}, None)
        for number, (speed, held) in enumerate(points)
    ]
    trials.append(Trial(5, (5,), {}, {}, "does not fit"))
    assert [trial.number for trial in front(trials, ["tokens_per_second", "memory"])] == [0, 1, 4]


def test_a_gain_over_nothing_is_endless_and_nothing_over_nothing_is_none() -> None:
    # No request had what was promised, as it stands; at less is better, a figure of nothing is the best.
    assert GOALS["goodput"].gain(0.5, 0.0) == math.inf and GOALS["goodput"].gain(0.0, 0.0) == 1
    assert GOALS["ttft"].gain(0.0, 3.0) == math.inf and GOALS["ttft"].gain(2.0, 3.0) == 1.5


@pytest.mark.parametrize(("goal", "lacks"), [("ttft", "no request's first token"), ("decode", "no token of an answer")])
def test_a_goal_of_what_a_run_has_not_is_refused(goal: str, lacks: str) -> None:
    reading = Reading({"tokens_per_second": None, "time_to_first_token_ms": None}, None)
    with pytest.raises(InputError, match=lacks):
        GOALS[goal].figure(reading)


def test_limits_and_ranges_read_as_they_are_written() -> None:
    limits = parse_limits(["memory=20GiB", "ttft=500", "decode=20"])
    assert limits == Limits(f"{20 * 2**30}B", {"ttft": 500.0}, {"decode": 20.0})
    assert limits.broken({"ttft": 501.0, "decode": 30.0}) == "ttft = 501 ms, over 500"
    assert limits.broken({"ttft": 500.0, "decode": 19.0}) == "decode = 19 tokens/s, under 20"
    assert limits.broken({"ttft": 500.0, "decode": 20.0}) is None
    assert parse_over(["a.b=0..6:3", "c.d=5%..15%:5", "e.f=lru,4"]) == {
        "a.b": [0, 3, 6],
        "c.d": ["5%", "10%", "15%"],
        "e.f": ["lru", 4],
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"goal": "speed"}, "goal = 'speed'"),
        ({"within": ["ttft=soon"]}, "write a number of ms above 0: ttft=500"),
        ({"within": ["ttft=nan"]}, "write a number of ms above 0: ttft=500"),
        ({"within": ["decode=-1"]}, "write a number of tokens/s above 0: decode=500"),
        ({"within": ["size=3"]}, "size"),
        ({"over": ["memory.cpu_layers=0..999999999999"]}, "has 1,000,000,000,000 values: must be at most 10,000"),
        ({"goal": "cost", "price": 0.0}, "price = 0: must be what an hour costs, above 0"),
        ({"goal": "cost", "price": math.nan}, "price = nan: must be what an hour costs"),
        ({"over": ["memory.cpu_layers=9..3"]}, "write a range as first..last"),
        ({"over": ["memory.cpu_layer=1,2"]}, "cpu_layer"),
        ({"prompt": 0}, "must be at least 1 token"),
        ({"trials": 0}, "trials = 0"),
        ({"goal": "cost", "trials": 1}, "--price"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        prestage.advise("synthetic", settings=SMALL, **options)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.slow
def test_advice_is_what_the_simulator_says_and_the_runtimes_command_line() -> None:
    settings = ["runtime.name=llama.cpp", "model.preset=gpt-oss-20b", "machine.gpu=rtx3060", "machine.cpu=7950x"]
    settings += ["miss.cpu_threads=1"]
    found = prestage.advise(
        "synthetic", settings=settings, over={"miss.cpu_threads": [1, 8]}, prompt=4, output=4, trials=2
    )
    assert found.verdict == "recommend" and found.settings == {"miss.cpu_threads": 8}
    # As many layers on the CPU as do not fit: the scenario as it stands has that already, as --fit does.
    layers = found.space.base().memory.cpu_layers
    assert found.command == "llama-server -m MODEL.gguf -ngl 99 -t 8" and layers is not None and 0 < layers < 24
    assert found.base is not None and found.gain is not None
    assert found.gain.p5 > 1.5 and found.data["gain"]["p50"] == found.gain.p50
    assert found.binds["GPU"] > found.binds["CPU"] > 0.2 and found.upgrades["a GPU twice as fast"] > 1.2
    assert sum(found.binds.values()) == pytest.approx(1)


def test_settings_equal_within_the_scatter_of_runs_are_not_recommended() -> None:
    found = prestage.advise("synthetic", settings=SMALL, over={"seed": [0]} | {"copy.discipline": ["fifo", "priority"]},
                            prompt=4, output=4, trials=2)  # fmt: skip
    assert found.verdict == "keep" and found.settings == {} and "scatter by 1%" in found.why


def test_the_engine_is_compiled_before_the_first_trial() -> None:
    told: list[str] = []
    with patch("prestage.engine.timing.ready.is_ready", return_value=False):
        prestage.advise(
            "synthetic", settings=SMALL, over=OVER, prompt=2, output=2, trials=1,
            progress=lambda what, done, total: told.append(what),
        )  # fmt: skip
    assert told[:2] == [COMPILING, COMPILING] and "trials" in told[2:]


def test_a_gain_that_hangs_on_a_guess_names_the_measurement_that_would_settle_it() -> None:
    # On the CPU or fetched: which is better depends on the share of its memory's bandwidth that the CPU's kernels
    # reach, which is assumed.
    over = {"miss.policy": ["fetch", "cpu"]}
    settings = [*SMALL, "miss.cpu_gb_per_s=200"]
    found = prestage.advise("synthetic", settings=settings, over=over, prompt=1, output=16, trials=2)
    assert found.verdict == "measure"
    assert found.deciding[0].cost == "runtime.costs.cpu_stream" and found.deciding[0].source == "assumed"
    assert found.deciding[0].least < 1 < found.deciding[0].most
    assert "prestage calibrate observe" in found.why


@pytest.mark.parametrize("name", [name for name in runtime_names() if load_runtime(name).advice.settings])
def test_what_a_runtimes_file_lists_makes_scenarios(name: str) -> None:
    settings = [f"runtime.name={name}", "model.preset=gpt-oss-20b", "machine.gpu=rtx4090", "machine.cpu=7950x"]
    space = make_space("synthetic", settings)
    assert len(space) > 100
    for key, values in space.grid.values.items():
        tunable = space.runtime.advice.settings[key]
        for value in values:
            space.scenario({key: value})
            assert isinstance(tunable.words(value, 32), str)


def test_what_host_memory_keeps_is_searched_only_where_it_does_not_keep_all() -> None:
    of_host = {"tiers.host_policy", "tiers.inclusion"}
    assert of_host <= set(make_space("nvme").keys)
    assert not of_host & set(make_space("synthetic", SMALL).keys)


def test_a_runtime_that_lists_nothing_wants_the_space_to_be_given() -> None:
    with pytest.raises(InputError, match=r"runtime\.name = 'vllm'.*give --over"):
        make_space("synthetic", ["runtime.name=vllm"])
