"""What commands print: fits 80 columns, has no rows of zeros, as many digits as are known, and a line a warning."""

from __future__ import annotations

from typing import Any

import pytest

import prestage
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.scenario import load_scenario
from prestage.experiments.bench import bench
from prestage.output.answer import answer_of, difference_of
from prestage.output.tables.layout import known_of
from prestage.output.tables.runs import known_digits, print_bench, print_result
from prestage.output.tables.sweeps import print_sweep

FEW = {
    f"workload.{key}": value for key, value in {"tokens": 4, "synthetic.tokens": 12, "synthetic.sequences": 1}.items()
}
FEW["workload.synthetic.prefill_tokens"] = 4


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def small(**settings: Any) -> dict[str, Any]:
    given = {**FEW, "model.layers": 2, **settings}
    return prestage.simulate("synthetic", settings=given, baselines=False).json_data()


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_a_run_says_three_lines_first_and_no_rows_of_zeros(capsys: pytest.CaptureFixture[str]) -> None:
    data = small()
    print_result(data)
    lines = printed(capsys)
    assert lines[0].startswith("gpt-oss-20b: 2 x 32 experts, top-4, ")
    assert lines[1].startswith("on h200-pcie5 by prestage; routing drawn, batch 1")
    assert "prefetches top-k by oracle, 1 ahead" in " ".join(lines[2:4])
    assert max(map(len, lines)) <= 80
    zeros = {name for name, number in data["counts"].items() if number == 0}
    assert not [line for line in lines if line.split()[:1] and line.split()[0] in zeros]
    assert not [line for line in lines if " 0.0%" in line or line.endswith(" -")]


def test_a_warning_is_a_line_with_its_remedy_and_told_whole_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    data = small()
    assert len(data["warnings"]) >= 2
    print_result(data)
    short = [line for line in printed(capsys) if line.startswith("warning: ")]
    assert len(short) == len(data["warnings"])
    assert "set predictor.latency_us to what yours takes" in " ".join(short)
    print_result(data, verbose=True)
    whole = " ".join(" ".join(printed(capsys)).split())
    assert all(warning in whole for warning in data["warnings"])


def test_gpus_that_are_alike_are_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    data = small()
    (gpu,) = data["gpus"]
    data["gpus"] = [{**gpu, "device": f"gpu{number}"} for number in range(8)]
    data["gpus"][3] = {**data["gpus"][3], "budget_bytes": 1 << 20}
    print_result(data)
    lines = printed(capsys)
    rows = [line for line in lines[lines.index("Each GPU") :] if line.startswith("gpu")]
    assert [row.split("  ")[0] for row in rows] == ["gpu0 and 6 alike", "gpu3"]


def rows(count: int, **figures: Any) -> list[dict[str, Any]]:
    data = {"tokens_per_second": 50.0, "hit_rate": 0.6, "late_rate": 0.0, "memory_utilization": 0.9, "error": None}
    data |= {"stall_ms": 1234.5, "speedup": 2.5, "prefetch_speedup": 0.96, **figures}
    return [
        {**data, "settings": {"memory.gpu_budget": "25%", "prefetch.lookahead": number}, "key": f"{number:08x}abc"}
        for number in range(count)
    ]


def test_a_sweep_fits_the_terminal_with_whole_keys_and_failed_rows_with_reasons(
    capsys: pytest.CaptureFixture[str],
) -> None:
    failed = [{**row, "error": "prefetch.k = 40: a layer has 32 experts"} for row in rows(3)]
    print_sweep([*rows(4), *failed])
    lines = printed(capsys)
    assert max(map(len, lines)) <= 80
    assert lines[0] == "The 4 fastest"
    assert lines[1].split()[:3] == ["gpu_budget", "lookahead", "tokens/s"] and "late" not in lines[1]
    assert [line.split()[-1] for line in lines[2:6]] == [f"{number:08x}" for number in range(4)]
    told = " ".join(" ".join(lines[6:]).split())
    assert told.startswith(
        "could not run (memory.gpu_budget = 25%, prefetch.lookahead = 0 and 2 more): prefetch.k = 40"
    )


