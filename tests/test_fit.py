"""The fitted generator, and the fit: against the real traces, and against traces that it drew itself."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prestage import cli
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.scenario import load_scenario, make_scenario
from prestage.engine.simulate import simulate
from prestage.workloads.fit import compare, draw_like, fit_routing
from prestage.workloads.fitted import ECHO_TOKENS, FitError, FittedRouting, LayerFit, class_ends
from prestage.workloads.statistics import lru_depths, reuse
from prestage.workloads.trace import RoutingTrace


def fitted(
    layers: int = 2, experts: int = 16, k: int = 2, *, echo: float = 0.0, recency: float = 0.0, **parts: float
) -> FittedRouting:
    bonus = (recency,) + (0.0,) * (len(class_ends(experts, k)) - 1)
    layer = LayerFit(**{"common": 0.0, "popularity": 0.0, "drift": 0.0, **parts}, recency=bonus)
    return FittedRouting("m", experts, k, (echo,) + (0.0,) * (ECHO_TOKENS - 1), (layer,) * layers)


def test_without_popularity_drift_and_bonuses_a_token_says_nothing_of_the_next() -> None:
    trace = fitted().synthesize(20_000, seed=1)
    # Two of 16 share 1/8 by chance. What answers strongly to the hidden state is chosen a little more often, but
    # at all distances alike.
    near, far = reuse(trace, 1), reuse(trace, 500)
    np.testing.assert_allclose(near, far, atol=0.01)
    np.testing.assert_allclose(near, 1 / 8, atol=0.03)


def test_popularity_of_a_sequence_stays_within_it_and_common_popularity_does_not() -> None:
    def across(generator: FittedRouting) -> float:
        experts = generator.synthesize(4000, sequences=40).experts.reshape(40, 100, 2, 2)
        return float((experts[1:, :, :, :, None] == experts[:-1, :, :, None, :]).any(axis=-1).mean())

    own, everybody = fitted(popularity=0.6), fitted(common=0.6)
    assert reuse(own.synthesize(4000, sequences=40), 9).mean() > 0.3
    assert across(own) == pytest.approx(1 / 8, abs=0.03)
    assert across(everybody) > 0.3


def test_drift_is_forgotten_and_popularity_is_not() -> None:
    for generator, is_kept in ((fitted(8, drift=0.7), False), (fitted(8, popularity=0.7), True)):
        trace = generator.synthesize(6000)
        near, far = reuse(trace, 1).mean(), reuse(trace, 300).mean()
        assert near > 0.3
        assert (far > near - 0.05) == is_kept
        assert (far < 1 / 8 + 0.05) != is_kept


def test_a_bonus_for_recency_raises_reuse_of_the_last_token_and_an_echo_that_of_its_distance() -> None:
    plain, recent = (reuse(fitted(recency=bonus).synthesize(5000), 1).mean() for bonus in (0.0, 1.0))
    assert recent > plain + 0.1
    third = replace(fitted(), echo=(0.0, 0.0, 1.0) + (0.0,) * (ECHO_TOKENS - 3))
    by_lag = [reuse(third.synthesize(5000), lag).mean() for lag in (2, 3, 4)]
    assert by_lag[1] > max(by_lag[0], by_lag[2]) + 0.1


def test_places_in_the_stack_are_those_of_the_lru_statistics() -> None:
    # A bonus that rules all: only the experts at places k.. of the first class after it, never the last token's.
    generator = fitted(experts=8)
    ends = class_ends(8, 2)
    second = replace(generator.layers[0], recency=(-1e3, 1e3) + (0.0,) * (len(ends) - 2))
    depths = lru_depths(replace(generator, layers=(second,)).synthesize(500), "per-layer")
    # The class has one place, and the other expert comes from farther down.
    assert ends[:2].tolist() == [2, 3]
    assert (np.sort(depths[100:].reshape(-1, 2), axis=1)[:, 0] == 2).all()


def test_luck_is_keyed_on_the_sequence_not_on_how_much_is_asked_for() -> None:
    generator = fitted(48, 128, 4, popularity=0.3, drift=0.2, recency=0.3, echo=0.2)
    # 48 layers of 128 experts: several chunks of random numbers.
    short, long = generator.synthesize(150, seed=3), generator.synthesize(400, seed=3)
    np.testing.assert_array_equal(long.experts[:150], short.experts)
    two = generator.synthesize(300, sequences=2, prefill_tokens=5, seed=3)
    np.testing.assert_array_equal(two.slice(sequences=[0]).experts, short.experts)
    assert (two.slice(sequences=[1]).experts != short.experts).any()
    assert (two.phase == 0).sum() == 10
    assert (generator.synthesize(150, seed=4).experts != short.experts).any()


@pytest.fixture(scope="module")
def olmoe(traces: Path) -> tuple[RoutingTrace, FittedRouting]:
    trace = RoutingTrace.load(traces / "olmoe-1b-7b.npz")
    return trace, fit_routing(trace)


@pytest.mark.slow
def test_olmoe_is_reproduced_within_3_points(olmoe: tuple[RoutingTrace, FittedRouting]) -> None:
    trace, generator = olmoe
    # The trace is one sequence of 299 tokens, and one such draw alone strays by more: the mean of 21 is compared.
    found = compare(trace, draw_like(generator, trace, seed=0))
    for name in ("reuse", "lru_hit_rate_global", "lru_hit_rate_per-layer"):
        assert found[name]["max_difference"] < 0.03, name


@pytest.mark.slow
def test_gpt_oss_is_reproduced_within_3_points_by_each_draw(traces: Path) -> None:
    trace = RoutingTrace.load(traces / "gpt-oss-20b.npz")
    generator = fit_routing(trace)
    # The first 30 of 122 sequences, drawn once.
    part = trace.slice(sequences=range(int(trace.sequence.min()), int(trace.sequence.min()) + 30))
    found = compare(trace, draw_like(generator, part, seed=0))
    for name in ("reuse", "lru_hit_rate_global", "lru_hit_rate_per-layer"):
        assert found[name]["max_difference_of_a_draw"] < 0.03, name


@pytest.mark.slow
def test_a_fit_to_what_a_generator_drew_draws_the_like() -> None:
    # The parameters themselves are not found again: a bonus for recency and popularity do much the same.
    trace = fitted(6, 16, 2, common=0.2, popularity=0.2, drift=0.1, recency=0.4).synthesize(6000, sequences=20, seed=5)
    found = compare(trace, draw_like(fit_routing(trace), trace, seed=0))
    assert max(curve["max_difference"] for curve in found.values()) < 0.03


def test_tokens_that_were_not_routed_at_a_layer_do_not_count() -> None:
    trace = fitted(2, 8, 1, popularity=0.5).synthesize(1000, sequences=4)
    present = np.ones((1000, 2), dtype=np.bool_)
    present[::2, 1] = False
    holey = replace(trace, present=present)
    found = fit_routing(holey)
    assert len(found.layers) == 2
    assert all(np.isfinite(each.recency).all() for each in found.layers)


def test_sequences_too_short_to_fit_are_refused() -> None:
    with pytest.raises(FitError, match="longest sequence has 16 tokens: a fit needs one of 17"):
        fit_routing(fitted().synthesize(64, sequences=4))


def test_parameters_survive_saving(tmp_path: Path) -> None:
    generator = fitted(popularity=0.25, recency=0.5, echo=0.125)
    generator.save(tmp_path / "fit.json")
    assert FittedRouting.load(tmp_path / "fit.json") == generator
    assert [path.name for path in tmp_path.iterdir()] == ["fit.json"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another format": ({"format": "x"}, "format: must be 'prestage fitted routing 1'"),
    "no experts": ({"num_experts": 0}, "num_experts = 0: must be an integer"),
    "k beyond": ({"top_k": 17}, r"top_k = 17: must be an integer, 1\.\.16"),
    "no layers": ({"layers": []}, "layers: must be at least one"),
    "a number as layers": ({"layers": 3}, "fit.json: "),
    "an unknown key": ({"colour": 1}, "colour"),
    "echo too short": ({"echo": [1.0]}, "echo: must be 16 numbers"),
    "echo of text": ({"echo": ["a"] * 16}, "echo: must be 16 numbers"),
    "more than all": (
        {"layers": [{"common": 0.5, "popularity": 0.5, "drift": 0.5, "recency": [0]}]},
        "layer 0: parts .*: must be at least 0, and at most 1 together",
    ),
    "recency too short": (
        {"layers": [{"common": 0, "popularity": 0, "drift": 0, "recency": [0]}]},
        r"layer 0: recency: must be \d+ numbers",
    ),
    "a part left out": ({"layers": [{"common": 0, "recency": []}]}, "popularity"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    changes, message = BAD[name]
    path = tmp_path / "fit.json"
    fitted().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(FitError, match=message) as caught:
        FittedRouting.load(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_json_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fit.json").write_bytes(b"\xff\xfe")
    with pytest.raises(FitError, match="not JSON"):
        FittedRouting.load(tmp_path / "fit.json")
    with pytest.raises(FitError, match="cannot be read: No such file"):
        FittedRouting.load(tmp_path / "none.json")


def small_scenario(synthetic: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {"preset": "mixtral-8x7b", "layers": 2, "experts": 16},
        "workload": {"synthetic": synthetic},
        "predictor": {"name": "oracle"},
    }


def test_a_scenario_draws_from_a_fit_beside_it(tmp_path: Path) -> None:
    generator = fitted(popularity=0.25)
    generator.save(tmp_path / "fit.json")
    (tmp_path / "s.toml").write_text(
        '[model]\nlayers = 2\nexperts = 16\n[workload.synthetic]\nfit = "fit.json"\ntokens = 30\n', encoding="utf-8"
    )
    result = simulate(load_scenario(tmp_path / "s.toml"), baselines=False)
    drawn = generator.synthesize(30, seed=0)
    drawn.save(tmp_path / "t.npz")
    data = small_scenario({"tokens": 1})
    data["workload"] = {"trace": str(tmp_path / "t.npz")}
    same = simulate(make_scenario(data), baselines=False)
    assert result.data["makespan_ms"] == same.data["makespan_ms"]


def test_a_fit_and_what_it_replaces_are_not_given_together() -> None:
    with pytest.raises(ScenarioError, match=r"workload\.synthetic: reuse: no meaning with fit"):
        make_scenario(small_scenario({"fit": "x.json", "skew": 0.5, "reuse": 0.5}))


def test_a_setting_puts_a_fit_in_the_place_of_the_default_scenarios_parameters() -> None:
    synthetic = load_scenario("synthetic", ["workload.synthetic.fit=x.json"]).workload.synthetic
    assert synthetic is not None
    assert synthetic.fit == "x.json"
    assert "skew" not in synthetic.model_fields_set


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["prestage", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_the_commands_fit_compare_and_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = fitted(2, 8, 1, popularity=0.4).synthesize(400, sequences=2)
    trace.save(tmp_path / "t.npz")
    assert run(monkeypatch, "trace", "fit", tmp_path / "t.npz", "-o", tmp_path / "fit.json", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["draws"] == 15  # of 400 tokens, for at least 6,000
    assert data["difference"]["reuse"]["trace"]["1"] == pytest.approx(reuse(trace).mean())
    out = tmp_path / "drawn.safetensors"
    assert run(monkeypatch, "trace", "synth", "--fit", tmp_path / "fit.json", "--tokens", 50, "-o", out) == 0
    drawn = RoutingTrace.load(out)
    np.testing.assert_array_equal(drawn.experts, FittedRouting.load(tmp_path / "fit.json").synthesize(50).experts)
    short = fitted().synthesize(8)
    short.save(tmp_path / "short.npz")
    capsys.readouterr()
    assert run(monkeypatch, "trace", "fit", tmp_path / "short.npz") == 2
    assert capsys.readouterr().err == "prestage: the trace's longest sequence has 8 tokens: a fit needs one of 17\n"
