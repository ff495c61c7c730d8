"""Models of blocks that differ, in TOML: patterns, weights and what is kept by hand, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prestage.workloads.model import Model, ModelError, load_model

# Blocks: state space, attention over 4 tokens, state space, attention over all; MoE, dense, MoE, dense.
HYBRID = """
name = "hybrid"
source = "made up"
hidden = 8
vocabulary = 10
host_table_bytes = 99

[dtypes]
expert = "bfloat16"
dense = "bfloat16"
head = "float8"
embedding = "float32"
kv = "float8"

[[stacks]]
blocks = 4
mixers = ["space", "window", "space", "attention"]
feed_forward = ["moe", "dense"]

[attention]
kind = "gqa"
heads = 2
kv_heads = 1
head_dim = 4

[mixers.window]
kind = "gqa"
heads = 2
kv_heads = 2
head_dim = 4
window = 4

[mixers.space]
kind = "mamba2"
heads = 2
head_dim = 8
groups = 1
state = 16
convolution = 4

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


def load(folder: Path, text: str) -> Model:
    path = folder / "some.toml"
    path.write_text(text, encoding="utf-8")
    return load_model(path)


def changed(old: str, new: str, text: str = HYBRID) -> str:
    assert old in text
    return text.replace(old, new, 1)


def test_every_block_has_its_own_mixer_and_feed_forward_part(tmp_path: Path) -> None:
    model = load(tmp_path, HYBRID)
    # Mamba 2: in 8 x (16 + 48 + 2), out 16 x 8; convolution 48 x 5, 3 x 2 of the heads, norm 16; norm of the block 8.
    space = 8 * 66 + 16 * 8 + 48 * 5 + 6 + 16 + 8
    window, full = 8 * (2 * 8 + 2 * 8) + 8, 8 * (2 * 8 + 2 * 4) + 8
    moe, dense = 4 * 8 + 8, 3 * 8 * 32 + 8
    assert model.layers == 2
    # The dense block after the first MoE one belongs to the second MoE layer, the last one to the head.
    assert model.dense_bytes == (2 * (space + moe), 2 * (window + dense + space + moe))
    assert model.head_bytes == 2 * (full + dense + 8) + 80
    assert model.embedding_bytes == 4 * 80
    assert model.host_table_bytes == 99


def test_what_is_kept_grows_by_token_until_a_window_is_full_or_not_at_all(tmp_path: Path) -> None:
    model = load(tmp_path, HYBRID)
    # Float8 keys and values: 2 x 2 x 4 in the window, 2 x 4 in the other. Float32 states: 16 x 16 and 48 x 4 inputs.
    assert model.kv_bytes_per_token == 16 + 8
    assert model.state_bytes == 2 * 4 * (16 * 16 + 48 * 4)
    state = model.state_bytes
    assert model.cached_bytes(np.array([0, 1, 4, 9])).tolist() == [0, state + 24, state + 96, state + 4 * 16 + 9 * 8]
    first = load_model(tmp_path / "some.toml", layers=1)
    # The window belongs to the layer that is left out; the block behind the last MoE layer stays.
    assert (first.kv_bytes_per_token, first.state_bytes) == (8, state // 2)


def test_a_model_of_blocks_alike_has_no_caches_of_its_own() -> None:
    model = load_model("qwen3-30b-a3b")
    assert model.caches == ()
    assert model.cached_bytes(np.array([3])).tolist() == [3 * model.kv_bytes_per_token]


def test_any_other_mixer_is_stated_by_its_numbers(tmp_path: Path) -> None:
    stated = 'kind = "stated"\nweights_in_matrices = 100\nother_weights = 7\nvalues_per_token = 3\nstate_values = 5\n'
    begin, end = HYBRID.index("[mixers.space]"), HYBRID.index("[moe]")
    model = load(tmp_path, HYBRID[:begin] + "[mixers.space]\n" + stated + HYBRID[end:])
    assert model.dense_bytes[0] == 2 * (107 + 8 + 4 * 8 + 8)
    assert model.kv_bytes_per_token == 16 + 8 + 2 * 3
    assert model.state_bytes == 2 * 4 * 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            changed('"space", "window", "space", "att', '"spce", "window", "space", "att'),
            r"mixers name 'spce': choose one of attention, ",
        ),
        (changed('"space", "window", "space", ', '"space", "space", "space", '), r"mixers\.window: no stack names it"),
        (changed(', "attention"]', ', "window"]'), r"attention: no stack names it in its mixers, so .* left out"),
        (changed('["moe", "dense"]', '["moe", "dense"]\nmoe_first = 1'), r"leave moe_first and moe_every out"),
        (changed('["moe", "dense"]', '["dense"]'), r"no block is MoE"),
        (changed('["moe", "dense"]', '["moe"]'), r"dense: every block is MoE"),
        (changed("blocks = 4", "blocks = 3"), r"mixers: 4 entries: must be at most blocks = 3"),
        (changed("[mixers.space]", "[mixers.none]"), r"mixers\.none: the name of \[attention\] or of no mixer"),
        (changed('kind = "mamba2"', 'kind = "mamba3"'), r"mixers\.space\.kind = 'mamba3': choose one of gqa, mla"),
        (changed("groups = 1\n", ""), r"mixers\.space\.groups: missing"),
        (changed("top_k = 2", "top_k = 2\nshared_experts = 1\nshared_ff = 3"), r"shared_ff = 3: give it or shared_exp"),
    ],
)
def test_a_pattern_that_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(tmp_path, text)
