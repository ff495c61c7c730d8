"""What runs beside the GPU's stream is fitted to what was executed: on the CPU's device, whose times are known."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_device import CpuDevice

from prestage.calibration.executor.execute import execute, load_executable
from prestage.calibration.executor.measured import Measured, load_measured
from prestage.calibration.executor.scenario_sets import scenarios
from prestage.calibration.executor.shared import Shared
from prestage.calibration.fit.beside import fit_beside, observe, written
from prestage.calibration.fit.seen import Seen, unsure
from prestage.calibration.measure.samples import Samples, Series
from prestage.calibration.validate.validate import compare, simulate_measured
from prestage.engine.costs.uncertainty import replicate_costs
from prestage.engine.load import load_inputs
from prestage.engine.measure.merge import makespan_ns
from prestage.engine.scenario.scenario import Scenario
from prestage.resources.profile import load_profile
from prestage.resources.profile_costs import ProfileError
from prestage.resources.timeline import CPU_EXPERT, DECOMPRESS, EXPERT, PREDICT

RUNS = Path(__file__).parents[1] / "calibration" / "validation"


def small(name: str) -> Scenario:
    """A scenario of the set to fit, of a small model and a few tokens."""
    scenario = scenarios("fit-beside")[name]
    model = {"preset": "switch-base-128", "layers": 1, "experts": 8}
    if "packed" in name:
        model = {"preset": "qwen3-30b-a3b", "layers": 1, "experts": 8, "top_k": 2}
    data = scenario.plain() | {"model": model}
    data["memory"] = {**data.get("memory", {}), "gpu_budget": "4experts"}
    data["workload"]["synthetic"] |= {"tokens": 3, "working_set": 8, "sequences": 1}
    data["workload"]["batch"] = 1
    if "drive" in name:
        data["tiers"]["host_budget"] = "5experts"
    data.get("miss", {}).pop("cpu_gb_per_s", None)
    made: Scenario = type(scenario).model_validate(data)
    return made


pytestmark = pytest.mark.slow  # gigabytes go through memory

NAMES = [
    "fit-beside-switch-graph-ahead0-cpu", "fit-beside-qwen-graph-ahead0-packed", "fit-beside-qwen-graph-ahead0-drive",
    "fit-beside-qwen-graph-ahead0-grouped", "fit-beside-qwen-graph-ahead1-recall90-predictor",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Measured]:
    pool = Shared(CpuDevice(), 8 * 28311552, drive=tmp_path_factory.mktemp("drive") / "experts")
    ready = load_executable({name: small(name) for name in NAMES})
    made = [execute([CpuDevice()], inputs, name, pool, repeats=1) for name, inputs in ready.items()]
    pool.close()
    return made


def durations(runs: list[Measured], kind: int) -> Any:
    """What all spans of a kind took, in ns."""
    took = []
    for run in runs:
        (gpu,), (times,) = run.gpus, run.times
        here = gpu.spans["kind"] == kind
        took.append((times.end_ns - times.start_ns)[here])
    return np.concatenate(took)


def test_each_cost_is_what_its_spans_took(runs: list[Measured]) -> None:
    seen = observe(runs)
    for cost, kind in (("cpu", CPU_EXPERT), ("unpack", DECOMPRESS), ("predict", PREDICT)):
        took = durations([run for run in runs if (run.gpus[0].spans["kind"] == kind).any()], kind)
        assert sum(one.n for one in seen[cost].values()) == len(took) > 0
        assert min(took) <= min(one.median_ns for one in seen[cost].values()) <= max(took)
    grouped = [run for run in runs if "grouped" in run.name]
    assert sum(one.n for one in seen["grouped"].values()) == len(durations(grouped, EXPERT))
    assert {"notice", "hand_over", "take_back", "order"} <= seen.keys()


def drive_samples() -> Samples:
    """A drive that gives 1 GB/s to one read, and 3 GB/s to four or more together; a read takes 1 ms more."""
    series = []
    for size in (2**20, 9 * 2**20):
        for count, rate in ((1, 1.0), (4, 3.0), (8, 3.0)):
            series.append(Series(term="read", key={"bytes": size, "in_flight": count}, rounds_ns=((round(size * count / rate),),)))  # fmt: skip  # noqa: E501
    return Samples(
        device="a GPU", driver="1", date="2026-01-01", versions={}, gpu_memory_bytes=1, cpu_threads=1, gpus=1,
        series=tuple(series),
    )  # fmt: skip


def test_a_profile_is_made_that_simulates_what_was_executed(runs: list[Measured], tmp_path: Path) -> None:
    text, profile = written(fit_beside(runs, drive_samples()), "mine", "h200")
    assert json.loads(text)["extends"] == "h200" and profile.name == "mine"
    assert profile.nvme is not None
    assert [round(profile.nvme.times_as_long(reads), 3) for reads in (1, 4, 8)] == [1.0, 1.333, 2.667]
    # Reads are as schedules had them; what sizes none of these had take goes by the drive's own samples.
    assert profile.nvme.read.ns(9 * 2**20) == pytest.approx(9 * profile.nvme.read.ns(2**20), rel=1e-3)
    # Shapes of a predictor that were not seen are as they were; all but what was fitted is the base's.
    base = load_profile("h200")
    assert {(point.hidden, point.experts) for point in base.compute.predictors} <= {
        (point.hidden, point.experts) for point in profile.compute.predictors
    }
    assert profile.h2d == base.h2d and profile.compute.experts == base.compute.experts
    for run in runs:
        row = compare(run, profile)
        assert row["counts_equal"], run.name


def test_what_policies_went_by_is_kept_where_costs_are_measured_anew(runs: list[Measured]) -> None:
    # A machine on which the CPU takes ten times as long, and the same decisions.
    run = runs[0]
    profile = load_profile("h200-offload")
    points = tuple(point.model_copy(update={"ns": 10 * point.ns}) for point in profile.compute.cpu_experts)
    slow = profile.model_copy(update={"compute": profile.compute.model_copy(update={"cpu_experts": points})})
    told = replace(run, scenario=run.scenario.model_copy(update={"miss": run.scenario.miss.model_copy(update={"policy": "cost", "cpu_gb_per_s": 115.0})}))  # fmt: skip  # noqa: E501
    here, there = (simulate_measured(told, each) for each in (profile, slow))
    assert (here[0].spans["kind"] == CPU_EXPERT).sum() == (there[0].spans["kind"] == CPU_EXPERT).sum() > 0
    assert makespan_ns(there) > makespan_ns(here)


def test_a_cost_is_as_unsure_as_its_runs_and_what_decides_a_run_as_its_repeats_lie_apart() -> None:
    # Medians of 90 and 110 are 10 % off their mean; the first predicts the second 22 % too low.
    several = Seen(20, 100.0, 100.0, 10.0, (90.0, 110.0), 0.05)
    alone = Seen(3, 80.0, 80.0, 0.0, (80.0,), 0.12)  # tells nothing of how far runs lie apart
    found = unsure([several, alone])
    assert found["run_spread"] == pytest.approx(0.1)
    assert found["held_back_error"] == pytest.approx(110 / 90 - 1, abs=1e-4)
    repeats = ((0.05**2 + 0.12**2) / 2) ** 0.5
    assert unsure([several, alone], decides=True)["run_spread"] == pytest.approx(np.hypot(0.1, repeats), abs=1e-4)
    assert unsure([alone])["run_spread"] == pytest.approx(0.12)


def test_replicates_draw_experts_on_the_cpu_reads_and_hand_over() -> None:
    inputs = load_inputs(small("fit-beside-qwen-graph-ahead0-drive"))
    inputs = replace(inputs, profile=load_profile("h200-offload"))
    drawn = [costs.profile for costs in replicate_costs(inputs, 3)]
    assert all(profile.nvme is not None and profile.host.cpu_results is not None for profile in drawn)
    assert len({profile.nvme and profile.nvme.read.ns(9 * 2**20) for profile in [*drawn, inputs.profile]}) == 4
    assert len({profile.compute.cpu_experts[0].ns for profile in [*drawn, inputs.profile]}) == 4
    assert len({profile.host.cpu_results and profile.host.cpu_results.ns for profile in [*drawn, inputs.profile]}) == 4


def test_runs_without_anything_beside_are_refused() -> None:
    with pytest.raises(ProfileError, match="execute the set fit-beside"):
        fit_beside([])


def links_between_two(took_ns: dict[int, int]) -> Samples:
    """Samples of exchanges by copies in a row, as many ns by bytes; those of the host are ten times as long."""
    series = tuple(
        Series(
            term="exchange", key={"how": "copies", "bytes": size, "gpus": 2, "mode": mode}, rounds_ns=((ns * times,),)
        )
        for size, ns in took_ns.items()
        for mode, times in (("in a row", 1), ("host", 10))
    )
    return Samples(
        device="GPU", gpus=2, gpu_memory_bytes=1, driver="1", date="2026-11-30", versions={}, cpu_threads=1,
        launch_queue_depth=(1000,), series=series,
    )  # fmt: skip


def test_exchanges_of_sizes_that_no_schedule_had_take_as_much_more_than_apart_as_the_nearest_one_does() -> None:
    run = load_measured(RUNS / "h200-pair" / "fit-shared" / "fit-shared-qwen-graph-ahead0-tokens.json.gz")
    points = fit_beside([run])["exchange"]["points"]
    largest, took_ns = points[-1]
    apart = {largest // 4: took_ns // 3, largest: took_ns // 2, largest * 64: 10 * took_ns}
    found = dict(fit_beside([run], links=links_between_two(apart))["exchange"]["points"])
    assert found[largest] == took_ns  # what a schedule had stays
    assert found[largest * 64] == pytest.approx(10 * took_ns + took_ns - took_ns // 2, abs=1)
    assert set(found) == {0, largest // 4, *dict(points), largest * 64}


def test_links_that_are_not_of_exchanges_and_runs_without_any_are_refused() -> None:
    run = load_measured(RUNS / "h200-pair" / "fit-shared" / "fit-shared-qwen-graph-ahead0-tokens.json.gz")
    apart = links_between_two({4096: 10_000})
    with pytest.raises(ProfileError, match=r"^links: no series of exchanges by copies: must be what"):
        fit_beside([run], links=apart.model_copy(update={"series": ()}))
    alone = load_measured(RUNS / "h200-offload" / "fit-beside" / "fit-beside-mixtral-graph-ahead0-packed.json.gz")
    with pytest.raises(ProfileError, match=r"^links: in these runs GPUs exchange nothing: execute the set fit-shared$"):
        fit_beside([alone], links=apart)
