"""The inference simulator: by hand, against the engines that it is a face of, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.patches import Rectangle

import prestage
from prestage import InferenceConfig, InferenceSimulator, RoutingTrace, synthesize
from prestage.engine.load import load_inputs
from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.simulate import simulate
from prestage.guide.inference import hit_split, in_guides_accounting
from prestage.workloads.batches import DECODE, PREFILL
from prestage.workloads.predictors import PREDICTORS

MISS, HIT, QUEUED = 3.41, 0.07, 4.146667
#: Predictors that need neither weights nor a trace with predictions.
SELF_MADE = [name for name in PREDICTORS if name not in ("recorded", "learned")]


def tiny(experts: list[list[int]], slots: int, **options: Any) -> InferenceConfig:
    """The guide's experts, four a layer; `experts` are [token][layer]."""
    trace = RoutingTrace(np.array(experts, dtype=np.uint8)[..., None], 4)
    return InferenceConfig(
        num_simulation_tokens=trace.tokens,
        num_layers=trace.layers,
        num_experts=4,
        gpu_memory_limit_mb=27.0 * slots,
        trace=trace,
        **{"prefetch_k": 0, **options},
    )


# By hand


def test_without_prefetch_the_guides_formula_prices_misses_and_hits() -> None:
    # Room for two: 0 and 1 miss, 0 hits, 2 takes the room of 1.
    metrics = InferenceSimulator(tiny([[0], [1], [0], [2]], slots=2)).run_simulation()
    assert metrics["event_counts"] == {"prefetch": 0, "hit": 0, "cache_hit": 1, "miss": 3, "evict": 1}
    assert metrics["baseline_latency_ms"] == pytest.approx(4 * MISS)
    assert metrics["total_latency_ms"] == pytest.approx(3 * MISS + HIT)
    assert metrics["speedup"] == pytest.approx(4 * MISS / (3 * MISS + HIT))
    assert metrics["copies_charged"]["speedup"] == pytest.approx(metrics["speedup"])
    assert metrics["overlapped"]["counts"]["miss"] == 3
    assert (
        metrics["overlapped"]["speedup"] == metrics["overlapped"]["baseline_ms"] / metrics["overlapped"]["makespan_ms"]
    )


def test_a_perfect_oracle_hides_every_copy_but_the_first_or_is_charged_for_it() -> None:
    metrics = InferenceSimulator(
        tiny([[0], [1], [2], [3]], slots=2, prefetch_k=1, prediction_accuracy=1.0)
    ).run_simulation()
    assert metrics["event_counts"] == {"prefetch": 3, "hit": 3, "cache_hit": 0, "miss": 1, "evict": 2}
    assert metrics["prediction_accuracy"] == 3 / 4  # nobody guesses the first access
    assert metrics["total_latency_ms"] == pytest.approx(MISS + 3 * HIT)
    assert metrics["copies_charged"]["total_latency_ms"] == pytest.approx(4 * MISS + 3 * HIT)


def test_without_caching_nothing_outlives_its_visit_in_both_engines() -> None:
    # 0 again and again: every access misses, and the wrong guesses made for it leave with it.
    options: dict[str, Any] = {"prefetch_k": 1, "prediction_accuracy": 0.0, "enable_caching": False}
    metrics = InferenceSimulator(tiny([[0]] * 4, slots=4, **options)).run_simulation()
    overlapped = metrics["overlapped"]
    assert metrics["event_counts"] == {"prefetch": 3, "hit": 0, "cache_hit": 0, "miss": 4, "evict": 7}
    assert {key: overlapped["counts"][key] for key in ("miss", "prefetch", "evict")} == {
        "miss": 4,
        "prefetch": 3,
        "evict": 7,
    }
    assert InferenceSimulator(tiny([[0]] * 4, slots=4)).run_simulation()["event_counts"]["cache_hit"] == 3


def test_each_tokens_latency_is_that_of_its_accesses() -> None:
    simulator = InferenceSimulator(tiny([[0, 1], [0, 2]], slots=4))
    metrics = simulator.run_simulation()
    latencies = simulator.token_latencies_ms()
    assert latencies["prefetches hidden"].tolist() == pytest.approx([2 * MISS, HIT + MISS])
    assert latencies["every copy charged"].sum() == pytest.approx(metrics["copies_charged"]["total_latency_ms"])
    assert latencies["overlapped"].sum() == pytest.approx(metrics["overlapped"]["makespan_ms"])


