"""Published runs: the fit recovers what a log was made with, looks at no later token, and predicts a phone's run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from prestage.calibration.published.run import (
    COLUMNS,
    PublishedRunError,
    RunLog,
    check_run,
    fit_run,
    interrupted,
    load_log,
    warm_up,
)
from prestage.cli import app
from prestage.engine.load import load_inputs
from prestage.engine.measure.recording import Recording
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.scenario import Scenario, load_scenario
from prestage.engine.simulate import simulate
from prestage.resources.profile import Profile, load_profile
from prestage.resources.timeline import READ

#: A small model on the phone, on which nothing interrupts.
SMALL = [
    "model.layers=6",
    "model.experts=16",
    "model.top_k=3",
    "memory.gpu_budget=40experts",
    "workload.synthetic.tokens=60",
    "workload.synthetic.reuse=0.5",
]
TOKENS = 60
Phone = Callable[..., Scenario]


def as_data(profile: Profile) -> dict[str, Any]:
    data: dict[str, Any] = profile.model_dump(exclude_none=True)
    return data


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The phone's profile without interruptions, as a file."""
    data = as_data(load_profile("oneplus15r-ufs4"))
    del data["compute"]["interruptions"]
    path = tmp_path_factory.mktemp("profiles") / "quiet.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def phone(quiet: str) -> Phone:
    """Makes the small scenario, with settings."""
    return lambda *settings: load_scenario("phone", [*SMALL, f"machine.profile={quiet}", *settings])


def log_of(recording: Recording, **changes: Any) -> RunLog:
    """The log that a simulated run would have written: each part as the engine whose format it is defines it."""
    layers, steps = len(recording.expert_bytes), len(recording.steps)

    def by_step(spans: Any, ms: Any) -> Any:
        return np.bincount(spans["visit"] // layers, weights=ms, minlength=steps)

    def took_ms(spans: Any) -> Any:
        return (spans["end_ns"] - spans["start_ns"]) / 1e6

    reads = recording.spans[recording.spans["kind"] == READ]
    copies = recording.copy_spans
    wall_ms = np.diff(recording.step_end_ns, prepend=0) / 1e6
    compute_ms = by_step(recording.compute_spans, took_ms(recording.compute_spans))
    sizes = np.array(recording.expert_bytes)[copies["visit"] % layers]
    drive = load_profile("oneplus15r-ufs4").nvme
    assert drive is not None
    order_ms = drive.order.ns / 1e6
    mgmt_ms = by_step(copies, np.full(len(copies), order_ms))
    columns = {
        "wall_ms": wall_ms,
        "io_ms": by_step(reads, took_ms(reads)),
        "compute_ms": compute_ms,
        "read_bytes": by_step(copies, sizes.astype(float)),
        "stall_ms": wall_ms - compute_ms - mgmt_ms,
        "mgmt_ms": mgmt_ms,
    }
    return RunLog(Path("made.metrics"), {**columns, **changes})


@pytest.fixture(scope="module")
def made(phone: Phone) -> RunLog:
    return log_of(simulate(phone(), baselines=False).recording)


def test_the_fit_recovers_the_costs_that_a_log_was_made_with(
    phone: Phone, quiet: str, made: RunLog, tmp_path: Path
) -> None:
    wrong = as_data(load_profile(quiet))
    wrong["compute"]["rule"]["bytes_per_second"] //= 3
    wrong["compute"]["event_wait_gap"]["ns"] = 777_777
    wrong["nvme"]["read"]["bytes_per_second"] *= 2
    wrong["nvme"]["order"]["ns"] = 1
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(wrong), encoding="utf-8")
    fitted, true = fit_run(phone(f"machine.profile={path}"), made, TOKENS, "mine").profile, load_profile(quiet)
    assert fitted.nvme is not None and true.nvme is not None
    assert fitted.nvme.read.bytes_per_second == pytest.approx(true.nvme.read.bytes_per_second, rel=1e-3)
    assert fitted.nvme.order.ns == true.nvme.order.ns
    assert fitted.compute.rule.bytes_per_second == pytest.approx(true.compute.rule.bytes_per_second, rel=1e-3)
    assert fitted.compute.event_wait_gap.ns == pytest.approx(true.compute.event_wait_gap.ns, rel=0.05)
    assert fitted.compute.interruptions is None


def test_what_it_fitted_says_so_and_the_rest_stays_as_it_was(phone: Phone, quiet: str, made: RunLog) -> None:
    base, fitted = load_profile(quiet), fit_run(phone(), made, TOKENS, "mine").profile
    assert fitted.name == "mine"
    assert fitted.nvme is not None
    parts = (fitted.nvme.read, fitted.nvme.order, fitted.compute.rule, fitted.compute.event_wait_gap)
    assert {part.source for part in parts} == {"fitted"}
    assert (fitted.h2d, fitted.host, fitted.gpu_memory_bytes) == (base.h2d, base.host, base.gpu_memory_bytes)


