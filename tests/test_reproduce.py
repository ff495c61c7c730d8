"""Published tables run again: the verdicts are right, and the command prints every figure."""

import json
import sys
from typing import Any

import pytest

from prestage import cli
from prestage.engine.reproduce import TABLES, VIRTUAL_MEMORY


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
    assert [row["scenario"] for row in data["rows"]] == list(VIRTUAL_MEMORY)
    for row in data["rows"]:
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
    assert command(monkeypatch, "reproduce") == 0
    shown = capsys.readouterr().out
    for row in rows:
        assert row["scenario"] in shown
        assert f"{row['guide_accounting']['avg_latency_ms']:.2f} ms" in shown
        assert f"{row['guide_accounting']['copies_charged']['avg_latency_ms']:.2f} ms" in shown


def test_an_unknown_table_is_one_line_and_exit_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "reproduce", "virtual") == 2
    assert capsys.readouterr().err == "prestage: TABLE = 'virtual': choose one of virtual-memory" + (
        " (did you mean 'virtual-memory'?)\n"
    )
