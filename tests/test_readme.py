"""The README is tested: its commands run, its tables and those of docs/ have makers, and what pages name exists.

Left out: installing (`.ci/run` does that on a fresh environment) and running the tests themselves. `prestage run` is
run as written, over fewer tokens.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import readme_tables

from prestage.engine.scenario.scenario import load_scenario, make_scenario, scenario_names
from prestage.engine.simulate import simulate
from prestage.resources.profile import profile_names
from prestage.workloads.model import preset_names

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: Pages whose tables are made by what each of them names; runtimes.md lists changes with the effect that each had.
MADE = ("runtimes.md", "predictors.md", "our-models.md", "suite.md", "timeline.md")
#: All pages with words, by their path.
TEXTS = {page: page.read_text(encoding="utf-8") for page in readme_tables.PAGES}
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
#: `prestage` as the shell of a user knows it, but for the number of tokens.
SHELL = f"""
set -euo pipefail
prestage() {{
    if [ "$1" = run ]; then set -- "$@" --set workload.tokens=4; fi
    {sys.executable!r} -m prestage "$@"
}}
"""


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


INSTALLING = [block for block in blocks("bash") if "venv" in block]
COMMANDS = [block for block in blocks("bash") if block not in INSTALLING]


def run_in(folder: Path, command: list[str]) -> str:
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Its commands.


def test_two_commands_do_all_the_set_up() -> None:
    first, second = INSTALLING
    assert "pip install -c constraints.txt -e '.[test]' && prestage run --out prestage-out" in first
    assert second.strip() == ". .venv/bin/activate && pytest"


def test_there_are_commands_to_run() -> None:
    assert len(COMMANDS) >= 1 and len(blocks("python")) >= 1


def test_it_is_short_and_begins_with_the_question() -> None:
    assert len(README.splitlines()) < 150
    assert README.split("\n\n")[1].rstrip().endswith("?**")
    assert README.index("](docs/timeline.png)") < README.index("## Two commands") < README.index("## The answer")


@pytest.mark.docs
@pytest.mark.process
@pytest.mark.parametrize("block", COMMANDS)
def test_its_commands_run(block: str, tmp_path: Path) -> None:
    (tmp_path / "calibration").symlink_to(ROOT / "calibration")  # as in a clone
    assert run_in(tmp_path, ["bash", "-c", SHELL + block])


@pytest.mark.docs
@pytest.mark.process
def test_what_the_first_command_writes_is_what_it_says(tmp_path: Path) -> None:
    run_in(tmp_path, ["bash", "-c", SHELL + "prestage run --no-baselines --out prestage-out"])
    for path in (tmp_path / "prestage-out").iterdir():
        assert f"`{path.name}`" in README


@pytest.mark.docs
@pytest.mark.process
@pytest.mark.parametrize("block", blocks("python"))
def test_its_python_runs(block: str, tmp_path: Path) -> None:
    assert run_in(tmp_path, [sys.executable, "-c", block])  # it prints what it came to


# Its tables.


def test_every_table_of_figures_has_a_maker_and_every_maker_a_place() -> None:
    named = [name for text in TEXTS.values() for name in re.findall(r"<!-- tests/readme_tables\.py (\S+) -->", text)]
    assert set(named) == set(readme_tables.TABLES)
    for page, text in TEXTS.items():
        if page.name in MADE:
            continue
        rest = re.sub(r"<!-- tests/(?:readme_tables|extras)\.py .*?<!-- end -->", "", text, flags=re.DOTALL)
        rest = re.sub(r"^```.*?^```$", "", rest, flags=re.DOTALL | re.MULTILINE)
        for row in re.findall(r"^\|.*\|$", rest, re.MULTILINE):  # formulas are by hand, numbers never
            assert not re.search(r"\d+\.\d|\d%", row), (page, row)


#: Tables of committed data and of the code's own tables, which are made without a run.
WITHOUT_A_RUN = [
    "advice-pairs", "apart", "aside", "attention-growth", "beside", "drift", "exchanges", "held-out",
    "held-out-2026-12", "held-out-again", "held-out-context", "held-out-kernels", "models", "pair", "part-shares",
    "prompts-llama.cpp", "published-figures", "published-rows", "queueing", "reality", "reality-rows",
    "request-keys", "runs-blind", "runs-decoded", "runs-decoded-all", "runs-decoded-before", "runs-freetoken",
    "runs-llama.cpp", "runs-llama.cpp-before", "scenario", "served", "shared", "shared-again", "two-gpus",
]  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_A_RUN)
def test_what_is_shown_is_what_there_is(name: str) -> None:
    """What pages show of committed reports, of the scenario's keys and of what goes together is today's."""
    made = readme_tables.TABLES[name]().strip()
    assert set(readme_tables.shown(name)) == {made}, f"renew it: python tests/readme_tables.py {name} --write"


def test_the_scenario_that_is_shown_is_one() -> None:
    (block,) = re.findall(r"^```toml\n(.*?)^```$", readme_tables.shown("scenario")[0], re.MULTILINE | re.DOTALL)
    assert make_scenario(tomllib.loads(block)).plain()["workload"]["trace"] == "t.safetensors"


def test_a_table_is_written_between_its_marks_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "reality.md"
    page = TEXTS[ROOT / "docs" / "reality.md"]
    path.write_text(page, encoding="utf-8")
    monkeypatch.setattr(readme_tables, "PAGES", [path])
    readme_tables.write("reality", "NEW \\1")
    assert readme_tables.shown("reality") == ["NEW \\1"]
    readme_tables.write("reality", "")
    without = re.sub(r"(readme_tables\.py reality -->\n).*?(<!-- end -->)", r"\1\n\2", page, flags=re.DOTALL)
    assert path.read_text(encoding="utf-8") == without


# What it names.


def test_every_model_profile_and_scenario_is_named_somewhere() -> None:
    everything = "\n".join(TEXTS.values())
    for name in [*preset_names(), *profile_names(), *scenario_names()]:
        assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", everything), name


def test_every_file_is_named_by_a_path_that_is_there() -> None:
    for page, text in TEXTS.items():
        for name in re.findall(r"\]\(((?!http|#)[^)#]+)[^)]*\)", text):
            assert (page.parent / name).exists(), (page.name, name)
        for name in re.findall(r"`((?:workloads|calibration|engine|resources|tests|docs)/[\w./-]*)`", text):
            assert (ROOT / name).exists(), (page.name, name)
    assert "](docs/timeline.png)" in README


def test_the_numbers_that_are_explained_are_those_of_a_result() -> None:
    small = ["model.layers=2", "workload.tokens=2"]
    several = [*small, "machine.profile=h200-x2", "parallel.stages=2"]
    data = {**simulate(load_scenario("synthetic", several)).data, **simulate(load_scenario("synthetic", small)).data}
    text = TEXTS[ROOT / "docs" / "numbers.md"]
    explained = re.findall(r"^\| (.*?) \|", text.split("| number | formula |")[1].split("\n\n")[0], re.MULTILINE)
    keys = [key for cell in explained for key in re.findall(r"`(\w+)`", cell)]
    assert len(keys) > 5
    for key in keys:
        assert key in data, key
