"""What real runtimes took on an H200, as committed: `calibrate decode` and llama-bench, raw."""

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prestage.dtypes import bits_of
from prestage.resources.profile import load_profile
from prestage.resources.runtime import load_runtime
from prestage.workloads.importers import open_trace

FOLDER = Path(__file__).parent.parent / "calibration" / "samples" / "h200-runtimes"
DAYS = ("decode.json.gz", "decode-2026-12-01.json.gz")
MODELS = {"gpt-oss-20b": 9, "olmoe-1b-7b": 9, "qwen3-30b-a3b": 9, "mixtral-8x7b": 4}


def decoded(model: str, file: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(gzip.decompress((FOLDER / model / file).read_bytes()))
    return report


@pytest.mark.parametrize("day", DAYS)
@pytest.mark.parametrize("model", MODELS)
def test_each_setting_lies_beside_the_routing_that_it_met(model: str, day: str) -> None:
    report = decoded(model, day)
    assert report["machine"]["device"] == "NVIDIA H200" and report["machine"]["driver"] and report["machine"]["date"]
    assert report["machine"]["versions"]["torch"] and report["machine"]["versions"]["transformers"]
    assert len(report["runs"]) == MODELS[model]
    for run in report["runs"]:
        file = FOLDER / model / run["scenario"]["workload"]["trace"]
        assert hashlib.sha256(file.read_bytes()).hexdigest() == run["trace_sha256"]
        trace = open_trace(str(file))
        assert (trace.layers, trace.k) == (report["model"]["layers"], report["model"]["top_k"])
        assert all(len(repeat["step_ns"]) == report["tokens"] for repeat in run["repeats"])


@pytest.mark.parametrize(("file", "flash", "in_all", "count"), [("", 0, 2, 74), ("-flash", 1, 3, 76)])
def test_llama_bench_gives_samples_of_every_cell_in_rounds(file: str, flash: int, in_all: int, count: int) -> None:
    lines = gzip.decompress((FOLDER / f"llama-bench{file}.jsonl.gz").read_bytes()).splitlines()
    first, *processes = map(json.loads, lines)
    assert first["driver"] and first["date"] and first["gpu"] == "NVIDIA H200" and first["llama.cpp"]
    cells: dict[tuple[Any, ...], set[int]] = {}
    keys = ("model_filename", "n_cpu_moe", "n_threads", "n_prompt", "n_gen", "n_depth", "load_mode")
    for process in processes:
        for row in process["rows"]:
            cells.setdefault(tuple(row[key] for key in keys), set()).add(process["round"])
            assert len(row["samples_ns"]) == 2 and row["flash_attn"] == flash
    assert len(cells) == 76
    # Without flash attention the last process of the second round was cut off.
    assert sum(len(rounds) >= in_all for rounds in cells.values()) == count


def test_what_transformers_moves_of_the_cache_took_so_long_in_the_profile_of_its_kernels() -> None:
    profile = json.loads(gzip.decompress((FOLDER / "components" / "gpt-oss-20b-b4-c8000.json.gz").read_bytes()))
    # Three steps, one of three layers with full attention: the longest kernels of a kind are of those.
    kinds = {"repeat": ("direct_copy_kernel", 2), "products": ("gemvx::kernel|wmma_tensorop", 2)}
    us = {name: _longest(profile, pattern, 3 * each) / 3 for name, (pattern, each) in kinds.items()}
    parts = json.loads((FOLDER / "components" / "parts.json").read_text())
    (cat,) = (each["us"] for each in parts if each["what"] == "cache" and each["kv_heads"] == 16)
    sequences, heads, kv_heads, positions, width = 4, 64, 8, 8000, 64
    cached = 2 * 2 * sequences * kv_heads * positions * width
    repeated = cached * heads // kv_heads
    moved = {"cat": (2 * 4 * cached, cat), "repeat": (cached + repeated, us["repeat"]),
             "products": (repeated, us["products"])}  # fmt: skip
    rate = load_profile("h200").compute.rule.bytes_per_second / 1e6
    shares = [move.share for move in load_runtime("transformers").cache_moves]
    for (size, taken), share in zip(moved.values(), shares, strict=False):
        assert size / taken / rate == pytest.approx(share, rel=0.02)


def _longest(profile: dict[str, Any], pattern: str, count: int) -> float:
    """Returns what the longest so many kernels of a name took together, in us."""
    took: list[float] = [each["dur"] for each in profile["traceEvents"] if re.search(pattern, each["name"])]
    return sum(sorted(took)[-count:])


def measured_cores(threads: int, *widths: int) -> Iterator[tuple[str, int, float]]:
    """Yields what each of so many threads computed by itself: dtype, tokens, bytes a second."""
    row = re.compile(r"type_a=(\w+),.*n_used=(\d+),b=0,m=(\d+),n=(\d+),k=(\d+),.*- +([0-9.]+) us/run")
    for width in widths:
        text = (FOLDER / "components" / f"mul-mat-id-cpu-t{threads}-m{width}.txt").read_text()
        for dtype, used, rows, tokens, columns, us in row.findall(text):
            size_bytes = int(used) * int(rows) * int(columns) * float(bits_of(dtype.lower())) / 8
            yield dtype.lower(), int(tokens), int(tokens) * size_bytes / float(us) * 1e6 / threads


def test_llama_cpps_cores_are_those_that_were_measured_by_themselves() -> None:
    cores = {
        (core.dtype, core.tokens, core.threads): core.bytes_per_second for core in load_runtime("llama.cpp").cpu_cores
    }
    found = [each for each in measured_cores(8, 768, 2880) if each[1] == 1]
    assert len(found) == 5
    for dtype, tokens, rate in found:
        # Two of the types were measured on another day too, within a fifth.
        assert cores[dtype, tokens, None] == pytest.approx(rate, rel=0.12), dtype
    for threads in (4, 8, 16):
        (one, four) = measured_cores(threads, 2880)
        for dtype, tokens, rate in (one, four):
            assert cores[dtype, tokens, threads] == pytest.approx(rate, rel=0.02), (threads, tokens)
    reads = [json.loads(line) for line in (FOLDER / "components" / "stream.jsonl").read_text().splitlines()]
    (eight,) = (each["read_gb_per_s"] for each in reads if each["threads"] == 8)
    thread = load_runtime("llama.cpp").costs.cpu_thread
    assert thread is not None and thread.bytes_per_second == pytest.approx(eight / 8 * 1e9, rel=0.1)


def test_no_sample_names_a_folder_of_the_machine() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert len(files) == 32 + 2 * 4 + 3 + 4 + 11 + 2
    for file in files:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        assert not any(folder in content for folder in (b"/tmp", b"/root", b"/work", b"/home")), file
