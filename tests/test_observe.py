"""`prestage calibrate observe`: logs read, costs fitted that simulations were made with, and bad logs told of."""

import gzip
import json
import tomllib
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from typer.testing import CliRunner

from prestage.calibration.observe.fit import Predictor, errors, fit, median_worst, with_costs
from prestage.calibration.observe.logs import Context, Observation, ObserveError, load_logs
from prestage.calibration.observe.reality import sizes
from prestage.cli.entry import app
from prestage.resources.runtime import load_runtime

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "calibration" / "samples" / "h200-runtimes"
MIXTRAL: dict[str, dict[str, Any]] = {
    "model": {"layers": 4, "dtype": "q4_k"},
    "miss": {"cpu_gb_per_s": 300.0},
    "workload": {"synthetic": {"tokens": 4}},
}
ROW = {
    "model_filename": "m.gguf", "model_n_params": 6_067_228_672, "n_prompt": 0, "n_gen": 4, "n_depth": 0,
    "n_threads": 8,
    "n_cpu_moe": 0, "use_mmap": True, "samples_ns": [4_000_000, 4_400_000],
}  # fmt: skip


def bench_rows() -> list[dict[str, Any]]:
    layers = [ROW | {"n_cpu_moe": n, "samples_ns": [4_000_000 * (1 + n)]} for n in (0, 1, 4)]
    return [*layers, ROW | {"n_prompt": 512, "n_gen": 0}]


def written(folder: Path, rows: Any, name: str = "log.json") -> Path:
    file = folder / name
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return file


def context() -> Context:
    return Context("h200", "mixtral-8x7b", MIXTRAL)


def test_decode_json_gives_each_settings_scenario_and_time() -> None:
    found = load_logs([SAMPLES / "mixtral-8x7b" / "decode.json.gz"], Context("h200"))
    assert [each.samples for each in found] == [1, 1, 1, 1] or all(each.samples >= 1 for each in found)
    report = json.loads(gzip.decompress((SAMPLES / "mixtral-8x7b" / "decode.json.gz").read_bytes()))
    for each, run in zip(found, report["runs"], strict=True):
        batch = run["scenario"]["workload"]["batch"]
        assert each.ns == pytest.approx(batch * 1e9 / run["tokens_per_second"], rel=0.02)  # one repeat each
        assert Path(each.settings["workload"]["trace"]).is_file() and each.settings["machine"] == {"profile": "h200"}


@pytest.mark.parametrize(("slower", "counted"), [
    ((1.0, 1.14, 1.15), (0, 1)),
    ((2.0, 1.3, 1.6), (1,)),
    ((None, None, None), (0, 1, 2)),
])  # fmt: skip
def test_repeats_on_a_core_that_was_slowed_down_do_not_count(
    tmp_path: Path, slower: tuple[float | None, ...], counted: tuple[int, ...]
) -> None:
    report = json.loads(gzip.decompress((SAMPLES / "mixtral-8x7b" / "decode.json.gz").read_bytes()))
    for run in report["runs"]:
        (tmp_path / run["scenario"]["workload"]["trace"]).write_bytes(b"")
        run["repeats"] = [{"tokens_per_second": rate} | ({} if factor is None else {"host_slowdown": factor})
                          for rate, factor in zip((10.0, 20.0, 40.0), slower, strict=True)]  # fmt: skip
    found = load_logs([written(tmp_path, [report], "decode.json")], Context("h200"))
    steps = [found[0].settings["workload"]["batch"] * 1e9 / (10.0, 20.0, 40.0)[number] for number in counted]
    assert found[0].samples == len(counted) and found[0].ns == pytest.approx(median(steps))
    (every, *_) = load_logs([tmp_path / "decode.json"], Context("h200", disturbed=True))
    assert every.samples == 3


