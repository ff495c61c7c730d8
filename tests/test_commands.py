"""What docs/commands.md says of commands holds: the keys of their JSON, their names, completion and the doctor."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
from test_cli import Prestage
from test_cli import prestage as prestage

from prestage.cli import doctor
from prestage.cli.entry import app
from prestage.cli.options import complete_scenario, complete_setting
from prestage.notebook.lists import names

PAGE = (Path(__file__).parent.parent / "docs" / "commands.md").read_text(encoding="utf-8")
DOCUMENTED = dict(re.findall(r"^\| `([\w -]+)` \| (.*) \|$", PAGE.partition("## As data")[2], re.MULTILINE))
SMALL = ["model.layers=2", "workload.tokens=4", "workload.synthetic.tokens=12", "workload.synthetic.sequences=1"]
SMALL += ["workload.synthetic.prefill_tokens=2"]
SET = [part for setting in SMALL for part in ("--set", setting)]
#: Arguments that end soon, by command; of a run more keys are there than are named.
TRIED = {
    "run": ["run", "synthetic", *SET, "--no-baselines"],
    "run --bench": ["run", "synthetic", *SET, "--bench"],
    "show": ["show"],
    "sweep": ["sweep", "synthetic", *SET, "--grid", "prefetch.lookahead=0", "--workers", "1", "-o", "rows.jsonl"],
    "compare": ["compare", "synthetic", "synthetic,prefetch.lookahead=0", *SET],
    "advise": [
        *("advise", "synthetic", "--set", "model.layers=2", "--over", "prefetch.lookahead=0,1"),
        *("--trials", "2", "--prompt", "4", "--output", "4"),
    ],
    "breakeven": ["breakeven", "synthetic", *SET],
    "capacity": [
        *("capacity", "synthetic", "--set", "model.layers=2", "--set", "requests.count=6", "--slo", "ttft_ms=5000"),
        *("--set", "requests.output_tokens=4", "--set", "requests.prompt_tokens=8"),
        *("--replicates", "1", "--precision", "0.5"),
    ],
    "topology": ["topology", "h200-x2"],
    "timeline late": ["timeline", "late", "run"],
    "reproduce": ["reproduce", "transfers"],
    "predictor evaluate": ["predictor", "evaluate", "topk", "--predictor", "previous-token", "--recall", "6"],
    "replay": ["replay", "topk", "--budget", "25%"],
    "mrc": ["mrc", "topk", "--points", "2", "--policies", "lru"],
    "trace info": ["trace", "info", "guide"],
    "list": ["list"],
    "model list": ["model", "list"],
    "model show": ["model", "show", "olmoe-1b-7b"],
    "machine shares": ["machine", "shares"],
    "machine list": ["machine", "list"],
    "machine show": ["machine", "show", "gpu=rtx4090"],
    "machine detect": ["machine", "detect"],
    "doctor": ["doctor"],
}


def test_every_command_that_is_documented_is_tried() -> None:
    assert DOCUMENTED.keys() == TRIED.keys()


@pytest.mark.parametrize("command", TRIED)
def test_the_json_of_a_command_has_the_keys_that_are_documented(prestage: Prestage, command: str) -> None:
    if "run" in TRIED[command][1:]:
        assert prestage(*TRIED["run"], "--out", "run").status == 0
    ran = prestage(*TRIED[command], "--json")
    assert ran.status == 0, ran.err
    said = re.sub(r"\(each .*?\)", "", DOCUMENTED[command])
    named, there = set(re.findall(r"`([\w-]+)`", said)), set(json.loads(ran.out))
    assert named == there if command != "run" else named <= there


def test_every_command_is_named_on_the_page_and_gives_json_or_writes_a_file() -> None:
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        assert f"`{name}`" in PAGE, name
        for each in getattr(command, "commands", {name: command}).values():
            options = {option for parameter in each.params for option in parameter.opts}
            assert options & {"--json", "--out"} or name == "compile", (name, each.name)


def test_a_shell_completes_scenarios_models_and_keys() -> None:
    assert complete_scenario("gpt-oss") == ["gpt-oss-120b", "gpt-oss-20b"]
    assert complete_scenario("guide-k5") == ["guide-k5-1gb"]
    assert complete_setting("prefetch.l") == ["prefetch.lookahead="]


def test_names_are_listed_a_line_each(prestage: Prestage) -> None:
    ran = prestage("list", "evictions")
    assert ran.status == 0 and ran.out.split() == names("evictions")
    assert prestage("list", "polices").err.startswith("prestage: kind = 'polices': choose one of copy-orders, ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("run --tokens 20", "No such option: --tokens: `--set workload.tokens=…` sets it"),
        ("run --context 8k", "'--context': must be a whole number, not '8k'"),
        ("trace synth --skew=much", "'--skew': must be a number, not 'much'"),
        ("run --gpu", "Option '--gpu' requires an argument"),
        ("run --n-cpu-moe 15", "No such option: --n-cpu-moe: `--set memory.cpu_layers=…` sets it"),
        ("run --gpus 4", "No such option: --gpus: write `--gpu '4x rtx4090' --ram '128GB DDR5-5600'`, or `--set mac"),
        (
            "sweep --num-gpus=2",
            "with `--set parallel.gpus=2` too, some experts of every layer; `prestage sweep --help`",
        ),
        ("run --replicates=-1", "'--replicates': must be at least 0, not '-1'"),
        ("run --gpu 7950x", "machine.gpu = '7950x': is a processor"),
        ("run --gpu cpu", "machine.gpu = 'cpu': without a GPU, set machine.gpu = 'none'"),
        ("run --gpu rtx4099", "did you mean 'rtx4090'? see `prestage machine list gpus`, or add it as docs/"),
        ("run --set machine.profile=rtx4090", "or name its parts: 'gpu=rtx4090'"),
        ("topology rtx4090", "or name its parts: 'gpu=rtx4090'"),
        ("advise --within memory=20", "--within memory=20: write bytes as '24GiB'"),
        ("timeline summary .", "timeline.json.gz: No such file"),
        ("version", "No such command 'version': `prestage --version` is it"),
        ("run --set batch=4", "batch: no such key; did you mean 'workload.batch'?"),
        ("sweep --grid tokens=4", "tokens: no such key; did you mean 'workload.tokens'?"),
        ("run mixtral", "FILE.toml (did you mean 'mixtral-8x7b'?)"),
        ("run Qwen/Qwen3-30B-A3B", "FILE.toml (did you mean 'qwen3-30b-a3b'?)"),
        ("model show Qwen/Qwen3-30B-A3B", "model 'Qwen/Qwen3-30B-A3B': did you mean 'qwen3-30b-a3b'?"),
        ("run --set memory.eviction=LRU", "(did you mean 'lru'?)"),
    ],
)
def test_what_newcomers_guess_is_refused_with_what_they_meant(prestage: Prestage, words: str, says: str) -> None:
    ran = prestage(*words.split())
    assert (ran.status, ran.out) == (2, "") and says in ran.err


def test_a_group_alone_shows_its_commands_and_says_that_one_is_missing(prestage: Prestage) -> None:
    ran = prestage("benchmark")
    assert (ran.status, ran.err) == (2, "prestage: Missing command; `prestage benchmark --help` tells more\n")
    assert "transfer" in ran.out


def test_a_model_s_file_or_its_folder_stands_where_a_model_s_name_does(prestage: Prestage, tmp_path: Path) -> None:
    config = {"model_type": "mixtral", "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
    config |= {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 1024, "vocab_size": 32000}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
    by_name = prestage("show", "--model", "mine", "--gpu", "rtx4060", "--json").json()
    assert by_name["model"]["layers"] == 2
    for given in ("mine", "mine/config.json"):
        shown = prestage("show", given, "--gpu", "rtx4060", "--json").json()
        assert (shown["model"], shown["budget_bytes"]) == (by_name["model"], by_name["budget_bytes"])
        assert prestage("show", given, "--json").json()["model"] == by_name["model"]
    (tmp_path / "empty").mkdir()
    assert "scenario = 'empty': is a folder: give a scenario's name" in prestage("run", "empty").err
    assert "none.gguf: cannot be read: No such file" in prestage("run", "none.gguf").err


def test_the_doctor_says_what_is_missing_for_what(prestage: Prestage, monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("pandas", "simpy") else found(name))
    ran = prestage("doctor")
    assert (
        ran.status == 2
        and ran.err == "prestage: missing: simpy: install prestage again: pip brings what every run needs\n"
    )
    assert re.search(r"pandas +missing +tables of a run as data frames: extra notebook", ran.out)
    assert re.search(r"simpy +MISSING", ran.out)


def test_a_comparison_goes_on_without_a_run_that_is_refused_and_ends_naming_it(prestage: Prestage) -> None:
    runs = ["synthetic", "synthetic,memory.eviction=nosuch", "synthetic,prefetch.lookahead=0"]
    ran = prestage("compare", *runs, *SET)
    assert ran.status == 2 and f"Where {runs[2]} differs" in ran.out and "nosuch" not in ran.out
    assert ran.err.startswith(f"prestage: {runs[1]}: scenario 'synthetic': memory.eviction = 'nosuch': choose one of ")
    data = json.loads(prestage("compare", *runs, *SET, "--json").out)
    assert data["runs"] == [runs[0], runs[2]] and list(data["refused"]) == [runs[1]]
    alone = prestage("compare", *runs[:2], *SET)
    assert (alone.status, alone.out) == (2, "") and alone.err == ran.err
