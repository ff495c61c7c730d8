"""Routing traces: which experts a model's router chose, token by token and layer by layer.

A trace is a handful of numpy arrays that share their first axis, the rows (one row, one token). Nothing is
believed until `check()` has seen it: `load`, `save`, the importers and the generator all call it.

Two file formats hold the same arrays: `.safetensors`, whose metadata has one JSON string under the key `meta`,
and `.npz`, whose array `meta` is that string. Neither is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from html import escape
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ..bounded import check_need
from ..files import replacing
from .batches import DECODE, PREFILL
from .trace_checks import (
    KNOWN_EXTRA,
    LAYER_EXPERTS,
    LAYOUT,
    POPULARITY,
    RUNNERS_UP,
    RUNNERS_UP_WEIGHTS,
    agree_on_num_experts,
    check_array,
    check_floats,
    first_wrong,
    parse_meta,
)
from .trace_files import format_of
from .trace_limits import MAX_TOP_K, Array, TraceError, check_num_experts, check_total_experts

#: What a row takes beside its choices, while it is checked and run: its sequence, position, phase, and their order.
_ROW_BYTES = 256
#: From so many choices on, comparing every pair takes longer than sorting.
_SORTED_FROM = 32


def _not_given() -> Array:
    return _NOT_GIVEN


_NOT_GIVEN: Array = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, eq=False, repr=False)
class RoutingTrace:
    """The choices of a router, and what else is known of them.

    Arrays (integers of other widths are narrowed when no value changes; wider floats are rounded):

    - `experts` (tokens, layers, k), uint8 or uint16, in the router's order, each 0..num_experts-1, distinct
      within one (token, layer).
    - `weights` float16, same shape, at least 0; or None.
    - `sequence`, `position` int32 (tokens,) and `phase` uint8 (tokens,), 0 prefill and 1 decode: always filled.
      Left out, all rows are decode tokens of sequence 0, and position counts the rows of a sequence.
      Sequences may be interleaved, but within one, positions increase in file order.
    - `present` bool (tokens, layers), False where the token was not routed at that layer (its experts and
      weights then mean nothing, and are 0); None: all are. With an axis more, (tokens, layers, k), it says so of each
      choice, where layers or tokens choose fewer than k: those that are made stand first.
    - `predictions` int16 (tokens, layers, horizons, n): ranked guesses made at (token, layer) for the layer
      1, 2, ... ahead, -1 for none; `confidences` float16 or float32, same shape; or None.

    `meta` is any JSON object; it always names `num_experts`. `extra` holds all other arrays by name, among them
    `residency` (tokens, layers, k), `expert_bytes`, `dense_bytes` and, where layers have fewer experts than
    `num_experts`, `layer_experts`, each (layers,). Making a trace does not check it: call `check()`.
    """

    experts: Array
    num_experts: int
    weights: Array | None = None
    sequence: Array = field(default_factory=_not_given)
    position: Array = field(default_factory=_not_given)
    phase: Array = field(default_factory=_not_given)
    present: Array | None = None
    predictions: Array | None = None
    confidences: Array | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name, layout in LAYOUT.items():
            value = getattr(self, name)
            if value is not None and value is not _NOT_GIVEN:
                put(name, _narrow(np.asarray(value), layout.dtypes))
        num_experts: Any = self.num_experts
        if isinstance(num_experts, np.integer):
            put("num_experts", int(num_experts))
        # Of an empty array a length means nothing, and may be any: check() refuses it.
        rows = len(self.experts) if self.experts.size and self.experts.ndim else 0
        if self.sequence is _NOT_GIVEN or self.sequence is None:
            put("sequence", np.zeros(rows, dtype=np.int32))
        if self.position is _NOT_GIVEN or self.position is None:
            put("position", _count_within(self.sequence, rows))
        if self.phase is _NOT_GIVEN or self.phase is None:
            put("phase", np.full(rows, DECODE, dtype=np.uint8))
        put("meta", {"num_experts": self.num_experts, **self.meta})
        put("extra", {name: np.asarray(value) for name, value in self.extra.items()})

    def summary(self) -> str:
        """Returns in a line how much there is: tokens, sequences, layers, experts, and what else is known."""
        decode = int(np.count_nonzero(self.phase == DECODE))
        known = [name for name in ("weights", "present", "predictions") if getattr(self, name) is not None]
        return (
            f"{self.tokens:,} tokens ({decode:,} decode) of {len(np.unique(self.sequence)):,} sequences, "
            f"{self.layers} layers of {self.num_experts} experts, top-{self.k}"
            + (f", with {', '.join([*known, *self.extra])}" if known or self.extra else "")
        )

    def __repr__(self) -> str:
        if self.experts.ndim != 3:
            return f"<RoutingTrace: experts {self.experts.shape}, which check() refuses>"
        return f"<RoutingTrace: {self.summary()}>"

    def _repr_html_(self) -> str:
        if self.experts.ndim != 3:
            return f"<p>{escape(repr(self))}</p>"
        model = self.meta.get("model") or "a model that the trace does not name"
        return f"<p><b>{escape(str(model))}</b>: {escape(self.summary())}</p>"

    @property
    def tokens(self) -> int:
        """How many rows there are."""
        return int(self.experts.shape[0])

    @property
    def layers(self) -> int:
        """How many MoE layers each token passes."""
        return int(self.experts.shape[1])

    @property
    def k(self) -> int:
        """How many experts the router chooses at a layer."""
        return int(self.experts.shape[2])

    @property
    def experts_by_layer(self) -> Array:
        """How many experts each layer has, (layers,)."""
        given = self.extra.get(LAYER_EXPERTS)
        return np.full(self.layers, self.num_experts) if given is None else given

    @property
    def routed(self) -> Array | None:
        """Which rows are routed at which layer at all, bool (tokens, layers); None: all are."""
        return self.present if self.present is None or self.present.ndim < 3 else self.present[..., 0]

    @property
    def made(self) -> Array | None:
        """Which of the choices are made, bool (tokens, layers, k); None: all are."""
        if self.present is None or self.present.ndim > 2:
            return self.present
        return np.broadcast_to(self.present[..., None], self.experts.shape)

    def chosen(self, row: int, layer: int) -> list[int]:
        """Returns what a row chose at a layer, in the router's order; nothing where it was not routed."""
        chosen: Array = self.experts[row, layer]
        chosen = chosen if self.made is None else chosen[self.made[row, layer]]
        return list(chosen.tolist())

    @classmethod
    def load(cls, path: str | os.PathLike[str], num_experts: int | None = None) -> Self:
        """Read and check a `.safetensors` or `.npz` file; `num_experts` is needed where its meta lacks it.

        Raises TraceError for whatever is wrong with the file or its content.
        """
        path = Path(path)
        try:
            arrays, text = format_of(path).read(path)
        except OSError as error:
            raise TraceError(f"{path}: cannot be read: {error.strerror or error}") from error
        meta = parse_meta(path, text)
        if "experts" in arrays and arrays["experts"].ndim:
            rows = len(arrays["experts"]) if arrays["experts"].size else 0
            check_need(path, f"{rows:,} tokens", rows * _ROW_BYTES, path.stat().st_size, TraceError)
        arrays_named = {item.name for item in fields(cls)} & LAYOUT.keys()
        if "experts" not in arrays:
            found = ", ".join(sorted(arrays)) or "no arrays"
            raise TraceError(f"{path}: experts: missing (found {found}): must be an array (tokens, layers, k)")
        trace = cls(
            num_experts=agree_on_num_experts(path, meta.get("num_experts"), num_experts),
            meta=meta,
            extra={name: value for name, value in arrays.items() if name not in arrays_named},
            **{name: value for name, value in arrays.items() if name in arrays_named},
        )
        trace.check(str(path))
        return trace

    def save(self, path: str | os.PathLike[str]) -> None:
        """Check the trace and write it as `.safetensors` or `.npz`, whole or not at all; same trace, same bytes.

        Predictions of up to 128 experts are written as int8, and are int16 again when loaded.

        Raises TraceError if the trace is wrong, the folder is missing or the format cannot hold an extra array.
        """
        path = Path(path)
        file_format = format_of(path)
        self.check(str(path))
        if not path.parent.is_dir():
            raise TraceError(f"{path}: the folder {path.parent} does not exist: make it first")
        arrays = {name: value for name in LAYOUT if (value := getattr(self, name)) is not None}
        arrays |= {name: self.extra[name] for name in sorted(self.extra)}
        if self.predictions is not None and self.num_experts <= 1 << 7:
            # Guesses are most of a file.
            arrays["predictions"] = self.predictions.astype(np.int8)
        plain = {name: _plain(value) for name, value in arrays.items()}
        text = json.dumps(self.meta, sort_keys=True, allow_nan=False)
        with replacing(path) as stream:
            file_format.write(stream, path, plain, text)

    def check(self, where: str = "trace") -> None:
        """Raise TraceError, one line that begins with `where`, if anything in the trace cannot be right."""
        check_num_experts(where, self.num_experts)
        shape = self.experts.shape
        if len(shape) != 3 or 0 in shape:
            raise TraceError(f"{where}: experts: shape {shape}: must be (tokens, layers, k), each at least 1")
        if self.k > MAX_TOP_K:
            raise TraceError(f"{where}: experts: k = {self.k:,}: must be at most {MAX_TOP_K}: no router chooses more")
        check_total_experts(where, self.layers, self.num_experts)
        sizes = dict(zip(("row", "layer", "slot"), shape, strict=True))
        if self.predictions is not None and self.predictions.ndim == 4:
            sizes |= {"horizon": self.predictions.shape[2], "rank": self.predictions.shape[3]}
        elif self.predictions is None and self.confidences is not None:
            raise TraceError(f"{where}: confidences: given without predictions: give both, or neither")
        limits = {"experts": (0, self.num_experts - 1), "predictions": (-1, self.num_experts - 1)}
        for name, layout in LAYOUT.items():
            value = getattr(self, name)
            if value is not None:
                if name == "present" and value.ndim > len(layout.axes):
                    layout = layout._replace(axes=(*layout.axes, "slot"))
                low, high = limits.get(name, (layout.low, layout.high))
                check_array(where, name, value, layout._replace(low=low, high=high), sizes)
        for name in ("weights", "confidences"):
            value = getattr(self, name)
            if value is not None:
                check_floats(where, name, value, 0 if name == "weights" else None)
        self._check_made(where)
        self._check_distinct(where)
        self._check_order(where)
        self._check_extra(where, sizes)
        self._check_meta(where)

    def _check_made(self, where: str) -> None:
        if self.present is None or self.present.ndim < 3:
            return
        late = np.any(self.present[..., 1:] & ~self.present[..., :-1], axis=-1)
        if late.any():
            row, layer = first_wrong(late)
            raise TraceError(
                f"{where}: present at row {row}, layer {layer}: {self.present[row, layer].tolist()}: must be true of "
                "the first choices and false of the rest"
            )

    def _check_distinct(self, where: str) -> None:
        experts, k = self.experts, self.k
        if self.present is not None and self.present.ndim > 2:  # numbers beyond any expert's, each its own
            experts = np.where(self.present, experts, self.num_experts + np.arange(k))
        experts = experts if k < _SORTED_FROM else np.sort(experts, axis=-1)
        for apart in range(1, k if k < _SORTED_FROM else 2):
            # Comparing slots that lie `apart` from each other, for every distance, compares every pair; of sorted ones,
            # the neighbors are enough.
            same = (experts[..., apart:] == experts[..., :-apart]).any(axis=-1)
            if self.routed is not None:
                same &= self.routed
            if same.any():
                row, layer = first_wrong(same)
                chosen = self.experts[row, layer].tolist()
                raise TraceError(
                    f"{where}: experts at row {row}, layer {layer}: {chosen}: "
                    "an expert appears twice: must be distinct within a token and layer"
                )

    def _check_order(self, where: str) -> None:
        order = by_sequence(self.sequence)
        sequence, position = self.sequence[order], self.position[order]
        back = (np.diff(sequence) == 0) & (np.diff(position) <= 0)
        if back.any():
            at = int(np.flatnonzero(back)[0])
            raise TraceError(
                f"{where}: position at row {order[at + 1]}: {position[at + 1]} comes after {position[at]} "
                f"(row {order[at]}) of the same sequence {sequence[at]}: must increase within a sequence"
            )

    def _check_extra(self, where: str, sizes: dict[str, int]) -> None:
        for name, value in self.extra.items():
            if name in LAYOUT or name == "meta":
                raise TraceError(f"{where}: extra array {name!r}: the trace's own name: choose another")
            if value.dtype.kind not in "biufcSU":
                raise TraceError(
                    f"{where}: {name}: dtype {value.dtype}: must be plain numbers or strings, for nothing is pickled"
                )
            if name in KNOWN_EXTRA:
                runners = {"runner": value.shape[2]} if value.ndim > 2 else {}
                check_array(where, name, value, KNOWN_EXTRA[name], {**sizes, **runners})
            if name == LAYER_EXPERTS:
                self._check_layer_experts(where, value)
        self._check_runners_up(where)

    def _check_runners_up(self, where: str) -> None:
        given = {name: self.extra[name] for name in (RUNNERS_UP, RUNNERS_UP_WEIGHTS) if name in self.extra}
        if len({value.shape for value in given.values()}) > 1:
            shapes = " and ".join(f"{name} {value.shape}" for name, value in given.items())
            raise TraceError(f"{where}: {shapes}: must have one shape")
        if RUNNERS_UP_WEIGHTS in given:
            check_floats(where, RUNNERS_UP_WEIGHTS, given[RUNNERS_UP_WEIGHTS], 0)
        if RUNNERS_UP not in given:
            return
        ranked = np.concatenate([self.experts.astype(np.int64), given[RUNNERS_UP].astype(np.int64)], axis=2)
        in_order = np.sort(ranked, axis=2)
        wrong = (in_order[..., 1:] == in_order[..., :-1]).any(axis=2) | (in_order[..., -1] >= self.num_experts)
        wrong &= True if self.routed is None else self.routed
        if wrong.any():
            row, layer = first_wrong(wrong)
            raise TraceError(
                f"{where}: {RUNNERS_UP} at row {row}, layer {layer}: {ranked[row, layer, self.k :].tolist()} behind "
                f"{ranked[row, layer, : self.k].tolist()}: must be other experts than were chosen, each once, of "
                f"0..{self.num_experts - 1}"
            )

    def _check_layer_experts(self, where: str, counts: Array) -> None:
        beyond: Array = np.less_equal(counts[:, None], self.experts)
        if self.made is not None:
            beyond = np.logical_and(beyond, self.made)
        if beyond.any():
            row, layer, slot = first_wrong(beyond)
            raise TraceError(
                f"{where}: experts at row {row}, layer {layer}, slot {slot}: {self.experts[row, layer, slot]}: must be "
                f"0..{counts[layer] - 1}, as layer_experts says"
            )

    def _check_meta(self, where: str) -> None:
        named = self.meta["num_experts"]
        if named != self.num_experts:
            raise TraceError(
                f"{where}: meta: num_experts = {named!r}, but the trace has num_experts = {self.num_experts}: "
                "must agree"
            )
        try:
            json.dumps(self.meta, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TraceError(f"{where}: meta: not JSON ({error}): must be a plain object") from error

    def select(self, rows: npt.ArrayLike | slice) -> Self:
        """Returns the trace of these rows, given as an index array, a mask (tokens,) or a slice, in that order.

        Extra arrays whose first axis has as many entries as there are tokens follow; `expert_bytes` and
        `dense_bytes`, which are per layer, never do. Raises TraceError for a row that is not there.
        """
        if not isinstance(rows, slice):
            rows = np.atleast_1d(np.asarray(rows))
            rows = rows.astype(np.int64) if rows.size == 0 else rows
        try:
            index = np.arange(self.tokens)[rows]
        except IndexError as error:
            raise TraceError(f"rows: {error}: must choose among {self.tokens} rows") from error
        chosen = {name: value[index] for name in LAYOUT if (value := getattr(self, name)) is not None}
        extra = {name: value[index] if self._follows_rows(name, value) else value for name, value in self.extra.items()}
        return type(self)(num_experts=self.num_experts, meta=dict(self.meta), extra=extra, **chosen)

    def _follows_rows(self, name: str, value: Array) -> bool:
        if name == POPULARITY:
            return False
        if name in KNOWN_EXTRA:
            return KNOWN_EXTRA[name].axes[0] == "row"
        return value.ndim > 0 and len(value) == self.tokens

    def narrowed(self, k: int) -> Self:
        """Returns the trace of a model that chooses the first `k` experts only: the others are its runners-up.

        TraceError if there are no gate weights, fewer choices than that, or tokens that choose fewer than others.
        """
        if self.weights is None or not 0 < k < self.k or (self.present is not None and self.present.ndim > 2):
            raise TraceError(
                f"k = {k}: must be 1..{self.k - 1}, of a trace with weights whose tokens all choose {self.k}"
            )
        behind = {RUNNERS_UP: self.experts[..., k:], RUNNERS_UP_WEIGHTS: self.weights[..., k:]}
        narrow = replace(self, experts=self.experts[..., :k], weights=self.weights[..., :k])
        return narrow.with_extra(behind)

    def with_extra(self, arrays: dict[str, Array]) -> Self:
        """Returns the trace with more extra arrays."""
        return replace(self, extra={**self.extra, **arrays})

    def slice(self, phase: int | None = None, sequences: Iterable[int] | None = None, first: int | None = None) -> Self:
        """Returns the rows of one phase (0 prefill, 1 decode), of these sequences, and of those the first ones.

        Raises TraceError for an unknown phase or sequence, and where no row is left.
        """
        keep = np.ones(self.tokens, dtype=np.bool_)
        if phase is not None:
            if phase not in (PREFILL, DECODE):
                raise TraceError(f"phase = {phase!r}: choose 0 (prefill) or 1 (decode)")
            keep &= self.phase == phase
        if sequences is not None:
            wanted = sorted(set(sequences))
            known = set(np.unique(self.sequence).tolist())
            for name in wanted:
                if name not in known:
                    raise TraceError(
                        f"sequences: {name!r} is not in the trace: it has {len(known)}, {min(known)} to {max(known)}"
                    )
            keep &= np.isin(self.sequence, wanted)
        if first is not None and first < 1:
            raise TraceError(f"first = {first}: must be at least 1")
        rows = np.flatnonzero(keep)[:first]
        if not len(rows):
            raise TraceError(f"phase = {phase}, sequences = {sequences}: no row of the trace is left")
        return self.select(rows)

    def sequences_in(self, span: str) -> list[int]:
        """Returns the sequences at these places in file order, first inclusive, last exclusive: '61:', ':10' or '3:5'.

        Raises TraceError if the span is not written like that or names no sequence of the trace.
        """
        names = list(dict.fromkeys(self.sequence.tolist()))
        match = re.fullmatch(r"([0-9]*):([0-9]*)", span.strip())
        chosen = names[int(match[1] or 0) : int(match[2] or len(names))] if match else []
        if not chosen:
            raise TraceError(
                f"sequences {span!r}: write FIRST:LAST, such as 3:5 or 61:, within the {len(names)} there are"
            )
        return chosen


def by_sequence(sequence: Array) -> npt.NDArray[np.int64]:
    """Returns the row numbers (tokens,) sorted by sequence, rows of one sequence in file order."""
    if (np.diff(sequence) >= 0).all():
        return np.arange(len(sequence))
    return np.argsort(sequence, kind="stable")


def _count_within(sequence: Array, rows: int) -> Array:
    """Return, for each row, how many rows of its sequence come before it."""
    if sequence.shape != (rows,) or sequence.dtype.kind not in "iu":
        return np.arange(rows, dtype=np.int32)  # check() will refuse the sequence
    order = by_sequence(sequence)
    ordered = sequence[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
    lengths = np.diff(starts, append=rows)
    position = np.empty(rows, dtype=np.int32)
    position[order] = np.arange(rows) - np.repeat(starts, lengths)
    return position


def _narrow(value: Array, dtypes: tuple[str, ...]) -> Array:
    """Returns the array in the first of these types that keeps it; as it is if none may."""
    if any(value.dtype == np.dtype(name) for name in dtypes):
        return value
    target = np.dtype(dtypes[0])
    if target.kind == "f" and value.dtype.kind == "f":
        with np.errstate(over="ignore"):  # too large becomes infinite, which check() refuses
            return value.astype(np.dtype(dtypes[-1]))
    if value.dtype.kind in ("biu" if target.kind == "b" else "iu") and target.kind != "f":
        for name in dtypes:
            narrowed = value.astype(name)
            if np.array_equal(narrowed, value):
                return narrowed
    return value


def _plain(value: Array) -> Array:
    """Returns the array contiguous and in the machine's byte order, as both formats want it."""
    return np.asarray(value, dtype=value.dtype.newbyteorder("="), order="C")
