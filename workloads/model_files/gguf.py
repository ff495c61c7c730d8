"""GGUF headers: a file's metadata and the name, type, shape and place of its tensors, without the tensors themselves.

Format: docs/gguf.md of ggml, versions 2 and 3. A file that is cut behind its header is read like a whole one, and the
parts of a split model as one. Nothing here knows what a tensor is for.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from ...words import shown
from ..model import ModelError

#: By a type's number: its name, and how many weights a block of so many bytes holds (ggml-common.h). Without q8_1,
#: which files do not have.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("float32", 1, 4),
    1: ("float16", 1, 2),
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210),
    15: ("q8_k", 256, 292),
    16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74),
    18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136),
    24: ("int8", 1, 1),
    25: ("int16", 1, 2),
    26: ("int32", 1, 4),
    27: ("int64", 1, 8),
    28: ("float64", 1, 8),
    29: ("iq1_m", 256, 56),
    30: ("bfloat16", 1, 2),
    34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66),
    39: ("mxfp4", 32, 17),
    40: ("nvfp4", 64, 36),
    41: ("q1_0", 128, 18),
}
#: By the number of a kind of value: how `struct` reads one, without text and lists.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
#: Weights of the longest block that a type has; shorter ones divide it.
_LONGEST_BLOCK = 256
_MAGIC = b"GGUF"
#: No model comes near: a file that says more is damaged.
_MOST_ENTRIES, _MOST_DIMENSIONS, _MOST_ALIGNMENT = 1 << 20, 8, 1 << 16
#: Longer lists (a vocabulary) are passed over.
_MOST_KEPT = 1 << 12
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<parts>\d{5})\.gguf")


class Tensor(NamedTuple):
    """A tensor: its dtype's name, or `type N` where the number is not known; its shape; the bytes that it takes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int

    @property
    def weights(self) -> int:
        """How many weights it holds."""
        return prod(self.shape)


class Header(NamedTuple):
    """What a model's files say: metadata by key (long lists left out), and all tensors in the files' order."""

    metadata: dict[str, Any]
    tensors: list[Tensor]


def read_header(path: Path) -> Header:
    """Returns a GGUF file's header; of a part of a split model, those of all parts as one.

    Raises ModelError, naming the file and what is wrong: not GGUF, cut within its header, or a part that is missing.
    """
    headers = [_read(part) for part in _parts(path)]
    metadata: dict[str, Any] = {}
    for header in reversed(headers):
        metadata |= header.metadata  # the first part's wins
    return Header(metadata, [tensor for header in headers for tensor in header.tensors])


