"""Logs of other engines become traces: what they hold, and what is refused; the traces that ship."""

from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest

from prestage.cli.trace import trace_import
from prestage.workloads.importers import IMPORTERS, import_trace, open_trace, shipped_traces
from prestage.workloads.trace import RoutingTrace
from prestage.workloads.trace_limits import TraceError

#: Two layers, two of four experts: a prompt of two tokens, of which only the last reaches layer 1, and one
#: decode token. The prefill is logged layer by layer, as the engine does.
GOOD = """\
# route_trace v1
# model=/data/my models/Tiny-Q4.gguf arch=tinymoe n_layer=2 n_expert=4 n_expert_used=2
# layer=0 expert_bytes=100 dense_bytes=7
# layer=1 expert_bytes=90 dense_bytes=8
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
0,0,0,0,0,3,0.75,0,100
0,0,0,0,1,1,0.25,0,100
0,0,1,0,0,1,0.5,0,0
0,0,1,0,1,2,0.5,0,100
0,0,1,1,0,0,1,0,90
0,0,1,1,1,3,0,0,90
0,1,2,0,0,3,0.625,1,0
0,1,2,0,1,0,0.375,0,100
0,1,2,1,0,2,0.875,2,0
0,1,2,1,1,3,0.125,1,0
"""


def write(folder: Path, text: str = GOOD) -> Path:
    path = folder / "run.route.csv"
    path.write_text(text)
    return path


def line(number: int) -> str:
    return GOOD.splitlines()[number - 1]


def test_a_route_trace_is_read_by_hand(tmp_path: Path) -> None:
    trace = import_trace(write(tmp_path), "bigmoeonedge")
    assert trace.experts.tolist() == [[[3, 1], [0, 0]], [[1, 2], [0, 3]], [[3, 0], [2, 3]]]
    assert trace.experts.dtype == np.uint8
    assert trace.present is not None
    assert trace.present.tolist() == [[True, False], [True, True], [True, True]]
    assert trace.weights is not None
    assert trace.weights.tolist() == [
        [[0.75, 0.25], [0, 0]],
        [[0.5, 0.5], [1, 0]],
        [[0.625, 0.375], [0.875, 0.125]],
    ]
    assert trace.sequence.tolist() == [0, 0, 0]
    assert trace.position.tolist() == [0, 1, 2]
    assert trace.phase.tolist() == [0, 0, 1]
    assert trace.extra["residency"].tolist() == [[[0, 0], [0, 0]], [[0, 0], [0, 0]], [[1, 0], [2, 1]]]
    assert trace.extra["residency"].dtype == np.uint8
    assert trace.extra["expert_bytes"].tolist() == [100, 90]
    assert trace.extra["dense_bytes"].tolist() == [7, 8]
    assert trace.extra["expert_bytes"].dtype == trace.extra["dense_bytes"].dtype == np.int64
    assert trace.num_experts == trace.meta["num_experts"] == 4
    assert trace.meta["model"] == "Tiny-Q4"
    assert trace.meta["arch"] == "tinymoe"
    assert "run.route.csv" in trace.meta["source"]


