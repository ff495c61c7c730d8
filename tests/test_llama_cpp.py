"""llama.cpp's files of random weights, the source that is built, and rounds of llama-bench."""

import io
import json
import stat
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prestage.calibration.llama_cpp import bench, build
from prestage.calibration.llama_cpp.bench import Extent, processes
from prestage.calibration.llama_cpp.build import BuildError, cut
from prestage.calibration.llama_cpp.random_gguf import TYPES, write_random
from prestage.errors import InputError
from prestage.workloads.model import load_model

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("name", TYPES)
def test_drawn_blocks_are_finite_and_of_the_spread_that_was_asked_for(name: str) -> None:
    kind = TYPES[name]
    blocks = kind.draw(4096, 0.02)
    assert blocks.shape == (4096, kind.size_bytes) and blocks.dtype == np.uint8
    weights = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind.name])
    assert np.isfinite(weights).all() and abs(weights.mean()) < 0.003
    assert weights.std() == pytest.approx(0.02, rel=0.12), "a power of two is as near as mxfp4's exponent comes"


SHAPES = """
name = "small"
source = "this test"
hidden = 512
vocabulary = 300
[dtypes]
expert = "bfloat16"
dense = "bfloat16"
[[stacks]]
blocks = 3
[attention]
kind = "gqa"
heads = 4
kv_heads = 2
head_dim = 128
{attention}
[moe]
experts = 8
top_k = 2
expert_ff = 256
{moe}
[kernels]
dense = 50
expert = 5
"""
#: What tells the families apart: Mixtral, Qwen3, OLMoE, gpt-oss.
FAMILIES = {
    "llama": {"attention": "", "moe": ""},
    "qwen3moe": {"attention": 'qk_norm = "head"', "moe": ""},
    "olmoe": {"attention": 'qk_norm = "whole"', "moe": ""},
    "gpt-oss": {"attention": "sinks = true\nbias = true", "moe": "bias = true\nrouter_bias = true"},
}


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("experts", ["q4_k", "q8_0", "mxfp4"])
def test_a_file_is_read_as_the_shapes_with_other_types(tmp_path: Path, architecture: str, experts: str) -> None:
    shapes, file = tmp_path / "small.toml", tmp_path / "random.gguf"
    shapes.write_text(SHAPES.format(**FAMILIES[architecture]))
    size = write_random(str(shapes), file, experts=experts, layers=2)
    assert size == file.stat().st_size
    read, asked = load_model(file), load_model(shapes, layers=2, dtype=experts)
    for key in ("layers", "experts", "top_k", "hidden", "expert_ff", "expert_matrices", "expert_dtype"):
        assert getattr(read, key) == getattr(asked, key), key
    biases = 2 * asked.expert_ff + asked.hidden if architecture == "gpt-oss" else 0  # float32 here, bfloat16 there
    assert read.expert_bytes[0] == asked.expert_bytes[0] + 2 * biases
    reader = gguf.GGUFReader(file)
    assert reader.fields["general.architecture"].contents() == architecture
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    kind = gguf.GGMLQuantizationType[TYPES[experts].name]
    off = 0.42 if experts == "mxfp4" else 0.12  # its scales are whole powers of two: at most sqrt(2) off
    for name, width in (("up", asked.hidden), ("down", asked.expert_ff)):
        weights = gguf.dequantize(tensors[f"blk.1.ffn_{name}_exps.weight"].data[0], kind)
        assert weights.shape[-1] == width and weights.std() * width**0.5 == pytest.approx(1, rel=off)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("deepseek-v3", {}, "grouped-query attention"),
        ("gpt-oss-20b", {"experts": "q4_k"}, "rows of 2880 are no whole blocks of q4_k"),
        ("olmoe-1b-7b", {"experts": "q5_k"}, "--experts 'q5_k': choose one of"),
    ],
)
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(
    tmp_path: Path, model: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        write_random(model, tmp_path / "x.gguf", **options)
    assert not list(tmp_path.iterdir())


def package(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    return path


def test_the_source_is_cut_to_what_the_programs_need(tmp_path: Path) -> None:
    long = f"p/vendor/llama.cpp/ggml/src/ggml-cuda/template-instances/{'long-name-' * 9}instance.cu"
    kept = ["p/vendor/llama.cpp/CMakeLists.txt", "p/vendor/llama.cpp/tools/llama-bench/main.cpp", long]
    left = ["p/README.md", "p/vendor/llama.cpp/ggml/src/ggml-metal/a.m", "p/vendor/llama.cpp/tools/server/a.cpp"]
    out = tmp_path / "cut.tar.xz"
    assert cut(package(tmp_path / "p.tar.gz", kept + left), out) == len(kept) + 2
    with tarfile.open(out) as archive:
        held = {member.name: archive.extractfile(member).read().decode() for member in archive}  # type: ignore[union-attr]
    lists = {f"llama.cpp/{name}" for name in build._LISTS}
    assert held.keys() - lists == {name.replace("p/vendor/", "") for name in kept}
    assert held[long.replace("p/vendor/", "")] == long
    assert "llama-bench" in held["llama.cpp/tools/CMakeLists.txt"]


def test_another_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"holds no vendor/llama\.cpp"):
        cut(package(tmp_path / "p.tar.gz", ["p/setup.py"]), tmp_path / "out.tar.xz")
    assert not (tmp_path / "out.tar.xz").exists()


def test_a_file_gets_cpu_layers_in_powers_of_two_and_threads() -> None:
    layers, threads, *_ = processes("m.gguf", 12, 16)
    assert layers.n_cpu_moe == [0, 1, 2, 4, 8, 12] and layers.threads == [16]
    assert threads.n_cpu_moe == [12] and threads.threads == [4, 8]


#: Stands where llama-bench does: one row of JSON for each of its -ncmoe, or what is wrong.
PROGRAM = f"""#!{sys.executable}
import json, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "broken" in given["-m"]:
    print('{{"cut')
    sys.exit("cannot load")
for layers in given["-ncmoe"].split(","):
    print(json.dumps({{"n_cpu_moe": int(layers), "samples_ns": [1]}}))
"""


def test_rounds_are_shuffled_and_failures_kept(tmp_path: Path) -> None:
    program = tmp_path / "llama-bench"
    program.write_text(PROGRAM)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    out = tmp_path / "rows.jsonl"
    well = bench.bench(program, {"good.gguf": 3, "broken.gguf": 2}, out, Extent(60, 4, rounds=2))
    first, *ran = [json.loads(line) for line in out.read_text().splitlines()]
    assert first["cores"] and len(ran) == 20 and well == 10
    by_round = [[(row["file"], row["what"]) for row in ran if row["round"] == number] for number in (0, 1)]
    assert by_round[0] != by_round[1] and sorted(by_round[0]) == sorted(by_round[1])
    for row in ran:
        if row["file"] == "broken.gguf":
            assert row["status"] == 1 and row["rows"] == [] and "cannot load" in row["messages"]
        else:
            assert sorted(each["n_cpu_moe"] for each in row["rows"]) == sorted(row["n_cpu_moe"])
    assert bench.bench(program, {"good.gguf": 3}, out, Extent(0, 4)) == 0, "no time, no process"
