"""`prestage model`: list, show, import and check, and a run of a config.json and of a GGUF file by one command."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from gguf_files import OUTSIDE, block, facts, write
from test_cli import CONFIGS, Prestage, prestage  # noqa: F401

from prestage.workloads.model import load_model, preset_names
from prestage.workloads.model_files.sources import read_shapes
from prestage.workloads.model_files.toml_text import toml_of


def test_list_has_every_shipped_model_and_family(prestage: Prestage) -> None:  # noqa: F811
    data = prestage("model", "list", "--json").json()
    assert [model["name"] for model in data["models"]] == preset_names()
    assert "qwen3_next" in data["families"]
    said = prestage("model", "list").out
    assert all(name in said for name in [*preset_names(), "116.8 B", "36 x 128"])


def test_show_says_what_a_model_moves(prestage: Prestage) -> None:  # noqa: F811
    data = prestage("model", "show", str(CONFIGS / "gpt-oss-20b.json"), "--json").json()
    model = load_model(CONFIGS / "gpt-oss-20b.json")
    assert data["expert_bytes"] == model.expert_bytes[0]
    assert data["step_bytes"] == sum(model.dense_bytes) + 4 * sum(model.expert_bytes) + model.head_bytes
    assert data["windows"] == [{"tokens": 128, "kv_bytes_per_token": 12 * 2048}]
    said = prestage("model", "show", str(CONFIGS / "gpt-oss-20b.json")).out
    assert "24.0 KiB of it for the last 128 tokens alone" in said
    assert "76.5 MiB" in prestage("model", "show", str(CONFIGS / "Qwen3-Next-80B-A3B.json")).out


def test_show_says_where_layers_differ(prestage: Prestage, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "two.toml"
    file.write_text(
        """
        name = "two"
        source = "mine"
        hidden = 256
        vocabulary = 1000
        stacks = [{blocks = 5}]
        dtypes = {expert = "bf16", dense = "bf16"}
        attention = {kind = "gqa", heads = 4, kv_heads = 2, head_dim = 64}
        kernels = {dense = 40, expert = 5}
        moe = {experts = 8, top_k = 2, expert_ff = 128, by_layer = [{layers = [3, 4], experts = 4, top_k = 1}]}
        """,
        encoding="utf-8",
    )
    assert "top-2 of 8 experts in 3, top-1 of 4 experts in 2" in prestage("model", "show", str(file)).out


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.json")))
def test_an_imported_model_is_the_same(tmp_path: Path, name: str) -> None:
    path = tmp_path / "some.toml"
    path.write_text(toml_of(read_shapes(str(CONFIGS / f"{name}.json"))), encoding="utf-8")
    assert load_model(path) == load_model(CONFIGS / f"{name}.json")


def test_import_writes_a_file_to_be_changed(prestage: Prestage, tmp_path: Path) -> None:  # noqa: F811
    ran = prestage("model", "import", str(CONFIGS / "Kimi-K3.json"), "-o", "k3.toml", "--name", "mine")
    assert (ran.status, ran.out) == (0, "k3.toml: mine, 92 MoE layers\n")
    assert load_model(tmp_path / "k3.toml").name == "mine"
    assert max(map(len, (tmp_path / "k3.toml").read_text().splitlines())) <= 120
    again = prestage("model", "import", str(CONFIGS / "Kimi-K3.json"), "-o", "k3.toml")
    assert again.err == "k3.toml: has a model already, which this one replaces\n"


def test_what_cannot_be_imported_is_refused(prestage: Prestage) -> None:  # noqa: F811
    ran = prestage("model", "import", str(CONFIGS / "Kimi-K3.json"), "-o", "k3.json")
    assert (ran.status, ran.err) == (2, "prestage: --out k3.json: must end with .toml, as a model's file does\n")
    assert "is used as it is" in prestage("model", "import", "some.gguf", "-o", "k3.toml").err


def checkpoint(folder: Path, name: str, sizes: dict[str, int]) -> None:
    """A safetensors file's header, without the tensors."""
    header, at = {}, 0
    for tensor, size in sizes.items():
        header[tensor] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    content = json.dumps(header).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(content)) + content)


