"""Routing traces: what is checked, loaded, saved and sliced."""

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from prestage.workloads.trace import RoutingTrace
from prestage.workloads.trace_limits import TraceError

FORMATS = (".npz", ".safetensors")


def small(**changes: Any) -> RoutingTrace:
    """Three tokens, two layers, two of four experts; every array there is."""
    arrays: dict[str, Any] = {
        "experts": np.array([[[0, 1], [2, 3]], [[1, 0], [3, 2]], [[3, 0], [0, 0]]], dtype=np.uint8),
        "num_experts": 4,
        "weights": np.full((3, 2, 2), 0.5, dtype=np.float16),
        "sequence": np.array([0, 0, 1], dtype=np.int32),
        "position": np.array([4, 5, 0], dtype=np.int32),
        "phase": np.array([0, 1, 1], dtype=np.uint8),
        "present": np.array([[True, True], [True, True], [True, False]]),
        "predictions": np.full((3, 2, 1, 2), -1, dtype=np.int16),
        "confidences": np.zeros((3, 2, 1, 2), dtype=np.float32),
        "meta": {"model": "tiny", "source": "by hand"},
        "extra": {
            "residency": np.ones((3, 2, 2), dtype=np.uint8),
            "expert_bytes": np.array([10, 20], dtype=np.int64),
            "dense_bytes": np.array([0, 7], dtype=np.int64),
            "note": np.array([1.5, 2.5, 3.5]),
            "scalar": np.array(3, dtype=np.int16),
        },
    }
    return RoutingTrace(**(arrays | changes))


def arrays_of(trace: RoutingTrace) -> dict[str, Any]:
    names = ["experts", "weights", "sequence", "position", "phase", "present", "predictions", "confidences"]
    own: dict[str, Any] = {name: getattr(trace, name) for name in names}
    return {**own, **trace.extra}