def test_only_decode_tokens_run_the_first_ones() -> None:
    trace = replace(synthesize(6, 2, 4, 1, sequences=2), phase=np.array([PREFILL, DECODE, DECODE] * 2, dtype=np.uint8))
    config = replace(tiny([[0, 1]], slots=4), trace=trace, num_simulation_tokens=3)
    metrics = InferenceSimulator(config).run_simulation()
    used = {(layer, int(trace.experts[row, layer, 0])) for row in (1, 2, 4) for layer in range(2)}
    assert metrics["accesses"] == metrics["overlapped"]["accesses"] == 6
    assert metrics["event_counts"]["miss"] == len(used)


# Against what it is a face of


def test_by_default_it_is_the_guides_scenario() -> None:
    config = replace(InferenceConfig(), num_simulation_tokens=60)
    inputs = load_inputs(load_scenario("guide-k10-2gb", ["workload.synthetic.tokens=60"]))
    _, metrics = in_guides_accounting(inputs)
    ours = InferenceSimulator(config).run_simulation()
    del ours["overlapped"]
    assert ours == metrics
    assert InferenceConfig().num_simulation_tokens == 500


@pytest.mark.parametrize("from_file", [False, True])
def test_overlapped_is_what_run_gives_for_its_scenario(from_file: bool, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    synthesize(30, 3, 16, 2, skew=0.5, sequences=2).save(path)
    config = InferenceConfig(
        num_simulation_tokens=25,
        num_layers=3,
        num_experts=16,
        gpu_memory_limit_mb=500,
        prefetch_k=3,
        predictor="context",
        context_length=2,
        predictor_latency_us=40,
        predictor_lane="host",
        trace=path if from_file else None,
    )
    simulator = InferenceSimulator(config)
    assert simulator.run_simulation()["overlapped"] == simulate(simulator.scenario).data
    keys = simulator.scenario.predictor
    assert (keys.name, keys.context, keys.latency_us, keys.lane) == ("context", 2, 40.0, "host")


@pytest.mark.parametrize("name", SELF_MADE)
@pytest.mark.parametrize("caching", [True, False])
def test_both_engines_make_the_same_decisions_with_every_predictor(name: str, caching: bool) -> None:
    for seed, top_k in ((0, 1), (1, 2)):
        trace = synthesize(40, 3, 8, top_k, skew=0.8, reuse=0.3, sequences=3, seed=seed)
        config = replace(tiny([[0] * 3], slots=7), trace=trace, num_experts=8, num_simulation_tokens=40)
        config = replace(config, predictor=name, prefetch_k=3, enable_caching=caching, prediction_accuracy=0.6)
        metrics = InferenceSimulator(config).run_simulation()
        counts, overlapped = metrics["event_counts"], metrics["overlapped"]["counts"]
        assert counts["miss"] == overlapped["miss"]
        assert counts["hit"] + counts["cache_hit"] == sum(
            overlapped[key] for key in ("prefetch_hit", "cache_hit", "late")
        )
        assert (counts["prefetch"], counts["evict"]) == (overlapped["prefetch"], overlapped["evict"])
        assert metrics["prefetch"]["dropped"] == overlapped["dropped"]
        assert counts["cache_hit"] == 0 or caching


@pytest.mark.skipif("learned" not in PREDICTORS, reason="no predictor has weights")
def test_what_names_no_predictor_names_weights() -> None:
    scenario = InferenceConfig(predictor="some/weights").scenario().plain()["predictor"]
    assert (scenario["name"], scenario["weights"]) == ("learned", "some/weights")


def test_the_same_configuration_gives_the_same_data_and_another_seed_another() -> None:
    config = InferenceConfig(num_simulation_tokens=20)
    first, again, other = (
        InferenceSimulator(each).run_simulation() for each in (config, config, replace(config, seed=1))
    )
    assert first == again
    assert first["event_counts"] != other["event_counts"]


# What it shows


def test_the_summary_has_all_three_speedups(capsys: pytest.CaptureFixture[str]) -> None:
    simulator = InferenceSimulator(InferenceConfig(num_simulation_tokens=20))
    simulator.print_summary()  # runs it
    shown, metrics = capsys.readouterr().out, simulator.metrics()
    for run in (metrics, metrics["copies_charged"], metrics["overlapped"]):
        assert f"{run['speedup']:.2f}x" in shown
    assert f"{metrics['baseline_latency_ms']:,.3f} ms" in shown
    assert f"{metrics['prediction_accuracy']:.2%} of the experts used" in shown


def test_the_pictures_show_every_token_the_memory_and_every_access(tmp_path: Path) -> None:
    simulator = InferenceSimulator(tiny([[0], [1], [0], [2]], slots=2))
    (axes,) = simulator.plot_latency(tmp_path / "latency.png").axes
    drawn = {str(line.get_label()).split(":")[0]: line.get_ydata() for line in axes.lines}
    for name, values in simulator.token_latencies_ms().items():
        assert np.array_equal(drawn[name], values)
    (axes,) = simulator.plot_hits(tmp_path / "hits.svg").axes
    # Outcome by outcome, the guide's accounting first.
    widths = [bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)]
    split = hit_split(simulator.metrics())
    assert widths == pytest.approx([split[row][outcome] / 4 * 100 for outcome in split["overlapped"] for row in split])
    simulator.plot_memory(tmp_path / "memory.png")
    simulator.plot_memory(tmp_path / "overlapped.png", overlapped=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "hits.svg",
        "latency.png",
        "memory.png",
        "overlapped.png",
    ]