def test_the_fitted_rate_is_of_the_lanes_that_read_and_holds_what_they_share(
    phone: Phone, quiet: str, made: RunLog, tmp_path: Path
) -> None:
    # The phone read with four lanes, each of which got its rate: a drive measured otherwise says nothing beside that.
    data = as_data(load_profile(quiet))
    data["nvme"]["lanes"] = 2
    rates = [[1, 10**9], [4, 2 * 10**9]]
    data["nvme"]["queue_depth"] = {"bytes_per_second_by_reads": rates, "source": "measured"}
    path = tmp_path / "deep.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    fitted = fit_run(phone(f"machine.profile={path}", "tiers.io_lanes=4"), made, TOKENS, "mine").profile
    assert fitted.nvme == fit_run(phone(), made, TOKENS, "mine").profile.nvme
    assert fitted.nvme is not None and fitted.nvme.lanes == 4 and fitted.nvme.queue_depth is None


def test_nothing_of_later_tokens_is_looked_at(phone: Phone, made: RunLog, tmp_path: Path) -> None:
    # From token 30 on, times and bytes are nonsense and every token takes other experts.
    half = TOKENS // 2
    later = {name: np.concatenate([made.columns[name][:half], np.full(half, 1e9)]) for name in COLUMNS}
    trace = load_inputs(phone()).trace
    experts = trace.experts.copy()
    experts[half:] = 15 - experts[half:]
    path = tmp_path / "other.safetensors"
    replace(trace, experts=experts).save(path)
    right = fit_run(phone(), made, half, "mine")
    assert fit_run(phone(f"workload.trace={path}"), RunLog(made.path, later), half, "mine") == right


def test_tokens_far_out_become_interruptions_and_do_not_slow_the_others_down(phone: Phone, made: RunLog) -> None:
    late = np.zeros(TOKENS)
    late[[25, 40, 55]] = 500.0
    noisy = RunLog(made.path, {**made.columns, **{n: made.columns[n] + late for n in ("wall_ms", "compute_ms")}})
    quiet, fitted = (fit_run(phone(), log, TOKENS, "mine") for log in (made, noisy))
    assert fitted.terms["interruptions"] == 3
    assert fitted.terms["interruption_ns"] == pytest.approx(500e6, rel=0.01)
    for term in ("weight_bytes_per_second", "wake_ns", "order_ns", "lane_bytes_per_second"):
        assert fitted.terms[term] == pytest.approx(quiet.terms[term], rel=0.01, abs=200)


def test_a_run_is_predicted_exactly_by_the_machine_it_was_made_on(phone: Phone, made: RunLog) -> None:
    report = check_run(phone(), made, 30)
    assert (report["median_abs_error"], report["mean_error"]) == (0, 0)
    assert report["tokens"] == 30 and len(report["by_token_ms"]) == TOKENS
    assert report["line"]["median_abs_error"] > 0
    for logged, simulated in report["parts_ms"].values():
        assert logged == pytest.approx(simulated)


def test_warm_up_is_what_mser_5_says() -> None:
    # Two batches of 100 before ten batches of 0 and 1 in turn: with both left out the variance is least.
    series = np.array([100.0] * 10 + [0.0, 1.0] * 25)
    assert warm_up(series) == 10
    assert warm_up(np.array([0.0, 1.0] * 20)) == 0
    assert warm_up(np.array([100.0] * 30 + [0.0] * 10 + [100.0] * 10)) == 0  # half at most: the end is not all


def test_far_out_is_beyond_three_interquartile_ranges() -> None:
    # Quartiles 2 and 4: the fence is at 4 + 3 x 2.
    assert interrupted(np.array([1.0, 2.0, 3.0, 4.0, 10.0])).tolist() == [False] * 5
    assert interrupted(np.array([1.0, 2.0, 3.0, 4.0, 10.1])).tolist() == [False] * 4 + [True]


# Files.


def write(path: Path, made: RunLog) -> Path:
    rows = zip(*(made.columns[name] for name in COLUMNS), strict=True)
    lines = [
        ",".join(("step", *COLUMNS)),
        *(f"{n},{','.join(map(repr, map(float, row)))}" for n, row in enumerate(rows)),
    ]
    path.write_text("\n".join([*lines, "# summary tokens=60"]) + "\n", encoding="utf-8")
    return path


