"""Valid files of every reader, and what becomes of them when they are damaged: a value, or one line that refuses.

    python tests/fuzz.py [READER …] [--seconds 30] [--seed 0]   # damages, drawn from the seed; prints what crashed
    python tests/fuzz.py [READER …] --atheris [--seconds 30]    # guided by coverage, where `pip install atheris` works

Guided, every reader has so many seconds in a process of its own; half of the changes are its own damages, so that a
packed file stays one. A crash is any exception but an InputError or what the operating system said, which
`cli/entry.py` makes one line of. Its file is kept for a case in tests/test_fuzz.py. To add a reader: a row of READERS.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

if "--atheris" in sys.argv:  # before what it is to watch is imported; what is watched cannot be compiled
    import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

    os.environ["NUMBA_DISABLE_JIT"] = "1"
    atheris.instrument_imports(include=["prestage"]).__enter__()

import bad_inputs
import gguf_files
import numpy as np
import test_cli
import test_request_traces as requests
import test_routing_logs as logs
from damage import Damage, before_zeros, in_gzip, of_bytes, of_json, of_json_lines, of_npz, of_safetensors, of_text

from prestage.cli import main as main_of_cli
from prestage.errors import InputError

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "tests" / "data" / "configs"
RUNTIMES = ROOT / "calibration" / "samples" / "h200-runtimes"


@dataclass(frozen=True)
class Reader:
    """A reader: the name that its file must have, what makes a valid one, what reads it, and what it is packed as."""

    name: str
    make: Callable[[], bytes]
    read: Callable[[Path], object]
    damage: Damage


# Valid files.


def made(name: str, make: Callable[[Path], object]) -> Callable[[], bytes]:
    """Returns what gives the bytes of a file that is written to a path."""

    def content() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder) / name)
            return (Path(folder) / name).read_bytes()

    return content


def _trace(path: Path) -> None:
    from prestage.workloads.synthetic import synthesize

    synthesize(12, 2, 8, 2, sequences=3, reuse=0.3).save(path)


def _weights(path: Path) -> None:
    from prestage.workloads.learned import Weights
    from prestage.workloads.network import Shape

    shape = Shape(2, 8, 2, horizons=1, context=1, width=4, heads=1, blocks=1)
    Weights(shape, {name: np.zeros(size, np.float16) for name, size in shape.arrays().items()}, {}).save(path)


def _fit(path: Path) -> None:
    from random_scenarios import some_fit

    some_fit(2, 8, 2).save(path)


def _gguf(path: Path) -> None:
    gguf_files.write(path, gguf_files.facts("qwen3moe"), [*gguf_files.block(0), *gguf_files.block(1)])


def _smallest(folder: Path, pattern: str) -> bytes:
    return min(folder.rglob(pattern), key=lambda path: path.stat().st_size).read_bytes()


def _bench() -> bytes:
    lines = gzip.decompress((RUNTIMES / "llama-bench.jsonl.gz").read_bytes()).splitlines()
    rows = [row for line in lines for row in json.loads(line).get("rows", ()) if row["model_filename"][:5] == "olmoe"]
    return json.dumps(rows[:4]).encode()


def _profiled() -> bytes:
    """Returns a profiler's timeline, of its first events."""
    whole = json.loads(gzip.decompress((ROOT / "tests" / "profiled-h100-graph.json.gz").read_bytes()))
    return gzip.compress(json.dumps(whole | {"traceEvents": whole["traceEvents"][:60]}).encode(), mtime=0)


@cache
def _saved() -> Path:
    """Returns the folder of a run, written once."""
    folder = Path(tempfile.mkdtemp())
    command = ["prestage", "run", "guide", "--set", "workload.tokens=2", "--no-baselines", "-o", str(folder / "run")]
    with (
        mock.patch.object(sys, "argv", command),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(SystemExit),
    ):
        main_of_cli()
    return folder / "run"


# What reads them.