def _parts(path: Path) -> list[Path]:
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["parts"])
    parts = [path.with_name(f"{match['stem']}-{n + 1:05}-of-{match['parts']}.gguf") for n in range(count)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing or not count:
        raise ModelError(f"{path}: part {match['number']} of {count}: missing are {', '.join(missing[:8])}")
    return parts


def _read(path: Path) -> Header:
    try:
        with path.open("rb") as stream:
            if not path.stat().st_size:
                raise ModelError(f"{path}: not GGUF: the file is empty")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(path, content).header()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None


class _Placed(NamedTuple):
    """A tensor as its entry says: its type's number, and where its data begin behind the header."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int

    @property
    def weights(self) -> int:
        """How many weights it holds."""
        return prod(self.shape)


class _Reader:
    """Goes through a header from its beginning, never beyond the file's end."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path = path
        self._content = content
        self._at = 0
        self._order = "<"

    def header(self) -> Header:
        """Returns the header; raises ModelError."""
        if self._take(4) != _MAGIC:
            raise ModelError(f"{self._path}: not GGUF: must begin with 'GGUF'")
        version = self._number("I")
        if version >= 1 << 16:
            self._order = ">"
            version = struct.unpack("<I", struct.pack(">I", version))[0]
        if version not in (2, 3):
            raise ModelError(f"{self._path}: GGUF version {version}: must be 2 or 3")
        tensors, entries = (self._count("tensors"), self._count("entries of metadata"))
        metadata = {}
        for _ in range(entries):
            key = self._text()
            value = self._value(self._number("I"))
            if value is not None:
                metadata[key] = value
        placed = [self._tensor() for _ in range(tensors)]
        return Header(metadata, list(self._sized(placed, metadata.get("general.alignment", 32))))

    def _count(self, what: str) -> int:
        count: int = self._number("Q")
        if count > _MOST_ENTRIES:
            raise ModelError(f"{self._path}: {count:,} {what}: must be at most {_MOST_ENTRIES:,}: damaged")
        return count

    def _take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._content):
            raise ModelError(
                f"{self._path}: cut within its header, at byte {len(self._content):,}: fetch more of its beginning"
            )
        found = self._content[self._at : end]
        self._at = end
        return found

    def _number(self, form: str) -> Any:
        return struct.unpack(self._order + form, self._take(struct.calcsize(self._order + form)))[0]

    def _text(self) -> str:
        return self._take(self._number("Q")).decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        """Returns a value of the metadata; None for a list that is long."""
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _TEXT:
            return self._text()
        if kind != _LIST:
            raise ModelError(f"{self._path}: a value of kind {kind} at byte {self._at:,}: must be 0 to 12: damaged")
        inner, count = self._number("I"), self._number("Q")
        if inner == _LIST:
            raise ModelError(f"{self._path}: a list of lists at byte {self._at:,}: no model has one: damaged")
        if inner in _SCALARS:
            form = f"{count}{_SCALARS[inner]}" if count <= _MOST_KEPT else ""
            content = self._take(count * struct.calcsize(self._order + _SCALARS[inner]))
            return list(struct.unpack(self._order + form, content)) if form else None
        values = [self._value(inner) for _ in range(min(count, _MOST_KEPT))]
        for _ in range(count - len(values)):
            self._value(inner)
        return values if inner == _TEXT and count <= _MOST_KEPT else None

    def _tensor(self) -> _Placed:
        name, dimensions = self._text(), self._number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ModelError(f"{self._path}: tensor {shown(name)}: {dimensions} dimensions: damaged")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        return _Placed(name, shape, self._number("I"), self._number("Q"))

    def _sized(self, placed: list[_Placed], alignment: Any) -> Iterator[Tensor]:
        """Yields the tensors with their bytes: by their types, and where a type is not known, by their places."""
        if type(alignment) is not int or not 1 <= alignment <= _MOST_ALIGNMENT:
            raise ModelError(f"{self._path}: general.alignment = {shown(alignment)}: must be 1 to {_MOST_ALIGNMENT:,}")
        begins = -(-self._at // alignment) * alignment
        by_place = _by_place(placed, len(self._content) - begins, alignment)
        for tensor in placed:
            if tensor.type in TYPES:
                dtype, block, block_bytes = TYPES[tensor.type]
                yield Tensor(tensor.name, dtype, tensor.shape, -(-tensor.weights // block) * block_bytes)
                continue
            size_bytes = by_place(tensor)
            if not size_bytes:
                raise ModelError(
                    f"{self._path}: tensor {shown(tensor.name)}: type {tensor.type} is not known, and the file is cut "
                    "before its end: give the whole file, or set model.bits_per_weight on its config.json"
                )
            yield Tensor(tensor.name, f"type {tensor.type}", tensor.shape, size_bytes)


def _by_place(placed: Sequence[_Placed], end: int, alignment: int) -> Callable[[_Placed], int]:
    """Returns the rule of a tensor's bytes where its type is not known: up to the next one's place.

    A file may be cut anywhere before its `end`. So the last tensor has as many bytes a weight as the largest other of
    its type, and only without one goes up to the end: 0 where that is cut off, or within its rows.
    """
    last = max((tensor.offset for tensor in placed), default=0)
    after = dict(pairwise(sorted({tensor.offset for tensor in placed} | {max(last, end)})))
    largest: dict[int, _Placed] = {}
    for tensor in sorted(placed, key=lambda each: each.weights):
        if tensor.offset < last and tensor.weights:
            largest[tensor.type] = tensor

    def size_bytes(tensor: _Placed) -> int:
        like = largest.get(tensor.type) if tensor.offset == last else None
        if like is not None:
            return -(-tensor.weights * (after[like.offset] - like.offset) // like.weights)
        found = after.get(tensor.offset, tensor.offset) - tensor.offset
        return found if tensor.offset != last or _is_whole(tensor, found, alignment) else 0

    return size_bytes


def _is_whole(tensor: _Placed, size_bytes: int, alignment: int) -> bool:
    """Whether all rows, or all blocks, of a tensor of an unknown type have as many bytes, but for padding behind them.

    A download is cut anywhere: of a tensor of many rows that leaves a rest, all but surely.
    """
    parts = (tensor.weights // tensor.shape[0], -(-tensor.weights // _LONGEST_BLOCK)) if tensor.weights else ()
    return any(part <= size_bytes and size_bytes % part < alignment for part in parts)
