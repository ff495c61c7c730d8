"""Models: the presets against what was published of them, their bytes by hand, overrides, and bad input."""

import pickle
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prestage.dtypes import bits_of, dtype_of
from prestage.workloads.model import Model, ModelError, load_model, preset_names
from prestage.workloads.model_files.sources import read_shapes

MIB = 2**20

# Total parameters as their authors publish them, in units of 10**9 and to the digit they give: Mixtral paper,
# section 3; Qwen3 report, table 2 and its model card; OLMoE paper, section 1; DeepSeek-V2 paper, appendix B;
# DeepSeek-V3's README_WEIGHTS (without multi-token prediction); gpt-oss model card, table 1; Switch Transformers, table
# 9; NLLB, section 8; model cards; of Qwen3.8-Flash-Next (without the table of n-grams), GLM-4.5-Air, MiniMax-M2.5 and
# Kimi-K2, whose cards round otherwise, the count of their tensors.
PUBLISHED_BILLIONS = {
    "mixtral-8x7b": ("46.7", 32, 8, 2),
    "qwen3-30b-a3b": ("30.5", 48, 128, 8),
    "qwen3-30b-a3b-q4": ("30.5", 48, 128, 8),
    "olmoe-1b-7b": ("6.9", 16, 64, 8),
    "deepseek-v2-lite": ("15.7", 26, 64, 6),
    "deepseek-v3": ("671", 58, 256, 8),
    "gpt-oss-20b": ("20.9", 24, 32, 4),
    "gpt-oss-120b": ("116.8", 36, 128, 4),
    "qwen3.8-flash-next": ("125.7", 48, 512, 10),
    "qwen3-next-80b-a3b": ("80", 48, 512, 10),
    "qwen3.6-35b-a3b": ("35", 40, 256, 8),
    "qwen3-235b-a22b": ("235", 94, 128, 8),
    "glm-4.7-flash": ("30", 46, 64, 4),
    "glm-4.5-air": ("107", 45, 128, 8),
    "minimax-m2.5": ("229", 62, 256, 8),
    "kimi-k2": ("1026", 60, 384, 8),
    "switch-large-128": ("26", 24, 128, 1),
    "nllb-moe-54b": ("54.5", 12, 128, 2),
}

# The smallest file that uses every rule: d = dense block, M = MoE block, in the order d d M d M d.
TINY = """
name = "tiny"
source = "made up"
hidden = 8
vocabulary = 10

[dtypes]
expert = "bfloat16"
dense = "bfloat16"

[[stacks]]
blocks = 6
moe_first = 2
moe_every = 2

[attention]
kind = "gqa"
heads = 2
kv_heads = 1
head_dim = 4

[moe]
experts = 4
top_k = 2
expert_ff = 16

[dense]
ff = 32

[kernels]
dense = 40
expert = 5
"""