def _as_trace(path: Path) -> object:
    from prestage.workloads.importers import open_trace

    return open_trace(path)


def _load_fit(path: Path) -> object:
    from prestage.workloads.fitted import FittedRouting

    return FittedRouting.load(path)


def imported(format: str, num_experts: int | None) -> Callable[[Path], object]:
    """Returns what imports a log of a format."""

    def read(path: Path) -> object:
        from prestage.workloads.importers import import_trace

        return import_trace(path, format, num_experts)

    return read


def _module(name: str, function: str, *more: Any) -> Callable[[Path], object]:
    """Returns what calls a function of the package with the path; nothing is imported before."""

    def read(path: Path) -> object:
        from importlib import import_module

        return getattr(import_module(f"prestage.{name}"), function)(path, *more)

    return read


def _by_name(name: str, function: str) -> Callable[[Path], object]:
    """The same for what takes a file as the name of one."""
    read = _module(name, function)
    return lambda path: read(str(path))  # type: ignore[arg-type]


def _saved_run(path: Path) -> object:
    from prestage.output.saved import load_result

    for other in _saved().iterdir():
        if other.name != path.name and other.name in ("result.json", "run.safetensors"):
            shutil.copy(other, path.parent)
    return load_result(path.parent)


def _rows_of(path: Path) -> object:
    from prestage.engine.scenario.rows import flat, read_rows

    return [flat(row) for row in read_rows(path)]


def _observed(path: Path) -> object:
    from prestage.calibration.observe.logs import Context, load_logs

    context = Context("h200", str(RUNTIMES / "models" / "olmoe-1b-7b.toml"), {"model": {"layers": 8}})
    return load_logs([path], context)


def _requests(text: str) -> Reader:
    return Reader("r.log", text.encode, _module("workloads.requests.traces", "read_requests"), of_text)


def _log(format: str, name: str, text: str, num_experts: int | None, damage: Damage = of_text) -> Reader:
    return Reader(name, text.encode, imported(format, num_experts), damage)


def _file(path: str) -> Callable[[], bytes]:
    return (ROOT / path).read_bytes


