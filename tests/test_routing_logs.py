"""Routing logs in the shapes that engines and papers publish: rows of a token and layer, arrays, and debug prints."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prestage.workloads.importers import import_trace, open_trace
from prestage.workloads.trace import RoutingTrace
from prestage.workloads.trace_limits import TraceError

#: 4 tokens, 3 layers, top-2 of 8 experts.
CHOSEN = np.array(
    [[[1, 7], [0, 2], [3, 4]], [[5, 1], [6, 2], [0, 7]], [[2, 3], [4, 5], [6, 1]], [[7, 0], [1, 2], [5, 3]]]
)
TOKENS, LAYERS, K = CHOSEN.shape


def lines(objects: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(each) + "\n" for each in objects)


def table(columns: list[str], rows: list[list[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream).writerows([columns, *rows])
    return stream.getvalue()


def cells() -> list[tuple[int, int, list[int]]]:
    return [(t, layer, CHOSEN[t, layer].tolist()) for t in range(TOKENS) for layer in range(LAYERS)]


def layer_by_layer() -> list[tuple[int, int, list[int]]]:
    return sorted(cells(), key=lambda cell: cell[1])


#: What each engine's log looks like; none says more than its columns.
LOGS: dict[str, tuple[str, str]] = {
    "a row a token and layer": (
        "log.jsonl",
        lines([{"type": "meta", "num_experts": 8}])
        + lines([{"req_id": "r1", "token_idx": t, "layer": n, "topk_ids": ids} for t, n, ids in cells()]),
    ),
    "layer by layer": (
        "log.jsonl",
        lines([{"token_position": t, "layer": n, "selected_experts": ids} for t, n, ids in layer_by_layer()]),
    ),
    "no number of the token": ("log.jsonl", lines([{"layer_id": n, "expert_ids": ids} for _, n, ids in cells()])),
    "CSV without tokens": (
        "log.csv",
        table(["layer_id", "expert_ids"], [[n, " ".join(map(str, i))] for _, n, i in cells()]),
    ),
    "CSV with lists": ("log.csv", table(["token", "layer", "experts"], [[t, n, str(ids)] for t, n, ids in cells()])),
    "CSV of one expert a row": (
        "log.csv",
        table(["token", "layer", "slot", "expert"], [[t, n, s, e] for t, n, ids in cells() for s, e in enumerate(ids)]),
    ),
    "semicolons": ("log.csv", "layer;experts\n" + "".join(f"{n};{ids[0]}|{ids[1]}\n" for _, n, ids in cells())),
    "a line a layer and batch": (
        "log.jsonl",
        lines([{"layer": n, "topk_ids": CHOSEN[:3, n].tolist()} for n in range(LAYERS)])
        + lines([{"layer": n, "topk_ids": CHOSEN[3:, n].tolist()} for n in range(LAYERS)]),
    ),
    "a completion": (
        "log.json",
        json.dumps({"choices": [{"meta_info": {"prompt_tokens": 3, "routed_experts": CHOSEN.tolist()}}]}),
    ),
    "llama-eval-callback": (
        "log.txt",
        "".join(
            f"ggml_debug: ffn_moe_topk-{n} = (i32) VIEW(ffn_moe_argsort-{n}{{8, {len(step)}, 1, 1}}, }}) = "
            f"{{{K}, {len(step)}, 1, 1}}\n [\n  [\n"
            + "".join(f"   [ {', '.join(f'{e:.4f}' for e in ids)}],\n" for ids in step[:, n].tolist())
            + f"  ],\n ]\n sum = {step[:, n].sum()}.000000\n"
            for step in (CHOSEN[:3], CHOSEN[3:])
            for n in range(LAYERS)
        ),
    ),
}


def imported(folder: Path, name: str, text: str | bytes, format: str = "auto", experts: int | None = 8) -> RoutingTrace:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return import_trace(path, format, experts)


@pytest.mark.parametrize("name", LOGS)
@pytest.mark.parametrize("format", ["auto", "jsonl", "topk-ids", "guide"])
def test_every_shape_is_the_same_trace_whatever_format_of_lists_is_named(
    tmp_path: Path, name: str, format: str
) -> None:
    trace = imported(tmp_path, *LOGS[name], format)
    assert trace.experts.tolist() == CHOSEN.tolist()
    assert trace.num_experts == 8
    assert trace.present is None
    prefill = 3 if name in ("a line a layer and batch", "a completion", "llama-eval-callback") else 0
    assert trace.phase.tolist() == [0] * prefill + [1] * (4 - prefill)
    assert set(trace.sequence.tolist()) == {0}
    assert trace.position.tolist() == [0, 1, 2, 3]


def test_an_npy_file_is_a_trace_wherever_one_is_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "log.npy", CHOSEN.astype(np.int16))
    trace = open_trace(tmp_path / "log.npy")
    assert trace.experts.tolist() == CHOSEN.tolist()
    assert (trace.num_experts, trace.meta["experts_from"]) == (8, "the highest id")


def test_an_array_in_base64_and_several_completions_are_sequences(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.save(stream, CHOSEN)
    coded = base64.b64encode(stream.getvalue()).decode()
    text = lines([{"routed_experts": coded}, {"routed_experts": CHOSEN[:2].tolist()}])
    trace = imported(tmp_path, "log.jsonl", text)
    assert trace.experts.tolist() == [*CHOSEN.tolist(), *CHOSEN[:2].tolist()]
    assert trace.sequence.tolist() == [0, 0, 0, 0, 1, 1]


def test_requests_are_sequences_and_a_prompt_is_prefill(tmp_path: Path) -> None:
    rows = [
        {"request_id": r, "phase": phase, "layer": 0, "position": at, "experts": [at, 7], "weights": [0.5, 0.25]}
        for r, phase, at in [("b", "prompt", 0), ("b", "prompt", 1), ("a", "prompt", 0), ("b", "generated", 2)]
    ]
    trace = imported(tmp_path, "log.jsonl", lines(rows))
    assert trace.sequence.tolist() == [0, 0, 0, 1]
    assert trace.phase.tolist() == [0, 0, 1, 0]
    assert trace.experts[:, 0, 0].tolist() == [0, 1, 2, 0]
    assert trace.weights is not None
    assert trace.weights[0, 0].tolist() == [0.5, 0.25]


def test_a_token_that_comes_again_begins_the_next_sequence(tmp_path: Path) -> None:
    rows = [{"layer": n, "token": t, "experts": [t, 5]} for _ in range(2) for t in range(2) for n in range(2)]
    assert imported(tmp_path, "log.jsonl", lines(rows)).sequence.tolist() == [0, 0, 1, 1]


def test_a_layer_that_a_token_lacks_is_not_present_and_dense_layers_are_named(tmp_path: Path) -> None:
    rows = [{"layer": n, "token": t, "experts": [t, 5]} for t in range(2) for n in (3, 5) if (t, n) != (0, 5)]
    trace = imported(tmp_path, "log.jsonl", lines(rows))
    assert trace.present is not None
    assert trace.present.tolist() == [[True, False], [True, True]]
    assert trace.meta["moe_layers"] == [3, 5]


def broken(change: Callable[[list[dict[str, Any]]], None]) -> str:
    rows = [{"layer": n, "token": t, "experts": ids} for t, n, ids in cells()]
    change(rows)
    return lines(rows)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("log.jsonl", broken(lambda rows: rows[4].update(layer=-1)), r"line 5: layer = '-1': must be an integer"),
        (
            "log.jsonl",
            broken(lambda rows: rows[4].update(layer=1 << 20)),
            r"line 5: layer = 1048576: must be less than",
        ),
        ("log.jsonl", broken(lambda rows: rows[4].update(experts=[])), r"line 5: experts = '\[\]': must be ids"),
        ("log.jsonl", broken(lambda rows: rows[4].update(experts=[1])), r"1 .*must be 2 ids, as before|\[1\]"),
        ("log.jsonl", broken(lambda rows: rows[4].update(experts=[1, 9])), r"\[1, 9\]: must be 0\.\.7"),
        ("log.jsonl", broken(lambda rows: rows[4].update(phase="x")), r"line 5: phase = 'x': choose prefill or decode"),
        ("log.jsonl", broken(lambda rows: rows[4].update(token="x")), r"line 5: token = 'x': must be an integer"),
        ("log.jsonl", LOGS["layer by layer"][1] + "{", r"line 13: not JSON"),
        ("log.jsonl", LOGS["layer by layer"][1] + "3\n", r"line 13: must be an object with layer and experts"),
        ("log.csv", "layer,experts\n0,1 2\n1\n", r"row 3: must have 2 cells: layer, experts"),
        ("log.csv", "layer,expert\n0,1\n0,2\n", r"rows of one expert each: must also number their token"),
        (
            "log.json",
            '{"routed_experts": [[[1], [2, 3]]]}',
            r"rows of different lengths: must be \(tokens, layers, k\)",
        ),
        ("log.json", '{"routed_experts": "AAAA"}', r"bytes without a shape: save the array as \.npy"),
        ("log.json", '{"routed_experts": [[[1.5]]]}', r"shape \(1, 1, 1\) of float64: must be integers"),
        ("log.json", '{"routed_experts": [[[8]]]}', r"expert 8: must be 0\.\.7"),
        ("log.json", '{"routed_experts": 4}', r"no routed_experts found"),
        (
            "log.txt",
            LOGS["llama-eval-callback"][1].replace(".0000, ", ".0000, ..., ", 1),
            r"not 3 rows of 2: print all \(-lv 2\)",
        ),
    ],
)
def test_what_cannot_be_a_trace_is_refused_in_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(TraceError, match=message) as caught:
        imported(tmp_path, name, text)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_damaged_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "log.npy", CHOSEN)
    content = (tmp_path / "log.npy").read_bytes()
    for wrong in (content[:90], content.replace(b"(4, 3, 2)", b"(9, 9, 9)"), content.replace(b"'<i8'", b"'|O' ")):
        with pytest.raises(TraceError, match=r"log\.npy: damaged \.npy array"):
            imported(tmp_path, "log.npy", wrong)
    with pytest.raises(TraceError, match=r"shape \(4, 6\) of int64: must be integers \(tokens, layers, k\)"):
        np.save(tmp_path / "log.npy", CHOSEN.reshape(4, 6))
        open_trace(tmp_path / "log.npy")


def test_the_format_of_lists_is_told_by_the_content(tmp_path: Path) -> None:
    assert imported(tmp_path, "a.jsonl", lines([{"experts": [[1], [2]]}])).experts.tolist() == [[[1], [2]]]
    assert imported(tmp_path, "b.json", "[[[1], [2]], [[3], [4]]]").tokens == 2
    assert imported(tmp_path, "c.jsonl", "[[1], [2]]\n[[3], [4]]\n").tokens == 2
    assert imported(tmp_path, "d.log", "layer 0 topk_ids: tensor([[3, 1]])\n").k == 2
    with pytest.raises(TraceError, match=r"e\.log: its content does not tell its format: choose one of bigmoeonedge, "):
        imported(tmp_path, "e.log", "nothing\n")
    with pytest.raises(TraceError, match=r"format = 'x': choose one of auto, bigmoeonedge, jsonl, .*, eval-callback"):
        imported(tmp_path, "d.log", "", "x")


def test_what_can_be_read_only_once_is_read_once_by_the_named_format() -> None:
    with pytest.raises(TraceError, match=r"/dev/null: no file: name its format, one of bigmoeonedge, "):
        import_trace("/dev/null", "auto", 8)
    with pytest.raises(TraceError, match=r"/dev/null: no tokens"):
        import_trace("/dev/null", "jsonl", 8)
