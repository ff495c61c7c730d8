"""Popularity: how often each expert of a layer was chosen, as counts in CSV or JSON, and traces drawn by it.

A trace drawn so keeps the counts: with `memory.preload = "popular"` they place the experts, and not the draws.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bounded import check_json, check_memory, read
from .by_layer import of_model
from .keyed_random import uniform
from .model import Model
from .trace import RoutingTrace
from .trace_checks import POPULARITY
from .trace_limits import MAX_EXPERTS, MAX_LAYERS, TraceError, check_total_experts

Counts = npt.NDArray[np.float64]

_NUMBER = re.compile(r"\d+")
#: What stands for the counts in an object, and for a row's columns.
_WHOLE = ("counts", "popularity", "layers", "expert_counts")
_LAYER, _EXPERT = ("layer", "layer_id", "layer_idx"), ("expert", "expert_id", "expert_idx")
_COUNT = ("count", "counts", "tokens", "hits", "activations", "frequency", "freq", "share")
#: What a drawn choice takes while it is drawn, of every expert of a layer.
_DRAW_BYTES = 24


def load_popularity(path: Path, num_experts: int | None = None) -> Counts:
    """Returns counts (layers, experts) of a file: CSV rows of layer, expert and count, or JSON by layer.

    JSON is a list of lists, or objects whose keys name layers and experts (`{"layer_3": {"17": 5}}`). An expert that is
    not named was never chosen; the highest layer and expert say how many there are, unless `num_experts` does.

    Raises TraceError naming the file, the place and what would be right.
    """
    try:
        content = read(path, TraceError)
        text = content.decode("utf-8")
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: byte {error.start}: not UTF-8 text") from None
    if text.lstrip().startswith(("{", "[")):
        check_json(content, path, len(content), TraceError)
        try:
            cells = list(_of_json(path, json.loads(text)))
        except (ValueError, RecursionError) as error:
            if isinstance(error, TraceError):
                raise
            raise TraceError(f"{path}: not JSON ({' '.join(str(error).split())})") from None
    else:
        cells = list(_of_csv(path, text))
    return _array(path, cells, num_experts)


def draw_by(
    counts: Counts, tokens: int, top_k: int, *, sequences: int = 1, prefill_tokens: int = 0, seed: int = 0
) -> RoutingTrace:
    """Returns a trace whose tokens choose each by itself, without repeats, in proportion to the counts of a layer.

    Choices are the `top_k` largest of log(count) and a Gumbel number (Efraimidis and Spirakis 2006); of `tokens` in
    all, the first `prefill_tokens` of each sequence are its prompt's. Raises TraceError where a layer lacks experts.
    """
    _check_chosen(counts, top_k)
    return _drawn(counts, top_k, tokens, sequences, prefill_tokens, seed)


def _drawn(counts: Counts, top_k: int, tokens: int, sequences: int, prefill_tokens: int, seed: int) -> RoutingTrace:
    """Returns the trace of `draw_by`, where every layer has experts enough."""
    layers, experts = counts.shape
    if not 1 <= sequences <= tokens or not 0 <= prefill_tokens * sequences < tokens:
        raise TraceError(
            f"tokens = {tokens}: must be at least sequences = {sequences}, and more than their prompts' "
            f"{prefill_tokens}"
        )
    check_memory(f"tokens = {tokens:,}", tokens * experts * _DRAW_BYTES, TraceError)
    chosen = np.empty((tokens, layers, top_k), dtype=np.int64)
    for layer in range(layers):
        luck = uniform(seed, layer, np.arange(tokens)[:, None], np.arange(experts)[None, :])
        with np.errstate(divide="ignore"):
            keys = np.log(counts[layer]) - np.log(-np.log(np.clip(luck, 2.0**-54, 1 - 2.0**-54)))
        chosen[:, layer] = np.argsort(-keys, axis=1, kind="stable")[:, :top_k]
    sequence = np.sort(np.arange(tokens) % sequences).astype(np.int32)
    first = np.searchsorted(sequence, sequence)
    position = (np.arange(tokens) - first).astype(np.int32)
    return RoutingTrace(
        experts=chosen,
        num_experts=experts,
        sequence=sequence,
        position=position,
        phase=(position >= prefill_tokens).astype(np.uint8),
        meta={"source": f"drawn by popularity, seed {seed}"},
        extra={POPULARITY: counts},
    )


def _check_chosen(counts: Counts, top_k: int, where: str = "") -> None:
    short = np.flatnonzero((counts > 0).sum(axis=1) < top_k)
    if len(short):
        raise TraceError(f"{where}layer {short[0]}: fewer than {top_k} experts were ever chosen: give counts of more")


def popular_trace(
    path: Path, model: Model, tokens: int, sequences: int, prefill_tokens: int, seed: int
) -> RoutingTrace:
    """Returns a trace of a model drawn by a file's counts. Raises TraceError if they are of another shape."""
    counts = load_popularity(path, model.experts)
    if len(counts) != model.layers:
        raise TraceError(f"{path}: {len(counts)} layers: {model.name} has {model.layers} MoE layers")

    def draw(experts: int, top_k: int) -> RoutingTrace:
        own = counts[:, :experts]
        _check_chosen(own, top_k, f"{path}: ")
        return _drawn(own, top_k, tokens, sequences, prefill_tokens, seed)

    for layer, experts in enumerate(model.experts_by_layer):
        if counts[layer, experts:].any():
            raise TraceError(f"{path}: layer {layer}: counts of {counts.shape[1]} experts: {model.name} has {experts}")
    return of_model(model, draw)


