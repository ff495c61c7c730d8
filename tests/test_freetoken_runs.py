"""Whole runs of FreeToken: what it is given, and what is written of each run, also when it is not there."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from prestage.calibration.freetoken import compared, runs

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

#: An engine with FreeToken's face, as far as it is used: a step a token, and slots that can be changed.
ENGINE = {
    "core.py": "class SamplingParams:\n    def __init__(self, **keys): self.keys = keys\n",
    "cli.py": "def main(words): open(words[-1], 'w').write('{}')\n",
    "models/__init__.py": "",
    "models/weight.py": "",
    "llm.py": """
import time, types
import torch
class LLM:
    def __init__(self, folder, **keys):
        assert keys["use_dummy_weight"] and keys["moe_cache_size"] in (0, 16)
        self.cache = types.SimpleNamespace(cache_size=keys["moe_cache_size"], reset_stats=lambda: None,
                                           decode_miss_stats=lambda: {"miss_rate": 1 - self.cache.cache_size / 16})
        weights = {"norm": torch.zeros(4), "o_proj": torch.ones(4, 4), "gate": torch.ones(4, 4)}
        self.engine = types.SimpleNamespace(model=types.SimpleNamespace(state_dict=lambda: weights),
                                            moe_offload_cache=self.cache)
    def rebuild_cache(self, moe_cache_size): self.cache.cache_size = moe_cache_size
    def offline_send_result(self, reply): pass
    def generate(self, prompts, sampling):
        for _ in range(sampling.keys["max_tokens"] + 1):
            time.sleep(1e-5)
            self.offline_send_result([])
""",
}


def small_model(folder: Path) -> Path:
    from test_llama_cpp import SHAPES

    file = folder / "small.toml"
    file.write_text(SHAPES.format(attention='qk_norm = "head"', moe=""), encoding="utf-8")
    return file


def ran(tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    out = tmp_path / "out.jsonl"
    assert runs.main([str(small_model(tmp_path)), str(out), "--layers", "2", "--threads", "1", *options]) in (0, 1)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_each_way_runs_with_all_numbers_of_slots_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in ENGINE.items():
        (tmp_path / "engine/freetoken" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "engine/freetoken" / name).write_text(text, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "engine"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(runs, "WAYS", (("offload", True), ("hybrid", False), ("cpu", False)))
    rows = ran(tmp_path, "--rounds", "2", "--seconds", "300")
    assert [row["status"] for row in rows if "status" in row] == [0] * 4, rows
    measured = [row for row in rows if "steps_s" in row]
    slots = {
        way: sorted(row["slots"] for row in measured if row["way"] == way and row["round"] == 1)
        for way in ("offload", "hybrid", "cpu")
    }
    assert slots == {"offload": [4, 8, 12, 16], "hybrid": [4, 8, 12, 16], "cpu": [0]}
    assert all(len(row["steps_s"]) > 100 and min(row["steps_s"]) > 0 for row in measured)
    assert all("missed" in row for row in measured if row["way"] == "offload")


def test_where_the_engine_stops_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "WAYS", (("offload", True),))
    rows = ran(tmp_path, "--seconds", "60")
    stopped = [row for row in rows if "status" in row]
    assert len(stopped) == 2 and all(row["status"] == 1 for row in stopped)
    assert all("No module named 'freetoken'" in row["messages"] for row in stopped)


def test_a_model_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.main(["mixtral-8x7b", str(tmp_path / "out.jsonl")]) == 2
    assert "mixtral-8x7b': give one of Qwen3-MoE's kind, such as qwen3-30b-a3b" in capsys.readouterr().err


def test_runs_are_compared_with_what_is_predicted_as_shipped(tmp_path: Path) -> None:
    def row(way: str, slots: int, number: int, ms: float, **more: Any) -> dict[str, Any]:
        return {"way": way, "slots": slots, "experts": 128, "round": number, "steps_s": [ms / 1e3] * 3, **more}

    counted = {"missed": {"miss_rate": 0.75}}
    # A sharing engine that counts is slower for it: its time is left out, what it counts is not.
    rows = [row("offload", 32, n, ms, **counted) for n, ms in enumerate((2.0, 3.0, 2.5))]
    rows += [row("hybrid", 32, 0, 1.5), row("hybrid", 32, 0, 9.0, **counted), row("cpu", 0, 0, 4.0)]
    file, bandwidths = tmp_path / "runs.jsonl", tmp_path / "bandwidths.json"
    file.write_text("".join(json.dumps(each) + "\n" for each in [{"command": []}, *rows]), encoding="utf-8")
    bandwidths.write_text(json.dumps({"ceilings": {"cpu_stream_read_gbs": 90.0}}), encoding="utf-8")
    found = {each["way"]: each for each in compared.measured(file)}
    assert [found[way]["measured_ns"] for way in ("offload", "hybrid", "cpu")] == pytest.approx([2.5e6, 1.5e6, 4e6])
    assert (found["hybrid"]["missed"], found["cpu"]["missed"], found["offload"]["rounds"]) == (0.75, None, 3)
    out = tmp_path / "report.json"
    options = ["--model", "qwen3-30b-a3b", "--layers", "1", "--threads", "8", "-o", str(out)]
    assert compared.main([str(file), str(bandwidths), *options]) == 0
    said = {each["way"]: each["predicted_ns"] for each in json.loads(out.read_text(encoding="utf-8"))["rows"]}
    assert set(said) == {"offload", "hybrid", "cpu"} and min(said.values()) > 1e5
    assert said["hybrid"] < said["cpu"], "sharing with the processor takes less than the processor alone"


def test_a_file_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, bandwidths = tmp_path / "runs.jsonl", tmp_path / "bandwidths.json"
    file.write_text('{"status": 1}\n', encoding="utf-8")
    bandwidths.write_text('{"ceilings": {"cpu_stream_read_gbs": 90.0}}', encoding="utf-8")
    options = ["--model", "qwen3-30b-a3b", "--layers", "1", "--threads", "8", "-o", str(tmp_path / "report.json")]
    assert compared.main([str(file), str(bandwidths), *options]) == 2
    assert "no run has ended" in capsys.readouterr().err