_REQUESTS = """
[model]
preset = "olmoe-1b-7b"
[workload.synthetic]
tokens = 4
[requests]
arrivals = "poisson"
rate = 0.5
count = 20
prompt_tokens = { mean = 64 }
"""
_JOURNAL = """{"key": "ab", "error": null, "scenario": {"seed": 1}, "settings": {"seed": 1}, "makespan_ms": 1.5}
{"key": "cd", "error": null, "scenario": {"seed": 2}, "settings": {"seed": 2}, "makespan_ms": 2.5}
"""
_LISTS = """{"model": "m", "num_experts": 8}
{"experts": [[1, 2], null], "weights": [[0.5, 0.25], null]}
{"experts": [[3, 4], [5, 6]], "weights": [[0.5, 0.25], [1, 0]]}
"""
_PRINTED = "layer 0 topk_ids: tensor([[3, 1], [2, 0]], device='cuda')\nlayer 1 topk_ids: tensor([[1, 0], [4, 5]])\n" * 2
_PHONE = ",".join(("wall_ms", "io_ms", "compute_ms", "read_bytes", "stall_ms", "mgmt_ms"))
READERS: dict[str, Reader] = {
    "scenario": Reader(
        "s.toml",
        _file("engine/scenario/shipped/nvme.toml"),
        _module("engine.scenario.scenario", "load_scenario"),
        of_text,
    ),
    "scenario of requests": Reader(
        "s.toml", _REQUESTS.encode, _module("engine.scenario.scenario", "load_scenario"), of_text
    ),
    "suite": Reader(
        "u.toml", _file("experiments/suites/default.toml"), _module("experiments.suite", "load_suite"), of_text
    ),
    "model": Reader(
        "m.toml", _file("workloads/models/mixtral-8x7b.toml"), _module("workloads.model", "load_model"), of_text
    ),
    "config.json": Reader(
        "config.json", (CONFIGS / "Qwen3-30B-A3B.json").read_bytes, _module("workloads.model", "load_model"), of_json
    ),
    "config.json of MLA": Reader(
        "config.json", (CONFIGS / "DeepSeek-V3.json").read_bytes, _module("workloads.model", "load_model"), of_json
    ),
    "config.json of mixers": Reader(
        "config.json",
        (CONFIGS / "Qwen3-Next-80B-A3B.json").read_bytes,
        _module("workloads.model", "load_model"),
        of_json,
    ),
    "gguf": Reader("m.gguf", made("m.gguf", _gguf), _module("workloads.model", "load_model"), before_zeros(of_bytes)),
    "profile": Reader(
        "p.json", _file("calibration/profiles/rtx3090.json"), _by_name("resources.profile", "load_profile"), of_json
    ),
    "runtime": Reader(
        "r.toml", _file("resources/runtimes/llama.cpp.toml"), _by_name("resources.runtime", "load_runtime"), of_text
    ),
    "trace.npz": Reader("t.npz", made("t.npz", _trace), _as_trace, of_npz),
    "trace.safetensors": Reader("t.safetensors", made("t.safetensors", _trace), _as_trace, of_safetensors),
    "weights": Reader(
        "w.safetensors", made("w.safetensors", _weights), _module("workloads.learned", "load_weights"), of_safetensors
    ),
    "fit": Reader("f.json", made("f.json", _fit), _load_fit, of_json),
    "popularity": Reader(
        "n.csv",
        "layer,expert,count\n0,0,5\n0,1,7\n1,0,2\n1,1,9\n".encode,
        _module("workloads.popularity", "load_popularity"),
        of_text,
    ),
    "bigmoeonedge": _log("bigmoeonedge", "log.route.csv", test_cli.LOG, None),
    "jsonl": _log("jsonl", "j.log", _LISTS, 8),
    "topk-ids": _log("topk-ids", "k.log", _PRINTED, 8),
    "guide": _log("guide", "g.log", "[[3, 0, 1], [2, 2, 2], [[1], [0], [3]]]", 4),
    **{f"log: {what}": _log("auto", name, text, 8) for what, (name, text) in logs.LOGS.items()},
    "azure": _requests(requests.AZURE),
    "burstgpt": _requests(requests.BURSTGPT),
    "mooncake": _requests(requests.MOONCAKE),
    "benchmark": _requests(json.dumps(requests.VLLM)),
    "llama-bench": Reader("b.json", _bench, _observed, of_json),
    "phone log": Reader(
        "v.csv",
        (_PHONE + "\n" + "".join(f"{n}.5,1.25,0.5,{n}00,0.25,0.125\n" for n in range(12))).encode,
        _module("calibration.published.run", "load_log"),
        of_text,
    ),
    "samples": Reader(
        "s.json",
        _file("calibration/samples/h200-two-gpus.json"),
        _module("calibration.measure.samples", "load_samples"),
        of_json,
    ),
    "measured run": Reader(
        "m.json.gz",
        lambda: _smallest(bad_inputs.MEASURED, "*.json.gz"),
        _module("calibration.executor.measured", "load_measured"),
        in_gzip(of_json),
    ),
    "result": Reader("result.json", lambda: (_saved() / "result.json").read_bytes(), _saved_run, of_json),
    "saved run": Reader(
        "run.safetensors", lambda: (_saved() / "run.safetensors").read_bytes(), _saved_run, of_safetensors
    ),
    "journal": Reader("rows.jsonl", _JOURNAL.encode, _rows_of, of_json_lines),
    "timeline": Reader(
        "t.json.gz",
        _profiled,
        _module("output.profiler_trace", "load_timeline"),
        in_gzip(of_text),
    ),
}


def crash(reader: Reader, content: bytes, folder: Path) -> BaseException | None:
    """Returns what a reader failed with on a content; None if it read it or refused it in a line."""
    path = folder / reader.name
    path.write_bytes(content)
    try:
        reader.read(path)
    except InputError as error:
        return error if len(str(error).splitlines()) > 1 or len(str(error)) > 5000 else None
    except OSError:
        return None
    except Exception as error:
        return error
    return None


