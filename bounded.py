"""Reading untrusted files: what a file would take in memory is bounded before the memory is allocated.

A file may ask for far more than it is: compressed zeros, a header that names a huge shape, a few bytes of JSON that
become an object each. Each function here takes a file's own size as the measure of what it may ask for, and refuses
with the error class that its caller names.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import stat
import tomllib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError
from .units import bytes_words

#: What reading a file may take in memory: so much, or so many times its size if that is more.
LEAST_ALLOWED_BYTES, ALLOWED_TIMES = 512 << 20, 128
#: The same for what is packed in it, before anything is made of that. Real traces and timelines pack 3 to 30 times.
LEAST_UNPACKED_BYTES, UNPACKED_TIMES = 64 << 20, 40
#: What one number in a scenario, a grid or an option may ask for.
MOST_ASKED_BYTES = 8 << 30
#: What is no regular file (a pipe, a device) has no size; so much of it is read.
MOST_STREAMED_BYTES = 256 << 20
#: What people write by hand is far smaller: a longer TOML file, or a key of more parts, is something else. `tomllib`
#: takes memory and time by the square of a key's parts.
MOST_TOML_BYTES, MOST_KEY_PARTS = 1 << 20, 64
#: Upper bounds of what each of these characters of JSON becomes in Python, beside its own byte.
_JSON_BYTES = {b"[": 72, b"{": 200, b",": 40, b":": 40, b'"': 16}
_GZIP = b"\x1f\x8b"
_PIECE_BYTES = 1 << 20
#: Where one key or value of TOML ends and another may begin.
_TOML_ENDS = re.compile(r"[=,\[\]{}\n]")
_TOML_QUOTED = re.compile(r"\"[^\"\n]*\"|'[^'\n]*'")

Array = npt.NDArray[Any]


def allowed_bytes(file_bytes: int) -> int:
    """Returns what reading a file of this size may take in memory."""
    return max(LEAST_ALLOWED_BYTES, ALLOWED_TIMES * file_bytes)


def check_need(
    where: object, what: str, need_bytes: int, file_bytes: int, error: type[InputError] = InputError
) -> None:
    """Refuse what would take more memory than a file of this size may ask for; `what` says what it is."""
    if need_bytes > allowed_bytes(file_bytes):
        raise error(
            f"{where}: {what} would take {bytes_words(need_bytes)} of memory, and a file of "
            f"{bytes_words(file_bytes)} may ask for {bytes_words(allowed_bytes(file_bytes))}: damaged, "
            "or not what it says"
        )


def check_memory(what: str, need_bytes: int, error: type[InputError] = InputError) -> None:
    """Refuse what somebody asks for, such as so many tokens, if it takes more memory than anybody has for it."""
    most_bytes = min(MOST_ASKED_BYTES, _memory_bytes())
    if need_bytes > most_bytes:
        raise error(
            f"{what}: would take {bytes_words(need_bytes)} of memory, and at most {bytes_words(most_bytes)} may be "
            "taken: ask for less"
        )


def _memory_bytes() -> int:
    """Returns the memory of this machine, or what this process may take of it if that is less."""
    try:
        import resource

        limit_bytes = resource.getrlimit(resource.RLIMIT_AS)[0]
        bytes_here: int = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ImportError, ValueError, OSError):  # not a Unix
        return MOST_ASKED_BYTES
    return bytes_here if limit_bytes < 0 else min(bytes_here, limit_bytes)


def read(path: Path, error: type[InputError] = InputError) -> bytes:
    """Returns a file's bytes; of a pipe or a device those up to MOST_STREAMED_BYTES and refuse more. Raises OSError."""
    with path.open("rb") as stream:
        if stat.S_ISREG(path.stat().st_mode):
            return stream.read()
        content = stream.read(MOST_STREAMED_BYTES + 1)
    if len(content) > MOST_STREAMED_BYTES:
        raise error(f"{path}: no file, and more than {bytes_words(MOST_STREAMED_BYTES)} come out of it: give a file")
    return content


def unpacked(content: bytes, where: object, error: type[InputError] = InputError) -> bytes:
    """Returns what a gzip file's bytes hold, other bytes as they are; refuse what is broken or unpacks to far more."""
    if content[:2] != _GZIP:
        return content
    most = max(LEAST_UNPACKED_BYTES, UNPACKED_TIMES * len(content))
    pieces, size = [], 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
            while piece := stream.read(_PIECE_BYTES):
                size += len(piece)
                if size > most:
                    raise error(
                        f"{where}: {bytes_words(len(content))} that unpack to more than {bytes_words(most)}: "
                        "damaged, or not what it says"
                    )
                pieces.append(piece)
    except (gzip.BadGzipFile, EOFError, zlib.error) as problem:
        raise error(f"{where}: a broken .gz file: {problem}") from None
    return b"".join(pieces)