def test_check_compares_with_the_checkpoint(prestage: Prestage, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "config.json").write_bytes((CONFIGS / "OLMoE-1B-7B-0924.json").read_bytes())
    ran = prestage("model", "check", ".")
    assert (ran.status, ran.out.splitlines()[-1]) == (0, "no safetensors beside it to check by")
    model = load_model(tmp_path)
    size = 2 * (model.parameters or 0)
    # Of 16 blocks; block 16 only guesses ahead, and another part sees.
    checkpoint(
        tmp_path, "model-1.safetensors", {"model.layers.15.mlp": size - 5, "visual.x": 9, "model.layers.16.mlp": 7}
    )
    checkpoint(tmp_path, "model-2.safetensors", {"lm_head.weight": 5})
    data = prestage("model", "check", "config.json", "--json").json()
    assert (data["checkpoint_bytes"], data["other_bytes"], data["difference"]) == (size, 16, 0)
    checkpoint(tmp_path, "model-2.safetensors", {"lm_head.weight": size // 100})
    ran = prestage("model", "check", ".")
    assert ran.status == 2
    assert "-0.99% from the headers of 2 safetensors files: more than 0.5%" in ran.err


def test_check_by_an_index_alone(prestage: Prestage, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "config.json").write_bytes((CONFIGS / "OLMoE-1B-7B-0924.json").read_bytes())
    size = 2 * (load_model(tmp_path).parameters or 0)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": size}}))
    assert prestage("model", "check", ".").out.endswith("by total_size of model.safetensors.index.json: +0.000%\n")
    index.write_text(json.dumps({"metadata": {"total_size": 2 * size}}))
    assert "the index also counts draft layers" in prestage("model", "check", ".").err
    index.write_text("{}")
    assert "metadata.total_size = None" in prestage("model", "check", ".").err


@pytest.mark.parametrize(
    "content", [b"", b"\x08\0\0\0\0\0\0\0{", b"\xff" * 8, struct.pack("<Q", 9) + b'{"t": 4}' + b" "]
)
def test_what_is_no_checkpoint_is_refused(prestage: Prestage, tmp_path: Path, content: bytes) -> None:  # noqa: F811
    (tmp_path / "config.json").write_bytes((CONFIGS / "OLMoE-1B-7B-0924.json").read_bytes())
    (tmp_path / "model-1.safetensors").write_bytes(content)
    ran = prestage("model", "check", ".")
    assert ran.status == 2
    assert ran.err.startswith("prestage: model-1.safetensors: ")


SMALL = ["run", "synthetic", "--no-baselines", "--json"]
TINY_WORKLOAD = [f"workload.synthetic.{key}={value}" for key, value in
                 {"tokens": 4, "sequences": 1, "prefill_tokens": 0, "working_set": "none"}.items()]  # fmt: skip


def run_of(prestage: Prestage, *settings: str) -> dict[str, object]:  # noqa: F811
    options = [option for setting in [*TINY_WORKLOAD, *settings] for option in ("--set", setting)]
    ran = prestage(*SMALL, *options)
    assert ran.status == 0, ran.err
    data: dict[str, object] = ran.json()
    return data


def test_a_config_runs_by_its_path(prestage: Prestage, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "config.json").write_bytes((CONFIGS / "Qwen3-Next-80B-A3B.json").read_bytes())
    ran = run_of(prestage, "model.preset=config.json", "model.bits_per_weight=4.85", "memory.capacity=ignore")
    assert ran["model"] == {"name": tmp_path.name, "layers": 48, "experts": 512, "top_k": 10}


def test_a_gguf_file_runs_by_its_path(prestage: Prestage, tmp_path: Path) -> None:  # noqa: F811
    write(tmp_path / "tiny.gguf", facts("tiny"), OUTSIDE + block(0, up=12, down=14) + block(1, up=12), cut=True)
    ran = run_of(prestage, "model.preset=tiny.gguf", "memory.gpu_budget=100%")
    assert ran["model"] == {"name": "Tiny", "layers": 2, "experts": 4, "top_k": 2}
