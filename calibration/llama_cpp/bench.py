"""Run `llama-bench` over many settings, in rounds of shuffled order, until a time is over.

    python -m prestage.calibration.llama_cpp.bench llama-bench OUT.jsonl MODEL.gguf=48 … --seconds 240 --threads 16

Behind each file stands how many layers it has. Each round runs every process once: of each file one that varies how
many layers' experts the CPU computes, one that varies the threads, one with other prompts, one with a long context and
one without mmap. What a process printed is written when it ends, one line a process, with the round, its place in it
and the time that it ended.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any

from ...errors import InputError
from ...files import check_file, write_file

#: A process that takes longer is ended.
_LONGEST_S = 120.0


@dataclass(frozen=True)
class Process:
    """One call of llama-bench: a file, what is varied, and its options; lists become its loops."""

    what: str
    file: str
    n_cpu_moe: Sequence[int]
    threads: Sequence[int]
    prompt: Sequence[int]
    generate: Sequence[int]
    depth: Sequence[int] = (0,)
    micro_batch: Sequence[int] = (512,)
    more: Sequence[str] = ()

    def arguments(self, random: Random, repeats: int, flash_attention: bool) -> list[str]:
        """Returns llama-bench's arguments, each list in an order of its own."""
        lists = {
            "-ncmoe": self.n_cpu_moe, "-t": self.threads, "-p": self.prompt, "-n": self.generate, "-d": self.depth,
            "-ub": self.micro_batch,
        }  # fmt: skip
        arguments = ["-m", self.file, "-r", str(repeats), "-o", "jsonl", "-fa", "on" if flash_attention else "off"]
        for option, values in lists.items():
            shuffled = list(values)
            random.shuffle(shuffled)
            arguments += [option, ",".join(map(str, shuffled))]
        return [*arguments, *self.more]


def processes(file: str, layers: int, threads: int, *, depth: int = 4096, generate: int = 32) -> list[Process]:
    """Returns what is run of a file: the experts of 0, 1, 2, 4, … and of all layers on the CPU; threads; a context."""
    steps = [0, *(2**power for power in range(layers.bit_length()) if 2**power < layers), layers]
    fewer = sorted({max(1, threads // 4), max(1, threads // 2)})
    return [
        Process("layers", file, steps, [threads], [512], [generate]),
        Process("threads", file, [layers], fewer, [0], [generate]),
        Process("prompts", file, [layers], [threads], [16, 64, 2048], [0], micro_batch=[2048]),
        Process("context", file, [0, layers], [threads], [0], [generate], depth=[depth]),
        Process("no-mmap", file, [layers], [threads], [512], [generate], more=["-lm", "none"]),
    ]


@dataclass(frozen=True)
class Extent:
    """How much is run: for so many seconds at most, in so many rounds, each test `repeats` times."""

    seconds: float
    threads: int
    rounds: int = 3
    repeats: int = 3
    depth: int = 4096
    flash_attention: bool = False


def bench(program: Path, files: dict[str, int], out: Path, extent: Extent) -> int:
    """Run until all rounds are done or the time is over; return how many processes ended well."""
    began, well = monotonic(), 0
    written = [{"what": "machine", **machine()}]
    for number in range(extent.rounds):
        random = Random(number)
        order = [
            process
            for file, layers in files.items()
            for process in processes(file, layers, extent.threads, depth=extent.depth)
        ]
        random.shuffle(order)
        for place, process in enumerate(order):
            left_s = extent.seconds - (monotonic() - began)
            if left_s <= 0:
                return well
            arguments = process.arguments(random, extent.repeats, extent.flash_attention)
            ran = _run([str(program), *arguments], min(left_s, _LONGEST_S))
            at = {"round": number, "place": place, "ended_s": round(monotonic() - began, 3)}
            written.append(at | asdict(process) | ran)
            write_file(out, b"".join(json.dumps(row).encode() + b"\n" for row in written))
            well += ran["status"] == 0
    return well


def _run(command: list[str], longest_s: float) -> dict[str, Any]:
    """Returns what a process printed: rows of JSON, and the end of its messages if it failed."""
    began = monotonic()
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=longest_s)
        status, printed, messages = ended.returncode, ended.stdout, ended.stderr
    except subprocess.TimeoutExpired as error:
        status, printed, messages = -1, _text(error.stdout), _text(error.stderr)
    except OSError as error:
        raise InputError(f"{command[0]}: cannot be run: {error.strerror or error}") from error
    ran = {"command": command, "status": status, "took_s": round(monotonic() - began, 3), "rows": list(_rows(printed))}
    return ran if status == 0 else ran | {"messages": messages[-2000:]}


def _text(printed: str | bytes | None) -> str:
    return printed.decode(errors="replace") if isinstance(printed, bytes) else printed or ""


def _rows(printed: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of what was printed; the last line may be cut."""
    for line in printed.splitlines():
        if line.startswith("{"):
            try:
                yield json.loads(line)
            except ValueError:
                return


def machine() -> dict[str, Any]:
    """Returns what is known of the machine and the day."""
    words = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "cpu": words[0] if words else platform.processor(), "cores": os.cpu_count(), "system": platform.release(),
        "memory_kib": int(memory[0]) if memory else None, "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%MZ}",
    }  # fmt: skip


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _files(given: Sequence[str]) -> dict[str, int]:
    files = {}
    for text in given:
        file, _, layers = text.rpartition("=")
        if not Path(file).is_file() or not layers.isdigit() or int(layers) < 1:
            raise InputError(f"{text!r}: write it as FILE.gguf=48: a file that is there, and how many layers it has")
        files[file] = int(layers)
    return files


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m prestage.calibration.llama_cpp.bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("program", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", nargs="+", metavar="FILE=LAYERS")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--depth", type=int, default=4096, help="tokens of the long context")
    parser.add_argument("--flash-attention", action="store_true")
    given = parser.parse_args(arguments)
    try:
        files = _files(given.files)
        extent = Extent(given.seconds, given.threads, given.rounds, given.repeats, given.depth, given.flash_attention)
        check_file(given.out)
        well = bench(given.program, files, given.out, extent)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"{given.out}: {well} processes")


if __name__ == "__main__":
    main()