def test_rows_that_ran_less_than_they_are_headed_by_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    short = "short trace: workload.tokens = 99, and the trace has 9; use a longer trace"
    asked, less = rows(2)
    print_sweep([{**asked, "warnings": ["estimated: costs"]}, {**less, "warnings": [short, "estimated: costs"]}])
    told = " ".join(" ".join(printed(capsys)[4:]).split())
    assert told == f"warning: {short} (memory.gpu_budget = 25%, prefetch.lookahead = 1)"


def test_a_bench_is_llama_benchs_two_tests(capsys: pytest.CaptureFixture[str]) -> None:
    scenario = load_scenario("default", ["model.layers=24", "memory.cpu_layers=", "seed=1"])
    data = bench(scenario, prompt=8, generated=4)
    assert [row["test"] for row in data["rows"]] == ["pp8", "tg4"]
    for row in data["rows"]:
        assert row["range"]["p5"] < row["tokens_per_second"] * 1.3 and row["range"]["p95"] > 0
    print_bench(data)
    lines = printed(capsys)
    assert lines[1].startswith("| model ") and lines[2].startswith("| ---")
    assert lines[3].split(" | ")[-2].strip() == "pp8" and " to " in lines[3]


def test_a_bench_without_the_scenarios_requests_is_of_all_its_gpus() -> None:
    machine = ["machine.gpu=2x rtx4060", "machine.ram=64GB DDR5-5600"]
    alone, beside = (
        load_scenario("one-gpu", [*machine, "model.layers=4", *each]) for each in ([], ["requests.rate=1"])
    )
    assert bench(beside, prompt=8, generated=4)["rows"] == bench(alone, prompt=8, generated=4)["rows"]


def test_a_bench_draws_its_routing() -> None:
    with pytest.raises(ScenarioError, match=r"workload.trace = 'guide': a bench draws its routing"):
        bench(load_scenario("guide"))


def test_a_comparison_begins_with_which_run_is_faster_by_how_much_and_in_which_parts_of_the_time() -> None:
    def run(rate: float, makespan_ms: float, **parts: float) -> dict[str, Any]:
        return {"tokens_per_second": rate, "makespan_ms": makespan_ms, "time": parts}

    first = run(10.0, 100.0, compute_ms=60.0, stall_ms=40.0, host_ms=0.0)
    second = run(8.0, 125.0, compute_ms=50.0, stall_ms=74.5, host_ms=0.5)
    assert difference_of(first, second, ("a", "b")) == (
        "b is 20% slower than a: 8.000 tokens per second against 10.00. Its run takes 25.0 ms longer: "
        "34.5 ms more waiting for experts' bytes, 10.0 ms less computing."
    )
    assert difference_of(second, first, ("b", "a")).startswith("a is 25% faster than b: ")
    assert difference_of(first, first, ("a", "b")) == "b is as fast as a: 10.00 tokens per second against 10.00."
    assert difference_of(first, {**second, "tokens_per_second": None}, ("a", "b")) == ""


def test_a_report_begins_with_the_question_the_answer_what_binds_and_what_helps() -> None:
    data = small(**{"predictor.latency_us": 5})
    said = answer_of(data)
    share = data["time"]["stall_ms"] / data["makespan_ms"]
    assert said.startswith("How fast does gpt-oss-20b decode on h200-pcie5, by prestage, with room for 25% of its")
    assert f"{share:.0%} of the time is waiting for experts' bytes" in said
    assert f" to {known_of(data['range']['tokens_per_second']['p95'], known_digits(data))}, as not all costs" in said
    assert "What would help" in said
    computing = {**data, "warnings": [], "time": {"compute_ms": 9.0, "stall_ms": 1.0}, "makespan_ms": 10.0}
    assert answer_of(computing).endswith("; no cache and no prefetch shortens it.")
    free = {**data, "range": {"tokens_per_second": {"p5": 10.0, "p50": 10.0, "p95": 10.0}}}
    assert " to " not in answer_of(free).partition("?")[2].partition("tokens per second")[2].partition(".")[0]
    warned = {**data, "warnings": ["cliff: it falls; use a budget"]}
    assert answer_of(warned).endswith("What would help (cliff): use a budget.")
