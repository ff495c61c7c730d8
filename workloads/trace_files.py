"""Files of traces: arrays by name, and what they are of, as .safetensors or .npz."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from ..bounded import read_npz
from ..files import check_file
from .trace_limits import Array, TraceError


def _read_npz(path: Path) -> tuple[dict[str, Array], str | None]:
    arrays = read_npz(path, TraceError)
    meta = arrays.pop("meta", None)
    if meta is None:
        return arrays, None
    if meta.size != 1 or meta.dtype.kind not in "US":
        raise TraceError(f"{path}: meta: dtype {meta.dtype}, shape {meta.shape}: must be one string of JSON")
    text: str | bytes = meta.item()
    return arrays, text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)


def _write_npz(stream: BinaryIO, path: Path, arrays: dict[str, Array], text: str) -> None:
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, value in [*arrays.items(), ("meta", np.array(text))]:
            # Neither the clock nor the operating system may show in the bytes.
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3
            info.external_attr = 0o644 << 16
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, value, allow_pickle=False)


def _read_safetensors(path: Path) -> tuple[dict[str, Array], str | None]:
    with path.open("rb"):
        pass  # an OSError that says why, which safetensors would wrap
    arrays: dict[str, Array] = {}
    name = "header"
    try:
        with safetensors.safe_open(path, framework="numpy") as content:
            text = (content.metadata() or {}).get("meta")
            for name in content.keys():  # noqa: SIM118 (not a dict)
                arrays[name] = content.get_tensor(name)
    except safetensors.SafetensorError as error:
        raise TraceError(f"{path}: damaged or truncated: {_one_line(error)}: write it again") from error
    except (TypeError, AttributeError, ValueError, MemoryError) as error:
        raise TraceError(f"{path}: {name}: of a type that numpy lacks ({_one_line(error)}): convert it") from error
    return arrays, text


def _write_safetensors(stream: BinaryIO, path: Path, arrays: dict[str, Array], text: str) -> None:
    for name, value in arrays.items():
        if value.dtype.kind in "SUc":
            raise TraceError(f"{path}: {name}: dtype {value.dtype}: safetensors cannot hold it: save as .npz")
    # More than one metadata key would come out in an order that varies.
    stream.write(safetensors.numpy.save(arrays, metadata={"meta": text}))


class Format(NamedTuple):
    """How files of one kind are read and written: arrays by name, and the text of their facts."""

    read: Callable[[Path], tuple[dict[str, Array], str | None]]
    write: Callable[[BinaryIO, Path, dict[str, Array], str], None]


_FORMATS = {
    ".npz": Format(_read_npz, _write_npz),
    ".safetensors": Format(_read_safetensors, _write_safetensors),
}


def check_trace_file(path: Path) -> None:
    """Refuse a file that no trace can be saved to, before one is made. Raises TraceError, InputError and OSError."""
    format_of(path)
    check_file(path)


def format_of(path: Path) -> Format:
    """Returns how files of this name are read and written; TraceError for another ending."""
    try:
        return _FORMATS[path.suffix.lower()]
    except KeyError:
        raise TraceError(
            f"{path}: {path.suffix or 'no suffix'}: a trace's name must end in {' or '.join(_FORMATS)}"
        ) from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
