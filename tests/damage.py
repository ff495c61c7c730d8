"""Damages to a valid file: each is drawn, and returns the bytes of another file that is nearly valid."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

#: Returns what a file becomes.
Damage = Callable[[bytes, random.Random], bytes]

#: What stands for a value: what programs trip over, the ends of a range, nothing, another kind.
VALUES = (
    "0", "1", "-1", "2", "255", "256", "65536", "2147483648", "9223372036854775808", "1e9", "1e308", "-0.0", "0.5",
    "1e400", "NaN", "Infinity", "null", "true", "[]", "{}", '""', '"a"', "[[]]", '"-1"', "1.5", "[null]", '{"a": 1}',
    "\u00e9",     "99999999999999999999999", "nan", "inf",
)  # fmt: skip
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|\w+|[\[\]{},:=\n]')


def of_bytes(content: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, gone, doubled or new; or all behind a place gone."""
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(found)) if found else 0
        match draw.randrange(5):
            case 0 if found:
                found[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
            case 1:
                del found[at : at + draw.choice((1, 4, 8, 100))]
            case 2:
                found[at:at] = found[at : at + draw.choice((1, 8, 64))]
            case 3:
                found[at:at] = draw.randbytes(draw.choice((1, 4, 8)))
            case _ if draw.random() < 0.2:
                del found[at:]
    return bytes(found)


def of_text(content: bytes, draw: random.Random) -> bytes:
    """A few words, numbers or signs replaced, gone or doubled; now and then lines, or single bytes."""
    if draw.random() < 0.1:
        return of_bytes(content, draw)
    if draw.random() < 0.15:
        lines = content.splitlines(keepends=True)
        at = draw.randrange(len(lines)) if lines else 0
        lines[at : at + 1] = draw.choice(([], lines[at : at + 1] * 2, lines[at : at + 1][::-1] + lines[:1]))
        return b"".join(lines)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        tokens = [match.span() for match in _TOKEN.finditer(content)]
        if not tokens:
            break
        begin, end = draw.choice(tokens)
        other = content[slice(*draw.choice(tokens))]
        content = content[:begin] + draw.choice((draw.choice(VALUES).encode(),) * 4 + (b"", other)) + content[end:]
    return content


def of_json(content: bytes, draw: random.Random) -> bytes:
    """A value somewhere inside replaced, gone or doubled, the whole still JSON; now and then as text."""
    if draw.random() < 0.2:
        return of_text(content, draw)
    data = json.loads(content)
    for _ in range(draw.choice((1, 1, 2))):
        places = list(_places(data))
        if not places:
            break
        within, key = draw.choice(places)
        match draw.randrange(6):
            case 0:
                del within[key]
            case 1 if isinstance(within, list):
                within.insert(key, within[key])
            case 2:
                other, at = draw.choice(places)
                within[key] = json.loads(json.dumps(other[at]))
            case _:
                within[key] = _value(draw)
    return json.dumps(data).encode()


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Yields every (container, key) of a tree; the first few of long lists."""
    keys = list(data) if isinstance(data, dict) else range(min(len(data), 20)) if isinstance(data, list) else []
    for key in keys:
        yield data, key
        yield from _places(data[key])


def _value(draw: random.Random) -> Any:
    text = draw.choice(VALUES)
    try:
        return json.loads(text)
    except ValueError:
        return text


def in_gzip(damage: Damage) -> Damage:
    """What is damaged before it is packed."""
    return lambda content, draw: gzip.compress(damage(gzip.decompress(content), draw), 1, mtime=0)


def before_zeros(damage: Damage) -> Damage:
    """What is damaged before the zeros that the content ends with."""

    def damaged(content: bytes, draw: random.Random) -> bytes:
        head = content.rstrip(b"\0")
        return damage(head, draw) + content[len(head) :]

    return damaged


def of_json_lines(content: bytes, draw: random.Random) -> bytes:
    """One line damaged as JSON, or the lines as text."""
    lines = content.splitlines()
    if draw.random() < 0.3:
        return of_text(content, draw)
    at = draw.randrange(len(lines))
    lines[at] = of_json(lines[at], draw)
    return b"\n".join(lines) + b"\n"


def of_safetensors(content: bytes, draw: random.Random) -> bytes:
    """The header damaged as JSON, or the JSON inside its metadata, its length right again; or bytes anywhere."""
    if draw.random() < 0.15:
        return of_bytes(content, draw)
    length = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    said = header.get("__metadata__", {})
    if said and draw.random() < 0.5:
        key = draw.choice(list(said))
        said[key] = _inner(said[key].encode(), draw).decode("utf-8", "replace")
        written = json.dumps(header).encode()
    else:
        written = of_json(json.dumps(header).encode(), draw)
    if draw.random() < 0.3:
        rest = of_bytes(rest, draw)
    return len(written).to_bytes(8, "little") + written + rest


def _inner(content: bytes, draw: random.Random) -> bytes:
    return of_json(content, draw) if content[:1] in b"{[" and content else of_text(content, draw)


def of_npz(content: bytes, draw: random.Random) -> bytes:
    """An array of another shape, dtype or content, one gone or new; or the bytes of one member."""
    with np.load(io.BytesIO(content)) as opened:
        arrays = dict(opened)
    name = draw.choice(list(arrays))
    array = arrays[name]
    match draw.randrange(6):
        case 0:
            del arrays[name]
        case 1 if array.dtype.kind in "iufb":
            arrays[name] = array.astype(draw.choice((np.float64, np.int64, np.int8, np.bool_, np.complex64, "U3")))
        case 2:
            array = np.atleast_1d(array)
            arrays[name] = draw.choice((array[:0], array[..., None], array[:1], array.ravel(), array.T, array[None]))
        case 3 if array.size and array.dtype.kind in "iuf":
            arrays[name] = array.copy()
            arrays[name].flat[draw.randrange(array.size)] = draw.choice((0, 1, 7, 120, 100))
        case 4:
            text = of_json(str(arrays["meta"]).encode(), draw) if "meta" in arrays else b"1"
            arrays["meta"] = np.array(text.decode("utf-8", "replace"))
        case _:
            return _member(content, draw)
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def _member(content: bytes, draw: random.Random) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as opened, zipfile.ZipFile(stream, "w") as packed:
        chosen = draw.choice(opened.namelist())
        for name in opened.namelist():
            packed.writestr(name, of_bytes(opened.read(name), draw) if name == chosen else opened.read(name))
    return stream.getvalue()
