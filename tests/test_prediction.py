"""Ranges: what of a run's costs is drawn, from how far, and what is said of figures that rest on them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny import tiny_inputs, tiny_model, tiny_profile, tiny_scenario, tiny_trace

from prestage.engine.costs.cpu_streams import MIDDLE
from prestage.engine.costs.ranges import UNSTATED, drawn_costs, spread_of, structure, unsure_costs
from prestage.engine.prediction import DRAWS, Range, ranges, unsure
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.simulate import simulate
from prestage.resources.profile import make_profile
from prestage.resources.runtime import OwnShare, Runtime


def inputs_of(spread: float = 0.0, source: str = "measured", **runtime: Any) -> Inputs:
    """Two tokens of one layer, the machine's copies off by `spread`."""
    data = tiny_profile().model_dump()
    off = {"run_spread": spread, "scatter": 0.0, "held_back_error": 0.0}

    def said(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [said(each) for each in value]
        if not isinstance(value, dict):
            return value
        kept = {key: said(each) for key, each in value.items()}
        return {**kept, "source": source, "uncertainty": off} if "uncertainty" in value else kept

    trace = tiny_trace([[[0]], [[1]]])
    made = tiny_inputs(tiny_model(1, head_ns=5), make_profile(said(data), "spread"), trace, tiny_scenario())
    own = Runtime.model_validate({"name": "own", **runtime})
    return Inputs(**{**{name: getattr(made, name) for name in made.__dataclass_fields__}, "runtime": own})


def test_draws_of_a_cost_have_its_spread_and_middle() -> None:
    copies = np.array([costs.copies[0].alone_ns for (costs,) in drawn_costs(inputs_of(0.3), 200)], dtype=float)
    logs = np.log(copies / 20)
    # The copy is 20 ns, so that rounding to whole ns is worth 2.5 %.
    assert np.median(logs) == pytest.approx(0.0, abs=0.03) and np.std(logs) == pytest.approx(0.3, rel=0.1)


def test_every_draw_of_a_cost_is_of_another_part_of_its_distribution() -> None:
    factors = np.sort(structure(1, 20, 0.5))
    normal = np.log(factors) / 0.5
    # The middle of every twentieth: the lowest is at 2.5 %, 1.96 standard deviations down.
    assert normal[0] == pytest.approx(-1.96, abs=0.01) and normal[-1] == pytest.approx(1.96, abs=0.01)
    assert structure(1, 20, 0.5) == structure(1, 20, 0.5) != structure(2, 20, 0.5)


def test_a_runtimes_costs_are_drawn_too_and_a_share_is_never_more_than_all() -> None:
    costs = {"cpu_stream": {"share": 0.9, "source": "assumed"}, "copy_rate": {"share": 0.5, "source": "assumed"}}
    drawn = [one.own.costs for (one,) in drawn_costs(inputs_of(costs=costs), 50)]
    shares = [cost.cpu_stream.share for cost in drawn if cost.cpu_stream is not None]
    rates = [cost.copy_rate.share for cost in drawn if cost.copy_rate is not None]
    assert max(shares) == 1.0 and len(set(rates)) > 30
    assert float(np.std(np.log(rates))) == pytest.approx(0.5, rel=0.3)


def test_a_bandwidth_that_is_taken_as_stream_is_off_by_the_share_that_is_reached_and_nothing_else_is() -> None:
    def shares(gb_per_s: float | None, **runtime: Any) -> list[tuple[str, float | None]]:
        made = inputs_of(**runtime)
        miss = {} if gb_per_s is None else {"cpu_gb_per_s": gb_per_s}
        found = unsure_costs(replace(made, scenario=tiny_scenario(miss=miss)))
        return [(path, cost.share) for path, cost in found.items() if isinstance(cost, OwnShare)]

    own: dict[str, Any] = {"costs": {"cpu_stream": {"share": 0.9, "source": "assumed"}}}
    rates = [{"dtype": "int8", "expert_bytes": 20, "threads": 8, "share": 0.7, "source": "measured", "note": "by hand"}]
    (of_bandwidth,) = shares(50.0)
    assert of_bandwidth == ("runtime.costs.cpu_stream/", MIDDLE)
    assert shares(None) == []
    assert shares(50.0, **own) == [("runtime.costs.cpu_stream/", 0.9)]
    costs = unsure_costs(inputs_of(0.3, **own))
    assert "profile.h2d.pinned.alone/" in costs, list(costs)
    assert spread_of(costs["profile.h2d.pinned.alone/"]) == pytest.approx(0.3)
    assert "runtime.costs.cpu_stream/" not in dict(shares(50.0, cpu_rates=rates))


def test_a_cost_that_says_nothing_is_as_far_off_as_its_source_usually_is() -> None:
    data = tiny_profile().model_dump()
    data["h2d"]["pinned"]["alone"].update(source="assumed", uncertainty=None)
    made = inputs_of()
    inputs = Inputs(
        **{**{n: getattr(made, n) for n in made.__dataclass_fields__}, "profile": make_profile(data, "assumed")}
    )
    logs = np.log([costs.copies[0].alone_ns / 20 for (costs,) in drawn_costs(inputs, 100)])
    assert float(np.std(logs)) == pytest.approx(UNSTATED["assumed"], rel=0.15)


def test_a_run_of_measured_costs_is_a_figure_and_any_other_a_range() -> None:
    known = simulate(load_scenario("guide", ["workload.tokens=4"]), baselines=False, engine="simpy")
    assert known.unsure == [] and known.range is None and known.json_data()["range"] is None
    settings = ["workload.tokens=4", "runtime.name=transformers"]
    guessed = simulate(load_scenario("guide", settings), baselines=False, engine="simpy")
    assert any("transformers: layer (assumed)" in cost for cost in guessed.unsure)
    band = guessed.range["tokens_per_second"] if guessed.range else Range(0, 0, 0)
    assert band.p5 < guessed.data["tokens_per_second"] < band.p95
    assert guessed.json_data()["range"]["tokens_per_second"]["p5"] == band.p5


def test_drawing_a_range_says_how_far_it_is_once() -> None:
    settings = ["workload.tokens=4", "runtime.name=transformers"]
    guessed = simulate(load_scenario("guide", settings), baselines=False, engine="simpy")
    told: list[tuple[str, int, int]] = []
    for _ in range(2):
        guessed.draw_range(lambda *step: told.append(step))
    assert told == [("range", done, DRAWS) for done in range(DRAWS + 1)] and guessed.range
    measured = simulate(load_scenario("guide", ["workload.tokens=4"]), baselines=False, engine="simpy")
    measured.draw_range(lambda *step: told.append(step))
    assert len(told) == DRAWS + 1 and measured.range is None


def test_a_wider_spread_gives_a_wider_range() -> None:
    widths = []
    for spread in (0.1, 0.4):
        inputs = inputs_of(spread, "assumed")
        from prestage.engine.measure.speed import Serving

        band = ranges(inputs, Serving(), {"makespan_ms": 1.0})["makespan_ms"]
        widths.append(math.log(band.p95 / band.p5))
    assert widths[0] < widths[1]
    assert unsure(inputs_of(0.1, "assumed"), {})


@pytest.mark.parametrize(
    ("band", "value", "known"),
    [(Range(28, 37, 49), 37.4216, 37.0), (Range(299, 300, 301), 300.12, 300.1), (Range(1, 1, 1), 1.23456789, 1.23457)],
)
def test_a_figure_has_as_many_digits_as_are_known(band: Range, value: float, known: float) -> None:
    assert band.rounded(value) == known


def test_prompts_are_less_sure_than_decoding_in_software_whose_prompts_were_not_measured() -> None:
    settings = ["workload.prefill=whole", "workload.synthetic.prefill_tokens=4", "runtime.name=transformers"]
    found = simulate(load_scenario("synthetic", settings), baselines=False).range
    assert found is not None
    wide, narrow = found["time_to_first_token_ms"], found["tokens_per_second"]
    assert wide.p95 / wide.p5 > 1.3 * narrow.p95 / narrow.p5