def test_the_commands_fit_and_check(quiet: str, made: RunLog, tmp_path: Path) -> None:
    log, out = write(tmp_path / "run.metrics", made), tmp_path / "mine.json"
    settings = [part for setting in (*SMALL, f"machine.profile={quiet}") for part in ("--set", setting)]
    fit = CliRunner().invoke(
        app, ["calibrate", "fit-run", "phone", str(log), "--tokens", "30", "-o", str(out), *settings]
    )
    assert fit.exit_code == 0, fit.output
    assert "a lane reads" in fit.output
    assert load_profile(str(out)).name == "mine"
    command = [
        "calibrate",
        "check-run",
        "phone",
        str(log),
        "--after",
        "30",
        *settings,
        "--set",
        f"machine.profile={out}",
    ]
    check = CliRunner().invoke(app, [*command, "--json"])
    assert check.exit_code == 0, check.output
    assert abs(json.loads(check.stdout)["mean_error"]) < 0.02
    assert "a straight line in bytes read" in CliRunner().invoke(app, command).output


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace("io_ms", "oi_ms"), "column io_ms: missing"),
        (lambda text: text.replace("\n1,", "\n1,x"), "token 2: wall_ms = 'x"),
        (lambda text: text.replace("\n1,", "\n1,-"), "must be at least 0"),
        (lambda text: re.sub(r"\n1,[^,]*", "\n1,0", text), "token 2: wall_ms = '0': must be above 0"),
    ],
)
def test_a_bad_log_is_named(made: RunLog, tmp_path: Path, change: Callable[[str], str], says: str) -> None:
    path = write(tmp_path / "run.metrics", made)
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(PublishedRunError) as caught:
        load_log(path)
    assert says in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("column", ["io_ms", "compute_ms"])
def test_a_log_without_the_times_that_rates_are_fitted_to_is_refused(phone: Phone, made: RunLog, column: str) -> None:
    empty = replace(made, columns={**made.columns, column: np.zeros(TOKENS)})
    with pytest.raises(PublishedRunError, match=rf"{column}: 0 from token \d+ to 30"):
        fit_run(phone(), empty, 30, "mine")


def test_what_does_not_fit_together_is_refused(phone: Phone, made: RunLog) -> None:
    with pytest.raises(PublishedRunError, match="99 tokens asked for: must be 10 to the 60"):
        fit_run(phone(), made, 99, "mine")
    with pytest.raises(PublishedRunError, match="nothing is left after 60"):
        check_run(phone(), made, 60)
    with pytest.raises(PublishedRunError, match=r"read_bytes: .* MiB in 30 tokens, and the scenario reads"):
        fit_run(phone("memory.gpu_budget=80experts"), made, 30, "mine")
    with pytest.raises(ScenarioError, match=r"tiers\.host_budget = 'all'"):
        fit_run(phone("tiers.host_budget=all"), made, 30, "mine")
    with pytest.raises(ScenarioError, match=r"workload\.batch = 2"):
        fit_run(phone("workload.batch=2"), made, 30, "mine")


# A real phone.


@pytest.fixture(scope="module")
def run_of_a_phone(traces: Path) -> tuple[list[str], RunLog]:
    folder = traces / "bigmoeonedge-qwen"
    settings = [f"workload.trace={folder / 'qwen.route.csv'}", "model.sizes=trace"]
    return settings, load_log(folder / "qwen.metrics")


@pytest.mark.slow
def test_half_of_a_phones_run_predicts_the_other_half(run_of_a_phone: tuple[list[str], RunLog], tmp_path: Path) -> None:
    settings, log = run_of_a_phone
    fitted = fit_run(load_scenario("phone", settings), log, 64, "oneplus15r-ufs4")
    assert fitted.profile == load_profile("oneplus15r-ufs4"), "the profile that ships is what the command makes"
    report = check_run(load_scenario("phone", settings), log, 64)
    assert report["median_abs_error"] < 0.10
    assert abs(report["mean_error"]) < 0.03
    # What a straight line in bytes read scores, as was published of it; and the part that is the tiers'.
    assert report["line"]["median_abs_error"] == pytest.approx(0.112, abs=0.001)
    assert report["line"]["mean_error"] == pytest.approx(-0.038, abs=0.001)
    logged, simulated = report["parts_ms"]["stall and management"]
    assert simulated == pytest.approx(logged, rel=0.02)


@pytest.mark.slow
def test_the_phones_log_reads_what_the_simulation_reads(run_of_a_phone: tuple[list[str], RunLog]) -> None:
    settings, log = run_of_a_phone
    result = simulate(load_scenario("phone", settings), baselines=False)
    assert result.data["tiers"]["host_hits"] == 0  # what is being read is held by nobody else
    made = log_of(result.recording)
    assert np.abs(made.columns["read_bytes"][1:] / log.columns["read_bytes"] - 1).max() < 0.015


def test_the_fitted_costs_are_a_phones() -> None:
    profile = load_profile("oneplus15r-ufs4")
    assert profile.nvme is not None and profile.nvme.read.bytes_per_second is not None
    # UFS 4 reads about 4 GB/s; four lanes of a phone's cores get most of it. LPDDR5X gives four cores some 20 GB/s.
    assert 2e9 < 4 * profile.nvme.read.bytes_per_second < 4.2e9
    assert 10e9 < profile.compute.rule.bytes_per_second < 60e9
    assert 0 < profile.compute.event_wait_gap.ns < 1e6
