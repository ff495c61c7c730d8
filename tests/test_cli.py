"""The command line as a user meets it: what it prints and writes, how it teaches, and how it refuses bad input."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_suite import DEFINITION as SMALL_SUITE

from prestage import cli
from prestage.cli import main
from prestage.guide import reproduce
from prestage.output import run_folder
from prestage.workloads.trace import RoutingTrace

#: The shipped synthetic scenario, small.
SMALL = ["model.layers=4", "workload.tokens=8", "workload.synthetic.tokens=24", "workload.synthetic.prefill_tokens=3"]
SMALL_RUN = ["run", "synthetic", *(part for setting in SMALL for part in ("--set", setting))]
COMMANDS = [
    [],
    ["run"],
    ["show"],
    ["list"],
    ["doctor"],
    ["sweep"],
    ["suite"],
    ["plot"],
    ["report"],
    ["topology"],
    ["compare"],
    ["breakeven"],
    ["replay"],
    ["trace"],
    ["trace", "info"],
    ["trace", "import"],
    ["trace", "map"],
    ["trace", "synth"],
    ["model", "list"],
    ["model", "show"],
    ["model", "import"],
    ["model", "check"],
    ["timeline"],
    ["timeline", "import"],
    ["timeline", "summary"],
    ["timeline", "late"],
    ["predictor"],
    ["predictor", "train"],
    ["predictor", "evaluate"],
    ["predictor", "measure"],
]
#: What PyTorch's profiler saw of an execution on an H100.
PROFILED = Path(__file__).with_name("profiled-h100-graph.json.gz")
CONFIGS = Path(__file__).parent / "data" / "configs"
LOG = """\
# route_trace v1
# model=tiny.gguf arch=tinymoe n_layer=2 n_expert=4 n_expert_used=1
# layer=0 expert_bytes=1048576 dense_bytes=7
# layer=1 expert_bytes=1048576 dense_bytes=8
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
0,0,0,0,0,3,1,0,1048576
0,0,0,1,0,1,1,0,1048576
0,1,1,0,0,3,1,1,0
0,1,1,1,0,2,1,0,1048576
"""


@dataclass(frozen=True)
class Ran:
    """What a command came to."""

    status: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """The one JSON object that standard output holds, and nothing else."""
        assert (self.status, self.err) == (0, "")
        data = json.loads(self.out)
        assert isinstance(data, dict)
        return data


Prestage = Callable[..., Ran]


@pytest.fixture
def prestage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Prestage:
    """`prestage ARGUMENTS…` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["prestage", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        return Ran(int(left.value.code or 0), *capsys.readouterr())

    return call


def prestage_outside(*arguments: str, cwd: Path, **environment: str) -> Ran:
    """`python -m prestage ARGUMENTS…` in a process of its own."""
    command = [sys.executable, "-m", "prestage", *arguments]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    return Ran(done.returncode, done.stdout, done.stderr)


def test_version_is_that_of_the_distribution(prestage: Prestage) -> None:
    ran = prestage("--version")
    assert (ran.status, ran.out) == (0, f"{version('prestage')}\n")


# run


@pytest.mark.process
def test_run_without_a_scenario_runs_the_default_and_prints_tables(tmp_path: Path) -> None:
    ran = prestage_outside("run", "--set", "workload.tokens=80", cwd=tmp_path, COLUMNS="200")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith(
        "gpt-oss-20b: 24 x 32 experts, top-4, 9.47 GiB\non gpu=rtx4060, ram=32GB DDR5-5600 by prestage; "
    )
    for said in ("tokens per second", "hit rate", "prefetch_hit", "cache_hit", "late", "miss", "useful", "wasted"):
        assert re.search(rf"^ *{said} ", ran.out, re.MULTILINE), said
    for said in ("Where ", "stall", "speedup", "all resident", "memory utilization"):
        assert said in ran.out
    assert not [*tmp_path.iterdir()]


def test_json_is_one_object_with_every_key(prestage: Prestage) -> None:
    data = prestage(*SMALL_RUN, "--json").json()
    keys = (
        "makespan_ms tokens_per_second inter_token_latency_ms time_to_first_token_ms accesses hit_rate stall_ms overlap"
    )
    keys += " memory_utilization speedup resident_ms seed layer_visits wall_s scenario versions warnings"
    assert set(keys.split()) <= set(data)
    assert set(data["counts"]) == {"prefetch_hit", "cache_hit", "late", "miss", "prefetch", "dropped", "evict"}
    assert set(data["prefetch"]) == {"useful", "late", "wasted", "unused", "cancelled"}
    parts = ("compute", "stall", "host", "predictor", "bubble", "drain")
    assert set(data["time"]) == {f"{part}_ms" for part in parts}
    assert set(data["inter_token_latency_ms"]) == {"mean", "p50", "p95", "p99"}
    assert data["wall_s"] > 0


def test_settings_reach_the_run_the_last_one_wins(prestage: Prestage) -> None:
    data = prestage(*SMALL_RUN, "--set", "prefetch.lookahead=3", "--set", "prefetch.lookahead=0", "--json").json()
    assert data["scenario"]["prefetch"]["lookahead"] == 0
    assert data["counts"]["prefetch"] == 0
    assert data["scenario"]["model"]["layers"] == data["model"]["layers"] == 4


def test_without_baselines_what_they_give_is_left_out(prestage: Prestage) -> None:
    data = prestage(*SMALL_RUN, "--no-baselines", "--json").json()
    assert not {"speedup", "resident_ms", "baseline_ms", "efficiency"} & set(data)
    ran = prestage(*SMALL_RUN, "--no-baselines")
    assert ran.status == 0 and "speedup" not in ran.out


def test_out_holds_result_timeline_and_pictures_and_is_said(prestage: Prestage, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    ran = prestage(*SMALL_RUN, "--out", str(out))
    assert (ran.status, ran.err) == (0, "")
    names = ["memory.png", "result.json", "run.safetensors", "timeline.json.gz", "timeline.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all(f"{out / name}" in ran.out for name in names)
    printed = prestage(*SMALL_RUN, "--json").json()
    # Not in the file, which is the same by either engine.
    for name in ("wall_s", "engine", "engine_why"):
        del printed[name]
    assert json.loads((out / "result.json").read_text()) == printed
    timeline = json.loads(gzip.decompress((out / "timeline.json.gz").read_bytes()))
    assert timeline["otherData"]["spans_written"] == timeline["otherData"]["spans_total"] > 0
    assert timeline["otherData"]["scenario"] == printed["scenario"]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in names if name.endswith(".png"))


def test_a_timeline_that_is_streamed_lies_in_files_and_changes_nothing(prestage: Prestage, tmp_path: Path) -> None:
    kept, streamed = (prestage(*SMALL_RUN, "--json", *more).json() for more in ((), ("--stream", str(tmp_path / "s"))))
    assert {**streamed, "wall_s": 0} == {**kept, "wall_s": 0}
    spans = np.load(tmp_path / "s" / "gpu0" / "spans.npy", mmap_mode="r")
    assert spans["end_ns"].max() >= kept["makespan_ms"] * 1e6
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["gpu0"]


def test_a_streamed_run_keeps_what_host_memory_read_in_files_too(prestage: Prestage, tmp_path: Path) -> None:
    data = prestage("run", "nvme", "--set", "workload.tokens=4", "--json", "--stream", str(tmp_path)).json()
    reads = np.load(tmp_path / "gpu0" / "host" / "copy_expert.npy", mmap_mode="r")
    assert len(reads) == data["tiers"]["host_misses"] > 0


def test_a_long_timeline_is_cut_and_says_so_unless_all_is_asked_for(
    prestage: Prestage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "SPAN_LIMIT", 50)
    said = re.search(
        r"timeline\.json\.gz .*: the first 50 of ([0-9,]+) spans \(--all-spans writes all\)",
        prestage(*SMALL_RUN, "--no-baselines", "--out", "cut").out,
    )
    assert said is not None
    ran = prestage(*SMALL_RUN, "--no-baselines", "--out", "whole", "--all-spans")
    assert "of the" in ran.out and "--all-spans writes all" not in ran.out
    written = {
        name: json.loads(gzip.decompress((tmp_path / name / "timeline.json.gz").read_bytes()))["otherData"]
        for name in ("cut", "whole")
    }
    total = int(said[1].replace(",", ""))
    assert (written["cut"]["spans_written"], written["cut"]["spans_total"]) == (50, total)
    assert (written["whole"]["spans_written"], written["whole"]["spans_total"]) == (total, total)


def test_a_scenario_file_names_its_trace_beside_itself(prestage: Prestage, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    synth = ("trace", "synth", "--model", "olmoe-1b-7b", "--tokens", "6", "-o", "mine/t.npz")
    assert prestage(*synth).status == 0
    text = '[model]\npreset = "olmoe-1b-7b"\n[workload]\ntrace = "t.npz"\n[prefetch]\nlookahead = 2\n'
    (tmp_path / "mine" / "s.toml").write_text(text)
    data = prestage("run", "mine/s.toml", "--json").json()
    assert (data["decode_tokens"], data["layer_visits"]) == (6, 6 * 16)
    assert data["scenario"]["prefetch"]["lookahead"] == 2


@pytest.mark.process
def test_a_person_at_a_terminal_sees_progress_and_a_pipe_stays_clean(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "prestage", *SMALL_RUN, "--json"]
    with (tmp_path / "out.json").open("wb") as out:
        running = subprocess.Popen(command, stdout=out, stderr=follower, env={**os.environ, "TERM": "xterm"})
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):  # what Linux says at a terminal's end
        while piece := os.read(leader, 4096):
            shown += piece
    os.close(leader)
    assert running.wait() == 0
    assert json.loads((tmp_path / "out.json").read_text())["accesses"] > 0
    for what in ("simulate", "all resident", "no prefetch, no cache"):
        assert what in shown.decode()


# replay


def test_replay_says_what_it_found_in_json_and_in_words(prestage: Prestage, tmp_path: Path) -> None:
    # Experts 3 and 1 are missed, then 3 is found and 2 missed: 1 of 4, 1 of 2 when decoding; 3 MiB read.
    (tmp_path / "log.route.csv").write_text(LOG)
    data = prestage("replay", "log.route.csv", "--budget", "4MiB", "--json").json()
    figures = {key: data[key] for key in ("accesses", "hits", "hit_rate", "hit_rate_decode", "bytes_read", "evict")}
    assert figures == {
        "accesses": 4,
        "hits": 1,
        "hit_rate": 0.25,
        "hit_rate_decode": 0.5,
        "bytes_read": 3 << 20,
        "evict": 0,
    }
    words = prestage("replay", "log.route.csv", "--budget", "4MiB").out
    assert re.search(r"all +1 of 4 +25\.000%", words)
    assert re.search(r"decode only +1 of 2 +50\.000%", words)
    assert re.search(r"bytes read +3\.00 MiB +0 evictions", words)
    assert re.search(r"logged residency +agrees on +100\.000%", words)


def test_replay_takes_its_options(prestage: Prestage, tmp_path: Path) -> None:
    (tmp_path / "log.route.csv").write_text(LOG)
    options = ["--scope", "per-layer", "--lookup", "single", "--batch", "2", "--expert-bytes", "10", "--json"]
    data = prestage("replay", "log.route.csv", "--budget", "2experts", *options).json()
    assert (data["scope"], data["lookup"], data["bytes_read"], data["evict"]) == ("per-layer", "single", 30, 1)
    few = prestage("replay", "log.route.csv", "--budget", "1experts", "--json").json()
    assert few["hits"] == 0
    assert few["warnings"][0].startswith("cliff: ")


@pytest.mark.slow
def test_the_published_hit_rates_as_a_user_reads_them(prestage: Prestage, traces: Path) -> None:
    log = traces / "bigmoeonedge-qwen" / "qwen.route.csv"
    words = prestage("replay", str(log), "--budget", "4000MiB").out
    assert re.search(r"all .* 74\.880%", words)
    assert re.search(r"decode only .* 80\.287%", words)


# trace


def test_synth_draws_the_same_trace_from_the_same_seed(prestage: Prestage, tmp_path: Path) -> None:
    def synth(name: str, seed: str) -> bytes:
        shape = ["--model", "olmoe-1b-7b", "--tokens", "12", "--sequences", "2", "--prefill-tokens", "2"]
        ran = prestage("trace", "synth", *shape, "--seed", seed, "-o", name)
        assert (ran.status, ran.err) == (0, "")
        assert ran.out == f"{name}: 12 tokens, 16 layers, top-8 of 64 experts\n"
        return (tmp_path / name).read_bytes()

    assert synth("a.npz", "5") == synth("b.npz", "5") != synth("c.npz", "6")
    info = prestage("trace", "info", "a.npz", "--json").json()
    named = ("model", "tokens", "layers", "k", "num_experts", "sequences", "prefill_tokens", "decode_tokens")
    assert [info[key] for key in named] == ["olmoe-1b-7b", 12, 16, 8, 64, 2, 4, 8]
    # The trace says how large its experts are, so that a replay can tell bytes.
    data = prestage("replay", "a.npz", "--budget", "1GiB", "--json").json()
    assert data["bytes_read"] == (data["accesses"] - data["hits"]) * 3 * 2048 * 1024 * 2


def test_info_describes_in_words_and_in_json(prestage: Prestage, tmp_path: Path) -> None:
    (tmp_path / "log.route.csv").write_text(LOG)
    data = prestage("trace", "info", "log.route.csv", "--json").json()
    assert (data["model"], data["tokens"], data["decode_tokens"], data["accesses"]) == ("tiny", 2, 1, 4)
    assert data["reuse"]["mean"] == 0.5  # layer 0 keeps expert 3, layer 1 goes from 1 to 2
    words = prestage("trace", "info", "log.route.csv").out
    assert "tiny" in words and re.search(r"reuse of the last token +50\.0%", words)


def test_import_makes_a_trace_that_replays_as_its_log_does(prestage: Prestage, tmp_path: Path) -> None:
    (tmp_path / "log.route.csv").write_text(LOG)
    ran = prestage("trace", "import", "log.route.csv", "-o", "t.safetensors")
    assert (ran.status, ran.out) == (0, "t.safetensors: 2 tokens, 2 layers, top-1 of 4 experts\n")
    assert RoutingTrace.load(tmp_path / "t.safetensors").experts.tolist() == [[[3], [1]], [[3], [2]]]
    of_log, of_trace = (
        prestage("replay", name, "--budget", "3MiB", "--json").json() for name in ("log.route.csv", "t.safetensors")
    )
    assert of_log == of_trace


# Bad input: one line on standard error, exit status 2, nothing on standard output, nothing written.

BAD_RUN: list[tuple[list[str], str]] = [
    (["defalt"], "speed, synthetic, a model's name, FILE.toml (did you mean 'default'?)"),
    (["none.toml"], "scenario 'none.toml': cannot be read: No such file or directory"),
    (["--set", "prefetch.lookahed=2"], "prefetch.lookahed: no such key; did you mean 'lookahead'?"),
    (["--set", "workload.synthetic.skw=2"], "workload.synthetic.skw: no such key; did you mean 'skew'?"),
    (["--set", "prefetchh.k=2"], "prefetchh: no such key; did you mean 'prefetch'?"),
    (["--set", "prefetch.lookahead=-1"], "prefetch.lookahead = -1: must be greater than or equal to 0"),
    (["--set", "prefetch.k=two"], "prefetch.k = 'two': must be a valid integer"),
    (["--set", "prefetch.k=33"], "prefetch.k = 33: a layer has 32 experts"),
    (["--set", "memory.eviction=lrv"], "memory.eviction = 'lrv': choose one of "),
    (["--set", "memory.gpu_budget=lots"], "gpu_budget = 'lots': write it as '25%', '4GiB' or '512experts'"),
    (["--set", "memory.gpu_budget=1B"], "the expert budget is 1 byte: it must hold one expert"),
    (["--set", "model.preset=gpt-oss-21b"], "model 'gpt-oss-21b': did you mean 'gpt-oss-"),
    (["--set", "model=gpt-oss-20b"], "model = 'gpt-oss-20b': must be a section, such as model.preset"),
    (["--set", "machine.profile=rtx309"], "machine.profile = 'rtx309': choose one of "),
    (["--set", "workload.trace=none.npz"], "none.npz: cannot be read: No such file or directory"),
    (["--set", "machine.profile=rtx3090", "--set", "copy.host_memory=pinned"], "copy.host_memory = 'pinned': profile"),
    (["--set", "nothing"], "--set 'nothing': write it as section.key=value"),
    (["--set", "model.top_k=3", "--set", "workload.trace=top4.npz"], "model.top_k = 3 (gpt-oss-20b), but the trace"),
    (["--bogus"], "No such option: --bogus"),
    (["default", "speed"], "Got unexpected extra argument"),
]
BAD: list[tuple[list[str], str]] = [
    *(
        (["run", *(["synthetic"] if arguments[0] == "--set" else []), *arguments], message)
        for arguments, message in BAD_RUN
    ),
    (["sweep"], "the grid is empty: give at least one key=value,value"),
    (["sweep", "--grid", "prefetch.lookahed=1,2"], "prefetch.lookahed: no such key; did you mean 'lookahead'?"),
    (["sweep", "--grid", "prefetch.k=1", "-o", "rows.txt"], "a sweep's file must end in one of .jsonl, .csv, .parquet"),
    (["sweep", "guide-insigths"], "did you mean 'guide-insights'?"),
    (["plot", "lines", "none.jsonl", "-o", "x.png"], "none.jsonl: No such file or directory"),
    (["plot", "lines", "none.jsonl", "-o", "x.bmp"], "a picture's file must end in one of .png"),
    (["plot", "heatmp", "none.jsonl", "-o", "x.png"], "KIND = 'heatmp': choose one of lines, heatmap, pareto, tornado"),
    (["plot", "lines", "a.jsonl", "b.jsonl", "-o", "x.png"], "lines is drawn from one journal, and 2 are given"),
    (["plot", "memory", "none", "-o", "x.png"], "none: there is no such folder; `prestage run --out none` writes one"),
    (
        ["plot", "memory", "none", "--x", "seed", "-o", "x.png"],
        "memory is a picture of a run: --x, --by and --figure are",
    ),
    (
        ["report", "a.html", "-o", "x.html"],
        "a.html: there is no such folder; give one that `prestage run --out FOLDER`",
    ),
    (["plot", "lines", ".", "-o", "x.png"], ".: a folder: lines is drawn from a sweep's journal (.jsonl); of a run"),
    (["replay", "guid", "--budget", "25%"], "a log (did you mean 'guide'?)"),
    (["report", "none", "-o", "x.html"], "none: there is no such folder; `prestage run --out none` writes one"),
    (["report", "none", "-o", "x.pdf"], "x.pdf: a report's file must end in .html"),
    (["report"], "Missing argument 'results'; `prestage report --help` tells more"),
    (["compare", "default"], "give at least two different runs to compare"),
    (
        ["compare", "default", "synthetic,memory.eviction=x"],
        "synthetic,memory.eviction=x: scenario 'synthetic': memory",
    ),
    (["compare", "none.json", "default"], "none.json: cannot be read: No such file or directory"),
    (["breakeven", "--set", "prefetch.lookahead=0"], "prefetch.lookahead = 0: nothing is prefetched"),
    (["breakeven", "--budgets", "lots"], "gpu_budget = 'lots': write it as"),
    (["walk"], "No such command 'walk'; `prestage --help` tells more"),
    (["trace"], "Missing command; `prestage trace --help` tells more"),
    (["replay"], "; `prestage replay --help` tells more"),
    (["replay", "top4.npz"], "Missing option '--budget'; `prestage replay --help` tells more"),
    (["replay", "top4.npz", "--budget", "lots"], "budget 'lots': write it as '25%', '4GiB' or '512experts'"),
    (["replay", "top4.npz", "--budget", "25%", "--batch", "x"], "Invalid value for '--batch'"),
    (["replay", "top4.npz", "--budget", "25%", "--model", "mixtral-8x7b"], "has 32 MoE layers, but the trace has 24"),
    (["replay", "none.npz", "--budget", "25%"], "none.npz: cannot be read: No such file or directory"),
    (["trace", "info", "bad.npz"], "bad.npz"),
    (["trace", "info", "trace.txt"], "trace.txt: .txt: a trace's name must end in .npz or .safetensors"),
    (["trace", "import", "bad.npz", "-o", "new.npz"], "bad.npz: its content does not tell its format"),
    (["trace", "import", "bad.npz", "-o", "new.npz", "--format", "x"], "format = 'x': choose one of auto, bigmoeo"),
    (["timeline", "import", "none.json"], "none.json: No such file or directory"),
    (["timeline", "import", "bad.npz"], "bad.npz: not JSON: Expecting value"),
    (
        ["timeline", "import", "trace.json.gz", "-o", "new.txt"],
        "new.txt: must end in .json.gz or .json (a",
    ),
    (["timeline", "summary"], "Missing argument 'traces'; `prestage timeline summary --help` tells more"),
    (["timeline", "summary", "trace.json.gz", "none.json"], "none.json: No such file or directory"),
    (["trace", "synth", "-o", "new.txt"], "new.txt: .txt: a trace's name must end in .npz or .safetensors"),
    (["trace", "synth", "-o", "none/new.npz"], "none/new.npz: there is no folder none"),
    (["trace", "synth", "-o", "new.npz", "--reuse", "2"], "reuse = 2.0: must be a number 0..1"),
    (["trace", "synth", "-o", "new.npz", "--model", "mixtral"], "model 'mixtral': did you mean 'mixtral-8x7b'?"),
]


def problem(ran: Ran) -> str:
    """The one line on standard error that a refusal is."""
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("prestage: ") and ran.err.endswith("\n")
    assert len(ran.err.splitlines()) == 1
    return ran.err


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_is_one_line_and_status_2(
    prestage: Prestage, tmp_path: Path, arguments: list[str], message: str
) -> None:
    chosen = np.broadcast_to(np.arange(4, dtype=np.uint8), (2, 24, 4))
    RoutingTrace(chosen, 32).save(tmp_path / "top4.npz")
    (tmp_path / "bad.npz").write_text("this is no archive\n")
    (tmp_path / "my-model.toml").write_text(
        resources.files("prestage.workloads.models").joinpath("olmoe-1b-7b.toml").read_text()
    )
    (tmp_path / "counts.csv").write_text(
        "layer,expert,count\n" + "".join(f"{n % 16},{n // 16},{n}\n" for n in range(1024))
    )
    (tmp_path / "rows.csv").write_text("token,layer,expert_ids\n0,0,3 1\n0,1,0 2\n")
    (tmp_path / "trace.json.gz").write_bytes(PROFILED.read_bytes())
    before = sorted(tmp_path.iterdir())
    out = ["--out", "new"] if arguments[0] == "run" else []
    assert message in problem(prestage(*arguments, *out))
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_that_is_not_the_traces_is_refused_naming_top_k(prestage: Prestage, tmp_path: Path) -> None:
    prestage("trace", "synth", "--model", "mixtral-8x7b", "--tokens", "2", "-o", "t.npz")
    scenario = '[model]\npreset = "mixtral-8x7b"\ntop_k = 4\n[workload]\ntrace = "t.npz"\n'
    (tmp_path / "s.toml").write_text(scenario)
    said = problem(prestage("run", "s.toml"))
    assert "model.top_k = 4 (mixtral-8x7b), but the trace has 2: choose its model, or set model.top_k = 2" in said


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_run(
    prestage: Prestage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the simulation ran")

    monkeypatch.setattr("prestage.engine.simulate.simulate_inputs", never)
    (tmp_path / "file").write_text("mine")
    assert f"{out}: " in problem(prestage(*SMALL_RUN, "--out", out))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_what_fails_while_writing_leaves_what_was_there(prestage: Prestage, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "timeline.json.gz").mkdir()  # a folder in the way of one of the files
    (tmp_path / "out" / "memory.png").write_text("before")
    said = problem(prestage(*SMALL_RUN, "--no-baselines", "--out", "out"))
    assert said == "prestage: out/timeline.json.gz: Is a directory\n"
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == ["out", "out/memory.png", "out/timeline.json.gz"]  # all files of a run or none, none of them half
    assert (tmp_path / "out" / "memory.png").read_text() == "before"


@pytest.mark.process
def test_an_error_outside_is_one_line_too(tmp_path: Path) -> None:
    said = problem(prestage_outside("run", "--set", "prefetch.polcy=none", cwd=tmp_path))
    assert said == "prestage: scenario 'default': prefetch.polcy: no such key; did you mean 'policy'?\n"


# timeline


def test_profiled_and_simulated_timelines_stand_side_by_side(prestage: Prestage, tmp_path: Path) -> None:
    assert prestage(*SMALL_RUN, "--no-baselines", "--out", "run").status == 0
    shown = prestage("timeline", "summary", str(PROFILED), "run/timeline.json.gz").out
    assert "profiled-h100-graph.json.gz" in shown and " timeline.json.gz" in shown
    assert re.search(r"gpu0: kernels +4\.802 ms +5\.2% +[0-9.]+ ms", shown)
    both = prestage("timeline", "summary", str(PROFILED), "run/timeline.json.gz", "--json").json()
    assert [summary["gpus"]["gpu0"]["compute_ms"] > 0 for summary in both.values()] == [True, True]


def test_import_shows_kernels_and_writes_timelines_and_pictures(prestage: Prestage, tmp_path: Path) -> None:
    shown = prestage("timeline", "import", str(PROFILED), "--kernels").out
    assert "gpu0, stream 21, copies to the GPU" in shown
    assert re.search(r"14 +89\.508 +6,390\.8 +15\.1 +6,390\.8 +336\.00 Memcpy HtoD \(Pinned -> Device\)", shown)
    data = prestage("timeline", "import", str(PROFILED), "-o", "again.json.gz", "--json").json()
    assert data["kernels"][0]["samples"]["n"] == 14
    assert prestage("timeline", "import", "again.json.gz", "-o", "again.png", "--json").json()["gpus"] == data["gpus"]
    assert (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")


def test_late_prefetches_are_told_with_their_why(prestage: Prestage) -> None:
    assert prestage("run", "--set", "workload.tokens=20", "--no-baselines", "--out", "run").status == 0
    data = prestage("timeline", "late", "run", "--json").json()
    assert data["late"] == data["ordered_too_late"] + data["behind_others"]
    fates = json.loads(Path("run/result.json").read_text())["prefetch"]
    assert (data["prefetches"], data["late"]) == (sum(fates.values()), fates["late"])
    words = prestage("timeline", "late", "run").out
    assert f"{data['late']:,} of {data['prefetches']:,} prefetches came late" in words
    assert f"{data['behind_others']:,} waited behind other copies" in words


# Help.


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_teaches_with_an_example(prestage: Prestage, command: list[str]) -> None:
    ran = prestage(*command, "--help")
    assert (ran.status, ran.err) == (0, "")
    name = " ".join(["prestage", *command])
    assert f"Usage: {name} " in ran.out
    assert re.search(rf"{name} [a-z-]", ran.out.replace(f"Usage: {name} ", ""))
    if command == ["run"]:
        assert "--set" in ran.out and "KEY=VALUE" in ran.out


def test_without_arguments_the_help_is_shown(prestage: Prestage) -> None:
    assert prestage() == prestage("--help")


#: Every example line of the commands' help.
EXAMPLES = [
    example
    for file in sorted(Path(cli.__file__).parent.glob("*.py"))
    for example in re.findall(r"^ {6}prestage (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
]


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_of_the_help_run(
    prestage: Prestage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example: str
) -> None:
    shape = ["--model", "mixtral-8x7b", "--tokens", "40"]
    assert prestage("trace", "synth", *shape, "-o", "trace.safetensors").status == 0
    shape = ["--model", "gpt-oss-20b", "--tokens", "40"]
    assert prestage("trace", "synth", *shape, "-o", "trace.npz").status == 0
    (tmp_path / "log.route.csv").write_text(LOG)
    (tmp_path / "ids.jsonl").write_text("[0, 1]\n[2, 3]\n[4, 15]\n")
    (tmp_path / "my-model.toml").write_text(
        resources.files("prestage.workloads.models").joinpath("olmoe-1b-7b.toml").read_text()
    )
    (tmp_path / "counts.csv").write_text(
        "layer,expert,count\n" + "".join(f"{n % 16},{n // 16},{n}\n" for n in range(1024))
    )
    (tmp_path / "rows.csv").write_text("token,layer,expert_ids\n0,0,3 1\n0,1,0 2\n")
    (tmp_path / "trace.json.gz").write_bytes(PROFILED.read_bytes())
    (tmp_path / "my-scenario.toml").write_text("[workload.synthetic]\ntokens = 3\n")
    (tmp_path / "my-suite.toml").write_text(SMALL_SUITE)
    (tmp_path / "config.json").write_bytes((CONFIGS / "OLMoE-1B-7B-0924.json").read_bytes())
    smaller = ["--set", "workload.tokens=2"] if example.split()[0] in ("run", "sweep", "compare", "breakeven") else []
    if example.startswith("advise "):
        smaller = ["--trials", "3", "--set", "model.layers=4"]
    if example.startswith("breakeven gpt-oss-20b "):
        smaller += ["--set", "model.layers=4"]
    if example.startswith("capacity "):
        smaller = ["--set", "model.layers=2", "--set", "requests.count=20"]
    if example.startswith("suite ") and "my-suite.toml" not in example:
        smaller = ["my-suite.toml"]
    if example.startswith("reproduce"):  # every table, with fewer tokens and rows (test_reproduce.py has them all)
        short = [(name, replace(config, num_simulation_tokens=20)) for name, config in reproduce._workloads()]
        monkeypatch.setattr(reproduce, "_workloads", lambda: iter(short))
        monkeypatch.setattr(reproduce, "VIRTUAL_MEMORY", dict([*reproduce.VIRTUAL_MEMORY.items()][:1]))
    if example.startswith("plot ") and ".jsonl" in example:
        grid = ["--grid", "prefetch.k=1,2", "--grid", "memory.gpu_budget=25%,50%"]
        assert prestage("sweep", *grid, "--set", "workload.tokens=2", "--workers", "1").status == 0
    if "-out " in example and example.startswith(("plot ", "report ")):
        for number, out in enumerate(("prestage-out", "other-out")):
            assert prestage(*SMALL_RUN, "--set", f"seed={number}", "--no-baselines", "--out", out).status == 0
    ran = prestage(*shlex.split(example.partition(" > ")[0]), *smaller)
    said = [line for line in ran.err.splitlines() if not line.endswith(" min left")]  # how far a long one is
    assert (ran.status, said) == (0, [])
    assert ran.out


#: What `--help` has no need of.
HEAVY = ["torch", "numpy", "simpy", "matplotlib", "bokeh", "numba", "networkx", "safetensors", "orjson"]


@pytest.mark.process
def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    # One after the other in one process: the first that loads something is named.
    loaded = loaded_by(HEAVY, [[*command, "--help"] for command in COMMANDS], tmp_path)
    assert [*zip(COMMANDS, loaded, strict=True)] == [(command, []) for command in COMMANDS]


@pytest.mark.process
def test_a_run_without_pictures_loads_no_torch_and_no_matplotlib(tmp_path: Path) -> None:
    heavy = ["torch", "matplotlib", "bokeh", "networkx", "simpy"]
    assert loaded_by(heavy, [SMALL_RUN], tmp_path) == [["simpy"]]  # that it is there shows that this can tell


def loaded_by(modules: list[str], commands: list[list[str]], cwd: Path) -> list[list[str]]:
    """Which of these modules a process had loaded after each of these commands."""
    code = (
        "import sys\nfrom prestage.cli import main\n"
        f"for command in {commands!r}:\n"
        "    sys.argv = ['prestage', *command]\n"
        "    try:\n        main()\n    except SystemExit as left:\n        assert not left.code\n"
        f"    print('loaded:', *[name for name in {modules!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    return [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("loaded:")]


def test_timeline_commands_say_what_was_left_out_and_repaired(prestage: Prestage, tmp_path: Path) -> None:
    work = {"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": 10, "dur": 5, "args": {"device": 0}}
    events = [work, {**work, "ts": "20"}, {**work, "cat": "hpu_op"}]
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"traceEvents": events})[:-2])  # and it breaks off
    for command in ("import", "summary"):
        said = " ".join(prestage("timeline", command, str(path)).out.split())
        assert "t.json: 1 of 3 events are left out: 1 of category hpu_op (traceEvents[2] 'k')" in said
        assert "t.json: 1 values repaired: 1 times given as text (traceEvents[1] 'k')" in said
        assert "t.json: breaks off after 3 events: the text ends within the list of events" in said
        data = prestage("timeline", command, str(path), "--json").json()
        reading = (data if command == "import" else data["t.json"])["reading"]
        assert reading["events"] == 3
        assert reading["left_out"] == {"of category hpu_op": {"events": 1, "first": "traceEvents[2] 'k'"}}
        assert reading["repaired"]["times given as text"]["events"] == 1


def test_bytes_of_experts_take_a_unit(prestage: Prestage, tmp_path: Path) -> None:
    (tmp_path / "log.route.csv").write_text(LOG)
    options = ["--budget", "2experts", "--expert-bytes"]
    plain, unit = (prestage("replay", "log.route.csv", *options, size, "--json").json() for size in ("2048", "2KiB"))
    assert plain == unit
    refused = prestage("replay", "log.route.csv", *options, "2kb")
    assert refused.status == 2 and "--expert-bytes = '2kb': write it as a whole number of bytes" in refused.err