@pytest.mark.parametrize("form", ["array", "lines", "gzip"])
def test_llama_bench_gives_generation_by_layers_on_the_cpu(tmp_path: Path, form: str) -> None:
    lines = "\n".join(json.dumps(row) for row in bench_rows())
    file = written(tmp_path, lines if form != "array" else bench_rows())
    if form == "gzip":
        file.write_bytes(gzip.compress(file.read_bytes()))
    found = load_logs([file], context())
    assert [each.settings["memory"]["cpu_layers"] for each in found] == [0, 1, 4]
    assert [each.settings["memory"]["gpu_budget"] for each in found] == ["32experts", "24experts", "1experts"]
    assert [each.ns for each in found] == [1e6, 2e6, 5e6]
    assert all(each.settings["copy"]["host_memory"] == "pageable" for each in found)
    old = load_logs(
        [written(tmp_path, [row | {"load_mode": "none", "use_mmap": False} for row in bench_rows()])], context()
    )
    assert all(each.settings["copy"]["host_memory"] == "pinned" for each in old)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no log at all\nreally", "columns no log at all"),
        ("{broken", "neither JSON nor JSON lines"),
        ('[{"latency": 3}]', "no row has samples_ns"),
        (json.dumps([ROW]), "1 setting: give at least two"),
        (json.dumps([ROW, ROW | {"model_filename": "n.gguf"}]), "holds rows of m.gguf, n.gguf"),
        (json.dumps([ROW, ROW | {"samples_ns": [9_000_000]}]), "contradict each other"),
        (json.dumps([{"samples_ns": [1], "n_prompt": 0}]), "is not llama-bench's: KeyError: 'n_gen'"),
        (
            "memory.gpu_budget,tokens_per_second\n25%,30\n50%,fast\n",
            "line 3: tokens_per_second must be a number above 0",
        ),
        ('{"format": "prestage-decode-1", "runs": [{}]}', "is not a whole prestage-decode-1"),
    ],
)
def test_bad_logs_are_told_of_in_one_line(tmp_path: Path, text: str, told: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ObserveError) as caught:
        load_logs([file], context())
    assert told in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("samples_ns", "refused"), [
    ((4_000_000, 4_100_000, 4_200_000, 4_300_000, 9_000_000), False),
    ((4_000_000, 4_100_000, 4_200_000, 9_000_000), True),
    ((2_000_000, 4_000_000, 4_100_000, 9_000_000, 9_000_000), True),
])  # fmt: skip
def test_of_many_samples_one_may_contradict_the_others(
    tmp_path: Path, samples_ns: tuple[int, ...], refused: bool
) -> None:
    file = written(tmp_path, [*bench_rows(), ROW | {"n_cpu_moe": 2, "samples_ns": list(samples_ns)}])
    if refused:
        with pytest.raises(ObserveError, match="contradict each other"):
            load_logs([file], context())
    else:
        assert load_logs([file], context())[-1].ns == median(samples_ns) / 4


def test_another_model_than_the_one_that_was_run_is_told_of(tmp_path: Path) -> None:
    file = written(tmp_path, bench_rows())
    with pytest.raises(ObserveError, match="model_n_params = 6,067,228,672, but --model has"):
        load_logs([file], Context("h200", "mixtral-8x7b"))
    with pytest.raises(ObserveError, match="give --model"):
        load_logs([file])


def test_another_quantization_than_the_one_that_was_run_is_told_of(tmp_path: Path) -> None:
    file = written(tmp_path, [row | {"model_size": 3_447_185_408} for row in bench_rows()])
    whole = {**MIXTRAL, "model": {"layers": 4}}
    with pytest.raises(ObserveError, match=r"model_size = 3,447,185,408 bytes, but --model has 12,134,457,344: give a"):
        load_logs([file], Context("h200", "mixtral-8x7b", whole))
    of_file = str(SAMPLES / "models" / "mixtral-8x7b.toml")
    assert len(load_logs([file], Context("h200", of_file, whole))) == 3


SERVED = {"completed": 100, "total_input_tokens": 20_000, "total_output_tokens": 10_000, "median_tpot_ms": 12.5}
VLLM = SERVED | {"max_concurrency": 4, "request_rate": "inf", "model_id": "m"}
SGLANG = SERVED | {"concurrency": 7.6, "max_concurrency": None, "mean_e2e_latency_ms": 900}
ONE_BATCH = {"run_name": "a", "batch_size": 2, "input_len": 64, "output_len": 32, "median_decode_latency": 0.02}


