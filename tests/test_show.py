"""`prestage show` and models' names as scenarios: what would run, and where each value comes from."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from test_cli import Prestage
from test_cli import prestage as prestage

from prestage.engine.load import load_inputs
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.origins import origins, toml_of
from prestage.engine.scenario.scenario import load_scenario, make_scenario, scenario_names
from prestage.engine.simulate import simulate
from prestage.output.tables.layout import known_of, size_of, time_of
from prestage.workloads.fitted import FittedRouting, shipped_fits
from prestage.workloads.model import load_model, preset_names


def origin_of(name: str | None, settings: list[str]) -> dict[str, str]:
    return {key.key: key.origin for key in origins(name, settings)[1]}


def test_each_value_says_who_gave_it() -> None:
    who = origin_of("one-gpu", ["runtime.name=llama.cpp", "memory.cpu_layers=4", "machine.gpu=rtx3090"])
    assert who["memory.cpu_layers"] == who["machine.profile"] == who["runtime.name"] == "--set"
    assert who["model.preset"] == "scenario one-gpu"
    assert who["miss.policy"] == who["memory.eviction"] == "runtime llama.cpp"
    assert who["copy.chunk_bytes"] == "default"
    assert who["memory.gpu_budget"] == "follows from others"  # all that total_bytes leaves


@pytest.mark.parametrize("name", scenario_names())
def test_the_whole_toml_of_a_scenario_is_that_scenario(name: str) -> None:
    scenario, keys = origins(name)
    assert scenario == load_scenario(name)
    again = make_scenario(tomllib.loads(toml_of(keys)))
    assert again.plain() == scenario.plain()


@pytest.mark.parametrize("name", sorted({*preset_names()} - {*scenario_names()}))
def test_a_models_name_is_a_scenario(name: str) -> None:
    scenario = load_scenario(name)
    assert (scenario.model.preset, scenario.memory.total_bytes) == (name, "95%")


@pytest.mark.parametrize("name", ["mixtral-8x7b", "default", "mine"])
def test_a_scenarios_file_goes_before_what_ships_under_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prestage: Prestage
) -> None:
    (tmp_path / name).write_text(
        "[model]\npreset = 'olmoe-1b-7b'\n[workload]\ntokens = 3\n[workload.synthetic]\ntokens = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_scenario(name).model.preset == "olmoe-1b-7b"
    for parts in [], ["--gpu", "rtx4090"]:
        shown = json.loads(prestage("show", name, *parts, "--json").out)
        assert (shown["model"]["name"], shown["scenario"]["workload"]["tokens"]) == ("olmoe-1b-7b", 3)


def test_a_name_that_nothing_has_is_refused_with_the_nearest() -> None:
    with pytest.raises(ScenarioError, match=r"a model's name, FILE.toml \(did you mean 'gpt-oss-20b'\?\)"):
        load_scenario("gpt-os-20b")


@pytest.mark.parametrize("name", shipped_fits())
def test_a_shipped_fit_is_of_the_model_of_its_name(name: str) -> None:
    fit, model = FittedRouting.load(name), load_model(name)
    assert (len(fit.layers), fit.num_experts, fit.top_k) == (model.layers, model.experts, model.top_k)


def test_another_model_or_a_skew_takes_a_shipped_fit_out() -> None:
    for setting in ("model.preset=mixtral-8x7b", "workload.synthetic.skew=1"):
        synthetic = load_scenario("default", [setting]).workload.synthetic
        assert synthetic is not None and synthetic.fit is None
    inputs = load_inputs(load_scenario("default", ["workload.tokens=2"]))
    assert inputs.trace.meta["fitted_to"] == "openai/gpt-oss-20b"


def test_show_prints_what_differs_and_runs_nothing(prestage: Prestage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ran = prestage("show", "gpt-oss-20b", "--gpu", "rtx4060", "--ram", "32GB DDR5-5600", "--runtime", "llama.cpp")
    assert (ran.status, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0].startswith("gpt-oss-20b: 24 x 32 experts, top-4, 9.47 GiB")
    assert "experts" in ran.out and "runtime llama.cpp" in ran.out and "tokens per second" not in ran.out
    assert max(map(len, lines)) <= 80
    data = json.loads(prestage("show", "--json").out)
    assert {"scenario", "keys", "model", "capacity", "runtime"} < data.keys()
    shown = {key["key"] for key in data["keys"] if key["value"] != key["default"]}
    assert "model.preset" in shown and "copy.discipline" not in shown


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (known_of(26.7712, 3), "26.8"),
        (known_of(1363.384, 4), "1,363"),
        (known_of(9.99, 2), "10"),
        (known_of(0.0, 3), "0"),
        (known_of(None, 3), "-"),
        (time_of(0.669, 3), "669 us"),
        (time_of(8026.0, 3), "8,030 ms"),
        (time_of(24278.9, 3), "24.3 s"),
        (size_of(13.3 * 2**20), "13.3 MiB"),
        (size_of(12), "12 B"),
    ],
)
def test_numbers_have_the_digits_that_are_known_and_units_for_people(said: str, wanted: str) -> None:
    assert said == wanted


def test_what_can_be_told_before_a_run_is_shown_with_its_reason(prestage: Prestage) -> None:
    settings = ["memory.gpu_budget=24GiB", "machine.drive=2TB 7GB/s"]
    asked = [part for setting in settings for part in ("--set", setting)]
    said = " ".join(prestage("show", "default", *asked).out.split())
    assert "warning: capped budget: memory.gpu_budget = 24GiB is more than the 3.74 GiB that dense weights" in said
    assert "leave of memory.total_bytes = 7.60 GiB, and experts have only those" in said
    assert "warning: idle drive: nothing is read from machine.drive" in said
    told = json.loads(prestage("show", "default", *asked, "--json").out)["warnings"]
    assert set(told) < set(simulate(load_scenario("default", settings), baselines=False).data["warnings"])
    assert not json.loads(prestage("show", "--json").out)["warnings"]
