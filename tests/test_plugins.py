"""Plug-ins: code from outside the package works in every command, in workers, and where a row is run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from prestage import plugins
from prestage.cli.entry import _status as status
from prestage.engine.policies.eviction import EVICTION
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.rows import read_rows
from prestage.engine.scenario.scenario import load_scenario
from prestage.errors import InputError
from prestage.experiments.sweep import sweep

#: Most recently used, as docs/add-a-policy.md has it.
MRU = """
from collections import OrderedDict
from prestage.engine.policies.eviction import EVICTION, Eviction

class Mru(Eviction):
    def __init__(self, setting):
        super().__init__(setting)
        self.order = OrderedDict()

    def admit(self, expert, demanded):
        self.order[expert] = None
        self.order.move_to_end(expert, last=False)

    def use(self, expert, weight):
        self.order.move_to_end(expert, last=False)

    def evict(self, expert):
        del self.order[expert]

    def victims(self):
        return iter(self.order)

EVICTION["mru"] = Mru
"""
SMALL = ["workload.tokens=6", "memory.gpu_budget=16experts"]


@pytest.fixture
def mru(tmp_path: Path) -> Iterator[Path]:
    """A plug-in's file; what it adds is gone after the test."""
    file = tmp_path / "mru.py"
    file.write_text(MRU, encoding="utf-8")
    with patch.dict(EVICTION), patch.dict(plugins._loaded), patch.object(plugins, "_asked", set()):
        yield file


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert status(arguments) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("way", ["{}", "={}"])
def test_a_run_goes_by_a_policy_of_ones_own(mru: Path, way: str, capsys: pytest.CaptureFixture[str]) -> None:
    plugged = ["--plugin", str(mru)] if way == "{}" else [f"--plugin={mru}"]
    sets = [word for setting in [*SMALL, "memory.eviction=mru"] for word in ("--set", setting)]
    data = json.loads(printed(["run", *plugged, *sets, "--no-baselines", "--json"], capsys))
    assert data["scenario"]["memory"]["eviction"] == "mru"
    assert data["counts"]["evict"] > 0


def test_without_it_the_policy_is_unknown(mru: Path) -> None:
    with pytest.raises(ScenarioError, match=r"eviction = 'mru'"):
        load_scenario("guide", ["memory.eviction=mru"])


@pytest.mark.process
def test_workers_load_what_began_the_sweep_and_a_row_says_so(mru: Path, tmp_path: Path) -> None:
    plugins.load_plugin(mru)
    grid = {"memory.eviction": ["lru", "mru"]}
    rows = list(sweep("guide", grid, settings=SMALL, out=tmp_path / "rows.jsonl", workers=2))
    assert [row["error"] for row in rows] == [None, None]
    assert rows[1]["plugins"] == [str(mru)]
    again = f"{tmp_path / 'rows.jsonl'}#{rows[1]['key']}"
    assert load_scenario(again).memory.eviction == "mru"
    plugins._loaded.clear()
    with pytest.raises(ScenarioError, match=f"ran with plug-ins: add --plugin {mru}"):
        load_scenario(again)


def test_a_plug_in_that_changes_makes_other_rows(mru: Path, tmp_path: Path) -> None:
    keys: list[str] = []
    for comment in ("", "# another\n"):
        mru.write_text(MRU + comment, encoding="utf-8")
        plugins.load_plugin(mru)
        rows = sweep("guide", {"workload.tokens": [4]}, out=tmp_path / f"rows{len(keys)}.jsonl", workers=1)
        keys += [row["key"] for row in rows]
    assert len(set(keys)) == 2


