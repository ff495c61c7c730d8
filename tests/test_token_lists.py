"""Plain token lists become traces: JSON lines, printed `topk_ids` and the guide's form."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prestage import cli
from prestage.workloads.importers import import_trace
from prestage.workloads.trace import RoutingTrace
from prestage.workloads.trace_limits import TraceError


def write(folder: Path, text: str) -> Path:
    path = folder / "log"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_guides_form_is_a_list_of_tokens_of_one_id_a_layer(tmp_path: Path) -> None:
    trace = import_trace(write(tmp_path, "[[3, 0, 1], [2, 2, 2]]"), "guide", 4)
    assert trace.experts.tolist() == [[[3], [0], [1]], [[2], [2], [2]]]
    assert trace.sequence.tolist() == [0, 0]
    assert trace.position.tolist() == [0, 1]
    assert trace.phase.tolist() == [1, 1]
    assert trace.num_experts == 4
    assert trace.present is None


def test_the_guides_form_may_have_several_ids_a_layer(tmp_path: Path) -> None:
    trace = import_trace(write(tmp_path, "[[[3, 0], [1, 2]]]"), "guide", 4)
    assert trace.experts.tolist() == [[[3, 0], [1, 2]]]


def test_jsonl_is_a_token_a_line_bare_or_with_what_is_known_of_it(tmp_path: Path) -> None:
    lines: list[Any] = [
        {"model": "m", "num_experts": 8},
        {"experts": [[1, 2], None], "weights": [[0.5, 0.25], None], "phase": "prefill", "sequence": 4, "position": 6},
        {"experts": [[3, 4], [5, 6]], "weights": [[1, 0], [0.5, 0.5]], "phase": 1, "sequence": 4, "position": 7},
    ]
    trace = import_trace(write(tmp_path, "\n\n".join(map(json.dumps, lines)) + "\n"), "jsonl")
    assert trace.experts.tolist() == [[[1, 2], [0, 0]], [[3, 4], [5, 6]]]
    assert trace.present is not None
    assert trace.present.tolist() == [[True, False], [True, True]]
    assert trace.weights is not None
    assert trace.weights.tolist() == [[[0.5, 0.25], [0, 0]], [[1, 0], [0.5, 0.5]]]
    assert (trace.sequence.tolist(), trace.position.tolist(), trace.phase.tolist()) == ([4, 4], [6, 7], [0, 1])
    assert trace.meta["model"] == "m"
    bare = import_trace(write(tmp_path, "[[1, 2], [3, 4]]\n[[5, 6], [7, 0]]\n"), "jsonl", 8)
    assert bare.experts.tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 0]]]
    assert bare.position.tolist() == [0, 1]


#: A prompt of three tokens (one is padding, and nobody's), two decode steps, and the next prompt; as torch prints.
PRINTED = """\
INFO 11-24 10:00:00 [model_runner.py:12] loading layer 7
model.layers.1.mlp.experts topk_ids: tensor([[ 3,  1],
        [ 0,  2],
        [-1, -1]], device='cuda:0', dtype=torch.int32)