Cell = tuple[int, int, float]


def _of_json(path: Path, data: Any) -> Iterable[Cell]:
    if isinstance(data, Mapping):
        data = next((data[key] for key in _WHOLE if isinstance(data.get(key), list | Mapping)), data)
    if isinstance(data, list) and data and isinstance(data[0], Mapping):
        for at, row in enumerate(data):
            yield _cell(path, f"entry {at}", row)
        return
    for layer, experts in _numbered(path, "layer", data):
        for expert, count in _numbered(path, f"layer {layer}: expert", experts):
            yield layer, expert, _count(path, f"layer {layer}, expert {expert}", count)


def _numbered(path: Path, what: str, data: Any) -> Iterable[tuple[int, Any]]:
    """Yields the entries of a list, or of an object whose keys hold a number, by their numbers."""
    if isinstance(data, list):
        yield from enumerate(data)
        return
    if not isinstance(data, Mapping):
        raise TraceError(f"{path}: {what}: {str(data)[:40]}: must be a list, or an object by number")
    for key, value in data.items():
        found = _NUMBER.findall(str(key))
        if len(found) != 1 or len(found[0]) > 9:
            raise TraceError(f"{path}: {what} {str(key)[:40]!r}: must name one number")
        yield int(found[0]), value


def _of_csv(path: Path, text: str) -> Iterable[Cell]:
    try:
        reader = csv.DictReader(line for line in text.splitlines() if line.strip() and not line.startswith("#"))
        for number, row in enumerate(reader, start=2):
            yield _cell(path, f"row {number}", {str(key).strip(): value for key, value in row.items()})
    except csv.Error as error:
        raise TraceError(f"{path}: not CSV: {error}") from None


def _cell(path: Path, where: str, row: Mapping[str, Any]) -> Cell:
    found = [
        next((row[name] for name in names if row.get(name) is not None), None) for names in (_LAYER, _EXPERT, _COUNT)
    ]
    if None in found:
        raise TraceError(f"{path}: {where}: must have layer, expert and count")
    try:
        layer, expert = int(str(found[0])), int(str(found[1]))
    except ValueError:
        raise TraceError(f"{path}: {where}: layer {found[0]!r}, expert {found[1]!r}: must be integers") from None
    return layer, expert, _count(path, where, found[2])


def _count(path: Path, where: str, value: Any) -> float:
    try:
        count = float(value)
    except (TypeError, ValueError):
        count = -1.0
    if not 0 <= count < 1e300 or isinstance(value, bool):
        raise TraceError(f"{path}: {where}: count {str(value)[:40]!r}: must be a number of at least 0")
    return count


def _array(path: Path, cells: list[Cell], num_experts: int | None) -> Counts:
    if not cells:
        raise TraceError(f"{path}: no counts: must have layer, expert and count")
    numbers = sorted({layer for layer, _, _ in cells})
    highest = max(expert for _, expert, _ in cells)
    lowest = min(min(expert, layer) for layer, expert, _ in cells)
    experts = highest + 1 if num_experts is None else num_experts
    if lowest < 0 or highest >= experts or experts > MAX_EXPERTS or len(numbers) > MAX_LAYERS:
        raise TraceError(f"{path}: expert {highest if lowest >= 0 else lowest}: must be 0..{experts - 1}")
    check_total_experts(str(path), len(numbers), experts)
    counts = np.zeros((len(numbers), experts))
    place = {layer: at for at, layer in enumerate(numbers)}  # dense layers have no counts
    for layer, expert, count in cells:
        counts[place[layer], expert] += count
    return counts
