"""Importers of logs that are lists of expert ids: tokens as JSON, or layer by layer as engines print `topk_ids`.

None of these formats says how many experts there are, nor (all but one) which sequence a token belongs to: the number
is asked for, and what is assumed of sequences stands with each format.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..bounded import check_need, read
from .batches import DECODE, PREFILL
from .trace import RoutingTrace
from .trace_limits import MAX_EXPERTS, TraceError

Numbers = npt.NDArray[Any]

_PHASES = {"prefill": PREFILL, "decode": DECODE, PREFILL: PREFILL, DECODE: DECODE}
_TOKEN_KEYS = ("experts", "weights", "sequence", "position", "phase")
#: A printed `topk_ids`: its name, the signs up to its brackets or to what calls itself tensor or array, and how the
#: brackets end. Each is looked for where the last one ended, so that a log is gone through once.
_NAME, _SIGNS = re.compile(r"topk_ids\w*"), re.compile(r"\W*")
_CALL, _END = re.compile(r"(?:tensor|array)\s*(?:\(\s*)?(?=\[\[)"), re.compile(r"\]\s*\]")
#: The layer that is named before it, on its line or on the one above.
_LAYER = re.compile(r"layers?(?:_?id|_?idx)?[\s._=:\[#]*(\d+)", re.IGNORECASE)
#: `json.loads` takes three times as long for a short line.
_DECODER = json.JSONDecoder()
#: What a (token, layer, slot) takes while a trace is put together, and a (token, layer).
_CELL_BYTES, _LAYER_BYTES, _LAYER_DIGITS = 24, 32, 9


class Token(NamedTuple):
    """One token of a log: where it stands, its experts by layer (None: not routed there), and what else is said."""

    where: str
    layers: Sequence[Any]
    phase: int = DECODE
    sequence: int = 0
    position: int | None = None
    weights: Sequence[Any] | None = None


def import_guide(path: Path, num_experts: int | None, layers: int | None = None) -> RoutingTrace:
    """Read one JSON list of tokens, each a list with the expert id (or the list of ids) of every layer.

    All tokens are decode tokens of one sequence. With `layers`, a list of plain ids is as in `import_jsonl`.
    """
    tokens = _parse(path, "file", _read(path))
    if not isinstance(tokens, list) or not tokens:
        raise TraceError(f"{path}: must be a list of tokens, each a list of expert ids, one a layer")
    listed = [Token(f"token {n}", _list(path, f"token {n}", t)) for n, t in enumerate(tokens)]
    listed, reading = _by_layer(path, listed, layers)
    return assemble(path, listed, num_experts, reading)


def import_jsonl(path: Path, num_experts: int | None, layers: int | None = None) -> RoutingTrace:
    """Read one JSON value a line, each a token: a list by layer of ids, or an object with that list as `experts`.

    The object may add `weights` (in the same shape), `sequence`, `position` and `phase` (prefill or decode, or 0 or
    1). A list by layer may have null where the token was not routed. A first line that is an object without `experts`
    goes into meta; its `num_experts` counts.

    A list of plain ids has one for each layer; with `layers` it is all ids of one layer, and so many of them in a row
    are a token. `reading` in meta says which was taken, where it could be either.
    """
    meta: dict[str, Any] = {}
    tokens: list[Token] = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        where = f"line {number}"
        if not line.strip():
            continue
        value = _parse(path, where, line)
        if isinstance(value, dict) and "experts" not in value and not tokens and not meta:
            meta = value
        else:
            tokens.append(_jsonl_token(path, where, value))
    tokens, reading = _by_layer(path, tokens, layers)
    return assemble(path, tokens, num_experts, meta | reading)


def _by_layer(path: Path, tokens: list[Token], layers: int | None) -> tuple[list[Token], dict[str, str]]:
    """Returns tokens whose lists are by layer, and how lists of plain ids were read, if there are such."""
    if not tokens or not all(type(each) is int for token in tokens for each in token.layers):
        return tokens, {}
    count = len(tokens[0].layers)
    if layers is None:
        if any(len(set(token.layers)) < len(token.layers) for token in tokens):
            return tokens, {}  # the same id twice: not the choices of one layer
        reading = f"a list of {count} ids is one id for each of {count} layers"
        return tokens, {"reading": f"{reading}; if it is the {count} ids of one layer, give the number of layers"}
    if len(tokens) % layers:
        raise TraceError(
            f"{path}: {len(tokens)} lists of ids: no multiple of {layers} layers, each of which has one list a token: "
            "give another number of layers, or none if a list has one id for each layer"
        )
    grouped = [_grouped(path, tokens[first : first + layers]) for first in range(0, len(tokens), layers)]
    reading = f"a list of {count} ids is the {count} ids of one layer, and {layers} lists are a token"
    return grouped, {"reading": f"{reading}; if it is one id for each layer, leave the number of layers out"}


def _grouped(path: Path, parts: list[Token]) -> Token:
    """Returns the token whose layers these are, one after the other; TraceError if they differ in what it is."""
    first = parts[0]
    for part in parts:
        for key in ("phase", "sequence", "position"):
            if getattr(part, key) != getattr(first, key):
                raise TraceError(
                    f"{path}: {part.where}: {key} = {getattr(part, key)}: must be {getattr(first, key)}, as in "
                    f"{first.where}: {len(parts)} layers make one token"
                )
        if (part.weights is None) != (first.weights is None):
            raise TraceError(f"{path}: {part.where}: weights: give them for all tokens or for none")
    weights = None if first.weights is None else [part.weights for part in parts]
    return first._replace(layers=[part.layers for part in parts], weights=weights)


def _jsonl_token(path: Path, where: str, value: Any) -> Token:
    if isinstance(value, list):
        return Token(where, value)
    if not isinstance(value, dict) or "experts" not in value:
        raise TraceError(f"{path}: {where}: must be a list by layer, or an object with experts")
    unknown = [key for key in value if key not in _TOKEN_KEYS]
    if unknown:
        raise TraceError(f"{path}: {where}: {unknown[0]}: choose from {', '.join(_TOKEN_KEYS)}")
    phase = value.get("phase", DECODE)
    if not isinstance(phase, (str, int)) or phase not in _PHASES:
        raise TraceError(f"{path}: {where}: phase = {phase!r}: choose prefill or decode")
    for key in ("sequence", "position"):
        given = value.get(key, 0)
        if not isinstance(given, int) or not 0 <= given < 1 << 31:
            raise TraceError(f"{path}: {where}: {key} = {given!r}: must be an integer, at least 0")
    weights = value.get("weights")
    return Token(
        where,
        _list(path, where, value["experts"]),
        _PHASES[phase],
        value.get("sequence", 0),
        value.get("position"),
        None if weights is None else _list(path, where, weights),
    )


def import_topk_ids(path: Path, num_experts: int | None) -> RoutingTrace:
    """Read printed `topk_ids` tensors (tokens, k), as a `print` in the MoE layer of vLLM or SGLang leaves them.

    Each must name its layer before it, on the same line or after the tensor before (`layer 3 topk_ids: tensor([[…]])`,
    `model.layers.3.mlp.experts topk_ids=[[…]]`); whatever else the log holds is passed over. A layer number that is
    not above the last one begins the next step. The log is taken to be of one request at a time: a step of
    one token is decode, one of more is prefill, and a prefill that follows a decode begins the next sequence.
    Rows of -1 are padding.
    """
    steps: list[dict[int, Any]] = []
    last, end, line = -1, 0, 1
    text = _read(path)
    for start, opens, closes in _printed(text):
        line += text.count("\n", end, start)
        where = f"line {line}"
        named = _LAYER.findall(text, end, start)
        if not named:
            raise TraceError(f"{path}: {where}: topk_ids: no layer is named before it: print 'layer N' with it")
        if text.find("...", opens, closes) >= 0:
            raise TraceError(
                f"{path}: {where}: topk_ids: left out with '...': print it whole "
                "(torch.set_printoptions(profile='full'))"
            )
        if len(named[-1]) > _LAYER_DIGITS:
            raise TraceError(f"{path}: {where}: topk_ids: layer {named[-1][:20]}…: no model has so many")
        line += text.count("\n", start, closes)
        layer, end = int(named[-1]), closes
        if layer <= last or not steps:
            steps.append({})
        steps[-1][layer] = (where, _parse(path, where, text[opens:closes]))
        last = layer
    if not steps:
        raise TraceError(f"{path}: no topk_ids found: must hold lines such as 'layer 0 topk_ids: tensor([[3, 1]])'")
    numbers = sorted({layer for step in steps for layer in step})
    rows = sum(len(next(iter(step.values()))[1]) for step in steps)
    what = f"{rows:,} tokens x {len(numbers):,} layers"
    check_need(path, what, rows * len(numbers) * _LAYER_BYTES, path.stat().st_size, TraceError)
    return assemble(path, list(tokens_of_steps(path, steps, numbers)), num_experts, {"moe_layers": numbers})


def _printed(text: str) -> Iterator[tuple[int, int, int]]:
    """Yields of each printed topk_ids where its name begins, where its brackets open, and where they are closed."""
    at = 0
    while name := _NAME.search(text, at):
        signs = _SIGNS.match(text, name.end())
        at = signs.end() if signs else name.end()
        opens = text.find("[[", name.end(), at)
        if opens < 0:
            call = _CALL.match(text, at)
            if call is None:
                continue
            opens = call.end()
        end = _END.search(text, opens)
        if end is None:
            return  # nor does any later one end
        at = end.end()
        yield name.start(), opens, at


def tokens_of_steps(path: Path, steps: list[dict[int, Any]], layers: list[int]) -> Iterator[Token]:
    """Turn what was printed layer by layer into tokens; a layer that a step lacks routed none of its tokens."""
    sequence, decoded = 0, False
    for step in steps:
        where, first = next(iter(step.values()))
        rows = len(first)
        for at, printed in step.values():
            if len(printed) != rows:
                raise TraceError(f"{path}: {at}: topk_ids: {len(printed)} tokens: must be {rows}, as on {where}")
        if rows > 1 and decoded:
            sequence += 1
        decoded = rows == 1
        for row in range(rows):
            ids = [step[layer][1][row] if layer in step else None for layer in layers]
            ids = [None if each is None or _is_padding(each) else each for each in ids]
            if any(each is not None for each in ids):
                yield Token(where, ids, DECODE if decoded else PREFILL, sequence)


def _is_padding(ids: Any) -> bool:
    return isinstance(ids, list) and all(each == -1 for each in ids)


def _read(path: Path) -> str:
    try:
        return read(path, TraceError).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: byte {error.start}: not UTF-8 text") from error


def _parse(path: Path, where: str, text: str) -> Any:
    text = text.strip()
    try:
        value, end = _DECODER.raw_decode(text)
        return value if end == len(text) else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path}: {where}: not JSON ({' '.join(str(error).split())})") from error


def _list(path: Path, where: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise TraceError(f"{path}: {where}: {str(value)[:40]}: must be a list, one entry a layer")
    return value


def assemble(
    path: Path, tokens: list[Token], num_experts: int | None, meta: dict[str, Any] | None = None
) -> RoutingTrace:
    """Returns the trace of tokens, in their order. Raises TraceError naming token and layer of what cannot be."""
    meta = {"source": f"imported from {path.name}", **(meta or {})}
    if not tokens:
        raise TraceError(f"{path}: no tokens: must hold at least one")
    num_experts = _agreed(path, meta.get("num_experts"), num_experts)
    k = next((len(ids) if isinstance(ids, list) else 1 for ids in tokens[0].layers if ids is not None), 1)
    shape = (len(tokens), len(tokens[0].layers), k)
    what = f"{shape[0]:,} tokens x {shape[1]:,} layers x {k:,} ids"
    check_need(path, what, math.prod(shape) * _CELL_BYTES, path.stat().st_size, TraceError)
    experts, weights, present = _filled(path, tokens, shape, num_experts)
    positions = [token.position for token in tokens if token.position is not None]
    placed: dict[str, Any] = {"position": np.array(positions, dtype=np.int32)} if len(positions) == len(tokens) else {}
    return RoutingTrace(
        experts=experts,
        num_experts=num_experts,
        weights=weights,
        sequence=np.array([token.sequence for token in tokens], dtype=np.int32),
        phase=np.array([token.phase for token in tokens], dtype=np.uint8),
        present=None if present.all() else present,
        meta=meta,
        **placed,
    )


def _filled(
    path: Path, tokens: list[Token], shape: tuple[int, int, int], num_experts: int
) -> tuple[Numbers, Numbers | None, Numbers]:
    """Returns the experts and weights of tokens in arrays of this shape, and where they are present."""
    present = np.ones(shape[:2], dtype=np.bool_)
    whole = _at_once([token.layers for token in tokens], shape, (int,))
    given = sum(token.weights is not None for token in tokens)
    if whole is not None and given in (0, len(tokens)) and whole.min() >= 0 and whole.max() < num_experts:
        if not given:
            return whole, None, present
        weighed = _at_once([token.weights or [] for token in tokens], shape, (int, float))
        if weighed is not None:
            return whole, weighed, present
    # One by one: some are not there, or one is wrong and is named.
    experts = np.zeros(shape, dtype=np.int64)
    weights = np.zeros(shape, dtype=np.float64) if tokens[0].weights is not None else None
    for row, token in enumerate(tokens):
        _fill(path, token, "experts", token.layers, experts[row], num_experts)
        present[row] = [ids is not None for ids in token.layers]
        if (weights is None) != (token.weights is None):
            raise TraceError(f"{path}: {token.where}: weights: give them for all tokens or for none")
        if weights is not None:
            _fill(path, token, "weights", token.weights or [], weights[row], None)
    return experts, weights, present


def _at_once(lists: list[Sequence[Any]], shape: tuple[int, int, int], kinds: tuple[type, ...]) -> Numbers | None:
    """Returns all lists (layers, or layers of k) as one array; None if one is of another shape, or of no such kind."""
    if set(map(len, lists)) != {shape[1]}:
        return None
    cells = list(chain.from_iterable(lists))
    if set(map(type, cells)) == {list}:
        if set(map(len, cells)) != {shape[2]}:
            return None
        cells = list(chain.from_iterable(cells))
    if not set(map(type, cells)) <= set(kinds) or len(cells) != math.prod(shape):
        return None
    try:
        return np.array(cells, dtype=np.int64 if kinds == (int,) else np.float64).reshape(shape)
    except OverflowError:
        return None


def _agreed(path: Path, named: Any, given: int | None) -> int:
    """Returns the number of experts that the log names or the caller gives."""
    count = given if named is None else named
    if count is None:
        raise TraceError(f"{path}: num_experts: this format does not say it: give it (--num-experts 64)")
    if not isinstance(count, int) or not 1 <= count <= MAX_EXPERTS or given not in (None, count):
        raise TraceError(f"{path}: num_experts = {count!r}: must be 1..{MAX_EXPERTS}, and {given} was given")
    return count


def _fill(
    path: Path, token: Token, name: str, layers: Sequence[Any], row: np.ndarray[Any, Any], most: int | None
) -> None:
    """Put a token's numbers (layers, k) in their row; TraceError naming token and layer for any other shape."""
    if len(layers) != len(row):
        raise TraceError(f"{path}: {token.where}: {name}: {len(layers)} layers: must be {len(row)}, as before")
    kinds = {int} if most else {int, float}
    for layer, numbers in enumerate(layers):
        if token.layers[layer] is None:
            continue
        numbers = numbers if isinstance(numbers, list) else [numbers]
        if len(numbers) != row.shape[1] or not set(map(type, numbers)) <= kinds:
            wanted = f"{row.shape[1]} {'ids' if most else 'numbers'}, as before"
            raise TraceError(f"{path}: {token.where}: {name} at layer {layer}: {str(numbers)[:60]}: must be {wanted}")
        if most and not all(0 <= each < most for each in numbers):
            raise TraceError(f"{path}: {token.where}: {name} at layer {layer}: {numbers}: must be 0..{most - 1}")
        row[layer] = numbers