(EngineCore pid=9) layer_id=2 topk_ids=tensor([[2, 3], [1, 0], [-1, -1]], device='cuda:0')
layer 1 topk_ids: [[0, 1]]
layer 2 topk_ids: [[1, 2]]
layer 1 topk_ids: [[2, 3]]
layer 2 topk_ids: [[3, 0]]
layer 1 topk_ids: [[1, 3], [2, 0]]
layer 2 topk_ids: [[1, 3], [2, 0]]
"""


def test_printed_topk_ids_become_steps_by_their_layer_numbers(tmp_path: Path) -> None:
    trace = import_trace(write(tmp_path, PRINTED), "topk-ids", 4)
    assert trace.experts.tolist() == [
        [[3, 1], [2, 3]],
        [[0, 2], [1, 0]],
        [[0, 1], [1, 2]],
        [[2, 3], [3, 0]],
        [[1, 3], [1, 3]],
        [[2, 0], [2, 0]],
    ]
    assert trace.phase.tolist() == [0, 0, 1, 1, 0, 0]
    assert trace.sequence.tolist() == [0, 0, 0, 0, 1, 1]
    assert trace.position.tolist() == [0, 1, 2, 3, 0, 1]
    assert trace.meta["moe_layers"] == [1, 2]


BAD = {
    "no number of experts": ("guide", "[[1]]", None, "num_experts: this format does not say it: give it"),
    "not JSON": ("guide", "[[1], [2", 4, r"file: not JSON \("),
    "an object": ("guide", '{"a": 1}', 4, "must be a list of tokens"),
    "an empty token": ("guide", "[[1], []]", 4, r"token 1: \[\]: must be a list, one entry a layer"),
    "a layer short": ("guide", "[[1, 2], [1]]", 4, "token 1: experts: 1 layers: must be 2, as before"),
    "an expert beyond": ("guide", "[[1, 2], [1, 4]]", 4, r"token 1: experts at layer 1: \[4\]: must be 0\.\.3"),
    "a negative expert": ("guide", "[[-1]]", 4, r"token 0: experts at layer 0: \[-1\]: must be 0\.\.3"),
    "a fraction": ("guide", "[[1.0]]", 4, r"token 0: experts at layer 0: \[1\.0\]: must be 1 ids"),
    "a truth": ("guide", "[[true]]", 4, r"token 0: experts at layer 0: \[True\]: must be 1 ids"),
    "huge": ("guide", f"[[{10**40}]]", 4, "token 0: experts at layer 0: .*: must be 0"),
    "deep": ("guide", "[" * 100_000, 4, "file: not JSON"),
    "another k": ("jsonl", "[[1, 2]]\n[[1]]", 4, r"line 2: experts at layer 0: \[1\]: must be 2 ids"),
    "twice": ("jsonl", "[[1, 1]]", 4, r"experts at row 0, layer 0: \[1, 1\]: an expert appears twice"),
    "no tokens": ("jsonl", '{"num_experts": 4}\n', None, "no tokens"),
    "two headers": ("jsonl", '{"a": 4}\n{"a": 4}\n', 4, "line 2: must be a list by layer, or an object"),
    "disagreement": ("jsonl", '{"num_experts": 4}\n[[1]]', 5, "num_experts = 4: must be .* 5 was given"),
    "no such phase": ("jsonl", '{"experts": [[1]], "phase": 2}', 4, "line 1: phase = 2: choose prefill or decode"),
    "a list as phase": ("jsonl", '{"experts": [[1]], "phase": []}', 4, r"line 1: phase = \[\]: choose"),
    "a misspelled key": ("jsonl", '{"experts": [[1]], "pos": 2}', 4, "line 1: pos: choose from experts, weights"),
    "a negative position": ("jsonl", '{"experts": [[1]], "position": -2}', 4, "line 1: position = -2: must be"),
    "weights of some": (
        "jsonl",
        '[[1]]\n{"experts": [[1]], "weights": [[1]]}',
        4,
        "line 2: weights: give them for all",
    ),
    "a text as weight": ("jsonl", '{"experts": [[1]], "weights": [["a"]]}', 4, "line 1: weights at layer 0"),
    "nothing printed": ("topk-ids", "hello\n", 4, "no topk_ids found"),
    "no layer": ("topk-ids", "topk_ids: tensor([[1]])", 4, "line 1: topk_ids: no layer is named before it"),
    "left out": ("topk-ids", "a\nlayer 0 topk_ids: tensor([[1], ..., [2]])", 4, "line 2: topk_ids: left out with"),
    "rows differ": (
        "topk-ids",
        "layer 0 topk_ids: [[1]]\nlayer 1 topk_ids: [[1], [2]]",
        4,
        "line 2: topk_ids: 2 tokens: must be 1, as on line 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_log_is_one_line_that_names_the_place(tmp_path: Path, name: str) -> None:
    format, text, num_experts, message = BAD[name]
    path = write(tmp_path, text)
    with pytest.raises(TraceError, match=message) as caught:
        import_trace(path, format, num_experts)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["prestage", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_the_command_imports_and_refuses_what_is_not_utf_8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log, out = write(tmp_path, PRINTED), tmp_path / "t.npz"
    options = ["--format", "topk-ids", "--num-experts", 4, "-o", out]
    assert run(monkeypatch, "trace", "import", log, *options) == 0
    assert RoutingTrace.load(out).tokens == 6
    log.write_bytes(b"ab\xff")
    capsys.readouterr()
    assert run(monkeypatch, "trace", "import", log, *options) == 2
    error = capsys.readouterr().err
    assert "byte 2: not UTF-8 text" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("kind", ["truncated", "objects"])
def test_a_damaged_npz_is_one_line_and_exit_status_2(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.npz"
    if kind == "truncated":
        RoutingTrace(np.zeros((50, 2, 1), dtype=np.uint8), 4).save(path)
        path.write_bytes(path.read_bytes()[:-40])
    else:
        np.savez(path, experts=np.array([[[1]], None], dtype=object), meta=np.array('{"num_experts": 4}'))
    assert run(monkeypatch, "trace", "info", path) == 2
    error = capsys.readouterr().err
    assert ("truncated" if kind == "truncated" else "experts: holds Python objects") in error
    assert error.count("\n") == 1


#: Six tokens, three layers, four of sixteen experts: a line for each token and layer.
FLAT = """\
[4, 9, 13, 12]
[2, 4, 1, 7]
[14, 7, 10, 6]
[6, 1, 7, 0]
[12, 6, 9, 15]
[0, 11, 7, 4]
"""


def test_a_list_of_plain_ids_says_how_it_was_taken_and_how_to_get_the_other(tmp_path: Path) -> None:
    log = write(tmp_path, FLAT)
    by_layer = import_trace(log, "jsonl", 16)
    assert by_layer.experts.shape == (6, 4, 1)
    assert by_layer.meta["reading"].startswith(
        "a list of 4 ids is one id for each of 4 layers; if it is the 4 ids of one"
    )
    of_one = import_trace(log, "jsonl", 16, layers=3)
    assert of_one.experts.tolist() == [
        [[4, 9, 13, 12], [2, 4, 1, 7], [14, 7, 10, 6]],
        [[6, 1, 7, 0], [12, 6, 9, 15], [0, 11, 7, 4]],
    ]
    assert of_one.meta["reading"].startswith("a list of 4 ids is the 4 ids of one layer, and 3 lists are a token")
    with pytest.raises(TraceError, match="6 lists of ids: no multiple of 4 layers, each of which has one list a token"):
        import_trace(log, "jsonl", 16, layers=4)
    guide = write(tmp_path, "[" + ",".join(FLAT.split("\n")[:-1]) + "]")
    assert import_trace(guide, "guide", 16, layers=3).experts.tolist() == of_one.experts.tolist()


def test_a_list_of_plain_ids_with_one_twice_can_only_be_one_a_layer(tmp_path: Path) -> None:
    assert "reading" not in import_trace(write(tmp_path, "[1, 2]\n[3, 3]\n"), "jsonl", 4).meta
    assert "reading" not in import_trace(write(tmp_path, "[[1, 2]]\n[[3, 0]]\n"), "jsonl", 4).meta


def test_lists_of_one_layer_bring_what_their_objects_say(tmp_path: Path) -> None:
    lines = [
        {"experts": [0, 1], "weights": [0.75, 0.25], "sequence": 3, "phase": "prefill"},
        {"experts": [2, 3], "weights": [0.5, 0.5], "sequence": 3, "phase": "prefill"},
        {"experts": [1, 0], "weights": [1, 0], "sequence": 3},
        {"experts": [3, 2], "weights": [0.25, 0.75], "sequence": 3},
    ]
    trace = import_trace(write(tmp_path, "\n".join(map(json.dumps, lines))), "jsonl", 4, layers=2)
    assert trace.experts.tolist() == [[[0, 1], [2, 3]], [[1, 0], [3, 2]]]
    assert trace.weights is not None and trace.weights.tolist()[1] == [[1, 0], [0.25, 0.75]]
    assert (trace.sequence.tolist(), trace.phase.tolist()) == ([3, 3], [0, 1])
    lines[1]["sequence"] = 4
    with pytest.raises(TraceError, match="line 2: sequence = 4: must be 3, as in line 1: 2 layers make one token"):
        import_trace(write(tmp_path, "\n".join(map(json.dumps, lines))), "jsonl", 4, layers=2)


def test_the_number_of_layers_must_be_the_logs(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="2 MoE layers, but layers = 3 was given: leave it out"):
        import_trace(write(tmp_path, PRINTED), "topk-ids", 4, layers=3)
    assert import_trace(write(tmp_path, PRINTED), "topk-ids", 4, layers=2).layers == 2
    with pytest.raises(TraceError, match=r"layers = 0: must be 1\.\.65536"):
        import_trace(write(tmp_path, FLAT), "jsonl", 16, layers=0)


def test_the_command_says_how_a_list_of_plain_ids_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log, out = write(tmp_path, FLAT), tmp_path / "t.npz"
    options = ["--format", "jsonl", "--num-experts", 16, "-o", out]
    assert run(monkeypatch, "trace", "import", log, *options) == 0
    assert "a list of 4 ids is one id for each of 4 layers" in capsys.readouterr().out
    assert run(monkeypatch, "trace", "import", log, *options, "--layers", 3) == 0
    assert "2 tokens, 3 layers, top-4 of 16 experts" in capsys.readouterr().out
