"""Published tables run again: the verdicts are right, and the command prints every figure."""

import json
import sys
from dataclasses import replace
from typing import Any

import pytest

from prestage import cli
from prestage.guide import reproduce
from prestage.guide.inference import InferenceConfig, InferenceSimulator
from prestage.guide.reproduce import TABLES, VIRTUAL_MEMORY, Row

pytestmark = pytest.mark.slow

MISS, HIT = 3.41, 0.07


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["prestage", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return TABLES["virtual-memory"]()


def test_the_guides_table_prints_ours_beside_the_published_ranges(
    rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TABLES, "virtual-memory", lambda: rows)
    assert command(monkeypatch, "reproduce", "virtual-memory", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    shown = data["tables"]["virtual-memory"]
    assert [row["scenario"] for row in shown] == list(VIRTUAL_MEMORY)
    for row in shown:
        ours = row["guide_accounting"]
        assert ours["accesses"] == 500 * 12
        # The guide's formula: what the counts cost.
        counts = ours["event_counts"]
        assert ours["total_latency_ms"] == pytest.approx(
            3.41 * counts["miss"] + 0.07 * (counts["hit"] + counts["cache_hit"])
        )
        assert (
            ours["copies_charged"]["avg_latency_ms"] > row["overlapped"]["time_per_access_ms"] > ours["avg_latency_ms"]
        )
        for key, (low, high) in row["published"].items():
            verdict = row["verdicts"][key]
            assert verdict["ours"] == ours[key]
            assert verdict["inside"] == (low <= ours[key] <= high)
            nearest = min(max(ours[key], low), high)
            assert verdict["off_by"] == pytest.approx(ours[key] - nearest)
            assert verdict["why"]


def test_the_table_reads_as_text(
    rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TABLES, "virtual-memory", lambda: rows)
    assert command(monkeypatch, "reproduce", "virtual-memory") == 0
    shown = capsys.readouterr().out
    for row in rows:
        assert row["scenario"] in shown
        assert f"{row['guide_accounting']['avg_latency_ms']:.2f} ms" in shown
        assert f"{row['guide_accounting']['copies_charged']['avg_latency_ms']:.2f} ms" in shown


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> InferenceConfig:
    """The inference tables over fewer tokens, so that they are quick."""
    config = InferenceConfig(num_simulation_tokens=30)
    monkeypatch.setattr(reproduce, "_workloads", lambda: iter([("a short trace", config)]))
    return config


def named(table: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in TABLES[table]()}


def test_a_verdict_says_inside_or_how_far_from_the_nearer_end() -> None:
    for ours, inside, off_by in ((1.7, False, -0.1), (1.8, True, 0), (2.2, True, 0), (2.5, False, 0.3)):
        verdict = Row("", "x", (1.8, 2.2), ours, None, None, "").data()["verdict"]
        assert (verdict["inside"], verdict["off_by"]) == (inside, pytest.approx(off_by))
    assert Row("", "x", None, 2.0, None, None, "").data()["verdict"] is None


def test_transfers_are_the_published_ones_and_the_lane_copies_one_by_one() -> None:
    rows = named("transfers")
    assert rows["CPU to GPU, one"]["ours"] == rows["CPU to GPU, one"]["overlapped"] == MISS
    assert rows["CPU to GPU, ten"]["ours"] == pytest.approx(40.73, abs=1e-5)
    # Ten pageable copies of 3.41 ms, with nine enqueues of 6.5 us on the host between them.
    assert rows["CPU to GPU, ten"]["overlapped"] == pytest.approx(10 * MISS + 9 * 0.0065)
    assert rows["CPU to GPU, throughput"]["ours"] == pytest.approx(270 / 40.73, abs=1e-5)
    assert rows["GPU to GPU, ten"]["ours"] == pytest.approx(0.68, abs=1e-5)
    assert rows["GPU to GPU, throughput"]["verdict"]["off_by"] == pytest.approx(270 / 0.68 - 397.5, abs=0.01)
    assert rows["allocation, one"]["ours"] == 0.05
    assert rows["allocation, ten"]["ours"] == pytest.approx(0.36, abs=1e-5)


def test_the_speedup_is_the_simulators_and_theory_is_the_formula(short: InferenceConfig) -> None:
    rows = named("inference")
    metrics = InferenceSimulator(short).run_simulation()
    row = rows["speed-up, oracle on a short trace"]
    assert row["ours"] == metrics["speedup"] == pytest.approx(MISS / (MISS - metrics["hit_rate"] * (MISS - HIT)))
    assert row["charged"] == metrics["copies_charged"]["speedup"]
    assert row["overlapped"] == metrics["overlapped"]["speedup"]
    assert rows["speed-up, theoretical"]["ours"] == pytest.approx(MISS / (MISS - 0.3386 * (MISS - HIT)))
    assert rows["speed-up, theoretical"]["published"] == [2.05, 2.15]


def test_the_best_context_is_the_one_with_the_highest_speedup(short: InferenceConfig) -> None:
    rows = named("context-length")
    best = rows["best context, mixture on a short trace"]
    speedups = {length: rows[f"speed-up, context {length} on a short trace"]["ours"] for length in range(1, 7)}
    assert speedups[best["ours"]] == max(speedups.values())
    assert best["verdict"]["off_by"] == best["ours"] - 3


def test_a_trained_predictors_scores_are_read_where_they_are(
    monkeypatch: pytest.MonkeyPatch, short: InferenceConfig
) -> None:
    scores = {
        str(n): {"horizons": [{"top1": top1, "recall": {"4": 0.8}}]} for n, top1 in ((1, 0.2), (3, 0.4), (6, 0.3))
    }
    sizes = [{"name": "frequency", "memory_bytes": None}, {"name": "learned", "memory_bytes": 2**20}]
    report = {"gpt-oss-20b contexts": {"context": scores}, "guide": {"predictors": sizes}}
    monkeypatch.setattr(reproduce, "_evaluation", lambda: report)
    rows = named("context-length")
    assert rows["top-1, trained, context 3"]["ours"] == 0.4
    assert rows["best context, trained"]["verdict"]["inside"]
    # 12 x 128 experts of 27 MiB.
    overheads = named("memory-overhead")
    assert overheads["memory of predictor learned"]["ours"] == pytest.approx(1 / (12 * 128 * 27))
    assert "memory of predictor frequency" not in overheads


def test_what_caching_adds_is_one_speedup_over_the_other(
    monkeypatch: pytest.MonkeyPatch, short: InferenceConfig
) -> None:
    # Room for all experts of six layers, so that caching must add something.
    config = replace(short, num_layers=6, gpu_memory_limit_mb=27.0 * 6 * 128)
    monkeypatch.setattr(reproduce, "_workloads", lambda: iter([("ample memory", config)]))
    (row,) = TABLES["caching"]()
    with_, without = (
        InferenceSimulator(replace(config, enable_caching=kept)).run_simulation() for kept in (True, False)
    )
    assert row["ours"] == with_["speedup"] / without["speedup"] - 1 > 0.1
    assert row["overlapped"] == with_["overlapped"]["speedup"] / without["overlapped"]["speedup"] - 1
    assert row["published"] == pytest.approx([0.15, 0.25])


def test_contradictions_have_both_statements_and_what_the_profile_holds() -> None:
    rows = named("contradictions")
    stated = {name: row["statements"] for name, row in rows.items()}
    assert stated["GPU to GPU over CPU to GPU"] == [2.7, 49.0]
    assert stated["CPU to GPU, ten experts"] == [2.74, 40.73]
    assert stated["allocation, one expert"] == [1.0, 0.05]
    assert rows["GPU to GPU over CPU to GPU"]["ours"] == pytest.approx(MISS / HIT)
    assert rows["allocation, one expert"]["apart"] == 20


@pytest.mark.parametrize("table", ["transfers", "memory-overhead", "contradictions"])
def test_every_row_is_printed_with_its_reason(
    table: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert command(monkeypatch, "reproduce", table) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for row in TABLES[table]():
        assert " ".join(f"{row['name']}: {row['why']}.".split()) in shown


def test_several_tables_run_in_the_order_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "reproduce", "memory-overhead", "transfers", "--json") == 0
    assert list(json.loads(capsys.readouterr().out)["tables"]) == ["memory-overhead", "transfers"]


def test_an_unknown_table_is_one_line_and_exit_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "reproduce", "transfers", "virtual") == 2
    assert capsys.readouterr().err == f"prestage: TABLE = 'virtual': choose one of {', '.join(TABLES)}" + (
        " (did you mean 'virtual-memory'?)\n"
    )