def test_numbers_of_numpy_are_numbers() -> None:
    options: dict[str, Any] = {"num_simulation_tokens": np.int64(5), "prefetch_k": np.int32(3)}
    assert (
        InferenceConfig(**options, expert_size_mb=np.float64(27)).scenario()
        == InferenceConfig(num_simulation_tokens=5, prefetch_k=3).scenario()
    )


def test_it_is_imported_from_the_package() -> None:
    assert {"InferenceConfig", "InferenceSimulator"} <= set(prestage.__all__)


# What it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_simulation_tokens": 0}, r"num_simulation_tokens = 0: must be an integer, at least 1"),
        ({"num_simulation_tokens": 2.5}, r"num_simulation_tokens = 2.5: must be an integer"),
        ({"prefetch_k": 129}, r"prefetch_k = 129: must be an integer, 0..128 \(num_experts\)"),
        (
            {"num_layers": 13},
            r"num_layers = 13: must be an integer, 1..12 \(the MoE layers of model 'switch-base-128'\)",
        ),
        ({"num_experts": 0}, r"num_experts = 0: must be an integer"),
        ({"expert_size_mb": -1}, r"expert_size_mb = -1: must be a size in MiB, more than 0"),
        (
            {"gpu_memory_limit_mb": 26},
            r"gpu_memory_limit_mb = 26: must be a size in MiB, room for one expert of 27.0 MiB",
        ),
        ({"gpu_memory_limit_mb": 40960}, r"gpu_memory_limit_mb = 40960: the GPU of profile rtx3090 has 24,576 MiB"),
        ({"gpu_memory_limit_mb": "2GiB"}, r"gpu_memory_limit_mb = '2GiB': must be a size in MiB"),
        ({"prediction_accuracy": 33.86}, r"prediction_accuracy = 33.86: must be a number, 0 to 1"),
        ({"prediction_accuracy": float("nan")}, r"prediction_accuracy = nan: must be a number, 0 to 1"),
        ({"context_length": 0}, r"context_length = 0: must be an integer, at least 1"),
        ({"predictor_latency_us": -1}, r"predictor_latency_us = -1: must be a number"),
        ({"predictor_lane": "cpu"}, r"predictor_lane = 'cpu': choose one of gpu"),
        ({"eviction": "lrv"}, r"eviction = 'lrv': choose one of .*did you mean 'lru'"),
        ({"enable_caching": 1}, r"enable_caching = 1: must be True or False"),
        ({"seed": -1}, r"seed = -1: must be an integer"),
        ({"trace": 5}, r"trace = 5: must be a RoutingTrace, a file's path or None"),
        ({"profile": "rtx309"}, r"profile = 'rtx309': choose one of .*did you mean 'rtx3090'"),
        ({"model": "switch"}, r"switch"),
    ],
)
def test_a_bad_argument_is_refused_naming_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InferenceConfig(**options)


@pytest.mark.skipif("learned" in PREDICTORS, reason="another name is that of weights")
def test_an_unknown_predictor_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"predictor = 'orcale': choose one of .*did you mean 'oracle'"):
        InferenceConfig(predictor="orcale")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 2}, r"num_layers = 2: the trace has 1: set num_layers = 1"),
        ({"num_experts": 8}, r"num_experts = 8: the trace has 4: set num_experts = 4"),
        ({"num_simulation_tokens": 9}, r"num_simulation_tokens = 9: the trace has 2 decode tokens"),
        ({"predictor": "recorded", "prefetch_k": 1}, r"the trace has no array predictions"),
        ({"trace": "nowhere.safetensors"}, r"nowhere.safetensors"),
    ],
)
def test_a_trace_that_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        InferenceSimulator(replace(tiny([[0], [1]], slots=2), **options))


def test_the_guides_accounting_refuses_batches() -> None:
    inputs = load_inputs(load_scenario("guide-k10-2gb", ["workload.batch=2", "workload.synthetic.sequences=2"]))
    with pytest.raises(ValueError, match=r"workload\.batch = 1"):
        in_guides_accounting(inputs)
