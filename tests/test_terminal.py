"""What every command owes its terminal: it prints to whatever there is, says what went wrong, and cleans up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from prestage.cli import app, main
from prestage.cli.terminal import LONGEST_LINE
from prestage.errors import InputError

RUN = [sys.executable, "-m", "prestage", "run", "--no-baselines", "--set", "workload.tokens=20"]


def shell(command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", command.replace("RUN", " ".join(RUN))],
        cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def test_a_fault_of_ours_shows_where_and_asks_for_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str) -> None:
        raise ValueError("zip() argument 2 is shorter than argument 1")

    monkeypatch.setattr("prestage.experiments.suite.load_suite", broken)
    monkeypatch.setattr(sys, "argv", ["prestage", "suite"])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().err
    assert left.value.code == 1
    assert said.startswith("Traceback (most recent call last):") and "in broken" in said
    assert said.splitlines()[-2] == "ValueError: zip() argument 2 is shorter than argument 1"
    assert said.splitlines()[-1].startswith("prestage: this is a fault of Prestage")


def test_a_refusal_is_one_line_that_can_do_nothing_to_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(name: str) -> None:
        raise InputError(f"{name}:\n \x1b[31m {'x' * 5 * LONGEST_LINE} end")

    monkeypatch.setattr("prestage.experiments.suite.load_suite", refused)
    monkeypatch.setattr(sys, "argv", ["prestage", "suite", "mine"])
    with pytest.raises(SystemExit) as left:
        main()
    line = capsys.readouterr().err
    assert left.value.code == 2
    assert line.startswith("prestage: mine: \\x1b[31m xxx") and line.endswith(" end\n")
    assert len(line) < 1.1 * LONGEST_LINE


@pytest.mark.process
@pytest.mark.parametrize(("close", "status"), [(">&-", 0), ("2>&-", 0), ("<&-", 0), (">&- 2>&- <&-", 0)])
def test_a_closed_stream_stops_no_run_and_gets_into_no_file(tmp_path: Path, close: str, status: int) -> None:
    ran = shell(f"RUN --out out {close}", tmp_path)
    assert (ran.returncode, ran.stderr) == (status, "")
    assert json.loads((tmp_path / "out" / "result.json").read_bytes())["decode_tokens"] == 20


@pytest.mark.process
@pytest.mark.parametrize("command", ["RUN", "RUN --json", "RUN --help"])
def test_a_reader_that_leaves_is_no_error(tmp_path: Path, command: str) -> None:
    ran = shell(f"({command}; echo status $? >&2) | true", tmp_path)
    assert ran.stderr == "status 141\n"


@pytest.mark.process
@pytest.mark.parametrize("command", ["RUN", "RUN --json", "RUN --help"])
def test_an_output_that_is_full_is_said(tmp_path: Path, command: str) -> None:
    ran = shell(f"{command} > /dev/full", tmp_path)
    assert (ran.returncode, ran.stderr) == (2, "prestage: standard output: No space left on device\n")


@pytest.mark.process
def test_errors_that_cannot_be_said_keep_their_status(tmp_path: Path) -> None:
    for stream in ("2>&-", "2>/dev/full"):
        assert shell(f"RUN none.toml {stream}", tmp_path).returncode == 2


@pytest.mark.process
@pytest.mark.parametrize("command", ["topology h200-hgx-x8", "replay --help", "run --set machine.profile=größe"])
def test_a_terminal_of_ascii_gets_ascii(tmp_path: Path, command: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "prestage", *command.split()], cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "120"}, capture_output=True,
    )  # fmt: skip
    assert (ran.stdout + ran.stderr).decode("ascii")
    assert "Traceback" not in ran.stderr.decode()
    assert ran.returncode == (2 if "größe" in command else 0)


@pytest.mark.process
def test_json_is_utf_8_whatever_the_terminal_is(tmp_path: Path) -> None:
    (tmp_path / "Größe.toml").write_text("[workload.synthetic]\ntokens = 5\n")
    command = [sys.executable, "-m", "prestage", "compare", "Größe.toml", "Größe.toml,prefetch.lookahead=0", "--json"]
    ran = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert "Größe.toml" in json.dumps(json.loads(ran.stdout), ensure_ascii=False)


@pytest.mark.process
def test_a_name_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    ran = subprocess.run([*RUN[:4], b"a\xff.toml"], cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("prestage: 'a\\udcff.toml': not UTF-8")


@pytest.mark.process
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_told_to_end_leaves_nothing_half_written(tmp_path: Path, number: int, status: int) -> None:
    # It is told so while it writes the timeline of a long run, at a time at which a temporary folder is there.
    command = [*RUN, "--set", "workload.tokens=100", "--out", "out", "--stream", "stream", "--all-spans"]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while running.poll() is None and not [*tmp_path.glob(".prestage-*.tmp")]:
        time.sleep(0.001)
    running.send_signal(number)
    said = running.communicate()[1]
    assert (running.returncode, said) == (status, "")
    assert [*tmp_path.iterdir()] == []


def test_no_name_is_eaten_as_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "[red]:key:.toml").write_text("[workload.synthetic]\ntokens = 5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setattr(sys, "argv", ["prestage", "compare", "[red]:key:.toml", "[red]:key:.toml,prefetch.lookahead=0"])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().out
    assert "[red]:key:.toml,prefetch.lookahead=0" in said


def commands() -> list[list[str]]:
    """All commands, as typer knows them."""
    import typer.main

    found: list[list[str]] = []
    waiting: list[tuple[list[str], Any]] = [([], typer.main.get_command(app))]
    while waiting:
        names, command = waiting.pop()
        found.append(names)
        waiting += [([*names, name], inner) for name, inner in getattr(command, "commands", {}).items()]
    return found


@pytest.mark.slow
def test_no_help_is_eaten_as_markup(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = ""
    monkeypatch.setenv("COLUMNS", "250")
    for command in commands():
        monkeypatch.setattr(sys, "argv", ["prestage", *command, "--help"])
        with pytest.raises(SystemExit):
            main()
        said += capsys.readouterr().out
    for words in ("[workload.synthetic]", "prestage[record]"):
        assert words in said
    assert "\\[" not in said


def seen_at_a_terminal(code: str) -> str:
    """What a process writes on standard error where that is a terminal."""
    ours, theirs = os.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    written = b""
    with suppress(OSError):  # Linux says so when the last who had it open has left
        while part := os.read(ours, 1 << 16):
            written += part
    os.close(ours)
    assert process.wait() == 0
    return written.decode()


@pytest.mark.process
def test_what_tells_nothing_for_a_second_says_what_it_does() -> None:
    begin = (
        "import time; from prestage.cli.console import progress_shown\nwith progress_shown(doing='drawing') as move: "
    )
    assert "drawing" in seen_at_a_terminal(f"{begin}time.sleep(1.8)")
    assert "drawing" not in seen_at_a_terminal(f"{begin}time.sleep(0.2)")
    told = seen_at_a_terminal(f"{begin}move('steps', 1, 2); time.sleep(1.8)")
    assert "steps" in told and "drawing" not in told