def damaged(reader: Reader, seed: int, valid: bytes) -> bytes:
    """Returns a valid content damaged as a seed draws it: by the reader's own damage, and now and then once more."""
    draw = random.Random(seed)
    content: bytes = reader.damage(valid, draw)
    if draw.random() < 0.1:
        content = of_bytes(content, draw)
    return content


def search(name: str, seed: int, seconds: float, keep: Path) -> int:
    """Damage a reader's file for some seconds; print each new kind of crash and keep its file. Returns the crashes."""
    reader, seen, tried, until = READERS[name], set(), 0, time.monotonic() + seconds
    valid = reader.make()
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < until:
            tried += 1
            content = damaged(reader, seed + tried, valid)
            error = crash(reader, content, Path(folder))
            if error is None:
                continue
            where = traceback.extract_tb(error.__traceback__)[-1]
            kind = (type(error).__name__, where.filename, where.lineno)
            if kind not in seen:
                seen.add(kind)
                kept = keep / f"{seed + tried}-{reader.name}"
                kept.write_bytes(content)
                ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "prestage" in frame.filename][
                    -1
                ]
                print(
                    f"{name}, seed {seed + tried}: {error!r:.300}\n  {ours.filename}:{ours.lineno}: {kept}", flush=True
                )
    print(f"{name}: {tried} tried, {len(seen)} kinds of crash", flush=True)
    return len(seen)


def guided(name: str, seed: int, seconds: float, keep: Path) -> None:
    """Let atheris look for a content that crashes a reader, from its valid one on; it ends the process."""
    reader, folder = READERS[name], Path(tempfile.mkdtemp())
    valid = reader.make()
    crash(reader, valid, folder)  # loads what it needs

    def one(content: bytes) -> None:
        error = crash(reader, content, folder)
        if error is not None:
            raise error

    def change(content: bytes, most: int, drawn: int) -> bytes:
        draw = random.Random(drawn)
        if draw.random() < 0.5:
            with contextlib.suppress(Exception):  # what is broken already is no file of its kind to be damaged
                found: bytes = reader.damage(content, draw)[:most]
                return found
        mutated: bytes = atheris.Mutate(content, most)
        return mutated

    (folder / "corpus").mkdir()
    (folder / "corpus" / "valid").write_bytes(valid)
    budget = [f"-max_total_time={seconds:.0f}", f"-seed={seed + 1}", f"-max_len={2 * len(valid) + 4096}"]
    kept = [f"-artifact_prefix={keep}/{reader.name}-", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], str(folder / "corpus"), *budget, *kept], one, custom_mutator=change)
    atheris.Fuzz()


def guided_apart(name: str, seed: int, seconds: float, keep: Path) -> int:
    """Let atheris look at a reader in a process of its own; print what it did. Returns 1 if it found a crash."""
    options = ["--seconds", str(seconds), "--seed", str(seed), "--keep", str(keep)]
    done = subprocess.run(
        [sys.executable, __file__, name, "--atheris", "--one", *options], capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    tried = re.search(r"number_of_executed_units: *(\d+)", said)
    covered = re.findall(r"cov: (\d+)", said) or ["?"]
    found = "nothing found" if done.returncode == 0 else "a crash"
    count = tried[1] if tried else "?"
    print(f"{name}: {count} tried, {covered[0]} places covered, then {covered[-1]}: {found}", flush=True)
    if done.returncode:
        print(said[-3000:], flush=True)
    return int(done.returncode != 0)


def main() -> None:
    """Search for crashes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--atheris", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    how = search if not given.atheris else guided if given.one else guided_apart
    if sum(how(name, given.seed, given.seconds, given.keep) or 0 for name in given.readers or READERS):
        sys.exit(1)


if __name__ == "__main__":
    main()
