"""GGUF files as models: every tensor's own bytes, by hand, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from gguf_files import OUTSIDE, block, facts, size_of, write

from prestage.dtypes import bits_of
from prestage.workloads.model import Cached, ModelError, load_model
from prestage.workloads.model_files.gguf import TYPES, read_header

#: Attention in float16 (q and output 32 x 32, k and v 32 x 16), a shared expert of 3 x 32 x 16 in q8_0 (34 bytes for 32
#: weights), 2 norms of 32 and a router of 32 x 4 in float32.
DENSE_BYTES = 2 * (2 * 32 * 32 + 2 * 32 * 16) + 3 * 32 * 16 * 34 // 32 + 4 * (2 * 32 + 32 * 4)
EXPERT_BYTES = 3 * 32 * 16 * 34 // 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.gguf"


def test_a_model_is_its_tensors(path: Path) -> None:
    write(path, facts("tiny"), OUTSIDE + block(0) + block(1))
    model = load_model(path)
    assert (model.name, model.layers, model.experts, model.top_k) == ("Tiny", 2, 4, 2)
    assert (model.hidden, model.expert_ff, model.expert_matrices) == (32, 16, 3)
    assert model.expert_bytes == (EXPERT_BYTES, EXPERT_BYTES)
    assert model.dense_bytes == (DENSE_BYTES, DENSE_BYTES)
    # The head's 32 x 10 in q8_0 and the final norm; the embedding's 32 x 10 in float16.
    assert model.head_bytes == 32 * 10 * 34 // 32 + 4 * 32
    assert (model.embedding_bytes, model.tied_embeddings) == (2 * 32 * 10, False)
    assert (model.expert_dtype, model.dense_dtype) == ("q8_0", "float16")
    # A key and a value of 16 in 16 bits.
    assert model.kv_bytes_per_token == 2 * 2 * 32
    expert, dense = 3 * 32 * 16, 3 * 1024 + 3 * 32 * 16 + 64 + 128
    assert model.parameters == 2 * (dense + 4 * expert) + 2 * 320 + 32
    assert model.active_parameters == 2 * (dense + 2 * expert) + 320 + 32
    assert model.source == "tiny.gguf, GGUF of tiny"


def test_layers_of_mixed_precision_have_their_own_bytes(path: Path) -> None:
    write(path, facts("tiny"), OUTSIDE + block(0, up=12, down=14) + block(1, up=12, down=12))
    model = load_model(path)
    # 2048 weights of a stack of 4 experts: 8 blocks of 256, of 144 bytes (q4_k) or 210 (q6_k).
    assert model.expert_bytes == (8 * (2 * 144 + 210) // 4, 8 * 3 * 144 // 4)
    assert model.expert_dtype == "q4_k"
    assert not model.uniform


def test_a_header_cut_from_a_download_is_enough(path: Path) -> None:
    header = write(path, facts("tiny"), OUTSIDE + block(0) + block(1), cut=True)
    whole = path.with_name("whole.gguf")
    write(whole, facts("tiny"), OUTSIDE + block(0) + block(1))
    assert header < path.stat().st_size + 32 < whole.stat().st_size
    assert load_model(path).dense_bytes == load_model(whole).dense_bytes
    path.write_bytes(path.read_bytes()[: header - 1])
    with pytest.raises(ModelError, match=rf"tiny\.gguf: cut within its header, at byte {header - 1:,}: fetch more"):
        load_model(path)


def test_the_parts_of_a_split_model_are_one(tmp_path: Path) -> None:
    first, second = (tmp_path / f"tiny-0000{n}-of-00002.gguf" for n in (1, 2))
    write(first, facts("tiny") | {"split.no": 0, "split.count": 2}, OUTSIDE + block(0))
    with pytest.raises(ModelError, match=r"part 00001 of 2: missing are tiny-00002-of-00002\.gguf"):
        load_model(first)
    write(second, {"general.architecture": "tiny", "split.no": 1, "split.count": 2}, block(1))
    for given in (first, second, tmp_path):
        assert load_model(given).dense_bytes == (DENSE_BYTES, DENSE_BYTES)


def test_a_type_that_is_not_known_has_the_bytes_of_its_place_and_is_named(path: Path) -> None:
    tensors = OUTSIDE + block(0, up=144, down=144) + block(1)
    write(path, facts("tiny"), tensors)
    model = load_model(path)
    # 8 blocks of 140 bytes are 1,120, a multiple of the alignment.
    assert size_of((32, 16, 4), 144) == 1120
    assert model.expert_bytes[0] == 3 * 1120 // 4
    assert "type 144 by the tensors' places" in model.source
    assert model.expert_dtype == "q8_0"
    write(path, facts("tiny"), [*OUTSIDE, *block(1), *block(0, up=144, down=144)])
    assert load_model(path).expert_bytes[0] == 3 * 1120 // 4
    write(path, facts("tiny", block_count=1), OUTSIDE + block(0, up=144, down=144))
    assert load_model(path).expert_dtype == "4.375bpw"
    write(
        path, facts("tiny"), OUTSIDE + block(1) + block(0)[:7] + [("blk.0.ffn_up_exps.weight", (32, 16, 4), 144)], True
    )
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_up_exps\.weight': type 144 is not known, and the file is cut"):
        load_model(path)


@pytest.mark.parametrize("lost", [1, 500, 1500, 2800, 8000, 100_000])
def test_a_type_that_is_not_known_has_all_its_bytes_wherever_the_file_is_cut(path: Path, lost: int) -> None:
    """A download ends anywhere: within the last three tensors, of 1,120 bytes and of that type, or before them."""
    unknown = block(0, up=144, down=144)
    header = write(path, facts("tiny"), OUTSIDE + block(1) + unknown[:7] + unknown[10:] + unknown[7:10])
    content = path.read_bytes()
    path.write_bytes(content[: max(header, len(content) - lost)])
    assert load_model(path).expert_bytes[0] == 3 * 1120 // 4


@pytest.mark.parametrize("kept", [100_000, 1 << 20, 2_000_000])
def test_the_only_tensor_of_a_type_that_is_not_known_is_not_taken_for_whole_where_a_download_ends(
    path: Path, kept: int
) -> None:
    """The last tensor alone is of the type, 35 bytes for 64 weights: of 2 MB, a rest is no whole number of its rows."""
    shape = (2048, 512, 4)
    large = [("blk.0.ffn_up_exps.weight", shape, 144)]
    first = [tensor for tensor in block(0) if tensor[0] != large[0][0]]
    write(path, facts("tiny", block_count=1), OUTSIDE + first + large)
    whole = path.read_bytes()
    sizes = {tensor.name: tensor.size_bytes for tensor in read_header(path).tensors}
    assert sizes[large[0][0]] == size_of(shape, 144)
    path.write_bytes(whole[:kept])
    with pytest.raises(ModelError, match="type 144 is not known, and the file is cut before its end"):
        read_header(path)


def test_fused_gate_and_up_are_two_matrices(path: Path) -> None:
    tensors = [t for t in block(0) if "gate_exps" not in t[0] and "up_exps" not in t[0]]
    fused = [("blk.0.ffn_gate_up_exps.weight", (32, 32, 4), 8)]
    write(path, facts("tiny", block_count=1), [*OUTSIDE, *tensors, *fused])
    model = load_model(path)
    assert model.expert_bytes == (EXPERT_BYTES,)
    assert (model.expert_matrices, model.expert_ff) == (3, 16)


def test_experts_without_a_gate_have_two_matrices(path: Path) -> None:
    write(path, facts("tiny", block_count=1), OUTSIDE + [t for t in block(0) if "gate_exps" not in t[0]])
    model = load_model(path)
    assert (model.expert_matrices, model.expert_bytes) == (2, (EXPERT_BYTES * 2 // 3,))


def test_experts_one_by_one_as_old_files_have_them(path: Path) -> None:
    tensors = [t for t in block(0) if "_exps" not in t[0]]
    tensors += [(f"blk.0.ffn_{part}.{n}.weight", (32, 16), 8) for part in ("gate", "up") for n in range(4)]
    tensors += [(f"blk.0.ffn_down.{n}.weight", (16, 32), 8) for n in range(4)]
    write(path, facts("tiny", block_count=1), OUTSIDE + tensors)
    model = load_model(path)
    assert (model.experts, model.expert_bytes, model.expert_ff) == (4, (EXPERT_BYTES,), 16)


def test_layers_that_guess_ahead_are_left_out(path: Path) -> None:
    drafts = [*block(2), ("blk.2.nextn.eh_proj.weight", (64, 32), 8)]
    write(path, facts("tiny", block_count=3, nextn_predict_layers=1), OUTSIDE + block(0) + block(1) + drafts)
    model = load_model(path)
    assert model.layers == 2
    assert model.source.endswith("without its 1 draft layers")


def test_blocks_that_differ_keep_what_they_do(path: Path) -> None:
    # Block 0 has a state of 64 x 8 and 4 inputs of 64 + 2 x 2 x 8 channels, block 1 sees 3 tokens.
    more: dict[str, Any] = {
        "ssm.inner_size": 64, "ssm.state_size": 8, "ssm.group_count": 2, "ssm.conv_kernel": 4,
        "attention.sliding_window": 3, "attention.sliding_window_pattern": [False, True],
    }  # fmt: skip
    recurrent = [t for t in block(0) if ".attn_" not in t[0]] + [("blk.0.ssm_in.weight", (32, 8), 8)]
    write(path, facts("tiny", **more), OUTSIDE + recurrent + block(1))
    model = load_model(path)
    assert model.caches == (
        (Cached(state_bytes=4 * (64 * 8 + 4 * (64 + 2 * 2 * 8))),),
        (Cached(2 * 32, window=3),),
        (),
    )


def test_dense_blocks_belong_to_the_next_moe_layer_and_the_last_one_to_the_head(path: Path) -> None:
    dense = [(f"blk.{n}.ffn_up.weight", (32, 64), 1) for n in (0, 2)]
    tensors = [(name.replace("blk.0", "blk.1"), shape, kind) for name, shape, kind in block(0)]
    write(path, facts("tiny", block_count=3), [*OUTSIDE, dense[0], *tensors, dense[1]])
    model = load_model(path)
    assert model.layers == 1
    assert model.dense_bytes == (DENSE_BYTES + 2 * 32 * 64,)
    assert model.head_bytes == 340 + 128 + 2 * 32 * 64


def test_tied_embeddings_are_the_head(path: Path) -> None:
    write(path, facts("tiny"), OUTSIDE[:2] + block(0) + block(1))
    model = load_model(path)
    assert model.tied_embeddings
    assert model.head_bytes == 2 * 320 + 128
    assert model.embedding_beside_head_bytes == 0


def test_a_table_of_n_grams_stays_in_host_memory(path: Path) -> None:
    write(path, facts("tiny"), [*OUTSIDE, ("per_layer_token_embd.weight", (32, 100), 8), *block(0), *block(1)])
    assert load_model(path).host_table_bytes == 3200 * 34 // 32


def test_only_layers_and_chosen_experts_may_differ(path: Path) -> None:
    write(path, facts("tiny"), OUTSIDE + block(0) + block(1))
    model = load_model(path, layers=1, top_k=3)
    assert (model.layers, model.top_k, model.dense_bytes) == (1, 3, (DENSE_BYTES,))
    assert model.kv_bytes_per_token == 64
    for changes in ({"experts": 3}, {"dtype": "q4_k"}, {"bits_per_weight": 4.0}):
        with pytest.raises(ModelError, match=r"Tiny is as large as its tensors: leave it out"):
            load_model(path, **changes)
    with pytest.raises(ModelError, match=r"model\.top_k = 5: Tiny would take 5 of 4 experts"):
        load_model(path, top_k=5)


def without(metadata: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: given for name, given in metadata.items() if name != key}


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        (facts("tiny"), OUTSIDE, r"no tensor of routed experts \(blk\.N\.ffn_up_exps\): not a mixture"),
        (
            without(facts("tiny"), "tiny.block_count"),
            OUTSIDE + block(0),
            r"tiny\.block_count = None: must be an integer",
        ),
        (facts("tiny", expert_used_count=5), OUTSIDE + block(0), r"top_k = 5: must be 1 to experts = 4"),
        (
            facts("tiny"),
            OUTSIDE + block(0) + [each for each in block(1) if "gate_exps" not in each[0]],
            r"block 1: an expert has 2 matrices, in block 0 3: every MoE layer must have the same",
        ),
        (
            facts("tiny"),
            [*OUTSIDE, *block(0), *[(n, (s[0], s[1], 1) if len(s) == 3 else s, k) for n, s, k in block(1)]],
            r"layer 1: top-2 of 1 experts of width 16: must be at most top-2 of 4 of 16",
        ),
        (
            facts("tiny"),
            OUTSIDE + [t for t in block(0) if "down_exps" not in t[0]],
            r"blk\.0\.ffn_down_exps\.weight: miss",
        ),
    ],
)
def test_a_file_that_is_no_model_is_refused(path: Path, metadata: Any, tensors: Any, message: str) -> None:
    write(path, metadata, tensors)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"not GGUF: the file is empty"),
        (b"PK\3\4" + b"\0" * 40, r"not GGUF: must begin with 'GGUF'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), r"GGUF version 1: must be 2 or 3"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0), r"1,099,511,627,776 tensors: must be at most .*: damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60), r"cut within its header"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 13), r"a value of kind 13 .*: damaged"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), r"a list of lists .*: damaged"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 9), r"tensor 't': 9 dimensions: damaged"),
    ],
)
def test_what_is_damaged_is_refused(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_model(path)


def test_a_big_endian_file_is_read(path: Path) -> None:
    name = b"t"
    path.write_bytes(b"GGUF" + struct.pack(">IQQQ1sIQIQ", 3, 1, 0, 1, name, 1, 8, 0, 0))
    assert [(t.name, t.shape, t.size_bytes) for t in read_header(path).tensors] == [("t", (8,), 32)]


def test_types_are_those_of_the_package_gguf() -> None:
    constants = pytest.importorskip("gguf.constants")
    for number, (name, block_weights, block_bytes) in TYPES.items():
        kind = constants.GGMLQuantizationType(number)
        assert constants.GGML_QUANT_SIZES[kind] == (block_weights, block_bytes)
        if not name.startswith(("int", "float")):
            assert kind.name.lower() in (name, "bf16")
            assert bits_of(name) * block_weights == 8 * block_bytes
    assert {kind.value for kind in constants.GGMLQuantizationType if kind.name != "Q8_1"} == set(TYPES)


def test_a_header_is_as_the_package_gguf_reads_it(path: Path) -> None:
    reader_of = pytest.importorskip("gguf.gguf_reader")
    # The package takes no rows that end within a block.
    tensors = [
        (name, shape, 1 if shape[0] % 32 else kind) for name, shape, kind in OUTSIDE + block(0, up=39) + block(1)
    ]
    write(path, facts("tiny"), tensors)
    read = reader_of.GGUFReader(str(path))
    ours = read_header(path)
    assert [(t.name, list(map(int, t.shape)), int(t.n_bytes)) for t in read.tensors] == [
        (t.name, list(t.shape), t.size_bytes) for t in ours.tensors
    ]
    assert ours.metadata["tiny.embedding_length"] == int(read.fields["tiny.embedding_length"].contents())
    assert "tokenizer.ggml.tokens" not in ours.metadata


def test_a_header_with_any_byte_changed_is_a_model_or_is_refused(path: Path) -> None:
    header = write(path, facts("tiny"), OUTSIDE + block(0) + block(1), cut=True)
    good = path.read_bytes()
    # The vocabulary, which is passed over, is most of it; what matters lies around it.
    inside = range(good.index(b"token 10"), good.index(b"token 4990"))
    places = [at for at in range(header) if at not in inside][::61]
    refused = 0
    for at in places:
        for value in (0, 0x7F, 0xFF):
            path.write_bytes(good[:at] + bytes([value]) + good[at + 1 :])
            try:
                load_model(path)
            except ModelError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > len(places) // 2