def assert_same(one: RoutingTrace, other: RoutingTrace) -> None:
    left, right = arrays_of(one), arrays_of(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        if value is None:
            assert right[name] is None
        else:
            assert value.dtype == right[name].dtype, name
            np.testing.assert_array_equal(value, right[name], err_msg=name)
    assert one.meta == other.meta
    assert one.num_experts == other.num_experts


def save_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


META = json.dumps({"num_experts": 4})


# What is left out


def test_arrays_left_out_are_filled_as_documented() -> None:
    trace = RoutingTrace(np.zeros((3, 2, 1), dtype=np.uint8), 4)
    assert trace.sequence.tolist() == [0, 0, 0]
    assert trace.position.tolist() == [0, 1, 2]
    assert trace.phase.tolist() == [1, 1, 1]
    assert [trace.sequence.dtype, trace.position.dtype, trace.phase.dtype] == [np.int32, np.int32, np.uint8]
    assert (trace.tokens, trace.layers, trace.k) == (3, 2, 1)
    assert trace.present is None
    trace.check()


def test_missing_positions_count_within_each_sequence_even_interleaved() -> None:
    trace = RoutingTrace(np.zeros((6, 1, 1), dtype=np.uint8), 1, sequence=np.array([7, 3, 7, 7, 3, 9], dtype=np.int32))
    assert trace.position.tolist() == [0, 0, 1, 2, 1, 0]
    trace.check()


def test_wider_integers_are_narrowed_only_when_no_value_changes() -> None:
    trace = RoutingTrace(np.array([[[300]]]), 400, sequence=np.array([5]), phase=np.array([1]))
    assert [a.dtype.name for a in (trace.experts, trace.sequence, trace.phase)] == ["uint16", "int32", "uint8"]
    assert trace.experts.item() == 300
    # 256 wraps to 0 in uint8: it must be seen as 256.
    with pytest.raises(TraceError, match=r"phase at row 0: 256: must be 0\.\.1"):
        RoutingTrace(np.array([[[0]]]), 4, phase=np.array([256])).check()
    with pytest.raises(TraceError, match=r"experts at row 0, layer 0, slot 0: -1: must be 0\.\.3"):
        RoutingTrace(np.array([[[-1]]]), 4).check()


# Files


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_saved_trace_comes_back_whole(tmp_path: Path, suffix: str) -> None:
    trace = small()
    trace.save(tmp_path / f"t{suffix}")
    assert_same(trace, RoutingTrace.load(tmp_path / f"t{suffix}"))


@pytest.mark.parametrize("suffix", FORMATS)
def test_arrays_that_are_no_c_order_or_native_byte_order_come_back_whole(tmp_path: Path, suffix: str) -> None:
    experts = np.asfortranarray(np.array([[[0, 1], [2, 3]], [[1, 0], [3, 2]]], dtype=np.uint8))
    trace = RoutingTrace(experts, 4, extra={"big": np.arange(6, dtype=">i4").reshape(2, 3)[:, ::-1]})
    trace.save(tmp_path / f"t{suffix}")
    back = RoutingTrace.load(tmp_path / f"t{suffix}")
    np.testing.assert_array_equal(back.experts, experts)
    assert back.extra["big"].tolist() == [[2, 1, 0], [5, 4, 3]]


@pytest.mark.process
@pytest.mark.parametrize("suffix", FORMATS)
def test_the_same_trace_gives_the_same_bytes_in_another_process_at_another_time(tmp_path: Path, suffix: str) -> None:
    program = (
        "import sys, numpy as np\n"
        "from prestage.workloads.trace import RoutingTrace\n"
        "extra = {name: np.arange(3) for name in ('b', 'a', 'file', 'c')}\n"
        "t = RoutingTrace(np.zeros((3, 2, 1), np.uint8), 4, meta=dict(z=1, a=[2]), extra=extra)\n"
        "t.save(sys.argv[1])\n"
    )
    written = []
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}{suffix}"
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", program, str(path)], check=True, env=environment)
        written.append(path.read_bytes())
    assert written[0] == written[1]
    if suffix == ".npz":  # the clock would show here
        with zipfile.ZipFile(path) as archive:
            assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"t{suffix}"
    small().save(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("prestage.workloads.trace.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        small(meta={"other": 1}).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_wrong_trace_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"t\.npz: weights at row"):
        small(weights=np.full((3, 2, 2), -1, dtype=np.float16)).save(tmp_path / "t.npz")
    assert not list(tmp_path.iterdir())


def test_an_npz_written_by_numpy_loads(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "t.npz", experts=np.array([[[1], [0]]]), meta=np.array(META), mine=np.array([5]))
    trace = RoutingTrace.load(path)
    assert trace.experts.dtype == np.uint8
    assert trace.extra["mine"].tolist() == [5]
    assert trace.meta == {"num_experts": 4}


def test_num_experts_may_be_given_where_the_file_lacks_it(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "t.npz", experts=np.array([[[1], [0]]]))
    with pytest.raises(TraceError, match=r't\.npz: meta: names no num_experts: add it .*\{"num_experts": 64\}.*give'):
        RoutingTrace.load(path)
    assert RoutingTrace.load(path, num_experts=4).meta["num_experts"] == 4
    other = save_npz(tmp_path / "u.npz", experts=np.array([[[1], [0]]]), meta=np.array(META))
    with pytest.raises(TraceError, match="num_experts = 4, but 5 was given"):
        RoutingTrace.load(other, num_experts=5)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_truncated_file_is_refused_in_one_line_wherever_it_is_cut(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t{suffix}"
    small().save(path)
    whole = path.read_bytes()
    for length in [0, 1, 4, 30, *range(50, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(TraceError) as caught:
            RoutingTrace.load(path)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_damaged_byte_is_refused_or_harmless_but_never_a_traceback(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t{suffix}"
    small().save(path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            RoutingTrace.load(path).check()
        except TraceError as error:
            assert "\n" not in str(error)


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "t.npz", experts=np.array([[[1]], None], dtype=object), meta=np.array(META))
    with pytest.raises(TraceError, match=r"t\.npz: experts: holds Python objects: must be plain numbers"):
        RoutingTrace.load(path)
    with pytest.raises(TraceError, match="experts: Python objects: must be uint8 or uint16"):
        RoutingTrace(np.array([[[1]]], dtype=object), 4).check()
    with pytest.raises(TraceError, match="mine: dtype object"):
        RoutingTrace(np.array([[[1]]]), 4, extra={"mine": np.array([{}])}).check()


BAD_FILES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no file": (lambda p: None, "t.npz", "cannot be read: No such file"),
    "a folder": (lambda p: p.mkdir(), "t.safetensors", "cannot be read: Is a directory"),
    "a text": (lambda p: p.write_text("experts"), "t.npz", r"not a whole \.npz archive"),
    "unknown suffix": (lambda p: p.write_text(""), "t.pt", r"\.pt: a trace's name must end in \.npz or \.safetensors"),
    "no experts": (
        lambda p: save_npz(p, expert=np.zeros(1), meta=np.array(META)),
        "t.npz",
        r"experts: missing \(found expert\): must be an array \(tokens, layers, k\)",
    ),
    "meta no JSON": (
        lambda p: save_npz(p, experts=np.array([[[1]]]), meta=np.array("{")),
        "t.npz",
        r"meta: not JSON .*: must be one JSON object",
    ),
    "meta a list": (
        lambda p: save_npz(p, experts=np.array([[[1]]]), meta=np.array("[1]")),
        "t.npz",
        r"meta: '\[1\]': must be one JSON object",
    ),
    "meta numbers": (
        lambda p: save_npz(p, experts=np.array([[[1]]]), meta=np.zeros(2)),
        "t.npz",
        "meta: dtype float64.*: must be one string of JSON",
    ),
    "num_experts no number": (
        lambda p: save_npz(p, experts=np.array([[[1]]]), meta=np.array('{"num_experts": "8"}')),
        "t.npz",
        r"meta: num_experts = '8': must be an integer 1\.\.65536",
    ),
    "safetensors without meta": (
        lambda p: safetensors.numpy.save_file({"experts": np.zeros((1, 1, 1), np.uint8)}, p),
        "t.safetensors",
        "meta: names no num_experts",
    ),
    "an expert too many": (
        lambda p: save_npz(p, experts=np.array([[[1]], [[4]]]), meta=np.array(META)),
        "t.npz",
        r"experts at row 1, layer 0, slot 0: 4: must be 0\.\.3",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path: Path, name: str) -> None:
    write, file, message = BAD_FILES[name]
    path = tmp_path / file
    write(path)
    with pytest.raises(TraceError, match=f"^{re.escape(str(path))}: .*{message}") as caught:
        RoutingTrace.load(path)
    assert "\n" not in str(caught.value)


def test_bfloat16_weights_are_refused_by_name(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"meta": META},
        "weights": {"dtype": "BF16", "shape": [1, 1, 1], "data_offsets": [0, 2]},
        "experts": {"dtype": "U8", "shape": [1, 1, 1], "data_offsets": [2, 3]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "t.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\x80\x3f\x01")
    with pytest.raises(TraceError, match="weights: of a type that numpy lacks"):
        RoutingTrace.load(path)


@pytest.mark.parametrize(("num_experts", "on_disk"), [(128, np.int8), (129, np.int16)])
def test_guesses_of_up_to_128_experts_take_a_byte_in_the_file_and_come_back_as_they_were(
    num_experts: int, on_disk: type, tmp_path: Path
) -> None:
    guesses = np.array([[[[num_experts - 1, 0, -1]]]], dtype=np.int16)
    path = tmp_path / "t.safetensors"
    RoutingTrace(np.zeros((1, 1, 1), dtype=np.uint8), num_experts, predictions=guesses).save(path)
    assert safetensors.numpy.load_file(path)["predictions"].dtype == on_disk
    loaded = RoutingTrace.load(path).predictions
    assert loaded is not None and loaded.dtype == np.int16 and np.array_equal(loaded, guesses)


def test_a_missing_folder_and_strings_in_safetensors_are_refused_on_saving(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="does not exist: make it first"):
        small().save(tmp_path / "no" / "t.npz")
    words = small(extra={"words": np.array(["a", "b", "c"])})
    with pytest.raises(TraceError, match=r"t\.safetensors: words: dtype <U1: .*save as \.npz"):
        words.save(tmp_path / "t.safetensors")
    assert not list(tmp_path.iterdir())
    words.save(tmp_path / "t.npz")
    assert RoutingTrace.load(tmp_path / "t.npz").extra["words"].tolist() == ["a", "b", "c"]


# Checks

nan, inf = float("nan"), float("inf")


def at(shape: tuple[int, ...], index: tuple[int, ...], value: float, fill: float, dtype: str) -> Any:
    array = np.full(shape, fill, dtype=dtype)
    array[index] = value
    return array


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "float experts": ({"experts": np.zeros((3, 2, 2))}, "experts: dtype float64: must be uint8 or uint16"),
    "flat experts": (
        {"experts": np.zeros((3, 2), dtype=np.uint8)},
        r"experts: shape \(3, 2\): must be \(tokens, layers, k\), each at least 1",
    ),
    "no tokens": ({"experts": np.zeros((0, 2, 2), dtype=np.uint8)}, r"experts: shape \(0, 2, 2\)"),
    "num_experts 0": ({"num_experts": 0}, r"num_experts = 0: must be an integer 1\.\.65536"),
    "num_experts 2.5": ({"num_experts": 2.5}, r"num_experts = 2\.5"),
    "twice": (
        {"experts": np.array([[[0, 1], [2, 3]], [[1, 0], [3, 3]], [[3, 0], [0, 0]]], dtype=np.uint8)},
        r"experts at row 1, layer 1: \[3, 3\]: an expert appears twice",
    ),
    "experts at absent rows are in range too": (
        {"experts": np.array([[[0, 1], [2, 3]], [[1, 0], [3, 2]], [[3, 0], [9, 9]]], dtype=np.uint8)},
        r"experts at row 2, layer 1, slot 0: 9: must be 0\.\.3",
    ),
    "weights' shape": (
        {"weights": np.zeros((3, 2), dtype=np.float16)},
        r"weights: shape \(3, 2\): must be \(tokens, layers, k\) = \(3, 2, 2\)",
    ),
    "weights' type": ({"weights": np.zeros((3, 2, 2), dtype=int)}, "weights: dtype int64: must be float16"),
    "weights nan": (
        {"weights": at((3, 2, 2), (1, 0, 1), nan, 0.5, "f2")},
        "weights at row 1, layer 0, slot 1: nan: must be a number, at least 0",
    ),
    "weights negative": (
        {"weights": at((3, 2, 2), (2, 1, 0), -0.5, 0.5, "f2")},
        r"weights at row 2, layer 1, slot 0: -0\.5",
    ),
    "weights overflow float16": ({"weights": np.full((3, 2, 2), 1e9)}, "weights at row 0, .*: inf"),
    "sequence's length": (
        {"sequence": np.zeros(2, dtype=np.int32)},
        r"sequence: shape \(2,\): must be \(tokens\) = \(3,\)",
    ),
    "sequence negative": (
        {"sequence": np.array([0, -1, 0], dtype=np.int32)},
        "sequence at row 1: -1: must be at least 0",
    ),
    "sequence too large": ({"sequence": np.array([0, 0, 2**40])}, "sequence: dtype int64: must be int32"),
    "position repeated": (
        {"position": np.array([4, 4, 0], dtype=np.int32)},
        r"position at row 1: 4 comes after 4 \(row 0\) of the same sequence 0: must increase",
    ),
    "position decreasing in interleaved sequences": (
        {"sequence": np.array([0, 1, 0], dtype=np.int32), "position": np.array([5, 0, 4], dtype=np.int32)},
        r"position at row 2: 4 comes after 5 \(row 0\) of the same sequence 0",
    ),
    "phase 2": ({"phase": np.array([0, 1, 2], dtype=np.uint8)}, r"phase at row 2: 2: must be 0\.\.1"),
    "phase's type": ({"phase": np.array([0.0, 1.0, 1.0])}, "phase: dtype float64: must be uint8"),
    "present's shape": ({"present": np.ones(3, dtype=bool)}, r"present: shape \(3,\): must be \(tokens, layers\)"),
    "present's type": ({"present": np.full((3, 2), 2)}, "present: dtype int64: must be bool"),
    "predictions' shape": (
        {"predictions": np.zeros((3, 2, 2), dtype=np.int16)},
        r"predictions: shape \(3, 2, 2\): must be \(tokens, layers, horizons, n\)",
    ),
    "predictions out of range": (
        {"predictions": at((3, 2, 1, 2), (2, 0, 0, 1), 4, -1, "i2")},
        r"predictions at row 2, layer 0, horizon 0, rank 1: 4: must be -1\.\.3",
    ),
    "confidences alone": ({"predictions": None}, "confidences: given without predictions"),
    "confidences nan": (
        {"confidences": at((3, 2, 1, 2), (0, 1, 0, 1), nan, 0, "f4")},
        "confidences at row 0, layer 1, horizon 0, rank 1: nan: must be a number",
    ),
    "confidences' shape": (
        {"confidences": np.zeros((3, 2, 1, 1), dtype=np.float16)},
        r"confidences: shape \(3, 2, 1, 1\): must be .* = \(3, 2, 1, 2\)",
    ),
    "expert_bytes by token": (
        {"extra": {"expert_bytes": np.ones(3, dtype=np.int64)}},
        r"expert_bytes: shape \(3,\): must be \(layers\) = \(2,\)",
    ),
    "expert_bytes 0": (
        {"extra": {"expert_bytes": np.array([5, 0])}},
        "expert_bytes at layer 1: 0: must be at least 1",
    ),
    "residency 3": (
        {"extra": {"residency": at((3, 2, 2), (0, 0, 1), 3, 0, "u1")}},
        r"residency at row 0, layer 0, slot 1: 3: must be 0\.\.2",
    ),
    "an extra array named like the trace's own": ({"extra": {"phase": np.zeros(3)}}, "extra array 'phase'"),
    "meta of another model": ({"meta": {"num_experts": 8}}, "meta: num_experts = 8, but the trace has num_experts = 4"),
    "meta not JSON": ({"meta": {"when": {1, 2}}}, "meta: not JSON"),
    "meta nan": ({"meta": {"when": nan}}, "meta: not JSON"),
}


def test_the_small_trace_itself_is_fine() -> None:
    small().check()


@pytest.mark.parametrize("name", BAD)
def test_check_names_array_row_and_what_would_be_right(name: str) -> None:
    changes, message = BAD[name]
    with pytest.raises(TraceError, match=f"^a file: .*{message}") as caught:
        small(**changes).check("a file")
    assert "\n" not in str(caught.value)


@given(st.data())
def test_check_finds_any_one_repeated_expert(data: st.DataObject) -> None:
    k = data.draw(st.integers(2, 6))
    tokens, layers = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    experts = np.argsort(np.random.default_rng(0).random((tokens, layers, 8)), axis=-1)[..., :k].astype(np.uint8)
    RoutingTrace(experts, 8).check()
    row, layer = data.draw(st.integers(0, tokens - 1)), data.draw(st.integers(0, layers - 1))
    one, other = data.draw(st.lists(st.integers(0, k - 1), min_size=2, max_size=2, unique=True))
    experts[row, layer, one] = experts[row, layer, other]
    with pytest.raises(TraceError, match=f"experts at row {row}, layer {layer}: .* appears twice"):
        RoutingTrace(experts, 8).check()
    absent = np.ones((tokens, layers), dtype=np.bool_)
    absent[row, layer] = False
    RoutingTrace(experts, 8, present=absent).check()


def test_checking_a_million_choices_takes_well_under_a_third_of_a_second() -> None:
    tokens, layers, k = 40_290, 24, 4
    experts = (np.arange(tokens)[:, None, None] + np.arange(layers)[None, :, None] + np.arange(k)) % 32
    trace = RoutingTrace(experts.astype(np.uint8), 32, weights=np.ones((tokens, layers, k), dtype=np.float16))
    best = min(_seconds(trace.check) for _ in range(3))
    assert best < 0.3


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


# Choosing rows


def test_select_takes_rows_of_everything_that_has_rows_and_of_nothing_else() -> None:
    chosen = small().select([2, 0])
    assert chosen.sequence.tolist() == [1, 0]
    assert chosen.position.tolist() == [0, 4]
    assert chosen.extra["note"].tolist() == [3.5, 1.5]
    assert chosen.extra["residency"].shape == (2, 2, 2)
    assert chosen.extra["expert_bytes"].tolist() == [10, 20]
    assert chosen.extra["scalar"].item() == 3
    assert chosen.predictions is not None
    assert chosen.predictions.shape == (2, 2, 1, 2)
    chosen.check()


def test_select_keeps_bytes_per_layer_when_there_are_as_many_tokens_as_layers() -> None:
    trace = small().select([0, 1])  # two tokens, two layers
    assert trace.select([1]).extra["expert_bytes"].tolist() == [10, 20]
    assert trace.select([1]).extra["note"].tolist() == [2.5]


def test_a_mask_a_slice_and_indices_choose_alike() -> None:
    trace = small()
    assert_same(trace.select(np.array([False, True, True])), trace.select([1, 2]))
    assert_same(trace.select(slice(1, None)), trace.select([1, 2]))


@pytest.mark.parametrize("rows", [[3], np.array([True]), [0.5]])
def test_rows_that_are_not_there_are_refused(rows: Any) -> None:
    with pytest.raises(TraceError, match="must choose among 3 rows"):
        small().select(rows)


def test_slice_combines_phase_sequences_and_first() -> None:
    trace = small()
    assert trace.slice().tokens == 3
    assert trace.slice(phase=1).position.tolist() == [5, 0]
    assert trace.slice(sequences=[0]).position.tolist() == [4, 5]
    assert trace.slice(phase=1, sequences=[0, 1], first=1).position.tolist() == [5]
    assert trace.slice(first=99).tokens == 3


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"phase": 2}, "phase = 2: choose 0"),
        ({"sequences": [5]}, "sequences: 5 is not in the trace: it has 2, 0 to 1"),
        ({"first": 0}, "first = 0: must be at least 1"),
        ({"phase": 0, "sequences": [1]}, "no row of the trace is left"),
    ],
)
def test_slice_refuses_what_leaves_nothing(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        small().slice(**choice)


# Real traces

REAL = {
    "gpt-oss-20b": (40290, 24, 4, 32),
    "olmoe-1b-7b": (299, 16, 8, 64),
    "qwen3-30b-a3b_k6": (129, 48, 6, 128),
    "switch-base-8_encoder": (215, 6, 1, 8),
}


@pytest.mark.parametrize("name", REAL)
def test_real_traces_load_and_survive_both_formats(traces: Path, tmp_path: Path, name: str) -> None:
    trace = RoutingTrace.load(traces / f"{name}.npz")
    assert (*trace.experts.shape, trace.num_experts) == REAL[name]
    part = trace.slice(first=500)
    for suffix in FORMATS:
        part.save(tmp_path / f"t{suffix}")
        assert_same(part, RoutingTrace.load(tmp_path / f"t{suffix}"))
