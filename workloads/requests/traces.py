"""Request traces that others published or wrote: when requests came, and how long prompts and outputs were.

Each format has one function from a file's text to a RequestTrace; TRACES names them. To add one: write the function,
add it to the table, and say in `trace_format` how its beginning looks. A request that was given no token has failed,
and is left out and counted.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ...bounded import check_json, read, unpacked
from ...errors import InputError
from ...words import shown, unknown_name
from .lengths import MOST_TOKENS

Array = npt.NDArray[np.int64]
#: What one hash of a Mooncake trace is of.
MOONCAKE_TOKENS = 512
#: Longer than a trace: what is later is another unit, or damaged.
_MOST_SECONDS = 1e9
#: A timestamp of the Azure traces: a date, and up to nine digits of a second; of later ones with the zone.
_DATE = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:\+00:00|Z)?")
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT = ("Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type")
_MOONCAKE = ("timestamp", "input_length", "output_length", "hash_ids")


@dataclass(frozen=True)
class RequestTrace:
    """What a trace says of its requests, in order of arrival.

    `arrival_ns` is int64 (requests,), the first one 0, or None where the file does not say when they came;
    `prompt_tokens` and `output_tokens` are int64 (requests,). `hashes` are of the prompts, one of each `hash_tokens`;
    None: not known. `failed` requests were given no token, and are left out.
    """

    arrival_ns: Array | None
    prompt_tokens: Array
    output_tokens: Array
    hashes: list[tuple[int, ...]] | None = None
    hash_tokens: int = MOONCAKE_TOKENS
    failed: int = 0
    format: str = ""

    def __len__(self) -> int:
        return len(self.prompt_tokens)


@dataclass
class _Rows:
    """The requests of a file while they are read; `where` names the file."""

    where: str
    arrival_ns: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    hashes: list[tuple[int, ...]] = field(default_factory=list)
    failed: int = 0

    def wrong(self, line: int, key: str, value: object, right: str) -> NoReturn:
        """Refuse a value of a line."""
        raise InputError(f"{self.where}: line {line}: {key} = {shown(value)}: must be {right}")

    def tokens(self, line: int, key: str, value: object, least: int = 0) -> int:
        """Returns a number of tokens, which may be written as text; a whole one as a float too."""
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if isinstance(value, bool) or not number.is_integer() or not least <= number <= MOST_TOKENS:
            self.wrong(line, key, value, f"an integer {least}..{MOST_TOKENS}")
        return int(number)

    def seconds(self, line: int, key: str, value: object, unit_s: float) -> int:
        """Returns an instant in ns that is written in a unit of so many seconds."""
        try:
            number = float(value) * unit_s  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if isinstance(value, bool) or not 0 <= number <= _MOST_SECONDS:
            self.wrong(line, key, value, f"a number of {'ms' if unit_s < 1 else 's'}, at least 0")
        return round(number * 1e9)

    def add(self, arrival_ns: int, prompt: int, output: int, hashes: tuple[int, ...] = ()) -> None:
        """Take a request, unless it was given nothing."""
        if not output:
            self.failed += 1
            return
        self.arrival_ns.append(arrival_ns)
        self.prompts.append(prompt)
        self.outputs.append(output)
        self.hashes.append(hashes)

    def trace(self, format: str, *, timed: bool = True) -> RequestTrace:
        """Returns the trace in order of arrival. Raises InputError if nothing is left."""
        if not self.prompts:
            raise InputError(f"{self.where}: no request that was given a token ({self.failed:,} were given none)")
        arrival = np.array(self.arrival_ns, dtype=np.int64)
        order = np.argsort(arrival, kind="stable")
        known = any(self.hashes)
        return RequestTrace(
            arrival_ns=arrival[order] - arrival[order[0]] if timed else None,
            prompt_tokens=np.array(self.prompts, dtype=np.int64)[order],
            output_tokens=np.array(self.outputs, dtype=np.int64)[order],
            hashes=[self.hashes[at] for at in order.tolist()] if known else None,
            failed=self.failed,
            format=format,
        )


def read_azure(text: str, where: str) -> RequestTrace:
    """Read an Azure LLM inference trace of 2023 or 2024: TIMESTAMP, ContextTokens, GeneratedTokens.

    https://github.com/Azure/AzurePublicDataset. Times are of the UTC clock, with seven digits of a second.
    """
    rows = _Rows(where)
    for line, row in _csv_rows(text, where, _AZURE):
        match = _DATE.fullmatch(row["TIMESTAMP"].strip())
        try:
            day = None if match is None else datetime.fromisoformat(f"{match[1]}T{match[2]}").replace(tzinfo=UTC)
        except ValueError:
            day = None
        if match is None or day is None or not 1970 <= day.year < 2262:  # what 64 bits of ns hold
            rows.wrong(line, "TIMESTAMP", row["TIMESTAMP"], "a date and time such as '2023-11-16 18:15:46.6805900'")
        arrival_ns = int(day.timestamp()) * 10**9 + int((match[3] or "").ljust(9, "0"))
        prompt = rows.tokens(line, "ContextTokens", row["ContextTokens"], 1)
        rows.add(arrival_ns, prompt, rows.tokens(line, "GeneratedTokens", row["GeneratedTokens"]))
    return rows.trace("azure")


def read_burstgpt(text: str, where: str) -> RequestTrace:
    """Read a BurstGPT trace: Timestamp in s, Model, Request tokens, Response tokens, Total tokens, Log Type.

    Wang et al., "BurstGPT: a real-world workload dataset to optimize LLM serving systems", KDD 2025. A response of no
    token is a failure.
    """
    rows = _Rows(where)
    for line, row in _csv_rows(text, where, _BURSTGPT):
        arrival_ns = rows.seconds(line, "Timestamp", row["Timestamp"], 1.0)
        output = rows.tokens(line, "Response tokens", row["Response tokens"])
        rows.add(arrival_ns, rows.tokens(line, "Request tokens", row["Request tokens"], min(1, output)), output)
    return rows.trace("burstgpt")


def read_mooncake(text: str, where: str) -> RequestTrace:
    """Read a Mooncake trace: one JSON object a line, timestamp in ms, input_length, output_length and hash_ids.

    Qin et al., "Mooncake: a KVCache-centric disaggregated architecture for LLM serving", FAST 2025: a hash stands
    for 512 tokens of the prompt and all before them; the last one for what is left.
    """
    rows = _Rows(where)
    for line, written in enumerate(text.splitlines(), 1):
        if not written.strip():
            continue
        row = _json(written, f"{where}: line {line}")
        missing = [key for key in _MOONCAKE if not isinstance(row, dict) or key not in row]
        if missing:
            raise InputError(
                f"{where}: line {line}: {missing[0]}: missing; must be an object of {', '.join(_MOONCAKE)}"
            )
        prompt = rows.tokens(line, "input_length", row["input_length"], 1)
        hashes, blocks = row["hash_ids"], -(-prompt // MOONCAKE_TOKENS)
        if not isinstance(hashes, list) or not all(type(one) is int for one in hashes) or len(hashes) != blocks:
            rows.wrong(line, "hash_ids", hashes, f"{blocks} integers, one of each {MOONCAKE_TOKENS} of {prompt} tokens")
        arrival_ns = rows.seconds(line, "timestamp", row["timestamp"], 1e-3)
        rows.add(arrival_ns, prompt, rows.tokens(line, "output_length", row["output_length"]), tuple(hashes))
    return rows.trace("mooncake")


def read_benchmark(text: str, where: str) -> RequestTrace:
    """Read what `vllm bench serve --save-detailed` or SGLang's `bench_serving --output-details` wrote.

    One JSON object, or the last of several lines of one each, with `input_lens` and `output_lens`, and `start_times` in
    s where it is new enough to say them: else it has no times.
    """
    written = [line for line in text.splitlines() if line.strip()]
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = _json(written[-1] if written else "", where)
    lists = {key: data.get(key) if isinstance(data, dict) else None for key in ("input_lens", "output_lens")}
    for key, values in lists.items():
        if not isinstance(values, list):
            raise InputError(f"{where}: {key} = {shown(values)}: must be a list: save the benchmark with its details")
    prompts, outputs, starts = lists["input_lens"], lists["output_lens"], data.get("start_times")
    assert prompts is not None
    assert outputs is not None
    for key, values in (("output_lens", outputs), ("start_times", starts)):
        if values is not None and (not isinstance(values, list) or len(values) != len(prompts)):
            raise InputError(f"{where}: {key}: must be a list of {len(prompts)}, one for each of input_lens")
    rows = _Rows(where)
    for at in range(len(prompts)):
        start_ns = at if starts is None else rows.seconds(at + 1, "start_times", starts[at], 1.0)
        output = rows.tokens(at + 1, "output_lens", outputs[at])
        rows.add(start_ns, rows.tokens(at + 1, "input_lens", prompts[at], min(1, output)), output)
    return rows.trace("benchmark", timed=starts is not None)


#: By the names that a scenario uses; each is called with the text and what to call the file.
TRACES: dict[str, Callable[[str, str], RequestTrace]] = {
    "azure": read_azure,
    "burstgpt": read_burstgpt,
    "mooncake": read_mooncake,
    "benchmark": read_benchmark,
}
#: The format that is told by the content.
AUTO = "auto"


def read_requests(path: Path, format: str = AUTO) -> RequestTrace:
    """Read a request trace, packed by gzip or not, in one of TRACES' formats or by its content.

    Raises InputError naming file, line, column and value, or listing the formats.
    """
    if format != AUTO and format not in TRACES:
        raise InputError(unknown_name("format", format, [AUTO, *TRACES]))
    try:
        content = read(path)
        text = unpacked(content, path).decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text: must be a request trace, as {', '.join(TRACES)} write it") from None
    check_json(text.encode(), path, len(content))
    return TRACES[trace_format(text, str(path)) if format == AUTO else format](text, str(path))


def trace_format(text: str, where: str) -> str:
    """Returns which of TRACES a text is, by its beginning. Raises InputError if it is none."""
    first = text.lstrip()[:4096].partition("\n")[0]
    header = [name.strip().strip('"') for name in first.split(",")]
    if set(_AZURE) <= set(header):
        return "azure"
    if set(_BURSTGPT[:1] + _BURSTGPT[2:4]) <= set(header):
        return "burstgpt"
    if first.startswith("{"):
        return "mooncake" if '"hash_ids"' in first else "benchmark"
    raise InputError(
        f"{where}: begins with {shown(first[:80])}: must be a request trace: {_AZURE} or {_BURSTGPT} as the header of "
        f"a CSV file, an object of {', '.join(_MOONCAKE)} a line, or a benchmark's JSON with input_lens"
    )


def _csv_rows(text: str, where: str, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields the rows of a CSV file by column, each with its line. Raises InputError for a missing column or field."""
    reader = csv.DictReader(io.StringIO(text.lstrip()))
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    missing = [name for name in columns if name not in reader.fieldnames]
    if missing:
        raise InputError(f"{where}: line 1: no column {missing[0]!r}: must have {', '.join(columns)}")
    try:
        for row in reader:
            empty = [name for name in columns if not isinstance(row[name], str)]
            if empty:
                raise InputError(
                    f"{where}: line {reader.line_num}: {empty[0]}: missing: must have {', '.join(columns)}"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{where}: line {reader.line_num}: {error}: must be CSV") from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: {error}: must be JSON") from None
