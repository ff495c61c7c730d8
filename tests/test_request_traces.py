"""Request traces of others: as they publish them, and what is wrong with one said by file, line and column."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from prestage.errors import InputError
from prestage.workloads.requests.traces import TRACES, read_requests

# Lines as in AzurePublicDataset's AzureLLMInferenceTrace_code.csv, and of 2024 with a zone.
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:04.0781060,110,27
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,0,417,Conversation log
118.5,GPT-4,1360,352,1712,API log
"""
MOONCAKE = """{"timestamp": 27482, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 48]}
{"timestamp": 30535, "input_length": 512, "output_length": 26, "hash_ids": [46]}
"""
VLLM = {"date": "20251101-1", "backend": "vllm", "completed": 2, "input_lens": [100, 7, 30], "output_lens": [5, 0, 9],
        "ttfts": [0.1, 0, 0.2], "itls": [[0.01], [], [0.02]], "start_times": [812.5, 812.6, 813.25]}  # fmt: skip


def written(tmp_path: Path, text: str, name: str = "trace.csv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_azure_seven_digits_of_a_second_are_whole_nanoseconds_from_the_first(tmp_path: Path) -> None:
    trace = read_requests(written(tmp_path, AZURE))
    assert trace.format == "azure"
    assert trace.arrival_ns is not None
    assert trace.arrival_ns.tolist() == [0, 52_000_000, 98_146_000]
    assert trace.prompt_tokens.tolist() == [4808, 3180, 110]
    assert trace.output_tokens.tolist() == [10, 8, 27]
    zoned = AZURE.replace(".9799600,", ".979960+00:00,").replace("18:17:04.0319600", "18:17:04+00:00")
    later = read_requests(written(tmp_path, zoned)).arrival_ns
    assert later is not None
    assert later.tolist() == [0, 20_040_000, 98_146_000]


def test_burstgpt_counts_a_response_of_nothing_as_failed_and_leaves_it_out(tmp_path: Path) -> None:
    trace = read_requests(written(tmp_path, BURSTGPT))
    assert (trace.format, trace.failed, len(trace)) == ("burstgpt", 1, 3)
    assert trace.arrival_ns is not None
    assert trace.arrival_ns.tolist() == [0, 40_000_000_000, 113_500_000_000]
    assert trace.output_tokens.tolist() == [18, 230, 352]


def test_mooncake_is_in_ms_with_a_hash_of_each_512_tokens_the_last_of_what_is_left(tmp_path: Path) -> None:
    trace = read_requests(written(tmp_path, MOONCAKE, "mooncake_trace.jsonl"))
    assert trace.format == "mooncake"
    assert trace.arrival_ns is not None
    assert trace.arrival_ns.tolist() == [0, 3_053_000_000]
    assert trace.hashes == [(46, 47, 48), (46,)]
    assert trace.hash_tokens == 512


def test_benchmarks_have_lengths_and_times_where_they_say_them(tmp_path: Path) -> None:
    trace = read_requests(written(tmp_path, json.dumps(VLLM, indent=1), "vllm.json"))
    assert (trace.format, trace.failed) == ("benchmark", 1)
    assert trace.arrival_ns is not None
    assert trace.arrival_ns.tolist() == [0, 750_000_000]
    # SGLang appends a line a run, and says no times.
    sglang = {key: value for key, value in VLLM.items() if key != "start_times"}
    lines = json.dumps({**sglang, "input_lens": [1], "output_lens": [1]}) + "\n" + json.dumps(sglang) + "\n"
    trace = read_requests(written(tmp_path, lines, "sglang.jsonl"))
    assert trace.arrival_ns is None
    assert trace.prompt_tokens.tolist() == [100, 30]


def test_requests_are_put_in_order_of_arrival_and_may_be_packed(tmp_path: Path) -> None:
    header, *rows = AZURE.splitlines()
    path = tmp_path / "azure.csv.gz"
    path.write_bytes(gzip.compress("\r\n".join([header, *reversed(rows)]).encode()))
    trace = read_requests(path)
    assert trace.prompt_tokens.tolist() == [4808, 3180, 110]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (AZURE.replace("18:17:04.03", "25:17:04.03"), r"line 3: TIMESTAMP = '2023-11-16 25:17:04.0319600'"),
        (AZURE.replace("2023-11-16 18:17:03.97996", "12.5"), r"line 2: TIMESTAMP = .*must be a date and time such"),
        (AZURE.replace("3180", "3180.5"), r"line 3: ContextTokens = '3180.5': must be an integer 1\.\.16777216"),
        (AZURE.replace(",27", ""), r"line 4: GeneratedTokens: missing: must have TIMESTAMP, ContextTokens, Gen"),
        (AZURE.splitlines()[0], r"no request that was given a token \(0 were given none\)"),
        (BURSTGPT.replace("45,", "-45,"), r"line 3: Timestamp = '-45': must be a number of s, at least 0"),
        (BURSTGPT.replace("1087", "many"), r"line 3: Request tokens = 'many': must be an integer"),
        (BURSTGPT.replace(",Log Type", ",Kind"), r"line 1: no column 'Log Type': must have Timestamp, Model"),
        (MOONCAKE.replace("[46, 47, 48]", "[46, 47]"), r"line 1: hash_ids = \[46, 47\]: must be 3 integers"),
        (MOONCAKE.replace('"hash_ids": [46]', '"hash": [46]'), r"line 2: hash_ids: missing; must be an object"),
        (MOONCAKE.replace("512,", "true,"), r"line 2: input_length = True: must be an integer"),
        (MOONCAKE.replace("27482", "NaN"), r"line 1: timestamp = nan: must be a number of ms"),
        (MOONCAKE + "{", r"line 3: .*must be JSON"),
        (json.dumps({"completed": 3}), r"input_lens = None: must be a list: save the benchmark with its details"),
        (json.dumps({**VLLM, "output_lens": [1]}), r"output_lens: must be a list of 3, one for each of input_lens"),
        ("a,b\n1,2\n", r"begins with 'a,b': must be a request trace"),
        ("", r"begins with ''"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_by_file_line_and_column(tmp_path: Path, text: str, says: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError, match=says) as found:
        read_requests(path)
    assert str(found.value).startswith(str(path))
    assert "\n" not in str(found.value)


def test_bytes_that_are_no_text_a_missing_file_and_an_unknown_format_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    with pytest.raises(InputError, match=r"trace.csv: cannot be read: No such file"):
        read_requests(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8 text"):
        read_requests(path)
    with pytest.raises(InputError, match=f"choose one of auto, {', '.join(TRACES)}"):
        read_requests(path, "azur")
