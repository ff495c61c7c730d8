"""The one way in which Prestage writes files: whole or not at all, and an error names the file that was asked for.

What is written goes to a temporary file or folder beside its place, and is moved there at the end. Whatever comes
before that, be it a full disk or a signal, leaves what was there as it was.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import InputError


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` and move it there at the end; after any exception, remove it.

    A link is followed: what it points to is replaced. Raises OSError, which names `path`.
    """
    place = Path(os.path.realpath(path))
    temporary = _beside(place)
    try:
        with naming(path, temporary):
            if place.is_dir():
                raise _error(errno.EISDIR, path)
            with temporary.open("xb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(place)
    finally:
        with suppress(OSError):  # it was moved, or could not be made
            temporary.unlink()


def write_file(path: str | Path, content: bytes) -> None:
    """Write a file of these bytes. Raises OSError, which names `path`."""
    with replacing(path) as stream:
        stream.write(content)


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside `folder` and move it there at the end; after any exception, remove it.

    A folder that is there keeps what is not written anew: once all files are written, and nothing is in their way, they
    are moved into it one by one. Parents that lack are made. Raises OSError, which names the file that `folder` was to
    hold.
    """
    place = Path(os.path.realpath(folder))
    temporary = _beside(place)
    with made_folder(place.parent):
        try:
            with naming(folder, temporary):
                if place.exists() and not place.is_dir():
                    raise _error(errno.ENOTDIR, folder)
                temporary.mkdir()
                yield temporary
                if place.exists():
                    _check_ways(temporary, place)
                    _move_files(temporary, place)
                else:
                    temporary.rename(place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def made_folder(folder: str | Path, *, keep: bool = True) -> Iterator[Path]:
    """Make a folder that is filled little by little; after any exception, remove it again if nothing is in it.

    For what goes on where it was: journals, and files that are whole each by itself. Without `keep`, a folder that was
    not there is removed with all that is in it. Raises OSError, before anything is done, if the folder cannot be made
    or takes no file.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_folder(folder)
        yield folder
    except BaseException:
        if made and not keep:
            shutil.rmtree(folder, ignore_errors=True)
        for path in made:
            try:
                path.rmdir()
            except OSError:  # it holds something
                break
        raise


def check_folder(folder: str | Path) -> None:
    """Raise OSError, which names `folder`, if it cannot be made or takes no file: asked before anything runs."""
    nearest = next(path for path in (Path(folder), *Path(folder).absolute().parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise _error(error.errno or errno.EIO, folder) from None


def check_file(path: str | Path) -> None:
    """Refuse a file that cannot be written, before anything runs. Raises InputError and OSError, which name it."""
    place = Path(os.path.realpath(path))
    if not place.parent.is_dir():
        raise InputError(f"{path}: there is no folder {Path(path).parent}")
    if place.is_dir():
        raise _error(errno.EISDIR, path)
    with naming(path, place.parent):
        check_folder(place.parent)


@contextmanager
def naming(path: str | Path, instead_of: str | Path | None = None) -> Iterator[None]:
    """Give an OSError that names no file this one; what lies at or in `instead_of` is named as if it were at `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        if error.filename is None:
            raise _error(error.errno, path) from error
        if instead_of is not None and Path(os.fsdecode(error.filename)).is_relative_to(instead_of):
            raise _error(error.errno, Path(path) / Path(error.filename).relative_to(instead_of)) from error
        raise


def _error(number: int, path: str | Path) -> OSError:
    """Returns the operating system's error of this number about a file."""
    return OSError(number, os.strerror(number), str(path))


def _beside(place: Path) -> Path:
    """Returns a name of its own in the folder of `place`, short enough for any file system."""
    return place.with_name(f".prestage-{uuid.uuid4().hex}.tmp")


def _check_ways(source: Path, target: Path) -> None:
    """Raise OSError if a folder is where a file of `source` goes, or a file where a folder goes: before any moves."""
    for path in sorted(source.iterdir()):
        place = target / path.name
        if path.is_dir() and place.is_dir():
            _check_ways(path, place)
        elif path.is_dir() and os.path.lexists(place):
            raise _error(errno.ENOTDIR, path)
        elif place.is_dir() and not place.is_symlink():
            raise _error(errno.EISDIR, path)


def _move_files(source: Path, target: Path) -> None:
    """Move all files of a folder to their places in another, which keeps what else it holds."""
    for path in sorted(source.iterdir()):
        place = target / path.name
        if path.is_dir() and place.exists():
            _move_files(path, place)
        else:
            path.replace(place)