def test_a_servers_benchmark_is_a_step_of_as_many_sequences_as_run_at_once(tmp_path: Path) -> None:
    files = [written(tmp_path, VLLM, "vllm.json"), written(tmp_path, json.dumps(SGLANG), "sglang.jsonl"),
             written(tmp_path, json.dumps(ONE_BATCH), "batch.jsonl")]  # fmt: skip
    found = load_logs(files, Context("h200", "mixtral-8x7b"))
    assert [each.ns for each in found] == [12.5e6, 12.5e6, 20e6]
    workloads = [each.settings["workload"] for each in found]
    assert [each["batch"] for each in workloads] == [4, 8, 2]
    # A prompt of 200 and half of the 100 that follow; 64 and half of 32.
    assert [each["context"] for each in workloads] == [250, 250, 80]


def test_a_profilers_trace_is_its_marked_steps(tmp_path: Path) -> None:
    marks = [{"name": f"ProfilerStep#{n}", "cat": "user_annotation", "ts": n, "dur": 1000.0 * n} for n in (2, 3, 4)]
    on_gpu = [mark | {"cat": "gpu_user_annotation", "dur": 1.0} for mark in marks]
    files = [written(tmp_path, {"traceEvents": [{"name": "aten::mm", "dur": 5}, *marks, *on_gpu]}, f"{name}.json")
             for name in "ab"]  # fmt: skip
    found = load_logs(files, Context("h200", "mixtral-8x7b"))
    assert [(each.name, each.ns, each.samples) for each in found] == [
        ("a-1-profiled", 3e6, 3),
        ("b-1-profiled", 3e6, 3),
    ]
    assert found[0].spread == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (VLLM | {"max_concurrency": None}, "max_concurrency is not there"),
        (
            {key: value for key, value in VLLM.items() if key != "completed"},
            "lacks a part of it: KeyError: 'completed'",
        ),
        (VLLM | {"median_tpot_ms": 0}, "holds a time that is no number above 0"),
        (VLLM | {"median_tpot_ms": "fast"}, "could not convert"),
        ({"traceEvents": [{"name": "aten::mm"}]}, r"0 marks ProfilerStep#.*call profiler\.step\(\)"),
        ({"avg_latency": 1.0, "latencies": [1.0]}, "give the result of vllm bench serve"),
    ],
)
def test_a_benchmark_that_lacks_something_is_told_of(tmp_path: Path, row: Any, told: str) -> None:
    file = written(tmp_path, row)
    with pytest.raises(ObserveError, match=rf"log\.json: object 1: .*{told}") as caught:
        load_logs([file], Context("h200", "mixtral-8x7b"))
    assert "\n" not in str(caught.value)


def made(tmp_path: Path, truth: dict[str, float]) -> tuple[list[Observation], Predictor]:
    """Returns observations that simulations with other costs made."""
    found = load_logs([written(tmp_path, bench_rows())], context())
    predictor = Predictor(found, "llama.cpp", "simpy")
    return [replace(each, ns=predictor.ns(n, truth)) for n, each in enumerate(found)], predictor


def test_the_costs_that_made_the_times_are_found_again(tmp_path: Path) -> None:
    truth = {"step": 600_000.0, "cpu_cores": 0.5}
    observations, predictor = made(tmp_path, truth)
    fitted = fit(predictor, observations, list(truth))
    for name, value in truth.items():
        assert fitted.values[name] == pytest.approx(value, rel=0.1), name
        assert fitted.after[name] < fitted.before[name] / 2
    assert median_worst(errors(observations, fitted.predicted))[1] < 0.03
    assert max(map(abs, errors(observations, fitted.left_out))) >= max(map(abs, errors(observations, fitted.predicted)))
    shipped = [predictor.ns(n, {}) for n in range(3)]
    assert median_worst(errors(observations, shipped))[1] > 0.2


def test_costs_without_a_part_keep_their_priors_and_parallel_ones_are_reported(tmp_path: Path) -> None:
    observations, predictor = made(tmp_path, {"step": 400_000.0})
    fitted = fit(predictor, observations[:1], ["step", "layer", "cpu_cores"])
    assert fitted.values["cpu_cores"] == pytest.approx(fitted.priors["cpu_cores"])
    assert fitted.after["cpu_cores"] == pytest.approx(fitted.before["cpu_cores"])
    assert ("step", "layer") in fitted.sums
    assert "`cpu_cores` has no part" in fitted.helps
    with pytest.raises(ObserveError, match=r"--fit expert: llama\.cpp has no such cost"):
        fit(predictor, observations, ["expert"])


