"""Hugging Face's config.json: every family against its tensors' own count, quantization, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prestage.workloads.model import ModelError, load_model
from prestage.workloads.model_files.config_families import BY_ARCHITECTURE, FAMILIES, REFUSED, SAME, family_of
from prestage.workloads.model_files.config_fields import Config
from prestage.workloads.model_files.hf_config import known_types, language

CONFIGS = Path(__file__).parent / "data" / "configs"
FACTS: dict[str, dict[str, Any]] = json.loads((CONFIGS.parent / "published_models.json").read_text(encoding="utf-8"))
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))


def data_of(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return data


def write(folder: Path, data: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def near(published: str, weights: int) -> bool:
    """Whether a published number of billions is this one, rounded or cut to its digits."""
    digits = len(published.partition(".")[2])
    billions = weights / 1e9
    return published in (f"{billions:.{digits}f}", f"{int(billions * 10**digits) / 10**digits:.{digits}f}")


def test_every_config_has_its_facts_and_every_fact_a_config() -> None:
    assert sorted(FACTS) == NAMES


@pytest.mark.parametrize("name", [name for name in NAMES if "tensors" in FACTS[name]])
def test_the_weights_are_those_of_the_tensors(name: str) -> None:
    model = load_model(CONFIGS / f"{name}.json")
    # Left out: a few norms and biases, and the projections of Flash-Next's table of n-grams (0.03 %).
    assert model.parameters == pytest.approx(FACTS[name]["tensors"], rel=3e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if "total" in FACTS[name]])
def test_the_total_is_the_published_one(name: str) -> None:
    parameters = load_model(CONFIGS / f"{name}.json").parameters
    assert parameters is not None
    assert near(FACTS[name]["total"], parameters)


@pytest.mark.parametrize("name", [name for name in NAMES if "active" in FACTS[name]])
def test_the_active_weights_are_the_published_ones(name: str) -> None:
    model, counts = load_model(CONFIGS / f"{name}.json"), FACTS[name]["counts"]
    config = language(Config(name, data_of(name)))
    table = config.count("vocab_size") * config.hidden
    active = model.active_parameters
    assert active is not None
    if counts == "embedding and head" and not model.tied_embeddings:
        active += table
    assert near(FACTS[name]["active"], active - table if counts == "neither" else active)


def test_at_least_40_families_have_a_real_config() -> None:
    found = {family_of(language(Config(name, data_of(name))))[0] for name in NAMES}
    assert len(found) >= 40
    # The rest are read by rules that others share, and are not counted.
    rest = {"axk1", "granitemoeshared", "grok-1", "arctic", "minimax", "gpt_oss_puzzle", "nemotron_h_puzzle"}
    rest |= {"hy_v3", "exaone_moe", "sarvam_moe", "mellum", "mistral4", "afmoe"}
    assert set(FAMILIES) - found == rest


def test_layers_that_differ_keep_what_their_own_mixer_does() -> None:
    # 12 of 48 blocks are attention with 2 key heads of 256; 36 are gated delta rules with 32 states of 128 x 128 and
    # the last 4 inputs of the convolution's 8,192 channels, in float32.
    model = load_model(CONFIGS / "Qwen3-Next-80B-A3B.json")
    assert model.kv_bytes_per_token == 12 * 2 * 2 * 256 * 2 == 24_576
    assert model.state_bytes == 36 * 4 * (32 * 128 * 128 + 4 * 8192)
    # 12 x 27.3 M and 36 x 33.7 M weights, 48 routers of 512 x 2048 and 48 shared experts of 3 x 2048 x 512.
    assert sum(model.dense_bytes) == pytest.approx(2 * (12 * 27.3e6 + 36 * 33.7e6 + 48 * 2048 * 512 * 4), rel=2e-3)
    assert model.layers == 48


def test_windows_stop_growing(tmp_path: Path) -> None:
    import numpy as np

    model = load_model(CONFIGS / "gpt-oss-20b.json")
    # 12 of 24 blocks see 128 tokens; a token of a block is 2 x 8 x 64 values of 2 bytes.
    assert model.cached_bytes(np.array([0, 1, 128, 1000])).tolist() == [
        0, 24 * 2048, 128 * 24 * 2048, (1000 + 128) * 12 * 2048
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expert", "dense"),
    [
        ("gpt-oss-120b", "mxfp4", "bfloat16"),
        ("Kimi-K2.5", "int4_g32", "bfloat16"),
        ("Kimi-K3", "mxfp4", "bfloat16"),
        ("MiMo-V2-Flash", "float8", "float8"),
        ("DeepSeek-V4-Flash", "mxfp4", "float8"),
        ("DeepSeek-V4-Flash-NVFP4", "nvfp4", "float8"),
        ("Qwen3.6-35B-A3B-NVFP4", "nvfp4", "float8"),
        ("Qwen1.5-MoE-A2.7B-Chat-GPTQ-Int4", "int4_g128", "int4_g128"),
        ("Mixtral-8x7B-Instruct-v0.1-AWQ", "int4_g128", "int4_g128"),
    ],
)
def test_quantization_is_read(name: str, expert: str, dense: str) -> None:
    model = load_model(CONFIGS / f"{name}.json")
    assert (model.expert_dtype, model.dense_dtype) == (expert, dense)


def test_gptq_holds_a_scale_and_a_zero_point_a_group() -> None:
    # 3 x 2048 x 1408 weights of 4 bits, and 16 + 4 bits for every 128 of them.
    model = load_model(CONFIGS / "Qwen1.5-MoE-A2.7B-Chat-GPTQ-Int4.json")
    weights = 3 * 2048 * 1408
    assert set(model.expert_bytes) == {weights // 2 + weights // 128 * 20 // 8}


def test_modelopts_file_beside_the_config_counts(tmp_path: Path) -> None:
    data = data_of("Qwen3-30B-A3B")
    write(tmp_path, data)
    quantization = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    beside = tmp_path / "hf_quant_config.json"
    beside.write_text(json.dumps({"quantization": quantization}), encoding="utf-8")
    model = load_model(tmp_path)
    assert model.name == tmp_path.name
    assert (model.expert_dtype, model.dense_dtype) == ("nvfp4", "nvfp4")
    # 3 x 2048 x 768 weights of 4.5 bits: 4 and a scale of 8 bits for 16 of them.
    assert set(model.expert_bytes) == {3 * 2048 * 768 * 9 // 16}
    assert model.kv_bytes_per_token == 48 * 2 * 4 * 128
    quantization["exclude_modules"] = ["model.layers.0.self_attn*"]
    beside.write_text(json.dumps({"quantization": quantization}), encoding="utf-8")
    assert load_model(tmp_path).dense_dtype == "bfloat16"


def test_draft_layers_are_left_out_and_named() -> None:
    assert "without its 1 draft layer" in load_model(CONFIGS / "GLM-4.5-Air.json").source
    assert "the language part" in load_model(CONFIGS / "Qwen3-VL-30B-A3B-Instruct.json").source


def test_bits_per_weight_of_all_matrices() -> None:
    model = load_model(CONFIGS / "Qwen3-30B-A3B.json", bits_per_weight=4.85)
    assert (model.expert_dtype, model.dense_dtype) == ("4.85bpw", "4.85bpw")
    assert set(model.expert_bytes) == {-(-3 * 2048 * 768 * 485 // 800)}
    # The head's 151,936 x 2048 weights and the final norm's 2048 in float32.
    assert model.head_bytes == -(-151936 * 2048 * 485 // 800) + 4 * 2048


def test_no_type_is_named_twice() -> None:
    assert not set(FAMILIES) & set(SAME)
    assert set(SAME.values()) | set(BY_ARCHITECTURE.values()) <= set(FAMILIES)
    assert not set(known_types()) & set(REFUSED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, r"model_type = 'llama': not a family that is known; write its shapes in a TOML file"),
        ({"model_type": "longcat_flash"}, r"longcat_flash'?: .*zero-computation"),
        ({"num_experts": None}, r"config\.json: num_experts: missing; must be given"),
        ({"num_experts": "128"}, r"num_experts = '128': must be an integer of at least 1"),
        (
            {"num_experts": [8, 16]},
            r"num_experts = \[8, 16\]: must be one number; of experts, choices, .* also a list with one a layer",
        ),
        ({"hidden_size": [2048]}, r"hidden_size = \[2048\]: must be one number"),
        ({"head_dim": [None, None]}, r"head_dim = \[None, None\]: must be one number"),
        ({"num_experts_per_tok": 200}, r"moe\.top_k.*200|top_k = 200: must be 1 to experts = 128"),
        ({"tie_word_embeddings": "no"}, r"tie_word_embeddings = 'no': must be true or false"),
        ({"torch_dtype": "bf17"}, r"dtype = 'bf17': choose one of float32"),
        ({"mlp_only_layers": list(range(48))}, r"no block is a mixture of experts"),
        ({"quantization_config": 4}, r"quantization_config = 4: must be an object"),
        ({"quantization_config": {"quant_method": "zip"}}, r"quant_method = 'zip': choose one of fp8, mxfp4"),
        ({"layer_types": ["sliding_attention"] * 3}, r"layer_types: 3 entries: must have one a layer, 48"),
        ({"layer_types": ["sliding_attention"] * 48}, r"sliding_window: missing; must be given"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path, data_of("Qwen3-30B-A3B") | changes)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", r"config\.json: not JSON"), (b"[1]", r"config\.json: must be an object"), (b"\xff\xfe\x00", r"not JSON")],
)
def test_what_is_no_config_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: cannot be read: No such file"):
        load_model(tmp_path)


def test_flash_nexts_preset_is_its_config_in_nvfp4_with_its_table_in_host_memory() -> None:
    preset, config = load_model("qwen3.8-flash-next"), load_model(CONFIGS / "Qwen3.8-Flash-Next.json", dtype="nvfp4")
    assert preset.parameters == config.parameters
    assert preset.expert_bytes == config.expert_bytes == (3 * 2560 * 640 * 9 // 16,) * 48
    assert preset.dense_bytes == config.dense_bytes
    assert (preset.caches, preset.kv_bytes_per_token) == (config.caches, config.kv_bytes_per_token)
    # 16 heads of 20,000,000 rows of 160: one byte each in the preset, two in the config that is not quantized.
    assert 2 * preset.host_table_bytes == config.host_table_bytes == 2 * 16 * 20_000_000 * 160


_VALUES: tuple[Any, ...] = (None, 0, -1, 1.5, True, "x", [], {}, [None], [[]], [1] * 80, 10**9, 10**30)


@pytest.mark.parametrize(
    "name",
    [
        "DeepSeek-V4-Flash",
        "Qwen3-Next-80B-A3B",
        "Kimi-K3",
        "AI21-Jamba-1.5-Mini",
        "dbrx-instruct",
        "Qwen3.8-Flash-Next",
    ],
)
def test_a_field_of_any_value_is_read_or_refused(tmp_path: Path, name: str) -> None:
    data = data_of(name)
    section = data.get("text_config", data)
    refused = 0
    for field in list(section):
        for value in _VALUES:
            path = write(
                tmp_path,
                {**data, "text_config": {**section, field: value}} if section is not data else {**data, field: value},
            )
            try:
                load_model(path)
            except ModelError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 4 * len(section)