Load = Callable[[str], Model]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Returns a function that loads a model from a TOML file with this text."""

    def loader(text: str) -> Model:
        path = tmp_path / "some.toml"
        path.write_text(text, encoding="utf-8")
        return load_model(path)

    return loader


def changed(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new, 1)


def dropped(text: str, table: str) -> str:
    """Returns the text without one table."""
    return re.sub(rf"\[+{table}\]+\n(?:[^\[]+)", "", text)


# --- Presets --------------------------------------------------------------------------------------------------------


def test_the_presets_are_shipped() -> None:
    assert preset_names() == sorted([*PUBLISHED_BILLIONS, "switch-base-128"])


@pytest.mark.parametrize("name", PUBLISHED_BILLIONS)
def test_a_preset_has_the_published_number_of_parameters(name: str) -> None:
    billions, layers, experts, top_k = PUBLISHED_BILLIONS[name]
    model = load_model(name)
    assert model.parameters is not None
    digits = len(billions.partition(".")[2])
    assert f"{model.parameters / 1e9:.{digits}f}" == billions
    assert (model.layers, model.experts, model.top_k) == (layers, experts, top_k)


def test_the_expert_of_switch_base_128_is_the_guides_27_mib() -> None:
    model = load_model("switch-base-128")
    assert (model.layers, model.experts, model.top_k) == (12, 128, 1)
    assert set(model.expert_bytes) == {27 * MIB}
    assert model.expert_bytes[0] == 3 * 768 * 3072 * 4


def test_switch_base_128_with_its_published_matrices_has_the_published_7_4_billion_parameters(load: Load) -> None:
    text = (resources.files("prestage.workloads.models") / "switch-base-128.toml").read_text(encoding="utf-8")
    model = load(changed(text, "matrices = 3", "matrices = 2"))
    assert model.parameters is not None
    assert f"{model.parameters / 1e9:.1f}" == "7.4"
    assert model.expert_bytes[0] == 18 * MIB


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_conforms(name: str) -> None:
    model = load_model(name)
    assert model.name == name
    assert "config.json" in model.source
    assert "arXiv:" in model.source
    assert dtype_of(model.expert_dtype) == model.expert_dtype
    assert dtype_of(model.dense_dtype) == model.dense_dtype
    assert len(model.expert_bytes) == len(model.dense_bytes) == model.layers
    assert min(model.dense_bytes) > 0
    assert model.head_bytes > 0
    assert model.kv_bytes_per_token > 0
    assert model.uniform
    assert model.total_experts == model.layers * model.experts
    assert model.total_expert_bytes == model.total_experts * model.expert_bytes[0]
    ids = [model.expert_id(layer, index) for layer in range(model.layers) for index in range(model.experts)]
    assert ids == list(range(model.total_experts))
    # Nothing but biases beside the matrices, which are far smaller.
    matrices_bytes = model.expert_matrices * model.hidden * model.expert_ff * bits_of(model.expert_dtype) / 8
    assert 1 <= model.expert_bytes[0] / matrices_bytes < 1.002
    assert load_model(name) == model
    assert pickle.loads(pickle.dumps(model)) == model


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "olmoe-1b-7b", "deepseek-v2-lite"])
def test_in_one_dtype_the_bytes_of_all_parts_are_those_of_all_parameters(name: str) -> None:
    model = load_model(name)
    vocabulary = {"mixtral-8x7b": 32000, "qwen3-30b-a3b": 151936, "olmoe-1b-7b": 50304, "deepseek-v2-lite": 102400}
    embedding_bytes = vocabulary[name] * model.hidden * 2
    parts = model.total_expert_bytes + sum(model.dense_bytes) + model.head_bytes + embedding_bytes
    assert parts == 2 * (model.parameters or 0)


# --- Bytes by hand --------------------------------------------------------------------------------------------------


def test_mixtral_by_hand() -> None:
    model = load_model("mixtral-8x7b")
    # Gate, up and down of 4096 x 14336 in bfloat16.
    assert set(model.expert_bytes) == {3 * 4096 * 14336 * 2} == {336 * MIB}
    # q and o 4096 x 4096, k and v 4096 x 1024 (8 heads of 128), router 8 x 4096, two norms.
    assert set(model.dense_bytes) == {2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 8 * 4096 + 2 * 4096)}
    # Final norm and a head of 32000 x 4096.
    assert model.head_bytes == 2 * (4096 + 32000 * 4096)
    # Keys and values of 8 heads of 128 in 32 layers.
    assert model.kv_bytes_per_token == 2 * 8 * 128 * 32 * 2 == 128 * 1024


def test_norms_of_queries_and_keys_are_of_one_head_in_qwen3_and_of_all_in_olmoe() -> None:
    # q and o 2048 x 4096, k and v 2048 x 512, router 128 x 2048, two norms, and 128 each for a head's q and k.
    qwen = 2 * 2048 * 4096 + 2 * 2048 * 512 + 128 * 2048 + 2 * 2048 + 2 * 128
    assert set(load_model("qwen3-30b-a3b").dense_bytes) == {2 * qwen}
    # q, k, v, o 2048 x 2048, router 64 x 2048, two norms, and 2048 each for all of q and k.
    olmoe = 4 * 2048 * 2048 + 64 * 2048 + 2 * 2048 + 2 * 2048
    assert set(load_model("olmoe-1b-7b").dense_bytes) == {2 * olmoe}


def test_an_mxfp4_expert_moves_its_scales_and_its_bfloat16_biases() -> None:
    model = load_model("gpt-oss-20b")
    # 3 x 2880 x 2880 weights: half a byte each, a byte of scale per 32; biases of gate, up and down.
    weights = 3 * 2880 * 2880
    assert set(model.expert_bytes) == {weights // 2 + weights // 32 + 3 * 2880 * 2}
    # The tensors of openai/gpt-oss-120b, one layer: q 4096 x 2880, k and v 512 x 2880, o 2880 x 4096, each with bias,
    # 64 sinks, router 128 x 2880 with bias, two norms.
    dense = 2 * 4096 * 2880 + 2 * 512 * 2880 + (4096 + 2 * 512 + 2880) + 64 + 128 * 2880 + 128 + 2 * 2880
    assert set(load_model("gpt-oss-120b").dense_bytes) == {2 * dense}


def test_deepseeks_dense_first_block_is_read_by_the_dense_part_of_layer_0() -> None:
    model = load_model("deepseek-v2-lite")
    # q 2048 x 16 x 192, kv_a 2048 x 576, kv_b 512 x 16 x 256, o 2048 x 2048, norms of 512 and 2048.
    attention = 2048 * 16 * 192 + 2048 * 576 + 512 * 16 * 256 + 2048 * 2048 + 512 + 2048
    shared = 2 * 3 * 2048 * 1408
    moe = attention + 64 * 2048 + shared + 2048
    first = attention + 3 * 2048 * 10944 + 2048
    assert model.dense_bytes == (2 * (first + moe), *[2 * moe] * 25)
    # 512 + 64 values a token in each of 27 blocks, the dense one too.
    assert model.kv_bytes_per_token == (512 + 64) * 27 * 2


def test_deepseek_v3_is_float8_but_for_norms_router_and_head() -> None:
    model = load_model("deepseek-v3")
    assert set(model.expert_bytes) == {3 * 7168 * 2048}
    q = 7168 * 1536 + 1536 * 128 * 192
    matrices = q + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    norms = 1536 + 512 + 2 * 7168
    moe = matrices + 3 * 7168 * 2048 + 2 * (norms + 256 * 7168 + 256)
    first = matrices + 3 * 7168 * 18432 + 2 * norms
    assert model.dense_bytes == (3 * first + moe, *[moe] * 57)
    assert model.head_bytes == 2 * (7168 + 129280 * 7168)
    assert model.kv_bytes_per_token == (512 + 64) * 61 * 2


def test_switch_reads_cross_attention_in_the_decoder_only() -> None:
    model = load_model("switch-base-128")
    attention = 4 * 768 * 768 + 768
    dense_block = attention + 2 * 768 * 3072 + 768
    moe_block = attention + 128 * 768 + 768
    encoder, decoder = dense_block + moe_block, dense_block + moe_block + 2 * attention
    # The encoder's final norm is read on the way to the decoder's first MoE layer.
    assert model.dense_bytes == (*[4 * encoder] * 6, 4 * (decoder + 768), *[4 * decoder] * 5)
    # The head is the embedding again: read by the head, counted once among the parameters.
    assert model.head_bytes == 4 * (768 + 32128 * 768)
    assert 4 * (model.parameters or 0) == model.total_expert_bytes + sum(model.dense_bytes) + model.head_bytes
    # 12 decoder blocks keep a key and a value of 768 float32 each, of an output token or of an input token.
    assert model.kv_bytes_per_token == 12 * 2 * 768 * 4


def test_blocks_between_belong_to_the_next_moe_layer_and_blocks_after_to_the_head(load: Load) -> None:
    model = load(TINY)
    # q and o 8 x 8, k and v 8 x 4, norm 8; feed-forward 3 x 8 x 32, norm 8; router 4 x 8, norm 8.
    attention, dense, moe = 2 * 64 + 2 * 32 + 8, 3 * 8 * 32 + 8, 4 * 8 + 8
    # d d M, d M, d and the head: final norm 8 and 10 x 8.
    assert model.dense_bytes == (
        2 * (2 * (attention + dense) + attention + moe),
        2 * (attention + dense + attention + moe),
    )
    assert model.head_bytes == 2 * (attention + dense + 8 + 80)
    assert model.expert_bytes == (2 * 3 * 8 * 16,) * 2
    # All 6 blocks cache a key and a value of 4.
    assert model.kv_bytes_per_token == 6 * 2 * 4 * 2


def test_bytes_round_up_to_a_whole_one(load: Load) -> None:
    # 3 x 1 x 1 weights of 4.25 bits are 12.75 bits.
    text = changed(changed(TINY, "hidden = 8", "hidden = 1"), "expert_ff = 16", "expert_ff = 1")
    assert load(changed(text, 'expert = "bfloat16"', 'expert = "mxfp4"')).expert_bytes == (2, 2)


def test_bits_per_weight_of_both_parts() -> None:
    model = load_model("gpt-oss-20b")
    assert model.dtype_bits("expert") == 4.25
    assert model.dtype_bits("dense") == 16


# --- Overrides ------------------------------------------------------------------------------------------------------


def test_layers_keeps_the_first_ones_and_the_head(load: Load, tmp_path: Path) -> None:
    whole = load(TINY)
    first = load_model(tmp_path / "some.toml", layers=1)
    assert first.layers == 1
    assert first.dense_bytes == whole.dense_bytes[:1]
    assert first.expert_bytes == whole.expert_bytes[:1]
    assert first.head_bytes == whole.head_bytes
    # d d M and the trailing d still cache; d M does not.
    assert first.kv_bytes_per_token == 4 * 2 * 4 * 2
    assert 2 * (whole.parameters or 0) - 2 * (first.parameters or 0) == whole.dense_bytes[1] + 4 * whole.expert_bytes[1]


def test_experts_resizes_the_router(load: Load, tmp_path: Path) -> None:
    whole = load(TINY)
    more = load_model(tmp_path / "some.toml", experts=7)
    assert (more.experts, more.total_experts) == (7, 14)
    assert [new - old for new, old in zip(more.dense_bytes, whole.dense_bytes, strict=True)] == [3 * 8 * 2] * 2


def test_top_k_changes_nothing_else() -> None:
    model, wider = load_model("qwen3-30b-a3b"), load_model("qwen3-30b-a3b", top_k=6)
    assert wider.top_k == 6
    assert wider.dense_bytes == model.dense_bytes
    assert wider.expert_bytes == model.expert_bytes


def test_dtype_changes_the_routed_experts_only() -> None:
    native, quantized = load_model("mixtral-8x7b"), load_model("mixtral-8x7b", dtype="int4")
    assert quantized.expert_dtype == "int4"
    assert quantized.expert_bytes[0] * 4 == native.expert_bytes[0]
    assert quantized.dense_dtype == "bfloat16"
    assert quantized.dense_bytes == native.dense_bytes


@pytest.mark.parametrize(
    ("given", "expected"),
    [(100, (100, 100)), ([100, 200], (100, 200)), (np.array([100, 200], dtype=np.int64), (100, 200))],
)
def test_expert_bytes_is_one_number_or_one_per_layer(given: Any, expected: tuple[int, ...]) -> None:
    model = load_model("mixtral-8x7b", layers=2, dtype="int4", expert_bytes=given)
    assert model.expert_bytes == expected
    assert all(type(size) is int for size in model.expert_bytes)
    assert model.uniform == (len(set(expected)) == 1)
    assert model.total_expert_bytes == 8 * sum(expected)


def test_a_path_may_be_given_as_text(load: Load, tmp_path: Path) -> None:
    model = load(TINY)
    assert load_model(str(tmp_path / "some.toml")) == model


# --- Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layers": 33}, r"model\.layers = 33: mixtral-8x7b has 32 MoE layers; give 1 to 32"),
        ({"layers": 0}, r"model\.layers = 0: must be an integer of at least 1"),
        ({"layers": "3"}, r"model\.layers = '3': must be an integer"),
        ({"experts": True}, r"model\.experts = True: must be an integer"),
        ({"top_k": 9}, r"model\.top_k = 9: .* 9 of 8 experts"),
        ({"experts": 1}, r"model\.experts = 1: .* 2 of 1 experts"),
        ({"dtype": "fp4"}, r"model\.dtype = 'fp4': choose one of float32, .*mxfp4"),
        ({"expert_bytes": 0}, r"model\.expert_bytes = 0 at layer 0: must be an integer of at least 1"),
        ({"expert_bytes": True}, r"model\.expert_bytes = True at layer 0"),
        ({"expert_bytes": 1.5}, r"model\.expert_bytes = 1\.5 at layer 0"),
        ({"expert_bytes": "27"}, r"model\.expert_bytes = '2' at layer 0"),
        ({"expert_bytes": [5, -1]}, r"model\.expert_bytes = -1 at layer 1"),
        ({"expert_bytes": [5, 6]}, r"model\.expert_bytes has 2 entries: .*one per layer, 32"),
    ],
)
def test_an_override_that_cannot_be_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model("mixtral-8x7b", **overrides)


def test_an_unknown_preset_lists_all_and_suggests_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"model 'Mixtral8x7b': did you mean 'mixtral-8x7b'\?") as caught:
        load_model("Mixtral8x7b")
    assert all(name in str(caught.value) for name in preset_names())
    with pytest.raises(ModelError, match=r"model 'zzz': choose one of deepseek-v2-lite, .*, or FILE\.toml"):
        load_model("zzz")


def test_a_file_that_is_not_there_or_not_text_or_not_toml_is_refused(load: Load, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.toml: cannot be read: No such file"):
        load_model(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match=r"binary\.toml: not UTF-8 text"):
        load_model(tmp_path / "binary.toml")
    with pytest.raises(ModelError, match=r"some\.toml: not TOML: Invalid value \(at line 1, column 8\)"):
        load("name = ?\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (changed(TINY, "hidden = 8\n", ""), r"some\.toml: hidden: missing; must be given"),
        (changed(TINY, "top_k = 2\n", ""), r"moe\.top_k: missing; must be given"),
        (changed(TINY, "kv_heads = 1\n", ""), r"attention\.kv_heads: missing; must be given"),
        (dropped(TINY, "kernels"), r"kernels: missing"),
        (dropped(TINY, "stacks"), r"stacks: missing"),
        (changed(TINY, "hidden = 8", "hiden = 8\nhidden = 8"), r"hiden: no such key; did you mean 'hidden'\?"),
        (changed(TINY, "top_k = 2", "top_k = 2\nzzz = 1"), r"moe\.zzz: no such key; known keys: experts, top_k"),
        (changed(TINY, "heads = 2", "heads = 2\nsink = true"), r"attention\.sink: .*did you mean 'sinks'\?"),
        (changed(TINY, "blocks = 6", "blocks = 6\nblok = 1"), r"stacks\.0\.blok: .*did you mean 'blocks'\?"),
        (changed(TINY, "hidden = 8", 'hidden = "8"'), r"hidden = '8': must be a valid integer"),
        (changed(TINY, "hidden = 8", "hidden = 8.0"), r"hidden = 8\.0: must be a valid integer"),
        (changed(TINY, "hidden = 8", "hidden = true"), r"hidden = True: must be a valid integer"),
        (changed(TINY, "hidden = 8", "hidden = 0"), r"hidden = 0: must be greater than or equal to 1"),
        (changed(TINY, 'name = "tiny"', 'name = ""'), r"name = '': .*at least 1 character"),
        (changed(TINY, 'name = "tiny"', "name = 3"), r"name = 3: must be a valid string"),
        (changed(TINY, 'expert = "bfloat16"', 'expert = "bf17"'), r"dtypes\.expert = 'bf17': choose one of float32"),
        (changed(TINY, 'kind = "gqa"', 'kind = "mha"'), r"attention\.kind = 'mha': choose one of gqa, mla"),
        (changed(TINY, 'kind = "gqa"\n', ""), r"attention\.kind: missing; choose one of gqa, mla"),
        (changed(TINY, 'kind = "gqa"', 'kind = "mla"'), r"attention\.kv_lora_rank: missing"),
        (changed(TINY, "expert_ff = 16", "expert_ff = 16\nmatrices = 4"), r"moe\.matrices = 4: must be 2 or 3"),
        (changed(TINY, "heads = 2\nkv_heads = 1", "heads = 2\nkv_heads = 3"), r"kv_heads = 3: must divide heads = 2"),
        (changed(TINY, "top_k = 2", "top_k = 5"), r"top_k = 5: must be 1 to experts = 4"),
        (changed(TINY, "blocks = 6", "blocks = 6\ncaches = 2"), r"caches = 2: must be 0 to attentions = 1"),
        (changed(TINY, "moe_first = 2", "moe_first = 6"), r"no block is MoE: moe_first must be less than blocks"),
        (dropped(TINY, "dense"), r"dense: missing: some blocks are not MoE"),
        (
            changed(TINY, "moe_first = 2\nmoe_every = 2\n", ""),
            r"dense: every block is MoE, so \[dense\] must be left out",
        ),
        (changed(TINY, "[[stacks]]", "[stacks]"), r"stacks: must be a list"),
        ("moe = 3\n" + dropped(TINY, "moe"), r"moe = 3: must be a section, such as moe\.experts"),
    ],
)
def test_a_file_that_cannot_be_a_model_is_refused_in_one_line(load: Load, text: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load(text)
    assert "some.toml: " in str(caught.value)
    assert "\n" not in str(caught.value)


def built(**changes: object) -> Model:
    fields: dict[str, Any] = {
        "name": "built",
        "layers": 2,
        "experts": 4,
        "top_k": 1,
        "hidden": 8,
        "expert_ff": 16,
        "expert_matrices": 3,
        "expert_dtype": "bfloat16",
        "dense_dtype": "bfloat16",
        "expert_bytes": (10, 20),
        "dense_bytes": (0, 0),
        "head_bytes": 0,
        "dense_kernels": 1,
        "expert_kernels": 1,
    }
    return Model(**{**fields, **changes})


def test_a_model_built_by_hand_may_have_experts_of_two_sizes() -> None:
    model = built()
    assert not model.uniform
    assert model.total_expert_bytes == 4 * 10 + 4 * 20
    assert model.expert_id(1, 2) == 6
    assert model.parameters is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, r"model built: layers = 0: must be an integer of at least 1"),
        ({"hidden": 8.0}, r"model built: hidden = 8\.0: must be an integer"),
        ({"head_bytes": -1}, r"model built: head_bytes = -1: must be an integer of at least 0"),
        ({"top_k": 5}, r"model built: top_k = 5: must be 1 to experts = 4"),
        ({"dense_dtype": "half"}, r"model built: dense_dtype = 'half': must be 'float16'"),
        ({"expert_bytes": (10,)}, r"model built: expert_bytes has 1 entries: must have one per layer, 2"),
        ({"expert_bytes": (10, 0)}, r"model built: expert_bytes\[1\] = 0: must be an integer of at least 1"),
        ({"dense_bytes": (0, -1)}, r"model built: dense_bytes\[1\] = -1: must be an integer of at least 0"),
    ],
)
def test_a_model_built_by_hand_is_checked(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        built(**changes)


def test_a_kv_cache_of_fewer_bits_takes_and_reads_as_much_less() -> None:
    # Q8_0 keeps 34 bytes for 32 values, of which 16 bits make 64.
    plain, small = load_model("mixtral-8x7b"), load_model("mixtral-8x7b", kv_dtype="q8_0")
    assert small.kv_bytes_per_token == plain.kv_bytes_per_token * 34 // 64
    assert load_model("mixtral-8x7b", kv_dtype="float16") == plain
    tokens = np.array([100])
    assert small.cached_bytes(tokens).tolist() == [small.kv_bytes_per_token * 100]
    (before,), (after,) = plain.attention_of(0), small.attention_of(0)
    assert after.key_bytes == before.key_bytes * 34 // 64 and after.heads == before.heads
    with pytest.raises(ModelError, match=r"model.kv_dtype = 'q9'"):
        load_model("mixtral-8x7b", kv_dtype="q9")


@pytest.mark.parametrize(
    ("name", "heads"), [("gpt-oss-20b", 64), ("mixtral-8x7b", 32), ("deepseek-v2-lite", 0), ("qwen3.8-flash-next", 0)]
)
def test_one_attention_is_that_of_all_blocks_over_windows_or_not(name: str, heads: int) -> None:
    found = read_shapes(name).one_attention
    assert (found.heads if found else 0) == heads