def test_guessing_is_a_cost_of_the_layers_that_guess() -> None:
    runtime = load_runtime("transformers")
    assert runtime.costs.layer is not None
    for guesses, more in ((False, 0), (True, 5_000)):
        changed = with_costs(runtime, {"layer": 70_000.0, "guess": 5_000.0}, guesses).costs.layer
        assert changed is not None and changed.ns == 70_000 + more


def test_the_command_writes_a_file_that_a_run_takes(tmp_path: Path) -> None:
    table = "memory.cpu_layers,memory.gpu_budget,tokens_per_second\n0,32experts,700\n4,1experts,60\n"
    file, out = written(tmp_path, table, "log.csv"), tmp_path / "mine.toml"
    settings = [
        "model.layers=4",
        "model.dtype=q4_k",
        "miss.cpu_gb_per_s=300",
        "miss.cpu_threads=8",
        "workload.prefill=skip",
    ]
    options = [option for each in settings for option in ("--set", each)]
    arguments = ["calibrate", "observe", str(file), "--runtime", "llama.cpp", "-o", str(out), "--machine", "h200",
                 "--model", "mixtral-8x7b", "--fit", "step", "--fit", "cpu_cores", *options]  # fmt: skip
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    assert "left out one by one: median error" in ran.output and "cpu_cores" in ran.output
    cores = tomllib.loads(out.read_text())["cpu_cores"]
    runtime, shipped = load_runtime(str(out)), load_runtime("llama.cpp")
    assert [core.bytes_per_second for core in runtime.cpu_cores] == [core["bytes_per_second"] for core in cores]
    assert all(core.source == "fitted" for core in runtime.cpu_cores)
    factors = {core.bytes_per_second / other.bytes_per_second
               for core, other in zip(runtime.cpu_cores, shipped.cpu_cores, strict=True)}  # fmt: skip
    assert max(factors) == pytest.approx(min(factors), rel=1e-6) and max(factors) != pytest.approx(1.0, rel=1e-3)
    assert runtime.costs.cpu_submit == load_runtime("llama.cpp").costs.cpu_submit


def test_a_table_whose_keys_are_no_scenarios_is_told_of(tmp_path: Path) -> None:
    file = written(tmp_path, "memory.gpu_bugdet,tokens_per_second\n25%,30\n50%,40\n", "log.csv")
    with pytest.raises(ObserveError, match=r"line 2: .*gpu_bugdet"):
        Predictor(load_logs([file], Context("h200", "mixtral-8x7b")), "transformers")


@pytest.mark.parametrize("name", ["decode", "llama.cpp"])
def test_the_report_is_of_the_committed_samples(name: str) -> None:
    report = json.loads((ROOT / "calibration" / "validation" / f"h200-{name}.json").read_text())
    assert len(report["rows"]) == {"decode": 31, "llama.cpp": 40}[name]
    if name == "decode":
        files = [SAMPLES / model / "decode.json.gz" for model in dict.fromkeys(row["model"] for row in report["rows"])]
        found = {each.name: each for each in load_logs(files, Context("h200"))}
        assert all(row["measured_ns"] == round(found[row["name"]].ns) for row in report["rows"])
        held = [row for row in report["rows"] if not row["fitted_to"]]
        assert sizes(held, "predicted_ns")[0] < sizes(held, "busiest_ns")[0] / 3
        mixtral = [row for row in held if row["model"] == "mixtral-8x7b"]
        assert sizes(mixtral, "predicted_ns")[1] < 0.02 and all(
            row["fitted_ns"] == row["predicted_ns"] for row in mixtral
        )
        predictor = Predictor([found[row["name"]] for row in mixtral[:1]], "transformers", "simpy")
        assert predictor.ns(0, {}) == pytest.approx(mixtral[0]["predicted_ns"], rel=1e-6)