def check_json(content: bytes, where: object, file_bytes: int, error: type[InputError] = InputError) -> bytes:
    """Returns JSON as it is, unless what would be made of it takes far more than a file of this size may ask for."""
    need = len(content) + sum(each * content.count(sign) for sign, each in _JSON_BYTES.items())
    check_need(where, "its content", need, file_bytes, error)
    return content


def read_json(path: Path, error: type[InputError] = InputError) -> bytes:
    """Returns the JSON of a file, packed by gzip or not, checked for size and not parsed. Raises OSError."""
    content = read(path, error)
    return check_json(unpacked(content, path, error), path, len(content), error)


def parse_toml(text: str, where: object, error: type[InputError] = InputError) -> dict[str, Any]:
    """Returns a TOML document's data; refuse what is no TOML, and what no person would write."""
    if len(text) > MOST_TOML_BYTES:
        raise error(f"{where}: {bytes_words(len(text))} of TOML: must be at most {bytes_words(MOST_TOML_BYTES)}")
    for part in _TOML_ENDS.split(text):
        dots = _TOML_QUOTED.sub("", part.partition("#")[0]).count(".") if part.count(".") > MOST_KEY_PARTS else 0
        if dots > MOST_KEY_PARTS:
            raise error(f"{where}: {part.strip()[:40]}…: a key of {dots + 1:,} parts: write it as section.key")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise error(f"{where}: not TOML: nested too deeply") from None
    except ValueError as problem:
        raise error(f"{where}: not TOML: {' '.join(str(problem).split())}") from None


def read_npz(path: Path, error: type[InputError] = InputError) -> dict[str, Array]:
    """Returns the arrays of an `.npz` file by name; nothing is unpickled. Raises OSError.

    Refuses a file that is none or damaged, an array that is not as large as it says, and arrays that are together far
    larger than the file.
    """
    with path.open("rb") as stream:
        if not zipfile.is_zipfile(stream):
            raise error(f"{path}: not a whole .npz archive: the file is truncated or of another kind")
        file_bytes = path.stat().st_size
        try:
            with zipfile.ZipFile(stream) as archive:
                size = sum(member.file_size for member in archive.infolist())
                most = max(LEAST_UNPACKED_BYTES, UNPACKED_TIMES * file_bytes)
                if size > most:
                    raise error(
                        f"{path}: {bytes_words(file_bytes)} that unpack to {bytes_words(size)}: at most "
                        f"{bytes_words(most)} are read of such a file: damaged, or not what it says (save it without "
                        "compression)"
                    )
                return dict(_members(archive, path, error))
        except InputError:
            raise
        except _NPZ_ERRORS as problem:
            raise error(f"{path}: damaged: {_one_line(problem)}: write it again") from problem


#: What reading a damaged `.npz` may raise, seen by cutting and flipping files.
_NPZ_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    SyntaxError,
    MemoryError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _members(archive: zipfile.ZipFile, path: Path, error: type[InputError]) -> Iterator[tuple[str, Array]]:
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        try:
            with archive.open(member) as content:
                _check_header(content, member.file_size)
            with archive.open(member) as content:
                yield name, np.lib.format.read_array(content, allow_pickle=False)
        except (ValueError, SyntaxError, TokenError) as problem:  # numpy reads a header as Python's literals
            if "Object arrays" in str(problem):
                raise error(
                    f"{path}: {name}: holds Python objects: must be plain numbers, for nothing is unpickled"
                ) from problem
            raise error(f"{path}: {name}: damaged: {_one_line(problem)}: write it again") from problem


def _check_header(content: Any, member_bytes: int) -> None:
    """Raise ValueError unless an .npy file's header names an array that the file is large enough for."""
    version = np.lib.format.read_magic(content)
    if version not in _HEADERS:
        raise ValueError(f"version {version} of the .npy format, which only structured arrays need")
    shape, _, dtype = _HEADERS[version](content)
    need_bytes = dtype.itemsize
    for length in shape:
        need_bytes *= length
    if not dtype.hasobject and need_bytes > member_bytes:
        raise ValueError(f"shape {shape} of {dtype} needs {need_bytes:,} bytes, and there are {member_bytes:,}")


def _one_line(problem: BaseException) -> str:
    return " ".join(str(problem).split()) or type(problem).__name__
