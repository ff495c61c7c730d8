"""The commands of machines, and a run that names a model and parts on its command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from gguf_files import OUTSIDE, block, facts, write
from test_cli import CONFIGS

from prestage.cli import main
from prestage.cli.own import Own
from prestage.engine.scenario.scenario import load_scenario
from prestage.resources.parts.detect import Detected
from prestage.resources.profile import load_profile

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def prestage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`prestage ARGUMENTS…` in this process, in an empty folder: exit status, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["prestage", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        return (int(left.value.code or 0), *capsys.readouterr())

    return call


def test_tables_of_parts_are_listed_whole_or_by_kind(prestage: Call) -> None:
    assert "rtx4090" in prestage("machine", "list", "gpus")[1]
    tables = json.loads(prestage("machine", "list", "--json")[1])
    assert {"gpus", "cpus", "drives", "links", "memories", "profiles"} == set(tables)
    status, _, err = prestage("machine", "list", "gpu")
    assert status == 2 and "did you mean 'gpus'" in err


def test_a_machine_is_written_as_a_profile_whose_costs_are_those_of_its_parts(prestage: Call, tmp_path: Path) -> None:
    parts = ["--gpu", "2x rtx3090", "--ram", "128GB DDR4-3200", "--link", "pcie4 x8", "--cpu", "5950x"]
    assert prestage("machine", "make", *parts, "-o", "two.json")[:2] == (0, "two.json\n")
    made = load_profile(str(tmp_path / "two.json"))
    same = load_profile("gpu=2x rtx3090, link=pcie4 x8, cpu=5950x, ram=128GB DDR4-3200")
    assert made.name == "two"
    assert made.model_copy(update={"name": same.name}) == same
    # Named as `show` takes them, but for the link, which an option says.
    said = "gpu=2x rtx3090, link=pcie3 x1, cpu=5950x, ram=128GB DDR4-3200"
    assert prestage("machine", "make", said, "--link", "pcie4 x8", "-o", "said.json")[0] == 0
    assert load_profile(str(tmp_path / "said.json")).model_copy(update={"name": same.name}) == same
    shown = json.loads(prestage("machine", "show", "two.json", "--json")[1])
    assert shown["profile"] == "two" and len(shown["costs"]) > 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["machine", "make", "--ram", "64GB"], "--gpu: missing: name the machine's GPU"),
        (["machine", "make", "ram=64GB"], "--gpu: missing: name the machine's GPU"),
        (["machine", "make", "h200"], "'h200': write it as gpu=rtx4090"),
        (["machine", "make", "--gpu", "rtx4091", "-o", "my.json"], "did you mean 'rtx4090'"),
        (["machine", "make", "--gpu", "rtx4090", "-o", "my.toml"], "a profile is a .json file"),
        (["machine", "show", "gpu=nothing"], "machine.gpu = 'nothing': no such part; see `prestage machine list gpus`"),
        (["run", "--gpu", "rtx4090", "--ram", "much"], "machine.ram = 'much': write it as '2x DDR5-5600'"),
        (["run", "--model", "nothing"], "model 'nothing': "),
    ],
)
def test_what_is_no_machine_is_refused_in_a_line(prestage: Call, arguments: list[str], message: str) -> None:
    status, out, err = prestage(*arguments)
    assert (status, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_this_machine_is_told_as_a_profiles_name(prestage: Call) -> None:
    data = json.loads(prestage("machine", "detect", "--json")[1])
    assert set(data) == {"profile", "parts", "missing"}
    assert prestage("machine", "detect")[0] == 0


def test_shares_are_told(prestage: Call) -> None:
    rows = json.loads(prestage("machine", "shares", "--json")[1])["shares"]
    printed = prestage("machine", "shares")[1]
    assert len(rows) == len(printed.splitlines())
    assert "link: 0." in printed


#: What makes a run quick: three tokens.
FEW = ["--set", "workload.tokens=3", "--set", "workload.synthetic.prefill_tokens=2", "--no-baselines", "--json"]


def test_a_config_json_on_two_gpus_is_one_command_and_writes_nothing(prestage: Call, tmp_path: Path) -> None:
    config = str(CONFIGS / "Mixtral-8x7B-v0.1.json")
    status, out, err = prestage("run", "--model", config, "--gpu", "2x rtx3090", "--ram", "128GB DDR4-3200", *FEW)
    assert (status, err) == (0, "")
    data: dict[str, Any] = json.loads(out)
    assert (data["model"]["name"], data["model"]["layers"]) == ("Mixtral-8x7B-v0.1", 32)
    assert len(data["gpus"]) == 2
    assert data["tokens_per_second"] > 0
    assert not list(tmp_path.iterdir())


def test_a_gguf_file_on_this_machine_is_one_command_and_writes_nothing(prestage: Call, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write(path, facts("tiny"), [*OUTSIDE, *block(0), *block(1)])
    told = Detected({"gpu": "rtx4090", "link": "pcie4 x16", "cpu": "7950x", "ram": "64GB"}, [])
    with patch("prestage.resources.parts.detect.detect", return_value=told):
        status, out, err = prestage("run", "--model", str(path), "--gpu", "detect", "--ram", "64GB DDR5-5600", *FEW)
    assert (status, err) == (0, "")
    data: dict[str, Any] = json.loads(out)
    assert data["model"] | {"name": "Tiny", "layers": 2, "experts": 4, "top_k": 2} == data["model"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_on_parts_is_one_command(prestage: Call) -> None:
    status, out, err = prestage("run", "--model", "gpt-oss-120b", "--gpu", "rtx4090", "--ram", "64GB DDR5-5600", *FEW)
    assert (status, err) == (0, "")
    data: dict[str, Any] = json.loads(out)
    assert data["model"]["name"] == "gpt-oss-120b"
    assert data["scenario"]["machine"] == {"profile": "gpu=rtx4090, ram=64GB DDR5-5600"}
    gpu = next(memory for memory in data["capacity"]["memories"] if memory["kind"] == "gpu")
    assert gpu["share"] == pytest.approx(0.95, abs=0.01)


def test_options_are_settings_of_a_scenario() -> None:
    alone = Own(model="gpt-oss-20b", gpu="2x rtx3090", ram="64GB DDR4-3200")
    scenario = load_scenario(alone.scenario(None), alone.settings(None))
    assert scenario.machine.profile == "gpu=2x rtx3090, ram=64GB DDR4-3200"
    assert (scenario.model.preset, scenario.parallel.stages) == ("gpt-oss-20b", 2)
    assert alone.scenario("synthetic") == "synthetic"
    assert load_scenario("synthetic", alone.settings("synthetic")).parallel.stages == 2
    assert load_scenario("placement-8", alone.settings("placement-8")).parallel.stages == 1  # it says what GPUs do
    ram = Own(ram="128GB DDR5-5600")
    scenario = load_scenario(ram.scenario(None), ram.settings(None))
    assert scenario.machine.profile == "gpu=rtx4090, ram=128GB DDR5-5600"
    assert Own().scenario(None) is None and Own().settings(None) == []
