"""Importers of logs that are rows: one for a token and layer, or for a layer and batch, as JSON lines or CSV.

Engines and papers name the same columns differently; the names that are known stand in the tables below. A row that
names neither layer nor experts says things about the log, such as how many experts there are.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ..bounded import check_json, read
from .batches import DECODE, PREFILL
from .token_lists import Token, assemble, tokens_of_steps
from .trace import RoutingTrace
from .trace_limits import MAX_LAYERS, TraceError

LAYER = ("layer", "layer_id", "layer_idx", "layer_index", "moe_layer", "block", "blk", "il")
EXPERTS = ("topk_ids", "expert_ids", "selected_experts", "experts", "expert_indices", "topk_experts", "routed_experts")
EXPERT = ("expert", "expert_id", "expert_idx")
TOKEN = ("token_idx", "token_index", "token_position", "position", "pos", "token", "token_pos")
SEQUENCE = ("req_id", "request_id", "rid", "sequence", "seq_id", "sequence_id", "request", "prompt_id", "turn")
WEIGHTS = ("topk_weights", "expert_weights", "weights", "gate_weights", "scores", "probs", "weight")
PHASE = ("phase", "stage", "is_prefill")
SLOT = ("slot", "rank", "k")
NUM_EXPERTS = ("num_experts", "n_experts", "n_expert", "num_local_experts", "n_routed_experts")
_PHASES = {
    **dict.fromkeys(("prefill", "prompt", "context", "0", "true"), PREFILL),
    **dict.fromkeys(("decode", "generate", "generated", "generation", "completion", "1", "false"), DECODE),
}
_NUMBER = re.compile(r"-?\d+")
_REAL = re.compile(r"-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?")
#: CSV cells that are longer are something else.
_MOST_CELL = 1 << 16


class _Row(NamedTuple):
    """One row: where it stands, its layer, and its ids, or those of each token of a batch."""

    where: str
    layer: int
    ids: list[Any]
    weights: list[Any] | None
    token: int | None
    sequence: str
    phase: int | None
    slot: int


def is_rows(first: Mapping[str, Any]) -> bool:
    """Returns whether a row names a layer and its experts."""
    return _name(first, LAYER) is not None and _name(first, (*EXPERTS, *EXPERT)) is not None


def import_rows(path: Path, num_experts: int | None, layers: int | None = None) -> RoutingTrace:
    """Read rows of a token and layer (or of a layer and batch, or of a token, layer and expert), as JSON lines or CSV.

    Without a column that numbers tokens, the n-th row of a layer is the n-th token. A token and layer that comes again
    begins the next sequence, where rows name none. A row of a batch is a step: of one token decode, of more prefill.
    """
    meta: dict[str, Any] = {}
    rows = list(_rows(path, meta))
    if not rows:
        raise TraceError(f"{path}: no rows: must name a layer ({LAYER[0]}) and its experts ({EXPERTS[0]}) in each")
    if isinstance(rows[0].ids[0], list):
        numbers = sorted({row.layer for row in rows})
        return assemble(
            path, list(tokens_of_steps(path, _steps(rows), numbers)), num_experts, meta | _numbered(numbers)
        )
    tokens, numbers = _tokens(path, rows)
    return assemble(path, tokens, num_experts, meta | _numbered(numbers))


def _numbered(numbers: Sequence[int]) -> dict[str, Any]:
    return {} if list(numbers) == list(range(len(numbers))) else {"moe_layers": list(numbers)}


def _rows(path: Path, meta: dict[str, Any]) -> Iterator[_Row]:
    """Yields the rows; what other objects say of the number of experts goes into meta."""
    for where, values in _values(path):
        if is_rows(values):
            yield _row(path, where, values)
        elif (key := _name(values, NUM_EXPERTS)) is not None:
            meta["num_experts"] = values[key]


def _values(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    content = read(path, TraceError)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: byte {error.start}: not UTF-8 text") from error
    if not text.lstrip().startswith("{"):
        yield from _cells(path, text)
        return
    check_json(content, path, len(content), TraceError)
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TraceError(f"{path}: line {number}: not JSON ({' '.join(str(error).split())})") from error
        if not isinstance(value, dict):
            raise TraceError(f"{path}: line {number}: must be an object with layer and experts")
        yield f"line {number}", value


def _cells(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    csv.field_size_limit(_MOST_CELL)
    delimiter = "\t" if lines and "\t" in lines[0] else ";" if lines and ";" in lines[0] else ","
    try:
        reader = csv.DictReader(lines, delimiter=delimiter)
        columns = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        if not is_rows(dict.fromkeys(columns, "")):
            raise TraceError(
                f"{path}: line 1: columns {', '.join(columns)[:80]}: must name {LAYER[0]} and {EXPERTS[0]}"
            )
        for number, cells in enumerate(reader, start=2):
            if None in cells or None in cells.values():
                raise TraceError(f"{path}: row {number}: must have {len(columns)} cells: {', '.join(columns)[:80]}")
            yield f"row {number}", cells
    except csv.Error as error:
        raise TraceError(f"{path}: not CSV: {error}") from None


def _row(path: Path, where: str, values: Mapping[str, Any]) -> _Row:
    many, layer_key = _name(values, EXPERTS), _name(values, LAYER)
    key = many or _name(values, EXPERT)
    assert key is not None and layer_key is not None  # of is_rows
    layer = _whole(path, where, layer_key, values[layer_key])
    if layer >= MAX_LAYERS:
        raise TraceError(f"{path}: {where}: {layer_key} = {layer}: must be less than {MAX_LAYERS:,}")
    ids = _listed(values[key], _NUMBER, int)
    if not ids:
        raise TraceError(f"{path}: {where}: {key} = {str(values[key])[:40]!r}: must be ids of experts")
    weights_key, token_key, slot_key = _name(values, WEIGHTS), _name(values, TOKEN), _name(values, SLOT)
    sequence_key = _name(values, SEQUENCE)
    return _Row(
        where,
        layer,
        ids,
        None if weights_key is None else _listed(values[weights_key], _REAL, float),
        None if token_key is None else _whole(path, where, token_key, values[token_key]),
        "" if sequence_key is None else str(values[sequence_key]),
        _phase(path, where, values),
        0 if slot_key is None or many else _whole(path, where, slot_key, values[slot_key]),
    )


def _phase(path: Path, where: str, values: Mapping[str, Any]) -> int | None:
    key = _name(values, PHASE)
    if key is None:
        return None
    given = str(values[key]).strip().lower()
    # A flag that says prefill; a number or a word that says which.
    if key == "is_prefill":
        given = {"1": "true", "0": "false"}.get(given, given)
    if given not in _PHASES:
        raise TraceError(f"{path}: {where}: {key} = {values[key]!r}: choose prefill or decode")
    return _PHASES[given]


def _name(values: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in values and values[name] is not None), None)


def _whole(path: Path, where: str, key: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = -1
    if number < 0 or number >= 1 << 31 or isinstance(value, bool):
        raise TraceError(f"{path}: {where}: {key} = {str(value)[:40]!r}: must be an integer of at least 0")
    return number


def _listed(value: Any, pattern: re.Pattern[str], kind: type) -> list[Any]:
    """Returns a list as it is; the numbers in a text; a number alone as a list of one."""
    if isinstance(value, list):
        return value
    if isinstance(value, str):
        return [kind(number) for number in pattern.findall(value)]
    return [value]


def _steps(rows: Sequence[_Row]) -> list[dict[int, Any]]:
    """Returns rows of batches as steps: a layer that is not above the last one begins the next."""
    steps: list[dict[int, Any]] = []
    last = -1
    for row in rows:
        if row.layer <= last or not steps:
            steps.append({})
        steps[-1][row.layer] = (row.where, row.ids)
        last = row.layer
    return steps


class _Key(NamedTuple):
    """Which token a row is of: its sequence, by first appearance, its phase, and its number."""

    sequence: int
    phase: int
    token: int


def _tokens(path: Path, rows: Sequence[_Row]) -> tuple[list[Token], list[int]]:
    """Returns the tokens, by sequence, phase and number, and the layers' numbers."""
    numbers = sorted({row.layer for row in rows})
    place = {layer: at for at, layer in enumerate(numbers)}
    cells: dict[_Key, list[list[_Row]]] = {}
    sequences: dict[tuple[str, int], int] = {}
    again, counted = dict[str, int](), dict[tuple[str, int], int]()
    one_by_one = all(len(row.ids) == 1 for row in rows) and _repeats(rows)
    if one_by_one and rows[0].token is None:
        raise TraceError(f"{path}: rows of one expert each: must also number their token ({TOKEN[0]})")
    for row in rows:
        token = row.token
        if token is None:
            token = counted[row.sequence, row.layer] = counted.get((row.sequence, row.layer), -1) + 1
        phase = DECODE if row.phase is None else row.phase
        while True:
            name = (row.sequence, again.get(row.sequence, 0))
            key = _Key(sequences.setdefault(name, len(sequences)), phase, token)
            found = cells.setdefault(key, [[] for _ in numbers])[place[row.layer]]
            if not found or one_by_one:
                break
            again[row.sequence] = again.get(row.sequence, 0) + 1
        found.append(row)
    ordered = sorted(cells)
    positions = _increase(ordered)
    return [_token(path, key, cells[key], positions) for key in ordered], numbers


def _repeats(rows: Sequence[_Row]) -> bool:
    """Returns whether a token and layer has several rows in a row."""
    return any(
        (one.sequence, one.token, one.layer) == (next_.sequence, next_.token, next_.layer)
        for one, next_ in pairwise(rows)
    )


def _increase(keys: Sequence[_Key]) -> bool:
    """Returns whether the tokens' numbers increase within every sequence, as positions do."""
    return all(one.sequence != after.sequence or one.token < after.token for one, after in pairwise(keys))


def _token(path: Path, key: _Key, by_layer: Sequence[Sequence[_Row]], positions: bool) -> Token:
    layers, weights = list[Any](), list[Any]()
    for rows in by_layer:
        ordered = sorted(rows, key=lambda row: row.slot)
        layers.append([each for row in ordered for each in row.ids] or None)
        weights.append([each for row in ordered for each in row.weights or []])
    weighed = all(len(w) == len(i) for w, i in zip(weights, layers, strict=True) if i is not None)
    where = next(rows[0].where for rows in by_layer if rows)
    position = key.token if positions else None
    return Token(where, layers, key.phase, key.sequence, position, weights if weighed else None)