def test_what_was_imported_survives_saving(tmp_path: Path) -> None:
    trace = import_trace(write(tmp_path), "bigmoeonedge")
    trace.save(tmp_path / "t.safetensors")
    back = RoutingTrace.load(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(back.experts, trace.experts)
    assert sorted(back.extra) == ["dense_bytes", "expert_bytes", "residency"]


def test_turns_become_sequences_in_order(tmp_path: Path) -> None:
    # A second turn goes on with the context of the first: its steps begin at 3.
    more = "".join(f"1,{phase},{step},{layer},{slot},{slot},0.5,1,0\n" for phase, step in ((0, 3), (1, 4))
                   for layer in (0, 1) for slot in (0, 1))  # fmt: skip
    trace = import_trace(write(tmp_path, GOOD + more), "bigmoeonedge")
    assert trace.sequence.tolist() == [0, 0, 0, 1, 1]
    assert trace.position.tolist() == [0, 1, 2, 3, 4]
    assert trace.phase.tolist() == [0, 0, 1, 0, 1]


def test_columns_are_found_by_name_and_new_ones_are_no_trouble(tmp_path: Path) -> None:
    lines = GOOD.splitlines()
    names, rows = lines[4].split(","), [row.split(",") for row in lines[5:]]
    turned = [",".join(["new", *reversed(names), "dropped"])]
    turned += [",".join(["9", *reversed(row), "0"]) for row in rows]
    trace = import_trace(write(tmp_path, "\n".join([*lines[:4], *turned])), "bigmoeonedge")
    plain = import_trace(write(tmp_path), "bigmoeonedge")
    np.testing.assert_array_equal(trace.experts, plain.experts)
    assert trace.extra["dropped"].shape == trace.experts.shape
    assert not trace.extra["dropped"].any()


def test_windows_line_ends_and_blank_lines_are_no_trouble(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_bytes(GOOD.replace("\n", "\r\n\r\n").encode())
    assert import_trace(path, "bigmoeonedge").experts.shape == (3, 2, 2)


def test_weights_that_the_log_does_not_know_are_left_out_not_zero(tmp_path: Path) -> None:
    trace = import_trace(write(tmp_path, GOOD.replace("0.875", "nan")), "bigmoeonedge")
    assert trace.weights is None
    assert trace.meta["weights"] == "left out: 1 of 10 not known to the log"


def test_dense_layers_are_left_out_and_the_others_keep_their_numbers_in_meta(tmp_path: Path) -> None:
    text = GOOD.replace("n_layer=2", "n_layer=3").replace("\nturn", "\n# layer=2 expert_bytes=0 dense_bytes=50\nturn")
    trace = import_trace(write(tmp_path, text), "bigmoeonedge")
    assert trace.layers == 2
    assert trace.meta["moe_layers"] == [0, 1]
    # The same with the dense layer first: what was layer 0 and 1 is 1 and 2.
    body = "".join(
        ",".join([*row.split(",")[:3], str(int(row.split(",")[3]) + 1), *row.split(",")[4:]]) + "\n"
        for row in GOOD.splitlines()[5:]
    )
    text = "\n".join(
        [
            line(1),
            line(2).replace("n_layer=2", "n_layer=3"),
            "# layer=0 expert_bytes=0 dense_bytes=50",
            line(3).replace("layer=0", "layer=1"),
            line(4).replace("layer=1", "layer=2"),
            line(5),
            body,
        ]
    )
    trace = import_trace(write(tmp_path, text), "bigmoeonedge")
    assert trace.meta["moe_layers"] == [1, 2]
    assert trace.experts.tolist() == [[[3, 1], [0, 0]], [[1, 2], [0, 3]], [[3, 0], [2, 3]]]
    assert trace.extra["expert_bytes"].tolist() == [100, 90]


BAD = {
    "layer beyond n_layer": ("0,0,0,0,1,1,", "0,0,0,2,1,1,", r"line 7: layer = 2: must be an integer 0\.\.1"),
    "expert beyond n_expert": ("0,0,0,0,1,1,", "0,0,0,0,1,4,", r"line 7: expert = 4: must be an integer 0\.\.3"),
    "slot beyond n_expert_used": ("0,0,0,0,1,1,", "0,0,0,0,2,1,", r"line 7: slot = 2: must be an integer 0\.\.1"),
    "unknown phase": ("0,1,2,0,0", "0,2,2,0,0", r"line 12: phase = 2: must be an integer 0\.\.1"),
    "negative step": ("0,1,2,0,0", "0,1,-1,0,0", r"line 12: step = -1: must be an integer"),
    "broken integer": ("0,1,2,0,0,3", "0,1,2,0,0,2.5", r"line 12: expert = 2\.5: must be an integer"),
    "a word": ("0,1,2,0,0,3", "0,1,2,0,0,three", "line 12: expert = 'three': must be a number"),
    "an empty field": ("0,1,2,0,0,3", "0,1,2,0,0,", "line 12: expert = '': must be a number"),
    "nan as expert": ("0,1,2,0,0,3", "0,1,2,0,0,nan", "line 12: expert = nan: must be an integer"),
    "negative weight": ("0.625", "-0.625", r"line 12: weight = -0\.625: must be at least 0"),
    "infinite weight": ("0.625", "inf", "line 12: weight = inf"),
    "unknown residency": ("0.625,1", "0.625,3", r"line 12: residency = 3: must be an integer 0\.\.2"),
    "a column short": ("0,1,2,0,0,3,0.625,1,0", "0,1,2,0,0,3,0.625,1", r"line 12: 8 values in .*: must be 9: turn,"),
    "the same slot twice": ("0,1,2,0,1,0", "0,1,2,0,0,0", "line 13: slot = 0: logged before for the same turn"),
    "a slot short": (
        "0,1,2,1,1,3,0.125,1,0\n",
        "",
        r"line 14: slot: 1 of 2 slots are logged for turn 0, step 2, layer 1: .*truncated",
    ),
    "the same expert twice": ("0,1,2,0,1,0,", "0,1,2,0,1,3,", r"experts at row 2, layer 0: \[3, 3\]"),
    "a step in both phases": ("\n0,1,2,", "\n0,1,1,", r"position at row 2: 1 comes after 1"),
    "no expert column": (",expert,", ",chosen,", "line 5: column expert: must be named once"),
    "no facts": ("# model", "# modul", r"line 1: no header: must begin with .* n_expert_used"),
    "another version": ("v1", "v2", "line 1: '# route_trace v2': must be '# route_trace v1'"),
    "n_expert_used 0": ("n_expert_used=2", "n_expert_used=0", "header: n_layer=2 n_expert=4 n_expert_used=0"),
    "no bytes for a routed layer": ("# layer=1 ", "# layr=1 ", "header: layer=1 is routed, but its expert_bytes is 0"),
    "too many bytes": ("=90", "=" + "9" * 30, "header: layer=1: 9+ bytes: must be at most"),
    "truncated": ("0.625,1,0\n0,1,2,0,1", "0.625,1,0\n0,1,2,0\n", "line 13: 4 values"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_by_file_line_column_and_value(tmp_path: Path, name: str) -> None:
    old, new, message = BAD[name]
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(TraceError, match=message) as caught:
        import_trace(path, "bigmoeonedge")
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n", "# route_trace v1\n", "\n".join(GOOD.splitlines()[:5]), "\0\xff" * 50])
def test_a_file_without_rows_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(TraceError, match=r"run\.route\.csv: line"):
        import_trace(write(tmp_path, text), "bigmoeonedge")


def test_an_unknown_format_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="format = 'vllm': choose one of auto, bigmoeonedge"):
        import_trace(write(tmp_path), "vllm")
    with pytest.raises(TraceError, match="cannot be read: No such file"):
        import_trace(tmp_path / "none.csv", "bigmoeonedge")


def test_the_commands_help_names_every_importer_that_ships() -> None:
    said = str(get_type_hints(trace_import, include_extras=True)["format"].__metadata__[0].help)
    named = said.removeprefix("The log's format: ").partition(";")[0].split(", ")
    assert sorted(named) == sorted(IMPORTERS)


@pytest.mark.parametrize("name", IMPORTERS)
def test_every_importer_refuses_an_empty_file_and_a_binary_one(tmp_path: Path, name: str) -> None:
    for content in (b"", bytes(range(256)) * 4):
        path = tmp_path / "log"
        path.write_bytes(content)
        with pytest.raises(TraceError, match="log"):
            import_trace(path, name)


def test_the_imported_run_agrees_with_its_published_conversion(traces: Path) -> None:
    imported = import_trace(traces / "bigmoeonedge-qwen" / "qwen.route.csv", "bigmoeonedge")
    converted = RoutingTrace.load(traces / "qwen3-30b-a3b_k6.npz")
    # 28 prompt tokens and 128 decoded ones; the conversion kept the last prompt token, position 27, and the rest.
    assert (imported.tokens, imported.layers, imported.k) == (156, 48, 6)
    assert imported.present is not None
    assert not imported.present[:27, 47].any()
    assert imported.present.sum() == 156 * 48 - 27
    shared = imported.slice(first=156).select(imported.position >= 27)
    for name in ("experts", "weights", "sequence", "position", "phase"):
        np.testing.assert_array_equal(getattr(shared, name), getattr(converted, name), err_msg=name)
    np.testing.assert_array_equal(shared.extra["residency"], converted.extra["residency"])
    assert imported.num_experts == converted.num_experts
    # Two quantizations: 27 layers have larger experts than the other 21 (counted in the file's header).
    sizes, layers = np.unique(imported.extra["expert_bytes"], return_counts=True)
    assert sizes.tolist() == [2654208, 3059712]
    assert layers.sum() == 48


# Shipped traces.


@pytest.mark.parametrize("name", shipped_traces())
def test_a_shipped_trace_opens_by_its_name_and_says_where_it_is_from(name: str) -> None:
    trace = open_trace(name)
    assert trace.tokens > 1000 and trace.predictions is not None
    assert {"source", "licence", "device", "seed"} <= trace.meta.keys()


def test_a_file_of_a_shipped_name_comes_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "guide").mkdir()
    assert open_trace("guide").tokens > 1000  # a folder is no trace
    (tmp_path / "guide").rmdir()
    (tmp_path / "guide").write_bytes(b"")
    with pytest.raises(TraceError, match="guide"):
        open_trace("guide")


@pytest.mark.parametrize(
    ("name", "text"),
    [("pop.csv", "layer,expert,count\n0,0,10\n0,1,5\n1,0,3\n"), ("pop.json", '{"0": {"0": 4, "1": 2}}')],
)
def test_counts_of_experts_are_no_trace_and_the_message_says_where_they_belong(
    tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    for read in (open_trace, lambda path: import_trace(path, "auto")):
        with pytest.raises(TraceError, match=rf"{name}: counts .*, and is no trace: set workload.synthetic.popularity"):
            read(tmp_path / name)