def test_a_worker_that_finds_another_file_refuses(mru: Path) -> None:
    plugin = plugins.load_plugin(mru)
    mru.write_text(MRU + "# changed\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"this worker finds another file there"):
        plugins.load_same([plugin])


def card(**changes: str) -> str:
    """A file that adds a card, with some of its figures changed, or left out where nothing is given."""
    figures = {"name": "'mine'", "title": "'Mine'", "memory_bytes": "'8GB'", "memory_bytes_per_second": "'448GB/s'"}
    figures |= {
        "flops_per_second": "{'float32': '19TFLOP/s'}",
        "link": "'pcie4 x8'",
        "source": "'its maker'",
        **changes,
    }
    given = ", ".join(f"{name}={value}" for name, value in figures.items() if value)
    return f"from prestage.resources.parts.tables import Gpu, gpus\ngpus()['mine'] = Gpu({given})\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def f(:\n", "line 1: SyntaxError"),
        ("x = 1\nEVICTION['mine'] = 1\n", "line 2: NameError: name 'EVICTION' is not defined"),
        (card(source=""), "line 2: Gpu: source: Field required"),
        (card(link=""), "line 2: Gpu: mine: link: say what it is plugged into, such as 'pcie4 x16'; or unified = True"),
        (
            card(flops_per_second="{'int8': 9}"),
            "line 2: Gpu: mine: flops_per_second: give that of bfloat16, float16 or",
        ),
        (card(memory_bytes_per_second="448"), "line 2: .*448 bytes a second: write it with its unit, '448GB/s'"),
    ],
)
def test_a_plug_in_that_fails_is_one_line_that_says_where(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"plugin '{file}': .*{says}"):
        plugins.load_plugin(file)
    assert not any(name.startswith("prestage_plugin_bad_") for name in sys.modules)


@pytest.mark.parametrize(
    ("name", "says"),
    [("nosuch.py", "cannot be read: No such file"), ("no.such.module", "neither a Python file"), ("", "neither")],
)
def test_a_plug_in_that_is_not_there_is_refused(name: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        plugins.load_plugin(name)


def test_an_option_without_a_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["run", "--plugin"]) == 2
    assert "--plugin: name a Python file or a module" in capsys.readouterr().err


@pytest.mark.process
def test_the_environment_names_plug_ins_for_python_too(tmp_path: Path) -> None:
    file = tmp_path / "mru.py"
    file.write_text(MRU, encoding="utf-8")
    code = "import prestage; print('mru' in prestage.names('evictions'))"
    said = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, plugins.VARIABLE: str(file)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert said.stdout.strip() == "True"


def test_a_module_is_loaded_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mru_module.py").write_text(MRU, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with patch.dict(EVICTION), patch.dict(plugins._loaded), patch.dict(sys.modules):
        plugins.load_plugin("mru_module")
        assert "mru" in EVICTION
        assert plugins.digest() is not None


def test_a_fault_may_be_the_plug_ins(mru: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mru.write_text(MRU.replace("super().__init__(setting)", "raise KeyError"), encoding="utf-8")
    assert status(["run", "--plugin", str(mru), "--set", "memory.eviction=mru"]) == 1
    assert f"this is a fault of {mru}, or of Prestage; `prestage.testing.check` tries what" in capsys.readouterr().err


def test_a_row_says_whose_fault_it_may_be_and_where(mru: Path, tmp_path: Path) -> None:
    mru.write_text(MRU.replace("super().__init__(setting)", "raise KeyError('mine')"), encoding="utf-8")
    journal = str(tmp_path / "rows.jsonl")
    sweep = ["sweep", "--plugin", str(mru), "--grid", "memory.eviction=lru,mru", "--set", "workload.tokens=3"]
    assert status([*sweep, "--no-baselines", "--workers", "1", "-o", journal]) == 0
    (said,) = [row["error"] for row in read_rows(journal) if row["error"]]
    line = next(number for number, text in enumerate(mru.read_text().splitlines(), 1) if "raise KeyError" in text)
    assert said.startswith(f"a fault of {mru}, or of Prestage;")
    assert said.endswith(f"KeyError: 'mine' ({mru}, line {line})")
