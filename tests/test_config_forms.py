"""Forms of one config.json: as transformers saves it, with fields left out, and whose part says what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prestage.workloads.model import Model, ModelError, load_model
from prestage.workloads.model_files.hf_config import class_defaults

CONFIGS = Path(__file__).parent / "data" / "configs"
#: Sections as they are saved hold what differs from their class's own; these two classes cannot read our reduced files.
SECTIONS = ("GLM-4.5V", "Llama-4-Scout-17B-16E-Instruct", "Qwen3-VL-30B-A3B-Instruct", "Qwen3.5-35B-A3B")
#: What transformers 5.24 saves otherwise than it was published: windows one token longer, and a text part of its own.
OTHERS = ("MiMo-V2-Flash", "Step-3.7-Flash", "Qwen3.8-Flash-Next")


def data_of(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return data


def read(folder: Path, data: object) -> Model:
    (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")
    return load_model(folder)


def facts(model: Model) -> tuple[Any, ...]:
    return (
        model.parameters, model.active_parameters, model.expert_bytes, model.dense_bytes, model.head_bytes,
        model.kv_bytes_per_token, model.caches, model.attention, model.by_layer, model.tied_embeddings,
    )  # fmt: skip


def classes() -> Any:
    return pytest.importorskip("transformers").models.auto.configuration_auto.CONFIG_MAPPING


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.json") if path.stem not in OTHERS))
def test_a_config_that_transformers_saved_again_is_the_same_model(name: str, tmp_path: Path) -> None:
    data = data_of(name)
    if data["model_type"] not in classes():
        pytest.skip("no class of transformers")
    classes()[data["model_type"]].from_dict(json.loads(json.dumps(data))).save_pretrained(tmp_path)
    assert facts(load_model(tmp_path)) == facts(load_model(CONFIGS / f"{name}.json"))


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_without_the_fields_that_are_its_classs_own_is_the_same_model(name: str, tmp_path: Path) -> None:
    data = data_of(name)
    usual = class_defaults()[data["text_config"]["model_type"]]
    data["text_config"] = {key: value for key, value in data["text_config"].items() if usual.get(key) != value}
    assert len(data["text_config"]) < len(data_of(name)["text_config"])
    assert facts(read(tmp_path, data)) == facts(load_model(CONFIGS / f"{name}.json"))


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("Mixtral-8x7B-v0.1", "num_key_value_heads"),
        ("DeepSeek-V3", "first_k_dense_replace"),
        ("DeepSeek-V3", "n_shared_experts"),
        ("DeepSeek-V3", "q_lora_rank"),
        ("gpt-oss-120b", "head_dim"),
        ("Qwen3-Next-80B-A3B", "shared_expert_intermediate_size"),
        ("ERNIE-4.5-21B-A3B-PT", "moe_layer_start_index"),
        ("LFM2-8B-A1B", "num_dense_layers"),
        ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "n_shared_experts"),
    ],
)
def test_a_field_that_is_missing_is_its_classs_default_and_one_that_is_null_is_none(
    name: str, field: str, tmp_path: Path
) -> None:
    data, model = data_of(name), load_model(CONFIGS / f"{name}.json")
    assert class_defaults()[data["model_type"]][field] == data[field]
    assert facts(read(tmp_path, {key: value for key, value in data.items() if key != field})) == facts(model)
    assert facts(read(tmp_path, data | {field: None})) != facts(model)


def test_a_head_is_the_embedding_if_the_class_says_so_where_nobody_else_does(tmp_path: Path) -> None:
    for name in ("granite-3.1-3b-a800m-instruct", "Hunyuan-A13B-Instruct"):
        data = data_of(name)
        assert read(tmp_path, data).tied_embeddings
        data.pop("tie_word_embeddings")
        assert not read(tmp_path, data).tied_embeddings
    # The model around the language part decides: the head is its own.
    data = data_of("Qwen3-VL-30B-A3B-Instruct")
    data["text_config"]["tie_word_embeddings"] = True
    assert not read(tmp_path, data).tied_embeddings


def test_the_sizes_of_a_whole_file_must_be_there(tmp_path: Path) -> None:
    data = data_of("Mixtral-8x7B-v0.1")
    data.pop("hidden_size")
    with pytest.raises(ModelError, match=r"config\.json: hidden_size: missing; must be given"):
        read(tmp_path, data)


def test_defaults_are_those_of_the_classes() -> None:
    for family, fields in class_defaults().items():
        if family in classes():
            assert {name: getattr(classes()[family], name, None) for name in fields} == fields


@pytest.mark.parametrize("family", ["hy_v3", "exaone_moe", "sarvam_moe", "mellum", "mistral4", "afmoe"])
def test_families_without_a_published_config_here_hold_what_their_class_does(family: str, tmp_path: Path) -> None:
    import torch

    config = classes()[family]()
    config.save_pretrained(tmp_path)
    transformers = pytest.importorskip("transformers")
    named = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    with torch.device("meta"):
        model = getattr(transformers, named.get(family, "Mistral4ForCausalLM"))(config)
    assert load_model(tmp_path).parameters == pytest.approx(sum(each.numel() for each in model.parameters()), rel=1e-5)


def test_steps_own_names_are_read_and_windows_have_heads_of_their_own(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"] * 12
    data = {
        "model_type": "step3p5", "hidden_size": 4096, "intermediate_size": 11264, "num_attention_heads": 64,
        "num_attention_groups": 8, "head_dim": 128, "num_hidden_layers": 45, "num_nextn_predict_layers": 3,
        "vocab_size": 128896, "moe_layers_enum": ",".join(map(str, range(3, 45))), "moe_num_experts": 288,
        "moe_top_k": 8, "moe_intermediate_size": 1280, "share_expert_dim": 1280, "sliding_window": 512,
        "layer_types": kinds, "attention_other_setting": {"num_attention_heads": 96, "num_attention_groups": 8},
    }  # fmt: skip
    model = read(tmp_path, data)
    assert (model.layers, model.experts, model.top_k) == (42, 288, 8)
    same = read(tmp_path, data | {"attention_other_setting": None})
    # 33 blocks have 32 heads of 128 more, in queries, outputs and gates.
    assert model.parameters is not None and same.parameters is not None
    assert model.parameters - same.parameters == 33 * 32 * (2 * 128 + 1) * 4096
    saved = {"per_layer_config": {f"{i:02}": {"num_attention_heads": 96} for i in range(45) if i % 4}}
    assert facts(read(tmp_path, data | {"attention_other_setting": None} | saved)) == facts(model)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], r"per_layer_config = \[\]: must be an object"),
        ({"48": {}}, r"per_layer_config\.48 = \{\}: must be an object, of a block from 0 to 47"),
        ({"first": {}}, r"per_layer_config\.first"),
        ({"1": {"head_dim": "64"}}, r"per_layer_config\.1: head_dim = '64': must be an integer"),
    ],
)
def test_what_single_blocks_have_is_refused_where_it_cannot_be_read(given: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=told):
        read(tmp_path, data_of("Qwen3-30B-A3B") | {"per_layer_config": given})


WEIGHTS = 3 * 2048 * 768


@pytest.mark.parametrize(
    ("key", "how", "bits", "dense"),
    [
        ("quantization", {"bits": 4, "group_size": 64, "mode": "affine"}, 4.5, "4.5bpw"),
        ("quantization", {"bits": 4, "group_size": 32, "mode": "mxfp4"}, 4.25, "mxfp4"),
        ("quantization", {"bits": 4, "group_size": 16, "mode": "nvfp4"}, 4.5, "nvfp4"),
        ("quantization_config", {"quant_method": "exl3", "bits": 3.53, "head_bits": 6}, 3.53, "3.53bpw"),
        (
            "quantization_config",
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "self_attn"]},
            4.5,
            "bfloat16",
        ),
        (
            "quantization_config",
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:.*attn.*": {}, "+:.*9.*": {}}},
            4 + 20 / 128,
            "bfloat16",
        ),
    ],
)
def test_other_quantizations_are_read(key: str, how: dict[str, Any], bits: float, dense: str, tmp_path: Path) -> None:
    model = read(tmp_path, data_of("Qwen3-30B-A3B") | {key: how})
    assert set(model.expert_bytes) == {-(-round(WEIGHTS * bits * 1000) // 8000)}
    assert model.dense_dtype == dense


def test_bits_of_all_matrices_stand_in_for_a_quantization_that_is_not_known(tmp_path: Path) -> None:
    data = data_of("Qwen3-30B-A3B") | {"quantization_config": {"quant_method": "quark"}}
    with pytest.raises(ModelError, match=r"quant_method = 'quark': choose one of .*; or set model\.bits_per_weight"):
        read(tmp_path, data)
    model = load_model(tmp_path, bits_per_weight=4.85)
    assert facts(model) == facts(load_model(CONFIGS / "Qwen3-30B-A3B.json", bits_per_weight=4.85))
